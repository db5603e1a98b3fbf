"""The legacy keys: which there are, what they hold, and their entries as events by the rules of the feeds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
from redis.asyncio import Redis
from redis.utils import str_if_bytes

from liqlab import schema
from liqlab.codecs import BY_FIELD
from liqlab.events import Columns
from liqlab.feeds.contracts import exchange_name
from liqlab.feeds.dedup import Seen
from liqlab.feeds.normalise import Normalised, Normaliser
from liqlab.feeds.rows import Rows
from liqlab.feeds.source import Quarantine
from liqlab.feeds.tables import Options, Table
from liqlab.settings import Settings

PAGE: Final = 5_000  # entries in one reply
FORMS: Final = {
    ("zset", ":"): "json",
    ("stream", ":"): "text",
    ("zset", "-"): "cryptofeed zset",
    ("stream", "-"): "cryptofeed stream",
}
OWN: Final = "liqlab"
UNKNOWN: Final = "unknown"
_SCRIPT: Final = files("liqlab.migrate").joinpath("sources.lua").read_text()
_VENUES: Final = (
    *("binance", "bybit", "okx", "bitmex", "deribit", "gate", "htx", "huobi", "kraken", "bitfinex", "bitget"),
    *("dydx", "aster", "hyperliquid"),
)
_TEXT: Final = {"s": "side", "z": "size", "sz": "size", "p": "price", "e": "exchange", "ex": "exchange"}

Entry = tuple[float | str, list[bytes]]  # score or ID; the member alone, or field, value, ...


class MigrateError(RuntimeError):
    """A migration cannot begin or go on; the message has what, the value, and the cure."""


@dataclass(frozen=True)
class Source:
    """One legacy key.

    Attributes
    ----------
    key : str
        Bytes that are no UTF-8 are surrogates.
    form : str
        A value of `FORMS`; `OWN` for a stream that liqlab reads as it is; `UNKNOWN` for anything else.
    symbol : str
        What the key's name says, for entries that do not.
    kind : str
        Its Redis type.
    entries : int
    state : str
        What `state_of` said: another one is another content.
    bytes : int
        By MEMORY USAGE.
    expires_ms : int
        When its TTL ends, ms since the epoch; -1 for never.
    """

    key: str
    form: str
    symbol: str
    kind: str
    entries: int
    state: str
    bytes: int
    expires_ms: int


def name(key: str) -> bytes:
    """Return the bytes of a key."""
    return key.encode(errors="surrogateescape")


async def state_of(redis: Redis, key: str) -> tuple[str, int, str]:
    """Return a key's type, number of entries, and state, as of one moment."""
    kind, entries, state = await redis.register_script(_SCRIPT)(keys=[name(key)])
    return str_if_bytes(kind), int(entries), str_if_bytes(state)


async def unlink(redis: Redis, source: Source) -> str:
    """Remove a key, in one step with the check that it is as it was; return ``removed``, ``gone`` or ``changed``."""
    kind, _, _, removed = await redis.register_script(_SCRIPT)(keys=[name(source.key)], args=[source.state])
    return "removed" if removed else "gone" if str_if_bytes(kind) == "none" else "changed"


async def find(redis: Redis, prefixes: Sequence[str]) -> list[Source]:
    """Return the legacy keys below `prefixes`, and liqlab's own per-symbol streams, in order of their names."""
    found: dict[bytes, tuple[str, str, str]] = {}
    for prefix in prefixes:
        escaped = "".join("\\" + letter if letter in "*?[]\\^" else letter for letter in prefix)
        async for key in redis.scan_iter(match=f"{escaped}[-:]*", count=1_000):
            mark, rest = chr(key[len(prefix.encode())]), key[len(prefix.encode()) + 1 :].decode(errors="replace")
            found[key] = ("", mark, rest.partition("-")[2] if mark == "-" else rest)
    own = schema.BY_NAME["events"]
    async for key in redis.scan_iter(match=own.key("*"), count=1_000):
        symbol = key.decode(errors="replace").partition(":")[2]
        if not symbol.startswith("{"):  # with a shard's tag it is liqlab's beyond doubt
            found.setdefault(key, (OWN, "", symbol))
    sources = []
    for key in sorted(found):
        form, mark, symbol = found[key]
        text = key.decode(errors="surrogateescape")
        kind, entries, state = await state_of(redis, text)
        if kind == "none":
            continue
        if form == OWN:
            form = OWN if kind == "stream" and await _readable(redis, key) else UNKNOWN
        else:
            form = FORMS.get((kind, mark), UNKNOWN)
        pipe = redis.pipeline(transaction=False)
        pipe.memory_usage(key, samples=PAGE)
        pipe.execute_command("PEXPIRETIME", key)
        size, expires_ms = await pipe.execute()
        sources.append(Source(text, form, symbol, kind, entries, state, int(size or 0), int(expires_ms)))
    return sources


async def _readable(redis: Redis, key: bytes) -> bool:
    """Return whether the first and the last entry of a stream are ones that `liqlab.history` reads."""
    for entry in [*(await redis.xrange(key, count=1) or ()), *(await redis.xrevrange(key, count=1) or ())]:
        fields = _words(entry[1])
        codec = BY_FIELD.get(fields[0].decode(errors="replace"))
        if codec is None or (codec.name == "fields" and fields[1] not in (b"b", b"s")):
            return False
    return True


def _words(fields: Any) -> list[bytes]:
    return [word for pair in fields.items() for word in pair] if isinstance(fields, dict) else list(fields)


async def entries(redis: Redis, source: Source, *, page: int = PAGE) -> AsyncIterator[list[Entry]]:
    """Yield the entries of a key, page by page, by score or ID, so that a key that loses old ones loses no others."""
    key = name(source.key)
    if source.kind == "stream":
        after = "-"
        while True:
            reply: Any = await redis.xrange(key, after, count=page) or ()
            rows = [(str_if_bytes(item[0]), _words(item[1])) for item in reply]
            if rows:
                yield list(rows)
            if len(rows) < page:
                return
            after = f"({rows[-1][0]}"
    low, ties = "-inf", 0
    while True:
        reply = await redis.execute_command(  # type: ignore[no-untyped-call]
            "ZRANGE", key, low, "+inf", "BYSCORE", "LIMIT", ties, page, "WITHSCORES"
        )
        found = [(float(score), [bytes(member)]) for member, score in reply]
        if found:
            yield list(found)
        if len(found) < page:
            return
        last = found[-1][0]
        same = sum(score == last for score, _ in found)
        ties = same + (ties if repr(last) == low else 0)
        low = repr(last)


@dataclass(frozen=True)
class Page:
    """What some entries are: ``len(entries) = len(events) + duplicates + rejected``; no events are None."""

    events: Columns | None
    duplicates: int
    rejected: int


class Reader:
    """Entries -> event tables, by the rules of `liqlab.feeds`; remembers the events of all keys, to know duplicates.

    Parameters
    ----------
    settings : Settings
        `feeds.contract_sizes` is read.
    exchange : str, optional
        The venue of entries that do not name theirs.
    quarantine : path, optional
        JSON lines with key (``file``), place in it (``line``), reason and raw text of what is rejected.
    """

    def __init__(self, settings: Settings, *, exchange: str | None = None, quarantine: Path | None = None) -> None:
        self.notes: list[str] = []
        self._normalise = Normaliser(settings.feeds.contract_sizes, Seen())
        self._exchange = None if exchange is None else exchange_name(exchange)
        self._quarantine = None if quarantine is None else Quarantine(quarantine, private=False)
        self._source: Source | None = None

    def close(self) -> None:
        """Finish the quarantine file."""
        if self._quarantine:
            self._quarantine.close()

    def read(self, source: Source, page: Sequence[Entry]) -> Page:
        """Read entries that follow those of the last call, where that was of the same key."""
        if self._source is not source:
            self._source, self._at = source, 0
            options = Options(symbol=source.symbol, exchange=self._exchange, note=self._note)
            self._table = Table(source.key, options)
        start, self._at = self._at, self._at + len(page)
        objects, rejected = [], []
        for place, entry in enumerate(page, start):
            one = self._object(source, entry)
            if isinstance(one, str):
                rejected.append((place, one))
            else:
                objects.append((place, one))
        read = self._table.read_objects(objects)
        rejected += read.rejected
        events, duplicates = None, 0
        if read.rows:
            found = self._normalise(Rows.merged([rows for _, rows in read.rows]))
            rejected += found.rejected
            events, duplicates = self._columns(found), found.duplicates
        if self._quarantine:
            for place, reason in sorted(rejected):
                self._quarantine.add(source.key, place + 1, reason, _shown(page[place - start]))
        return Page(events, duplicates, len(rejected))

    def _columns(self, found: Normalised) -> Columns | None:
        if not len(found.pair):
            return None
        names = list(self._normalise.pairs)
        used, code = np.unique(found.pair, return_inverse=True)
        exchange, symbol = ([names[at][part] for at in used.tolist()] for part in (0, 1))
        exchanges, symbols = ({name: at for at, name in enumerate(dict.fromkeys(part))} for part in (exchange, symbol))
        return Columns(
            found.ts_ms,
            np.array([exchanges[name] for name in exchange])[code],
            np.array([symbols[name] for name in symbol])[code],
            found.side,
            found.price,
            found.size,
            found.notional,
            list(exchanges),
            list(symbols),
        )

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _object(self, source: Source, entry: Entry) -> dict[str, Any] | str:
        """Return an entry as a flat object with the names that the feeds know, or why it is none."""
        when, words = entry
        if source.kind == "zset":
            try:
                one = orjson.loads(words[0])
            except orjson.JSONDecodeError:
                return "not valid JSON"
            if not isinstance(one, dict) or not one or any(isinstance(value, dict | list) for value in one.values()):
                return "not a flat JSON object"
            one.setdefault("timestamp", when)
            return one
        try:
            texts = [word.decode() for word in words]
        except UnicodeDecodeError:
            return "not UTF-8 text"
        fields = dict(zip(texts[::2], texts[1::2], strict=True))
        if source.form != "text":
            return fields
        one = {_TEXT.get(field, field): value for field, value in fields.items()}
        one["timestamp"] = fields.get("t") or str(when).partition("-")[0]
        short = one.get("exchange", "")
        venues = [venue for venue in _VENUES if venue.startswith(short)] if len(short) == 3 else []
        if len(venues) == 1:
            one["exchange"] = venues[0]
        elif venues and self._exchange not in venues:
            return f"the exchange {short!r} may be {', '.join(venues)}; name it with exchange="
        elif venues:
            one["exchange"] = self._exchange
        return one


def _shown(entry: Entry) -> bytes:
    words = entry[1]
    return words[0] if len(words) == 1 else str(entry[0]).encode() + b" " + b" ".join(words)
