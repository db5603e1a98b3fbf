"""Sorted sets of notionals through time, one a symbol and bucket: what `exact`, `topk` and `reservoir` keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from liqlab import clock, schema
from liqlab.events import run_starts
from liqlab.percentiles import METHODS
from liqlab.settings import Settings
from liqlab.sizing.families import Family, key_length, lives, per_row
from liqlab.sizing.prepare import Prepared, arrow_lengths, through
from liqlab.sizing.structures import (
    LISTPACK,
    MAX_LISTPACK_MEMBERS,
    Bools,
    Floats,
    Ints,
    Layout,
    digits,
    listpack_int,
    listpack_text,
)

_WHOLE: Final = 1 << 52  # util.c, double2ll: up to which a score without a fraction is an integer


@dataclass(frozen=True)
class _Sets:
    """Sorted sets, touch by touch: shape (t,), sorted by symbol, bucket and row."""

    key: Ints  # number of the set
    symbol: Ints
    bucket: Ints
    row: Ints
    last_ms: Ints
    members: Ints
    size: Floats  # bytes without the key


def bucket_starts(prepared: Prepared, bucket_s: int) -> Ints:
    """Return where, in the order of symbols, the events of another bucket begin."""
    return prepared.once(
        ("bucket starts", bucket_s),
        lambda: run_starts(
            prepared.columns.symbol[prepared.order], prepared.columns.ts_ms[prepared.order] // (1000 * bucket_s)
        ),
    )


def largest(prepared: Prepared, bucket_s: int, count: int) -> Bools:
    """Return which events, in the order of symbols, are among so many largest of their bucket; of equals the later."""
    starts = bucket_starts(prepared, bucket_s)
    lengths = np.diff(starts, append=len(prepared))
    by_size = prepared.once(
        "by size", lambda: np.argsort(prepared.columns.notional[prepared.order], kind="stable"), large=True
    )
    bucket = np.repeat(np.arange(len(starts), dtype=np.int32), lengths)
    place = by_size[np.argsort(bucket[by_size], kind="stable")]  # by bucket, the smallest first
    found = np.zeros(len(prepared), np.bool_)
    found[place[np.arange(len(prepared)) >= np.repeat(starts + lengths - count, lengths)]] = True
    return found


def _scores(values: Floats, layout: Layout) -> Ints:
    """Return the bytes of scores in a listpack (`t_zset.c`): integers, or text, the shortest from Redis 7.2 on."""
    if layout.separate:
        length = np.array([len(f"{value:.17g}") for value in values.tolist()], np.int64)
    else:
        length = arrow_lengths(values)
    whole = (values == np.floor(values)) & (np.abs(values) < _WHOLE)
    found: Ints = np.where(whole, listpack_int(np.where(whole, values, 0).astype(np.int64)), listpack_text(length))
    return found


def _sets(prepared: Prepared, settings: Settings, layout: Layout) -> _Sets:
    method, bucket_s = settings.detector.method, settings.retention.percentile_bucket_s
    kept, order, columns = METHODS[method].size(settings), prepared.order, prepared.columns
    symbol, row, ts_ms = columns.symbol[order].astype(np.int64), prepared.row[order], columns.ts_ms[order]
    starts = bucket_starts(prepared, bucket_s)
    lengths = np.diff(starts, append=len(order))
    touches = run_starts(np.repeat(np.arange(len(starts)), lengths), row)
    ends = np.append(touches[1:], len(order))
    key = np.repeat(np.arange(len(starts)), lengths)[touches]
    came = ends - starts[key]
    notional = columns.notional[order]
    if method == "reservoir":
        # A member is a value and its priority, which is drawn; one more counts.
        drawn = clock.generator(0).random(len(order))
        scores, name = _scores(drawn, layout), arrow_lengths(notional) + 1 + arrow_lengths(drawn)
        counter, others = listpack_text(1) + listpack_int(-came), 1
    else:
        scores = prepared.once(("scores", layout.separate), lambda: _scores(notional, layout), large=True)
        name, counter, others = digits(ts_ms) + 1 + digits(order), np.zeros(len(came), np.int64), 0
    small, large = scores + listpack_text(name), layout.member(name)
    held = came if kept is None else np.minimum(came, kept)
    most = came if kept is None else np.minimum(came, kept + 1)
    full = came > held
    in_sample = largest(prepared, bucket_s, kept) if method == "topk" and kept else np.ones(len(order), np.bool_)

    def sums(each: Floats | Ints) -> Floats:
        """Return what members add up to: of a full set its mean one, where it stands at the end, so many times."""
        total = np.concatenate([[0.0], np.cumsum(each)])
        end = np.concatenate([[0.0], np.cumsum(np.where(in_sample, each, 0))])
        number = np.concatenate([[0], np.cumsum(in_sample)])
        stops = starts + lengths
        mean = (end[stops] - end[starts]) / (number[stops] - number[starts])
        found: Floats = np.where(full, held * mean[key], total[ends] - total[starts[key]])
        return found

    listed = most + others <= MAX_LISTPACK_MEMBERS
    packed = layout.alloc(LISTPACK + np.rint(sums(small)).astype(np.int64) + counter)
    apart = layout.sorted_set(most + others, came + others) + sums(large) + others * layout.member(1)
    return _Sets(
        key, symbol[touches], (ts_ms // (1000 * bucket_s))[touches], row[touches], ts_ms[ends - 1], held + others,
        np.where(listed, packed, apart).astype(np.float64),
    )  # fmt: skip


def sorted_sets(prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return the sorted sets of `detector.method`; a listpack up to 128 members, then a skiplist and a table."""
    detector, retention = settings.detector, settings.retention
    sets = prepared.once(
        ("sets", detector.method, METHODS[detector.method].size(settings), retention.percentile_bucket_s, layout),
        lambda: _sets(prepared, settings, layout),
        large=True,
    )
    ttl_s = schema.BY_NAME["percentile"].ttl_s(settings) or 0
    gone, begins = lives(prepared, sets.key, sets.row, sets.last_ms, ttl_s)
    length = key_length("percentile", prepared, settings, sets.symbol, sets.bucket)
    keys = through(prepared.rows, sets.row, gone)
    total = through(prepared.rows, sets.row, gone, layout.key(length) + sets.size)
    members = int(sets.members[gone >= prepared.rows].sum())
    return Family(keys, total, members, per_row(prepared.rows, sets.row[begins]))
