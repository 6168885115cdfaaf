"""Baselines that a model must beat: popularity, recent popularity, Markov, rings, item-to-item, item-kNN, EASE.

Where repeats count, also each user's own items, the most used or the newest first. A baseline learns from the events
that the model is trained on, and scores all items from the same earlier events that the model may read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from training.config import TrainConfig
from training.data.clock import newest_of
from training.data.interactions import Interactions
from training.data.split import Split, Targets
from training.metrics import ndcg
from training.models.ease import UNVALIDATED_LAMBDA, EaseForm, EaseSolution, ease_form, local_form, search_ridge
from training.models.neighbors import neighbors_of
from training.models.scoring import mask_seen, rank_slices, ranks_of, seen_before
from training.models.transitions import TransitionRingsBaseline, Transitions, choice_vectors, text_vectors

Scores = npt.NDArray[np.float64] | npt.NDArray[np.float32]
DAY_MS = 86_400_000
VALIDATION_TARGETS = 1000
"""Most validation targets that choose between the forms of a baseline."""

KNN_NEIGHBORS = (20, 50, 100)
"""Neighbours of an item that item-kNN knows, whatever the model keeps."""
KNN_HISTORY = 2000
"""Newest events of a user that it learns from: the cost grows with the square of a history."""
HISTORY_DECAY = 0.9
"""Weight of an event relative to the next newer one, in item-to-item."""
_Candidate = TypeVar("_Candidate", bound="Baseline")


class Baseline(Protocol):
    """Scores every item for the moment just before each target."""

    name: str

    def scores(self, targets: Targets) -> Scores:
        """Float `[n, N]`, higher is better."""
        ...


def counts_of(
    data: Interactions, ends: npt.NDArray[np.int64], counted: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.float64]:
    """Counts the events by item; float64 `[N]`.

    Args:
        data: All events.
        ends: The leading events of each user that are looked at; int64 `[U]`.
        counted: True for the events that count; bool `[E]`, None for all.
    """
    return _count(data, ends, lambda events: np.True_ if counted is None else counted[events])


def popularity_of(data: Interactions, ends: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Counts the leading events that speak for their item (`Interactions.positive`), by item; float64 `[N]`."""
    return _count(data, ends, data.positive)


def recent_popularity_of(data: Interactions, ends: npt.NDArray[np.int64], days: float) -> npt.NDArray[np.float64]:
    """Counts the same in the last days before the newest of these events; all of them if there are no times.

    An event from a wrong clock is not the newest, and not recent.
    """
    if data.ordered_only or not (ends > 0).any():
        return popularity_of(data, ends)
    newest = newest_of(data, ends)

    def is_recent(events: slice) -> npt.NDArray[np.bool_]:
        times = data.timestamps[events]
        recent: npt.NDArray[np.bool_] = data.positive(events) & (times > newest - days * DAY_MS) & (times <= newest)
        return recent

    return _count(data, ends, is_recent)


def _count(
    data: Interactions, ends: npt.NDArray[np.int64], counts: Callable[[slice], npt.NDArray[np.bool_] | np.bool_]
) -> npt.NDArray[np.float64]:
    total = np.zeros(data.items, np.int64)
    for block in data.blocks():
        chosen = (block.position < ends[block.owner]) & counts(block.events)
        total += np.bincount(data.rows[block.events][chosen], minlength=data.items)
    return total.astype(np.float64)


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

    def __init__(self, data: Interactions, transitions: Transitions, popularity: npt.NDArray[np.float64]) -> None:
        self.data, self.transitions = data, transitions
        self.popularity = popularity / (popularity.max() + 1)

    def scores(self, targets: Targets) -> Scores:
        """Returns bigram counts, plus a fraction below one for popularity."""
        newest = self.data.rows[self.data.offsets[targets.users] + targets.positions - 1]
        out = np.repeat(self.popularity[None], len(targets), axis=0)
        for line, row in enumerate(newest):
            part = slice(self.transitions.starts[row], self.transitions.starts[row + 1])
            out[line, self.transitions.next[part]] += self.transitions.counts[part]
        return out


class OwnItemsBaseline:
    """Each user's items, the most used first and of those the newest, or the newest first; then popular items."""

    def __init__(self, data: Interactions, popularity: npt.NDArray[np.float64], *, by_count: bool) -> None:
        self.name = "most_used" if by_count else "most_recent"
        self.data, self.popularity, self.by_count = data, popularity / (popularity.max() + 1), by_count

    def scores(self, targets: Targets) -> Scores:
        """Counts the user's events that speak for their item; later last events win ties by a fraction below one."""
        out = np.repeat(self.popularity[None], len(targets), axis=0)
        for line, (user, position) in enumerate(zip(targets.users, targets.positions, strict=True)):
            start = int(self.data.offsets[user])
            part = slice(start, start + int(position))
            rows = self.data.rows[part][self.data.positive(part)]
            items, counts = np.unique(rows, return_counts=True)
            last = np.zeros(self.data.items)
            last[rows] = np.arange(rows.size)  # of several places for one item numpy keeps the last
            # At least 1, so above all popularity.
            out[line, items] = (counts if self.by_count else 1) + last[items] / max(1, rows.size)
        return out


class NeighborsBaseline:
    """The sum of the similarities to the items of a history.

    `item_knn`, the textbook's: each different item once, whatever its place (Deshpande and Karypis, "Item-based top-N
    recommendation algorithms", 2004). With a decay `item_to_item`: the newest 50 events, older ones count less.
    """

    def __init__(
        self,
        data: Interactions,
        neighbors: npt.NDArray[np.int32],
        similarity: npt.NDArray[np.float32],
        decay: float = HISTORY_DECAY,
    ) -> None:
        """Takes what `neighbors_of` returned; with a decay of 1 it is item-kNN."""
        self.name = "item_to_item" if decay < 1 else "item_knn"
        self.data, self.neighbors, self.similarity, self.decay = data, neighbors, similarity, decay

    def scores(self, targets: Targets) -> Scores:
        """Returns weighted sums over the items."""
        out = np.zeros((len(targets), self.data.items), np.float32)
        for line, (user, position) in enumerate(zip(targets.users, targets.positions, strict=True)):
            rows = _newest(self.data, user, position, 50 if self.decay < 1 else position)
            if self.decay == 1:
                rows = np.unique(rows)
            weights = (self.decay ** np.arange(rows.size)[::-1]).astype(np.float32)
            # `np.add.at`, because `+=` would count an item once that is the neighbour of several.
            near = self.neighbors[rows]
            np.add.at(out[line], near[near >= 0], (self.similarity[rows] * weights[:, None])[near >= 0])
        return out


class EaseBaseline:
    """EASE (arXiv:1905.03375): the linear autoencoder over items, in the form that the catalogue allows.

    Where that is not the local one, the local one is a baseline too, `ease_local`: the model may hold its table.
    """

    def __init__(
        self, data: Interactions, solution: EaseSolution, facts: Mapping[str, Any] | None = None, name: str = "ease"
    ) -> None:
        """Takes a solution of `training.models.ease`; `facts` are for the result."""
        self.data, self.solution, self.facts, self.name = data, solution, dict(facts or {}), name

    def scores(self, targets: Targets) -> Scores:
        """Returns the sums over the whole histories."""
        lines = zip(targets.users, targets.positions, strict=True)
        return self.solution.scores([_newest(self.data, user, position, position) for user, position in lines])

    @classmethod
    def best(
        cls, data: Interactions, form: EaseForm, targets: Targets, repeats: bool, name: str = "ease"
    ) -> EaseBaseline:
        """Returns the one whose lambda has the highest NDCG@10 on validation targets."""
        facts: dict[str, Any] = {"form": form.name, "why": form.why}
        if not len(targets):
            return cls(data, form.solve(UNVALIDATED_LAMBDA), {**facts, "lambda": UNVALIDATED_LAMBDA}, name)

        def attempt(solution: EaseSolution) -> tuple[EaseSolution, float]:
            return solution, _ndcg(cls(data, solution), data, targets, repeats)

        # By the baseline itself and not by the linear part of the model: each gets the lambda that is best for it.
        solution, search = search_ridge(form, attempt)
        if search.warning:
            print(f"baseline {name} ({form.name}): {search.warning}", file=sys.stderr)
        return cls(data, solution, {**facts, **search.as_facts()}, name)


def best_of(candidates: Iterable[_Candidate], data: Interactions, targets: Targets, repeats: bool) -> _Candidate:
    """Returns the first of the baselines with the highest NDCG@10 on some targets; the first if there are none."""
    best: tuple[float, _Candidate] | None = None
    # One at a time: each may hold a matrix of items by items.
    for candidate in candidates:
        value = _ndcg(candidate, data, targets, repeats) if len(targets) else 0.0
        if best is None or value > best[0]:
            best = value, candidate
    if best is None:
        raise ValueError("no candidate")
    return best[1]


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
    """Returns the items of a user's newest events before a position, without those that were rated too low."""
    end = int(data.offsets[user]) + int(position)
    part = slice(max(int(data.offsets[user]), end - most), end)
    rows: npt.NDArray[np.int32] = data.rows[part][~data.low(part)]
    return rows


def build_baselines(
    data: Interactions, division: Split, config: TrainConfig, items: pa.Table | None = None
) -> tuple[list[Baseline], dict[str, str]]:
    """Builds the baselines that fit the data; where one has several forms, validation chooses.

    Args:
        data: All events.
        division: Their split.
        config: The settings of the run.
        items: The items table in row order, None without one.

    Returns:
        The baselines, and why others are left out, by name.
    """
    ends, left_out = division.train_end, {}
    counts, transitions = popularity_of(data, ends), Transitions.count(data, ends)
    near, cosines = neighbors_of(data, ends, max(KNN_NEIGHBORS), config.seed, KNN_HISTORY)
    targets = division.validation.sample(VALIDATION_TARGETS, config.seed)
    baselines: list[Baseline] = [
        PopularBaseline("popular", counts),
        MarkovBaseline(data, transitions, counts),
        NeighborsBaseline(data, near, cosines),
    ]
    # The nearest come first, so each table is a part of the widest.
    nearest = (NeighborsBaseline(data, near[:, :k], cosines[:, :k], decay=1.0) for k in KNN_NEIGHBORS)
    baselines.append(best_of(nearest, data, targets, config.repeats))
    if data.ordered_only and not config.ordered:
        left_out["transition_rings"] = "the order of events is drawn at random (ordered: false)"
    else:
        rings = _rings(data, ends, config, transitions, counts, items)
        baselines.append(best_of(rings, data, targets, config.repeats))
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
        baselines.append(EaseBaseline.best(data, form, targets, config.repeats))
        local = form if form.name == "local" else local_form(data, ends, config.seed)
        if not isinstance(local, str) and local is not form:
            baselines.append(EaseBaseline.best(data, local, targets, config.repeats, "ease_local"))
    if config.repeats:
        baselines += [OwnItemsBaseline(data, counts, by_count=by_count) for by_count in (True, False)]
    else:
        left_out["most_used"] = left_out["most_recent"] = "items are not recommended again (repeats)"
    return baselines, left_out


def _rings(
    data: Interactions,
    ends: npt.NDArray[np.int64],
    config: TrainConfig,
    transitions: Transitions,
    popularity: npt.NDArray[np.float64],
    items: pa.Table | None,
) -> Iterator[TransitionRingsBaseline]:
    """Yields the forms of the rings: ordered by common users or by text, around one newest item or two."""
    for vectors in (choice_vectors(data, ends, config.seed), None if items is None else text_vectors(items)):
        if vectors is not None:
            for newest in (1, 2):
                yield TransitionRingsBaseline(
                    data, transitions, vectors, popularity, newest=newest, repeats=config.repeats
                )
