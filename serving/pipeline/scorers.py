"""How good each candidate is: one float32 per candidate, higher is better, never dependent on the other candidates."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from features.action_rates import ActionRates
from features.assemble import Moment, ranker_features
from features.catalog import Catalog
from features.kernels import dot_rows
from serving.bundle.model import Model
from serving.bundle.text_index import LexicalIndex
from serving.pipeline.query import (
    FRESH,
    NEAREST,
    NEIGHBORS,
    POPULAR,
    SEGMENT,
    UPSTREAM,
    WANTED,
    Candidates,
    Query,
    Rows,
    Scores,
)

MEANING_SHARE = 0.4
"""Share of the cosine in a text match; the rest is words."""

_LEAST = 1e-6
_LARGEST = float(np.finfo(np.float32).max)


class Personal:
    """What one person thinks of rows: relevance + blend * utility, the score that evaluation measures."""

    def __init__(
        self,
        model: Model,
        catalog: Catalog,
        outcomes: ActionRates,
        weights: Sequence[float],
        blend: float,
        logged: float = 0.0,
    ) -> None:
        """Takes how actions are read, the weight of each, that of their sum, and the share of logged features."""
        self._model, self._catalog, self._outcomes = model, catalog, outcomes
        self._logged = round(logged * 2**32)
        self._weights, self._blend = np.array(weights, np.float64), blend

    def score(self, query: Query, rows: Rows) -> Scores:
        """Scores rows for a query with a user vector, and keeps the probabilities for the answer."""
        assert query.user_vector is not None
        assert query.history is not None
        if not rows.size:
            return np.empty(0, np.float32)
        columns = self._catalog.columns
        relevance: Scores = dot_rows(columns.vectors, rows, query.user_vector)
        # Where nothing moves the order, only the items of the page need their probabilities.
        moved = self._blend or any(query.dials.values())
        at = np.arange(rows.size) if moved else np.argsort(-relevance, kind="stable")[: query.page_size]
        judged = rows[at]
        features = self.read(query, judged, relevance[at])
        if zlib.crc32(query.request_id.encode()) < self._logged:
            query.features = np.full((rows.size, features.shape[1]), np.nan, np.float32)
            query.features[at] = features
        logits = self._model.rank(query.user_vector, columns.vectors[judged], features)
        probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
        query.probabilities = np.full((rows.size, probabilities.shape[1]), np.nan, np.float32)
        query.probabilities[at] = probabilities
        if not self._blend:
            return relevance
        return (relevance + self._blend * utility(probabilities, self._weights)).astype(np.float32)

    def read(self, query: Query, rows: Rows, relevance: Scores) -> Scores:
        """What the ranker reads of rows; float32 [n, F]."""
        assert query.history is not None
        moment = Moment(query.now_ms, query.surface)
        return ranker_features(query.history, rows, relevance, self._catalog.columns, self._outcomes, moment)


class FeedScorer:
    """A feed, tier by tier: the personal score; else the neighbours', then the segment's, then what is popular.

    The candidates of a lower tier score below all of those above it, in their own order.
    """

    name = "score"

    def __init__(self, personal: Personal) -> None:
        self._personal = personal

    def enable(self, query: Query) -> bool:
        """Always."""
        return True

    def score(self, query: Query, candidates: Candidates) -> Scores:
        """Scores a feed's candidates."""
        if NEAREST in candidates.names:
            scores = self._personal.score(query, candidates.rows)
            if {NEIGHBORS, SEGMENT, POPULAR}.isdisjoint(candidates.names):
                return scores
            beside = ~np.isnan([candidates.of(FRESH), candidates.of(WANTED)]).all(axis=0)
            return behind(scores, np.where(beside, 0, candidates.tier_of_each()))
        score = candidates.of(POPULAR).astype(np.float64)
        for name in (WANTED, FRESH):
            score = np.where(np.isnan(score), candidates.of(name), score)
        for name in (SEGMENT, NEIGHBORS):
            if name in candidates.names:
                lead = candidates.of(name)
                score = np.where(np.isnan(lead), below_zero(score), lead)
        return score.astype(np.float32)


class SearchScorer:
    """Search results: how well the text matches (0 to 1), moved at most `personal` up or down by the person's taste."""

    name = "score"

    def __init__(self, lexical: LexicalIndex, catalog: Catalog, personal: float) -> None:
        self._lexical, self._catalog, self._personal = lexical, catalog, np.float32(personal)

    def enable(self, query: Query) -> bool:
        """Always."""
        return True

    def score(self, query: Query, candidates: Candidates) -> Scores:
        """Scores search results."""
        rows, vectors = candidates.rows, self._catalog.columns.vectors
        score = np.zeros(rows.size, np.float32)
        if query.tokens is not None and query.tokens.size:
            score += self._lexical.score(query.tokens, rows) * np.float32(1 - MEANING_SHARE)
        lengths = np.linalg.norm(vectors[rows], axis=1)
        if query.query_vector is not None:
            score += np.maximum(cosine(vectors, rows, query.query_vector, lengths), 0) * np.float32(MEANING_SHARE)
        if query.user_vector is not None and self._personal:
            score += cosine(vectors, rows, query.user_vector, lengths) * self._personal
        return score


class RankScorer:
    """The caller's candidates: its own score, and on top how well they match its query, or else the personal score.

    With a query they are scored as search results are. With neither a query nor a user vector, the order is exactly the
    caller's.
    """

    name = "score"

    def __init__(self, personal: Personal, search: SearchScorer) -> None:
        self._personal, self._search = personal, search

    def enable(self, query: Query) -> bool:
        """Always."""
        return True

    def score(self, query: Query, candidates: Candidates) -> Scores:
        """Scores the caller's candidates."""
        upstream = candidates.of(UPSTREAM)
        if query.tokens is not None and query.tokens.size:
            own = self._search.score(query, candidates)
        elif query.user_vector is not None:
            own = self._personal.score(query, candidates.rows)
        else:
            return upstream
        if query.upstream is None:
            return own
        # In float64, and then to the nearest float32: a sum past the largest number would count as no score, and sink.
        both = query.upstream_weight * upstream.astype(np.float64) + own
        return np.where(np.isfinite(own), np.clip(both, -_LARGEST, _LARGEST), -np.inf).astype(np.float32)


class SimilarScorer:
    """Items like the seeds: the mean of their cosines."""

    name = "score"

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, query: Query) -> bool:
        """Where the catalogue knows a seed."""
        return query.seeds.size > 0

    def score(self, query: Query, candidates: Candidates) -> Scores:
        """Scores neighbours."""
        vectors = self._catalog.columns.vectors
        seeds = vectors[query.seeds]
        seeds /= np.maximum(np.linalg.norm(seeds, axis=1, keepdims=True), np.float32(1e-12))
        middle = seeds.mean(axis=0, dtype=np.float32)
        # The mean of the cosines is the cosine with the mean direction times the length of that mean.
        lengths = np.linalg.norm(vectors[candidates.rows], axis=1)
        return cosine(vectors, candidates.rows, middle, lengths) * np.float32(np.linalg.norm(middle))


def behind(scores: Scores, tiers: npt.NDArray[np.intp]) -> Scores:
    """The scores float32 [n], those of each tier moved as a whole below all of the tiers above it, 0 the highest."""
    out, floor = scores.astype(np.float64), np.inf
    for tier in np.unique(tiers):
        at = np.flatnonzero((tiers == tier) & np.isfinite(scores))
        if at.size:
            gap = 1e-4 * max(1.0, abs(floor)) if floor < np.inf else 0.0
            out[at] += min(0.0, floor - gap - out[at].max())
            floor = out[at].min()
    return out.astype(np.float32)


def below_zero(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Numbers between -1 and 0 in the same order; float64 [n]."""
    near = 0.5 / (1 + np.abs(scores))
    return np.where(scores >= 0, -near, near - 1)


def utility(probabilities: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-odds of the weighted sum of the actions' probabilities [n, A]; float64 [n]."""
    share = np.clip((probabilities * weights).sum(axis=1), _LEAST, 1 - _LEAST)
    return np.asarray(np.log(share / (1 - share)))


def cosine(vectors: Scores, rows: Rows, query: Scores, lengths: Scores) -> Scores:
    """Cosine of `query` float32 [D] with the vectors of `rows`, which have these lengths; float32 [n].

    0 where either has no direction.
    """
    both = np.maximum(lengths * np.float32(np.linalg.norm(query)), np.float32(1e-12))
    return np.asarray(dot_rows(vectors, rows, query) / both, np.float32)
