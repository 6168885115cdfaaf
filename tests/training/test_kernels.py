from __future__ import annotations

import pytest
import torch

from training.models.kernels import exponentials, exponentials_plain


@pytest.mark.parametrize(("spread", "level"), [(3.0, 0.0), (20.0, 0.0), (1.0, -30.0), (0.1, 5.0), (0.0, 0.0)])
@pytest.mark.parametrize("width", [1, 7, 1000])
def test_exponentials_equal_their_plain_twin(spread: float, level: float, width: int) -> None:
    torch.manual_seed(0)
    scores = (torch.randn(5, width) * spread + level).bfloat16()
    one, other = scores.clone(), scores.clone()
    tops, sums = exponentials(one)
    plain_tops, plain_sums = exponentials_plain(other)
    assert torch.equal(tops, plain_tops)
    assert torch.allclose(sums, plain_sums, rtol=1e-5)
    assert torch.allclose(one.float(), other.float(), rtol=2**-7, atol=1e-30)  # at most the last bit of a bf16


def test_what_is_masked_adds_nothing() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 2.0], [-torch.inf, -torch.inf, -3.0]]).bfloat16()
    tops, sums = exponentials(scores)
    assert tops.tolist() == [2.0, 0.0]
    assert sums.tolist() == pytest.approx([1 + 0.36788, 0.04979], rel=1e-3)
    assert float(scores[0, 1]) < 1e-30
