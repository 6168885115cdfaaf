"""Data as shops and warehouses export it: read rightly, or refused in words; what is not for sale is never shown."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.arrays import pc
from features.catalog_columns import columns_of
from features.errors import TablesError
from features.tables.dataset import Dataset, LoadedTable, conform, open_dataset, read_table
from features.tables.files import find_files, table_path
from features.tables.intake import lines
from features.tables.schema import EVENTS, EVENTS_REQUIRED, ITEMS, ITEMS_REQUIRED
from features.tables.written import MISSING_WORDS, ListStyle
from training.data.interactions import item_vocabulary

NOON = 1_600_000_000_000
TOPICS = ("Tea", "Bikes", "Garden", "Lamps")
ITEM_COUNT = 12
EVENT_COUNT = 60
SOLD_OUT = [n % 2 == 1 for n in range(ITEM_COUNT)]


def shop_events() -> list[dict[str, Any]]:
    return [
        {
            "user_id": f"p{n % 7}",
            "item_id": f"g{n % ITEM_COUNT}",
            "event_type": "view_item",
            "timestamp": NOON + n * 1000,
        }
        for n in range(EVENT_COUNT)
    ]


def shop(folder: Path, *, events: dict[str, Any] | None = None, **items: Any) -> Dataset:
    """A data set of a small shop with some of its columns replaced, read."""
    rows = pa.Table.from_pylist(shop_events())
    for name, values in (events or {}).items():
        at = rows.schema.get_field_index(name)
        rows = rows.append_column(name, values) if at < 0 else rows.set_column(at, name, values)
    goods = {"item_id": [f"g{n}" for n in range(ITEM_COUNT)]} | items
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, folder / "events.parquet")
    pq.write_table(pa.table(goods), folder / "items.parquet")
    return open_dataset(folder)


def items(**columns: Any) -> LoadedTable:
    length = len(next(iter(columns.values())))
    return conform(pa.table({"item_id": [f"g{n}" for n in range(length)]} | columns), ITEMS, ITEMS_REQUIRED, "f")


def shown(loaded: LoadedTable | Dataset, now_ms: int = 1_700_000_000_000) -> list[bool]:
    """The items that a catalogue made of the table may show."""
    table = loaded.items if isinstance(loaded, Dataset) else loaded.table
    available = table["available"].to_pylist()
    begins, ends = table["available_from"].to_pylist(), table["available_until"].to_pylist()
    return [
        a is not False and (b or 0) <= now_ms and (e is None or now_ms < e)
        for a, b, e in zip(available, begins, ends, strict=True)
    ]


# --------------------------------------------------------------------------------------- when an item may be shown


@pytest.mark.parametrize(
    "ends",
    [
        pa.array([253_402_300_799] * (ITEM_COUNT - 1) + [1_930_000_000]),
        pa.array([253_402_300_799_000] * (ITEM_COUNT - 1) + [1_930_000_000_000]),
        pa.array([253_402_300_799_000_000] * (ITEM_COUNT - 1) + [1_930_000_000_000_000]),
        pa.array([253_402_300_799.0] * (ITEM_COUNT - 1) + [1_930_000_000.0]),
        pa.array([2**63 - 1] * (ITEM_COUNT - 1) + [1_930_000_000_000_000_000]),
        pa.array([99_991_231] * (ITEM_COUNT - 1) + [20_310_227]),
        pa.array(["9999-12-31"] * (ITEM_COUNT - 1) + ["2031-02-28T00:06:40+01:00"]),
        pa.array(["9999-12-31T23:59:59.999999Z"] * (ITEM_COUNT - 1) + ["1930000000000"]),
        pa.array([253_402_300_799] * (ITEM_COUNT - 1) + [1_930_000_000], pa.timestamp("s")),
        pa.array([253_402_300_799_000] * (ITEM_COUNT - 1) + [1_930_000_000_000], pa.timestamp("ms", "Europe/Berlin")),
        pa.array([dt.date(9999, 12, 31)] * (ITEM_COUNT - 1) + [dt.date(2031, 2, 27)], pa.date32()),
        pa.array([dt.date(9999, 12, 31)] * (ITEM_COUNT - 1) + [dt.date(2031, 2, 27)], pa.date64()),
        pa.array([decimal.Decimal(253_402_300_799)] * (ITEM_COUNT - 1) + [decimal.Decimal(1_930_000_000)]),
    ],
    ids=lambda ends: str(ends.type),
)
def test_an_end_in_9999_is_no_end_in_any_unit_or_type(tmp_path: Path, ends: Any) -> None:
    data = shop(tmp_path, available_until=ends)
    read = data.items["available_until"].to_pylist()
    assert read[:-1] == [None] * (ITEM_COUNT - 1)
    assert read[-1] // 86_400_000 == 1_930_000_000_000 // 86_400_000
    assert all(shown(data))
    assert (data.rejected, data.unread) == ([], [])


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
def test_a_column_of_ends_in_9999_only_hides_nothing(tmp_path: Path, unit: Any) -> None:
    per = {"s": 1, "ms": 1000, "us": 10**6}[unit]
    numbers = pa.array([253_402_300_799 * per] * ITEM_COUNT)
    typed = pa.array([253_402_300_799 * per] * ITEM_COUNT, pa.timestamp(unit))
    for name, ends in (("numbers", numbers), ("typed", typed)):
        data = shop(tmp_path / name, available_until=ends, available=pa.array([not sold for sold in SOLD_OUT]))
        assert data.items.num_rows == ITEM_COUNT
        assert shown(data) == [not sold for sold in SOLD_OUT]
        assert (data.rejected, data.unread) == ([], [])


@pytest.mark.parametrize(
    "ends",
    [
        pa.array([0] * ITEM_COUNT),
        pa.array([0.0] * ITEM_COUNT),
        pa.array(["0"] * ITEM_COUNT),
        pa.array([0] * ITEM_COUNT, pa.timestamp("us")),
    ],
    ids=lambda ends: str(ends.type),
)
def test_an_end_at_zero_is_none_as_in_the_contract(tmp_path: Path, ends: Any) -> None:
    data = shop(tmp_path, available_until=ends, available_from=ends)
    assert all(shown(data))
    columns = columns_of(data.items, np.zeros((ITEM_COUNT, 2), np.float32))
    assert columns.available_until.min() > 4_000_000_000_000


@pytest.mark.parametrize(
    ("column", "cells", "may_be_shown"),
    [
        ("available", ["yes", "no", "perhaps", None, ""], [True, False, False, True, True]),
        ("available", ["In stock", "out_of_stock", "Y", "f", "2"], [True, False, True, False, False]),
        ("available", [1.0, 0.0, 0.5, None, math.nan], [True, False, False, True, True]),
        ("available_from", [NOON, 4_102_444_800_000, -1, 0, None], [True, False, False, True, True]),
        ("available_from", ["2020-09-13", "9999-12-31", "soon", "0", ""], [True, False, False, True, True]),
        ("available_from", ["0001-01-01", "1900-01-01T00:00:00Z", "-5", "0", "soon"], [True, True, False, True, False]),
        ("available_until", [1_900_000_000_000, NOON, -1, 0, None], [True, False, False, True, True]),
        ("available_until", ["2030-01-01", "2020-01-01", "later", "2100-01-01", ""], [True, False, False, True, True]),
        (
            "available",
            ["https://schema.org/InStock", "http://schema.org/OutOfStock", "in_stock", "SoldOut", "preorder", "None"],
            [True, False, True, False, False, False],
        ),
        # Days as a spreadsheet counts them, and seconds among milliseconds.
        ("available_until", [46_388, 0, None], [False, True, True]),
        ("available_from", [46_388.0, 0.0, None], [False, True, True]),
        ("available_until", [1_930_000_000_000, 1_930_000_000_000, 1_930_000_000], [True, True, False]),
        ("available_from", [NOON, NOON, 1_930_000_000], [True, True, False]),
        ("available_until", ["infinity", "-infinity", "24:00", "2020-02-30", "99999-01-01"], [True] + [False] * 4),
        (
            "available_until",
            [1_900_000_000, 1_600_000_000, 1_600_000_000_000, 1_950_000_000, 1_950_000_000],
            [True, False, False, True, True],
        ),
    ],
)
def test_in_doubt_an_item_is_not_shown(column: str, cells: list[Any], may_be_shown: list[bool]) -> None:
    loaded = items(**{column: cells})
    assert loaded.rejected == []
    assert shown(loaded) == may_be_shown
    for unread in loaded.unread:
        assert unread.reason.startswith(f"{column} is ")


@pytest.mark.parametrize("name", ["in_stock", "isAvailable", "Availability", "AVAILABLE", "In Stock"])
def test_availability_is_known_by_its_usual_names(tmp_path: Path, name: str) -> None:
    data = shop(tmp_path, **{name: pa.array(["out of stock" if sold else "in stock" for sold in SOLD_OUT])})
    assert shown(data) == [not sold for sold in SOLD_OUT]
    assert data.intake["items"].ignored == ()


def test_columns_of_flattened_records_are_known(tmp_path: Path) -> None:
    rows = pa.Table.from_pylist(shop_events())
    pq.write_table(rows.rename_columns(["user.id", "Item.ID", "event/type", "timestamp"]), tmp_path / "events.parquet")
    loaded = read_table(tmp_path / "events.parquet", EVENTS, EVENTS_REQUIRED)
    assert loaded.table["user_id"].to_pylist() == rows["user_id"].to_pylist()
    assert (loaded.rejected, loaded.ignored) == ([], ())


def test_columns_that_mean_nothing_here_are_told(tmp_path: Path) -> None:
    stock = pa.array([0 if sold else 3 for sold in SOLD_OUT])
    moments = {"__index_level_0__": pa.array(range(EVENT_COUNT)), "_rescued": pa.array(["x"] * EVENT_COUNT)}
    data = shop(tmp_path, events=moments, stock=stock, title=pa.array(["t"] * ITEM_COUNT))
    assert data.intake["items"].ignored == ("stock",)
    assert data.intake["events"].ignored == ("_rescued",)


@pytest.mark.parametrize(
    ("columns", "closed"),
    [
        ({"available": [False] * ITEM_COUNT}, True),
        ({"available_until": ["2020-01-01"] * ITEM_COUNT}, True),
        ({"available_from": ["9999-01-01"] * ITEM_COUNT}, True),
        ({"available": [*[False] * (ITEM_COUNT - 1), None]}, False),
    ],
)
def test_a_catalogue_of_which_nothing_may_be_shown_says_so(
    tmp_path: Path, columns: dict[str, Any], closed: bool
) -> None:
    data = shop(tmp_path, **columns)
    warned = [line for line in lines(data.intake) if line.startswith("warning: items: no item may be shown now")]
    assert len(warned) == data.intake["items"].closed == closed


def test_an_item_that_its_table_lacks_is_learned_from_and_not_shown(tmp_path: Path) -> None:
    data = shop(tmp_path)
    listed = {"item_id": [f"g{n}" for n in range(1, ITEM_COUNT)]}
    pq.write_table(pa.table({**listed, "available": [True] * (ITEM_COUNT - 1)}), tmp_path / "items.parquet")
    lacking = open_dataset(tmp_path)
    assert lacking.intake["items"].hidden
    assert (data.intake["items"].unlisted, lacking.intake["items"].unlisted) == ([], ["g0"])
    table, vocabulary = item_vocabulary(lacking)
    assert len(vocabulary) == ITEM_COUNT
    assert table.filter(pc.equal(table["available"], False))["item_id"].to_pylist() == ["g0"]
    # A table that says of no item when it may be shown describes some of them: everything is shown.
    pq.write_table(pa.table(listed), tmp_path / "items.parquet")
    described = open_dataset(tmp_path)
    assert (described.intake["items"].unlisted, described.intake["items"].hidden) == (["g0"], False)
    assert item_vocabulary(described)[0]["available"].null_count == ITEM_COUNT
    pq.write_table(pa.table({"item_id": pa.array([], pa.string())}), tmp_path / "items.parquet")
    assert item_vocabulary(open_dataset(tmp_path))[0]["available"].null_count == ITEM_COUNT
    (tmp_path / "items.parquet").unlink()
    bare = open_dataset(tmp_path)
    assert (bare.intake["items"].unlisted, bare.items["available"].null_count) == ([], ITEM_COUNT)


def test_rows_of_one_item_that_disagree_about_availability_hide_it(tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    for number, available in enumerate(([True, True, None], [True, False, True])):
        rows = {"item_id": ["a", "b", "c"], "title": [f"title {number}"] * 3, "available": available}
        pq.write_table(pa.table(rows), tmp_path / "items" / f"{number}.parquet")
    loaded = read_table(tmp_path / "items", ITEMS, ITEMS_REQUIRED)
    assert loaded.table["title"].to_pylist() == ["title 0"] * 3
    assert shown(loaded) == [True, False, True]
    assert len(loaded.rejected) == 3


_CELLS = st.sampled_from(
    [None, "", "x", "-1", "yes", "0", "9999-12-31", "2020-01-01", "$3", "3,50", "[1", '["a"]', "a,b", "\0"]
)


@given(st.lists(st.tuples(*[_CELLS] * 6), min_size=1, max_size=6))
def test_no_optional_cell_costs_an_item_its_row_and_none_shows_what_is_not_available(
    rows: list[tuple[Any, ...]],
) -> None:
    names = ("title", "price", "categories", "available_from", "available_until", "attributes")
    columns = {name: pa.array([row[at] for row in rows], pa.string()) for at, name in enumerate(names)}
    loaded = items(**columns, available=[False] * len(rows))
    assert loaded.table["item_id"].to_pylist() == [f"g{n}" for n in range(len(rows))]
    assert not any(shown(loaded))


# ------------------------------------------------------------------------------------------------ prices and values


def test_prices_in_text_are_read_where_they_are_plain(tmp_path: Path) -> None:
    texts = ["", "$12.99", "from 14.99", "1,299.00"]
    data = shop(
        tmp_path,
        price=pa.array([texts[n % 4] for n in range(ITEM_COUNT)]),
        available=pa.array([not sold for sold in SOLD_OUT]),
    )
    assert data.items["price"].to_pylist()[:4] == [None, pytest.approx(12.99), None, 1299.0]
    (cells,) = data.unread
    assert (cells.column, cells.count, cells.row) == ("price", ITEM_COUNT // 4, 2)
    assert cells.reason == "price is 'from 14.99', should be a price, such as 12.99"
    assert shown(data) == [not sold for sold in SOLD_OUT]


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("12,99 €", 12.99),
        ("€12.99", 12.99),
        ("US$ 5", 5.0),
        ("1.299,00 €", 1299.0),
        ("1 299,50 kr", 1299.5),
        ("1'299.50 CHF", 1299.5),
        ("1,299,000", 1299000.0),
        ("1e3", 1000.0),
        ("1.299", 1.299),
        ("1,299", None),
        ("1.299 €", None),
        ("-5", None),
        ("free", None),
        ("5-7", None),
        ("5 EUR or more", None),
    ],
)
def test_a_price_that_may_mean_two_things_is_not_read(text: str, price: float | None) -> None:
    loaded = items(price=[text])
    assert loaded.table["price"].to_pylist() == [None if price is None else pytest.approx(price)]
    assert len(loaded.unread) == (price is None)


def test_a_missing_number_written_as_nan_is_missing(tmp_path: Path) -> None:
    ratings = pa.array([math.nan if n % 10 else 4.0 for n in range(EVENT_COUNT)])
    prices = pa.array([math.nan if n % 3 else 1.0 for n in range(ITEM_COUNT)])
    data = shop(tmp_path, events={"rating": ratings}, price=prices, available=pa.array([not sold for sold in SOLD_OUT]))
    assert data.events.num_rows == EVENT_COUNT
    assert sorted({value for value in data.events["value"].to_pylist() if value is not None}) == [4.0]
    assert data.events["value"].null_count == EVENT_COUNT * 9 // 10
    assert data.items["price"].to_pylist()[:3] == [1.0, None, None]
    assert shown(data) == [not sold for sold in SOLD_OUT]
    assert (data.rejected, data.unread) == ([], [])


# ------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    ("values", "first"),
    [
        (pa.array([decimal.Decimal(n % 7) for n in range(EVENT_COUNT)], pa.decimal128(38, 0)), "0"),
        (pa.array([decimal.Decimal(n % 7) for n in range(EVENT_COUNT)], pa.decimal256(60, 2)), "0"),
        (pa.array([float(n % 7) for n in range(EVENT_COUNT)]), "0"),
        (
            pa.ExtensionArray.from_storage(
                pa.uuid(), pa.array([uuid.UUID(int=n % 7).bytes for n in range(EVENT_COUNT)], pa.binary(16))
            ),
            str(uuid.UUID(int=0)),
        ),
        (pa.array([n % 7 for n in range(EVENT_COUNT)], pa.uint64()).dictionary_encode(), "0"),
    ],
    ids=lambda value: str(getattr(value, "type", value)),
)
def test_ids_of_warehouses_are_the_texts_that_people_mean(tmp_path: Path, values: Any, first: str) -> None:
    data = shop(tmp_path, events={"user_id": values})
    assert data.events["user_id"][0].as_py() == first
    assert len(data.stream.distinct("user_id")) == 7
    assert data.rejected == []
    assert not any("E" in name or name.endswith(".0") for name in data.stream.distinct("user_id"))


@pytest.mark.parametrize(("dtype", "most"), [(pa.float64(), 2**53), (pa.float32(), 2**24)])
def test_a_float_that_may_have_been_another_id_is_refused(tmp_path: Path, dtype: Any, most: int) -> None:
    """A missing id makes a column of whole numbers floats, and such a column rounds long ids into one."""
    long = pa.array([float(most + 1), float(most), float(most - 1)] * (EVENT_COUNT // 3), dtype)
    assert long[0] == long[1]
    data = shop(tmp_path, events={"user_id": long})
    assert data.stream.distinct("user_id") == [str(most - 1)]
    assert len(data.rejected) == 2 * EVENT_COUNT // 3
    assert f"a whole number below {most}" in data.rejected[0].reason


def test_an_id_longer_than_the_contract_takes_is_refused_where_it_comes_in(tmp_path: Path) -> None:
    names = pa.array(["u" * 512 if n % 2 else "é" * 257 for n in range(EVENT_COUNT)])
    data = shop(tmp_path, events={"user_id": names})
    assert data.events.num_rows == EVENT_COUNT // 2
    assert data.rejected[0].row == 0
    assert data.rejected[0].reason.endswith("should be text in UTF-8 of at most 512 bytes")


# ------------------------------------------------------------------------------------------------ lists and maps


@pytest.mark.parametrize(
    "write",
    [
        lambda topic: json.dumps([topic, "Sale"]),
        lambda topic: f"{topic}, Sale",
        lambda topic: f"{topic} | Sale",
        lambda topic: f"{topic}|Sale|",
        lambda topic: f" {topic} ; Sale",
        lambda topic: f"['{topic}', 'Sale']",
        lambda topic: f"[{topic}, Sale]",
        lambda topic: f"{{{topic},Sale}}",
        lambda topic: f'"{topic}", "Sale"',
    ],
)
def test_categories_in_one_text_are_trimmed_lists(tmp_path: Path, write: Any) -> None:
    data = shop(tmp_path, categories=pa.array([write(TOPICS[n % 4]) for n in range(ITEM_COUNT)]))
    assert data.items["categories"].to_pylist() == [[TOPICS[n % 4], "Sale"] for n in range(ITEM_COUNT)]
    assert data.unread == []


def test_how_a_column_separates_is_decided_from_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "items").mkdir()
    for number, cells in enumerate((["Health, Beauty & Care"], ["Tea|Sale"])):
        rows = {"item_id": [f"{number}"], "categories": cells}
        pq.write_table(pa.table(rows), tmp_path / "items" / f"{number}.parquet")
    read = read_table(tmp_path / "items", ITEMS, ITEMS_REQUIRED).table["categories"].to_pylist()
    assert read == [["Health, Beauty & Care"], ["Tea", "Sale"]]


def test_a_name_with_a_comma_is_one_category_unless_others_share_its_parts() -> None:
    lone = ListStyle.of(["Health, Beauty & Care", "Tea, Sale", "Bikes, Sale"])
    assert lone.split("Health, Beauty & Care") == ["Health, Beauty & Care"]
    assert lone.split("Tea, Sale") == ["Tea", "Sale"]
    shared = ListStyle.of(["Health, Beauty & Care", "Health, Tea"])
    assert shared.split("Health, Beauty & Care") == ["Health", "Beauty & Care"]


@pytest.mark.parametrize("cell", ['["a", null]', '["a", "b', "['a' 'b']", "[[1]]", '{"a": 1}', "[true]"])
def test_a_list_that_cannot_be_read_is_counted_and_not_cut(cell: str) -> None:
    loaded = items(categories=[cell, '["Tea"]'])
    assert loaded.table["categories"].to_pylist() == [None, ["Tea"]]
    assert loaded.unread[0].count == 1


@pytest.mark.parametrize("word", MISSING_WORDS)
def test_a_missing_list_that_went_through_text_is_missing(word: str) -> None:
    loaded = items(categories=[word, "Tea, Sale"], attributes=[f" {word} ", '{"a": 1}'])
    assert loaded.table["categories"].to_pylist() == [None, ["Tea", "Sale"]]
    assert loaded.table["attributes"].to_pylist() == [None, [("a", "1")]]
    assert loaded.unread == []


def test_attributes_may_be_json_or_a_struct() -> None:
    written = items(
        attributes=['{"year": 1999, "new": true, "none": null, "size": 1.50}', "{'a': 'b'}", "", '{"a": {}}']
    )
    assert written.table["attributes"].to_pylist() == [
        [("year", "1999"), ("new", "true"), ("size", "1.50")],
        [("a", "b")],
        None,
        None,
    ]
    assert [cells.row for cells in written.unread] == [3]
    struct = items(attributes=[{"year": 1999, "day": dt.date(2020, 1, 2)}, {"year": None, "day": None}, None])
    assert struct.table["attributes"].to_pylist() == [[("year", "1999"), ("day", "2020-01-02")], [], None]


# ----------------------------------------------------------------------------------------------------------- times


def times(*cells: Any, dtype: Any = None) -> list[Any]:
    rows = [{"user_id": "u", "item_id": "i", "event_type": "x"}] * len(cells)
    table = pa.Table.from_pylist(rows).append_column("timestamp", pa.array(list(cells), dtype))
    loaded = conform(table, EVENTS, EVENTS_REQUIRED, "f")
    return loaded.table["timestamp"].to_pylist() if not loaded.rejected else [row.reason for row in loaded.rejected]


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2020-09-13T12:26:40.123456Z", NOON + 123),
        ("2020-09-13T14:26:40.5+02:00", NOON + 500),
        ("2020-09-13 06:56:40,25-0530", NOON + 250),
        ("2020-09-13 12:26:40.999999999 UTC", NOON + 999),
        ("20200913T122640Z", NOON),
        ("2020-09-13 14:26+02", NOON - 40_000),
        ("2020-09-13T14:26:40+02:00[Europe/Berlin]", NOON),
        ("2020-09-13T12:26:40Z[UTC]", NOON),
        ("2020-09-13 12:26:40 +0000 UTC", NOON),
        ("2020/9/13 12:26:40", NOON),
    ],
)
def test_fractions_and_offsets_of_iso_text_are_kept(text: str, ms: int) -> None:
    assert times(text) == [ms]


@pytest.mark.parametrize(
    "text", ["2020-02-30", "2020-09-13T24:00:00", "13.09.2020", "09/13/2020", "2020-09-13T12:26:40+99:00", "now"]
)
def test_a_time_that_may_mean_two_things_or_none_is_refused(text: str) -> None:
    (reason,) = times(text)
    assert "should be a time from 1970 up to 2100" in reason
    assert reason.endswith("or in ISO 8601, such as 2024-01-31T10:00:00Z")


@pytest.mark.parametrize(("unit", "per"), [("s", 1), ("ms", 1000), ("us", 10**6), ("ns", 10**9)])
def test_the_unit_of_numbers_is_told_and_said(tmp_path: Path, unit: str, per: int) -> None:
    numbers = pa.array([(NOON // 1000 + n) * per for n in range(EVENT_COUNT)])
    data = shop(tmp_path, events={"timestamp": numbers})
    assert data.info["first_timestamp"] == NOON
    assert data.info["time_units"] == {"events.timestamp": unit}


def test_the_unit_is_told_from_all_files_and_mixed_units_are_refused(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    row = {"user_id": ["u"] * 2, "item_id": ["i"] * 2, "event_type": ["x"] * 2}
    for number, moments in enumerate(([0, 0], [NOON // 1000, NOON // 1000 + 1])):
        pq.write_table(pa.table(row | {"timestamp": moments}), tmp_path / "events" / f"{number}.parquet")
    loaded = read_table(tmp_path / "events", EVENTS, EVENTS_REQUIRED)
    assert loaded.table["timestamp"].to_pylist() == [NOON, NOON + 1000]
    assert [row.reason for row in loaded.rejected] == ["timestamp is 0, should be given in every row"] * 2
    pq.write_table(pa.table(row | {"timestamp": [NOON, NOON + 1]}), tmp_path / "events" / "2.parquet")
    with pytest.raises(
        TablesError, match=r"column timestamp mixes times in seconds .*0000 in .*1\.parquet.*, milliseconds"
    ):
        read_table(tmp_path / "events", EVENTS, EVENTS_REQUIRED)


def test_numbers_that_are_no_times_of_this_age_in_any_unit_are_refused_by_name() -> None:
    with pytest.raises(
        TablesError, match=r"column timestamp holds 10000000000 in f, which is no time from 1995 up to 2100"
    ):
        times(10**10, 10**10 + 1)


@pytest.mark.parametrize(("majority", "slip"), [(NOON, NOON // 1000), (NOON * 1000, NOON), (NOON // 1000, NOON)])
def test_a_time_in_another_unit_than_its_column_is_refused_and_not_a_day_in_1970(majority: int, slip: int) -> None:
    (reason,) = times(majority, majority, majority, slip)
    assert reason.startswith(f"timestamp is {slip}, should be a time from 1970 up to 2100 in ")


def test_what_a_column_declares_is_not_doubted() -> None:
    rows = pa.table({"user_id": ["u"], "item_id": ["i"], "event_type": ["x"], "timestamp": [NOON // 1000]})
    declared = rows.cast(pa.schema([EVENTS.field(name) for name in rows.column_names]))
    assert conform(declared, EVENTS, EVENTS_REQUIRED, "f").table["timestamp"].to_pylist() == [NOON // 1000]


def test_seconds_since_a_beginning_stay_what_they_are() -> None:
    assert times(0, 5, 100_000) == [0, 5000, 100_000_000]


def test_dates_in_digits_are_dates() -> None:
    assert times(20200913, 20200914) == [1_599_955_200_000, 1_600_041_600_000]
    assert times("20200913122640") == [NOON]


def test_times_of_96_bits_beyond_2262_are_not_wrapped(tmp_path: Path) -> None:
    ends = pa.array([dt.datetime(9999, 12, 31), dt.datetime(2031, 1, 1)], pa.timestamp("us"))
    rows = pa.table({"item_id": ["a", "b"], "available_until": ends})
    pq.write_table(rows, tmp_path / "items.parquet", use_deprecated_int96_timestamps=True)
    loaded = read_table(tmp_path / "items.parquet", ITEMS, ITEMS_REQUIRED)
    assert loaded.table["available_until"].to_pylist() == [None, 1_924_992_000_000]


# ----------------------------------------------------------------------------------------------------------- files


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def test_linked_folders_are_read(tmp_path: Path) -> None:
    days, store = tmp_path / "events", tmp_path / "elsewhere"
    for part in range(6):
        folder = (store if part % 2 else days) / f"date=2023-11-{part + 10}"
        write(folder / "part.parquet", shop_events()[part::6])
        if part % 2:
            days.mkdir(exist_ok=True)
            (days / folder.name).symlink_to(os.path.relpath(folder, days), target_is_directory=True)
    (days / "loop").symlink_to(days, target_is_directory=True)
    data = open_dataset(tmp_path)
    assert data.events.num_rows == EVENT_COUNT
    assert data.events.num_rows == pq.read_table(str(days / "date=2023-11-10")).num_rows * 6


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "events" / "1.parquet", shop_events())
    (tmp_path / "events" / "2.parquet").symlink_to(tmp_path / "gone.parquet")
    with pytest.raises(TablesError, match=r"2\.parquet is a link to nothing"):
        open_dataset(tmp_path)
    (tmp_path / "events" / "2.parquet").unlink()
    (tmp_path / "items.parquet").symlink_to(tmp_path / "gone.parquet")
    with pytest.raises(TablesError, match=r"items\.parquet is a link to nothing"):
        open_dataset(tmp_path)


def test_names_of_folders_are_columns(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "event_type"} for row in shop_events()]
    write(tmp_path / "events" / "EVENT_TYPE=add%20to%20cart" / "1.PARQUET", rows[:20])
    write(tmp_path / "events" / "EVENT_TYPE=purchase" / "deep" / "1.parq", rows[20:40])
    write(tmp_path / "events" / "EVENT_TYPE=__HIVE_DEFAULT_PARTITION__" / "000000_0", rows[40:])
    data = open_dataset(tmp_path)
    assert data.info["event_types"] == {"add to cart": 20, "purchase": 20}
    assert len(data.rejected) == 20
    assert data.rejected[0].reason == "event_type is missing, should be given in every row"


def test_a_column_that_contradicts_its_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "events" / "event_type=view_item" / "1.parquet", shop_events())
    assert open_dataset(tmp_path).events.num_rows == EVENT_COUNT
    write(tmp_path / "events" / "event_type=purchase" / "1.parquet", shop_events())
    with pytest.raises(TablesError, match=r"purchase/1\.parquet row 0: event_type is 'view_item', but its folder says"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("_delta_log/0.json", b"{}", "is a table of Delta Lake, whose log says which of its files count"),
        ("metadata/v1.metadata.json", b"{}", "is a table of Iceberg"),
        ("day=1/_delta_log/0.json", b"{}", "day=1 is a table of Delta Lake"),
        ("more.csv", b"a,b\n", r"more\.csv is not Parquet: convert it, for example with duckdb"),
        ("more.ndjson.gz", b"", r"more\.ndjson\.gz is not Parquet"),
    ],
)
def test_a_folder_that_is_more_than_its_parquet_files_is_refused(
    tmp_path: Path, file: str, content: bytes, named: str
) -> None:
    write(tmp_path / "events" / "1.parquet", shop_events())
    (tmp_path / "events" / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "events" / file).write_bytes(content)
    with pytest.raises(TablesError, match=named):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["items.csv", "items.csv.gz", "Items.jsonl"])
def test_a_catalogue_in_another_format_is_not_passed_over(tmp_path: Path, name: str) -> None:
    write(tmp_path / "events.parquet", shop_events())
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(TablesError, match=rf"{name} is not Parquet: convert it"):
        open_dataset(tmp_path)


def test_a_table_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "Events.PARQUET", shop_events())
    assert table_path(tmp_path, "events") == tmp_path / "Events.PARQUET"
    write(tmp_path / "events" / "1.parquet", shop_events())
    with pytest.raises(TablesError, match=r"has Events\.PARQUET and events, which both are the table events"):
        open_dataset(tmp_path)


def test_files_of_different_types_and_without_rows_are_one_table(tmp_path: Path) -> None:
    write(tmp_path / "events" / "1.parquet", shop_events())
    numbers = {
        "user_id": [7],
        "item_id": [8.0],
        "event_type": ["x"],
        "timestamp": [dt.datetime(2024, 1, 1)],
        "rating": ["4"],
    }
    pq.write_table(pa.table(numbers), tmp_path / "events" / "2.parquet")
    pq.write_table(pa.table(numbers).slice(0, 0), tmp_path / "events" / "3.parquet")
    data = open_dataset(tmp_path)
    assert data.events.num_rows == EVENT_COUNT + 1
    last = data.events.slice(EVENT_COUNT).to_pylist()[0]
    assert (last["user_id"], last["item_id"], last["timestamp"], last["value"]) == ("7", "8", 1_704_067_200_000, 4.0)
    assert len(find_files(tmp_path / "events")) == 3


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "events" / "1.parquet", shop_events())
    (tmp_path / "events" / "2.parquet").write_bytes(b"PAR1")
    with pytest.raises(TablesError, match=r"2\.parquet cannot be read as Parquet"):
        open_dataset(tmp_path)


TIMES = [1_600_000_000, 1_600_000_100, 1_600_000_200]


@pytest.mark.parametrize("held_rows", [1 << 20, 0])
@pytest.mark.parametrize(
    ("columns", "event_types", "values"),
    [
        ({"userId": ["a", "b", "a"], "movieId": ["x", "x", "y"], "rating": [4.0, 2.0, 5.0]}, "rating", [4, 5, 2]),
        ({"user": ["a", "b", "a"], "item": ["x", "x", "y"]}, "interaction", None),
        ({"visitorid": ["a", "b", "a"], "itemid": ["x", "x", "y"], "event": ["like"] * 3}, "like", None),
        ({"customer_id": ["a", "b", "a"], "sku": ["x", "x", "y"], "overall": [4, 2, 5]}, "rating", [4, 5, 2]),
    ],
)
def test_the_usual_names_of_columns_are_read_and_told(
    columns: dict[str, list[Any]],
    event_types: str,
    values: list[int] | None,
    held_rows: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("features.tables.dataset.HELD_ROWS", held_rows)
    pq.write_table(pa.table({**columns, "ts": TIMES}), tmp_path / "events.parquet")
    dataset = open_dataset(tmp_path)
    events = dataset.events
    assert events["user_id"].to_pylist() == ["a", "a", "b"]
    assert events["item_id"].to_pylist() == ["x", "y", "x"]
    assert set(events["event_type"].to_pylist()) == {event_types}
    assert events["timestamp"].to_pylist() == [1000 * TIMES[at] for at in (0, 2, 1)]
    if values:
        assert events["value"].to_pylist() == values
    told = " ".join(lines(dataset.intake))
    assert "timestamp from ts" in told
    assert all(f"from {name}" in told for name in columns if name not in ("userId", "itemid"))
    assert ("event_type from the default" in told) == ("event" not in columns)


def test_a_name_that_might_mean_something_else_is_not_taken_in_silence(tmp_path: Path) -> None:
    two = {"user_id": ["a"], "track_id": ["x"], "video_id": ["y"], "timestamp": [TIMES[0]]}
    pq.write_table(pa.table(two), tmp_path / "events.parquet")
    with pytest.raises(TablesError, match=r"columns \['track_id', 'video_id'\] may all mean item_id: rename the right"):
        open_dataset(tmp_path)
    # Of two optional ones neither is read; a surer name wins over any.
    more = {"user_id": ["a"], "user": ["b"], "item_id": ["x"], "score": [1.0], "stars": [2.0], "timestamp": [TIMES[0]]}
    pq.write_table(pa.table(more), tmp_path / "events.parquet")
    dataset = open_dataset(tmp_path)
    events = dataset.events
    assert events["user_id"].to_pylist() == ["a"]
    assert events["value"].to_pylist() == [None]
    assert "no use for columns user, score, stars" in " ".join(lines(dataset.intake))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"user_id": ["a"], "video_id": ["x"], "time": [TIMES[0]]},
            r"has video_id for item_id, where .*a\.parq",
        ),
        (
            {"user_id": ["a"], "track_id": ["x"], "ts": [TIMES[0]], "event": ["like"]},
            "not all files .* column event_type",
        ),
    ],
)
def test_files_of_one_table_mean_the_same(second: dict[str, list[Any]], message: str, tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    first = {"user_id": ["a"], "track_id": ["x"], "ts": [TIMES[0]]}
    for name, columns in (("a", first), ("b", second)):
        pq.write_table(pa.table(columns), tmp_path / "events" / f"{name}.parquet")
    with pytest.raises(TablesError, match=message):
        open_dataset(tmp_path)
    # A column that may be absent may have several names, and all are told; one type holds for all rows.
    rated = {"user_id": ["b"], "track_id": ["y"], "time": [TIMES[1]], "stars": [4.0]}
    pq.write_table(pa.table(rated), tmp_path / "events" / "b.parquet")
    dataset = open_dataset(tmp_path)
    assert dataset.events["event_type"].to_pylist() == ["rating", "rating"]
    assert "timestamp from ts and time" in " ".join(lines(dataset.intake))
