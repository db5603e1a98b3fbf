"""The command that records venues: options, a line of progress, and a stop that leaves whole files."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from liqlab import clock
from liqlab.cli.options import Json
from liqlab.cli.terminal import log, print_json, screen

if TYPE_CHECKING:
    from liqlab.record import Recorder

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_TELL_S: Final = 10.0  # between lines of progress on a terminal
_LOG_S: Final = 60.0  # and in a log


def record(
    venues: Annotated[
        list[str], typer.Argument(metavar="VENUE...", help="binance, bybit, okx, ... (docs/recording.md)")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The folder of the files.")],
    symbols: Annotated[
        list[str] | None, typer.Option("--symbols", metavar="VENUE=A,B", help="Which symbols; A,B for a single venue.")
    ] = None,
    url: Annotated[list[str] | None, typer.Option("--url", metavar="VENUE=URL", help="Another address.")] = None,
    rotate: Annotated[str, typer.Option(metavar="1h", help="A new file every so often: 30s, 15m, 1h, 1d.")] = "1h",
    hours: Annotated[float | None, typer.Option(min=0, help="Stop by itself.")] = None,
    as_json: Json = False,
) -> None:
    """Record venues' public liquidation streams into files that every other command reads, until Ctrl-C or SIGTERM.

    Example: liqlab record binance bybit okx --to recordings --symbols bybit=BTCUSDT,ETHUSDT --rotate 1h
    """
    from liqlab.record import VENUES, Recorder

    chosen = {name: value.split(",") for name, value in _pairs(symbols, venues, "--symbols")}
    urls = dict(_pairs(url, venues, "--url"))
    seconds = _seconds(rotate)
    for name in venues:
        if name in VENUES and VENUES[name].symbols and name not in chosen:
            log.print(f"{name} has no channel of all symbols: {', '.join(VENUES[name].symbols)}", markup=False)

    async def run() -> Recorder:
        recorder = Recorder(
            venues, to, symbols=chosen, urls=urls, rotate_s=seconds, tell=lambda text: log.print(text, markup=False)
        )
        loop = asyncio.get_running_loop()

        def stop() -> None:
            # The second signal ends a process whose disk hangs.
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            log.print("finishing the files")
            recorder.stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        telling = asyncio.create_task(_tell(recorder))
        try:
            await recorder.run(None if hours is None else hours * 3600)
        finally:
            telling.cancel()
        return recorder

    done = asyncio.run(run())
    if as_json:
        files = {"files": done.files.files, "bytes": done.files.written, "lost": done.files.lost}
        print_json({"venues": [asdict(status) for status in done.status.values()], **files})
    else:
        screen.print(_line(done), soft_wrap=True, markup=False)


async def _tell(recorder: Recorder) -> None:
    while True:
        await asyncio.sleep(_TELL_S if log.is_terminal else _LOG_S)
        log.print(_line(recorder), markup=False)


def _line(recorder: Recorder) -> str:
    """Say what every venue gave so far, and what the disk took."""
    from liqlab.budget import human

    now, parts = clock.now_ms(), []
    for status in recorder.status.values():
        last = "no frame yet" if status.last_ms is None else f"last frame {(now - status.last_ms) / 1000:.1f} s ago"
        told = [f"{status.venue} {status.events:,} events", last]
        told += [f"{status.rejected:,} malformed"] * (status.rejected > 0)
        told += [f"{status.reconnects:,} reconnects"] * (status.reconnects > 0)
        told += [f"{status.lost:,} frames lost"] * (status.lost > 0)
        told += [f"not connected: {status.error}"] * bool(status.error)
        parts.append(", ".join(told))
    files = recorder.files
    disk = f"{human(files.written)} in {files.files:,} files"
    return "; ".join([*parts, disk, *([files.problem] if files.problem else [])])


def _pairs(options: list[str] | None, venues: list[str], name: str) -> Iterator[tuple[str, str]]:
    for option in options or []:
        venue, separator, value = option.partition("=")
        if re.fullmatch(r"[a-z0-9]+", venue) and separator and value:
            yield venue, value
        elif len(venues) == 1 and option:
            yield venues[0], option
        else:
            raise typer.BadParameter(f"{option!r}: say of which venue, e.g. {venues[0]}={option}", param_hint=name)


def _seconds(text: str) -> int:
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None or not int(match[1]):
        raise typer.BadParameter(f"{text!r}: a number and a unit, e.g. 30s, 15m, 1h, 1d", param_hint="--rotate")
    return int(match[1]) * _SECONDS[match[2]]
