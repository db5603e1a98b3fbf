"""Many settings at once: a grid or a sample of it, in this process or on Dask workers, kept as Parquet."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from liqlab import __version__, clock
from liqlab.events import EventError
from liqlab.feeds import Feed
from liqlab.percentiles import METHODS
from liqlab.replay import Progress
from liqlab.settings import Monitor, Settings, changed, load
from liqlab.sizing import Calibration, Prepared, prepare
from liqlab.sizing.prepare import REMEMBERED
from liqlab.tuning.outcome import evaluate, in_common

# What is worth trying; other codecs and hashes of candles only ever take more, and `tdigest` cannot be predicted. What
# the streams depend on comes first, then percentiles: combinations that share it are tried together.
SPACE: Final[dict[str, tuple[Any, ...]]] = {
    "writer.layout": ("shared", "hybrid", "per_symbol"),
    "writer.block_bytes": (4 << 10, 16 << 10, 64 << 10),
    "retention.hot_s": (300, 900, 3_600),
    "detector.method": ("logbins", "exact", "topk", "reservoir"),
    "detector.size": (126, 500),
    "retention.percentile_bucket_s": (1_800, 3_600),
    "retention.percentile_window_s": (21_600, 43_200, 86_400),
    "retention.candle_s": (900, 3_600),
    "retention.vwap_s": (900, 3_600),
}
_Part = list[dict[str, Any]]  # combinations that are tried together
_Shared = dict[Hashable, dict[str, Any]]  # what is shared, by key, and a combination that it is part of
# Of some parts: what works out what they have in common, and then what tries them; both take the feed.
_Rounds = Iterator[tuple[list[partial[Any]], list[partial[Any]]]]
_AT_ONCE: Final = REMEMBERED - 56  # of them, and room for what else is remembered
MINIMISED: Final = ("used_bytes", "threshold_error_pct")
MAXIMISED: Final = ("history_h", "recall")
_SIZE: Final = "detector.size"
_TOGETHER: Final = 64  # settings that one file holds
_TASKS: Final = 16  # at most, of a worker in a round: each costs Dask as much time as some settings take


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
        Values of each setting that is varied, by dotted name; `SPACE` when absent. Every combination is tried; of those
        that differ in nothing but a size that their method does not have, one.
    settings : Settings, optional
        All others; and the window that thresholds should be of. `liqlab.settings.load()` when absent.
    calibration : Calibration, optional
        See `evaluate`.
    count : int, optional
        Try only so many combinations, at least one, drawn without repetition.
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
        A row a combination: the varied settings by dotted name, then what `Outcome.as_dict` has. A size is missing
        where the method has none.

    Raises
    ------
    SettingsError
        A name or a value of `space` is none.
    EventError
        A method or a strategy of `space` cannot be predicted, there is no event, or nothing is to be tried.
    """
    # Passwords have no business with workers, nor in what results are known by.
    prepared, base = prepare(events), (settings or load()).model_copy(update={"redis_url": None, "monitor": Monitor()})
    if count is not None and count < 1:
        raise EventError(f"count is {count}; at least one combination must be tried")
    for name, values in (space or SPACE).items():
        for value in values:
            changed(base, {name: value})  # what is wrong is said before anything is tried
    combinations = _combinations(space or SPACE, base, count, seed)
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
    if progress:
        progress(sum(map(len, found.values())), len(combinations))
    try_all = partial(_on_dask, address=dask, workers=workers) if dask or workers > 1 else _here
    if left:
        try_all(prepared, _rounds(prepared, base, calibration, {at: parts[at] for at in left}), keep)
    return pd.concat([found[at] for at in range(len(parts))], ignore_index=True)


def _combinations(
    space: Mapping[str, Sequence[Any]], base: Settings, count: int | None, seed: int
) -> list[dict[str, Any]]:
    @cache
    def size(method: str, wanted: int | None) -> int | None:
        """Return the size that a method has: none where it reads none, its own where none is set."""
        detector = base.detector.model_copy(update={"size": wanted})
        return METHODS[method].size(base.model_copy(update={"detector": detector}))

    every = [dict(zip(space, values, strict=True)) for values in product(*space.values())]
    if _SIZE in space:
        for one in every:
            one[_SIZE] = size(one.get("detector.method", base.detector.method), one[_SIZE])
        every = [dict(pairs) for pairs in dict.fromkeys(tuple(one.items()) for one in every)]
    if count is not None and count < len(every):
        chosen = np.sort(clock.generator(seed).choice(len(every), count, replace=False))
        every = [every[at] for at in chosen.tolist()]
    return every


def _changes(base: Settings) -> Callable[[Mapping[str, Any]], Settings]:
    """Return `changed` for many combinations: a section that several of them have is validated once."""
    known: dict[str, Any] = {}

    def change(values: Mapping[str, Any]) -> Settings:
        sections: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            sections.setdefault(name.partition(".")[0], {})[name] = value
        update = {}
        for section, fields in sections.items():
            key = repr(fields)
            if key not in known:
                known[key] = getattr(changed(base, fields), section)
            update[section] = known[key]
        return base.model_copy(update=update)

    return change


def _digest(prepared: Prepared, base: Settings, calibration: Calibration | None) -> str:
    """Return what results of one feed, calibration and settings around are known by, and of one version's models."""
    columns = prepared.columns
    digest = hashlib.sha256(repr((__version__, columns.symbols, calibration, base)).encode())
    for values in (columns.ts_ms, columns.symbol, columns.side, columns.notional, columns.size):
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _rounds(prepared: Prepared, base: Settings, calibration: Calibration | None, parts: Mapping[int, _Part]) -> _Rounds:
    """Yield how to try the parts, what most have in common first; at a time no more than a feed remembers."""
    window_s, taken = base.retention.percentile_window_s, dict[int, _Part]()
    groups: dict[tuple[Hashable, ...], _Shared] = {}
    change = _changes(base)

    def found() -> tuple[list[partial[Any]], list[partial[Any]]]:
        largest = sorted(groups.values(), key=len, reverse=True)
        return (
            [partial(_worked_out, base, calibration, shared) for shared in largest],
            [partial(_tried, base, calibration, at, part) for at, part in taken.items()],
        )

    for at, part in parts.items():
        new: dict[tuple[Hashable, ...], _Shared] = {}
        for values in part:
            settings = change(values)
            for key, (group, _) in in_common(prepared, settings, calibration, window_s).items():
                new.setdefault(group, {}).setdefault(key, values)
        if taken and sum(len({**groups.get(name, {}), **new.get(name, {})}) for name in {*groups, *new}) > _AT_ONCE:
            yield found()
            taken, groups = {}, {}
        taken[at] = part
        groups = {name: {**new.get(name, {}), **groups.get(name, {})} for name in {**groups, **new}}
    yield found()


def _worked_out(base: Settings, calibration: Calibration | None, shared: _Shared, prepared: Prepared) -> dict[Any, Any]:
    """Return what settings have in common, each under its key, as one of the settings that have it has it made."""
    change, window_s = _changes(base), base.retention.percentile_window_s
    found = {}
    for key, values in shared.items():
        _, make = in_common(prepared, change(values), calibration, window_s)[key]
        found[key] = prepared.once(key, make)
    return found


def _tried(
    base: Settings,
    calibration: Calibration | None,
    at: int,
    part: _Part,
    prepared: Prepared,
    known: Sequence[Mapping[Any, Any]] = (),
) -> tuple[int, pd.DataFrame]:
    for results in known:
        prepared.learn(results)
    change, window_s = _changes(base), base.retention.percentile_window_s
    rows = [values | evaluate(prepared, change(values), calibration, window_s=window_s).as_dict() for values in part]
    table = pd.DataFrame(rows).astype(dict.fromkeys(("threshold_error_pct", "precision", "recall"), float))
    return at, table.astype({_SIZE: "Int64"} if _SIZE in table else {})


def _here(prepared: Prepared, rounds: _Rounds, keep: Callable[[int, pd.DataFrame], None]) -> None:
    for groups, parts in rounds:
        for work_out in groups:
            work_out(prepared)
        for try_part in parts:
            keep(*try_part(prepared))


def local_cluster(workers: int) -> Any:
    """Start so many worker processes on this machine; a context manager with the attribute `scheduler_address`."""
    import dask
    import distributed

    lib: Any = distributed  # it has no types
    # Dask lets its workers give memory back to the system at once, and get it again for the next array: half as fast.
    # Huge pages take a virtual machine longer to clear than they save: a tenth of what combinations have in common.
    # Its profiler, and how often it looks at the machine and at its own event loops, take a seventh of two cores;
    # nobody looks at what they find. And it drops all copies but one of a feed that every worker is about to read.
    dear = {
        "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
        "distributed.nanny.pre-spawn-environ.NUMPY_MADVISE_HUGEPAGE": 0,
        "distributed.worker.profile.enabled": False,
        "distributed.worker.memory.monitor-interval": "1s",
        "distributed.admin.system-monitor.interval": "10s",
        "distributed.admin.tick.interval": "1s",
        "distributed.scheduler.active-memory-manager.start": False,
    }
    with dask.config.set(dear):
        # Errors of tasks are raised where results are taken; a worker's last words as it is stopped are of no use.
        quiet = {"dashboard_address": None, "silence_logs": logging.CRITICAL}
        return lib.LocalCluster(n_workers=workers, threads_per_worker=1, **quiet)


def _on_dask(
    prepared: Prepared,
    rounds: _Rounds,
    keep: Callable[[int, pd.DataFrame], None],
    *,
    address: str | None,
    workers: int,
) -> None:
    """Let one of the workers work out each group of what is shared, and the others have it from there."""
    import distributed

    lib: Any = distributed  # it has no types
    with ExitStack() as stack:
        if address is None:
            address = stack.enter_context(local_cluster(workers)).scheduler_address
        client = stack.enter_context(lib.Client(address))
        [feed] = client.scatter([prepared], hash=False)
        # The others fetch it while it is planned what they do; waiting until all have it would cost as much again.
        lib.fire_and_forget([client.submit(len, feed, workers=[name], pure=False) for name in client.nthreads()])
        for groups, parts in rounds:
            count = max(len(client.nthreads()), 1)
            # As many at a time as there are workers: the scheduler would let one wait behind a dear one.
            known = list(_done(client, groups, count, feed))
            # Each has its next one at hand; were all dealt out at once, one worker would be idle in the end.
            some = -(-len(parts) // (_TASKS * count))
            shares = [partial(_each, parts[at : at + some]) for at in range(0, len(parts), some)]
            for task in _done(client, shares, 2 * count, feed, known):
                for at, table in task.result():
                    keep(at, table)


def _each(
    parts: Sequence[partial[Any]], prepared: Prepared, known: Sequence[Mapping[Any, Any]]
) -> list[tuple[int, pd.DataFrame]]:
    return [try_part(prepared, known) for try_part in parts]


def _done(client: Any, work: Sequence[partial[Any]], at_once: int, *shared: Any) -> Iterator[Any]:
    """Yield tasks as they are done, asking for the next only when fewer than so many are left.

    They are taken from both ends, the next from where the one that is done came from: neighbours have more in common,
    and a worker still has it.
    """
    import distributed

    lib: Any = distributed  # it has no types
    left, came_last = deque(work), dict[Any, bool]()

    def asked(last: bool) -> Any:
        task = client.submit(left.pop() if last else left.popleft(), *shared, pure=False)
        came_last[task] = last
        return task

    running = lib.as_completed([asked(bool(at % 2)) for at in range(min(at_once, len(work)))])
    for task in running:
        last = came_last.pop(task)  # what nobody holds any more is forgotten by the workers
        if left:
            running.add(asked(last))
        yield task


def pareto(
    table: pd.DataFrame, minimise: Sequence[str] = MINIMISED, maximise: Sequence[str] = MAXIMISED
) -> pd.DataFrame:
    """Return the rows that no other row beats: at least as good in every column, and better in one.

    Parameters
    ----------
    table : pandas.DataFrame
        From `sweep`. A column that no row knows decides nothing: without alerts there is no recall. Else rows with an
        unknown figure are left out.
    minimise, maximise : sequence of str
        Columns, of which less or more is better.
    """
    goals = np.column_stack([*(table[name] for name in minimise), *(-table[name] for name in maximise)]).astype(float)
    goals = goals[:, np.isfinite(goals).any(axis=0)]
    if not goals.size:
        return table
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
