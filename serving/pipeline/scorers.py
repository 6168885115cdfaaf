"""The scorers: one float32 per candidate, higher is better, never dependent on the other candidates."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from features.action_rates import ActionRates
from features.assemble import moment_at, ranker_features
from features.catalog import Catalog
from features.declared import NONE_DECLARED, Declared
from features.kernels import dot_rows
from serving.bundle.model import Model
from serving.bundle.text_index import LexicalIndex
from serving.pipeline.candidates import Candidates
from serving.pipeline.request import (
    FRESH,
    NEAREST,
    NEIGHBORS,
    POPULAR,
    SEGMENT,
    UPSTREAM,
    WANTED,
    Request,
    Rows,
    Scores,
    UserState,
)
from serving.pipeline.results import Scored

MEANING_SHARE = 0.4
"""Share of the cosine in a text match; the rest is words."""

_LEAST = 1e-6  # keeps the log-odds of a certain action finite
_LARGEST = float(np.finfo(np.float32).max)


class PersonalRanker:
    """Scores rows for one user: relevance + blend * utility, the score that evaluation measures."""

    def __init__(
        self,
        model: Model,
        catalog: Catalog,
        rates: ActionRates,
        weights: Sequence[float],
        blend: float,
        logged: float = 0.0,
        declared: Declared = NONE_DECLARED,
    ) -> None:
        """Takes the rates of actions, the weights of actions and of their sum, the share of logged features, and more.

        The last are the declared features of the model.
        """
        self._model, self._catalog, self._rates, self._declared = model, catalog, rates, declared
        self._logged = round(logged * 2**32)
        self._weights, self._blend = np.array(weights, np.float64), blend

    def score(self, request: Request, user: UserState, rows: Rows, relevance: Scores | None = None) -> Scored:
        """Scores rows for a user with a vector; `relevance` float32 [n] is theirs, if it is known."""
        assert user.vector is not None
        if not rows.size:
            return Scored(np.empty(0, np.float32))
        columns = self._catalog.columns
        if relevance is None or np.isnan(relevance).any():
            relevance = self.relevance(user, rows)
        # If neither blend, the caller's scores nor dials move the order, only the page needs its probabilities.
        moved = self._blend or request.upstream is not None or any(user.dials.values())
        at = np.arange(rows.size) if moved else np.argsort(-relevance, kind="stable")[: request.page_size]
        judged = rows[at]
        features = self.features(request, user, judged, relevance[at])
        logits = self._model.rank(user.vector, columns.vectors[judged], features)
        probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
        scores = relevance
        if self._blend:
            scores = (relevance + self._blend * utility(probabilities, self._weights)).astype(np.float32)
        # A hash of the request id and not a draw, so that a repeated request is logged alike.
        logged = zlib.crc32(request.request_id.encode()) < self._logged
        return Scored(
            scores, _spread(probabilities, at, rows.size), _spread(features, at, rows.size) if logged else None
        )

    def relevance(self, user: UserState, rows: Rows) -> Scores:
        """Returns the relevance of rows to a user with a vector; float32 [n]."""
        assert user.vector is not None
        return dot_rows(self._catalog.columns.vectors, rows, user.vector) + user.linear.of(rows)

    def features(self, request: Request, user: UserState, rows: Rows, relevance: Scores) -> Scores:
        """Returns what the ranker reads of rows; float32 [n, F]."""
        assert user.history is not None
        moment = moment_at(self._declared, request.now_ms, request.surface, request.context, user.controls)
        return ranker_features(user.history, rows, relevance, self._catalog.columns, self._rates, moment)


class FeedScorer:
    """Scores a feed, tier by tier: by the personal score; else the neighbours', the segment's, the popular items'.

    The candidates of a lower tier score below all of those above it, in their own order.
    """

    name = "score"

    def __init__(self, personal: PersonalRanker) -> None:
        self._personal = personal

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True: every request needs it."""
        return True

    def score(self, request: Request, user: UserState, candidates: Candidates) -> Scored:
        """Scores a feed's candidates."""
        if NEAREST in candidates.names:
            scored = self._personal.score(request, user, candidates.rows, candidates.of(NEAREST))
            if {NEIGHBORS, SEGMENT, POPULAR}.isdisjoint(candidates.names):
                return scored
            # Extras compete with the highest tier, whichever tier names them as well.
            extra = ~np.isnan([candidates.of(FRESH), candidates.of(WANTED)]).all(axis=0)
            return scored._replace(scores=behind(scored.scores, np.where(extra, 0, candidates.tier_of_each())))
        # Without a user vector each tier keeps the scores of its source: the lower tiers are squeezed below zero, where
        # the scores of neighbours and segments are not.
        score = candidates.of(POPULAR).astype(np.float64)
        for name in (WANTED, FRESH):
            score = np.where(np.isnan(score), candidates.of(name), score)
        for name in (SEGMENT, NEIGHBORS):
            if name in candidates.names:
                lead = candidates.of(name)
                score = np.where(np.isnan(lead), below_zero(score), lead)
        return Scored(score.astype(np.float32))


class SearchScorer:
    """Scores search results: how well the text matches (0 to 1), moved at most `personal` by the user's taste."""

    name = "score"

    def __init__(self, lexical: LexicalIndex, catalog: Catalog, personal: float) -> None:
        self._lexical, self._catalog, self._personal = lexical, catalog, np.float32(personal)

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True: every request needs it."""
        return True

    def score(self, request: Request, user: UserState, candidates: Candidates) -> Scored:
        """Scores search results."""
        rows, vectors = candidates.rows, self._catalog.columns.vectors
        score = np.zeros(rows.size, np.float32)
        if request.tokens is not None and request.tokens.size:
            score += self._lexical.score(request.tokens, rows) * np.float32(1 - MEANING_SHARE)
        lengths = np.linalg.norm(vectors[rows], axis=1)
        if user.query_vector is not None:
            # A text that points away from the query is no worse than one without a relation to it.
            score += np.maximum(cosine(vectors, rows, user.query_vector, lengths), 0) * np.float32(MEANING_SHARE)
        if user.vector is not None and self._personal:
            score += cosine(vectors, rows, user.vector, lengths) * self._personal
        return Scored(score)


class RankScorer:
    """Scores the caller's candidates: its own score, plus how well they match its query, or else the personal score.

    With a query they are scored as search results are. With neither a query nor a user vector, the order is exactly the
    caller's.
    """

    name = "score"

    def __init__(self, personal: PersonalRanker, search: SearchScorer) -> None:
        self._personal, self._search = personal, search

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True: every request needs it."""
        return True

    def score(self, request: Request, user: UserState, candidates: Candidates) -> Scored:
        """Scores the caller's candidates."""
        upstream = candidates.of(UPSTREAM)
        if request.tokens is not None and request.tokens.size:
            scored = self._search.score(request, user, candidates)
        elif user.vector is not None:
            scored = self._personal.score(request, user, candidates.rows)
        else:
            return Scored(upstream)
        if request.upstream is None:
            return scored
        # In float64, and then to the nearest float32: a sum past the largest number would count as no score, and sink.
        total = np.clip(request.upstream_weight * upstream.astype(np.float64) + scored.scores, -_LARGEST, _LARGEST)
        return scored._replace(scores=np.where(np.isfinite(scored.scores), total, -np.inf).astype(np.float32))


class SimilarScorer:
    """Scores items like the seeds: by the mean of their cosines."""

    name = "score"

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if the catalogue knows a seed."""
        return request.seeds.size > 0

    def score(self, request: Request, user: UserState, candidates: Candidates) -> Scored:
        """Scores neighbours."""
        vectors = self._catalog.columns.vectors
        seeds = vectors[request.seeds]
        seeds /= np.maximum(np.linalg.norm(seeds, axis=1, keepdims=True), np.float32(1e-12))
        middle = seeds.mean(axis=0, dtype=np.float32)
        # The mean of the cosines is the cosine with the mean direction times the length of that mean.
        lengths = np.linalg.norm(vectors[candidates.rows], axis=1)
        return Scored(cosine(vectors, candidates.rows, middle, lengths) * np.float32(np.linalg.norm(middle)))


def behind(scores: Scores, tiers: npt.NDArray[np.intp]) -> Scores:
    """Returns the scores float32 [n], each tier moved as a whole below all of the tiers above it, 0 the highest."""
    out, floor = scores.astype(np.float64), np.inf
    # Each tier moves by one offset, so that its own order, and the differences in it, stay.
    for tier in np.unique(tiers):
        at = np.flatnonzero((tiers == tier) & np.isfinite(scores))
        if at.size:
            # A gap relative to the floor, as a fixed one would vanish in the rounding of large scores.
            gap = 1e-4 * max(1.0, abs(floor)) if floor < np.inf else 0.0
            out[at] += min(0.0, floor - gap - out[at].max())
            floor = out[at].min()
    return out.astype(np.float32)


def below_zero(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns numbers between -1 and 0 in the same order; float64 [n]."""
    near = 0.5 / (1 + np.abs(scores))
    return np.where(scores >= 0, -near, near - 1)


def _spread(values: npt.NDArray[Any], at: npt.NDArray[np.intp], count: int) -> Scores:
    """Returns the values [k, w] at the positions `at` of `count`, NaN elsewhere; float32 [count, w]."""
    spread = np.full((count, values.shape[1]), np.nan, np.float32)
    spread[at] = values
    return spread


def utility(probabilities: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns the log-odds of the weighted sum of the actions' probabilities [n, A]; float64 [n]."""
    # Log-odds, because relevance is an unbounded logit too: the blend adds like to like.
    share = np.clip((probabilities * weights).sum(axis=1), _LEAST, 1 - _LEAST)
    return np.asarray(np.log(share / (1 - share)))


def cosine(vectors: Scores, rows: Rows, query: Scores, lengths: Scores) -> Scores:
    """Returns the cosine of `query` float32 [D] with the vectors of `rows`, which have these lengths; float32 [n].

    0 where either has no direction.
    """
    product = np.maximum(lengths * np.float32(np.linalg.norm(query)), np.float32(1e-12))
    return np.asarray(dot_rows(vectors, rows, query) / product, np.float32)
