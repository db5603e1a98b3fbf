"""Legacy keys back from a backup."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from redis.asyncio import Redis

from liqlab import clock
from liqlab.migrate.folder import Folder
from liqlab.migrate.sources import MigrateError, name, state_of

Progress = Callable[[int, int], None]
_RESTORING: Final = ".restoring"


async def restore(backup: str | Path, redis: Redis, *, progress: Progress | None = None) -> int:
    """Bring back the legacy keys of a backup, as they were; keys that are there as they were are passed over.

    A key is filled under another name, compared with the backup, and then renamed: it is whole or not there.

    Parameters
    ----------
    backup : path
        The folder.
    redis : redis.asyncio.Redis
        Any server; only those keys are written.
    progress : callable, optional
        Called with (entries done, entries in all).

    Returns
    -------
    int
        Keys restored.

    Raises
    ------
    MigrateError
        The folder is no backup, or a key of that name holds something else: nothing is overwritten.
    """
    folder = Folder(Path(backup).absolute())
    keys = folder.manifest.keys
    wanted: set[int] = set()
    for number, key in enumerate(keys):
        kind, count, state = await state_of(redis, key.source.key)
        if kind == "none":
            wanted.add(number)
            await redis.unlink(name(key.source.key + _RESTORING))
        elif state != key.source.state:
            raise MigrateError(
                f"{key.source.key} is on this server with {count} {kind} entries, and had {key.source.entries} in "
                f"{folder.path}; nothing is overwritten: remove or rename it first"
            )
    done, total = 0, sum(key.source.entries for key in keys)
    for number, page in folder.legacy():
        if number in wanted:
            target, pipe = name(keys[number].source.key + _RESTORING), redis.pipeline(transaction=False)
            for when, words in page:
                if keys[number].source.kind == "zset":
                    pipe.execute_command("ZADD", target, repr(when), *words)
                else:
                    pipe.execute_command("XADD", target, when, *words)
            await pipe.execute()
        done += len(page)
        if progress:
            progress(done, total)
    for number in sorted(wanted):
        source = keys[number].source
        _, _, state = await state_of(redis, source.key + _RESTORING)
        if state != source.state:
            raise MigrateError(f"{source.key} came back otherwise than it was; it is in {source.key + _RESTORING}")
        if source.expires_ms > clock.now_ms():
            await redis.pexpireat(name(source.key + _RESTORING), source.expires_ms)
        if not await redis.renamenx(name(source.key + _RESTORING), name(source.key)):
            raise MigrateError(f"{source.key} was made by another program meanwhile; remove or rename it first")
    return len(wanted)
