from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import benchmarks.training
from benchmarks.fidelity import _before
from benchmarks.peers.trainer_clock import SharedHistories
from benchmarks.side_by_side import _compare, speed
from benchmarks.training import arithmetic, cold, quality
from features.errors import SettingsError
from features.tables.dataset import open_dataset
from tests.training.conftest import TINY
from training.config import TrainConfig
from training.data.interactions import item_vocabulary, read_interactions
from training.data.split import held_out
from training.metrics import ndcg
from training.models.scoring import mask_seen, ranks_of


def test_the_peers_ndcg_is_our_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, 700)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = rng.integers(0, 30, offsets[-1])
    people = np.sort(rng.choice(700, 600, replace=False))
    histories = SharedHistories(rows, offsets, people, rng.integers(0, 30, 600), 30)
    histories.save(tmp_path / "h.npz")
    # Whole numbers, so that there are ties.
    users, items = (rng.integers(-2, 3, (n, 4)).astype(np.float32) for n in (600, 30))
    scores = users @ items.T
    mask_seen(scores, [histories.of(person) for person in people])
    expected = ndcg(ranks_of(scores, histories.targets.astype(np.int32)), 10).mean()
    assert 0.05 < expected < 0.9
    assert SharedHistories.load(tmp_path / "h.npz").ndcg(users, items) == pytest.approx(expected)


def test_an_item_that_a_peer_does_not_know_is_never_found() -> None:
    histories = SharedHistories(np.array([0]), np.array([0, 1]), np.array([0]), np.array([2]), 3)
    users, items = np.ones((1, 2), np.float32), np.array([[0, 0], [1, 1], [np.nan, np.nan]], np.float32)
    assert histories.ndcg(users, items) == 0.0
    items[2] = 2
    assert histories.ndcg(users, items) == 1.0


def test_a_service_is_given_the_histories_that_the_evaluation_reads(circles: Path, tiny: TrainConfig) -> None:
    config = tiny.model_copy(update={"protocol": "leave-one-out", "cold_item_share": 0.3})
    dataset = open_dataset(circles)
    _, vocabulary = item_vocabulary(dataset)
    data = read_interactions(dataset, vocabulary, config)
    targets = held_out(data, config, "leave-one-out")
    run: Any = SimpleNamespace(dataset=dataset)
    given = _before(run, data, targets)
    expected = [
        (data.users[user], item)
        for user, position in zip(targets.users.tolist(), targets.positions.tolist(), strict=True)
        for item in vocabulary.ids(data.rows[data.offsets[user] :][:position].tolist())
    ]
    assert list(zip(given["user_id"].to_pylist(), given["item_id"].to_pylist(), strict=True)) == expected


def _line(seconds: float, tokens: int, value: float) -> dict[str, float]:
    return {"seconds": seconds, "setup_seconds": 2.0, "tokens": tokens, "targets": tokens // 2, "ndcg@10": value}


def test_the_goal_is_what_everybody_reaches() -> None:
    ours = [_line(4, 200, 0.05), _line(8, 600, 0.12), _line(12, 1000, 0.11)]
    theirs = [_line(22, 100, 0.04), _line(42, 200, 0.1)]
    found = _compare({"penchant": ours, "other": theirs})
    assert found["goal"] == 0.1
    assert found["trainers"]["penchant"]["tokens_per_second"] == 100.0
    assert found["trainers"]["penchant"]["seconds_to_goal"] == 8
    assert found["trainers"]["other"]["tokens_per_second"] == 5.0
    ratios = {"tokens_per_second": 20.0, "targets_per_second": 20.0, "seconds_to_goal": 5.25}
    assert found["ratios"] == {"other": ratios | {"seconds_to_its_best": 5.25}}


def test_a_slow_peer_does_not_hide_how_far_another_one_came() -> None:
    ours = [_line(4, 200, 0.05), _line(8, 600, 0.12)]
    good = [_line(22, 100, 0.04), _line(42, 200, 0.1)]
    ratios = _compare({"penchant": ours, "good": good, "slow": [_line(20, 50, 0.03)], "far": [_line(9, 50, 0.2)]})[
        "ratios"
    ]
    assert [ratios["good"][name] for name in ("seconds_to_goal", "seconds_to_its_best")] == [5.5, 5.25]
    assert ratios["slow"]["seconds_to_its_best"] == 5.0
    assert ratios["far"]["seconds_to_its_best"] is None


def test_a_trainer_without_a_validation_is_named() -> None:
    with pytest.raises(SettingsError, match="slow"):
        _compare({"penchant": [_line(4, 200, 0.05)], "slow": []})


def test_trainers_take_turns_to_the_end(circles: Path) -> None:
    config = TrainConfig(**{**TINY, "protocol": "leave-one-out", "epochs": 4, "dropout": 0.1})
    found = speed(circles, config, circles, budget=400.0, turn=0.5, validate_every=1.0, names=["penchant"])
    mine = found["trainers"]["penchant"]
    assert [line["tokens"] for line in mine["curve"]] == sorted(line["tokens"] for line in mine["curve"])
    assert len(mine["curve"]) == 4
    assert found["validation_users"] == 160
    assert mine["setup_seconds"] <= mine["curve"][0]["seconds"]
    json.dumps(found)


def test_a_missing_environment_says_how_to_make_it(circles: Path, tmp_path: Path) -> None:
    config = TrainConfig(**{**TINY, "protocol": "leave-one-out"})
    with pytest.raises(SettingsError, match=r"recbole\.txt"):
        speed(circles, config, tmp_path, budget=1.0, turn=1.0, validate_every=1.0, names=["recbole_equal"])


def test_arithmetic_is_counted_by_hand(circles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.training, "PRODUCT_SIZE", 256)  # without bfloat16 in hardware 2,048 takes minutes
    config = TrainConfig(**{**TINY, "protocol": "leave-one-out", "batch_tokens": 32})
    found = arithmetic(circles, config, budget=0.5)
    flops = found["flops_per_token"]
    assert flops["softmax"] == 6 * 16 * 40
    # query, key, value and output, and the two maps of the feed-forward part
    assert flops["linear"] == 6 * (4 * 16 * 16 + 2 * 16 * 32)
    # two to five trained events: one to four inputs, which attend to one and to two and a half events on average
    assert 12 * 16 < flops["attention"] <= 12 * 2.5 * 16
    assert found["achieved_gflops"] > 0
    assert 0 < found["share"]["float32"] < 1


def test_seeds_are_trained_once_and_measured_together(circles: Path, tmp_path: Path) -> None:
    config = TrainConfig(**{**TINY, "protocol": "leave-one-out", "epochs": 1})
    found = quality(circles, config, [1, 2], tmp_path / "q")
    assert found["seeds"] == [1, 2]
    assert len(found["training"]) == 2
    made = (tmp_path / "q" / "seed-1" / "result.json").stat().st_mtime_ns
    quality(circles, config, [1], tmp_path / "q")
    assert (tmp_path / "q" / "seed-1" / "result.json").stat().st_mtime_ns == made
    with pytest.raises(SettingsError, match="another configuration"):
        quality(circles, config.model_copy(update={"epochs": 2}), [1], tmp_path / "q")
    hidden = cold(circles, config, [1, 2], tmp_path / "c")
    assert hidden["protocol"] == "cold-items"
    assert hidden["cold_items"] == [4, 4]
