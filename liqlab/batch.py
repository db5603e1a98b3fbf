"""A batch of events as the one argument of the writer's script."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, NamedTuple

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

    def added(self, names: Sequence[str]) -> list[int]:
        """Add names that all differ, also from those before; faster than one by one."""
        indices = list(range(len(self.names) + 1, len(self.names) + len(names) + 1))
        self.names.update(zip(names, indices, strict=True))
        return indices


def pack(
    events: Columns,
    seq: int,
    writer: str,
    names: Mapping[int | None, Names],
    settings: Settings,
    *,
    ahead: bool = False,
    busy: Collection[str] = (),
) -> dict[int | None, tuple[list[str], bytes]]:
    """Pack a batch shard by shard: rows grouped by stream, all that can be summed summed.

    Parameters
    ----------
    events : Columns
        Not empty, in time order; those of other shards are left out.
    seq, writer, ahead
        Make the batch known to the server: its number, whose it is, and whether lower numbers come later.
    names : mapping
        Of each shard that is wanted, which must have events. What is packed counts on the server to have them up to
        here; those that it lacks go along, once.
    busy : collection of str
        The symbols with a stream of their own in the layout ``hybrid``.

    Returns
    -------
    dict of shard to (keys, argument)
        What write.lua takes as KEYS and ARGV[1]; it documents the shape.

    Raises
    ------
    CodecError
        There are more symbols or exchanges than can be numbered.
    """
    ranks = {shard: rank for rank, shard in enumerate(names)}
    rank = np.zeros(len(events.symbols), np.int64)
    if settings.shards > 1:
        rank[:] = [ranks.get(schema.shard_of(name, settings.shards), len(ranks)) for name in events.symbols]
    of_event = rank[events.symbol]
    place = np.lexsort((events.symbol, of_event))[: np.count_nonzero(of_event < len(ranks))]
    whole = _Whole(events.rows(place), place, settings)
    cuts = of_event[place[whole.starts]].searchsorted(np.arange(len(ranks) + 1)).tolist()
    return {
        shard: _packed(whole, first, last, shard, seq, writer, known, ahead, busy)
        for (shard, known), (first, last) in zip(names.items(), pairwise(cuts), strict=True)
    }


class _Whole:
    """A batch, its rows by shard and symbol, and all that can be found out of every shard at once.

    Whatever numpy is asked takes its time, however few the rows are: a sixteenth of them takes nearly as long as all.
    """

    def __init__(self, events: Columns, place: NDArray[np.intp], settings: Settings) -> None:
        self.settings, self.place = settings, place  # where the events stand in the batch
        self.starts = starts = run_starts(events.symbol)
        self.counts = np.diff(starts, append=len(events))
        # A small part of a table has few of its symbols: what is done for each is done for those only.
        present = [events.symbols[code] for code in events.symbol[starts].tolist()]
        events = replace(events, symbol=np.repeat(np.arange(len(starts)), self.counts), symbols=present)
        self.events = events
        self.vwaps = [
            _text(np.add.reduceat(events.price * events.size, starts)),
            _text(np.add.reduceat(events.size, starts)),
            _text(self.counts),
            _text(np.maximum.reduceat(events.ts_ms, starts)),
        ]
        self.candles = [_candles(events, width) for width in candles.WIDTHS]
        self.sketches = _sketches(events, settings)

    def rows(self, first: int, last: int) -> tuple[Columns, NDArray[np.intp]]:
        """Return the events of some symbols, which count from 0, and their places."""
        end = int(self.starts[last]) if last < len(self.starts) else len(self.events)
        some = slice(int(self.starts[first]), end)
        events = self.events.rows(some)
        return replace(events, symbol=events.symbol - first, symbols=self.events.symbols[first:last]), self.place[some]


@lru_cache(maxsize=1 << 14)  # of a batch most symbols are those of the last one
def _keys_of(symbol: str, shard: int | None) -> tuple[str, ...]:
    """Return a symbol's VWAP and sketch, and the heads of its candles, by width."""
    family = schema.BY_NAME
    heads = [family[name].head(symbol, shard=shard) for name in candles.WIDTHS.values()]
    return family["vwap"].key(symbol, shard=shard), family["sketch"].key(symbol, shard=shard), *heads


def _packed(
    whole: _Whole,
    first: int,
    last: int,
    shard: int | None,
    seq: int,
    writer: str,
    names: Names,
    ahead: bool,
    busy: Collection[str],
) -> tuple[list[str], bytes]:
    """Return keys and argument for a shard, whose symbols are those from `first` on, before `last`."""
    family, settings = schema.BY_NAME, whole.settings
    keys = _Keys()
    keys(family["writer"].key(writer, shard=shard))
    for name in ("names", "limits", "blocks", "events"):
        keys(family[name].key(shard=shard))
    unique = keys(family["unique_symbols"].key(shard=shard))
    ttl = {name: row.ttl_s(settings) for name, row in family.items()}
    events, place = whole.rows(first, last)
    present = events.symbols
    streams = _streams(
        events, place, whole.starts[first:last] - whole.starts[first], keys, names, settings, shard, busy
    )
    expected = names.take()
    own, sketches, *heads_of = zip(*(_keys_of(symbol, shard) for symbol in present), strict=True)
    vwaps = [keys.added(own), *(texts[first:last] for texts in whole.vwaps)]
    cells: list[Any] = []
    for name, part, heads in zip(candles.WIDTHS.values(), whole.candles, heads_of, strict=True):
        codes, buckets, words = part.cut(first, last)
        names_of = [f"{heads[code]}{at}" for code, at in zip(codes, buckets, strict=True)]
        cells += [ttl[name], keys.added(names_of), words]
    codes, buckets, words = whole.sketches.cut(first, last)
    kept = -(-settings.retention.percentile_window_s // settings.retention.percentile_bucket_s)
    came = np.argsort(whole.place[whole.starts[first:last]])  # the room of a HyperLogLog depends on the order
    argument = msgpack.packb(
        [
            seq,
            ahead,
            ttl["writer"],
            expected,
            [_maxlen(settings), ttl["events"], *streams],
            [ttl["vwap"], *vwaps],
            [settings.writer.candles, *cells],
            [ttl["sketch"], kept, [keys(sketches[code]) for code in codes], buckets, words],
            [ttl["unique_symbols"], unique, [present[code] for code in came.tolist()]],
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


class _Buckets(NamedTuple):
    """What is kept of symbols by bucket: codes of symbols, ascending, buckets, and bytes."""

    symbol: NDArray[np.integer]
    bucket: list[int]
    words: list[bytes]

    def cut(self, first: int, last: int) -> tuple[list[int], list[int], list[bytes]]:
        """Return those of some symbols, which count from 0."""
        begin, end = self.symbol.searchsorted([first, last]).tolist()
        return (self.symbol[begin:end] - first).tolist(), self.bucket[begin:end], self.words[begin:end]


def _candles(events: Columns, width: str) -> _Buckets:
    """Return what these events add to the candles of a width."""
    part, step = candles.parts(events, width), candles.FORM.itemsize
    cells = part.cells.tobytes()
    words = [cells[at : at + step] for at in range(0, len(cells), step)]
    return _Buckets(part.symbol, part.bucket.tolist(), words)


def _sketches(events: Columns, settings: Settings) -> _Buckets:
    """Return how many notionals fall into which bin.

    None of them where percentiles are kept in another way: their bytes would come on top.
    """
    if settings.detector.method != "logbins":
        return _Buckets(np.zeros(0, np.int64), [], [])
    width_ms = 1000 * settings.retention.percentile_bucket_s
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
    words_of = zip(heads, starts, stops.tolist(), strict=True)
    return _Buckets(symbol[first], hours[first].tolist(), [head + words[start:stop] for head, start, stop in words_of])


def _text(numbers: NDArray[Any]) -> list[str]:
    """Return the shortest texts that read back as the same numbers; Arrow is an order faster than repr."""
    texts: list[str] = pa.array(numbers).cast(pa.string()).to_pylist()
    return texts
