"""Measured beside predicted: the chosen settings on a real server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from redis.asyncio import Redis

from liqlab import budget
from liqlab.cleanup import Cleaner
from liqlab.detector import Detector
from liqlab.feeds import Feed
from liqlab.fidelity import Fidelity, compare
from liqlab.replay import Ingested, Progress, ingest
from liqlab.settings import Settings, changed
from liqlab.sizing import Calibration, Prepared, prepare
from liqlab.tuning.outcome import evaluate

_CHECK_S: Final = 1_800


@dataclass(frozen=True)
class Verified:
    """What was predicted of settings, and what a replay on a real server measured.

    Attributes
    ----------
    table : pandas.DataFrame
        Index: the figure. Columns: predicted, measured, off_pct.
    ingested : Ingested
        What the replay did.
    fidelity : Fidelity
        Its alerts beside those of exact history.
    maxmemory, peak_bytes : int
        What the server may use, and the most that it did.
    """

    table: pd.DataFrame
    ingested: Ingested
    fidelity: Fidelity
    maxmemory: int
    peak_bytes: int

    @property
    def fits(self) -> bool:
        """Whether nothing was evicted, and memory stayed below what the server may use."""
        return self.ingested.evicted == 0 and self.peak_bytes <= self.maxmemory

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON."""
        return {
            "fits": self.fits,
            "evicted": self.ingested.evicted,
            "peak_bytes": self.peak_bytes,
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

    Writer, sealing, expiry, cleanup and detector run on the feed's clock, see `liqlab.ingest`; what families take is
    looked at once in half an hour of it.

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
    # A look at every family takes longer than five minutes of a feed that is played.
    rarely = changed(settings, {"cleanup.check_s": max(settings.cleanup.check_s, _CHECK_S)})
    detector, cleaner = Detector(redis, settings=settings), Cleaner(redis, settings=rarely)
    done = await ingest(
        prepared.columns.table(), redis, settings=settings, cleaner=cleaner, detector=detector, progress=progress
    )
    measured = await budget.measure(redis, settings=settings)
    true = found.quality.fidelity.true
    alerts = compare(done.alerts, true, within_s=settings.retention.cooldown_s)
    await redis.script_flush("SYNC")  # what its interpreters leave comes and goes
    memory = await redis.info("memory")
    used = int(memory["used_memory"]) - int(memory.get("mem_clients_normal", 0))
    last = found.families.iloc[-1]
    rows: dict[str, tuple[float, float]] = {"used_memory": (found.predicted.base_bytes + float(last.sum()), used)}
    for name, size in measured.families["bytes"].items():
        rows[f"{name} bytes"] = (float(last.get(str(name), np.nan)), float(size))
    model = found.quality.fidelity
    rows["events held"] = (found.predicted.events_kept, done.held)
    rows["alerts"] = (len(model.found), len(alerts.found))
    for name in ("precision", "recall"):
        both = (getattr(model, name), getattr(alerts, name))
        rows[name] = (np.nan if both[0] is None else both[0], np.nan if both[1] is None else both[1])
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["predicted", "measured"]).astype(float)
    table["off_pct"] = 100 * (table["predicted"] / table["measured"].where(table["measured"] != 0) - 1)
    peak = int(done.timeline["used_memory"].max())
    return Verified(table.rename_axis("figure"), done, alerts, int(memory["maxmemory"]), peak)
