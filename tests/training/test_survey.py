"""Tests that a survey finds the order and the repeats that were planted, and none where there are none."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from tests.training.conftest import interactions
from training.data.interactions import Interactions
from training.data.survey import SHARED, common_users, common_users_plain, evidence_of_order, repeated_share, survey

USERS, ITEMS, TOPICS, LENGTH = 400, 120, 12, 24
NAMES = [f"item {number * 7919 % 997}" for number in range(ITEMS)]


def _walks(seed: int, times: bool = True) -> Interactions:
    """Users who stay with a topic for some events and go on to another: neighbouring events are alike."""
    rng = np.random.default_rng(seed)
    histories = []
    for _ in range(USERS):
        # A few topics a user, so that items of one topic have more users in common.
        liked = rng.choice(TOPICS, 3, replace=False)
        history: list[int] = []
        for topic in liked:
            history += (topic * (ITEMS // TOPICS) + rng.permutation(ITEMS // TOPICS)[: LENGTH // 3]).tolist()
        histories.append(history)
    stamps = [[1 + place for place in range(len(history))] for history in histories]
    return interactions(histories, ITEMS, stamps if times else None, repeats=True)


def _order_within(data: Interactions, key: npt.NDArray[np.float64]) -> Interactions:
    return dataclasses.replace(data, rows=data.rows[np.lexsort((key, data.owner()))])


def test_order_that_was_planted_is_found_and_its_shuffled_copies_have_none() -> None:
    true = [evidence_of_order(_walks(seed), NAMES, seed).order for seed in range(5)]
    data = _walks(0)
    shuffled = [
        evidence_of_order(_order_within(data, np.random.default_rng(seed).random(data.rows.size)), NAMES, seed).order
        for seed in range(20)
    ]
    assert true == ["signal"] * 5
    assert shuffled == ["none"] * 20


def test_transitions_among_items_that_all_users_choose_are_an_order() -> None:
    # Every user has every item, so all items are alike; the one after an item is the next of a circle.
    starts = np.random.default_rng(0).integers(0, 15, 200)
    data = interactions([[(start + step) % 15 for step in range(15)] for start in starts], 15, repeats=True)
    evidence = evidence_of_order(data, NAMES[:15])
    assert abs(evidence.likeness) < 1e-6
    assert evidence.transitions > 10
    assert evidence.order == "signal"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("text", "item id, as text"),
        ("number", "item id"),
        ("popularity", "popularity"),
        ("value", "value"),
        ("hidden", SHARED),
    ],
)
def test_events_without_times_that_are_sorted_by_a_property_have_no_order_of_time(key: str, name: str) -> None:
    data = _walks(1, times=False)
    rng = np.random.default_rng(2)
    counts = np.bincount(data.rows, minlength=ITEMS) + rng.random(ITEMS) / 2
    data = dataclasses.replace(data, values=rng.random(data.rows.size).astype(np.float32))
    numbers = rng.permutation(ITEMS)
    names = [str(number) for number in numbers] if key == "number" else NAMES
    by_item = {"text": np.argsort(np.argsort(np.array(NAMES))), "number": numbers, "popularity": -counts}
    by_item["hidden"] = rng.permutation(ITEMS)
    keys = data.values if key == "value" else by_item[key][data.rows]
    order = np.lexsort((keys, data.owner()))
    ordered = dataclasses.replace(data, rows=data.rows[order], values=data.values[order])
    evidence = evidence_of_order(ordered, names)
    assert (evidence.order, evidence.sorted_by) == ("sorted", name)
    # With times the same rows are what users did, and the same data as it came are not sorted.
    assert evidence_of_order(dataclasses.replace(ordered, ordered_only=False), names).sorted_by == ""
    assert evidence_of_order(data, names).order == "signal"


def test_few_users_leave_order_open_and_it_is_kept() -> None:
    few = interactions([[0, 1, 2], [2, 1, 0], [1, 0, 2]], 3, repeats=True)
    found = survey(few, np.diff(few.offsets), NAMES[:3])
    assert found.order.order == "unclear"
    assert found.ordered


def test_repeats_are_found_where_they_were_planted() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        data = _walks(seed)
        assert repeated_share(data) == 0
        planted = data.rows.copy()
        share = float(rng.uniform(0.1, 0.5))
        chosen = np.flatnonzero((rng.random(planted.size) < share) & (np.arange(planted.size) % LENGTH > 3))
        for at in chosen:
            start = at - at % LENGTH
            planted[at] = planted[rng.integers(start, at - 1)]
        found = survey(dataclasses.replace(data, rows=planted), np.diff(data.offsets), NAMES)
        assert found.repeats
        assert found.repeated == pytest.approx(share * (LENGTH - 4) / (LENGTH - 1), abs=0.05)
        assert not survey(data, np.diff(data.offsets), NAMES).repeats


def test_what_is_logged_twice_in_a_row_is_no_repeat() -> None:
    doubled = interactions([[0, 0, 1, 1, 2, 2]] * 5, 3, repeats=True)
    assert repeated_share(doubled) == 0
    back = interactions([[0, 1, 0]] * 5, 3, repeats=True)
    assert repeated_share(back) == 0.5


def test_the_held_out_end_of_a_history_is_not_surveyed() -> None:
    data = _walks(0)
    found = survey(data, np.full(USERS, 5), NAMES)
    assert (found.events, found.median_length) == (5 * USERS, 5)


def test_the_kernel_counts_common_users_as_its_plain_twin() -> None:
    rng = np.random.default_rng(0)
    sets = [np.sort(rng.choice(40, rng.integers(0, 20), replace=False)) for _ in range(25)]
    starts = np.concatenate([[0], np.cumsum([part.size for part in sets])]).astype(np.int64)
    users, (first, second) = np.concatenate(sets).astype(np.int64), rng.integers(0, 25, (2, 300))
    assert (
        common_users(starts, users, first, second).tolist() == common_users_plain(starts, users, first, second).tolist()
    )
