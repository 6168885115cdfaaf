"""Lists the distinct items of users and the users of items, which item-to-item weights are learned from."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from features.assemble import are_choices
from features.jit import kernel
from features.keys import event_type_keys
from training.data.interactions import Interactions, UserBlock
from training.models.neighbors import among_newest, by_item, distinct_items

_PARTS_PER_THREAD = 16
"""Parts are many, because those with popular items take longer than others."""

_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_F32 = npt.NDArray[np.float32]


class ItemSets(NamedTuple):
    """The items that users chose, each once: a sparse matrix of users and items by both of them.

    Attributes:
        rows: The items of each user, ascending; int32 `[P]`.
        user_starts: Start of each user's part, of users who chose any; int64 `[U + 1]`.
        users: The users of each item, ascending; int32 `[P]`.
        item_starts: Start of each item's part; int64 `[N + 1]`.
    """

    rows: _I32
    user_starts: _I64
    users: _I32
    item_starts: _I64

    @property
    def user_count(self) -> int:
        """Number of users."""
        return self.user_starts.size - 1

    @property
    def item_count(self) -> int:
        """Number of items."""
        return self.item_starts.size - 1

    @property
    def most_users(self) -> int:
        """Number of users of the item that has the most."""
        return int(np.diff(self.item_starts).max(initial=0))

    def dense(self) -> _F32:
        """Returns the matrix, 1 where a user chose an item; float32 `[U, N]`."""
        matrix = np.zeros((self.user_count, self.item_count), np.float32)
        matrix[np.repeat(np.arange(self.user_count), np.diff(self.user_starts)), self.rows] = 1
        return matrix


def choice_types(data: Interactions) -> npt.NDArray[np.bool_]:
    """Returns True for the numbers of the event types by which a user chooses an item."""
    return np.concatenate([[False], are_choices(event_type_keys(data.event_types))])


def item_sets(data: Interactions, ends: _I64, most: int | None = None, seed: int = 0) -> ItemSets:
    """Lists the items that users chose among their leading events.

    Args:
        data: All events.
        ends: The leading events of each user that are looked at; int64 `[U]`.
        most: Most events: past them users are drawn at random, each with their newest `neighbors.HISTORY_EVENTS`. All
            events of all users if None.
        seed: Seed of the draw.
    """
    is_choice = choice_types(data)
    drawn = np.full(ends.size, most is None)
    if most is not None:
        drawn[data.draw_users(ends, most, seed)] = True

    def choices(block: UserBlock) -> _I64:
        chosen = is_choice[data.types[block.events]] & (block.position < ends[block.owner]) & drawn[block.owner]
        at = np.flatnonzero(chosen & ~data.low(block.events))
        return at if most is None else at[among_newest(block.owner[at])]

    rows, user_starts = distinct_items(data, choices)
    user_starts = np.unique(user_starts)  # a user without a choice starts where the next one does
    return ItemSets(rows, user_starts, *by_item(rows, user_starts, data.items))


def in_parts(count: int, work: Callable[[tuple[int, int]], None]) -> None:
    """Calls `work` for ranges that cover `count`, in as many threads as torch uses."""
    threads = torch.get_num_threads()
    edges = np.unique(np.linspace(0, count, _PARTS_PER_THREAD * threads + 1).astype(np.int64)).tolist()
    with ThreadPoolExecutor(threads, "linear") as pool:
        list(pool.map(work, itertools.pairwise(edges)))


@kernel(nogil=True)
def write_largest(weights: Any, rows: Any, scores: Any) -> None:
    """Writes the largest weights of an item, without regard to their sign, into its line of a table.

    Args:
        weights: Those for all items; float `[N]`.
        rows: int32 `[K]`: their items, the largest first, -1 after the last that is not 0.
        scores: float32 `[K]`: the weights, 0 after the last.
    """
    sizes = np.abs(weights)
    keep = min(rows.size, weights.size)
    places = np.flatnonzero(sizes > 0.0)
    if places.size > keep:
        # Partitioning first: sorting all items for each of them would cost more than the weights.
        places = np.flatnonzero(sizes >= np.partition(sizes, sizes.size - keep)[sizes.size - keep])
    places = places[np.argsort(-sizes[places], kind="mergesort")[:keep]]
    for place in range(places.size):
        rows[place], scores[place] = places[place], weights[places[place]]


def write_largest_plain(weights: npt.NDArray[np.floating], rows: _I32, scores: _F32) -> None:
    """Plain twin of `write_largest`."""
    places = np.argsort(-np.abs(weights), kind="stable")[: rows.size]
    places = places[weights[places] != 0]
    rows[: places.size], scores[: places.size] = places, weights[places]
