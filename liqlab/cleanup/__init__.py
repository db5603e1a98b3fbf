"""Retention by bytes: each family within its share of maxmemory, whatever the market does.

`Cleaner` holds the work: `trim` every few seconds, `check` every five minutes, `compact` every half hour, `daily`
(`liqlab.cleanup.schedule` runs them on the wall's clock, a replay on the feed's). All are safe to interrupt and to
repeat. Families that are critical in `liqlab.schema` are never touched, and neither is the current VWAP.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from liqlab import clock, schema, sealing
from liqlab.budget import FOREIGN, UNATTRIBUTED, Budget, added, human, measure
from liqlab.cleanup import backup, families
from liqlab.cleanup.defragment import defragment
from liqlab.cleanup.families import Freed
from liqlab.cleanup.pressure import Action, Pressure, Tier
from liqlab.cluster import Cluster, as_cluster, infos
from liqlab.settings import Settings, load

__all__ = ["Action", "Cleaner", "Pressure", "Tier"]

KEPT: Final = 10_000  # actions
_LIMIT: Final = 300  # keys of a family that a round measures
_BIG: Final = 0.05  # of maxmemory: after that much was freed, the allocator is asked to give its pages back
_RSS: Final = 0.90  # of what the process may take
_FRAGMENTED: Final = 1.5
_SPARE: Final = 16 << 20  # bytes of RSS beyond used_memory that are nothing to worry about
_PATIENCE: Final = 40  # looks, 5 ms apart, at what is freed in the background
_LITTLE: Final = 1 << 20
_RSS_S: Final = 0.25  # the server looks at its RSS ten times a second
_HEADROOM: Final = 0.02  # of the streams' share that a cut leaves free, lest every batch have to cut again
_GROWTH: Final = 0.05  # of another share, likewise: it is looked at every five minutes only
_log: Final = logging.getLogger(__name__)


class Cleaner:
    """Keeps a server within its budget.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes; it may trim, delete and set TTLs. On a cluster each primary, as it is found at each
        round, is kept within its own maxmemory by a cleaner of its own, and `measured` is the sum.
    settings : Settings, optional
        `budget`, `retention`, `thresholds`, `cleanup`, `writer`, `shards`; `liqlab.settings.load()` when absent.
    dry_run : bool
        Say what would be done, and do nothing.
    on_action : callable, optional
        Called with every `Action`.

    Attributes
    ----------
    actions : deque of Action
        The last `KEPT` ones.
    tier : Tier
    measured : Budget or None
        What families took when they were last measured.
    nodes : dict of str to Cleaner
        Of a cluster, the cleaner of each primary, by ``host:port``.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        settings: Settings | None = None,
        dry_run: bool = False,
        on_action: Callable[[Action], None] | None = None,
    ) -> None:
        self.settings = settings or load()
        self.dry_run = dry_run
        self.actions: deque[Action] = deque(maxlen=KEPT)
        self.pressure = Pressure(self.settings)
        self.measured: Budget | None = None
        self._redis = redis
        self._on_action = on_action
        self._cluster = as_cluster(redis)
        self.nodes: dict[str, Cleaner] = {}
        self._overdraft = 0.0  # bytes that the server itself takes beyond the buffer's share
        self._now_ms = 0
        self._round: list[Action] = []

    @property
    def tier(self) -> Tier:
        """The tier at the last look; of a cluster, that of the node under most pressure."""
        return max((one.tier for one in self.nodes.values()), default=self.pressure.tier)

    async def trim(self, now_ms: int | None = None) -> list[Action]:
        """Look at the pressure, seal what has left the hot window, and bring the streams within their bytes.

        Parameters
        ----------
        now_ms : int, optional
            The time to clean up for, ms since the epoch; the wall's when absent.

        Returns
        -------
        list of Action
            What it did, in order; likewise the three that follow.
        """
        now_ms = self._begin(now_ms)
        if self._cluster:
            return await self._each(self._cluster, Cleaner.trim)
        used, limit = await self._memory()
        old, tier = self.tier, self.pressure.update(used / limit, now_ms)
        if tier is not old:
            words = f"{old.name.lower()} to {tier.name.lower()} at {100 * used / limit:.1f} % of {human(limit)}"
            self._note("tier", "all", Freed(detail=words), used, used)
        await self._seal(partial=False)
        due = self.pressure.due(now_ms)
        if due:
            await self._sweep(limit)  # first: it measures what other keys leave for the streams
        await self._bound_streams(limit)
        if due:
            if tier is Tier.EMERGENCY:
                await self._emergency(limit, entered=tier is not old)
            await self._purge(used - (await self._memory())[0] > _BIG * limit)
        return self._round

    async def check(self, now_ms: int | None = None) -> list[Action]:
        """Bring candles and sketches within their bytes, give cooldowns a TTL that have none, look at the process."""
        self._begin(now_ms)
        if self._cluster:
            return await self._each(self._cluster, Cleaner.check)
        used, limit = await self._memory()
        await self._sweep(limit)
        await self._act("expire", "cooldown", self._without_ttl("cooldown"))
        await self._purge(used - (await self._memory())[0] > _BIG * limit)
        return self._round

    async def compact(self, now_ms: int | None = None) -> list[Action]:
        """Remove idle VWAPs and silent streams, write daily summaries, give orphaned keys the TTL of their family."""
        now_ms = self._begin(now_ms)
        if self._cluster:
            await self._each(self._cluster, Cleaner._compact)
        else:
            await self._compact(now_ms)
        if self._folder is not None and not self.dry_run:
            await self._act(
                "archive",
                "candle_1h",
                backup.days(self._redis, self._folder, now_ms, self.settings.cleanup.folder_days),
            )
        return self._round

    async def _compact(self, now_ms: int) -> None:
        await self._seal(partial=True)
        for shard in schema.shards_of(self.settings):
            await self._act("drop", "events", families.empty_streams(self._redis, shard, dry_run=self.dry_run))
        idle_ms = now_ms - 1000 * self.settings.retention.vwap_s
        await self._act("drop", "vwap", families.idle_vwaps(self._redis, idle_ms, dry_run=self.dry_run))
        await self._act("expire", "all", self._without_ttl(None))

    async def daily(self, now_ms: int | None = None) -> list[Action]:
        """Back critical data up, defragment, begin a new count of unique symbols."""
        now_ms = self._begin(now_ms)
        if self._folder is not None and not self.dry_run:
            await self._act("backup", "critical", backup.critical(self._redis, self._folder, now_ms, self.settings))
        if self._cluster:
            await self._each(self._cluster, Cleaner._daily)
        else:
            await self._daily(now_ms)
        return self._round

    async def _daily(self, now_ms: int) -> None:
        if not self.dry_run:
            await self._act("defragment", "all", defragment(self._redis))
        await self._act("reset", "unique_symbols", self._reset())

    @property
    def _folder(self) -> Path | None:
        return self.settings.cleanup.folder

    def _begin(self, now_ms: int | None) -> int:
        self._round = []
        self._now_ms = clock.now_ms() if now_ms is None else now_ms
        return self._now_ms

    async def _each(self, cluster: Cluster, job: Callable[[Cleaner, int], Coroutine[Any, Any, Any]]) -> list[Action]:
        """Let the cleaner of each primary do a job; what one node cannot do keeps no other from it.

        Raises
        ------
        redis.exceptions.RedisError
            Of a node that failed, when the others are done.
        """
        nodes, problem, was = {node.name: node for node in await cluster.nodes()}, None, self.nodes
        self.nodes = {}
        for name, node in nodes.items():
            own = node.settings(self.settings)
            made = was.get(name) or Cleaner(node.redis, settings=own, dry_run=self.dry_run, on_action=self._taker(name))
            self.nodes[name] = made
            made.settings = own  # slots may have moved
            made._begin(self._now_ms)
            try:
                await job(made, self._now_ms)
            except RedisError as error:
                problem = error
        found = {name: one.measured for name, one in self.nodes.items() if one.measured}
        self.measured = added(found, self.settings) if found else None
        if problem:
            raise problem
        return self._round

    def _taker(self, node: str) -> Callable[[Action], None]:
        return lambda action: self._keep(replace(action, node=node))

    async def _memory(self) -> tuple[int, int]:
        """Return `used_memory` once nothing is being freed in the background any more, and maxmemory."""
        for _ in range(_PATIENCE):
            found = await infos(self._redis, "memory")
            if not any(memory.get("lazyfree_pending_objects") for memory in found):
                break
            await asyncio.sleep(0.005)
        limits = [int(memory["maxmemory"]) or self.settings.server.maxmemory for memory in found]
        return sum(int(memory["used_memory"]) for memory in found), sum(limits)

    def _target(self, share: str, limit: int) -> float:
        """Return the bytes of a share; what the server itself takes beyond the buffer is taken from all alike."""
        part = getattr(self.settings.budget, share) * (limit - self._overdraft)
        return float(part / 2 if self.tier >= Tier.HALVE else part)

    async def _act(self, what: str, family: str, work: Coroutine[Any, Any, Freed]) -> None:
        """Do a piece of work; note it if it changed anything, or was refused."""
        try:
            before, _ = await self._memory()
        except BaseException:
            work.close()  # else Python warns that nobody has awaited it
            raise
        try:
            freed = await work
        except (OutOfMemoryError, ResponseError) as error:  # at maxmemory, by an ACL, or by a server that cannot
            what, freed = "refused", Freed(detail=f"{what}: {error}")
        if freed.keys or freed.events or freed.detail:
            after = before if self.dry_run else (await self._memory())[0]
            self._note(what, family, freed, before, after)

    def _note(self, what: str, family: str, freed: Freed, before: int, after: int) -> None:
        name = self.tier.name.lower()
        action = Action(self._now_ms, name, what, family, freed.keys, freed.events, before, after, freed.detail)
        _log.info(
            "%s %s: %d keys, %d events, %d bytes freed; %s",
            *("would " * self.dry_run + what, family, freed.keys, freed.events, action.freed, freed.detail),
        )
        self._keep(action)

    def _keep(self, action: Action) -> None:
        self._round.append(action)
        self.actions.append(action)
        if self._on_action is not None:
            self._on_action(action)

    async def _seal(self, *, partial: bool) -> None:
        if self.dry_run:
            return
        # Half the life of a hot event is a tier's work too: sealed, it takes a fifth.
        hot_ms = 1000 * self.settings.retention.hot_s // (2 if self.tier >= Tier.HALVE else 1)
        until_ms = self._now_ms + 1000 * self.settings.retention.hot_s - hot_ms

        async def work() -> Freed:
            done = await sealing.seal(self._redis, now_ms=until_ms, settings=self.settings, partial=partial)
            return Freed(detail=f"{done.events:,} events into {done.blocks:,} blocks" if done.blocks else "")

        await self._act("seal", "events", work())

    async def _bound_streams(self, limit: int) -> None:
        shards = schema.shards_of(self.settings)
        target = self._target("streams", limit) / max(len(shards), 1)
        for shard in shards:
            now = await families.streams(self._redis, shard)
            if now.bytes > target:
                cut = families.to_bytes(
                    self._redis, shard, target * (1 - _HEADROOM), self.settings, dry_run=self.dry_run
                )
                await self._act("trim", "events", cut)
            if not self.dry_run:
                await self._act("limit", "limits", self._limit(shard, now, target))

    async def _limit(self, shard: int | None, now: families.Streams, target: float) -> Freed:
        """Tell the writers' script what it may fill: the batches between two rounds keep to it."""
        _, shared = now.of(now.shared)
        _, blocks = now.of(now.blocks)
        values: dict[Any, str | int] = {
            "bytes": round(max(target - (now.bytes - shared - blocks), 0)),
            "event_bytes": f"{now.event_bytes():.2f}",
            "block_bytes": round(now.block_bytes(self.settings)),
            "tier": self.tier.name.lower(),
        }
        await self._redis.hset(schema.BY_NAME["limits"].key(shard=shard), mapping=values)
        return Freed()

    async def _sweep(self, limit: int) -> None:
        """Bring the families that are many keys within their bytes."""
        redis, retention = self._redis, self.settings.retention
        self.measured = measured = await measure(redis, settings=self.settings, limit=_LIMIT)
        beyond = int(measured.table["bytes"].reindex([UNATTRIBUTED, FOREIGN], fill_value=0).sum())
        self._overdraft = max(beyond - self.settings.budget.buffer * limit, 0.0)
        found = measured.families
        size = {str(name): float(one) for name, one in found["bytes"].items()}
        each = {name: one / max(int(found["keys"][name]), 1) for name, one in size.items()}
        part = 0.5 if self.tier >= Tier.HALVE else 1.0

        excess = {}
        for share in ("statistics", "percentile"):
            taken, target = int(measured.table["bytes"][share]), self._target(share, limit)
            excess[share] = taken - target * (1 - _GROWTH) if taken > target else 0.0
        oldest = {}
        if part < 1:
            for name in (*families.STATISTICS, "percentile"):
                life_s = schema.BY_NAME[name].ttl_s(self.settings) or 0
                oldest[name] = int(self._now_ms - 1000 * part * life_s)
        for share, names in (("statistics", families.STATISTICS), ("percentile", ("percentile",))):
            await self._buckets(names, excess[share], each, oldest)
        if sketches := size.get("sketch", 0):
            hour = self._now_ms // (1000 * retention.percentile_bucket_s)
            window = retention.percentile_window_s // retention.percentile_bucket_s
            first = hour - int(part * window) if part < 1 else 0
            over = (excess["percentile"] - size.get("percentile", 0)) / sketches
            await self._act("trim", "sketch", families.hours(redis, over, first, dry_run=self.dry_run))

    async def _buckets(
        self, names: Sequence[str], excess: float, each: dict[str, float], oldest: dict[str, int]
    ) -> None:
        for name in names:
            if name not in each or (excess <= 0 and name not in oldest):
                continue
            least = oldest.get(name, 0)
            work = families.buckets(self._redis, name, self.settings, excess, each[name], least, dry_run=self.dry_run)
            before = len(self._round)
            await self._act("drop", name, work)
            excess -= sum(action.keys for action in self._round[before:]) * each[name]

    async def _emergency(self, limit: int, *, entered: bool) -> None:
        """Drop what is temporary and the oldest half of the events; then half of the rest, where that can end it."""
        await self._act("drop", "temporary", families.temporary(self._redis, dry_run=self.dry_run))
        lines, shards = self.settings.thresholds, schema.shards_of(self.settings)
        excess = (await self._memory())[0] - (lines.emergency - lines.exit_margin) * limit
        held = [(await families.streams(self._redis, shard)).bytes for shard in shards]
        if not entered and sum(held) / 2 < excess:  # somebody else's keys press: no history would make up for them
            return
        for shard, size in zip(shards, held, strict=True):
            cut = families.to_bytes(self._redis, shard, size / 2, self.settings, dry_run=self.dry_run)
            await self._act("trim", "events", cut)

    async def _purge(self, freed_much: bool) -> None:
        """Ask the allocator for its empty pages after a big free, or where the process takes too much."""
        memory = await self._redis.info("memory")
        used, rss = int(memory["used_memory"]), int(memory["used_memory_rss"])
        may_take = self.settings.cleanup.rss_bytes or int(memory.get("total_system_memory", 0))
        full = may_take > 0 and rss > _RSS * may_take
        if self.dry_run or not (freed_much or full or rss > max(_FRAGMENTED * used, used + _SPARE)):
            return

        async def work() -> Freed:
            await self._redis.memory_purge()
            await asyncio.sleep(_RSS_S)
            left = int((await self._redis.info("memory"))["used_memory_rss"])
            if left > rss - _LITTLE:  # not every allocator has anything to give
                return Freed()
            words = f"RSS {human(rss)} to {human(left)}"
            return Freed(detail=f"{words}, of {human(may_take)} that the process may take" if full else words)

        await self._act("purge", "all", work())

    async def _reset(self) -> Freed:
        keys = [schema.BY_NAME["unique_symbols"].key(shard=shard) for shard in schema.shards_of(self.settings)]
        gone = await self._redis.exists(*keys) if self.dry_run else await self._redis.unlink(*keys)
        return Freed(int(gone), 0, "the count of unique symbols begins anew" if gone else "")

    async def _without_ttl(self, family: str | None) -> Freed:
        return await families.without_ttl(self._redis, family, self.settings, dry_run=self.dry_run)
