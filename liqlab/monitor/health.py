"""One look at a running Redis, and at the writer and the cleanup beside it."""

from __future__ import annotations

import asyncio
import html
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import pandas as pd
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from liqlab import clock, schema
from liqlab.budget import human
from liqlab.cluster import as_cluster
from liqlab.monitor.nodes import across
from liqlab.server import redact
from liqlab.settings import Settings, load
from liqlab.writer import Writer

LONGEST: Final = 5  # event streams that are named
_SECTIONS: Final = ("server", "clients", "memory", "stats", "keyspace")
_PATIENCE_S: Final = 5.0  # a client's own is 30 s; a frozen server should be noticed sooner
_SCAN_S: Final = 2.0  # on a server of millions of keys the streams stay uncounted
_PIPELINE: Final = 500


def _metric(group: str, metric: str, unit: str, meaning: str) -> Any:
    """Declare a field that is a metric; a name that ends in ``_total`` counts from the server's start."""
    return field(default=None, metadata={"group": group, "metric": metric, "unit": unit, "meaning": meaning})


@dataclass(frozen=True)
class Health:
    """What one look found. Sizes are bytes, ratios fractions of 1, durations seconds; `table` says what each field is.

    None is what cannot be known: everything of a server that did not answer, a ratio without a whole (no maxmemory, no
    hit and no miss yet), the time in a breaker's first state, the writer's and the cleanup's part where neither was
    passed.

    Attributes
    ----------
    at_ms : int
        Wall time of the look, ms since the epoch, UTC.
    error : str or None
        Why the server did not answer; None when it did.
    longest : tuple of (str, int)
        The `LONGEST` longest event streams and their entries.
    cleanup_kinds : dict of str to int
        Actions of cleanup by their kind.
    down : tuple of str
        The nodes of a cluster that do not answer, or that it takes for gone, as ``host:port``. Of a cluster, counts and
        bytes are the sum of its primaries, ratios those of the one that is worst off.
    """

    at_ms: int
    error: str | None = None

    used_memory: int | None = _metric("memory", "redis_used_memory_bytes", "B", "allocated by the server")
    maxmemory: int | None = _metric("memory", "redis_maxmemory_bytes", "B", "the server's own limit, 0 for none")
    used_ratio: float | None = _metric("memory", "redis_used_memory_ratio", "%", "of maxmemory")
    fragmentation: float | None = _metric("memory", "redis_memory_fragmentation_ratio", "x", "RSS over used memory")
    rss: int | None = _metric("memory", "redis_rss_bytes", "B", "resident memory of the server's process")
    rss_limit: int | None = _metric("memory", "redis_rss_limit_bytes", "B", "resident memory that it may take")
    rss_ratio: float | None = _metric("memory", "redis_rss_ratio", "%", "of that limit")
    client_memory: int | None = _metric("memory", "redis_client_memory_bytes", "B", "buffers of clients")
    evicted_keys: int | None = _metric("memory", "redis_evicted_keys_total", "", "keys evicted at maxmemory")

    ops_per_s: int | None = _metric("performance", "redis_commands_per_second", "", "commands a second, just now")
    hits: int | None = _metric("performance", "redis_keyspace_hits_total", "", "look-ups that found their key")
    misses: int | None = _metric("performance", "redis_keyspace_misses_total", "", "look-ups that did not")
    hit_ratio: float | None = _metric("performance", "redis_keyspace_hit_ratio", "%", "of look-ups, since the start")
    clients: int | None = _metric("performance", "redis_connected_clients", "", "connections of clients")
    blocked: int | None = _metric("performance", "redis_blocked_clients", "", "clients that wait in a blocking call")
    uptime_s: int | None = _metric("performance", "redis_uptime_seconds", "s", "since the server's start")

    keys: int | None = _metric("data", "redis_keys", "", "keys of all databases")
    expired_keys: int | None = _metric("data", "redis_expired_keys_total", "", "keys whose time was up")
    events: int | None = _metric("data", "event_stream_entries", "", "hot events, in all streams")
    streams: int | None = _metric("data", "event_streams", "", "streams of hot events")
    blocks: int | None = _metric("data", "sealed_blocks", "", "blocks of sealed events")
    longest: tuple[tuple[str, int], ...] = ()

    nodes: int | None = _metric("cluster", "cluster_nodes", "", "nodes of the cluster, replicas too")
    nodes_down: int | None = _metric("cluster", "cluster_nodes_down", "", "of them, those that do not answer")
    down: tuple[str, ...] = ()

    breaker: str | None = _metric("writer", "breaker_state", "", "closed, half-open or open")
    breaker_s: float | None = _metric("writer", "breaker_state_seconds", "s", "since its last change")
    waiting: int | None = _metric("writer", "writer_waiting_events", "", "events in the writer's memory")
    journal_events: int | None = _metric("writer", "journal_events", "", "events in the journal that wait for Redis")
    journal_bytes: int | None = _metric("writer", "journal_bytes", "B", "taken by the journal, wal's window included")
    journal_ratio: float | None = _metric("writer", "journal_ratio", "%", "of journal.max_bytes")

    cleanup_actions: int | None = _metric("cleanup", "cleanup_actions", "", "actions that cleanup remembers")
    cleanup_keys: int | None = _metric("cleanup", "cleanup_keys", "", "keys that they removed or changed")
    cleanup_events: int | None = _metric("cleanup", "cleanup_events", "", "events that they removed")
    cleanup_freed: int | None = _metric("cleanup", "cleanup_freed_bytes", "B", "bytes that they gave back")
    cleanup_kinds: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON."""
        return {**vars(self), "longest": dict(self.longest), "cleanup_kinds": dict(self.cleanup_kinds)}

    def table(self) -> pd.DataFrame:
        """Return what is known, for reading.

        Returns
        -------
        pandas.DataFrame
            Index: the field. Columns: group, value (as it is), reading (as a person would say it), meaning.
        """
        rows = [
            {
                "field": each.name,
                "group": each.metadata["group"],
                "value": value,
                "reading": _reading(value, each.metadata["unit"]),
                "meaning": each.metadata["meaning"],
            }
            for each in fields(self)
            if each.metadata and (value := getattr(self, each.name)) is not None
        ]
        table = pd.DataFrame(rows, columns=["field", "group", "value", "reading", "meaning"], dtype=object)
        return table.set_index("field")

    def _repr_html_(self) -> str:
        shown = self.table()[["group", "reading", "meaning"]].rename_axis(index=None)
        return (f"<p>{html.escape(self.error)}</p>" if self.error else "") + str(shown.to_html())


def _reading(value: Any, unit: str) -> str:
    if unit == "B":
        return human(value)
    if unit == "%":
        return f"{value:.1%}".replace("%", " %")
    if unit == "s":
        return f"{value:,.0f} s"
    return f"{value:.2f}" if unit == "x" else f"{value:,}" if isinstance(value, int) else str(value)


async def measure(
    redis: Redis, *, settings: Settings | None = None, writer: Writer | None = None, cleanup: Any = None
) -> Health:
    """Look once. Reads only: one INFO, a scan of the key names, and the length of each event stream.

    A server that does not answer is no exception but a finding: `Health.error`.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes.
    settings : Settings, optional
        `cleanup.rss_bytes` is read; `liqlab.settings.load()` when absent.
    writer : Writer, optional
        The one of this process; its breaker and journal are looked at too.
    cleanup : object, optional
        Has `actions`, each with `what`, `keys`, `events`, `bytes_before` and `bytes_after`.

    Returns
    -------
    Health
    """
    settings = settings or load()
    found: dict[str, Any] = {**_of_writer(writer), **_of_cleanup(cleanup)}

    async def look(server: Redis) -> dict[str, Any]:
        return _of_server(await server.info(*_SECTIONS), settings) | await _of_streams(server)

    task = asyncio.current_task()
    cancelled = task.cancelling() if task else 0
    try:
        async with asyncio.timeout(_PATIENCE_S):
            cluster = as_cluster(redis)
            found |= await (across(cluster, look, LONGEST) if cluster else look(redis))
    except (RedisError, OSError) as error:  # OSError: the built-in TimeoutError too
        found["error"] = redact(f"{type(error).__name__}: {error}".removesuffix(": "))
    if task and task.cancelling() > cancelled:
        # On Python 3.11 the client loses it: redis-py waits with asyncio.wait_for, which swallows it there (gh-86296).
        raise asyncio.CancelledError
    return Health(at_ms=clock.now_ms(), **found)


def _of_server(info: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    used, limit, rss = info.get("used_memory"), info.get("maxmemory"), info.get("used_memory_rss")
    hits, misses = info.get("keyspace_hits", 0), info.get("keyspace_misses", 0)
    rss_limit = settings.cleanup.rss_bytes or memory_limit(info)
    return {
        "used_memory": used,
        "maxmemory": limit,
        "used_ratio": used / limit if used is not None and limit else None,
        "fragmentation": info.get("mem_fragmentation_ratio"),
        "rss": rss,
        "rss_limit": rss_limit,
        "rss_ratio": rss / rss_limit if rss is not None and rss_limit else None,
        "client_memory": info.get("mem_clients_normal", 0) + info.get("mem_clients_slaves", 0),
        "evicted_keys": info.get("evicted_keys"),
        "ops_per_s": info.get("instantaneous_ops_per_sec"),
        "hits": hits,
        "misses": misses,
        "hit_ratio": hits / (hits + misses) if hits + misses else None,
        "clients": info.get("connected_clients"),
        "blocked": info.get("blocked_clients"),
        "uptime_s": info.get("uptime_in_seconds"),
        "keys": sum(int(value["keys"]) for name, value in info.items() if name[:2] == "db" and name[2:].isdigit()),
        "expired_keys": info.get("expired_keys"),
    }


async def _of_streams(redis: Redis) -> dict[str, Any]:
    """Return how long the event streams are; nothing where that takes too long, or the user may not ask.

    They are found by their names: asking for each that there may be would count as so many misses, and `hit_ratio`
    would be about the monitor.
    """
    lengths: dict[str, dict[bytes, int]] = {"events": {}, "blocks": {}}
    try:
        async with asyncio.timeout(_SCAN_S):
            found = {key: schema.family_of(_text(key)) async for key in redis.scan_iter(match="liq*", count=1_000)}
            keys = [(key, family.name) for key, family in found.items() if family and family.name in lengths]
            for at in range(0, len(keys), _PIPELINE):
                pipe = redis.pipeline(transaction=False)
                for key, _ in keys[at : at + _PIPELINE]:
                    pipe.xlen(key)
                replies = await pipe.execute(raise_on_error=False)  # a foreign key of such a name may be no stream
                for (key, name), length in zip(keys[at : at + _PIPELINE], replies, strict=True):
                    if isinstance(length, int):
                        lengths[name][key] = length
    except (ResponseError, TimeoutError):
        return {}
    hot = sorted(lengths["events"].items(), key=lambda pair: (-pair[1], pair[0]))
    return {
        "events": sum(lengths["events"].values()),
        "streams": len(hot),
        "blocks": sum(lengths["blocks"].values()),
        "longest": tuple((_text(key), length) for key, length in hot[:LONGEST]),
    }


def _text(key: bytes) -> str:
    return key.decode(errors="replace")


def _of_writer(writer: Writer | None) -> dict[str, Any]:
    found: dict[str, Any] = {"waiting": writer.waiting} if writer else {}
    if writer and writer.breaker:
        found["breaker"] = writer.breaker.state.value
        if writer.breaker.transitions:
            found["breaker_s"] = max(clock.now_ms() - writer.breaker.transitions[-1].at_ms, 0) / 1000
    if writer and writer.journal:
        size = writer.journal.bytes
        found |= {"journal_events": writer.journaled, "journal_bytes": size}
        found["journal_ratio"] = size / writer.journal.max_bytes
    return found


def _of_cleanup(cleanup: Any) -> dict[str, Any]:
    if cleanup is None:
        return {}
    actions = list(cleanup.actions)
    return {
        "cleanup_actions": len(actions),
        "cleanup_keys": sum(action.keys for action in actions),
        "cleanup_events": sum(action.events for action in actions),
        "cleanup_freed": sum(action.bytes_before - action.bytes_after for action in actions),
        "cleanup_kinds": dict(Counter(str(action.what) for action in actions)),
    }


def memory_limit(info: Mapping[str, Any], root: str | os.PathLike[str] = "/") -> int | None:
    """Return what a server's process may take, bytes: its machine's memory, or less where its cgroup says so.

    Parameters
    ----------
    info : mapping
        From INFO, with the sections ``server`` and ``memory``.
    root : path
        Where `proc` and `sys` are.

    Returns
    -------
    int or None
        None where the server does not say. The cgroup is seen only when the server runs on this machine and outside of
        a container that this process is not in; for one in a container set `cleanup.rss_bytes`.
    """
    limits = [int(info["total_system_memory"])] if info.get("total_system_memory") else []
    process = Path(root, "proc", str(info.get("process_id")))
    try:
        name = (process / "comm").read_text()
        groups = (process / "cgroup").read_text().splitlines() if name.startswith(("redis", "valkey")) else []
    except OSError:  # on another machine, or one without /proc
        groups = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        folder, file = Path(root, "sys/fs/cgroup"), "memory.max"
        if controllers:  # a hierarchy of cgroup v1
            folder, file = folder / "memory", "memory.limit_in_bytes"
        if controllers in ("", "memory"):
            group = folder / path.lstrip("/")
            limits += [limit for each in (group, *group.parents) if (limit := _number(each / file))]
    return min(limits, default=None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group here, or "max"
        return None
