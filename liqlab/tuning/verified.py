"""Measured beside predicted: the chosen settings on a real server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from redis.asyncio import Redis

from liqlab import budget
from liqlab.feeds import Feed
from liqlab.fidelity import Replayed, replay
from liqlab.replay import Progress
from liqlab.settings import Settings
from liqlab.sizing import Calibration, Prepared, prepare
from liqlab.sizing.calibrate import settled
from liqlab.tuning.outcome import Outcome, evaluate


@dataclass(frozen=True)
class Verified:
    """What was predicted of settings, and what a replay on a real server measured.

    Attributes
    ----------
    table : pandas.DataFrame
        Index: the figure. Columns: predicted, measured, off_pct.
    replayed : liqlab.fidelity.Replayed
        The replay.
    """

    table: pd.DataFrame
    replayed: Replayed

    @property
    def fits(self) -> bool:
        """Whether nothing was evicted, and memory stayed below what the server may use."""
        return self.replayed.fits

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON."""
        return {
            "fits": self.fits,
            "evicted": self.replayed.ingested.evicted,
            "peak_bytes": self.replayed.peak_bytes,
            "figures": budget.records(self.table.reset_index()),
        }


async def verify(
    feed: Feed | pd.DataFrame | Prepared,
    settings: Settings,
    redis: Redis,
    *,
    calibration: Calibration | None = None,
    window_s: int | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Play a feed through the real system under settings, and put what it measures beside what was predicted.

    See `liqlab.fidelity.replay` for what is played. Predicted is what cleanup leaves of the streams.

    Parameters
    ----------
    feed : Feed, pandas.DataFrame or Prepared
    settings : Settings
    redis : redis.asyncio.Redis
        A private server without keys, started with these settings.
    calibration, window_s
        See `evaluate`.
    progress : callable, optional
        Called with (events written, events in all).

    Raises
    ------
    EventError, WriterError
        As `liqlab.ingest`.
    """
    prepared = prepare(feed)
    found = evaluate(prepared, settings, calibration, window_s=window_s)
    model = found.quality.fidelity
    asked = (settings.detector.percentile,)
    done = await replay(
        prepared.columns.table(), redis, settings=settings, percentiles=asked, true=model.true, progress=progress
    )
    await redis.script_flush("SYNC")  # what its interpreters leave comes and goes
    await redis.slowlog_reset()  # 1.5 KB of each command that a busy machine was slow with
    used = await settled(redis)

    last, held = _cleaned(found)
    rows: dict[str, tuple[float, float]] = {"used_memory": (found.predicted.base_bytes + float(last.sum()), used)}
    for name, size in done.table["bytes"].items():
        rows[f"{name} bytes"] = (float(last.get(str(name), np.nan)), float(size))
    rows["events held"] = (held, done.ingested.held)
    rows["alerts"] = (len(model.found), len(done.fidelity.found))
    for name in ("precision", "recall"):
        both = (getattr(model, name), getattr(done.fidelity, name))
        rows[name] = (np.nan if both[0] is None else both[0], np.nan if both[1] is None else both[1])
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["predicted", "measured"]).astype(float)
    table["off_pct"] = 100 * (table["predicted"] / table["measured"].where(table["measured"] != 0) - 1)
    return Verified(table.rename_axis("figure"), done)


def _cleaned(found: Outcome) -> tuple[pd.Series[float], float]:
    """Return what families take at the end, and the events held, where cleanup has kept the streams in their share."""
    last, shares = found.families.iloc[-1].copy(), found.shares
    server = max(float(shares["bytes"]["buffer"] - shares["budget_bytes"]["buffer"]), 0)  # beyond the buffer's share
    room = found.settings.budget.streams * (found.maxmemory - server)
    over = max(float(last["events"] + last["blocks"]) - room, 0)
    held = found.predicted.held.iloc[-1].copy()
    for family, where in (("blocks", "sealed"), ("events", "hot")):  # the oldest first
        cut = min(over / last[family], 1.0) if last[family] else 0.0
        over -= cut * last[family]
        last[family] *= 1 - cut
        held[where] *= 1 - cut
    return last, float(held.sum())
