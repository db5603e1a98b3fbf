"""Events as bytes, before any server has them: how long they are and how long they take to parse."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgpack
import numpy as np
import pandas as pd

from liqlab import clock
from liqlab.claims.verdicts import Bench, Figure
from liqlab.codecs import CODECS, Names
from liqlab.events import SIDES, Columns

PACKED: Final = struct.Struct("!4sBfffH")  # the document's own format
_MOST: Final = 20_000  # events whose bytes are looked at
_PARSED: Final = 2_000
_ROUNDS: Final = 5
_BATCH: Final = 100
_SMALL: Final = 11  # the smallest batch that the document compresses
_MS: Final = 1_000


def payloads(events: pd.DataFrame, codec: str) -> list[bytes]:
    """Return the first value of each row of a codec."""
    rows = CODECS[codec].encode(Columns.of(events), Names())
    return [value.encode() if isinstance(value, str) else value for value, *_ in rows]


def mean(values: Sequence[bytes | str]) -> float:
    """Return the mean length."""
    return float(np.mean([len(value) for value in values]))


async def lengths(bench: Bench) -> Mapping[str, Figure]:
    """Measure the parts of an event as JSON, and its whole in each form."""
    events = bench.events.head(_MOST)
    parts = {name: mean(events[name].astype(str).tolist()) for name in ("symbol", "side", "exchange")}
    parts |= {name: mean(events[name].map(str).tolist()) for name in ("price", "size")}
    whole = {codec: mean(payloads(events, codec)) for codec in ("json", "msgpack", "struct19")}
    time = mean((events["ts_ms"] // _MS).astype(str).tolist())
    written = sum(parts.values()) + mean(events["ts_ms"].astype(str).tolist())
    return {
        **parts,
        **whole,
        "timestamp": time,
        "overhead": whole["json"] - written,
        "packed": float(PACKED.size),
        "msgpack_less": 100 * (1 - whole["msgpack"] / whole["json"]),
        "packed_less": 100 * (1 - PACKED.size / whole["json"]),
    }


async def widths(bench: Bench) -> Mapping[str, Figure]:
    """Measure how many bytes the parts of the document's binary form need, to come back as they were."""
    events = bench.events
    symbols = [str(symbol) for symbol in events["symbol"].unique()]
    longest = max(map(len, symbols))
    apart = next(n for n in range(1, longest + 1) if len({symbol[:n] for symbol in symbols}) == len(symbols))
    seconds = (events["ts_ms"] // _MS).to_numpy(np.float64)
    exchanges = events["exchange"].nunique()
    return {
        "symbol": float(apart),
        "side": float(_integer(len(SIDES))),
        "exchange": float(_integer(exchanges)),
        "timestamp": float(_float(seconds)),
        "size": float(_float(events["size"].to_numpy())),
        "price": float(_float(events["price"].to_numpy())),
    }


def _integer(count: int) -> int:
    return next(width for width in (1, 2, 4, 8) if count <= 256**width)


def _float(values: np.ndarray[Any, np.dtype[np.float64]]) -> int:
    return next(width for width in (4, 8) if (values.astype(f"f{width}").astype(np.float64) == values).all())


async def batches(bench: Bench) -> Mapping[str, Figure]:
    """Measure batches of the document's `batch_compress`, which is the codec msgpack-zlib."""
    events = bench.events.head(_MOST // _BATCH * _BATCH)
    parts = [events.iloc[at : at + _BATCH] for at in range(0, len(events) - _BATCH + 1, _BATCH)] or [events]
    plain = float(np.mean([sum(map(len, payloads(part, "json"))) for part in parts]))
    small = float(np.mean([len(payloads(part, "msgpack-zlib")[0]) for part in parts]))
    few = [part.head(_SMALL) for part in parts]
    eleven = [1 - len(payloads(part, "msgpack-zlib")[0]) / sum(map(len, payloads(part, "msgpack"))) for part in few]
    return {"json": plain, "small": small, "less": 100 * (1 - small / plain), "eleven": 100 * float(np.mean(eleven))}


async def parsed(bench: Bench) -> Mapping[str, Figure]:
    """Time the parsing of single events, us, the best of some rounds."""
    events = bench.events.head(_PARSED)
    columns = Columns.of(events)
    rows = zip(columns.symbol, columns.side, columns.size, columns.price, columns.ts_ms, columns.exchange, strict=True)
    packed = [
        PACKED.pack(columns.symbols[symbol][:4].encode(), side, size, price, float(ms // _MS), exchange)
        for symbol, side, size, price, ms, exchange in rows
    ]
    took = {
        "json": _best_us(json.loads, payloads(events, "json")),
        "msgpack": _best_us(msgpack.unpackb, payloads(events, "msgpack")),
        "struct": _best_us(PACKED.unpack, packed),
    }
    ratios = {f"json_by_{name}": took["json"] / took[name] for name in ("msgpack", "struct")}
    return {**took, **ratios}


def _best_us(parse: Callable[[bytes], Any], values: list[bytes]) -> float:
    best = float("inf")
    for _ in range(_ROUNDS):
        began = clock.elapsed_s()
        for value in values:
            parse(value)
        best = min(best, clock.elapsed_s() - began)
    return 1e6 * best / len(values)
