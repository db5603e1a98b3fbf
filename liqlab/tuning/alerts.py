"""What retention does to thresholds and alerts, without a server: the detector over a whole feed at once.

`liqlab.fidelity` plays a feed through the real system instead. This is the same detector in numpy, on the sketches'
windows: whole buckets, and of the first one as much as is likely to lie in the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from liqlab.detector import large, volumes
from liqlab.events import SIDES, run_starts
from liqlab.fidelity import Fidelity, compare
from liqlab.quantiles import represented
from liqlab.settings import Settings
from liqlab.sizing import Prepared
from liqlab.tuning.ranges import Floats, Ints, RangeQuantiles

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
    """

    times: Ints
    errors: Floats
    fidelity: Fidelity

    @property
    def error_pct(self) -> float:
        """How far a threshold is off, per cent, in 95 of 100 cases; NaN where none was asked for."""
        known = np.abs(self.errors[np.isfinite(self.errors)])
        return float(np.percentile(known, _CERTAIN, method="inverted_cdf")) if len(known) else float("nan")

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
        `detector` and `retention` are read.
    window_s : int
        Of which trailing window thresholds should be; exact history has it whole, and every value of it.
    """
    detector, retention = settings.detector.model_dump_json(), settings.retention
    window = retention.percentile_window_s, retention.percentile_bucket_s

    def compared() -> Quality:
        asked = prepared.once(("asked", detector), lambda: _Asked(prepared, settings), large=True)
        true = prepared.once(("true", detector, window_s), lambda: asked.thresholds(settings, window_s), large=True)
        found = asked.thresholds(settings)
        errors = np.full(len(true), np.nan)
        known = np.isfinite(true)
        errors[known] = 100 * (found[known] / true[known] - 1)
        errors[np.isinf(errors)] = 100.0  # no threshold where there should be one
        alerts = [asked.alerts(thresholds, settings) for thresholds in (found, true)]
        return Quality(asked.end_ms, errors, compare(*alerts, within_s=retention.cooldown_s))

    return prepared.once(("quality", *window, retention.cooldown_s, detector, window_s), compared)


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
        self._prepared, self._columns = prepared, columns
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
        self._where = symbol * self._span + columns.ts_ms - self._origin

    def _up_to(self, ms: Ints) -> Ints:
        """Return how many events, in the order of symbols, lie before the first one of the symbol after a time."""
        inside = np.clip(ms - self._origin, -1, self._span - 1)
        found: Ints = np.searchsorted(self._where, self.symbol * self._span + inside, side="right").astype(np.int64)
        return found

    def thresholds(self, settings: Settings, exact_s: int | None = None) -> Floats:
        """Return the threshold of each pair, USD, shape (k,); infinite where the window has too few events for one.

        As the sketches have it, or of every value in the last `exact_s` seconds.
        """
        if not len(self.pair):
            return np.empty(0)
        ranges = self._prepared.once("ranges", lambda: RangeQuantiles(self._columns.notional), large=True)
        percentile, retention = settings.detector.percentile, settings.retention
        first_ms = self.end_ms - 1000 * (exact_s or retention.percentile_window_s)
        stop = self._up_to(self.end_ms)
        if exact_s:
            start = middle = self._up_to(first_ms)
            part = np.ones(len(start))
        else:
            bucket_ms, times = 1000 * retention.percentile_bucket_s, self._columns.ts_ms
            begin_ms = (first_ms + 1) // bucket_ms * bucket_ms
            start, middle = self._up_to(begin_ms - 1), np.minimum(self._up_to(begin_ms + bucket_ms - 1), stop)
            opens, closes = times[np.minimum(start, len(times) - 1)], times[np.maximum(middle - 1, 0)] + 1
            part = np.clip((closes - np.maximum(opens, first_ms + 1)) / np.maximum(closes - opens, 1), 0, 1)
        found, weight = ranges.quantiles(start, middle, stop, part, percentile / 100)
        enough = weight * (100 - percentile) >= 100  # else the percentile is the largest of them, or none
        found[~enough] = np.inf
        if not exact_s:
            found[enough] = represented(found[enough])
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
