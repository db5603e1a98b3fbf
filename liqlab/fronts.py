"""The oldest hot events of a shard, read from the fronts of its streams: what `liqlab.sealing` makes blocks of."""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis
from redis.utils import str_if_bytes

from liqlab import schema
from liqlab.archive import LEAST, ROUND, Entry, alike, names_of, streams_of, times_of
from liqlab.codecs import Names, block_span
from liqlab.codecs.names import HEAD
from liqlab.events import Columns

Ints = NDArray[np.int64]


class Rest(NamedTuple):
    """What was read and is in no block yet, when all before `sealed_ms` is in one.

    Events are in the order of the times in their IDs, which are beside them; IDs and the times in them are there of
    each stream, too.
    """

    sealed_ms: int
    ids: dict[str, list[bytes]]
    times: dict[str, Ints]
    events: Columns
    id_ms: Ints


@dataclass
class Front:
    """What lies before a time in the hot streams of a shard, as it was read.

    Attributes
    ----------
    names : Names
        The table of names as it was then.
    sealed_ms : int
        Up to which events were sealed.
    end_ms : int
        Before which all was read.
    whole : bool
        Whether that is all that was asked for.
    each : list of float
        Bytes of an event in the last block, if there is one that says so.
    streams : dict of str to (str or None)
        Keys that were read, and whose each is where it is one symbol's.
    others : list of str
        Keys of streams that there may be, too, but were not.
    entries : dict of str to list of entries
        Of each stream, until they are decoded.
    rest : Rest or None
        Of the front before, until they are decoded; then, of this one, once its blocks are made.
    """

    names: Names
    sealed_ms: int
    end_ms: int
    whole: bool
    each: list[float]
    streams: dict[str, str | None]
    others: list[str]
    entries: dict[str, list[Entry]]
    rest: Rest | None

    def decoded(self) -> Rest | None:
        """Decode what was read, behind what was left of the front before; None where there is neither.

        Raises
        ------
        CodecError
            A stream holds what no codec wrote.
        """
        old, self.rest = self.rest, None
        ids: dict[str, list[bytes]] = dict(old.ids) if old else {}
        times: dict[str, Ints] = dict(old.times) if old else {}
        parts = list[tuple[Columns, Ints]]()
        with _uncollected():
            for key, entries in self.entries.items():
                its = [number for number, _ in entries]
                ms = times_of(its) if its else np.zeros(0, np.int64)
                parts += [one.decoded(self.names, key, self.streams[key]) for one in alike(entries, ms)] if its else []
                ids[key] = [*ids.get(key, ()), *its]
                times[key] = np.concatenate([times[key], ms]) if key in times else ms
            self.entries = {}
        if not parts:
            return old
        events, id_ms = Columns.concat([part for part, _ in parts]), np.concatenate([ms for _, ms in parts])
        order = np.argsort(id_ms, kind="stable")[: int(np.count_nonzero(id_ms < self.end_ms))]
        events, id_ms = events.rows(order), id_ms[order]
        if old:
            events, id_ms = Columns.concat([old.events, events]), np.concatenate([old.id_ms, id_ms])
            if (np.diff(id_ms) < 0).any():  # some came late
                order = np.argsort(id_ms, kind="stable")
                events, id_ms = events.rows(order), id_ms[order]
        return Rest(self.sealed_ms, ids, times, events, id_ms)


async def read(
    redis: Redis, shard: int | None, together: int, limit_ms: int, enough: int, behind: Front | None = None
) -> Front | None:
    """Read streams from their fronts until there are enough entries before the time up to which all have been read.

    Parameters
    ----------
    redis : redis.asyncio.Redis
    shard : int or None
    together : int
        How many shards are read at the same time.
    limit_ms : int
        Before which events are wanted.
    enough : int
        Entries.
    behind : Front, optional
        One whose blocks are made, and will have been stored: what it read is not read again.

    Returns
    -------
    Front or None
        None where nothing can be wanted.
    """
    rest = behind.rest if behind and behind.whole and await _unchanged(redis, shard, behind) else None
    if behind and rest:
        names, sealed_ms, streams, others = behind.names, rest.sealed_ms, behind.streams, behind.others
    else:
        epoch, sealed_ms, names = await names_of(redis, shard)
        streams = dict(await streams_of(redis, shard, names, None)) if epoch else {}
        own = schema.BY_NAME["events"].key
        others = [] if len(streams) > 1 else [own(name, shard=shard) for name in names.symbols]
    if not streams or limit_ms <= sealed_ms:
        return None
    found: dict[str, list[Entry]] = {key: [] for key in streams}
    starts = dict.fromkeys(found, "-")  # of those that have more
    if rest:  # each where it ended, not where all had ended: another writer may have added what is late
        starts = {key: f"({rest.ids[key][-1].decode()}" if rest.ids[key] else f"{sealed_ms}-0" for key in found}
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
    each = behind.each if behind and rest else await _last_each(redis, shard) if any(found.values()) else []
    return Front(names, sealed_ms, end_ms, end_ms == limit_ms, each, streams, others, found, rest)


async def _unchanged(redis: Redis, shard: int | None, front: Front) -> bool:
    """Return whether there are the same names and streams, and nothing else was sealed than the blocks of a front."""
    key = schema.BY_NAME["names"].key(shard=shard)
    pipe = redis.pipeline(transaction=False)
    pipe.lrange(key, 0, HEAD - 1)
    pipe.llen(key)
    if front.others:
        pipe.exists(*front.others)
    head, length, *there = await pipe.execute()
    names = front.names
    same = bool(head) and str_if_bytes(head[0]) == names.epoch and length == HEAD + names.stored and not any(there)
    return same and front.rest is not None and int(head[1]) <= front.rest.sealed_ms


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
