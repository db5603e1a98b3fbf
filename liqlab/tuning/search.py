"""Many settings at once: a grid or a sample of it, in this process or on Dask workers, kept as Parquet."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from liqlab import clock
from liqlab.feeds import Feed
from liqlab.replay import Progress
from liqlab.settings import Monitor, Settings, changed, load
from liqlab.sizing import Calibration, Prepared, prepare
from liqlab.tuning.outcome import evaluate

# What is worth trying; other codecs and hashes of candles only ever take more. What the streams depend on comes first:
# combinations that share it are tried together.
SPACE: Final[dict[str, tuple[Any, ...]]] = {
    "writer.layout": ("shared", "hybrid", "per_symbol"),
    "writer.block_bytes": (4 << 10, 16 << 10, 64 << 10),
    "retention.hot_s": (300, 900, 3_600),
    "retention.percentile_window_s": (21_600, 43_200, 86_400),
    "retention.percentile_bucket_s": (1_800, 3_600),
    "retention.candle_s": (900, 3_600),
    "retention.vwap_s": (900, 3_600),
}
MINIMISED: Final = ("used_bytes", "threshold_error_pct")
MAXIMISED: Final = ("history_h", "recall")
_TOGETHER: Final = 64  # settings that one task tries, and one file holds


def sweep(
    events: Feed | pd.DataFrame | Prepared,
    space: Mapping[str, Sequence[Any]] | None = None,
    *,
    settings: Settings | None = None,
    calibration: Calibration | None = None,
    count: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    dask: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Say of many settings what they cost and buy.

    Parameters
    ----------
    events : Feed, pandas.DataFrame or Prepared
    space : mapping of str to sequence, optional
        Values of each setting that is varied, by dotted name; `SPACE` when absent. Every combination is tried.
    settings : Settings, optional
        All others; and the window that thresholds should be of. `liqlab.settings.load()` when absent.
    calibration : Calibration, optional
        See `evaluate`.
    count : int, optional
        Try only so many combinations, drawn without repetition.
    seed : int
        Of that drawing.
    folder : path, optional
        Where results are kept as Parquet, some in a file. A sweep that was broken off goes on from there; files of
        another feed, calibration or settings are left alone.
    dask : str, optional
        Address of a Dask scheduler, ``tcp://host:8786``, that works on them.
    workers : int
        Without an address: processes of this machine, by Dask's LocalCluster where more than one.
    progress : callable, optional
        Called with (settings tried, settings in all).

    Returns
    -------
    pandas.DataFrame
        A row a combination: the varied settings by dotted name, then what `Outcome.as_dict` has.

    Raises
    ------
    SettingsError
        A name or a value of `space` is none.
    """
    # Passwords have no business with workers, nor in what results are known by.
    prepared, base = prepare(events), (settings or load()).model_copy(update={"redis_url": None, "monitor": Monitor()})
    combinations = list(_combinations(space or SPACE, count, seed))
    for name, values in (space or SPACE).items():
        for value in values:
            changed(base, {name: value})  # what is wrong is said before anything is tried
    parts = [combinations[at : at + _TOGETHER] for at in range(0, len(combinations), _TOGETHER)]
    found: dict[int, pd.DataFrame] = {}
    files: list[Path] = []
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        whole = _digest(prepared, base, calibration)
        hashes = [hashlib.sha256(f"{whole}{json.dumps(part)}".encode()).hexdigest()[:16] for part in parts]
        files = [Path(folder) / f"sweep-{name}.parquet" for name in hashes]
        found = {at: pd.read_parquet(path) for at, path in enumerate(files) if path.exists()}

    def keep(at: int, table: pd.DataFrame) -> None:
        found[at] = table
        if files:
            temporary = files[at].with_name(f".{files[at].name}.{clock.token()}")
            table.to_parquet(temporary)
            temporary.replace(files[at])  # whole or not at all
        if progress:
            progress(sum(map(len, found.values())), len(combinations))

    left = [at for at in range(len(parts)) if at not in found]
    if progress and found:
        progress(sum(map(len, found.values())), len(combinations))
    if (dask or workers > 1) and left:
        _on_dask(prepared, base, calibration, parts, left, keep, dask, workers)
    else:
        for at in left:
            keep(at, _tried(prepared, base, calibration, parts[at]))
    return pd.concat([found[at] for at in range(len(parts))], ignore_index=True)


def _combinations(space: Mapping[str, Sequence[Any]], count: int | None, seed: int) -> Iterator[dict[str, Any]]:
    size = math.prod(len(values) for values in space.values())
    every: Iterator[tuple[Any, ...]] = itertools.product(*space.values())
    if count is not None and count < size:
        chosen = set(clock.generator(seed).choice(size, count, replace=False).tolist())
        every = (values for at, values in enumerate(every) if at in chosen)
    return (dict(zip(space, values, strict=True)) for values in every)


def _digest(prepared: Prepared, base: Settings, calibration: Calibration | None) -> str:
    """Return what results of one feed, calibration and settings around are known by."""
    columns = prepared.columns
    digest = hashlib.sha256(repr((columns.symbols, calibration, base)).encode())
    for values in (columns.ts_ms, columns.symbol, columns.side, columns.notional, columns.size):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _tried(
    prepared: Prepared, base: Settings, calibration: Calibration | None, part: list[dict[str, Any]]
) -> pd.DataFrame:
    window_s = base.retention.percentile_window_s
    rows = [
        values | evaluate(prepared, changed(base, values), calibration, window_s=window_s).as_dict() for values in part
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(("threshold_error_pct", "precision", "recall"), float))


def _on_dask(
    prepared: Prepared,
    base: Settings,
    calibration: Calibration | None,
    parts: list[list[dict[str, Any]]],
    left: list[int],
    keep: Callable[[int, pd.DataFrame], None],
    address: str | None,
    workers: int,
) -> None:
    import distributed

    lib: Any = distributed  # it has no types
    with ExitStack() as stack:
        if address is None:
            address = stack.enter_context(
                lib.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=40)
            ).scheduler_address
        client = stack.enter_context(lib.Client(address))
        [feed] = client.scatter([prepared], broadcast=True, hash=False)
        tasks = {client.submit(_tried, feed, base, calibration, parts[at], pure=False): at for at in left}
        for task in lib.as_completed(tasks):
            keep(tasks[task], task.result())


def pareto(
    table: pd.DataFrame, minimise: Sequence[str] = MINIMISED, maximise: Sequence[str] = MAXIMISED
) -> pd.DataFrame:
    """Return the rows that no other row beats: at least as good in every column, and better in one.

    Parameters
    ----------
    table : pandas.DataFrame
        From `sweep`. Rows with an unknown figure are left out.
    minimise, maximise : sequence of str
        Columns, of which less or more is better.
    """
    goals = np.column_stack([*(table[name] for name in minimise), *(-table[name] for name in maximise)]).astype(float)
    known = np.flatnonzero(np.isfinite(goals).all(axis=1))
    goals = goals[known]
    order = np.lexsort(goals.T[::-1])
    kept: list[int] = []
    for at in order.tolist():  # whoever beats a row stands before it
        front = goals[kept]
        beaten = (front <= goals[at]).all(axis=1) & (front < goals[at]).any(axis=1)
        if not beaten.any():
            kept.append(at)
    return table.iloc[np.sort(known[kept])]
