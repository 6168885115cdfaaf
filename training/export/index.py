"""Builds the search index of a bundle: the cheapest kind that still finds what an exact search finds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from features.errors import ExportError

# Typed Any because the published stubs lack half of the arguments.
faiss: Any = _faiss

EXACT_UP_TO = 50_000
"""Number of items up to which every vector is compared: about a millisecond at 64 numbers."""

QUANTISED_FROM = 500_000
"""Number of items from which a list keeps a byte per number instead of four."""

CUTOFFS = (10, 100)
"""Recall is measured among this many best items, and the target holds for each."""

SPARE = 0.5
"""A quantised list orders items roughly, so serving lets it propose this share more and scores them again."""

_TRAINING_VECTORS_PER_LIST = 64  # k-means takes no better centroids from more
_ROUNDING = 1e-5

_F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """An index and its recall.

    Attributes:
        data: The FAISS index; the number of lists to probe is inside.
        kind: Its FAISS factory string.
        lists: Number of lists, 0 for an exact index.
        probes: Number of lists to probe, 0 for an exact index.
        recall: Cut-off -> share of the exactly best items that it finds.
    """

    data: bytes
    kind: str
    lists: int
    probes: int
    recall: dict[int, float]


def build(
    vectors: _F32, queries: _F32, target: float, *, exact_up_to: int = EXACT_UP_TO, quantised_from: int = QUANTISED_FROM
) -> BuiltIndex:
    """Builds an index over item vectors that reaches a recall target on queries like those it will get.

    Args:
        vectors: One vector per row; float32 [N, D].
        queries: User and query vectors to measure with; float32 [Q, D].
        target: Share of the exactly best items to find, in (0, 1], at each of `CUTOFFS`.
        exact_up_to: Number of items up to which the index is exact.
        quantised_from: Number of items from which it is quantised, unless that misses the target.

    Raises:
        ExportError: A vector is not finite.
    """
    if not (np.isfinite(vectors).all() and np.isfinite(queries).all()):
        raise ExportError("the vectors of items or queries hold NaN or infinity; the training went wrong, train again")
    vectors, queries = np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(queries, np.float32)
    count = len(vectors)
    # Recall compares scores, not rows: of items with equal vectors any may be found.
    truth: _F32 = faiss.knn(queries, vectors, min(max(CUTOFFS), count), faiss.METRIC_INNER_PRODUCT)[0]
    # About two square roots of the items, so that lists and the centroids to compare cost about the same.
    lists = 2 ** round(math.log2(2 * math.sqrt(max(count, 1))))
    kinds = [f"IVF{lists},SQ8"] * (count >= quantised_from) + [f"IVF{lists},Flat"] * (count > exact_up_to) + ["Flat"]
    for kind in kinds[:-1]:
        built = _made(kind, vectors, queries, truth, target)
        if min(built.recall.values()) >= target:
            return built
    return _made(kinds[-1], vectors, queries, truth, target)


def _made(kind: str, vectors: _F32, queries: _F32, truth: _F32, target: float) -> BuiltIndex:
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    _fill(index, vectors)
    lists = getattr(index, "nlist", 0)
    # The fewest probes that reach the target: each costs a scan of its list at every search.
    probes = min(8, lists)
    while True:
        if lists:
            index.nprobe = probes
        recall = _recall(index, vectors, queries, truth)
        # An index that must probe more than a quarter of its lists costs more than the next kind.
        if min(recall.values()) >= target or 4 * probes >= lists:
            return BuiltIndex(faiss.serialize_index(index).tobytes(), kind, lists, probes, recall)
        probes = math.ceil(1.5 * probes)


def _fill(index: Any, vectors: _F32) -> None:
    lists = getattr(index, "nlist", 0)
    if lists:
        sample = np.random.default_rng(0).permutation(len(vectors))[: lists * _TRAINING_VECTORS_PER_LIST]
        index.train(vectors[np.sort(sample)])
    index.add(vectors)


def _recall(index: Any, vectors: _F32, queries: _F32, truth: _F32) -> dict[int, float]:
    """Returns by cut-off the share of the best items that are proposed: those whose exact scores reach `truth`."""
    spare = SPARE if isinstance(index, faiss.IndexIVFScalarQuantizer) else 0.0
    rows = index.search(queries, math.ceil(truth.shape[1] * (1 + spare)))[1]
    scores = np.einsum("qkd,qd->qk", vectors[rows], queries)
    scores[rows < 0] = -np.inf
    recall = {}
    for cut in CUTOFFS:
        best = truth[:, :cut]
        proposed = -np.sort(-scores[:, : math.ceil(cut * (1 + spare))], axis=1)[:, : best.shape[1]]
        enough = best[:, -1:] - _ROUNDING * np.abs(best).max(axis=1, keepdims=True)
        recall[cut] = float((proposed >= enough).sum() / max(1, best.size))
    return recall
