"""What a migration would do, measured and estimated, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from redis.asyncio import Redis

from liqlab import schema
from liqlab.budget import human
from liqlab.codecs import CODECS, Names
from liqlab.events import Columns
from liqlab.migrate.sources import OWN, PAGE, UNKNOWN, MigrateError, Reader, Source, entries, find
from liqlab.settings import Settings, load

PREFIXES: Final = ("liquidations",)
SEAL_EVENTS: Final = 20_000  # written between two sealings
_FULL: Final = 0.9  # of a block is filled, at least
_SAMPLE: Final = 5_000  # entries that are encoded to see what they would take
_HOT_BYTES: Final = 100  # of an event before it is sealed, one that comes late included
_CALL: Final = 4  # times its argument, a batch takes while it runs: received, unpacked, packed again in streams
BATCH_EVENT_BYTES: Final = 512  # of an event in that argument, at most


@dataclass(frozen=True)
class Plan:
    """What a migration would do.

    Attributes
    ----------
    table : pandas.DataFrame
        One row a form: form, keys, entries, bytes (MEMORY USAGE), bytes_after (estimated), action.
    keys : pandas.DataFrame
        One row a key: key, form, symbol, entries, bytes, chunk.
    sources : list of Source
        The keys that would be migrated.
    chunks : list of int
        Of each of them: the part in which it is migrated. More than one only where both forms of all do not fit.
    used_memory, maxmemory : int
        Bytes; no limit is 0.
    bytes_after : int
        What the events will take, estimated from some of them, encoded.
    room : int
        Bytes that are needed in passing.
    problem : str
        Why it cannot begin, and the cure; empty where it can.
    notes : list of str
        What was assumed or found, in sentences.
    """

    table: pd.DataFrame
    keys: pd.DataFrame
    sources: list[Source]
    chunks: list[int]
    used_memory: int
    maxmemory: int
    bytes_after: int
    room: int
    problem: str
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON."""
        names = ("used_memory", "maxmemory", "bytes_after", "room", "problem", "notes")
        return {"forms": self.table.to_dict("records")} | {name: getattr(self, name) for name in names}

    def _repr_html_(self) -> str:
        return str(self.table.to_html(index=False))


async def plan(
    redis: Redis,
    *,
    settings: Settings | None = None,
    prefixes: Sequence[str] = PREFIXES,
    exchange: str | None = None,
    remove: bool = False,
) -> Plan:
    """Look at what there is to migrate. Reads only.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes.
    settings : Settings, optional
        `liqlab.settings.load()` when absent.
    prefixes : sequence of str
        What the legacy keys begin with, before ``:SYMBOL`` or ``-EXCHANGE-SYMBOL``.
    exchange : str, optional
        The venue of entries that do not name theirs.
    remove : bool
        Whether the old keys are to be removed: then a server without room for both forms of all of them can do with
        less.

    Returns
    -------
    Plan

    Raises
    ------
    MigrateError
        `prefixes` is empty or has an empty one.
    """
    settings = settings or load()
    if isinstance(prefixes, str) or not prefixes or not all(prefixes):
        raise MigrateError(f"prefixes = {prefixes!r}: must be names, such as {PREFIXES!r}")
    found = await find(redis, prefixes)
    sources = [source for source in found if source.form not in (OWN, UNKNOWN)]
    each, notes = await _event_bytes(redis, sources, settings, exchange)
    room = room_bytes(settings)
    info = await redis.info("memory")
    used, maxmemory = int(info["used_memory"]), int(info["maxmemory"])
    after = round(each * sum(source.entries for source in sources))
    chunks, problem = [0] * len(sources), ""
    if maxmemory:
        free = int(maxmemory * settings.thresholds.breaker_half_open) - used - room
        chunks, problem = _chunks([round(each * source.entries) for source in sources], free, remove, settings)
        problem = problem and (
            f"both forms at once need {human(after + room)} on a server that uses {human(used)} of {human(maxmemory)}, "
            f"{problem}"
        )
    problem = problem or await _limited(redis, after, settings)
    notes += [
        f"{source.key} ({source.kind}) is of no form that is migrated: it is left alone"
        + (
            "; RENAME it to liquidations:SYMBOL if its entries are side, size, price, exchange"
            if _renamable(source)
            else ""
        )
        for source in found
        if source.form == UNKNOWN
    ]
    place = {source.key: chunk for source, chunk in zip(sources, chunks, strict=True)}
    columns = ["key", "form", "symbol", "entries", "bytes"]
    keys = pd.DataFrame([[getattr(source, name) for name in columns] for source in found], columns=columns)
    keys["chunk"] = [place.get(source.key) for source in found]
    keys = keys.astype({"entries": "int64", "bytes": "int64", "chunk": "Int64"})
    return Plan(_forms(keys, each), keys, sources, chunks, used, maxmemory, after, room, problem, notes)


def batch_events(settings: Settings) -> int:
    """Return how many events are sent at once."""
    return max(min(settings.writer.bulk_events, settings.writer.batch_bytes // BATCH_EVENT_BYTES), 1)


def room_bytes(settings: Settings) -> int:
    """Return the bytes that a migration takes in passing: a batch while it runs, and events before they are sealed."""
    return _CALL * batch_events(settings) * BATCH_EVENT_BYTES + SEAL_EVENTS * _HOT_BYTES


def _renamable(source: Source) -> bool:
    return source.kind == "stream" and source.key.startswith(schema.BY_NAME["events"].key(""))


def _forms(keys: pd.DataFrame, each: float) -> pd.DataFrame:
    actions = {OWN: "stays: liqlab reads it as it is, and seals it", UNKNOWN: "left alone"}
    table = keys.groupby("form").agg(keys=("key", "size"), entries=("entries", "sum"), bytes=("bytes", "sum"))
    table = table.reset_index()
    migrated = ~table["form"].isin(list(actions))
    table["bytes_after"] = (table["entries"] * each).round().astype("int64").where(migrated, table["bytes"])
    table["action"] = [actions.get(form, "migrated") for form in table["form"]]
    return table


async def _event_bytes(
    redis: Redis, sources: Sequence[Source], settings: Settings, exchange: str | None
) -> tuple[float, list[str]]:
    """Return the bytes of an event in blocks, from some of each key's, and what was assumed of them.

    Some events are further apart than all, and so take a little more: it errs on the high side.
    """
    total = sum(source.entries for source in sources)
    reader, read, parts = Reader(settings, exchange=exchange), 0, []
    for source in sources:
        wanted = max(min(_SAMPLE * source.entries // total, PAGE), 1) if total else 1
        async for page in entries(redis, source, page=wanted):
            events = reader.read(source, page).events
            parts += [] if events is None else [events]
            read += len(page)
            break
    if not parts:
        return 0.0, reader.notes
    events = Columns.concat(parts)
    events = events.rows(np.argsort(events.ts_ms, kind="stable"))
    payloads = CODECS[settings.writer.block_codec].encode(events, Names())
    return sum(len(value) for row in payloads for value in row) / read / _FULL, reader.notes


def _chunks(sizes: Iterable[int], free: int, remove: bool, settings: Settings) -> tuple[list[int], str]:
    """Return in which part each key is migrated so that a part fits into `free` bytes, or why that cannot be."""
    sizes = list(sizes)
    if sum(sizes) <= free:
        return [0] * len(sizes), ""
    if max(sizes) > free:
        cure = f"free {human(sum(sizes) - free)} or raise maxmemory"
        return [0] * len(sizes), f"and {settings.thresholds.breaker_half_open:.0%} of that is the line; {cure}"
    chunks, chunk, taken = [], 0, 0
    for size in sizes:
        if taken + size > free:
            chunk, taken = chunk + 1, 0
        chunks.append(chunk)
        taken += size
    if not remove:
        return chunks, (
            f"and {settings.thresholds.breaker_half_open:.0%} of that is the line; remove=True migrates the keys in "
            f"{chunk + 1} parts and removes each part's once they are verified, or raise maxmemory"
        )
    return chunks, ""


async def _limited(redis: Redis, after: int, settings: Settings) -> str:
    """Return why the writer's own limits, as cleanup last set them, would push the migrated events out again."""
    for shard in schema.shards_of(settings):
        limits = await redis.hmget(schema.BY_NAME["limits"].key(shard=shard), ["bytes", "event_bytes", "block_bytes"])
        if None in limits:
            continue
        allowed, event, block = (float(limit or 0) for limit in limits)
        taken = event * await redis.xlen(schema.BY_NAME["events"].key(shard=shard))
        taken += block * await redis.xlen(schema.BY_NAME["blocks"].key(shard=shard))
        if taken + after / settings.shards > allowed:
            return (
                f"cleanup lets event streams have {human(allowed)}, they have {human(taken)}, and the events would add "
                f"{human(after)}: the oldest would be removed again; raise budget.streams and run cleanup"
            )
    return ""
