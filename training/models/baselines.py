"""Baselines that a model must beat: popularity, recent popularity, first-order Markov, item-to-item and EASE.

Where repeats count, also each user's most used items. A baseline learns from the events that the model is trained on,
and scores all items from the same earlier events that the model may read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from training.config import TrainConfig
from training.data.clock import newest_of
from training.data.interactions import Interactions
from training.data.split import Split, Targets

Scores = npt.NDArray[np.float64] | npt.NDArray[np.float32]
DAY_MS = 86_400_000
EASE_MOST_ITEMS = 8_000
"""EASE inverts a matrix of items by items; past this it costs minutes and gigabytes."""
EASE_LAMBDA = 500.0
HISTORY_DECAY = 0.9


class Baseline(Protocol):
    """Scores every item for the moment just before each target."""

    name: str

    def scores(self, targets: Targets) -> Scores:
        """Float `[n, N]`, higher is better."""
        ...


def counts_of(
    data: Interactions,
    ends: npt.NDArray[np.int64],
    counted: npt.NDArray[np.bool_] | None = None,
    after: float = -np.inf,
    until: float = np.inf,
) -> npt.NDArray[np.float64]:
    """Counts the events by item; float64 `[N]`.

    Args:
        data: All events.
        ends: The leading events of each user that are looked at; int64 `[U]`.
        counted: True for the events that count; bool `[E]`, None for all.
        after: Events count whose time (ms) is later,
        until: and not later than this.
    """
    counts = np.zeros(data.items, np.int64)
    for block in data.blocks():
        chosen = block.position < ends[block.owner]
        if counted is not None:
            chosen &= counted[block.events]
        if after > -np.inf:
            chosen &= (data.timestamps[block.events] > after) & (data.timestamps[block.events] <= until)
        counts += np.bincount(data.rows[block.events][chosen], minlength=data.items)
    return counts.astype(np.float64)


def popularity_of(data: Interactions, ends: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Counts the leading events that make their item seen, by item; float64 `[N]`."""
    return counts_of(data, ends, data.seen)


def recent_popularity_of(data: Interactions, ends: npt.NDArray[np.int64], days: float) -> npt.NDArray[np.float64]:
    """Counts the same in the last days before the newest of these events; all of them if there are no times.

    An event from a wrong clock is not the newest, and not recent.
    """
    if data.ordered_only or not (ends > 0).any():
        return popularity_of(data, ends)
    newest = newest_of(data, ends)
    return counts_of(data, ends, data.seen, newest - days * DAY_MS, newest)


class PopularBaseline:
    """The same order for all users: number of events, ties as they come."""

    def __init__(self, name: str, counts: npt.NDArray[np.float64]) -> None:
        self.name = name
        self.counts = counts

    def scores(self, targets: Targets) -> Scores:
        """Returns the counts, for each target."""
        return np.repeat(self.counts[None], len(targets), axis=0)


class MarkovBaseline:
    """Items by how often they followed the user's newest item; ties, and items that never did, by popularity."""

    name = "markov"

    def __init__(self, data: Interactions, ends: npt.NDArray[np.int64], popularity: npt.NDArray[np.float64]) -> None:
        self.data = data
        distinct, self.counts = np.empty(0, np.int64), np.empty(0, np.int64)
        for block in data.blocks():
            follows = np.flatnonzero((block.position > 0) & (block.position < ends[block.owner]))
            rows = data.rows[block.events].astype(np.int64)
            # Two items as one number: counted over the pairs that occur, where a matrix of all would be mostly zeros.
            pairs, counts = np.unique(rows[follows - 1] * data.items + rows[follows], return_counts=True)
            distinct, place = np.unique(np.concatenate([distinct, pairs]), return_inverse=True)
            self.counts = np.bincount(place, np.concatenate([self.counts, counts])).astype(np.int64)
        self.next = distinct % data.items
        self.starts = np.searchsorted(distinct // data.items, np.arange(data.items + 1))
        self.popularity = popularity / (popularity.max() + 1)

    def scores(self, targets: Targets) -> Scores:
        """Returns bigram counts, plus a fraction below one for popularity."""
        newest = self.data.rows[self.data.offsets[targets.users] + targets.positions - 1]
        out = np.repeat(self.popularity[None], len(targets), axis=0)
        for line, row in enumerate(newest):
            part = slice(self.starts[row], self.starts[row + 1])
            out[line, self.next[part]] += self.counts[part]
        return out


class MostUsedBaseline:
    """Each user's items, the most often used first and of those the newest; then popular items."""

    name = "most_used"

    def __init__(self, data: Interactions, popularity: npt.NDArray[np.float64]) -> None:
        self.data, self.popularity = data, popularity / (popularity.max() + 1)

    def scores(self, targets: Targets) -> Scores:
        """Counts the user's events that make their item seen; later last events win ties by a fraction below one."""
        out = np.repeat(self.popularity[None], len(targets), axis=0)
        for line, (user, position) in enumerate(zip(targets.users, targets.positions, strict=True)):
            start = int(self.data.offsets[user])
            part = slice(start, start + int(position))
            rows = self.data.rows[part][self.data.seen[part]]
            items, counts = np.unique(rows, return_counts=True)
            last = np.zeros(self.data.items)
            last[rows] = np.arange(rows.size)  # of several places for one item numpy keeps the last
            out[line, items] = counts + last[items] / max(1, rows.size)
        return out


class NeighborsBaseline:
    """The sum of the similarities to the newest items, which count less with every event since."""

    name = "item_to_item"

    def __init__(
        self, data: Interactions, neighbors: npt.NDArray[np.int32], similarity: npt.NDArray[np.float32]
    ) -> None:
        self.data, self.neighbors, self.similarity = data, neighbors, similarity

    def scores(self, targets: Targets) -> Scores:
        """Returns weighted sums over the newest 50 events."""
        out = np.zeros((len(targets), self.data.items), np.float32)
        for line, (user, position) in enumerate(zip(targets.users, targets.positions, strict=True)):
            rows = _newest(self.data, user, position, 50)
            weights = (HISTORY_DECAY ** np.arange(rows.size)[::-1]).astype(np.float32)
            # `np.add.at`, because `+=` would count an item once that is the neighbour of several.
            near = self.neighbors[rows]
            np.add.at(out[line], near[near >= 0], (self.similarity[rows] * weights[:, None])[near >= 0])
        return out


class EaseBaseline:
    """EASE (arXiv:1905.03375): the closed-form linear autoencoder over items."""

    def __init__(self, data: Interactions, ends: npt.NDArray[np.int64], decay: float = 1.0) -> None:
        """Inverts the regularised co-occurrence; `decay` below 1 makes newer events of a history count more."""
        self.name = "ease" if decay == 1.0 else "ease_recent"
        self.data, self.decay = data, decay
        gram = torch.zeros(data.items, data.items, dtype=torch.float64)
        for block in data.blocks():
            chosen = block.position < ends[block.owner]
            owner, rows = block.owner[chosen], data.rows[block.events][chosen]
            for start in range(block.users.start, block.users.stop, 4096):
                part = slice(*np.searchsorted(owner, [start, start + 4096]))
                incidence = torch.zeros(min(4096, block.users.stop - start), data.items)
                incidence[owner[part] - start, rows[part].astype(np.int64)] = 1
                # Counts of 4,096 users are exact in float32; only the inverse needs the digits of float64.
                gram += incidence.T @ incidence
        gram.diagonal().add_(EASE_LAMBDA)
        # The closed form: each item's regression on all others, with its own weight held at zero.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        weights = inverse / -inverse.diagonal()
        weights.fill_diagonal_(0)
        self.weights = weights.float()

    def scores(self, targets: Targets) -> Scores:
        """Returns the weighted history times the learned matrix."""
        history = torch.zeros(len(targets), self.data.items)
        for line, (user, position) in enumerate(zip(targets.users, targets.positions, strict=True)):
            rows = _newest(self.data, user, position, position)
            history[line, torch.from_numpy(rows.astype(np.int64))] = torch.from_numpy(
                (self.decay ** np.arange(rows.size)[::-1]).astype(np.float32)
            )
        scores: npt.NDArray[np.float32] = (history @ self.weights).numpy()
        return scores


def _newest(data: Interactions, user: int, position: int, most: int) -> npt.NDArray[np.int32]:
    end = int(data.offsets[user]) + int(position)
    return data.rows[max(int(data.offsets[user]), end - most) : end]


def build_baselines(
    data: Interactions,
    division: Split,
    config: TrainConfig,
    neighbors: tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]],
) -> Sequence[Baseline]:
    """Builds the baselines that fit the data: recent popularity needs times, EASE a catalogue of moderate size.

    Where repeats count, the user's most used items are a baseline too.
    """
    ends = division.train_end
    counts = popularity_of(data, ends)
    baselines: list[Baseline] = [
        PopularBaseline("popular", counts),
        MarkovBaseline(data, ends, counts),
        NeighborsBaseline(data, *neighbors),
    ]
    if not data.ordered_only:
        # Counts of all time decide between items with equal recent counts, which for most are 0.
        recent = recent_popularity_of(data, ends, config.recent_days)
        baselines.append(PopularBaseline("recent_popular", recent + counts / (counts.max() + 1)))
    if data.items <= EASE_MOST_ITEMS:
        baselines.append(EaseBaseline(data, ends))
    if config.repeats:
        baselines.append(MostUsedBaseline(data, counts))
    return baselines
