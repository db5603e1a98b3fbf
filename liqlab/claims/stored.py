"""Events in a server: what `used_memory` grows by, in the document's forms."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import pandas as pd

from liqlab import budget, clock, original
from liqlab.claims.encoded import mean, payloads
from liqlab.claims.verdicts import Bench, Figure, Found
from liqlab.codecs import CODECS, Names
from liqlab.events import Columns
from liqlab.replay import ingest
from liqlab.settings import changed, parse_bytes

Command = tuple[Any, ...]
_PIPELINE: Final = 500
_KEYS: Final = 10_000
_DAY: Final = 144_000  # events, in the document's own day
_MIB: Final = 1 << 20
DENSE: Final = "only the ten busiest symbols are stored"


async def send(bench: Bench, commands: Iterable[Command]) -> None:
    """Send commands in pipelines."""
    pipe = bench.redis.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command(*command)
        if len(pipe.command_stack) >= _PIPELINE:
            await pipe.execute()
    await pipe.execute()


async def grown(bench: Bench, commands: Iterable[Command], *, keep: bool = False) -> float:
    """Return the bytes that `used_memory` has grown by after some commands, on an empty server unless `keep`."""
    if not keep:
        await bench.redis.flushall()
    before = await used(bench)
    await send(bench, commands)
    return await used(bench) - before


async def used(bench: Bench) -> int:
    """Return `used_memory` without what clients take, once nothing is being freed or resized."""
    await asyncio.sleep(0.15)
    memory = await bench.redis.info("memory")
    return int(memory["used_memory"]) - int(memory["mem_clients_normal"])


def sorted_set(events: pd.DataFrame) -> Iterator[Command]:
    """Yield the form that the document begins with: a sorted set of JSON a symbol."""
    rows = zip(events["symbol"], events["ts_ms"], payloads(events, "json"), strict=True)
    return (("ZADD", f"liquidations:{symbol}", ms / 1000, member) for symbol, ms, member in rows)


def text_streams(bench: Bench, events: pd.DataFrame) -> Iterator[Command]:
    """Yield the document's XADD, without its three other commands."""
    unbounded = changed(bench.settings, {"retention.events_maxlen": 10**9})
    return (commands[0] for commands in original.commands(Columns.of(events), unbounded, {}))


async def forms(bench: Bench) -> Mapping[str, Figure]:
    """Measure sorted sets of JSON against text streams, bytes an event, of all symbols and of the busiest."""
    found: dict[str, tuple[float, float]] = {}
    rest: dict[str, tuple[float, float]] = {}
    for name in ("events", "dense"):
        events: pd.DataFrame = getattr(bench, name)
        sets = await grown(bench, sorted_set(events)) / len(events)
        streams = await grown(bench, text_streams(bench, events)) / len(events)
        texts = CODECS["fields"].encode(Columns.of(events), Names(), own=True)
        values = float(np.mean([sum(map(len, row)) for row in texts]))
        found[name] = sets, streams
        rest[name] = sets - mean(payloads(events, "json")), streams - values
    set_rest, stream_rest = rest["events"]
    dense_set_rest, dense_stream_rest = rest["dense"]
    sets, streams = found["events"]
    dense_sets, dense_streams = found["dense"]
    limit = 0.75 * int(str(parse_bytes("256mb")))
    return {
        "set": Found(sets, dense_sets, DENSE),
        "set_overhead": Found(set_rest, dense_set_rest, DENSE),
        "stream": Found(streams, dense_streams, DENSE),
        "stream_overhead": Found(stream_rest, dense_stream_rest, DENSE),
        "overhead_less": Found(
            100 * (1 - stream_rest / set_rest), 100 * (1 - dense_stream_rest / dense_set_rest), DENSE
        ),
        "overhead_saved": Found(set_rest - stream_rest, dense_set_rest - dense_stream_rest, DENSE),
        "less": Found(100 * (1 - streams / sets), 100 * (1 - dense_streams / dense_sets), DENSE),
        "room": limit / _MIB,
        "capacity": Found(limit / sets, limit / dense_sets, DENSE),
        "day": Found(_DAY * sets / 1e6, _DAY * dense_sets / 1e6, DENSE),
    }


async def keys(bench: Bench) -> Mapping[str, Figure]:
    """Measure what a key and its TTL take beside a value that takes nothing."""
    names = [f"liq:{n:07}" for n in range(_KEYS)]
    plain = await grown(bench, (("SET", name, 1) for name in names))
    expiring = await grown(bench, (("EXPIRE", name, 3_600) for name in names), keep=True)
    return {"key": plain / _KEYS, "ttl": expiring / _KEYS}


async def peaks(bench: Bench) -> Mapping[str, Figure]:
    """Count the busiest minute, quarter and hour of the feed; store the latter two as sorted sets of JSON."""
    times = bench.events["ts_ms"].to_numpy()
    hours = max(float(np.ptp(times)) / clock.HOUR_MS, 1e-9)
    found: dict[str, Figure] = {}
    for name, minutes in (("minute", 1), ("quarter", 15), ("hour", 60)):
        first = np.searchsorted(times, times - minutes * clock.MINUTE_MS, side="right")
        counts = np.arange(1, len(times) + 1) - first
        last = int(counts.argmax())
        found[name] = float(counts[last])
        if minutes > 1:
            part = bench.events.iloc[first[last] : last + 1]
            found[f"{name}_kb"] = await grown(bench, sorted_set(part)) / 1e3
    return {**found, "per_minute": len(times) / hours / 60, "per_day": 24 * len(times) / hours}


async def vwaps(bench: Bench) -> Mapping[str, Figure]:
    """Measure the VWAP of every symbol as a hash and as JSON."""
    totals = bench.events.groupby("symbol", observed=True).agg(
        price_sum=("notional", "sum"), volume_sum=("size", "sum"), count=("size", "size"), last_update=("ts_ms", "last")
    )
    rows = {str(name): values for name, values in totals.astype(object).to_dict("index").items()}
    hashes = await grown(
        bench, (("HSET", f"vwap:{name}", *(x for pair in row.items() for x in pair)) for name, row in rows.items())
    )
    texts = await grown(bench, (("SET", f"vwap:{name}", json.dumps(row)) for name, row in rows.items()))
    return {"less": 100 * (1 - hashes / texts)}


async def candles(bench: Bench) -> Mapping[str, Figure]:
    """Measure the candles of a minute, as hashes, against the text streams that they would stand for."""
    less = []
    hashes = changed(bench.settings, {"writer.candles": "hash"})
    for name in ("events", "dense"):
        events: pd.DataFrame = getattr(bench, name)
        await bench.redis.flushall()
        await ingest(events, bench.redis, settings=hashes, expire=False, sealing=False)
        measured = await budget.measure(bench.redis, settings=hashes, limit=1_000)
        stream = await bench.value(forms, "stream") if name == "events" else (await _dense_stream(bench))
        less.append(100 * (1 - float(measured.families["bytes"]["candle"]) / (stream * len(events))))
    return {"less": Found(less[0], less[1], DENSE)}


async def _dense_stream(bench: Bench) -> float:
    found = (await bench.figures(forms))["stream"]
    assert isinstance(found, Found)
    assert found.elsewhere is not None
    return found.elsewhere


async def limits(bench: Bench) -> Mapping[str, Figure]:
    """Add 12,000 entries to a stream, trimmed on the way as the document does, then harder."""
    most = 0
    for n in range(0, 12_000, 100):
        row = ("s", "s", "z", "50000", "p", "42150.5", "e", "bin")
        await send(bench, (("XADD", "liq:X", "MAXLEN", "~", 10_000, f"{n + i + 1}-0", *row) for i in range(100)))
        most = max(most, int(await bench.redis.xlen("liq:X")))
    await bench.redis.xtrim("liq:X", maxlen=1_000, approximate=True)
    left = float(await bench.redis.xlen("liq:X"))
    return {"most": float(most), "over": 100 * (most / 10_000 - 1), "trimmed": left}
