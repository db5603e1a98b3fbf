"""Events are read back once each, hot and sealed, whatever happens to them meanwhile."""

import asyncio
import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from redis.asyncio import Redis

from liqlab import archive, clock, schema, settings
from liqlab.archive import count, history
from liqlab.codecs import CodecError
from liqlab.events import event_table
from liqlab.sealing import ahead, seal
from liqlab.server import Server
from liqlab.writer import Writer
from tests.test_writer import T0, plain, sample, stored

LAYOUTS = ["shared", "per_symbol", "hybrid"]
AGES = 10**9  # ms: past every window


def chosen(layout: str = "shared", **writer: object) -> settings.Settings:
    writer = {"layout": layout, "block_bytes": "1kb", "hybrid_events": 100, "bulk_events": 250} | writer
    return settings.load(writer=writer, retention={"hot_s": 60})


def same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(plain(found), plain(expected), check_dtype=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
async def test_sealing_changes_nothing_for_a_reader(redis: Redis, layout: str, shards: int) -> None:
    events = sample(4_000)
    own = chosen(layout).model_copy(update={"shards": shards})
    await Writer(redis, settings=own).write_table(events)
    times = events["ts_ms"]
    for now_ms, partial in ((times.iloc[2_000], False), (times.iloc[2_060], True), (times.iloc[-1] + AGES, True)):
        done = await seal(redis, now_ms=int(now_ms) + 60_000, settings=own, partial=partial)
        assert done.events > 0 < done.blocks
        found = await history(redis, settings=own)
        same(found, events)
        assert found["ts_ms"].is_monotonic_increasing
        assert await count(redis, settings=own) == len(events)
    assert sum(
        [await redis.xlen(key) async for key in redis.scan_iter("liq:*") if await redis.type(key) == b"stream"]
    ) == (0)


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_any_symbol_and_any_span(default_redis: Redis, layout: str) -> None:
    events = sample(3_000)
    await Writer(default_redis, settings=chosen(layout)).write_table(events)
    await seal(default_redis, now_ms=int(events["ts_ms"].iloc[1_500]) + 60_000, settings=chosen(layout))
    times = events["ts_ms"].to_numpy()
    edges = [None, times[700] + 1, times[1_500], times[-1] + 5]
    for symbol in (None, "S1USDT", "NOSUCHUSDT"):
        for start, end in itertools.product(edges, edges):
            wanted = events
            if symbol is not None:
                wanted = wanted[wanted["symbol"] == symbol]
            if start is not None:
                wanted = wanted[wanted["ts_ms"] >= start]
            if end is not None:
                wanted = wanted[wanted["ts_ms"] <= end]
            start, end = (None if edge is None else int(edge) for edge in (start, end))
            same(await history(default_redis, symbol, start, end, settings=chosen(layout)), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_late_events_find_their_place_on_both_sides_of_the_seam(default_redis: Redis, layout: str) -> None:
    events, own = sample(2_000), chosen(layout)
    writer = Writer(default_redis, settings=own)
    await writer.write_table(events)
    now_ms = int(events["ts_ms"].iloc[-1]) + 30_000
    await seal(default_redis, now_ms=now_ms, settings=own, partial=True)
    # As old as the sealed ones, of symbols that are known and of one that is not.
    old = pd.concat([events.iloc[::40], events.iloc[5:6].assign(symbol="NEWUSDT", ts_ms=T0 - 5_000)])
    late = event_table(**old)
    await writer.write_table(late)
    assert writer.counts.late > 0
    both = pd.concat([events.astype({"symbol": str}), late.astype({"symbol": str})])
    same(await history(default_redis, settings=own), both)
    same(
        await history(default_redis, start_ms=T0 - 5_000, end_ms=T0 - 5_000, settings=own),
        both[both["symbol"] == "NEWUSDT"],
    )
    await seal(default_redis, now_ms=now_ms + AGES, settings=own, partial=True)
    same(await history(default_redis, settings=own), both)
    same(await history(default_redis, end_ms=T0 - 1, settings=own), both[both["symbol"] == "NEWUSDT"])


async def test_a_reader_of_one_stream_sees_every_event_once_at_any_moment(redis: Redis, server: Server) -> None:
    await at_any_moment(redis, server, chosen("shared", bulk_events=60))


@pytest.mark.parametrize("layout", ["per_symbol", "hybrid"])
async def test_a_reader_of_many_streams_does_too(default_redis: Redis, default_server: Server, layout: str) -> None:
    await at_any_moment(default_redis, default_server, chosen(layout, bulk_events=60))


async def at_any_moment(redis: Redis, server: Server, own: settings.Settings) -> None:
    """Two writers, two sealers and two readers at once: what was written before a reading began is in it, once."""
    events = sample(6_000)
    progress, readings = [0, 0], []
    halves = [events.iloc[0::2], events.iloc[1::2]]
    over = asyncio.Event()

    async def write(which: int) -> None:
        writer = Writer(redis, settings=own)
        stops = range(60, 3_001, 60)
        async for _, stop in writer.write_slices(halves[which].reset_index(drop=True), stops):
            progress[which] = stop

    async def work(step) -> None:
        async with server.connect() as client:
            while not over.is_set():
                await step(client)

    async def sealing(client: Redis) -> None:
        newest = max(int(half["ts_ms"].iloc[max(done - 1, 0)]) for half, done in zip(halves, progress, strict=True))
        await seal(client, now_ms=newest + 59_000, settings=own, partial=True)

    async def reading(client: Redis) -> None:
        before = [half.iloc[:done] for half, done in zip(halves, progress, strict=True)]
        found = plain(await history(client, settings=own))
        readings.append(len(found))
        counts = found.value_counts()
        possible = plain(events).value_counts()
        assert (counts <= possible.reindex(counts.index).fillna(0)).all(), "an event twice, or one nobody wrote"
        certain = plain(pd.concat(before)).value_counts()
        assert (counts.reindex(certain.index).fillna(0) >= certain).all(), "an event is missing"

    workers = [asyncio.create_task(work(step)) for step in (sealing, sealing, reading, reading)]
    try:
        await asyncio.gather(write(0), write(1))
    finally:
        over.set()
        await asyncio.gather(*workers)
    same(await history(redis, settings=own), events)
    assert len(readings) > 5
    assert (await redis.xlen("liqb")) > 5


async def test_a_stream_that_begins_while_another_is_sealed_keeps_its_events(redis: Redis) -> None:
    events = sample(6_000)
    own, shared = chosen("per_symbol"), chosen("shared")
    now_ms = int(events["ts_ms"].iloc[-1]) + 1_000 * shared.retention.hot_s + 1
    await Writer(redis, settings=shared).write_table(events.iloc[1_000:])
    made = await ahead(redis, now_ms=now_ms, settings=shared)
    assert await made.expected()
    await Writer(redis, settings=own).write_table(events.iloc[:1_000])  # from before the time that is sealed up to
    await seal(redis, now_ms=now_ms, settings=shared, made=made)
    same(await history(redis), events)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("disturbed", [False, True])
async def test_what_is_read_on_is_sealed_as_if_it_were_read_anew(
    default_redis: Redis, layout: str, disturbed: bool
) -> None:
    """Reading begins where the last ended, while that is sealed; the names and the seal of others make it void."""
    events, own, blocks = sample(6_000), chosen(layout), []
    moments = [int(ms) + 60_000 for ms in events["ts_ms"].iloc[2_000::500]]
    stranger = sample(10).assign(symbol=pd.Categorical(["NEWUSDT"] * 10))
    for reads_on in (False, True):
        await default_redis.flushall()
        await Writer(default_redis, settings=own).write_table(events)
        made, sealed = None, []
        for place, now_ms in enumerate(moments):
            if disturbed and place == 3:
                await seal(default_redis, now_ms=now_ms - 1, settings=own, partial=True)
            if disturbed and place == 5:
                await Writer(default_redis, settings=own).write_table(stranger)
            expected = await made.expected() if made else {}
            sealing = asyncio.create_task(seal(default_redis, now_ms=now_ms, settings=own, made=made))
            if not made:
                await sealing
            if reads_on and place + 1 < len(moments):
                behind = made.fronts if made else {}
                made = await ahead(default_redis, now_ms=moments[place + 1], settings=own, behind=behind)
            sealed.append(await sealing)
            assert disturbed or not expected or expected == sealed[-1].shards
        blocks.append((await default_redis.xrange("liqb"), [one.events for one in sealed]))
        same(await history(default_redis), pd.concat([events, stranger]) if disturbed else events)
    assert blocks[0] == blocks[1]
    assert len(blocks[0][0]) > 10


async def test_what_another_writer_adds_behind_what_was_read_is_not_lost(default_redis: Redis) -> None:
    """Late, of a symbol that was silent, and then followed by what is read on: both ends of its stream are as read."""
    own = chosen("per_symbol")

    def made_of(symbol: str, seconds: list[int]) -> pd.DataFrame:
        count, values = len(seconds), np.random.default_rng(len(seconds)).uniform(1, 2, len(seconds)).round(4)
        times = T0 + 1_000 * np.array(seconds, np.int64)
        return event_table(times, ["binance"] * count, [symbol] * count, ["buy"] * count, values, values, values**2)

    parts = [made_of("BUSYUSDT", [*range(900)]), *(made_of("RAREUSDT", [at]) for at in (1, 290, 400))]
    for part in (parts[0], parts[1]):
        await Writer(default_redis, settings=own).write_table(part)
    first = await ahead(default_redis, now_ms=T0 + 300_000 + 60_000, settings=own)
    assert 0 < (await first.expected())[None].until_ms < T0 + 290_000  # something of it is left
    await Writer(default_redis, settings=own).write_table(parts[2])
    assert (await seal(default_redis, now_ms=T0 + 360_000, settings=own, made=first)).blocks
    await Writer(default_redis, settings=own).write_table(parts[3])
    second = await ahead(default_redis, now_ms=T0 + 960_000, settings=own, behind=first.fronts)
    expected = await second.expected()
    assert (await seal(default_redis, now_ms=T0 + 960_000, settings=own, made=second)).shards == expected
    assert expected[None].until_ms > T0 + 400_000
    same(await history(default_redis), pd.concat(parts).sort_values("ts_ms", kind="stable"))


async def test_blocks_fit_below_their_size_and_are_nearly_full(default_redis: Redis) -> None:
    events, own = sample(20_000), chosen(block_bytes="4kb")
    await Writer(default_redis, settings=own).write_table(events)
    await seal(default_redis, now_ms=T0 + AGES, settings=own)
    sizes = [len(fields[b"b"]) for _, fields in await default_redis.xrange("liqb")]
    assert len(sizes) > 5
    assert max(sizes) <= 4096 - 32
    assert np.median(sizes) > 0.93 * 4096
    # What does not fill a block stays hot.
    assert 0 < await default_redis.xlen("liq") < 20_000 * 4096 / sum(sizes)


async def test_a_moment_larger_than_a_block_is_sealed_all_the_same(default_redis: Redis) -> None:
    events = sample(3_000).assign(ts_ms=T0)
    await Writer(default_redis, settings=chosen()).write_table(events)
    assert (await seal(default_redis, now_ms=T0 + AGES, settings=chosen())).events == 3_000
    same(await history(default_redis), events)


async def test_nothing_to_read_and_nothing_to_seal(default_redis: Redis) -> None:
    assert (await history(default_redis)).empty
    assert (await seal(default_redis, now_ms=T0)).events == 0
    await Writer(default_redis).write_table(sample(100))
    assert (await seal(default_redis, now_ms=T0, partial=True)).events == 0  # all is hot
    assert await count(default_redis) == 100


async def test_sealed_history_outlives_maxlen(default_redis: Redis) -> None:
    own = settings.load(
        retention={"shared_maxlen": 1_000, "hot_s": 1}, writer={"bulk_events": 100, "block_bytes": "2kb"}
    )
    events = sample(5_000)
    writer = Writer(default_redis, settings=own)
    async for _, stop in writer.write_slices(events, range(100, 5_001, 100)):
        await seal(default_redis, now_ms=int(events["ts_ms"].iloc[stop - 1]), settings=own)
    assert writer.counts.trimmed == 0
    same(await history(default_redis), events)


async def test_a_stranger_in_a_stream_is_named(default_redis: Redis) -> None:
    await Writer(default_redis).write_table(sample(50))
    await default_redis.xadd("liq", {"what": "ever"}, id=f"{T0 + AGES}-0")
    with pytest.raises(CodecError, match="liq: entries with the field b'what'"):
        await history(default_redis)
    with pytest.raises(CodecError, match="liq: entries"):
        await seal(default_redis, now_ms=T0 + 2 * AGES)
    assert await default_redis.xlen("liq") == 51


async def test_every_sealed_key_is_in_the_schema(default_redis: Redis) -> None:
    await Writer(default_redis, settings=settings.load(shards=2)).write_table(sample(500))
    await seal(default_redis, now_ms=T0 + clock.DAY_MS, settings=settings.load(shards=2), partial=True)
    found = {schema.family_of(key.decode()) for key in await default_redis.keys("liqb*")}
    assert found == {schema.BY_NAME["blocks"]}
    assert all([await default_redis.ttl(key) > 0 for key in await default_redis.keys("liqb*")])


async def test_hundreds_of_streams_are_read_within_what_clients_may_take(fresh_server: Callable[..., Server]) -> None:
    events = sample(60_000, symbols=300)
    events["ts_ms"] = T0 + np.arange(len(events)) * 20  # busy and quiet symbols over 20 minutes
    own = settings.load(
        server={"maxmemory": "24mb"},
        writer={"layout": "per_symbol"},
        retention={"hot_s": 60, "events_maxlen": 10**6},
    )
    async with fresh_server(settings=own).connect() as redis:
        assert int((await redis.config_get("maxmemory-clients"))["maxmemory-clients"].rstrip("%")) > 0
        await Writer(redis, settings=own).write_table(events)
        same(await history(redis), events)
        done = await seal(redis, now_ms=int(events["ts_ms"].max()) + 60_001, settings=own, partial=True)
        assert done.events == len(events)
        assert done.payload / done.blocks > 0.7 * own.writer.block_bytes  # full ones, though each stream is short
        same(await history(redis), events)
        assert (await redis.info("stats"))["evicted_keys"] == 0


@pytest.mark.parametrize("codec", ["ints", "fields", "struct19", "msgpack", "json"])
@pytest.mark.parametrize("layout", ["shared", "per_symbol"])
async def test_events_of_every_codec_can_be_read_back_from_blocks(
    default_redis: Redis, codec: str, layout: str
) -> None:
    events, made = sample(2_000), settings.load(writer={"codec": codec, "layout": layout})
    await Writer(default_redis, settings=made).write_table(events)
    sealed = await seal(default_redis, now_ms=T0 + clock.DAY_MS, settings=made, partial=True)
    assert sealed.events == 2_000
    pd.testing.assert_frame_equal(await stored(default_redis, made), plain(events), check_dtype=False)


async def test_names_that_no_writer_has_numbered_are_numbered_by_the_sealer(default_redis: Redis) -> None:
    events, made = sample(500), settings.load(writer={"codec": "fields"})
    await Writer(default_redis, settings=made).write_table(events)
    await default_redis.ltrim("liqid", 0, 1)  # as an earlier version left it
    await seal(default_redis, now_ms=T0 + clock.DAY_MS, settings=made, partial=True)
    pd.testing.assert_frame_equal(await stored(default_redis, made), plain(events), check_dtype=False)
    assert await default_redis.llen("liqid") == 2 + events["symbol"].nunique() + events["exchange"].nunique()
    later = sample(500, seed=2, symbols=60).assign(ts_ms=lambda table: table["ts_ms"] + clock.HOUR_MS)
    await Writer(default_redis, settings=settings.load()).write_table(later)
    await seal(default_redis, now_ms=T0 + clock.DAY_MS, settings=made, partial=True)
    both = plain(pd.concat([events, later]))
    pd.testing.assert_frame_equal(await stored(default_redis, made), both, check_dtype=False)


# Several shards at once


async def test_an_error_of_a_shard_ends_what_is_asked_of_the_others() -> None:
    ended = list[int | None]()

    async def ask(shard: int | None, together: int) -> int:
        assert together == archive.TOGETHER
        try:
            if shard == 3:
                raise CodecError("of shard 3")
            await asyncio.sleep(60)
        finally:
            ended.append(shard)
        return 0

    with pytest.raises(CodecError, match="of shard 3") as caught:
        await archive.of_each(range(20), ask)
    assert (
        set(range(archive.TOGETHER)) <= set(ended) <= set(range(archive.TOGETHER + 1))
    )  # of the others none was asked
    assert caught.value.__context__ is None


async def test_answers_come_in_the_order_of_shards_and_not_all_are_asked_at_once() -> None:
    asked = [0, 0]

    async def ask(shard: int | None, together: int) -> int:
        asked[0] += 1
        asked[1] = max(asked)
        await asyncio.sleep(0.001 * (20 - int(shard or 0)))
        asked[0] -= 1
        return int(shard or 0)

    assert await archive.of_each(range(20), ask) == list(range(20))
    assert asked == [0, archive.TOGETHER]


@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_pages_of_every_shard_fit_together(default_redis: Redis, layout: str, shards: int) -> None:
    """More events than a page of a shard, more streams and more blocks than are read at once."""
    events, own = sample(30_000, symbols=150), chosen(layout).model_copy(update={"shards": shards})
    events["symbol"] = events["symbol"].astype(str).where(np.arange(len(events)) % 3 > 0, "BUSYUSDT").astype("category")
    await Writer(default_redis, settings=own).write_table(events)
    same(await history(default_redis, settings=own), events)
    assert await count(default_redis, settings=own) == len(events)
    after = dict[str, str]()
    same(await archive.tail(default_redis, after, start_ms=0, settings=own), events)
    assert (await archive.tail(default_redis, after, start_ms=0, settings=own)).empty
    now_ms = int(events["ts_ms"].iloc[20_000]) + 60_000
    done = (await seal(default_redis, now_ms=now_ms, settings=own, partial=True)).shards
    assert list(done) == list(schema.shards_of(own))
    assert sum(one.events for one in done.values()) > 19_000
    assert max(one.blocks for one in done.values()) > 64  # more than one call of the script counts
    same(await history(default_redis, settings=own), events)
    assert await count(default_redis, settings=own) == len(events)


async def test_counted_is_what_no_block_of_liqlabs_is_and_what_a_broken_one_says(redis: Redis) -> None:
    events = sample(4_000)
    for codec in ("msgpack-zlib", "block"):
        own = chosen(block_codec=codec)
        now_ms = int(events["ts_ms"].iloc[2_000]) + 60_000 if codec == "msgpack-zlib" else T0 + AGES
        if codec == "msgpack-zlib":
            await Writer(redis, settings=own).write_table(events)
        await seal(redis, now_ms=now_ms, settings=own, partial=True)
        assert await count(redis, settings=own) == len(events)
    fields = [next(iter(fields)) for _, fields in await redis.xrange("liqb")]
    assert fields.count(b"b") > 5
    assert fields.count(b"k") > 16  # more than one call answers with
    same(await history(redis, settings=own), events)
    last = int((await redis.lindex("liqid", 1)).decode())
    await redis.lset("liqid", 1, last + 1)
    for seq, payload in enumerate((b"\x02" + bytes(30), b"\x01")):
        broken = await redis.xadd("liqb", {"b": payload}, id=f"{last}-{seq + 1}")
        with pytest.raises(CodecError, match="block: "):
            await count(redis, settings=own)
        await redis.xdel("liqb", broken)
    await redis.xadd("liqb", {"b": b"\x02"}, id=f"{last + 2}-0")  # beyond what is sealed
    assert await count(redis, settings=own) == len(events)


async def test_more_streams_than_are_counted_at_once(default_redis: Redis) -> None:
    n = 2_300
    events = event_table(
        [T0 + at for at in range(n)],
        ["okx"] * n,
        [f"S{at}" for at in range(n)],
        ["buy"] * n,
        [2.0] * n,
        [3.0] * n,
        [6.0] * n,
    )
    await Writer(default_redis, settings=chosen("per_symbol")).write_table(events)
    assert await count(default_redis, settings=chosen("per_symbol")) == n


async def test_sealing_says_what_an_event_takes_in_the_last_block(default_redis: Redis) -> None:
    own = chosen(block_bytes="16kb", bulk_events=2_000)
    events = sample(2_000)
    await Writer(default_redis, settings=own).write_table(events[:1_500])
    few = (await seal(default_redis, now_ms=T0 + AGES, settings=own)).shards[None]
    assert (few.blocks, few.each) == (0, 0)
    done = (await seal(default_redis, now_ms=T0 + AGES, settings=own, partial=True)).shards[None]
    assert done.each == done.payload / done.events
    await Writer(default_redis, settings=own).write_table(events[1_500:])
    then = (await seal(default_redis, now_ms=T0 + 2 * AGES, settings=own)).shards[None]
    assert (then.blocks, then.each) == (0, done.each)


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [b"0-1"],
        [b"1700000000000-0", b"1700000000001-7"],
        [b"1700000000000-0", b"1700000000000-10"],  # of two lengths
        [b"999-10", b"1000-1"],  # of one, but with the dash elsewhere
        [b"140737488355327-0", b"0000000000000-10"],
        [b"000000000000000000001-0"],
    ],
)
def test_times_of_ids_of_any_length(ids: list[bytes]) -> None:
    assert archive.times_of(ids).tolist() == [int(one.partition(b"-")[0]) for one in ids]
    assert archive.times_of(ids).dtype == np.int64
