"""OHLCV-style candles of liquidations: one minute, five minutes and an hour wide, kept up to date by every batch.

Merging two parts of a candle is associative, so a batch adds its part to the candles of all three widths at once. An
event that comes late counts where it belongs, however late it is, and nothing has to be rolled up afterwards.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from liqlab import schema
from liqlab.events import SIDES, Columns, run_starts
from liqlab.settings import Settings, load

WIDTHS: Final = {"1m": "candle", "5m": "candle_5m", "1h": "candle_1h"}
# The packed form, 84 bytes, and the fields of the hash. write.lua merges both and depends on this order.
FORM: Final = np.dtype(
    [("count", "<u4"), ("open_ms", "<u4"), ("close_ms", "<u4")]
    + [
        (name, "<f8")
        for name in (
            "volume", "buy_volume", "price_total", "notional", "max_size", "high", "low", "open", "close",
        )
    ]
)  # fmt: skip
_READ: Final = 1_000  # keys of a pipeline
_SCANNED: Final = 10_000
_TAG: Final = re.compile(r"(?<=:)\{\d+\}:")  # of the shard


class Parts(NamedTuple):
    """What a batch adds to the candles of one width.

    Attributes
    ----------
    symbol : array of int, shape (n,)
        Codes of `Columns.symbols`.
    bucket : array of int64, shape (n,)
        Event time // width.
    cells : array of `FORM`, shape (n,)
        `open_ms` and `close_ms` count from the beginning of the bucket.
    """

    symbol: NDArray[np.integer]
    bucket: NDArray[np.int64]
    cells: NDArray[np.void]


def parts(events: Columns, width: str) -> Parts:
    """Return the parts of candles that events make.

    Parameters
    ----------
    events : Columns
        Not empty; ordered by symbol, each in time order.
    width : str
        One of `WIDTHS`.
    """
    width_ms = schema.BY_NAME[WIDTHS[width]].bucket_ms
    bucket, size, price = events.ts_ms // width_ms, events.size, events.price
    first = run_starts(events.symbol, bucket)
    last = np.append(first[1:], len(events)) - 1
    cells = np.empty(len(first), FORM)
    cells["count"] = last - first + 1
    cells["open_ms"], cells["close_ms"] = (events.ts_ms[at] % width_ms for at in (first, last))
    cells["open"], cells["close"] = price[first], price[last]
    bought = np.where(events.side == SIDES.index("buy"), size, 0.0)
    for name, values in (
        ("volume", size),
        ("buy_volume", bought),
        ("price_total", price),
        ("notional", events.notional),
    ):
        cells[name] = np.add.reduceat(values, first)
    cells["max_size"] = np.maximum.reduceat(size, first)
    cells["high"], cells["low"] = np.maximum.reduceat(price, first), np.minimum.reduceat(price, first)
    return Parts(events.symbol[first], bucket[first], cells)


async def candles(
    redis: Redis,
    symbol: str,
    *,
    width: str = "1m",
    start_ms: int | None = None,
    end_ms: int | None = None,
    settings: Settings | None = None,
) -> pd.DataFrame:
    """Return the candles of a symbol, packed or hashes.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes.
    symbol : str
        The venue's own name.
    width : str
        ``1m``, ``5m`` or ``1h``; kept for `retention.candle_s`, `candle_5m_s`, `candle_1h_s` after their last event.
    start_ms, end_ms : int, optional
        Candles that begin between the two, both inclusive; all that are kept when one is absent, which takes a scan.
    settings : Settings, optional
        `shards` is read; `liqlab.settings.load()` when absent.

    Returns
    -------
    pandas.DataFrame
        Index `ts_ms`, the beginning; only minutes with events have a row. Columns `open`, `high`, `low`, `close` (fill
        prices), `vwap` (notional / volume), `mean_price`, `count`, `volume`, `buy_volume`, `sell_volume`, `max_size`
        (base units), `notional` (USD).

    Raises
    ------
    ValueError
        There are no candles of that width.
    """
    if width not in WIDTHS:
        raise ValueError(f"no candles of width {width!r}; there are {', '.join(WIDTHS)}")
    family = schema.BY_NAME[WIDTHS[width]]
    shard = schema.shard_of(symbol, (settings or load()).shards)
    head = family.head(symbol, shard=shard)
    if start_ms is None or end_ms is None:
        keys = redis.scan_iter(match=f"{schema.literal(head)}*", count=_SCANNED)
        ends = (key.decode()[len(head) :] async for key in keys)
        buckets = sorted({int(end) async for end in ends if end.isdecimal()})
        low, high = -1 if start_ms is None else start_ms, math.inf if end_ms is None else end_ms
        buckets = [bucket for bucket in buckets if low <= bucket * family.bucket_ms <= high]
    else:
        buckets = list(range(-(-start_ms // family.bucket_ms), end_ms // family.bucket_ms + 1))
    times, cells = [], []
    for start in range(0, len(buckets), _READ):
        some = buckets[start : start + _READ]
        for bucket, cell in zip(some, await _read(redis, [f"{head}{bucket}" for bucket in some]), strict=True):
            if cell:
                times.append(bucket * family.bucket_ms)
                cells.append(cell)
    return _table(cells).set_index(pd.Index(times, dtype=np.int64, name="ts_ms"))


async def every(redis: Redis, width: str) -> pd.DataFrame:
    """Return the candles of all symbols, in the columns of `candles` behind `symbol` and `ts_ms`; takes a scan."""
    family = schema.BY_NAME[WIDTHS[width]]
    keys = [key.decode() async for key in redis.scan_iter(match=f"{family.pattern.split(':')[0]}:*", count=_SCANNED)]
    keys = sorted(key for key in keys if schema.family_of(key) is family)
    names, times, cells = [], [], []
    for start in range(0, len(keys), _READ):
        some = keys[start : start + _READ]
        for key, cell in zip(some, await _read(redis, some), strict=True):
            if cell:
                *words, bucket = _TAG.sub("", key).split(":")[1:]
                names.append(":".join(words))
                times.append(int(bucket) * family.bucket_ms)
                cells.append(cell)
    table = _table(cells)
    table.insert(0, "symbol", pd.Series(names, dtype="str"))
    table.insert(1, "ts_ms", np.array(times, np.int64))
    return table


def _table(cells: list[bytes]) -> pd.DataFrame:
    table = np.frombuffer(b"".join(cells), FORM)
    columns = {name: table[name] for name in ("open", "high", "low", "close")}
    columns["vwap"] = table["notional"] / table["volume"]
    columns["mean_price"] = table["price_total"] / table["count"]
    columns |= {name: table[name] for name in ("count", "volume", "buy_volume")}
    columns["sell_volume"] = table["volume"] - table["buy_volume"]
    columns |= {name: table[name] for name in ("max_size", "notional")}
    return pd.DataFrame(columns).astype({"count": np.int64})


async def _read(redis: Redis, keys: list[str]) -> list[bytes]:
    """Return the candles in the packed form; what is missing is empty."""
    pipe = redis.pipeline(transaction=False)
    for key in keys:
        pipe.get(key)
    cells = await pipe.execute(raise_on_error=False)
    for at, cell in enumerate(cells):
        if isinstance(cell, ResponseError):  # not a string: the other form
            cells[at] = b""
            with suppress(ResponseError, TypeError, ValueError):  # neither form, or a hash of something else
                fields: list[Any] = await redis.hmget(keys[at], list(FORM.names or ()))
                cells[at] = np.array([tuple(map(float, fields))], FORM).tobytes()
    return [cell if cell and len(cell) == FORM.itemsize else b"" for cell in cells]
