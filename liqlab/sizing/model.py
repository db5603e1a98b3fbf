"""The whole: every family through time, the tables of keys, and the server itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import pandas as pd

from liqlab.candles import WIDTHS
from liqlab.events import EventError
from liqlab.feeds import Feed
from liqlab.percentiles import METHODS
from liqlab.settings import Settings, load
from liqlab.sizing import families, sketches
from liqlab.sizing.buckets import sorted_sets
from liqlab.sizing.events import events as events_of
from liqlab.sizing.families import Family
from liqlab.sizing.prepare import Prepared, prepare
from liqlab.sizing.structures import Floats, Ints, Layout

# What a batch of 5,000 events leaves to Lua's collector, and how much more or less it may be: measured on Redis 8.2.
GARBAGE: Final = (400_000, 500_000)
SOURCES: Final = 14_000  # of write.lua and seal.lua, kept by the server
_STEPS: Final = {"minute": 60_000, "hour": 3_600_000, "day": 86_400_000}


@dataclass(frozen=True)
class Calibration:
    """What a server is found to allocate; made by `calibrate`.

    Attributes
    ----------
    layout : Layout
        How it lays out objects.
    base_bytes : int
        `used_memory` of the server when it holds nothing, without its clients.
    tables_bytes : int
        What the tables of keys come with, whatever is in them: counts of sizes, from Redis 8 on.
    buffer_bytes : int
        What batches that wait one behind the other leave with the server.
    scripts_bytes, scripts_error : int
        What its scripts' interpreter adds while a writer works, and how much more or less that may be. It is garbage
        that comes and goes, where the server counts it at all.
    factors : dict of str to float
        Measured by predicted bytes of the structure that a family is made of; 1 is as the formulas say.
    error : float
        Two standard deviations of a prediction of the data, as a fraction of it, from what the probes left unexplained.
    server : str
        Which it is, for print.
    """

    layout: Layout = field(default_factory=Layout)
    base_bytes: int = 465_000
    tables_bytes: int = 2_700
    buffer_bytes: int = 15_000
    scripts_bytes: int = SOURCES + GARBAGE[0]
    scripts_error: int = GARBAGE[1]
    factors: dict[str, float] = field(default_factory=dict)
    error: float = 0.05
    server: str = "not calibrated: Redis 8.2 with jemalloc, by the sources"

    def factor(self, family: str) -> float:
        """Return by what factor more than by formula a family takes."""
        return self.factors.get(family, 1.0)


@dataclass(frozen=True)
class Predicted:
    """What a feed takes under settings, predicted.

    Attributes
    ----------
    ts_ms : array of int64, shape (m,)
        The beginning of each event-minute (or hour, or day).
    sizes : dict of str to array of float64, shape (m,)
        Bytes of every family when all events of it were written, sealed and expired.
    events : dict of str to array of float64, shape (m,)
        Events that are kept: ``hot`` and ``sealed``.
    ends : dict of str to tuple of int
        Keys, members and bytes of each family that has keys at the end.
    base_bytes : int
        The server without data, and without what its scripts need.
    scripts_bytes : int
        What the scripts' interpreter is likely to need on top.
    error_bytes : int
        How far `used_memory` may be off, about two standard deviations.
    key_bytes : array of float64, shape (m,)
        What the tables of keys and of TTLs take for one more key.
    """

    ts_ms: Ints
    sizes: dict[str, Floats]
    events: dict[str, Floats]
    ends: dict[str, tuple[int, int, int]]
    base_bytes: int
    scripts_bytes: int
    error_bytes: int
    key_bytes: Floats

    @cached_property
    def families(self) -> pd.DataFrame:
        """`sizes` as a table: index `ts_ms`, a column a family."""
        return pd.DataFrame(self.sizes, self._index)

    @cached_property
    def held(self) -> pd.DataFrame:
        """`events` as a table: index `ts_ms`, columns hot and sealed."""
        return pd.DataFrame(self.events, self._index)

    @cached_property
    def table(self) -> pd.DataFrame:
        """`ends` as a table: index family; columns keys, members, bytes."""
        index = pd.Index(list(self.ends), name="family", dtype=object)
        return pd.DataFrame(list(self.ends.values()), index, ["keys", "members", "bytes"])

    @property
    def _index(self) -> pd.Index[int]:
        return pd.Index(self.ts_ms, name="ts_ms")

    @property
    def data_bytes(self) -> int:
        """Bytes of all keys, at the end."""
        return sum(size for _, _, size in self.ends.values())

    @property
    def used_memory(self) -> int:
        """What the server will report at the end, without its clients."""
        return self.data_bytes + self.base_bytes + self.scripts_bytes

    @property
    def total(self) -> pd.Series:
        """`used_memory` through time."""
        return (self.families.sum(axis=1) + self.base_bytes + self.scripts_bytes).rename("used_memory")

    @property
    def peak_bytes(self) -> int:
        """The most that `total` comes to."""
        return round(max(float(self.total.max()), self.used_memory))

    @property
    def events_kept(self) -> int:
        """Events held at the end, hot and sealed."""
        return int(sum(count[-1] for count in self.events.values()))

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON, of the end."""
        return {
            "used_memory": self.used_memory,
            "error_bytes": self.error_bytes,
            "base_bytes": self.base_bytes,
            "scripts_bytes": self.scripts_bytes,
            "peak_bytes": self.peak_bytes,
            "events_kept": self.events_kept,
            "families": self.table.reset_index().to_dict("records"),
        }


def predict(
    events: Feed | pd.DataFrame | Prepared,
    settings: Settings | None = None,
    calibration: Calibration | None = None,
    *,
    step: str = "minute",
    exact: bool = False,
    cleaned: bool = False,
) -> Predicted:
    """Predict what `liqlab.ingest(events, redis, settings=settings)` leaves on a server, without a server.

    Parameters
    ----------
    events : Feed, pandas.DataFrame or Prepared
        What is asked about more than once should be prepared, by `liqlab.sizing.prepare`.
    settings : Settings, optional
        `writer`, `retention`, `server`, `shards` and how percentiles are kept are read; `liqlab.settings.load()` when
        absent.
    calibration : Calibration, optional
        From `calibrate`; by the sources of Redis 8.2 when absent.
    step : str
        ``minute``, ``hour`` or ``day``: how far apart the rows are.
    exact : bool
        Whether every sealed block is encoded to know its size (about 20 us an event); else a few samples of the feed
        are, and when the last block was sealed is a guess: hot events may be off by up to a block.
    cleaned : bool
        Whether a `liqlab.cleanup.Cleaner` seals what does not fill a block; its other work is not predicted.

    Returns
    -------
    Predicted

    Raises
    ------
    EventError
        There is no event, or `writer.strategy` or `detector.method` is one that cannot be predicted.
    ValueError
        The step is none.
    """
    if step not in _STEPS:
        raise ValueError(f"step is {step!r}; it must be one of {', '.join(_STEPS)}")
    prepared, settings, calibration = prepare(events), settings or load(), calibration or Calibration()
    if settings.writer.strategy != "script":
        raise EventError(f"writer.strategy is {settings.writer.strategy!r}; only what `script` writes can be predicted")
    if settings.detector.method == "tdigest":
        raise EventError(
            "detector.method is 'tdigest', which cannot be predicted: its module keeps digests outside of what the"
            " server counts, and merges them as events happen to come; play it with `liqlab replay --method tdigest`"
        )
    layout, rows = calibration.layout, prepared.rows
    # Batches then wait one behind the other.
    crowded = int(np.diff(prepared.stop, prepend=0).max()) > settings.writer.bulk_events
    buffers = calibration.buffer_bytes if crowded else 0
    parts, held = _parts(prepared, settings, layout, exact, cleaned)

    count = {name: np.rint(part.keys).astype(np.int64) for name, part in parts.items()}
    every = np.sum(list(count.values()), axis=0)
    timed = np.sum([keys for name, keys in count.items() if parts[name].ttl], axis=0)
    born = {name: np.rint(part.born).astype(np.int64) for name, part in parts.items()}
    fewest = every - np.sum(list(born.values()), axis=0)
    fewest_timed = timed - np.sum([keys for name, keys in born.items() if parts[name].ttl], axis=0)
    main = layout.table(every, layout.slots(fewest, every)) / np.maximum(every, 1)
    expires = layout.table(timed, layout.slots(fewest_timed, timed)) / np.maximum(timed, 1)
    sizes = {
        name: (part.size + count[name] * (main + (expires if part.ttl else 0))) * calibration.factor(name)
        for name, part in parts.items()
    }
    last = np.append(np.flatnonzero(np.diff(prepared.start_ms // _STEPS[step])), rows - 1)
    ends = {
        name: (int(keys[-1]), parts[name].members, round(sizes[name][-1]))
        for name, keys in count.items()
        if keys[-1] > 0
    }
    data_bytes = sum(size for _, _, size in ends.values())
    return Predicted(
        ts_ms=prepared.start_ms[last] // _STEPS[step] * _STEPS[step],
        sizes={name: size[last] for name, size in sizes.items()},
        events={name: values[last] for name, values in held.items()},
        ends=ends,
        base_bytes=calibration.base_bytes + calibration.tables_bytes + buffers,
        scripts_bytes=calibration.scripts_bytes,
        error_bytes=round(calibration.error * data_bytes) + calibration.scripts_error + buffers,
        key_bytes=(main + expires)[last],
    )


def makers(
    prepared: Prepared, settings: Settings, layout: Layout, *, exact: bool = False, cleaned: bool = False
) -> dict[str, tuple[tuple[Hashable, ...], Callable[[], Any]]]:
    """Return of every family what it depends on, which is the key that it is remembered under, and what makes it.

    Under ``events`` are the streams, hot and sealed.
    """
    retention, writer, shards = settings.retention, settings.writer, settings.shards
    method, window = settings.detector.method, (retention.percentile_window_s, retention.percentile_bucket_s)
    found: dict[str, tuple[tuple[Hashable, ...], Callable[[], Any]]] = {
        "events": (
            (
                "events", layout, exact, cleaned and settings.cleanup.compact_s, shards, writer.layout, writer.codec,
                writer.block_codec, writer.block_bytes,
                (writer.hybrid_events, writer.bulk_events) if writer.layout == "hybrid" else 0,
                settings.server.stream_node_max_bytes, settings.server.stream_node_max_entries, retention.hot_s,
                retention.events_s, retention.events_maxlen, retention.shared_maxlen,
            ),
            lambda: events_of(prepared, settings, layout, exact=exact, cleaned=cleaned),
        ),
        "names": (("names", layout, shards), lambda: families.names(prepared, settings, layout)),
        "vwap": (("vwap", layout, shards, retention.vwap_s), lambda: families.vwap(prepared, settings, layout)),
        "unique_symbols": (
            ("unique", layout, shards, retention.unique_symbols_s),
            lambda: families.unique_symbols(prepared, settings, layout),
        ),
    }  # fmt: skip
    if method == "logbins":
        found["sketch"] = (
            ("sketch", layout, shards, *window, writer.bulk_events),
            lambda: sketches.sketch(prepared, settings, layout),
        )
    else:
        found["percentile"] = (
            ("percentile", layout, shards, *window, method, METHODS[method].size(settings)),
            lambda: sorted_sets(prepared, settings, layout),
        )
    for name in WIDTHS.values():
        found[name] = (
            (name, layout, shards, getattr(retention, f"{name}_s"), writer.candles, writer.bulk_events),
            lambda name=name: families.candle(name, prepared, settings, layout),  # type: ignore[misc]
        )
    return found


def _parts(
    prepared: Prepared, settings: Settings, layout: Layout, exact: bool, cleaned: bool
) -> tuple[dict[str, Family], dict[str, Any]]:
    """Return every family, and the events held; each remembered under what it depends on."""
    made = makers(prepared, settings, layout, exact=exact, cleaned=cleaned)
    found = {name: prepared.once(key, make) for name, (key, make) in made.items()}
    streams = found.pop("events")
    parts = {"events": streams.hot, "blocks": streams.blocks, **found}
    parts["writer"] = families.writer(prepared, settings, layout)
    return parts, {"hot": streams.in_hot, "sealed": streams.in_blocks}
