"""A drill: a feed, and beside it on the same server a neighbour that takes the memory away.

Families that are bounded by bytes do not fill a server; a program that knows nothing of their shares does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from liqlab.cleanup import Action, Cleaner
from liqlab.cleanup.schedule import EventClock
from liqlab.events import EventError, check
from liqlab.settings import Settings, Thresholds, load
from liqlab.writer import Writer, WriterError

_ENTRY: Final = 20 << 10  # bytes of an entry of the neighbour's cache
_OVERHEAD: Final = 100  # bytes of them that the server's table takes


@dataclass(frozen=True)
class Drilled:
    """What a drill did.

    Attributes
    ----------
    timeline : pandas.DataFrame
        Through the feed's time: ts_ms; used_ratio and neighbour_ratio, of maxmemory; tier; breaker, its state;
        journaled, the events that wait. A step has two rows where there is a cleaner: before and after it.
    actions : list of Action
        Of the cleaner.
    refused : int
        Events that the server did not take and that no journal held.
    oom : int
        Commands that the server refused for want of memory, the neighbour's too.
    evicted : int
        Keys that the server itself evicted.
    """

    timeline: pd.DataFrame
    actions: list[Action]
    refused: int
    oom: int
    evicted: int

    def tiers(self, thresholds: Thresholds) -> pd.DataFrame:
        """Return a row a tier: when it was entered, what cleanup did in it, how long memory took to come back.

        Returns
        -------
        pandas.DataFrame
            Of the tiers that were entered, by name, ``trim`` first: `entered`, a time; `freed`, bytes; `keys` and
            `events` removed; `seconds` of the feed's time from the first entry until `used_ratio` was `exit_margin`
            below the tier's line for good, NaN where it never was.
        """
        rows, times = {}, self.timeline["ts_ms"]
        done = pd.DataFrame(
            [action.as_dict() for action in self.actions if action.what != "tier"],
            columns=["tier", "freed", "keys", "events"],
        )
        sums = done.groupby("tier").sum()
        for tier in ("trim", "halve", "emergency"):
            inside = self.timeline["tier"] == tier
            if not inside.any():
                continue
            entered = times[inside].iloc[0]
            exit_line = getattr(thresholds, tier) - thresholds.exit_margin
            above = (self.timeline["used_ratio"] > exit_line) & (times >= entered)
            below = times[times > times[above].max()] if above.any() else times[times >= entered]
            seconds = (below.iloc[0] - entered) / 1000 if len(below) else np.nan
            freed = sums.loc[tier] if tier in sums.index else dict.fromkeys(sums.columns, 0)
            rows[tier] = {"entered": pd.Timestamp(entered, unit="ms"), **freed, "seconds": seconds}
        return pd.DataFrame(rows.values(), index=list(rows))


async def drill(
    events: pd.DataFrame,
    redis: Redis,
    neighbour: Sequence[float],
    *,
    settings: Settings | None = None,
    cleaner: Cleaner | None = None,
) -> Drilled:
    """Play a feed in event time beside a neighbour that fills the same server: ``cache:*``, without a TTL.

    Parameters
    ----------
    events : pandas.DataFrame
        An event table.
    redis : redis.asyncio.Redis
        A server of one's own, with a limit: the neighbour fills it.
    neighbour : sequence of float
        Bytes that the neighbour wants, a step each; the feed is cut into as many steps of equal time.
    settings : Settings, optional
        With `journal.path` the writer has a breaker, which looks once a step; without, a batch that the server refuses
        is lost. `liqlab.settings.load()` when absent.
    cleaner : Cleaner, optional
        Runs its schedule on the feed's clock.

    Returns
    -------
    Drilled

    Raises
    ------
    EventError
        There is no event.
    WriterError
        The journal is full, or what it holds cannot be brought into the server at the end.
    """
    settings = settings or load()
    if check(events).empty:
        raise EventError("a drill needs events; liqlab.synth('cascade') draws some")
    times = events["ts_ms"].to_numpy()
    ends = np.linspace(times[0], times[-1] + 1, len(neighbour) + 1)[1:].astype(np.int64)
    limit = int((await redis.info("memory"))["maxmemory"])
    evicted, oom = await _counts(redis)
    writer, schedule = Writer(redis, settings=settings), EventClock(cleaner) if cleaner else None
    timeline: list[dict[str, Any]] = []
    start = held = refused = 0

    async def look(now_ms: int) -> None:
        used = int((await redis.info("memory"))["used_memory"])
        timeline.append(
            {
                "ts_ms": now_ms,
                "used_ratio": used / limit,
                "neighbour_ratio": held * _ENTRY / limit,
                "tier": cleaner.tier.name.lower() if cleaner else "",
                "breaker": str(writer.breaker.state) if writer.breaker else "",
                "journaled": writer.journaled,
            }
        )

    for now_ms, stop, wanted in zip(ends.tolist(), times.searchsorted(ends).tolist(), neighbour, strict=True):
        held = await _grow(redis, held, int(wanted) // _ENTRY)
        written = writer.counts.written
        try:
            await writer.write_table(events.iloc[start:stop])
        except WriterError:
            if writer.journal:
                raise
            refused += stop - start - (writer.counts.written - written)
            writer = Writer(redis, settings=settings)  # the old one would send its batch again
        start = stop
        await look(now_ms)
        if schedule:
            await schedule.run(now_ms)
            await look(now_ms)
        if writer.breaker:
            await writer.breaker.check(redis)
    await writer.drain()
    writer.close()
    evicted_since, oom_since = await _counts(redis)
    return Drilled(
        timeline=pd.DataFrame(timeline),
        actions=list(cleaner.actions) if cleaner else [],
        refused=refused,
        oom=oom_since - oom,
        evicted=evicted_since - evicted,
    )


async def _grow(redis: Redis, held: int, wanted: int) -> int:
    """Let the neighbour hold so many entries, or as many as the server lets it have; return how many it has."""
    if wanted < held:
        await redis.unlink(*(f"cache:{n}" for n in range(wanted, held)))
    for n in range(held, wanted):
        try:
            await redis.set(f"cache:{n}", bytes(_ENTRY - _OVERHEAD))
        except OutOfMemoryError:
            return n
    return wanted


async def _counts(redis: Redis) -> tuple[int, int]:
    """Return how many keys the server has evicted, and how many commands it has refused for want of memory."""
    errors = await redis.info("errorstats")
    return int((await redis.info("stats"))["evicted_keys"]), int(errors.get("errorstat_OOM", {}).get("count", 0))
