"""The linear part of relevance: what each event of a history adds to other items, and to its own.

A table of item-to-item weights (EASE, arXiv:1905.03375) says what an item of the history adds to its neighbours; where
items are recommended again, how often and how lately the user chose an item adds to that item itself. Training,
evaluation and serving sum with the same kernel, to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from features.jit import kernel

_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_F32 = npt.NDArray[np.float32]
_Bitmap = npt.NDArray[np.uint8]

_ODD = np.int64(0x9E3779B1)


class ItemWeights(NamedTuple):
    """Item-to-item weights of all items, end to end.

    Attributes:
        offsets: Place at which those of each row begin; int64 [N + 1].
        rows: The rows that they are for; int32 [m].
        scores: The weights, which may be negative; float32 [m].
    """

    offsets: _I64
    rows: _I32
    scores: _F32

    @classmethod
    def of(cls, rows: _I32, scores: _F32) -> ItemWeights:
        """Packs the weights of each row, -1 after the last; int32, float32 [N, K]."""
        real = rows >= 0
        offsets = np.concatenate([[0], np.cumsum(real.sum(axis=1))]).astype(np.int64)
        return cls(offsets, rows[real], scores[real])


class LinearSpec(NamedTuple):
    """The linear part of a model.

    Attributes:
        weight: Factor of the item-to-item weights of the newest item.
        decay: Factor between an item of the history and the next older one; 1 if order tells nothing.
        count_weight: Added to an item for the log1p of the number of times that the user chose it.
        recency_weight: Added to the item that the user chose last.
        recency_decay: The same factor as `decay`, for `recency_weight`.
    """

    weight: float = 0.0
    decay: float = 1.0
    count_weight: float = 0.0
    recency_weight: float = 0.0
    recency_decay: float = 1.0

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> LinearSpec:
        """Returns the linear part of a manifest or a run's result; None is of one without."""
        return cls(**{name: float(values[name]) for name in cls._fields if name in values} if values else {})

    def as_json(self) -> dict[str, float]:
        """Returns the numbers by name."""
        return self._asdict()

    @property
    def is_empty(self) -> bool:
        """True if it adds nothing to any item."""
        return not (self.weight or self.count_weight or self.recency_weight)


class LinearScores(NamedTuple):
    """The sums of one history, in a hash table; a row that is not in it has 0.

    Attributes:
        rows: The row in each slot, -1 in a free one; int32 [a power of 2].
        sums: What the history adds to the relevance of each; float32 [as many].
        taken: The slots that are not free; int32 [n].
    """

    rows: _I32
    sums: _F32
    taken: _I32

    def of(self, rows: _I32) -> _F32:
        """Returns the sums of some rows; float32 [n]."""
        sums: _F32 = sums_of(self.rows, self.sums, rows)
        return sums

    def best(self, count: int, allowed: _Bitmap, known: _I32) -> _I32:
        """Returns allowed rows with the largest sums above 0 that are none of `known`, `count` of them at most."""
        rows: _I32 = best_sums(self.rows, self.sums, self.taken, count, allowed, known)
        return rows

    def listed(self) -> tuple[_I32, _F32]:
        """Returns the rows that have a sum, each once, and their sums; int32, float32 [n]."""
        return self.rows[self.taken], self.sums[self.taken]


NO_SCORES = LinearScores(np.full(2, -1, np.int32), np.zeros(2, np.float32), np.empty(0, np.int32))


class LinearTerm:
    """The linear part of a model with its table."""

    def __init__(self, spec: LinearSpec, table: ItemWeights) -> None:
        self.spec, self.table = spec, table

    def scores(self, rows: _I32) -> LinearScores:
        """Returns what the rows that a user chose add to items, oldest first, each counted at its last place."""
        if self.spec.is_empty or not rows.size:
            return NO_SCORES
        return LinearScores(*sum_weights(np.ascontiguousarray(rows), self.table, self.spec))


NO_TERM = LinearTerm(LinearSpec(), ItemWeights(np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)))
"""The linear part of a model without one."""


@kernel(nogil=True)
def _free_slots(count: int) -> _I32:
    size = 2
    while size < 2 * count:
        size *= 2
    return np.full(size, -1, np.int32)


@kernel(nogil=True)
def slot_of(rows: _I32, row: int) -> int:
    """Returns the slot of a row in a hash table, or the free one where it belongs."""
    # The lower bits of a product with an odd number are a permutation of those of the row: a catalogue that is no
    # larger than the table has a slot for each row, and neighbouring rows lie far apart, so that runs of them, as of
    # items that are numbered by category, do not push each other along.
    last = np.int64(rows.size - 1)
    slot = (np.int64(row) * _ODD) & last
    while rows[slot] != row and rows[slot] >= 0:
        slot = (slot + 1) & last
    return slot  # type: ignore[return-value]  # numba's integer


@kernel(nogil=True)
def sum_weights(chosen: _I32, table: ItemWeights, spec: LinearSpec) -> tuple[_I32, _F32, _I32]:
    """Returns the fields of `LinearScores`.

    Args:
        chosen: Rows that the user chose, oldest first, with repeats; int32 [n].
        table: The item-to-item weights; live items, whose rows are beyond it, have none.
        spec: How they count.
    """
    items, counts = _distinct(chosen)
    has_own, has_table = spec.count_weight != 0.0 or spec.recency_weight != 0.0, spec.weight != 0.0
    pairs = items.size if has_own else 0
    for item in items:
        if has_table and item < table.offsets.size - 1:
            pairs += table.offsets[item + 1] - table.offsets[item]
    rows = _free_slots(pairs)
    # One place more than can be filled, as each pair writes to the next one.
    sums, taken = np.zeros(rows.size, np.float32), np.empty(pairs + 1, np.int32)
    count, factor, recency = np.int64(0), spec.weight, spec.recency_weight
    for place in range(items.size):
        item = items[place]
        if has_own:
            slot = slot_of(rows, item)
            taken[count] = slot
            count += np.int64(rows[slot] < 0)
            rows[slot] = item
            sums[slot] += np.float32(spec.count_weight * np.log1p(counts[place]) + recency)
        if has_table and item < table.offsets.size - 1:
            for at in range(table.offsets[item], table.offsets[item + 1]):
                # Written whether the row is new or not: a branch would be guessed wrong half of the time, and that
                # costs more than the writes.
                slot = slot_of(rows, table.rows[at])
                taken[count] = slot
                count += np.int64(rows[slot] < 0)
                rows[slot] = table.rows[at]
                sums[slot] += np.float32(factor * table.scores[at])
        factor, recency = factor * spec.decay, recency * spec.recency_decay
    return rows, sums, taken[:count]


def sum_weights_plain(chosen: _I32, table: ItemWeights, spec: LinearSpec) -> dict[int, np.float32]:
    """The plain twin of `sum_weights`; returns the sum of each row that is named."""
    sums: dict[int, np.float32] = {}
    factor, recency = spec.weight, spec.recency_weight
    for item in dict.fromkeys(chosen[::-1].tolist()):
        if spec.count_weight or spec.recency_weight:
            added = np.float32(spec.count_weight * np.log1p(int((chosen == item).sum())) + recency)
            sums[item] = np.float32(sums.get(item, np.float32(0)) + added)
        if spec.weight and item < table.offsets.size - 1:
            for at in range(table.offsets[item], table.offsets[item + 1]):
                row, added = int(table.rows[at]), np.float32(factor * float(table.scores[at]))
                sums[row] = np.float32(sums.get(row, np.float32(0)) + added)
        factor, recency = factor * spec.decay, recency * spec.recency_decay
    return sums


@kernel(nogil=True)
def _distinct(chosen: _I32) -> tuple[_I32, _I64]:
    """Returns the distinct items, the one that was chosen last first, and how often each was chosen."""
    rows = _free_slots(chosen.size)
    slots, counts, count = np.empty(chosen.size, np.int64), np.zeros(rows.size, np.int64), 0
    for at in range(chosen.size - 1, -1, -1):
        slot = slot_of(rows, chosen[at])
        if rows[slot] < 0:
            rows[slot], slots[count] = chosen[at], slot
            count += 1
        counts[slot] += 1
    return rows[slots[:count]], counts[slots[:count]]


@kernel(nogil=True)
def sums_of(rows: _I32, sums: _F32, wanted: _I32) -> _F32:
    """Returns the sums of the rows `wanted` int32 [n] by the fields of `LinearScores`, 0 for others; float32 [n]."""
    out = np.zeros(wanted.size, np.float32)
    for i in range(wanted.size):
        # A free slot has the sum 0.
        out[i] = sums[slot_of(rows, wanted[i])]
    return out


def sums_of_plain(rows: _I32, sums: _F32, wanted: _I32) -> _F32:
    """The plain twin of `sums_of`."""
    known = dict(zip(rows.tolist(), sums.tolist(), strict=True))
    return np.array([known.get(row, 0.0) for row in wanted.tolist()], np.float32)


@kernel(nogil=True)
def best_sums(rows: _I32, sums: _F32, taken: _I32, count: int, allowed: _Bitmap, known: _I32) -> _I32:
    """Returns at most `count` allowed rows with the largest sums above 0 that are none of `known`; int32 [n].

    In the order of `taken`; of rows with the least of these sums the first ones.
    """
    left_out = np.zeros(rows.size, np.bool_)
    for i in range(known.size):
        # A row that is not in the table marks a free slot, which is never looked at.
        left_out[slot_of(rows, known[i])] = True
    slots, found = np.empty(taken.size, np.int32), 0
    for slot in taken:
        if sums[slot] > 0.0 and not left_out[slot]:
            byte = rows[slot] >> 3
            if byte < allowed.size and (allowed[byte] >> np.uint8(rows[slot] & 7)) & 1:
                slots[found] = slot
                found += 1
    slots = slots[:found]
    if found <= count:
        return rows[slots]
    # The least sum that goes in, by a selection: the rows need no order among themselves.
    values = sums[slots]
    least = np.partition(values, found - count)[found - count]
    room = count - np.sum(values > least)
    out, filled = np.empty(count, np.int32), 0
    for at in range(found):
        if values[at] > least or (values[at] == least and room > 0):
            room -= 0 if values[at] > least else 1
            out[filled] = rows[slots[at]]
            filled += 1
    return out


def best_sums_plain(rows: _I32, sums: _F32, taken: _I32, count: int, allowed: _Bitmap, known: _I32) -> _I32:
    """The plain twin of `best_sums`."""
    bits = np.append(np.unpackbits(allowed, bitorder="little"), np.uint8(0))
    named, values = rows[taken], sums[taken]
    real = (values > 0) & ~np.isin(named, known) & (bits[np.minimum(named, bits.size - 1)] == 1)
    places = np.flatnonzero(real)
    return named[np.sort(places[np.argsort(-values[places], kind="stable")[:count]])]
