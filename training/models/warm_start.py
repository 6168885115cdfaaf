"""Computes initial item vectors: items that stand near each other in histories lie near each other.

A transformer that starts from random item vectors spends its first epochs on finding out what a truncated singular
value decomposition says in seconds.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from training.config import TrainConfig
from training.data.interactions import Interactions

EVENTS = 1 << 20
"""Most events that initial item vectors are computed from."""
WINDOW = 10
"""Consecutive events of a user that count as near each other."""
_ROUNDS = 4
_EXTRA = 16


def initial_vectors(data: Interactions, ends: npt.NDArray[np.int64], config: TrainConfig) -> Tensor:
    """Computes `cooccurrence_vectors` of the leading `ends[u]` events of all users, or of a sample of them."""
    sample = data.sample(ends, EVENTS, config.seed)
    return cooccurrence_vectors(sample, np.ones(sample.rows.size, bool), config)


def cooccurrence_vectors(data: Interactions, trained: npt.NDArray[np.bool_], config: TrainConfig) -> Tensor:
    """Computes the leading left singular vectors of items by windows, both normalised by their number of events.

    Inner products approximate the cosine of the sets of windows in which two items stand. The singular vector
    that holds only an item's frequency is taken out. Randomised subspace iteration (arXiv:0909.4061).

    Args:
        data: All events.
        trained: True for the events to learn from; bool `[E]`.
        config: Length and scale of the vectors, and the seed of the random start.

    Returns:
        float32 `[N, dim]`, numbers of about `warm_start` size; zeros for an item without events.
    """
    if data.items <= config.dense_items:
        return _leading_vectors(data, trained, config)
    # Most items of a large catalogue are in no event here, and would take part in every product.
    present, rows = np.unique(data.rows, return_inverse=True)
    few = dataclasses.replace(data, rows=rows.astype(np.int32), items=present.size)
    vectors = torch.zeros(data.items, config.dim)
    vectors[torch.from_numpy(present.astype(np.int64))] = _leading_vectors(few, trained, config)
    return vectors


def _leading_vectors(data: Interactions, trained: npt.NDArray[np.bool_], config: TrainConfig) -> Tensor:
    """Computes `cooccurrence_vectors` over the whole catalogue."""
    dim, product = config.dim, _Nearness(data, np.flatnonzero(trained))
    generator = torch.Generator().manual_seed(config.seed)
    # A few columns more than are kept: they take up the error of the random start.
    basis = torch.randn(data.items, min(dim + _EXTRA, data.items), generator=generator)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(product(basis))[0]
    small = basis.T @ product(basis)
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    kept = torch.argsort(values, descending=True)[:dim]
    vectors = basis @ rotation[:, kept] * values[kept].clamp(min=0).sqrt()
    vectors = functional.pad(functional.normalize(vectors, dim=1), (0, dim - vectors.shape[1]))
    scaled: Tensor = vectors * (config.warm_start * dim**0.5)
    return scaled


class _Nearness:
    """Items by items: the cosine of the sets of windows in which they stand, less what frequency alone explains."""

    def __init__(self, data: Interactions, events: npt.NDArray[np.int64]) -> None:
        owner = data.owner()[events]
        position = events - data.offsets[owner]
        # Two layers of windows, shifted by half, so that no two neighbours are always apart.
        layers = [owner * (1 << 32) + (position + shift) // WINDOW * 2 + (shift > 0) for shift in (0, WINDOW // 2)]
        _, windows = np.unique(np.concatenate(layers), return_inverse=True)
        items = np.tile(data.rows[events].astype(np.int64), 2)
        counts = np.bincount(items, minlength=data.items)
        weights = 1 / np.sqrt(counts[items] * np.bincount(windows)[windows])
        self.by_item = _Sums(items, windows, weights, data.items)
        self.by_window = _Sums(windows, items, weights, int(windows.max()) + 1)
        self.frequency = functional.normalize(torch.from_numpy(np.sqrt(counts)).float(), dim=0).unsqueeze(1)

    def __call__(self, table: Tensor) -> Tensor:
        near = self.by_item(self.by_window(table))
        return near - self.frequency @ (self.frequency.T @ near)


class _Sums:
    """A sparse matrix as weighted sums over the members of each group."""

    def __init__(
        self, groups: npt.NDArray[np.int64], members: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], size: int
    ) -> None:
        order = np.argsort(groups, kind="stable")
        self.members = torch.from_numpy(members[order])
        self.weights = torch.from_numpy(weights[order].astype(np.float32))
        self.offsets = torch.from_numpy(np.searchsorted(groups[order], np.arange(size)))

    def __call__(self, table: Tensor) -> Tensor:
        sums: Tensor = functional.embedding_bag(
            self.members, table, self.offsets, mode="sum", per_sample_weights=self.weights
        )
        return sums
