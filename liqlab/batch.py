"""A batch of events as the one argument of the writer's script."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Final

import msgpack
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from liqlab import candles, quantiles, schema
from liqlab.codecs import CODECS, CodecError, Names
from liqlab.codecs.base import Column, Value
from liqlab.events import Columns, run_starts
from liqlab.settings import Settings

_EXACT: Final = 1 << 53  # the largest integer up to which a double holds every one


class _Keys:
    """The KEYS of a call: each name once, by its index in Lua."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names) + 1)


def pack(
    events: Columns,
    seq: int,
    writer: str,
    names: Names,
    settings: Settings,
    *,
    ahead: bool = False,
    shard: int | None = None,
    busy: Collection[str] = (),
) -> tuple[list[str], bytes]:
    """Pack one shard's part of a batch: rows grouped by stream, all that can be summed summed.

    Parameters
    ----------
    events : Columns
        Not empty, in time order.
    seq, writer, ahead
        Make the batch known to the server: its number, whose it is, and whether lower numbers come later.
    names : Names
        What is packed counts on the server to have them up to here; those that it lacks go along, once.
    busy : collection of str
        The symbols with a stream of their own in the layout ``hybrid``.

    Returns
    -------
    keys, argument : list of str, bytes
        What write.lua takes as KEYS and ARGV[1]; it documents the shape.

    Raises
    ------
    CodecError
        There are more symbols or exchanges than can be numbered.
    """
    family = schema.BY_NAME
    keys = _Keys()
    keys(family["writer"].key(writer, shard=shard))
    for name in ("names", "limits", "blocks", "events"):
        keys(family[name].key(shard=shard))
    unique = keys(family["unique_symbols"].key(shard=shard))
    ttl = {name: row.ttl_s(settings) for name, row in family.items()}

    place = np.argsort(events.symbol, kind="stable")
    events = events.rows(place)
    starts = run_starts(events.symbol)
    counts = np.diff(starts, append=len(events))
    # A small part of a table has few of its symbols: what is done for each is done for those only.
    present = [events.symbols[code] for code in events.symbol[starts].tolist()]
    events = replace(events, symbol=np.repeat(np.arange(len(starts)), counts), symbols=present)
    streams = _streams(events, place, starts, keys, names, settings, shard, busy)
    expected = names.take()

    vwaps = [
        [keys(family["vwap"].key(name, shard=shard)) for name in present],
        _text(np.add.reduceat(events.price * events.size, starts)),
        _text(np.add.reduceat(events.size, starts)),
        _text(counts),
        _text(np.maximum.reduceat(events.ts_ms, starts)),
    ]

    argument = msgpack.packb(
        [
            seq,
            ahead,
            ttl["writer"],
            expected,
            [_maxlen(settings), ttl["events"], *streams],
            [ttl["vwap"], *vwaps],
            [settings.writer.candles, *_candles(events, keys, ttl, shard)],
            [ttl["sketch"], *_sketches(events, keys, settings, shard)],
            [ttl["unique_symbols"], unique, present],
        ],
        use_bin_type=False,  # cmsgpack does not know msgpack's type for bytes
    )
    return list(keys.names), argument


def _maxlen(settings: Settings) -> int:
    retention = settings.retention
    return retention.events_maxlen if settings.writer.layout == "per_symbol" else retention.shared_maxlen


def _streams(
    events: Columns,
    place: NDArray[np.intp],
    starts: NDArray[np.intp],
    keys: _Keys,
    names: Names,
    settings: Settings,
    shard: int | None,
    busy: Collection[str],
) -> list[Any]:
    """Return what write.lua takes of every stream.

    `place` says where the events, here in the order of symbols, stand in the batch, `starts` where symbols begin.
    """
    layout, key, present = settings.writer.layout, schema.BY_NAME["events"].key, events.symbols
    alone = np.array([layout == "per_symbol" or (layout == "hybrid" and name in busy) for name in present])
    of_row = np.repeat(alone, np.diff(starts, append=len(events)))
    streams: list[Any] = []
    # Whatever the codec: readers find a symbol's own stream and its signals by them, and blocks are made of them.
    names.of_symbols(present)
    names.of_exchanges([events.exchanges[code] for code in np.unique(events.exchange).tolist()])
    if alone.any():
        own = [keys(key(name, shard=shard)) for name, is_own in zip(present, alone.tolist(), strict=True) if is_own]
        rows = np.flatnonzero(of_row)
        streams += _entries(events.rows(rows), run_starts(events.symbol[rows]), own, names, settings, own=True)
    if not alone.all():
        rows = np.flatnonzero(~of_row)
        rows = rows[np.argsort(place[rows])]  # as they came: in time order, ties too
        start = np.zeros(1, np.intp)
        shared = [keys(key(shard=shard))]
        streams += _entries(events.rows(rows), start, shared, names, settings, own=False)
    return streams


def _entries(
    events: Columns, starts: NDArray[np.intp], keys: list[int], names: Names, settings: Settings, *, own: bool
) -> list[list[Any]]:
    """Encode the events of some streams, which begin at `starts`; what the codec cannot carry goes as `fields`."""
    times, codec, fallback = events.ts_ms, CODECS[settings.writer.codec], CODECS["fields"]
    fields = codec.fields_of(own)
    odd: dict[int, list[Any]] = {}
    try:
        columns: Sequence[Column] = codec.encode_columns(events, names, own=own)
    except CodecError:  # it looks at every event by itself, so it is asked only then
        carried = codec.carries(events)
        places = np.flatnonzero(carried)
        encoded = [_numbers(column) for column in codec.encode_columns(events.rows(places), names, own=own)]
        holed = np.full((len(fields), len(events)), "", object)
        holed[:, places] = np.array(encoded, object).reshape(len(fields), -1)
        columns = holed.tolist()
        places = np.flatnonzero(~carried)
        for place, row in zip(places.tolist(), fallback.encode(events.rows(places), names, own=own), strict=True):
            odd[place] = [word for pair in zip(fallback.fields_of(own), row, strict=True) for word in pair]
    runs = run_starts(np.repeat(starts, np.diff(starts, append=len(times))), times)
    seq = np.arange(len(times)) - np.repeat(runs, np.diff(runs, append=len(times)))
    ids: list[int | str] = times.tolist()  # numbers: an ID without a sequence number has the number 0
    for place in np.flatnonzero(seq).tolist():
        ids[place] = f"{ids[place]}-{seq[place]}"
    values = [_numbers(column) for column in columns]
    stops = [*starts[1:].tolist(), len(times)]
    return [
        [
            stream,
            fields,
            ids[start:stop],
            [column[start:stop] for column in values],
            {place - start + 1: row for place, row in odd.items() if start <= place < stop},
        ]
        for stream, start, stop in zip(keys, starts.tolist(), stops, strict=True)
    ]


def _numbers(column: Column) -> Sequence[Value | int]:
    """Return integers as numbers, which Lua takes for less than texts, but for those that its doubles would round."""
    if not isinstance(column, np.ndarray):
        return column
    numbers: list[int | str] = column.tolist()
    for place in np.flatnonzero(np.abs(column) > _EXACT).tolist():
        numbers[place] = str(numbers[place])
    return numbers


def _candles(events: Columns, keys: _Keys, ttl: dict[str, int | None], shard: int | None) -> list[Any]:
    """Return of each width: TTL, keys, and what these events add to the candles."""
    found: list[Any] = []
    step = candles.FORM.itemsize
    for width, name in candles.WIDTHS.items():
        part = candles.parts(events, width)
        heads = [schema.BY_NAME[name].head(symbol, shard=shard) for symbol in events.symbols]
        places = zip(part.symbol.tolist(), part.bucket.tolist(), strict=True)
        cells = part.cells.tobytes()
        found += [ttl[name], [keys(f"{heads[code]}{bucket}") for code, bucket in places]]
        found.append([cells[at : at + step] for at in range(0, len(cells), step)])
    return found


def _sketches(events: Columns, keys: _Keys, settings: Settings, shard: int | None) -> list[Any]:
    """Return how many buckets are kept, and keys, buckets and words: how many notionals fall into which bin.

    None of them where percentiles are kept in another way: their bytes would come on top.
    """
    family, retention = schema.BY_NAME["sketch"], settings.retention
    kept = -(-retention.percentile_window_s // retention.percentile_bucket_s)
    if settings.detector.method != "logbins":
        return [kept, [], [], []]
    width_ms = 1000 * retention.percentile_bucket_s
    hours = events.ts_ms // width_ms
    quarters = quantiles.quarters(events.notional)
    order = np.lexsort((quarters, hours, events.symbol))
    ticks = quantiles.ticks(events.ts_ms, width_ms)[order]
    symbol, hours, quarters, values = events.symbol[order], hours[order], quarters[order], events.notional[order]
    cells = run_starts(symbol, hours, quantiles.log_bins(quarters))
    words, lengths = quantiles.pack(quarters[cells], np.diff(cells, append=len(order)))
    buckets = run_starts(symbol[cells], hours[cells])
    stops = 2 * np.cumsum(lengths)[np.append(buckets[1:], len(cells)) - 1]
    starts = [0, *stops[:-1].tolist()]
    first = cells[buckets]
    least, most = np.minimum.reduceat(values, first), np.maximum.reduceat(values, first)
    heads = quantiles.heads(least, most, np.minimum.reduceat(ticks, first), np.maximum.reduceat(ticks, first))
    return [
        kept,
        [keys(family.key(events.symbols[code], shard=shard)) for code in symbol[first].tolist()],
        hours[first].tolist(),
        [head + words[start:stop] for head, start, stop in zip(heads, starts, stops.tolist(), strict=True)],
    ]


def _text(numbers: NDArray[Any]) -> list[str]:
    """Return the shortest texts that read back as the same numbers; Arrow is an order faster than repr."""
    texts: list[str] = pa.array(numbers).cast(pa.string()).to_pylist()
    return texts
