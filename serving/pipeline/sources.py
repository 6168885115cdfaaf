"""The sources of candidates: each names rows of the catalogue and scores them its own way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from features.assemble import chosen_rows
from features.catalog import Catalog
from features.catalog_columns import popularity_score
from features.controls import Dial
from features.kernels import best_first, dot_rows
from features.linear import NO_SCORES
from serving.bundle.bitmap import Bitmap, allowed_rows, clear_keys, clear_rows, first_allowed
from serving.bundle.tables import NeighborTable
from serving.bundle.text_index import LexicalIndex
from serving.bundle.vector_index import Index
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

_DAY_MS = 86_400_000
_RECENT = 20
_WANTED = 100
_LINEAR = 200
_WEIGHTS = {Dial.CATEGORY_WEIGHT: "category", Dial.CREATOR_WEIGHT: "creator"}


class UserVectorSource:
    """The most relevant items: those whose vectors lie nearest to the user's, and those that the linear part names."""

    name = NEAREST

    def __init__(self, index: Index, catalog: Catalog, count: int) -> None:
        self._index, self._catalog, self._count = index, catalog, count

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if the user has a vector."""
        return user.vector is not None

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns the most relevant allowed items and their relevance, a page at least."""
        assert user.vector is not None
        count = max(self._count, request.page_size)
        rows, relevance = nearest(self._index, user.vector, count, allowed)
        if user.linear is NO_SCORES:
            return rows, relevance
        more = user.linear.best(max(_LINEAR, request.page_size), allowed, rows)
        products = np.concatenate([relevance, dot_rows(self._catalog.columns.vectors, more, user.vector)])
        rows = np.concatenate([rows, more])
        relevance = products + user.linear.of(rows)
        best = np.argsort(best_first(relevance, rows))[:count]
        return rows[best], relevance[best]


def nearest(index: Index, vector: Scores, count: int, allowed: Bitmap) -> tuple[Rows, Scores]:
    """Returns the `count` allowed rows nearest to a vector float32 [D], and their inner products."""
    rows, scores = index.search(vector[None], count, allowed)
    return rows[0], scores[0]


class ItemToItemSource:
    """Neighbours of the items that the user chose last; they serve when the encoder cannot."""

    name = NEIGHBORS

    def __init__(self, neighbors: NeighborTable, count: int) -> None:
        self._neighbors, self._count = neighbors, count

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if the user chose an item of this catalogue."""
        return user.history is not None and bool(chosen_rows(user.history).size)

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns neighbours of the newest items, newer ones weighing more."""
        assert user.history is not None
        rows = chosen_rows(user.history)[-_RECENT:]
        # The last choice tells most of what the user is looking for now.
        weights = (0.9 ** np.arange(rows.size)[::-1]).astype(np.float32)
        return self._neighbors.of(rows, weights, self._count, allowed)


class SeedNeighborsSource:
    """Neighbours of the seeds by the exported table."""

    name = NEIGHBORS

    def __init__(self, neighbors: NeighborTable, count: int) -> None:
        self._neighbors, self._count = neighbors, count

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if there are seeds."""
        return bool(request.seeds.size)

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns the neighbours of all seeds."""
        weights = np.ones(request.seeds.size, np.float32)
        return self._neighbors.of(request.seeds, weights, self._count, allowed)


class SeedVectorSource:
    """Items whose vectors point where the seeds' do."""

    name = "similar"

    def __init__(self, index: Index, catalog: Catalog, count: int) -> None:
        self._index, self._catalog, self._count = index, catalog, count

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if there are seeds."""
        return bool(request.seeds.size)

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns the items nearest to the mean direction of the seeds, a page at least."""
        vectors = self._catalog.columns.vectors[request.seeds]
        # Directions, so that a popular seed, whose vector is long, does not outweigh the others.
        lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        direction = (vectors / lengths).mean(axis=0, dtype=np.float32)
        return nearest(self._index, direction, max(self._count, request.page_size), allowed)


class LexicalSource:
    """Items that share words with the query, by BM25."""

    name = "words"

    def __init__(self, lexical: LexicalIndex, count: int) -> None:
        self._lexical, self._count = lexical, count

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if there are words."""
        return request.tokens is not None and bool(request.tokens.size)

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns the best matches, as a share of the best match there could be."""
        assert request.tokens is not None
        return self._lexical.search(request.tokens, max(self._count, request.page_size), allowed)


class SemanticSource:
    """Items whose vectors lie nearest to the query's."""

    name = "meaning"

    def __init__(self, index: Index, count: int) -> None:
        self._index, self._count = index, count

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if the query has a vector."""
        return user.query_vector is not None

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns the nearest items and their inner product with the query, a page at least."""
        assert user.query_vector is not None
        return nearest(self._index, user.query_vector, max(self._count, request.page_size), allowed)


class LiveItems:
    """Items put while the service runs, the newest first."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._newest: tuple[int, Rows] | None = None

    def newest(self) -> Rows:
        """Returns their rows, the newest first; int32 [n]. Sorted once after each put."""
        puts, newest = self._catalog.puts, self._newest
        if newest is None or newest[0] != puts:
            base, size = self._catalog.base_size, self._catalog.size
            order = np.argsort(-self._catalog.columns.put_at[base:size], kind="stable")
            # One tuple, replaced whole: other requests read it without a lock.
            self._newest = newest = (puts, (order + base).astype(np.int32))
        return newest[1]

    def age(self, rows: Rows, now_ms: int) -> Scores:
        """Returns the days since each of the rows was put; float32 [n]."""
        return ((now_ms - self._catalog.columns.put_at[rows]) / _DAY_MS).astype(np.float32)


class PopularSource:
    """Popular items, which are safe for any user; in the end every item that may be shown.

    First the table that export made, then live items, whose popularity is not counted yet, the newest first, then all
    others by their popularity in training. The scores fall in this order: those of the table, which are not below 0,
    -1 to 0 for live items, -2 to -1 for the others.
    """

    name = POPULAR

    def __init__(self, rows: Rows, scores: Scores, catalog: Catalog, live: LiveItems) -> None:
        """Takes the popular items, best first, and their scores."""
        self._rows, self._scores, self._live = rows, scores, live
        self._catalog = catalog

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True: every request needs it."""
        return True

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns two pages of allowed items, so that dials can choose; of the table alone if blocks are unread."""
        count = 2 * request.page_size
        places = first_allowed(self._rows, allowed, count)
        # If blocks are unread, the answer ends here: the table alone counts as safe for any user.
        rows, scores = self._rows[places], self._scores[places]
        if rows.size >= count or user.blocks_unread:
            return rows, scores
        newest = self._live.newest()
        live = newest[first_allowed(newest, allowed, count - rows.size)]
        untabled = allowed.copy()
        clear_rows(untabled, self._rows)
        popular = self._catalog.popular
        tail = popular[first_allowed(popular, untabled, count - rows.size - live.size)]
        # Clocks of hosts differ: an item may seem to be put in the future.
        age = np.maximum(self._live.age(live, request.now_ms), 0)
        tail_scores = -1 - 1 / (1 + popularity_of(self._catalog, tail))
        all_scores: Scores = np.concatenate([scores, -age / (1 + age), tail_scores]).astype(np.float32, copy=False)
        return np.concatenate([rows, live, tail]), all_scores


class PopularExtraSource:
    """Popular items as an extra of another tier, for the dials of a user without a vector to choose from."""

    name = POPULAR

    def __init__(self, popular: PopularSource) -> None:
        self._popular = popular

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if a dial is turned and no item is near to the user."""
        return user.vector is None and any(user.dials.values())

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns two pages of allowed items."""
        return self._popular.retrieve(request, user, allowed)


class SegmentSource:
    """Items popular with the users who choose the same category most."""

    name = SEGMENT

    def __init__(self, tables: Mapping[str, tuple[Rows, Scores]]) -> None:
        """Takes, by the name of the category, the items that such users like, best first, and their scores."""
        self._tables = tables

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if the user is of a segment."""
        return bool(user.segment)

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns two pages of allowed items."""
        rows, scores = self._tables[user.segment]
        places = first_allowed(rows, allowed, 2 * request.page_size)
        return rows[places], scores[places]


class BoostedSource:
    """The most popular items of the creators and categories that the user's dials ask more of."""

    name = WANTED

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if a creator or a category is turned up, and the user's blocks are known."""
        turned_up = any(dial in _WEIGHTS and value > 0 for (dial, _), value in user.dials.items())
        return turned_up and not user.blocks_unread

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns the most popular allowed items, live items last."""
        columns, unwanted = self._catalog.columns, allowed.copy()
        # What `clear_keys` takes out of the copy are the wanted rows; one pass over a column finds all keys.
        for weight, name in _WEIGHTS.items():
            keys = [key for (dial, key), value in user.dials.items() if dial is weight and value > 0]
            clear_keys(unwanted, getattr(columns, name), np.array(keys, np.uint64))
        rows = allowed_rows(allowed ^ unwanted, 0, columns.capacity)
        popularity = popularity_of(self._catalog, rows)
        best = np.argsort(-popularity, kind="stable")[:_WANTED]
        return rows[best], popularity[best]


def popularity_of(catalog: Catalog, rows: Rows) -> Scores:
    """Returns the popularity of `rows` in training: recent then overall; float32 [n]."""
    return popularity_score(catalog.columns, rows)


class FreshSource:
    """Items put while the service runs, which may have no events yet."""

    name = FRESH

    def __init__(self, live: LiveItems, days: float, count: int) -> None:
        self._live, self._days, self._count = live, days, count

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if there are such items, and the user's blocks are known."""
        return bool(self._live.newest().size) and not user.blocks_unread

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns the newest first; the score is minus the age in days."""
        newest = self._live.newest()
        rows = newest[first_allowed(newest, allowed, self._count)]
        age = self._live.age(rows, request.now_ms)
        young = age <= self._days
        return rows[young], -age[young]


class UpstreamSource:
    """The caller's own candidates."""

    name = UPSTREAM

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if the caller brings some."""
        return request.rows is not None

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns the candidates in the caller's order, with the caller's scores or, without any, minus the place."""
        assert request.rows is not None
        if request.upstream is not None:
            return request.rows, request.upstream
        return request.rows, np.arange(0, -request.rows.size, -1, dtype=np.float32)
