"""What leaves Redis for files: critical data once a day, and a summary of each day, both as Parquet.

A file is written under another name and renamed when it is whole: whoever is killed in between leaves the old one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import pandas as pd
from redis.asyncio import Redis

from liqlab import clock, schema
from liqlab.candles import every
from liqlab.cleanup.families import Freed
from liqlab.settings import Settings

_PAGE: Final = 500
_READ: Final[dict[str, tuple[str | int, ...]]] = {
    "hash": ("HGETALL",),
    "list": ("LRANGE", 0, -1),
    "stream": ("XRANGE", "-", "+"),
    "string": ("GET",),
    "zset": ("ZRANGE", 0, -1, "WITHSCORES"),
    "set": ("SMEMBERS",),
}


class BackupError(ValueError):
    """A file is no backup, or a key of it is in the way; the message says which."""


async def critical(redis: Redis, folder: Path, now_ms: int, settings: Settings) -> Freed:
    """Write the critical families and the VWAPs into one file a day.

    Columns: family, key, type, ttl_ms (-1 for ever), value (JSON, to be read), dump (to be restored).
    """
    wanted = [family for family in schema.FAMILIES if family.critical and family.name not in ("lock", "limits")]
    rows: list[dict[str, Any]] = []
    for family in (*wanted, schema.BY_NAME["vwap"]):
        keys = [key async for key in redis.scan_iter(match=f"{family.pattern.split(':')[0]}*", count=1_000)]
        keys = [key for key in keys if schema.family_of(key.decode(errors="replace")) is family]
        for start in range(0, len(keys), _PAGE):
            rows += await _dumped(redis, family.name, keys[start : start + _PAGE])
    path = folder / f"critical-{_day(now_ms)}.parquet"
    columns = ["family", "key", "type", "ttl_ms", "value", "dump"]
    _write(pd.DataFrame(rows, columns=columns), path)
    _prune(folder, "critical", settings.cleanup.folder_days)
    return Freed(0, 0, f"{len(rows):,} keys into {path.name}")


async def _dumped(redis: Redis, family: str, keys: list[bytes]) -> list[dict[str, Any]]:
    pipe = redis.pipeline(transaction=False)
    for key in keys:
        for command in ("TYPE", "PTTL", "DUMP"):
            pipe.execute_command(command, key)
    first = await pipe.execute()
    kinds = [kind.decode() for kind in first[0::3]]
    pipe = redis.pipeline(transaction=False)
    for key, kind in zip(keys, kinds, strict=True):
        read = _READ.get(kind, ("EXISTS",))
        pipe.execute_command(read[0], key, *read[1:])
    values = await pipe.execute(raise_on_error=False)
    return [
        {
            "family": family,
            "key": key,
            "type": kind,
            "ttl_ms": int(pttl),
            "value": json.dumps(_readable(value)),
            "dump": dump,
        }
        for key, kind, pttl, dump, value in zip(keys, kinds, first[1::3], first[2::3], values, strict=True)
        if dump is not None
    ]


def _readable(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    if isinstance(value, dict):
        return {str(_readable(name)): _readable(one) for name, one in value.items()}
    return [_readable(one) for one in value] if isinstance(value, list | tuple | set) else value


async def restore(redis: Redis, path: Path, *, replace: bool = False) -> int:
    """Bring the keys of a backup back, each with the life that it had left; return how many.

    Parameters
    ----------
    path : Path
        A file that `critical` wrote. The server must be as new as the one it came from.
    replace : bool
        Whether keys that exist are written over; else they are left as they are.

    Raises
    ------
    BackupError
        The file is none of these.
    redis.exceptions.ResponseError
        The server refuses a dump, for one because it is older.
    """
    try:
        rows = pd.read_parquet(path, columns=["key", "ttl_ms", "dump"])
    except (OSError, ValueError, KeyError) as error:
        raise BackupError(f"{path} is no backup of liqlab's: {error}") from None
    done = 0
    for key, ttl_ms, dump in zip(rows["key"].tolist(), rows["ttl_ms"].tolist(), rows["dump"].tolist(), strict=True):
        if replace or not await redis.exists(key):
            await redis.restore(key, max(ttl_ms, 0), dump, replace=replace)
            done += 1
    return done


async def days(redis: Redis, folder: Path, now_ms: int, kept: int) -> Freed:
    """Write a summary of each day that is over, from the hourly candles, before those expire.

    A row a symbol, the columns of `liqlab.candles.candles`. A day is written again while late events still add to it;
    of two summaries the one with more events stays.
    """
    hourly = await every(redis, "1h")
    hourly = hourly[hourly["ts_ms"] // clock.DAY_MS < now_ms // clock.DAY_MS]
    written = 0
    for day, part in hourly.groupby(hourly["ts_ms"] // clock.DAY_MS):
        path = folder / f"days-{_day(int(day) * clock.DAY_MS)}.parquet"
        table = _summary(part)
        if path.exists():
            both = pd.concat([table, pd.read_parquet(path)])
            table = both.sort_values("count", ascending=False, kind="stable").groupby("symbol").head(1)
            table = table.sort_values("symbol").reset_index(drop=True)
            if table.equals(pd.read_parquet(path)):
                continue
        _write(table, path)
        written += 1
    _prune(folder, "days", kept)
    return Freed(0, 0, f"{written} daily summaries" if written else "")


def _summary(hourly: pd.DataFrame) -> pd.DataFrame:
    sums = ("count", "volume", "buy_volume", "sell_volume", "notional", "price_total")
    how = {"open": "first", "high": "max", "low": "min", "close": "last", "max_size": "max"} | dict.fromkeys(
        sums, "sum"
    )
    hourly = hourly.assign(price_total=hourly["mean_price"] * hourly["count"])
    table = hourly.sort_values("ts_ms", kind="stable").groupby("symbol", as_index=False).agg(how)
    table["vwap"] = table["notional"] / table["volume"]
    table["mean_price"] = table.pop("price_total") / table["count"]
    table.insert(0, "ts_ms", int(hourly["ts_ms"].iloc[0]) // clock.DAY_MS * clock.DAY_MS)
    return table


def _day(ms: int) -> str:
    return f"{pd.Timestamp(ms, unit='ms'):%Y-%m-%d}"


def _write(table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    table.to_parquet(part, index=False)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _prune(folder: Path, kind: str, kept: int) -> None:
    for path in sorted(folder.glob(f"{kind}-*.parquet"))[:-kept]:
        path.unlink(missing_ok=True)
