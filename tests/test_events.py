import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from liqlab import events
from liqlab.events import COLUMNS, SIDES, EventError, check, concat, empty, event_table

rows = st.lists(
    st.tuples(
        st.integers(0, 3),  # few times: many ties
        st.sampled_from(["binance", "okx"]),
        st.sampled_from(["BTCUSDT", "1000PEPEUSDT", "BTC-USD-SWAP", "币安人生USDT"]),
        st.sampled_from(SIDES),
        st.floats(1e-8, 1e6),
        st.floats(1e-8, 1e6),
        st.floats(1e-8, 1e9),
    ),
    max_size=30,
)


def build(records) -> pd.DataFrame:
    return event_table(*(list(column) for column in zip(*records, strict=True))) if records else empty()


def records_of(table: pd.DataFrame) -> list[tuple]:
    return list(table.itertuples(index=False, name=None))


@given(rows)
def test_rows_come_back_sorted_and_ties_keep_their_order(records):
    table = build(records)
    assert records_of(table) == sorted(records, key=lambda record: record[0])
    assert list(table.index) == list(range(len(records)))
    assert check(table) is table


@given(st.lists(rows, max_size=5))
def test_concat_is_the_table_of_all_rows(parts):
    tables = [build(part) for part in parts]
    joined = concat(tables)
    in_order = [record for table in tables for record in records_of(table)]
    assert records_of(joined) == sorted(in_order, key=lambda record: record[0])
    assert list(joined.index) == list(range(len(in_order)))
    check(joined)


def test_concat_unites_categories_in_order_of_first_appearance():
    def of(*symbols):
        n = len(symbols)
        ones = np.ones(n)
        return event_table(np.arange(n), ["okx"] * n, pd.Categorical(symbols, list(symbols)), ["buy"] * n, *[ones] * 3)

    joined = concat([of("Z", "B"), of("A", "Z"), of("B", "C")])
    assert list(joined["symbol"].cat.categories) == ["Z", "B", "A", "C"]
    assert list(joined["side"].cat.categories) == list(SIDES)


def test_readers_with_other_string_types_can_be_joined():
    def of(symbols):
        return event_table([1], ["okx"], symbols, ["buy"], [1.0], [1.0], [1.0])

    kinds = [
        ["A"],
        pd.array(["B"], dtype="string[pyarrow]"),
        pd.Categorical.from_codes([0], pd.Index(["C"], dtype="string")),
        np.array(["D"], dtype=object),
        pd.Series(["E"], index=[7]),
    ]
    joined = check(concat(map(of, kinds)))
    assert list(joined["symbol"]) == list("ABCDE")
    assert joined["symbol"].cat.categories.dtype == "str"


def test_concat_leaves_its_parts_alone():
    first, second = build([(2, "okx", "A", "buy", 1.0, 1.0, 1.0)]), build([(1, "okx", "B", "sell", 1.0, 1.0, 1.0)])
    before = first.copy(), second.copy()
    concat([first, second])
    pd.testing.assert_frame_equal(first, before[0])
    pd.testing.assert_frame_equal(second, before[1])


def test_empty_has_the_columns_of_a_full_table():
    full = build([(1, "okx", "A", "buy", 1.0, 2.0, 2.0)])
    assert list(empty().columns) == list(full.columns) == list(COLUMNS)
    assert len(check(empty())) == len(check(concat([]))) == 0
    for name in ("ts_ms", "price", "size", "notional"):
        assert empty()[name].dtype == full[name].dtype


def test_an_event_has_the_columns_of_the_table():
    assert events.Event._fields == COLUMNS


def test_the_sides_have_fixed_codes():
    table = build([(1, "okx", "A", "sell", 1.0, 1.0, 1.0)])
    assert list(table["side"].cat.codes) == [SIDES.index("sell")]


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="same length"):
        event_table([1, 2], ["okx"], ["A"], ["buy"], [1.0], [1.0], [1.0])


def test_a_time_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        event_table([float("nan")], ["okx"], ["A"], ["buy"], [1.0], [1.0], [1.0])


@pytest.fixture
def table():
    return build([(t, "okx", "A", "buy", 1.0 + t, 2.0, 3.0) for t in range(5)])


@pytest.mark.parametrize("name", COLUMNS)
def test_check_misses_a_missing_column(table, name):
    with pytest.raises(EventError, match=f"no column '{name}'.*event_table"):
        check(table.drop(columns=name))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("symbol", "str"),
        ("exchange", "object"),
        ("side", "str"),
        ("ts_ms", "float64"),
        ("ts_ms", "int32"),
        ("ts_ms", "datetime64[ms]"),
        ("price", "float32"),
        ("price", "object"),
        ("size", "int64"),
        ("notional", "str"),
    ],
)
def test_check_refuses_another_dtype(table, name, dtype):
    with pytest.raises(EventError, match=rf"column '{name}' is {dtype.replace('[', '.')[:10]}"):
        check(table.astype({name: dtype}))


@pytest.mark.parametrize("name", ["price", "size", "notional"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_check_names_row_and_value_of_a_bad_number(table, name, value):
    table.loc[3, name] = value
    with pytest.raises(EventError, match=f"column '{name}' holds {value} in row 3"):
        check(table)


def test_check_refuses_rows_out_of_time_order(table):
    with pytest.raises(EventError, match="not in time order"):
        check(table.iloc[::-1])


def test_a_third_side_is_refused_and_a_missing_one_found():
    def of(sides):
        return event_table([1, 2], ["okx"] * 2, ["A"] * 2, sides, [1.0] * 2, [1.0] * 2, [1.0] * 2)

    with pytest.raises(EventError, match="side 'long' is neither"):
        of(["buy", "long"])
    with pytest.raises(EventError, match="'side' has no value in row 1"):
        check(of(["buy", None]))
    assert list(of(pd.Categorical(["sell", "buy"], ["sell", "long", "buy"]))["side"]) == ["sell", "buy"]


def test_check_refuses_sides_with_other_codes(table):
    with pytest.raises(EventError, match="categories"):
        check(table.assign(side=table["side"].cat.set_categories(["sell", "buy"])))
