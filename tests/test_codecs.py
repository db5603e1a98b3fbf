import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import liqlab
from liqlab import clock
from liqlab.codecs import BY_FIELD, CODECS, CodecError, Names, block_span
from liqlab.codecs.base import MAX_MS, MAX_NAME
from liqlab.codecs.blocks import MAX_EVENTS
from liqlab.codecs.entropy import MAX_TOKENS, Packer, Unpacker, _shares
from liqlab.codecs.numbers import scaled
from liqlab.events import Columns, Event

RECORDING = Path(__file__).parents[2] / "shared/feeds/recordings/binance_recorder_2025-01-26.csv"
TS = 1_700_000_000_000
GOLDEN = "020002018bcfe56800018bcfe5680000000008010100046c1f6bae001f83060fc007e0057f800c1f8d383f639bc2c1f8007e00701f93"
NAMED = st.sampled_from(["BTCUSDT", "1000PEPEUSDT", "BTC-USD-SWAP", "币安人生USDT", "x" * MAX_NAME])
DECIMALS = st.builds(lambda digits, places: digits / 10**places, st.integers(1, 10**9), st.integers(0, 9))
FLOATS = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


def events_of(numbers):
    """Events with many equal times and the given numbers as prices and sizes."""
    drawn = st.tuples(
        st.integers(0, 3), st.sampled_from("ab"), NAMED, st.sampled_from(["buy", "sell"]), numbers, numbers
    )
    made = drawn.map(lambda e: Event(TS + e[0], *e[1:], e[4] * e[5]))
    return st.lists(made, min_size=1, max_size=20).map(Columns.of_events)


def event(price=2.0, size=3.0, ts_ms=TS, symbol="BTCUSDT", exchange="binance", side="sell"):
    return Columns.of_events([Event(ts_ms, exchange, symbol, side, price, size, price * size)])


def values(events):
    """The events, numbers bit for bit."""
    names = (
        [names[code] for code in codes]
        for names, codes in ((events.exchanges, events.exchange), (events.symbols, events.symbol))
    )
    floats = (events.price.view(np.int64), events.size.view(np.int64), (events.price * events.size).view(np.int64))
    return list(zip(events.ts_ms.tolist(), *names, events.side.tolist(), *(f.tolist() for f in floats), strict=True))


def written(codec, events, names, own=False):
    return [[v if isinstance(v, bytes) else v.encode() for v in row] for row in codec.encode(events, names, own=own)]


def comes_back(codec, events, names=None, own=None):
    names = Names() if names is None else names
    rows = written(codec, events, names, own is not None)
    assert len(rows) == (1 if codec.block else len(events))
    assert {len(row) for row in rows} == {len(codec.fields_of(own is not None))}
    back = codec.decode(
        events.ts_ms if codec.own_time is False else np.zeros(len(rows), np.int64), rows, names, own=own
    )
    assert values(back) == values(events)
    assert back.notional.tolist() == (events.price * events.size).tolist()
    return rows


every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


@every_codec
@given(events_of(DECIMALS))
def test_decimals_come_back_whatever_the_codec(codec, events):
    assert codec.carries(events).all()
    comes_back(codec, events)


@every_codec
@given(events_of(FLOATS | DECIMALS))
def test_any_number_comes_back_to_the_bit_or_is_refused(codec, events):
    carried = codec.carries(events)
    with np.errstate(over="ignore", under="ignore"):
        possible = (events.price * events.size > 0) & (events.price * events.size < np.inf)
    if codec.name in ("ints", "struct19"):
        assert not (carried & ~possible).any()
    else:
        assert carried.tolist() == possible.tolist()
    if carried.any():
        comes_back(codec, events.rows(np.flatnonzero(carried)))
    for row in np.flatnonzero(~carried):
        with pytest.raises(CodecError, match=f"^{codec.name}: cannot carry row 0, Event"):
            codec.encode(events.rows(slice(row, row + 1)), Names())


@every_codec
@given(events_of(DECIMALS), st.booleans())
def test_a_stream_of_one_symbol_need_not_name_it(codec, events, known):
    events = replace(events, symbol=np.zeros(len(events), np.int64))
    names = Names(["sETHUSDT"] if known else [])
    rows = comes_back(codec, events, names, own=events.symbols[0])
    assert events.symbols[0] not in names.symbols
    if codec.name not in ("ints", "struct19", "block"):
        with_name = written(codec, events, names)
        assert values(codec.decode(events.ts_ms, with_name, names, own=events.symbols[0])) == values(events)
        with pytest.raises(CodecError, match="in the stream of 'ANOTHER'"):
            codec.decode(events.ts_ms, with_name, names, own="ANOTHER")
    elif codec.name != "block":
        other = written(codec, event(symbol="2nd"), Names(["s1st"]))
        with pytest.raises(CodecError, match="symbol number 1"):
            codec.decode(np.array([TS]), other, names, own="1st")
    assert rows


@given(price=DECIMALS, notional=st.integers(1, 10**7))
def test_sizes_of_inverse_contracts_are_carried_by_their_notional(price, notional):
    events = event(price, notional / price)
    for name in ("ints", "struct19", "block"):
        comes_back(CODECS[name], events)


def test_every_boundary_of_a_mantissa_comes_back():
    edges = sorted({n for bits in range(54) for n in ((1 << bits) - 1, 1 << bits, (1 << bits) + 1) if 0 < n < 1 << 53})
    for places in range(16):
        digits = np.array(edges) / 10.0**places
        rows = [Event(TS, "a", "S", side, number, 1.0, number) for number in digits for side in ("buy", "sell")]
        rows += [Event(TS, "a", "S", "buy", 1.0, number, number) for number in digits]
        events = Columns.of_events(rows)
        for name in ("ints", "block"):
            carried = CODECS[name].carries(events)
            # Sixteen digits are too many for some products to be rounded to the right one.
            assert carried[(events.price * 10.0**places < 1e15) & (events.size * 10.0**places < 1e15)].all()
            comes_back(CODECS[name], events.rows(np.flatnonzero(carried)))


def test_struct19_carries_36_bits_of_price_and_35_of_size():
    codec = CODECS["struct19"]
    for bits, make in ((36, lambda n: event(price=n)), (35, lambda n: event(size=n, price=3.0))):
        for number, carried in (((1 << bits) - 1, True), ((1 << bits) + 1, False), ((1 << bits) / 16 - 1 / 16, False)):
            assert codec.carries(make(float(number))).tolist() == [carried], (bits, number)
        comes_back(codec, make(float((1 << bits) - 1)))
    comes_back(codec, event(price=0.1, size=1e-15))
    comes_back(codec, event(ts_ms=MAX_MS - 1))


@pytest.mark.parametrize("name", ["ints", "struct19", "block"])
def test_every_exchange_and_the_last_symbol_have_a_number(name):
    names = Names([*(f"e{i}" for i in range(128)), *(f"s{i}" for i in range(1 << 16))])
    events = Columns.of_events(
        Event(TS, str(i), symbol, "buy", 1.5, 0.25, 0.375) for i in range(128) for symbol in ("0", "51", "819", "65535")
    )
    comes_back(CODECS[name], events, names)
    for full in (event(exchange="128"), event(symbol="65536", exchange="0")):
        with pytest.raises(CodecError, match="would be number"):
            CODECS[name].encode(full, names)


def test_the_layouts_are_what_the_documentation_says():
    names = Names(["ebinance", "eokx", "sETHUSDT", "sBTCUSDT"])
    ints, struct19, block = CODECS["ints"], CODECS["struct19"], CODECS["block"]
    assert ints.encode(event(88_843.1, 0.151), names) == [[str(1 * 5 + 3), str(-(888431 * 8 + 1)), "151"]]
    assert ints.encode(event(3.0, 0.00151, side="buy"), names) == [["9", str((3 << 4) << 3), str(151 << 5 | 5)]]
    assert ints.encode(event(0.5, 7.0, exchange="okx", side="buy"), names) == [[str(~(5 << 3)), "41", "7"]]
    assert ints.encode(event(0.3, 100 / 0.3), names, own=True) == [["4", str(-(3 * 8 + 1)), str(100 << 5 | 16)]]
    # Sixteen digits would do, but the notional has one; and the eighth exchange is written out.
    assert ints.encode(event(0.7, 3 / 0.7), names, own=True)[0][2] == str(3 << 5 | 16)
    eight = Names([f"e{i}" for i in range(9)])
    for number, low in ((7, 6), (8, 8 << 3 | 7)):
        assert ints.encode(event(0.5, 7.0, exchange=str(number)), eight, own=True)[0][0] == str(~low)
    rows = struct19.encode(event(88_843.1, 0.151, exchange="okx"), names)
    assert rows == [[TS.to_bytes(6) + b"\0\1" + b"\3" + (1 << 36 | 888431).to_bytes(5) + (3 << 36 | 151).to_bytes(5)]]
    assert len(rows[0][0]) == 19
    two = replace(event(88_843.1, 0.151).rows(np.zeros(2, np.intp)), price=np.array([88_843.1, 88_842.5]))
    assert block.encode(two, names)[0][0].hex() == GOLDEN


def test_a_block_tells_its_span_from_its_header_alone():
    events = Columns.of(liqlab.synth("normal", hours=0.1, seed=2))
    payload = CODECS["block"].encode(events, Names())[0][0]
    assert block_span(payload) == block_span(payload[:19]) == (len(events), events.ts_ms[0], events.ts_ms[-1])
    for bad in (payload[:18], b"\7" + payload[1:], payload[:1] + b"\0\0" + payload[3:], payload[:9] + bytes(10)):
        with pytest.raises(CodecError, match=r"^block: "):
            block_span(bad)


@pytest.mark.parametrize("name", ["block", "msgpack-zlib"])
def test_a_block_has_events_in_bounds_and_several_are_read_at_once(name):
    codec, names = CODECS[name], Names()
    one, two = Columns.of(liqlab.synth("normal", hours=0.1, seed=3)), event(ts_ms=5)
    rows = written(codec, one, names) + written(codec, two, names)
    assert values(codec.decode(np.zeros(2, np.int64), rows, names)) == values(one) + values(two)
    many = event().rows(np.zeros(MAX_EVENTS + 1, np.intp))
    comes_back(codec, many.rows(slice(1, None)))
    with pytest.raises(CodecError, match=f"{MAX_EVENTS + 1} events"):
        codec.encode(many, names)


@given(
    st.lists(st.tuples(DECIMALS, st.integers(1, 10**6), st.sampled_from(["plain", "inverse", "verbatim"])), min_size=1)
)
def test_a_block_mixes_sizes_of_all_kinds(drawn):
    make = {"plain": lambda p, n: n / 8, "inverse": lambda p, n: n / p, "verbatim": lambda p, n: n * np.pi}
    rows = [Event(TS, "a", "S", "buy", price, make[kind](price, n), 1.0) for price, n, kind in drawn]
    comes_back(CODECS["block"], Columns.of_events(rows))


def test_a_block_has_the_longest_prices_and_waits():
    edges = [(0, 2.0**39), (1 << 46, 0.0001), (MAX_MS - 1, 2.0**39 - 1)]
    events = Columns.of_events(Event(ms, "a", "S", "buy", price, 1.0, price) for ms, price in edges)
    comes_back(CODECS["block"], events)


def test_a_batch_is_compressed_when_that_saves_more_than_a_tenth(monkeypatch):
    events = event().rows(np.zeros(11, np.intp))
    map_bytes = len(CODECS["msgpack-zlib"].encode(event(), Names())[0][0]) - 2
    pays_not = -(-9 * (1 + 11 * map_bytes) // 10)
    for size, kind in ((pays_not, 0), (pays_not - 1, 1)):
        monkeypatch.setattr("liqlab.codecs.blocks.zlib.compress", lambda data, level, size=size: data[:size])
        assert CODECS["msgpack-zlib"].encode(events, Names())[0][0][0] == kind


def test_a_block_is_in_time_order_and_a_batch_compressed_when_it_pays():
    backwards = replace(event().rows(np.zeros(2, np.intp)), ts_ms=np.array([TS, TS - 1]))
    with pytest.raises(CodecError, match="row 1 is earlier"):
        CODECS["block"].encode(backwards, Names())
    for count, kind in ((10, 0), (11, 1)):
        assert CODECS["msgpack-zlib"].encode(event().rows(np.zeros(count, np.intp)), Names())[0][0][0] == kind


def test_runs_come_back_at_every_boundary():
    edges = np.array(sorted({max(0, (1 << bits) + off) for bits in range(53) for off in (-1, 0, 1)}))
    for low in (0, 1, 30, 51):
        for offset in (0, 300):
            pack = Packer()
            pack.scalar((1 << 53) - 1)
            pack.numbers(edges, low=low, offset=offset)
            pack.tokens(np.arange(MAX_TOKENS))
            pack.bits(np.array([0, (1 << 57) - 1, 5]), np.array([0, 57, 3]))
            size, data = pack.finish()
            unpack = Unpacker("test", data[:size], data[size:])
            assert unpack.scalar(1 << 53) == (1 << 53) - 1
            assert unpack.numbers(len(edges), low=low, offset=offset).tolist() == edges.tolist()
            assert unpack.tokens(MAX_TOKENS).tolist() == list(range(MAX_TOKENS))
            assert unpack.bits(np.array([0, 57, 3])).tolist() == [0, (1 << 57) - 1, 5]
            unpack.finish()


@pytest.mark.parametrize(("count", "seeds"), [(3, 0), (3, 40), (10_000, 0), (10_000, 500), (10_000, 20_000)])
def test_runs_are_what_the_documentation_says(count: int, seeds: int):
    """Read lane by lane, token by token, in whole numbers."""
    rng = clock.generator(count + seeds)
    runs = [np.minimum(rng.geometric(share, size=count), 30) for share in (0.9, 0.5, 0.05)]
    last = rng.integers(0, 256, seeds)
    pack = Packer()
    for run in runs:
        pack.tokens(run)
    pack.bits(last, 8)
    size, data = pack.finish()
    assert abs(pack.length - len(data)) <= 8
    lanes, seeded = data[:2]
    assert (lanes, seeded) == (max(3 * count // 256, 1), min(lanes, seeds // 4))
    states = [int.from_bytes(data[at : at + 6]) for at in range(2, 2 + 6 * lanes, 6)]
    words = iter(np.frombuffer(data[2 + 6 * lanes : size], ">u2").tolist())
    tables = Unpacker("test", b"", data[size:])
    for run in runs:
        least, levels = tables.scalar(30), tables.bits(np.full(tables.scalar(30), 4))
        shares = _shares(levels).tolist()
        found: list[int] = []
        for at in range(0, count, lanes):
            step = range(min(lanes, count - at))
            for lane in step:
                slot, place = states[lane] % 32768, 0
                while slot >= shares[place]:
                    slot, place = slot - shares[place], place + 1
                states[lane] = shares[place] * (states[lane] // 32768) + slot
                found.append(place + least)
            for lane in step:
                if states[lane] < 1 << 32:
                    states[lane] = states[lane] << 16 | next(words)
        assert found == run.tolist()
    assert next(words, None) is None
    assert {state >> 32 for state in states} == {1}
    plain = data[size:] + b"".join((state % (1 << 32)).to_bytes(4) for state in states[:seeded])
    assert not any(state % (1 << 32) for state in states[seeded:])
    behind = int.from_bytes(bytes(last.tolist()))
    assert any(int.from_bytes(plain) >> filled & (1 << 8 * seeds) - 1 == behind for filled in range(8))

    unpack = Unpacker("test", data[:size], data[size:])
    assert [unpack.tokens(count).tolist() for _ in runs] == [run.tolist() for run in runs]
    assert unpack.bits(np.full(seeds, 8)).tolist() == last.tolist()
    unpack.finish()


def test_the_shortest_decimal_is_found():
    found = scaled(np.array([3.0, 0.25, 1e15, 2.0**53, 0.1 + 0.2, 1e-15, 1e-16, -1.0, np.nan, np.inf, 0.0]))
    assert found.found.tolist() == [True, True, True, False, False, True] + [False] * 5
    assert found.mantissa.tolist()[:3] == [3, 25, 10**15]
    assert found.exponent.tolist()[:6] == [0, 2, 0, 0, 0, 15]


def test_names_grow_by_what_is_used_the_busiest_first():
    busy = replace(event().rows(np.zeros(3, np.intp)), symbol=np.array([1, 2, 2]), symbols=["never", "once", "twice"])
    CODECS["ints"].encode(busy, names := Names())
    assert names.symbols == ["twice", "once"]
    assert [codec.fields[0] for codec in BY_FIELD.values()] == list(BY_FIELD)
    with pytest.raises(CodecError, match="no element of a table of names"):
        Names([b"s\xff"])


def normal():
    return liqlab.synth("normal", hours=24, seed=0)[60_000:62_000]


def recording():
    if not RECORDING.exists():
        pytest.skip("the recordings are not here")
    return liqlab.read_feed(RECORDING).events


@pytest.mark.parametrize(("feed", "most", "ints_most"), [(normal, 5.0, 10.5), (recording, 6.0, 11.0)])
def test_codecs_are_as_small_as_they_are_said_to_be(feed, most, ints_most):
    table = feed()
    events, names = Columns.of(table), Names()
    block = len(CODECS["block"].encode(events, names)[0][0]) / len(events)
    plain = [
        np.diff(events.ts_ms, prepend=events.ts_ms[:1]),
        events.symbol.astype("u2"),
        events.side.astype("u1"),
        events.price,
        events.size,
    ]
    floor = len(lzma.compress(b"".join(column.tobytes() for column in plain), preset=9 | lzma.PRESET_EXTREME)) / len(
        events
    )
    assert block < most
    assert block < 0.55 * floor
    ints = [np.array(column, np.int64) for column in CODECS["ints"].encode_columns(events, names)]
    assert sum(float(listpack_bytes(column).mean()) for column in ints) < ints_most


def listpack_bytes(numbers):
    limits = [
        (numbers >= 0) & (numbers < 128),
        *((-(1 << b) <= numbers) & (numbers < 1 << b) for b in (12, 15, 23, 31)),
    ]
    return np.select(limits, [2, 3, 4, 5, 6], 10)
