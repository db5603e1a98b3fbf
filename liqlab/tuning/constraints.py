"""Which settings fit: the best of a sweep within constraints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pandas as pd

from liqlab.budget import records
from liqlab.events import EventError
from liqlab.feeds import Feed
from liqlab.replay import Progress
from liqlab.settings import Settings, changed, load, setting
from liqlab.sizing import Calibration, prepare
from liqlab.tuning.outcome import Outcome, evaluate
from liqlab.tuning.rates import extrapolate
from liqlab.tuning.search import SPACE, sweep

_SLACK: Final = 1.25  # of a fitted share
_LEAST: Final = 0.01  # of maxmemory, for any share: what is empty today may not be tomorrow
_AS_GOOD: Final = 0.99  # of the longest history: for less, settings that take fewer bytes are as good


@dataclass(frozen=True)
class Constraints:
    """What must hold.

    Attributes
    ----------
    maxmemory : int, optional
        Bytes that the server may use; `server.maxmemory` when absent.
    error_pct : float
        How far thresholds may be off those of exact history, per cent, in 95 of 100 cases.
    recall : float
        Which part of the alerts of exact history must be raised, 0 to 1; one alert may always be missed.
    history_h : float
        Hours of events that must be there.
    rate : float
        How many times the events of the feed.
    shares : str
        ``fixed``: `budget` stays as it is. ``fitted``: other families get what they take and a quarter more, and the
        streams all the rest.

    Raises
    ------
    EventError
        Of numbers that cannot be.
    """

    maxmemory: int | None = None
    error_pct: float = 1.0
    recall: float = 0.99
    history_h: float = 0.0
    rate: float = 1.0
    shares: Literal["fixed", "fitted"] = "fixed"

    def __post_init__(self) -> None:
        if not (0 <= self.recall <= 1 and self.error_pct > 0 and self.history_h >= 0):
            raise EventError(
                f"recall = {self.recall:g}, error_pct = {self.error_pct:g}, history_h = {self.history_h:g}: a recall is"
                " 0 to 1, an error above 0, and hours are none or more"
            )


@dataclass(frozen=True)
class Recommendation:
    """The settings to take, and why.

    Attributes
    ----------
    outcome : Outcome
        Of these settings, predicted for the feed at the rate asked for.
    limits : pandas.DataFrame
        Index: each share of the budget but the streams', `used_memory` with full streams, and each constraint. Columns:
        value, limit, used_pct: how much of the limit is taken; above 100 it does not hold.
    tried : pandas.DataFrame
        From `sweep`, and whether each row holds.
    events : pandas.DataFrame
        The feed at that rate.
    window_s : int
        Of which trailing window thresholds should be.
    """

    outcome: Outcome
    limits: pd.DataFrame
    tried: pd.DataFrame
    events: pd.DataFrame
    window_s: int

    @property
    def settings(self) -> Settings:
        """The settings to take."""
        return self.outcome.settings

    @property
    def holds(self) -> bool:
        """Whether all constraints hold; else these are the settings that come nearest."""
        return bool((self.limits["used_pct"] <= 100).all())

    @property
    def binds(self) -> str:
        """The limit that is nearest, or exceeded most."""
        return str(self.limits["used_pct"].idxmax())

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON."""
        return {
            **self.outcome.as_dict(),
            "holds": self.holds,
            "binds": self.binds,
            "limits": records(self.limits.reset_index()),
            "tried": len(self.tried),
            "holding": int(self.tried["holds"].sum()),
        }


def recommend(
    feed: Feed | pd.DataFrame,
    settings: Settings | None = None,
    constraints: Constraints | None = None,
    *,
    calibration: Calibration | None = None,
    space: Mapping[str, Sequence[Any]] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Recommendation:
    """Find the settings that keep the longest history within constraints, and of those the ones that take least.

    The feed is extrapolated (`extrapolate`) to the rate asked for, and until the percentiles' window is full.

    Parameters
    ----------
    feed : Feed or pandas.DataFrame
        From `liqlab.read_feed`, or an event table.
    settings : Settings, optional
        What is not searched, and the window that thresholds should be of; `liqlab.settings.load()` when absent.
    constraints : Constraints, optional
    calibration : Calibration, optional
        See `evaluate`.
    space : mapping of str to sequence, optional
        Of `sweep`; with the values that `settings` have themselves where it is absent.
    progress : callable, optional
        Called with (settings tried, settings in all).
    **options
        `count`, `seed`, `folder`, `dask` and `workers` of `sweep`.

    Raises
    ------
    EventError
        The feed holds no event.
    SettingsError
        A setting of `space`, or `maxmemory`, is not acceptable.
    """
    base, wanted = settings or load(), constraints or Constraints()
    if wanted.maxmemory is not None:
        base = changed(base, {"server.maxmemory": wanted.maxmemory})
    retention = base.retention
    hours = (retention.percentile_window_s + 2 * retention.percentile_bucket_s) / 3600
    events = extrapolate(feed, rate=wanted.rate, hours=hours)
    prepared = prepare(events)
    if wanted.shares == "fitted":
        base = changed(base, _fitted(evaluate(prepared, base, calibration)))
    if space is None:
        space = {name: _with(values, setting(base, name)) for name, values in SPACE.items()}
    tried = sweep(prepared, space, settings=base, calibration=calibration, progress=progress, **options)
    own = evaluate(prepared, base, calibration)
    recall = min(wanted.recall, 1 - 1 / max(len(own.quality.fidelity.true), 1))
    used = {
        "bytes": tried["full_bytes"] / own.limit_bytes,
        "share": 1 - tried["headroom_pct"] / 100,
        "error": tried["threshold_error_pct"].fillna(0) / wanted.error_pct,
        "missed": (1 - tried["recall"].fillna(1)) / max(1 - recall, 1e-9),
        "history": wanted.history_h / tried["history_h"].clip(lower=1e-9),
    }
    excess = pd.DataFrame(used).max(axis=1)
    tried["holds"] = tried["fits"] & (excess <= 1)
    names = list(space)
    best = _best(tried, excess, base, names)
    chosen = {name: _plain(tried.at[best, name]) for name in names}
    outcome = evaluate(prepared, changed(base, chosen), calibration, window_s=retention.percentile_window_s)
    return Recommendation(outcome, _limits(outcome, wanted, recall), tried, events, retention.percentile_window_s)


def _fitted(outcome: Outcome) -> dict[str, float]:
    """Return the shares that other families than the streams need, and for those all the rest that may be used.

    What full streams must leave free, lest cleanup come to halve them, is the buffer's.
    """
    need = outcome.shares["bytes"] / outcome.maxmemory
    lines, error = outcome.settings.thresholds, outcome.predicted.error_bytes / outcome.maxmemory
    most = lines.halve - lines.exit_margin - error - float(need.drop("streams").sum())
    others = need.drop(index=["streams", "buffer"]) * _SLACK
    shares = {f"budget.{name}": round(max(float(part), _LEAST), 4) for name, part in others.items()}
    left = math.floor(1e4 * min(1 - sum(shares.values()) - outcome.settings.budget.buffer, most)) / 1e4
    shares["budget.buffer"] = round(1 - sum(shares.values()) - left, 4)
    # Nothing is left where all families together take more than there is: it will be said of the shares as they were.
    return shares | {"budget.streams": left} if left > 0 else {}


def _best(tried: pd.DataFrame, excess: pd.Series, base: Settings, names: list[str]) -> Any:
    """Return the index of the row to take."""
    own = {name: setting(base, name) for name in names}
    others = sum((tried[name] != own[name]).fillna(False).astype(int) for name in names if own[name] is not None)
    order = pd.DataFrame({"used": tried["used_bytes"], "others": others, "excess": excess})
    if not tried["holds"].any():
        return order.sort_values(["excess", "used", "others"], kind="stable").index[0]
    order = order[tried["holds"]]
    long = tried.loc[order.index, "history_h"]
    order = order[long >= _AS_GOOD * long.max()]
    order = order[order["used"] <= order["used"].min() / _AS_GOOD]
    return order.sort_values(["others", "used"], kind="stable").index[0]


def _limits(outcome: Outcome, wanted: Constraints, recall: float) -> pd.DataFrame:
    figures, shares = outcome.as_dict(), outcome.shares.drop(index="streams")
    rows = {f"{name} bytes": (row["bytes"], row["budget_bytes"]) for name, row in shares.iterrows()}
    rows["used_memory bytes"] = (outcome.full_bytes, outcome.limit_bytes)
    rows["threshold error %"] = (figures["threshold_error_pct"] or 0.0, wanted.error_pct)
    rows["alerts missed %"] = (
        100 * (1 - (1.0 if figures["recall"] is None else figures["recall"])),
        100 * (1 - recall),
    )
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "limit"]).astype(float)
    table["used_pct"] = 100 * table["value"] / table["limit"].clip(lower=1e-9)
    if wanted.history_h:
        table.loc["history h"] = (
            outcome.history_h,
            wanted.history_h,
            100 * wanted.history_h / max(outcome.history_h, 1e-9),
        )
    return table.rename_axis("limit of")


def _with(values: Sequence[Any], own: Any) -> tuple[Any, ...]:
    return tuple(values) if own in values else (*values, own)


def _plain(value: Any) -> Any:
    return None if value is pd.NA else value.item() if isinstance(value, np.generic) else value
