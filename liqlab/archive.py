"""The stored events: read back as one table, and sealed into blocks once they are no longer hot.

Events are written to hot streams (`liqlab.writer`). Sealing moves all that are older than some time, of every stream at
once, into one block of `liqb`, and notes that time beside the names: whatever has an ID below it lies in blocks,
whatever has not is hot. A reader takes the hot streams first, that time next, and the blocks up to it last; so it sees
each event once, whatever is sealed meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from redis.asyncio import Redis
from redis.utils import str_if_bytes

from liqlab import schema
from liqlab.codecs import BY_FIELD, CODECS, CodecError, Names, block_span
from liqlab.codecs.names import HEAD
from liqlab.events import Columns, empty
from liqlab.settings import Settings, load

# Entries read in one round trip: what waits to be sent counts as the server's memory, for eviction too.
_ROUND: Final = 10_000
_LEAST: Final = 100  # of one stream
_BLOCKS: Final = 16  # a page of them
_STREAMS: Final = 100  # read in one round trip
_LATE: Final = b"t"
_SCRIPT: Final = files("liqlab").joinpath("seal.lua").read_text()
_ENTRY: Final = 64  # bytes that a stream needs around a block, at most
_TRIES: Final = 5
_FITS: Final = 6
_TYPICAL: Final = 5  # bytes of an event in a block
_MOST_EACH: Final = 32  # bytes of an event in a block: fewer events than that cannot fill one

Entry = tuple[bytes, Sequence[bytes]]  # ID; field, value, ...


@dataclass(frozen=True)
class Sealed:
    """What sealing did: events moved, blocks made and their bytes before the server's own overhead."""

    events: int = 0
    blocks: int = 0
    payload: int = 0


async def history(
    redis: Redis,
    symbol: str | None = None,
    start_ms: int | None = None,
    end_ms: int | None = None,
    *,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Read stored events, hot and sealed, each once, whatever the layout and the codec.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes.
    symbol : str, optional
        The venue's own name; all symbols when absent.
    start_ms, end_ms : int, optional
        Event time, both inclusive, ms since the epoch, UTC.
    settings : Settings, optional
        `shards` is read; `liqlab.settings.load()` when absent.

    Returns
    -------
    pandas.DataFrame
        An event table; `notional` is price x size.

    Raises
    ------
    CodecError
        A stream holds what no codec wrote; the message names the stream.
    """
    settings = settings or load()
    shards = schema.shards_of(settings) if symbol is None else [schema.shard_of(symbol, settings.shards)]
    parts = [part for shard in shards for part in await _shard(redis, shard, symbol, start_ms or 0, end_ms)]
    if not parts:
        return empty()
    found = Columns.concat(parts)
    keep = found.ts_ms >= (start_ms or 0)
    if end_ms is not None:
        keep &= found.ts_ms <= end_ms
    if symbol is not None:
        keep &= found.symbol == (found.symbols.index(symbol) if symbol in found.symbols else -1)
    return found.rows(np.flatnonzero(keep)).table()


async def count(redis: Redis, *, settings: Settings | None = None) -> int:
    """Return how many events are stored, hot and sealed."""
    settings = settings or load()
    total = 0
    for shard in schema.shards_of(settings):
        _, sealed, names = await _names(redis, shard)
        keys = await _streams(redis, shard, names, None)
        for at in range(0, len(keys), _STREAMS):
            pipe = redis.pipeline(transaction=False)
            for key, _ in keys[at : at + _STREAMS]:
                pipe.xlen(key)
            total += sum(await pipe.execute())
        async for entry in _blocks(redis, shard, 0, sealed):
            total += _span(entry)[0] if entry[1][0] == b"b" else len(_decoded([entry], names, "liqb")[0][0])
    return total


async def _names(redis: Redis, shard: int | None) -> tuple[str, int, Names]:
    """Return the epoch of a shard's table of names, the time up to which events are sealed, and the names."""
    head = await redis.lrange(schema.BY_NAME["names"].key(shard=shard), 0, -1)
    if not head:
        return "", 0, Names()
    epoch = str_if_bytes(head[0])
    return epoch, int(head[1]), Names(head[HEAD:], epoch)


async def streams(redis: Redis, shard: int | None) -> list[str]:
    """Return the keys of the hot streams that a shard may have, the one that symbols share first."""
    _, _, names = await _names(redis, shard)
    return [key for key, _ in await _streams(redis, shard, names, None)]


async def _streams(redis: Redis, shard: int | None, names: Names, symbol: str | None) -> list[tuple[str, str | None]]:
    """Return the hot streams there may be, each with its symbol, None for the shared one."""
    key = schema.BY_NAME["events"].key
    symbols = [symbol] if symbol is not None else names.symbols
    if symbol is None and not names.epoch:  # the original's form keeps no table of names
        pattern = key("*", shard=shard)
        head = len(pattern) - 1
        symbols = [found.decode()[head:] async for found in redis.scan_iter(match=pattern, count=1_000)]
    own = [(key(name, shard=shard), name) for name in symbols]
    if symbol is None and own and not await redis.exists(*(name for name, _ in own)):
        own = []  # as nearly always in the layout `shared`: 400 looks at nothing are saved
    return [(key(shard=shard), None), *own]


async def _shard(
    redis: Redis, shard: int | None, symbol: str | None, start_ms: int, end_ms: int | None
) -> list[Columns]:
    _, _, names = await _names(redis, shard)
    hot = []
    keys = await _streams(redis, shard, names, symbol)
    for at in range(0, len(keys), _STREAMS):
        hot += await _backwards(redis, keys[at : at + _STREAMS], start_ms)
    # With every name that was given a number before the entries were read.
    _, sealed, names = await _names(redis, shard)
    parts: list[Columns] = []
    for key, own, entries in hot:
        kept = [entry for entry in entries if int(entry[0].partition(b"-")[0]) >= sealed]
        parts += [part for part, _ in _decoded(kept, names, key, own)]
    async for entry in _blocks(redis, shard, start_ms, sealed):
        if entry[1][0] == b"b" and end_ms is not None and _span(entry)[1] > end_ms:
            continue
        parts += [part for part, _ in _decoded([entry], names, schema.BY_NAME["blocks"].key(shard=shard))]
    return parts


async def _backwards(
    redis: Redis, keys: list[tuple[str, str | None]], start_ms: int
) -> list[tuple[str, str | None, list[Entry]]]:
    """Read streams from their ends: what is sealed meanwhile goes away in front, and its blocks are read later."""
    found: dict[str, list[Entry]] = {key: [] for key, _ in keys}
    ends = dict.fromkeys(found, "+")
    while ends:
        count = max(_ROUND // len(ends), _LEAST)
        pipe = redis.pipeline(transaction=False)
        for key, end in ends.items():
            pipe.execute_command("XREVRANGE", key, end, start_ms, "COUNT", count)
        for key, page in zip(list(ends), await pipe.execute(), strict=True):
            entries = [_entry(item) for item in page]
            found[key] += entries
            if len(entries) < count:
                del ends[key]
            else:
                ends[key] = "(" + entries[-1][0].decode()
    return [(key, own, found[key][::-1]) for key, own in keys]


async def _blocks(redis: Redis, shard: int | None, start_ms: int, sealed: int) -> AsyncIterator[Entry]:
    """Yield the entries of the block stream that may hold events from `start_ms` on, up to the time `sealed`."""
    key, start = schema.BY_NAME["blocks"].key(shard=shard), str(start_ms)
    while True:
        page = [_entry(item) for item in await redis.xrange(key, start, f"{sealed}-0", count=_BLOCKS) or []]
        for entry in page:
            yield entry
        if len(page) < _BLOCKS:
            return
        start = "(" + page[-1][0].decode()


def _entry(item: Any) -> Entry:
    fields = item[1]
    return item[0], [word for pair in fields.items() for word in pair] if isinstance(fields, dict) else fields


def _span(entry: Entry) -> tuple[int, int, int]:
    return block_span(entry[1][1])


def _decoded(
    entries: list[Entry], names: Names, key: str, own: str | None = None
) -> list[tuple[Columns, NDArray[np.int64]]]:
    """Decode entries of one stream, whatever codecs they are of; also return the times in their IDs."""
    groups: dict[bytes, tuple[list[int], list[int], list[list[bytes]]]] = {}
    for number, words in entries:
        ms = id_ms = int(number.partition(b"-")[0])
        if len(words) > 2 and words[-2] == _LATE:
            ms, words = int(words[-1]), words[:-2]
        ids, times, rows = groups.setdefault(words[0], ([], [], []))
        ids.append(id_ms)
        times.append(ms)
        rows.append(list(words[1::2]))
    parts = []
    for name, (ids, times, rows) in groups.items():
        codec = BY_FIELD.get(name.decode(errors="replace"))
        if codec is None:
            raise CodecError(f"{key}: entries with the field {name!r} are of no codec that liqlab has")
        try:
            decoded = codec.decode(np.array(times, np.int64), rows, names, own=own)
        except CodecError as error:
            raise CodecError(f"{key}: {error}") from None
        parts.append((decoded, np.array(ids, np.int64)))
    return parts


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
        count = max(_ROUND // len(starts), _LEAST)
        pipe = redis.pipeline(transaction=False)
        for key, start in starts.items():
            pipe.execute_command("XRANGE", key, start, f"({limit_ms}-0", "COUNT", count)
        for key, page in zip(list(starts), await pipe.execute(), strict=True):
            entries = [_entry(item) for item in page]
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
    epoch, sealed, names = await _names(redis, shard)
    if not epoch or limit_ms <= sealed:
        return Sealed(), False
    known = names.stored + HEAD
    streams = await _streams(redis, shard, names, None)
    found, times, end_ms = await _front(redis, [key for key, _ in streams], limit_ms, enough)
    decoded = [
        part for (key, own), entries in zip(streams, found, strict=True) for part in _decoded(entries, names, key, own)
    ]
    if not decoded:
        return Sealed(), False
    events, id_ms = Columns.concat([part for part, _ in decoded]), np.concatenate([ms for _, ms in decoded])
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
        moved = await script(keys=keys, args=[epoch, sealed, known, cut_ms, field, block, ttl_s, *ends])
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
