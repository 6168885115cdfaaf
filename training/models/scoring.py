"""Ranks all items for users at a moment: the users' vectors, the items they have seen, the ranks of the targets."""

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
RANK_SCORES = 1 << 25
"""Scores of targets that are ranked at once at most: past 131,072 items they are fewer than `RANK_ROWS` users."""


def gather(table: Tensor, batch: Batch) -> Tensor:
    """Returns the item vectors of a batch, zeros at padding; float `[B, L, D]`."""
    return functional.embedding(batch.rows, table) * (batch.types > 0).unsqueeze(2)


@torch.inference_mode()
def user_vectors(
    encoder: UserEncoder, table: Tensor, data: Interactions, targets: Targets, max_length: int
) -> npt.NDArray[np.float32]:
    """Encodes each user as they were just before each target; float32 `[n, D]`.

    Targets of one user within their first `max_length` events share one pass: a causal encoder computes every prefix
    at once.
    """
    # Past the first `max_length` events each target has its own window, whose positions start at its own oldest event.
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
        numbers = at[group]
        starts = data.offsets[targets.users[numbers]]
        batch = to_batch(data, starts, starts + targets.positions[numbers], max_length, table.device)
        out[numbers] = encoder.last(gather(table, batch), batch.types, batch.lengths).float().cpu().numpy()


def _encode_shared(
    encoder: UserEncoder,
    table: Tensor,
    data: Interactions,
    targets: Targets,
    at: npt.NDArray[np.int64],
    max_length: int,
    out: npt.NDArray[np.float32],
) -> None:
    users, inverse = np.unique(targets.users[at], return_inverse=True)
    longest = np.zeros(users.size, np.int64)
    np.maximum.at(longest, inverse, targets.positions[at])
    by_user = np.split(at[np.argsort(inverse, kind="stable")], np.cumsum(np.bincount(inverse))[:-1])
    for group in in_batches(longest, ENCODE_TOKENS):
        starts = data.offsets[users[group]]
        batch = to_batch(data, starts, starts + longest[group], max_length, table.device)
        hidden = encoder(gather(table, batch), batch.types, batch.lengths).float().cpu().numpy()
        for line, user in enumerate(group):
            numbers = by_user[user]
            out[numbers] = hidden[line, targets.positions[numbers] - 1]


def seen_before(data: Interactions, targets: Targets) -> list[npt.NDArray[np.int32]]:
    """Returns the items that each user had before each target, by the events that make items seen."""
    starts = data.offsets[targets.users]
    lists = []
    for start, position in zip(starts.tolist(), targets.positions.tolist(), strict=True):
        rows = data.rows[start : start + position]
        lists.append(rows[data.seen[start : start + position]])
    return lists


def had_before(data: Interactions, targets: Targets) -> npt.NDArray[np.bool_]:
    """Returns True where a target's item was seen by its user before; bool `[n]`."""
    rows = targets.rows(data)
    flags = (row in seen_rows for row, seen_rows in zip(rows, seen_before(data, targets), strict=True))
    return np.fromiter(flags, np.bool_, len(targets))


def mask_seen(scores: npt.NDArray[np.floating], seen_items: list[npt.NDArray[np.int32]]) -> None:
    """Sets the scores of each line's seen items to minus infinity, in place; scores `[n, N]`."""
    lines = np.repeat(np.arange(len(seen_items)), [rows.size for rows in seen_items])
    scores[lines, np.concatenate(seen_items) if seen_items else np.empty(0, np.int32)] = -np.inf


def ranks_of(scores: npt.NDArray[np.floating], rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Counts the items before each line's target; an item with the same score counts as before it.

    Ties against the target keep a model that gives all items one score from looking perfect. A target that is itself
    masked, or whose score is not a number, stands behind all items.
    """
    # The target compares equal to itself, so one is taken off.
    target = scores[np.arange(rows.size), rows]
    before = np.sum(scores >= target[:, None], axis=1, dtype=np.int64) - 1
    return np.where(np.isfinite(target), before, scores.shape[1])


def rank_slices(count: int, items: int) -> Iterator[slice]:
    """Yields slices over `count` targets whose scores for all items fit into memory."""
    return slices(count, max(1, min(RANK_ROWS, RANK_SCORES // max(1, items))))


def slices(count: int, size: int) -> Iterator[slice]:
    """Yields slices over `count` targets, `size` at a time."""
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))
