"""Ranking all items for people at a moment: their vectors, what they have seen, and where the target lands."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from features.assemble import History, are_choices, counts_and_kinds, type_index
from features.catalog_columns import CatalogColumns
from features.decayed_counts import DecayedCounts, empty, fold
from features.histories import history_keys
from features.keys import event_type_keys
from features.profile import RING
from training.data.interactions import Batch, Interactions, in_batches, to_batch
from training.data.split import Targets
from training.models.encoders import UserEncoder

ENCODE_TOKENS = 16384
RANK_ROWS = 256


def gather(table: Tensor, batch: Batch) -> Tensor:
    """The item vectors of a batch, zeros at padding; float `[B, L, D]`."""
    return functional.embedding(batch.rows, table) * (batch.types > 0).unsqueeze(2)


@torch.inference_mode()
def user_vectors(
    encoder: UserEncoder, table: Tensor, data: Interactions, targets: Targets, max_length: int
) -> npt.NDArray[np.float32]:
    """What the encoder makes of each person as they were just before each target; float32 `[n, D]`.

    Targets of one person within their first `max_length` events share one pass: a causal encoder answers for every
    prefix at once.
    """
    out = np.empty((len(targets), table.shape[1]), np.float32)
    short = (targets.positions > 0) & (targets.positions <= max_length)
    _encode_last(encoder, table, data, targets, np.flatnonzero(~short), max_length, out)
    _encode_shared(encoder, table, data, targets, np.flatnonzero(short), max_length, out)
    return out


def _encode_last(
    encoder: UserEncoder,
    table: Tensor,
    data: Interactions,
    targets: Targets,
    at: npt.NDArray[np.int64],
    max_length: int,
    out: npt.NDArray[np.float32],
) -> None:
    lengths = np.minimum(targets.positions[at], max_length)
    for group in in_batches(lengths, ENCODE_TOKENS):
        some = at[group]
        starts = data.offsets[targets.people[some]]
        batch = to_batch(data, starts, starts + targets.positions[some], max_length, table.device)
        out[some] = encoder.last(gather(table, batch), batch.types, batch.lengths).float().cpu().numpy()


def _encode_shared(
    encoder: UserEncoder,
    table: Tensor,
    data: Interactions,
    targets: Targets,
    at: npt.NDArray[np.int64],
    max_length: int,
    out: npt.NDArray[np.float32],
) -> None:
    people, inverse = np.unique(targets.people[at], return_inverse=True)
    longest = np.zeros(people.size, np.int64)
    np.maximum.at(longest, inverse, targets.positions[at])
    by_person = np.split(at[np.argsort(inverse, kind="stable")], np.cumsum(np.bincount(inverse))[:-1])
    for group in in_batches(longest, ENCODE_TOKENS):
        starts = data.offsets[people[group]]
        batch = to_batch(data, starts, starts + longest[group], max_length, table.device)
        hidden = encoder(gather(table, batch), batch.types, batch.lengths).float().cpu().numpy()
        for line, person in enumerate(group):
            some = by_person[person]
            out[some] = hidden[line, targets.positions[some] - 1]


def seen_before(data: Interactions, targets: Targets) -> list[npt.NDArray[np.int32]]:
    """The items that each person had before each target, by the events that make items seen."""
    starts = data.offsets[targets.people]
    lists = []
    for start, position in zip(starts.tolist(), targets.positions.tolist(), strict=True):
        rows = data.rows[start : start + position]
        lists.append(rows[data.seen[start : start + position]])
    return lists


def had_before(data: Interactions, targets: Targets) -> npt.NDArray[np.bool_]:
    """Whether each target's item was seen by its user before; bool `[n]`."""
    rows = targets.rows(data)
    had = (row in seen for row, seen in zip(rows, seen_before(data, targets), strict=True))
    return np.fromiter(had, np.bool_, len(targets))


def mask_seen(scores: npt.NDArray[np.floating], seen: list[npt.NDArray[np.int32]]) -> None:
    """Sinks each line's seen items to minus infinity, in place; scores `[n, N]`."""
    lines = np.repeat(np.arange(len(seen)), [rows.size for rows in seen])
    scores[lines, np.concatenate(seen) if seen else np.empty(0, np.int32)] = -np.inf


def ranks_of(scores: npt.NDArray[np.floating], rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """How many items stand before each line's target; an item with the same score counts as before it.

    A target that is itself masked, or whose score is not a number, stands behind everything.
    """
    target = scores[np.arange(rows.size), rows]
    before = np.sum(scores >= target[:, None], axis=1, dtype=np.int64) - 1
    return np.where(np.isfinite(target), before, scores.shape[1])


def lines(count: int, size: int = RANK_ROWS) -> Iterator[slice]:
    """Slices over `count` targets, `size` at a time."""
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


class UserHistories:
    """People's pasts as serving reads them from profiles.

    Whoever is asked for again, later in their history, is folded on from there: in order of time every event of a
    person is folded once.
    """

    def __init__(self, data: Interactions, columns: CatalogColumns) -> None:
        """Takes the events, all about items, and the catalogue's columns."""
        self._data, self._columns = data, columns
        self._keys, self._index = event_type_keys(data.event_types), type_index(data.event_types)
        self._known: dict[int, tuple[int, DecayedCounts]] = {}

    def before(self, person: int, position: int) -> History:
        """A person's past just before their event number `position`."""
        start, end = int(self._data.offsets[person]), int(self._data.offsets[person]) + position
        part = slice(max(start, end - RING), end)
        categories, creators = self._history_keys(part)
        memory, kinds = counts_and_kinds(self._memory(person, start, end), self._index)
        return History(
            rows=self._data.rows[part],
            types=self._data.types[part].astype(np.int32),
            categories=categories,
            creators=creators,
            timestamps=self._data.timestamps[part],
            values=self._data.values[part],
            chosen=are_choices(self._keys[self._data.types[part] - 1]),
            decayed_counts=memory,
            kinds=kinds,
        )

    def whole(self, person: int) -> DecayedCounts:
        """What all events of a person add up to; of everybody in turn that is too much to keep."""
        return self._folded(empty(), int(self._data.offsets[person]), int(self._data.offsets[person + 1]))

    def _memory(self, person: int, start: int, end: int) -> DecayedCounts:
        """What the events from `start` to `end`, all of one person, add up to."""
        folded, memory = self._known.get(person, (start, empty()))
        if folded > end:
            folded, memory = start, empty()
        memory = self._folded(memory, folded, end)
        self._known[person] = end, memory
        return memory

    def _folded(self, memory: DecayedCounts, start: int, end: int) -> DecayedCounts:
        """A memory after the events from `start` to `end`."""
        types, times = self._keys[self._data.types[start:end] - 1], self._data.timestamps[start:end]
        return fold(memory, np.ones(types.size, np.uint64), *self._history_keys(slice(start, end)), types, times)

    def _history_keys(self, part: slice) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Returns the category and the creator of some events; two uint64 [n]."""
        return history_keys(self._data.rows[part], self._columns, self._data.logged(part))
