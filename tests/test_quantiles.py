"""Percentiles against exact ones, on distributions that break estimators and on real notionals."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from liqlab import clock, quantiles, read_feed, settings, synth
from liqlab.events import Columns, event_table
from liqlab.percentiles import METHODS, SAMPLE, Exact, LogBins, Reservoir, TopK
from liqlab.quantiles import ACCURACY, Distribution, distribution, log_bins
from liqlab.writer import Writer

HOUR, DAY = clock.HOUR_MS, clock.DAY_MS
T0 = 20_000 * DAY
QS = [0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999]
RECORDING = Path(__file__).resolve().parents[2] / "shared/feeds/recordings/binance_recorder_2025-01-26.csv"
N = 4_000


def events_of(notional: np.ndarray, *, symbol: str = "A", hours: float = 24) -> pd.DataFrame:
    n = len(notional)
    times = T0 + np.sort(clock.generator(5).integers(0, int(hours * HOUR), n))
    return event_table(times, ["okx"] * n, [symbol] * n, ["buy"] * n, notional, np.ones(n), notional)


def adversaries() -> dict[str, np.ndarray]:
    rng = clock.generator(1)
    return {
        "gamma": rng.gamma(0.1, 100, N) + 1e-9,
        "uniform": rng.uniform(1, 1_000, N),
        "narrow normal": rng.normal(1_000, 0.5, N),
        "sequential": np.arange(1, N + 1, dtype=float),
        "reversed": np.arange(N, 0, -1, dtype=float),
        "mixed": np.concatenate([rng.normal(10, 1, N // 2).clip(1), rng.normal(1e6, 10, N // 2)]),
        "step": np.repeat([1.0, 5.0, 1_000.0, 1e7], N // 4)[rng.permutation(N)],
        "sorted step": np.repeat([1.0, 5.0, 1_000.0, 1e7], N // 4),
        "skewed": rng.lognormal(8, 2, N),
        "all equal": np.full(N, 123.456),
        "huge and tiny": np.concatenate([np.full(N // 2, 1e-30), np.full(N // 2, 1e30)]),
    }


def exact(values: np.ndarray, qs: list[float]) -> np.ndarray:
    return np.quantile(values, qs, method="inverted_cdf")


@pytest.mark.parametrize("name", adversaries())
@pytest.mark.parametrize("bulk", [97, 5_000])
async def test_log_bins_keep_their_promise(default_redis: Redis, name: str, bulk: int) -> None:
    values = adversaries()[name]
    events = events_of(values)
    await Writer(default_redis, settings=settings.load(writer={"bulk_events": bulk})).write_table(events)
    found = await distribution(default_redis, "A", end_ms=T0 + DAY - 1)
    assert found.count == N
    assert (found.least, found.most) == (values.min(), values.max())
    got = found.quantiles(QS)
    assert (np.diff(got) >= 0).all()
    assert ((got >= values.min()) & (got <= values.max())).all()
    # The bin is always the right one: what lies in it is within twice the accuracy of anything else in it.
    assert (np.abs(got / exact(values, QS) - 1) <= 2.03 * ACCURACY).all()
    few = found.weight.max() < 8
    if few:
        assert (np.abs(got / exact(values, QS) - 1) <= ACCURACY + 1e-9).all()
    for value in exact(values, QS):
        below, at = (values < value * (1 - 2.03 * ACCURACY)).mean(), (values <= value * (1 + 2.03 * ACCURACY)).mean()
        assert below - 1e-9 <= found.rank([value])[0] <= at + 1e-9
    assert found.rank([values.min() * 0.9, values.max()]).tolist() == [0.0, 1.0]


@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=60), st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_single_values_are_answered_exactly(values: list[float], qs: list[float]) -> None:
    found = Distribution.of(values)
    qs = sorted(qs)
    got = found.quantiles(qs)
    expected = np.quantile(values, qs, method="inverted_cdf")
    assert all(a == b or math.isclose(a, b) or b in values for a, b in zip(got, expected, strict=True))
    assert (np.diff(got) >= 0).all()
    assert set(got) <= set(values)
    ranks = found.rank(sorted(values))
    assert ranks[-1] == 1
    assert np.allclose(ranks, [(np.array(values) <= value).mean() for value in sorted(values)])


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=200))
def test_words_hold_what_was_counted(values: list[float]) -> None:
    bins, counts = np.unique(log_bins(np.array(values)), return_counts=True)
    words, lengths = quantiles.pack(bins, counts)
    assert len(words) == 2 * lengths.sum()
    back, again = quantiles.unpack(quantiles.heads(*(np.array([end]) for end in (1.0, 2.0, 3, 4)))[0] + words)
    assert (back.tolist(), again.tolist()) == (bins.tolist(), counts.tolist())


async def test_nothing_is_no_distribution(default_redis: Redis) -> None:
    found = await distribution(default_redis, "A", end_ms=T0)
    assert found.count == 0
    assert np.isnan(found.quantiles([0.5, 0.9])).all()
    assert np.isnan(found.rank([1.0])).all()


async def test_a_window_covers_a_part_of_its_first_hour(default_redis: Redis) -> None:
    events = pd.concat([events_of(np.full(100, 10.0), hours=1), events_of(np.full(100, 1_000.0), hours=1)])
    events["ts_ms"] = np.concatenate([T0 + np.arange(100) * 36_000, T0 + HOUR + np.arange(100) * 36_000])
    await Writer(default_redis).write_table(events)
    found = await distribution(default_redis, "A", end_ms=T0 + 2 * HOUR - 1, window_s=5_400)
    assert found.count == pytest.approx(150, abs=1)
    assert found.rank([20.0])[0] == pytest.approx(1 / 3, abs=0.01)
    whole = await distribution(default_redis, "A", end_ms=T0 + 2 * HOUR - 1, window_s=7_200)
    assert whole.count == pytest.approx(200, abs=0.1)


async def test_a_window_knows_when_in_an_hour_events_came(default_redis: Redis) -> None:
    times = T0 + np.array([10 * clock.MINUTE_MS, 50 * clock.MINUTE_MS, HOUR + 20 * clock.MINUTE_MS])
    await Writer(default_redis).write_table(events_of(np.array([1.0, 2.0, 4.0])).assign(ts_ms=times))

    async def count(first_min: int, last_min: int) -> float:
        end_ms = T0 + last_min * clock.MINUTE_MS
        return (await distribution(default_redis, "A", end_ms=end_ms, window_s=60 * (last_min - first_min))).count

    # Whatever part of their hours the window covers: all are in it, or none.
    assert await count(9, 81) == 3
    assert await count(51, 79) == 0
    assert await count(51, 81) == 1
    assert await count(9, 79) == 2
    assert 0.9 < await count(30, 79) < 1.1


async def test_an_hour_that_is_over_is_folded(default_redis: Redis) -> None:
    values = clock.generator(6).lognormal(8, 2, 1_200)
    slowly = settings.load(writer={"bulk_events": 3})
    await Writer(default_redis, settings=slowly).write_table(events_of(values, hours=2))
    first, second = await default_redis.hmget("sketch:A", [str(T0 // HOUR + hour) for hour in (0, 1)])
    for field, folded in ((first, True), (second, False)):
        bins, counts = quantiles.unpack(field)
        words = quantiles.pack(bins, counts)[0]
        assert (len(words) + quantiles.HEAD.itemsize == len(field)) == folded


async def test_all_symbols_are_the_sum_of_each(redis: Redis) -> None:
    events = synth("normal", hours=3, seed=1, symbols=20)
    chosen = settings.load(shards=3)
    await Writer(redis, settings=chosen).write_table(events)
    end = int(events["ts_ms"].max())
    together = await distribution(redis, end_ms=end, settings=chosen)
    each = [
        await distribution(redis, str(name), end_ms=end, settings=chosen) for name in events["symbol"].cat.categories
    ]
    assert together.count == pytest.approx(sum(one.count for one in each))
    assert together.count == pytest.approx(len(events))
    assert together.most == events["notional"].max()


@pytest.mark.parametrize("method", [Exact, LogBins, Reservoir, TopK])
async def test_methods_answer_by_what_they_keep(default_redis: Redis, method: type) -> None:
    values = clock.generator(3).lognormal(8, 2, 9_600)  # 400 an hour
    events = events_of(values)
    one = METHODS[method.name](default_redis)
    for part in np.array_split(np.arange(len(events)), 7):
        await one.add(Columns.of(events.iloc[part]))
    qs = [0.8, 0.9, 0.95, 0.99]
    got = await one.quantiles("A", qs, end_ms=T0 + DAY - 1)
    ranks = np.array([(values <= value).mean() for value in got])
    off = np.abs(ranks - qs).max()
    assert await one.memory("A") > 0
    assert await one.quantiles("nobody", [0.5], end_ms=T0) != await one.quantiles("nobody", [0.5], end_ms=T0)  # NaN
    if method is Exact:
        assert got.tolist() == exact(values, qs).tolist()
    elif method is LogBins:
        assert off < 0.001
    elif method is Reservoir:
        assert off < 0.02
    else:
        assert off > 0.02  # biased, as its label says
        assert one.biased


async def test_a_reservoir_is_the_same_whoever_adds_and_however_often(default_redis: Redis) -> None:
    events = Columns.of(events_of(clock.generator(3).lognormal(8, 2, 2_000), hours=1))
    first = Reservoir(default_redis)
    await first.add(events)
    key = f"size:A:{T0 // HOUR}"
    once = await default_redis.zrange(key, 0, -1)
    assert len(once) == SAMPLE + 1
    assert (await default_redis.object("ENCODING", key)) == b"listpack"
    await first.add(events)
    again = await default_redis.zrange(key, 0, -1)
    assert once == again


@pytest.mark.parametrize("feed", ["normal", "recorder"])
async def test_the_default_is_within_a_percent_in_dollars_and_a_tenth_of_a_rank_point(
    default_redis: Redis, feed: str
) -> None:
    if feed == "normal":
        events = synth("normal", hours=24, seed=0, symbols=10)
    elif RECORDING.exists():
        events = read_feed(RECORDING).events
        events = events[events["ts_ms"] > events["ts_ms"].max() - DAY]
    else:
        pytest.skip("the recorded feeds are not on this machine")
    await Writer(default_redis).write_table(events)
    qs = [0.80, 0.85, 0.90, 0.95, 0.99]
    end = int(events["ts_ms"].max())
    if feed == "recorder":
        found, values = await distribution(default_redis, end_ms=end), events["notional"].to_numpy()
        cases = [(found, values)]
    else:
        cases = []
        for name, part in events.groupby("symbol", observed=True):
            found = await distribution(default_redis, str(name), end_ms=end)
            cases.append((found, part["notional"].to_numpy()))
    for found, values in cases:
        got, truth = found.quantiles(qs), exact(values, qs)
        assert (np.abs(got / truth - 1) < 0.01).all(), (got, truth)
        if len(values) > 5_000:
            ranks = np.array([(values <= value).mean() for value in got])
            assert (np.abs(ranks - qs) <= 0.001).all(), ranks


async def test_a_sketch_is_small_for_busy_and_for_quiet_symbols(default_redis: Redis) -> None:
    rng = clock.generator(2)
    busy, quiet = rng.lognormal(8, 2, 14_400), rng.lognormal(8, 2, 24)
    # As a live writer's batches: what is added bit by bit must end as small as what comes at once.
    live = Writer(default_redis, settings=settings.load(writer={"bulk_events": 10}))
    await live.write_table(events_of(busy, symbol="BUSY"))
    slow = events_of(quiet, symbol="QUIET")
    slow["ts_ms"] = T0 + np.arange(24) * HOUR
    await Writer(default_redis).write_table(slow)
    assert await quantiles.memory(default_redis, "BUSY") <= 20_480
    assert await quantiles.memory(default_redis, "QUIET") < 1_024
