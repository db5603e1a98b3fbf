"""Options that several commands share."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from liqlab import settings
from liqlab.cli.terminal import progress
from liqlab.settings import Settings, SettingsError

if TYPE_CHECKING:
    from redis.asyncio import Redis

T = TypeVar("T")
OVER_BUDGET: Final = 3

Feeds = Annotated[list[str] | None, typer.Argument(metavar="FEED...", help="Files, folders or globs.")]
FeedOption = Annotated[list[str] | None, typer.Option("--feed", help="The same as the arguments.")]
Format = Annotated[str, typer.Option("--format", help="Found from the content by default.")]
Symbol = Annotated[str | None, typer.Option(help="The symbol of a feed that does not name it.")]
Exchange = Annotated[str | None, typer.Option(help="The exchange of a feed that does not name it.")]
Map = Annotated[str | None, typer.Option("--map", help="Columns of any other table: ts_ms=timestamp,size=quantity")]
Unit = Annotated[str | None, typer.Option(help="What its size counts: base, contracts or usd.")]
Zone = Annotated[str | None, typer.Option("--tz", help="The zone of times without one; UTC by default.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting: writer.layout=shared")]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]
Url = Annotated[str | None, typer.Option("--redis", help="A server's URL; LIQLAB_REDIS_URL keeps it out of `ps`.")]


def _condition(named: str | None) -> str | None:
    if named not in (None, "over-budget"):
        raise typer.BadParameter(f"{named!r} is not a condition; the one there is: over-budget")
    return named


FailOn = Annotated[
    str | None,
    typer.Option("--fail-on", help=f"over-budget: exit with {OVER_BUDGET} when one is.", callback=_condition),
]


def chosen_settings(options: list[str] | None) -> Settings:
    """Turn ``writer.layout=shared`` into the keywords of `settings.load`."""
    tree: dict[str, Any] = {}
    for option in options or []:
        name, separator, value = option.partition("=")
        if not separator:
            raise SettingsError(f"--set {option!r}: write it as NAME=VALUE, e.g. --set writer.layout=shared")
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise SettingsError(f"--set {option!r}: {section} is given a value of its own by another --set")
        node[leaf] = value
    return settings.load(**tree)


def paths(feeds: list[str] | None, more: list[str] | None) -> list[str]:
    """Join what `Feeds` and `FeedOption` name.

    Raises
    ------
    typer.BadParameter
        There is none.
    """
    named = [*(more or []), *(feeds or [])]
    if not named:
        raise typer.BadParameter("name at least one feed: a file, a folder or a glob", param_hint="FEED")
    return named


def read(
    named: list[str],
    chosen: Settings,
    form: str,
    symbol: str | None,
    exchange: str | None,
    columns: str | None,
    unit: str | None,
    tz: str | None,
) -> Any:
    """Read a feed, with a bar; see `liqlab.read_feed`."""
    from liqlab.feeds import read_feed

    pairs = columns.split(",") if columns else []
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise typer.BadParameter(f"{wrong[0]!r}: write it as OURS=THEIRS, e.g. ts_ms=timestamp", param_hint="--map")
    names = dict(pair.split("=", 1) for pair in pairs) or None
    with progress("read") as step:
        return read_feed(
            named, form, symbol=symbol, exchange=exchange, columns=names, unit=unit, tz=tz, settings=chosen,
            progress=step,
        )  # fmt: skip


def on_server(url: str | None, chosen: Settings, run: Callable[[str], Coroutine[Any, Any, Any]]) -> Any:
    """Run on the server that was named, else on a private one."""
    from liqlab import server

    with ExitStack() as stack:
        if url is None and chosen.redis_url is not None:
            url = chosen.redis_url.get_secret_value()
        if url is None:
            url = stack.enter_context(server.serve(settings=chosen)).url
        return asyncio.run(run(url))


def on_private(chosen: Settings, run: Callable[[Redis], Coroutine[Any, Any, T]], *, tdigest: bool) -> T:
    """Run on a server of its own: a study of a recording has no business among live keys."""
    from liqlab import server

    async def connected(url: str) -> T:
        async with server.connect(url) as client:
            return await run(client)

    with server.serve(settings=chosen, tdigest=tdigest) as running:
        return asyncio.run(connected(running.url))


def known(method: str, methods: Iterable[str]) -> None:
    """Refuse a method that there is none of by that name."""
    if method not in methods:
        raise typer.BadParameter(f"{method!r} is not one of {', '.join(methods)}", param_hint="--method")


def on_feed(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say which feed it is about, and the settings.

    It is called with the feed, the settings and what options it has itself.
    """

    def common(
        feeds: Feeds = None,
        feed: FeedOption = None,
        form: Format = "auto",
        symbol: Symbol = None,
        exchange: Exchange = None,
        columns: Map = None,
        unit: Unit = None,
        tz: Zone = None,
        options: Set = None,
    ) -> Any:
        chosen = chosen_settings(options)
        return read(paths(feeds, feed), chosen, form, symbol, exchange, columns, unit, tz), chosen

    shared = inspect.signature(common, eval_str=True, locals=globals()).parameters
    own = list(inspect.signature(command, eval_str=True).parameters.values())[2:]

    def run(**given: Any) -> None:
        recorded, chosen = common(**{name: given.pop(name) for name in shared})
        command(recorded, chosen, **given)

    # Typer takes options from the signature.
    made: Any = run
    made.__name__, made.__doc__, made.__module__ = command.__name__, command.__doc__, command.__module__
    made.__signature__ = inspect.Signature([*shared.values(), *own])
    made.__annotations__ = {name: one.annotation for name, one in made.__signature__.parameters.items()}
    return run
