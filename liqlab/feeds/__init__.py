"""Recorded liquidation feeds -> the event table. docs/feeds.md lists the formats and what is made of each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import pandas as pd
import pyarrow as pa

from liqlab import events as event_tables
from liqlab.feeds import source
from liqlab.feeds.contracts import exchange_name
from liqlab.feeds.dedup import CAPACITY
from liqlab.feeds.lines import FORMATS
from liqlab.feeds.reader import FeedReader
from liqlab.feeds.report import Feed, FeedReport
from liqlab.feeds.rows import UNITS, FeedError, zone_of
from liqlab.feeds.source import Block, Progress, Quarantine
from liqlab.feeds.tables import Options
from liqlab.settings import Settings, load

__all__ = ["FORMATS", "Feed", "FeedError", "FeedReader", "FeedReport", "iter_feed", "read_feed", "write_feed"]

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | pd.DataFrame
_IN_MEMORY: Final = "<DataFrame>"


def read_feed(
    paths: Paths,
    format: str = "auto",
    *,
    symbol: str | None = None,
    exchange: str | None = None,
    columns: Mapping[str, str | int] | None = None,
    unit: str | None = None,
    tz: str | None = None,
    settings: Settings | None = None,
    quarantine: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Feed:
    """Read recorded liquidation feeds into one event table.

    Parameters
    ----------
    paths : str, path, iterable of them, or pandas.DataFrame
        Files, folders and globs; plain, gzip, zstd, zip or Parquet.
    format : str
        One of `FORMATS`; ``auto`` finds out from the content, line by line. With a named format everything else is
        rejected.
    symbol : str, optional
        The instrument, for tables that do not name it.
    exchange : str, optional
        The venue, where the feed does not name it; Binance's frames become ``aster``'s with ``exchange="aster"``.
    columns : mapping of str to str or int, optional
        Which column (name, or position from 0) holds ``ts_ms``, ``symbol``, ``side`` (of the order) or
        ``position_side``, ``price``, ``size``, and if wanted ``exchange``, ``notional``, ``id``. What is not
        named is looked for among well-known names.
    unit : {"base", "contracts", "usd"}, optional
        What sizes in a table are, if not what the venue counts in.
    tz : str, optional
        The zone of times that carry none, e.g. ``Asia/Kolkata``; UTC if not given.
    settings : Settings, optional
        Read with `liqlab.settings.load` if not given; `feeds.contract_sizes` and `feeds.quarantine_dir` count.
    quarantine : path, optional
        The file for rejected lines; by default one in `feeds.quarantine_dir`, or in a private temporary folder.
    progress : callable, optional
        Called with (bytes read, bytes in all).

    Returns
    -------
    Feed
        `events` and `report`.

    Raises
    ------
    FeedError
        Nothing can be read: no such file, content of no known format, an argument that makes no sense.
    """
    reader = iter_feed(
        paths,
        format,
        symbol=symbol,
        exchange=exchange,
        columns=columns,
        unit=unit,
        tz=tz,
        settings=settings,
        quarantine=quarantine,
        progress=progress,
        batch=sys.maxsize,
    )
    return Feed(event_tables.concat(reader), reader.report)


def iter_feed(
    paths: Paths,
    format: str = "auto",
    *,
    symbol: str | None = None,
    exchange: str | None = None,
    columns: Mapping[str, str | int] | None = None,
    unit: str | None = None,
    tz: str | None = None,
    settings: Settings | None = None,
    quarantine: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    batch: int = 100_000,
) -> FeedReader:
    """Read recorded liquidation feeds piece by piece, in bounded memory.

    Parameters
    ----------
    paths, format, symbol, exchange, columns, unit, tz, settings, quarantine, progress
        See `read_feed`.
    batch : int
        Rows in a piece; the last one may have fewer.

    Returns
    -------
    FeedReader
        An iterator of event tables, with `report`.

    Raises
    ------
    FeedError
        See `read_feed`; for a file's content only when the iterator comes to it.
    """
    if format not in FORMATS:
        raise FeedError(f"format={format!r} is not known; use one of {', '.join(FORMATS)}")
    if unit is not None and unit not in UNITS:
        raise FeedError(f"unit={unit!r} is not known; use one of {', '.join(UNITS)}")
    if batch < 1:
        raise FeedError(f"batch={batch} must be at least 1")
    settings = settings or load()
    report = FeedReport()
    options = Options(
        symbol=symbol,
        exchange=("aster" if format == "aster" else None) if exchange is None else exchange_name(exchange),
        columns=columns,
        unit=unit,
        zone=None if tz is None else zone_of(tz),
        note=report.note,
    )
    if isinstance(paths, pd.DataFrame):
        files = [(_IN_MEMORY, True)]
        blocks = _of_frame(paths)
    else:
        found = source.expand(paths)
        files = [(str(path), named) for path, named in found]
        blocks = _of_files([path for path, _ in found], progress)
    return FeedReader(
        files,
        blocks,
        format=format,
        options=options,
        sizes=settings.feeds.contract_sizes,
        report=report,
        quarantine=Quarantine.of(
            [name for name, _ in files], settings.feeds.quarantine_dir, None if quarantine is None else Path(quarantine)
        ),
        batch=batch,
        capacity=CAPACITY,
    )


def write_feed(events: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write an event table to a file that `read_feed` reads back to the last bit.

    Parameters
    ----------
    events : pandas.DataFrame
        An event table.
    path : path
        Ends in .parquet, .csv or .csv.gz.

    Returns
    -------
    pathlib.Path
        `path`.

    Raises
    ------
    FeedError
        The path has another ending.
    liqlab.events.EventError
        `events` is not an event table.
    """
    target = Path(path)
    table = event_tables.check(events)[list(event_tables.COLUMNS)]
    if target.name.endswith(".parquet"):
        table.to_parquet(target, index=False)
    elif target.name.endswith((".csv", ".csv.gz")):
        table.to_csv(target, index=False)
    else:
        raise FeedError(f"{target}: cannot write this kind of file; use .parquet, .csv or .csv.gz")
    return target


def _of_files(paths: list[Path], progress: Callable[[int, int], None] | None) -> Iterator[Block]:
    told = Progress(sum(path.stat().st_size for path in paths), progress)
    for path in paths:
        yield from source.blocks(path, told)
        told.before += path.stat().st_size
        told.tell(0)


def _of_frame(frame: pd.DataFrame) -> Iterator[Block]:
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise FeedError(f"the DataFrame has a column of mixed types: {error}") from None
    yield from source.of_table(_IN_MEMORY, table)
