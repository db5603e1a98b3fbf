"""A feed played in event time, beside the plain bulk ingest of the same table on a fresh server.

`replay_vs_bulk` is expiry and sealing on the feed's clock; the other rows leave sealing out, or add cleanup, and then
the detector.

python benchmarks/bench_replay.py          # a day of 1,000,000 events: about two minutes
python benchmarks/bench_replay.py --quick  # a tenth of it
"""

import argparse
import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pandas as pd
from redis.asyncio import Redis
from rows import record

from liqlab import clock, serve, settings, synth
from liqlab.cleanup import Cleaner
from liqlab.detector import Detector, backtest
from liqlab.replay import ingest
from liqlab.writer import Writer

CHOSEN = settings.load()
Work = Callable[[Redis, pd.DataFrame], Coroutine[Any, Any, Any]]


async def bulk(redis: Redis, events: pd.DataFrame) -> None:
    await Writer(redis, settings=CHOSEN).write_table(events)


async def played_unsealed(redis: Redis, events: pd.DataFrame) -> None:
    await ingest(events, redis, settings=CHOSEN, sealing=False)


async def played(redis: Redis, events: pd.DataFrame) -> None:
    await ingest(events, redis, settings=CHOSEN)


async def played_cleaned(redis: Redis, events: pd.DataFrame) -> None:
    await ingest(events, redis, settings=CHOSEN, cleaner=Cleaner(redis, settings=CHOSEN))


async def played_all(redis: Redis, events: pd.DataFrame) -> None:
    cleaner, detector = Cleaner(redis, settings=CHOSEN), Detector(redis, settings=CHOSEN)
    await ingest(events, redis, settings=CHOSEN, cleaner=cleaner, detector=detector)


async def seconds(work: Work, events: pd.DataFrame) -> float:
    with serve(settings=CHOSEN) as server:
        async with server.connect() as redis:
            began = clock.elapsed_s()
            await work(redis, events)
            took = clock.elapsed_s() - began
    print(f"{work.__name__}: {took:.1f} s, {len(events) / took:,.0f} events/s", flush=True)
    return took


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the events")
    parser.add_argument("--hours", type=float, default=24)
    chosen = parser.parse_args()
    total = 100_000 if chosen.quick else 1_000_000
    events = synth("normal", hours=chosen.hours, seed=0, rate_per_min=total / chosen.hours / 60)
    print(f"{len(events):,} events, {events['symbol'].nunique()} symbols, {chosen.hours:g} h")
    plain = min([await seconds(bulk, events) for _ in range(2)])
    rival = "plain bulk ingest of the same table"
    record("replay_vs_bulk", min([await seconds(played, events) for _ in range(2)]), "s", rival, plain)
    record("replay_unsealed_vs_bulk", await seconds(played_unsealed, events), "s", rival, plain)
    record("replay_cleanup_vs_bulk", await seconds(played_cleaned, events), "s", rival, plain)
    record("replay_all_vs_bulk", await seconds(played_all, events), "s", rival, plain)
    began = clock.elapsed_s()
    await backtest(events, Detector(None, settings=CHOSEN))
    print(f"backtest, without a server: {clock.elapsed_s() - began:.1f} s")


if __name__ == "__main__":
    asyncio.run(main())
