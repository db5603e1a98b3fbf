import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from redis.asyncio import Redis

from liqlab import serve, settings, synth
from liqlab.archive import count
from liqlab.server import Server
from liqlab.writer import Writer
from tests.test_cli import ROOT, liqlab


@pytest.fixture
def url(default_server: Server, default_redis: Redis) -> dict[str, str]:
    return {"LIQLAB_REDIS_URL": default_server.url}


async def test_cleanup_says_and_then_does(url: dict[str, str], default_redis: Redis) -> None:
    await default_redis.hset("vwap:X", mapping={"count": 1, "last_update": 1})
    await default_redis.set("alert:X:buy", 1)
    said = json.loads(liqlab("cleanup", "--dry-run", "--json", **url).stdout)
    assert {(one["what"], one["family"]) for one in said} == {
        ("drop", "vwap"),
        ("expire", "cooldown"),
        ("expire", "all"),
    }
    assert await default_redis.ttl("alert:X:buy") == -1
    done = liqlab("cleanup", **url)
    assert done.returncode == 0, done.stderr
    assert "drop vwap: 1 keys" in done.stdout
    assert await default_redis.exists("vwap:X") == 0
    assert 0 < await default_redis.ttl("alert:X:buy") <= 600
    assert "nothing was to be done" in liqlab("cleanup", **url).stdout
    assert liqlab("cleanup", "--watch", "--dry-run", **url).returncode == 2


async def test_cleanup_watches_until_it_is_interrupted(url: dict[str, str], default_redis: Redis) -> None:
    await Writer(default_redis).write_table(synth("quiet", hours=1, seed=1))
    before = await count(default_redis)
    command = [sys.executable, "-c", "from liqlab.cli import main; main()", "cleanup", "--watch", "--json"]
    command += ["--set", "cleanup.trim_s=0.1", "--set", "thresholds.trim=0.001", "--set", "retention.hot_s=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **url}, cwd=ROOT) as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        assert (first["what"], first["tier"]) == ("tier", "trim")
        assert await default_redis.exists("liqc:lock") == 1
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 0
    assert await default_redis.exists("liqc:lock") == 0
    assert await count(default_redis) == before


async def test_monitor_reports_once(url: dict[str, str], default_redis: Redis) -> None:
    health = json.loads(liqlab("monitor", "--json", **url).stdout)
    assert health["used_memory"] > 0
    assert health["error"] is None
    assert "used_memory" in liqlab("monitor", **url).stdout
    full = ["--set", "monitor.warning=0.0001", "--set", "monitor.critical=0.0002"]
    alarmed = liqlab("monitor", *full, **url)
    assert alarmed.returncode == 2
    assert "CRITICAL memory" in alarmed.stderr


async def test_monitor_serves_prometheus(url: dict[str, str], default_redis: Redis) -> None:
    command = [sys.executable, "-c", "from liqlab.cli import main; main()", "monitor", "--watch", "--prometheus", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command += ["--json", "--set", "monitor.interval_s=0.1"]
    with subprocess.Popen(command, text=True, env={**os.environ, **url}, cwd=ROOT, **pipes) as watching:
        address = watching.stderr.readline().strip()
        watching.stdout.readline()  # a look has been taken
        watching.stdout.readline()
        with urllib.request.urlopen(address, timeout=10) as page:
            assert b"liqlab_redis_used_memory_bytes" in page.read()
        watching.send_signal(signal.SIGINT)
        watching.communicate(timeout=20)
        assert watching.returncode == 0


async def test_config_is_shown_written_and_applied(tmp_path: Path) -> None:
    assert "maxmemory-policy" in liqlab("config").stdout
    written = liqlab("config", "--out", str(tmp_path / "deploy"), "--set", "server.maxmemory=64mb")
    assert written.returncode == 0, written.stderr
    names = {path.name for path in (tmp_path / "deploy").iterdir()}
    assert {"redis.conf", "users.acl", "docker-compose.yml"} <= names
    assert "maxmemory 67108864" in (tmp_path / "deploy" / "redis.conf").read_text()
    with serve() as server:
        url = {"LIQLAB_REDIS_URL": server.url}
        async with server.connect() as redis:
            before = await redis.config_get()
            shown = json.loads(liqlab("config", "--apply", "--json", "--dry-run", **url).stdout)
            rows = {row["directive"]: row for row in shown}
            assert rows["maxmemory-policy"]["state"] == "already so"
            assert await redis.config_get() == before
            assert liqlab("config", "--apply", **url).returncode == 0


async def test_critical_keys_are_restored(url: dict[str, str], default_redis: Redis, tmp_path: Path) -> None:
    from liqlab.cleanup import Cleaner

    await default_redis.hset("position:X", "size", "2")
    await Cleaner(default_redis, settings=settings.load(cleanup={"folder": tmp_path})).daily()
    await default_redis.flushall()
    [path] = tmp_path.glob("critical-*.parquet")
    done = liqlab("restore", str(path), **url)
    assert "1 keys are back" in done.stdout
    assert await default_redis.hget("position:X", "size") == b"2"
    refused = liqlab("restore", str(ROOT / "README.md"), **url)
    assert (refused.returncode, "no backup" in refused.stderr) == (1, True)


async def test_migrate_guides_and_moves(url: dict[str, str], default_redis: Redis, tmp_path: Path) -> None:
    for n in range(30):
        member = {"symbol": "BTC", "side": "sell", "size": 1.5, "price": 100.0 + n, "timestamp": 1.7e9 + n}
        await default_redis.zadd("liquidations:BTC", {json.dumps({**member, "exchange": "binance"}): 1.7e9 + n})
    assert "to do" in liqlab("migrate", **url).stdout
    folder = ["migrate", "--backup", str(tmp_path / "legacy")]
    dry = liqlab(*folder, "--dry-run", **url)
    assert dry.returncode == 0, dry.stderr
    assert await count(default_redis) == 0
    done = json.loads(liqlab(*folder, "--json", **url).stdout)
    assert (done["ok"], done["symbols"][0]["migrated"]) == (True, 30)
    assert await count(default_redis) == 30
    assert await default_redis.zcard("liquidations:BTC") == 30
    assert liqlab(*folder, "--remove", **url).returncode == 0
    assert await default_redis.exists("liquidations:BTC") == 0
    assert "1 old keys are back" in liqlab(*folder, "--restore", **url).stdout
    assert await default_redis.zcard("liquidations:BTC") == 30
    assert liqlab("migrate", "--remove", **url).returncode == 2
