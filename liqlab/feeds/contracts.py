"""What a quantity means: names of venues, currencies of symbols, sizes of contracts."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

UNKNOWN: Final = "unknown"
_ALIASES: Final = {
    "okex": "okx",
    "huobi": "htx",
    "cryptofacilities": "kraken",
    "gateio": "gate",
    "gate-io": "gate",
    "gate.io": "gate",
    "asterdex": "aster",
    "binance-us": "binanceus",
}
_MARKET: Final = re.compile(
    r"[-_. ](futures?|delivery|swaps?|perps?|perpetuals?|linear|inverse|dm|options|derivatives|usds?-?m|coin-?m|v\d)$"
)
USD_LIKE: Final = ("USDT", "USDC", "FDUSD", "BUSD", "TUSD", "USD1", "USDE", "USDP", "DAI", "UST", "USD")
_OTHER_QUOTES: Final = ("BTC", "XBT", "ETH", "BNB", "EUR", "GBP", "JPY", "TRY", "BRL", "KRW", "AUD")
# Glued to a base a short list is safer: XBTUSD is not XB in TUSD, BNBUSD_PERP not BN in BUSD, TRUST not TR in UST.
_GLUED: Final = ("USDT", "USDC", "USD", *_OTHER_QUOTES)
_GLUED_BINANCE: Final = ("USDT", "USDC", "FDUSD", "BUSD", "USD1", "USD", *_OTHER_QUOTES)
_MONTH: Final = r"\d{1,2}[A-Z]{3}\d{2}"  # 27DEC24
_EXPIRY: Final = re.compile(rf"(?:[-_ ](?:PERPETUAL|PERP|SWAP|FUTURES|UM|\d{{6,8}}|{_MONTH}|\d{{2}}[A-Z]\d{{0,2}}))+$")
_SHORT_EXPIRY: Final = re.compile(r"(?<=USD)[FGHJKMNQUVXZ]\d{2}$")  # Bybit BTCUSDH25
_BITMEX_FUTURE: Final = re.compile(r"^XBT[FGHJKMNQUVXZ]\d{2}$")
_HTX_FUTURE: Final = re.compile(r"^([A-Z]+)\d{6}$")
_OPTION: Final = re.compile(r"[-_]\d+(?:D\d+)?[-_][CP](?:[-_]USDT)?$")

# US dollars a contract for inverse contracts, base units a contract for linear ones. Only sizes that are long
# established are here; venues change those of small coins, so the rest comes from settings.
_INVERSE_USD: Final = {
    "binance": {"BTC": 100.0, "": 10.0},
    "okx": {"BTC": 100.0, "": 10.0},
    "htx": {"BTC": 100.0, "": 10.0},
    "bitmex": {"XBT": 1.0},
    "gate": {"BTC": 1.0},
    "kraken": {"": 1.0},
}
_LINEAR_BASE: Final = {
    "okx": {
        "BTC-USDT": 0.01,
        "ETH-USDT": 0.1,
        "SOL-USDT": 1.0,
        "XRP-USDT": 100.0,
        "DOGE-USDT": 1000.0,
        "ADA-USDT": 100.0,
        "LTC-USDT": 1.0,
        "BCH-USDT": 0.1,
        "LINK-USDT": 1.0,
        "DOT-USDT": 1.0,
        "AVAX-USDT": 1.0,
    },
    "htx": {"BTC-USDT": 0.001, "ETH-USDT": 0.01},
    "gate": {"BTC-USDT": 0.0001, "ETH-USDT": 0.01},
    "bitmex": {"XBT-USDT": 1e-6},
}
_INVERSE_VENUES: Final = frozenset(_INVERSE_USD) | {"bybit", "deribit"}


@dataclass(frozen=True)
class Instrument:
    """What a symbol says of itself; `quote` is empty where nothing in the name is a currency we know."""

    base: str
    quote: str
    inverse: bool
    option: bool = False

    @property
    def in_usd(self) -> bool:
        """Whether prices are in US dollars or a coin that follows it."""
        return self.quote in USD_LIKE


@dataclass(frozen=True)
class Value:
    """How a quantity becomes a size and a notional.

    Linear: size = quantity x factor, notional = price x size. Inverse: notional = quantity x factor (USD),
    size = notional / price. `problem` says why neither can be done.
    """

    factor: float = 1.0
    inverse: bool = False
    problem: str = ""


def exchange_name(text: str) -> str:
    """Return the short name of a venue: ``BINANCE_FUTURES``, ``okex-swap`` and ``gate.io`` are binance, okx, gate."""
    name = text.strip().lower().replace("_", "-")
    while (shorter := _MARKET.sub("", name)) != name:
        name = shorter
    return _ALIASES.get(name, name) or UNKNOWN


@functools.lru_cache(maxsize=65_536)
def instrument(exchange: str, symbol: str) -> Instrument:
    """Read base, quote and kind of contract from a venue's symbol, or from its cryptofeed or CCXT spelling."""
    name = symbol.strip().upper()
    if exchange == "bitfinex":
        base, _, quote = name.removeprefix("T").removeprefix("TEST").partition(":")
        return Instrument(base.removesuffix("F0"), quote.removesuffix("F0"), False)
    if exchange == "hyperliquid":
        return Instrument(name, "USDC", False)
    if exchange == "htx" and (match := _HTX_FUTURE.match(name)):
        return Instrument(match[1], "USD", True)
    if exchange == "kraken" and (match := re.match(r"(P|F)([IFV])_([A-Z0-9]+?)USD", name)):
        return Instrument(match[3], "USD", match[2] == "I")
    if exchange == "bitmex" and _BITMEX_FUTURE.match(name):
        return Instrument("XBT", "USD", True)
    option = bool(_OPTION.search(name))
    settle = name.partition(":")[2].partition("-")[0]  # CCXT: BTC/USD:BTC
    name = name.partition(":")[0].replace("/", "-")
    stem = _SHORT_EXPIRY.sub("", _EXPIRY.sub("", name))
    if exchange == "bybit" and stem == name and name.endswith("PERP"):
        stem = name.removesuffix("PERP") + "USDC"
    binance = exchange in ("binance", "aster", UNKNOWN) and stem == name
    base, quote = _split(stem, _GLUED_BINANCE if binance else _GLUED)
    if not quote and exchange in ("deribit", "bybit") and stem != name:
        quote = "USD" if exchange == "deribit" else "USDC"  # BTC-PERPETUAL; BTC-27DEC24
    inverse = quote == "USD" and exchange in _INVERSE_VENUES and "_UM" not in name and settle in ("", base)
    return Instrument(base, quote, inverse, option)


def _split(stem: str, glued: tuple[str, ...]) -> tuple[str, str]:
    parts = [part for part in re.split(r"[-_]", stem) if part]
    if len(parts) >= 2 and parts[1] in USD_LIKE + _OTHER_QUOTES:
        return parts[0], parts[1]
    joined = "".join(parts[:1]) if len(parts) > 1 else stem
    if joined in USD_LIKE:
        return joined, ""
    for quote in glued:
        if joined.endswith(quote) and len(joined) > len(quote):
            return joined.removesuffix(quote), quote
    return joined, ""


def native_unit(exchange: str, symbol: str) -> str:
    """Return what the venue counts its quantities in: ``base``, ``contracts`` or ``usd``."""
    found = instrument(exchange, symbol)
    if exchange in ("bybit", "deribit"):
        return "usd" if found.inverse else "base"
    if exchange in ("binance", "kraken"):
        return "contracts" if found.inverse else "base"
    if exchange == "okx":
        # A bare pair with a hyphen is a margin loan's; everything else on OKX counts contracts.
        return "base" if re.fullmatch(r"[A-Z0-9]+-[A-Z0-9]+", symbol.upper()) else "contracts"
    if exchange == "bitget":
        # Its `amount` is price x quantity: recorded amounts divide by their price to the last digit.
        return "usd"
    return "contracts" if exchange in ("htx", "gate", "bitmex") else "base"


def value_of(exchange: str, symbol: str, unit: str | None, sizes: Mapping[str, float]) -> Value:
    """Return how quantities of a symbol become base units and USD.

    Parameters
    ----------
    exchange, symbol : str
        The short name of the venue, and its own name of the instrument.
    unit : {"base", "contracts", "usd"} or None
        What quantities are in; None for what the venue counts in.
    sizes : mapping of str to float
        ``settings.feeds.contract_sizes``: by ``exchange:symbol``, base units a contract for linear contracts, USD a
        contract for inverse ones. They win over the table of well-known sizes.
    """
    found = instrument(exchange, symbol)
    if found.option:
        return Value(problem=f"options are not valued: {exchange}:{symbol}")
    if found.quote and not found.in_usd:
        return Value(problem=f"quoted in {found.quote}, not in US dollars: {exchange}:{symbol}")
    if not found.quote and exchange in ("binance", "aster", "bybit", "okx", "bitmex", "gate", "htx"):
        return Value(problem=f"no quote currency in the symbol {exchange}:{symbol}")
    unit = unit or native_unit(exchange, symbol)
    if unit == "base":
        return Value()
    if unit == "usd":
        return Value(inverse=True)
    key = f"{exchange}:{symbol}"
    # A quanto's contract is worth the same number of coins at any price: no dollar value without a price of that coin.
    quanto = exchange == "bitmex" and found.quote == "USD" and found.base != "XBT"
    if key in sizes:
        return Value(sizes[key], found.inverse and not quanto)
    cure = f'set feeds.contract_sizes["{key}"]'
    if quanto:
        return Value(problem=f"quanto contract, no value in dollars: {key}; {cure} to base units a contract")
    if found.inverse:
        table = _INVERSE_USD.get(exchange, {})
        size = table.get(found.base, table.get(""))
    else:
        size = _LINEAR_BASE.get(exchange, {}).get(f"{found.base}-{found.quote}")
    if size is None:
        return Value(problem=f"no contract size for {key}; {cure}")
    return Value(size, found.inverse)


def restored(symbol: str) -> str:
    """Return Binance's own name of a symbol whose ``USDT`` was stripped (``BTC``); any other is returned as it is."""
    found = instrument("binance", symbol)
    if found.in_usd or symbol == "ETHBTC":
        return symbol
    return symbol + "USDT"
