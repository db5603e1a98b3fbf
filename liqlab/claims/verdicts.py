"""What a claim is, and when it holds."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from liqlab.server import Server
    from liqlab.settings import Settings


class Rule(StrEnum):
    """In which direction a claim may be missed without harm."""

    EXACTLY = "exactly"
    ABOUT = "about"
    AT_MOST = "at most"
    AT_LEAST = "at least"


class Verdict(StrEnum):
    """What a measurement says of a claim."""

    HOLDS = "holds"
    ONLY_WHEN = "holds only when"
    OFF = "off"
    FAILS = "does not hold"
    UNMEASURED = "not measured"


TOLERANCE: Final = {Rule.EXACTLY: 1.01, Rule.ABOUT: 1.1, Rule.AT_MOST: 1.1, Rule.AT_LEAST: 1.1}  # factors
TIMED: Final = 1.5  # the factor for whatever depends on the machine's speed
FAILED: Final = 2.0  # the factor from which on a claim is not off but wrong
# Of these what counts is the rest: 99 % less is ten times as good as 90 % less, and 99 % right as 90 % right.
_RESTS: Final = ("% less", "% right")


@dataclass(frozen=True)
class Found:
    """A measured figure, and what it is in a case that is kinder to the claim.

    Attributes
    ----------
    value : float
        On the feed as it is.
    elsewhere : float or None
        In the kinder case.
    when : str
        What that case is, to be read after "only when".
    """

    value: float
    elsewhere: float | None = None
    when: str = ""


Figure = float | Found | str  # text is the reason why there is none
Probe = Callable[["Bench"], Awaitable[Mapping[str, Figure]]]


@dataclass(frozen=True)
class Claim:
    """One quantitative claim of the original document.

    Attributes
    ----------
    section : str
        Its number there; ``0`` is the executive summary, ``11`` the conclusion.
    text : str
        What is claimed.
    said : str
        The words that hold the figure, verbatim but for white space.
    claimed : float
        The figure.
    unit : str
        Its unit, and that of the measured one. Of ``% less`` and ``% right`` the rest is compared.
    rule : Rule
    how : str
        How it is measured.
    probe : callable
        Measures it, perhaps with others.
    figure : str
        Which of the probe's figures it is.
    timed : bool
        Whether the machine's speed decides.
    """

    section: str
    text: str
    said: str
    claimed: float
    unit: str
    rule: Rule
    how: str
    probe: Probe
    figure: str
    timed: bool = False

    def ratio(self, measured: float) -> float:
        """Return measured / claimed, of the rests where these count; NaN where nothing is claimed to be left."""
        claimed, found = (100 - value if self.unit in _RESTS else value for value in (self.claimed, measured))
        return found / claimed if claimed else math.nan

    def factor(self, measured: float) -> float:
        """Return by which factor the claim is missed: 1 or less where it is not."""
        ratio = self.ratio(measured)
        inverse = 1 / ratio if ratio > 0 else math.inf
        if self.rule in (Rule.EXACTLY, Rule.ABOUT):
            return max(ratio, inverse)
        return ratio if (self.rule is Rule.AT_MOST) != (self.unit in _RESTS) else inverse

    def judge(self, figure: Figure) -> tuple[Verdict, str]:
        """Return the verdict on a figure, and a remark."""
        if isinstance(figure, str):
            return Verdict.UNMEASURED, figure
        found = figure if isinstance(figure, Found) else Found(figure)
        allowed = TIMED if self.timed else TOLERANCE[self.rule]
        factor = self.factor(found.value)
        if factor <= allowed:
            close = self.timed and factor > TOLERANCE[self.rule]
            return Verdict.HOLDS, f"within the factor of {TIMED} that timings are given" if close else ""
        remark = self._off(found.value)
        if found.elsewhere is not None:
            there = f"{number(found.elsewhere)} {self.unit}"
            if self.factor(found.elsewhere) <= allowed:
                return Verdict.ONLY_WHEN, f"{found.when}: {there}"
            remark += f"; {there} when {found.when}"
        return (Verdict.OFF if factor <= FAILED else Verdict.FAILS), remark

    def _off(self, measured: float) -> str:
        ratio = self.ratio(measured)
        if ratio <= 0:
            return "nothing of it"
        what = "what is left is " if self.unit in _RESTS else ""
        return f"{what}{'more' if ratio > 1 else 'less'} by a factor of {number(max(ratio, 1 / ratio))}"


def number(value: float) -> str:
    """Return a figure as a person would write it: three digits that count, whole from a hundred on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Claims:
    """What a measurement found.

    Attributes
    ----------
    table : pandas.DataFrame
        A row a claim, in the document's order: section, claim, said, how, claimed, unit, measured (NaN where there is
        no figure), ratio (measured / claimed; of ``% less`` and ``% right``, of the rests), rule, timed, verdict,
        remark (never empty where there is no figure).
    seconds : float
        Wall time that it took.
    """

    table: pd.DataFrame
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """How many claims have each verdict."""
        found = self.table["verdict"].value_counts()
        return {verdict.value: int(found.get(verdict.value, 0)) for verdict in Verdict}

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers and text, for JSON."""
        rows = self.table.astype(object).where(self.table.notna(), None)
        return {"counts": self.counts, "seconds": self.seconds, "claims": rows.to_dict("records")}

    def _repr_html_(self) -> str:
        return str(self.table.to_html(index=False, float_format=number))


@dataclass(frozen=True)
class Bench:
    """What probes measure with.

    Attributes
    ----------
    server : Server
        A private one; probes flush it.
    redis : redis.asyncio.Redis
        A client of it.
    events, dense : pandas.DataFrame
        The feed, and the ten busiest symbols of it.
    settings : Settings
    """

    server: Server
    redis: Redis
    events: pd.DataFrame
    dense: pd.DataFrame
    settings: Settings
    known: dict[Probe, Mapping[str, Figure]] = field(default_factory=dict)

    async def figures(self, probe: Probe) -> Mapping[str, Figure]:
        """Return what a probe finds on an empty server; it runs once."""
        if probe not in self.known:
            await self.redis.flushall()
            self.known[probe] = await probe(self)
        return self.known[probe]

    async def value(self, probe: Probe, figure: str) -> float:
        """Return a figure that is a number."""
        found = (await self.figures(probe))[figure]
        if isinstance(found, str):
            return math.nan
        return found.value if isinstance(found, Found) else found


def row(claim: Claim, figure: Figure) -> dict[str, Any]:
    """Return a row of `Claims.table`."""
    verdict, remark = claim.judge(figure)
    found = np.nan if isinstance(figure, str) else figure.value if isinstance(figure, Found) else float(figure)
    names = ("section", "said", "how", "claimed", "unit", "timed")
    return {
        "section": claim.section,
        "claim": claim.text,
        **{name: getattr(claim, name) for name in names[1:]},
        "measured": found,
        "ratio": claim.ratio(found),
        "rule": claim.rule.value,
        "verdict": verdict.value,
        "remark": remark,
    }
