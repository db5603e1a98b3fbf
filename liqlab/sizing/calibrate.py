"""Calibration: which of the known layouts a server has, and by how much its structures differ from the formulas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from redis.asyncio import Redis

from liqlab import budget, clock
from liqlab.candles import FORM
from liqlab.server import capabilities
from liqlab.sizing.model import GARBAGE, SOURCES, Calibration
from liqlab.sizing.structures import PREALLOCATED, Layout, listpack_int, listpack_text

_KEYS: Final = 400  # of a probe
_TTL_S: Final = 300  # should this process end before it has removed them
_SETTLE_S: Final = 0.02
_SETTLED: Final = 50  # looks at used_memory, at most
_LARGE: Final = 256 << 10
_LAYOUTS: Final = ("separate", "kvobj", "valkey", "valkey-embedded")
_EMPTY_VM: Final = 66_560  # the interpreters before the first script
_BUFFERS: Final = 15_000  # left by batches that wait one behind the other: 6 to 32 KB, measured on both servers
_ONE: Final = np.ones(1, np.int64)
_TEXT, _ID_MS = "123456.78901234567", 1_790_812_800_000
_WIDE: Final = 300  # bytes: a value for which a hash becomes a table

Command = tuple[Any, ...]


@dataclass(frozen=True)
class _Probe:
    """A structure: what makes it in the place of a key, what it takes by formula, and which families are made of it."""

    commands: Callable[[str], list[Command]]
    size: Callable[[Layout, int], Any]
    families: tuple[str, ...]


def _small(layout: Layout, length: int) -> Any:
    entries = 2 * (listpack_text(1) + listpack_text(len(_TEXT))) + listpack_text(1) + listpack_int(_ID_MS)
    return layout.key(length) + layout.listpack_hash(entries)


_PROBES: Final = {
    "string": _Probe(
        lambda key: [("SET", key, "x" * FORM.itemsize, "EX", _TTL_S)],
        lambda layout, length: layout.string(length, FORM.itemsize, fresh=False),
        (),
    ),
    "small hash": _Probe(lambda key: [("HSET", key, "a", _TEXT, "b", _TEXT, "c", _ID_MS)], _small, ("vwap", "writer")),
    "large hash": _Probe(
        lambda key: [("HSET", key, *(word for name in range(480_000, 480_004) for word in (name, "x" * _WIDE)))],
        lambda layout, length: layout.key(length) + layout.hash_table(4) + 4 * layout.field(6, _WIDE),
        ("sketch",),
    ),
    "stream": _Probe(
        lambda key: [("XADD", key, f"{_ID_MS}-0", "c", 1)],
        lambda layout, length: layout.key(length) + layout.stream + layout.alloc(PREALLOCATED) + layout.alloc(16),
        ("events",),
    ),
    "emptied stream": _Probe(
        lambda key: [("XADD", key, f"{_ID_MS}-0", "c", 1), ("XTRIM", key, "MAXLEN", 0)],
        lambda layout, length: layout.key(length) + layout.stream,
        (),
    ),
}


async def calibrate(redis: Redis) -> Calibration:
    """Measure a server: what a few hundred keys of each structure add to `used_memory`, and what an empty one has.

    It takes about a second. The keys are ``temp:*`` and removed again; nothing else should write meanwhile.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes.

    Returns
    -------
    Calibration
    """
    server, token = await capabilities(redis), clock.token()
    quantum = (server.malloc_quantum or 8) if server.allocator.startswith("jemalloc") else 0
    node = int((await redis.config_get("stream-node-max-bytes"))["stream-node-max-bytes"] or PREALLOCATED)
    keys = [f"temp:{token}:{number:05d}" for number in range(_KEYS)]
    # A connection that has sent large pipelines counts buffers as its own that the server shares.
    await redis.connection_pool.disconnect(inuse_connections=False)
    base = await _base(redis)
    first = await _first_key(redis, keys[0])
    measured: dict[str, float] = {}
    try:
        # Their tables, and the client's buffers, are there before a structure is measured: only what the keys hold
        # changes then.
        small = 0
        for name in ("large hash", "", *_PROBES):
            probe = _PROBES.get(name, _Probe(lambda key: [("SET", key, "x", "EX", _TTL_S)], lambda *_: 0, ()))
            made = [[("DEL", key), *probe.commands(key), ("EXPIRE", key, _TTL_S)] for key in keys]
            await _run(redis, [command for commands in made for command in commands])
            used = await settled(redis)
            if name:
                measured[name] = (used - small) / _KEYS
            else:
                small = used
    finally:
        await redis.unlink(*keys)
    fits = {name: _fit(Layout(name, quantum), measured, len(keys[0]), node) for name in _LAYOUTS}
    best = min(fits, key=lambda name: max(abs(factor - 1) for factor in fits[name].values()))
    counts, layout = await _counts_scripts(redis), Layout(best, quantum)
    least = float(layout.string(len(keys[0]), 1)) + 2 * float(layout.table(1, layout.slots(_ONE, _ONE)[0]))
    return Calibration(
        layout=layout,
        base_bytes=base[0] - counts * max(base[1] - _EMPTY_VM, 0),
        tables_bytes=max(round(first - least), 0) if first else 0,
        buffer_bytes=_BUFFERS,
        scripts_bytes=SOURCES + counts * GARBAGE[0],
        scripts_error=counts * GARBAGE[1],
        factors={family: fits[best][name] for name, probe in _PROBES.items() for family in probe.families},
        error=max(2 * float(np.sqrt(np.mean([(factor - 1) ** 2 for factor in fits[best].values()]))), 0.03),
        server=f"{server.kind} {server.version}, {server.allocator}",
    )


def _fit(layout: Layout, measured: dict[str, float], length: int, node: int) -> dict[str, float]:
    """Return of each probe by what factor more than by formula it takes."""
    small = float(layout.string(length, 1))
    less = float(layout.alloc(PREALLOCATED)) - float(layout.alloc(min(node, PREALLOCATED)))
    return {
        name: (measured[name] + small) / (float(probe.size(layout, length)) - (less if name == "stream" else 0))
        for name, probe in _PROBES.items()
    }


async def _run(redis: Redis, commands: list[Command]) -> None:
    pipe = redis.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command(*command)
    await pipe.execute()


async def settled(redis: Redis) -> int:
    """Return `used_memory` without clients, once it stands still: some values are freed behind one's back."""
    last = -1
    for _ in range(_SETTLED):
        await asyncio.sleep(_SETTLE_S)
        memory = await redis.info("memory")
        used = int(memory["used_memory"]) - int(memory["mem_clients_normal"])
        if used == last:
            break
        last = used
    return last


async def _first_key(redis: Redis, key: str) -> int:
    """Return what a first key adds to `used_memory`, with the tables that come with it; 0 where there are keys."""
    if await redis.dbsize():
        return 0
    before = await settled(redis)
    await redis.set(key, "x", ex=_TTL_S)
    added = await settled(redis) - before
    await redis.unlink(key)
    return added


async def _counts_scripts(redis: Redis) -> bool:
    """Return whether the heap of scripts is part of `used_memory`, by letting one grow it."""
    before = await settled(redis)
    await redis.eval(f"return #string.rep('x', {_LARGE})", 0)
    grown = await settled(redis) - before
    await redis.eval("collectgarbage() return 0", 0)
    return grown > _LARGE // 2


async def _base(redis: Redis) -> tuple[int, int]:
    """Return what the server takes without data and clients, and what of it the interpreters of scripts do."""
    used, memory = await settled(redis), await redis.info("memory")
    used -= int(memory.get("used_memory_scripts_eval", 0))
    if await redis.dbsize():
        used -= int((await budget.measure(redis)).families["bytes"].sum())
    return used, int(memory.get("used_memory_vm_total", 0))
