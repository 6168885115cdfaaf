"""Where candidates come from: each source names rows of the catalogue and scores them its own way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from features.catalog import Catalog
from features.controls import Dial
from serving.index import Index
from serving.lexical import LexicalIndex
from serving.pipeline import NEIGHBORS, POPULAR, SEGMENT, WANTED, Query, Rows, Scores

_CHUNK = 2048
_DAY_MS = 86_400_000
_RECENT = 20
_WANTED = 100
_WEIGHTS = {Dial.CATEGORY_WEIGHT: "category", Dial.CREATOR_WEIGHT: "creator"}


def allowed(query: Query, catalog: Catalog, *, seen: bool) -> npt.NDArray[np.uint8]:
    """A hint for retrieval: one bit a row, set where the row may be shown and, with `seen`, is new to the person.

    Lowest bit first; uint8 [ceil(size / 8)].
    """
    bitmap = catalog.eligible_bitmap(query.now_ms)
    out = np.concatenate([query.exclude, query.seeds, query.seen if seen else query.exclude[:0]])
    if out.size:
        out = out[out >> 3 < bitmap.size]
        bitmap = bitmap.copy()
        np.bitwise_and.at(bitmap, out >> 3, ~(np.uint8(1) << (out & 7).astype(np.uint8)))
    return bitmap


def first_allowed(rows: Rows, bitmap: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.intp]:
    """Places of the first `count` of `rows` whose bit is set."""
    wanted, found = count, [np.empty(0, np.intp)]
    for start in range(0, rows.size, _CHUNK):
        part = rows[start : start + _CHUNK]
        at = np.flatnonzero((bitmap[part >> 3] >> (part & 7).astype(np.uint8)) & 1)[:wanted] + start
        found.append(at)
        wanted -= at.size
        if not wanted:
            break
    return np.concatenate(found)


class NearestToUser:
    """Items whose vectors lie nearest to the person's."""

    name = "nearest"

    def __init__(self, index: Index, catalog: Catalog, count: int, *, repeats: bool) -> None:
        self._index, self._catalog, self._count, self._repeats = index, catalog, count, repeats

    def enable(self, query: Query) -> bool:
        """Where the person has a vector."""
        return query.user_vector is not None

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The nearest allowed items and their relevance."""
        assert query.user_vector is not None
        try:
            bitmap = allowed(query, self._catalog, seen=not self._repeats)
            rows, scores = self._index.search(query.user_vector[None], self._count, bitmap)
        except Exception:
            # Whatever it is, the sources of the rungs below come after this one and see that they are wanted.
            query.user_vector, query.rung = None, "item_to_item"
            raise
        return rows[0], scores[0]


class Neighbors:
    """The table of item neighbours that export made: row -> nearest rows and their cosine."""

    def __init__(self, rows: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]) -> None:
        self._rows, self._scores = rows, scores

    def of(self, rows: Rows, weights: npt.NDArray[np.float32], count: int) -> tuple[Rows, Scores]:
        """The items most often and most nearly next to `rows`, the sum of weighted cosines, best first."""
        known = rows < len(self._rows)
        found = self._rows[rows[known]]
        scores = (self._scores[rows[known]] * weights[known, None])[found >= 0]
        near, place = np.unique(found[found >= 0], return_inverse=True)
        total = np.bincount(place, scores, near.size).astype(np.float32)
        best = np.argsort(-total, kind="stable")[:count]
        return near[best].astype(np.int32), total[best]


class ItemNeighbors:
    """Neighbours of the items a person touched last: what serves when the encoder cannot."""

    name = NEIGHBORS

    def __init__(self, neighbors: Neighbors, count: int) -> None:
        self._neighbors, self._count = neighbors, count

    def enable(self, query: Query) -> bool:
        """On the rung below the sequence model."""
        return query.rung == "item_to_item"

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """Neighbours of the newest items, newer ones weighing more; where there is none, the rung is the next lower."""
        assert query.history is not None
        query.rung = query.lowest_rung
        rows = query.history.rows[query.history.rows >= 0][-_RECENT:]
        weights = (0.9 ** np.arange(rows.size)[::-1]).astype(np.float32)
        near, scores = self._neighbors.of(rows, weights, self._count)
        if near.size:
            query.rung = "item_to_item"
        return near, scores


class NeighborsOfSeeds:
    """Neighbours of the seeds by the exported table."""

    name = NEIGHBORS

    def __init__(self, neighbors: Neighbors, count: int) -> None:
        self._neighbors, self._count = neighbors, count

    def enable(self, query: Query) -> bool:
        """Where there are seeds."""
        return bool(query.seeds.size)

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """Neighbours of all seeds."""
        return self._neighbors.of(query.seeds, np.ones(query.seeds.size, np.float32), self._count)


class SimilarToSeeds:
    """Items whose vectors point where the seeds' do."""

    name = "similar"

    def __init__(self, index: Index, catalog: Catalog, count: int) -> None:
        self._index, self._catalog, self._count = index, catalog, count

    def enable(self, query: Query) -> bool:
        """Where there are seeds."""
        return bool(query.seeds.size)

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The items nearest to the mean direction of the seeds."""
        vectors = self._catalog.columns.vectors[query.seeds]
        lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        direction = (vectors / lengths).mean(axis=0, dtype=np.float32)
        bitmap = allowed(query, self._catalog, seen=False)
        rows, scores = self._index.search(direction[None], self._count, bitmap)
        return rows[0], scores[0]


class MatchingWords:
    """Items that share words with the query, by BM25."""

    name = "words"

    def __init__(self, lexical: LexicalIndex, catalog: Catalog, count: int) -> None:
        self._lexical, self._catalog, self._count = lexical, catalog, count

    def enable(self, query: Query) -> bool:
        """Where there are words."""
        return query.tokens is not None and bool(query.tokens.size)

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The best matches, as a share of the best match there could be."""
        assert query.tokens is not None
        return self._lexical.search(query.tokens, self._count, allowed(query, self._catalog, seen=False))


class MatchingMeaning:
    """Items whose vectors lie nearest to the query's."""

    name = "meaning"

    def __init__(self, index: Index, catalog: Catalog, count: int) -> None:
        self._index, self._catalog, self._count = index, catalog, count

    def enable(self, query: Query) -> bool:
        """Where the query has a vector."""
        return query.query_vector is not None

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The nearest items and their inner product with the query."""
        assert query.query_vector is not None
        bitmap = allowed(query, self._catalog, seen=False)
        rows, scores = self._index.search(query.query_vector[None], self._count, bitmap)
        return rows[0], scores[0]


class Popular:
    """What most people like; safe for anybody."""

    name = POPULAR

    def __init__(self, rows: Rows, scores: Scores, catalog: Catalog, *, repeats: bool) -> None:
        """Takes the popular items, best first, and their scores."""
        self._rows, self._scores, self._catalog, self._repeats = rows, scores, catalog, repeats

    def enable(self, query: Query) -> bool:
        """Wherever the person has no vector: nobody is known, or what was to find their items failed."""
        return query.user_vector is None

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """A page of allowed popular items: enough to fill the answer, whatever the later stages take away."""
        bitmap = allowed(query, self._catalog, seen=not self._repeats)
        places = first_allowed(self._rows, bitmap, 2 * query.page_size)
        return self._rows[places], self._scores[places]


class PopularInSegment:
    """What people like who choose the same category most."""

    name = SEGMENT

    def __init__(self, tables: Mapping[str, tuple[Rows, Scores]], catalog: Catalog, *, repeats: bool) -> None:
        """Takes, by the name of the category, the items that such people like, best first, and their scores."""
        self._tables, self._catalog, self._repeats = tables, catalog, repeats

    def enable(self, query: Query) -> bool:
        """On the rung below the neighbours of items."""
        return query.rung == "segment"

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """A page of allowed ones, as `Popular` does; where there is none, the rung is the lowest."""
        rows, scores = self._tables[query.segment]
        places = first_allowed(rows, allowed(query, self._catalog, seen=not self._repeats), 2 * query.page_size)
        if not places.size:
            query.rung = "popular"
        return rows[places], scores[places]


class Wanted:
    """What the person's dials ask more of: the most popular items of those creators and categories."""

    name = WANTED

    def __init__(self, catalog: Catalog, *, repeats: bool) -> None:
        self._catalog, self._repeats = catalog, repeats

    def enable(self, query: Query) -> bool:
        """Where a creator or a category is turned up."""
        return any(dial in _WEIGHTS and value > 0 for (dial, _), value in query.dials.items())

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The most popular allowed ones, live items last."""
        columns, bitmap = self._catalog.columns, allowed(query, self._catalog, seen=not self._repeats)
        asked = np.unpackbits(bitmap, bitorder="little")[: columns.capacity].view(np.bool_)
        hits = np.zeros(asked.size, np.bool_)
        for (dial, key), value in query.dials.items():
            if dial in _WEIGHTS and value > 0:
                hits |= getattr(columns, _WEIGHTS[dial])[: hits.size] == np.uint64(key)
        rows = np.flatnonzero(asked & hits)
        popularity = (columns.recent_popularity[rows] + 1e-3 * columns.popularity[rows]).astype(np.float32)
        best = np.argsort(-popularity, kind="stable")[:_WANTED]
        return rows[best].astype(np.int32), popularity[best]


class Fresh:
    """Items put while the service runs, which nobody may have touched yet."""

    name = "fresh"

    def __init__(self, catalog: Catalog, days: float, count: int) -> None:
        self._catalog, self._age_ms, self._count = catalog, int(days * _DAY_MS), count

    def enable(self, query: Query) -> bool:
        """Where there are such items, and a person to judge them for."""
        return query.user_vector is not None and self._catalog.size > self._catalog.base_size

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The newest first; the score is minus the age in days."""
        catalog = self._catalog
        size = catalog.size
        put_at = catalog.columns.put_at[catalog.base_size : size]
        young = np.flatnonzero(put_at >= query.now_ms - self._age_ms)
        newest = young[np.argsort(-put_at[young], kind="stable")][: self._count]
        rows = (newest + catalog.base_size).astype(np.int32)
        return rows, ((put_at[newest] - query.now_ms) / _DAY_MS).astype(np.float32)


class GivenCandidates:
    """The caller's own candidates."""

    name = "upstream"

    def enable(self, query: Query) -> bool:
        """Where the caller brought some."""
        return query.rows is not None

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The candidates in the caller's order, with the caller's scores or, where it has none, minus the place."""
        assert query.rows is not None
        if query.upstream is not None:
            return query.rows, query.upstream
        return query.rows, np.arange(0, -query.rows.size, -1, dtype=np.float32)
