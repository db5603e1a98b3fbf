"""Commands that play a feed on a server of their own: quantiles, detect, replay."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from liqlab.cli.options import (
    Exchange,
    FeedOption,
    Feeds,
    Format,
    Json,
    Map,
    Set,
    Symbol,
    Unit,
    Url,
    Zone,
    chosen_settings,
    known,
    on_feed,
    on_private,
    paths,
    read,
)
from liqlab.cli.terminal import log, print_json, progress, screen
from liqlab.settings import Settings

if TYPE_CHECKING:
    import pandas as pd
    from redis.asyncio import Redis

    from liqlab.fidelity import Fidelity, Replayed

_SHOWN: Final = 20  # rows of a table that may have thousands


def detect(
    feeds: Feeds = None,
    feed: FeedOption = None,
    form: Format = "auto",
    symbol: Symbol = None,
    exchange: Exchange = None,
    columns: Map = None,
    unit: Unit = None,
    tz: Zone = None,
    redis: Url = None,
    method: MethodName = None,
    options: Set = None,
    as_json: Json = False,
) -> None:
    """Raise alerts: of a feed, beside those that unlimited history would have raised; without one, of a live Redis.

    Example: liqlab detect --feed data/cascade-1h.jsonl.gz --set detector.percentile=99
    """
    from liqlab.percentiles import METHODS

    chosen = chosen_settings(options)
    known(method := method or chosen.detector.method, METHODS)
    if not feeds and not feed:
        with suppress(KeyboardInterrupt):
            asyncio.run(_follow(redis, chosen, method, as_json))
        return

    from liqlab.fidelity import fidelity

    recorded = read(paths(feeds, feed), chosen, form, symbol, exchange, columns, unit, tz)

    async def run(client: Redis) -> Fidelity:
        with progress("detect") as step:
            return await fidelity(recorded, client, method=method, settings=chosen, progress=step)

    done = on_private(chosen, run, tdigest=method == "tdigest")
    if as_json:
        print_json({"alerts": done.found.to_dict("records"), "fidelity": done.as_dict()})
        return
    for row in done.found.tail(_SHOWN).itertuples():
        screen.print(_sentence(row, chosen), markup=False, soft_wrap=True)
    if len(done.found) > _SHOWN:
        screen.print(f"... the last {_SHOWN} of {len(done.found):,}; --json has all")
    shares = {name: "-" if share is None else f"{share:.4f}" for name, share in
              (("precision", done.precision), ("recall", done.recall))}  # fmt: skip
    screen.print(
        f"{len(done.found):,} alerts with {method}, {len(done.true):,} with unlimited history: precision"
        f" {shares['precision']}, recall {shares['recall']}, {done.identical:,} at the very same event"
    )
    if len(done.differing):
        screen.print(_differing(done.differing))


MethodName = Annotated[
    str | None, typer.Option(help="Where percentiles come from: docs/percentiles.md; detector.method if absent.")
]


@on_feed
def quantiles(
    recorded: Any,
    chosen: Settings,
    as_json: Json = False,
) -> None:
    """Keep a feed's percentiles in every way there is: error, bytes and query time of each.

    Example: liqlab quantiles --feed data/normal-6h.jsonl.gz
    """
    from liqlab import server
    from liqlab.comparison import methods_compared

    async def run(client: Redis) -> pd.DataFrame:
        with progress("quantiles") as step:
            return await methods_compared(recorded.events, client, settings=chosen, progress=step)

    found = on_private(chosen, run, tdigest=server.tdigest_module() is not None)
    if as_json:
        print_json(found.to_dict("records"))
        return
    table = Table(box=None)
    for name in ("method", "symbol", "events", "off by", "in ranks", "bytes", "query us", ""):
        table.add_column(name, justify="left" if name in ("method", "symbol", "") else "right", no_wrap=True)
    for row in found.sort_values(["events", "bytes"], ascending=[False, True], kind="stable").itertuples():
        table.add_row(
            str(row.method), str(row.symbol), f"{row.events:,}", f"{row.dollar_error_pct:.2f} %",
            f"{row.rank_error_points:.2f}", f"{row.bytes:,}", f"{row.query_us:,.0f}", "biased" if row.biased else "",
        )  # fmt: skip
    screen.print(table)
    screen.print(
        "off by: the worst of p80, p85, p90, p95 and p99 of the last window, in dollars and in percentage points"
    )
    if "tdigest" not in set(found["method"]):
        screen.print("tdigest is left out: the server has no TDIGEST; pip install 'liqlab[tdigest]' (Linux x86-64)")


@on_feed
def replay(
    recorded: Any,
    chosen: Settings,
    method: MethodName = None,
    percentile: Annotated[
        list[float] | None, typer.Option(help="To compare with the exact one; 95 by default.")
    ] = None,
    cleanup: Annotated[bool, typer.Option(help="Run the schedule of cleanup on the feed's clock.")] = True,
    as_json: Json = False,
) -> None:
    """Play a feed through the whole system in event time: memory, events lost, percentile error, alerts.

    Example: liqlab replay --feed data/cascade-1h.jsonl.gz --set writer.layout=per_symbol
    """
    from liqlab.fidelity import replay as play
    from liqlab.percentiles import METHODS

    known(method := method or chosen.detector.method, METHODS)
    asked = percentile or [95.0]
    if wrong := [one for one in asked if not 0 < one < 100]:
        raise typer.BadParameter(f"{wrong[0]:g} is not between 0 and 100", param_hint="--percentile")

    async def run(client: Redis) -> Replayed:
        with progress("replay") as step:
            return await play(
                recorded, client, settings=chosen, method=method, percentiles=asked, cleaner=cleanup, progress=step
            )

    done = on_private(chosen, run, tdigest=method == "tdigest")
    if as_json:
        print_json(done.as_dict())
        return
    screen.print(_by_family(done))
    _account(done)


async def _follow(url: str | None, chosen: Settings, method: str, as_json: bool) -> None:
    from dataclasses import asdict

    from liqlab import server
    from liqlab.detector import Detector
    from liqlab.percentiles import METHODS

    known(method, [name for name in METHODS if name != "unlimited"])
    async with server.connect(url, settings=chosen) as client:
        detector = Detector(client, method=METHODS[method](client, settings=chosen), settings=chosen)
        await client.ping()
        log.print("Looking at what is written; Ctrl-C ends it.")
        async for alerts in detector.follow():
            for alert in alerts:
                print_json(asdict(alert)) if as_json else screen.print(
                    _sentence(alert, chosen), markup=False, soft_wrap=True
                )


def _sentence(alert: Any, chosen: Settings) -> str:
    import pandas as pd

    minutes = chosen.detector.volume_s / 60
    return (
        f"{pd.Timestamp(alert.ts_ms, unit='ms'):%Y-%m-%d %H:%M:%S}  {alert.symbol} {alert.side}"
        f"  {alert.notional:,.0f} USD at {alert.price:.10g}  larger than {100 * alert.rank:.1f} %"
        f" (threshold {alert.threshold:,.0f}); {alert.volume:,.0f} USD of its side in {minutes:g} min"
    )


def _differing(pairs: Any) -> Table:
    import pandas as pd

    table = Table(title=f"{len(pairs):,} differ" + f", the first {_SHOWN}:" * (len(pairs) > _SHOWN), box=None)
    for name in ("time", "symbol", "side", "", "delay s", "notional", "threshold", "true threshold"):
        table.add_column(name, justify="right" if name in ("delay s", "notional") or "threshold" in name else "left")
    for row in pairs.head(_SHOWN).itertuples():
        when = row.ts_ms_found if row.what == "extra" else row.ts_ms_true
        notional = row.notional_found if row.what == "extra" else row.notional_true
        figures = [
            "" if pd.isna(figure) else f"{figure:,.0f}"
            for figure in (notional, row.threshold_found, row.threshold_true)
        ]
        delay = "" if pd.isna(row.delay_s) else f"{row.delay_s:+.1f}"
        table.add_row(f"{pd.Timestamp(int(when), unit='ms'):%H:%M:%S}", row.symbol, row.side, row.what, delay, *figures)
    return table


def _by_family(done: Replayed) -> Table:
    from liqlab.budget import human

    table = Table(box=None)
    for name in ("family", "share", "keys", "members", "bytes", "share's budget", ""):
        table.add_column(name, justify="left" if name in ("family", "share", "") else "right")
    for family, row in done.table.iterrows():
        table.add_row(
            str(family), row["share"], f"{row['keys']:,}", f"{row['members']:,}", f"{row['bytes']:,}",
            human(row["budget_bytes"]), "over" if row["over"] else "", style="red" if row["over"] else "",
        )  # fmt: skip
    return table


def _account(done: Replayed) -> None:
    from liqlab.budget import human

    ingested, alerts = done.ingested, done.fidelity
    peak = int(done.timeline["used_memory"].max())
    used = f"at most {human(peak)} of {human(done.maxmemory)} in use"
    screen.print(f"{ingested.events:,} events in {ingested.seconds:.1f} s; {used}")
    parts = ", ".join(f"{name} {count:,}" for name, count in done.lost.items())
    screen.print(f"lost: {done.events_lost:,} of them ({parts}); keys expired {sum(ingested.expired.values()):,}")
    for percentile, part in done.errors.groupby("percentile"):
        off = part["error_pct"].abs()
        screen.print(f"p{percentile:g}: {off.median():.2f} % off in the median, {off.max():.2f} % at worst")
    shares = (
        f"{name} {'-' if share is None else format(share, '.4f')}"
        for name, share in (("precision", alerts.precision), ("recall", alerts.recall))
    )
    screen.print(f"{len(alerts.found):,} alerts, {len(alerts.true):,} with unlimited history: {', '.join(shares)}")
