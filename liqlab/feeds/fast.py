"""Binance frames at full speed: lines that differ only in their values are read as columns, not one by one.

The block's first line is a template: stretches of keys and punctuation of known length, between them strings of any
content, and in the stretches some whole numbers. The quotation marks of a line say where its strings are. A line counts
only if every stretch is, byte for byte, what the template has there; then JSON could not read it differently, and its
values are taken from the columns. All other lines are left to the JSON parser. `tests/test_feeds_fast.py` compares the
two ways on mutated lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np
import orjson
import pyarrow as pa

from liqlab.feeds.normalise import positive
from liqlab.feeds.rows import NO_SIDE, Rows, order_side, to_ms
from liqlab.feeds.venues import text

_NUMBER: Final = re.compile(rb"([1-9]\d*)[,}]")
_STRINGS: Final = frozenset({"stream", "s", "S", "q", "p", "ap", "l", "z", "ps"})  # the rest is always the same
_NUMBERS: Final = frozenset({"E", "T", "st"})
_QUOTE: Final = ord('"')
_NEWLINE: Final = ord("\n")
_MAX_QUOTES: Final = 80
_MAX_VALUE: Final = 64  # bytes of a symbol or a number
_MAX_DIGITS: Final = 15  # a float64 holds them exactly
_POWERS: Final = 10.0 ** np.arange(_MAX_DIGITS - 1, -1, -1)


@dataclass(frozen=True)
class _Stretch:
    """Bytes of known length; `numbers` are the (key, first, last) of digits that may vary, as offsets into them."""

    literal: bytes
    numbers: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class _Template:
    """`stretches[i]` lies before the i-th string that may vary; `marks[i]` is the number of its opening quote."""

    quotes: int
    stretches: tuple[_Stretch, ...]
    names: tuple[str, ...]
    marks: tuple[int, ...]
    width: int


def _template(line: bytes) -> _Template | None:
    try:
        message = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    frame = message.get("data") if isinstance(message, dict) and "stream" in message else message
    order = frame.get("o") if isinstance(frame, dict) and frame.get("e") == "forceOrder" else None
    quotes = [at for at, code in enumerate(line) if code == _QUOTE]
    if not isinstance(order, dict) or len(quotes) > _MAX_QUOTES:
        return None
    stretches: list[_Stretch] = []
    names: list[str] = []
    marks: list[int] = []
    numbers: list[tuple[str, int, int]] = []
    counted: list[str] = []
    key, start = "", 0
    for mark in range(0, len(quotes), 2):
        opening, closing = quotes[mark : mark + 2]
        if line[closing + 1 : closing + 2] == b":":
            key = line[opening + 1 : closing].decode()
            number = _NUMBER.match(line, closing + 2)
            if number and key in _NUMBERS and len(number[1]) <= _MAX_DIGITS:
                numbers.append((key, number.start(1) - start, number.end(1) - start))
                counted.append(key)
        elif key in _STRINGS:
            stretches.append(_Stretch(line[start : opening + 1], tuple(numbers)))
            names.append(key)
            marks.append(mark)
            start, numbers = closing, []
    stretches.append(_Stretch(line[start:], tuple(numbers)))
    sound = (
        len({*names, *counted}) == len(names) + len(counted)  # of two equal keys JSON takes the last
        and all(isinstance(order.get(name), str) and name in names for name in ("s", "S", "ap", "z"))
        and all(type(order.get(name)) is int for name in {"T", *counted} - {"E"})
        and "T" in counted
    )
    return _Template(len(quotes), tuple(stretches), tuple(names), tuple(marks), len(line)) if sound else None


def read(data: bytes, first_line: int, exchange: str | None) -> tuple[Rows, list[int]] | None:
    """Read the lines that fit the template.

    Parameters
    ----------
    data : bytes
        Whole lines.
    first_line : int
        The number of the first of them.
    exchange : str or None
        The venue, if not Binance.

    Returns
    -------
    tuple of Rows and list of int, or None
        The rows, and the offsets (from 0) of the lines that are left to the JSON parser. None where all are.
    """
    template = _template(data[: data.find(b"\n") + 1 or len(data)].rstrip(b"\n"))
    if template is None or not _readable(data):
        return None
    # The padding lets a window of any width start at the last byte.
    codes = np.frombuffer(data + b"\n" * (max(_MAX_VALUE, template.width) + 1), np.uint8)
    body = codes[: len(data)]
    ends = np.flatnonzero(body == _NEWLINE)
    if not data.endswith(b"\n"):
        ends = np.append(ends, len(data))
    starts = np.append(0, ends[:-1] + 1)
    quotes = np.flatnonzero(body == _QUOTE)
    lines, marks = _marks(quotes, starts, ends, template.quotes)
    numbers: dict[str, np.ndarray] = {}
    fits = np.ones(len(lines), bool)
    # Where each stretch ends and the next begins, a contiguous row a mark.
    opening = [*(np.ascontiguousarray(marks[:, mark]) + 1 for mark in template.marks), ends[lines]]
    closing = [starts[lines], *(np.ascontiguousarray(marks[:, mark + 1]) for mark in template.marks)]
    for stretch, begin, end in zip(template.stretches, closing, opening, strict=True):
        fits &= end - begin == len(stretch.literal)
    for stretch, begin in zip(template.stretches, closing, strict=True):
        fits &= _matches(codes, begin, stretch, numbers)
    values = {name: (closing[at + 1], opening[at]) for at, name in enumerate(template.names)}
    for name in ("s", "S", "ap", "z"):
        end, begin = values[name]
        fits &= end - begin <= _MAX_VALUE
    kept = np.flatnonzero(fits)
    cells = {name: _strings(codes, values[name][1][kept], values[name][0][kept]) for name in ("s", "S", "ap", "z")}
    try:
        price, size = (cells[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in ("ap", "z"))
    except pa.ArrowInvalid:
        return None
    symbols, symbol = _coded(cells["s"])
    sides, side = _coded(cells["S"])
    # Without a fill the order's own price and quantity count, without a symbol the caller's: the exact path knows.
    good = positive(price) & positive(size) & np.array([bool(text(name)) for name in symbols], bool)[symbol]
    kept = kept[good]
    venue = exchange or "binance"
    keys: list[tuple[str, str, str | None]] = [(venue, name, None) for name in symbols]
    key = symbol[good]
    if "st" in numbers:
        keys += [(venue, name, "contracts") for name in symbols]
        key = key + (numbers["st"][kept] == 2) * len(symbols)
    present = np.bincount(key, minlength=len(keys)) > 0
    used, key = np.flatnonzero(present), (np.cumsum(present) - 1)[key]
    rows = Rows(
        line=lines[kept] + first_line,
        keys=[keys[code] for code in used],
        key=key,
        side=np.array([order_side(name) for name in sides] or [NO_SIDE], np.int8)[side[good]],
        ts_ms=_ms(numbers["T"][kept].astype(np.int64)),
        price=price[good],
        quantity=size[good],
    )
    left = np.ones(len(starts), bool)
    left[lines[kept]] = False
    return rows, np.flatnonzero(left).tolist()


def _marks(quotes: np.ndarray, starts: np.ndarray, ends: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which lines have `count` quotation marks, and where: shapes (n,) and (n, count)."""
    if len(quotes) == count * len(starts):
        marks = quotes.reshape(-1, count)
        if (marks[:, 0] >= starts).all() and (marks[:, -1] < ends).all():
            return np.arange(len(starts)), marks
    at = np.searchsorted(quotes, starts)
    lines = np.flatnonzero(np.diff(np.append(at, len(quotes))) == count)
    return lines, quotes[at[lines][:, None] + np.arange(count)]


def _readable(data: bytes) -> bool:
    # Escapes would hide quotation marks; control characters and broken UTF-8 are no JSON.
    if b"\\" in data:
        return False
    codes = np.frombuffer(data, np.uint8)
    if np.count_nonzero(codes < 32) != np.count_nonzero(codes == _NEWLINE):
        return False
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError:
            return False
    return True


def _window(codes: np.ndarray, begin: np.ndarray, width: int) -> np.ndarray:
    """Return the `width` bytes from each of `begin`, as fixed-width byte strings."""
    return np.asarray(np.ndarray((len(codes) - width + 1,), f"S{width}", codes, strides=(1,))[begin])


def _matches(codes: np.ndarray, begin: np.ndarray, stretch: _Stretch, numbers: dict[str, np.ndarray]) -> np.ndarray:
    good = np.ones(len(begin), bool)
    done = 0
    for name, first, last in stretch.numbers:
        good &= _window(codes, begin + done, first - done) == stretch.literal[done:first]
        digits = _window(codes, begin + first, last - first).view(np.uint8).reshape(len(begin), last - first)
        figures = digits - np.uint8(48)  # wraps far above 9 for what is no digit
        if figures.max(initial=0) > 9:
            good &= (figures <= 9).all(axis=1)
        good &= figures[:, 0] != 0  # JSON knows no leading zero
        numbers[name] = figures.astype(np.float64) @ _POWERS[-figures.shape[1] :]
        done = last
    good &= _window(codes, begin + done, len(stretch.literal) - done) == stretch.literal[done:]
    return good


def _strings(codes: np.ndarray, begin: np.ndarray, end: np.ndarray) -> pa.StringArray:
    lengths = end - begin
    width = int(lengths.max(initial=1)) or 1
    cells = _window(codes, begin, width).view(np.uint8).reshape(len(begin), width)
    joined = cells[np.arange(width) < lengths[:, None]] if (lengths != width).any() else cells
    offsets = np.zeros(len(begin) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    buffers = [pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(joined))]
    return pa.StringArray.from_buffers(len(begin), *buffers)


def _coded(column: pa.StringArray) -> tuple[list[str], np.ndarray]:
    coded = column.dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)


def _ms(times: np.ndarray) -> np.ndarray:
    if len(times) and to_ms(int(times.min())) == times.min() and to_ms(int(times.max())) == times.max():
        return times
    return np.array([to_ms(int(time)) for time in times], np.int64)
