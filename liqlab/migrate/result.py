"""What a migration did, entry by entry accounted for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import pandas as pd

from liqlab.migrate.folder import Folder
from liqlab.migrate.planning import Plan

_REJECTED: Final = 10_000  # rows of rejected entries that are shown
DRY: Final = "dry run"
_VERDICTS: Final = ("migrated", "removed", DRY)


@dataclass(frozen=True)
class Migrated:
    """What a migration did.

    Attributes
    ----------
    table : pandas.DataFrame
        One row a symbol, as the keys' names say it: symbol, keys, entries, migrated (read back from Redis), duplicates,
        there (in Redis before), rejected, verdict. ``entries = migrated + duplicates + there + rejected`` or the
        verdict says what is missing.
    keys : pandas.DataFrame
        The same by key, with its form.
    rejected : pandas.DataFrame
        Entries that are no events: key, place (in the key, from 1), reason, member; the first 10,000.
    quarantine : pathlib.Path or None
        The file with all of them.
    memory : dict of str to int
        used_memory without the buffers of clients: ``before``, with ``both`` forms, ``after`` the removal of old keys.
    legacy_bytes : int
        Of the old keys, by MEMORY USAGE.
    notes : list of str
        What was assumed.
    plan : Plan or None
        Of a migration that began with this call.
    """

    table: pd.DataFrame
    keys: pd.DataFrame
    rejected: pd.DataFrame
    quarantine: Path | None
    memory: dict[str, int]
    legacy_bytes: int
    notes: list[str]
    plan: Plan | None

    @property
    def ok(self) -> bool:
        """Whether every entry is accounted for."""
        return bool(self.table["verdict"].isin(_VERDICTS).all())

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON."""
        return {
            "ok": self.ok,
            "symbols": self.table.to_dict("records"),
            "rejected": self.rejected["reason"].value_counts().to_dict(),
            "quarantine": None if self.quarantine is None else str(self.quarantine),
            "memory": self.memory,
            "legacy_bytes": self.legacy_bytes,
            "notes": self.notes,
        }

    def _repr_html_(self) -> str:
        return str(self.table.to_html(index=False))


def result(folder: Folder, verdicts: list[str], memory: dict[str, int], made: Plan | None) -> Migrated:
    """Return the account of a folder, with a verdict for each of its keys."""
    rows = [
        {
            "key": key.source.key,
            "form": key.source.form,
            "symbol": key.source.symbol,
            "entries": key.source.entries,
            "migrated": folder.progress.found.get(str(number), 0),
            "duplicates": key.duplicates,
            "there": key.there,
            "rejected": key.rejected,
            "verdict": verdict,
        }
        for number, (key, verdict) in enumerate(zip(folder.manifest.keys, verdicts, strict=True))
    ]
    keys = pd.DataFrame(rows)
    numbers = ["entries", "migrated", "duplicates", "there", "rejected"]
    grouped = keys.groupby("symbol")
    table = pd.concat([grouped.size().rename("keys"), grouped[numbers].sum(), grouped["verdict"].agg(_joined)], axis=1)
    rejected: list[dict[str, Any]] = []
    if folder.quarantine:
        with folder.quarantine.open("rb") as lines:
            rejected = [orjson.loads(line) for _, line in zip(range(_REJECTED), lines, strict=False)]
    columns = {"file": "key", "line": "place", "reason": "reason", "raw": "member"}
    return Migrated(
        table=table.reset_index(),
        keys=keys,
        rejected=pd.DataFrame(rejected, columns=list(columns)).rename(columns=columns),
        quarantine=folder.quarantine,
        memory=memory,
        legacy_bytes=sum(key.source.bytes for key in folder.manifest.keys),
        notes=folder.manifest.notes,
        plan=made,
    )


def _joined(verdicts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(verdicts))
