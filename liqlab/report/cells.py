"""What the notebooks call, so that they define nothing themselves."""

from __future__ import annotations

import ast
import difflib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import pandas as pd

from liqlab import __version__
from liqlab.budget import UNATTRIBUTED, Budget, human
from liqlab.config import toml
from liqlab.events import EventError
from liqlab.feeds import Feed, FeedError
from liqlab.replay import Ingested
from liqlab.server import Capabilities, ServerError, redact
from liqlab.settings import ENV_PREFIX, Settings, SettingsError, load
from liqlab.writer import WriterError

JSON: Final = "application/json"
_INJECTED: Final = "# Parameters"  # how papermill begins the cell that it adds
_ENOUGH: Final = 1_000  # events, for their average to foretell others
_PACKAGE: Final = Path(__file__).parents[1]


class ReportError(RuntimeError):
    """A report cannot be made; the message is one sentence with the cure."""


CURABLE: Final = (EventError, FeedError, ReportError, ServerError, SettingsError, WriterError)


def notebook(name: str) -> Path:
    """Return the path of a notebook of the workbench, in a checkout or in an installed liqlab.

    Raises
    ------
    ReportError
        There is none of that name.
    """
    folder, stem = _shipped("notebooks"), name.removesuffix(".ipynb")
    known = sorted(path.stem for path in folder.glob("*.ipynb"))
    if stem not in known:
        raise ReportError(f"no notebook {name!r}; there are: {', '.join(known) or 'none'}")
    return folder / f"{stem}.ipynb"


def sample_feed() -> str:
    """Return the path, from the working directory, of the synthetic feed that notebooks read when given none."""
    return os.path.relpath(_shipped("data") / "normal-6h.jsonl.gz")


def _shipped(folder: str) -> Path:
    installed = _PACKAGE / f"_{folder}"
    return installed if installed.is_dir() else _PACKAGE.parent / folder


def check(history: Sequence[str]) -> None:
    """Begin a notebook: refuse misspelt parameters, and let errors that have a cure be one sentence from here on.

    papermill itself lets an unknown parameter pass with a line in a log.

    Parameters
    ----------
    history : sequence of str
        ``In``: the cells executed so far, among them the one in which papermill assigns the parameters it was given.

    Raises
    ------
    ReportError
        papermill was given a parameter that no cell of the notebook defines, or a password.
    """
    for kind in CURABLE:
        kind._render_traceback_ = _one_sentence  # type: ignore[union-attr]  # IPython asks an exception for this
    given: dict[str, str] = {}
    known: set[str] = set()
    for cell in history:
        if cell.startswith(_INJECTED):
            given |= _assigned(cell)
        else:
            known |= _assigned(cell).keys()
    check_names(given, known)


def _one_sentence(error: Exception) -> list[str]:
    return [f"{type(error).__name__}: {error}"]


def _assigned(cell: str) -> dict[str, str]:
    """Return the names that the top level of a cell assigns, with the text of their values."""
    try:
        body = ast.parse(cell).body
    except SyntaxError:  # a cell with magics, or one that failed
        return {}
    pairs: Iterator[tuple[list[ast.expr], ast.expr | None]] = (
        (node.targets, node.value) if isinstance(node, ast.Assign) else ([node.target], node.value)
        for node in body
        if isinstance(node, ast.Assign | ast.AnnAssign)
    )
    return {
        target.id: ast.unparse(value)
        for targets, value in pairs
        if value is not None
        for target in targets
        if isinstance(target, ast.Name)
    }


def check_names(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `ReportError` for a parameter that is unknown, or whose value holds a password."""
    known = list(known)
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            cure = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(known))}"
            raise ReportError(f"no parameter {name!r}; {cure}")
        if redact(str(value)) != str(value):
            raise ReportError(f"parameter {name!r} holds a password, which would be saved; use {ENV_PREFIX}REDIS_URL")


def with_parameters(*, maxmemory: str = "", layout: str = "") -> Settings:
    """Return the settings with a notebook's parameters over them; an empty one changes nothing.

    Raises
    ------
    SettingsError
        A value is not acceptable.
    """
    sections: dict[str, Any] = {}
    if maxmemory:
        sections["server"] = {"maxmemory": maxmemory}
    if layout:
        sections["writer"] = {"layout": layout}
    return load(**sections)


def headline(feed: Feed, ingested: Ingested, budget: Budget, server: Capabilities) -> Any:
    """Return the answer in words, as Markdown: how much was read, what it uses, which share is the fullest."""
    from IPython.display import Markdown

    report, names = feed.report, [Path(name).name for name in feed.report.files]
    first, last = (pd.Timestamp(ms, unit="ms") for ms in (report.first_ms or 0, report.last_ms or 0))
    peak = max(int(ingested.timeline["used_memory"].max()), budget.used_memory)
    fullest = str(budget.table["used_pct"].idxmax())
    share: Any = budget.table.loc[fullest]
    used, held = int(budget.table["bytes"]["streams"]), ingested.held
    lines = [
        f"**{ingested.events:,} events of {len(report.symbols):,} symbols over {_length(last - first)} take up to "
        f"{human(peak)} of {human(budget.maxmemory)} ({100 * peak / budget.maxmemory:.1f} %)**, and "
        f"{human(budget.used_memory)} at the end of the feed. Then the fullest share is {_name(fullest)}: "
        f"{human(share['bytes'])} of {human(share['budget_bytes'])} ({share['used_pct']:.1f} %).",
        "",
        f"- Feed: {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}; "
        f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC; {report.read:,} read = {report.accepted:,} accepted + "
        f"{report.duplicates:,} duplicates + {report.rejected_total:,} rejected.",
        f"- At the end Redis holds {held:,} of the events at {used / max(held, 1):,.1f} bytes each, "
        f"{ingested.sealed:,} of them sealed in blocks. {ingested.trimmed:,} were trimmed, and "
        f"{sum(ingested.expired.values()):,} keys expired on the feed's own clock.",
        *_room(budget, held, (last - first) / max(ingested.events, 1)),
        f"- Measured on {server.kind} {server.version} ({server.allocator}) with liqlab {__version__}.",
    ]
    if ingested.evicted:
        lines.append(f"- **The feed does not fit: Redis evicted {ingested.evicted:,} keys at maxmemory.**")
    if budget.over:
        lines.append(f"- **Over budget: {', '.join(map(_name, budget.over))}.**")
    return Markdown(redact("\n".join(lines)))  # type: ignore[no-untyped-call]


def _room(budget: Budget, held: int, apart: pd.Timedelta) -> Iterator[str]:
    """Yield how much history the streams' share would hold at this feed's rate and price, if that can be said."""
    used, allowed = (int(budget.table[column]["streams"]) for column in ("bytes", "budget_bytes"))
    if held >= _ENOUGH:
        room = allowed * held // used
        yield (
            f"- At that price the streams' {human(allowed)} have room for about {room:,} events, "
            f"{_length(apart * room)} of such a feed."
        )


def _length(span: pd.Timedelta) -> str:
    if span >= pd.Timedelta(730, "days"):
        return f"{span / pd.Timedelta(365.25, 'days'):.0f} years"
    for name in ("days", "hours", "minutes"):
        if span >= pd.Timedelta(2, name):
            return f"{span / pd.Timedelta(1, name):.1f} {name}"
    return f"{span.total_seconds():.0f} seconds"


def _name(part: object) -> str:
    return "buffer (unattributed)" if part == UNATTRIBUTED else str(part)


def share_table(budget: Budget) -> pd.DataFrame:
    """Return the budget for reading: a row a share, and their sum, which is `used_memory` to the byte."""
    table = budget.table
    sums = {name: int(table[name].sum()) for name in ("bytes", "keys", "members")}
    whole = {**sums, "budget_bytes": budget.maxmemory, "used_pct": 100 * budget.used_memory / budget.maxmemory}
    table = pd.concat([table, pd.DataFrame([whole], index=["whole server"])])
    rows = pd.DataFrame(
        {
            "bytes used": table["bytes"].map("{:,}".format),
            "bytes allowed": table["budget_bytes"].map("{:,}".format),
            "used": table["used_pct"].map("{:.1f} %".format, na_action="ignore").fillna(""),
            "keys": table["keys"].map("{:,}".format),
            "members": table["members"].map("{:,}".format),
        }
    )
    return rows.rename(index=_name)


def family_table(budget: Budget) -> pd.DataFrame:
    """Return the families for reading, the largest first."""
    table = budget.families.sort_values("bytes", ascending=False)
    rows = pd.DataFrame(
        {
            "share": table["share"],
            "bytes": table["bytes"].map("{:,}".format),
            "bytes per member": table["bytes_per_member"].map("{:,.1f}".format),
            "keys": table["keys"].map("{:,}".format),
            "members": table["members"].map("{:,}".format),
        }
    )
    return rows.rename_axis(index=None)


def account_table(feed: Feed) -> pd.DataFrame:
    """Return the account of reading a feed: read = accepted + duplicates + rejected."""
    return feed.report.table().set_index("what").rename_axis(index=None)


def configuration(settings: Settings) -> Any:
    """Return the lines of `liqlab.toml` that make these settings again, as Markdown; passwords and paths stay out."""
    from IPython.display import Markdown

    return Markdown(f"```toml\n{toml(settings)}```")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Summary:
    """The figures of a notebook for machines: the JSON output of its last cell."""

    values: dict[str, Any]

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {JSON: self.values, "text/plain": "the figures above, as application/json"}


def summary(feed: Feed, ingested: Ingested, budget: Budget, server: Capabilities) -> Summary:
    """Return every figure as plain numbers and text, under the names of the arguments."""
    figures = {"feed": feed.report.as_dict(), "ingested": ingested.as_dict(), "budget": budget.as_dict()}
    return Summary({**figures, "server": vars(server)})


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> pd.DataFrame:
    """Return what has changed between two summaries.

    Returns
    -------
    pandas.DataFrame
        Index: the figure. Columns: before, now, change_pct (NaN where there was nothing before). Memory in bytes, what
        each share of the budget uses in per cent, events and rows as numbers.
    """
    old, new = _figures(before), _figures(now)
    table = pd.DataFrame({"before": pd.Series(old, dtype=float), "now": pd.Series(new, dtype=float)}).reindex(list(new))
    table["change_pct"] = 100 * (table["now"] / table["before"].where(table["before"] != 0) - 1)
    return table.rename_axis("figure")


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    feed, ingested, budget = values["feed"], values["ingested"], values["budget"]
    return {
        "events": feed["accepted"],
        "rejected rows": sum(feed["rejected"].values()),
        "events held": ingested["held"],
        "keys evicted": ingested["evicted"],
        "used_memory": budget["used_memory"],
        **{
            f"{row['part']}, % of its share": row["used_pct"] for row in budget["shares"] if row["used_pct"] is not None
        },
        **{f"{row['family']}, bytes a member": row["bytes_per_member"] for row in budget["families"]},
    }


def since(path: str, found: Summary) -> Any:
    """Return what has changed since an earlier report, as Markdown.

    Parameters
    ----------
    path : str
        The JSON file beside that report; empty where there is none.
    found : Summary
        From `summary`.
    """
    from IPython.display import Markdown

    if not path:
        return Markdown("There is no earlier report to compare with.")  # type: ignore[no-untyped-call]
    table = changes(json.loads(Path(path).read_text()), found.values)
    lines = [f"| beside {Path(path).stem} | before | now | change |", "|---|---:|---:|---:|"]
    for name, row in table.iterrows():
        change = "new" if pd.isna(row["change_pct"]) and row["now"] else f"{row['change_pct']:+.1f} %"
        same = pd.isna(row["before"]) or row["before"] == row["now"]
        texts = ["" if pd.isna(one) else f"{one:,.{0 if one % 1 == 0 else 2}f}" for one in row[["before", "now"]]]
        lines.append(f"| {name} | {texts[0]} | {texts[1]} | {'' if same and change != 'new' else change} |")
    return Markdown("\n".join(lines))  # type: ignore[no-untyped-call]


def versions() -> pd.DataFrame:
    """Return the versions of what a result may depend on."""
    names = ("liqlab", "redis", "hiredis", "numpy", "pandas", "pyarrow", "plotly", "jupyterlab", "papermill")
    rows = {"Python": platform.python_version(), **{name: version(name) for name in names}}
    return pd.DataFrame({"version": rows})
