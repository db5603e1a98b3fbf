"""liqlab on a real Redis Cluster: three primaries with a replica each, of the server that `serve` prefers."""

import asyncio
import importlib
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pandas as pd
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

import liqlab
from liqlab import archive, budget, candles, clock, config, localcluster, monitor, quantiles, sealing
from liqlab.cleanup import Cleaner, backup, schedule
from liqlab.cluster import Cluster, Node, as_cluster, infos
from liqlab.detector import Detector, signals
from liqlab.fidelity import replay
from liqlab.link import Counts, Link
from liqlab.localcluster import LocalCluster
from liqlab.migrate import MigrateError, reshard
from liqlab.monitor import Alarms, Level
from liqlab.percentiles import METHODS
from liqlab.schema import BY_NAME, NodeSettings, by_shard, shard_of, shard_of_key, shards_of
from liqlab.server import ServerError, capabilities, connect
from liqlab.settings import Settings, SettingsError, load
from tests.test_cli import liqlab as command

SHARDS = 8
START_MS = 1_700_000_000_000
DATA = Path(__file__).parent.parent / "data" / "normal-6h.jsonl.gz"
module = importlib.import_module("liqlab.migrate.reshard")  # the function has its name
pytestmark = pytest.mark.timeout(60)


def started(**options: object) -> LocalCluster:
    try:
        return localcluster.serve(node_timeout_ms=1_000, **options)  # type: ignore[arg-type]
    except ServerError as error:
        if "no Redis server was found" not in str(error):
            raise
        pytest.skip("no server binary is found to make a cluster of")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A cluster that no test takes a node from."""
    with started() as made:
        yield made


@pytest.fixture
def frail() -> Iterator[LocalCluster]:
    """A cluster of one's own, to break."""
    with started() as made:
        yield made


@pytest.fixture
def settings() -> Settings:
    return load(shards=SHARDS)


@pytest.fixture
async def redis(cluster: LocalCluster, settings: Settings) -> AsyncIterator[Redis]:
    async with cluster.connect(settings=settings) as client:
        await client.flushall()
        yield client


@pytest.fixture(scope="module")
def events() -> pd.DataFrame:
    return liqlab.read_feed(DATA).events.iloc[:6_000]


def of(client: Redis) -> Cluster:
    found = as_cluster(client)
    assert found is not None
    return found


def same(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose order and categories do not matter."""
    text = {name: str for name in ("exchange", "symbol", "side") if name in table}
    return table.astype(text).sort_values(sorted(table.columns)).reset_index(drop=True)


def event(n: int, symbol: str | None = None) -> liqlab.Event:
    return liqlab.Event(START_MS + n, "binance", symbol or f"S{n % 40}", "sell", 100.0 + n % 7, 1.0, 100.0 + n % 7)


async def until(true: object, within_s: float = 60.0) -> None:
    deadline = clock.elapsed_s() + within_s
    while not await true():  # type: ignore[operator]
        assert clock.elapsed_s() < deadline
        await asyncio.sleep(0.05)


async def replica_of(client: Redis, shard: int) -> tuple[Node, Node]:
    """The primary that has a shard, and its replica."""
    nodes = {node.name: node for node in await of(client).topology()}
    primary = next(node for node in nodes.values() if shard in node.settings(load(shards=SHARDS)).here)
    slaves = await primary.redis.info("replication")
    return primary, nodes[f"{slaves['slave0']['ip']}:{slaves['slave0']['port']}"]


# The client


def test_keys_without_a_tag_are_refused_with_the_cure(settings: Settings) -> None:
    with pytest.raises(SettingsError, match=r"shards = 1: .*LIQLAB_SHARDS=16"):
        connect("redis+cluster://127.0.0.1:7000", settings=load())
    client = connect("redis+cluster://127.0.0.1:7000", settings=settings)
    with pytest.raises(SettingsError, match="shards = 1"):
        liqlab.Writer(client, settings=load())
    with pytest.raises(SettingsError, match=r"writer\.strategy = 'single'"):
        liqlab.Writer(client, settings=load(shards=SHARDS, writer={"strategy": "single"}))
    with pytest.raises(ServerError, match="cannot be used"):
        connect("redis+clutser://127.0.0.1:7000", settings=settings)


async def test_nobody_there_is_a_lost_connection_after_the_patience() -> None:
    impatient = load(shards=SHARDS, cluster={"failover_s": 0.3})
    began = clock.elapsed_s()
    async with asyncio.timeout(10):
        client = connect("redis+cluster://127.0.0.1:1", settings=impatient)
        with pytest.raises(RedisConnectionError, match="cannot be connected"):
            await client.get("a")
    assert clock.elapsed_s() - began >= 0.3


async def test_a_server_that_is_no_cluster_says_so_at_once(settings: Settings) -> None:
    [port] = localcluster.free_ports(1)
    with liqlab.serve(more={"port": str(port), "bind": "127.0.0.1"}):
        client = connect(f"redis+cluster://127.0.0.1:{port}", settings=settings)
        with pytest.raises(ResponseError, match="write redis:// for a single one"):
            await client.get("a")


async def test_the_url_needs_its_password_and_does_not_show_it(cluster: LocalCluster, settings: Settings) -> None:
    assert cluster.password not in repr(cluster)
    host = next(iter(cluster.nodes))
    client = connect(f"redis+cluster://{host}", settings=settings)
    began = clock.elapsed_s()
    with pytest.raises(RedisError, match=r"HELLO must be called|Authentication required"):
        await client.get("a")
    assert clock.elapsed_s() - began < 5


async def test_commands_find_their_nodes(redis: Redis) -> None:
    keys = [f"temp:{n}" for n in range(30)]
    for key in keys:
        await redis.set(key, 1)
    assert await redis.exists(*keys, "temp:none") == 30
    assert await redis.dbsize() == 30
    assert sorted([key async for key in redis.scan_iter(match="temp:*", count=7)]) == sorted(
        key.encode() for key in keys
    )
    await redis.xadd("{1}s", {"a": 1}, id="5-1")
    pipe = redis.pipeline(transaction=False)
    pipe.execute_command(b"XRANGE", "{1}s", "-", "+")
    pipe.get("temp:1")
    pipe.get("temp:none")
    assert len(pipe) == 3
    assert await pipe.execute() == [[[b"5-1", [b"a", b"1"]]], b"1", None]
    pipe.hget("temp:1", "field")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await pipe.execute()
    for node in await of(redis).nodes():
        here = [key async for key in node.redis.scan_iter(match="temp:*")]
        assert 0 < len(here) < 30
        assert await node.redis.exists(*here) == len(here)
        assert await node.redis.unlink(*here) == len(here)
    assert await redis.unlink(*keys) == 0


async def test_every_shard_has_one_node(redis: Redis, settings: Settings) -> None:
    nodes = await of(redis).nodes()
    assert len(nodes) == 3
    assert sorted(shard for node in nodes for shard in node.settings(settings).here) == list(range(SHARDS))
    for node in nodes:
        own = node.settings(settings)
        assert list(shards_of(own.model_copy(update={"shards": own.shards}))) == list(own.here)
        assert own.retention == settings.retention
        for shard in own.here:
            assert await of(redis).owner(shard) == node.name
    assert len(await of(redis).topology()) == 6
    assert (await capabilities(redis)).cluster
    assert len(await infos(redis, "memory")) == 3


def test_keys_are_grouped_by_shard() -> None:
    assert by_shard([b"vwap:{1}:A", b"vwap:{2}:B", b"vwap:{1}:C", b"liqc:{2}"]) == [
        [b"vwap:{1}:A", b"vwap:{1}:C"],
        [b"vwap:{2}:B", b"liqc:{2}"],
    ]
    assert by_shard([b"vwap:A", b"vwap:B"]) == [[b"vwap:A", b"vwap:B"]]
    assert [shard_of_key(key) for key in (b"liq:{12}", b"liq", b"liq:A:{1}", b"alert:{0}:A:buy")] == [12, None, None, 0]


def test_settings_of_a_node_keep_all_others(settings: Settings) -> None:
    own = NodeSettings.model_construct(**{**dict(settings), "here": (2, 5)})
    assert list(shards_of(own)) == [2, 5]
    assert {**dict(own), "here": None} == {**dict(settings), "here": None}


# Everything on it as on one node


async def stored(client: Redis, settings: Settings, events: pd.DataFrame) -> dict[str, pd.DataFrame]:
    detector = Detector(client, settings=settings)
    done = await liqlab.ingest(events, client, settings=settings, detector=detector)
    assert (done.events, done.held, done.evicted) == (len(events), len(events), 0)
    end_ms = int(events["ts_ms"].max())
    symbols = events["symbol"].value_counts().index[:5].astype(str).tolist()
    found = [one() for one in await quantiles.asked(client, symbols, end_ms=end_ms, settings=settings)]
    everything = await quantiles.distribution(client, end_ms=end_ms, settings=settings)
    return {
        "history": same(await liqlab.history(client, settings=settings)),
        "of one symbol": same(await liqlab.history(client, symbols[0], end_ms - 600_000, end_ms, settings=settings)),
        "alerts": done.alerts,
        "signals": await signals(client, settings=settings),
        "quantiles": pd.DataFrame([one.quantiles([0.5, 0.9, 0.99]) for one in (*found, everything)]),
        "candles": await candles.candles(client, symbols[0], settings=settings),
        "all candles": same(await candles.every(client, "1h")),
        "expired": pd.Series(done.expired, dtype="int64").drop("unique_symbols", errors="ignore").to_frame(),
    }


async def test_a_feed_is_the_same_on_a_cluster(
    redis: Redis, default_redis: Redis, settings: Settings, events: pd.DataFrame
) -> None:
    wanted = await stored(default_redis, load(), events)
    found = await stored(redis, settings, events)
    assert len(wanted["alerts"]) > 3
    for name, table in wanted.items():
        pd.testing.assert_frame_equal(found[name], table, obj=name)


async def test_a_replay_of_the_whole_system_is_that_of_one_server(redis: Redis, default_redis: Redis) -> None:
    """Writer, detector, sealing, cleanup's rounds, and expiry: between two bursts all that the first left goes."""
    chosen = load(
        shards=SHARDS,
        retention={"events_s": 3_600, "hot_s": 300, "vwap_s": 900, "cooldown_s": 120},
        writer={"block_bytes": "1kb", "layout": "hybrid", "hybrid_events": 100},
    )
    burst = liqlab.synth("normal", hours=0.5, seed=3, rate_per_min=200, symbols=40)
    later = burst.assign(ts_ms=burst["ts_ms"] + 3 * clock.HOUR_MS)
    feed = pd.concat([burst, later], ignore_index=True)
    one, there = [await replay(feed, client, settings=chosen) for client in (default_redis, redis)]
    for done in (one, there):
        assert done.lost == {"trimmed": 0, "expired": len(burst), "evicted": 0}
        assert done.ingested.held == len(later)
        assert min(done.ingested.expired[name] for name in ("events", "blocks", "vwap", "cooldown")) > 0
        assert done.table.loc[["events", "blocks"], "members"].min() > 0
    pd.testing.assert_frame_equal(same(await liqlab.history(redis, settings=chosen)), same(later))
    assert len(there.ingested.alerts) > 10
    pd.testing.assert_frame_equal(there.ingested.alerts, one.ingested.alerts)
    pd.testing.assert_frame_equal(there.errors, one.errors)
    pd.testing.assert_frame_equal(there.table[["keys", "members"]], one.table[["keys", "members"]])
    left_out = {"seconds": 0}  # of the wall
    assert there.ingested.as_dict() | left_out == one.ingested.as_dict() | left_out
    assert there.maxmemory == 3 * one.maxmemory
    assert there.timeline["keys"].tolist() == one.timeline["keys"].tolist()


@pytest.mark.parametrize("method", ["exact", "topk", "reservoir"])
async def test_each_method_finds_its_node(redis: Redis, settings: Settings, events: pd.DataFrame, method: str) -> None:
    some, end_ms = archive.Columns.of(events.iloc[:1_000]), int(events["ts_ms"].iloc[999])
    symbol = str(events["symbol"].iloc[:1_000].mode()[0])
    there, alone = METHODS[method](redis, settings=settings), METHODS["unlimited"](redis, settings=settings)
    for one in (there, alone):
        await one.add(some)
    if method == "exact":
        wanted = await alone.quantiles(symbol, [0.5, 0.9], end_ms=end_ms)
        assert (await there.quantiles(symbol, [0.5, 0.9], end_ms=end_ms) == wanted).all()
    assert (await there.distribution(symbol, end_ms=end_ms)).count > 0
    assert await there.memory(symbol) > 0


async def test_two_detectors_raise_an_alert_once(redis: Redis, settings: Settings, events: pd.DataFrame) -> None:
    first, second = (Detector(redis, settings=settings) for _ in range(2))
    await liqlab.Writer(redis, settings=settings).write_table(events)
    both = await first.look(events), await second.look(events)
    assert len(both[0]) > 0
    assert both[1] == []


async def test_sealing_and_budget_node_by_node(
    redis: Redis, default_redis: Redis, settings: Settings, events: pd.DataFrame
) -> None:
    for client in (redis, default_redis):
        await liqlab.Writer(client, settings=settings).write_table(events)
        before = same(await liqlab.history(client, settings=settings))
        now_ms = int(events["ts_ms"].max()) + 1000 * settings.retention.hot_s + 1
        assert (await sealing.seal(client, now_ms=now_ms, settings=settings, partial=True)).events == len(events)
        pd.testing.assert_frame_equal(same(await liqlab.history(client, settings=settings)), before)
    measured, one = (
        await budget.measure(redis, settings=settings),
        await budget.measure(default_redis, settings=settings),
    )
    assert len(measured.nodes) == 3
    assert measured.table["bytes"].sum() == measured.used_memory == sum(n.used_memory for n in measured.nodes.values())
    assert measured.maxmemory == 3 * settings.server.maxmemory
    for name, node in measured.nodes.items():
        assert node.table["bytes"].sum() == node.used_memory, name
        assert node.families.loc["blocks", "keys"] > 0
    pd.testing.assert_series_equal(
        measured.families["keys"].sort_index(), one.families["keys"].sort_index(), check_dtype=False
    )
    assert measured.families.loc["blocks", "bytes"] == pytest.approx(one.families.loc["blocks", "bytes"], rel=0.02)
    assert json.loads(json.dumps(measured.as_dict()))["nodes"].keys() == measured.nodes.keys()


async def test_a_share_that_one_node_exceeds_is_over(redis: Redis, settings: Settings) -> None:
    node = (await of(redis).nodes())[0]
    [shard, *_] = node.settings(settings).here
    await redis.set(f"temp:{{{shard}}}:large", bytes(3 << 20))
    shares = {"streams": 0.4, "vwap": 0.1, "percentile": 0.2, "statistics": 0.1, "misc": 0.01, "buffer": 0.19}
    measured = await budget.measure(redis, settings=load(shards=SHARDS, budget=shares))
    assert measured.over == [f"misc on {node.name}"]


async def test_cleanup_keeps_each_node_within_its_bytes(redis: Redis, events: pd.DataFrame, tmp_path: Path) -> None:
    shares = {"streams": 0.0001, "vwap": 0.1, "percentile": 0.2, "statistics": 0.1, "misc": 0.08, "buffer": 0.5199}
    small = load(shards=SHARDS, budget=shares, cleanup={"folder": tmp_path})
    await liqlab.Writer(redis, settings=small).write_table(events)
    await redis.set("alert:{1}:X:buy", 1)
    await redis.hset("vwap:{2}:X", mapping={"count": 1, "last_update": 1})
    await redis.hset("position:{3}:X", mapping={"size": 1})
    cleaner, now_ms = Cleaner(redis, settings=small), int(events["ts_ms"].max())
    done = await cleaner.trim(now_ms)
    names = {node.name for node in await of(redis).nodes()}
    assert {action.node for action in done} == cleaner.nodes.keys() == names
    left = len(await liqlab.history(redis, settings=small))
    assert 0 < left == len(events) - sum(action.events for action in done) < len(events)
    for node in (await budget.measure(redis, settings=small)).nodes.values():
        assert (
            node.families["bytes"].reindex(["events", "blocks", "names"]).sum() <= 1.1 * 0.0001 * node.maxmemory + 8_192
        )
    assert {(one.what, one.family) for one in await cleaner.check(now_ms)} >= {("expire", "cooldown")}
    assert cleaner.measured is not None
    assert cleaner.measured.nodes.keys() == names
    assert {(one.what, one.family) for one in await cleaner.compact(now_ms)} >= {("drop", "vwap")}
    daily = await cleaner.daily(now_ms)
    assert [one.family for one in daily].count("unique_symbols") == 3
    [file] = tmp_path.glob("critical-*.parquet")
    await redis.flushall()
    assert await backup.restore(redis, file) > 100
    assert await redis.hgetall("position:{3}:X") == {b"size": b"1"}
    assert await Cleaner(redis, settings=small, dry_run=True).trim(now_ms) == []


async def test_one_process_runs_the_schedule(redis: Redis, settings: Settings) -> None:
    seen: list[str] = []
    cleaner = Cleaner(redis, settings=settings)
    runs = [asyncio.create_task(schedule.run(redis, cleaner, on_wait=seen.append)) for _ in range(2)]
    marks = BY_NAME["limits"].key(shard=0)

    async def both() -> bool:
        return len(seen) == 1 and await redis.hexists(marks, "trim_ms")

    await until(both)
    for run in runs:
        run.cancel()
    await asyncio.gather(*runs, return_exceptions=True)


@pytest.mark.timeout(240)  # seven processes, beside others
def test_commands_take_the_url(cluster: LocalCluster, redis: Redis, events: pd.DataFrame, tmp_path: Path) -> None:
    url = {"LIQLAB_REDIS_URL": cluster.url, "LIQLAB_SHARDS": str(SHARDS)}
    feed = str(tmp_path / "feed.csv")
    liqlab.write_feed(events.iloc[:200], feed)
    played = json.loads(command("ingest", feed, "--redis", cluster.url, "--set", f"shards={SHARDS}", "--json").stdout)
    assert played["ingest"]["held"] == 200
    assert len(played["budget"]["nodes"]) == 3
    shown = command("budget", **url).stdout
    assert all(name in shown for name in played["budget"]["nodes"])
    health = json.loads(command("monitor", "--json", **url).stdout)
    assert (health["error"], health["nodes"], health["down"]) == (None, 6, [])
    done = command("cleanup", "--dry-run", **url)
    assert done.returncode == 0, done.stderr
    done = command("doctor", **url)
    assert "a cluster of 6 nodes, 3 primaries" in done.stdout.replace("\n", " ")
    refused = command("cleanup", LIQLAB_REDIS_URL=cluster.url)
    assert refused.returncode != 0
    assert "LIQLAB_SHARDS=16" in refused.stderr
    assert "Traceback" not in refused.stderr
    moved = json.loads(command("reshard", str(tmp_path / "move"), "--to", "12", "--json", **url).stdout)
    assert (moved["phase"], moved["before"], moved["shards"], moved["events"]) == ("done", SHARDS, 12, 200)


async def test_the_deployed_users_may_do_their_work(
    cluster: LocalCluster, redis: Redis, settings: Settings, events: pd.DataFrame
) -> None:
    rules = dict(line.split(" ", 2)[1:] for line in config.acl().splitlines())
    for node in await of(redis).topology():
        for user in ("writer", "notebook"):
            words = re.findall(r"\([^)]*\)|\S+", rules[user].replace("off ", "on >secret ", 1))
            await node.redis.execute_command("ACL SETUSER", user, *words)
    host = next(iter(cluster.nodes))
    async with connect(f"redis+cluster://writer:secret@{host}", settings=settings) as writing:
        await liqlab.ingest(
            events.iloc[:500], writing, settings=settings, detector=Detector(writing, settings=settings)
        )
        assert all(action.what != "refused" for action in await Cleaner(writing, settings=settings).trim())
        assert (await monitor.measure(writing, settings=settings)).error is None
    async with connect(f"redis+cluster://notebook:secret@{host}", settings=settings) as reading:
        assert len(await liqlab.history(reading, settings=settings)) == 500
        with pytest.raises(RedisError, match="permission"):
            await reading.set("temp:x", 1)


# Faults


async def test_a_batch_is_known_by_its_number_on_each_shard(
    redis: Redis, settings: Settings, events: pd.DataFrame
) -> None:
    writer = liqlab.Writer(redis, settings=settings)
    await writer.write_table(events.iloc[:500])
    link = Link(redis, settings, "again", writer.counts)
    table = archive.Columns.of(events.iloc[500:1_000])
    await link.send(link.batch(1, table))
    await Link(redis, settings, "again", writer.counts).send(link.batch(1, table))
    assert await archive.count(redis, settings=settings) == 1_000


async def test_without_a_replica_events_are_counted_as_at_risk(redis: Redis, cluster: LocalCluster) -> None:
    settings = load(shards=SHARDS, cluster={"replica_ms": 100})
    symbol = "BTCUSDT"
    _, replica = await replica_of(redis, shard_of(symbol, SHARDS) or 0)
    writer = liqlab.Writer(redis, settings=settings)

    async def write(first: int) -> None:
        table = archive.Columns.of_events(event(n, symbol) for n in range(first, first + 10)).table()
        await writer.write_table(table)

    await write(0)
    assert writer.counts.unreplicated == 0
    os.kill(cluster.nodes[replica.name].pid, signal.SIGSTOP)
    try:
        await write(10)
        await write(20)
        assert writer.counts.unreplicated == 20
        # A repeat writes nothing: what it repeats is no more on a replica than before.
        link = Link(redis, settings, "again", Counts())
        batch = link.batch(1, archive.Columns.of_events([event(30, symbol)]))
        await link.send(batch)
        async with cluster.connect(settings=settings) as other:
            again = Link(other, settings, "again", Counts())
            await again.send(again.batch(1, archive.Columns.of_events([event(30, symbol)])))
            assert again._counts.unreplicated == 1
    finally:
        os.kill(cluster.nodes[replica.name].pid, signal.SIGCONT)

    async def back() -> bool:
        await write(40 + writer.counts.written)
        return writer.counts.unreplicated == 0

    await until(back)
    assert writer.counts.memory_lost == 0


async def test_a_primary_is_killed_while_a_writer_writes(frail: LocalCluster, settings: Settings) -> None:
    acknowledged: list[int] = []
    async with frail.connect(settings=settings) as client:
        primary, replica = await replica_of(client, 1)
        cleaner, alarms = Cleaner(client, settings=settings), Alarms(settings)
        await cleaner.trim(START_MS)
        assert primary.name in cleaner.nodes
        alarms.check(await monitor.measure(client, settings=settings))
        assert alarms.standing == {}
        async with liqlab.Writer(client, settings=settings) as writer:
            n = before = 0
            killed_s = 0.0
            while writer.counts.resent == 0 or len(acknowledged) < before + 4_000:
                for _ in range(50):
                    done = await writer.write(event(n))
                    done.add_done_callback(lambda _, n=n: acknowledged.append(n))
                    n += 1
                await asyncio.sleep(0.01)
                if not killed_s and len(acknowledged) > 4_000:
                    frail.nodes[primary.name].kill()
                    killed_s, before = clock.elapsed_s(), n
                    health = await monitor.measure(client, settings=settings)
                    assert primary.name in health.down
                    [alert] = alarms.check(health)
                    assert (alert.name, alert.level) == ("server", Level.CRITICAL)
                assert not killed_s or clock.elapsed_s() - killed_s < 60
        await asyncio.sleep(0)  # the callbacks of the last batch
        print(
            f"{clock.elapsed_s() - killed_s:.1f} s from the kill until {len(acknowledged) - before} events after it; "
            f"{writer.counts}"
        )
        assert sorted(acknowledged) == list(range(n))
        assert writer.counts.memory_lost == 0
        found = await liqlab.history(client, settings=settings)
        assert sorted((found["ts_ms"] - START_MS).tolist()) == list(range(n))
        health = await monitor.measure(client, settings=settings)
        assert (health.error, health.down) == (None, (primary.name,))
        assert {alert.name: alert.level for alert in alarms.check(health)} == {
            "server": Level.OK,
            "nodes": Level.WARNING,
        }
        await cleaner.trim(START_MS)
        assert replica.name in cleaner.nodes
        assert primary.name not in cleaner.nodes
        assert (await budget.measure(client, settings=settings)).nodes.keys() == cleaner.nodes.keys()


async def test_a_primary_is_killed_in_the_middle_of_an_ingest(
    frail: LocalCluster, default_redis: Redis, settings: Settings, events: pd.DataFrame
) -> None:
    killed: list[int] = []
    async with frail.connect(settings=settings) as client:
        primary, _ = await replica_of(client, 1)

        def kill(done: int, total: int) -> None:
            if done > total / 2 and not killed:
                frail.nodes[primary.name].kill()
                killed.append(done)

        detector = Detector(client, settings=settings)
        done = await liqlab.ingest(events, client, settings=settings, detector=detector, progress=kill)
        assert killed
        assert (done.events, done.held) == (len(events), len(events))
        found = same(await liqlab.history(client, settings=settings))
    wanted = await liqlab.ingest(
        events, default_redis, settings=load(), detector=Detector(default_redis, settings=load())
    )
    pd.testing.assert_frame_equal(found, same(await liqlab.history(default_redis, settings=load())))
    pd.testing.assert_frame_equal(done.alerts, wanted.alerts)


async def test_what_a_promoted_replica_lacks_comes_from_the_journal(frail: LocalCluster, tmp_path: Path) -> None:
    settings = load(
        shards=SHARDS,
        cluster={"replica_ms": 50},
        journal={"path": tmp_path / "wal.db", "mode": "wal"},
        writer={"check_s": 0.2},
    )
    async with frail.connect(settings=settings) as client:
        primary, replica = await replica_of(client, 1)
        writer = liqlab.Writer(client, settings=settings)
        await writer.write_table(archive.Columns.of_events(map(event, range(400))).table())
        assert writer.counts.unreplicated == 0
        # Frozen and cut off, it gets nothing of what follows.
        os.kill(frail.nodes[replica.name].pid, signal.SIGSTOP)
        await primary.redis.client_kill_filter(_type="replica", skipme=True)
        await writer.write_table(archive.Columns.of_events(map(event, range(400, 800))).table())
        assert writer.counts.unreplicated > 0
        assert writer.counts.written == 800
        frail.nodes[primary.name].kill()
        os.kill(frail.nodes[replica.name].pid, signal.SIGCONT)

        async def promoted() -> bool:
            return all(not node.failed for node in await of(client).nodes())

        await until(promoted)
        await writer.write_table(archive.Columns.of_events(map(event, range(800, 1_200))).table())

        async def drained() -> bool:
            try:
                await writer.drain()
            except liqlab.writer.WriterError:
                return False
            return True

        await until(drained)
        writer.close()
        assert writer.counts.memory_lost == 1
        found = await liqlab.history(client, settings=settings)
        assert sorted((found["ts_ms"] - START_MS).tolist()) == list(range(1_200))


# Another number of shards


async def kept(client: Redis, settings: Settings, end_ms: int) -> dict[str, pd.DataFrame]:
    names = [f"S{n}" for n in range(40)]
    found = [one() for one in await quantiles.asked(client, names, end_ms=end_ms, settings=settings)]
    return {
        "history": same(await liqlab.history(client, settings=settings)),
        "quantiles": pd.DataFrame([one.quantiles([0.5, 0.99]) for one in found]),
        "signals": await signals(client, settings=settings),
        "candles": same(await candles.every(client, "1m")),
    }


async def filled(client: Redis, settings: Settings) -> dict[str, pd.DataFrame]:
    now_ms = clock.now_ms() - 40 * clock.MINUTE_MS
    table = archive.Columns.of_events(event(n)._replace(ts_ms=now_ms + 500 * n) for n in range(4_000)).table()
    await liqlab.Writer(client, settings=settings).write_table(table)
    await sealing.seal(client, now_ms=clock.now_ms(), settings=settings, partial=True)
    shard = shard_of("A:B", settings.shards)
    await client.hset(BY_NAME["position"].key("A:B", shard=shard), mapping={"size": 7})
    await client.set(BY_NAME["cooldown"].key("A:B", side="buy", shard=shard), 5, ex=500)
    await client.set("temp:x", 1)
    found = await kept(client, settings, clock.now_ms())
    assert len(found["history"]) == 4_000
    assert found["quantiles"].notna().all().all()
    return found


async def check_moved(client: Redis, settings: Settings, before: dict[str, pd.DataFrame]) -> None:
    for name, table in (await kept(client, settings, clock.now_ms())).items():
        pd.testing.assert_frame_equal(table, before[name], obj=name)
    shard = shard_of("A:B", settings.shards)
    assert await client.hgetall(BY_NAME["position"].key("A:B", shard=shard)) == {b"size": b"7"}
    assert 400 < await client.ttl(BY_NAME["cooldown"].key("A:B", side="buy", shard=shard)) <= 500
    keys = [key async for key in client.scan_iter()]
    assert {shard_of_key(key) for key in keys if key != b"temp:x"} <= set(range(settings.shards))


async def test_shards_are_changed_in_place_and_interrupted(
    redis: Redis, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, new = await filled(redis, settings), load(shards=5)
    monkeypatch.setattr(module, "_WINDOW", 1_000)
    sent = Link.send

    class StoppedError(Exception):
        pass

    for calls in (0, 1, 3):
        left = [calls]

        async def stopping(self: Link, batch: object, left: list[int] = left) -> None:
            if not left[0]:
                raise StoppedError
            left[0] -= 1
            await sent(self, batch)  # type: ignore[arg-type]

        monkeypatch.setattr(Link, "send", stopping)
        with pytest.raises(StoppedError):
            await reshard(redis, folder=tmp_path / "move", shards=5, settings=settings)
    monkeypatch.setattr(Link, "send", sent)
    steps: list[tuple[int, int]] = []
    done = await reshard(
        redis, folder=tmp_path / "move", shards=5, settings=settings, progress=lambda *step: steps.append(step)
    )
    assert (done.phase, done.events, steps[-1]) == ("done", 4_000, (4_000, 4_000))
    await check_moved(redis, new, before)
    assert await redis.get("temp:x") == b"1"
    again = await reshard(redis, folder=tmp_path / "move", shards=5, settings=settings)
    assert again == done
    with pytest.raises(MigrateError, match="change from 8 to 5"):
        await reshard(redis, folder=tmp_path / "move", shards=6, settings=settings)
    with pytest.raises(MigrateError, match="shards = 5 already"):
        await reshard(redis, folder=tmp_path / "none", shards=5, settings=new)
    # Budget, cleanup and writing go on under the new number.
    await liqlab.Writer(redis, settings=new).write_table(archive.Columns.of_events([event(0)]).table())
    assert len(await liqlab.history(redis, settings=new)) == 4_001


async def test_one_server_moves_to_a_cluster(
    redis: Redis, default_redis: Redis, settings: Settings, tmp_path: Path
) -> None:
    before = await filled(default_redis, load())
    with pytest.raises(SettingsError, match="shards = 1"):
        await reshard(default_redis, folder=tmp_path / "a", shards=1, settings=load(), target=redis)
    await reshard(default_redis, folder=tmp_path / "b", shards=SHARDS, settings=load(), target=redis)
    await check_moved(redis, settings, before)
    assert len(await liqlab.history(default_redis, settings=load())) == 4_000
    with pytest.raises(MigrateError, match="the target holds events"):
        await reshard(default_redis, folder=tmp_path / "c", shards=SHARDS, settings=load(), target=redis)


async def test_events_that_come_in_between_are_not_removed(redis: Redis, settings: Settings) -> None:
    await filled(redis, settings)
    late = archive.Columns.of_events([event(1)]).table()
    await liqlab.Writer(redis, settings=settings).write_table(late)
    state = module.Resharded("name", SHARDS, 5, 100, events=4_000)
    with pytest.raises(MigrateError, match="1 events came after"):
        await module._remove(redis, settings, state)
    assert len(await liqlab.history(redis, settings=settings)) == 4_001
