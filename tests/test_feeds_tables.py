"""CSV with and without a header, flat JSON, Parquet and DataFrames."""

import gzip
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from liqlab import events as event_tables
from liqlab.clock import generator
from liqlab.feeds import FeedError, iter_feed, read_feed, write_feed

MS = 1_700_000_000_000
ROW = "{symbol},{side},LIMIT,IOC,0.2,60000.0,{ap},FILLED,0.1,0.15,{ms}"


@pytest.fixture
def feed(tmp_path):
    def read(text, name="feed.csv", **kwargs):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return read_feed(path, quarantine=tmp_path / "rejected.jsonl", **kwargs)

    return read


def row(symbol="BTCUSDT", side="SELL", ap="60100.5", ms=MS):
    return ROW.format(symbol=symbol, side=side, ap=ap, ms=ms)


def times(feed):
    return feed.events["ts_ms"].tolist()


def account(feed):
    report = feed.report
    assert report.read == report.accepted + report.duplicates + report.rejected_total
    return report.read, report.accepted, report.duplicates, report.rejected_total


def test_a_recorder_without_a_header(feed):
    found = feed("\n".join([row() + ",9015.0", row("ETH", "BUY", ms=MS + 1) + ",9015.0", row() + ",0.009015"]))
    assert account(found) == (3, 2, 1, 0)  # the derived text in the last column is no identity
    assert found.events["symbol"].tolist() == ["BTCUSDT", "ETHUSDT"]
    assert found.report.formats == ["binance-recorder"]
    assert found.report.notes == ["symbols had USDT stripped: restored"]


@pytest.mark.parametrize(
    "junk", ["�garbage", "Connected to wss://x", "symbol,side,order_type,usd_sizeBTCUSDT,SELL", "T,SELL,LIMIT", ",,,"]
)
def test_a_corrupt_first_line_is_one_rejection(feed, junk):
    found = feed("\n".join([junk, row(), row(ms=MS + 1)]))
    assert account(found) == (3, 2, 0, 1)
    assert '"line":1' in found.report.quarantine.read_text()


def test_none_and_empty_prices_fall_back_to_the_price_of_the_order(feed):
    found = feed("\n".join([row(ap="None"), row(ap="", ms=MS + 1), row(ap="0", ms=MS + 2), row(ms=MS + 3)]))
    assert found.events["price"].tolist() == [60000.0, 60000.0, 60000.0, 60100.5]


def test_a_column_that_appears_on_the_way(feed):
    found = feed("\n".join([row(), row(ms=MS + 1) + ",x", row(ms=MS + 2) + ",x,y", row(ms=MS + 3)]))
    assert account(found) == (4, 4, 0, 0)
    header = "time,symbol,side,price,qty"
    found = feed(f"{header}\n{MS},BTCUSDT,BUY,60000,1\n{MS + 1},BTCUSDT,BUY,60000,1,new\n{MS + 2},BTCUSDT\n")
    assert account(found) == (3, 2, 0, 1)
    assert any("6 fields below a header of 5" in note for note in found.report.notes)


def test_the_names_of_the_frame_s_own_fields_are_a_header(feed):
    found = feed(f"s,S,o,f,q,p,ap,X,l,z,T\n{row()}\n{row('ETH', ms=MS + 1)}")
    assert account(found) == (2, 2, 0, 0)
    assert found.events["symbol"].tolist() == ["BTCUSDT", "ETHUSDT"]
    assert found.events["price"].tolist() == [60100.5, 60100.5]


@pytest.mark.parametrize(
    "header",
    [
        "symbol,side,order_type,time_in_force,original_quantity,price,average_price,order_status,"
        "order_last_filled_quantity,order_filled_accumulated_quantity,order_trade_time",
        "Symbol,Side,Order Type,Time in Force,Quantity,Price,Average Price,Order Status,Last Filled Quantity,"
        "Filled Quantity,Trade Time (UTC)",
    ],
)
def test_a_recorder_with_a_header(feed, header):
    found = feed(f"\ufeff{header}\r\n{row('BTC')}\r\n{header}\r\n{row('ETH', ms=MS + 1)}\r\n")
    assert account(found) == (2, 2, 0, 0)
    assert found.report.ignored == {"header": 2}
    assert found.events[["price", "size"]].to_numpy().tolist() == [[60100.5, 0.15]] * 2
    assert found.report.exchanges == ["binance"]


def test_two_tables_in_one_file_and_frames_between_them(feed):
    second = "time,symbol,side,price,qty\n1700000001000,BTCUSDT,BUY,60000,1"
    frame = (
        '{"e":"forceOrder","o":{"s":"BTCUSDT","S":"BUY","q":"1","p":"60000","ap":"60000","z":"1","T":1700000002000}}'
    )
    found = feed(f"{row()}\n{second}\n{frame}\n{row(ms=MS + 3000)}", exchange="binance")
    assert account(found) == (4, 4, 0, 0)
    assert times(found) == [MS, MS + 1000, MS + 2000, MS + 3000]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1700000000", MS),
        ("1700000000.829", MS + 829),
        ("1700000000829", MS + 829),
        ("1700000000829999", MS + 829),
        ("1700000000829999999", MS + 829),
        ("2023-11-14T22:13:20.829Z", MS + 829),
        ("2023-11-14 22:13:20.829", MS + 829),
        ("2023-11-14 22:13:20 UTC", MS),
        ("2023/11/14 22:13:20", MS),
        ("2023-11-15 03:43:20.829000+05:30", MS + 829),
        ("2023-11-14T17:13:20-0500", MS),
        ("170000000", None),
        ("yesterday", None),
        ("", None),
        ("2023-13-45", None),
        ("-1700000000", None),
        ("nan", None),
        ("1e400", None),
    ],
)
def test_times(feed, text, expected):
    found = feed(f"time,symbol,side,price,qty\n{text},BTCUSDT,BUY,60000,1\n{MS + 9000},BTCUSDT,BUY,60000,1")
    assert times(found) == ([] if expected is None else [expected]) + [MS + 9000]


def test_times_without_a_zone_are_utc_unless_another_is_named(feed):
    text = "time,symbol,side,price,qty\n2023-11-14 22:13:20,BTCUSDT,BUY,60000,1"
    assert "tz=" in " ".join(feed(text).report.notes)
    found = feed(text, tz="Asia/Kolkata")
    assert times(found) == [MS - 19_800_000]
    assert "tz=" not in " ".join(found.report.notes)
    with pytest.raises(FeedError, match="Mars/Base"):
        feed(text, tz="Mars/Base")


def test_words_for_sides_and_the_venues_own_habits(feed):
    words = ["BUY", "sell", "Long", "short", "Long Trade", "Short Liquidation", "LONGS"]
    lines = [f"{MS + at},binance,BTCUSDT,{word},60000,1" for at, word in enumerate(words)]
    lines += [f"{MS + 100},bybit,BTCUSDT,Buy,60000,1", f"{MS + 101},bybit,BTCUSDT,long,60000,1"]
    found = feed("time,exchange,symbol,side,price,qty\n" + "\n".join(lines))
    assert found.events["side"].tolist() == ["buy", "sell", "sell", "buy", "sell", "buy", "sell", "sell", "sell"]
    found = feed(f"time,symbol,position_side,price,qty\n{MS},BTCUSDT,Buy,60000,1")
    assert found.events["side"].tolist() == ["sell"]


def test_a_table_through_the_caller_s_map(feed):
    text = f"when;what;how;px;mark;n;note\n{MS};BTC-USDT-SWAP;short;60000;1;5;x\n"
    columns = {"ts_ms": "when", "symbol": "what", "side": "how", "price": "px", "size": "n"}
    found = feed(text, columns=columns, exchange="okx")
    assert found.events[["size", "notional"]].to_numpy().tolist() == [[0.05, 3000.0]]
    assert found.events["side"].tolist() == ["buy"]
    found = feed(text, columns=columns, exchange="okx", unit="base")
    assert found.events["size"].tolist() == [5.0]
    assert feed(text, format="table", columns=columns, exchange="OKEX").report.exchanges == ["okx"]
    found = feed(text, columns=columns, exchange="okx", unit="usd")
    assert found.events["notional"].tolist() == [5.0]


def test_a_table_without_names_by_positions(feed):
    columns = {"ts_ms": 2, "symbol": 0, "position_side": 1, "price": 3, "size": "4"}
    found = feed(f"BTCUSDT,Buy,{MS},60000,0.5\nETHUSDT,Sell,{MS},3000,0.5", columns=columns, exchange="bybit")
    assert account(found) == (2, 2, 0, 0)
    assert found.events["side"].tolist() == ["sell", "buy"]


@pytest.mark.parametrize(
    ("text", "kwargs", "words"),
    [
        ("a,b,c,d\n1,2,3,4", {}, ["'a,b,c,d'", "format=", "columns="]),
        (f"time,symbol,side,price\n{MS},B,BUY,1", {}, ["no column for size", "columns="]),
        (f"time,symbol,side,price,qty\n{MS},B,BUY,1,1", {"columns": {"size": "amount"}}, ["size='amount'", "qty"]),
        (f"time,symbol,side,price,qty\n{MS},B,BUY,1,1", {"columns": {"sise": "qty"}}, ["'sise'", "ts_ms"]),
        ("x", {"unit": "coins"}, ["unit='coins'", "contracts"]),
        ("x", {"format": "binanse"}, ["format='binanse'", "binance"]),
        ("hello world", {}, ["hello world", "format="]),
        ('{"a": 1}', {}, ['{"a": 1}', "format="]),
    ],
)
def test_what_cannot_be_read_says_so_with_the_cure(feed, text, kwargs, words):
    with pytest.raises(FeedError) as error:
        feed(text, **kwargs)
    for word in words:
        assert word in str(error.value)


def test_flat_json_objects_are_rows(feed):
    line = '{"timestamp":%d,"symbol":"BTCUSDT","side":"SELL","price":60000.5,"qty":0.5,"x":null}'
    found = feed("\n".join(line % (MS + at) for at in (0, 1, 1)) + '\n{"symbol":"BTCUSDT"}', exchange="binance")
    assert account(found) == (4, 2, 1, 1)
    assert found.events["price"].tolist() == [60000.5] * 2


def test_the_venue_may_stand_in_the_name_of_the_file(feed):
    text = f"time,symbol,side,price,qty\n{MS},BTCUSDT,Buy,60000,1"
    assert feed(text, name="bybit_2023.csv").events[["exchange", "side"]].to_numpy().tolist() == [["bybit", "sell"]]
    found = feed(text, name="recording.csv")
    assert found.report.exchanges == ["unknown"]
    assert any("exchange=" in note for note in found.report.notes)


def synthetic(count, seed=3):
    rng = generator(seed)
    pick = rng.integers(0, 3, count)
    price = rng.random(count) * 100 + 0.1
    size = rng.random(count) * 3 + 0.1
    return event_tables.event_table(
        MS + np.sort(rng.integers(0, count // 2, count)),
        np.array(["okx", "binance", "bybit"])[pick],
        np.array(["BTC-USD-SWAP", "币安人生USDT", "BTCUSD"])[pick],
        np.array(["buy", "sell"])[rng.integers(0, 2, count)],
        price,
        size,
        np.nextafter(price * size, 1e9),  # no product of the two, as with inverse contracts
    )


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.csv.gz"])
def test_a_written_feed_comes_back_to_the_last_bit(tmp_path, name):
    table = synthetic(30_000)
    table = event_tables.event_table(
        **{c: pd.concat([table[c].astype(object), table[c][::50].astype(object)]) for c in table}
    )
    found = read_feed(write_feed(table, tmp_path / name))
    assert found.report.formats == ["liqlab"]
    # Equal rows of our own tables are different events: they were deduplicated when they were made.
    assert account(found) == (30_600, 30_600, 0, 0)
    for column in table:
        left, right = found.events[column], table[column]
        if isinstance(left.dtype, pd.CategoricalDtype):
            left, right = left.astype(str), right.astype(str)
        assert left.tolist() == right.tolist()


def test_a_written_feed_read_twice_is_one_feed(tmp_path):
    table = synthetic(1000)
    paths = [write_feed(table, tmp_path / name) for name in ("a.parquet", "b.csv")]
    assert account(read_feed(paths)) == (2000, 1000, 1000, 0)
    with pytest.raises(FeedError, match="parquet"):
        write_feed(table, tmp_path / "a.xlsx")


def test_parquet_of_another_make_and_dataframes(tmp_path):
    frame = pd.DataFrame(
        {
            "timestamp": pd.to_datetime([MS, MS + 1, None], unit="ms", utc=True),
            "symbol": pd.Categorical(["BTCUSDT", "ETHUSDT", "ETHUSDT"]),
            "side": ["buy", "sell", "sell"],
            "price": [60000, 3000, 3000],
            "qty": [0.5, np.nan, 1.0],
        }
    )
    frame.to_parquet(tmp_path / "other.parquet")
    for source in (tmp_path / "other.parquet", frame):
        found = read_feed(source, exchange="binance", quarantine=tmp_path / "rejected.jsonl")
        assert account(found) == (3, 1, 0, 2)
        assert times(found) == [MS]
        assert '"ETHUSDT"' in found.report.quarantine.read_text().replace("\\", "")
    with pytest.raises(FeedError, match="no column for size"):
        read_feed(frame.drop(columns="qty"))


def test_odd_types_of_parquet_columns_cost_their_rows_only(tmp_path):
    frame = pd.DataFrame({"time": [MS, MS + 1], "symbol": "BTCUSDT", "side": ["buy", "sell"]})
    frame["price"], frame["qty"] = [Decimal("60000.5"), Decimal("60001.5")], [1, 2]
    assert read_feed(frame, exchange="binance").events["price"].tolist() == [60000.5, 60001.5]
    frame["side"] = [["buy"], ["sell"]]
    assert account(read_feed(frame, exchange="binance", quarantine=tmp_path / "rejected.jsonl")) == (2, 0, 0, 2)


def test_batches_of_a_table_have_the_size_asked_for(tmp_path):
    path = write_feed(synthetic(10_000), tmp_path / "t.csv.gz")
    assert gzip.decompress(path.read_bytes()).startswith(b"ts_ms,")
    batches = list(iter_feed(path, batch=3000))
    assert [len(batch) for batch in batches] == [3000, 3000, 3000, 1000]
    for batch in batches:
        event_tables.check(batch)
