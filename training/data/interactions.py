"""From the canonical tables to arrays by person, and from arrays to batches."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.errors import TrainingError
from features.event_types import NEGATIVE_EVENT_TYPES
from features.histories import KEYS, Distinct, Logged
from features.tables.clock import newest_moment
from features.tables.dataset import Dataset, states_availability
from features.tables.event_reader import Events
from features.tables.order import codes
from features.vocabulary import Vocabulary
from training.config import PASSIVE_TYPES, TrainConfig

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
class UserBlock:
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

    def blocks(self, events: int | None = None) -> Iterator[UserBlock]:
        """All people in their order, those of about `events` events (`BLOCK_EVENTS`) at a time."""
        start, count = 0, self.offsets.size - 1
        while start < count:
            reach = self.offsets[start] + (events or BLOCK_EVENTS)
            end = max(start + 1, int(np.searchsorted(self.offsets, reach, side="right")) - 1)
            offsets = self.offsets[start : end + 1]
            owner = np.repeat(np.arange(start, end), np.diff(offsets))
            position = np.arange(offsets[0], offsets[-1]) - self.offsets[owner]
            yield UserBlock(slice(start, end), slice(int(offsets[0]), int(offsets[-1])), owner, position)
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
    return _without(data, draw_cold_items(data.items, config)) if config.cold_item_share else data


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
    items, keys = _TextCodes(vocabulary.rows), Distinct()
    kinds = _TextCodes(lambda names: range(len(kinds.known), len(kinds.known) + len(names)))
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


class _TextCodes:
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


def draw_cold_items(items: int, config: TrainConfig) -> npt.NDArray[np.bool_]:
    """The share `cold_item_share` of a catalogue of `items` rows, drawn by the seed; bool `[items]`."""
    hidden = np.zeros(items, bool)
    drawn = np.random.default_rng([config.seed, items]).permutation(items)
    hidden[drawn[: round(config.cold_item_share * items)]] = True
    return hidden
