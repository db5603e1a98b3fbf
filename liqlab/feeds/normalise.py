"""Raw rows -> events: conversion to USD, the checks that every event passes, and the search for duplicates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd

from liqlab.feeds.contracts import Value, value_of
from liqlab.feeds.dedup import Seen, mix
from liqlab.feeds.rows import BUY, Rows

EARLIEST_MS: Final = 1_230_768_000_000  # 2009
LATEST_MS: Final = 4_102_444_800_000  # 2100
_SYMBOL: Final = re.compile(r"[^\s{}*]{1,64}")
_RECEIPT_TIMED: Final = "bitmex"
_MAX_KEYS: Final = 100_000  # only junk has so many symbols


@dataclass(frozen=True)
class Normalised:
    """Accepted events as columns, the number of duplicates, and what was rejected: (line, reason)."""

    ts_ms: np.ndarray
    pair: np.ndarray
    side: np.ndarray
    price: np.ndarray
    size: np.ndarray
    notional: np.ndarray
    duplicates: int
    rejected: list[tuple[int, str]]


def symbol_problem(symbol: str) -> str:
    """Return why `symbol` cannot name an instrument, or an empty string."""
    if not symbol:
        return 'no symbol in it; where a feed is of one instrument, name it: symbol="BTCUSDT"'
    if not _SYMBOL.fullmatch(symbol) or not symbol.isprintable():
        return "not a symbol: 1 to 64 printable characters without spaces, braces or asterisks"
    return ""


class Normaliser:
    """Holds what must outlive a block of rows: the pairs seen, and the hashes of their events."""

    def __init__(self, sizes: Mapping[str, float], seen: Seen) -> None:
        self._sizes = sizes
        self._seen = seen
        self.pairs: dict[tuple[str, str], int] = {}
        self._receipt_timed: list[int] = []
        self._values: dict[tuple[str, str, str | None], tuple[Value, int]] = {}

    def __call__(self, rows: Rows) -> Normalised:
        """Convert, check and deduplicate `rows`; every one of them is accepted, a duplicate, or rejected."""
        known = [self._known(key) for key in rows.keys]
        factor = np.array([value.factor for value, _ in known], np.float64)
        inverse = np.array([value.inverse for value, _ in known], bool)
        pair = np.array([code for _, code in known], np.int64)
        problems = {at: value.problem for at, (value, _) in enumerate(known) if value.problem}
        price, quantity = rows.price, rows.quantity
        with np.errstate(all="ignore"):
            amount = quantity * factor[rows.key]
            linear = ~inverse[rows.key]
            size = np.where(linear, amount, amount / price)
            notional = np.where(linear, amount * price, amount)
        if rows.notional is not None:
            notional = np.where(np.isnan(rows.notional), notional, rows.notional)
        checks = [
            ("the side is neither buy nor sell, long nor short", rows.side >= BUY),
            ("the time is not between 2009 and 2100", (rows.ts_ms >= EARLIEST_MS) & (rows.ts_ms < LATEST_MS)),
            ("the price is not a positive number", positive(price)),
            ("the quantity is not a positive number", positive(quantity)),
            ("price x size is not a finite positive number", positive(size) & positive(notional)),
        ]
        good = np.ones(len(rows), bool)
        rejected: list[tuple[int, str]] = []
        if problems:
            bad = np.isin(rows.key, list(problems))
            rejected += [(int(rows.line[at]), problems[int(rows.key[at])]) for at in np.flatnonzero(bad)]
            good &= ~bad
        for reason, passed in checks:
            bad = good & ~passed
            if bad.any():
                rejected += [(line, reason) for line in rows.line[bad].tolist()]
                good &= passed
        columns = [pair[rows.key], rows.side.astype(np.int8), rows.ts_ms, price, size, notional]
        ident, occurrence = rows.ident, rows.occurrence
        if not good.all():
            columns = [column[good] for column in columns]
            ident = None if ident is None else ident[good]
            occurrence = None if occurrence is None else occurrence[good]
        new = self._new(columns, ident, occurrence)
        duplicates = len(new) - int(new.sum())
        if duplicates:
            columns = [column[new] for column in columns]
        ts_ms, pairs, side, price, size, notional = (columns[at] for at in (2, 0, 1, 3, 4, 5))
        return Normalised(ts_ms, pairs, side, price, size, notional, duplicates, rejected)

    def _known(self, key: tuple[str, str, str | None]) -> tuple[Value, int]:
        if key not in self._values:
            if len(self._values) > _MAX_KEYS:
                self._values.clear()
            exchange, symbol, unit = key
            problem = symbol_problem(symbol)
            value = Value(problem=problem) if problem else value_of(exchange, symbol, unit, self._sizes)
            self._values[key] = value, 0 if value.problem else self._pair(exchange, symbol)
        return self._values[key]

    def _pair(self, exchange: str, symbol: str) -> int:
        code = self.pairs.get((exchange, symbol))
        if code is None:
            code = self.pairs[exchange, symbol] = len(self.pairs)
            if exchange == _RECEIPT_TIMED:
                self._receipt_timed.append(code)
        return code

    def _new(self, columns: list[np.ndarray], ident: np.ndarray | None, occurrence: np.ndarray | None) -> np.ndarray:
        pair, side, ts_ms, price, size, _ = columns
        named = None if ident is None else ident != ""
        if named is not None and self._receipt_timed:
            # Two recorders receive one event at two times: here the order's id is its identity, without the time.
            ts_ms = np.where(named & np.isin(pair, self._receipt_timed), 0, ts_ms)
        hashes = mix(pair * 2 + side, ts_ms, price, size)
        # Without an id, and for the first of its kind, nothing is added: blocks with and without such columns agree.
        if ident is not None and named is not None:
            hashes ^= np.where(named, pd.util.hash_array(ident), np.uint64(0))
        if occurrence is not None and occurrence.any():
            hashes ^= np.where(occurrence > 0, mix(occurrence), np.uint64(0))
        return self._seen.add(hashes, ts_ms)


def positive(values: np.ndarray) -> np.ndarray:
    """Return which values are finite and above 0."""
    return np.asarray((values > 0) & (values < np.inf))


def occurrences(columns: Iterable[np.ndarray]) -> np.ndarray:
    """Return, for each row, how many rows equal to it come before it."""
    hashes = mix(*columns)
    return pd.Series(hashes).groupby(hashes, sort=False).cumcount().to_numpy(np.int64)
