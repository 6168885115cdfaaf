"""Finds item-to-item neighbours from the pairs of items that users chose together.

The work is that of the pairs that occur, not of all pairs of items: a catalogue of a million items is mostly pairs that
no user has chosen together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from features.jit import kernel
from training.data.interactions import Interactions, UserBlock

HISTORY_EVENTS = 200
"""Newest events of a user that item-to-item learns from: pairs grow with the square of a history."""
NEIGHBOR_EVENTS = 1 << 22
"""Most events that item-to-item learns from, in a catalogue of up to 419,430 items."""
NEIGHBOR_EVENTS_PER_ITEM = 10
"""Most events per item in a larger one: with fewer, most items would have no neighbour by the sample alone."""
_PARTS_PER_THREAD = 8

_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_F32 = npt.NDArray[np.float32]


def neighbors_of(
    data: Interactions, ends: _I64, keep: int, seed: int = 0, history: int = HISTORY_EVENTS
) -> tuple[_I32, _F32]:
    """Finds items that the same users chose: cosine of the sets of users, over each user's newest events.

    Past `NEIGHBOR_EVENTS` events, users are drawn at random. Beyond its result this takes 16 bytes an event that is
    learned from, and 8 bytes an item for each of torch's threads.

    Args:
        data: All events.
        ends: The leading events of each user that are looked at; int64 `[U]`.
        keep: Most neighbours of an item.
        seed: Seed of the draw of users.
        history: Newest events of a user that are learned from.

    Returns:
        Rows int32 `[N, keep]`, best first and of equal ones the lower row first, -1 padded, and their cosines float32
        `[N, keep]`, 0 padded.
    """
    return cosines_of(*distinct_choices(data, ends, seed, history), data.items, keep)


def cosines_of(rows: _I32, user_starts: _I64, items: int, keep: int) -> tuple[_I32, _F32]:
    """Finds the items with the largest cosines by what `distinct_items` returned; see `neighbors_of`."""
    users, item_starts = by_item(rows, user_starts, items)
    keep = min(keep, max(1, items - 1))
    out, scores = np.full((items, keep), -1, np.int32), np.zeros((items, keep), np.float32)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, "neighbors") as pool:
        parts = _parts(rows, user_starts, items, _PARTS_PER_THREAD * threads)
        list(pool.map(lambda part: _cosines(rows, user_starts, users, item_starts, part, out, scores), parts))
    return out, scores


def distinct_choices(data: Interactions, ends: _I64, seed: int = 0, history: int = HISTORY_EVENTS) -> tuple[_I32, _I64]:
    """Returns the distinct items that each user chose, as `neighbors_of` learns from them; see `distinct_items`."""
    most = max(NEIGHBOR_EVENTS, NEIGHBOR_EVENTS_PER_ITEM * data.items)
    drawn = np.zeros(ends.size, np.bool_)
    drawn[data.draw_users(ends, most, seed)] = True

    def newest_choices(block: UserBlock) -> _I64:
        is_chosen = (block.position < ends[block.owner]) & data.positive(block.events) & drawn[block.owner]
        chosen = np.flatnonzero(is_chosen)
        return chosen[among_newest(block.owner[chosen], history)]

    return distinct_items(data, newest_choices)


def distinct_items(data: Interactions, chosen: Callable[[UserBlock], _I64]) -> tuple[_I32, _I64]:
    """Returns the distinct items of some events of each user, ascending; int32 `[P]`, and user `u`'s part of them.

    Args:
        data: All events.
        chosen: Returns the places of the events that count in a block of users.
    """
    parts: list[_I32] = [np.empty(0, np.int32)]
    counts = np.zeros(len(data.users), np.int64)
    for block in data.blocks():
        at = chosen(block)
        # A user counts once for an item, however often they chose it.
        pairs = np.unique((block.owner[at] - block.users.start) * data.items + data.rows[block.events][at])
        parts.append((pairs % data.items).astype(np.int32))
        counts[block.users] = np.bincount(pairs // data.items, minlength=counts[block.users].size)
    return np.concatenate(parts), np.concatenate([[0], np.cumsum(counts)])


def by_item(rows: _I32, user_starts: _I64, items: int) -> tuple[_I32, _I64]:
    """Returns the users of each item, ascending; int32 `[P]`, and item `i`'s part of them."""
    owner = np.repeat(np.arange(user_starts.size - 1, dtype=np.int32), np.diff(user_starts))
    return owner[np.argsort(rows, kind="stable")], np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=items))])


def among_newest(owner: _I64, history: int = HISTORY_EVENTS) -> npt.NDArray[np.bool_]:
    """Returns True for the events that are among their user's newest `history`; `owner` is sorted."""
    ends = np.searchsorted(owner, owner, side="right")
    newest: npt.NDArray[np.bool_] = ends - np.arange(owner.size) <= history
    return newest


def _parts(rows: _I32, user_starts: _I64, items: int, count: int) -> list[tuple[int, int]]:
    """Returns ranges of items that cost about the same: an item costs the histories of its users."""
    sizes = np.diff(user_starts)
    costs = np.cumsum(np.bincount(rows, np.repeat(sizes, sizes), items) + 1)
    borders = np.searchsorted(costs, np.linspace(0, costs[-1] if items else 0, count + 1)[1:-1], side="right")
    edges = np.unique(np.concatenate([[0], borders, [items]])).tolist()
    return list(itertools.pairwise(edges))


@kernel(nogil=True)
def _cosines(
    rows: Any, user_starts: Any, users: Any, item_starts: Any, part: tuple[int, int], out: Any, scores: Any
) -> None:
    """Writes the neighbours and cosines of the items from `part[0]` to `part[1]` into `out` and `scores`."""
    items, keep = out.shape
    together = np.zeros(items, np.float32)
    near = np.empty(items, np.int32)
    for item in range(part[0], part[1]):
        count = 0
        for at in range(item_starts[item], item_starts[item + 1]):
            user = users[at]
            for event in range(user_starts[user], user_starts[user + 1]):
                neighbor = rows[event]
                # Only what is counted is looked at and set back, or each item would cost the whole catalogue.
                if together[neighbor] == 0.0 and neighbor != item:
                    near[count] = neighbor
                    count += 1
                together[neighbor] += 1.0
        together[item] = 0.0
        size = item_starts[item + 1] - item_starts[item]
        cosines = np.empty(count, np.float32)
        for place in range(count):
            neighbor = near[place]
            together[neighbor] /= np.sqrt(np.float32(size * (item_starts[neighbor + 1] - item_starts[neighbor])))
            cosines[place] = together[neighbor]
        best = near[:count]
        if count > keep:
            # Partitioning first: most items have far more neighbours than are kept, and sorting them all costs more.
            best = best[cosines >= np.partition(cosines, count - keep)[count - keep]]
        best = np.sort(best)
        best = best[np.argsort(-together[best], kind="mergesort")[:keep]]
        for place in range(best.size):
            out[item, place] = best[place]
            scores[item, place] = together[best[place]]
        for place in range(count):
            together[near[place]] = 0.0


def _cosines_plain(
    rows: _I32, user_starts: _I64, users: _I32, item_starts: _I64, part: tuple[int, int], out: _I32, scores: _F32
) -> None:
    """Plain twin of `_cosines`, which looks at all pairs of items."""
    items, keep = out.shape
    sizes = np.diff(item_starts)
    for item in range(*part):
        chosen_by = users[item_starts[item] : item_starts[item + 1]]
        histories = [rows[user_starts[user] : user_starts[user + 1]] for user in chosen_by]
        together = np.bincount(np.concatenate([np.empty(0, np.int32), *histories]), minlength=items).astype(np.float32)
        together[item] = 0.0
        cosines = together / np.sqrt(np.maximum(sizes[item] * sizes, 1).astype(np.float32))
        best = np.argsort(-cosines, kind="stable")[:keep]
        best = best[cosines[best] > 0]
        out[item, : best.size], scores[item, : best.size] = best, cosines[best]
