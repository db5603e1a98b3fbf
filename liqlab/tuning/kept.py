"""What each way to keep percentiles knows of a symbol's window when a threshold is asked for, without a server."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from liqlab import clock
from liqlab.events import Columns
from liqlab.percentiles import METHODS
from liqlab.quantiles import represented
from liqlab.settings import Settings
from liqlab.sizing import Prepared
from liqlab.sizing.buckets import bucket_starts, largest
from liqlab.tuning.ranges import Floats, Ints, Part, Ranks, WaveletMatrix, quantiles

_BITS: Final = 14  # of a sampled value, which no one needs to know to more than a thousandth

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class _Values:
    """Notionals as codes: what each stands for, USD, ascending; and a matrix of all, in the order of symbols."""

    values: Floats
    codes: NDArray[np.int32]
    bits: int
    matrix: WaveletMatrix


@dataclass(frozen=True)
class _Some:
    """Which events of all in the order of symbols, and a matrix of their codes."""

    which: Ranks
    matrix: WaveletMatrix

    def part(self, cuts: Iterable[tuple[Ints, Floats | float]]) -> Part:
        """Return these of what places among all events cut out."""
        return Part(self.matrix, [(self.which.before(place), times) for place, times in cuts])


@dataclass(frozen=True)
class _Sample:
    """Uniform samples of buckets, of symbols that have some with more: as they are in the end, and as they grow."""

    values: Floats
    kept: _Some
    entered: _Some
    left: _Some


class Windows:
    """The windows of k questions: a symbol each, and the ms up to which events are known.

    Parameters
    ----------
    prepared : Prepared
    columns : Columns
        Its events in the order of symbols.
    symbol, end_ms : array of int64, shape (k,)
    """

    def __init__(self, prepared: Prepared, columns: Columns, symbol: Ints, end_ms: Ints) -> None:
        self._prepared, self._symbol, self._end_ms = prepared, symbol, end_ms
        self._times, self._codes, self._notional = columns.ts_ms, columns.symbol.astype(np.int64), columns.notional
        self._origin = int(columns.ts_ms.min())
        self._span = int(columns.ts_ms.max()) - self._origin + 2
        self._where = self._codes * self._span + columns.ts_ms - self._origin

    def quantiles(self, settings: Settings, window_s: int, q: float, *, exact: bool) -> tuple[Floats, Floats]:
        """Return the quantile of each question's window, USD, and how many values it is of.

        Parameters
        ----------
        settings : Settings
            `detector.method`, `detector.size` and the bucket are read.
        window_s : int
        q : float
            0 to 1.
        exact : bool
            Whether every value of the window is known, whatever the method.
        """
        detector, bucket_s = settings.detector, settings.retention.percentile_bucket_s
        known = self._prepared.once("codes", self._coded, large=True)
        size = METHODS[detector.method].size(settings)
        everything = slice(None)
        if exact or detector.method == "exact":
            return quantiles(known.values, known.bits, [self._whole(known, everything, window_s)], q)
        if size is None:
            found, weight = quantiles(known.values, known.bits, [self._spread(known, window_s, bucket_s)], q)
            there = weight > 0
            found[there] = represented(found[there])
            return found, weight
        busy = self._prepared.once(("busy", size, bucket_s), lambda: self._busy(size, bucket_s))[self._symbol]
        found, weight = np.empty(len(busy)), np.empty(len(busy))
        # A bucket that is not full holds every value: where none is, that is all there is to know.
        for rows, full in ((np.flatnonzero(~busy), False), (np.flatnonzero(busy), True)):
            values, bits = known.values, known.bits
            if detector.method == "topk" and full:
                parts = self._largest(known, rows, window_s, bucket_s, size)
            elif detector.method == "topk":
                parts = [self._whole(known, rows, window_s)]
            else:
                cuts = self._by_bucket(rows, window_s, bucket_s)
                parts = [Part(known.matrix, [(place, times + now) for place, times, now in cuts])]
                if full:
                    values, bits, parts = self._sampled(rows, cuts, bucket_s, size)
            found[rows], weight[rows] = quantiles(values, bits, parts, q)
        return found, weight

    def _up_to(self, ms: Ints, rows: Any = slice(None)) -> Ints:
        """Return how many events, in the order of symbols, lie before the first one of the symbol after a time."""
        inside = np.clip(ms - self._origin, -1, self._span - 1)
        found: Ints = np.searchsorted(self._where, self._symbol[rows] * self._span + inside, side="right")
        return found

    def _coded(self) -> _Values:
        values, codes = np.unique(self._notional, return_inverse=True)
        bits = max(int(len(values) - 1).bit_length(), 1)
        return _Values(values, codes.astype(np.int32), bits, WaveletMatrix(codes, bits))

    def _busy(self, size: int, bucket_s: int) -> Bools:
        """Return which symbols have a bucket of more than so many events."""
        starts = bucket_starts(self._prepared, bucket_s)
        busy = np.zeros(len(self._prepared.columns.symbols), np.bool_)
        busy[self._codes[starts[np.diff(starts, append=len(self._codes)) > size]]] = True
        return busy

    def _whole(self, known: _Values, rows: Any, window_s: int) -> Part:
        """Return every value of the windows."""
        end_ms = self._end_ms[rows]
        return Part(
            known.matrix, [(self._up_to(end_ms - 1000 * window_s, rows), -1.0), (self._up_to(end_ms, rows), 1.0)]
        )

    def _spread(self, known: _Values, window_s: int, bucket_s: int) -> Part:
        """Return the values of whole buckets, as `logbins` has them.

        Those of the first one count as spread evenly between the first and the last that came.
        """
        first_ms, bucket_ms, times = self._end_ms - 1000 * window_s, 1000 * bucket_s, self._times
        begin_ms, stop = (first_ms + 1) // bucket_ms * bucket_ms, self._up_to(self._end_ms)
        start, middle = self._up_to(begin_ms - 1), np.minimum(self._up_to(begin_ms + bucket_ms - 1), stop)
        opens, closes = times[np.minimum(start, len(times) - 1)], times[np.maximum(middle - 1, 0)] + 1
        part = np.clip((closes - np.maximum(opens, first_ms + 1)) / np.maximum(closes - opens, 1), 0, 1)
        return Part(known.matrix, [(start, -part), (middle, part - 1), (stop, 1.0)])

    def _by_bucket(self, rows: Ints, window_s: int, bucket_s: int) -> list[tuple[Ints, Floats, Floats]]:
        """Return places, and how many times more the values before each count in complete buckets and in the last one.

        Those of the first bucket count in part, wherever in it they came (`liqlab.quantiles.window_parts`).
        """
        end_ms, bucket_ms = self._end_ms[rows], 1000 * bucket_s
        first_ms, last_ms = end_ms - 1000 * window_s, end_ms // bucket_ms * bucket_ms
        begin_ms = first_ms // bucket_ms * bucket_ms
        part = np.minimum((begin_ms + bucket_ms - first_ms) / bucket_ms, 1)
        last, stop = self._up_to(last_ms - 1, rows), self._up_to(end_ms, rows)
        start, middle = (np.minimum(self._up_to(ms - 1, rows), last) for ms in (begin_ms, begin_ms + bucket_ms))
        now = np.where(begin_ms == last_ms, part, 1.0)  # where the window is within one bucket
        none = np.zeros(len(rows))
        return [(start, -part, none), (middle, part - 1, none), (last, none + 1, -now), (stop, none, now)]

    def _largest(self, known: _Values, rows: Ints, window_s: int, bucket_s: int, size: int) -> list[Part]:
        """Return what `topk` has of the windows: the largest of complete buckets, and of what came in the last one."""

        def made() -> _Some:
            kept = largest(self._prepared, bucket_s, size) & self._busy(size, bucket_s)[self._codes]
            return _Some(Ranks(kept), WaveletMatrix(known.codes[kept], known.bits))

        top = self._prepared.once(("largest", size, bucket_s), made, large=True)
        end_ms, bucket_ms = self._end_ms[rows], 1000 * bucket_s
        first_ms, last_ms = end_ms - 1000 * window_s, end_ms // bucket_ms * bucket_ms
        start, last, stop = (self._up_to(ms, rows) for ms in (first_ms, last_ms - 1, end_ms))
        opens, came = np.maximum(start, last), stop - last
        # Of a window within one bucket, what is left out is taken as spread evenly.
        spare = np.maximum(came - size, 0) * ((stop - opens) / np.maximum(came, 1))
        complete = top.part([(np.minimum(start, last), -1.0), (last, 1.0)])
        return [complete, Part(known.matrix, [(opens, -1.0), (stop, 1.0)], spare)]

    def _sampled(
        self, rows: Ints, cuts: list[tuple[Ints, Floats, Floats]], bucket_s: int, size: int
    ) -> tuple[Floats, int, list[Part]]:
        """Return what `reservoir` has of the windows, by a draw that is not the server's."""
        sample = self._prepared.once(("sample", size, bucket_s), lambda: self._drawn(bucket_s, size), large=True)
        came = cuts[3][0] - cuts[2][0]
        each = np.maximum(came / size, 1)
        grown = [(place, each * times) for place, _, times in cuts[2:]]
        parts = [
            sample.kept.part((place, times) for place, times, _ in cuts[:3]),
            sample.entered.part(grown),
            sample.left.part((place, -times) for place, times in grown),
        ]
        return sample.values, _BITS, parts

    def _drawn(self, bucket_s: int, size: int) -> _Sample:
        """Draw: of a bucket's events the m-th takes, with chance size / m, the place of one that is in the sample.

        Vitter 1985, algorithm R: at any time the sample is uniform, as the bottom-k sample of `liqlab.percentiles` is.
        """
        rng, n = clock.generator(size), len(self._codes)
        starts = bucket_starts(self._prepared, bucket_s)
        lengths = np.diff(starts, append=n)
        bucket = np.repeat(np.arange(len(starts)), lengths)
        came = np.arange(1, n + 1) - starts[bucket]
        enters = (rng.random(n) * came < size) & self._busy(size, bucket_s)[self._codes]
        rows = np.flatnonzero(enters)
        slot = np.where(came[rows] <= size, came[rows] - 1, rng.integers(0, size, len(rows)))
        place = bucket[rows] * size + slot
        order = np.argsort(place, kind="stable")
        again = np.flatnonzero(np.diff(place[order]) == 0)
        out = np.full(len(rows), n)
        out[order[again]] = rows[order[again + 1]]
        leaves = np.argsort(out, kind="stable")[: len(again)]
        logs = np.log(self._notional)
        low, width = float(logs.min()), max(float(np.ptp(logs)) * (1 + 1e-9) / (1 << _BITS), 1e-12)
        codes = np.minimum((logs - low) / width, (1 << _BITS) - 1).astype(np.int32)
        stays = rows[out == n]
        weight = np.maximum(lengths / size, 1)[bucket[stays]]
        kept, gone = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        kept[stays] = gone[out[leaves]] = True  # who enters takes one place
        return _Sample(
            np.exp(low + width * (np.arange(1 << _BITS) + 0.5)),
            _Some(Ranks(kept), WaveletMatrix(codes[stays], _BITS, weight)),
            _Some(Ranks(enters), WaveletMatrix(codes[rows], _BITS)),
            _Some(Ranks(gone), WaveletMatrix(codes[rows[leaves]], _BITS)),
        )
