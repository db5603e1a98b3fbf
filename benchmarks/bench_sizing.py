"""How far off `liqlab.sizing.predict` is from what `used_memory` says after a real ingest.

python benchmarks/bench_sizing.py [--quick] [--settings N] [--kind bundled] [--feed dense] [--json FILE]

Random settings x four feeds, on a fresh private server of each kind found, which is calibrated once a kind. Measured
is `used_memory` after the ingest by another client, less that client's own buffers, the scripts flushed: their
interpreter's garbage comes and goes, and is in `Predicted.error_bytes` instead. Families are measured by
`liqlab.budget`. The rival is what one does without a model: ingest the first half of the feed, take the bytes that each
event needed there, and multiply by the events that are kept of the whole.

Two rows go to build/bench.json: the median and the worst of the errors of all runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

import liqlab
from benchmarks.rows import record
from liqlab import budget, clock, server, settings, sizing
from liqlab.detector import Detector
from liqlab.events import concat
from tests.test_budget import quiet_memory

ROOT = Path(__file__).resolve().parents[1]
RECORDINGS = ROOT.parent / "shared" / "feeds" / "recordings"


def feeds(*, quick: bool) -> dict[str, pd.DataFrame]:
    """Four feeds: few busy symbols, a recording of many quiet ones, a crash, several venues."""
    hours = 2 if quick else 4
    found = {"dense": liqlab.synth("normal", hours=hours, symbols=10, rate_per_min=60, seed=1)}
    if RECORDINGS.is_dir():
        found["sparse"] = liqlab.read_feed(RECORDINGS / "binance_recorder_2025-01-26.csv").events
    else:
        found["sparse"] = liqlab.synth("normal", hours=1, rate_per_min=30, seed=2)
    cascade = liqlab.synth("cascade", hours=1, seed=3)
    found["cascade"] = cascade.iloc[: 20_000 if quick else 40_000].reset_index(drop=True)
    venues = [("binance", 120), ("bybit", 60), ("okx", 30)]
    found["venues"] = concat(
        liqlab.synth("normal", hours=hours, symbols=count, rate_per_min=40, seed=4, exchange=name)
        for name, count in venues
    )
    return found


def draw(rng: np.random.Generator) -> settings.Settings:
    """Draw settings: any layout, codec and size, and TTLs short enough that much expires."""

    def one(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    window_s = one(3_600, 7_200, 21_600, 86_400)
    return settings.load(
        shards=one(1, 1, 1, 3),
        writer={
            "layout": one("shared", "per_symbol", "hybrid"),
            "codec": one("ints", "ints", "fields", "struct19", "msgpack", "json"),
            "block_codec": one("block", "msgpack-zlib"),
            "block_bytes": one(2 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10),
            "candles": one("packed", "hash"),
            "hybrid_events": one(50, 200, 1_000),
        },
        retention={
            "hot_s": one(300, 900, 1_800, 3_600),
            "events_maxlen": one(500, 2_000, 10_000),
            "shared_maxlen": one(10_000, 1_000_000),
            "vwap_s": one(600, 3_600),
            "percentile_window_s": window_s,
            "percentile_bucket_s": one(900, 1_800, 3_600),
            "candle_s": one(900, 3_600),
            "candle_5m_s": one(1_800, 3_600),
            "candle_1h_s": one(7_200, 86_400),
            "unique_symbols_s": one(1_800, 3_600),
        },
        detector={
            "method": one("logbins", "logbins", "exact", "topk", "reservoir"),
            "size": one(None, 50, 300),
            "min_usd": 1e15,  # what a detector fills is measured, not what it raises
        },
        server={
            "stream_node_max_bytes": one(512, 1_024, 4_096, 8_192),
            "stream_node_max_entries": one(50, 100, 200, 1_000),
        },
    )


async def measure(kind: str, events: pd.DataFrame, chosen: settings.Settings) -> tuple[int, budget.Budget, int]:
    """Ingest into a fresh server; `used_memory` without clients and scripts' garbage, the budget, events held."""
    with server.serve(settings=chosen, binary=server.binaries()[kind], maxmemory=0) as running:
        async with running.connect() as redis:
            detector = None if chosen.detector.method == "logbins" else Detector(redis, settings=chosen)
            done = await liqlab.ingest(events, redis, settings=chosen, detector=detector)
        async with running.connect() as redis:
            await redis.script_flush("SYNC")
            used = await quiet_memory(redis)
            return used, await budget.measure(redis, settings=chosen, limit=1_000_000), done.held


async def calibration(kind: str) -> sizing.Calibration:
    with server.serve(binary=server.binaries()[kind], maxmemory=0) as running:
        async with running.connect() as redis:
            return await sizing.calibrate(redis)


async def run(
    kinds: list[str], some: dict[str, pd.DataFrame], count: int, seed: int, path: Path | None
) -> list[dict[str, Any]]:
    found = []
    prepared = {name: sizing.prepare(events) for name, events in some.items()}
    for kind in kinds:
        known = await calibration(kind)
        print(f"{kind}: {known}", flush=True)
        rng = clock.generator(seed)
        for number in range(count):
            chosen = draw(rng)
            for name, events in some.items():
                half = events.iloc[: len(events) // 2].reset_index(drop=True)
                used, measured, held = await measure(kind, events, chosen)
                part, _, part_held = await measure(kind, half, chosen)
                exact = sizing.predict(prepared[name], chosen, known, exact=True)
                quick = sizing.predict(prepared[name], chosen, known)
                each = (part - known.base_bytes) / max(part_held, 1)
                families = measured.families["bytes"]
                found.append(
                    {
                        "server": kind,
                        "feed": name,
                        "number": number,
                        "used": used,
                        "data": used - exact.base_bytes,
                        "error": (exact.base_bytes + exact.data_bytes) / used - 1,
                        "data_error": exact.data_bytes / (used - exact.base_bytes) - 1,
                        "quick_error": (quick.base_bytes + quick.data_bytes) / used - 1,
                        "rival_error": (known.base_bytes + each * held) / used - 1,
                        "held_error": exact.events_kept / held - 1,
                        "families": {
                            family: float(exact.table["bytes"].get(family, 0)) / size - 1
                            for family, size in families.items()
                        },
                        "bytes": families.to_dict(),
                        "settings": {
                            **chosen.writer.model_dump(
                                include={"layout", "codec", "block_codec", "block_bytes", "candles"}
                            ),
                            **chosen.retention.model_dump(include={"hot_s", "events_maxlen", "percentile_bucket_s"}),
                            **chosen.detector.model_dump(include={"method", "size"}),
                            **chosen.server.model_dump(include={"stream_node_max_bytes", "stream_node_max_entries"}),
                            "shards": chosen.shards,
                        },
                    }
                )
                row = found[-1]
                if path:
                    path.write_text(json.dumps(found))
                print(f"{kind} {name} {number}: {row['error']:+.2%} data {row['data_error']:+.2%}", flush=True)
    return found


def report(found: list[dict[str, Any]]) -> None:
    console = Console(width=150)
    table = Table(
        "server", "feed", "runs", "median", "worst", "data: median", "worst", "sampled: median", "worst",
        "half x 2: median", "worst",
        title="errors of used_memory, per cent; of the data alone; with sampled blocks; and of the rival", box=None,
    )  # fmt: skip
    frame = pd.DataFrame(found)
    for (kind, feed), part in frame.groupby(["server", "feed"], sort=False):
        cells = [str(kind), str(feed), str(len(part))]
        for column in ("error", "data_error", "quick_error", "rival_error"):
            off = 100 * part[column].abs()
            cells += [f"{off.median():.2f}", f"{off.max():.2f}"]
        table.add_row(*cells)
    console.print(table)
    names = list(dict.fromkeys(name for row in found for name in row["families"]))
    table = Table("server", "feed", *names, title="each family: median error, per cent", box=None)
    for (kind, feed), part in frame.groupby(["server", "feed"], sort=False):
        off = pd.DataFrame(part["families"].tolist()).abs().median() * 100
        table.add_row(str(kind), str(feed), *(f"{off.get(name, np.nan):.2f}" for name in names))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 settings and shorter feeds; nothing is recorded")
    parser.add_argument("--settings", type=int, default=6, help="random settings of each feed and server; 30 take long")
    parser.add_argument("--kind", choices=list(server.binaries()), help="one kind of server only")
    parser.add_argument("--feed", choices=["dense", "sparse", "cascade", "venues"], help="one feed only")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write every run to this file")
    parser.add_argument("--merge", type=Path, nargs="+", help="run nothing: report and record the runs of such files")
    options = parser.parse_args()
    if options.merge:
        found = [row for path in options.merge for row in json.loads(path.read_text())]
        report(found)
        keep(found)
        return
    count = 4 if options.quick else options.settings
    some = feeds(quick=options.quick)
    some = {name: events for name, events in some.items() if options.feed in (None, name)}
    for name, events in some.items():
        print(f"{name}: {len(events):,} events, {events['symbol'].nunique()} symbols", flush=True)
    kinds = [options.kind] if options.kind else list(server.binaries())
    found = asyncio.run(run(kinds, some, count, options.seed, options.json))
    report(found)
    if not options.quick and not options.kind and not options.feed:
        keep(found)


def keep(found: list[dict[str, Any]]) -> None:
    """Record the two rows."""
    off, rival = (100 * np.abs([row[column] for row in found]) for column in ("error", "rival_error"))
    rival_name = "bytes an event of the first half x events"
    record("sizing_error_median_pct", float(np.median(off)), "%", rival_name, float(np.median(rival)))
    record("sizing_error_worst_pct", float(off.max()), "%", rival_name, float(rival.max()))


if __name__ == "__main__":
    main()
