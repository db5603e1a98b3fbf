"""Scaled decimals: a float64 as an integer and a power of ten, which gives the very same float64 back.

Venues send decimals. A decimal of up to 15 digits is ``mantissa / 10**exponent`` with both parts exact in a float64,
and the division of two exact numbers is rounded once, as the conversion of the text was: the same to the bit.
Nothing here relies on that argument: a value counts as a scaled decimal when the division, carried out, returns it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from liqlab.codecs.base import Bools, Floats, Ints, Rows

HIGHEST: Final = 15  # largest exponent: four bits
EXACT: Final = 1 << 53  # integers below are exact in a float64
POWERS: Final[Floats] = np.array([10.0**power for power in range(HIGHEST + 1)])
# A plain size of more digits than this is looked at again: it may be a short notional divided by the price.
_LONG: Final = 1 << 31


class Scaled(NamedTuple):
    """Scaled decimals, each of shape (n,); what `found` denies has mantissa and exponent 0."""

    mantissa: Ints
    exponent: Ints
    found: Bools

    def rows(self, which: Rows) -> Scaled:
        """Return those of some rows."""
        return Scaled(self.mantissa[which], self.exponent[which], self.found[which])


class Sizes(NamedTuple):
    """Scaled sizes; where `inverse`, they are scaled notionals, to be divided by the price."""

    mantissa: Ints
    exponent: Ints
    found: Bools
    inverse: Bools

    def rows(self, which: Rows) -> Sizes:
        """Return those of some rows."""
        return Sizes(self.mantissa[which], self.exponent[which], self.found[which], self.inverse[which])


def scaled(values: Floats, *, limit: int = EXACT, divisor: Floats | None = None) -> Scaled:
    """Find the shortest scaled decimals.

    Parameters
    ----------
    values : array of float64, shape (n,)
        Any, also what is not finite; only positive ones can be found.
    limit : int
        Mantissas stay below.
    divisor : array of float64, shape (n,), optional
        Look for decimals that give `values` when divided by these.

    Returns
    -------
    Scaled
        With the smallest exponent from 0 to `HIGHEST` that gives each value back, bit for bit.
    """
    mantissa, exponent = np.zeros(len(values), np.int64), np.zeros(len(values), np.int64)
    found = np.zeros(len(values), np.bool_)
    left = np.arange(len(values))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        guess = values if divisor is None else values * divisor
        for power in range(HIGHEST + 1):
            tried = np.rint(guess * POWERS[power])
            result = tried / POWERS[power]
            if divisor is not None:
                result = result / divisor
            good = (result == values) & (tried > 0) & (tried < limit)
            at = left[good]
            mantissa[at], exponent[at], found[at] = tried[good], power, True
            if len(at):
                left, guess, values = left[~good], guess[~good], values[~good]
                divisor = divisor if divisor is None else divisor[~good]
            if not len(left):
                break
    return Scaled(mantissa, exponent, found)


def scaled_sizes(size: Floats, price: Floats, *, limit: int = EXACT) -> Sizes:
    """Find scaled sizes, or, where those are long or none, scaled notionals.

    The size of an inverse contract is ``contracts x contract value / price``: 17 digits, from a notional of three.
    """
    plain = scaled(size, limit=limit)
    inverse = np.zeros(len(size), np.bool_)
    again = np.flatnonzero(~plain.found | (plain.mantissa >= _LONG))
    if len(again):
        notional = scaled(size[again], limit=limit, divisor=price[again])
        better = notional.found & (~plain.found[again] | (notional.mantissa < plain.mantissa[again]))
        at = again[better]
        for into, values in zip(plain, notional, strict=True):
            into[at] = values[better]
        inverse[at] = True
    return Sizes(*plain, inverse)


def unscaled(mantissa: Ints, exponent: Ints) -> Floats:
    """Return ``mantissa / 10**exponent``; exponents must be 0 to `HIGHEST`."""
    return mantissa / POWERS[exponent]


def unscaled_sizes(mantissa: Ints, exponent: Ints, inverse: Bools, price: Floats) -> Floats:
    """Return sizes from what `scaled_sizes` found; prices of zero give what is not finite."""
    values = unscaled(mantissa, exponent)
    if inverse.any():
        with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
            values = np.where(inverse, values / price, values)
    return values
