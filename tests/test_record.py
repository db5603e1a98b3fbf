"""The recorder against a real websocket server on this machine; faults are real ones: kills, limits, a full pipe."""

import asyncio
import base64
import gzip
import json
import os
import re
import resource
import signal
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pandas as pd
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

import liqlab
from liqlab.cli import main
from liqlab.clock import now_ms
from liqlab.feeds.frames import Messages
from liqlab.record import VENUES, Recorder, RecordError, gaps
from liqlab.record.files import finish
from tests.feeds_samples import SAMPLES, frame

ROOT = Path(__file__).resolve().parents[1]
CAPTURED = ROOT.parent / "shared" / "feeds" / "recordings" / "captured_frames.jsonl"
# Which samples a venue's socket sends; the other forms come from REST or from other recorders.
SENT = {
    "binance": ("binance combined", "binance array", "binance coin-m"),
    "bybit": ("bybit pre-v5", "bybit"),
    "okx": ("okx",),
    "bitmex": ("bitmex",),
    "deribit": ("deribit",),
    "gate": ("gate",),
    "htx": ("htx",),
    "bitfinex": ("bitfinex",),
    "kraken": ("kraken",),
    "dydx": ("dydx",),
    "bitget": ("bitget",),
}
Script = Callable[[ServerConnection, int], Awaitable[None]]


def order(at: int, **fields: str) -> str:
    return json.dumps(frame(T=1_700_000_000_000 + at * 1500, **fields))


@asynccontextmanager
async def venue(script: Script) -> AsyncIterator[str]:
    """Serve `script(connection, number of the connection)` once the first request has come; yield the address."""
    count = 0

    async def handle(connection: ServerConnection) -> None:
        nonlocal count
        count += 1
        with suppress(ConnectionClosed):
            await script(connection, count)

    async with serve(handle, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@asynccontextmanager
async def recording(recorder: Recorder) -> AsyncIterator[None]:
    task = asyncio.create_task(recorder.run())
    try:
        yield
    finally:
        recorder.stop()
        await asyncio.wait_for(task, 60)


async def until(met: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not met():
            await asyncio.sleep(0.01)


def kept(folder: Path) -> list[bytes]:
    """All lines of whole files, in order; every file must be whole gzip and end with a line."""
    texts = [gzip.decompress(path.read_bytes()) for path in sorted(folder.glob("*.jsonl.gz"))]
    assert all(text.endswith(b"\n") for text in texts)
    return [line for text in texts for line in text.splitlines()]


def raws(folder: Path) -> list[object]:
    rows = [json.loads(line) for line in kept(folder)]
    return [row["raw"] for row in rows if "raw" in row]


def frames_of(name: str) -> list[str]:
    samples = [text for key, text in SAMPLES.items() if key.split()[0] == name and key in SENT[name]]
    captured = CAPTURED.read_text().splitlines() if CAPTURED.exists() else []
    lines = [line for text in samples for line in text.splitlines()]
    return lines + [line for line in captured if liqlab_format(line) == name]


def table(events: pd.DataFrame) -> pd.DataFrame:
    """Events in one order whatever file they come from; BitMEX's time is that of receipt."""
    plain = events.astype(dict.fromkeys(("exchange", "symbol", "side"), str))
    plain.loc[plain["exchange"] == "bitmex", "ts_ms"] = 0
    return plain.sort_values(list(plain.columns), ignore_index=True)


def liqlab_format(line: str) -> str:
    return str(Messages(None, None).read(json.loads(line))[0])


# What is recorded


async def test_every_venue_is_recorded_as_it_was_sent(tmp_path: Path) -> None:
    sent = {name: frames_of(name) for name in VENUES}
    assert all(sent.values())
    asked: dict[str, list[str]] = {name: [] for name in VENUES}

    async def script(connection: ServerConnection, _: int) -> None:
        name = connection.request.path.strip("/")
        await connection.send(json.dumps({"event": "info", "version": 2}))
        wanted = len(VENUES[name].subscribe(VENUES[name].symbols))
        for _ in range(wanted):
            asked[name].append(await connection.recv())
        for line in sent[name]:
            await connection.send(gzip.compress(line.encode()) if name == "htx" else line)
        await connection.wait_closed()

    async with venue(script) as url:
        recorder = Recorder(VENUES, tmp_path / "out", urls={name: f"{url}/{name}" for name in VENUES})
        begun = now_ms()
        async with recording(recorder):
            await until(lambda: all(recorder.status[name].frames > len(sent[name]) for name in VENUES))
    ended = now_ms()

    for name in VENUES:
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{begun}: {line}\n" for line in sent[name]))
        # Spacing and all: the frame's own text lies in the line.
        lines = [line for line in kept(tmp_path / "out") if line.startswith(b'{"recv_ts":')]
        for line in sent[name]:
            assert line.encode() in [one[len('{"recv_ts":1700000000000,"raw":') : -1] for one in lines]
        received = [json.loads(line)["recv_ts"] for line in lines]
        assert begun <= min(received) <= max(received) <= ended
    read = liqlab.read_feed(tmp_path / "out")
    plain = liqlab.read_feed([tmp_path / f"{name}.jsonl" for name in VENUES])
    assert read.report.rejected == plain.report.rejected
    assert (read.report.read, read.report.duplicates) == (plain.report.read, plain.report.duplicates)
    assert read.report.exchanges == sorted(VENUES)
    pd.testing.assert_frame_equal(table(read.events), table(plain.events))
    bitmex = read.events[read.events["exchange"] == "bitmex"]
    assert bitmex["ts_ms"].between(begun, ended).all()
    assert sum(status.events for status in recorder.status.values()) == read.report.read
    assert [len(asked[name]) for name in VENUES] == [
        len(VENUES[name].subscribe(VENUES[name].symbols)) for name in VENUES
    ]


async def test_malformed_frames_are_kept_and_counted(tmp_path: Path) -> None:
    good = order(1)
    pretty = json.dumps(frame(T=1_700_000_009_000), indent=1)
    damaged = gzip.compress(good.encode())[:-9]
    malformed = [good[:60], "", "nonsense", "é\n\x00", "{}}", "[1,2", b"\xff\xfe\x00", damaged, "123", '{"price":1}']
    wrong = order(2, S="SIDEWAYS")

    async def script(connection: ServerConnection, _: int) -> None:
        await connection.recv()
        for one in (*malformed, good, wrong, pretty, gzip.compress(order(3).encode())):
            await connection.send(one)
        await connection.wait_closed()

    async with venue(script) as url:
        recorder = Recorder(["binance"], tmp_path, urls={"binance": url})
        async with recording(recorder):
            await until(lambda: recorder.status["binance"].frames == len(malformed) + 4)
        status = recorder.status["binance"]
        assert (status.events, status.rejected, status.reconnects) == (4, len(malformed), 0)

    lines = [json.loads(line) for line in kept(tmp_path)]
    texts = [row["raw"] for row in lines if isinstance(row.get("raw"), str)]
    assert [text for text in texts if text != pretty] == [
        one for one in malformed if isinstance(one, str) and one not in ("{}", "123", '{"price":1}')
    ]
    assert [base64.b64decode(row["base64"]) for row in lines if "base64" in row] == [b"\xff\xfe\x00", damaged]
    feed = liqlab.read_feed(tmp_path)
    assert feed.report.accepted == 3
    assert feed.report.rejected_total == len(malformed) + 1


async def test_symbols_are_asked_for_in_the_spelling_of_the_venue(tmp_path: Path) -> None:
    asked: list[dict[str, object]] = []

    async def script(connection: ServerConnection, _: int) -> None:
        async for request in connection:
            asked.append(json.loads(request))
            await connection.send('{"success":true,"op":"subscribe"}')

    many = [f"S{at}USDT" for at in range(405)]
    async with venue(script) as url:
        recorder = Recorder(["binance", "bybit"], tmp_path, symbols={"binance": ["BTCUSDT"], "bybit": many},
                            urls={"binance": url, "bybit": url})  # fmt: skip
        async with recording(recorder):
            await until(lambda: len(asked) == 4)
    assert {"method": "SUBSCRIBE", "params": ["btcusdt@forceOrder"], "id": 1} in asked
    topics = [one["args"] for one in asked if "args" in one]
    assert sorted(map(len, topics)) == [5, 200, 200]
    assert sorted(topic for part in topics for topic in part) == sorted(f"allLiquidation.{name}" for name in many)
    assert json.loads(kept(tmp_path)[0])["symbols"] == ["BTCUSDT"]


async def test_a_refused_subscription_is_told(tmp_path: Path) -> None:
    told: list[str] = []

    async def script(connection: ServerConnection, _: int) -> None:
        await connection.recv()
        await connection.send('{"success":false,"ret_msg":"handler not found, topic:allLiquidation.XYZ"}')
        await connection.wait_closed()

    async with venue(script) as url:
        recorder = Recorder(["bybit"], tmp_path, urls={"bybit": url}, tell=told.append)
        async with recording(recorder):
            await until(lambda: told)
    assert "bybit refuses" in told[0]
    assert "allLiquidation.XYZ" in told[0]
    assert liqlab.read_feed(tmp_path).report.rejected_total == 0


# Holes


async def test_disconnects_leave_marked_holes_and_no_duplicates(tmp_path: Path) -> None:
    told: list[str] = []

    async def script(connection: ServerConnection, number: int) -> None:
        await connection.recv()
        for at in range(max(0, (number - 1) * 5 - 2), number * 5):  # two of the events before are sent again
            await connection.send(order(at))
        if number == 2:
            connection.transport.abort()
        elif number < 4:
            await connection.close(1012, "restart")
        await connection.wait_closed()

    async with venue(script) as url:
        recorder = Recorder(["binance"], tmp_path, urls={"binance": url}, reconnect_s=(0.02, 0.1), tell=told.append)
        async with recording(recorder):
            await until(lambda: recorder.status["binance"].events == 26)
            assert recorder.status["binance"].connected
        assert recorder.status["binance"].reconnects == 3

    feed = liqlab.read_feed(tmp_path)
    assert (feed.report.accepted, feed.report.duplicates, feed.report.rejected_total) == (20, 6, 0)
    assert feed.report.ignored == {"another channel: recording": 1, "another channel: gap": 5}
    found = gaps(tmp_path)
    assert found["reason"].iloc[[0, -1]].tolist() == ["start", "stop"]
    assert ["restart" in reason for reason in found["reason"]] == [False, True, False, True, False]
    holes = found[1:-1]
    assert (holes["to_ms"] > holes["from_ms"]).all()
    received = [json.loads(line)["recv_ts"] for line in kept(tmp_path) if line.startswith(b'{"recv_ts"')]
    for hole in holes.itertuples():
        assert not any(hole.from_ms < ms < hole.to_ms for ms in received)
        assert {hole.from_ms, hole.to_ms} <= set(received)
    assert sum("trying again" in sentence for sentence in told) == 3


async def test_a_silent_connection_is_dropped(tmp_path: Path) -> None:
    async def script(connection: ServerConnection, _: int) -> None:
        await connection.recv()
        await connection.send(order(1))
        await connection.wait_closed()

    async with venue(script) as url:
        recorder = Recorder(["binance"], tmp_path, urls={"binance": url}, silence_s=0.3, reconnect_s=(0.02, 0.1))
        async with recording(recorder):
            await until(lambda: recorder.status["binance"].frames == 2)
    assert "nothing came for 0.3 s" in set(gaps(tmp_path)["reason"])


async def test_heartbeats_keep_a_quiet_connection(tmp_path: Path) -> None:
    heard: dict[str, set[str]] = {"okx": set(), "bybit": set(), "htx": set()}

    async def script(connection: ServerConnection, _: int) -> None:
        name = connection.request.path.strip("/")
        await connection.recv()

        async def ask() -> None:
            for at in range(100):
                await connection.send(gzip.compress(b'{"op":"ping","ts":"%d"}' % at))
                await asyncio.sleep(0.1)

        asking = asyncio.create_task(ask()) if name == "htx" else None
        async for request in connection:
            heard[name].add(request)
            if request == "ping":
                await connection.send("pong")
            elif name == "bybit":
                await connection.send('{"success":true,"ret_msg":"pong","op":"ping"}')
        if asking:
            asking.cancel()

    async with venue(script) as url:
        recorder = Recorder(heard, tmp_path, urls={name: f"{url}/{name}" for name in heard}, silence_s=2)
        async with recording(recorder):
            await asyncio.sleep(3)
            assert [status.reconnects for status in recorder.status.values()] == [0, 0, 0]
    assert heard["okx"] == {"ping"}
    assert heard["bybit"] == {'{"op":"ping"}'}
    assert {'{"op":"pong","ts":"0"}', '{"op":"pong","ts":"3"}'} <= heard["htx"]
    report = liqlab.read_feed(tmp_path).report
    assert (report.read, report.rejected_total) == (0, 0)


async def test_reconnects_wait_longer_each_time(tmp_path: Path) -> None:
    told: list[str] = []
    recorder = Recorder(["okx"], tmp_path, urls={"okx": "ws://127.0.0.1:1"}, reconnect_s=(0.1, 0.4), tell=told.append)
    async with recording(recorder):
        await until(lambda: len(told) == 4)
    delays = [float(re.search(r"again in ([\d.]+) s", sentence)[1]) for sentence in told]
    for delay, longest in zip(delays, (0.1, 0.2, 0.4, 0.4), strict=True):
        assert longest / 2 - 0.06 < delay < longest + 0.06
    assert [(reason, to) for reason, to in gaps(tmp_path)[["reason", "to_ms"]].itertuples(index=False)] == [
        ("stop", pd.NA)
    ]


async def test_where_the_recorder_did_not_run_is_a_hole(tmp_path: Path) -> None:
    async def script(connection: ServerConnection, _: int) -> None:
        await connection.recv()
        await connection.send(order(1))
        await connection.wait_closed()

    async with venue(script) as url:
        for _ in range(2):
            recorder = Recorder(["binance"], tmp_path, urls={"binance": url})
            async with recording(recorder):
                await until(lambda now=recorder: now.status["binance"].frames)
            await asyncio.sleep(0.2)
    found = gaps(tmp_path)
    assert list(found["reason"]) == ["start", "start", "stop"]
    assert found["from_ms"].isna().tolist() == [True, False, False]
    assert 190 <= found["to_ms"][1] - found["from_ms"][1] < 10_000
    assert liqlab.read_feed(tmp_path).report.accepted == 1


# Files


async def test_files_rotate_on_the_clock(tmp_path: Path) -> None:
    async def script(connection: ServerConnection, _: int) -> None:
        await connection.recv()
        for at in range(1000):
            await connection.send(order(at))
            await asyncio.sleep(0.02)

    async with venue(script) as url:
        recorder = Recorder(["binance"], tmp_path, urls={"binance": url}, rotate_s=1, flush_s=0.1)
        async with recording(recorder):
            await until(lambda: len(list(tmp_path.glob("*.jsonl.gz"))) >= 2)
            # While it runs the folder reads as far as it is whole, and the rest is a .part.
            assert liqlab.read_feed(tmp_path).report.rejected_total == 0
            await until(lambda: len(list(tmp_path.glob("*.part"))) == 1)  # between two there is none
    paths = sorted(tmp_path.iterdir())
    assert len(paths) >= 3
    for path in paths:
        begun = re.fullmatch(r"binance-(\d{8}T\d{6})Z\.jsonl\.gz", path.name)[1]
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        assert lines[0] == {"channel": "recording", "venue": "binance", "symbols": "all"}
        seconds = {row["recv_ts"] // 1000 for row in lines if "recv_ts" in row}
        assert seconds == {pd.Timestamp(begun, tz="UTC").value // 10**9}
    report = liqlab.read_feed(tmp_path).report
    assert report.accepted == recorder.status["binance"].events
    assert recorder.files.files == len(paths)


class Process:
    """`liqlab record binance` or a few lines of Python, as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pid = process.pid

    @classmethod
    async def cli(cls, *words: str) -> "Process":
        return await cls.python("from liqlab.cli import main; main()", "record", *words)

    @classmethod
    async def python(cls, code: str, *words: str) -> "Process":
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(sys.executable, "-c", code, *words, stdout=pipe, stderr=pipe))

    async def end(self, number: int) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = await asyncio.wait_for(self.process.communicate(), 60)
        return self.process.returncode, out.decode(), err.decode()


class Counter:
    """A script that sends numbered events on one connection, and knows how many it has sent."""

    def __init__(self, pause_s: float, text: Callable[[int], str] = order) -> None:
        self.sent: list[int] = []  # when, ms since the epoch
        self.pause_s, self.text = pause_s, text

    async def __call__(self, connection: ServerConnection, _: int) -> None:
        await connection.recv()
        while True:
            await connection.send(self.text(len(self.sent)))
            self.sent.append(now_ms())
            await asyncio.sleep(self.pause_s)


async def test_a_kill_loses_a_second_at_most(tmp_path: Path) -> None:
    counter = Counter(0.01)
    async with venue(counter) as url:
        process = await Process.cli("binance", "--to", str(tmp_path), "--url", url)
        await until(lambda: len(counter.sent) >= 250)
        killed = now_ms()
        code, _, _ = await process.end(signal.SIGKILL)
        assert code == -signal.SIGKILL
        [part] = tmp_path.iterdir()
        assert part.name.endswith(".jsonl.gz.part")
        left = liqlab.read_feed(part)
        before = sum(ms < killed - 2000 for ms in counter.sent)
        assert 0 < before <= left.report.accepted <= len(counter.sent)
        assert left.report.rejected_total == 0
        # A kill within a write leaves half a member.
        with part.open("ab") as file:
            file.write(gzip.compress(order(999_999).encode() * 50)[:-20])

        process = await Process.cli("binance", "--to", str(tmp_path), "--url", url, "--json")
        await until(lambda: (tmp_path / part.name.removesuffix(".part")).exists())
        again = len(counter.sent)
        await until(lambda: len(counter.sent) > again + 20)
        code, out, err = await process.end(signal.SIGTERM)
        assert code == 0, err
        assert "left by a crash" in err
    assert not list(tmp_path.glob("*.part"))
    report = liqlab.read_feed(tmp_path).report
    assert report.rejected_total == 0
    assert json.loads(out)["venues"][0]["events"] + left.report.accepted == report.accepted
    assert list(gaps(tmp_path)["reason"]) == ["start", "start", "stop"]
    hole = gaps(tmp_path).iloc[1]
    assert hole["from_ms"] <= killed <= hole["to_ms"]


MORE = gzip.compress(b"".join(order(at).encode() + b"\n" for at in range(100, 200)))


@pytest.mark.parametrize(
    ("tail", "damaged"),
    [
        (b"", False),
        (MORE[: len(MORE) // 2], False),  # killed within a write
        (bytes(40), True),  # what a power cut may leave
        (b"\x1f\x8b\x08garbage" + MORE, True),
    ],
    ids=["whole", "cut", "zeros", "garbage"],
)
def test_a_file_left_by_a_crash_is_finished(tmp_path: Path, tail: bytes, damaged: bool) -> None:
    name = "binance-20261009T100000Z.jsonl.gz"
    content = b"".join(gzip.compress(order(at).encode() + b"\n") for at in range(6)) + tail
    (tmp_path / f"{name}.part").write_bytes(content)
    assert finish(tmp_path / f"{name}.part") is damaged
    assert {path.name for path in tmp_path.iterdir()} == {name} | ({f"{name}.damaged"} if damaged else set())
    report = liqlab.read_feed(tmp_path).report
    assert report.rejected_total == 0
    assert report.accepted == len(kept(tmp_path))
    assert 6 + 20 * (tail == MORE[: len(MORE) // 2]) <= report.accepted < 106
    if damaged:
        assert (tmp_path / f"{name}.damaged").read_bytes() == content


async def test_a_stop_leaves_whole_files_and_says_what_was_recorded(tmp_path: Path) -> None:
    async def stopped(number: int) -> None:
        folder, counter = tmp_path / str(number), Counter(0.01)
        async with venue(counter) as url:
            process = await Process.cli("binance", "--to", str(folder), "--url", f"binance={url}", "--rotate", "1s")
            await until(lambda: len(counter.sent) >= 20)
            code, out, err = await process.end(number)
        assert code == 0, err
        told = re.search(r"binance ([\d,]+) events, last frame [\d.]+ s ago; [\d.]+ \w+ in \d files", out)
        assert told, out
        assert int(told[1].replace(",", "")) == liqlab.read_feed(folder).report.accepted >= 20
        assert not list(folder.glob("*.part"))

    await asyncio.gather(stopped(signal.SIGINT), stopped(signal.SIGTERM))


async def test_a_second_recorder_leaves_the_first_ones_file_alone(tmp_path: Path) -> None:
    counter = Counter(0.01)
    told: list[str] = []
    async with venue(counter) as url:
        first, second = (
            Recorder(["binance"], tmp_path, urls={"binance": url}, flush_s=0.1, tell=told.append) for _ in range(2)
        )
        async with recording(first):
            await until(lambda: first.files.written > 500)
            async with recording(second):
                await until(lambda: second.files.written > 500)
                assert len(list(tmp_path.glob("*.part"))) == 2
            assert len(list(tmp_path.glob("*.part"))) == 1
            events = first.status["binance"].events
            await until(lambda: first.status["binance"].events > events + 10)
    assert told == []
    report = liqlab.read_feed(tmp_path).report
    assert report.accepted + report.duplicates == sum(one.status["binance"].events for one in (first, second))


# A disk that does not keep up

SMALL_QUEUE = """
import asyncio, sys
from liqlab.record import Recorder
async def main():
    recorder = Recorder(["binance"], sys.argv[1], urls={"binance": sys.argv[2]}, flush_s=0.05, queue_bytes=20_000,
                        tell=lambda text: print(text, file=sys.stderr, flush=True))
    asyncio.get_running_loop().add_signal_handler(15, recorder.stop)
    running = asyncio.ensure_future(recorder.run())
    while not running.done():
        status = recorder.status["binance"]
        print(status.frames, status.lost, recorder.files.problem, flush=True)
        await asyncio.sleep(0.05)
    await running
    print(status.frames, status.lost, recorder.files.problem, flush=True)
asyncio.run(main())
"""


async def reach(process: Process, met: Callable[[int, int, str], bool]) -> tuple[int, int, str]:
    """Read (frames, lost, problem) from the process until `met`."""
    async with asyncio.timeout(60):
        while line := (await process.process.stdout.readline()).decode():
            frames, lost, problem = line.rstrip("\n").split(" ", 2)
            if met(int(frames), int(lost), problem):
                return int(frames), int(lost), problem
    raise AssertionError((await process.process.stderr.read()).decode())


def noise(at: int) -> str:
    return order(at, note=os.urandom(150).hex())  # hardly smaller when packed


async def test_a_full_disk_costs_frames_that_are_counted(tmp_path: Path) -> None:
    counter = Counter(0.002, noise)
    async with venue(counter) as url:
        process = await Process.python(SMALL_QUEUE, str(tmp_path), url)
        await reach(process, lambda frames, lost, problem: frames > 0)
        # As a full disk: from here on no file of this process grows.
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))
        received, _, problem = await reach(process, lambda frames, lost, problem: lost > 100)
        assert problem == f"cannot write into {tmp_path}: File too large"
        await reach(process, lambda frames, lost, problem: frames > received + 50)  # it goes on receiving
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        received, *_ = await reach(process, lambda frames, lost, problem: not problem)
        await reach(process, lambda frames, lost, problem: frames > received + 50)
        code, out, err = await process.end(signal.SIGTERM)
    assert code == 0, err
    frames, lost, _ = out.splitlines()[-1].split(" ", 2)
    assert re.search("cannot write into .* File too large; trying again", err)
    assert err.count("cannot write") == 1
    assert "writing into" in err
    found = gaps(tmp_path)
    slow = found[found["reason"] == "the disk did not keep up"]
    assert slow["lost"].sum() == int(lost) > 100
    assert len(raws(tmp_path)) == int(frames) - int(lost)
    report = liqlab.read_feed(tmp_path).report
    assert (report.rejected_total, report.ignored["another channel: gap"]) == (0, len(slow) + 2)


async def test_a_slow_disk_never_stops_the_receiving(tmp_path: Path) -> None:
    """The file is a pipe that nobody empties for a while: the write hangs in the kernel."""
    counter = Counter(0.002, noise)
    pipes = []
    for second in range(now_ms() // 1000, now_ms() // 1000 + 90):
        pipes.append(tmp_path / f"binance-{pd.Timestamp(second, unit='s'):%Y%m%dT%H%M%SZ}.jsonl.gz.part")
        os.mkfifo(pipes[-1])
    ends = [os.open(pipe, os.O_RDWR | os.O_NONBLOCK) for pipe in pipes]
    data = b""

    def drain() -> None:
        nonlocal data
        for end in ends:
            with suppress(BlockingIOError):
                while piece := os.read(end, 1 << 16):
                    data += piece

    async with venue(counter) as url:
        process = await Process.python(SMALL_QUEUE, str(tmp_path), url)
        stalled, _, problem = await reach(process, lambda frames, lost, problem: lost > 100)
        assert problem == ""
        await reach(process, lambda frames, lost, problem: frames > stalled + 100)  # it goes on receiving
        deadline = time.monotonic() + 60
        while b'"lost":' not in (lines := unpacked(data)).replace(b'"lost":null', b"") and time.monotonic() < deadline:
            drain()
            await asyncio.sleep(0.02)
        await process.end(signal.SIGKILL)
    for end in ends:
        os.close(end)
    counts = [json.loads(line)["lost"] for line in lines.splitlines() if b'"the disk did not keep up"' in line]
    assert sum(counts) > 100
    assert lines.count(b'"recv_ts"') > 40


def unpacked(data: bytes) -> bytes:
    """Unpack whole members."""
    text, inflater = b"", zlib.decompressobj(31)
    while data:
        text += inflater.decompress(data)
        if not inflater.eof:
            break
        data, inflater = inflater.unused_data, zlib.decompressobj(31)
    return text


# What is refused


def test_what_cannot_be_recorded_is_said_in_a_sentence(tmp_path: Path) -> None:
    for words, message in (
        ((["bynance"],), "venue 'bynance' is not known; use one of binance"),
        (([],), "no venue is named"),
        ((["okx"], {"symbols": {"okx": ["BTC"]}}), "okx has one channel for all symbols"),
        ((["okx"], {"urls": {"bybit": "ws://x"}}), "'bybit', which is not among okx"),
        ((["okx"], {"urls": {"okx": "http://x"}}), "'http://x' of okx is none of a websocket"),
        ((["okx"], {"rotate_s": 0.5}), "rotate_s=0.5 is too short"),
    ):
        names, options = (*words, {})[:2]
        with pytest.raises(RecordError, match=re.escape(message)):
            Recorder(names, tmp_path, **options)


def test_the_command_refuses_what_it_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, code, message in (
        (["bynance"], 1, f"liqlab: venue 'bynance' is not known; use one of {', '.join(VENUES)}\n"),
        (["okx", "--rotate", "soon"], 2, "'soon': a number and a unit"),
        (["okx", "bybit", "--symbols", "BTCUSDT"], 2, "okx=BTCUSDT"),
    ):
        monkeypatch.setattr(sys, "argv", ["liqlab", "record", *words, "--to", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code, message in capsys.readouterr().err) == (code, True)
    assert not (tmp_path / "out").exists()


def test_the_documentation_names_every_address() -> None:
    text = (ROOT / "docs" / "recording.md").read_text()
    for one in VENUES.values():
        assert f"| `{one.name}` | `{one.url}` |" in text
        assert all(symbol in text for symbol in one.symbols), one.name
