import asyncio
import json
import math
import re
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import liqlab
from liqlab import claims, plots
from liqlab.claims import CLAIMS, Claim, Claims, Found, Rule, Verdict, running
from liqlab.claims.verdicts import row
from liqlab.codecs import CODECS, Names
from liqlab.events import Columns, EventError
from liqlab.server import serve, tdigest_module

DOCUMENT = Path(__file__).resolve().parents[2] / "shared" / "original-design.md"
# Figures that the document does not write out: ratios of its own, a count of directives, the sum of shares.
DERIVED = {"MessagePack parses faster", "struct parses faster", "directives set at runtime, of 22", "all shares"}
WITHIN_S = 60  # of two slow cores


@pytest.fixture(scope="module")
def events() -> pd.DataFrame:
    return liqlab.synth("normal", hours=3, seed=5)


@pytest.fixture(scope="module")
def steps() -> list[tuple[int, int]]:
    return []


@pytest.fixture(scope="module")
def left() -> dict[str, object]:
    """What the server's configuration was before the measurement and is after it, and how many keys it has then."""
    return {}


@pytest.fixture(scope="module")
def found(events, steps, left) -> Claims:
    async def measured() -> Claims:
        async with server.connect() as redis:
            left["before"] = await redis.config_get("*")
            done = await claims.measure(server, events, progress=lambda *step: steps.append(step))
            left["after"], left["keys"] = await redis.config_get("*"), await redis.dbsize()
            return done

    with serve(tdigest=tdigest_module() is not None) as server:
        return asyncio.run(measured())


def figure(found: Claims, said: str, claim: str = "") -> float:
    part = found.table[(found.table["said"] == said) & found.table["claim"].str.contains(claim, regex=False)]
    return float(part["measured"].iloc[0])


# The table


def document() -> str:
    if not DOCUMENT.is_file():
        pytest.skip("the original document is not on this machine (../shared/original-design.md)")
    return " ".join(DOCUMENT.read_text().split())


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.section}: {claim.text}")
def test_the_document_says_what_a_claim_says(claim: Claim):
    assert " ".join(claim.said.split()) in document()
    if claim.text not in DERIVED:
        assert any(math.isclose(claim.claimed, one) for one in figures_in(claim.said)), claim


def figures_in(text: str) -> list[float]:
    numbers = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]
    # A ratio is a percentage, an hour 3,600 seconds, a MB 1,000 KB, a second 1,000 ms.
    return [number * scale for number in numbers for scale in (1, 100, 1_000, 3_600)]


def test_every_section_with_figures_has_claims():
    document()
    sections = re.split(r"^## ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]
    numbered = {}
    for at, section in enumerate(sections):
        head, _, body = section.partition("\n")
        number = re.match(r"(\d+)\.", head)
        numbered[number[1] if number else "0" if at == 0 else "11"] = body
    wanted = {name for name, body in numbered.items() if re.search(r"\d", body)}
    assert wanted == {claim.section for claim in CLAIMS} == set(claims.SECTIONS)


def test_no_claim_stands_twice():
    rows = [(claim.section, claim.text, claim.said, claim.figure) for claim in CLAIMS]
    assert len(set(rows)) == len(rows)


# The verdicts


def claim(rule: Rule, claimed: float = 10, unit: str = "bytes", *, timed: bool = False) -> Claim:
    return Claim("1", "one", "10 bytes", claimed, unit, rule, "so", running.beyond, "x", timed=timed)


@pytest.mark.parametrize(
    ("rule", "unit", "measured", "verdict"),
    [
        (Rule.AT_MOST, "bytes", 1, "holds"),
        (Rule.AT_MOST, "bytes", 10.9, "holds"),
        (Rule.AT_MOST, "bytes", 11.5, "off"),
        (Rule.AT_MOST, "bytes", 20.5, "does not hold"),
        (Rule.AT_LEAST, "times", 9.2, "holds"),
        (Rule.AT_LEAST, "times", 900, "holds"),
        (Rule.AT_LEAST, "times", 6, "off"),
        (Rule.AT_LEAST, "times", 4.9, "does not hold"),
        (Rule.AT_LEAST, "times", 0, "does not hold"),
        (Rule.ABOUT, "bytes", 9.2, "holds"),
        (Rule.ABOUT, "bytes", 8, "off"),
        (Rule.ABOUT, "bytes", 30, "does not hold"),
        (Rule.EXACTLY, "bytes", 10.05, "holds"),
        (Rule.EXACTLY, "bytes", 10.2, "off"),
        (Rule.AT_LEAST, "% less", 2, "holds"),
        (Rule.AT_LEAST, "% less", 99, "holds"),
        (Rule.AT_LEAST, "% less", -30, "off"),
        (Rule.AT_LEAST, "% right", -400, "does not hold"),
    ],
)
def test_a_verdict_is_a_matter_of_the_rule(rule, unit, measured, verdict):
    said, remark = claim(rule, unit=unit).judge(measured)
    assert said == verdict
    assert bool(remark) == (verdict != "holds")


def test_of_a_saving_what_is_left_counts():
    assert claim(Rule.AT_LEAST, 95, "% right").ratio(90) == pytest.approx(2)
    assert claim(Rule.AT_LEAST, 95, "times").ratio(90) == pytest.approx(90 / 95)


def test_timings_are_given_more():
    assert claim(Rule.AT_MOST).judge(14)[0] is Verdict.OFF
    verdict, remark = claim(Rule.AT_MOST, timed=True).judge(14)
    assert verdict is Verdict.HOLDS
    assert "1.5" in remark
    assert claim(Rule.AT_MOST, timed=True).judge(9) == (Verdict.HOLDS, "")


def test_a_kinder_case_is_named():
    one = claim(Rule.AT_MOST)
    assert one.judge(Found(40, 9, "it is quiet")) == (Verdict.ONLY_WHEN, "it is quiet: 9 bytes")
    assert one.judge(Found(9, 40, "it is quiet")) == (Verdict.HOLDS, "")
    verdict, remark = one.judge(Found(40, 30, "it is quiet"))
    assert verdict is Verdict.FAILS
    assert remark == "more by a factor of 4; 30 bytes when it is quiet"


def test_what_is_not_measured_says_why():
    one = row(claim(Rule.ABOUT), "no such machine")
    assert one["verdict"] == "not measured"
    assert one["remark"] == "no such machine"
    assert np.isnan(one["measured"])


async def test_a_feed_without_events_is_refused(default_server, events):
    with pytest.raises(EventError, match="the feed holds no event"):
        await claims.measure(default_server, events.head(0))


# What is measured


def test_every_claim_has_a_figure_or_a_reason(found):
    table = found.table
    assert len(table) == len(CLAIMS)
    without = table["measured"].isna()
    assert (table["verdict"][without] == "not measured").all()
    assert (table["remark"][without].str.len() > 10).all()
    assert not (table["verdict"][~without] == "not measured").any()
    allowed = 4 if tdigest_module() is not None else 7
    assert without.sum() <= allowed, table[without]
    assert np.isfinite(table["measured"][~without]).all()


def test_counts_and_json_say_the_same(found):
    assert sum(found.counts.values()) == len(found.table)
    assert found.counts["holds"] == (found.table["verdict"] == "holds").sum()
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["counts"] == found.counts
    assert len(plain["claims"]) == len(CLAIMS)


def test_it_tells_how_far_it_is(found, steps):
    done, total = steps[-1]
    assert done == total == len({claim.probe for claim in CLAIMS})
    assert [step for step, _ in steps] == list(range(1, total + 1))
    assert found.seconds < WITHIN_S


def test_lengths_are_those_of_the_codecs(found, events):
    columns = Columns.of(events.head(20_000))
    sizes = {}
    for codec in ("json", "msgpack"):
        rows = CODECS[codec].encode(columns, Names())
        sizes[codec] = sum(len(value) for (value,) in rows) / len(rows)
    assert figure(found, "Total: ~96 bytes per event") == pytest.approx(sizes["json"])
    assert figure(found, "Size: 62 bytes (35% reduction)", "against") == pytest.approx(
        100 - 100 * sizes["msgpack"] / sizes["json"]
    )
    assert figure(found, "Total: 19 bytes") == struct.calcsize("!4sBfffH")


def test_rates_are_those_of_the_feed(found, events):
    times = events["ts_ms"].to_numpy()
    inside = [int(((times > end - 900_000) & (times <= end)).sum()) for end in times[::50]]
    assert figure(found, "1,500 events in 15 min") >= max(inside)
    assert figure(found, "1,500 events in 15 min") <= max(inside) + 50


async def test_what_a_sorted_set_takes_is_what_the_server_grows_by(found, events, default_redis):
    before = int((await default_redis.info("memory"))["used_memory"])
    for symbol, part in events.groupby("symbol", observed=True):
        rows = CODECS["json"].encode(Columns.of(part), Names())
        members = {value: float(ms) for (value,), ms in zip(rows, part["ts_ms"], strict=True)}
        await default_redis.zadd(f"liquidations:{symbol}", members)
    grown = int((await default_redis.info("memory"))["used_memory"]) - before
    assert figure(found, "Total per Event: ~176 bytes") == pytest.approx(grown / len(events), rel=0.05)


async def test_a_hyperloglog_is_measured_as_the_server_does(found, events, default_redis):
    await default_redis.pfadd("temp:one", *events["symbol"].unique().tolist())
    expected = int(await default_redis.memory_usage("temp:one") or 0) / 1024
    assert figure(found, "Fixed 12KB memory regardless of cardinality") == pytest.approx(expected, abs=0.2)


def test_what_was_found_wrong_is_wrong(found):
    verdicts = dict(zip(found.table["said"], found.table["verdict"], strict=True))
    assert verdicts["hours=24"] == "does not hold"
    assert figure(found, "hours=24") == 2
    assert figure(found, "<timestamp:4>") == 8
    assert figure(found, "3: 2, # TCP_KEEPCNT") == 0
    assert figure(found, "'databases': '2', # Reduce from default 16") == 20
    assert figure(found, "remove 50% oldest data") == 0
    assert verdicts["Total: 19 bytes"] == verdicts["'zset-max-ziplist-entries': '128'"] == "holds"
    assert verdicts["used_pct > 0.90"] == verdicts["usage_ratio > 0.75"] == "holds"


@pytest.mark.usefixtures("found")
def test_the_server_is_left_as_it_was(left):
    assert left["before"] == left["after"]
    assert left["keys"] == 0


# The picture


def test_the_picture_has_a_row_for_what_does_not_hold(found):
    drawn = plots.claims(found)
    labels = drawn.layout.yaxis.ticktext
    wrong = found.table[found.table["verdict"] != "holds"]
    assert set(wrong["claim"]) <= set(labels)
    assert all(f"<b>{name}</b>" in labels for name in claims.SECTIONS.values())
    assert sum(len(trace.x) for trace in drawn.data) == len(found.table)
    assert {trace.name for trace in drawn.data} == {verdict.value for verdict in Verdict}
    held = found.counts["holds"]
    assert drawn.layout.title.text.startswith(f"{held} of {len(CLAIMS)} claims hold")
    assert f"{held} holds" in drawn.layout.title.subtitle.text
    for trace in drawn.data:
        assert (np.array(trace.x) >= 0.01).all()
        assert (np.array(trace.x) <= 100).all()
        assert trace.name in ("holds", "not measured") or all(trace.text), "a ratio beside each mark"


def test_the_picture_of_nothing_says_so(found):
    assert plots.claims(Claims(found.table.head(0), 0.0)).layout.title.text == "No claims to compare"
