"""Run every stage of `make test`, whatever the earlier ones did, and say at the end what ran and what did not.

The last line counts tests over all stages, as their JUnit files tell it; each lint command counts as one, and so does
a pytest that broke off without a failed test to blame.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
BIN = Path(sys.executable).parent
WORKERS = ("-n", "3", "--dist", "worksteal")  # tests mostly wait, for servers and for processes
# pytest's own timeout lies above the cell's, whose message names the cell.
NOTEBOOKS = (
    "--nbval --nbval-current-env --nbval-cell-timeout 120 --timeout 150 --nbval-sanitize-with tests/nbval-sanitize.cfg"
    " -n 2 --dist loadfile"  # a notebook's cells share a kernel
)


@dataclass
class Stage:
    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)


def run(command: list[str]) -> int:
    print(f"\n== {' '.join(command)}", flush=True)
    # A server or a setting of the user's must not decide how a test ends.
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("LIQLAB_")}
    # Hundreds of processes would each compile all that they import, seconds long.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PATH"] = f"{BIN}{os.pathsep}{environment.get('PATH', '')}"
    return subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, env=environment, check=False).returncode


def lint(stage: Stage) -> None:
    for command in (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]):
        if run(command) == 0:
            stage.passed += 1
        else:
            stage.failed += 1
            stage.remarks.append(f"failed: {' '.join(command)}")


def pytest(stage: Stage, *arguments: str) -> None:
    junit = BUILD / f"junit-{stage.name}.xml"
    junit.unlink(missing_ok=True)
    code = run(["python", "-m", "pytest", f"--junitxml={junit.relative_to(ROOT)}", *arguments])
    read(stage, junit)
    if code != 0 and stage.failed == 0:
        stage.failed = 1
        stage.remarks.append("failed: no test was collected" if code == 5 else f"failed: pytest exited with {code}")


def read(stage: Stage, junit: Path) -> None:
    """Add up the test cases; the attributes of <testsuite> count a failed test with a failed teardown twice."""
    if not junit.exists():
        return
    reasons: Counter[str] = Counter()
    for case in ET.parse(junit).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            stage.failed += 1
        elif skip is not None:
            stage.skipped += 1
            reasons[skip.get("message") or skip.get("type", "no reason given")] += 1
        else:
            stage.passed += 1
    stage.remarks += [f"skipped {count}: {reason}" for reason, count in reasons.most_common()]


def notebooks(stage: Stage) -> None:
    if any((ROOT / "notebooks").glob("*.ipynb")):
        pytest(stage, *NOTEBOOKS.split(), "notebooks")
    else:
        stage.remarks.append("not run: notebooks/ has none")


def main() -> int:
    BUILD.mkdir(exist_ok=True)
    # Who starts this in the background may have Ctrl-C ignored, and so would all that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stages = []
    for name, work in {
        "lint": lint,
        "tests": lambda stage: pytest(stage, "tests", "-m", "not browser", *WORKERS),
        "notebooks": notebooks,
        # On its own: Playwright's event loop and pytest-asyncio's do not share a process.
        "browser": lambda stage: pytest(stage, "tests", "-m", "browser"),
    }.items():
        stage = Stage(name)
        start = time.perf_counter()
        work(stage)
        stage.seconds = time.perf_counter() - start
        stages.append(stage)
    print(f"\n{'stage':<10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for stage in stages:
        print(f"{stage.name:<10}{stage.passed:>8}{stage.failed:>8}{stage.skipped:>9}{stage.seconds:>9.0f}")
        for remark in stage.remarks:
            print(f"  {remark}")
    passed, failed, skipped = (
        sum(getattr(stage, name) for stage in stages) for name in ("passed", "failed", "skipped")
    )
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
