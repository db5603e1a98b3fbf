"""What reading a feed found: the account of every row, and the feed itself."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pandas as pd

_MAX_REASONS: Final = 200
OTHER: Final = "other reasons"


@dataclass
class FeedReport:
    """The account of a feed: ``read = accepted + duplicates + rejected_total``, at every moment.

    Attributes
    ----------
    files : list of str
        What was read, in order.
    formats : list of str
        The formats found, in order of appearance.
    read, accepted, duplicates : int
        Events; a line that cannot be read counts as one.
    rejected : dict of str to int
        Events by the reason of their rejection; beyond 200 reasons the rest is counted as `OTHER`.
    ignored : dict of str to int
        What is no event and not in `read`: acknowledgements, heartbeats, headers, other channels, empty frames.
    first_ms, last_ms : int or None
        Time of the first and the last accepted event, ms since the epoch, UTC.
    symbols, exchanges : list of str
        Sorted names among the accepted events.
    quarantine : pathlib.Path or None
        JSON lines with file, line, reason and raw text of what was rejected.
    notes : list of str
        What was assumed or restored, in sentences.
    """

    files: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    read: int = 0
    accepted: int = 0
    duplicates: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    first_ms: int | None = None
    last_ms: int | None = None
    symbols: list[str] = field(default_factory=list)
    exchanges: list[str] = field(default_factory=list)
    quarantine: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def rejected_total(self) -> int:
        """Events rejected, for whatever reason."""
        return sum(self.rejected.values())

    def reject(self, reason: str, count: int = 1) -> None:
        """Count events that were read and rejected."""
        self.read += count
        _count(self.rejected, reason, count)

    def ignore(self, reason: str, count: int = 1) -> None:
        """Count messages that are no events."""
        _count(self.ignored, reason, count)

    def note(self, sentence: str) -> None:
        """Remember a sentence, once."""
        if sentence not in self.notes and len(self.notes) < _MAX_REASONS:
            self.notes.append(sentence)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "files": list(self.files),
            "formats": list(self.formats),
            "read": self.read,
            "accepted": self.accepted,
            "duplicates": self.duplicates,
            "rejected_total": self.rejected_total,
            "rejected": dict(self.rejected),
            "ignored": dict(self.ignored),
            "first_ms": self.first_ms,
            "last_ms": self.last_ms,
            "symbols": list(self.symbols),
            "exchanges": list(self.exchanges),
            "quarantine": None if self.quarantine is None else str(self.quarantine),
            "notes": list(self.notes),
        }

    def table(self) -> pd.DataFrame:
        """Return the report as a table: one row a figure, columns `what` and `value`."""
        rows: list[tuple[str, str]] = [
            ("files", str(len(self.files))),
            ("formats", ", ".join(self.formats)),
            ("read", f"{self.read:,}"),
            ("accepted", f"{self.accepted:,}"),
            ("duplicates", f"{self.duplicates:,}"),
            ("rejected", f"{self.rejected_total:,}"),
        ]
        rows += [(f"rejected: {reason}", f"{count:,}") for reason, count in Counter(self.rejected).most_common()]
        rows += [(f"ignored: {reason}", f"{count:,}") for reason, count in Counter(self.ignored).most_common()]
        rows += [
            ("first event (UTC)", _moment(self.first_ms)),
            ("last event (UTC)", _moment(self.last_ms)),
            ("exchanges", ", ".join(self.exchanges)),
            ("symbols", str(len(self.symbols))),
            ("quarantine", "" if self.quarantine is None else str(self.quarantine)),
        ]
        rows += [("note", note) for note in self.notes]
        return pd.DataFrame(rows, columns=["what", "value"])

    def __str__(self) -> str:
        return (
            f"{self.read:,} read, {self.accepted:,} accepted, {self.duplicates:,} duplicates, "
            f"{self.rejected_total:,} rejected; {len(self.symbols)} symbols, "
            f"{_moment(self.first_ms)} to {_moment(self.last_ms)}"
        )

    def _repr_html_(self) -> str:
        return str(self.table().to_html(index=False, escape=True))


@dataclass(frozen=True)
class Feed:
    """A recorded feed: its events (an event table, see `liqlab.events`) and the report of reading it."""

    events: pd.DataFrame
    report: FeedReport

    def __len__(self) -> int:
        return len(self.events)

    def __repr__(self) -> str:
        return f"Feed({self.report})"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def _count(counts: dict[str, int], reason: str, count: int) -> None:
    if reason not in counts and len(counts) >= _MAX_REASONS:
        reason = OTHER
    counts[reason] = counts.get(reason, 0) + count


def _moment(ms: int | None) -> str:
    if ms is None:
        return "-"
    return dt.datetime.fromtimestamp(ms / 1000, dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
