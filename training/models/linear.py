"""Learns the linear part of relevance: item-to-item weights, and on validation how much each of its terms counts.

The weights are those of EASE (`training.models.ease`); a table keeps the largest of each item of a history, positive
and negative ones.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from features.jit import kernel
from features.linear import NO_SCORES, ItemWeights, LinearScores, LinearSpec, LinearTerm, slot_of, sum_weights
from features.profile import RING
from training.data.interactions import Interactions
from training.data.split import Targets
from training.metrics import ndcg
from training.models.ease import UNVALIDATED_LAMBDA, EaseForm, EaseSolution, ease_form, local_form, search_ridge
from training.models.item_sets import choice_types, in_parts
from training.models.scoring import mask_seen, rank_slices, seen_before

WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0)
DECAYS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.65)
OWN_WEIGHTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
OWN_DECAYS = (0.95, 0.8, 0.5)
_FIRST_DECAYS = (1.0, 0.9)
_PROPOSED = 1000
"""Most relevant items of a user that a trial knows: a target below all of them is on no page."""

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
        facts: `table` (ease or cosine), `form` (`ease.EaseForm.name`, or `cosines`), `why` that form, of EASE `lambda`
            and NDCG@10 on validation by `lambdas`, perhaps a `warning`, and that NDCG@10 `without` and `with` the part.
    """

    spec: LinearSpec
    neighbors: _I32
    scores: _F32
    facts: dict[str, Any]


def fit_linear(
    data: Interactions, ends: _I64, trial: LinearTrial, cosines: tuple[_I32, _F32], seed: int = 0
) -> LinearPart:
    """Fits the table to the training events, and chooses the terms by NDCG@10 on validation targets.

    A term is taken if it improves the mean by more than one standard error of the difference.

    Args:
        data: All events.
        ends: The leading events of each user that are trained on; int64 `[U]`.
        trial: The validation targets.
        cosines: What `neighbors_of` returned; its width is that of the table.
        seed: Seed of the draw of users, where the events are more than the table learns from.
    """
    facts, neighbors, scores, _ = _best_table(data, ends, trial, cosines, seed)
    if not len(trial):
        return LinearPart(LinearSpec(), neighbors, scores, facts)
    weights = ItemWeights.of(neighbors, scores)
    base = trial.values(LinearSpec(), weights, (1.0,))[0]
    spec, values = trial.best_weight(weights, DECAYS)
    if not _is_gain(values, base):
        spec, values = LinearSpec(), base
    if trial.repeats:
        spec, values = trial.with_own_items(weights, spec, values)
    return LinearPart(spec, neighbors, scores, facts | {"without": float(base.mean()), "with": float(values.mean())})


class _FittedTable(NamedTuple):
    """A table to choose: what `LinearPart` says of it, and its mean NDCG@10 on validation."""

    facts: dict[str, Any]
    neighbors: _I32
    scores: _F32
    value: float


def _best_table(
    data: Interactions, ends: _I64, trial: LinearTrial, cosines: tuple[_I32, _F32], seed: int
) -> _FittedTable:
    """Returns the table that ranks best: of the forms of EASE that the catalogue allows, or the cosines."""
    form = ease_form(data, ends, seed)
    if isinstance(form, str):
        return _FittedTable({"table": "cosine", "form": "cosines", "why": form}, *cosines, 0.0)
    keep = cosines[0].shape[1]
    if not len(trial):
        # Nothing tells how much it should count; the table still serves users without a vector.
        facts = {"lambda": UNVALIDATED_LAMBDA, "why": f"{form.why}; no validation event chooses lambda"}
        return _FittedTable(
            {"table": "ease", "form": form.name, **facts}, *form.solve(UNVALIDATED_LAMBDA).table(keep), 0.0
        )  # fmt: skip
    tables = [_fitted(form, trial, keep)]
    if form.name == "local":
        tables.append(_FittedTable({"table": "cosine", "form": "cosines"}, *cosines, _value(trial, *cosines)))
    elif not isinstance(local := local_form(data, ends, seed), str):
        tables.append(_fitted(local, trial, keep))
    best = max(tables, key=lambda table: table.value)  # of equal ones the first
    compared = "; ".join(f"{table.facts['form']} {table.value:.4f}" for table in tables)
    reason = f"{form.why}; the highest NDCG@10 on validation: {compared}"
    return best._replace(facts={**best.facts, "why": reason})


def _fitted(form: EaseForm, trial: LinearTrial, keep: int) -> _FittedTable:
    def attempt(solution: EaseSolution) -> tuple[tuple[_I32, _F32], float]:
        table = solution.table(keep)
        return table, _value(trial, *table)

    table, search = search_ridge(form, attempt)
    if search.warning:
        print(f"linear part ({form.name}): {search.warning}", file=sys.stderr)
    return _FittedTable({"table": "ease", "form": form.name, **search.as_facts()}, *table, search.values[search.ridge])


def _value(trial: LinearTrial, neighbors: _I32, scores: _F32) -> float:
    return float(trial.best_weight(ItemWeights.of(neighbors, scores), _FIRST_DECAYS)[1].mean())


def _is_gain(values: _F64, before: _F64) -> bool:
    # The best of many looks good by chance, so a gain within one standard error is none.
    gain = values - before
    return bool(gain.mean() > gain.std() / max(1.0, np.sqrt(gain.size)))


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
        in_parts(self._truth.size, lambda part: _rank(part, arrays, table, spec, factors, ranks))
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
        rows, added = of_line.listed()
        scores[line, rows] += added
    return scores


def chosen_before(data: Interactions, targets: Targets) -> tuple[_I32, _I64]:
    """Returns the rows that users chose before targets, as serving reads them: of the newest `RING` events.

    Returns:
        Rows, oldest first, int32 `[m]`, and the start of each target's, int64 `[n + 1]`.
    """
    is_choice = choice_types(data)
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
        rows, sums, taken = sum_weights(trial.chosen[trial.starts[line] : trial.starts[line + 1]], table, spec)
        # By slot, like the sums; an item without a sum marks a free slot, which is never looked at.
        left_out = np.zeros(rows.size, np.bool_)
        for at in range(trial.seen_starts[line], trial.seen_starts[line + 1]):
            left_out[slot_of(rows, trial.seen[at])] = True
        truth = slot_of(rows, trial.truth[line])
        target_sum, left_out[truth] = sums[truth], True
        target = _product(trial.users[line], trial.vectors[trial.truth[line]])
        products = np.empty(taken.size, np.float32)
        for at in range(taken.size):
            products[at] = _product(trial.users[line], trial.vectors[rows[taken[at]]])
        for number in range(factors.size):
            least = target + factors[number] * target_sum
            before = trial.proposed.shape[1] - np.searchsorted(trial.proposed[line], least)
            for at in range(taken.size):
                if left_out[taken[at]]:
                    continue
                # Counted with the others by its relevance alone, so taken out there.
                if products[at] >= least and products[at] >= trial.proposed[line, 0]:
                    before -= 1
                if products[at] + factors[number] * sums[taken[at]] >= least:
                    before += 1
            ranks[line, number] = before


@kernel(nogil=True)
def _product(left: _F32, right: _F32) -> np.float32:
    total = np.float32(0)
    for at in range(left.size):
        total += left[at] * right[at]
    return total
