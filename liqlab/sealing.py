"""Events that are no longer hot move into compressed blocks; `liqlab.archive` says how they are read back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Final

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from liqlab import schema
from liqlab.archive import of_each
from liqlab.codecs import CODECS
from liqlab.codecs.blocks import MAX_EVENTS
from liqlab.codecs.names import HEAD
from liqlab.fronts import Front, Rest, read
from liqlab.link import given_up, turns
from liqlab.settings import Settings, load

Ints = NDArray[np.int64]

_SCRIPT: Final = files("liqlab").joinpath("seal.lua").read_text()
ENTRY: Final = 72  # bytes that a stream needs around a block, and a length may be off, at most
_MOST_EACH: Final = 32  # bytes of an event in a block: fewer events than that cannot fill one
_FITS: Final = 6
_FAR: Final = 0.88  # of the room: what would take less by the block before needs no look
_FULL, _AIM = 0.955, 0.978  # of the room: what a search is content with, and what it aims at
_TYPICAL: Final = 5.0  # bytes of an event in a block
_TRIES: Final = 5
_AHEAD: Final = 100_000  # entries of a shard, read in several rounds: of most bursts all of five minutes


@dataclass(frozen=True)
class Sealed:
    """What sealing did: events moved, blocks made and their bytes before the server's own overhead.

    Attributes
    ----------
    each : float
        Of a shard: bytes that an event takes in its last block, 0 where there is none that says so.
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
class _Block:
    """A block, and what must be true of a shard when it takes the place of hot events."""

    payload: bytes
    events: int
    cut_ms: int  # up to which it holds them
    known: int  # elements of the table of names
    added: list[str]  # names
    ends: list[bytes]  # IDs, the first and the last of each stream


class Ahead:
    """What will be sealed at a time to come, and its blocks, made while the server is busy: see `ahead`.

    Attributes
    ----------
    limit_ms : int
        Before which events are sealed then.
    fronts : dict of shard to Front
        What was read.
    """

    def __init__(self, limit_ms: int, fronts: dict[int | None, Front], settings: Settings) -> None:
        self.limit_ms, self.fronts = limit_ms, fronts
        self._settings = settings
        self._making: asyncio.Task[dict[int | None, list[_Block]]] | None = None

    def begin(self) -> asyncio.Task[dict[int | None, list[_Block]]]:
        """Let the blocks be made at the next moments of waiting."""
        self._making = self._making or asyncio.create_task(self._make())
        return self._making

    async def _make(self) -> dict[int | None, list[_Block]]:
        made: dict[int | None, list[_Block]] = {}
        await turns()
        for shard, front in self.fronts.items():
            made[shard] = []
            for block in _blocks(front, self._settings, False):
                made[shard] += [block] if block else []
                await asyncio.sleep(0)
        return made

    async def expected(self) -> dict[int | None, Sealed]:
        """Return, when the blocks are made, what `seal` will have done in each shard if nothing comes in between."""
        done: dict[int | None, Sealed] = {}
        for shard, blocks in (await self.begin()).items():
            front = self.fronts[shard]
            until_ms = blocks[-1].cut_ms if blocks else front.sealed_ms
            sums = sum(one.events for one in blocks), len(blocks), sum(len(one.payload) for one in blocks)
            done[shard] = Sealed(*sums, _each(front), until_ms)
        return done

    async def take(self, shard: int | None) -> tuple[Front, list[_Block]] | None:
        """Return a shard's; None where there was nothing to read."""
        blocks = await self.begin()
        return (self.fronts[shard], blocks[shard]) if shard in blocks else None

    async def close(self) -> None:
        """Give up what is not made."""
        await given_up(self._making)


async def ahead(
    redis: Redis,
    *,
    now_ms: int,
    settings: Settings | None = None,
    behind: Mapping[int | None, Front] | None = None,
) -> Ahead:
    """Read what `seal` will seal at a time to come.

    Parameters
    ----------
    redis, settings
        Of `seal`.
    now_ms : int
        The time that `seal` will be given. All events that are older than it less `retention.hot_s` must be stored.
    behind : mapping of shard to Front, optional
        What was read for the time before, where blocks are made of it and are stored by then: not read again.

    Returns
    -------
    Ahead
        For `seal`; its `begin` has the blocks made.
    """
    settings, behind = settings or load(), behind or {}
    limit_ms = now_ms - settings.retention.hot_s * 1000
    shards = schema.shards_of(settings)
    fronts = await of_each(
        shards, lambda shard, together: read(redis, shard, together, limit_ms, _AHEAD, behind.get(shard))
    )
    return Ahead(limit_ms, {shard: one for shard, one in zip(shards, fronts, strict=True) if one}, settings)


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
        front = ready[0] if ready else await read(redis, shard, together, limit_ms, enough)
        if front is None:
            break
        blocks = ready[1] if ready else _blocks(front, settings, partial)
        done, more = await _move(redis, shard, front, blocks, settings)
        sums = total.events + done.events, total.blocks + done.blocks, total.payload + done.payload
        total = Sealed(*sums, _each(front), done.until_ms)
        if not more:
            break
        tries = 0 if done.blocks or ready else tries + 1
        ready = None
    return total


def _each(front: Front) -> float:
    return front.each[0] if front.each else 0.0


def _blocks(front: Front, settings: Settings, partial: bool) -> Iterator[_Block | None]:
    """Yield the blocks that the events of a front make, and None where others may be let to work in between."""
    names, each = front.names, list(front.each)
    codec, room = CODECS[settings.writer.block_codec], settings.writer.block_bytes - ENTRY
    whole = front.decoded()
    if not whole:
        return
    events, id_ms, sealed, start = whole.events, whole.id_ms, front.sealed_ms, 0
    yield None

    # Of so many of the first events that are left: bytes of a block, and what makes it.
    tried: dict[int, tuple[int, Callable[[], bytes]]] = {}

    sized = codec.sizer(events, names)

    def length(count: int) -> int:
        tried[count] = sized(start + np.argsort(events.ts_ms[start : start + count], kind="stable"))
        return tried[count][0]

    while start < len(id_ms):
        if not partial and len(id_ms) - start < least(settings.writer.block_bytes, *each):
            break
        tried.clear()
        count, full = fitting(id_ms[start:], room, length, *each)
        if not full and not (front.whole and partial):
            break
        yield None
        if count not in tried:
            length(count)
        block = tried[count][1]()
        start, each = start + count, [len(block) / count]
        front.each = each if codec.name == "block" else []  # others do not say how many events they have
        cut_ms = front.end_ms if start == len(id_ms) else int(id_ms[start])
        ends: list[bytes] = []
        for key in front.streams:
            first, after = whole.times[key].searchsorted([sealed, cut_ms]).tolist()
            ends += [whole.ids[key][first], whole.ids[key][after - 1]] if first < after else [b"", b""]
        # An earlier version's writer did not number what its codec spells out; the block does.
        _, stored, _, added = names.take()
        yield _Block(block, count, cut_ms, stored, added, ends)
        sealed = cut_ms
    cuts = {key: int(ms.searchsorted(sealed)) for key, ms in whole.times.items()}
    front.rest = Rest(
        sealed,
        {key: its[cuts[key] :] for key, its in whole.ids.items()},
        {key: ms[cuts[key] :] for key, ms in whole.times.items()},
        events.rows(slice(start, None)),
        id_ms[start:],
    )


async def _move(
    redis: Redis, shard: int | None, front: Front, blocks: Iterable[_Block | None], settings: Settings
) -> tuple[Sealed, bool]:
    """Store blocks in place of their events; return whether to read again."""
    script = redis.register_script(_SCRIPT)
    keys = [schema.BY_NAME[name].key(shard=shard) for name in ("names", "blocks")]
    keys += [*front.streams, *front.others]
    field, ttl_s = CODECS[settings.writer.block_codec].fields[0], settings.retention.events_s
    done, sealed = Sealed(until_ms=front.sealed_ms), front.sealed_ms
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
    if whole < _near(room, each):
        return whole, False
    excess = whole + 1  # the fewest events known to be too many
    count = min(max(int(_AIM * room / (each or _TYPICAL)), 1), MAX_EVENTS)
    for _ in range(_FITS):
        count = _untied(id_ms, count)
        if not best < count < excess:
            break
        found = length(count)
        if found <= room:
            best, size = count, found
            if count == whole or found > _FULL * room:
                break
        else:
            excess = count
            if count == _untied(id_ms, 1):  # one moment that is larger than a block
                return count, True
        count = min(max(int(_AIM * count * room / found), best + 1), excess - 1, MAX_EVENTS)
    return (best, best < whole or size > 0.9 * room) if best else (_untied(id_ms, 1), True)


def least(block_bytes: int, each: float | None = None) -> float:
    """Return the fewest events that sealing looks at, by the bytes that each takes in the block before."""
    return max(block_bytes // _MOST_EACH, 1, _near(block_bytes - ENTRY, each))


def _near(room: int, each: float | None) -> float:
    return min(_FAR * room / each, MAX_EVENTS + 1) if each else 0


def _untied(id_ms: NDArray[np.int64], count: int) -> int:
    """Return the largest number up to `count` that cuts between two different times, or the first such above it."""
    if count >= len(id_ms):
        return len(id_ms)
    below = int(np.searchsorted(id_ms, id_ms[count]))
    return below or int(np.searchsorted(id_ms, id_ms[count], side="right"))
