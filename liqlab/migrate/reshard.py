"""Another number of shards, in place or on another server: from one server to a cluster, or on a cluster that grew.

The events lie by shard in streams and blocks, so they are read and written again. A key that belongs to one symbol is
the same under another tag: its bytes are carried over. All of it is in files before the first key is removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from redis.asyncio import Redis
from redis.utils import str_if_bytes

from liqlab import archive, clock, schema
from liqlab.cluster import as_cluster, check_shards
from liqlab.events import SIDES, Columns, concat, empty
from liqlab.migrate.run import alone
from liqlab.migrate.send import Sender
from liqlab.migrate.sources import MigrateError
from liqlab.schema import Family
from liqlab.sealing import seal
from liqlab.settings import Settings, load

Progress = Callable[[int, int], None]
_STATE: Final = "reshard.json"
_KEYS: Final = "keys.parquet"
_PAGE: Final = 500
_WINDOW: Final = 100_000  # events that are in memory at a time, when they are written
_MARKS: Final = "writers.json"
_STAY: Final = ("lock", "temporary", "debug", "stats_old")  # families without a tag, whatever the number
_NEVER_MS: Final = 1 << 60  # by when all sums have expired: those that there are were carried over


@dataclass
class Resharded:
    """A change of the number of shards, as it stands.

    Attributes
    ----------
    name : str
        Under which its batches are numbered.
    before, shards : int
        The two numbers.
    batch : int
        Events in a batch, the same when it goes on.
    phase : str
        ``read``, ``remove``, ``write``, or ``done``.
    events, keys : int
        Read: events, and keys of single symbols.
    """

    name: str
    before: int
    shards: int
    batch: int
    phase: str = "read"
    events: int = 0
    keys: int = 0


async def reshard(
    redis: Redis,
    *,
    folder: str | Path,
    shards: int,
    settings: Settings | None = None,
    target: Redis | None = None,
    progress: Progress | None = None,
) -> Resharded:
    """Change the number of shards. Interrupted anywhere, the same call goes on.

    No writer, detector or cleanup may run meanwhile, and journals must be drained (`Writer.drain`) before. The count of
    unique symbols and the limits of the streams begin anew.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        Where the events are.
    folder : path
        Where all is kept that is read; between two phases it is the only copy. It stays.
    shards : int
        The new number; 1 is without tags.
    settings : Settings, optional
        Their `shards` is the present number; `liqlab.settings.load()` when absent.
    target : redis.asyncio.Redis, optional
        Another server or cluster, without events; then nothing is removed from `redis`.
    progress : callable, optional
        Called with (events written, events in all).

    Raises
    ------
    MigrateError
        There is nothing to do, the folder is of another change, events came in between, or not all were found again.
    """
    settings, path = settings or load(), Path(folder).absolute()
    new, into = settings.model_copy(update={"shards": shards}), target or redis
    if target is None and shards == settings.shards:
        raise MigrateError(f"shards = {shards} already; name another number")
    if as_cluster(into):
        check_shards(new)
    path.mkdir(parents=True, exist_ok=True)
    with alone(path):
        file = path / _STATE
        state = Resharded(clock.token(), settings.shards, shards, settings.writer.bulk_events)
        if file.exists():
            state = Resharded(**json.loads(file.read_text()))
            if (state.before, state.shards) != (settings.shards, shards):
                raise MigrateError(f"{path} is of a change from {state.before} to {state.shards} shards; name another")
        if state.phase == "read":
            if target is not None and await archive.count(target, settings=new):
                raise MigrateError("the target holds events already; name one that is empty")
            state.events, state.keys = await _read(redis, path, settings)
            _note(state, path, "write" if target is not None else "remove")
        if state.phase == "remove":
            await _remove(redis, settings, state)
            _note(state, path, "write")
        if state.phase == "write":
            await _restore(into, path, new)
            await _write(into, path, state, new, progress)
            await _verify(into, path, new)
            await _forget(into, state, new)
            _note(state, path, "done")
    return state


def _note(state: Resharded, path: Path, phase: str) -> None:
    state.phase = phase
    part = path / f"{_STATE}.part"
    part.write_text(json.dumps(asdict(state)))
    _replace(part, path / _STATE)


def _replace(part: Path, path: Path) -> None:
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _save(table: pd.DataFrame, path: Path) -> None:
    part = path.with_suffix(".part")
    table.to_parquet(part, index=False)
    _replace(part, path)


async def _read(redis: Redis, path: Path, settings: Settings) -> tuple[int, int]:
    events = 0
    for shard in schema.shards_of(settings):
        found = await archive.history(redis, settings=schema.only(settings, [shard]))
        _save(found, path / f"events-{shard or 0}.parquet")
        events += len(found)
    rows: list[dict[str, Any]] = []
    keys = [key async for key in _own_keys(redis, settings)]
    wanted = [(key, family) for key, family in keys if "SYMBOL" in family.pattern and family.name != "events"]
    for start in range(0, len(wanted), _PAGE):
        pipe = redis.pipeline(transaction=False)
        for key, _ in wanted[start : start + _PAGE]:
            pipe.execute_command("PEXPIRETIME", key)
            pipe.execute_command("DUMP", key)
        replies = await pipe.execute()
        for (key, family), at_ms, dump in zip(wanted[start : start + _PAGE], replies[::2], replies[1::2], strict=True):
            if dump is not None:
                rows.append({"key": key, "family": family.name, "at_ms": at_ms, "dump": dump})
    marks: dict[str, dict[str, int]] = {}
    for key, family in keys:
        if family.name == "writer":
            seen = marks.setdefault(key.rpartition(":")[2], {})
            for field, number in (await redis.hgetall(key)).items():
                name = str_if_bytes(field)
                if number.isdigit():  # a migration under way notes its folder there
                    seen[name] = max(int(number), seen.get(name, 0))
    _save(pd.DataFrame(rows, columns=["key", "family", "at_ms", "dump"]), path / _KEYS)
    (path / _MARKS).write_text(json.dumps(marks))
    return events, len(rows)


async def _own_keys(redis: Redis, settings: Settings) -> AsyncIterator[tuple[str, Family]]:
    """Yield the keys of liqlab's that have a tag of these settings, or none where they give none, and their family."""
    shards = set(schema.shards_of(settings))
    async for raw in redis.scan_iter(match="*", count=1_000):
        family = schema.family_of(raw.decode(errors="replace"))
        if family and family.name not in _STAY and schema.shard_of_key(raw) in shards:
            yield raw.decode(), family


async def _remove(redis: Redis, settings: Settings, state: Resharded) -> None:
    """Remove the keys that were read; what is there of events may be less by now, if this was interrupted, not more."""
    there = await archive.count(redis, settings=settings)
    if there > state.events:
        raise MigrateError(
            f"{there - state.events} events came after all were read; end every writer, remove the folder, begin again"
        )
    keys = [key async for key, _ in _own_keys(redis, settings)]
    for start in range(0, len(keys), _PAGE):
        await redis.unlink(*keys[start : start + _PAGE])


async def _restore(redis: Redis, path: Path, settings: Settings) -> None:
    """Bring the keys of single symbols back under their new tags, and what each writer had written."""
    rows = pd.read_parquet(path / _KEYS)
    for key, name, at_ms, dump in rows[["key", "family", "at_ms", "dump"]].itertuples(index=False):
        family, words = schema.BY_NAME[name], key.split(":")
        rest = words[1 if schema.shard_of_key(key.encode()) is None else 2 :]
        # Of what follows the symbol there is one word or none; a venue's name may hold a colon itself.
        last = len(rest) - (family.pattern.count(":") - 1)
        shard = schema.shard_of(":".join(rest[:last]), settings.shards)
        tag = [] if shard is None else [f"{{{shard}}}"]
        await redis.restore(":".join([words[0], *tag, *rest]), max(at_ms, 0), dump, replace=True, absttl=at_ms > 0)
    for writer, fields in json.loads((path / _MARKS).read_text()).items():
        for shard in schema.shards_of(settings):
            key = schema.BY_NAME["writer"].key(writer, shard=shard)
            if fields:
                await redis.hset(key, mapping=fields)
                await redis.expire(key, settings.retention.writer_s)


def _windows(path: Path) -> Iterator[tuple[pd.DataFrame, int | None]]:
    """Yield the events of all files in time order, some at a time, with the time of the first that follows."""
    files = sorted(path.glob("events-*.parquet"))
    times = np.sort(np.concatenate([pd.read_parquet(file, columns=["ts_ms"])["ts_ms"].to_numpy() for file in files]))
    cuts = [int(at) for at in np.unique(times[::_WINDOW])]
    for first, following in zip(cuts, [*cuts[1:], None], strict=True):
        bounds = [("ts_ms", ">=", first)] + ([("ts_ms", "<", following)] if following is not None else [])
        yield concat([_events(file, bounds) for file in files]), following


def _events(file: Path, bounds: list[tuple[str, str, Any]]) -> pd.DataFrame:
    part = pd.read_parquet(file, filters=bounds)
    kinds = {name: pd.Categorical(part[name].astype("str")) for name in ("exchange", "symbol")}
    return part.assign(**kinds, side=pd.Categorical(part["side"].astype("str"), categories=list(SIDES)))


async def _write(redis: Redis, path: Path, state: Resharded, settings: Settings, progress: Progress | None) -> None:
    """Write the events in numbered batches, sealing behind them."""
    sender, now_ms = Sender(redis, settings, state.name, own=(), now_ms=_NEVER_MS), clock.now_ms()
    await sender.begin()
    seq = done = 0
    for part, following_ms in _windows(path) if state.events else ():
        columns = Columns.of(part)
        for start in range(0, len(columns), state.batch):
            seq += 1
            await sender.send(sender.batch(seq, columns.rows(slice(start, start + state.batch))))
        done += len(columns)
        newest_ms = (following_ms or int(part["ts_ms"].iloc[-1])) + 1000 * settings.retention.hot_s
        await seal(redis, now_ms=min(newest_ms, now_ms), settings=settings)
        if progress:
            progress(done, state.events)


async def _verify(redis: Redis, path: Path, settings: Settings) -> None:
    """Compare the events that are there with those that were read, a new shard at a time, each value."""
    files = sorted(path.glob("events-*.parquet"))
    symbols = {str(name) for file in files for name in pd.read_parquet(file, columns=["symbol"])["symbol"].unique()}
    for shard in schema.shards_of(settings):
        own = sorted(name for name in symbols if schema.shard_of(name, settings.shards) == shard)
        wanted = concat([_events(file, [("symbol", "in", own)]) for file in files]) if own else empty()
        found = await archive.history(redis, settings=schema.only(settings, [shard]))
        if not _sorted(wanted).equals(_sorted(found)):
            raise MigrateError(
                f"of {len(wanted):,} events of shard {shard} {len(found):,} are there, or others; {path} has them all"
            )


def _sorted(events: pd.DataFrame) -> pd.DataFrame:
    plain = events.astype(dict.fromkeys(("exchange", "symbol", "side"), "str"))
    return plain.sort_values(list(plain.columns), ignore_index=True)


async def _forget(redis: Redis, state: Resharded, settings: Settings) -> None:
    """Let the numbers of the batches go: a second change has its own."""
    await redis.unlink(*(schema.BY_NAME["writer"].key(state.name, shard=n) for n in schema.shards_of(settings)))
