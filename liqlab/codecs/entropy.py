"""An entropy coder for columns of small numbers: as many bits for each as its share of the column says.

The coder is the range variant of asymmetric numeral systems (Duda, 2013, arXiv:1311.2540): an integer `x` is the
message so far, and a token that `f` of 2**15 are grows it by the factor 2**15 / f. It works on whole columns ("runs"),
each with a table of its tokens' shares; what has no pattern, the low bits of large numbers, is stored as plain bits.

The tokens of a run are dealt out to several `x`, the lanes, which share one stream of words (Giesen, 2014,
arXiv:1402.3392): numpy takes a token of each in one step. A lane does not begin empty but with some of the last plain
bits, so that it costs no more than what its end is rounded up by: a byte in the mean.

Numbers become tokens by halves of a power of two: 0, 1, 2, 3, 4-5, 6-7, 8-11, 12-15, 16-23, ...
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from liqlab.codecs.base import CodecError, Ints
from liqlab.events import run_starts

MAX_TOKENS: Final = 1 << 15  # different ones in a table
LARGEST: Final = 53  # bits of a number

_SHARES: Final = 15  # shares are of 2**15
_MASK: Final = np.uint64((1 << _SHARES) - 1)
_LOW: Final = np.uint64(1 << 32)  # x stays in [2**32, 2**48)
_STATE: Final = 6  # bytes of an x
_WORD: Final = 16  # bits that leave x when it would grow out
_SEED: Final = 32  # plain bits that a lane can begin with
_EACH: Final = 256  # tokens for which there is a lane
_MOST: Final = 255  # lanes
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


def _dealt(runs: list[NDArray[Any]], lanes: int, fill: float) -> NDArray[Any]:
    """Deal runs out to lanes, shape (steps, lanes); each run begins with the first lane."""
    padded = [part for run in runs for part in (run, np.full(-len(run) % lanes, fill, run.dtype))]
    return np.concatenate(padded).reshape(-1, lanes)


class Packer:
    """Collects runs; `finish` gives the bytes."""

    def __init__(self) -> None:
        self._runs: list[tuple[Ints, Ints]] = []  # shares, and places in them
        self._values: list[Ints] = []
        self._widths: list[Ints] = []
        self._plain = 0  # bits
        self._behind = 0  # so many of them came before the last run ended

    def bits(self, values: Ints, widths: Ints | int) -> None:
        """Store values as they are, in so many bits each: 0 to 57."""
        self._values.append(values)
        self._widths.append(np.full(len(values), widths) if isinstance(widths, int) else widths)
        self._plain += len(values) * widths if isinstance(widths, int) else int(widths.sum())

    def scalar(self, value: int) -> None:
        """Store one number below 2**53."""
        self.bits(np.array([value.bit_length(), value]), np.array([6, value.bit_length()]))

    def tokens(self, tokens: Ints) -> None:
        """Store a run of whole numbers from 0 on, of which at most `MAX_TOKENS` lie between smallest and largest."""
        if not len(tokens):
            return
        least = int(tokens.min())
        counts = np.bincount(tokens - least)
        levels = np.rint(15 + 2 * np.log2(np.maximum(counts, 0.5) / counts.max())).clip(1, 15).astype(np.int64)
        levels *= counts > 0
        self.scalar(least)
        self.scalar(len(counts))
        self.bits(levels, 4)
        if len(counts) > 1:
            self._runs.append((_shares(levels), tokens - least))
            self._behind = self._plain

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

    @cached_property
    def _begun(self) -> tuple[NDArray[np.uint64], int, bytes]:
        """The lanes as they begin, with how many plain bits behind the last run, and the plain bits that are left.

        Nothing can be added from then on.
        """
        values, widths = np.concatenate(self._values).astype(np.uint64), np.concatenate(self._widths)
        starts = np.cumsum(widths) - widths
        place, rest = starts >> 6, 64 - (starts & 63) - widths  # in words of 64 bits; bits of them that are left behind
        words = np.zeros(self._plain // 64 + 2, np.uint64)
        over = np.flatnonzero(rest < 0)  # into the next word, of which it is then the first
        words[place[over] + 1] = values[over] << (64 + rest[over]).astype(np.uint64)
        values[over] >>= (-rest[over]).astype(np.uint64)
        first = run_starts(place)
        words[place[first]] |= np.bitwise_or.reduceat(values << np.maximum(rest, 0).astype(np.uint64), first)
        plain = words.astype(">u8").tobytes()[: -(-self._plain // 8)]

        lanes = min(max(sum(len(places) for _, places in self._runs) // _EACH, 1), _MOST) if self._runs else 0
        seeded = min(lanes, (self._plain - self._behind) // _SEED)
        cut = len(plain) - _SEED // 8 * seeded
        x = np.full(lanes, _LOW)
        x[:seeded] += np.frombuffer(plain, ">u4", seeded, cut)
        return x, seeded, plain[:cut]

    @property
    def length(self) -> int:
        """How many bytes `finish` gives, to a word or two, without the work: a token takes what its share says."""
        x, _, plain = self._begun
        if not len(x):
            return len(plain)
        taken = [(_SHARES - np.log2(np.maximum(shares, 1)))[places] for shares, places in self._runs]
        grown = _dealt(taken, len(x), 0.0).sum(axis=0) + np.log2(x / _LOW)
        return 2 + _STATE * len(x) + _WORD // 8 * int((grown // _WORD).sum()) + len(plain)

    def finish(self) -> tuple[int, bytes]:
        """Return how many bytes the runs take, and the bytes: runs, then plain bits."""
        begun, seeded, plain = self._begun
        if not len(begun):
            return 0, plain

        x, lanes = begun.copy(), len(begun)
        # A place without a token has the whole share, which leaves x as it is.
        share = _dealt([shares[places] for shares, places in self._runs], lanes, 1 << _SHARES).astype(np.uint64)
        start = _dealt([(np.cumsum(shares) - shares)[places] for shares, places in self._runs], lanes, 0)
        rest, full = np.uint64(1 << _SHARES) - share, share << np.uint64(_STATE * 8 - _SHARES)
        leaves, left = np.empty(share.shape, np.bool_), np.empty_like(share)
        columns = (one[::-1] for one in (share, start.astype(np.uint64), rest, full, leaves, left))
        grown = np.empty_like(x)
        for its_share, its_start, its_rest, its_full, its_leaves, its_left in zip(*columns, strict=True):
            its_left[:] = x
            np.greater_equal(x, its_full, out=its_leaves)
            np.right_shift(x, _WORD, out=x, where=its_leaves)
            np.floor_divide(x, its_share, out=grown)
            grown *= its_rest
            grown += its_start
            x += grown  # quotient * 2**15 + remainder + start
        states = x.astype(">u8").view(np.uint8).reshape(lanes, 8)[:, 8 - _STATE :].tobytes()
        coded = bytes([lanes, seeded]) + states + left[leaves].astype(">u2").tobytes()
        return len(coded), coded + plain


class Unpacker:
    """Gives back what a `Packer` was given, when asked in the same order; anything else is a CodecError."""

    def __init__(self, codec: str, coded: bytes, plain: bytes) -> None:
        self._codec = codec
        lanes, self._seeded = coded[:2] if len(coded) > 1 else (0, 0)
        words = 2 + _STATE * lanes
        if coded and (not self._seeded <= lanes > 0 or len(coded) < words or len(coded) % 2):
            raise CodecError(f"{codec}: runs of {len(coded)} bytes")
        states = np.zeros((lanes, 8), np.uint8)
        states[:, 8 - _STATE :] = np.frombuffer(coded[2:words], np.uint8).reshape(lanes, _STATE)
        self._x = states.view(">u8")[:, 0].astype(np.uint64)
        if (self._x < _LOW).any():
            raise CodecError(f"{codec}: a run that begins behind its end")
        self._words = np.frombuffer(coded[words:], ">u2").astype(np.uint64)
        self._at = 0
        self._look_into(plain)

    def _look_into(self, plain: bytes) -> None:
        # Eight bytes from each byte on: what `bits` looks into.
        self._plain = plain
        self._windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(plain + bytes(8), np.uint8), 8)
        self._end = 8 * len(plain)

    def bits(self, widths: Ints) -> Ints:
        """Return values of so many bits each: 0 to 57."""
        ends = np.cumsum(widths)
        total = int(ends[-1]) if len(ends) else 0
        if self._at + total > self._end and self._seeded:
            self._take_seeds()
        if self._at + total > self._end:
            raise CodecError(f"{self._codec}: the block ends early")
        starts = self._at + ends - widths
        self._at += total
        window: NDArray[Any] = self._windows[starts >> 3].view(">u8")[:, 0].astype(np.uint64)
        window = (window << (starts & 7).astype(np.uint64)) >> np.uint64(7)
        return window.astype(np.int64) >> (57 - widths)

    def _take_seeds(self) -> None:
        """Look, behind the last run, into what the lanes began with as well."""
        if len(self._words) or (self._x >= 2 * _LOW).any():
            raise CodecError(f"{self._codec}: the runs go on behind the last event")
        seeds = self._x[: self._seeded] - _LOW
        self._x[: self._seeded], self._seeded = _LOW, 0
        self._look_into(self._plain + seeds.astype(">u4").tobytes())

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
        if not len(self._x):
            raise CodecError(f"{self._codec}: the runs end early")
        there = np.flatnonzero(levels)
        share = _shares(levels)[there]
        place = np.repeat(np.arange(len(there)), share)  # of each number below 2**15
        start, share = (np.cumsum(share) - share).astype(np.uint64), share.astype(np.uint64)
        found, shares, word = np.empty(count, np.int64), np.uint64(_SHARES), np.uint64(_WORD)
        for at in range(0, count, len(self._x)):
            x = self._x[: count - at]
            slot = x & _MASK
            its = place[slot]
            found[at : at + len(x)] = its
            x >>= shares
            x *= share[its]
            x += slot - start[its]
            short = np.flatnonzero(x < _LOW)
            if len(short):
                if len(short) > len(self._words):
                    raise CodecError(f"{self._codec}: the runs end early")
                x[short] = x[short] << word | self._words[: len(short)]
                self._words = self._words[len(short) :]
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
        if (self._x != _LOW).any() or len(self._words) or self._end - self._at > 7:
            raise CodecError(f"{self._codec}: the block goes on behind its last event")
