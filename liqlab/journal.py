"""Batches on disk: those that Redis could not take, or all of the hot window, so that an empty Redis is filled again.

What has been appended survives a crash of the process. A crash of the machine may cost the last moments before it
(``synchronous=NORMAL``), and then `Journal.recovery` says so. `liqlab.journalfile` has the form of the files, and what
is done about damaged ones.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from liqlab.events import Columns
from liqlab.journalfile import (
    Entry,
    JournalError,
    Mark,
    Recovery,
    Row,
    State,
    concerns_file,
    each,
    pack,
    read_state,
    recover,
    save_state,
    unpack,
)

__all__ = ["Entry", "Journal", "JournalError", "Recovery"]

ROW_BYTES: Final = 64  # what SQLite adds to a payload, about
RESERVED: Final = 1 << 16  # batch numbers that are written down at a time
_LEAP: Final = 1 << 32  # further than any numbers that a lost mark may have held
_WAL_PAGES: Final = 1000
# Acknowledged is everything up to the floor, and what `done` names; the CRC guards against a damaged `done`.
_OPEN: Final = "NOT EXISTS (SELECT 1 FROM done WHERE done.seq = entries.seq AND done.crc = entries.crc)"
_WAITS: Final = f"(seq > :floor AND {_OPEN})"
_log: Final = logging.getLogger(__name__)


@dataclass
class _Totals:
    """What the database holds, and up to where it is acknowledged."""

    floor: int = 0
    removed: int = 0
    batches: int = 0
    bytes: int = 0
    waiting_batches: int = 0
    waiting: int = 0


class Journal:
    """Batches in the order of their numbers, bounded by bytes; any thread may call it.

    Parameters
    ----------
    path : path
        The database; made, with its folder, where there is none. One process has it, others are refused.
    mode : {"spool", "wal"}
        ``spool`` holds what waits for Redis; ``wal`` also keeps what is acknowledged, for `window_ms`.
    max_bytes : int
        Payloads and `ROW_BYTES` for each. On disk the database may take twice that and 1 MB, its -wal 8 MB.
    window_ms : int
        Event time, back from the newest event that is held.

    Attributes
    ----------
    recovery : Recovery or None
        There is one where the file was damaged, gone, or older than its mark, and has been repaired.
    writer : str
        The name that the batches are numbered under; a process that is restarted keeps it.
    last_seq : int
        The highest number in use. After a crash up to `RESERVED` numbers are passed over.

    Raises
    ------
    JournalError
        Another process has the file, it belongs to another program, or the disk fails. Damage is repaired instead.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        mode: Literal["spool", "wal"] = "spool",
        max_bytes: int,
        window_ms: int = 900_000,
    ) -> None:
        if mode not in ("spool", "wal"):
            raise ValueError(f"mode = {mode!r}: must be 'spool' or 'wal'")
        self.path, self.mode, self.max_bytes, self.window_ms = Path(path), mode, max_bytes, window_ms
        self._lock = threading.RLock()
        self._bad: set[int] = set()
        self._now = _Totals()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._mark = Mark(self.path)
        except OSError as error:
            raise self._failure(error) from error
        try:
            self.recovery = recover(self.path, self._mark)
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=0.5)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise
        except BaseException as error:
            self._mark.close()
            if isinstance(error, OSError | sqlite3.Error):
                raise self._failure(error) from error
            raise
        if self.recovery:
            _log.warning("%s", self.recovery.sentence)

    def _open(self) -> None:
        # EXCLUSIVE: no other program reads along, and no -shm file is needed.
        for setting in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL"):
            self._db.execute(f"PRAGMA {setting}").fetchall()
        self._db.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}").fetchall()
        self._db.execute(f"PRAGMA journal_size_limit={_WAL_PAGES * 4096}").fetchall()
        state = read_state(self._db)
        assert state is not None  # or recover would have made a new file
        self.writer = state.writer
        self._now = _Totals(floor=state.floor, removed=state.removed)
        total = "SELECT count(*), ifnull(sum(events), 0), ifnull(sum(length(payload)), 0), max(newest_ms), max(seq)"
        batches, _, size, self._newest_ms, highest = self._db.execute(f"{total} FROM entries").fetchone()
        self._now.batches, self._now.bytes = batches, size + batches * ROW_BYTES
        waits = self._db.execute(f"{total} FROM entries WHERE {_WAITS}", {"floor": state.floor}).fetchone()
        self._now.waiting_batches, self._now.waiting = waits[:2]
        self.last_seq: int = max(state.last_seq, highest or 0, self._mark.last_seq)
        if not self._mark.sound:  # nobody knows which numbers went out since
            self.last_seq += _LEAP
        if self.mode == "spool":  # it may have been opened as `wal` before
            with self._transaction():
                self._remove(f"NOT {_WAITS}")
        self._note(self.last_seq)

    @property
    def waiting(self) -> int:
        """Events that are not acknowledged."""
        return self._now.waiting

    @property
    def waiting_batches(self) -> int:
        """Batches that are not acknowledged."""
        return self._now.waiting_batches

    @property
    def bytes(self) -> int:
        """What counts toward `max_bytes`."""
        return self._now.bytes

    @property
    def unreadable(self) -> int:
        """Batches found damaged since the journal was opened: reading leaves them out, and logs them."""
        return len(self._bad)

    def reserve(self, seq: int) -> None:
        """Write down that the numbers up to `seq` are in use, also by batches that never come here.

        Call it before a batch is sent: a restarted writer that used a number again would be taken for a repeat, and its
        batch be lost. It costs nothing but once in `RESERVED` numbers.

        Raises
        ------
        JournalError
            It cannot be written down.
        """
        with self._lock:
            if seq > self._mark.last_seq:
                try:
                    self._note(seq + RESERVED, sync=True)
                except OSError as error:
                    raise self._failure(error) from error
            self.last_seq = max(self.last_seq, seq)

    def append(self, seq: int, events: Columns, *, ahead: bool = False, acknowledged: bool = False) -> None:
        """Keep a batch; when this returns, it survives a crash of the process.

        Parameters
        ----------
        seq : int
            Its number: new, and above all that `acknowledge` has let go.
        events : Columns
            Not empty.
        ahead : bool
            The writer's own note, given back as `Entry.ahead`.
        acknowledged : bool
            Redis has it already; ``spool`` then keeps nothing but the number.

        Raises
        ------
        JournalError
            There is no room, the number is not new, or the disk fails. This batch is not kept, all others are.
        """
        if not len(events):
            raise ValueError(f"batch {seq} has no events")
        with self._lock:
            self.reserve(seq)
            if acknowledged and self.mode == "spool":
                return
            if seq <= self._now.floor and not acknowledged:
                raise JournalError(
                    f"{self.path}: batch {seq} comes after {self._now.floor} was acknowledged; number it anew, above "
                    f"{self.last_seq}"
                )
            row = pack(seq, ahead, events, self.writer)
            size = len(row.payload) + ROW_BYTES
            newest_ms = row.newest_ms if self._newest_ms is None else max(row.newest_ms, self._newest_ms)
            if self.bytes + size > self.max_bytes and self.mode == "wal":
                with self._transaction():
                    self._prune(newest_ms)
            if self.bytes + size > self.max_bytes:
                raise JournalError(self._full(len(events), size))
            try:
                if acknowledged:
                    with self._transaction():
                        self._insert(row)
                        self._db.execute("INSERT OR REPLACE INTO done VALUES (?, ?)", (seq, row.crc))
                else:
                    self._insert(row)
            except sqlite3.IntegrityError:
                raise JournalError(
                    f"{self.path} holds a batch {seq} already; number it anew, above {self.last_seq}"
                ) from None
            except sqlite3.Error as error:
                raise self._failure(error) from error
            self._newest_ms = newest_ms
            self._now.batches += 1
            self._now.bytes += size
            if not acknowledged:
                self._now.waiting_batches += 1
                self._now.waiting += len(events)
            self._note()

    def acknowledge(self, seq: int, *, alone: bool = False) -> None:
        """Let go of what Redis has: every batch up to `seq`, or batch `seq` `alone`.

        ``spool`` deletes it; ``wal`` keeps it for the window, and deletes what has left that.

        Raises
        ------
        JournalError
            The disk fails. Nothing has changed; calling this again is fine.
        """
        which = "seq = :seq" if alone else "seq <= :seq"
        with self._lock:
            self.reserve(seq)
            with self._transaction():
                taken = f"SELECT count(*), ifnull(sum(events), 0) FROM entries WHERE {which} AND {_WAITS}"
                batches, events = self._db.execute(taken, {"seq": seq, "floor": self._now.floor}).fetchone()
                self._now.waiting_batches -= batches
                self._now.waiting -= events
                if self.mode == "spool":
                    self._remove(which, seq=seq)
                elif alone:
                    self._db.execute("INSERT OR REPLACE INTO done SELECT seq, crc FROM entries WHERE seq = ?", (seq,))
                if not alone and seq > self._now.floor:
                    self._now.floor = seq
                    self._db.execute("DELETE FROM done WHERE seq <= ?", (seq,))
                if self.mode == "wal" and self._newest_ms is not None:
                    self._prune(self._newest_ms)
            self._note()
            self._shrink()

    def pending(self, limit: int = 100) -> list[Entry]:
        """Return the first batches that are not acknowledged, in order of their numbers."""
        return self._entries(self._now.floor, limit, f"AND {_OPEN}")

    def replay(self) -> Iterator[Entry]:
        """Yield everything that is held now, acknowledged or not, in order of the numbers."""
        after, upto = -1, self.last_seq
        while chunk := self._entries(after, 16, "", upto):
            yield from chunk
            after = chunk[-1].seq

    def forget_acknowledgements(self) -> int:
        """Let everything that is held wait again, because Redis has lost its memory.

        Returns
        -------
        int
            Events that had been acknowledged; none in ``spool``, which holds no such.
        """
        with self._lock:
            before = self.waiting
            with self._transaction():
                self._now.floor = 0
                self._db.execute("DELETE FROM done")
                total = "SELECT count(*), ifnull(sum(events), 0) FROM entries"
                self._now.waiting_batches, self._now.waiting = self._db.execute(total).fetchone()
            return self.waiting - before

    def close(self) -> None:
        """Give the file back; what waits, waits for the next process. Closing twice is fine."""
        with self._lock:
            if self._mark.closed:
                return
            try:
                with self._transaction():
                    pass  # it saves the state
                self._shrink(0)
                self._note(self.last_seq, sync=True)
            except (JournalError, OSError) as error:
                _log.warning("%s was not closed cleanly: %s", self.path, error)
            finally:
                self._db.close()
                self._mark.close()

    def _entries(self, after: int, limit: int, where: str, upto: int | None = None) -> list[Entry]:
        entries: list[Entry] = []
        with self._lock:
            try:
                for row in each(self._db, after, self.last_seq if upto is None else upto, where, self._damaged):
                    entries.append(Entry(row.seq, unpack(row), bool(row.ahead)))
                    if len(entries) == limit:
                        break
            except sqlite3.Error as error:
                raise self._failure(error) from error
        return entries

    def _damaged(self, seq: int) -> None:
        if seq not in self._bad:
            self._bad.add(seq)
            _log.error("%s: batch %d is damaged and was left out", self.path, seq)

    def _insert(self, row: Row) -> None:
        self._db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", row)

    def _remove(self, which: str, **values: int) -> None:
        values["floor"] = self._now.floor
        total = f"SELECT count(*), ifnull(sum(length(payload)), 0) FROM entries WHERE {which}"
        batches, size = self._db.execute(total, values).fetchone()
        if batches:
            self._db.execute(f"DELETE FROM entries WHERE {which}", values)
            self._db.execute("DELETE FROM done WHERE seq NOT IN (SELECT seq FROM entries)")
            self._now.batches -= batches
            self._now.bytes -= size + batches * ROW_BYTES
            self._now.removed += batches

    def _prune(self, newest_ms: int) -> None:
        self._remove(f"newest_ms < :cut AND NOT {_WAITS}", cut=newest_ms - self.window_ms)

    def _shrink(self, pages_at_once: int = 256) -> None:
        """Return pages to the disk when most of the file is free; 0 is all of them."""
        try:
            free, pages = (
                self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count")
            )
            if free > 256 and free * 2 > pages:
                self._db.executescript(f"PRAGMA incremental_vacuum({pages_at_once})")  # execute() frees one
        except sqlite3.Error as error:  # it will be tried again
            _log.warning("%s could not be made smaller: %s", self.path, error)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Do all or nothing, in the database and in `_now`."""
        before = replace(self._now)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            save_state(self._db, State(self.writer, self.last_seq, self._now.floor, self._now.removed))
            self._db.execute("COMMIT")
        except BaseException as error:
            self._now = before
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError):
                raise self._failure(error) from error
            raise

    def _note(self, last_seq: int | None = None, *, sync: bool = False) -> None:
        """Bring the mark up to date, always after the database: it must not promise what is not there."""
        now, last_seq = self._now, self._mark.last_seq if last_seq is None else last_seq
        self._mark.write(self.writer, now.removed + now.batches, now.removed, last_seq, sync=sync)

    def _full(self, events: int, size: int) -> str:
        kept = "" if self.mode == "spool" else f", some of them for the window of {self.window_ms / 1000:g} s"
        cure = f"{'' if size > self.max_bytes else 'let Redis take them, or '}raise journal.max_bytes"
        return (
            f"{self.path} is full: {self.waiting:,} events wait for Redis; {self.bytes:,} of {self.max_bytes:,} bytes "
            f"are taken{kept}, and a batch of {events:,} events needs {size:,}; nothing was dropped; {cure}"
        )

    def _failure(self, error: Exception) -> JournalError:
        cure = "check that its disk has room and its folder may be written, or name another with journal.path"
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            cure = "another program has it open; close that"
        elif isinstance(error, sqlite3.Error) and concerns_file(error):
            cure = "open it anew: it is repaired then"
        return JournalError(f"{self.path}: {error}; {self.waiting:,} events wait in it; {cure}")
