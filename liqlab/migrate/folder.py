"""The backup: a folder that holds what the legacy keys held, and the events that are made of it, in time order.

========================  =============================================================================================
``legacy.parquet``        every entry of every key: `key` (its place in the manifest), `score` or `id`, `entry`
``events.parquet``        the accepted events, an event table that `liqlab.read_feed` reads, and `key`
``rejected.jsonl``        what is rejected: key, place, reason, raw text; absent where nothing is
``manifest.json``         which keys, and how many of their entries are events, duplicates, rejected
``progress.json``         how far the migration is
========================  =============================================================================================

It is made under another name, read back, synced and renamed: a folder that is there is complete. Nothing but
``progress.json`` changes afterwards, so a migration that is killed and begun again makes the same batches.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from redis.asyncio import Redis

from liqlab.archive import history
from liqlab.events import COLUMNS, SIDES, Columns, event_table
from liqlab.feeds.dedup import mix
from liqlab.feeds.normalise import occurrences
from liqlab.migrate.sources import Entry, MigrateError, Reader, Source, entries, state_of
from liqlab.settings import Settings

WINDOW: Final = 50_000  # events that are sorted, written and compared at a time
_TOGETHER: Final = 50_000  # events that are put down at a time, unsorted
_FORM: Final = 1
_NAMED: Final = pa.dictionary(pa.int32(), pa.string())
_LEGACY: Final = pa.schema(
    [("key", pa.int32()), ("score", pa.float64()), ("id", pa.string()), ("entry", pa.list_(pa.binary()))]
)
_EVENTS: Final = pa.schema(
    [
        ("ts_ms", pa.int64()),
        *((name, _NAMED) for name in ("exchange", "symbol", "side")),
        *((name, pa.float64()) for name in ("price", "size", "notional")),
        *((name, pa.int32()) for name in ("key", "chunk")),
    ]
)


@dataclass
class Key:
    """A key in the manifest: what it was, and ``entries = accepted + duplicates + there + rejected``.

    Attributes
    ----------
    source : Source
    chunk : int
        Keys of one chunk are migrated together, before those of the next.
    crc : int
        Of its entries, in order.
    accepted : int
        Events in ``events.parquet``.
    duplicates, there, rejected : int
        Repeated among the legacy events; in Redis before the migration began; no events.
    """

    source: Source
    chunk: int
    crc: int = 0
    accepted: int = 0
    duplicates: int = 0
    there: int = 0
    rejected: int = 0


@dataclass
class Progress:
    """How far a migration is.

    Attributes
    ----------
    seq : int
        The last batch that the server has acknowledged.
    epochs : dict of str to str
        By shard that has a batch: the token of the table of names that it was written under.
    found : dict of str to int
        By key: its events as read back from Redis.
    removed : list of int
        Keys that are removed, or about to be.
    done : bool
    """

    seq: int = 0
    epochs: dict[str, str] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    removed: list[int] = field(default_factory=list)
    done: bool = False


@dataclass
class Manifest:
    """What is in the folder; `name` is the writer's whose batches its events are, of `batch` events each."""

    name: str
    made_ms: int
    batch: int
    shards: int
    used_memory: int
    keys: list[Key]
    notes: list[str] = field(default_factory=list)
    form: int = _FORM


class Folder:
    """A complete backup.

    Raises
    ------
    MigrateError
        The folder is none, or of a later version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            plain = json.loads((path / "manifest.json").read_text())
            if plain["form"] != _FORM:
                raise MigrateError(
                    f"{path} is of form {plain['form']}; this liqlab knows {_FORM}: take the one it is of"
                )
            keys = [Key(**{**key, "source": Source(**key["source"])}) for key in plain.pop("keys")]
            self.manifest = Manifest(**plain, keys=keys)
        except (OSError, ValueError, TypeError, KeyError):
            raise MigrateError(
                f"{path} is no backup of a migration; name another folder, or one that is not there"
            ) from None
        self.progress = Progress()
        with suppress(OSError, ValueError, TypeError):  # after a crash of the machine; the server knows better
            self.progress = Progress(**json.loads((path / "progress.json").read_text()))

    @property
    def events(self) -> int:
        """Events to migrate."""
        return sum(key.accepted for key in self.manifest.keys)

    @property
    def quarantine(self) -> Path | None:
        """The file of rejected entries, None where none is."""
        path = self.path / "rejected.jsonl"
        return path if path.exists() else None

    def save(self, *, sync: bool = False) -> None:
        """Write down how far it is; with `sync` so that it survives a crash of the machine."""
        _write(self.path / "progress.json", asdict(self.progress), sync=sync)

    def batches(self, chunk: int, after: int) -> Iterator[tuple[int, Columns, int]]:
        """Yield the batches of a chunk behind number `after`: number, events, and when the events behind it begin.

        That is ms since the epoch; the chunk's end is the last event's own time + 1.
        """
        size = self.manifest.batch
        for first, group in self._groups(chunk):
            if first + -(-group.rows // size) - 1 <= after:
                continue
            events = Columns.of(_table(group.read()))
            times = events.ts_ms
            for seq, at in enumerate(range(0, group.rows, size), first):
                if seq > after:
                    last = min(at + size, group.rows) - 1
                    following = int(times[last + 1]) if last + 1 < group.rows else int(times[last]) + 1
                    yield seq, events.rows(slice(at, last + 1)), following

    def windows(self, chunk: int) -> Iterator[tuple[pd.DataFrame, NDArray[np.int32]]]:
        """Yield the events of a chunk window by window, no moment in two, with the key that each is of."""
        for _, group in self._groups(chunk):
            rows = group.read()
            yield _table(rows), rows["key"].to_numpy()

    def _groups(self, chunk: int) -> Iterator[tuple[int, _Group]]:
        with pq.ParquetFile(self.path / "events.parquet") as file:
            first = 1
            column = _EVENTS.get_field_index("chunk")
            for at in range(file.metadata.num_row_groups):
                described = file.metadata.row_group(at)
                if described.column(column).statistics.min == chunk:
                    yield first, _Group(file, at, described.num_rows)
                first += -(-described.num_rows // self.manifest.batch)

    def legacy(self) -> Iterator[tuple[int, list[Entry]]]:
        """Yield the entries as they were, a key's together: its place in the manifest, and some of its entries."""
        return _legacy(self.path / "legacy.parquet")


@dataclass(frozen=True)
class _Group:
    file: pq.ParquetFile
    at: int
    rows: int

    def read(self) -> pd.DataFrame:
        rows: pd.DataFrame = self.file.read_row_group(self.at).to_pandas()
        return rows


def _table(rows: pd.DataFrame) -> pd.DataFrame:
    return event_table(*(rows[name].array for name in COLUMNS))


def _legacy(path: Path) -> Iterator[tuple[int, list[Entry]]]:
    with pq.ParquetFile(path) as file:
        for at in range(file.metadata.num_row_groups):  # a page each
            rows = file.read_row_group(at)
            scores, ids, texts = (rows[name].to_pylist() for name in ("score", "id", "entry"))
            whens = [score if identity is None else identity for score, identity in zip(scores, ids, strict=True)]
            yield rows["key"][0].as_py(), list(zip(whens, texts, strict=True))


def _crc(entries: Sequence[Entry], crc: int) -> int:
    for when, words in entries:
        crc = zlib.crc32(b"\0".join([repr(when).encode(), *words]), crc)
    return crc


def identity(events: pd.DataFrame) -> NDArray[np.uint64]:
    """Return a hash of each event; of equal ones the first, the second, ... have different ones."""
    columns = Columns.of(events)
    exchange, symbol = (
        pd.util.hash_array(np.array(names, object))[codes]
        for names, codes in ((columns.exchanges, columns.exchange), (columns.symbols, columns.symbol))
    )
    side = columns.side.astype(np.int64)
    own = (exchange, symbol, side, columns.ts_ms, columns.price, columns.size)
    return mix(mix(*own), occurrences(own))


async def present(redis: Redis, events: pd.DataFrame, settings: Settings) -> NDArray[np.bool_]:
    """Return which of some events Redis has; they must be all that there are between the first and the last of them."""
    if events.empty:
        return np.zeros(0, bool)
    first, last = int(events["ts_ms"].iloc[0]), int(events["ts_ms"].iloc[-1])
    stored = await history(redis, start_ms=first, end_ms=last, settings=settings)
    return np.isin(identity(events), identity(stored)) if len(stored) else np.zeros(len(events), bool)


async def make(
    redis: Redis,
    path: Path,
    manifest: Manifest,
    reader: Callable[[Path], Reader],
    settings: Settings,
    tell: Callable[[int], None],
) -> Folder:
    """Make the backup at `path`; `manifest` says of which keys, and is filled in.

    Raises
    ------
    MigrateError
        A key changes while it is read, or the disk does not give back what was written.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, mode=0o700)
    reading = reader(partial / "rejected.jsonl")
    try:
        await _read(redis, partial, manifest.keys, reading, tell)
    finally:
        reading.close()
    manifest.notes = list(dict.fromkeys([*manifest.notes, *reading.notes]))
    _read_back(partial / "legacy.parquet", manifest.keys)
    await _sort(redis, partial, manifest, settings)
    _write(partial / "manifest.json", asdict(manifest))
    for file in (*partial.iterdir(), partial):
        _sync(file)
    partial.rename(path)
    _sync(path.parent)
    return Folder(path)


async def _read(redis: Redis, folder: Path, keys: list[Key], reader: Reader, tell: Callable[[int], None]) -> None:
    done, waiting = 0, list[pa.Table]()
    with (
        pq.ParquetWriter(folder / "legacy.parquet", _LEGACY, compression="zstd") as legacy,
        pq.ParquetWriter(folder / "unsorted.parquet", _EVENTS, compression="zstd") as unsorted,
    ):
        for number, key in enumerate(keys):
            count = 0
            async for page in entries(redis, key.source):
                whens, texts = zip(*page, strict=True)
                streamed = key.source.kind == "stream"
                columns = [[number] * len(page), [None if streamed else when for when in whens]]
                columns += [[when if streamed else None for when in whens], list(texts)]
                arrays = [pa.array(column, one.type) for column, one in zip(columns, _LEGACY, strict=True)]
                legacy.write_table(pa.Table.from_arrays(arrays, schema=_LEGACY), row_group_size=len(page))
                key.crc, count = _crc(page, key.crc), count + len(page)
                read = reader.read(key.source, page)
                if read.events is not None:
                    key.accepted += len(read.events)
                    waiting.append(_rows(read.events, number, key.chunk))
                    if sum(map(len, waiting)) >= _TOGETHER:
                        _flush(unsorted, waiting)
                key.duplicates += read.duplicates
                key.rejected += read.rejected
                tell(done + count)
            _, _, state = await state_of(redis, key.source.key)
            if state != key.source.state or count != key.source.entries:
                raise MigrateError(
                    f"{key.source.key} had {key.source.entries} entries when reading began and changed meanwhile; "
                    "stop what writes it, and run this again"
                )
            done += count
        _flush(unsorted, waiting)


def _rows(events: Columns, key: int, chunk: int) -> pa.Table:
    names = ((events.exchange, events.exchanges), (events.symbol, events.symbols), (events.side, SIDES))
    coded = [
        pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(of, pa.string())) for codes, of in names
    ]
    numbers = [events.price, events.size, events.notional]
    places = [np.full(len(events), number, np.int32) for number in (key, chunk)]
    return pa.Table.from_arrays([pa.array(events.ts_ms), *coded, *map(pa.array, (*numbers, *places))], schema=_EVENTS)


def _flush(writer: pq.ParquetWriter, waiting: list[pa.Table]) -> None:
    if waiting:
        rows = pa.concat_tables(waiting).unify_dictionaries()
        writer.write_table(rows, row_group_size=len(rows))
        waiting.clear()


def _read_back(path: Path, keys: list[Key]) -> None:
    found: dict[int, int] = {}
    count: Counter[int] = Counter()
    for number, page in _legacy(path):
        found[number] = _crc(page, found.get(number, 0))
        count[number] += len(page)
    for number, key in enumerate(keys):
        if (found.get(number, 0), count[number]) != (key.crc, key.source.entries):
            raise MigrateError(f"{path}: {key.source.key} does not read back as it was written; check that disk")


async def _sort(redis: Redis, folder: Path, manifest: Manifest, settings: Settings) -> None:
    """Write the events in time order, without those that Redis has already; window by window, in bounded memory."""
    path = folder / "unsorted.parquet"
    with pq.ParquetWriter(folder / "events.parquet", _EVENTS, compression="zstd") as writer:
        for chunk in sorted({key.chunk for key in manifest.keys}):
            of_chunk = [("chunk", "==", chunk)]
            times = np.sort(pq.read_table(path, columns=["ts_ms"], filters=of_chunk)["ts_ms"].to_numpy())
            if not len(times):
                continue
            edges = [*dict.fromkeys(times[::WINDOW].tolist()), int(times[-1]) + 1]
            for start, stop in pairwise(edges):
                inside = [*of_chunk, ("ts_ms", ">=", start), ("ts_ms", "<", stop)]
                rows = pq.read_table(path, filters=inside).to_pandas()
                rows = rows.iloc[np.argsort(rows["ts_ms"].to_numpy(), kind="stable")].reset_index(drop=True)
                there = await present(redis, _table(rows), settings)
                for number, count in zip(*np.unique(rows["key"].to_numpy()[there], return_counts=True), strict=True):
                    manifest.keys[number].there += int(count)
                    manifest.keys[number].accepted -= int(count)
                if not there.all():
                    kept = pa.Table.from_pandas(rows[~there], schema=_EVENTS, preserve_index=False)
                    writer.write_table(kept, row_group_size=len(kept))
    path.unlink()
    with pq.ParquetFile(folder / "events.parquet") as file:
        if file.metadata.num_rows != sum(key.accepted for key in manifest.keys):
            raise MigrateError(f"{folder}: the events do not read back as they were written; check that disk")


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, plain: dict[str, Any], *, sync: bool = False) -> None:
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        json.dump(plain, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)
