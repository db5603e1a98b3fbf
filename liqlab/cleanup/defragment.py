"""Memory that is free, but lies between what is used, back to where it can be used."""

from __future__ import annotations

import asyncio
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import ResponseError
from redis.utils import str_if_bytes

from liqlab import clock
from liqlab.cleanup.families import Freed

_MOST_S: Final = 10.0


async def defragment(redis: Redis) -> Freed:
    """Let a server defragment itself for a while, where it can, and give empty pages back."""
    before = await redis.info("memory")
    how = "MEMORY PURGE"
    was = (await redis.config_get("activedefrag")).get("activedefrag", "")
    if str_if_bytes(was or "") == "no":
        try:
            await redis.config_set("activedefrag", "yes")
            how = "active defragmentation and MEMORY PURGE"
            deadline = clock.elapsed_s() + _MOST_S
            while clock.elapsed_s() < deadline:
                await asyncio.sleep(0.2)
                if not int((await redis.info("memory")).get("active_defrag_running", 0)):
                    break
            await redis.config_set("activedefrag", "no")
        except ResponseError:  # not this server's allocator
            pass
    await redis.memory_purge()
    after = await redis.info("memory")
    ratios = [float(one["mem_fragmentation_ratio"]) for one in (before, after)]
    return Freed(detail=f"{how}: fragmentation {ratios[0]:.2f} to {ratios[1]:.2f}")
