"""The configuration of a small Redis: its directives, its users, and how it is deployed.

One table of directives serves three purposes: the private servers of `liqlab.server`, a live server (`apply`), and the
files of a deployed one (`write`). Values come from the settings, keys of the users from `liqlab.schema`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from liqlab import schema
from liqlab.settings import Settings, SettingsError, load, parse_bytes

PORT: Final = 6379
IMAGE: Final = "redis:7-alpine"
_IMAGE_USER: Final = "999:1000"  # redis in that image
_LIMITS: Final = "client-output-buffer-limit"


@dataclass(frozen=True)
class Directive:
    """One directive of redis.conf.

    Attributes
    ----------
    name, value : str
        As CONFIG GET of Redis 7.0 and later spells them; of `client-output-buffer-limit` one class of clients.
    where : str
        ``runtime`` is CONFIG SET or the file; ``file only`` needs a restart; ``runtime only`` is left out of the file,
        because a server that cannot do it would not start.
    why : str
        A line for tables and comments.
    """

    name: str
    value: str
    where: Literal["runtime", "file only", "runtime only"]
    why: str


def directives(settings: Settings) -> tuple[Directive, ...]:
    """Return what every server of liqlab is configured with, in the order in which `apply` sets it."""
    server = settings.server
    rows: list[tuple[str, str | int, str]] = [
        # First of all: the policy by which the next one may evict.
        ("maxmemory-policy", server.maxmemory_policy, "the last line of defence; cleanup and breaker act before it"),
        ("maxmemory", server.maxmemory, "what all shares of the budget add up to"),
        ("maxmemory-samples", 10, "keys that are compared before one is evicted: closer to the nearest TTL than 5"),
        (
            "maxmemory-clients",
            # Below a few batches, a writer would be disconnected for doing its work.
            max(int(settings.budget.buffer * server.maxmemory), 4 * settings.writer.batch_bytes),
            "buffers of clients count as used memory: beyond the buffer's share the largest client is disconnected",
        ),
        (_LIMITS, _pubsub(server.maxmemory), "32 MB by default for one slow subscriber, an eighth of such a server"),
        ("maxclients", 100, "each takes some 20 KB even when idle"),
        ("timeout", 0, "a quiet writer keeps its connection"),
        ("tcp-keepalive", 300, "a client that vanished is noticed after some minutes"),
        ("save", "", "no snapshots: the fork could double the memory"),
        ("appendonly", "no", "no log of commands: its rewrite forks too; the writer's journal is the safety net"),
        ("hash-max-listpack-entries", 512, "small hashes stay compact"),
        ("hash-max-listpack-value", 64, "the longest value of a compact hash, bytes"),
        ("list-max-listpack-size", -2, "nodes of lists of 8 KB"),
        ("set-max-intset-entries", 512, "sets of integers stay compact"),
        ("zset-max-listpack-entries", 128, "the 129th member costs twenty times the memory of all before"),
        ("zset-max-listpack-value", 64, "the longest member of a compact sorted set, bytes"),
        ("stream-node-max-bytes", server.stream_node_max_bytes, "each stream reserves one node, 4 KiB at most"),
        ("stream-node-max-entries", server.stream_node_max_entries, "a default of 100 leaves nodes half empty"),
        ("lazyfree-lazy-eviction", "yes", "memory is given back by a thread: no pause when a large key is evicted,"),
        ("lazyfree-lazy-expire", "yes", "or expires,"),
        ("lazyfree-lazy-server-del", "yes", "or is overwritten,"),
        ("replica-lazy-flush", "yes", "or when a replica starts anew"),
        ("activerehashing", "yes", "tables of keys shrink in the background"),
        ("hz", 100, "expired keys are looked for 100 times a second, not 10"),
        ("latency-tracking", "no", "24 KB for every command that was ever called, read by nobody here"),
        (
            "active-defrag-ignore-bytes",
            server.maxmemory // 24,
            "the default of 100 MB of fragmentation is never reached on such a server",
        ),
    ]
    fixed: list[tuple[str, str | int, str]] = [
        ("databases", 2, "16 by default; liqlab uses one"),
        ("tcp-backlog", 511, "connections that wait to be accepted; the kernel's somaxconn caps it"),
        ("daemonize", "no", "what starts the server watches it"),
        ("enable-debug-command", "no", "DEBUG can stop a server and read its memory"),
    ]
    return (
        *(Directive(name, str(value), "runtime", why) for name, value, why in rows),
        Directive("activedefrag", "yes", "runtime only", "needs a server with Redis's own jemalloc; others refuse it"),
        *(Directive(name, str(value), "file only", why) for name, value, why in fixed),
    )


def _pubsub(maxmemory: int) -> str:
    hard = maxmemory // 60
    return f"pubsub {hard} {hard // 4} 60"


def line(name: str, value: str) -> str:
    """Return a line of redis.conf."""
    return f"{name} {value or chr(34) * 2}\n"


async def apply(redis: Redis, settings: Settings | None = None, *, dry_run: bool = False) -> pd.DataFrame:
    """Set the directives on a live server, one by one; one that is refused does not stop the others.

    `maxmemory` is not lowered below what is in use: the server would evict keys to get there.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client whose user may CONFIG GET and CONFIG SET.
    settings : Settings, optional
        `liqlab.settings.load()` when absent.
    dry_run : bool
        Only ask; what would be set has the state ``would apply``.

    Returns
    -------
    pandas.DataFrame
        Index: the directives. Columns: `wanted`; `before`, as the server spelled it, None where it did not say;
        `state`: ``applied``, ``already so``, ``file only`` (it differs, and takes the file and a restart) or
        ``refused``; `why`: the reason of the directive, or that of the refusal.
    """
    settings = settings or load()
    shown: Mapping[str | None, str | None] = {}
    refusal = "this server has no such directive"
    try:
        shown = await redis.config_get("*")
    except ResponseError as error:
        refusal = _sentence(error)
    rows = []
    for item in directives(settings):
        before = shown.get(item.name)
        state, why = "would apply" if dry_run else "applied", item.why
        if before is None:
            state, why = "refused", refusal
        elif _same(item, before):
            state = "already so"
        elif item.where == "file only":
            state, why = "file only", f"it takes the file and a restart: {item.why}"
        else:
            try:
                if item.name == "maxmemory":
                    await _check_room(redis, settings.server.maxmemory)
                if not dry_run:
                    await redis.config_set(item.name, item.value)
            except ResponseError as error:
                state, why = "refused", _sentence(error)
        rows.append((item.name, item.value, before, state, why))
    columns = ["directive", "wanted", "before", "state", "why"]
    return pd.DataFrame(rows, columns=columns, dtype=object).set_index("directive")


async def _check_room(redis: Redis, maxmemory: int) -> None:
    used = int((await redis.info("memory"))["used_memory"])
    if used > maxmemory:
        raise ResponseError(f"{used} bytes are in use and the server would evict down to {maxmemory}; free some first")


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())


def _same(item: Directive, before: str) -> bool:
    wanted, shown = _words(item.value), _words(before)
    if item.name == _LIMITS:  # the server shows every class of clients
        return wanted in [shown[at : at + len(wanted)] for at in range(0, len(shown), len(wanted))]
    return wanted == shown


def _words(value: str) -> list[object]:
    words: list[object] = []
    for word in value.lower().split():
        try:
            words.append(parse_bytes(word))
        except ValueError:
            words.append(word)
    return words


# Users. Redis checks the keys that a command names; SCAN, KEYS, RANDOMKEY, and CLIENT TRACKING in broadcast mode, tell
# of any key. A list of what is allowed stays tight when later servers add commands; Redis 7.0 knows every name in it.

_READS: Final = (
    "+@transaction +auth +hello +ping +echo +quit +reset +select +client +command -@dangerous -client|tracking",
    "+info +time +dbsize +acl|whoami +cluster|nodes +cluster|slots +memory|usage +memory|stats +memory|malloc-stats",
    "+type +exists +ttl +pttl +expiretime +pexpiretime +object",
    "+xrange +xrevrange +xread +xlen +xinfo",
    "+get +mget +getrange +strlen +lrange +lindex +llen +scard +smembers +sismember",
    "+hget +hmget +hgetall +hkeys +hvals +hlen +hexists +hstrlen +hscan",
    "+zrange +zrevrange +zrangebyscore +zrevrangebyscore +zscore +zmscore +zrank +zcard +zcount +zscan",
)
_WRITES: Final = (
    "+@read +@write +@connection +@transaction -@scripting -@admin -@dangerous",
    "+eval +evalsha +script|load +script|exists +info +time +memory +config|get +acl|whoami",
    "+wait +cluster|nodes +cluster|slots",  # on a cluster: for a replica, for who is who
)
_OPERATES: Final = (
    "+@all -flushall -flushdb -swapdb -keys -debug -shutdown -module -replicaof -slaveof -failover -migrate",
)


def acl() -> str:
    """Return the ACL file: `writer`, `notebook` and `operator`, a line each, and `default`. All are off.

    Redis allows no comments in it.
    """
    patterns = [pattern for family in schema.FAMILIES for pattern in key_patterns(family)]
    keys, readable = (" ".join(sign + pattern for pattern in patterns) for sign in ("~", "%R~"))
    # To Redis, PFCOUNT writes: it caches its result in the key.
    uniques = " ".join(f"~{pattern}" for pattern in key_patterns(schema.BY_NAME["unique_symbols"]))
    rights = {
        "writer": f"-@all {' '.join(_WRITES)} {keys}",
        "notebook": f"-@all {' '.join(_READS)} {readable} (-@all +pfcount {uniques})",
        "operator": f"{' '.join(_OPERATES)} ~* &*",
    }
    users = [f"user {user} off resetchannels {right}" for user, right in rights.items()]
    return "\n".join(["user default off", *users]) + "\n"


def key_patterns(family: schema.Family) -> list[str]:
    """Return the patterns of an ACL that match the keys of a family, with and without a shard tag."""
    head, *rest = ["*" if word in ("SYMBOL", "SIDE", "BUCKET") else word for word in family.pattern.split(":")]
    patterns = [":".join([head, *rest])]
    if rest[:1] != ["*"]:  # else that takes the tag in
        patterns.append(":".join([head, "{*}", *rest]))
    return [head, *patterns] if family.name == "events" else patterns  # the stream that symbols share is the head alone


# Files of a deployed server.

_CONF: Final = f"""\
# Redis for liqlab, 7.0 or later. Written by `liqlab config`: change liqlab's settings instead, and write it again.

# Reached from this machine only.
bind 127.0.0.1 -::1
port {PORT}
protected-mode yes
# All users of it are off: start.sh gives the server a copy with the hashes of the passwords.
aclfile users.acl
"""

# Not LIQLAB_*: those are settings, and an unknown one is refused.
_START: Final = """\
#!/bin/sh
# Starts Redis with redis.conf and the users of users.acl. Their passwords come from the environment, and only SHA-256
# hashes of them reach the server, in a file that only its user can read. Arguments go to redis-server:
#     sh start.sh --port 6380
set -eu
umask 077
cd "$(dirname "$0")"
: "${REDIS_WRITER_PASSWORD:?has no value: export a long random one, as of openssl rand -hex 32}"
: "${REDIS_NOTEBOOK_PASSWORD:?has no value: export a long random one, as of openssl rand -hex 32}"
digest() { printf %s "$1" | sha256sum | cut -c 1-64; }
operator=${REDIS_OPERATOR_PASSWORD:+on #$(digest "$REDIS_OPERATOR_PASSWORD")} # stays off without one
acl=$(mktemp)
sed -e "s/^user writer off/user writer on #$(digest "$REDIS_WRITER_PASSWORD")/" \\
    -e "s/^user notebook off/user notebook on #$(digest "$REDIS_NOTEBOOK_PASSWORD")/" \\
    -e "s/^user operator off/user operator ${operator:-off}/" users.acl >"$acl"
unset REDIS_WRITER_PASSWORD REDIS_NOTEBOOK_PASSWORD REDIS_OPERATOR_PASSWORD
export LC_ALL=C # with a locale that does not exist, Redis does not start
exec redis-server ./redis.conf --aclfile "$acl" "$@"
"""

_COMPOSE: Final = """\
# Redis for liqlab in a container. Written by `liqlab config`: change liqlab's settings instead, and write it again.
services:
  redis:
    image: {image}
    restart: unless-stopped
    user: "{user}"
    entrypoint: [sh, /liqlab/start.sh]
    # Inside, the container's own network; `ports` opens it to this machine alone. The image's Redis can defragment.
    command: [--bind, 0.0.0.0, --activedefrag, "yes"]
    environment:
      REDIS_WRITER_PASSWORD: ${{REDIS_WRITER_PASSWORD:?has no value, put a long random one into .env}}
      REDIS_NOTEBOOK_PASSWORD: ${{REDIS_NOTEBOOK_PASSWORD:?has no value, put a long random one into .env}}
      REDIS_OPERATOR_PASSWORD: ${{REDIS_OPERATOR_PASSWORD:-}}
    ports: ["127.0.0.1:{port}:{port}"]
    volumes:
      - ./redis.conf:/liqlab/redis.conf:ro
      - ./users.acl:/liqlab/users.acl:ro
      - ./start.sh:/liqlab/start.sh:ro
    read_only: true
    tmpfs: [/tmp]
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    mem_limit: {limit}b
    healthcheck:
      test: [CMD-SHELL, 'REDISCLI_AUTH="$$REDIS_NOTEBOOK_PASSWORD" redis-cli --user notebook ping | grep -q PONG']
      interval: 30s
      timeout: 5s
      retries: 3
"""


def toml(settings: Settings) -> str:
    """Return the `liqlab.toml` that makes these settings again; passwords and paths stay out."""
    private: Any = {"redis_url": True, "server": {"binary"}, "feeds": {"quarantine_dir"}}
    private |= {"journal": {"path"}, "cleanup": {"folder"}, "monitor": {"webhook"}}
    tree = settings.model_dump(mode="json", exclude=private, exclude_defaults=True)
    size = settings.server.maxmemory
    tree["server"] = tree.get("server", {}) | {"maxmemory": size if size % (1 << 20) else f"{size >> 20}mb"}
    tree["writer"] = {"layout": settings.writer.layout, **tree.get("writer", {})}
    return "\n".join(["# liqlab.toml", *_toml(tree)]) + "\n"


def _toml(tree: Mapping[str, Any], name: str = "") -> Iterator[str]:
    # A JSON scalar is a TOML scalar.
    leaves = {key: value for key, value in tree.items() if not isinstance(value, dict)}
    if name and leaves:
        yield from ("", f"[{name}]")
    for key, value in leaves.items():
        yield f"{key if key.isascii() and key.isidentifier() else json.dumps(key)} = {json.dumps(value)}"
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _toml(value, f"{name}.{key}" if name else key)


def write(folder: str | Path, settings: Settings | None = None) -> list[Path]:
    """Write the files of a deployed server; there is no password in them.

    ``redis.conf``, ``users.acl``, ``start.sh`` (starts a Redis of this machine with both), ``docker-compose.yml``, and
    ``liqlab.toml``, which liqlab reads in its working directory.

    Parameters
    ----------
    folder : path
        Is made where it does not exist; files of these names are replaced.
    settings : Settings, optional
        `liqlab.settings.load()` when absent.

    Returns
    -------
    list of Path

    Raises
    ------
    SettingsError
        `cleanup.rss_bytes`, the container's memory limit, is not above `server.maxmemory`.
    """
    settings = settings or load()
    maxmemory = settings.server.maxmemory
    # 256 MB for 240: the breaker opens at 95 % of maxmemory, and the rest is for fragmentation.
    limit = settings.cleanup.rss_bytes or maxmemory * 16 // 15
    if limit <= maxmemory:
        raise SettingsError(
            f"cleanup.rss_bytes = {limit}: must be above server.maxmemory = {maxmemory}, or the container is killed"
        )
    parts = [_CONF]
    for item in directives(settings):
        at_runtime = item.where == "runtime only"
        text = f"# only with CONFIG SET: {item.name} {item.value}\n" if at_runtime else line(item.name, item.value)
        parts.append(f"# {item.why}\n{text}")
    files = {
        "redis.conf": "\n".join(parts),
        "users.acl": acl(),
        "start.sh": _START,
        "docker-compose.yml": _COMPOSE.format(image=IMAGE, user=_IMAGE_USER, port=PORT, limit=limit),
        "liqlab.toml": toml(settings),
    }
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name).write_text(text)
        (place / name).chmod(0o644)  # the container's user is another one, and there is no secret in them
    return [place / name for name in files]
