"""The bytes of a page are those of its messages."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from penchant.v1 import ranking_pb2
from serving.services.page import page_bytes

IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), max_size=20)


def plain(ids, scores, propensities, probabilities, names, proposed) -> ranking_pb2.Slate:
    """The page, an object for each item."""
    return ranking_pb2.Slate(
        items=[
            ranking_pb2.RankedItem(
                item_id=item_id,
                score=scores[at],
                action_probabilities=()
                if probabilities is None or not probabilities[at].size or math.isnan(probabilities[at, 0])
                else probabilities[at].tolist(),
                sources=[name for name, does in zip(names, proposed[at], strict=True) if does],
                propensity=propensities[at],
            )
            for at, item_id in enumerate(ids)
        ]
    )


@given(IDS, st.integers(0, 4), st.integers(0, 200), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_page_is_written_as_its_messages_are(ids, actions, sources, judged, seed):
    rng = np.random.default_rng(seed)
    odd = np.array([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, 3.5], np.float32)
    scores, propensities = rng.choice(odd, len(ids)), rng.choice(odd, len(ids)).astype(np.float64)
    probabilities = rng.choice(odd, (len(ids), actions)) if judged else None
    names = [f"source {number}" * (number + 1) for number in range(sources % 5)]
    proposed = (rng.random((len(names), len(ids))) < 0.5).T
    page = page_bytes(ids, scores, propensities, probabilities, names, proposed)
    expected = plain(ids, scores, propensities, probabilities, names, proposed)
    # NaN is no equal of itself, the bytes are.
    found = ranking_pb2.Slate.FromString(page)
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    # Nor does the kernel write what the library would not: the sizes differ by defaults alone, which it leaves out.
    assert len(page) - found.ByteSize() <= 14 * len(ids) + 5


def test_items_are_added_to_what_a_message_has():
    message = ranking_pb2.Slate(request_id="r", items=[ranking_pb2.RankedItem(item_id="first")])
    message.MergeFromString(page_bytes(["ü"], np.ones(1), np.ones(1), None, ["s"], np.ones((1, 1), np.bool_)))
    assert [item.item_id for item in message.items] == ["first", "ü"]
    assert (message.request_id, list(message.items[1].sources)) == ("r", ["s"])
