"""The running server: its configuration, its thresholds, what it keeps for how long, and what it takes at its limit."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from typing import Any, Final

from redis.exceptions import OutOfMemoryError, ResponseError

from liqlab import budget, clock, schema
from liqlab.breaker import Breaker, State
from liqlab.claims.verdicts import Bench, Figure
from liqlab.cleanup import Cleaner, families
from liqlab.cleanup.pressure import Pressure, Tier
from liqlab.cleanup.schedule import JOBS
from liqlab.detector import Detector
from liqlab.monitor import Alarms, Level
from liqlab.monitor import measure as look
from liqlab.replay import ingest
from liqlab.server import serve
from liqlab.settings import changed

_MIB: Final = 1 << 20
_HALVED: Final = 0.87  # of maxmemory: between halving and the emergency
_VALUE: Final = 10_000  # bytes of the values that fill a server
_PAGE: Final = 200
_MEMBERS: Final = 600
_STEPS: Final = 200  # of a threshold that is looked for between 0 and 1
_DIRECTIVES: Final = {  # the document's own, in its own spelling and order
    "maxmemory": "240mb", "maxmemory-policy": "volatile-ttl", "maxmemory-samples": "10", "tcp-backlog": "511",
    "tcp-keepalive": "300", "timeout": "0", "databases": "2", "save": "", "appendonly": "no",
    "hash-max-ziplist-entries": "512", "hash-max-ziplist-value": "64", "list-max-ziplist-size": "-2",
    "set-max-intset-entries": "512", "zset-max-ziplist-entries": "128", "zset-max-ziplist-value": "64",
    "lazyfree-lazy-eviction": "yes", "lazyfree-lazy-expire": "yes", "lazyfree-lazy-server-del": "yes",
    "replica-lazy-flush": "yes", "activerehashing": "yes", "hz": "100", "maxclients": "100",
}  # fmt: skip
_KEEPALIVE: Final = {1: "TCP_KEEPIDLE", 2: "TCP_KEEPINTVL", 3: "TCP_KEEPCNT"}  # the document's numbers


async def alone(bench: Bench) -> Mapping[str, Figure]:
    """Look at a server that has just started, set the document's directives, and fill it to its limit."""
    with serve(settings=bench.settings) as server:
        async with server.connect() as redis:
            await asyncio.sleep(0.3)
            fresh = await redis.info("memory")
            taken = 0
            for name, value in _DIRECTIVES.items():
                try:
                    await redis.config_set(name, value)
                    taken += 1
                except ResponseError:
                    continue
            limit = int((await redis.info("memory"))["maxmemory"])
            for start in range(0, 2 * limit // _VALUE, _PAGE):
                pipe = redis.pipeline(transaction=False)
                for n in range(start, start + _PAGE):
                    pipe.set(f"temp:{n}", bytes(_VALUE))
                if any(isinstance(reply, OutOfMemoryError) for reply in await pipe.execute(raise_on_error=False)):
                    break
            await asyncio.sleep(0.3)
            rss = int((await redis.info("memory"))["used_memory_rss"])
            accepted = _clients(str(server.socket))
    return {
        "fragmentation": float(fresh["mem_fragmentation_ratio"]),
        "directives": float(taken),
        "limit_mb": limit / _MIB,
        "rss_mb": rss / _MIB,
        "beyond_mb": (rss - limit) / _MIB,
        "clients": float(accepted),
    }


def _clients(path: str) -> int:
    """Return how many clients there are when the server refuses the next one; one is connected already."""
    with ExitStack() as stack:
        for count in range(1, 1_000):
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.settimeout(5)
            one.connect(path)
            try:
                one.sendall(b"PING\r\n")
                accepted = one.recv(16).startswith(b"+PONG")
            except OSError:
                accepted = False
            if not accepted:
                return count
    return 1_000


async def configured(bench: Bench) -> Mapping[str, Figure]:
    """Ask the server what it runs with, and find the size at which each compact encoding ends."""
    info = await bench.redis.info()
    compact = {"hash": ("HSET", "listpack"), "zset": ("ZADD", "listpack"), "set": ("SADD", "intset")}
    found: dict[str, Figure] = {"hz": float(info["hz"]), "maxmemory_mb": int(info["maxmemory"]) / _MIB}
    for name, (command, encoding) in compact.items():
        pipe = bench.redis.pipeline(transaction=False)
        for n in range(_MEMBERS):
            pipe.execute_command(command, f"temp:{name}", *([n] if command == "SADD" else [n, n]))
            pipe.object("ENCODING", f"temp:{name}")
        found[name] = float((await pipe.execute())[1::2].count(encoding.encode()))
    for name, command in (("hash_value", "HSET"), ("zset_value", "ZADD")):
        pipe = bench.redis.pipeline(transaction=False)
        for length in range(1, 100):
            key = f"temp:{name}:{length}"
            pipe.execute_command(command, key, 1, "x" * length)
            pipe.object("ENCODING", key)
        found[name] = float((await pipe.execute())[1::2].count(b"listpack"))
    right = [getattr(socket, name, None) == option for option, name in _KEEPALIVE.items()]
    return found | {"keepalive": float(sum(right))}


async def thresholds(bench: Bench) -> Mapping[str, Figure]:
    """Lower maxmemory step by step on a server in use; note where cleanup, breaker and alarms begin to act."""
    redis, settings = bench.redis, bench.settings
    await redis.setrange("temp:ballast", 16 * _MIB, "x")
    breaker, found = Breaker(thresholds=settings.thresholds), dict[str, float]()
    pressure, alarms = Pressure(settings), Alarms(settings)
    limit = int((await redis.info("memory"))["maxmemory"])
    try:
        async for ratio in _tightened(bench):
            tier = pressure.update(ratio, 0)
            state = await breaker.check(redis)
            reached = {tier.name.lower(): tier is not Tier.NORMAL, str(state): state is not State.CLOSED}
            for alert in alarms.check(await look(redis, settings=settings)):
                reached[f"memory {alert.level.name.lower()}"] = alert.name == "memory" and alert.level > Level.OK
            found |= {name: 100 * ratio for name, yes in reached.items() if yes and name not in found}
    finally:
        await redis.config_set("maxmemory", limit)
        await redis.delete("temp:ballast")
    return found


async def _tightened(bench: Bench) -> AsyncIterator[float]:
    for step in range(round(0.7 * _STEPS), _STEPS - 2):
        used = int((await bench.redis.info("memory"))["used_memory"])
        await bench.redis.config_set("maxmemory", round(used * _STEPS / step))
        memory = await bench.redis.info("memory")
        yield int(memory["used_memory"]) / int(memory["maxmemory"])


async def lived(bench: Bench) -> Mapping[str, Figure]:
    """Play the feed with liqlab's defaults and a detector; look at the lives of keys, and at the memory they take."""
    done = await ingest(
        bench.events, bench.redis, settings=bench.settings, detector=Detector(bench.redis, settings=bench.settings)
    )
    found: dict[str, Figure] = {"peak_mb": float(done.timeline["used_memory"].max()) / _MIB}
    for name in ("vwap", "candle", "candle_5m", "candle_1h", "cooldown", "signal"):
        family = schema.BY_NAME[name]
        pattern = f"{family.pattern.split(':')[0]}:*"
        keys = [key async for key in bench.redis.scan_iter(match=pattern, count=1_000)]
        pipe = bench.redis.pipeline(transaction=False)
        for key in keys:
            pipe.pttl(key)
        lives = [int(life) for life in await pipe.execute()]
        found[name] = max(lives) / 1000 if lives else "the feed has left no such key"
    hot: Any = await bench.redis.xrange(schema.BY_NAME["events"].key(), count=1)
    last_ms = int(bench.events["ts_ms"].iloc[-1])
    found["hot"] = (last_ms - int(hot[0][0].partition(b"-")[0])) / clock.MINUTE_MS
    measured = await budget.measure(bench.redis, settings=bench.settings, limit=1_000)
    rooms = {name: float(size) / _MIB for name, size in measured.table["budget_bytes"].items()}
    found |= {f"room {name}": size for name, size in rooms.items()}
    return found | {"rooms": sum(size for name, size in rooms.items() if name != budget.FOREIGN)}


async def pressed(bench: Bench) -> Mapping[str, Figure]:
    """Press a server that has two hours of the feed: liqlab's halving tier, then the document's emergency."""
    redis, settings = bench.redis, bench.settings
    last_ms = int(bench.events["ts_ms"].iloc[-1])
    part = bench.events[bench.events["ts_ms"] > last_ms - 2 * clock.HOUR_MS]
    await ingest(part, redis, settings=settings)
    limit = int((await redis.info("memory"))["maxmemory"])
    try:
        spans = [await _span(bench, last_ms)]
        await redis.setrange("temp:other", 32 * _MIB, "x")  # with room for all shares, lives alone are halved
        used = int((await redis.info("memory"))["used_memory"])
        await redis.config_set("maxmemory", round(used / _HALVED))
        await Cleaner(redis, settings=settings).trim(last_ms)
        spans.append(await _span(bench, last_ms))
        before = (await families.streams(redis, None)).bytes
        await families.temporary(redis, dry_run=False)  # all that the document's emergency does
        left = (await families.streams(redis, None)).bytes
    finally:
        await redis.config_set("maxmemory", limit)
    # The parts of the key table that streams pay for wander by some bytes.
    return {"ttl": 100 * (1 - spans[1] / spans[0]), "oldest": abs(round(100 * (1 - left / before), 1))}


async def _span(bench: Bench, last_ms: int) -> float:
    """Return the age of the oldest candle of a minute, ms."""
    keys = [key async for key in bench.redis.scan_iter(match="candle:*", count=1_000)]
    return float(last_ms - min(int(key.rpartition(b":")[2]) for key in keys) * clock.MINUTE_MS)


async def scheduled(bench: Bench) -> Mapping[str, Figure]:
    """Read how often liqlab's schedule runs its jobs, in minutes, and its monitor looks, in seconds."""
    times: dict[str, Any] = {job: getattr(bench.settings.cleanup, f"{job}_s") / 60 for job in JOBS}
    kept = changed(bench.settings, {}).cleanup.folder_days
    return {**times, "look_s": float(bench.settings.monitor.interval_s), "daily_days": float(kept)}


async def beyond(bench: Bench) -> Mapping[str, Figure]:
    """Say why some figures are not measured."""
    return {
        "metadata": "the document does not say what the metadata is; the events of a feed have none",
        "aggregates": "neither the document's code nor liqlab keeps anything for six hours",
        "days": "daily summaries leave Redis for files; seven days of them do not pass in one run",
        "image": "no container runs here, and the image's allocator decides its figures",
    }
