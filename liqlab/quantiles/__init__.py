"""What the percentile buckets hold: how many notionals fall into each of a row of log-spaced bins.

Counts only ever grow, so writers need no read before a write. The estimators that answer from them are issue #5's.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

ACCURACY: Final = 0.01  # relative, of the value that stands for a bin
_LOG_GAMMA: Final = float(np.log((1 + ACCURACY) / (1 - ACCURACY)))


def log_bins(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the bin of each value: i where gamma^(i-1) < value <= gamma^i, gamma = (1 + a) / (1 - a), a = `ACCURACY`.

    The rule of DDSketch (Masson, Rim and Lee 2019, section 2.1): 2 gamma^i / (gamma + 1) is then within a of any value
    of the bin.

    Parameters
    ----------
    values : array of float64, shape (n,)
        Finite and positive.
    """
    return np.ceil(np.log(values) / _LOG_GAMMA).astype(np.int64)
