"""One look at every node of a cluster, as if they were one server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from liqlab.cluster import Cluster, Node
from liqlab.server import redact

_PATIENCE_S: Final = 2.0  # for one node: one that is frozen shall not hide what the others say
_WORST: Final = {"used_ratio": max, "rss_ratio": max, "fragmentation": max, "uptime_s": min}


async def across(cluster: Cluster, look: Callable[[Redis], Awaitable[dict[str, Any]]], longest: int) -> dict[str, Any]:
    """Look at each primary that has slots, and ask the cluster about the other nodes.

    Parameters
    ----------
    look : callable
        Returns fields of `Health` of one server.
    longest : int
        Streams that are named.

    Returns
    -------
    dict
        Fields of `Health`: counts and bytes in sum, ratios of the node that is worst off; `error` where slots are
        without a node that answers.
    """
    nodes = await cluster.topology()
    serving = [node for node in nodes if node.primary and node.slots]

    async def one(node: Node) -> dict[str, Any] | str:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await look(node.redis)
        except (RedisError, OSError) as error:  # OSError: the built-in TimeoutError too
            return redact(f"{node.name}: {type(error).__name__}: {error}".removesuffix(": "))

    looks = dict(zip(serving, await asyncio.gather(*map(one, serving)), strict=True))
    silent = {node.name: said for node, said in looks.items() if isinstance(said, str)}
    down = sorted({node.name for node in nodes if node.failed} | silent.keys())
    found = _merged([said for said in looks.values() if not isinstance(said, str)], longest)
    found |= {"nodes": len(nodes), "nodes_down": len(down), "down": tuple(down)}
    return found | {"error": "; ".join(silent.values()) or None}


def _merged(looks: Sequence[dict[str, Any]], longest: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in looks for name in one):
        known = [one[name] for one in looks if one.get(name) is not None]
        if name == "longest":
            streams = [stream for one in known for stream in one]
            found[name] = tuple(sorted(streams, key=lambda stream: (-stream[1], stream[0]))[:longest])
        elif known:
            found[name] = _WORST.get(name, sum)(known)
    if asked := found.get("hits", 0) + found.get("misses", 0):
        found["hit_ratio"] = found["hits"] / asked
    return found
