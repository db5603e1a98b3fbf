"""Whose figure is nearer to what `used_memory` grew by: liqlab's budget, or the sum of MEMORY USAGE?

Every family is loaded alone on a fresh server of each kind found. Prints one line each; errors in per cent.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from liqlab import budget, server
from tests.test_budget import LOADS, load_alone


async def main() -> None:
    print(f"{'server':10} {'family':24} {'grown by':>12} {'MEMORY USAGE':>13} {'liqlab':>8}")
    for kind, binary in server.binaries().items():
        for load, commands in LOADS.items():
            with server.serve(binary=binary) as running:
                async with running.connect() as redis:
                    grown = await load_alone(running, redis, commands())
                    measured = await budget.measure(redis, limit=100_000)
                    usage = sum([await redis.memory_usage(key, samples=0) async for key in redis.scan_iter(count=1000)])
            ours = int(measured.families["bytes"].sum())
            print(f"{kind:10} {load:24} {grown:12,} {usage / grown - 1:+13.1%} {ours / grown - 1:+8.1%}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
