from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from features.errors import LeakError
from tests.training.conftest import TINY, interactions
from training.baselines import Popular
from training.config import TrainConfig
from training.evaluate import evaluate, place, place_all
from training.ranking import ranks_of
from training.split import Targets
from training.train import train


def test_ties_count_against_the_target() -> None:
    scores = np.array([[1.0, 2.0, 2.0, 0.0], [1.0, 2.0, 2.0, -np.inf], [5.0, 5.0, 5.0, 5.0]])
    assert ranks_of(scores, np.array([2, 3, 0], np.int32)).tolist() == [1, 4, 3]
    assert ranks_of(np.full((1, 3), np.nan), np.array([0], np.int32)).tolist() == [3]


def test_what_the_person_had_is_masked_and_what_comes_later_is_not() -> None:
    data = interactions([[0, 1, 2, 3]], items=5)
    popular = Popular("popular", np.array([9.0, 8.0, 1.0, 7.0, 6.0]))
    ranked = place_all([], [popular], data, Targets(np.array([0]), np.array([2])), repeats=False)[0]
    # 0 and 1 are masked; 3 and 4 stand before the target 2.
    assert ranked.ranks.tolist() == [2]
    again = place_all([], [popular], data, Targets(np.array([0]), np.array([2])), repeats=True)[0]
    assert again.ranks.tolist() == [4]


def test_what_is_shown_are_the_best() -> None:
    scores = np.arange(40, dtype=np.float32)[None]
    assert sorted(place(scores, np.array([0], np.int32)).shown[0].tolist()) == list(range(30, 40))


@pytest.fixture(scope="module")
def runs(circles: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    base = tmp_path_factory.mktemp("runs")
    made: dict[str, list[Path]] = {}
    for protocol, seeds in (("leave-one-out", (0, 1)), ("temporal", (0,)), ("none", (0,))):
        for seed in seeds:
            out = base / f"{protocol}-{seed}"
            settings = {**TINY, "epochs": 20, "protocol": protocol, "seed": seed, "test_share": 0.3}
            train(circles, out, TrainConfig(**settings))
            made.setdefault(protocol, []).append(out)
    return made


def test_a_run_beats_popularity_with_certainty_and_says_so(runs: dict[str, list[Path]]) -> None:
    found = evaluate(runs["leave-one-out"], "leave-one-out")
    assert found["seeds"] == [0, 1]
    assert found["users"] == found["targets"] == 160
    assert found["items"] == 40
    mean, low, high = (found["metrics"]["ndcg@10"][key] for key in ("mean", "low", "high"))
    assert low <= mean <= high
    assert mean == pytest.approx(np.mean(found["by_seed"]["ndcg@10"]))
    assert found["paired"]["popular"]["ndcg@10"]["low"] > 0
    difference = mean - found["baselines"]["popular"]["ndcg@10"]
    assert found["paired"]["popular"]["ndcg@10"]["mean"] == pytest.approx(difference)
    assert set(found["baselines"]) == {"popular", "recent_popular", "markov", "item_to_item", "ease"}
    assert found["baselines"]["markov"]["hit@10"] > 0.9  # a walk round a circle is a first-order chain
    assert not math.isnan(found["novelty@10"])
    json.dumps(found)


def test_every_test_evaluation_is_remembered(runs: dict[str, list[Path]]) -> None:
    log = runs["temporal"][0] / "evaluations.jsonl"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    for protocol in ("temporal-successive", "temporal-last"):
        found = evaluate(runs["temporal"], protocol)
        assert found["protocol"] == protocol
    assert len(log.read_text().splitlines()) == before + 2


@pytest.mark.parametrize(
    ("trained", "asked"),
    [("none", "leave-one-out"), ("leave-one-out", "temporal-last"), ("temporal", "leave-one-out")],
)
def test_a_run_that_has_seen_the_test_is_refused(runs: dict[str, list[Path]], trained: str, asked: str) -> None:
    with pytest.raises(LeakError, match="--set protocol="):
        evaluate(runs[trained], asked)
