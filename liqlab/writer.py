"""Events into Redis: one server-side call a batch (one a shard), atomic, with explicit IDs, safe to repeat.

A batch carries its writer's sequence number, and the server remembers the last one that it took: a batch that is sent
again because its reply was lost changes nothing. `write.lua` is the server's half.

An event's stream ID is its time and a sequence number. An event that comes late, after a newer one of the same stream,
takes the next free ID at the end of the stream and carries its own time in the field ``t``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from types import TracebackType
from typing import Final

import numpy as np
import pandas as pd
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from liqlab import clock, schema
from liqlab.codecs.batch import Columns, pack
from liqlab.events import Event, check, check_event
from liqlab.settings import Settings, load

_SCRIPT: Final = files("liqlab").joinpath("write.lua").read_text()
_ATTEMPTS: Final = 3
_BACKOFF_S: Final = 0.05
_RETRY_S: Final = 0.5


class WriterError(RuntimeError):
    """A batch could not be written; the message says why and how many events wait."""


@dataclass
class Counts:
    """What a writer has done: offered = written + those that wait."""

    offered: int = 0
    written: int = 0
    late: int = 0
    trimmed: int = 0
    batches: int = 0
    resent: int = 0


@dataclass
class _Batch:
    """A numbered batch. It keeps its number until the server has taken all of it, whatever goes wrong."""

    seq: int
    events: int
    calls: list[tuple[list[str], bytes]]  # one a shard: KEYS and ARGV[1] of write.lua
    waiters: list[asyncio.Future[None]] = field(default_factory=list)


class Writer:
    """Writes events to Redis, singly (`write`, which batches them) or as tables (`write_table`).

    Use it as ``async with Writer(redis) as writer:``; leaving the block flushes what waits.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        From `liqlab.connect`, whose own retries are off: this class repeats a batch safely, redis-py does not.
    settings : Settings, optional
        `writer`, `retention` and `shards` are read; `liqlab.settings.load()` when absent.
    """

    def __init__(self, redis: Redis, *, settings: Settings | None = None) -> None:
        self.settings = settings or load()
        self.counts = Counts()
        self._script = redis.register_script(_SCRIPT)
        self._name = clock.token()
        self._seq = 0
        self._in_flight: _Batch | None = None
        self._waiting: deque[tuple[Event, float, asyncio.Future[None]]] = deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._sending = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._error: WriterError | None = None

    async def __aenter__(self) -> Writer:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
            self._task = None
        await self.flush()

    async def write(self, event: Event) -> asyncio.Future[None]:
        """Hand one event over; waits only while `writer.queue_events` others do.

        Returns
        -------
        asyncio.Future
            Done when the server has acknowledged the event: await it for certainty, or let it go.

        Raises
        ------
        EventError
            The event is not one; nothing was queued.
        WriterError
            The queue is full and the server does not take it; the event was not queued.
        RuntimeError
            The writer was not entered with ``async with``.
        """
        if self._task is None:
            raise RuntimeError("single events need `async with Writer(redis) as writer:`; write_table does not")
        check_event(event)
        while len(self._waiting) >= self.settings.writer.queue_events:
            if self._error is not None:
                raise self._error
            self._room.clear()
            await self._room.wait()
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((event, clock.elapsed_s(), acknowledged))
        self.counts.offered += 1
        if len(self._waiting) in (1, self.settings.writer.batch_events):
            self._wake.set()
        return acknowledged

    async def flush(self) -> None:
        """Send everything that waits and return when the server has acknowledged it.

        Raises
        ------
        WriterError
            The server refused a batch or cannot be reached; what waits goes on waiting.
        """
        async with self._sending:
            await self._send_in_flight()
            while self._waiting:
                await self._send_waiting()

    async def write_table(self, events: pd.DataFrame) -> int:
        """Write an event table in batches of `writer.bulk_events`; return the number of events written.

        The next batch is built while the server runs the last one.

        Raises
        ------
        EventError
            `events` is not an event table; nothing was written.
        WriterError
            The server refused a batch or cannot be reached. `counts.written` says how far it came; the batch in doubt
            is sent again, under its old number, by the next call of any method.
        """
        written = self.counts.written
        async for _ in self.write_slices(events, [len(events)]):
            pass
        return self.counts.written - written

    async def write_slices(self, events: pd.DataFrame, stops: Iterable[int]) -> AsyncIterator[tuple[int, int]]:
        """Write an event table slice by slice, as `write_table` does each; yield (start, stop) of what is written.

        A replay does between two slices what the feed's clock asks for.

        Parameters
        ----------
        events : pandas.DataFrame
            An event table.
        stops : iterable of int
            Where the slices end, ascending; the first begins at 0.
        """
        columns = Columns.of(check(events))
        size, start = self.settings.writer.bulk_events, 0
        for stop in stops:
            async with self._sending:
                await self._send_in_flight()
                sending: asyncio.Task[None] | None = None
                try:
                    for first in range(start, stop, size):
                        batch = self._batch(columns.rows(slice(first, min(first + size, stop))))
                        if sending is not None:
                            await sending
                        self.counts.offered += batch.events
                        self._in_flight = batch
                        sending = asyncio.create_task(self._send_in_flight())
                        await asyncio.sleep(0)  # the batch leaves before the next one is built
                    if sending is not None:
                        await sending
                finally:
                    if sending is not None and not sending.done():  # cancelled: the batch stays in flight
                        sending.cancel()
                        await asyncio.gather(sending, return_exceptions=True)
            yield start, stop
            start = stop

    async def _run(self) -> None:
        writer = self.settings.writer
        while not self._closing:
            await self._wake.wait()
            while self._waiting and len(self._waiting) < writer.batch_events and not self._closing:
                rest_s = self._waiting[0][1] + writer.batch_ms / 1000 - clock.elapsed_s()
                self._wake.clear()
                try:
                    async with asyncio.timeout(max(rest_s, 0)):
                        await self._wake.wait()
                except TimeoutError:
                    break
            try:
                async with self._sending:
                    await self._send_in_flight()
                    await self._send_waiting()
            except WriterError:
                await asyncio.sleep(_RETRY_S)
            if not (self._waiting or self._in_flight or self._closing):
                self._wake.clear()

    async def _send_waiting(self) -> None:
        # A backlog goes out in larger batches: that is how a burst is caught up with.
        count = min(len(self._waiting), self.settings.writer.bulk_events)
        if count == 0:
            return
        taken = [self._waiting.popleft() for _ in range(count)]
        self._room.set()
        self._in_flight = self._batch(Columns.of_events([event for event, _, _ in taken]))
        self._in_flight.waiters = [acknowledged for _, _, acknowledged in taken]
        await self._send_in_flight()

    async def _send_in_flight(self) -> None:
        """Send the batch in flight, if there is one, until the server has all of it or `_ATTEMPTS` have failed."""
        batch, attempt = self._in_flight, 0
        if batch is None:
            return
        while batch.calls:
            keys, argument = batch.calls[0]
            try:
                late, trimmed = await self._script(keys=keys, args=[argument])
            except (RedisConnectionError, RedisTimeoutError) as error:
                # Whether the server ran the batch is unknown. Its number makes the repeat harmless.
                attempt += 1
                if attempt == _ATTEMPTS:
                    raise self._failure(batch, error) from error
                self.counts.resent += 1
                await asyncio.sleep(_BACKOFF_S * 2**attempt)
                continue
            except RedisError as error:
                raise self._failure(batch, error) from error
            batch.calls.pop(0)
            self.counts.late += int(late)
            self.counts.trimmed += int(trimmed)
        self._in_flight, self._error = None, None
        self.counts.written += batch.events
        self.counts.batches += 1
        for acknowledged in batch.waiters:
            if not acknowledged.done():
                acknowledged.set_result(None)

    def _failure(self, batch: _Batch, error: Exception) -> WriterError:
        full = isinstance(error, OutOfMemoryError)
        cure = "free memory or raise maxmemory" if full else "check the server, then flush()"
        waiting = batch.events + len(self._waiting)
        self._error = WriterError(f"batch {batch.seq} of {batch.events} events: {error}; {waiting} events wait; {cure}")
        self._room.set()  # who waits for room shall hear of it
        return self._error

    def _batch(self, events: Columns) -> _Batch:
        self._seq += 1
        shards = self.settings.shards
        if shards == 1:
            calls = [pack(events, self._seq, self._name, None, self.settings)]
        else:
            of_symbol = np.array([schema.shard_of(name, shards) for name in events.symbols])
            of_event = of_symbol[events.symbol]
            calls = [
                pack(events.rows(np.flatnonzero(of_event == shard)), self._seq, self._name, int(shard), self.settings)
                for shard in np.unique(of_event)
            ]
        return _Batch(self._seq, len(events.ts_ms), calls)
