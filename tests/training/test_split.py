from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import TrainingError
from tests.training.conftest import interactions
from training.config import TrainConfig
from training.data.split import held_out, split

LEAVE_ONE_OUT = TrainConfig(protocol="leave-one-out")
TEMPORAL = TrainConfig(protocol="temporal", test_share=0.4)


def test_leave_one_out_keeps_the_last_two() -> None:
    data = interactions([[0, 1, 2, 3], [4, 5], [6, 7, 8]], items=9)
    division, test = split(data, LEAVE_ONE_OUT), held_out(data, LEAVE_ONE_OUT, "leave-one-out")
    assert division.train_end.tolist() == [2, 2, 1]  # two events are too few to hold one out
    assert (division.validation.users.tolist(), division.validation.positions.tolist()) == ([0, 2], [2, 1])
    assert (test.users.tolist(), test.positions.tolist()) == ([0, 2], [3, 2])
    assert test.rows(data).tolist() == [3, 8]


def test_only_what_is_new_to_the_person_is_a_target() -> None:
    data = interactions([[0, 1, 2, 1, 3, 0, 0]], items=4)
    assert held_out(data, LEAVE_ONE_OUT, "leave-one-out").positions.tolist() == [4]
    division = split(data, LEAVE_ONE_OUT)
    assert division.validation.positions.tolist() == [2]
    assert division.train_end.tolist() == [2]
    again = interactions([[0, 1, 2, 1, 3, 0, 0]], items=4, repeats=True)
    assert held_out(again, LEAVE_ONE_OUT, "leave-one-out").positions.tolist() == [6]


def test_a_user_who_tests_nothing_trains() -> None:
    """The last target of the second user is the first event, which has no history to be predicted from."""
    data = interactions([[0, 1, 2], [3, 3, 3]], items=4)
    assert held_out(data, LEAVE_ONE_OUT, "leave-one-out").users.tolist() == [0]
    division = split(data, LEAVE_ONE_OUT)
    assert (division.fit_end.tolist(), division.train_end.tolist()) == ([2, 3], [1, 3])


def test_temporal_cuts_at_the_quantile_for_everybody() -> None:
    data = interactions([[0, 1, 2], [3, 4, 5], [6]], items=7, times=[[10, 20, 90], [50, 80, 100], [95]])
    # Times 10 20 50 80 90 95 100; their .6 quantile is 86: what is later is test, without first events.
    successive = held_out(data, TEMPORAL, "temporal-successive")
    assert (successive.users.tolist(), successive.positions.tolist()) == ([0, 1], [2, 2])
    assert split(data, TEMPORAL).fit_end.tolist() == [2, 2, 0]
    last = held_out(data, TEMPORAL, "temporal-last")
    assert (last.users.tolist(), last.positions.tolist()) == ([0, 1], [2, 2])


def test_successive_asks_for_every_later_event_and_last_for_one() -> None:
    data = interactions([[0, 1, 2, 3]], items=4, times=[[1, 2, 3, 4]])
    config = TrainConfig(protocol="temporal", test_share=0.5)
    assert held_out(data, config, "temporal-successive").positions.tolist() == [2, 3]
    assert held_out(data, config, "temporal-last").positions.tolist() == [3]


def test_a_temporal_split_needs_times() -> None:
    data = interactions([[0, 1, 2]], items=3)
    with pytest.raises(TrainingError, match="leave-one-out"):
        split(data, TEMPORAL)


histories = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=12)


@given(histories, st.booleans())
def test_what_is_trained_on_comes_before_what_validates_before_what_tests(people: list[list[int]], timed: bool) -> None:
    rng = np.random.default_rng(0)
    times = [sorted(rng.integers(0, 50, len(some)).tolist()) for some in people] if timed else None
    data = interactions(people, items=10, times=times)
    config = TEMPORAL if timed else LEAVE_ONE_OUT
    division = split(data, config)
    test = held_out(data, config, "temporal-successive" if timed else "leave-one-out")
    first_test = np.full(len(people), 1000)
    np.minimum.at(first_test, test.users, test.positions)
    assert (division.train_end <= division.fit_end).all()
    assert (division.fit_end <= first_test).all()
    for person, position in zip(division.validation.users, division.validation.positions, strict=True):
        assert division.train_end[person] <= position < division.fit_end[person]
        assert data.target[data.offsets[person] + position]
    assert data.target[data.offsets[test.users] + test.positions].all()
