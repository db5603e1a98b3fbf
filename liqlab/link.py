"""The writer's way to the server: numbered batches, packed, sent, and sent again where a reply was lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, OutOfMemoryError
from redis.utils import str_if_bytes

from liqlab import clock, original, schema
from liqlab.batch import pack
from liqlab.cluster import FAILOVER, LOST, Cluster, as_cluster, check_shards
from liqlab.codecs import Names
from liqlab.codecs.names import HEAD
from liqlab.events import Columns
from liqlab.settings import Settings, SettingsError

Part = tuple[int, int]  # of a table, from a row to before another

_SCRIPT: Final = files("liqlab").joinpath("write.lua").read_text()
_ATTEMPTS: Final = 3
_TURNS: Final = 8  # of the event loop, in which a batch is encoded and its first 200 KB are sent
_WAY_S: Final = 5e-9  # a byte, of the rest
_BACKOFF_S: Final = 0.05
_OTHER_NAMES, _REPEATED = -1, -2  # what write.lua answers instead of a number of late events
_LONGEST_S: Final = 0.25  # of a pause between two tries


class MemoryLostError(RuntimeError):
    """The server lost what it had acknowledged: it was restarted, flushed, or is a replica that never had it."""


@dataclass
class Counts:
    """What a writer has done: offered = written + journaled + rejected + those that wait in memory.

    On a cluster, no replica is known to have the last `unreplicated` of those written: a failover now may lose them.
    """

    offered: int = 0
    written: int = 0
    rejected: int = 0
    late: int = 0
    trimmed: int = 0
    batches: int = 0
    resent: int = 0
    memory_lost: int = 0
    unreplicated: int = 0


class _Packed(NamedTuple):
    """A shard's part of a batch."""

    names: Names
    before: tuple[str, int]  # epoch and count of the names that the server must have
    after: tuple[str, int]  # and of those that it has then
    keys: list[str]
    argument: bytes


@dataclass
class Batch:
    """A numbered batch. It keeps its number until the server has taken all of it, whatever goes wrong.

    Attributes
    ----------
    seq : int
    events : Columns
    ahead : bool
        Sent before batches with lower numbers: the server then knows it by this number alone.
    left : list of int or None
        The shards that do not have it yet; None on a single node.
    journaled : bool
        The journal has it.
    waiters : list of asyncio.Future
        To be told when the server, or the journal, has it.
    """

    seq: int
    events: Columns
    left: list[int | None]
    ahead: bool = False
    journaled: bool = False
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    packed: dict[int | None, _Packed] = field(default_factory=dict)

    def done(self) -> None:
        """Tell the waiters."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)


class Busy:
    """Which symbols are busy enough, in the layout ``hybrid``, for a stream of their own.

    Those with `writer.hybrid_events` events in this hot window or in the last one. It is this writer's own affair:
    readers look into both places.
    """

    def __init__(self, settings: Settings) -> None:
        self._enough = settings.writer.hybrid_events
        self._window_ms = settings.retention.hot_s * 1000
        self._window = -1
        self._now: Counter[str] = Counter()
        self._last: frozenset[str] = frozenset()

    def count(self, events: Columns) -> frozenset[str]:
        """Take note of a batch; return the symbols that are busy now."""
        window = int(events.ts_ms.max()) // self._window_ms
        if window > self._window:
            self._window, self._last, self._now = window, self._own(), Counter()
        counts = np.bincount(events.symbol, minlength=len(events.symbols))
        for code in np.flatnonzero(counts).tolist():
            self._now[events.symbols[code]] += int(counts[code])
        return self._last | self._own()

    def _own(self) -> frozenset[str]:
        return frozenset(name for name, count in self._now.items() if count >= self._enough)


class Link:
    """Sends batches by the strategy of the settings; `name` is the writer's, by which the server knows its numbers."""

    def __init__(self, redis: Redis, settings: Settings, name: str, counts: Counts) -> None:
        self._redis = redis
        self._settings = settings
        self._name = name
        self._counts = counts
        self._script = redis.register_script(_SCRIPT)
        self._names: dict[int | None, Names] = {}
        self._acknowledged: dict[int | None, str] = {}  # the epoch under which the server took a batch
        self._top: dict[str, int] = {}  # of the original's form: the newest time of each stream
        self._cluster = as_cluster(redis)
        if self._cluster:
            check_shards(settings)
        if settings.shards > 1 and settings.writer.strategy != "script":
            raise SettingsError(f"writer.strategy = {settings.writer.strategy!r}: more than one shard needs 'script'")
        # With a journal nothing is gained by waiting: it takes what a cluster without a primary does not.
        self._patience_s = settings.cluster.failover_s if self._cluster and settings.journal.path is None else 0.0
        self._taken: dict[int | None, tuple[str, int]] = {}  # by which node a shard's last batch was, and its number
        self._unreplicated: dict[int | None, int] = {}

    def batches(self, seq: int, events: Columns, *, busy: Collection[str] = (), ahead: bool = False) -> list[Batch]:
        """Return events, numbered and packed, as one batch, or as several where it exceeded `writer.batch_bytes`.

        The first has the number `seq`. `busy` are symbols with a stream of their own, see `liqlab.batch.pack`.
        """
        batch = self.batch(seq, events, ahead=ahead)
        if self._settings.writer.strategy != "script":
            return [batch]
        known = {shard: (names, names.epoch, names.stored) for shard, names in self._names.items()}
        self._pack(batch, batch.left, busy)
        size = max(len(part.argument) for part in batch.packed.values())
        if size > self._settings.writer.batch_bytes and len(events) > 1:
            # What was packed is thrown away, and with it the names that should have gone along.
            for names, epoch, stored in known.values():
                names.epoch, names.stored = epoch, stored
            self._names = {shard: self._names[shard] for shard in known}
            half = len(events) // 2
            first = self.batches(seq, events.rows(slice(None, half)), busy=busy, ahead=ahead)
            rest = events.rows(slice(half, None))
            return first + self.batches(seq + len(first), rest, busy=busy, ahead=ahead)
        return [batch]

    def batch(self, seq: int, events: Columns, *, ahead: bool = False) -> Batch:
        """Return a batch that `send` packs."""
        shards = self._settings.shards
        return Batch(seq, events, [None] if shards == 1 else np.unique(self._shards(events)).tolist(), ahead)

    def _shards(self, events: Columns) -> NDArray[np.int64]:
        of_symbol = np.array([schema.shard_of(name, self._settings.shards) for name in events.symbols], np.int64)
        of_event: NDArray[np.int64] = of_symbol[events.symbol]
        return of_event

    def _pack(self, batch: Batch, shards: Collection[int | None], busy: Collection[str] = ()) -> None:
        names = {shard: self._names.setdefault(shard, Names()) for shard in shards}
        before = {shard: (one.epoch, one.stored) for shard, one in names.items()}
        packed = pack(batch.events, batch.seq, self._name, names, self._settings, ahead=batch.ahead, busy=busy)
        for shard, one in names.items():
            batch.packed[shard] = _Packed(one, before[shard], (one.epoch, one.stored), *packed[shard])

    async def send(self, batch: Batch) -> None:
        """Send a batch until the server has all of it.

        Raises
        ------
        redis.exceptions.RedisError
            The server refused it, or did not answer in `_ATTEMPTS` tries; sending it again is safe.
        MemoryLostError
            The server lost its memory since the last batch; the next call sends the batch to the new one.
        """
        if self._settings.writer.strategy != "script":
            await original.write(self._redis, batch.events, self._settings, self._top)
            batch.left.clear()
        attempt, until_s = 0, clock.elapsed_s() + self._patience_s
        while batch.left:
            if old := [shard for shard in batch.left if not self._holds(batch, shard)]:
                for shard in old:  # what was packed to be sent later is packed again, too, when it is
                    self._names[shard] = self._names.get(shard, Names()).again()
                self._pack(batch, old)
            parts = {shard: batch.packed[shard] for shard in self._next(batch)}
            answers = await self._call({shard: (part.keys, part.argument) for shard, part in parts.items()}, batch)
            refused = [answer for answer in answers.values() if isinstance(answer, Exception)]
            for shard, answer in answers.items():
                if not isinstance(answer, Exception):
                    await self._take(batch, shard, *answer)
            if unexpected := [error for error in refused if not isinstance(error, FAILOVER)]:
                raise unexpected[0]
            if refused:
                # Whether the server ran the batch is unknown. Its number makes the repeat harmless.
                attempt += 1
                if attempt >= _ATTEMPTS and clock.elapsed_s() >= until_s:
                    raise refused[0]
                self._counts.resent += 1
                await asyncio.sleep(min(_BACKOFF_S * 2**attempt, _LONGEST_S))
        self._counts.batches += 1

    def _holds(self, batch: Batch, shard: int | None) -> bool:
        """Return whether a batch is packed for just the names that the server is known to have.

        The server looks at their number. If that counted names that come with a later batch, another writer's could
        be there in their place.
        """
        part, names = batch.packed.get(shard), self._names.get(shard)
        return part is not None and part.names is names and part.before == part.names.held

    def _next(self, batch: Batch) -> list[int | None]:
        """Return the shards that are sent together: a server has what was sent in memory until it has run it."""
        size, sizes = 0, [len(batch.packed[shard].argument) for shard in batch.left]
        for place, each in enumerate(sizes):
            size += each
            if place and size > self._settings.writer.batch_bytes and not self._cluster:
                return batch.left[:place]
        return list(batch.left)

    async def _call(self, calls: dict[int | None, tuple[list[str], bytes]], batch: Batch) -> dict[int | None, Any]:
        """Run the script on shards; return what it answered of each, or an error after which it may be tried again."""
        if self._cluster is None:
            return await self._call_one(calls)
        answers: dict[int | None, Any] = {}
        wanted: dict[int, tuple[list[str], list[bytes]]] = {}
        for shard, (keys, argument) in calls.items():
            assert shard is not None
            try:
                await self._check_promoted(self._cluster, shard)
            except FAILOVER as error:
                answers[shard] = error
            else:
                wanted[shard] = keys, [argument]
        done = await self._cluster.replicated(self._script, wanted, self._settings.cluster.replica_ms)
        for number, reply in done.items():
            answers[number] = reply.answer
            if isinstance(reply.answer, Exception) or reply.answer[0] == _OTHER_NAMES:  # nothing was written
                continue
            if not batch.ahead:
                self._taken[number] = reply.node, batch.seq
            if reply.replicated:  # and with it all that the node took before
                for other, (node, _) in self._taken.items():
                    if node == reply.node:
                        self._unreplicated.pop(other, None)
            else:
                here = np.count_nonzero(self._shards(batch.events) == number)
                self._unreplicated[number] = self._unreplicated.get(number, 0) + int(here)
        self._counts.unreplicated = sum(self._unreplicated.values())
        return answers

    async def _call_one(self, calls: dict[int | None, tuple[list[str], bytes]]) -> dict[int | None, Any]:
        """Run the script on shards of one server, in one round trip."""
        answers: dict[int | None, Any] = {}
        while len(answers) < len(calls):
            pipe, asked = self._redis.pipeline(transaction=False), [shard for shard in calls if shard not in answers]
            for shard in asked:
                keys, argument = calls[shard]
                pipe.evalsha(self._script.sha, len(keys), *keys, argument)
            try:
                found = await pipe.execute(raise_on_error=False)
                if any(isinstance(answer, NoScriptError) for answer in found):
                    await self._redis.script_load(self._script.script)
            except LOST as error:
                found = [error] * len(asked)
            done = zip(asked, found, strict=True)
            answers |= {shard: answer for shard, answer in done if not isinstance(answer, NoScriptError)}
        return answers

    async def _check_promoted(self, cluster: Cluster, shard: int) -> None:
        """Look, before the first batch goes to another node than the last one, whether that node has the last one.

        Raises
        ------
        MemoryLostError
            It has not: a replica was promoted that no batch of that number had reached.
        """
        node, seq = self._taken.get(shard, ("", 0))
        if not seq or await cluster.owner(shard) == node:
            return
        mark = await self._redis.hget(schema.BY_NAME["writer"].key(self._name, shard=shard), "seq")
        if int(mark or 0) >= seq:
            del self._taken[shard]
            return
        for other in [other for other, (its, _) in self._taken.items() if its == node]:  # one loss, told once
            del self._taken[other]
            self._acknowledged.pop(other, None)
            self._names.pop(other, None)
        self._counts.memory_lost += 1
        raise MemoryLostError(f"the node that took the place of {node} lacks batches that {node} had acknowledged")

    async def _take(self, batch: Batch, shard: int | None, late: int, trimmed: int, *epoch: bytes) -> None:
        """Note what the script answered of a shard: done, done before, or not done for other names."""
        if late == _OTHER_NAMES:
            await self._read_names(shard)
            return
        batch.left.remove(shard)
        part = batch.packed.pop(shard)
        if late == _REPEATED:  # perhaps of an earlier process, under names that this one has not read
            self._acknowledged[shard] = str_if_bytes(epoch[0])
            return
        self._acknowledged[shard], part.names.held = part.names.epoch, part.after
        self._counts.late += int(late)
        self._counts.trimmed += int(trimmed)

    async def remembered(self) -> bool:
        """Return whether the server knows this writer, from earlier batches of it, perhaps in an earlier process."""
        shards = schema.shards_of(self._settings)
        marks = [schema.BY_NAME["writer"].key(self._name, shard=shard) for shard in shards]
        return sum([await self._redis.exists(mark) for mark in marks]) > 0

    async def _read_names(self, shard: int | None) -> None:
        """Learn what the server's table of names holds now.

        Raises
        ------
        MemoryLostError
            It is not the table under which the server took the last batch.
        """
        head = await self._redis.lrange(schema.BY_NAME["names"].key(shard=shard), 0, -1)
        epoch = str_if_bytes(head[0]) if head else ""
        self._names[shard] = Names(head[HEAD:], epoch)
        if self._acknowledged.get(shard, epoch) != epoch:
            self._acknowledged.clear()  # one loss, told once: the other shards are as new
            self._counts.memory_lost += 1
            raise MemoryLostError("the server lost its memory: it was restarted or flushed")


def why(error: Exception) -> str:
    """Return what an error of `Link.send` means, with a cure."""
    cure = "free memory or raise maxmemory" if isinstance(error, OutOfMemoryError) else "check the server, then flush()"
    return f"{error}; {cure}"


def cuts(start: int, stop: int, size: int) -> list[Part]:
    """Cut a slice into batches; the first of a table is smaller: the server has work while the others are built."""
    first = max(size // 4, 1) if start == 0 and stop > size else size
    return [*pairwise([start, *range(start + first, stop, size), stop])] if start < stop else []


async def turns() -> None:
    """Let what came in be read, and others work."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


async def given_up(task: asyncio.Task[Any] | None) -> None:
    """End a task whose result nobody wants any more, nor its error."""
    if task:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def leaving(batch: Batch) -> None:
    """Let a batch leave before the next one is built: meanwhile nothing is sent, and the server would wait."""
    await turns()
    await asyncio.sleep(_WAY_S * sum(len(part.argument) for part in batch.packed.values()))
