"""The original document's claims: how far each is from what was measured."""

from __future__ import annotations

from typing import Final

import numpy as np
import plotly.graph_objects as go

from liqlab.claims import SECTIONS, Claims, Verdict
from liqlab.plots.style import FAINT, dress, nothing

# Of a verdict: its mark in the picture and in the key, and its colour.
_MARKS: Final = {
    Verdict.HOLDS: ("circle", "\N{BLACK CIRCLE}", "#009E73"),
    Verdict.ONLY_WHEN: ("diamond", "\N{BLACK DIAMOND}", "#B07700"),
    Verdict.OFF: ("square", "\N{BLACK SQUARE}", "#0072B2"),
    Verdict.FAILS: ("x", "\N{MULTIPLICATION SIGN}", "#D55E00"),
    Verdict.UNMEASURED: ("circle-open", "\N{WHITE CIRCLE}", FAINT),
}
_ENDS: Final = (0.01, 100.0)  # what is beyond is drawn at the edge, with its own figure beside it
_FAR: Final = 20.0
_A_ROW: Final = 19  # pixels
_TICKS: Final = {0.01: "1/100", 0.1: "1/10", 1: "1", 10: "10", 100: "100"}


def claims(found: Claims) -> go.Figure:
    """Draw `liqlab.claims.measure`: measured / claimed of every claim, a row each, by section of the document.

    The axis is logarithmic and ends at 1/100 and 100. Claims that hold share one row a section; every other one has its
    own, with the ratio beside its mark.
    """
    table = found.table
    if table.empty:
        return nothing("No claims to compare")
    rows: list[tuple[str, list[int]]] = []
    for section, part in table.groupby(table["section"].astype(int), sort=True):
        held = part["verdict"] == Verdict.HOLDS
        rows.append((f"<b>{SECTIONS[str(section)]}</b>", []))
        if held.any():
            rows.append((f"{held.sum()} of {len(part)} hold", part.index[held].tolist()))
        rows += [(text, [at]) for at, text in zip(part.index[~held].tolist(), part["claim"][~held], strict=True)]
    height = {at: -number for number, (_, ats) in enumerate(rows) for at in ats}
    drawn = table["ratio"].fillna(1.0).clip(*_ENDS)
    figure = go.Figure()
    for verdict, (form, _, color) in _MARKS.items():
        part = table[table["verdict"] == verdict]
        figure.add_scatter(
            name=verdict.value,
            x=drawn[part.index],
            y=[height[at] for at in part.index],
            mode="markers" if verdict is Verdict.HOLDS else "markers+text",
            marker={"symbol": form, "color": color, "size": 9, "opacity": 0.7 if verdict is Verdict.HOLDS else 1},
            text=[_ratio(ratio) for ratio in part["ratio"]],
            # At the right edge there is room on the other side only.
            textposition=["middle left" if x > _FAR else "middle right" for x in drawn[part.index]],
            textfont={"size": 10, "color": color},
            customdata=part[["claim", "said", "claimed", "measured", "unit", "remark"]].astype(object).to_numpy(),
            hovertemplate="%{customdata[0]}: %{customdata[1]}<br>claimed %{customdata[2]:,.4g}, "
            "measured %{customdata[3]:,.4g} %{customdata[4]}<br>%{customdata[5]}<extra></extra>",
        )
    figure.add_vline(1, line={"color": FAINT, "width": 1, "dash": "dot"}, layer="below")
    low, high = np.log10(_ENDS)
    figure.update_xaxes(type="log", range=[low - 0.2, high + 0.2], title_text="measured / claimed")
    figure.update_xaxes(tickvals=list(_TICKS), ticktext=list(_TICKS.values()), tickfont_size=10)
    figure.update_yaxes(tickvals=[-n for n in range(len(rows))], ticktext=[text for text, _ in rows], tickfont_size=10)
    figure.update_yaxes(range=[0.3 - len(rows), 0.7], showgrid=False, zeroline=False)
    figure.update_layout(showlegend=False)
    counts = found.counts
    entries = [
        f'<span style="color:{color}">{sign}</span> {counts[name.value]} {name.value}'
        for name, (_, sign, color) in _MARKS.items()
    ]
    key = "<br>".join(["  ".join(entries[:3]), "  ".join(entries[3:])])
    holds, wrong = (counts[verdict.value] for verdict in (Verdict.HOLDS, Verdict.FAILS))
    title = f"{holds} of {len(table)} claims hold, {wrong} are wrong by more than a factor of 2"
    detail = "Of claims of saving or accuracy, what is left is compared: to the right there is more of it."
    figure = dress(figure, title, detail, _A_ROW * len(rows) + 60, legend=True)
    figure.layout.title.subtitle.text += f"<br>{key}"  # in the plot itself a phone would cut it off
    return figure


def _ratio(ratio: float) -> str:
    if np.isnan(ratio):
        return ""
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
