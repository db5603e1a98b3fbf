"""How events get into Redis: what they cost in each form, and where they are while the server fails."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from liqlab.plots.style import FAINT, PLACE_COLORS, STATE_COLORS, dress, runs


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
    return dress(figure, title, "Values alone, without what Redis adds", 420, legend=True)


def breaker_timeline(seen: pd.DataFrame) -> go.Figure:
    """Draw where a writer's events were while its server failed, over the states of its breaker.

    A row of `seen` is a sample: `seconds`, `phase` (of the server), `breaker`, and events in each of `PLACE_COLORS`.
    """
    figure, spent = go.Figure(), dict.fromkeys(STATE_COLORS, 0.0)
    for place, color in PLACE_COLORS.items():
        figure.add_scatter(name=place, x=seen["seconds"], y=seen[place], line={"color": color}, mode="lines")
    figure.update_traces(hovertemplate="%{x:.2f} s: %{y:,} events %{fullData.name}<extra></extra>")
    row = {"y": 1, "yref": "paper", "yanchor": "top", "showarrow": False}
    for state, start, end in runs(seen, "breaker", "seconds"):
        figure.add_vrect(x0=start, x1=end, fillcolor=STATE_COLORS[state], line_width=0, layer="below")
        figure.add_annotation(text=state, x=(start + end) / 2, yshift=-18, bgcolor=STATE_COLORS[state], **row)
        spent[state] += end - start
    for phase, start, end in runs(seen, "phase", "seconds"):
        figure.add_vline(x=end, line={"color": FAINT, "width": 1, "dash": "dash"})
        figure.add_annotation(text=phase, x=(start + end) / 2, **row)
    figure.update_xaxes(title_text="seconds")
    figure.update_yaxes(title_text="events", range=[0, 1.2 * seen[list(PLACE_COLORS)].sum(axis=1).max()])
    title = f"Up to {seen['in the journal'].max():,} events wait in the journal, {seen['in memory'].max():,} in memory"
    detail = ", ".join(f"{state} for {length:.1f} s" for state, length in spent.items() if length)
    return dress(figure, title, f"The breaker (shaded) was {detail}", 380, legend=True)
