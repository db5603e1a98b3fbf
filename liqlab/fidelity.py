"""Play a feed through the whole system on the feed's clock, and say what its settings cost.

Memory by family, percentiles beside those of every value, alerts beside those of a detector that forgets nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, get_args

import numpy as np
import pandas as pd
from redis.asyncio import Redis

from liqlab import clock
from liqlab.budget import measure, records
from liqlab.cleanup import Cleaner
from liqlab.cluster import servers
from liqlab.detector import Detector, backtest
from liqlab.events import Columns, check
from liqlab.feeds import Feed
from liqlab.percentiles import METHODS, Method, Unlimited
from liqlab.replay import Ingested, Progress, ingest
from liqlab.settings import Settings, changed, load

if TYPE_CHECKING:
    import plotly.graph_objects as go

_FIGURES: Final = ("ts_ms", "notional", "threshold", "rank")
_MOMENTS: Final = 24  # at which percentiles are compared
_BUSIEST: Final = 4  # symbols whose percentiles are
_ALL: Final = 1_000_000  # keys of a family that are measured: a sample depends on the order of a scan
_SETTLE_S, _LOOKS = 0.25, 20  # longer than the server needs from one look at its tables to the next; looks


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

    @property
    def by_hour(self) -> pd.DataFrame:
        """How many alerts are same, missed and extra; index: ts_ms, the begin of an hour that has some."""
        hour = self.pairs["ts_ms_true"].fillna(self.pairs["ts_ms_found"]).astype("int64") // clock.HOUR_MS
        counts = pd.crosstab(hour * clock.HOUR_MS, self.pairs["what"]).rename_axis("ts_ms")
        return counts.reindex(columns=["same", "missed", "extra"], fill_value=0)

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
    both = pd.concat([true, found], ignore_index=True)
    group, ms = both.groupby(["symbol", "side"]).ngroup().to_numpy(), both["ts_ms"].to_numpy(np.int64)
    within_ms = 1000 * within_s
    span = int(np.ptp(ms)) + int(within_ms) + 2 if len(ms) else 0
    place = group * span + ms  # those of one group are too far away from those of others
    order = np.argsort(group, kind="stable")
    ours, theirs = order[order < len(true)], order[order >= len(true)]
    rows = np.array(_paired(place[ours].tolist(), place[theirs].tolist(), within_ms), np.int64).reshape(-1, 2)
    true_at, found_at = (np.append(which, -1)[at] for which, at in zip((ours, theirs), rows.T, strict=True))

    pairs = both[["symbol", "side"]].iloc[np.where(true_at >= 0, true_at, found_at)].reset_index(drop=True)
    pairs["what"] = np.where(found_at < 0, "missed", np.where(true_at < 0, "extra", "same"))
    for name in _FIGURES:
        for whose, at in (("true", true_at), ("found", found_at)):
            pairs[f"{name}_{whose}"] = both[name].reindex(at).to_numpy() if name in both else np.nan
    pairs.insert(3, "delay_s", (pairs["ts_ms_found"] - pairs["ts_ms_true"]) / 1000)
    by_time = pairs["ts_ms_true"].fillna(pairs["ts_ms_found"]).argsort(kind="stable")
    return Fidelity(found, true, pairs.iloc[by_time].reset_index(drop=True))


def _paired(true: list[int], found: list[int], within: float) -> list[tuple[int, int]]:
    """Return of each pair which ones of both, ascending places, it is of; -1 where there is only one."""
    pairs, after = list[tuple[int, int]](), 0
    for at, place in enumerate(true):
        while after < len(found) and found[after] <= place - within:
            pairs.append((-1, after))
            after += 1
        same = after < len(found) and found[after] < place + within
        pairs.append((at, after if same else -1))
        after += same
    return pairs + [(-1, at) for at in range(after, len(found))]


async def fidelity(
    feed: Feed | pd.DataFrame,
    redis: Redis,
    *,
    method: str | None = None,
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
    method : str, optional
        A name in `liqlab.percentiles.METHODS`; `detector.method` when absent.
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
    settings, found = _chosen(redis, settings, method)
    return (await _played(feed, redis, settings, found, cleaner, progress))[1]


def _chosen(redis: Redis, settings: Settings | None, method: str | None) -> tuple[Settings, Method]:
    """Return settings with a method of percentiles, and the method."""
    settings = settings or load()
    if method in get_args(type(settings.detector).model_fields["method"].annotation):
        settings = changed(settings, {"detector.method": method})
    return settings, METHODS[method or settings.detector.method](redis, settings=settings)


async def _played(
    feed: Feed | pd.DataFrame,
    redis: Redis,
    settings: Settings,
    method: Method,
    cleaner: Cleaner | None,
    progress: Progress | None,
    moments: Sequence[int] = (),
    visit: Callable[[int], Awaitable[None]] | None = None,
    true: pd.DataFrame | None = None,
) -> tuple[Ingested, Fidelity]:
    events, times = feed.events if isinstance(feed, Feed) else feed, 2 if true is None else 1

    def after(begun: int) -> Progress | None:
        return progress and (lambda done, total: progress(begun + done, times * total))

    done = await ingest(
        feed,
        redis,
        settings=settings,
        cleaner=cleaner,
        detector=Detector(redis, method=method, settings=settings),
        moments=moments,
        visit=visit,
        progress=after(0),
    )
    if true is None:
        true = await backtest(events, Detector(None, settings=settings), progress=after(len(events)))
    return done, compare(done.alerts, true, within_s=settings.retention.cooldown_s)


@dataclass(frozen=True)
class Replayed:
    """What a feed left behind on a real server, and what was known on the way.

    Attributes
    ----------
    ingested : Ingested
        What was written, sealed, trimmed, expired and evicted.
    table : pandas.DataFrame
        At the end, by family: share, keys, members, bytes, and of its share share_bytes, budget_bytes and over.
    fidelity : Fidelity
        Alerts beside the true ones.
    errors : pandas.DataFrame
        Percentiles of the trailing window, of the busiest symbols at up to 24 moments: ts_ms, symbol, percentile, found
        (USD, as the server's sketches say), exact (as every value says) and error_pct.
    maxmemory : int
        Bytes.
    """

    ingested: Ingested
    table: pd.DataFrame
    fidelity: Fidelity
    errors: pd.DataFrame
    maxmemory: int

    @property
    def timeline(self) -> pd.DataFrame:
        """Through the feed's time: ts_ms, events (so far), used_memory (bytes), keys."""
        return self.ingested.timeline

    @property
    def peak_bytes(self) -> int:
        """The most that `used_memory` was at a point of the timeline."""
        return int(self.timeline["used_memory"].max())

    @property
    def fits(self) -> bool:
        """Whether nothing was evicted, and memory stayed below what the server may use."""
        return self.ingested.evicted == 0 and self.peak_bytes <= self.maxmemory

    @property
    def lost(self) -> dict[str, int]:
        """The parts of `events_lost`.

        ``trimmed`` by MAXLEN, or to the bytes that cleanup allows; ``expired`` with their stream or block; ``evicted``
        is the rest: what went with an evicted key, and what is not counted (what `pipeline` and `single` trim).
        """
        done = self.ingested
        parts = {"trimmed": done.trimmed + done.cleaned, "expired": done.aged}
        return parts | {"evicted": done.events - done.held - sum(parts.values())}

    @property
    def events_lost(self) -> int:
        """Events that were written and that Redis does not hold any more, neither hot nor in a block.

        No archive has them: of what leaves Redis, liqlab keeps candles, not events.
        """
        return self.ingested.events - self.ingested.held

    @property
    def alerts_over_time(self) -> pd.DataFrame:
        """By hour: ts_ms (its begin), true, found, same, precision and recall (0 to 1; NaN where there is none)."""
        what, line = self.fidelity.by_hour, self.timeline["ts_ms"] // clock.HOUR_MS * clock.HOUR_MS
        ends = [*line.iloc[[0, -1]], *what.index]
        what = what.reindex(range(min(ends), max(ends) + 1, clock.HOUR_MS), fill_value=0)
        columns = {"true": what["same"] + what["missed"], "found": what["same"] + what["extra"], "same": what["same"]}
        table = pd.DataFrame(columns).rename_axis("ts_ms").reset_index()
        for name, whole in (("precision", "found"), ("recall", "true")):
            table[name] = table["same"] / table[whole].where(table[whole] > 0)
        return table

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON; without the timeline and the single alerts."""
        return {
            "ingest": self.ingested.as_dict(),
            "maxmemory": self.maxmemory,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "events_lost": self.events_lost,
            "lost": self.lost,
            "table": records(self.table.reset_index()),
            "fidelity": self.fidelity.as_dict(),
            "errors": records(self.errors),
            "alerts_over_time": records(self.alerts_over_time),
        }

    def plot(self) -> go.Figure:
        """Return `liqlab.plots.replayed` of this: memory, percentile error and alerts through the feed's time."""
        from liqlab import plots  # the one look upward, for who holds a result in a notebook

        return plots.replayed(self)


async def replay(
    feed: Feed | pd.DataFrame,
    redis: Redis,
    *,
    settings: Settings | None = None,
    method: str | None = None,
    percentiles: Sequence[float] = (95.0,),
    cleaner: bool = True,
    true: pd.DataFrame | None = None,
    progress: Progress | None = None,
) -> Replayed:
    """Play a feed through the real system, all of it on the feed's clock, and compare it with unlimited history.

    Writing, expiry, sealing, cleanup and the detector follow event time, as fast as the server goes. Two runs on fresh
    servers give the same tables, as long as memory stays out of the tiers of pressure: those follow `used_memory` as
    the server reports it, which no two processes have alike.

    Parameters
    ----------
    feed : Feed or pandas.DataFrame
        From `liqlab.read_feed`, or an event table.
    redis : redis.asyncio.Redis
        A private server without keys, from ``liqlab.serve(settings=settings)`` for the limits of `settings.server`.
    settings : Settings, optional
        `liqlab.settings.load()` when absent.
    method : str, optional
        Where percentiles come from: a name in `liqlab.percentiles.METHODS`; `detector.method` when absent.
    percentiles : sequence of float
        Compared with the exact ones, 0 to 100.
    cleaner : bool
        Whether cleanup runs its schedule.
    true : pandas.DataFrame, optional
        The alerts of unlimited history, where they are known; from `liqlab.detector.backtest` when absent.
    progress : callable, optional
        Called with (events done, events in all), where each counts twice: played, and looked at with unlimited history,
        unless `true` is given.

    Raises
    ------
    EventError, WriterError
        As `liqlab.ingest`.
    """
    settings, kept = _chosen(redis, settings, method)
    truth = Unlimited(settings=settings)
    events = check(feed.events if isinstance(feed, Feed) else feed)
    symbols = [str(name) for name in events["symbol"].value_counts().index[:_BUSIEST] if len(events)]
    await truth.add(Columns.of(events[events["symbol"].isin(symbols)]))
    qs, rows = np.array(percentiles, np.float64) / 100, list[tuple[int, str, float, float, float]]()

    async def visit(ms: int) -> None:
        for symbol in symbols:
            found, exact = [await one.quantiles(symbol, qs, end_ms=ms - 1) for one in (kept, truth)]
            rows.extend(
                (ms, symbol, *figures) for figures in zip(percentiles, found.tolist(), exact.tolist(), strict=True)
            )

    rounds = Cleaner(redis, settings=settings) if cleaner else None
    done, alerts = await _played(feed, redis, settings, kept, rounds, progress, _moments(events), visit, true)
    await _settled(redis)
    measured = await measure(redis, settings=settings, limit=_ALL)
    table = measured.families[["share", "keys", "members", "bytes"]].copy()
    for name, column in (("share_bytes", "bytes"), ("budget_bytes", "budget_bytes")):
        table[name] = table["share"].map(measured.table[column])
    table["over"] = table["share"].isin(measured.over)
    errors = pd.DataFrame(rows, columns=["ts_ms", "symbol", "percentile", "found", "exact"])
    errors["error_pct"] = 100 * (errors["found"] / errors["exact"] - 1)
    return Replayed(done, table, alerts, errors, measured.maxmemory)


def _moments(events: pd.DataFrame) -> list[int]:
    """Return whole minutes at about the same distance, an hour in a day's feed, the last behind the feed's end."""
    if not len(events):
        return []
    first, last = (int(events["ts_ms"].iloc[at]) // clock.MINUTE_MS for at in (0, -1))
    every = -(-(last + 1 - first) // _MOMENTS)
    return [minute * clock.MINUTE_MS for minute in range(last + 1, first, -every)][::-1]


async def _settled(redis: Redis) -> None:
    """Wait until each server, in the background, has resized its tables of keys, whose bytes count as the keys'."""
    before: Any = None
    for _ in range(_LOOKS):
        stats = [await server.memory_stats() for server in await servers(redis)]
        now = [{name: value for name, value in one.items() if "db." in str(name)} for one in stats]
        if now == before:
            break
        before = now
        await asyncio.sleep(_SETTLE_S)
