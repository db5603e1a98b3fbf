"""Write an event table the way its venue sends it: what the readers of this package read."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from liqlab.clock import generator
from liqlab.feeds.contracts import value_of
from liqlab.feeds.rows import FeedError
from liqlab.settings import Settings, load

Array = npt.NDArray[Any]
EXCHANGES: Final = {"binance": "binance", "bybit": "bybit", "okx": "okx", "recorder": "binance"}  # whose format
_CHUNK: Final = 100_000
_PUSH_MS: Final = 500  # Bybit pushes what came together within half a second; OKX batches are written alike


def write_wire(
    events: pd.DataFrame,
    path: str | Path,
    format: str = "binance",
    *,
    settings: Settings | None = None,
) -> int:
    """Write an event table as its venue sends it.

    Prices and sizes are decimal text that reads back as the same float64 (OKX sizes pass through contracts, which may
    cost the last bit). What the table does not have (push time, order price, last fill) is drawn, the same at every
    call. The same table gives the same bytes.

    Parameters
    ----------
    events : pandas.DataFrame
        An event table of linear contracts of one venue.
    path : str or Path
        The file; compressed when it ends in ``.gz`` or ``.zst``.
    format : str
        ``binance``: combined `!forceOrder@arr` frames. ``recorder``: the headerless 12-column CSV of the same stream.
        ``bybit``: `allLiquidation` frames, one per symbol and half second, with the position side. ``okx``:
        `liquidation-orders` frames, sizes in contracts.
    settings : Settings, optional
        Read with `liqlab.settings.load` if not given; `feeds.contract_sizes` counts, for ``okx``.

    Returns
    -------
    int
        The number of lines.

    Raises
    ------
    FeedError
        The format is unknown, an event is of another venue, or the contract size of a symbol is missing.
    """
    if format not in EXCHANGES:
        raise FeedError(f"format {format!r} is unknown; choose one of {', '.join(EXCHANGES)}")
    venue, writer = EXCHANGES[format], _WRITERS[format]
    others = set(events["exchange"].unique()) - {venue}
    if others:
        raise FeedError(f"events of {min(others)!r} cannot be written as {format!r}, which is a format of {venue!r}")
    symbols = events["symbol"].cat.categories
    if format == "okx":
        events = events.assign(size=_contracts(events, (settings or load()).feeds.contract_sizes))
    codes = events["symbol"].cat.codes.to_numpy()
    digits = {name: _digits(events[name].to_numpy(), codes, len(symbols)) for name in ("price", "size")}
    rng = generator(0)
    lines, path = 0, Path(path)
    with ExitStack() as stack:
        if path.suffix == ".gz":
            raw = stack.enter_context(path.open("wb"))
            # Neither name nor time in the header: the same events are the same bytes.
            out: Any = stack.enter_context(gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0))
        elif path.suffix == ".zst":
            out = stack.enter_context(pa.CompressedOutputStream(str(path), "zstd"))
        else:
            out = stack.enter_context(path.open("wb"))
        for at in range(0, len(events), _CHUNK):
            part = events.iloc[at : at + _CHUNK]
            chunk = list(writer(rng, part, *(digits[name][at : at + _CHUNK] for name in digits)))
            out.write("".join(chunk).encode())
            lines += len(chunk)
    return lines


def _contracts(events: pd.DataFrame, sizes: Mapping[str, float]) -> Array:
    values = [value_of("okx", name, None, sizes) for name in events["symbol"].cat.categories]
    codes = events["symbol"].cat.codes.to_numpy()
    for code in np.unique(codes).tolist():
        if values[code].problem:
            raise FeedError(values[code].problem)
    factors = np.array([value.factor for value in values])
    # A quotient of two short decimals is one only after rounding.
    result: Array = np.round(events["size"].to_numpy() / factors[codes], 10)
    return result


def _digits(values: Array, codes: Array, symbols: int) -> Array:
    """Decimals that each value's symbol needs, shape (n,); -1 for a value that no 12 decimals express."""
    digits = np.full(len(values), -1)
    open_rows = np.arange(len(values))
    for decimals in range(13):
        exact = np.rint(values[open_rows] * 10.0**decimals) / 10.0**decimals == values[open_rows]
        digits[open_rows[exact]] = decimals
        open_rows = open_rows[~exact]
    most = np.zeros(symbols, np.int64)
    np.maximum.at(most, codes, digits)
    return np.where(digits < 0, -1, most[codes])


def _texts(values: Array, digits: Array) -> list[str]:
    return [
        f"{value:.{decimals}f}" if decimals >= 0 else np.format_float_positional(value, trim="-")
        for value, decimals in zip(values.tolist(), digits.tolist(), strict=True)
    ]


def _orders(
    rng: np.random.Generator, part: pd.DataFrame, price_digits: Array, size_digits: Array
) -> Iterator[tuple[Any, ...]]:
    """Yield what a Binance order says: symbol, side, size, order price, fill price, last fill, T, E."""
    n = len(part)
    price, size = part["price"].to_numpy(), part["size"].to_numpy()
    sell = part["side"].to_numpy() == "sell"
    away = np.minimum(0.009 * np.exp(0.5 * rng.standard_normal(n)), 0.1)
    tick, lot = (10.0 ** np.where(digits < 0, 12, digits) for digits in (price_digits, size_digits))
    order_price = np.maximum(np.rint(price * np.where(sell, 1 - away, 1 + away) * tick), 1) / tick
    last = np.maximum(np.rint(size * rng.random(n) ** 2 * lot), 1) / lot
    last = np.where(rng.random(n) < 0.46, size, np.minimum(last, size))
    times = part["ts_ms"].to_numpy()
    pushed = np.maximum.accumulate(times + rng.integers(935, 1009, n))
    return zip(
        part["symbol"],
        np.where(sell, "SELL", "BUY").tolist(),
        _texts(size, size_digits),
        _texts(order_price, price_digits),
        _texts(price, price_digits),
        _texts(last, size_digits),
        times.tolist(),
        pushed.tolist(),
        strict=True,
    )


def _binance(rng: np.random.Generator, part: pd.DataFrame, price_digits: Array, size_digits: Array) -> Iterator[str]:
    for name, side, size, order_price, price, last, ts_ms, pushed_ms in _orders(rng, part, price_digits, size_digits):
        yield (
            f'{{"stream":"!forceOrder@arr","data":{{"e":"forceOrder","E":{pushed_ms},"o":{{"s":"{name}","S":"{side}",'
            f'"o":"LIMIT","f":"IOC","q":"{size}","p":"{order_price}","ap":"{price}","X":"FILLED","l":"{last}",'
            f'"z":"{size}","T":{ts_ms},"ps":"{name}","st":1}}}}}}\n'
        )


def _recorder(rng: np.random.Generator, part: pd.DataFrame, price_digits: Array, size_digits: Array) -> Iterator[str]:
    for name, side, size, order_price, price, last, ts_ms, _ in _orders(rng, part, price_digits, size_digits):
        usd = float(order_price) * float(size)
        # The recorders of this format strip USDT and write large sums in millions.
        usd = usd / 1e6 if usd > 1e5 else usd
        yield (
            f"{name.removesuffix('USDT')},{side},LIMIT,IOC,{size},{order_price},{price},FILLED,{last},{size},{ts_ms},{usd}\n"
        )


def _pushes(
    part: pd.DataFrame, price_digits: Array, size_digits: Array
) -> Iterator[tuple[str, int, list[tuple[int, bool, str, str]]]]:
    """Group by half second and symbol: name, end of the half second in ms, [(ms, long?, price, size), ...]."""
    window = part["ts_ms"].to_numpy() // _PUSH_MS
    codes = part["symbol"].cat.codes.to_numpy()
    order = np.lexsort((codes, window))
    window, codes = window[order], codes[order]
    opens = np.flatnonzero((np.diff(window, prepend=-1) != 0) | (np.diff(codes, prepend=-1) != 0))
    rows = list(
        zip(
            part["ts_ms"].to_numpy()[order].tolist(),
            (part["side"].to_numpy() == "sell")[order].tolist(),
            _texts(part["price"].to_numpy()[order], price_digits[order]),
            _texts(part["size"].to_numpy()[order], size_digits[order]),
            strict=True,
        )
    )
    names = part["symbol"].cat.categories
    for first, past in zip(opens.tolist(), [*opens[1:].tolist(), len(rows)], strict=True):
        yield names[codes[first]], (int(window[first]) + 1) * _PUSH_MS, rows[first:past]


def _bybit(_: np.random.Generator, part: pd.DataFrame, price_digits: Array, size_digits: Array) -> Iterator[str]:
    for name, pushed_ms, rows in _pushes(part, price_digits, size_digits):
        data = ",".join(
            # The side is the position's: Buy = a long was liquidated.
            f'{{"T":{ts_ms},"s":"{name}","S":"{"Buy" if long else "Sell"}","v":"{size}","p":"{price}"}}'
            for ts_ms, long, price, size in rows
        )
        yield f'{{"topic":"allLiquidation.{name}","type":"snapshot","ts":{pushed_ms},"data":[{data}]}}\n'


def _okx(_: np.random.Generator, part: pd.DataFrame, price_digits: Array, size_digits: Array) -> Iterator[str]:
    for name, _pushed_ms, rows in _pushes(part, price_digits, size_digits):
        details = ",".join(
            f'{{"bkLoss":"0","bkPx":"{price}","ccy":"","posSide":"{"long" if long else "short"}",'
            f'"side":"{"sell" if long else "buy"}","sz":"{size}","ts":"{ts_ms}"}}'
            for ts_ms, long, price, size in rows
        )
        family = name.removesuffix("-SWAP")
        yield (
            f'{{"arg":{{"channel":"liquidation-orders","instType":"SWAP"}},"data":[{{"details":[{details}],'
            f'"instFamily":"{family}","instId":"{name}","instType":"SWAP","uly":"{family}"}}]}}\n'
        )


_Writer = Callable[[np.random.Generator, pd.DataFrame, Array, Array], Iterator[str]]
_WRITERS: Final[dict[str, _Writer]] = {"binance": _binance, "bybit": _bybit, "okx": _okx, "recorder": _recorder}
