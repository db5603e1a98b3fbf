import asyncio
import math
import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pytest
from redis.asyncio import Redis

from liqlab import clock, link, quantiles, schema, settings
from liqlab.archive import history
from liqlab.candles import WIDTHS
from liqlab.events import Columns, Event, EventError, event_table
from liqlab.sealing import seal
from liqlab.server import Server, connect
from liqlab.settings import SettingsError
from liqlab.writer import Writer, WriterError

T0 = 1_737_908_829_829


def sample(n: int = 2_000, seed: int = 1, symbols: int = 30) -> pd.DataFrame:
    rng = clock.generator(seed)
    price, size = np.round(rng.lognormal(3, 3, n) + 1e-4, 7), np.round(rng.lognormal(1, 2, n) + 1e-3, 3)
    return event_table(
        T0 + np.sort(rng.integers(0, 400_000, n)) // 3,  # many ties
        rng.choice(["binance", "bybit"], n),
        [f"S{i}USDT" for i in rng.zipf(1.4, n) % symbols],
        rng.choice(["buy", "sell"], n),
        price,
        size,
        price * size,
    )


COLUMNS = ["ts_ms", "exchange", "symbol", "side", "price", "size"]


async def stored(redis: Redis, chosen: settings.Settings | None = None) -> pd.DataFrame:
    """What is stored, in the order of `plain`."""
    return plain(await history(redis, settings=chosen))


async def read_as_text(redis: Redis) -> pd.DataFrame:
    """Read streams of the codec `fields` back, as an independent reader of the documented form would."""
    rows = []
    async for key in redis.scan_iter(match="liq*", count=1000):
        if schema.family_of(key.decode()) is not schema.BY_NAME["events"]:
            continue
        for entry, fields in await redis.xrange(key):
            f = {name.decode(): value.decode() for name, value in fields.items()}
            ts_ms = int(f.get("t", entry.split(b"-")[0]))
            symbol = f.get("y") or key.decode().split(":")[-1]
            side = {"b": "buy", "s": "sell"}[f["s"]]
            rows.append((ts_ms, f["e"], symbol, side, float(f["p"]), float(f["z"])))
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(COLUMNS).reset_index(drop=True)


def plain(events: pd.DataFrame) -> pd.DataFrame:
    frame = events[COLUMNS].astype({"exchange": object, "symbol": object, "side": object})
    return frame.sort_values(COLUMNS).reset_index(drop=True)


async def hashes(redis: Redis, pattern: str) -> dict[str, dict[str, float]]:
    return {
        key.decode(): {name.decode(): float(value) for name, value in (await redis.hgetall(key)).items()}
        async for key in redis.scan_iter(match=pattern, count=1000)
    }


@pytest.mark.parametrize("layout", ["per_symbol", "shared", "hybrid"])
@pytest.mark.parametrize("shards", [1, 3])
async def test_a_table_is_stored_whole_and_exactly(redis: Redis, layout: str, shards: int) -> None:
    events = sample()
    chosen = settings.load(writer={"layout": layout, "bulk_events": 300, "hybrid_events": 200}, shards=shards)
    writer = Writer(redis, settings=chosen)

    assert await writer.write_table(events) == len(events)

    pd.testing.assert_frame_equal(await stored(redis, chosen), plain(events), check_dtype=False)
    assert (writer.counts.offered, writer.counts.written, writer.counts.trimmed) == (len(events), len(events), 0)
    heads = {key.decode() for key in await redis.keys("liq*") if schema.family_of(key.decode()) is not None}
    symbols = {f"liq:{name}" for name in events["symbol"].cat.categories}
    if shards == 1:
        assert ("liq" in heads) == (layout != "per_symbol")
        assert len(heads & symbols) == {"per_symbol": len(symbols), "shared": 0, "hybrid": 2}[layout]


@pytest.mark.parametrize("layout", ["per_symbol", "shared"])
async def test_the_text_form_is_the_documented_one(redis: Redis, layout: str) -> None:
    events = sample()
    await Writer(redis, settings=settings.load(writer={"layout": layout, "codec": "fields"})).write_table(events)
    pd.testing.assert_frame_equal(await read_as_text(redis), plain(events), check_dtype=False)


@pytest.mark.parametrize("codec", ["ints", "struct19", "msgpack", "json"])
async def test_what_a_codec_cannot_carry_is_stored_all_the_same(default_redis: Redis, codec: str) -> None:
    events = sample()
    events.loc[::7, "price"] *= 1 / 3  # 17 digits
    events.loc[5, "size"] = 1.7e300
    writer = Writer(default_redis, settings=settings.load(writer={"codec": codec, "bulk_events": 190}))
    await writer.write_table(events)
    await writer.write_table(events.assign(ts_ms=events["ts_ms"] - 60_000))  # late, too
    both = pd.concat([events, events.assign(ts_ms=events["ts_ms"] - 60_000)])
    pd.testing.assert_frame_equal(await stored(default_redis), plain(both), check_dtype=False)


async def test_what_is_written_between_two_slices_is_there_too(redis: Redis) -> None:
    events, others = sample(2_000), sample(100, seed=2)
    async with Writer(redis) as writer:
        async for start, _ in writer.write_slices(events, [700, 1_400, 2_000]):
            if start == 0:
                await writer.write_table(others)
            if start == 700:
                await writer.write(Event(T0 + 500_000, "okx", "Z", "buy", 1.0, 1.0, 1.0))
                await writer.flush()
    assert writer.counts.written == len(await history(redis)) == 2_101


async def test_slices_are_asked_for_at_moments_that_do_not_depend_on_the_server(default_redis: Redis) -> None:
    """What a replay answers depends on what it knows by then: two of a feed shall know the same."""
    writer, asked = Writer(default_redis), list[int]()

    def stops() -> Iterator[int]:
        for stop in range(20, 401, 20):  # few: the server has taken them before the next are packed
            asked.append(writer.counts.written)
            yield stop

    async for _ in writer.write_slices(sample(400), stops()):
        pass
    assert asked == [0, 0, *range(0, 360, 20)]
    assert len(await history(default_redis)) == 400


def test_more_than_one_shard_is_written_by_the_script(default_server: Server) -> None:
    with pytest.raises(SettingsError, match="more than one shard"):
        Writer(default_server.connect(), settings=settings.load(shards=4, writer={"strategy": "pipeline"}))


@pytest.mark.parametrize("strategy", ["pipeline", "single"])
async def test_the_originals_way_of_writing_stores_the_same(redis: Redis, strategy: str) -> None:
    events = sample(300)
    writer = Writer(redis, settings=settings.load(writer={"strategy": strategy}))
    await writer.write_table(events)
    await writer.write_table(events.iloc[:50])  # late
    pd.testing.assert_frame_equal(await stored(redis), plain(pd.concat([events, events[:50]])), check_dtype=False)
    assert writer.counts.written == 350
    counts = [int(v["count"]) for v in (await hashes(redis, "vwap:*")).values()]
    assert sum(counts) == 350


async def test_batches_are_bounded_in_bytes(fresh_server: Callable[..., Server]) -> None:
    events = sample(20_000, symbols=500)
    # A server that remembers no other test's buffers.
    async with fresh_server().connect() as redis:
        writer = Writer(redis, settings=settings.load(writer={"batch_bytes": 64 << 10, "bulk_events": 20_000}))
        await writer.write_table(events)
        assert writer.counts.batches >= 16
        assert (await redis.info("clients"))["client_recent_max_input_buffer"] < 200 << 10
        pd.testing.assert_frame_equal(await stored(redis), plain(events), check_dtype=False)


async def test_two_writers_that_number_the_same_names_do_not_mix_them_up(default_redis: Redis) -> None:
    events = sample(3_000, symbols=400)
    writers = [Writer(default_redis, settings=settings.load(writer={"bulk_events": 40})) for _ in range(3)]
    await asyncio.gather(*(writer.write_table(events.iloc[i::3]) for i, writer in enumerate(writers)))
    pd.testing.assert_frame_equal(await stored(default_redis), plain(events), check_dtype=False)


async def test_a_batch_never_counts_names_that_come_with_a_later_one(redis: Redis) -> None:
    """By their number alone another writer's, there in their place, would be taken for them."""

    def of(*symbols: str) -> Columns:
        n, times = len(symbols), [T0 + offset[symbol] for symbol in symbols]
        return Columns.of(event_table(times, ["okx"] * n, symbols, ["buy"] * n, [2.0] * n, [3.0] * n, [6.0] * n))

    offset = {name: place for place, name in enumerate("AXBYZCDE")}
    ours, theirs = (link.Link(redis, settings.load(), name, link.Counts()) for name in ("ours", "theirs"))
    one, two, three = (ours.batches(seq, of(*names))[0] for seq, names in ((1, "A"), (2, "B"), (3, "CD")))
    await ours.send(one)
    await theirs.send(theirs.batch(1, of("X")))
    await ours.send(two)  # packed again, behind X
    four = ours.batches(4, of("D", "E"))[0]  # packed before 3 is packed again
    await theirs.send(theirs.batch(2, of("Y", "Z")))  # as many names as 4 brings
    await ours.send(three)
    await ours.send(four)
    found = await history(redis)
    expected = [T0 + offset[symbol] for symbol in found["symbol"]]
    assert sorted(found["symbol"]) == sorted("AXBYZCDDE")
    assert found["ts_ms"].tolist() == expected


@pytest.mark.parametrize("bulk", [7, 70, 5_000])
async def test_sketches_count_every_event(redis: Redis, bulk: int) -> None:
    events = sample(2_000)
    await Writer(redis, settings=settings.load(writer={"bulk_events": bulk})).write_table(events)
    counted: dict[tuple[str, int], float] = {}
    for key in await redis.keys("sketch:*"):
        [(hour, field)] = (await redis.hgetall(key)).items()
        assert int(hour) == T0 // clock.HOUR_MS
        assert len(field) < 2 * 600  # folded: there are not many more words than bins
        for quarter, count in zip(*quantiles.unpack(field), strict=True):
            place = key.decode().split(":")[1], -(-int(quarter) // 4)
            counted[place] = counted.get(place, 0) + count
    gamma = 1.01 / 0.99
    number = np.ceil(np.log(events["notional"]) / np.log(gamma)).astype(int)
    expected = events.groupby([events["symbol"].astype(str), number]).size()
    assert counted == expected.to_dict()


async def test_a_sketch_keeps_the_hours_of_its_window_and_one_more(default_redis: Redis) -> None:
    chosen = settings.load(retention={"percentile_window_s": 7_200})
    writer = Writer(default_redis, settings=chosen)

    def row(hour: int) -> pd.DataFrame:
        return event_table([hour * clock.HOUR_MS], ["okx"], ["X"], ["buy"], [2.0], [3.0], [6.0])

    for hour in (100, 101, 103, 102, 100, 103):  # 100 is too old when it comes for the second time
        await writer.write_table(row(hour))
    kept = {
        int(hour): quantiles.unpack(field)[1].sum() for hour, field in (await default_redis.hgetall("sketch:X")).items()
    }
    assert kept == {101: 1, 102: 1, 103: 2}


@pytest.mark.parametrize("bulk", [37, 5_000])
async def test_aggregates_are_those_of_pandas_whatever_the_batches(redis: Redis, bulk: int) -> None:
    events = sample()
    await Writer(redis, settings=settings.load(writer={"bulk_events": bulk})).write_table(events)

    value = events["price"] * events["size"]
    expected = events.assign(value=value).groupby("symbol", observed=True)
    vwaps = await hashes(redis, "vwap:*")
    assert len(vwaps) == events["symbol"].nunique()
    for symbol, part in expected:
        got = vwaps[f"vwap:{symbol}"]
        assert got["count"] == len(part)
        assert got["last_update"] == part["ts_ms"].max()
        assert math.isclose(got["price_sum"], math.fsum(part["value"]), rel_tol=1e-9)
        assert math.isclose(got["volume_sum"], math.fsum(part["size"]), rel_tol=1e-9)

    assert abs(await redis.pfcount("unique_symbols:1h") - len(vwaps)) <= 1


async def test_every_key_is_in_the_schema_with_its_type_and_ttl(redis: Redis) -> None:
    await Writer(redis, settings=settings.load(shards=2)).write_table(sample(200))
    chosen, seen = settings.load(), set()
    async for key in redis.scan_iter(count=1000):
        family = schema.family_of(key.decode())
        assert family is not None, key
        seen.add(family.name)
        assert (await redis.type(key)).decode() in family.redis_type.split("|")
        ttl = await redis.ttl(key)
        assert ttl == -1 if family.ttl is None else 0 < ttl <= (family.ttl_s(chosen) or 0), key
    assert seen == {"events", "names", "vwap", "sketch", "unique_symbols", "writer", *WIDTHS.values()}


async def test_late_events_are_kept_with_their_own_time(redis: Redis) -> None:
    def row(ts_ms: int) -> pd.DataFrame:
        return event_table([ts_ms], ["okx"], ["X-SWAP"], ["buy"], [2.0], [ts_ms - T0 + 1.0], [1.0])

    writer = Writer(redis)
    for ts_ms in (T0 + 20, T0 + 10, T0 + 20, T0 + 15, T0 + 30):
        await writer.write_table(row(ts_ms))

    assert (await stored(redis))["ts_ms"].tolist() == [T0 + 10, T0 + 15, T0 + 20, T0 + 20, T0 + 30]
    assert writer.counts.late == 2  # the second at T0 + 20 is a tie, not late
    ids = [entry.decode() for entry, _ in await redis.xrange("liq")]
    assert ids == [f"{T0 + 20}-{n}" for n in range(4)] + [f"{T0 + 30}-0"]


async def test_a_batch_that_ran_though_its_reply_was_lost_counts_once(default_server: Server) -> None:
    events = sample(500)
    async with default_server.connect() as client, connect(default_server.url, socket_timeout=0.5) as hasty:
        await client.flushall()
        writer = Writer(hasty, settings=settings.load(writer={"bulk_events": 500}))
        await writer.write_table(events.iloc[:1])  # loads the script
        os.kill(default_server.pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.7, os.kill, default_server.pid, signal.SIGCONT)
        await writer.write_table(events.iloc[1:])

        assert writer.counts.resent >= 1
        assert writer.counts.written == writer.counts.offered == len(events)
        pd.testing.assert_frame_equal(await stored(client), plain(events), check_dtype=False)
        counts = [int(v["count"]) for v in (await hashes(client, "vwap:*")).values()]
        assert sum(counts) == len(events)


async def test_writers_do_not_take_each_other_for_a_repeat(default_redis: Redis) -> None:
    events = sample(400)
    first, second = Writer(default_redis), Writer(default_redis)
    for start in range(0, 400, 100):
        await first.write_table(events.iloc[start : start + 50])
        await second.write_table(events.iloc[start + 50 : start + 100])
    pd.testing.assert_frame_equal(await stored(default_redis), plain(events), check_dtype=False)


async def test_live_events_leave_by_number_or_by_time(redis: Redis) -> None:
    events = sample(205)
    rows = list(Event.rows(events))
    async with Writer(redis, settings=settings.load(writer={"batch_events": 50, "batch_ms": 80})) as writer:
        await asyncio.wait_for(await writer.write(rows[0]), 60)  # alone: the window closes its batch
        assert writer.counts.batches == 1
        acknowledged = [await writer.write(row) for row in rows[1:]]
        await asyncio.wait_for(asyncio.gather(*acknowledged), 60)
        assert writer.counts.written == len(rows)
        last = await writer.write(rows[0]._replace(ts_ms=T0 + 10**6))
        assert not last.done()
    assert last.done()  # leaving flushed it
    assert len(await stored(redis)) == len(rows) + 1


async def test_backpressure_bounds_the_queue(default_redis: Redis) -> None:
    rows = list(Event.rows(sample(300)))
    chosen = settings.load(writer={"batch_events": 5, "bulk_events": 5, "queue_events": 10})
    async with Writer(default_redis, settings=chosen) as writer:
        for row in rows:
            await writer.write(row)
            assert writer.waiting == writer.counts.offered - writer.counts.written <= 10 + 5
    assert len(await stored(default_redis)) == 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"side": "long"}, "side"),
        ({"price": math.nan}, "price"),
        ({"size": -1.0}, "size"),
        ({"notional": 0}, "notional"),
    ],
)
async def test_a_bad_event_is_refused_by_name(default_redis: Redis, change: dict[str, object], message: str) -> None:
    good = Event(T0, "binance", "BTCUSDT", "buy", 1.0, 1.0, 1.0)
    async with Writer(default_redis) as writer:
        with pytest.raises(EventError, match=message):
            await writer.write(good._replace(**change))
        assert (writer.counts.offered, writer.counts.rejected, writer.waiting) == (1, 1, 0)


async def test_a_full_queue_says_why_when_the_server_is_gone(fresh_server: Callable[..., Server]) -> None:
    server, rows = fresh_server(), list(Event.rows(sample(50)))
    chosen = settings.load(writer={"batch_events": 5, "bulk_events": 5, "queue_events": 10})
    async with server.connect() as client:
        server.kill()
        writer = Writer(client, settings=chosen)

        async def offer() -> None:
            async with writer:
                for row in rows:
                    await asyncio.wait_for(writer.write(row), 60)

        with pytest.raises(WriterError, match="events wait"):
            await offer()
        # What was accepted is neither written nor forgotten.
        assert writer.counts.written == 0 < writer.waiting == writer.counts.offered - writer.counts.rejected <= 15


async def test_a_cancelled_table_can_be_finished(default_redis: Redis) -> None:
    events = sample(4_000)
    writer = Writer(default_redis, settings=settings.load(writer={"bulk_events": 100}))
    task = asyncio.create_task(writer.write_table(events))
    while writer.counts.written < 500:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    reached = writer.counts.offered
    await writer.flush()
    await writer.write_table(events.iloc[reached:])
    assert writer.counts.written == writer.counts.offered == len(events)
    pd.testing.assert_frame_equal(await stored(default_redis), plain(events), check_dtype=False)


async def test_single_events_need_the_block(default_redis: Redis) -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await Writer(default_redis).write(Event(T0, "binance", "BTCUSDT", "buy", 1.0, 1.0, 1.0))


async def test_a_full_server_loses_nothing(fresh_server: Callable[..., Server]) -> None:
    chosen = settings.load(
        server={"maxmemory": "4mb", "maxmemory_policy": "noeviction"},
        writer={"bulk_events": 500},
        retention={"events_maxlen": 10**6},
    )
    server, events = fresh_server(settings=chosen), sample(220_000)
    async with server.connect() as client:
        writer = Writer(client, settings=chosen)
        with pytest.raises(WriterError, match="free memory or raise maxmemory"):
            await writer.write_table(events)
        reached = writer.counts.offered  # the batch in doubt is offered, not written
        assert 0 < writer.counts.written < reached < len(events)
        assert len(await stored(client)) == writer.counts.written

        await client.config_set("maxmemory", "64mb")
        await writer.flush()
        await writer.write_table(events.iloc[reached:])
        pd.testing.assert_frame_equal(await stored(client), plain(events), check_dtype=False)


@pytest.mark.parametrize(("layout", "cap"), [("per_symbol", "events_maxlen"), ("shared", "shared_maxlen")])
async def test_maxlen_is_reported(default_redis: Redis, layout: str, cap: str) -> None:
    events = sample(3_000, symbols=2)
    writer = Writer(default_redis, settings=settings.load(retention={cap: 500}, writer={"layout": layout}))
    await writer.write_table(events)
    assert writer.counts.trimmed == 3_000 - len(await stored(default_redis)) > 1_000


async def test_the_lua_heap_stays_small(default_redis: Redis) -> None:
    await Writer(default_redis, settings=settings.load(writer={"bulk_events": 20_000})).write_table(sample(20_000))
    assert (await default_redis.info("memory"))["used_memory_vm_eval"] < 4 << 20


async def test_more_late_events_than_a_block_holds_can_be_sealed(default_redis: Redis) -> None:
    events = sample(50_000)
    older = events.assign(ts_ms=events["ts_ms"] - clock.DAY_MS)
    chosen = settings.load(retention={"shared_maxlen": 10**6})
    writer = Writer(default_redis, settings=chosen)
    await writer.write_table(events)
    await writer.write_table(older)  # a second recording, of the day before
    assert writer.counts.late == len(older)
    await seal(default_redis, now_ms=T0 + clock.DAY_MS, settings=chosen, partial=True)
    assert await default_redis.xlen("liq") == 0
    pd.testing.assert_frame_equal(await stored(default_redis), plain(pd.concat([older, events])), check_dtype=False)


async def test_a_changed_layout_hides_nothing(default_redis: Redis) -> None:
    first, second = np.array_split(np.arange(2_000), 2)
    events = sample(2_000)
    own, shared = (settings.load(writer={"layout": name}) for name in ("per_symbol", "shared"))
    await Writer(default_redis, settings=own).write_table(events.iloc[first])
    await Writer(default_redis, settings=shared).write_table(events.iloc[second])
    await seal(default_redis, now_ms=T0 + clock.DAY_MS, settings=shared, partial=True)
    pd.testing.assert_frame_equal(await stored(default_redis, shared), plain(events), check_dtype=False)


async def test_a_repeated_batch_is_no_sign_of_lost_memory(default_redis: Redis) -> None:
    events = sample(300)
    counts = link.Counts()
    first = link.Link(default_redis, settings.load(), "me", counts)
    await first.send(first.batch(1, Columns.of(events.iloc[:100])))
    again = link.Link(default_redis, settings.load(), "me", counts)  # the process was restarted: it knows no names yet
    for seq, start in ((1, 0), (2, 100), (3, 200)):
        await again.send(again.batch(seq, Columns.of(events.iloc[start : start + 100])))
    assert counts.memory_lost == 0
    pd.testing.assert_frame_equal(await stored(default_redis), plain(events), check_dtype=False)


async def test_memory_that_is_lost_right_after_a_repeated_batch_is_noticed(default_redis: Redis) -> None:
    events = Columns.of(sample(200))
    counts = link.Counts()
    first = link.Link(default_redis, settings.load(), "me", counts)
    await first.send(first.batch(1, events))
    again = link.Link(default_redis, settings.load(), "me", counts)
    await again.send(again.batch(1, events))  # the server has it
    await default_redis.flushall()
    await Writer(default_redis).write_table(sample(10))  # somebody else was quicker
    with pytest.raises(link.MemoryLostError):
        await again.send(again.batch(2, events))


# Shards of one server


@pytest.mark.parametrize("batch_bytes", [1 << 20, 64 << 10])
async def test_shards_are_sent_together_within_the_bytes_of_a_batch(default_redis: Redis, batch_bytes: int) -> None:
    events = sample(20_000, symbols=200)
    own = settings.load(shards=16, writer={"batch_bytes": batch_bytes, "bulk_events": 5_000})
    writer = Writer(default_redis, settings=own)
    await default_redis.script_flush()
    await writer.write_table(events.iloc[:10_000])
    await default_redis.script_flush()  # as a restart does
    await writer.write_table(events.iloc[10_000:].reset_index(drop=True))
    assert (writer.counts.written, writer.counts.resent) == (20_000, 0)
    pd.testing.assert_frame_equal(await stored(default_redis, own), plain(events), check_dtype=False)
    made = writer._link.batches(99, Columns.of(events.iloc[:5_000]))
    for one in made:
        together = [len(one.packed[shard][2]) for shard in writer._link._next(one)]
        assert sum(together) <= batch_bytes
        assert len(one.left) == 16
        assert (len(together) < 16) == (batch_bytes < 100_000)


async def test_names_that_another_writer_has_numbered_are_read_in_every_shard(default_redis: Redis) -> None:
    events, own = sample(4_000, symbols=60), settings.load(shards=8)
    first, second = (Writer(default_redis, settings=own) for _ in range(2))
    await first.write_table(events.iloc[:2_000])
    await second.write_table(events.iloc[2_000:].reset_index(drop=True))
    assert (second.counts.written, second.counts.memory_lost) == (2_000, 0)
    pd.testing.assert_frame_equal(await stored(default_redis, own), plain(events), check_dtype=False)


async def test_a_server_of_many_shards_that_forgot_is_written_on(default_redis: Redis) -> None:
    events, own = sample(4_000, symbols=60), settings.load(shards=8)
    writer, half = Writer(default_redis, settings=own), events.iloc[2_000:].reset_index(drop=True)
    await writer.write_table(events.iloc[:2_000])
    await default_redis.flushall()
    await writer.write_table(half)
    assert (writer.counts.written, writer.counts.memory_lost) == (4_000, 1)
    pd.testing.assert_frame_equal(await stored(default_redis, own), plain(half), check_dtype=False)
