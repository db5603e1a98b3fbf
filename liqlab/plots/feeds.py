"""What is in a feed."""

from __future__ import annotations

import html
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from liqlab.clock import DAY_MS, HOUR_MS, MINUTE_MS
from liqlab.plots.style import SIDE_COLORS, SIDE_NAMES, dress, nothing

MAX_BARS: Final = 1_500
_BINS_MS: Final = (
    *(n * MINUTE_MS for n in (1, 2, 5, 10, 15, 30)),
    *(n * HOUR_MS for n in (1, 2, 4, 6, 12)),
    *(n * DAY_MS for n in (1, 2, 7, 14, 30, 60, 120, 365)),
)


def events_per_minute(events: pd.DataFrame) -> go.Figure:
    """Draw events a minute by side; minutes without any are zero. Bars widen so that at most `MAX_BARS` are drawn."""
    return _rate(events, np.ones(len(events)), "Events per minute")


def notional_per_minute(events: pd.DataFrame) -> go.Figure:
    """Draw USD a minute by side, in the bars of `events_per_minute`."""
    return _rate(events, events["notional"].to_numpy(), "Liquidated per minute", "USD")


def top_symbols(events: pd.DataFrame, n: int = 20) -> go.Figure:
    """Draw the `n` symbols with the largest notional: USD and number of events by side."""
    if events.empty:
        return nothing("No events")
    by_side = events.groupby(["symbol", "side"], observed=False)["notional"]
    usd, count = by_side.sum().unstack("side"), by_side.count().unstack("side")
    order = usd.sum(axis=1).sort_values(ascending=False, kind="stable")
    held, total = events["symbol"].nunique(), float(order.sum())
    order = order.head(min(n, held))
    names = [html.escape(str(name)) for name in order.index]
    divisor, word = _unit(float(order.iloc[0]))
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    for side, color in SIDE_COLORS.items():
        bar = {"name": SIDE_NAMES[side], "y": names, "orientation": "h", "marker": {"color": color}}
        hover, values = f"%{{y}}, {side}<br>%{{customdata:,.0f}} USD<extra></extra>", usd.loc[order.index, side]
        figure.add_bar(x=values / divisor, customdata=values, hovertemplate=hover, col=1, row=1, **bar)
        hover, values = f"%{{y}}, {side}<br>%{{x:,}} events<extra></extra>", count.loc[order.index, side]
        figure.add_bar(x=values, hovertemplate=hover, showlegend=False, col=2, row=1, **bar)
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_yaxes(autorange="reversed", type="category", tickfont={"size": 11}, dtick=1)
    figure.update_xaxes(title_text=f"{word}USD", col=1)
    figure.update_xaxes(title_text="events", col=2)
    title = f"{names[0]} has {order.iloc[0] / total:.0%} of the {_amount(total, 'USD')}"
    detail = f"The {len(order)} largest of {held:,} symbols, by notional"
    return dress(figure, title, detail, 20 * len(order) + 70, legend=True)


def _rate(events: pd.DataFrame, weights: NDArray[Any], what: str, unit: str = "") -> go.Figure:
    if events.empty:
        return nothing("No events")
    times = events["ts_ms"].to_numpy()
    width = next((w for w in _BINS_MS if times[-1] // w - times[0] // w < MAX_BARS), _BINS_MS[-1])
    first = times[0] // width
    place = times // width - first
    minutes = width / MINUTE_MS
    sides = {
        side: np.bincount(place, weights * (events["side"] == side).to_numpy(), int(place[-1]) + 1) / minutes
        for side in SIDE_COLORS
    }
    total = sides["sell"] + sides["buy"]
    divisor, word = _unit(float(np.max(total))) if unit else (1.0, "")
    figure = go.Figure()
    each = f"{word}{unit or 'events'} a minute"
    for side, values in sides.items():
        figure.add_bar(
            name=SIDE_NAMES[side],
            x0=int(first * width + width // 2),  # evenly spaced bars need a start and a step, not a list of times
            dx=width,
            y=values / divisor,
            width=width,
            marker={"color": SIDE_COLORS[side], "line": {"width": 0}},
            hovertemplate=f"%{{x|%Y-%m-%d %H:%M}} UTC, {side}<br>%{{y:,.2~f}} {each}<extra></extra>",
        )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(type="date", title_text="feed time, UTC")
    figure.update_yaxes(title_text=each, rangemode="tozero")
    peak = int(np.argmax(total))
    mean, most = (_amount(float(value), unit).rstrip() for value in (np.mean(total), np.max(total)))
    at, day = pd.Timestamp((first + peak) * width, unit="ms"), pd.Timestamp(times[0], unit="ms")
    detail = f"{_span(width)} bars from {day:%Y-%m-%d %H:%M} UTC; the peak at {at:%d %b %H:%M}"
    return dress(figure, f"{what}: {mean} on average, {most} at the peak", detail, 320, legend=True)


def _unit(largest: float) -> tuple[float, str]:
    units = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (0.0, ""))
    return next((size or 1.0, word) for size, word in units if largest >= size)


def _amount(value: float, unit: str) -> str:
    size, word = _unit(value) if unit else (1.0, "")
    number = value / size
    return f"{number:,.0f} {word}{unit}" if number >= 100 else f"{number:.3g} {word}{unit}"


def _span(width_ms: int) -> str:
    size, name = next((s, n) for s, n in ((DAY_MS, "day"), (HOUR_MS, "hour"), (MINUTE_MS, "minute")) if width_ms >= s)
    return f"{width_ms // size}-{name}"
