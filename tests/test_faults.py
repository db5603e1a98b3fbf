"""Nothing accepted is lost and nothing is counted twice, whatever happens to the server while events are written.

FAULT_ROUNDS=20 repeats every fault so often, each time at another moment, with the long silences of issue #3.
"""

import asyncio
import math
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, note
from hypothesis import settings as effort
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from redis.asyncio import Redis

from liqlab import clock, quantiles, settings
from liqlab.archive import history
from liqlab.breaker import State
from liqlab.candles import WIDTHS, candles
from liqlab.events import Event, EventError, event_table
from liqlab.server import Server, connect, serve
from liqlab.writer import Writer, WriterError
from tests.test_writer import T0, hashes, plain

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "1"))
EVENTS = 200_000
NOEVICTION = settings.load(server={"maxmemory_policy": "noeviction"})
FROZEN_S, REFUSED_S = (5.0, 10.0) if ROUNDS > 1 else (2.0, 2.0)


def numbered(n: int, start: int = 0) -> pd.DataFrame:
    """Events that all differ, so that one twice cannot hide."""
    rng = clock.generator(start)
    number = np.arange(start, start + n)
    price = np.round(rng.lognormal(3, 1, n), 2) + 0.01
    symbols = [f"S{i}USDT" for i in rng.zipf(1.5, n) % 60]
    return event_table(
        T0 + number // 2, ["okx"] * n, symbols, rng.choice(["buy", "sell"], n), price, number + 1.0, price
    )


def chosen(tmp_path: Path, **changes: dict[str, object]) -> settings.Settings:
    sections: dict[str, dict[str, object]] = {
        "journal": {"path": tmp_path / "journal.db", "max_bytes": "256mb"},
        "writer": {"bulk_events": 1_000, "check_s": 0.1},
        "retention": {"hot_s": 10**7},
    }
    return settings.load(**{name: sections.get(name, {}) | changes.get(name, {}) for name in {*sections, *changes}})


class Proxy:
    """A socket before the server's, on which things can go wrong."""

    def __init__(self, upstream: Path, path: Path) -> None:
        self.upstream, self.path = upstream, path
        self.url = f"unix://{path}"
        self.lose_replies = self.cut_requests = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        self._server = await asyncio.start_unix_server(self._accept, self.path)

    async def refuse(self) -> None:
        """Hang up, and answer no more."""
        self._server.close()
        for writer in list(self._open):
            writer.close()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            up_reader, up_writer = await asyncio.open_unix_connection(self.upstream)
        except OSError:
            writer.close()
            return
        both = (writer, up_writer)
        self._open |= set(both)
        for source, target, request in ((reader, up_writer, True), (up_reader, writer, False)):
            task = asyncio.create_task(self._pump(source, target, both, request))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        both: tuple[asyncio.StreamWriter, ...],
        request: bool,
    ) -> None:
        with suppress(OSError):
            while data := await source.read(1 << 16):
                if request and self.cut_requests and len(data) > 2_000:
                    self.cut_requests -= 1
                    target.write(data[: len(data) // 2])
                    await target.drain()
                    break
                if not request and self.lose_replies:
                    self.lose_replies -= 1
                    break
                target.write(data)
                await target.drain()
        for writer in both:
            self._open.discard(writer)
            writer.close()


@asynccontextmanager
async def through_proxy(server: Server, tmp_path: Path, **kw: object) -> AsyncIterator[tuple[Proxy, Redis]]:
    proxy = Proxy(server.socket, tmp_path / "proxy.sock")
    await proxy.listen()
    try:
        async with connect(proxy.url, socket_timeout=1.0, **kw) as client:
            yield proxy, client
    finally:
        await proxy.refuse()


async def drained(writer: Writer) -> None:
    """Wait until the server has everything."""
    for _ in range(600):
        with suppress(WriterError):
            await writer.drain()
            return
        await asyncio.sleep(0.05)
    await writer.drain()


async def all_there(redis: Redis, writer: Writer, events: pd.DataFrame) -> None:
    """Every event once in the streams, and once in every sum."""
    counts = writer.counts
    assert (counts.offered, counts.written, writer.journaled, writer.waiting) == (len(events), len(events), 0, 0)
    pd.testing.assert_frame_equal(plain(await history(redis)), plain(events), check_dtype=False)
    vwaps = await hashes(redis, "vwap:*")
    grouped = events.assign(value=events["price"] * events["size"]).groupby("symbol", observed=True)
    assert len(vwaps) == grouped.ngroups
    for symbol, part in grouped:
        got = vwaps[f"vwap:{symbol}"]
        assert got["count"] == len(part)
        assert math.isclose(got["price_sum"], math.fsum(part["value"]), rel_tol=1e-9)
        assert math.isclose(got["volume_sum"], math.fsum(part["size"]), rel_tol=1e-9)
        sketch = await redis.hvals(f"sketch:{symbol}")
        assert sum(quantiles.unpack(field)[1].sum() for field in sketch) == len(part)
        for width in WIDTHS:
            assert (await candles(redis, symbol, width=width))["count"].sum() == len(part)


async def ingest(writer: Writer, events: pd.DataFrame, seed: int, fault: Callable[[], Awaitable[None]]) -> None:
    """Write `events`, and let the fault happen when a random part of them is through."""
    moment = int(clock.generator(seed).uniform(0.05, 0.9) * len(events))
    happened = None
    async for _, stop in writer.write_slices(events, [*range(2_000, len(events), 2_000), len(events)]):
        if happened is None and stop >= moment:
            happened = asyncio.create_task(fault())
        await asyncio.sleep(0)
    assert happened is not None
    await happened
    await drained(writer)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(ROUNDS))
async def test_a_server_that_is_killed_and_comes_back_empty(seed: int, tmp_path: Path, default_server: Server) -> None:
    events, server = numbered(EVENTS), serve(binary=default_server.binary)
    again: list[subprocess.Popen[bytes]] = []
    try:
        own = chosen(tmp_path, journal={"path": tmp_path / "journal.db", "mode": "wal", "max_bytes": "256mb"})
        async with server.connect(socket_timeout=1.0) as client:
            writer = Writer(client, settings=own)

            async def fault() -> None:
                server.kill()
                await asyncio.sleep(0.3)
                again.append(
                    subprocess.Popen([server.binary, "redis.conf"], cwd=server.folder, stdout=subprocess.DEVNULL)
                )

            await ingest(writer, events, seed, fault)
            assert writer.counts.memory_lost == 1
            # Reading everything back is no part of the fault: on a busy machine a reply can take more than 1 s.
            async with server.connect() as reader:
                await all_there(reader, writer, events)
            writer.close()
    finally:
        for process in again:
            process.kill()
            process.wait()
        server.stop()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("fault", ["reply lost", "cut", "frozen", "refused", "full"])
async def test_faults_of_the_way_and_of_the_server(
    fault: str, seed: int, tmp_path: Path, default_server: Server
) -> None:
    events = numbered(EVENTS)
    with serve(
        binary=default_server.binary, settings=settings.load(server={"maxmemory_policy": "noeviction"})
    ) as server:
        async with through_proxy(server, tmp_path) as (proxy, client), server.connect() as direct:
            writer = Writer(client, settings=chosen(tmp_path))

            async def happen() -> None:
                if fault == "reply lost":
                    proxy.lose_replies = 4
                elif fault == "cut":
                    proxy.cut_requests = 4
                elif fault == "frozen":
                    os.kill(server.pid, signal.SIGSTOP)
                    await asyncio.sleep(FROZEN_S)
                    os.kill(server.pid, signal.SIGCONT)
                elif fault == "refused":
                    await proxy.refuse()
                    await asyncio.sleep(REFUSED_S)
                    await proxy.listen()
                else:
                    used = int((await direct.info("memory"))["used_memory"])
                    # Below what is used: a script's garbage counts, and is gone again by the next batch.
                    await direct.config_set("maxmemory", int(0.9 * used))
                    await asyncio.sleep(1.5)
                    await direct.config_set("maxmemory", "240mb")

            await ingest(writer, events, seed, happen)
            assert writer.breaker is not None
            assert writer.counts.resent + writer.breaker.counters["closed->open"] >= 1
            await all_there(direct, writer, events)
            writer.close()


async def test_a_writer_that_is_started_again_goes_on_where_the_last_one_was(
    tmp_path: Path, default_server: Server, default_redis: Redis
) -> None:
    """The reply to the last batch was lost for good: the journal has it, Redis has it too, and it counts once."""
    events, own = numbered(3_000), chosen(tmp_path)
    async with through_proxy(default_server, tmp_path) as (proxy, client):
        first = Writer(client, settings=own)
        await first.write_table(events.iloc[:1_000])
        proxy.lose_replies = 3  # as many as there are attempts
        await first.write_table(events.iloc[1_000:2_000])
        assert (first.counts.written, first.journaled) == (1_000, 1_000)
        assert len(await history(default_redis)) == 2_000
        first.close()
        second = Writer(client, settings=own)
        assert second.journaled == 1_000
        await second.write_table(events.iloc[2_000:])
        await drained(second)
        assert (second.counts.offered, second.counts.written) == (2_000, 2_000)
        pd.testing.assert_frame_equal(plain(await history(default_redis)), plain(events), check_dtype=False)
        second.close()


async def test_a_process_that_is_started_again_fills_a_server_that_lost_its_memory(
    tmp_path: Path, default_redis: Redis
) -> None:
    events = numbered(2_000)
    own = chosen(tmp_path, journal={"path": tmp_path / "journal.db", "mode": "wal", "max_bytes": "64mb"})
    first = Writer(default_redis, settings=own)
    await first.write_table(events.iloc[:1_500])
    first.close()
    await default_redis.flushall()
    second = Writer(default_redis, settings=own)
    await second.write_table(events.iloc[1_500:])
    await drained(second)
    assert second.counts.memory_lost == 1
    pd.testing.assert_frame_equal(plain(await history(default_redis)), plain(events), check_dtype=False)
    second.close()


async def test_an_error_while_the_journal_is_drained_is_one_of_the_writer(
    tmp_path: Path, fresh_server: Callable[..., Server]
) -> None:
    """One that says nothing of the server's state: the breaker stays closed, and what waits goes on waiting."""
    events, own = numbered(2_000), chosen(tmp_path)
    async with fresh_server().connect() as client:
        writer = Writer(client, settings=own)
        await client.config_set("maxmemory", "1")
        await writer.write_table(events)
        await client.config_set("maxmemory", "240mb")
        await client.set("liqid", "not a list")
        assert writer.breaker is not None
        while await writer.breaker.check(client) is not State.CLOSED:  # it opened, and has its rest first
            await asyncio.sleep(0.05)
        with pytest.raises(WriterError, match=r"WRONGTYPE.*2000 events wait"):
            await writer.drain()
        await client.delete("liqid")
        await drained(writer)
        await all_there(client, writer, events)
        writer.close()


async def test_half_open_lets_critical_events_through_and_keeps_the_order_of_the_rest(
    tmp_path: Path, fresh_server: Callable[..., Server]
) -> None:
    server = fresh_server(settings=settings.load(server={"maxmemory": "32mb", "maxmemory_policy": "noeviction"}))
    rows = list(Event.rows(numbered(300)))
    own = chosen(tmp_path, writer={"batch_events": 10, "batch_ms": 10, "check_s": 0.02})
    async with server.connect() as client, Writer(client, settings=own) as writer:
        assert writer.breaker is not None
        await asyncio.gather(*[await writer.write(row) for row in rows[:100]])
        await client.setrange("temp:ballast", 6_000_000, "x")  # beside which what clients take is little
        used = int((await client.info("memory"))["used_memory"])
        await client.config_set("maxmemory", int(used / 0.925))
        await asyncio.sleep(0.05)
        told = [await writer.write(row, critical=i % 5 == 0) for i, row in enumerate(rows[100:200])]
        await asyncio.gather(*told)  # in Redis, or safe in the journal
        assert writer.breaker.state is State.HALF_OPEN
        assert (writer.counts.written, writer.journaled) == (120, 80)
        assert sorted((await history(client))["size"]) == [float(n + 1) for n in (*range(100), *range(100, 200, 5))]

        await client.config_set("maxmemory", "32mb")
        await asyncio.gather(*[await writer.write(row) for row in rows[200:]])
        await drained(writer)
        assert writer.breaker.state is State.CLOSED
        assert writer.counts.written == writer.counts.offered == 300
        pd.testing.assert_frame_equal(plain(await history(client)), plain(numbered(300)), check_dtype=False)
        assert await client.hkeys(next(iter(await client.keys("liqw:*")))) == [b"seq"]


@pytest.mark.parametrize("mode", ["spool", "wal"])
async def test_an_error_that_is_no_fault_of_the_server_is_raised_and_counted_once(
    mode: str, tmp_path: Path, default_redis: Redis
) -> None:
    """A stranger's key under one of our names: the batch waits, and is written once it is gone."""
    own = chosen(tmp_path, journal={"path": tmp_path / "journal.db", "mode": mode, "max_bytes": "64mb"})
    events = numbered(500)
    await default_redis.set("liqid", "not a list")
    writer = Writer(default_redis, settings=own)
    for _ in range(2):
        with pytest.raises(WriterError, match=r"WRONGTYPE"):
            await writer.write_table(events) if not writer.counts.offered else await writer.flush()
        assert writer.counts.offered == writer.journaled + writer.waiting == 500
    await default_redis.delete("liqid")
    await drained(writer)
    await all_there(default_redis, writer, events)
    writer.close()


async def test_a_full_journal_refuses_and_says_how_much_waits(tmp_path: Path, default_server: Server) -> None:
    events = numbered(100_000)
    own = chosen(tmp_path, journal={"path": tmp_path / "journal.db", "max_bytes": "1mb"})
    with serve(binary=default_server.binary) as server:
        async with through_proxy(server, tmp_path) as (proxy, client):
            writer = Writer(client, settings=own)
            await proxy.refuse()
            with pytest.raises(WriterError, match=r"journal.*events wait"):
                await writer.write_table(events)
            reached = writer.counts.offered
            assert 0 < writer.journaled < reached == writer.journaled + writer.waiting < len(events)
            await proxy.listen()
            await drained(writer)
            await writer.write_table(events.iloc[reached:])
            await drained(writer)
            async with server.connect() as direct:
                await all_there(direct, writer, events)
            writer.close()


class Accounts(RuleBasedStateMachine):
    """offered = written + journaled + rejected + waiting, after every step of any sequence of work and faults."""

    server: Server
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.events: list[pd.DataFrame] = []
        self.number = 0
        for path in self.folder.glob("*"):
            path.unlink()
        self.proxy = Proxy(self.server.socket, self.folder / "proxy.sock")
        self.run(self.start())

    def run(self, work: Awaitable[None]) -> None:
        self.loop.run_until_complete(work)

    async def start(self) -> None:
        await self.proxy.listen()
        self.refused = False
        self.direct = self.server.connect()
        await self.direct.flushall()
        await self.direct.config_set("maxmemory", "240mb")
        self.client = connect(self.proxy.url, socket_timeout=0.5)
        journal = {"path": self.folder / "journal.db", "max_bytes": "1mb"}
        own = chosen(self.folder, journal=journal, writer={"check_s": 0.01, "batch_ms": 1, "bulk_events": 300})
        self.writer = await Writer(self.client, settings=own).__aenter__()

    def fresh(self, n: int) -> pd.DataFrame:
        events = numbered(n, self.number)
        self.number += n
        return events

    @rule(n=st.integers(1, 3_000))
    def table(self, n: int) -> None:
        async def work() -> None:
            events, before = self.fresh(n), self.writer.counts.offered
            with suppress(WriterError):
                await self.writer.write_table(events)
            self.events.append(events.iloc[: self.writer.counts.offered - before])

        self.run(work())

    @rule(n=st.integers(1, 120), critical=st.booleans(), bad=st.booleans())
    def live(self, n: int, critical: bool, bad: bool) -> None:
        async def work() -> None:
            events = self.fresh(n)
            for row in Event.rows(events):
                await self.writer.write(row, critical=critical)
                self.check()
            self.events.append(events)
            if bad:
                with pytest.raises(EventError):
                    await self.writer.write(row._replace(price=-1.0))

        self.run(work())

    @rule(seconds=st.floats(0, 0.05))
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule(replies=st.integers(0, 4), requests=st.integers(0, 2))
    def cut(self, replies: int, requests: int) -> None:
        self.proxy.lose_replies, self.proxy.cut_requests = replies, requests

    @rule()
    def hang_up_or_come_back(self) -> None:
        self.run(self.proxy.listen() if self.refused else self.proxy.refuse())
        self.refused = not self.refused

    @rule(full=st.sampled_from([0.5, 0.93, 1.2]))
    def memory(self, full: float) -> None:
        async def work() -> None:
            used = int((await self.direct.info("memory"))["used_memory"])
            await self.direct.config_set("maxmemory", int(used / full))

        self.run(work())

    @rule()
    def flush(self) -> None:
        async def work() -> None:
            with suppress(WriterError):
                await self.writer.flush()

        self.run(work())

    @invariant()
    def check(self) -> None:
        if hasattr(self, "writer"):
            counts = self.writer.counts
            note(f"{counts} journaled={self.writer.journaled} waiting={self.writer.waiting}")
            assert counts.offered == counts.written + counts.rejected + self.writer.journaled + self.writer.waiting

    def teardown(self) -> None:
        async def work() -> None:
            self.proxy.lose_replies = self.proxy.cut_requests = 0
            if self.refused:
                await self.proxy.listen()
            await self.direct.config_set("maxmemory", "240mb")
            await drained(self.writer)
            self.check()
            await self.writer.__aexit__(None, None, None)
            found = plain(await history(self.direct))
            expected = plain(pd.concat(self.events)) if self.events else found.iloc[:0]
            pd.testing.assert_frame_equal(found, expected, check_dtype=False)
            await self.client.aclose()
            await self.direct.aclose()
            await self.proxy.refuse()

        try:
            self.run(work())
        finally:
            self.loop.close()


@pytest.mark.timeout(300)
def test_the_account_holds_at_every_step(tmp_path: Path, default_server: Server) -> None:
    with serve(
        binary=default_server.binary, settings=settings.load(server={"maxmemory_policy": "noeviction"})
    ) as server:
        machine = type("Accounts", (Accounts,), {"server": server, "folder": tmp_path})
        run_state_machine_as_test(
            machine,
            settings=effort(
                max_examples=15 * ROUNDS,
                stateful_step_count=15,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
