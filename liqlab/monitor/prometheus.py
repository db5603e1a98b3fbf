"""The findings as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from liqlab.breaker import State
from liqlab.monitor.health import Health

PREFIX: Final = "liqlab_"


class MonitorError(RuntimeError):
    """The metrics cannot be served; the message says why and names the cure."""


class Exporter(Collector):
    """Gives Prometheus what `update` was last told.

    A server that does not answer has ``liqlab_redis_up 0`` and no other figure of its own, so that no stale one is
    taken for news; ``liqlab_look_timestamp_seconds`` shows when the watch itself has stopped.

    Attributes
    ----------
    registry : prometheus_client.CollectorRegistry
        An own one, that holds this collector only.
    """

    def __init__(self) -> None:
        self._health: Health | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def update(self, health: Health) -> None:
        """Take the latest finding; any thread may ask for it meanwhile."""
        self._health = health

    def text(self) -> str:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry).decode()

    def collect(self) -> Iterator[Metric]:
        """Yield a family for every metric that is known, as prometheus-client asks of a collector."""
        health = self._health
        if health is None:
            return
        yield _family(f"{PREFIX}look_timestamp_seconds", "when the server was last looked at", health.at_ms / 1000)
        yield _family(f"{PREFIX}redis_up", "whether it answered", float(health.error is None))
        for each in fields(health):
            value = getattr(health, each.name)
            if each.metadata and value is not None:
                yield _family(PREFIX + each.metadata["metric"], each.metadata["meaning"], value)
        if health.cleanup_kinds:
            kinds = GaugeMetricFamily(f"{PREFIX}cleanup_actions_by_kind", "those actions by kind", labels=["kind"])
            for kind, count in health.cleanup_kinds.items():
                kinds.add_metric([kind], count)
            yield kinds


def _family(name: str, meaning: str, value: float | str) -> Metric:
    if isinstance(value, str):  # the breaker's state: one series a state, 1 for the present one
        states = GaugeMetricFamily(name, meaning, labels=["state"])
        for state in State:
            states.add_metric([state], float(state == value))
        return states
    if name.endswith("_total"):
        return CounterMetricFamily(name, meaning, value=value)
    return GaugeMetricFamily(name, meaning, value=value)


@contextmanager
def serve_metrics(exporter: Exporter, port: int, host: str = "127.0.0.1") -> Iterator[int]:
    """Serve the metrics at ``http://host:port/metrics`` until the block ends, from a thread.

    Parameters
    ----------
    exporter : Exporter
    port : int
        0 takes a free one.
    host : str
        The address to listen on; whoever reaches it may read.

    Yields
    ------
    int
        The port.

    Raises
    ------
    MonitorError
        The address cannot be listened on.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=exporter.registry)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MonitorError(f"metrics cannot be served on {host}:{port}: {reason}; name another port or host") from None
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
