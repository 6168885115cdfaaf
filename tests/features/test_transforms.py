"""Words become the same tokens wherever they are written."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from features.transforms import ItemInputShapes, item_inputs, item_text, query_inputs, text_tokens, token_buckets, words

SHAPES = ItemInputShapes(token_buckets=100, max_tokens=6, category_buckets=10, max_categories=2, creator_buckets=10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Berries & Cherries", ["berry", "cherry"]),
        ("Glasses, gas, bus", ["glasse", "ga", "bus"]),
        ("\uff26\uff35\uff2c\uff2c width \ufb01sh", ["full", "width", "fish"]),
        ("ÄPFEL\tund_birnen 2024", ["äpfel", "und_birnen", "2024"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_singular_and_plural_share_a_token():
    assert text_tokens("red shoes").tolist() == text_tokens("Red SHOE").tolist()


def test_buckets_leave_zero_for_padding():
    assert token_buckets(np.array([0, 99, 100], np.uint32), 100).tolist() == [1, 100, 1]


def test_item_inputs_are_padded_cut_and_typed():
    inputs = item_inputs(
        [
            {"item_id": "a", "title": "one two three four five six seven", "categories": ["x", "y", "z"], "price": 0.0},
            {"item_id": "b", "title": None, "categories": None, "creator_id": "m", "price": float("nan")},
        ],
        SHAPES,
    )
    assert inputs["tokens"].shape == (2, 6)
    assert (inputs["tokens"][0] > 0).all()
    assert not inputs["tokens"][1].any()
    assert inputs["categories"].shape == (2, 2)
    assert inputs["creators"][0] == 0
    assert inputs["creators"][1] > 0
    assert inputs["prices"].tolist() == [0.0, -1.0]


def test_an_item_and_a_query_share_their_tokens():
    item = {"title": "Sourdough Bread", "categories": ["BAKERY"]}
    assert item_text(item) == "Sourdough Bread BAKERY"
    query = query_inputs("sourdough breads", SHAPES)["tokens"][0]
    assert query[:2].tolist() == item_inputs([item], SHAPES)["tokens"][0, :2].tolist()


def test_the_words_of_queries_are_not_remembered():
    text_tokens("warm")
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(5000):
            text_tokens(f"word{number:x}")
        assert tracemalloc.get_traced_memory()[0] - before < 50_000  # ten bytes each; to keep them takes 170
    finally:
        tracemalloc.stop()
