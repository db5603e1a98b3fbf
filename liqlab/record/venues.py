"""Where each venue publishes its liquidations, what it wants to be told, and how it says that it is alive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from liqlab import clock

_ARGS: Final = 200  # topics in one request; Bybit takes 21,000 characters, Binance 1,024 streams a connection


@dataclass(frozen=True)
class Venue:
    """One venue's public websocket.

    Attributes
    ----------
    name : str
        As in `liqlab.read_feed`.
    url : str
        The address.
    subscribe : callable
        Symbols, none for all -> the messages to send, in order.
    chooses : bool
        Whether symbols can be chosen; else the channel carries them all.
    symbols : tuple of str
        What is subscribed to by default; empty where the venue has a channel for all.
    heartbeat : callable or None
        Makes the message that the venue answers, so that silence means a dead connection.
    answer : callable or None
        Message -> what the venue wants to be sent in return, or None.
    silence_s : float
        Seconds without any frame after which the connection is taken for dead.
    """

    name: str
    url: str
    subscribe: Callable[[Sequence[str]], list[str]]
    chooses: bool = True
    symbols: tuple[str, ...] = ()
    heartbeat: Callable[[], str] | None = None
    answer: Callable[[Any], str | None] | None = None
    silence_s: float = 60.0


def _json(**message: Any) -> str:
    return orjson.dumps(message).decode()


def _parts(topics: Iterable[str]) -> list[list[str]]:
    names = list(topics)
    return [names[at : at + _ARGS] for at in range(0, len(names), _ARGS)]


def _binance(symbols: Sequence[str]) -> list[str]:
    streams = [f"{symbol.lower()}@forceOrder" for symbol in symbols] or ["!forceOrder@arr"]
    return [_json(method="SUBSCRIBE", params=part, id=at) for at, part in enumerate(_parts(streams), 1)]


def _bybit(symbols: Sequence[str]) -> list[str]:
    return [_json(op="subscribe", args=part) for part in _parts(f"allLiquidation.{symbol}" for symbol in symbols)]


def _okx(_: Sequence[str]) -> list[str]:
    channels = [{"channel": "liquidation-orders", "instType": kind} for kind in ("SWAP", "FUTURES")]
    return [_json(op="subscribe", args=channels)]


def _bitmex(symbols: Sequence[str]) -> list[str]:
    tables = [f"liquidation:{symbol}" for symbol in symbols] or ["liquidation"]
    return [_json(op="subscribe", args=tables)]


def _deribit(symbols: Sequence[str]) -> list[str]:
    # `raw` is for users who log in; perpetuals are futures here.
    channels = [f"trades.{symbol}.100ms" for symbol in symbols] or ["trades.future.any.100ms"]
    return [_json(jsonrpc="2.0", id=1, method="public/subscribe", params={"channels": channels})]


def _gate(symbols: Sequence[str]) -> list[str]:
    asked = {"event": "subscribe", "payload": list(symbols) or ["!all"]}
    return [_json(time=clock.now_ms() // 1000, channel="futures.public_liquidates", **asked)]


def _htx(symbols: Sequence[str]) -> list[str]:
    # A topic of one contract besides the one of all is refused.
    return [
        _json(op="sub", cid=str(at), topic=f"public.{symbol}.liquidation_orders")
        for at, symbol in enumerate(symbols or ["*"], 1)
    ]


def _htx_pong(message: Any) -> str | None:
    if isinstance(message, dict) and message.get("op") == "ping":
        return _json(op="pong", ts=message.get("ts"))
    return None


def _kraken(symbols: Sequence[str]) -> list[str]:
    # Its heartbeat is a feed of its own.
    return [
        _json(event="subscribe", feed="trade", product_ids=list(symbols)),
        _json(event="subscribe", feed="heartbeat"),
    ]


VENUES: Final = {
    venue.name: venue
    for venue in (
        Venue(
            # The root without /market still takes the subscription, and sends nothing.
            "binance",
            "wss://fstream.binance.com/market/stream",
            _binance,
            heartbeat=lambda: _json(method="LIST_SUBSCRIPTIONS", id=0),
        ),
        Venue(
            "bybit",
            "wss://stream.bybit.com/v5/public/linear",
            _bybit,
            symbols=("BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT", "DOGEUSDT", "BNBUSDT", "ADAUSDT", "LINKUSDT"),
            heartbeat=lambda: _json(op="ping"),
        ),
        Venue("okx", "wss://ws.okx.com:8443/ws/v5/public", _okx, chooses=False, heartbeat=lambda: "ping"),
        Venue("bitmex", "wss://ws.bitmex.com/realtime", _bitmex, heartbeat=lambda: "ping"),
        Venue(
            "deribit",
            "wss://www.deribit.com/ws/api/v2",
            _deribit,
            heartbeat=lambda: _json(jsonrpc="2.0", id=0, method="public/test", params={}),
        ),
        Venue(
            "gate",
            "wss://fx-ws.gateio.ws/v4/ws/usdt",
            _gate,
            heartbeat=lambda: _json(time=clock.now_ms() // 1000, channel="futures.ping"),
        ),
        Venue("htx", "wss://api.hbdm.com/linear-swap-notification", _htx, answer=_htx_pong),
        Venue(
            "bitfinex",
            "wss://api-pub.bitfinex.com/ws/2",
            lambda _: [_json(event="subscribe", channel="status", key="liq:global")],
            chooses=False,
            heartbeat=lambda: _json(event="ping"),
        ),
        Venue(
            "kraken",
            "wss://futures.kraken.com/ws/v1",
            _kraken,
            symbols=("PF_XBTUSD", "PF_ETHUSD", "PF_SOLUSD", "PF_XRPUSD", "PI_XBTUSD", "PI_ETHUSD"),
        ),
        Venue(
            "dydx",
            "wss://indexer.dydx.trade/v4/ws",
            lambda symbols: [_json(type="subscribe", channel="v4_trades", id=symbol) for symbol in symbols],
            symbols=("BTC-USD", "ETH-USD", "SOL-USD", "XRP-USD", "DOGE-USD"),
            silence_s=600.0,  # it answers no message of ours, and a quiet market trades rarely
        ),
        Venue(
            "bitget",
            "wss://ws.bitget.com/v3/ws/public",
            lambda _: [_json(op="subscribe", args=[{"instType": "usdt-futures", "topic": "liquidation"}])],
            chooses=False,
            heartbeat=lambda: "ping",
        ),
    )
}


def refusal(message: Any) -> bool:
    """Return whether a venue says that it did not do what was asked: a wrong symbol would else be mere silence."""
    return isinstance(message, dict) and (
        message.get("success") is False
        or message.get("event") == "error"
        or message.get("type") == "error"
        or bool(message.get("error"))
        or message.get("err-code", 0) not in (0, "0")
    )
