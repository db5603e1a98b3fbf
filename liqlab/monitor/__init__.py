"""Whether the running Redis is healthy: findings (`measure`), alerts (`Alarms`), Prometheus (`Exporter`), `watch`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from redis.asyncio import Redis

from liqlab import clock
from liqlab.monitor.alerts import Alarms, Alert, Level, OnAlert, tell
from liqlab.monitor.health import Health, measure, memory_limit
from liqlab.monitor.prometheus import Exporter, MonitorError, serve_metrics
from liqlab.settings import Settings, load
from liqlab.writer import Writer

__all__ = [
    "Alarms",
    "Alert",
    "Exporter",
    "Health",
    "Level",
    "MonitorError",
    "measure",
    "memory_limit",
    "serve_metrics",
    "tell",
    "watch",
]


async def watch(
    redis: Redis,
    every_s: float | None = None,
    *,
    settings: Settings | None = None,
    writer: Writer | None = None,
    cleanup: Any = None,
    alarms: Alarms | None = None,
    on_alert: OnAlert | None = None,
) -> AsyncGenerator[Health, None]:
    """Look again and again, tell of alerts, and yield each finding; until it is cancelled or left.

    A server that goes away is a finding like any other, and so is its return.

    Parameters
    ----------
    redis, writer, cleanup
        As in `measure`.
    every_s : float, optional
        Seconds from one look to the next; `monitor.interval_s` when absent. A look that takes longer delays the next.
    settings : Settings, optional
        `monitor`, `thresholds`, and what `measure` reads; `liqlab.settings.load()` when absent.
    alarms : Alarms, optional
        To see what stands (`Alarms.standing`), or to go on from an earlier watch; else a new one.
    on_alert : callable, optional
        Called with each `Alert` before the finding is yielded; may be asynchronous. What it raises is logged.
    """
    settings = settings or load()
    alarms = alarms or Alarms(settings)
    every_s = every_s or settings.monitor.interval_s
    hook = settings.monitor.webhook.get_secret_value() if settings.monitor.webhook else None
    while True:
        began = clock.elapsed_s()
        health = await measure(redis, settings=settings, writer=writer, cleanup=cleanup)
        for alert in alarms.check(health):
            await tell(alert, on_alert=on_alert, webhook=hook)
        yield health
        await asyncio.sleep(max(began + every_s - clock.elapsed_s(), 0))
