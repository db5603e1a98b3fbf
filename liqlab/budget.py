"""Where every byte of a Redis went, by key family, against the memory budget.

``MEMORY USAGE`` alone is wrong both ways: it leaves out the key tables (a cooldown of 48 bytes costs 83) and guesses
a stream's radix tree at 244 bytes a node (it is about 26). `_Corrections` holds what it misses, a type at a time,
from the sources named there; tests/test_budget.py holds every family to within 2 % of the `used_memory` it adds.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import pandas as pd
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from liqlab import clock, schema
from liqlab.cluster import as_cluster
from liqlab.server import Capabilities, capabilities, checkpoint
from liqlab.settings import Settings, load

Progress = Callable[[int, int], None]

FOREIGN: Final = "foreign"  # keys that are not in liqlab's table: another program's, on a shared server
UNATTRIBUTED: Final = "unattributed"
_PIPELINE: Final = 500
_SAMPLES: Final = 1_000  # elements (or stream nodes) that MEMORY USAGE looks at in one key: bounds its pause
_LENGTH: Final = {"stream": "XLEN", "hash": "HLEN", "zset": "ZCARD", "set": "SCARD", "list": "LLEN"}
_SHARED_INTEGERS: Final = 10_000
_DICTS: Final = (2_680, 280)  # structs of the tables of keys and of TTLs, Redis 8.2; what keys hold is counted there
_HASHTABLE: Final = 208  # Valkey's
_NUMBERS: Final = ("keys", "members", "bytes", "error_bytes")


@dataclass(frozen=True)
class Budget:
    """A measured budget. Rows of `table` add up to `used_memory`, exactly.

    Attributes
    ----------
    table : pandas.DataFrame
        Index: the six shares, with `unattributed` paid by the buffer, and `foreign` where there are such keys.
        Columns: keys, members (events, hash fields, ...), bytes, error_bytes (two standard errors; 0 where every key
        was measured), share (of maxmemory), budget_bytes, used_pct.
    families : pandas.DataFrame
        The same bytes by key family: share, keys, members, bytes, error_bytes, bytes_per_member.
    keys : pandas.DataFrame
        The largest keys that were measured: family, key, type, members, bytes.
    used_memory, maxmemory : int
        As the server reports them, bytes; `maxmemory` is the setting where the server has no limit.
    overhead : pandas.Series
        What is known of the unattributed bytes: start-up, clients, scripts, other.
    nodes : dict of str to Budget
        Of a cluster, whose budget is the sum of these, by ``host:port``; else empty.
    """

    table: pd.DataFrame
    families: pd.DataFrame
    keys: pd.DataFrame
    used_memory: int
    maxmemory: int
    overhead: pd.Series
    nodes: dict[str, Budget] = field(default_factory=dict)

    @property
    def over(self) -> list[str]:
        """The shares that use more than their budget; in sum, or as ``streams on host:port`` of one node's."""
        here = [str(name) for name in self.table.index[self.table["used_pct"] > 100]]
        return here + [f"{name} on {node}" for node, one in self.nodes.items() for name in one.over]

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON."""
        return {
            "used_memory": self.used_memory,
            "maxmemory": self.maxmemory,
            "over": self.over,
            "shares": records(self.table.reset_index()),
            "families": records(self.families.reset_index()),
            "overhead": self.overhead.to_dict(),
            "nodes": {name: one.as_dict() for name, one in self.nodes.items()},
        }

    def _repr_html_(self) -> str:
        return str(self.table.to_html(float_format="{:,.1f}".format))


def human(size: float) -> str:
    """Return bytes as a person would say them, in the powers of 1024 that redis.conf's ``mb`` means: ``5.13 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


@dataclass
class _Tally:
    """What the scan saw of one family: how many keys, and a fair sample of them."""

    limit: int
    rng: np.random.Generator
    seen: int = 0
    sample: list[bytes] = field(default_factory=list)
    names: set[bytes] = field(default_factory=set)

    def add(self, key: bytes) -> None:
        """Take a key in: all of them up to the limit, then by reservoir sampling (Vitter's algorithm R)."""
        if key in self.names:  # SCAN may return a key twice
            return
        self.seen += 1
        if len(self.sample) < self.limit:
            self.sample.append(key)
            self.names.add(key)
            return
        place = int(self.rng.integers(self.seen))
        if place < self.limit:
            self.names.discard(self.sample[place])
            self.names.add(key)
            self.sample[place] = key


async def measure(
    redis: Redis,
    *,
    settings: Settings | None = None,
    limit: int = 5_000,
    max_seconds: float = 60.0,
    progress: Progress | None = None,
) -> Budget:
    """Attribute a server's `used_memory` to key families. Reads only; may be cancelled at any moment.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes; of a cluster, every primary is measured against its own maxmemory.
    settings : Settings, optional
        Where the shares come from; read as `liqlab.settings.load` does when absent.
    limit : int
        The most keys of one family that are measured; a larger family is sampled, and `error_bytes` says how far off
        its figure may be.
    max_seconds : float
        When the scan of the key names stops; counts are then scaled to the server's own number of keys.
    progress : callable, optional
        Called with (keys done, keys in all).

    Returns
    -------
    Budget
    """
    settings = settings or load()
    if cluster := as_cluster(redis):
        of: dict[str, Any] = {"settings": settings, "limit": limit, "max_seconds": max_seconds, "progress": progress}
        return added({node.name: await measure(node.redis, **of) for node in await cluster.nodes()}, settings)
    stats, memory = await _snapshot(redis)
    server = await capabilities(redis)
    total = int(await redis.dbsize())
    tallies, complete = await _scan(redis, limit, max_seconds)
    scanned = sum(tally.seen for tally in tallies.values())
    scale = 1.0 if complete and scanned <= total * 1.001 else total / max(scanned, 1)

    rows: list[dict[str, Any]] = []
    fix = _Corrections(server, stats, total, int(memory["expires"]))
    done = 0
    for family, tally in tallies.items():
        async for row in _sizes(redis, tally.sample, fix):
            rows.append({"family": family, **row})
            done += 1
            if progress and done % _PIPELINE == 0:
                progress(done, max(done, scanned))
    if progress:
        progress(done, done)
    keys = pd.DataFrame(rows, columns=["family", "key", "type", "members", "bytes"]).astype(
        {"members": "int64", "bytes": "float64"}
    )
    counts = {family: round(tally.seen * scale) for family, tally in tallies.items()}
    return _summary(keys, counts, settings, memory, stats)


async def sizes(redis: Redis, keys: Iterable[str]) -> pd.DataFrame:
    """Return what single keys take, as `measure` counts it.

    Returns
    -------
    pandas.DataFrame
        Index: the keys that exist. Columns: type, members, bytes.
    """
    stats, memory = await _snapshot(redis)
    fix = _Corrections(await capabilities(redis), stats, int(await redis.dbsize()), int(memory["expires"]))
    rows = [row async for row in _sizes(redis, [key.encode() for key in keys], fix)]
    return pd.DataFrame(rows, columns=["key", "type", "members", "bytes"]).set_index("key")


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table, without its index, as JSON knows them: what is not known is None."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


async def _snapshot(redis: Redis) -> tuple[dict[str, Any], dict[str, Any]]:
    # First of all: the scan's own buffers must not be in the figure that it explains.
    info = await redis.info("memory")
    stats = await redis.memory_stats()
    keyspace = await redis.info("keyspace")
    number = redis.connection_pool.connection_kwargs.get("db", 0)
    expires = sum(int(db["expires"]) for name, db in keyspace.items() if name == f"db{number}")
    tables = {str(name): value for name, value in stats.items()}
    return tables.get(f"db.{number}", {}) | {"all": tables, "alone": len(keyspace) == 1}, {**info, "expires": expires}


async def _scan(redis: Redis, limit: int, max_seconds: float) -> tuple[dict[str, _Tally], bool]:
    rng = clock.generator(0)
    tallies = {name: _Tally(limit, rng) for name in (*schema.BY_NAME, FOREIGN)}
    deadline = clock.elapsed_s() + max_seconds
    cursor = 0
    while True:
        reply = await redis.execute_command("SCAN", cursor, "COUNT", 1_000)  # type: ignore[no-untyped-call]
        cursor, keys = reply
        checkpoint()
        for key in keys:
            family = schema.family_of(key.decode(errors="replace"))
            tallies[family.name if family else FOREIGN].add(key)
        if cursor == 0:
            return tallies, True
        if clock.elapsed_s() > deadline:
            return tallies, False


async def _sizes(redis: Redis, keys: Iterable[bytes], fix: _Corrections) -> AsyncIterator[dict[str, Any]]:
    names = list(keys)
    for start in range(0, len(names), _PIPELINE):
        part = names[start : start + _PIPELINE]
        pipe = redis.pipeline(transaction=False)
        for key in part:
            for command in (("TYPE", key), ("PTTL", key), ("OBJECT", "ENCODING", key), _usage(key)):
                pipe.execute_command(*command)
        first = await pipe.execute(raise_on_error=False)
        # A user who may not look at somebody else's keys leaves their bytes unattributed.
        allowed = [at for at, kind in enumerate(first[0::4]) if not isinstance(kind, NoPermissionError)]
        part, first = [part[at] for at in allowed], [one for at in allowed for one in first[4 * at : 4 * at + 4]]
        pipe = redis.pipeline(transaction=False)
        kinds = [bytes(kind).decode() for kind in first[0::4]]
        for key, kind in zip(part, kinds, strict=True):
            if kind == "stream":
                pipe.execute_command("XINFO", "STREAM", key)
            elif kind in _LENGTH:
                pipe.execute_command(_LENGTH[kind], key)
            elif kind == "string":
                pipe.execute_command("GETRANGE", key, 0, 5)
            else:
                pipe.exists(key)
        second = await pipe.execute(raise_on_error=False)
        checkpoint()
        for i, (key, kind, detail) in enumerate(zip(part, kinds, second, strict=True)):
            _, pttl, encoding, usage = first[4 * i : 4 * i + 4]
            if any(map(_gone, (encoding, usage, detail))):
                continue
            members, size = fix.size(kind, bytes(encoding).decode(), int(usage), detail, int(pttl) >= 0)
            yield {"key": key.decode(errors="replace"), "type": kind, "members": members, "bytes": size}


def _gone(reply: object) -> bool:
    """Return whether a key expired, or was replaced, between the scan and here; any other error is raised."""
    if isinstance(reply, Exception) and not str(reply).lower().startswith(("no such key", "wrongtype")):
        raise reply
    return reply is None or isinstance(reply, Exception)


def _usage(key: bytes) -> tuple[str | bytes | int, ...]:
    return "MEMORY", "USAGE", key, "SAMPLES", _SAMPLES


class _Corrections:
    """What MEMORY USAGE leaves out or overstates, from the sources of each server.

    * Key tables (`dict.c`, `kvstore.c`; Valkey `hashtable.c`): every key has a slot, and one more when it has a TTL.
      MEMORY STATS gives each table's bytes, though by formulas that have to be undone, and with what any number needs.
    * Redis before 8.2 (`object.c`, 7.0): MEMORY USAGE adds a 24-byte dictEntry a key, and a dictEntry a member of a
      hash table; an allocator with 16-byte steps gives it 32. Small integers are shared objects and cost nothing.
    * Redis from 8.2: key and value are one object; a table keeps entries (16 bytes) only for keys that collide, which
      for a load a = n/slots is the fraction 1 - (1 - exp(-a)) / a. Sorted sets still have 24-byte entries, counted 16.
    * Redis, all: `streamRadixTreeMemoryUsage` takes 16 bytes an element + 244 a node; measured, it is 26 a node + 24.
    * Valkey counts what it allocates; only the tables are missing.
    """

    def __init__(self, server: Capabilities, stats: dict[str, Any], keys: int, expires: int) -> None:
        main, ttl = (float(stats.get(f"overhead.hashtable.{name}", 0)) for name in ("main", "expires"))
        version = tuple(int(part) for part in server.version.split(".")[:2])
        self.valkey = server.kind == "valkey"
        self.merged = not self.valkey and version >= (8, 2)
        self.entry_slack = 8 if server.malloc_quantum == 16 and not self.valkey else 0
        if self.valkey:
            main, ttl = main - 16 * keys - _HASHTABLE, ttl - _HASHTABLE
        elif self.merged:
            main, ttl = main - 32 * keys, ttl - 16 * expires
            slots = stats["all"].get("overhead.db.hashtable.lut") if stats["alone"] else None
            structs = main + ttl - float(slots) if slots else sum(_DICTS)  # of a cluster, as many as slots with keys
            main, ttl = (
                _sparse_table(table - structs * own / sum(_DICTS), count)
                for table, own, count in zip((main, ttl), _DICTS, (keys, expires), strict=True)
            )
        else:
            main, ttl = main - (40 - self.entry_slack) * keys, ttl + self.entry_slack * expires
        self.per_key = max(main, 0) / max(keys, 1)
        self.per_ttl = max(ttl, 0) / max(expires, 1)

    def size(self, kind: str, encoding: str, usage: int, detail: Any, has_ttl: bool) -> tuple[int, float]:
        """Return (members, bytes) of one key."""
        size = float(usage) + self.per_key + (self.per_ttl if has_ttl else 0)
        members = 1
        if kind == "stream":
            fields = dict(zip(detail[0::2], detail[1::2], strict=True)) if isinstance(detail, list) else detail
            members = int(fields[b"length"])
            nodes, elements = int(fields[b"radix-tree-nodes"]), int(fields[b"radix-tree-keys"])
            if not self.valkey:
                size += 26 * nodes + 24 - (16 * elements + 244 * nodes)
        elif kind in _LENGTH:
            members = int(detail)
            if encoding == "skiplist":
                size += members * (8 if self.merged else self.entry_slack)
            elif encoding == "hashtable":
                size += members * (0 if self.merged else self.entry_slack)
        elif encoding == "int" and not (self.valkey or self.merged) and 0 <= int(detail or -1) < _SHARED_INTEGERS:
            size -= 16
        return members, size


def _sparse_table(slots_bytes: float, keys: int) -> float:
    """Bytes of a Redis >= 8.2 table: its slots (8 bytes each) and the entries of colliding keys."""
    load = 8 * keys / max(slots_bytes, 8)
    return slots_bytes + 16 * keys * (1 - (1 - math.exp(-load)) / load) if keys else 0.0


def _summary(
    keys: pd.DataFrame, counts: dict[str, int], settings: Settings, memory: dict[str, Any], stats: dict[str, Any]
) -> Budget:
    used = int(memory["used_memory"])
    maxmemory = int(memory["maxmemory"]) or settings.server.maxmemory
    rows = []
    for family, part in keys.groupby("family", sort=False):
        # Keys that expired while being measured leave n short of the count without any sampling.
        n, count = len(part), max(counts[str(family)], len(part))
        known = schema.BY_NAME.get(str(family))
        mean, spread = float(part["bytes"].mean()), float(part["bytes"].std(ddof=1)) if n > 1 else 0.0
        error = 2 * count * spread / math.sqrt(n) * math.sqrt(max(1 - n / count, 0))
        members = round(float(part["members"].mean()) * count)
        rows.append(
            {
                "family": str(family),
                "share": known.share if known else FOREIGN,
                "keys": count,
                "members": members,
                "bytes": round(mean * count),
                "error_bytes": round(error),
            }
        )
    families = pd.DataFrame(rows, columns=["family", "share", *_NUMBERS]).astype(dict.fromkeys(_NUMBERS, "int64"))
    return _budget(families.set_index("family"), keys, used, maxmemory, stats["all"], settings)


def added(nodes: dict[str, Budget], settings: Settings) -> Budget:
    """Return the sum of the budgets of a cluster's nodes, by ``host:port``."""
    each = list(nodes.values())
    families = pd.concat([one.families for one in each]).groupby(level="family", sort=False)
    total = families[list(_NUMBERS)].sum()
    total.insert(0, "share", families["share"].first())
    used, maxmemory = (sum(getattr(one, name) for one in each) for name in ("used_memory", "maxmemory"))
    made = _budget(total, pd.concat([one.keys for one in each]), used, maxmemory, {}, settings)
    overhead = pd.DataFrame([one.overhead for one in each]).sum().astype("int64").rename("bytes")
    return replace(made, overhead=overhead, nodes=nodes)


def _budget(
    families: pd.DataFrame, keys: pd.DataFrame, used: int, maxmemory: int, stats: dict[str, Any], settings: Settings
) -> Budget:
    families["bytes_per_member"] = families["bytes"] / families["members"].clip(lower=1)
    budget = settings.budget.model_dump()
    table = families.groupby("share")[list(_NUMBERS)].sum()
    names = [*schema.SHARES[:-1], *([FOREIGN] if FOREIGN in table.index else []), UNATTRIBUTED]
    table = table.reindex(names, fill_value=0).astype("int64")
    table.index.name = "part"
    table.loc[UNATTRIBUTED, "bytes"] = used - int(table["bytes"].sum())
    table["share"] = [budget.get(name, budget["buffer"] if name == UNATTRIBUTED else 0.0) for name in names]
    table["budget_bytes"] = (table["share"] * maxmemory).round().astype("int64")
    table["used_pct"] = table["bytes"] / table["budget_bytes"].where(table["budget_bytes"] > 0) * 100

    top = keys.nlargest(1_000, "bytes").round({"bytes": 0}).astype({"bytes": "int64"}).reset_index(drop=True)
    return Budget(table, families, top, used, maxmemory, _overhead(stats, int(table["bytes"].iloc[-1])))


def _overhead(stats: dict[str, Any], unattributed: int) -> pd.Series:
    known = {
        "start-up": int(stats.get("startup.allocated", 0)),
        "clients": int(stats.get("clients.normal", 0)),
        "scripts": sum(int(stats.get(name, 0)) for name in ("lua.caches", "functions.caches", "script.VMs")),
        "replication and AOF": int(stats.get("replication.backlog", 0)) + int(stats.get("aof.buffer", 0)),
    }
    return pd.Series({**known, "other": unattributed - sum(known.values())}, name="bytes", dtype="int64")
