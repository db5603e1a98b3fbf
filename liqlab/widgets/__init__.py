"""Controls for notebooks: the tuning panel."""

from liqlab.widgets.panel import TuningPanel, panel

__all__ = ["TuningPanel", "panel"]
