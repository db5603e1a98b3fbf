"""Hostile bytes for every decoder: each gives values or a CodecError, and nothing takes long.

python benchmarks/fuzz_codecs.py                                  # 10,000,000 inputs, or as many as 30 minutes allow
python benchmarks/fuzz_codecs.py 1000000 --seconds 60 --seed 7    # prints the same counts on every machine
"""

import argparse
import random
import time
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

import liqlab
from liqlab.codecs import CODECS, CodecError, Names
from liqlab.codecs.entropy import Packer
from liqlab.events import Columns, Event

NASTY: Final = (
    b"", b"0", b"-0", b"1", b"-1", b"9223372036854775807", b"-9223372036854775808", b"9" * 40, b"1e308", b"1e309",
    b"5e-324", b"nan", b"-inf", b"0x1p3", b" 1", b"1_0", b"\xff\xfe", b"[" * 400, b"{}", b"null", b"\x91" * 400,
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x01\x78\x9c", b"\x00\x90", b"\x01\x80\x00", b"\x00" * 19,
    b"\xff" * 19, b"\x00" * 40, b"\xff" * 40,
)  # fmt: skip


class Liar(Packer):
    """Packs a block that is well-formed, but for some values that are not those of the events."""

    draw: random.Random

    def _lie(self, values: np.ndarray, bits: int) -> np.ndarray:
        values = np.array(values, np.int64)
        if len(values) and self.draw.random() < 0.05:
            for _ in range(self.draw.choice((1, 1, 3))):
                values[self.draw.randrange(len(values))] = self.draw.getrandbits(self.draw.randint(0, bits))
        return values

    def scalar(self, value: int) -> None:
        super().scalar(int(self._lie(np.array([value]), 5)[0]))

    def tokens(self, tokens: np.ndarray) -> None:
        super().tokens(self._lie(tokens, 9))

    def numbers(self, values: np.ndarray, **how: object) -> None:
        super().numbers(self._lie(values, 53), **how)


class Sample(NamedTuple):
    """Rows that a codec wrote, and what is needed to read them."""

    codec: str
    ts_ms: np.ndarray
    rows: list[list[bytes]]
    own: str | None


@dataclass
class Counts:
    """What became of the inputs: decoded and refused by codec, and the longest that one took."""

    decoded: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CODECS, 0))
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CODECS, 0))
    slowest_s: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.decoded.values()) + sum(self.refused.values())


def samples(draw: random.Random, *, lies: int = 300) -> tuple[Names, list[Sample]]:
    """Return rows of every codec: alone and several, of one symbol and of many, plain and awkward numbers; and lies."""
    market = Columns.of(liqlab.synth("normal", hours=0.01, seed=1))
    awkward = Columns.of_events(
        Event(1_700_000_000_000 + i // 3, venue, "币安人生USDT", "sell", price, size, price * size)
        for i, (price, size) in enumerate([(0.1 + 0.2, 1e-9), (37_123.5, 100 / 37_123.5), (1e20, 3.0), (2.0, 1e7)] * 4)
        for venue in ("okx", "bitmex")
    )
    names, found = Names(), []
    for events in (market.rows(slice(1)), market.rows(slice(12)), market, awkward):
        for name, codec in CODECS.items():
            part = events.rows(np.flatnonzero(codec.carries(events)))
            for own in (False, True):
                rows = [
                    [value if isinstance(value, bytes) else value.encode() for value in row]
                    for row in codec.encode(part.rows(slice(0, 1)) if own else part, names, own=own)
                ]
                symbol = part.symbols[int(part.symbol[0])] if own else None
                found.append(Sample(name, part.ts_ms[: len(rows)], rows, symbol))
    Liar.draw = draw
    with unittest.mock.patch("liqlab.codecs.blocks.Packer", Liar):
        for _ in range(lies):
            some = draw.choice((market, awkward)).rows(slice(0, draw.choice((1, 3, 30))))
            found.append(Sample("block", some.ts_ms[:1], CODECS["block"].encode(some, names), None))
    return names, found


def mutations(pool: list[Sample], draw: random.Random) -> Iterator[Sample]:
    """Yield samples with something wrong in them, for ever."""
    values = [value for sample in pool for row in sample.rows[:3] for value in row]
    honest, lies = pool[: 2 * 4 * len(CODECS)], pool[2 * 4 * len(CODECS) :]
    while True:
        lying = draw.random() < 0.05
        sample = draw.choice(lies if lying else honest)
        start = draw.randrange(len(sample.rows))
        rows = [list(row) for row in sample.rows[start : start + draw.choice((1, 1, 1, 3, 30))]]
        for _ in range(draw.choice((1, 1, 2, 5) if not lying else (0, 0, 1))):
            row = draw.choice(rows)
            if not row:
                continue
            at = draw.randrange(len(row))
            row[at] = _mutated(row[at], values, draw)
            if draw.random() < 0.02:
                del row[at]
            elif draw.random() < 0.02:
                row.append(draw.choice(values))
        yield sample._replace(ts_ms=sample.ts_ms[start : start + len(rows)], rows=rows)


def _mutated(value: bytes, others: list[bytes], draw: random.Random) -> bytes:
    kind = draw.randrange(8)
    at = draw.randrange(len(value) + 1)
    if kind == 0:
        return draw.randbytes(draw.choice((1, 5, 19, 60, 300)))
    if kind == 1:
        return draw.choice(NASTY)
    if kind == 2:
        return value[:at]
    if kind == 3:
        return value[:at] + draw.randbytes(draw.randrange(1, 9)) + value[at:]
    if kind == 4:
        return value[:at] + draw.choice(others)[at:]
    if kind == 5:
        return value[:at] + draw.choice((b"\x00", b"\xff", b"\x80")) * draw.randrange(1, 9) + value[at + 4 :]
    changed = bytearray(value or b"0")
    # Most of a block decides nothing else than numbers; its beginning decides how it is read.
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(changed) if kind == 6 else min(len(changed), 24))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def fuzz(count: int, *, seconds: float, seed: int) -> Counts:
    """Decode hostile inputs until there were `count` or `seconds` are over.

    Raises
    ------
    AssertionError
        A decoder raised something else than CodecError, or returned what is no event; the message has the input.
    """
    draw = random.Random(seed)
    names, pool = samples(draw)
    counts = Counts()
    begun = time.perf_counter()
    for done, (name, ts_ms, rows, own) in enumerate(mutations(pool, draw)):
        started = time.perf_counter()
        if done == count or started - begun > seconds:
            break
        try:
            events = CODECS[name].decode(ts_ms, rows, names, own=own)
        except CodecError:
            counts.refused[name] += 1
        except Exception as error:
            raise AssertionError(f"{name}.decode({ts_ms!r}, {rows!r}, names, own={own!r}) raised {error!r}") from error
        else:
            counts.decoded[name] += 1
            assert _possible(events, own), f"{name}.decode({ts_ms!r}, {rows!r}, names, own={own!r}) gave {events}"
        counts.slowest_s = max(counts.slowest_s, time.perf_counter() - started)
    return counts


def _possible(events: Columns, own: str | None) -> bool:
    return bool(
        all(((x > 0) & (x < np.inf)).all() for x in (events.price, events.size, events.notional))
        and ((events.ts_ms >= 0) & (events.ts_ms < 1 << 47)).all()
        and set(np.unique(events.side)) <= {0, 1}
        and 0 <= events.exchange.min() <= events.exchange.max() < len(events.exchanges)
        and 0 <= events.symbol.min() <= events.symbol.max() < len(events.symbols)
        and (own is None or events.symbols == [own])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=10_000_000, help="inputs")
    parser.add_argument("--seconds", type=float, default=1800, help="stop after this long")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.perf_counter()
    counts = fuzz(args.count, seconds=args.seconds, seed=args.seed)
    took = time.perf_counter() - begun
    print(f"{'codec':14}{'decoded':>12}{'refused':>12}")
    for name in CODECS:
        print(f"{name:14}{counts.decoded[name]:12,}{counts.refused[name]:12,}")
    print(f"{counts.total:,} inputs in {took:.0f} s, slowest {counts.slowest_s * 1000:.1f} ms: nothing else happened")


if __name__ == "__main__":
    main()
