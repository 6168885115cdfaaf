"""Baselines that a model must beat: popularity, recent popularity, first-order Markov, item-to-item, item-kNN, EASE.

Where repeats count, also each user's own items, the most used or the newest first. A baseline learns from the events
that the model is trained on, and scores all items from the same earlier events that the model may read.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from training.config import TrainConfig
from training.data.clock import newest_of
from training.data.interactions import Interactions
from training.data.split import Split, Targets
from training.metrics import ndcg
from training.models.ease import UNVALIDATED_LAMBDA, EaseForm, EaseSolution, ease_form, search_ridge
from training.models.neighbors import neighbors_of
from training.models.scoring import mask_seen, rank_slices, ranks_of, seen_before

Scores = npt.NDArray[np.float64] | npt.NDArray[np.float32]
DAY_MS = 86_400_000
EASE_TARGETS = 1000
"""Most validation targets that choose the regularisation."""

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


class OwnItemsBaseline:
    """Each user's items, the most used first and of those the newest, or the newest first; then popular items."""

    def __init__(self, data: Interactions, popularity: npt.NDArray[np.float64], *, by_count: bool) -> None:
        self.name = "most_used" if by_count else "most_recent"
        self.data, self.popularity, self.by_count = data, popularity / (popularity.max() + 1), by_count

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
            # At least 1, so above all popularity.
            out[line, items] = (counts if self.by_count else 1) + last[items] / max(1, rows.size)
        return out


class NeighborsBaseline:
    """The sum of the similarities to the items of a history; with a decay the newest 50, older ones count less."""

    def __init__(
        self,
        data: Interactions,
        neighbors: npt.NDArray[np.int32],
        similarity: npt.NDArray[np.float32],
        decay: float = HISTORY_DECAY,
    ) -> None:
        """Takes what `neighbors_of` returned; with a decay of 1 it is item-kNN, which knows no order."""
        self.name = "item_to_item" if decay < 1 else "item_knn"
        self.data, self.neighbors, self.similarity, self.decay = data, neighbors, similarity, decay

    def scores(self, targets: Targets) -> Scores:
        """Returns weighted sums over the events."""
        out = np.zeros((len(targets), self.data.items), np.float32)
        for line, (user, position) in enumerate(zip(targets.users, targets.positions, strict=True)):
            rows = _newest(self.data, user, position, 50 if self.decay < 1 else position)
            weights = (self.decay ** np.arange(rows.size)[::-1]).astype(np.float32)
            # `np.add.at`, because `+=` would count an item once that is the neighbour of several.
            near = self.neighbors[rows]
            np.add.at(out[line], near[near >= 0], (self.similarity[rows] * weights[:, None])[near >= 0])
        return out


class EaseBaseline:
    """EASE (arXiv:1905.03375): the linear autoencoder over items, in the form that the catalogue allows."""

    name = "ease"

    def __init__(self, data: Interactions, solution: EaseSolution, facts: Mapping[str, Any] | None = None) -> None:
        """Takes a solution of `training.models.ease`; `facts` are for the result."""
        self.data, self.solution, self.facts = data, solution, dict(facts or {})

    def scores(self, targets: Targets) -> Scores:
        """Returns the sums over the whole histories."""
        lines = zip(targets.users, targets.positions, strict=True)
        return self.solution.scores([_newest(self.data, user, position, position) for user, position in lines])

    @classmethod
    def best(cls, data: Interactions, form: EaseForm, targets: Targets, repeats: bool) -> EaseBaseline:
        """Returns the one whose lambda has the highest NDCG@10 on validation targets."""
        facts: dict[str, Any] = {"form": form.name, "why": form.why}
        if not len(targets):
            return cls(data, form.solve(UNVALIDATED_LAMBDA), {**facts, "lambda": UNVALIDATED_LAMBDA})

        def attempt(solution: EaseSolution) -> tuple[EaseSolution, float]:
            return solution, _ndcg(cls(data, solution), data, targets, repeats)

        solution, search = search_ridge(form, attempt)
        if search.warning:
            print(f"baseline ease ({form.name}): {search.warning}", file=sys.stderr)
        return cls(data, solution, {**facts, **search.as_facts()})


def _ndcg(baseline: Baseline, data: Interactions, targets: Targets, repeats: bool) -> float:
    values = []
    for part in rank_slices(len(targets), data.items):
        batch = targets.take(np.arange(part.start, part.stop))
        scores = baseline.scores(batch)
        if not repeats:
            mask_seen(scores, seen_before(data, batch))
        values.append(ndcg(ranks_of(scores, batch.rows(data)), 10))
    return float(np.concatenate(values).mean())


def _newest(data: Interactions, user: int, position: int, most: int) -> npt.NDArray[np.int32]:
    end = int(data.offsets[user]) + int(position)
    return data.rows[max(int(data.offsets[user]), end - most) : end]


def build_baselines(data: Interactions, division: Split, config: TrainConfig) -> tuple[list[Baseline], dict[str, str]]:
    """Builds the baselines that fit the data.

    Returns:
        The baselines, and why others are left out, by name.
    """
    ends, left_out = division.train_end, {}
    counts, cosines = popularity_of(data, ends), neighbors_of(data, ends, config.neighbors, config.seed)
    baselines: list[Baseline] = [
        PopularBaseline("popular", counts),
        MarkovBaseline(data, ends, counts),
        NeighborsBaseline(data, *cosines),
        NeighborsBaseline(data, *cosines, decay=1.0),
    ]
    if data.ordered_only:
        left_out["recent_popular"] = "the data set has no times"
    else:
        # Counts of all time decide between items with equal recent counts, which for most are 0.
        recent = recent_popularity_of(data, ends, config.recent_days)
        baselines.append(PopularBaseline("recent_popular", recent + counts / (counts.max() + 1)))
    form = ease_form(data, ends, config.seed)
    if isinstance(form, str):
        left_out["ease"] = form
    else:
        targets = division.validation.sample(EASE_TARGETS, config.seed)
        baselines.append(EaseBaseline.best(data, form, targets, config.repeats))
    if config.repeats:
        baselines += [OwnItemsBaseline(data, counts, by_count=by_count) for by_count in (True, False)]
    else:
        left_out["most_used"] = left_out["most_recent"] = "items are not recommended again (repeats)"
    return baselines, left_out
