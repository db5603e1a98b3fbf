"""How hard the server's memory is pressed, and what has been done about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Final

from liqlab.settings import Settings

_NEVER: Final = -(1 << 62)


class Tier(IntEnum):
    """What the pressure asks for; each does what the ones before it do, and more."""

    NORMAL = 0  # every share within its bytes
    TRIM = 1  # the same, at once and in every family
    HALVE = 2  # half the bytes and half the lives
    EMERGENCY = 3  # temporary families, and the oldest half of the events


@dataclass(frozen=True)
class Action:
    """One thing that cleanup did, or in a dry run would do.

    Attributes
    ----------
    at_ms : int
        The time that it was asked to clean up for: the wall's, or the feed's.
    tier : str
        The pressure at that time.
    what : str
        ``seal``, ``trim``, ``drop``, ``expire``, ``purge``, ``defragment``, ``backup``, ``archive``, ``reset``,
        ``tier``, ``refused``.
    family : str
        Whose keys.
    keys, events : int
        Removed, or changed; of events those that left Redis.
    bytes_before, bytes_after : int
        `used_memory`; equal in a dry run.
    detail : str
        One sentence.
    node : str
        Of a cluster, whose memory it is about, ``host:port``; empty on a single server.
    """

    at_ms: int
    tier: str
    what: str
    family: str
    keys: int
    events: int
    bytes_before: int
    bytes_after: int
    detail: str
    node: str = ""

    @property
    def freed(self) -> int:
        """Bytes of `used_memory` that it gave back; negative where it grew."""
        return self.bytes_before - self.bytes_after

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON."""
        return {**asdict(self), "freed": self.freed}


class Pressure:
    """Which tier it is: entered at once, left one by one, `exit_margin` below the entry and after a dwell.

    Attributes
    ----------
    tier : Tier
    changes : int
        How often it has changed.
    """

    def __init__(self, settings: Settings) -> None:
        lines = settings.thresholds
        self._entries = {Tier.TRIM: lines.trim, Tier.HALVE: lines.halve, Tier.EMERGENCY: lines.emergency}
        self._margin = lines.exit_margin
        self._dwell_ms = int(1000 * settings.cleanup.dwell_s)
        self._since_ms = self._worked_ms = _NEVER
        self._ratio = 0.0
        self.tier = Tier.NORMAL
        self.changes = 0

    def update(self, ratio: float, now_ms: int) -> Tier:
        """Return the tier for `used_memory` / `maxmemory` at a time, ms."""
        self._ratio = ratio
        wanted = max((tier for tier, entry in self._entries.items() if ratio > entry), default=Tier.NORMAL)
        if wanted < self.tier:
            early = now_ms - self._since_ms < self._dwell_ms
            near = ratio > self._entries[self.tier] - self._margin
            wanted = self.tier if early or near else Tier(self.tier - 1)
        if wanted != self.tier:
            self.tier, self._since_ms, self._worked_ms = wanted, now_ms, _NEVER
            self.changes += 1
        return self.tier

    def due(self, now_ms: int) -> bool:
        """Return whether a tier's own work is to be done: on its entry, after each dwell, in an emergency always."""
        if self.tier is Tier.NORMAL:
            return False
        pressing = self.tier is Tier.EMERGENCY and self._ratio > self._entries[self.tier]
        if not pressing and now_ms - self._worked_ms < self._dwell_ms:
            return False
        self._worked_ms = now_ms
        return True
