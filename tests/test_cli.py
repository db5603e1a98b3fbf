import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from redis.asyncio import Redis
from typer.main import get_command

from liqlab import clock, synth
from liqlab.cli import OVER_BUDGET, app, main
from liqlab.cli.terminal import wait
from liqlab.events import Event
from liqlab.server import Server
from liqlab.writer import Writer

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = str(ROOT / "data" / "normal-6h.jsonl.gz")
FRAME = (
    '{"e":"forceOrder","E":1568014460893,"o":{"s":"%s","S":"SELL","o":"LIMIT","f":"IOC","q":"0.014","p":"9910",'
    '"ap":"9910","X":"FILLED","l":"0.014","z":"0.014","T":%d}}\n'
)


def liqlab(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from liqlab.cli import main; main()", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", **environment},
        timeout=110,
        cwd=ROOT,
    )


@pytest.fixture
def feed(tmp_path: Path) -> str:
    path = tmp_path / "feed.jsonl"
    path.write_text("".join(FRAME % (f"S{i % 5}USDT", 1568014460893 + i * 977) for i in range(200)) + "garbage\n")
    return str(path)


def commands() -> dict[str, str]:
    root = get_command(app)
    found = {}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        for inner, sub in getattr(command, "commands", {"": command}).items():
            found[f"{name} {inner}".strip()] = sub.help
    return found


def test_every_command_is_documented_and_shows_an_example() -> None:
    documented = re.findall(r"^## liqlab (.+)$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(commands())
    for name, text in commands().items():
        assert f"liqlab {name}" in text.split("Example:")[1], name


@pytest.mark.parametrize(
    "name",
    [
        "serve",
        "ingest",
        "feeds inspect",
        "synth",
        "doctor",
        "quantiles",
        "detect",
        "replay",
        "size",
        "tune",
        "recommend",
    ],
)
def test_the_documented_example_runs(name: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "cli.md").read_text().split(f"## liqlab {name}\n")[1]
    _, *words = shlex.split(re.search(r"^\$ (.+)$", text, re.MULTILINE)[1])
    words = [word.replace("build/", f"{tmp_path}/") for word in words]
    done = liqlab(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_inspect_gives_an_account(feed: str) -> None:
    done = liqlab("feeds", "inspect", feed, "--json")
    report = json.loads(done.stdout)
    assert (report["read"], report["accepted"], report["rejected_total"]) == (201, 200, 1)
    assert done.stderr == ""
    assert "200" in liqlab("feeds", "inspect", "--feed", feed).stdout


def test_detect_says_what_another_method_would_have_missed() -> None:
    done = liqlab("detect", SAMPLE, "--method", "topk", "--json")
    found = json.loads(done.stdout)
    assert len(found["alerts"]) == found["fidelity"]["same"] + found["fidelity"]["extra"]
    assert found["fidelity"]["recall"] < 0.95
    unknown = liqlab("detect", SAMPLE, "--method", "median")
    assert (unknown.returncode, "logbins" in unknown.stderr) == (2, True)


def test_replay_says_what_was_lost_and_what_was_missed() -> None:
    done = liqlab("replay", SAMPLE, "--percentile", "90", "--set", "retention.shared_maxlen=5000", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["events_lost"] == found["lost"]["trimmed"] > 0
    assert {row["percentile"] for row in found["errors"]} == {90}
    assert found["fidelity"]["recall"] > 0.99
    wrong = liqlab("replay", SAMPLE, "--percentile", "100")
    assert (wrong.returncode, "between 0 and 100" in wrong.stderr) == (2, True)


async def test_detect_follows_a_running_server(default_server: Server, default_redis: Redis) -> None:
    eager = ("--set", "detector.percentile=50", "--set", "detector.volume_usd=1000")
    command = [sys.executable, "-c", "from liqlab.cli import main; main()", "detect", *eager]
    environment = {**os.environ, "LIQLAB_REDIS_URL": default_server.url}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert "Ctrl-C" in process.stderr.readline()
            now_ms = clock.now_ms()
            async with Writer(default_redis) as writer:
                for i in range(20):
                    await writer.write(Event(now_ms - 120_000 + i, "okx", "A", "buy", 1.0, 1.0, 1.0))
                await writer.flush()
                await writer.write(Event(now_ms, "okx", "B[red]", "sell", 1e6, 1.0, 1e6))  # has no history
                await writer.write(Event(now_ms, "okx", "A", "sell", 1e6, 1.0, 1e6))
            assert re.search(r"A sell +1,000,000 USD at 1000000 .*100.0 %", process.stdout.readline())
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


def test_a_column_map_reads_any_table(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("when,what,way,paid,amount\n1700000000000,BTCUSDT,sell,50000,0.5\n")
    done = liqlab(
        "feeds", "inspect", str(path), "--json",
        "--map", "ts_ms=when,symbol=what,side=way,price=paid,size=amount", "--unit", "base", "--exchange", "binance",
    )  # fmt: skip
    assert json.loads(done.stdout)["accepted"] == 1


def test_codecs_are_compared_on_a_feed(feed: str) -> None:
    rows = {row["codec"]: row for row in json.loads(liqlab("codecs", "--feed", feed, "--json").stdout)}
    assert rows["struct19"]["bytes"] == 19
    assert all(row["carried_pct"] == 100 and row["encode_us"] > 0 < row["decode_us"] for row in rows.values())
    assert rows["block"]["bytes"] < rows["ints"]["bytes"] < rows["fields"]["bytes"] < rows["json"]["bytes"]
    assert "bytes/event" in liqlab("codecs", feed).stdout


async def test_ingest_and_budget_use_the_named_server(feed: str, default_server: Server, default_redis: Redis) -> None:
    await default_redis.set("someone:else", "kept")
    done = liqlab("ingest", feed, "--json", LIQLAB_REDIS_URL=default_server.url)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ingest"]["events"] == 200
    assert await default_redis.get("someone:else") == b"kept"
    assert await default_redis.xlen("liq") == 200

    measured = json.loads(liqlab("budget", "--json", "--redis", default_server.url).stdout)
    assert sum(row["bytes"] for row in measured["shares"]) == measured["used_memory"]
    assert "used_memory" in liqlab("budget", "--redis", default_server.url).stdout


async def test_over_budget_has_its_own_exit_code(feed: str, default_server: Server, default_redis: Redis) -> None:
    liqlab("ingest", feed, LIQLAB_REDIS_URL=default_server.url)
    url = {"LIQLAB_REDIS_URL": default_server.url}
    assert liqlab("budget", "--fail-on", "over-budget", **url).returncode == 0
    tight = ["--set", "budget.streams=0.00001", "--set", "budget.buffer=0.51999"]
    done = liqlab("budget", "--fail-on", "over-budget", *tight, **url)
    assert done.returncode == OVER_BUDGET
    assert "over budget: streams" in done.stderr
    assert liqlab("budget", "--fail-on", "rain", **url).returncode == 2
    assert liqlab("feeds", "inspect", feed, "--map", "ts_ms").returncode == 2


def test_a_feed_without_alerts_is_tuned_all_the_same(tmp_path: Path) -> None:
    quiet = str(tmp_path / "quiet.jsonl")
    liqlab("synth", "--profile", "quiet", "--hours", "0.5", "--symbols", "3", "--out", quiet)
    done = liqlab("tune", quiet, "--count", "5")
    assert done.returncode == 0, done.stderr
    assert "5 settings tried" in done.stdout


async def test_what_no_codec_wrote_is_an_error_of_one_sentence(default_server: Server, default_redis: Redis) -> None:
    await Writer(default_redis).write_table(synth("quiet", hours=0.5, seed=1))
    await default_redis.xadd("liq", {"foo": "bar"}, id="1999999999999-1")
    done = liqlab("detect", LIQLAB_REDIS_URL=default_server.url)
    assert done.returncode == 1
    assert "are of no codec that liqlab has" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ingest", "no-such-file"], "no-such-file"),
        (["feeds", "inspect", "README.md"], "README.md"),
        (["budget"], "LIQLAB_REDIS_URL"),
        (["budget", "--redis", "redis://u:hunter2@127.0.0.1:1/0"], "127.0.0.1:1"),
        (["budget", "--redis", "htp://u:hunter2@host"], "unix://"),
        (["ingest", SAMPLE, "--set", "writer.layot=shared"], "did you mean writer.layout"),
        (["ingest", SAMPLE, "--set", "writer.layout"], "NAME=VALUE"),
        (["synth", "--profile", "stormy"], "stormy"),
        (["synth", "--format", "fax"], "fax"),
        (["size", SAMPLE, "--rate", "0"], "rate is 0"),
        (["size", SAMPLE, "--hours", "inf"], "inf"),
        (["tune", SAMPLE, "--count", "0"], "count is 0"),
        (["size", SAMPLE, "--set", "server=x", "--set", "server.maxmemory=8mb"], "server.maxmemory=8mb"),
    ],
)
def test_an_error_is_one_sentence_with_the_value_and_no_secret(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["liqlab", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert message in err
    assert "hunter2" not in out + err


def test_a_feed_must_be_named() -> None:
    assert liqlab("ingest").returncode == 2


def test_serve_prints_its_address_and_leaves_nothing(tmp_path: Path) -> None:
    done = liqlab("serve", "--seconds", "0.1")
    url = done.stdout.strip()
    assert url.startswith("unix://")
    assert not Path(url.removeprefix("unix://")).parent.exists()


def test_ctrl_c_ends_serve_well() -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from liqlab.cli import main; main()"
    )
    with subprocess.Popen([sys.executable, "-c", code, "serve"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip().removeprefix("unix://")).parent
        assert folder.is_dir()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert not folder.exists()


def test_a_wait_ends_with_what_is_waited_for_or_with_its_time() -> None:
    answers = iter([None, None, 3])
    assert wait(lambda: next(answers), None) == 3
    began = clock.elapsed_s()
    assert wait(lambda: None, 0.3) is None
    assert clock.elapsed_s() - began >= 0.3


def test_synth_makes_the_same_feed_again(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path in paths:
        liqlab("synth", "--hours", "0.05", "--seed", "7", "--format", "bybit", "--symbols", "3", "--out", str(path))
    assert paths[0].read_bytes() == paths[1].read_bytes() != b""


def test_help_does_not_wait_for_the_libraries() -> None:
    code = "import sys, liqlab.cli; print([m for m in ('pandas', 'redis', 'plotly') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_report_end_to_end(tmp_path: Path, feed: str) -> None:
    out = tmp_path / "r.html"
    done = liqlab("report", feed, "--out", str(out), "--json", "--fail-on", "over-budget")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert sum(row["bytes"] for row in result["shares"]) == result["used_memory"]
    assert 1_000_000 < out.stat().st_size < 6_000_000
