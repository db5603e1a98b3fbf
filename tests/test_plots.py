import json
import re

import numpy as np
import pandas as pd
import pytest

from liqlab import budget, detector, plots
from liqlab.budget import UNATTRIBUTED, Budget
from liqlab.cleanup import Action
from liqlab.cleanup.drill import Drilled
from liqlab.clock import DAY_MS, HOUR_MS, MINUTE_MS
from liqlab.codecs.compare import compare
from liqlab.comparison import methods_compared
from liqlab.events import empty, event_table
from liqlab.feeds.synth import synth
from liqlab.fidelity import Fidelity, Replayed, replay
from liqlab.fidelity import compare as compare_alerts
from liqlab.replay import Ingested, ingest
from liqlab.settings import Thresholds, load

T0 = 1_790_812_800_000  # 2026-10-01 00:00 UTC


@pytest.fixture
async def measured(default_redis) -> Budget:
    await ingest(synth("normal", hours=0.5, seed=3), default_redis, settings=load())
    await default_redis.set("someone:else", "x" * 1000)
    return await budget.measure(default_redis)


def table_of(sizes: dict[str, int], *, maxmemory: int = 1_000_000, used: int = 0) -> Budget:
    """A budget with given bytes a family, for figures that a real server would take long to reach."""
    families = pd.DataFrame(
        [(name, "streams" if name == "events" else "misc", 1, 1, size, 0) for name, size in sizes.items()],
        columns=["family", "share", "keys", "members", "bytes", "error_bytes"],
    ).set_index("family")
    families["bytes_per_member"] = families["bytes"] / families["members"]
    table = families.groupby("share")[["keys", "members", "bytes", "error_bytes"]].sum()
    table = table.reindex(["streams", "misc", UNATTRIBUTED], fill_value=0)
    table.loc[UNATTRIBUTED, "bytes"] = used - table["bytes"].sum() if used else 0
    table["share"] = [0.5, 0.3, 0.2]
    table["budget_bytes"] = (table["share"] * maxmemory).astype("int64")
    table["used_pct"] = 100 * table["bytes"] / table["budget_bytes"]
    keys = [(name, f"{name}:1", "string", 1, size) for name, size in sizes.items()]
    keys = pd.DataFrame(keys, columns=["family", "key", "type", "members", "bytes"])
    return Budget(table, families, keys, int(table["bytes"].sum()), maxmemory, pd.Series({"other": 0}))


def trace(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def words(figure) -> str:
    title = figure.layout.title
    return f"{title.text} {title.subtitle.text}".replace("<br>", " ").replace("\N{NO-BREAK SPACE}", " ")


# The budget


def test_the_bars_agree_with_the_table_to_the_byte(measured):
    figure = plots.budget_bars(measured)
    used = trace(figure, "used")
    drawn = pd.DataFrame(used.customdata, columns=["part", "family", "keys", "bytes"])
    whole = drawn.pop("part").eq("whole server")
    assert drawn.loc[whole, "bytes"].tolist() == [measured.used_memory]

    drawn["part"] = [row[0] for row in used.customdata]
    parts = drawn[~whole].groupby("part")["bytes"].sum().reindex(measured.table.index, fill_value=0)
    assert parts.to_dict() == measured.table["bytes"].to_dict()
    assert parts.sum() == measured.used_memory
    families = drawn[~whole & (drawn["part"] != UNATTRIBUTED)].set_index("family")
    assert families["bytes"].to_dict() == measured.families["bytes"].to_dict()
    assert families["keys"].to_dict() == measured.families["keys"].to_dict()


def test_a_bar_is_as_long_as_its_share_is_full(measured):
    used = trace(plots.budget_bars(measured), "used")
    ends = pd.Series(used.base) + pd.Series(used.x)
    for row, (part, share) in enumerate(measured.table.iterrows()):
        of_row = [end for y, end in zip(used.y, ends, strict=True) if y == row]
        wanted = 0 if np.isnan(share["used_pct"]) else share["used_pct"]
        assert max(of_row, default=0) == pytest.approx(wanted), part
    assert ends.iloc[-1] == pytest.approx(100 * measured.used_memory / measured.maxmemory)


def test_each_bar_says_what_it_is(measured):
    labels = [annotation.text for annotation in plots.budget_bars(measured).layout.annotations]
    assert len(labels) == len(measured.table) + 1
    assert any("percentile" in label and "of 48.00 MiB" in label and "no keys" not in label for label in labels)
    assert any("buffer" in label and "of 28.80 MiB" in label for label in labels)
    assert any("foreign" in label and "no share pays" in label for label in labels)
    assert any("whole server" in label and "of 240.00 MiB" in label for label in labels)


async def test_a_share_without_keys_says_so(default_redis):
    labels = [note.text for note in plots.budget_bars(await budget.measure(default_redis)).layout.annotations]
    assert any("percentile" in label and "0 B of 48.00 MiB" in label and "no keys" in label for label in labels)


def test_the_lines_are_the_thresholds(measured):
    figure = plots.budget_bars(measured, thresholds=Thresholds(trim=0.5, halve=0.6, emergency=0.7))
    assert [shape.x0 for shape in figure.layout.shapes] == [50, 60, 70]
    assert [shape.x0 for shape in plots.budget_bars(measured).layout.shapes] == [75, 85, 90]
    assert "50 % trim, 60 % halve, 70 % emergency" in words(figure)


def test_a_share_over_its_budget_is_named_and_fits():
    full = table_of({"events": 1_200_000, "writer": 10})
    figure = plots.budget_bars(full)
    assert full.over == ["streams"]
    assert "Over budget: streams" in words(figure)
    assert figure.layout.xaxis.range[1] > 240


def test_the_treemap_adds_up_to_what_is_attributed(measured):
    tree = plots.key_treemap(measured).data[0]
    tiles = pd.DataFrame({"id": tree.ids, "parent": tree.parents, "value": tree.values, "label": tree.labels})
    assert tiles["id"].is_unique
    roots = tiles[tiles["parent"] == ""].set_index("id")["value"]
    assert roots.to_dict() == measured.families["bytes"].to_dict()
    assert roots.sum() == measured.used_memory - measured.table.loc[UNATTRIBUTED, "bytes"]
    children = tiles[tiles["parent"] != ""].groupby("parent")["value"].sum()
    assert children.to_dict() == roots.to_dict()
    assert (tiles["value"] > 0).all()


def test_the_treemap_counts_the_keys_without_a_tile(measured):
    tree = plots.key_treemap(measured, keys=5).data[0]
    label = tree.labels[tree.ids.index("candle/")]
    assert label.startswith(f"{measured.families.loc['candle', 'keys'] - 5:,} other keys")
    top = measured.keys[measured.keys["family"] == "candle"].head(5)
    assert [tree.values[tree.ids.index(f"candle/{key}")] for key in top["key"]] == top["bytes"].tolist()


async def test_the_treemap_of_a_sample_adds_up_too(default_redis):
    await ingest(synth("normal", hours=0.2, seed=3), default_redis)
    sampled = await budget.measure(default_redis, limit=7)
    tree = plots.key_treemap(sampled).data[0]
    roots = {i: v for i, p, v in zip(tree.ids, tree.parents, tree.values, strict=True) if p == ""}
    assert roots == sampled.families["bytes"].to_dict()
    for root, size in roots.items():
        assert sum(v for p, v in zip(tree.parents, tree.values, strict=True) if p == root) == size


async def test_a_key_cannot_write_html_into_the_picture(default_redis):
    await default_redis.set("<a href='javascript:alert(1)'>x</a>", 1)
    labels = plots.key_treemap(await budget.measure(default_redis)).data[0].labels
    assert not [label for label in labels if "<a" in label]
    assert [label for label in labels if "&lt;a href" in label]


async def test_a_server_without_keys_has_a_treemap(default_redis):
    assert "No keys" in words(plots.key_treemap(await budget.measure(default_redis)))


# Memory through the feed


def played(used: list[int]) -> Ingested:
    times = [T0 + MINUTE_MS * i for i in range(len(used))]
    timeline = pd.DataFrame({"ts_ms": times, "events": range(len(used)), "used_memory": used, "keys": 1})
    return Ingested(len(used), 0, 0, 0, len(used), {}, 0, 1.0, timeline, detector.table([]))


def test_memory_over_time_of_a_small_feed_is_not_flattened_by_far_limits():
    figure = plots.memory_over_time(played([1 << 20, 5 << 20, 2 << 20]), table_of({"events": 9}, maxmemory=10**9))
    line = trace(figure, "used_memory")
    assert list(line.customdata) == [1 << 20, 5 << 20, 2 << 20]
    assert max(line.y) == 5
    assert figure.layout.yaxis.range[1] < 6
    assert not figure.layout.shapes
    assert "5.00 MiB, 0.5 %" in words(figure)
    assert "far above" in words(figure)
    assert list(trace(figure, "events so far").y) == [0, 1, 2]
    assert str(line.x[1]).startswith("2026-10-01T00:01")


def test_memory_over_time_of_a_full_server_shows_the_limits():
    figure = plots.memory_over_time(played([10, 8 << 20]), table_of({"events": 9}, maxmemory=10 << 20))
    assert [shape.y0 for shape in figure.layout.shapes] == pytest.approx([7.5, 8.5, 9, 10])
    assert figure.layout.yaxis.range[1] > 10


async def test_memory_over_time_draws_what_an_ingest_saw(default_redis):
    done = await ingest(synth("quiet", hours=1, seed=3), default_redis)
    figure = plots.memory_over_time(done, await budget.measure(default_redis))
    assert list(trace(figure, "used_memory").customdata) == done.timeline["used_memory"].tolist()
    assert trace(figure, "events so far").y[-1] == done.events


# The feed


def events_at(times, sides=None, notional=1.0) -> pd.DataFrame:
    n = len(times)
    return event_table(times, ["x"] * n, ["A"] * n, sides or ["sell"] * n, [1.0] * n, [1.0] * n, [notional] * n)


def bars(figure) -> pd.DataFrame:
    sides = {side: trace(figure, plots.SIDE_NAMES[side]) for side in plots.SIDE_COLORS}
    first = sides["sell"]
    times = pd.to_datetime(first.x0 + first.dx * np.arange(len(first.y)) - first.dx // 2, unit="ms")
    return pd.DataFrame({side: np.asarray(bar.y) for side, bar in sides.items()}, index=times)


def test_events_per_minute_counts_every_event_once_and_gaps_as_zero():
    times = [T0, T0 + 59_999, T0 + 60_000, T0 + 5 * MINUTE_MS]
    drawn = bars(plots.events_per_minute(events_at(times, ["sell", "buy", "sell", "buy"])))
    assert drawn["sell"].tolist() == [1, 1, 0, 0, 0, 0]
    assert drawn["buy"].tolist() == [1, 0, 0, 0, 0, 1]
    assert drawn.index[0] == pd.Timestamp("2026-10-01 00:00")


@pytest.mark.parametrize(
    ("days", "width"),
    [(0, "1-minute"), (1, "1-minute"), (3, "5-minute"), (60, "1-hour"), (400, "12-hour"), (9000, "7-day")],
)
def test_bars_widen_with_the_feed_and_the_rate_stays_a_minute_s(days, width):
    times = [T0 + days * DAY_MS * i // 999 for i in range(1000)]
    figure = plots.events_per_minute(events_at(times))
    drawn = bars(figure)
    assert len(drawn) <= plots.MAX_BARS
    assert f"{width} bars" in words(figure)
    minutes = trace(figure, plots.SIDE_NAMES["sell"]).dx / MINUTE_MS
    assert drawn["sell"].sum() * minutes == pytest.approx(1000)


def test_notional_per_minute_adds_up_to_the_feed():
    feed = synth("normal", hours=3, seed=5)
    figure = plots.notional_per_minute(feed)
    drawn = bars(figure)
    unit = {"million": 1e6, "thousand": 1e3}[figure.layout.yaxis.title.text.split()[0]]
    for side in ("sell", "buy"):
        assert drawn[side].sum() * unit == pytest.approx(feed.loc[feed["side"] == side, "notional"].sum())
    assert "USD a minute" in figure.layout.yaxis.title.text
    assert "UTC" in figure.layout.xaxis.title.text


def test_the_title_names_the_peak():
    times = [T0 + HOUR_MS * i for i in range(3)] + [T0 + 90 * MINUTE_MS + i for i in range(7)]
    text = words(plots.events_per_minute(events_at(sorted(times))))
    assert "7 at the peak" in text
    assert "01 Oct 01:30" in text


def test_sides_have_the_same_colors_everywhere():
    feed = synth("quiet", hours=2, seed=5)
    for figure in (plots.events_per_minute(feed), plots.notional_per_minute(feed), plots.top_symbols(feed)):
        for bar in figure.data:
            side = "sell" if "sell" in bar.name else "buy"
            assert bar.marker.color == plots.SIDE_COLORS[side]
    assert plots.SIDE_COLORS["sell"] != plots.SIDE_COLORS["buy"]


def test_top_symbols_are_the_largest_by_notional():
    feed = synth("normal", hours=2, seed=5)
    figure = plots.top_symbols(feed, n=7)
    wanted = feed.groupby("symbol", observed=True)["notional"].sum().nlargest(7)
    assert list(figure.data[0].y) == wanted.index.tolist()
    sell_usd, sell_count, buy_usd, buy_count = figure.data
    assert np.add(sell_usd.customdata, buy_usd.customdata) == pytest.approx(wanted.to_numpy())
    counts = feed["symbol"].value_counts()[wanted.index]
    assert np.add(sell_count.x, buy_count.x).tolist() == counts.tolist()
    assert f"The 7 largest of {feed['symbol'].nunique()} symbols" in words(figure)


def test_top_symbols_leaves_out_categories_without_events():
    feed = synth("quiet", hours=2, seed=5)
    some = feed[feed["symbol"].isin(["BTCUSDT", "ETHUSDT"])].reset_index(drop=True)
    assert sorted(plots.top_symbols(some).data[0].y) == ["BTCUSDT", "ETHUSDT"]


def test_codec_costs_are_drawn_as_they_were_measured():
    compared = compare(synth("normal", hours=0.2, seed=3))
    figure = plots.codec_costs(compared)
    drawn = {name: (x, y) for mark in figure.data for name, x, y in zip(mark.text, mark.x, mark.y, strict=True)}
    assert drawn == {name: (row["encode_us"] + row["decode_us"], row["bytes"]) for name, row in compared.iterrows()}
    assert words(figure).startswith("block takes")


def test_a_breaker_s_states_are_shaded_as_long_as_they_last():
    states = ["closed"] * 3 + ["open"] * 4 + ["closed"] * 2 + ["half-open"] * 2
    seen = pd.DataFrame({"seconds": np.arange(11) / 2, "phase": ["works"] * 2 + ["frozen"] * 9, "breaker": states})
    seen = seen.assign(**{"in Redis": range(0, 110, 10), "in the journal": [0] * 4 + [1234] + [0] * 6, "in memory": 7})
    figure = plots.breaker_timeline(seen)
    bands = [(shape.fillcolor, shape.x0, shape.x1) for shape in figure.layout.shapes if shape.type == "rect"]
    colors = [plots.STATE_COLORS[state] for state in ("closed", "open", "closed", "half-open")]
    assert bands == list(zip(colors, [0, 1.5, 3.5, 4.5], [1.5, 3.5, 4.5, 5], strict=True))
    labels = [(note.text, note.x) for note in figure.layout.annotations]
    assert labels[:2] == [("closed", 0.75), ("open", 2.5)]
    assert labels[-2:] == [("works", 0.5), ("frozen", 3.0)]
    assert {place: list(trace(figure, place).y) for place in plots.PLACE_COLORS} == seen[[*plots.PLACE_COLORS]].to_dict(
        "list"
    )
    assert "Up to 1,234 events wait in the journal, 7 in memory" in words(figure)
    assert "closed for 2.5 s, half-open for 0.5 s, open for 2.0 s" in words(figure)


def drilled() -> Drilled:
    """Ten minutes: calm, trim, emergency, calm again."""
    tiers = ["normal"] * 3 + ["trim"] * 2 + ["emergency"] * 2 + ["normal"] * 3
    states = ["closed"] * 5 + ["open"] * 2 + ["closed"] * 3
    seen = pd.DataFrame({"ts_ms": T0 + MINUTE_MS * np.arange(10), "tier": tiers, "breaker": states})
    seen = seen.assign(used_ratio=np.linspace(0.5, 0.95, 10), neighbour_ratio=0.4, journaled=[0] * 6 + [1234] + [0] * 3)
    at_ms = T0 + 5 * MINUTE_MS
    done = [("trim", "events", 3_000_000), ("drop", "candle", 500_000), ("seal", "events", 250_000)]
    done += [("drop", "candle_5m", 500_000), ("tier", "all", 0), ("purge", "all", 9), ("seal", "events", -77)]
    actions = [
        Action(at_ms, "emergency", what, name, 0, 0, max(size, 0), max(-size, 0), "") for what, name, size in done
    ]
    return Drilled(seen, actions, 0, 0, 0)


def test_a_drill_shows_memory_tiers_what_was_freed_and_the_journal():
    figure = plots.pressure_timeline(drilled())
    assert list(trace(figure, "used").y) == pytest.approx(100 * np.linspace(0.5, 0.95, 10))
    assert set(trace(figure, "neighbour").y) == {40}
    assert max(trace(figure, "in the journal").y) == 1234
    assert (trace(figure, "streams").y[0], trace(figure, "statistics").y[0]) == (3.25, 1.0)
    assert trace(figure, "streams").customdata[0] == "trim events, seal events"
    assert trace(figure, "streams").marker.color == plots.SHARE_COLORS["streams"]
    bands = {
        (shape.yref, shape.fillcolor): (pd.Timestamp(shape.x0).minute, pd.Timestamp(shape.x1).minute)
        for shape in figure.layout.shapes
        if shape.type == "rect"
    }
    assert bands == {
        ("y domain", plots.TIER_COLORS["trim"]): (3, 5),
        ("y domain", plots.TIER_COLORS["emergency"]): (5, 7),
        ("y3 domain", plots.STATE_COLORS["open"]): (5, 7),
    }
    assert [shape.y0 for shape in figure.layout.shapes if shape.type == "line"] == [75, 85, 90, 95]
    assert "Memory peaks at 95.0 %; cleanup frees 4.05 MiB" in words(figure)
    assert "Tiers: trim, emergency. Up to 1,234 events wait in the journal." in words(figure)
    begin, end = figure.layout.xaxis.range
    assert T0 / 1e3 < begin.timestamp() < T0 / 1e3 + 180
    assert T0 / 1e3 + 360 < end.timestamp() < T0 / 1e3 + 480


def test_a_drill_without_cleanup_is_drawn_too():
    calm = drilled().timeline.assign(tier="", breaker="")
    figure = plots.pressure_timeline(Drilled(calm, [], 5, 5, 0), thresholds=Thresholds(trim=0.5))
    assert "cleanup frees 0 B" in words(figure)
    assert [shape.y0 for shape in figure.layout.shapes] == [50, 85, 90, 95]


# Percentiles


def costs_of(rows: list[tuple[str, bool, float, int]], symbol: str = "A") -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["method", "biased", "dollar_error_pct", "bytes"])
    return table.assign(symbol=symbol, events=1_234, rank_error_points=0.5, query_us=9.0)


async def test_methods_are_drawn_as_they_were_measured(default_redis):
    compared = await methods_compared(synth("normal", hours=1, seed=3), default_redis)
    figure = plots.percentile_costs(compared)
    marks = [mark for mark in figure.data if mark.mode == "markers"]
    found = {(mark.name, mark.xaxis): (mark.x[0], mark.customdata[0][0]) for mark in marks}
    symbols = list(compared["symbol"].unique())
    axes = dict(zip(symbols, ["x", "x2"], strict=True))
    assert len(symbols) == 2
    assert found == {(row.method, axes[row.symbol]): (row.bytes, row.dollar_error_pct) for row in compared.itertuples()}
    assert {mark.name for mark in marks if mark.marker.symbol.endswith("open")} == {"topk"}
    assert {mark.name: mark.marker.color for mark in marks}.items() <= plots.METHOD_COLORS.items()
    keys = [note.text for note in figure.layout.annotations]
    assert all(f"<b>{symbol}</b>" in key for symbol, key in zip(symbols, keys, strict=True))
    assert all("logbins" in key and "us" in key for key in keys)


def test_the_front_is_beaten_by_none_and_leaves_the_biased_out():
    rows = [("logbins", False, 0.9, 2_000), ("exact", False, 0.0, 90_000), ("reservoir", False, 30.0, 7_000)]
    rows += [("topk", True, 400.0, 500), ("tdigest", False, 5.0, 1_000)]
    front = trace(plots.percentile_costs(costs_of(rows)), "front")
    assert list(front.x) == [1_000, 2_000, 90_000]
    assert list(front.y) == [5.0, 0.9, 0.01]  # nothing has no logarithm


def test_the_title_of_costs_names_the_smallest_that_is_close_and_the_worst():
    rows = [("exact", False, 0.0, 90_000), ("logbins", False, 0.9, 2_048), ("topk", True, 400.0, 1_024)]
    assert "logbins is 0.90 % off in 2.00 KiB, topk 400 % in 1.00 KiB" in words(plots.percentile_costs(costs_of(rows)))
    alone = words(plots.percentile_costs(costs_of(rows[1:2])))
    assert "logbins is 0.90 % off in 2.00 KiB" in alone
    assert "topk" not in alone
    assert "No percentiles" in words(plots.percentile_costs(costs_of([])))


def test_thresholds_are_lines_in_feed_time_upon_the_exact_one():
    seen = pd.DataFrame({"logbins": [101.0, 198], "exact": [100.0, 200], "topk": [400.0, 900], "tdigest": [103.0, 200]})
    figure = plots.thresholds_over_time(seen.set_axis([T0, T0 + HOUR_MS]), symbol="A", percentile=95.0)
    assert [line.name for line in figure.data] == ["exact", "logbins", "topk", "tdigest"]
    assert {line.name: list(line.y) for line in figure.data} == seen.to_dict("list")
    assert [str(at)[:16] for at in figure.data[0].x] == ["2026-10-01T00:00", "2026-10-01T01:00"]
    assert "The p95 of A: logbins is at most 1.0 % off, topk up to 350 %" in words(figure)
    key = figure.layout.annotations[0].text.replace("\N{NO-BREAK SPACE}", " ")
    assert all(text in key for text in ("logbins 1.0 %", "tdigest 3.0 %", "topk 350 %"))
    two = plots.thresholds_over_time(seen[["exact", "logbins"]].set_axis([T0, T0 + 1]), symbol="A", percentile=99.5)
    assert "p99.5 of A: logbins is at most 1.0 % off" in words(two)


def alerts_of(*rows: tuple[str, int]) -> pd.DataFrame:
    return detector.table(
        detector.Alert(T0 + 1000 * s, name, "buy", "okx", 1.0, 2.0, 1.5, 0.9, 3.0) for name, s in rows
    )


def test_alerts_that_differ_stand_where_they_were():
    true = alerts_of(("A", 0), ("A", 5_000), ("B", 10), ("C", 20), ("C", 3_000), ("D", 1))
    found = alerts_of(("A", 0), ("A", 5_060), ("B", 10), ("B", 4_000), ("C", 20), ("D", 1))
    runs = {"good": compare_alerts(true, true, within_s=600), "bad": compare_alerts(found, true, within_s=600)}
    figure = plots.alerts_differing(runs, symbols=3)
    drawn = {
        ("good" if mark.xaxis == "x" else "bad", mark.name): [
            (y, (pd.Timestamp(x).value // 10**6 - T0) // 1000) for x, y in zip(mark.x, mark.y, strict=True)
        ]
        for mark in figure.data
    }
    assert len(drawn["good", "same event"]) == 6
    assert drawn["bad", "same event"] == [("A", 0), ("all others", 1), ("B", 10), ("C", 20)]
    assert drawn["bad", "shifted"] == [("A", 5_000)]
    assert drawn["bad", "missed"] == [("C", 3_000)]
    assert drawn["bad", "extra"] == [("B", 4_000)]
    assert figure.layout.yaxis2.categoryarray[0] == "all others"
    assert "Of 6 alerts, good misses 0, bad misses 1" in words(figure)
    keys = [re.sub("<.*?>", "", note.text) for note in figure.layout.annotations]
    assert "4 same event" in keys[1]
    assert "1 shifted" in keys[1]


def test_runs_without_alerts_are_said_to_have_none():
    none: Fidelity = compare_alerts(alerts_of(), alerts_of(), within_s=600)
    assert "No alerts" in words(plots.alerts_differing({"good": none}))
    assert "No alerts" in words(plots.alerts_differing({}))


@pytest.mark.parametrize("draw", [plots.events_per_minute, plots.notional_per_minute, plots.top_symbols])
def test_a_feed_without_events_is_said_to_be_one(draw):
    assert "No events" in words(draw(empty()))


@pytest.mark.parametrize("draw", [plots.events_per_minute, plots.notional_per_minute, plots.top_symbols])
def test_one_event_can_be_drawn(draw):
    assert draw(events_at([T0])).data


# All of them


def test_figures_of_a_day_are_small_and_their_titles_fit_a_phone(measured):
    day = synth("normal", hours=24, seed=1)
    figures = [plots.events_per_minute(day), plots.notional_per_minute(day), plots.top_symbols(day)]
    figures += [plots.budget_bars(measured), plots.key_treemap(measured)]
    figures.append(plots.memory_over_time(played([1_000_000] * 240), measured))
    figures.append(plots.pressure_timeline(drilled()))
    methods = [(name, name == "topk", 10.0**n, 10**n) for n, name in enumerate(plots.METHOD_COLORS)]
    figures.append(plots.percentile_costs(pd.concat([costs_of(methods, f"{name}, a day") for name in "ABCD"])))
    moments = pd.DataFrame(
        {name: np.linspace(1, 9, 144) for name in plots.METHOD_COLORS}, T0 + HOUR_MS * np.arange(144)
    )
    figures.append(plots.thresholds_over_time(moments, symbol="1000PEPEUSDT", percentile=95.0))
    alerts = alerts_of(*((f"SYM{n % 50}USDT", 60 * n) for n in range(500)))
    runs = {name: compare_alerts(alerts, alerts, within_s=600) for name in ("logbins", "topk")}
    figures.append(plots.alerts_differing(runs))
    assert len(day) == 144_000
    for figure in figures:
        assert len(json.dumps(json.loads(figure.to_json()))) < 60_000
        assert figure.layout.template.layout.font.family == plots.TEMPLATE.layout.font.family
        for line in figure.layout.title.text.split("<br>"):
            assert len(line) <= 40
        for line in figure.layout.title.subtitle.text.split("<br>"):
            assert len(re.sub("<.*?>", "", line)) <= 54


# A replay


async def test_a_replay_is_drawn_as_it_was(default_redis):
    done = await replay(synth("normal", hours=2, seed=3, symbols=6), default_redis, settings=load(), percentiles=[90.0])
    figure = done.plot()
    assert (np.array(trace(figure, "used_memory").y) * (1 << 20) == done.timeline["used_memory"]).all()
    busiest = done.errors["symbol"].iloc[0]
    assert list(trace(figure, busiest).y) == list(done.errors.loc[done.errors["symbol"] == busiest, "error_pct"])
    assert [sum(trace(figure, name).y) for name in ("true", "found")] == [
        len(done.fidelity.true),
        len(done.fidelity.found),
    ]
    assert "no event lost" in words(figure)
    assert "of 240.00 MiB" in figure.layout.annotations[0].text
    assert not figure.layout.shapes  # the limit is far above
    assert len(figure.to_json()) < 60_000


def test_a_replay_near_its_limit_shows_it_and_one_without_alerts_is_drawn_too():
    none = compare_alerts(detector.table([]), detector.table([]), within_s=600)
    seen = played([1 << 20, 7 << 20])
    errors = pd.DataFrame(columns=["ts_ms", "symbol", "percentile", "found", "exact", "error_pct"])
    figure = Replayed(seen, pd.DataFrame(), none, errors, 8 << 20).plot()
    assert [shape.y0 for shape in figure.layout.shapes] == [8]
    assert "No alerts" in words(figure)
    assert "no percentiles were compared" in figure.layout.annotations[1].text
