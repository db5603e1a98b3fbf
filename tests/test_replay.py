"""An ingest follows the feed's own clock: what is left is what a live server would hold at the feed's end."""

import pandas as pd
import pytest
from redis.asyncio import Redis

from liqlab import clock, schema, settings
from liqlab.events import EventError, empty, event_table
from liqlab.replay import at_speed, ingest
from liqlab.writer import Writer
from tests.test_writer import T0, plain, sample, stored

HOUR = clock.HOUR_MS


def at(*offsets_ms: int, symbol: str = "A") -> pd.DataFrame:
    n = len(offsets_ms)
    times = [T0 + offset for offset in offsets_ms]
    return event_table(times, ["okx"] * n, [symbol] * n, ["buy"] * n, [2.0] * n, [3.0] * n, [6.0] * n)


async def keys(redis: Redis) -> set[str]:
    return {key.decode() for key in await redis.keys()}


@pytest.mark.parametrize("layout", ["per_symbol", "shared", "hybrid"])
async def test_everything_within_its_time_is_there(redis: Redis, layout: str) -> None:
    events = sample(3_000)
    done = await ingest(events, redis, settings=settings.load(writer={"layout": layout}))
    pd.testing.assert_frame_equal(await stored(redis), plain(events), check_dtype=False)
    assert (done.events, done.late, done.trimmed, done.evicted, done.expired) == (3_000, 0, 0, 0, {})


async def test_ttls_run_on_the_feeds_clock(default_redis: Redis) -> None:
    minute = T0 // clock.MINUTE_MS
    await ingest(at(0, 50 * 60_000), default_redis)
    assert await keys(default_redis) >= {f"candle:A:{minute}", f"candle:A:{minute + 50}", "vwap:A"}
    assert float(await default_redis.hget("vwap:A", "count")) == 2

    await default_redis.flushall()
    done = await ingest(at(0, 2 * HOUR), default_redis)
    assert f"candle:A:{minute}" not in await keys(default_redis)
    assert float(await default_redis.hget("vwap:A", "count")) == 1  # idle for an hour: begun anew
    assert done.expired == {"candle": 1, "candle_5m": 1, "vwap": 1, "unique_symbols": 1}
    assert await default_redis.xlen("liq") == 2  # the stream's own time is longer


async def test_a_key_that_is_touched_again_lives_on(default_redis: Redis) -> None:
    done = await ingest(at(*range(0, 3 * HOUR, HOUR // 2)), default_redis)
    assert float(await default_redis.hget("vwap:A", "count")) == 6
    assert "vwap" not in done.expired


async def test_idle_streams_go_and_busy_ones_stay(default_redis: Redis) -> None:
    chosen = settings.load(retention={"events_s": 600}, writer={"layout": "per_symbol"})
    events = pd.concat([at(0, symbol="idle"), at(0, 300_000, 800_000, symbol="busy")])
    await ingest(event_table(**events), default_redis, settings=chosen)
    assert "liq:idle" not in await keys(default_redis)
    assert await default_redis.xlen("liq:busy") == 3


async def test_no_expiry_on_demand(default_redis: Redis) -> None:
    done = await ingest(at(0, 2 * HOUR, 90 * HOUR), default_redis, expire=False)
    assert done.expired == {}
    assert float(await default_redis.hget("vwap:A", "count")) == 3


async def test_two_runs_leave_the_same_keys_and_contents(default_redis: Redis) -> None:
    async def contents() -> dict[str, object]:
        await default_redis.flushall()
        await ingest(events, default_redis)
        out: dict[str, object] = {}
        for key in sorted(await keys(default_redis)):
            family = schema.family_of(key)
            if family is None or family.name == "writer":
                continue
            if family.name == "names":
                out[key] = await default_redis.lrange(key, 1, -1)  # not the token at its head
                continue
            read = {"stream": default_redis.xrange, "hash": default_redis.hgetall, "string": default_redis.get}
            out[key] = await read[(await default_redis.type(key)).decode()](key)
        return out

    events = sample(2_000).assign(ts_ms=lambda table: T0 + (table["ts_ms"] - T0) * 40)
    first = await contents()
    assert first == await contents()
    assert len(first) > 30


async def test_the_timeline_is_the_feeds(default_redis: Redis) -> None:
    steps: list[tuple[int, int]] = []
    events = at(*range(0, 30 * HOUR, HOUR // 20))
    done = await ingest(events, default_redis, progress=lambda n, total: steps.append((n, total)))
    line = done.timeline
    assert 200 <= len(line) <= 500
    assert line["ts_ms"].is_monotonic_increasing
    assert line["ts_ms"].iloc[-1] == events["ts_ms"].iloc[-1]
    assert line["events"].iloc[-1] == len(events) == steps[-1][0] == steps[-1][1]
    assert (line["used_memory"] > 100_000).all()
    # 600 candles of a minute and as many of five, an hour of them kept: without the feed's clock all would be there.
    assert line["keys"].max() < 80


async def test_an_empty_feed_says_so(default_redis: Redis) -> None:
    with pytest.raises(EventError, match="holds no event"):
        await ingest(empty(), default_redis)


async def test_a_feed_is_played_at_speed_through_a_live_writer(default_redis: Redis) -> None:
    events = sample(3_000)
    began = clock.elapsed_s()
    writer = Writer(default_redis, settings=settings.load())
    await at_speed(events, writer, 0.5)
    assert clock.elapsed_s() - began >= 0.5
    assert writer.counts.written == len(events)
    pd.testing.assert_frame_equal(await stored(default_redis), plain(events), check_dtype=False)
