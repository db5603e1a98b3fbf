from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from redis.asyncio import Redis

from liqlab import settings, synth
from liqlab.archive import history
from liqlab.cleanup import Action, Cleaner, Tier, families
from liqlab.cleanup.drill import Drilled, drill
from liqlab.events import EventError, empty
from liqlab.server import Server
from liqlab.settings import Settings, Thresholds
from liqlab.writer import Writer
from tests.test_writer import plain

STEPS = 60
SMALL = 12 << 20
T0 = 1_790_812_800_000


def chosen(path: Path | None = None, policy: str = "volatile-ttl") -> Settings:
    return settings.load(
        server={"maxmemory": SMALL, "maxmemory_policy": policy}, journal={"path": path}, writer={"bulk_events": 500}
    )


def growing(peak: float) -> np.ndarray:
    """A neighbour's bytes: it comes with the cascade, stays, and leaves after half of the feed."""
    return SMALL * np.interp(np.arange(STEPS) / STEPS, [0.1, 0.4, 0.55, 0.55], [0, peak, peak, 0])


@pytest.fixture(scope="module")
def crash() -> pd.DataFrame:
    return synth("cascade", hours=0.5, seed=1, symbols=40).iloc[::2].reset_index(drop=True)


async def place(redis: Redis) -> None:
    await redis.xadd("signal:X", {"notional": 5})
    await redis.expire("signal:X", 3_600)
    await redis.hset("position:X", "size", "1.5")
    await redis.set("alert:X:sell", 1, ex=600)


async def fill(redis: Redis, ratio: float) -> None:
    """Let a neighbour grow until so much of the memory is used."""
    n = await redis.dbsize()
    while int((await redis.info("memory"))["used_memory"]) < ratio * SMALL:
        await redis.set(f"cache:{n}", bytes(20_000))
        n += 1


async def test_what_survives_a_neighbour(fresh_server: Callable[..., Server], crash, tmp_path) -> None:
    small = chosen(tmp_path / "journal.db")
    async with fresh_server(settings=small).connect() as redis:
        await place(redis)
        cleaner = Cleaner(redis, settings=small)
        peak = 0.9 - int((await redis.info("memory"))["used_memory"]) / SMALL
        done = await drill(crash, redis, growing(peak), settings=small, cleaner=cleaner)
        kept = await history(redis)
        assert await redis.exists("signal:X", "position:X", "alert:X:sell") == 3
        assert await redis.keys("cache:*") == []
    assert (done.refused, done.oom, done.evicted) == (0, 0, 0)
    assert len(done.timeline) == 2 * STEPS
    assert set(done.timeline["tier"]) == {"normal", "trim", "halve", "emergency"}
    assert set(done.timeline["breaker"]) > {"closed"}
    assert done.timeline["journaled"].max() > 0
    assert done.timeline["journaled"].iloc[-1] == 0
    assert 0.9 < done.timeline["used_ratio"].max() < 1
    pd.testing.assert_frame_equal(plain(kept), plain(crash.tail(len(kept))), check_dtype=False)
    assert len(kept) > len(crash) / 3
    tiers = done.tiers(small.thresholds)
    assert list(tiers.index) == ["trim", "halve", "emergency"]
    assert tiers["seconds"].between(0, 600).all()
    assert cleaner.pressure.changes == len([action for action in done.actions if action.what == "tier"]) <= 6


async def test_without_a_journal_what_the_server_refuses_is_lost(fresh_server: Callable[..., Server], crash) -> None:
    small = chosen(policy="noeviction")
    async with fresh_server(settings=small).connect() as redis:
        await place(redis)
        done = await drill(crash, redis, growing(1.2), settings=small)
        assert len(await history(redis)) == len(crash) - done.refused
        assert await redis.exists("signal:X", "position:X", "alert:X:sell") == 3
    assert done.refused > 0
    assert done.oom > 0
    assert done.evicted == 0
    assert done.actions == []
    assert done.tiers(small.thresholds).empty
    assert done.timeline["neighbour_ratio"].max() < 1
    assert len(done.timeline) == STEPS


async def test_a_drill_needs_events(default_redis: Redis) -> None:
    with pytest.raises(EventError, match="a drill needs events"):
        await drill(empty(), default_redis, [0])


def test_the_tiers_of_a_drill() -> None:
    used = [0.5, 0.76, 0.86, 0.79, 0.86, 0.6, 0.6]
    tiers = ["normal", "trim", "halve", "halve", "halve", "trim", "normal"]
    timeline = pd.DataFrame({"ts_ms": T0 + 60_000 * np.arange(7), "used_ratio": used, "tier": tiers})
    actions = [
        Action(T0, "halve", "seal", "events", 0, 0, 500, 200, ""),
        Action(T0, "halve", "drop", "candle", 7, 0, 200, 150, ""),
        Action(T0, "trim", "tier", "all", 0, 0, 9, 9, "normal to trim"),
        Action(T0, "normal", "trim", "events", 0, 5, 9, 8, ""),
    ]
    found = Drilled(timeline, actions, 0, 0, 0).tiers(Thresholds())
    assert list(found.index) == ["trim", "halve"]
    assert found[["freed", "keys", "events"]].to_numpy().tolist() == [[0, 0, 0], [350, 7, 0]]
    assert found["seconds"].tolist() == [240, 180]
    assert found["entered"].tolist() == list(pd.to_datetime([T0 + 60_000, T0 + 120_000], unit="ms"))
    assert Drilled(timeline[:5], actions, 0, 0, 0).tiers(Thresholds())["seconds"].isna().all()


# What the drill of the notebook found


async def test_an_emergency_that_others_cause_costs_half_of_the_events_once(
    fresh_server: Callable[..., Server], crash
) -> None:
    small = chosen()
    async with fresh_server(settings=small).connect() as redis:
        await Writer(redis, settings=small).write_table(crash)
        cleaner, now = Cleaner(redis, settings=small), int(crash["ts_ms"].max())
        await fill(redis, 0.95)
        await cleaner.trim(now)
        once = len(await history(redis))
        assert cleaner.tier is Tier.EMERGENCY
        for step in range(1, 7):
            await fill(redis, 0.95)
            done = await cleaner.trim(now + 10_000 * step)
            assert "drop temporary" not in {f"{action.what} {action.family}" for action in done}
        assert cleaner.tier is Tier.EMERGENCY
        assert len(await history(redis)) > 0.9 * once > 0.1 * len(crash)


async def test_a_burst_is_cut_by_number(default_redis: Redis, crash) -> None:
    small = chosen()
    await Writer(default_redis, settings=small).write_table(crash)
    before = (await families.streams(default_redis, None)).bytes
    dry = await families.to_bytes(default_redis, None, before / 2, small, dry_run=True)
    assert len(await history(default_redis)) == len(crash)
    done = await families.to_bytes(default_redis, None, before / 2, small, dry_run=False)
    kept = await history(default_redis)
    assert len(kept) == len(crash) - done.events
    assert len(kept) == pytest.approx(len(crash) / 2, rel=0.1)
    assert dry.events == pytest.approx(done.events, rel=0.05)
    assert before / 2 * 0.9 < (await families.streams(default_redis, None)).bytes <= before / 2


async def test_a_neighbour_that_left_no_longer_limits_the_writer(fresh_server: Callable[..., Server], crash) -> None:
    small = chosen()
    async with fresh_server(settings=small).connect() as redis:
        cleaner, now = Cleaner(redis, settings=small), int(crash["ts_ms"].iloc[0])
        await fill(redis, 0.88)
        await cleaner.trim(now)
        narrow = int(await redis.hget("liqc", "bytes"))
        await redis.unlink(*await redis.keys("cache:*"))
        now += 1_000 * int(small.cleanup.dwell_s)
        await cleaner.trim(now)
        wide = int(await redis.hget("liqc", "bytes"))
        assert narrow < 0.5 * wide
