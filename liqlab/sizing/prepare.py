"""A feed, prepared once: what the model needs of it that no setting changes, and what it has worked out so far."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from liqlab.clock import MINUTE_MS
from liqlab.codecs import Names
from liqlab.events import Columns, EventError, check, run_starts
from liqlab.feeds import Feed
from liqlab.schema import shard_of
from liqlab.sizing.structures import Floats, Ints, listpack_int, listpack_text

T = TypeVar("T")
REMEMBERED, _LARGE = 256, 12  # results: arrays of a value a minute; and of several an event


class Prepared:
    """A feed as the model reads it; make it with `prepare` and pass it to `predict` in place of the feed.

    Attributes
    ----------
    columns : Columns
        The events, n of them.
    row : array of int64, shape (n,)
        The event-minute that each falls into, of m that have events.
    start_ms, now_ms : array of int64, shape (m,)
        When an event-minute begins; when the next one with events does, at which the writer seals.
    stop : array of int64, shape (m,)
        How many events there are up to the end of the minute.
    symbol, minute_row, first, count, last_ms : array of int64, shape (t,)
        Touches: a symbol in a minute. `first` is where its events begin in `order`, `last_ms` when the last happened.
    order : array of int64, shape (n,)
        The events by symbol, each in time order.
    """

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        minutes = columns.ts_ms // MINUTE_MS
        starts = run_starts(minutes)
        self.rows = len(starts)
        self.row: Ints = np.repeat(np.arange(self.rows), np.diff(starts, append=len(minutes)))
        self.stop: Ints = np.append(starts[1:], len(minutes)).astype(np.int64)
        self.start_ms: Ints = minutes[starts] * MINUTE_MS
        self.now_ms: Ints = np.append(self.start_ms[1:], self.start_ms[-1] + MINUTE_MS)
        self._minute = minutes[starts] - minutes[0]
        self._next_row = np.full(int(self._minute[-1]) + 2, self.rows)
        self._next_row[: self._minute[-1] + 1] = np.searchsorted(self._minute, np.arange(self._minute[-1] + 1))
        # Codes of two bytes are sorted six times as fast as wider ones.
        self.order: Ints = np.argsort(columns.symbol, kind="stable").astype(np.int64)
        by_symbol, by_row = columns.symbol[self.order].astype(np.int64), self.row[self.order]
        self.first: Ints = run_starts(by_symbol, by_row).astype(np.int64)
        self.symbol: Ints = by_symbol[self.first]
        self.minute_row: Ints = by_row[self.first]
        self.count: Ints = np.diff(self.first, append=len(by_symbol))
        self.last_ms: Ints = columns.ts_ms[self.order[self.first + self.count - 1]]
        self.lengths: Ints = np.array([len(name.encode()) for name in columns.symbols], np.int64)
        self.blocks: dict[Hashable, int] = {}  # bytes of those that were encoded
        self._results: tuple[dict[Hashable, Any], dict[Hashable, Any]] = ({}, {})

    def __len__(self) -> int:
        return len(self.row)

    def __reduce__(self) -> tuple[type[Prepared], tuple[Columns]]:
        # Another process works the rest out sooner than it comes over a wire, and results may be hundreds of MB.
        return Prepared, (self.columns,)

    def once(self, key: Hashable, make: Callable[[], T], *, large: bool = False) -> T:
        """Return what `make` does, and remember it: most parts do not depend on the one setting that a slider moves.

        Of `large` results, which have a value an event, only the last few are kept.
        """
        results = self._results[large]
        found: T = results.pop(key) if key in results else make()
        while len(results) >= (_LARGE if large else REMEMBERED):
            del results[next(iter(results))]
        results[key] = found  # the last one used is the last one to go
        return found

    def learn(self, results: Mapping[Hashable, Any]) -> None:
        """Remember what another one of the same feed has worked out, under the keys of `once`."""
        for key, found in results.items():
            self.once(key, lambda found=found: found)  # type: ignore[misc]

    def row_at(self, ms: Ints) -> Ints:
        """Return the first event-minute that begins at a time or after it; m where there is none."""
        minute = -(-ms // MINUTE_MS) - self.start_ms[0] // MINUTE_MS
        found: Ints = self._next_row[np.clip(minute, 0, len(self._next_row) - 1)]
        return found

    def batches(self, bulk: int) -> Ints:
        """Return the batch that each event goes with, as `Writer.write_slices` cuts the minutes into them."""

        def cut() -> Ints:
            starts = np.concatenate([[0], self.stop[:-1]])
            place = np.arange(len(self)) - starts[self.row]
            # The first batch of a table is smaller.
            place[self.row == 0] += bulk - max(bulk // 4, 1) if self.stop[0] > bulk else 0
            batch: Ints = self.row * (1 << 20) + place // bulk
            return batch

        return self.once(("batches", bulk), cut)

    def shards(self, count: int) -> Ints:
        """Return the shard of each symbol."""
        return self.once(
            ("shards", count),
            lambda: np.array([shard_of(name, count) or 0 for name in self.columns.symbols], np.int64),
        )

    def present(self, count: int) -> list[int]:
        """Return the shards that have events."""

        def found() -> list[int]:
            some = np.zeros(len(self.lengths), np.bool_)
            some[self.symbol] = True
            return [int(number) for number in np.unique(self.shards(count)[some])]

        return self.once(("present", count), found)

    def names(self) -> Names:
        """Return the table of names as the writer fills it: with each minute the new ones, in the feed's order."""
        opens = np.flatnonzero(np.diff(self.symbol, prepend=-1))
        opens = opens[np.lexsort((self.symbol[opens], self.minute_row[opens]))]
        names = Names()
        names.of_symbols([self.columns.symbols[code] for code in self.symbol[opens].tolist()])
        _, first = np.unique(self.columns.exchange, return_index=True)
        names.of_exchanges([self.columns.exchanges[int(self.columns.exchange[at])] for at in sorted(first.tolist())])
        return names


def prepare(events: Feed | pd.DataFrame | Prepared) -> Prepared:
    """Return a feed as the model reads it.

    Parameters
    ----------
    events : Feed, pandas.DataFrame or Prepared
        From `liqlab.read_feed`, or an event table; what is prepared already stays so.

    Raises
    ------
    EventError
        It is no event table, or holds no event.
    """
    if isinstance(events, Prepared):
        return events
    table = check(events.events if isinstance(events, Feed) else events)
    if table.empty:
        raise EventError("the feed holds no event; there is nothing to predict")
    return Prepared(Columns.of(table))


def through(rows: int, born: NDArray[np.integer], gone: NDArray[np.integer], weight: Any = None) -> Floats:
    """Return the sum of what exists in each row, each thing from the row `born` up to, not including, `gone`.

    Parameters
    ----------
    born, gone : array of int, shape (k,)
        0 to `rows`.
    weight : array, shape (k,), optional
        1 each when absent.
    """
    if weight is not None:
        weight = np.broadcast_to(np.asarray(weight, np.float64), born.shape)
    steps = np.bincount(born, weight, rows + 1) - np.bincount(gone, weight, rows + 1)
    result: Floats = np.cumsum(steps)[:rows]
    return result


def arrow_lengths(values: Floats) -> Ints:
    """Return the lengths of the shortest texts that read back as the same numbers, as `fields` writes them."""
    return np.asarray(pc.utf8_length(pa.array(values).cast(pa.string())), np.int64)


def listpack_number(values: Floats) -> Ints:
    """Return the bytes in a listpack of numbers by write.lua's `text`: %.15g where that is exact, else %.17g."""
    size = np.abs(values)
    log = np.floor(np.log10(np.maximum(size, 1e-300))).astype(np.int64)
    length = arrow_lengths(size)
    plain = (size >= 1e-5) & (size < 1e10)
    significant = np.where(plain, length - 1 - np.where(size < 1, -log, 0), length - 5)
    significant = np.where(significant > 15, 17, significant)
    fixed = significant + 1 + np.where(size < 1, -log, 0)
    text = np.where(log < -4, significant + 5, fixed)
    whole = (size == np.floor(size)) & (size < 1e15)
    result: Ints = np.where(whole, listpack_int(np.where(whole, values, 0).astype(np.int64)), listpack_text(text))
    return result


def codes_of(values: NDArray[Any], names: list[str]) -> Ints:
    """Return the UTF-8 length of the name that each code stands for."""
    lengths: Ints = np.array([len(name.encode()) for name in names], np.int64)[values]
    return lengths
