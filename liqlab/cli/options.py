"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from liqlab import settings
from liqlab.settings import Settings, SettingsError

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
FailOn = Annotated[str | None, typer.Option("--fail-on", help=f"over-budget: exit with {OVER_BUDGET} when one is.")]


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
        node[leaf] = value
    return settings.load(**tree)
