"""The one look of all pictures: colours for colour-blind eyes, and titles that fit a phone."""

from __future__ import annotations

import textwrap
from typing import Any, Final

import pandas as pd
import plotly.graph_objects as go

from liqlab.budget import FOREIGN, UNATTRIBUTED

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
TIER_COLORS: Final = {"normal": "white", "trim": "#FFF0B8", "halve": "#FDD49E", "emergency": "#F4A68C"}
INK, FAINT = "#24292F", "#6E7781"  # of text; of what is to stay in the background
_LINE_CHARS: Final = (40, 54)  # of a title and of the line below it, on a phone

_AXIS: Final = {
    **{"gridcolor": "#E6E8EB", "zerolinecolor": "#C9CED3", "automargin": True},
    "title": {"standoff": 6, "font": {"size": 12}},
}
TEMPLATE: Final = go.layout.Template(
    layout={
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif",
            "size": 13,
            "color": INK,
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
                "subtitle": {"font": {"size": 12, "color": FAINT}},
            },
        },
    }
)


def dress(figure: go.Figure, title: str, detail: str, height: int, *, legend: bool = False) -> go.Figure:
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


def nothing(title: str) -> go.Figure:
    """Return an empty figure whose title says what there is none of."""
    figure = go.Figure()
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return dress(figure, title, "There is nothing to draw.", 40)


def runs(seen: pd.DataFrame, column: str, along: str) -> list[tuple[str, Any, Any]]:
    """Return each value of a column as long as it lasts, with the values of `along` at which it begins and ends."""
    first = seen[seen[column] != seen[column].shift()]
    ends = [*first[along][1:], seen[along].iloc[-1]]
    return list(zip(first[column], first[along], ends, strict=True))
