"""One message of a recording -> events: unwraps it, finds its format, and tells events from everything else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import orjson

from liqlab.feeds import venues
from liqlab.feeds.rows import NO_TIME, Event, IgnoredError, RejectedError, to_ms
from liqlab.feeds.venues import Frame, Message, listed

Outcome = Event | RejectedError | IgnoredError
# `1731494066.741: {...}`, `[2024-11-13 10:34:26] {...}` and cryptofeed's `wss://host <- 1731494066.741: {...}`
PREFIX: Final = re.compile(r"^(?:\S+ (?:->|<-) )?\[?(\d[\dT:.,+\-Z ]{8,38}?)\]?[\s,:;|]+(?=[\[{])")
_RECEIPTS: Final = (
    "receipt_timestamp",
    "receipt_time",
    "received_at",
    "received",
    "receive_time",
    "recv_time",
    "recv_ts",
    "local_timestamp",
    "localTimestamp",
    "local_time",
    "timestamp",
    "time",
    "ts",
    "t",
)
_PAYLOADS: Final = ("message", "msg", "raw", "payload", "frame", "data", "body")
_CONTROL_KEYS: Final = frozenset(
    {
        "success",
        "subscribe",
        "op",
        "event",
        "ping",
        "pong",
        "ret_msg",
        "retMsg",
        "subbed",
        "id",
        "code",
        "info",
        "alert",
    }
)
_CONTROL_METHODS: Final = ("subscribe", "unsubscribe", "heartbeat", "ping", "pong", "public/test")
_CONTROL_TYPES: Final = ("connected", "subscribed", "unsubscribed", "heartbeat", "ping", "pong", "error")
CONTROL: Final = "acknowledgement or heartbeat"
EMPTY: Final = "empty frame"
_MAX_DEPTH: Final = 6


@dataclass(frozen=True)
class Venue:
    """How one format is told apart, split into entries, and read.

    Attributes
    ----------
    name : str
        What `format=` and reports call it.
    matches : callable
        Whether a message is of this format.
    entries : callable
        Message -> its entries; an entry is whatever `read` takes.
    read : callable
        (entry, frame) -> events. Raises RejectedError or IgnoredError.
    """

    name: str
    matches: Callable[[Message], bool]
    entries: Callable[[Message], Iterable[Any]]
    read: Callable[[Any, Frame], Iterable[Event]]


def _is(message: Message, *names: str) -> bool:
    return isinstance(message, dict) and all(name in message for name in names)


def _starts(message: Message, name: str, *prefixes: str) -> bool:
    return isinstance(message, dict) and isinstance(message.get(name), str) and message[name].startswith(prefixes)


def _of(message: Message, name: str) -> dict[str, Any]:
    inner = message.get(name) if isinstance(message, dict) else None
    return inner if isinstance(inner, dict) else {}


VENUES: Final = (
    Venue("binance", lambda m: _is(m, "e", "o") and m["e"] == "forceOrder", lambda m: listed(m["o"]), venues.binance),
    Venue("binance-rest", lambda m: _is(m, "symbol", "origQty", "side", "time"), lambda m: [m], venues.binance_rest),
    Venue(
        "bybit",
        lambda m: _starts(m, "topic", "allLiquidation.", "liquidation.") or _is(m, "t", "d"),
        lambda m: listed(m.get("data", m.get("d"))),
        venues.bybit,
    ),
    Venue(
        "okx",
        lambda m: (
            _is(m, "data")
            and (
                _of(m, "arg").get("channel") in ("liquidation-orders", "liquidations")
                or (isinstance(m["data"], list) and _is(next(iter(m["data"]), None), "details"))
            )
        ),
        venues.okx_entries,
        venues.okx,
    ),
    Venue(
        "bitmex",
        lambda m: _is(m, "table", "action") and m["table"] == "liquidation",
        venues.bitmex_entries,
        venues.bitmex,
    ),
    Venue(
        "deribit",
        lambda m: _starts(_of(m, "params"), "channel", "trades.") or "trades" in _of(m, "result"),
        venues.deribit_entries,
        venues.deribit,
    ),
    Venue(
        "gate",
        lambda m: (
            _is(m, "channel", "result")
            and m["channel"] in ("futures.public_liquidates", "futures.liquidates")
            and m.get("event") in ("update", "all")
        ),
        lambda m: listed(m["result"]),
        venues.gate,
    ),
    Venue(
        "gate",
        lambda m: _is(m, "contract", "size", "time") and ("fill_price" in m or "order_price" in m),
        lambda m: [m],
        venues.gate,
    ),
    Venue(
        "htx",
        lambda m: (
            (_is(m, "topic", "data") and str(m["topic"]).endswith(".liquidation_orders"))
            or _is(m, "contract_code", "direction", "created_at")
            or _is(m, "contract_code", "liquidation_time")
        ),
        venues.htx_entries,
        venues.htx,
    ),
    Venue("bitfinex", venues.bitfinex_matches, venues.bitfinex_entries, venues.bitfinex),
    Venue(
        "kraken",
        lambda m: (
            _is(m, "feed", "product_id")
            and m["feed"] in ("trade", "trade_snapshot")
            and ("trades" in m or "price" in m)
        ),
        lambda m: [trade | {"product_id": m["product_id"]} for trade in listed(m.get("trades", m))],
        venues.kraken,
    ),
    Venue(
        "dydx",
        lambda m: (_is(m, "contents") and m.get("channel") == "v4_trades") or (_is(m, "trades") and len(m) == 1),
        venues.dydx_entries,
        venues.dydx,
    ),
    Venue(
        "bitget",
        lambda m: _is(m, "data") and "liquidation" in (_of(m, "arg").get("topic"), _of(m, "arg").get("channel")),
        lambda m: listed(m["data"]),
        venues.bitget,
    ),
    Venue("hyperliquid", lambda m: "fills" in _of(m, "data"), venues.hyperliquid_entries, venues.hyperliquid),
    Venue("ccxt", lambda m: _is(m, "info", "symbol", "timestamp", "price", "contracts"), lambda m: [m], venues.ccxt),
    Venue(
        "tardis",
        lambda m: _is(m, "exchange", "symbol", "price", "amount", "localTimestamp") and m.get("type") == "liquidation",
        lambda m: [m],
        venues.tardis,
    ),
    Venue(
        "cryptofeed",
        lambda m: _is(m, "exchange", "symbol", "side", "quantity", "price", "timestamp"),
        lambda m: [m],
        venues.cryptofeed,
    ),
)


class Messages:
    """Reads messages; remembers the format of the last one, because the next is probably of the same."""

    def __init__(self, exchange: str | None, symbol: str | None) -> None:
        self._exchange = exchange
        self._symbol = symbol
        self._last = VENUES[0]

    def read(self, message: Message, receipt_ms: int = NO_TIME) -> tuple[str | None, list[Outcome]]:
        """Return the format of `message` and what is in it.

        The format is None and the list empty for what no venue sends; it may still be a row of a table.
        """
        name, outcomes = self._read(message, receipt_ms, 0)
        if len(outcomes) > 1:
            outcomes = _numbered(outcomes)
        return name, outcomes

    def _read(self, message: Message, receipt_ms: int, depth: int) -> tuple[str | None, list[Outcome]]:
        venue = self._venue(message)
        if venue is not None:
            return venue.name, self._entries(venue, message, receipt_ms)
        if depth < _MAX_DEPTH:
            inner, receipt_ms = _unwrap(message, receipt_ms)
            if inner is not None:
                name, outcomes = self._read(inner, receipt_ms, depth + 1)
                if name is not None:
                    return name, outcomes
            elif isinstance(message, list) and message and isinstance(message[0], dict | list):
                return self._array(message, receipt_ms, depth)
        reason = _not_an_event(message)
        return ("control", [IgnoredError(reason)]) if reason else (None, [])

    def _array(self, messages: list[Any], receipt_ms: int, depth: int) -> tuple[str | None, list[Outcome]]:
        found: str | None = None
        outcomes: list[Outcome] = []
        for message in messages:
            name, inside = self._read(message, receipt_ms, depth + 1)
            found = found or name
            outcomes += inside or [RejectedError(UNKNOWN_MESSAGE)]
        return (found, outcomes) if found else (None, [])

    def _venue(self, message: Message) -> Venue | None:
        if self._last.matches(message):
            return self._last
        for venue in VENUES:
            if venue.matches(message):
                self._last = venue
                return venue
        return None

    def _entries(self, venue: Venue, message: Message, receipt_ms: int) -> list[Outcome]:
        frame = Frame(receipt_ms, self._exchange)
        outcomes: list[Outcome] = []
        try:
            for entry in venue.entries(message):
                outcomes += self._entry(venue, entry, frame)
        except IgnoredError as error:
            outcomes.append(error)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
            outcomes.append(RejectedError(f"{venue.name}: the message is not built as the venue builds it"))
        return outcomes or [IgnoredError(EMPTY)]

    def _entry(self, venue: Venue, entry: Any, frame: Frame) -> list[Outcome]:
        try:
            events = list(venue.read(entry, frame))
        except (RejectedError, IgnoredError) as error:
            return [error]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
            return [RejectedError(f"{venue.name}: the entry is not built as the venue builds it")]
        if self._symbol is not None:
            events = [event if event.symbol else event._replace(symbol=self._symbol) for event in events]
        return [*events]


UNKNOWN_MESSAGE: Final = "not a liquidation message of any known venue"


def _numbered(outcomes: list[Outcome]) -> list[Outcome]:
    # Equal entries of one frame are different events where the venue gives no ids.
    counts: dict[Event, int] = {}
    numbered: list[Outcome] = []
    for outcome in outcomes:
        if isinstance(outcome, Event) and not outcome.ident:
            count = counts.get(outcome, 0)
            counts[outcome] = count + 1
            outcome = outcome._replace(occurrence=count) if count else outcome
        numbered.append(outcome)
    return numbered


def _unwrap(message: Message, receipt_ms: int) -> tuple[Message | None, int]:
    if not isinstance(message, dict):
        return None, receipt_ms
    if "stream" in message and isinstance(message.get("data"), dict | list):
        return message["data"], receipt_ms
    payload = next((message[name] for name in _PAYLOADS if isinstance(message.get(name), dict | list | str)), None)
    if isinstance(payload, str):
        if not payload.startswith(("{", "[")):
            return None, receipt_ms
        try:
            payload = orjson.loads(payload)
        except orjson.JSONDecodeError:
            return None, receipt_ms
    if payload is None:
        return None, receipt_ms
    times = (to_ms(message[name]) for name in _RECEIPTS if name in message)
    found = next((time for time in times if time != NO_TIME), NO_TIME)
    return (payload, found) if found != NO_TIME else (None, receipt_ms)


def _not_an_event(message: Message) -> str:
    if isinstance(message, list):
        return CONTROL if len(message) == 2 and message[1] == "hb" else EMPTY if not message else ""
    if not isinstance(message, dict):
        return CONTROL if message in ("ping", "pong", "hb") else ""
    channel = message.get("channel", _of(message, "arg").get("channel", _of(message, "params").get("channel")))
    other = message.get("e") or message.get("table") or message.get("topic") or channel or message.get("feed")
    if (
        message.get("method") in _CONTROL_METHODS
        or message.get("type") in _CONTROL_TYPES
        or _is(message, "result", "id")
    ):
        return CONTROL
    if message.get("event") not in (None, "update", "all") or not message:
        return CONTROL
    if isinstance(other, str) and other:
        return f"another channel: {re.split('[.@:]', other)[0][:40]}"
    return CONTROL if _CONTROL_KEYS & message.keys() and "price" not in message else ""
