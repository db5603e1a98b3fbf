"""Thirty reports on a schedule, a day apart on their own clock; three go wrong. Prints what each left behind.

python benchmarks/scheduled.py [--runs 30] [--keep 10]

Each run is a process of its own, as cron starts it. One is killed half-way, one finds no Redis, one is over its budget;
half-way through the 20th another is begun. The last lines say what the folder holds.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from liqlab import synth, write_feed

FIRST_MS, DAY_MS = 1_767_225_600_000, 86_400_000  # 2026-01-01
RUN = """
import sys
from liqlab import report
feed, out, now_ms, count = sys.argv[1:]
try:
    kept = report.keep(feed, out, now_ms=int(now_ms), count=int(count))
except report.ReportError as error:
    sys.exit(str(error))
since = kept.since.stem if kept.since else "nothing"
print(f"beside {since}: {(kept.changes['change_pct'].abs() > 1).sum() if len(kept.changes) else 0} figures by over 1 %")
sys.exit(3 if kept.report.over else 0)
"""


def begin(feed: Path, folder: Path, day: int, count: int, **variables: str) -> subprocess.Popen[str]:
    words = [str(feed), str(folder / "{date}.html"), str(FIRST_MS + day * DAY_MS), str(count)]
    environment = os.environ | variables
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", RUN, *words], env=environment, stdout=pipe, stderr=pipe, text=True)


def said(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate()
    text = (output.strip() or errors.strip().splitlines()[-1]) if output or errors else ""
    return f"exit {process.returncode:3}  {text[:110]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--keep", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "reports"
        folder.mkdir()
        for day in range(options.runs):
            feed = write_feed(synth("normal", hours=0.5, seed=day, rate_per_min=60 + day), Path(name) / "feed.csv")
            variables = {}
            if day == 12:
                variables = {"LIQLAB_SERVER__BINARY": "/bin/false"}
            if day == 16:
                variables = {"LIQLAB_SERVER__MAXMEMORY": "4mb"}
            process = begin(feed, folder, day, options.keep, **variables)
            if day == 6:
                while not any(folder.glob(".*.ipynb*")):
                    time.sleep(0.1)
                time.sleep(2)
                process.send_signal(signal.SIGKILL)
            if day == 19:
                while not any(folder.glob(".*.ipynb*")):
                    time.sleep(0.1)
                print(f"        beside it  {said(begin(feed, folder, day, options.keep))}")
            result, latest = said(process), folder / "latest.html"
            points = latest.resolve().stem if latest.exists() else "-"
            pages = len(list(folder.glob("2*.html")))
            print(f"day {day + 1:2}  {result}  | {pages:2} pages, latest {points}", flush=True)
        print(*sorted(path.name for path in folder.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
