"""The directives on live servers, and the files of a deployed one: real servers are started with them."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
import yaml
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError, ResponseError
from redis.utils import str_if_bytes

import liqlab
from liqlab import config, schema
from liqlab import server as server_module
from liqlab.breaker import Breaker
from liqlab.candles import candles
from liqlab.detector import Detector, signals, table
from liqlab.sealing import seal
from liqlab.server import Server, capabilities, connect
from liqlab.settings import Settings, SettingsError, load
from liqlab.writer import Writer

ROOT = Path(__file__).resolve().parents[1]
PASSWORDS = {"writer": "w r/i&t'e\"r", "notebook": "n|o\\t$e#1", "operator": "ö"}
PASSWORD_VARIABLES = {f"REDIS_{user.upper()}_PASSWORD": password for user, password in PASSWORDS.items()}
# What Redis says of the kernel, and no file of ours can change.
KERNEL = re.compile(r"overcommit|transparent huge|somaxconn|tcp backlog", re.IGNORECASE)
TROUBLE = re.compile(r"warn|error|fail|disabled|deprecat|cannot|can't", re.IGNORECASE)
NOBODY = re.compile(r"invalid username-password|already authenticated|authentication required", re.IGNORECASE)
STOCK = {"port": "0", "unixsocket": "redis.sock", "save": ""}


def wait_for(done: object, what: str, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def accepts(path: Path) -> bool:
    """Return whether somebody listens at a socket: its file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@dataclass
class Deployed:
    """A server that start.sh started."""

    kind: str
    folder: Path
    port: int
    log: Path
    pid: int

    def connect(self, user: str) -> Redis:
        return connect(f"redis://127.0.0.1:{self.port}", username=user, password=PASSWORDS.get(user))


def environment(folder: Path, binary: Path, passwords: dict[str, str]) -> dict[str, str]:
    """A PATH on which `redis-server` is the binary, and nothing else of ours."""
    programs, temporary = folder / "bin", folder / "tmp"
    programs.mkdir(exist_ok=True)
    temporary.mkdir(exist_ok=True)
    if not (programs / "redis-server").exists():
        (programs / "redis-server").symlink_to(binary)
    return {"PATH": f"{programs}:/usr/bin:/bin", "TMPDIR": str(temporary), "LANG": "xx_XX.nonsense", **passwords}


@pytest.fixture(scope="session")
def deployed(
    kind: str, server_binaries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp(f"deployed-{kind}")
    config.write(folder, load())
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["sh", folder / "start.sh", "--port", str(port), "--dir", folder],
            env=environment(folder, server_binaries[kind], PASSWORD_VARIABLES),
            stdout=out,
            stderr=out,
        )
    try:
        wait_for(lambda: "eady to accept" in log.read_text() or process.poll() is not None, "the start")
        assert process.poll() is None, log.read_text()
        yield Deployed(kind, folder, port, log, process.pid)
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
async def empty(deployed: Deployed) -> None:
    """Nothing is on the deployed server."""
    async with deployed.connect("operator") as operator:
        async for key in operator.scan_iter():
            await operator.delete(key)


# The files


def test_the_folder_deploy_is_what_write_writes(tmp_path: Path) -> None:
    written = config.write(tmp_path / "made" / "anew", load())
    names = ["redis.conf", "users.acl", "start.sh", "docker-compose.yml", "liqlab.toml"]
    assert [path.name for path in written] == names
    assert {path.name for path in (ROOT / "deploy").iterdir()} == {path.name for path in written}
    for path in written:
        kept = (ROOT / "deploy" / path.name).read_text()
        assert kept == path.read_text(), f"deploy/{path.name} is not of these settings: write it again"
    assert config.write(tmp_path / "made" / "anew", load()) == written


def test_settings_reach_the_files(tmp_path: Path) -> None:
    settings = load(server={"maxmemory": "60mb", "maxmemory_policy": "noeviction", "stream_node_max_bytes": "1kb"})
    config.write(tmp_path, settings)
    lines = (tmp_path / "redis.conf").read_text().splitlines()
    expected = {f"maxmemory {60 << 20}", "maxmemory-policy noeviction", "stream-node-max-bytes 1024"}
    assert expected | {"client-output-buffer-limit pubsub 1048576 262144 60"} <= set(lines)
    assert (
        yaml.safe_load((tmp_path / "docker-compose.yml").read_text())["services"]["redis"]["mem_limit"] == "67108864b"
    )


def test_the_containers_limit_is_above_maxmemory(tmp_path: Path) -> None:
    config.write(tmp_path, load(cleanup={"rss_bytes": "300mb"}))
    assert f"mem_limit: {300 << 20}b" in (tmp_path / "docker-compose.yml").read_text()
    with pytest.raises(SettingsError, match=r"cleanup\.rss_bytes = 209715200.*server\.maxmemory = 251658240"):
        config.write(tmp_path / "not", load(cleanup={"rss_bytes": "200mb"}))
    assert not (tmp_path / "not").exists()


def test_compose_opens_the_port_to_this_machine_and_has_no_password() -> None:
    text = (ROOT / "deploy" / "docker-compose.yml").read_text()
    service = yaml.safe_load(text)["services"]["redis"]
    assert service["image"].startswith("redis:")
    assert service["ports"] == ["127.0.0.1:6379:6379"]
    assert int(service["mem_limit"].removesuffix("b")) == 256 << 20 > load().server.maxmemory
    assert {name: value.split()[0] for name, value in service["environment"].items()} == {
        "REDIS_WRITER_PASSWORD": "${REDIS_WRITER_PASSWORD:?has",
        "REDIS_NOTEBOOK_PASSWORD": "${REDIS_NOTEBOOK_PASSWORD:?has",
        "REDIS_OPERATOR_PASSWORD": "${REDIS_OPERATOR_PASSWORD:-}",
    }
    for volume in service["volumes"]:
        source, target, mode = volume.split(":")
        assert (ROOT / "deploy" / source).is_file()
        assert (Path(target).parent, mode) == (Path("/liqlab"), "ro")
    assert service["entrypoint"] == ["sh", "/liqlab/start.sh"]


def test_the_containers_health_check(deployed: Deployed) -> None:
    if shutil.which("redis-cli") is None:
        pytest.skip("the health check runs redis-cli, which is not on this machine (apt install redis-tools)")
    service = yaml.safe_load((deployed.folder / "docker-compose.yml").read_text())["services"]["redis"]
    how, command = service["healthcheck"]["test"]
    assert how == "CMD-SHELL"
    command = command.replace("$$", "$").replace("redis-cli", f"redis-cli -p {deployed.port}")
    for password, healthy in ((PASSWORDS["notebook"], True), ("wrong", False)):
        variables = {**os.environ, "REDIS_NOTEBOOK_PASSWORD": password}
        assert (subprocess.run(["sh", "-c", command], env=variables, check=False).returncode == 0) is healthy
    gone = command.replace(str(deployed.port), "1")
    assert subprocess.run(["sh", "-c", gone], env=variables, capture_output=True, check=False).returncode != 0


# A server that is started with them


def test_starts_without_a_warning(deployed: Deployed) -> None:
    lines = deployed.log.read_text().splitlines()
    assert any("eady to accept" in line for line in lines)
    assert [line for line in lines if TROUBLE.search(line) and not KERNEL.search(line)] == []


async def test_the_server_has_the_directives(deployed: Deployed) -> None:
    async with deployed.connect("operator") as operator:
        table = await config.apply(operator, load(), dry_run=True)
        shown = await operator.config_get("*")
    assert table.loc[table["state"] != "already so"].index.tolist() == ["activedefrag"]
    assert shown["bind"] == "127.0.0.1 -::1"
    assert shown["protected-mode"] == "yes"
    ports = {item.laddr.ip for item in psutil.Process(deployed.pid).net_connections("inet") if item.status == "LISTEN"}
    assert ports <= {"127.0.0.1", "::1"}


def test_passwords_are_in_no_file_argument_or_environment(deployed: Deployed) -> None:
    process = psutil.Process(deployed.pid)
    [acl] = (deployed.folder / "tmp").iterdir()
    assert acl.stat().st_mode & 0o777 == 0o600
    texts = [path.read_text() for path in deployed.folder.iterdir() if path.is_file()] + [acl.read_text()]
    texts += [" ".join(process.cmdline()), str(process.environ())]
    for user, password in PASSWORDS.items():
        if len(password) > 1:
            assert not any(password in text for text in texts), user
        assert sha256(password.encode()).hexdigest() in acl.read_text()
    assert not any(name in process.environ() for name in PASSWORD_VARIABLES)


@pytest.mark.parametrize("missing", ["writer", "notebook"])
@pytest.mark.parametrize("empty", [True, False])
def test_no_start_without_a_password(
    server_binaries: dict[str, Path], tmp_path: Path, missing: str, empty: bool
) -> None:
    config.write(tmp_path, load())
    name = f"REDIS_{missing.upper()}_PASSWORD"
    passwords = {**PASSWORD_VARIABLES, name: ""} if empty else dict(PASSWORD_VARIABLES)
    if not empty:
        del passwords[name]
    command = ["sh", tmp_path / "start.sh", "--port", "0"]
    variables = environment(tmp_path, next(iter(server_binaries.values())), passwords)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert f"{name}: has no value" in done.stderr
    assert done.stdout == ""


def test_no_start_without_a_way_to_hash(kind: str, server_binaries: dict[str, Path], tmp_path: Path) -> None:
    config.write(tmp_path, load())
    variables = environment(tmp_path, server_binaries[kind], PASSWORD_VARIABLES)
    broken = tmp_path / "bin" / "sha256sum"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    command = ["sh", tmp_path / "start.sh", "--port", "0", "--unixsocket", tmp_path / "s"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "ACL errors" in done.stdout


async def test_the_bare_files_let_nobody_in(kind: str, server_binaries: dict[str, Path], tmp_path: Path) -> None:
    config.write(tmp_path, load())
    arguments = ["./redis.conf", "--port", "0", "--unixsocket", "s"]
    with (tmp_path / "log").open("w") as out:
        process = subprocess.Popen([server_binaries[kind], *arguments], cwd=tmp_path, stdout=out, stderr=out)
    try:
        wait_for(lambda: accepts(tmp_path / "s"), "the socket")
        for user in ("default", *PASSWORDS):
            for password in ("", "x", PASSWORDS.get(user, "")):
                async with connect(f"unix://{tmp_path}/s", username=user, password=password) as client:
                    with pytest.raises(RedisError, match=NOBODY):
                        await client.ping()
        async with connect(f"unix://{tmp_path}/s") as client:
            with pytest.raises(RedisError, match=NOBODY):
                await client.ping()
    finally:
        process.terminate()
        process.wait(10)


async def test_the_operator_is_off_without_a_password(server_binaries: dict[str, Path], tmp_path: Path) -> None:
    config.write(tmp_path, load())
    passwords = {name: value for name, value in PASSWORD_VARIABLES.items() if "OPERATOR" not in name}
    with (tmp_path / "log").open("w") as out:
        process = subprocess.Popen(
            ["sh", tmp_path / "start.sh", "--port", "0", "--unixsocket", tmp_path / "s"],
            env=environment(tmp_path, next(iter(server_binaries.values())), passwords),
            stdout=out,
            stderr=out,
        )
    try:
        wait_for(lambda: accepts(tmp_path / "s"), "the socket")
        async with connect(f"unix://{tmp_path}/s", username="writer", password=PASSWORDS["writer"]) as client:
            assert await client.ping()
        async with connect(f"unix://{tmp_path}/s", username="operator", password=PASSWORDS["operator"]) as client:
            with pytest.raises(RedisError, match=NOBODY):
                await client.ping()
    finally:
        process.terminate()
        process.wait(10)


# The users


def all_keys() -> Iterator[tuple[schema.Family, str]]:
    for family in schema.FAMILIES:
        for shard in (None, 0, 1023):
            for symbol in ("BTCUSDT", "BTC-USDT:PERP", "\u5e01{x}[y]*?"):
                yield family, family.key(symbol, side="buy", bucket=1, shard=shard)
            if family.name == "events":
                yield family, family.key(shard=shard)


def test_every_key_of_the_schema_is_its_own_family() -> None:
    assert {family.name for family, key in all_keys() if schema.family_of(key) is family} == set(schema.BY_NAME)


async def test_the_users_reach_the_keys_of_the_schema_and_no_others(deployed: Deployed) -> None:
    async def may(user: str, *command: str) -> bool:
        return str_if_bytes(await operator.execute_command("ACL DRYRUN", user, *command)) == "OK"

    async with deployed.connect("operator") as operator:
        for _, key in all_keys():
            assert await may("writer", "SET", key, "x"), key
            assert await may("notebook", "GET", key), key
            assert not await may("notebook", "SET", key, "x"), key
        for key in ("secret", "liqx", "liquidation:BTC", "liqid2", "liqb:x", "sizes:A:1", "stats:new:1", "ALERT:A:buy"):
            assert not await may("writer", "GET", key), key
            assert not await may("notebook", "GET", key), key
            assert await may("operator", "GET", key), key


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"shards": 3, "writer": {"layout": "per_symbol", "codec": "struct19", "candles": "hash"}},
        {"writer": {"strategy": "pipeline"}},
        {"writer": {"strategy": "single"}},
    ],
    ids=["shared", "shards", "pipeline", "single"],
)
async def test_the_writer_writes_and_the_notebook_reads(deployed: Deployed, sections: dict[str, object]) -> None:
    settings: Settings = load(**sections, detector={"percentile": 50.0, "volume_usd": 0.0})
    events = liqlab.synth("quiet", hours=1, seed=3).head(400)
    symbol, end_ms = str(events["symbol"].iloc[-1]), int(events["ts_ms"].iloc[-1])
    script = settings.writer.strategy == "script"
    async with deployed.connect("writer") as writer:
        made = Writer(writer, settings=settings)
        await made.write_table(events)
        assert made.counts.written == len(events)
        if script:
            await seal(writer, now_ms=end_ms + 10**7, settings=settings, partial=True)
        alerts = await Detector(writer, settings=settings).look(events.tail(100).reset_index(drop=True))
        assert bool(alerts) == script
        await writer.memory_purge()
        await Breaker(thresholds=settings.thresholds).check(writer)
        assert (await writer.config_get("activedefrag"))["activedefrag"] == "no"
        budget = await liqlab.budget.measure(writer, settings=settings)
        assert budget.table.loc["streams", "bytes"] > 0
        stored = await liqlab.history(writer, settings=settings)
        kept = await candles(writer, symbol, settings=settings)
        assert len(stored) == len(events)

    async with deployed.connect("notebook") as notebook:
        if script:
            assert (await liqlab.history(notebook, settings=settings)).equals(stored)
            assert len(kept) > 0
            assert (await signals(notebook, settings=settings)).equals(table(alerts))
        assert not (await liqlab.history(notebook, symbol, settings=settings)).empty
        ends = {"start_ms": end_ms - 10**7, "end_ms": end_ms}
        assert (await candles(notebook, symbol, settings=settings, **ends)).equals(kept)
        uniques = [schema.BY_NAME["unique_symbols"].key(shard=shard) for shard in schema.shards_of(settings)]
        if script:
            assert sum([await notebook.pfcount(key) for key in uniques]) == pytest.approx(
                events["symbol"].nunique(), rel=0.05
            )
        assert (await capabilities(notebook)).maxmemory == 240 << 20
        assert await notebook.dbsize() > 1
        # What walks through all keys would name foreign ones.
        with pytest.raises(NoPermissionError, match="no permissions to run the 'scan' command"):
            await liqlab.budget.measure(notebook, settings=settings)
    async with deployed.connect("operator") as operator:
        await operator.set("secret:of:another", "x")
        budget = await liqlab.budget.measure(operator, settings=settings)
        assert budget.table.loc["foreign", "keys"] == 1


REFUSAL = re.compile("no permissions to|can't access at least one of the keys|DEBUG command not allowed", re.IGNORECASE)
REFUSED_TO_ALL = ["FLUSHALL", "FLUSHDB", "SWAPDB 0 1", "KEYS *", "DEBUG OBJECT liq", "SHUTDOWN NOSAVE", "MODULE LIST"]
REFUSED_TO_BOTH = [
    *REFUSED_TO_ALL,
    *("CONFIG SET maxmemory 1", "CONFIG REWRITE", "CONFIG RESETSTAT", "ACL LIST", "ACL SETUSER x on", "ACL LOG"),
    *("RESTORE liq:A 0 x", "MIGRATE h 1 liq:A 0 1", "MONITOR", "CLIENT LIST", "CLIENT KILL ID 1", "CLIENT PAUSE 1"),
    *(
        "SCRIPT FLUSH",
        "FUNCTION FLUSH",
        "FUNCTION LOAD x",
        "FCALL f 0",
        "SAVE",
        "BGSAVE",
        "REPLICAOF NO ONE",
        "SLOWLOG GET",
    ),
    *("GET secret:of:another", "SET secret:of:another x", "DEL secret:of:another", "RENAME secret:of:another liq:A"),
    *("COPY secret:of:another liq:A", "DUMP secret:of:another", "MEMORY USAGE secret:of:another", "SORT liq:A GET *"),
    *("EXISTS secret:of:another", "MGET liq:A secret:of:another", "PUBLISH c x", "SUBSCRIBE __keyspace@0__:*"),
]
REFUSED_TO_NOTEBOOK = [
    *("SCAN 0", "RANDOMKEY", "CONFIG GET *", "CLIENT TRACKING ON BCAST", "MEMORY PURGE", "MEMORY DOCTOR"),
    *("SET liq:A x", "DEL liq:A", "UNLINK liq:A", "XADD liq:A * f v", "XTRIM liq:A MAXLEN 0", "HSET vwap:A f v"),
    *("EXPIRE liq:A 1", "PERSIST liq:A", "PFADD unique_symbols:1h x", "APPEND candle:A:1 x", "GETDEL liq:A"),
    *("DUMP liq:A", "RENAME liq:A liq:B", "MOVE liq:A 1", "SORT_RO liq:A", "SETRANGE liq:A 0 x", "LPUSH liqid x"),
]


@pytest.mark.usefixtures("empty")
async def test_what_is_refused(deployed: Deployed) -> None:
    async with deployed.connect("operator") as operator:
        await operator.set("secret:of:another", "x")
    refused = {"writer": REFUSED_TO_BOTH, "notebook": REFUSED_TO_BOTH + REFUSED_TO_NOTEBOOK, "operator": REFUSED_TO_ALL}
    for user, commands in refused.items():
        async with deployed.connect(user) as client:
            for command in commands:
                with pytest.raises(ResponseError, match=REFUSAL):
                    await client.execute_command(*command.split(" "))
            assert await client.acl_whoami() in (user, user.encode())
    async with deployed.connect("writer") as writer:
        steal = "return redis.call('GET', 'secret:of:another')"
        with pytest.raises(ResponseError, match=REFUSAL):
            await writer.eval(steal, 0)
    async with deployed.connect("notebook") as notebook:
        for command in ("EVAL", "EVALSHA", "EVAL_RO"):
            with pytest.raises(NoPermissionError):
                await notebook.execute_command(command, "return redis.call('SET', KEYS[1], 1)", 1, "liq:A")
    async with deployed.connect("operator") as operator:
        assert await operator.get("secret:of:another") == b"x"
        assert await operator.config_set("hz", 100)
        assert await operator.dbsize() == 1


async def test_the_notebook_gets_nothing_of_the_dangerous_kinds(deployed: Deployed) -> None:
    async with deployed.connect("operator") as operator:
        categories = ("write", "admin", "dangerous", "scripting", "pubsub", "keyspace", "blocking")
        arity = {str_if_bytes(name): row["arity"] for name, row in (await operator.command()).items()}
        allowed = set()
        for category in categories:
            for name in map(str_if_bytes, await operator.acl_cat(category)):
                words = name.split("|")
                count = abs(arity.get(words[0], 1)) - len(words)
                for more in range(max(count, 0), count + 3):  # a container's arity is not that of its subcommands
                    try:
                        reply = await operator.execute_command("ACL DRYRUN", "notebook", *words, *["liq:A"] * more)
                    except ResponseError as error:
                        reply = str(error)
                    if not re.search("no permissions to run|wrong number", str_if_bytes(reply)):
                        allowed.add(name)
    assert {name.split("|")[0] for name in allowed} <= {
        *("info", "dbsize", "type", "exists", "ttl", "pttl", "expiretime", "pexpiretime", "object", "memory", "xread"),
    }


async def test_nobody_is_told_of_foreign_keys_by_invalidations(deployed: Deployed) -> None:
    # HELLO and CLIENT in one connection, raw: what redis-py would hide.
    reader, writer = await asyncio.open_connection("127.0.0.1", deployed.port)
    password = PASSWORDS["notebook"]
    hello = ["HELLO", "3", "AUTH", "notebook", password]
    for words in (hello, ["CLIENT", "TRACKING", "ON", "BCAST"], ["PING"]):
        writer.write(f"*{len(words)}\r\n".encode() + b"".join(b"$%d\r\n%b\r\n" % (len(w), w.encode()) for w in words))
    assert await asyncio.wait_for(reader.readuntil(b"+PONG\r\n"), 60)
    async with deployed.connect("operator") as operator:
        await operator.set("secret:of:another", "y")
    writer.write(b"PING\r\n")
    assert await asyncio.wait_for(reader.readuntil(b"+PONG\r\n"), 60) == b"+PONG\r\n"
    writer.close()
    await writer.wait_closed()


# A live server


@pytest.fixture
def stock(kind: str, server_binaries: dict[str, Path]) -> Iterator[Server]:
    """A server with the defaults of its makers."""
    server = Server(server_binaries[kind], server_module._private_folder(None), STOCK)
    server._wait_until_ready()
    yield server
    server.stop()


async def test_apply_sets_what_can_be_set(stock: Server, kind: str) -> None:
    settings = load()
    async with stock.connect() as redis:
        before = await redis.config_get("*")
        would = await config.apply(redis, settings, dry_run=True)
        assert await redis.config_get("*") == before
        first = await config.apply(redis, settings)
        after = await redis.config_get("*")
        second = await config.apply(redis, settings)

    assert would.index.tolist() == [item.name for item in config.directives(settings)]
    assert would.columns.tolist() == ["wanted", "before", "state", "why"]
    assert set(would["state"]) == {"would apply", "already so", "file only"}
    assert first.index[first["state"] == "file only"].tolist() == ["databases"]
    assert first.loc["databases", ["wanted", "before"]].tolist() == ["2", "16"]
    assert "restart" in first.loc["databases", "why"]
    assert first.loc["tcp-backlog", "state"] == "already so"
    assert first.loc["maxmemory", ["wanted", "before", "state"]].tolist() == [str(240 << 20), "0", "applied"]
    refused = first.index[first["state"] == "refused"].tolist()
    if kind == "bundled":  # Redis's own jemalloc
        assert refused == []
        assert after["activedefrag"] == "yes"
    else:
        assert refused in (["activedefrag"], [])
        assert refused == [] or "Active defragmentation cannot be enabled" in first.loc["activedefrag", "why"]
    for name in first.index[first["state"] == "applied"].drop("client-output-buffer-limit"):
        assert after[name] == first.loc[name, "wanted"] != before[name]
    assert "pubsub 4194304 1048576 60" in after["client-output-buffer-limit"]
    # The other classes are as they were.
    assert after["client-output-buffer-limit"].split()[:8] == before["client-output-buffer-limit"].split()[:8]
    assert set(second["state"]) <= {"already so", "file only", "refused"}
    assert second.index[second["state"] == "refused"].tolist() == refused


async def test_a_private_server_has_them_all(redis: Redis) -> None:
    table = await config.apply(redis, load(), dry_run=True)
    assert table.index[table["state"] != "already so"].tolist() == ["activedefrag"]


async def test_maxmemory_is_not_lowered_below_what_is_in_use(stock: Server) -> None:
    settings = load(server={"maxmemory": "4mb"})
    async with stock.connect() as redis:
        # Not in one command: maxmemory-clients would let go of a client with such a buffer.
        for number in range(60):
            await redis.setrange("temp:x", number * 100_000, bytes(100_000))
        await redis.expire("temp:x", 1_000)
        for dry_run in (True, False):
            table = await config.apply(redis, settings, dry_run=dry_run)
            assert table.loc["maxmemory", "state"] == "refused"
            assert re.search(r"\d{7} bytes are in use .*evict", table.loc["maxmemory", "why"])
        assert await redis.exists("temp:x")
        assert (await redis.config_get("maxmemory"))["maxmemory"] == "0"
        assert table.loc["maxmemory-samples", "state"] == "applied"  # what comes after it
        await redis.delete("temp:x")
        table = await config.apply(redis, settings)
        assert table.loc["maxmemory", "state"] == "applied"


async def test_a_user_without_the_right_is_told_row_by_row(deployed: Deployed) -> None:
    async with deployed.connect("notebook") as notebook:
        table = await config.apply(notebook, load())
    assert set(table["state"]) == {"refused"}
    assert table["before"].isna().all()
    assert table["why"].str.contains("config|get", regex=False).all()
    async with deployed.connect("writer") as writer:
        table = await config.apply(writer, load(server={"stream_node_max_entries": 150}))
    assert table.loc["stream-node-max-entries", "state"] == "refused"
    assert "config|set" in table.loc["stream-node-max-entries", "why"]
    assert table.loc["stream-node-max-bytes", "state"] == "already so"


@pytest.mark.parametrize(
    ("name", "wanted", "before", "same"),
    [
        ("maxmemory", "240mb", "251658240", True),
        ("maxmemory", "240m", "251658240", False),
        ("maxmemory", "251658240", "240MB", True),
        ("save", "", "", True),
        ("save", "", "3600 1 300 100", False),
        ("appendonly", "no", "NO", True),
        ("maxmemory-clients", "5%", "5%", True),
        (
            "client-output-buffer-limit",
            "pubsub 32mb 8mb 60",
            "normal 0 0 0 slave 1 1 1 pubsub 33554432 8388608 60",
            True,
        ),
        ("client-output-buffer-limit", "pubsub 0 0 0", "normal 0 0 0 slave 1 1 1 pubsub 33554432 8388608 60", False),
    ],
)
def test_values_are_compared_as_the_server_spells_them(name: str, wanted: str, before: str, same: bool) -> None:
    assert config._same(config.Directive(name, wanted, "runtime", ""), before) is same


# What the directives are for


async def test_a_subscriber_that_does_not_read_is_let_go(server: Server) -> None:
    async with server.connect() as redis:
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.connect(str(server.socket))
            deaf.sendall(b"SUBSCRIBE temp:c\r\n")
            assert deaf.recv(16)
            sent, piece = 0, bytes(8 << 10)  # of larger ones Valkey 9.1 keeps one copy, and counts it nowhere
            while await redis.publish("temp:c", piece):
                sent += len(piece)
                assert sent < 32 << 20, "the default"
        assert sent >= 4 << 20


async def test_defragmentation_starts_at_this_size(stock: Server) -> None:
    settings = load(server={"maxmemory": "48mb"})  # from 2 MB of fragmentation on
    async with stock.connect() as redis:
        state = (await config.apply(redis, settings)).loc["activedefrag"]
        if state["state"] == "refused":
            pytest.skip(f"{stock.binary.name}: {state['why']}")
        for start in range(0, 60_000, 5_000):
            await redis.mset({f"temp:{number}": bytes(400) for number in range(start, start + 5_000)})
        for start in range(0, 60_000, 5_000):
            await redis.unlink(*[f"temp:{number}" for number in range(start, start + 5_000) if number % 8])
        deadline = time.monotonic() + 20
        while not (await redis.info("stats"))["active_defrag_hits"]:
            assert time.monotonic() < deadline, await redis.info("memory")
            await asyncio.sleep(0.02)


# The page


def test_the_page_has_the_directives() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    for item in config.directives(load()):
        value = f"`{item.value}`" if item.value else "empty"
        assert f"| `{item.name}` | {value} | {item.where} | {item.why} |\n" in page
    assert len(re.findall(r"\| (?:runtime|file only|runtime only) \|", page)) == len(config.directives(load()))
