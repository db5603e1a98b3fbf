"""The picture of a running Redis."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from liqlab.budget import human
from liqlab.monitor import Alarms, Health
from liqlab.plots.style import TEMPLATE
from liqlab.settings import Settings

_USED, _COMMANDS, _JOURNAL, _WARNING = "#0072B2", "#009E73", "#D55E00", "#E69F00"


def health_timeline(seen: Sequence[Health], alarms: Alarms, settings: Settings) -> go.Figure:
    """Draw memory, commands a second and events over the looks at a server; what is wrong stands above.

    Parameters
    ----------
    seen : sequence of Health
        At least one, in order.
    alarms : Alarms
        Whose standing alerts are the title.
    settings : Settings
        `monitor` is read, for the lines.
    """
    table = pd.DataFrame([health.as_dict() for health in seen])
    x = (table["at_ms"] - table["at_ms"].iloc[-1]) / 1_000
    used = 100 * table["used_ratio"].astype(float)
    lines = [(1, "used memory", used, _USED), (2, "commands", table["ops_per_s"], _COMMANDS)]
    lines.append((3, "hot in Redis", table["events"], _USED))
    if table["journal_events"].notna().any():
        lines.append((3, "in the journal", table["journal_events"], _JOURNAL))
    figure = make_subplots(rows=3, shared_xaxes=True, vertical_spacing=0.08, row_heights=[2, 1, 1])
    for row, name, y, color in lines:
        figure.add_scatter(name=name, x=x, y=y, mode="lines", line_color=color, showlegend=row == 3, row=row, col=1)
    for level, color in (("warning", _WARNING), ("critical", _JOURNAL)):
        line = {"color": color, "dash": "dash", "width": 1}
        figure.add_hline(100 * getattr(settings.monitor, level), line=line, annotation_text=level, row=1, col=1)
    for row, unit in enumerate(("% of maxmemory", "commands a second", "events"), 1):
        figure.update_yaxes(title_text=unit, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title_text="seconds; 0 is the last look", row=3, col=1)
    last = seen[-1]
    calm = f"OK: {human(last.used_memory)} used" if last.used_memory is not None else "no answer"
    title = "<br>".join(map(str, alarms.standing.values())) or calm
    figure.update_layout(template=TEMPLATE, height=640, margin_t=90, legend_y=0.22)
    return figure.update_layout(title={"text": title, "font_size": 13})
