"""Quality of rankings and of probabilities, each with what it is uncertain by.

A rank is the number of items placed before the target: 0 is best. With one target per query, hit and recall are the
same number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000


def hit(ranks: npt.NDArray[np.int64], k: int) -> Floats:
    """1 where the target is among the first k; float64 `[n]`."""
    return (ranks < k).astype(np.float64)


def ndcg(ranks: npt.NDArray[np.int64], k: int) -> Floats:
    """Discounted gain of one target, 1 / log2(rank + 2) among the first k, else 0; float64 `[n]`."""
    return np.where(ranks < k, 1 / np.log2(np.maximum(ranks, 0) + 2.0), 0.0)


def mrr(ranks: npt.NDArray[np.int64], k: int) -> Floats:
    """Reciprocal rank of one target, 1 / (rank + 1) among the first k, else 0; float64 `[n]`."""
    return np.where(ranks < k, 1 / (ranks + 1.0), 0.0)


def graded_ndcg(gains: Sequence[float], ideal: Sequence[float], k: int) -> float:
    """NDCG of a ranked list by its gains, against the best order of all judged gains; 0 where nothing is relevant."""
    best = _dcg(sorted(ideal, reverse=True)[:k])
    return _dcg(gains[:k]) / best if best > 0 else 0.0


def _dcg(gains: Sequence[float]) -> float:
    return float(np.sum(np.asarray(gains) / np.log2(np.arange(len(gains)) + 2.0)))


def coverage(shown: npt.NDArray[np.int64], items: int) -> float:
    """Share of the catalogue that stands in at least one of the lists `[n, k]`."""
    return np.unique(shown[shown >= 0]).size / items


def novelty(shown: npt.NDArray[np.int64], counts: Floats) -> float:
    """Mean self-information of what is shown, in bits: -log2 of an item's share of events, plus one event each."""
    information = -np.log2((counts + 1) / (counts.sum() + counts.size))
    return float(information[shown[shown >= 0]].mean())


def auc(labels: npt.NDArray[np.bool_], scores: Floats, weights: Floats | None = None) -> float:
    """Probability that a positive scores above a negative, ties counting half; NaN where one kind is missing.

    With weights, each pair counts as often as its weights' product says.
    """
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return float("nan")
    if weights is not None:
        _, inverse = np.unique(scores, return_inverse=True)
        ups, downs = (np.bincount(inverse, np.where(kind, weights, 0.0)) for kind in (labels, ~labels))
        return float(ups @ (np.cumsum(downs) - downs / 2) / (ups.sum() * downs.sum()))
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts - 1) / 2
    return float((middle[inverse][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def gauc(
    labels: npt.NDArray[np.bool_], scores: Floats, groups: npt.NDArray[np.int64], weights: Floats | None = None
) -> float:
    """AUC inside each group, weighted by the group's size, over the groups that have both kinds (arXiv:1706.06978)."""
    own = np.ones(labels.size) if weights is None else weights
    order = np.argsort(groups, kind="stable")
    borders = np.flatnonzero(np.diff(groups[order])) + 1
    parts = [
        (auc(labels[part], scores[part], None if weights is None else own[part]), own[part].sum())
        for part in np.split(order, borders)
    ]
    kept = [(value, size) for value, size in parts if value == value]  # NaN is unequal to itself
    total = sum(size for _, size in kept)
    return float(sum(value * size for value, size in kept) / total) if total else float("nan")


def log_loss(labels: npt.NDArray[np.bool_], probabilities: Floats, weights: Floats | None = None) -> float:
    """Mean negative log likelihood in nats; probabilities are kept 1e-7 away from 0 and 1."""
    p = np.clip(probabilities, 1e-7, 1 - 1e-7)
    losses = np.where(labels, np.log(p), np.log1p(-p))
    return float(-np.mean(losses) if weights is None else -np.average(losses, weights=weights))


def ece(labels: npt.NDArray[np.bool_], probabilities: Floats, bins: int = 15, weights: Floats | None = None) -> float:
    """Expected calibration error over bins of as many lines each."""
    own = np.ones(labels.size) if weights is None else weights
    parts = np.array_split(np.argsort(probabilities, kind="stable"), bins)
    gaps = [abs(own[part] @ (labels[part] - probabilities[part])) for part in parts if part.size]
    return float(np.sum(gaps) / own.sum())


def measure(
    labels: npt.NDArray[np.bool_], chances: Floats, people: npt.NDArray[np.int64], weights: Floats | None = None
) -> dict[str, float]:
    """Quality of one action's probabilities: `auc`, `gauc` with `people` as groups, `log_loss` and `ece`."""
    return {
        "auc": auc(labels, chances, weights),
        "gauc": gauc(labels, chances, people, weights),
        "log_loss": log_loss(labels, chances, weights),
        "ece": ece(labels, chances, weights=weights),
    }


def interval(values: Floats, groups: npt.NDArray[np.int64], seed: int = 0, level: float = 0.95) -> dict[str, float]:
    """Mean with its percentile bootstrap interval; whole groups (people) are drawn, for their events hang together.

    Give it the difference of two models' values on the same targets for a paired interval.

    Returns:
        `mean`, `low`, `high`.
    """
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
