"""The columns of a catalogue: an array for each fact, a place in it for each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.keys import item_key, item_keys

_FOREVER = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True, slots=True)
class CatalogColumns:
    """The columns of a catalogue, each of length capacity (at least `Catalog.size`).

    Attributes:
        vectors: Item vectors; float32 [capacity, D].
        available: Whether the item may be shown at all; bool.
        available_from: First moment it may be shown, ms; int64.
        available_until: First moment it may no longer be shown, ms; int64.
        price: Price, NaN if unknown; float32.
        category: Key of the primary category, 0 for none; uint64.
        creator: Key of the creator, 0 for none; uint64.
        popularity: log1p of the number of events in training; float32.
        recent_popularity: log1p of the number of events in the last days of training; float32.
        trained: Whether the item was in the training data; bool.
        duration: Playing time, seconds, NaN if unknown; from the attribute `duration`; float32.
        statistics: Rates of actions on impressions of the item, its creator and its category, see
            `features.action_rates`; float32 [capacity, S], S = 0 if no impressions were logged.
        put_at: Time at which a live item was put, ms; 0 for the rows of the bundle; int64.
    """

    vectors: npt.NDArray[np.float32]
    available: npt.NDArray[np.bool_]
    available_from: npt.NDArray[np.int64]
    available_until: npt.NDArray[np.int64]
    price: npt.NDArray[np.float32]
    category: npt.NDArray[np.uint64]
    creator: npt.NDArray[np.uint64]
    popularity: npt.NDArray[np.float32]
    recent_popularity: npt.NDArray[np.float32]
    trained: npt.NDArray[np.bool_]
    duration: npt.NDArray[np.float32]
    statistics: npt.NDArray[np.float32]
    put_at: npt.NDArray[np.int64]

    @property
    def capacity(self) -> int:
        """The number of rows there is room for."""
        return self.available.size


def columns_of(items: pa.Table, vectors: npt.NDArray[np.float32]) -> CatalogColumns:
    """Returns the columns of a canonical items table in row order; missing ones get their neutral value."""
    count = items.num_rows
    lists = items.column("categories").to_pylist() if "categories" in items.column_names else [None] * count
    creators = items.column("creator_id").to_pylist() if "creator_id" in items.column_names else [None] * count
    return CatalogColumns(
        vectors=vectors,
        available=_values(items, "available", np.bool_, True),
        available_from=_values(items, "available_from", np.int64, 0),
        available_until=_values(items, "available_until", np.int64, _FOREVER),
        price=_values(items, "price", np.float32, np.nan),
        category=item_keys([names[0] if names else None for names in lists]),
        creator=item_keys(creators),
        popularity=_values(items, "popularity", np.float32, 0.0),
        recent_popularity=_values(items, "recent_popularity", np.float32, 0.0),
        trained=_values(items, "trained", np.bool_, True),
        duration=_durations(items),
        statistics=_statistics(items),
        put_at=np.zeros(count, np.int64),
    )


def seconds_of(text: str | None) -> float:
    """Returns the seconds that an attribute `duration` states; NaN if that is no number above 0."""
    try:
        seconds = float(text) if text else np.nan
    except ValueError:
        return np.nan
    return seconds if 0 < seconds < np.inf else np.nan


def _durations(items: pa.Table) -> npt.NDArray[np.float32]:
    if "attributes" not in items.column_names:
        return np.full(items.num_rows, np.nan, np.float32)
    durations = pc.map_lookup(items.column("attributes"), "duration", "last")
    return np.array([seconds_of(text) for text in durations.to_pylist()], np.float32)


def _statistics(items: pa.Table) -> npt.NDArray[np.float32]:
    if "statistics" not in items.column_names:
        return np.zeros((items.num_rows, 0), np.float32)
    column: Any = items.column("statistics").combine_chunks()
    return np.array(column.flatten().to_numpy(), np.float32).reshape(items.num_rows, column.type.list_size)


def group_keys(item: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the keys of an item's primary category and of its creator, 0 for none."""
    categories = item.get("categories")
    return item_key(categories[0]) if categories else 0, item_key(item.get("creator_id"))


def _values(items: pa.Table, name: str, dtype: type, default: Any) -> npt.NDArray[Any]:
    """Returns a writable numpy column; NULLs, and a column that is missing, become `default`."""
    if name not in items.column_names:
        return np.full(items.num_rows, default, dtype)
    # Copied: an array of Arrow cannot be written to, and live changes are.
    values = [default if value is None else value for value in items.column(name).to_pylist()]
    return np.array(values, dtype)


def grown(columns: CatalogColumns, capacity: int) -> CatalogColumns:
    """Returns the columns with room for `capacity` rows; the new ones are not available until they are filled."""

    def grow(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # A new array, because readers may hold the old one.
        larger = np.zeros((capacity, *column.shape[1:]), column.dtype)
        larger[: column.shape[0]] = column
        return larger

    fields = {field.name: grow(getattr(columns, field.name)) for field in dataclasses.fields(columns)}
    return CatalogColumns(**fields)


def fill(columns: CatalogColumns, row: int, item: Mapping[str, Any]) -> None:
    """Writes an item into its row, but for its vector, its statistics and its time."""
    price, available = item.get("price"), item.get("available")
    columns.price[row] = np.nan if price is None else price
    columns.category[row], columns.creator[row] = group_keys(item)
    columns.duration[row] = seconds_of(dict(item.get("attributes") or ()).get("duration"))
    until = item.get("available_until") or 0
    set_available(columns, row, available is not False, item.get("available_from") or 0, until)


def window(columns: CatalogColumns, row: int, name: str) -> bool | int:
    """Returns the value of a column about availability, 0 for a time that means always."""
    value: bool | int = getattr(columns, name)[row].item()
    return 0 if name == "available_until" and value == _FOREVER else value


def set_available(columns: CatalogColumns, row: int, available: bool, start: int, end: int) -> None:
    """Sets the availability of a row and its times, ms; 0 as an end means never."""
    # Unavailable first: a reader between two of these lines must not see an old flag with a new window.
    columns.available[row] = False
    columns.available_from[row] = start
    columns.available_until[row] = end or _FOREVER
    columns.available[row] = available
