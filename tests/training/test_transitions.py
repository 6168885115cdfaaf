"""Tests of the rings in the graph of transitions: distances, similarities and the places of a page."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.tables.schema import ITEMS
from tests.training.conftest import interactions
from training.data.split import Targets
from training.evaluation.events import rank_all
from training.models.baselines import popularity_of
from training.models.transitions import (
    SparseVectors,
    TransitionRingsBaseline,
    Transitions,
    _add_cosines,
    _add_cosines_plain,
    _find_rings,
    _find_rings_plain,
    choice_vectors,
    fill,
    text_vectors,
)

HISTORIES = [[0, 1], [0, 1], [0, 2], [1, 3], [2, 4], [3, 5], [6, 0]]


def rings(newest: int, repeats: bool = False) -> TransitionRingsBaseline:
    data = interactions(HISTORIES, items=8)
    ends = np.diff(data.offsets)
    transitions = Transitions.count(data, ends)
    return TransitionRingsBaseline(
        data, transitions, choice_vectors(data, ends), popularity_of(data, ends), newest=newest, repeats=repeats
    )


def user(number: int, position: int) -> Targets:
    return Targets(np.array([number]), np.array([position]))


def test_rings_are_ordered_by_similarity_and_transitions() -> None:
    baseline = rings(newest=1)
    around = baseline._around(0)
    # 0 was followed by 1 twice and by 2 once; two of the three who chose 1 are among the four who chose 0.
    first = 3 * 2.0
    assert around[1] == pytest.approx(first + 2 / math.sqrt(4 * 3) + 0.5, abs=1e-5)
    assert around[2] == pytest.approx(first + 1 / math.sqrt(4 * 2) + 0.5 * math.log(2) / math.log(3), abs=1e-5)
    assert around[[3, 4]] == pytest.approx(2 * 2.0, abs=1e-5)  # two transitions away, and no user chose both
    assert around[3] > around[4]  # more popular
    assert around[5] == pytest.approx(2.0, abs=1e-5)
    assert around[6] == pytest.approx(1 / 2, abs=1e-5)  # it leads to 0, and nothing leads to it
    scores = baseline.scores(user(6, 2))[0]  # after 6 and 0
    scores[[6, 0]] = -np.inf
    assert np.argsort(-scores, kind="stable")[:6].tolist() == [1, 2, 3, 4, 5, 7]


def test_two_newest_items_share_the_page() -> None:
    # After 6 and 0 the second newest is 6, whose ring holds 0 alone, had already; its second ring is the first of 0.
    scores = rings(newest=2).scores(user(6, 2))[0]
    assert np.argsort(-scores, kind="stable")[:4].tolist() == [1, 2, 3, 4]
    again = rings(newest=2, repeats=True).scores(user(6, 2))[0]
    # Now 0 may be shown: the page of item 0 has five places of its first ring and one of its second, 1, 2, 3, and 4 in
    # a place that the first ring could not fill; then comes the first ring of 6.
    assert np.argsort(-again, kind="stable")[:5].tolist() == [1, 2, 3, 4, 0]
    alone = rings(newest=2).scores(user(0, 1))[0]
    assert np.argsort(-alone, kind="stable")[:2].tolist() == [1, 2]


def free_items(first: int, second: int, third: int) -> npt.NDArray[np.float64]:
    sizes = ((3 * 2.0, first), (2 * 2.0, second), (2.0, third), (0.0, 4))
    return np.concatenate([ring + np.linspace(0.9, 0.1, size) for ring, size in sizes])


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((9, 3, 2), [0, 1, 2, 3, 4, 5, 6, 9, 10, 12]),
        # A ring that is too small leaves its places to what is left of those before it.
        ((12, 1, 2), [0, 1, 2, 3, 4, 5, 6, 7, 12, 13]),
        ((12, 0, 0), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        # Without any left, the page is filled from later rings at its end, and never with an item of no ring.
        ((3, 6, 1), [0, 1, 2, 3, 4, 9, 5, 6, 7, 8]),
        ((3, 0, 2), [0, 1, 2, 3, 4]),
    ],
)
def test_each_ring_has_its_places(sizes: tuple[int, int, int], expected: list[int]) -> None:
    assert fill(free_items(*sizes), (7, 2, 1)) == expected


def test_what_a_user_had_takes_no_place() -> None:
    # Twelve items followed 0; this user had the first eight of them, so the page is the other four, then the rest.
    histories = [[0, item] for item in range(1, 13)] + [[*range(1, 9), 0, 12]]
    data = interactions(histories, items=14)
    ends = np.diff(data.offsets)
    baseline = TransitionRingsBaseline(
        data, Transitions.count(data, ends), choice_vectors(data, ends), popularity_of(data, ends), newest=1,
        repeats=False,
    )  # fmt: skip
    ranking = rank_all([], [baseline], data, user(12, 9), repeats=False)[0]
    assert set(ranking.top[0][:4].tolist()) == {9, 10, 11, 12}
    assert ranking.ranks[0] < 4


def test_texts_are_weighed_by_how_rare_their_words_are() -> None:
    rows = [
        {"item_id": "a", "title": "red wool coat", "creator_id": "x"},
        {"item_id": "b", "title": "red cotton shirt", "creator_id": "y"},
        {"item_id": "c", "title": "wool hat", "creator_id": "x"},
        {"item_id": "d"},
    ]
    vectors = text_vectors(pa.Table.from_pylist(rows, schema=ITEMS))
    assert vectors is not None
    half, one = math.log(4 / 2), math.log(4)
    a, c = math.sqrt(3 * half**2 + one**2), math.sqrt(2 * half**2 + one**2)
    b = math.sqrt(half**2 + 3 * one**2)
    expected = [1, half**2 / (a * b), 2 * half**2 / (a * c), 0]
    assert vectors.cosines(0).tolist() == pytest.approx(expected, abs=1e-6)
    assert not vectors.cosines(3).any()
    assert text_vectors(ITEMS.empty_table()) is None


def test_nothing_is_counted_that_is_held_out() -> None:
    data = interactions([[0, 1, 2], [1, 0, 1]], items=3)
    transitions = Transitions.count(data, np.array([2, 2]))
    assert transitions.next.tolist() == [1, 0]
    assert transitions.starts.tolist() == [0, 1, 2, 2]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=40), st.integers(0, 11))
def test_the_kernel_finds_the_rings_of_its_plain_twin(edges: list[tuple[int, int]], source: int) -> None:
    data = interactions([list(edge) for edge in edges] or [[0]], items=12, repeats=True)
    graph = Transitions.count(data, np.diff(data.offsets))
    fast, plain = np.zeros(12, np.uint8), np.zeros(12, np.uint8)
    _find_rings(graph.starts, graph.next, source, 3, fast)
    _find_rings_plain(graph.starts, graph.next, source, 3, plain)
    assert fast.tolist() == plain.tolist()
    assert fast[source] == 0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4), st.floats(0.1, 3)), min_size=1, max_size=30))
def test_the_kernel_sums_cosines_as_its_plain_twin(entries: list[tuple[int, int, float]]) -> None:
    distinct = sorted({(item, dimension): weight for item, dimension, weight in entries}.items())
    owner = np.array([item for (item, _), _ in distinct])
    dimensions = np.array([dimension for (_, dimension), _ in distinct])
    weights = np.array([weight for _, weight in distinct])
    vectors = SparseVectors.build(8, owner, dimensions, weights)
    dense = np.zeros((8, 5))
    dense[owner, dimensions] = weights
    dense /= np.maximum(np.linalg.norm(dense, axis=1), 1e-9)[:, None]
    for item in range(8):
        assert vectors.cosines(item) == pytest.approx((dense @ dense[item]), abs=1e-5)
        part = slice(vectors.starts[item], vectors.starts[item + 1])
        outs = np.zeros(8, np.float32), np.zeros(8, np.float32)
        for add, out in zip((_add_cosines, _add_cosines_plain), outs, strict=True):
            add(vectors.dimensions[part], vectors.weights[part], vectors.begins, vectors.items, vectors.entries, out)
        assert outs[0] == pytest.approx(outs[1], abs=1e-6)
