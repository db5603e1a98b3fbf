"""One validated tree of settings.

Precedence, lowest first: the defaults below, ``liqlab.toml`` in the working directory, ``LIQLAB_*`` in the
environment (``LIQLAB_WRITER__BATCH_MS=50`` sets ``writer.batch_ms``), keywords.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

FILE: Final = "liqlab.toml"
ENV_PREFIX: Final = "LIQLAB_"
_SECRETS: Final = ("redis_url", "monitor.webhook")  # an address may hold a password or a token
_UNITS: Final = {"": 1, "b": 1, "k": 1000, "kb": 1 << 10, "m": 1000**2, "mb": 1 << 20, "g": 1000**3, "gb": 1 << 30}


class SettingsError(ValueError):
    """A setting is not acceptable; the message names it, its value and what is allowed."""


def parse_bytes(value: object) -> object:
    """Turn ``"240mb"`` into 251658240, with the units of redis.conf; anything but text passes through.

    Raises
    ------
    ValueError
        The text is not a number with one of the units b, k, kb, m, mb, g, gb.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError("must be a number of bytes with one of the units b, k, kb, m, mb, g, gb, e.g. 240mb")
    return int(float(match[1]) * _UNITS[match[2]])


ByteSize = Annotated[int, BeforeValidator(parse_bytes)]
Share = Annotated[float, Field(ge=0, le=1)]
Usd = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Budget(_Section):
    """Shares of maxmemory; they add to 1."""

    streams: Share = 0.40
    vwap: Share = 0.10
    percentile: Share = 0.20
    statistics: Share = 0.10
    misc: Share = 0.08
    buffer: Share = 0.12

    @model_validator(mode="after")
    def _add_to_one(self) -> Budget:
        total = sum(self.model_dump().values())
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the six shares add to {total:.6g}; they must add to 1")
        return self


class Retention(_Section):
    """How long each family is kept, in seconds, and how many entries a symbol's or the shared stream."""

    hot_s: PositiveInt = 900
    events_s: PositiveInt = 2_592_000  # a backstop: the caps below, and later bytes, bound a busy stream long before
    events_maxlen: PositiveInt = 10_000
    shared_maxlen: PositiveInt = 1_000_000
    vwap_s: PositiveInt = 3_600
    percentile_window_s: PositiveInt = 86_400
    percentile_bucket_s: PositiveInt = 3_600
    candle_s: PositiveInt = 3_600
    candle_5m_s: PositiveInt = 3_600
    candle_1h_s: PositiveInt = 86_400
    unique_symbols_s: PositiveInt = 3_600
    cooldown_s: PositiveInt = 600
    signal_s: PositiveInt = 3_600
    temporary_s: PositiveInt = 300
    writer_s: PositiveInt = 86_400
    lock_s: PositiveInt = 30


class Thresholds(_Section):
    """Fractions of maxmemory at which cleanup and the breaker act."""

    trim: Share = 0.75
    halve: Share = 0.85
    emergency: Share = 0.90
    exit_margin: Share = 0.05
    breaker_half_open: Share = 0.90
    breaker_open: Share = 0.95

    @model_validator(mode="after")
    def _ordered(self) -> Thresholds:
        if not self.trim < self.halve < self.emergency:
            raise ValueError(f"trim {self.trim} < halve {self.halve} < emergency {self.emergency} must hold")
        if not self.breaker_half_open < self.breaker_open:
            raise ValueError(f"breaker_half_open {self.breaker_half_open} < breaker_open {self.breaker_open} must hold")
        return self


class Writer(_Section):
    """When the writer sends a batch (at `batch_events`, or `batch_ms` after the first of them), and in what form."""

    strategy: Literal["script", "pipeline", "single"] = "script"
    batch_events: Annotated[int, Field(ge=1, le=20_000)] = 50
    batch_ms: PositiveFloat = 100.0
    batch_bytes: Annotated[ByteSize, Field(ge=64 << 10, le=64 << 20)] = 1 << 20
    bulk_events: Annotated[int, Field(ge=1, le=50_000)] = 5_000
    queue_events: PositiveInt = 100_000
    check_s: PositiveFloat = 1.0
    layout: Literal["shared", "per_symbol", "hybrid"] = "shared"
    hybrid_events: PositiveInt = 2_000
    codec: Literal["ints", "fields", "struct19", "msgpack", "json"] = "ints"
    block_codec: Literal["block", "msgpack-zlib"] = "block"
    block_bytes: Annotated[ByteSize, Field(ge=1 << 10, le=1 << 20)] = 16 << 10
    candles: Literal["packed", "hash"] = "packed"


class Detector(_Section):
    """Which event is an alert; `retention` has the percentile's window, the cooldown, and how long signals stay."""

    method: Literal["logbins", "exact", "topk", "reservoir", "tdigest"] = "logbins"
    size: Annotated[int, Field(ge=10, le=10_000)] | None = None
    percentile: Annotated[float, Field(gt=0, lt=100)] = 95.0
    refresh_s: PositiveInt = 60
    volume_s: PositiveInt = 900
    volume_usd: Usd = 100_000.0
    min_usd: Usd = 0.0
    min_usd_of: dict[str, Usd] = Field(default_factory=dict)


class Journal(_Section):
    """Where events wait that Redis cannot take; without a path they wait in memory, and `write` waits with them."""

    path: Path | None = None
    mode: Literal["spool", "wal"] = "spool"
    max_bytes: Annotated[ByteSize, Field(ge=1 << 20)] = 64 << 20


class Cleanup(_Section):
    """How often what is kept is bounded, in seconds, and where what leaves Redis goes."""

    trim_s: PositiveFloat = 10.0
    check_s: PositiveFloat = 300.0
    compact_s: PositiveFloat = 1_800.0
    daily_s: PositiveFloat = 86_400.0
    dwell_s: PositiveFloat = 300.0
    folder: Path | None = None
    folder_days: PositiveInt = 7
    rss_bytes: Annotated[ByteSize, Field(ge=1 << 20)] | None = None


class Server(_Section):
    """The server that liqlab starts for itself."""

    binary: Path | None = None
    maxmemory: ByteSize = 240 << 20
    maxmemory_policy: Literal["volatile-ttl", "noeviction"] = "volatile-ttl"
    stream_node_max_bytes: Annotated[ByteSize, Field(ge=256, le=64 << 10)] = 4 << 10
    stream_node_max_entries: Annotated[int, Field(ge=1, le=10_000)] = 200

    @field_validator("maxmemory")
    @classmethod
    def _enough(cls, value: int) -> int:
        if value < 4 << 20:
            raise ValueError("must be at least 4mb: an empty server takes about 1mb of it")
        return value


class Cluster(_Section):
    """How long a failover may take (`failover_s`), and a replica to have a batch before it counts (`replica_ms`)."""

    failover_s: Annotated[float, Field(ge=0)] = 30.0
    replica_ms: Annotated[int, Field(ge=0, le=60_000)] = 1_000


class Feeds(_Section):
    """What reading a feed needs to know and cannot find in it."""

    contract_sizes: dict[str, PositiveFloat] = Field(default_factory=dict)
    quarantine_dir: Path | None = None


class Monitor(_Section):
    """How often a running server is looked at, and which fractions of what it may use are an alert."""

    interval_s: PositiveFloat = 30.0
    warning: Share = 0.85
    critical: Share = 0.95
    journal: Share = 0.80
    webhook: SecretStr | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Monitor:
        if not self.warning < self.critical:
            raise ValueError(f"warning {self.warning} < critical {self.critical} must hold")
        return self

    @field_validator("webhook")
    @classmethod
    def _on_this_machine(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not _is_local(value.get_secret_value()):
            raise ValueError(
                "must be on this machine, as http://127.0.0.1:PORT/PATH, http://localhost:PORT/PATH or "
                "unix:///PATH/TO/SOCKET; let something that listens there pass it on"
            )
        return value


def _is_local(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
        if parts.scheme == "unix":
            return parts.path.startswith("/") and not host
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    plain = "@" not in parts.netloc and url.isascii() and url.isprintable() and " " not in url
    return parts.scheme == "http" and loopback and plain


class Settings(BaseSettings):
    """Every setting of liqlab; see the module docstring for where values come from.

    Raises
    ------
    SettingsError
        Through `load`: one line a bad setting with its name, its value and what is allowed.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        toml_file=FILE,
        extra="forbid",
        frozen=True,
    )

    redis_url: SecretStr | None = None
    shards: Annotated[int, Field(ge=1, le=1024)] = 1
    budget: Budget = Budget()
    retention: Retention = Retention()
    thresholds: Thresholds = Thresholds()
    writer: Writer = Writer()
    detector: Detector = Detector()
    journal: Journal = Journal()
    cleanup: Cleanup = Cleanup()
    server: Server = Server()
    cluster: Cluster = Cluster()
    feeds: Feeds = Feeds()
    monitor: Monitor = Monitor()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources, highest first: keywords, environment, file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load(**overrides: Any) -> Settings:
    """Read the settings from their four sources.

    Parameters
    ----------
    **overrides
        Fields of `Settings`; a section takes a dict, ``writer={"batch_ms": 50}``. They win over everything else.

    Returns
    -------
    Settings

    Raises
    ------
    SettingsError
        A setting is unknown or not acceptable.
    """
    _check_environment()
    try:
        return Settings(**overrides)
    except ValidationError as error:
        raise SettingsError("\n".join(_problem(dict(item)) for item in error.errors())) from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{FILE}: {error}") from None


def setting(settings: Settings, name: str) -> Any:
    """Return a setting by its dotted name, such as ``writer.layout``."""
    section, _, field = name.rpartition(".")
    return getattr(getattr(settings, section) if section else settings, field)


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Return settings of which some are others.

    Parameters
    ----------
    settings : Settings
    changes : mapping of str to value
        By dotted name: ``{"writer.layout": "hybrid"}``.

    Raises
    ------
    SettingsError
        A setting is unknown or not acceptable.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name not in _known():
            raise SettingsError(_unknown(name, list(_known())))
        section, _, field = name.rpartition(".")
        sections.setdefault(section, {})[field] = value
    update: dict[str, Any] = {}
    for section, fields in sections.items():
        model = getattr(settings, section) if section else settings
        try:
            whole = type(model).model_validate({**vars(model), **fields})
        except ValidationError as error:
            items = [{**item, "loc": (*filter(None, [section]), *item["loc"])} for item in error.errors()]
            raise SettingsError("\n".join(_problem(item) for item in items)) from None
        update |= {section: whole} if section else {name: getattr(whole, name) for name in fields}
    return settings.model_copy(update=update)


@cache
def _known() -> frozenset[str]:
    return frozenset(_names(Settings))


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, f"{prefix}{name}.")


def _check_environment() -> None:
    known = _known()
    sections = {name.split(".")[0] for name in known if "." in name}
    for name, value in os.environ.items():
        if not name.upper().startswith(ENV_PREFIX):
            continue
        setting = name[len(ENV_PREFIX) :].lower().replace("__", ".")
        if setting not in known:
            raise SettingsError(_unknown(name, [ENV_PREFIX + k.upper().replace(".", "__") for k in known]))
        if setting in sections:
            try:
                json.loads(value)
            except ValueError:
                raise SettingsError(
                    f"{name} = {value!r}: a whole section must be JSON; or set its parts, {name}__..., one by one"
                ) from None


def _problem(item: dict[str, Any]) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return _unknown(name, list(_known()))
    message = str(item["msg"]).removeprefix("Value error, ")
    # A secret is named, never shown; a section's own rule speaks of several values and shows them itself.
    value = "" if name in _SECRETS or isinstance(item["input"], dict | BaseModel) else f" = {item['input']!r}"
    return f"{name}{value}: {message[:1].lower()}{message[1:]}"


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{name}: no such setting" + (f"; did you mean {near[0]}?" if near else "; see docs/settings.md")
