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

FOREVER = np.iinfo(np.int64).max


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
        declared: Declared features of the item, see `features.declared`; float32 [capacity, K], K = 0 without any.
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
    declared: npt.NDArray[np.float32]
    put_at: npt.NDArray[np.int64]

    @property
    def capacity(self) -> int:
        """The number of rows there is room for."""
        return self.available.size


def columns_of(items: pa.Table, vectors: npt.NDArray[np.float32]) -> CatalogColumns:
    """Returns the columns of a canonical items table in row order; missing ones get their neutral value."""
    return CatalogColumns(vectors=vectors, **facts_of(items))


def facts_of(items: pa.Table) -> dict[str, npt.NDArray[Any]]:
    """Returns the columns of `CatalogColumns` by name, but for the vectors, from a canonical table in row order."""
    return {
        "available": _values(items, "available", np.bool_, True),
        "available_from": _values(items, "available_from", np.int64, 0),
        "available_until": _values(items, "available_until", np.int64, FOREVER),
        "price": _values(items, "price", np.float32, np.nan),
        "category": _keys_of(_first(items, "categories")),
        "creator": _keys_of(_column(items, "creator_id")),
        "popularity": _values(items, "popularity", np.float32, 0.0),
        "recent_popularity": _values(items, "recent_popularity", np.float32, 0.0),
        "trained": _values(items, "trained", np.bool_, True),
        "duration": _durations(items),
        "statistics": _lists(items, "statistics"),
        "declared": _lists(items, "declared"),
        "put_at": np.zeros(items.num_rows, np.int64),
    }


def popularity_score(columns: CatalogColumns, at: npt.NDArray[np.integer[Any]] | slice) -> npt.NDArray[np.float32]:
    """Returns the popularity of some rows in training: recent, and where that is equal overall; float32 [n]."""
    # Overall popularity only breaks the ties of recent popularity.
    return (columns.recent_popularity[at] + 1e-3 * columns.popularity[at]).astype(np.float32)


def popular_order(columns: CatalogColumns, count: int) -> npt.NDArray[np.int32]:
    """Returns the first `count` rows, the most popular first, ties by row; int32 [count]."""
    return np.argsort(-popularity_score(columns, slice(count)), kind="stable").astype(np.int32)


def seconds_of(text: str | None) -> float:
    """Returns the seconds that an attribute `duration` states; NaN if that is no number above 0."""
    try:
        seconds = float(text) if text else np.nan
    except ValueError:
        return np.nan
    return seconds if 0 < seconds < np.inf else np.nan


def _column(items: pa.Table, name: str) -> pa.ChunkedArray[Any]:
    """Returns a column of text; NULLs if it is missing."""
    if name in items.column_names:
        return items.column(name)
    return pa.chunked_array([pa.nulls(items.num_rows, pa.string())])


def _first(items: pa.Table, name: str) -> pa.ChunkedArray[Any]:
    """Returns the first entry of each list of a column of text, NULL if it has none."""
    if name not in items.column_names:
        return _column(items, name)
    parts = []
    chunks: list[Any] = items.column(name).chunks
    for chunk in chunks:
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
        starts = chunk.offsets.to_numpy()[:-1]
        parts.append(chunk.values.take(pa.array(starts, mask=lengths == 0)))
    return pa.chunked_array(parts, pa.string())


def encoded_texts(texts: pa.ChunkedArray[Any]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Returns the distinct texts of a column, and the place of each row's text among them, -1 for NULL; int64 [n]."""
    encoded: Any = texts.dictionary_encode().unify_dictionaries()
    if not encoded.num_chunks:
        return [], np.empty(0, np.int64)
    indices = pa.chunked_array([chunk.indices for chunk in encoded.chunks])
    places = pc.fill_null(indices, -1).to_numpy().astype(np.int64)
    return encoded.chunk(0).dictionary.to_pylist(), places


def _keys_of(texts: pa.ChunkedArray[Any]) -> npt.NDArray[np.uint64]:
    """Returns the key of each text, 0 for none; uint64 [n]. Each distinct text is hashed once."""
    names, places = encoded_texts(texts)
    return np.append(item_keys(names), np.uint64(0))[places]


def _durations(items: pa.Table) -> npt.NDArray[np.float32]:
    if "attributes" not in items.column_names:
        return np.full(items.num_rows, np.nan, np.float32)
    names, places = encoded_texts(pc.map_lookup(items.column("attributes"), "duration", "last"))
    return np.append(np.array([seconds_of(name) for name in names], np.float32), np.float32(np.nan))[places]


def _lists(items: pa.Table, name: str) -> npt.NDArray[np.float32]:
    """Returns a column of lists of one length; float32 [n, length], length 0 if it is missing."""
    if name not in items.column_names:
        return np.zeros((items.num_rows, 0), np.float32)
    column: Any = items.column(name).combine_chunks()
    return np.array(column.flatten().to_numpy(), np.float32).reshape(items.num_rows, column.type.list_size)


def with_lists(items: pa.Table, name: str, numbers: npt.NDArray[np.float32]) -> pa.Table:
    """Returns items with one more column, the numbers of each row as a list; float32 [n, length]."""
    flat = pa.array(np.ascontiguousarray(numbers, np.float32).reshape(-1))
    return items.append_column(name, pa.FixedSizeListArray.from_arrays(flat, numbers.shape[1]))


def group_keys(item: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the keys of an item's primary category and of its creator, 0 for none."""
    categories = item.get("categories")
    return item_key(categories[0]) if categories else 0, item_key(item.get("creator_id"))


def _values(items: pa.Table, name: str, dtype: type, default: Any) -> npt.NDArray[Any]:
    """Returns a writable numpy column; NULLs, and a column that is missing, become `default`."""
    if name not in items.column_names:
        return np.full(items.num_rows, default, dtype)
    column = items.column(name)
    # Copied: an array of Arrow cannot be written to, and live changes are.
    values: npt.NDArray[Any] = np.array(pc.fill_null(column, pa.scalar(default, column.type)).to_numpy(), dtype)
    return values


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
    return 0 if name == "available_until" and value == FOREVER else value


def set_available(columns: CatalogColumns, row: int, available: bool, start: int, end: int) -> None:
    """Sets the availability of a row and its times, ms; 0 as an end means never."""
    # Unavailable first: a reader between two of these lines must not see an old flag with a new window.
    columns.available[row] = False
    columns.available_from[row] = start
    columns.available_until[row] = end or FOREVER
    columns.available[row] = available
