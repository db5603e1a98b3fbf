"""Files -> blocks of whole lines: names, compression, damage. What is damaged is reported, the rest is kept."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from liqlab.feeds.rows import FeedError

BLOCK_BYTES: Final = 2 << 20
MAX_LINE_BYTES: Final = 64 << 20
_STEP_BYTES: Final = 512  # a cut archive loses what is left of one step
_SUFFIXES: Final = frozenset(
    {".csv", ".json", ".jsonl", ".ndjson", ".txt", ".log", ".tsv", ".raw", ".parquet", ".zip", ".gz", ".zst"}
)
_MAGIC: Final = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\x03\x04", "zip"), (b"PAR1", "parquet"))
_RAW_SHOWN: Final = 65_536
_TABLE_ROWS: Final = 65_536


@dataclass(frozen=True)
class Block:
    """Some whole lines of a file, or some rows of a table, or what is wrong with the rest of the file.

    Attributes
    ----------
    file : str
        The file's name; of a zip, ``archive.zip/member.csv``.
    line : int
        The number of the first line or row, counted from 1.
    data : bytes
        Lines, each with its newline except perhaps the last.
    batch : pyarrow.RecordBatch or None
        Rows, where the file is a table.
    problem : str
        Why nothing more of the file can be read; then the rest is empty.
    """

    file: str
    line: int
    data: bytes = b""
    batch: pa.RecordBatch | None = None
    problem: str = ""


@dataclass
class Progress:
    """Counts compressed bytes and tells whoever wants to know."""

    total: int
    callback: Callable[[int, int], None] | None
    before: int = 0

    def tell(self, position: int) -> None:
        """Report a position inside the present file."""
        if self.callback is not None:
            self.callback(min(self.before + position, self.total), self.total)


def expand(paths: Any) -> list[tuple[Path, bool]]:
    """Return the files behind `paths` (files, folders, globs), each with whether the caller named it himself.

    Raises
    ------
    FeedError
        A path leads to no file.
    """
    names = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not names:
        raise FeedError("no path given; pass a file, a folder or a glob")
    files: dict[Path, bool] = {}
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix.lower() in _SUFFIXES]
        elif path.exists():
            files[path] = True
            continue
        else:
            found = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if Path(file).is_file()]
        if not found:
            raise FeedError(f"{name}: no such file, and no feed in such a folder; pass a file, a folder or a glob")
        for file in found:
            files.setdefault(file, False)
    return list(files.items())


def blocks(path: Path, progress: Progress) -> Iterator[Block]:
    """Yield the contents of one file, decompressed, in the order of the file.

    Raises
    ------
    FeedError
        The file cannot be opened.
    """
    try:
        with path.open("rb") as raw:
            for block in _contents(str(path), raw):
                yield block
                progress.tell(0 if raw.closed else raw.tell())
    except OSError as error:
        raise FeedError(f"{path}: {error.strerror or error}") from None


def _contents(name: str, raw: IO[bytes]) -> Iterator[Block]:
    head = raw.read(4)
    raw.seek(0)
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), "plain")
    if kind == "zip":
        yield from _members(name, raw)
    elif kind == "parquet":
        yield from _parquet(name, raw)
    elif kind == "plain":
        yield from _lines(name, lambda: raw.read(BLOCK_BYTES))
    else:
        stream = pa.input_stream(raw, compression=kind)
        yield from _lines(name, lambda: stream.read(_STEP_BYTES))


def _members(name: str, raw: IO[bytes]) -> Iterator[Block]:
    try:
        with zipfile.ZipFile(raw) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    with archive.open(member) as inner:
                        yield from _contents(f"{name}/{member.filename}", inner)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        yield Block(name, 1, problem=f"the archive is damaged: {error}")


def _parquet(name: str, raw: IO[bytes]) -> Iterator[Block]:
    row = 1
    try:
        for batch in pq.ParquetFile(raw).iter_batches(batch_size=_TABLE_ROWS):
            yield Block(name, row, batch=batch)
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        yield Block(name, row, problem=f"the Parquet file is damaged: {str(error).splitlines()[0]}")


def of_table(name: str, table: pa.Table) -> Iterator[Block]:
    """Yield the rows of a table in memory as blocks."""
    row = 1
    for batch in table.to_batches(max_chunksize=_TABLE_ROWS):
        yield Block(name, row, batch=batch)
        row += len(batch)


def _lines(name: str, read: Callable[[], bytes]) -> Iterator[Block]:
    line, carry, size, skipping = 1, [], 0, False
    problem = ""
    while True:
        try:
            piece = read()
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            problem, piece = f"the file is cut short or damaged: {error}", b""
        if not piece:
            break
        end = piece.rfind(b"\n") + 1
        if skipping:
            start = piece.find(b"\n") + 1
            if not start:
                continue
            line, skipping, piece, end = line + 1, False, piece[start:], end - start
        if end == 0:
            carry.append(piece)
            size += len(piece)
            if size > MAX_LINE_BYTES:
                yield Block(name, line, problem=f"a line is longer than {MAX_LINE_BYTES >> 20} MB")
                carry, size, skipping = [], 0, True
            continue
        if size + end < BLOCK_BYTES and len(piece) == _STEP_BYTES:
            carry.append(piece)  # small steps are gathered; the block is cut at its last newline below
            size += len(piece)
            continue
        data = b"".join([*carry, piece[:end]])
        carry, size = [piece[end:]], len(piece) - end
        yield Block(name, line, _clean(data, line))
        line += newlines(data)
    data = b"".join(carry)
    if (data or line == 1) and not skipping:
        yield Block(name, line, _clean(data, line))
        line += newlines(data) + (not data.endswith(b"\n"))
    if problem:
        yield Block(name, line, problem=problem)


def newlines(data: bytes) -> int:
    """Return how many lines end in `data`; several times as fast as `bytes.count`."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == 10))


def _clean(data: bytes, line: int) -> bytes:
    if line == 1 and data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]
    return data.replace(b"\r\n", b"\n") if b"\r" in data else data


@dataclass
class Quarantine:
    """The file that keeps what was rejected; it comes into being with the first line.

    Attributes
    ----------
    path : pathlib.Path
        Where it is written. The same feed always has the same one, so that reading again replaces it.
    """

    path: Path
    private: bool
    _file: IO[bytes] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, names: Iterable[str], folder: Path | None, path: Path | None) -> Quarantine:
        """Return the quarantine of the feed made of the files `names`."""
        if path is not None:
            return cls(path, private=False)
        names = [os.path.abspath(name) for name in names]
        digest = hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:12]
        stem = Path(names[0]).name.split(".")[0] if names else "feed"
        user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
        home = folder or Path(tempfile.gettempdir()) / f"liqlab-quarantine-{user}"
        return cls(home / f"{stem[:40]}-{digest}.jsonl", private=folder is None)

    def start(self) -> None:
        """Remove what an earlier reading of the same feed left behind."""
        self.close()
        if not self.private or self._safe():
            self.path.unlink(missing_ok=True)

    def _safe(self) -> bool:
        home = self.path.parent
        return (
            home.is_dir() and not home.is_symlink() and (not hasattr(os, "getuid") or home.stat().st_uid == os.getuid())
        )

    def add(self, file: str, line: int, reason: str, raw: bytes | str) -> None:
        """Write one rejected line.

        Raises
        ------
        FeedError
            It cannot be written, or its private folder belongs to someone else.
        """
        if self._file is None:
            self._file = self._open()
        shown = raw.decode(errors="backslashreplace") if isinstance(raw, bytes) else raw
        shown = shown.encode(errors="backslashreplace").decode()
        entry = {
            "file": os.fsencode(file).decode(errors="backslashreplace"),
            "line": line,
            "reason": reason,
            "raw": shown[:_RAW_SHOWN],
        }
        self._file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))

    def _open(self) -> IO[bytes]:
        home = self.path.parent
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.private and not self._safe():
                raise FeedError(f"{home} belongs to someone else; set feeds.quarantine_dir to a folder of yours")
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            return io.BufferedWriter(io.FileIO(os.open(self.path, flags, 0o600), "wb"))
        except OSError as error:
            raise FeedError(f"quarantine {self.path}: {error.strerror}; set feeds.quarantine_dir") from None

    def close(self) -> None:
        """Finish the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def used(self) -> Path | None:
        """The path if something was written to it."""
        return self.path if self.path.exists() else None
