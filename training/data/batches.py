"""From the events of users to padded batches, and a training's epochs of these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch

from features.assemble import encoder_batch
from features.jit import kernel
from training.config import TrainConfig
from training.data.interactions import Interactions


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right, on one device.

    Attributes:
        rows: Items; int64 `[B, L]`, 0 at padding.
        types: Event types; int64 `[B, L]`, 0 at padding.
        lengths: int64 `[B]`.
        tokens: Sum of the lengths; to read it from a device would wait for the device.
        targets: The item that follows each event, -1 where none counts; int64 `[B, L]`, on the CPU in any case; None
            outside training.
    """

    rows: torch.Tensor
    types: torch.Tensor
    lengths: torch.Tensor
    tokens: int
    targets: torch.Tensor | None = None


def to_batch(
    data: Interactions,
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    max_length: int,
    device: torch.device,
    targets: npt.NDArray[np.int64] | None = None,
) -> Batch:
    """Assembles the events `starts[i]:ends[i]`, and the targets beside them, whose width is then that of the batch."""
    rows, types, lengths = encoder_batch(data.rows, data.types, starts, ends, max_length)
    if targets is not None:
        more = ((0, 0), (0, targets.shape[1] - rows.shape[1]))
        rows, types = np.pad(rows, more), np.pad(types, more)
    return Batch(
        rows=to_device(torch.from_numpy(rows), device),
        types=to_device(torch.from_numpy(types), device),
        lengths=to_device(torch.from_numpy(lengths), device),
        tokens=int(lengths.sum()),
        targets=None if targets is None else torch.from_numpy(targets),
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor of the CPU on `device`; a GPU takes it while both go on with their work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


Windows: TypeAlias = npt.NDArray[np.int64]
"""Parts of histories, each an input and its targets: the events `windows[i, 0]:windows[i, 1]`; int64 `[n, 2]`."""

PLAN_USERS = 1 << 16
"""People whose windows are mixed with one another; a smaller data set is mixed as a whole."""
ROUND_LENGTH = 8
"""Batches are as long as a multiple of this, or as the longest that the encoder reads."""
_RUN = 64  # people who stay neighbours when the blocks are drawn, so that a disk is read in pieces worth reading


class TrainingBatches:
    """Epochs of batches: each person's training events cut into windows, windows of like length together."""

    def __init__(
        self, data: Interactions, train_end: npt.NDArray[np.int64], config: TrainConfig, device: torch.device
    ) -> None:
        """Takes the leading `train_end[u]` events of each person."""
        self.data, self.config, self.device = data, config, device
        self.train_end = train_end

    def epoch(self, number: int) -> Plan:
        """The batches of an epoch; they depend on the seed and the number alone."""
        return Plan(self, number)

    def windows(self, people: npt.NDArray[np.int64], rng: np.random.Generator) -> Windows:
        """Windows of `max_length` inputs and their targets; the newest is cut at random so that borders move."""
        length = self.config.max_length
        starts = self.data.offsets[people]
        ends = starts + self.train_end[people]
        long = np.flatnonzero(ends - starts > length + 1)
        newest = rng.integers(length // 2, length + 1, long.size)
        cut = np.stack([ends[long] - newest - 1, ends[long]], 1)
        ends[long] -= newest
        counts = np.maximum(-(-(ends - starts - 1) // length), 0)
        back = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.repeat(ends, counts) - back * length
        whole = np.stack([np.maximum(np.repeat(starts, counts), ends - length - 1), ends], 1)
        windows: Windows = np.concatenate([cut, whole])
        chosen: npt.NDArray[np.bool_] = _any_inside(self.data.target, windows[:, 0] + 1, windows[:, 1])
        return windows[chosen]

    def width(self, windows: Windows) -> int:
        """The length of a batch: few different ones come up, for matrix products are compiled for each."""
        longest = int((windows[:, 1] - windows[:, 0]).max()) - 1
        return min(self.config.max_length, -(-longest // ROUND_LENGTH) * ROUND_LENGTH)

    def batch(self, windows: Windows) -> Batch:
        """Assembles one batch."""
        starts, ends = windows[:, 0], windows[:, 1]
        width = self.width(windows)
        at = starts[:, None] + 1 + np.arange(width)
        inside = at < ends[:, None]
        at[~inside] = starts[0]
        targets = np.where(inside & self.data.target[at], self.data.rows[at], -1).astype(np.int64)
        return to_batch(self.data, starts, ends - 1, self.config.max_length, self.device, targets)


class Plan(Sequence[Windows]):
    """The batches of one epoch as windows, made for some people at a time.

    People are drawn into blocks; inside a block, windows of like length make a batch and batches come in random order.
    """

    def __init__(self, batches: TrainingBatches, number: int) -> None:
        """Draws the blocks and counts their batches; the windows of a block are made when they are asked for."""
        self._batches, self._number = batches, number
        runs = -(-batches.train_end.size // _RUN)
        order = self._rng(0).permutation(runs)
        self._blocks = [order[at : at + PLAN_USERS // _RUN] for at in range(0, runs, PLAN_USERS // _RUN)]
        self._made: tuple[int, list[Windows]] = (-1, [])
        self._first = np.cumsum([0, *(len(self._block(block)) for block in range(len(self._blocks)))])

    def __len__(self) -> int:
        """The number of batches."""
        return int(self._first[-1])

    @overload
    def __getitem__(self, at: int) -> Windows: ...
    @overload
    def __getitem__(self, at: slice) -> list[Windows]: ...
    def __getitem__(self, at: int | slice) -> Windows | list[Windows]:
        """The windows of a batch."""
        if isinstance(at, slice):
            return [self[one] for one in range(*at.indices(len(self)))]
        if not 0 <= at < len(self):
            raise IndexError(at)
        block = int(np.searchsorted(self._first, at, side="right")) - 1
        return self._block(block)[at - int(self._first[block])]

    def _block(self, block: int) -> list[Windows]:
        if self._made[0] != block:
            self._made = block, self._make(block)
        return self._made[1]

    def _make(self, block: int) -> list[Windows]:
        rng = self._rng(1 + block)
        people = (self._blocks[block][:, None] * _RUN + np.arange(_RUN)).ravel()
        windows = self._batches.windows(people[people < self._batches.train_end.size], rng)
        lengths = windows[:, 1] - windows[:, 0]
        windows = windows[np.argsort(-(lengths + rng.random(lengths.size)))]
        batches, at = [], 0
        while at < len(windows):
            size = max(1, self._batches.config.batch_tokens // self._batches.width(windows[at : at + 1]))
            batches.append(windows[at : at + size])
            at += size
        return [batches[one] for one in rng.permutation(len(batches))]

    def _rng(self, part: int) -> np.random.Generator:
        return np.random.default_rng([self._batches.config.seed, self._number, part])


@kernel()
def _any_inside(flags: Any, starts: Any, ends: Any) -> npt.NDArray[np.bool_]:
    """Whether any of `flags[starts[i]:ends[i]]` is set; bool `[n]`."""
    found = np.zeros(starts.size, np.bool_)
    for part in range(starts.size):
        for at in range(starts[part], ends[part]):
            if flags[at]:
                found[part] = True
                break
    return found


def _any_inside_plain(
    flags: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """The plain twin of `_any_inside`."""
    return np.array([flags[start:end].any() for start, end in zip(starts, ends, strict=True)], bool)


def in_batches(lengths: npt.NDArray[np.int64], tokens: int, most: int = 512) -> Iterator[npt.NDArray[np.int64]]:
    """Positions of sequences in groups of like length, each of at most about `tokens` padded and `most` sequences."""
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < order.size:
        size = int(min(most, max(1, tokens // max(1, lengths[order[at]]))))
        yield order[at : at + size]
        at += size
