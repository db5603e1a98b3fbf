"""What a look finds is what the server says; each alert comes once; nothing that happens to either stops the watch."""

import asyncio
import json
import logging
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
from jupyter_client.manager import start_new_kernel
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError

from liqlab import clock, monitor, plots, sealing, settings
from liqlab.cleanup import Cleaner
from liqlab.cleanup.pressure import Action
from liqlab.monitor import Alarms, Alert, Exporter, Level, measure, memory_limit, serve_metrics, tell, watch
from liqlab.monitor import alerts as alerts_module
from liqlab.monitor import health as health_module
from liqlab.server import Server, connect
from liqlab.settings import SettingsError
from liqlab.writer import Writer
from tests.test_breaker import SMALL, bring_to
from tests.test_writer import T0, sample

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "08-monitor.ipynb"
PLAIN = settings.load()


# A look


@pytest.mark.parametrize(("layout", "shards"), [("shared", 1), ("per_symbol", 1), ("hybrid", 1), ("per_symbol", 3)])
async def test_a_look_finds_what_the_server_has(redis: Redis, layout: str, shards: int) -> None:
    chosen = settings.load(shards=shards, writer={"layout": layout, "hybrid_events": 300})
    await Writer(redis, settings=chosen).write_table(sample(3_000))
    await sealing.seal(redis, now_ms=T0 + clock.DAY_MS, settings=chosen, partial=True)
    blocks = sum([await redis.xlen(key) for key in await redis.keys("liqb*")])
    await Writer(redis, settings=chosen).write_table(sample(2_000))
    await redis.set("liq:foreign", "no stream")
    health = await measure(redis, settings=chosen)

    lengths = {key.decode(): await redis.xlen(key) for key in await redis.keys("liq:*") if key != b"liq:foreign"}
    if layout == "shared":
        lengths = {"liq": await redis.xlen("liq")}
    elif layout == "hybrid":
        lengths["liq"] = await redis.xlen("liq")
    assert (health.events, health.streams) == (2_000, len(lengths))
    assert health.blocks == blocks > 0
    assert sum(lengths.values()) == 2_000
    assert dict(health.longest).items() <= lengths.items()
    counts = [count for _, count in health.longest]
    assert counts == sorted(lengths.values(), reverse=True)[: health_module.LONGEST]
    info = await redis.info("memory")
    assert health.error is None
    assert health.keys == await redis.dbsize()
    assert health.maxmemory == info["maxmemory"]
    assert health.used_memory == pytest.approx(info["used_memory"], rel=0.2)
    assert health.used_ratio == health.used_memory / health.maxmemory
    assert health.rss is not None
    assert health.rss > 1 << 20
    assert health.clients is not None
    assert health.clients >= 1


async def test_a_look_asks_for_what_it_needs_and_for_nothing_else(fresh_server: Callable[..., Server]) -> None:
    async with fresh_server().connect() as redis:
        await Writer(redis, settings=PLAIN).write_table(sample(100))
        await redis.config_set("slowlog-log-slower-than", 0)
        await redis.config_set("slowlog-max-len", 1_000)
        await redis.slowlog_reset()
        before = await measure(redis)
        commands = [entry["command"].decode() for entry in await redis.slowlog_get(1_000)]
        after = await measure(redis)
    infos = [command for command in commands if command.startswith("INFO")]
    assert infos == ["INFO server clients memory stats keyspace"]
    assert {command.split()[0] for command in commands} <= {"INFO", "SCAN", "XLEN", "SLOWLOG", "CLIENT", "HELLO"}
    assert after.misses == before.misses  # looking must not lower the rate that it shows


async def test_the_hit_rate_is_undefined_before_the_first_look_up(fresh_server: Callable[..., Server]) -> None:
    async with fresh_server().connect() as redis:
        assert (await measure(redis)).hit_ratio is None
        await redis.set("temp:there", 1)
        for key in ("temp:there", "temp:there", "temp:there", "temp:not"):
            await redis.get(key)
        health = await measure(redis)
    assert (health.hits, health.misses, health.hit_ratio) == (3, 1, 0.75)


async def test_without_a_limit_there_is_no_ratio_and_no_alert(fresh_server: Callable[..., Server]) -> None:
    async with fresh_server(maxmemory=0).connect() as redis:
        health = await measure(redis)
    assert (health.maxmemory, health.used_ratio) == (0, None)
    assert Alarms(PLAIN).check(health) == []


async def test_what_cannot_be_asked_is_unknown(fresh_server: Callable[..., Server]) -> None:
    server = fresh_server()
    async with server.connect() as redis:
        await redis.acl_setuser("half", enabled=True, nopass=True, commands=["+info", "+hello", "+client"])
        await redis.acl_setuser("blind", enabled=True, nopass=True, commands=["+hello", "+client"])
        async with connect(server.url, username="half", password="x") as half:
            health = await measure(half)
            assert (health.error, health.events, health.longest) == (None, None, ())
            assert health.used_memory is not None
        async with connect(server.url, username="blind", password="x") as blind:
            health = await measure(blind)
            assert health.error is not None
            assert health.error.startswith("NoPermissionError: ")


async def test_the_writer_and_the_cleanup_are_looked_at(default_redis: Redis, tmp_path: Path) -> None:
    bare = await measure(default_redis)
    assert (bare.breaker, bare.waiting, bare.journal_ratio, bare.cleanup_actions) == (None, None, None, None)
    chosen = settings.load(journal={"path": tmp_path / "journal.db", "max_bytes": "1mb"})
    writer = Writer(default_redis, settings=chosen)
    assert writer.breaker is not None
    first = await measure(default_redis, writer=writer)
    assert (first.breaker, first.breaker_s, first.journal_events, first.journal_ratio) == ("closed", None, 0, 0)
    writer.breaker.failed(OutOfMemoryError())  # it rests for a second
    await writer.breaker.check(default_redis)
    await writer.write_table(sample(1_000))
    cleaner = Cleaner(default_redis)
    cleaner.actions += [
        Action(1, "TRIM", "trim", "events", 2, 500, 9_000, 4_000, ""),
        Action(2, "TRIM", "trim", "events", 1, 100, 4_000, 3_500, ""),
        Action(3, "EMERGENCY", "drop", "temporary", 7, 0, 3_500, 3_000, ""),
    ]
    health = await measure(default_redis, writer=writer, cleanup=cleaner)
    assert (health.breaker, health.journal_events) == ("open", 1_000)
    assert health.breaker_s is not None
    assert 0 <= health.breaker_s < 60
    assert writer.journal is not None
    assert health.journal_bytes == writer.journal.bytes > 0
    assert health.journal_ratio == writer.journal.bytes / (1 << 20)
    assert (health.cleanup_actions, health.cleanup_keys, health.cleanup_events) == (3, 10, 600)
    assert (health.cleanup_freed, health.cleanup_kinds) == (6_000, {"trim": 2, "drop": 1})
    writer.close()


async def test_a_look_can_be_read_and_saved(default_redis: Redis) -> None:
    await default_redis.set("temp:there", 1)
    health = await measure(default_redis, settings=settings.load(cleanup={"rss_bytes": "1gb"}))
    table = health.table()
    assert list(table.columns) == ["group", "value", "reading", "meaning"]
    assert table.loc["used_memory", "value"] == health.used_memory
    assert table.loc["rss_limit", "reading"] == "1.00 GiB"
    assert re.fullmatch(r"\d+\.\d %", str(table.loc["used_ratio", "reading"]))
    assert "breaker" not in table.index
    assert json.loads(json.dumps(health.as_dict()))["keys"] == 1
    gone = monitor.Health(at_ms=0, error="<b>")
    assert gone.table().empty
    assert "<p>&lt;b&gt;</p>" in gone._repr_html_()


def test_the_memory_limit_is_the_least_that_holds(tmp_path: Path) -> None:
    info = {"total_system_memory": 1_000, "process_id": 7}

    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert memory_limit({}, tmp_path) is None
    assert memory_limit(info, tmp_path) == 1_000  # on another machine
    put("proc/7/comm", "redis-server\n")
    put("proc/7/cgroup", "0::/system.slice/redis.service\n")
    assert memory_limit(info, tmp_path) == 1_000
    put("sys/fs/cgroup/system.slice/redis.service/memory.max", "max\n")
    assert memory_limit(info, tmp_path) == 1_000
    put("sys/fs/cgroup/system.slice/memory.max", "700\n")
    assert memory_limit(info, tmp_path) == 700
    put("sys/fs/cgroup/system.slice/redis.service/memory.max", "600\n")
    assert memory_limit(info, tmp_path) == 600
    put("proc/7/comm", "bash\n")  # the number is another process here
    assert memory_limit(info, tmp_path) == 1_000
    put("proc/7/comm", "valkey-server\n")
    put("proc/7/cgroup", "4:memory:/vps\n1:cpu:/slow\n")
    put("sys/fs/cgroup/memory/vps/memory.limit_in_bytes", "500\n")
    put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    put("sys/fs/cgroup/slow/memory.max", "1\n")
    assert memory_limit(info, tmp_path) == 500


# Prometheus


def families(text: str) -> dict[str, tuple[str, dict[str, float]]]:
    """The metrics of a text by sample name: the type, and values by labels."""
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert re.fullmatch(r"liqlab_[a-z_]+", family.name)
        for sample_ in family.samples:
            labels = ",".join(sample_.labels.values())
            found.setdefault(sample_.name, (family.type, {}))[1][labels] = sample_.value
    return found


async def test_the_text_is_what_prometheus_reads(default_redis: Redis, tmp_path: Path) -> None:
    exporter = Exporter()
    assert exporter.text() == ""
    writer = Writer(default_redis, settings=settings.load(journal={"path": tmp_path / "journal.db"}))
    await writer.write_table(sample(100))
    cleaner = Cleaner(default_redis)
    cleaner.actions.append(Action(1, "TRIM", "trim", "events", 2, 500, 9_000, 4_000, ""))
    health = await measure(default_redis, writer=writer, cleanup=cleaner)
    writer.close()
    exporter.update(health)
    text = exporter.text()
    found = families(text)
    assert text.count("# HELP ") == text.count("# TYPE ") == len(found)
    assert {kind for kind, _ in found.values()} == {"gauge", "counter"}
    assert {name for name, (kind, _) in found.items() if kind == "counter"} == {
        f"liqlab_redis_{name}_total" for name in ("evicted_keys", "keyspace_hits", "keyspace_misses", "expired_keys")
    }
    assert found["liqlab_redis_used_memory_bytes"] == ("gauge", {"": health.used_memory})
    assert found["liqlab_redis_keyspace_hits_total"] == ("counter", {"": health.hits})
    assert found["liqlab_event_stream_entries"] == ("gauge", {"": 100})
    assert found["liqlab_breaker_state"] == ("gauge", {"closed": 1, "half-open": 0, "open": 0})
    assert found["liqlab_cleanup_actions_by_kind"] == ("gauge", {"trim": 1})
    assert found["liqlab_redis_up"] == ("gauge", {"": 1})
    assert found["liqlab_look_timestamp_seconds"] == ("gauge", {"": health.at_ms / 1000})
    declared = {each for each in health.as_dict() if each not in ("at_ms", "error", "longest", "down", "cleanup_kinds")}
    unknown = {name for name in declared if getattr(health, name) is None}
    assert len(found) == len(declared - unknown) + 3  # every figure that is known, up, the time, the kinds


async def test_a_server_that_is_away_shows_no_stale_figures(fresh_server: Callable[..., Server]) -> None:
    exporter = Exporter()
    server = fresh_server()
    async with server.connect() as redis:
        exporter.update(await measure(redis))
        assert "liqlab_redis_keys" in families(exporter.text())
        server.kill()
        exporter.update(await measure(redis))
    found = families(exporter.text())
    assert found.keys() == {"liqlab_redis_up", "liqlab_look_timestamp_seconds"}
    assert found["liqlab_redis_up"][1] == {"": 0}


def fetch(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return str(answer.read().decode())


async def test_the_metrics_are_served_until_the_block_ends(default_redis: Redis) -> None:
    exporter = Exporter()
    with serve_metrics(exporter, 0) as port:
        exporter.update(await measure(default_redis))
        assert await asyncio.to_thread(fetch, port) == exporter.text()
        taken = rf"metrics cannot be served on 127\.0\.0\.1:{port}: .*in use; name another port"
        with pytest.raises(monitor.MonitorError, match=taken), serve_metrics(exporter, port):
            pass
    with pytest.raises(urllib.error.URLError):
        await asyncio.to_thread(fetch, port)
    with pytest.raises(monitor.MonitorError, match="70000"), serve_metrics(exporter, 70_000):
        pass


# Alerts


def brief(changes: list[Alert]) -> list[str]:
    return [f"{change.name} {change.was.name}->{change.level.name}" for change in changes]


async def test_memory_is_told_of_once_a_level_and_left_below_its_line(fresh_server: Callable[..., Server]) -> None:
    alarms, seen = Alarms(PLAIN), []
    async with fresh_server(settings=SMALL).connect() as redis:
        for target in (0.80, 0.86, 0.88, 0.84, 0.81, 0.86, 0.79, 0.86, 0.96, 0.92, 0.94, 0.89, 0.96, 0.70, 0.84):
            await bring_to(redis, target)
            changes = alarms.check(await measure(redis))
            seen.append((target, brief(changes)))
            assert alarms.check(await measure(redis)) == []
    assert [(target, *changes) for target, changes in seen if changes] == [
        (0.86, "memory OK->WARNING"),
        (0.79, "memory WARNING->OK"),
        (0.86, "memory OK->WARNING"),
        (0.96, "memory WARNING->CRITICAL"),
        (0.89, "memory CRITICAL->WARNING"),
        (0.96, "memory WARNING->CRITICAL"),
        (0.70, "memory CRITICAL->OK"),
    ]
    assert alarms.standing == {}


async def test_the_lines_and_the_margin_are_settings(fresh_server: Callable[..., Server]) -> None:
    chosen = settings.load(monitor={"warning": 0.5, "critical": 0.6}, thresholds={"exit_margin": 0.2})
    alarms, seen = Alarms(chosen), []
    async with fresh_server(settings=SMALL).connect() as redis:
        for target in (0.45, 0.55, 0.65, 0.45, 0.35):
            await bring_to(redis, target)
            seen += [(target, change) for change in brief(alarms.check(await measure(redis)))]
    assert seen == [
        (0.55, "memory OK->WARNING"),
        (0.65, "memory WARNING->CRITICAL"),
        (0.35, "memory CRITICAL->WARNING"),
    ]


async def test_resident_memory_is_told_of(default_redis: Redis) -> None:
    rss = (await measure(default_redis)).rss
    assert rss is not None
    alarms = Alarms(PLAIN)
    seen = []
    for share in (0.5, 0.9, 0.97, 0.5):
        chosen = settings.load(cleanup={"rss_bytes": int(rss / share)})
        changes = alarms.check(await measure(default_redis, settings=chosen))
        seen += brief(changes)
    assert seen == ["rss OK->WARNING", "rss WARNING->CRITICAL", "rss CRITICAL->OK"]


async def test_evictions_are_told_of_until_there_are_none(fresh_server: Callable[..., Server]) -> None:
    alarms, seen = Alarms(PLAIN), []

    async def overfill(redis: Redis) -> None:
        await redis.config_set("maxmemory", 6 << 20)
        for i in range(1_000):
            await redis.set(f"temp:{i}", bytes(8_000), ex=100)
        await redis.config_set("maxmemory", 60 << 20)  # else a client's buffer may push out one more

    async def look(redis: Redis) -> None:
        seen.append(brief(alarms.check(await measure(redis))))

    async with fresh_server().connect() as redis:
        await overfill(redis)
        assert (await redis.info("stats"))["evicted_keys"] > 0
        await look(redis)  # it was before our time
        for _ in range(2):
            await overfill(redis)
            await look(redis)
        for _ in range(alerts_module.CALM):
            await look(redis)
        await redis.config_resetstat()  # as a restart would do
        await look(redis)
        await overfill(redis)
        await look(redis)
    begun, ended = ["evictions OK->WARNING"], ["evictions WARNING->OK"]
    assert seen == [[], begun, [], [], [], ended, [], begun]


async def test_the_breaker_and_the_journal_are_told_of(fresh_server: Callable[..., Server], tmp_path: Path) -> None:
    chosen = settings.load(journal={"path": tmp_path / "journal.db", "max_bytes": "1mb"}, writer={"bulk_events": 500})
    alarms, told = Alarms(chosen), []
    server = fresh_server()
    async with server.connect() as redis:
        writer = Writer(redis, settings=chosen)

        async def look() -> None:
            told.extend(alarms.check(await measure(redis, settings=chosen, writer=writer)))

        await look()
        assert told == []
        server.kill()
        events = sample(40_000)
        await writer.write_table(events.head(5_000))
        await look()
        assert {alert.name for alert in told} == {"server", "breaker"}
        start = 5_000
        for line in (0.80, 0.95):
            assert writer.journal is not None
            while writer.journal.bytes < line * (1 << 20):
                await writer.write_table(events.iloc[start : start + 500])
                start += 500
            await look()
    assert brief(told) == [
        "server OK->CRITICAL",
        "breaker OK->CRITICAL",
        "journal OK->WARNING",
        "journal WARNING->CRITICAL",
    ]
    assert told[1].message == "it is open, 5,000 events wait in the journal"
    assert f"{start:,} wait" in told[-1].message
    writer.close()


def test_what_is_unknown_leaves_an_alert_as_it_was() -> None:
    alarms = Alarms(PLAIN)
    full = monitor.Health(at_ms=1, used_memory=90, maxmemory=100, used_ratio=0.9)
    assert brief(alarms.check(full)) == ["memory OK->WARNING"]
    assert brief(alarms.check(monitor.Health(at_ms=2, error="gone"))) == ["server OK->CRITICAL"]
    assert alarms.standing.keys() == {"memory", "server"}
    empty = monitor.Health(at_ms=3, used_memory=1, maxmemory=100, used_ratio=0.01)
    assert brief(alarms.check(empty)) == ["server CRITICAL->OK", "memory WARNING->OK"]


# Whom they are told

ALERT = Alert(1_700_000_000_000, "memory", Level.CRITICAL, Level.WARNING, "96.0% of maxmemory")


@asynccontextmanager
async def listening(
    answer: bytes = b"HTTP/1.1 204 No Content\r\n\r\n", **where: object
) -> AsyncIterator[SimpleNamespace]:
    """A web server that keeps what it is sent and says `answer`, or nothing at all when that is empty."""
    requests: list[tuple[str, object]] = []
    release = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"Content-Length: (\d+)", head)
        requests.append(
            (head.splitlines()[0], json.loads(await reader.readexactly(int(length[1]))) if length else None)
        )
        if answer:
            writer.write(answer)
            await writer.drain()
        else:
            await release.wait()
        writer.close()

    if "path" in where:
        server = await asyncio.start_unix_server(handle, **where)
    else:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = None if "path" in where else server.sockets[0].getsockname()[1]
        yield SimpleNamespace(requests=requests, port=port, url=f"http://127.0.0.1:{port}")
        release.set()


async def test_a_webhook_is_sent_the_alert(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as hook:
        await tell(ALERT, webhook=f"{hook.url}/alerts?token=t")
        await tell(ALERT, webhook=f"http://localhost:{hook.port}")
    expected = ALERT.as_dict()
    assert hook.requests == [("POST /alerts?token=t HTTP/1.1", expected), ("POST / HTTP/1.1", expected)]
    assert expected["level"] == "CRITICAL"
    assert expected["was"] == "WARNING"
    async with listening(path=str(tmp_path / "a hook.sock")) as hook:
        await tell(ALERT, webhook=f"unix://{tmp_path}/a%20hook.sock")
    assert hook.requests == [("POST / HTTP/1.1", expected)]
    assert [record.levelname for record in caplog.records] == ["CRITICAL"] * 3  # the alert itself, and no complaint


async def test_a_webhook_is_the_only_place_that_an_alert_goes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening() as elsewhere:
        monkeypatch.setenv("http_proxy", elsewhere.url)
        monkeypatch.setenv("HTTP_PROXY", elsewhere.url)
        moved = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {elsewhere.url}\r\n\r\n".encode()
        async with listening(moved) as hook:
            await tell(ALERT, webhook=hook.url)
        assert len(hook.requests) == 1
        assert elsewhere.requests == []


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"", "did not take"),
        (b"HTTP/1.1 500 Oops\r\n\r\n", "answered 500"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "answered 302"),
        (b"what?\r\n", "answered 0"),
        (b"HTTP/1.1 twohundred\r\n", "did not take"),
        (b"HTTP/1.1", "answered 0"),
        (b"x" * 100_000, "did not take"),
    ],
)
async def test_a_bad_webhook_is_logged_and_no_more(
    answer: bytes, complaint: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts_module, "WEBHOOK_S", 0.2)
    async with asyncio.timeout(5):
        async with listening(answer) as hook:
            await tell(ALERT, webhook=f"{hook.url}/secret-path")
    assert len(hook.requests) == 1
    assert caplog.records[-1].levelname == "WARNING"
    assert complaint in caplog.text
    assert "secret-path" not in caplog.text


async def test_a_webhook_that_is_not_there_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as hook:
        pass
    await tell(ALERT, webhook=hook.url)
    await tell(ALERT, webhook=f"unix://{tmp_path}/none.sock")
    complaints = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.rsplit(": ", 1)[1] for text in complaints] == ["ConnectionRefusedError", "FileNotFoundError"]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.net/hook",
        "http://10.0.0.1/",
        "http://127.0.0.1.example.net/",
        "http://127.0.0.1@example.net/",
        "http://user:hunter2@127.0.0.1/",
        "http://localhost.example.net/",
        "http://0.0.0.0:80/",
        "http://2130706433/",
        "http://[::2]/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1/a b",
        "https://127.0.0.1/",
        "file:///etc/passwd",
        "unix://relative.sock",
        "unix:",
        "127.0.0.1",
        "",
    ],
)
def test_a_webhook_elsewhere_is_refused(url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings.load(monitor={"webhook": url})
    assert str(refused.value).startswith("monitor.webhook: must be on this machine, as http://127.0.0.1:PORT/PATH")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9/x?token=t", "http://localhost", "http://[::1]:80/", "http://127.9.9.9/", "unix:///a/b"]
)
def test_a_webhook_on_this_machine_is_taken_and_not_shown(url: str) -> None:
    chosen = settings.load(monitor={"webhook": url})
    assert chosen.monitor.webhook is not None
    assert chosen.monitor.webhook.get_secret_value() == url
    assert url not in repr(chosen)
    assert url not in chosen.model_dump_json()


def test_the_lines_are_in_order() -> None:
    with pytest.raises(SettingsError, match=r"monitor: warning 0\.99 < critical 0\.95 must hold"):
        settings.load(monitor={"warning": 0.99})


async def test_callbacks_are_called_and_what_they_raise_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Alert] = []

    async def later(alert: Alert) -> None:
        await asyncio.sleep(0)
        told.append(alert)

    async def later_wrong(alert: Alert) -> None:
        raise KeyError(alert.name)

    def wrong(alert: Alert) -> None:
        raise ValueError(alert.name)

    caplog.set_level(logging.INFO, "liqlab.monitor")
    for callback in (told.append, later, wrong, later_wrong):
        await tell(ALERT, on_alert=callback)
    assert told == [ALERT, ALERT]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ValueError, KeyError]
    await tell(Alert(0, "memory", Level.OK, Level.WARNING, "70.0% of maxmemory"))
    assert caplog.records[-1].levelname == "INFO"
    assert caplog.messages[-1] == "OK memory: 70.0% of maxmemory"


# The watch


async def test_a_server_that_goes_away_and_comes_back_is_watched_on(
    fresh_server: Callable[..., Server], tmp_path: Path
) -> None:
    first, link, told, found = fresh_server(), tmp_path / "redis.sock", [], []
    link.symlink_to(first.socket)
    async with connect(f"unix://{link}") as redis, asyncio.timeout(20):
        async for health in watch(redis, 0.02, settings=PLAIN, on_alert=told.append):
            found.append(health.error is None)
            if len(found) == 3:
                first.kill()
            elif len(found) == 6:
                link.unlink()
                link.symlink_to(fresh_server().socket)
            elif len(found) == 10:
                break
    assert found[:3] == [True, True, True]
    assert found[3:6] == [False, False, False]
    assert found[-1]
    assert brief(told) == ["server OK->CRITICAL", "server CRITICAL->OK"]


async def test_a_frozen_server_is_noticed_sooner_than_its_client_would(
    fresh_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "_PATIENCE_S", 0.3)
    server = fresh_server()
    async with server.connect() as redis, asyncio.timeout(10):
        assert (await measure(redis)).error is None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            assert (await measure(redis)).error == "TimeoutError"
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert (await measure(redis)).error is None


async def test_looks_keep_their_pace_and_end_when_cancelled(default_redis: Redis) -> None:
    times: list[float] = []

    async def look() -> None:
        async for _ in watch(default_redis, 0.1, settings=PLAIN):
            times.append(clock.elapsed_s())
            await asyncio.sleep(0.05)  # work of one's own does not come on top

    task = asyncio.create_task(look())
    while len(times) < 6:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert times[5] - times[0] > 0.49
    assert pd.Series(times).diff().median() < 0.15


async def test_a_watch_ends_at_whatever_moment_it_is_cancelled(default_redis: Redis) -> None:
    await Writer(default_redis, settings=PLAIN).write_table(sample(100))
    looks = 0

    async def look() -> None:
        nonlocal looks
        async for _ in watch(default_redis, 1e-6, settings=PLAIN):
            looks += 1

    rng = clock.generator(1)
    for trial in range(100):
        before, task = looks, asyncio.create_task(look())
        # Every other one has looked once, however slow the machine: it is cancelled while it looks again.
        while trial % 2 and looks == before and not task.done():
            await asyncio.sleep(0)
        await asyncio.sleep(rng.random() * 0.01)
        task.cancel()
        ended, _ = await asyncio.wait([task], timeout=60)
        assert ended
        assert task.cancelled()


async def test_a_webhook_that_hangs_does_not_end_the_watch(
    fresh_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts_module, "WEBHOOK_S", 0.1)
    alarms, looks = Alarms(PLAIN), 0
    async with listening(b"") as hook, fresh_server(settings=SMALL).connect() as redis, asyncio.timeout(10):
        chosen = settings.load(monitor={"webhook": hook.url, "interval_s": 0.01})
        await bring_to(redis, 0.9)
        async for _ in watch(redis, settings=chosen, alarms=alarms):
            looks += 1
            if looks == 3:
                break
    assert alarms.standing.keys() == {"memory"}
    assert [body["level"] for _, body in hook.requests] == ["WARNING"]


# The notebook


@contextmanager
def kernel() -> Iterator[tuple[object, object]]:
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(NOTEBOOK.parent))
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_the_notebook_can_be_stopped_and_keeps_its_picture() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    pictures, errors = 0, []
    with kernel() as (manager, client):
        for cell in cells:
            watching = "monitor.watch" in cell.source
            source = cell.source
            if "parameters" in cell.metadata.get("tags", []):
                source += "\nseconds, every_s = 0, 0.05\n"
            message = client.execute(source)
            while True:
                answer = client.get_iopub_msg(timeout=30)
                if answer["parent_header"].get("msg_id") != message:
                    continue
                kind, content = answer["msg_type"], answer["content"]
                if kind == "error":
                    errors.append((cell.source[:60], content["evalue"]))
                elif watching and kind == "display_data":
                    pictures += 1
                    assert "application/vnd.plotly.v1+json" in content["data"]
                    if pictures == 3:
                        manager.interrupt_kernel()
                elif kind == "status" and content["execution_state"] == "idle":
                    break
            assert client.get_shell_msg(timeout=30)["content"]["status"] == "ok", (cell.source, errors)
    assert errors == []
    assert pictures >= 3


async def test_looks_are_drawn_with_what_is_wrong_above(default_redis: Redis) -> None:
    chosen = settings.load(monitor={"warning": 0.000001, "critical": 0.000002})
    alarms, seen = monitor.Alarms(chosen), []
    for _ in range(3):
        seen.append(await monitor.measure(default_redis, settings=chosen))
        alarms.check(seen[-1])
    figure = plots.health_timeline(seen, alarms, chosen)
    assert "CRITICAL memory" in figure.layout.title.text
    assert [trace.name for trace in figure.data] == ["used memory", "commands", "hot in Redis"]  # there is no journal
    assert figure.data[0].y[-1] == pytest.approx(100 * seen[-1].used_ratio)
    assert figure.data[0].x[-1] == 0
    assert "OK" in plots.health_timeline(seen, monitor.Alarms(settings.load()), settings.load()).layout.title.text
