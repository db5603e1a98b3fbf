"""Every key that liqlab writes, in one table; writer, budget, cleanup, ACL and docs derive from it.

On one node the names are the original's (``liq:BTCUSDT``). With more than one shard every key carries a tag
(``liq:{3}:BTCUSDT``), so that all keys of a symbol live on one node of a cluster and a batch is one call a shard.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import pandas as pd

from liqlab.clock import HOUR_MS, MINUTE_MS
from liqlab.settings import Settings

SHARES: Final = ("streams", "vwap", "percentile", "statistics", "misc", "buffer")
_SYMBOL: Final = ".+"
_TAG: Final = re.compile(rb"[^:]+:\{(\d+)\}(?=:|$)")


@lru_cache(maxsize=1 << 14)  # of a batch most are those of the last one
def _key(pattern: str, symbol: str | None, side: str, bucket: int | None, shard: int | None) -> str:
    parts = {"SYMBOL": symbol, "*": symbol, "SIDE": side, "BUCKET": bucket}
    words = [str(parts.get(word, word)) for word in pattern.split(":") if parts.get(word, word) is not None]
    if shard is not None:
        words.insert(1, f"{{{shard}}}")
    return ":".join(words)


@dataclass(frozen=True)
class Family:
    """One row of the key table.

    Attributes
    ----------
    name : str
        What the family is called in tables and settings.
    pattern : str
        The key on one node; SYMBOL, SIDE and BUCKET stand for values, ``*`` for anything.
    redis_type : str
        What TYPE answers; several, joined by ``|``, where the method decides; ``any`` for foreign content.
    ttl : str or None
        The setting below `retention` that bounds its life; None where the key lives until it is deleted.
    share : str
        The share of the budget that pays for it.
    critical : bool
        Whether cleanup must never touch it.
    bucket_ms : int
        The width of BUCKET, ms, see `width_ms`; 0 where the key has none.
    contents : str
        What a reader of the docs wants to know.
    """

    name: str
    pattern: str
    redis_type: str
    ttl: str | None
    share: str
    contents: str
    critical: bool = False
    bucket_ms: int = 0

    def ttl_s(self, settings: Settings) -> int | None:
        """Return the seconds that a key of this family lives after its last write, None for ever."""
        if self.ttl is None:
            return None
        seconds = int(getattr(settings.retention, self.ttl))
        if self.ttl == "percentile_window_s":
            # A window of 24 h needs the bucket that it starts in as well.
            seconds = settings.retention.percentile_window_s + settings.retention.percentile_bucket_s
        return seconds

    def width_ms(self, settings: Settings) -> int:
        """Return the width of BUCKET, ms, under settings; 0 where the key has none."""
        return 1000 * settings.retention.percentile_bucket_s if self.name == "percentile" else self.bucket_ms

    def key(
        self, symbol: str | None = None, *, side: str = "", bucket: int | None = None, shard: int | None = None
    ) -> str:
        """Return the name of one key.

        Parameters
        ----------
        symbol : str, optional
            The venue's own name, or what stands for ``*``; None for a key that all symbols share.
        side : str, optional
            ``buy`` or ``sell``, where the pattern has SIDE.
        bucket : int, optional
            Event time // `bucket_ms`, where the pattern has BUCKET.
        shard : int, optional
            The symbol's shard, on a cluster.
        """
        return _key(self.pattern, symbol, side, bucket, shard)

    def head(self, symbol: str, *, shard: int | None = None) -> str:
        """Return what all keys of a symbol begin with, up to BUCKET: a head and a number make a key, quickly."""
        return self.key(symbol, bucket=0, shard=shard)[:-1]

    @property
    def regex(self) -> re.Pattern[str]:
        """A pattern that matches the family's keys, with or without a shard tag."""
        head, *rest = self.pattern.split(":")
        words = {"SYMBOL": _SYMBOL, "SIDE": "(?:buy|sell)", "BUCKET": r"\d+", "*": ".*"}
        tail = "".join(":" + words.get(word, re.escape(word)) for word in rest)
        if self.name == "events":  # the stream that symbols share is named by the head alone
            tail = f"(?:{tail})?"
        return re.compile(rf"{re.escape(head)}(?::\{{\d+\}})?{tail}", re.DOTALL)


FAMILIES: Final = (
    Family("events", "liq:SYMBOL", "stream", "events_s", "streams", "recent events, ID = event ms + sequence"),
    Family("blocks", "liqb", "stream", "events_s", "streams", "compressed blocks of older events, of all symbols"),
    Family("names", "liqid", "list", None, "streams", "symbols and exchanges by number", critical=True),
    Family(
        "vwap", "vwap:SYMBOL", "hash", "vwap_s", "vwap", "price_sum (of price x size), volume_sum, count, last_update"
    ),
    Family(
        "percentile",
        "size:SYMBOL:BUCKET",
        "zset|string|hash|TDIS-TYPE",
        "percentile_window_s",
        "percentile",
        "notionals of one hour, by method",
        bucket_ms=HOUR_MS,
    ),
    Family(
        "sketch", "sketch:SYMBOL", "hash", "percentile_window_s", "percentile", "notionals by hour, in log-spaced bins"
    ),
    Family(
        "candle", "candle:SYMBOL:BUCKET", "hash|string", "candle_s", "statistics", "one minute", bucket_ms=MINUTE_MS
    ),
    Family(
        "candle_5m",
        "candle5m:SYMBOL:BUCKET",
        "hash|string",
        "candle_5m_s",
        "statistics",
        "five minutes",
        bucket_ms=5 * MINUTE_MS,
    ),
    Family(
        "candle_1h",
        "candle1h:SYMBOL:BUCKET",
        "hash|string",
        "candle_1h_s",
        "statistics",
        "one hour",
        bucket_ms=HOUR_MS,
    ),
    Family("unique_symbols", "unique_symbols:1h", "string", "unique_symbols_s", "statistics", "HyperLogLog of symbols"),
    Family(
        "cooldown",
        "alert:SYMBOL:SIDE",
        "string",
        "cooldown_s",
        "misc",
        "event time of the last alert, ms: none meanwhile",
    ),
    Family(
        "signal",
        "signal:SYMBOL",
        "stream",
        "signal_s",
        "misc",
        "alerts raised, with threshold, rank and volume",
        critical=True,
    ),
    Family("position", "position:SYMBOL", "hash", None, "misc", "open positions of the user", critical=True),
    Family(
        "limits",
        "liqc",
        "hash",
        None,
        "misc",
        "bytes of the streams, set by cleanup and kept by each batch",
        critical=True,
    ),
    Family("lock", "liqc:lock", "string", "lock_s", "misc", "the one process that runs the schedule", critical=True),
    Family("writer", "liqw:*", "hash", "writer_s", "misc", "last batch of each writer, so that a repeat is a no-op"),
    Family("temporary", "temp:*", "any", "temporary_s", "misc", "scratch"),
    Family("debug", "debug:*", "any", "temporary_s", "misc", "debugging aids"),
    Family("stats_old", "stats:old:*", "any", "temporary_s", "misc", "statistics on their way out"),
)
BY_NAME: Final = {family.name: family for family in FAMILIES}
# By the word before the first colon: a scan of a million keys should not try every pattern on each.
_BY_HEAD: Final = {
    head: [(family, family.regex) for family in FAMILIES if family.pattern.split(":")[0] == head]
    for head in {family.pattern.split(":")[0] for family in FAMILIES}
}


def family_of(key: str) -> Family | None:
    """Return the family a key belongs to, None for a key that is not liqlab's."""
    for family, regex in _BY_HEAD.get(key.partition(":")[0], ()):
        if regex.fullmatch(key):
            return family
    return None


def literal(text: str) -> str:
    """Return a SCAN pattern that only `text` itself matches: a symbol is the venue's own name, whatever is in it."""
    return re.sub(r"([\\*?\[\]^-])", r"\\\1", text)


def shard_of(symbol: str, shards: int) -> int | None:
    """Return the shard of a symbol: CRC-32 of its UTF-8 name modulo `shards`; None where there is only one.

    The hash is the same in every process and on every machine, unlike Python's own.
    """
    return None if shards == 1 else zlib.crc32(symbol.encode()) % shards


class NodeSettings(Settings):
    """Settings of one node of a cluster: `here` are the shards whose keys it has."""

    here: tuple[int, ...] = ()


def only(settings: Settings, shards: Iterable[int | None]) -> Settings:
    """Return settings by which only some of the shards are looked at; a single one without a tag cannot be left out."""
    here = tuple(shard for shard in shards if shard is not None)
    return NodeSettings.model_construct(**{**dict(settings), "here": here}) if settings.shards > 1 else settings


def shards_of(settings: Settings) -> Sequence[int | None]:
    """Return every shard, of a node's settings those that it has; a single one is None, as keys have no tag then."""
    if isinstance(settings, NodeSettings):
        return settings.here
    return [None] if settings.shards == 1 else range(settings.shards)


def shard_of_key(key: bytes) -> int | None:
    """Return the shard whose tag a key carries, None where it has none."""
    found = _TAG.match(key)
    return int(found[1]) if found else None


def by_shard(keys: Iterable[bytes]) -> list[list[bytes]]:
    """Return keys in groups of the same tag, or of none: on a cluster one call may name those of one group."""
    groups: dict[int | None, list[bytes]] = {}
    for key in keys:
        groups.setdefault(shard_of_key(key), []).append(key)
    return list(groups.values())


def table(settings: Settings) -> pd.DataFrame:
    """Return the key table as a DataFrame: one row a family, with the TTL that `settings` give it."""
    rows = [
        {
            "family": family.name,
            "key": family.pattern,
            "type": family.redis_type,
            "ttl_s": family.ttl_s(settings),
            "share": family.share,
            "critical": family.critical,
            "contents": family.contents,
        }
        for family in FAMILIES
    ]
    frame = pd.DataFrame(rows)
    return frame.astype({"ttl_s": "Int64"})
