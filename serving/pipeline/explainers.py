"""Why each item is in a slate, for the page only, and only when somebody asks."""

from __future__ import annotations

import numpy as np

from features.assemble import chosen_rows
from features.catalog import Catalog
from features.controls import Dial
from features.transforms import item_text, text_tokens, words
from serving.pipeline.query import POPULAR, SEGMENT, Query, Reason, Rows, Scores, Slate

_NONE = -1
_ASKED = {
    Dial.NOVELTY: ("for the familiar", "for what you do not know yet"),
    Dial.DIVERSITY: ("", "for a mix of topics"),
    Dial.FRESHNESS: ("for what is older", "for what is new"),
    Dial.CREATOR_WEIGHT: ("for less of {creator_id}", "for more of {creator_id}"),
    Dial.CATEGORY_WEIGHT: ("for less of {category}", "for more of {category}"),
}


class Reasons:
    """Reasons read from the answer itself: the nearest item of the history, the words, seeds, sources and dials."""

    name = "reasons"

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, query: Query) -> bool:
        """Where the caller asked."""
        return query.explain

    def explain(self, query: Query, slate: Slate) -> list[list[Reason]]:
        """The reasons of each item, the most telling first."""
        reasons: list[list[Reason]] = [[] for _ in slate.rows]
        self._upstream(query, slate, reasons)
        self._words(query, slate, reasons)
        self._nearest(query.seeds, "similar_to_seed", "similar to", slate, reasons)
        if query.user_vector is not None and query.history is not None:
            self._nearest(np.unique(chosen_rows(query.history)), "like_history", "like", slate, reasons)
        self._segment(query, slate, reasons)
        self._popular(slate, reasons)
        self._dials(query, slate, reasons)
        return reasons

    def _upstream(self, query: Query, slate: Slate, reasons: list[list[Reason]]) -> None:
        if query.upstream is not None:
            for mine, score in zip(reasons, slate.candidates.of("upstream").tolist(), strict=True):
                mine.append(Reason("upstream", _NONE, f"the caller's score is {score:.4g}", score))

    def _words(self, query: Query, slate: Slate, reasons: list[list[Reason]]) -> None:
        if query.tokens is None:
            return
        asked = dict(zip(query.tokens.tolist(), words(query.text), strict=True))
        scores = slate.candidates.of("words").tolist()
        for mine, row, score in zip(reasons, slate.rows.tolist(), scores, strict=True):
            held = set(text_tokens(item_text(self._catalog.item(row))).tolist())
            shared = [word for token, word in asked.items() if token in held]
            if shared:
                weight = score if score == score else 0.0
                mine.append(Reason("matches_query", _NONE, f"matches {', '.join(shared)}", weight))

    def _nearest(self, rows: Rows, kind: str, text: str, slate: Slate, reasons: list[list[Reason]]) -> None:
        if not rows.size or not slate.rows.size:
            return
        vectors = self._catalog.columns.vectors
        likeness = _directions(vectors[slate.rows]) @ _directions(vectors[rows]).T
        # An item that was had before is no reason for itself.
        likeness[slate.rows[:, None] == rows[None]] = -1
        best = likeness.argmax(axis=1)
        for mine, at, weight in zip(reasons, best.tolist(), likeness.max(axis=1).tolist(), strict=True):
            if weight > 0:
                item = self._catalog.item(int(rows[at]))
                title = item.get("title") or item["item_id"]
                mine.append(Reason(kind, int(rows[at]), f"{text} {title}", weight))

    def _segment(self, query: Query, slate: Slate, reasons: list[list[Reason]]) -> None:
        for mine, score in zip(reasons, slate.candidates.of(SEGMENT).tolist(), strict=True):
            if score == score:
                mine.append(Reason(SEGMENT, _NONE, f"popular with those who like {query.segment}", score))

    def _dials(self, query: Query, slate: Slate, reasons: list[list[Reason]]) -> None:
        """Each dial that moved an item, and how far."""
        for (dial, key), moved in slate.moves.items():
            text = "you asked " + _ASKED[dial][query.dials[dial, key] > 0]
            for mine, row, move in zip(reasons, slate.rows.tolist(), moved.tolist(), strict=True):
                if move:
                    item = self._catalog.item(row)
                    category = (item.get("categories") or [""])[0]
                    said = text.format(category=category, creator_id=item.get("creator_id"))
                    mine.append(Reason("dial", _NONE, said, move))

    def _popular(self, slate: Slate, reasons: list[list[Reason]]) -> None:
        if POPULAR not in slate.candidates.names:
            return
        popularity = self._catalog.columns.popularity[slate.rows].tolist()
        named = np.isfinite(slate.candidates.of(POPULAR)).tolist()
        for mine, value, by_popular in zip(reasons, popularity, named, strict=True):
            if by_popular:
                mine.append(Reason("popular", _NONE, "popular with everybody", value))


def _directions(vectors: Scores) -> Scores:
    """The vectors at length 1; float32 [n, D]."""
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    return np.asarray(vectors / lengths, np.float32)
