"""From the canonical tables to arrays by person, and from arrays to batches."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from features.arrays import pc
from features.assemble import encoder_batch
from features.errors import TrainingError
from features.event_types import NEGATIVE_EVENT_TYPES
from features.histories import KEYS, Distinct, Logged
from features.jit import kernel
from features.tables.clock import newest_moment
from features.tables.dataset import Dataset, states_availability
from features.tables.event_reader import Events
from features.tables.order import codes
from features.vocabulary import Vocabulary
from training.config import PASSIVE_TYPES, TrainConfig
from training.data.cold_items import hidden_items

BLOCK_EVENTS = 1 << 20
"""Events that are worked on at once; a person with more comes at once all the same."""
MOST_TYPES = 255
NEVER = 1 << 62


class Names(Sequence[str]):
    """Texts that take no more memory than their letters."""

    def __init__(self, texts: Any) -> None:
        """Wraps an Arrow array of texts."""
        self._texts = texts

    def __len__(self) -> int:
        """The number of texts."""
        return len(self._texts)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        """One text, or some."""
        if isinstance(at, slice):
            return [str(text) for text in self._texts[at].to_pylist()]
        return str(self._texts[int(at)])


@dataclass(frozen=True)
class Block:
    """Some neighbouring people and their events.

    Attributes:
        people: Their numbers.
        events: Their events.
        owner: The person of each event; int64 `[e]`.
        position: Number of earlier events of the same person; int64 `[e]`.
    """

    people: slice
    events: slice
    owner: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Interactions:
    """All events, each person's together, oldest first: arrays that may be bigger than memory (see `Disk`).

    Nothing may be made of all events at once that is as long as they are: `blocks` gives some people at a time.

    Attributes:
        people: External ids; the position is the person's number.
        offsets: Person `u` owns the events `offsets[u]:offsets[u + 1]`; int64 `[U + 1]`.
        rows: Row of the item; int32 `[E]`.
        types: 1 + position in `event_types`; uint8 `[E]`.
        timestamps: Milliseconds; zeros where the data set has order only; int64 `[E]`.
        values: NaN where there is none; float32 `[E]`.
        target: The event may be predicted: its type counts, its time can be right and, unless repeats do, the item is
            new to the person; bool `[E]`.
        seen: The event's type makes its item seen; bool `[E]`.
        event_types: Names.
        items: Number of rows of the catalogue.
        ordered_only: There are no times.
        origins: Line of `resolved` that holds the keys each event carries; uint32 `[E]`.
        resolved: The different keys that events carry; line 0 is of events that carry none.
        trusted_until: The newest moment, ms, that the events vouch for; later ones are from wrong clocks.
        places: Row of each event among those of the data set; int64 `[E]`, None where they are all of them.
    """

    people: Sequence[str]
    offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]
    types: npt.NDArray[np.uint8]
    timestamps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    target: npt.NDArray[np.bool_]
    seen: npt.NDArray[np.bool_]
    event_types: list[str]
    items: int
    ordered_only: bool
    origins: npt.NDArray[np.uint32]
    resolved: Logged
    trusted_until: int = NEVER
    places: npt.NDArray[np.int64] | None = None

    def beside(self, column: pa.ChunkedArray[Any]) -> pa.ChunkedArray[Any]:
        """A column of the data set's events with a value for each event here, in the same order."""
        return column if self.places is None else column.take(self.places)

    def logged(self, part: slice) -> Logged:
        """Returns the keys that some events carry, for `features.histories.history_keys`."""
        return self.resolved.take(self.origins[part])

    def owner(self) -> npt.NDArray[np.int64]:
        """The person of each event; int64 `[E]`: for data that fits into memory."""
        return np.repeat(np.arange(len(self.people)), np.diff(self.offsets))

    def blocks(self, events: int | None = None) -> Iterator[Block]:
        """All people in their order, those of about `events` events (`BLOCK_EVENTS`) at a time."""
        start, count = 0, self.offsets.size - 1
        while start < count:
            reach = self.offsets[start] + (events or BLOCK_EVENTS)
            end = max(start + 1, int(np.searchsorted(self.offsets, reach, side="right")) - 1)
            offsets = self.offsets[start : end + 1]
            owner = np.repeat(np.arange(start, end), np.diff(offsets))
            position = np.arange(offsets[0], offsets[-1]) - self.offsets[owner]
            yield Block(slice(start, end), slice(int(offsets[0]), int(offsets[-1])), owner, position)
            start = end

    def sample(self, ends: npt.NDArray[np.int64], most: int, seed: int) -> Interactions:
        """The leading `ends[u]` events of everybody, or of people drawn at random who have `most` together; in memory.

        For what a sample tells as well as the whole. People keep their order and lose their names.
        """
        chosen = np.arange(ends.size)
        if int(ends.sum()) > most:
            chosen = np.random.default_rng([seed, most]).permutation(ends.size)
            chosen = np.sort(chosen[: max(1, int(np.searchsorted(np.cumsum(ends[chosen]), most, side="right")))])
        offsets = np.concatenate([[0], np.cumsum(ends[chosen])]).astype(np.int64)
        at = np.repeat(self.offsets[chosen] - offsets[:-1], ends[chosen]) + np.arange(offsets[-1])
        arrays = ("rows", "types", "timestamps", "values", "target", "seen", "origins")
        taken = {name: getattr(self, name)[at] for name in arrays}
        return dataclasses.replace(self, people=[""] * chosen.size, offsets=offsets, **taken)


class Disk:
    """Arrays in files without a name: they need room on the disk, not in memory, and are gone with the process."""

    def __init__(self, folder: Path | None) -> None:
        """Takes the directory that has the room; None is the system's for temporary files."""
        self.folder = folder

    def array(self, dtype: npt.DTypeLike, size: int) -> npt.NDArray[Any]:
        """An array of zeros.

        Raises:
            TrainingError: The disk has not enough room.
        """
        length = np.dtype(dtype).itemsize * size
        if not length:
            return np.empty(size, dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            try:
                # Now, for a full disk would end the process later, when a page is written.
                os.posix_fallocate(file.fileno(), 0, length)
            except OSError as error:
                where = self.folder or tempfile.gettempdir()
                raise TrainingError(f"{where} needs room for {length} bytes of events: {error.strerror}") from error
            return np.asarray(np.memmap(file, dtype, "r+", shape=(size,)))


def item_vocabulary(dataset: Dataset) -> tuple[pa.Table, Vocabulary]:
    """The items table in row order, completed by items that only events name, and its vocabulary.

    Where the table says when its items may be shown, an item that it lacks is not available: it is likely sold no more.
    """
    ids: list[str] = [str(name) for name in dataset.items["item_id"].to_pylist()]
    known = set(ids)
    lacking = [name for name in dataset.stream.distinct("item_id") if name not in known]
    items = dataset.items
    if lacking:
        available = False if states_availability(items) else None
        extra = pa.Table.from_pylist([{"item_id": n, "available": available} for n in lacking], schema=items.schema)
        items = pa.concat_tables([items, extra]).combine_chunks()
    return items, Vocabulary.build(ids + lacking)


def read_interactions(
    dataset: Dataset, vocabulary: Vocabulary, config: TrainConfig, folder: Path | None = None
) -> Interactions:
    """Turns the events of a data set into arrays on disk, in one pass over them; without those of hidden items.

    Args:
        dataset: The data set.
        vocabulary: Where item ids become rows.
        config: Which types of events count.
        folder: Where there is room for 15 to 23 bytes an event; None is the system's place for temporary files.

    Raises:
        TrainingError: There is no event, or none of a type that could be predicted; or the disk is full.
    """
    if not dataset.stream.num_rows:
        raise TrainingError("the data set has no events, so there is nothing to learn from")
    disk = Disk(folder)
    data, found = _copy(dataset.stream, vocabulary, disk)
    if not data.ordered_only:
        data = dataclasses.replace(data, trusted_until=_trusted_until(dataset.stream))
    event_types = sorted(found)  # by name, so that the index of a type does not depend on the order of rows
    numbers = np.array([1 + event_types.index(name) for name in found], np.uint8)
    counting = [np.isin(np.arange(1 + len(found)), _indices(event_types, n)) for n in _counting(event_types, config)]
    if not counting[0].any():
        raise TrainingError(
            f"no event is of a type to predict: the data set has {event_types}, set target_types to some of them"
        )
    for block in data.blocks():
        types = numbers[data.types[block.events]]
        target, seen = (counts[types] for counts in counting)
        if not config.repeats:
            target &= _first_time(block.owner, data.rows[block.events], seen | target)
        target &= data.timestamps[block.events] <= data.trusted_until
        data.types[block.events], data.target[block.events], data.seen[block.events] = types, target, seen
    data = dataclasses.replace(data, event_types=event_types)
    return _without(data, hidden_items(data.items, config)) if config.hide_items else data


def _trusted_until(events: Events) -> int:
    newest = newest_moment(events.batches(("timestamp", "ingested_at")))
    return NEVER if newest is None else newest


def _without(data: Interactions, hidden: npt.NDArray[np.bool_]) -> Interactions:
    """The same people without the events of the hidden items; what is left moves together where it stands."""
    names = ("rows", "types", "timestamps", "values", "target", "seen", "origins")
    columns: list[npt.NDArray[Any]] = [getattr(data, name) for name in names]
    counts, size = np.zeros(len(data.people), np.int64), 0
    places: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    for block in data.blocks():
        kept = ~hidden[data.rows[block.events]]
        counts[block.people] = np.bincount(block.owner[kept] - block.people.start, minlength=counts[block.people].size)
        end = size + int(kept.sum())
        places.append(block.events.start + np.flatnonzero(kept))
        for column in columns:
            if column.flags.writeable:  # else it holds one and the same value everywhere
                column[size:end] = column[block.events][kept]
        size = end
    left: dict[str, Any] = {name: column[:size] for name, column in zip(names, columns, strict=True)}
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return dataclasses.replace(data, offsets=offsets, places=np.concatenate(places), **left)


def _copy(events: Events, vocabulary: Vocabulary, disk: Disk) -> tuple[Interactions, list[str]]:
    """The events as arrays, their types numbered by first appearance from 0, and the names of these."""
    size = events.num_rows
    rows, types = disk.array(np.int32, size), disk.array(np.uint8, size)
    timed, valued = "timestamp" in events.present, "value" in events.present
    timestamps = disk.array(np.int64, size) if timed else np.broadcast_to(np.int64(0), size)
    values = disk.array(np.float32, size) if valued else np.broadcast_to(np.float32(np.nan), size)
    resolved = any(name in events.present for name in KEYS)
    origins = disk.array(np.uint32, size) if resolved else np.broadcast_to(np.uint32(0), size)
    items, keys = _Numbers(vocabulary.rows), Distinct()
    kinds = _Numbers(lambda names: range(len(kinds.known), len(kinds.known) + len(names)))
    people: list[Any] = []
    begins: list[npt.NDArray[np.int64]] = []
    at, last = 0, None
    columns = ("user_id", "item_id", "event_type", "timestamp", "value", *(KEYS if resolved else ()))
    for batch in events.batches(columns):
        part = slice(at, at + batch.num_rows)
        rows[part], types[part] = items(batch["item_id"]), kinds(batch["event_type"])
        if len(kinds.known) > MOST_TYPES:
            raise TrainingError(f"the data set has more than {MOST_TYPES} event types: name them more coarsely")
        if timed:
            timestamps[part] = pc.fill_null(batch["timestamp"], 0).to_numpy()
        if valued:
            values[part] = batch["value"].to_numpy()
        if resolved:
            origins[part] = keys.numbers(Logged.of(batch))
        named = batch["user_id"].combine_chunks()
        other = pc.not_equal(named.slice(1), named.slice(0, len(named) - 1)).to_numpy(zero_copy_only=False)
        begin = np.flatnonzero(np.concatenate([[named[0].as_py() != last], other]))
        people.append(named.take(begin))
        begins.append(at + begin)
        at, last = part.stop, named[len(named) - 1].as_py()
    offsets = disk.array(np.int64, sum(map(len, begins)) + 1)
    np.concatenate([*begins, [size]], out=offsets)
    return Interactions(
        people=Names(pa.concat_arrays(people)),
        offsets=offsets,
        rows=rows,
        types=types,
        timestamps=timestamps,
        values=values,
        target=disk.array(np.bool_, size),
        seen=disk.array(np.bool_, size),
        event_types=[],
        items=len(vocabulary),
        ordered_only=not timed,
        origins=origins,
        resolved=keys.table(),
    ), list(kinds.known)


class _Numbers:
    """Numbers of texts, each asked for once."""

    def __init__(self, ask: Callable[[list[str]], Iterable[int]]) -> None:
        self.ask = ask
        self.known: dict[str, int] = {}

    def __call__(self, column: pa.ChunkedArray[Any]) -> npt.NDArray[np.int64]:
        names, which = codes(column)
        new = [name for name in names if name not in self.known]
        if new:
            self.known.update(zip(new, map(int, self.ask(new)), strict=True))
        return np.array([self.known[name] for name in names], np.int64)[which]


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
    fresh = np.zeros(rows.size, bool)
    at = np.flatnonzero(counts)
    if at.size:
        _, first = np.unique((who[at] - who[0]) * (int(rows.max()) + 1) + rows[at], return_index=True)
        fresh[at[first]] = True
    return fresh


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
        rows=sent(torch.from_numpy(rows), device),
        types=sent(torch.from_numpy(types), device),
        lengths=sent(torch.from_numpy(lengths), device),
        tokens=int(lengths.sum()),
        targets=None if targets is None else torch.from_numpy(targets),
    )


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor of the CPU on `device`; a GPU takes it while both go on with their work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


Windows: TypeAlias = npt.NDArray[np.int64]
"""Parts of histories, each an input and its targets: the events `windows[i, 0]:windows[i, 1]`; int64 `[n, 2]`."""

PLAN_PEOPLE = 1 << 16
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
        self._blocks = [order[at : at + PLAN_PEOPLE // _RUN] for at in range(0, runs, PLAN_PEOPLE // _RUN)]
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
