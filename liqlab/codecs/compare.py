"""The codecs side by side on events of one's own: bytes and microseconds an event."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from liqlab import clock
from liqlab.codecs import CODECS, Names
from liqlab.events import Columns, check

_PART: Final = 2_000  # events encoded at a time: about a sealed block
_ROUNDS: Final = 3


def compare(events: pd.DataFrame) -> pd.DataFrame:
    """Encode and decode an event table with every codec.

    Parameters
    ----------
    events : pandas.DataFrame
        An event table, not empty.

    Returns
    -------
    pandas.DataFrame
        Index: the codecs' names. Columns: ``bytes`` of an event's values (what Redis adds is not among them),
        ``encode_us`` and ``decode_us`` an event (the best of three rounds), ``carried_pct`` of the events that come
        back with price and size bit for bit, ``block`` (whether many events become one value).
    """
    columns = Columns.of(check(events))
    rows = {}
    for name, codec in CODECS.items():
        carried = codec.carries(columns)
        kept = columns.rows(np.flatnonzero(carried))
        parts = [kept.rows(slice(at, at + _PART)) for at in range(0, len(kept), _PART)]
        best_encode = best_decode = float("inf")
        size = 0
        for _ in range(_ROUNDS):
            names, began = Names(), clock.elapsed_s()
            encoded = [codec.encode(part, names) for part in parts]
            best_encode = min(best_encode, clock.elapsed_s() - began)
            stored = [[[_bytes(value) for value in row] for row in part] for part in encoded]
            began = clock.elapsed_s()
            for part, values in zip(parts, stored, strict=True):
                codec.decode(part.ts_ms[: len(values)], values, names)
            best_decode = min(best_decode, clock.elapsed_s() - began)
            size = sum(len(value) for part in stored for row in part for value in row)
        each = max(len(kept), 1)
        rows[name] = {
            "bytes": size / each,
            "encode_us": best_encode / each * 1e6,
            "decode_us": best_decode / each * 1e6,
            "carried_pct": 100 * float(carried.mean()),
            "block": codec.block,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("codec")


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
