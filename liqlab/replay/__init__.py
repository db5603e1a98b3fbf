"""Play a recorded feed into a real server on the feed's own clock.

TTLs follow event time: a key whose time is up in the feed is removed, to the minute, whatever the wall clock says (to a
tenth of a second, where a family lives for less than a minute). What the server holds at the end is what a live one
would hold at that moment of the feed. Real TTLs are set as well, so that eviction order stays the server's own.

The feed is cut only where that can be told from the outside: where a key ends that comes again, where a threshold is
asked for, where memory is looked at. Between two cuts it is written as `Writer.write_table` writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import numpy as np
import pandas as pd
from redis.asyncio import Redis

from liqlab import clock
from liqlab.archive import count
from liqlab.cleanup import Cleaner
from liqlab.cleanup.schedule import EventClock
from liqlab.detector import Detector
from liqlab.detector import table as alert_table
from liqlab.events import Columns, EventError, check, run_starts
from liqlab.feeds import Feed
from liqlab.percentiles import METHODS
from liqlab.replay.clockwork import Expiry, Rounds, Seals, Watch, summed
from liqlab.settings import Journal, Settings, load
from liqlab.writer import Writer

_SAMPLES: Final = 240  # points of the timeline: as many as a picture shows
_MOMENTS: Final = 100  # at which a feed that is played at speed is written

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Ingested:
    """What an ingest did.

    Attributes
    ----------
    events : int
        Written, each once.
    late : int
        Events that were older than one already in their stream; kept, with their own time.
    trimmed : int
        Events that MAXLEN, or the bytes that cleanup allows, pushed out of their stream again.
    sealed : int
        Events that were moved into blocks, but for those that a cleaner's own rounds have moved.
    held : int
        Events that Redis has at the end, hot and sealed.
    expired : dict of str to int
        Keys removed because their time was up on the feed's clock, by family.
    evicted : int
        Keys that the server itself evicted at maxmemory; more than 0 means that the feed did not fit.
    seconds : float
        Wall time.
    timeline : pandas.DataFrame
        Through the feed's time: ts_ms, events (so far), used_memory (bytes), keys.
    alerts : pandas.DataFrame
        What the detector raised, as `liqlab.detector.table`; without rows when there was none.
    cleaned : int
        Events that cleanup removed.
    aged : int
        Events in streams and blocks that were removed because their time was up.
    """

    events: int
    late: int
    trimmed: int
    sealed: int
    held: int
    expired: dict[str, int]
    evicted: int
    seconds: float
    timeline: pd.DataFrame
    alerts: pd.DataFrame
    cleaned: int = 0
    aged: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON; without the timeline, and of the alerts how many there are."""
        plain = {name: value for name, value in vars(self).items() if name != "timeline"}
        return plain | {"alerts": len(self.alerts)}


async def ingest(
    feed: Feed | pd.DataFrame,
    redis: Redis,
    *,
    settings: Settings | None = None,
    expire: bool = True,
    sealing: bool = True,
    cleaner: Cleaner | None = None,
    detector: Detector | None = None,
    until_ms: int | None = None,
    moments: Sequence[int] = (),
    visit: Callable[[int], Awaitable[None]] | None = None,
    progress: Progress | None = None,
) -> Ingested:
    """Write a feed through the real writer, as fast as the server takes it, in event time.

    Parameters
    ----------
    feed : Feed or pandas.DataFrame
        From `liqlab.read_feed`, or an event table.
    redis : redis.asyncio.Redis
        Only liqlab's own keys are written.
    settings : Settings, optional
        `liqlab.settings.load()` when absent.
    expire : bool
        Whether TTLs run on the feed's clock; False keeps everything that was written.
    sealing : bool
        Whether events are sealed into blocks once they have left the hot window, on the feed's clock too.
    cleaner : Cleaner, optional
        Runs its schedule on the feed's clock; it seals too. Rounds that could find nothing to do, since all that is in
        use is well below what one share may take, are left out.
    detector : Detector, optional
        Looks at the events of each minute before they are written. With a method of its own, that is filled too.
    until_ms : int, optional
        The feed's clock runs on to then after the last event, ms since the epoch, UTC.
    moments : sequence of int
        Event times, ascending whole minutes, that `visit` is awaited at with the time: what came before it is written,
        what came later is not.
    progress : callable, optional
        Called with (events written, events in all).

    Returns
    -------
    Ingested

    Raises
    ------
    EventError
        The feed holds no event.
    WriterError
        The server refused a batch, for one because it is at maxmemory; what was written stays.
    """
    # A live writer's journal is none of a replay's business.
    settings = (settings or load()).model_copy(update={"journal": Journal()})
    events = check(feed.events if isinstance(feed, Feed) else feed)
    if events.empty:
        reasons = f"; its reader rejected {sum(feed.report.rejected.values())} rows" if isinstance(feed, Feed) else ""
        raise EventError(f"the feed holds no event{reasons}; `liqlab feeds inspect` says why")
    columns, times = Columns.of(events), events["ts_ms"].to_numpy()
    began, evicted, total = clock.elapsed_s(), await summed(redis, "stats", "evicted_keys"), len(events)
    writer, expiry = Writer(redis, settings=settings), Expiry(columns, settings)
    rounds = Rounds(cleaner, redis) if cleaner else None
    schedule = EventClock(cast(Cleaner, rounds)) if rounds else None
    sealing = (sealing or cleaner is not None) and settings.writer.strategy == "script"
    timeline = list[dict[str, int]]()
    asked, last_ms = [ms for ms in moments if visit], int(times[-1]) // expiry.step_ms * expiry.step_ms

    edges = np.append(run_starts(times // expiry.step_ms), total)  # of steps

    def now_at(stop: int) -> int:
        """Return the time of the step that row `stop` begins."""
        step = int(times[stop]) // expiry.step_ms if stop < total else last_ms // expiry.step_ms + 1
        return step * expiry.step_ms

    seals = Seals(redis, settings, columns, now_at, rounds) if sealing else None
    # Of a long feed memory is looked at where it is cut for sealing anyway.
    places = seals.rows if seals and len(seals.rows) > _SAMPLES else edges[:-1].tolist()
    samples = {*(places[at] for at in np.linspace(0, len(places) - 1, _SAMPLES, dtype=int).tolist()), total}
    cuts = np.unique(
        [
            *samples,
            *(seals.rows if seals else ()),
            *times.searchsorted([*(expiry.cuts if expire else ()), *asked]).tolist(),
        ]
    )
    method = detector.method if detector else METHODS[settings.detector.method](redis, settings=settings)
    watch = Watch(detector, columns, *await detector.candidates(columns), expiry) if detector else None
    looked = 0  # the row up to which all was written when memory was last looked at

    def end_of(row: int) -> int:
        """Return the row that the step of a row ends before."""
        return int(edges[edges.searchsorted(row, "right")])

    def stops() -> Iterator[int]:
        """Yield where to stop next, as late as may be; asked for before the two slices before it are written."""
        at = 0
        while at < total:
            stop = int(cuts[cuts.searchsorted(at, "right")])
            if watch and (loud := watch.first(end_of(at), stop)) < stop:
                stop = int(edges[edges.searchsorted(loud, "right") - 1])
            if rounds and stop - looked > rounds.room:
                fits = edges.searchsorted(looked + rounds.room, "right") - 1
                stop = min(stop, max(int(edges[fits]), end_of(at)))
            yield stop
            at = stop

    async def end(now_ms: int) -> None:
        if expire:
            await expiry.run(redis, now_ms)

    try:
        if watch:
            await watch.look(0, end_of(0))
            watch.judge()
        async for start, stop in writer.write_slices(events, stops()):
            now_ms = now_at(stop)
            if watch:
                await watch.judged()
            if not method.written:  # before keys end: what begins again in this slice has been removed at its begin
                await method.add(columns.rows(slice(start, stop)))
            if stop in samples:
                timeline.append(await _point(redis, int(times[stop - 1]), stop))
            if rounds and schedule:
                rounds.room, looked = rounds.room - (stop - start), stop
                await schedule.run(now_ms)
            ends = partial(end, now_ms if stop < total else max(last_ms, until_ms or 0))
            await (seals.run(stop, ends) if seals else ends())
            while visit and asked and (asked[0] <= now_ms or stop == total):
                await visit(asked.pop(0))
            if watch and stop < total:
                await watch.look(stop, end_of(stop))
            if seals:
                seals.make_next()
            if watch and stop < total:
                watch.judge()
            if progress:
                progress(stop, total)
    finally:
        if watch:
            await watch.close()
        if seals:
            await seals.close()
    return Ingested(
        events=writer.counts.written,
        late=writer.counts.late,
        trimmed=writer.counts.trimmed,
        sealed=seals.events if seals else 0,
        held=await count(redis, settings=settings),
        expired=expiry.expired,
        evicted=await summed(redis, "stats", "evicted_keys") - evicted,
        seconds=clock.elapsed_s() - began,
        timeline=pd.DataFrame(timeline),
        alerts=alert_table(watch.alerts if watch else []),
        cleaned=rounds.events if rounds else 0,
        aged=expiry.events,
    )


async def at_speed(events: pd.DataFrame, writer: Writer, seconds: float) -> None:
    """Write events at their own rhythm, sped up to take so many seconds; what a journal holds is brought in at the end.

    Parameters
    ----------
    events : pandas.DataFrame
        An event table.
    writer : Writer
        Not yet entered.
    seconds : float
        Of the wall's clock; longer where the server does not keep up, until it takes what the journal holds.

    Raises
    ------
    WriterError
        As `Writer.write_table`.
    """
    times = events["ts_ms"].to_numpy()
    moments = np.linspace(times[0], times[-1], _MOMENTS)
    began = clock.elapsed_s()
    async with writer:
        async for _, stop in writer.write_slices(events, times.searchsorted(moments, side="right").tolist()):
            part = (times[stop - 1] - times[0]) / max(times[-1] - times[0], 1)
            await asyncio.sleep(max(began + part * seconds - clock.elapsed_s(), 0))
        while writer.journaled:  # the writer itself tries again and again
            await asyncio.sleep(writer.settings.writer.check_s)


async def _point(redis: Redis, ts_ms: int, events: int) -> dict[str, int]:
    used, keys = await asyncio.gather(summed(redis, "memory", "used_memory"), redis.dbsize())
    return {"ts_ms": ts_ms, "events": events, "used_memory": used, "keys": int(keys)}
