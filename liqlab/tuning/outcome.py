"""What a choice of settings costs and buys, by the models alone: bytes, history, thresholds and alerts."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final

import numpy as np
import pandas as pd

from liqlab import clock, schema
from liqlab.budget import human
from liqlab.settings import Settings
from liqlab.sizing import Calibration, Predicted, Prepared, predict
from liqlab.sizing.entries import AROUND, Entries, head_of
from liqlab.sizing.model import makers
from liqlab.sizing.prepare import through
from liqlab.sizing.streams import Run, pack
from liqlab.sizing.structures import (
    PREALLOCATED,
    Floats,
    Ints,
    Layout,
    digits,
    listpack_int,
    listpack_text,
    radix_trees,
)
from liqlab.tuning.alerts import Quality, quality, quality_key

_HOURS_SAID: Final = 48  # from which on history is said in days
# Of a signal: the usual lengths of its texts.
_SIGNAL: Final = {"side": 4, "exchange": 7, "price": 8, "notional": 11, "threshold": 17, "rank": 18, "volume": 17}

_Raised = dict[str, tuple[Floats, Floats]]  # keys and bytes through time, by family
# What a sweep needs of `Quality`, and signals and cooldowns: without its tables, another process has it sooner.
_Judged = tuple[float, float | None, float | None, _Raised]


@dataclass(frozen=True)
class Outcome:
    """What a feed takes and gives under settings.

    Attributes
    ----------
    prepared : Prepared
        The feed.
    settings : Settings
    window_s : int
        Of which trailing window thresholds should be, of exact history.
    predicted : Predicted
        Bytes through time, before any cleanup.
    rate_per_h : float
        Events an hour of the feed.
    error_pct : float
        As `Quality` has it.
    precision, recall : float or None
        Of the alerts, as `liqlab.fidelity.Fidelity` has them.
    raised : dict of str to array of float64, shape (m,)
        Bytes through time of what the detector writes: signals, a stream a symbol, and cooldowns.
    """

    prepared: Prepared
    settings: Settings
    window_s: int
    predicted: Predicted
    rate_per_h: float
    error_pct: float
    precision: float | None
    recall: float | None
    raised: dict[str, Floats]

    @cached_property
    def quality(self) -> Quality:
        """Thresholds and alerts beside those of exact history."""
        return quality(self.prepared, self.settings, self.window_s)

    @property
    def maxmemory(self) -> int:
        """Bytes that the server may use."""
        return self.settings.server.maxmemory

    @property
    def families(self) -> pd.DataFrame:
        """`predicted.families`, and what is `raised`."""
        return self.predicted.families.assign(**self.raised)

    @cached_property
    def _room(self) -> dict[str, float]:
        """Bytes of each share's budget."""
        return {share: part * self.maxmemory for share, part in self.settings.budget.model_dump().items()}

    @cached_property
    def _most(self) -> dict[str, float]:
        """Bytes of each share, the most at any time."""
        predicted = self.predicted
        through: dict[str, Any] = dict.fromkeys(self._room, 0.0)
        for name, size in [*predicted.sizes.items(), *self.raised.items()]:
            share = schema.BY_NAME[name].share
            through[share] = through[share] + size
        through["buffer"] = predicted.base_bytes + predicted.scripts_bytes
        return {share: float(np.max(size)) for share, size in through.items()}

    @cached_property
    def _headroom_pct(self) -> dict[str, float]:
        """What is left of each share's budget, per cent of it."""
        found = {}
        for share, room in self._room.items():
            most = self._most[share]
            # Of a share that has no budget nothing is left, and whatever lies in it is too much.
            found[share] = 100 * (1 - most / room) if room > 0 else -100.0 if most else 0.0
        return found

    @property
    def shares(self) -> pd.DataFrame:
        """Index: the six shares. Columns: budget_bytes; bytes, the most at any time; headroom_pct, what is left of it.

        Streams come to their budget sooner or later, and cleanup keeps them there: their headroom is what is still free
        at the end of the feed.
        """
        columns = {"budget_bytes": self._room, "bytes": self._most, "headroom_pct": self._headroom_pct}
        return pd.DataFrame(columns).rename_axis("share")

    @cached_property
    def event_bytes(self) -> float:
        """Bytes that one more event takes of the streams: sealed, where blocks are sealed, else hot."""
        hot, sealed = (self.predicted.events[name][-1] for name in ("hot", "sealed"))
        name, count = ("blocks", sealed) if sealed else ("events", max(hot, 1))
        return float(self.predicted.sizes[name][-1] / count)

    @cached_property
    def history_h(self) -> float:
        """Hours of this feed that the streams hold within their budget, cleanup removing what is older."""
        room = self._room["streams"]
        hot = float(self.predicted.sizes["events"].max())
        held = float(self.predicted.events["hot"].max())
        if hot > room or not self.predicted.events["sealed"][-1]:
            events = room / max(self.event_bytes, 1e-9) if hot <= room else held * room / hot
        else:
            events = held + (room - hot) / self.event_bytes
        return min(events / self.rate_per_h, self.settings.retention.events_s / 3600)

    @cached_property
    def used_bytes(self) -> int:
        """The most that `used_memory` comes to, cleanup keeping the streams within their budget."""
        return self._used_bytes(0)

    @cached_property
    def full_bytes(self) -> int:
        """What `used_memory` may come to once the streams are full, the prediction erring as far as it may.

        They are full when they have come to their budget, or their oldest events to `retention.events_s`.
        """
        grown = max(self.history_h * self.rate_per_h - self.predicted.events_kept, 0) * self.event_bytes
        return self._used_bytes(grown) + self.predicted.error_bytes

    def _used_bytes(self, grown: float) -> int:
        """Return `used_memory` where the streams are so many bytes larger, as far as their budget lets them."""
        full = min(self._most["streams"] + grown, self._room["streams"])
        return round(sum(self._most.values()) - self._most["streams"] + full)

    @property
    def limit_bytes(self) -> int:
        """Where `used_memory` must stay below: above it cleanup halves whatever is kept."""
        return int(self.settings.thresholds.halve * self.maxmemory)

    @cached_property
    def _left(self) -> dict[str, float]:
        """What each share has left, but for the streams."""
        return {name: percent for name, percent in self._headroom_pct.items() if name != "streams"}

    @property
    def binds(self) -> str:
        """The share, other than that of the streams, with the least headroom."""
        return min(self._left, key=self._left.__getitem__)

    @property
    def headroom_pct(self) -> float:
        """What the share that binds has left, per cent of it; below 0 where it does not fit."""
        return self._left[self.binds]

    @property
    def fits(self) -> bool:
        """Whether every share is within its budget, and the whole, with full streams, below where cleanup halves it."""
        return self.headroom_pct >= 0 and self.full_bytes <= self.limit_bytes

    @property
    def headline(self) -> str:
        """What settings buy, in one sentence."""
        hours = self.history_h
        kept = f"{hours:,.1f} hours" if hours < _HOURS_SAID else f"{hours / 24:,.1f} days"
        if not self.fits and self.headroom_pct >= 0:
            line = f"{human(self.limit_bytes)}, where cleanup halves what is kept"
            return f"May not fit: `used_memory` comes to up to {human(self.full_bytes - self.limit_bytes)} above {line}"
        if not self.fits:
            return f"Does not fit: {self.binds} is {-self.headroom_pct:.0f} % over its budget"
        every = ", as long as events live," if hours == self.settings.retention.events_s / 3600 else ""
        return f"{kept} of history{every} in {human(self.maxmemory)}"

    @property
    def detail(self) -> str:
        """What stands behind `headline`, in a line: bytes of an event, thresholds, alerts, and what is fullest."""
        alerts, error = self.quality.fidelity, self.error_pct
        within = "No thresholds" if np.isnan(error) else f"95 of 100 thresholds within {error:.2f} %"
        raised = (
            "no alerts"
            if alerts.recall is None
            else f"{100 * alerts.recall:.1f} % of {len(alerts.true):,} alerts raised"
        )
        least = f"Least headroom: {self.binds}, {self.headroom_pct:.0f} %."
        return f"{self.event_bytes:.1f} bytes an event. {within}, {raised}. {least}"

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain numbers and text, a row of a sweep; what is not known is None."""
        return {
            "used_bytes": self.used_bytes,
            "full_bytes": self.full_bytes,
            **{f"{name}_bytes": round(size) for name, size in self._most.items()},
            "event_bytes": self.event_bytes,
            "history_h": self.history_h,
            "threshold_error_pct": None if np.isnan(self.error_pct) else self.error_pct,
            "precision": self.precision,
            "recall": self.recall,
            "headroom_pct": self.headroom_pct,
            "binds": self.binds,
            "fits": self.fits,
        }


def evaluate(
    prepared: Prepared,
    settings: Settings,
    calibration: Calibration | None = None,
    *,
    window_s: int | None = None,
) -> Outcome:
    """Say what a feed takes and gives under settings, in milliseconds and without a server.

    Parameters
    ----------
    prepared : Prepared
        From `liqlab.sizing.prepare`; it remembers what settings have in common.
    settings : Settings
    calibration : Calibration, optional
        From `liqlab.sizing.calibrate`; by the sources of Redis 8.2 when absent.
    window_s : int, optional
        Of which trailing window thresholds should be, of exact history; `retention.percentile_window_s` when absent.

    Raises
    ------
    EventError
        `writer.strategy` is one that cannot be predicted.
    """
    window_s = window_s or settings.retention.percentile_window_s
    times = prepared.columns.ts_ms
    hours = max(float(times[-1] - times[0]) / clock.HOUR_MS, 1 / 60)
    known = calibration or Calibration()
    found = predict(prepared, settings, known, cleaned=True)
    error_pct, precision, recall, raised = prepared.once(*_judging(prepared, settings, known.layout, window_s))
    sizes = {name: size + keys * found.key_bytes for name, (keys, size) in raised.items()}
    rate_per_h = len(times) / hours
    return Outcome(prepared, settings, window_s, found, rate_per_h, error_pct, precision, recall, sizes)


def in_common(
    prepared: Prepared, settings: Settings, calibration: Calibration | None, window_s: int
) -> dict[Hashable, tuple[tuple[Hashable, ...], Callable[[], Any]]]:
    """Return what evaluating settings takes that others may have in common, by the key that it is remembered under.

    Of each, a group within which much is done once, and what makes it.
    """
    layout = (calibration or Calibration()).layout
    bucket_s = settings.retention.percentile_bucket_s
    groups: dict[str, tuple[Hashable, ...]] = {
        "events": ("events",),
        "sketch": ("sketch", bucket_s),
        "percentile": ("percentile", bucket_s, settings.detector.method == "reservoir"),  # whose members are drawn
    }
    key, make = _judging(prepared, settings, layout, window_s)
    found: dict[Hashable, tuple[tuple[Hashable, ...], Callable[[], Any]]] = {key: (key[:2], make)}
    made = makers(prepared, settings, layout, cleaned=True)
    return found | {key: (groups.get(name, ("others",)), make) for name, (key, make) in made.items()}


def _judging(
    prepared: Prepared, settings: Settings, layout: Layout, window_s: int
) -> tuple[tuple[Hashable, ...], Callable[[], _Judged]]:
    """Return what the figures of `Quality`, signals and cooldowns depend on, and what makes them."""

    def made() -> _Judged:
        found = quality(prepared, settings, window_s)
        alerts = found.fidelity
        raised = _raised(alerts.found, prepared.start_ms, settings, layout)
        return found.error_pct, alerts.precision, alerts.recall, raised

    kept = settings.retention.signal_s, settings.server.stream_node_max_bytes, settings.server.stream_node_max_entries
    return (*quality_key(settings, window_s), layout, *kept), made


def _raised(alerts: pd.DataFrame, rows: Ints, settings: Settings, layout: Layout) -> _Raised:
    """Return keys and bytes of signals and cooldowns in each of `rows`, which begin at so many ms."""
    alerts = alerts.sort_values(["symbol", "ts_ms"], kind="stable", ignore_index=True)
    times = alerts["ts_ms"].to_numpy()
    row, over = rows.searchsorted(times, "right") - 1, rows.searchsorted(times + 1000 * settings.retention.cooldown_s)
    length = alerts["symbol"].str.len().to_numpy().astype(np.int64)
    string = layout.key(length + len("alert::sell"))  # an integer lies in the object itself
    cooldowns = through(len(rows), row, over), through(len(rows), row, over, string)
    signals = _signals(alerts, row, rows, settings, layout) if len(alerts) else cooldowns
    return {"signal": signals, "cooldown": cooldowns}


def _signals(alerts: pd.DataFrame, row: Ints, rows: Ints, settings: Settings, layout: Layout) -> tuple[Floats, Floats]:
    """Follow the detector's streams, of one symbol each: `row` has the row in which each alert is raised."""
    symbols, times, there = alerts["symbol"].to_numpy(), alerts["ts_ms"].to_numpy(), partial(through, len(rows))
    ttl_ms, server, fields = 1000 * settings.retention.signal_s, settings.server, ("ts_ms", *_SIGNAL)
    new = np.append(True, (symbols[1:] != symbols[:-1]) | (np.diff(times) > ttl_ms))
    life, heads = np.cumsum(new) - 1, np.flatnonzero(new)
    last = np.append(heads[1:], len(times)) - 1
    born, over = row[heads], rows.searchsorted(times[last] + ttl_ms)
    length = np.array([len("signal:") + len(symbol) for symbol in symbols[heads]])
    keys, size = there(born, over), there(born, over, layout.key(length) + layout.stream)

    each = listpack_int(times) + int(listpack_text(list(_SIGNAL.values())).sum()) + AROUND
    text = digits(times) + sum(_SIGNAL.values()) + sum(map(len, fields))
    run = Run(times, np.zeros_like(times), Entries(each, text, head_of(fields)))
    nodes = pack(run, heads, server.stream_node_max_bytes, server.stream_node_max_entries)
    of, since, span = life[nodes.start], times - times.min(), int(np.ptp(times)) + ttl_ms + 2
    # A node goes with the first alert that finds all of it too old, or with its stream.
    after = (life * span + since).searchsorted(of * span + since[nodes.stop - 1] + ttl_ms, "right")
    born, gone = row[nodes.start], np.where(after <= last[of], row[np.minimum(after, len(row) - 1)], over[of])
    closed = np.minimum(np.append(np.where(of[1:] == of[:-1], born[1:], gone[:-1]), gone[-1:]), gone)
    growing = layout.alloc(np.maximum(nodes.size, min(PREALLOCATED, server.stream_node_max_bytes)))
    some = np.flatnonzero(gone >= gone.max())  # of one time: they say what a node's part of the tree is
    tree = radix_trees(of[some], times[nodes.start[some]], np.zeros_like(some), layout) / len(some)
    size += there(born, closed, growing) + there(closed, gone, layout.alloc(nodes.size)) + there(born, gone) * tree
    return keys, size
