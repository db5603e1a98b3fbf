"""Percentiles of notionals over a trailing window, of one symbol or of all.

The default keeps, in one hash a symbol and one field an hour (`sketch:SYMBOL`), how many notionals fall into each of a
row of log-spaced bins. A quiet symbol pays for one key, not for 24. A field is the least and the largest notional, when
the first and the last came, and then 16-bit words: each a bin, and either the quarter of it in which the only value
lies, or two to five values; words of the same bin add up. A batch of the writer appends its own, and write.lua folds
them together from time to time, and when the hour is over.

`liqlab.percentiles` has the other ways, to be compared with.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from redis.asyncio import Redis

from liqlab import schema
from liqlab.settings import Settings, load

ACCURACY: Final = 0.01  # relative, of the value that stands for a bin
_LOG_GAMMA: Final = float(np.log((1 + ACCURACY) / (1 - ACCURACY)))
_QUARTERS: Final = 4  # of a bin: 0 to 3 in the low three bits of a word is where its value lies; write.lua has the same
_EACH: Final = 5  # values that a word can count, from two on: 4 to 7 in those bits
_WORD: Final = 8
_HEAD: Final = struct.Struct("<ddHH")
HEAD: Final = np.dtype([("least", "<f8"), ("most", "<f8"), ("first", "<u2"), ("last", "<u2")])
_TICKS: Final = 1 << 16  # of a bucket: 55 ms of an hour
_MIDDLE: Final = 1 << 12  # the bin of 1 USD among the 8,192 that the other bits name: 1e-35 to 1e35 USD
_PAGE: Final = 500
_SCANNED: Final = 1_000
_REMEMBERED: Final = 1 << 14  # fields: a day of 680 symbols, 10 to 70 MB

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_Counted = tuple[bytes, float]  # a field, and which part of it is meant


def quarters(values: Floats) -> Ints:
    """Return the quarter bin of each value: k where gamma^((k-1)/4) < value <= gamma^(k/4), see `log_bins`.

    Values beyond 1e35 and below 1e-35 are in the last and the first one.

    Parameters
    ----------
    values : array of float64, shape (n,)
        Finite and positive.
    """
    found = np.ceil(np.log(values) / (_LOG_GAMMA / _QUARTERS))
    return np.clip(found, -_QUARTERS * _MIDDLE, _QUARTERS * (_MIDDLE - 1)).astype(np.int64)


def represented(values: Floats) -> Floats:
    """Return the middles of the quarters that values lie in: what a sketch answers of each value by itself."""
    middle: Floats = np.exp((quarters(values) - 0.5) * (_LOG_GAMMA / _QUARTERS))
    return middle


def log_bins(quarter: Ints) -> Ints:
    """Return the bins of quarters: i where gamma^(i-1) < value <= gamma^i, gamma = (1 + a) / (1 - a), a = `ACCURACY`.

    The rule of DDSketch (Masson, Rim and Lee 2019, section 2.1): 2 gamma^i / (gamma + 1) is then within a of any value
    of the bin.
    """
    return -(-quarter // _QUARTERS)


def pack(quarter: Ints, counts: Ints) -> tuple[bytes, Ints]:
    """Return words of bins, and how many words each bin has.

    Parameters
    ----------
    quarter, counts : array of int64, shape (n,)
        Of each bin, a quarter with a value in it, from `quarters`, and how many values it has, at least one.
    """
    words = -(-counts // _EACH)
    stops = np.cumsum(words)
    low = np.full(int(words.sum()), _EACH, np.int64)
    low[stops - 1] = left = counts - _EACH * (words - 1)
    # A word cannot count a single value that belongs to others: it takes one more from the word before.
    short = stops[(left == 1) & (words > 1)] - 1
    low[short], low[short - 1] = 2, _EACH - 1
    low += _QUARTERS - 2
    bins = log_bins(quarter)
    alone = counts == 1
    low[stops[alone] - 1] = (quarter - _QUARTERS * (bins - 1) - 1)[alone]
    return ((np.repeat(bins + _MIDDLE, words) * _WORD) + low).astype("<u2").tobytes(), words


def ticks(ts_ms: Ints, bucket_ms: int) -> Ints:
    """Return when in their buckets times are, in 1/65,536 of a bucket."""
    return ts_ms % bucket_ms * _TICKS // bucket_ms


def heads(least: Floats, most: Floats, first: Ints, last: Ints) -> list[bytes]:
    """Return what fields begin with: of each, the least and the largest value, and the first and the last tick."""
    found = np.empty(len(least), HEAD)
    found["least"], found["most"], found["first"], found["last"] = least, most, first, last
    text = found.tobytes()
    return [text[at : at + HEAD.itemsize] for at in range(0, len(text), HEAD.itemsize)]


@lru_cache(_REMEMBERED)
def unpack(field: bytes) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Return the quarters that have values, ascending, and how many: those of a whole bin are spread over it.

    Both are read-only, and remembered: a window is asked for time and again, and most of its buckets are over.

    Parameters
    ----------
    field : bytes
        Of a sketch, with its head.
    """
    words = np.frombuffer(field, "<u2", offset=HEAD.itemsize).astype(np.int64)
    first, low = _QUARTERS * (words // _WORD - _MIDDLE - 1) + 1, words % _WORD
    alone, many = low < _QUARTERS, low >= _QUARTERS
    spread = first[many, None] + np.arange(_QUARTERS)
    quarter = np.concatenate([(first + low)[alone], spread.ravel()])
    each = np.repeat((low[many] - _QUARTERS + 2) / _QUARTERS, _QUARTERS)
    weight = np.concatenate([np.ones(int(alone.sum())), each])
    quarter, weight = _totals(quarter, weight)
    found, count = quarter.astype(np.int16), weight.astype(np.float32)  # both hold them exactly
    found.flags.writeable = count.flags.writeable = False
    return found, count


def _totals(quarter: Ints, weight: Floats) -> tuple[Ints, Floats]:
    """Add up the weights of quarters, ascending."""
    if not len(quarter):
        return quarter, weight
    # A table of all quarters there may be is filled in one pass, where sorting them would be most of the work.
    least = int(quarter.min())
    totals = np.bincount(quarter - least, weight)
    there = np.flatnonzero(totals)
    return there + least, totals[there].astype(np.float64)


@dataclass(frozen=True)
class Distribution:
    """How the notionals of a window are distributed.

    Attributes
    ----------
    low, high : array of float64, shape (n,)
        USD, ascending; a value that is known by itself has both the same.
    weight : array of float64, shape (n,)
        How many notionals lie above `low` and up to `high`.
    least, most : float
        Of all; NaN where there are none.
    """

    low: Floats
    high: Floats
    weight: Floats
    least: float
    most: float

    @classmethod
    def of(cls, values: ArrayLike, weights: ArrayLike | None = None) -> Distribution:
        """Take single values, each with a weight."""
        given = np.asarray(values, np.float64)
        order = np.argsort(given, kind="stable")
        found = given[order]
        weight = np.ones(len(found)) if weights is None else np.asarray(weights, np.float64)[order]
        least, most = (float(found[0]), float(found[-1])) if len(found) else (np.nan, np.nan)
        return cls(found, found, weight, least, most)

    @property
    def count(self) -> float:
        """How many notionals there are; a part of one where only a part of its hour is in the window."""
        return float(self.weight.sum())

    def quantiles(self, qs: ArrayLike) -> Floats:
        """Return the values below or at which the parts `qs` of the notionals lie.

        The smallest value whose cumulated weight reaches q, numpy's ``inverted_cdf``. Between `low` and `high`, values
        are taken as spread evenly in their logarithm.

        Parameters
        ----------
        qs : array_like of float, shape (k,)
            0 to 1.

        Returns
        -------
        array of float64, shape (k,)
            USD; NaN where there are no notionals.
        """
        wanted = np.asarray(qs, np.float64)
        if not len(self.weight):
            return np.full(wanted.shape, np.nan)
        total = np.cumsum(self.weight)
        # Of n values the k-th lies where half of it is counted; one that is reached but for rounding is reached.
        target = np.ceil(wanted * total[-1] * (1 - 1e-12)) - 0.5
        at = np.minimum(np.searchsorted(total, target, side="left"), len(total) - 1)
        low, high, weight = self.low[at], self.high[at], self.weight[at]
        part = np.clip((target - (total[at] - weight)) / weight, 0, 1)
        result: Floats = np.clip(np.where(low == high, low, low ** (1 - part) * high**part), self.least, self.most)
        return result

    def rank(self, values: ArrayLike) -> Floats:
        """Return which part of the notionals is at most each value, 0 to 1; NaN where there are none."""
        asked = np.asarray(values, np.float64)
        if not len(self.weight):
            return np.full(asked.shape, np.nan)
        total = np.concatenate([[0.0], np.cumsum(self.weight)])
        whole = np.searchsorted(self.high, asked, side="right")
        result = total[whole]
        inside = np.minimum(whole, len(self.high) - 1)
        low, high = self.low[inside], self.high[inside]
        between = (whole < len(self.high)) & (asked > low)
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.log(asked / low) / np.log(high / low)
        result = result + np.where(between, self.weight[inside] * np.clip(np.nan_to_num(part), 0, 1), 0.0)
        result = np.where(asked >= self.most, total[-1], np.where(asked < self.least, 0.0, result))
        return np.asarray(result / total[-1], np.float64)


async def distribution(
    redis: Redis,
    symbol: str | None = None,
    *,
    end_ms: int,
    window_s: int | None = None,
    settings: Settings | None = None,
) -> Distribution:
    """Return how the notionals of a trailing window are distributed, from the sketches that the writer keeps.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes.
    symbol : str, optional
        The venue's own name; all symbols together when absent, which takes a scan.
    end_ms : int
        Where the window ends, ms since the epoch, UTC.
    window_s : int, optional
        Its length; `retention.percentile_window_s` when absent, which is also the most that is kept. Where it covers a
        part of a bucket, notionals count as spread evenly between the first and the last that came in it.
    settings : Settings, optional
        `retention` and `shards`; `liqlab.settings.load()` when absent.
    """
    if symbol is not None:
        return (await asked(redis, [symbol], end_ms=end_ms, window_s=window_s, settings=settings))[0]()
    keys = [key async for key in redis.scan_iter(match="sketch:*", count=_SCANNED)]
    return _merged(await _asked(redis, keys, end_ms, window_s, settings or load()))


async def asked(
    redis: Redis,
    symbols: Sequence[str],
    *,
    end_ms: int,
    window_s: int | None = None,
    settings: Settings | None = None,
) -> list[Callable[[], Distribution]]:
    """Ask for what `distribution` returns of each of several symbols, as it is now; each is worked out when called."""
    settings = settings or load()
    family, shards = schema.BY_NAME["sketch"], settings.shards
    keys = [family.key(symbol, shard=schema.shard_of(symbol, shards)).encode() for symbol in symbols]
    return [partial(_merged, [fields]) for fields in await _asked(redis, keys, end_ms, window_s, settings)]


async def _asked(
    redis: Redis, keys: Sequence[bytes], end_ms: int, window_s: int | None, settings: Settings
) -> list[list[_Counted]]:
    """Return the buckets of each sketch that lie in a window."""
    bucket_ms = 1000 * settings.retention.percentile_bucket_s
    start_ms = end_ms - 1000 * (window_s or settings.retention.percentile_window_s)
    buckets = range(start_ms // bucket_ms, end_ms // bucket_ms + 1)
    words = [b"%d" % bucket for bucket in buckets]
    found: list[list[_Counted]] = []
    for start in range(0, len(keys), _PAGE):
        pipe = redis.pipeline(transaction=False)
        for key in keys[start : start + _PAGE]:
            pipe.execute_command(b"HMGET", key, *words)
        for fields in await pipe.execute():
            inside = [
                (field, _inside(field, start_ms - bucket * bucket_ms, end_ms - bucket * bucket_ms, bucket_ms))
                for bucket, field in zip(buckets, fields, strict=True)
                if field
            ]
            found.append([(field, part) for field, part in inside if part > 0])
    return found


def _inside(field: bytes, start_ms: int, end_ms: int, bucket_ms: int) -> float:
    """Return which part of what a field counts came after `start_ms` and up to `end_ms` of its bucket, 0 to 1."""
    first, last = _HEAD.unpack_from(field)[2:]
    low = math.floor((start_ms + 1) * _TICKS / bucket_ms)
    high = math.ceil((end_ms + 1) * _TICKS / bucket_ms)
    part: float = (min(last + 1, high) - max(first, low)) / (last + 1 - first)
    return min(max(part, 0.0), 1.0)


def window_parts(end_ms: int, window_ms: int, bucket_ms: int) -> dict[int, float]:
    """Return the buckets of a window, and which part of each it covers: the first one in part, the others whole."""
    first_ms = end_ms - window_ms
    first, last = first_ms // bucket_ms, end_ms // bucket_ms
    return {at: min(1.0, ((at + 1) * bucket_ms - first_ms) / bucket_ms) for at in range(first, last + 1)}


def _merged(sketches: Sequence[Sequence[_Counted]]) -> Distribution:
    """Add up the buckets of sketches, each as far as it counts."""
    counted = [one for sketch in sketches for one in sketch]
    if not counted:
        return Distribution.of([])
    heads = [_HEAD.unpack_from(field) for field, _ in counted]
    kept = [unpack(field) for field, _ in counted]
    parts = np.repeat([part for _, part in counted], [len(quarter) for quarter, _ in kept])
    quarter = np.concatenate([quarter for quarter, _ in kept])
    found, weight = _totals(quarter.astype(np.int64), np.concatenate([weight for _, weight in kept]) * parts)
    above = np.exp(found * (_LOG_GAMMA / _QUARTERS))
    below = above * np.exp(-_LOG_GAMMA / _QUARTERS)
    return Distribution(below, above, weight, min(head[0] for head in heads), max(head[1] for head in heads))


async def memory(redis: Redis, symbol: str, *, settings: Settings | None = None) -> int:
    """Return the bytes of a symbol's sketch, by MEMORY USAGE."""
    settings = settings or load()
    key = schema.BY_NAME["sketch"].key(symbol, shard=schema.shard_of(symbol, settings.shards))
    return int(await redis.memory_usage(key, samples=0) or 0)
