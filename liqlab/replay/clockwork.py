"""What runs on a feed's clock while it is played: the end of each key's time, cleanup, sealing, the detector."""

from __future__ import annotations

import asyncio
import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from liqlab import clock, schema
from liqlab.archive import count, together
from liqlab.candles import WIDTHS
from liqlab.cleanup import Action, Cleaner, Tier
from liqlab.cluster import infos
from liqlab.detector import Alert, Detector, Rows
from liqlab.events import Columns, run_starts
from liqlab.fronts import Front
from liqlab.link import given_up, turns
from liqlab.sealing import Ahead, Sealed, ahead, least, seal
from liqlab.settings import Settings

_UNLINK: Final = 500
_GROWN: Final = 2_000  # bytes that an event adds at most, in the mean
_CLOSE: Final = 0.8  # of a share
_SHORT_MS: Final = 100
_CALM_MS: Final = 30 * clock.MINUTE_MS
_SEAL_MS: Final = 5 * clock.MINUTE_MS
_NEVER: Final = np.iinfo(np.int64).max // 2

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_State = dict[int | None, tuple[int, float]]


async def summed(redis: Redis, section: str, name: str) -> int:
    """Return a figure of INFO, of all primaries where it is a cluster."""
    return sum(int(info[name]) for info in await infos(redis, section))


class Rounds:
    """A cleaner without its rounds that could find nothing to do: all that is in use is less than a share may take.

    By a fifth, to have room until the next look; by half, where the server itself may have taken some of the share,
    which it does beyond the buffer's (see `Cleaner`).
    """

    def __init__(self, cleaner: Cleaner, redis: Redis) -> None:
        self.settings = cleaner.settings
        self.events = 0  # removed
        self.room = 0  # events that may be written before the next look
        self._found = 0  # what it was at the last one
        self.sealed_ms = 0  # up to when all is sealed
        self._again_ms = 0  # until when families need not be measured
        self._fills = 0.0  # as long as `used_memory` is below
        self._cleaner = cleaner
        self._redis = redis

    async def trim(self, now_ms: int) -> list[Action]:
        """Run `Cleaner.trim`, and say how much may be written until memory has to be looked at again."""
        if self.room <= self._found / 2 or self._cleaner.tier is not Tier.NORMAL:
            share = min(self.settings.budget.streams, self.settings.thresholds.trim)
            self.room = self._found = int(await self._left(share) // _GROWN)
        return [] if self.room > 0 else self._counted(await self._cleaner.trim(now_ms))

    async def check(self, now_ms: int) -> list[Action]:
        """Run `Cleaner.check`, up to half an hour later where what has come since could not exceed a share."""
        budget = self.settings.budget
        calm = await self._left(min(budget.statistics, budget.percentile)) > 0
        if calm or (now_ms < self._again_ms and await summed(self._redis, "memory", "used_memory") < self._fills):
            return []
        done = self._counted(await self._cleaner.check(now_ms))
        if measured := self._cleaner.measured:
            # Of a cluster: until all that came could lie on the node that has the least room.
            tables = [one.table.loc[["statistics", "percentile"]] for one in measured.nodes.values() or [measured]]
            room = min(float((table["budget_bytes"] - table["bytes"]).min()) for table in tables)
            self._fills = await summed(self._redis, "memory", "used_memory") + room
            self._again_ms = now_ms + _CALM_MS
        return done

    async def compact(self, now_ms: int) -> list[Action]:
        """Run `Cleaner.compact`."""
        self.sealed_ms = now_ms - 1000 * self.settings.retention.hot_s
        return self._counted(await self._cleaner.compact(now_ms))

    async def daily(self, now_ms: int) -> list[Action]:
        """Run `Cleaner.daily`."""
        return self._counted(await self._cleaner.daily(now_ms))

    async def _left(self, share: float) -> float:
        """Return the bytes that may be used until a round can find something to do; 0 in a tier of pressure."""
        part, most = share * (_CLOSE if share <= self.settings.budget.buffer else 0.5), self.settings.server.maxmemory
        left = [
            part * (int(memory["maxmemory"]) or most) - int(memory["used_memory"])
            for memory in await infos(self._redis, "memory")
        ]
        return max(min(left), 0) if self._cleaner.tier is Tier.NORMAL else 0

    def _counted(self, done: list[Action]) -> list[Action]:
        self.events += sum(action.events for action in done)
        return done


class Watch:
    """A detector that asks for thresholds before each step is written, and judges what is large while it is.

    Attributes
    ----------
    alerts : list of Alert
        Raised so far.
    """

    def __init__(self, detector: Detector, events: Columns, rows: Rows, volume: Floats, expiry: Expiry) -> None:
        self.alerts: list[Alert] = []
        self._detector, self._events, self._rows, self._volume, self._expiry = detector, events, rows, volume, expiry
        # Thresholds of one moment are asked for together; of several, each where it is needed.
        self._together = 1000 * detector.settings.detector.refresh_s % expiry.step_ms == 0
        self._asked = rows[:0]
        self._judging: asyncio.Task[None] | None = None

    def first(self, start: int, stop: int) -> int:
        """Return the first of some rows that may be an alert by what is known now, `stop` where there is none."""
        part = self._part(start, stop)
        loud = part[~self._detector.quiet(self._events, part)]
        return int(loud[0]) if len(loud) else stop

    async def look(self, start: int, stop: int) -> None:
        """Ask for the thresholds of the rows of a step, of which none is written yet, by what is known now."""
        self._asked = self._part(start, stop)
        if self._together:
            await self._detector.ask(self._events, self._asked)
        else:
            await self._judge(self._asked)

    def judge(self) -> None:
        """Begin to judge what was looked at, if it is not yet: from now on more is known from moment to moment."""
        if self._together and len(self._asked):
            self._judging = asyncio.create_task(self._judge(self._asked))

    async def judged(self) -> None:
        """Return when all that was looked at is judged."""
        if self._judging:
            await self._judging

    async def close(self) -> None:
        """Give up what is not judged."""
        await given_up(self._judging)

    async def _judge(self, part: Rows) -> None:
        await turns()  # the events leave first: meanwhile nothing else is sent, and the server would wait
        raised = await self._detector.judge(self._events, part, self._volume)
        self._expiry.touch_alerts(raised)
        self.alerts += raised

    def _part(self, start: int, stop: int) -> Rows:
        return self._rows[slice(*self._rows.searchsorted([start, stop]).tolist())]


class Seals:
    """Sealing every five minutes, of the shards of which enough events have left the hot window to fill a block.

    Attributes
    ----------
    rows : list of int
        Before which to seal: those that begin a minute, five minutes or more after the last; the end.
    events : int
        Sealed so far.
    """

    def __init__(
        self, redis: Redis, settings: Settings, events: Columns, now_at: Callable[[int], int], rounds: Rounds | None
    ) -> None:
        self.events = 0
        self._redis, self._settings, self._now_at, self._rounds = redis, settings, now_at, rounds
        self._times = events.ts_ms
        self._hot_ms = 1000 * settings.retention.hot_s
        self._made: Ahead | None = None
        self._fronts: dict[int | None, Front] = {}  # that were read last, of each shard
        shards = schema.shards_of(settings)
        of_symbol = np.array([schema.shard_of(name, settings.shards) or 0 for name in events.symbols], np.int64)
        of_event = of_symbol[events.symbol]
        self._of_shard = {shard: events.ts_ms[of_event == (shard or 0)] for shard in shards}
        # Of each shard, up to when all is sealed, and the bytes of an event in the last block.
        self._state: _State = dict.fromkeys(shards, (0, 0.0))
        minutes = events.ts_ms // clock.MINUTE_MS * clock.MINUTE_MS
        self.rows, next_ms = list[int](), 0
        for row in run_starts(minutes)[1:].tolist():
            if minutes[row] >= next_ms:
                self.rows.append(row)
                next_ms = minutes[row] + _SEAL_MS
        self.rows.append(len(minutes))

    async def run(self, row: int, then: Callable[[], Awaitable[None]]) -> None:
        """Seal, where it is time to, and await `then`; meanwhile what is sealed next is read, if all of it is there."""
        made, due = None, list[int | None]()
        if row == self.rows[bisect_left(self.rows, row)]:
            (made, self._made), due = (self._made, None), self._due(self._state, self._now_at(row))

        async def work() -> None:
            if due:
                settings = schema.only(self._settings, due)
                done = await seal(self._redis, now_ms=self._now_at(row), settings=settings, made=made)
                self.events += done.events
                self._state = self._after(done.shards)
            await then()

        if made and due and all(front.whole for front in made.fronts.values()):
            expected = self._after(await made.expected())
            self._fronts |= made.fronts
            _, self._made = await together(work(), self._next(row, expected))
            if self._state == expected:
                return
            self._made = None  # a writer or another sealer came in between
        else:
            await work()
            if made:
                await made.close()
        if due:
            self._fronts.clear()
        self._made = self._made or await self._next(row, self._state)

    async def _next(self, row: int, state: _State) -> Ahead | None:
        if row == len(self._times):
            return None
        now_ms = self._now_at(self.rows[bisect_right(self.rows, row)])
        if now_ms - self._hot_ms > self._times[row] or not (due := self._due(state, now_ms)):
            return None
        return await ahead(self._redis, now_ms=now_ms, settings=schema.only(self._settings, due), behind=self._fronts)

    def make_next(self) -> None:
        """Let the blocks of it be made while the server takes the events up to then."""
        if self._made:
            self._made.begin()

    def _after(self, done: Mapping[int | None, Sealed]) -> _State:
        state = dict(self._state)
        for shard, one in done.items():
            state[shard] = max(one.until_ms, state[shard][0]), one.each
        return state

    def _due(self, state: _State, now_ms: int) -> list[int | None]:
        """Return the shards that have enough events to seal."""
        due, compacted_ms = list[int | None](), self._rounds.sealed_ms if self._rounds else 0
        for shard, times in self._of_shard.items():
            sealed_ms, each = state[shard]
            if compacted_ms > sealed_ms:  # of a block that is not known here
                sealed_ms, each = compacted_ms, 0.0
            sealed, old = times.searchsorted([sealed_ms, now_ms - self._hot_ms])
            if old - sealed >= least(self._settings.writer.block_bytes, each):
                due.append(shard)
        return due

    async def close(self) -> None:
        """Give up the blocks that were to be made next."""
        if self._made:
            await self._made.close()


class Expiry:
    """When the time of keys is up on the feed's clock: known before it is played, but for those of alerts.

    Attributes
    ----------
    step_ms : int
        To which it is exact: a minute, or a tenth of a second where a family lives for less than a minute.
    cuts : list of int
        Times, ms, by which a key must be gone that then comes again.
    expired : dict of str to int
        Keys removed so far, by family.
    events : int
        Events that were in them.
    """

    def __init__(self, events: Columns, settings: Settings) -> None:
        self.expired: dict[str, int] = {}
        self.events = 0
        self._settings, self._symbols = settings, events.symbols
        self._ttl_ms = {name: 1000 * (family.ttl_s(settings) or 0) for name, family in schema.BY_NAME.items()}
        shards = [schema.shard_of(symbol, settings.shards) for symbol in events.symbols]
        layout = settings.writer.layout
        streams = [("events", True)] * (layout != "shared") + [("events", False)] * (layout != "per_symbol")
        # Of each kind of key: family, and the name of each symbol's, but for the bucket.
        kinds: list[tuple[str, bool]] = [*streams, ("blocks", False), ("unique_symbols", False)]
        kept = "sketch" if settings.detector.method == "logbins" else "percentile"
        kinds += [("vwap", True), (kept, True), *((name, True) for name in WIDTHS.values())]
        shortest = min([self._ttl_ms[name] for name, _ in kinds])
        self.step_ms = clock.MINUTE_MS if shortest >= clock.MINUTE_MS else _SHORT_MS
        self._kinds: list[tuple[str, list[str]]] = []
        by_symbol = np.argsort(events.symbol, kind="stable")
        shard = np.array([number or 0 for number in shards], np.int64)[events.symbol]
        by_shard = np.argsort(shard, kind="stable") if settings.shards > 1 else np.arange(len(shard))
        found: list[tuple[Ints, ...]] = []
        for kind, (name, own) in enumerate(kinds):
            family, order = schema.BY_NAME[name], by_symbol if own else by_shard
            owner, ts_ms = (events.symbol if own else shard)[order], events.ts_ms[order]
            width_ms = family.width_ms(settings) if own else 0
            bucket = ts_ms // width_ms if width_ms else np.zeros(len(ts_ms), np.int64)
            heads = [
                (family.head if width_ms else family.key)(symbol, shard=number) if own else family.key(shard=number)
                for symbol, number in zip(events.symbols, shards, strict=True)
            ]
            self._kinds.append((name, heads))
            ends = self._ends(run_starts(owner, bucket), ts_ms, self._ttl_ms[name], whole=name == "unique_symbols")
            last, due_ms, next_ms = ends
            code = events.symbol[order][last].astype(np.int64)
            found.append((due_ms, np.full(len(last), kind), code, bucket[last] if width_ms else -1 + 0 * last, next_ms))
        due_ms, kind_of, code, bucket, next_ms = (np.concatenate(column) for column in zip(*found, strict=True))
        self.cuts: list[int] = np.unique(next_ms[next_ms < _NEVER]).tolist()
        order = np.argsort(due_ms, kind="stable")
        self._due_ms, self._at = due_ms[order], 0
        self._kind, self._code, self._bucket = kind_of[order], code[order], bucket[order]
        self._deadlines: dict[str, int] = {}
        self._heap: list[tuple[int, str, str]] = []

    def _ends(self, starts: NDArray[np.intp], ts_ms: Ints, ttl_ms: int, *, whole: bool) -> tuple[Ints, Ints, Ints]:
        """Return the rows with which a key's life ends, when it does, and the step in which it begins again.

        Parameters
        ----------
        starts : array
            Where the rows of another key begin.
        ts_ms : array
            Of each row, ascending within a key.
        whole : bool
            Whether the first event of a life sets its end; else each prolongs it.
        """
        next_ms = np.append(ts_ms[1:] // self.step_ms * self.step_ms, _NEVER)
        next_ms[starts[1:] - 1] = _NEVER
        if not whole:
            last = np.flatnonzero(ts_ms + ttl_ms <= next_ms)
            return last, ts_ms[last] + ttl_ms, next_ms[last]
        rows, due = list[int](), list[int]()
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(ts_ms)], strict=True):
            first = start
            while first < stop:
                due.append(int(ts_ms[first]) + ttl_ms)
                first = start + int((ts_ms[start:stop] // self.step_ms * self.step_ms).searchsorted(due[-1]))
                rows.append(first - 1)
        last = np.array(rows, np.int64)
        return last, np.array(due, np.int64), next_ms[last]

    def touch_alerts(self, alerts: Iterable[Alert]) -> None:
        """Set the deadlines of the keys that alerts have touched."""
        for alert in alerts:
            shard = schema.shard_of(alert.symbol, self._settings.shards)
            cooldown = schema.BY_NAME["cooldown"].key(alert.symbol, side=alert.side, shard=shard)
            signal = schema.BY_NAME["signal"].key(alert.symbol, shard=shard)
            for family, key in (("cooldown", cooldown), ("signal", signal)):
                self._deadlines[key] = max(alert.ts_ms + self._ttl_ms[family], self._deadlines.get(key, 0))
                heapq.heappush(self._heap, (self._deadlines[key], key, family))

    async def run(self, redis: Redis, now_ms: int) -> None:
        """Remove the keys whose deadline is not after `now_ms`."""
        end = int(self._due_ms.searchsorted(now_ms, "right"))
        due: dict[str, list[str]] = {}
        which = slice(self._at, max(end, self._at))
        kinds, codes, buckets = (column[which] for column in (self._kind, self._code, self._bucket))
        for kind in np.unique(kinds).tolist():
            family, heads = self._kinds[kind]
            its = zip(codes[kinds == kind].tolist(), buckets[kinds == kind].tolist(), strict=True)
            due.setdefault(family, []).extend(
                heads[code] if bucket < 0 else f"{heads[code]}{bucket}" for code, bucket in its
            )
        self._at = which.stop
        while self._heap and self._heap[0][0] <= now_ms:
            deadline, key, family = heapq.heappop(self._heap)
            if self._deadlines.get(key) == deadline:  # else it was touched again, or is gone
                del self._deadlines[key]
                due.setdefault(family, []).append(key)
        stored = bool({"events", "blocks"} & due.keys())
        before = await count(redis, settings=self._settings) if stored else 0
        for family, keys in due.items():
            self.expired[family] = self.expired.get(family, 0) + len(keys)
        gone = [key for keys in due.values() for key in keys]
        for start in range(0, len(gone), _UNLINK):
            await redis.unlink(*gone[start : start + _UNLINK])
        self.events += before - await count(redis, settings=self._settings) if stored else 0
