"""Events that are no longer hot move into compressed blocks; `liqlab.archive` says how they are read back."""

from __future__ import annotations

import asyncio
import gc
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Final

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from liqlab import schema
from liqlab.archive import LEAST, ROUND, Entry, alike, names_of, of_each, streams_of, times_of
from liqlab.codecs import CODECS, Names, block_span
from liqlab.codecs.blocks import MAX_EVENTS
from liqlab.codecs.names import HEAD
from liqlab.events import Columns
from liqlab.link import turns
from liqlab.settings import Settings, load

Ints = NDArray[np.int64]

_SCRIPT: Final = files("liqlab").joinpath("seal.lua").read_text()
ENTRY: Final = 72  # bytes that a stream needs around a block, and a length may be off, at most
MOST_EACH: Final = 32  # bytes of an event in a block: fewer events than that cannot fill one
_FITS: Final = 6
_FAR: Final = 0.8  # of the room: what would take less by the block before needs no look
_FULL, _AIM = 0.955, 0.978  # of the room: what a search is content with, and what it aims at
_TYPICAL: Final = 5.0  # bytes of an event in a block
_TRIES: Final = 5


@dataclass(frozen=True)
class Sealed:
    """What sealing did: events moved, blocks made and their bytes before the server's own overhead.

    Attributes
    ----------
    each : float
        Of a shard: bytes that an event takes in a block by the last one that was made, or only measured; 0 where none
        was.
    until_ms : int
        Of a shard: up to when events are sealed now; 0 where nothing was older than the hot window.
    shards : dict of shard to Sealed
        What was done in each.
    """

    events: int = 0
    blocks: int = 0
    payload: int = 0
    each: float = 0.0
    until_ms: int = 0
    shards: dict[int | None, Sealed] = field(default_factory=dict)


@dataclass(frozen=True)
class _Front:
    """What lies before a time in the hot streams of a shard, as it was read."""

    names: Names
    sealed: int  # the time up to which events were sealed, ms
    each: list[float]  # bytes of an event in the last block, if there is one; then in those that were tried
    streams: list[tuple[str, str | None]]  # key, and whose it is where it is one symbol's
    others: list[str]  # streams that there may be, too, but were not
    entries: list[list[Entry]]  # of each stream, until they are decoded
    end_ms: int  # before which all was read
    whole: bool  # whether that is all there is to seal


@dataclass(frozen=True)
class _Block:
    """A block, and what must be true of a shard when it takes the place of hot events."""

    payload: bytes
    events: int
    cut_ms: int  # up to which it holds them
    known: int  # elements of the table of names
    added: list[str]  # names
    ends: list[bytes]  # IDs, the first and the last of each stream


@dataclass(frozen=True)
class Ahead:
    """Blocks for a time to come, made while the server is busy with other things: see `ahead`."""

    limit_ms: int
    work: asyncio.Task[dict[int | None, tuple[_Front, list[_Block]]]]

    async def take(self, shard: int | None) -> tuple[_Front, list[_Block]] | None:
        """Return a shard's, once; None where there was nothing to read, or they were taken."""
        return (await self.work).pop(shard, None)


async def ahead(redis: Redis, *, now_ms: int, settings: Settings | None = None) -> Ahead:
    """Read what `seal` will seal at a time to come, and make the blocks of it at the next moments of waiting.

    Parameters
    ----------
    redis, settings
        Of `seal`.
    now_ms : int
        The time that `seal` will be given. All events that are older than it less `retention.hot_s` must be stored.

    Returns
    -------
    Ahead
        For `seal`.
    """
    settings = settings or load()
    limit_ms = now_ms - settings.retention.hot_s * 1000
    shards = schema.shards_of(settings)
    enough = settings.writer.block_bytes // 2
    fronts = await of_each(shards, lambda shard, together: _read(redis, shard, together, limit_ms, enough))

    async def made() -> dict[int | None, tuple[_Front, list[_Block]]]:
        done: dict[int | None, tuple[_Front, list[_Block]]] = {}
        await turns()
        for shard, front in zip(shards, fronts, strict=True):
            if front:
                done[shard] = front, []
                for block in _blocks(front, settings, False):
                    done[shard][1].extend([block] if block else [])
                    await turns()
        return done

    return Ahead(limit_ms, asyncio.create_task(made()))


async def seal(
    redis: Redis,
    *,
    now_ms: int,
    settings: Settings | None = None,
    partial: bool = False,
    made: Ahead | None = None,
) -> Sealed:
    """Move events that are older than the hot window into blocks, each block in one atomic step.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes.
    now_ms : int
        The time that the window of `retention.hot_s` ends at, ms since the epoch, UTC.
    settings : Settings, optional
        `retention.hot_s`, `writer.block_codec`, `writer.block_bytes` and `shards` are read; `liqlab.settings.load()`
        when absent.
    partial : bool
        Whether what does not fill a block is sealed too. Else it stays hot until it does.
    made : Ahead, optional
        Blocks that were made for this time; where they do not hold any more they are made anew.

    Returns
    -------
    Sealed

    Raises
    ------
    CodecError
        A stream holds what no codec wrote; nothing of it was moved.
    redis.exceptions.OutOfMemoryError
        The server is at maxmemory.
    """
    settings = settings or load()
    shards = schema.shards_of(settings)
    limit_ms = now_ms - settings.retention.hot_s * 1000
    ready = made if made and made.limit_ms == limit_ms and not partial else None
    done = await of_each(
        shards, lambda shard, together: _seal(redis, shard, together, limit_ms, settings, partial, ready)
    )
    sums = (sum(one.events for one in done), sum(one.blocks for one in done), sum(one.payload for one in done))
    return Sealed(*sums, shards=dict(zip(shards, done, strict=True)))


async def _seal(
    redis: Redis,
    shard: int | None,
    together: int,
    limit_ms: int,
    settings: Settings,
    partial: bool,
    made: Ahead | None,
) -> Sealed:
    total, tries = Sealed(), 0
    ready = await made.take(shard) if made else None
    while tries < _TRIES:
        enough = settings.writer.block_bytes // 2 << tries  # entries: more of them than the last block had room for
        front = ready[0] if ready else await _read(redis, shard, together, limit_ms, enough)
        if front is None:
            break
        blocks = ready[1] if ready else _blocks(front, settings, partial)
        done, more = await _move(redis, shard, front, blocks, settings)
        each = front.each[0] if front.each else 0.0
        sums = total.events + done.events, total.blocks + done.blocks, total.payload + done.payload
        total = Sealed(*sums, each, done.until_ms)
        if not more:
            break
        tries = 0 if done.blocks or ready else tries + 1
        ready = None
    return total


async def _read(redis: Redis, shard: int | None, together: int, limit_ms: int, enough: int) -> _Front | None:
    """Read streams from their fronts until there are enough entries before the time up to which all have been read."""
    epoch, sealed, names = await names_of(redis, shard)
    if not epoch or limit_ms <= sealed:
        return None
    streams = await streams_of(redis, shard, names, None)
    others = [] if len(streams) > 1 else [schema.BY_NAME["events"].key(name, shard=shard) for name in names.symbols]
    found: dict[str, list[Entry]] = {key: [] for key, _ in streams}
    starts = dict.fromkeys(found, "-")  # of the streams that have more
    while True:
        count = max(ROUND // together // len(starts), LEAST)
        pipe = redis.pipeline(transaction=False)
        for key, start in starts.items():
            pipe.execute_command(b"XRANGE", key, start, f"({limit_ms}-0", "COUNT", count)
        with _uncollected():
            replies = await pipe.execute()
        for key, entries in zip(list(starts), replies, strict=True):
            found[key] += entries
            if len(entries) < count:
                del starts[key]
            else:
                starts[key] = "(" + entries[-1][0].decode()
        end_ms = min([limit_ms, *(_time(found[key][-1]) for key in starts)])
        if not starts or sum(bisect_left(entries, end_ms, key=_time) for entries in found.values()) >= enough:
            break
    each = await _last_each(redis, shard) if any(found.values()) else []
    return _Front(names, sealed, each, streams, others, [*found.values()], end_ms, end_ms == limit_ms)


def _time(entry: Entry) -> int:
    return int(entry[0].partition(b"-")[0])


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the collector of cycles away while thousands of lists come and go.

    It looks at all that the process has, for 50 ms where numpy and pandas are there, once in some reads.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


async def _last_each(redis: Redis, shard: int | None) -> list[float]:
    """Return the bytes of an event in a shard's last block, if there is one that says so."""
    pipe = redis.pipeline(transaction=False)
    pipe.execute_command(b"XREVRANGE", schema.BY_NAME["blocks"].key(shard=shard), "+", "-", "COUNT", 1)
    return [len(words[1]) / block_span(words[1])[0] for _, words in (await pipe.execute())[0] if words[0] == b"b"]


def _decoded(front: _Front) -> tuple[list[list[bytes]], list[Ints], list[tuple[Columns, Ints]]]:
    """Return the IDs of each stream, the times in them, and events with the times in their IDs; empty the front."""
    ids, times, parts = list[list[bytes]](), list[Ints](), list[tuple[Columns, Ints]]()
    with _uncollected():
        for (key, own), entries in zip(front.streams, front.entries, strict=True):
            ids.append([number for number, _ in entries])
            times.append(times_of(ids[-1]))
            parts += [one.decoded(front.names, key, own) for one in alike(entries, times[-1])] if entries else []
        front.entries.clear()
    return ids, times, parts


def _blocks(front: _Front, settings: Settings, partial: bool) -> Iterator[_Block | None]:
    """Yield the blocks that the events of a front make, and None where others may be let to work in between."""
    names, sealed, each = front.names, front.sealed, front.each
    codec, room = CODECS[settings.writer.block_codec], settings.writer.block_bytes - ENTRY
    ids, times, parts = _decoded(front)
    if not parts:
        return
    events, id_ms = Columns.concat([part for part, _ in parts]), np.concatenate([ms for _, ms in parts])
    order = np.argsort(id_ms, kind="stable")[: int(np.searchsorted(np.sort(id_ms), front.end_ms))]
    events, id_ms, start = events.rows(order), id_ms[order], 0
    yield None

    # Of so many of the first events that are left: bytes of a block, and what makes it.
    tried: dict[int, tuple[int, Callable[[], bytes]]] = {}

    sized = codec.sizer(events, names)

    def length(count: int) -> int:
        tried[count] = sized(start + np.argsort(events.ts_ms[start : start + count], kind="stable"))
        return tried[count][0]

    while start < len(id_ms):
        if not partial and len(id_ms) - start < settings.writer.block_bytes // MOST_EACH:
            break
        tried.clear()
        count, full = fitting(id_ms[start:], room, length, *each)
        if not full and not (front.whole and partial):
            each[:] = [tried[count][0] / count] if count in tried else each
            break
        yield None
        if count not in tried:
            length(count)
        block = tried[count][1]()
        start, each[:] = start + count, [len(block) / count]
        cut_ms = front.end_ms if start == len(id_ms) else int(id_ms[start])
        ends: list[bytes] = []
        for its, ms in zip(ids, times, strict=True):
            first, last = ms.searchsorted([sealed, cut_ms]).tolist()
            ends += [its[first], its[last - 1]] if first < last else [b"", b""]
        # An earlier version's writer did not number what its codec spells out; the block does.
        _, stored, _, added = names.take()
        yield _Block(block, count, cut_ms, stored, added, ends)
        sealed = cut_ms


async def _move(
    redis: Redis, shard: int | None, front: _Front, blocks: Iterable[_Block | None], settings: Settings
) -> tuple[Sealed, bool]:
    """Store blocks in place of their events; return whether to read again."""
    script = redis.register_script(_SCRIPT)
    keys = [schema.BY_NAME[name].key(shard=shard) for name in ("names", "blocks")]
    keys += [*(key for key, _ in front.streams), *front.others]
    field, ttl_s = CODECS[settings.writer.block_codec].fields[0], settings.retention.events_s
    done, sealed = Sealed(until_ms=front.sealed), front.sealed
    for one in filter(None, blocks):
        moved = await script(
            keys=keys,
            args=[
                *(front.names.epoch, sealed, one.known + HEAD, one.cut_ms, field, one.payload, ttl_s, len(one.added)),
                len(front.streams),
                *one.ends,
                *one.added,
            ],
        )
        if moved < 0:  # a writer or another sealer came in between
            return done, True
        sealed = one.cut_ms
        done = Sealed(done.events + int(moved), done.blocks + 1, done.payload + len(one.payload), until_ms=sealed)
    return done, not front.whole


def fitting(
    id_ms: NDArray[np.int64], room: int, length: Callable[[int], int], each: float | None = None
) -> tuple[int, bool]:
    """Find how many of the first events fill a block, those of one moment kept together.

    A block lies in an allocation of its own, whose sizes are steps of up to a quarter: one that is a little too large
    wastes the rest of its step. So blocks are made to fit just below `writer.block_bytes`.

    Parameters
    ----------
    id_ms : array of int64, shape (n,)
        The times of the events' IDs.
    room : int
        Bytes that a block may have.
    length : callable
        Says how many bytes a block of so many of the first events takes.
    each : float, optional
        Bytes of an event in the block before.

    Returns
    -------
    count, full : int, bool
        `full` says that the block is as large as can be, not just as large as there are events for it.
    """
    whole, best, size = len(id_ms), 0, 0
    if each and whole <= MAX_EVENTS and whole * each < _FAR * room:
        return whole, False
    least = whole + 1  # the fewest events known to be too many
    count = min(max(int(_AIM * room / (each or _TYPICAL)), 1), MAX_EVENTS)
    for _ in range(_FITS):
        count = _untied(id_ms, count)
        if not best < count < least:
            break
        found = length(count)
        if found <= room:
            best, size = count, found
            if count == whole or found > _FULL * room:
                break
        else:
            least = count
            if count == _untied(id_ms, 1):  # one moment that is larger than a block
                return count, True
        count = min(max(int(_AIM * count * room / found), best + 1), least - 1, MAX_EVENTS)
    return (best, best < whole or size > 0.9 * room) if best else (_untied(id_ms, 1), True)


def _untied(id_ms: NDArray[np.int64], count: int) -> int:
    """Return the largest number up to `count` that cuts between two different times, or the first such above it."""
    if count >= len(id_ms):
        return len(id_ms)
    below = int(np.searchsorted(id_ms, id_ms[count]))
    return below or int(np.searchsorted(id_ms, id_ms[count], side="right"))
