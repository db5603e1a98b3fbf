"""The models against the real thing: alerts against a backtest, recommendations and figures against a real server."""

from __future__ import annotations

import math
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
from liqlab.detector import Detector, backtest
from liqlab.events import EventError, check, empty
from liqlab.fidelity import fidelity
from liqlab.server import Server
from liqlab.settings import SettingsError, changed
from liqlab.tuning import Constraints, evaluate, extrapolate, pareto, recommend, sweep, verify
from liqlab.tuning.alerts import quality
from liqlab.tuning.ranges import RangeQuantiles

RECORDING = Path(__file__).resolve().parents[2] / "shared/feeds/recordings/binance_recorder_2025-01-26.csv"
SPACE = {
    "writer.layout": ("shared", "per_symbol"),
    "retention.hot_s": (300, 900),
    "retention.percentile_window_s": (7_200, 86_400),
}


def day(profile: str = "normal", hours: float = 3, symbols: int = 40) -> pd.DataFrame:
    return liqlab.synth(profile, hours=hours, symbols=symbols, seed=3)


# Order statistics of ranges ------------------------------------------------------------------------------------------


@given(
    values=st.lists(st.sampled_from([0.5, 1.0, 2.0]) | st.floats(0.01, 1e9), min_size=1, max_size=80),
    data=st.data(),
    q=st.floats(0, 1),
)
def test_a_range_has_the_quantile_that_numpy_finds(values: list[float], data: st.DataObject, q: float) -> None:
    ends = sorted(data.draw(st.integers(0, len(values))) for _ in range(3))
    start, middle, stop = (np.array([end]) for end in ends)
    array = np.array(values)
    [got], [weight] = RangeQuantiles(array).quantiles(start, middle, stop, np.ones(1), q)
    part = array[ends[0] : ends[2]]
    assert weight == len(part)
    if len(part):
        assert got == np.quantile(part, q, method="inverted_cdf")
    else:
        assert math.isnan(got)


def test_values_before_the_middle_count_in_part() -> None:
    values = clock.generator(1).lognormal(8, 2, 400)
    rng = clock.generator(2)
    ends = np.sort(rng.integers(0, 401, (200, 3)), axis=1)
    part = rng.random(200)
    got, weight = RangeQuantiles(values).quantiles(*ends.T, part, 0.9)
    for at, (start, middle, stop) in enumerate(ends.tolist()):
        each = np.where(np.arange(start, stop) < middle, part[at], 1.0)
        assert weight[at] == pytest.approx(each.sum())
        if each.sum() > 0:
            order = np.argsort(values[start:stop])
            total = np.cumsum(each[order])
            place = np.searchsorted(total, max(np.ceil(0.9 * total[-1] * (1 - 1e-12)), 1) - 0.5)
            assert got[at] == values[start:stop][order][min(place, len(order) - 1)]


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
    found = [evaluate(prepared, changed(settings.load(), {"server.maxmemory": size << 20})) for size in (8, 16, 64)]
    assert [one.history_h for one in found] == sorted(one.history_h for one in found)
    for one in found:
        assert one.shares["budget_bytes"].sum() == pytest.approx(one.maxmemory)
        assert one.used_bytes <= one.maxmemory or not one.fits
        assert one.event_bytes < 10
    large, small = found[-1].as_dict(), found[0].as_dict()
    assert large["fits"]
    assert large["headroom_pct"] > small["headroom_pct"]
    assert small["binds"] == "statistics"


def test_history_is_no_longer_than_events_live() -> None:
    prepared = sizing.prepare(day())
    assert evaluate(prepared, settings.load()).history_h > 200
    assert evaluate(prepared, changed(settings.load(), {"retention.events_s": 7_200})).history_h == 2


async def test_history_is_what_a_cleaned_server_keeps(fresh_server: Callable[..., Server]) -> None:
    """Of a feed that does not fit, the hours that the model says are left."""
    events = extrapolate(day(hours=3, symbols=6), rate=3)
    # The streams' share is 100 KB of the 4 MB; the rest is not needed here.
    chosen = changed(
        settings.load(),
        {"server.maxmemory": 4 << 20, "retention.hot_s": 300, "writer.block_bytes": 4096, "budget.streams": 0.0125}
        | {"budget.buffer": 0.5075},
    )
    model = evaluate(sizing.prepare(events), chosen)
    running = fresh_server(settings=chosen)
    async with running.connect() as redis:
        done = (await verify(events, chosen, redis)).ingested
    assert done.evicted == 0
    assert done.held < len(events)
    assert done.held / model.rate_per_h == pytest.approx(model.history_h, rel=0.15)


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
    prepared = sizing.prepare(day(hours=0.5))
    pd.testing.assert_frame_equal(sweep(prepared, SPACE, workers=2), sweep(prepared, SPACE))


def test_a_sweep_refuses_what_is_no_setting() -> None:
    prepared = sizing.prepare(day(hours=0.1))
    with pytest.raises(SettingsError, match=r"did you mean writer\.layout"):
        sweep(prepared, {"writer.layot": ("shared",)})
    with pytest.raises(SettingsError, match=r"retention\.hot_s = -5"):
        sweep(prepared, {"retention.hot_s": (300, -5)})
    with pytest.raises(EventError, match="no event"):
        sweep(empty(), SPACE)


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
    assert done.ingested.evicted == 0
    assert done.table.loc["recall", "measured"] >= 0.97
    if done.ingested.held == len(found.events):  # else cleanup, which is not predicted, kept the streams in their share
        assert abs(done.table.loc["used_memory", "off_pct"]) < 5


def test_of_equal_settings_the_smaller_ones_are_taken() -> None:
    found = recommend(day(), settings.load(), Constraints(error_pct=100, recall=0), space=SPACE)
    assert found.settings.writer.layout == "shared"
    assert found.settings.retention.percentile_window_s == 7_200
    good = found.tried[found.tried["holds"]]
    assert found.outcome.used_bytes <= good["used_bytes"].min() / 0.99


def test_fitted_shares_buy_history() -> None:
    events, memory = day("cascade"), 8 << 20
    fixed, fitted = (
        recommend(
            events, settings.load(), Constraints(maxmemory=memory, shares=shares), space={"retention.candle_s": (900,)}
        )
        for shares in ("fixed", "fitted")
    )
    assert sum(fitted.settings.budget.model_dump().values()) == pytest.approx(1)
    assert fitted.settings.budget.buffer == fixed.settings.budget.buffer
    assert fitted.outcome.history_h > 1.2 * fixed.outcome.history_h
    assert fitted.holds


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
    families = done.table.loc[["vwap bytes", "sketch bytes", "candle bytes", "candle_5m bytes", "candle_1h bytes"]]
    assert (families["off_pct"].abs() < 5).all(), families
    assert done.as_dict()["evicted"] == 0
