"""When is a liquidation an alert? When it is large for its symbol, in a quarter of an hour that is busy.

An event is an alert where its notional is at or above the `detector.percentile` of its symbol's trailing window, and
events of its symbol and side have come to `detector.volume_usd` within `detector.volume_s`. Then its symbol and side
are quiet for `retention.cooldown_s`. All of it is by event time: a replay finds what a live detector would have found.

An alert is claimed and signalled in one atomic step on the server: two detectors never raise the same one, nor does one
that was killed and looks at the same events again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from redis.asyncio import Redis

from liqlab import archive, clock, schema
from liqlab.events import SIDES, Columns, check, run_starts
from liqlab.percentiles import METHODS, Method, Unlimited
from liqlab.quantiles import Distribution
from liqlab.server import checkpoint
from liqlab.settings import Detector as Detection
from liqlab.settings import Settings, load

_POLL_S: Final = 0.25
_PAGE: Final = 100  # symbols in one round trip
_NUMBERS: Final = ("price", "notional", "threshold", "rank", "volume")
# The cooldown's key is gone when its time is up; signals stay for longer, and still know what was raised before a
# detector was restarted. An event before the last alert of its side comes too late to be one.
_CLAIM: Final = """
local ms, cooldown_ms, side = tonumber(ARGV[1]), 1000 * ARGV[2], ARGV[4]
local last = tonumber(redis.call('GET', KEYS[1]) or '')
if not last then
  for _, entry in ipairs(redis.call('XREVRANGE', KEYS[2], '+', string.format('%.0f', math.max(ms - cooldown_ms, 0)))) do
    local found = {}
    for i = 1, #entry[2], 2 do found[entry[2][i]] = entry[2][i + 1] end
    if found.side == side then last = tonumber(found.ts_ms) break end
  end
end
if last and ms < last + cooldown_ms then return last end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
local id_ms = math.max(ms, top and tonumber(string.match(top[1], '%d+')) or 0)
redis.call('XADD', KEYS[2], string.format('%.0f-*', id_ms), 'ts_ms', ARGV[1], unpack(ARGV, 5))
redis.call('XTRIM', KEYS[2], 'MINID', string.format('%.0f', math.max(id_ms - 1000 * ARGV[3], 0)))
redis.call('EXPIRE', KEYS[2], ARGV[3])
return -1
"""

Progress = Callable[[int, int], None]
Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Alert:
    """A large liquidation in a busy quarter of an hour.

    Attributes
    ----------
    ts_ms : int
        Of the event, ms since the epoch, UTC.
    symbol, side, exchange : str
        Of the event; the side is the order's.
    price, notional : float
        Of the event; USD.
    threshold : float
        The percentile that the notional is at or above, USD.
    rank : float
        Which part of the symbol's trailing window is at most the notional, 0 to 1.
    volume : float
        Notionals of the symbol and side within `detector.volume_s`, up to and with the event, USD.
    """

    ts_ms: int
    symbol: str
    side: str
    exchange: str
    price: float
    notional: float
    threshold: float
    rank: float
    volume: float


def table(alerts: Iterable[Alert]) -> pd.DataFrame:
    """Return alerts as a DataFrame with the columns of `Alert`, in time order."""
    rows = pd.DataFrame([asdict(alert) for alert in alerts], columns=list(Alert.__annotations__))
    types = {"ts_ms": np.int64} | dict.fromkeys(_NUMBERS, np.float64)
    return rows.astype(types).sort_values(["ts_ms", "symbol", "side"], kind="stable", ignore_index=True)


def volumes(events: Columns, span_ms: int) -> NDArray[np.float64]:
    """Return, for each event, what its symbol and side have come to by then, within so many ms, USD.

    Late events stand where they came; a sum is over what has come until then.
    """
    group, times = 2 * events.symbol.astype(np.int64) + events.side, np.maximum.accumulate(events.ts_ms)
    order = np.argsort(group, kind="stable")
    since = times - times[0] + span_ms
    place = (group * (int(since[-1]) + 1) + since)[order]  # a group's places lie behind all of the group before
    total = np.concatenate([[0.0], np.cumsum(events.notional[order])])
    volume = np.empty(len(events))
    volume[order] = total[1:] - total[np.searchsorted(place, place - span_ms, side="right")]
    return volume


def large(events: Columns, volume: NDArray[np.float64], settings: Detection) -> Rows:
    """Return the rows of events that are large enough in USD, in a volume that is: what may be an alert."""
    least = np.array([settings.min_usd_of.get(symbol, settings.min_usd) for symbol in events.symbols])
    return np.flatnonzero((events.notional >= least[events.symbol]) & (volume >= settings.volume_usd))


class Detector:
    """Raises an alert for each event that is one.

    Parameters
    ----------
    redis : redis.asyncio.Redis or None
        Where alerts are claimed and signalled; None keeps them to this object, for a study without a server.
    method : Method, optional
        Where percentiles come from; what `detector.method` names when absent, every value without a server.
    settings : Settings, optional
        `detector`, `retention` and `shards` are read; `liqlab.settings.load()` when absent.
    """

    def __init__(self, redis: Redis | None, *, method: Method | None = None, settings: Settings | None = None) -> None:
        self.settings = settings or load()
        self.redis = redis
        if method is None:
            kind = METHODS[self.settings.detector.method] if redis else Unlimited
            method = kind(redis, settings=self.settings)  # type: ignore[arg-type]
        self.method = method
        self._claim = redis.register_script(_CLAIM) if redis else None
        self._recent: Columns | None = None  # events of the last `detector.volume_s`
        self._last: dict[tuple[str, str], int] = {}  # the last alert that is known of, by symbol and side
        # By symbol: as of when, and what gives the distribution with the threshold.
        self._known: dict[str, tuple[int, Callable[[], tuple[Distribution, float]]]] = {}

    async def look(self, events: pd.DataFrame) -> list[Alert]:
        """Look at events, in time order, and raise those that are alerts.

        A threshold is asked for once in `detector.refresh_s` of event time and symbol, before the first event in
        question. In a study, let events be stored after they were looked at.

        Parameters
        ----------
        events : pandas.DataFrame
            An event table that goes on where the last one ended.

        Returns
        -------
        list of Alert
            Raised by this call; what another detector has raised already is not among them.
        """
        columns = Columns.of(check(events))
        return await self.judge(columns, *await self.candidates(columns)) if len(columns) else []

    async def candidates(self, events: Columns) -> tuple[Rows, NDArray[np.float64]]:
        """Return which rows are large enough in USD and in a volume that is, and the volume of every row.

        Whatever is at or above its percentile among these is an alert, outside of a cooldown.

        Parameters
        ----------
        events : Columns
            In time order, going on where those of the last call ended; at least one.
        """
        volume = await self._volumes(events)
        return large(events, volume, self.settings.detector), volume

    async def judge(self, events: Columns, rows: Rows, volume: NDArray[np.float64]) -> list[Alert]:
        """Raise those of `rows` that are alerts.

        Parameters
        ----------
        events, rows, volume
            Of `candidates`; some of the rows at a time, in their order.

        Returns
        -------
        list of Alert
            As `look`.
        """
        raised: list[Alert] = []
        numbers = events.ts_ms[rows] // (1000 * self.settings.detector.refresh_s)
        for start, stop in pairwise([*run_starts(numbers).tolist(), len(rows)]):
            part = await self.ask(events, rows[start:stop])
            codes = np.unique(events.symbol[part]).tolist()
            limits = {code: self._trailing(events.symbols[code])[1] for code in codes}
            for row in part[events.notional[part] >= [limits[code] for code in events.symbol[part].tolist()]].tolist():
                symbol, side = events.symbols[events.symbol[row]], SIDES[events.side[row]]
                ms, notional = int(events.ts_ms[row]), float(events.notional[row])
                if ms < self._last.get((symbol, side), -1) + 1000 * self.settings.retention.cooldown_s:
                    continue
                trailing, threshold = self._trailing(symbol)
                alert = Alert(
                    ts_ms=ms,
                    symbol=symbol,
                    side=side,
                    exchange=events.exchanges[events.exchange[row]],
                    price=float(events.price[row]),
                    notional=notional,
                    threshold=threshold,
                    rank=float(trailing.rank([notional])[0]),
                    volume=float(volume[row]),
                )
                if await self._raise(alert):
                    raised.append(alert)
        return raised

    async def ask(self, events: Columns, rows: Rows) -> Rows:
        """Ask for the thresholds, as of now, of rows of one `detector.refresh_s`; return those not in a cooldown."""
        loud = rows[~self.quiet(events, rows)]
        if len(loud):
            symbols = [events.symbols[code] for code in np.unique(events.symbol[loud]).tolist()]
            await self._ask(symbols, int(events.ts_ms[loud[0]]) // (1000 * self.settings.detector.refresh_s))
        return loud

    def quiet(self, events: Columns, rows: Rows) -> NDArray[np.bool_]:
        """Return which of some rows are in the cooldown of an alert that is known of."""
        cooldown_ms = 1000 * self.settings.retention.cooldown_s
        groups, group = np.unique(2 * events.symbol[rows].astype(np.int64) + events.side[rows], return_inverse=True)
        sides = [(events.symbols[number // 2], SIDES[number % 2]) for number in groups.tolist()]
        until_ms = np.array([self._last.get(side, -1) + cooldown_ms for side in sides], np.int64)
        return np.asarray(events.ts_ms[rows] < until_ms[group])

    async def follow(self) -> AsyncIterator[list[Alert]]:
        """Look at what is written to Redis as it is written, and yield the alerts of each look that raised any.

        Begins `detector.volume_s` ago: what happened while no detector ran is looked at, if not for long. A method that
        the writer does not fill gets what comes from now on: a detector that begins again adds nothing twice.
        """
        if self.redis is None:
            raise RuntimeError("there is no server to follow: make the detector with one")
        begun_ms, after = clock.now_ms(), dict[str, str]()
        start_ms = begun_ms - 1000 * self.settings.detector.volume_s
        while True:
            events = await archive.tail(self.redis, after, start_ms=start_ms, settings=self.settings)
            alerts = await self.look(events)
            if not self.method.written:
                await self.method.add(Columns.of(events[events["ts_ms"] >= begun_ms]))
            if alerts:
                yield alerts
            checkpoint()
            await asyncio.sleep(0 if len(events) else _POLL_S)

    async def _volumes(self, events: Columns) -> NDArray[np.float64]:
        """Return, for each event, what its symbol and side have come to by then, within `detector.volume_s`."""
        span_ms, begin_ms = 1000 * self.settings.detector.volume_s, int(events.ts_ms[0])
        if self._recent is None and self.redis is not None:
            before_ms = max(begin_ms - span_ms, 0), begin_ms - 1
            self._recent = Columns.of(await archive.history(self.redis, None, *before_ms, settings=self.settings))
        known = Columns.concat([self._recent, events]) if self._recent is not None and len(self._recent) else events
        volume = volumes(known, span_ms)
        times = np.maximum.accumulate(known.ts_ms)
        self._recent = known.rows(slice(int(np.searchsorted(times, times[-1] - span_ms, side="right")), None))
        return volume[-len(events) :]

    async def _ask(self, symbols: Sequence[str], number: int) -> None:
        """Learn the thresholds of symbols, as of the begin of the `number`-th refresh, where older ones are known."""
        detector = self.settings.detector
        asked = [symbol for symbol in symbols if symbol not in self._known or self._known[symbol][0] < number]
        for at in range(0, len(asked), _PAGE):
            page = asked[at : at + _PAGE]
            found = await self.method.asked(page, end_ms=1000 * detector.refresh_s * int(number) - 1)
            for symbol, one in zip(page, found, strict=True):
                self._known[symbol] = number, cache(partial(self._with_threshold, one))

    def _trailing(self, symbol: str) -> tuple[Distribution, float]:
        """Return the distribution that was last asked for, and the threshold that it makes."""
        return self._known[symbol][1]()

    def _with_threshold(self, asked: Callable[[], Distribution]) -> tuple[Distribution, float]:
        percentile, trailing = self.settings.detector.percentile, asked()
        # Of fewer events than that the percentile is the largest of them, or none.
        enough = trailing.count * (100 - percentile) >= 100
        return trailing, float(trailing.quantiles([percentile / 100])[0]) if enough else np.inf

    async def _raise(self, alert: Alert) -> bool:
        """Claim an alert for its symbol and side, and signal it; return whether nobody had."""
        last = -1
        if self._claim is not None:
            retention, shard = self.settings.retention, schema.shard_of(alert.symbol, self.settings.shards)
            fields = {name: value for name, value in asdict(alert).items() if name not in ("ts_ms", "symbol")}
            last = await self._claim(
                keys=[
                    schema.BY_NAME["cooldown"].key(alert.symbol, side=alert.side, shard=shard),
                    schema.BY_NAME["signal"].key(alert.symbol, shard=shard),
                ],
                args=[
                    *(alert.ts_ms, retention.cooldown_s, retention.signal_s, alert.side),
                    *(word for pair in fields.items() for word in pair),
                ],
            )
        self._last[alert.symbol, alert.side] = alert.ts_ms if last < 0 else int(last)
        return last < 0


async def signals(redis: Redis, *, settings: Settings | None = None) -> pd.DataFrame:
    """Return the alerts that are still signalled, of every symbol that the writer has stored, as `table` does."""
    settings, found = settings or load(), []
    for shard in schema.shards_of(settings):
        symbols = (await archive.names_of(redis, shard))[2].symbols
        for at in range(0, len(symbols), _PAGE):
            pipe = redis.pipeline(transaction=False)
            for symbol in symbols[at : at + _PAGE]:
                pipe.execute_command(b"XRANGE", schema.BY_NAME["signal"].key(symbol, shard=shard), "-", "+")
            for symbol, entries in zip(symbols[at : at + _PAGE], await pipe.execute(), strict=True):
                for _, words in entries:
                    texts = {words[i].decode(): words[i + 1].decode() for i in range(0, len(words), 2)}
                    numbers = {name: float(texts[name]) for name in _NUMBERS}
                    found.append(Alert(int(texts["ts_ms"]), symbol, texts["side"], texts["exchange"], **numbers))
    return table(found)


async def backtest(events: pd.DataFrame, detector: Detector, *, progress: Progress | None = None) -> pd.DataFrame:
    """Return the alerts of a feed, as `table` does, with percentiles from the detector's own method.

    Minute by minute, events are looked at and then added to the method. `liqlab.ingest` plays a feed through the whole
    system instead, with all that it forgets.

    Parameters
    ----------
    events : pandas.DataFrame
        An event table.
    detector : Detector
        Without a server, or with one that holds nothing of this feed.
    progress : callable, optional
        Called with (events looked at, events in all).
    """
    columns, found = Columns.of(check(events)), list[Alert]()
    if not len(columns):
        return table(found)
    rows, volume = await detector.candidates(columns)
    stops = [*run_starts(columns.ts_ms // clock.MINUTE_MS).tolist()[1:], len(columns)]
    ends = np.searchsorted(rows, stops).tolist()
    for (start, stop), (first, last) in zip(pairwise([0, *stops]), pairwise([0, *ends]), strict=True):
        found += await detector.judge(columns, rows[first:last], volume)
        await detector.method.add(columns.rows(slice(start, stop)))
        if progress:
            progress(stop, len(events))
    return table(found)
