"""How fast the models are: a move of each slider of the panel, a sweep beside a replay, two Dask workers beside one.

python benchmarks/bench_tuning.py [--quick] [--events 1000000] [--settings 3888]

A slider move is what the kernel does between two figures: the models and the update of the panel's figure. The rival of
a sweep is the replay of the same feed under one setting by `liqlab.ingest`: writer, sealing and expiry, no detector.
Rows: slider_ms, sweep_vs_replay, dask_two_workers.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import liqlab
from benchmarks.rows import record
from liqlab import clock, settings, sizing, widgets
from liqlab.tuning import SPACE, sweep
from liqlab.tuning.search import local_cluster
from liqlab.widgets.panel import KNOBS, is_number

PERCENTILES = [
    name for name in KNOBS if "percentile" in name or name == "detector.size"
]  # what a method's answers depend on


def slider_ms(events: sizing.Prepared) -> list[float]:
    """Move each slider over all its values, and back; those of percentiles under each method: the ms of each move."""
    panel = widgets.panel(events, settings.load())
    found = []
    sliders = [(name, "logbins") for name, (_, values) in KNOBS.items() if is_number(values)]
    for method in list(KNOBS["detector.method"][1].values())[1:]:
        sliders += [(name, method) for name in PERCENTILES if name != "detector.size" or method != "exact"]
    for name, method in sliders:
        values, taken = KNOBS[name][1], []
        began = clock.elapsed_s()
        panel.knobs["detector.method"].value = method
        if method != "logbins":
            print(f"{method}: {1000 * (clock.elapsed_s() - began):.0f} ms to turn to", end="; ")
        for value in [*values.values(), *reversed(values.values())]:
            if panel.knobs[name].value != value:
                began = clock.elapsed_s()
                panel.knobs[name].value = value
                taken.append(1000 * (clock.elapsed_s() - began))
        panel.reset.click()
        found += taken
        print(f"{name:34} median {np.median(taken):6.0f} ms, worst {max(taken):6.0f}", flush=True)
    return found


async def replayed_s(events: sizing.Prepared) -> float:
    with liqlab.serve(maxmemory=0) as server:
        async with server.connect() as redis:
            return (await liqlab.ingest(events.columns.table(), redis)).seconds


def swept_s(events: sizing.Prepared, count: int, workers: int = 0) -> float:
    """Sweep in this process, or on so many Dask workers that have started; the feed's way to them counts."""
    with ExitStack() as stack:
        address = None
        if workers:
            address = stack.enter_context(local_cluster(workers)).scheduler_address
        fresh = sizing.prepare(events.columns.table())
        began = clock.elapsed_s()
        sweep(fresh, SPACE, count=count, dask=address)
        return clock.elapsed_s() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the events and settings; nothing is recorded")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--settings", type=int, default=3_888, help="combinations of the sweep: all of them")
    options = parser.parse_args()
    size, count = (
        (options.events // 10, options.settings // 10) if options.quick else (options.events, options.settings)
    )
    feed = liqlab.synth("normal", hours=24, rate_per_min=size / 1_440, seed=0)
    events = sizing.prepare(feed)
    print(f"{len(events):,} events")
    moves = slider_ms(events)
    print(f"slider: median {np.median(moves):.0f} ms, worst {max(moves):.0f} ms of {len(moves)} moves")
    replay_s = asyncio.run(replayed_s(events))
    one_s = swept_s(events, count)
    print(f"replay {replay_s:.1f} s; a sweep of {count} settings {one_s:.1f} s, {1000 * one_s / count:.1f} ms each")
    pairs = []
    for order in ((1, 2), (2, 1)) * 4 + ((1, 2),):  # a machine that grows slower would favour who always goes first
        taken = {workers: swept_s(events, count, workers) for workers in order}
        pairs.append((taken[1], taken[2]))
        print(f"Dask, one worker {taken[1]:.1f} s, two {taken[2]:.1f} s: {taken[1] / taken[2]:.2f}", flush=True)
    single_s, two_s = sorted(pairs, key=lambda pair: pair[0] / pair[1])[len(pairs) // 2]
    if not options.quick:
        record("slider_ms", float(np.median(moves)), "ms, median", "limit", 100)
        record("sweep_vs_replay", one_s / count, "s a setting", "replay", replay_s)
        record("dask_two_workers", two_s, "s", "one worker", single_s)


if __name__ == "__main__":
    main()
