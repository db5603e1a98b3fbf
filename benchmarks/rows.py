"""The rows of build/bench.json: each a figure of ours beside a rival's, from one run.

python benchmarks/rows.py prints the table.
"""

import json
from pathlib import Path

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


if __name__ == "__main__":
    table = Table("row", "ours", "unit", "rival", "rival's", "ratio", title="ratio above 1: ours is better", box=None)
    for row in json.loads(PATH.read_text()):
        table.add_row(
            row["name"], f"{row['value']:,.4g}", row["unit"], row["rival"], f"{row['rival_value']:,.4g}",
            f"{row['ratio']:.2f}",
        )  # fmt: skip
    Console(width=140).print(table)
