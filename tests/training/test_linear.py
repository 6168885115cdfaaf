"""The linear part is learned as it should be, and its trial ranks as a plain sort does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.fidelity import _online
from features.linear import ItemWeights, LinearSpec, LinearTerm
from tests.training.conftest import interactions
from tests.untrained import untrained_run
from training.data.interactions import Interactions, read_interactions
from training.data.split import Targets
from training.evaluation.events import ModelScorer, rank_all
from training.export.export import publish_run
from training.metrics import ndcg
from training.models.ease import ExactEase, gram_of
from training.models.item_sets import item_sets
from training.models.linear import LinearTrial, add_sums, fit_linear, linear_sums
from training.models.scoring import mask_seen, ranks_of, seen_before

ITEMS, USERS = 60, 300


def sets_of_two_kinds(seed: int = 0, *, repeats: bool = False) -> Interactions:
    """Histories without order, each mostly of one of six kinds; with `repeats`, two of its items come often."""
    random = np.random.default_rng(seed)
    histories = []
    for _ in range(USERS):
        kind = random.integers(6)
        own = random.permutation(np.arange(10) + 10 * kind)[: random.integers(4, 9)]
        other = random.permutation(ITEMS)[:2]
        rows = random.permutation(np.unique(np.concatenate([own, other])))
        if repeats:
            rows = random.permutation(np.concatenate([rows, np.repeat(rows[:2], 6)]))
        histories.append(rows)
    return interactions(histories, ITEMS, repeats=repeats)


def last_events(data: Interactions) -> tuple[Targets, np.ndarray]:
    ends = np.diff(data.offsets) - 1
    return Targets(np.arange(ends.size), ends), ends


def trial_of(
    data: Interactions, repeats: bool = False
) -> tuple[LinearTrial, np.ndarray, np.ndarray, Targets, np.ndarray]:
    random = np.random.default_rng(1)
    targets, ends = last_events(data)
    users = random.standard_normal((len(targets), 8)).astype(np.float32)
    vectors = random.standard_normal((ITEMS, 8)).astype(np.float32)
    return LinearTrial(data, targets, users, vectors, np.zeros(ITEMS, bool), repeats), users, vectors, targets, ends


@pytest.mark.parametrize("repeats", [False, True])
def test_a_trial_ranks_as_a_sort_of_all_items(repeats: bool) -> None:
    data = sets_of_two_kinds(repeats=repeats)
    trial, users, vectors, targets, ends = trial_of(data, repeats)
    table = ItemWeights.of(*ExactEase(gram_of(item_sets(data, ends)), 20.0).table(10))
    spec = LinearSpec(1.0, 0.9, *((0.7, 0.4, 0.5) if repeats else ()))
    for factor, values in zip((0.0, 3.0), trial.values(spec, table, (0.0, 3.0)), strict=True):
        weights = {name: factor * getattr(spec, name) for name in ("weight", "count_weight", "recency_weight")}
        weighed = spec._replace(**weights)
        scores = add_sums(users @ vectors.T, linear_sums(LinearTerm(weighed, table), data, targets))
        if not repeats:
            mask_seen(scores, seen_before(data, targets))
        expected = ndcg(ranks_of(scores, targets.rows(data)), 10)
        # The sums of two floats in another order may turn a near tie.
        assert (values != expected).mean() < 0.01
        assert abs(values.mean() - expected.mean()) < 0.01


def test_the_linear_part_is_taken_where_it_helps_and_only_there() -> None:
    data = sets_of_two_kinds()
    trial, *_, ends = trial_of(data)
    cosines = np.full((ITEMS, 10), -1, np.int32), np.zeros((ITEMS, 10), np.float32)
    part = fit_linear(data, ends, trial, cosines)
    assert part.facts["table"] == "ease"
    assert part.spec.weight > 0
    assert part.facts["with"] > 2 * part.facts["without"]
    # Among items that users choose blindly, nothing helps.
    random = np.random.default_rng(2)
    blind = interactions([random.permutation(ITEMS)[:8] for _ in range(USERS)], ITEMS)
    truth = np.zeros((USERS, ITEMS), np.float32)
    truth[np.arange(USERS), blind.rows[7::8]] = 1
    torch.manual_seed(0)
    identity = np.eye(ITEMS, dtype=np.float32)
    trial = LinearTrial(blind, last_events(blind)[0], truth, identity, np.zeros(ITEMS, bool), False)
    part = fit_linear(blind, np.full(USERS, 7), trial, cosines)
    assert part.spec == LinearSpec()


def test_own_items_count_where_users_repeat_them() -> None:
    data = sets_of_two_kinds(repeats=True)
    trial, *_, ends = trial_of(data, repeats=True)
    cosines = np.full((ITEMS, 10), -1, np.int32), np.zeros((ITEMS, 10), np.float32)
    part = fit_linear(data, ends, trial, cosines)
    assert part.spec.count_weight > 0
    assert part.facts["with"] > part.facts["without"] + 0.1


def test_what_is_served_is_what_was_evaluated(tmp_path: Path) -> None:
    """The untrained run has a linear part that moves its pages, and they are those of `Recommend`."""
    run = untrained_run()
    # Evaluation has to leave out as seen the items that serving leaves out; and the untrained ranker reads times, which
    # only serving has.
    config = run.config.model_copy(update={"seen_types": tuple(run.result["seen_types"])})
    run = dataclasses.replace(run, config=config, result={**run.result, "content": True, "blend": 0.0})
    publish_run(run, tmp_path / "bundle")
    data = read_interactions(run.dataset, run.vocabulary, run.config)
    users = np.flatnonzero(np.diff(data.offsets) > 4)
    targets = Targets(users, np.diff(data.offsets)[users] - 1)
    with torch.inference_mode():
        scorer = ModelScorer(run, data, targets)
        [ranking] = rank_all([scorer], [], data, targets, repeats=False)
        plain = dataclasses.replace(run, result={**run.result, "linear": None})
        [without] = rank_all([ModelScorer(plain, data, targets)], [], data, targets, repeats=False)
    assert (ranking.top != without.top).any(axis=1).mean() > 0.9
    answers, rungs, degraded = _online(run, data, targets, tmp_path / "bundle")
    assert len(rungs) == 1, rungs
    assert not degraded
    assert [line[line >= 0].tolist() for line in ranking.top] == answers
