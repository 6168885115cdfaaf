from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.conftest import interactions
from training.data.interactions import Interactions
from training.models import neighbors
from training.models.neighbors import neighbors_of

Pair = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


def plain_neighbors_of(data: Interactions, ends: npt.NDArray[np.int64], keep: int) -> Pair:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "_cosines", neighbors._cosines_plain)
        return neighbors_of(data, ends, keep)


def equal(fast: Pair, plain: Pair) -> bool:
    return all(np.array_equal(*pair) for pair in zip(fast, plain, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=15), min_size=1, max_size=12),
    st.integers(1, 12),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_counted_pairs_give_what_all_pairs_give(
    histories: list[list[int]], keep: int, held_out: int, threads: int
) -> None:
    # Few users and items: most cosines are equal to others, so the order of ties is tested with the cosines.
    data = interactions(histories, items=12)
    ends = np.maximum(np.diff(data.offsets) - held_out, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fast = neighbors_of(data, ends, keep)
    finally:
        torch.set_num_threads(before)
    assert equal(fast, plain_neighbors_of(data, ends, keep))


def test_many_ties_at_the_last_place_go_to_the_lower_rows() -> None:
    # One user chose everything, so every cosine of an item is 1.
    data = interactions([list(range(9, -1, -1))], items=10)
    rows, scores = neighbors_of(data, np.diff(data.offsets), 3)
    assert rows[0].tolist() == [1, 2, 3]
    assert rows[9].tolist() == [0, 1, 2]
    assert (scores == 1).all()


def test_only_the_newest_events_of_a_long_history_count() -> None:
    data = interactions([list(range(neighbors.HISTORY_EVENTS + 5))], items=300)
    rows, _ = neighbors_of(data, np.diff(data.offsets), 300)
    assert (rows[:5] == -1).all()
    assert np.sort(rows[5][rows[5] >= 0]).tolist() == list(range(6, neighbors.HISTORY_EVENTS + 5))


def test_events_past_the_limit_are_drawn_by_user_and_more_in_a_large_catalogue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = interactions([[2 * user, 2 * user + 1] for user in range(50)], items=100)
    monkeypatch.setattr(neighbors, "NEIGHBOR_EVENTS", 20)
    monkeypatch.setattr(neighbors, "NEIGHBOR_EVENTS_PER_ITEM", 0)
    ends = np.diff(data.offsets)
    few = neighbors_of(data, ends, 1)[0]
    assert (few >= 0).sum() == 20
    monkeypatch.setattr(neighbors, "NEIGHBOR_EVENTS_PER_ITEM", 1)
    assert (neighbors_of(data, ends, 1)[0] >= 0).all()


def test_a_catalogue_without_choices_has_no_neighbors() -> None:
    data = interactions([[0], [1]], items=3)
    rows, scores = neighbors_of(data, np.zeros(2, np.int64), 2)
    assert (rows == -1).all()
    assert (scores == 0).all()


def test_items_that_nobody_chose_cost_next_to_nothing() -> None:
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 1_000, 20).tolist() for _ in range(1_000)]
    small, large = interactions(histories, items=1_000), interactions(histories, items=50_000)
    ends = np.diff(small.offsets)

    def seconds(data: Any) -> float:
        began = time.perf_counter()
        neighbors_of(data, ends, 10)
        return time.perf_counter() - began

    seconds(small)
    pairs = [(seconds(small), seconds(large)) for _ in range(5)]
    # A pass over the catalogue for each item makes this ratio several hundred.
    assert min(large_s for _, large_s in pairs) < 12 * min(small_s for small_s, _ in pairs)
    rows, scores = neighbors_of(large, ends, 10)
    assert equal((rows[:1_000], scores[:1_000]), neighbors_of(small, ends, 10))
