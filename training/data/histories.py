"""The histories of users as serving reads them from profiles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from features.assemble import History, are_choices, remembered, type_index
from features.catalog import Columns
from features.decayed_counts import DecayedCounts, empty, fold
from features.histories import history_keys
from features.keys import event_type_keys
from features.profile import RING
from training.data.interactions import Interactions


class UserHistories:
    """People's pasts as serving reads them from profiles.

    Whoever is asked for again, later in their history, is folded on from there: in order of time every event of a
    person is folded once.
    """

    def __init__(self, data: Interactions, columns: Columns) -> None:
        """Takes the events, all about items, and the catalogue's columns."""
        self._data, self._columns = data, columns
        self._keys, self._index = event_type_keys(data.event_types), type_index(data.event_types)
        self._known: dict[int, tuple[int, DecayedCounts]] = {}

    def before(self, person: int, position: int) -> History:
        """A person's past just before their event number `position`."""
        start, end = int(self._data.offsets[person]), int(self._data.offsets[person]) + position
        part = slice(max(start, end - RING), end)
        categories, creators = self._history_keys(part)
        memory, kinds = remembered(self._memory(person, start, end), self._index)
        return History(
            rows=self._data.rows[part],
            types=self._data.types[part].astype(np.int32),
            categories=categories,
            creators=creators,
            timestamps=self._data.timestamps[part],
            values=self._data.values[part],
            chosen=are_choices(self._keys[self._data.types[part] - 1]),
            memory=memory,
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
