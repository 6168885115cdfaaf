"""Tests of ratings: which values are taken for them, what a low one counts as, and that all parts agree on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.event_types import DOCUMENTED
from features.tables.dataset import open_dataset
from tests.training.conftest import TINY, interactions
from training.automatic import choose, default_actions, describe
from training.config import TrainConfig, load_config
from training.data.interactions import Interactions, item_vocabulary, read_interactions
from training.data.ratings import RATING, RatingScale, rating_scale
from training.data.split import held_out, split
from training.data.survey import DataSurvey, OrderEvidence
from training.evaluation.evaluate import evaluate
from training.models.baselines import popularity_of
from training.models.ease import gram_of
from training.models.item_sets import item_sets
from training.models.neighbors import neighbors_of
from training.models.scoring import seen_before
from training.models.transitions import Transitions
from training.run import load_run
from training.train import train

HISTORIES = [[0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 1]]
VALUES = [5, 1, 4, 2, 4, 2, np.nan, 5, 3, 4, 1]


def rated(least: float = -np.inf, values: list[float] = VALUES, name: str = RATING) -> Interactions:
    data = interactions(HISTORIES, items=4)
    return dataclasses.replace(
        data, values=np.array(values, np.float32), event_types=[name], least_value=least,
        target=data.target & ~(np.array(values) < least),
    )  # fmt: skip


def write(folder: Path, values: list[float | None], **more: list[str]) -> Path:
    users = [f"u{user}" for user, history in enumerate(HISTORIES) for _ in history]
    items = [f"i{item}" for history in HISTORIES for item in history]
    folder.mkdir()
    table = {"user_id": users, "item_id": items, "rating": values, "sequence": list(range(len(users))), **more}
    pq.write_table(pa.table(table), folder / "events.parquet")
    return folder


def test_a_low_rating_is_no_target_but_makes_its_item_seen(tmp_path: Path) -> None:
    values = [None if value != value else float(value) for value in VALUES]
    dataset = open_dataset(write(tmp_path / "data", values))
    _, vocabulary = item_vocabulary(dataset)
    config = TrainConfig(target_min_value=4.0, protocol="leave-one-out")
    data = read_interactions(dataset, vocabulary, config)
    # 5 1 4 2 / 4 2 - 5 / 3 4 1, and an event without a value counts.
    assert data.target.tolist() == [True, False, True, False, True, False, True, True, False, True, False]
    assert data.seen.all()
    # The last liking of each user is tested, whatever lower ratings come after it.
    targets = held_out(data, config, "leave-one-out")
    assert dict(zip(targets.users.tolist(), targets.positions.tolist(), strict=True)) == {0: 2, 1: 3, 2: 1}
    assert [rows.size for rows in seen_before(data, targets)] == [2, 3, 1]
    assert split(data, config).fit_end.tolist() == [2, 3, 1]
    every = read_interactions(dataset, vocabulary, TrainConfig(protocol="leave-one-out"))
    assert every.target.all()
    assert held_out(every, config, "leave-one-out").positions.tolist() == [3, 3, 2]


def test_a_low_rating_comes_first_and_a_liking_later_is_no_new_item(tmp_path: Path) -> None:
    table = {"user_id": ["u"] * 3, "item_id": ["a", "b", "a"], "value": [1.0, 5.0, 5.0], "sequence": [1, 2, 3]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(table), tmp_path / "data" / "events.parquet")
    dataset = open_dataset(tmp_path / "data")
    _, vocabulary = item_vocabulary(dataset)
    for repeats, expected in ((False, [False, True, False]), (True, [False, True, True])):
        data = read_interactions(dataset, vocabulary, TrainConfig(target_min_value=4.0, repeats=repeats))
        assert data.target.tolist() == expected


def test_statistics_and_baselines_count_likings_alone() -> None:
    data, every = rated(4.0), rated()
    ends = np.diff(data.offsets)
    assert popularity_of(data, ends).tolist() == [2, 0, 3, 1]
    assert popularity_of(every, ends).tolist() == [2, 3, 3, 3]
    # Liked together: 0 and 2 by both of the first two users, each with 3 by the second.
    assert neighbors_of(data, ends, 3)[0].tolist() == [[2, 3, -1], [-1, -1, -1], [0, 3, -1], [0, 2, -1]]
    expected = np.zeros((4, 4))
    for liked in ([0, 2], [0, 2, 3], [2]):
        expected[np.ix_(liked, liked)] += 1
    assert gram_of(item_sets(data, ends)).numpy().tolist() == expected.tolist()
    # Only a transition to a liked item says that it follows.
    transitions = Transitions.count(data, ends)
    assert transitions.next.tolist() == [2, 3, 2]
    assert transitions.counts.tolist() == [2, 1, 1]


def test_the_action_has_the_threshold_where_the_type_has_values() -> None:
    config = TrainConfig(target_min_value=4.0)
    assert default_actions(rated(4.0), config)[0].min_value == 4
    assert default_actions(rated(4.0, values=[np.nan] * 11), config)[0].min_value is None
    assert default_actions(rated(), TrainConfig())[0].min_value is None


@pytest.mark.parametrize(
    ("levels", "least"),
    [
        ((1, 2, 3, 4, 5), 4),
        ((0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5), 3.5),
        ((1, 2, 3, 4, 5, 6, 7, 8, 9, 10), 7),
        ((0, 1), 1),
        ((-1, 1), 1),
        ((1, 2, 3), 3),
    ],
)
def test_two_thirds_of_the_scale_like(levels: tuple[float, ...], least: float) -> None:
    scale = RatingScale(levels, (10,) * len(levels), 0)
    assert scale.least == least
    assert scale.in_words(least).startswith(f"values are ratings from {levels[0]:g} to {levels[-1]:g}: ")


def test_what_counts_as_what_is_told_and_too_few_likings_set_no_threshold() -> None:
    scale = RatingScale((1.0, 2.0, 3.0, 4.0, 5.0), (40, 30, 20, 6, 4), 7)
    assert scale.in_words(scale.least) == (
        "values are ratings from 1 to 5, and all 100 count as likings, and 7 without one too"
    )
    assert scale.in_words(3.0) == (
        "values are ratings from 1 to 5: 30 of 3 or more count as likings, and 7 without one too; 70 lower ones are "
        "not predicted and speak for no item, but stand in histories"
    )


def test_only_ratings_are_taken_for_ratings() -> None:
    assert RATING in {kind.name for kind in DOCUMENTED}
    many = interactions([[user % 4, (user + 1) % 4] for user in range(60)], items=4)
    levels = np.tile(np.arange(1, 7, dtype=np.float32), 20)

    def scale(values: np.ndarray, name: str = RATING, ends: int = 2) -> RatingScale | None:
        data = dataclasses.replace(many, values=values.astype(np.float32), event_types=[name])
        return rating_scale(data, np.full(60, ends))

    assert scale(levels) == RatingScale((1, 2, 3, 4, 5, 6), (20,) * 6, 0)
    halves = scale(levels, ends=1)  # nothing that is held out is looked at
    assert halves is not None
    assert halves.levels == (1, 3, 5)
    assert scale(levels, "purchase") is None  # an amount
    assert scale(np.arange(120)) is None  # too many different ones
    assert scale(np.ones(120)) is None
    assert scale(np.where(levels > 4, np.nan, levels)) == RatingScale((1, 2, 3, 4), (20,) * 4, 40)
    # A price among ratings: one threshold cannot mean both.
    data = dataclasses.replace(many, values=levels, event_types=[RATING, "purchase"])
    data.types[::2] = 2
    assert rating_scale(data, np.full(60, 2)) is None


def test_the_choice_is_told_and_an_explicit_setting_stands() -> None:
    order = OrderEvidence("signal", 50.0, 20.0, 0.3, 0.01, 1000)
    facts = DataSurvey(10, 4, 100, 10.0, 10, 12, order, 0.0, RatingScale((1, 2, 3, 4, 5), (20,) * 5, 0))
    assert choose(facts)["target_min_value"] == 4
    assert "target_min_value" not in choose(dataclasses.replace(facts, ratings=None))
    assert describe(facts, 4.0).endswith(
        "values are ratings from 1 to 5: 40 of 4 or more count as likings; 60 lower ones are not predicted and speak "
        "for no item, but stand in histories"
    )
    assert describe(facts, None).endswith("values are ratings from 1 to 5, and all 100 count as likings")
    assert load_config(None, ["target_min_value=3.5"]).target_min_value == 3.5


def test_a_run_learns_what_is_liked_and_not_what_is_rated(tmp_path: Path) -> None:
    # Everyone rates six of ten items; those of their own half 5, the others 1.
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{item}", 5.0 if item % 2 == user % 2 else 1.0, step)
        for user in range(120)
        for step, item in enumerate(rng.permutation(10)[:6])
    ]
    names = ("user_id", "item_id", "rating", "sequence")
    columns = {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data" / "events.parquet")
    config = TrainConfig(**{**TINY, "epochs": 2, "protocol": "leave-one-out", "target_min_value": 4.0})
    train(tmp_path / "data", tmp_path / "run", config)
    run = load_run(tmp_path / "run")
    assert run.result["actions"][0]["min_value"] == 4
    # The exported counts are those of likings: half of the training events.
    data = read_interactions(run.dataset, run.vocabulary, config)
    ends = split(data, config).train_end
    assert np.expm1(run.popularity).sum() == pytest.approx(popularity_of(data, ends).sum(), rel=1e-5)
    assert popularity_of(data, ends).sum() < 0.7 * ends.sum()
    evaluation = evaluate(tmp_path / "run")
    targets = held_out(data, config, "leave-one-out")
    assert (data.values[data.offsets[targets.users] + targets.positions] == 5).all()
    assert evaluation["targets"] == len(targets)
