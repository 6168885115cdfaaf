"""Ranking all items for people at a moment: their vectors, what they have seen, and where the target lands."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from training.data.batches import Batch, in_batches, to_batch
from training.data.interactions import Interactions
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
        starts = data.offsets[targets.users[some]]
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
    people, inverse = np.unique(targets.users[at], return_inverse=True)
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
    starts = data.offsets[targets.users]
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
    slices = np.repeat(np.arange(len(seen)), [rows.size for rows in seen])
    scores[slices, np.concatenate(seen) if seen else np.empty(0, np.int32)] = -np.inf


def ranks_of(scores: npt.NDArray[np.floating], rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """How many items stand before each line's target; an item with the same score counts as before it.

    A target that is itself masked, or whose score is not a number, stands behind everything.
    """
    target = scores[np.arange(rows.size), rows]
    before = np.sum(scores >= target[:, None], axis=1, dtype=np.int64) - 1
    return np.where(np.isfinite(target), before, scores.shape[1])


def slices(count: int, size: int = RANK_ROWS) -> Iterator[slice]:
    """Slices over `count` targets, `size` at a time."""
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))
