"""The tuning panel without a page: its knobs, buttons and figure, and the replay behind one of them."""

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path

import numpy as np
import pytest

import liqlab
from liqlab import settings, sizing, widgets
from liqlab.events import EventError, empty
from liqlab.settings import changed
from liqlab.tuning import evaluate
from liqlab.widgets.panel import KNOBS, TuningPanel

PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def events() -> sizing.Prepared:
    return sizing.prepare(liqlab.synth("normal", hours=1, symbols=30, seed=2))


@pytest.fixture
def panel(events: sizing.Prepared, tmp_path: Path) -> TuningPanel:
    return widgets.panel(events, settings.load(), export_to=tmp_path / "made")


def test_every_value_of_every_knob_is_what_evaluate_says(events: sizing.Prepared, panel: TuningPanel) -> None:
    for name, (_, values) in KNOBS.items():
        for value in list(values.values())[:2]:
            panel.knobs[name].value = value
            section, field = name.split(".")
            assert getattr(getattr(panel.settings, section), field) == (value or None)  # a slider has no None
            assert panel.note.value == ""
    expected = evaluate(events, panel.settings, window_s=settings.load().retention.percentile_window_s)
    assert panel.outcome.as_dict() == expected.as_dict()
    used = panel.figure.data[1]
    assert np.allclose(used.x, 100 - expected.shares["headroom_pct"])


def test_the_pictures_stay_and_what_they_show_changes(panel: TuningPanel) -> None:
    before, traces = panel.say.value, panel.figure.data
    shown = np.array(traces[1].x)
    panel.knobs["server.maxmemory"].value = 8 << 20
    assert panel.figure.data is traces or all(a is b for a, b in zip(panel.figure.data, traces, strict=True))
    assert panel.say.value != before
    assert (np.array(panel.figure.data[1].x) > shown).all()
    assert "8.00 MiB" in panel.say.value


def test_a_value_of_ones_own_is_a_value_of_the_knob(events: sizing.Prepared) -> None:
    own = changed(settings.load(), {"retention.hot_s": 777, "server.maxmemory": 100 << 20})
    panel = widgets.panel(events, own)
    assert panel.knobs["retention.hot_s"].value == 777
    values = [value for _, value in panel.knobs["retention.hot_s"].options]
    assert values == sorted(values)


def test_percentiles_are_a_menu_and_their_size_a_slider(events: sizing.Prepared, panel: TuningPanel) -> None:
    base = panel.outcome.as_dict()
    panel.knobs["detector.size"].value = 20
    assert panel.outcome.as_dict() == base  # of log bins it says nothing
    panel.knobs["detector.method"].value = "topk"
    few = panel.outcome.as_dict()
    assert few["threshold_error_pct"] > 10 * base["threshold_error_pct"]
    assert few["percentile_bytes"] != base["percentile_bytes"]
    panel.knobs["detector.size"].value = 100
    assert panel.outcome.as_dict()["percentile_bytes"] > few["percentile_bytes"]
    panel.reset.click()
    assert panel.settings == settings.load()
    own = widgets.panel(events, changed(settings.load(), {"detector.method": "reservoir", "detector.size": 33}))
    assert own.knobs["detector.size"].value == 33


def test_pinned_settings_are_drawn_beside(panel: TuningPanel) -> None:
    assert len(panel.figure.data[2].x) == 0
    panel.pin.click()
    kept = panel.outcome
    panel.knobs["retention.candle_s"].value = 300
    assert panel.pinned is kept
    assert np.allclose(panel.figure.data[2].x, 100 - kept.shares["headroom_pct"])
    panel.pin.click()
    assert panel.pinned is None
    assert len(panel.figure.data[2].x) == 0


def test_reset_goes_back(panel: TuningPanel) -> None:
    first = panel.outcome.as_dict()
    panel.knobs["writer.layout"].value = "per_symbol"
    panel.knobs["retention.hot_s"].value = 60
    panel.reset.click()
    assert panel.settings == settings.load()
    assert panel.outcome.as_dict() == first


def test_export_writes_what_the_knobs_say(panel: TuningPanel, tmp_path: Path) -> None:
    panel.knobs["server.maxmemory"].value = 64 << 20
    panel.knobs["writer.layout"].value = "hybrid"
    panel.export.click()
    made = tomllib.loads((tmp_path / "made" / "liqlab.toml").read_text())
    assert made["server"]["maxmemory"] == "64mb"
    assert made["writer"]["layout"] == "hybrid"
    assert settings.load(**made) == panel.settings
    assert (tmp_path / "made" / "redis.conf").exists()
    assert "docker-compose.yml" in panel.note.value


def test_an_export_that_fails_says_why(events: sizing.Prepared, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    panel = widgets.panel(events, export_to=tmp_path / "file" / "below")
    panel.export.click()
    assert "not written" in panel.note.value


async def test_verify_plays_the_feed_on_a_real_server(panel: TuningPanel) -> None:
    panel.check.click()
    assert panel.task is not None
    await panel.task
    assert panel.verified is not None, panel.note.value
    assert panel.verified.fits
    assert panel.bar.value == 1
    assert "used_memory" in panel.note.value
    assert not panel.check.disabled


async def test_a_replay_can_be_cancelled(panel: TuningPanel) -> None:
    panel.check.click()
    await asyncio.sleep(0.3)
    assert panel.check.disabled
    panel.cancel.click()
    assert panel.task is not None
    await panel.task
    assert panel.verified is None
    assert "Cancelled" in panel.note.value
    assert not panel.check.disabled


def test_where_there_is_no_kernel_it_is_a_figure(panel: TuningPanel) -> None:
    panel.knobs["server.maxmemory"].value = 8 << 20
    bundle = panel._repr_mimebundle_()
    assert WIDGET in bundle
    assert bundle[PLOTLY]["data"]
    assert "8.00 MiB" in str(bundle[PLOTLY]["layout"]["title"]) or "over" in str(bundle[PLOTLY]["layout"]["title"])


def test_a_page_that_opens_later_sees_what_is_now(panel: TuningPanel) -> None:
    panel.knobs["server.maxmemory"].value = 8 << 20
    state = panel.figure.get_state()
    assert len(state["_widget_data"]) == len(panel.figure.data)
    assert list(state["_widget_data"][1]["text"]) == list(panel.figure.data[1].text)
    assert "of 3.20 MiB" in state["_widget_data"][1]["text"][0]


def test_a_feed_without_events_is_refused() -> None:
    with pytest.raises(EventError, match="no event"):
        widgets.panel(empty())
