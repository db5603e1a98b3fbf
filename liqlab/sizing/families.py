"""Families of many keys through time: candles, VWAP, sketches of notionals, and the few that all symbols share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from liqlab import candles, schema
from liqlab.clock import MINUTE_MS
from liqlab.events import SIDES, run_starts
from liqlab.quantiles import HEAD, log_bins
from liqlab.settings import Settings
from liqlab.sizing.prepare import Prepared, listpack_number, through
from liqlab.sizing.structures import (
    LISTPACK,
    MAX_LIST_NODE,
    MAX_LISTPACK_VALUE,
    Bools,
    Floats,
    Ints,
    Layout,
    digits,
    listpack_int,
    listpack_text,
    sds,
)

_EACH, _FOLD = 8, 512  # write.lua: counts of a word; bytes at which words are folded
_REGISTERS: Final = 1 << 14  # hyperloglog.c


@dataclass(frozen=True)
class Family:
    """One family through time, m rows of event-minutes.

    Attributes
    ----------
    keys : array of float64, shape (m,)
    size : array of float64, shape (m,)
        Bytes, without the tables of keys.
    members : int
        At the end: events, fields, ...
    born : array of float64, shape (m,)
        Keys that were not there when the minute began, and expired ones gone.
    ttl : bool
        Whether its keys have one.
    """

    keys: Floats
    size: Floats
    members: int
    born: Floats
    ttl: bool = True


def per_row(rows: int, row: Ints) -> Floats:
    """Return how many things there are in each row."""
    return np.bincount(row, minlength=rows)[:rows].astype(np.float64)


def key_length(name: str, prepared: Prepared, settings: Settings, symbol: Ints | None, bucket: Ints | None) -> Ints:
    """Return the bytes of keys' names: head, shard, symbol and bucket, with colons between."""
    length = np.asarray(len(schema.BY_NAME[name].pattern.split(":")[0]), np.int64)
    if symbol is not None:
        length = length + 1 + prepared.lengths[symbol]
        if settings.shards > 1:
            length = length + 3 + digits(prepared.shards(settings.shards)[symbol])
    if bucket is not None:
        length = length + 1 + digits(bucket)
    return length


def lives(prepared: Prepared, key: Ints, row: Ints, last_ms: Ints, ttl_s: int) -> tuple[Ints, Bools]:
    """Return up to which row each touch of a key stands, and whether it is the first of the key's life.

    Parameters
    ----------
    key, row : array of int64, shape (k,)
        Touches, sorted by key and row.
    last_ms : array of int64, shape (k,)
        From when on the TTL counts.
    """
    dead = prepared.row_at(last_ms + 1000 * ttl_s)
    following = np.full(len(key), prepared.rows)
    same = key[1:] == key[:-1]
    following[:-1][same] = row[1:][same]
    begins = np.ones(len(key), np.bool_)
    begins[1:] = ~same | (dead[:-1] <= row[1:])
    return np.minimum(dead, following), begins


def candle(name: str, prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return candles of one width: strings of 84 bytes, or hashes of twelve numbers."""
    family, hashed = schema.BY_NAME[name], settings.writer.candles == "hash"
    width = family.bucket_ms // MINUTE_MS
    bucket = prepared.start_ms[prepared.minute_row] // family.bucket_ms
    ids = run_starts(prepared.symbol, bucket)
    key = np.repeat(np.arange(len(ids)), np.diff(ids, append=len(bucket)))
    gone, begins = lives(prepared, key, prepared.minute_row, prepared.last_ms, family.ttl_s(settings) or 0)
    length = key_length(name, prepared, settings, prepared.symbol[ids], bucket[ids])
    if hashed:
        cells = prepared.once(("candle", width), lambda: _candle_cells(prepared, prepared.first[ids], width))
        size = (layout.key(length) + layout.listpack_hash(cells))[key]
    else:
        batch = prepared.batches(settings.writer.bulk_events)[prepared.order]
        once = batch[prepared.first] == batch[prepared.first + prepared.count - 1]
        size = layout.string(length[key], candles.FORM.itemsize, fresh=begins & once)
    keys = through(prepared.rows, prepared.minute_row, gone)
    total = through(prepared.rows, prepared.minute_row, gone, size)
    return Family(
        keys,
        total,
        round(keys[-1]) * (len(candles.FORM.names or ()) if hashed else 1),
        per_row(prepared.rows, prepared.minute_row[begins]),
    )


def _candle_cells(prepared: Prepared, first: Ints, width: int) -> Ints:
    """Return the bytes of each candle's fields in a listpack, with the values that it ends with."""
    events = prepared.columns.rows(prepared.order)
    last = np.append(first[1:], len(events)) - 1
    within = events.ts_ms % (width * MINUTE_MS)
    bought = np.where(events.side == SIDES.index("buy"), events.size, 0.0)
    sums = [np.add.reduceat(values, first) for values in (events.size, bought, events.price, events.notional)]
    most = [np.maximum.reduceat(values, first) for values in (events.size, events.price)]
    values = [*sums, *most, np.minimum.reduceat(events.price, first), events.price[first], events.price[last]]
    size = sum((listpack_number(value) for value in values), np.zeros(len(first), np.int64))
    size += listpack_int(last - first + 1) + listpack_int(within[first]) + listpack_int(within[last])
    return size + sum(int(listpack_text(len(field))) for field in candles.FORM.names or ())


def vwap(prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return the hashes of four numbers; the sums have as many digits as adding them up gives."""
    ttl_s = schema.BY_NAME["vwap"].ttl_s(settings) or 0
    row = prepared.minute_row
    gone, begins = lives(prepared, prepared.symbol, row, prepared.last_ms, ttl_s)
    entries = _vwap_entries(prepared, begins, gone)
    size = layout.key(key_length("vwap", prepared, settings, prepared.symbol, None)) + layout.listpack_hash(entries)
    keys = through(prepared.rows, row, gone)
    return Family(
        keys, through(prepared.rows, row, gone, size), 4 * round(keys[-1]), per_row(prepared.rows, row[begins])
    )


def _vwap_entries(prepared: Prepared, begins: Bools, gone: Ints) -> Ints:
    """Return the bytes of each touch's entries: exactly where it is the first of a life, or stands at the end.

    In between, the sums are those since the beginning of the feed, which have as many digits, or one more.
    """
    sums = prepared.once("vwap sums", lambda: _vwap_sums(prepared))
    life = np.flatnonzero(begins)
    count = np.cumsum(prepared.count)
    count -= np.repeat((count - prepared.count)[life], np.diff(life, append=len(count)))
    size = listpack_int(count) + listpack_int(prepared.last_ms)
    size += sum(int(listpack_text(len(name))) for name in _VWAP)
    last = np.flatnonzero(gone >= prepared.rows)
    opens = life[np.searchsorted(life, last, side="right") - 1]
    for parts, first, whole in sums:
        size += np.where(begins, first, whole)
        # Added up in the order of the batches: every addition rounds.
        totals = [float(np.add.accumulate(parts[a : b + 1])[-1]) for a, b in zip(opens, last, strict=True)]
        size[last] += listpack_number(np.array(totals)) - np.where(begins, first, whole)[last]
    return np.asarray(size, np.int64)


def _vwap_sums(prepared: Prepared) -> list[tuple[Floats, Ints, Ints]]:
    """Return of price x size and of size: the sum of each touch, its bytes, and those of all of the symbol so far."""
    events = prepared.columns.rows(prepared.order)
    opens = np.diff(prepared.symbol, prepend=-1) != 0
    found = []
    for values in (events.price * events.size, events.size):
        parts = np.add.reduceat(values, prepared.first)
        total = np.cumsum(parts)
        total -= np.repeat((total - parts)[opens], np.diff(np.flatnonzero(opens), append=len(parts)))
        found.append((parts, listpack_number(parts), listpack_number(np.maximum(total, parts))))
    return found


_VWAP: Final = ("price_sum", "volume_sum", "count", "last_update")


@dataclass(frozen=True)
class _Cells:
    """Fields of sketches, touch by touch: shape (t,), sorted by symbol, bucket and row."""

    symbol: Ints
    bucket: Ints
    row: Ints
    last_ms: Ints
    size: Ints  # bytes of the field's value
    folded: Ints  # the same, if it were folded then
    opens: Ints  # where a field begins


def _cells(prepared: Prepared, bucket_s: int, bulk: int) -> _Cells:
    """Follow write.lua: words are appended, and folded whenever they grow past a multiple of 512 bytes."""
    columns, order = prepared.columns, prepared.order
    symbol, row, ts_ms = columns.symbol[order].astype(np.int64), prepared.row[order], columns.ts_ms[order]
    batch = prepared.batches(bulk)[order]
    bucket = ts_ms // (1000 * bucket_s)
    bins = prepared.once("bins", lambda: log_bins(columns.notional[order]))
    touches = run_starts(symbol, bucket, batch)
    touch = np.repeat(np.arange(len(touches)), np.diff(touches, append=len(order)))
    opens = run_starts(symbol[touches], bucket[touches])
    field = np.repeat(np.arange(len(opens)), np.diff(opens, append=len(touches)))
    # A word takes eight events of a bin: those of the batch, and those of all batches once they are folded.
    new = np.add.reduceat(_every_eighth(touch, bins), touches)
    folded = np.add.reduceat(_every_eighth(field[touch], bins), touches)
    folded = np.cumsum(folded)
    folded -= np.concatenate([[0], folded])[opens][field]
    words = np.cumsum(new)
    words -= np.concatenate([[0], words])[opens][field]
    size = 2 * words
    last = np.append(opens[1:], len(touches))
    for at, end in zip(opens.tolist(), last.tolist(), strict=True):
        if size[end - 1] < _FOLD:
            continue
        added, least, now = (2 * new[at:end]).tolist(), (2 * folded[at:end]).tolist(), 0
        for place, more in enumerate(added):
            grown = now + more
            now = least[place] if place and grown // _FOLD > now // _FOLD else grown
            size[at + place] = now
    ends = np.append(touches[1:], len(order)) - 1
    size, folded = size + HEAD.itemsize, 2 * folded + HEAD.itemsize
    return _Cells(symbol[touches], bucket[touches], row[touches], ts_ms[ends], size, folded, opens)


def _every_eighth(group: Ints, bins: Ints) -> Ints:
    """Return 1 for the first, the ninth, ... event of each bin of a group."""
    cell = group * (1 << 14) + (bins - bins.min())
    order = np.argsort(cell, kind="stable")
    starts = run_starts(cell[order])
    rank = np.arange(len(cell)) - np.repeat(starts, np.diff(starts, append=len(cell)))
    result = np.zeros(len(cell), np.int64)
    result[order] = rank % _EACH == 0
    return result


def sketch(prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return the hashes of notionals: a field an hour; a listpack until a value exceeds 64 bytes, then a table."""
    retention, rows = settings.retention, prepared.rows
    bucket_s, bulk = retention.percentile_bucket_s, settings.writer.bulk_events
    cells = prepared.once(("cells", bucket_s, bulk), lambda: _cells(prepared, bucket_s, bulk), large=True)
    kept = -(-retention.percentile_window_s // bucket_s)
    ttl_s = schema.BY_NAME["sketch"].ttl_s(settings) or 0
    dead, begins = lives(prepared, cells.symbol, cells.row, cells.last_ms, ttl_s)
    life = np.cumsum(begins) - 1
    ends = np.append(np.flatnonzero(begins)[1:], len(life)) - 1
    over = dead[ends]  # of each life
    # A field goes when the first one comes whose bucket is more than `kept` later, or with its key.
    opens = np.unique(np.concatenate([cells.opens, np.flatnonzero(begins)]))
    span = int(cells.bucket.max() - cells.bucket.min()) + kept + 2
    place = life[opens] * span + cells.bucket[opens] - cells.bucket.min()
    later = np.searchsorted(place, place + kept + 1)
    inside = (later < len(place)) & (np.append(life[opens], -1)[later] == life[opens])
    removed = np.where(inside, np.append(cells.row[opens], rows)[later], over[life[opens]])

    first = np.zeros(len(life), np.bool_)
    first[opens] = True
    before = np.flatnonzero(~first)
    last = np.append(opens[1:], len(life)) - 1
    # When the next bucket begins, the one before is folded.
    follows = np.append(life[opens[1:]] == life[opens[:-1]], False)
    turn = np.append(cells.row[opens[1:]], rows)[follows]
    final = np.where(follows, np.minimum(cells.folded[last], cells.size[last]), cells.size[last])
    name = cells.bucket

    def sums(values: Ints, end: Ints) -> Ints:
        """Return what the fields of a key add up to after each change, `end` being what they have when they go."""
        change = values.copy()
        change[before] -= values[before - 1]
        return np.cumsum(np.concatenate([change, (end - values[last])[follows], -end])[order])

    at = np.concatenate([cells.row, turn, removed])
    whose = np.concatenate([life, life[last[follows]], life[last]])
    order = np.argsort(whose * (rows + 1) + at, kind="stable")  # what is nearly in order is soon sorted
    at, whose = at[order], whose[order]
    counts = np.concatenate([first.astype(np.int64), np.zeros(len(turn), np.int64), -np.ones(len(last), np.int64)])
    ids = listpack_int(name)
    small = sums(ids + listpack_text(cells.size), ids[last] + listpack_text(final))
    large = sums(layout.field(digits(name), cells.size), layout.field(digits(name[last]), final))
    count = np.cumsum(counts[order])
    wide = np.where(cells.size > MAX_LISTPACK_VALUE, cells.row, rows)
    converted = np.minimum.reduceat(wide, np.flatnonzero(begins))[whose]
    until = np.append(at[1:], rows)
    until[:-1] = np.where(whose[1:] == whose[:-1], until[:-1], over[whose[:-1]])
    until[-1] = over[whose[-1]]
    there = (count > 0) & (at < rows)
    holds = np.where(at >= converted, layout.hash_table(np.maximum(count, 1)) + large, layout.listpack_hash(small))
    length = key_length("sketch", prepared, settings, cells.symbol[np.flatnonzero(begins)], None)[whose]
    born, gone = at[there], np.maximum(until[there], at[there])
    keys = through(rows, born, gone)
    total = through(rows, born, gone, (layout.key(length) + holds)[there])
    members = round(through(rows, born, gone, count[there])[-1])
    return Family(keys, total, members, per_row(rows, cells.row[begins]))


def unique_symbols(prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return the HyperLogLog of symbols of each shard, which begins anew when its hour is over."""
    ttl_s = schema.BY_NAME["unique_symbols"].ttl_s(settings) or 0
    whose = prepared.shards(settings.shards)[prepared.symbol]
    keys, total, born = np.zeros(prepared.rows), np.zeros(prepared.rows), np.zeros(prepared.rows)
    length = len("unique_symbols:1h") + (0 if settings.shards == 1 else 3 + len(str(settings.shards - 1)))
    sizes = layout.string(length, 0) - layout.alloc(sds(0)) + layout.alloc(_sparse(len(prepared.lengths), layout) + 6)
    for shard in prepared.present(settings.shards):
        mine = np.flatnonzero(whose == shard)
        mine = mine[np.lexsort((prepared.symbol[mine], prepared.minute_row[mine]))]
        row, symbol = prepared.minute_row[mine], prepared.symbol[mine]
        start = 0
        while start < len(row):
            begun = int(row[start])
            over = int(prepared.row_at(prepared.last_ms[mine[start : start + 1]] + 1000 * ttl_s)[0])
            end = int(np.searchsorted(row, max(over, begun + 1)))
            _, new = np.unique(symbol[start:end], return_index=True)
            count = np.cumsum(np.bincount(row[start:end][new] - begun, minlength=max(over, begun + 1) - begun))
            born[begun] += 1
            keys[begun : begun + len(count)] += 1
            total[begun : begun + len(count)] += sizes[count]
            start = end
    return Family(keys, total, round(keys[-1]), born)


def _sparse(most: int, layout: Layout) -> Ints:
    """Return the room of a sparse HyperLogLog of 0 to `most` symbols (`hyperloglog.c`).

    A register that is set takes a byte, the zeros before it one up to 64 and else two; it grows by its own length or by
    300 bytes, whichever is less, when three more do not fit.
    """
    symbols = np.arange(most + 1)
    used = _REGISTERS * -np.expm1(-symbols / _REGISTERS)
    gap = used / _REGISTERS
    far = np.exp(-64 * gap)
    length = np.ceil(18 + used * (1 + (1 - gap) * (1 + far))).astype(np.int64)
    room, result = 19, np.zeros(most + 1, np.int64)
    for number, size in enumerate(length.tolist()):
        while size + 2 > room:
            wanted = room + 2 + min(room + 2, 300)
            head = 4 if wanted < 256 else 6
            room = min(int(layout.alloc(wanted + head)) - head, 12_304)
        result[number] = room
    return result


def names(prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return the lists of names, one a shard: a symbol with its first event, exchanges with the feed's."""
    shards, rows = settings.shards, prepared.rows
    whose = prepared.shards(shards)[prepared.symbol]
    opens = run_starts(prepared.symbol)
    exchange = sum(int(listpack_text(1 + len(name.encode()))) for name in prepared.columns.exchanges)
    length = len("liqid") + (0 if shards == 1 else 2 + len(str(shards - 1)))
    keys, total, born, members = np.zeros(rows), np.zeros(rows), np.zeros(rows), 0
    for shard in prepared.present(shards):
        mine = opens[whose[opens] == shard]
        text = listpack_text(1 + prepared.lengths[prepared.symbol[mine]])
        # In front of the names: a token of 16 digits, and a time of 8 bytes.
        used = (
            np.cumsum(np.bincount(prepared.minute_row[mine], text, rows)) + LISTPACK + listpack_text(16) + 10 + exchange
        )
        whole, rest = np.divmod(used, MAX_LIST_NODE)
        size = np.asarray(layout.key(length, ttl=False) + layout.alloc(rest), np.float64)
        size += whole * (layout.alloc(32) + layout.alloc(MAX_LIST_NODE))
        size += ((whole > 0) | layout.separate) * (layout.alloc(48) + layout.alloc(32))
        first = int(prepared.minute_row[whose == shard].min())
        born[first] += 1
        keys[first:] += 1
        total[first:] += size[first:]
        members += 2 + len(mine) + len(prepared.columns.exchanges)
    return Family(keys, total, members, born, ttl=False)


def writer(prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return the mark of the writer, one a shard: a small hash with the number of the last batch."""
    length = len("liqw:") + 16 + (0 if settings.shards == 1 else 4)
    entries = listpack_text(3) + listpack_int(prepared.rows)
    each = layout.key(length) + layout.listpack_hash(entries)
    count = len(prepared.present(settings.shards))
    born = np.zeros(prepared.rows)
    born[0] = count
    return Family(np.full(prepared.rows, float(count)), np.full(prepared.rows, float(each * count)), count, born)
