"""Families of many keys through time: candles, VWAP, and the few that all symbols share; `sketches` are apart."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

import numpy as np

from liqlab import candles, schema
from liqlab.clock import MINUTE_MS
from liqlab.events import SIDES, run_starts
from liqlab.settings import Settings
from liqlab.sizing.prepare import Prepared, listpack_number, through
from liqlab.sizing.structures import (
    LISTPACK,
    MAX_LIST_NODE,
    Bools,
    Floats,
    Ints,
    Layout,
    digits,
    listpack_int,
    listpack_text,
)

_REGISTERS: Final = 1 << 14  # hyperloglog.c
_DENSE: Final = 12_310  # 16 and six bits a register, and the string's own


@dataclass(frozen=True)
class Family:
    """One family through time, m rows of event-minutes.

    Attributes
    ----------
    keys : array of float64, shape (m,)
    size : array of float64, shape (m,)
        Bytes, without the tables of keys.
    members : int
        At the end: events, fields, ...
    born : array of float64, shape (m,)
        Keys that were not there when the minute began, and expired ones gone.
    ttl : bool
        Whether its keys have one.
    """

    keys: Floats
    size: Floats
    members: int
    born: Floats
    ttl: bool = True


def per_row(rows: int, row: Ints) -> Floats:
    """Return how many things there are in each row."""
    return np.bincount(row, minlength=rows)[:rows].astype(np.float64)


def key_length(name: str, prepared: Prepared, settings: Settings, symbol: Ints | None, bucket: Ints | None) -> Ints:
    """Return the bytes of keys' names: head, shard, symbol and bucket, with colons between."""
    length = np.asarray(len(schema.BY_NAME[name].pattern.split(":")[0]), np.int64)
    if symbol is not None:
        length = length + 1 + prepared.lengths[symbol]
        if settings.shards > 1:
            length = length + 3 + digits(prepared.shards(settings.shards)[symbol])
    if bucket is not None:
        length = length + 1 + digits(bucket)
    return length


def lives(prepared: Prepared, key: Ints, row: Ints, last_ms: Ints, ttl_s: int) -> tuple[Ints, Bools]:
    """Return up to which row each touch of a key stands, and whether it is the first of the key's life.

    Parameters
    ----------
    key, row : array of int64, shape (k,)
        Touches, sorted by key and row.
    last_ms : array of int64, shape (k,)
        From when on the TTL counts.
    """
    dead = prepared.row_at(last_ms + 1000 * ttl_s)
    following = np.full(len(key), prepared.rows)
    same = key[1:] == key[:-1]
    following[:-1][same] = row[1:][same]
    begins = np.ones(len(key), np.bool_)
    begins[1:] = ~same | (dead[:-1] <= row[1:])
    return np.minimum(dead, following), begins


def candle(name: str, prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return candles of one width: strings of 84 bytes, or hashes of twelve numbers."""
    family, hashed = schema.BY_NAME[name], settings.writer.candles == "hash"
    width = family.bucket_ms // MINUTE_MS
    bucket = prepared.start_ms[prepared.minute_row] // family.bucket_ms
    ids = run_starts(prepared.symbol, bucket)
    key = np.repeat(np.arange(len(ids)), np.diff(ids, append=len(bucket)))
    gone, begins = lives(prepared, key, prepared.minute_row, prepared.last_ms, family.ttl_s(settings) or 0)
    length = key_length(name, prepared, settings, prepared.symbol[ids], bucket[ids])
    if hashed:
        cells = prepared.once(("candle", width), lambda: _candle_cells(prepared, prepared.first[ids], width))
        size = (layout.key(length) + layout.listpack_hash(cells))[key]
    else:
        batch = prepared.batches(settings.writer.bulk_events)[prepared.order]
        once = batch[prepared.first] == batch[prepared.first + prepared.count - 1]
        size = layout.string(length[key], candles.FORM.itemsize, fresh=begins & once)
    keys = through(prepared.rows, prepared.minute_row, gone)
    total = through(prepared.rows, prepared.minute_row, gone, size)
    return Family(
        keys,
        total,
        round(keys[-1]) * (len(candles.FORM.names or ()) if hashed else 1),
        per_row(prepared.rows, prepared.minute_row[begins]),
    )


def _candle_cells(prepared: Prepared, first: Ints, width: int) -> Ints:
    """Return the bytes of each candle's fields in a listpack, with the values that it ends with."""
    events = prepared.columns.rows(prepared.order)
    last = np.append(first[1:], len(events)) - 1
    within = events.ts_ms % (width * MINUTE_MS)
    bought = np.where(events.side == SIDES.index("buy"), events.size, 0.0)
    sums = [np.add.reduceat(values, first) for values in (events.size, bought, events.price, events.notional)]
    most = [np.maximum.reduceat(values, first) for values in (events.size, events.price)]
    values = [*sums, *most, np.minimum.reduceat(events.price, first), events.price[first], events.price[last]]
    size = sum((listpack_number(value) for value in values), np.zeros(len(first), np.int64))
    size += listpack_int(last - first + 1) + listpack_int(within[first]) + listpack_int(within[last])
    return size + sum(int(listpack_text(len(field))) for field in candles.FORM.names or ())


def vwap(prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return the hashes of four numbers; the sums have as many digits as adding them up gives."""
    ttl_s = schema.BY_NAME["vwap"].ttl_s(settings) or 0
    row = prepared.minute_row
    gone, begins = lives(prepared, prepared.symbol, row, prepared.last_ms, ttl_s)
    entries = _vwap_entries(prepared, begins, gone)
    size = layout.key(key_length("vwap", prepared, settings, prepared.symbol, None)) + layout.listpack_hash(entries)
    keys = through(prepared.rows, row, gone)
    return Family(
        keys, through(prepared.rows, row, gone, size), 4 * round(keys[-1]), per_row(prepared.rows, row[begins])
    )


def _vwap_entries(prepared: Prepared, begins: Bools, gone: Ints) -> Ints:
    """Return the bytes of each touch's entries: exactly where it is the first of a life, or stands at the end.

    In between, the sums are those since the beginning of the feed, which have as many digits, or one more.
    """
    sums = prepared.once("vwap sums", lambda: _vwap_sums(prepared))
    life = np.flatnonzero(begins)
    count = np.cumsum(prepared.count)
    count -= np.repeat((count - prepared.count)[life], np.diff(life, append=len(count)))
    size = listpack_int(count) + listpack_int(prepared.last_ms)
    size += sum(int(listpack_text(len(name))) for name in _VWAP)
    last = np.flatnonzero(gone >= prepared.rows)
    opens = life[np.searchsorted(life, last, side="right") - 1]
    for parts, first, whole in sums:
        size += np.where(begins, first, whole)
        # Added up in the order of the batches: every addition rounds.
        totals = [float(np.add.accumulate(parts[a : b + 1])[-1]) for a, b in zip(opens, last, strict=True)]
        size[last] += listpack_number(np.array(totals)) - np.where(begins, first, whole)[last]
    return np.asarray(size, np.int64)


def _vwap_sums(prepared: Prepared) -> list[tuple[Floats, Ints, Ints]]:
    """Return of price x size and of size: the sum of each touch, its bytes, and those of all of the symbol so far."""
    events = prepared.columns.rows(prepared.order)
    opens = np.diff(prepared.symbol, prepend=-1) != 0
    found = []
    for values in (events.price * events.size, events.size):
        parts = np.add.reduceat(values, prepared.first)
        total = np.cumsum(parts)
        total -= np.repeat((total - parts)[opens], np.diff(np.flatnonzero(opens), append=len(parts)))
        found.append((parts, listpack_number(parts), listpack_number(np.maximum(total, parts))))
    return found


_VWAP: Final = ("price_sum", "volume_sum", "count", "last_update")


def unique_symbols(prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return the HyperLogLog of symbols of each shard, which begins anew when its hour is over."""
    ttl_s = schema.BY_NAME["unique_symbols"].ttl_s(settings) or 0
    whose = prepared.shards(settings.shards)[prepared.symbol]
    keys, total, born = np.zeros(prepared.rows), np.zeros(prepared.rows), np.zeros(prepared.rows)
    length = len("unique_symbols:1h") + (0 if settings.shards == 1 else 3 + len(str(settings.shards - 1)))
    registers = prepared.once("registers", lambda: [_register(name.encode()) for name in prepared.columns.symbols])
    for shard in prepared.present(settings.shards):
        mine = np.flatnonzero(whose == shard)
        came = prepared.order[prepared.first[mine]]
        mine, first_ms = mine[np.argsort(came)], prepared.columns.ts_ms[np.sort(came)]  # as the names come in
        row, symbol = prepared.minute_row[mine], prepared.symbol[mine]
        start = 0
        while start < len(row):
            begun = int(row[start])
            over = int(prepared.row_at(first_ms[start : start + 1] + 1000 * ttl_s)[0])
            end = int(np.searchsorted(row, max(over, begun + 1)))
            new = np.sort(np.unique(symbol[start:end], return_index=True)[1])
            sizes = layout.key(length) + _sparse([registers[code] for code in symbol[start:end][new].tolist()], layout)
            count = np.cumsum(np.bincount(row[start:end][new] - begun, minlength=max(over, begun + 1) - begun))
            born[begun] += 1
            keys[begun : begun + len(count)] += 1
            total[begun : begun + len(count)] += sizes[count]
            start = end
    return Family(keys, total, round(keys[-1]), born)


def _register(name: bytes) -> int:
    """Return the register of a HyperLogLog that counts a name: MurmurHash64A, its low 14 bits (`hyperloglog.c`)."""
    mask, factor = (1 << 64) - 1, 0xC6A4A7935BD1E995
    found = 0xADC83B19 ^ len(name) * factor & mask
    whole = len(name) // 8 * 8
    for at in range(0, whole, 8):
        word = int.from_bytes(name[at : at + 8], "little") * factor & mask
        found = (found ^ (word ^ word >> 47) * factor & mask) * factor & mask
    if rest := name[whole:]:
        found = (found ^ int.from_bytes(rest, "little")) * factor & mask
    found = (found ^ found >> 47) * factor & mask
    return (found ^ found >> 47) & (_REGISTERS - 1)


def _sparse(registers: list[int], layout: Layout) -> Ints:
    """Return the bytes of the string of a HyperLogLog in which 0 to n names are counted, shape (n + 1,).

    `hyperloglog.c`: a register that is set takes a byte, the zeros before it one up to 64 and else two. Where three
    more do not fit it grows to twice its length, by no more than 300 bytes from Redis 7.2 on; above 3,000 it is dense.
    """

    def zeros(after: int, before: int) -> int:
        return min(before - after - 1, 1) + (before - after > 65)

    between, length, room = [-1, _REGISTERS], 18, 0
    result = np.zeros(len(registers) + 1, np.int64)
    for number, register in enumerate([-1, *registers]):
        at = bisect_left(between, register)
        if between[at] != register:
            after, before = between[at - 1], between[at]
            length += 1 + zeros(after, register) + zeros(register, before) - zeros(after, before)
            between.insert(at, register)
        if room - length < 3:
            wanted = length + 3 + (length + 3 if layout.separate else min(length + 3, 300))
            head = 4 if wanted < 256 else 6
            room = int(layout.alloc(wanted + head)) - head
        result[number] = room + head if length <= 3_000 else int(layout.alloc(_DENSE))
    return result


def names(prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return the lists of names, one a shard: a symbol with its first event, exchanges with the feed's."""
    shards, rows = settings.shards, prepared.rows
    whose = prepared.shards(shards)[prepared.symbol]
    opens = run_starts(prepared.symbol)
    exchange = sum(int(listpack_text(1 + len(name.encode()))) for name in prepared.columns.exchanges)
    length = len("liqid") + (0 if shards == 1 else 2 + len(str(shards - 1)))
    keys, total, born, members = np.zeros(rows), np.zeros(rows), np.zeros(rows), 0
    for shard in prepared.present(shards):
        mine = opens[whose[opens] == shard]
        text = listpack_text(1 + prepared.lengths[prepared.symbol[mine]])
        # In front of the names: a token of 16 digits, and a time of 8 bytes.
        used = (
            np.cumsum(np.bincount(prepared.minute_row[mine], text, rows)) + LISTPACK + listpack_text(16) + 10 + exchange
        )
        whole, rest = np.divmod(used, MAX_LIST_NODE)
        size = np.asarray(layout.key(length, ttl=False) + layout.alloc(rest), np.float64)
        size += whole * (layout.alloc(32) + layout.alloc(MAX_LIST_NODE))
        size += ((whole > 0) | layout.separate) * (layout.alloc(48) + layout.alloc(32))
        first = int(prepared.minute_row[whose == shard].min())
        born[first] += 1
        keys[first:] += 1
        total[first:] += size[first:]
        members += 2 + len(mine) + len(prepared.columns.exchanges)
    return Family(keys, total, members, born, ttl=False)


def writer(prepared: Prepared, settings: Settings, layout: Layout) -> Family:
    """Return the mark of the writer, one a shard: a small hash with the number of the last batch."""
    length = len("liqw:") + 16 + (0 if settings.shards == 1 else 4)
    entries = listpack_text(3) + listpack_int(prepared.rows)
    each = layout.key(length) + layout.listpack_hash(entries)
    count = len(prepared.present(settings.shards))
    born = np.zeros(prepared.rows)
    born[0] = count
    return Family(np.full(prepared.rows, float(count)), np.full(prepared.rows, float(each * count)), count, born)
