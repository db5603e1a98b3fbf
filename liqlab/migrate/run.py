"""The migration itself: backup, write, seal, verify, and on request remove; each step may be killed and begun again."""

from __future__ import annotations

import asyncio
import fcntl
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, RedisError

from liqlab import clock
from liqlab.link import MemoryLostError
from liqlab.migrate.folder import Folder, Key, Manifest, make, present
from liqlab.migrate.planning import PREFIXES, SEAL_EVENTS, Plan, batch_events, plan
from liqlab.migrate.result import DRY, Migrated, result
from liqlab.migrate.send import Sender, claim, claimed, last_batch, release, top_ms, unclaim
from liqlab.migrate.sources import OWN, MigrateError, Reader, find, state_of, unlink
from liqlab.sealing import seal
from liqlab.settings import Settings, load

Progress = Callable[[int, int], None]
_FREED: Final = 200  # waits of 50 ms for the server to free what was unlinked


async def migrate(
    redis: Redis,
    *,
    backup: str | Path,
    settings: Settings | None = None,
    prefixes: Sequence[str] = PREFIXES,
    exchange: str | None = None,
    dry_run: bool = False,
    remove: bool = False,
    now_ms: int | None = None,
    progress: Progress | None = None,
) -> Migrated:
    """Bring the events of legacy keys into liqlab's, each once. Interrupted anywhere, the same call goes on.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        From `liqlab.connect`.
    backup : path
        The folder of the backup. Where it is not there, a migration begins; where it is, that one goes on.
    settings : Settings, optional
        `writer`, `retention`, `shards`, `feeds` and `thresholds` are read; `liqlab.settings.load()` when absent.
    prefixes, exchange
        See `liqlab.migrate.plan`; they count when a migration begins.
    dry_run : bool
        Read and account for everything, in a temporary folder, and write nothing to Redis.
    remove : bool
        Whether an old key is removed once its events have been read back from Redis, if it has not changed since the
        backup.
    now_ms : int, optional
        Wall time when absent. Events older than `retention.hot_s` are sealed, sums that would have expired not made.
    progress : callable, optional
        Called with (steps done, steps in all).

    Returns
    -------
    Migrated

    Raises
    ------
    MigrateError
        There is nothing to migrate, no room for it, another migration is under way, or the folder is of another server.
    """
    settings, path = settings or load(), Path(backup).absolute()
    now_ms = clock.now_ms() if now_ms is None else now_ms
    made: Plan | None
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="liqlab-") as scratch:
            folder, made = await _begin(redis, Path(scratch) / "dry", settings, prefixes, exchange, remove, progress)
            folder.progress.found = {str(at): key.accepted for at, key in enumerate(folder.manifest.keys)}
            return result(folder, [DRY] * len(folder.manifest.keys), {}, made)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = None
    with alone(path.parent):
        if path.exists():
            folder = Folder(path)
            await _same_server(redis, folder, settings, remove)
        else:
            await claim(redis, str(path), "")
            try:
                folder, made = await _begin(redis, path, settings, prefixes, exchange, remove, progress)
            except BaseException:
                with suppress(RedisError):
                    await unclaim(redis)
                raise
            await claim(redis, str(path), folder.manifest.name)
        verdicts, memory = await _run(redis, folder, settings, remove, now_ms, progress)
        if not folder.progress.done:
            folder.progress.done = True
            folder.save(sync=True)
        await release(redis, folder, settings)
        return result(folder, verdicts, memory, made)


async def _begin(
    redis: Redis,
    path: Path,
    settings: Settings,
    prefixes: Sequence[str],
    exchange: str | None,
    removing: bool,
    progress: Progress | None,
) -> tuple[Folder, Plan]:
    made = await plan(redis, settings=settings, prefixes=prefixes, exchange=exchange, remove=removing)
    if not made.sources:
        raise MigrateError(
            f"no key begins with {' or '.join(f'{prefix}: or {prefix}-' for prefix in prefixes)}; name others with "
            "prefixes=, as liquidations of liquidations:BTCUSDT"
        )
    if made.problem:
        raise MigrateError(made.problem)
    keys = [Key(source, chunk) for source, chunk in zip(made.sources, made.chunks, strict=True)]
    manifest = Manifest(
        name=clock.token(),
        made_ms=clock.now_ms(),
        batch=batch_events(settings),
        shards=settings.shards,
        used_memory=await _used(redis),
        keys=keys,
        notes=list(made.notes),
    )
    total = sum(source.entries for source in made.sources)

    def tell(done: int) -> None:
        if progress:
            progress(done, 3 * total)

    folder = await make(
        redis, path, manifest, lambda file: Reader(settings, exchange=exchange, quarantine=file), settings, tell
    )
    return folder, made


async def _same_server(redis: Redis, folder: Folder, settings: Settings, removing: bool) -> None:
    """Refuse a backup that is of another server, or that other settings or a lost memory keep from going on."""
    manifest = folder.manifest
    if manifest.shards != settings.shards:
        raise MigrateError(f"shards = {settings.shards}, but {folder.path} was begun with {manifest.shards}; set that")
    if max(key.chunk for key in manifest.keys) and not removing:
        raise MigrateError(f"{folder.path} was begun with remove=True, as there is no room without; pass it again")
    if folder.progress.done or await claimed(redis) == manifest.name:
        return
    # No claim: the server came back without its memory, or is another. What is the same in every key may go on.
    for number, key in enumerate(manifest.keys):
        kind, count, state = await state_of(redis, key.source.key)
        if state != key.source.state and number not in folder.progress.removed:
            there = f"{count} {kind} entries" if kind != "none" else "no such key"
            raise MigrateError(
                f"{folder.path} is the backup of another server: {key.source.key} had {key.source.entries} entries, "
                f"here there is {there}; name another folder, or restore() that one if this server lost its memory"
            )
    await claim(redis, str(folder.path), manifest.name)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second process out, which would make the same backup at the same time."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MigrateError(f"another migration is writing to {folder}; let it finish, or name another") from None
        yield
    finally:
        os.close(handle)


async def _run(
    redis: Redis, folder: Folder, settings: Settings, removing: bool, now_ms: int, progress: Progress | None
) -> tuple[list[str], dict[str, int]]:
    keys = folder.manifest.keys
    memory = {"before": folder.manifest.used_memory}
    total, written, verified = sum(key.source.entries for key in keys), 0, 0

    def tell(done: int = 0) -> None:
        if progress:
            progress(min(total + written + verified + done, 3 * total), 3 * total)

    own = [source.symbol for source in await find(redis, ()) if source.form == OWN]
    # Streams that the original's writer left are sealed along: readers would take them for sealed by their age.
    layout = "hybrid" if own else settings.writer.layout
    sealing = settings.model_copy(update={"writer": settings.writer.model_copy(update={"layout": layout})})
    sender = Sender(redis, settings, folder.manifest.name, own=own, now_ms=now_ms)
    await sender.begin()
    after = 0 if folder.progress.done else await last_batch(redis, folder, settings)
    verdicts: dict[int, str] = {}
    for chunk in sorted({key.chunk for key in keys}):
        part = [number for number, key in enumerate(keys) if key.chunk == chunk]
        if not folder.progress.done:
            await _write(redis, folder, chunk, after, sender, sealing, now_ms, tell)
        written += sum(keys[number].source.entries for number in part)
        await verify(redis, folder, chunk, settings, tell)
        verified += sum(keys[number].source.entries for number in part)
        memory["both"] = max(memory.get("both", 0), await _used(redis))
        verdicts |= await _settle(redis, folder, part, removing)
        if removing:
            memory["after"] = await _used(redis)
        tell()
    return [verdicts[number] for number in range(len(keys))], memory


async def _write(
    redis: Redis,
    folder: Folder,
    chunk: int,
    after: int,
    sender: Sender,
    settings: Settings,
    now_ms: int,
    tell: Callable[[int], None],
) -> None:
    """Send the batches of a chunk, and seal behind them: so the hot streams stay small."""
    hot_ms = 1000 * settings.retention.hot_s
    done, unsealed, late = 0, 0, sender.counts.late
    for seq, events, following_ms in folder.batches(chunk, after):
        try:
            await sender.send(sender.batch(seq, events))
        except MemoryLostError as error:
            raise MigrateError(
                f"batch {seq}: {error}; restore({str(folder.path)!r}, ...), then run this again"
            ) from error
        except RedisError as error:
            cure = "free memory or raise maxmemory" if isinstance(error, OutOfMemoryError) else "check the server"
            raise MigrateError(f"batch {seq}: {error}; {cure}, then run this again: it goes on there") from error
        folder.progress.seq, folder.progress.epochs = seq, folder.progress.epochs | sender.epochs
        folder.save()
        done, unsealed = done + len(events), unsealed + len(events)
        if sender.counts.late > late:
            # All that come late lie at one moment, behind the newest event, and a block cannot cut through a moment.
            late, unsealed = sender.counts.late, 0
            await seal(redis, now_ms=await top_ms(redis, settings) + 1 + hot_ms, settings=settings, partial=True)
        elif unsealed >= SEAL_EVENTS:
            await seal(redis, now_ms=min(following_ms + hot_ms, now_ms), settings=settings)
            unsealed = 0
        tell(done)
    await seal(redis, now_ms=now_ms, settings=settings, partial=True)


async def verify(redis: Redis, folder: Folder, chunk: int, settings: Settings, tell: Callable[[int], None]) -> None:
    """Read the events of a chunk back from Redis, and count those that are there by key."""
    keys = folder.manifest.keys
    gone = set(folder.progress.removed)
    found: Counter[int] = Counter()
    done = 0
    if all(number in gone for number, key in enumerate(keys) if key.chunk == chunk):
        return
    for events, of_key in folder.windows(chunk):
        there = await present(redis, events, settings)
        numbers, counts = np.unique(of_key[there], return_counts=True)
        found.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
        done += len(events)
        tell(done)
    for number, key in enumerate(keys):
        if key.chunk == chunk and number not in gone:  # a key that is removed was found whole before
            folder.progress.found[str(number)] = found[number]
    folder.save()


async def _settle(redis: Redis, folder: Folder, part: list[int], removing: bool) -> dict[int, str]:
    """Return a verdict on each key of a part, and remove those that are found whole."""
    keys, state, verdicts = folder.manifest.keys, folder.progress, dict[int, str]()
    for number in part:
        missing = keys[number].accepted - state.found.get(str(number), 0)
        verdicts[number] = "migrated"
        if missing:
            verdicts[number] = f"{missing} of {keys[number].accepted} events are not in Redis (any more): kept"
    whole = [number for number in part if verdicts[number] == "migrated"]
    if removing:
        # Noted first: a key that is missing for any other reason would be another server's.
        state.removed = sorted({*state.removed, *whole})
        folder.save(sync=True)
    for number in whole if removing else set(state.removed).intersection(part):
        source = keys[number].source
        outcome = await unlink(redis, source) if removing else (await state_of(redis, source.key))[0]
        if outcome == "changed":
            state.removed.remove(number)
            verdicts[number] = (
                "migrated; the old key has changed since the backup: kept, migrate it again into another folder"
            )
        elif outcome in ("removed", "gone", "none"):
            verdicts[number] = "removed"
    folder.save()
    return verdicts


async def _used(redis: Redis) -> int:
    """Return used_memory without the buffers of clients, once what was unlinked has been freed."""
    for _ in range(_FREED):
        info = await redis.info("memory")
        if not info.get("lazyfree_pending_objects"):
            break
        await asyncio.sleep(0.05)
    return int(info["used_memory"]) - int(info["mem_clients_normal"])
