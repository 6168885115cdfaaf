"""Assembles padded batches of users' events, and the epochs of a training."""

from __future__ import annotations

import dataclasses
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
        tokens: Sum of the lengths; reading it from a device would wait for the device.
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
    """Assembles the events `starts[i]:ends[i]` and their targets, whose width is then that of the batch."""
    rows, types, lengths = encoder_batch(data.rows, data.types, starts, ends, max_length)
    if targets is not None:
        padding = ((0, 0), (0, targets.shape[1] - rows.shape[1]))
        rows, types = np.pad(rows, padding), np.pad(types, padding)
    return Batch(
        rows=to_device(torch.from_numpy(rows), device),
        types=to_device(torch.from_numpy(types), device),
        lengths=to_device(torch.from_numpy(lengths), device),
        tokens=int(lengths.sum()),
        targets=None if targets is None else torch.from_numpy(targets),
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor of the CPU on `device`; a GPU copies it without stopping either side's work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


Windows: TypeAlias = npt.NDArray[np.int64]
"""Stretches of histories: the events `windows[i, 0]:windows[i, 1]` hold an input and its targets; int64 `[n, 2]`."""

PLAN_USERS = 1 << 16
"""Users whose windows are shuffled together; a smaller data set is shuffled as a whole."""
ROUND_LENGTH = 8
"""Batches are as long as a multiple of this, or as the longest that the encoder reads."""
_RUN = 64  # users who stay neighbours when the blocks are drawn, so that a disk is read in pieces worth reading


class TrainingBatches:
    """Epochs of batches: each user's training events cut into windows, windows of like length together."""

    def __init__(
        self, data: Interactions, train_end: npt.NDArray[np.int64], config: TrainConfig, device: torch.device
    ) -> None:
        """Uses the leading `train_end[u]` events of each user."""
        self.data, self.config, self.device = data, config, device
        self.train_end = train_end

    def epoch(self, number: int) -> Plan:
        """Returns the batches of an epoch; they depend on the seed and the number alone, so a resume repeats them."""
        return Plan(self, number)

    def windows(self, users: npt.NDArray[np.int64], rng: np.random.Generator) -> Windows:
        """Cuts histories into windows of `max_length` inputs and their targets."""
        length = self.config.max_length
        starts = self.data.offsets[users]
        ends = starts + self.train_end[users]
        # A long history's newest window has a random length, so that the borders move from epoch to epoch: with fixed
        # borders, the first event of a window would never be predicted from what came before it.
        long = np.flatnonzero(ends - starts > length + 1)
        newest = rng.integers(length // 2, length + 1, long.size)
        cut = np.stack([ends[long] - newest - 1, ends[long]], 1)
        ends[long] -= newest
        counts = np.maximum(-(-(ends - starts - 1) // length), 0)
        back = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.repeat(ends, counts) - back * length
        whole = np.stack([np.maximum(np.repeat(starts, counts), ends - length - 1), ends], 1)
        windows: Windows = np.concatenate([cut, whole])
        # A window without a target would cost a pass and teach nothing.
        chosen: npt.NDArray[np.bool_] = _any_inside(self.data.target, windows[:, 0] + 1, windows[:, 1])
        return windows[chosen]

    def width(self, windows: Windows) -> int:
        """Returns the length of a batch, rounded up: matrix products are compiled for each different length."""
        longest = int((windows[:, 1] - windows[:, 0]).max()) - 1
        return min(self.config.max_length, -(-longest // ROUND_LENGTH) * ROUND_LENGTH)

    def batch(self, windows: Windows, epoch: int = 0) -> Batch:
        """Assembles one batch of an epoch, which decides the order of events that have none."""
        if not self.config.ordered:
            return self._unordered(windows, epoch)
        return self._assembled(self.data, windows)

    def _assembled(self, data: Interactions, windows: Windows) -> Batch:
        starts, ends = windows[:, 0], windows[:, 1]
        width = self.width(windows)
        at = starts[:, None] + 1 + np.arange(width)
        inside = at < ends[:, None]
        at[~inside] = starts[0]
        # Every event of the window is predicted from those before it, so one pass teaches all of its targets.
        targets = np.where(inside & data.target[at], data.rows[at], -1).astype(np.int64)
        return to_batch(data, starts, ends - 1, self.config.max_length, self.device, targets)

    def _unordered(self, windows: Windows, epoch: int) -> Batch:
        """Assembles a batch whose windows are each read in a random order, another one in each epoch."""
        lengths = windows[:, 1] - windows[:, 0]
        ends = np.cumsum(lengths)
        owner = np.repeat(np.arange(lengths.size), lengths)
        at = np.arange(owner.size) + np.repeat(windows[:, 0] - (ends - lengths), lengths)
        # Windows do not overlap, so the first event of the first one tells the batches of an epoch apart.
        rng = np.random.default_rng([self.config.seed, epoch, int(windows[0, 0]), 20])
        at = at[np.lexsort((rng.random(at.size), owner))]
        data = dataclasses.replace(
            self.data, rows=self.data.rows[at], types=self.data.types[at], target=self.data.target[at]
        )
        if not self.config.repeats:
            # The event of an item that is a target was its first before; read later, it would repeat the item.
            first = np.zeros(at.size, np.bool_)
            first[np.unique(owner * data.items + data.rows, return_index=True)[1]] = True
            data.target[:] &= first
        return self._assembled(data, np.stack([ends - lengths, ends], 1))


class Plan(Sequence[Windows]):
    """The batches of one epoch as windows, made for some users at a time.

    Users are drawn into blocks; inside a block, windows of like length form a batch and batches come in random order.
    """

    def __init__(self, batches: TrainingBatches, number: int) -> None:
        """Draws the blocks and counts their batches; the windows of a block are made when they are read."""
        self._batches, self._number = batches, number
        runs = -(-batches.train_end.size // _RUN)
        order = self._rng(0).permutation(runs)
        self._blocks = [order[at : at + PLAN_USERS // _RUN] for at in range(0, runs, PLAN_USERS // _RUN)]
        self._current: tuple[int, list[Windows]] = (-1, [])
        self._first = np.cumsum([0, *(len(self._block(block)) for block in range(len(self._blocks)))])

    def __len__(self) -> int:
        """The number of batches."""
        return int(self._first[-1])

    @overload
    def __getitem__(self, at: int) -> Windows: ...
    @overload
    def __getitem__(self, at: slice) -> list[Windows]: ...
    def __getitem__(self, at: int | slice) -> Windows | list[Windows]:
        """Returns the windows of a batch."""
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        if not 0 <= at < len(self):
            raise IndexError(at)
        block = int(np.searchsorted(self._first, at, side="right")) - 1
        return self._block(block)[at - int(self._first[block])]

    def _block(self, block: int) -> list[Windows]:
        # Only the newest block's windows are kept: an epoch reads the blocks one after another.
        if self._current[0] != block:
            self._current = block, self._make(block)
        return self._current[1]

    def _make(self, block: int) -> list[Windows]:
        rng = self._rng(1 + block)
        users = (self._blocks[block][:, None] * _RUN + np.arange(_RUN)).ravel()
        windows = self._batches.windows(users[users < self._batches.train_end.size], rng)
        lengths = windows[:, 1] - windows[:, 0]
        # Windows of like length share a batch, since padding is computed like events; equal lengths are shuffled.
        windows = windows[np.argsort(-(lengths + rng.random(lengths.size)))]
        batches, at = [], 0
        while at < len(windows):
            size = max(1, self._batches.config.batch_tokens // self._batches.width(windows[at : at + 1]))
            batches.append(windows[at : at + size])
            at += size
        return [batches[number] for number in rng.permutation(len(batches))]

    def _rng(self, part: int) -> np.random.Generator:
        return np.random.default_rng([self._batches.config.seed, self._number, part])


@kernel()
def _any_inside(flags: Any, starts: Any, ends: Any) -> npt.NDArray[np.bool_]:
    """Returns True where any of `flags[starts[i]:ends[i]]` is set; bool `[n]`."""
    result = np.zeros(starts.size, np.bool_)
    for part in range(starts.size):
        for at in range(starts[part], ends[part]):
            if flags[at]:
                result[part] = True
                break
    return result


def _any_inside_plain(
    flags: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Plain twin of `_any_inside`."""
    return np.array([flags[start:end].any() for start, end in zip(starts, ends, strict=True)], bool)


def in_batches(lengths: npt.NDArray[np.int64], tokens: int, most: int = 512) -> Iterator[npt.NDArray[np.int64]]:
    """Yields positions of sequences in groups of like length, of about `tokens` with padding and `most` sequences."""
    # The longest first: if a batch does not fit into memory, it is the first one.
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < order.size:
        size = int(min(most, max(1, tokens // max(1, lengths[order[at]]))))
        yield order[at : at + size]
        at += size
