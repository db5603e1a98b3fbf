"""What a person sees: the report in a browser without network, and JupyterLab."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from liqlab import report

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser

BUILD = Path(__file__).resolve().parent.parent / "build"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; apt install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def made() -> report.Report:
    BUILD.mkdir(exist_ok=True)
    return report.run(report.sample_feed(), BUILD / "browser-report.html")


class Watched:
    """A page that may talk to one host or none; it remembers what else it asked for, and what it complained of."""

    def __init__(self, browser: sync_api.Browser, *, width: int, host: str | None = None) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.left: list[str] = []
        self.complaints: list[str] = []
        self.context.route("**/*", lambda route: self._judge(route, host))
        self.context.set_offline(host is None)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._listen)

    def _judge(self, route: sync_api.Route, host: str | None) -> None:
        parts = urlsplit(route.request.url)
        if parts.scheme in ("file", "data", "blob") or (host and parts.netloc == host):
            route.continue_()
        else:
            self.left.append(route.request.url)
            route.abort()

    def _listen(self, message: sync_api.ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)


@pytest.fixture(scope="module", params=[1100, 400], ids=["desktop", "phone"])
def opened(request, browser, made) -> Iterator[Watched]:
    watched = Watched(browser, width=request.param)
    watched.page.goto(made.html.as_uri())
    watched.page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 6")
    watched.page.screenshot(path=BUILD / f"report-{request.param}.png", full_page=True)
    yield watched
    watched.context.close()


def figure(opened: Watched, title: str) -> sync_api.Locator:
    return opened.page.locator(".js-plotly-plot").filter(has_text=title)


def test_the_report_asks_no_network_for_anything(opened):
    assert opened.left == []
    assert opened.complaints == []


def test_the_bars_are_drawn_with_their_bytes(opened, made):
    drawn = figure(opened, "% of the share's budget")
    families = len(made.budget["families"]) + 2  # the buffer and the whole server are bars too
    bars = drawn.locator(".barlayer .trace").nth(1).locator(".point path")
    assert bars.count() == families
    shares = {row["part"]: row for row in made.budget["shares"]}
    bytes_seen = {row[0]: 0 for row in drawn.evaluate("figure => figure.data[1].customdata")}
    for part, _, _, size in drawn.evaluate("figure => figure.data[1].customdata"):
        bytes_seen[part] += size
    assert bytes_seen.pop("whole server") == made.budget["used_memory"]
    assert bytes_seen == {part: row["bytes"] for part, row in shares.items() if row["bytes"]}
    widths = drawn.evaluate(
        "figure => [...figure.querySelectorAll('.barlayer .trace')[1].querySelectorAll('path')]"
        ".map(bar => bar.getBBox().width)"
    )
    assert max(widths) > 2
    for text in ("streams", "buffer (unattributed)", "whole server"):
        assert drawn.locator(".annotation-text").filter(has_text=text).is_visible()


def test_the_treemap_is_drawn(opened, made):
    drawn = figure(opened, "keys hold")
    tiles = drawn.locator(".treemaplayer .slice path")
    assert tiles.count() > len(made.budget["families"])
    texts = " ".join(drawn.locator(".treemaplayer text").all_text_contents())
    assert "other keys" in texts
    values = drawn.evaluate("figure => figure.data[0].values.filter((_, i) => !figure.data[0].parents[i])")
    assert sum(values) == sum(row["bytes"] for row in made.budget["families"])


@pytest.mark.parametrize(
    "title", ["Memory peaks", "Events per minute", "Liquidated per minute", "symbols, by notional"]
)
def test_the_other_figures_are_drawn(opened, title):
    drawn = figure(opened, title)
    assert drawn.locator("path.js-line, .barlayer .point path").count() > 1
    assert drawn.bounding_box()["height"] > 200


def test_the_page_fits_its_window(opened):
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    ends = page.evaluate(
        "[...document.querySelectorAll('.gtitle, .gtitle-subtitle')].map(title => title.getBoundingClientRect().right)"
    )
    assert len(ends) >= 12
    assert max(ends) <= page.viewport_size["width"]


def test_code_is_hidden_until_asked_for(opened):
    code = opened.page.locator(".input").first
    assert not code.is_visible()
    opened.page.locator("label[for=code]").click()
    assert code.is_visible()
    opened.page.locator("label[for=code]").click()
    assert not code.is_visible()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server does."""
    for _ in range(300):
        try:
            urllib.request.urlopen(address).close()
            return
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)


@pytest.fixture
def lab(tmp_path) -> Iterator[str]:
    """JupyterLab on a copy of the notebooks, with folders of its own; its address."""
    shutil.copytree(report.notebook("00-start").parent, tmp_path / "notebooks")
    for folder in ("CONFIG", "DATA", "RUNTIME"):
        (tmp_path / folder).mkdir()
    # The toast that asks whether Lab may fetch news.
    quiet = tmp_path / "CONFIG" / "labconfig" / "page_config.json"
    quiet.parent.mkdir()
    quiet.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    own = {f"JUPYTER_{folder}_DIR": str(tmp_path / folder) for folder in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")}
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += [
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={tmp_path / 'notebooks'}",
    ]
    with (tmp_path / "lab.log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        answers(f"{address}/api/status", process, tmp_path / "lab.log")
        yield address
    finally:
        process.terminate()
        process.wait(20)


def test_lab_opens_the_first_notebook_with_its_figure(browser, lab):
    watched = Watched(browser, width=1200, host=urlsplit(lab).netloc)
    watched.page.goto(f"{lab}/lab/tree/00-start.ipynb")
    bars = watched.page.locator(".jp-OutputArea .js-plotly-plot .barlayer .point path")
    bars.first.wait_for(state="attached", timeout=60_000)
    assert bars.count() > 100
    watched.page.locator(".jp-RenderedMarkdown h1").filter(has_text="What is here").wait_for()
    watched.page.screenshot(path=BUILD / "lab.png")
    assert watched.left == []
    watched.context.close()


def use_the_panel(page: sync_api.Page, made: Path, name: str) -> None:
    """Move three sliders, compare, verify on Redis, export: the figure follows each time."""
    page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=60_000)
    headline = page.locator(".widget-html-content").first

    def bars() -> list[float]:
        return list(page.evaluate("[...document.querySelector('.js-plotly-plot').data[1].x]"))

    for label, keys in (("memory", ["ArrowLeft"] * 3), ("candles kept", ["ArrowLeft"]), ("hot window", ["ArrowRight"])):
        slider = page.locator(".widget-inline-hbox").filter(has_text=label).locator(".noUi-handle")
        before = bars()
        for key in keys:
            slider.press(key)  # focuses it each time: a page that still lays itself out may move the focus
        page.wait_for_function(
            "before => JSON.stringify([...document.querySelector('.js-plotly-plot').data[1].x]) != before",
            arg=json.dumps(before, separators=(",", ":")),
            timeout=10_000,
        )
    sync_api.expect(headline).to_contain_text("64.00 MiB", timeout=10_000)  # a busy kernel is some keys behind
    page.get_by_role("button", name="Compare with this").click()
    page.get_by_role("button", name="Compare no more").wait_for()
    handle = page.locator(".widget-inline-hbox").filter(has_text="candles kept").locator(".noUi-handle")
    box = handle.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 60, box["y"] + box["height"] / 2, steps=6)
    page.mouse.up()
    page.wait_for_function("document.querySelector('.js-plotly-plot').data[2].x.length == 6")
    page.get_by_role("button", name="Verify on Redis").click()
    page.locator("table").filter(has_text="used_memory").last.wait_for(timeout=60_000)
    page.screenshot(path=BUILD / f"{name}.png", full_page=True)
    page.get_by_role("button", name="Export").click()
    page.get_by_text("Written to").wait_for()
    assert 'maxmemory = "64mb"' in (made / "liqlab.toml").read_text()
    assert (made / "redis.conf").exists()


@pytest.mark.parametrize("width", [1100, 390])
def test_the_app_is_used(browser, tmp_path, width):
    port = free_port()
    command = [sys.executable, "-c", "from liqlab.cli import main; main()", "app", str(report.sample_feed())]
    command += ["--no-browser", f"--port={port}", f"--export-to={tmp_path / 'made'}"]
    log = tmp_path / "app.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        address = f"http://127.0.0.1:{port}"
        answers(f"{address}/voila/static/voila.js", process, log)
        watched = Watched(browser, width=width, host=urlsplit(address).netloc)
        watched.page.goto(address)
        use_the_panel(watched.page, tmp_path / "made", f"app-{width}")
        assert watched.left == []
        assert watched.complaints == []
        watched.context.close()
    finally:
        process.send_signal(signal.SIGINT if width > 1000 else signal.SIGTERM)
        process.wait(30)


def test_lab_has_the_panel(browser, lab, tmp_path):
    path = tmp_path / "notebooks" / "07-tuning.ipynb"
    notebook = json.loads(path.read_text())
    at = next(place for place, cell in enumerate(notebook["cells"]) if "widgets.panel(" in "".join(cell["source"]))
    notebook["cells"] = notebook["cells"][: at + 1]
    source = "".join(notebook["cells"][1]["source"])
    notebook["cells"][1]["source"] = source.replace("../build/liqlab-config", str(tmp_path / "made")).replace(
        "24mb", "240mb"
    )
    path.write_text(json.dumps(notebook))
    watched = Watched(browser, width=1200, host=urlsplit(lab).netloc)
    page = watched.page
    page.goto(f"{lab}/lab/tree/07-tuning.ipynb")
    page.locator(".jp-Notebook").wait_for(timeout=60_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)  # else Lab asks which kernel to run on
    page.locator(".lm-MenuBar-item").filter(has_text="Run").first.click()
    page.locator(".lm-Menu-item[data-command='runmenu:run-all']").click()
    page.locator(".jp-OutputArea .widget-hslider").first.wait_for(timeout=60_000)
    use_the_panel(page, tmp_path / "made", "lab-panel")
    assert watched.left == []
    watched.context.close()
