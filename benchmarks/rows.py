"""The rows of build/bench.json: each a figure of ours beside a rival's, from one run.

python benchmarks/rows.py prints the table; with --docs it writes docs/benchmarks.md too.
"""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PATH = Path(__file__).resolve().parent.parent / "build" / "bench.json"


def record(name: str, value: float, unit: str, rival: str, rival_value: float, *, more_is_better: bool = False) -> None:
    """Add a row, or replace the one of that name; a ratio above 1 says that ours is better."""
    ratio = value / rival_value if more_is_better else rival_value / value
    rows = json.loads(PATH.read_text()) if PATH.exists() else []
    row = {"name": name, "value": value, "unit": unit, "rival": rival, "rival_value": rival_value, "ratio": ratio}
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps([*(old for old in rows if old["name"] != name), row], indent=1) + "\n")
    print(f"{name}: {value:,.4g} {unit}; {rival}: {rival_value:,.4g}; ratio {ratio:.2f}", flush=True)


HEAD = """# Benchmarks

Each row is a figure of liqlab's beside a rival's, from one run on one machine: a ratio above 1 says that liqlab's is
the better one. `make bench` runs all of it and writes this page; nothing here is copied by hand. Times differ from
machine to machine, and from minute to minute on a shared one; ratios do so less. [What that is worth](limits.md).

"""


def texts(row: dict[str, Any]) -> list[str]:
    figures = f"{row['value']:,.4g}", row["unit"], row["rival"], f"{row['rival_value']:,.4g}", f"{row['ratio']:.2f}"
    return [row["name"], *figures]


def page(rows: list[dict[str, Any]]) -> str:
    """Return the page of the docs."""
    when, cores = datetime.now(UTC).date().isoformat(), os.cpu_count()
    lines = [
        f"{when}, {cores} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}:",
        "",
    ]
    lines += ["| row | ours | unit | rival | rival's | ratio |", "|---|---:|---|---|---:|---:|"]
    return HEAD + "\n".join([*lines, *(f"| {' | '.join(texts(row))} |" for row in rows)]) + "\n"


if __name__ == "__main__":
    table = Table("row", "ours", "unit", "rival", "rival's", "ratio", title="ratio above 1: ours is better", box=None)
    measured = json.loads(PATH.read_text())
    for one in measured:
        table.add_row(*texts(one))
    Console(width=140).print(table)
    if sys.argv[1:] == ["--docs"]:
        (PATH.parent.parent / "docs" / "benchmarks.md").write_text(page(measured))
