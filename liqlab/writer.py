"""Events into Redis: one server-side call a batch (one a shard), atomic, with explicit IDs, safe to repeat.

A batch carries its writer's sequence number, and the server remembers the last one that it took: a batch that is sent
again because its reply was lost changes nothing. `write.lua` is the server's half, `liqlab.link` the way there.

With a journal, what the server cannot take waits on disk and follows in order; see docs/faults.md.

An event's stream ID is its time and a sequence number. An event that comes late, after a newer one of the same stream
or after events of its time were sealed, takes the next free ID at the end of the stream and carries its own time in the
field ``t``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from itertools import islice
from typing import Final

import pandas as pd
from redis.asyncio import Redis
from redis.exceptions import RedisError

from liqlab import clock
from liqlab.breaker import Breaker, State
from liqlab.codecs import CodecError
from liqlab.events import Columns, Event, check, check_event
from liqlab.journal import Journal, JournalError
from liqlab.link import Batch, Busy, Counts, Link, MemoryLostError, Part, cuts, given_up, leaving, turns, why
from liqlab.settings import Settings, load

_RETRY_S: Final = 0.5
_DRAINED: Final = 20  # batches of the journal read at a time
_AHEAD: Final = 2  # slices, and parts, of a table that are packed while the server works


class WriterError(RuntimeError):
    """A batch could not be written; the message says why and how many events wait."""


class Writer:
    """Writes events to Redis, singly (`write`, which batches them) or as tables (`write_table`).

    Leaving ``async with Writer(redis) as writer:`` flushes what waits.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        From `liqlab.connect`, whose own retries are off: this class repeats a batch safely, redis-py does not.
    settings : Settings, optional
        `writer`, `journal`, `retention`, `thresholds` and `shards` are read; `liqlab.settings.load()` when absent.

    Attributes
    ----------
    counts : Counts
        At every moment ``offered = written + journaled + rejected + waiting``.
    journaled : int
        Events that wait in the journal.
    journal : Journal or None
        Where `journal.path` names a file; `JournalError` when it cannot be opened.
    breaker : Breaker or None
        There is one where there is a journal: without one, nothing could be done with what it holds back.
    """

    def __init__(self, redis: Redis, *, settings: Settings | None = None) -> None:
        self.settings = settings = settings or load()
        self.counts = Counts()
        self.journal: Journal | None = None
        self.breaker: Breaker | None = None
        self.journaled = 0
        self._unsure = False  # whether the server may have forgotten what an earlier process wrote
        name, self._seq = clock.token(), 0
        if settings.journal.path is not None:
            self.journal = Journal(
                settings.journal.path,
                mode=settings.journal.mode,
                max_bytes=settings.journal.max_bytes,
                window_ms=settings.retention.hot_s * 1000,
            )
            self.breaker = Breaker(thresholds=settings.thresholds, check_s=settings.writer.check_s)
            name, self._seq = self.journal.writer, self.journal.last_seq
            self.counts.offered = self.journaled = self.journal.waiting
            self._unsure = self.journal.mode == "wal"
        self._redis = redis
        self._link = Link(redis, settings, name, self.counts)
        self._in_flight = deque[Batch]()
        self._waiting = deque[tuple[Event, float, bool, asyncio.Future[None]]]()
        self._busy = Busy(settings) if settings.writer.layout == "hybrid" else None
        self._wake, self._room = asyncio.Event(), asyncio.Event()
        self._sending = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._error: WriterError | None = None

    @property
    def waiting(self) -> int:
        """Events in memory, neither in Redis nor in the journal."""
        return len(self._waiting) + sum(len(batch.events) for batch in self._in_flight if not batch.journaled)

    async def __aenter__(self) -> Writer:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
            self._task = None
        try:
            await self.flush()
        finally:
            self.close()

    def close(self) -> None:
        """Close the journal, which another writer may then open; a writer without one has nothing to close."""
        if self.journal:
            self.journal.close()

    async def write(self, event: Event, *, critical: bool = False) -> asyncio.Future[None]:
        """Hand one event over; waits only while `writer.queue_events` others do.

        What it returns is done when the event is in Redis, or safe in the journal: await it for certainty, or let it
        go. `critical` ones go to Redis even while the breaker is half-open.

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
        self.counts.offered += 1
        try:
            check_event(event)
            while len(self._waiting) >= self.settings.writer.queue_events:
                if self._error is not None:
                    raise self._error
                self._room.clear()
                await self._room.wait()
        except BaseException:
            self.counts.rejected += 1
            raise
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((event, clock.elapsed_s(), critical, acknowledged))
        if len(self._waiting) in (1, self.settings.writer.batch_events):
            self._wake.set()
        return acknowledged

    async def flush(self) -> None:
        """Send everything that waits and return when it is in Redis or safe in the journal.

        Raises
        ------
        WriterError
            The server does not take a batch, and there is no journal or it is full; what waits goes on waiting.
        """
        async with self._sending:
            await self._deliver()
            while self._waiting:
                await self._deliver_waiting()

    async def drain(self) -> None:
        """Bring everything into Redis, the journal's events too.

        Raises
        ------
        WriterError
            The server does not take it now; what waits goes on waiting, in memory or in the journal.
        """
        await self.flush()
        async with self._sending:
            if self.journal and self.breaker and self.journaled:
                await self.breaker.check(self._redis)
                await self._deliver()
                if self.journaled:
                    reason = self.breaker.transitions[-1].reason if self.breaker.transitions else "not taken"
                    raise WriterError(f"{self.journaled} events wait in the journal: {reason}")

    async def write_table(self, events: pd.DataFrame) -> int:
        """Write an event table in batches of `writer.bulk_events`; return the number of events taken.

        The next batch is built while the server runs the last one.

        Raises
        ------
        EventError
            `events` is not an event table; nothing was written.
        WriterError
            The server refused a batch or cannot be reached, and no journal takes it. `counts.written` says how far it
            came; the batch in doubt is sent again, under its old number, by the next call of any method.
        """
        async for _ in self.write_slices(events, [len(events)]):
            pass
        return len(events)

    async def write_slices(self, events: pd.DataFrame, stops: Iterable[int]) -> AsyncIterator[tuple[int, int]]:
        """Write an event table slice by slice, as `write_table` does each; yield (start, stop) of what is written.

        Parameters
        ----------
        events : pandas.DataFrame
            An event table.
        stops : iterable of int
            Where the slices end, ascending; the first begins at 0. Each is asked for two slices early, before anything
            of the slice at hand is awaited: they are packed while the server works.
        """
        columns, following, end = Columns.of(check(events)), iter(stops), 0
        known, parts, packed = deque[int](), deque[Part](), deque[tuple[Part, list[Batch]]]()

        def pack() -> tuple[Part, list[Batch]]:
            part = parts.popleft()
            return part, self._batches(columns.rows(slice(*part)))

        while True:
            for stop in islice(following, _AHEAD + 1 - len(known)):
                parts.extend(cuts(known[-1] if known else end, stop, self.settings.writer.bulk_events))
                known.append(stop)
            if not known:
                return
            start, stop, sending = end, known.popleft(), None
            async with self._sending:
                await self._deliver()
                if packed and packed[-1][1][-1].seq != self._seq:  # something was written in between
                    parts.extendleft([part for part, _ in reversed(packed)])
                    packed.clear()
                try:
                    while end < stop:
                        (_, end), batches = packed.popleft() if packed else pack()
                        self.counts.offered += sum(len(batch.events) for batch in batches)
                        self._in_flight += batches
                        sending = asyncio.create_task(self._deliver())
                        await leaving(batches[0])
                        while parts and len(packed) < _AHEAD and not (packed and sending.done()):
                            packed.append(pack())
                            await turns()
                        await sending
                finally:
                    await given_up(sending)  # which is done, or this was cancelled: then the batch stays in flight
            yield start, stop

    def _batches(self, events: Columns, *, ahead: bool = False) -> list[Batch]:
        busy = self._busy.count(events) if self._busy else ()
        try:
            batches = self._link.batches(self._seq + 1, events, busy=busy, ahead=ahead)
            if self.journal:
                self.journal.reserve(batches[-1].seq)
        except (CodecError, JournalError) as error:  # the table of names, or the disk, is full
            raise WriterError(f"{error}; {self.waiting} events wait") from None
        self._seq = batches[-1].seq
        return batches

    async def _run(self) -> None:
        while not self._closing:
            # A journal with events in it asks for the server from time to time, even when no event comes.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.settings.writer.check_s if self.journaled else None)
            while self._waiting and len(self._waiting) < self.settings.writer.batch_events and not self._closing:
                rest_s = self._waiting[0][1] + self.settings.writer.batch_ms / 1000 - clock.elapsed_s()
                self._wake.clear()
                try:
                    async with asyncio.timeout(max(rest_s, 0)):
                        await self._wake.wait()
                except TimeoutError:
                    break
            try:
                async with self._sending:
                    await self._deliver()
                    await self._deliver_waiting()
            except WriterError:
                await asyncio.sleep(_RETRY_S)
            if not (self._waiting or self._in_flight or self._closing):
                self._wake.clear()

    async def _deliver_waiting(self) -> None:
        # A backlog goes out in larger batches: that is how a burst is caught up with.
        taken = list(islice(self._waiting, self.settings.writer.bulk_events))
        if not taken:
            return
        jam = self.breaker is not None and (self.journaled > 0 or not self.breaker.allows(critical=False))
        urgent = [item for item in taken if item[2]] if jam else []
        batches = []
        for items, ahead in ((urgent, True), ([item for item in taken if not (jam and item[2])], False)):
            if items:
                made = self._batches(Columns.of_events(item[0] for item in items), ahead=ahead)
                made[-1].waiters = [item[3] for item in items]
                batches += made
        self._waiting = deque(islice(self._waiting, len(taken), None))
        self._in_flight += batches
        self._room.set()
        await self._deliver()

    async def _deliver(self) -> None:
        """Bring what is in flight, and what the journal holds, into the server; or into the journal what it refuses.

        Raises
        ------
        WriterError
            A batch could go nowhere; it stays in flight.
        """
        try:
            if self.breaker and self.breaker.due():
                await self.breaker.check(self._redis)
            await self._drain()
            while self._in_flight:
                batch = self._in_flight[0]
                if self.journal and self.breaker:
                    await self._deliver_one(batch, self.journal, self.breaker)
                else:
                    await self._send(batch)
                self._in_flight.popleft()
                batch.done()
            self._error = None
        except (RedisError, JournalError) as error:
            number = self._in_flight[0].seq if self._in_flight else "-"
            self._error = WriterError(f"batch {number}: {why(error)}; {self.waiting + self.journaled} events wait")
            self._room.set()  # who waits for room shall hear of it
            raise self._error from error

    async def _send(self, batch: Batch) -> None:
        try:
            await self._link.send(batch)
        except MemoryLostError:  # nothing here remembers what it held
            await self._link.send(batch)
        self.counts.written += len(batch.events)

    async def _deliver_one(self, batch: Batch, journal: Journal, breaker: Breaker) -> None:
        """Bring one batch into the server, or into the journal: before it was sent in `wal`, instead in `spool`."""
        if batch.journaled:  # an earlier try got so far: it goes the journal's way
            return
        behind = self.journaled > 0 and not batch.ahead
        if journal.mode == "wal":
            await self._append(batch, journal)
        if not behind and breaker.allows(critical=batch.ahead) and await self._try(batch, journal, breaker):
            if batch.journaled:
                await asyncio.to_thread(journal.acknowledge, batch.seq, alone=batch.ahead)
                self.journaled -= len(batch.events)
            self.counts.written += len(batch.events)
        elif not batch.journaled:
            await self._append(batch, journal)

    async def _append(self, batch: Batch, journal: Journal) -> None:
        await asyncio.to_thread(journal.append, batch.seq, batch.events, ahead=batch.ahead)
        batch.journaled = True
        self._wake.set()  # the task asks for the server from time to time, as long as something waits there
        self.journaled += len(batch.events)

    async def _try(self, batch: Batch, journal: Journal, breaker: Breaker) -> bool:
        """Send a batch; return whether the server has it. An error that does not open the breaker is raised."""
        try:
            await self._link.send(batch)
        except MemoryLostError:
            if journal.mode == "wal":
                await self._forget(journal)
                return False
            return await self._try(batch, journal, breaker)
        except RedisError as error:
            breaker.failed(error)
            if breaker.state is State.CLOSED:
                raise
            return False
        breaker.succeeded()
        return True

    async def _forget(self, journal: Journal) -> int:
        """Let all that the journal holds wait again: what was acknowledged is gone."""
        again = await asyncio.to_thread(journal.forget_acknowledgements)
        self.counts.written -= again
        self.journaled += again
        return again

    async def _drain(self) -> None:
        """Bring the journal's batches into the server, in order, as long as the breaker is closed."""
        journal, breaker = self.journal, self.breaker
        if not journal or not breaker or not breaker.allows(critical=False):
            return
        if self._unsure and breaker.state is State.CLOSED:
            # An earlier process may have filled a server that has lost its memory since.
            if not await self._link.remembered():
                again = await self._forget(journal)
                self.counts.memory_lost += again > 0
                self.counts.written += again  # not by this process
                self.counts.offered += again
            self._unsure = False
        while self.journaled and breaker.allows(critical=False):
            for entry in await asyncio.to_thread(journal.pending, _DRAINED):
                batch = self._link.batch(entry.seq, entry.events, ahead=entry.ahead)
                if not await self._try(batch, journal, breaker):
                    break
                await asyncio.to_thread(journal.acknowledge, entry.seq)
                self.journaled -= len(entry.events)
                self.counts.written += len(entry.events)
