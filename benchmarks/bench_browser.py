"""How soon a browser shows what a slider of the app does to 1,000,000 events: from the key to the changed trace.

python benchmarks/bench_browser.py [--quick] [--events 1000000]

`liqlab app` on a file, Debian's or any chromium by Playwright, one key press after the other on each slider, there and
back; the clock runs in the page. Row: slider_browser_ms.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from playwright import sync_api

from benchmarks.rows import record
from liqlab import synth
from liqlab.widgets.panel import KNOBS

PORT = 8877
# Presses a key where the focus is, and resolves when the trace of the bars is another: ms.
PRESS = """async key => {
  const shown = () => JSON.stringify([...document.querySelector('.js-plotly-plot').data[1].x]);
  const before = shown(), began = performance.now(), target = document.activeElement;
  target.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));
  while (shown() === before && performance.now() - began < 10000)
    await new Promise(requestAnimationFrame);
  return performance.now() - began;
}"""


def moves(page: sync_api.Page) -> list[float]:
    found = []
    for name, (label, values) in KNOBS.items():
        if not isinstance(next(iter(values.values())), int | float) or name == "detector.size":
            continue  # of a sketch, the default, there is no size to choose
        page.locator(".widget-inline-hbox").filter(has_text=label).locator(".noUi-handle").first.focus()
        taken = [page.evaluate(PRESS, key) for key in ("ArrowLeft", "ArrowRight") * 2]
        print(f"{name:34} {', '.join(f'{one:,.0f}' for one in taken)} ms", flush=True)
        found += taken
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the events; nothing is recorded")
    parser.add_argument("--events", type=int, default=1_000_000)
    options = parser.parse_args()
    size = options.events // 10 if options.quick else options.events
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("no chromium on this machine; apt install chromium")
    with tempfile.TemporaryDirectory() as folder:
        feed = Path(folder) / "feed.parquet"
        synth("normal", hours=24, rate_per_min=size / 1_440, seed=0).to_parquet(feed)
        command = [sys.executable, "-c", "from liqlab.cli import main; main()", "app", str(feed)]
        process = subprocess.Popen([*command, "--no-browser", f"--port={PORT}", f"--export-to={folder}/made"])
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/voila/static/voila.js").close()
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.2)
            with sync_api.sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
                page = browser.new_page(viewport={"width": 1100, "height": 900})
                page.goto(f"http://127.0.0.1:{PORT}", timeout=300_000)
                page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=300_000)
                found = moves(page)
                browser.close()
        finally:
            process.terminate()
            process.wait(30)
    print(f"median {np.median(found):.0f} ms, worst {max(found):.0f} ms of {len(found)} moves, {size:,} events")
    if not options.quick:
        record("slider_browser_ms", float(np.median(found)), "ms, median", "limit", 300)


if __name__ == "__main__":
    main()
