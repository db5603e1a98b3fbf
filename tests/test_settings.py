import json
import os
import pickle
import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from liqlab.settings import FILE, Budget, Settings, SettingsError, changed, load, parse_bytes, setting

DOCS = Path(__file__).parent.parent / "docs" / "settings.md"
SECRET = "hunter2"
URL = f"rediss://liqlab:{SECRET}@example.net:6379/0"


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """A working directory and an environment without any settings."""
    for name in os.environ:
        if name.upper().startswith("LIQLAB_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def leaves(model: type[BaseModel], prefix: str = ""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def value_of(settings: Settings, name: str):
    value = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value


def problem(**overrides) -> str:
    with pytest.raises(SettingsError) as caught:
        load(**overrides)
    return str(caught.value)


# Where values come from


def test_each_source_beats_the_one_below_it(nowhere, monkeypatch):
    default = load().writer.batch_events
    assert default not in (7, 8, 9)
    (nowhere / FILE).write_text("[writer]\nbatch_events = 7\n")
    assert load().writer.batch_events == 7
    monkeypatch.setenv("LIQLAB_WRITER__BATCH_EVENTS", "8")
    assert load().writer.batch_events == 8
    assert load(writer={"batch_events": 9}).writer.batch_events == 9


def test_sources_merge_within_a_section(nowhere, monkeypatch):
    (nowhere / FILE).write_text("shards = 3\n[writer]\nbatch_events = 7\nlayout = 'shared'\n")
    monkeypatch.setenv("LIQLAB_WRITER__BATCH_EVENTS", "8")
    settings = load(writer={"batch_ms": 5})
    assert (settings.shards, settings.writer.layout) == (3, "shared")
    assert (settings.writer.batch_events, settings.writer.batch_ms) == (8, 5.0)
    assert settings.writer.queue_events == Settings.model_fields["writer"].default.queue_events


def test_shares_are_checked_after_merging(nowhere, monkeypatch):
    (nowhere / FILE).write_text("[budget]\nstreams = 0.5\n")
    assert "add to 1.1" in problem()
    monkeypatch.setenv("LIQLAB_BUDGET__BUFFER", "0.02")
    assert load().budget.streams == 0.5


def test_the_file_is_read_from_the_working_directory_only(nowhere, monkeypatch):
    (nowhere / FILE).write_text("shards = 3\n")
    (nowhere / "below").mkdir()
    monkeypatch.chdir(nowhere / "below")
    assert load().shards == 1


def test_a_whole_section_in_the_environment_is_json(monkeypatch):
    monkeypatch.setenv("LIQLAB_WRITER", '{"layout": "shared"}')
    assert load().writer.layout == "shared"
    monkeypatch.setenv("LIQLAB_WRITER", "shared")
    message = problem()
    assert "LIQLAB_WRITER = 'shared'" in message
    assert "LIQLAB_WRITER__" in message


def test_contract_sizes_keep_the_case_of_their_symbols(nowhere, monkeypatch):
    monkeypatch.setenv("LIQLAB_FEEDS__CONTRACT_SIZES", json.dumps({"htx:sol-usdt": 1, "okx:BTC-USD-SWAP": 100}))
    assert load().feeds.contract_sizes == {"htx:sol-usdt": 1.0, "okx:BTC-USD-SWAP": 100.0}
    # pydantic-settings would fold the case of this one, and the size would never be found.
    monkeypatch.setenv("LIQLAB_FEEDS__CONTRACT_SIZES__BTCUSDT", "1")
    assert "did you mean LIQLAB_FEEDS__CONTRACT_SIZES?" in problem()


def test_settings_do_not_change_after_loading():
    settings = load()
    with pytest.raises(ValueError, match="frozen"):
        settings.shards = 2
    with pytest.raises(ValueError, match="frozen"):
        settings.writer.layout = "shared"
    assert pickle.loads(pickle.dumps(settings)) == settings


# What is refused, and how


@pytest.mark.parametrize(
    ("overrides", "name", "value", "allowed"),
    [
        ({"shards": 0}, "shards", "0", "greater than or equal to 1"),
        ({"shards": 1025}, "shards", "1025", "less than or equal to 1024"),
        ({"budget": {"streams": 1.5}}, "budget.streams", "1.5", "less than or equal to 1"),
        ({"budget": {"streams": "much"}}, "budget.streams", "'much'", "number"),
        ({"writer": {"layout": "both"}}, "writer.layout", "'both'", "'shared', 'per_symbol' or 'hybrid'"),
        ({"writer": {"batch_events": 20_001}}, "writer.batch_events", "20001", "20000"),
        ({"writer": {"batch_ms": "inf"}}, "writer.batch_ms", "'inf'", "finite"),
        ({"writer": {"batch_ms": 0}}, "writer.batch_ms", "0", "greater than 0"),
        ({"server": {"maxmemory": "240xb"}}, "server.maxmemory", "'240xb'", "b, k, kb, m, mb, g, gb"),
        ({"server": {"maxmemory": "9" * 400}}, "server.maxmemory", "999", "number of bytes"),
        ({"server": {"maxmemory": "1mb"}}, "server.maxmemory", "'1mb'", "at least 4mb"),
        ({"server": {"maxmemory_policy": "allkeys-lru"}}, "server.maxmemory_policy", "'allkeys-lru'", "noeviction"),
        ({"thresholds": {"trim": 0.95}}, "thresholds", "trim 0.95", "trim 0.95 < halve"),
        ({"thresholds": {"breaker_open": 0.5}}, "thresholds", "breaker_open 0.5", "breaker_half_open 0.9 <"),
        ({"retention": {"vwap_s": -1}}, "retention.vwap_s", "-1", "greater than 0"),
        ({"feeds": {"contract_sizes": {"X": 0}}}, "feeds.contract_sizes.X", "0", "greater than 0"),
        ({"writer": 3}, "writer", "3", "dictionary"),
    ],
)
def test_a_bad_setting_names_itself_its_value_and_what_is_allowed(overrides, name, value, allowed):
    message = problem(**overrides)
    assert message.startswith(name)
    assert value in message
    assert allowed in message


def test_every_bad_setting_gets_its_line():
    lines = problem(shards=0, writer={"layout": "both", "batch_ms": -1}).splitlines()
    assert sorted(line.split(" ")[0] for line in lines) == ["shards", "writer.batch_ms", "writer.layout"]


def test_unknown_settings_suggest_a_known_one(nowhere, monkeypatch):
    assert problem(shrads=2) == "shrads: no such setting; did you mean shards?"
    assert "did you mean writer.batch_ms?" in problem(writer={"batch_msec": 2})
    assert "see docs/settings.md" in problem(qqqqqqqq=2)
    (nowhere / FILE).write_text("[retention]\nvwap_seconds = 3\n")
    assert problem().startswith("retention.vwap_seconds: no such setting; did you mean retention.vwap_s?")
    (nowhere / FILE).unlink()
    monkeypatch.setenv("LIQLAB_SERVER__MAXMEM", "10mb")
    assert problem() == "LIQLAB_SERVER__MAXMEM: no such setting; did you mean LIQLAB_SERVER__MAXMEMORY?"


def test_a_variable_in_lower_case_is_a_setting_too(monkeypatch):
    monkeypatch.setenv("liqlab_shards", "2")
    assert load().shards == 2
    monkeypatch.setenv("liqlab_shrads", "2")
    assert "liqlab_shrads: no such setting" in problem()


def test_other_programs_variables_are_left_alone(monkeypatch):
    monkeypatch.setenv("LIQLABEL_SHARDS", "2")
    assert load().shards == 1


def test_a_broken_file_is_named(nowhere):
    (nowhere / FILE).write_text("[budget\n")
    assert problem().startswith(f"{FILE}: ")
    (nowhere / FILE).write_bytes(b"\xff\xfe")
    assert problem().startswith(f"{FILE}: ")


def test_the_secret_is_in_the_value_only(nowhere, monkeypatch):
    monkeypatch.setenv("LIQLAB_REDIS_URL", URL)
    settings = load()
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == URL
    for text in (repr(settings), str(settings), settings.model_dump_json(), repr(settings.model_dump())):
        assert SECRET not in text


@pytest.mark.parametrize("bad", [[URL], {"url": URL}, URL.encode("utf-16")])
def test_errors_do_not_show_the_secret(bad, nowhere, monkeypatch):
    message = problem(redis_url=bad)
    assert message.startswith("redis_url: ")
    assert SECRET not in message
    (nowhere / FILE).write_text(f'redis_url = ["{URL}"]\n')
    assert SECRET not in problem()
    (nowhere / FILE).write_text(f'redis_url = "{URL}" oops\n')
    assert SECRET not in problem()
    (nowhere / FILE).unlink()
    for name in ("LIQLAB_REDSI_URL", "LIQLAB_REDIS_URL__X"):
        monkeypatch.setenv(name, URL)
        assert SECRET not in problem()
        monkeypatch.delenv(name)
    assert SECRET not in problem(redis_ulr=URL)
    assert SECRET not in problem(redis_url=URL, shards=0)


# Rules


@given(st.lists(st.integers(0, 1000), min_size=5, max_size=5), st.sampled_from([-1.0, -0.01, -1e-6, 1e-6, 0.01, 1.0]))
def test_shares_add_to_one_or_are_refused(parts, off):
    total = sum(parts) + 1
    shares = {name: part / total for name, part in zip(Budget.model_fields, [*parts, 1], strict=True)}
    assert load(budget=shares).budget.model_dump() == shares
    assert problem(budget=shares | {"buffer": shares["buffer"] + off}).startswith("budget")


def test_default_shares_add_to_one():
    assert sum(load().budget.model_dump().values()) == pytest.approx(1, abs=1e-12)


@given(st.integers(0, 10**15 - 1))
def test_plain_numbers_are_bytes(count):
    assert parse_bytes(str(count)) == parse_bytes(f" {count} B ") == count


@given(st.integers(0, 10**6))
def test_units_are_those_of_redis_conf(count):
    for unit, factor in {"k": 10**3, "kb": 2**10, "m": 10**6, "mb": 2**20, "g": 10**9, "gb": 2**30}.items():
        assert parse_bytes(f"{count}{unit}") == parse_bytes(f"{count} {unit.upper()}") == count * factor


@given(st.text(alphabet=string.printable, max_size=12))
def test_text_is_either_bytes_or_refused(text):
    try:
        assert isinstance(parse_bytes(text), int)
    except ValueError as error:
        assert "240mb" in str(error)  # noqa: PT017


# docs/settings.md


def documented() -> dict[str, tuple[str, str]]:
    """Each row's variable and default, by setting."""
    rows = re.findall(r"^\| `([a-z_0-9.]+)` \| `(LIQLAB_\w+)` \| (.+?) \|", DOCS.read_text(), re.MULTILINE)
    return {name: (variable, default.strip("`")) for name, variable, default in rows}


def test_every_setting_is_documented_and_nothing_else():
    assert list(documented()) == list(leaves(Settings))


def test_the_documented_defaults_are_the_defaults(nowhere):
    plain = load()
    rows = {name: default for name, (_, default) in documented().items()}
    for name in [name for name, default in rows.items() if default == "not set"]:
        assert value_of(plain, name) is None
        del rows[name]
    # The column is TOML: put together it is a settings file that changes nothing.
    (nowhere / FILE).write_text("".join(f"{name} = {default}\n" for name, default in rows.items()))
    assert load() == plain


def test_the_documented_variables_are_read(monkeypatch):
    plain = load()
    for name, (variable, default) in documented().items():
        assert variable == "LIQLAB_" + name.upper().replace(".", "__")
        if default != "not set":
            monkeypatch.setenv(variable, default.strip('"'))
    assert load() == plain


def test_the_documented_examples_hold(nowhere):
    text = DOCS.read_text()
    (nowhere / FILE).write_text(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])
    assert load().feeds.contract_sizes == {"okx:BTC-USD-SWAP": 100.0}
    assert f"\n    {problem(writer={'layout': 'both'})}\n" in text


def test_some_settings_are_changed_and_the_rest_stay() -> None:
    base = load(retention={"hot_s": 60})
    other = changed(base, {"writer.layout": "hybrid", "retention.vwap_s": 5, "shards": 3})
    assert (other.writer.layout, other.retention.vwap_s, other.retention.hot_s, other.shards) == ("hybrid", 5, 60, 3)
    assert base.writer.layout == "shared"
    assert setting(other, "writer.layout") == "hybrid"
    assert setting(other, "shards") == 3
    # Of one section together: what must hold of them all is asked of the result.
    shares = changed(base, {"budget.streams": 0.5, "budget.vwap": 0.0}).budget
    assert sum(shares.model_dump().values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"writer.layot": "shared"}, r"writer\.layot: no such setting; did you mean writer\.layout\?"),
        ({"writer.layout": "odd"}, r"writer\.layout = 'odd': input should be"),
        ({"retention.hot_s": -1}, r"retention\.hot_s = -1: "),
        ({"shards": 0}, r"shards = 0: "),
        ({"budget.streams": 0.9}, r"budget: the six shares add to 1\.5"),
    ],
)
def test_a_change_that_is_not_acceptable_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        changed(load(), changes)
