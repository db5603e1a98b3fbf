"""Tables in, plotly figures out: one look, colours for colour-blind eyes, titles that say what one sees.

Everything is aggregated before it is drawn: a figure of a day of events is some ten kilobytes.
"""

from __future__ import annotations

import html
import textwrap
from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from liqlab.budget import FOREIGN, UNATTRIBUTED, Budget, human
from liqlab.clock import DAY_MS, HOUR_MS, MINUTE_MS
from liqlab.replay import Ingested
from liqlab.settings import Thresholds

# The palette of Okabe and Ito, https://jfly.uni-koeln.de/color/
SIDE_COLORS: Final = {"sell": "#D55E00", "buy": "#0072B2"}
SIDE_NAMES: Final = {"sell": "longs liquidated (sell orders)", "buy": "shorts liquidated (buy orders)"}
SHARE_COLORS: Final = {
    "streams": "#56B4E9",
    "vwap": "#009E73",
    "percentile": "#CC79A7",
    "statistics": "#E69F00",
    "misc": "#F0E442",
    UNATTRIBUTED: "#9AA0A6",
    FOREIGN: "#5F6368",
}
PLACE_COLORS: Final = {"in Redis": "#0072B2", "in the journal": "#D55E00", "in memory": "black"}
STATE_COLORS: Final = {"closed": "white", "half-open": "#FFF0B8", "open": "#F9D3C7"}
MAX_BARS: Final = 1_500
_INK, _FAINT, _PALE = "#24292F", "#6E7781", "#EEF1F4"
_WHOLE: Final = "whole server"
_TILE_HEAD: Final = 34
_MIB: Final = 1 << 20
_LINE_CHARS: Final = (40, 54)  # of a title and of the line below it, on a phone
_BINS_MS: Final = (
    *(n * MINUTE_MS for n in (1, 2, 5, 10, 15, 30)),
    *(n * HOUR_MS for n in (1, 2, 4, 6, 12)),
    *(n * DAY_MS for n in (1, 2, 7, 14, 30, 60, 120, 365)),
)

_AXIS: Final = {
    **{"gridcolor": "#E6E8EB", "zerolinecolor": "#C9CED3", "automargin": True},
    "title": {"standoff": 6, "font": {"size": 12}},
}
TEMPLATE: Final = go.layout.Template(
    layout={
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif",
            "size": 13,
            "color": _INK,
        },
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": list(SHARE_COLORS.values()),
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "margin": {"l": 12, "r": 12, "b": 12},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        "bargap": 0,
        "hoverlabel": {"align": "left"},
        "title": {
            **{"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
            **{
                "pad": {"t": 12, "l": 12},
                "font": {"size": 15, "weight": 600},
                "subtitle": {"font": {"size": 12, "color": _FAINT}},
            },
        },
    }
)


def budget_bars(budget: Budget, *, thresholds: Thresholds | None = None) -> go.Figure:
    """Draw each share of the memory budget: what its families use, against what it may use.

    Bars are per cent of the share's budget, a segment a family; the last one is the whole server against maxmemory.
    `customdata` of the trace ``used`` holds part, family, keys and exact bytes, as in `budget.table` and
    `budget.families`.
    """
    thresholds = thresholds or Thresholds()
    levels = [100 * level for level in (thresholds.trim, thresholds.halve, thresholds.emergency)]
    used_pct = 100 * budget.used_memory / budget.maxmemory
    labels = [_share_label(str(part), row) for part, row in budget.table.iterrows()]
    labels.append(f"<b>{_WHOLE}</b>  {human(budget.used_memory)} of {human(budget.maxmemory)}, {used_pct:.1f} %")
    rows, segments = list(range(len(labels))), _segments(budget)
    figure = go.Figure()
    bar = {"orientation": "h", "width": 0.42}
    figure.add_bar(name="budget", y=rows, x=[100] * len(rows), marker_color=_PALE, hoverinfo="skip", **bar)
    figure.add_bar(
        name="used",
        y=segments["row"],
        base=segments["base"],
        x=segments["width"],
        marker={"color": segments["color"], "line": {"color": "white", "width": 1}},
        customdata=segments[["part", "family", "keys", "bytes"]].to_numpy().tolist(),
        hovertemplate="%{customdata[0]}: %{customdata[1]}<br>%{customdata[3]:,} bytes, %{customdata[2]:,} keys"
        "<br>%{x:.2f} % of the share<extra></extra>",
        **bar,
    )
    for row, label in zip(rows, labels, strict=True):
        font = {"size": 12}
        place = {"xref": "paper", "x": 0, "xanchor": "left", "xshift": -2, "y": row - 0.24, "yanchor": "bottom"}
        figure.add_annotation(text=label, font=font, bgcolor="white", borderpad=0, showarrow=False, **place)
    for level in levels:
        figure.add_vline(x=level, line={"color": _FAINT, "width": 1, "dash": "dash"})
    end = max(102.0, 1.05 * float(np.nanmax([used_pct, *budget.table["used_pct"]])))
    ticks = {"tickvals": [0, 25, 50, *levels, 100]} if end < 150 else {}
    figure.update_xaxes(range=[0, end], showgrid=False, tickangle=0, tickfont_size=11, tickformat=".0f", **ticks)
    figure.update_xaxes(title_text="% of the share's budget")
    figure.update_yaxes(visible=False, range=[len(rows) - 0.6, -0.9])
    figure.update_layout(barmode="overlay", showlegend=False)

    title = f"{human(budget.used_memory)} of {human(budget.maxmemory)} used ({used_pct:.1f} %)"
    if budget.over:
        title = f"Over budget: {', '.join(map(_name, budget.over))}"
    fullest = budget.table["used_pct"].idxmax()
    detail = f"Fullest share: {_name(fullest)}, {budget.table['used_pct'].max():.1f} %. Dashed: "
    detail += "{:.0f} % trim, {:.0f} % halve, {:.0f} % emergency.".format(*levels)
    return _dress(figure, title, detail, 46 * len(rows) + 60)


def _segments(budget: Budget) -> pd.DataFrame:
    """Return what `budget_bars` draws, a row a segment: its bar, where it begins and how wide it is, in per cent."""
    segments = []
    for row, (part, share) in enumerate(budget.table.iterrows()):
        families = budget.families.loc[budget.families["share"] == part, ["keys", "bytes"]]
        pieces = list(families.itertuples(name=None))
        if part == UNATTRIBUTED:
            pieces = [("start-up, clients, scripts", 0, share["bytes"])]
        segments += [(row, part, *piece, SHARE_COLORS[str(part)], share["budget_bytes"]) for piece in pieces]
    used = (len(budget.table), _WHOLE, "used_memory", budget.table["keys"].sum(), budget.used_memory)
    segments.append((*used, _INK, budget.maxmemory))
    columns = ["row", "part", "family", "keys", "bytes", "color", "budget"]
    table = pd.DataFrame(segments, columns=columns).astype({"keys": "int64", "bytes": "int64"})
    table["width"] = (100 * table["bytes"] / table["budget"].where(table["budget"] > 0)).fillna(0.0)
    table["base"] = table.groupby("row")["width"].cumsum() - table["width"]
    return table


def key_treemap(budget: Budget, *, keys: int = 24) -> go.Figure:
    """Draw families and their largest keys by area; the areas add up to the attributed bytes, exactly.

    `keys` is how many of a family get a tile of their own. The others share one, labelled with their number.
    """
    tiles: list[tuple[str, str, str, int, str]] = []
    for family, row in budget.families.iterrows():
        name, color, total, count = str(family), SHARE_COLORS[row["share"]], int(row["bytes"]), int(row["keys"])
        top = budget.keys[budget.keys["family"] == name].head(keys)
        sizes = [int(size) for size in top["bytes"]]
        if sizes and len(top) == count:
            # Each key is rounded to a byte on its own; a treemap whose parts exceed their sum is not drawn at all.
            sizes[0] += total - sum(sizes)
        tiles.append((name, name, "", total, color))
        tiles += [(f"{name}/{key}", key, name, size, color) for key, size in zip(top["key"], sizes, strict=True)]
        if len(top) < count:
            tiles.append((f"{name}/", f"{count - len(top):,} other keys", name, total - sum(sizes), color))
    if not tiles:
        return _nothing("No keys")
    ids, names, parents, values, colors = (list(column) for column in zip(*tiles, strict=True))
    figure = go.Figure(
        go.Treemap(
            ids=ids,
            labels=[f"{html.escape(name)}<br>{human(size)}" for name, size in zip(names, values, strict=True)],
            parents=parents,
            values=values,
            branchvalues="total",
            marker={"colors": colors, "pad": {"t": _TILE_HEAD, "l": 2, "r": 2, "b": 2}},
            pathbar={"visible": False},
            textfont={"color": "black"},
            hovertemplate="%{label}<br>%{value:,} bytes<extra></extra>",
        )
    )
    figure.update_layout(uniformtext={"minsize": 11, "mode": "hide"})
    title = f"{budget.families['keys'].sum():,} keys hold {human(budget.families['bytes'].sum())}"
    detail = f"Area is bytes; the {keys} largest keys of each family have a tile of their own."
    _dress(figure, title, detail, 460)
    # plotly leaves room above the families for a root that is not drawn.
    return figure.update_layout(margin_t=figure.layout.margin.t - _TILE_HEAD)


def memory_over_time(ingested: Ingested, budget: Budget, *, thresholds: Thresholds | None = None) -> go.Figure:
    """Draw `used_memory` through the feed's own time, with the events written so far on the right-hand axis.

    The limits are drawn where they are near enough to be seen beside the curve. Between two samples it keeps its value:
    a replay looks when there are events, and in a gap nothing is measured.
    """
    thresholds = thresholds or Thresholds()
    timeline = ingested.timeline
    times, used = timeline["ts_ms"].to_numpy().astype("datetime64[ms]"), timeline["used_memory"]
    peak, hover = int(used.max()), "%{x|%Y-%m-%d %H:%M} UTC<br>%{customdata:,} "
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    line = {"color": "#0072B2", "width": 2.5, "shape": "hv"}
    figure.add_scatter(name="used_memory", x=times, y=used / _MIB, customdata=used, line=line)
    figure.update_traces(
        mode="lines", fill="tozeroy", fillcolor="#E5F1F8", hovertemplate=f"{hover} bytes<extra></extra>"
    )
    line = {"color": _FAINT, "width": 1.5, "dash": "dot", "shape": "hv"}
    hover = "%{x|%Y-%m-%d %H:%M} UTC<br>%{y:,} events<extra></extra>"
    so_far = {"x": times, "y": timeline["events"], "hovertemplate": hover}
    figure.add_scatter(name="events so far", mode="lines", line=line, secondary_y=True, **so_far)

    levels = {f"{100 * level:.0f} %": level for level in (thresholds.trim, thresholds.halve, thresholds.emergency)}
    near = peak > 0.4 * budget.maxmemory
    for text, level in {**levels, "maxmemory": 1.0}.items() if near else ():
        line = {"color": SIDE_COLORS["sell"], "width": 1, "dash": "dash"}
        note = {"text": text, "font": {"size": 11}, "yanchor": "bottom", "borderpad": 0}
        figure.add_hline(y=level * budget.maxmemory / _MIB, line=line, annotation=note, annotation_position="top left")
    top = 1.08 * (max(budget.maxmemory, peak) if near else peak) / _MIB
    figure.update_yaxes(title_text="used_memory, MiB", range=[0, top], secondary_y=False)
    so_far = {"title_text": "events so far", "rangemode": "tozero", "tickmode": "auto", "showgrid": False}
    figure.update_yaxes(secondary_y=True, **so_far)
    figure.update_xaxes(title_text="feed time, UTC")
    title = f"Memory peaks at {human(peak)}, {100 * peak / budget.maxmemory:.1f} % of maxmemory"
    detail = f"maxmemory is {human(budget.maxmemory)}; "
    detail += "dashed: the limits" if near else f"the limits at {', '.join(levels)} lie far above this picture"
    return _dress(figure, title, detail, 360, legend=True)


def events_per_minute(events: pd.DataFrame) -> go.Figure:
    """Draw events a minute by side; minutes without any are zero. Bars widen so that at most `MAX_BARS` are drawn."""
    return _rate(events, np.ones(len(events)), "Events per minute")


def notional_per_minute(events: pd.DataFrame) -> go.Figure:
    """Draw USD a minute by side, in the bars of `events_per_minute`."""
    return _rate(events, events["notional"].to_numpy(), "Liquidated per minute", "USD")


def top_symbols(events: pd.DataFrame, n: int = 20) -> go.Figure:
    """Draw the `n` symbols with the largest notional: USD and number of events by side."""
    if events.empty:
        return _nothing("No events")
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
    return _dress(figure, title, detail, 20 * len(order) + 70, legend=True)


def codec_costs(compared: pd.DataFrame) -> go.Figure:
    """Draw `liqlab.codecs.compare.compare`: bytes of an event against the time to encode and decode it."""
    time_us = compared["encode_us"] + compared["decode_us"]
    figure = go.Figure()
    for block, name, color in ((False, "an entry each", "#0072B2"), (True, "many in a block", "#D55E00")):
        part = compared[compared["block"] == block]
        figure.add_scatter(
            name=name,
            x=time_us[part.index],
            y=part["bytes"],
            text=part.index,
            mode="markers+text",
            textposition="top center",
            marker={"size": 11, "color": color},
            hovertemplate="%{text}: %{y:.2f} bytes, %{x:.2f} us<extra></extra>",
        )
    figure.update_xaxes(title_text="encode + decode, us an event", rangemode="tozero")
    figure.update_yaxes(title_text="bytes an event", rangemode="tozero")
    order = compared["bytes"].sort_values()
    title = f"{order.index[0]} takes {order.iloc[0]:.1f} bytes an event, {order.index[-1]} {order.iloc[-1]:.0f}"
    return _dress(figure, title, "Values alone, without what Redis adds", 420, legend=True)


def breaker_timeline(seen: pd.DataFrame) -> go.Figure:
    """Draw where a writer's events were while its server failed, over the states of its breaker.

    A row of `seen` is a sample: `seconds`, `phase` (of the server), `breaker`, and events in each of `PLACE_COLORS`.
    """
    figure, spent = go.Figure(), dict.fromkeys(STATE_COLORS, 0.0)
    for place, color in PLACE_COLORS.items():
        figure.add_scatter(name=place, x=seen["seconds"], y=seen[place], line={"color": color}, mode="lines")
    figure.update_traces(hovertemplate="%{x:.2f} s: %{y:,} events %{fullData.name}<extra></extra>")
    row = {"y": 1, "yref": "paper", "yanchor": "top", "showarrow": False}
    for state, start, end in _runs(seen, "breaker"):
        figure.add_vrect(x0=start, x1=end, fillcolor=STATE_COLORS[state], line_width=0, layer="below")
        figure.add_annotation(text=state, x=(start + end) / 2, yshift=-18, bgcolor=STATE_COLORS[state], **row)
        spent[state] += end - start
    for phase, start, end in _runs(seen, "phase"):
        figure.add_vline(x=end, line={"color": _FAINT, "width": 1, "dash": "dash"})
        figure.add_annotation(text=phase, x=(start + end) / 2, **row)
    figure.update_xaxes(title_text="seconds")
    figure.update_yaxes(title_text="events", range=[0, 1.2 * seen[list(PLACE_COLORS)].sum(axis=1).max()])
    title = f"Up to {seen['in the journal'].max():,} events wait in the journal, {seen['in memory'].max():,} in memory"
    detail = ", ".join(f"{state} for {length:.1f} s" for state, length in spent.items() if length)
    return _dress(figure, title, f"The breaker (shaded) was {detail}", 380, legend=True)


def _runs(seen: pd.DataFrame, column: str) -> list[tuple[str, float, float]]:
    """Return each value of a column as long as it lasts, with the seconds at which it begins and ends."""
    first = seen[seen[column] != seen[column].shift()]
    ends = [*first["seconds"][1:], seen["seconds"].iloc[-1]]
    return list(zip(first[column], first["seconds"], ends, strict=True))


def _rate(events: pd.DataFrame, weights: NDArray[Any], what: str, unit: str = "") -> go.Figure:
    if events.empty:
        return _nothing("No events")
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
    return _dress(figure, f"{what}: {mean} on average, {most} at the peak", detail, 320, legend=True)


def _dress(figure: go.Figure, title: str, detail: str, height: int, *, legend: bool = False) -> go.Figure:
    """Give a figure its template, title and height; lines are broken so that they fit on a phone."""
    # A per cent sign stays with its number.
    texts = [text.replace(" %", "\N{NO-BREAK SPACE}%") for text in (title, detail)]
    head, below = (textwrap.wrap(text, width) for text, width in zip(texts, _LINE_CHARS, strict=True))
    top = 20 + 20 * len(head) + 16 * len(below) + (46 if legend else 0)
    return figure.update_layout(
        template=TEMPLATE,
        title={"text": "<br>".join(head), "subtitle": {"text": "<br>".join(below)}, "pad": {"t": 20 * len(head) - 8}},
        margin={"t": top},
        height=height + top,
    )


def _nothing(title: str) -> go.Figure:
    figure = go.Figure()
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return _dress(figure, title, "There is nothing to draw.", 40)


def _share_label(part: str, row: pd.Series) -> str:
    name = f"{_name(part)} (unattributed)" if part == UNATTRIBUTED else part
    if not row["budget_bytes"]:
        return f"<b>{name}</b>  {human(row['bytes'])}, which no share pays for"
    text = f"<b>{name}</b>  {human(row['bytes'])} of {human(row['budget_bytes'])}, {row['used_pct']:.1f} %"
    return text if row["keys"] or part == UNATTRIBUTED else f"{text}, no keys"


def _name(part: object) -> str:
    return "buffer" if part == UNATTRIBUTED else str(part)


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
