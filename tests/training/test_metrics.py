from __future__ import annotations

import math

import numpy as np
import pytest

from training import metrics

RANKS = np.array([0, 1, 9, 10, 3])


def test_rank_metrics_by_hand() -> None:
    assert metrics.hit(RANKS, 10).tolist() == [1, 1, 1, 0, 1]
    expected = [1, 1 / math.log2(3), 1 / math.log2(11), 0, 1 / math.log2(5)]
    assert metrics.ndcg(RANKS, 10) == pytest.approx(expected)
    assert metrics.mrr(RANKS, 10) == pytest.approx([1, 1 / 2, 1 / 10, 0, 1 / 4])


def test_graded_ndcg_by_hand() -> None:
    # Gains in the order shown, of all judged gains 7, 3, 1.
    found = (3 + 0 / math.log2(3) + 7 / 2) / (7 + 3 / math.log2(3) + 1 / 2)
    assert metrics.graded_ndcg([3, 0, 7], [1, 3, 7], 3) == pytest.approx(found)
    assert metrics.graded_ndcg([0, 0], [], 10) == 0


def test_coverage_and_novelty_by_hand() -> None:
    shown = np.array([[0, 1], [1, 2]])
    assert metrics.coverage(shown, 6) == 0.5
    # Counts 3, 1, 0, 0 plus one each: shares 4/8, 2/8, 1/8, 1/8, so 1, 2 and 3 bits.
    assert metrics.novelty(shown, np.array([3.0, 1.0, 0.0, 0.0])) == pytest.approx((1 + 2 + 2 + 3) / 4)


def test_auc_counts_ties_half() -> None:
    labels = np.array([True, True, False, False])
    # Pairs: .9>.5, .9>.1, .5=.5, .5>.1.
    assert metrics.auc(labels, np.array([0.9, 0.5, 0.5, 0.1])) == 3.5 / 4
    assert math.isnan(metrics.auc(np.array([True]), np.array([1.0])))


def test_gauc_weighs_groups_and_leaves_out_those_of_one_kind() -> None:
    labels = np.array([True, False, True, False, False, True])
    scores = np.array([2.0, 1.0, 1.0, 2.0, 0.0, 5.0])
    groups = np.array([0, 0, 1, 1, 1, 2])
    # Group 0: 1 over 2 events; group 1: 1/2 over 3 events; group 2 has no negative.
    assert metrics.gauc(labels, scores, groups) == pytest.approx((1 * 2 + 0.5 * 3) / 5)


def test_probabilities_by_hand() -> None:
    labels = np.array([True, False, True, True])
    p = np.array([0.5, 0.5, 0.75, 0.75])
    assert metrics.log_loss(labels, p) == pytest.approx((2 * math.log(2) - 2 * math.log(0.75)) / 4)
    assert metrics.ece(labels, p, bins=2) == pytest.approx((0.0 * 2 + 0.25 * 2) / 4)


def test_the_calibration_of_equal_probabilities_does_not_depend_on_the_order_of_rows() -> None:
    labels = np.repeat([True, False], [30, 70])
    rate = np.full(100, 0.4)
    assert metrics.ece(labels, rate) == pytest.approx(0.1)
    # A user of weight 3 counts as three.
    weights = np.where(labels, 3.0, 1.0)
    assert metrics.ece(labels, rate, weights=weights) == pytest.approx(90 / 160 - 0.4)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(100):
        taste = rng.normal(size=60)
        groups = np.repeat(np.arange(60), 5)
        found = metrics.interval(taste[groups] + rng.normal(size=300), groups, seed=trial)
        covered += found["low"] <= 0 <= found["high"]
    assert covered >= 87  # nominally 95; treating the 300 values as independent would give about 70


def test_a_paired_interval_is_narrower_than_two_apart() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(size=500)
    better = base + 0.1 + 0.05 * rng.normal(size=500)
    people = np.arange(500)
    paired, alone = metrics.interval(better - base, people), metrics.interval(better, people)
    assert paired["low"] > 0
    assert paired["high"] - paired["low"] < (alone["high"] - alone["low"]) / 5
