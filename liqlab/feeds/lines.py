"""Lines of a recording -> raw rows: each goes to the parser that its own content asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from liqlab.feeds import fast
from liqlab.feeds.frames import CONTROL, PREFIX, UNKNOWN_MESSAGE, Messages
from liqlab.feeds.rows import NO_TIME, Event, IgnoredError, RowList, Rows, to_ms
from liqlab.feeds.source import Block
from liqlab.feeds.tables import Options, Table, TableRows

FORMATS: Final = (
    "auto",
    "binance",
    "aster",
    "bybit",
    "okx",
    "bitmex",
    "deribit",
    "gate",
    "htx",
    "bitfinex",
    "kraken",
    "dydx",
    "bitget",
    "hyperliquid",
    "tardis",
    "cryptofeed",
    "ccxt",
    "liqlab",
    "table",
)
_CONTROL_TEXT: Final = ("ping", "pong", "hb")


@dataclass
class Parsed:
    """What the lines of one block are, before conversion."""

    formats: list[str] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    events: RowList = field(default_factory=RowList)
    rejected: list[tuple[int, str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


class Parser:
    """Parses the blocks of one file.

    Parameters
    ----------
    file : str
        Its name, which may tell the symbol or the venue.
    format : str
        One of `FORMATS`.
    options : Options
        What the caller says of the feed.
    """

    def __init__(self, file: str, format: str, options: Options) -> None:
        self._format = "binance" if format == "aster" else format
        self._options = options
        self._messages = Messages(options.exchange, options.symbol)
        self._table = Table(file, options)

    @property
    def problem(self) -> str:
        """What is wrong with the table's header, if something is."""
        return self._table.problem

    def parse(self, block: Block) -> Parsed:
        """Return what the lines of `block` hold."""
        parsed = Parsed()
        quick = None
        if self._format in ("auto", "binance"):
            quick = fast.read(block.data, block.line, self._options.exchange)
        lines = block.data.split(b"\n") if quick is None or quick[1] else []
        if quick is not None:
            parsed.formats.append("binance")
            parsed.rows.append(quick[0])
        wanted = range(len(lines)) if quick is None else quick[1]
        table: list[tuple[int, str]] = []
        objects: list[tuple[int, dict[str, Any]]] = []
        for at in wanted:
            line = lines[at].strip()
            if line:
                self._line(line, block.line + at, parsed, table, objects)
        if table:
            numbers, texts = zip(*table, strict=True)
            self._add_table(parsed, self._table.read_lines(texts, numbers))
        if objects:
            self._add_table(parsed, self._table.read_objects(objects))
        return parsed

    def _line(
        self,
        line: bytes,
        number: int,
        parsed: Parsed,
        table: list[tuple[int, str]],
        objects: list[tuple[int, dict[str, Any]]],
    ) -> None:
        receipt_ms = NO_TIME
        if line in (b"[", b"]", b"],"):
            parsed.ignored.append("bracket of a JSON array")
            return
        if line[:1] in (b"{", b"["):
            message = _loads(line)
            if message is _BROKEN and line[:1] == b"{":
                parsed.rejected.append((number, "not valid JSON"))
                return
        else:
            message = _BROKEN
        if message is _BROKEN:
            try:
                text = line.decode()
            except UnicodeDecodeError:
                parsed.rejected.append((number, "not UTF-8 text"))
                return
            if text.strip('"').lower() in _CONTROL_TEXT:
                parsed.ignored.append(CONTROL)
                return
            prefix = PREFIX.match(text) if "{" in text or "[" in text else None
            if prefix is None:
                table.append((number, text))
                return
            message, receipt_ms = _loads(text[prefix.end() :].encode()), to_ms(prefix[1].strip().rstrip(":"))
            if message is _BROKEN or receipt_ms == NO_TIME:
                parsed.rejected.append((number, "not valid JSON after a time of receipt"))
                return
        name, outcomes = self._messages.read(message, receipt_ms)
        if name is None:
            rows = message if isinstance(message, list) else [message]
            if rows and all(_flat(row) for row in rows):
                objects += [(number, row) for row in rows]
            else:
                parsed.rejected.append((number, UNKNOWN_MESSAGE))
            return
        if name not in parsed.formats:
            parsed.formats.append(name)
        asked = self._asked(name)
        for outcome in outcomes:
            if isinstance(outcome, IgnoredError):
                parsed.ignored.append(str(outcome))
            elif not asked:
                parsed.rejected.append((number, f"{name}, not {self._format} as asked by format="))
            elif isinstance(outcome, Event):
                parsed.events.add(number, outcome)
            else:
                parsed.rejected.append((number, str(outcome)))

    def _asked(self, name: str) -> bool:
        return self._format == "auto" or name == self._format or name.startswith(self._format + "-")

    def parse_batch(self, block: Block) -> Parsed:
        """Return what the rows of a table hold."""
        parsed = Parsed()
        if block.batch is not None:
            self._add_table(parsed, self._table.read_batch(block.batch, block.line))
        return parsed

    def _add_table(self, parsed: Parsed, result: TableRows) -> None:
        parsed.rejected += result.rejected
        parsed.ignored += ["header"] * result.headers
        if result.headers and not result.rows:
            parsed.formats.append("table")
        for name, rows in result.rows:
            if name not in parsed.formats:
                parsed.formats.append(name)
            if self._asked(name) or self._format == "table":
                parsed.rows.append(rows)
            else:
                parsed.rejected += [(int(at), f"{name}, not {self._format} as asked by format=") for at in rows.line]

    def parse_document(self, data: bytes) -> Parsed:
        """Return what one JSON document on many lines holds; every event of it is on line 1."""
        parsed = Parsed()
        message = _loads(data.strip())
        objects: list[tuple[int, dict[str, Any]]] = []
        if message is not _BROKEN:
            self._line(orjson.dumps(message), 1, parsed, [], objects)
            if objects:
                self._add_table(parsed, self._table.read_objects(objects))
        return parsed


_BROKEN: Final = object()


def _loads(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        if not line.endswith(b","):
            return _BROKEN
    try:
        return orjson.loads(line[:-1])
    except orjson.JSONDecodeError:
        return _BROKEN


def _flat(row: Any) -> bool:
    return isinstance(row, dict) and bool(row) and not any(isinstance(value, dict | list) for value in row.values())
