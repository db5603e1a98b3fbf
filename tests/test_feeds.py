"""Reading feeds as a whole: the account, duplicates, damage, paths, memory."""

import gzip
import json
import stat
import tempfile
import zipfile

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pytest

from liqlab import events as event_tables
from liqlab.clock import HOUR_MS, generator
from liqlab.feeds import Feed, FeedError, dedup, iter_feed, read_feed, source
from liqlab.feeds.dedup import Seen, mix
from liqlab.feeds.rows import number
from liqlab.settings import Settings
from tests.feeds_samples import SAMPLES, frame, lines

MS = 1_700_000_000_000


def account(report):
    assert report.read == report.accepted + report.duplicates + report.rejected_total
    return report.read, report.accepted, report.duplicates, report.rejected_total


@pytest.fixture
def options(tmp_path):
    return {"settings": Settings(feeds={"quarantine_dir": tmp_path / "quarantine"})}


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def frames(count, start=MS, step=37):
    return lines(*(frame(s=f"S{at % 7}USDT", T=start + at * step) for at in range(count)))


# --- the account ----------------------------------------------------------------------------------------------------


def test_the_account_holds_after_every_batch(tmp_path, options):
    path = tmp_path / "feed.jsonl"
    path.write_text("\n".join([frames(500), "{broken", frames(500), frames(500, start=MS + 10**7)]))
    reader = iter_feed(path, batch=100, **options)
    count = 0
    for batch in reader:
        count += len(batch)
        assert len(batch) <= 100
        account(reader.report)
        event_tables.check(batch)
    assert account(reader.report) == (1501, 1000, 500, 1)
    assert count == 1000


def test_batches_joined_are_the_feed(tmp_path, options):
    path = tmp_path / "feed.jsonl"
    path.write_text(frames(1000))
    joined = event_tables.concat(iter_feed(path, batch=77, **options))
    pd.testing.assert_frame_equal(joined, read_feed(path, **options).events)


def test_the_report_shows_itself(tmp_path, options):
    path = tmp_path / "<b>.jsonl"
    path.write_text("\n".join([frames(3), frames(1), "{broken <script>"]))
    feed = read_feed(path, **options)
    assert isinstance(feed, Feed)
    assert repr(feed).startswith("Feed(5 read, 3 accepted, 1 duplicates, 1 rejected; 3 symbols, 2023-11-14 22:13:20 to")
    table = feed.report.table().set_index("what")["value"]
    assert table["accepted"] == "3"
    assert table["rejected: not valid JSON"] == "1"
    assert "<script>" not in feed._repr_html_()
    facts = json.loads(json.dumps(feed.report.as_dict()))
    assert (facts["read"], facts["first_ms"], facts["last_ms"]) == (5, MS, MS + 74)
    assert facts["quarantine"] == str(feed.report.quarantine)


def test_reasons_stay_few_however_many_there_are(tmp_path, options):
    path = tmp_path / "feed.jsonl"
    path.write_text(
        SAMPLES["okx"] + "\n" + "\n".join(SAMPLES["okx"].replace("BTC-USDT", f"X{at}-USDT") for at in range(1000))
    )
    report = read_feed(path, **options).report
    assert account(report) == (2002, 2, 0, 2000)
    assert len(report.rejected) == 201
    assert report.rejected["other reasons"] == 1600


def test_an_empty_file_is_an_empty_feed(tmp_path, options):
    for text in ("", "\n\n \n"):
        path = tmp_path / "empty.jsonl"
        path.write_text(text)
        feed = read_feed(path, **options)
        assert account(feed.report) == (0, 0, 0, 0)
        assert len(event_tables.check(feed.events)) == 0
        assert feed.report.first_ms is None


# --- duplicates -----------------------------------------------------------------------------------------------------


def test_duplicates_near_and_far_and_across_files_and_spellings(tmp_path, options):
    first = tmp_path / "a.jsonl"
    first.write_text("\n".join([frames(3000), frames(1), frames(3000)]))
    second = tmp_path / "b.csv"
    second.write_text(f"S0USDT,SELL,LIMIT,IOC,0.2,60000.0,60100.50,FILLED,0.1,0.1500,{MS}")
    report = read_feed([first, second], **options).report
    assert account(report) == (6002, 3000, 3002, 0)
    assert read_feed([second, first], **options).report.accepted == 3000


def test_events_at_one_millisecond_are_told_apart(tmp_path, options):
    variants = [{}, {"s": "ETHUSDT"}, {"S": "BUY"}, {"ap": "60100.6"}, {"z": "0.151"}, {"T": MS + 1}]
    path = tmp_path / "feed.jsonl"
    path.write_text(lines(*(frame(**fields) for fields in variants * 2)))
    assert account(read_feed(path, **options).report) == (12, 6, 6, 0)


def test_seen_agrees_with_a_set():
    rng = generator(5)
    seen, known = Seen(), set()
    for _ in range(60):
        values = rng.integers(0, 3000, rng.integers(0, 400)).astype(np.uint64)
        times = (values % 7).astype(np.int64) * HOUR_MS
        new = seen.add(values, times)
        for value, fresh in zip(values.tolist(), new.tolist(), strict=True):
            assert fresh == (value not in known)
            known.add(value)
    assert len(seen) == len(known)


def test_the_oldest_hours_are_forgotten_first_and_it_is_said(tmp_path, options, monkeypatch):
    seen = Seen(capacity=150)
    for hour in range(3):
        seen.add(mix(np.arange(100) + 1000 * hour), np.full(100, hour * HOUR_MS))
    assert len(seen) == 100
    assert seen.forgotten == 200
    assert not seen.add(mix(np.arange(100) + 2000), np.full(100, 2 * HOUR_MS)).any()
    assert seen.add(mix(np.arange(100)), np.full(100, 0)).all()

    monkeypatch.setattr("liqlab.feeds.CAPACITY", 100)
    path = tmp_path / "feed.jsonl"
    path.write_text("\n".join(frames(90, start=MS + hour * HOUR_MS) for hour in range(3)))
    assert any("forgotten" in note for note in read_feed(path, **options).report.notes)


def test_the_mixer_spreads_neighbours():
    hashes = mix(np.arange(200_000), np.zeros(200_000, np.int64))
    assert len(np.unique(hashes)) == 200_000
    assert len(np.unique(hashes >> np.uint64(52))) == 4096
    assert (mix(np.array([1.0]), np.array([2.0])) != mix(np.array([2.0]), np.array([1.0]))).all()


# --- paths, compression, damage ---------------------------------------------------------------------------------------


def test_paths_of_every_kind(tmp_path, options):
    text = frames(200).encode()
    folder = tmp_path / "feeds" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(text)
    half = len(text.splitlines()[0]) * 50 + 50
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(text[:half]) + gzip.compress(text[half:]))
    (folder / "c.zst").write_bytes(zstd(text[:half]) + zstd(text[half:]))
    with zipfile.ZipFile(folder / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one.jsonl", text[:half])
        archive.writestr("README", "not a feed")
        archive.writestr("BTCUSD_PERP-liquidationSnapshot-2024-01-01.csv", SAMPLES["binance archive"])
    (folder / "README.md").write_text("# not a feed")
    for path in sorted(folder.iterdir())[1:4]:
        assert account(read_feed(path, **options).report) == (200, 200, 0, 0)
    report = read_feed(folder / "d.zip", **options).report
    assert "BTCUSD_PERP" in report.symbols
    for paths in (
        tmp_path / "feeds",
        str(tmp_path / "feeds" / "**" / "*.*"),
        [folder / "a.jsonl", str(folder / "[bcd].*")],
    ):
        report = read_feed(paths, **options).report
        assert report.accepted == 201
        assert len(report.files) == 5


def test_a_missing_path_says_so(tmp_path):
    for path in (tmp_path / "none.csv", str(tmp_path / "*.csv"), tmp_path, []):
        with pytest.raises(FeedError, match=r"pass a file, a folder or a glob"):
            read_feed(path)


@pytest.mark.parametrize("kind", ["gz", "zst", "zip", "parquet"])
def test_a_cut_file_keeps_what_came_before_the_cut(tmp_path, options, kind):
    rng = generator(8)
    text = lines(*(frame(z=f"{rng.random():.9f}", ap=f"{rng.random() * 1e5 + 1:.7f}", T=MS + at) for at in range(4000)))
    path = tmp_path / f"cut.{kind}"
    if kind == "gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "zst":
        path.write_bytes(zstd(text.encode()))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jsonl", text)
    else:
        (tmp_path / "whole.jsonl").write_text(text)
        read_feed(tmp_path / "whole.jsonl", **options).events.to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * 0.9)])
    report = read_feed(path, **options).report
    assert any("cut short" in reason or "damaged" in reason for reason in report.rejected)
    account(report)
    if kind in ("gz", "zst"):
        assert report.accepted > 3000


def test_junk_inside_a_file_costs_its_lines_only(tmp_path, options):
    path = tmp_path / "feed.jsonl"
    junk = [
        b"\x00\xff\xfe" * 50,
        b"caf\xe9",
        b'{"e":"forceOrder"',
        b"\xff{}",
        b'"just text"',
        b"12,34",
        b"null",
        b"[1,2]",
    ]
    good = frames(8).encode().splitlines()
    path.write_bytes(b"\r\n".join(line for pair in zip(good, junk, strict=True) for line in pair))
    report = read_feed(path, **options).report
    assert account(report) == (16, 8, 0, 8)
    entries = [json.loads(line) for line in report.quarantine.read_bytes().splitlines()]
    assert [entry["line"] for entry in entries] == list(range(2, 17, 2))
    assert entries[1]["raw"] == "caf\\xe9"


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, options, monkeypatch):
    monkeypatch.setattr(source, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "feed.jsonl"
    path.write_text("\n".join([frames(10), "x" * (9 << 20), frames(10, start=MS + 10**6)]))
    report = read_feed(path, **options).report
    assert report.accepted == 20
    assert account(report)[3] == 1


def test_one_json_document_on_many_lines(tmp_path, options):
    path = tmp_path / "feed.json"
    messages = [json.loads(line) for line in frames(20).splitlines()]
    path.write_text(json.dumps(messages, indent=2))
    assert account(read_feed(path, **options).report) == (20, 20, 0, 0)
    path.write_text("[\n" + ",\n".join(json.dumps(message) for message in messages) + "\n]\n")
    report = read_feed(path, **options).report
    assert account(report) == (20, 20, 0, 0)
    assert report.ignored == {"bracket of a JSON array": 2}


def test_a_byte_order_mark_and_windows_line_ends_are_no_content(tmp_path, options):
    path = tmp_path / "feed.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + frames(20).replace("\n", "\r\n").encode())
    assert account(read_feed(path, **options).report) == (20, 20, 0, 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", 1.0),
        (" 1.5 ", 1.5),
        ("5.99e-05", 5.99e-05),
        (2, 2.0),
        (10**400, None),
        (True, None),
        ("1_0", None),
        ("0x1", None),
        ("", None),
        (None, None),
        ("None", None),
        ([1], None),
    ],
)
def test_numbers(value, expected):
    found = number(value)
    assert found == expected if expected is not None else np.isnan(found)


def test_a_reader_that_is_left_early_can_be_closed(tmp_path, options):
    path = tmp_path / "feed.jsonl"
    path.write_text("{broken\n" + frames(100))
    reader = iter_feed(path, batch=10, **options)
    next(reader)
    reader.close()
    assert list(reader) == []
    assert len(reader.report.quarantine.read_text().splitlines()) == 1


def test_progress_ends_at_the_whole(tmp_path, options):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz")]
    paths[0].write_text(frames(30_000))
    paths[1].write_bytes(gzip.compress(frames(100).encode()))
    calls = []
    read_feed(paths, progress=lambda done, total: calls.append((done, total)), **options)
    total = sum(path.stat().st_size for path in paths)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (total, total)
    assert len(calls) > 3


# --- quarantine -------------------------------------------------------------------------------------------------------


def test_the_quarantine_is_private_and_does_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    path = tmp_path / "feed.jsonl"
    path.write_text(frames(2) + "\n{broken")
    places = {read_feed(path, settings=Settings()).report.quarantine for _ in range(3)}
    assert len(places) == 1
    place = places.pop()
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert len(place.read_text().splitlines()) == 1
    path.write_text(frames(2))
    assert read_feed(path, settings=Settings()).report.quarantine is None
    assert not place.exists()
    assert list(place.parent.iterdir()) == []


def test_no_quarantine_through_someone_else_s_link(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    path = tmp_path / "feed.jsonl"
    path.write_text(frames(2) + "\n{broken")
    home = read_feed(path, settings=Settings()).report.quarantine.parent
    home.rename(tmp_path / "elsewhere")
    home.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FeedError, match=r"feeds\.quarantine_dir"):
        read_feed(path, settings=Settings())


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_long_feed_is_read_in_bounded_memory(tmp_path, options):
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for hour in range(10):
            file.write(frames(20_000, start=MS + hour * HOUR_MS, step=100) + "\n")
    reader = iter_feed(path, batch=10_000, **options)
    next(reader)
    before = psutil.Process().memory_info().rss
    assert sum(len(batch) for batch in reader) == 190_000
    # The text alone has 37 MB; what may stay is 8 bytes an event and one block.
    assert path.stat().st_size > 35e6
    assert psutil.Process().memory_info().rss - before < 25e6
    assert dedup.CAPACITY * 8 < 130e6
