"""The documented event types, and names that look like them: found in any form, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.event_types import DOCUMENTED, EVENT_TYPES, NEGATIVE_EVENT_TYPES, PASSIVE_EVENT_TYPES, hint, meaning
from penchant.v1 import event_pb2


def test_each_type_is_of_one_kind() -> None:
    assert PASSIVE_EVENT_TYPES == ("view_item_list", "search")
    assert NEGATIVE_EVENT_TYPES == ("dislike", "hide")
    assert not any(kind.chosen and kind.refused for kind in DOCUMENTED)


def test_no_synonym_stands_for_two_types_and_none_is_a_documented_name() -> None:
    words = [word for kind in DOCUMENTED for word in kind.synonyms.split()]
    assert len(words) == len(set(words))
    assert all(meaning(word) == kind.name for kind in DOCUMENTED for word in kind.synonyms.split())


@given(st.sampled_from(EVENT_TYPES), st.data())
def test_another_spelling_of_any_type_is_found(name: str, data: st.DataObject) -> None:
    words = name.split("_")
    sign = data.draw(st.sampled_from(["_", "-", " ", ".", "", "__"]))
    form = data.draw(st.sampled_from([str.lower, str.upper, str.title, str.capitalize]))
    around = data.draw(st.sampled_from(["{}", " {}", "{} ", "{}\t", "{}s", "item {}", "{}_event"]))
    other = around.format(form(sign.join(words)))
    assert meaning(other) == ("" if other == name else name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("impression", "view_item_list"),
        ("ad_impressions", "view_item_list"),
        ("shown", "view_item_list"),
        ("displayed", "view_item_list"),
        ("purchased", "purchase"),
        ("purchasing", "purchase"),
        ("purchse", "purchase"),
        ("buy", "purchase"),
        ("OrderCompleted", "purchase"),
        ("clicks", "select_item"),
        ("item_clicked", "select_item"),
        ("View ", "view_item"),
        ("pageView", "view_item"),
        ("liked", "like"),
        ("thumbs-up", "like"),
        ("rated", "rating"),
        ("hidden", "hide"),
        ("searched", "search"),
        ("\uff50urchase", "purchase"),
        ("pur\u200bchase", "purchase"),
    ],
)
def test_words_of_the_trade_are_found(name: str, meant: str) -> None:
    assert meaning(name) == meant
    assert f"did you mean {meant!r}" in hint(name)


@pytest.mark.parametrize(
    "name",
    ["share", "long_view", "play", "add_to_wishlist", "remove_from_cart", "follow", "購入", "x", "", "_", "🙂" * 30],
)
def test_other_names_are_the_products_own(name: str) -> None:
    assert hint(name) == ""


def test_what_the_models_know_is_doubted_only_if_it_is_misspelt_or_shown() -> None:
    own = ["click", "Purchase", "impression", "long_view"]
    assert [bool(hint(name, own)) for name in own] == [False, True, True, False]
    assert "did you mean 'long_view'?" in hint("Long-View", own)
    assert not hint("purchase", own)


def test_the_contract_names_every_documented_type() -> None:
    from pathlib import Path

    proto = (Path(__file__).parents[2] / "protos/penchant/v1/event.proto").read_text(encoding="utf-8")
    assert event_pb2.Event.DESCRIPTOR.fields_by_name["event_type"].number == 4
    for name in EVENT_TYPES:
        assert f"// - {name}" in proto or f", {name}" in proto
