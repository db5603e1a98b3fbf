"""Every quantitative claim of the design document that liqlab grew from, measured.

`CLAIMS` is the table: what is claimed, the figure, how it is measured and by which function. `measure` runs them all
on a private server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pandas as pd

from liqlab import clock
from liqlab.claims import memory, operation
from liqlab.claims.verdicts import FAILED, TIMED, TOLERANCE, Bench, Claim, Claims, Found, Rule, Verdict, number, row
from liqlab.events import EventError, check
from liqlab.server import Server
from liqlab.settings import Settings, load

__all__ = [
    "CLAIMS",
    "FAILED",
    "SECTIONS",
    "TIMED",
    "TOLERANCE",
    "Claim",
    "Claims",
    "Found",
    "Rule",
    "Verdict",
    "measure",
    "number",
]

Progress = Callable[[int, int], None]
CLAIMS: Final = tuple(sorted((*memory.CLAIMS, *operation.CLAIMS), key=lambda claim: int(claim.section)))
SECTIONS: Final = {
    "0": "Executive summary", "1": "Memory analysis", "2": "Data structures", "3": "Encoding", "4": "Cleanup",
    "5": "Percentiles", "6": "Writes", "7": "VPS resources", "8": "Retention", "9": "Configuration",
    "10": "Checklist", "11": "Conclusion",
}  # fmt: skip
_BUSIEST: Final = 10  # symbols of the dense case


async def measure(
    server: Server, events: pd.DataFrame, *, settings: Settings | None = None, progress: Progress | None = None
) -> Claims:
    """Measure every claim of `CLAIMS`, in less than a minute on two slow cores.

    Parameters
    ----------
    server : Server
        From `liqlab.serve`, for nothing else: it is flushed again and again, and its maxmemory is lowered and restored.
        Started with ``tdigest=True``, the claims about t-digests are measured too.
    events : pandas.DataFrame
        An event table of two hours or more; what depends on the feed is measured on it.
    settings : Settings, optional
        `liqlab.settings.load()` when absent.
    progress : callable, optional
        Called with (measurements done, measurements in all).

    Returns
    -------
    Claims

    Raises
    ------
    EventError
        The table holds no event, or is none.
    """
    if check(events).empty:
        raise EventError("the feed holds no event; `liqlab feeds inspect` says why")
    began, settings = clock.elapsed_s(), settings or load()
    busiest = events["symbol"].value_counts().index[:_BUSIEST]
    dense = events[events["symbol"].isin(busiest)].reset_index(drop=True)
    probes = list(dict.fromkeys(claim.probe for claim in CLAIMS))
    async with server.connect() as redis:
        bench = Bench(server, redis, events, dense, settings)
        for done, probe in enumerate(probes, 1):
            await bench.figures(probe)
            if progress:
                progress(done, len(probes))
        await redis.flushall()
    rows = [row(claim, bench.known[claim.probe].get(claim.figure, "it was never reached")) for claim in CLAIMS]
    return Claims(pd.DataFrame(rows), clock.elapsed_s() - began)
