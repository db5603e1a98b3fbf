"""Other ways to keep percentiles, behind one interface, to be compared with the default.

All but `logbins` have a sorted set a symbol and bucket of time, `size:SYMBOL:BUCKET`; one method at a time owns them.
`logbins` is what the writer's batch fills.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from redis.asyncio import Redis

from liqlab import quantiles, schema
from liqlab.events import Columns, run_starts
from liqlab.quantiles import Distribution, Floats
from liqlab.settings import Settings, load
from liqlab.writer import Writer

# One by one: a sorted set that has had 129 members for a moment stays a skiplist, of ten times the bytes.
_BOUNDED: Final = """
for i = 3, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], ARGV[i], ARGV[i + 1])
  if redis.call('ZCARD', KEYS[1]) > tonumber(ARGV[2]) then redis.call(ARGV[1], KEYS[1]) end
end
"""
Rows = NDArray[np.intp]
_PAGE: Final = 500
TOP: Final = 100  # the original's bucket size
SAMPLE: Final = 126  # with the counter 127 members: from 129 on a sorted set takes ten times as much
_COUNT: Final = "n"  # the member of a reservoir that counts: its score is below all priorities, so it stays


class Method(ABC):
    """One way to keep the notionals of each symbol and bucket of time.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes.
    settings : Settings, optional
        `retention` is read; `liqlab.settings.load()` when absent.
    """

    name: ClassVar[str]
    biased: ClassVar[bool] = False

    def __init__(self, redis: Redis, *, settings: Settings | None = None) -> None:
        self.redis = redis
        self.settings = settings or load()

    @abstractmethod
    async def add(self, events: Columns) -> None:
        """Add the notionals of events, in time order."""

    @abstractmethod
    async def distribution(self, symbol: str, *, end_ms: int, window_s: int | None = None) -> Distribution:
        """Return the distribution of a symbol's trailing window; `retention.percentile_window_s` when absent."""

    @abstractmethod
    async def memory(self, symbol: str) -> int:
        """Return the bytes of what is kept of a symbol, by MEMORY USAGE."""

    async def quantiles(self, symbol: str, qs: ArrayLike, *, end_ms: int, window_s: int | None = None) -> Floats:
        """Return the values, USD, at or below which the parts `qs` of a symbol's trailing window lie; shape of `qs`."""
        return (await self.distribution(symbol, end_ms=end_ms, window_s=window_s)).quantiles(qs)

    async def rank(self, symbol: str, values: ArrayLike, *, end_ms: int, window_s: int | None = None) -> Floats:
        """Return which part of a symbol's trailing window is at most each value, 0 to 1."""
        return (await self.distribution(symbol, end_ms=end_ms, window_s=window_s)).rank(values)


class LogBins(Method):
    """The default: the sketches that every batch of the writer keeps."""

    name = "logbins"

    async def add(self, events: Columns) -> None:
        """Write the events: their sketches come along."""
        await Writer(self.redis, settings=self.settings).write_table(events.table())

    async def distribution(self, symbol: str, *, end_ms: int, window_s: int | None = None) -> Distribution:
        """See `liqlab.quantiles.distribution`."""
        return await quantiles.distribution(
            self.redis, symbol, end_ms=end_ms, window_s=window_s, settings=self.settings
        )

    async def memory(self, symbol: str) -> int:
        """See `liqlab.quantiles.memory`."""
        return await quantiles.memory(self.redis, symbol, settings=self.settings)


class _SortedSets(Method):
    """A sorted set a symbol and bucket."""

    async def add(self, events: Columns) -> None:
        """Add the notionals of events, in time order."""
        pipe = self.redis.pipeline(transaction=False)
        ttl = schema.BY_NAME["percentile"].ttl_s(self.settings)
        for key, rows in self._buckets(events):
            for command in self._commands(key, events.rows(rows), rows):
                pipe.execute_command(*command)
            pipe.execute_command("EXPIRE", key, ttl)
            if len(pipe.command_stack) >= _PAGE:
                await pipe.execute()
        await pipe.execute()

    async def memory(self, symbol: str) -> int:
        """Return the bytes of what is kept of a symbol, by MEMORY USAGE."""
        keys = [
            key
            async for key in self.redis.scan_iter(
                match=f"{schema.literal(schema.BY_NAME['percentile'].head(symbol))}*", count=1_000
            )
        ]
        return sum([int(await self.redis.memory_usage(key, samples=0) or 0) for key in keys])

    async def distribution(self, symbol: str, *, end_ms: int, window_s: int | None = None) -> Distribution:
        """Return the distribution of a symbol's trailing window."""
        window_ms = 1000 * (window_s or self.settings.retention.percentile_window_s)
        parts = quantiles.window_parts(end_ms, window_ms, self._bucket_ms)
        pipe = self.redis.pipeline(transaction=False)
        for bucket in parts:
            pipe.zrange(schema.BY_NAME["percentile"].key(symbol, bucket=bucket), 0, -1, withscores=True)
        values: list[float] = []
        weights: list[float] = []
        for members, part in zip(await pipe.execute(), parts.values(), strict=True):
            found, weight = self._weighed(members)
            values += found
            weights += [weight * part] * len(found)
        return Distribution.of(values, weights)

    @property
    def _bucket_ms(self) -> int:
        return 1000 * self.settings.retention.percentile_bucket_s

    def _buckets(self, events: Columns) -> Iterator[tuple[str, Rows]]:
        """Yield each key and the rows that belong to it."""
        buckets = events.ts_ms // self._bucket_ms
        order = np.lexsort((buckets, events.symbol))
        symbol, buckets = events.symbol[order], buckets[order]
        new = run_starts(symbol, buckets)
        for start, stop in zip(new.tolist(), [*new[1:].tolist(), len(order)], strict=True):
            name = events.symbols[symbol[start]]
            yield schema.BY_NAME["percentile"].key(name, bucket=int(buckets[start])), order[start:stop]

    @abstractmethod
    def _commands(self, key: str, events: Columns, rows: Rows) -> Iterator[tuple[Any, ...]]:
        """Yield what adds the events of one bucket, which are `rows` of those that came."""

    def _weighed(self, members: list[tuple[bytes, float]]) -> tuple[list[float], float]:
        """Return the values of a bucket and what each stands for."""
        return [score for _, score in members], 1.0


class Exact(_SortedSets):
    """Every value: what the others are measured against."""

    name = "exact"

    def _commands(self, key: str, events: Columns, rows: Rows) -> Iterator[tuple[Any, ...]]:
        pairs = zip(events.notional.tolist(), events.ts_ms.tolist(), rows.tolist(), strict=True)
        yield "ZADD", key, *(word for value, ms, row in pairs for word in (value, f"{ms}-{row}"))


class TopK(Exact):
    """The original's sorted set, trimmed to its 100 largest: high percentiles of a busy hour are all it knows."""

    name = "topk"
    biased = True

    def _commands(self, key: str, events: Columns, rows: Rows) -> Iterator[tuple[Any, ...]]:
        for _, _, *words in super()._commands(key, events, rows):
            yield "EVAL", _BOUNDED, 1, key, "ZPOPMIN", TOP, *words


class Reservoir(_SortedSets):
    """A uniform sample of each bucket, and how many values it stands for.

    Each value gets a priority that its own identity decides, and the lowest stay: whoever adds, in whatever order and
    however often, the sample is the same. (Bottom-k sampling; Cohen and Kaplan 2007.)
    """

    name = "reservoir"

    def _commands(self, key: str, events: Columns, rows: Rows) -> Iterator[tuple[Any, ...]]:
        identity = events.ts_ms.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        identity ^= events.notional.view(np.uint64) + rows.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
        priority = (_mixed(identity) >> np.uint64(11)).astype(np.float64) / 2.0**53
        lowest = np.argsort(priority, kind="stable")[:SAMPLE]
        pairs = zip(priority[lowest].tolist(), events.notional[lowest].tolist(), strict=True)
        words = (word for score, value in pairs for word in (score, f"{value!r}:{score!r}"))
        yield "ZINCRBY", key, -len(rows), _COUNT
        yield "EVAL", _BOUNDED, 1, key, "ZPOPMAX", SAMPLE + 1, *words

    def _weighed(self, members: list[tuple[bytes, float]]) -> tuple[list[float], float]:
        count = -sum(score for member, score in members if member == _COUNT.encode())
        values = [float(member.partition(b":")[0]) for member, _ in members if member != _COUNT.encode()]
        return values, count / max(len(values), 1)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return result


METHODS: Final[dict[str, Callable[..., Method]]] = {method.name: method for method in (Exact, LogBins, Reservoir, TopK)}
