"""The models against the real thing: alerts against a backtest, recommendations and figures against a real server."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import liqlab
from liqlab import clock, plots, settings, sizing
from liqlab.cleanup import Cleaner
from liqlab.detector import Detector, backtest
from liqlab.events import EventError, check, empty
from liqlab.fidelity import compare, fidelity
from liqlab.percentiles import Reservoir
from liqlab.server import Server
from liqlab.settings import SettingsError, changed, setting
from liqlab.tuning import SPACE as USUAL
from liqlab.tuning import Constraints, evaluate, extrapolate, pareto, recommend, sweep, verify
from liqlab.tuning.alerts import _Asked, quality
from liqlab.tuning.ranges import Part, Ranks, WaveletMatrix, quantiles
from liqlab.tuning.search import _combinations, _rounds
from liqlab.tuning.verified import _cleaned

RECORDING = Path(__file__).resolve().parents[2] / "shared/feeds/recordings/binance_recorder_2025-01-26.csv"
SPACE = {
    "writer.layout": ("shared", "per_symbol"),
    "retention.hot_s": (300, 900),
    "retention.percentile_window_s": (7_200, 86_400),
}


def day(profile: str = "normal", hours: float = 3, symbols: int = 40) -> pd.DataFrame:
    return liqlab.synth(profile, hours=hours, symbols=symbols, seed=3)


# Order statistics of ranges ------------------------------------------------------------------------------------------


def selected(values: np.ndarray, q: float, *parts: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Ask for a quantile of parts: which of the values, of what weights, in what cuts, and what is spare."""
    distinct = np.unique(values)
    bits = max(int(len(distinct) - 1).bit_length(), 1)
    made = []
    for which, weights, cuts, spare in parts:
        codes = np.searchsorted(distinct, values[which])
        made.append(Part(WaveletMatrix(codes, bits, weights), cuts, spare))
    return quantiles(distinct, bits, made, q)


@given(
    values=st.lists(st.sampled_from([0.5, 1.0, 2.0]) | st.floats(0.01, 1e9), min_size=1, max_size=80),
    data=st.data(),
    q=st.floats(0, 1),
)
def test_a_range_has_the_quantile_that_numpy_finds(values: list[float], data: st.DataObject, q: float) -> None:
    start, stop = sorted(data.draw(st.integers(0, len(values))) for _ in range(2))
    array = np.array(values)
    cuts = [(np.array([start]), -1.0), (np.array([stop]), 1.0)]
    [got], [weight] = selected(array, q, (slice(None), None, cuts, None))
    part = array[start:stop]
    assert weight == len(part)
    if len(part):
        assert got == np.quantile(part, q, method="inverted_cdf")
    else:
        assert math.isnan(got)


@pytest.mark.parametrize("n", [255, 256, 257, 2_000])
@pytest.mark.parametrize("heavy", [False, True])
def test_ranges_of_long_arrays_are_exact(n: int, heavy: bool) -> None:
    rng = clock.generator(n)
    values, weights = rng.random(n).round(3), rng.integers(1, 4, n).astype(float) if heavy else None
    start, stop = np.sort(rng.integers(0, n + 1, (2, 100)), axis=0)
    start[0], stop[0] = 0, n
    got, weight = selected(values, 0.9, (slice(None), weights, [(start, -1.0), (stop, 1.0)], None))
    for a, b, found, total in zip(start.tolist(), stop.tolist(), got.tolist(), weight.tolist(), strict=True):
        every = values[a:b] if weights is None else np.repeat(values[a:b], weights[a:b].astype(int))
        assert total == len(every)
        assert not len(every) or found == np.quantile(every, 0.9, method="inverted_cdf")


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 2_000])
def test_ranks_count_the_flags_before_each_place(n: int) -> None:
    flags = clock.generator(n).random(n) < 0.9
    assert Ranks(flags).before(np.arange(n + 1)).tolist() == [0, *np.cumsum(flags).tolist()]


def weighted(values: np.ndarray, weights: np.ndarray, q: float) -> float:
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    place = np.searchsorted(total, max(np.ceil(q * total[-1] * (1 - 1e-12)), 1) - 0.5)
    return float(values[order][min(place, len(order) - 1)])


def test_values_count_in_part_and_the_least_not_at_all() -> None:
    values, rng = clock.generator(1).lognormal(8, 2, 400), clock.generator(2)
    start, middle, stop = np.sort(rng.integers(0, 401, (3, 200)), axis=0)
    part, spare = rng.random(200), rng.integers(0, 60, 200).astype(float)
    some = rng.random(400) < 0.5
    weights = rng.uniform(0.5, 3, some.sum())
    before = np.concatenate([[0], np.cumsum(some)])
    whole = [(start, -part), (middle, part - 1), (stop, 1.0)]
    # Beside them the larger values after the middle, and some that have weights, before it.
    late = (slice(None), None, [(middle, -1.0), (stop, 1.0)], spare)
    heavy = (some, weights, [(before[start], -part), (before[middle], part)], None)
    got, weight = selected(values, 0.9, (slice(None), None, whole, None), late, heavy)
    for at in range(200):
        first, half, last = (int(one[at]) for one in (start, middle, stop))
        largest = np.sort(values[half:last])[int(spare[at]) :]
        chosen = np.arange(first, half)[some[first:half]]
        found = np.concatenate([values[first:last], largest, values[chosen]])
        each = [np.where(np.arange(first, last) < half, part[at], 1.0), np.ones(len(largest))]
        each.append(part[at] * weights[before[chosen]])
        assert weight[at] == pytest.approx(np.concatenate(each).sum())
        if weight[at] > 0:
            assert got[at] == pytest.approx(weighted(found, np.concatenate(each), 0.9))


# Thresholds and alerts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["normal", "cascade"])
@pytest.mark.parametrize(
    "chosen", [{}, {"percentile": 99.0, "volume_usd": 0.0, "min_usd": 5_000.0}, {"refresh_s": 600, "volume_s": 120}]
)
async def test_the_alerts_of_exact_history_are_those_of_a_backtest(profile: str, chosen: dict[str, Any]) -> None:
    events, these = day(profile), settings.load(detector=chosen)
    true = await backtest(events, Detector(None, settings=these))
    found = quality(sizing.prepare(events), these, 86_400).fidelity.true
    columns = ["symbol", "side", "ts_ms", "notional", "threshold"]
    assert len(true) > 5
    pd.testing.assert_frame_equal(found[columns], true[columns], check_dtype=False)


@pytest.mark.parametrize("window_s", [3_600, 5_400, 86_400])
async def test_thresholds_are_as_far_off_as_a_real_servers(default_redis: Any, window_s: int) -> None:
    events = day(hours=4)
    short = settings.load(retention={"percentile_window_s": window_s})
    model = quality(sizing.prepare(events), short, window_s)
    real = await fidelity(events, default_redis, settings=short)
    assert len(model.fidelity.true) == len(real.true)
    assert model.fidelity.recall == pytest.approx(real.recall, abs=0.02)
    assert model.fidelity.precision == pytest.approx(real.precision, abs=0.02)
    assert model.error_pct < (0.5 if window_s == 86_400 else 60)
    both = model.fidelity.found.merge(real.found, on=["symbol", "side", "ts_ms"], suffixes=("", "_real"))
    assert len(both) > 0.9 * len(real.found)
    # A bin is 2 % wide; of many values in one the sketch knows how many there are, and the model which.
    assert np.quantile(np.abs(both["threshold"] / both["threshold_real"] - 1), 0.9) < 0.021


@pytest.mark.parametrize(
    ("method", "size", "window_s", "bucket_s"),
    [
        *[("exact", None, 5_400, 3_600), ("topk", None, 86_400, 3_600), ("topk", 20, 5_400, 1_800)],
        ("reservoir", 40, 5_400, 1_800),
    ],
)
async def test_each_way_to_keep_percentiles_is_as_far_off_as_a_real_servers(
    default_redis: Any, method: str, size: int | None, window_s: int, bucket_s: int
) -> None:
    events = liqlab.synth("normal", hours=2, symbols=5, rate_per_min=30, seed=3)
    chosen = settings.load(
        detector={"method": method, "size": size, "volume_usd": 0.0},
        retention={"percentile_window_s": window_s, "percentile_bucket_s": bucket_s},
    )
    model = quality(sizing.prepare(events), chosen, 86_400)
    done = await liqlab.ingest(
        events, default_redis, settings=chosen, detector=Detector(default_redis, settings=chosen), expire=False
    )
    real = compare(done.alerts, model.fidelity.true, within_s=chosen.retention.cooldown_s)
    assert len(real.found) > 20
    assert np.nanmax(np.abs(model.errors)) > 5
    if method != "reservoir":
        columns = ["symbol", "side", "ts_ms", "notional", "threshold"]
        pd.testing.assert_frame_equal(model.fidelity.found[columns], real.found[columns], check_dtype=False)
        return
    # Another draw: precision and recall differ by what as many alerts do by chance, at three standard deviations.
    for name in ("precision", "recall"):
        one, other = getattr(model.fidelity, name), getattr(real, name)
        off = 3 * math.sqrt(2 * max(one * (1 - one), 0.01) / len(real.true))
        assert abs(one - other) < off, name
    assert len(model.fidelity.found) == pytest.approx(len(real.found), abs=3 * math.sqrt(2 * len(real.found)))


@pytest.mark.parametrize(("size", "bucket_s"), [(30, 3_600), (100, 1_800)])
async def test_a_sample_is_off_as_a_real_servers_is(default_redis: Any, size: int, bucket_s: int) -> None:
    """Thresholds asked of both at the same moments: the medians of their errors, and how much they scatter."""
    events = liqlab.synth("normal", hours=3, symbols=10, rate_per_min=120, seed=5)
    chosen = settings.load(
        detector={"method": "reservoir", "size": size, "volume_usd": 0.0, "percentile": 80.0, "refresh_s": 180},
        retention={"percentile_window_s": 5_400, "percentile_bucket_s": bucket_s},
    )
    prepared = sizing.prepare(events)
    asked = _Asked(prepared, chosen)
    true = asked.thresholds(chosen, 5_400)
    true[np.isinf(true)] = np.nan
    model = asked.thresholds(chosen) / true
    kept, columns = Reservoir(default_redis, settings=chosen), prepared.columns
    minutes = columns.ts_ms // 60_000
    real, done = np.full(len(model), np.nan), 0
    for minute in np.unique((asked.end_ms + 1) // 60_000).tolist():
        stop = int(np.searchsorted(minutes, minute))
        await kept.add(columns.rows(slice(done, stop)))
        done = stop
        for at in np.flatnonzero(asked.end_ms + 1 == minute * 60_000).tolist():
            found = await kept.distribution(columns.symbols[asked.symbol[at]], end_ms=int(asked.end_ms[at]))
            real[at] = found.quantiles([0.8])[0] / true[at] if found.count >= 5 else np.nan
    both = np.isfinite(real) & np.isfinite(model)
    assert both.sum() > 300
    spread = [np.std(np.log(one[both])) for one in (real, model)]
    # Neighbouring moments share most of a sample: of 10 symbols and two windows 20 or so are independent, and the
    # median of as many scatters by 0.4 spreads between two draws.
    assert spread[1] == pytest.approx(spread[0], rel=0.5)
    assert np.median(np.log(model[both])) == pytest.approx(np.median(np.log(real[both])), abs=spread[0])
    assert spread[0] > 0.02


def test_a_bucket_that_is_not_full_knows_every_value() -> None:
    """Where a size is never reached, topk is exact, and a sample is but for the bucket that the window begins in."""
    prepared = sizing.prepare(day(hours=3, symbols=5))

    def found(**detector: Any) -> Any:
        return quality(prepared, settings.load(detector={**detector, "volume_usd": 0.0}), 86_400)

    exact, top, sample = (found(method=name, size=10_000) for name in ("exact", "topk", "reservoir"))
    assert exact.error_pct == top.error_pct == sample.error_pct == 0
    assert np.nanmax(np.abs(found(method="topk", size=10).errors)) > 5
    assert np.nanmax(np.abs(found(method="reservoir", size=10).errors)) > 1


def test_a_shorter_window_is_further_off() -> None:
    prepared = sizing.prepare(day(hours=6))
    windows = [86_400, 10_800, 3_600]
    found = [quality(prepared, settings.load(retention={"percentile_window_s": one}), 86_400) for one in windows]
    errors = [one.error_pct for one in found]
    assert errors == sorted(errors)
    assert errors[0] < 0.3 < errors[2]
    assert found[0].fidelity.recall == 1.0
    assert found[2].fidelity.identical < found[0].fidelity.identical
    hourly = found[2].through_time()
    assert list(hourly) == ["ts_ms", "median_pct", "error_pct"]
    assert (hourly["median_pct"] <= hourly["error_pct"]).all()
    assert len(hourly) == 6


def test_a_feed_without_alerts_has_no_errors() -> None:
    few = day(hours=0.2).head(5)
    found = evaluate(sizing.prepare(few), settings.load())
    assert math.isnan(found.quality.error_pct)
    assert found.quality.fidelity.recall is None
    assert found.quality.through_time().empty
    plots.tuning_panel(found)


# What a choice costs and buys ----------------------------------------------------------------------------------------


def test_more_memory_is_more_history_and_the_shares_add_up() -> None:
    prepared = sizing.prepare(day())
    found = [evaluate(prepared, changed(settings.load(), {"server.maxmemory": size << 20})) for size in (16, 32, 64)]
    assert [one.history_h for one in found] == sorted(one.history_h for one in found)
    for one in found:
        assert one.shares["budget_bytes"].sum() == pytest.approx(one.maxmemory)
        assert one.used_bytes <= one.maxmemory or not one.fits
        assert one.event_bytes < 10
    large, small = found[-1].as_dict(), found[0].as_dict()
    assert large["fits"]
    assert large["headroom_pct"] > small["headroom_pct"]
    assert small["binds"] == "buffer"  # what the server takes by itself


def test_what_has_no_budget_does_not_fit_and_is_named() -> None:
    prepared = sizing.prepare(day("cascade", hours=1))
    none = evaluate(prepared, settings.load(budget={"misc": 0, "streams": 0.48}))
    assert (none.fits, none.binds, none.headroom_pct) == (False, "misc", -100)
    assert none.headline == "Does not fit: misc is 100 % over its budget"
    all_streams = dict.fromkeys(("vwap", "percentile", "statistics", "misc", "buffer"), 0)
    assert not evaluate(prepared, settings.load(budget={"streams": 1, **all_streams})).fits


def test_shares_that_hold_while_the_whole_may_not_are_said_so() -> None:
    prepared = sizing.prepare(liqlab.read_feed(Path(__file__).resolve().parents[1] / "data/cascade-1h.jsonl.gz"))
    one = evaluate(prepared, settings.load(server={"maxmemory": "4mb"}))
    budget = {name: 1.01 * size / one.maxmemory for name, size in one.shares["bytes"].items() if name != "streams"}
    budget["streams"] = 1 - sum(budget.values())
    found = evaluate(prepared, settings.load(server={"maxmemory": "4mb"}, budget=budget))
    assert found.headroom_pct > 0
    assert not found.fits
    assert found.headline.startswith("May not fit: `used_memory`")


def test_history_is_no_longer_than_events_live() -> None:
    prepared = sizing.prepare(day())
    assert evaluate(prepared, settings.load()).history_h > 200
    assert evaluate(prepared, changed(settings.load(), {"retention.events_s": 7_200})).history_h == 2


def test_cleanup_takes_blocks_first_and_then_what_is_hot() -> None:
    tight = {"server.maxmemory": 4 << 20, "budget.streams": 0.01, "budget.buffer": 0.51, "writer.block_bytes": 4096}
    found = evaluate(sizing.prepare(day()), changed(settings.load(), tight))
    before, held = found.predicted.families.iloc[-1], found.predicted.held.iloc[-1]
    last, left = _cleaned(found)
    assert min(before["blocks"], before["events"] - last["events"], held["sealed"]) > 0
    assert (last["blocks"], last["events"]) == (0, pytest.approx(0.01 * (4 << 20)))
    assert left == pytest.approx(held["hot"] * last["events"] / before["events"])


async def test_history_is_what_a_cleaned_server_keeps(fresh_server: Callable[..., Server]) -> None:
    """Of a feed that does not fit, the hours that the model says are left."""
    events = extrapolate(day(hours=3, symbols=6), rate=3)
    # The streams' share is 80 KB of the 4 MB, some twenty blocks; the rest is not needed here.
    chosen = changed(
        settings.load(),
        {"server.maxmemory": 4 << 20, "retention.hot_s": 300, "writer.block_bytes": 4096, "budget.streams": 0.02}
        | {"budget.buffer": 0.5},
    )
    model = evaluate(sizing.prepare(events), chosen)
    running = fresh_server(settings=chosen)
    async with running.connect() as redis:
        done = (await verify(events, chosen, redis)).replayed.ingested
    assert done.evicted == 0
    assert done.held < len(events)
    assert done.held / model.rate_per_h == pytest.approx(model.history_h, rel=0.1)


# Other rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "hours"), [(10, 0), (0.3, 0), (2.5, 7), (1, 7)])
def test_a_feed_at_another_rate(rate: float, hours: float) -> None:
    events = day(hours=2)
    found = extrapolate(events, rate=rate, hours=hours)
    check(found)
    rounds = max(math.ceil(hours / 2 - 0.02), 1)
    assert len(found) == pytest.approx(rate * rounds * len(events), rel=0.05)
    assert np.ptp(found["ts_ms"]) >= hours * clock.HOUR_MS - clock.MINUTE_MS
    assert found["symbol"].cat.categories.equals(events["symbol"].cat.categories)
    assert found.duplicated().mean() < 0.001
    for q in (0.5, 0.9):
        assert found["notional"].quantile(q) == pytest.approx(events["notional"].quantile(q), rel=0.15)
    assert (found["notional"] / (found["price"] * found["size"])).between(0.999, 1.001).all()
    pd.testing.assert_frame_equal(found, extrapolate(events, rate=rate, hours=hours))


def test_a_feed_at_its_own_rate_is_itself() -> None:
    events = day(hours=0.5)
    assert extrapolate(events) is events
    many = extrapolate(events, rate=2)
    assert pd.merge(many, events).shape[0] == len(events)  # they are among them as they were


def test_what_has_no_rate() -> None:
    with pytest.raises(EventError, match="no event"):
        extrapolate(empty(), rate=2)
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be a number above 0"):
            extrapolate(day(hours=0.1), rate=rate)


# Many settings -------------------------------------------------------------------------------------------------------


def test_a_sweep_is_what_evaluate_says_of_each() -> None:
    prepared, seen = sizing.prepare(day(hours=1)), []
    tried = sweep(prepared, SPACE, progress=lambda done, total: seen.append((done, total)))
    assert len(tried) == 8
    assert seen[-1] == (8, 8)
    for row in tried.to_dict("records"):
        one = evaluate(prepared, changed(settings.load(), {name: row[name] for name in SPACE}), window_s=86_400)
        assert one.as_dict() == {name: row[name] for name in one.as_dict()}


def test_a_sweep_varies_what_has_no_section_and_what_is_a_table() -> None:
    prepared, wide = sizing.prepare(day(hours=1)), settings.load(detector={"min_usd": 5_000.0})
    space = {"shards": (1, 3), "detector.min_usd_of": ({}, {"BTCUSDT": 1e6}), "retention.vwap_s": (900, 3_600)}
    tried = sweep(prepared, space, settings=wide)
    assert len(tried) == 8
    for row in tried.to_dict("records"):
        one = evaluate(prepared, changed(wide, {name: row[name] for name in space})).as_dict()
        assert one == {name: row[name] for name in one}
    assert tried["used_bytes"].nunique() > 2


def test_a_sweep_tries_no_setting_twice() -> None:
    """A size is tried of the methods that have one; the usual grid has over a thousand settings, of four methods."""
    prepared = sizing.prepare(day(hours=0.3, symbols=4))
    space = {"detector.method": ("logbins", "exact", "topk", "reservoir"), "detector.size": (100, 126, None)}
    tried = sweep(prepared, space)
    sizes = [None if one is pd.NA else one for one in tried["detector.size"]]
    assert list(zip(tried["detector.method"], sizes, strict=True)) == [
        *[("logbins", None), ("exact", None), ("topk", 100), ("topk", 126), ("reservoir", 100), ("reservoir", 126)],
    ]
    [few] = sweep(prepared, {"detector.size": (100, 126)})["detector.size"].tolist()
    assert few is pd.NA  # of the usual method it says nothing
    assert len(sweep(prepared, count=7)) == 7
    every = _combinations(USUAL, settings.load(), None, 0)
    assert len(every) == len({json.dumps(one) for one in every}) >= 1_000
    assert {one["detector.method"] for one in every} == {"logbins", "exact", "topk", "reservoir"}
    for one in every[:: len(every) // 50]:
        assert setting(changed(settings.load(), one), "detector.size") == one["detector.size"]


def test_a_digest_is_to_be_replayed() -> None:
    chosen = settings.load(detector={"method": "tdigest"})
    prepared = sizing.prepare(day(hours=0.1))
    with pytest.raises(EventError, match=r"detector\.method is 'tdigest', .*liqlab replay"):
        evaluate(prepared, chosen)
    with pytest.raises(EventError, match="tdigest"):
        sweep(prepared, {"detector.method": ("exact", "tdigest")})


def test_a_sample_of_a_sweep_is_drawn_once() -> None:
    prepared = sizing.prepare(day(hours=0.5))
    some = sweep(prepared, SPACE, count=5, seed=4)
    assert len(some) == len(some[list(SPACE)].drop_duplicates()) == 5
    pd.testing.assert_frame_equal(some, sweep(prepared, SPACE, count=5, seed=4))
    assert len(sweep(prepared, SPACE, count=500)) == 8


def test_a_sweep_goes_on_where_it_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liqlab.tuning.search._TOGETHER", 2)
    prepared = sizing.prepare(day(hours=0.5))

    def broken_off(done: int, total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(prepared, SPACE, folder=tmp_path, progress=broken_off)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 2
    seen: list[int] = []
    tried = sweep(prepared, SPACE, folder=tmp_path, progress=lambda done, total: seen.append(done))
    assert seen == [4, 6, 8]
    assert {name: path.stat().st_mtime_ns for name in before if (path := tmp_path / name).exists()} == before
    pd.testing.assert_frame_equal(tried, sweep(prepared, SPACE))
    # Another feed, or other settings around, are another sweep.
    sweep(prepared, SPACE, folder=tmp_path, settings=settings.load(retention={"vwap_s": 60}))
    sweep(sizing.prepare(day(hours=0.6)), SPACE, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 12


def test_workers_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="pip install 'liqlab[dask]'")
    monkeypatch.setattr("liqlab.tuning.search._TOGETHER", 2)
    space = {**SPACE, "detector.method": ("logbins", "topk", "reservoir"), "detector.size": (20, 126)}
    events = day(hours=0.5)
    alone = sweep(sizing.prepare(events), space)
    assert alone["threshold_error_pct"].nunique() > 3
    pd.testing.assert_frame_equal(sweep(sizing.prepare(events), space, workers=2), alone)


def test_what_settings_share_is_worked_out_once_whatever_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In rounds of no more than a feed remembers; of more, what is forgotten is made again, and is the same."""
    prepared, made = sizing.prepare(day(hours=0.5)), list[str]()
    once = prepared.once

    def counted(key: Any, make: Any, **options: Any) -> Any:
        return once(key, lambda: (made.append(str(key)), make())[1], **options)

    monkeypatch.setattr(prepared, "once", counted)
    monkeypatch.setattr("liqlab.tuning.search._TOGETHER", 2)
    tried = sweep(prepared, SPACE)
    assert len(made) == len(set(made)) > 20
    monkeypatch.setattr("liqlab.tuning.search._AT_ONCE", 14)
    monkeypatch.setattr(sys.modules["liqlab.sizing.prepare"], "REMEMBERED", 20)
    again = sizing.prepare(day(hours=0.5))
    assert len(list(_rounds(again, settings.load(), None, {0: [{}], 1: [{"retention.hot_s": 60}], 2: [{}]}))) == 1
    pd.testing.assert_frame_equal(sweep(again, SPACE), tried)
    parts = {at: [{"retention.hot_s": 60 + at, "retention.vwap_s": 60 + at}] for at in range(9)}
    rounds = list(_rounds(again, settings.load(), None, parts))
    assert [one.args[2] for _, taken in rounds for one in taken] == list(range(9))
    assert 1 < len(rounds) < 9
    assert all(sum(len(one.args[2]) for one in groups) <= 14 for groups, _ in rounds)


def test_a_sweep_refuses_what_is_no_setting() -> None:
    prepared = sizing.prepare(day(hours=0.1))
    with pytest.raises(SettingsError, match=r"did you mean writer\.layout"):
        sweep(prepared, {"writer.layot": ("shared",)})
    with pytest.raises(SettingsError, match=r"retention\.hot_s = -5"):
        sweep(prepared, {"retention.hot_s": (300, -5)})
    with pytest.raises(EventError, match="no event"):
        sweep(empty(), SPACE)
    with pytest.raises(EventError, match="count is 0"):
        sweep(prepared, count=0)
    for wrong in ({"recall": 2}, {"error_pct": 0}, {"history_h": -1}):
        with pytest.raises(EventError, match=next(iter(wrong))):
            Constraints(**wrong)


def test_the_front_is_what_nothing_beats() -> None:
    rng = clock.generator(8)
    table = pd.DataFrame(
        {
            name: rng.integers(0, 6, 300).astype(float)
            for name in ("used_bytes", "threshold_error_pct", "history_h", "recall")
        }
    )
    table.loc[7, "recall"] = np.nan
    goals = table.assign(history_h=-table["history_h"], recall=-table["recall"]).to_numpy()
    kept = [
        at
        for at, one in enumerate(goals)
        if np.isfinite(one).all()
        and not any((other <= one).all() and (other < one).any() for other in goals if np.isfinite(other).all())
    ]
    assert pareto(table).index.tolist() == kept
    assert len(kept) > 3


def test_a_figure_that_nobody_knows_decides_nothing() -> None:
    table = pd.DataFrame({"used_bytes": [3, 1, 2], "history_h": [3, 2, 1], "recall": np.nan})
    table["threshold_error_pct"] = np.nan
    assert pareto(table).index.tolist() == [0, 1]
    assert pareto(table.iloc[:0]).empty


# Which settings fit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feed", ["cascade", "recorder"])
async def test_a_recommendation_holds_on_a_real_server(feed: str) -> None:
    if feed == "recorder" and not RECORDING.exists():
        pytest.skip("the recorded feeds are not on this machine")
    events = liqlab.read_feed(RECORDING).events if feed == "recorder" else day("cascade", hours=1, symbols=60)
    rate = 10.0 if feed == "recorder" else 1.5
    wanted = Constraints(maxmemory=8 << 20, rate=rate, error_pct=10.0)
    base = settings.load(retention={"percentile_window_s": 7_200})
    found = recommend(events, base, wanted, space={**SPACE, "retention.percentile_window_s": (3_600, 7_200)})
    assert found.holds
    assert found.settings.server.maxmemory == 8 << 20
    assert found.outcome.quality.error_pct <= 10
    assert len(found.tried) == 8
    assert found.binds in found.limits.index
    with liqlab.serve(settings=found.settings) as running:
        async with running.connect() as redis:
            known = await sizing.calibrate(redis)
            done = await verify(found.events, found.settings, redis, calibration=known, window_s=found.window_s)
    assert done.fits
    assert done.replayed.ingested.evicted == 0
    assert done.table.loc["recall", "measured"] >= 0.97
    if done.replayed.ingested.held == len(found.events):  # else cleanup kept the streams in their share
        assert abs(done.table.loc["used_memory", "off_pct"]) < 5


def test_of_equal_settings_the_smaller_ones_are_taken() -> None:
    found = recommend(day(), settings.load(), Constraints(error_pct=100, recall=0), space=SPACE)
    assert found.settings.writer.layout == "shared"
    assert found.settings.retention.percentile_window_s == 7_200
    good = found.tried[found.tried["holds"]]
    assert found.outcome.used_bytes <= good["used_bytes"].min() / 0.99


def test_fitted_shares_buy_history() -> None:
    events, memory = day("cascade"), 16 << 20
    fixed, fitted = (
        recommend(
            events, settings.load(), Constraints(maxmemory=memory, shares=shares), space={"retention.candle_s": (900,)}
        )
        for shares in ("fixed", "fitted")
    )
    assert sum(fitted.settings.budget.model_dump().values()) == pytest.approx(1)
    assert fitted.settings.budget.buffer > fixed.settings.budget.buffer
    assert fitted.outcome.history_h > 1.2 * fixed.outcome.history_h
    assert fitted.outcome.used_bytes < fitted.outcome.full_bytes <= 0.8 * memory
    assert fitted.holds


async def test_fitted_streams_that_are_full_are_not_halved() -> None:
    """On a server whose pressure begins early, with events that fill it within hours."""
    base = settings.load(
        server={"maxmemory": "8mb"},
        thresholds={"trim": 0.45, "halve": 0.5, "emergency": 0.6},
        writer={"codec": "json"},
        retention={"hot_s": 86_400, "percentile_window_s": 3_600},
    )
    wanted, space = Constraints(shares="fitted", error_pct=100, recall=0), {"writer.layout": ("shared",)}
    events = liqlab.synth("normal", hours=6, symbols=20, rate_per_min=150, seed=3)
    begin = events[events["ts_ms"] < events["ts_ms"].iloc[0] + clock.HOUR_MS].reset_index(drop=True)
    with liqlab.serve(settings=base) as running:
        async with running.connect() as redis:
            found = recommend(begin, base, wanted, space=space, calibration=await sizing.calibrate(redis))
            cleaner = Cleaner(redis, settings=found.settings)
            done = await liqlab.ingest(events, redis, settings=found.settings, cleaner=cleaner)
    assert found.holds
    assert done.cleaned > 0
    assert done.timeline["used_memory"].max() > 0.8 * found.outcome.full_bytes
    assert [action.detail for action in cleaner.actions if action.detail.startswith("trim to halve")] == []


def test_the_way_to_keep_percentiles_is_recommended_too() -> None:
    """Within 10 % of dense history, where sets of all values exceed their share: the sketches."""
    events = liqlab.synth("normal", hours=3, symbols=12, rate_per_min=120, seed=5)
    base = settings.load(detector={"method": "exact"}, retention={"percentile_window_s": 7_200})
    space = {"detector.method": ("logbins", "exact", "topk", "reservoir"), "detector.size": (126, 1_000)}
    found = recommend(events, base, Constraints(maxmemory=8 << 20, error_pct=10, recall=0.9), space=space)
    assert found.holds
    assert found.settings.detector.method == "logbins"
    assert found.settings.detector.size is None
    exact = found.tried.set_index("detector.method").loc["exact"]
    assert not exact["holds"]
    assert exact["binds"] == "percentile"
    by_size = found.tried.set_index(["detector.method", "detector.size"])["threshold_error_pct"]
    assert by_size["topk", 126] > by_size["reservoir", 126] > by_size["reservoir", 1_000] > 0


async def test_a_recommended_sample_is_verified(fresh_server: Callable[..., Server]) -> None:
    chosen = settings.load(detector={"method": "reservoir", "size": 60}, writer={"block_bytes": 8192})
    events = liqlab.synth("normal", hours=1, symbols=12, rate_per_min=60, seed=5)
    running = fresh_server(settings=chosen)
    async with running.connect() as redis:
        done = await verify(events, chosen, redis, calibration=await sizing.calibrate(redis))
    assert done.fits
    assert "sketch bytes" not in done.table.index
    assert abs(done.table.loc["percentile bytes", "off_pct"]) < 5
    assert abs(done.table.loc["used_memory", "off_pct"]) < 5


def test_what_cannot_be_is_said_with_what_binds() -> None:
    found = recommend(day(), settings.load(), Constraints(error_pct=0.01, history_h=1), space=SPACE)
    assert not found.holds
    assert found.binds == "threshold error %"
    assert not found.tried["holds"].any()
    assert found.as_dict()["holding"] == 0
    tiny = recommend(day(), settings.load(), Constraints(maxmemory=4 << 20, history_h=10_000), space=SPACE)
    assert not tiny.holds
    assert tiny.binds == "history h"


async def test_measured_stands_beside_predicted(fresh_server: Callable[..., Server], kind: str) -> None:
    events, chosen = day("cascade", hours=2), settings.load(writer={"block_bytes": 8192})
    running, seen = fresh_server(settings=chosen), []
    async with running.connect() as redis:
        known = await sizing.calibrate(redis)
        done = await verify(events, chosen, redis, calibration=known, progress=lambda *step: seen.append(step))
    assert seen[-1] == (len(events), len(events))
    assert done.fits
    assert abs(done.table.loc["used_memory", "off_pct"]) < 5
    assert done.table.loc["events held"].tolist()[:2] == [len(events)] * 2
    families = done.table[done.table.index.str.endswith(" bytes")]
    assert len(families) == 12
    # glibc leaves up to 16 bytes with a chunk. Of eleven small keys that is more; and a HyperLogLog, which grows to
    # twice the room that it has, then ends with 32 or 48 bytes more, of 340: more, but never less.
    few = {"cooldown bytes": 10, "unique_symbols bytes": 15} if "valkey" in kind else {}
    bounds = pd.Series(few).reindex(families.index, fill_value=5)
    assert (families["off_pct"].abs() < bounds).all(), families
    assert families.loc["unique_symbols bytes", "off_pct"] < 1
    assert done.as_dict()["evicted"] == 0


async def test_signals_of_alerts_without_pause(fresh_server: Callable[..., Server]) -> None:
    """More than a node of a stream holds, in the time that signals live for."""
    events = liqlab.synth("normal", hours=8, symbols=6, rate_per_min=60, seed=3)
    chosen = settings.load(detector={"min_usd": 1, "percentile": 60}, retention={"cooldown_s": 60})
    async with fresh_server(settings=chosen).connect() as redis:
        done = await verify(events, chosen, redis, calibration=await sizing.calibrate(redis))
    assert done.table.loc["alerts", "measured"] > 1_000
    assert done.table.loc["signal bytes", "measured"] > 6 * 2 * 4_096
    assert abs(done.table.loc["signal bytes", "off_pct"]) < 10
    assert abs(done.table.loc["cooldown bytes", "off_pct"]) < 30  # six keys, or five
