"""A batch of events as the one argument of the writer's script."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from liqlab import schema
from liqlab.events import COLUMNS, SIDES, Event
from liqlab.settings import Settings


class Columns(NamedTuple):
    """An event table as plain arrays: a hundred times cheaper to cut into small batches than a DataFrame."""

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
        return self._replace(**{name: getattr(self, name)[which] for name in COLUMNS})


class _Keys:
    """The KEYS of a call: each name once, by its index in Lua."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names) + 1)


def pack(events: Columns, seq: int, writer: str, shard: int | None, settings: Settings) -> tuple[list[str], bytes]:
    """Pack one shard's part of a batch: rows grouped by stream, all that can be summed summed.

    Returns
    -------
    keys, argument : list of str, bytes
        What write.lua takes as KEYS and ARGV[1]; it documents the shape.
    """
    family = schema.BY_NAME
    keys = _Keys()
    keys(family["writer"].key(writer, shard=shard))
    unique = keys(family["unique_symbols"].key(shard=shard))
    shared = settings.writer.layout == "shared"
    streams = []
    if shared:
        streams = _streams([keys(family["events"].key(shard=shard))], events, np.zeros(1, dtype=np.intp), shared=True)

    events = events.rows(np.argsort(events.symbol, kind="stable"))
    codes, names, times, price, size = events.symbol, events.symbols, events.ts_ms, events.price, events.size
    bought = np.where(events.side == SIDES.index("buy"), size, 0.0)

    starts = _starts(codes)
    symbols = [names[code] for code in codes[starts].tolist()]
    if not shared:
        own = [keys(family["events"].key(name, shard=shard)) for name in symbols]
        streams = _streams(own, events, starts, shared=False)
    vwaps = zip(
        [keys(family["vwap"].key(name, shard=shard)) for name in symbols],
        np.add.reduceat(price * size, starts).tolist(),
        np.add.reduceat(size, starts).tolist(),
        np.diff(starts, append=len(codes)).tolist(),
        np.maximum.reduceat(times, starts).tolist(),
        strict=True,
    )

    minutes = times // family["candle"].bucket_ms
    cells = _starts(codes, minutes)
    cell_names = zip(codes[cells].tolist(), minutes[cells].tolist(), strict=True)
    candles = zip(
        [keys(family["candle"].key(names[code], bucket=minute, shard=shard)) for code, minute in cell_names],
        np.diff(cells, append=len(codes)).tolist(),
        np.add.reduceat(size, cells).tolist(),
        np.add.reduceat(bought, cells).tolist(),
        np.maximum.reduceat(size, cells).tolist(),
        np.add.reduceat(price, cells).tolist(),
        np.add.reduceat(events.notional, cells).tolist(),
        strict=True,
    )

    ttl = {name: row.ttl_s(settings) for name, row in family.items()}
    argument = msgpack.packb(
        [
            seq,
            ttl["writer"],
            [settings.retention.shared_maxlen if shared else settings.retention.events_maxlen, ttl["events"], *streams],
            [ttl["vwap"], *vwaps],
            [ttl["candle"], *candles],
            [ttl["unique_symbols"], unique, symbols],
        ]
    )
    return list(keys.names), argument


def _streams(keys: list[int], events: Columns, starts: NDArray[np.intp], *, shared: bool) -> list[list[Any]]:
    """Return [key, IDs, rows] of every stream; `starts` says where each begins in `events`.

    Rows are the original's text fields: s side, z size, p price, e exchange; and y symbol where they share a stream.
    """
    times = events.ts_ms
    runs = _starts(np.repeat(starts, np.diff(starts, append=len(times))), times)
    seq = np.arange(len(times)) - np.repeat(runs, np.diff(runs, append=len(times)))
    ids = [f"{ms}-{n}" for ms, n in zip(times.tolist(), seq.tolist(), strict=True)]
    columns = [
        [SIDES[code][0] for code in events.side.tolist()],
        # Arrow writes the shortest text that reads back as the same float64, an order faster than repr.
        pa.array(events.size).cast(pa.string()).to_pylist(),
        pa.array(events.price).cast(pa.string()).to_pylist(),
        [events.exchanges[code] for code in events.exchange.tolist()],
    ]
    if shared:
        columns.append([events.symbols[code] for code in events.symbol.tolist()])
        rows = [["s", s, "z", z, "p", p, "e", e, "y", y] for s, z, p, e, y in zip(*columns, strict=True)]
    else:
        rows = [["s", s, "z", z, "p", p, "e", e] for s, z, p, e in zip(*columns, strict=True)]
    stops = [*starts[1:].tolist(), len(times)]
    return [
        [key, ids[start:stop], rows[start:stop]] for key, start, stop in zip(keys, starts.tolist(), stops, strict=True)
    ]


def _starts(*columns: NDArray[Any]) -> NDArray[np.intp]:
    """Where a run of rows that are equal in all `columns` begins."""
    new = np.zeros(len(columns[0]), dtype=bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(new)
