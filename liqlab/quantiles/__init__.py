"""What a symbol's sketch holds: how many notionals of each hour fall into each of a row of log-spaced bins.

One hash a symbol, one field an hour: a quiet symbol pays for one key, not for 24. A field is a row of 16-bit words,
each a bin and up to eight counts; words of the same bin add up, so a batch appends its own, and write.lua folds them
together from time to time. The estimators that answer from them are issue #5's.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

ACCURACY: Final = 0.01  # relative, of the value that stands for a bin
_LOG_GAMMA: Final = float(np.log((1 + ACCURACY) / (1 - ACCURACY)))
_EACH: Final = 8  # counts of a word, in its low three bits; write.lua has the same
_MIDDLE: Final = 1 << 12  # the bin of 1 USD among the 8,192 that the other bits name: 1e-35 to 1e35 USD


def log_bins(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the bin of each value: i where gamma^(i-1) < value <= gamma^i, gamma = (1 + a) / (1 - a), a = `ACCURACY`.

    The rule of DDSketch (Masson, Rim and Lee 2019, section 2.1): 2 gamma^i / (gamma + 1) is then within a of any value
    of the bin. Values beyond 1e35 and below 1e-35 are in the last and the first bin.

    Parameters
    ----------
    values : array of float64, shape (n,)
        Finite and positive.
    """
    return np.clip(np.ceil(np.log(values) / _LOG_GAMMA), -_MIDDLE, _MIDDLE - 1).astype(np.int64)


def pack(bins: NDArray[np.int64], counts: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
    """Return words of bins and counts, and how many words each bin has.

    Parameters
    ----------
    bins, counts : array of int64, shape (n,)
        From `log_bins`; counts are positive.
    """
    words = -(-counts // _EACH)
    last = np.cumsum(words) - 1
    each = np.full(int(words.sum()), _EACH, np.int64)
    each[last] = counts - _EACH * (words - 1)
    return ((np.repeat(bins + _MIDDLE, words) * _EACH) + each - 1).astype("<u2").tobytes(), words


def unpack(field: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the bins of one hour, ascending, and their counts.

    Raises
    ------
    ValueError
        It is no row of 16-bit words.
    """
    words = np.frombuffer(field, "<u2").astype(np.int64)
    bins, place = np.unique(words // _EACH - _MIDDLE, return_inverse=True)
    return bins, np.bincount(place, words % _EACH + 1, len(bins)).astype(np.int64)
