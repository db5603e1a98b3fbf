"""The events through time: hot, in streams of one symbol or of all, and sealed, in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liqlab import schema
from liqlab.codecs import CODECS
from liqlab.events import run_starts
from liqlab.settings import Settings
from liqlab.sizing.entries import AROUND, Entries, entries, head_of
from liqlab.sizing.families import Family, key_length, per_row
from liqlab.sizing.prepare import Prepared, through
from liqlab.sizing.streams import Blocks, Nodes, Run, pack, seal
from liqlab.sizing.structures import PREALLOCATED, Bools, Floats, Ints, Layout, listpack_text, radix_trees


@dataclass(frozen=True)
class Events:
    """Both families, and how many events each holds, shape (m,)."""

    hot: Family
    blocks: Family
    in_blocks: Floats
    in_hot: Floats


@dataclass(frozen=True)
class Placed:
    """Events in the order of their streams; n of them in k streams.

    Attributes
    ----------
    place : array of int32, shape (n,)
        Where each stands in the feed.
    stream : array of int32, shape (n,)
        A symbol, or -1 - shard for the stream that the symbols of a shard share.
    run : Run
        Their IDs and entries.
    row, shard : array of int32, shape (n,)
        The event-minute, and the shard.
    starts, stops : array of int64, shape (k,)
        Where streams begin and end.
    visits : array of int64, shape (v,)
        Where another stream or another minute begins.
    """

    place: NDArray[np.int32]
    stream: NDArray[np.int32]
    run: Run
    row: NDArray[np.int32]
    shard: NDArray[np.int32]
    starts: Ints
    stops: Ints
    visits: Ints


def events(prepared: Prepared, settings: Settings, layout: Layout, *, exact: bool, cleaned: bool) -> Events:
    """Return what the events take under settings.

    Parameters
    ----------
    prepared : Prepared
    settings : Settings
    layout : Layout
    exact : bool
        Whether every block is encoded, for its size.
    cleaned : bool
        Whether a cleaner seals too, what does not fill a block.
    """
    writer, retention, server, rows = settings.writer, settings.retention, settings.server, prepared.rows
    kind = (
        writer.codec, writer.layout, settings.shards,
        (writer.hybrid_events, writer.bulk_events, retention.hot_s) if writer.layout == "hybrid" else 0,
    )  # fmt: skip
    placed = prepared.once(("placed", *kind), lambda: _placed(prepared, settings), large=True)
    limits = server.stream_node_max_bytes, server.stream_node_max_entries
    run, stream, row, starts, ttl_ms = placed.run, placed.stream, placed.row, placed.starts, 1000 * retention.events_s

    def packed(heads: Ints) -> Nodes:
        return prepared.once(("pack", *kind, *limits, heads.tobytes()), lambda: pack(run, heads, *limits), large=True)

    maxlen = retention.events_maxlen if writer.layout == "per_symbol" else retention.shared_maxlen
    lost: Ints | None = None  # the row in which MAXLEN pushes an event out, with all of its node
    if bool((placed.stops - starts > maxlen).any()):
        nodes = packed(starts)
        lost = np.repeat(_pushed(nodes, placed, maxlen, rows), nodes.stop - nodes.start)
    sealed = prepared.once(
        (
            "seal",
            settings.shards,
            writer.layout,
            retention.hot_s,
            writer.block_bytes,
            writer.block_codec,
            exact,
            cleaned,
        )
        + ((maxlen, *kind, *limits) if lost is not None else ()),
        lambda: _sealed(prepared, settings, placed, lost, exact, cleaned),
    )
    cuts = np.zeros((settings.shards, rows), np.int64)
    for number, one in sealed.items():
        cuts[number, one.row] = one.cut_ms
    cuts = np.maximum.accumulate(cuts, axis=1)

    # A stream begins a new node where it had been emptied, or is gone: only between two minutes.
    visits = placed.visits
    before_ms = np.where(np.isin(visits, starts), 0, run.ms[np.maximum(visits - 1, 0)])
    new = before_ms == 0
    dead = new | (before_ms + ttl_ms <= prepared.start_ms[row[visits]])
    emptied = cuts[placed.shard[visits], np.maximum(row[visits] - 1, 0)] > before_ms
    nodes = packed(visits[dead | (emptied & (row[visits] > 0))])

    # Lives of the keys: from an event up to the row in which none has come for the whole TTL.
    begins = visits[dead]
    ends = np.append(begins[1:], len(row)) - 1
    key_gone = prepared.row_at(run.ms[ends] + ttl_ms)
    length = np.where(
        stream[begins] < 0,
        key_length("events", prepared, settings, None, None) + (3 if settings.shards > 1 else 0),
        key_length("events", prepared, settings, np.maximum(stream[begins], 0), None),
    )
    keys = through(rows, row[begins], key_gone)
    size = through(rows, row[begins], key_gone, layout.key(length) + layout.stream)

    last = nodes.stop - 1
    of_key = np.searchsorted(begins, nodes.start, side="right") - 1
    gone = np.minimum(_row_of_cut(cuts, placed.shard[last], run.ms[last]), key_gone[of_key])
    gone = np.minimum(gone, _pushed(nodes, placed, maxlen, rows))
    born = row[nodes.start]
    # As long as it is its stream's last, a node has room for more; it is cut to size when the next one begins.
    follows = np.append(stream[nodes.start[1:]] == stream[nodes.start[:-1]], False)
    closed = np.minimum(np.where(follows, np.append(born[1:], rows), rows), gone)
    room = min(PREALLOCATED, server.stream_node_max_bytes)
    exactly = layout.alloc(nodes.size)
    growing = np.where(nodes.size > room, exactly, layout.alloc(room))
    size += through(rows, born, closed, growing) + through(rows, closed, gone, exactly)
    size += through(rows, born, gone) * _tree(placed, nodes.start, np.flatnonzero(gone >= rows), layout)

    blocks, in_blocks = _blocks(prepared, settings, layout, sealed)
    in_hot = prepared.stop - in_blocks
    if lost is not None or bool((key_gone < rows).any()):
        at = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(row)))
        lost = key_gone[at] if lost is None else np.minimum(lost, key_gone[at])
        in_hot = through(rows, row, np.minimum(_row_of_cut(cuts, placed.shard, run.ms), lost))
    hot = Family(keys, size, round(in_hot[-1]), per_row(rows, row[begins]))
    return Events(hot, blocks, in_blocks, in_hot)


def _placed(prepared: Prepared, settings: Settings) -> Placed:
    # Some of them are remembered: numbers that fit into half take half.
    shards, own = prepared.shards(settings.shards).astype(np.int32), alone(prepared, settings)
    symbol = prepared.columns.symbol.astype(np.int32)
    stream = np.where(own, symbol, -1 - shards[symbol])
    place = np.argsort(stream, kind="stable").astype(np.int32)
    stream, ms, row = stream[place], prepared.columns.ts_ms[place], prepared.row[place].astype(np.int32)
    starts = run_starts(stream).astype(np.int64)
    ties = run_starts(stream, ms)
    seq = (np.arange(len(ms)) - np.repeat(ties, np.diff(ties, append=len(ms)))).astype(np.int32)
    shard = np.where(stream < 0, -1 - stream, shards[np.maximum(stream, 0)])
    run = Run(ms, seq, _entries(prepared, settings, place, own))
    stops = np.append(starts[1:], len(ms))
    return Placed(place, stream, run, row, shard, starts, stops, run_starts(stream, row).astype(np.int64))


def alone(prepared: Prepared, settings: Settings) -> Bools:
    """Return which events, shape (n,), go into a stream of their symbol's own."""
    layout, retention = settings.writer.layout, settings.retention
    if layout != "hybrid":
        return np.full(len(prepared), layout == "per_symbol")
    enough, bulk = settings.writer.hybrid_events, settings.writer.bulk_events
    return prepared.once(
        ("alone", retention.hot_s, enough, bulk), lambda: _busy(prepared, retention.hot_s, enough, bulk)
    )


def _busy(prepared: Prepared, hot_s: int, enough: int, bulk: int) -> Bools:
    """Follow liqlab.link's `Busy`, batch by batch: symbols with many events in this hot window or in the last one."""
    batch = prepared.batches(bulk)
    last = np.append(np.flatnonzero(np.diff(batch)), len(batch) - 1)
    latest = np.maximum.accumulate(prepared.columns.ts_ms[last] // (1000 * hot_s))
    window_of = np.cumsum(np.diff(latest, prepend=latest[:1]) > 0)
    window = np.repeat(window_of, np.diff(last, prepend=-1))[prepared.order]
    batch, symbol = batch[prepared.order], prepared.columns.symbol[prepared.order].astype(np.int64)
    touches = run_starts(symbol, batch)
    sizes = np.diff(touches, append=len(batch))
    cells = run_starts(symbol[touches], window[touches])
    cell = np.repeat(np.arange(len(cells)), np.diff(cells, append=len(touches)))
    so_far = np.cumsum(sizes)
    so_far -= (so_far - sizes)[cells][cell]
    total = np.add.reduceat(sizes, cells)
    whose, when = symbol[touches][cells], window[touches][cells]
    before = np.zeros(len(cells), np.int64)
    follows = (whose[1:] == whose[:-1]) & (when[1:] == when[:-1] + 1)
    before[1:][follows] = total[:-1][follows]
    busy = (so_far >= enough) | (before[cell] >= enough)
    result = np.zeros(len(prepared), np.bool_)
    result[prepared.order] = np.repeat(busy, sizes)
    return result


def _entries(prepared: Prepared, settings: Settings, place: NDArray[np.int32], own: Bools) -> Entries:
    """Return the entries in the order of streams."""
    codec, shards = settings.writer.codec, settings.shards
    if own.all() or not own.any():
        found = entries(prepared, codec, own=bool(own.all()), shards=shards)
        return Entries(found.size[place], found.text[place], found.head)
    single, shared = (entries(prepared, codec, own=one, shards=shards) for one in (True, False))
    size, text = (np.where(own, a, b)[place] for a, b in ((single.size, shared.size), (single.text, shared.text)))
    return Entries(size, text, shared.head)


def _pushed(nodes: Nodes, placed: Placed, maxlen: int, rows: int) -> Ints:
    """Return the row in which MAXLEN ~ takes each node: when `maxlen` events have come after it."""
    at = nodes.stop + maxlen - 1
    stops = placed.stops[np.searchsorted(placed.starts, nodes.start, side="right") - 1]
    return np.where(at < stops, placed.row[np.minimum(at, len(placed.row) - 1)], rows)


def _sealed(
    prepared: Prepared, settings: Settings, placed: Placed, lost: Ints | None, exact: bool, cleaned: bool
) -> dict[int, Blocks]:
    back = np.empty_like(placed.place)
    back[placed.place] = np.arange(len(back))
    order = np.arange(len(back))
    if exact and settings.writer.layout != "shared":  # of one moment, sealing has one stream's after the other's
        rank = prepared.names().of_symbols(prepared.columns.symbols)[prepared.columns.symbol]
        order = np.lexsort((np.where(placed.stream[back] < 0, -1, rank), prepared.columns.ts_ms))
    shard = placed.shard[back][order]
    left = None if lost is None else lost[back]
    return {
        number: seal(prepared, settings, which, None if left is None else left[which], exact=exact, cleaned=cleaned)
        for number in prepared.present(settings.shards)
        if len(which := order[shard == number].astype(np.int64))
    }


def _row_of_cut(cuts: Ints, shard: NDArray[np.int32], ms: Ints) -> Ints:
    """Return the row in which events of a shard at a time are sealed, m for never."""
    if len(cuts) == 1:
        return np.searchsorted(cuts[0], ms, side="right")
    result = np.empty(len(ms), np.int64)
    for number in range(len(cuts)):
        mine = shard == number
        if mine.any():
            result[mine] = np.searchsorted(cuts[number], ms[mine], side="right")
    return result


def _tree(placed: Placed, starts: Ints, alive: Ints, layout: Layout) -> float:
    """Return the bytes of the radix tree that a node takes, by the trees that there are at the end."""
    some = starts[alive] if len(alive) else starts[-100:]
    run = placed.run
    return radix_trees(placed.stream[some], run.ms[some], run.seq[some], layout) / max(len(some), 1)


def _blocks(prepared: Prepared, settings: Settings, layout: Layout, sealed: dict[int, Blocks]) -> tuple[Family, Floats]:
    rows, server = prepared.rows, settings.server
    field = CODECS[settings.writer.block_codec].fields
    keys, size, held, fresh = (np.zeros(rows) for _ in range(4))
    members = 0
    length = len(schema.BY_NAME["blocks"].pattern) + (3 + len(str(settings.shards - 1)) if settings.shards > 1 else 0)
    room = min(PREALLOCATED, server.stream_node_max_bytes)
    for blocks in sealed.values():
        if not len(blocks.row):
            continue
        found = Entries(listpack_text(blocks.size) + AROUND, blocks.size + len(field[0]), head_of(field))
        zero = np.zeros(len(blocks.row), np.int64)
        nodes = pack(
            Run(blocks.cut_ms, zero, found), zero[:1], server.stream_node_max_bytes, server.stream_node_max_entries
        )
        born = blocks.row[nodes.start]
        closed = np.append(born[1:], rows)
        exactly, never = layout.alloc(nodes.size), np.full(len(born), rows)
        growing = np.maximum(layout.alloc(room), exactly)
        size += through(rows, born, closed, growing) + through(rows, closed, never, exactly)
        tree = radix_trees(
            np.zeros(len(born), np.int64), blocks.cut_ms[nodes.start], np.zeros(len(born), np.int64), layout
        )
        size += through(rows, born, never) * (tree / len(born))
        size[born[0] :] += int(layout.key(length)) + layout.stream
        keys[born[0] :] += 1
        fresh[born[0]] += 1
        held += through(rows, blocks.row, np.full(len(blocks.row), rows), blocks.count)
        members += len(blocks.row)
    return Family(keys, size, members, fresh), held
