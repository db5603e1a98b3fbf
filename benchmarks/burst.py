"""The worst 30 seconds of a cascade, event by event at true speed through the live path, journal on.

python benchmarks/burst.py
"""

import asyncio
import tempfile
from pathlib import Path

import numpy as np
from redis.asyncio import Redis

from liqlab import history, serve, settings, synth
from liqlab.budget import human
from liqlab.clock import elapsed_s
from liqlab.events import Event
from liqlab.writer import Writer

SECONDS = 30


async def watch(redis: Redis, peak: list[int]) -> None:
    while True:
        peak.append(int((await redis.info("memory"))["used_memory"]))
        await asyncio.sleep(0.05)


async def main() -> None:
    feed = synth("cascade", hours=1, seed=0)
    seconds = feed["ts_ms"] // 1_000
    counts = seconds.value_counts()
    worst = int(counts.idxmax())
    part = feed[seconds.between(worst - SECONDS // 2, worst + SECONDS // 2 - 1)]
    print(f"{len(part):,} events in {SECONDS} s, {counts.max():,} in the worst second")
    events, took, peak = list(Event.rows(part)), [], [0]
    with tempfile.TemporaryDirectory() as folder:
        chosen = settings.load(journal={"path": Path(folder) / "journal.db"})
        with serve(settings=chosen) as server:
            async with server.connect() as redis, server.connect() as other:
                looking = asyncio.create_task(watch(other, peak))
                async with Writer(redis, settings=chosen) as writer:
                    began, first = elapsed_s(), events[0].ts_ms
                    for event in events:
                        early = began + (event.ts_ms - first) / 1_000 - elapsed_s()
                        if early > 0:
                            await asyncio.sleep(early)
                        offered = elapsed_s()
                        done = await writer.write(event)
                        done.add_done_callback(lambda _, at=offered: took.append(elapsed_s() - at))
                    await writer.drain()
                looking.cancel()
                stored = await history(redis)
                twice = len(stored) - len(part)
                same = np.array_equal(np.sort(stored["notional"].to_numpy()), np.sort(part["price"] * part["size"]))
                print(
                    f"offered {writer.counts.offered:,}, in Redis {len(stored):,} ({twice:+,}), the same ones: {same};"
                    f" acknowledged p50 {1e3 * np.median(took):.1f} ms, p99 {1e3 * np.quantile(took, 0.99):.1f} ms,"
                    f" worst {1e3 * max(took):.0f} ms; used_memory at most {human(max(peak))}"
                )


if __name__ == "__main__":
    asyncio.run(main())
