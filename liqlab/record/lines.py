"""The lines of a recording: frames in an envelope that `liqlab.read_feed` opens, and what it passes over."""

from __future__ import annotations

import base64
import zlib
from typing import Any, Final

import orjson
import pandas as pd

from liqlab.feeds import source

MAX_FRAME_BYTES: Final = 16 << 20
START: Final = "start"
STOP: Final = "stop"
# The readers count a message of another channel as ignored, never as rejected.
_GAP: Final = b'{"channel":"gap"'
_HEADER: Final = b'{"channel":"recording"'
_FRAME: Final = b'{"recv_ts":'
_GZIP: Final = b"\x1f\x8b"
BROKEN: Final = object()


def unpack(frame: bytes) -> bytes:
    """Return the text of a frame that is gzip (HTX), any other as it is, a damaged one too."""
    if not frame.startswith(_GZIP):
        return frame
    inflater = zlib.decompressobj(31)
    try:
        text = inflater.decompress(frame, MAX_FRAME_BYTES)
    except zlib.error:
        return frame
    return text if inflater.eof else frame


def parse(text: bytes) -> Any:
    """Return the message in a frame, `BROKEN` where it is no JSON."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return BROKEN


def envelope(recv_ms: int, text: bytes, message: Any) -> bytes:
    """Return the line that keeps a frame, to the last byte.

    Parameters
    ----------
    recv_ms : int
        Time of receipt, ms since the epoch, UTC.
    text : bytes
        The frame.
    message : object
        What `parse` makes of it.
    """
    if message is not BROKEN and b"\n" not in text:
        return b'%b%d,"raw":%b}\n' % (_FRAME, recv_ms, text)
    try:
        kept: dict[str, Any] = {"recv_ts": recv_ms, "raw": text.decode()}
    except UnicodeDecodeError:
        kept = {"recv_ts": recv_ms, "base64": base64.b64encode(text).decode()}
    return orjson.dumps(kept, option=orjson.OPT_APPEND_NEWLINE)


def header(venue: str, symbols: tuple[str, ...]) -> bytes:
    """Return the first line of a file; an empty list means all symbols."""
    return orjson.dumps(
        {"channel": "recording", "venue": venue, "symbols": symbols or "all"}, option=orjson.OPT_APPEND_NEWLINE
    )


def gap(venue: str, from_ms: int | None, to_ms: int | None, reason: str, lost: int | None = None) -> bytes:
    """Return the line that says where a recording has a hole; `lost` counts frames, None where nobody knows."""
    return orjson.dumps(
        {"channel": "gap", "venue": venue, "from_ms": from_ms, "to_ms": to_ms, "reason": reason, "lost": lost},
        option=orjson.OPT_APPEND_NEWLINE,
    )


def gaps(paths: Any) -> pd.DataFrame:
    """List the holes of recordings.

    Parameters
    ----------
    paths : str, path, or iterable of them
        As in `liqlab.read_feed`: the folder of a recorder, or its files in the order of time.

    Returns
    -------
    pandas.DataFrame
        One row a hole: `venue`, `from_ms` and `to_ms` (Int64, ms since the epoch, UTC; missing where the recording
        begins or ends), `reason`, `lost` (Int64, frames; missing where the recorder could not know). Where the
        recorder did not run, `from_ms` is its stop, after a crash the last frame that it kept.

    Raises
    ------
    liqlab.feeds.FeedError
        A path leads to no file.
    """
    rows: list[dict[str, Any]] = []
    last: dict[str, int] = {}  # when a venue was last known to be recorded
    stopped: dict[str, dict[str, Any]] = {}
    for path, _ in source.expand(paths):
        venue = ""
        for block in source.blocks(path, source.Progress(0, None)):
            for line in block.data.splitlines():
                if line.startswith(_FRAME):
                    last[venue] = int(line[len(_FRAME) : line.index(b",")])
                elif line.startswith(_HEADER):
                    venue = orjson.loads(line)["venue"]
                elif line.startswith(_GAP):
                    hole = orjson.loads(line)
                    if hole["reason"] == STOP:
                        stopped[venue] = hole
                        continue
                    if hole["reason"] == START:
                        hole["from_ms"] = stopped.pop(venue, {}).get("from_ms", last.get(venue))
                    rows.append(hole)
    columns = ["venue", "from_ms", "to_ms", "reason", "lost"]
    table = pd.DataFrame([*rows, *stopped.values()], columns=columns)
    return table.astype({"from_ms": "Int64", "to_ms": "Int64", "lost": "Int64"})
