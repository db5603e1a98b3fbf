"""The files of a journal, and what is done about damaged ones.

A journal is three files that belong together: the SQLite database `NAME`, its `NAME-wal`, and `NAME-mark`, 64 bytes
that say how many batches were ever appended. SQLite drops the damaged end of a `-wal` without a word; the mark tells.

Every entry carries a CRC-32 and its writer's name, and stands for itself. A damaged database is read entry by entry
into a new one and set aside as `NAME.damaged-<token>`; nothing is overwritten.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote
from zlib import crc32

import msgpack
import numpy as np
from numpy.typing import NDArray

from liqlab import clock
from liqlab.events import Columns

_APPLICATION: Final = 0x6C69716A
_PAGE: Final = 4096
# The same statements in every file, so that a lost first page can be had from a new one.
_SCHEMA: Final = f"""
PRAGMA page_size = {_PAGE}; PRAGMA auto_vacuum = INCREMENTAL; PRAGMA application_id = {_APPLICATION};
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY, ahead INTEGER, events INTEGER, newest_ms INTEGER, crc INTEGER, payload BLOB
);
CREATE INDEX newest ON entries (newest_ms);
CREATE TABLE done (seq INTEGER PRIMARY KEY, crc INTEGER);
CREATE TABLE state (id INTEGER PRIMARY KEY, writer TEXT, last_seq INTEGER, floor INTEGER, removed INTEGER, crc INTEGER);
"""
_SYSTEM_ERRORS: Final = (
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM),
    *(sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_FULL, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_MISUSE),
)
_PATIENCE: Final = 10_000  # numbers that are tried one by one where entries should be and cannot be read
_MARK: Final = struct.Struct("<8sQQQ16s")
_MAGIC: Final = b"liqjrnl1"
_log: Final = logging.getLogger(__name__)


class JournalError(RuntimeError):
    """The journal cannot be opened, read or written; the message says how much waits, and the cure."""


@dataclass(frozen=True)
class Recovery:
    """What became of a damaged journal."""

    kept_batches: int
    kept_events: int
    lost_batches: int | None  # None where nothing tells
    set_aside: Path | None  # the damaged database, its -wal beside it; None where there was none
    sentence: str


@dataclass(frozen=True)
class Entry:
    """A batch as it was appended."""

    seq: int
    events: Columns  # only the names that occur; all but the codes are read-only
    ahead: bool


class Row(NamedTuple):
    """A record of the table `entries`."""

    seq: int
    ahead: int
    events: int
    newest_ms: int
    crc: int
    payload: bytes


class State(NamedTuple):
    """The record of the table `state`: every batch up to `floor` is acknowledged, `removed` ones are no longer held."""

    writer: str
    last_seq: int
    floor: int
    removed: int


class Mark:
    """The file beside the database: how many batches were ever appended, and which process has the journal.

    It is written after the database and never before. So it promises nothing that is not there, and where the database
    holds less, something was lost.
    """

    def __init__(self, path: Path) -> None:
        self.writer, self.appended, self.removed, self.last_seq = "", 0, 0, 0
        self.sound = self.closed = False
        self._file = os.open(_beside(path, "-mark"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise JournalError(
                f"{path} is in use by another writer; stop that one, or name another file with journal.path"
            ) from None
        content = os.pread(self._file, 64, 0)
        if len(content) == _MARK.size + 4:
            magic, appended, removed, last_seq, writer = _MARK.unpack(content[:-4])
            if magic == _MAGIC and content[-4:] == crc32(content[:-4]).to_bytes(4, "little"):
                self.writer, self.appended, self.removed, self.last_seq = writer.decode(), appended, removed, last_seq
                self.sound = True

    def write(self, writer: str, appended: int, removed: int, last_seq: int, *, sync: bool = False) -> None:
        """Replace the content; with `sync` it survives a crash of the machine, and OSError is raised."""
        if self.closed:
            raise JournalError("this journal is closed; open it anew")
        self.writer, self.appended, self.removed, self.last_seq, self.sound = writer, appended, removed, last_seq, True
        content = _MARK.pack(_MAGIC, appended, removed, last_seq, writer.encode())
        try:
            os.pwrite(self._file, content + crc32(content).to_bytes(4, "little"), 0)
            if sync:
                os.fsync(self._file)
        except OSError as error:
            if sync:
                raise
            # The batch is in the database: to refuse it now would be wrong.
            _log.warning("the mark of a journal could not be written: %s", error)

    def close(self) -> None:
        """Give the journal back."""
        if not self.closed:
            self.closed = True
            os.close(self._file)


def pack(seq: int, ahead: bool, events: Columns, writer: str) -> Row:
    """Return the record of a batch; its payload holds everything that is needed to read it."""
    exchange, exchanges = _used(events.exchange, events.exchanges)
    symbol, symbols = _used(events.symbol, events.symbols)
    columns = [
        *(events.ts_ms.astype("<i8", copy=False), exchange, symbol, events.side.astype(np.uint8)),
        *(column.astype("<f8", copy=False) for column in (events.price, events.size, events.notional)),
    ]
    payload = msgpack.packb([writer, exchanges, symbols, *(column.tobytes() for column in columns)])
    head = (seq, int(ahead), len(events), int(events.ts_ms.max()))
    return Row(*head, _crc(head, payload), payload)


def unpack(row: Row) -> Columns:
    """Return the events of a sound record."""
    _, exchanges, symbols, ts_ms, exchange, symbol, side, price, size, notional = msgpack.unpackb(row.payload)

    def codes(column: bytes) -> NDArray[np.int64]:
        return np.frombuffer(column, f"<u{len(column) // row.events}").astype(np.int64)

    def numbers(column: bytes) -> NDArray[np.float64]:
        return np.frombuffer(column, "<f8")

    return Columns(
        np.frombuffer(ts_ms, "<i8"),
        codes(exchange),
        codes(symbol),
        codes(side),
        numbers(price),
        numbers(size),
        numbers(notional),
        exchanges,
        symbols,
    )


def _used(codes: NDArray[Any], names: list[str]) -> tuple[NDArray[Any], list[str]]:
    used, inverse = np.unique(codes, return_inverse=True)
    kind = "<u1" if len(used) <= 1 << 8 else "<u2" if len(used) <= 1 << 16 else "<u4"
    return inverse.astype(kind), [names[code] for code in used.tolist()]


def _crc(head: tuple[Any, ...], payload: bytes) -> int:
    return crc32(payload, crc32(repr(head).encode()))


def _sound(row: Row) -> bool:
    # A damaged record may hold anything, of any type.
    return isinstance(row.payload, bytes) and row.crc == _crc(row[:4], row.payload)


def each(
    db: sqlite3.Connection, after: int, upto: int, where: str = "", damaged: Callable[[int], None] | None = None
) -> Iterator[Row]:
    """Yield the sound entries with numbers above `after` and up to `upto`, in order, whatever lies between them.

    Parameters
    ----------
    where : str
        More conditions, with a leading AND.
    damaged : callable, optional
        Is called with the number of an entry that was left out; once for a hole whose entries cannot be told apart.

    Raises
    ------
    sqlite3.Error
        The system fails, not the file.
    """
    query = f"SELECT * FROM entries WHERE seq > ? AND seq <= ? {where} ORDER BY seq LIMIT 1"
    misses = 0
    while after < upto:
        try:
            found = db.execute(query, (after, upto)).fetchone()
            if found is None:
                return
            row = Row(*found)
            if row.seq > after and _sound(row):
                misses = 0
                yield row
                after = row.seq
                continue
            # One whose number can be believed is stepped over; any other is passed by inches.
            step = row.seq - after if misses == 0 and after < row.seq <= upto else 1
        except sqlite3.Error as error:
            if not concerns_file(error):
                raise
            step = 1
        if damaged is not None and misses == 0:
            damaged(after + step)
        # A hole may be as wide as all numbers: after `_PATIENCE` of them the steps grow.
        misses += 1
        after += max(step, 1 << max(0, misses - _PATIENCE))


def save_state(db: sqlite3.Connection, state: State) -> None:
    """Replace the record of the table `state`."""
    db.execute("INSERT OR REPLACE INTO state VALUES (1, ?, ?, ?, ?, ?)", (*state, _crc(tuple(state), b"")))


def read_state(db: sqlite3.Connection) -> State | None:
    """Return the record of the table `state`, if it is sound."""
    row = db.execute("SELECT writer, last_seq, floor, removed, crc FROM state WHERE id = 1").fetchone()
    return State(*row[:4]) if row is not None and row[4] == _crc(row[:4], b"") else None


def concerns_file(error: sqlite3.Error) -> bool:
    """Return whether an error speaks of the file, and not of the disk, the folder, or another program."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # Python's own, about text that is not UTF-8; a closed connection has no code either
        return not isinstance(error, sqlite3.ProgrammingError)
    if code & 0xFF == sqlite3.SQLITE_IOERR:
        return bool(code in (sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_READ))
    return code & 0xFF not in _SYSTEM_ERRORS


def recover(path: Path, mark: Mark) -> Recovery | None:
    """Leave a sound database at `path`; return what was lost and kept if there was none, although there should be.

    Raises
    ------
    JournalError
        The file is another program's.
    OSError, sqlite3.Error
        The system fails. What is there is left alone.
    """
    for leftover in (".new", ".new-wal", ".repair", ".repair-wal", ".repair-shm"):
        _beside(path, leftover).unlink(missing_ok=True)
    if not path.exists() and not _beside(path, "-wal").exists() and mark.appended == mark.removed:
        _create(path, State(mark.writer or clock.token(), mark.last_seq, 0, mark.removed)).close()
        os.replace(_beside(path, ".new"), path)
        mark.sound = True  # what was not there has given out no numbers
        return None
    reason = _damage(path, mark)
    return None if reason is None else _salvage(path, mark, reason)


def _damage(path: Path, mark: Mark) -> str | None:
    """Say what is wrong with the database, without changing it."""
    if not path.exists():
        return "it is gone"
    if path.stat().st_size < 512:
        return "it is empty"  # SQLite would take it for a new one
    try:
        with closing(_read_only(path)) as db:
            tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master")]
            ours = db.execute("PRAGMA application_id").fetchone()[0] == _APPLICATION or "entries" in tables
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict == "ok" and tables and not ours:
                raise JournalError(f"{path} is the database of another program; name another file with journal.path")
            state = read_state(db)
            if verdict != "ok" or state is None:
                return str(verdict).splitlines()[-1] if verdict != "ok" else "its state is not readable"
            batches = 0
            for row in map(Row._make, db.execute("SELECT * FROM entries")):
                if not _sound(row):
                    return f"batch {row.seq!r} does not match its checksum"
                batches += 1
    except sqlite3.Error as error:
        if not concerns_file(error):
            raise
        return str(error)
    finally:
        _beside(path, "-shm").unlink(missing_ok=True)
    if mark.sound and mark.writer != state.writer:  # another file was put in its place: the mark is not about this one
        mark.sound = False
    short = mark.appended - state.removed - batches
    return f"{short} batches at its end are missing" if mark.sound and short > 0 else None


def _salvage(path: Path, mark: Mark, reason: str) -> Recovery:
    """Read what can be read into a new file, and set the old one aside."""
    with closing(_create(path, State("", 0, 0, 0))) as fresh:
        state, writer, highest, batches, events = None, None, 0, 0, 0
        with closing(_repaired(path)) as old:
            with suppress(sqlite3.Error):
                state = read_state(old)
            fresh.execute("BEGIN")
            for row in each(old, -1, 1 << 62):
                fresh.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)
                writer, highest, batches, events = (
                    msgpack.unpackb(row.payload)[0],
                    row.seq,
                    batches + 1,
                    events + row.events,
                )
            with suppress(sqlite3.Error):
                for seq, crc in old.execute("SELECT seq, crc FROM done"):
                    fresh.execute("INSERT OR IGNORE INTO done VALUES (?, ?)", (seq, crc))
        removed = state.removed if state else mark.removed
        lost = max(0, mark.appended - removed - batches) if mark.sound else None
        fresh_state = State(
            mark.writer if mark.sound else state.writer if state else writer or clock.token(),
            max(mark.last_seq, state.last_seq if state else 0, highest),
            # In doubt all wait: a repeat is recognised, a loss is not.
            state.floor if state else 0,
            removed,
        )
        save_state(fresh, fresh_state)
        fresh.execute("COMMIT")
        mark.sound = mark.sound or fresh_state.last_seq == 0  # a new name has given out no numbers
    aside = _beside(path, f".damaged-{clock.token()}") if path.exists() else None
    for end in ("", "-wal"):
        with suppress(FileNotFoundError):
            os.replace(_beside(path, end), _beside(aside or _beside(path, ".damaged"), end))
    os.replace(_beside(path, ".new"), path)
    for leftover in (".repair", ".repair-wal", ".repair-shm"):
        _beside(path, leftover).unlink(missing_ok=True)
    missing = "how many are lost is not known" if lost is None else f"{lost:,} batches are lost"
    kept = f"the damaged file is kept as {aside.name}" if aside else "a new one was made"
    sentence = f"{path} was damaged ({reason}): {batches:,} batches with {events:,} events were read, {missing}; {kept}"
    return Recovery(batches, events, lost, aside, sentence)


def _create(path: Path, state: State) -> sqlite3.Connection:
    """Make a new database beside `path`: whoever finds one at `path` finds it whole."""
    db = sqlite3.connect(_beside(path, ".new"), isolation_level=None)
    try:
        db.executescript(_SCHEMA)
        save_state(db, state)
    except BaseException:
        db.close()
        raise
    return db


def _repaired(path: Path) -> sqlite3.Connection:
    """Open a copy whose first page, always the same one, is sound, and whose length is what the file has."""
    copy, first = _beside(path, ".repair"), bytearray(_beside(path, ".new").read_bytes()[:_PAGE])
    first[18:20] = b"\2\2"  # it may have a -wal
    first[92:96] = bytes(4)  # SQLite then trusts the file's length, not what this page says of it
    copy.write_bytes(b"")
    if path.exists():
        shutil.copyfile(path, copy)
    if _beside(path, "-wal").exists():
        shutil.copyfile(_beside(path, "-wal"), _beside(path, ".repair-wal"))
    with open(copy, "r+b") as file:
        file.write(first)
    return _read_only(copy)


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None, timeout=0.5)


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)
