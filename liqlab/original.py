"""The original document's way of writing: four commands an event, one by one or in pipelines of 50.

It is here to be measured against, and to be migrated from. Nothing makes it safe: a lost reply leaves the caller in
doubt, and a repeat counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from redis.asyncio import Redis

from liqlab import schema
from liqlab.events import SIDES, Columns
from liqlab.settings import Settings

PIPELINE: Final = 50
Command = tuple[str | int | float, ...]


def commands(events: Columns, settings: Settings, top: dict[str, int]) -> Iterator[list[Command]]:
    """Yield the four commands of each event: XADD, HINCRBY, HINCRBYFLOAT and ZADD.

    Two things differ from the document, without which nothing could be read back: the ID carries the event's time, and
    the member of the sorted set that ID's too, where the document's is a second that later events overwrite.

    Parameters
    ----------
    events : Columns
        In time order.
    settings : Settings
        `retention` is read.
    top : dict of str to int
        The newest time in each stream; kept up to date.
    """
    family, maxlen = schema.BY_NAME, settings.retention.events_maxlen
    columns = zip(
        events.ts_ms.tolist(), events.exchange.tolist(), events.symbol.tolist(), events.side.tolist(),
        events.price.tolist(), events.size.tolist(), events.notional.tolist(), strict=True,
    )  # fmt: skip
    for n, (ms, exchange, code, side, price, size, notional) in enumerate(columns):
        symbol = events.symbols[code]
        stream, vwap = family["events"].key(symbol), family["vwap"].key(symbol)
        bucket = family["percentile"].key(symbol, bucket=ms // family["percentile"].bucket_ms)
        newest = top[stream] = max(ms, top.get(stream, 0))
        fields = ("s", SIDES[side][0], "z", str(size), "p", str(price), "e", events.exchanges[exchange])
        late = ("t", ms) if ms < newest else ()
        yield [
            ("XADD", stream, "MAXLEN", "~", maxlen, f"{newest}-*", *fields, *late),
            ("HINCRBY", vwap, "count", 1),
            ("HINCRBYFLOAT", vwap, "volume_sum", size),
            ("ZADD", bucket, notional, f"{ms}-{n}"),
        ]


async def write(redis: Redis, events: Columns, settings: Settings, top: dict[str, int]) -> None:
    """Write events by the strategy ``single`` or ``pipeline``; see `commands`."""
    waiting: list[Command] = []
    for n, each in enumerate(commands(events, settings, top), 1):
        if settings.writer.strategy == "single":
            for command in each:
                await redis.execute_command(*command)  # type: ignore[no-untyped-call]
            continue
        waiting += each
        if n % PIPELINE == 0 or n == len(events):
            pipe = redis.pipeline(transaction=False)
            for command in waiting:
                pipe.execute_command(*command)
            await pipe.execute()
            waiting.clear()
