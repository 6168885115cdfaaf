from __future__ import annotations

import pytest
import torch

from training.fitting.query_encoder import _draw_words
from training.fitting.ranker_candidates import RankerCandidates, _choose_blend
from training.models.ranker import Ranker, level, platt, utility


def test_platt_finds_the_true_slope_and_shift() -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(40_000)
    labels = (torch.rand(40_000) < torch.sigmoid(0.5 * logits - 2)).float()
    slope, shift = platt(logits, labels)
    assert slope == pytest.approx(0.5, abs=0.03)
    assert shift == pytest.approx(-2, abs=0.05)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_platt_stays_finite_where_all_labels_are_alike(label: float) -> None:
    slope, shift = platt(torch.randn(100), torch.full((100,), label))
    assert abs(slope) < 100
    assert abs(shift) < 100


def test_few_events_do_not_move_the_slope_far() -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(4_000) - 8
    labels = torch.zeros(4_000)
    labels[logits.topk(3).indices] = 1  # three hides, all where they were expected most
    assert platt(logits, labels)[0] > 1.5
    assert 1 < platt(logits, labels, steady=100.0)[0] < 1.2


@pytest.mark.parametrize("rate", [1e-6, 0.003, 0.4, 0.999])
def test_the_level_makes_the_rate_the_mean_probability(rate: float) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(1_000)
    assert float(torch.sigmoid(logits.double() + level(logits, rate)).mean()) == pytest.approx(rate, rel=1e-6)


def test_an_untrained_ranker_passes_relevance_through() -> None:
    torch.manual_seed(0)
    ranker = Ranker(dim=4, features=3, hidden=8, actions=2).eval()
    features = torch.randn(5, 3)
    logits = ranker(torch.randn(1, 4), torch.randn(5, 4), features)
    assert torch.allclose(logits, features[:, :1].expand(5, 2))
    ranker.recalibrate(1, 0.5, 3.0)
    moved = ranker(torch.randn(1, 4), torch.randn(5, 4), features)
    assert torch.allclose(moved[:, 0], features[:, 0])
    assert torch.allclose(moved[:, 1], 0.5 * features[:, 0] + 3)


def test_people_at_once_are_scored_as_alone() -> None:
    torch.manual_seed(0)
    ranker = Ranker(dim=4, features=3, hidden=8, actions=2).eval()
    torch.nn.init.normal_(ranker.output.weight)
    users, items, features = torch.randn(3, 1, 4), torch.randn(3, 5, 4), torch.randn(3, 5, 3)
    together = ranker(users, items, features)
    for at in range(3):
        assert torch.allclose(ranker(users[at], items[at], features[at]), together[at], atol=1e-5)


def test_utility_is_the_log_odds_of_the_weighted_sum() -> None:
    logits = torch.tensor([[0.0, 2.0]])
    share = 0.25 * 0.5 + 0.75 * torch.sigmoid(torch.tensor(2.0))
    assert utility(logits, torch.tensor([0.25, 0.75])).item() == pytest.approx(torch.logit(share).item(), rel=1e-5)
    assert torch.isfinite(utility(torch.tensor([[-100.0], [100.0]]), torch.ones(1))).all()


def candidates(people: int, real: bool = True) -> RankerCandidates:
    """Ten items a person; the target comes first in the list and last by relevance among those that count."""
    relevance = torch.arange(10.0).repeat(people, 1)
    return RankerCandidates(
        users=torch.zeros(people, 2),
        rows=torch.arange(10).repeat(people, 1),
        features=relevance.unsqueeze(2),
        labels=torch.zeros(people, 10, 1),
        real=torch.full((people, 10), real),
    )


def test_a_ranker_that_helps_is_listened_to_and_one_that_does_not_is_not() -> None:
    asked = candidates(50)
    asked.features[:, 1:, 0] -= 3  # the target now beats items 1, 2 and 3, so relevance did find it
    helpful, useless = torch.zeros(50, 10), torch.zeros(50, 10)
    helpful[:, 0] = 100
    assert _choose_blend(asked, helpful)[0] > 0
    assert _choose_blend(asked, useless)[0] == 0


def test_a_target_that_relevance_does_not_find_cannot_be_won() -> None:
    helpful = torch.zeros(50, 10)
    helpful[:, 0] = 100
    assert _choose_blend(candidates(50), helpful)[0] == 0


def test_a_query_is_made_of_words_of_the_item() -> None:
    tokens = torch.tensor([[5, 6, 7, 0, 0, 0, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(50):
        words = _draw_words(tokens, generator)
        assert set(words[0].tolist()) <= {0, 5, 6, 7}
        assert words[1, 0] == 9
        assert words[0, 0] > 0
        lengths.add(int((words[0] > 0).sum()))
    assert lengths == {1, 2, 3}
