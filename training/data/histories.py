"""Computes the history of a user at any moment, as serving reads it from a profile."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from features.assemble import History, are_choices, counts_and_kinds, type_index
from features.catalog_columns import CatalogColumns
from features.decayed_counts import DecayedCounts, empty, fold
from features.histories import history_keys
from features.keys import event_type_keys
from features.profile import RING
from training.data.interactions import Interactions


class UserHistories:
    """The histories of all users, each as it was just before any of their events.

    The decayed counts of a user are kept and folded on from where they were last read: read in the order of time,
    every event is folded once.
    """

    def __init__(self, data: Interactions, columns: CatalogColumns) -> None:
        """Takes the events, all about items, and the catalogue's columns."""
        self._data, self._columns = data, columns
        self._keys, self._index = event_type_keys(data.event_types), type_index(data.event_types)
        self._folded: dict[int, tuple[int, DecayedCounts]] = {}

    def before(self, user: int, position: int) -> History:
        """Returns a user's history just before their event number `position`."""
        start = int(self._data.offsets[user])
        end = start + position
        # A profile keeps the newest events in its ring; older ones live on in the decayed counts alone.
        ring = slice(max(start, end - RING), end)
        categories, creators = self._history_keys(ring)
        counts, kinds = counts_and_kinds(self._counts_before(user, start, end), self._index)
        return History(
            rows=self._data.rows[ring],
            types=self._data.types[ring].astype(np.int32),
            categories=categories,
            creators=creators,
            timestamps=self._data.timestamps[ring],
            values=self._data.values[ring],
            chosen=are_choices(self._keys[self._data.types[ring] - 1]),
            decayed_counts=counts,
            kinds=kinds,
        )

    def whole(self, user: int) -> DecayedCounts:
        """Returns the decayed counts of all events of a user, and keeps nothing: those of all users need too much."""
        return self._fold(empty(), int(self._data.offsets[user]), int(self._data.offsets[user + 1]))

    def _counts_before(self, user: int, start: int, end: int) -> DecayedCounts:
        """Returns the decayed counts of the events from `start` to `end`, all of one user."""
        folded_end, counts = self._folded.get(user, (start, empty()))
        if folded_end > end:
            # Folding cannot be undone, so an earlier moment starts from the first event.
            folded_end, counts = start, empty()
        counts = self._fold(counts, folded_end, end)
        self._folded[user] = end, counts
        return counts

    def _fold(self, counts: DecayedCounts, start: int, end: int) -> DecayedCounts:
        """Adds the events from `start` to `end` to decayed counts."""
        types, times = self._keys[self._data.types[start:end] - 1], self._data.timestamps[start:end]
        # Event by event as the projector folds them: in another order the sums would differ in their last bits.
        return fold(counts, np.ones(types.size, np.uint64), *self._history_keys(slice(start, end)), types, times)

    def _history_keys(self, part: slice) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Returns the category and the creator of some events; two uint64 [n]."""
        return history_keys(self._data.rows[part], self._columns, self._data.logged(part))
