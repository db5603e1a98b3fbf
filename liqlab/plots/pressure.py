"""What happens while memory runs out."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from liqlab.budget import human
from liqlab.cleanup.drill import Drilled
from liqlab.plots.style import FAINT, PLACE_COLORS, SHARE_COLORS, STATE_COLORS, TIER_COLORS, dress, runs
from liqlab.schema import BY_NAME
from liqlab.settings import Thresholds

_USED: Final = "#0072B2"
_NEIGHBOUR, _PALE = "#9AA0A6", "#D5D9DD"
_AROUND: Final = 0.25  # of what there is to see, left on both sides


def pressure_timeline(drilled: Drilled, *, thresholds: Thresholds | None = None) -> go.Figure:
    """Draw a drill: memory over the tiers of pressure, what each step freed, and the journal over the breaker's states.

    Freed bytes are of `used_memory`, in the colour of the share that they were taken from.
    """
    lines, seen, freed = thresholds or Thresholds(), drilled.timeline, _freed(drilled)
    seen = seen.assign(at=seen["ts_ms"].to_numpy().astype("datetime64[ms]"))
    tiers, states = runs(seen, "tier", "at"), runs(seen, "breaker", "at")
    shares = {str(share): SHARE_COLORS[str(share)] for share in freed["share"].unique()}
    place = "in the journal"
    keys = (
        {"used": _USED, "neighbour": _NEIGHBOUR} | _without_first(TIER_COLORS),
        shares,
        {place: PLACE_COLORS[place]} | {f"breaker {k}": color for k, color in _without_first(STATE_COLORS).items()},
    )
    figure = make_subplots(rows=3, shared_xaxes=True, vertical_spacing=0.09, row_heights=[5, 2, 2])
    for row, key in enumerate(keys, 1):
        text = " ".join(f'<span style="color:{color}">\N{BLACK SQUARE}</span> {name}' for name, color in key.items())
        axis = "y domain" if row == 1 else f"y{row} domain"
        place_of = {"xref": "paper", "x": 0, "xanchor": "left", "yref": axis, "y": 1, "yanchor": "bottom"}
        figure.add_annotation(text=text, font={"size": 11}, showarrow=False, **place_of)

    hover = "%{x|%H:%M:%S} UTC<br>%{y:.1f} % of maxmemory"
    for name, column, color, fill in (
        ("neighbour", "neighbour_ratio", _NEIGHBOUR, "tozeroy"),
        ("used", "used_ratio", _USED, "none"),
    ):
        line = {"color": color, "width": 2}
        curve = {"name": name, "x": seen["at"], "y": 100 * seen[column], "mode": "lines", "line": line, "fill": fill}
        figure.add_scatter(**curve, fillcolor=_PALE, hovertemplate=f"{hover}<extra>{name}</extra>", row=1, col=1)
    for share, color in shares.items():
        part = freed[freed["share"] == share]
        bars = {"name": share, "x": part["at"], "y": part["freed"] / 1e6, "width": _step_ms(seen)}
        hover = "%{x|%H:%M:%S} UTC, %{customdata}<br>%{y:.2f} MB<extra></extra>"
        figure.add_bar(**bars, marker_color=color, customdata=part["what"], hovertemplate=hover, row=2, col=1)
    waits = {"name": place, "x": seen["at"], "y": seen["journaled"], "mode": "lines", "line_color": PLACE_COLORS[place]}
    hover = "%{x|%H:%M:%S} UTC<br>%{y:,} events<extra></extra>"
    figure.add_scatter(**waits, hovertemplate=hover, row=3, col=1)
    for row, found, colors in ((1, tiers, TIER_COLORS), (3, states, STATE_COLORS)):
        for name, begin, end in found:
            if name in _without_first(colors):
                band = {"fillcolor": colors[name], "line_width": 0, "layer": "below"}
                figure.add_vrect(begin, end, **band, row=row, col=1)
    marks = [100 * level for level in (lines.trim, lines.halve, lines.emergency, lines.breaker_open)]
    for mark in marks:
        figure.add_hline(mark, line={"color": FAINT, "width": 1, "dash": "dot"}, row=1, col=1)

    figure.update_yaxes(title_text="% of maxmemory", range=[0, 104], tickvals=[0, 25, 50, *marks, 100], row=1)
    figure.update_yaxes(tickfont_size=10, showgrid=False, row=1)
    figure.update_yaxes(title_text="MB freed", rangemode="tozero", row=2)
    figure.update_yaxes(title_text="events", rangemode="tozero", row=3)
    figure.update_xaxes(range=_window(seen))
    figure.update_xaxes(title_text="feed time, UTC", row=3)
    figure.update_layout(barmode="stack", showlegend=False)
    peak, entered = seen["used_ratio"].max(), [name for name, *_ in tiers if name in _without_first(TIER_COLORS)]
    title = f"Memory peaks at {100 * peak:.1f} %; cleanup frees {human(freed['freed'].sum())}"
    detail = f"Tiers: {', '.join(entered)}. Up to {seen['journaled'].max():,} events wait in the journal."
    return dress(figure, title, detail, 520, legend=True)


def _without_first(colors: dict[str, str]) -> dict[str, str]:
    return dict(list(colors.items())[1:])


def _freed(drilled: Drilled) -> pd.DataFrame:
    """Return the bytes that each time and share gave back, and by what."""
    rows = [
        (action.at_ms, BY_NAME[action.family].share, f"{action.what} {action.family}", action.freed)
        for action in drilled.actions
        if action.family in BY_NAME and action.freed > 0
    ]
    table = pd.DataFrame(rows, columns=["at_ms", "share", "what", "freed"])
    table = table.groupby(["at_ms", "share"], as_index=False).agg({"what": ", ".join, "freed": "sum"})
    return table.assign(at=table["at_ms"].to_numpy().astype("datetime64[ms]"))


def _step_ms(seen: pd.DataFrame) -> int:
    return int(np.diff(seen["ts_ms"].unique()).min(initial=60_000))


def _window(seen: pd.DataFrame) -> list[pd.Timestamp]:
    """Return the time in which anything was not normal, and something around it."""
    busy = seen.loc[~seen["tier"].isin(["", "normal"]) | ~seen["breaker"].isin(["", "closed"]), "at"]
    busy = busy if len(busy) else seen["at"]
    first, last = busy.iloc[0], busy.iloc[-1]
    return [first - _AROUND * (last - first), last + _AROUND * (last - first)]
