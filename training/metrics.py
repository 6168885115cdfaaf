"""Metrics of rankings and of probabilities, with intervals.

A rank is the number of items placed before the target: 0 is best. With one target per query, hit and recall are the
same number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000
"""Bootstrap draws: enough for the ends of a 95 % interval."""


def hit(ranks: npt.NDArray[np.int64], k: int) -> Floats:
    """Returns 1 where the target is among the first k; float64 `[n]`."""
    return (ranks < k).astype(np.float64)


def ndcg(ranks: npt.NDArray[np.int64], k: int) -> Floats:
    """Returns the discounted gain of one target, 1 / log2(rank + 2) among the first k, else 0; float64 `[n]`."""
    return np.where(ranks < k, 1 / np.log2(np.maximum(ranks, 0) + 2.0), 0.0)


def mrr(ranks: npt.NDArray[np.int64], k: int) -> Floats:
    """Returns the reciprocal rank of one target, 1 / (rank + 1) among the first k, else 0; float64 `[n]`."""
    return np.where(ranks < k, 1 / (ranks + 1.0), 0.0)


def graded_ndcg(gains: Sequence[float], ideal: Sequence[float], k: int) -> float:
    """Returns NDCG of a ranked list by its gains, against the best order of all judged gains; 0 without any gain."""
    best = _dcg(sorted(ideal, reverse=True)[:k])
    return _dcg(gains[:k]) / best if best > 0 else 0.0


def _dcg(gains: Sequence[float]) -> float:
    return float(np.sum(np.asarray(gains) / np.log2(np.arange(len(gains)) + 2.0)))


def coverage(lists: npt.NDArray[np.int64], items: int) -> float:
    """Returns the share of the catalogue that stands in at least one of the lists `[n, k]`."""
    return np.unique(lists[lists >= 0]).size / items


def novelty(lists: npt.NDArray[np.int64], counts: Floats) -> float:
    """Returns the mean self-information of the listed items, in bits: -log2 of an item's share of events.

    Each item counts one event more than it has: a new one would be infinitely surprising.
    """
    information = -np.log2((counts + 1) / (counts.sum() + counts.size))
    return float(information[lists[lists >= 0]].mean())


def auc(labels: npt.NDArray[np.bool_], scores: Floats, weights: Floats | None = None) -> float:
    """Returns the probability that a positive scores above a negative, ties counting half.

    NaN without positives or without negatives. With weights, each pair counts as the product of its two weights.
    """
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return float("nan")
    if weights is not None:
        _, inverse = np.unique(scores, return_inverse=True)
        positive, negative = (np.bincount(inverse, np.where(is_kind, weights, 0.0)) for is_kind in (labels, ~labels))
        return float(positive @ (np.cumsum(negative) - negative / 2) / (positive.sum() * negative.sum()))
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # The rank sum of Mann and Whitney; tied scores share the middle of their ranks.
    middle = np.cumsum(counts) - (counts - 1) / 2
    return float((middle[inverse][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def gauc(
    labels: npt.NDArray[np.bool_], scores: Floats, groups: npt.NDArray[np.int64], weights: Floats | None = None
) -> float:
    """Returns AUC inside each group, weighted by the group's size (arXiv:1706.06978).

    Groups without positives or without negatives are left out.
    """
    masses = np.ones(labels.size) if weights is None else weights
    order = np.argsort(groups, kind="stable")
    borders = np.flatnonzero(np.diff(groups[order])) + 1
    parts = [
        (auc(labels[part], scores[part], None if weights is None else masses[part]), masses[part].sum())
        for part in np.split(order, borders)
    ]
    kept = [(value, size) for value, size in parts if value == value]  # NaN is unequal to itself
    total = sum(size for _, size in kept)
    return float(sum(value * size for value, size in kept) / total) if total else float("nan")


def log_loss(labels: npt.NDArray[np.bool_], probabilities: Floats, weights: Floats | None = None) -> float:
    """Returns the mean negative log likelihood in nats; probabilities are kept 1e-7 from 0 and 1."""
    p = np.clip(probabilities, 1e-7, 1 - 1e-7)
    losses = np.where(labels, np.log(p), np.log1p(-p))
    return float(-np.mean(losses) if weights is None else -np.average(losses, weights=weights))


def ece(labels: npt.NDArray[np.bool_], probabilities: Floats, bins: int = 15, weights: Floats | None = None) -> float:
    """Returns the expected calibration error over bins of as many examples each."""
    # Bins of equal width would hold nearly all examples of a rare action in the first.
    masses = np.ones(labels.size) if weights is None else weights
    # Equal probabilities fall into bins by the order of the rows, which is that of time: each counts with the mean
    # outcome of all, or a base rate would be charged for what changes by the hour and not for its own error.
    _, ties = np.unique(probabilities, return_inverse=True)
    outcomes = (np.bincount(ties, masses * labels) / np.bincount(ties, masses))[ties]
    parts = np.array_split(np.argsort(probabilities, kind="stable"), bins)
    gaps = [abs(masses[part] @ (outcomes[part] - probabilities[part])) for part in parts if part.size]
    return float(np.sum(gaps) / masses.sum())


def measure(
    labels: npt.NDArray[np.bool_], probabilities: Floats, users: npt.NDArray[np.int64], weights: Floats | None = None
) -> dict[str, float]:
    """Returns `auc`, `gauc` with `users` as groups, `log_loss` and `ece` of one action's probabilities."""
    return {
        "auc": auc(labels, probabilities, weights),
        "gauc": gauc(labels, probabilities, users, weights),
        "log_loss": log_loss(labels, probabilities, weights),
        "ece": ece(labels, probabilities, weights=weights),
    }


def interval(values: Floats, groups: npt.NDArray[np.int64], seed: int = 0, level: float = 0.95) -> dict[str, float]:
    """Returns the mean with its percentile bootstrap interval.

    Whole groups (users) are drawn, because the events of a user depend on one another and single draws would make the
    interval too narrow. The difference of two models' values on the same targets gives a paired interval.

    Returns:
        `mean`, `low`, `high`.
    """
    # A group enters a draw through its sum and its size, so a draw costs as much as there are groups, not values.
    _, inverse = np.unique(groups, return_inverse=True)
    sizes = np.bincount(inverse).astype(np.float64)
    sums = np.bincount(inverse, weights=values)
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for at in range(RESAMPLES):
        drawn = np.bincount(rng.integers(0, sizes.size, sizes.size), minlength=sizes.size)
        means[at] = (drawn @ sums) / (drawn @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
