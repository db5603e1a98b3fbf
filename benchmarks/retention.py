"""What bounded retention holds, and what the original's does, on the same feed and the same server.

python benchmarks/retention.py                    # all three parts, about ten minutes
python benchmarks/retention.py day --maxmemory 6mb
"""

import argparse
import asyncio
from typing import Any

import pandas as pd
from redis.asyncio import Redis

from liqlab import candles, ingest, original, replay, serve, settings, synth
from liqlab.budget import human, measure, sizes
from liqlab.cleanup import Cleaner
from liqlab.clock import HOUR_MS, MINUTE_MS, elapsed_s
from liqlab.events import Columns, event_table
from liqlab.writer import Writer


def stormy_day() -> pd.DataFrame:
    """Return 24 hours at ten times the normal rate, with two hours of cascade in them."""
    day, storm = synth("normal", hours=24, seed=1, rate_per_min=1_000), synth("cascade", hours=2, seed=2)
    storm = storm.assign(ts_ms=storm["ts_ms"] - storm["ts_ms"].iloc[0] + day["ts_ms"].iloc[0] + 10 * HOUR_MS)
    names = {"exchange": object, "symbol": object, "side": object}
    both = pd.concat([day.astype(names), storm.astype(names)]).sort_values("ts_ms", kind="stable")
    return event_table(*(both[name].to_numpy() for name in both.columns))


async def critical_keys(redis: Redis) -> None:
    await redis.hset("position:BTCUSDT", "size", "1")
    await redis.xadd("signal:BTCUSDT", {"notional": "1"})
    await redis.set("alert:BTCUSDT:buy", "1", ex=600)


async def end(redis: Redis, label: str, worst: float) -> None:
    info = await redis.info("everything")
    kept = await redis.exists("position:BTCUSDT", "signal:BTCUSDT")
    oom = int((info.get("errorstat_OOM") or {}).get("count", 0))
    print(
        f"{label}: streams at most {100 * worst:.1f} % of their share, ends at {human(info['used_memory'])} of"
        f" {human(info['maxmemory'])}; evicted keys {info['evicted_keys']:,}, OOM errors {oom:,},"
        f" critical keys {kept} of 2"
    )


async def ours(events: pd.DataFrame, chosen: settings.Settings) -> None:
    with serve(settings=chosen) as server:
        async with server.connect() as redis:
            await critical_keys(redis)
            cleaner = Cleaner(redis, settings=chosen)
            share, worst, tiers = chosen.budget.streams * chosen.server.maxmemory, 0.0, {}
            run = replay.EventClock.run

            async def sampled(self: Any, now_ms: int) -> Any:
                nonlocal worst
                taken = await sizes(redis, ["liq", "liqb", "liqid"])
                worst = max(worst, float(taken["bytes"].sum()) / share)
                tiers[cleaner.tier.name] = tiers.get(cleaner.tier.name, 0) + 1
                return await run(self, now_ms)

            replay.EventClock.run = sampled
            done = await ingest(events, redis, settings=chosen, cleaner=cleaner)
            replay.EventClock.run = run
            await end(redis, "liqlab", worst)
            print(f"  {done.held:,} of {done.events:,} events kept in {done.seconds:.0f} s; minutes by tier: {tiers},")
            print(f"  {cleaner.pressure.changes} changes of tier; bytes of keys by share:")
            print((await measure(redis, settings=chosen)).table[["keys", "bytes", "used_pct"]].to_string())


async def originals(events: pd.DataFrame, chosen: settings.Settings) -> None:
    """Write as the original does: MAXLEN ~ 10000 a stream, TTLs, volatile-ttl; nothing else bounds it."""
    with serve(settings=chosen) as server:
        async with server.connect() as redis:
            await critical_keys(redis)
            share, worst, failed, top = chosen.budget.streams * chosen.server.maxmemory, 0.0, 0, {}
            columns = Columns.of(events)
            streams = [f"liq:{name}" for name in events["symbol"].cat.categories]
            buckets: dict[str, int] = {}
            for start in range(0, len(events), original.PIPELINE):
                pipe = redis.pipeline(transaction=False)
                for commands in original.commands(columns.rows(slice(start, start + original.PIPELINE)), chosen, top):
                    for command in commands:
                        pipe.execute_command(*command)
                    now_ms = int(columns.ts_ms[min(start, len(events) - 1)])
                    key = str(commands[3][1])
                    if key not in buckets:  # the document's own TTL, two hours, on the feed's clock
                        buckets[key] = now_ms + 2 * HOUR_MS
                        pipe.expire(key, 7_200)
                failed += sum(isinstance(reply, Exception) for reply in await pipe.execute(raise_on_error=False))
                if start // original.PIPELINE % 200 == 0:
                    taken = await sizes(redis, streams)
                    worst = max(worst, float(taken["bytes"].sum()) / share)
                    gone = [key for key, until in buckets.items() if until <= now_ms]
                    if gone:
                        await redis.unlink(*gone)
                        buckets = {key: until for key, until in buckets.items() if until > now_ms}
            await end(redis, "the original's", worst)
            left = sum([await redis.xlen(key) for key in streams])
            print(f"  {left:,} of {len(events):,} events kept; {failed:,} commands refused")


async def after_a_storm() -> None:
    """Let 400 symbols with a stream of their own fall silent."""
    chosen = settings.load(writer={"layout": "per_symbol"}, server={"maxmemory": "64mb"})
    events = synth("cascade", hours=1, seed=1)
    with serve(settings=chosen) as server:
        async with server.connect() as redis:
            await Writer(redis, settings=chosen).write_table(events)

            async def memory() -> str:
                await asyncio.sleep(0.3)
                info = await redis.info("memory")
                return f"used {human(info['used_memory'])}, RSS {human(info['used_memory_rss'])}"

            print(f"{events['symbol'].nunique()} streams, {len(events):,} events: {await memory()}")
            cleaner, later = Cleaner(redis, settings=chosen), int(events["ts_ms"].max()) + HOUR_MS
            await cleaner.compact(later)
            await cleaner.check(later)
            print(f"  an hour later, sealed and removed by cleanup: {await memory()}; {await redis.dbsize():,} keys")


async def candle_bytes() -> None:
    """Compare candles of a day with the events that they sum up, all of them kept."""
    events = synth("normal", hours=24, seed=0)
    for form in ("packed", "hash"):
        chosen = settings.load(writer={"candles": form})
        with serve(settings=chosen) as server:
            async with server.connect() as redis:
                await Writer(redis, settings=chosen).write_table(events)
                found = (await measure(redis, settings=chosen, limit=20_000)).families
                raw = found["bytes"]["events"]
                each = ", ".join(
                    f"{width} {human(found['bytes'][name])} ({100 * found['bytes'][name] / raw:.0f} % of the events')"
                    for width, name in candles.WIDTHS.items()
                )
                print(f"{form} candles of {len(events):,} events ({human(raw)}): {each}")
                exact, guess = events["symbol"].nunique(), await redis.pfcount("unique_symbols:1h")
                taken = found["bytes"]["unique_symbols"]
                print(f"  unique symbols: {exact} exactly, {guess} by the HyperLogLog, in {human(taken)}")
    text = settings.load(writer={"layout": "per_symbol", "codec": "fields"}, retention={"events_maxlen": 10**6})
    with serve(settings=text) as server:
        async with server.connect() as redis:
            await Writer(redis, settings=text).write_table(events)
            found = (await measure(redis, settings=text)).families
            print(f"  the same events as the original's text streams: {human(found['bytes']['events'])}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["day", "silence", "candles"])
    parser.add_argument("--maxmemory", default="64mb")
    chosen = parser.parse_args()
    if chosen.part in (None, "silence"):
        await after_a_storm()
    if chosen.part in (None, "candles"):
        await candle_bytes()
    if chosen.part in (None, "day"):
        began, events = elapsed_s(), stormy_day()
        worst = int(events.groupby(events["ts_ms"] // MINUTE_MS).size().max())
        print(f"{len(events):,} events, {worst:,} in the worst minute, on {chosen.maxmemory}")
        server = {"maxmemory": chosen.maxmemory}
        await ours(events, settings.load(server=server))
        await originals(events, settings.load(server=server))
        print(f"{elapsed_s() - began:.0f} s")


if __name__ == "__main__":
    asyncio.run(main())
