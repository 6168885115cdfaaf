"""Declared features: what a declaration may say, and the values that it gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from features.catalog import Catalog
from features.catalog_columns import with_lists
from features.declarations import DeclaredFeature
from features.declared import NONE_DECLARED, Declared
from features.model_inputs import FEATURES
from features.tables.schema import ITEMS
from features.vocabulary import Vocabulary

NOON = 1_767_614_400_000  # Monday, 5 January 2026, 12:00 in UTC
SHOP = [
    {"item_id": "a", "price": 9.0, "categories": ["red", "blue"], "creator_id": "x", "attributes": {"stars": "4.5"}},
    {"item_id": "b", "price": None, "categories": [], "creator_id": None, "attributes": {"stars": "many"}},
    {"item_id": "c", "price": 100.0, "categories": None, "creator_id": "y", "attributes": None},
]


def table(items: list[dict[str, Any]]) -> pa.Table:
    rows = [item | {"attributes": list((item["attributes"] or {}).items())} for item in items]
    return pa.Table.from_pylist(rows, ITEMS)


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("price", "'price', should be an object"),
        ({"name": "Price", "form": "value"}, "name is 'Price'"),
        ({"name": "a b", "form": "value"}, "name is 'a b'"),
        ({"name": "a", "form": "values"}, "form is 'values', should be one of value, bucket, cycle, count, rate"),
        ({"name": "a", "form": "value", "of": "item.prise"}, "of is 'item.prise', should be one of item.categories"),
        ({"name": "a", "form": "value", "of": "item.attributes."}, "of is 'item.attributes.'"),
        ({"name": "a", "form": "value", "of": "user.age"}, "of is 'user.age'"),
        ({"name": "a", "form": "value", "of": "past.attributes.age"}, "of is 'past.attributes.age'"),
        ({"name": "a", "form": "value", "of": "item.price", "edges": [1]}, "value has no option edges"),
        ({"name": "a", "form": "value", "of": "item.price", "log": 1}, "log is 1, should be true or false"),
        ({"name": "a", "form": "bucket", "of": "item.price"}, "either values or edges"),
        ({"name": "a", "form": "bucket", "of": "item.price", "edges": [2, 1]}, "each above the one before"),
        ({"name": "a", "form": "bucket", "of": "item.price", "edges": [math.nan]}, "a list of numbers"),
        (
            {"name": "a", "form": "bucket", "of": "item.categories", "edges": [1]},
            "there are values only",
        ),
        ({"name": "a", "form": "bucket", "of": "item.creator_id", "values": ["x", "x"]}, "each once"),
        ({"name": "a", "form": "cycle", "of": "request.hour"}, "period is missing"),
        ({"name": "a", "form": "cycle", "of": "request.hour", "period": 24, "zone": "Mars"}, "a time zone such as"),
        ({"name": "a", "form": "count"}, "event_types is missing"),
        ({"name": "a", "form": "count", "event_types": "like"}, "a list of 1 to 256 texts"),
        (
            {"name": "a", "form": "count", "event_types": ["like"], "same": "brand"},
            "one of any, item, cat",
        ),
        ({"name": "a", "form": "rate", "event_types": ["like"]}, "shown_types is missing"),
        ({"name": "a", "form": "rate", "event_types": ["like"], "shown_types": ["view"], "base": 1}, "base is 1"),
    ],
)
def test_a_declaration_that_is_wrong_is_refused_by_what_is_wrong(declaration: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace("[", r"\[")):
        DeclaredFeature.parse(declaration)


@pytest.mark.parametrize(
    ("declarations", "message"),
    [
        ([{"name": "a", "form": "value", "of": "item.price"}] * 2, "a: there is another feature"),
        ([{"name": "popularity", "form": "value", "of": "item.price"}], "popularity: there is another feature"),
        ([{"name": "a", "form": "count", "event_types": ["liek"]}], "a: no event has the type 'liek', there are like"),
        (
            [{"name": f"a{n}", "form": "bucket", "of": "item.price", "edges": list(range(100))} for n in range(3)],
            "303 columns, at most 256",
        ),
    ],
)
def test_declarations_that_do_not_fit_together_are_refused(declarations: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Declared.of(declarations, ["like"])


def test_values_of_items() -> None:
    declared = Declared.of(
        [
            {"name": "cost", "form": "value", "of": "item.price"},
            {"name": "cheap", "form": "bucket", "of": "item.price", "edges": [10, 50]},
            {"name": "stars", "form": "value", "of": "item.attributes.stars", "log": True},
            {"name": "hue", "form": "bucket", "of": "item.categories", "values": ["blue", "red", "green"]},
            {"name": "by", "form": "bucket", "of": "item.creator_id", "values": ["y"]},
        ]
    )
    assert declared.names == (
        *("cost", "cost/known", "cheap/..10", "cheap/10..50", "cheap/50..", "stars", "stars/known"),
        *("hue/blue", "hue/red", "hue/green", "by/y"),
    )
    expected = [
        [9, 1, 1, 0, 0, math.log1p(4.5), 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [100, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(declared.item_values(table(SHOP)), np.array(expected, np.float32))
    assert not declared.item_values(pa.table({"item_id": ["a"]})).any()
    assert declared.item_values(table(SHOP).slice(0, 0)).shape == (0, 11)


def test_values_of_requests() -> None:
    declared = Declared.of(
        [
            {"name": "day", "form": "bucket", "of": "request.weekday", "values": ["0", "1"]},
            {"name": "part", "form": "bucket", "of": "request.hour", "edges": [6, 12, 18], "zone": "Asia/Kathmandu"},
            {"name": "clock", "form": "cycle", "of": "request.hour", "period": 24},
            {"name": "on", "form": "bucket", "of": "request.device", "values": ["phone"]},
            {"name": "where", "form": "bucket", "of": "request.surface", "values": ["home"]},
            {"name": "rank", "form": "value", "of": "request.attributes.rank"},
        ]
    )

    def values(*asked: Any) -> dict[str, float]:
        return dict(zip(declared.names, declared.request_values(*asked).tolist(), strict=True))

    said = values(NOON, "home", {"device": "phone", "attributes": {"rank": "-2"}})
    marked = {name for name, value in said.items() if value == 1}
    assert marked == {"day/0", "part/12..18", "on/phone", "where/home", "rank/known"}
    assert said["rank"] == -2
    assert said["clock/cos"] == -1
    # 20 hours later in Kathmandu it is Tuesday, 13:45; the caller's own zone wins over that of the feature.
    assert values(NOON + 20 * 3_600_000)["part/12..18"] == 1
    assert values(NOON + 20 * 3_600_000, "", {"time_zone": "America/New_York"})["part/..6"] == 1
    assert values(NOON, "", {"time_zone": "Pacific/Auckland"})["day/1"] == 1
    assert not any(values().values())
    assert not any(values(0, "shop", {"device": "", "attributes": {"rank": "inf"}}).values())


def test_the_fingerprint_tells_declarations_apart() -> None:
    one = {"name": "cost", "form": "value", "of": "item.price"}
    prints = [Declared.of(d).fingerprint() for d in ([], [one], [one | {"log": True}], [one | {"name": "price_now"}])]
    assert prints[0] == FEATURES.fingerprint() == NONE_DECLARED.fingerprint()
    assert len(set(prints)) == 4
    assert Declared.of([one | {"log": False}]).fingerprint() == prints[1]
    assert Declared.of(Declared.of([one]).as_json()).features == Declared.of([one]).features


def test_an_item_that_is_put_has_its_declared_features() -> None:
    declared = Declared.of(
        [
            {"name": "cost", "form": "value", "of": "item.price", "log": True},
            {"name": "hue", "form": "bucket", "of": "item.categories", "values": ["red"]},
            {"name": "stars", "form": "value", "of": "item.attributes.stars"},
        ]
    )
    items, vectors = table(SHOP), np.zeros((3, 2), np.float32)
    own = declared.item_values(items)
    catalog = Catalog(with_lists(items, "declared", own), Vocabulary.build(["a", "b", "c"]), vectors, declared=declared)
    np.testing.assert_array_equal(catalog.columns.declared, own)
    new = {"item_id": "d", "price": 0.1, "categories": ["red"], "attributes": {"stars": "2"}}
    rows = catalog.put([new, SHOP[1] | {"price": 3.0}], np.zeros((2, 2), np.float32), 1)
    put = table([new | {"creator_id": None}, SHOP[1] | {"price": 3.0}])
    np.testing.assert_array_equal(catalog.columns.declared[rows], declared.item_values(put))
