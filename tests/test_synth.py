from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pandas.testing import assert_frame_equal

from liqlab import events
from liqlab.clock import HOUR_MS, MINUTE_MS
from liqlab.feeds import FeedError, read_feed
from liqlab.feeds.synth import START_MS, synth, universe
from liqlab.feeds.wire import EXCHANGES, write_wire
from liqlab.settings import load

DATA = Path(__file__).parents[1] / "data"
CONTRACTS = {f"okx:{name}": 0.5 for name in universe(exchange="okx")}  # a power of two: exact in float64
SETTINGS = load(feeds={"contract_sizes": CONTRACTS})
COMMANDS = re.findall(r"`(liqlab synth [^`]+)`", (DATA / "README.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def day() -> pd.DataFrame:
    return synth("normal", hours=24, seed=0)


@pytest.fixture(scope="module")
def cascade() -> pd.DataFrame:
    return synth("cascade", hours=1, seed=3)


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Text instead of categories, and an order that does not depend on how frames were batched."""
    table = table.astype(dict.fromkeys(("exchange", "symbol", "side"), str))
    return table.sort_values(["ts_ms", "symbol"], ignore_index=True)


# --- the table


def test_a_day_of_normal_has_exactly_144000_events(day: pd.DataFrame) -> None:
    assert len(day) == 144_000
    events.check(day)
    assert day["ts_ms"].between(START_MS, START_MS + 24 * HOUR_MS - 1).all()
    assert (day["notional"] == day["price"] * day["size"]).all()


@pytest.mark.parametrize(
    ("profile", "hours", "rate", "expected"),
    [("quiet", 3, None, 900), ("normal", 0.25, None, 1500), ("normal", 2, 7.5, 900), ("cascade", 0.2, 10, 98_740)],
)
def test_the_number_of_events_is_exact(profile: str, hours: float, rate: float | None, expected: int) -> None:
    table = events.check(synth(profile, hours=hours, rate_per_min=rate, symbols=50))
    assert len(table) == expected
    assert table["ts_ms"].max() < START_MS + hours * HOUR_MS


def test_a_feed_without_events_is_an_empty_event_table() -> None:
    assert_frame_equal(synth(rate_per_min=0), events.empty())


def test_the_seed_decides_and_nothing_else() -> None:
    assert_frame_equal(synth(hours=1, seed=5), synth(hours=1, seed=5))
    assert not synth(hours=1, seed=5).equals(synth(hours=1, seed=6))


def test_start_moves_the_feed_and_changes_nothing_else() -> None:
    moved = synth(hours=1, start_ms=START_MS + 12_345)
    moved["ts_ms"] -= 12_345
    assert_frame_equal(moved, synth(hours=1))


@pytest.mark.parametrize(("exchange", "least_ms"), [("binance", 1000), ("okx", 1000), ("bybit", 1)])
@pytest.mark.parametrize(("symbols", "rate"), [(400, 100), (10, 150), (1, 20)])
def test_orders_of_a_symbol_keep_the_gap_of_their_venue(
    exchange: str, least_ms: int, symbols: int, rate: float
) -> None:
    table = synth(hours=4, rate_per_min=rate, symbols=symbols, exchange=exchange, seed=2)
    assert table.groupby("symbol", observed=True)["ts_ms"].diff().min() >= least_ms


def test_prices_and_sizes_are_short_decimals(day: pd.DataFrame) -> None:
    for name in ("price", "size"):
        longest = max(len(f"{value!r}".replace("-", "").replace(".", "").lstrip("0")) for value in day[name])
        assert longest <= 12, name


def test_names_include_the_awkward_ones(day: pd.DataFrame) -> None:
    names = universe(1000)
    assert len(set(names)) == 1000
    seen = set(day["symbol"].unique())
    assert len(seen) > 300
    assert {"BTCUSDT", "1000PEPEUSDT"} < seen
    assert any(not name.isascii() for name in seen)
    assert set(day["symbol"].cat.categories) == seen


def test_symbols_can_be_named() -> None:
    table = synth(hours=1, rate_per_min=30, symbols=["ETHUSDT", "NEWCOINUSDT"])
    assert set(table["symbol"].unique()) == {"ETHUSDT", "NEWCOINUSDT"}
    assert 2000 < table.loc[table["symbol"] == "ETHUSDT", "price"].median() < 3500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"profile": "mad"}, "'mad' is unknown; choose one of quiet, normal, cascade"),
        ({"exchange": "mtgox"}, "'mtgox' is unknown"),
        ({"hours": 0}, "hours=0"),
        ({"hours": float("inf")}, "hours=inf"),
        ({"rate_per_min": float("nan")}, "rate_per_min=nan"),
        ({"rate_per_min": 20_000}, "give at most 12000"),
        ({"symbols": 0}, "symbols=0"),
        ({"symbols": 10**6}, "symbols=1000000"),
        ({"symbols": []}, "symbols="),
        ({"symbols": "BTCUSDT"}, "symbols='BTCUSDT'"),
        ({"symbols": ["A", "A"]}, "symbols="),
        ({"profile": "cascade", "hours": 0.1}, "give at least 0.2"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FeedError, match=re.escape(message)):
        synth(**arguments)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(FeedError, match="closer than its venue sends them"):
        synth(hours=0.0003, rate_per_min=1200, symbols=40)  # 22 orders in 1.08 s


# --- likeness


def recorded(recordings: Path) -> pd.DataFrame:
    names = ["symbol", "side", "type", "tif", "q", "p", "ap", "status", "l", "z", "ts_ms", "usd"]
    rows = pd.read_csv(recordings / "binance_recorder_2025-01-26.csv", header=None, names=names)
    rows = rows.drop_duplicates(["symbol", "ts_ms"]).sort_values("ts_ms", kind="stable", ignore_index=True)
    return rows.assign(side=rows["side"].str.lower(), notional=rows["ap"] * rows["z"])


def likeness(table: pd.DataFrame) -> pd.Series:
    """Statistics of a stretch of feed; minutes without an event do not count, since a recording has holes."""
    minutes = table.groupby(table["ts_ms"] // MINUTE_MS).size()
    peak = table[table["ts_ms"] // MINUTE_MS == minutes.idxmax()]
    shares = table["symbol"].astype(str).value_counts()
    gaps = table.groupby("symbol", observed=True)["ts_ms"].diff().dropna()
    notional = table["notional"]
    large = notional[notional > notional.quantile(0.95)]
    return pd.Series(
        {
            "quiet minute / mean": minutes.quantile(0.1) / minutes.mean(),
            "median minute / mean": minutes.median() / minutes.mean(),
            "worst minute / mean": minutes.max() / minutes.mean(),
            "spread of log minutes": np.log(minutes).std(),
            "symbols": len(shares),
            "symbols in the worst minute": peak["symbol"].nunique(),
            "share of the first symbol": shares.iloc[0] / len(table),
            "share of the first 10": shares.head(10).sum() / len(table),
            "share of the first 50": shares.head(50).sum() / len(table),
            "symbols with one event": (shares == 1).mean(),
            "5th percentile of gaps of a symbol": gaps.quantile(0.05),
            "ties": (table["ts_ms"].diff() == 0).mean(),
            "10th percentile of notional": notional.quantile(0.1),
            "median notional": notional.median(),
            "90th percentile of notional": notional.quantile(0.9),
            "99th percentile of notional": notional.quantile(0.99),
            "tail exponent": 1 / np.log(large / large.min()).mean(),
            "same side as the one before": (table["side"].astype(str) == table["side"].astype(str).shift()).mean(),
        }
    )


def test_normal_looks_like_the_recording(recordings: Path) -> None:
    real = recorded(recordings)
    minutes = real["ts_ms"].floordiv(MINUTE_MS).nunique()
    feed = synth(hours=48, rate_per_min=len(real) / minutes, seed=11)
    windows = [feed.iloc[at : at + len(real)] for at in range(0, len(feed) - len(real), len(real))]
    drawn = pd.DataFrame([likeness(window) for window in windows])
    table = pd.DataFrame({"real": likeness(real), "synthetic": drawn.median()})
    ratio = table["synthetic"] / table["real"]
    tolerance = pd.Series(1.35, table.index)
    # One recording has one worst minute and 18 events past its 99th percentile.
    tolerance[["worst minute / mean", "99th percentile of notional"]] = 1.8
    bad = table[(ratio > tolerance) | (ratio < 1 / tolerance)]
    assert bad.empty, f"{len(windows)} windows\n{table.assign(ratio=ratio).round(3)}"


def test_the_cascade_has_the_recorded_seconds(recordings: Path) -> None:
    timeline = pd.DataFrame(json.loads((recordings / "cascade_rates_2025-10-10.json").read_text())["timeline"])
    rows = timeline["liquidations"] + timeline["adls"]
    # Without other flow, so that every row is the cascade's.
    table = synth("cascade", hours=1, rate_per_min=0, seed=4)
    second = (table["ts_ms"] - START_MS - HOUR_MS // 4) // 1000
    assert len(table) == rows.sum() == 98_620
    assert second.min() >= 0
    count = second.value_counts()
    peaks = timeline["second"][rows >= 1000]
    assert len(peaks) > 20
    expected = rows[peaks.index].to_numpy()
    # Where the recording puts seconds of a few rows, the synthetic half minute is level.
    assert (count[peaks].to_numpy() >= expected).all()
    assert (count[peaks].to_numpy() <= expected + 2 * 2569 / 30).all()
    assert count.max() == count[61]
    halves = rows.groupby(timeline["second"] // 30).sum()
    assert (second // 30).value_counts().sort_index().to_dict() == halves.to_dict()


def test_auto_deleveragings_are_the_other_side_of_a_liquidation(cascade: pd.DataFrame) -> None:
    assert len(cascade) == 98_620 + 6_000
    assert not cascade.duplicated(["symbol", "ts_ms"]).any()
    keyed = cascade.astype({"symbol": str, "side": str}).assign(second=cascade["ts_ms"] // 1000)
    keys = ["second", "symbol", "price", "size"]
    sides = keyed.groupby([*keys, "side"]).size().unstack(fill_value=0)
    assert 34_983 <= sides.min(axis=1).sum() < 34_983 * 1.02


def test_the_cascade_lowers_prices(cascade: pd.DataFrame) -> None:
    bitcoin = cascade[cascade["symbol"] == "BTCUSDT"]
    before = bitcoin.loc[bitcoin["ts_ms"] < START_MS + HOUR_MS // 4, "price"].iloc[-1]
    assert 0.6 < bitcoin["price"].min() / before < 0.8
    assert bitcoin["price"].iloc[-1] > bitcoin["price"].min() * 1.1


# --- the wire


def lines(path: Path) -> list[str]:
    with pa.input_stream(str(path)) as stream:
        return stream.read().decode().splitlines()


def parsed(path: Path, format: str) -> pd.DataFrame:
    """Read a wire file by the book (FORMATS.md), without liqlab's readers."""
    rows: list[tuple[object, ...]] = []
    for line in lines(path):
        if format == "recorder":
            symbol, side, _, _, _, _, price, _, _, size, ts_ms, _ = line.split(",")
            rows.append((int(ts_ms), "binance", symbol + "USDT", side.lower(), float(price), float(size)))
            continue
        frame = json.loads(line)
        if format == "binance":
            order = frame["data"]["o"]
            values = order["T"], "binance", order["s"], order["S"].lower(), float(order["ap"]), float(order["z"])
            rows.append(values)
        elif format == "bybit":
            flipped = {"Buy": "sell", "Sell": "buy"}
            for o in frame["data"]:
                rows.append((o["T"], "bybit", o["s"], flipped[o["S"]], float(o["p"]), float(o["v"])))
        else:
            for o in frame["data"]:
                for d in o["details"]:
                    size = float(d["sz"]) * CONTRACTS[f"okx:{o['instId']}"]
                    rows.append((int(d["ts"]), "okx", o["instId"], d["side"], float(d["bkPx"]), size))
    ts_ms, exchange, symbol, side, price, size = zip(*rows, strict=True)
    notional = np.array(price) * np.array(size)
    return events.event_table(ts_ms, exchange, symbol, side, price, size, notional)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize(("format", "exchange"), EXCHANGES.items())
def test_what_is_written_reads_back_exactly(tmp_path: Path, format: str, exchange: str, suffix: str) -> None:
    table = synth(hours=1, exchange=exchange, seed=8)
    path = tmp_path / f"feed.{suffix}"
    written = write_wire(table, path, format, settings=SETTINGS)
    assert written == len(lines(path)) <= len(table)
    assert_frame_equal(rounded(parsed(path, format)), rounded(table))


@pytest.mark.parametrize(("format", "exchange"), EXCHANGES.items())
def test_the_readers_read_what_is_written(tmp_path: Path, format: str, exchange: str) -> None:
    table = synth("cascade", hours=0.3, rate_per_min=20, exchange=exchange, seed=8)
    path = tmp_path / "feed.jsonl.gz"
    write_wire(table, path, format, settings=SETTINGS)
    feed = read_feed(path, settings=SETTINGS)
    assert (feed.report.accepted, feed.report.duplicates, feed.report.rejected) == (len(table), 0, {})
    assert_frame_equal(rounded(feed.events), rounded(table))


def test_frames_have_the_captured_shape(tmp_path: Path, recordings: Path) -> None:
    captured = [json.loads(line) for line in (recordings / "captured_frames.jsonl").read_text().splitlines()]
    wanted = {
        "binance": next(f for f in captured if f.get("stream") == "!forceOrder@arr"),
        "bybit": next(f for f in captured if f.get("topic", "").startswith("allLiquidation")),
        "okx": next(f for f in captured if f.get("arg", {}).get("channel") == "liquidation-orders"),
    }

    def shape(value: object) -> object:
        if isinstance(value, dict):
            return [(key, shape(item)) for key, item in value.items()]
        if isinstance(value, list):
            return [shape(value[0])]
        return type(value)

    for exchange, frame in wanted.items():
        path = tmp_path / exchange
        write_wire(synth(hours=0.2, exchange=exchange), path, exchange, settings=SETTINGS)
        for line in lines(path):
            assert shape(json.loads(line)) == shape(frame)


def test_binance_orders_are_consistent(tmp_path: Path) -> None:
    path = tmp_path / "feed.jsonl"
    write_wire(synth(hours=2), path)
    pushed = 0
    partial = 0
    for line in lines(path):
        frame = json.loads(line)["data"]
        order = frame["o"]
        assert 935 <= frame["E"] - order["T"] <= 1008
        assert frame["E"] >= pushed
        assert 0 < float(order["l"]) <= float(order["z"]) == float(order["q"])
        # A sell is bankrupt below its fill, a buy above it; coarse ticks may make them equal.
        away = float(order["p"]) - float(order["ap"])
        assert away <= 0 if order["S"] == "SELL" else away >= 0
        pushed = frame["E"]
        partial += order["l"] != order["z"]
    assert 0.2 < partial / 12_000 < 0.7


def test_values_without_short_decimals_survive(tmp_path: Path) -> None:
    ts_ms = [START_MS, START_MS + 2000, START_MS + 4000]
    price, size = [0.1 + 0.2, 1e-13, 12.5], [1 / 3, 1e9 + 1 / 3, 4.0]
    table = events.event_table(
        ts_ms, ["binance"] * 3, ["ODDUSDT"] * 3, ["buy", "sell", "buy"], price, size, np.multiply(price, size)
    )
    write_wire(table, tmp_path / "feed")
    assert_frame_equal(rounded(parsed(tmp_path / "feed", "binance")), rounded(table))
    assert '"ap":"12.5"' in lines(tmp_path / "feed")[2]


def test_an_empty_table_makes_an_empty_file(tmp_path: Path) -> None:
    assert write_wire(events.empty(), tmp_path / "feed.jsonl.gz") == 0
    assert gzip.decompress((tmp_path / "feed.jsonl.gz").read_bytes()) == b""


def test_what_a_wire_cannot_carry_is_refused(tmp_path: Path) -> None:
    table = synth(hours=0.1)
    with pytest.raises(FeedError, match="format 'tape' is unknown; choose one of binance"):
        write_wire(table, tmp_path / "feed", "tape")
    with pytest.raises(FeedError, match="'binance' cannot be written as 'bybit'"):
        write_wire(table, tmp_path / "feed", "bybit")
    with pytest.raises(FeedError, match=r'set feeds.contract_sizes\["okx:'):
        write_wire(synth(hours=0.1, exchange="okx"), tmp_path / "feed", "okx")
    assert not (tmp_path / "feed").exists()


def test_compressed_files_are_reproducible(tmp_path: Path) -> None:
    table = synth(hours=0.1)
    for suffix in ("gz", "zst"):
        for name in ("one", "other"):
            write_wire(table, tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"other.{suffix}").read_bytes()


# --- the samples


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_says_how_a_sample_was_made(tmp_path: Path, command: str) -> None:
    words = shlex.split(command)[2:]
    options = dict(zip(words[::2], words[1::2], strict=True))
    out, format = Path(options.pop("--out")), options.pop("--format", "binance")
    profile, hours, seed = (options.pop(name) for name in ("--profile", "--hours", "--seed"))
    table = synth(profile, hours=float(hours), seed=int(seed), exchange=EXCHANGES[format])
    assert not options
    write_wire(table, tmp_path / out.name, format)
    # Two builds of zlib may compress differently; what is inside may not differ.
    made = gzip.decompress((tmp_path / out.name).read_bytes())
    assert made == gzip.decompress((DATA / out.name).read_bytes())


def test_samples_are_small_labelled_and_all_there() -> None:
    files = {path.name for path in DATA.iterdir()} - {"README.md"}
    assert files == {Path(shlex.split(command)[-1]).name for command in COMMANDS}
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 3_000_000
    assert "synthetic" in (DATA / "README.md").read_text(encoding="utf-8")
