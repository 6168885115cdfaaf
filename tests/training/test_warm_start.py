from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.training.conftest import interactions
from training.config import TrainConfig
from training.models.warm_start import cooccurrence_vectors


def test_items_of_the_same_histories_lie_together() -> None:
    # Two kinds of people, who never touch each other's items; item 12 nobody touches.
    rng = np.random.default_rng(0)
    histories = [rng.permutation(6).tolist() for _ in range(40)] + [
        (6 + rng.permutation(6)).tolist() for _ in range(40)
    ]
    data = interactions(histories, items=13)
    found = cooccurrence_vectors(data, np.ones(data.rows.size, bool), TrainConfig(dim=4, heads=1, warm_start=0.5))
    cosines = found @ found.T / (0.5**2 * 4)
    assert found.shape == (13, 4)
    assert cosines[:12].diagonal().tolist() == pytest.approx([1.0] * 12, abs=1e-4)
    assert float(cosines[:6, :6].mean()) > float(cosines[:6, 6:12].mean()) + 0.3
    assert torch.equal(found[12], torch.zeros(4))


def test_items_of_a_large_catalogue_without_events_change_nothing() -> None:
    data = interactions([[0, 1, 2], [1, 2, 3], [4, 0, 3]] * 5, items=5)
    # The same events in a catalogue of a thousand, of which only each hundredth item is ever chosen.
    spread = interactions([[100, 200, 300], [200, 300, 400], [500, 100, 400]] * 5, items=1_000)
    every = np.ones(data.rows.size, bool)
    few = cooccurrence_vectors(data, every, TrainConfig(dim=4, heads=1))
    many = cooccurrence_vectors(spread, every, TrainConfig(dim=4, heads=1, dense_items=999))
    assert torch.equal(many[100:600:100], few)
    many[100:600:100] = 0
    assert torch.equal(many, torch.zeros(1_000, 4))


def test_more_dimensions_than_items_are_zeros() -> None:
    data = interactions([[0, 1, 2]] * 5, items=3)
    found = cooccurrence_vectors(data, np.ones(data.rows.size, bool), TrainConfig(dim=8, heads=1))
    assert found.shape == (3, 8)
    assert torch.isfinite(found).all()
