"""Ways to keep percentiles side by side, on the symbols of a feed: error, bytes, and the time of a question."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import pandas as pd
from redis.asyncio import Redis

from liqlab import clock, schema
from liqlab.events import Columns, EventError, check, run_starts
from liqlab.percentiles import METHODS, TDigest, Unlimited
from liqlab.replay import Progress
from liqlab.server import capabilities
from liqlab.settings import Settings, load

_COMPARED: Final = [
    *("method", "biased", "symbol", "events", "dollar_error_pct", "rank_error_points", "bytes", "query_us"),
]
_ASKED: Final = 20  # times, for the mean time of a query


async def methods_compared(
    events: pd.DataFrame,
    redis: Redis,
    *,
    qs: Sequence[float] = (0.8, 0.85, 0.9, 0.95, 0.99),
    methods: Iterable[str] | None = None,
    symbols: Iterable[str] | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Keep the notionals of some symbols by each method in turn, minute by minute, and ask each at the feed's end.

    Parameters
    ----------
    events : pandas.DataFrame
        An event table; only the events of `symbols` are added.
    redis : redis.asyncio.Redis
        A private server without keys: what a method kept of these symbols is removed before the next one's turn.
    qs : sequence of float
        The quantiles, 0 to 1, of the trailing `retention.percentile_window_s`.
    methods : iterable of str, optional
        Names in `liqlab.percentiles.METHODS`; all that Redis keeps when absent. Without TDIGEST, `tdigest` is left out.
    symbols : iterable of str, optional
        The busiest, and the one that is nearest to an event an hour, when absent.
    settings : Settings, optional
        `liqlab.settings.load()` when absent.
    progress : callable, optional
        Called with (events added, events to add), where each counts once a method.

    Returns
    -------
    pandas.DataFrame
        A row a method and symbol: method, biased, symbol, events (in the window), dollar_error_pct (the worst of `qs`),
        rank_error_points (the worst distance of a q from the ranks that its answer has, in per cent of the events: one
        of few events is many points), bytes (by MEMORY USAGE) and query_us (of the server's own time, for all of `qs`).

    Raises
    ------
    EventError
        The feed has no event, or none of a symbol.
    """
    settings, counts = settings or load(), check(events)["symbol"].value_counts()
    hours = max(float(np.ptp(events["ts_ms"])) / clock.HOUR_MS, 1.0) if len(events) else 1.0
    counts = counts[counts > 0]
    usual = [counts.index[0], (counts - hours).abs().idxmin()] if len(counts) else []
    chosen = list(dict.fromkeys(usual if symbols is None else symbols))
    if not chosen:
        raise EventError("the feed holds no event; `liqlab feeds inspect` says why")
    if absent := [symbol for symbol in chosen if symbol not in counts]:
        raise EventError(f"no events of {', '.join(absent)} to compare methods by; name symbols that the feed has")
    names = [name for name, kind in METHODS.items() if kind is not Unlimited] if methods is None else list(methods)
    if not (await capabilities(redis)).tdigest:
        names = [name for name in names if name != TDigest.name]
    columns, truth, rows = Columns.of(events[events["symbol"].isin(chosen)]), Unlimited(settings=settings), []
    await truth.add(columns)
    minutes = [*run_starts(columns.ts_ms // clock.MINUTE_MS).tolist(), len(columns)]
    for turn, name in enumerate(names):
        method = METHODS[name](redis, settings=settings)
        for start, stop in pairwise(minutes):
            await method.add(columns.rows(slice(start, stop)))
            if progress:
                progress(turn * len(columns) + stop, len(names) * len(columns))
        for symbol in chosen:
            end_ms, begun_us = int(events["ts_ms"].iloc[-1]), await _server_us(redis)
            for _ in range(_ASKED):
                answers = await method.quantiles(symbol, qs, end_ms=end_ms)
            query_us = (await _server_us(redis) - begun_us) / _ASKED
            true = await truth.distribution(symbol, end_ms=end_ms)
            ranks = [np.searchsorted(true.low, answers, side) / max(len(true.low), 1) for side in ("left", "right")]
            dollars = 100 * float(np.max(np.abs(answers / true.quantiles(qs) - 1)))
            points = 100 * float(np.max([ranks[0] - qs, qs - ranks[1], np.zeros(len(qs))]))
            figures = (len(true.low), dollars, points, await method.memory(symbol), query_us)
            rows.append((name, method.biased, symbol, *figures))
            family, shard = schema.BY_NAME, schema.shard_of(symbol, settings.shards)
            pattern = f"{schema.literal(family['percentile'].head(symbol, shard=shard))}*"
            kept = [key async for key in redis.scan_iter(match=pattern, count=1_000)]
            await redis.unlink(family["sketch"].key(symbol, shard=shard), *kept)
    return pd.DataFrame(rows, columns=_COMPARED)


async def _server_us(redis: Redis) -> float:
    """Return the time that the server has spent on commands, but for those that ask for it."""
    spent = await redis.info("commandstats")
    return float(sum(one["usec"] for name, one in spent.items() if name != "cmdstat_info"))
