"""Eligibility, prices and live items by row."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.catalog import Catalog
from features.catalog_columns import CatalogColumns, facts_of, fill, grown
from features.keys import item_key
from features.tables.schema import ITEMS
from features.vocabulary import Vocabulary


@pytest.fixture
def catalog() -> Catalog:
    items = pa.table(
        {
            "item_id": ["a", "b", "c", "d"],
            "title": ["A", "B", None, "D"],
            "categories": [["x", "y"], [], None, ["y"]],
            "creator_id": ["m", None, "m", "n"],
            "price": pa.array([1.5, None, 2.0, 0.0], pa.float32()),
            "available": [True, False, None, True],
            "available_until": pa.array([None, None, None, 5000], pa.int64()),
            "popularity": pa.array([3.0, 2.0, 1.0, 0.0], pa.float32()),
        }
    )
    return Catalog(items, Vocabulary.build(["a", "b", "c", "d"]), np.eye(4, dtype=np.float32))


def bits(catalog: Catalog, now_ms: int) -> list[int]:
    return np.unpackbits(catalog.eligible_bitmap(now_ms), bitorder="little")[: catalog.size].tolist()


def test_columns_say_what_the_table_says(catalog):
    assert catalog.columns.category[:2].tolist() == [item_key("x"), 0]
    assert catalog.columns.creator[[0, 2]].tolist() == [item_key("m")] * 2
    np.testing.assert_array_equal(catalog.columns.price, np.array([1.5, np.nan, 2.0, 0.0], np.float32))
    assert catalog.item(0)["title"] == "A"


def test_eligibility_follows_the_flag_and_the_clock(catalog):
    rows = np.arange(4)
    assert catalog.eligible(rows, 4999).tolist() == [True, False, True, True]
    assert catalog.eligible(rows, 5000).tolist() == [True, False, True, False]
    assert bits(catalog, 4999) == [1, 0, 1, 1]
    assert bits(catalog, 5000) == [1, 0, 1, 0]


def test_a_change_is_seen_at_once(catalog):
    assert bits(catalog, 1000)[0] == 1
    catalog.delete(0)
    assert bits(catalog, 1000)[0] == 0
    catalog.set_available(0, True, available_from=2000)
    assert catalog.eligible(np.array([0]), 1999).tolist() == [False]
    assert catalog.eligible(np.array([0]), 2000).tolist() == [True]


def test_live_items_get_rows_behind_the_bundle(catalog):
    rows = catalog.put(
        [{"item_id": "new", "title": "New", "categories": ["y"], "price": 3.0}, {"item_id": "b", "title": "B2"}],
        np.ones((2, 4), np.float32),
        now_ms=9,
    )
    assert rows.tolist() == [4, 1]
    assert catalog.size == 5
    assert catalog.rows(["new", "a", "nobody"]).tolist() == [4, 0, -1]
    assert catalog.ids([4, 0]) == ["new", "a"]
    kin = [catalog.category_and_creator(item_key(name)) for name in ("new", "a", "nobody")]
    assert kin == [(item_key("y"), 0), (item_key("x"), item_key("m")), None]
    assert catalog.columns.vectors[4].tolist() == [1, 1, 1, 1]
    assert catalog.columns.vectors[1].tolist() == [0, 1, 0, 0], "a trained item keeps its vector"
    assert (catalog.item(4)["title"], catalog.item(1)["title"]) == ("New", "B2")
    assert bits(catalog, 1000) == [1, 1, 1, 1, 1]


def test_an_item_is_found_for_a_category_or_a_creator_whatever_was_put(catalog):
    def found(column, *names):
        return [catalog.rows_with(column, [item_key(name)]).get(item_key(name)) for name in names]

    assert found("category", "x", "y", "z") == [0, 3, None]
    assert found("creator", "m", "n", "o") == [0, 3, None]
    put = [{"item_id": "a", "categories": ["z"], "creator_id": "o"}, {"item_id": "e", "categories": ["x"]}]
    catalog.put(put, np.zeros((2, 4), np.float32), now_ms=1)
    assert found("category", "x", "y", "z") == [4, 3, 0]
    assert found("creator", "m", "n", "o") == [2, 3, 0]
    both = catalog.rows_with("category", [item_key("x"), item_key("w"), item_key("y")])
    assert both == {item_key("x"): 4, item_key("y"): 3}


def test_many_live_items_fit(catalog):
    items = [{"item_id": f"live-{at}"} for at in range(3000)]
    catalog.put(items, np.zeros((3000, 4), np.float32), now_ms=1)
    assert catalog.rows(["live-2999", "live-0"]).tolist() == [3003, 4]
    assert sum(bits(catalog, 1)) == 3003


def test_tables_that_do_not_fit_are_refused(catalog):
    with pytest.raises(ValueError, match="do not fit"):
        Catalog(pa.table({"item_id": ["a"]}), Vocabulary.build(["a"]), np.zeros((2, 3), np.float32))


NAMES = st.none() | st.sampled_from(["", "x", "y", "long name"])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "categories": st.none() | st.lists(st.sampled_from(["x", "y", "z"]), max_size=3),
            "creator_id": NAMES,
            "attributes": st.none() | st.dictionaries(st.sampled_from(["duration", "color"]), st.sampled_from("19ab")),
            "price": st.none() | st.floats(0, 9, width=32),
            "available": st.none() | st.booleans(),
            "available_until": st.none() | st.integers(1, 9),
        }
    ),
    max_size=12,
)


@given(ROWS, st.integers(0, 5), st.integers(1, 5))
def test_columns_are_those_of_each_item_by_itself(rows, start, chunk):
    """Whole columns are computed at once, from tables in several pieces too, as single items are when they are put."""
    schema = ITEMS.remove(0)
    whole = pa.Table.from_pylist(
        [{**row, "attributes": list((row["attributes"] or {}).items())} for row in rows], schema
    )
    batches = whole.slice(start).to_batches(max_chunksize=chunk)
    table = pa.Table.from_batches(batches, schema)
    facts = facts_of(table)
    expected = CatalogColumns(np.zeros((len(rows), 1), np.float32), **facts_of(ITEMS.remove(0).empty_table()))
    expected = grown(expected, len(rows))
    for row, item in enumerate(rows[start:]):
        fill(expected, row, item)
    for name in ("category", "creator", "duration", "price", "available", "available_until"):
        np.testing.assert_array_equal(facts[name], getattr(expected, name)[: len(rows[start:])], name)
