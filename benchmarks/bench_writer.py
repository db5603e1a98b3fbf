"""Bytes an event, events a second and the time to an acknowledgement, each beside its rivals on the same server.

python benchmarks/bench_writer.py                    # about two minutes
python benchmarks/bench_writer.py --live-seconds 60  # the live path for as long as issue #3 asks
"""

import argparse
import asyncio
import json
import lzma
import shutil
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pandas as pd
from redis.asyncio import Redis
from rows import record

from liqlab import batch, link, original, read_feed, seal, serve, settings, synth
from liqlab.codecs import Names
from liqlab.events import Columns, Event
from liqlab.server import Server
from liqlab.writer import Writer

RECORDING = Path(__file__).resolve().parents[2] / "shared/feeds/recordings/binance_recorder_2025-01-26.csv"
UNBOUNDED = settings.load(retention={"shared_maxlen": 10**9, "events_maxlen": 10**9}, server={"maxmemory": "4gb"})
Work = Callable[[Redis], Coroutine[Any, Any, None]]


async def pipelined(redis: Redis, commands: Iterable[tuple[Any, ...]], size: int) -> None:
    waiting = list(commands)
    for start in range(0, len(waiting), size):
        pipe = redis.pipeline(transaction=False)
        for command in waiting[start : start + size]:
            pipe.execute_command(*command)
        await pipe.execute()


def cryptofeed(events: pd.DataFrame) -> Iterable[tuple[Any, ...]]:
    """Yield what cryptofeed's two backends send: ZADD of JSON, and XADD of nine text fields."""
    for n, event in enumerate(Event.rows(events)):
        fields = {
            "exchange": event.exchange, "symbol": event.symbol, "side": event.side, "quantity": str(event.size),
            "price": str(event.price), "id": "None", "status": "filled", "timestamp": event.ts_ms / 1000,
            "receipt_timestamp": event.ts_ms / 1000 + n * 1e-6,
        }  # fmt: skip
        key = f"liquidations-{event.exchange}-{event.symbol}"
        yield "ZADD", key, "NX", event.ts_ms / 1000, json.dumps(fields)
        yield "XADD", f"stream-{key}", "*", *(word for pair in fields.items() for word in pair)


def legacy(events: pd.DataFrame) -> Iterable[tuple[Any, ...]]:
    """Yield what the original design started from: a sorted set of JSON for each symbol."""
    for event in Event.rows(events):
        member = {"symbol": event.symbol, "side": event.side, "size": event.size, "price": event.price}
        member |= {"timestamp": event.ts_ms / 1000, "exchange": event.exchange}
        yield "ZADD", f"liquidations:{event.symbol}", event.ts_ms / 1000, json.dumps(member)


def text_streams(events: pd.DataFrame) -> Iterable[tuple[Any, ...]]:
    """Yield the original's XADD, without its three other commands."""
    return (commands[0] for commands in original.commands(Columns.of(events), UNBOUNDED, {}))


async def streams_only(redis: Redis, events: pd.DataFrame) -> None:
    """Run the writer's batches without sums: what is left are events and the table of names."""
    names, columns, script = Names(), Columns.of(events), redis.register_script(link._SCRIPT)
    for seq, start in enumerate(range(0, len(events), 5_000), 1):
        part = columns.rows(slice(start, start + 5_000))
        keys, argument = batch.pack(part, seq, "bench", {None: names}, UNBOUNDED)[None]
        *head, vwaps, candles, sketches, uniques = msgpack.unpackb(argument, strict_map_key=False, raw=True)
        none = [[vwaps[0], *[[]] * 5], candles[:1], [*sketches[:2], *[[]] * 3], [*uniques[:2], []]]
        await script(keys=keys, args=[msgpack.packb([*head, *none], use_bin_type=False)])


async def bytes_each(events: pd.DataFrame, *works: Work) -> list[float]:
    """Return the bytes that `used_memory` of a fresh server has grown by after each of `works`, an event."""
    with serve(settings=UNBOUNDED) as server:

        async def used() -> int:
            async with server.connect() as watcher:
                # Lua's heap is the scripts' and no event's, and it wanders; Redis counts it as its own from 8 on.
                await watcher.script_flush("SYNC")
                await asyncio.sleep(0.3)
                memory = await watcher.info("memory")
                return int(memory["used_memory"]) - int(memory["mem_clients_normal"])

        async def run(work: Work) -> None:
            async with server.connect() as redis:
                await work(redis)

        await run(lambda redis: streams_only(redis, events.head(100)))  # what a first command leaves behind is there
        await run(lambda redis: _seal(redis, events))
        await run(lambda redis: redis.flushall())
        before, found = await used(), []
        for work in works:
            await run(work)
            found.append((await used() - before) / len(events))
        return found


async def _seal(redis: Redis, events: pd.DataFrame) -> None:
    await seal(redis, now_ms=int(events["ts_ms"].max()) + 10**9, settings=UNBOUNDED, partial=True)


def lzma_floor(events: pd.DataFrame) -> float:
    """Return the bytes an event of the plain columns, times as differences, under lzma at its best."""
    columns = [
        np.diff(events["ts_ms"], prepend=events["ts_ms"].iloc[0]).astype(np.int64),
        events["symbol"].cat.codes.to_numpy(np.uint16),
        events["side"].cat.codes.to_numpy(np.uint8),
        events["price"].to_numpy(),
        events["size"].to_numpy(),
    ]
    plain = b"".join(column.tobytes() for column in columns)
    return len(lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)) / len(events)


async def sizes(name: str, events: pd.DataFrame) -> None:
    hot, sealed = await bytes_each(
        events, lambda redis: streams_only(redis, events), lambda redis: _seal(redis, events)
    )
    [text] = await bytes_each(events, lambda redis: pipelined(redis, text_streams(events), 500))
    record(f"hot_bytes_{name}", hot, "B/event", "the original's text streams", text)
    record(f"sealed_bytes_{name}", sealed, "B/event", "the original's text streams", text)
    if name == "recorder":
        [sets] = await bytes_each(events, lambda redis: pipelined(redis, legacy(events), 500))
        record("legacy_bytes_recorder", sets, "B/event", "liqlab, sealed", sealed)
        record("original_bytes_recorder", text, "B/event", "liqlab, sealed", sealed)
    else:
        record("sealed_vs_lzma", sealed, "B/event", "lzma of the plain columns", lzma_floor(events))


async def rate(server: Server, events: int, work: Work) -> float:
    async with server.connect() as redis:
        await redis.flushall()
        start = time.perf_counter()
        await work(redis)
        return events / (time.perf_counter() - start)


async def bulk(name: str, events: pd.DataFrame, suffix: str) -> None:
    """Compare the full schema, bulk, with the original's pipeline of 50, cryptofeed's pattern and bare XADD."""
    ours_settings = UNBOUNDED.model_copy(
        update={"writer": UNBOUNDED.writer.model_copy(update={"bulk_events": 40_000, "batch_bytes": 4 << 20})}
    )
    pipeline = settings.load(writer={"strategy": "pipeline"}, retention={"events_maxlen": 10**9})

    async def write(redis: Redis, chosen: settings.Settings, part: pd.DataFrame) -> None:
        await Writer(redis, settings=chosen).write_table(part)

    few = events.head(20_000)
    with serve(settings=UNBOUNDED) as server:
        ours, theirs, fed, bare = [], [], [], []
        for _ in range(3):
            ours.append(await rate(server, len(events), lambda redis: write(redis, ours_settings, events)))
            theirs.append(await rate(server, len(few), lambda redis: write(redis, pipeline, few)))
            fed.append(await rate(server, len(few), lambda redis: pipelined(redis, cryptofeed(few), 100)))
            bare.append(redis_benchmark(server))
    print(f"bulk on {name}: {len(events):,} events, {events['symbol'].nunique()} symbols")
    median = float(np.median(ours))
    rivals = [("original_pipeline", "the original's pipeline of 50", theirs), ("cryptofeed_pattern", "cryptofeed", fed)]
    rivals += [("redis_benchmark", "redis-benchmark -P 500, XADD alone", bare)] if all(bare) else []
    for key, rival, found in rivals:
        record(f"bulk_vs_{key}{suffix}", median, "events/s", rival, float(np.median(found)), more_is_better=True)
    if not all(bare):
        print("bulk_vs_redis_benchmark: not run, no redis-benchmark on PATH (apt install redis-tools)")


def redis_benchmark(server: Server) -> float:
    """Return the XADD a second of redis-benchmark, three integer fields as ours; 0 where there is none."""
    program = shutil.which("redis-benchmark")
    if program is None:
        return 0.0
    command = [program, "-s", str(server.socket), "-P", "500", "-n", "300000", "--csv"]
    command += ["XADD", "bench", "*", "c", "1234", "p", "7770123", "z", "14500"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split('","')[-7].strip('"'))


async def live(seconds: float, per_s: int = 10_000) -> None:
    """Offer events at a steady rate; measure from `write` to the acknowledgement."""
    events = list(Event.rows(synth("normal", hours=24, seed=1)))
    took: list[float] = []
    with serve(settings=UNBOUNDED) as server:
        async with server.connect() as redis, Writer(redis, settings=UNBOUNDED) as writer:
            start, cpu = time.perf_counter(), time.process_time()
            for n in range(int(seconds * per_s)):
                due = start + n / per_s
                if n % 20 == 0 and (early := due - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                offered = time.perf_counter()
                done = await writer.write(events[n % len(events)]._replace(ts_ms=1_800_000_000_000 + n // 10))
                done.add_done_callback(lambda _, at=offered: took.append(time.perf_counter() - at))
            await writer.flush()
            elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
        one = []
        async with server.connect() as redis:
            await redis.flushall()
            single = Writer(redis, settings=settings.load(writer={"strategy": "single"}))
            for event in events[:3_000]:
                at = time.perf_counter()
                await original.write(redis, Columns.of_events([event]), single.settings, {})
                one.append(time.perf_counter() - at)
    print(
        f"live: {len(took):,} events in {elapsed:.1f} s ({len(took) / elapsed:,.0f}/s), client at"
        f" {100 * cpu / elapsed:.0f} % of a core; p50 {1e3 * np.median(took):.1f} ms, worst {1e3 * max(took):.0f} ms"
    )
    p99, rival = (float(1e3 * np.quantile(values, 0.99)) for values in (took, one))
    record("live_ack_p99_ms", p99, "ms", "the original's four round trips, unhurried", rival)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--live-seconds", type=float, default=10)
    chosen = parser.parse_args()
    normal = synth("normal", hours=24, seed=0)
    if RECORDING.exists():
        await sizes("recorder", read_feed(RECORDING).events)
    else:
        print("the rows of the recorder's feed: not run, the recorded feeds are not on this machine")
    await sizes("normal", normal)
    await bulk("a dense feed", synth("normal", hours=24, seed=0, symbols=10), "")
    await bulk("the normal day", normal, "_normal")
    await live(chosen.live_seconds)


if __name__ == "__main__":
    asyncio.run(main())
