"""The command line: every operation under the name that it has in Python."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from liqlab import __version__
from liqlab.cli import operate, recording, study, tune
from liqlab.cli.options import (
    OVER_BUDGET,
    FailOn,
    FeedOption,
    Feeds,
    Json,
    Set,
    Url,
    chosen_settings,
    on_feed,
    on_server,
    paths,
)
from liqlab.cli.terminal import (
    budget_table,
    change_table,
    log,
    nodes_table,
    plain_table,
    print_json,
    progress,
    screen,
    wait,
)
from liqlab.settings import Settings, SettingsError

app = typer.Typer(
    help="How much liquidation history a small Redis keeps, and what each choice costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
feeds_app = typer.Typer(help="Recorded feeds: what is in them.", no_args_is_help=True)
app.add_typer(feeds_app, name="feeds")
for _command in (
    *(study.quantiles, study.detect, study.replay),
    *(tune.size, tune.tune, tune.recommend, tune.app),
    recording.record,
    *(operate.cleanup, operate.restore, operate.monitor, operate.config, operate.migrate, operate.reshard),
):
    app.command()(_command)


def main() -> None:
    """Run the command line; an error that has a cure is one sentence and exit code 1, never a traceback."""
    try:
        app()
    except Exception as error:
        if not isinstance(error, _expected()):
            raise
        from liqlab.server import redact

        words = redact(str(error))
        if isinstance(error, ModuleNotFoundError):
            words = f"{error.name} is not installed; `liqlab doctor` says which extra has it"
        log.print("liqlab:", words, markup=False)
        sys.exit(1)


def _expected() -> tuple[type[Exception], ...]:
    # Imported when something has gone wrong: `liqlab --help` does not wait for pandas.
    from redis.exceptions import RedisError

    from liqlab.cleanup.backup import BackupError
    from liqlab.codecs import CodecError
    from liqlab.events import EventError
    from liqlab.feeds import FeedError
    from liqlab.migrate import MigrateError
    from liqlab.monitor import MonitorError
    from liqlab.record import RecordError
    from liqlab.report import ReportError
    from liqlab.server import ServerError
    from liqlab.writer import WriterError

    feeds = (EventError, FeedError, RecordError)
    ours = (BackupError, CodecError, MigrateError, MonitorError, ReportError, ServerError, WriterError)
    return *feeds, *ours, ModuleNotFoundError, OSError, RedisError, SettingsError


def _version(value: bool) -> None:
    if value:
        screen.print(__version__)
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """See `liqlab COMMAND --help`; each has an example."""


@app.command()
def report(
    feeds: Feeds = None,
    feed: FeedOption = None,
    out: Annotated[
        Path,
        typer.Option(help="Where the HTML goes; replaced only by a complete one. With {date} in it many are kept."),
    ] = Path("build/report.html"),
    keep: Annotated[int, typer.Option(help="Of dated reports, how many stay.")] = 30,
    fail_on: FailOn = None,
    options: Set = None,
    as_json: Json = False,
) -> None:
    """Feed into a private Redis, and a self-contained HTML report of where every byte went.

    Example: liqlab report --feed data/normal-6h.jsonl.gz --out build/report.html --fail-on over-budget
    """
    from liqlab import report as module
    from liqlab.budget import records

    chosen = chosen_settings(options)
    kept = None
    with progress("report") as step:
        if "{date}" in out.name:
            kept = module.keep(paths(feeds, feed), out, count=keep, settings=chosen, progress=step)
            made = kept.report
        else:
            made = module.run(paths(feeds, feed), out, settings=chosen, progress=step)
    changed = records(kept.changes.reset_index()) if kept else []
    if as_json:
        print_json({"report": str(made.html), **made.budget, **({"changes": changed} if kept else {})})
    else:
        screen.print(budget_table(made.budget))
        if kept and kept.since:
            screen.print(change_table(kept.since.stem, changed))
        screen.print(f"report: {made.html}", soft_wrap=True)
    _fail(fail_on, made.budget["over"])


@app.command()
def lab(notebook: Annotated[str, typer.Argument(help="The notebook to open.")] = "00-start") -> None:
    """Open JupyterLab on a notebook of the workbench.

    Example: liqlab lab 02-memory-budget
    """
    from liqlab.report import notebook as find

    path = find(notebook)
    # Jupyter refuses to run as root unless told to; in a container that is who one is.
    root = ["--allow-root"] if os.geteuid() == 0 else []
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *root, str(path)])


@app.command()
def serve(options: Set = None, seconds: Annotated[float | None, typer.Option(help="Stop by itself.")] = None) -> None:
    """Run a private Redis until Ctrl-C and print its URL.

    Example: liqlab serve --set server.maxmemory=64mb
    """
    from liqlab.server import serve as start

    # Ctrl-C is the ordinary end, as soon as the URL can be read.
    with suppress(KeyboardInterrupt), start(settings=chosen_settings(options)) as running:
        screen.print(running.url, soft_wrap=True)
        log.print("Ctrl-C stops it and removes everything.")
        wait(lambda: None, seconds)


@app.command()
@on_feed
def ingest(
    recorded: Any,
    chosen: Settings,
    redis: Url = None,
    expire: Annotated[bool, typer.Option(help="Let TTLs run on the feed's clock.")] = True,
    as_json: Json = False,
) -> None:
    """Write a feed into Redis: the one of LIQLAB_REDIS_URL, else a private one that is gone afterwards.

    Example: liqlab ingest data/cascade-1h.jsonl.gz --set writer.layout=shared
    """
    from liqlab import budget as module
    from liqlab import server
    from liqlab.replay import ingest as play

    async def run(url: str) -> tuple[Any, Any]:
        async with server.connect(url, settings=chosen) as client:
            with progress("ingest") as step:
                done = await play(recorded, client, settings=chosen, expire=expire, progress=step)
            with progress("measure") as step:
                return done, await module.measure(client, settings=chosen, progress=step)

    ingested, measured = on_server(redis, chosen, run)
    if as_json:
        print_json({"feed": recorded.report.as_dict(), "ingest": ingested.as_dict(), "budget": measured.as_dict()})
        return
    screen.print(plain_table(recorded.report.table()))
    screen.print(
        f"{ingested.events:,} events in {ingested.seconds:.1f} s"
        f" ({ingested.events / ingested.seconds:,.0f}/s); late {ingested.late:,}, trimmed by MAXLEN"
        f" {ingested.trimmed:,}, keys expired {sum(ingested.expired.values()):,}, evicted {ingested.evicted:,}"
    )
    screen.print(budget_table(measured.as_dict()))


@app.command()
@on_feed
def codecs(
    recorded: Any,
    chosen: Settings,
    as_json: Json = False,
) -> None:
    """Encode a feed with every codec: bytes and microseconds an event, without a server.

    Example: liqlab codecs --feed data/normal-6h.jsonl.gz
    """
    from liqlab.codecs.compare import compare
    from liqlab.feeds import FeedError

    if recorded.events.empty:
        raise FeedError("the feed holds no event; `liqlab feeds inspect` says why")
    found = compare(recorded.events)
    if as_json:
        print_json(found.reset_index().to_dict("records"))
        return
    table = Table(box=None)
    for name in ("codec", "bytes/event", "encode us", "decode us", "carried", ""):
        table.add_column(name, justify="left" if name in ("codec", "") else "right")
    for codec, row in found.iterrows():
        figures = [f"{row[column]:.2f}" for column in ("bytes", "encode_us", "decode_us")]
        table.add_row(str(codec), *figures, f"{row['carried_pct']:.1f} %", "block" if row["block"] else "")
    screen.print(table)


@app.command()
def budget(
    redis: Url = None,
    limit: Annotated[int, typer.Option(help="Keys measured in a family; more are sampled.")] = 5_000,
    fail_on: FailOn = None,
    options: Set = None,
    as_json: Json = False,
) -> None:
    """Where the bytes of a running Redis went, by family. Reads only.

    Example: LIQLAB_REDIS_URL=redis://localhost:6379/0 liqlab budget --fail-on over-budget
    """
    from liqlab import budget as module
    from liqlab import server

    chosen = chosen_settings(options)

    async def run(url: str | None) -> Any:
        async with server.connect(url, settings=chosen) as client:
            with progress("measure") as step:
                return await module.measure(client, settings=chosen, limit=limit, progress=step)

    measured = asyncio.run(run(redis)).as_dict()
    if as_json:
        print_json(measured)
    else:
        screen.print(budget_table(measured))
        if measured["nodes"]:
            screen.print(nodes_table(measured["nodes"]))
    _fail(fail_on, measured["over"])


@app.command()
def synth(
    profile: Annotated[str, typer.Option(help="quiet, normal or cascade.")] = "normal",
    hours: Annotated[float, typer.Option(help="Length of the feed.")] = 24.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same feed.")] = 0,
    rate_per_min: Annotated[float | None, typer.Option(help="Events a minute instead of the profile's.")] = None,
    symbols: Annotated[int, typer.Option(help="How many symbols there are.")] = 400,
    form: Annotated[str, typer.Option("--format", help="binance, bybit, okx or recorder.")] = "binance",
    out: Annotated[Path, typer.Option(help="A .gz or .zst suffix compresses it.")] = Path("build/synthetic.jsonl.gz"),
    options: Set = None,
) -> None:
    """Write a synthetic feed in a venue's own wire format.

    Example: liqlab synth --profile normal --hours 24 --seed 0 --out build/normal-24h.jsonl.gz
    """
    from liqlab.feeds import FeedError
    from liqlab.feeds.synth import synth as draw
    from liqlab.feeds.wire import EXCHANGES, write_wire

    if form not in EXCHANGES:
        raise FeedError(f"--format {form!r}: a feed can be written as {', '.join(EXCHANGES)}")
    events = draw(profile, hours=hours, seed=seed, rate_per_min=rate_per_min, symbols=symbols, exchange=EXCHANGES[form])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_wire(events, out, form, settings=chosen_settings(options))
    screen.print(f"{len(events):,} synthetic events ({profile}, seed {seed}): {out}", soft_wrap=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine has, what is missing, and how to get it.

    Example: liqlab doctor
    """
    from liqlab.cli.doctor import checks
    from liqlab.server import redact

    rows = list(checks())
    if as_json:
        print_json([{"check": name, "ok": ok, "detail": detail} for name, ok, detail in rows])
    else:
        table = Table(box=None, show_header=False)
        for name, ok, detail in rows:
            mark = "[yellow]optional[/yellow]" if ok is None else "[green]ok[/green]" if ok else "[red]missing[/red]"
            table.add_row(mark, name, redact(detail))
        screen.print(table)
    if any(ok is False for _, ok, _ in rows):
        raise typer.Exit(1)


@feeds_app.command()
@on_feed
def inspect(
    recorded: Any,
    chosen: Settings,
    as_json: Json = False,
) -> None:
    """Read a feed and say what is in it: read = accepted + duplicates + rejected.

    Example: liqlab feeds inspect recording.csv --map ts_ms=timestamp,size=quantity --unit base
    """
    print_json(recorded.report.as_dict()) if as_json else screen.print(plain_table(recorded.report.table()))


def _fail(condition: str | None, over: list[str]) -> None:
    if condition and over:
        log.print(f"over budget: {', '.join(over)}")
        raise typer.Exit(OVER_BUDGET)
