import asyncio
import os
import signal
from collections.abc import Callable

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from liqlab import clock, settings
from liqlab.breaker import KEPT, MAX_REST, Breaker, State, Transition
from liqlab.server import Server, connect
from liqlab.settings import Thresholds

CLOSED, HALF_OPEN, OPEN = State.CLOSED, State.HALF_OPEN, State.OPEN
LINES = Thresholds()
SMALL = settings.load(server={"maxmemory": "6mb", "maxmemory_policy": "noeviction"})


class Time:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(clock, "elapsed_s", time)
    return time


async def ratio(redis: Redis) -> float:
    info = await redis.info("memory")
    return float(info["used_memory"] / info["maxmemory"])


async def bring_to(redis: Redis, target: float) -> None:
    """Add or remove values of 8 KB (0.13 % of 6 MB) until the used ratio has just crossed `target`."""
    count = await redis.dbsize()
    if await ratio(redis) < target:
        while await ratio(redis) < target:
            await redis.set(f"temp:{count}", bytes(8_000))
            count += 1
    else:
        while await ratio(redis) > target:
            count -= 1
            await redis.delete(f"temp:{count}")


async def test_memory_moves_it_and_each_state_is_left_below_its_entry(fresh_server: Callable[..., Server]) -> None:
    changes: list[Transition] = []
    breaker = Breaker(thresholds=LINES, on_change=changes.append)
    seen = []
    async with fresh_server(settings=SMALL).connect() as redis:
        for target in (0.80, 0.89, 0.91, 0.87, 0.91, 0.955, 0.92, 0.905, 0.89, 0.86, 0.84, 0.96, 0.70):
            await bring_to(redis, target)
            seen.append((target, await breaker.check(redis)))
            assert breaker.state is seen[-1][1]
            assert breaker.used_ratio == pytest.approx(target, abs=0.01)
    assert seen == [
        (0.80, CLOSED),
        (0.89, CLOSED),
        (0.91, HALF_OPEN),
        (0.87, HALF_OPEN),  # not below 85 %
        (0.91, HALF_OPEN),
        (0.955, OPEN),
        (0.92, OPEN),
        (0.905, OPEN),  # not below 90 %
        (0.89, HALF_OPEN),
        (0.86, HALF_OPEN),
        (0.84, CLOSED),
        (0.96, OPEN),
        (0.70, CLOSED),
    ]
    assert [(change.old, change.new) for change in changes] == [
        (CLOSED, HALF_OPEN),
        (HALF_OPEN, OPEN),
        (OPEN, HALF_OPEN),
        (HALF_OPEN, CLOSED),
        (CLOSED, OPEN),
        (OPEN, CLOSED),
    ]
    assert list(breaker.transitions) == changes
    assert changes[1].reason.startswith("memory at 95.")
    assert abs(changes[-1].at_ms - clock.now_ms()) < 60_000
    assert {name: n for name, n in breaker.counters.items() if "->" in name} == {
        "closed->half-open": 1,
        "half-open->open": 1,
        "open->half-open": 1,
        "half-open->closed": 1,
        "closed->open": 1,
        "open->closed": 1,
    }
    assert breaker.counters["checks"] == 13


async def test_what_goes_through(fresh_server: Callable[..., Server]) -> None:
    breaker = Breaker(thresholds=LINES)
    allowed = []
    async with fresh_server(settings=SMALL).connect() as redis:
        for target in (0.5, 0.92, 0.96):
            await bring_to(redis, target)
            await breaker.check(redis)
            allowed.append((breaker.allows(critical=False), breaker.allows(critical=True)))
    assert allowed == [(True, True), (False, True), (False, False)]
    assert (breaker.counters["refused half-open"], breaker.counters["refused open"]) == (1, 2)


async def test_without_a_limit_memory_says_nothing(fresh_server: Callable[..., Server]) -> None:
    breaker = Breaker(thresholds=LINES)
    async with fresh_server(maxmemory=0).connect() as redis:
        await redis.set("temp:big", bytes(20_000_000))
        assert await breaker.check(redis) is CLOSED
    assert breaker.used_ratio is None
    assert breaker.counters == {"checks": 1}


async def test_a_check_is_one_command_and_due_once_an_interval(redis: Redis, time: Time) -> None:
    breaker = Breaker(thresholds=LINES, check_s=2.0)
    assert breaker.due()
    await redis.config_resetstat()
    await breaker.check(redis)
    stats = await redis.info("commandstats")
    assert {name: stats[name]["calls"] for name in stats if "config" not in name} == {"cmdstat_info": 1}
    time.now_s += 1.9
    assert not breaker.due()
    time.now_s += 0.2
    assert breaker.due()
    breaker.failed(ConnectionResetError())
    await breaker.check(redis)
    assert not breaker.due()
    time.now_s += 2.1
    assert breaker.due()


async def test_a_lost_server_opens_it_and_the_first_answer_closes_it(
    fresh_server: Callable[..., Server], default_server: Server
) -> None:
    server = fresh_server()
    breaker = Breaker(thresholds=LINES)
    async with server.connect() as redis:
        assert await breaker.check(redis) is CLOSED
        server.kill()
        assert await breaker.check(redis) is OPEN
        assert await breaker.check(redis) is OPEN
        with pytest.raises(RedisConnectionError) as lost:
            await redis.ping()
        breaker.failed(lost.value)
    (change,) = breaker.transitions
    assert change.reason.startswith("connection lost: ")
    assert str(server.folder) not in change.reason
    assert "/" not in change.reason
    assert breaker.counters["connection"] == 3
    async with default_server.connect() as redis:  # it is back, and empty
        assert await breaker.check(redis) is CLOSED


async def test_after_a_lost_connection_memory_decides(fresh_server: Callable[..., Server]) -> None:
    breaker = Breaker(thresholds=LINES)
    async with fresh_server(settings=SMALL).connect() as redis:
        for target, after in ((0.92, HALF_OPEN), (0.87, HALF_OPEN), (0.96, OPEN), (0.92, OPEN), (0.5, CLOSED)):
            await bring_to(redis, target)
            breaker.failed(ConnectionResetError())
            assert breaker.state is OPEN
            assert await breaker.check(redis) is after


@pytest.mark.parametrize("options", [{}, {"socket_timeout": 0.1}])
async def test_a_frozen_server_opens_it(fresh_server: Callable[..., Server], options: dict[str, float]) -> None:
    server = fresh_server()
    breaker = Breaker(thresholds=LINES, check_s=0.3)
    async with connect(server.url, **options) as redis:
        assert await breaker.check(redis) is CLOSED
        os.kill(server.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(5):  # the client's own patience is 30 s
                assert await breaker.check(redis) is OPEN
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert await breaker.check(redis) is CLOSED
    assert "Timeout" in breaker.transitions[0].reason


async def test_an_out_of_memory_reply_opens_it_until_there_is_room(
    fresh_server: Callable[..., Server], time: Time
) -> None:
    breaker = Breaker(thresholds=LINES)
    async with fresh_server(settings=SMALL).connect() as redis:
        await bring_to(redis, 0.93)
        assert await breaker.check(redis) is HALF_OPEN
        # The argument itself is what does not fit: INFO sees no more than before.
        async with redis.pipeline(transaction=False) as pipe:
            for i in range(60):
                pipe.set(f"temp:more:{i}", bytes(20_000))
            replies = await pipe.execute(raise_on_error=False)
        error = next(reply for reply in replies if isinstance(reply, OutOfMemoryError))
        breaker.failed(error)
        assert breaker.state is OPEN
        assert breaker.transitions[-1].reason == "server out of memory"
        await redis.delete(*[f"temp:more:{i}" for i in range(60)])
        assert 0.90 < await ratio(redis) < 0.95
        time.now_s += 60
        assert await breaker.check(redis) is OPEN  # below its entry, not below its exit
        await bring_to(redis, 0.89)
        assert await breaker.check(redis) is HALF_OPEN
        await bring_to(redis, 0.84)
        assert await breaker.check(redis) is CLOSED
    assert breaker.counters["memory"] == 1


async def test_refusals_that_info_does_not_show_are_tried_ever_more_rarely(redis: Redis, time: Time) -> None:
    breaker = Breaker(thresholds=LINES, check_s=1.0)

    async def rest(error: Exception) -> int:
        """Refuse at once whatever is tried; return how many checks later the next try is."""
        breaker.failed(error)
        breaker.failed(error)  # another batch that was under way
        for checks in range(1, 50):
            time.now_s += 1.0
            if await breaker.check(redis) is CLOSED:
                return checks
        raise AssertionError

    oom = OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
    assert [await rest(oom) for _ in range(5)] == [1, 2, 4, MAX_REST, MAX_REST]
    assert breaker.counters["closed->open"] == 5
    breaker.succeeded()
    assert [await rest(oom) for _ in range(2)] == [1, 2]
    breaker.failed(oom)
    assert await breaker.check(redis) is OPEN
    breaker.succeeded()  # a batch that was under way
    assert breaker.state is OPEN


async def test_a_server_that_takes_no_writes_opens_it(fresh_server: Callable[..., Server]) -> None:
    async with fresh_server().connect() as redis, asyncio.TaskGroup() as tasks:
        # Errors that say nothing about the server.
        await redis.set("temp:text", "x")
        breaker = Breaker(thresholds=LINES)
        with pytest.raises(ResponseError) as wrong:
            await redis.hset("temp:text", "field", "x")
        breaker.failed(wrong.value)
        breaker.failed(ValueError("BUSY"))
        assert (breaker.state, breaker.counters) == (CLOSED, {})

        await redis.replicaof("127.0.0.1", 1)
        with pytest.raises(ReadOnlyError) as replica:
            await redis.set("temp:text", "y")
        breaker.failed(replica.value)
        assert (breaker.state, breaker.transitions[-1].reason) == (OPEN, "server refuses: ReadOnlyError")
        await redis.replicaof("NO", "ONE")

        breaker = Breaker(thresholds=LINES)
        await redis.config_set("busy-reply-threshold", 1)
        await asyncio.gather(redis.ping(), redis.ping())  # while it is busy no new connection comes about

        async def hang() -> None:
            with pytest.raises(ResponseError, match="killed"):
                await redis.eval("while true do end", 0)

        tasks.create_task(hang())
        await asyncio.sleep(0.2)
        assert await breaker.check(redis) is OPEN
        assert breaker.counters["refusal"] == 1
        await redis.script_kill()


async def test_without_the_right_to_ask_only_replies_tell(fresh_server: Callable[..., Server], time: Time) -> None:
    server = fresh_server()
    breaker = Breaker(thresholds=LINES)
    async with server.connect() as admin:
        await admin.acl_setuser("writer", enabled=True, nopass=True, commands=["+set", "+@connection"], keys=["*"])
        async with connect(f"unix://writer:x@{server.socket}") as redis:
            assert await breaker.check(redis) is CLOSED
            assert breaker.counters["blind checks"] == 1
            breaker.failed(OutOfMemoryError("x"))
            assert await breaker.check(redis) is OPEN
            time.now_s += 1
            assert await breaker.check(redis) is CLOSED


async def test_a_callback_that_raises_is_logged_and_counted(
    default_redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(change: Transition) -> None:
        raise ZeroDivisionError

    breaker = Breaker(thresholds=LINES, on_change=explode)
    for _ in range(KEPT):
        breaker.failed(ConnectionResetError())
        assert await breaker.check(default_redis) is CLOSED
    assert breaker.counters["callback errors"] == 2 * KEPT
    assert "on_change failed at closed -> open" in caplog.text
    assert len(breaker.transitions) == KEPT
