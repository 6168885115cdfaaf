"""EASE for large catalogues: a regression of each item on the items most like it, in place of one on all others.

EASE (arXiv:1905.03375) inverts a matrix of items by items. Its column for an item is the ridge regression of that item
on all others, so a regression on the others that share the most users with it takes their number cubed, and the whole
catalogue a time that grows with its items and no matrix of all pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from features.jit import kernel
from features.linear import ItemWeights, LinearSpec, LinearTerm
from training.models.item_sets import ItemSets, in_parts
from training.models.neighbors import cosines_of

LOCAL_ITEMS = 50
"""Items that one is regressed on: those with the largest cosines."""
FEWEST_LOCAL_ITEMS = 16
"""With fewer, a regression says little more than the cosines."""
LOCAL_ENTRIES = 1 << 27
"""Most items to regress on, of all items together: 512 MiB."""
SCORED_WEIGHTS = 4
"""Weights of an item, in multiples of `LOCAL_ITEMS`, that the scores of all items are summed from."""

_BLOCK_ITEMS = 8192
"""Items whose weights stand in memory at once before the largest of them go into the table: 2 MiB."""
_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_F32 = npt.NDArray[np.float32]
_F64 = npt.NDArray[np.float64]


def local_items(items: int) -> int:
    """Returns how many items each is regressed on in a catalogue of some size."""
    return min(LOCAL_ITEMS, LOCAL_ENTRIES // max(1, items), max(1, items - 1))


class LocalEase:
    """Ridge regressions of each item on its nearest ones."""

    def __init__(self, sets: ItemSets, near: _I32, ridge: float) -> None:
        """Keeps what the regressions need; `near` is what `nearest_items` returned."""
        self._sets, self._near, self._ridge = sets, near, ridge

    def table(self, keep: int) -> tuple[_I32, _F32]:
        """Returns the largest weights of each item of a history, see `ease.EaseSolution`.

        Beyond its result this takes 4 bytes for each entry of `near`, 12 bytes a user for each of torch's threads, and
        the weights of 8,192 items.
        """
        near, items = self._near, self._near.shape[0]
        keep = min(keep, max(1, items - 1))
        rows, scores = np.full((items, keep), -1, np.int32), np.zeros((items, keep), np.float32)
        filled, least = np.zeros(items, np.int32), np.zeros(items, np.int32)
        for start in range(0, items, _BLOCK_ITEMS):
            block = near[start : start + _BLOCK_ITEMS]
            weights = self._weights(start, block.shape)
            # By one thread and in the order of items, so that of equal weights the same ones stay.
            keep_largest(block, weights, start, rows, scores, filled, least)
        for start in range(0, items, _BLOCK_ITEMS):
            part = slice(start, start + _BLOCK_ITEMS)
            order = np.lexsort((rows[part], -np.abs(scores[part])), axis=1)
            rows[part] = np.take_along_axis(rows[part], order, 1)
            scores[part] = np.take_along_axis(scores[part], order, 1)
        return rows, scores

    def _weights(self, first: int, shape: tuple[int, ...]) -> _F32:
        """Returns the regressions of the items from `first` on; float32 of `shape` `[n, M]`."""
        weights = np.zeros(shape, np.float32)
        in_parts(shape[0], lambda part: regress(self._sets, self._near, self._ridge, first, part, weights))
        return weights

    def scores(self, histories: Sequence[_I32]) -> _F32:
        """Returns the sums of each history over the table of all items, see `ease.EaseSolution`."""
        if self._term is None:
            rows, weights = self.table(SCORED_WEIGHTS * LOCAL_ITEMS)
            self._term = LinearTerm(LinearSpec(weight=1.0), ItemWeights.of(rows, weights))
        out = np.zeros((len(histories), self._near.shape[0]), np.float32)
        for line, history in enumerate(histories):
            sums = self._term.scores(history)
            out[line, sums.rows] = sums.sums
        return out

    _term: LinearTerm | None = None


def nearest_items(sets: ItemSets) -> _I32:
    """Returns the items that each is regressed on, by cosine, -1 padded; int32 `[N, local_items(N)]`."""
    near, _ = cosines_of(sets.rows, sets.user_starts, sets.item_count, local_items(sets.item_count))
    return near


@kernel(nogil=True)
def regress(sets: ItemSets, near: Any, ridge: float, first: int, part: tuple[int, int], out: Any) -> None:
    """Writes the regressions of the items `first + part[0]` to `first + part[1]` on their nearest ones.

    Args:
        sets: The choices.
        near: The items that each is regressed on, -1 padded; int32 `[N, M]`.
        ridge: The regularisation, lambda.
        first: Item of the first line of `out`.
        part: Lines of `out` to write.
        out: The weight of each of `near` for the item; float32 `[n, M]`.
    """
    shares, at_user = np.zeros(sets.user_starts.size, np.int32), np.zeros(sets.user_starts.size, np.int64)
    for line in range(part[0], part[1]):
        item = first + line
        count, size = 0, 0
        while count < near.shape[1] and near[item, count] >= 0:
            size += sets.item_starts[near[item, count] + 1] - sets.item_starts[near[item, count]]
            count += 1
        if count == 0:
            continue
        # The users of these items, and which of them each has chosen: pairs that share no user then cost nothing.
        touched, users = np.empty(min(size, shares.size), np.int32), 0
        for place in range(count):
            for at in range(sets.item_starts[near[item, place]], sets.item_starts[near[item, place] + 1]):
                user = sets.users[at]
                if shares[user] == 0:
                    touched[users] = user
                    users += 1
                shares[user] += 1
        total = 0
        for number in range(users):
            at_user[touched[number]] = total
            total += shares[touched[number]]
        places = np.empty(size, np.int32)
        for place in range(count):
            for at in range(sets.item_starts[near[item, place]], sets.item_starts[near[item, place] + 1]):
                places[at_user[sets.users[at]]] = place
                at_user[sets.users[at]] += 1
        gram, shared = _count_shared(sets, item, count, shares, at_user, places, touched[:users])
        for place in range(count):
            gram[place, place] += ridge
        solve_spd(gram, shared)
        for place in range(count):
            out[line, place] = shared[place]
        shares[touched[:users]] = 0


@kernel(nogil=True)
def _count_shared(
    sets: ItemSets, item: int, count: int, shares: Any, ends: Any, places: Any, touched: Any
) -> tuple[_F64, _F64]:
    """Counts the users that two of `count` items share, upper half `[M, M]`, and those shared with `item` `[M]`."""
    gram, shared = np.zeros((count, count)), np.zeros(count)
    for user in touched:
        for left in range(ends[user] - shares[user], ends[user]):
            for right in range(left, ends[user]):
                gram[places[left], places[right]] += 1.0
    for at in range(sets.item_starts[item], sets.item_starts[item + 1]):
        user = sets.users[at]
        for place in range(ends[user] - shares[user], ends[user] if shares[user] else 0):
            shared[places[place]] += 1.0
    return gram, shared


@kernel(nogil=True)
def solve_spd(matrix: Any, right: Any) -> None:
    """Solves a symmetric positive definite system by Cholesky, in place: `right` becomes the solution.

    Args:
        matrix: Its upper half is read, and overwritten; float64 `[M, M]`.
        right: float64 `[M]`.
    """
    size = right.size
    for row in range(size):
        matrix[row, row:] /= np.sqrt(matrix[row, row])
        for below in range(row + 1, size):
            factor = matrix[row, below]
            if factor != 0.0:  # most items share no user
                for at in range(below, size):
                    matrix[below, at] -= factor * matrix[row, at]
    for row in range(size):
        right[row] /= matrix[row, row]
        for at in range(row + 1, size):
            right[at] -= matrix[row, at] * right[row]
    for row in range(size - 1, -1, -1):
        total = right[row]
        for at in range(row + 1, size):
            total -= matrix[row, at] * right[at]
        right[row] = total / matrix[row, row]


def regress_plain(sets: ItemSets, near: _I32, ridge: float, first: int, part: tuple[int, int], out: _F32) -> None:
    """Plain twin of `regress`, which takes the matrix of all users and items."""
    chosen = sets.dense().astype(np.float64)
    for line in range(*part):
        inputs = near[first + line][near[first + line] >= 0]
        of_inputs = chosen[:, inputs]
        gram = of_inputs.T @ of_inputs + ridge * np.eye(inputs.size)
        out[line, : inputs.size] = np.linalg.solve(gram, of_inputs.T @ chosen[:, first + line])


@kernel(nogil=True)
def keep_largest(near: Any, weights: Any, first: int, rows: Any, scores: Any, filled: Any, least: Any) -> None:
    """Puts the regressions of some items into the table by the item of the history, which keeps its largest weights.

    Args:
        near: The items that these are regressed on, -1 padded; int32 `[n, M]`.
        weights: Their weights; float32 `[n, M]`.
        first: Item of the first line.
        rows: The items that each item's weights are for, in no order; int32 `[N, K]`.
        scores: The weights; float32 `[N, K]`.
        filled: Number of weights of each item; int32 `[N]`.
        least: Place of the smallest of them in a full line; int32 `[N]`.
    """
    keep = rows.shape[1]
    for line in range(near.shape[0]):
        for place in range(near.shape[1]):
            source, weight = near[line, place], weights[line, place]
            if source < 0 or weight == 0.0:
                continue
            at = filled[source]
            if at < keep:
                filled[source] += 1
            elif abs(weight) > abs(scores[source, least[source]]):
                at = least[source]
            else:
                continue
            rows[source, at], scores[source, at] = first + line, weight
            if filled[source] == keep:
                least[source] = np.argmin(np.abs(scores[source]))


def keep_largest_plain(near: _I32, weights: _F32, keep: int) -> list[dict[int, float]]:
    """Plain twin of `keep_largest` for all items at once; returns the weights of each item of a history."""
    by_source: list[dict[int, float]] = [{} for _ in range(near.shape[0])]
    for item, place in itertools.product(range(near.shape[0]), range(near.shape[1])):
        if near[item, place] >= 0 and weights[item, place] != 0:
            by_source[near[item, place]][item] = float(weights[item, place])
    return [dict(sorted(line.items(), key=lambda pair: -abs(pair[1]))[:keep]) for line in by_source]
