"""Percentiles and counts: what the document's structures take, and how far off they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from liqlab import budget, clock, schema
from liqlab.claims.stored import forms
from liqlab.claims.verdicts import Bench, Figure, Found
from liqlab.comparison import methods_compared
from liqlab.events import Columns
from liqlab.percentiles import TopK
from liqlab.server import capabilities

LEVELS: Final = (0.8, 0.85, 0.9, 0.95)
_HOURS: Final = 24
_SETS: Final = 200  # HyperLogLogs, for the spread of their errors
_UNIQUES: Final = 3_000
_MANY: Final = 20_000
_ASKED: Final = 300
_HALF: Final = 50  # the compression at which a t-digest takes about half
_PAGE: Final = 1_000
_NO_MODULE: Final = "this server has no TDIGEST; pip install 'liqlab[tdigest]' and start it with tdigest=True"


async def accuracy(bench: Bench) -> Mapping[str, Figure]:
    """Compare methods at p80 to p95, of the busiest symbol and of a quiet one."""
    names = ("exact", "topk", "tdigest")
    found = await methods_compared(bench.events, bench.redis, qs=LEVELS, methods=names, settings=bench.settings)
    right: dict[str, Figure] = {"tdigest": _NO_MODULE}
    for name, part in found.groupby("method", sort=False):
        busy, quiet = (100 - part["dollar_error_pct"].iloc[[0, -1]]).tolist()
        right[str(name)] = Found(busy, quiet, f"a symbol has few events an hour ({part['symbol'].iloc[-1]})")
    return right


async def buckets(bench: Bench) -> Mapping[str, Figure]:
    """Keep the feed as the document's buckets of 100, one a symbol and hour."""
    method = TopK(bench.redis, settings=bench.settings)
    await method.add(Columns.of(bench.events))
    kept = (await budget.measure(bench.redis, settings=bench.settings, limit=10**6)).families["bytes"]
    busiest = str(bench.events["symbol"].value_counts().index[0])
    head = schema.BY_NAME["percentile"].head(busiest)
    keys = [key.decode() async for key in bench.redis.scan_iter(match=f"{schema.literal(head)}*", count=_PAGE)]
    full = (await budget.sizes(bench.redis, keys)).nlargest(1, "members").iloc[0]
    raw = await bench.value(forms, "set") * len(bench.events)
    return {
        "size": float(full["members"]),
        "k": _HOURS * float(full["members"]),
        "sample": float(full["bytes"]) / float(full["members"]),
        "symbol_kb": _HOURS * float(full["bytes"]) / 1e3,
        "less": 100 * (1 - float(kept["percentile"]) / raw),
    }


async def window(bench: Bench) -> Mapping[str, Figure]:
    """Write 24 hourly buckets whose last events are as old as their hours, with the document's TTL, and ask for all."""
    now_s, key = clock.now_ms() // 1000, schema.BY_NAME["percentile"].key
    names = [key("X", bucket=hour) for hour in range(_HOURS)]
    pipe = bench.redis.pipeline(transaction=False)
    for hour, name in enumerate(names):
        pipe.zadd(name, {"event": 1.0})
        pipe.expireat(name, now_s - 3_600 * hour + 7_200)
    pipe.exists(*names)
    return {"buckets": float((await pipe.execute())[-1])}


async def uniques(bench: Bench) -> Mapping[str, Figure]:
    """Count the feed's symbols, and many made-up ones, in HyperLogLogs; then how far off 200 of them are."""
    names = [str(name) for name in bench.events["symbol"].unique()]
    await bench.redis.pfadd("temp:few", *names)
    await bench.redis.pfadd("temp:many", *(f"S{n}" for n in range(_MANY)))
    few, many = [int(await bench.redis.memory_usage(key, samples=0) or 0) for key in ("temp:few", "temp:many")]
    pipe = bench.redis.pipeline(transaction=False)
    for one in range(_SETS):
        pipe.pfadd(f"temp:{one}", *(f"{one}-{n}" for n in range(_UNIQUES)))
        pipe.pfcount(f"temp:{one}")
    counted = np.array((await pipe.execute())[1::2], float)
    error = 100 * float(np.sqrt(np.mean((counted / _UNIQUES - 1) ** 2)))
    when = f"it counts {_MANY:,} names, not the feed's {len(names):,} symbols"
    return {"kb": Found(few / 1024, many / 1024, when), "error": error}


async def tdigest(bench: Bench) -> Mapping[str, Figure]:
    """Measure a t-digest of the feed: its bytes, and how the time of a question grows with what it has seen."""
    if not (await capabilities(bench.redis)).tdigest:
        return {"kb": _NO_MODULE, "growth": _NO_MODULE}
    values = bench.events["notional"].tolist()
    redis = bench.redis
    for key, compression, added in (
        ("temp:few", 100, values[:200]),
        ("temp:all", 100, values),
        ("temp:half", _HALF, values),
    ):
        await redis.execute_command("TDIGEST.CREATE", key, "COMPRESSION", compression)  # type: ignore[no-untyped-call]
        for at in range(0, len(added), _PAGE):
            await redis.execute_command("TDIGEST.ADD", key, *added[at : at + _PAGE])  # type: ignore[no-untyped-call]
    sizes = [int(await redis.memory_usage(key, samples=0) or 0) / 1024 for key in ("temp:all", "temp:half")]
    took = []
    for key in ("temp:few", "temp:all"):
        await redis.config_resetstat()
        pipe = redis.pipeline(transaction=False)
        for _ in range(_ASKED):
            pipe.execute_command("TDIGEST.QUANTILE", key, *LEVELS)
        await pipe.execute()
        stats: dict[str, Any] = await redis.info("commandstats")
        took.append(float(next(one for name, one in stats.items() if "quantile" in name.lower())["usec_per_call"]))
    return {
        "kb": Found(sizes[0], sizes[1], f"its compression is {_HALF}, not the default of 100"),
        "growth": took[1] / took[0],
    }
