from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from training.models.losses import inclusion, sample_items, softmax_loss
from training.runtime import prepared


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("corrected", [False, True])
def test_chunks_give_the_loss_and_the_gradients_of_the_plain_softmax(chunk: int, corrected: bool) -> None:
    torch.manual_seed(0)
    users, items = torch.randn(10, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    targets = torch.randint(7, (10,))
    correction = torch.log(torch.rand(7)) if corrected else None
    loss = softmax_loss(users, items, targets, correction, chunk)
    loss.backward()  # type: ignore[no-untyped-call]
    found = users.grad, items.grad
    users.grad = items.grad = None
    scores = users @ items.T
    if correction is not None:
        own = functional.one_hot(targets, 7).bool()
        scores = scores - torch.where(own, 0.0, correction)
    expected = functional.cross_entropy(scores, targets)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for one, other in zip(found, (users.grad, items.grad), strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("replace", [False, True])
def test_sampled_items_hold_every_target_once(replace: bool) -> None:
    torch.manual_seed(0)
    targets = torch.tensor([5, 5, 2])
    rows, positions, correction = sample_items(targets, torch.full((50,), 1 / 50), 10, replace)
    assert rows.unique().numel() == rows.numel()
    assert rows[positions].tolist() == [5, 5, 2]
    assert correction.shape == rows.shape
    assert (correction <= 0).all()


def test_inclusion_is_the_share_of_batches_that_hold_an_item() -> None:
    torch.manual_seed(0)
    popularity = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    hits = torch.zeros(5)
    for _ in range(4000):
        rows, _, _ = sample_items(torch.multinomial(popularity, 3, replacement=True), popularity, 2)
        hits[rows] += 1
    assert torch.allclose(torch.exp(inclusion(popularity, 2, 3)), hits / 4000, atol=0.03)


def test_inclusion_knows_that_an_item_may_be_drawn_twice() -> None:
    torch.manual_seed(0)
    popularity = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    hits, stated = torch.zeros(5), torch.zeros(5)
    for _ in range(4000):
        targets = torch.multinomial(popularity, 3, replacement=True)
        rows, _, correction = sample_items(targets, popularity, 4, replace=True)
        hits[rows] += 1
        stated[rows] = torch.exp(correction)
    assert torch.allclose(stated, hits / 4000, atol=0.03)
    # Without replacement the same draw would hold an item more often, so the share must be another one.
    assert not torch.allclose(torch.exp(inclusion(popularity, 4, 3)), hits / 4000, atol=0.03)


@pytest.mark.parametrize("replace", [False, True])
def test_the_sampled_sum_estimates_the_whole(replace: bool) -> None:
    torch.manual_seed(1)
    popularity = torch.softmax(torch.randn(200), 0)
    user, items = torch.randn(1, 8), torch.randn(200, 8) / 2
    whole = float((user @ items.T).exp().sum())
    sums = []
    for _ in range(1500):
        targets = torch.multinomial(popularity, 20, replacement=True)
        rows, _, correction = sample_items(targets, popularity, 40, replace)
        sums.append(float(((user @ items[rows].T)[0] - correction).exp().sum()))
    assert sum(sums) / len(sums) == pytest.approx(whole, rel=0.03)


def test_products_in_half_precision_keep_the_direction_of_the_gradients() -> None:
    torch.manual_seed(0)
    items = (torch.randn(500, 32) * 0.3).requires_grad_()
    targets = torch.randint(500, (400,))
    users = (items.detach()[targets] * 4 + torch.randn(400, 32)).requires_grad_()
    with prepared(1):
        softmax_loss(users, items, targets).backward()  # type: ignore[no-untyped-call]
    found = users.grad, items.grad
    exact_users, exact_items = (part.detach().double().requires_grad_() for part in (users, items))
    functional.cross_entropy(exact_users @ exact_items.T, targets).backward()
    for one, other in zip(found, (exact_users.grad, exact_items.grad), strict=True):
        assert one is not None
        assert other is not None
        assert functional.cosine_similarity(one.double().flatten(), other.flatten(), 0) > 0.999
        assert float(one.double().norm() / other.norm()) == pytest.approx(1, abs=0.01)
