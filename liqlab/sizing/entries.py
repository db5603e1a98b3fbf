"""What one event takes in a node of a stream, for each codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from liqlab.codecs import CODECS, Names
from liqlab.events import SIDES
from liqlab.sizing.prepare import Prepared, arrow_lengths, codes_of
from liqlab.sizing.structures import LISTPACK, Ints, digits, listpack_int, listpack_text

# t_stream.c: of each entry its flags, the sequence number less the node's, and how many elements it has.
AROUND: Final = 6


@dataclass(frozen=True)
class Entries:
    """The entries of one codec.

    Attributes
    ----------
    size : array of int, shape (n,)
        Bytes in the listpack, without those of the time.
    text : array of int, shape (n,)
        Bytes of the command's fields and values: the measure by which a node is full (`t_stream.c`).
    head : int
        Bytes of an empty node: the listpack and its master entry.
    """

    size: NDArray[np.integer]
    text: NDArray[np.integer]
    head: int


def head_of(fields: tuple[str, ...]) -> int:
    """Return the bytes of a node without entries: counts, fields and an end in its master entry."""
    return LISTPACK + 8 + sum(int(listpack_text(len(field))) for field in fields)


def entries(prepared: Prepared, codec: str, *, own: bool, shards: int = 1) -> Entries:
    """Return what each event takes.

    Parameters
    ----------
    prepared : Prepared
    codec : str
        `writer.codec`.
    own : bool
        Whether the stream is one symbol's.
    shards : int
        Each has numbers of its own.
    """
    return prepared.once(("entries", codec, own, shards), lambda: _entries(prepared, codec, own, shards), large=True)


def _entries(prepared: Prepared, codec: str, own: bool, shards: int) -> Entries:
    columns, coder = prepared.columns, CODECS[codec]
    fields, carried = coder.fields_of(own), coder.carries(columns)
    found = _plain(prepared, codec, own, shards, carried)
    size, text = found
    if not carried.all():  # written as `fields`, whose names stand in the entry itself
        other = CODECS["fields"].fields_of(own)
        more, words = _plain(prepared, "fields", own, shards, np.ones(len(columns), np.bool_))
        spelled = 2 + sum(int(listpack_text(len(field))) for field in other)
        size = np.where(carried, size, more + spelled)
        text = np.where(carried, text, words + sum(map(len, other)))
    size, text = size + AROUND, text + sum(map(len, fields))
    return Entries(size.astype(np.int32), text.astype(np.int32), head_of(fields))  # remembered: half is enough


def _plain(prepared: Prepared, codec: str, own: bool, shards: int, carried: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Return the bytes of values in a listpack, and as text."""
    columns = prepared.columns
    if codec == "ints":
        return _integers(prepared, own, shards, carried)
    if codec == "struct19":
        return np.full(len(columns), listpack_text(19)), np.full(len(columns), 19)
    symbol = codes_of(columns.symbol, columns.symbols)
    exchange = codes_of(columns.exchange, columns.exchanges)
    if codec == "fields":
        size, text = np.full(len(columns), listpack_text(1)), np.full(len(columns), 1)
        for values in (columns.size, columns.price):
            length = arrow_lengths(values)
            whole = (values == np.floor(values)) & (values < 1e10)  # an integer is stored as one
            size += np.where(whole, listpack_int(np.where(whole, values, 0).astype(np.int64)), listpack_text(length))
            text += length
        for length in (exchange,) if own else (exchange, symbol):
            size += listpack_text(length)
            text += length
        return size, text
    side = codes_of(columns.side, list(SIDES))
    if codec == "msgpack":  # names of fields, two floats and a time of 9 bytes each, short strings with 1 byte in front
        text = 1 + sum(1 + len(key) for key in _KEYS) + 27 + 3 + side + symbol + exchange + (symbol > 31)
    else:
        floats = sum((_json(values) for values in (columns.size, columns.price)), np.zeros(len(columns), np.int64))
        text = 1 + sum(4 + len(key) for key in _KEYS) + 6 + side + symbol + exchange + floats + digits(columns.ts_ms)
    return listpack_text(text), text


_KEYS: Final = ("symbol", "side", "size", "price", "timestamp", "exchange")


def _json(values: NDArray[np.float64]) -> Ints:
    """Return the lengths of floats in JSON: whole ones end in ``.0``."""
    whole = (values == np.floor(values)) & (values < 1e15)
    result: Ints = np.where(
        whole, digits(np.where(whole, values, 0).astype(np.int64)) + 2, arrow_lengths(np.where(whole, 0.5, values))
    )
    return result


def _integers(prepared: Prepared, own: bool, shards: int, carried: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    columns = prepared.columns
    size, text = np.zeros(len(columns), np.int64), np.zeros(len(columns), np.int64)
    names = prepared.names()
    shard = prepared.shards(shards)[columns.symbol] if shards > 1 and not own else np.zeros(len(columns), np.int64)
    for number in np.unique(shard).tolist():
        at = (shard == number) & carried
        which = slice(None) if at.all() else np.flatnonzero(at)
        known = names
        if shards > 1 and not own:
            of = dict(zip(columns.symbols, prepared.shards(shards).tolist(), strict=True))
            known = Names([f"s{name}" for name in names.symbols if of[name] == number])
            known.of_exchanges(names.exchanges)
        for column in CODECS["ints"].encode_columns(columns.rows(which), known, own=own):
            values = np.asarray(column, np.int64)
            size[which] += listpack_int(values)
            text[which] += digits(values)
    return size, text
