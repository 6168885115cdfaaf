from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.impressions import _ahead, impressions
from features.declared import NONE_DECLARED
from features.errors import LeakError, SettingsError, TrainingError
from tests.training.conftest import TINY
from training.config import TrainConfig
from training.data.datasets import prepare
from training.data.impressions import NEVER, Examples
from training.evaluation.evaluate import evaluate
from training.evaluation.impressions import (
    DRAWS,
    METRICS,
    Probabilities,
    ScoredExamples,
    measure_action,
    metric_values,
    resample_metrics,
)
from training.train import train


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("simulated")
    prepare("simulated", None, base / "data", users=150, items=80, days=20)
    settings = {**TINY, "epochs": 4, "protocol": "temporal", "test_share": 0.3, "heads": 1}
    train(base / "data", base / "run", TrainConfig(**settings))
    return base / "data", base / "run"


def test_impressions_are_judged_by_what_followed(simulated: tuple[Path, Path]) -> None:
    log = simulated[1] / "evaluations.jsonl"
    before = log.read_text().count("\n") if log.exists() else 0
    found = evaluate([simulated[1]], "impressions")
    assert log.read_text().count("\n") == before + 1
    assert found["impressions"] > 1000
    actions = {name.partition("/")[0] for name in found["metrics"]}
    assert actions
    for action in actions:
        area = found["metrics"][f"{action}/auc"]
        assert 0 < area["low"] <= area["mean"] <= area["high"] < 1
        assert 0 <= found["metrics"][f"{action}/ece"]["mean"] < 1
        assert found["baselines"]["base_rate"][f"{action}/log_loss"] > 0
        rates = found["baselines"]["item_rate"]
        low, high = found["baseline_intervals"]["item_rate"][f"{action}/auc"]
        assert low <= rates[f"{action}/auc"] <= high
        # What was learned before the cut is the same at every moment after it.
        assert rates[f"{action}/gauc"] == pytest.approx(rates[f"{action}/slate_gauc"], nan_ok=True)
    json.dumps(found)


def test_a_true_probability_orders_a_person_against_the_truth_unless_asked_at_one_moment() -> None:
    # Half of all people click each of their two impressions, nearly always; the others hardly ever.
    rng = np.random.default_rng(0)
    eager = np.repeat(rng.random(20_000) < 0.5, 2)
    labels = rng.random(40_000) < np.where(eager, 0.9, 0.1)
    people = np.repeat(np.arange(20_000), 2)
    # After a click a person is eager with probability .9, so .82 click again; nothing is known of them before it.
    live = np.full(40_000, 0.5)
    live[1::2] = np.where(labels[::2], 0.82, 0.18)
    found = measure_action(labels, Probabilities(live, np.full(40_000, 0.5)), people)
    assert found["ece"]["mean"] < 0.01
    assert found["auc"]["low"] > 0.6
    # Of two impressions of which one is clicked, the second always stands on the wrong side of the first.
    assert found["gauc"]["high"] == 0.0
    assert found["slate_gauc"]["mean"] == 0.5
    # An item that is truly better is found at one moment, whatever is known of the person.
    better = np.where(labels, 0.6, 0.4)
    assert measure_action(labels, Probabilities(live, better), people)["slate_gauc"]["low"] == 1.0


def test_intervals_cover_the_whole_and_weigh_people() -> None:
    rng = np.random.default_rng(1)
    people = rng.integers(0, 80, 600)
    scores = rng.normal(size=600)
    labels = rng.random(600) < 1 / (1 + np.exp(-scores))
    probabilities = Probabilities(1 / (1 + np.exp(-scores)), rng.random(600))
    drawn, whole = resample_metrics(labels, probabilities, people), metric_values(labels, probabilities, people)
    assert drawn.shape == (DRAWS, len(METRICS))
    # The error of calibration alone is biased by drawing with repetition.
    for at, name in enumerate(METRICS[:4]):
        assert abs(drawn[:, at].mean() - whole[at]) < drawn[:, at].std(), name
    same = resample_metrics(labels, probabilities, people)
    assert same.tobytes() == drawn.tobytes()


def test_a_weight_counts_as_so_many_of_the_same() -> None:
    """Users of whom a third was logged stand for three each; unequal weights, as where the share was changed."""
    rng = np.random.default_rng(3)
    people = np.repeat(np.arange(120), 6)
    scores = np.round(rng.normal(size=people.size), 1)  # with ties
    labels = rng.random(people.size) < 1 / (1 + np.exp(-scores))
    probabilities = Probabilities(1 / (1 + np.exp(-scores)), rng.random(people.size))
    weights = np.where(people % 2, 3.0, 1.0)
    copies = [np.arange(people.size), *[np.flatnonzero(people % 2)] * 2]
    # Each copy of a user is another user.
    every = np.concatenate([people[at] + 1000 * n for n, at in enumerate(copies)])
    rows = np.concatenate(copies)
    alike = metric_values(labels[rows], Probabilities(probabilities.live[rows], probabilities.slate[rows]), every)
    found = metric_values(labels, probabilities, people, weights)
    assert found[:4] == pytest.approx(alike[:4])  # the bins of the last have as many lines each, not as much weight
    assert abs(found[4] - alike[4]) < 0.02
    assert metric_values(labels, probabilities, people, np.full(people.size, 4.0)) == pytest.approx(
        metric_values(labels, probabilities, people)
    )
    drawn = resample_metrics(labels, probabilities, people, weights)
    for at, name in enumerate(METRICS[:4]):
        assert abs(drawn[:, at].mean() - found[at]) < drawn[:, at].std(), name
    # The control: without weights the others decide.
    assert abs(metric_values(labels, probabilities, people)[0] - found[0]) > 1e-4


def test_a_margin_over_a_peer_weighs_as_the_metrics_do() -> None:
    rng = np.random.default_rng(4)
    size = 400
    no, none = np.zeros(size, np.int64), np.zeros(size, np.int32)
    users, labels = rng.integers(0, 40, size), rng.random((size, 1)) < 0.4
    weights = np.where(users % 2, 5.0, 1.0)
    action_times, values = np.where(labels, 1, NEVER), np.empty((size, 0), np.float32)
    examples = Examples(users, no, none, none, no, no, [""], action_times, weights, no, values, NONE_DECLARED)
    ranker, peer = (Probabilities(chances, chances) for chances in rng.random((2, size, 1)))
    batch: Any = None
    ahead = _ahead(["click"], ScoredExamples(examples, batch, batch, ranker), peer)
    values = [metric_values(labels[:, 0], chances.of(0), users, weights) for chances in (ranker, peer)]
    for at, name in enumerate(METRICS):
        assert ahead[f"click/{name}"]["mean"] == pytest.approx(values[0][at] - values[1][at]), name


STAND_IN = """#!{python}
# Answers for LightGBM: everybody's rates in training.
import json, sys
import numpy as np

given = np.load(sys.argv[2])
assert sys.argv[1].endswith("lightgbm_ranker.py")
assert given["train_x"].shape[1] == given["validation_x"].shape[1] == given["test_x"].shape[1]
assert len(given["train_x"]) == len(given["train_y"]) > len(given["validation_y"]) > 0
rates = given["train_y"].mean(0)
np.savez(sys.argv[3], chances=np.tile(rates, (len(given["test_x"]), 1)), choices=json.dumps([int(given["trials"])]))
print("0.0")
"""


def test_a_peer_gets_the_rankers_lines_and_stands_beside_it(simulated: tuple[Path, Path], tmp_path: Path) -> None:
    peer = tmp_path / "python"
    peer.write_text(STAND_IN.format(python=sys.executable))
    peer.chmod(0o755)
    found = impressions(simulated[1], peer, trials=2)
    assert (found["lightgbm"]["version"], found["lightgbm"]["choices"]) == ("0.0", [2])
    for action in found["actions"]:
        ours, ahead = found["metrics"][f"{action}/auc"]["mean"], found["ahead"][f"{action}/auc"]
        assert found["baselines"]["lightgbm"][f"{action}/auc"] == 0.5
        assert ahead["mean"] == pytest.approx(ours - 0.5)
        assert ahead["low"] <= ahead["mean"] <= ahead["high"]
    logged = json.loads((simulated[1] / "evaluations.jsonl").read_text().splitlines()[-1])
    assert logged["baselines"] == found["baselines"]
    with pytest.raises(SettingsError, match=r"lightgbm\.txt"):
        impressions(simulated[1], tmp_path / "gone")
    peer.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(TrainingError, match="lightgbm"):
        impressions(simulated[1], peer)


def test_search_ranks_the_catalogue_for_judged_queries(circles: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in circles.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    judged = [("space", f"i{row}", 3.0 if 10 <= row < 20 else 0.0) for row in range(40)] + [("nothing", "i0", 0.0)]
    columns = list(zip(*judged, strict=True))
    names = ("query", "item_id", "grade")
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), data / "judgments.parquet")
    train(data, tmp_path / "run", TrainConfig(**TINY))
    found = evaluate([tmp_path / "run"], "search")
    assert found["queries"] == 1
    assert found["metrics"]["ndcg@10"]["mean"] > 0.9
    assert found["metrics"]["recall@100"]["mean"] == 1
    # A run cannot find items that it does not know: each of them counts, not one for all.
    gone = [("space", f"gone{number}", 3.0) for number in range(10)]
    columns = list(zip(*judged, *gone, strict=True))
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), data / "judgments.parquet")
    found = evaluate([tmp_path / "run"], "search")
    assert found["metrics"]["recall@100"]["mean"] == 0.5


def test_what_is_missing_is_said(simulated: tuple[Path, Path], circles: Path, tmp_path: Path) -> None:
    train(circles, tmp_path / "run", TrainConfig(**{**TINY, "epochs": 1}))
    with pytest.raises(TrainingError, match="no table judgments"):
        evaluate([tmp_path / "run"], "search")
    with pytest.raises(LeakError, match="protocol=temporal"):
        evaluate([tmp_path / "run"], "impressions")
    with pytest.raises(TrainingError, match="no protocol"):
        evaluate([simulated[1]], "guess")
