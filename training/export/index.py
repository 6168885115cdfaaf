"""Builds the search index of a bundle: the cheapest kind that still finds what an exact search finds."""

from __future__ import annotations

import logging
import math
import time
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

MOST_PROBED = {"SQ8": 0.5, "Flat": 0.25}
"""Largest share of its lists that an index may probe, by the form of its vectors: of more, the next kind costs less."""

_TIMED = 32
"""Queries by which the rate of a search is measured."""

_log = logging.getLogger(__name__)
_TRAINING_VECTORS_PER_LIST = 64  # k-means takes no better centroids from more
_ROUNDING = 1e-5

_F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class IndexPoint:
    """A way to search, and what it costs: a point of the curve that an index was chosen from.

    Attributes:
        kind: FAISS factory string.
        probes: Number of lists to probe, 0 for an exact index.
        recall: Cut-off -> share of the exactly best items that it finds.
        queries_per_second: Rate of one thread on the exporting machine.
    """

    kind: str
    probes: int
    recall: dict[int, float]
    queries_per_second: float

    def as_json(self) -> dict[str, Any]:
        """Returns the point as the manifest keeps it."""
        recall = {f"recall@{cut}": round(share, 4) for cut, share in self.recall.items()}
        return {"kind": self.kind, "probes": self.probes, **recall, "queries_per_second": self.queries_per_second}


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """An index and its recall.

    Attributes:
        data: The FAISS index; the number of lists to probe is inside.
        kind: Its FAISS factory string.
        lists: Number of lists, 0 for an exact index.
        probes: Number of lists to probe, 0 for an exact index.
        recall: Cut-off -> share of the exactly best items that it finds.
        curve: All ways that were measured, in the order of the kinds, the last one the way that was chosen.
    """

    data: bytes
    kind: str
    lists: int
    probes: int
    recall: dict[int, float]
    curve: tuple[IndexPoint, ...]


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
    curve: list[IndexPoint] = []
    index, point = _measured(kinds[0], vectors, queries, truth, target, curve)
    for kind in kinds[1:]:
        if min(point.recall.values()) >= target:
            break
        index, point = _measured(kind, vectors, queries, truth, target, curve)
    if point.kind == "Flat" and len(kinds) > 1:
        _tell_cost(curve, target)
    lists = getattr(index, "nlist", 0)
    data = faiss.serialize_index(index).tobytes()
    return BuiltIndex(data, point.kind, lists, point.probes, point.recall, tuple(curve))


def _measured(
    kind: str, vectors: _F32, queries: _F32, truth: _F32, target: float, curve: list[IndexPoint]
) -> tuple[Any, IndexPoint]:
    """Returns an index of a kind, and the way of searching it that costs least of those that reach the target."""
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    _fill(index, vectors)
    return index, _fewest_probes(index, kind, vectors, queries, truth, target, curve)


def _fewest_probes(
    index: Any, kind: str, vectors: _F32, queries: _F32, truth: _F32, target: float, curve: list[IndexPoint]
) -> IndexPoint:
    """Sets the fewest probes with which an index reaches the target, or the most that it may probe; extends `curve`."""
    lists = getattr(index, "nlist", 0)
    most = math.floor(lists * MOST_PROBED[kind.rpartition(",")[2]])
    # The fewest first: each probe costs a scan of its list at every search.
    probes = min(8, lists)
    while True:
        if lists:
            index.nprobe = probes
        recall = _recall(index, vectors, queries, truth)
        curve.append(IndexPoint(kind, probes, recall, _rate(index, queries[:_TIMED])))
        if min(recall.values()) >= target or probes >= most:
            return curve[-1]
        probes = min(math.ceil(1.5 * probes), most)


def _rate(index: Any, queries: _F32) -> float:
    """Returns the searches that one thread makes in a second."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        # Processor time: the machine may have other work.
        begun = time.thread_time()
        for query in queries:  # one by one, as requests come
            index.search(query[None], max(CUTOFFS))
        seconds = time.thread_time() - begun
    finally:
        faiss.omp_set_num_threads(threads)
    return round(len(queries) / max(seconds, 1e-9), 1)


def _tell_cost(curve: list[IndexPoint], target: float) -> None:
    """Warns that no lists reach the target, and of what that costs each search."""
    exact, nearest = curve[-1], max(curve[:-1], key=lambda point: min(point.recall.values()))
    _log.warning(
        "no index of lists reaches recall %g: %s finds %.3f with %d lists probed, at %.0f searches a second; so every "
        "search compares all vectors, at %.0f a second. If that is too slow, export with --recall %.2f",
        target,
        nearest.kind,
        min(nearest.recall.values()),
        nearest.probes,
        nearest.queries_per_second,
        exact.queries_per_second,
        math.floor(100 * min(nearest.recall.values())) / 100,
    )


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
