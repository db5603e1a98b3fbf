"""What retention does to thresholds and alerts, without a server: the detector over a whole feed at once.

`liqlab.fidelity` plays a feed through the real system instead. This is the same detector in numpy, on what
`liqlab.tuning.kept` says that a window is known to hold.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from liqlab.detector import large, volumes
from liqlab.events import SIDES, run_starts
from liqlab.fidelity import Fidelity, compare
from liqlab.percentiles import METHODS
from liqlab.settings import Settings
from liqlab.sizing import Prepared
from liqlab.tuning.kept import Windows
from liqlab.tuning.ranges import Floats, Ints

_CERTAIN: Final = 95  # per cent of the thresholds that are within `Quality.error_pct`


@dataclass(frozen=True)
class Quality:
    """Thresholds and alerts under settings, beside those of exact history with the window that is wanted.

    Attributes
    ----------
    times : array of int64, shape (k,)
        When a threshold was asked for, ms since the epoch; not in order.
    errors : array of float64, shape (k,)
        How far each was off, per cent; NaN where there is none in exact history.
    fidelity : Fidelity
        The alerts.
    error_pct : float
        How far a threshold is off, per cent, in 95 of 100 cases; NaN where none was asked for.
    """

    times: Ints
    errors: Floats
    fidelity: Fidelity
    error_pct: float

    def through_time(self, step_ms: int = 3_600_000) -> pd.DataFrame:
        """Return of each step of time ts_ms, and the median and the 95th percentile of the errors' sizes, per cent."""
        known = np.isfinite(self.errors)
        errors = pd.Series(np.abs(self.errors[known])).groupby(self.times[known] // step_ms * step_ms)
        table = pd.DataFrame({"median_pct": errors.median(), "error_pct": errors.quantile(_CERTAIN / 100)})
        return table.rename_axis("ts_ms").reset_index()


def quality(prepared: Prepared, settings: Settings, window_s: int) -> Quality:
    """Compare the thresholds and alerts of settings with those of exact history.

    Parameters
    ----------
    prepared : Prepared
        From `liqlab.sizing.prepare`.
    settings : Settings
        `detector` and `retention` are read; `predict` says which methods are none of its own.
    window_s : int
        Of which trailing window thresholds should be; exact history has it whole, and every value of it.
    """
    return prepared.once(quality_key(settings, window_s), lambda: _compared(prepared, settings, window_s))


def _compared(prepared: Prepared, settings: Settings, window_s: int) -> Quality:
    """Return what `quality` remembers."""
    detector, cooldown_s = _asks(settings), settings.retention.cooldown_s
    asked = prepared.once(("asked", detector), lambda: _Asked(prepared, settings), large=True)
    true = prepared.once(("true", detector, window_s), lambda: asked.thresholds(settings, window_s), large=True)
    found = asked.thresholds(settings)
    errors = np.full(len(true), np.nan)
    known = np.isfinite(true)
    errors[known] = 100 * (found[known] / true[known] - 1)
    errors[np.isinf(errors)] = 100.0  # no threshold where there should be one
    true_alerts = prepared.once(("true alerts", detector, window_s, cooldown_s), lambda: asked.alerts(true, settings))
    alerts = compare(asked.alerts(found, settings), true_alerts, within_s=cooldown_s)
    off = np.abs(errors[known])
    error_pct = float(np.percentile(off, _CERTAIN, method="inverted_cdf")) if len(off) else float("nan")
    return Quality(asked.end_ms, errors, alerts, error_pct)


def quality_key(settings: Settings, window_s: int) -> tuple[Hashable, ...]:
    """Return what `quality` depends on, of one feed; its first two are what it shares most of its work by."""
    retention, method = settings.retention, settings.detector.method
    bucket_s = 0 if method == "exact" else retention.percentile_bucket_s  # which says nothing there
    kept = (method, METHODS[method].size(settings), bucket_s)
    return ("quality", kept, retention.percentile_window_s, retention.cooldown_s, _asks(settings), window_s)


def _asks(settings: Settings) -> str:
    """Return what decides which thresholds a detector asks for."""
    return settings.detector.model_dump_json(exclude={"method", "size"})


class _Asked:
    """What a detector asks for in a feed: of each symbol, once in `detector.refresh_s` with an event that is likely.

    Attributes
    ----------
    pair : array of int64, shape (k,)
        Symbol and time in one number, ascending.
    symbol, end_ms : array of int64, shape (k,)
        The two.
    """

    def __init__(self, prepared: Prepared, settings: Settings) -> None:
        columns, detector = prepared.columns.rows(prepared.order), settings.detector
        self._columns = columns
        volume = volumes(prepared.columns, 1000 * detector.volume_s)[prepared.order]
        self._likely = large(columns, volume, detector)
        symbol = columns.symbol.astype(np.int64)
        every_ms = 1000 * detector.refresh_s
        number = columns.ts_ms[self._likely] // every_ms
        first = int(number.min()) if len(number) else 0
        span = int(number.max()) - first + 1 if len(number) else 1
        self.pair, self._place = np.unique(symbol[self._likely] * span + number - first, return_inverse=True)
        self.symbol, self.end_ms = self.pair // span, (self.pair % span + first) * every_ms - 1
        self._origin = int(columns.ts_ms.min())
        self._span = int(columns.ts_ms.max()) - self._origin + 2
        self._windows = Windows(prepared, columns, self.symbol, self.end_ms)

    def thresholds(self, settings: Settings, exact_s: int | None = None) -> Floats:
        """Return the threshold of each pair, USD, shape (k,); infinite where the window has too few events for one.

        As `detector.method` has it, or of every value in the last `exact_s` seconds.
        """
        if not len(self.pair):
            return np.empty(0)
        percentile, window_s = settings.detector.percentile, exact_s or settings.retention.percentile_window_s
        found, weight = self._windows.quantiles(settings, window_s, percentile / 100, exact=exact_s is not None)
        found[weight * (100 - percentile) < 100] = np.inf  # the percentile is the largest of them, or none
        return found

    def alerts(self, thresholds: Floats, settings: Settings) -> pd.DataFrame:
        """Return what the detector would raise: symbol, side, ts_ms, notional (USD) and threshold (USD)."""
        columns = self._columns
        threshold = thresholds[self._place]
        over = columns.notional[self._likely] >= threshold
        rows, threshold = self._likely[over], threshold[over]
        group = columns.symbol[rows].astype(np.int64) * len(SIDES) + columns.side[rows]
        order = np.argsort(group, kind="stable")
        rows, group, threshold = rows[order], group[order], threshold[order]
        ms = columns.ts_ms[rows]
        span = self._span + 1000 * settings.retention.cooldown_s
        place = group * span + ms - self._origin
        after = np.searchsorted(place, place + 1000 * settings.retention.cooldown_s).tolist()
        kept, starts = [], run_starts(group).tolist()
        for at, end in zip(starts, [*starts[1:], len(rows)][: len(starts)], strict=True):
            while at < end:
                kept.append(at)
                at = after[at]
        chosen = rows[kept]
        table = pd.DataFrame(
            {
                "symbol": np.array(columns.symbols, object)[columns.symbol[chosen]],
                "side": np.array(SIDES, object)[columns.side[chosen]],
                "ts_ms": columns.ts_ms[chosen],
                "notional": columns.notional[chosen],
                "threshold": threshold[kept],
            }
        )
        return table.sort_values(["ts_ms", "symbol", "side"], kind="stable", ignore_index=True)
