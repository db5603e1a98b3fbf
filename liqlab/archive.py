"""The stored events, hot and sealed, read back as one table.

Events are written to hot streams (`liqlab.writer`). Sealing (`liqlab.sealing`) moves all that are older than some
time, of every stream at once, into one block of `liqb`, and notes that time beside the names: whatever has an ID below
it lies in blocks, whatever has not is hot. A reader takes the hot streams first, that time next, and the blocks up to
it last; so it sees each event once, whatever is sealed meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from redis.asyncio import Redis
from redis.utils import str_if_bytes

from liqlab import schema
from liqlab.codecs import BY_FIELD, CodecError, Names, block_span
from liqlab.codecs.names import HEAD
from liqlab.events import Columns, empty
from liqlab.settings import Settings, load

# Entries read in one round trip: what waits to be sent counts as the server's memory, for eviction too.
ROUND: Final = 10_000
LEAST: Final = 100  # of one stream
_BLOCKS: Final = 16  # a page of them
_STREAMS: Final = 100  # read in one round trip
_LATE: Final = b"t"

Entry = tuple[bytes, Sequence[bytes]]  # ID; field, value, ...
Read = tuple[str, str | None, list[Entry]]  # of a stream, and whose it is where it is one symbol's


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
        _, sealed, names = await names_of(redis, shard)
        keys = await streams_of(redis, shard, names, None)
        for at in range(0, len(keys), _STREAMS):
            pipe = redis.pipeline(transaction=False)
            for key, _ in keys[at : at + _STREAMS]:
                pipe.xlen(key)
            total += sum(await pipe.execute())
        async for entry in _blocks(redis, shard, 0, sealed):
            total += _span(entry)[0] if entry[1][0] == b"b" else len(decoded([entry], names, "liqb")[0][0])
    return total


async def names_of(redis: Redis, shard: int | None) -> tuple[str, int, Names]:
    """Return the epoch of a shard's table of names, the time up to which events are sealed, and the names."""
    head = await redis.lrange(schema.BY_NAME["names"].key(shard=shard), 0, -1)
    if not head:
        return "", 0, Names()
    epoch = str_if_bytes(head[0])
    return epoch, int(head[1]), Names(head[HEAD:], epoch)


async def streams(redis: Redis, shard: int | None) -> list[str]:
    """Return the keys of the hot streams that a shard may have, the one that symbols share first."""
    _, _, names = await names_of(redis, shard)
    return [key for key, _ in await streams_of(redis, shard, names, None)]


async def streams_of(redis: Redis, shard: int | None, names: Names, symbol: str | None) -> list[tuple[str, str | None]]:
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
    hot, sealed, names = await _hot(redis, shard, symbol, str(start_ms), {})
    parts: list[Columns] = []
    for key, own, entries in hot:
        kept = [entry for entry in entries if int(entry[0].partition(b"-")[0]) >= sealed]
        parts += [part for part, _ in decoded(kept, names, key, own)]
    async for entry in _blocks(redis, shard, start_ms, sealed):
        if entry[1][0] == b"b" and end_ms is not None and _span(entry)[1] > end_ms:
            continue
        parts += [part for part, _ in decoded([entry], names, schema.BY_NAME["blocks"].key(shard=shard))]
    return parts


async def _hot(
    redis: Redis, shard: int | None, symbol: str | None, start: str, starts: dict[str, str]
) -> tuple[list[Read], int, Names]:
    """Read hot streams, each from its own start or from that of all; then the time up to which events are sealed."""
    _, _, names = await names_of(redis, shard)
    found: list[Read] = []
    keys = await streams_of(redis, shard, names, symbol)
    for at in range(0, len(keys), _STREAMS):
        found += await _backwards(redis, keys[at : at + _STREAMS], start, starts)
    # With every name that was given a number before the entries were read.
    _, sealed, names = await names_of(redis, shard)
    return found, sealed, names


async def _backwards(
    redis: Redis, keys: list[tuple[str, str | None]], start: str, starts: dict[str, str]
) -> list[Read]:
    """Read streams from their ends: what is sealed meanwhile goes away in front, and its blocks are read later."""
    found: dict[str, list[Entry]] = {key: [] for key, _ in keys}
    ends = dict.fromkeys(found, "+")
    while ends:
        count = max(ROUND // len(ends), LEAST)
        pipe = redis.pipeline(transaction=False)
        for key, end in ends.items():
            pipe.execute_command("XREVRANGE", key, end, starts.get(key, start), "COUNT", count)
        for key, page in zip(list(ends), await pipe.execute(), strict=True):
            entries = [as_entry(item) for item in page]
            found[key] += entries
            if len(entries) < count:
                del ends[key]
            else:
                ends[key] = "(" + entries[-1][0].decode()
    return [(key, own, found[key][::-1]) for key, own in keys]


async def tail(redis: Redis, after: dict[str, str], *, start_ms: int, settings: Settings | None = None) -> pd.DataFrame:
    """Read what was written to the hot streams since the last call, as an event table.

    Parameters
    ----------
    after : dict of str to str
        Where each stream was read up to: empty at first, brought up to date here.
    start_ms : int
        Where streams begin that were not read yet, ms since the epoch, UTC.
    """
    settings, parts = settings or load(), []
    for shard in schema.shards_of(settings):
        found, _, names = await _hot(redis, shard, None, str(start_ms), after)
        for key, own, entries in found:
            parts += [part for part, _ in decoded(entries, names, key, own)]
            if entries:
                after[key] = "(" + entries[-1][0].decode()
    return Columns.concat(parts).table() if parts else empty()


async def _blocks(redis: Redis, shard: int | None, start_ms: int, sealed: int) -> AsyncIterator[Entry]:
    """Yield the entries of the block stream that may hold events from `start_ms` on, up to the time `sealed`."""
    key, start = schema.BY_NAME["blocks"].key(shard=shard), str(start_ms)
    while True:
        page = [as_entry(item) for item in await redis.xrange(key, start, f"{sealed}-0", count=_BLOCKS) or []]
        for entry in page:
            yield entry
        if len(page) < _BLOCKS:
            return
        start = "(" + page[-1][0].decode()


def as_entry(item: Any) -> Entry:
    """Take an entry of a reply, in whatever shape redis-py gives it."""
    fields = item[1]
    return item[0], [word for pair in fields.items() for word in pair] if isinstance(fields, dict) else fields


def _span(entry: Entry) -> tuple[int, int, int]:
    return block_span(entry[1][1])


def decoded(
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
