"""The explainer: why each item is in a slate, for the page only, and only for requests that want reasons."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from features.assemble import chosen_rows
from features.catalog import Catalog
from features.controls import Dial
from features.transforms import item_text, text_tokens, words
from serving.pipeline.request import POPULAR, SEGMENT, Request, Rows, Scores, UserState
from serving.pipeline.results import Reason, Slate

ByPosition = dict[int, Reason]
"""Reasons of one kind, by position in the slate."""

_NONE = -1
_DIAL_TEXTS = {
    Dial.NOVELTY: ("for the familiar", "for what you do not know yet"),
    Dial.DIVERSITY: ("", "for a mix of topics"),
    Dial.FRESHNESS: ("for what is older", "for what is new"),
    Dial.CREATOR_WEIGHT: ("for less of {creator_id}", "for more of {creator_id}"),
    Dial.CATEGORY_WEIGHT: ("for less of {category}", "for more of {category}"),
}


class SlateExplainer:
    """Reads reasons from the answer itself: the nearest item of the history, the words, seeds, sources and dials."""

    name = "reasons"

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if the caller asks for reasons."""
        return request.explain

    def explain(self, request: Request, slate: Slate) -> list[list[Reason]]:
        """Returns the reasons of each item, the most telling first."""
        user, each_kind = slate.user, [self._upstream(request, slate), self._words(request, slate)]
        each_kind.append(self._nearest(request.seeds, "similar_to_seed", "similar to", slate))
        if user.vector is not None and user.history is not None:
            each_kind.append(self._nearest(np.unique(chosen_rows(user.history)), "like_history", "like", slate))
        each_kind += [self._segment(slate), self._popular(slate), *self._dials(slate)]
        reasons: list[list[Reason]] = [[] for _ in slate.rows]
        for by_position in each_kind:
            for position, reason in by_position.items():
                reasons[position].append(reason)
        return reasons

    def _upstream(self, request: Request, slate: Slate) -> ByPosition:
        if request.upstream is None:
            return {}
        scores = slate.candidates.of("upstream").tolist()
        return {
            at: Reason("upstream", _NONE, f"the caller's score is {score:.4g}", score)
            for at, score in enumerate(scores)
        }

    def _words(self, request: Request, slate: Slate) -> ByPosition:
        reasons: ByPosition = {}
        if request.tokens is None:
            return reasons
        words_of = dict(zip(request.tokens.tolist(), words(request.text), strict=True))
        scores = slate.candidates.of("words").tolist()
        for at, (row, score) in enumerate(zip(slate.rows.tolist(), scores, strict=True)):
            tokens = set(text_tokens(item_text(self._catalog.item(row))).tolist())
            shared = [word for token, word in words_of.items() if token in tokens]
            if shared:
                # An item that its vector alone has found may share words too: they explain it, without a strength.
                weight = 0.0 if math.isnan(score) else score
                reasons[at] = Reason("matches_query", _NONE, f"matches {', '.join(shared)}", weight)
        return reasons

    def _nearest(self, rows: Rows, kind: str, text: str, slate: Slate) -> ByPosition:
        reasons: ByPosition = {}
        if not rows.size or not slate.rows.size:
            return reasons
        vectors = self._catalog.columns.vectors
        likeness = _directions(vectors[slate.rows]) @ _directions(vectors[rows]).T
        # An item of the history is no reason for itself.
        likeness[slate.rows[:, None] == rows[None]] = -1
        best = rows[likeness.argmax(axis=1)].tolist()
        for at, (row, weight) in enumerate(zip(best, likeness.max(axis=1).tolist(), strict=True)):
            if weight > 0:
                item = self._catalog.item(row)
                reasons[at] = Reason(kind, row, f"{text} {item.get('title') or item['item_id']}", weight)
        return reasons

    def _segment(self, slate: Slate) -> ByPosition:
        text = f"popular with those who like {slate.user.segment}"
        scores = slate.candidates.of(SEGMENT).tolist()
        return {at: Reason(SEGMENT, _NONE, text, score) for at, score in enumerate(scores) if not math.isnan(score)}

    def _popular(self, slate: Slate) -> ByPosition:
        if POPULAR not in slate.candidates.names:
            return {}
        # Not the score of the source: below the exported table that is only a place in its order.
        popularity = self._catalog.columns.popularity[slate.rows].tolist()
        named = np.flatnonzero(np.isfinite(slate.candidates.of(POPULAR))).tolist()
        return {at: Reason("popular", _NONE, "popular with all users", popularity[at]) for at in named}

    def _dials(self, slate: Slate) -> Iterator[ByPosition]:
        """Yields for each dial the items that it moved, and how far."""
        for (dial, key), moved in slate.moves.items():
            text = "you asked " + _DIAL_TEXTS[dial][slate.user.dials[dial, key] > 0]
            reasons: ByPosition = {}
            for at, (row, move) in enumerate(zip(slate.rows.tolist(), moved.tolist(), strict=True)):
                if move:
                    item = self._catalog.item(row)
                    category = (item.get("categories") or [""])[0]
                    dial_text = text.format(category=category, creator_id=item.get("creator_id"))
                    reasons[at] = Reason("dial", _NONE, dial_text, move)
            yield reasons


def _directions(vectors: Scores) -> Scores:
    """Returns the vectors at length 1; float32 [n, D]."""
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    return np.asarray(vectors / lengths, np.float32)
