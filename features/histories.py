"""Resolves the category and the creator of each event of a history: one rule for serving, rebuilding and training.

An event that comes in live is resolved against the catalogue of that moment and keeps those keys, whatever its item
becomes later. The warehouse writes them down as `category_key` and `creator_key`. A training or a rebuild that asked
today's catalogue instead would learn from other histories than are served: of items that were changed since, and of
events that came before their item was put.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.catalog_columns import CatalogColumns
from features.records import Records, make_records

KEYS = ("category_key", "creator_key")
"""The columns of `EVENTS` that hold the keys of an event: NULL if it was never resolved, 0 if its item had none."""

_LINE = np.dtype([("keys", "<u8", len(KEYS)), ("carried", "?", len(KEYS))])


@dataclass(frozen=True, slots=True)
class Logged:
    """The keys that events carry themselves.

    Attributes:
        keys: Category and creator of each event's item as the event came, 0 for none; uint64 [n, 2].
        carried: True for those that the event carries at all; bool [n, 2].
    """

    keys: npt.NDArray[np.uint64]
    carried: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, events: pa.Table) -> Logged:
        """Reads the columns `KEYS` of a table of n events."""
        columns = [events[name] for name in KEYS]
        keys = [pc.fill_null(column, 0).to_numpy() for column in columns]
        carried = [column.is_valid().to_numpy() for column in columns]
        return cls(np.stack(keys, 1).astype(np.uint64), np.stack(carried, 1).astype(np.bool_))

    def take(self, at: npt.NDArray[Any]) -> Logged:
        """Returns some of the rows, in the order of `at`."""
        return Logged(self.keys[at], self.carried[at])


class Distinct:
    """Numbers for the keys that events carry, equal for equal keys: four bytes an event. 0 is for no key at all."""

    def __init__(self) -> None:
        """Begins with the number 0."""
        self._numbers: dict[bytes, int] = {bytes(_LINE.itemsize): 0}

    def numbers(self, logged: Logged) -> npt.NDArray[np.int64]:
        """Returns the number of each line, new ones by first appearance; int64 [n]."""
        # Arrow encodes integers and no pairs, so the columns become one integer. It is made of codes, because two keys
        # of 64 bits would not fit into one.
        halves = [_encoded(column) for column in logged.keys.T]
        (categories, category), (creators, creator) = halves
        carried = logged.carried @ np.array([1, 2])
        codes, line_codes = _encoded((category * max(creators.size, 1) + creator) * 4 + carried)
        pair, bits = np.divmod(codes, 4)
        lines = np.zeros(codes.size, _LINE)
        lines["keys"][:, 0] = categories[pair // max(creators.size, 1)]
        lines["keys"][:, 1] = creators[pair % max(creators.size, 1)]
        lines["carried"] = bits[:, None] & np.array([1, 2])
        distinct = [self._numbers.setdefault(line.tobytes(), len(self._numbers)) for line in lines]
        return np.array(distinct, np.int64)[line_codes]

    def table(self) -> Logged:
        """Returns the keys of each number."""
        lines = np.frombuffer(b"".join(self._numbers), _LINE)
        return Logged(lines["keys"].copy(), lines["carried"].copy())


def _encoded(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Returns the distinct values by first appearance, and the place of each value among them; int64 [n]."""
    encoded: Any = pc.dictionary_encode(pa.array(np.ascontiguousarray(values)))
    return encoded.dictionary.to_numpy(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


class ItemRows(Protocol):
    """Finds the rows of items: a vocabulary, or a catalogue that is changed while it serves."""

    def rows_of_keys(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """Returns the row of each key, -1 if it is unknown; int32 [n]."""
        ...


def records_of(
    keys: npt.NDArray[np.uint64],
    event_types: npt.NDArray[np.uint32],
    timestamps: npt.ArrayLike,
    values: npt.ArrayLike,
    logged: Logged,
    items: ItemRows,
    columns: CatalogColumns,
) -> tuple[Records, npt.NDArray[np.int32]]:
    """Returns the records that ingest would have written of events, and the row of each one's item.

    Args:
        keys: Key of each event's item; uint64 [n].
        event_types: Key of each one's type; uint32 [n].
        timestamps: Times, ms; int64 [n] or one for all.
        values: Values, NaN for none; float32 [n].
        logged: The keys that the events carry.
        items: Finds the items.
        columns: The catalogue's columns, see `history_keys`.

    Returns:
        RECORD [n], and the rows, -1 for an item that is unknown; int32 [n].
    """
    rows = items.rows_of_keys(keys)
    return make_records(keys, *history_keys(rows, columns, logged), timestamps, values, event_types), rows


def history_keys(
    rows: npt.NDArray[np.int32], columns: CatalogColumns, logged: Logged
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Returns the category and the creator of events as every history has them; two uint64 [n].

    Args:
        rows: Row of each event's item, -1 if the catalogue does not know it; int32 [n].
        columns: The catalogue's columns: they answer for what an event does not carry itself.
        logged: The keys that the events carry.
    """
    in_catalog = rows >= 0
    resolved = []
    for place, column in enumerate((columns.category, columns.creator)):
        keys = np.zeros(rows.size, np.uint64)
        keys[in_catalog] = column[rows[in_catalog]]
        resolved.append(np.where(logged.carried[:, place], logged.keys[:, place], keys))
    return resolved[0], resolved[1]
