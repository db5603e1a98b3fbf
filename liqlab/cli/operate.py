"""Commands for a server that runs for a year: cleanup, restore, monitor, config, migrate, reshard."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from rich.table import Table

from liqlab.cli.options import Json, Set, Url, chosen_settings
from liqlab.cli.terminal import log, print_json, progress, screen
from liqlab.settings import Settings

if TYPE_CHECKING:
    import pandas as pd
    from redis.asyncio import Redis

    from liqlab.cleanup import Action

_CRITICAL: Final = 2  # the exit code
T = TypeVar("T")
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


def cleanup(
    redis: Url = None,
    watch: Annotated[bool, typer.Option("--watch/--once", help="Run the schedule until Ctrl-C, or one round.")] = False,
    dry_run: DryRun = False,
    options: Set = None,
    as_json: Json = False,
) -> None:
    """Bring a running Redis within its byte budget.

    One process may watch; a second one says so and waits until it may.

    Example: LIQLAB_REDIS_URL=redis://localhost:6379/0 liqlab cleanup --dry-run
    """
    from liqlab.cleanup import Cleaner, schedule

    chosen = chosen_settings(options)
    if watch and dry_run:
        raise typer.BadParameter("a dry run is one round: use --once", param_hint="--watch")

    async def run(client: Redis) -> list[Action]:
        cleaner = Cleaner(client, settings=chosen, dry_run=dry_run, on_action=shown if watch else None)
        if watch:
            await schedule.run(client, cleaner, on_wait=log.print)
        return await cleaner.trim() + await cleaner.check() + await cleaner.compact()

    def shown(action: Action) -> None:
        print_json(action.as_dict()) if as_json else screen.print(_sentence(action), markup=False)

    with suppress(KeyboardInterrupt):
        done = _with_client(redis, chosen, run)
        if as_json:
            print_json([action.as_dict() for action in done])
        else:
            for action in done:
                screen.print(_sentence(action), markup=False)
            screen.print("nothing was to be done" if not done else f"{len(done)} actions" + " in a dry run" * dry_run)


def _sentence(action: Action) -> str:
    from liqlab.budget import human

    freed = f", {human(action.freed)} freed" if action.freed > 0 else ""
    counts = f": {action.keys:,} keys" * (action.keys > 0) + f", {action.events:,} events" * (action.events > 0)
    node = f"{action.node}  " if action.node else ""
    return f"{action.tier:>9}  {node}{action.what} {action.family}{counts}{freed}; {action.detail}"


def restore(
    backup: Annotated[Path, typer.Argument(help="A file critical-DATE.parquet of `cleanup.folder`.")],
    redis: Url = None,
    replace: Annotated[bool, typer.Option(help="Write over keys that exist.")] = False,
    options: Set = None,
) -> None:
    """Bring the critical keys of a backup back: positions, signals, VWAPs, names.

    Example: liqlab restore backups/critical-2026-01-31.parquet
    """
    from liqlab.cleanup.backup import restore as back

    done = _with_client(redis, chosen_settings(options), lambda client: back(client, backup, replace=replace))
    screen.print(
        f"{done:,} keys are back; those that existed were " + ("written over" if replace else "left as they are")
    )


def monitor(
    redis: Url = None,
    watch: Annotated[bool, typer.Option("--watch/--once", help="Look again and again until Ctrl-C, or once.")] = False,
    prometheus: Annotated[int | None, typer.Option(metavar="PORT", help="Serve metrics on 127.0.0.1.")] = None,
    options: Set = None,
    as_json: Json = False,
) -> None:
    """Say whether a running Redis is healthy; with --watch, tell of alerts.

    An alert goes to standard error, and to `monitor.webhook` where one is set. A CRITICAL one ends --once with 2.

    Example: liqlab monitor --watch --prometheus 9121 --set monitor.interval_s=10
    """
    from liqlab import monitor as module

    chosen = chosen_settings(options)
    exporter = module.Exporter()
    alarms = module.Alarms(chosen)

    async def run(client: Redis) -> None:
        async for health in module.watch(client, settings=chosen, alarms=alarms, on_alert=told):
            exporter.update(health)
            if as_json:
                print_json(health.as_dict())
            elif not watch:
                screen.print(health.error or _table(health.table().reset_index(), ("field", "reading", "meaning")))
            if not watch:
                return

    def told(alert: Any) -> None:
        log.print(str(alert), markup=False)

    with suppress(KeyboardInterrupt), ExitStack() as stack:
        if prometheus is not None:
            port = stack.enter_context(module.serve_metrics(exporter, prometheus))
            log.print(f"http://127.0.0.1:{port}/metrics", markup=False)
        _with_client(redis, chosen, run)
    if not watch and any(alert.level is module.Level.CRITICAL for alert in alarms.standing.values()):
        raise typer.Exit(_CRITICAL)


def config(
    redis: Url = None,
    out: Annotated[Path | None, typer.Option(help="Write liqlab.toml, redis.conf and the rest there.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Set what can be set on the running server.")] = False,
    dry_run: DryRun = False,
    options: Set = None,
    as_json: Json = False,
) -> None:
    """Show the configuration of the server, write it into files, or apply it to a server that runs.

    Example: liqlab config --out deploy/ --set server.maxmemory=480mb
    """
    from liqlab import config as module

    chosen = chosen_settings(options)
    if out is not None:
        for path in module.write(out, chosen):
            screen.print(str(path), soft_wrap=True)
        return
    if apply:
        found = _with_client(redis, chosen, lambda client: module.apply(client, chosen, dry_run=dry_run)).reset_index()
        columns = tuple(found.columns)
    else:
        import pandas as pd

        rows = module.directives(chosen)
        found = pd.DataFrame([{"directive": r.name, "value": r.value, "where": r.where, "why": r.why} for r in rows])
        columns = tuple(found.columns)
    print_json(found.to_dict("records")) if as_json else screen.print(_table(found, columns))


def migrate(
    redis: Url = None,
    backup: Annotated[Path | None, typer.Option(help="A folder: the backup, made first, and the way back.")] = None,
    dry_run: DryRun = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove old keys once they are verified.")] = False,
    restore: Annotated[bool, typer.Option("--restore", help="Bring the old keys back from the backup.")] = False,
    prefixes: Annotated[list[str] | None, typer.Option("--prefix", help="What old keys begin with.")] = None,
    exchange: Annotated[str | None, typer.Option(help="The exchange of events that do not name it.")] = None,
    options: Set = None,
    as_json: Json = False,
) -> None:
    """From sorted sets of JSON, text streams or cryptofeed's keys to liqlab's: a checklist, then the migration.

    Without --backup: the four phases, what is done and what is to do. Interrupted, the same command goes on.

    Example: liqlab migrate --backup backups/legacy --dry-run
    """
    from liqlab import migrate as module

    chosen = chosen_settings(options)
    more: dict[str, Any] = {"prefixes": tuple(prefixes)} if prefixes else {}
    if backup is None:
        if dry_run or remove or restore:
            raise typer.BadParameter("name the folder of the backup", param_hint="--backup")
        found = _with_client(redis, chosen, lambda client: module.checklist(client, settings=chosen, **more))
        print_json(found.to_dict("records")) if as_json else screen.print(_table(found, tuple(found.columns)))
        return
    with progress("migrate") as step:
        if restore:
            done = _with_client(redis, chosen, lambda client: module.restore(backup, client, progress=step))
            screen.print(f"{done:,} old keys are back")
            return
        made = _with_client(
            redis, chosen,
            lambda client: module.migrate(
                client, backup=backup, settings=chosen, exchange=exchange, dry_run=dry_run, remove=remove,
                progress=step, **more,
            ),
        )  # fmt: skip
    if as_json:
        print_json(made.as_dict())
    else:
        _show_migrated(made)
    if not made.ok:
        raise typer.Exit(1)


def reshard(
    folder: Annotated[Path, typer.Argument(help="Where all is kept that is read; it stays.")],
    shards: Annotated[int, typer.Option("--to", min=1, max=1024, help="The new number of shards.")],
    redis: Url = None,
    target: Annotated[str | None, typer.Option(help="Another server or cluster, without events; by its URL.")] = None,
    options: Set = None,
    as_json: Json = False,
) -> None:
    """Change the number of shards, in place or onto another server: on from one server to a cluster.

    End every writer before. The setting `shards` is the present number. Interrupted, the same command goes on.

    Example: liqlab reshard backups/shards --to 32 --set shards=16
    """
    from dataclasses import asdict

    from liqlab import migrate as module
    from liqlab import server

    chosen = chosen_settings(options)

    async def run(client: Redis) -> module.Resharded:
        with progress("reshard") as step:
            given: dict[str, Any] = {"folder": folder, "shards": shards, "settings": chosen, "progress": step}
            if target is None:
                return await module.reshard(client, **given)
            async with server.connect(target, settings=chosen.model_copy(update={"shards": shards})) as into:
                return await module.reshard(client, target=into, **given)

    done = _with_client(redis, chosen, run)
    if as_json:
        print_json(asdict(done))
    else:
        screen.print(f"{done.events:,} events and {done.keys:,} keys of symbols are in {done.shards} shards: set that")


def _show_migrated(made: Any) -> None:
    from liqlab.budget import human

    screen.print(_table(made.table, tuple(made.table.columns)))
    for note in made.notes:
        screen.print(note, markup=False)
    if made.quarantine is not None:
        screen.print(f"{int(made.table['rejected'].sum()):,} entries are no events: {made.quarantine}", soft_wrap=True)
    if made.memory:
        screen.print("used_memory " + ", ".join(f"{name} {human(size)}" for name, size in made.memory.items()))


def _with_client(url: str | None, chosen: Settings, work: Callable[[Redis], Awaitable[T]]) -> T:
    from liqlab import server

    async def run() -> T:
        async with server.connect(url, settings=chosen) as client:
            return await work(client)

    return asyncio.run(run())


def _table(rows: pd.DataFrame, columns: Iterable[str]) -> Table:
    """Show columns of a DataFrame, numbers to the right."""
    table = Table(box=None, header_style="bold")
    names = list(columns)
    for name in names:
        right = rows[name].map(lambda value: isinstance(value, int | float)).all()
        table.add_column(name, justify="right" if right and len(rows) else "left", overflow="fold")
    for row in rows[names].itertuples(index=False):
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row))
    return table
