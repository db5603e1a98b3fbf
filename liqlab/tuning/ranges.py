"""Quantiles of any parts of long arrays, for many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liqlab.sizing.buckets import before

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Ranks:
    """How many of n flags are set before each place: before its block of 256, and within that; a byte a flag.

    Parameters
    ----------
    flags : array of bool, shape (n,)
    """

    def __init__(self, flags: NDArray[np.bool_]) -> None:
        n = len(flags)
        before_each = np.zeros((n // 256 + 1) * 256, np.int32)
        np.cumsum(flags, out=before_each[1 : n + 1])
        self._blocks = before_each[::256].copy()
        self._inside = (before_each.reshape(-1, 256) - self._blocks[:, None]).astype(np.uint8).ravel()

    def before(self, place: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return how many flags are set before each place, 0 to n."""
        found: NDArray[np.int32] = self._blocks[place >> 8] + self._inside[place]
        return found


@dataclass(frozen=True)
class _Level:
    """Zeros of one bit: before each place, of all codes, and what those before each place weigh."""

    zeros: Ranks
    total: int
    heavy: Floats | None


class WaveletMatrix:
    """How many of the first p codes are below a number, for many p at once.

    Claude, Navarro and Ordonez 2015, "The wavelet matrix", section 4; every step is taken for all questions together.
    It takes a byte a code and bit, 9 where codes have weights: 20 MB for a million of 20 bits, and 0.15 s to build.

    Parameters
    ----------
    codes : array of int, shape (n,)
        0 to 2 ** bits - 1.
    bits : int
    weights : array of float64, shape (n,), optional
        How much each counts; 1 when absent.
    """

    def __init__(self, codes: NDArray[np.integer], bits: int, weights: Floats | None = None) -> None:
        self._whole = None if weights is None else before(weights)
        code = codes.astype(np.int32)
        self.levels: list[_Level] = []  # the high bit first
        for bit in reversed(range(bits)):
            low = (code >> bit & 1) == 0
            zeros = np.flatnonzero(low)
            order = np.concatenate([zeros, np.flatnonzero(~low)])
            heavy = None
            if weights is not None:
                heavy = before(np.where(low, weights, 0.0))
                weights = weights[order]
            self.levels.append(_Level(Ranks(low), len(zeros), heavy))
            code = code[order]

    def up_to(self, place: NDArray[np.integer]) -> Floats:
        """Return what the codes before each place weigh."""
        return place.astype(np.float64) if self._whole is None else self._whole[place]


@dataclass(frozen=True)
class Part:
    """Some of what quantiles are asked of, for k questions.

    Attributes
    ----------
    matrix : WaveletMatrix
    cuts : sequence of (array of int, shape (k,); array_like of float, shape (k,))
        The codes before a place count so many times more, or less where it is below 0.
    spare : array of float64, shape (k,), optional
        So much of it, the least, does not count.
    """

    matrix: WaveletMatrix
    cuts: Sequence[tuple[NDArray[np.integer], Floats | float]]
    spare: Floats | None = None


def quantiles(values: Floats, bits: int, parts: Sequence[Part], q: float) -> tuple[Floats, Floats]:
    """Return the value at the part q of the weight of each question, rounded up to a whole one.

    That is numpy's ``inverted_cdf``; where values count in part, the one at which k - 1/2 are counted, as
    `liqlab.quantiles.Distribution.quantiles` has it.

    Parameters
    ----------
    values : array of float64, shape (2 ** bits,) or shorter
        What each code stands for, ascending.
    bits : int
        Of the codes.
    parts : sequence of Part
        All for the same k questions.
    q : float
        0 to 1.

    Returns
    -------
    values, weight : array of float64, shape (k,)
        NaN where there is no weight; and how much there is.
    """
    k = len(parts[0].cuts[0][0])
    weight = np.zeros(k)
    for part in parts:
        whole = np.zeros(k)
        for place, times in part.cuts:
            whole += times * part.matrix.up_to(place)
        weight += whole if part.spare is None else np.maximum(whole - part.spare, 0)
    target = np.maximum(np.ceil(q * weight * (1 - 1e-12)), 1) - 0.5
    code = np.zeros(k, np.int32)
    places = [[place.astype(np.int32) for place, _ in part.cuts] for part in parts]
    passed = [np.zeros(k) for _ in parts]  # of each part, what is below all codes in question
    for level in range(bits):
        below, counted, zeros_of = np.zeros(k), list[Floats](), list[list[NDArray[np.int32]]]()
        for part, at, skipped in zip(parts, places, passed, strict=True):
            one = part.matrix.levels[level]
            count, left = skipped.copy(), [one.zeros.before(place) for place in at]
            for place, place_left, (_, times) in zip(at, left, part.cuts, strict=True):
                count += times * (place_left if one.heavy is None else one.heavy[place])
            below += count if part.spare is None else np.maximum(count - part.spare, 0)
            counted.append(count)
            zeros_of.append(left)
        high = below < target
        for number, (part, at, left) in enumerate(zip(parts, places, zeros_of, strict=True)):
            ones = part.matrix.levels[level].total
            places[number] = [np.where(high, ones + a - b, b) for a, b in zip(at, left, strict=True)]
            passed[number] = np.where(high, counted[number], passed[number])
        code = 2 * code + high
    return np.where(weight > 0, values[np.minimum(code, len(values) - 1)], np.nan), weight
