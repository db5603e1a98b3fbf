"""The messages of each venue: which are liquidations, and what their fields mean.

Sides are turned into the side of the order. Where a venue sends the position (Bybit, Bitget, Gate and Bitfinex by the
sign of a size) that is the opposite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from liqlab.feeds.contracts import UNKNOWN, exchange_name
from liqlab.feeds.rows import (
    BUY,
    NO_SIDE,
    NO_TIME,
    SELL,
    Event,
    IgnoredError,
    RejectedError,
    first,
    number,
    order_side,
    position_side,
    to_ms,
)

Message = Any
NOT_LIQUIDATION: Final = "trade that is not a liquidation"
POSITION_SIDE: Final = frozenset({"bybit", "bitget"})  # venues whose own `side` is the position's


@dataclass(frozen=True)
class Frame:
    """Where a message came from, beside its content."""

    receipt_ms: int = NO_TIME
    exchange: str | None = None


def text(value: Any) -> str:
    """Return a JSON value as text: null and the ``None`` of a Python recorder are empty, numbers are spelt out."""
    if isinstance(value, str):
        return "" if value == "None" else value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def listed(value: Any) -> list[Any]:
    """Return a value as a list: an object alone is a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _pick(entry: dict[str, Any], *names: str) -> Any:
    for name in names:
        value = entry.get(name)
        if value is not None and value != "":
            return value
    return None


def binance(order: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """Binance and Aster `forceOrder`: order side; base units, contracts for COIN-M."""
    yield Event(
        exchange=frame.exchange or "binance",
        symbol=text(order.get("s")),
        side=order_side(order.get("S")),
        ts_ms=to_ms(order.get("T")),
        price=first(number(order.get("ap")), number(order.get("p"))),
        quantity=first(number(order.get("z")), number(order.get("q"))),
        unit="contracts" if order.get("st") == 2 else None,
    )


def binance_rest(order: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """Binance REST `allForceOrders` and `forceOrders`."""
    yield Event(
        exchange=frame.exchange or "binance",
        symbol=text(order.get("symbol")),
        side=order_side(order.get("side")),
        ts_ms=to_ms(order.get("time")),
        price=first(number(_pick(order, "averagePrice", "avgPrice")), number(order.get("price"))),
        quantity=first(number(order.get("executedQty")), number(order.get("origQty"))),
        unit=None,
        ident=text(order.get("orderId")),
    )


def bybit(entry: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """Bybit, all versions: position side; base units, USD for inverse contracts."""
    yield Event(
        exchange="bybit",
        symbol=text(_pick(entry, "symbol", "s")),
        side=position_side(_pick(entry, "side", "S")),
        ts_ms=to_ms(_pick(entry, "T", "updatedTime", "time")),
        price=number(_pick(entry, "price", "p")),
        quantity=number(_pick(entry, "size", "v", "qty")),
        unit=None,
        ident=text(entry.get("id")),
    )


def okx_entries(message: Message) -> Iterator[Any]:
    """Split an OKX message: one entry a detail, with what it shares with its neighbours."""
    for item in listed(message.get("data")):
        for detail in listed(item.get("details", item)):
            yield item | detail | {"arg": message.get("arg")}


def okx(entry: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """OKX `liquidation-orders`: order side; contracts, base units for margin."""
    arg = entry.get("arg") or {}
    kind = _pick(entry, "instType") or arg.get("instType")
    symbol = text(_pick(entry, "instId") or arg.get("instId"))
    if not symbol and kind == "SWAP":
        symbol = f"{text(_pick(entry, 'uly', 'instFamily'))}-SWAP"
    if kind == "OPTION":
        raise RejectedError(f"options are not valued: okx:{symbol}")
    side = order_side(entry.get("side"))
    yield Event(
        exchange="okx",
        symbol=symbol,
        side=position_side(entry.get("posSide")) if side == NO_SIDE else side,
        ts_ms=to_ms(_pick(entry, "ts", "time")),
        price=number(entry.get("bkPx")),
        quantity=number(entry.get("sz")),
        unit={"MARGIN": "base", "SWAP": "contracts", "FUTURES": "contracts"}.get(str(kind)),
    )


def bitmex_entries(message: Message) -> list[Any]:
    """Split a BitMEX message: only inserts are events, the rest is the state of an open order."""
    action = message.get("action")
    if action != "insert":
        raise IgnoredError(f"bitmex {action}: a state, not an event")
    return listed(message.get("data"))


def bitmex(entry: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """BitMEX `liquidation`: order side; contracts; the time is that of receipt."""
    if frame.receipt_ms == NO_TIME:
        raise RejectedError(
            "bitmex sends no time; record the time of receipt beside each message, as in `1731494066.741: {...}`"
        )
    yield Event(
        exchange="bitmex",
        symbol=text(entry.get("symbol")),
        side=order_side(entry.get("side")),
        ts_ms=frame.receipt_ms,
        price=number(entry.get("price")),
        quantity=number(entry.get("leavesQty")),
        unit=None,
        ident=text(entry.get("orderID")),
    )


def deribit_entries(message: Message) -> list[Any]:
    """Split a Deribit message, from the channel or from REST."""
    holder = message.get("params") or {"data": message.get("result")}
    data = holder.get("data")
    return listed(data.get("trades")) if isinstance(data, dict) and "trades" in data else listed(data)


def deribit(trade: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """Deribit trades with a liquidation flag: the taker's direction, and who was liquidated."""
    flag = trade.get("liquidation")
    if flag in (None, "none"):
        raise IgnoredError(NOT_LIQUIDATION)
    if flag not in ("T", "M", "MT"):
        raise RejectedError("deribit: the liquidation flag is none of T, M and MT")
    taker = order_side(trade.get("direction"))
    maker = NO_SIDE if taker == NO_SIDE else 1 - taker
    for side in {"T": (taker,), "M": (maker,), "MT": (taker, maker)}[flag]:
        yield Event(
            exchange="deribit",
            symbol=text(trade.get("instrument_name")),
            side=side,
            ts_ms=to_ms(trade.get("timestamp")),
            price=number(trade.get("price")),
            quantity=number(trade.get("amount")),
            unit=None,
            ident=text(trade.get("trade_id")),
        )


def gate(entry: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """Gate `liquidates` and REST `liq_orders`: the sign of the position; contracts; REST times are seconds."""
    size = number(entry.get("size"))  # of the position: above 0 a long
    yield Event(
        exchange="gate",
        symbol=text(entry.get("contract")),
        side=SELL if size > 0 else BUY if size < 0 else NO_SIDE,
        ts_ms=to_ms(_pick(entry, "time_ms", "time")),
        price=first(*(number(entry.get(name)) for name in ("fill_price", "price", "order_price"))),
        quantity=abs(size),
        unit=None,
        ident=text(entry.get("order_id")),
    )


def htx_entries(message: Message) -> list[Any]:
    """Split an HTX message, from the channel or from REST."""
    data = message.get("data", message)
    return listed(data.get("orders", data) if isinstance(data, dict) else data)


def htx(entry: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """HTX `liquidation_orders`: order side; `amount` in coins where it is sent, else `volume` in contracts."""
    coins = number(entry.get("amount"))
    yield Event(
        exchange="htx",
        symbol=text(_pick(entry, "contract_code", "symbol")),
        side=order_side(_pick(entry, "direction", "side")),
        ts_ms=to_ms(_pick(entry, "created_at", "liquidation_time")),
        price=number(_pick(entry, "price", "bankrupt_price")),
        quantity=coins if coins > 0 else number(entry.get("volume")),
        unit="base" if coins > 0 else "contracts",
        ident=text(_pick(entry, "query_id", "id")),
    )


def bitfinex_matches(message: Message) -> bool:
    """Return whether a message holds liquidations of Bitfinex."""
    return isinstance(message, list) and len(message) > 0 and next(bitfinex_entries(message), None) is not None


def bitfinex_entries(message: Message, depth: int = 0) -> Iterator[Any]:
    """Find the entries of a Bitfinex message, however deep REST or a channel wrap them."""
    if isinstance(message, list) and message and depth < 4:
        if message[0] == "pos":
            yield message
        else:
            for item in message:
                yield from bitfinex_entries(item, depth + 1)


def bitfinex(entry: list[Any], frame: Frame) -> Iterator[Event]:
    """Bitfinex `liq:global`: the sign of the position; base units."""
    if len(entry) < 9:
        raise RejectedError("bitfinex: an entry needs at least 9 fields")
    if entry[8] == 1:
        raise IgnoredError("bitfinex match: a part of an earlier liquidation")
    amount = number(entry[5])
    acquired = number(entry[11]) if len(entry) > 11 else number(None)
    yield Event(
        exchange="bitfinex",
        symbol=text(entry[4]),
        side=SELL if amount > 0 else BUY if amount < 0 else NO_SIDE,
        ts_ms=to_ms(entry[2]),
        price=first(acquired, number(entry[6])),
        quantity=abs(amount),
        unit=None,
        ident=text(entry[1]),
    )


def kraken(trade: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """Kraken Futures trades of type liquidation: order side; USD for PI_, base units for PF_."""
    if trade.get("type") != "liquidation":
        raise IgnoredError(NOT_LIQUIDATION)
    yield Event(
        exchange="kraken",
        symbol=text(trade.get("product_id")),
        side=order_side(trade.get("side")),
        ts_ms=to_ms(trade.get("time")),
        price=number(trade.get("price")),
        quantity=number(trade.get("qty")),
        unit=None,
        ident=text(trade.get("uid")),
    )


def dydx_entries(message: Message) -> Iterator[Any]:
    """Split a dYdX message, single or batched."""
    for contents in listed(message.get("contents", message)):
        for trade in listed(contents.get("trades")):
            yield trade | {"market": message.get("id")}


def dydx(trade: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """Read dYdX v4 trades of type LIQUIDATED: order side; base units."""
    if trade.get("type") != "LIQUIDATED":
        raise IgnoredError(NOT_LIQUIDATION)
    yield Event(
        exchange="dydx",
        symbol=text(trade.get("market")),
        side=order_side(trade.get("side")),
        ts_ms=to_ms(trade.get("createdAt")),
        price=number(trade.get("price")),
        quantity=number(trade.get("size")),
        unit=None,
        ident=text(trade.get("id")),
    )


def bitget(entry: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """Bitget `liquidation`: position side; the amount is price x quantity."""
    yield Event(
        exchange="bitget",
        symbol=text(_pick(entry, "symbol", "instId")),
        side=position_side(entry.get("side")),
        ts_ms=to_ms(entry.get("ts")),
        price=number(entry.get("price")),
        quantity=number(entry.get("amount")),
        unit=None,
    )


def hyperliquid_entries(message: Message) -> Iterator[Any]:
    """Split a Hyperliquid message of fills; each fill carries its user."""
    data = message["data"]
    for fill in listed(data.get("fills")):
        yield fill | {"user": data.get("user")}


def hyperliquid(fill: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """Hyperliquid fills with a liquidation, the liquidated user's only: A sells, B buys; base units."""
    liquidation = fill.get("liquidation")
    if not liquidation:
        raise IgnoredError(NOT_LIQUIDATION)
    if str(liquidation.get("liquidatedUser")).lower() != str(fill.get("user")).lower():
        raise IgnoredError("hyperliquid: the other side of a liquidation")
    yield Event(
        exchange="hyperliquid",
        symbol=text(fill.get("coin")),
        side={"A": SELL, "B": BUY}.get(str(fill.get("side")), NO_SIDE),
        ts_ms=to_ms(fill.get("time")),
        price=number(fill.get("px")),
        quantity=number(fill.get("sz")),
        unit=None,
        ident=text(fill.get("tid")),
    )


def cryptofeed(entry: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """Read cryptofeed's own object: float seconds; a venue's side and units are handed on as they came."""
    exchange = exchange_name(text(entry.get("exchange")))
    # cryptofeed hands a venue's side on as it came.
    side = position_side if exchange in POSITION_SIDE else order_side
    ts_ms = to_ms(_pick(entry, "timestamp"))
    yield Event(
        exchange=exchange,
        symbol=text(entry.get("symbol")),
        side=side(entry.get("side")),
        ts_ms=to_ms(entry.get("receipt_timestamp")) if ts_ms == NO_TIME else ts_ms,
        price=number(entry.get("price")),
        quantity=number(entry.get("quantity")),
        unit=None,
        ident=text(entry.get("id")),
    )


def tardis(entry: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """Read a normalized message of tardis-node: order side, the venue's own units."""
    yield Event(
        exchange=exchange_name(text(entry.get("exchange"))),
        symbol=text(entry.get("symbol")),
        side=order_side(entry.get("side")),
        ts_ms=to_ms(entry.get("timestamp")),
        price=number(entry.get("price")),
        quantity=number(entry.get("amount")),
        unit=None,
        ident=text(entry.get("id")),
    )


def ccxt(entry: dict[str, Any], frame: Frame) -> Iterator[Event]:
    """CCXT's unified liquidation: the venue's own side; contracts with their size."""
    exchange = frame.exchange or UNKNOWN
    symbol = text(entry.get("symbol"))
    pair, _, settle = symbol.partition(":")
    coins = number(entry.get("baseValue"))
    contracts = number(entry.get("contracts")) * number(entry.get("contractSize"))
    inverse = settle.partition("-")[0] == pair.partition("/")[0]
    yield Event(
        exchange=exchange,
        symbol=symbol,
        side=(position_side if exchange in POSITION_SIDE else order_side)(entry.get("side")),
        ts_ms=to_ms(entry.get("timestamp")),
        price=number(entry.get("price")),
        quantity=first(contracts, coins),
        unit="usd" if inverse and contracts > 0 else "base",
    )
