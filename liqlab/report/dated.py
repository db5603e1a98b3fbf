"""Reports that are kept: dated, compared with earlier ones, pruned by number, and never two at a time in a folder."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pandas as pd

from liqlab import __version__, clock
from liqlab.budget import records
from liqlab.report.cells import ReportError, changes
from liqlab.report.execute import Progress, Report, run
from liqlab.settings import Settings

_LATEST: Final = "latest.html"
_LOCK: Final = ".liqlab-report.lock"
_WEEK: Final = timedelta(days=7)
_EARLY: Final = timedelta(hours=1)  # by which a run a week ago may have been later in its day
_FORMS: Final = {"date": ("%Y-%m-%d", r"\d{4}-\d\d-\d\d"), "time": ("%H%M", r"\d{4}")}


@dataclass(frozen=True)
class Kept:
    """A report that was added to those that are kept.

    Attributes
    ----------
    report : Report
    json : pathlib.Path
        Its figures, beside the page.
    since : pathlib.Path or None
        The figures that it was compared with: of a week ago, else the oldest there are.
    changes : pandas.DataFrame
        As `liqlab.report.changes`; empty where there was nothing to compare with.
    removed : list of pathlib.Path
        What was pruned.
    """

    report: Report
    json: Path
    since: Path | None
    changes: pd.DataFrame
    removed: list[Path]


def keep(
    feed: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "reports/{date}.html",
    *,
    count: int = 30,
    settings: Settings | None = None,
    parameters: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    now_ms: int | None = None,
) -> Kept:
    """Make a report as `liqlab.report.run` does, under a name with its date, beside those that were made before.

    Beside the page lies a JSON file with its figures; ``latest.html`` leads to the newest page. A run that fails leaves
    both as they were, and ``NAME.failed.json`` says what failed.

    Parameters
    ----------
    feed, settings, parameters, progress
        See `liqlab.report.run`.
    out : path
        ``{date}`` in its name becomes 2026-11-26, ``{time}`` 0610, in UTC. A run of the same name replaces the last.
    count : int
        How many pages stay, at least 1; older ones go, with what lies beside them.
    now_ms : int, optional
        When the run is said to be, ms since the epoch; the wall's time when absent.

    Raises
    ------
    ReportError
        As `liqlab.report.run`; or `out` has no date, or another run is at work in its folder.
    """
    pattern = Path(out).absolute()
    if "{date}" not in pattern.name or set(re.findall(r"{(\w*)}", str(pattern))) - set(_FORMS):
        raise ReportError(f"{out}: reports that are kept need {{date}} in their name, and may have {{time}}")
    if count < 1:
        raise ReportError(f"{count} reports cannot be kept; 1 is the least")
    now = datetime.fromtimestamp((clock.now_ms() if now_ms is None else now_ms) / 1000, UTC)
    page = pattern.with_name(pattern.name.format(**{name: now.strftime(form) for name, (form, _) in _FORMS.items()}))
    page.parent.mkdir(parents=True, exist_ok=True)
    failed = page.with_suffix(".failed.json")
    with _alone(page.parent):
        for left in page.parent.glob(".*.ipynb*"):  # of a run that was killed
            left.unlink()
        since = _earlier(pattern, page, now)
        given = dict(parameters or {}) | ({"since": str(since)} if since else {})
        try:
            made = run(feed, page, settings=settings, parameters=given, progress=progress)
        except ReportError as error:
            _write(failed, {"at": now.isoformat(), "error": str(error)})
            raise
        figures = {name: getattr(made, name) for name in ("feed", "ingested", "budget", "server")}
        changed = changes(json.loads(since.read_text()), figures) if since else pd.DataFrame()
        beside = page.with_suffix(".json")
        about = {"at": now.isoformat(), "liqlab": __version__, "page": page.name, "since": since and since.name}
        _write(beside, about | {"changes": records(changed.reset_index())} | figures)
        failed.unlink(missing_ok=True)
        link = page.with_name(f".{_LATEST}")
        link.unlink(missing_ok=True)
        link.symlink_to(page.name)
        link.replace(page.with_name(_LATEST))
        return Kept(made, beside, since, changed, list(_pruned(pattern, count)))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back whatever ends this process."""
    with (folder / _LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ReportError(
                f"process {lock.read() or '?'} is making a report in {folder}; this one was not begun"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _write(path: Path, values: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(values, indent=1))
    temporary.replace(path)  # whole or not at all


def _made(pattern: Path, suffix: str) -> dict[datetime, Path]:
    """Return the files that runs under a pattern have left, by when the names say that was, the oldest first."""
    name = re.escape(pattern.with_suffix("").name)
    for word, (_, form) in _FORMS.items():
        name = name.replace(re.escape(f"{{{word}}}"), f"(?P<{word}>{form})", 1)
    found = {}
    for path in pattern.parent.iterdir():
        if match := re.fullmatch(name + re.escape(suffix), path.name):
            words = match.groupdict()
            with suppress(ValueError):  # digits, but no date
                found[datetime.strptime(f"{words['date']} {words.get('time', '0000')}Z", "%Y-%m-%d %H%M%z")] = path
    return dict(sorted(found.items()))


def _earlier(pattern: Path, page: Path, now: datetime) -> Path | None:
    """Return the figures of the newest run that is a week old, else of the oldest; None where there is none."""
    found = {at: path for at, path in _made(pattern, ".json").items() if path.stem != page.stem}
    old = [path for at, path in found.items() if now - at >= _WEEK - _EARLY]
    return old[-1] if old else next(iter(found.values()), None)


def _pruned(pattern: Path, count: int) -> Iterator[Path]:
    """Remove all but the newest pages, and what lies beside older ones; yield what went."""
    oldest = list(_made(pattern, pattern.suffix))[-count:][0]
    for suffix in (pattern.suffix, ".json", ".failed.json", ".failed.ipynb"):
        for at, path in _made(pattern, suffix).items():
            if at < oldest:
                path.unlink()
                yield path
