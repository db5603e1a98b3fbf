"""The stored events, hot and sealed, read back as one table.

Events are written to hot streams (`liqlab.writer`). Sealing (`liqlab.sealing`) moves all that are older than some
time, of every stream at once, into one block of `liqb`, and notes that time beside the names: whatever has an ID below
it lies in blocks, whatever has not is hot. A reader takes the hot streams first, that time next, and the blocks up to
it last; so it sees each event once, whatever is sealed meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from typing import Any, Final, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from redis.asyncio import Redis
from redis.utils import str_if_bytes

from liqlab import schema
from liqlab.codecs import BY_FIELD, CodecError, Names, block_span
from liqlab.codecs.names import HEAD
from liqlab.events import Columns, empty
from liqlab.settings import Settings, load

T = TypeVar("T")

_COUNT: Final = files("liqlab").joinpath("count.lua").read_text()
# Entries read at once, of all shards that are asked together: what waits to be sent counts as the server's memory, for
# eviction too.
ROUND: Final = 10_000
LEAST: Final = 100  # of one stream
TOGETHER: Final = 8  # shards
_BLOCKS: Final = 16  # a page of them
_STREAMS: Final = 100  # read at once
_COUNTED: Final = 1_000  # streams whose lengths are asked for at once
_LATE: Final = b"t"
_DIGITS: Final = 19  # from which on a number may be too large for an int64

# ID; field, value, ... As the server sends it: a command that is given as bytes is one that redis-py leaves as it is,
# where XRANGE would become a dict an entry.
Entry = tuple[bytes, Sequence[bytes]]
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
    found_of = await of_each(shards, lambda shard, part: _shard(redis, shard, part, symbol, start_ms or 0, end_ms))
    parts = [one for found in found_of for one in found]
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
    return sum(await of_each(schema.shards_of(settings), lambda shard, _: _count(redis, shard)))


async def _count(redis: Redis, shard: int | None) -> int:
    _, _, names = await names_of(redis, shard)
    hot = [key for key, _ in await streams_of(redis, shard, names, None)]
    tables = [schema.BY_NAME[name].key(shard=shard) for name in ("names", "blocks")]
    script = redis.register_script(_COUNT)
    total, start, end = 0, "-", ""
    while start:
        counted, start, end, others = await script(keys=[*tables, *hot[:_COUNTED]], args=[start, end])
        total += counted
        for entry in others:
            total += _span(entry)[0] if entry[1][0] == b"b" else len(decoded([entry], names, tables[1])[0][0])
    for at in range(_COUNTED, len(hot), _COUNTED):
        pipe = redis.pipeline(transaction=False)
        for key in hot[at : at + _COUNTED]:
            pipe.xlen(key)
        total += sum(await pipe.execute())
    return total


async def of_each(shards: Sequence[int | None], ask: Callable[[int | None, int], Awaitable[T]]) -> list[T]:
    """Return what `ask` does of every shard, in their order; several are asked at the same time.

    Parameters
    ----------
    shards : sequence
        From `liqlab.schema.shards_of`.
    ask : callable
        Called with a shard, and with how many are asked together: what it reads at once is that part of `ROUND`.

    Raises
    ------
    Exception
        The first that any of them raises; the others are cancelled and have ended then.
    """
    if len(shards) == 1:
        return [await ask(shards[0], 1)]
    among = min(len(shards), TOGETHER)
    room = asyncio.Semaphore(TOGETHER)

    async def one(shard: int | None) -> T:
        async with room:
            return await ask(shard, among)

    return await together(*(one(shard) for shard in shards))


async def together(*works: Coroutine[Any, Any, T]) -> list[T]:
    """Return what each comes to; should one raise, the others are cancelled and have ended before it is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            begun = [group.create_task(work) for work in works]
    except ExceptionGroup as several:
        first: Exception = several.exceptions[0]
    else:
        return [task.result() for task in begun]
    raise first


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
    redis: Redis, shard: int | None, together: int, symbol: str | None, start_ms: int, end_ms: int | None
) -> list[Columns]:
    hot, sealed, names = await _hot(redis, shard, together, symbol, str(start_ms), {})
    parts: list[Columns] = []
    for key, own, entries in hot:
        kept = [entry for entry in entries if int(entry[0].partition(b"-")[0]) >= sealed]
        parts += [part for part, _ in decoded(kept, names, key, own)]
    async for entry in _blocks(redis, shard, max(_BLOCKS // together, 1), start_ms, sealed):
        if entry[1][0] == b"b" and end_ms is not None and _span(entry)[1] > end_ms:
            continue
        parts += [part for part, _ in decoded([entry], names, schema.BY_NAME["blocks"].key(shard=shard))]
    return parts


async def _hot(
    redis: Redis, shard: int | None, together: int, symbol: str | None, start: str, starts: dict[str, str]
) -> tuple[list[Read], int, Names]:
    """Read hot streams, each from its own start or from that of all; then the time up to which events are sealed."""
    _, _, names = await names_of(redis, shard)
    found: list[Read] = []
    keys = await streams_of(redis, shard, names, symbol)
    part = max(_STREAMS // together, 1)
    for at in range(0, len(keys), part):
        found += await _backwards(redis, keys[at : at + part], ROUND // together, start, starts)
    # With every name that was given a number before the entries were read.
    _, sealed, names = await names_of(redis, shard)
    return found, sealed, names


async def _backwards(
    redis: Redis, keys: list[tuple[str, str | None]], most: int, start: str, starts: dict[str, str]
) -> list[Read]:
    """Read streams from their ends: what is sealed meanwhile goes away in front, and its blocks are read later."""
    found: dict[str, list[Entry]] = {key: [] for key, _ in keys}
    ends = dict.fromkeys(found, "+")
    while ends:
        count = max(most // len(ends), LEAST)
        pipe = redis.pipeline(transaction=False)
        for key, end in ends.items():
            pipe.execute_command(b"XREVRANGE", key, end, starts.get(key, start), "COUNT", count)
        for key, entries in zip(list(ends), await pipe.execute(), strict=True):
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
    begin = str(start_ms)
    hot = await of_each(
        schema.shards_of(settings), lambda shard, together: _hot(redis, shard, together, None, begin, after)
    )
    for found, _, names in hot:
        for key, own, entries in found:
            parts += [part for part, _ in decoded(entries, names, key, own)]
            if entries:
                after[key] = "(" + entries[-1][0].decode()
    return Columns.concat(parts).table() if parts else empty()


async def _blocks(redis: Redis, shard: int | None, count: int, start_ms: int, sealed: int) -> AsyncIterator[Entry]:
    """Yield the entries of the block stream that may hold events from `start_ms` on, up to the time `sealed`."""
    key, start = schema.BY_NAME["blocks"].key(shard=shard), str(start_ms)
    while True:
        pipe = redis.pipeline(transaction=False)
        pipe.execute_command(b"XRANGE", key, start, f"{sealed}-0", "COUNT", count)
        page: list[Entry] = (await pipe.execute())[0]
        for entry in page:
            yield entry
        if len(page) < count:
            return
        start = "(" + page[-1][0].decode()


def _span(entry: Entry) -> tuple[int, int, int]:
    return block_span(entry[1][1])


def decoded(
    entries: Sequence[Entry], names: Names, key: str, own: str | None = None
) -> list[tuple[Columns, NDArray[np.int64]]]:
    """Decode entries of one stream, whatever codecs they are of; also return the times in their IDs."""
    return [one.decoded(names, key, own) for one in alike(entries, times_of([number for number, _ in entries]))]


@dataclass(frozen=True)
class Alike:
    """Entries with the same fields, field by field, and the times in their IDs."""

    id_ms: NDArray[np.int64]
    columns: list[tuple[bytes, ...]]  # field, value, field, value, ...

    def decoded(self, names: Names, key: str, own: str | None) -> tuple[Columns, NDArray[np.int64]]:
        """Return the events, and the times in the IDs."""
        field, late, values = self.columns[0][0], self.columns[-2][0] == _LATE, self.columns[1::2]
        codec = BY_FIELD.get(field.decode(errors="replace"))
        if codec is None:
            raise CodecError(f"{key}: entries with the field {field!r} are of no codec that liqlab has")
        try:
            times = np.array(values.pop(), np.int64) if late else self.id_ms
            return codec.decode_columns(times, values, names, own=own), self.id_ms
        except ValueError as error:
            raise CodecError(f"{key}: {error}") from None


def alike(entries: Sequence[Entry], id_ms: NDArray[np.int64]) -> list[Alike]:
    """Return entries by their first field, their length, and whether they are late; nearly always all are alike."""
    words = [words for _, words in entries]
    if len(set(map(len, words))) == 1:
        flat, each = list(chain.from_iterable(words)), len(words[0])
        columns = [tuple(flat[at::each]) for at in range(each)]
        if columns[0].count(columns[0][0]) == len(words) and _LATE not in columns[-2]:
            return [Alike(id_ms, columns)]
    kinds: dict[tuple[bytes, int, bool], list[int]] = {}
    for at, one in enumerate(words):
        kinds.setdefault((one[0], len(one), one[-2] == _LATE), []).append(at)
    return [Alike(id_ms[rows], list(zip(*(words[at] for at in rows), strict=True))) for rows in kinds.values()]


def times_of(ids: Sequence[bytes]) -> NDArray[np.int64]:
    """Return the times in IDs of entries, ms since the epoch, shape (n,)."""
    if len(set(map(len, ids))) == 1:
        letters, dash = np.frombuffer(b"".join(ids), np.uint8).reshape(len(ids), -1), ids[0].index(b"-")
        if dash < _DIGITS and (letters[:, dash] == ord("-")).all():  # as nearly always: read where they are
            times: NDArray[np.int64] = (letters[:, :dash] - np.int64(ord("0"))) @ 10 ** np.arange(dash)[::-1]
            return times
    texts = pa.array(ids, pa.binary()).cast(pa.string())
    found: NDArray[np.int64] = pc.list_element(pc.split_pattern(texts, "-"), 0).cast(pa.int64()).to_numpy()
    return found
