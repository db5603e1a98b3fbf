import asyncio
import math
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from liqlab import clock, settings, synth
from liqlab.archive import history
from liqlab.budget import measure, sizes
from liqlab.candles import candles, every
from liqlab.cleanup import Cleaner, Pressure, Tier, backup, families, schedule
from liqlab.replay import ingest
from liqlab.server import Server, serve
from liqlab.writer import Writer
from tests.test_writer import plain

MINUTE, HOUR, DAY = clock.MINUTE_MS, clock.HOUR_MS, clock.DAY_MS
CRITICAL = ("signal:X", "position:X")


async def critical_keys(redis: Redis) -> None:
    await redis.xadd("signal:X", {"notional": 5})
    await redis.hset("position:X", "size", "1.5")


async def fill(redis: Redis, ratio: float) -> None:
    """Let somebody else's keys grow until the server is that full."""
    n = 0
    while True:
        memory = await redis.info("memory")
        if memory["used_memory"] >= ratio * memory["maxmemory"]:
            return
        n += 1
        await redis.set(f"cache:{n}", b"x" * 40_000)


async def forget(redis: Redis) -> None:
    if keys := await redis.keys("cache:*"):
        await redis.delete(*keys)


# Tiers


def pressure(dwell_s: float = 60) -> Pressure:
    return Pressure(settings.load(cleanup={"dwell_s": dwell_s}))


def test_a_tier_is_entered_at_once_and_left_one_by_one_below_its_margin() -> None:
    tiers = pressure()
    seen = [tiers.update(ratio, minute * 120_000) for minute, ratio in enumerate([0.7, 0.76, 0.92, 0.86, 0.84, 0.81])]
    assert seen == [Tier.NORMAL, Tier.TRIM, Tier.EMERGENCY, Tier.EMERGENCY, Tier.HALVE, Tier.HALVE]
    assert [tiers.update(ratio, 10**7) for ratio in (0.79,)] == [Tier.TRIM]
    assert tiers.update(0.1, 10**7 + 59_999) is Tier.TRIM  # the dwell is not over
    assert tiers.update(0.1, 10**7 + 60_000) is Tier.NORMAL
    assert tiers.changes == 5


@given(st.lists(st.tuples(st.floats(0, 1.2), st.integers(1, 100_000)), max_size=60))
def test_tiers_never_flap(steps: list[tuple[float, int]]) -> None:
    tiers, now, entered = pressure(), 0, 0
    for ratio, later in steps:
        now += later
        old = tiers.tier
        new = tiers.update(ratio, now)
        if new > old:
            assert ratio > {1: 0.75, 2: 0.85, 3: 0.90}[new]
        if new < old:
            assert new == old - 1
            assert now - entered >= 60_000
            assert ratio <= {1: 0.70, 2: 0.80, 3: 0.85}[old]
        if new != old:
            entered = now


def test_an_emergency_works_until_it_is_over() -> None:
    tiers = pressure()
    tiers.update(0.8, 0)
    assert [tiers.due(now) for now in (0, 1, 59_999, 60_000)] == [True, False, False, True]
    tiers.update(0.95, 60_001)
    assert [tiers.due(now) for now in (60_001, 60_002)] == [True, True]
    tiers.update(0.88, 60_003)
    assert not tiers.due(60_003)


# Bytes


@pytest.mark.parametrize("layout", ["shared", "per_symbol"])
async def test_streams_stay_within_their_share(fresh_server: Callable[..., Server], layout: str) -> None:
    chosen = settings.load(
        server={"maxmemory": "6mb"},
        budget={"streams": 0.12, "vwap": 0.1, "percentile": 0.2, "statistics": 0.3, "misc": 0.08, "buffer": 0.2},
        writer={"layout": layout},
        retention={"hot_s": 300},
    )
    events = synth("cascade", hours=1, seed=3, symbols=60)
    share, worst = 0.12 * 6 * 2**20, [0.0]
    async with fresh_server(settings=chosen).connect() as redis:
        await critical_keys(redis)
        cleaner = Cleaner(redis, settings=chosen)

        async def look() -> None:
            names = [key.decode() for key in await redis.keys("liq*") if not key.startswith((b"liqw", b"liqc"))]
            worst[0] = max(worst[0], float((await sizes(redis, names))["bytes"].sum()))

        clocked = schedule.EventClock(cleaner)
        writer = Writer(redis, settings=chosen)
        minutes = events["ts_ms"].to_numpy() // MINUTE
        stops = [*(np.flatnonzero(np.diff(minutes)) + 1).tolist(), len(events)]
        async for _, stop in writer.write_slices(events, stops):
            if layout == "shared":  # there every batch keeps to the limit; else a round of cleanup does
                await look()
            await clocked.run(int(events["ts_ms"].iloc[stop - 1]))
            await look()
        assert worst[0] < share * 1.02
        removed = writer.counts.trimmed + sum(action.events for action in cleaner.actions)
        kept = await history(redis, settings=chosen)
        assert len(kept) + removed == len(events)
        assert removed > 0
        newest = events.tail(len(kept))
        if layout == "shared":
            pd.testing.assert_frame_equal(plain(kept), plain(newest), check_dtype=False)
        stats = await redis.info("stats")
        assert stats["evicted_keys"] == 0
        assert await redis.exists(*CRITICAL) == 2


async def test_a_batch_keeps_to_the_limit_that_cleanup_set(default_redis: Redis) -> None:
    events = synth("normal", hours=24, seed=1, symbols=40)
    chosen = settings.load(retention={"hot_s": 60})
    cleaner = Cleaner(default_redis, settings=chosen)
    await Writer(default_redis, settings=chosen).write_table(events.iloc[:50_000])
    await cleaner.trim(int(events["ts_ms"].iloc[49_999]))
    limits = await default_redis.hgetall("liqc")
    assert int(limits[b"bytes"]) < 0.4 * 240 * 2**20
    await default_redis.hset("liqc", "bytes", 300_000)  # as if the share were that small

    writer = Writer(default_redis, settings=chosen)
    await writer.write_table(events.iloc[50_000:])
    sized = await sizes(default_redis, ["liq", "liqb"])
    assert sized["bytes"].sum() < 330_000
    kept = await history(default_redis, settings=chosen)
    assert len(kept) + writer.counts.trimmed == len(events)
    pd.testing.assert_frame_equal(plain(kept), plain(events.tail(len(kept))), check_dtype=False)


async def test_silent_symbols_give_their_streams_back(default_redis: Redis) -> None:
    chosen = settings.load(writer={"layout": "per_symbol"}, retention={"hot_s": 60})
    events = synth("cascade", hours=0.2, seed=1, symbols=150)
    await Writer(default_redis, settings=chosen).write_table(events)
    before = await measure(default_redis, settings=chosen)
    later = int(events["ts_ms"].max()) + HOUR
    cleaner = Cleaner(default_redis, settings=chosen)
    await cleaner.compact(later)
    after = await measure(default_redis, settings=chosen)
    assert before.families.loc["events", "keys"] == events["symbol"].nunique()
    assert "events" not in after.families.index
    assert after.table.loc["streams", "bytes"] < before.table.loc["streams", "bytes"] / 4
    pd.testing.assert_frame_equal(plain(await history(default_redis)), plain(events), check_dtype=False)

    more = events.assign(ts_ms=events["ts_ms"] + HOUR)  # the same symbols come alive again
    await Writer(default_redis, settings=chosen).write_table(more)
    pd.testing.assert_frame_equal(
        plain(await history(default_redis)), plain(pd.concat([events, more])), check_dtype=False
    )


async def test_statistics_and_sketches_stay_within_their_shares(default_server: Server) -> None:
    chosen = settings.load(
        server={"maxmemory": "8mb"},
        budget={"streams": 0.6, "vwap": 0.1, "percentile": 0.01, "statistics": 0.04, "misc": 0.05, "buffer": 0.2},
        retention={"percentile_bucket_s": 300, "percentile_window_s": 7_200},
    )
    events = synth("normal", hours=2, seed=1)
    with serve(binary=default_server.binary, settings=chosen) as server:
        async with server.connect() as redis:
            done = await ingest(events, redis, settings=chosen, cleaner=Cleaner(redis, settings=chosen))
            measured = await measure(redis, settings=chosen)
            used = measured.table.loc[["percentile", "statistics"], "used_pct"]
            assert used.between(50, 110).all(), used
            assert done.evicted == 0
            found = {int(at) for key in await redis.keys("sketch:*") for at in await redis.hkeys(key)}
            newest = int(events["ts_ms"].max()) // 300_000
            assert found == set(range(min(found), newest + 1))  # the oldest went, and no others
            assert len(found) < 24


# Tiers on a real server


async def test_each_tier_does_its_work_and_touches_nothing_critical(fresh_server: Callable[..., Server]) -> None:
    chosen = settings.load(server={"maxmemory": "24mb"}, cleanup={"dwell_s": 60})
    events = synth("normal", hours=3, seed=1, rate_per_min=500)
    now = int(events["ts_ms"].max())
    async with fresh_server(settings=chosen).connect() as redis:
        await critical_keys(redis)
        await redis.set("alert:X:buy", "1", ex=600)
        await redis.set("temp:scratch", "x" * 1_000)
        await redis.set("stats:old:1", "x" * 1_000, ex=300)
        await ingest(events, redis, settings=chosen)
        kept = [len(await history(redis))]
        cleaner = Cleaner(redis, settings=chosen)
        await cleaner.trim(now)
        assert cleaner.tier is Tier.NORMAL

        async def press(ratio: float, later_s: int) -> list[str]:
            await forget(redis)
            await fill(redis, ratio)
            done = await cleaner.trim(now + 1000 * later_s)
            kept.append(len(await history(redis)))
            return [f"{action.what} {action.family}" for action in done]

        await press(0.78, 1)
        assert (cleaner.tier, kept[-1]) == (Tier.TRIM, kept[0])
        assert await redis.exists("temp:scratch") == 1
        oldest = min(int(key.split(b":")[2]) for key in await redis.keys("candle1h:*"))
        halved = await press(0.88, 2)
        assert cleaner.tier is Tier.HALVE
        assert "drop candle" in halved
        assert min(int(key.split(b":")[2]) for key in await redis.keys("candle1h:*")) >= oldest
        minutes = {int(key.split(b":")[2]) for key in await redis.keys("candle:*")}
        assert all(minute >= now // MINUTE - 31 for minute in minutes)
        emergency = await press(0.93, 3)
        assert cleaner.tier is Tier.EMERGENCY
        assert "drop temporary" in emergency
        assert await redis.exists("temp:scratch", "stats:old:1") == 0
        assert kept[-1] <= kept[-2] * 0.6
        assert await redis.exists("alert:X:buy", *CRITICAL) == 3
        assert len(await redis.keys("vwap:*")) > 100
        survivors = await history(redis)
        pd.testing.assert_frame_equal(plain(survivors), plain(events.tail(len(survivors))), check_dtype=False)

        await forget(redis)
        tiers = [cleaner.tier]
        for minute in range(1, 6):
            await cleaner.trim(now + minute * 60_000 + 3_000)
            tiers.append(cleaner.tier)
        assert tiers == [3, 2, 1, 0, 0, 0]
        for action in cleaner.actions:
            assert action.as_dict()["freed"] == action.bytes_before - action.bytes_after


async def test_a_dry_run_says_what_and_does_nothing(default_server: Server) -> None:
    chosen = settings.load(server={"maxmemory": "5mb"}, retention={"hot_s": 60})
    events = synth("normal", hours=12, seed=1)
    roomy = settings.load(server={"maxmemory": "64mb", "maxmemory_policy": "noeviction"})
    with serve(binary=default_server.binary, settings=roomy) as server:
        async with server.connect() as redis:
            await Writer(redis, settings=chosen).write_table(events)
            await redis.set("temp:a", "b")
            await redis.config_set("maxmemory", "5mb")
            keys, used = await redis.dbsize(), len(await history(redis))
            dry = Cleaner(redis, settings=chosen, dry_run=True)
            said = await dry.trim(int(events["ts_ms"].max()))
            said += await dry.check() + await dry.compact() + await dry.daily()
            assert (await redis.dbsize(), len(await history(redis))) == (keys, used)
            assert {"trim events", "drop temporary", "expire all"} <= {f"{a.what} {a.family}" for a in said}
            assert all(action.freed == 0 for action in said)

            wet = Cleaner(redis, settings=chosen)
            did = await wet.trim(int(events["ts_ms"].max()))
            assert {f"{a.what} {a.family}" for a in did} >= {"trim events", "drop temporary"}
            assert len(await history(redis)) < used


# What has no TTL, and what is idle


async def test_orphans_get_the_ttl_of_their_family(redis: Redis) -> None:
    await redis.set("alert:X:sell", "1")
    await redis.hset("vwap:Y", mapping={"count": 1, "last_update": clock.now_ms()})
    await redis.hset("vwap:Z", mapping={"count": 1, "last_update": clock.now_ms() - 2 * HOUR})
    await redis.set("somebody:else", "1")
    await critical_keys(redis)
    cleaner = Cleaner(redis, settings=settings.load())
    await cleaner.check()
    assert 0 < await redis.ttl("alert:X:sell") <= 600
    assert await redis.ttl("vwap:Y") == -1
    await cleaner.compact()
    assert 0 < await redis.ttl("vwap:Y") <= 3_600
    assert await redis.exists("vwap:Z") == 0
    assert [await redis.ttl(key) for key in ("somebody:else", *CRITICAL)] == [-1, -1, -1]


async def test_the_process_gives_pages_back_after_a_big_free(fresh_server: Callable[..., Server]) -> None:
    chosen = settings.load(server={"maxmemory": "64mb"})
    async with fresh_server(settings=chosen).connect() as redis:
        keys = [f"cache:{n}" for n in range(60_000)]
        for start in range(0, len(keys), 10_000):
            await redis.mset(dict.fromkeys(keys[start : start + 10_000], b"x" * 600))
        await redis.delete(*keys)
        await asyncio.sleep(0.3)  # the server looks at its RSS ten times a second
        full = await redis.info("memory")
        purged = [action for action in await Cleaner(redis, settings=chosen).check() if action.what == "purge"]
        after = await redis.info("memory")
        if full["mem_allocator"].startswith("jemalloc"):
            assert "RSS" in purged[0].detail
            assert after["used_memory_rss"] < full["used_memory_rss"] - 10 * 2**20
        else:
            assert purged == []  # it has nothing to give, and nothing is claimed
        assert not [action for action in await Cleaner(redis, settings=chosen).check() if action.what == "purge"]


# Files


async def test_critical_data_can_be_restored(default_redis: Redis, tmp_path: Path) -> None:
    await critical_keys(default_redis)
    await default_redis.expire("signal:X", 1_000)
    await Writer(default_redis).write_table(synth("quiet", hours=1, seed=1))
    cleaner = Cleaner(default_redis, settings=settings.load(cleanup={"folder": tmp_path}))
    done = await cleaner.daily()
    assert [action.what for action in done if action.what != "reset"] == ["backup", "defragment"]
    [path] = tmp_path.glob("critical-*.parquet")
    table = pd.read_parquet(path)
    vwaps = await default_redis.keys("vwap:*")
    assert len(table) == len(vwaps) + 3
    assert table.set_index("key")["value"][b"position:X"] == '{"size": "1.5"}'

    before = {key: await default_redis.dump(key) for key in (*vwaps, *CRITICAL, "liqid")}
    await default_redis.flushall()
    await default_redis.hset("position:X", "size", "7")
    assert await backup.restore(default_redis, path) == len(table) - 1
    assert await default_redis.hget("position:X", "size") == b"7"  # what is newer stays, unless told otherwise
    assert await backup.restore(default_redis, path, replace=True) == len(table)
    assert {key: await default_redis.dump(key) for key in before} == before
    assert 900 < await default_redis.ttl("signal:X") <= 1_000
    assert await default_redis.ttl("position:X") == -1


async def test_what_is_no_backup_is_refused(default_redis: Redis, tmp_path: Path) -> None:
    (tmp_path / "other.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(backup.BackupError, match=r"other\.parquet is no backup"):
        await backup.restore(default_redis, tmp_path / "other.parquet")


async def test_days_are_summed_up_before_their_hours_expire(default_redis: Redis, tmp_path: Path) -> None:
    events = synth("normal", hours=30, seed=1, symbols=20)
    events = events.assign(ts_ms=events["ts_ms"] - events["ts_ms"].iloc[0] + 20_000 * DAY + 20 * HOUR)
    early, late = events.iloc[:-500], events.iloc[100:110]
    chosen = settings.load(cleanup={"folder": tmp_path, "folder_days": 2})
    cleaner = Cleaner(default_redis, settings=chosen)
    now = int(events["ts_ms"].max())
    await Writer(default_redis, settings=chosen).write_table(early)
    await cleaner.compact(now)
    first, second = sorted(tmp_path.glob("days-*.parquet"))
    for path, day in ((first, 20_000), (second, 20_001)):
        part = early[early["ts_ms"] // DAY == day]
        table = pd.read_parquet(path).set_index("symbol")
        expected = part.groupby(part["symbol"].astype(str))
        assert (table["ts_ms"] == day * DAY).all()
        assert table["count"].to_dict() == expected.size().to_dict()
        for column, values in (("volume", "size"), ("notional", "notional")):
            for symbol, rows in expected:
                assert math.isclose(table.loc[symbol, column], math.fsum(rows[values]), rel_tol=1e-9)
        assert table["open"].to_dict() == expected["price"].first().to_dict()
        assert table["high"].to_dict() == expected["price"].max().to_dict()
        assert np.allclose(table["vwap"], table["notional"] / table["volume"])

    before = pd.read_parquet(first)
    await cleaner.compact(now)
    assert pd.read_parquet(first).equals(before)
    await Writer(default_redis, settings=chosen).write_table(late)  # some of the first day come late, once more
    await cleaner.compact(now)
    assert pd.read_parquet(first)["count"].sum() == before["count"].sum() + len(late)
    await default_redis.delete(*await default_redis.keys("candle1h:*"))
    await cleaner.compact(now)
    assert pd.read_parquet(first)["count"].sum() == before["count"].sum() + len(late)
    assert (await every(default_redis, "1h")).empty


# The schedule


async def test_a_feeds_clock_runs_each_job_when_it_is_due(default_redis: Redis) -> None:
    ran: list[tuple[str, int]] = []

    class Counting(Cleaner):
        async def trim(self, now_ms: int | None = None) -> list:
            ran.append(("trim", now_ms or 0))
            return []

        async def check(self, now_ms: int | None = None) -> list:
            ran.append(("check", now_ms or 0))
            return []

        async def compact(self, now_ms: int | None = None) -> list:
            ran.append(("compact", now_ms or 0))
            return []

        async def daily(self, now_ms: int | None = None) -> list:
            ran.append(("daily", now_ms or 0))
            return []

    due = schedule.EventClock(Counting(default_redis, settings=settings.load()))
    for minute in (0, 1, 5, 6, 60, 61, 1440):
        await due.run(minute * MINUTE)
    times = {job: [at // MINUTE for name, at in ran if name == job] for job in schedule.JOBS}
    assert times == {"trim": [0, 1, 5, 6, 60, 61, 1440], "check": [5, 60, 1440], "compact": [60, 1440], "daily": [1440]}


async def test_one_process_runs_the_schedule_and_a_second_one_takes_over(default_redis: Redis) -> None:
    chosen = settings.load(cleanup={"trim_s": 0.05}, retention={"lock_s": 1})
    first, second = (Cleaner(default_redis, settings=chosen) for _ in range(2))
    told: list[str] = []
    rounds = {"first": 0, "second": 0}

    def counting(name: str, cleaner: Cleaner) -> None:
        trim = cleaner.trim

        async def counted(now_ms: int | None = None) -> list:
            rounds[name] += 1
            return await trim(now_ms)

        cleaner.trim = counted  # type: ignore[method-assign]

    counting("first", first)
    counting("second", second)
    one = asyncio.create_task(schedule.run(default_redis, first))
    while rounds["first"] < 2:
        await asyncio.sleep(0.01)
    two = asyncio.create_task(schedule.run(default_redis, second, on_wait=told.append))
    while rounds["first"] < 5 or not told:
        await asyncio.sleep(0.01)
    assert rounds["second"] == 0
    assert "another process runs the schedule" in told[0]
    assert 0 < await default_redis.pttl("liqc:lock") <= 1_000
    one.cancel()
    await asyncio.gather(one, return_exceptions=True)
    while rounds["second"] < 2:
        await asyncio.sleep(0.01)
    assert len(told) == 1
    two.cancel()
    await asyncio.gather(two, return_exceptions=True)
    assert await default_redis.exists("liqc:lock") == 0


async def test_a_restarted_schedule_knows_when_each_job_ran(default_redis: Redis, tmp_path: Path) -> None:
    await critical_keys(default_redis)
    chosen = settings.load(cleanup={"folder": tmp_path, "trim_s": 0.05})

    async def until(condition: Callable[[], bool]) -> Cleaner:
        cleaner = Cleaner(default_redis, settings=chosen)
        running = asyncio.create_task(schedule.run(default_redis, cleaner))
        while not condition():
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return cleaner

    # What never ran is due at once, the daily backup too.
    first = await until(lambda: bool(list(tmp_path.glob("critical-*.parquet"))))
    assert "backup" in {action.what for action in first.actions}
    ran = await default_redis.hgetall("liqc")
    assert {f"{job}_ms".encode() for job in schedule.JOBS} <= set(ran)
    [path] = tmp_path.glob("critical-*.parquet")
    path.unlink()
    began = clock.now_ms()
    second = await until(lambda: clock.now_ms() > began + 500)
    assert "backup" not in {action.what for action in second.actions}
    again = await default_redis.hgetall("liqc")
    assert int(again[b"trim_ms"]) > int(ran[b"trim_ms"])
    assert again[b"daily_ms"] == ran[b"daily_ms"]


JOB = """
    import asyncio, sys
    from pathlib import Path
    from liqlab import settings
    from liqlab.cleanup import Cleaner
    from liqlab.server import connect

    async def main(url, job, now, folder):
        chosen = settings.load(
            server={"maxmemory": "5mb"}, retention={"hot_s": 60}, cleanup={"folder": folder},
            writer={"layout": "hybrid"},
        )
        async with connect(url) as redis:
            print("begins", flush=True)
            await getattr(Cleaner(redis, settings=chosen), job)(int(now))
            print("done", flush=True)

    asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("job", schedule.JOBS)
async def test_a_job_that_was_killed_is_finished_by_the_next_run(job: str, tmp_path: Path) -> None:
    chosen = settings.load(
        server={"maxmemory": "64mb", "maxmemory_policy": "noeviction"},
        retention={"hot_s": 60},
        writer={"layout": "hybrid", "hybrid_events": 300},
    )
    events = synth("normal", hours=9, seed=1, symbols=80)
    events = events.assign(ts_ms=events["ts_ms"] - 2 * HOUR)  # from one day into the next
    now = int(events["ts_ms"].max())
    rng = clock.generator(schedule.JOBS.index(job))
    with serve(settings=chosen) as server:
        async with server.connect() as redis:
            await critical_keys(redis)
            await Writer(redis, settings=chosen).write_table(events)
            await redis.config_set("maxmemory", "5mb")
            # More than the script may be allowed to write at: only freeing works now.
            for _ in range(2):
                command = [sys.executable, "-c", textwrap.dedent(JOB), server.url, job, str(now), str(tmp_path)]
                with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                    assert child.stdout is not None
                    assert await asyncio.to_thread(child.stdout.readline) == "begins\n"
                    await asyncio.sleep(float(rng.uniform(0.005, 0.25)))
                    os.kill(child.pid, signal.SIGKILL)
                kept = await history(redis, settings=chosen)
                pd.testing.assert_frame_equal(plain(kept), plain(events.tail(len(kept))), check_dtype=False)
            small = settings.load(
                server={"maxmemory": "5mb"}, retention={"hot_s": 60}, cleanup={"folder": tmp_path},
                writer={"layout": "hybrid"},
            )  # fmt: skip
            for _ in range(4):
                again = await getattr(Cleaner(redis, settings=small), job)(now)
            assert not [action for action in again if action.what in ("drop", "archive", "seal")], again
            kept = await history(redis, settings=chosen)
            pd.testing.assert_frame_equal(plain(kept), plain(events.tail(len(kept))), check_dtype=False)
            assert await redis.exists(*CRITICAL) == 2
            if job in ("compact", "daily"):
                assert not list(tmp_path.glob("*.part")) or job == "daily"
                assert [pd.read_parquet(path) is not None for path in tmp_path.glob("*.parquet")]


async def test_packed_candles_are_the_smaller_ones_and_agree_with_resample(default_redis: Redis) -> None:
    events = synth("normal", hours=24, seed=0)
    taken = {}
    for form in ("packed", "hash"):
        await default_redis.flushall()
        await Writer(default_redis, settings=settings.load(writer={"candles": form})).write_table(events)
        taken[form] = (await measure(default_redis, limit=500)).families["bytes"]
    assert taken["packed"]["candle"] < 0.7 * taken["hash"]["candle"]
    assert taken["packed"]["candle_1h"] < taken["packed"]["events"]
    busiest = str(events["symbol"].mode()[0])
    own = events[events["symbol"] == busiest]
    got = await candles(default_redis, busiest, width="1h")
    stamps = pd.to_datetime(own["ts_ms"], unit="ms")
    expected = own.set_index(stamps)["price"].resample("1h").ohlc().dropna()
    assert np.array_equal(got[["open", "high", "low", "close"]].to_numpy(), expected.to_numpy())
    assert families.STATISTICS == ("candle", "candle_5m", "candle_1h")
