"""When cleanup runs: on the wall's clock by APScheduler, in one process only, or on a feed's clock.

The process that runs it holds a lock in Redis whose TTL it renews; when it dies, another one takes over within
`retention.lock_s`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from redis.asyncio import Redis
from redis.asyncio.lock import Lock
from redis.exceptions import LockError, RedisError

from liqlab import clock, schema
from liqlab.cleanup import Action, Cleaner
from liqlab.codecs import CodecError
from liqlab.server import checkpoint

JOBS: Final = ("trim", "check", "compact", "daily")  # methods of Cleaner; `cleanup.NAME_s` is how often each runs
_RENEWALS: Final = 3  # within the life of the lock
_log: Final = logging.getLogger(__name__)


class EventClock:
    """Runs what is due by a feed's own time; what fell due several times runs once."""

    def __init__(self, cleaner: Cleaner) -> None:
        self._cleaner = cleaner
        self._due_ms: dict[str, int] = {}

    async def run(self, now_ms: int) -> list[Action]:
        """Run the jobs that are due at an event time, ms; return what they did."""
        done: list[Action] = []
        for job in JOBS:
            every_ms = _every_ms(self._cleaner, job)
            if now_ms >= self._due_ms.setdefault(job, now_ms if job == "trim" else now_ms + every_ms):
                done += await getattr(self._cleaner, job)(now_ms)
                self._due_ms[job] = now_ms + every_ms
        return done


def _every_ms(cleaner: Cleaner, job: str) -> int:
    return int(1000 * getattr(cleaner.settings.cleanup, f"{job}_s"))


async def run(redis: Redis, cleaner: Cleaner, *, on_wait: Callable[[str], None] | None = None) -> None:
    """Run the schedule until cancelled; wait first while another process does.

    Parameters
    ----------
    redis : redis.asyncio.Redis
    cleaner : Cleaner
    on_wait : callable, optional
        Is told, once, that this process waits for another.
    """
    life_s = cleaner.settings.retention.lock_s
    lock = redis.lock(schema.BY_NAME["lock"].key(), timeout=life_s)
    while True:
        if not await lock.acquire(blocking=False):
            words = f"another process runs the schedule; this one waits and takes over within {life_s} s of its end"
            _log.info(words)
            if on_wait is not None:
                on_wait(words)
            await _wait_for(lock, life_s / _RENEWALS)
        try:
            await _hold(redis, lock, cleaner, life_s / _RENEWALS)
        except LockError:  # the server forgot it, or stood still for longer than its life
            _log.warning("the lock of the schedule was lost; this process asks for it again")
        finally:
            with suppress(LockError, RedisError):
                await asyncio.shield(lock.release())


async def _wait_for(lock: Lock, every_s: float) -> None:
    while not await lock.acquire(blocking=False):
        checkpoint()
        await asyncio.sleep(every_s)


async def _hold(redis: Redis, lock: Lock, cleaner: Cleaner, every_s: float) -> None:
    """Run the jobs as long as the lock can be renewed.

    When each ran last stands in Redis: a process that is restarted every night makes its daily backup all the same.
    """
    one_at_a_time = asyncio.Lock()
    scheduler = AsyncIOScheduler(timezone="UTC")
    marks = schema.BY_NAME["limits"].key(shard=schema.shards_of(cleaner.settings)[0])
    ran = await redis.hgetall(marks)

    def guarded(job: str) -> Callable[[], Awaitable[None]]:
        async def work() -> None:
            async with one_at_a_time:
                try:
                    await getattr(cleaner, job)()
                    await redis.hset(marks, f"{job}_ms", str(clock.now_ms()))
                # The server is away, or refuses, or a stream holds what nobody reads: the next run tries again.
                except (CodecError, RedisError) as error:
                    _log.warning("%s: %s", job, error)

        return work

    for job in JOBS:
        every_ms = _every_ms(cleaner, job)
        due_ms = max(int(ran.get(f"{job}_ms".encode(), 0)) + every_ms, clock.now_ms())
        scheduler.add_job(
            guarded(job),
            "interval",
            seconds=every_ms / 1000,
            next_run_time=datetime.fromtimestamp(due_ms / 1000, UTC),
            misfire_grace_time=None,  # late is better than not at all
            coalesce=True,
            id=job,
        )
    scheduler.start()
    try:
        while True:
            await lock.reacquire()
            checkpoint()
            await asyncio.sleep(every_s)
    finally:
        scheduler.shutdown(wait=False)
