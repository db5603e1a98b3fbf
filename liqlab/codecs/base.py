"""What every codec is: events in, rows of a stream out, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from liqlab.events import MAX_MS, MAX_NAME, SIDES, Columns, Event

if TYPE_CHECKING:
    from liqlab.codecs.names import Names

Value = str | bytes
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Column = Sequence[Value] | Ints
Floats = NDArray[np.float64]
Rows = NDArray[np.intp]


class CodecError(ValueError):
    """Events cannot be encoded, or bytes are not what a codec wrote; the message names which and why."""


class Codec(ABC):
    """Events <-> rows of values, one value for each of `fields`.

    Attributes
    ----------
    name : str
        What settings call it.
    fields : tuple of str
        The fields of a stream entry. The first one tells the codecs apart, so no two codecs share it.
    block : bool
        Whether all events become one row; else each has a row of its own.
    own_time : bool
        Whether rows carry the times of their events; else the IDs of the entries must.
    longest : int
        Bytes of a value; what encoders write is shorter, what is longer is not looked at.
    """

    name: str
    fields: tuple[str, ...]
    block = False
    own_time = True
    longest = 1 << 14

    def fields_of(self, own: bool) -> tuple[str, ...]:
        """Return the fields of the rows that `encode` makes with this `own`."""
        return self.fields

    def carries(self, events: Columns) -> Bools:
        """Return which events, shape (n,), come back with the price and size that they have now, bit for bit."""
        return possible(events) & self._fit(events)[0]

    def encode(self, events: Columns, names: Names, *, own: bool = False) -> list[list[Value]]:
        """Return the rows.

        Parameters
        ----------
        events : Columns
            Of a codec with `block`, in time order.
        names : Names
            Is given the names that it lacks, where the codec writes numbers.
        own : bool
            Whether the reader knows the symbol from the key, so that it need not be written.

        Raises
        ------
        CodecError
            An event is not carried; the message shows it.
        """
        columns = [_texts(column) for column in self.encode_columns(events, names, own=own)]
        return list(map(list, zip(*columns, strict=True)))

    def encode_columns(self, events: Columns, names: Names, *, own: bool = False) -> Sequence[Column]:
        """Return what `encode` does, as one sequence a field; a field of integers as an array of them."""
        if not len(events):
            return [()] * len(self.fields_of(own))
        carried, fit = self._fit(events)
        check(self.name, events, possible(events) & carried)
        return self._encode(events, fit, names, own)

    def sizer(self, events: Columns, names: Names) -> Callable[[Rows], tuple[int, Callable[[], bytes]]]:
        """Return what says of some rows how many bytes a block of them takes, to a word, and what makes the block.

        Many choices of rows can be tried: what does not depend on them is done once, and the block is only made where
        it is called for, where that is the larger part.

        Raises
        ------
        CodecError
            As `encode`.
        """

        def sized(rows: Rows) -> tuple[int, Callable[[], bytes]]:
            ((block,),) = self.encode(events.rows(rows), names)
            assert isinstance(block, bytes)
            return len(block), lambda: block

        return sized

    def decode(self, ts_ms: Ints, rows: Sequence[Sequence[bytes]], names: Names, *, own: str | None = None) -> Columns:
        """Return the events of `rows`, whose IDs carry the times `ts_ms`; `notional` is price x size.

        `rows` are as `encode` made them, or hostile. With `own`, all events are of that symbol.

        Raises
        ------
        CodecError
            A row is not one that this codec wrote.
        """
        if not rows:
            none, no = np.zeros(0, np.int64), np.zeros(0)
            return Columns(none, none, none, none, no, no, no, [], [])
        if not self.own_time and len(ts_ms) != len(rows):
            raise CodecError(f"{self.name}: {len(ts_ms)} times for {len(rows)} rows")
        widths = set(map(len, rows))
        if len(widths) > 1:
            raise CodecError(f"{self.name}: rows of {sorted(widths)[:5]} values; the fields are {self.fields}")
        return self.decode_columns(ts_ms, list(zip(*rows, strict=True)), names, own=own)

    def decode_columns(
        self, ts_ms: Ints, columns: list[tuple[bytes, ...]], names: Names, *, own: str | None = None
    ) -> Columns:
        """Return what `decode` does, of one sequence a field, all of the same length and not empty."""
        if len(columns) not in {len(self.fields_of(False)), len(self.fields_of(own is not None))}:
            raise CodecError(f"{self.name}: rows of {len(columns)} values; the fields are {self.fields}")
        longest = max(max(map(len, column)) for column in columns)
        if longest > self.longest:
            raise CodecError(f"{self.name}: a value of {longest} bytes; {self.longest} are possible")
        return self._decode(ts_ms, columns, names, own)

    @abstractmethod
    def _fit(self, events: Columns) -> tuple[Bools | bool, Any]:
        """Return which events come back bit for bit, and what `_encode` needs of the way there."""

    @abstractmethod
    def _encode(self, events: Columns, fit: Any, names: Names, own: bool) -> Sequence[Column]: ...

    @abstractmethod
    def _decode(self, ts_ms: Ints, columns: list[tuple[bytes, ...]], names: Names, own: str | None) -> Columns: ...


def _texts(column: Column) -> Sequence[Value]:
    if not isinstance(column, np.ndarray):
        return column
    # Three times as fast as str().
    return orjson.dumps(column, option=orjson.OPT_SERIALIZE_NUMPY).decode()[1:-1].split(",") if len(column) else ()


def check(codec: str, events: Columns, carried: Bools) -> None:
    """Refuse events that a codec does not carry, and names that no decoder would take.

    Raises
    ------
    CodecError
        With the first such event, or name, in its message.
    """
    if not carried.all():
        row = int(carried.argmin())
        one = events.rows(slice(row, row + 1))
        event = Event(
            int(one.ts_ms[0]),
            events.exchanges[int(one.exchange[0])],
            events.symbols[int(one.symbol[0])],
            SIDES[int(one.side[0])],
            *(float(column[0]) for column in (one.price, one.size, one.notional)),
        )
        cure = "`fields` carries it" if possible(one).all() else "no codec does: it is no event"
        raise CodecError(f"{codec}: cannot carry row {row}, {event}; {cure}")
    check_names(codec, (*events.exchanges, *events.symbols))


def check_names(codec: str, names: Collection[str]) -> None:
    """Raise CodecError unless each can be the name of a symbol or an exchange."""
    lengths = set(map(len, names))
    if 0 in lengths or max(lengths, default=0) > MAX_NAME:
        name = next(name for name in names if not 0 < len(name) <= MAX_NAME)
        raise CodecError(f"{codec}: the name {name[:40]!r} has {len(name)} characters; 1 to {MAX_NAME} can be")
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise CodecError(f"{codec}: a name is no text: {error}") from None


def possible(events: Columns) -> Bools:
    """Return which events have a time, a price, a size and a product of the two that can be: what `decoded` takes."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        notional = events.price * events.size
    result: Bools = (events.ts_ms >= 0) & (events.ts_ms < MAX_MS)
    for values in (events.price, events.size, notional):
        result &= (values > 0) & (values < np.inf)
    return result


def decoded(
    codec: str,
    ints: Sequence[Ints],
    floats: Sequence[Floats],
    exchanges: Iterable[str],
    symbols: Iterable[str],
) -> Columns:
    """Return decoded columns, `notional` computed, after a check of every value.

    Parameters
    ----------
    codec : str
        For the message.
    ints : sequence of array, shape (n,)
        Times, exchanges, symbols, sides.
    floats : sequence of array, shape (n,)
        Prices and sizes.
    exchanges, symbols : iterable of str
        By number.

    Raises
    ------
    CodecError
        A value cannot be one of an event; the message has the row and the value.
    """
    ts_ms, exchange, symbol, side = ints
    price, size = floats
    exchanges, symbols = list(exchanges), list(symbols)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        notional = price * size
    ranges: tuple[tuple[str, NDArray[Any], float], ...] = (
        ("time", ts_ms, MAX_MS),
        ("exchange number", exchange, len(exchanges)),
        ("symbol number", symbol, len(symbols)),
        ("side", side, len(SIDES)),
    )
    for what, values, end in ranges:
        _all(codec, what, values, (values >= 0) & (values < end))
    for what, values in (("price", price), ("size", size), ("notional", notional)):
        _all(codec, what, values, (values > 0) & (values < np.inf))
    return Columns(ts_ms, exchange, symbol, side, price, size, notional, exchanges, symbols)


def _all(codec: str, what: str, values: NDArray[Any], good: Bools) -> None:
    if not good.all():
        row = int(good.argmin())
        raise CodecError(f"{codec}: event {row} has the {what} {values[row]}, which cannot be")


def numbers_of(codes: NDArray[np.integer[Any]], names: Sequence[str], of: Callable[[Sequence[str]], Ints]) -> Ints:
    """Return the number of each event's symbol or exchange; `of` is `Names.of_symbols` or `Names.of_exchanges`."""
    counts = np.bincount(codes, minlength=len(names))
    used = np.flatnonzero(counts)
    # Small numbers take fewer bytes, so of several new names the busiest comes first.
    used = used[np.argsort(-counts[used], kind="stable")]
    table = np.zeros(len(names), np.int64)
    table[used] = of([names[code] for code in used.tolist()])
    numbers: Ints = table[codes]
    return numbers
