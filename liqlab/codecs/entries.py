"""Codecs of one entry an event."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, Final

import msgpack
import numpy as np
import orjson
import pyarrow as pa

from liqlab.codecs.base import Bools, Codec, CodecError, Ints, Value, check_names, decoded, numbers_of
from liqlab.codecs.names import Names
from liqlab.codecs.numbers import Scaled, Sizes, scaled, scaled_sizes, unscaled, unscaled_sizes
from liqlab.events import SIDES, Columns

KEYS: Final = ("symbol", "side", "size", "price", "timestamp", "exchange")
MSGPACK_LIMITS: Final[dict[str, Any]] = {
    "raw": False,
    "strict_map_key": True,
    "max_str_len": 1024,
    "max_bin_len": 0,
    "max_array_len": 0,
    "max_map_len": len(KEYS),
    "max_ext_len": 0,
}

_SELL: Final = SIDES.index("sell")
_PICK: Final = itemgetter(*KEYS)


def maps_of(events: Columns) -> Iterable[dict[str, Any]]:
    """Yield events in the original's form."""
    columns = zip(
        map(events.symbols.__getitem__, events.symbol.tolist()),
        map(SIDES.__getitem__, events.side.tolist()),
        events.size.tolist(),
        events.price.tolist(),
        events.ts_ms.tolist(),
        map(events.exchanges.__getitem__, events.exchange.tolist()),
        strict=True,
    )
    return (dict(zip(KEYS, values, strict=True)) for values in columns)


def of_maps(codec: str, maps: Iterable[Any], own: str | None) -> Columns:
    """Return the events of maps in the original's form; anything else is a CodecError."""
    # Arrays, not lists: a hostile block of the smallest possible maps must not take ten times its own size.
    ts_ms, exchange, symbol, side = (array("q") for _ in range(4))
    price, size = array("d"), array("d")
    exchanges: dict[str, int] = {}
    symbols: dict[str, int] = {}
    for row, one in enumerate(maps):
        try:
            name, way, volume, quote, when, venue = _PICK(one)
        except (KeyError, TypeError, IndexError):
            raise CodecError(f"{codec}: event {row} is no map of {', '.join(KEYS)}") from None
        kinds = type(name) is type(venue) is str and type(when) is int and {type(volume), type(quote)} <= {float, int}
        if not kinds or len(one) != len(KEYS) or way not in SIDES:
            raise CodecError(f"{codec}: event {row} is {str(one)[:200]}; the values are not those of an event")
        try:
            ts_ms.append(when)
            price.append(quote)
            size.append(volume)
        except OverflowError:
            raise CodecError(f"{codec}: event {row} has an integer that is too large: {str(one)[:200]}") from None
        exchange.append(exchanges.setdefault(venue, len(exchanges)))
        symbol.append(symbols.setdefault(name, len(symbols)))
        side.append(way == "sell")
    check_names(codec, (*exchanges, *symbols))
    check_own(codec, own, symbols)
    ints = [np.array(column, np.int64) for column in (ts_ms, exchange, symbol, side)]
    floats = [np.array(column, np.float64) for column in (price, size)]
    return decoded(codec, ints, floats, exchanges, symbols)


def check_own(codec: str, own: str | None, symbols: Iterable[str]) -> None:
    """Raise CodecError where decoded symbols are not the stream's own one."""
    if own is not None and any(symbol != own for symbol in symbols):
        raise CodecError(f"{codec}: events of {list(symbols)[:3]} in the stream of {own!r}")


class _Maps(Codec):
    """One map an event; `dump` and `load` are how it is spelled."""

    def __init__(self, name: str, field: str, dump: Callable[[Any], bytes], load: Callable[[bytes], Any]) -> None:
        self.name = name
        self.fields = (field,)
        self._dump = dump
        self._load = load

    def _fit(self, events: Columns) -> tuple[bool, None]:
        return True, None

    def _encode(self, events: Columns, fit: None, names: Names, own: bool) -> list[list[Value]]:
        return [list(map(self._dump, maps_of(events)))]

    def _decode(self, ts_ms: Ints, columns: list[tuple[bytes, ...]], names: Names, own: str | None) -> Columns:
        return of_maps(self.name, map(self._loaded, columns[0]), own)

    def _loaded(self, text: bytes) -> Any:
        try:
            return self._load(text)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise CodecError(f"{self.name}: {type(error).__name__}: {str(error)[:200]}") from None


def _load_msgpack(text: bytes) -> Any:
    return msgpack.unpackb(text, **MSGPACK_LIMITS)


class Fields(Codec):
    """The original's stream form: side, size, price, exchange, symbol as text; the time is the ID's."""

    name = "fields"
    fields = ("s", "z", "p", "e", "y")
    own_time = False

    def fields_of(self, own: bool) -> tuple[str, ...]:
        """Return the fields; a stream of one symbol leaves its name out."""
        return self.fields[:-1] if own else self.fields

    def _fit(self, events: Columns) -> tuple[bool, None]:
        return True, None

    def _encode(self, events: Columns, fit: None, names: Names, own: bool) -> list[list[Value]]:
        columns: list[Iterable[str]] = [
            map(("b", "s").__getitem__, events.side.tolist()),
            *(pa.array(values).cast(pa.string()).to_pylist() for values in (events.size, events.price)),
            map(events.exchanges.__getitem__, events.exchange.tolist()),
        ]
        if not own:
            columns.append(map(events.symbols.__getitem__, events.symbol.tolist()))
        return list(map(list, columns))

    def _decode(self, ts_ms: Ints, columns: list[tuple[bytes, ...]], names: Names, own: str | None) -> Columns:
        try:
            texts = [pa.array(column, pa.binary()).cast(pa.string()) for column in columns]
            size, price = (text.cast(pa.float64()).to_numpy(zero_copy_only=False) for text in texts[1:3])
            coded = [text.dictionary_encode() for text in (texts[0], *texts[3:])]
        except pa.ArrowException as error:
            raise CodecError(f"{self.name}: {str(error)[:200]}") from None
        codes = [np.asarray(one.indices.to_numpy(zero_copy_only=False), np.int64) for one in coded]
        letters, exchanges, *more = (one.dictionary.to_pylist() for one in coded)
        if not {"b", "s"}.issuperset(letters):
            raise CodecError(f"{self.name}: sides {letters[:3]} are not b and s")
        side = np.array([letter == "s" for letter in letters], np.int64)[codes[0]]
        symbol = codes[2] if more else np.zeros(len(side), np.int64)
        symbols = more[0] if more else [str(own)]
        check_names(self.name, (*exchanges, *symbols))
        check_own(self.name, own, symbols)
        return decoded(self.name, (ts_ms, codes[1], symbol, side), (price, size), exchanges, symbols)


class Integers(Codec):
    """Three integers an event, packed for the sizes in which a listpack holds integers; the time is the ID's."""

    name = "ints"
    fields = ("c", "p", "z")
    own_time = False

    _LOTS: Final = 5  # what `c` has for the size's exponent: 0 to 3 themselves, 4 for "in the low bits of z"
    _TICKS: Final = 8  # what `p` has for the price's: 1 to 7 themselves, 0 for "in the next four bits"
    _VENUES: Final = 7  # what a negative `c` has for exchanges: 1 to 7 as 0 to 6, 7 for "in the next seven bits"

    def _fit(self, events: Columns) -> tuple[Bools, tuple[Scaled, Sizes]]:
        price, size = scaled(events.price), scaled_sizes(events.size, events.price)
        return price.found & size.found, (price, size)

    def _encode(self, events: Columns, fit: tuple[Scaled, Sizes], names: Names, own: bool) -> list[Ints]:
        price, size = fit
        symbol = np.int64(0) if own else numbers_of(events.symbol, events.symbols, names.of_symbols)
        exchange = numbers_of(events.exchange, events.exchanges, names.of_exchanges)

        small = (size.exponent < self._LOTS - 1) & ~size.inverse
        z = np.where(small, size.mantissa, size.mantissa << 5 | size.inverse << 4 | size.exponent)
        c = symbol * self._LOTS + np.where(small, size.exponent, self._LOTS - 1)
        # The first exchange of the table is the only one of most; the others take the negative half.
        near = exchange <= self._VENUES
        other = np.where(near, c << 3 | exchange - 1, (c << 7 | exchange) << 3 | self._VENUES)
        c = np.where(exchange == 0, c, ~other)
        near = (price.exponent > 0) & (price.exponent < self._TICKS)
        p = np.where(near, price.mantissa << 3 | price.exponent, (price.mantissa << 4 | price.exponent) << 3)
        p = np.where(events.side == _SELL, -p, p)
        return [c, p, z]

    def _decode(self, ts_ms: Ints, columns: list[tuple[bytes, ...]], names: Names, own: str | None) -> Columns:
        try:
            c, p, z = (np.asarray(pa.array(v, pa.binary()).cast(pa.string()).cast(pa.int64())) for v in columns)
        except pa.ArrowException as error:
            raise CodecError(f"{self.name}: {str(error)[:200]}") from None
        side = (p < 0).astype(np.int64)
        p = np.abs(p)
        near = p & self._TICKS - 1
        price = unscaled(np.where(near > 0, p >> 3, p >> 7), np.where(near > 0, near, p >> 3 & 15))

        exchange = np.zeros(len(c), np.int64)
        if (c < 0).any():
            other, low = ~c, ~c & 7
            far = low == self._VENUES
            exchange = np.where(c >= 0, 0, np.where(far, other >> 3 & 127, low + 1))
            c = np.where(c >= 0, c, np.where(far, other >> 10, other >> 3))
        symbol, lots = np.divmod(c, self._LOTS)
        small = lots < self._LOTS - 1
        inverse = ~small & (z >> 4 & 1).astype(np.bool_)
        size = unscaled_sizes(np.where(small, z, z >> 5), np.where(small, lots, z & 15), inverse, price)
        symbols = names.symbols if own is None else [own]
        return decoded(self.name, (ts_ms, exchange, symbol, side), (price, size), names.exchanges, symbols)


class Struct19(Codec):
    """19 bytes an event: time 6, symbol 2, exchange and side 1, price 5, size 5."""

    name = "struct19"
    fields = ("d",)

    _WIDTHS: Final = (6, 2, 1, 5, 5)
    _BYTES: Final = sum(_WIDTHS)
    _PRICE: Final = 36  # bits of its mantissa; the exponent has the four above
    _SIZE: Final = 35  # likewise, with the flag of inverse contracts in between

    def _fit(self, events: Columns) -> tuple[Bools, tuple[Scaled, Sizes]]:
        price = scaled(events.price, limit=1 << self._PRICE)
        size = scaled_sizes(events.size, events.price, limit=1 << self._SIZE)
        return price.found & size.found, (price, size)

    def _encode(self, events: Columns, fit: tuple[Scaled, Sizes], names: Names, own: bool) -> list[list[Value]]:
        price, size = fit
        columns = (
            events.ts_ms,
            np.int64(0) if own else numbers_of(events.symbol, events.symbols, names.of_symbols),
            numbers_of(events.exchange, events.exchanges, names.of_exchanges) << 1 | events.side,
            price.exponent << self._PRICE | price.mantissa,
            (size.exponent << 1 | size.inverse) << self._SIZE | size.mantissa,
        )
        table = np.empty((len(events), self._BYTES), np.uint8)
        at = 0
        for column, width in zip(columns, self._WIDTHS, strict=True):
            wide = np.empty(len(events), ">i8")
            wide[:] = column
            table[:, at : at + width] = wide.view(np.uint8).reshape(-1, 8)[:, -width:]
            at += width
        text = table.tobytes()
        return [[text[at : at + self._BYTES] for at in range(0, len(text), self._BYTES)]]

    def _decode(self, ts_ms: Ints, columns: list[tuple[bytes, ...]], names: Names, own: str | None) -> Columns:
        lengths = set(map(len, columns[0]))
        if lengths != {self._BYTES}:
            raise CodecError(f"{self.name}: rows of {sorted(lengths)[:5]} bytes, not {self._BYTES}")
        table = np.frombuffer(b"".join(columns[0]), np.uint8).reshape(-1, self._BYTES)
        parts, at = [], 0
        for width in self._WIDTHS:
            wide = np.zeros((len(table), 8), np.uint8)
            wide[:, -width:] = table[:, at : at + width]
            parts.append(wide.view(">i8")[:, 0].astype(np.int64))
            at += width
        times, symbol, flags, p, z = parts
        price = unscaled(p & (1 << self._PRICE) - 1, p >> self._PRICE)
        inverse = (z >> self._SIZE & 1).astype(np.bool_)
        size = unscaled_sizes(z & (1 << self._SIZE) - 1, z >> self._SIZE + 1, inverse, price)
        symbols = names.symbols if own is None else [own]
        ints = (times, flags >> 1, symbol, flags & 1)
        return decoded(self.name, ints, (price, size), names.exchanges, symbols)


JSON: Final = _Maps("json", "j", orjson.dumps, orjson.loads)
MSGPACK: Final = _Maps("msgpack", "m", msgpack.packb, _load_msgpack)
