"""Counts transitions, and ranks items in rings around a user's newest items in the graph of transitions.

The rings are the training-free heuristic of "An Embarrassingly Simple Graph Heuristic Reveals Shortcut-Solvable
Benchmarks for Sequential Recommendation" (arXiv:2605.07125): no model should be behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.jit import kernel
from features.transforms import item_text, remembering_token, text_tokens
from training.data.interactions import Interactions
from training.data.split import Targets
from training.models.neighbors import by_item, distinct_choices
from training.models.scoring import seen_before

BUDGETS: Sequence[Sequence[Sequence[int]]] = (((7, 2, 1),), ((5, 1), (3, 1)))
"""Places of a page by number of newest items, by item (the newest first) and by ring: those of the paper."""
TRANSITION_WEIGHT = 0.5
"""Weight of the number of transitions next to the similarity, in the first ring; that of the paper."""
CACHED_SCORES = 1 << 24
"""Scores that are kept for the next user with the same newest item; float64."""
_RINGS = 3
_STEP = 2.0  # more than the largest score inside a ring
_TIE = 1e-6  # most that popularity adds

_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_F32 = npt.NDArray[np.float32]
_F64 = npt.NDArray[np.float64]
_TEXTS = ("title", "description", "categories", "creator_id")


@dataclass(frozen=True)
class Transitions:
    """The number of times that each item followed another one directly.

    Attributes:
        starts: Item `i` was followed by `next[starts[i]:starts[i + 1]]`; int64 `[N + 1]`.
        next: Ascending for each item; int64 `[P]`.
        counts: Number of times; int64 `[P]`.
    """

    starts: _I64
    next: _I64
    counts: _I64

    @classmethod
    def count(cls, data: Interactions, ends: _I64) -> Transitions:
        """Counts them among the leading `ends[u]` events of each user; int64 `[U]`."""
        distinct, counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for block in data.blocks():
            is_later = (block.position > 0) & (block.position < ends[block.owner])
            follows = np.flatnonzero(is_later & ~data.low(block.events))
            rows = data.rows[block.events].astype(np.int64)
            # Two items as one number: counted over the pairs that occur, where a matrix of all would be mostly zeros.
            pairs, times = np.unique(rows[follows - 1] * data.items + rows[follows], return_counts=True)
            distinct, place = np.unique(np.concatenate([distinct, pairs]), return_inverse=True)
            counts = np.bincount(place, np.concatenate([counts, times])).astype(np.int64)
        starts = np.searchsorted(distinct // data.items, np.arange(data.items + 1))
        return cls(starts, distinct % data.items, counts)


@dataclass(frozen=True)
class SparseVectors:
    """Item vectors of length 1 with few entries, by item and by dimension.

    Attributes:
        starts: Item `i` has the entries `starts[i]:starts[i + 1]`; int64 `[N + 1]`.
        dimensions: int64 `[P]`.
        weights: float32 `[P]`.
        begins: Dimension `d` stands in `items[begins[d]:begins[d + 1]]`; int64 `[D + 1]`.
        items: int64 `[P]`.
        entries: Their weights; float32 `[P]`.
    """

    starts: _I64
    dimensions: _I64
    weights: _F32
    begins: _I64
    items: _I64
    entries: _F32

    @classmethod
    def build(cls, items: int, owner: _I64, dimensions: _I64, weights: _F64) -> SparseVectors:
        """Builds them from the item, dimension and weight of each entry; `owner` ascends."""
        length = np.sqrt(np.bincount(owner, weights**2, items))
        scaled = (weights / np.where(length > 0, length, 1)[owner]).astype(np.float32)
        starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=items))])
        order = np.argsort(dimensions, kind="stable")
        begins = np.concatenate([[0], np.cumsum(np.bincount(dimensions, minlength=1))])
        return cls(starts, dimensions, scaled, begins, owner[order], scaled[order])

    def cosines(self, item: int) -> _F32:
        """Returns the cosine of an item with all items; float32 `[N]`."""
        out = np.zeros(self.starts.size - 1, np.float32)
        part = slice(self.starts[item], self.starts[item + 1])
        _add_cosines(self.dimensions[part], self.weights[part], self.begins, self.items, self.entries, out)
        return out


def choice_vectors(data: Interactions, ends: _I64, seed: int = 0) -> SparseVectors:
    """Returns the items as the users who chose them, of the same events as `neighbors_of` learns from by default."""
    rows, user_starts = distinct_choices(data, ends, seed)
    users, item_starts = by_item(rows, user_starts, data.items)
    owner = np.repeat(np.arange(data.items), np.diff(item_starts))
    return SparseVectors.build(data.items, owner, users.astype(np.int64), np.ones(users.size))


def text_vectors(items: pa.Table) -> SparseVectors | None:
    """Returns the items as their words and creators, weighed by tf-idf; None if the table has none.

    A word counts `(1 + ln n) * ln(N / m)`: `n` times in a text, in `m` of `N` items.
    """
    if all(items[name].null_count == len(items) for name in _TEXTS):
        return None
    token_of = remembering_token()
    parts: list[npt.NDArray[Any]] = [np.empty(0, np.uint64)]
    sizes = np.zeros(len(items), np.int64)
    creators: dict[str, int] = {}
    at = 0
    for batch in items.select(list(_TEXTS)).to_batches(max_chunksize=1 << 14):
        for item in batch.to_pylist():
            tokens = text_tokens(item_text(item), token_of).astype(np.uint64)
            if creator := item["creator_id"]:
                # Above all keys of words, which are 32 bits long.
                number = (1 << 32) + creators.setdefault(creator, len(creators))
                tokens = np.append(tokens, np.uint64(number))
            parts.append(tokens)
            sizes[at] = tokens.size
            at += 1
    _, words = np.unique(np.concatenate(parts), return_inverse=True)
    owner = np.repeat(np.arange(len(items)), sizes)
    width = int(words.max(initial=0)) + 1
    entries, times = np.unique(owner * width + words, return_counts=True)
    owner, words = entries // width, entries % width
    weights = (1 + np.log(times)) * np.log(len(items) / np.bincount(words, minlength=width)[words])
    return SparseVectors.build(len(items), owner, words, weights)


class TransitionRingsBaseline:
    """Items in rings around a user's newest one or two, the most similar to it first; then items of no ring.

    Ring `h` is the items that are `h` transitions away and no fewer. `BUDGETS` says how many places of a page each ring
    has; a ring's surplus takes the places that later rings cannot fill. Inside the first ring the logarithm of the
    number of transitions counts too, relative to the largest of the item; popularity decides between equal items.
    """

    name = "transition_rings"

    def __init__(
        self,
        data: Interactions,
        transitions: Transitions,
        similarity: SparseVectors,
        popularity: _F64,
        *,
        newest: int,
        repeats: bool,
    ) -> None:
        """Takes the graph and what orders a ring.

        Args:
            data: All events.
            transitions: Those of the training events.
            similarity: By `text_vectors` or `choice_vectors`.
            popularity: Training events of each item; float64 `[N]`.
            newest: Newest items of a user that have rings, 1 or 2.
            repeats: Items that a user had take places too.
        """
        self.data, self.transitions, self.similarity = data, transitions, similarity
        self.popularity = popularity * (_TIE / (popularity.max() + 1))
        self.budgets, self.repeats = BUDGETS[newest - 1], repeats
        self._rows: dict[int, _F64] = {}

    def scores(self, targets: Targets) -> _F64:
        """Returns scores by which the first page keeps the budgets of the rings, once seen items are masked."""
        out = np.empty((len(targets), self.data.items))
        none: list[_I32] = [np.empty(0, np.int32)] * len(targets)
        masked = none if self.repeats else seen_before(self.data, targets)
        for line, (user, position) in enumerate(zip(targets.users.tolist(), targets.positions.tolist(), strict=True)):
            start = int(self.data.offsets[user])
            newest = self.data.rows[max(start, start + position - len(self.budgets)) : start + position][::-1].tolist()
            out[line] = self._around(newest[0])
            page: list[int] = []
            for row, budget in zip(newest, self.budgets, strict=False):
                free = self._around(row).copy()
                free[masked[line]] = -np.inf
                free[page] = -np.inf
                page += fill(free, budget)
            # Above all rings, the first place highest.
            out[line, page] = (_RINGS + 1) * _STEP + np.arange(len(page), 0, -1)
        return out

    def _around(self, row: int) -> _F64:
        """Returns each item's score around one: by its ring a multiple of `_STEP`, plus that inside; float64 `[N]`."""
        # Many users share their newest item, so that a row is computed once as long as the rows fit.
        if row in self._rows:
            return self._rows[row]
        if (len(self._rows) + 1) * self.data.items > CACHED_SCORES:
            self._rows.clear()
        rings = np.zeros(self.data.items, np.uint8)
        _find_rings(self.transitions.starts, self.transitions.next, row, _RINGS, rings)
        scores: _F64 = self.similarity.cosines(row) + self.popularity
        part = slice(self.transitions.starts[row], self.transitions.starts[row + 1])
        counts = np.log1p(self.transitions.counts[part])
        scores[self.transitions.next[part]] += TRANSITION_WEIGHT * counts / counts.max(initial=_TIE)
        # The nearest ring counts most, an item of no ring least.
        scores += np.where(rings > 0, _STEP * (1 + _RINGS - rings.astype(np.float64)), 0.0)
        self._rows[row] = scores
        return scores


def fill(free: _F64, budget: Sequence[int]) -> list[int]:
    """Returns the items of one user's page around one item, best first.

    Args:
        free: As `TransitionRingsBaseline._around`, minus infinity for what may not be shown; `[N]`.
        budget: Places of each ring, the nearest first.
    """
    page: list[int] = []
    surplus: list[int] = []
    for ring, places in enumerate(budget, 1):
        low = (1 + _RINGS - ring) * _STEP
        inside = np.flatnonzero((free >= low) & (free < low + _STEP))
        best = inside[np.argsort(-free[inside], kind="stable")[: sum(budget)]].tolist()
        # A ring with too few items leaves its places to the surplus of nearer rings, before farther ones.
        moved = max(0, min(len(surplus), places - len(best)))
        page += surplus[:moved] + best[: places - moved]
        surplus = surplus[moved:] + best[places - moved :]
    return (page + surplus)[: sum(budget)]


@kernel(nogil=True)
def _find_rings(starts: Any, following: Any, source: int, depth: int, rings: Any) -> None:
    """Writes the distance of each item from `source`, 0 for those further than `depth` and for itself."""
    # Breadth first, in one list: each item enters it once, by the shortest way.
    frontier = np.empty(rings.size, np.int64)
    frontier[0] = source
    begin, end = 0, 1
    for ring in range(1, depth + 1):
        last = end
        for at in range(begin, last):
            for edge in range(starts[frontier[at]], starts[frontier[at] + 1]):
                item = following[edge]
                if rings[item] == 0 and item != source:
                    rings[item] = ring
                    frontier[end] = item
                    end += 1
        begin = last


def _find_rings_plain(starts: _I64, following: _I64, source: int, depth: int, rings: npt.NDArray[np.uint8]) -> None:
    """Plain twin of `_find_rings`."""
    visited, frontier = {source}, {source}
    for ring in range(1, depth + 1):
        reached = {int(item) for at in frontier for item in following[starts[at] : starts[at + 1]]}
        frontier = reached - visited
        visited |= frontier
        rings[sorted(frontier)] = ring


@kernel(nogil=True)
def _add_cosines(dimensions: Any, weights: Any, begins: Any, items: Any, entries: Any, out: Any) -> None:
    for at in range(dimensions.size):
        for place in range(begins[dimensions[at]], begins[dimensions[at] + 1]):
            out[items[place]] += weights[at] * entries[place]


def _add_cosines_plain(dimensions: _I64, weights: _F32, begins: _I64, items: _I64, entries: _F32, out: _F32) -> None:
    """Plain twin of `_add_cosines`."""
    for dimension, weight in zip(dimensions, weights, strict=True):
        part = slice(begins[dimension], begins[dimension + 1])
        out[items[part]] += weight * entries[part]
