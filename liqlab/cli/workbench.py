"""Commands of the workbench that play a feed on a server of their own: replay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from liqlab.cli.options import Json, known, on_feed, on_private
from liqlab.cli.terminal import print_json, progress, screen
from liqlab.settings import Settings

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from liqlab.fidelity import Replayed


@on_feed
def replay(
    recorded: Any,
    chosen: Settings,
    method: Annotated[str, typer.Option(help="Where percentiles come from; see docs/percentiles.md.")] = "logbins",
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

    known(method, METHODS)
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
    _say(done)


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


def _say(done: Replayed) -> None:
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
