"""Venues' public websockets -> files that `liqlab.read_feed` reads. docs/recording.md says what is in them."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from liqlab import clock
from liqlab.feeds.frames import Messages
from liqlab.feeds.rows import Event, RejectedError
from liqlab.record import lines
from liqlab.record.files import Files, Line
from liqlab.record.lines import gaps
from liqlab.record.venues import VENUES, Venue, refusal

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

__all__ = ["VENUES", "RecordError", "Recorder", "Status", "Venue", "gaps"]

_HEARTBEAT_S: Final = 20.0
_STEADY_S: Final = 60.0  # a connection that lasted as long starts the delays anew
_SHOWN: Final = 200


class RecordError(Exception):
    """A recorder that cannot start, in one sentence."""


@dataclass
class Status:
    """What became of one venue so far.

    Attributes
    ----------
    venue : str
        Its name.
    connected : bool
        Whether it answers at present.
    frames, events, rejected : int
        Frames received; liquidations in them; what is damaged or of no known form. All but `lost` are kept.
    lost : int
        Frames received and dropped, because the disk did not keep up.
    reconnects : int
        Attempts to connect after the first.
    last_ms : int or None
        Receipt of the last frame, ms since the epoch, UTC.
    error : str
        Why the last connection ended.
    """

    venue: str
    connected: bool = False
    frames: int = 0
    events: int = 0
    rejected: int = 0
    lost: int = 0
    reconnects: int = 0
    last_ms: int | None = None
    error: str = ""


class Recorder:
    """Records venues into a folder until it is stopped.

    Parameters
    ----------
    venues : iterable of str
        Names of `VENUES`.
    folder : path
        Where the files go; it is created.
    symbols : mapping of str to sequence of str, optional
        By venue, in its own spelling. Without: all, or `Venue.symbols` where there is no channel for all.
    urls : mapping of str to str, optional
        By venue, another address.
    rotate_s : float
        Seconds of a file; files begin at its whole multiples in UTC.
    flush_s : float
        Seconds of frames that a killed process loses at most, besides the time that a write takes.
    queue_bytes : int
        Frames held at most while the disk does not keep up.
    silence_s : float, optional
        Seconds without a frame before a connection is taken for dead; `Venue.silence_s` if not given.
    reconnect_s : (float, float)
        First and longest delay before a reconnect, seconds: doubled each time, and shortened by up to half at random.
    tell : callable, optional
        Called with sentences: what was refused, why a connection ended, what is wrong with the disk.

    Attributes
    ----------
    status : dict of str to Status
        By venue.
    files : Files
        `written`, `files`, `lost` and `problem` of the disk's side.

    Raises
    ------
    RecordError
        A venue is unknown or cannot be told which symbols, an address is none, or `websockets` is not installed.
    """

    def __init__(
        self,
        venues: Iterable[str],
        folder: str | os.PathLike[str],
        *,
        symbols: Mapping[str, Sequence[str]] | None = None,
        urls: Mapping[str, str] | None = None,
        rotate_s: float = 3600.0,
        flush_s: float = 1.0,
        queue_bytes: int = 16 << 20,
        silence_s: float | None = None,
        reconnect_s: tuple[float, float] = (1.0, 60.0),
        tell: Callable[[str], None] | None = None,
    ) -> None:
        _check(venues := list(dict.fromkeys(venues)), symbols := symbols or {}, urls := urls or {}, rotate_s)
        self._venues = [VENUES[name] for name in venues]
        self._symbols = {venue.name: tuple(symbols.get(venue.name) or venue.symbols) for venue in self._venues}
        self._urls = {venue.name: urls.get(venue.name, venue.url) for venue in self._venues}
        self._silence_s, self._reconnect_s = silence_s, reconnect_s
        self._heartbeat_s = min(_HEARTBEAT_S, (silence_s or _STEADY_S) / 3)
        self._rng = clock.generator(int(clock.token(), 16))
        self._told = tell or (lambda sentence: None)
        self._stop = asyncio.Event()
        self._holes: dict[str, int | None] = dict.fromkeys(venues)
        self.status = {name: Status(name) for name in venues}
        self.files = Files(
            Path(folder),
            {name: lines.header(name, self._symbols[name]) for name in venues},
            rotate_ms=round(rotate_s * 1000),
            flush_s=flush_s,
            queue_bytes=queue_bytes,
            tell=self._from_thread,
        )

    def stop(self) -> None:
        """Let `run` finish its files and return; to be called on the loop that runs it."""
        self._stop.set()

    async def run(self, seconds: float | None = None) -> None:
        """Record until `stop`, until it is cancelled, or for so many seconds; whole files are left in each case.

        Raises
        ------
        OSError
            The folder cannot be created.
        """
        await asyncio.to_thread(self.files.folder.mkdir, parents=True, exist_ok=True)
        self._loop = asyncio.get_running_loop()
        written = self._start_writing()
        tasks = [asyncio.create_task(self._record(venue)) for venue in self._venues]
        stopped = asyncio.create_task(self._stop.wait())
        ends: list[asyncio.Future[Any]] = [*tasks, stopped, written]
        try:
            await asyncio.wait(ends, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*tasks, stopped):
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            for venue in self._venues:
                now = clock.now_ms()
                from_ms = now if self.status[venue.name].connected else self._holes[venue.name]
                self._put(venue.name, now, lines.gap(venue.name, from_ms, None, lines.STOP), must=True)
            self.files.close()
            await written
        for error in ended:
            if isinstance(error, Exception):
                raise error

    def _start_writing(self) -> asyncio.Future[None]:
        # A daemon: a disk that hangs must not keep a process from ending at the second Ctrl-C.
        loop, written = self._loop, self._loop.create_future()

        def end(error: Exception | None) -> None:
            if not written.done():
                written.set_result(None) if error is None else written.set_exception(error)

        def write() -> None:
            try:
                self.files.run()
            except Exception as error:
                loop.call_soon_threadsafe(end, error)
            else:
                loop.call_soon_threadsafe(end, None)

        threading.Thread(target=write, name="liqlab-record", daemon=True).start()
        return written

    def _from_thread(self, sentence: str) -> None:
        self._loop.call_soon_threadsafe(self._told, sentence)

    def _put(self, venue: str, ms: int, line: bytes, *, must: bool = False) -> None:
        if not self.files.put(Line(venue, ms, line), must=must):
            self.status[venue].lost += 1

    async def _record(self, venue: Venue) -> None:
        from websockets.exceptions import WebSocketException

        status, failures = self.status[venue.name], 0
        reason = lines.START
        while True:
            began = clock.elapsed_s()
            try:
                await self._connection(venue, reason)
            except (OSError, WebSocketException) as error:
                reason = status.error = " ".join(str(error).split()) or type(error).__name__
            status.connected = False
            failures = 0 if clock.elapsed_s() - began > _STEADY_S else failures
            longest = min(self._reconnect_s[0] * 2**failures, self._reconnect_s[1])
            delay = longest * (0.5 + 0.5 * self._rng.random())
            self._told(f"{venue.name}: {reason}; trying again in {delay:.1f} s")
            failures = min(failures + 1, 30)
            await asyncio.sleep(delay)
            status.reconnects += 1

    async def _connection(self, venue: Venue, reason: str) -> None:
        from websockets.asyncio.client import connect

        async with connect(self._urls[venue.name], max_size=lines.MAX_FRAME_BYTES, close_timeout=2) as socket:
            for request in venue.subscribe(self._symbols[venue.name]):
                await socket.send(request)
            beating = asyncio.create_task(self._beat(venue, socket))
            try:
                await self._frames(venue, socket, reason)
            finally:
                beating.cancel()
                with suppress(asyncio.CancelledError):
                    await beating

    async def _beat(self, venue: Venue, socket: ClientConnection) -> None:
        from websockets.exceptions import ConnectionClosed

        with suppress(ConnectionClosed):
            while venue.heartbeat is not None:
                await asyncio.sleep(self._heartbeat_s)
                await socket.send(venue.heartbeat())

    async def _frames(self, venue: Venue, socket: ClientConnection, reason: str) -> None:
        name, status, messages = venue.name, self.status[venue.name], Messages(None, None)
        silence_s, loop = self._silence_s or venue.silence_s, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(silence_s) as deadline:
                while True:
                    frame = await socket.recv(decode=False)
                    now = clock.now_ms()
                    deadline.reschedule(loop.time() + silence_s)
                    if not status.connected:
                        # What follows the subscription is recorded; what came before its first answer may be lost.
                        self._put(name, now, lines.gap(name, self._holes[name], now, reason), must=True)
                        status.connected, status.error = True, ""
                    self._holes[name] = status.last_ms = now
                    status.frames += 1
                    await self._keep(venue, socket, messages, now, lines.unpack(frame))
        except TimeoutError:
            raise TimeoutError(f"nothing came for {silence_s:g} s") from None

    async def _keep(self, venue: Venue, socket: ClientConnection, messages: Messages, now: int, text: bytes) -> None:
        status = self.status[venue.name]
        if text in (b"pong", b"ping"):
            if text == b"ping":
                await socket.send("pong")
            return
        message = lines.parse(text)
        self._put(venue.name, now, lines.envelope(now, text, message))
        _, found = (None, []) if message is lines.BROKEN else messages.read(message, now)
        events = sum(isinstance(outcome, Event) for outcome in found)
        status.events += events
        status.rejected += sum(isinstance(outcome, RejectedError) for outcome in found) or not found
        answer = venue.answer(message) if venue.answer else None
        if answer is not None:
            await socket.send(answer)
        elif not events and refusal(message):
            self._told(f"{venue.name} refuses: {text[:_SHOWN].decode(errors='backslashreplace')}")


def _check(
    venues: Sequence[str], symbols: Mapping[str, Sequence[str]], urls: Mapping[str, str], rotate_s: float
) -> None:
    try:
        import websockets  # noqa: F401
    except ImportError:
        raise RecordError("recording needs the library websockets; run pip install 'liqlab[record]'") from None
    if not venues:
        raise RecordError(f"no venue is named; use one or more of {', '.join(VENUES)}")
    for name in venues:
        if name not in VENUES:
            raise RecordError(f"venue {name!r} is not known; use one of {', '.join(VENUES)}")
    for name in (*symbols, *urls):
        if name not in venues:
            raise RecordError(f"symbols or an address are given for {name!r}, which is not among {', '.join(venues)}")
    for name, url in urls.items():
        if not url.startswith(("ws://", "wss://")):
            raise RecordError(f"the address {url!r} of {name} is none of a websocket; it begins with ws:// or wss://")
    for name in symbols:
        if not VENUES[name].chooses:
            raise RecordError(f"{name} has one channel for all symbols; leave its symbols out")
    if rotate_s < 1:
        raise RecordError(f"rotate_s={rotate_s} is too short; use at least 1 second")
