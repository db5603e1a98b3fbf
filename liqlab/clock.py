"""The only place where liqlab reads the time or draws randomness.

Live code asks this module; replay passes event time along instead. A lint rule (`TID251`) keeps every other module
from calling `time`, `datetime.now`, `random` or `secrets`.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MINUTE_MS = 60_000
HOUR_MS = 3_600_000
DAY_MS = 86_400_000


def now_ms() -> int:
    """Wall time, ms since the epoch, UTC."""
    return time.time_ns() // 1_000_000


def elapsed_s() -> float:
    """Seconds on a clock that never steps back; only differences mean something."""
    return time.perf_counter()


def generator(seed: int) -> np.random.Generator:
    """Return a random generator that draws the same numbers for the same `seed`, on every machine."""
    import numpy as np  # half of what importing liqlab would cost

    return np.random.Generator(np.random.PCG64(seed))


def token() -> str:
    """Return 16 random hex digits: a name that no other process picks."""
    return secrets.token_hex(8)
