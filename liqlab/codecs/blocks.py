"""Codecs of one entry for many events."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import msgpack
import numpy as np
from numpy.typing import NDArray

from liqlab.codecs.base import (
    Bools,
    Codec,
    CodecError,
    Floats,
    Ints,
    Rows,
    Value,
    check,
    decoded,
    numbers_of,
    possible,
)
from liqlab.codecs.entries import MSGPACK_LIMITS, maps_of, of_maps
from liqlab.codecs.entropy import Packer, Unpacker
from liqlab.codecs.names import Names
from liqlab.codecs.numbers import (
    EXACT,
    HIGHEST,
    POWERS,
    Scaled,
    Sizes,
    scaled,
    scaled_sizes,
    unscaled,
    unscaled_sizes,
)
from liqlab.events import COLUMNS, MAX_MS, Columns

MAX_EVENTS: Final = 1 << 15  # of one block
MAX_PLAIN: Final = 1 << 22  # bytes of one block, decompressed

_PLAIN, _ZLIB = b"\x00", b"\x01"


def check_count(codec: str, count: int) -> None:
    """Raise CodecError unless a block can have so many events."""
    if not 0 < count <= MAX_EVENTS:
        raise CodecError(f"{codec}: a block of {count} events; 1 to {MAX_EVENTS} are possible")


class MsgpackZlib(Codec):
    """The original's batches: a msgpack list of maps, compressed above 10 events where that saves more than 10 %."""

    name = "msgpack-zlib"
    fields = ("k",)
    block = True
    longest = MAX_PLAIN

    def _fit(self, events: Columns) -> tuple[bool, None]:
        return True, None

    def _encode(self, events: Columns, fit: None, names: Names, own: bool) -> list[list[Value]]:
        check_count(self.name, len(events))
        plain: bytes = msgpack.packb(list(maps_of(events)))
        if len(plain) > MAX_PLAIN:
            raise CodecError(f"{self.name}: {len(events)} events take {len(plain)} bytes; {MAX_PLAIN} are possible")
        if len(events) > 10:
            small = zlib.compress(plain, 1)
            if len(small) < 0.9 * len(plain):
                return [[_ZLIB + small]]
        return [[_PLAIN + plain]]

    def _decode(self, ts_ms: Ints, columns: list[tuple[bytes, ...]], names: Names, own: str | None) -> Columns:
        return of_maps(self.name, self._maps(columns[0]), own)

    def _maps(self, payloads: Iterable[bytes]) -> Iterator[Any]:
        for payload in payloads:
            kind, plain = payload[:1], payload[1:]
            if kind == _ZLIB:
                plain = inflate(self.name, plain, MAX_PLAIN)
            elif kind != _PLAIN:
                raise CodecError(f"{self.name}: kind {kind!r}; the kinds are 0 and 1")
            unpacker = msgpack.Unpacker(max_buffer_size=MAX_PLAIN, **MSGPACK_LIMITS)
            unpacker.feed(plain)
            try:
                count = unpacker.read_array_header()
                check_count(self.name, count)
                for _ in range(count):
                    yield unpacker.unpack()
                if unpacker.tell() != len(plain):
                    raise CodecError(f"{self.name}: {len(plain) - unpacker.tell()} bytes behind the last event")
            except CodecError:
                raise
            except (ValueError, msgpack.exceptions.UnpackException) as error:
                raise CodecError(f"{self.name}: {type(error).__name__}: {str(error)[:200]}") from None


def inflate(codec: str, data: bytes, limit: int) -> bytes:
    """Return decompressed zlib data of at most `limit` bytes, or raise CodecError."""
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, limit)
    except zlib.error as error:
        raise CodecError(f"{codec}: {error}") from None
    if not inflater.eof or inflater.unused_data:
        raise CodecError(f"{codec}: zlib data ends early, goes on behind its end or holds more than {limit} bytes")
    return plain


_HEAD: Final = struct.Struct(">BHHIHII")  # version, events, first time (2 + 4), last time (2 + 4), bytes of the runs
_VERSION: Final = 2  # 1 had one state for all runs, before 0.1.0
_Fit = tuple[Scaled, Sizes]  # prices and sizes as a block stores them
_LONG: Final = 1 << 40  # a mantissa from here on takes as much as the float64 that it stands for
_GROUPS: Final = 4
_SQRT: Final = 44  # twice the logarithm of how far prices go: chosen on recordings, any would decode


def block_span(payload: bytes) -> tuple[int, int, int]:
    """Return the number of events, the first and the last time (ms) of a `block`, from its header alone.

    Raises
    ------
    CodecError
        The header is not one of a block.
    """
    if len(payload) < _HEAD.size:
        raise CodecError(f"block: {len(payload)} bytes are no block")
    version, count, *parts, _ = _HEAD.unpack_from(payload)
    first, last = parts[0] << 32 | parts[1], parts[2] << 32 | parts[3]
    if version != _VERSION or not first <= last < MAX_MS:
        raise CodecError(f"block: version {version}, from {first} to {last} ms")
    check_count("block", count)
    return count, first, last


class Block(Codec):
    """Columns, each as what is new in it, entropy-coded."""

    name = "block"
    fields = ("b",)
    block = True
    longest = MAX_PLAIN

    def _fit(self, events: Columns) -> tuple[bool, _Fit]:
        size = scaled_sizes(events.size, events.price, limit=_LONG)
        return True, (scaled(events.price, limit=_LONG), size)

    def _encode(self, events: Columns, fit: _Fit, names: Names, own: bool) -> list[list[Value]]:
        return [[self._finished(events, self._packed(events, fit, names, own))]]

    def sizer(self, events: Columns, names: Names) -> Callable[[Rows], tuple[int, Callable[[], bytes]]]:
        """As that of every codec; how long a block is, is known before the entropy coder is run."""
        check(self.name, events, possible(events))
        _, (price, size) = self._fit(events)

        def sized(rows: Rows) -> tuple[int, Callable[[], bytes]]:
            part = events.rows(rows)
            pack = self._packed(part, (price.rows(rows), size.rows(rows)), names, own=False)
            return _HEAD.size + pack.length, lambda: self._finished(part, pack)

        return sized

    def _finished(self, events: Columns, pack: Packer) -> bytes:
        runs, data = pack.finish()
        times = [int(time) >> shift & 0xFFFFFFFF for time in (events.ts_ms[0], events.ts_ms[-1]) for shift in (32, 0)]
        return _HEAD.pack(_VERSION, len(events), *times, runs) + data

    def _packed(self, events: Columns, fit: _Fit, names: Names, own: bool) -> Packer:
        check_count(self.name, len(events))
        steps = np.diff(events.ts_ms, prepend=events.ts_ms[:1])
        if int(steps.min()) < 0:
            raise CodecError(f"{self.name}: row {int(steps.argmin())} is earlier than the one before it")
        pack = Packer()
        pack.numbers(steps)

        symbol = np.int64(0) if own else numbers_of(events.symbol, events.symbols, names.of_symbols)
        exchange = numbers_of(events.exchange, events.exchanges, names.of_exchanges)
        pairs, pair = np.unique(exchange << 16 | symbol, return_inverse=True)
        pack.scalar(len(pairs))
        pack.numbers(np.diff(pairs, prepend=0))
        pack.tokens(pair)
        side = events.side.astype(np.int64)
        pack.tokens(side ^ np.concatenate([[0], side[:-1]]))

        price, size = fit
        quotes, ticks, good = _common(pair, len(pairs), *price)
        _pack_verbatim(pack, events.price, good)
        worth = _pack_prices(pack, pair[good], quotes[good], ticks, events.ts_ms[good], side[good])

        inverse = 2 * np.bincount(pair, size.inverse, len(pairs)) > np.bincount(pair, minlength=len(pairs))
        found = size.found & (size.inverse == inverse[pair])
        lots, places, good = _common(pair, len(pairs), size.mantissa, size.exponent, found)
        _pack_verbatim(pack, events.size, good)
        _pack_sizes(pack, pair[good], lots[good], places, inverse, ticks, worth)
        return pack

    def _decode(self, ts_ms: Ints, columns: list[tuple[bytes, ...]], names: Names, own: str | None) -> Columns:
        symbols = names.symbols if own is None else [own]
        blocks = [self._block(payload, names.exchanges, symbols) for payload in columns[0]]
        if len(blocks) == 1:
            return blocks[0]
        joined = {name: np.concatenate([getattr(one, name) for one in blocks]) for name in COLUMNS}
        return Columns(**joined, exchanges=blocks[0].exchanges, symbols=blocks[0].symbols)

    def _block(self, payload: bytes, exchanges: Sequence[str], symbols: Sequence[str]) -> Columns:
        count, first, last = block_span(payload)
        runs = _HEAD.size + int(_HEAD.unpack_from(payload)[-1])
        if runs > len(payload):
            raise CodecError(f"{self.name}: {len(payload)} bytes, whose runs alone end at {runs}")
        unpack = Unpacker(self.name, payload[_HEAD.size : runs], payload[runs:])
        # Should the sum overflow, it passes through what is no time on its way: `decoded` refuses that.
        ts_ms = first + np.cumsum(unpack.numbers(count))
        if ts_ms[0] != first or ts_ms[-1] != last:
            raise CodecError(f"{self.name}: the times do not go from {first} to {last} ms")

        pairs = np.cumsum(unpack.numbers(unpack.scalar(count)))
        pair = unpack.tokens(count)
        if int(pair.max()) >= len(pairs):
            raise CodecError(f"{self.name}: symbol {int(pair.max())} of {len(pairs)}")
        side = np.bitwise_xor.accumulate(unpack.tokens(count))

        price, fit = _unpack_verbatim(unpack, count)
        price[fit], ticks, worth = _unpack_prices(unpack, pair[fit], len(pairs), ts_ms[fit], side[fit])
        size, fit = _unpack_verbatim(unpack, count)
        size[fit] = _unpack_sizes(unpack, pair[fit], ticks, worth, price[fit])
        unpack.finish()
        at = pairs[pair]
        return decoded(self.name, (ts_ms, at >> 16, at & 0xFFFF, side), (price, size), exchanges, symbols)


def _common(pair: Ints, count: int, mantissa: Ints, exponent: Ints, found: Bools) -> tuple[Ints, Ints, Bools]:
    """Return mantissas at the largest exponent of their pair, these exponents, and which mantissas stay exact."""
    top = np.zeros(count, np.int64)
    np.maximum.at(top, pair[found], exponent[found])
    common = mantissa * POWERS[top[pair] - exponent]
    fit = found & (common < EXACT)
    return np.where(fit, common, 0).astype(np.int64), top, fit


def _pack_verbatim(pack: Packer, values: Floats, fit: Bools) -> None:
    rows = np.flatnonzero(~fit)
    pack.scalar(len(rows))
    pack.numbers(np.diff(rows, prepend=0))
    words = values[rows].view(np.int64)
    pack.bits(words >> 32, 32)
    pack.bits(words & 0xFFFFFFFF, 32)


def _unpack_verbatim(unpack: Unpacker, count: int) -> tuple[Floats, Bools]:
    rows = np.cumsum(unpack.numbers(unpack.scalar(count)))
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise CodecError(f"block: verbatim values beyond event {count}")
    wide = np.full(len(rows), 32)
    words = unpack.bits(wide) << 32 | unpack.bits(wide)
    values, fit = np.zeros(count), np.ones(count, np.bool_)
    values[rows], fit[rows] = words.view(np.float64), False
    return values, fit


def _grouped(pair: Ints) -> tuple[NDArray[np.intp], Bools]:
    """Return the order that puts events of a pair together, and which of them are then the first of theirs."""
    order = np.argsort(pair, kind="stable")
    return order, np.diff(pair[order], prepend=-1) != 0


def _expected(start: Ints, wait: Ints) -> Iterator[tuple[Bools, Ints]]:
    """Yield groups of price steps by how far the price is likely to have gone: rows, and their bits without pattern.

    Prices wander: as the price itself and as the square root of the time. Nothing but multiplication and the exponent
    of a float64, so that every machine finds the same groups.
    """
    level = (np.frexp(start.astype(np.float64) * start * (wait + 400.0))[1].astype(np.int64) - _SQRT) // 2
    for group in range(1 - _GROUPS, 1):
        rows = np.clip(level, 1 - _GROUPS, 0) == group
        yield rows, np.clip(level[rows] - 1, 0, 50)


def _pack_prices(pack: Packer, pair: Ints, quotes: Ints, ticks: Ints, ts_ms: Ints, side: Ints) -> Floats:
    """Return the first price of each pair, 1 where there is none."""
    order, opens = _grouped(pair)
    quotes, pair, more = quotes[order], pair[order], ~opens
    pack.tokens(ticks[pair[opens]])
    pack.numbers(quotes[opens])
    steps = np.diff(quotes, prepend=0)[more]
    starts = quotes[opens][np.cumsum(opens) - 1][more]
    for rows, low in _expected(starts, np.diff(ts_ms[order], prepend=0)[more]):
        pack.numbers(np.abs(steps[rows]), low=low)
    moved = steps != 0
    pack.tokens((steps[moved] < 0) ^ side[order][more][moved])
    worth = np.ones(len(ticks))
    worth[pair[opens]] = unscaled(quotes[opens], ticks[pair[opens]])
    return worth


def _unpack_prices(unpack: Unpacker, pair: Ints, count: int, ts_ms: Ints, side: Ints) -> tuple[Floats, Ints, Floats]:
    order, opens = _grouped(pair)
    pair, more = pair[order], ~opens
    ticks = np.zeros(count, np.int64)
    ticks[pair[opens]] = _exponents(unpack.tokens(int(opens.sum())))
    first = unpack.numbers(int(opens.sum()))
    number = np.cumsum(opens) - 1
    steps = np.zeros(int(more.sum()), np.int64)
    for rows, low in _expected(first[number][more], np.diff(ts_ms[order], prepend=0)[more]):
        steps[rows] = unpack.numbers(int(rows.sum()), low=low)
    moved = steps != 0
    down = unpack.tokens(int(moved.sum())) ^ side[order][more][moved]
    steps[moved] = np.where(down == 1, -steps[moved], steps[moved])
    # Sums may overflow on the way, but come back right where all prices are possible; `decoded` refuses others.
    sums = np.zeros(len(pair), np.int64)
    sums[more] = steps
    sums = np.cumsum(sums)
    quotes = first[number] + sums - sums[opens][number]
    price = np.empty(len(pair))
    price[order] = unscaled(quotes, ticks[pair])
    worth = np.ones(count)
    worth[pair[opens]] = unscaled(first, ticks[pair[opens]])
    return price, ticks, worth


def _exponents(values: Ints) -> Ints:
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= HIGHEST:
        raise CodecError(f"block: exponents of {int(values.min())} to {int(values.max())}")
    return values


def _scale(worth: Floats, inverse: Bools, places: Ints) -> Ints:
    """Return twice the logarithm of what one lot is worth, so that sizes of all pairs share one table of notionals."""
    lot = unscaled(np.where(inverse, 1.0, worth), places)
    return np.frexp(lot * lot)[1].astype(np.int64) + 256


def _pack_sizes(pack: Packer, pair: Ints, lots: Ints, places: Ints, inverse: Bools, ticks: Ints, worth: Floats) -> None:
    there = np.unique(pair)
    # The finer the price, the coarser the size.
    pack.tokens((places + np.where(inverse, 32, np.minimum(ticks, 4)))[there])
    pack.numbers(lots, offset=_scale(worth, inverse, places)[pair])


def _unpack_sizes(unpack: Unpacker, pair: Ints, ticks: Ints, worth: Floats, price: Floats) -> Floats:
    there = np.unique(pair)
    code = np.zeros(len(ticks), np.int64)
    code[there] = unpack.tokens(len(there))
    inverse = code >= 32
    places = np.zeros(len(ticks), np.int64)
    places[there] = _exponents((code - np.where(inverse, 32, np.minimum(ticks, 4)))[there])
    lots = unpack.numbers(len(pair), offset=_scale(worth, inverse, places)[pair])
    return unscaled_sizes(lots, places[pair], inverse[pair], price)
