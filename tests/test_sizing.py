"""Predicted bytes against `used_memory`: a structure at a time, a family at a time, and the whole after an ingest."""

import pickle
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from redis.asyncio import Redis

import liqlab
from liqlab import budget, server, settings, sizing
from liqlab.detector import Detector
from liqlab.events import EventError, concat, empty
from liqlab.server import Server
from liqlab.settings import Settings
from liqlab.sizing import Calibration
from liqlab.sizing.entries import entries
from liqlab.sizing.structures import (
    Layout,
    digits,
    listpack_int,
    listpack_text,
    radix_trees,
    sds,
)
from liqlab.writer import Writer
from tests.conftest import BINARIES
from tests.test_budget import quiet_memory

TOTAL, FAMILY = 0.02, 0.05
SMALL = ("names", "writer")  # a key or two: budget's share of the tables is all the difference
_known: dict[str, Calibration] = {}


async def calibration(kind: str) -> Calibration:
    if kind not in _known:
        with server.serve(binary=BINARIES[kind]) as running:
            async with running.connect() as redis:
                _known[kind] = await sizing.calibrate(redis)
    return _known[kind]


def dense(hours: float = 1, symbols: int = 12, rate: float = 60) -> pd.DataFrame:
    return liqlab.synth("normal", hours=hours, symbols=symbols, rate_per_min=rate, seed=5)


async def ingested(
    start: Callable[..., Server], events: pd.DataFrame, chosen: Settings
) -> tuple[int, budget.Budget, Any]:
    """Ingest into a fresh server; `used_memory` without clients and scripts' garbage, where it went, what was done."""
    running = start(settings=chosen, maxmemory=0)
    async with running.connect() as redis:
        detector = None if chosen.detector.method == "logbins" else Detector(redis, settings=chosen)
        done = await liqlab.ingest(events, redis, settings=chosen, detector=detector)
    async with running.connect() as redis:
        await redis.script_flush("SYNC")
        used = await quiet_memory(redis)
        return used, await budget.measure(redis, settings=chosen, limit=100_000), done


# Structures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantum", "sizes"),
    [
        (8, {1: 8, 9: 16, 17: 24, 33: 40, 64: 64, 65: 80, 129: 160, 4096: 4096, 4097: 5120, 16_385: 20_480}),
        (16, {1: 8, 9: 16, 17: 32, 33: 48, 64: 64, 65: 80, 129: 160, 4096: 4096, 4097: 5120}),
        (0, {1: 24, 24: 24, 25: 40, 40: 40, 41: 56, 4096: 4104, 131_072: 135_152}),
    ],
)
def test_size_classes(quantum: int, sizes: dict[int, int]) -> None:
    assert Layout("kvobj", quantum).alloc(np.array(list(sizes))).tolist() == list(sizes.values())


def test_integers_of_a_listpack_at_their_boundaries() -> None:
    sizes = {0: 2, 127: 2, 128: 3, -1: 3, 4095: 3, -4096: 3, 4096: 4, -4097: 4, 32_767: 4, 32_768: 5, 8_388_607: 5}
    sizes |= {8_388_608: 6, -8_388_609: 6, 2**31 - 1: 6, -(2**31): 6, 2**31: 10, -(2**31) - 1: 10, 2**62: 10}
    assert listpack_int(list(sizes)).tolist() == list(sizes.values())


def test_texts_of_a_listpack_and_of_an_sds() -> None:
    assert listpack_text([0, 63, 64, 125, 126, 4095, 4096]).tolist() == [2, 65, 67, 128, 130, 4099, 4103]
    assert sds([0, 31, 32, 255, 256]).tolist() == [2, 33, 36, 259, 262]
    assert digits([0, 9, 10, 99, 100, -1, -10, 10**17]).tolist() == [1, 1, 2, 2, 3, 2, 3, 18]


def test_tables_double_when_full_and_shrink_when_nearly_empty() -> None:
    redis, valkey = Layout("kvobj", 8), Layout("valkey-embedded", 0)
    most = np.array([1, 4, 5, 1000, 1025, 300, 100, 100])
    least = np.array([0, 4, 5, 1000, 1025, 300, 300, 100])
    assert redis.slots(least, most).tolist() == [4, 4, 8, 1024, 2048, 2048, 2048, 128]
    most = np.array([1, 7, 8, 1792, 1793])
    assert valkey.slots(most, most).tolist() == [1, 1, 2, 256, 512]


async def test_a_large_sorted_set_is_what_used_memory_says(fresh_server: Callable[..., Server], kind: str) -> None:
    """Skiplist and table, and soon after it has doubled the table that it grows out of."""
    layout, count, running = (await calibration(kind)).layout, 16, fresh_server(maxmemory=0)
    for members in (129, 280, 400):
        async with running.connect() as redis:
            await redis.flushall()
            await redis.zadd("size:A:0", {"1790812800000-0": 1})
            before = await quiet_memory(redis)
            async with running.connect() as loader:
                pipe = loader.pipeline(transaction=False)
                for key in range(1, count + 1):
                    for first in range(0, members, 5):
                        some = range(first, min(first + 5, members))
                        pipe.zadd(f"size:A:{key:06d}", {f"1790812800000-{one:06d}": one / 7 for one in some})
                await pipe.execute()
            grown = (await quiet_memory(redis) - before) / count
        most = np.array([1, count + 1])
        keys = float(np.diff(layout.table(most, layout.slots(most, most)))[0]) / count
        predicted = keys + float(layout.key(13, ttl=False) + layout.sorted_set(members, members))
        # Heights of nodes are drawn: what that makes of 16 sets is within a per cent.
        assert predicted + members * float(layout.member(20)) == pytest.approx(grown, rel=0.02), members


@pytest.mark.parametrize("step", [1, 60_000])
async def test_a_radix_tree_is_what_used_memory_says(step: int, fresh_server: Callable[..., Server], kind: str) -> None:
    """Streams of many nodes of one entry each: what is not nodes is the tree."""
    layout, count = (await calibration(kind)).layout, 3_000
    running = fresh_server(settings=settings.load(server={"stream_node_max_entries": 1}), maxmemory=0)
    async with running.connect() as redis:
        await redis.execute_command("XADD", "liq", "1-0", "c", 1)
        before = await quiet_memory(redis)
        ms = 1_790_812_800_000 + step * np.arange(count)
        async with running.connect() as loader:
            pipe = loader.pipeline(transaction=False)
            for one in ms.tolist():
                pipe.execute_command("XADD", "liq", f"{one}-0", "c", 1)
            await pipe.execute()
        grown = await quiet_memory(redis) - before
    zero = np.zeros(count, np.int64)
    node = layout.alloc(7 + 8 + listpack_text(1) + 6 + 4)
    predicted = radix_trees(zero, ms, zero, layout) + count * int(node)
    # glibc leaves what is too small for a chunk of its own with the one before it: never less than by formula.
    assert predicted * 0.98 <= grown <= predicted * (1.08 if layout.quantum == 0 else 1.02)


# Calibration -----------------------------------------------------------------------------------------------------


async def test_calibration_finds_the_layout_and_leaves_nothing(kind: str, fresh_server: Callable[..., Server]) -> None:
    running = fresh_server()
    async with running.connect() as redis:
        before = await quiet_memory(redis)
        await redis.set("someone:else", "stays", ex=1_000)
        known = await sizing.calibrate(redis)
        assert await redis.keys() == [b"someone:else"]
        assert await quiet_memory(redis) == pytest.approx(before, abs=40_000)
    assert known.layout.valkey == ("valkey" in kind)
    assert known.base_bytes == pytest.approx(before, rel=0.03)
    assert all(0.95 < factor < 1.05 for factor in known.factors.values())
    assert 0 < known.error < 0.1


async def test_calibration_of_a_server_that_has_data(default_redis: Redis) -> None:
    await default_redis.mset({f"temp:{number}": "x" * 100 for number in range(3_000)})
    known = await sizing.calibrate(default_redis)
    assert known.base_bytes < 800_000
    assert await default_redis.dbsize() == 3_000


# Families --------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "defaults": {"writer": {"block_bytes": 8192}},
    "own streams, hashes": {
        "writer": {"layout": "per_symbol", "codec": "fields", "candles": "hash", "block_bytes": 4096},
        "retention": {"hot_s": 300, "percentile_bucket_s": 900, "percentile_window_s": 3600},
        "server": {"stream_node_max_bytes": 1024},
    },
    "hybrid, json, large nodes": {
        "writer": {"layout": "hybrid", "hybrid_events": 200, "codec": "json", "block_codec": "msgpack-zlib"},
        "server": {"stream_node_max_bytes": 8192, "stream_node_max_entries": 50},
    },
    "shards, struct19, trimmed": {
        "shards": 3,
        "writer": {"codec": "struct19", "block_bytes": 64 << 10},
        "retention": {"shared_maxlen": 1_500, "vwap_s": 60, "candle_s": 600, "hot_s": 3_600},
        "server": {"stream_node_max_bytes": 512},
    },
}


# Ways to keep percentiles, which a detector fills that finds nothing large enough to raise.
METHODS: dict[str, dict[str, Any]] = {
    "exact": {"retention": {"percentile_bucket_s": 1_800}},
    "topk": {"detector": {"size": 60}, "retention": {"percentile_bucket_s": 1_800}},
    "topk, a table": {"detector": {"size": 200}, "retention": {"percentile_bucket_s": 7_200}},
    "reservoir": {"shards": 3},
}
CASES |= {
    name: {"writer": {"block_bytes": 8192}}
    | METHODS[name]
    | {"detector": {"method": name.split(",")[0], "min_usd": 1e15} | METHODS[name].get("detector", {})}
    for name in METHODS
}


@pytest.mark.parametrize("case", CASES)
async def test_each_family_after_an_ingest(case: str, kind: str, fresh_server: Callable[..., Server]) -> None:
    chosen, events = settings.load(**CASES[case]), dense(symbols=6, rate=45) if case in METHODS else dense()
    used, measured, done = await ingested(fresh_server, events, chosen)
    predicted = sizing.predict(events, chosen, await calibration(kind), exact=True)

    families = measured.families
    assert predicted.table.index.symmetric_difference(families.index).empty
    assert predicted.table["keys"].to_dict() == families["keys"].to_dict()
    assert predicted.table["members"].to_dict() == families["members"].to_dict()
    large = families.index.difference(list(SMALL))
    off = (predicted.table["bytes"] / families["bytes"] - 1)[large]
    # Of one small key, what glibc leaves with a chunk is more than a few per cent.
    slack = (16 * families["keys"] / families["bytes"])[large] if "valkey" in kind else 0
    assert (off.abs() < FAMILY + slack).all(), off.to_string()
    assert predicted.events_kept == done.held
    assert predicted.base_bytes + predicted.data_bytes == pytest.approx(used, rel=TOTAL)


async def test_quiet_symbols(kind: str, fresh_server: Callable[..., Server]) -> None:
    """Streams that are emptied and begin anew, keys that expire, a table that shrinks."""
    chosen = settings.load(
        writer={"layout": "per_symbol", "block_bytes": 1024},
        retention={"hot_s": 300, "events_s": 3_600, "candle_s": 600, "candle_5m_s": 600, "vwap_s": 600},
    )
    events = liqlab.synth("quiet", hours=2, symbols=80, seed=3)
    used, _, done = await ingested(fresh_server, events, chosen)
    predicted = sizing.predict(events, chosen, await calibration(kind), exact=True)
    assert predicted.events_kept == done.held
    assert predicted.base_bytes + predicted.data_bytes == pytest.approx(used, rel=TOTAL)


async def test_a_hyperloglog_has_the_same_room_however_events_are_batched(default_redis: Redis) -> None:
    events = liqlab.synth("normal", hours=0.9, symbols=400, seed=4)
    predicted, sizes = sizing.predict(events), set()
    for rows in (50, 1_000, len(events)):
        await default_redis.flushall()
        async with Writer(default_redis) as writer:
            for start in range(0, len(events), rows):
                await writer.write_table(events.iloc[start : start + rows].reset_index(drop=True))
        sizes.add((await budget.measure(default_redis)).families.loc["unique_symbols", "bytes"])
    assert max(sizes) > 900
    assert all(predicted.table.loc["unique_symbols", "bytes"] == pytest.approx(size, rel=0.02) for size in sizes)


@pytest.mark.parametrize("layout", ["shared", "hybrid"])
async def test_fewer_symbols_than_shards(layout: str, fresh_server: Callable[..., Server]) -> None:
    chosen = settings.load(shards=8, writer={"layout": layout, "block_bytes": 4096})
    events = dense(symbols=3)
    _, measured, done = await ingested(fresh_server, events, chosen)
    predicted = sizing.predict(events, chosen, exact=True)
    assert predicted.table["keys"].to_dict() == measured.families["keys"].to_dict()
    assert predicted.events_kept == done.held


async def test_through_time_is_what_the_server_had() -> None:
    """The feed cut short at a minute leaves what the whole feed's prediction says of that minute."""
    kind = next(iter(BINARIES))
    chosen = settings.load(retention={"hot_s": 600, "candle_s": 1_800}, writer={"block_bytes": 4096})
    events = dense(1.5)
    predicted = sizing.predict(events, chosen, await calibration(kind), exact=True)
    cut = int(predicted.families.index[70])
    part = events[events["ts_ms"] < cut + 60_000].reset_index(drop=True)
    with ExitStack() as stack:
        used, _, done = await ingested(lambda **kw: stack.enter_context(server.serve(**kw)), part, chosen)
    there = float(predicted.families.loc[cut].sum())
    assert predicted.base_bytes + there == pytest.approx(used, rel=0.03)
    assert int(predicted.held.loc[cut].sum()) == done.held


# What holds without a server ----------------------------------------------------------------------------------------


def bytes_of(events: Any, **chosen: Any) -> sizing.Predicted:
    return sizing.predict(events, settings.load(**chosen))


def test_more_of_anything_takes_more() -> None:
    events = sizing.prepare(dense())
    for section, name, values in [
        ("retention", "hot_s", (300, 1_200, 3_600)),
        ("retention", "candle_s", (300, 900, 3_600)),
        ("retention", "vwap_s", (1, 3_600)),
        ("retention", "shared_maxlen", (500, 2_000, 1_000_000)),
        ("topk", "size", (10, 50, 127, 500)),
        ("reservoir", "size", (10, 50, 126, 500)),
    ]:
        chosen = [{"writer": {"block_bytes": 2048}, section: {name: value}} for value in values]
        if name == "size":
            chosen = [{"detector": {"method": section, "size": value}} for value in values]
        sizes = [bytes_of(events, **one).data_bytes for one in chosen]
        assert sizes == sorted(sizes), name
        assert sizes[0] < sizes[-1], name


def test_a_sorted_set_goes_with_its_window() -> None:
    """Each bucket an hour and a quarter after its own last event, not after the last event of its symbol."""
    chosen = {"percentile_window_s": 3_600, "percentile_bucket_s": 900}
    events = dense(3.8, symbols=3)
    found = bytes_of(events, detector={"method": "exact"}, retention=chosen)
    times = events.groupby(["symbol", events["ts_ms"] // 900_000], observed=True)["ts_ms"].agg(["max", "size"])
    alive = times[times["max"] + 4_500_000 > events["ts_ms"].iloc[-1] // 60_000 * 60_000]
    assert 0 < len(alive) < len(times)
    assert found.table.loc["percentile", ["keys", "members"]].tolist() == [len(alive), alive["size"].sum()]


def test_sampled_blocks_are_near_to_encoded_ones() -> None:
    events = sizing.prepare(dense(2))
    quick, exact = sizing.predict(events), sizing.predict(events, exact=True)
    assert quick.events_kept == exact.events_kept == len(events)
    assert quick.data_bytes == pytest.approx(exact.data_bytes, abs=2 * settings.load().writer.block_bytes)


def test_a_prepared_feed_travels_without_what_it_remembers() -> None:
    prepared = sizing.prepare(liqlab.synth("normal", hours=2, symbols=30, seed=2))
    fresh = pickle.dumps(prepared)
    found = sizing.predict(prepared)
    assert pickle.dumps(prepared) == fresh
    there = pickle.loads(fresh)
    assert there.order.tolist() == prepared.order.tolist()
    assert sizing.predict(there).as_dict() == found.as_dict()


def test_a_prepared_feed_gives_the_same_and_any_step_the_same_end() -> None:
    events = dense(1)
    prepared = sizing.prepare(events)
    assert sizing.prepare(prepared) is prepared
    once, again = sizing.predict(events), sizing.predict(prepared)
    assert sizing.predict(prepared).as_dict() == once.as_dict() == again.as_dict()
    assert once.families.index.name == "ts_ms"
    assert len(once.families) == len(once.held) == len(once.total) <= 61
    hourly = sizing.predict(prepared, step="hour")
    assert len(hourly.families) == 1
    assert hourly.table.equals(once.table)
    assert once.peak_bytes >= once.used_memory
    assert once.families.iloc[-1].sum() == pytest.approx(once.data_bytes, abs=10)


def test_several_venues_and_odd_numbers() -> None:
    """Exchanges by number, and sizes that `ints` does not carry, which are written as `fields`."""
    events = concat([dense(1), liqlab.synth("normal", hours=1, symbols=5, seed=1, exchange="okx")])
    odd = events["size"].to_numpy().copy()
    odd[::3] *= np.pi
    odd_events = events.assign(size=odd, notional=odd * events["price"])
    plain, found = (sizing.predict(one).table.loc["events", "bytes"] for one in (events, odd_events))
    assert found > 1.1 * plain
    assert entries(sizing.prepare(events), "ints", own=False).size.max() < 30


def test_what_is_refused() -> None:
    with pytest.raises(EventError, match="holds no event"):
        sizing.predict(empty())
    with pytest.raises(ValueError, match="step is 'week'"):
        sizing.predict(dense(0.1), step="week")
    with pytest.raises(EventError, match=r"detector\.method is 'tdigest', which cannot be predicted"):
        sizing.predict(dense(0.1), settings.load(detector={"method": "tdigest"}))
    with pytest.raises(ValueError, match=r"writer\.strategy is 'single'"):
        sizing.predict(dense(0.1), settings.load(writer={"strategy": "single"}))


def test_one_event_alone() -> None:
    one = dense(0.2).iloc[:1].reset_index(drop=True)
    found = sizing.predict(one, exact=True)
    assert found.events_kept == 1
    assert len(found.families) == 1
    assert found.table.loc["events", "members"] == 1
    assert replace(Calibration(), error=0.1).error == 0.1
