"""The original document's checklist, each item with what was found out about it on this server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd
from redis.asyncio import Redis

from liqlab import archive, budget, schema
from liqlab.codecs import BY_FIELD, CODECS
from liqlab.migrate.folder import Folder
from liqlab.migrate.planning import PREFIXES
from liqlab.migrate.sources import OWN, UNKNOWN, MigrateError, Source, find
from liqlab.settings import Settings, load

DONE: Final = "done"
TO_DO: Final = "to do"
UNCHECKED: Final = "not checked"
_POLICIES: Final = ("volatile-ttl", "noeviction")

Found = tuple[str, str]  # state, what was found


@dataclass(frozen=True)
class _Facts:
    """What the checks look at."""

    settings: Settings
    legacy: list[Source]
    backup: Path | None
    budget: budget.Budget
    codecs: list[str]  # of the newest event of each hot stream
    stored: int
    maxmemory: int
    policy: str
    evicted: int


async def checklist(
    redis: Redis,
    *,
    settings: Settings | None = None,
    backup: str | Path | None = None,
    prefixes: Sequence[str] = PREFIXES,
) -> pd.DataFrame:
    """Return the sixteen items of the original's implementation checklist. Reads only.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        A client that returns bytes.
    settings : Settings, optional
        `liqlab.settings.load()` when absent.
    backup : path, optional
        The folder of the backup.
    prefixes : sequence of str
        See `liqlab.migrate.plan`.

    Returns
    -------
    pandas.DataFrame
        phase, item, state (``done`` and ``to do`` are checked here and now; ``not checked`` is what cannot be seen from
        here), found (in words), how (the command).
    """
    settings = settings or load()
    info = await redis.info("all")
    facts = _Facts(
        settings,
        [source for source in await find(redis, prefixes) if source.form not in (OWN, UNKNOWN)],
        None if backup is None else Path(backup),
        await budget.measure(redis, settings=settings),
        await _codecs(redis, settings),
        await archive.count(redis, settings=settings),
        int(info["maxmemory"]),
        str(info["maxmemory_policy"]),
        int(info["evicted_keys"]),
    )
    rows = [(phase, item, *check(facts), how) for phase, item, check, how in _ITEMS]
    return pd.DataFrame(rows, columns=["phase", "item", "state", "found", "how"])


async def _codecs(redis: Redis, settings: Settings) -> list[str]:
    found: list[str] = []
    for shard in schema.shards_of(settings):
        pipe = redis.pipeline(transaction=False)
        for key in await archive.streams(redis, shard):
            pipe.xrevrange(key, count=1)
        for entry in [
            entries[0] for entries in await pipe.execute(raise_on_error=False) if isinstance(entries, list) and entries
        ]:
            codec = BY_FIELD.get(next(iter(entry[1])).decode(errors="replace"))
            found.append(codec.name if codec else UNKNOWN)
    return found


def _backed_up(facts: _Facts) -> Found:
    if facts.backup is None or not facts.backup.exists():
        return (
            (TO_DO, f"{len(facts.legacy)} legacy keys, no backup") if facts.legacy else (DONE, "there is no legacy key")
        )
    try:
        folder = Folder(facts.backup)
    except MigrateError as error:
        return TO_DO, str(error)
    held = {key.source.key: key.source.state for key in folder.manifest.keys}
    lacks = [source.key for source in facts.legacy if held.get(source.key) != source.state]
    if lacks:
        return (
            TO_DO,
            f"{facts.backup} lacks {len(lacks)} of {len(facts.legacy)} keys as they are now, {lacks[0]} for one",
        )
    return DONE, f"{sum(key.source.entries for key in folder.manifest.keys)} entries of {len(held)} keys"


def _benchmarked(facts: _Facts) -> Found:
    each = [
        f"{name} {row['bytes_per_member']:.0f} B each"
        for name, row in facts.budget.families.iterrows()
        if name in ("events", "blocks", budget.FOREIGN)
    ]
    return DONE, "; ".join([f"{budget.human(facts.budget.used_memory)} in use", *each])


def _switched(facts: _Facts) -> Found:
    if facts.legacy:
        return TO_DO, f"{len(facts.legacy)} legacy keys, {sum(source.entries for source in facts.legacy)} entries"
    return (DONE, f"{facts.stored} events") if facts.stored else (TO_DO, "no event is stored yet")


def _binary(facts: _Facts) -> Found:
    texts = [codec for codec in facts.codecs if codec in ("json", "fields", UNKNOWN)]
    if not facts.stored:
        return TO_DO, f"no event is stored yet; writer.codec = {facts.settings.writer.codec}"
    if texts:
        return TO_DO, f"{len(texts)} of {len(facts.codecs)} hot streams end in {', '.join(sorted(set(texts)))}"
    kinds = sorted(set(facts.codecs)) or [CODECS[facts.settings.writer.block_codec].name]
    return DONE, f"newest events: {', '.join(kinds)}"


def _pipelined(facts: _Facts) -> Found:
    strategy = facts.settings.writer.strategy
    return (TO_DO if strategy == "single" else DONE), f"writer.strategy = {strategy}"


def _policies(facts: _Facts) -> Found:
    found = f"maxmemory {budget.human(facts.maxmemory)}, {facts.policy}"
    return (DONE if facts.maxmemory and facts.policy in _POLICIES else TO_DO), found


def _breaker(facts: _Facts) -> Found:
    path = facts.settings.journal.path
    return (
        (DONE, f"journal.path = {path}") if path else (TO_DO, "journal.path is not set: without it there is no breaker")
    )


def _alerts(facts: _Facts) -> Found:
    return (
        UNCHECKED,
        f"monitor.webhook is {'set' if facts.settings.monitor.webhook else 'not set'}; whether it runs is not known",
    )


def _ttls(facts: _Facts) -> Found:
    if not facts.stored:
        return TO_DO, "no event is stored yet"
    over = facts.budget.over
    return (TO_DO, f"above their share: {', '.join(over)}") if over else (DONE, "no part is above its share")


def _eviction(facts: _Facts) -> Found:
    state, found = _policies(facts)
    if not facts.stored:
        return TO_DO, "no event is stored yet"
    return (TO_DO if facts.evicted else state), f"{found}; {facts.evicted} keys evicted since the server started"


def _unseen(facts: _Facts) -> Found:
    return UNCHECKED, "cannot be seen on the server"


_ITEMS: Final[tuple[tuple[str, str, Callable[[_Facts], Found], str], ...]] = (
    ("Preparation", "Backup existing data", _backed_up, "liqlab migrate --backup FOLDER"),
    ("Preparation", "Test new schema in development", _unseen, "liqlab ingest FEED"),
    ("Preparation", "Benchmark memory usage", _benchmarked, "liqlab budget"),
    ("Preparation", "Load test with 100 events/minute", _unseen, "liqlab synth --profile normal, then liqlab ingest"),
    ("Optimization", "Switch to Redis Streams", _switched, "liqlab migrate --backup FOLDER --remove"),
    ("Optimization", "Implement binary encoding", _binary, "--set writer.codec=ints; liqlab codecs FEED compares"),
    ("Optimization", "Add pipelining for writes", _pipelined, "--set writer.strategy=script"),
    ("Optimization", "Configure memory policies", _policies, "liqlab config"),
    ("Monitoring", "Set up memory alerts", _alerts, "liqlab monitor"),
    ("Monitoring", "Implement circuit breaker", _breaker, "--set journal.path=FILE"),
    ("Monitoring", "Add performance metrics", _unseen, "liqlab monitor"),
    ("Monitoring", "Create memory dashboard", _unseen, "liqlab lab 08-monitor"),
    ("Tuning", "Adjust TTLs based on usage", _ttls, "liqlab budget, then --set retention.NAME=SECONDS"),
    ("Tuning", "Optimize aggregation intervals", _unseen, "liqlab budget, then --set retention.candle_s=SECONDS"),
    ("Tuning", "Fine-tune eviction policy", _eviction, "liqlab config"),
    ("Tuning", "Review percentile accuracy", _unseen, "liqlab.quantiles beside the exact ones of liqlab.history"),
)
