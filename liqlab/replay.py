"""Play a recorded feed into a real server on the feed's own clock.

TTLs follow event time: a key whose time is up in the feed is removed, once per event-minute, whatever the wall clock
says. What the server holds at the end is what a live one would hold at that moment of the feed. Real TTLs are set as
well, so that eviction order stays the server's own.
"""

from __future__ import annotations

import asyncio
import heapq
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pandas as pd
from redis.asyncio import Redis

from liqlab import clock, schema
from liqlab.archive import count
from liqlab.candles import WIDTHS
from liqlab.cleanup import Cleaner
from liqlab.cleanup.schedule import EventClock
from liqlab.detector import Alert, Detector
from liqlab.detector import table as alert_table
from liqlab.events import Columns, EventError, check
from liqlab.feeds import Feed
from liqlab.sealing import seal
from liqlab.settings import Journal, Settings, load
from liqlab.writer import Writer

_SAMPLES: Final = 240  # points of the timeline: as many as a picture shows
_MOMENTS: Final = 100  # at which a feed that is played at speed is written
_UNLINK: Final = 500
_SEAL_MS: Final = 5 * clock.MINUTE_MS

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
        Events that MAXLEN pushed out of their stream again.
    sealed : int
        Events that were moved into blocks.
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
        Runs its schedule on the feed's clock; it seals too.
    detector : Detector, optional
        Looks at the events of each minute before they are written. With a method of its own, that is filled too.
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
    minutes = events["ts_ms"].to_numpy() // clock.MINUTE_MS
    stops = [*(np.flatnonzero(np.diff(minutes)) + 1).tolist(), len(events)]
    times = events["ts_ms"].tolist()
    every = max(len(stops) // _SAMPLES, 1)

    began, evicted = clock.elapsed_s(), await _evicted(redis)
    writer, expiry = Writer(redis, settings=settings), _Expiry(events, settings)
    timeline: list[dict[str, int]] = []
    sealing, sealed, next_seal_ms = sealing and not cleaner and settings.writer.strategy == "script", 0, 0
    schedule = EventClock(cleaner) if cleaner else None
    ends = dict(pairwise([0, *stops]))

    async def look(start: int) -> list[Alert]:
        if detector is None or start not in ends:
            return []
        part = events.iloc[start : ends[start]]
        raised = await detector.look(part)
        expiry.touch_alerts(raised)
        if not detector.method.written:
            await detector.method.add(Columns.of(part))
        return raised

    alerts = await look(0)
    async for start, stop in writer.write_slices(events, stops):
        if expire:
            expiry.touch(start, stop)
        if len(timeline) * every <= bisect_left(stops, stop) or stop == len(events):
            timeline.append(await _point(redis, times[stop - 1], stop))
        now_ms = (int(minutes[stop]) if stop < len(events) else int(minutes[-1]) + 1) * clock.MINUTE_MS
        if sealing and (now_ms >= next_seal_ms or stop == len(events)):
            sealed += (await seal(redis, now_ms=now_ms, settings=settings)).events
            next_seal_ms = now_ms + _SEAL_MS
        if schedule:
            await schedule.run(now_ms)
        if expire and stop < len(events):
            await expiry.run(redis, now_ms)
        alerts += await look(stop)
        if progress:
            progress(stop, len(events))
    return Ingested(
        events=writer.counts.written,
        late=writer.counts.late,
        trimmed=writer.counts.trimmed,
        sealed=sealed,
        held=await count(redis, settings=settings),
        expired=expiry.expired,
        evicted=await _evicted(redis) - evicted,
        seconds=clock.elapsed_s() - began,
        timeline=pd.DataFrame(timeline),
        alerts=alert_table(alerts),
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
        Of the wall's clock; longer where the server does not keep up.

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
        await writer.drain()


class _Expiry:
    """Deadlines of the keys that were written, on the feed's clock."""

    def __init__(self, events: pd.DataFrame, settings: Settings) -> None:
        self.expired: dict[str, int] = {}
        self._deadlines: dict[str, int] = {}
        self._heap: list[tuple[int, str, str]] = []
        self._shards = settings.shards
        self._times = events["ts_ms"].to_numpy()
        self._codes = events["symbol"].cat.codes.to_numpy()
        self._ttl_ms = {name: 1000 * (family.ttl_s(settings) or 0) for name, family in schema.BY_NAME.items()}
        # Every name that a symbol's keys have, once: a feed has few symbols and many minutes.
        self._names = []
        for symbol in events["symbol"].cat.categories:
            shard = schema.shard_of(symbol, settings.shards)
            streams = {
                "shared": (schema.BY_NAME["events"].key(shard=shard),),
                "per_symbol": (schema.BY_NAME["events"].key(symbol, shard=shard),),
            }
            self._names.append(
                (
                    streams.get(settings.writer.layout, (*streams["shared"], *streams["per_symbol"])),
                    schema.BY_NAME["vwap"].key(symbol, shard=shard),
                    schema.BY_NAME["sketch"].key(symbol, shard=shard),
                    [
                        (name, schema.BY_NAME[name].head(symbol, shard=shard), schema.BY_NAME[name].bucket_ms)
                        for name in WIDTHS.values()
                    ],
                    schema.BY_NAME["unique_symbols"].key(shard=shard),
                    schema.BY_NAME["blocks"].key(shard=shard),
                )
            )

    def touch(self, start: int, stop: int) -> None:
        """Set the deadlines of the keys that the events of one minute, rows `start` to `stop`, have touched."""
        last = dict(zip(self._codes[start:stop].tolist(), self._times[start:stop].tolist(), strict=True))
        for code, ts_ms in last.items():
            streams, vwap, sketch, candles, unique, blocks = self._names[code]
            for stream in streams:
                self._set("events", stream, ts_ms)
            self._set("blocks", blocks, ts_ms)
            self._set("vwap", vwap, ts_ms)
            self._set("sketch", sketch, ts_ms)
            for family, head, width_ms in candles:
                self._set(family, f"{head}{ts_ms // width_ms}", ts_ms)
            if unique not in self._deadlines:  # counts an hour from its first symbol; later ones do not prolong it
                self._set("unique_symbols", unique, ts_ms)

    def touch_alerts(self, alerts: Iterable[Alert]) -> None:
        """Set the deadlines of the keys that alerts have touched."""
        for alert in alerts:
            shard = schema.shard_of(alert.symbol, self._shards)
            cooldown = schema.BY_NAME["cooldown"].key(alert.symbol, side=alert.side, shard=shard)
            self._set("cooldown", cooldown, alert.ts_ms)
            self._set("signal", schema.BY_NAME["signal"].key(alert.symbol, shard=shard), alert.ts_ms)

    def _set(self, family: str, key: str, ts_ms: int) -> None:
        deadline = max(ts_ms + self._ttl_ms[family], self._deadlines.get(key, 0))
        self._deadlines[key] = deadline
        heapq.heappush(self._heap, (deadline, key, family))

    async def run(self, redis: Redis, now_ms: int) -> None:
        """Remove the keys whose deadline is not after `now_ms`."""
        due = []
        while self._heap and self._heap[0][0] <= now_ms:
            deadline, key, family = heapq.heappop(self._heap)
            if self._deadlines.get(key) == deadline:  # else it was touched again, or is gone
                del self._deadlines[key]
                due.append(key)
                self.expired[family] = self.expired.get(family, 0) + 1
        for start in range(0, len(due), _UNLINK):
            await redis.unlink(*due[start : start + _UNLINK])


async def _evicted(redis: Redis) -> int:
    return int((await redis.info("stats"))["evicted_keys"])


async def _point(redis: Redis, ts_ms: int, events: int) -> dict[str, int]:
    memory = await redis.info("memory")
    return {
        "ts_ms": ts_ms,
        "events": events,
        "used_memory": int(memory["used_memory"]),
        "keys": int(await redis.dbsize()),
    }
