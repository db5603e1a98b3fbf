"""Lines -> rotated gzip files, on a thread of its own: whoever hands lines over never waits for a disk."""

from __future__ import annotations

import datetime as dt
import fcntl
import gzip
import itertools
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, NamedTuple

from liqlab import clock
from liqlab.record.lines import gap

SUFFIX: Final = ".jsonl.gz"
PART: Final = ".part"
SLOW: Final = "the disk did not keep up"
_BLOCK_BYTES: Final = 256 << 10  # written at once, however little time has passed
_PIECE_BYTES: Final = 1 << 20


class Line(NamedTuple):
    """A line with its newline, and the venue and time (ms since the epoch) that say which file it belongs to."""

    venue: str
    ms: int
    data: bytes


class Part:
    """A file that is being written: whole gzip members, or it is cut back to the last whole one."""

    def __init__(self, folder: Path, venue: str, ms: int, period: int) -> None:
        self.venue, self.period, self.size = venue, period, 0
        folder.mkdir(parents=True, exist_ok=True)
        for second in itertools.count(ms // 1000):
            name = f"{venue}-{dt.datetime.fromtimestamp(second, dt.UTC):%Y%m%dT%H%M%SZ}{SUFFIX}"
            self.path = folder / (name + PART)
            if (folder / name).exists():
                continue
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            # The lock tells a recorder that starts later that this is no crash's.
            if _lock(self._file) and os.fstat(self._file).st_size == 0:
                return
            os.close(self._file)

    def append(self, lines: bytes) -> int:
        """Write lines as one member and return its bytes.

        Raises
        ------
        OSError
            They cannot be written; then the file is as before.
        """
        member = gzip.compress(lines, 6, mtime=0)
        rest = memoryview(member)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self.size)
            raise
        self.size += len(member)
        return len(member)

    def close(self) -> None:
        """Turn it into a whole file."""
        try:
            finish(self.path)
        finally:
            os.close(self._file)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def finish(part: Path) -> bool:
    """Turn a `.part` into a whole file: its whole lines, packed anew, under the final name or not at all.

    A second's lines alone pack badly: together they take a third of the bytes on a feed of 100 events a minute.

    Returns
    -------
    bool
        Whether some of it is damaged and not merely cut short; then it is kept beside, under a name in ``.damaged``.

    Raises
    ------
    OSError
        It can be neither packed anew nor renamed; then it is left as it is.
    """
    final = part.with_name(part.name.removesuffix(PART))
    if part.stat().st_size == 0:
        part.unlink()
        return False
    draft, damaged = final.with_name(final.name + ".tmp"), False
    try:
        with part.open("rb") as packed, draft.open("wb") as raw:
            with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as out:
                try:
                    for piece in _whole_lines(packed):
                        out.write(piece)
                except zlib.error:
                    damaged = True
            raw.flush()
            os.fsync(raw.fileno())
        draft.replace(final)
        if damaged:
            part.replace(final.with_name(final.name + ".damaged"))
        else:
            part.unlink()
    except OSError:
        # No room for a second copy: the first one is whole members too.
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        part.replace(final)
    return damaged


def _whole_lines(packed: IO[bytes]) -> Iterator[bytes]:
    """Unpack up to where a crash cut the file; zlib.error says that it is damaged there."""
    inflater, tail = zlib.decompressobj(31), b""
    while data := packed.read(_PIECE_BYTES):
        while data:
            text = tail + inflater.decompress(data)
            end = text.rfind(b"\n") + 1
            yield text[:end]
            tail, data = text[end:], inflater.unused_data
            if inflater.eof:
                inflater = zlib.decompressobj(31)


class Files:
    """A bounded queue of lines and the loop that empties it into files.

    Parameters
    ----------
    folder : pathlib.Path
        Where they go.
    headers : mapping of str to bytes
        The first line of every file, by venue.
    rotate_ms : int
        A new file begins at every whole multiple of it.
    flush_s : float
        Seconds that a line waits at most before it is written.
    queue_bytes : int
        Lines held at most; what comes beyond is dropped, counted, and marked as a gap.
    tell : callable
        Called with sentences, on the writing thread.

    Attributes
    ----------
    problem : str
        Why nothing can be written at present.
    written, files, lost : int
        Bytes after compression, files opened, lines given up.
    """

    def __init__(
        self,
        folder: Path,
        headers: Mapping[str, bytes],
        *,
        rotate_ms: int,
        flush_s: float,
        queue_bytes: int,
        tell: Callable[[str], None],
    ) -> None:
        self.problem = ""
        self.written = self.files = self.lost = 0
        self.folder, self._headers = folder, headers
        self._rotate_ms, self._flush_s, self._limit = rotate_ms, flush_s, queue_bytes
        self._block = min(_BLOCK_BYTES, queue_bytes // 2)
        self._tell = tell
        self._changed = threading.Condition()
        self._lines: list[Line] = []
        self._waiting = self._held = 0  # bytes in the queue; those and the ones being written
        self._dropped: dict[str, tuple[int, int, int]] = {}  # venue: first ms, last ms, frames
        self._closing = False
        self._parts: dict[str, Part] = {}

    def put(self, line: Line, *, must: bool = False) -> bool:
        """Hand a line over and return whether it was taken; one that `must` go in is, full or not."""
        size = len(line.data)
        with self._changed:
            if self._held + size > self._limit and not must:
                first, _, count = self._dropped.get(line.venue, (line.ms, 0, 0))
                self._dropped[line.venue] = first, line.ms, count + 1
                return False
            self._lines.append(line)
            self._waiting += size
            self._held += size
            if self._waiting >= self._block:
                self._changed.notify_all()
        return True

    def close(self) -> None:
        """Let `run` write what there is, finish its files, and return."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def run(self) -> None:
        """Write until `close`; files of an earlier crash are finished first."""
        self._recover()
        last = False
        while not last:
            lines, last = self._take()
            for (venue, period), group in itertools.groupby(lines, lambda line: (line.venue, self._period(line.ms))):
                self._store(venue, period, list(group))
            with self._changed:
                self._held -= sum(len(line.data) for line in lines)
            now = self._period(clock.now_ms())
            for part in [part for part in self._parts.values() if last or part.period < now]:
                self._finish(part)
        if self.lost:
            self._tell(f"{self.lost:,} lines could not be written and are lost")

    def _period(self, ms: int) -> int:
        return ms // self._rotate_ms

    def _recover(self) -> None:
        for path in sorted(self.folder.glob(f"*{SUFFIX}{PART}")):
            try:
                with path.open("rb+") as part:
                    if _lock(part.fileno()):
                        damaged = finish(path)
                        rest = ", without what is in its copy .damaged" if damaged else ""
                        self._tell(f"{path.name} was left by a crash and is finished now{rest}")
            except FileNotFoundError:
                continue  # another recorder was faster
            except OSError as error:
                self._tell(f"{path.name} was left by a crash and cannot be finished: {error.strerror or error}")

    def _take(self) -> tuple[list[Line], bool]:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting >= self._block, self._flush_s)
            lines, self._lines, self._waiting = self._lines, [], 0
            for venue, (first, to_ms, count) in self._dropped.items():
                line = Line(venue, to_ms, gap(venue, first, to_ms, SLOW, count))
                lines.append(line)
                self._held += len(line.data)
            self._dropped.clear()
            # Venues apart, each in its order: a file gets one member.
            lines.sort(key=lambda line: line.venue)
            return lines, self._closing

    def _store(self, venue: str, period: int, lines: list[Line]) -> None:
        data = b"".join(line.data for line in lines)
        while True:
            closing = self._closing
            try:
                self._append(venue, period, lines[0].ms, data)
            except OSError as error:
                if not self.problem:
                    self.problem = f"cannot write into {self.folder}: {error.strerror}"
                    self._tell(f"{self.problem}; trying again every second, and dropping frames once the queue is full")
            else:
                if self.problem:
                    self.problem = ""
                    self._tell(f"writing into {self.folder} again")
                return
            if closing:
                self.lost += len(lines)
                return
            with self._changed:
                self._changed.wait_for(lambda: self._closing, 1.0)

    def _append(self, venue: str, period: int, ms: int, data: bytes) -> None:
        part = self._parts.get(venue)
        if part is not None and part.period < period:
            self._finish(part)
            part = None
        if part is None:
            part = self._parts[venue] = Part(self.folder, venue, ms, period)
            self.files += 1
        self.written += part.append(data if part.size else self._headers[venue] + data)

    def _finish(self, part: Part) -> None:
        del self._parts[part.venue]
        try:
            part.close()
        except OSError as error:
            self._tell(f"{part.path.name} cannot be finished: {error.strerror}; the next start tries again")
