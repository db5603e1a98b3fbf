"""An entropy coder for columns of small numbers: as many bits for each as its share of the column says.

The coder is the range variant of asymmetric numeral systems (Duda, 2013, arXiv:1311.2540): one integer `x` is the whole
message so far, and a token that `f` of 2**15 are grows it by the factor 2**15 / f. It works on whole columns ("runs"),
each with a table of its tokens' shares; what has no pattern, the low bits of large numbers, is stored as plain bits.

Numbers become tokens by halves of a power of two: 0, 1, 2, 3, 4-5, 6-7, 8-11, 12-15, 16-23, ...
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from liqlab.codecs.base import CodecError, Ints

MAX_TOKENS: Final = 1 << 15  # different ones in a table
LARGEST: Final = 53  # bits of a number

_SHARES: Final = 15  # shares are of 2**15
_LOW: Final = 1 << 31  # x stays in [2**31, 2**63)
_WORD: Final = 32  # bits that leave x when it would grow out
_MASK: Final = (1 << _SHARES) - 1
# A table has four bits a token: 0 for none, else twice the binary logarithm of how many.
_WEIGHTS: Final = np.array([0, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256])


def _shares(levels: Ints) -> Ints:
    """Return shares of 2**15, at least 1 where the level is not 0; whole numbers only, so that all machines agree."""
    weights = _WEIGHTS[levels]
    there = levels > 0
    shares: Ints = there + weights * ((1 << _SHARES) - int(there.sum())) // max(int(weights.sum()), 1)
    shares[shares.argmax()] += (1 << _SHARES) - int(shares.sum())
    return shares


def _width(values: Ints) -> Ints:
    """Return lengths in bits; exact below 2**53."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


class Packer:
    """Collects runs; `finish` gives the bytes."""

    def __init__(self) -> None:
        self._runs: list[tuple[Ints, Ints]] = []  # shares, and places in them
        self._entropy = 0.0  # bits of the runs
        self._values: list[Ints] = []
        self._widths: list[Ints] = []

    def bits(self, values: Ints, widths: Ints | int) -> None:
        """Store values as they are, in so many bits each: 0 to 57."""
        self._values.append(values)
        self._widths.append(np.broadcast_to(np.asarray(widths, np.int64), values.shape))

    def scalar(self, value: int) -> None:
        """Store one number below 2**53."""
        self.bits(np.array([value.bit_length(), value]), np.array([6, value.bit_length()]))

    def tokens(self, tokens: Ints) -> None:
        """Store a run of whole numbers from 0 on, of which at most `MAX_TOKENS` lie between smallest and largest."""
        if not len(tokens):
            return
        least = int(tokens.min())
        counts = np.bincount(tokens - least)
        with np.errstate(divide="ignore"):
            levels = np.rint(15 + 2 * np.log2(counts / counts.max())).clip(1, 15).astype(np.int64) * (counts > 0)
        self.scalar(least)
        self.scalar(len(counts))
        self.bits(levels, 4)
        if len(counts) > 1:
            shares = _shares(levels)
            self._runs.append((shares, tokens - least))
            self._entropy += float(counts @ (_SHARES - np.log2(np.maximum(shares, 1))))

    def numbers(self, values: Ints, *, low: Ints | int = 0, offset: Ints | int = 0) -> None:
        """Store a run of numbers from 0 on, below 2**53.

        Parameters
        ----------
        values : array of int64, shape (n,)
            What to store.
        low : array or int
            That many of the lowest bits have no pattern: 0 to 51.
        offset : array or int
            Is added to the token: twice the logarithm of what the number must be multiplied with, so that numbers that
            mean the same share a token. At least 0.
        """
        high = values >> low
        width = _width(high)
        rest: Ints = np.maximum(width - 2, 0)
        tokens: Ints = offset + np.maximum(2 * width - 2 + (high >> rest & 1), 0)
        self.tokens(tokens)
        plain: Ints = rest + low
        self.bits(values & (np.int64(1) << plain) - 1, plain)

    @property
    def length(self) -> int:
        """How many bytes `finish` gives, to a word of four, without the work: a token takes what its share says."""
        return 8 + int(self._entropy // _WORD) * (_WORD // 8) + -(-int(sum(map(np.sum, self._widths))) // 8)

    def finish(self) -> tuple[int, bytes]:
        """Return how many bytes the runs take, and the bytes: runs, then plain bits."""
        x = _LOW
        words = []
        for shares, places in reversed(self._runs):
            columns = shares, shares << 63 - _SHARES, (1 << _SHARES) - shares, np.cumsum(shares) - shares
            steps = list(zip(*map(np.ndarray.tolist, columns), strict=True))
            for share, full, rest, start in map(steps.__getitem__, places[::-1].tolist()):
                if x >= full:
                    words.append(x & 0xFFFFFFFF)
                    x >>= _WORD
                x += x // share * rest + start  # quotient * 2**15 + remainder + start
        coded = x.to_bytes(8, "big") + np.array(words[::-1], ">u4").tobytes()

        values, widths = np.concatenate(self._values), np.concatenate(self._widths)
        ends = np.cumsum(widths)
        shift = np.repeat(ends, widths) - 1 - np.arange(int(widths.sum()))
        return len(coded), coded + np.packbits((np.repeat(values, widths) >> shift & 1).astype(np.uint8)).tobytes()


class Unpacker:
    """Gives back what a `Packer` was given, when asked in the same order; anything else is a CodecError."""

    def __init__(self, codec: str, coded: bytes, plain: bytes) -> None:
        self._codec = codec
        if len(coded) < 8 or len(coded) % 4:
            raise CodecError(f"{codec}: runs of {len(coded)} bytes")
        self._x = int.from_bytes(coded[:8], "big")
        self._words = np.frombuffer(coded, ">u4", offset=8)[::-1].tolist()
        # Eight bytes from each byte on: what `bits` looks into.
        padded = np.frombuffer(plain + bytes(8), np.uint8)
        self._windows = np.lib.stride_tricks.sliding_window_view(padded, 8)
        self._end = 8 * len(plain)
        self._at = 0

    def bits(self, widths: Ints) -> Ints:
        """Return values of so many bits each: 0 to 57."""
        ends = np.cumsum(widths)
        total = int(ends[-1]) if len(ends) else 0
        if self._at + total > self._end:
            raise CodecError(f"{self._codec}: the block ends early")
        starts = self._at + ends - widths
        self._at += total
        window: NDArray[Any] = self._windows[starts >> 3].view(">u8")[:, 0].astype(np.uint64)
        window = (window << (starts & 7).astype(np.uint64)) >> np.uint64(7)
        return window.astype(np.int64) >> (57 - widths)

    def scalar(self, most: int) -> int:
        """Return one number of at most `most`."""
        width = self.bits(np.array([6]))
        value = int(self.bits(np.minimum(width, LARGEST))[0])
        if value > most:
            raise CodecError(f"{self._codec}: {value} where at most {most} is possible")
        return value

    def tokens(self, count: int) -> Ints:
        """Return a run."""
        if not count:
            return np.zeros(0, np.int64)
        least = self.scalar(MAX_TOKENS)
        levels = self.bits(np.full(self.scalar(MAX_TOKENS), 4))
        if not levels.any():
            raise CodecError(f"{self._codec}: a table without tokens")
        if len(levels) == 1:
            return np.full(count, least, np.int64)
        there = np.flatnonzero(levels)
        all_shares = _shares(levels)[there]
        shares, starts = all_shares.tolist(), (np.cumsum(all_shares) - all_shares).tolist()
        x, words, found = self._x, self._words, []
        for _ in range(count):
            slot = x & _MASK
            at = bisect_right(starts, slot) - 1
            found.append(at)
            x = shares[at] * (x >> _SHARES) + slot - starts[at]
            if x < _LOW:
                if not words:
                    raise CodecError(f"{self._codec}: the runs end early")
                x = x << _WORD | words.pop()
        self._x = x
        return there[found] + least

    def numbers(self, count: int, *, low: Ints | int = 0, offset: Ints | int = 0) -> Ints:
        """Return a run of numbers below 2**53."""
        tokens = self.tokens(count) - offset
        rest = np.maximum((tokens >> 1) - 1, 0)
        plain = rest + low
        if len(plain) and (int(tokens.min()) < 0 or int(plain.max()) > LARGEST - 2):
            raise CodecError(f"{self._codec}: a number of more than {LARGEST} bits")
        numbers: Ints = np.where(tokens < 2, tokens, 2 + (tokens & 1)) << plain | self.bits(plain)
        return numbers

    def finish(self) -> None:
        """Raise CodecError if something is left."""
        if self._x != _LOW or self._words or self._end - self._at > 7:
            raise CodecError(f"{self._codec}: the block goes on behind its last event")
