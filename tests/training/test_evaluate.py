from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import LeakError, TrainingError
from tests.training.conftest import TINY, interactions
from training.config import TrainConfig
from training.data.split import Targets
from training.evaluation.evaluate import evaluate
from training.evaluation.events import Ranking, _compared, _mean_values, _values, best_baseline, rank, rank_all
from training.models.baselines import OwnItemsBaseline, PopularBaseline
from training.models.scoring import had_before, ranks_of
from training.train import train


def test_ties_count_against_the_target() -> None:
    scores = np.array([[1.0, 2.0, 2.0, 0.0], [1.0, 2.0, 2.0, -np.inf], [5.0, 5.0, 5.0, 5.0]])
    assert ranks_of(scores, np.array([2, 3, 0], np.int32)).tolist() == [1, 4, 3]
    assert ranks_of(np.full((1, 3), np.nan), np.array([0], np.int32)).tolist() == [3]


def test_what_the_person_had_is_masked_and_what_comes_later_is_not() -> None:
    data = interactions([[0, 1, 2, 3]], items=5)
    popular = PopularBaseline("popular", np.array([9.0, 8.0, 1.0, 7.0, 6.0]))
    ranked = rank_all([], [popular], data, Targets(np.array([0]), np.array([2])), repeats=False)[0]
    # 0 and 1 are masked; 3 and 4 stand before the target 2.
    assert ranked.ranks.tolist() == [2]
    again = rank_all([], [popular], data, Targets(np.array([0]), np.array([2])), repeats=True)[0]
    assert again.ranks.tolist() == [4]


def test_own_items_come_by_how_often_and_then_by_how_late() -> None:
    data = interactions([[0, 1, 1, 2, 3]], items=5, repeats=True)
    baseline = OwnItemsBaseline(data, np.array([1.0, 2.0, 1.0, 1.0, 9.0]), by_count=True)
    ranked = rank_all([], [baseline], data, Targets(np.zeros(2, np.int64), np.array([4, 3])), repeats=True)[0]
    # 1 twice, then 2 before 0, for it came later; what was never had follows by popularity: 4, and then 3.
    scores = baseline.scores(Targets(np.zeros(1, np.int64), np.array([4])))[0]
    assert np.argsort(-scores).tolist() == [1, 2, 0, 4, 3]
    assert ranked.ranks.tolist() == [4, 4]  # 2 and 3 are as popular, and a tie counts against the target


def test_repeats_and_new_items_are_reported_apart() -> None:
    # Three users; the targets are 0 (had before), 2 (new) and 1 (had before).
    data = interactions([[0, 1, 0], [0, 1, 2], [1, 0, 1]], items=4, repeats=True)
    targets = Targets(np.arange(3), np.full(3, 2))
    assert had_before(data, targets).tolist() == [True, False, True]
    popular = PopularBaseline("popular", np.array([4.0, 3.0, 2.0, 1.0]))
    placed = rank_all([], [popular], data, targets, repeats=True)
    assert placed[0].ranks.tolist() == [0, 2, 1]
    model = _mean_values([Ranking(np.array([1, 11, 3]), np.zeros((3, 4), np.int64))])
    second, third, fourth = 1 / math.log2(3), 1 / math.log2(4), 1 / math.log2(5)
    repeats = _compared(model, {"popular": _values(placed[0])}, targets, np.array([0, 2]))
    assert repeats["metrics"]["ndcg@10"]["mean"] == pytest.approx((second + fourth) / 2)
    assert repeats["metrics"]["hit@10"]["mean"] == 1
    assert repeats["baselines"]["popular"] == pytest.approx(
        {"hit@10": 1, "ndcg@10": (1 + second) / 2, "mrr@10": 0.75, "recall@100": 1}
    )
    assert repeats["paired"]["popular"]["ndcg@10"]["mean"] == pytest.approx((fourth - 1) / 2)
    new = _compared(model, {"popular": _values(placed[0])}, targets, np.array([1]))
    assert new["metrics"]["ndcg@10"]["mean"] == 0
    assert new["paired"]["popular"]["ndcg@10"]["mean"] == pytest.approx(-third)


def test_figures_by_user_count_each_user_once() -> None:
    # Three targets of one user, of which the first item is right twice, and one of another user, whose is never.
    targets = Targets(np.array([0, 0, 0, 1]), np.array([1, 2, 3, 1]))
    model = {"ndcg@10": np.array([1.0, 1.0, 0.0, 0.0])}
    baselines = {"popular": {"ndcg@10": np.array([0.0, 0.0, 0.0, 1.0])}, "ease": {"ndcg@10": np.full(4, 0.4)}}
    compared = _compared(model, baselines, targets, np.arange(4))
    assert compared["metrics"]["ndcg@10"]["mean"] == pytest.approx(2 / 4)
    by_user = compared["by_user"]
    assert by_user["users"] == 2
    assert by_user["metrics"]["ndcg@10"]["mean"] == pytest.approx((2 / 3 + 0) / 2)
    assert by_user["baselines"]["popular"]["ndcg@10"] == pytest.approx((0 + 1) / 2)
    paired = by_user["paired"]["popular"]["ndcg@10"]
    assert paired["mean"] == pytest.approx((2 / 3 - 1) / 2)
    # Two users, so a draw has both, or one of them twice.
    assert (paired["low"], paired["high"]) == pytest.approx((-1, 2 / 3))
    # Which baseline is the best, and if the model is ahead, may differ.
    assert (compared["best_baseline"]["name"], by_user["best_baseline"]["name"]) == ("ease", "popular")
    # With one target each, there is nothing to tell apart.
    assert "by_user" not in _compared(model, baselines, targets, np.array([0, 3]))


def test_cold_targets_are_a_part_with_a_best_baseline(tmp_path: Path) -> None:
    rows = [(f"u{user}", f"i{(user + step) % 8}", step) for user in range(40) for step in range(5)]
    # The last event of every fourth user is of an item that no one had.
    rows += [(f"u{user}", "new" if user % 4 == 0 else f"i{(user + 5) % 8}", 5) for user in range(40)]
    names = ("user_id", "item_id", "sequence")
    columns = {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data" / "events.parquet")
    train(tmp_path / "data", tmp_path / "run", TrainConfig(**{**TINY, "epochs": 1, "protocol": "leave-one-out"}))
    evaluation = evaluate([tmp_path / "run"], "leave-one-out")
    cold = evaluation["parts"]["cold"]
    assert (evaluation["cold"], cold["targets"]) == (10, 10)
    warm, both = evaluation["metrics"]["hit@10"]["mean"], evaluation["with_cold"]["model"]["hit@10"]
    assert both == pytest.approx((30 * warm + 10 * cold["metrics"]["hit@10"]["mean"]) / 40)
    assert cold["best_baseline"]["sentence"]


def test_a_run_that_recommends_repeats_says_how_good_it_is_at_them(tmp_path: Path) -> None:
    # Everybody goes round one of two circles of five items, twice; one in four ends with an item of the other circle.
    rows = []
    for user in range(160):
        own = 5 * (user % 2)
        walk = [own + (user + step) % 5 for step in range(9)] + [
            5 + user % 5 if user % 4 == 0 else own + (user + 9) % 5
        ]
        rows += [(f"u{user}", f"i{item}", "purchase", step) for step, item in enumerate(walk)]
    names = ("user_id", "item_id", "event_type", "sequence")
    columns = {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data" / "events.parquet")
    config = TrainConfig(**{**TINY, "epochs": 3, "protocol": "leave-one-out", "repeats": True})
    train(tmp_path / "data", tmp_path / "run", config)
    parts = evaluate([tmp_path / "run"], "leave-one-out")["parts"]
    assert {name: part["targets"] for name, part in parts.items()} == {"repeats": 120, "new": 40, "new_alone": 40}
    assert set(parts["new"]["paired"]) == {
        "popular", "markov", "item_to_item", "item_knn", "transition_rings", "ease", "ease_local", "most_used",
        "most_recent",
    }  # fmt: skip
    # Five own items stand before what is new; without them, five equally popular ones tie, which counts against it.
    assert parts["new"]["baselines"]["most_used"]["mrr@10"] == pytest.approx(1 / 10)
    assert parts["new_alone"]["baselines"]["most_used"]["mrr@10"] == pytest.approx(1 / 5)
    assert parts["new_alone"]["metrics"]["mrr@10"]["mean"] >= parts["new"]["metrics"]["mrr@10"]["mean"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f"leave-one-out: {name}" in page for name in parts)
    assert all(f"of {part['best_baseline']['name']}, the best baseline" in page for part in parts.values())
    assert "the best baseline" in page
    assert "Left out: recent_popular, as the data set has no times." in page


def test_a_test_of_new_items_alone_is_refused(tmp_path: Path) -> None:
    """Its figures would be the mean of nothing."""
    rows = [(f"u{user}", f"i{(user + step) % 5}", step) for user in range(20) for step in range(4)]
    rows += [(f"u{user}", f"new{user}", 4) for user in range(20)]
    names = ("user_id", "item_id", "sequence")
    columns = {name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    (tmp_path / "data").mkdir()
    table = pa.table({**columns, "event_type": ["purchase"] * len(rows)})
    pq.write_table(table, tmp_path / "data" / "events.parquet")
    train(tmp_path / "data", tmp_path / "run", TrainConfig(**{**TINY, "epochs": 1, "protocol": "leave-one-out"}))
    with pytest.raises(TrainingError, match="no training event names an item of the 20 events"):
        evaluate([tmp_path / "run"], "leave-one-out")


def test_what_is_shown_are_the_best_of_those_that_may_be_shown() -> None:
    scores = np.random.default_rng(0).permutation(40).astype(np.float32)[None]
    assert rank(scores, np.array([0], np.int32)).top[0].tolist() == np.argsort(-scores[0])[:10].tolist()
    # Of five items one is masked, and a page has ten places: nothing that the user had is on it.
    few = np.array([[3.0, -np.inf, 5.0, 1.0, 4.0]], np.float32)
    assert rank(few, np.array([0], np.int32)).top.tolist() == [[2, 4, 0, 3, -1]]


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
    names = {
        "popular",
        "recent_popular",
        "markov",
        "item_to_item",
        "item_knn",
        "transition_rings",
        "ease",
        "ease_local",
    }
    assert set(found["baselines"]) == names
    assert set(found["baselines_left_out"]) == {"most_used", "most_recent"}
    assert found["best_baseline"]["name"] in names
    assert "best baseline" in found["best_baseline"]["sentence"]
    assert found["baselines"]["markov"]["hit@10"] > 0.9  # a walk round a circle is a first-order chain
    assert not math.isnan(found["novelty@10"])
    json.dumps(found)


def test_every_test_evaluation_is_remembered(runs: dict[str, list[Path]]) -> None:
    log = runs["temporal"][0] / "evaluations.jsonl"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    for protocol in ("temporal-successive", "temporal-last"):
        found = evaluate(runs["temporal"], protocol)
        assert found["protocol"] == protocol
        several = found["targets"] > found["users"]
        assert ("by_user" in found) == several == (protocol == "temporal-successive")
    page = (runs["temporal"][0] / "report.html").read_text()
    assert "temporal-successive, each user counting once" in page
    assert len(log.read_text().splitlines()) == before + 2


@pytest.mark.parametrize(
    ("trained", "asked"),
    [("none", "leave-one-out"), ("leave-one-out", "temporal-last"), ("temporal", "leave-one-out")],
)
def test_a_run_that_has_seen_the_test_is_refused(runs: dict[str, list[Path]], trained: str, asked: str) -> None:
    with pytest.raises(LeakError, match="--set protocol="):
        evaluate(runs[trained], asked)


@pytest.mark.parametrize(
    ("setting", "value", "protocol"),
    [("test_share", 0.05, "temporal-successive"), ("repeats", True, "temporal-last"), ("methods", [], "impressions")],
)
def test_runs_that_hold_out_different_events_are_not_measured_together(
    runs: dict[str, list[Path]], tmp_path: Path, setting: str, value: object, protocol: str
) -> None:
    """The second run has been trained on most of what the first one holds out."""
    first, other = runs["temporal"][0], tmp_path / "other"
    shutil.copytree(first, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(TrainingError, match=f"other was trained with {setting} .*: evaluate them one by one"):
        evaluate([first, other], protocol)


@pytest.mark.parametrize(
    ("ahead", "words"), [((0.1, 0.3), "is ahead"), ((-0.1, 0.3), "not ahead for certain"), ((-0.3, -0.1), "is worse")]
)
def test_a_sentence_says_how_the_model_stands_to_the_best_baseline(ahead: tuple[float, float], words: str) -> None:
    interval = {"mean": sum(ahead) / 2, "low": ahead[0], "high": ahead[1]}
    compared = {
        "metrics": {"ndcg@10": {"mean": 0.5 + interval["mean"]}},
        "baselines": {"popular": {"ndcg@10": 0.1}, "ease": {"ndcg@10": 0.5}},
        "paired": {"popular": {"ndcg@10": {"mean": 0.9, "low": 0.8, "high": 1.0}}, "ease": {"ndcg@10": interval}},
    }
    best = best_baseline(compared)
    assert best["name"] == "ease"
    assert words in best["sentence"]
    assert "of ease, the best baseline" in best["sentence"]
