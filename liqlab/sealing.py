"""Events that are no longer hot move into compressed blocks; `liqlab.archive` says how they are read back."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from liqlab import schema
from liqlab.archive import LEAST, ROUND, Entry, as_entry, decoded, names_of, streams_of
from liqlab.codecs import CODECS, Names
from liqlab.codecs.names import HEAD
from liqlab.events import Columns
from liqlab.settings import Settings, load

_SCRIPT: Final = files("liqlab").joinpath("seal.lua").read_text()
_ENTRY: Final = 64  # bytes that a stream needs around a block, at most
_TRIES: Final = 5
_FITS: Final = 6
_TYPICAL: Final = 5  # bytes of an event in a block
_MOST_EACH: Final = 32  # bytes of an event in a block: fewer events than that cannot fill one


@dataclass(frozen=True)
class Sealed:
    """What sealing did: events moved, blocks made and their bytes before the server's own overhead."""

    events: int = 0
    blocks: int = 0
    payload: int = 0


async def seal(redis: Redis, *, now_ms: int, settings: Settings | None = None, partial: bool = False) -> Sealed:
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
    limit_ms, total = now_ms - settings.retention.hot_s * 1000, Sealed()
    for shard in schema.shards_of(settings):
        tries = 0
        while tries < _TRIES:
            enough = settings.writer.block_bytes // 2 << tries  # entries: more of them than the last block had room for
            done, more = await _seal_shard(redis, shard, limit_ms, settings, partial, enough)
            total = Sealed(total.events + done.events, total.blocks + done.blocks, total.payload + done.payload)
            if not more:
                break
            tries = 0 if done.blocks else tries + 1
    return total


async def _front(
    redis: Redis, keys: list[str], limit_ms: int, enough: int
) -> tuple[list[list[Entry]], list[list[int]], int]:
    """Read streams from their fronts until there are enough entries before the time up to which all have been read.

    Returns
    -------
    entries, times, end_ms : list of list of Entry, list of list of int, int
        Of each stream; `end_ms` is `limit_ms` where everything before it was read.
    """
    found: dict[str, list[Entry]] = {key: [] for key in keys}
    times: dict[str, list[int]] = {key: [] for key in keys}
    starts = dict.fromkeys(keys, "-")  # of the streams that have more
    while True:
        count = max(ROUND // len(starts), LEAST)
        pipe = redis.pipeline(transaction=False)
        for key, start in starts.items():
            pipe.execute_command("XRANGE", key, start, f"({limit_ms}-0", "COUNT", count)
        for key, page in zip(list(starts), await pipe.execute(), strict=True):
            entries = [as_entry(item) for item in page]
            found[key] += entries
            times[key] += [int(number.partition(b"-")[0]) for number, _ in entries]
            if len(entries) < count:
                del starts[key]
            else:
                starts[key] = "(" + entries[-1][0].decode()
        end_ms = min([limit_ms, *(times[key][-1] for key in starts)])
        if not starts or sum(bisect_left(ms, end_ms) for ms in times.values()) >= enough:
            return list(found.values()), list(times.values()), end_ms


async def _seal_shard(
    redis: Redis, shard: int | None, limit_ms: int, settings: Settings, partial: bool, enough: int
) -> tuple[Sealed, bool]:
    """Seal what is older than `limit_ms`, as far as one reading of the streams goes; return whether to read again."""
    epoch, sealed, names = await names_of(redis, shard)
    if not epoch or limit_ms <= sealed:
        return Sealed(), False
    streams = await streams_of(redis, shard, names, None)
    found, times, end_ms = await _front(redis, [key for key, _ in streams], limit_ms, enough)
    parts = [
        part for (key, own), entries in zip(streams, found, strict=True) for part in decoded(entries, names, key, own)
    ]
    if not parts:
        return Sealed(), False
    events, id_ms = Columns.concat([part for part, _ in parts]), np.concatenate([ms for _, ms in parts])
    order = np.argsort(id_ms, kind="stable")[: int(np.searchsorted(np.sort(id_ms), end_ms))]
    events, id_ms = events.rows(order), id_ms[order]

    script = redis.register_script(_SCRIPT)
    keys = [schema.BY_NAME[name].key(shard=shard) for name in ("names", "blocks")] + [key for key, _ in streams]
    field, ttl_s = CODECS[settings.writer.block_codec].fields[0], settings.retention.events_s
    done, start = Sealed(), 0
    while start < len(id_ms):
        if not partial and len(id_ms) - start < settings.writer.block_bytes // _MOST_EACH:
            break
        rest = slice(start, None)
        count, block, full = _fitting(events.rows(rest), id_ms[rest], names, settings)
        if not full and (end_ms < limit_ms or not partial):
            break
        start += count
        cut_ms = end_ms if start == len(id_ms) else int(id_ms[start])
        ends: list[bytes] = []
        for entries, ms in zip(found, times, strict=True):
            first, last = bisect_left(ms, sealed), bisect_left(ms, cut_ms)
            ends += [entries[first][0], entries[last - 1][0]] if first < last else [b"", b""]
        # An earlier version's writer did not number what its codec spells out; the block does.
        _, known, _, added = names.take()
        moved = await script(
            keys=keys,
            args=[epoch, sealed, known + HEAD, cut_ms, field, block, ttl_s, len(added), *ends, *added],
        )
        if moved < 0:  # a writer or another sealer came in between
            return done, True
        sealed, done = cut_ms, Sealed(done.events + int(moved), done.blocks + 1, done.payload + len(block))
    return done, end_ms < limit_ms


def _fitting(events: Columns, id_ms: NDArray[np.int64], names: Names, settings: Settings) -> tuple[int, bytes, bool]:
    """Find how many of the first events fill a block, those of one moment kept together.

    A block lies in an allocation of its own, whose sizes are steps of up to a quarter: one that is a little too large
    wastes the rest of its step. So blocks are made to fit just below `writer.block_bytes`.

    Returns
    -------
    count, block, full : int, bytes, bool
        `full` says that the block is as large as can be, not just as large as there are events for it.
    """
    codec, room, whole = CODECS[settings.writer.block_codec], settings.writer.block_bytes - _ENTRY, len(id_ms)
    best = (0, b"")
    count, least = room // _TYPICAL, whole + 1  # the fewest events known to be too many
    for _ in range(_FITS):
        count = _untied(id_ms, count)
        if not best[0] < count < least:
            break
        part = events.rows(slice(None, count))
        ((block,),) = codec.encode(part.rows(np.argsort(part.ts_ms, kind="stable")), names)
        assert isinstance(block, bytes)
        if len(block) <= room:
            best = (count, block)
            if count == whole or len(block) > 0.97 * room:
                break
        else:
            least = count
            if count == _untied(id_ms, 1):  # one moment that is larger than a block
                return count, block, True
        count = min(max(int(count * room / len(block) * 0.99), best[0] + 1), least - 1)
    return *best, best[0] < whole or len(best[1]) > 0.9 * room


def _untied(id_ms: NDArray[np.int64], count: int) -> int:
    """Return the largest number up to `count` that cuts between two different times, or the first such above it."""
    if count >= len(id_ms):
        return len(id_ms)
    below = int(np.searchsorted(id_ms, id_ms[count]))
    return below or int(np.searchsorted(id_ms, id_ms[count], side="right"))
