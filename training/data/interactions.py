"""Reads the canonical tables into arrays by user."""

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
"""Events that are worked on at once; a user with more of them is still worked on whole."""
MOST_TYPES = 255
"""Event types that fit into the uint8 of `Interactions.types`, whose 0 means padding."""
NEVER = 1 << 62
_COLUMNS = ("rows", "types", "timestamps", "values", "target", "seen", "origins")
"""Attributes of `Interactions` that hold a value per event."""


class TextColumn(Sequence[str]):
    """Texts that take no more memory than their letters: a Python string costs fifty bytes more, for every user."""

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
        """Returns one text, or a list of some."""
        if isinstance(at, slice):
            return [str(text) for text in self._texts[at].to_pylist()]
        return str(self._texts[int(at)])


@dataclass(frozen=True)
class UserBlock:
    """Some neighbouring users and their events.

    Attributes:
        users: Their numbers.
        events: Their events.
        owner: The user of each event; int64 `[e]`.
        position: Number of earlier events of the same user; int64 `[e]`.
    """

    users: slice
    events: slice
    owner: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Interactions:
    """All events, each user's together, oldest first: arrays that may be bigger than memory (see `Disk`).

    No code may make an array as long as all events: `blocks` gives some users at a time.

    Attributes:
        users: External ids; the position is the user's number.
        offsets: User `u` owns the events `offsets[u]:offsets[u + 1]`; int64 `[U + 1]`.
        rows: Row of the item; int32 `[E]`.
        types: 1 + position in `event_types`; uint8 `[E]`.
        timestamps: Milliseconds; zeros where the data set has order only; int64 `[E]`.
        values: NaN where there is none; float32 `[E]`.
        target: The event may be predicted: its type counts, its value is not too low, its time can be right and, unless
            repeats do, the item is new to the user; bool `[E]`.
        seen: The event's type makes its item seen; bool `[E]`.
        event_types: Names.
        items: Number of rows of the catalogue.
        ordered_only: There are no times.
        origins: Row of `resolved` that holds the keys each event carries; uint32 `[E]`.
        resolved: The different keys that events carry; row 0 is of events that carry none.
        trusted_until: The newest moment, ms, that the events vouch for; later ones are from wrong clocks.
        source_rows: Row of each event among those of the data set; int64 `[E]`, None if all of them are here.
        least_value: Events with a lower value say nothing for their item; minus infinity if any value does.
    """

    users: Sequence[str]
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
    source_rows: npt.NDArray[np.int64] | None = None
    least_value: float = -np.inf

    def positive(self, events: slice) -> npt.NDArray[np.bool_]:
        """Returns True for those of some events that say something for their item: they make it seen, and are not low.

        Such events make an item popular, and alike to others.
        """
        return self.seen[events] & ~self.low(events)

    def low(self, events: slice) -> npt.NDArray[np.bool_]:
        """Returns True for those of some events whose value is below `least_value`; never without a value."""
        is_low: npt.NDArray[np.bool_] = self.values[events] < self.least_value
        return is_low

    def aligned(self, column: pa.ChunkedArray[Any]) -> pa.ChunkedArray[Any]:
        """Returns a column of the data set's events with a value for each event here, in the same order."""
        return column if self.source_rows is None else column.take(self.source_rows)

    def logged(self, part: slice) -> Logged:
        """Returns the keys that some events carry, for `features.histories.history_keys`."""
        return self.resolved.take(self.origins[part])

    def owner(self) -> npt.NDArray[np.int64]:
        """Returns the user of each event; int64 `[E]`: for data that fits into memory."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.offsets))

    def blocks(self, events: int | None = None) -> Iterator[UserBlock]:
        """Yields all users in their order, those of about `events` events (`BLOCK_EVENTS`) at a time."""
        start, count = 0, self.offsets.size - 1
        while start < count:
            reach = self.offsets[start] + (events or BLOCK_EVENTS)
            end = max(start + 1, int(np.searchsorted(self.offsets, reach, side="right")) - 1)
            offsets = self.offsets[start : end + 1]
            owner = np.repeat(np.arange(start, end), np.diff(offsets))
            position = np.arange(offsets[0], offsets[-1]) - self.offsets[owner]
            yield UserBlock(slice(start, end), slice(int(offsets[0]), int(offsets[-1])), owner, position)
            start = end

    def draw_users(self, ends: npt.NDArray[np.int64], most: int, seed: int) -> npt.NDArray[np.int64]:
        """Returns all users, or a random sample whose leading `ends[u]` events are `most` together; ascending."""
        # Whole users are drawn, not events: item-to-item and co-occurrence need what one user did together.
        if int(ends.sum()) <= most:
            return np.arange(ends.size)
        drawn = np.random.default_rng([seed, most]).permutation(ends.size)
        return np.sort(drawn[: max(1, int(np.searchsorted(np.cumsum(ends[drawn]), most, side="right")))])

    def sample(self, ends: npt.NDArray[np.int64], most: int, seed: int) -> Interactions:
        """Returns the leading `ends[u]` events of all users, or of a random sample of users with `most` together.

        The arrays are in memory. Users keep their order and lose their ids.
        """
        chosen = self.draw_users(ends, most, seed)
        offsets = np.concatenate([[0], np.cumsum(ends[chosen])]).astype(np.int64)
        at = np.repeat(self.offsets[chosen] - offsets[:-1], ends[chosen]) + np.arange(offsets[-1])
        sampled = {name: getattr(self, name)[at] for name in _COLUMNS}
        return dataclasses.replace(self, users=[""] * chosen.size, offsets=offsets, **sampled)


class Disk:
    """Arrays in files without a name: they need room on the disk, not in memory, and vanish with the process."""

    def __init__(self, folder: Path | None) -> None:
        """Takes the directory that has the room; None is the system's for temporary files."""
        self.folder = folder

    def array(self, dtype: npt.DTypeLike, size: int) -> npt.NDArray[Any]:
        """Returns an array of zeros.

        Raises:
            TrainingError: The disk has not enough room.
        """
        length = np.dtype(dtype).itemsize * size
        if not length:
            return np.empty(size, dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            try:
                # The room is taken now: a write to a page that a full disk cannot hold would kill the process later.
                os.posix_fallocate(file.fileno(), 0, length)
            except OSError as error:
                folder = self.folder or tempfile.gettempdir()
                raise TrainingError(f"{folder} needs room for {length} bytes of events: {error.strerror}") from error
            return np.asarray(np.memmap(file, dtype, "r+", shape=(size,)))


def item_vocabulary(dataset: Dataset) -> tuple[pa.Table, Vocabulary]:
    """Returns the items table in row order, completed by items that only events name, and its vocabulary."""
    ids: list[str] = [str(name) for name in dataset.items["item_id"].to_pylist()]
    listed = set(ids)
    unlisted = [name for name in dataset.stream.distinct("item_id") if name not in listed]
    items = dataset.items
    if unlisted:
        # A table that states availability lists what is sold: an item that it lacks is likely sold no more. Its
        # events still teach, so it keeps a row, but it is never recommended.
        available = False if states_availability(items) else None
        extra = pa.Table.from_pylist([{"item_id": n, "available": available} for n in unlisted], schema=items.schema)
        items = pa.concat_tables([items, extra]).combine_chunks()
    return items, Vocabulary.build(ids + unlisted)


def read_interactions(
    dataset: Dataset, vocabulary: Vocabulary, config: TrainConfig, folder: Path | None = None
) -> Interactions:
    """Reads the events of a data set into arrays on disk, in one pass over them; without those of cold items.

    Args:
        dataset: The data set.
        vocabulary: Where item ids become rows.
        config: Which types of events count.
        folder: Where there is room for 15 to 23 bytes an event; None is the system's place for temporary files.

    Raises:
        TrainingError: There is no event, or none of a type that could be predicted; or the disk is full.
    """
    if not dataset.stream.num_rows:
        raise TrainingError("the data set has no events, so there is nothing to learn from: check its events table")
    if config.ordered and not dataset.stream.has_order:
        raise TrainingError(
            "the events have neither timestamp nor sequence, so nothing says in which order they happened: set "
            "ordered=false, which draws the events that are held out at random, or add one of these columns"
        )
    disk = Disk(folder)
    data, first_seen_types = _copy(dataset.stream, vocabulary, disk)
    if config.target_min_value is not None:
        data = dataclasses.replace(data, least_value=config.target_min_value)
    if not data.ordered_only:
        data = dataclasses.replace(data, trusted_until=_trusted_until(dataset.stream))
    event_types = sorted(first_seen_types)  # by name, so that a type's number does not depend on the order of rows
    if data.ordered_only and not config.ordered:
        data = _shuffled(data, disk)
    _mark(data, event_types, first_seen_types, config)
    data = dataclasses.replace(data, event_types=event_types)
    return _without(data, draw_cold_items(data.items, config)) if config.cold_item_share else data


def _mark(data: Interactions, event_types: list[str], first_seen_types: Sequence[str], config: TrainConfig) -> None:
    """Writes types by their final number, and which events are targets and which make items seen, in place."""
    numbers = np.array([1 + event_types.index(name) for name in first_seen_types], np.uint8)
    is_target, is_seen = (
        np.isin(np.arange(1 + len(event_types)), _type_numbers(event_types, names))
        for names in _target_and_seen_types(event_types, config)
    )
    if not is_target.any():
        raise TrainingError(
            f"no event is of a type to predict: the data set has {event_types}, set target_types to some of them"
        )
    for block in data.blocks():
        types = numbers[data.types[block.events]]
        target, makes_seen = is_target[types], is_seen[types]
        if not config.repeats:
            # Serving never recommends an item that the user has had, so no such event may be a target.
            target &= _is_first(block.owner, data.rows[block.events], makes_seen | target)
        # After the line before: an item that its user rated low is one that they had.
        target &= ~data.low(block.events)
        # An event from the future would be the newest, and every test would be a test of wrong clocks.
        target &= data.timestamps[block.events] <= data.trusted_until
        data.types[block.events], data.target[block.events], data.seen[block.events] = types, target, makes_seen


def _trusted_until(events: Events) -> int:
    newest = newest_moment(events.batches(("timestamp", "ingested_at")))
    return NEVER if newest is None else newest


def _shuffled(data: Interactions, disk: Disk) -> Interactions:
    """Puts each user's events into a random order, in place: the same one in every run on the data.

    Events that are sorted by item would hold out, as a user's last, the item that sorts last, and would be cut into
    windows of neighbours in the catalogue.
    """
    source_rows = disk.array(np.int64, data.rows.size)
    columns: list[npt.NDArray[Any]] = [getattr(data, name) for name in _COLUMNS]
    for block in data.blocks():
        # Not by the seed of the training: several seeds of one model are tested on the same events.
        drawn = np.random.default_rng([block.users.start, 20]).random(block.owner.size)
        order = np.lexsort((drawn, block.owner))
        source_rows[block.events] = block.events.start + order
        for column in columns:
            if column.flags.writeable:
                column[block.events] = column[block.events][order]
    return dataclasses.replace(data, source_rows=source_rows)


def _without(data: Interactions, cold: npt.NDArray[np.bool_]) -> Interactions:
    """Returns the same users without the events of the cold items; the arrays are compacted in place."""
    columns: list[npt.NDArray[Any]] = [getattr(data, name) for name in _COLUMNS]
    counts, size = np.zeros(len(data.users), np.int64), 0
    source_rows: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    for block in data.blocks():
        kept = ~cold[data.rows[block.events]]
        counts[block.users] = np.bincount(block.owner[kept] - block.users.start, minlength=counts[block.users].size)
        end = size + int(kept.sum())
        if data.source_rows is None:
            source_rows.append(block.events.start + np.flatnonzero(kept))
        else:
            source_rows.append(data.source_rows[block.events][kept])
        for column in columns:
            if column.flags.writeable:  # else it holds one and the same value everywhere
                column[size:end] = column[block.events][kept]
        size = end
    remaining: dict[str, Any] = {name: column[:size] for name, column in zip(_COLUMNS, columns, strict=True)}
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return dataclasses.replace(data, offsets=offsets, source_rows=np.concatenate(source_rows), **remaining)


def _copy(events: Events, vocabulary: Vocabulary, disk: Disk) -> tuple[Interactions, list[str]]:
    """Returns the events as arrays, their types numbered by first appearance from 0, and the names of the types."""
    size, timed, valued = events.num_rows, "timestamp" in events.present, "value" in events.present
    rows, types = disk.array(np.int32, size), disk.array(np.uint8, size)
    timestamps = disk.array(np.int64, size) if timed else np.broadcast_to(np.int64(0), size)
    values = disk.array(np.float32, size) if valued else np.broadcast_to(np.float32(np.nan), size)
    resolved = any(name in events.present for name in KEYS)
    origins = disk.array(np.uint32, size) if resolved else np.broadcast_to(np.uint32(0), size)
    items, keys = _TextCodes(vocabulary.rows), Distinct()
    event_types = _TextCodes(lambda names: range(len(event_types.codes), len(event_types.codes) + len(names)))
    users, at = _UserStarts(), 0
    columns = ("user_id", "item_id", "event_type", "timestamp", "value", *(KEYS if resolved else ()))
    for batch in events.batches(columns):
        part = slice(at, at + batch.num_rows)
        rows[part], types[part] = items(batch["item_id"]), event_types(batch["event_type"])
        if len(event_types.codes) > MOST_TYPES:
            raise TrainingError(f"the data set has more than {MOST_TYPES} event types: name them more coarsely")
        if timed:
            timestamps[part] = pc.fill_null(batch["timestamp"], 0).to_numpy()
        if valued:
            values[part] = batch["value"].to_numpy()
        if resolved:
            origins[part] = keys.numbers(Logged.of(batch))
        users.add(batch["user_id"], at)
        at = part.stop
    return Interactions(
        users=TextColumn(pa.concat_arrays(users.ids)),
        offsets=users.offsets(size, disk),
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
    ), list(event_types.codes)


class _UserStarts:
    """The users of a stream that is sorted by user, and the event that each begins with."""

    def __init__(self) -> None:
        self.ids: list[Any] = []
        self.begins: list[npt.NDArray[np.int64]] = []
        self.newest: str | None = None

    def add(self, column: pa.ChunkedArray[Any], at: int) -> None:
        """Adds a batch of events, the first of which is event `at`."""
        ids = column.combine_chunks()
        # A user begins wherever the id differs from the one before; the first id may go on from the last batch.
        changes = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False)
        begin = np.flatnonzero(np.concatenate([[ids[0].as_py() != self.newest], changes]))
        self.ids.append(ids.take(begin))
        self.begins.append(at + begin)
        self.newest = ids[len(ids) - 1].as_py()

    def offsets(self, size: int, disk: Disk) -> npt.NDArray[np.int64]:
        """Returns the start of each user's events among `size`, and their end; int64 `[U + 1]`."""
        offsets = disk.array(np.int64, sum(map(len, self.begins)) + 1)
        np.concatenate([*self.begins, [size]], out=offsets)
        return offsets


class _TextCodes:
    """Numbers of texts, each looked up once."""

    def __init__(self, look_up: Callable[[list[str]], Iterable[int]]) -> None:
        self.look_up = look_up
        self.codes: dict[str, int] = {}

    def __call__(self, column: pa.ChunkedArray[Any]) -> npt.NDArray[np.int64]:
        names, indices = codes(column)
        new = [name for name in names if name not in self.codes]
        if new:
            self.codes.update(zip(new, map(int, self.look_up(new)), strict=True))
        return np.array([self.codes[name] for name in names], np.int64)[indices]


def _target_and_seen_types(event_types: list[str], config: TrainConfig) -> tuple[Sequence[str], Sequence[str]]:
    """Returns the types to predict and the types that make an item seen."""
    targets = config.target_types or [name for name in event_types if name not in PASSIVE_TYPES]
    negative = [name for name in event_types if name in NEGATIVE_EVENT_TYPES]
    return targets, config.seen_types or [*targets, *negative]


def _type_numbers(event_types: list[str], names: Sequence[str]) -> list[int]:
    return [1 + event_types.index(name) for name in names if name in event_types]


def _is_first(
    owner: npt.NDArray[np.int64], rows: npt.NDArray[np.int32], counts: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Returns True where an event is the first of its user and item among those that count."""
    fresh = np.zeros(rows.size, bool)
    at = np.flatnonzero(counts)
    if at.size:
        # User and item as one number; `np.unique` returns the first place of each.
        _, first = np.unique((owner[at] - owner[0]) * (int(rows.max()) + 1) + rows[at], return_index=True)
        fresh[at[first]] = True
    return fresh


def draw_cold_items(items: int, config: TrainConfig) -> npt.NDArray[np.bool_]:
    """Draws the items that no training event may name, so that a test can measure how well content alone places them.

    Returns:
        True for the share `cold_item_share` of a catalogue of `items` rows; bool `[items]`.
    """
    cold = np.zeros(items, bool)
    # The seed and the size alone decide, so that a test of a finished run draws the same items as its training.
    drawn = np.random.default_rng([config.seed, items]).permutation(items)
    cold[drawn[: round(config.cold_item_share * items)]] = True
    return cold
