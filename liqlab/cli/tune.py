"""Commands of the workbench that need no server: size, tune, recommend; and the panel as an app."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.table import Table

from liqlab.cli.options import OVER_BUDGET, Json, on_feed, on_private
from liqlab.cli.terminal import log, print_json, progress, screen, wait
from liqlab.settings import Settings, SettingsError, changed, parse_bytes, setting

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from liqlab.sizing import Calibration
    from liqlab.tuning import Outcome, Recommendation, Verified

_SHOWN: Final = 15  # rows of a front that may have hundreds
Memory = Annotated[str | None, typer.Option(help="What the server may use, such as 240mb; server.maxmemory if absent.")]
Rate = Annotated[float, typer.Option(help="How many times the events of the feed.")]
Workers = Annotated[int, typer.Option(help="Processes, by Dask where more than one.")]
Dask = Annotated[str | None, typer.Option(help="A Dask scheduler that tries them, tcp://host:8786.")]


@on_feed
def size(
    recorded: Any,
    chosen: Settings,
    rate: Rate = 1.0,
    hours: Annotated[float, typer.Option(help="Let the feed go on until it lasts so long.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Predict what a feed takes and gives under settings: bytes by share, history, thresholds, alerts.

    Example: liqlab size --feed data/normal-6h.jsonl.gz --set server.maxmemory=16mb
    """
    from liqlab.sizing import prepare
    from liqlab.tuning import evaluate, extrapolate

    found = evaluate(prepare(extrapolate(recorded, rate=rate, hours=hours)), chosen, _calibrated(chosen))
    if as_json:
        print_json({**found.as_dict(), "predicted": found.predicted.as_dict()})
        return
    _say(found)
    families = found.predicted.table
    table = Table(box=None)
    for name in ("family", "keys", "members", "bytes at the end", "most"):
        table.add_column(name, justify="left" if name == "family" else "right")
    for family, row in families.iterrows():
        most = found.predicted.families[str(family)].max()
        table.add_row(str(family), *(f"{row[name]:,}" for name in ("keys", "members", "bytes")), f"{most:,.0f}")
    screen.print(table)


@on_feed
def tune(
    recorded: Any,
    chosen: Settings,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=A,B,...", help="A setting and its values; by default the usual ones."),
    ] = None,
    count: Annotated[int | None, typer.Option(help="Try only so many combinations, drawn.")] = None,
    rate: Rate = 1.0,
    folder: Annotated[Path | None, typer.Option(help="Keep results here, as Parquet, and go on from them.")] = None,
    dask: Dask = None,
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Try many settings on a feed, and show those that no other beats.

    Example: liqlab tune --feed data/normal-6h.jsonl.gz --count 200 --vary writer.block_bytes=4096,16384,65536
    """
    from liqlab.budget import records
    from liqlab.tuning import SPACE, extrapolate, pareto, sweep

    space = dict(_varied(one, chosen) for one in vary or []) or SPACE
    with progress("tune") as step:
        tried = sweep(
            extrapolate(recorded, rate=rate), space, settings=chosen, calibration=_calibrated(chosen), count=count,
            folder=folder, dask=dask, workers=workers, progress=step,
        )  # fmt: skip
    front = pareto(tried).sort_values("history_h", ascending=False)
    if as_json:
        print_json({"tried": len(tried), "front": records(front)})
        return
    screen.print(f"{len(tried):,} settings tried; {len(front):,} are beaten by no other")
    varied = [name for name in space if front[name].nunique() > 1]
    table = Table(box=None)
    for name in (*(name.rpartition(".")[2] for name in varied), "history h", "used MiB", "off %", "recall", "fits"):
        table.add_column(name, justify="right")
    for row in front.head(_SHOWN).to_dict("records"):
        figures = (
            f"{row['history_h']:,.1f}",
            f"{row['used_bytes'] / (1 << 20):,.2f}",
            f"{row['threshold_error_pct']:.2f}".replace("nan", "-"),
            f"{row['recall']:.4f}".replace("nan", "-"),  # there is none without thresholds, or without alerts
        )
        chosen_values = (str(row[name]).replace("<NA>", "-") for name in varied)
        table.add_row(*chosen_values, *figures, "yes" if row["fits"] else "no")
    screen.print(table)
    same = ", ".join(f"{name}={front[name].iloc[0]}" for name in space if name not in varied)
    if same:
        screen.print(f"all of them: {same}", soft_wrap=True)


@on_feed
def recommend(
    recorded: Any,
    chosen: Settings,
    memory: Memory = None,
    rate: Rate = 1.0,
    error: Annotated[float, typer.Option(help="Thresholds within so many per cent of exact history's.")] = 1.0,
    recall: Annotated[float, typer.Option(help="Which part of exact history's alerts to raise.")] = 0.99,
    history: Annotated[float, typer.Option(help="Hours of events that must be there.")] = 0.0,
    fit_shares: Annotated[bool, typer.Option(help="Give the streams what other families do not need.")] = False,
    verify: Annotated[bool, typer.Option(help="Play the feed, at that rate, through a real Redis with them.")] = False,
    count: Annotated[int, typer.Option(help="Try only so many settings, drawn.")] = 300,
    out: Annotated[Path | None, typer.Option(help="Write liqlab.toml, redis.conf and the rest to this folder.")] = None,
    dask: Dask = None,
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """Find the settings that keep the longest history within constraints; exit 3 where none holds them.

    Example: liqlab recommend --feed data/normal-6h.jsonl.gz --memory 16mb --rate 2 --fit-shares
    """
    from liqlab import config
    from liqlab.tuning import Constraints, recommend

    wanted = Constraints(
        maxmemory=_bytes(memory), error_pct=error, recall=recall, history_h=history, rate=rate,
        shares="fitted" if fit_shares else "fixed",
    )  # fmt: skip
    known = _calibrated(chosen)
    with progress("recommend") as step:
        found = recommend(
            recorded, chosen, wanted, calibration=known, count=count, dask=dask, workers=workers, progress=step
        )
    checked = _verified(found, known) if verify else None
    written = config.write(out, found.settings) if out else []
    if as_json:
        settings = found.settings.model_dump(mode="json", exclude={"redis_url"}, exclude_defaults=True)
        print_json({**found.as_dict(), "settings": settings, "verified": checked and checked.as_dict()})
    else:
        _show(found, checked)
        for path in written:
            screen.print(str(path), soft_wrap=True)
    if not found.holds or (checked is not None and not checked.fits):
        raise typer.Exit(OVER_BUDGET)


@on_feed
def app(
    recorded: Any,
    chosen: Settings,
    port: Annotated[int, typer.Option(help="Of this machine, 127.0.0.1.")] = 8866,
    browser: Annotated[bool, typer.Option(help="Open it in the browser.")] = True,
    export_to: Annotated[Path, typer.Option(help="Where the panel's export goes.")] = Path("liqlab-config"),
    seconds: Annotated[float | None, typer.Option(help="Stop by itself.")] = None,
) -> None:
    """Serve the tuning panel of a feed as a page of this machine, until Ctrl-C.

    Example: liqlab app --feed data/normal-6h.jsonl.gz --no-browser
    """
    from liqlab.report.execute import environment
    from liqlab.widgets.app import command, with_template

    with tempfile.TemporaryDirectory(prefix="liqlab-app-") as folder:
        words = command(Path(folder), recorded.events, export_to.absolute(), port=port, browser=browser)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # how a service is stopped: as by Ctrl-C
        log.print(f"http://127.0.0.1:{port}/  Ctrl-C stops it.")
        process = subprocess.Popen([sys.executable, *words], env=with_template(environment(chosen)))
        with suppress(KeyboardInterrupt):
            if (code := wait(process.poll, seconds)) is not None:
                raise typer.Exit(code)
        process.terminate()  # Voila ends its kernels with itself
        process.wait()


def _verified(found: Recommendation, calibration: Calibration) -> Verified:
    from liqlab.tuning import verify

    async def run(client: Redis) -> Verified:
        with progress("verify") as step:
            return await verify(
                found.events, found.settings, client, calibration=calibration, window_s=found.window_s, progress=step
            )

    return on_private(found.settings, run, tdigest=False)


def _calibrated(chosen: Settings) -> Calibration:
    """Measure the server that liqlab would start: a second, and every figure is of that server."""
    from liqlab.sizing import calibrate

    return on_private(chosen, calibrate, tdigest=False)


def _bytes(memory: str | None) -> int | None:
    try:
        size: Any = parse_bytes(memory)
        return None if size is None else int(size)
    except ValueError as error:
        raise typer.BadParameter(f"{memory!r} {error}", param_hint="--memory") from None


def _varied(text: str, chosen: Settings) -> tuple[str, list[Any]]:
    """Read ``writer.layout=shared,hybrid``; each value as the settings take it."""
    name, separator, values = text.partition("=")
    if not separator or not values:
        raise SettingsError(f"--vary {text!r}: write it as NAME=A,B, e.g. --vary writer.layout=shared,hybrid")
    return name, [setting(changed(chosen, {name: one.strip()}), name) for one in values.split(",")]


def _say(found: Outcome) -> None:
    from liqlab.budget import human

    screen.print(f"{found.headline}. {found.detail}", soft_wrap=True)
    table = Table(box=None)
    for name in ("share", "most", "of", "headroom"):
        table.add_column(name, justify="left" if name == "share" else "right")
    for share, row in found.shares.iterrows():
        style = "red" if row["headroom_pct"] < 0 and share != "streams" else ""
        table.add_row(
            str(share), human(row["bytes"]), human(row["budget_bytes"]), f"{row['headroom_pct']:.1f} %", style=style
        )
    screen.print(table)


def _show(found: Recommendation, checked: Verified | None) -> None:
    from liqlab import config

    screen.print(config.toml(found.settings), markup=False, end="")
    _say(found.outcome)
    screen.print(
        f"{int(found.tried['holds'].sum()):,} of {len(found.tried):,} settings hold the constraints; nearest limit:"
        f" {found.binds}, {found.limits['used_pct'].max():.0f} % of it"
        + ("" if found.holds else ". None does: these come nearest"),
        soft_wrap=True,
    )
    if checked is None:
        return
    table = Table(title="predicted, and measured on a real Redis", box=None)
    for name in ("figure", "predicted", "measured", "off"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for figure, row in checked.table.iterrows():
        values = [_figure(row[name]) for name in ("predicted", "measured")]
        table.add_row(str(figure), *values, f"{row['off_pct']:+.1f} %" if row["off_pct"] == row["off_pct"] else "")
    screen.print(table)
    stays = "stays within" if checked.fits else "does not stay within"
    screen.print(f"{stays} its memory; evicted: {checked.replayed.ingested.evicted}")


def _figure(value: float) -> str:
    """Return bytes and counts as whole numbers, a share with three digits, and nothing for what is not known."""
    if value != value:
        return ""
    return f"{value:,.0f}" if value > 1 else f"{value:.3g}"
