"""How each family gives bytes back: what is oldest goes first, and only what a command really frees.

XTRIM is exact here: with ``~`` it frees whole nodes only, nothing of a short stream, and at most 10,000 entries a call.
XDEL appears nowhere: a deleted entry keeps its bytes until its whole node is gone.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import pandas as pd
from redis.asyncio import Redis

from liqlab import archive, schema
from liqlab.budget import sizes
from liqlab.candles import WIDTHS
from liqlab.codecs import block_span
from liqlab.settings import Settings

_PAGE: Final = 1_000
_BLOCKS: Final = 16  # read at a time, to count their events
_ROUNDS: Final = 8
_FEW: Final = 500  # entries of a stream below which its bytes an entry say little: a node is allocated in advance
_HOT_BYTES: Final = 32.0  # an event, where too few are there to measure
STATISTICS: Final = tuple(WIDTHS.values())  # the finest candles pay first: an hourly one stands for sixty of a minute
_DROP_EMPTY: Final = """
local n = 0
for _, key in ipairs(KEYS) do
  if redis.call('TYPE', key).ok == 'stream' and redis.call('XLEN', key) == 0 then n = n + redis.call('DEL', key) end
end
return n
"""
_DROP_IDLE: Final = """
local n = 0
for _, key in ipairs(KEYS) do
  local last = redis.call('TYPE', key).ok == 'hash' and redis.call('HGET', key, 'last_update')
  if last and tonumber(last) < tonumber(ARGV[1]) then
    n = n + 1
    if ARGV[2] == '0' then redis.call('DEL', key) end
  end
end
return n
"""


class Freed(NamedTuple):
    """Keys and events that were removed, or in a dry run would be, and one sentence."""

    keys: int = 0
    events: int = 0
    detail: str = ""


class Streams(NamedTuple):
    """The event streams of one shard.

    Attributes
    ----------
    table : pandas.DataFrame
        Of `liqlab.budget.sizes`: hot streams, blocks, names.
    shared, blocks : str
        The keys of the stream that symbols share and of the blocks.
    """

    table: pd.DataFrame
    shared: str
    blocks: str

    @property
    def bytes(self) -> float:
        """All of them, the table of names too."""
        return float(self.table["bytes"].sum())

    def of(self, key: str) -> tuple[int, float]:
        """Return the entries and the bytes of one key; zeros where there is none."""
        rows = self.table[self.table.index == key]
        return int(rows["members"].sum()), float(rows["bytes"].sum())

    def block_bytes(self, settings: Settings) -> float:
        """Return the bytes of a block with all that Redis keeps around it."""
        count, size = self.of(self.blocks)
        return size / count if count >= _BLOCKS else 1.25 * settings.writer.block_bytes

    def event_bytes(self) -> float:
        """Return the bytes of an event in the shared stream."""
        count, size = self.of(self.shared)
        return size / count if count >= _FEW else _HOT_BYTES

    @property
    def own(self) -> pd.DataFrame:
        """The streams that belong to one symbol each."""
        kinds = self.table[self.table["type"] == "stream"]
        return kinds[~kinds.index.isin([self.shared, self.blocks])]


async def streams(redis: Redis, shard: int | None) -> Streams:
    """Measure the event streams of one shard."""
    shared, blocks, names = (schema.BY_NAME[name].key(shard=shard) for name in ("events", "blocks", "names"))
    table = await sizes(redis, [*await archive.streams(redis, shard), blocks, names])
    return Streams(table, shared, blocks)


async def to_bytes(redis: Redis, shard: int | None, target: float, settings: Settings, *, dry_run: bool) -> Freed:
    """Trim the event streams of a shard to a number of bytes: the oldest blocks, then the oldest hot events.

    Hot streams are cut at one time, all of them: what a symbol may keep follows from how busy it is.
    """
    blocks = events = 0
    cut_ms = None
    for turn in range(_ROUNDS):
        now = await streams(redis, shard)
        over = now.bytes - target
        if over <= 0:
            break
        stored, size = now.of(now.blocks)
        if stored:
            oldest = min(math.ceil(over / now.block_bytes(settings)), stored)
            blocks += oldest
            events += await _events_of(redis, now.blocks, oldest)
            if not dry_run:
                await redis.xtrim(now.blocks, maxlen=stored - oldest, approximate=False)
            over -= oldest * size / stored
        if over > 0:
            removed, cut_ms = await _cut_hot(redis, now, over * 2**turn, dry_run=dry_run)
            events += removed
            if removed == 0:
                break
        if dry_run:
            break
    if blocks == events == 0:
        return Freed()
    detail = f"the oldest {blocks:,} blocks" if blocks else "hot events"
    return Freed(0, events, detail + (f"; hot ones before {when(cut_ms)}" if cut_ms else ""))


async def _events_of(redis: Redis, key: str, count: int) -> int:
    """Return how many events the oldest blocks hold; those of `msgpack-zlib` do not say."""
    total, start = 0, "-"
    while count > 0:
        page: Any = await redis.xrange(key, start, "+", count=min(count, _BLOCKS))
        if not page:
            break
        total += sum(block_span(fields[b"b"])[0] for _, fields in page if b"b" in fields)
        count -= len(page)
        start = "(" + page[-1][0].decode()
    return total


async def _cut_hot(redis: Redis, now: Streams, over: float, *, dry_run: bool) -> tuple[int, int]:
    """Cut all hot streams at the time before which about `over` bytes lie; return events removed and that time."""
    hot = now.table[(now.table["type"] == "stream") & (now.table.index != now.blocks) & (now.table["members"] > 0)]
    if hot.empty:
        return 0, 0
    part = min(over / float(hot["bytes"].sum()), 1.0)
    if len(hot) == 1:  # by number: in a burst, events are anything but evenly spread in time
        held = int(hot["members"].iloc[0])
        return await _cut_one(redis, str(hot.index[0]), math.ceil(part * held), held, dry_run=dry_run)
    pipe = redis.pipeline(transaction=False)
    for key in hot.index:
        pipe.execute_command("XRANGE", key, "-", "+", "COUNT", 1)
        pipe.execute_command("XREVRANGE", key, "+", "-", "COUNT", 1)
    ends = [int(entries[0][0].partition(b"-")[0]) for entries in await pipe.execute() if entries]
    first, last = min(ends), max(ends)
    # Taken as evenly spread in time: a round that cuts too little is followed by another that cuts more.
    cut_ms = first + max(math.ceil((last + 1 - first) * part), 1)
    if dry_run:  # an estimate: to count, one would have to read them all
        return math.ceil(part * int(hot["members"].sum())), cut_ms
    pipe = redis.pipeline(transaction=False)
    for key in hot.index:
        pipe.xtrim(key, minid=cut_ms, approximate=False)
    return sum(map(int, await pipe.execute())), cut_ms


async def _cut_one(redis: Redis, key: str, count: int, held: int, *, dry_run: bool) -> tuple[int, int]:
    """Cut the oldest of a stream's events; return how many, and the time of the oldest that stays, 0 if unknown."""
    if dry_run:  # which one stays cannot be told without reading all before it
        return count, 0
    removed = int(await redis.xtrim(key, maxlen=held - count, approximate=False))
    rest: Any = await redis.xrange(key, count=1)
    return removed, int(rest[0][0].partition(b"-")[0]) if rest else 0


async def empty_streams(redis: Redis, shard: int | None, *, dry_run: bool) -> Freed:
    """Remove the streams of symbols that fell silent: one keeps its 4 KB even when its last event is gone."""
    now = await streams(redis, shard)
    idle = now.own.index[now.own["members"] == 0].tolist()
    if idle and not dry_run:
        script = redis.register_script(_DROP_EMPTY)  # by a script, lest an event come between the look and the removal
        idle = idle[: sum([int(await script(keys=idle[at : at + _PAGE])) for at in range(0, len(idle), _PAGE)])]
    return Freed(len(idle), 0, "streams of symbols that are silent" if idle else "")


async def buckets(
    redis: Redis, name: str, settings: Settings, excess: float, each: float, oldest_ms: int, *, dry_run: bool
) -> Freed:
    """Remove the oldest keys of a family that has one key a bucket of time.

    Parameters
    ----------
    name : str
        The family.
    excess : float
        Bytes to give back.
    each : float
        Bytes of a key.
    oldest_ms : int
        Keys whose bucket ended before that time go in any case.
    """
    family, ages = schema.BY_NAME[name], list[tuple[int, bytes]]()
    width_ms = family.width_ms(settings)
    async for key in redis.scan_iter(match=f"{family.pattern.split(':')[0]}:*", count=_PAGE):
        end = key.rpartition(b":")[2]
        if end.isdigit():
            ages.append(((int(end) + 1) * width_ms, key))
    ages.sort()
    due = sum(1 for end_ms, _ in ages if end_ms <= oldest_ms)
    count = max(due, min(math.ceil(max(excess, 0) / max(each, 1)), len(ages)))
    if count == 0:
        return Freed()
    if not dry_run:
        await unlink(redis, [key for _, key in ages[:count]])
    return Freed(count, 0, f"all that ended before {when(ages[count - 1][0])}")


async def hours(redis: Redis, excess_part: float, oldest: int, *, dry_run: bool) -> Freed:
    """Remove the oldest hours of all sketches.

    Parameters
    ----------
    excess_part : float
        Of their bytes, the part to give back.
    oldest : int
        Buckets before this one go in any case.
    """
    keys = [key async for key in redis.scan_iter(match="sketch:*", count=_PAGE)]
    fields: list[tuple[int, bytes]] = []
    for start in range(0, len(keys), _PAGE):
        pipe = redis.pipeline(transaction=False)
        for key in keys[start : start + _PAGE]:
            pipe.hkeys(key)
        for key, found in zip(keys[start : start + _PAGE], await pipe.execute(), strict=True):
            fields += [(int(hour), key) for hour in found]
    fields.sort()
    due = sum(1 for hour, _ in fields if hour < oldest)
    count = max(due, math.ceil(len(fields) * min(max(excess_part, 0.0), 1.0)))
    gone = fields[:count]
    if gone and not dry_run:
        for start in range(0, len(gone), _PAGE):
            pipe = redis.pipeline(transaction=False)
            for hour, key in gone[start : start + _PAGE]:
                pipe.hdel(key, str(hour))
            await pipe.execute()
    return Freed(len({key for _, key in gone}), 0, f"{len(gone):,} hours of sketches" if gone else "")


async def temporary(redis: Redis, *, dry_run: bool) -> Freed:
    """Remove the families that are the first to go: ``temp:*``, ``debug:*``, ``stats:old:*``."""
    keys = [
        key
        for name in ("temporary", "debug", "stats_old")
        async for key in redis.scan_iter(match=schema.BY_NAME[name].pattern, count=_PAGE)
    ]
    if not dry_run:
        await unlink(redis, keys)
    patterns = ", ".join(schema.BY_NAME[name].pattern for name in ("temporary", "debug", "stats_old"))
    return Freed(len(keys), 0, patterns if keys else "")


async def idle_vwaps(redis: Redis, before_ms: int, *, dry_run: bool) -> Freed:
    """Remove the VWAPs that nothing was added to since a time; a TTL does it too, unless something took it away."""
    script, count = redis.register_script(_DROP_IDLE), 0
    keys = [key async for key in redis.scan_iter(match="vwap:*", count=_PAGE)]
    for part in schema.by_shard(keys):
        for start in range(0, len(part), _PAGE):
            count += int(await script(keys=part[start : start + _PAGE], args=[before_ms, int(dry_run)]))
    return Freed(count, 0, f"idle since {when(before_ms)}" if count else "")


async def without_ttl(redis: Redis, name: str | None, settings: Settings, *, dry_run: bool) -> Freed:
    """Give keys the TTL of their family that have lost it: nothing would ever remove them.

    Parameters
    ----------
    name : str or None
        One family, all when None.
    """
    # Where no other keys live for ever than those that may, none has to be asked.
    space = await redis.info("keyspace")
    here = space.get(f"db{redis.connection_pool.connection_kwargs.get('db') or 0}", {"keys": 0, "expires": 0})
    immortal = [
        schema.BY_NAME[one].key(shard=shard) for one in ("names", "limits") for shard in schema.shards_of(settings)
    ]
    if here["keys"] - here["expires"] <= await redis.exists(*immortal):
        return Freed()
    head = schema.BY_NAME[name].pattern.split(":")[0] + ":*" if name else "*"
    orphans: dict[str, list[bytes]] = {}
    page: list[tuple[bytes, str]] = []

    async def look() -> None:
        pipe = redis.pipeline(transaction=False)
        for key, _ in page:
            pipe.ttl(key)
        for (key, family), ttl in zip(page, await pipe.execute(), strict=True):
            if ttl == -1:
                orphans.setdefault(family, []).append(key)
        page.clear()

    async for key in redis.scan_iter(match=head, count=_PAGE):
        family = schema.family_of(key.decode(errors="replace"))
        if family is not None and family.ttl is not None and not family.critical:
            page.append((key, family.name))
        if len(page) >= _PAGE:
            await look()
    if page:
        await look()
    for family_name, keys in orphans.items():
        ttl = schema.BY_NAME[family_name].ttl_s(settings)
        assert ttl is not None
        pipe = redis.pipeline(transaction=False)
        for key in keys if not dry_run else ():
            pipe.expire(key, ttl, nx=True)
        await pipe.execute()
    words = ", ".join(f"{len(keys):,} of {family_name}" for family_name, keys in orphans.items())
    return Freed(sum(map(len, orphans.values())), 0, f"keys without a TTL: {words}" if orphans else "")


async def unlink(redis: Redis, keys: list[bytes]) -> None:
    """Remove keys, their memory in the background."""
    for start in range(0, len(keys), _PAGE):
        await redis.unlink(*keys[start : start + _PAGE])


def when(ms: int) -> str:
    """Return a time as a sentence has it, UTC."""
    return f"{pd.Timestamp(ms, unit='ms'):%Y-%m-%d %H:%M:%S}"
