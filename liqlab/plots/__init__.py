"""Tables in, plotly figures out: one look, colours for colour-blind eyes, titles that say what one sees.

Everything is aggregated before it is drawn: a figure of a day of events is some ten kilobytes.
"""

from liqlab.plots.budget import budget_bars, key_treemap, memory_over_time
from liqlab.plots.claims import claims
from liqlab.plots.feeds import MAX_BARS, events_per_minute, notional_per_minute, top_symbols
from liqlab.plots.monitor import health_timeline
from liqlab.plots.percentiles import METHOD_COLORS, alerts_differing, percentile_costs, thresholds_over_time
from liqlab.plots.pressure import pressure_timeline
from liqlab.plots.replay import replayed
from liqlab.plots.style import PLACE_COLORS, SHARE_COLORS, SIDE_COLORS, SIDE_NAMES, STATE_COLORS, TEMPLATE, TIER_COLORS
from liqlab.plots.tuning import pareto_front, tuning_panel
from liqlab.plots.writer import breaker_timeline, codec_costs

__all__ = [
    "MAX_BARS",
    "METHOD_COLORS",
    "PLACE_COLORS",
    "SHARE_COLORS",
    "SIDE_COLORS",
    "SIDE_NAMES",
    "STATE_COLORS",
    "TEMPLATE",
    "TIER_COLORS",
    "alerts_differing",
    "breaker_timeline",
    "budget_bars",
    "claims",
    "codec_costs",
    "events_per_minute",
    "health_timeline",
    "key_treemap",
    "memory_over_time",
    "notional_per_minute",
    "pareto_front",
    "percentile_costs",
    "pressure_timeline",
    "replayed",
    "thresholds_over_time",
    "top_symbols",
    "tuning_panel",
]
