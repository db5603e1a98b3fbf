"""Symbols and exchanges by number, so that an event need not spell them out.

The table lives beside the data, in the list that `schema` calls ``names``: its first element is a token that whoever
made it drew, its second the time up to which events are sealed (see `liqlab.archive`), then come the names in the order
of their numbers: ``sBTCUSDT`` for a symbol, ``ebinance`` for an exchange. Names are only ever appended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from liqlab import clock
from liqlab.codecs.base import CodecError

MAX_SYMBOLS: Final = 1 << 16
MAX_EXCHANGES: Final = 1 << 7
HEAD: Final = 2  # elements before the first name


class Names:
    """The numbers of symbols and exchanges, as far as this process knows them.

    Parameters
    ----------
    entries : iterable of bytes or str
        The elements of the list behind its head.
    epoch : str
        The token at its head; empty where there is no list yet.

    Attributes
    ----------
    symbols, exchanges : list of str
        By number.
    stored : int
        How many names the server has once it has all that was packed with this table, in that order.
    held : (str, int)
        The epoch under which, and how many names, it is known to have now.
    """

    def __init__(self, entries: Iterable[bytes | str] = (), epoch: str = "") -> None:
        self.epoch = epoch
        self.symbols: list[str] = []
        self.exchanges: list[str] = []
        self._symbols: dict[str, int] = {}
        self._exchanges: dict[str, int] = {}
        self._entries: list[str] = []
        self.stored = 0
        for entry in entries:
            self._add(entry if isinstance(entry, str) else _text(entry))
        self.stored = len(self._entries)
        self.held = epoch, self.stored

    def again(self) -> Names:
        """Return the names that the server is known to have, itself where that is all."""
        epoch, count = self.held
        return self if (self.epoch, self.stored) == self.held else Names(self._entries[:count], epoch)

    def take(self) -> tuple[str, int, str, list[str]]:
        """Return what goes along with a batch; the server is then taken to have it.

        Returns
        -------
        epoch, stored, next epoch, added : str, int, str, list of str
            What the server must have for the batch to be understood; then the token of a list that is made anew, else
            the same epoch, and the elements to append.
        """
        epoch, stored = self.epoch, self.stored
        self.epoch, self.stored = epoch or clock.token(), len(self._entries)
        return epoch, stored, self.epoch, self._entries[stored:]

    def _add(self, entry: str) -> None:
        kind, name = entry[:1], entry[1:]
        if kind not in ("s", "e"):
            raise CodecError(f"{entry!r} is no element of a table of names")
        numbers, names, limit, what = (
            (self._symbols, self.symbols, MAX_SYMBOLS, "symbols")
            if kind == "s"
            else (self._exchanges, self.exchanges, MAX_EXCHANGES, "exchanges")
        )
        if len(names) == limit:
            raise CodecError(f"{name!r} would be number {limit + 1} of the {what}; a table of names holds {limit}")
        numbers.setdefault(name, len(names))
        names.append(name)
        self._entries.append(entry)

    def of_symbols(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the numbers of symbols; unknown ones are given the next.

        Raises
        ------
        CodecError
            The table is full.
        """
        return self._numbers(self._symbols, "s", names)

    def of_exchanges(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the numbers of exchanges, as `of_symbols` does of symbols."""
        return self._numbers(self._exchanges, "e", names)

    def _numbers(self, numbers: dict[str, int], kind: str, names: Sequence[str]) -> NDArray[np.int64]:
        for name in [name for name in names if name not in numbers]:
            if name not in numbers:  # still
                self._add(kind + name)
        return np.array([numbers[name] for name in names], np.int64)


def _text(entry: bytes) -> str:
    try:
        return entry.decode()
    except UnicodeDecodeError as error:
        raise CodecError(f"{entry[:40]!r} is no element of a table of names: {error.reason}") from None
