"""The tuning panel: move a knob, see what it costs and what it buys, verify it on Redis, take it away."""

from __future__ import annotations

import asyncio
import copy
import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import ipywidgets as w
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from liqlab import config, server
from liqlab.budget import human
from liqlab.feeds import Feed
from liqlab.plots.tuning import panel_data, tuning_panel
from liqlab.settings import Settings, SettingsError, changed, load, setting
from liqlab.sizing import Calibration, Prepared, prepare
from liqlab.tuning import Outcome, Verified, evaluate, verify

_MINUTE, _HOUR, _KIB, _MIB = 60, 3_600, 1 << 10, 1 << 20
_PLOTLY: Final = "application/vnd.plotly.v1+json"
_UNSET: Final = 0  # of a setting that is not set: a slider has no None
_WHOLE: Final = 10  # from which on a figure is shown without its fraction


def _times(*seconds: int) -> dict[str, int]:
    return {f"{one // _HOUR} h" if one >= _HOUR else f"{one // _MINUTE} min": one for one in seconds}


def _sizes(*sizes: int) -> dict[str, int]:
    return {human(one).replace(".00", ""): one for one in sizes}


# The knobs, in the order of the panel: what they are called, and the values that a slider or a menu has.
KNOBS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "server.maxmemory": ("memory", _sizes(*(size * _MIB for size in (4, 8, 16, 32, 64, 128, 192, 240, 512, 1024)))),
    "writer.layout": ("layout", {name: name for name in ("shared", "hybrid", "per_symbol")}),
    "writer.codec": ("hot codec", {name: name for name in ("ints", "struct19", "fields", "msgpack", "json")}),
    "retention.hot_s": ("hot window", _times(*(_MINUTE * one for one in (1, 2, 5, 10, 15, 30, 60, 120)))),
    "writer.block_bytes": ("block", _sizes(*(_KIB << shift for shift in range(9)))),
    "writer.block_codec": ("block codec", {name: name for name in ("block", "msgpack-zlib")}),
    "detector.method": ("percentiles", {name: name for name in ("logbins", "exact", "reservoir", "topk")}),
    "detector.size": ("kept", {"usual": _UNSET, **{f"{one:,}": one for one in (20, 50, 100, 126, 250, 500, 1_000)}}),
    "retention.percentile_window_s": ("window", _times(*(_HOUR * one for one in (1, 2, 3, 6, 12, 24, 48)))),
    "retention.percentile_bucket_s": ("bucket", _times(*(_MINUTE * one for one in (15, 30, 60, 120, 240)))),
    "detector.percentile": ("percentile", {f"p{one:g}": one for one in (80.0, 90.0, 95.0, 97.5, 99.0, 99.5)}),
    "writer.candles": ("candles", {name: name for name in ("packed", "hash")}),
    "retention.candle_s": ("candles kept", _times(*(_MINUTE * one for one in (5, 15, 30, 60, 120)))),
    "retention.vwap_s": ("VWAP idle", _times(*(_MINUTE * one for one in (15, 30, 60, 120)))),
}


def is_number(values: Mapping[str, Any]) -> bool:
    """Return whether the values of a knob are numbers, for which there is a slider; else there is a menu."""
    return any(isinstance(one, int | float) for one in values.values())


class _Figure(go.FigureWidget):  # type: ignore[misc]
    """A figure that shows a page that opens later what it shows now: plotly's own shows what it began with."""

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> Any:
        """Return the state that the page asks for."""
        if key is None and "_data" in vars(self):  # it is asked once before there is any
            self._widget_data, self._widget_layout = copy.deepcopy(self._data), copy.deepcopy(self._layout)
        return super().get_state(key=key, drop_defaults=drop_defaults)


class TuningPanel(w.VBox):  # type: ignore[misc]
    """A feed's tuning panel; make it with `panel`.

    Attributes
    ----------
    settings : Settings
        As the knobs stand.
    outcome : Outcome
        What they cost and buy, by the models.
    pinned : Outcome or None
        What they are compared with.
    verified : liqlab.tuning.Verified or None
        The last replay on a real server.
    task : asyncio.Task or None
        The replay that runs, or that ran last.
    """

    def __init__(
        self,
        events: Prepared,
        settings: Settings,
        calibration: Calibration | None,
        *,
        export_to: Path,
    ) -> None:
        self.settings = settings
        self.pinned: Outcome | None = None
        self.verified: Verified | None = None
        self._events, self._base, self._calibration, self._export_to = events, settings, calibration, export_to
        self.task: asyncio.Task[None] | None = None
        self.outcome = self._evaluated(settings)
        self.knobs = {name: self._knob(name, *found) for name, found in KNOBS.items()}
        self.say = w.HTML()
        self.figure = _Figure(tuning_panel(self.outcome))
        self.figure.update_layout(title=None, margin_t=36, height=700)
        self.pin = self._button("Compare with this", "Keep these settings in the pictures, in black", self._pin)
        self.check = self._button("Verify on Redis", "Play the feed through a real Redis", self._start)
        self.cancel = self._button("Cancel", "Stop the replay", self._cancel)
        self.export = self._button("Export", f"Write liqlab.toml, redis.conf and compose to {export_to}", self._export)
        self.reset = self._button("Reset", "Back to the settings that the panel began with", self._reset)
        self.cancel.layout.display = "none"
        self.bar = w.FloatProgress(value=0, min=0, max=1, layout=w.Layout(width="100%", display="none"))
        self.note = w.HTML()
        knobs = w.Box(list(self.knobs.values()), layout=w.Layout(flex_flow="row wrap", width="100%"))
        buttons = w.Box(
            [self.pin, self.check, self.cancel, self.export, self.reset],
            layout=w.Layout(flex_flow="row wrap", width="100%"),
        )
        super().__init__(
            [self.say, knobs, buttons, self.bar, self.note, self.figure],
            layout=w.Layout(width="100%", max_width="1200px"),
        )
        self._show()

    def _evaluated(self, settings: Settings) -> Outcome:
        window_s = self._base.retention.percentile_window_s
        return evaluate(self._events, settings, self._calibration, window_s=window_s)

    def _knob(self, name: str, label: str, values: Mapping[str, Any]) -> Any:
        now = setting(self.settings, name) or _UNSET
        if now not in values.values():
            values = dict(sorted({**values, f"{now:,}" if isinstance(now, int | float) else str(now): now}.items(),
                                 key=lambda item: item[1]))  # fmt: skip
        # A slider reports while it is dragged: it is the models that run.
        kind, drag = (w.SelectionSlider, {"continuous_update": True}) if is_number(values) else (w.Dropdown, {})
        knob = kind(
            options=list(values.items()), value=now, description=label, tooltip=f"{name}, see docs/settings.md", **drag,
            style={"description_width": "96px"}, layout=w.Layout(width="min(340px, 96vw)"),
        )  # fmt: skip
        knob.observe(lambda change: self._turn({name: change["new"] or None}), "value")
        return knob

    def _button(self, text: str, tooltip: str, act: Any) -> Any:
        button = w.Button(description=text, tooltip=tooltip, layout=w.Layout(width="auto"))
        button.on_click(lambda _: act())
        return button

    def _turn(self, changes: Mapping[str, Any]) -> None:
        try:
            settings = changed(self.settings, changes)
            outcome = self._evaluated(settings)
        except (SettingsError, ValueError) as error:
            self._tell(str(error), bad=True)
            return
        self.settings, self.outcome = settings, outcome
        self._show()

    def _show(self) -> None:
        """Bring the pictures to where the knobs are; figures stand, and only what they show changes."""
        found = self.outcome
        color = "#24292F" if found.fits else "#B3261E"
        self.say.value = (
            f'<div style="font-size:20px;font-weight:600;color:{color};line-height:1.3">{html.escape(found.headline)}'
            f'</div><div style="color:#57606A;line-height:1.4">{html.escape(found.detail)}</div>'
        )
        with self.figure.batch_update():
            for trace, new in zip(self.figure.data, panel_data(found, self.pinned), strict=True):
                trace.update(new, overwrite=True)

    def _pin(self) -> None:
        self.pinned = None if self.pinned else self.outcome
        self.pin.description = "Compare no more" if self.pinned else "Compare with this"
        self._show()

    def _reset(self) -> None:
        for name, knob in self.knobs.items():
            knob.value = setting(self._base, name) or _UNSET

    def _export(self) -> None:
        try:
            written = config.write(self._export_to, self.settings)
        except (OSError, SettingsError) as error:
            self._tell(f"not written: {error}", bad=True)
            return
        self._tell(f"Written to {self._export_to}: {', '.join(path.name for path in written)}")

    def _start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._verify())

    def _cancel(self) -> None:
        if self.task:
            self.task.cancel()

    async def _verify(self) -> None:
        """Play the feed through a private server under the settings as they are now."""
        settings = self.settings

        def step(done: int, total: int) -> None:
            self.bar.value = done / max(total, 1)

        self.check.disabled, self.cancel.layout.display, self.bar.layout.display = True, "", ""
        self.bar.value = 0
        self._tell("Playing the feed through a real Redis ...")
        try:
            with server.serve(settings=settings) as running:
                async with running.connect() as redis:
                    self.verified = await verify(
                        self._events, settings, redis, calibration=self._calibration,
                        window_s=self._base.retention.percentile_window_s, progress=step,
                    )  # fmt: skip
            self.note.value = _table(self.verified.table)
        except asyncio.CancelledError:
            self._tell("Cancelled; the private server is gone, nothing else was touched.")
        except Exception as error:  # a button has nobody else to tell
            self._tell(f"{type(error).__name__}: {error}", bad=True)
        finally:
            self.check.disabled, self.cancel.layout.display, self.bar.layout.display = False, "none", "none"

    def _tell(self, text: str, *, bad: bool = False) -> None:
        self.note.value = f'<span style="color:{"#B3261E" if bad else "#24292F"}">{html.escape(text)}</span>'

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Return the panel, and beside it what it shows as a plain figure: for pages that have no kernel."""
        found = super()._repr_mimebundle_(**options)
        figure = tuning_panel(self.outcome, self.pinned)
        return {
            **(found or {}),
            _PLOTLY: pio.renderers["plotly_mimetype"].to_mimebundle(figure.to_plotly_json())[_PLOTLY],
        }


def _table(table: pd.DataFrame) -> str:
    def text(value: float) -> str:
        return "" if np.isnan(value) else f"{value:,.0f}" if abs(value) >= _WHOLE else f"{value:.3g}"

    cell = 'style="padding:0 12px 0 0;text-align:right"'
    rows = [
        f'<tr style="line-height:1.35"><th style="text-align:left;font-weight:400">{html.escape(str(name))}</th>'
        + "".join(f"<td {cell}>{text(float(value))}</td>" for value in row)
        + "</tr>"
        for name, row in table.iterrows()
    ]
    head = "".join(f"<th {cell}>{name}</th>" for name in ("predicted", "measured", "off, %"))
    return f'<table style="font-size:12px"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def panel(
    feed: Feed | pd.DataFrame | Prepared,
    settings: Settings | None = None,
    *,
    calibration: Calibration | None = None,
    export_to: str | Path = "liqlab-config",
) -> TuningPanel:
    """Return the tuning panel of a feed: a widget in JupyterLab and Voila, a figure where there is no kernel.

    Parameters
    ----------
    feed : Feed, pandas.DataFrame or Prepared
        From `liqlab.read_feed`, or an event table.
    settings : Settings, optional
        Where the knobs begin, and the window that thresholds should be of; `liqlab.settings.load()` when absent.
    calibration : Calibration, optional
        From `liqlab.sizing.calibrate`; by the sources of Redis 8.2 when absent.
    export_to : path
        The folder that the export writes `liqlab.toml`, `redis.conf`, `docker-compose.yml` and the rest to.

    Raises
    ------
    EventError
        The feed holds no event.
    """
    return TuningPanel(prepare(feed), settings or load(), calibration, export_to=Path(export_to))
