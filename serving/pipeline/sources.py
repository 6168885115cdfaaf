"""Where candidates come from: each source names rows of the catalogue and scores them its own way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from features.assemble import chosen_rows
from features.catalog import Catalog
from features.controls import Dial
from serving.bundle.bitmap import Bitmap, allowed_rows, clear_keys, first_allowed
from serving.bundle.text_index import LexicalIndex
from serving.bundle.vector_index import Index
from serving.pipeline.query import FRESH, NEAREST, NEIGHBORS, POPULAR, SEGMENT, UPSTREAM, WANTED, Query, Rows, Scores

_DAY_MS = 86_400_000
_RECENT = 20
_WANTED = 100
_WEIGHTS = {Dial.CATEGORY_WEIGHT: "category", Dial.CREATOR_WEIGHT: "creator"}


def allowed(query: Query) -> Bitmap:
    """The rows that a source may name, as the runner made them of its filters."""
    if query.allowed is None:
        raise ValueError("query.allowed is not made: sources run after the filters have held back their rows")
    return query.allowed


class NearestToUser:
    """Items whose vectors lie nearest to the person's."""

    name = NEAREST

    def __init__(self, index: Index, count: int) -> None:
        self._index, self._count = index, count

    def enable(self, query: Query) -> bool:
        """Where the person has a vector."""
        return query.user_vector is not None

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The nearest allowed items and their relevance, a page at least."""
        assert query.user_vector is not None
        return nearest(self._index, query.user_vector, self._count, query)


def nearest(index: Index, vector: Scores, count: int, query: Query) -> tuple[Rows, Scores]:
    """The `count` allowed rows nearest to a vector float32 [D], a page at least, and their inner products."""
    rows, scores = index.search(vector[None], max(count, query.page_size), allowed(query))
    return rows[0], scores[0]


class Neighbors:
    """The table of item neighbours that export made: row -> nearest rows and their cosine."""

    def __init__(self, rows: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]) -> None:
        self._rows, self._scores = rows, scores

    def of(self, rows: Rows, weights: npt.NDArray[np.float32], count: int, bitmap: Bitmap) -> tuple[Rows, Scores]:
        """The allowed items most often and most nearly next to `rows`, the sum of weighted cosines, best first."""
        known = rows < len(self._rows)
        beside = self._rows[rows[known]]
        scores = (self._scores[rows[known]] * weights[known, None])[beside >= 0]
        near, place = np.unique(beside[beside >= 0], return_inverse=True)
        total = np.bincount(place, scores, near.size).astype(np.float32)
        order = np.argsort(-total, kind="stable")
        ranked = near[order].astype(np.int32)
        best = first_allowed(ranked, bitmap, count)
        return ranked[best], total[order[best]]


class ItemNeighbors:
    """Neighbours of the items that the user chose last: what serves when the encoder cannot."""

    name = NEIGHBORS

    def __init__(self, neighbors: Neighbors, count: int) -> None:
        self._neighbors, self._count = neighbors, count

    def enable(self, query: Query) -> bool:
        """Where the user chose an item of this catalogue."""
        return query.history is not None and bool(chosen_rows(query.history).size)

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """Neighbours of the newest items, newer ones weighing more."""
        assert query.history is not None
        rows = chosen_rows(query.history)[-_RECENT:]
        weights = (0.9 ** np.arange(rows.size)[::-1]).astype(np.float32)
        return self._neighbors.of(rows, weights, self._count, allowed(query))


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
        weights = np.ones(query.seeds.size, np.float32)
        return self._neighbors.of(query.seeds, weights, self._count, allowed(query))


class SimilarToSeeds:
    """Items whose vectors point where the seeds' do."""

    name = "similar"

    def __init__(self, index: Index, catalog: Catalog, count: int) -> None:
        self._index, self._catalog, self._count = index, catalog, count

    def enable(self, query: Query) -> bool:
        """Where there are seeds."""
        return bool(query.seeds.size)

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The items nearest to the mean direction of the seeds, a page at least."""
        vectors = self._catalog.columns.vectors[query.seeds]
        lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        direction = (vectors / lengths).mean(axis=0, dtype=np.float32)
        return nearest(self._index, direction, self._count, query)


class LexicalSource:
    """Items that share words with the query, by BM25."""

    name = "words"

    def __init__(self, lexical: LexicalIndex, count: int) -> None:
        self._lexical, self._count = lexical, count

    def enable(self, query: Query) -> bool:
        """Where there are words."""
        return query.tokens is not None and bool(query.tokens.size)

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The best matches, as a share of the best match there could be."""
        assert query.tokens is not None
        return self._lexical.search(query.tokens, max(self._count, query.page_size), allowed(query))


class SemanticSource:
    """Items whose vectors lie nearest to the query's."""

    name = "meaning"

    def __init__(self, index: Index, count: int) -> None:
        self._index, self._count = index, count

    def enable(self, query: Query) -> bool:
        """Where the query has a vector."""
        return query.query_vector is not None

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The nearest items and their inner product with the query, a page at least: every item is at some distance."""
        assert query.query_vector is not None
        return nearest(self._index, query.query_vector, self._count, query)


class LiveItems:
    """Items put while the service runs, the newest first."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._newest: tuple[int, Rows] | None = None

    def newest(self) -> Rows:
        """Their rows, the newest first; int32 [n]. Sorted once after each change of the catalogue."""
        change, known = self._catalog.change, self._newest
        if known is None or known[0] != change:
            base, size = self._catalog.base_size, self._catalog.size
            order = np.argsort(-self._catalog.columns.put_at[base:size], kind="stable")
            self._newest = known = (change, (order + base).astype(np.int32))
        return known[1]

    def age(self, rows: Rows, now_ms: int) -> Scores:
        """Days since each of the rows was put; float32 [n]."""
        return ((now_ms - self._catalog.columns.put_at[rows]) / _DAY_MS).astype(np.float32)


class Popular:
    """What most people like, safe for anybody; in the end every item that may be shown.

    First the table that export made, then live items, of which no one has counted yet how many like them, the newest
    first, then all others by their popularity in training. The scores fall in this order: those of the table, which are
    not below 0, -1 to 0 for live items, -2 to -1 for the others.
    """

    name = POPULAR

    def __init__(self, rows: Rows, scores: Scores, catalog: Catalog, live: LiveItems) -> None:
        """Takes the popular items, best first, and their scores."""
        self._rows, self._scores, self._live = rows, scores, live
        self._popularity = popularity_of(catalog)
        order = np.argsort(-self._popularity, kind="stable").astype(np.int32)
        self._others = order[~np.isin(order, rows)]

    def enable(self, query: Query) -> bool:
        """Always."""
        return True

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """Two pages of allowed items, so that dials can choose; of the table alone where blocks could not be read."""
        count, bitmap = 2 * query.page_size, allowed(query)
        places = first_allowed(self._rows, bitmap, count)
        rows, scores = self._rows[places], self._scores[places]
        if rows.size >= count or query.blocks_unread:
            return rows, scores
        newest = self._live.newest()
        live = newest[first_allowed(newest, bitmap, count - rows.size)]
        others = self._others[first_allowed(self._others, bitmap, count - rows.size - live.size)]
        age = np.maximum(self._live.age(live, query.now_ms), 0)
        rest = -1 - 1 / (1 + self._popularity[others])
        every: Scores = np.concatenate([scores, -age / (1 + age), rest]).astype(np.float32, copy=False)
        return np.concatenate([rows, live, others]), every


class PopularBeside:
    """The popular items beside those of another tier, for the dials of a user without a vector to choose from."""

    name = POPULAR

    def __init__(self, popular: Popular) -> None:
        self._popular = popular

    def enable(self, query: Query) -> bool:
        """Where a dial is turned and no item is near to the user."""
        return query.user_vector is None and any(query.dials.values())

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """Two pages of allowed items."""
        return self._popular.retrieve(query)


class PopularInSegment:
    """What people like who choose the same category most."""

    name = SEGMENT

    def __init__(self, tables: Mapping[str, tuple[Rows, Scores]]) -> None:
        """Takes, by the name of the category, the items that such people like, best first, and their scores."""
        self._tables = tables

    def enable(self, query: Query) -> bool:
        """Where the person is of a segment."""
        return bool(query.segment)

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """Two pages of allowed ones."""
        rows, scores = self._tables[query.segment]
        places = first_allowed(rows, allowed(query), 2 * query.page_size)
        return rows[places], scores[places]


class BoostedSource:
    """What the person's dials ask more of: the most popular items of those creators and categories."""

    name = WANTED

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, query: Query) -> bool:
        """Where a creator or a category is turned up, and the person's blocks are known."""
        turned_up = any(dial in _WEIGHTS and value > 0 for (dial, _), value in query.dials.items())
        return turned_up and not query.blocks_unread

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The most popular allowed ones, live items last."""
        columns, bitmap = self._catalog.columns, allowed(query)
        others = bitmap.copy()
        for wanted, name in _WEIGHTS.items():
            keys = [key for (dial, key), value in query.dials.items() if dial is wanted and value > 0]
            clear_keys(others, getattr(columns, name), np.array(keys, np.uint64))
        rows = allowed_rows(bitmap ^ others, 0, columns.capacity)
        popularity = popularity_of(self._catalog, rows)
        best = np.argsort(-popularity, kind="stable")[:_WANTED]
        return rows[best], popularity[best]


def popularity_of(catalog: Catalog, rows: Rows | slice | None = None) -> Scores:
    """How popular items are in training, now and among equals ever, of the bundle's rows unless said; float32 [n]."""
    columns, at = catalog.columns, slice(catalog.base_size) if rows is None else rows
    return (columns.recent_popularity[at] + 1e-3 * columns.popularity[at]).astype(np.float32)


class Fresh:
    """Items put while the service runs, which nobody may have touched yet."""

    name = FRESH

    def __init__(self, live: LiveItems, days: float, count: int) -> None:
        self._live, self._days, self._count = live, days, count

    def enable(self, query: Query) -> bool:
        """Where there are such items, and nothing is blocked that could not be read."""
        return bool(self._live.newest().size) and not query.blocks_unread

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The newest first; the score is minus the age in days."""
        newest = self._live.newest()
        rows = newest[first_allowed(newest, allowed(query), self._count)]
        age = self._live.age(rows, query.now_ms)
        young = age <= self._days
        return rows[young], -age[young]


class GivenCandidates:
    """The caller's own candidates."""

    name = UPSTREAM

    def enable(self, query: Query) -> bool:
        """Where the caller brought some."""
        return query.rows is not None

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """The candidates in the caller's order, with the caller's scores or, where it has none, minus the place."""
        assert query.rows is not None
        if query.upstream is not None:
            return query.rows, query.upstream
        return query.rows, np.arange(0, -query.rows.size, -1, dtype=np.float32)
