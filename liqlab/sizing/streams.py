"""Streams through time: how events fill nodes, when they are sealed into blocks, and when nodes go."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from liqlab.clock import MINUTE_MS
from liqlab.codecs import CODECS
from liqlab.sealing import ENTRY, fitting, least
from liqlab.settings import Settings
from liqlab.sizing.entries import Entries
from liqlab.sizing.prepare import Prepared
from liqlab.sizing.structures import Floats, Ints

SEAL_MS: Final = 5 * MINUTE_MS  # as liqlab.replay does
_STEPS: Final = (1 << 7, 1 << 12, 1 << 15, 1 << 23)  # from which on a difference in time takes a byte more
_SAMPLES: Final = 24  # places of the feed at which blocks are encoded
_COUNTS: Final = (16, 64, 256, 1024, 4096)  # of events in such a block


@dataclass(frozen=True)
class Nodes:
    """Nodes of streams, stream by stream.

    Attributes
    ----------
    start, stop : array of int64, shape (k,)
        Entries, in the order that they were packed in.
    size : array of int64, shape (k,)
        Bytes of their listpacks.
    """

    start: Ints
    stop: Ints
    size: Ints


class Run:
    """Entries of streams, stream by stream: the halves of their IDs and what they take, shape (n,)."""

    def __init__(self, ms: Ints, seq: NDArray[np.integer], found: Entries) -> None:
        self.ms, self.seq, self.found = ms, seq, found
        # Bytes of all before, with two for each time: the least it takes.
        self.total: Ints = np.concatenate([[0], np.cumsum(found.size + 2)])
        self.widest = int(found.text.max(initial=0)) + 5

    @property
    def views(self) -> tuple[memoryview, ...]:
        """IDs, bytes before and texts, by single values: numpy takes ten times as long for one."""
        columns = (self.ms, self.seq, self.total, self.found.text)
        return tuple(np.ascontiguousarray(column, np.int64).data for column in columns)


def pack(run: Run, heads: Ints, max_bytes: int, max_entries: int) -> Nodes:
    """Fill nodes as XADD does (`t_stream.c`): a new one where the bytes or the entries reach the limit.

    Parameters
    ----------
    run : Run
    heads : array of int64
        Where a stream begins, or goes on after it had been emptied: there a node begins in any case.
    max_bytes, max_entries : int
        ``stream-node-max-bytes`` and ``stream-node-max-entries``.
    """
    ends, head = np.append(heads[1:], len(run.ms)), run.found.head
    count = ends - heads
    # Times and sequence numbers take at most 5 bytes more than counted.
    most = run.total[ends] - run.total[heads] + 5 * count + head + run.widest
    single = (most < max_bytes) & (count <= max_entries)
    few = heads[single]
    start, stop, size = (
        [few],
        [ends[single]],
        [run.total[ends[single]] - run.total[few] + _extra(run, few, count[single])],
    )
    many = ~single
    if many.any():
        parts = np.array(_cut(run, heads[many].tolist(), ends[many].tolist(), max_bytes - head, max_entries), np.int64)
        for column, found in zip((start, stop, size), parts.T, strict=True):
            column.append(found)
    starts, stops, sizes = (np.concatenate(column) for column in (start, stop, size))
    order = np.argsort(starts, kind="stable")
    return Nodes(starts[order], stops[order], sizes[order] + head)


def _extra(run: Run, heads: Ints, count: Ints) -> Ints:
    """Return what times and sequence numbers take beyond the least, in nodes of so many entries each."""
    if not len(heads):
        return np.zeros(0, np.int64)
    begins = np.cumsum(count) - count
    at = np.arange(int(count.sum())) + np.repeat(heads - begins, count)
    wait = run.ms[at] - np.repeat(run.ms[heads], count)
    extra = (run.seq[at] < np.repeat(run.seq[heads], count)).astype(np.int64)
    for step in _STEPS:
        extra += wait >= step
    result: Ints = np.add.reduceat(extra, begins) + (count > 127)
    return result


def _cut(run: Run, heads: list[int], ends: list[int], room: int, most: int) -> list[tuple[int, int, int]]:
    """Cut long runs of entries into nodes; return where each begins and ends, and its bytes."""
    ms, seq, total, text = run.views
    found = []
    for start, end in zip(heads, ends, strict=True):
        while start < end:
            last = min(start + most, end)
            began, first = total[start], ms[start]
            steps = [bisect_left(ms, first + step, start, last) for step in _STEPS]
            before: list[int] = []  # entries so far with a lower sequence number than the first: a byte more each
            if number := seq[start]:
                before = np.cumsum(run.seq[start:last] < number).tolist()
            # Where it would end without the bytes of texts and times to come is too late; with the most of them, too
            # early: between the two, entries are tried.
            late = bisect_left(total, began + room, start + 1, last)
            extra = sum([late - step for step in steps if step < late]) + (before[late - start - 1] if before else 0)
            at = bisect_left(total, began + room - run.widest - extra, start + 1, last)
            while True:
                size = total[at] - began + sum([at - step for step in steps if step < at]) + (at - start > 127)
                size += before[at - start - 1] if before else 0
                if at == last or size + text[at] >= room:
                    break
                at += 1
            found.append((start, at, size))
            start = at
    return found


@dataclass(frozen=True)
class Blocks:
    """Sealed blocks of one shard.

    Attributes
    ----------
    row, count, size : array of int64, shape (k,)
        When it was made; events; bytes.
    cut_ms : array of int64, shape (k,)
        Events before this time are sealed.
    """

    row: Ints
    count: Ints
    size: Ints
    cut_ms: Ints


def seal(
    prepared: Prepared, settings: Settings, which: Ints, lost: Ints | None, *, exact: bool, cleaned: bool
) -> Blocks:
    """Follow `liqlab.sealing` through the feed: which events go into which block, and when.

    Parameters
    ----------
    which : array of int64, shape (k,)
        The events of one shard, in time order.
    lost : array of int64, shape (k,), optional
        The row in which MAXLEN pushes each out, m for never.
    exact : bool
        Whether every block is encoded, as sealing would; else sizes are those of samples of the feed.
    cleaned : bool
        Whether a cleaner seals, once in `cleanup.compact_s`, what does not fill a block too.
    """
    compact_ms = round(1000 * settings.cleanup.compact_s)
    next_compact_ms = int(prepared.start_ms[0]) + compact_ms
    times, rows = prepared.columns.ts_ms[which], prepared.rows
    limits = prepared.now_ms - 1000 * settings.retention.hot_s
    room = settings.writer.block_bytes - ENTRY
    size_of = _exact(prepared, settings, which) if exact else _sampled(prepared, settings, which)
    found: list[tuple[int, int, int, int]] = []
    next_ms, start = 0, 0
    ready = np.searchsorted(times, limits).tolist()
    left = np.arange(0)
    each: list[float] = []  # bytes of an event in the block before, where there was one

    def length(count: int) -> int:
        return size_of(left[:count], False)

    for row, now_ms in enumerate(prepared.now_ms.tolist()):
        if now_ms < next_ms and row < rows - 1:
            continue
        next_ms = now_ms + SEAL_MS
        partial = cleaned and now_ms >= next_compact_ms
        if partial:
            next_compact_ms = now_ms + compact_ms
        left = np.arange(start, ready[row])
        if settings.writer.block_codec != "block":  # only of these sealing knows what the last one had
            each = []
        if lost is not None:
            left = left[lost[left] > row]
        while len(left) >= (1 if partial else least(settings.writer.block_bytes, *each)):
            count, full = fitting(times[left], room, length, *each)
            if not full and not partial:
                break
            size = size_of(left[:count], True)
            each = [size / count]
            start = int(left[count - 1]) + 1
            left = left[count:]
            cut = int(times[left[0]]) if len(left) else int(limits[row])
            found.append((row, count, size, cut))
    table = np.array(found, np.int64).reshape(-1, 4)
    return Blocks(table[:, 0], table[:, 1], table[:, 2], table[:, 3])


def _exact(prepared: Prepared, settings: Settings, which: Ints) -> Callable[[Ints, bool], int]:
    """Return what says how many bytes a block of events takes: to a word, or exactly."""
    codec, columns = CODECS[settings.writer.block_codec], prepared.columns
    names = prepared.names()
    sizer = cache(lambda: codec.sizer(columns, names))  # for the feed as a whole, if at all

    def size_of(left: Ints, exactly: bool) -> int:
        at = which[left]
        key = (codec.name, settings.writer.layout, settings.shards, int(at[0]), int(at[-1]), len(at), exactly)
        if key not in prepared.blocks:
            length, made = sizer()(at)
            prepared.blocks[key] = len(made()) if exactly else length
        return prepared.blocks[key]

    return size_of


def _sampled(prepared: Prepared, settings: Settings, which: Ints) -> Callable[[Ints, bool], int]:
    """Return sizes by place and number: samples are encoded, and interpolated between."""
    places, each, counts = prepared.once(
        ("samples", settings.writer.block_codec, settings.shards, int(which[0])),
        lambda: _sample(prepared, settings.writer.block_codec, which),
    )

    local = (each[:, -1] / each[:, -1].mean()).tolist()
    width = max((places[-1] - places[0]) / max(len(places) - 1, 1), 1.0)
    of_count = each.mean(axis=0).tolist()
    log_counts = np.log(counts).tolist()

    def size_of(left: Ints, exactly: bool) -> int:
        nearest = int(((left[0] + left[-1]) / 2 - places[0]) / width + 0.5)
        log, at = math.log(len(left)), 1
        while at < len(of_count) - 1 and log > log_counts[at]:
            at += 1
        size = of_count[-1]
        if log < log_counts[-1] and len(of_count) > 1:
            part = (log - log_counts[at - 1]) / (log_counts[at] - log_counts[at - 1])
            size = of_count[at - 1] + part * (of_count[at] - of_count[at - 1])
        return int(len(left) * local[min(max(nearest, 0), len(local) - 1)] * size)

    return size_of


def _sample(prepared: Prepared, name: str, which: Ints) -> tuple[Floats, Floats, Ints]:
    codec, names = CODECS[name], prepared.names()
    counts = [count for count in _COUNTS if count < len(which)] or [len(which)]
    starts = np.unique(np.linspace(0, len(which) - counts[-1], _SAMPLES).astype(np.int64))
    each: Floats = np.array(
        [
            [len(codec.encode(prepared.columns.rows(which[at : at + n]), names)[0][0]) / n for n in counts]
            for at in starts.tolist()
        ]
    )
    middles = (starts + 0.5 * counts[-1]).astype(np.float64)
    return middles, each, np.array(counts, np.int64)
