"""Percentiles against exact ones, on distributions that break estimators and on real notionals."""

import math
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from liqlab import clock, quantiles, read_feed, settings, synth
from liqlab.detector import Detector
from liqlab.events import Columns, event_table
from liqlab.percentiles import METHODS, Exact, LogBins, Method, Reservoir, TDigest, TopK
from liqlab.quantiles import ACCURACY, Distribution, distribution, log_bins, quarters
from liqlab.schema import shard_of
from liqlab.server import Server, serve, tdigest_module
from liqlab.writer import Writer

HOUR, DAY = clock.HOUR_MS, clock.DAY_MS
T0 = 20_000 * DAY
QS = [0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999]
RECORDING = Path(__file__).resolve().parents[2] / "shared/feeds/recordings/binance_recorder_2025-01-26.csv"
N = 4_000
TOP, SAMPLE, COMPRESSION = 100, 126, 100  # where `detector.size` is not set


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
    hours = events["ts_ms"] // HOUR
    if not pd.DataFrame({"hour": hours, "bin": log_bins(quarters(values))}).duplicated().any():
        assert (np.abs(got / exact(values, QS) - 1) <= 2.03 * ACCURACY / 4).all()
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


@given(st.lists(st.sampled_from([1.0, 1.001, 1.5, 2.0]) | st.floats(1e-30, 1e30), min_size=1, max_size=200))
def test_words_hold_what_was_counted(values: list[float]) -> None:
    quarter = np.sort(quarters(np.array(values)))
    bins, first, counts = np.unique(log_bins(quarter), return_index=True, return_counts=True)
    words, lengths = quantiles.pack(quarter[first], counts)
    assert len(words) == 2 * lengths.sum()
    assert (lengths == -(-counts // 5)).all()
    found, weight = quantiles.unpack(bytes(quantiles.HEAD.itemsize) + words)
    place = np.searchsorted(bins, log_bins(found))
    assert np.bincount(place, weight).tolist() == counts.tolist()
    alone = np.isin(log_bins(found), bins[counts == 1])
    assert found[alone].tolist() == quarter[first][counts == 1].tolist()


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
        quarter, weight = quantiles.unpack(field)
        place = np.unique(log_bins(quarter), return_inverse=True)[1]
        words = -(-np.bincount(place, weight) // 5)
        assert (2 * words.sum() + quantiles.HEAD.itemsize == len(field)) == folded


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


async def test_the_settings_say_which_method_a_detector_asks(default_redis: Redis) -> None:
    """And the writer keeps no sketches then: what reads them finds nothing, which is no distribution."""
    events = events_of(clock.generator(3).lognormal(8, 2, 500), hours=1)
    for name in ("exact", "topk", "reservoir", "tdigest"):
        chosen = settings.load(detector={"method": name})
        assert type(Detector(default_redis, settings=chosen).method) is METHODS[name]
    assert isinstance(Detector(default_redis).method, LogBins)
    chosen = settings.load(detector={"method": "exact"})
    await Writer(default_redis, settings=chosen).write_table(events)
    assert await default_redis.exists("vwap:A") == 1
    assert await default_redis.exists("sketch:A") == 0
    found = await distribution(default_redis, "A", end_ms=T0 + DAY, settings=chosen)
    assert found.count == 0
    assert np.isnan(found.quantiles(QS)).all()
    # One that is asked for by name is filled whatever the settings say.
    await LogBins(default_redis, settings=chosen).add(Columns.of(events))
    assert (await distribution(default_redis, "A", end_ms=T0 + HOUR - 1, settings=chosen)).count == len(events)


@pytest.mark.parametrize("shards", [1, 3])
async def test_the_size_of_a_bucket_is_a_setting(default_redis: Redis, shards: int) -> None:
    values = clock.generator(3).lognormal(8, 2, 400)
    columns = Columns.of(events_of(values, hours=1))
    chosen = settings.load(shards=shards, detector={"size": 40})
    for kind in (TopK, Reservoir):
        await default_redis.flushall()
        method = kind(default_redis, settings=chosen)
        await method.add(columns)
        kept = await method.distribution("A", end_ms=T0 + HOUR - 1)
        assert len(kept.low) == kind.size(chosen) == 40
        assert kept.count == (40 if kind is TopK else pytest.approx(len(values)))
        if kind is TopK:
            assert kept.low.tolist() == np.sort(values)[-40:].tolist()
        [key] = await default_redis.keys("size:*")
        shard = shard_of("A", shards)
        assert key.decode() == f"size:{'' if shard is None else f'{{{shard}}}:'}A:{T0 // HOUR}"
        assert await method.memory("A") == await default_redis.memory_usage(key, samples=0)
    assert [METHODS[name].size(chosen) for name in ("logbins", "exact", "tdigest")] == [None, None, 40]
    assert [METHODS[name].size(settings.load()) for name in ("topk", "reservoir", "tdigest")] == [100, 126, 100]


async def test_a_digest_is_as_compressed_as_the_settings_say(tdigest_server: Server) -> None:
    async with tdigest_server.connect() as client:
        await client.flushall()
        method = TDigest(client, settings=settings.load(detector={"size": 50}))
        await method.add(timed([0, 1], [1.0, 2.0]))
        info = await client.execute_command("TDIGEST.INFO", f"size:A:{T0 // HOUR}")
        assert int(dict(info)[b"Compression"]) == 50


def densest_day(events: pd.DataFrame) -> pd.DataFrame:
    hours = events["ts_ms"] // HOUR
    counts = hours.value_counts().reindex(range(hours.min(), hours.max() + 24), fill_value=0)
    last = int(counts.rolling(24, min_periods=1).sum().idxmax())
    return events[hours.between(last - 23, last)].assign(ts_ms=events["ts_ms"] + (23 - last) * HOUR + T0)


def rank_points_off(values: np.ndarray, got: np.ndarray, qs: np.ndarray) -> float:
    below, at = ((values[:, None] < got).mean(axis=0), (values[:, None] <= got).mean(axis=0))
    return 100 * float(np.maximum(np.maximum(below - qs, qs - at), 0).max())


@pytest.mark.parametrize("name", ["normal", "binance_recorder_2025-01-26.csv", "binance_two_tables_2024-12.csv"])
async def test_the_default_is_within_a_percent_in_dollars_and_a_tenth_of_a_rank_point(
    default_redis: Redis, name: str
) -> None:
    if name == "normal":
        events = synth("normal", hours=24, seed=0)
    elif (RECORDING.parent / name).exists():
        events = read_feed(RECORDING.parent / name).events
    else:
        pytest.skip("the recorded feeds are not on this machine")
    events = densest_day(events)
    await Writer(default_redis).write_table(events)
    cases: list[tuple[str | None, np.ndarray]] = [(None, events["notional"].to_numpy())]
    for symbol, part in events.groupby("symbol", observed=True):
        if len(part) >= 200:
            cases.append((str(symbol), part["notional"].to_numpy()))
    qs = np.array([0.80, 0.85, 0.90, 0.95, 0.99])
    for symbol, values in cases:
        got = (await distribution(default_redis, symbol, end_ms=T0 + DAY - 1)).quantiles(qs)
        assert (np.abs(got / exact(values, qs) - 1) < 0.01).all(), symbol
        # One event of few is more than a tenth of a point.
        assert rank_points_off(values, got, qs) <= max(0.1, 250 / len(values)), symbol


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


# Every method


@pytest.fixture(scope="module")
def tdigest_server() -> Iterator[Server]:
    if tdigest_module() is None:
        pytest.skip("this machine has no TDIGEST; pip install 'liqlab[tdigest]' (Linux x86-64)")
    with serve(tdigest=True) as running:
        yield running


@pytest.fixture
def able(request: pytest.FixtureRequest, name: str) -> Server:
    """A server that can run the method of that name."""
    server: Server = request.getfixturevalue("tdigest_server" if name == "tdigest" else "default_server")
    return server


@pytest.fixture
async def method(able: Server, name: str) -> AsyncIterator[Method]:
    """The method of that name, on an empty server."""
    async with able.connect() as client:
        await client.flushall()
        yield METHODS[name](client)


every = pytest.mark.parametrize("name", METHODS)
# The two that know when each value came, so that a window may begin and end at any ms.
BY_MS = ("exact", "unlimited")
ADVERSARIES = [*adversaries(), "recorded"]


@cache
def recorded() -> np.ndarray:
    if not RECORDING.exists():
        pytest.skip("the recorded feeds are not on this machine")
    return read_feed(RECORDING).events["notional"].to_numpy()


def timed(times: list[int] | np.ndarray, values: list[float] | np.ndarray, *, symbol: str = "A") -> Columns:
    """Return events that came so many ms after T0."""
    return Columns.of(events_of(np.array(values, float), symbol=symbol).assign(ts_ms=T0 + np.array(times)))


def ranks_off(values: np.ndarray, got: np.ndarray, qs: list[float]) -> np.ndarray:
    """Return how far each q is from all ranks that its answer can be said to have: with ties it has many."""
    below, at = ((values < got[:, None]).mean(axis=1), (values <= got[:, None]).mean(axis=1))
    return np.maximum(0, np.maximum(below - qs, qs - at))


def cluster(qs: np.ndarray | list[float], n: int) -> np.ndarray:
    """Return the part of n values that the t-digest's cluster at q holds at most, and one value.

    The server merges up to w = n q (1 - q) 2 pi ln(n) / compression (t-digest-c, td_compress).
    """
    q = np.array(qs)
    return q * (1 - q) * 2 * np.pi * np.log(n) / COMPRESSION + 1 / n


@pytest.mark.parametrize("values", ADVERSARIES)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "logbins"])
async def test_methods_keep_their_promises(method: Method, name: str, values: str) -> None:
    given = recorded() if values == "recorded" else adversaries()[values]
    events = Columns.of(events_of(given, hours=8))
    for part in np.array_split(np.arange(len(given)), 5):
        await method.add(events.rows(part))
    got = await method.quantiles("A", QS, end_ms=T0 + 8 * HOUR - 1)
    assert (np.diff(got) >= 0).all()
    assert ((got >= given.min()) & (got <= given.max())).all()
    kept = await method.distribution("A", end_ms=T0 + 8 * HOUR - 1)
    assert kept.count == (8 * TOP if name == "topk" else pytest.approx(len(given)))
    if name != "tdigest":
        assert set(got) <= set(given)
    if name in BY_MS:
        assert got.tolist() == exact(given, QS).tolist()
    elif name == "topk":
        hours = np.split(given, np.searchsorted(events.ts_ms, T0 + HOUR * np.arange(1, 8)))
        assert kept.low.tolist() == sorted(np.concatenate([np.sort(hour)[-TOP:] for hour in hours]))
    elif name == "reservoir":
        # Dvoretzky, Kiefer and Wolfowitz 1956, with Massart's constant: a uniform sample of m is nowhere further off
        # than this, but for one in a thousand; by hours it is no worse. Which sample it is does not change.
        m = 8 * SAMPLE
        assert ranks_off(given, got, QS).max() <= math.sqrt(math.log(2 / 0.001) / (2 * m))
    elif name == "tdigest":
        assert (ranks_off(given, got, QS) <= cluster(QS, len(given))).all()


async def test_log_bins_keep_their_promise_on_recorded_notionals(default_redis: Redis) -> None:
    method = LogBins(default_redis)
    await method.add(Columns.of(events_of(recorded())))
    got = await method.quantiles("A", QS, end_ms=T0 + DAY - 1)
    assert (np.abs(got / exact(recorded(), QS) - 1) <= 2.03 * ACCURACY).all()
    assert (np.diff(got) >= 0).all()


@every
async def test_what_never_came_has_no_quantiles(method: Method) -> None:
    for symbol in ("A", "B"):
        for end_ms in (T0 - 1, T0 + 3 * DAY):
            assert np.isnan(await method.quantiles(symbol, [0.0, 0.5, 1.0], end_ms=end_ms)).tolist() == [True] * 3
            assert np.isnan(await method.rank(symbol, [1.0, 2.0], end_ms=end_ms)).tolist() == [True] * 2
            assert (await method.distribution(symbol, end_ms=end_ms)).count == 0
        # The second time there is something, of another symbol and at another time.
        await method.add(timed([0, HOUR], [1.0, 2.0]))
    assert await method.memory("B") == 0
    assert await method.memory("A") > 0


@every
async def test_of_one_value_all_quantiles_are_it(method: Method) -> None:
    await method.add(timed([HOUR // 3], [123.456]))
    assert (await method.quantiles("A", QS, end_ms=T0 + HOUR - 1)).tolist() == [123.456] * len(QS)
    assert (await method.rank("A", [123.0, 124.0], end_ms=T0 + HOUR - 1)).tolist() == [0, 1]


@every
async def test_an_hour_is_from_its_first_ms_to_its_last(method: Method, name: str) -> None:
    await method.add(timed([HOUR - 1, HOUR, 2 * HOUR - 1, 2 * HOUR], [1.0, 10.0, 100.0, 1_000.0]))
    end_ms = T0 + 2 * HOUR - 1
    found = await method.distribution("A", end_ms=end_ms, window_s=3_600)
    assert found.count == pytest.approx(2, abs=1e-6)
    got = await method.quantiles("A", [0.25, 0.9], end_ms=end_ms, window_s=3_600)
    assert got == pytest.approx([10, 100], rel=ACCURACY)
    if name in BY_MS:
        # A ms later its first one is out and the next hour's is in; the end belongs to the window, the start does not.
        got = await method.quantiles("A", [0.0, 1.0], end_ms=end_ms + 1, window_s=3_600)
        assert got.tolist() == [100, 1_000]


@every
async def test_a_shorter_window_has_the_later_hours_only(method: Method) -> None:
    values = (2.0 ** np.arange(24)[:, None] * np.linspace(1, 1.001, 20)).ravel()
    await method.add(timed(HOUR // 20 * np.arange(24 * 20), values))
    for hours in (1, 6, 23, 24):
        found = {"end_ms": T0 + DAY - 1, "window_s": 3_600 * hours}
        # All that a bin holds is within twice the accuracy, to the first order.
        got = await method.quantiles("A", [0.001, 1.0], **found)
        assert got == pytest.approx([2.0 ** (24 - hours), 2.0**23], rel=2.03 * ACCURACY)
        assert (await method.distribution("A", **found)).count == pytest.approx(20 * hours, abs=1e-3)
        rank = (await method.rank("A", [2.0**22.5], **found))[0]
        assert rank == pytest.approx(1 - 1 / hours, abs=cluster([1 - 1 / hours], 20 * hours)[0])


@pytest.mark.parametrize(
    ("name", "window_s", "expected"),
    [
        ("unlimited", 5_400, 150),
        ("exact", 5_400, 150),
        ("reservoir", 5_400, 150),
        ("reservoir", 4_500, 125),
        ("tdigest", 5_399, 100),  # less than half of the first hour: nothing of it
        ("tdigest", 5_400, 200),  # half of it, which stands for all
    ],
)
async def test_methods_take_a_part_of_the_first_hour(method: Method, name: str, window_s: int, expected: int) -> None:
    await method.add(timed(36_000 * np.arange(200), [*np.linspace(9, 10, 100), *np.linspace(1_000, 1_001, 100)]))
    end_ms = T0 + 2 * HOUR - 1
    assert (await method.distribution("A", end_ms=end_ms, window_s=window_s)).count == pytest.approx(expected, abs=1e-3)
    true = 1 - 100 / expected
    rank = (await method.rank("A", [20.0], end_ms=end_ms, window_s=window_s))[0]
    assert rank == pytest.approx(true, abs=cluster([true], expected)[0] if name == "tdigest" else 1e-3)


@every
async def test_busy_hours_weigh_what_they_have_seen(method: Method, name: str) -> None:
    times = np.concatenate([1_000 * np.arange(3_600), HOUR + 36_000 * np.arange(100)])
    await method.add(timed(times, [*np.linspace(9, 10, 3_600), *np.linspace(1_000, 1_001, 100)]))
    true = 0.5 if name == "topk" else 3_600 / 3_700
    rank = (await method.rank("A", [20.0], end_ms=T0 + 2 * HOUR - 1))[0]
    assert rank == pytest.approx(true, abs=cluster([true], 3_700)[0] if name == "tdigest" else 1e-3)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "tdigest"])
async def test_batches_come_in_any_order(method: Method) -> None:
    events = Columns.of(events_of(clock.generator(8).lognormal(8, 2, 6_000)))
    batches = np.split(np.arange(len(events)), np.searchsorted(events.ts_ms, T0 + HOUR * np.arange(1, 24)))
    shuffled = clock.generator(9).permutation(len(batches))
    found = []
    for order in (range(len(batches)), shuffled):
        symbol = f"S{len(found)}"
        for at in order:
            await method.add(timed(events.ts_ms[batches[at]] - T0, events.notional[batches[at]], symbol=symbol))
        found.append(await method.distribution(symbol, end_ms=T0 + DAY - 1))
    first, second = found
    for column in ("low", "high", "weight"):
        assert np.array_equal(getattr(first, column), getattr(second, column)), column
    assert (first.least, first.most) == (second.least, second.most)


@pytest.mark.parametrize("name", ["tdigest"])
async def test_a_digest_of_equal_values_has_all_quantiles(method: Method) -> None:
    await method.add(timed(18_000 * np.arange(200), np.repeat([1.0, 2.0], 100)))
    got = await method.quantiles("A", QS, end_ms=T0 + HOUR - 1)
    assert (np.diff(got) >= 0).all()
    assert (got[0], got[-1]) == (1, 2)


@every
async def test_events_of_one_ms_count_in_whatever_batches_they_come(method: Method) -> None:
    for value in (1.0, 2.0, 4.0):
        await method.add(timed([HOUR // 3], [value]))
    assert (await method.distribution("A", end_ms=T0 + HOUR - 1)).count == pytest.approx(3)


@pytest.mark.parametrize("name", ["tdigest"])
async def test_the_rank_in_a_digest_is_its_cdf(method: Method) -> None:
    values = clock.generator(10).lognormal(8, 2, N)
    asked = exact(values, QS)
    await method.add(Columns.of(events_of(values, symbol="HOUR", hours=1)))
    # Nothing is merged with one bucket, so the server's answers of that key are those of the window.
    key = f"size:HOUR:{T0 // HOUR}"
    theirs = await method.redis.execute_command("TDIGEST.CDF", key, *asked.tolist())
    assert await method.rank("HOUR", asked, end_ms=T0 + HOUR - 1) == pytest.approx(np.array(theirs), abs=1e-9)

    await method.add(Columns.of(events_of(values, symbol="DAY")))
    ranks = await method.rank("DAY", asked, end_ms=T0 + DAY - 1)
    assert (np.diff(ranks) > 0).all()
    assert (np.abs(ranks - [(values <= value).mean() for value in asked]) <= cluster(QS, N)).all()
    assert (await method.rank("DAY", [values.min() / 2, values.max() * 2], end_ms=T0 + DAY - 1)).tolist() == [0, 1]
    assert not [key async for key in method.redis.scan_iter(match="temp:*")]  # what was merged is gone
