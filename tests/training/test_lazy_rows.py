from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.fitting.lazy_rows import BETAS, LazyRows

ROWS, DIM = 40, 6
Used = list[tuple[Tensor, Tensor, float]]


def drawn(steps: int, decay: float, seed: int = 0) -> Used:
    """Steps of few rows, their gradients and learning rates; row 0 is in every step, the last row in none."""
    generator = torch.Generator().manual_seed(seed)
    used = []
    for step in range(steps):
        # Some rows rest for a few steps, some for hundreds.
        others = 1 + torch.randperm(4 if step % 40 else ROWS - 2, generator=generator)[:3]
        rows = torch.cat([torch.tensor([0]), others])
        gradient = torch.randn(rows.numel(), DIM, generator=generator) * 1e-3
        used.append((rows, gradient, 1e-2 * decay**step))
    return used


def start() -> Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1))


def by_adamw(used: Used, weight_decay: float) -> Tensor:
    weight = torch.nn.Parameter(start())
    optimizer = torch.optim.AdamW([weight], betas=BETAS, weight_decay=weight_decay)
    for rows, gradient, rate in used:
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.zeros_like(weight).index_add_(0, rows, gradient)
        optimizer.step()
    return weight.detach()


def step(lazy: LazyRows, rows: Tensor, gradient: Tensor, rate: float) -> None:
    read = lazy.read(rows)
    read.grad = gradient
    lazy.update(rows, read, rate)


def lazily(used: Used, weight_decay: float) -> LazyRows:
    lazy = LazyRows(start(), weight_decay)
    for rows, gradient, rate in used:
        step(lazy, rows, gradient, rate)
    return lazy


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("steps", [1, 30, 700])
def test_rows_end_where_adamw_over_the_whole_table_takes_them(steps: int, weight_decay: float) -> None:
    used = drawn(steps, 0.999)
    lazy = lazily(used, weight_decay)
    lazy.settle()
    moved = by_adamw(used, weight_decay)
    assert torch.allclose(lazy.weight, moved, rtol=0, atol=2e-3 * float((moved - start()).abs().max()))
    # Momentum is most of what moves a rare row, so leaving it out must be noticed.
    if steps == 700:
        forgetful = LazyRows(start(), weight_decay)
        for rows, gradient, rate in used:
            step(forgetful, rows, gradient, rate)
            forgetful._tails.zero_()
        forgetful.settle()
        apart = (forgetful.weight - moved).abs().max() / (moved - start()).abs().max()
        assert apart > 0.1


def test_reading_a_row_gives_it_its_missed_steps() -> None:
    used = drawn(50, 1.0)
    lazy = lazily(used, 0.1)
    moved = by_adamw(used, 0.1)
    rows = torch.tensor([3, 17, ROWS - 1])
    assert torch.allclose(lazy.read(rows), moved[rows], atol=1e-4)


def test_a_step_touches_its_rows_alone() -> None:
    lazy = lazily(drawn(50, 1.0), 0.1)
    before = {name: tensor.clone() for name, tensor in {**lazy.state(), "weight": lazy.weight}.items()}
    rows = torch.tensor([0, 2])
    step(lazy, rows, torch.ones(2, DIM), 1e-2)
    others = torch.ones(ROWS, dtype=torch.bool)
    others[rows] = False
    for name in ("mean", "square", "last"):
        assert torch.equal(before[name][others], lazy.state()[name][others]), name
    assert torch.equal(before["weight"][others], lazy.weight[others])
    assert not torch.equal(before["weight"][rows], lazy.weight[rows])


def test_settling_early_changes_nothing_but_rounding() -> None:
    used = drawn(300, 0.99)
    once, often = LazyRows(start(), 0.05), LazyRows(start(), 0.05)
    for number, (rows, gradient, rate) in enumerate(used):
        step(once, rows, gradient, rate)
        step(often, rows, gradient, rate)
        if number % 7 == 0:
            often.settle()
    once.settle()
    often.settle()
    assert torch.allclose(once.weight, often.weight, atol=1e-5)


def test_restored_rows_go_on_to_the_same_bits() -> None:
    used = drawn(90, 0.99)
    whole, first = lazily(used, 0.1), lazily(used[:37], 0.1)
    second = LazyRows(first.weight.clone(), 0.1)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    for rows, gradient, rate in used[37:]:
        step(second, rows, gradient, rate)
    for lazy in (whole, second):
        lazy.settle()
    assert torch.equal(whole.weight, second.weight)
    assert all(torch.equal(whole.state()[name], second.state()[name]) for name in whole.state())


def test_a_rate_past_all_bounds_is_left_to_the_loss_to_tell() -> None:
    lazy = LazyRows(start(), 0.1)
    step(lazy, torch.tensor([1]), torch.ones(1, DIM), 1e30)
    lazy.settle()
    assert not math.isnan(float(lazy.state()["decays"][-1]))
