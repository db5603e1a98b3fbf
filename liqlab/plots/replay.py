"""A replay through the feed's time: memory, percentile error, alerts."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from liqlab.budget import human
from liqlab.clock import HOUR_MS
from liqlab.fidelity import Replayed
from liqlab.plots.style import FAINT, dress, nothing

_USED: Final = "#0072B2"
_TRUE, _FOUND = "#C9CED3", "#009E73"
_LINES: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of the symbols
_LEAST_PCT: Final = 0.5  # that the axis of errors shows: what is smaller is noise
_A_LINE: Final = 2  # symbols in one line of a key, on a phone
_KEY_FONT: Final = {"size": 11}


def replayed(done: Replayed) -> go.Figure:
    """Draw a replay: used memory below its limit, percentile error of the busiest symbols, alerts an hour.

    Where memory stays far below the limit, the axis shows what is in use, and the key says how much may be.
    """
    seen = done.timeline
    if seen.empty:
        return nothing("Nothing was played")
    figure = make_subplots(rows=3, shared_xaxes=True, vertical_spacing=0.11, row_heights=[4, 3, 3])
    used, unit = seen["used_memory"] / (1 << 20), done.maxmemory / (1 << 20)
    hover = "%{x|%m-%d %H:%M} UTC<br>%{y:.2f} MiB<extra></extra>"
    line = {"color": _USED, "width": 2}
    figure.add_scatter(
        name="used_memory", x=_at(seen["ts_ms"]), y=used, mode="lines", line=line, fill="tozeroy", hovertemplate=hover
    )
    near = used.max() > unit / 4
    if near:
        figure.add_hline(unit, line={"color": FAINT, "width": 1, "dash": "dot"}, row=1, col=1)
    figure.update_yaxes(title_text="MiB", range=[0, 1.08 * (unit if near else used.max())], row=1)
    _key(figure, 1, f"{_square(_USED)} used_memory, of {human(done.maxmemory)}")

    errors = done.errors.dropna()
    percentile = errors["percentile"].iloc[0] if len(errors) else np.nan
    one = errors[errors["percentile"] == percentile]
    words = []
    for color, (symbol, part) in zip(_LINES, one.groupby("symbol", sort=False), strict=False):
        hover = f"%{{x|%m-%d %H:%M}} UTC, {symbol}<br>%{{customdata[0]:,.0f}} USD, exact %{{customdata[1]:,.0f}}"
        figure.add_scatter(
            name=str(symbol),
            x=_at(part["ts_ms"]),
            y=part["error_pct"],
            customdata=part[["found", "exact"]],
            mode="lines+markers",
            marker_size=4,
            line={"color": color, "width": 1.5},
            hovertemplate=f"{hover}<br>%{{y:+.2f}} %<extra></extra>",
            row=2,
            col=1,
        )
        words.append(f"{_square(color)} {symbol}")
    worst = float(one["error_pct"].abs().max()) if len(one) else 0.0
    span = 1.15 * max(worst, _LEAST_PCT)
    figure.update_yaxes(title_text=f"p{percentile:g}, % off" if words else "", range=[-span, span], row=2)
    lines = [" ".join(words[at : at + _A_LINE]) for at in range(0, len(words), _A_LINE)]
    _key(figure, 2, "<br>".join(lines) or "no percentiles were compared")

    alerts = done.alerts_over_time
    middle = _at(alerts["ts_ms"] + HOUR_MS // 2)
    for name, color, share in (("true", _TRUE, 0.9), ("found", _FOUND, 0.5)):
        figure.add_bar(
            name=name,
            x=middle,
            y=alerts[name],
            width=share * HOUR_MS,
            marker_color=color,
            customdata=_at(alerts["ts_ms"]),
            hovertemplate=f"from %{{customdata|%m-%d %H:%M}} UTC<br>%{{y:,}} {name}<extra></extra>",
            row=3,
            col=1,
        )
    fidelity = done.fidelity
    _key(figure, 3, f"{_square(_TRUE)} {len(fidelity.true):,} true, {_square(_FOUND)} {len(fidelity.found):,} found")
    figure.update_yaxes(title_text="alerts/h", rangemode="tozero", row=3)
    figure.update_xaxes(title_text="feed time, UTC", row=3)
    figure.update_xaxes(range=[_at(alerts["ts_ms"]).iloc[0], _at(alerts["ts_ms"]).iloc[-1] + pd.Timedelta(hours=1)])
    figure.update_layout(barmode="overlay", showlegend=False)
    lost = f"{done.events_lost:,} of {done.ingested.events:,} events lost" if done.events_lost else "no event lost"
    title = f"At most {human(float(seen['used_memory'].max()))} in use, {lost}"
    if fidelity.recall is not None and fidelity.precision is not None:
        detail = f"{100 * fidelity.recall:.1f} % of the true alerts found, "
        detail += f"{100 * fidelity.precision:.1f} % of the found ones true."
    else:
        detail = "No alerts to compare."
    if words:
        detail += f" p{percentile:g} is at worst {worst:.2f} % off."
    return dress(figure, title, detail, 520, legend=True)


def _at(ts_ms: pd.Series) -> pd.Series:
    return pd.Series(ts_ms.to_numpy().astype("datetime64[ms]"))


def _square(color: str) -> str:
    return f'<span style="color:{color}">\N{BLACK SQUARE}</span>'


def _key(figure: go.Figure, row: int, text: str) -> None:
    axis = "y domain" if row == 1 else f"y{row} domain"
    place = {"xref": "paper", "x": 0, "xanchor": "left", "yref": axis, "y": 1, "yanchor": "bottom"}
    figure.add_annotation(text=text, font=_KEY_FONT, align="left", showarrow=False, **place)
