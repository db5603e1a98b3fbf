"""Percentiles of notionals over a trailing window, of one symbol or of all.

The default keeps, in one hash a symbol and one field an hour (`sketch:SYMBOL`), how many notionals fall into each of a
row of log-spaced bins. A quiet symbol pays for one key, not for 24. A field is the least and the largest notional, when
the first and the last came, and then 16-bit words: each a bin, and either the quarter of it in which the only value
lies, or two to five values; words of the same bin add up. A batch of the writer appends its own, and write.lua folds
them together from time to time, and when the hour is over.

`liqlab.percentiles` has the other ways, to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
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
HEAD: Final = np.dtype([("least", "<f8"), ("most", "<f8"), ("first", "<u2"), ("last", "<u2")])
_TICKS: Final = 1 << 16  # of a bucket: 55 ms of an hour
_MIDDLE: Final = 1 << 12  # the bin of 1 USD among the 8,192 that the other bits name: 1e-35 to 1e35 USD
_PAGE: Final = 500
_SCANNED: Final = 1_000

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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


def unpack(fields: Sequence[bytes], parts: ArrayLike = 1.0) -> tuple[Ints, Floats]:
    """Return the quarters that have values, ascending, and how many: those of a whole bin are spread over it.

    Parameters
    ----------
    fields : sequence of bytes, of length n
        Of a sketch, with their heads.
    parts : array_like of float, shape (n,)
        Which part of what each counts is meant.
    """
    _, found, weight = _unpacked(fields, parts, np.zeros(len(fields), np.int64))
    return found, weight


def _unpacked(fields: Sequence[bytes], parts: ArrayLike, owners: Ints) -> tuple[Ints, Ints, Floats]:
    """Return owners, their quarters and weights, as `unpack` does of each owner's fields; by owner, then ascending."""
    texts = [field[HEAD.itemsize :] for field in fields]
    words = np.frombuffer(b"".join(texts), "<u2").astype(np.int64)
    lengths = [len(text) // 2 for text in texts]
    each = np.repeat(np.broadcast_to(np.asarray(parts, np.float64), len(texts)), lengths)
    owner = np.repeat(owners, lengths)
    first, low = _QUARTERS * (words // _WORD - _MIDDLE - 1) + 1, words % _WORD
    alone, many = low < _QUARTERS, low >= _QUARTERS
    spread = first[many, None] + np.arange(_QUARTERS)
    weight = (low[many] - _QUARTERS + 2) * each[many] / _QUARTERS
    quarter = np.concatenate([(first + low)[alone], spread.ravel()])
    counted = np.concatenate([each[alone], np.repeat(weight, _QUARTERS)])
    if not len(quarter):
        return quarter, quarter, counted
    # A table of all quarters there may be is filled in one pass, where sorting them would be most of the work.
    least = int(quarter.min())
    width = int(quarter.max()) - least + 1
    cells = np.concatenate([owner[alone], np.repeat(owner[many], _QUARTERS)]) * width + (quarter - least)
    totals = np.bincount(cells, counted)
    there = np.flatnonzero(totals)
    return there // width, there % width + least, totals[there].astype(np.float64)


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
        return (await distributions(redis, [symbol], end_ms=end_ms, window_s=window_s, settings=settings))[0]
    keys = [key async for key in redis.scan_iter(match="sketch:*", count=_SCANNED)]
    return (await _asked(redis, keys, np.zeros(len(keys), np.int64), end_ms, window_s, settings or load()))[0]


async def distributions(
    redis: Redis,
    symbols: Sequence[str],
    *,
    end_ms: int,
    window_s: int | None = None,
    settings: Settings | None = None,
) -> list[Distribution]:
    """Return what `distribution` does of each of several symbols, asked for together."""
    settings = settings or load()
    family, shards = schema.BY_NAME["sketch"], settings.shards
    keys = [family.key(symbol, shard=schema.shard_of(symbol, shards)).encode() for symbol in symbols]
    return await _asked(redis, keys, np.arange(len(keys)), end_ms, window_s, settings)


async def _asked(
    redis: Redis, keys: Sequence[bytes], owners: Ints, end_ms: int, window_s: int | None, settings: Settings
) -> list[Distribution]:
    """Return the distribution of the sketches of each owner, 0 and up; there is at least one."""
    bucket_ms = 1000 * settings.retention.percentile_bucket_s
    start_ms = end_ms - 1000 * (window_s or settings.retention.percentile_window_s)
    buckets = range(start_ms // bucket_ms, end_ms // bucket_ms + 1)
    fields: list[bytes] = []
    places: list[tuple[int, int]] = []  # whose each field is, and its bucket
    for start in range(0, len(keys), _PAGE):
        pipe = redis.pipeline(transaction=False)
        for key in keys[start : start + _PAGE]:
            pipe.hmget(key, list(buckets))
        for owner, found in zip(owners[start : start + _PAGE].tolist(), await pipe.execute(), strict=True):
            for field, bucket in zip(found, buckets, strict=True):
                if field:
                    fields.append(field)
                    places.append((owner, bucket))
    count = int(owners.max(initial=0)) + 1
    return _merged(fields, np.array(places, np.int64).reshape(-1, 2), count, start_ms, end_ms, bucket_ms)


def window_parts(end_ms: int, window_ms: int, bucket_ms: int) -> dict[int, float]:
    """Return the buckets of a window, and which part of each it covers: the first one in part, the others whole."""
    first_ms = end_ms - window_ms
    first, last = first_ms // bucket_ms, end_ms // bucket_ms
    return {at: min(1.0, ((at + 1) * bucket_ms - first_ms) / bucket_ms) for at in range(first, last + 1)}


def _merged(
    fields: list[bytes], places: Ints, count: int, start_ms: int, end_ms: int, bucket_ms: int
) -> list[Distribution]:
    """Add up the fields of each of `count` owners, as far as what they count came after `start_ms`, up to `end_ms`."""
    head = np.frombuffer(b"".join(field[: HEAD.itemsize] for field in fields), HEAD)
    begin_ms = places[:, 1].astype(np.float64) * bucket_ms
    low = np.floor((start_ms + 1 - begin_ms) * _TICKS / bucket_ms)
    high = np.ceil((end_ms + 1 - begin_ms) * _TICKS / bucket_ms)
    first, last = head["first"].astype(np.float64), head["last"] + 1.0
    part = np.clip((np.minimum(last, high) - np.maximum(first, low)) / (last - first), 0, 1)
    inside = np.flatnonzero(part)
    owners = places[inside, 0]
    least, most = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(least, owners, head["least"][inside])
    np.maximum.at(most, owners, head["most"][inside])
    owner, found, weight = _unpacked([fields[at] for at in inside.tolist()], part[inside], owners)
    above = np.exp(found * (_LOG_GAMMA / _QUARTERS))
    below = above * np.exp(-_LOG_GAMMA / _QUARTERS)
    ends = np.searchsorted(owner, np.arange(count + 1)).tolist()
    return [
        Distribution(below[a:b], above[a:b], weight[a:b], float(least[at]), float(most[at]))
        if np.isfinite(least[at])
        else Distribution.of([])
        for at, (a, b) in enumerate(pairwise(ends))
    ]


async def memory(redis: Redis, symbol: str, *, settings: Settings | None = None) -> int:
    """Return the bytes of a symbol's sketch, by MEMORY USAGE."""
    settings = settings or load()
    key = schema.BY_NAME["sketch"].key(symbol, shard=schema.shard_of(symbol, settings.shards))
    return int(await redis.memory_usage(key, samples=0) or 0)
