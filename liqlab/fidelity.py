"""What retention costs in alerts: those of a run beside those of a detector that forgets nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from redis.asyncio import Redis

from liqlab.cleanup import Cleaner
from liqlab.detector import Detector, backtest
from liqlab.feeds import Feed
from liqlab.percentiles import METHODS
from liqlab.replay import Progress, ingest
from liqlab.settings import Settings, load

_FIGURES: Final = ("ts_ms", "notional", "threshold", "rank")
_COLUMNS: Final = [
    *("symbol", "side", "what", "delay_s"),
    *(f"{name}_{whose}" for name in _FIGURES for whose in ("true", "found")),
]


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
