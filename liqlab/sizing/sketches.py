"""Sketches of notionals through time: what each hour's field takes, and the hash that holds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from liqlab import schema
from liqlab.events import run_starts
from liqlab.quantiles import HEAD, log_bins, quarters
from liqlab.settings import Settings
from liqlab.sizing.families import Family, key_length, lives, per_row
from liqlab.sizing.prepare import Prepared, through
from liqlab.sizing.structures import MAX_LISTPACK_VALUE, Ints, Layout, digits, listpack_int, listpack_text

_EACH, _FOLD = 5, 512  # write.lua: values that a word counts at most; bytes at which words are folded


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
    bins = prepared.once("bins", lambda: log_bins(quarters(columns.notional[order])))
    touches = run_starts(symbol, bucket, batch)
    touch = np.repeat(np.arange(len(touches)), np.diff(touches, append=len(order)))
    opens = run_starts(symbol[touches], bucket[touches])
    field = np.repeat(np.arange(len(opens)), np.diff(opens, append=len(touches)))
    # A word takes five events of a bin: those of the batch, and those of all batches once they are folded.
    new = np.add.reduceat(_every_fifth(touch, bins), touches)
    folded = np.add.reduceat(_every_fifth(field[touch], bins), touches)
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


def _every_fifth(group: Ints, bins: Ints) -> Ints:
    """Return 1 for the first, the sixth, ... event of each bin of a group."""
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
