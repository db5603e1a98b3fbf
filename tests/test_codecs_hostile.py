import random
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace

import msgpack
import numpy as np
import orjson
import pytest

import liqlab
from benchmarks.fuzz_codecs import fuzz, samples
from liqlab.codecs import CODECS, CodecError, Names
from liqlab.codecs.base import MAX_MS, MAX_NAME
from liqlab.codecs.blocks import MAX_EVENTS
from liqlab.codecs.entropy import LARGEST, Packer, Unpacker
from liqlab.events import Columns
from tests.test_codecs import TS, event, every_codec, written


@every_codec
@pytest.mark.parametrize(
    ("where", "bad"),
    [("price", -1.0), ("size", np.nan), ("price", np.inf), ("size", 0.0), ("ts_ms", MAX_MS), ("ts_ms", -1)],
)
def test_what_is_no_event_is_refused_by_all_with_its_values(codec, where, bad):
    events = replace(event(), **{where: np.array([bad])})
    assert codec.carries(events).tolist() == [False]
    with pytest.raises(CodecError, match=r"BTCUSDT.*no codec does"):
        codec.encode(events, Names())
    with pytest.raises(CodecError, match=f"{where}={bad}"):
        codec.encode(events, Names())


@every_codec
@pytest.mark.parametrize("name", ["", "x" * (MAX_NAME + 1), "\ud800"])
def test_a_name_that_is_none_is_refused(codec, name):
    for events in (event(symbol=name), event(exchange=name)):
        with pytest.raises(CodecError, match="name"):
            codec.encode(events, Names())


@every_codec
def test_numbers_beyond_the_names_and_wrong_shapes_are_refused(codec):
    rows = written(codec, event(), names := Names())
    assert len(codec.decode(np.zeros(0, np.int64), [], names)) == 0
    for bad in (
        [row[:-1] for row in rows],
        [[*row, b"1"] for row in rows],
        [[], *rows],
        [[b"x"] * len(rows[0])],
    ):
        with pytest.raises(CodecError, match=f"^{codec.name}: "):
            codec.decode(np.zeros(len(bad), np.int64), bad, names)
    with pytest.raises(CodecError, match=f"^{codec.name}: a value of {1 << 23} bytes"):
        codec.decode(np.zeros(1, np.int64), [[*rows[0][:-1], bytes(1 << 23)]], names)
    if not codec.own_time:
        with pytest.raises(CodecError, match="0 times for 1 rows"):
            codec.decode(np.zeros(0, np.int64), rows, names)
    if codec.name in ("ints", "struct19", "block"):
        for few in (Names(["sBTCUSDT"]), Names(["ebinance"])):
            with pytest.raises(CodecError, match="number 0, which cannot be"):
                codec.decode(np.array([TS]), rows, few)


def bombs():
    inner = zlib.compress(bytes(1 << 27), 9)
    deep = b"\xdd\xff\xff\xff\xff" + b"\xdc\xff\xff" * 3000
    head = struct.Struct(">BHHIHII").pack(1, MAX_EVENTS, 0, 0, 0, 0, 8)
    yield from (("msgpack-zlib", bomb) for bomb in (b"\1" + inner, b"\1" + zlib.compress(inner), b"\0" + deep))
    maps = msgpack.packb([{str(i): i for i in range(6)}] * MAX_EVENTS)
    yield from (
        ("msgpack-zlib", b"\1" + zlib.compress(bytes(data)))
        for data in (maps, b"\xdd\0\0\x80\0" + b"\x80" * MAX_EVENTS)
    )
    yield from (
        ("msgpack", deep[:16000]),
        ("msgpack", b"\xdf\xff\xff\xff\xff" + bytes(9)),
        ("json", b"[" * 16000),
        ("json", b"9" * 16000),
    )
    yield from (
        ("block", head + struct.pack(">Q", 1 << 31) + data) for data in (bytes(99), b"\xff" * 99, b"\xff" * (1 << 21))
    )
    arrays = b"\xdc\xff\xff" * 5000
    yield from (("msgpack", arrays), ("msgpack-zlib", b"\0\x91" + arrays), ("msgpack", b"\x81" * 9000))
    yield "block", head + struct.pack(">Q", (1 << 63) - 1) + random.Random(1).randbytes(1 << 21)


def test_a_bomb_takes_neither_memory_nor_time():
    market = Columns.of(liqlab.synth("cascade", hours=0.25, seed=1)).rows(slice(0, MAX_EVENTS))
    assert len(market) == MAX_EVENTS
    names = Names()
    honest = [("block", written(CODECS["block"], market, names)[0][0])]
    honest += [("msgpack-zlib", written(CODECS["msgpack-zlib"], market, names)[0][0])]
    for name, payload in [*honest, *bombs()]:
        begun = time.perf_counter()
        tracemalloc.start()
        try:
            CODECS[name].decode(np.array([TS]), [[payload]], names)
            assert (name, payload) in honest
        except CodecError:
            assert (name, payload) not in honest
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        took = time.perf_counter() - begun
        assert peak < 16 << 20, (name, payload[:20], peak)
        assert took < 5, (name, payload[:20], took)


def test_hostile_bytes_give_values_or_a_codec_error():
    counts = fuzz(100_000, seconds=100, seed=4)
    assert counts.total == 100_000
    assert min(counts.decoded.values()) > 20, "the mutations are so wild that no decoder gets far"
    assert min(counts.refused.values()) > 5000
    assert counts.slowest_s < 2


def test_the_fuzzer_finds_what_it_looks_for(monkeypatch):
    def careless(*args, **kwargs):
        raise KeyError("oops")

    monkeypatch.setattr(CODECS["json"], "_loaded", careless)
    with pytest.raises(AssertionError, match=r"json.decode.*KeyError"):
        fuzz(1000, seconds=60, seed=1)
    assert {sample.codec for sample in samples(random.Random(1), lies=1)[1]} == set(CODECS)


def test_maps_have_the_six_keys_and_their_kinds():
    good = {"symbol": "S", "side": "buy", "size": 1, "price": 2.5, "timestamp": 5, "exchange": "a"}
    wrong = [{**good, key: value} for key in good for value in (None, True, "1", [], {}, 1.5, -1, 0, 1 << 63)]
    wrong = [one for one in wrong if one["price"] not in (1.5, 1 << 63) and one["size"] not in (1.5, 1 << 63)]
    wrong = [one for one in wrong if one["symbol"] != "1" and one["exchange"] != "1" and one["timestamp"] != 0]
    wrong += [{**good, "more": 1}, {key: good[key] for key in list(good)[1:]}, [1, 2], "abcdef", 7, None, list(good)]
    for name, dump in (("json", orjson.dumps), ("msgpack", msgpack.packb)):
        assert CODECS[name].decode(np.zeros(1, np.int64), [[dump(good)]], Names()).price.tolist() == [2.5]
        for one in wrong:
            with pytest.raises(CodecError, match=f"^{name}: "):
                CODECS[name].decode(np.zeros(1, np.int64), [[dump(one)]], Names())


def test_a_block_ends_where_it_should():
    events, names = Columns.of(liqlab.synth("normal", hours=0.1, seed=2)), Names()
    for name in ("block", "msgpack-zlib"):
        payload = written(CODECS[name], events, names)[0][0]
        for bad in (payload + b"\0", payload[:-1], payload[: len(payload) // 2]):
            with pytest.raises(CodecError, match=f"^{name}: "):
                CODECS[name].decode(np.zeros(1, np.int64), [[bad]], names)
    payload = written(CODECS["block"], events, names)[0][0]
    runs = int.from_bytes(payload[15:19], "big")
    no_lanes, more_seeds, no_state = (19, b"\0"), (20, bytes([payload[19] + 1])), (21, bytes(6))
    for (at, wrong), message in ((no_lanes, "runs of"), (more_seeds, "runs of"), (no_state, "behind its end")):
        bad = payload[:at] + wrong + payload[at + len(wrong) :]
        with pytest.raises(CodecError, match=message):
            CODECS["block"].decode(np.zeros(1, np.int64), [[bad]], names)
    longer = payload[:15] + (runs + 4).to_bytes(4, "big") + payload[19 : 19 + runs] + bytes(4) + payload[19 + runs :]
    with pytest.raises(CodecError, match="go on behind the last event"):
        CODECS["block"].decode(np.zeros(1, np.int64), [[longer]], names)


@pytest.mark.parametrize("low", [0, 2])
def test_a_number_has_53_bits(low):
    for bits, fits in ((LARGEST - low, True), (LARGEST - low + 1, False), (64, False)):
        pack = Packer()
        pack.tokens(np.array([2 * bits - 2]))
        pack.bits(np.zeros(1, np.int64), 53)
        size, data = pack.finish()
        unpack = Unpacker("test", data[:size], data[size:])
        if fits:
            assert unpack.numbers(1, low=low).tolist() == [1 << LARGEST - 1]
        else:
            with pytest.raises(CodecError, match="more than 53 bits"):
                unpack.numbers(1, low=low)
