"""Learns the linear part of relevance: item-to-item weights, and on validation how much each of its terms counts.

EASE (arXiv:1905.03375) regresses each item on all others in closed form; of its weights a table keeps the largest of
each item of a history, positive and negative ones. Where the catalogue is too large for its inverse, the table is that
of cosines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.assemble import are_choices
from features.jit import kernel
from features.keys import event_type_keys
from features.linear import NO_SCORES, ItemWeights, LinearScores, LinearSpec, LinearTerm, slot_of, sum_weights
from features.profile import RING
from training.data.interactions import Interactions, UserBlock
from training.data.split import Targets
from training.metrics import ndcg
from training.models.neighbors import by_item, distinct_items
from training.models.scoring import mask_seen, rank_slices, seen_before

EASE_ITEMS = 16_384
"""EASE inverts a matrix of items by items: past this it takes gigabytes and minutes."""

EXACT_ITEMS = 6_000
"""Up to so many items the inverse is taken in float64."""

LAMBDAS = (10.0, 50.0, 200.0, 1000.0)
FEW_LAMBDAS = (50.0, 500.0)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0)
DECAYS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.65)
OWN_WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
OWN_DECAYS = (0.95, 0.8, 0.5)
_FIRST_DECAYS = (1.0, 0.9)
_PROPOSED = 1000
"""Most relevant items of a user that a trial knows: a target below all of them is on no page."""

_PARTS_PER_THREAD = 4
_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_F32 = npt.NDArray[np.float32]
_F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LinearPart:
    """The linear part of a run.

    Attributes:
        spec: The weights of its terms; all 0 where none of them helps.
        neighbors: The items that each item's weights are for, largest first, -1 padded; int32 `[N, K]`.
        scores: The weights; float32 `[N, K]`.
        facts: `table` (ease or cosine), `lambda`, and NDCG@10 on validation `without` and `with` it.
    """

    spec: LinearSpec
    neighbors: _I32
    scores: _F32
    facts: dict[str, Any]


def fit_linear(data: Interactions, ends: _I64, trial: LinearTrial, cosines: tuple[_I32, _F32]) -> LinearPart:
    """Fits the table to the training events, and chooses the terms by NDCG@10 on validation targets.

    A term is taken if it improves the mean by more than one standard error of the difference.

    Args:
        data: All events.
        ends: The leading events of each user that are trained on; int64 `[U]`.
        trial: The validation targets.
        cosines: What `neighbors_of` returned; its width is that of the table.
    """
    tables = _tables(data, ends, cosines)
    if not len(trial):
        # Nothing tells how much it should count; the table still serves users without a vector.
        facts, neighbors, scores = next(tables)
        return LinearPart(LinearSpec(), neighbors, scores, facts)
    facts, neighbors, scores = max(
        tables, key=lambda table: trial.best_weight(ItemWeights.of(*table[1:]), _FIRST_DECAYS)[1].mean()
    )
    weights = ItemWeights.of(neighbors, scores)
    base = trial.values(LinearSpec(), weights, (1.0,))[0]
    spec, values = trial.best_weight(weights, DECAYS)
    if not _is_gain(values, base):
        spec, values = LinearSpec(), base
    if trial.repeats:
        spec, values = trial.with_own_items(weights, spec, values)
    return LinearPart(spec, neighbors, scores, facts | {"without": float(base.mean()), "with": float(values.mean())})


def _tables(data: Interactions, ends: _I64, cosines: tuple[_I32, _F32]) -> Iterator[tuple[dict[str, Any], _I32, _F32]]:
    """Yields the tables to choose from, each with its facts: EASE by several lambdas, or the cosines."""
    if data.items > EASE_ITEMS:
        yield {"table": "cosine"}, *cosines
        return
    gram = gram_of(data, ends)
    for ridge in LAMBDAS if data.items <= EXACT_ITEMS else FEW_LAMBDAS:
        yield {"table": "ease", "lambda": ridge}, *ease(gram, ridge, cosines[0].shape[1])


def _is_gain(values: _F64, before: _F64) -> bool:
    # The best of many looks good by chance, so a gain within one standard error is none.
    gain = values - before
    return bool(gain.mean() > gain.std() / max(1.0, np.sqrt(gain.size)))


def gram_of(data: Interactions, ends: _I64) -> Tensor:
    """Counts the users who chose both of two items among their leading events; float32 `[N, N]`."""
    is_choice = _choice_types(data)

    def choices(block: UserBlock) -> _I64:
        is_counted = is_choice[data.types[block.events]] & (block.position < ends[block.owner])
        return np.flatnonzero(is_counted & ~data.low(block.events))

    rows, user_starts = distinct_items(data, choices)
    users, item_starts = by_item(rows, user_starts, data.items)
    gram = np.zeros((data.items, data.items), np.float32)
    _in_parts(data.items, lambda part: _count_pairs(rows, user_starts, users, item_starts, part, gram))
    return torch.from_numpy(gram)


def _choice_types(data: Interactions) -> npt.NDArray[np.bool_]:
    """Returns True for the numbers of the event types by which a user chooses an item."""
    return np.concatenate([[False], are_choices(event_type_keys(data.event_types))])


@kernel(nogil=True)
def _count_pairs(rows: Any, user_starts: Any, users: Any, item_starts: Any, part: tuple[int, int], gram: Any) -> None:
    for item in range(part[0], part[1]):
        for at in range(item_starts[item], item_starts[item + 1]):
            for event in range(user_starts[users[at]], user_starts[users[at] + 1]):
                gram[item, rows[event]] += 1.0


def ease_inverse(gram: Tensor, ridge: float) -> Tensor:
    """Returns the inverse of the regularised Gram matrix, which holds the weights of EASE; float `[N, N]`."""
    matrix = gram.double() if gram.shape[0] <= EXACT_ITEMS else gram.clone()
    matrix.diagonal().add_(ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def ease(gram: Tensor, ridge: float, keep: int) -> tuple[_I32, _F32]:
    """Returns the largest weights of EASE, by the item of the history.

    Args:
        gram: What `gram_of` returned.
        ridge: The regularisation, lambda.
        keep: Most weights of an item.

    Returns:
        Rows int32 `[N, keep]`, -1 padded, and weights float32 `[N, keep]`, largest first without regard to their sign.
    """
    inverse = ease_inverse(gram, ridge)
    # The closed form: each item's regression on all others, with its own weight held at zero.
    diagonal = inverse.diagonal().clone()
    keep = min(keep, max(1, gram.shape[0] - 1))
    rows, scores = np.full((gram.shape[0], keep), -1, np.int32), np.zeros((gram.shape[0], keep), np.float32)
    for start in range(0, gram.shape[0], 1024):
        part = slice(start, min(start + 1024, gram.shape[0]))
        weights = (inverse[part] / -diagonal).float()
        weights[torch.arange(part.stop - start), torch.arange(start, part.stop)] = 0
        largest = torch.topk(weights.abs(), keep, dim=1).indices
        kept = weights.gather(1, largest).numpy()
        rows[part], scores[part] = np.where(kept != 0, largest.numpy(), -1), kept
    return rows, scores


class LinearTrial:
    """Ranks validation targets by relevance with a linear part, whichever it is."""

    def __init__(
        self,
        data: Interactions,
        targets: Targets,
        users: _F32,
        vectors: _F32,
        unscored: npt.NDArray[np.bool_],
        repeats: bool,
    ) -> None:
        """Finds all that does not depend on the linear part.

        Args:
            data: All events.
            targets: Validation targets.
            users: The user's vector just before each of them; float32 `[n, D]`.
            vectors: Item vectors; float32 `[N, D]`.
            unscored: True for items that have no score; bool `[N]`.
            repeats: Items are recommended again.
        """
        self.repeats = repeats
        self._users, self._vectors = np.ascontiguousarray(users), np.ascontiguousarray(vectors)
        self._truth = targets.rows(data)
        self._chosen, self._starts = chosen_before(data, targets)
        none: list[_I32] = [np.empty(0, np.int32)] * len(targets)
        seen = none if repeats else seen_before(data, targets)
        self._seen = np.concatenate([np.empty(0, np.int32), *seen]).astype(np.int32)
        self._seen_starts = np.concatenate([[0], np.cumsum([rows.size for rows in seen])]).astype(np.int64)
        self._proposed = np.empty((len(targets), min(_PROPOSED, data.items)), np.float32)
        for part in rank_slices(len(targets), data.items):
            scores = self._users[part] @ self._vectors.T
            scores[:, unscored] = -np.inf
            mask_seen(scores, seen[part])
            scores[np.arange(scores.shape[0]), self._truth[part]] = -np.inf
            best = -np.partition(-scores, self._proposed.shape[1] - 1, axis=1)[:, : self._proposed.shape[1]]
            self._proposed[part] = np.sort(best, axis=1)

    def __len__(self) -> int:
        """The number of targets."""
        return self._truth.size

    def values(self, spec: LinearSpec, table: ItemWeights, weights: Sequence[float]) -> list[_F64]:
        """Returns NDCG@10 of each target, for each of some factors of the whole linear part; float64 `[n]` each."""
        ranks = np.empty((self._truth.size, len(weights)), np.int64)
        factors = np.array(weights, np.float32)
        arrays = _TrialArrays(
            self._chosen, self._starts, self._truth, self._users, self._vectors, self._proposed, self._seen,
            self._seen_starts,
        )  # fmt: skip
        _in_parts(self._truth.size, lambda part: _rank(part, arrays, table, spec, factors, ranks))
        return [ndcg(of_weight, 10) for of_weight in ranks.T]

    def best_weight(self, table: ItemWeights, decays: Sequence[float]) -> tuple[LinearSpec, _F64]:
        """Returns the weight and the decay of a table that rank best, and the values of each target."""
        best: tuple[LinearSpec, _F64] | None = None
        for decay in decays:
            values = self.values(LinearSpec(1.0, decay), table, WEIGHTS)
            at = int(np.argmax([value.mean() for value in values]))
            if best is None or values[at].mean() > best[1].mean():
                best = LinearSpec(WEIGHTS[at], decay), values[at]
        assert best is not None
        return best

    def with_own_items(self, table: ItemWeights, spec: LinearSpec, values: _F64) -> tuple[LinearSpec, _F64]:
        """Adds the terms of the user's own items, each if it helps, then weighs the table again."""
        counts = [spec._replace(count_weight=weight) for weight in OWN_WEIGHTS]
        spec, values = self._better(table, spec, values, counts)
        recencies = [
            spec._replace(recency_weight=weight, recency_decay=decay)
            for weight, decay in itertools.product(OWN_WEIGHTS, OWN_DECAYS)
        ]
        spec, values = self._better(table, spec, values, recencies)
        if not (spec.count_weight or spec.recency_weight):
            return spec, values
        again = [spec._replace(count_weight=weight) for weight in (0.0, *OWN_WEIGHTS)]
        spec, values = self._better(table, spec, values, again)
        return self._better(table, spec, values, [spec._replace(weight=weight) for weight in WEIGHTS])

    def _better(
        self, table: ItemWeights, spec: LinearSpec, values: _F64, others: Sequence[LinearSpec]
    ) -> tuple[LinearSpec, _F64]:
        tried = [(another, self.values(another, table, (1.0,))[0]) for another in others]
        best, best_values = max(tried, key=lambda pair: pair[1].mean())
        return (best, best_values) if _is_gain(best_values, values) else (spec, values)


def linear_sums(term: LinearTerm, data: Interactions, targets: Targets) -> list[LinearScores]:
    """Returns what the linear part adds to relevance just before each target."""
    if term.spec.is_empty:
        return [NO_SCORES] * len(targets)
    chosen, starts = chosen_before(data, targets)
    return [term.scores(chosen[start:end]) for start, end in itertools.pairwise(starts.tolist())]


def add_sums(scores: _F32, sums: Sequence[LinearScores]) -> _F32:
    """Adds the linear part to the relevance of all items, in place; scores float32 `[n, N]`."""
    for line, of_line in enumerate(sums):
        scores[line, of_line.rows] += of_line.sums
    return scores


def chosen_before(data: Interactions, targets: Targets) -> tuple[_I32, _I64]:
    """Returns the rows that users chose before targets, as serving reads them: of the newest `RING` events.

    Returns:
        Rows, oldest first, int32 `[m]`, and the start of each target's, int64 `[n + 1]`.
    """
    is_choice = _choice_types(data)
    parts, sizes = [np.empty(0, np.int32)], [0]
    for user, position in zip(targets.users.tolist(), targets.positions.tolist(), strict=True):
        end = int(data.offsets[user]) + position
        part = slice(max(int(data.offsets[user]), end - RING), end)
        parts.append(data.rows[part][is_choice[data.types[part]]])
        sizes.append(parts[-1].size)
    return np.concatenate(parts), np.cumsum(sizes)


class _TrialArrays(NamedTuple):
    """The arrays that a trial ranks n targets by, see `LinearTrial`; `proposed` is ascending, and float32 `[n, M]`."""

    chosen: _I32
    starts: _I64
    truth: _I32
    users: _F32
    vectors: _F32
    proposed: _F32
    seen: _I32
    seen_starts: _I64


@kernel(nogil=True)
def _rank(part: Any, trial: _TrialArrays, table: ItemWeights, spec: LinearSpec, factors: _F32, ranks: _I64) -> None:
    """Writes how many items stand before each target of a part, by each factor of the linear part, to `ranks`."""
    for line in range(part[0], part[1]):
        slots, named, sums = sum_weights(trial.chosen[trial.starts[line] : trial.starts[line + 1]], table, spec)
        left_out = np.zeros(named.size, np.bool_)
        for at in range(trial.seen_starts[line], trial.seen_starts[line + 1]):
            place = slots[slot_of(slots, named, trial.seen[at])]
            if place >= 0:
                left_out[place] = True
        target_sum = np.float32(0)
        place = slots[slot_of(slots, named, trial.truth[line])]
        if place >= 0:
            target_sum, left_out[place] = sums[place], True
        target = _product(trial.users[line], trial.vectors[trial.truth[line]])
        products = np.empty(named.size, np.float32)
        for at in range(named.size):
            products[at] = _product(trial.users[line], trial.vectors[named[at]])
        for number in range(factors.size):
            least = target + factors[number] * target_sum
            before = trial.proposed.shape[1] - np.searchsorted(trial.proposed[line], least)
            for at in range(named.size):
                if left_out[at]:
                    continue
                # Counted with the others by its relevance alone, so taken out there.
                if products[at] >= least and products[at] >= trial.proposed[line, 0]:
                    before -= 1
                if products[at] + factors[number] * sums[at] >= least:
                    before += 1
            ranks[line, number] = before


@kernel(nogil=True)
def _product(left: _F32, right: _F32) -> np.float32:
    total = np.float32(0)
    for at in range(left.size):
        total += left[at] * right[at]
    return total


def _in_parts(count: int, work: Any) -> None:
    """Calls `work` for ranges that cover `count`, in as many threads as torch uses."""
    threads = torch.get_num_threads()
    edges = np.unique(np.linspace(0, count, _PARTS_PER_THREAD * threads + 1).astype(np.int64)).tolist()
    with ThreadPoolExecutor(threads, "linear") as pool:
        list(pool.map(work, itertools.pairwise(edges)))
