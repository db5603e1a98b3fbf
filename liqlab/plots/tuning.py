"""What a choice of settings costs and buys: the tuning panel's figure, and a sweep with its Pareto front."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from liqlab import schema
from liqlab.budget import human
from liqlab.plots.style import INK, SHARE_COLORS, SIDE_COLORS, dress, nothing
from liqlab.tuning import Outcome

_PALE: Final = "#EEF1F4"
_SHARES: Final = {**SHARE_COLORS, "buffer": "#9AA0A6"}
_STACKED: Final = ("buffer", "misc", "vwap", "percentile", "statistics", "streams")  # what changes least at the bottom
_ROOM: Final = 0.5  # of the axis
_POINTS: Final = 180  # through time: as many as a phone shows
_TITLES: Final = (
    "<b>Shares of the budget, % used</b>",
    "<b>Memory through time, MiB</b>",
    "<b>Thresholds off, %</b>: 95 of 100 <span style='color:#56B4E9'>(half)</span> within",
    "<b>Alerts an hour</b>: the same, <span style='color:#D55E00'>missed</span>, "
    "<span style='color:#009E73'>extra</span>",
)
_LEAST_PCT: Final = 0.01  # where an error of nothing is drawn on an axis of logarithms
_MIB: Final = 1 << 20
_HOURS: Final = 3_600_000
# Of an alert that differs: its colour.
_WHAT: Final = {"same": "#9AA0A6", "missed": "#D55E00", "extra": "#009E73"}


def tuning_panel(outcome: Outcome, pinned: Outcome | None = None) -> go.Figure:
    """Draw what settings cost and buy: the budget's shares, memory through time, thresholds and alerts.

    Thresholds and alerts are beside those of exact history. `pinned`, other settings of the same feed, is in black.
    """
    figure = make_subplots(
        rows=4, vertical_spacing=0.1, row_heights=[0.3, 0.3, 0.2, 0.2],
        subplot_titles=_TITLES,
    )  # fmt: skip
    data = iter(panel_data(outcome, pinned))
    bar: Any = {"orientation": "h", "width": 0.6, "row": 1, "col": 1}
    figure.add_bar(**next(data), marker_color=_PALE, hoverinfo="skip", **bar)
    colors = [_SHARES[name] for name in outcome.shares.index]
    hover = "%{y}: %{x:.2f} % of its budget<br>%{customdata}<extra></extra>"
    sized: Any = {"textfont_size": 11, "constraintext": "none", "cliponaxis": False, "hovertemplate": hover}
    figure.add_bar(**next(data), marker_color=colors, **sized, **bar)
    mark = {"symbol": "line-ns", "size": 16, "line": {"width": 3, "color": INK}}
    figure.add_scatter(
        **next(data), mode="markers", marker=mark, hovertemplate="pinned: %{x:.2f} %<extra></extra>", row=1, col=1
    )
    for name in _STACKED:
        figure.add_scatter(
            **next(data), name=name, mode="lines", stackgroup="memory", line={"width": 0}, fillcolor=_SHARES[name],
            hovertemplate=f"{name} %{{y:.2f}} MiB<extra></extra>", row=2, col=1,
        )  # fmt: skip
    dotted = {"color": INK, "width": 1.5, "dash": "dot"}
    figure.add_scatter(
        **next(data), mode="lines", line=dotted, hovertemplate="pinned %{y:.2f} MiB<extra></extra>", row=2, col=1
    )
    for name, line in (
        ("95 of 100 within", {"color": "#0072B2"}),
        ("half within", {"color": "#56B4E9"}),
        ("pinned", dotted),
    ):
        figure.add_scatter(
            **next(data), mode="lines", line=line, hovertemplate=f"{name} %{{y:.2f}} %<extra></extra>", row=3, col=1
        )
    for name, color in _WHAT.items():
        figure.add_bar(
            **next(data), name=name, marker_color=color, hovertemplate=f"{name} %{{y}}<extra></extra>", row=4, col=1
        )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    figure.update_yaxes(autorange="reversed", row=1, col=1)
    figure.update_xaxes(rangemode="tozero", row=1, col=1)
    figure.update_yaxes(type="log", row=3, col=1)
    figure.update_layout(barmode="overlay", showlegend=False, uirevision="stays", hovermode="closest")
    figure.update_yaxes(rangemode="tozero", row=4, col=1)
    first = outcome.predicted.families.index[0]
    span = [pd.Timestamp(ms, unit="ms") for ms in (first, outcome.predicted.families.index[-1])]
    for row in (2, 3, 4):
        figure.update_xaxes(range=span, row=row, col=1)
    return dress(figure, outcome.headline, outcome.detail, 740, legend=True)


def panel_data(outcome: Outcome, pinned: Outcome | None = None) -> list[dict[str, Any]]:
    """Return what changes of each trace of `tuning_panel`, in their order, to update a figure that stands."""
    shares = outcome.shares
    names, used = list(shares.index), 100 - shares["headroom_pct"].to_numpy()
    sizes = [
        f"{human(size)} of {human(budget)}"
        for size, budget in zip(shares["bytes"], shares["budget_bytes"], strict=True)
    ]
    found: list[dict[str, Any]] = [
        {"y": names, "x": np.full(len(names), 100.0)},
        {"y": names, "x": used, "text": sizes, "customdata": sizes, "textposition": _places(used)},
        {"y": names, "x": 100 - pinned.shares["headroom_pct"].to_numpy()} if pinned else {"y": [], "x": []},
    ]
    when, parts = _memory(outcome)
    found += [{"x": when, "y": parts[name]} for name in _STACKED]
    total = _memory(pinned) if pinned else None
    found.append({"x": total[0], "y": np.sum(list(total[1].values()), axis=0)} if total else {"x": [], "y": []})
    errors = outcome.quality.through_time(_HOURS)
    hours = pd.to_datetime(errors["ts_ms"], unit="ms").to_numpy()
    for column in ("error_pct", "median_pct"):
        found.append({"x": hours, "y": errors[column].clip(lower=_LEAST_PCT).to_numpy()})
    if pinned:
        errors = pinned.quality.through_time(_HOURS)
        when = pd.to_datetime(errors["ts_ms"], unit="ms").to_numpy()
        found.append({"x": when, "y": errors["error_pct"].clip(lower=_LEAST_PCT).to_numpy()})
    else:
        found.append({"x": [], "y": []})
    return found + _alerts(outcome)


def _places(used: Any) -> list[str]:
    """Return where the sizes stand: within bars that leave no room beside them, on a phone."""
    return ["inside" if one > _ROOM * max(100, *used) else "outside" for one in used]


def _memory(outcome: Outcome) -> tuple[Any, dict[str, Any]]:
    families = outcome.families
    at = np.unique(np.linspace(0, len(families) - 1, _POINTS).astype(int))
    part = families.iloc[at] / _MIB
    when = pd.to_datetime(part.index, unit="ms").to_numpy()
    sums: dict[str, Any] = dict.fromkeys(_STACKED, np.zeros(len(part)))
    for name in part:
        share = schema.BY_NAME[str(name)].share
        sums[share] = sums[share] + part[name].to_numpy()
    sums["buffer"] = sums["buffer"] + outcome.shares["bytes"]["buffer"] / _MIB
    limit = outcome.shares["budget_bytes"]["streams"] / _MIB
    sums["streams"] = np.minimum(sums["streams"], limit)  # there cleanup keeps them
    return when, sums


def _alerts(outcome: Outcome) -> list[dict[str, Any]]:
    counts = outcome.quality.fidelity.by_hour
    hours, below = pd.to_datetime(counts.index + _HOURS // 2, unit="ms").to_numpy(), counts.cumsum(axis=1) - counts
    return [{"x": hours, "y": counts[name].to_numpy(), "base": below[name].to_numpy()} for name in _WHAT]


def pareto_front(tried: pd.DataFrame, front: pd.DataFrame) -> go.Figure:
    """Draw a sweep: memory against history, a panel a layout of streams, with those that nothing beats marked.

    `tried` and `front` are from `liqlab.tuning.sweep` and `pareto`; the colour is how far thresholds are off, per cent.
    """
    if tried.empty:
        return nothing("No settings were tried")
    error = tried["threshold_error_pct"].fillna(_LEAST_PCT).clip(lower=_LEAST_PCT)
    low, high = np.log10(error.min()), np.log10(max(error.max(), 1.5 * error.min()))
    figure = go.Figure()
    for name, part, size, line in (("tried", tried, 7, 0), ("not beaten", front, 13, 2)):
        figure.add_scatter(
            name=name,
            x=part["used_bytes"] / _MIB,
            y=part["history_h"],
            mode="markers",
            marker={
                **{"size": size, "color": np.log10(error.loc[part.index]), "colorscale": "Cividis_r"},
                **{"cmin": float(low), "cmax": float(high)},
                "line": {"width": line, "color": SIDE_COLORS["sell"]},
            },
            customdata=[[_words(row)] for row in part.to_dict("records")],
            hovertemplate="%{x:.2f} MiB, %{y:,.1f} h<br>%{customdata[0]}<extra></extra>",
        )
    ticks = [tick for tick in (0.01, 0.1, 0.3, 1, 3, 10, 30, 100) if low <= np.log10(tick) <= high]
    bar: Any = {"title": "thresholds off, %", "tickvals": np.log10(ticks), "ticktext": [f"{tick:g}" for tick in ticks]}
    bar |= {"orientation": "h", "y": -0.32, "yanchor": "top", "thickness": 12}
    figure.update_traces(marker_colorbar=bar, marker_showscale=True, selector={"name": "tried"})
    figure.update_xaxes(title_text="used_memory, MiB")
    figure.update_yaxes(title_text="history, hours", type="log")
    best = front.iloc[int(front["history_h"].argmax())]
    title = f"{len(front):,} of {len(tried):,} settings are beaten by no other"
    detail = f"Ringed. The longest history: {best['history_h']:,.0f} h in {human(best['used_bytes'])}."
    figure = dress(figure, title, detail, 420, legend=True)
    return figure.update_layout(margin_b=90)


def _words(row: Any) -> str:
    words = [f"{name.rpartition('.')[2]} {value}" for name, value in row.items() if "." in name and value is not pd.NA]
    return "<br>".join(words) + f"<br>thresholds off {row['threshold_error_pct']:.2f} %"
