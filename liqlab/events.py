"""The event table: a pandas DataFrame, one row a liquidation, sorted by time.

=========  ========  ==========================================================================================
column     dtype     meaning
=========  ========  ==========================================================================================
ts_ms      int64     event time at the venue, ms since the epoch, UTC
exchange   category  `binance`, `bybit`, `okx`, ...
symbol     category  the venue's own name, verbatim
side       category  order side: `sell` = a long was liquidated, `buy` = a short was
price      float64   average fill price where the venue sends it, else order (bankruptcy) price; > 0
size       float64   base-asset units; > 0
notional   float64   USD; > 0
=========  ========  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

COLUMNS: Final = ("ts_ms", "exchange", "symbol", "side", "price", "size", "notional")
SIDES: Final = ("buy", "sell")
MAX_MS: Final = 1 << 47  # times from here on are no times: the year 6429
MAX_NAME: Final = 255  # characters of a symbol or an exchange
_CATEGORIES: Final = ("exchange", "symbol", "side")
_FLOATS: Final = ("price", "size", "notional")


class Event(NamedTuple):
    """One liquidation: a row of the event table, as a live feed hands it over."""

    ts_ms: int
    exchange: str
    symbol: str
    side: str
    price: float
    size: float
    notional: float

    @classmethod
    def rows(cls, table: pd.DataFrame) -> Iterator[Event]:
        """Yield the rows of an event table."""
        return map(cls._make, table.itertuples(index=False))


@dataclass(frozen=True)
class Columns:
    """An event table as plain arrays: a hundred times cheaper to cut into small batches than a DataFrame.

    `exchange` and `symbol` are indices into `exchanges` and `symbols`, `side` into `SIDES`; shapes are (n,). Rows need
    not be in time order.
    """

    ts_ms: NDArray[np.int64]
    exchange: NDArray[np.integer[Any]]
    symbol: NDArray[np.integer[Any]]
    side: NDArray[np.integer[Any]]
    price: NDArray[np.float64]
    size: NDArray[np.float64]
    notional: NDArray[np.float64]
    exchanges: list[str]
    symbols: list[str]

    @classmethod
    def of(cls, events: pd.DataFrame) -> Columns:
        """Take the columns of an event table."""
        exchange, symbol, side = (events[name].cat for name in ("exchange", "symbol", "side"))
        return cls(
            events["ts_ms"].to_numpy(),
            exchange.codes.to_numpy(),
            symbol.codes.to_numpy(),
            side.codes.to_numpy(),
            events["price"].to_numpy(),
            events["size"].to_numpy(),
            events["notional"].to_numpy(),
            exchange.categories.tolist(),
            symbol.categories.tolist(),
        )

    @classmethod
    def of_events(cls, events: Iterable[Event]) -> Columns:
        """Take single events; they are put in time order."""
        ts_ms, exchange, symbol, side, price, size, notional = zip(*sorted(events, key=itemgetter(0)), strict=True)
        exchanges, symbols = (
            {name: code for code, name in enumerate(dict.fromkeys(names))} for names in (exchange, symbol)
        )
        return cls(
            np.array(ts_ms, np.int64),
            np.array([exchanges[name] for name in exchange]),
            np.array([symbols[name] for name in symbol]),
            np.array([SIDES.index(name) for name in side]),
            np.array(price, np.float64),
            np.array(size, np.float64),
            np.array(notional, np.float64),
            list(exchanges),
            list(symbols),
        )

    def rows(self, which: slice | NDArray[np.intp]) -> Columns:
        """Return the same columns, of some rows only."""
        return replace(self, **{name: getattr(self, name)[which] for name in COLUMNS})

    @classmethod
    def concat(cls, parts: Sequence[Columns]) -> Columns:
        """Join columns one behind the other; names that several have become one."""
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
        for column, names in (("exchange", "exchanges"), ("symbol", "symbols")):
            number: dict[str, int] = {}
            joined[column] = np.concatenate(
                [
                    np.array([number.setdefault(name, len(number)) for name in getattr(part, names)] or [0])[
                        getattr(part, column)
                    ]
                    for part in parts
                ]
            )
            joined[names] = list(number)
        return cls(**joined)

    def table(self) -> pd.DataFrame:
        """Return the event table: sorted by time, and only the names that occur."""
        exchange, symbol, side = (
            pd.Categorical.from_codes(codes, pd.Index(names, dtype="str"))
            for codes, names in ((self.exchange, self.exchanges), (self.symbol, self.symbols), (self.side, SIDES))
        )
        return event_table(
            self.ts_ms,
            exchange.remove_unused_categories(),
            symbol.remove_unused_categories(),
            side,
            self.price,
            self.size,
            self.notional,
        )

    def __len__(self) -> int:
        return len(self.ts_ms)


class EventError(ValueError):
    """A table is not an event table; the message names the column, the row and the cure."""


def event_table(
    ts_ms: Any,
    exchange: Any,
    symbol: Any,
    side: Any,
    price: Any,
    size: Any,
    notional: Any,
) -> pd.DataFrame:
    """Build an event table from equally long columns, sorted by time (ties keep their order).

    Parameters
    ----------
    ts_ms, price, size, notional : array_like, shape (n,)
        Milliseconds since the epoch; quote units; base units; USD.
    exchange, symbol, side : array_like of str or pandas.Categorical, shape (n,)
        Categoricals keep their categories, except `side`, whose categories are always ``("buy", "sell")``.

    Returns
    -------
    pandas.DataFrame
        The seven columns of the module docstring, with a fresh RangeIndex.

    Raises
    ------
    EventError
        A side is neither ``buy`` nor ``sell``.
    """
    table = pd.DataFrame(
        {
            "ts_ms": np.asarray(ts_ms, dtype=np.int64),
            "exchange": _names(exchange),
            "symbol": _names(symbol),
            "side": _sides(side),
            "price": np.asarray(price, dtype=np.float64),
            "size": np.asarray(size, dtype=np.float64),
            "notional": np.asarray(notional, dtype=np.float64),
        }
    )
    times = table["ts_ms"].to_numpy()
    if len(times) > 1 and (times[1:] < times[:-1]).any():
        table = table.iloc[np.argsort(times, kind="stable")].reset_index(drop=True)
    return table


def _names(values: Any) -> pd.Categorical:
    names = pd.Categorical(values)
    # One dtype for all categories, whatever reader they come from: pandas does not unite `str` with `string`.
    if names.categories.dtype == "str":
        return names
    return pd.Categorical.from_codes(names.codes, categories=names.categories.astype("str"))


def _sides(values: Any) -> pd.Categorical:
    sides = _names(values)
    if tuple(sides.categories) == SIDES:
        return sides
    unknown = sides.remove_unused_categories().categories.difference(list(SIDES))
    if len(unknown):
        raise EventError(f"side {unknown[0]!r} is neither 'buy' nor 'sell', the side of the order")
    return sides.set_categories(list(SIDES))


def empty() -> pd.DataFrame:
    """Return an event table without rows."""
    return event_table([], [], [], [], [], [], [])


def concat(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Join event tables into one, sorted by time; categories are united in order of first appearance."""
    parts: Sequence[pd.DataFrame] = [table for table in tables if len(table)]
    if not parts:
        return empty()
    if len(parts) == 1:
        return parts[0].reset_index(drop=True)
    united = {
        name: pd.api.types.union_categoricals([part[name] for part in parts]) for name in ("exchange", "symbol", "side")
    }
    joined = {
        name: np.concatenate([part[name].to_numpy() for part in parts])
        for name in ("ts_ms", "price", "size", "notional")
    }
    return event_table(**joined, **united)


def check(table: pd.DataFrame) -> pd.DataFrame:
    """Return `table` unchanged if it is an event table.

    Raises
    ------
    EventError
        A column is missing or of another dtype, the rows are not in time order, or a number is not finite and
        positive.
    """
    for name in COLUMNS:
        if name not in table.columns:
            raise EventError(f"the event table has no column {name!r}; build it with liqlab.events.event_table")
    for name in _CATEGORIES:
        if not isinstance(table[name].dtype, pd.CategoricalDtype):
            raise EventError(
                f"column {name!r} is {table[name].dtype}, not category; build it with liqlab.events.event_table"
            )
        if table[name].isna().any():
            raise EventError(f"column {name!r} has no value in row {int(table[name].isna().to_numpy().argmax())}")
    if tuple(table["side"].cat.categories) != SIDES:
        raise EventError(f"column 'side' has the categories {list(table['side'].cat.categories)}, not {list(SIDES)}")
    if table["ts_ms"].dtype != np.int64:
        raise EventError(f"column 'ts_ms' is {table['ts_ms'].dtype}, not int64 milliseconds")
    if not table["ts_ms"].is_monotonic_increasing:
        raise EventError("column 'ts_ms' is not in time order; sort it with liqlab.events.event_table")
    times = table["ts_ms"].to_numpy()
    if len(times) and not 0 <= times[0] <= times[-1] < MAX_MS:
        raise EventError(f"column 'ts_ms' holds {times[0]} to {times[-1]}; ms since the epoch are 0 to {MAX_MS}")
    for column in ("exchange", "symbol"):
        for name in table[column].cat.categories:
            _check_name(column, name)
    for name in _FLOATS:
        if table[name].dtype != np.float64:
            raise EventError(f"column {name!r} is {table[name].dtype}, not float64")
        values = table[name].to_numpy()
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            row = int(bad.argmax())
            raise EventError(f"column {name!r} holds {float(values[row])} in row {row}; it must be finite and positive")
    with np.errstate(over="ignore", under="ignore"):
        value = table["price"].to_numpy() * table["size"].to_numpy()
    bad = ~(np.isfinite(value) & (value > 0))
    if bad.any():
        row = int(bad.argmax())
        raise EventError(f"price x size is {float(value[row])} in row {row}; it must be finite and positive")
    return table


def _check_name(column: str, name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        raise EventError(f"{column} is {name!r}; it must be a name of 1 to {MAX_NAME} characters")


def check_event(event: Event) -> Event:
    """Return `event` unchanged if it is one; a microsecond, where `check` takes a table's millisecond.

    Raises
    ------
    EventError
        A name is empty, the side unknown, the time no int, or a number not finite and positive.
    """
    for name in ("exchange", "symbol"):
        _check_name(name, getattr(event, name))
    if event.side not in SIDES:
        raise EventError(f"side is {event.side!r}; it must be one of {', '.join(SIDES)}: the side of the order")
    if not isinstance(event.ts_ms, int) or not 0 <= event.ts_ms < MAX_MS:
        raise EventError(f"ts_ms is {event.ts_ms!r}; it must be int milliseconds, 0 to {MAX_MS}")
    for name in _FLOATS:
        if not 0 < getattr(event, name) < float("inf"):
            raise EventError(f"{name} is {getattr(event, name)!r}; it must be finite and positive")
    if not 0 < event.price * event.size < float("inf"):
        raise EventError(f"price x size is {event.price * event.size!r}; it must be finite and positive")
    return event


def run_starts(*columns: NDArray[Any]) -> NDArray[np.intp]:
    """Return where a run of rows begins that are equal in all `columns`, which are arrays of one length."""
    new = np.zeros(len(columns[0]), dtype=bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(new)
