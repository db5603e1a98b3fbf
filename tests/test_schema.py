import doctest
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liqlab import schema
from liqlab.clock import HOUR_MS, MINUTE_MS
from liqlab.schema import BY_NAME, FAMILIES, family_of, shard_of
from liqlab.settings import Budget, Settings

DOCS = Path(__file__).parent.parent / "docs" / "schema.md"

symbols = st.one_of(
    st.sampled_from(["BTCUSDT", "BTC-USD-SWAP", "tBTCF0:USTF0", "币安人生USDT", "A:buy", "5", "{3}", "1h", "old:x"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
)
shards = st.none() | st.integers(0, 1023)
families = st.sampled_from(FAMILIES)


def key_of(family: schema.Family, symbol: str, side: str, bucket: int, shard: int | None) -> str:
    # The star stands for whatever its family wants there.
    return family.key(symbol, side=side, bucket=bucket, shard=shard).replace(":*", f":{symbol}")


@given(families, symbols, st.sampled_from(["buy", "sell"]), st.integers(0, 10**7), shards)
def test_every_key_belongs_to_its_family_and_to_no_other(family, symbol, side, bucket, shard):
    key = key_of(family, symbol, side, bucket, shard)
    assert family_of(key) is family
    assert [other.name for other in FAMILIES if other.regex.fullmatch(key)] == [family.name]


@given(families, symbols, symbols, st.integers(0, 10**7), shards)
def test_symbols_do_not_share_keys(family, one, other, bucket, shard):
    if "SYMBOL" in family.pattern and one != other:
        assert family.key(one, side="buy", bucket=bucket, shard=shard) != family.key(
            other, side="buy", bucket=bucket, shard=shard
        )


@given(families, symbols, st.integers(0, 10**7), st.integers(0, 1023))
def test_the_shard_is_the_first_tag_of_a_key(family, symbol, bucket, shard):
    # Redis hashes what stands between the first opening and the next closing brace.
    key = key_of(family, symbol, "buy", bucket, shard)
    assert re.search(r"\{(.+?)\}", key)[1] == str(shard)


def test_shared_streams_have_no_symbol():
    for name in ("events", "blocks"):
        family = BY_NAME[name]
        assert family.key() == family.pattern.removesuffix(":SYMBOL")
        assert family_of(family.key()) is family_of(family.key(shard=5)) is family


def test_names_on_one_node_are_the_originals():
    assert BY_NAME["events"].key("BTCUSDT") == "liq:BTCUSDT"
    assert BY_NAME["events"].key("BTCUSDT", shard=3) == "liq:{3}:BTCUSDT"
    assert BY_NAME["percentile"].key("BTCUSDT", bucket=472) == "size:BTCUSDT:472"
    assert BY_NAME["cooldown"].key("BTCUSDT", side="buy") == "alert:BTCUSDT:buy"
    assert BY_NAME["unique_symbols"].key(shard=0) == "unique_symbols:{0}:1h"


@pytest.mark.parametrize(
    "key", ["", "liq:", "liqX", "liquid:BTC", "size:BTC", "size:BTC:x", "alert:BTC", "session:1", "vwap", "xliq:BTC"]
)
def test_foreign_keys_have_no_family(key):
    assert family_of(key) is None


def test_names_are_unique_and_shares_are_those_of_the_budget():
    assert len(BY_NAME) == len(FAMILIES)
    assert set(schema.SHARES) == set(Budget.model_fields)
    assert {family.share for family in FAMILIES} == set(schema.SHARES) - {"buffer"}


def test_buckets_have_a_width_and_only_they():
    for family in FAMILIES:
        assert (family.bucket_ms > 0) == ("BUCKET" in family.pattern)
    assert BY_NAME["candle"].bucket_ms == MINUTE_MS
    assert BY_NAME["percentile"].bucket_ms == BY_NAME["candle_1h"].bucket_ms == HOUR_MS


# Lifetimes


@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_a_percentile_bucket_outlives_its_window_by_one_bucket(window_s, bucket_s):
    settings = Settings(retention={"percentile_window_s": window_s, "percentile_bucket_s": bucket_s})
    assert BY_NAME["percentile"].ttl_s(settings) == window_s + bucket_s


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_lifetime_follows_its_setting(family):
    if family.ttl is None:
        assert family.ttl_s(Settings()) is None
        return
    longer = Settings(retention={family.ttl: 10**6})
    assert family.ttl_s(longer) - family.ttl_s(Settings()) == 10**6 - getattr(Settings().retention, family.ttl)


def test_only_critical_families_live_for_ever():
    # volatile-ttl evicts nothing without a TTL: whatever else had none would grow until writes fail.
    assert {family.name for family in FAMILIES if family.ttl is None} == {"names", "position", "limits"}
    assert {family.name for family in FAMILIES if family.critical} == {"names", "position", "signal", "limits", "lock"}


# Shards


def test_shards_are_crc32():
    assert zlib.crc32(b"123456789") == 0xCBF43926  # the check value of CRC-32/ISO-HDLC
    assert shard_of("123456789", 1024) == 0xCBF43926 % 1024
    assert shard_of("币安", 7) == zlib.crc32("币安".encode()) % 7


def test_one_shard_is_none():
    assert shard_of("BTCUSDT", 1) is None


@given(symbols, st.integers(2, 1024))
def test_a_shard_is_below_the_number_of_shards(symbol, count):
    assert 0 <= shard_of(symbol, count) < count


def test_shards_are_the_same_in_every_process():
    code = "from liqlab.schema import shard_of; print([shard_of(f'S{i}USDT', 16) for i in range(50)])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str([shard_of(f"S{i}USDT", 16) for i in range(50)])


def test_shards_are_spread_evenly():
    counts = [0] * 8
    for i in range(4000):
        counts[shard_of(f"{i}USDT", 8)] += 1
    assert min(counts) > 400
    assert max(counts) < 600


# The table


def markdown() -> list[str]:
    frame = schema.table(Settings())
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
    for row in frame.astype(object).where(frame.notna(), None).itertuples(index=False):
        cells = {
            "key": f"`{row.key}`",
            "type": row.type.replace("|", ", "),
            "ttl_s": "-" if row.ttl_s is None else str(row.ttl_s),
            "critical": "yes" if row.critical else "",
        }
        lines.append("| " + " | ".join(str(cells.get(name, getattr(row, name))) for name in frame.columns) + " |")
    return lines


def test_the_documented_table_is_the_table():
    written = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    assert written == markdown(), "put these lines into docs/schema.md:\n" + "\n".join(markdown())


def test_the_documented_example_runs():
    text = DOCS.read_text().replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, {}, DOCS.name, str(DOCS), 0)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_table_has_a_row_a_family():
    frame = schema.table(Settings())
    assert list(frame["family"]) == [family.name for family in FAMILIES]
    assert frame["ttl_s"].isna().sum() == 3
    assert (frame["ttl_s"].dropna() > 0).all()


def test_a_single_shard_has_no_tag():
    assert list(schema.shards_of(Settings())) == [None]
    assert list(schema.shards_of(Settings(shards=3))) == [0, 1, 2]
