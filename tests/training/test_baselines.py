from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from features.tables.dataset import open_dataset
from tests.training.conftest import interactions, published
from training.config import TrainConfig
from training.data.datasets import prepare
from training.data.interactions import item_vocabulary, read_interactions
from training.data.split import Split, Targets, held_out, split
from training.evaluation.events import METRICS, rank_all
from training.models.baselines import (
    EaseBaseline,
    MarkovBaseline,
    NeighborsBaseline,
    PopularBaseline,
    best_of,
    build_baselines,
    popularity_of,
)
from training.models.ease import ExactEase, gram_of
from training.models.item_sets import item_sets
from training.models.neighbors import neighbors_of
from training.models.transitions import Transitions


def one(person: int, position: int) -> Targets:
    return Targets(np.array([person]), np.array([position]))


def test_markov_counts_what_followed_and_breaks_ties_by_popularity() -> None:
    data = interactions([[0, 1], [0, 2], [3, 2], [4, 0]], items=6)
    ends = np.diff(data.offsets)
    scores = MarkovBaseline(data, Transitions.count(data, ends), popularity_of(data, ends)).scores(one(3, 2))[
        0
    ]  # after item 0
    # Items 1 and 2 followed 0 once each; 2 is more popular. Nothing else ever did, so popularity orders the rest.
    assert np.argsort(-scores, kind="stable").tolist() == [2, 1, 0, 3, 4, 5]
    assert scores[5] == 0


def test_nothing_is_learned_from_what_is_held_out() -> None:
    data = interactions([[0, 1, 2, 3], [0, 1, 4, 5]], items=6)
    config = TrainConfig(protocol="leave-one-out")
    ends = split(data, config).train_end
    assert popularity_of(data, ends).tolist() == [2, 2, 0, 0, 0, 0]
    scores = MarkovBaseline(data, Transitions.count(data, ends), popularity_of(data, ends)).scores(one(0, 1))[0]
    assert np.flatnonzero(scores >= 1).tolist() == [1]


def test_neighbors_are_cosines_of_the_sets_of_people() -> None:
    data = interactions([[0, 1], [0, 1, 2], [0, 3]], items=5)
    rows, scores = neighbors_of(data, np.diff(data.offsets), 3)
    assert rows[0].tolist() == [1, 2, 3]
    assert scores[0] == pytest.approx([2 / np.sqrt(6), 1 / np.sqrt(3), 1 / np.sqrt(3)])
    assert rows[4].tolist() == [-1, -1, -1]
    summed = NeighborsBaseline(data, rows, scores).scores(one(0, 2))[0]
    assert summed[2] == pytest.approx(1 / np.sqrt(2) + 0.9 / np.sqrt(3))


def test_ease_completes_a_checkerboard() -> None:
    # People of even number like even items; each lacks one of them, which EASE must name first.
    histories = [[item for item in range(person % 2, 10, 2) if item // 2 != person // 2 % 5] for person in range(200)]
    data = interactions(histories, items=10)
    solution = ExactEase(gram_of(item_sets(data, np.diff(data.offsets))), 500.0)
    scores = EaseBaseline(data, solution).scores(Targets(np.arange(20), np.full(20, 4)))
    for person, line in enumerate(scores[:20]):
        line[histories[person]] = -np.inf
        assert np.argmax(line) == person % 2 + 2 * (person // 2 % 5)


def test_popular_answers_everybody_alike() -> None:
    assert (
        PopularBaseline("popular", np.array([1.0, 3.0])).scores(Targets(np.arange(3), np.ones(3, np.int64))).tolist()
        == [[1.0, 3.0]] * 3
    )


# HR@10 and NDCG@10 over all people, measured independently on the same files.
PUBLISHED = {
    "sequences/ml-1m-sasrec.parquet": {
        "popular": (0.0369, 0.0180),
        "markov": (0.2144, 0.1259),
        "ease": (0.1084, 0.0535),
    },
    "sequences/amazon-beauty-s3rec.parquet": {"popular": (0.0110, 0.0053), "markov": (0.0665, 0.0438)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_check_values_of_the_published_files(name: str, tmp_path: Path) -> None:
    prepare("sequences", published(name), tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    config = TrainConfig(protocol="leave-one-out")
    _, vocabulary = item_vocabulary(dataset)
    data = read_interactions(dataset, vocabulary, config)
    targets = held_out(data, config, "leave-one-out")
    division = split(data, config)
    counts = popularity_of(data, division.train_end)
    chosen = [
        PopularBaseline("popular", counts),
        MarkovBaseline(data, Transitions.count(data, division.train_end), counts),
    ]
    if "ease" in PUBLISHED[name]:
        chosen.append(EaseBaseline(data, ExactEase(gram_of(item_sets(data, division.train_end)), 500.0)))
    placed = rank_all([], chosen, data, targets, repeats=False)
    found = {
        baseline.name: tuple(round(float(METRICS[metric](ranked.ranks).mean()), 4) for metric in ("hit@10", "ndcg@10"))
        for baseline, ranked in zip(chosen, placed, strict=True)
    }
    assert found == PUBLISHED[name]


def test_item_knn_knows_each_item_once_and_not_what_the_model_keeps() -> None:
    histories = [[0, 1], [0, 1], [0, 2], [3, 4], [0, 3, 4]]
    data = interactions([*histories, [0, 0, 3]], items=5, repeats=True)
    ends = np.diff(data.offsets)
    ends[-1] = 0
    division = Split(ends, ends, Targets(np.empty(0, np.int64), np.empty(0, np.int64)))
    narrow, wide = (
        {
            baseline.name: baseline.scores(one(5, 3))[0]
            for baseline in build_baselines(data, division, TrainConfig(neighbors=neighbors, repeats=True))[0]
        }
        for neighbors in (1, 50)
    )
    # 0 was chosen by four users, 1 by two of them; 3 and 4 by the same two, of whom one is among the four.
    near_0, near_3 = 2 / math.sqrt(8), 1.0
    assert wide["item_knn"][[1, 4]] == pytest.approx([near_0, near_3 + 1 / math.sqrt(8)])
    for name in ("item_knn", "item_to_item"):
        assert narrow[name].tolist() == wide[name].tolist()
    # With a decay each event counts by its place: 0 stands twice.
    assert wide["item_to_item"][1] == pytest.approx((0.9 + 0.81) * near_0)


def test_of_several_forms_validation_takes_the_best() -> None:
    data = interactions([[0, 1], [2, 1], [3, 1]], items=4)
    targets = Targets(np.arange(3), np.ones(3, np.int64))
    forms = [PopularBaseline(str(at), np.array(counts)) for at, counts in enumerate(([3.0, 0, 2, 1], [0, 3.0, 2, 1]))]
    assert best_of(iter(forms), data, targets, repeats=False).name == "1"
    assert best_of(iter(forms), data, targets.take(np.empty(0, np.int64)), repeats=False).name == "0"
