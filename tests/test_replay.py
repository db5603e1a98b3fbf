"""An ingest follows the feed's own clock: what is left is what a live server would hold at the feed's end."""

import asyncio
import gc
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from liqlab import clock, read_feed, schema, serve, settings, synth
from liqlab.archive import count
from liqlab.cleanup import Cleaner
from liqlab.detector import Detector, backtest
from liqlab.events import EventError, empty, event_table
from liqlab.feeds import Feed
from liqlab.fidelity import Replayed, fidelity, replay
from liqlab.replay import at_speed, ingest
from liqlab.server import Server
from liqlab.writer import Writer, WriterError
from tests.test_writer import T0, plain, sample, stored

DATA = Path(__file__).resolve().parents[1] / "data"
HOUR, MINUTE = clock.HOUR_MS, clock.MINUTE_MS


def at(*offsets_ms: int, symbol: str = "A") -> pd.DataFrame:
    n = len(offsets_ms)
    times = [T0 + offset for offset in offsets_ms]
    return event_table(times, ["okx"] * n, [symbol] * n, ["buy"] * n, [2.0] * n, [3.0] * n, [6.0] * n)


async def keys(redis: Redis) -> set[str]:
    return {key.decode() for key in await redis.keys()}


@pytest.mark.parametrize("layout", ["per_symbol", "shared", "hybrid"])
async def test_everything_within_its_time_is_there(redis: Redis, layout: str) -> None:
    events = sample(3_000)
    done = await ingest(events, redis, settings=settings.load(writer={"layout": layout}))
    pd.testing.assert_frame_equal(await stored(redis), plain(events), check_dtype=False)
    assert (done.events, done.late, done.trimmed, done.evicted, done.expired) == (3_000, 0, 0, 0, {})


async def test_ttls_run_on_the_feeds_clock(default_redis: Redis) -> None:
    minute = T0 // clock.MINUTE_MS
    await ingest(at(0, 50 * 60_000), default_redis)
    assert await keys(default_redis) >= {f"candle:A:{minute}", f"candle:A:{minute + 50}", "vwap:A"}
    assert float(await default_redis.hget("vwap:A", "count")) == 2

    await default_redis.flushall()
    done = await ingest(at(0, 2 * HOUR), default_redis)
    assert f"candle:A:{minute}" not in await keys(default_redis)
    assert float(await default_redis.hget("vwap:A", "count")) == 1  # idle for an hour: begun anew
    assert done.expired == {"candle": 1, "candle_5m": 1, "vwap": 1, "unique_symbols": 1}
    assert await default_redis.xlen("liq") == 2  # the stream's own time is longer


async def test_a_key_that_is_touched_again_lives_on(default_redis: Redis) -> None:
    done = await ingest(at(*range(0, 3 * HOUR, HOUR // 2)), default_redis)
    assert float(await default_redis.hget("vwap:A", "count")) == 6
    assert "vwap" not in done.expired


async def test_idle_streams_go_and_busy_ones_stay(default_redis: Redis) -> None:
    chosen = settings.load(retention={"events_s": 600}, writer={"layout": "per_symbol"})
    events = pd.concat([at(0, symbol="idle"), at(0, 300_000, 800_000, symbol="busy")])
    await ingest(event_table(**events), default_redis, settings=chosen)
    assert "liq:idle" not in await keys(default_redis)
    assert await default_redis.xlen("liq:busy") == 3


async def test_no_expiry_on_demand(default_redis: Redis) -> None:
    done = await ingest(at(0, 2 * HOUR, 90 * HOUR), default_redis, expire=False)
    assert done.expired == {}
    assert float(await default_redis.hget("vwap:A", "count")) == 3


async def test_two_runs_leave_the_same_keys_and_contents(default_redis: Redis) -> None:
    async def contents() -> dict[str, object]:
        await default_redis.flushall()
        await ingest(events, default_redis)
        out: dict[str, object] = {}
        for key in sorted(await keys(default_redis)):
            family = schema.family_of(key)
            if family is None or family.name == "writer":
                continue
            if family.name == "names":
                out[key] = await default_redis.lrange(key, 1, -1)  # not the token at its head
                continue
            read = {"stream": default_redis.xrange, "hash": default_redis.hgetall, "string": default_redis.get}
            out[key] = await read[(await default_redis.type(key)).decode()](key)
        return out

    events = sample(2_000).assign(ts_ms=lambda table: T0 + (table["ts_ms"] - T0) * 40)
    first = await contents()
    assert first == await contents()
    assert len(first) > 30


async def test_the_timeline_is_the_feeds(default_redis: Redis) -> None:
    steps: list[tuple[int, int]] = []
    events = at(*range(0, 30 * HOUR, HOUR // 20))
    done = await ingest(events, default_redis, progress=lambda n, total: steps.append((n, total)))
    line = done.timeline
    assert 200 <= len(line) <= 500
    assert line["ts_ms"].is_monotonic_increasing
    assert line["ts_ms"].iloc[-1] == events["ts_ms"].iloc[-1]
    assert line["events"].iloc[-1] == len(events) == steps[-1][0] == steps[-1][1]
    assert (line["used_memory"] > 100_000).all()
    # 600 candles of a minute and as many of five, an hour of them kept: without the feed's clock all would be there.
    assert line["keys"].max() < 80


async def test_an_empty_feed_says_so(default_redis: Redis) -> None:
    with pytest.raises(EventError, match="holds no event"):
        await ingest(empty(), default_redis)


async def test_a_feed_is_played_at_speed_through_a_live_writer(default_redis: Redis) -> None:
    events = sample(3_000)
    began = clock.elapsed_s()
    writer = Writer(default_redis, settings=settings.load())
    await at_speed(events, writer, 0.5)
    assert clock.elapsed_s() - began >= 0.5
    assert writer.counts.written == len(events)
    pd.testing.assert_frame_equal(await stored(default_redis), plain(events), check_dtype=False)


async def test_a_feed_played_at_speed_waits_for_a_full_server(tmp_path: Path) -> None:
    journal = {"path": str(tmp_path / "journal.db")}
    chosen = settings.load(journal=journal, writer={"check_s": 0.05, "bulk_events": 100})
    with serve() as server:
        async with server.connect() as redis:
            await redis.set("temp:left-behind", bytes(15_000_000))
            await redis.config_set("maxmemory", "16mb")
            writer = Writer(redis, settings=chosen)
            playing = asyncio.create_task(at_speed(sample(1_000), writer, 0.1))
            while writer.journaled < 1_000:
                await asyncio.sleep(0.01)
            assert not playing.done()
            await redis.unlink("temp:left-behind")
            await playing
    assert (writer.counts.written, writer.journaled) == (1_000, 0)


# The feed's clock and the wall's


async def test_keys_end_on_the_feeds_clock_when_they_do_on_the_walls(default_redis: Redis) -> None:
    short = {"events_s": 3, "vwap_s": 2, "percentile_window_s": 1, "percentile_bucket_s": 1, "unique_symbols_s": 3}
    short |= {"candle_s": 1, "candle_5m_s": 2, "candle_1h_s": 3}
    chosen = settings.load(retention=short, writer={"layout": "per_symbol"})
    rng, slots = clock.generator(5), 17
    # Events at 0.1 and 0.6 s, so that keys end then too; looked at half between.
    names = [rng.choice(list("ABCDEF"), 2, replace=False) if slot % 8 < 6 else [] for slot in range(slots)]
    parts = [
        pd.concat([at(500 * slot + 100, symbol=name) for name in names[slot]] or [empty()]) for slot in range(slots)
    ]
    moments = [500 * slot + 350 for slot in range(1, slots)]

    async def alive() -> set[str]:
        return {key for key in await keys(default_redis) if not key.startswith(("liqw:", "liqid"))}

    live: dict[int, set[str]] = {}
    writer, began = Writer(default_redis, settings=chosen), clock.elapsed_s()
    for slot, part in enumerate(parts):
        await asyncio.sleep(max(began + 0.5 * slot + 0.1 - clock.elapsed_s(), 0))
        if len(part):
            await writer.write_table(event_table(**part))
        await asyncio.sleep(max(began + 0.5 * slot + 0.35 - clock.elapsed_s(), 0))
        live[500 * slot + 350] = await alive()

    events = event_table(**pd.concat([part for part in parts if len(part)]))
    replayed: dict[int, set[str]] = {}
    for ms in moments:
        await default_redis.flushall()
        known = events[events["ts_ms"] < T0 + ms].reset_index(drop=True)
        await ingest(known, default_redis, settings=chosen, sealing=False, until_ms=T0 + ms)
        replayed[ms] = await alive()
    assert replayed == {ms: live[ms] for ms in moments}
    assert len({len(found) for found in live.values()}) > 5  # keys have come and gone


async def test_the_clock_runs_on_after_the_last_event(default_redis: Redis) -> None:
    assert (await ingest(at(0), default_redis, until_ms=T0 + 2 * HOUR)).expired["vwap"] == 1
    assert "vwap:A" not in await keys(default_redis)


async def test_moments_come_between_what_was_before_and_what_comes_later(default_redis: Redis) -> None:
    events, held = at(*range(0, 3 * HOUR, MINUTE // 2)), dict[int, int]()

    async def visit(ms: int) -> None:
        held[ms] = await count(default_redis)

    moments = [T0 // MINUTE * MINUTE + after for after in (HOUR, 2 * HOUR, 9 * HOUR)]
    await ingest(events, default_redis, moments=moments, visit=visit)
    assert held == {ms: int((events["ts_ms"] < ms).sum()) for ms in moments}


async def test_cleanup_that_finds_nothing_is_left_out_and_changes_nothing(default_redis: Redis) -> None:
    class Counting(Cleaner):
        rounds = 0

        async def trim(self, now_ms: int | None = None) -> list[object]:  # type: ignore[override]
            Counting.rounds += 1
            return list(await super().trim(now_ms))

    events = synth("normal", hours=1, seed=2)
    plain = await ingest(events, default_redis)
    await default_redis.flushall()
    done = await ingest(events, default_redis, cleaner=Counting(default_redis))
    assert (done.held, done.expired, done.cleaned, Counting.rounds) == (plain.held, plain.expired, 0, 0)


# replay: twice the same, and what is lost


def same(one: Replayed, other: Replayed, *, chained: bool = False) -> None:
    sizes = ["bytes", "share_bytes"]
    counts = [done.table.drop(columns=sizes if chained else []) for done in (one, other)]
    pd.testing.assert_frame_equal(*counts, check_exact=True)
    if chained:
        off = (one.table["bytes"] - other.table["bytes"]).abs()
        assert (off <= 64 * one.table["keys"] + 0.01 * one.table["bytes"]).all(), off
    for name in ("errors", "alerts_over_time"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)
    pd.testing.assert_frame_equal(one.ingested.alerts, other.ingested.alerts, check_exact=True)
    wall = {"seconds"}
    plain = [{key: value for key, value in done.ingested.as_dict().items() if key not in wall} for done in (one, other)]
    assert plain[0] == plain[1]
    assert list(one.timeline["keys"]) == list(other.timeline["keys"])


@pytest.mark.parametrize("name", ["normal-6h.jsonl.gz", "cascade-1h.jsonl.gz", "synth"])
async def test_two_replays_of_a_feed_are_the_same(name: str) -> None:
    feed: Feed | pd.DataFrame = synth("cascade", hours=2, seed=3) if name == "synth" else read_feed(DATA / name)
    done = []
    for _ in range(2):
        with serve() as server:
            async with server.connect() as redis:
                done.append(await replay(feed, redis, percentiles=(50, 95, 99)))
    same(*done)
    assert done[0].events_lost == 0
    assert done[0].errors["error_pct"].abs().max() < 2  # what the sketches promise
    assert len(done[0].errors) == 4 * 3 * done[0].errors["ts_ms"].nunique() > 200
    assert done[0].fidelity.recall is not None
    assert done[0].fidelity.recall > 0.99


async def test_two_replays_are_the_same_on_each_kind_of_server(fresh_server: Callable[..., Server], kind: str) -> None:
    events, done = synth("normal", hours=2, seed=7, symbols=50), []
    for _ in range(2):
        async with fresh_server().connect() as redis:
            done.append(await replay(events, redis, settings=settings.load(writer={"layout": "hybrid"})))
    # Valkey chains the buckets of its tables where hashes fall together, whose seed it draws anew.
    same(*done, chained="valkey" in kind)


async def test_a_replay_says_what_its_settings_cost(default_redis: Redis) -> None:
    events = synth("normal", hours=2, seed=1)
    steps: list[tuple[int, int]] = []
    done = await replay(events, default_redis, progress=lambda at, total: steps.append((at, total)))
    assert steps[-1] == (2 * len(events), 2 * len(events))
    assert steps == sorted(steps)
    assert list(done.table.columns) == ["share", "keys", "members", "bytes", "share_bytes", "budget_bytes", "over"]
    assert done.table["members"][["events", "blocks"]].gt(0).all()
    assert not done.table["over"].any()
    shares = done.table.groupby("share")[["bytes", "share_bytes"]].agg({"bytes": "sum", "share_bytes": "first"})
    assert (shares["bytes"] == shares["share_bytes"]).all()
    hours = done.alerts_over_time
    assert hours["true"].sum() == len(done.fidelity.true) > 0
    assert hours["found"].sum() == len(done.fidelity.found)
    assert (hours["recall"] * hours["true"] == hours["same"]).all()
    json.dumps(done.as_dict(), allow_nan=False)
    await default_redis.flushall()
    again = await fidelity(events, default_redis, cleaner=Cleaner(default_redis))
    pd.testing.assert_frame_equal(again.pairs, done.fidelity.pairs)


async def test_events_lost_are_told_apart(default_redis: Redis) -> None:
    burst = [at(*range(start, start + 100_000, 100)) for start in (0, 3 * HOUR)]
    chosen = settings.load(retention={"events_s": HOUR // 1000, "shared_maxlen": 400})
    done = await replay(event_table(**pd.concat(burst)), default_redis, settings=chosen)
    assert done.ingested.events == 2_000
    assert done.lost["trimmed"] >= 800  # XTRIM removes whole nodes
    assert done.lost["expired"] >= 400  # the first burst's, two hours later
    assert done.lost["evicted"] == 0
    assert done.events_lost == 2_000 - await count(default_redis) == sum(done.lost.values())


async def test_a_server_that_is_too_small_loses_events_to_cleanup_and_evicts_none() -> None:
    chosen = settings.load(server={"maxmemory": "6mb"}, writer={"layout": "shared"})
    with serve(settings=chosen) as server:
        async with server.connect() as redis:
            done = await replay(synth("cascade", hours=1, seed=2), redis, settings=chosen)
    assert done.ingested.evicted == 0
    assert done.lost["trimmed"] == done.events_lost > 1_000
    assert done.timeline["used_memory"].max() < done.maxmemory == 6 << 20


async def test_a_replay_of_nothing_says_so(default_redis: Redis) -> None:
    with pytest.raises(EventError, match="holds no event"):
        await replay(empty(), default_redis)


@pytest.mark.parametrize("refresh_s", [45, 60, 600])
async def test_judging_beside_the_writer_finds_what_judging_before_it_finds(
    default_redis: Redis, refresh_s: int
) -> None:
    own = settings.load(detector={"method": "exact", "refresh_s": refresh_s})
    events = synth("quiet", hours=24, seed=3, symbols=20)  # of long slices, which end where one may be raised
    done = await ingest(events, default_redis, settings=own, detector=Detector(default_redis, settings=own))
    await default_redis.flushall()
    expected = await backtest(events, Detector(default_redis, settings=own))
    assert len(expected) > 20
    pd.testing.assert_frame_equal(done.alerts, expected)


async def test_events_that_were_there_before_are_sealed_and_so_are_those_that_come(default_redis: Redis) -> None:
    events = synth("normal", hours=4, seed=1)
    half = len(events) // 2
    await ingest(events[:half].reset_index(drop=True), default_redis, sealing=False)
    await ingest(events[half:].reset_index(drop=True), default_redis)
    left = await default_redis.xlen("liq")
    await default_redis.flushall()
    await ingest(events[:half].reset_index(drop=True), default_redis)
    await ingest(events[half:].reset_index(drop=True), default_redis)
    assert left == pytest.approx(await default_redis.xlen("liq"), abs=4_000)  # a block's


async def test_a_server_that_dies_leaves_no_task_behind(fresh_server: Callable[..., Server]) -> None:
    said: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    events = synth("normal", hours=2, seed=1)
    server = fresh_server()
    async with server.connect() as redis:

        def progress(done: int, total: int) -> None:
            if done > total / 2:
                server.kill()

        with pytest.raises((WriterError, RedisError)):
            await ingest(events, redis, detector=Detector(redis), progress=progress)
    gc.collect()
    await asyncio.sleep(0)
    assert said == []


async def test_sets_of_values_end_on_the_feeds_clock_too(default_redis: Redis) -> None:
    """A slice of a quiet feed is longer than a key's life: what ends within it must not come back."""
    events = synth("quiet", hours=1_000, symbols=20, rate_per_min=0.02, seed=3)
    window = {"percentile_window_s": 1_800, "percentile_bucket_s": 1_800}
    await ingest(events, default_redis, settings=settings.load(detector={"method": "exact"}, retention=window))
    last = events.groupby([events["symbol"].astype(str), events["ts_ms"] // 1_800_000])["ts_ms"].max()
    now_ms = int(events["ts_ms"].iloc[-1]) // MINUTE * MINUTE
    alive = last[last + HOUR > now_ms]
    assert 0 < len(alive) < len(last)
    found = await keys(default_redis)
    assert {key for key in found if key.startswith("size:")} == {f"size:{name}:{at}" for name, at in alive.index}
    assert not [key for key in found if key.startswith("sketch:")]
