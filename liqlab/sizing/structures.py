"""Bytes of Redis's building blocks, as formulas: what the allocator gives, listpacks, radix trees, keys and tables.

Each formula names the file of Redis (or Valkey) that it restates. All take and return numbers or numpy arrays; sizes
are bytes. Nothing here asks a server: what differs between servers is in `Layout`, which `liqlab.sizing.calibrate`
chooses by measuring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

PREALLOCATED: Final = 4096  # t_stream.c, STREAM_LISTPACK_MAX_PRE_ALLOCATE
LISTPACK: Final = 7  # listpack.c: a header of 6 bytes and an end byte
MAX_LISTPACK_VALUE: Final = 64  # hash-max-listpack-value, as liqlab.config sets it
MAX_LISTPACK_MEMBERS: Final = 128  # zset-max-listpack-entries, as liqlab.config sets it
MAX_LIST_NODE: Final = 8192  # list-max-listpack-size -2
LEAF: Final = 16  # rax.c: a node without children, with a value
_LEVELS: Final = 32  # server.h, ZSKIPLIST_MAXLEVEL
_BUCKET: Final = 7  # entries of a bucket of Valkey's hashtable.c


@dataclass(frozen=True)
class Layout:
    """How a server lays its objects out.

    Attributes
    ----------
    name : str
        ``separate``: key, entry and value object are allocations of their own (Redis 7.0, `dict.c`, `object.c`).
        ``kvobj``: key, TTL and value object are one (Redis 8.2, `object.c`). ``valkey``: the same, with tables of
        buckets (Valkey 8 and 9.0, `hashtable.c`). ``valkey-embedded``: and values of up to 128 bytes within (9.1).
    quantum : int
        Step of jemalloc's small sizes, 8 or 16; 0 for the C library's malloc.
    """

    name: str = "kvobj"
    quantum: int = 8

    @property
    def valkey(self) -> bool:
        """Whether tables are of buckets."""
        return self.name.startswith("valkey")

    @property
    def separate(self) -> bool:
        """Whether a key is an allocation of its own."""
        return self.name == "separate"

    def alloc(self, size: ArrayLike) -> Any:
        """Return what `used_memory` grows by for a request of `size` bytes.

        jemalloc, `sz.h`: four sizes in each doubling, never closer than the quantum. C library (glibc's `malloc.c`):
        steps of 16 with 8 bytes of overhead, which malloc_usable_size leaves out; whole pages from 128 KiB on.
        """
        size = np.maximum(np.asarray(size, np.int64), 1)
        if self.quantum == 0:
            small = np.maximum((size + 23) // 16 * 16 - 8, 24)
            return np.where(size < 128 << 10, small, (size + 16 + 4095) // 4096 * 4096 - 16)
        doubling = np.frexp((size - 1).astype(np.float64))[1].astype(np.int64)  # 2^(d-1) < size <= 2^d
        step = np.maximum(np.int64(1) << np.maximum(doubling - 3, 0), self.quantum)
        return np.where(size <= 8, 8, (size + step - 1) // step * step)

    def key(self, length: ArrayLike, *, ttl: bool = True) -> Any:
        """Return the bytes of a key and of the object of its value, without tables and without what the value holds.

        Parameters
        ----------
        length : array_like of int
            Of the key, bytes.
        ttl : bool
            Whether it has one.
        """
        text = sds(length)
        if self.separate:  # object.c: robj; sds.c: the key. Entries are with the tables.
            return self.alloc(16) + self.alloc(text)
        return self.alloc(16 + 8 * ttl + 1 + text)

    def string(self, length: ArrayLike, value: ArrayLike, *, fresh: ArrayLike = True) -> Any:
        """Return the bytes of a key with a TTL and its string of so many bytes, without tables.

        `object.c`: short values lie in the object itself (44 bytes in 7.0, 64 with the key in 8.2; Valkey 9.1: 128, and
        no pointer then).

        Parameters
        ----------
        length, value : array_like of int
            Of the key's name and of the string.
        fresh : array_like of bool
            Whether the key is new. It gets its TTL when it is there already, and keeps its place if there is room.
        """
        length, value = np.asarray(length), np.asarray(value)
        if self.separate:
            short = value <= 44
            return self.alloc(sds(length)) + np.where(
                short, self.alloc(16 + 4 + value), self.alloc(16) + self.alloc(sds(value))
            )
        head, most = (8, 128) if self.name == "valkey-embedded" else (16, 64)
        bare = head + 1 + sds(length) + 4 + value
        keeps = np.asarray(fresh) & (bare <= most) & (self.alloc(bare) >= bare + 8)
        apart = self.key(length) + self.alloc(sds(value))
        return np.where(keeps, self.alloc(bare), np.where(bare + 8 <= most, self.alloc(bare + 8), apart))

    def field(self, name: ArrayLike, value: ArrayLike) -> Any:
        """Return the bytes of one field of a hash that is a table (`t_hash.c`; Valkey `entry.c`), without its slot."""
        name, value = np.asarray(name), np.asarray(value)
        if not self.valkey:
            return self.alloc(24) + self.alloc(sds(name)) + self.alloc(sds(value))
        whole = sds(name) + 4 + value
        return np.where(
            whole <= 128, self.alloc(whole), self.alloc(8 + np.maximum(sds(name), name + 4)) + self.alloc(sds(value))
        )

    def table(self, keys: ArrayLike, slots: ArrayLike) -> Any:
        """Return the bytes of a table of the keyspace.

        `dict.c`: a pointer a slot; an entry of 24 bytes a key where keys are ``separate``, else of 16 bytes only for
        keys that collide: with a load a = keys / slots, the fraction 1 - (1 - exp(-a)) / a. `hashtable.c`: 64 bytes a
        bucket of seven, and as much for each that overflows, by Poisson's law.
        """
        keys, slots = np.asarray(keys, np.float64), np.asarray(slots, np.float64)
        load = keys / np.maximum(slots, 1)
        if self.valkey:
            return np.where(slots > 0, self.alloc(64 * slots) + self.alloc(64) * slots * _overflows(load), 0.0)
        if self.separate:
            return self.alloc(8 * slots) * (slots > 0) + self.alloc(24) * keys
        collide = 1 - (1 - np.exp(-load)) / np.maximum(load, 1e-9)
        return self.alloc(8 * slots) * (slots > 0) + self.alloc(16) * keys * collide

    def slots(self, least: Ints, most: Ints) -> Ints:
        """Return how many slots (Valkey: buckets) the table has, keys coming and going.

        `dict.c`, `server.c`: it doubles when full, and shrinks to the least power of two when less than an eighth (7.0:
        a tenth) is used. `hashtable.c`: full is 7 a bucket, and sparse below 13 %; it is made anew for 6.4 a bucket, at
        once, and a second time if so many keys went meanwhile.

        Parameters
        ----------
        least, most : array of int64, shape (m,)
            Keys through time: when the expired ones of a minute are gone, and when its events are written.
        """
        each = _BUCKET if self.valkey else 1
        fewest = 1 if self.valkey else 4
        sparse = 0.13 if self.valkey else (0.1 if self.separate else 0.125)
        result, now = np.zeros(len(most), np.int64), 0
        wanted = np.maximum(_power_of_two(-(-np.stack([least, most]) // each)), fewest)
        grown = np.maximum.accumulate(np.where(most > 0, wanted[1], 0))
        before = np.append(0, grown[:-1])
        if not ((before > fewest) & (least < sparse * before * each)).any():
            return grown  # most never shrink
        for row, (low, high, less, more) in enumerate(
            zip(*np.stack([least, most]).tolist(), *wanted.tolist(), strict=True)
        ):
            if now > fewest and low < sparse * now * each:
                if self.valkey:
                    now = _buckets(int(sparse * now * each))
                    less = _buckets(low) if low < sparse * now * each else now
                now = less
            result[row] = now = max(now, more if high else 0)
        return result

    def listpack_hash(self, entries: ArrayLike) -> Any:
        """Return the bytes of a small hash's listpack whose entries add up to so many."""
        return self.alloc(np.asarray(entries) + LISTPACK)

    def hash_table(self, fields: ArrayLike) -> Any:
        """Return the bytes of the table of a large hash, which grows as the keyspace's do (`dict.c`, `hashtable.c`)."""
        fields = np.asarray(fields, np.int64)
        if self.valkey:
            return self.alloc(80) + self.alloc(64 * _power_of_two(-(-fields // _BUCKET)))
        return self.alloc(56) + self.alloc(8 * np.maximum(_power_of_two(fields), 4))

    def member(self, name: ArrayLike) -> Any:
        """Return the bytes of one member of a large sorted set, without its slot, in the mean of its node's heights.

        `t_zset.c`: a node of score, way back and 16 bytes a level, of which each has another in a quarter of cases; in
        Redis the name and an entry of the table are apart from it, in Valkey the name is within.
        """
        text = sds(name)
        levels = np.arange(1, _LEVELS + 1)
        share = 0.75 * 0.25 ** (levels - 1.0)
        if self.valkey:
            return (self.alloc(16 + 16 * levels + 1 + np.asarray(text)[..., None]) * share).sum(axis=-1)
        return self.alloc(text) + self.alloc(24) + float((self.alloc(24 + 16 * levels) * share).sum())

    def sorted_set(self, members: ArrayLike, added: ArrayLike) -> Any:
        """Return the bytes of a large sorted set (`server.h`, `t_zset.c`) with its table, without its members.

        `dict.c`: a table that has doubled moves over two used slots with each member that is added, and of a full one
        the part 1 - 1 / e is used; until that is done it is there too. From 7.2 on a sorted set that is converted gets
        its table at once.

        Parameters
        ----------
        members, added : array_like of int
            The most that it has held at once; all that ever came.
        """
        members, added = np.asarray(members, np.int64), np.asarray(added, np.int64)
        head = self.alloc(16) + self.alloc(32) + self.alloc((16 if self.valkey else 24) + 16 * _LEVELS)
        if self.valkey:
            return head + self.alloc(80) + self.table(members, _power_of_two(-(-members // _BUCKET)))
        before = _power_of_two(members) // 2
        moving = (added < (1.5 - 0.5 / np.e) * before) & (self.separate | (before > MAX_LISTPACK_MEMBERS))
        return head + self.hash_table(members) + np.where(moving, self.alloc(8 * before), 0)

    @property
    def stream(self) -> int:
        """Bytes of an empty stream (`stream.h`) with its radix tree, which keeps its first node."""
        stream, tree = (112, 24) if self.name == "kvobj" else (80, 32 if self.valkey else 24)
        return int(self.alloc(stream) + self.alloc(tree) + self.alloc(32))


def _buckets(keys: int) -> int:
    return int(_power_of_two(max(keys * 5 - 1, 0) // 32 + 1))


def _power_of_two(least: ArrayLike) -> Any:
    least = np.maximum(np.asarray(least, np.int64), 1)
    return np.int64(1) << np.frexp((least - 1).astype(np.float64) + 0.5)[1].astype(np.int64).clip(0)


def _overflows(load: Floats) -> Floats:
    """Return child buckets a bucket: a chain of c buckets holds 6 (c - 1) + 7 entries."""
    most = 40
    p, total = np.exp(-load), np.zeros_like(load)
    for n in range(1, most):
        p = p * load / n
        total = total + p * max(-(-(n - _BUCKET) // (_BUCKET - 1)), 0)
    return total


def sds(length: ArrayLike) -> Any:
    """Return the bytes of a string with its header and end (`sds.h`): 1, 3, 5 bytes for up to 31, 255, 65,535."""
    length = np.asarray(length, np.int64)
    return length + 1 + np.where(length < 32, 1, np.where(length < 256, 3, np.where(length < 65_536, 5, 9)))


def listpack_int(value: ArrayLike) -> Any:
    """Return the bytes of an integer in a listpack (`listpack.c`), with the byte that leads back."""
    value = np.asarray(value, np.int64)
    wide = np.maximum(value, ~value)  # bits of two's complement without the sign
    size = 5 + 4 * (wide >= 1 << 31) - (wide < 1 << 23) - (wide < 1 << 15)
    size = np.where(wide < 1 << 12, 2, size)
    return np.where((value >= 0) & (value < 128), 1, size) + 1


def listpack_text(length: ArrayLike) -> Any:
    """Return the bytes of a string in a listpack (`listpack.c`): 1, 2 or 5 in front, 1 to 5 that lead back."""
    length = np.asarray(length, np.int64)
    body = length + np.where(length < 64, 1, np.where(length < 4096, 2, 5))
    return body + 1 + (body > 127) + (body > 16_383) + (body > 2_097_151)


def digits(value: ArrayLike) -> Any:
    """Return the length of integers as text."""
    value = np.asarray(value, np.int64)
    size = np.abs(value)
    powers = 10 ** np.arange(1, 19, dtype=np.int64)
    return np.searchsorted(powers, size, side="right") + 1 + (value < 0)


def radix_trees(tree: NDArray[np.integer], ms: Ints, seq: NDArray[np.integer], layout: Layout) -> int:
    """Return the bytes of the nodes of radix trees whose keys are stream IDs (`rax.c`), roots left out.

    A node takes 4 bytes, its characters, padding to 8 and 8 bytes a child: one child for a compressed run of several
    characters, one for each character where it branches. A leaf has its value instead: 16 bytes.

    Parameters
    ----------
    tree, ms, seq : array of int, shape (n,)
        Which tree, and the two halves of the ID; sorted.
    """
    if not len(tree):
        return 0
    keys = np.empty((len(tree), 2), ">i8")
    keys[:, 0], keys[:, 1] = ms, seq
    text = keys.view(np.uint8).reshape(len(tree), 16)
    new = np.zeros((len(tree), 17), np.bool_)  # whether the first d characters are others than those of the key before
    new[0] = True
    differ = np.ones(len(tree), np.bool_)
    differ[1:] = tree[1:] != tree[:-1]
    new[:, 0] = differ
    for depth in range(16):
        differ[1:] |= text[1:, depth] != text[:-1, depth]
        new[:, depth + 1] = differ
    total = int(layout.alloc(LEAF)) * len(tree)
    run = np.zeros(0, np.int64)  # of each prefix: single children in a row above it
    for depth in range(16):
        prefixes = np.flatnonzero(new[:, depth])
        children = np.add.reduceat(new[:, depth + 1].astype(np.int64), prefixes)
        run = np.zeros(len(prefixes), np.int64) if depth == 0 else run
        branches = children > 1
        total += int(_compressed(run[branches], layout).sum()) + int(_branch(children[branches], layout).sum())
        run = np.repeat(np.where(branches, 0, run + 1), children)
    total += int(_compressed(run, layout).sum())
    return total - int(layout.alloc(32)) * len(np.unique(tree))


def _padded(characters: Any) -> Any:
    return (4 + characters + 7) // 8 * 8


def _compressed(run: Ints, layout: Layout) -> Any:
    return np.where(run > 0, layout.alloc(_padded(run) + 8), 0)


def _branch(children: Ints, layout: Layout) -> Any:
    return layout.alloc(_padded(children) + 8 * children)
