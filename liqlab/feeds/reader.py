"""Reads blocks, hands each line to its parser, and keeps the account."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import orjson
import pandas as pd

from liqlab.events import SIDES, event_table
from liqlab.feeds.dedup import Seen
from liqlab.feeds.lines import FORMATS, Parsed, Parser
from liqlab.feeds.normalise import Normalised, Normaliser
from liqlab.feeds.report import FeedReport
from liqlab.feeds.rows import FeedError, Rows
from liqlab.feeds.source import Block, Quarantine
from liqlab.feeds.tables import Options

_DOCUMENT_BYTES: Final = 64 << 20


class FeedReader:
    """An iterator of event tables; `report` is filled as it goes.

    Each table is sorted by time in itself; together they are in the order of the files.

    Attributes
    ----------
    report : FeedReport
        Complete when the iterator is exhausted; its equation holds after every table.
    """

    def __init__(
        self,
        files: Sequence[tuple[str, bool]],
        blocks: Iterator[Block],
        *,
        format: str,
        options: Options,
        sizes: Mapping[str, float],
        report: FeedReport,
        quarantine: Quarantine,
        batch: int,
        capacity: int,
    ) -> None:
        self.report = report
        self._named = dict(files)
        self._blocks = blocks
        self._format = format
        self._options = options
        self._seen = Seen(capacity)
        self._normalise = Normaliser(sizes, self._seen)
        self._quarantine = quarantine
        self._batch = batch
        self._file = ""
        self._parser = Parser("", format, options)
        self._understood = False
        self._waiting: deque[tuple[np.ndarray, ...]] = deque()
        self._held = 0
        self._document = b""
        self._pairs: set[int] = set()
        self._skipped = False
        self._tables = self._run()
        quarantine.start()

    def __iter__(self) -> Iterator[pd.DataFrame]:
        return self

    def __next__(self) -> pd.DataFrame:
        return next(self._tables)

    def close(self) -> None:
        """Stop reading and finish the quarantine file."""
        self._tables.close()

    def _run(self) -> Generator[pd.DataFrame]:
        try:
            for block in self._blocks:
                if block.file != self._file:
                    self._finish_file()
                    self._start_file(block)
                self._block(block)
                while self._held >= self._batch:
                    yield self._take(self._batch)
            self._finish_file()
            if self._named and not self.report.files:
                raise FeedError(
                    f"no liquidation feed among {len(self._named)} files; {'; '.join(self.report.notes[:3])}"
                )
            while self._held:
                yield self._take(min(self._batch, self._held))
        finally:
            self._quarantine.close()
            self.report.quarantine = self._quarantine.used

    def _start_file(self, block: Block) -> None:
        self._file = block.file
        self._parser = Parser(block.file, self._format, self._options)
        self._understood = self._skipped = False
        self._document = b""
        self.report.files.append(block.file)

    def _finish_file(self) -> None:
        if self._document:
            block = Block(self._file, 1, self._document)
            parsed = self._parser.parse_document(self._document)
            if parsed.formats:
                self._commit(parsed, block)
            else:
                self._unknown(block)
        self._document = b""
        self._update()

    def _block(self, block: Block) -> None:
        if self._skipped:
            return
        if block.problem:
            self._understood = True
            self._reject(block.line, block.problem, b"")
        elif block.batch is not None:
            self._commit(self._parser.parse_batch(block), block)
        elif self._document:
            self._document += block.data
            if len(self._document) > _DOCUMENT_BYTES:
                self._unknown(Block(block.file, 1, self._document))
                self._document = b""
        else:
            self._text(block)

    def _text(self, block: Block) -> None:
        parsed = self._parser.parse(block)
        if self._understood or parsed.formats or not block.data.strip():
            self._commit(parsed, block)
        elif block.data.lstrip()[:1] in (b"{", b"["):
            self._document = block.data  # perhaps one document on many lines
        else:
            self._unknown(block)

    def _unknown(self, block: Block) -> None:
        """Refuse a file that the caller named; pass over one that merely lies in a folder of his."""
        first = block.data.lstrip().partition(b"\n")[0][:160].decode(errors="backslashreplace")
        if self._named.get(block.file, False):
            raise FeedError(
                self._parser.problem
                or f"{block.file}: not a liquidation feed that liqlab knows; it begins with {first!r}. "
                f"Name its format (format=, one of {', '.join(FORMATS[1:])}) or, for a table, its columns "
                '(columns={"ts_ms": "...", "side": "...", "price": "...", "size": "..."}, or --map ts_ms=...)'
            )
        self._skipped = True
        self.report.files.remove(block.file)
        self.report.ignore("file of no known format")
        self.report.note(f"{block.file} is not a liquidation feed: passed over")

    def _commit(self, parsed: Parsed, block: Block) -> None:
        self._understood = self._understood or bool(parsed.formats)
        for name in parsed.formats:
            if name not in ("control", *self.report.formats):
                self.report.formats.append(name)
        for reason in parsed.ignored:
            self.report.ignore(reason)
        rejected = parsed.rejected
        if parsed.events.line:
            parsed.rows.append(parsed.events.rows())
        if parsed.rows:
            found = self._normalise(Rows.merged(parsed.rows))
            rejected = rejected + found.rejected
            self._accept(found)
        if rejected:
            lines = [] if block.batch is not None else block.data.split(b"\n")
            for number, reason in sorted(rejected):
                self._reject(number, reason, _raw(block, lines, number))

    def _accept(self, found: Normalised) -> None:
        report = self.report
        count = len(found.ts_ms)
        report.read += count + found.duplicates
        report.accepted += count
        report.duplicates += found.duplicates
        if count:
            first, last = int(found.ts_ms.min()), int(found.ts_ms.max())
            report.first_ms = first if report.first_ms is None else min(first, report.first_ms)
            report.last_ms = last if report.last_ms is None else max(last, report.last_ms)
            self._pairs.update(np.unique(found.pair).tolist())
            self._waiting.append((found.ts_ms, found.pair, found.side, found.price, found.size, found.notional))
            self._held += count

    def _reject(self, line: int, reason: str, raw: bytes | str) -> None:
        self._quarantine.add(self._file, line, reason, raw)
        self.report.reject(reason)

    def _update(self) -> None:
        names = list(self._normalise.pairs)
        self.report.exchanges = sorted({names[code][0] for code in self._pairs})
        self.report.symbols = sorted({names[code][1] for code in self._pairs})
        self.report.quarantine = self._quarantine.used
        if self._seen.forgotten:
            self.report.note(
                f"above {self._seen.capacity:,} events the oldest hours are forgotten: "
                "a repetition of an event that old counts as new"
            )

    def _take(self, count: int) -> pd.DataFrame:
        parts: list[tuple[np.ndarray, ...]] = []
        wanted = count
        while wanted:
            part = self._waiting.popleft()
            size = len(part[0])
            if size > wanted:
                self._waiting.appendleft(tuple(column[wanted:] for column in part))
                part = tuple(column[:wanted] for column in part)
                size = wanted
            parts.append(part)
            wanted -= size
        self._held -= count
        ts_ms, pair, side, price, size_, notional = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        self._update()
        names = list(self._normalise.pairs)
        used, code = np.unique(pair, return_inverse=True)
        return event_table(
            ts_ms,
            _categorical([names[at][0] for at in used], code),
            _categorical([names[at][1] for at in used], code),
            pd.Categorical.from_codes(side, categories=pd.Index(SIDES)),
            price,
            size_,
            notional,
        )


def _raw(block: Block, lines: list[bytes], number: int) -> bytes | str:
    at = number - block.line
    if block.batch is not None:
        return orjson.dumps(block.batch.slice(at, 1).to_pylist()[0], default=str).decode()
    return lines[at] if 0 <= at < len(lines) else b""


def _categorical(names: list[str], code: np.ndarray) -> Any:
    categories = {name: at for at, name in enumerate(dict.fromkeys(names))}
    codes = np.array([categories[name] for name in names], np.int32)
    return pd.Categorical.from_codes(
        np.asarray(codes[code], np.int32), categories=pd.Index(list(categories), dtype=str)
    )
