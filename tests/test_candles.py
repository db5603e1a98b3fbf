import math

import numpy as np
import pandas as pd
import pytest
from redis.asyncio import Redis

from liqlab import clock, settings
from liqlab.candles import FORM, WIDTHS, candles
from liqlab.events import event_table
from liqlab.writer import Writer

T0 = 1_737_908_829_829
WIDTH_MS = {"1m": 60_000, "5m": 300_000, "1h": 3_600_000}


def sample(n: int = 1_500, seed: int = 1) -> pd.DataFrame:
    rng = clock.generator(seed)
    price, size = np.round(rng.lognormal(3, 1, n), 4), np.round(rng.lognormal(1, 2, n) + 1e-3, 3)
    times = T0 + np.sort(rng.choice(9_000_000, n, replace=False))
    symbols = rng.choice(["A", "B*C", "[x]?:5"], n)
    return event_table(times, ["okx"] * n, symbols, rng.choice(["buy", "sell"], n), price, size, price * size)


def by_pandas(events: pd.DataFrame, width: str) -> pd.DataFrame:
    """Return the candles of one symbol, computed in another way."""
    rows = {}
    for bucket, part in events.groupby(events["ts_ms"] // WIDTH_MS[width]):
        bought = math.fsum(part["size"][part["side"] == "buy"])
        rows[bucket * WIDTH_MS[width]] = {
            "open": part["price"].iloc[0],
            "high": part["price"].max(),
            "low": part["price"].min(),
            "close": part["price"].iloc[-1],
            "vwap": math.fsum(part["notional"]) / math.fsum(part["size"]),
            "mean_price": part["price"].mean(),
            "count": len(part),
            "volume": math.fsum(part["size"]),
            "buy_volume": bought,
            "sell_volume": math.fsum(part["size"]) - bought,
            "max_size": part["size"].max(),
            "notional": math.fsum(part["notional"]),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("ts_ms")


@pytest.mark.parametrize("form", ["packed", "hash"])
@pytest.mark.parametrize("shards", [1, 3])
async def test_candles_are_those_of_pandas_in_whatever_order_events_come(redis: Redis, form: str, shards: int) -> None:
    events = sample()
    chosen = settings.load(writer={"bulk_events": 37, "candles": form}, shards=shards)
    order = clock.generator(2).permutation(len(events))
    for part in np.array_split(order, 9):  # each part is in time order, and later than much of what follows
        await Writer(redis, settings=chosen).write_table(events.iloc[np.sort(part)])
    for symbol, rows in events.groupby(events["symbol"].astype(str)):
        for width in WIDTHS:
            got = await candles(redis, symbol, width=width, settings=chosen)
            pd.testing.assert_frame_equal(got, by_pandas(rows, width), rtol=1e-9, atol=1e-9)


async def test_a_change_of_the_form_loses_nothing(default_redis: Redis) -> None:
    events = sample(300)
    for start, form in zip(range(0, 300, 50), ["packed", "hash", "hash", "packed", "packed", "hash"], strict=True):
        chosen = settings.load(writer={"candles": form})
        await Writer(default_redis, settings=chosen).write_table(events.iloc[start : start + 50])
    for symbol, rows in events.groupby(events["symbol"].astype(str)):
        got = await candles(default_redis, symbol, width="1h")
        pd.testing.assert_frame_equal(got, by_pandas(rows, "1h"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["packed", "hash"])
async def test_what_is_no_candle_is_written_over(default_redis: Redis, form: str) -> None:
    events = sample(60)
    events = events[events["symbol"] == "A"]
    minutes = (events["ts_ms"] // 60_000).unique().tolist()
    await default_redis.set(f"candle:A:{minutes[0]}", b"short")
    await default_redis.hset(f"candle:A:{minutes[1]}", "count", "x")
    await default_redis.rpush(f"candle:A:{minutes[2]}", "x")
    assert (await candles(default_redis, "A")).empty
    await Writer(default_redis, settings=settings.load(writer={"candles": form})).write_table(events)
    pd.testing.assert_frame_equal(await candles(default_redis, "A"), by_pandas(events, "1m"), rtol=1e-9, atol=1e-9)


async def test_a_range_of_candles_is_read_without_a_scan(default_redis: Redis) -> None:
    events = sample()
    await Writer(default_redis, settings=settings.load()).write_table(events)
    every = await candles(default_redis, "A", width="5m")
    start, end = every.index[3], every.index[-2]
    await default_redis.config_resetstat()
    got = await candles(default_redis, "A", width="5m", start_ms=start, end_ms=end)
    pd.testing.assert_frame_equal(got, every.iloc[3:-1])
    assert "cmdstat_scan" not in await default_redis.info("commandstats")
    pd.testing.assert_frame_equal(await candles(default_redis, "A", width="5m", start_ms=start + 1), every.iloc[4:])
    assert (await candles(default_redis, "nobody", width="5m", start_ms=start, end_ms=end)).empty


async def test_other_widths_are_refused(default_redis: Redis) -> None:
    with pytest.raises(ValueError, match="no candles of width '2m'; there are 1m, 5m, 1h"):
        await candles(default_redis, "A", width="2m")


def test_the_packed_form_is_what_the_script_expects() -> None:
    assert FORM.itemsize == 84
