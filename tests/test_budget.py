"""Every family loaded alone is within 2 % of the `used_memory` that it adds; the table adds up to the byte."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from liqlab import budget, clock, settings
from liqlab.server import Server, connect
from liqlab.writer import Writer
from tests.test_writer import T0, sample

Command = tuple[object, ...]
TOLERANCE = 0.02


def cooldowns() -> list[Command]:
    return [("SET", f"alert:SYM{i}USDT:sell", 1, "EX", 600) for i in range(15_000)]


def vwaps() -> list[Command]:
    numbers = clock.generator(1).random((4_000, 2))
    return [
        command
        for i, (a, b) in enumerate(numbers.tolist())
        for command in (
            ("HSET", f"vwap:SYM{i}", "price_sum", a * 1e7, "volume_sum", b * 1e5, "count", i, "last_update", T0),
            ("EXPIRE", f"vwap:SYM{i}", 3600),
        )
    ]


def candles() -> list[Command]:
    numbers = clock.generator(2).random((5_000, 3))
    return [
        command
        for i, (a, b, c) in enumerate(numbers.tolist())
        for command in (
            ("HSET", f"candle:SYM{i % 200}:{i}", "count", 3, "volume", a, "buy_volume", b, "notional", c * 1e6),
            ("EXPIRE", f"candle:SYM{i % 200}:{i}", 3600),
        )
    ]


def percentiles(members: int, keys: int) -> list[Command]:
    values = np.round(clock.generator(3).lognormal(6, 2, members), 2).tolist()
    pairs = [word for j, value in enumerate(values) for word in (value, f"{T0 + 977 * j}-0")]
    return [
        command
        for i in range(keys)
        for command in (("ZADD", f"size:SYM{i}:482752", *pairs), ("EXPIRE", f"size:SYM{i}:482752", 90_000))
    ]


def sketches(fields: int, keys: int) -> list[Command]:
    pairs = [word for j in range(fields) for word in (j, 7)]
    return [("HSET", f"size:SYM{i}:482752", *pairs) for i in range(keys)]


def packed() -> list[Command]:
    rng = clock.generator(4)
    return [("SET", f"size:SYM{i}:482752", rng.bytes(int(rng.integers(40, 1500))), "EX", 90_000) for i in range(3_000)]


def streams(keys: int, entries: int) -> list[Command]:
    rng = clock.generator(5)
    out: list[Command] = []
    for i in range(keys):
        times = T0 + np.cumsum(rng.integers(0, 4_000, entries))
        for j, ms in enumerate(times.tolist()):
            size, price = round(float(rng.lognormal(1, 2)), 3), round(float(rng.lognormal(5, 2)), 4)
            out.append(("XADD", f"liq:SYM{i}", f"{ms}-{j}", "s", "b", "z", size, "p", price, "e", "binance"))
        out.append(("EXPIRE", f"liq:SYM{i}", 900))
    return out


def blocks() -> list[Command]:
    rng = clock.generator(6)
    return [
        ("XADD", f"liqb:{{{i % 9}}}", f"{T0 + i}-0", "b", rng.bytes(int(rng.integers(500, 6000)))) for i in range(900)
    ]


def names() -> list[Command]:
    return [("RPUSH", f"liqid:{{{i}}}", *(f"sSYMBOL{i * j}USDT" for j in range(i % 700))) for i in range(2, 300)]


def uniques() -> list[Command]:
    return [("PFADD", f"unique_symbols:{{{i}}}:1h", *(f"S{j}" for j in range(i % 400))) for i in range(2_000)]


LOADS: dict[str, Callable[[], list[Command]]] = {
    "cooldown": cooldowns,
    "vwap": vwaps,
    "candle": candles,
    "percentile, listpack": lambda: percentiles(100, 700),
    "percentile, skiplist": lambda: percentiles(600, 60),
    "percentile, small hash": lambda: sketches(200, 900),
    "percentile, large hash": lambda: sketches(700, 100),
    "percentile, string": packed,
    "events, sparse": lambda: streams(500, 2),
    "events, dense": lambda: streams(4, 9_000),
    "blocks": blocks,
    "names": names,
    "unique_symbols": uniques,
}


async def quiet_memory(redis: Redis) -> int:
    """used_memory once the tables have been rehashed, without the buffers of clients and the log of slow commands."""
    await redis.slowlog_reset()
    for _ in range(100):
        await asyncio.sleep(0.05)
        if not (await redis.memory_stats()).get("db.dict.rehashing.count"):
            break
    await asyncio.sleep(0.3)
    memory = await redis.info("memory")
    return int(memory["used_memory"]) - int(memory["mem_clients_normal"])


async def load_alone(server: Server, redis: Redis, commands: list[Command]) -> int:
    """Run the commands on a fresh server; return the bytes that `used_memory` grew by."""
    await budget.measure(redis)  # whatever measuring itself leaves behind is there already
    before = await quiet_memory(redis)
    async with server.connect() as loader:
        for start in range(0, len(commands), 500):
            pipe = loader.pipeline(transaction=False)
            for command in commands[start : start + 500]:
                pipe.execute_command(*command)
            await pipe.execute()
    return await quiet_memory(redis) - before


@pytest.mark.parametrize("load", LOADS)
async def test_a_family_alone_is_what_used_memory_grew_by(load: str, fresh_server: Callable[..., Server]) -> None:
    server = fresh_server(maxmemory="240mb")
    async with server.connect() as redis:
        grown = await load_alone(server, redis, LOADS[load]())
        measured = await budget.measure(redis, limit=100_000)

    family = load.split(",")[0]
    assert measured.families.index.tolist() == [family]
    assert measured.families.loc[family, "error_bytes"] == 0
    assert measured.families.loc[family, "bytes"] == pytest.approx(grown, rel=TOLERANCE)
    assert grown > 300_000  # else the server's own small change would be measured


async def test_few_keys_are_not_charged_with_what_any_number_needs(fresh_server: Callable[..., Server]) -> None:
    """A table's own structs are there with its first key; what more keys add is theirs."""
    server = fresh_server(maxmemory="240mb")
    async with server.connect() as redis:
        commands = vwaps()[:256]  # two a key
        await load_alone(server, redis, commands[:8])
        few = (await budget.measure(redis)).families.loc["vwap", "bytes"]
        grown = await load_alone(server, redis, commands[8:])
        measured = (await budget.measure(redis)).families.loc["vwap"]
    assert measured["keys"] == 128
    assert measured["bytes"] - few == pytest.approx(grown, rel=TOLERANCE)
    assert few / 4 == pytest.approx(measured["bytes"] / 128, rel=0.2)  # both tables are full, but for Valkey's


async def test_the_table_adds_up_to_the_byte(redis: Redis) -> None:
    await Writer(redis).write_table(sample(5_000))
    await redis.set("someone:else", "x" * 100)
    measured = await budget.measure(redis)
    assert measured.table["bytes"].sum() == measured.used_memory
    assert measured.table["keys"].sum() == await redis.dbsize()
    assert measured.families.loc["events", "members"] == 5_000
    assert measured.table.loc["foreign", "keys"] == 1
    assert measured.table.loc["unattributed", "bytes"] == measured.overhead.sum() > 0
    assert measured.families["bytes"].sum() == measured.used_memory - measured.table.loc["unattributed", "bytes"]
    assert measured.over == []
    shares = measured.table.drop("foreign")
    assert shares["share"].sum() == pytest.approx(1)
    assert shares["budget_bytes"].sum() == pytest.approx(measured.maxmemory, abs=3)


async def test_an_empty_server_is_all_unattributed(redis: Redis) -> None:
    measured = await budget.measure(redis)
    assert measured.table.loc["unattributed", "bytes"] == measured.used_memory
    assert measured.table["keys"].sum() == 0


async def test_large_families_are_sampled_and_say_how_far_off(default_redis: Redis) -> None:
    pipe = default_redis.pipeline(transaction=False)
    for i, size in enumerate(clock.generator(7).integers(10, 2_000, 8_000).tolist()):
        pipe.set(f"temp:{i}", "x" * size)
    await pipe.execute()
    whole = await budget.measure(default_redis, limit=10_000)
    part = await budget.measure(default_redis, limit=400)
    row, truth = part.families.loc["temporary"], whole.families.loc["temporary"]
    assert truth["error_bytes"] == 0
    assert row["keys"] == truth["keys"] == 8_000
    assert 0 < row["error_bytes"] < 0.1 * truth["bytes"]
    assert abs(row["bytes"] - truth["bytes"]) < 2 * row["error_bytes"]
    assert part.table["bytes"].sum() == part.used_memory


async def test_a_scan_that_is_cut_short_still_speaks_of_all_keys(default_redis: Redis) -> None:
    pipe = default_redis.pipeline(transaction=False)
    for i in range(20_000):
        pipe.set(f"debug:{i}", "x" * 50)
    await pipe.execute()
    measured = await budget.measure(default_redis, limit=300, max_seconds=0)
    whole = await budget.measure(default_redis, limit=100_000)
    assert measured.families.loc["debug", "keys"] == 20_000
    assert measured.families.loc["debug", "bytes"] == pytest.approx(whole.families.loc["debug", "bytes"], rel=0.05)


async def test_keys_of_every_type_are_counted_and_foreign_ones_named(redis: Redis) -> None:
    await redis.rpush("a:list", *range(10))
    await redis.sadd("a:set", *range(7))
    await redis.set("a:number", 5)
    await redis.set("liq", "not a stream")  # a stranger under one of our names must not stop the measurement
    measured = await budget.measure(redis)
    assert measured.families.loc["foreign", ["keys", "members"]].tolist() == [3, 18]
    assert measured.families.loc["events", "keys"] == 1


async def test_what_is_over_its_share_is_named(default_redis: Redis) -> None:
    await Writer(default_redis).write_table(sample(3_000))
    tight = settings.load(
        budget={"streams": 0.0001, "vwap": 0.1, "percentile": 0.2, "statistics": 0.1, "misc": 0.08, "buffer": 0.5199}
    )
    measured = await budget.measure(default_redis, settings=tight)
    assert measured.over == ["streams"]
    assert measured.as_dict()["over"] == ["streams"]


async def test_measuring_changes_nothing_and_can_be_cancelled(default_redis: Redis) -> None:
    await Writer(default_redis).write_table(sample(5_000))
    keys = sorted(await default_redis.keys())
    task = asyncio.create_task(budget.measure(default_redis))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    steps: list[tuple[int, int]] = []
    await budget.measure(default_redis, progress=lambda done, total: steps.append((done, total)))
    assert sorted(await default_redis.keys()) == keys
    assert steps[-1] == (len(keys), len(keys))


async def test_keys_that_expire_meanwhile_are_no_error(default_redis: Redis) -> None:
    pipe = default_redis.pipeline(transaction=False)
    for i in range(3_000):
        pipe.set(f"temp:{i}", "x", px=1 + i // 5)
    pipe.set("temp:stays", "x")
    await pipe.execute()
    measured = await budget.measure(default_redis)
    assert 1 <= measured.families.loc["temporary", "keys"] <= 3_001
    assert measured.table["bytes"].sum() == measured.used_memory


async def test_a_user_who_may_not_measure_is_told_so(fresh_server: Callable[..., Server]) -> None:
    server = fresh_server()
    async with server.connect() as admin:
        await Writer(admin).write_table(sample(100))
        await admin.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@all", "-memory|usage")
        async with connect(f"unix://reader:pw@{server.socket}") as reader:
            with pytest.raises(NoPermissionError, match=r"memory\|usage"):
                await budget.measure(reader)
        await admin.execute_command("ACL", "SETUSER", "reader", "+memory|usage", "-memory|malloc-stats", "-config|get")
        async with connect(f"unix://reader:pw@{server.socket}") as reader:
            measured = await budget.measure(reader)
            assert measured.families.loc["events", "members"] == 100


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (5_383_208, "5.13 MiB"), (251_658_240, "240.00 MiB"), (3 << 30, "3.00 GiB")],
)
def test_human(size: float, text: str) -> None:
    assert budget.human(size) == text
