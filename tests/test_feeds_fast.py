"""The fast path and the exact path must agree on everything, and nothing that is fed to them may break the account."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liqlab.clock import generator
from liqlab.feeds import FeedError, fast, read_feed
from tests.feeds_samples import SAMPLES, frame


def lines_of(count, seed=1, **fields):
    rng = generator(seed)
    for at in range(count):
        yield json.dumps(
            frame(
                s=f"S{rng.integers(40)}USDT",
                S=("BUY", "SELL")[rng.integers(2)],
                ap=f"{rng.random() * 9000 + 0.01:.{rng.integers(1, 8)}f}",
                z=f"{rng.random() * 10 + 0.001:.3f}",
                T=1_700_000_000_000 + 37 * at,
                **fields,
            ),
            separators=(",", ":"),
        ).encode()


def read_both(tmp_path, monkeypatch, data, **kwargs):
    """Read `data` as it is, and again with the fast path switched off; return both feeds."""
    path = tmp_path / "feed.jsonl"
    path.write_bytes(data)
    quick = read_feed(path, quarantine=tmp_path / "quick.jsonl", **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(fast, "read", lambda *args: None)
        exact = read_feed(path, quarantine=tmp_path / "exact.jsonl", **kwargs)
    return quick, exact


def assert_same(quick, exact):
    for name in ("exchange", "symbol", "side"):
        assert quick.events[name].astype(str).tolist() == exact.events[name].astype(str).tolist()
    for name in ("ts_ms", "price", "size", "notional"):
        np.testing.assert_array_equal(quick.events[name].to_numpy(), exact.events[name].to_numpy())
    first, second = quick.report.as_dict(), exact.report.as_dict()
    first.pop("quarantine"), second.pop("quarantine")
    assert first == second


def test_the_fast_path_takes_plain_frames_whole():
    data = b"\n".join(lines_of(500)) + b"\n"
    rows, left = fast.read(data, 1, None)
    assert len(rows) == 500
    assert left == []
    assert rows.line.tolist() == list(range(1, 501))


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_it_agrees_with_the_json_parser(tmp_path, monkeypatch, combined, end):
    lines = list(lines_of(3000))
    if combined:
        lines = [b'{"stream":"!forceOrder@arr","data":' + line + b"}" for line in lines]
    data = b"\n".join(lines + lines[::7]) + end
    assert fast.read(data, 1, None) is not None
    quick, exact = read_both(tmp_path, monkeypatch, data)
    assert_same(quick, exact)
    assert quick.report.accepted == 3000
    assert quick.report.duplicates == len(lines[::7])


def test_frames_of_both_margins_are_told_apart(tmp_path, monkeypatch):
    linear = list(lines_of(50, st=1, ps="X"))
    inverse = [
        line.replace(b'"st":1', b'"st":2').replace(b"USDT", b"USD_PERP") for line in lines_of(50, 2, st=1, ps="X")
    ]
    data = b"\n".join(line for pair in zip(linear, inverse, strict=True) for line in pair)
    _, left = fast.read(data, 1, None)
    assert left == []
    quick, exact = read_both(tmp_path, monkeypatch, data)
    assert_same(quick, exact)
    inverse_rows = quick.events[quick.events["symbol"].astype(str).str.endswith("PERP")]
    assert len(inverse_rows) == 50
    assert np.allclose(inverse_rows["size"] * inverse_rows["price"], inverse_rows["notional"])


# Each of these is read differently, or not at all, by JSON: none may slip through as the template's twin.
TWISTS = [
    (b'"T":17', b'"T":017'),
    (b'"T":17', b'"T":07'),
    (b'"T":17', b'"T":1e'),
    (b'"T":17', b'"T":1x'),
    (b'"T":17', b'"T":-7'),
    (b'"T":17', b'"T":1.'),
    (b'"ap":"', b'"ap":" '),
    (b'"ap":"', b'"ap":"-'),
    (b'"ap":"', b'"ap":"x'),
    (b'"ap":"', b'"ap":"+'),
    (b'"ap":"', b'"ap":"1e'),
    (b'"ap":"', b'"ap":"0x'),
    (b'"z":"', b'"z":"1_0'),
    (b'"ap":"', b'"ap":"inf","x":"'),
    (b'"s":"S', b'"s":"\\u0053'),
    (b'"s":"S', b'"s":"\x01'),
    (b'"s":"S', b'"s":"\xff'),
    (b'"s":"S', b'"s":"\xe5\xb8\x81'),
    (b'"s":"S', b'"s":"S","s":"A'),
    (b'"S":"SELL"', b'"S":"HOLD"'),
    (b'"S":"SELL"', b'"S":SELL'),
    (b'"S":"SELL"', b'"S":null'),
    (b'"X":"FILLED"', b'"X":"NEW"'),
    (b'"e":"forceOrder"', b'"e":"aggTrade"'),
    (b'"e"', b'"f"'),
    (b"}}", b"}"),
    (b"}}", b"}}}"),
    (b"}}", b"}} "),
    (b"}}", b"}},"),
    (b",", b", "),
    (b":", b"\t:"),
    (b"{", b"\r\n{"),
    (b'"o":{', b'"o":['),
]


@pytest.mark.parametrize(("old", "new"), TWISTS)
def test_a_twisted_line_is_read_as_json_reads_it(tmp_path, monkeypatch, old, new):
    lines = list(lines_of(60))
    for at in (0, 17, 18, 59):
        for count in (1, -1):
            twisted = list(lines)
            twisted[at] = twisted[at].replace(old, new, count)
            quick, exact = read_both(tmp_path, monkeypatch, b"\n".join(twisted))
            assert_same(quick, exact)


def test_of_two_equal_keys_the_one_that_json_takes_counts(tmp_path, monkeypatch):
    outer = [line[:-1] + b',"s":"OUTERUSDT","T":1600000000000}' for line in lines_of(20)]
    inner = [line.replace(b'"s":"S', b'"s":"OTHERUSDT","s":"S') for line in lines_of(20, 2)]
    for lines in (outer, inner):
        quick, exact = read_both(tmp_path, monkeypatch, b"\n".join(lines))
        assert_same(quick, exact)
        assert not {"OUTERUSDT", "OTHERUSDT"} & set(quick.report.symbols)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_mutation_is_read_as_json_reads_it(tmp_path_factory, data):
    lines = list(lines_of(12, seed=data.draw(st.integers(0, 5))))
    text = bytearray(b"\n".join(lines))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.sampled_from(["set", "delete", "insert", "copy"]))
        byte = data.draw(st.sampled_from(list(b'"{}:,0123456789.-eE\\ \n\tapsSTz\xe5\xff\x00')))
        if kind == "set":
            text[at] = byte
        elif kind == "delete":
            del text[at]
        elif kind == "insert":
            text.insert(at, byte)
        else:
            text[at:at] = text[at : at + data.draw(st.integers(1, 60))]
    with pytest.MonkeyPatch.context() as patch:
        try:
            quick, exact = read_both(tmp_path_factory.mktemp("mutated"), patch, bytes(text))
        except FeedError:
            pytest.fail("twelve lines with six wounds hold at least one frame")
        assert_same(quick, exact)


def mutate(rng, lines):
    """Return one wounded line: bytes flipped, deleted, cut off, doubled, or two lines grown together."""
    line = bytearray(lines[rng.integers(len(lines))])
    kind = rng.integers(6)
    if kind == 0:
        for at in rng.integers(0, len(line), rng.integers(1, 4)):
            line[at] = rng.integers(256)
    elif kind == 1:
        start = rng.integers(len(line))
        del line[start : start + rng.integers(1, 8)]
    elif kind == 2:
        del line[rng.integers(1, len(line) + 1) :]
    elif kind == 3:
        start = rng.integers(len(line))
        line[start:start] = line[start : start + rng.integers(1, 40)]
    elif kind == 4:
        other = lines[rng.integers(len(lines))]
        line = line[: rng.integers(len(line))] + other[rng.integers(len(other)) :]
    else:
        digits = [at for at, code in enumerate(line) if 48 <= code < 58]
        for at in rng.choice(digits, min(len(digits), 3)) if digits else ():
            line[at] = rng.integers(48, 58)
    return bytes(line)


def test_100_000_mutated_lines_of_every_format_keep_the_account(tmp_path):
    rng = generator(20)
    lines = [line for sample in SAMPLES.values() for line in sample.encode().splitlines()]
    path = tmp_path / "wounded.txt"
    path.write_bytes(b"\n".join([*lines, *(mutate(rng, lines) for _ in range(100_000))]))
    feed = read_feed(path, quarantine=tmp_path / "rejected.jsonl")
    report = feed.report
    assert report.read == report.accepted + report.duplicates + report.rejected_total
    assert report.accepted == len(feed.events)
    assert report.read > 50_000
    assert report.rejected_total > 10_000
    assert len(report.rejected) <= 201
    assert len(report.quarantine.read_bytes().splitlines()) == report.rejected_total
    events = feed.events
    assert events["ts_ms"].is_monotonic_increasing
    for name in ("price", "size", "notional"):
        assert np.isfinite(events[name]).all()
        assert (events[name] > 0).all()
    assert pd.to_datetime(events["ts_ms"], unit="ms").dt.year.between(2009, 2099).all()
    assert not events["symbol"].astype(str).str.contains(r"[\s{}*]").any()
