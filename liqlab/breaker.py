"""Whether the server shall be sent anything now: closed, half-open or open, as DESIGN.md has it.

Two things open it. **Memory**: half-open above `breaker_half_open` of the server's own maxmemory, open above
`breaker_open`; each is left only `exit_margin` below its entry. **Faults**: a lost connection, or a server that
refuses (out of memory, LOADING, READONLY, ...). `check` looks for both, once every `check_s`; `failed` hears of them
from error replies.

What INFO reports need not show a refusal: the server also counts what a large batch takes while it runs, and a replica
that answers INFO takes no write. After a refusal the breaker therefore stays open for a rest of `check_s`, for twice
that after the next one, and so on up to `MAX_REST` checks; a batch that succeeds ends the row. A connection that is
back needs no rest: the first check that is answered closes the breaker.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from liqlab import clock
from liqlab.cluster import infos
from liqlab.settings import Thresholds

MAX_REST: Final = 8  # checks
KEPT: Final = 256  # transitions

_REFUSALS: Final = (BusyLoadingError, ReadOnlyError, ClusterDownError, MasterDownError)
# redis-py has no classes for these: the message begins with the code.
_REFUSAL_CODES: Final = ("BUSY ", "MISCONF ", "NOREPLICAS ")
_LOST: Final = (RedisConnectionError, RedisTimeoutError, OSError)  # OSError: the built-in TimeoutError too
_log: Final = logging.getLogger(__name__)


class State(StrEnum):
    """What goes through: everything, critical events only, nothing."""

    CLOSED = "closed"
    HALF_OPEN = "half-open"
    OPEN = "open"


@dataclass(frozen=True)
class Transition:
    """One change of state."""

    at_ms: int  # wall time, since the epoch
    old: State
    new: State
    reason: str
    used_ratio: float | None  # used_memory / maxmemory at the last check; None without a limit or a check


class Breaker:
    """Decides what goes to the server.

    Parameters
    ----------
    thresholds : Thresholds
        Fractions of maxmemory: `breaker_half_open`, `breaker_open`, `exit_margin`.
    check_s : float
        Seconds between two checks, and the time that a check waits for its reply.
    on_change : callable, optional
        Is called with every `Transition`, from within `check` or `failed`. What it raises is logged and counted.

    Attributes
    ----------
    state : State
        Closed until something else is known.
    counters : collections.Counter
        ``closed->open`` and the like; ``refused half-open`` and ``refused open`` (answers of `allows`); ``memory``,
        ``connection``, ``refusal`` (faults); ``checks``, ``blind checks`` (answered, but not with numbers),
        ``callback errors``.
    transitions : collections.deque of Transition
        The last `KEPT`.
    used_ratio : float or None
        used_memory / maxmemory at the last check that was answered; None before it, and on a server without a limit.
    """

    def __init__(
        self,
        *,
        thresholds: Thresholds,
        check_s: float = 1.0,
        on_change: Callable[[Transition], None] | None = None,
    ) -> None:
        self.state = State.CLOSED
        self.counters: Counter[str] = Counter()
        self.transitions: deque[Transition] = deque(maxlen=KEPT)
        self.used_ratio: float | None = None
        self._thresholds = thresholds
        self._check_s = check_s
        self._on_change = on_change
        self._checked_s: float | None = None
        self._memory = State.CLOSED  # what memory alone asks for
        self._lost: str | None = None  # why nothing can be sent, until a check is answered
        self._refused: str | None = None  # why nothing shall be sent, until the rest is over
        self._refusals = 0  # since a batch succeeded
        self._rest_until_s = 0.0

    def allows(self, *, critical: bool) -> bool:
        """Return whether an event may be sent; refusals are counted."""
        if self.state is State.CLOSED or (critical and self.state is State.HALF_OPEN):
            return True
        self.counters[f"refused {self.state}"] += 1
        return False

    def due(self) -> bool:
        """Return whether `check_s` has passed since the last check began, in whatever state."""
        return self._checked_s is None or clock.elapsed_s() - self._checked_s >= self._check_s

    async def check(self, redis: Redis) -> State:
        """Ask the server once (INFO memory) and return the new state; nothing that the server does is raised.

        A server that answers, but not with numbers (an ACL without INFO), is taken for a server without a limit: then
        only error replies tell of its memory.
        """
        self._checked_s = clock.elapsed_s()
        self.counters["checks"] += 1
        try:
            async with asyncio.timeout(self._check_s):
                found = [(int(info["used_memory"]), int(info["maxmemory"])) for info in await infos(redis, "memory")]
            used, limit = max(found, key=lambda one: one[0] / one[1] if one[1] else 0.0)  # the fullest node
        except (*_LOST, RedisError, KeyError, TypeError, ValueError) as error:
            if self._opens(error):
                self.failed(error)
                return self.state
            self.counters["blind checks"] += 1
            used, limit = 0, 0
        self._lost = None
        if self._refused is not None and clock.elapsed_s() >= self._rest_until_s:
            self._refused = None
        self.used_ratio = used / limit if limit else None
        self._memory = self._by_memory(used / limit if limit else 0.0)
        shown = f"memory at {self.used_ratio:.1%} of maxmemory" if self.used_ratio is not None else "no memory limit"
        self._settle(shown)
        return self.state

    def failed(self, error: Exception) -> None:
        """Tell of an error that the server, or the way to it, has given; what says nothing about either is ignored."""
        kind = self._opens(error)
        if kind is None:
            return
        self.counters[kind] += 1
        if kind == "connection":
            reason = self._lost = f"connection lost: {_name(error)}"
        else:
            reason = "server out of memory" if kind == "memory" else f"server refuses: {_name(error)}"
            if self._refused is None:  # a second reply of the same moment is not a second try
                rest = min(2**self._refusals, MAX_REST)
                self._refusals = min(self._refusals + 1, MAX_REST)
                self._rest_until_s = clock.elapsed_s() + rest * self._check_s
            self._refused = reason
            if kind == "memory":
                self._memory = State.OPEN  # left below breaker_open - exit_margin, as if INFO had shown it
        self._settle(reason)

    def succeeded(self) -> None:
        """Tell that the server has taken a batch: the next refusal is a first one again. The state stays as it is."""
        self._refusals = 0

    def _opens(self, error: Exception) -> str | None:
        if isinstance(error, OutOfMemoryError):
            return "memory"
        if isinstance(error, _REFUSALS) or (isinstance(error, ResponseError) and str(error).startswith(_REFUSAL_CODES)):
            return "refusal"
        return "connection" if isinstance(error, _LOST) else None

    def _by_memory(self, ratio: float) -> State:
        """Return what memory asks for at `ratio`, coming from `self._memory`."""
        lines = self._thresholds
        if ratio > lines.breaker_open or (
            self._memory is State.OPEN and ratio >= lines.breaker_open - lines.exit_margin
        ):
            return State.OPEN
        if ratio > lines.breaker_half_open or (
            self._memory is not State.CLOSED and ratio >= lines.breaker_half_open - lines.exit_margin
        ):
            return State.HALF_OPEN
        return State.CLOSED

    def _settle(self, reason: str) -> None:
        old = self.state
        self.state = State.OPEN if self._lost or self._refused else self._memory
        if self.state is old:
            return
        change = Transition(clock.now_ms(), old, self.state, reason, self.used_ratio)
        self.transitions.append(change)
        self.counters[f"{old}->{self.state}"] += 1
        if self._on_change is not None:
            try:
                self._on_change(change)
            except Exception:
                self.counters["callback errors"] += 1
                _log.exception("the breaker's on_change failed at %s -> %s", old, self.state)


def _name(error: BaseException) -> str:
    """Name an error without its text, which may hold an address."""
    name = type(error).__name__
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.__cause__ or cause.__context__
    return f"{name} ({cause.strerror})" if cause is not None and cause.strerror else name
