"""A private Redis Cluster on this machine, to try things on: `serve` starts it, with a replica for each primary.

Each node is a `liqlab.server.Server`, and ends as one does, however this process ends. Unlike a single private server
they listen on TCP, at 127.0.0.1, since nodes of a cluster talk by TCP only: a random password keeps other users out.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from time import sleep
from types import TracebackType
from typing import Any, Final

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.utils import str_if_bytes

from liqlab import clock, server
from liqlab.server import Server, ServerError
from liqlab.settings import Settings, load

START_S: Final = 30.0
_HOST: Final = "127.0.0.1"
_POLL_S: Final = 0.02


class LocalCluster:
    """A cluster of private servers; it ends with `stop`, with its ``with`` block, or with this process.

    Attributes
    ----------
    url : str
        ``redis+cluster://...``, for `liqlab.connect`; it holds the password.
    nodes : dict of str to Server
        By ``host:port``, those that are gone too.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Server] = {}
        self.password = clock.token()
        self._clients: list[Any] = []
        self._stack = ExitStack()

    def __repr__(self) -> str:
        return f"<liqlab.LocalCluster of {len(self.nodes)} nodes: {', '.join(self.nodes)}>"

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address of its first node, which tells of the others."""
        return f"redis+cluster://:{self.password}@{next(iter(self.nodes))}"

    def connect(self, **kw: Any) -> AsyncRedis:
        """Return a client; keywords as in `liqlab.server.connect`."""
        return server.connect(self.url, **kw)

    def stop(self) -> None:
        """End the servers and remove their folders; stopping twice is fine."""
        self._stack.close()

    def _add(self, node: Server, port: int) -> None:
        self.nodes[f"{_HOST}:{port}"] = self._stack.enter_context(node)
        # A server that asks for a password from its first moment would not tell `serve` that it is ready.
        with Redis(unix_socket_path=str(node.socket)) as client:
            client.config_set("masterauth", self.password)
            client.config_set("requirepass", self.password)
        client = Redis(unix_socket_path=str(node.socket), password=self.password, socket_timeout=START_S)
        self._clients.append(self._stack.enter_context(client))

    def _join(self, primaries: int, buses: list[int]) -> None:
        """Make one cluster of the nodes: the first ones get the slots, each of the others one of them to follow."""
        slots, first = REDIS_CLUSTER_HASH_SLOTS, self._clients[0]
        for number, (name, client, bus) in enumerate(zip(self.nodes, self._clients, buses, strict=True)):
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)  # else they have to agree on it first
            if number < primaries:
                ends = number * slots // primaries, (number + 1) * slots // primaries - 1
                client.execute_command("CLUSTER ADDSLOTSRANGE", *ends)
            if number:
                first.execute_command("CLUSTER MEET", _HOST, name.rpartition(":")[2], bus)
        self._until(lambda client: len(client.cluster("NODES")) == len(buses), "the nodes to meet")
        ids = [str_if_bytes(client.execute_command("CLUSTER MYID")) for client in self._clients]
        for number in range(primaries, len(buses)):
            self._clients[number].execute_command("CLUSTER REPLICATE", ids[number % primaries])
        self._until(lambda client: _ready(client, primaries), "the replicas to have what their primaries do")

    def _until(self, true: Callable[[Any], bool], what: str) -> None:
        """Wait until something is true of every node."""
        deadline_s = clock.elapsed_s() + START_S
        while not all(true(client) for client in self._clients):
            if clock.elapsed_s() > deadline_s:
                raise ServerError(f"{len(self.nodes)} nodes became no cluster: {START_S:.0f} s were too few for {what}")
            sleep(_POLL_S)


def _ready(client: Any, primaries: int) -> bool:
    state, replication = client.execute_command("CLUSTER INFO"), client.info("replication")
    here = replication["role"] == "slave"
    return (
        state["cluster_state"] == "ok"
        and int(state["cluster_size"]) == primaries
        and (not here or replication["master_link_status"] == "up")
    )


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on: all at once, lest one come twice."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind((_HOST, 0))
        return [int(one.getsockname()[1]) for one in taken]


def serve(
    *,
    primaries: int = 3,
    replicas: int = 1,
    settings: Settings | None = None,
    maxmemory: int | str | None = None,
    node_timeout_ms: int = 2_000,
) -> LocalCluster:
    """Start a private cluster and return when all its slots are served and its replicas are in step.

    Parameters
    ----------
    primaries : int
        Nodes that share the slots; below three there is no majority to decide on a failover.
    replicas : int
        Of each.
    settings : Settings, optional
        Else `liqlab.settings.load`; its `server` section is that of each node.
    maxmemory : int or str, optional
        Of each node; else ``settings.server.maxmemory``.
    node_timeout_ms : int
        For how long a node may be silent until it is taken for gone.

    Raises
    ------
    ServerError
        No server was found, one did not start, or they did not become a cluster in time.
    """
    settings = settings or load()
    more = {
        "bind": _HOST,
        "cluster-enabled": "yes",
        "cluster-config-file": "nodes.conf",
        "cluster-node-timeout": str(node_timeout_ms),
        "cluster-replica-validity-factor": "0",  # a replica that was out of step for a while may still take over
        "repl-diskless-sync-delay": "0",
    }
    count = primaries * (1 + replicas)
    ports = free_ports(2 * count)
    made = LocalCluster()
    try:
        for port, bus in zip(ports[:count], ports[count:], strict=True):
            own = {"port": str(port), "cluster-port": str(bus)}
            made._add(server.serve(settings=settings, maxmemory=maxmemory, more=more | own), port)
        made._join(primaries, ports[count:])
    except BaseException:
        made.stop()
        raise
    return made
