"""Where the bytes of a server are, now and through a feed's time."""

from __future__ import annotations

import html
from typing import Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from liqlab.budget import UNATTRIBUTED, Budget, human
from liqlab.plots.style import FAINT, INK, SHARE_COLORS, SIDE_COLORS, dress, nothing
from liqlab.replay import Ingested
from liqlab.settings import Thresholds

_PALE: Final = "#EEF1F4"
_WHOLE: Final = "whole server"
_TILE_HEAD: Final = 34
_MIB: Final = 1 << 20


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
        figure.add_vline(x=level, line={"color": FAINT, "width": 1, "dash": "dash"})
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
    return dress(figure, title, detail, 46 * len(rows) + 60)


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
    segments.append((*used, INK, budget.maxmemory))
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
        return nothing("No keys")
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
    dress(figure, title, detail, 460)
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
    line = {"color": FAINT, "width": 1.5, "dash": "dot", "shape": "hv"}
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
    return dress(figure, title, detail, 360, legend=True)


def _share_label(part: str, row: pd.Series) -> str:
    name = f"{_name(part)} (unattributed)" if part == UNATTRIBUTED else part
    if not row["budget_bytes"]:
        return f"<b>{name}</b>  {human(row['bytes'])}, which no share pays for"
    text = f"<b>{name}</b>  {human(row['bytes'])} of {human(row['budget_bytes'])}, {row['used_pct']:.1f} %"
    return text if row["keys"] or part == UNATTRIBUTED else f"{text}, no keys"


def _name(part: object) -> str:
    return "buffer" if part == UNATTRIBUTED else str(part)
