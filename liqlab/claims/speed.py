"""How fast events get in, and what the document's optimisations buy."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from liqlab import clock, original
from liqlab.claims.encoded import payloads
from liqlab.claims.stored import send
from liqlab.claims.verdicts import Bench, Figure, Found
from liqlab.events import Columns, Event
from liqlab.settings import changed
from liqlab.writer import Writer

_ROUNDS: Final = 3
_SINGLE: Final = 400  # events of a round, each four round trips
_PIPELINED: Final = 3_000
_CONNECTED: Final = 100
_SENT: Final = 1_000
_EXPIRED: Final = 60_000  # members of the sorted sets that expire
_CLAIMED: Final = {"single": 1_000, "pipeline": 20_000}  # events a second at which the document gives the server's CPU


async def _cpu_s(bench: Bench, name: str = "") -> float:
    spent = await bench.redis.info("cpu")
    return float(spent[f"used_cpu_user{name}"]) + float(spent[f"used_cpu_sys{name}"])


async def writes(bench: Bench) -> Mapping[str, Figure]:
    """Write with the document's four commands an event, one by one and in pipelines of 50; medians of three rounds."""
    found: dict[str, Figure] = {}
    rate: dict[str, float] = {}
    for strategy, count in (("single", _SINGLE), ("pipeline", _PIPELINED)):
        settings = changed(bench.settings, {"writer.strategy": strategy})
        columns = Columns.of(bench.events.head(count))
        took, cpu = [], []
        for _ in range(_ROUNDS):
            await bench.redis.flushall()
            began_s, spent_s = clock.elapsed_s(), await _cpu_s(bench)
            await original.write(bench.redis, columns, settings, {})
            took.append(clock.elapsed_s() - began_s)
            cpu.append(await _cpu_s(bench) - spent_s)
        each_s = float(np.median(took)) / len(columns)
        rate[strategy] = 1 / each_s
        found[strategy] = rate[strategy]
        found[f"{strategy}_ms"] = 1e3 * each_s * (original.PIPELINE if strategy == "pipeline" else 1)
        found[f"{strategy}_cpu"] = 100 * float(np.median(cpu)) / len(columns) * _CLAIMED[strategy]
    found["times"] = rate["pipeline"] / rate["single"]
    found["per_minute"] = 60 * rate["single"]
    return found


async def pooled(bench: Bench) -> Mapping[str, Figure]:
    """Time a command on a connection of its own and on one that is kept."""
    began = clock.elapsed_s()
    for _ in range(_CONNECTED):
        async with bench.server.connect() as redis:
            await redis.ping()
    alone = clock.elapsed_s() - began
    began = clock.elapsed_s()
    for _ in range(_CONNECTED):
        await bench.redis.ping()
    return {"less": 100 * (1 - (clock.elapsed_s() - began) / alone)}


async def bandwidth(bench: Bench) -> Mapping[str, Figure]:
    """Send the same events as JSON and as 19 bytes; count what the server has received."""
    events, received = bench.events.head(_SENT), []
    for codec in ("json", "struct19"):
        before = int((await bench.redis.info("stats"))["total_net_input_bytes"])
        rows = zip(events["symbol"], payloads(events, codec), strict=True)
        await send(bench, (("XADD", f"liq:{symbol}", "*", "d", value) for symbol, value in rows))
        received.append(int((await bench.redis.info("stats"))["total_net_input_bytes"]) - before)
    return {"less": 100 * (1 - received[1] / received[0])}


async def lazily(bench: Bench) -> Mapping[str, Figure]:
    """Let sorted sets expire with lazy freeing off and on; compare what the server's main thread spends."""
    less = [await _freed(bench, members) for members in (100, 2_000)]
    return {"less": Found(less[0], less[1], "the keys are large (2,000 members, not the document's 100)")}


async def _freed(bench: Bench, members: int) -> float:
    spent: list[float] = []
    values: list[Any] = [word for n in range(members) for word in (n, f"1704067200:{n}")]
    for lazy in ("no", "yes"):
        rounds = []
        for _ in range(_ROUNDS):
            await bench.redis.flushall()
            await bench.redis.config_set("lazyfree-lazy-expire", lazy)
            keys = [f"temp:{n}" for n in range(_EXPIRED // members)]
            await send(bench, (("ZADD", key, *values) for key in keys))
            before = await _cpu_s(bench, "_main_thread")
            await send(bench, (("PEXPIRE", key, 1) for key in keys))
            await asyncio.sleep(0.002)
            while await bench.redis.dbsize():
                await asyncio.sleep(0.02)
            rounds.append(await _cpu_s(bench, "_main_thread") - before)
        spent.append(float(np.median(rounds)))
    await bench.redis.config_set("lazyfree-lazy-expire", "yes")
    return 100 * (1 - spent[1] / spent[0])


async def acknowledged(bench: Bench) -> Mapping[str, Figure]:
    """Write single events through liqlab's writer and wait for each; the median, ms."""
    took = []
    async with Writer(bench.redis, settings=bench.settings) as writer:
        for event in Event.rows(bench.events.head(5)):
            began = clock.elapsed_s()
            await (await writer.write(event))
            took.append(clock.elapsed_s() - began)
    return {"ms": 1e3 * float(np.median(took))}
