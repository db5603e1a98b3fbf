"""How results and progress look in a terminal, and how Ctrl-C there ends a wait."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from liqlab.clock import elapsed_s

if TYPE_CHECKING:
    import pandas as pd

screen: Final = Console(highlight=False)
# Standard error, so that --json and the path that `report` prints can be piped.
log: Final = Console(stderr=True, highlight=False, soft_wrap=True)

_LOOK_S: Final = 0.2


def wait(ended: Callable[[], int | None], seconds: float | None) -> int | None:
    """Return what `ended` returns once that is not None, and None after `seconds`.

    In steps, because a wait without end misses a signal that comes after Python last looked for one and before the
    system begins to wait.
    """
    deadline_s = None if seconds is None else elapsed_s() + seconds
    while (code := ended()) is None:
        left_s = _LOOK_S if deadline_s is None else min(_LOOK_S, deadline_s - elapsed_s())
        if left_s <= 0:
            break
        time.sleep(left_s)
    return code


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error, where that is a terminal, and clear it afterwards."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as bar:
        task = bar.add_task(label, total=None)

        def step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield step


def budget_table(measured: dict[str, Any]) -> Table:
    """Show `Budget.as_dict()`, its total last."""
    from liqlab.budget import human  # with pandas behind it, which `liqlab --help` can do without

    table = Table(title=f"{human(measured['used_memory'])} of {human(measured['maxmemory'])} used", box=box.SIMPLE_HEAD)
    for name in ("part", "keys", "members", "bytes", "", "budget", "used"):
        table.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    for row in measured["shares"]:
        used = row["used_pct"]
        style = "red" if used is not None and used > 100 else ""
        table.add_row(
            row["part"], f"{row['keys']:,}", f"{row['members']:,}", f"{row['bytes']:,}", human(row["bytes"]),
            human(row["budget_bytes"]), "" if used is None else f"{used:.1f} %", style=style,
        )  # fmt: skip
    total = sum(row["bytes"] for row in measured["shares"])
    table.add_section()
    table.add_row("used_memory", "", "", f"{total:,}", human(total), human(measured["maxmemory"]), "")
    return table


def nodes_table(nodes: dict[str, dict[str, Any]]) -> Table:
    """Show `Budget.as_dict()` of each node of a cluster in a row."""
    from liqlab.budget import human

    table = Table(title="by node", box=box.SIMPLE_HEAD)
    parts = [row["part"] for row in next(iter(nodes.values()))["shares"] if row["part"] != "foreign"]
    for name in ("node", "used_memory", "of", *parts):
        table.add_column(name, justify="left" if name == "node" else "right")
    for name, one in nodes.items():
        used = {row["part"]: row["used_pct"] for row in one["shares"]}
        table.add_row(
            name, human(one["used_memory"]), human(one["maxmemory"]), *(f"{used[part] or 0:.1f} %" for part in parts),
            style="red" if one["over"] else "",
        )  # fmt: skip
    return table


def change_table(since: str, rows: list[dict[str, Any]]) -> Table:
    """Show what differs from an earlier report."""
    table = Table(title=f"changed since {since}", box=box.SIMPLE_HEAD)
    for name in ("", "before", "now", "change"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        if row["before"] != row["now"]:
            change = row["change_pct"]
            figures = [
                "" if row[name] is None else f"{row[name]:,.{0 if row[name] % 1 == 0 else 2}f}"
                for name in ("before", "now")
            ]
            table.add_row(row["figure"], *figures, "" if change is None else f"{change:+.1f} %")
    return table


def print_json(value: Any) -> None:
    """Print JSON on standard output, one line."""
    screen.print(json.dumps(value, default=str, allow_nan=False), soft_wrap=True, markup=False)


def plain_table(rows: pd.DataFrame) -> Table:
    """Show a two-column DataFrame without its index."""
    table = Table(box=None, show_header=False)
    for name, value in rows.itertuples(index=False):
        table.add_row(str(name), str(value))
    return table
