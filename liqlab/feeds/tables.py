"""Tables -> raw rows: CSV lines with and without a header, flat JSON objects, Parquet and DataFrames."""

from __future__ import annotations

import contextlib
import csv
import datetime as dt
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from liqlab.feeds import layouts
from liqlab.feeds.contracts import UNKNOWN, exchange_name, restored
from liqlab.feeds.layouts import Layout, MissingColumnsError
from liqlab.feeds.normalise import occurrences, positive
from liqlab.feeds.rows import NO_SIDE, NO_TIME, FeedError, Rows, number, order_side, position_side, to_ms
from liqlab.feeds.venues import POSITION_SIDE, text

_DIGIT: Final = re.compile(r"\d")
_HAS_ZONE: Final = re.compile(r"(?:Z|[+-]\d\d:?\d\d|UTC)\s*$", re.IGNORECASE)
_ARCHIVE_FILE: Final = re.compile(r"([A-Z0-9]+(?:_(?:PERP|\d{6}))?)-liquidationSnapshot", re.IGNORECASE)
_VENUE_NAMES: Final = re.compile(
    "binance|bybit|okx|bitmex|deribit|gate|htx|huobi|kraken|bitfinex|bitget|dydx|aster|hyperliquid"
)
_DELIMITERS: Final = ",\t;|"
_FEW: Final = 64  # below that Python is faster than a call to Arrow
_SCALES: Final = (1, 1_000, 1_000_000, 1_000_000_000)
Column = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Options:
    """What the caller says of a feed; None where the feed itself must say it."""

    symbol: str | None = None
    exchange: str | None = None
    columns: Mapping[str, str | int] | None = None
    unit: str | None = None
    zone: dt.tzinfo | None = None
    note: Callable[[str], None] = print


@dataclass
class TableRows:
    """What came out of some rows: raw columns by layout, (line, reason) of bad ones, and the headers met."""

    rows: list[tuple[str, Rows]] = field(default_factory=list)
    rejected: list[tuple[int, str]] = field(default_factory=list)
    headers: int = 0


class Table:
    """Reads the tables of one file; remembers the layouts that its headers and rows showed."""

    def __init__(self, file: str, options: Options) -> None:
        self._file = file
        self._options = options
        self.problem = ""
        self._delimiter = ""
        self._header: Layout | None = None
        self._by_width: dict[int, Layout] = {}
        self._by_keys: dict[tuple[str, ...], Layout | str] = {}
        self._tail: tuple[np.ndarray, ...] | None = None

    def read_lines(self, lines: Sequence[str], numbers: Sequence[int]) -> TableRows:
        """Read lines of delimited text; `numbers` are their line numbers in the file."""
        result = TableRows()
        if not self._delimiter:
            self._delimiter = max(_DELIMITERS, key=lambda mark: max(line.count(mark) for line in lines[:20]))
        pending: dict[int, list[tuple[int, list[str]]]] = {}
        for line, at in zip(lines, numbers, strict=True):
            row = self._split(line)
            if row is None:
                result.rejected.append((at, "not a row of a table"))
            elif (at == 1 or not _DIGIT.search(line)) and self._is_header(row, at):
                self._flush(pending, result)
                result.headers += 1
            else:
                pending.setdefault(len(row), []).append((at, row))
        self._flush(pending, result)
        return result

    def _split(self, line: str) -> list[str] | None:
        if '"' not in line:
            return line.split(self._delimiter)
        try:
            return next(csv.reader([line], delimiter=self._delimiter, strict=True), None)
        except csv.Error:
            return None

    def _is_header(self, row: list[str], at: int) -> bool:
        mapped = self._options.columns
        positions = mapped is not None and all(str(name).isdigit() for name in mapped.values())
        named = mapped is not None and not positions and {str(name) for name in mapped.values()} <= set(row)
        if not named and not layouts.looks_like_header(row):
            return False
        try:
            layout = layouts.of_header(row, mapped)
        except MissingColumnsError as error:
            if at == 1:  # fatal only if nothing below can be read either
                self.problem = (
                    f"{self._file}: no column for {error} in the header {self._delimiter.join(row)[:200]!r}; "
                    f'name it with columns={{"{error.targets[0]}": "..."}} (--map {error.targets[0]}=...)'
                )
            return False
        self._header = self._by_width[len(row)] = layout
        return True

    def _layout(self, width: int, rows: Sequence[tuple[int, list[str]]]) -> Layout | None:
        if width in self._by_width:
            return self._by_width[width]
        mapped = self._options.columns
        if mapped and self._header is None:
            try:
                layout: Layout | None = layouts.of_header([str(at) for at in range(width)], mapped)
            except (MissingColumnsError, FeedError):
                layout = None
        else:
            layout = next((found for _, row in rows[:100] if (found := layouts.of_row(row))), None)
            if layout is None and self._header is not None and _fits(self._header, width, rows):
                layout = self._header
                self._options.note(f"rows with {width} fields below a header of {layout.width}: the last were ignored")
        if layout is not None:
            self._by_width[width] = layout
        return layout

    def _flush(self, pending: dict[int, list[tuple[int, list[str]]]], result: TableRows) -> None:
        for width, rows in pending.items():
            layout = self._layout(width, rows)
            if layout is None:
                header = f", its header has {self._header.width}" if self._header else " and there is no header"
                reason = f"a row of {width} fields{header}; name the columns with columns= (--map)"
                result.rejected += [(at, "not a row of a table" if width < 3 else reason) for at, _ in rows]
            else:
                lines, values = zip(*rows, strict=True)
                columns = list(zip(*values, strict=True))
                result.rows.append((layout.name, self._rows(layout, columns, np.array(lines, np.int64))))
        pending.clear()

    def read_objects(self, objects: Sequence[tuple[int, dict[str, Any]]]) -> TableRows:
        """Read flat JSON objects, each with its line number, as rows whose keys are the header."""
        result = TableRows()
        groups: dict[tuple[str, ...], list[tuple[int, dict[str, Any]]]] = {}
        for at, item in objects:
            groups.setdefault(tuple(item), []).append((at, item))
        for keys, items in groups.items():
            layout = self._of_keys(keys)
            if isinstance(layout, str):
                result.rejected += [(at, layout) for at, _ in items]
            else:
                columns = [[item[key] for _, item in items] for key in keys]
                lines = np.array([at for at, _ in items], np.int64)
                result.rows.append((layout.name, self._rows(layout, columns, lines)))
        return result

    def _of_keys(self, keys: tuple[str, ...]) -> Layout | str:
        if keys not in self._by_keys:
            if len(self._by_keys) > 1000:  # only junk has so many shapes
                self._by_keys.clear()
            try:
                self._by_keys[keys] = layouts.of_header(keys, self._options.columns)
            except MissingColumnsError as error:
                known = error.found >= 2
                self._by_keys[keys] = (
                    f"no field for {error}; name it with columns= (--map)"
                    if known
                    else "not a liquidation message of any known venue"
                )
            except FeedError as error:
                self._by_keys[keys] = str(error)
        return self._by_keys[keys]

    def read_batch(self, batch: pa.RecordBatch, start: int) -> TableRows:
        """Read a batch of Arrow columns; rows are numbered from `start`.

        Raises
        ------
        FeedError
            Columns that an event needs are not there.
        """
        try:
            layout = layouts.of_header(batch.schema.names, self._options.columns)
        except MissingColumnsError as error:
            raise FeedError(
                f"{self._file}: no column for {error} among {', '.join(batch.schema.names)}; "
                f'name it with columns={{"{error.targets[0]}": "..."}} (--map {error.targets[0]}=...)'
            ) from None
        columns = [_plain(column, self._options.zone) for column in batch.columns]
        return TableRows([(layout.name, self._rows(layout, columns, np.arange(start, start + len(batch))))])

    def _rows(self, layout: Layout, columns: Sequence[Column], lines: np.ndarray) -> Rows:
        count = len(lines)
        exchanges = self._exchanges(layout, columns, count)
        symbols = self._symbols(layout, columns, count)
        if layout.name == "table" or layout.name.startswith("binance"):
            pairs = list(zip(symbols, exchanges, strict=True))
            names = {
                pair: self._restored(pair[0]) if pair[1] == "binance" else pair[0] for pair in dict.fromkeys(pairs)
            }
            symbols = [names[pair] for pair in pairs]
        unit = layout.unit if layout.name == "liqlab" else self._options.unit or layout.unit
        keys: dict[tuple[str, str, str | None], int] = {}
        key = [
            keys.setdefault((exchange, symbol, unit), len(keys))
            for exchange, symbol in zip(exchanges, symbols, strict=True)
        ]
        ts_ms = self._times(columns[layout.ts_ms])
        if layout.fallback_ts is not None:
            ts_ms = np.where(ts_ms == NO_TIME, self._times(columns[layout.fallback_ts]), ts_ms)
        rows = Rows(
            line=lines,
            keys=list(keys),
            key=np.array(key, np.int64),
            side=self._sides(layout, columns[layout.side_at], exchanges),
            ts_ms=ts_ms,
            price=_first(columns, layout.prices),
            quantity=_first(columns, layout.sizes),
            ident=None if layout.ident is None else np.array([text(value) for value in columns[layout.ident]], object),
            notional=None if layout.notional is None else floats(columns[layout.notional]),
        )
        return self._counted(rows) if layout.name == "liqlab" else rows

    def _exchanges(self, layout: Layout, columns: Sequence[Column], count: int) -> list[str]:
        default = self._options.exchange or layout.exchange
        if layout.exchange_at is not None:
            names = {value: exchange_name(text(value)) for value in dict.fromkeys(columns[layout.exchange_at])}
            return [
                default or UNKNOWN if names[value] == UNKNOWN else names[value] for value in columns[layout.exchange_at]
            ]
        if default is None:
            words = re.split(r"[^a-z]+", self._file.rpartition("/")[2].lower())
            default = next((exchange_name(word) for word in words if _VENUE_NAMES.fullmatch(word)), None)
            if default is None:
                default = UNKNOWN
                self._options.note(
                    "no exchange named: sides are taken as the order's and sizes as base units; name it with exchange="
                )
            else:
                self._options.note(f"exchange taken from the file's name: {default}")
        return [default] * count

    def _symbols(self, layout: Layout, columns: Sequence[Column], count: int) -> list[str]:
        if layout.symbol is not None:
            return [text(value).strip() or self._options.symbol or "" for value in columns[layout.symbol]]
        in_name = _ARCHIVE_FILE.search(self._file.rpartition("/")[2])
        return [self._options.symbol or (in_name[1].upper() if in_name else "")] * count

    def _restored(self, symbol: str) -> str:
        if not symbol:
            return symbol
        whole = restored(symbol)
        if whole != symbol:
            self._options.note("symbols had USDT stripped: restored")
        return whole

    def _sides(self, layout: Layout, column: Column, exchanges: Sequence[str]) -> np.ndarray:
        words = dict.fromkeys(column)
        as_order = {word: order_side(word) for word in words}
        as_position = {word: position_side(word) for word in words}
        if layout.side == "position":
            codes = [as_position[word] for word in column]
        elif layout.side == "order" or not POSITION_SIDE.intersection(exchanges):
            codes = [as_order[word] for word in column]
        else:
            pairs = zip(column, exchanges, strict=True)
            codes = [as_position[word] if exchange in POSITION_SIDE else as_order[word] for word, exchange in pairs]
            if any(as_position[word] != as_order[word] for word in words):
                self._options.note("bybit and bitget send the side of the position: Buy was read as a long liquidated")
        return np.array(codes, np.int8)

    def _times(self, column: Column) -> np.ndarray:
        numeric = _integers(column)
        if numeric is not None:
            return _scaled(numeric)
        zone = self._options.zone
        if zone is None and any(
            isinstance(value, str) and "-" in value[1:] and not _HAS_ZONE.search(value) for value in column
        ):
            self._options.note("times without a zone were read as UTC; name another with tz=")
        return np.array([to_ms(value, zone or dt.UTC) for value in column], np.int64)

    def _counted(self, rows: Rows) -> Rows:
        # Our own tables hold no duplicates: equal rows are different events. They are neighbours in time, so only
        # those of the last time can go on in the next block.
        names = np.array([hash(key) for key in rows.keys], np.int64)
        own: tuple[np.ndarray, ...] = (
            names[rows.key],
            rows.side.astype(np.int64),
            rows.ts_ms,
            rows.price,
            rows.quantity,
        )
        before = 0
        if self._tail is not None:
            before = len(self._tail[0])
            own = tuple(np.concatenate(pair) for pair in zip(self._tail, own, strict=True))
        counts = occurrences(own)
        last = own[2] == own[2][-1] if len(own[2]) else np.zeros(0, bool)
        self._tail = tuple(column[last] for column in own)
        return Rows(**{**vars(rows), "occurrence": counts[before:]})


def _fits(layout: Layout, width: int, rows: Sequence[tuple[int, list[str]]]) -> bool:
    """Return whether rows have more columns than the layout, and the known ones where it says."""
    if width <= layout.width:
        return False
    sides = (order_side(row[layout.side_at]) != NO_SIDE for _, row in rows[:100])
    times = (to_ms(row[layout.ts_ms]) != NO_TIME for _, row in rows[:100])
    return any(side and time for side, time in zip(sides, times, strict=True))


def floats(column: Column) -> np.ndarray:
    """Return a column as float64; NaN for what is not a number."""
    if isinstance(column, np.ndarray) and column.dtype.kind in "iuf":
        return column.astype(np.float64)
    if len(column) > _FEW:
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowTypeError):
            return np.asarray(pa.array(column, pa.string()).cast(pa.float64()).to_numpy(zero_copy_only=False))
    return np.array([number(value.strip() if isinstance(value, str) else value) for value in column], np.float64)


def _first(columns: Sequence[Column], candidates: tuple[int, ...]) -> np.ndarray:
    values = floats(columns[candidates[0]])
    for at in candidates[1:]:
        missing = ~positive(values)
        if missing.any():
            values = np.where(missing, floats(columns[at]), values)
    return values


def _integers(column: Column) -> np.ndarray | None:
    if isinstance(column, np.ndarray):
        return column.astype(np.int64) if column.dtype.kind in "iu" else None
    if not all(
        isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) < 19 for value in column
    ):
        return None
    return np.asarray(pa.array(column, pa.string()).cast(pa.int64()).to_numpy())


def _scaled(values: np.ndarray) -> np.ndarray:
    result = np.full(len(values), NO_TIME)
    for scale in _SCALES:
        fits = (values >= 1_230_768_000 * scale) & (values < 4_102_444_800 * scale)
        result[fits] = values[fits] * 1000 // scale if scale <= 1000 else values[fits] // (scale // 1000)
    return result


def _plain(column: pa.Array, zone: dt.tzinfo | None) -> Column:
    if pa.types.is_timestamp(column.type):
        if column.type.tz is None and zone is not None:
            column = pc.assume_timezone(column, str(zone))
        milliseconds = column.cast(pa.timestamp("ms", column.type.tz), safe=False).cast(pa.int64())
        return np.asarray(milliseconds.fill_null(0).to_numpy(zero_copy_only=False))
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.float64())
    if pa.types.is_nested(column.type):
        return [str(value) for value in column.to_pylist()]
    numeric = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if numeric and column.null_count == 0:
        return np.asarray(column.to_numpy(zero_copy_only=False))
    return list(column.to_pylist())
