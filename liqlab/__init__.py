"""liqlab: how much liquidation history a small Redis keeps, and what each choice costs.

The names that a notebook uses; each is imported when it is first asked for, so that ``import liqlab`` stays light.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # who uses liqlab decides what is shown

if TYPE_CHECKING:
    from liqlab import budget, plots, schema
    from liqlab.archive import history
    from liqlab.events import Event
    from liqlab.feeds import Feed, iter_feed, read_feed, write_feed
    from liqlab.feeds.synth import synth
    from liqlab.replay import ingest
    from liqlab.sealing import seal
    from liqlab.server import connect, serve
    from liqlab.settings import Settings
    from liqlab.settings import load as load_settings
    from liqlab.writer import Writer

_HOMES = {
    "Event": "events",
    "Feed": "feeds",
    "Settings": "settings",
    "Writer": "writer",
    "budget": "",
    "connect": "server",
    "history": "archive",
    "ingest": "replay",
    "iter_feed": "feeds",
    "load_settings": "settings:load",
    "plots": "",
    "read_feed": "feeds",
    "schema": "",
    "seal": "sealing",
    "serve": "server",
    "synth": "feeds.synth",
    "write_feed": "feeds",
}

__all__ = [
    "Event",
    "Feed",
    "Settings",
    "Writer",
    "budget",
    "connect",
    "history",
    "ingest",
    "iter_feed",
    "load_settings",
    "plots",
    "read_feed",
    "schema",
    "seal",
    "serve",
    "synth",
    "write_feed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'liqlab' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    if not module:
        return importlib.import_module(f"liqlab.{name}")
    value = getattr(importlib.import_module(f"liqlab.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
