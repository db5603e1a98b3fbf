"""Sorted sets of notionals through time, one a symbol and bucket: what `exact`, `topk` and `reservoir` keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

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
class _Touches:
    """Buckets, touch by touch: a symbol, a bucket and a row; shape (t,), sorted by them."""

    key: Ints  # number of the bucket
    symbol: Ints
    bucket: Ints
    row: Ints
    last_ms: Ints
    end: Ints  # where its events end, in the order of symbols
    came: Ints  # events of the bucket so far


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


def _touches(prepared: Prepared, bucket_s: int) -> _Touches:
    order, columns = prepared.order, prepared.columns
    row, ts_ms, starts = prepared.row[order], columns.ts_ms[order], bucket_starts(prepared, bucket_s)
    bucket = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(order)))
    first = run_starts(bucket, row)
    end, key = np.append(first[1:], len(order)), bucket[first]
    symbol = columns.symbol[order[first]].astype(np.int64)
    return _Touches(key, symbol, ts_ms[first] // (1000 * bucket_s), row[first], ts_ms[end - 1], end, end - starts[key])


def _members(prepared: Prepared, layout: Layout, *, drawn: bool) -> tuple[Floats, Floats]:
    """Return what the members of the events before each take in a listpack, and in a skiplist, shape (n + 1,).

    A member is an event; or a value and its priority, which is drawn and the score.
    """
    order, columns = prepared.order, prepared.columns
    notional = columns.notional[order]
    if drawn:
        priority = clock.generator(0).random(len(order))
        scores, name = _scores(priority, layout), arrow_lengths(notional) + 1 + arrow_lengths(priority)
    else:
        scores, name = _scores(notional, layout), digits(columns.ts_ms[order]) + 1 + digits(order)
    return before(scores + listpack_text(name)), before(layout.member(name))


def before(each: Bools | Floats | Ints) -> Any:
    """Return what all that come before each place add up to, or how many there are, shape (n + 1,)."""
    return np.concatenate([[0], np.cumsum(each)])


def _sets(prepared: Prepared, settings: Settings, layout: Layout) -> tuple[_Touches, Ints, Floats]:
    """Return the touches of the buckets, and in each the members of the sorted set and its bytes without the key."""
    method, bucket_s = settings.detector.method, settings.retention.percentile_bucket_s
    kept, drawn, starts = METHODS[method].size(settings), method == "reservoir", bucket_starts(prepared, bucket_s)
    touches = prepared.once(("touches", bucket_s), lambda: _touches(prepared, bucket_s), large=True)
    small, large = prepared.once(
        ("members", drawn, layout), lambda: _members(prepared, layout, drawn=drawn), large=True
    )
    came, stops = touches.came, np.append(starts[1:], len(prepared))
    number = stops - starts  # of the members at the end
    held = came if kept is None else np.minimum(came, kept)
    most = came if kept is None else np.minimum(came, kept + 1)
    full, others = came > held, int(drawn)  # one more of those that are drawn counts
    inside = None
    if method == "topk" and kept:
        inside, number = largest(prepared, bucket_s, kept), np.minimum(number, kept)

    def sums(total: Floats) -> Floats:
        """Return what members add up to: of a full set its mean one, where it stands at the end, so many times."""
        end = total if inside is None else before(np.where(inside, np.diff(total), 0))
        mean = (end[stops] - end[starts]) / number
        found: Floats = np.where(full, held * mean[touches.key], total[touches.end] - total[starts[touches.key]])
        return found

    counter = others * (listpack_text(1) + listpack_int(-came))
    packed = layout.alloc(LISTPACK + np.rint(sums(small)).astype(np.int64) + counter)
    apart = layout.sorted_set(most + others, came + others) + sums(large) + others * layout.member(1)
    return touches, held + others, np.where(most + others <= MAX_LISTPACK_MEMBERS, packed, apart).astype(np.float64)


def sorted_sets(prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return the sorted sets of `detector.method`; a listpack up to 128 members, then a skiplist and a table."""
    detector, retention = settings.detector, settings.retention
    touches, count, size = prepared.once(
        ("sets", detector.method, METHODS[detector.method].size(settings), retention.percentile_bucket_s, layout),
        lambda: _sets(prepared, settings, layout),
        large=True,
    )
    ttl_s = schema.BY_NAME["percentile"].ttl_s(settings) or 0
    gone, begins = lives(prepared, touches.key, touches.row, touches.last_ms, ttl_s)
    length = key_length("percentile", prepared, settings, touches.symbol, touches.bucket)
    keys = through(prepared.rows, touches.row, gone)
    total = through(prepared.rows, touches.row, gone, layout.key(length) + size)
    members = int(count[gone >= prepared.rows].sum())
    return Family(keys, total, members, per_row(prepared.rows, touches.row[begins]))
