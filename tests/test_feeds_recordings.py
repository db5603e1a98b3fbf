"""The real recordings beside the project: counts of their README, and what is known of their content."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from liqlab import events as event_tables
from liqlab.feeds import FeedError, read_feed
from liqlab.settings import Settings

RECORDINGS = Path(__file__).parents[2] / "shared" / "feeds" / "recordings"
pytestmark = pytest.mark.skipif(not RECORDINGS.is_dir(), reason="the recordings are not beside this checkout")


@pytest.fixture
def options(tmp_path):
    return {"settings": Settings(feeds={"quarantine_dir": tmp_path / "quarantine"})}


def account(report):
    assert report.read == report.accepted + report.duplicates + report.rejected_total
    return report.read, report.accepted, report.duplicates, report.rejected_total


COUNTS = [
    ("binance_recorder_2025-01-26.csv", {}, (3510, 1837, 1673, 0), 221),
    ("binance_two_tables_2024-12.csv", {"symbol": "BTCUSDT"}, (2417, 2417, 0, 0), 1),
    ("binance_two_tables_2024-12.csv", {}, (2417, 1844, 0, 573), 1),
    ("binance_history_no_symbol.csv", {"symbol": "BTCUSDT"}, (242, 242, 0, 0), 1),
    ("binance_history_no_symbol.csv", {}, (242, 0, 0, 242), 0),
    ("BTCUSD_PERP-liquidationSnapshot-2024-10-01.head.csv", {}, (14, 7, 7, 0), 1),
    ("captured_frames.jsonl", {}, (19, 18, 0, 1), 14),
    ("bybit_old_1s_frames.jsonl", {}, (4, 4, 0, 0), 1),
    ("bitmex_liquidation_ws_2024-11-13.jsonl", {}, (11, 0, 0, 11), 0),
    ("multi_venue_2026-04-03.csv", {}, (55, 55, 0, 0), 1),
    ("iso_time_no_zone.csv", {}, (12, 12, 0, 0), 11),
]


@pytest.mark.parametrize(("name", "kwargs", "expected", "symbols"), COUNTS)
def test_a_recording_has_the_counts_of_its_readme(options, name, kwargs, expected, symbols):
    feed = read_feed(RECORDINGS / name, **kwargs, **options)
    assert account(feed.report) == expected
    assert len(feed.report.symbols) == symbols
    assert len(feed) == feed.report.accepted
    event_tables.check(feed.events)


def test_the_recorder_s_burst_is_there(options):
    events = read_feed(RECORDINGS / "binance_recorder_2025-01-26.csv", **options).events
    assert (events["ts_ms"] // 60_000).value_counts().max() == 335
    assert {"BTCUSDT", "BTCUSDC"} <= set(events["symbol"])


def test_a_recording_without_a_symbol_says_how_to_name_it(options):
    report = read_feed(RECORDINGS / "binance_history_no_symbol.csv", **options).report
    assert any("symbol=" in reason for reason in report.rejected)


def test_the_three_venues_of_one_table_agree_on_side_and_size(options):
    events = read_feed(RECORDINGS / "multi_venue_2026-04-03.csv", **options).events
    raw = pd.read_csv(RECORDINGS / "multi_venue_2026-04-03.csv").sort_values("event_ts", kind="stable")
    assert (events["side"].astype(str).to_numpy() == raw["side"].map({"short": "buy", "long": "sell"})).all()
    factor = raw["exchange"].map({"okx": 0.1}).fillna(1.0)
    assert np.allclose(events["size"], raw["qty"] * factor)


def test_bitmex_with_times_of_receipt_values_all_but_the_quanto(options, tmp_path):
    text = (RECORDINGS / "bitmex_liquidation_ws_2024-11-13.jsonl").read_text().splitlines()
    path = tmp_path / "bitmex.txt"
    path.write_text("\n".join(f"{1_731_494_066.5 + at}: {line}" for at, line in enumerate(text)))
    report = read_feed(path, **options).report
    assert account(report) == (11, 9, 0, 2)
    assert all("bitmex:ETHUSD" in reason for reason in report.rejected)


def test_a_folder_is_read_and_what_is_no_feed_in_it_is_passed_over(options):
    report = read_feed(RECORDINGS, **options).report
    account(report)
    assert len(report.files) == 9
    assert report.ignored["file of no known format"] == 1
    assert any("cascade_rates" in note for note in report.notes)
    with pytest.raises(FeedError, match="cascade_rates"):
        read_feed(RECORDINGS / "cascade_rates_2025-10-10.json", **options)
