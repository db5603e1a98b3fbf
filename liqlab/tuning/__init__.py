"""Search the settings: what each choice costs and buys, and which one fits.

`evaluate` says it of one choice, `sweep` of many, `pareto` keeps those that nothing beats, `recommend` takes the best
within constraints, and `verify` plays the feed on a real server and puts measured beside predicted.
"""

from liqlab.tuning.constraints import Constraints, Recommendation, recommend
from liqlab.tuning.outcome import Outcome, evaluate
from liqlab.tuning.rates import extrapolate
from liqlab.tuning.search import SPACE, pareto, sweep
from liqlab.tuning.verified import Verified, verify

__all__ = [
    "SPACE",
    "Constraints",
    "Outcome",
    "Recommendation",
    "Verified",
    "evaluate",
    "extrapolate",
    "pareto",
    "recommend",
    "sweep",
    "verify",
]
