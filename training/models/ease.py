"""EASE (arXiv:1905.03375) at any size: the form that a catalogue allows, and lambda by validation.

EASE regresses each item on all others in closed form, by the inverse of a matrix of items by items. Where fewer users
than items chose anything the same weights follow from a matrix of users by users, and where both are many from a
regression of each item on its nearest ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.jit import kernel
from training.data.interactions import Interactions
from training.models.item_sets import ItemSets, choice_types, in_parts, item_sets, write_largest, write_largest_plain
from training.models.local_ease import FEWEST_LOCAL_ITEMS, LocalEase, local_items, nearest_items
from training.models.neighbors import NEIGHBOR_EVENTS, NEIGHBOR_EVENTS_PER_ITEM

EASE_ITEMS = 16_384
"""Largest matrix that is inverted, items by items or users by users: past this it takes gigabytes and minutes."""

EXACT_ITEMS = 6_000
"""Up to so many items, or users, the inverse is taken in float64."""

USERS_WORK = 2 * 10**10
"""Most items times items and choices that the form by users looks through: measured at 7 ns each, some minutes."""

LAMBDAS = (10.0, 50.0, 200.0, 1000.0)
FEW_LAMBDAS = (50.0, 500.0)
"""Fewer lambdas, for tables that take minutes."""
MANY_LOCAL_ITEMS = 200_000
"""Past so many items the local form takes minutes."""
UNVALIDATED_LAMBDA = 500.0
"""Lambda without validation events."""
LEAST_LAMBDA = 1.0
_STEP = 4.0
"""Factor between two lambdas beyond those that are tried first."""

_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_F32 = npt.NDArray[np.float32]
_F64 = npt.NDArray[np.float64]
_T = TypeVar("_T")


class EaseSolution(Protocol):
    """The item-to-item weights for one lambda."""

    def table(self, keep: int) -> tuple[_I32, _F32]:
        """Returns the largest weights by the item of the history.

        Returns:
            Rows int32 `[N, keep]`, -1 padded, and weights float32 `[N, keep]`, largest first without regard to sign.
        """
        ...

    def scores(self, histories: Sequence[_I32]) -> _F32:
        """Returns the sums over the items of each history, each item once; float32 `[n, N]`."""
        ...


@dataclass(frozen=True)
class EaseForm:
    """A way to the weights of EASE.

    Attributes:
        name: `exact`, `by users` or `local`.
        why: The reason for it, for the result.
        ridges: The lambdas that are tried first, ascending.
        limits: The least and the largest lambda that make sense.
        solve: Solves for a lambda.
    """

    name: str
    why: str
    ridges: tuple[float, ...]
    limits: tuple[float, float]
    solve: Callable[[float], EaseSolution]


def ease_form(data: Interactions, ends: _I64, seed: int = 0) -> EaseForm | str:
    """Returns the form of EASE for the choices among users' leading events, or the reason why there is none.

    Args:
        data: All events.
        ends: The leading events of each user that are looked at; int64 `[U]`.
        seed: Seed of the draw of users, where the events are more than the local form learns from.
    """
    users = _choosers(data, ends)
    if min(data.items, users) > EASE_ITEMS:
        return local_form(data, ends, seed)
    sets = item_sets(data, ends)
    if users < data.items and data.items * (data.items + sets.rows.size) <= USERS_WORK:
        reason = f"{users:,} users chose items, fewer than the {data.items:,} items: the matrix of users is inverted"
        return _form("by users", reason, users, sets.most_users, lambda ridge: EaseByUsers(sets, ridge))
    if data.items <= EASE_ITEMS:
        gram = gram_of(sets)
        reason = f"{data.items:,} items: their matrix can be inverted"
        return _form("exact", reason, data.items, sets.most_users, lambda ridge: ExactEase(gram, ridge))
    return local_form(data, ends, seed)


def local_form(data: Interactions, ends: _I64, seed: int = 0) -> EaseForm | str:
    """Returns the local form whatever the size, or the reason why there is none; see `ease_form`."""
    if local_items(data.items) < min(FEWEST_LOCAL_ITEMS, data.items - 1):
        return (
            f"{data.items:,} items: memory allows {local_items(data.items)} nearest items for each to be regressed on, "
            f"and at least {FEWEST_LOCAL_ITEMS} are needed"
        )
    sets = item_sets(data, ends, max(NEIGHBOR_EVENTS, NEIGHBOR_EVENTS_PER_ITEM * data.items), seed)
    near = nearest_items(sets)
    reason = f"{data.items:,} items: each is regressed on the {near.shape[1]} items nearest by cosine"
    few = LAMBDAS if data.items <= MANY_LOCAL_ITEMS else FEW_LAMBDAS
    return EaseForm("local", reason, few, _limits(sets.most_users), lambda ridge: LocalEase(sets, near, ridge))


def _form(name: str, reason: str, size: int, most: int, solve: Callable[[float], EaseSolution]) -> EaseForm:
    return EaseForm(name, reason, LAMBDAS if size <= EXACT_ITEMS else FEW_LAMBDAS, _limits(most), solve)


def _limits(most: int) -> tuple[float, float]:
    # Far above the counts of users the weights are those counts over lambda, so a larger one changes no order.
    return LEAST_LAMBDA, max(LAMBDAS[-1], 10.0 * most)


def _choosers(data: Interactions, ends: _I64) -> int:
    is_choice, count = choice_types(data), 0
    for block in data.blocks():
        chosen = is_choice[data.types[block.events]] & (block.position < ends[block.owner])
        count += int(np.unique(block.owner[chosen]).size)
    return count


class RidgeSearch(NamedTuple):
    """Lambdas that were tried.

    Attributes:
        ridge: The best one.
        values: Mean NDCG@10 on validation by lambda.
        warning: A sentence where the best one is the last that makes sense, else None.
    """

    ridge: float
    values: dict[float, float]
    warning: str | None

    def as_facts(self) -> dict[str, Any]:
        """Returns the facts for a result."""
        values = {f"{ridge:g}": self.values[ridge] for ridge in sorted(self.values)}
        return {"lambda": self.ridge, "lambdas": values, **({"warning": self.warning} if self.warning else {})}


def search_ridge(form: EaseForm, attempt: Callable[[EaseSolution], tuple[_T, float]]) -> tuple[_T, RidgeSearch]:
    """Tries the lambdas of a form, and further ones as long as the best is the least or the largest of them.

    Args:
        form: The form.
        attempt: Returns what to keep of a solution, and its mean NDCG@10 on validation targets.

    Returns:
        The first of the best solutions, by what was kept of it.
    """
    values: dict[float, float] = {}
    waiting = list(form.ridges)
    best, best_ridge = None, form.ridges[0]
    while waiting:
        ridge = waiting.pop(0)
        kept, values[ridge] = attempt(form.solve(ridge))
        if best is None or values[ridge] > values[best_ridge]:
            best, best_ridge = (kept,), ridge
        if not waiting:
            waiting = _further(best_ridge, values, form.limits)
    assert best is not None
    return best[0], RidgeSearch(best_ridge, values, _warning(best_ridge, values, form.limits))


def _further(best: float, values: dict[float, float], limits: tuple[float, float]) -> list[float]:
    """Returns the next lambda to try, none where the best has tried ones on both sides or is at a limit."""
    # Where all are equal, as among items that no validation user knows, a walk to the limit would find nothing.
    if _are_equal(values):
        return []
    if best == min(values) and best > limits[0]:
        return [max(limits[0], best / _STEP)]
    if best == max(values) and best < limits[1]:
        return [min(limits[1], best * _STEP)]
    return []


def _are_equal(values: dict[float, float]) -> bool:
    return len(values) > 1 and len(set(values.values())) == 1


def _warning(best: float, values: dict[float, float], limits: tuple[float, float]) -> str | None:
    if _are_equal(values):
        return f"every lambda tried gives the same NDCG@10 on validation, so it tells nothing about {best:g}"
    if limits[0] < best < limits[1] or min(values) < best < max(values):
        return None
    side = "least" if best == min(values) else "largest"
    return f"the best lambda is the {side} of those tried, {best:g}: EASE says little about these data"


class ExactEase:
    """EASE by the inverse of the matrix of items."""

    def __init__(self, gram: Tensor, ridge: float) -> None:
        """Inverts the regularised Gram matrix, what `gram_of` returned."""
        self._inverse = _inverse(gram, ridge)

    @cached_property
    def weights(self) -> Tensor:
        """All weights; float32 `[N, N]`."""
        # The closed form: each item's regression on all others, with its own weight held at zero.
        weights = (self._inverse / -self._inverse.diagonal()).float()
        weights.fill_diagonal_(0)
        return weights

    def table(self, keep: int) -> tuple[_I32, _F32]:
        """Returns the largest weights, see `EaseSolution`."""
        inverse, items = self._inverse, self._inverse.shape[0]
        diagonal = inverse.diagonal().clone()
        keep = min(keep, max(1, items - 1))
        rows, scores = np.full((items, keep), -1, np.int32), np.zeros((items, keep), np.float32)
        for start in range(0, items, 1024):
            part = slice(start, min(start + 1024, items))
            weights = (inverse[part] / -diagonal).float()
            weights[torch.arange(part.stop - start), torch.arange(start, part.stop)] = 0
            largest = torch.topk(weights.abs(), keep, dim=1).indices
            kept = weights.gather(1, largest).numpy()
            rows[part], scores[part] = np.where(kept != 0, largest.numpy(), -1), kept
        return rows, scores

    def scores(self, histories: Sequence[_I32]) -> _F32:
        """Returns the histories times the weights, see `EaseSolution`."""
        chosen = torch.zeros(len(histories), self.weights.shape[0])
        for line, history in enumerate(histories):
            chosen[line, torch.from_numpy(history.astype(np.int64))] = 1
        scores: _F32 = (chosen @ self.weights).numpy()
        return scores


class EaseByUsers:
    """EASE by the inverse of a matrix of users: the same weights.

    With the matrix X of users and items, Woodbury's identity gives the inverse P of `X'X + lambda I` as
    `(I - X' (X X' + lambda I)^-1 X) / lambda`. No matrix of items by items is ever held: the table takes, for each of
    torch's threads, two lines of users and of items beyond its result.
    """

    def __init__(self, sets: ItemSets, ridge: float) -> None:
        """Inverts the matrix of users."""
        self._sets, self._ridge = sets, ridge
        by_users = ItemSets(sets.users, sets.item_starts, sets.rows, sets.user_starts)
        self._inverse = _inverse(gram_of(by_users), ridge)
        self._diagonal = np.empty(sets.item_count, np.float64)
        inverse = self._inverse.numpy()
        in_parts(sets.item_count, lambda part: inverse_diagonal(sets, inverse, ridge, part, self._diagonal))

    def table(self, keep: int) -> tuple[_I32, _F32]:
        """Returns the largest weights, see `EaseSolution`."""
        sets, inverse, ridge, diagonal = self._sets, self._inverse.numpy(), self._ridge, self._diagonal
        keep = min(keep, max(1, sets.item_count - 1))
        rows, scores = np.full((sets.item_count, keep), -1, np.int32), np.zeros((sets.item_count, keep), np.float32)
        in_parts(sets.item_count, lambda part: weigh_by_users(sets, inverse, ridge, diagonal, part, rows, scores))
        return rows, scores

    def scores(self, histories: Sequence[_I32]) -> _F32:
        """Returns the histories times the weights, see `EaseSolution`; by way of users, so without a table."""
        sets = self._sets
        shared = np.zeros((len(histories), sets.user_count), self._inverse.numpy().dtype)
        for line, history in enumerate(histories):
            for item in np.unique(history):
                shared[line, sets.users[sets.item_starts[item] : sets.item_starts[item + 1]]] += 1
        spread = (torch.from_numpy(shared) @ self._inverse).numpy()
        scale = 1.0 / (self._ridge * self._diagonal)
        out = np.empty((len(histories), sets.item_count), np.float32)
        for line, history in enumerate(histories):
            add_by_users(sets, spread[line], scale, out[line])
            # An item's own weight is 0, so that what it would say of itself is taken off.
            chosen = np.unique(history)
            out[line, chosen] += (1.0 - scale[chosen]).astype(np.float32)
        return out


@kernel(nogil=True)
def inverse_diagonal(sets: ItemSets, inverse: Any, ridge: float, part: tuple[int, int], out: Any) -> None:
    """Writes the diagonal of the inverse of the matrix of items, by the inverse `[U, U]` of that of users."""
    for item in range(part[0], part[1]):
        total = 0.0
        users = sets.users[sets.item_starts[item] : sets.item_starts[item + 1]]
        for left in users:
            for right in users:
                total += inverse[left, right]
        out[item] = (1.0 - total) / ridge


@kernel(nogil=True)
def add_by_users(sets: ItemSets, of_users: Any, scale: Any, out: Any) -> None:
    """Writes for each item the sum over its users of `of_users` `[U]`, times `scale` `[N]`, to `out` `[N]`."""
    for item in range(out.size):
        total = 0.0
        for at in range(sets.item_starts[item], sets.item_starts[item + 1]):
            total += of_users[sets.users[at]]
        out[item] = total * scale[item]


@kernel(nogil=True)
def weigh_by_users(
    sets: ItemSets, inverse: Any, ridge: float, diagonal: Any, part: tuple[int, int], rows: Any, scores: Any
) -> None:
    """Writes the largest weights of the items from `part[0]` to `part[1]` into their lines of the table.

    Args:
        sets: The choices.
        inverse: Inverse of the regularised matrix of users; float `[U, U]`.
        ridge: The regularisation, lambda.
        diagonal: What `inverse_diagonal` wrote; float64 `[N]`.
        part: First item, and the one after the last.
        rows: int32 `[N, K]`, filled with -1.
        scores: float32 `[N, K]`, filled with 0.
    """
    scale = 1.0 / (ridge * diagonal)
    weights = np.empty(scale.size, np.float32)
    for item in range(part[0], part[1]):
        of_users = np.zeros(inverse.shape[0], inverse.dtype)
        for at in range(sets.item_starts[item], sets.item_starts[item + 1]):
            of_users += inverse[sets.users[at]]
        add_by_users(sets, of_users, scale, weights)
        weights[item] = 0.0
        write_largest(weights, rows[item], scores[item])


def weigh_by_users_plain(
    sets: ItemSets, inverse: _F64, ridge: float, diagonal: _F64, part: tuple[int, int], rows: _I32, scores: _F32
) -> None:
    """Plain twin of `weigh_by_users`, which takes the matrix of all users and items."""
    chosen = sets.dense().astype(np.float64)
    for item in range(*part):
        weights = chosen[:, item] @ inverse @ chosen / (ridge * diagonal)
        weights[item] = 0
        write_largest_plain(weights, rows[item], scores[item])


def inverse_diagonal_plain(sets: ItemSets, inverse: _F64, ridge: float) -> _F64:
    """Plain twin of `inverse_diagonal`; float64 `[N]`."""
    chosen = sets.dense().astype(np.float64)
    diagonal: _F64 = (1 - np.einsum("un,uv,vn->n", chosen, inverse, chosen)) / ridge
    return diagonal


def gram_of(sets: ItemSets) -> Tensor:
    """Counts the users who chose both of two items; float32 `[N, N]`."""
    gram = np.zeros((sets.item_count, sets.item_count), np.float32)
    in_parts(sets.item_count, lambda part: _count_pairs(sets, part, gram))
    return torch.from_numpy(gram)


@kernel(nogil=True)
def _count_pairs(sets: ItemSets, part: tuple[int, int], gram: Any) -> None:
    for item in range(part[0], part[1]):
        for at in range(sets.item_starts[item], sets.item_starts[item + 1]):
            for event in range(sets.user_starts[sets.users[at]], sets.user_starts[sets.users[at] + 1]):
                gram[item, sets.rows[event]] += 1.0


def _inverse(gram: Tensor, ridge: float) -> Tensor:
    """Returns the inverse of a regularised Gram matrix; float64 `[N, N]`, float32 past `EXACT_ITEMS`."""
    matrix = gram.double() if gram.shape[0] <= EXACT_ITEMS else gram.clone()
    matrix.diagonal().add_(ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
