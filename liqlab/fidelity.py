"""What retention costs in alerts: those of a run beside those of a detector that forgets nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pandas as pd
from redis.asyncio import Redis

from liqlab import clock, schema
from liqlab.cleanup import Cleaner
from liqlab.detector import Detector, backtest
from liqlab.events import Columns, EventError, check, run_starts
from liqlab.feeds import Feed
from liqlab.percentiles import METHODS, TDigest, Unlimited
from liqlab.replay import Progress, ingest
from liqlab.server import capabilities
from liqlab.settings import Settings, load

_FIGURES: Final = ("ts_ms", "notional", "threshold", "rank")
_COLUMNS: Final = [
    *("symbol", "side", "what", "delay_s"),
    *(f"{name}_{whose}" for name in _FIGURES for whose in ("true", "found")),
]
_COMPARED: Final = [
    *("method", "biased", "symbol", "events", "dollar_error_pct", "rank_error_points", "bytes", "query_us"),
]
_ASKED: Final = 20  # times, for the mean time of a query


@dataclass(frozen=True)
class Fidelity:
    """Alerts found beside the true ones.

    Two of one symbol and side that are less than a cooldown apart are the same alert, each with at most one.

    Attributes
    ----------
    found, true : pandas.DataFrame
        As `liqlab.detector.table`.
    pairs : pandas.DataFrame
        A row an alert, in time order: symbol, side, what (``same``, ``missed`` or ``extra``), delay_s (seconds that the
        found one came after the true one; NaN where there is only one), and of each of both ts_ms, notional, threshold
        and rank with the suffixes ``_true`` and ``_found``.
    """

    found: pd.DataFrame
    true: pd.DataFrame
    pairs: pd.DataFrame

    def _share(self, other: str) -> float | None:
        same, whole = ((self.pairs["what"].isin(names)).sum() for names in (["same"], ["same", other]))
        return float(same / whole) if whole else None

    @property
    def precision(self) -> float | None:
        """Which part of the found alerts is true, 0 to 1; None where none was found."""
        return self._share("extra")

    @property
    def recall(self) -> float | None:
        """Which part of the true alerts was found, 0 to 1; None where there is none."""
        return self._share("missed")

    @property
    def identical(self) -> int:
        """How many alerts were found at the very event."""
        return int((self.pairs["delay_s"] == 0).sum())

    @property
    def differing(self) -> pd.DataFrame:
        """Those of `pairs` that were missed, are extra, or came at another event."""
        return self.pairs[self.pairs["delay_s"] != 0].reset_index(drop=True)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain numbers, for JSON; delays are of alerts that are the same, s."""
        what, delays = self.pairs["what"].value_counts(), self.pairs["delay_s"].dropna().abs()
        return {
            **{name: int(what.get(name, 0)) for name in ("same", "missed", "extra")},
            "identical": self.identical,
            "precision": self.precision,
            "recall": self.recall,
            "delay_mean_s": float(delays.mean()) if len(delays) else None,
            "delay_worst_s": float(delays.max()) if len(delays) else None,
        }


def compare(found: pd.DataFrame, true: pd.DataFrame, *, within_s: float) -> Fidelity:
    """Pair alerts that are the same.

    Parameters
    ----------
    found, true : pandas.DataFrame
        As `liqlab.detector.table`.
    within_s : float
        Alerts of one symbol and side that are less than this apart are the same: their cooldown.
    """
    rows = []
    theirs = _by_side(found)
    for key, alerts in _by_side(true).items():
        others = theirs.pop(key, [])
        for one in alerts:
            while others and others[0].ts_ms <= one.ts_ms - 1000 * within_s:
                rows.append(_row(key, None, others.pop(0)))
            same = bool(others) and others[0].ts_ms < one.ts_ms + 1000 * within_s
            rows.append(_row(key, one, others.pop(0) if same else None))
        theirs[key] = others
    rows += [_row(key, None, other) for key, others in theirs.items() for other in others]
    pairs = pd.DataFrame(rows, columns=_COLUMNS)
    order = pairs["ts_ms_true"].fillna(pairs["ts_ms_found"]).argsort(kind="stable")
    return Fidelity(found, true, pairs.iloc[order].reset_index(drop=True))


def _by_side(alerts: pd.DataFrame) -> dict[Any, list[Any]]:
    return {key: list(part.itertuples()) for key, part in alerts.groupby(["symbol", "side"])}


def _row(key: tuple[Any, ...], true: Any, found: Any) -> tuple[Any, ...]:
    what = "missed" if found is None else "extra" if true is None else "same"
    delay_s = (found.ts_ms - true.ts_ms) / 1000 if what == "same" else np.nan
    figures = [getattr(one, name, np.nan) for name in _FIGURES for one in (true, found)]
    return (*key, what, delay_s, *figures)


async def fidelity(
    feed: Feed | pd.DataFrame,
    redis: Redis,
    *,
    method: str = "logbins",
    settings: Settings | None = None,
    cleaner: Cleaner | None = None,
    progress: Progress | None = None,
) -> Fidelity:
    """Play a feed through the real system with a detector, and compare its alerts with those of unlimited history.

    Parameters
    ----------
    feed : Feed or pandas.DataFrame
        From `liqlab.read_feed`, or an event table.
    redis : redis.asyncio.Redis
        A server without liqlab's keys.
    method : str
        A name in `liqlab.percentiles.METHODS`.
    settings : Settings, optional
        `liqlab.settings.load()` when absent.
    cleaner : Cleaner, optional
        See `liqlab.ingest`.
    progress : callable, optional
        Called with (events looked at, events in all), where each counts twice.

    Raises
    ------
    EventError, WriterError
        As `liqlab.ingest`.
    """
    settings = settings or load()
    events = feed.events if isinstance(feed, Feed) else feed

    def after(begun: int) -> Progress | None:
        return progress and (lambda done, total: progress(begun + done, 2 * total))

    detector = Detector(redis, method=METHODS[method](redis, settings=settings), settings=settings)
    done = await ingest(feed, redis, settings=settings, cleaner=cleaner, detector=detector, progress=after(0))
    true = await backtest(events, Detector(None, settings=settings), progress=after(len(events)))
    return compare(done.alerts, true, within_s=settings.retention.cooldown_s)


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
            pattern = f"{schema.literal(family['percentile'].head(symbol))}*"
            kept = [key async for key in redis.scan_iter(match=pattern, count=1_000)]
            await redis.unlink(family["sketch"].key(symbol, shard=shard), *kept)
    return pd.DataFrame(rows, columns=_COMPARED)


async def _server_us(redis: Redis) -> float:
    """Return the time that the server has spent on commands, but for those that ask for it."""
    spent = await redis.info("commandstats")
    return float(sum(one["usec"] for name, one in spent.items() if name != "cmdstat_info"))
