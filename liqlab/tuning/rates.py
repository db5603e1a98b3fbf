"""A feed as it would be at another rate, or if it went on: what to size a server for."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from liqlab import clock
from liqlab.events import EventError, check
from liqlab.feeds import Feed

_NEAR_MS = 30_000  # an added event comes within so much of the one that it is made of


def extrapolate(feed: Feed | pd.DataFrame, *, rate: float = 1.0, hours: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Return a feed of as many times the events, going on until it lasts so many hours.

    An added event is one of the feed within 30 s of its time, with the size of another event of its symbol. Where the
    feed is shorter than asked for, it begins again, whole, where it ended.

    Parameters
    ----------
    feed : Feed or pandas.DataFrame
        From `liqlab.read_feed`, or an event table.
    rate : float
        How many times the events; below 1 some are left out.
    hours : float
        At least so long; as long as the feed when less.
    seed : int
        Of what is drawn; the same gives the same.

    Raises
    ------
    EventError
        The feed holds no event, the rate is not above 0, or the hours are no number.
    """
    events = check(feed.events if isinstance(feed, Feed) else feed)
    if events.empty:
        raise EventError("the feed holds no event; there is nothing to go on from")
    if not (math.isfinite(rate) and rate > 0):
        raise EventError(f"the rate is {rate:g}; it must be a number above 0, such as 10")
    if not math.isfinite(hours):
        raise EventError(f"so many hours as {hours:g} cannot be gone on for; say how many, such as 24")
    rng, times = clock.generator(seed), events["ts_ms"].to_numpy()
    span_ms = int(times[-1] - times[0]) + clock.MINUTE_MS
    rounds = max(math.ceil(hours * clock.HOUR_MS / span_ms), 1)
    if rate == 1 and rounds == 1:
        return events
    rows, shift, made = [], [], []
    for number in range(rounds):
        copies = math.floor(rate) + (rng.random(len(events)) < rate % 1)
        found = np.repeat(np.arange(len(events)), copies)
        again = np.diff(found, prepend=-1) == 0
        near = rng.integers(-_NEAR_MS, _NEAR_MS + 1, len(found))
        rows.append(found)
        shift.append(np.where(again, near, 0) + number * span_ms)
        made.append(again | (number > 0))
    row, added, new = (np.concatenate(parts) for parts in (rows, shift, made))
    result = events.iloc[row].reset_index(drop=True)
    source = row.copy()
    codes = events["symbol"].cat.codes.to_numpy()[row]
    order = np.argsort(codes, kind="stable")
    # Sizes change places within a symbol: what is drawn again has the same distribution, and no event is there twice.
    shuffled = order[np.lexsort((rng.random(len(row)), codes[order]))]
    source[order] = row[shuffled]
    size = np.where(new, events["size"].to_numpy()[source], events["size"].to_numpy()[row])
    result["notional"] = result["notional"] * (size / result["size"].to_numpy())
    result["size"] = size
    result["ts_ms"] = np.clip(result["ts_ms"].to_numpy() + added, times[0], times[0] + rounds * span_ms)
    return result.sort_values("ts_ms", kind="stable", ignore_index=True)
