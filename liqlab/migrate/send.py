"""The migration's way to the server: the writer's own numbered batches, less the sums that would have expired."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgpack
from redis.asyncio import Redis
from redis.utils import str_if_bytes

from liqlab import archive, schema
from liqlab.candles import WIDTHS
from liqlab.codecs import Names
from liqlab.link import Batch, Counts, Link
from liqlab.migrate.folder import Folder, Progress
from liqlab.migrate.sources import MigrateError
from liqlab.settings import Settings

_FOR_EVER_S = 10 * 365 * 86_400
_UNBOUNDED = 10**12
_TOP = "migration"  # of the family `writer`: which migration is under way


class Sender(Link):
    """Sends batches of a migration.

    Parameters
    ----------
    own : sequence of str
        Symbols whose streams liqlab reads as they are: they get a number, for where there is a table of names, readers
        know streams by it.
    now_ms : int
        Candles, VWAP, sketches and unique symbols that would have expired by then are not made.
    """

    def __init__(self, redis: Redis, settings: Settings, name: str, *, own: Sequence[str], now_ms: int) -> None:
        self.counts = Counts()
        super().__init__(redis, _settings(settings), name, self.counts)
        self._own = own
        self._now_ms = now_ms

    async def begin(self) -> None:
        """Learn the server's tables of names: a batch that it has already would not tell that they are others."""
        for shard in schema.shards_of(self._settings):
            await self._read_names(shard)

    def _pack(self, batch: Batch, shards: Collection[int | None], busy: Collection[str] = ()) -> None:
        for shard in shards:
            own = [name for name in self._own if schema.shard_of(name, self._settings.shards) == shard]
            self._names.setdefault(shard, Names()).of_symbols(own)
        super()._pack(batch, shards, busy)
        for shard in shards:
            part = batch.packed[shard]
            argument = _without_expired(part.keys, part.argument, self._now_ms, self._settings)
            batch.packed[shard] = part._replace(argument=argument)

    @property
    def epochs(self) -> dict[str, str]:
        """By shard that has a batch: the token of its table of names."""
        return {"" if shard is None else str(shard): epoch for shard, epoch in self._acknowledged.items()}


def _settings(settings: Settings) -> Settings:
    # The number of the last batch must outlive any interruption, and no event be pushed out by another.
    kept = {"writer_s": _FOR_EVER_S, "events_maxlen": _UNBOUNDED, "shared_maxlen": _UNBOUNDED}
    return settings.model_copy(
        update={
            "retention": settings.retention.model_copy(update=kept),
            "writer": settings.writer.model_copy(update={"strategy": "script"}),
        }
    )


def _without_expired(keys: list[str], argument: bytes, now_ms: int, settings: Settings) -> bytes:
    """Take out of a batch (write.lua has its shape) what a live server would no longer hold at `now_ms`."""
    parts: list[Any] = msgpack.unpackb(argument, raw=True, strict_map_key=False)
    *head, vwaps, candles, sketches, uniques = parts
    bucket_ms = 1000 * settings.retention.percentile_bucket_s
    newest_ms = [int(at) for at in vwaps[-1]]
    alive = [at >= now_ms - 1000 * vwaps[0] for at in newest_ms]
    vwaps = [vwaps[0], *_kept(vwaps[1:], alive)]
    for place, family in zip(range(1, len(candles), 3), WIDTHS.values(), strict=True):
        width, (ttl, places, cells) = schema.BY_NAME[family].bucket_ms, candles[place : place + 3]
        buckets = [int(keys[key - 1].rpartition(":")[2]) for key in places]
        alive = [bucket * width >= now_ms - 1000 * ttl for bucket in buckets]
        candles[place + 1 : place + 3] = _kept([places, cells], alive)
    alive = [hour * bucket_ms >= now_ms - 1000 * sketches[0] for hour in sketches[3]]
    sketches = [*sketches[:2], *_kept(sketches[2:], alive)]
    if max(newest_ms) < now_ms - 1000 * uniques[0]:
        uniques = [*uniques[:2], []]
    packed: bytes = msgpack.packb([*head, vwaps, candles, sketches, uniques], use_bin_type=False)
    return packed


def _kept(columns: list[list[Any]], alive: list[bool]) -> list[list[Any]]:
    return [[value for value, is_alive in zip(column, alive, strict=True) if is_alive] for column in columns]


async def last_batch(redis: Redis, folder: Folder, settings: Settings) -> int:
    """Return the number up to which the server has the batches, or less: 0 where it has lost its memory since.

    Raises
    ------
    MigrateError
        The server has the events but not the number.
    """
    progress, last = folder.progress, [folder.progress.seq]
    for text, epoch in progress.epochs.items():
        shard = int(text) if text else None
        head = await redis.lindex(schema.BY_NAME["names"].key(shard=shard), 0)
        if head is None or str_if_bytes(head) != epoch:
            if any(key.there for key in folder.manifest.keys):
                raise MigrateError(
                    f"the server has lost its memory, and with it events that it had before {folder.path} was made; "
                    "name another folder, so that they are migrated too"
                )
            folder.progress = Progress()
            return 0
        key = schema.BY_NAME["writer"].key(folder.manifest.name, shard=shard)
        seq = await redis.hget(key, "seq")
        if seq is None:
            raise MigrateError(
                f"{key} is gone from the server, and with it how many of its {progress.seq} batches were taken; "
                f"restore({str(folder.path)!r}, ...) into an empty server and migrate that"
            )
        last.append(int(seq))
    return min(last) if progress.epochs else 0


async def top_ms(redis: Redis, settings: Settings) -> int:
    """Return the newest time in an ID of a hot event, or that up to which events are sealed where it is later."""
    newest = 0
    for shard in schema.shards_of(settings):
        pipe = redis.pipeline(transaction=False)
        for key in await archive.streams(redis, shard):
            pipe.xrevrange(key, count=1)
        ends = [str_if_bytes(found[0][0]) for found in await pipe.execute() if found]
        sealed = await redis.lindex(schema.BY_NAME["names"].key(shard=shard), 1)
        newest = max(newest, int(sealed or 0), *(int(end.partition("-")[0]) for end in ends))
    return newest


async def claim(redis: Redis, path: str, name: str) -> None:
    """Note on the server that a migration is under way: two at once would count events twice.

    Raises
    ------
    MigrateError
        Another one is.
    """
    key = schema.BY_NAME["writer"].key(_TOP)
    if not await redis.hsetnx(key, "backup", path):
        other = str_if_bytes(await redis.hget(key, "backup") or b"")
        if other != path:
            raise MigrateError(
                f"a migration with the backup {other} is under way on this server; finish that one, or DEL {key} if it "
                "never wrote anything"
            )
    await redis.hset(key, "name", name)
    await redis.expire(key, _FOR_EVER_S)  # a key without a TTL would be given one


async def unclaim(redis: Redis) -> None:
    """Give up the claim of a migration that has not begun."""
    if not await claimed(redis):
        await redis.delete(schema.BY_NAME["writer"].key(_TOP))


async def claimed(redis: Redis) -> str:
    """Return the name of the migration that is under way, empty for none."""
    return str_if_bytes(await redis.hget(schema.BY_NAME["writer"].key(_TOP), "name") or b"")


async def release(redis: Redis, folder: Folder, settings: Settings) -> None:
    """Give up the claim, and let the numbers expire as a writer's do."""
    for shard in schema.shards_of(settings):
        key = schema.BY_NAME["writer"].key(folder.manifest.name, shard=shard)
        await redis.expire(key, settings.retention.writer_s)
    if await claimed(redis) == folder.manifest.name:
        await redis.delete(schema.BY_NAME["writer"].key(_TOP))
