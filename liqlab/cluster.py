"""A Redis Cluster: one client for what belongs to a shard, and a plain one of each node for what belongs to a server.

All keys of a shard carry its tag and lie on one node, so that a batch is one call a shard here as well. `Cluster` finds
that node, also after a failover. INFO, SCAN and MEMORY are about one server: `Cluster.nodes` says who they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode, ClusterPipeline, PipelineCommand
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands import READ_COMMANDS
from redis.commands.core import AsyncScript
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    NoScriptError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    SlotNotCoveredError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.utils import str_if_bytes

from liqlab import clock
from liqlab.schema import NodeSettings
from liqlab.settings import Settings, SettingsError

T = TypeVar("T")
Calls = dict[int, tuple[list[str], list[bytes]]]  # by shard: keys and arguments of a script
ADVISED: Final = 16  # shards: on up to four nodes none then has an eighth more than its part of them
# Whether the server has run a command is then unknown; LOADING is a ConnectionError too.
LOST: Final = (RedisConnectionError, RedisTimeoutError)
# What is over when a replica has taken its primary's place; MOVED is an AskError.
FAILOVER: Final = (*LOST, ClusterDownError, AskError, TryAgainError, ReadOnlyError)
_PAUSE_S: Final = 0.2
_LOOK_S: Final = 2.0  # for a node to say who is in the cluster
_GLANCE_MS: Final = 5  # for a replica that kept the last batch waiting in vain
# What may be sent again when its reply is lost, since twice is as once. Of scripts that are liqlab's: a batch has its
# number, a block takes the place of what it holds, an alert its cooldown.
_REPEATABLE: Final = READ_COMMANDS | {
    *("DEL", "EVALSHA", "EXPIRE", "HDEL", "HSET", "INFO", "MEMORY USAGE", "PING", "SCRIPT LOAD", "UNLINK", "XTRIM"),
}


def check_shards(settings: Settings) -> Settings:
    """Return settings, unless by them keys have no tag, so that those of a batch would lie on several nodes.

    Raises
    ------
    SettingsError
    """
    if settings.shards == 1:
        raise SettingsError(
            f"shards = 1: on a cluster each key carries the tag of its shard; set LIQLAB_SHARDS={ADVISED}, or pass "
            f"settings=liqlab.load_settings(shards={ADVISED})"
        )
    return settings


def _by_slot(keys: Iterable[str | bytes]) -> list[list[str | bytes]]:
    slots: dict[int, list[str | bytes]] = {}
    for key in keys:
        slots.setdefault(key_slot(key.encode() if isinstance(key, str) else key), []).append(key)
    return list(slots.values())


class _BySlot:
    """The commands of liqlab's that name keys of several shards, sent for one slot at a time."""

    async def exists(self, *keys: str | bytes) -> int:
        """Return how many of some keys there are."""
        return await self._sum("EXISTS", keys)

    async def unlink(self, *keys: str | bytes) -> int:
        """Remove keys, their memory in the background; return how many there were."""
        return await self._sum("UNLINK", keys)

    async def _sum(self, command: str, keys: Sequence[str | bytes]) -> int:
        pipe = self.pipeline(transaction=False)  # type: ignore[attr-defined]
        for part in _by_slot(keys):
            pipe.execute_command(command, *part)
        return sum(await pipe.execute())


class _Alone(_BySlot, Redis):  # type: ignore[misc]
    """A client of one node."""


@dataclass(frozen=True)
class Node:
    """A node as the cluster knows it.

    Attributes
    ----------
    name : str
        ``host:port``.
    redis : redis.asyncio.Redis
        A client of this node alone.
    slots : tuple of (int, int)
        First and last of those that it has; a replica has none.
    primary : bool
    failed : bool
        Whether the cluster, or the node that was asked, takes it for gone.
    """

    name: str
    redis: Redis
    slots: tuple[tuple[int, int], ...]
    primary: bool
    failed: bool

    def settings(self, settings: Settings) -> NodeSettings:
        """Return settings by which only the shards of this node are looked at."""
        at = {shard: key_slot(str(shard).encode()) for shard in range(settings.shards)}
        here = tuple(shard for shard, slot in at.items() if any(first <= slot <= last for first, last in self.slots))
        return NodeSettings.model_construct(**{**dict(settings), "here": here})


@dataclass(frozen=True)
class Reply:
    """What a script answered of a shard, or the exception; by which node; whether a replica has what it wrote."""

    answer: Any
    node: str
    replicated: bool


class Pipeline(ClusterPipeline):
    """Commands for several nodes, those of a node in one round trip; repeated at a failover where all may be."""

    def __init__(self, client: Cluster) -> None:
        super().__init__(client)
        self._stack: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __len__(self) -> int:
        return len(self._stack)

    def execute_command(self, *args: Any, **kwargs: Any) -> Pipeline:
        """Append a command; of one that is given as bytes the reply stays as the server sent it, as with `Redis`."""
        if isinstance(args[0], bytes):
            # A name in small letters is not among those whose replies redis-py changes, but it finds the keys.
            args = (args[0].decode().lower(), *args[1:])
        self._stack.append((args, kwargs))
        return self

    async def execute(self, raise_on_error: bool = True, allow_redirections: bool = True) -> list[Any]:
        """Send what was appended; return the replies in its order."""
        stack, self._stack = self._stack, []
        client = cast(Cluster, self.cluster_client)
        if not stack:
            return []

        async def once() -> list[Any]:
            pipe = ClusterPipeline(client)  # type: ignore[abstract]
            for args, kwargs in stack:
                pipe.execute_command(*args, **kwargs)
            replies: list[Any] = await pipe.execute(raise_on_error=False, allow_redirections=allow_redirections)
            if lost := [reply for reply in replies if isinstance(reply, FAILOVER)]:
                raise lost[0]
            return replies

        replies = await client.patiently(once, repeat=all(str(args[0]).upper() in _REPEATABLE for args, _ in stack))
        for reply in replies if raise_on_error else ():
            if isinstance(reply, Exception):
                raise reply
        return replies


class Cluster(_BySlot, RedisCluster):  # type: ignore[misc]
    """redis-py's client of a cluster, made to wait for the end of a failover; `liqlab.connect` makes it.

    What may be repeated is sent again until `failover_s` have passed: reads, what removes, and scripts by EVALSHA, as
    liqlab's own may be. Anything else is sent once.

    Parameters
    ----------
    url : str
        ``redis://`` or ``rediss://`` with any node of the cluster.
    failover_s : float
    **options
        For redis-py.
    """

    def __init__(self, url: str, *, failover_s: float, **options: Any) -> None:
        self.failover_s, self._url, self._options = failover_s, url, options
        self._clients: dict[str, Redis] = {}
        self._confirms: dict[str, bool] = {}  # by node: whether a replica had the last batch in time
        given: dict[str, Any] = {**options, **parse_url(url)}
        if given.pop("connection_class", None) is SSLConnection:
            given["ssl"] = True
        # A part of the slots may be without a node for a while: the others go on.
        super().__init__(**{**given, "require_full_coverage": False, "retry": Retry(NoBackoff(), 0)})

    async def initialize(self, *args: Any, **kwargs: Any) -> Cluster:
        """Learn which nodes there are.

        Raises
        ------
        redis.exceptions.ConnectionError
            None of them answers.
        redis.exceptions.ResponseError
            The server is no node of a cluster, or refuses the user; then an AuthenticationError too.
        """
        try:
            await super().initialize(*args, **kwargs)
        except RedisClusterException as error:
            if "mode is not enabled" in str(error):
                raise ResponseError("this server is no node of a cluster; write redis:// for a single one") from None
            if isinstance(error.__cause__, AuthenticationError | ResponseError):
                raise error.__cause__ from None
            raise RedisConnectionError(str(error)) from error
        return self

    async def aclose(self) -> None:
        """Close the connections to all nodes."""
        await super().aclose()
        for client in self._clients.values():
            await client.aclose()

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> Pipeline:
        """Return a pipeline, never a transaction."""
        return Pipeline(self)  # type: ignore[abstract]

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """Send a command to the node of its keys."""

        async def once() -> Any:
            return await super(Cluster, self).execute_command(*args, **kwargs)

        return await self.patiently(once, repeat=str_if_bytes(args[0]).upper() in _REPEATABLE)

    async def scan_iter(self, match: Any = None, count: Any = None, _type: Any = None, **kwargs: Any) -> Any:
        """Yield the keys of all nodes, one node after the other."""
        for node in await self.nodes():
            async for key in node.redis.scan_iter(match=match, count=count, _type=_type, **kwargs):
                yield key

    async def dbsize(self, **kwargs: Any) -> int:
        """Return how many keys all nodes have; redis-py asks one of them."""
        return int(sum(one["db0"]["keys"] for one in await infos(self, "keyspace") if "db0" in one))  # type: ignore[arg-type]

    async def patiently(self, once: Callable[[], Awaitable[T]], *, repeat: bool = True) -> T:
        """Await what `once` returns, again and again while a failover lasts, if it may be repeated."""
        until_s = clock.elapsed_s() + (self.failover_s if repeat else 0)
        while True:
            try:
                if self._initialize:
                    await self.initialize()
                return await once()
            except AuthenticationError:  # a ConnectionError that time does not heal
                raise
            except SlotNotCoveredError as error:
                problem: Exception = RedisConnectionError(str(error))
            except FAILOVER as error:
                problem = error
            self._initialize = True  # who has which slots is asked anew
            if clock.elapsed_s() >= until_s:
                raise problem
            await asyncio.sleep(_PAUSE_S)

    async def nodes(self) -> list[Node]:
        """Return the primaries that have slots, by name, those that have failed too: `topology` has all nodes."""
        return [node for node in await self.topology() if node.primary and node.slots]

    async def topology(self) -> list[Node]:
        """Ask any node who is in the cluster now.

        Raises
        ------
        redis.exceptions.ConnectionError
            None answers.
        """
        known = {**self.nodes_manager.startup_nodes, **self.nodes_manager.nodes_cache}
        problem: Exception | None = None
        for node in known.values():
            try:
                async with asyncio.timeout(_LOOK_S):
                    found = await self._client(node.host, node.port).execute_command("CLUSTER NODES")  # type: ignore[no-untyped-call]
            except (*LOST, OSError) as error:  # OSError: the built-in TimeoutError too
                problem = error
                continue
            return sorted((self._node(node.host, *one) for one in found.items()), key=lambda one: one.name)
        raise RedisConnectionError(f"none of {len(known)} nodes answers: {problem}")

    def _node(self, asked: str, address: str, found: Mapping[str, Any]) -> Node:
        host, _, port = address.rpartition(":")
        flags = found["flags"].split(",")
        host = host or asked  # a node that never met another does not know its own
        return Node(
            name=f"{host}:{port}",
            redis=self._client(host, port),
            slots=tuple((int(words[0]), int(words[-1])) for words in found["slots"]),
            primary="master" in flags,
            failed=bool({"fail", "fail?", "noaddr", "handshake"} & set(flags)),
        )

    def _client(self, host: str, port: str | int) -> Redis:
        name = f"{host}:{port}"
        if name not in self._clients:
            pool = BlockingConnectionPool.from_url(self._url, **self._options)
            pool.connection_kwargs |= {"host": host, "port": int(port)}
            self._clients[name] = _Alone.from_pool(pool)
        return self._clients[name]

    async def owner(self, shard: int) -> str:
        """Return the name of the node that has a shard, as far as is known."""
        return (await self._owner(shard)).name

    async def _owner(self, shard: int) -> ClusterNode:
        if self._initialize:
            await self.initialize()
        nodes = self.nodes_manager.slots_cache.get(key_slot(str(shard).encode()))
        if not nodes:
            self._initialize = True
            raise RedisConnectionError(f"no node has the slot of shard {shard}")
        self._confirms.setdefault(nodes[0].name, len(nodes) > 1)
        return nodes[0]

    async def replicated(self, script: AsyncScript, calls: Calls, replica_ms: int) -> dict[int, Reply]:
        """Run a script on the keys of each of several shards, and wait for a replica to have what it wrote.

        One round trip a node, at the same time to all; WAIT goes behind the scripts on their own connection. Nothing is
        repeated.

        Parameters
        ----------
        calls : mapping of int to (keys, args)
            By shard.
        replica_ms : int
            How long to wait; 0 is not at all.
        """
        done: dict[int, Reply] = {}
        by_node: dict[ClusterNode, Calls] = {}
        for shard, (keys, args) in calls.items():
            try:
                by_node.setdefault(await self._owner(shard), {})[shard] = keys, args
            except RedisConnectionError as error:
                done[shard] = Reply(error, "", False)
        for part in await asyncio.gather(*(self._on_node(*one, script, replica_ms) for one in by_node.items())):
            done |= part
        if any(isinstance(reply.answer, FAILOVER) for reply in done.values()):
            self._initialize = True
        return done

    async def _on_node(self, node: ClusterNode, calls: Calls, script: AsyncScript, replica_ms: int) -> dict[int, Reply]:
        sent = [PipelineCommand(n, "EVALSHA", script.sha, len(keys), *keys, *args) for n, (keys, args) in calls.items()]
        # A replica that is away would hold up every batch: after the first, it is only glanced at until it is back.
        wait_ms = replica_ms if self._confirms[node.name] else min(replica_ms, _GLANCE_MS)
        wait = [PipelineCommand(-1, "WAIT", 1, wait_ms)] if replica_ms else []
        try:
            await node.execute_pipeline([*sent, *wait])
            if any(isinstance(one.result, NoScriptError) for one in sent):
                await node.execute_command("SCRIPT LOAD", script.script)
                await node.execute_pipeline([*sent, *wait])  # of what ran already, liqlab's scripts know it
        except (RedisError, OSError) as error:
            lost = error if isinstance(error, RedisError) else RedisConnectionError(str(error))
            return dict.fromkeys(calls, Reply(lost, node.name, False))
        self._confirms[node.name] = replicated = any(isinstance(one.result, int) and one.result > 0 for one in wait)
        return {one.position: Reply(one.result, node.name, replicated) for one in sent}


def as_cluster(redis: object) -> Cluster | None:
    """Return a client if it is one of a cluster, else None."""
    return redis if isinstance(redis, Cluster) else None


async def any_node(redis: Redis) -> Redis:
    """Return a client of one of a cluster's primaries; a client that is of no cluster as it is."""
    cluster = as_cluster(redis)
    return redis if cluster is None else next(node.redis for node in await cluster.nodes() if not node.failed)


async def servers(redis: Redis) -> list[Redis]:
    """Return a client of each primary of a cluster; a client that is of no cluster as it is."""
    cluster = as_cluster(redis)
    return [node.redis for node in await cluster.nodes()] if cluster else [redis]


async def infos(redis: Redis, *sections: str) -> list[dict[str, Any]]:
    """Return what INFO says: of one server, or of each primary of a cluster."""

    async def each() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(client.info(*sections) for client in await servers(redis))))

    cluster = as_cluster(redis)
    return await (cluster.patiently(each) if cluster else each())
