"""The catalogue by row: what may be shown, what it costs, who made it, where it lies in the embedding space.

The rows of the bundle come first and are never moved; items put while the service runs get the rows behind them. One
thread writes, many read: readers take `columns` once and see arrays that only ever grow behind their `size`.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.keys import item_key, item_keys
from features.vocabulary import Vocabulary

_FOREVER = np.iinfo(np.int64).max
_FIELDS = ("title", "description", "categories", "creator_id", "price", "parent_id", "attributes")
_WINDOW = ("available", "available_from", "available_until")
RECORD_FIELDS = (*_FIELDS, *_WINDOW)
"""What `Catalog.records` tells of an item."""


@dataclasses.dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a catalogue, each of length capacity (at least `Catalog.size`).

    Attributes:
        vectors: Item vectors; float32 [capacity, D].
        available: Whether the item may be shown at all; bool.
        available_from: First moment it may be shown, ms; int64.
        available_until: First moment it may no longer be shown, ms; int64.
        price: Price, NaN where unknown; float32.
        category: Key of the primary category, 0 where there is none; uint64.
        creator: Key of the creator, 0 where there is none; uint64.
        popularity: log1p of the number of events in training; float32.
        recent_popularity: log1p of the number of events in the last days of training; float32.
        trained: Whether the item was in the training data; bool.
        duration: Playing time, seconds, NaN where unknown; from the attribute `duration`; float32.
        statistics: What people did with the item when it was shown, see `features.action_rates`; float32 [capacity, S],
            S = 0 where nobody wrote down what was shown.
        put_at: When a live item was put, ms; 0 for the rows of the bundle; int64.
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


class Catalog:
    """Items by row, with live additions."""

    def __init__(self, items: pa.Table, vocabulary: Vocabulary, vectors: npt.NDArray[np.float32]) -> None:
        """Takes the items of a bundle.

        Args:
            items: The canonical table in row order, with `popularity`, `recent_popularity`, `trained` and
                `statistics` where known.
            vocabulary: Their ids, in the same order.
            vectors: Their vectors; float32 [N, D].

        Raises:
            ValueError: The three do not have the same length.
        """
        if not items.num_rows == len(vocabulary) == vectors.shape[0]:
            raise ValueError(f"{items.num_rows} items, {len(vocabulary)} ids and {vectors.shape[0]} vectors do not fit")
        self.vocabulary = vocabulary
        self.base_size = self.size = items.num_rows
        self._items = items
        self._live: dict[int, dict[str, Any]] = {}
        self._live_rows: dict[int, int] = {}
        self._live_ids: list[str] = []
        self._lock = threading.Lock()
        self._change = 0
        self._bitmap: tuple[int, int, npt.NDArray[np.uint8]] | None = None
        self.columns = columns_of(items, vectors)
        self._kin = ItemPrior(self.columns)

    @property
    def change(self) -> int:
        """The number of changes so far: what was made of the catalogue at another number may be out of date."""
        return self._change

    def rows(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """The row of each id, -1 where it is unknown; int32 [n]."""
        return self.rows_of_keys(item_keys(ids))

    def rows_of_keys(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """The row of each key, -1 where it is unknown; int32 [n]."""
        rows = self.vocabulary.rows_of_keys(keys)
        if self._live_rows:
            for at in np.flatnonzero(rows < 0):
                rows[at] = self._live_rows.get(int(keys[at]), -1)
        return rows

    def rows_with(self, column: str, keys: Sequence[int]) -> dict[int, int]:
        """The row of an item that has a key in `column` ("category", "creator", "item"), by key; none if none has it.

        Looks at the first item that the bundle has of each key, and at those that were put since; at every item only
        where the first one has been given another key.
        """
        if column == "item":
            rows = self.rows_of_keys(np.array(keys, np.uint64)).tolist()
            return {key: row for key, row in zip(keys, rows, strict=True) if row >= 0}
        live = list(self._live)  # first: columns read after it have room for all of them
        values: npt.NDArray[np.uint64] = getattr(self.columns, column)
        put = {int(values[row]): row for row in live}
        found: dict[int, int] = {}
        for key in keys:
            row = self._kin.first(column, key)
            if row >= 0 and int(values[row]) != key and key not in put:
                row = int(np.argmax(values == np.uint64(key)))
            row = put.get(key, row)
            if row >= 0 and int(values[row]) == key:
                found[key] = row
        return found

    def names(self, kind: str) -> pa.ChunkedArray[Any]:
        """The names of a kind that items have, or had in the bundle: "item", "creator" or "category" (the first).

        Some may be there more than once. Not for the hot path: it reads every item.
        """
        live = [self._live[row] for row in list(self._live)]
        column = {"item": "item_id", "creator": "creator_id", "category": "categories"}[kind]
        put = [item[column] for item in live if item[column]]
        held = self._items[column] if column in self._items.column_names else pa.chunked_array([], pa.string())
        if kind == "category":
            put = [names[0] for names in put]
            first = [names[0] for names in held.take(self._kin.rows("category")).to_pylist() if names]
            held = pa.chunked_array([pa.array(first, pa.string())])
        return pa.chunked_array([*held.drop_null().chunks, pa.array(put, pa.string())], pa.string())

    def kin_of(self, key: int) -> tuple[int, int] | None:
        """The category and the creator that the item of a key has now, 0 for none; None where it is unknown."""
        row = self.vocabulary.row_of_key(key)
        if row < 0 and (row := self._live_rows.get(key, -1)) < 0:
            return None
        return int(self.columns.category[row]), int(self.columns.creator[row])

    def ids(self, rows: npt.ArrayLike) -> list[str]:
        """The ids of `rows`, each in [0, size)."""
        wanted = np.asarray(rows, np.int64)
        if not wanted.size or wanted.max() < self.base_size:
            return self.vocabulary.ids(wanted)
        return [
            self._live_ids[row - self.base_size] if row >= self.base_size else self.vocabulary.ids([row])[0]
            for row in wanted.tolist()
        ]

    def item(self, row: int) -> dict[str, Any]:
        """An item as a row of the canonical table, for people to read; not for the hot path."""
        if row in self._live:
            return dict(self._live[row])
        item: dict[str, Any] = self._items.slice(row, 1).to_pylist()[0]
        return item

    def record(self, row: int) -> dict[str, Any]:
        """An item as it is now: `item` with its present availability, 0 where a time means always."""
        [record] = self.records([row], RECORD_FIELDS)
        return {"item_id": self.ids([row])[0], **record}

    def records(self, rows: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        """Some fields of some items as they are now, the items of the bundle read a column at a time.

        Args:
            rows: Rows, each in [0, size).
            fields: Names of `RECORD_FIELDS`.

        Returns:
            For each row the fields, None where the item has none; `attributes` is a dictionary.
        """
        columns = self.columns  # once: they may grow meanwhile
        texts = [name for name in fields if name not in _WINDOW]
        held = [name for name in texts if name in self._items.column_names]
        base = [row for row in rows if row not in self._live]
        table = (
            self._items.select(held).take(base).to_pylist(maps_as_pydicts="lossy")
            if base and held
            else ({},) * len(base)
        )
        read = dict(zip(base, table, strict=True))
        found = []
        for row in rows:
            item = read[row] if row in read else self._live[row]
            record = {name: item.get(name) for name in texts}
            if "attributes" in record:
                record["attributes"] = dict(record["attributes"] or {})
            found.append(record | {name: _window(columns, row, name) for name in fields if name in _WINDOW})
        return found

    def eligible(self, rows: npt.NDArray[np.integer[Any]], now_ms: int) -> npt.NDArray[np.bool_]:
        """Which of `rows` may be shown now; bool [n]."""
        columns = self.columns
        begun: npt.NDArray[np.bool_] = np.less_equal(columns.available_from[rows], now_ms)
        running: npt.NDArray[np.bool_] = np.less(now_ms, columns.available_until[rows])
        available: npt.NDArray[np.bool_] = columns.available[rows]
        return available & begun & running

    def eligible_bitmap(self, now_ms: int) -> npt.NDArray[np.uint8]:
        """Which rows may be shown in this second, one bit a row, lowest bit first; uint8 [ceil(size / 8)].

        A hint for retrieval, made once a second and after each change; `eligible` has the last word. Read only.
        """
        change, second = self._change, now_ms // 1000
        known = self._bitmap
        if known is None or known[0] != change or known[1] != second:
            # The size first: columns read after it are at least as new.
            size, columns = self.size, self.columns
            shown = columns.available[:size] & (columns.available_from[:size] <= now_ms)
            bits = np.packbits(shown & (now_ms < columns.available_until[:size]), bitorder="little")
            bits.flags.writeable = False
            self._bitmap = known = (change, second, bits)
        return known[2]

    def patch(self, row: int, fields: Mapping[str, Any], vector: npt.NDArray[np.float32]) -> None:
        """Changes some fields of an item; it stays as new as it was.

        Args:
            row: The row of the item.
            fields: The new values, names of `RECORD_FIELDS`; None where the item has none any more.
            vector: The vector by content of the item as it is then; float32 [D].
        """
        with self._lock:
            item = {**self.record(row), **fields}
            self._put_one(item, vector, int(self.columns.put_at[row]))
            self._change += 1

    def put(
        self, items: Sequence[Mapping[str, Any]], vectors: npt.NDArray[np.float32], now_ms: int
    ) -> npt.NDArray[np.int32]:
        """Puts items, new or changed; a row of the bundle keeps its trained vector.

        Args:
            items: Rows of the canonical table.
            vectors: Their vectors by content; float32 [n, D].
            now_ms: When they were put, ms.

        Returns:
            Their rows; int32 [n].
        """
        with self._lock:
            rows = [self._put_one(item, vectors[at], now_ms) for at, item in enumerate(items)]
            self._change += 1
        return np.array(rows, np.int32)

    def set_available(self, row: int, available: bool, available_from: int = 0, available_until: int = 0) -> None:
        """Sets whether and when the item of `row` may be shown; 0 as a time means always."""
        with self._lock:
            _set_available(self.columns, row, available, available_from, available_until)
            self._change += 1

    def delete(self, row: int) -> None:
        """Never shows the item of `row` again, unless it is put again."""
        self.set_available(row, False)

    def _put_one(self, item: Mapping[str, Any], vector: npt.NDArray[np.float32], now_ms: int) -> int:
        key = item_key(item["item_id"])
        row = int(self.rows_of_keys(np.array([key], np.uint64))[0])
        new = row < 0
        if new:
            row = self.size
            if row >= self.columns.capacity:
                self.columns = _grown(self.columns, row + max(1024, row // 4))
        columns = self.columns
        if row >= self.base_size:
            columns.vectors[row] = vector
            columns.put_at[row] = now_ms
            columns.statistics[row] = self._kin.statistics(*_keys(item))
        _fill(columns, row, item)
        self._live[row] = {"item_id": item["item_id"], **{name: item.get(name) for name in _FIELDS}}
        if new:
            self._live_ids.append(item["item_id"])
            self.size = row + 1
            # Last, so that whoever finds the row finds everything behind it.
            self._live_rows[key] = row
        return row


def columns_of(items: pa.Table, vectors: npt.NDArray[np.float32]) -> Columns:
    """The columns of a canonical items table in row order; missing ones get their neutral value."""
    count = items.num_rows
    lists = items.column("categories").to_pylist() if "categories" in items.column_names else [None] * count
    creators = items.column("creator_id").to_pylist() if "creator_id" in items.column_names else [None] * count
    return Columns(
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


class ItemPrior:
    """What the statistics of an item's creator and category say of an item that nobody was shown yet."""

    def __init__(self, columns: Columns) -> None:
        self._statistics = columns.statistics
        self._first = {name: np.unique(getattr(columns, name), return_index=True) for name in ("creator", "category")}

    def statistics(self, category: int, creator: int) -> npt.NDArray[np.float32]:
        """The statistics of a new item, float32 [S]; zeros, which mean nothing known, where it has no kin."""
        out = np.zeros(self._statistics.shape[1], np.float32)
        item, of_creator, of_category = blocks(out)
        like_creator, like_category = self._relative("creator", creator), self._relative("category", category)
        if like_category is not None:
            of_category[:] = blocks(like_category)[2]
            of_creator[:] = item[:] = of_category
        if like_creator is not None:
            out[1:2] = like_creator[1:2]
            of_creator[:] = item[:] = blocks(like_creator)[1]
        return out

    def rows(self, name: str) -> npt.NDArray[np.int64]:
        """One row of the bundle for each "creator" or "category" that its items have; int64 [n]."""
        keys, rows = self._first[name]
        named: npt.NDArray[np.int64] = rows[keys != 0]
        return named

    def first(self, name: str, key: int) -> int:
        """The first row of the bundle that had `key` as its "creator" or "category"; -1 where none had."""
        keys, rows = self._first[name]
        at = int(np.searchsorted(keys, np.uint64(key)))
        return int(rows[at]) if key and at < keys.size and int(keys[at]) == key else -1

    def _relative(self, name: str, key: int) -> npt.NDArray[np.float32] | None:
        row = self.first(name, key)
        return self._statistics[row] if row >= 0 else None


def blocks(
    statistics: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The parts of statistics `[..., S]` that hold the rates of the item, its creator and its category `[..., A]`."""
    rates = statistics[..., 2:]
    actions = rates.shape[-1] // 3
    return rates[..., :actions], rates[..., actions : 2 * actions], rates[..., 2 * actions :]


def seconds_of(text: str | None) -> float:
    """What an attribute `duration` says; NaN where that is no number of seconds above 0."""
    try:
        seconds = float(text) if text else np.nan
    except ValueError:
        return np.nan
    return seconds if 0 < seconds < np.inf else np.nan


def _durations(items: pa.Table) -> npt.NDArray[np.float32]:
    if "attributes" not in items.column_names:
        return np.full(items.num_rows, np.nan, np.float32)
    found = pc.map_lookup(items.column("attributes"), "duration", "last")
    return np.array([seconds_of(text) for text in found.to_pylist()], np.float32)


def _statistics(items: pa.Table) -> npt.NDArray[np.float32]:
    if "statistics" not in items.column_names:
        return np.zeros((items.num_rows, 0), np.float32)
    column: Any = items.column("statistics").combine_chunks()
    return np.array(column.flatten().to_numpy(), np.float32).reshape(items.num_rows, column.type.list_size)


def _keys(item: Mapping[str, Any]) -> tuple[int, int]:
    """The keys of an item's primary category and of its creator, 0 where it has none."""
    categories = item.get("categories")
    return item_key(categories[0]) if categories else 0, item_key(item.get("creator_id"))


def _values(items: pa.Table, name: str, dtype: type, default: Any) -> npt.NDArray[Any]:
    """A writable numpy column, NULLs and a missing column replaced by `default`."""
    if name not in items.column_names:
        return np.full(items.num_rows, default, dtype)
    values = [default if value is None else value for value in items.column(name).to_pylist()]
    return np.array(values, dtype)


def _grown(columns: Columns, capacity: int) -> Columns:
    """The same columns with room for `capacity` rows; the new ones are not available until they are filled."""

    def grow(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
        larger = np.zeros((capacity, *column.shape[1:]), column.dtype)
        larger[: column.shape[0]] = column
        return larger

    fields = {field.name: grow(getattr(columns, field.name)) for field in dataclasses.fields(columns)}
    return Columns(**fields)


def _fill(columns: Columns, row: int, item: Mapping[str, Any]) -> None:
    price, available = item.get("price"), item.get("available")
    columns.price[row] = np.nan if price is None else price
    columns.category[row], columns.creator[row] = _keys(item)
    columns.duration[row] = seconds_of(dict(item.get("attributes") or ()).get("duration"))
    until = item.get("available_until") or 0
    _set_available(columns, row, available is not False, item.get("available_from") or 0, until)


def _window(columns: Columns, row: int, name: str) -> bool | int:
    """When an item may be shown: one of `_WINDOW`, 0 for a time that means always."""
    value: bool | int = getattr(columns, name)[row].item()
    return 0 if name == "available_until" and value == _FOREVER else value


def _set_available(columns: Columns, row: int, available: bool, start: int, end: int) -> None:
    # Hidden first: a reader between two of these lines must not see an old flag with a new window.
    columns.available[row] = False
    columns.available_from[row] = start
    columns.available_until[row] = end or _FOREVER
    columns.available[row] = available
