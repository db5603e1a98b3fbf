"""Which column of a table means what: known layouts, well-known names, and the caller's own map."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from liqlab.events import COLUMNS
from liqlab.feeds.rows import NO_SIDE, NO_TIME, FeedError, order_side, to_ms

TARGETS: Final = ("ts_ms", "exchange", "symbol", "side", "position_side", "price", "size", "notional", "id")
# Best first. The receipt and insert times of a recorder, mark prices and last fills are deliberately not here.
_SYNONYMS: Final = {
    "ts_ms": (
        "trade_time order_trade_time transaction_time event_ts event_time event_timestamp ts_ms timestamp_ms time_ms "
        "timestamp ts time datetime date_time created_at createdat updated_time updatedtime date"
    ),
    "exchange": "exchange venue exchange_name exch exname",
    "symbol": "symbol instrument instrument_name inst_id instid contract_code contract market pair ticker s",
    "side": "side order_side liquidation_side direction liquidation_type liq_side type",
    "position_side": "position_side pos_side posside liquidated_side position",
    "average": "average_price avg_price averageprice avgprice avg_fill_price fill_price ap",
    "order": "price order_price bankruptcy_price bankrupt_price bk_px bkpx liquidation_price liq_price p",
    "filled": (
        "accumulated_fill_quantity order_filled_accumulated_quantity filled_accumulated_quantity accumulated_quantity "
        "filled_quantity filled_qty executed_quantity executed_qty executedqty cumulative_quantity z"
    ),
    "ordered": "size quantity qty amount original_quantity orig_qty origqty order_quantity contracts volume sz q v",
    "id": "id trade_id order_id orderid uid tid",
}
_NAMES: Final = {target: tuple(names.split()) for target, names in _SYNONYMS.items()}
_HEADERS: Final = {
    "liqlab": " ".join(COLUMNS),
    "tardis": "exchange symbol timestamp local_timestamp id side price amount",
    "cryptofeed": "exchange symbol side quantity price timestamp receipt_timestamp",
    "binance-archive": "time side order_type time_in_force original_quantity average_price",
}
_KINDS: Final = {name: frozenset(columns.split()) for name, columns in _HEADERS.items()}
_RAW: Final = ("s", "S", "q", "p", "T")  # the field names of the frame itself; only the case tells s from S
_RECORDER: Final = (("type", "order_type", "o"), ("time_in_force", "tif", "f"))
_WORD: Final = re.compile(r"[^a-z0-9]+")
_TIF: Final = ("IOC", "GTC", "FOK", "GTX")


class MissingColumnsError(ValueError):
    """A header lacks columns that an event needs; `targets` are their names in the map."""

    def __init__(self, targets: Sequence[str], found: int) -> None:
        super().__init__(", ".join(targets))
        self.targets = tuple(targets)
        self.found = found


@dataclass(frozen=True)
class Layout:
    """Positions of the columns that matter; the first of `prices` and `sizes` that has a value is taken.

    `side` says what its words buy and sell mean: ``order``, ``position``, or ``venue`` for the venue's own habit.
    """

    name: str
    width: int
    ts_ms: int
    side_at: int
    prices: tuple[int, ...]
    sizes: tuple[int, ...]
    symbol: int | None = None
    exchange_at: int | None = None
    exchange: str | None = None
    side: str = "venue"
    unit: str | None = None
    ident: int | None = None
    notional: int | None = None
    fallback_ts: int | None = None


RECORDER: Final = Layout("binance-recorder", 11, 10, 1, (6, 5), (9, 4), symbol=0, exchange="binance", side="order")
ARCHIVE: Final = Layout("binance-archive", 10, 0, 1, (6, 5), (9, 4), exchange="binance", side="order")
HISTORY: Final = Layout("binance-history", 4, 0, 1, (2,), (3,), exchange="binance", side="position", unit="base")


def of_row(row: Sequence[str]) -> Layout | None:
    """Return the layout of a row without a header, None where its content fits none that is known."""
    if len(row) < HISTORY.width:
        return None
    words = order_side(row[1]) != NO_SIDE and not row[1].strip().isdigit()
    if not words:
        return None
    if len(row) >= ARCHIVE.width and row[3].strip().upper() in _TIF and row[2].strip().replace("_", "").isalpha():
        if len(row) >= RECORDER.width and to_ms(row[10]) != NO_TIME:
            return RECORDER
        return ARCHIVE if to_ms(row[0]) != NO_TIME else None
    word = row[1].strip().lower()
    if word.startswith(("long", "short")) and " " in word and to_ms(row[0]) != NO_TIME and len(row) == 6:
        return HISTORY
    return None


def word_of(name: str) -> str:
    """Return a column's name in the spelling of the synonym table: ``Event Time (IST)`` is ``event_time``."""
    bare = re.sub(r"\(.*?\)", "", name).strip().strip("\ufeff\"'").lower()
    return _WORD.sub("_", bare).strip("_")


def looks_like_header(row: Sequence[str]) -> bool:
    """Return whether a row names columns: three or more fields, none a number, and at least two are known names."""
    if len(row) < 3 or any(field.strip()[:1].isdigit() or field.strip()[:1] == "-" for field in row):
        return False
    known = {name for names in _NAMES.values() for name in names}
    return sum(word_of(field) in known for field in row) >= 2


def of_header(header: Sequence[str], columns: Mapping[str, str | int] | None) -> Layout:
    """Return the layout that a header describes.

    Parameters
    ----------
    header : sequence of str
        The names of the columns, in order.
    columns : mapping of str to str or int, optional
        The caller's map from a target of `TARGETS` to a column's name or position; it wins over well-known names.

    Raises
    ------
    MissingColumnsError
        Time, side, price or size is not there. `columns` names the cure.
    FeedError
        The map names a target or a column that does not exist.
    """
    at = _mapped(header, columns or {})
    own = frozenset(at)
    words = [word_of(name) for name in header]
    named = frozenset(words)
    kind = next((name for name, columns_of in _KINDS.items() if columns_of <= named), "table")
    if not own and set(_RAW) <= set(header):
        place = {name: list(header).index(name) for name in header}
        return Layout(
            "binance-recorder",
            len(header),
            place["T"],
            place["S"],
            tuple(place[name] for name in ("ap", "p") if name in place),
            tuple(place[name] for name in ("z", "q") if name in place),
            symbol=place["s"],
            exchange="binance",
            side="order",
        )
    for target, names in _NAMES.items():
        found = next((words.index(name) for name in names if name in named), None)
        if found is not None and found not in at.values():
            at.setdefault(target, found)
    prices = (at["price"],) if "price" in own else tuple(at[name] for name in ("average", "order") if name in at)
    sizes = (at["size"],) if "size" in own else tuple(at[name] for name in ("filled", "ordered") if name in at)
    position = "position_side" in at and ("side" not in at or "position_side" in own) and "side" not in own
    side_at = at.get("position_side" if position else "side")
    if all(any(name in named for name in names) for names in _RECORDER) and kind == "table":
        kind = "binance-recorder"
    missing = [
        target
        for target, there in (
            ("ts_ms", "ts_ms" in at),
            ("side", side_at is not None),
            ("price", prices),
            ("size", sizes),
        )
        if not there
    ]
    if missing or side_at is None:
        raise MissingColumnsError(missing, found=4 - len(missing))
    settled = kind in ("liqlab", "tardis", "binance-recorder", "binance-archive") or "side" in own
    return Layout(
        name=kind,
        width=len(header),
        ts_ms=at["ts_ms"],
        side_at=side_at,
        prices=prices,
        sizes=sizes,
        symbol=at.get("symbol"),
        exchange_at=at.get("exchange"),
        exchange="binance" if kind.startswith("binance") else None,
        side="position" if position else "order" if settled else "venue",
        unit="base" if kind == "liqlab" else None,
        # A bare `id` may be a recorder's own row number, which tells two copies of one event apart.
        ident=at.get("id") if "id" in own or kind in ("tardis", "cryptofeed") else None,
        notional=words.index("notional") if kind == "liqlab" else at.get("notional"),
        fallback_ts=words.index("receipt_timestamp") if kind == "cryptofeed" else None,
    )


def _mapped(header: Sequence[str], columns: Mapping[str, str | int]) -> dict[str, int]:
    at: dict[str, int] = {}
    plain = [name.strip().strip("\ufeff") for name in header]
    for target, name in columns.items():
        if target not in TARGETS:
            raise FeedError(f"columns: no target {target!r}; there are {', '.join(TARGETS)}")
        if isinstance(name, int) or (name.isdigit() and name not in plain):
            if int(name) >= len(plain):
                raise FeedError(f"columns: {target}={name}, but there are only {len(plain)} columns, counted from 0")
            at[target] = int(name)
        elif name in plain:
            at[target] = plain.index(name)
        else:
            raise FeedError(f"columns: {target}={name!r} is not a column; there are {', '.join(plain)}")
    return at
