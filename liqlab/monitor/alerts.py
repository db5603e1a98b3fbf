"""When a finding becomes an alert, and whom it is told: the log, a callback, a webhook on this machine."""

from __future__ import annotations

import asyncio
import inspect
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from liqlab.budget import human
from liqlab.monitor.health import Health
from liqlab.settings import Settings

WEBHOOK_S: Final = 2.0  # for all of it: to connect, to send, and until the answer's first line
CALM: Final = 3  # looks without an eviction until that alert is over
_log: Final = logging.getLogger("liqlab.monitor")


class Level(IntEnum):
    """How bad it is."""

    OK = 0
    WARNING = 1
    CRITICAL = 2


_LOGGED: Final = {Level.OK: logging.INFO, Level.WARNING: logging.WARNING, Level.CRITICAL: logging.CRITICAL}
_BREAKER: Final = {"closed": Level.OK, "half-open": Level.WARNING, "open": Level.CRITICAL}


@dataclass(frozen=True)
class Alert:
    """One change of level."""

    at_ms: int  # wall time, since the epoch
    name: str  # server, nodes, memory, rss, evictions, breaker, journal
    level: Level  # OK where the alert is over
    was: Level
    message: str

    def __str__(self) -> str:
        return f"{self.level.name} {self.name}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON."""
        return {**vars(self), "level": self.level.name, "was": self.was.name}


OnAlert = Callable[[Alert], Awaitable[None] | None]


class Alarms:
    """Turns findings into alerts, each told once when it begins, gets better or worse, and ends.

    What is measured against a line is left `thresholds.exit_margin` below it. While the server does not answer, what
    only it can tell stays as it was.

    Parameters
    ----------
    settings : Settings
        `monitor` and `thresholds.exit_margin` are read.

    Attributes
    ----------
    standing : dict of str to Alert
        The alerts that have not ended, by name.
    """

    def __init__(self, settings: Settings) -> None:
        self.standing: dict[str, Alert] = {}
        self._lines = settings.monitor
        self._margin = settings.thresholds.exit_margin
        self._evicted: int | None = None
        self._calm = CALM

    def check(self, health: Health) -> list[Alert]:
        """Return what has changed with this finding."""
        changes = []
        for name, level, message in self._judged(health):
            was = self._level(name)
            if level != was:
                alert = Alert(health.at_ms, name, level, was, message)
                changes.append(alert)
                self.standing[name] = alert
                if level is Level.OK:
                    del self.standing[name]
        return changes

    def _level(self, name: str) -> Level:
        return self.standing[name].level if name in self.standing else Level.OK

    def _judged(self, health: Health) -> Iterator[tuple[str, Level, str]]:
        lines = self._lines
        if health.error is not None:
            yield "server", Level.CRITICAL, f"it does not answer ({health.error})"
        else:
            yield "server", Level.OK, "it answers"
            level = Level.WARNING if health.down else Level.OK
            names = ", ".join(health.down) or "none"
            yield "nodes", level, f"of {health.nodes or 1} nodes, these are down: {names}"
            size = f"{human(health.used_memory or 0)} of {human(health.maxmemory or 0)}"
            level = self._by_lines("memory", health.used_ratio, lines.warning)
            yield "memory", level, f"{size} used, {health.used_ratio or 0:.1%} of maxmemory"
            size = f"{human(health.rss or 0)} of {human(health.rss_limit or 0)}"
            level = self._by_lines("rss", health.rss_ratio, lines.warning)
            yield "rss", level, f"the server's process takes {size}, {health.rss_ratio or 0:.1%}"
            yield "evictions", *self._evictions(health.evicted_keys or 0)
        if health.breaker is not None:
            waiting = f", {health.journal_events:,} events wait in the journal" if health.journal_events else ""
            yield "breaker", _BREAKER[health.breaker], f"it is {health.breaker}{waiting}"
        if health.journal_ratio is not None:
            level = self._by_lines("journal", health.journal_ratio, lines.journal)
            yield "journal", level, f"{health.journal_ratio:.1%} of its bytes are taken, {health.journal_events:,} wait"

    def _by_lines(self, name: str, ratio: float | None, warning: float) -> Level:
        now = self._level(name)
        for level, line in ((Level.CRITICAL, self._lines.critical), (Level.WARNING, warning)):
            if ratio is not None and (ratio >= line or (now >= level and ratio >= line - self._margin)):
                return level
        return Level.OK

    def _evictions(self, evicted: int) -> tuple[Level, str]:
        before = evicted if self._evicted is None else self._evicted
        grown = evicted - before if evicted >= before else evicted  # less than before: the server has been restarted
        self._evicted, self._calm = evicted, 0 if grown else self._calm + 1
        level = Level.WARNING if self._calm < CALM else Level.OK
        return level, f"{grown:,} keys evicted since the last look, {evicted:,} since the server's start"


async def tell(alert: Alert, *, on_alert: OnAlert | None = None, webhook: str | None = None) -> None:
    """Tell the log, a callback and a webhook of an alert; what goes wrong with them is logged and never raised.

    Parameters
    ----------
    alert : Alert
    on_alert : callable, optional
        Called with it, and awaited where it is asynchronous.
    webhook : str, optional
        As ``settings.monitor.webhook`` has been found to be: an address on this machine. The alert is posted as JSON.
    """
    _log.log(_LOGGED[alert.level], "%s", alert)
    try:
        if on_alert is not None and inspect.isawaitable(answer := on_alert(alert)):
            await answer
    except Exception:
        _log.exception("on_alert failed at %s", alert)
    if webhook is not None:
        try:
            async with asyncio.timeout(WEBHOOK_S):
                status = await _post(webhook, json.dumps(alert.as_dict()).encode())
            if not 200 <= status < 300:
                _log.warning("the webhook answered %d to %s", status, alert)
        except (OSError, ValueError) as error:  # OSError: the built-in TimeoutError too
            _log.warning("the webhook did not take %s: %s", alert, type(error).__name__)


async def _post(url: str, body: bytes) -> int:
    """Post JSON and return the status: no redirect is followed and no proxy asked, so it stays on this machine."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        reader, writer = await asyncio.open_unix_connection(unquote(parts.path))
        host, target = "localhost", "/"
    else:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        host, target = parts.netloc, f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    with closing(writer):
        if parts.scheme != "unix" and not ipaddress.ip_address(writer.get_extra_info("peername")[0]).is_loopback:
            raise ValueError("localhost is another machine here")
        head = f"POST {target} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        words = (await reader.readline()).split(maxsplit=2)
    return int(words[1]) if len(words) > 1 else 0
