"""What each venue's messages mean: side, price, size, notional, time; and what of them is no event."""

import json

import pytest

from liqlab.feeds import read_feed
from liqlab.feeds.contracts import exchange_name, instrument, native_unit, restored, value_of
from liqlab.settings import Settings
from tests.feeds_samples import SAMPLES, frame, lines

MS = 1_700_000_000_000


@pytest.fixture
def feed(tmp_path):
    def read(text, name="feed.jsonl", **kwargs):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return read_feed(path, quarantine=tmp_path / "rejected.jsonl", **kwargs)

    return read


def rows(feed):
    """Return the events as tuples, sizes and notionals to 9 digits."""
    events = feed.events
    columns = [
        events[name].astype(str) if name in ("exchange", "symbol", "side") else events[name] for name in events.columns
    ]
    return [(*row[:5], float(f"{row[5]:.9g}"), float(f"{row[6]:.9g}")) for row in zip(*columns, strict=True)]


# time, exchange, symbol, side, price, size, notional: by hand from what FORMATS says of each venue
EXPECTED = {
    "binance": [
        (MS, "binance", "BTCUSDT", "sell", 60100.5, 0.15, 9015.075),
        (MS + 1, "binance", "BTCUSDT", "buy", 60100.5, 0.15, 9015.075),
    ],
    "binance combined": [(MS + 2, "binance", "BTCUSDT", "sell", 60100.5, 0.15, 9015.075)],
    "binance array": [(MS + at, "binance", "BTCUSDT", "sell", 60100.5, 0.15, 9015.075) for at in (3, 4)],
    "binance coin-m": [
        (MS + 5, "binance", "BTCUSD_PERP", "sell", 60100.5, 0.00499163900, 300.0),
        (MS + 5, "binance", "ETHUSD_PERP", "sell", 60100.5, 0.000499163900, 30.0),
    ],
    "binance rest": [(MS + 6, "binance", "BTCUSDT", "sell", 60100.5, 0.15, 9015.075)],
    "binance recorder": [
        (MS, "binance", "BTCUSDT", "sell", 60100.5, 0.15, 9015.075),
        (MS, "binance", "ETHUSDT", "buy", 3000.0, 1.0, 3000.0),
    ],
    "bybit pre-v5": [(MS, "bybit", "BTCUSDT", "buy", 60000.0, 0.1, 6000.0)],
    "bybit v5": [(MS, "bybit", "BTCUSD", "sell", 60000.0, 0.04, 2400.0)],
    "bybit all": [(MS, "bybit", "BTCUSDT", "sell", 60000.0, 0.1, 6000.0)] * 2,
    "bybit wrapped": [(MS - 9, "bybit", "BTCUSDT", "sell", 60000.0, 1.0, 60000.0)],
    "okx": [
        (MS, "okx", "BTC-USDT-SWAP", "sell", 60000.0, 0.08, 4800.0),
        (MS, "okx", "BTC-USDT-SWAP", "buy", 60010.0, 0.02, 1200.2),
    ],
    "bitmex": [],
    "bitmex raw": [(MS, "bitmex", "XBTUSD", "sell", 60000.5, 0.0249997917, 1500.0)],
    "deribit": [
        (MS, "deribit", "BTC-PERPETUAL", "sell", 60000.0, 0.02, 1200.0),
        (MS, "deribit", "BTC-PERPETUAL", "buy", 60000.0, 0.02, 1200.0),
        (MS, "deribit", "BTC-PERPETUAL", "sell", 60000.0, 0.02, 1200.0),
        (MS, "deribit", "BTC-PERPETUAL", "buy", 60000.0, 0.02, 1200.0),
    ],
    "gate": [(MS, "gate", "BTC_USDT", "buy", 60000.0, 0.0124, 744.0)],
    "gate rest": [(MS, "gate", "BTC_USDT", "sell", 60000.0, 0.0165, 990.0)],
    "htx": [
        (MS, "htx", "ETH-USDT", "buy", 3000.0, 5.0, 15000.0),
        (MS, "htx", "ETH-USDT", "sell", 3000.0, 3.0, 9000.0),
    ],
    "bitfinex": [(MS, "bitfinex", "tETHF0:USTF0", "buy", 3010.5, 4.5, 13547.25)],
    "kraken": [
        (MS, "kraken", "PI_XBTUSD", "sell", 60000.0, 0.02, 1200.0),
        (MS, "kraken", "PF_XBTUSD", "sell", 60000.0, 1200.0, 72e6),
    ],
    "dydx": [(MS + 500, "dydx", "BTC-USD", "sell", 60000.0, 0.5, 30000.0)],
    "bitget": [(MS, "bitget", "BTCUSDT", "sell", 60000.0, 0.02, 1200.0)],
    "hyperliquid": [(MS, "hyperliquid", "BTC", "sell", 60000.0, 0.1, 6000.0)],
    "tardis csv": [
        (MS, "binance", "BTCUSDT", "sell", 60000.0, 0.15, 9000.0),
        (MS, "bybit", "BTCUSD", "buy", 60000.0, 0.02, 1200.0),
        (MS, "okx", "BTC-USDT-SWAP", "buy", 60000.0, 0.12, 7200.0),
    ],
    "tardis json": [(MS, "bybit", "BTCUSD", "sell", 60000.0, 0.02, 1200.0)],
    "cryptofeed": [
        (MS + 829, "binance", "BTC-USDT-PERP", "buy", 60000.0, 0.5, 30000.0),
        (MS + 829, "bybit", "BTC-USDT-PERP", "sell", 60000.0, 0.5, 30000.0),
    ],
    "history": [(1_734_114_888_114, "binance", "BTCUSDT", "buy", 102127.24, 0.003, 306.38172)],
    "table": [(MS, "okx", "BTCUSDT", "sell", 60000.0, 0.3, 18000.0)],
    "liqlab": [(MS, "okx", "BTC-USDT-SWAP", "sell", 60000.0, 0.5, 30000.0)],
    "control": [],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_sample_means_what_the_venue_means(feed, name):
    options = {"symbol": "BTCUSDT", "exchange": "binance"} if name == "history" else {}
    found = feed(SAMPLES[name], **options)
    assert rows(found) == EXPECTED[name]
    assert found.report.read == found.report.accepted + found.report.duplicates + found.report.rejected_total


def test_ccxt_needs_to_be_told_the_venue(feed):
    assert rows(feed(SAMPLES["ccxt"], exchange="okx")) == [(MS, "okx", "BTC/USDT:USDT", "sell", 60000.0, 0.12, 7200.0)]
    assert rows(feed(SAMPLES["ccxt"], exchange="bybit"))[0][3] == "buy"


def test_the_archive_takes_its_symbol_from_the_name_of_the_file(feed):
    found = feed(SAMPLES["binance archive"], name="ETHUSD_PERP-liquidationSnapshot-2024-10-01.csv")
    assert rows(found) == [(MS, "binance", "ETHUSD_PERP", "buy", 60100.5, 0.00116471577, 70.0)]
    found = feed(SAMPLES["binance archive"], name="BTCUSDT-liquidationSnapshot-2023-10-01.csv")
    assert rows(found) == [(MS, "binance", "BTCUSDT", "buy", 60100.5, 7.0, 420703.5)]


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("bybit wrapped", {"empty frame": 1}),
        ("deribit", {"trade that is not a liquidation": 1}),
        ("kraken", {"trade that is not a liquidation": 2}),
        ("dydx", {"trade that is not a liquidation": 1}),
        (
            "bitfinex",
            {"bitfinex match: a part of an earlier liquidation": 1, "acknowledgement or heartbeat": 1},
        ),
        (
            "hyperliquid",
            {"hyperliquid: the other side of a liquidation": 1, "trade that is not a liquidation": 1},
        ),
        ("control", {"acknowledgement or heartbeat": 5}),
        ("tardis csv", {"header": 1}),
    ],
)
def test_what_is_no_event_is_counted_as_such(feed, name, ignored):
    report = feed(SAMPLES[name]).report
    assert report.ignored == ignored
    assert report.rejected == {}


def test_another_channel_of_the_same_socket_is_no_event(feed):
    text = lines(
        {"e": "aggTrade", "s": "BTCUSDT", "p": "1", "q": "1", "T": MS},
        {"topic": "tickers.BTCUSDT", "ts": MS, "data": {"symbol": "BTCUSDT", "lastPrice": "1"}},
        {"arg": {"channel": "trades", "instId": "BTC-USDT"}, "data": [{"px": "1"}]},
        frame(),
    )
    report = feed(text).report
    assert report.accepted == report.read == 1
    assert report.ignored == {f"another channel: {name}": 1 for name in ("aggTrade", "tickers", "trades")}


def test_bitmex_counts_inserts_only_and_wants_a_time(feed):
    row = {"orderID": "x1", "symbol": "XBTUSDT", "side": "Buy", "price": 60000, "leavesQty": 2000}
    actions = [
        {"table": "liquidation", "action": action, "data": data}
        for action, data in (
            ("partial", []),
            ("insert", [row]),
            ("update", [{"orderID": "x1", "symbol": "XBTUSDT", "leavesQty": 9000}]),
            ("delete", [{"orderID": "x1", "symbol": "XBTUSDT"}]),
        )
    ]
    report = feed(lines(*actions)).report
    assert report.read == report.rejected_total == 1
    assert "no time" in next(iter(report.rejected))
    assert sum(report.ignored.values()) == 3
    for receipt in (
        f"{MS / 1000}: ",
        "2023-11-14T22:13:20.000Z ",
        "[2023-11-14 22:13:20] ",
        "2023-11-14 22:13:20,000 ",
        f"wss://x <- {MS / 1000}: ",
        f"{MS * 1000}\t",
    ):
        found = feed("\n".join(receipt + json.dumps(action) for action in actions))
        assert rows(found) == [(MS, "bitmex", "XBTUSDT", "buy", 60000.0, 0.002, 120.0)]
    for wrapper in (
        {"ts": MS, "message": actions[1]},
        {"received_at": "2023-11-14T22:13:20Z", "raw": json.dumps(actions[1])},
    ):
        assert rows(feed(lines(wrapper)))[0][0] == MS


def test_two_recorders_of_bitmex_agree_by_the_id_of_the_order(feed):
    insert = {"table": "liquidation", "action": "insert"}
    row = {"orderID": "x1", "symbol": "XBTUSD", "side": "Buy", "price": 60000, "leavesQty": 2000}
    text = "\n".join(f"{MS / 1000 + at * 3700}: {json.dumps(insert | {'data': [row]})}" for at in range(2))
    report = feed(text).report
    assert (report.accepted, report.duplicates) == (1, 1)


def test_equal_entries_of_one_frame_are_two_events_and_of_two_frames_one(feed):
    found = feed("\n".join([SAMPLES["bybit all"]] * 3))
    assert (found.report.read, found.report.accepted, found.report.duplicates) == (6, 2, 4)
    single = json.loads(SAMPLES["bybit all"])
    single["data"] = single["data"][:1]
    found = feed("\n".join([lines(single), SAMPLES["bybit all"]]))
    assert (found.report.accepted, found.report.duplicates) == (2, 1)


def test_without_a_fill_the_order_price_and_quantity_count(feed):
    found = feed(lines(frame(ap="0", z="0.000"), frame(T=MS + 1, ap="", z=None), frame(T=MS + 2, ap="None")))
    assert [row[4:6] for row in rows(found)] == [(60000.0, 0.2), (60000.0, 0.2), (60000.0, 0.15)]


def test_aster_sends_the_frames_of_binance(feed):
    for options in ({"exchange": "aster"}, {"format": "aster"}):
        assert {row[1] for row in rows(feed(SAMPLES["binance"], **options))} == {"aster"}


def test_an_unknown_contract_size_names_its_setting_and_the_setting_cures_it(feed):
    text = SAMPLES["okx"].replace("BTC-USDT", "CNPY-USDT")
    report = feed(text).report
    reason = 'no contract size for okx:CNPY-USDT-SWAP; set feeds.contract_sizes["okx:CNPY-USDT-SWAP"]'
    assert report.rejected == {reason: 2}
    entry = json.loads(report.quarantine.read_text().splitlines()[0])
    assert entry == {"file": report.files[0], "line": 1, "reason": reason, "raw": text}
    cured = feed(text, settings=Settings(feeds={"contract_sizes": {"okx:CNPY-USDT-SWAP": 10}}))
    assert [row[5] for row in rows(cured)] == [80.0, 20.0]
    assert not report.quarantine.exists()


def test_what_has_no_value_in_dollars_is_refused_with_the_reason(feed):
    text = lines(
        frame(s="ETHBTC"),
        {
            "table": "liquidation",
            "action": "insert",
            "data": [{"orderID": "q", "symbol": "ETHUSD", "side": "Buy", "price": 3000, "leavesQty": 1}],
        },
    )
    option = SAMPLES["deribit"].replace("BTC-PERPETUAL", "BTC-27DEC24-50000-C")
    report = feed(f"{lines(frame(s='ETHBTC'))}\n{MS / 1000}: {text.splitlines()[1]}\n{option}").report
    reasons = sorted(report.rejected.items())
    assert [count for _, count in reasons] == [4, 1, 1]
    assert reasons[0][0] == "options are not valued: deribit:BTC-27DEC24-50000-C"
    assert 'feeds.contract_sizes["bitmex:ETHUSD"]' in reasons[1][0]
    assert reasons[2][0] == "quoted in BTC, not in US dollars: binance:ETHBTC"


@pytest.mark.parametrize(
    ("symbol", "accepted"),
    [
        ("币安人生USDT", True),
        ("4USDT", True),
        ("1000PEPEUSDT", True),
        ("A" * 60 + "USDT", True),
        ("A" * 61 + "USDT", False),
        ("B TUSDT", False),
        ("B{USDT", False),
        ("*USDT", False),
        ("", False),
        ("B\u200bUSDT", False),
        ("B\u0007USDT", False),
    ],
)
def test_symbols_are_checked(feed, symbol, accepted):
    report = feed(lines(frame(s=symbol))).report
    assert report.accepted == accepted
    assert report.rejected_total == (not accepted)


@pytest.mark.parametrize(
    "fields",
    [
        {"S": "HOLD"},
        {"S": None},
        {"T": 0},
        {"T": 10**30},
        {"T": "soon"},
        {"T": True},
        {"ap": "-1", "p": "nan"},
        {"z": "1e400", "q": "x"},
        {"ap": "1e300", "z": "1e300"},
        {"s": {"x": 1}},
    ],
)
def test_an_impossible_event_is_rejected(feed, fields):
    report = feed(lines(frame(), frame(**fields))).report
    assert (report.accepted, report.rejected_total) == (1, 1)


def test_okx_margin_counts_coins_and_net_mode_uses_the_side(feed):
    message = json.loads(SAMPLES["okx"])
    message["arg"]["instType"] = message["data"][0]["instType"] = "MARGIN"
    message["data"][0]["instId"] = "BTC-USDT"
    message["data"][0]["details"][0]["posSide"] = "net"
    assert [row[3:6] for row in rows(feed(lines(message)))] == [("sell", 60000.0, 8.0), ("buy", 60010.0, 2.0)]


def test_a_named_format_refuses_the_others(feed):
    report = feed(SAMPLES["okx"] + "\n" + SAMPLES["bybit v5"], format="okx").report
    assert report.accepted == 2
    assert report.rejected == {"bybit, not okx as asked by format=": 1}


@pytest.mark.parametrize(
    ("exchange", "symbol", "unit", "inverse"),
    [
        ("binance", "BTCUSDT", "base", False),
        ("binance", "BTCUSDT_250328", "base", False),
        ("binance", "BNBUSD_PERP", "contracts", True),
        ("binance", "BTCUSD_200925", "contracts", True),
        ("bybit", "BTCUSD", "usd", True),
        ("bybit", "BTCUSDH25", "usd", True),
        ("bybit", "BTCPERP", "base", False),
        ("bybit", "BTC-27DEC24", "base", False),
        ("okx", "BTC-USD-SWAP", "contracts", True),
        ("okx", "BTC-USD_UM-SWAP", "contracts", False),
        ("deribit", "ETH_USDC-PERPETUAL", "base", False),
        ("deribit", "ETH-27DEC24", "usd", True),
        ("kraken", "PF_XBTUSD", "base", False),
        ("kraken", "FI_XBTUSD_240329", "contracts", True),
        ("dydx", "BTC-USD", "base", False),
        ("bitmex", "XBTUSD", "contracts", True),
        ("bitmex", "XBTZ24", "contracts", True),
        ("htx", "BTC240329", "contracts", True),
    ],
)
def test_a_symbol_tells_its_unit(exchange, symbol, unit, inverse):
    assert native_unit(exchange, symbol) == unit
    assert instrument(exchange, symbol).inverse == inverse
    assert instrument(exchange, symbol).in_usd


def test_venues_have_one_name_each():
    known = {
        "BINANCE_FUTURES": "binance",
        "binance-delivery": "binance",
        "okex-swap": "okx",
        "huobi-dm-linear-swap": "htx",
        "cryptofacilities": "kraken",
        "KRAKEN_FUTURES": "kraken",
        "gate-io-futures": "gate",
        "bitfinex-derivatives": "bitfinex",
        "dydx-v4": "dydx",
        "Bybit": "bybit",
    }
    assert {name: exchange_name(name) for name in known} == known


def test_settings_win_over_the_table_of_sizes():
    assert value_of("okx", "BTC-USDT-SWAP", None, {}).factor == 0.01
    assert value_of("okx", "BTC-USDT-SWAP", None, {"okx:BTC-USDT-SWAP": 0.5}).factor == 0.5


def test_only_what_was_stripped_is_restored():
    names = ["BTC", "USDC", "BTCUSDC", "TRUST", "PUMPBTC", "ETHBTC", "BTCUSDT", "BTCUSD_PERP"]
    assert [restored(name) for name in names] == [
        "BTCUSDT",
        "USDCUSDT",
        "BTCUSDC",
        "TRUSTUSDT",
        "PUMPBTCUSDT",
        "ETHBTC",
        "BTCUSDT",
        "BTCUSD_PERP",
    ]
