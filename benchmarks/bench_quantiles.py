"""Every way to keep percentiles: how far off, how many bytes, how long a question takes on the server.

A busy symbol (600 events an hour) and a quiet one (24 a day) with skewed notionals; the `normal` day; recorded feeds.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import record
from liqlab import clock, read_feed, serve, server, synth
from liqlab.comparison import methods_compared
from liqlab.events import event_table

RECORDINGS = Path(__file__).resolve().parents[2] / "shared/feeds/recordings"
T0 = 20_000 * clock.DAY_MS
BUSY, QUIET = "BUSY", "QUIET"


def skewed() -> pd.DataFrame:
    """A day of a busy and of a quiet symbol."""
    rng = clock.generator(2)
    notional = rng.lognormal(8, 2, 14_400 + 24)
    symbol = [BUSY] * 14_400 + [QUIET] * 24
    times = T0 + np.concatenate([np.sort(rng.integers(0, clock.DAY_MS, 14_400)), np.arange(24) * clock.HOUR_MS])
    n = len(times)
    return event_table(times, ["okx"] * n, symbol, ["buy"] * n, notional, np.ones(n), notional)


def feeds() -> dict[str, pd.DataFrame]:
    found = {"skewed": skewed(), "normal day": synth("normal", hours=24, seed=0)}
    for name in ("binance_recorder_2025-01-26.csv", "binance_two_tables_2024-12.csv"):
        if not (RECORDINGS / name).exists():
            print(f"{name}: the recorded feeds are not on this machine")
            continue
        events = read_feed(RECORDINGS / name).events
        found[name] = events[events["ts_ms"] > events["ts_ms"].max() - clock.DAY_MS].reset_index(drop=True)
    return found


async def main() -> None:
    tdigest = server.tdigest_module() is not None
    if not tdigest:
        print("tdigest is left out: pip install 'liqlab[tdigest]'")
    table = Table("feed", "method", "symbol", "events", "off by %", "in ranks", "bytes", "query us", box=None)
    parts = []
    with serve(tdigest=tdigest) as running:
        async with running.connect() as redis:
            for name, events in feeds().items():
                parts.append((await methods_compared(events, redis)).assign(feed=name))
    measured = pd.concat(parts)
    for row in measured.itertuples():
        table.add_row(
            row.feed, row.method, row.symbol, f"{row.events:,}", f"{row.dollar_error_pct:.3f}",
            f"{row.rank_error_points:.3f}", f"{row.bytes:,}", f"{row.query_us:,.0f}",
        )  # fmt: skip
    Console(width=140).print(table)

    day = measured[measured["feed"] == "skewed"].set_index(["symbol", "method"])
    rival = "tdigest" if tdigest else "topk"

    def row(name: str, column: str, symbol: str, unit: str, other: str, per: float = 1.0) -> None:
        ours, theirs = (float(day.loc[(symbol, method), column]) / per for method in ("logbins", other))
        record(name, ours, unit, other, theirs)

    row("quantile_error_dollars", "dollar_error_pct", BUSY, "% of the true value, worst of p80 to p99", rival)
    row("quantile_rank_error_points", "rank_error_points", BUSY, "percentage points, worst of p80 to p99", rival)
    row("quantile_bytes_busy", "bytes", BUSY, "bytes a symbol, 600 events an hour", rival if tdigest else "exact")
    row("quantile_bytes_quiet", "bytes", QUIET, "bytes a symbol, 24 events a day", "exact")
    row("quantile_query_ms", "query_us", BUSY, "ms on the server, 24 hours", rival if tdigest else "exact", 1_000)


if __name__ == "__main__":
    asyncio.run(main())
