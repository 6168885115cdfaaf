"""From the canonical tables to arrays by person, and from arrays to batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from features.assemble import encoder_inputs, pack
from features.columns import pc
from features.content import codes, is_present
from features.errors import TrainingError
from features.schema import NEGATIVE_EVENT_TYPES, item_keys
from features.tables import Dataset
from features.vocabulary import Vocabulary
from training.config import PASSIVE_TYPES, TrainConfig
from training.hidden import hidden_items


@dataclass(frozen=True)
class Interactions:
    """All events, each person's together, oldest first.

    Attributes:
        people: External ids; the position is the person's number.
        offsets: Person `u` owns the events `offsets[u]:offsets[u + 1]`; int64 `[U + 1]`.
        rows: Row of the item; int32 `[E]`.
        types: 1 + position in `event_types`; int32 `[E]`.
        timestamps: Milliseconds; zeros where the data set has order only; int64 `[E]`.
        values: NaN where there is none; float32 `[E]`.
        target: The event may be predicted: its type counts and, unless repeats do, the item is new to the person;
            bool `[E]`.
        seen: The event's type makes its item seen; bool `[E]`.
        event_types: Names.
        items: Number of rows of the catalogue.
        ordered_only: There are no times.
    """

    people: list[str]
    offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]
    types: npt.NDArray[np.int32]
    timestamps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    target: npt.NDArray[np.bool_]
    seen: npt.NDArray[np.bool_]
    event_types: list[str]
    items: int
    ordered_only: bool

    def owner(self) -> npt.NDArray[np.int64]:
        """The person of each event; int64 `[E]`."""
        return np.repeat(np.arange(len(self.people)), np.diff(self.offsets))


def item_vocabulary(dataset: Dataset) -> tuple[pa.Table, Vocabulary]:
    """The items table in row order, completed by items that only events name, and its vocabulary."""
    ids: list[str] = [str(name) for name in dataset.items["item_id"].to_pylist()]
    known = set(ids)
    named, _ = codes(dataset.events["item_id"])
    lacking = [name for name in named if name not in known]
    items = dataset.items
    if lacking:
        extra = pa.Table.from_pylist([{"item_id": name} for name in lacking], schema=items.schema)
        items = pa.concat_tables([items, extra]).combine_chunks()
    return items, Vocabulary.build(ids + lacking)


def read_interactions(dataset: Dataset, vocabulary: Vocabulary, config: TrainConfig) -> Interactions:
    """Turns the events of a data set into arrays; those of hidden items (`hide_items`) are left out here, once for all.

    Raises:
        TrainingError: There is no event, or none of a type that could be predicted.
    """
    events = dataset.events
    if not events.num_rows:
        raise TrainingError("the data set has no events, so there is nothing to learn from")
    people, who = codes(events["user_id"])
    named, what = codes(events["item_id"])
    type_names, kind = codes(events["event_type"])
    order = np.argsort(type_names)  # by name, so that the index of a type does not depend on the order of rows
    event_types = [type_names[at] for at in order]
    types = (1 + np.argsort(order)[kind]).astype(np.int32)
    rows = vocabulary.rows_of_keys(item_keys(named))[what]
    target, seen = (np.isin(types, _indices(event_types, names)) for names in _counting(event_types, config))
    if not target.any():
        raise TrainingError(
            f"no event is of a type to predict: the data set has {event_types}, set target_types to some of them"
        )
    if not config.repeats:
        target &= _first_time(who, rows, seen | target)
    timed = is_present(events["timestamp"])
    data = Interactions(
        people=people,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(who, minlength=len(people)))]).astype(np.int64),
        rows=rows,
        types=types,
        timestamps=pc.fill_null(events["timestamp"], 0).to_numpy() if timed else np.zeros(rows.size, np.int64),
        values=events["value"].to_numpy().astype(np.float32),
        target=target,
        seen=seen,
        event_types=event_types,
        items=len(vocabulary),
        ordered_only=not timed,
    )
    return _without(data, hidden_items(data.items, config)) if config.hide_items else data


def _without(data: Interactions, hidden: npt.NDArray[np.bool_]) -> Interactions:
    """The same people without the events of the hidden items."""
    kept = ~hidden[data.rows]
    counts = np.bincount(data.owner()[kept], minlength=len(data.people))
    columns = {name: getattr(data, name)[kept] for name in ("rows", "types", "timestamps", "values", "target", "seen")}
    return replace(data, offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), **columns)


def _counting(event_types: list[str], config: TrainConfig) -> tuple[Sequence[str], Sequence[str]]:
    """The types to predict and the types that make an item seen."""
    targets = config.target_types or [name for name in event_types if name not in PASSIVE_TYPES]
    negative = [name for name in event_types if name in NEGATIVE_EVENT_TYPES]
    return targets, config.seen_types or [*targets, *negative]


def _indices(event_types: list[str], names: Sequence[str]) -> list[int]:
    return [1 + event_types.index(name) for name in names if name in event_types]


def _first_time(
    who: npt.NDArray[np.int64], rows: npt.NDArray[np.int32], counts: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Whether an event is the first of its person and item among those that count."""
    pairs = np.where(counts, who * (int(rows.max()) + 1) + rows, -1)
    _, first = np.unique(pairs, return_index=True)
    fresh = np.zeros(rows.size, bool)
    fresh[first] = True
    return fresh & counts


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right, on one device.

    Attributes:
        rows: Items; int64 `[B, L]`, 0 at padding.
        types: Event types; int64 `[B, L]`, 0 at padding.
        lengths: int64 `[B]`.
        targets: The item that follows each event, -1 where none counts; int64 `[B, L]`; None outside training.
    """

    rows: torch.Tensor
    types: torch.Tensor
    lengths: torch.Tensor
    targets: torch.Tensor | None = None


def to_batch(
    sequences: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    device: torch.device,
    targets: Sequence[npt.NDArray[np.int64]] | None = None,
) -> Batch:
    """Pads what `encoder_inputs` gave, and the targets beside it."""
    rows, types, lengths = pack(sequences)
    padded = None
    if targets is not None:
        padded = np.full(rows.shape, -1, np.int64)
        for at, target in enumerate(targets):
            padded[at, : target.size] = target
    tensors = (
        None if array is None else torch.from_numpy(array).to(device) for array in (rows, types, lengths, padded)
    )
    return Batch(*tensors)  # type: ignore[arg-type]


class TrainingBatches:
    """Epochs of batches: each person's training events cut into windows, windows of like length together."""

    def __init__(
        self, data: Interactions, train_end: npt.NDArray[np.int64], config: TrainConfig, device: torch.device
    ) -> None:
        """Takes the leading `train_end[u]` events of each person."""
        self.data, self.config, self.device = data, config, device
        self.starts, self.ends = data.offsets[:-1], data.offsets[:-1] + train_end
        countable = np.concatenate([[0], np.cumsum(data.target)])
        self.people = np.flatnonzero(countable[self.ends] - countable[np.minimum(self.starts + 1, self.ends)] > 0)

    def epoch(self, number: int) -> list[list[tuple[int, int]]]:
        """The batches of an epoch as windows `[start, end)` of events; depends on the seed and the number alone."""
        rng = np.random.default_rng([self.config.seed, number])
        windows = [window for person in self.people.tolist() for window in self._windows(person, rng)]
        lengths = np.array([end - start for start, end in windows])
        batches: list[list[tuple[int, int]]] = []
        width = 0
        for at in np.argsort(-(lengths + rng.random(lengths.size))).tolist():
            if not batches or width * (len(batches[-1]) + 1) > self.config.batch_tokens:
                batches.append([])
                width = int(lengths[at]) - 1
            batches[-1].append(windows[at])
        return [batches[at] for at in rng.permutation(len(batches))]

    def _windows(self, person: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Windows of `max_length` inputs and their targets; the newest is cut at random so that borders move."""
        start, end = int(self.starts[person]), int(self.ends[person])
        length = self.config.max_length
        windows = []
        if end - start > length + 1:
            newest = int(rng.integers(length // 2, length + 1))
            windows.append((end - newest - 1, end))
            end -= newest
        while end - start > 1:
            windows.append((max(start, end - length - 1), end))
            end -= length
        return [window for window in windows if self.data.target[window[0] + 1 : window[1]].any()]

    def batch(self, windows: Sequence[tuple[int, int]]) -> Batch:
        """Assembles one batch."""
        data, length = self.data, self.config.max_length
        inputs = [encoder_inputs(data.rows[s : e - 1], data.types[s : e - 1], length) for s, e in windows]
        targets = [np.where(data.target[s + 1 : e], data.rows[s + 1 : e], -1).astype(np.int64) for s, e in windows]
        return to_batch(inputs, self.device, targets)


def prefixes(
    data: Interactions, people: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], max_length: int
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """The encoder's inputs for each person as they were just before the event at `positions`."""
    starts = data.offsets[people]
    return [
        encoder_inputs(data.rows[s : s + p], data.types[s : s + p], max_length)
        for s, p in zip(starts.tolist(), positions.tolist(), strict=True)
    ]


def in_batches(lengths: npt.NDArray[np.int64], tokens: int, most: int = 512) -> Iterator[npt.NDArray[np.int64]]:
    """Positions of sequences in groups of like length, each of at most about `tokens` padded and `most` sequences."""
    order = np.argsort(-lengths, kind="stable")
    at = 0
    while at < order.size:
        size = int(min(most, max(1, tokens // max(1, lengths[order[at]]))))
        yield order[at : at + size]
        at += size
