"""An alert is raised for each event that is one: once, whoever looks, however often, and whoever was killed."""

import asyncio
import multiprocessing
import os
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from redis.asyncio import Redis

from liqlab import clock, quantiles, settings, synth
from liqlab.archive import history, tail
from liqlab.comparison import methods_compared
from liqlab.detector import Alert, Detector, backtest, signals, table
from liqlab.events import SIDES, Columns, Event, EventError, event_table
from liqlab.fidelity import compare, fidelity
from liqlab.replay import ingest
from liqlab.server import Server, connect
from liqlab.writer import Writer
from tests.test_writer import T0, plain, sample

MINUTE = clock.MINUTE_MS
ROUNDS = int(os.environ.get("FAULT_ROUNDS", "1"))
EAGER = settings.load(detector={"percentile": 50.0, "volume_usd": 0.0})


def feed(*rows: tuple[int, float], side: str = "sell", symbol: str = "A") -> pd.DataFrame:
    """Events of one symbol, at so many ms, of so many USD."""
    times, notional = ([row[i] for row in rows] for i in (0, 1))
    n = len(rows)
    return event_table([T0 + ms for ms in times], ["okx"] * n, [symbol] * n, [side] * n, notional, [1.0] * n, notional)


def many(n: int = 40, *, usd: float = 10.0) -> list[tuple[int, float]]:
    """Enough history for a percentile: `n` small events in the minutes before the first."""
    return [(-MINUTE * 10 + i, usd + i / 100) for i in range(n)]


def by_the_book(events: pd.DataFrame, chosen: settings.Settings) -> list[tuple[int, str, str]]:
    """The definition of an alert, event by event, as slowly as it can be written."""
    wanted, quiet_ms = chosen.detector, 1000 * chosen.retention.cooldown_s
    found: list[tuple[int, str, str]] = []
    for row in events.itertuples():
        mine = events[(events["symbol"] == row.symbol)]
        minute = row.ts_ms // MINUTE * MINUTE
        trailing = mine[
            (mine["ts_ms"] < minute) & (mine["ts_ms"] >= minute - 1000 * chosen.retention.percentile_window_s)
        ]
        upto = mine[(mine["side"] == row.side) & (mine.index <= row.Index)]
        volume = upto.loc[upto["ts_ms"] > row.ts_ms - 1000 * wanted.volume_s, "notional"].sum()
        if len(trailing) * (100 - wanted.percentile) < 100 or volume < wanted.volume_usd:
            continue
        if row.notional < wanted.min_usd_of.get(str(row.symbol), wanted.min_usd):
            continue
        if row.notional < np.quantile(trailing["notional"], wanted.percentile / 100, method="inverted_cdf"):
            continue
        if any(s == row.symbol and d == row.side and row.ts_ms < ms + quiet_ms for ms, s, d in found):
            continue
        found.append((row.ts_ms, str(row.symbol), str(row.side)))
    return found


def keys(alerts: pd.DataFrame) -> list[tuple[int, str, str]]:
    return sorted(zip(alerts["ts_ms"], alerts["symbol"], alerts["side"], strict=True))


@pytest.mark.parametrize("percentile", [80.0, 95.0])
async def test_alerts_are_those_of_the_definition(percentile: float) -> None:
    events = synth("normal", hours=2, seed=4, symbols=8, rate_per_min=20)
    chosen = settings.load(
        detector={
            "percentile": percentile,
            "volume_usd": 30_000.0,
            "min_usd": 500.0,
            "min_usd_of": {"BTCUSDT": 9_000.0},
        },
        retention={"percentile_window_s": 3_600},
    )
    found = await backtest(events, Detector(None, settings=chosen))
    assert keys(found) == sorted(by_the_book(events, chosen))
    assert len(found) > 10


async def test_how_a_feed_is_cut_into_looks_makes_no_difference_to_the_volume() -> None:
    events = synth("cascade", hours=0.5, seed=2, symbols=6)
    one, many_looks = Detector(None, settings=EAGER), Detector(None, settings=EAGER)
    whole = await one._volumes(Columns.of(events))
    parts = [await many_looks._volumes(Columns.of(events.iloc[at : at + 997])) for at in range(0, len(events), 997)]
    assert np.allclose(whole, np.concatenate(parts))


async def test_an_alert_says_what_it_was() -> None:
    detector = Detector(None, settings=settings.load(detector={"volume_usd": 6_000.0}))
    [alert] = (await backtest(feed(*many(100), (0, 900.0), (1, 5_000.0)), detector)).itertuples(index=False)
    assert (alert.ts_ms, alert.symbol, alert.side, alert.exchange) == (T0 + 1, "A", "sell", "okx")
    assert (alert.notional, alert.price, alert.rank) == (5_000.0, 5_000.0, 1.0)
    assert alert.threshold == 10.94
    assert alert.volume == pytest.approx(5_900 + sum(usd for _, usd in many(100)))


async def test_of_too_few_events_there_is_no_percentile() -> None:
    assert len(await backtest(feed(*many(19), (0, 1e6)), Detector(None))) == 0
    assert len(await backtest(feed(*many(20), (0, 1e6)), Detector(None))) == 1


async def test_a_symbol_and_side_are_quiet_for_a_cooldown(default_redis: Redis) -> None:
    detector = Detector(default_redis, settings=EAGER)
    await backtest(feed(*many()), detector)
    moments = [0, 1, 599_999, 600_000, 1_200_001]
    raised = [alert.ts_ms - T0 for alert in await detector.look(feed(*((ms, 1e6) for ms in moments)))]
    assert raised == [0, 600_000, 1_200_001]
    assert len(await detector.look(feed((1_200_002, 1e6), side="buy"))) == 1
    assert 0 < await default_redis.ttl("alert:A:sell") <= 600
    assert 0 < await default_redis.ttl("signal:A") <= 3_600


@pytest.mark.parametrize("shards", [1, 3])
async def test_symbols_asked_for_together_answer_as_each_by_itself(default_redis: Redis, shards: int) -> None:
    events, chosen = synth("normal", hours=3, seed=4, symbols=8), settings.load(shards=shards)
    await Writer(default_redis, settings=chosen).write_table(events)
    names, end_ms = [*events["symbol"].cat.categories, "NOBODY"], int(events["ts_ms"].iloc[-1])
    for window_s in (600, 5_000, 86_400):
        asked = {"end_ms": end_ms, "window_s": window_s, "settings": chosen}
        together = [one() for one in await quantiles.asked(default_redis, names, **asked)]
        for name, found in zip(names, together, strict=True):
            alone = await quantiles.distribution(default_redis, name, **asked)
            assert np.array_equal(
                found.quantiles([0.05, 0.5, 0.99]), alone.quantiles([0.05, 0.5, 0.99]), equal_nan=True
            )
            assert found.count == alone.count
            assert np.array_equal([found.least, found.most], [alone.least, alone.most], equal_nan=True)
    assert together[-1].count == 0
    whole = await quantiles.distribution(default_redis, end_ms=end_ms, settings=chosen)
    assert whole.count == pytest.approx(sum(found.count for found in together))


async def test_a_feed_judged_piece_by_piece_raises_what_it_does_minute_by_minute(default_redis: Redis) -> None:
    """An ingest stops only where an event may be an alert; a detector that is shown every minute finds the same."""
    events = synth("normal", hours=2, seed=6, symbols=20)
    chosen = settings.load(detector={"percentile": 90.0, "volume_usd": 30_000.0})
    done = await ingest(events, default_redis, settings=chosen, detector=Detector(default_redis, settings=chosen))
    await default_redis.flushall()
    detector, writer, found = Detector(default_redis, settings=chosen), Writer(default_redis, settings=chosen), []
    for _, part in events.groupby(events["ts_ms"] // MINUTE):
        minute = part.reset_index(drop=True)
        found += await detector.look(minute)
        await writer.write_table(minute)
    assert keys(table(found)) == keys(done.alerts)
    assert len(found) > 20


async def test_signals_stay_for_an_hour_of_event_time(default_redis: Redis) -> None:
    detector = Detector(default_redis, settings=EAGER)
    await backtest(feed(*many()), detector)
    alerts = await detector.look(feed((0, 1e6), (1_800_000, 1e6), (3_600_001, 1e6)))
    kept = await signals(default_redis)
    pd.testing.assert_frame_equal(kept, table(alerts[1:]))


async def test_a_restarted_detector_goes_on_as_if_nothing_had_happened(redis: Redis) -> None:
    events = synth("normal", hours=1, seed=4, symbols=8)
    chosen = settings.load(detector={"percentile": 80.0, "volume_usd": 20_000.0})
    middle = int(np.searchsorted(events["ts_ms"], events["ts_ms"].iloc[0] // MINUTE * MINUTE + 30 * MINUTE))
    whole = await ingest(events, redis, settings=chosen, detector=Detector(redis, settings=chosen))
    await redis.flushall()
    parts = []
    for rows in (slice(middle), slice(middle, None)):
        part = events.iloc[rows].reset_index(drop=True)
        parts.append((await ingest(part, redis, settings=chosen, detector=Detector(redis, settings=chosen))).alerts)
    assert all(len(part) > 10 for part in parts)
    assert keys(pd.concat(parts)) == keys(whole.alerts)


@pytest.mark.parametrize("forgets", ["nothing", "cooldowns"])
async def test_events_that_are_looked_at_again_raise_nothing_again(default_redis: Redis, forgets: str) -> None:
    detector = Detector(default_redis, settings=EAGER)
    await backtest(feed(*many()), detector)
    events = feed((0, 1e6), (300_000, 2e6), (700_000, 3e6))
    assert len(await detector.look(events)) == 2
    if forgets == "cooldowns":  # as ten minutes later: the signals are what is left
        await default_redis.unlink(*await default_redis.keys("alert:*"))
    assert await Detector(default_redis, settings=EAGER).look(events) == []
    assert len(await signals(default_redis)) == 2


async def test_two_detectors_never_raise_the_same(default_server: Server, default_redis: Redis) -> None:
    events = synth("normal", hours=2, seed=4, symbols=8)
    chosen = settings.load(detector={"percentile": 80.0, "volume_usd": 20_000.0}, retention={"signal_s": 86_400})
    await Writer(default_redis, settings=chosen).write_table(events)
    async with default_server.connect() as other:
        both = [Detector(client, settings=chosen) for client in (default_redis, other)]
        parts = [part.reset_index(drop=True) for _, part in events.groupby(events["ts_ms"] // MINUTE)]
        for part in parts:
            await asyncio.gather(*(detector.look(part) for detector in both))
    kept = await signals(default_redis)
    assert len(kept) > 20
    for _, alerts in kept.groupby(["symbol", "side"]):
        assert (np.diff(alerts["ts_ms"]) >= 600_000).all()


@pytest.mark.parametrize("layout", ["shared", "per_symbol", "hybrid"])
@pytest.mark.parametrize("shards", [1, 3])
async def test_what_is_written_is_tailed_once(default_redis: Redis, layout: str, shards: int) -> None:
    events, after, parts = sample(3_000), dict[str, str](), []
    chosen = settings.load(shards=shards, writer={"layout": layout, "hybrid_events": 300})
    writer = Writer(default_redis, settings=chosen)
    for at in range(0, 3_000, 700):
        await writer.write_table(events.iloc[at : at + 700].reset_index(drop=True))
        parts.append(await tail(default_redis, after, start_ms=0, settings=chosen))
    assert (await tail(default_redis, after, start_ms=0, settings=chosen)).empty
    pd.testing.assert_frame_equal(plain(pd.concat(parts)), plain(events), check_dtype=False)


async def test_a_detector_follows_what_is_written(default_redis: Redis) -> None:
    detector = Detector(default_redis, settings=EAGER)
    now_ms = clock.now_ms()
    shift = now_ms - T0 - MINUTE
    small = feed(*((ms + shift, usd) for ms, usd in many()))
    await Writer(default_redis).write_table(small)
    found: list[Alert] = []

    async def look() -> None:
        async for alerts in detector.follow():
            found.extend(alerts)

    task = asyncio.create_task(look())
    await asyncio.sleep(0.5)
    before = len(found)
    async with Writer(default_redis) as writer:
        await writer.write(Event(clock.now_ms(), "okx", "B", "buy", 1e6, 1.0, 1e6))  # no history: no alert
        await writer.write(Event(clock.now_ms(), "okx", "A", "buy", 1e6, 1.0, 1e6))
    for _ in range(1_000):
        if len(found) > before:
            break
        await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [(alert.symbol, alert.side) for alert in found[before:]] == [("A", "buy")]


async def test_a_detector_fills_what_the_writer_does_not(default_redis: Redis) -> None:
    """With what comes while it runs: one that begins again adds nothing twice, though it looks at the same events."""
    chosen = settings.load(detector={"method": "exact", "percentile": 50.0, "volume_usd": 0.0, "refresh_s": 1})
    found: list[Alert] = []

    async def look() -> None:
        async for alerts in Detector(default_redis, settings=chosen).follow():
            found.extend(alert for alert in alerts if alert.side == "buy")

    async def kept() -> int:
        return sum([await default_redis.zcard(key) for key in await default_redis.keys("size:A:*")])

    async def until(done: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(60):
            while not await done():
                await asyncio.sleep(0.05)

    async def all_kept() -> bool:
        return await kept() == 40

    async def raised() -> bool:
        return bool(found)

    for again in (False, True):
        task = asyncio.create_task(look())
        await asyncio.sleep(0.3)
        async with Writer(default_redis, settings=chosen) as writer:
            if again:
                await asyncio.sleep(1.1)  # into another second: what was known before it is asked for
                await writer.write(Event(clock.now_ms(), "okx", "A", "buy", 1e6, 1.0, 1e6))
            else:
                for i in range(40):
                    await writer.write(Event(clock.now_ms(), "okx", "A", "sell", 1.0 + i / 1_000, 1.0, 1.0 + i / 1_000))
        await until(raised if again else all_kept)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert [(alert.symbol, alert.side, alert.notional) for alert in found] == [("A", "buy", 1e6)]
    assert found[0].threshold == pytest.approx(1.019)
    assert await kept() == 41
    assert await default_redis.keys("sketch:*") == []


async def test_a_replay_forgets_alerts_on_the_feeds_clock(default_redis: Redis) -> None:
    events = pd.concat([feed(*many(), (0, 1e6), (1_000, 1e6)), feed((700_000, 1.0)), feed((5_000_000, 1.0))])
    events = event_table(**events)
    done = await ingest(
        events.iloc[:43], default_redis, settings=EAGER, detector=Detector(default_redis, settings=EAGER)
    )
    assert len(done.alerts) == 1
    await default_redis.flushall()
    done = await ingest(events, default_redis, settings=EAGER, detector=Detector(default_redis, settings=EAGER))
    assert (done.expired["cooldown"], done.expired["signal"]) == (1, 1)
    assert await default_redis.keys("alert:*") == await default_redis.keys("signal:*") == []


@pytest.mark.parametrize("profile", ["normal", "cascade"])
async def test_retention_costs_hardly_an_alert(default_redis: Redis, profile: str) -> None:
    found = await fidelity(synth(profile, hours=2, seed=1), default_redis)
    assert len(found.true) > 30
    assert found.precision is not None
    assert found.recall is not None
    assert min(found.precision, found.recall) >= 0.99
    assert found.identical >= 0.99 * len(found.true)


async def test_a_biased_method_misses_alerts_and_the_differing_ones_are_named(default_redis: Redis) -> None:
    events = synth("normal", hours=5, seed=1, symbols=4)  # busy ones: an hour has more than its 100 largest
    chosen = settings.load(detector={"volume_usd": 20_000.0})
    found = await fidelity(events, default_redis, method="topk", settings=chosen)
    assert found.recall is not None
    assert found.recall < 0.95
    missed = found.differing[found.differing["what"] == "missed"]
    assert len(missed) == found.as_dict()["missed"] > 0
    assert set(zip(missed["ts_ms_true"], missed["symbol"], strict=True)) <= set(
        zip(found.true["ts_ms"], found.true["symbol"], strict=True)
    )


async def test_methods_are_compared_on_the_symbols_of_the_feed(default_redis: Redis) -> None:
    events = synth("normal", hours=1, seed=1, symbols=6)
    steps: list[tuple[int, int]] = []
    found = await methods_compared(
        events, default_redis, methods=["logbins", "exact"], progress=lambda done, total: steps.append((done, total))
    )
    busiest = events["symbol"].value_counts().index[0]
    assert found["symbol"].iloc[0] == busiest
    assert set(found["method"]) == {"logbins", "exact"}
    assert (found.loc[found["method"] == "exact", "dollar_error_pct"] == 0).all()
    assert steps[-1][0] == steps[-1][1]
    assert await default_redis.keys("size:*") == await default_redis.keys("sketch:*") == []
    with pytest.raises(EventError, match="no events of NOBODY"):
        await methods_compared(events, default_redis, symbols=["NOBODY"])
    with pytest.raises(EventError, match="holds no event"):
        await methods_compared(events.iloc[:0], default_redis)


def test_alerts_less_than_a_cooldown_apart_are_the_same() -> None:
    def alerts(*rows: tuple[int, str]) -> pd.DataFrame:
        return table(Alert(s * 1000, "A", side, "okx", 1.0, 2.0, 3.0, 0.99, 5.0) for s, side in rows)

    true = alerts((0, "buy"), (700, "buy"), (1_400, "buy"), (0, "sell"))
    found = compare(alerts((599, "buy"), (1_300, "buy"), (2_000, "buy")), true, within_s=600)
    rows = [(row.what, row.delay_s) for row in found.pairs.fillna(0.0).itertuples() if row.side == "buy"]
    # 1,300 is as far from 700 as two alerts are: that one was missed.
    assert rows == [("same", 599.0), ("missed", 0.0), ("same", -100.0), ("extra", 0.0)]
    assert (found.precision, found.recall) == (2 / 3, 0.5)
    assert found.as_dict()["delay_worst_s"] == 599.0
    none = compare(alerts(), alerts(), within_s=600)
    assert (none.precision, none.recall, len(none.differing)) == (None, None, 0)
    only = compare(alerts(), true, within_s=600)
    assert (only.precision, only.recall, len(only.differing)) == (None, 0.0, 4)
    equal = compare(true, true, within_s=600)
    assert (equal.precision, equal.recall, equal.identical, len(equal.differing)) == (1.0, 1.0, 4, 0)


def test_an_alert_has_no_partner_of_another_symbol_or_side() -> None:
    rng = clock.generator(5)

    def alerts() -> pd.DataFrame:
        rows = zip(rng.integers(0, 5_000, 200), rng.choice(list("ABC"), 200), rng.choice(SIDES, 200), strict=True)
        return table(Alert(int(s) * 1000, name, side, "okx", 1.0, 2.0, 3.0, 0.99, 5.0) for s, name, side in rows)

    found, true = alerts(), alerts()
    pairs = compare(found, true, within_s=30).pairs
    assert pairs["ts_ms_true"].dropna().tolist() == true["ts_ms"].tolist()
    assert sorted(pairs["ts_ms_found"].dropna()) == sorted(found["ts_ms"])
    for (symbol, side), together in pairs.groupby(["symbol", "side"]):
        mine, theirs = (one[(one["symbol"] == symbol) & (one["side"] == side)] for one in (found, true))
        alone = compare(mine, theirs, within_s=30).pairs
        pd.testing.assert_frame_equal(together.reset_index(drop=True), alone, check_dtype=False)
        assert set(alone["what"]) == {"same", "missed", "extra"}
        assert alone["delay_s"].abs().max() < 30


# Killed


KILLED = {"detector": {"percentile": 50.0, "volume_usd": 0.0, "refresh_s": 1}, "retention": {"cooldown_s": 2}}
SYMBOLS = [f"S{i}" for i in range(12)]


def write_on(url: str, folder: str, place: int, life: int) -> None:
    """Write events that all differ, note each that was acknowledged, until killed."""

    async def run() -> None:
        chosen = settings.load(journal={"path": f"{folder}/journal-{place}.db"}, writer={"batch_ms": 5.0}, **KILLED)
        rng, number = clock.generator(1_000 * place + life), count(1_000_000 * (1_000 * place + life) + 1)
        with open(f"{folder}/acknowledged-{place}-{life}", "a", buffering=1) as noted:
            async with connect(url) as client, Writer(client, settings=chosen) as writer:
                while True:
                    sent = {}
                    for _ in range(20):
                        size = float(next(number))
                        symbol, side = str(rng.choice(SYMBOLS)), str(rng.choice(["buy", "sell"]))
                        price = float(np.round(rng.lognormal(3, 1), 2)) + 0.01
                        event = Event(clock.now_ms(), "okx", symbol, side, price, size, price * size)
                        sent[size] = await writer.write(event)
                    for size, acknowledged in sent.items():
                        await acknowledged
                        noted.write(f"{size:.0f}\n")

    asyncio.run(run())


def detect_on(url: str, folder: str, place: int, life: int) -> None:
    async def run() -> None:
        async with connect(url) as client:
            async for _ in Detector(client, settings=settings.load(**KILLED)).follow():
                pass

    asyncio.run(run())


@pytest.mark.timeout(120 + 30 * ROUNDS)
async def test_killed_writers_and_detectors_count_all_and_alert_once(
    default_server: Server, default_redis: Redis, tmp_path: Path
) -> None:
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.test_detector"])
    rng, lives = clock.generator(7), count()

    def start(place: int) -> multiprocessing.process.BaseProcess:
        target = write_on if place < 4 else detect_on
        process = forks.Process(target=target, args=(default_server.url, str(tmp_path), place, next(lives)))
        process.start()
        return process

    running, kills = [start(place) for place in range(8)], 0
    until_s = clock.elapsed_s() + 8 * ROUNDS
    await asyncio.sleep(2)
    while clock.elapsed_s() < until_s:
        await asyncio.sleep(float(rng.uniform(0.1, 0.4)))
        place = int(rng.integers(8))
        running[place].kill()
        running[place].join()
        running[place] = start(place)
        kills += 1
    for process in running:
        process.kill()
        process.join()

    for place in range(4):
        chosen = settings.load(journal={"path": tmp_path / f"journal-{place}.db"}, **KILLED)
        async with Writer(default_redis, settings=chosen) as writer:
            await writer.drain()
    events = await history(default_redis)
    acknowledged = {float(line) for file in tmp_path.glob("acknowledged-*") for line in file.read_text().split()}
    assert len(acknowledged) > 1_000
    assert events["size"].is_unique
    assert acknowledged <= set(events["size"])
    for symbol, mine in events.groupby("symbol", observed=True):
        counted = await quantiles.distribution(default_redis, str(symbol), end_ms=clock.now_ms() + clock.HOUR_MS)
        assert counted.count == len(mine)
    alerts = await signals(default_redis)
    assert len(alerts) > len(SYMBOLS)
    for _, raised in alerts.groupby(["symbol", "side"]):
        assert (np.diff(raised["ts_ms"]) >= 2_000).all()
    print(f"{kills} kills, {len(events)} events, {len(alerts)} alerts")
