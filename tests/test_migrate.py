"""Legacy events arrive once each, whatever the form, and whatever is killed meanwhile."""

import asyncio
import json
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pandas as pd
import pytest
from redis.asyncio import Redis

from liqlab import clock, schema, settings
from liqlab.candles import candles
from liqlab.events import Event, event_table
from liqlab.feeds import read_feed
from liqlab.feeds.synth import synth
from liqlab.migrate import Migrated, MigrateError, checklist, migrate, plan, restore
from liqlab.migrate.sources import entries, find
from liqlab.sealing import seal
from liqlab.server import Server, serve
from liqlab.writer import Writer
from tests.test_writer import T0, plain, sample, stored

EVENTS = 100_000
Command = tuple[object, ...]

# Forks a process for each line of its input, as importing takes longer than migrating: that migrates and says how far
# it is, or kills itself where `moment` says. The last word on each is how it ended.
ZYGOTE = """
import asyncio, json, os, signal, sys
from pathlib import Path
from liqlab import settings
from liqlab.migrate import folder, migrate, run
from liqlab.server import connect

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(count, owner, name, after):
    real, calls = getattr(owner, name), 0
    def wrapped(*args, **kw):
        nonlocal calls
        calls += 1
        if calls == count and not after:
            die()
        result = real(*args, **kw)
        if calls == count and after:
            die()
        return result
    setattr(owner, name, wrapped)

def die_in_batch(count):
    real, calls = run.Sender.send, 0
    async def send(self, batch):
        nonlocal calls
        calls += 1
        if calls == count:
            asyncio.get_running_loop().call_later(0.001, die)
        await real(self, batch)
    run.Sender.send = send

async def main(url, backup, moment, count, chosen, remove):
    if moment == "in batch":
        die_in_batch(count)
    elif moment:
        when, name = moment.split()
        owner = {"save": folder.Folder, "verify": run, "unlink": run}.get(name, Path)
        die_at(count, owner, name, when == "after")
    say = lambda done, total: print(done / total, flush=True)
    async with connect(url) as redis:
        await migrate(redis, backup=backup, settings=settings.load(**chosen), remove=remove, progress=say)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        asyncio.run(main(*json.loads(line)))
        os._exit(0)
    print("pid", pid, flush=True)
    print("end", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Zygote:
    """Processes that migrate, to be killed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin
        assert process.stdout
        self._process, self._in, self._out = process, process.stdin, process.stdout

    async def migrate(
        self,
        server: Server,
        backup: Path,
        moment: str = "",
        count: int = 0,
        *,
        kill_at: float = math.inf,
        settings: dict[str, object] | None = None,
        remove: bool = False,
    ) -> tuple[int, float]:
        """Return how the process ended, and how far it said it was; it is killed once it says `kill_at`."""
        job = [server.url, str(backup), moment, count, settings or {}, remove]
        self._in.write(json.dumps(job).encode() + b"\n")
        pid, said, code = 0, 0.0, None
        while code is None:
            words = (await self._out.readline()).split()
            if words[0] == b"pid":
                pid = int(words[1])
            elif words[0] == b"end":
                code = int(words[1])
            else:
                said = float(words[0])
            if said >= kill_at and pid and code is None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return code, said

    async def die(self, server: Server, backup: Path, moment: str, count: int, **kw: Any) -> None:
        """Migrate until the process kills itself at `moment`."""
        assert await self.migrate(server, backup, moment, count, **kw) == (-signal.SIGKILL, ANY)


@pytest.fixture
async def zygote() -> AsyncIterator[Zygote]:
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", ZYGOTE, **pipes)
    yield Zygote(process)
    assert process.stdin
    process.stdin.close()
    assert await process.wait() == 0


async def run(redis: Redis, commands: Iterable[Command]) -> None:
    waiting = list(commands)
    for start in range(0, len(waiting), 1_000):
        pipe = redis.pipeline(transaction=False)
        for command in waiting[start : start + 1_000]:
            pipe.execute_command(*command)
        await pipe.execute()


def member(event: Event) -> dict[str, object]:
    return {
        "symbol": event.symbol,
        "side": event.side,
        "size": event.size,
        "price": event.price,
        "timestamp": event.ts_ms / 1000,
        "exchange": event.exchange,
    }


def as_json(events: pd.DataFrame) -> list[Command]:
    return [
        ("ZADD", f"liquidations:{event.symbol}", event.ts_ms / 1000, json.dumps(member(event)))
        for event in Event.rows(events)
    ]


def as_text(events: pd.DataFrame) -> list[Command]:
    return [
        (
            *("XADD", f"liquidations:{event.symbol}", f"{event.ts_ms}-*", "s", event.side, "sz", event.size),
            *("p", event.price, "ex", event.exchange),
        )
        for event in Event.rows(events)
    ]


def as_cryptofeed(events: pd.DataFrame, *, prefix: str, stream: bool) -> list[Command]:
    commands: list[Command] = []
    for n, event in enumerate(Event.rows(events)):
        fields = {
            "exchange": "BINANCE_FUTURES", "symbol": event.symbol, "side": event.side, "quantity": event.size,
            "price": event.price, "id": None, "status": "filled", "timestamp": event.ts_ms / 1000,
            "receipt_timestamp": event.ts_ms / 1000 + n * 1e-6,
        }  # fmt: skip
        key = f"{prefix}-BINANCE_FUTURES-{event.symbol}"
        if stream:
            commands.append(
                ("XADD", key, "*", *(word for name, value in fields.items() for word in (name, str(value))))
            )
        else:
            commands.append(("ZADD", key, "NX", event.ts_ms / 1000, json.dumps(fields)))
    return commands


def distinct(n: int = 2_000, seed: int = 1, at_ms: int = T0, exchange: str = "binance") -> pd.DataFrame:
    """Events no two of which are equal, as a sorted set of JSON cannot hold equal ones."""
    rng = clock.generator(seed)
    price = rng.integers(1, 10**7, n) / 100
    size = rng.permutation(n) + 1.0
    symbols = [f"S{i}USDT" for i in rng.zipf(1.5, n) % 20]
    times = at_ms + rng.integers(0, 400_000, n)
    return event_table(times, [exchange] * n, symbols, rng.choice(["buy", "sell"], n), price, size, price * size)


def accounted(done: Migrated) -> None:
    for table in (done.table, done.keys):
        parts = table["migrated"] + table["duplicates"] + table["there"] + table["rejected"]
        assert (table["entries"] == parts).all()


async def test_a_hundred_thousand_events_survive_three_kills(
    default_server: Server, zygote: Zygote, tmp_path: Path
) -> None:
    rng = clock.generator(int(os.environ.get("FAULT_SEED", "7")))
    events = synth("normal", hours=17, seed=3, symbols=100).head(EVENTS)
    backup = tmp_path / "backup"
    async with default_server.connect() as redis:
        await redis.flushall()
        await run(redis, as_json(events))
        keys = await redis.keys("liquidations:*")
        assert sum([await redis.zcard(key) for key in keys]) == EVENTS

        # While entries are read, while batches are written, and while they are read back.
        for low, high in ((0.02, 0.30), (0.36, 0.63), (0.67, 0.83)):
            code, said = await zygote.migrate(default_server, backup, kill_at=float(rng.uniform(low, high)))
            assert code == -signal.SIGKILL
            assert low <= said < 1
        done = await migrate(redis, backup=backup, remove=True)

        assert done.ok, done.table
        assert done.table["verdict"].unique().tolist() == ["removed"]
        assert done.table["migrated"].sum() == EVENTS
        pd.testing.assert_frame_equal(await stored(redis), plain(events), check_dtype=False)
        assert await redis.keys("liquidations*") == []
    print({**done.memory, "legacy_bytes": done.legacy_bytes, "keys": len(done.keys)})
    assert done.memory["both"] < 1.1 * done.memory["before"]
    assert done.memory["after"] < done.memory["before"] / 10


async def test_killed_at_the_worst_moments_nothing_is_lost_or_doubled(
    default_server: Server, zygote: Zygote, tmp_path: Path
) -> None:
    events, small = distinct(), {"writer": {"bulk_events": 100}}
    async with default_server.connect() as redis:
        await redis.flushall()
        await run(redis, as_json(events))
        for moment, count in (
            ("before rename", 1),  # the backup is made, and has no name
            ("after rename", 1),
            ("before save", 1),  # the first batch is in Redis, and nobody has noted it
            ("in batch", 4),
            ("before save", 3),
            ("before replace", 2),  # what is noted has no name
            ("before verify", 1),
            ("before save", 1),  # all is verified, and that is not noted
            ("before save", 2),  # keys shall be removed
            ("after save", 2),  # that is noted, and not done
            ("before unlink", 3),
        ):
            await zygote.die(default_server, tmp_path / "b", moment, count, settings=small, remove=True)
        done = await migrate(redis, backup=tmp_path / "b", settings=settings.load(**small), remove=True)
        assert done.table["verdict"].unique().tolist() == ["removed"]
        accounted(done)
        pd.testing.assert_frame_equal(await stored(redis), plain(events), check_dtype=False)
        assert await redis.keys("liquidations*") == []


@pytest.mark.parametrize(("layout", "shards"), [("shared", 1), ("per_symbol", 3), ("hybrid", 1)])
async def test_every_form_arrives_as_its_events(redis: Redis, tmp_path: Path, layout: str, shards: int) -> None:
    chosen = settings.load(writer={"layout": layout, "bulk_events": 300}, shards=shards)
    parts = [distinct(500, seed, T0 + seed * 10**6) for seed in range(4)]
    parts[1] = parts[1].assign(symbol=parts[1]["symbol"].cat.rename_categories(lambda name: "T" + name))
    parts[3] = parts[3].assign(symbol=parts[3]["symbol"].cat.rename_categories(lambda name: "C" + name))
    await run(redis, as_json(parts[0]))
    await run(redis, as_text(parts[1]))
    await run(redis, as_cryptofeed(parts[2], prefix="liquidations", stream=False))
    await run(redis, as_cryptofeed(parts[3], prefix="liquidations", stream=True))
    await redis.set("liquidations:notes", "of another program")

    made = await plan(redis, settings=chosen)
    forms = made.table.set_index("form")
    assert forms["entries"].to_dict() == {
        "json": 500, "text": 500, "cryptofeed zset": 500, "cryptofeed stream": 500, "unknown": 0
    }  # fmt: skip
    assert not made.problem
    assert any("liquidations:notes" in note for note in made.notes)

    steps: list[tuple[int, int]] = []
    done = await migrate(
        redis, backup=tmp_path / "b", settings=chosen, remove=True, progress=lambda *step: steps.append(step)
    )
    assert done.ok, done.table
    accounted(done)
    assert done.table["migrated"].sum() == 2_000
    pd.testing.assert_frame_equal(await stored(redis, chosen), plain(pd.concat(parts)), check_dtype=False)
    assert steps == sorted(steps)
    assert steps[-1] == (6_000, 6_000)
    assert await redis.keys("liquidations*") == [b"liquidations:notes"]
    # What is old makes no candle, VWAP or sketch: it would have expired.
    families = {schema.family_of(key.decode()).name for key in await redis.keys("*") if b"notes" not in key}  # type: ignore[union-attr]
    assert families <= {"events", "blocks", "names", "writer"}


async def test_events_of_the_last_hours_make_what_a_live_server_would_hold(
    default_redis: Redis, tmp_path: Path
) -> None:
    now_ms = T0 + 36 * clock.HOUR_MS
    ages_h = [30.0, 20.0, 1.5, 0.5, 0.01]
    events = event_table(
        [now_ms - round(age * clock.HOUR_MS) for age in ages_h], ["binance"] * 5, ["BTCUSDT"] * 5, ["sell"] * 5,
        [10.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], [10.0] * 5,
    )  # fmt: skip
    await run(default_redis, as_json(events))
    one_each = settings.load(writer={"bulk_events": 1})
    done = await migrate(default_redis, backup=tmp_path / "b", settings=one_each, now_ms=now_ms)
    assert done.ok
    pd.testing.assert_frame_equal(await stored(default_redis), plain(events), check_dtype=False)
    assert (await default_redis.hget("vwap:BTCUSDT", "volume_sum")) == b"9"  # 4 + 5: the last hour
    sums = {
        width: (await candles(default_redis, "BTCUSDT", width=width))["volume"].sum() for width in ("1m", "5m", "1h")
    }
    assert sums == {"1m": 9.0, "5m": 9.0, "1h": 14.0}
    assert len(await default_redis.hkeys("sketch:BTCUSDT")) == 4
    assert await default_redis.xlen("liq") == 1  # the hot window
    assert await default_redis.ttl(next(iter(await default_redis.keys("liqw:*")))) <= 86_400


async def test_pages_cut_nowhere_through_entries_of_one_score(redis: Redis) -> None:
    scores = [0.1, *[1.5] * 17, 2.0, *[T0 / 1000] * 5, *[T0 / 1000 + 0.001] * 11, math.inf]
    await redis.zadd("liquidations:BTCUSDT", {f"{n:03}": score for n, score in enumerate(scores)})
    for n in range(13):
        await redis.xadd("liquidations:ETHUSDT", {"s": str(n)}, id=f"{n // 5 + 1}-{n}")
    zset, stream = await find(redis, ("liquidations",))
    for page in (1, 2, 5, 7, 17, 100):
        found = [entry async for some in entries(redis, zset, page=page) for entry in some]
        assert found == [(score, [f"{n:03}".encode()]) for n, score in enumerate(scores)]
        found = [entry async for some in entries(redis, stream, page=page) for entry in some]
        assert found == [(f"{n // 5 + 1}-{n}", [b"s", str(n).encode()]) for n in range(13)]


async def test_entries_that_are_no_events_are_reported_and_the_rest_accounted_for(redis: Redis, tmp_path: Path) -> None:
    events = distinct(50)
    await run(redis, as_json(events))
    good = json.dumps(member(next(Event.rows(events))))
    key = f"liquidations:{events['symbol'][0]}"
    bad = {
        "not valid JSON": "{",
        "not a flat JSON object": '["a"]',
        "no field for price": good.replace('"price"', '"cost"'),
        "the price is not a positive number": good.replace('"price": ', '"price": -'),
        "the side is neither": good.replace('"side": "', '"side": "un'),
        "no contract size": good.replace('"binance"', '"okx"').replace("USDT", "-USDT-SWAP"),
    }
    await run(redis, [("ZADD", key, T0 / 1000, text) for text in bad.values()])
    await redis.zadd(key, {good + " ": T0 / 1000, good.replace(", ", ","): T0 / 1000})  # the same event, spelled anew
    await run(redis, [("XADD", "liquidations:XUSDT", "1-1", "s", "sell", "z", 1, "p", 1, "e", "bit")])

    tried = await migrate(redis, backup=tmp_path / "b", dry_run=True)
    assert await redis.keys("liq*") == await redis.keys("liquidations*")
    assert not (tmp_path / "b").exists()
    done = await migrate(redis, backup=tmp_path / "b", remove=True)
    for each in (tried, done):
        accounted(each)
        assert each.table["rejected"].sum() == len(bad) + 1
        assert each.table["duplicates"].sum() == 2
        assert each.table["migrated"].sum() == 50
        assert set(each.rejected["member"]) == {*bad.values(), "1-1 s sell z 1 p 1 e bit"}
        assert set(each.rejected["key"]) == {key, "liquidations:XUSDT"}
        for reason, text in bad.items():
            assert each.rejected.set_index("member")["reason"][text].startswith(reason)
    pd.testing.assert_frame_equal(await stored(redis), plain(events), check_dtype=False)
    assert done.quarantine is not None
    assert len(done.quarantine.read_text().splitlines()) == len(bad) + 1


async def test_sides_venues_and_symbols_follow_the_rules_of_the_feeds(default_redis: Redis, tmp_path: Path) -> None:
    base = {"side": "Buy", "size": 2, "price": 5.0, "timestamp": T0 // 1000}
    await run(
        default_redis,
        [
            # Bybit sends the position's side, okx counts contracts, Binance's USDT was stripped.
            ("ZADD", "liquidations:BTCUSDT", 1, json.dumps(base | {"symbol": "BTCUSDT", "exchange": "bybit"})),
            ("ZADD", "liquidations:ETH-USDT-SWAP", 1, json.dumps(base | {"exchange": "OKEX-SWAP"})),
            ("XADD", "liquidations:SOL", f"{T0}-0", "s", "sell", "sz", "3", "p", "20", "ex", "bin"),
        ],
    )
    done = await migrate(default_redis, backup=tmp_path / "b")
    found = {(row.symbol, row.exchange, row.side, row.size) for row in (await stored(default_redis)).itertuples()}
    assert found == {
        ("BTCUSDT", "bybit", "sell", 2.0),
        ("ETH-USDT-SWAP", "okx", "buy", 0.2),
        ("SOLUSDT", "binance", "sell", 3.0),
    }
    assert any("USDT stripped" in note for note in done.notes)


async def test_what_is_there_already_is_not_written_again(default_redis: Redis, tmp_path: Path) -> None:
    events = distinct()
    await run(default_redis, as_json(events))
    await Writer(default_redis).write_table(events.iloc[::3].reset_index(drop=True))
    first = await migrate(default_redis, backup=tmp_path / "a")
    assert first.table["there"].sum() == len(events.iloc[::3])
    second = await migrate(default_redis, backup=tmp_path / "b", remove=True)
    assert second.ok
    assert second.table[["there", "migrated"]].sum().tolist() == [len(events), 0]
    accounted(first)
    accounted(second)
    pd.testing.assert_frame_equal(await stored(default_redis), plain(events), check_dtype=False)


async def test_behind_a_detector_that_writes_newer_events_they_still_end_up_in_blocks(
    default_redis: Redis, tmp_path: Path
) -> None:
    events, newer = distinct(35_000), distinct(300, 2, clock.now_ms() - 10_000)
    await Writer(default_redis).write_table(newer)  # all that is migrated comes late, at one moment
    await run(default_redis, as_json(events))
    done = await migrate(default_redis, backup=tmp_path / "b", remove=True)
    assert done.ok
    assert await default_redis.xlen("liq") == 0
    later = distinct(100, 3, clock.now_ms())
    await Writer(default_redis).write_table(later)
    await seal(default_redis, now_ms=clock.now_ms() + 10**8, partial=True)
    every = plain(pd.concat([events, newer, later]))
    pd.testing.assert_frame_equal(await stored(default_redis), every, check_dtype=False)


async def test_the_originals_own_streams_stay_readable(redis: Redis, tmp_path: Path) -> None:
    theirs = distinct(400, 5, T0 + 7).assign(symbol=pd.Categorical(["XUSDT", "YUSDT"] * 200))
    pipeline = settings.load(writer={"strategy": "pipeline"})
    await Writer(redis, settings=pipeline).write_table(theirs)
    await run(redis, as_json(distinct()))
    made = await plan(redis)
    assert made.table.set_index("form").loc["liqlab", ["keys", "entries"]].tolist() == [2, 400]
    done = await migrate(redis, backup=tmp_path / "b", remove=True)
    assert done.ok
    pd.testing.assert_frame_equal(await stored(redis), plain(pd.concat([theirs, distinct()])), check_dtype=False)


async def test_a_stream_of_ours_by_name_only_is_left_alone(default_redis: Redis) -> None:
    await default_redis.xadd("liq:BTC", {"s": "sell", "sz": "1", "p": "2", "ex": "binance"})
    made = await plan(default_redis)
    assert made.table["form"].tolist() == ["unknown"]
    assert "RENAME it to liquidations:SYMBOL" in made.notes[0]


async def test_what_is_too_large_for_both_forms_is_refused_or_goes_in_parts(tmp_path: Path) -> None:
    events = distinct(21_000).assign(symbol=pd.Categorical([f"S{i}USDT" for i in range(30)] * 700))
    with serve() as server:  # of its own: what other tests leave to be freed would be room
        async with server.connect() as loader:
            await run(loader, as_json(events))
        async with server.connect() as redis:
            made = await plan(redis)
            # Room for half of what they will take.
            line = (await redis.info("memory"))["used_memory"] + made.room + made.bytes_after // 2
            await redis.config_set("maxmemory", int(line / settings.load().thresholds.breaker_half_open))
            refused = r"both forms at once need .* MiB .* remove=True migrates the keys in \d"
            with pytest.raises(MigrateError, match=refused):
                await migrate(redis, backup=tmp_path / "b")
            assert not (tmp_path / "b").exists()
            assert await redis.keys("liqw:*") == []
            parts = await plan(redis, remove=True)
            assert parts.problem == ""
            assert len(set(parts.chunks)) > 1
            done = await migrate(redis, backup=tmp_path / "b", remove=True)
            assert done.ok
            assert (await redis.info("stats"))["evicted_keys"] == 0
            pd.testing.assert_frame_equal(await stored(redis), plain(events), check_dtype=False)
            await redis.config_set("maxmemory", 3 << 20)
            await run(redis, as_json(distinct(100, 9)))
            with pytest.raises(MigrateError, match=r"raise maxmemory"):
                await migrate(redis, backup=tmp_path / "c", remove=True)


async def test_limits_that_would_push_the_events_out_again_are_seen(default_redis: Redis, tmp_path: Path) -> None:
    await run(default_redis, as_json(distinct()))
    await default_redis.hset("liqc", mapping={"bytes": 4_000, "event_bytes": 30, "block_bytes": 16_000})
    with pytest.raises(MigrateError, match=r"cleanup lets event streams have 3\.91 KiB"):
        await migrate(default_redis, backup=tmp_path / "b")


async def test_a_key_that_grew_after_the_backup_is_kept(default_redis: Redis, tmp_path: Path) -> None:
    events = distinct()
    await run(default_redis, as_json(events))
    await migrate(default_redis, backup=tmp_path / "b")
    more = events.head(1).assign(ts_ms=T0 + 10**7)
    await run(default_redis, as_json(more))
    done = await migrate(default_redis, backup=tmp_path / "b", remove=True)
    grown = f"liquidations:{more['symbol'][0]}"
    assert not done.ok
    assert done.keys.set_index("key")["verdict"][grown].startswith("migrated; the old key has changed")
    assert await default_redis.keys("liquidations*") == [grown.encode()]
    again = await migrate(default_redis, backup=tmp_path / "c", remove=True)
    assert again.table["migrated"].sum() == 1
    pd.testing.assert_frame_equal(await stored(default_redis), plain(pd.concat([events, more])), check_dtype=False)


async def test_events_that_are_gone_again_keep_the_old_key(default_redis: Redis, tmp_path: Path) -> None:
    await run(default_redis, as_json(distinct()))
    await migrate(default_redis, backup=tmp_path / "b")
    await default_redis.xtrim("liqb", maxlen=0)
    done = await migrate(default_redis, backup=tmp_path / "b", remove=True)
    assert not done.ok
    assert done.table["verdict"].str.contains("are not in Redis").all()
    assert len(await default_redis.keys("liquidations*")) == len(done.keys)


async def test_a_backup_brings_the_keys_back_as_they_were(redis: Redis, tmp_path: Path) -> None:
    await run(redis, as_json(distinct()))
    await run(redis, as_text(distinct(100, 3).assign(symbol=pd.Categorical(["TUSDT"] * 100))))
    await redis.zadd("liquidations:\\x80 odd*", {b"\xff\x00\n": 1.5, b"{}": float("inf")})
    await redis.expire("liquidations:TUSDT", 500)
    before = {key: await redis.dump(key) for key in await redis.keys("*")}
    await migrate(redis, backup=tmp_path / "b")
    assert await restore(tmp_path / "b", redis) == 0
    await redis.flushall()
    assert await restore(tmp_path / "b", redis) == len(before)
    assert {key: await redis.dump(key) for key in await redis.keys("*")} == before
    assert 0 < await redis.ttl("liquidations:TUSDT") <= 500
    await redis.zadd("liquidations:S1USDT", {"more": 1})
    with pytest.raises(MigrateError, match="nothing is overwritten"):
        await restore(tmp_path / "b", redis)
    # The events lie there as a feed, too.
    pd.testing.assert_frame_equal(
        plain(read_feed(tmp_path / "b" / "events.parquet").events),
        plain(pd.concat([distinct(), distinct(100, 3).assign(symbol=pd.Categorical(["TUSDT"] * 100))])),
        check_dtype=False,
    )


async def test_a_server_that_lost_its_memory_is_filled_again_from_the_backup(
    default_server: Server, zygote: Zygote, tmp_path: Path
) -> None:
    events = distinct()
    small = {"writer": {"bulk_events": 100}}
    async with default_server.connect() as redis:
        await redis.flushall()
        await run(redis, as_json(events))
        await zygote.die(default_server, tmp_path / "b", "before save", 9, settings=small)
        await redis.flushall()
        with pytest.raises(MigrateError, match=r"is the backup of another server: liquidations:.* restore"):
            await migrate(redis, backup=tmp_path / "b")
        await restore(tmp_path / "b", redis)
        done = await migrate(redis, backup=tmp_path / "b")
        assert done.ok
        pd.testing.assert_frame_equal(await stored(redis), plain(events), check_dtype=False)


async def test_a_number_that_the_server_forgot_is_not_guessed(
    default_server: Server, zygote: Zygote, tmp_path: Path
) -> None:
    async with default_server.connect() as redis:
        await redis.flushall()
        await run(redis, as_json(distinct()))
        small = {"writer": {"bulk_events": 100}}
        await zygote.die(default_server, tmp_path / "b", "before save", 9, settings=small)
        [mark] = [key for key in await redis.keys("liqw:*") if key != b"liqw:migration"]
        assert await redis.ttl(mark) > 10**8  # it outlives an interruption of any length
        await redis.delete(mark)
        with pytest.raises(MigrateError, match=r"liqw:\w+ is gone from the server.* restore"):
            await migrate(redis, backup=tmp_path / "b")


async def test_only_one_migration_at_a_time(default_server: Server, zygote: Zygote, tmp_path: Path) -> None:
    async with default_server.connect() as redis:
        await redis.flushall()
        await run(redis, as_json(distinct()))
        await zygote.die(default_server, tmp_path / "b", "before save", 1)
        with pytest.raises(MigrateError, match="b is under way on this server; finish that one, or DEL liqw:migration"):
            await migrate(redis, backup=tmp_path / "c")
        slow = asyncio.create_task(migrate(redis, backup=tmp_path / "b"))
        await asyncio.sleep(0)
        with pytest.raises(MigrateError, match="another migration is writing to"):
            await migrate(redis, backup=tmp_path / "b")
        assert (await slow).ok
        assert not await redis.exists("liqw:migration")


async def test_what_cannot_be_migrated_is_one_sentence(default_redis: Redis, tmp_path: Path) -> None:
    with pytest.raises(MigrateError, match=r"no key begins with liquidations: or liquidations-; name others with pre"):
        await migrate(default_redis, backup=tmp_path / "b")
    with pytest.raises(MigrateError, match="prefixes = 'liq': must be names"):
        await migrate(default_redis, backup=tmp_path / "b", prefixes="liq")
    (tmp_path / "mine").mkdir()
    with pytest.raises(MigrateError, match="mine is no backup of a migration; name another folder"):
        await migrate(default_redis, backup=tmp_path / "mine")
    await run(default_redis, as_json(distinct()))
    await migrate(default_redis, backup=tmp_path / "b")
    with pytest.raises(MigrateError, match=r"shards = 2, but .*b was begun with 1; set that"):
        await migrate(default_redis, backup=tmp_path / "b", settings=settings.load(shards=2))


async def test_cryptofeeds_two_backends_tell_each_event_once(default_redis: Redis, tmp_path: Path) -> None:
    events = distinct(300)
    await run(default_redis, as_cryptofeed(events, prefix="liquidations", stream=False))
    await run(default_redis, as_cryptofeed(events, prefix="cf[1]", stream=True))
    done = await migrate(default_redis, backup=tmp_path / "b", prefixes=("liquidations", "cf[1]"), remove=True)
    assert done.table[["entries", "migrated", "duplicates"]].sum().tolist() == [600, 300, 300]
    pd.testing.assert_frame_equal(await stored(default_redis), plain(events), check_dtype=False)
    assert await default_redis.keys("*-BINANCE*") == []


async def test_the_checklist_says_done_only_of_what_it_saw(redis: Redis, tmp_path: Path) -> None:
    bare = await checklist(redis)
    assert len(bare) == 16
    assert bare["phase"].value_counts().to_dict() == dict.fromkeys(
        ("Preparation", "Optimization", "Monitoring", "Tuning"), 4
    )
    empty = bare.set_index("item")["state"]
    for item in ("Switch to Redis Streams", "Implement binary encoding", "Adjust TTLs based on usage"):
        assert empty[item] == "to do"

    await run(redis, as_json(distinct()))
    backup = tmp_path / "b"
    before = (await checklist(redis, backup=backup)).set_index("item")
    assert before.loc["Backup existing data", ["state", "found"]].tolist() == ["to do", "20 legacy keys, no backup"]
    assert before["state"]["Switch to Redis Streams"] == "to do"

    await migrate(redis, backup=backup)
    between = (await checklist(redis, backup=backup)).set_index("item")["state"]
    assert (between["Backup existing data"], between["Switch to Redis Streams"]) == ("done", "to do")
    await redis.zadd("liquidations:S1USDT", {"more": 1})
    assert (await checklist(redis, backup=backup))["state"][0] == "to do"
    await redis.zrem("liquidations:S1USDT", "more")

    await migrate(redis, backup=backup, remove=True)
    chosen = settings.load(journal={"path": tmp_path / "journal.db"}, writer={"strategy": "single"})
    after = (await checklist(redis, backup=backup, settings=chosen)).set_index("item")["state"]
    assert after["Switch to Redis Streams"] == after["Implement circuit breaker"] == "done"
    assert after["Add pipelining for writes"] == "to do"
    await Writer(redis, settings=settings.load(writer={"codec": "json"})).write_table(sample(10))
    found = (await checklist(redis)).set_index("item")["state"]
    assert found["Implement binary encoding"] == "to do"
    assert found["Create memory dashboard"] == found["Review percentile accuracy"] == "not checked"
