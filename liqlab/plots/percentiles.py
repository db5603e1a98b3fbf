"""Percentile stores side by side: what they cost, what they answer, and what that does to alerts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from liqlab.budget import human
from liqlab.fidelity import Fidelity
from liqlab.plots.style import FAINT, dress, nothing

METHOD_COLORS: Final = {
    "logbins": "#0072B2",
    "exact": "#000000",
    "reservoir": "#009E73",
    "tdigest": "#B07700",
    "topk": "#D55E00",
    "unlimited": "#9AA0A6",
}
_BAND: Final = "#BFBFBF"  # what the others should lie upon
# Where methods agree their marks lie upon each other: each has a form of its own, and the larger ones come first.
_MARKS: Final = {
    "topk": ("circle", "\N{WHITE CIRCLE}", 21),
    "exact": ("square", "\N{BLACK SQUARE}", 15),
    "tdigest": ("triangle-up", "\N{BLACK UP-POINTING TRIANGLE}", 13),
    "reservoir": ("diamond", "\N{BLACK DIAMOND}", 11),
    "logbins": ("circle", "\N{BLACK CIRCLE}", 9),
    "unlimited": ("x", "\N{MULTIPLICATION SIGN}", 7),
}
_LEAST_PCT: Final = 0.01  # where an error of nothing is drawn on an axis of logarithms
_A_LINE: Final = 3  # methods in one line of a key, on a phone
_KEY_FONT: Final = {"size": 11}
_A_KEY_LINE: Final = 15  # pixels
_SYMBOLS: Final = 12
_OTHERS: Final = "all others"
# Of an alert: its mark, its colour and size.
_WHAT: Final = {
    "same event": ("circle", "#9AA0A6", 5),
    "shifted": ("circle-open", "#0072B2", 8),
    "missed": ("x-thin-open", "#D55E00", 8),
    "extra": ("triangle-up", "#009E73", 9),
}
_SIGNS: Final = dict(zip(_WHAT, "\N{BLACK CIRCLE}\N{WHITE CIRCLE}\N{MULTIPLICATION SIGN}\u25b2", strict=True))


def percentile_costs(compared: pd.DataFrame) -> go.Figure:
    """Draw `liqlab.comparison.methods_compared`: the dollar error of each method against its bytes, a panel a symbol.

    Both axes are logarithmic; an error of less than 0.01 % is drawn as 0. The dotted line joins the methods that no
    other beats in both; methods that are biased by design are hollow and never on it.
    """
    if compared.empty:
        return nothing("No percentiles to compare")
    symbols = list(compared["symbol"].unique())
    figure = make_subplots(rows=len(symbols), shared_xaxes=True, vertical_spacing=0.34 / len(symbols))
    for row, symbol in enumerate(symbols, 1):
        part = compared[compared["symbol"] == symbol].set_index("method")
        error = part["dollar_error_pct"].clip(lower=_LEAST_PCT)
        front = _front(part["bytes"], error[~part["biased"]])
        line = {"color": FAINT, "width": 1, "dash": "dot", "shape": "hv"}
        curve = {"x": part["bytes"][front], "y": error[front], "mode": "lines", "line": line}
        figure.add_scatter(name="front", **curve, hoverinfo="skip", row=row, col=1)
        for method in [name for name in _MARKS if name in part.index]:
            one, (form, _, size) = part.loc[method], _MARKS[method]
            color, hollow = METHOD_COLORS[method], "-open" if one["biased"] else ""
            figure.add_scatter(
                name=method,
                x=[one["bytes"]],
                y=[error[method]],
                mode="markers",
                marker={"symbol": form + hollow, "color": color, "size": size, "line_width": 2 if hollow else 0},
                customdata=[one[["dollar_error_pct", "rank_error_points", "query_us"]].tolist()],
                hovertemplate=f"{method}, {symbol}: %{{x:,}} bytes<br>%{{customdata[0]:.3g}} % in dollars, "
                "%{customdata[1]:.3g} points in rank<br>%{customdata[2]:.1f} us a query<extra></extra>",
                row=row,
                col=1,
            )
        entries = [
            f'<span style="color:{METHOD_COLORS[name]}">{_MARKS[name][1]}</span> {name} {one["query_us"]:,.0f} us'
            for name, one in part.iterrows()
        ]
        _key(figure, row, [f"<b>{symbol}</b>, {part['events'].iloc[0]:,} events", *_lines(entries)])
    top = max(float(compared["dollar_error_pct"].max()), 1.0)
    ticks = 10.0 ** np.arange(np.log10(_LEAST_PCT), np.ceil(np.log10(top)) + 1)
    texts = ["0", *(f"{tick:g}" for tick in ticks[1:])]
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=texts, title_text="dollar error, %")
    figure.update_yaxes(range=[np.log10(_LEAST_PCT) - 0.35, np.log10(top) + 0.35])
    sizes = {"100 B": 1e2, "1 kB": 1e3, "10 kB": 1e4, "100 kB": 1e5, "1 MB": 1e6, "10 MB": 1e7, "100 MB": 1e8}
    figure.update_xaxes(type="log", tickvals=list(sizes.values()), ticktext=list(sizes), showticklabels=True)
    figure.update_xaxes(title_text="memory of the symbol", row=len(symbols))
    figure.update_layout(showlegend=False)
    busy = compared[compared["symbol"] == symbols[0]].set_index("method")
    good = busy[~busy["biased"]] if not busy["biased"].all() else busy
    # Who errs by no more than a per cent takes how little? That is the question that a budget asks.
    close = good[good["dollar_error_pct"] <= max(good["dollar_error_pct"].min(), 1.0)]["bytes"].astype(int)
    best, least = str(close.idxmin()), int(close.min())
    title = f"{best} is {busy.loc[best, 'dollar_error_pct']:.2f} % off in {human(least)}"
    worst = str(busy["dollar_error_pct"].idxmax())
    if worst != best:
        title += f", {worst} {busy.loc[worst, 'dollar_error_pct']:,.0f} % in {human(int(busy.loc[worst, 'bytes']))}"
    detail = (
        f"{symbols[0]}, worst quantile. Beside the names: the server's time. Dotted: beaten by none in both error and "
    )
    detail += "memory. Hollow: biased, whatever its memory."
    figure = dress(figure, title, detail, 280 * len(symbols), legend=True)
    return figure.update_layout(
        margin_t=figure.layout.margin.t + _A_KEY_LINE, height=figure.layout.height + _A_KEY_LINE
    )


def _front(size: pd.Series, error: pd.Series) -> list[str]:
    """Return the methods that are smaller than all with less error, the smallest first."""
    order = pd.DataFrame({"bytes": size, "error": error}).dropna().sort_values(["bytes", "error"])
    return list(order.index[order["error"] < order["error"].cummin().shift(fill_value=np.inf)])


def _lines(entries: list[str]) -> list[str]:
    return ["  ".join(entries[at : at + _A_LINE]) for at in range(0, len(entries), _A_LINE)]


def _key(figure: go.Figure, row: int, lines: list[str]) -> None:
    axis = "y domain" if row == 1 else f"y{row} domain"
    place = {"xref": "paper", "x": 0, "xanchor": "left", "yref": axis, "y": 1, "yanchor": "bottom"}
    figure.add_annotation(text="<br>".join(lines), font=_KEY_FONT, align="left", showarrow=False, **place)


def thresholds_over_time(seen: pd.DataFrame, *, symbol: str, percentile: float) -> go.Figure:
    """Draw what each method takes for a percentile of a symbol's trailing window, through a feed.

    Parameters
    ----------
    seen : pandas.DataFrame
        USD, a column a method of which ``exact`` is one, indexed by event time, ms since the epoch, UTC.
    symbol : str
        For the axis.
    percentile : float
        For the title.
    """
    figure, at = go.Figure(), seen.index.to_numpy().astype("datetime64[ms]").astype("datetime64[s]")
    for method in sorted(seen.columns, key=lambda name: name != "exact"):
        line = {"color": _BAND, "width": 6} if method == "exact" else {"color": METHOD_COLORS[method], "width": 2}
        hover = f"%{{x|%H:%M}} UTC, {method}: %{{y:,.0f}} USD<extra></extra>"
        figure.add_scatter(name=method, x=at, y=seen[method], mode="lines", line=line, hovertemplate=hover)
    ticks = [digit * 10.0**power for power in range(10) for digit in (1, 2, 5)]
    texts = [
        f"{tick / 1e6:g}M" if tick >= 1e6 else f"{tick / 1e3:g}k" if tick >= 1e3 else f"{tick:g}" for tick in ticks
    ]
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=texts, title_text=f"p{percentile:g} of {symbol}, USD")
    figure.update_xaxes(title_text="feed time, UTC")
    figure.update_layout(showlegend=False)
    errors = 100 * (seen.drop(columns="exact").div(seen["exact"], axis=0) - 1).abs()
    worst = errors.max().sort_values()
    title = f"The p{percentile:g} of {symbol}: {worst.index[0]} is at most {worst.iloc[0]:.1f} % off"
    if len(worst) > 1:
        title += f", {worst.index[-1]} up to {worst.iloc[-1]:,.0f} %"
    known = {"exact": ""} | {str(name): f"{off:,.{int(off < 100)}f}\N{NO-BREAK SPACE}%" for name, off in worst.items()}
    square, colors = "\N{BLACK SQUARE}", METHOD_COLORS | {"exact": _BAND}
    entries = [f'<span style="color:{colors[name]}">{square}</span> {name} {text}' for name, text in known.items()]
    _key(figure, 1, _lines(entries))
    detail = f"Beside the names: how far off they are at worst, of {len(seen):,} moments."
    return dress(figure, title, detail, 380, legend=True)


def alerts_differing(runs: Mapping[str, Fidelity], *, symbols: int = _SYMBOLS) -> go.Figure:
    """Draw the alerts of each run as they compare with the true ones, a panel a run and a row a symbol.

    Parameters
    ----------
    runs : mapping of str to Fidelity
        By name; from `liqlab.fidelity.fidelity`, all of one feed.
    symbols : int
        How many get rows of their own: those that differ most, then those with most alerts.
    """
    pairs = {name: _kinds(run.pairs) for name, run in runs.items()}
    every = pd.concat(pairs.values()) if pairs else pd.DataFrame()
    if every.empty:
        return nothing("No alerts, true or found")
    weight = every.assign(differs=every["kind"] != "same event").groupby("symbol")["differs"].agg(["sum", "size"])
    ranked = weight.sort_values(["sum", "size"], ascending=False, kind="stable").index
    rows = [*ranked[:symbols], *([_OTHERS] if len(ranked) > symbols else [])]
    figure = make_subplots(rows=len(pairs), shared_xaxes=True, vertical_spacing=0.16 / len(pairs))
    for panel, (name, found) in enumerate(pairs.items(), 1):
        for kind, (form, color, size) in _WHAT.items():
            part = found[found["kind"] == kind]
            row = part["symbol"].where(part["symbol"].isin(rows), _OTHERS)
            marker = {"symbol": form, "color": color, "size": size, "line": {"color": color, "width": 2}}
            figure.add_scatter(
                name=kind,
                x=part["at"],
                y=row,
                mode="markers",
                marker=marker | ({"line_width": 0} if kind == "same event" else {}),
                text=part["symbol"] + " " + part["side"],
                hovertemplate=f"%{{text}}, %{{x|%H:%M:%S}} UTC<br>{name}: {kind}<extra></extra>",
                row=panel,
                col=1,
            )
        counts = found["kind"].value_counts()
        words = [
            f'<span style="color:{color}">{_SIGNS[kind]}</span> {counts.get(kind, 0):,} {kind}'
            for kind, (_, color, _) in _WHAT.items()
        ]
        _key(figure, panel, [f"<b>{name}</b>  {words[0]}", "  ".join(words[1:])])
    figure.update_yaxes(categoryorder="array", categoryarray=rows[::-1], range=[-0.7, len(rows) - 0.3], dtick=1)
    figure.update_yaxes(tickfont_size=10)
    figure.update_xaxes(range=_span(every["at"]))
    figure.update_xaxes(title_text="feed time, UTC", row=len(pairs))
    figure.update_layout(showlegend=False)
    missed = [f"{name} misses {(found['kind'] == 'missed').sum():,}" for name, found in pairs.items()]
    title = f"Of {max(len(run.true) for run in runs.values()):,} alerts, {', '.join(missed)}"
    detail = "Shifted: raised at another event of the same cooldown. Symbols that differ most come first."
    return dress(figure, title, detail, (70 + 17 * len(rows)) * len(pairs), legend=True)


def _kinds(pairs: pd.DataFrame) -> pd.DataFrame:
    kind = pairs["what"].mask(pairs["what"] == "same", "shifted").mask(pairs["delay_s"] == 0, "same event")
    at_ms = pairs["ts_ms_true"].fillna(pairs["ts_ms_found"]).astype("int64")
    sides = pairs[["symbol", "side"]].astype(str)
    return sides.assign(kind=kind, at=at_ms.to_numpy().astype("datetime64[ms]").astype("datetime64[s]"))


def _span(times: pd.Series) -> list[pd.Timestamp]:
    first, last = times.min(), times.max()
    around = max(0.03 * (last - first), pd.Timedelta(1, "min"))
    return [first - around, last + around]
