"""Parse Binance frames: `read_feed` beside the plain `json.loads` loop that most scripts write, in one run.

python benchmarks/bench_parse.py              # 1,000,000 frames, three rounds, prints the ratio
python benchmarks/bench_parse.py --rss        # 10,000,000 frames through iter_feed, prints the peak memory
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rows import record

from liqlab import events
from liqlab.clock import generator
from liqlab.feeds import iter_feed, read_feed

FRAME = (
    '{"e":"forceOrder","E":%d,"o":{"s":"%s","S":"%s","o":"LIMIT","f":"IOC","q":"%.3f","p":"%.2f","ap":"%.2f",'
    '"X":"FILLED","l":"%.3f","z":"%.3f","T":%d}}\n'
)
START_MS = 1_700_000_000_000


def write_frames(path: Path, count: int) -> None:
    """Write `count` frames of 300 symbols, 100 ms apart on average."""
    rng = generator(1)
    time_ms = START_MS
    with path.open("w") as file:
        for done in range(0, count, 100_000):
            size = min(100_000, count - done)
            steps = rng.integers(1, 200, size)
            times = time_ms + np.cumsum(steps)
            time_ms = int(times[-1])
            symbols, sides = rng.integers(0, 300, size), rng.integers(0, 2, size)
            prices, sizes = rng.random(size) * 9000 + 10, rng.random(size) * 10 + 0.001
            rows = zip(times.tolist(), symbols.tolist(), sides.tolist(), prices.tolist(), sizes.tolist(), strict=True)
            file.writelines(
                FRAME % (at + 5, f"S{symbol}USDT", ("BUY", "SELL")[side], size, price, price, size, size, at)
                for at, symbol, side, price, size in rows
            )


def plain(path: Path):
    """Build the event table with a loop over json.loads, without looking for duplicates."""
    columns = [], [], [], [], []
    for line in path.open("rb"):
        order = json.loads(line)["o"]
        values = order["T"], order["s"], order["S"].lower(), float(order["ap"]), float(order["z"])
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    ts_ms, symbol, side, price, size = columns
    notional = np.array(price) * np.array(size)
    return events.event_table(ts_ms, ["binance"] * len(ts_ms), symbol, side, price, size, notional)


def timed(function, path: Path):
    start = time.perf_counter()
    result = function(path)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rss", action="store_true")
    chosen = parser.parse_args()
    count = chosen.events or (10_000_000 if chosen.rss else 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.jsonl"
        write_frames(path, count)
        if chosen.rss:
            reader = iter_feed(path)
            seconds, total = timed(lambda _: sum(len(batch) for batch in reader), path)
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
            print(f"{total:,} of {count:,} events in {seconds:.1f} s, {path.stat().st_size / 1e9:.2f} GB read")
            print(f"peak memory {peak:.0f} MB")
            return
        ours, theirs = [], []
        for _ in range(chosen.rounds):
            slow, table = timed(plain, path)
            fast, feed = timed(read_feed, path)
            for name in ("ts_ms", "price", "size", "notional"):
                assert np.array_equal(table[name], feed.events[name]), name
            for name in ("symbol", "side"):
                assert (table[name].astype(str) == feed.events[name].astype(str)).all(), name
            ours.append(fast / count * 1e6)
            theirs.append(slow / count * 1e6)
        record("parse_vs_json_loads", float(np.median(ours)), "us/event", "a json.loads loop", float(np.median(theirs)))


if __name__ == "__main__":
    main()
