"""Ways to keep percentiles, behind one interface: the default, and what it is to be compared with.

`detector.method` says which of them a detector asks. `logbins` is the default, which the writer's batch fills. `exact`,
`topk`, `reservoir` and `tdigest` have one key a symbol and bucket of time, `size:SYMBOL:BUCKET`, of which one method at
a time is the owner, and one detector fills it; `tdigest` needs a server that has TDIGEST. `unlimited` is every value in
the memory of this process: what the others would be without Redis.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from redis.asyncio import Redis

from liqlab import clock, quantiles, schema
from liqlab.events import Columns, run_starts
from liqlab.quantiles import Distribution, Floats
from liqlab.settings import Journal, Settings, load
from liqlab.writer import Writer

# One by one: a sorted set that has had 129 members for a moment stays a skiplist, of twice the bytes.
_BOUNDED: Final = """
for i = 3, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], ARGV[i], ARGV[i + 1])
  if redis.call('ZCARD', KEYS[1]) > tonumber(ARGV[2]) then redis.call(ARGV[1], KEYS[1]) end
end
"""
_DIGEST: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('TDIGEST.CREATE', KEYS[1], 'COMPRESSION', ARGV[1]) end
redis.call('TDIGEST.ADD', KEYS[1], unpack(ARGV, 2))
"""
Rows = NDArray[np.intp]
_PAGE: Final = 500
_ADDED: Final = 1_000  # values in one call of a script, which has room for about 8,000
_HALF: Final = 0.5
_LEVELS: Final = np.arange(1, 1_001) / 1_000
_COUNT: Final = "n"  # the member of a reservoir that counts: its score is below all priorities, so it stays


class Method(ABC):
    """One way to keep the notionals of each symbol and bucket of time.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes.
    settings : Settings, optional
        `retention`, `shards` and `detector.size` are read; `liqlab.settings.load()` when absent.

    Attributes
    ----------
    name : str
        In `METHODS`.
    biased : bool
        Whether more memory would not make it right.
    written : bool
        Whether the writer's batches fill it.
    usual : int or None
        The size of a bucket where `detector.size` is not set; None where a bucket has none.
    """

    name: ClassVar[str]
    biased: ClassVar[bool] = False
    written: ClassVar[bool] = False
    usual: ClassVar[int | None] = None

    def __init__(self, redis: Redis, *, settings: Settings | None = None) -> None:
        self.redis = redis
        self.settings = settings or load()

    @classmethod
    def size(cls, settings: Settings) -> int | None:
        """Return how many values a bucket keeps under settings, None where it has no such size."""
        return None if cls.usual is None else settings.detector.size or cls.usual

    @abstractmethod
    async def add(self, events: Columns) -> None:
        """Add the notionals of events, in time order."""

    @abstractmethod
    async def distribution(self, symbol: str, *, end_ms: int, window_s: int | None = None) -> Distribution:
        """Return the distribution of a symbol's trailing window; `retention.percentile_window_s` when absent."""

    async def asked(self, symbols: Sequence[str], *, end_ms: int) -> list[Callable[[], Distribution]]:
        """Ask for the distribution of each of several symbols as it is now; what can wait is done when it is called."""
        found = [await self.distribution(symbol, end_ms=end_ms) for symbol in symbols]
        return [partial(_found, one) for one in found]

    @abstractmethod
    async def memory(self, symbol: str) -> int:
        """Return the bytes of what is kept of a symbol, by MEMORY USAGE."""

    async def quantiles(self, symbol: str, qs: ArrayLike, *, end_ms: int, window_s: int | None = None) -> Floats:
        """Return the values, USD, at or below which the parts `qs` of a symbol's trailing window lie; shape of `qs`."""
        return (await self.distribution(symbol, end_ms=end_ms, window_s=window_s)).quantiles(qs)

    async def rank(self, symbol: str, values: ArrayLike, *, end_ms: int, window_s: int | None = None) -> Floats:
        """Return which part of a symbol's trailing window is at most each value, 0 to 1."""
        return (await self.distribution(symbol, end_ms=end_ms, window_s=window_s)).rank(values)


def _found(one: Distribution) -> Distribution:
    return one


class LogBins(Method):
    """The default: the sketches that every batch of the writer keeps."""

    name = "logbins"
    written = True

    def __init__(self, redis: Redis, *, settings: Settings | None = None) -> None:
        super().__init__(redis, settings=settings)
        own = {"journal": Journal(), "detector": self.settings.detector.model_copy(update={"method": self.name})}
        self._writer = Writer(redis, settings=self.settings.model_copy(update=own))

    async def add(self, events: Columns) -> None:
        """Write the events: their sketches come along."""
        await self._writer.write_table(events.table())

    async def distribution(self, symbol: str, *, end_ms: int, window_s: int | None = None) -> Distribution:
        """See `liqlab.quantiles.distribution`."""
        return await quantiles.distribution(
            self.redis, symbol, end_ms=end_ms, window_s=window_s, settings=self.settings
        )

    async def asked(self, symbols: Sequence[str], *, end_ms: int) -> list[Callable[[], Distribution]]:
        """See `liqlab.quantiles.asked`: all in one round trip."""
        return await quantiles.asked(self.redis, symbols, end_ms=end_ms, settings=self.settings)

    async def memory(self, symbol: str) -> int:
        """See `liqlab.quantiles.memory`."""
        return await quantiles.memory(self.redis, symbol, settings=self.settings)


class _Buckets(Method):
    """A key a symbol and bucket of time."""

    def __init__(self, redis: Redis, *, settings: Settings | None = None) -> None:
        super().__init__(redis, settings=settings)
        self._added = 0  # events, of earlier calls
        self._kept = self.size(self.settings) or 0

    async def add(self, events: Columns) -> None:
        """Add the notionals of events, in time order."""
        pipe = self.redis.pipeline(transaction=False)
        ttl = schema.BY_NAME["percentile"].ttl_s(self.settings)
        for key, rows in self._buckets(events):
            for command in self._commands(key, events.rows(rows), rows):
                pipe.execute_command(*command)
            pipe.execute_command("EXPIRE", key, ttl)
            if len(pipe) >= _PAGE:
                await pipe.execute()
        await pipe.execute()
        self._added += len(events)

    async def memory(self, symbol: str) -> int:
        """Return the bytes of what is kept of a symbol, by MEMORY USAGE."""
        pattern = f"{schema.literal(self._head(symbol))}*"
        keys = [key async for key in self.redis.scan_iter(match=pattern, count=1_000)]
        return sum([int(await self.redis.memory_usage(key, samples=0) or 0) for key in keys])

    def _window(self, symbol: str, end_ms: int, window_s: int | None) -> dict[str, float]:
        """Return the keys of a window, and which part of each it covers."""
        window_ms = 1000 * (window_s or self.settings.retention.percentile_window_s)
        parts = quantiles.window_parts(end_ms, window_ms, self._bucket_ms)
        head = self._head(symbol)
        return {f"{head}{bucket}": part for bucket, part in parts.items()}

    def _head(self, symbol: str) -> str:
        return schema.BY_NAME["percentile"].head(symbol, shard=schema.shard_of(symbol, self.settings.shards))

    @property
    def _bucket_ms(self) -> int:
        return 1000 * self.settings.retention.percentile_bucket_s

    def _buckets(self, events: Columns) -> Iterator[tuple[str, Rows]]:
        """Yield each key and the rows that belong to it."""
        if not len(events):
            return
        buckets = events.ts_ms // self._bucket_ms
        order = np.lexsort((buckets, events.symbol))
        symbol, buckets = events.symbol[order], buckets[order]
        new = run_starts(symbol, buckets)
        for start, stop in zip(new.tolist(), [*new[1:].tolist(), len(order)], strict=True):
            yield f"{self._head(events.symbols[symbol[start]])}{buckets[start]}", order[start:stop]

    @abstractmethod
    def _commands(self, key: str, events: Columns, rows: Rows) -> Iterator[tuple[Any, ...]]:
        """Yield what adds the events of one bucket, which are `rows` of those that came."""


class _SortedSets(_Buckets):
    async def distribution(self, symbol: str, *, end_ms: int, window_s: int | None = None) -> Distribution:
        """Return the distribution of a symbol's trailing window."""
        parts = self._window(symbol, end_ms, window_s)
        start_ms = end_ms - 1000 * (window_s or self.settings.retention.percentile_window_s)
        pipe = self.redis.pipeline(transaction=False)
        for key in parts:
            pipe.zrange(key, 0, -1, withscores=True)
        values: list[float] = []
        weights: list[float] = []
        for members, part in zip(await pipe.execute(), parts.values(), strict=True):
            found, weight = self._weighed(members, part, start_ms, end_ms)
            values += found
            weights += [weight] * len(found)
        return Distribution.of(values, weights)

    @abstractmethod
    def _weighed(
        self, members: list[tuple[bytes, float]], part: float, start_ms: int, end_ms: int
    ) -> tuple[list[float], float]:
        """Return the values of a bucket, of which the window covers a part, and what each stands for."""


class Exact(_SortedSets):
    """Every value: what the others are measured against."""

    name = "exact"

    def _commands(self, key: str, events: Columns, rows: Rows) -> Iterator[tuple[Any, ...]]:
        # The original's member, the time alone, lets the later of two events of a second overwrite the earlier one.
        pairs = zip(events.notional.tolist(), events.ts_ms.tolist(), (rows + self._added).tolist(), strict=True)
        yield "ZADD", key, *(word for value, ms, row in pairs for word in (value, f"{ms}-{row}"))

    def _weighed(
        self, members: list[tuple[bytes, float]], part: float, start_ms: int, end_ms: int
    ) -> tuple[list[float], float]:
        inside = (start_ms < int(member.partition(b"-")[0]) <= end_ms for member, _ in members)
        return [score for (_, score), counts in zip(members, inside, strict=True) if counts], 1.0


class TopK(Exact):
    """The original's sorted set, trimmed to its largest: high percentiles of a busy hour are all it knows."""

    name = "topk"
    biased = True
    usual = 100  # the original's

    def _commands(self, key: str, events: Columns, rows: Rows) -> Iterator[tuple[Any, ...]]:
        for _, _, *words in super()._commands(key, events, rows):
            yield "EVAL", _BOUNDED, 1, key, "ZPOPMIN", self._kept, *words


class Reservoir(_SortedSets):
    """A uniform sample of each bucket, and how many values it stands for.

    Each value gets a priority by its time, its amount and its place among those added with it, and the lowest stay: the
    same calls give the same sample, whatever was there. (Bottom-k sampling; Cohen and Kaplan 2007.) What is added again
    is counted again.
    """

    name = "reservoir"
    usual = 126  # with the counter 127 members: from 129 on a sorted set takes more than twice as much

    def _commands(self, key: str, events: Columns, rows: Rows) -> Iterator[tuple[Any, ...]]:
        identity = events.ts_ms.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        identity ^= events.notional.view(np.uint64) + rows.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
        priority = (_mixed(identity) >> np.uint64(11)).astype(np.float64) / 2.0**53
        lowest = np.argsort(priority, kind="stable")[: self._kept]
        pairs = zip(priority[lowest].tolist(), events.notional[lowest].tolist(), strict=True)
        words = (word for score, value in pairs for word in (score, f"{value!r}:{score!r}"))
        yield "ZINCRBY", key, -len(rows), _COUNT
        yield "EVAL", _BOUNDED, 1, key, "ZPOPMAX", self._kept + 1, *words

    def _weighed(
        self, members: list[tuple[bytes, float]], part: float, start_ms: int, end_ms: int
    ) -> tuple[list[float], float]:
        count = -sum(score for member, score in members if member == _COUNT.encode())
        values = [float(member.partition(b":")[0]) for member, _ in members if member != _COUNT.encode()]
        return values, part * count / max(len(values), 1)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return result


class TDigest(_Buckets):
    """The server's own digest (Dunning and Ertl 2019), one a bucket, merged for each question.

    Of the bucket that a window begins in, all is counted where the window covers half of it, else nothing. Adding is no
    increment that could be repeated: a batch whose reply was lost is counted twice.
    """

    name = "tdigest"
    usual = 100  # 9.8 KB

    def _commands(self, key: str, events: Columns, rows: Rows) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(rows), _ADDED):
            yield "EVAL", _DIGEST, 1, key, self._kept, *events.notional[start : start + _ADDED].tolist()

    async def distribution(self, symbol: str, *, end_ms: int, window_s: int | None = None) -> Distribution:
        """Return the distribution of a symbol's trailing window, at every tenth of a percentile."""
        values, count = await self._ask("TDIGEST.QUANTILE", symbol, _LEVELS, end_ms, window_s)
        return Distribution.of(values, np.full(len(values), count / len(_LEVELS))) if count else Distribution.of([])

    async def quantiles(self, symbol: str, qs: ArrayLike, *, end_ms: int, window_s: int | None = None) -> Floats:
        """Return TDIGEST.QUANTILE of a symbol's trailing window; shape of `qs`."""
        return (await self._ask("TDIGEST.QUANTILE", symbol, qs, end_ms, window_s))[0]

    async def rank(self, symbol: str, values: ArrayLike, *, end_ms: int, window_s: int | None = None) -> Floats:
        """Return TDIGEST.CDF of a symbol's trailing window, which counts half of the notionals that equal a value."""
        return (await self._ask("TDIGEST.CDF", symbol, values, end_ms, window_s))[0]

    async def _ask(
        self, command: str, symbol: str, values: ArrayLike, end_ms: int, window_s: int | None
    ) -> tuple[Floats, float]:
        """Return a command's answers on a window's merged digest, and how many notionals there are in it."""
        asked = np.asarray(values, np.float64)
        keys = [key for key, part in self._window(symbol, end_ms, window_s).items() if part >= _HALF]
        pipe = self.redis.pipeline(transaction=False)
        for key in keys:
            pipe.exists(key)
        there = [key for key, exists in zip(keys, await pipe.execute(), strict=True) if exists]
        if not there:
            return np.full(asked.shape, np.nan), 0.0
        merged = schema.BY_NAME["temporary"].key(f"tdigest-{clock.token()}")
        pipe.execute_command("TDIGEST.MERGE", merged, len(there), *there, "COMPRESSION", self._kept)
        pipe.execute_command(command, merged, *asked.ravel().tolist())
        pipe.execute_command("TDIGEST.INFO", merged)
        pipe.execute_command("TDIGEST.MIN", merged)
        pipe.unlink(merged)
        _, answers, info, least, _ = await pipe.execute()
        fields = info if isinstance(info, dict) else dict(zip(info[::2], info[1::2], strict=True))
        count = float(fields[b"Merged weight"]) + float(fields[b"Unmerged weight"])
        known = np.array(answers, np.float64).reshape(asked.shape)
        # Of one value, and below many equal ones, the module (2.8) has no answer but NaN.
        instead = float(least) if command == "TDIGEST.QUANTILE" else (asked >= float(least)).astype(np.float64)
        return np.where(np.isnan(known), instead, known), count


class Unlimited(Method):
    """Every value of every symbol, in the memory of this process: the truth that others are measured against."""

    name = "unlimited"

    def __init__(self, redis: Redis | None = None, *, settings: Settings | None = None) -> None:
        self.settings = settings or load()
        self._kept: dict[str, tuple[NDArray[np.int64], Floats]] = {}  # times and values, by value as far as known
        self._new: dict[str, list[tuple[NDArray[np.int64], Floats]]] = {}

    async def add(self, events: Columns) -> None:
        """Add the notionals of events."""
        order = np.argsort(events.symbol, kind="stable")
        starts = run_starts(events.symbol[order])
        for rows in np.split(order, starts[1:]) if len(order) else ():
            symbol = events.symbols[events.symbol[rows[0]]]
            self._new.setdefault(symbol, []).append((events.ts_ms[rows], events.notional[rows]))

    async def distribution(self, symbol: str, *, end_ms: int, window_s: int | None = None) -> Distribution:
        """Return the distribution of a symbol's trailing window, `end_ms` included."""
        times, values = self._sorted(symbol)
        first_ms = end_ms - 1000 * (window_s or self.settings.retention.percentile_window_s)
        return Distribution.of(values[(times > first_ms) & (times <= end_ms)])

    async def memory(self, symbol: str) -> int:
        """Return the bytes of a symbol's times and values."""
        times, values = self._sorted(symbol)
        return times.nbytes + values.nbytes

    def _sorted(self, symbol: str) -> tuple[NDArray[np.int64], Floats]:
        new = self._new.pop(symbol, [])
        if symbol in self._kept:
            new.insert(0, self._kept[symbol])
        if not new:
            return np.empty(0, np.int64), np.empty(0)
        times, values = (np.concatenate(column) for column in zip(*new, strict=True))
        order = np.argsort(values, kind="stable")  # quick on what is sorted but for its end
        self._kept[symbol] = times[order], values[order]
        return self._kept[symbol]


METHODS: Final[dict[str, type[Method]]] = {
    method.name: method for method in (LogBins, Exact, Reservoir, TDigest, TopK, Unlimited)
}
