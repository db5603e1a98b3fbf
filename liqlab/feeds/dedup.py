"""Which events were seen before: 64-bit hashes of their identity, in bounded memory."""

from __future__ import annotations

from typing import Final

import numpy as np

from liqlab.clock import HOUR_MS

CAPACITY: Final = 16_000_000  # hashes: 128 MB; two of that many events collide with a probability of 7e-6
_MULTIPLIERS: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


def mix(*columns: np.ndarray) -> np.ndarray:
    """Return one uint64 a row, a hash of its values in `columns` (8-byte dtypes, equal lengths).

    Values are compared as numbers, so ``10.0`` and ``10`` agree. The mixer is the finalizer of SplitMix64
    (Steele, Lea, Flood 2014).
    """
    state = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        state += _GOLDEN
        state ^= np.ascontiguousarray(column).view(np.uint64)
        state ^= state >> np.uint64(30)
        state *= _MULTIPLIERS[0]
        state ^= state >> np.uint64(27)
        state *= _MULTIPLIERS[1]
        state ^= state >> np.uint64(31)
    return state


class Seen:
    """A set of hashes by hour of event time; the oldest hours are forgotten when it is full.

    An hour is a list of sorted runs, each more than twice as long as the next, so that adding is cheap and a lookup
    touches few of them.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self._hours: dict[int, list[np.ndarray]] = {}
        self._size = 0
        self.forgotten = 0

    def __len__(self) -> int:
        return self._size

    def add(self, hashes: np.ndarray, ts_ms: np.ndarray) -> np.ndarray:
        """Remember `hashes` and return which of them are new; of equal ones in one call the first is.

        Parameters
        ----------
        hashes : numpy.ndarray of uint64, shape (n,)
        ts_ms : numpy.ndarray of int64, shape (n,)
            Event time: equal events must have equal times, or times that are 0.

        Returns
        -------
        numpy.ndarray of bool, shape (n,)
        """
        new = np.zeros(len(hashes), bool)
        hours = ts_ms // HOUR_MS
        order = np.lexsort((hashes, hours))
        sorted_hours = hours[order]
        cuts = np.flatnonzero(np.diff(sorted_hours)) + 1
        for rows in np.split(order, cuts) if len(order) else ():
            new[rows] = self._add_hour(int(hours[rows[0]]), hashes[rows])
        while self._size > self.capacity and self._hours:
            self._forget(min(self._hours))
        return new

    def _add_hour(self, hour: int, ascending: np.ndarray) -> np.ndarray:
        new = np.ones(len(ascending), bool)
        new[1:] = ascending[1:] != ascending[:-1]
        runs = self._hours.setdefault(hour, [])
        for run in runs:
            at = np.searchsorted(run, ascending)
            at[at == len(run)] = 0
            new &= run[at] != ascending
        added = ascending[new]
        if len(added):
            self._size += len(added)
            runs.append(added)
            while len(runs) > 1 and len(runs[-2]) <= 2 * len(runs[-1]):
                last = runs.pop()
                runs[-1] = np.sort(np.concatenate([runs[-1], last]), kind="stable")
        return new

    def _forget(self, hour: int) -> None:
        dropped = sum(len(run) for run in self._hours.pop(hour))
        self._size -= dropped
        self.forgotten += dropped
