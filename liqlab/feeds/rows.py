"""What every parser yields: raw columns of events, before anything is converted or checked."""

from __future__ import annotations

import datetime as dt
import math
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

BUY: Final = 0
SELL: Final = 1
NO_SIDE: Final = -1
NO_TIME: Final = np.iinfo(np.int64).min
UNITS: Final = ("base", "contracts", "usd")
_SIDES: Final = {"buy": BUY, "b": BUY, "bid": BUY, "sell": SELL, "s": SELL, "ask": SELL}
_POSITIONS: Final = {"long": SELL, "longs": SELL, "short": BUY, "shorts": BUY}
_OF: Final = (" trade", " liquidation", " liquidated", " position", " closed")
_EARLIEST_S: Final = 1_230_768_000  # 2009, the year of the first coin
_LATEST_S: Final = 4_102_444_800  # 2100
_SCALES: Final = (1, 1_000, 1_000_000, 1_000_000_000)  # the units of time in use, a second


class FeedError(ValueError):
    """A feed cannot be read at all; the message says why, shows what was found, and names the cure."""


class RejectedError(ValueError):
    """One event cannot be read; the message is the reason that the report counts."""


class IgnoredError(ValueError):
    """A message is not an event (an acknowledgement, another channel); the text is what the report counts."""


class Event(NamedTuple):
    """One event as its venue sent it, with numbers parsed and the side already that of the order."""

    exchange: str
    symbol: str
    side: int
    ts_ms: int
    price: float
    quantity: float
    unit: str | None  # one of UNITS; None for the venue's own
    ident: str = ""
    notional: float = math.nan
    occurrence: int = 0


@dataclass(frozen=True)
class Rows:
    """Columns of `n` events of one file; `key` points into `keys`, the distinct (exchange, symbol, unit)."""

    line: np.ndarray
    keys: Sequence[tuple[str, str, str | None]]
    key: np.ndarray
    side: np.ndarray
    ts_ms: np.ndarray
    price: np.ndarray
    quantity: np.ndarray
    ident: np.ndarray | None = None
    notional: np.ndarray | None = None
    occurrence: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.line)

    @staticmethod
    def merged(parts: Sequence[Rows]) -> Rows:
        """Return the rows of all `parts`, in the order of their lines."""
        if len(parts) == 1:
            return parts[0]
        keys: dict[tuple[str, str, str | None], int] = {}
        codes = [
            np.array([keys.setdefault(key, len(keys)) for key in part.keys] or [0], np.int64)[part.key]
            for part in parts
        ]
        line = np.concatenate([part.line for part in parts])
        order = np.argsort(line, kind="stable")

        def joined(name: str, missing: Any) -> np.ndarray:
            columns = [getattr(part, name) for part in parts]
            filled = [np.full(len(part), missing) if c is None else c for part, c in zip(parts, columns, strict=True)]
            return np.concatenate(filled)[order]

        return Rows(
            line=line[order],
            keys=list(keys),
            key=np.concatenate(codes)[order],
            side=joined("side", NO_SIDE),
            ts_ms=joined("ts_ms", NO_TIME),
            price=joined("price", math.nan),
            quantity=joined("quantity", math.nan),
            ident=joined("ident", "").astype(object) if any(part.ident is not None for part in parts) else None,
            notional=joined("notional", math.nan),
            occurrence=joined("occurrence", 0),
        )


@dataclass
class RowList:
    """Collects single events and becomes `Rows`."""

    line: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def add(self, line: int, event: Event) -> None:
        """Append one event that was read at `line`."""
        self.line.append(line)
        self.events.append(event)

    def rows(self) -> Rows:
        """Return the columns."""
        exchange, symbol, side, ts_ms, price, quantity, unit, ident, notional, occurrence = (
            zip(*self.events, strict=True) if self.events else ((),) * 10
        )
        keys: dict[tuple[str, str, str | None], int] = {}
        codes = [keys.setdefault(key, len(keys)) for key in zip(exchange, symbol, unit, strict=True)]
        return Rows(
            line=np.array(self.line, np.int64),
            keys=list(keys),
            key=np.array(codes, np.int64),
            side=np.array(side, np.int8),
            ts_ms=np.array(ts_ms, np.int64),
            price=np.array(price, np.float64),
            quantity=np.array(quantity, np.float64),
            ident=np.array(ident, object) if any(ident) else None,
            notional=np.array(notional, np.float64),
            occurrence=np.array(occurrence, np.int64),
        )


def number(value: Any) -> float:
    """Return a JSON or CSV value as a float; NaN for anything that is not a number."""
    if isinstance(value, float | int):
        # A JSON integer may have more digits than a float can hold; `true` is not a number.
        return math.nan if isinstance(value, bool) or abs(value) > 1e300 else float(value)
    if not isinstance(value, str) or "_" in value:  # Python alone reads 1_000 as a number
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


def first(*values: float) -> float:
    """Return the first of `values` that is finite and positive, else the last one."""
    for value in values:
        if 0 < value < math.inf:
            return value
    return values[-1]


def order_side(word: Any) -> int:
    """Return the side of an order from a word; long and short always speak of the position."""
    text = str(word).strip().lower()
    if text in _SIDES:
        return _SIDES[text]
    for ending in _OF:
        text = text.removesuffix(ending)
    return _POSITIONS.get(text, NO_SIDE)


def position_side(word: Any) -> int:
    """Return the side of the order that closes a position, from a word that speaks of the position."""
    text = str(word).strip().lower()
    if text in _SIDES:
        return SELL if _SIDES[text] == BUY else BUY
    return order_side(text)


def to_ms(value: Any, zone: dt.tzinfo = dt.UTC) -> int:
    """Return a time as ms since the epoch; NO_TIME where it is none.

    Parameters
    ----------
    value : int, float or str
        Seconds, ms, us or ns since the epoch, told apart by their size (between 2009 and 2100 no two agree), as a
        number or as text; or ISO 8601 text.
    zone : datetime.tzinfo
        What ISO text without an offset means.
    """
    if isinstance(value, str):
        text = value.strip().replace("/", "-").replace(" UTC", "+00:00")
        if text.isdecimal() and text.isascii() and len(text) < 20:
            return to_ms(int(text))
        if "-" not in text[1:]:
            return to_ms(number(text))
        try:
            moment = dt.datetime.fromisoformat(text)
        except ValueError:
            return NO_TIME
        moment = moment if moment.tzinfo else moment.replace(tzinfo=zone)
        return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NO_TIME
    for scale in _SCALES:
        if _EARLIEST_S * scale <= value < _LATEST_S * scale:
            if isinstance(value, int):
                return value * 1000 // scale
            # A float of seconds cannot hold .829 exactly: round to the microsecond before cutting to the ms.
            return round(value * 1_000_000 / scale) // 1000
    return NO_TIME


def zone_of(name: str | None) -> dt.tzinfo:
    """Return the time zone called `name`, UTC for None.

    Raises
    ------
    FeedError
        There is no such zone.
    """
    if name is None or name.upper() in ("UTC", "Z"):
        return dt.UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise FeedError(f"tz={name!r} is not a time zone; use a name such as Asia/Kolkata") from None
