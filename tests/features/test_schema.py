"""Keys are pinned to the byte: stored profiles and published bundles hold them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.event_types import EVENT_TYPES
from features.feature_set import Feature, FeatureSet
from features.keys import event_type_key, event_type_keys, item_key, item_keys
from features.tables import schema

TABLES = {
    "EVENTS": ("user_id", "item_id", "event_type"),
    "ITEMS": ("item_id",),
    "USERS": ("user_id",),
    "JUDGMENTS": ("query", "item_id", "grade"),
    "IMPRESSIONS": ("request_id", "user_id", "timestamp", "item_ids", "propensities"),
}


def test_item_key_is_the_blake2b_of_the_utf8_bytes_read_little_endian() -> None:
    # `printf a | b2sum -l 64` prints 40f89e395b66422f
    assert item_key("a") == int.from_bytes(bytes.fromhex("40f89e395b66422f"), "little")
    assert item_key("Käse") != item_key("Kase")


def test_no_id_has_the_key_zero() -> None:
    assert item_key("") == item_key(None) == 0
    assert item_keys(["", None]).tolist() == [0, 0]
    assert item_keys([]).shape == (0,)


@given(st.lists(st.text(st.characters(codec="utf-8"))))
def test_many_keys_are_the_single_keys(ids: list[str]) -> None:
    keys = item_keys(ids)
    assert keys.dtype == np.uint64
    assert keys.tolist() == [item_key(i) for i in ids]


def test_event_type_key_is_the_crc32_of_the_name() -> None:
    assert event_type_key("123456789") == 0xCBF43926  # the check value of CRC-32/ISO-HDLC
    assert event_type_keys(["like", "hide", "like"]).tolist() == [event_type_key(n) for n in ("like", "hide", "like")]
    assert event_type_keys(["like"]).dtype == np.uint32
    assert len({event_type_key(name) for name in EVENT_TYPES}) == len(EVENT_TYPES)


@pytest.mark.parametrize(("name", "required"), TABLES.items())
def test_required_columns_are_those_that_may_not_be_null(name: str, required: tuple[str, ...]) -> None:
    table = getattr(schema, name)
    assert tuple(field.name for field in table if not field.nullable) == required
    assert tuple(n for n in getattr(schema, f"{name}_REQUIRED") if isinstance(n, str)) == required


def test_events_need_a_time_or_an_order() -> None:
    assert schema.EVENTS_REQUIRED[-1] == ("timestamp", "sequence")


def test_a_feature_set_knows_its_columns() -> None:
    features = FeatureSet((Feature("age", "Days since the item came."), Feature("price", "Price in euros.")))
    assert features.names == ("age", "price")
    assert len(features) == 2
    assert [f.name for f in features] == ["age", "price"]


def test_two_features_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="unique"):
        FeatureSet((Feature("age", "Days."), Feature("age", "Years.")))


def test_the_fingerprint_changes_with_what_a_model_reads_and_with_nothing_else() -> None:
    age, price = Feature("age", "Days."), Feature("price", "Euros.")
    same = FeatureSet((Feature("age", "Days, said better."), price)).fingerprint()
    assert FeatureSet((age, price)).fingerprint() == same
    others = [
        (price, age),
        (age,),
        (age, Feature("price", "Euros.", version=2)),
        (age, Feature("price", "Euros.", dtype="float64")),
        (age, Feature("price", "Euros.", window="item")),
        (age, Feature("cost", "Euros.")),
    ]
    assert len({same, *(FeatureSet(f).fingerprint() for f in others)}) == 1 + len(others)
