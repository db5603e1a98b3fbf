import json
import os
import re
import subprocess
import sys
import time
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest

import liqlab
from liqlab import budget, report
from liqlab.feeds.synth import synth
from liqlab.replay import ingest
from liqlab.report import dated, execute
from liqlab.report.cells import _length
from liqlab.settings import load

NOTEBOOKS = (
    *("00-start", "01-ingest", "02-memory-budget", "03-codecs", "04-writer"),
    *("05-pressure", "06-percentiles", "07-tuning", "08-monitor", "09-claims", "report"),
)
SECRET = "hunter2"
SQUEEZED = {
    "streams": 0.0002, "vwap": 0.2, "percentile": 0.2, "statistics": 0.2, "misc": 0.2, "buffer": 0.1998,
}  # fmt: skip


@pytest.fixture(scope="module")
def feed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("feed") / "half-hour.csv"
    return liqlab.write_feed(synth("normal", hours=0.5, seed=7), path)


@pytest.fixture(scope="module")
def made(feed, tmp_path_factory) -> report.Report:
    """A report from a place of its own, on a machine that would rather have it otherwise."""
    folder = tmp_path_factory.mktemp("made")
    kernel = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "broken", "language": "python"}))
    (folder / feed.name).write_bytes(feed.read_bytes())
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
        patch.setenv("LIQLAB_REDIS_URL", f"redis://me:{SECRET}@203.0.113.9:1/0")
        patch.setenv("LIQLAB_WRITER__LAYOUT", "per_symbol")
        settings = load(writer={"layout": "shared"}, server={"maxmemory": "48mb"})
        done = report.run([feed.name], "out/{day}.html", settings=settings, progress=lambda *step: steps.append(step))
    assert [done / total for done, total in steps] == sorted(done / total for done, total in steps)
    assert steps[-1][0] == steps[-1][1]
    assert sorted(path.name for path in folder.iterdir()) == [feed.name, "jupyter", "out"]
    return done


def page(made: report.Report) -> str:
    return made.html.read_text(encoding="utf-8")


def summary_in(html: str) -> dict:
    return json.loads(re.search(r'<script[^>]*id="liqlab-summary"[^>]*>(.*?)</script>', html, re.DOTALL)[1])


def test_a_report_has_the_figures_of_its_feed(made):
    assert made.html.is_absolute()
    assert made.feed["accepted"] == made.ingested["events"] == 3_000
    assert made.budget["used_memory"] == sum(row["bytes"] for row in made.budget["shares"])
    assert made.over == made.budget["over"] == []
    assert made.server["kind"] in ("redis", "valkey")


def test_settings_reach_the_notebook_and_passwords_do_not(made):
    assert made.budget["maxmemory"] == 48 << 20
    assert (
        next(row for row in made.budget["shares"] if row["part"] == "streams")["keys"] <= 3
    )  # the shared layout: hot, sealed, names
    assert SECRET not in page(made)


def test_the_page_holds_everything_it_needs_and_little_more(made):
    html = page(made)
    assert len(html.encode()) < 6_000_000
    assert len(re.findall(r"plotly\.js v\d", html)) == 1
    without_plotly = re.sub(r"<script>/\*\*.*?</script>", "", html, count=1, flags=re.DOTALL)
    assert len(without_plotly) < 400_000
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", without_plotly)
    assert not re.findall(r"url\(|@import", without_plotly)
    assert without_plotly.count('class="plotly-graph-div"') == 7
    for words in ("Does this feed fit the budget?", "3,000 events", "half-hour.csv"):
        assert words in html


def test_the_page_and_the_report_say_the_same_to_the_byte(made):
    html = page(made)
    assert summary_in(html)["budget"] == made.budget
    for row in made.budget["shares"]:
        assert f"<td>{row['bytes']:,}</td>" in html
    bars = re.search(r'"customdata":(\[\[.*?\]\])', html)[1]
    drawn = pd.DataFrame(json.loads(bars), columns=["part", "family", "keys", "bytes"])
    sums = drawn.groupby("part")["bytes"].sum().to_dict()
    assert sums.pop("whole server") == made.budget["used_memory"]
    assert sums == {row["part"]: row["bytes"] for row in made.budget["shares"] if row["bytes"]}


def test_nothing_is_left_behind(made):
    assert [path.name for path in made.html.parent.iterdir()] == ["{day}.html"]
    names = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [name for name in names if "ipykernel" in name]


def test_a_failed_run_keeps_the_last_page_and_shows_where_it_failed(feed, tmp_path):
    out = tmp_path / "r.html"
    out.write_text("the last good one")
    broken = tmp_path / "broken.csv"
    broken.write_text("a,b\n1,2\n")
    with pytest.raises(report.ReportError) as failure:
        report.run(broken, out)
    kept = tmp_path / "r.failed.ipynb"
    sentence, _, where = str(failure.value).partition(" (the notebook")
    assert str(kept) in where
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    assert "broken.csv" in sentence
    assert out.read_text() == "the last good one"
    outputs = [output for cell in nbformat.read(kept, 4).cells for output in cell.get("outputs", [])]
    [error] = [output for output in outputs if output.output_type == "error"]
    assert len(error.traceback) == 1, "one sentence, no traceback"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.csv", "r.failed.ipynb", "r.html"]

    tight = report.run(feed, out, settings=load(budget=SQUEEZED))
    assert tight.over == ["streams"]
    assert not kept.exists()
    assert "Over budget: streams" in page(tight)


def test_a_cell_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "CELL_TIMEOUT_S", 1)
    with pytest.raises(report.ReportError, match="timed out"):
        report.run(report.sample_feed(), tmp_path / "r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["r.failed.ipynb"]


def test_a_misspelt_parameter_is_refused_before_anything_runs(feed, tmp_path):
    with pytest.raises(report.ReportError, match="no parameter 'maxmemry'; did you mean 'maxmemory'"):
        report.run(feed, tmp_path / "r.html", parameters={"maxmemry": "64mb"})
    with pytest.raises(report.ReportError, match="no parameter 'zzz'; there are: expire, feed, layout, maxmemory"):
        report.run(feed, tmp_path / "r.html", parameters={"zzz": 1})
    assert not list(tmp_path.iterdir())


def test_a_password_is_refused_as_a_parameter(tmp_path):
    with pytest.raises(report.ReportError, match="LIQLAB_REDIS_URL") as refused:
        report.run(f"redis://me:{SECRET}@203.0.113.9/0", tmp_path / "r.html")
    assert SECRET not in str(refused.value)


def papermill(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "papermill", str(report.notebook("report")), "out.ipynb", "--no-progress-bar"]
    return subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_plain_papermill_works(feed, tmp_path):
    done = papermill(tmp_path, "-p", "feed", os.path.relpath(feed, tmp_path))
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(tmp_path / "out.ipynb", 4)
    assert "half-hour.csv" in report.to_html(executed)
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


def test_plain_papermill_refuses_a_misspelt_parameter(feed, tmp_path):
    done = papermill(tmp_path, "-p", "fed", str(feed))
    assert done.returncode != 0
    assert "ReportError: no parameter 'fed'; did you mean 'feed'?" in done.stderr


# What papermill adds to a notebook, as the check sees it


PARAMETERS = 'feed: str = ""  # a feed\nmaxmemory = "240mb"'


def test_the_check_lets_known_parameters_pass():
    report.check(["", PARAMETERS, '# Parameters\nfeed = "a.csv"\nmaxmemory = "64mb"\n', "report.check(In)"])
    report.check(["", PARAMETERS])
    report.check([])


@pytest.mark.parametrize("magic", ["%matplotlib inline\n", "!ls", "x = = 1"])
def test_the_check_is_not_stopped_by_cells_that_are_no_python(magic):
    report.check([magic, PARAMETERS, '# Parameters\nfeed = "a.csv"\n'])


def test_the_check_works_when_cells_are_run_again():
    with pytest.raises(report.ReportError, match="'fed'"):
        report.check([PARAMETERS, "# Parameters\nfed = 1\n", "import liqlab", PARAMETERS, "report.check(In)"])


def test_the_check_refuses_a_password():
    with pytest.raises(report.ReportError, match="'feed' holds a password"):
        report.check([PARAMETERS, f'# Parameters\nfeed = "rediss://:{SECRET}@h"\n'])


def test_after_the_check_errors_with_a_cure_are_one_sentence():
    report.check([])
    for error in (liqlab.feeds.FeedError("no such file"), report.ReportError("no")):
        assert error._render_traceback_() == [f"{type(error).__name__}: {error}"]


# What the notebooks show


@pytest.fixture
async def played(default_redis):
    feed = liqlab.read_feed(synth("normal", hours=0.2, seed=2))
    ingested = await ingest(feed, default_redis)
    return feed, ingested, await budget.measure(default_redis), await liqlab.server.capabilities(default_redis)


def test_the_share_table_is_the_budget_to_the_byte(played):
    measured = played[2]
    shown = report.share_table(measured)
    for part, size in measured.table["bytes"].items():
        name = "buffer (unattributed)" if part == "unattributed" else part
        assert shown.loc[name, "bytes used"] == f"{size:,}"
    last = shown.loc["whole server"]
    assert last["bytes used"] == f"{measured.used_memory:,}"
    assert last["bytes allowed"] == f"{measured.maxmemory:,}"


def test_the_family_table_is_ordered_by_size(played):
    shown = report.family_table(played[2])
    sizes = shown["bytes"].str.replace(",", "").astype(int)
    assert sizes.is_monotonic_decreasing
    assert sizes.to_dict() == played[2].families["bytes"].to_dict()
    assert shown.loc["events", "share"] == "streams"


def test_the_headline_answers_in_words(played):
    text = report.headline(*played).data
    feed, ingested, measured, server = played
    assert f"**{ingested.events:,} events of {len(feed.report.symbols)} symbols over 12.0 minutes take up to " in text
    assert f"{budget.human(measured.used_memory)} at the end of the feed" in text
    assert "1,200 read = 1,200 accepted + 0 duplicates + 0 rejected" in text
    streams = measured.table.loc["streams"]
    room, days = re.search(r"room for about ([\d,]+) events, ([\d.]+) days of such a feed", text).groups()
    room = int(room.replace(",", ""))
    assert room == pytest.approx(streams["budget_bytes"] / streams["bytes"] * ingested.held, abs=1)
    span_ms = feed.report.last_ms - feed.report.first_ms
    assert float(days) == pytest.approx(room / ingested.events * span_ms / 86_400_000, abs=0.06)
    assert server.version in text
    assert "does not fit" not in text


@pytest.mark.parametrize(
    ("days", "text"), [(24_201.8, "66 years"), (9.26, "9.3 days"), (0.5, "12.0 hours"), (0.001, "86 seconds")]
)
def test_a_length_of_time_is_said_in_its_own_unit(days, text):
    assert _length(pd.Timedelta(days, "days")) == text


def test_the_headline_says_when_the_feed_does_not_fit(played):
    feed, ingested, measured, server = played
    crowded = type(ingested)(**{**vars(ingested), "evicted": 1234})
    assert "Redis evicted 1,234 keys" in report.headline(feed, crowded, measured, server).data


def test_the_configuration_makes_the_same_settings_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = load(
        server={"maxmemory": "64mb"},
        writer={"layout": "shared", "batch_ms": 12.5},
        retention={"vwap_s": 60},
        feeds={"contract_sizes": {"okx:BTC-USD-SWAP": 100.0}},
        redis_url=f"redis://:{SECRET}@h",
    )
    text = report.configuration(chosen).data
    assert SECRET not in text
    lines = text.removeprefix("```toml\n").removesuffix("\n```")
    assert tomllib.loads(lines)["server"]["maxmemory"] == "64mb"
    Path("liqlab.toml").write_text(lines)
    assert load() == chosen.model_copy(update={"redis_url": None})


def test_the_summary_is_plain_json(played):
    bundle = report.summary(*played)._repr_mimebundle_()
    values = json.loads(json.dumps(bundle["application/json"], allow_nan=False))
    assert values["feed"]["accepted"] == 1_200
    assert set(values) == {"feed", "ingested", "budget", "server"}


def test_text_in_the_summary_cannot_end_its_script():
    cell = nbformat.v4.new_code_cell(
        outputs=[nbformat.v4.new_output("display_data", {"application/json": {"x": "</script><b>"}})]
    )
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"state": {}}})
    html = report.to_html(notebook)
    assert "</script><b>" not in html
    assert summary_in(html) == {"x": "</script><b>"}
    assert "widgets" in notebook.metadata


# The notebooks


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_thin_and_saved_as_it_should_be(name):
    path = report.notebook(name)
    saved = nbformat.read(path, 4)
    nbformat.validate(saved)
    sources = [cell.source for cell in saved.cells if cell.cell_type == "code"]
    assert "def " not in "".join(sources)
    assert "class " not in "".join(sources)
    assert saved.cells[0].source.startswith("# ")
    assert saved.cells[0].source.splitlines()[0].endswith("?")
    assert sources[0].count("#") == len(sources[0].splitlines()), "a parameter needs a comment"
    assert "report.check(In)" in sources[1]
    assert set(saved.metadata) == {"kernelspec", "language_info", "title"}
    assert saved.metadata.kernelspec.name == "python3"
    outputs = [output for cell in saved.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    kinds = {kind for output in outputs for kind in output.data}
    assert "application/vnd.plotly.v1+json" in kinds
    assert not [kind for kind in kinds if kind.startswith("image/") or "widget" in kind]
    assert "application/json" in outputs[-1].data


def test_an_unknown_notebook_is_named_with_those_that_exist():
    with pytest.raises(report.ReportError, match="no notebook 'reprot'; there are: 00-start, 01-ingest"):
        report.notebook("reprot")


def test_the_sample_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(report.sample_feed()).is_file()
    assert not Path(report.sample_feed()).is_absolute()


# Reports that are kept

FIRST_MS = 1_767_225_600_000  # 2026-01-01
DAY_MS = 86_400_000


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_dated_reports_are_compared_and_pruned_and_a_failed_one_changes_nothing(feed, tmp_path):
    out = tmp_path / "of-{date}.html"
    first = report.keep(feed, out, now_ms=FIRST_MS)
    assert (first.since, len(first.changes), first.removed) == (None, 0, [])
    lock = ".liqlab-report.lock"
    assert names_in(tmp_path) == [lock, "latest.html", "of-2026-01-01.html", "of-2026-01-01.json"]
    assert json.loads(first.json.read_text())["budget"] == first.report.budget

    with pytest.raises(report.ReportError, match=r"none\.csv"):
        report.keep(tmp_path / "none.csv", out, now_ms=FIRST_MS + DAY_MS)
    failed = json.loads((tmp_path / "of-2026-01-02.failed.json").read_text())
    assert failed["at"] == "2026-01-02T00:00:00+00:00"
    assert "none.csv" in failed["error"]
    assert (tmp_path / "latest.html").resolve() == first.report.html

    owned = load(writer={"layout": "per_symbol"})
    eighth = report.keep(feed, out, now_ms=FIRST_MS + 7 * DAY_MS, settings=owned, count=1)
    assert eighth.since == first.json
    before, now, change = eighth.changes.loc["used_memory"]
    assert (before, now) == (first.report.budget["used_memory"], eighth.report.budget["used_memory"])
    assert change == pytest.approx(100 * (now / before - 1))
    assert eighth.changes["change_pct"]["streams, % of its share"] > 20
    assert "beside of-2026-01-01" in page(eighth.report)
    gone = ["of-2026-01-01.html", "of-2026-01-01.json", "of-2026-01-02.failed.ipynb", "of-2026-01-02.failed.json"]
    assert sorted(path.name for path in eighth.removed) == gone
    assert names_in(tmp_path) == [lock, "latest.html", "of-2026-01-08.html", "of-2026-01-08.json"]
    assert (tmp_path / "latest.html").resolve() == eighth.report.html


def test_two_reports_never_overlap_and_a_killed_one_leaves_the_last(feed, tmp_path):
    out = tmp_path / "{date}.html"
    words = ["report", "--feed", str(feed), "--out", str(out)]
    running = subprocess.Popen([sys.executable, "-c", "from liqlab.cli import main; main()", *words])
    try:
        for _ in range(600):
            if any(tmp_path.glob(".*.ipynb*")):
                break
            time.sleep(0.05)
        with pytest.raises(report.ReportError, match=f"process {running.pid} is making a report"):
            report.keep(feed, out, now_ms=FIRST_MS)
    finally:
        running.kill()
        running.wait()
    assert any(tmp_path.glob(".*.ipynb*"))
    report.keep(feed, out, now_ms=FIRST_MS)
    assert names_in(tmp_path) == [".liqlab-report.lock", "2026-01-01.html", "2026-01-01.json", "latest.html"]


@pytest.mark.parametrize("name", ["report.html", "{day}.html", "{date}-{hour}.html", "{time}.html"])
def test_a_report_that_is_kept_needs_a_date(feed, tmp_path, name):
    with pytest.raises(report.ReportError, match="date"):
        report.keep(feed, tmp_path / name)
    assert names_in(tmp_path) == []


def test_of_earlier_reports_that_of_a_week_ago_is_compared(tmp_path):
    out, now = tmp_path / "{date}-{time}.html", datetime(2026, 1, 10, 6, 10, tzinfo=UTC)
    here = tmp_path / "2026-01-10-0610.html"
    assert dated._earlier(out, here, now) is None
    for day, hour in ((9, 6), (3, 7), (3, 5), (2, 6), (1, 6)):
        path = tmp_path / f"2026-01-{day:02}-{hour:02}10.json"
        path.write_text(json.dumps({"at": datetime(2026, 1, day, hour, 10, tzinfo=UTC).isoformat()}))
    for name in ("2026-01-03-0610-mine.json", "2026-01-32-0610.json"):
        (tmp_path / name).write_text("{}")
    assert dated._earlier(out, here, now).name == "2026-01-03-0710.json"
    assert dated._earlier(out, here, now - timedelta(days=4)).name == "2026-01-01-0610.json"
