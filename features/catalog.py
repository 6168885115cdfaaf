"""The catalogue by row: the availability of each item, its price, its creator, its place in the embedding space.

The rows of the bundle come first and are never moved; items put while the service runs get the rows after them. One
thread writes, many read: readers take `columns` once and see arrays that only ever grow past their `size`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.catalog_columns import (
    CatalogColumns,
    columns_of,
    fill,
    group_keys,
    grown,
    popular_order,
    set_available,
    window,
)
from features.declared import NONE_DECLARED, Declared
from features.eligibility import EligibleRows, Moments, moments_of
from features.item_prior import Firsts, ItemPrior, firsts_of
from features.keys import item_key, item_keys
from features.vocabulary import Vocabulary

_FIELDS = ("title", "description", "categories", "creator_id", "price", "parent_id", "attributes")
_WINDOW = ("available", "available_from", "available_until")
RECORD_FIELDS = (*_FIELDS, *_WINDOW)
"""Fields of an item that `Catalog.records` reads."""


@dataclass(frozen=True, slots=True)
class CatalogTables:
    """The tables that a catalogue computes of its items when it is made, for processes that share them.

    Attributes:
        columns: The columns; behind the rows of the bundle there may be room for live ones.
        moments: The moments at which rows begin or cease to be available.
        firsts: The first item of each creator and category.
        popular: The rows of the bundle, the most popular first; int32 [N].
    """

    columns: CatalogColumns
    moments: Moments
    firsts: Firsts
    popular: npt.NDArray[np.int32]

    @classmethod
    def of(cls, columns: CatalogColumns, count: int) -> CatalogTables:
        """Computes them from the columns of a bundle of `count` items."""
        moments = moments_of(columns.available_from[:count], columns.available_until[:count])
        firsts = firsts_of(columns.creator[:count], columns.category[:count])
        return cls(columns, moments, firsts, popular_order(columns, count))


class Catalog:
    """Items by row, with live additions.

    Attributes:
        vocabulary: The ids of the bundle's items.
        base_size: Number of the bundle's items.
        size: Number of all items.
        columns: The facts of all items, by row.
        popular: The rows of the bundle, the most popular in training first; int32 [base_size].
        puts: Number of calls that put items: an order of them by age is right as long as this is the same.
    """

    def __init__(
        self,
        items: pa.Table,
        vocabulary: Vocabulary,
        vectors: npt.NDArray[np.float32],
        tables: CatalogTables | None = None,
        declared: Declared = NONE_DECLARED,
    ) -> None:
        """Takes the items of a bundle.

        Args:
            items: The canonical table in row order, with `popularity`, `recent_popularity`, `trained`, and `statistics`
                if the run measured them.
            vocabulary: Their ids, in the same order.
            vectors: Their vectors; float32 [N, D].
            tables: What was computed of them before; by default it is computed here.
            declared: The declared features, by which live items get theirs.

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
        self._declared = declared
        self.puts = 0
        if tables is None:
            tables = CatalogTables.of(columns_of(items, vectors), items.num_rows)
        self.columns = tables.columns
        self.popular = tables.popular
        self._eligible = EligibleRows(tables.moments)
        self._prior = ItemPrior(tables.columns, tables.firsts)

    def rows(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """Returns the row of each id, -1 if it is unknown; int32 [n]."""
        return self.rows_of_keys(item_keys(ids))

    def rows_of_keys(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """Returns the row of each key, -1 if it is unknown; int32 [n]."""
        rows = self.vocabulary.rows_of_keys(keys)
        # Live items are few, and so are unknown keys: a loop over these costs less than a second sorted table.
        if self._live_rows:
            for at in np.flatnonzero(rows < 0):
                rows[at] = self._live_rows.get(int(keys[at]), -1)
        return rows

    def rows_with(self, column: str, keys: Sequence[int]) -> dict[int, int]:
        """Returns the row of an item that has a key in `column` ("category", "creator", "item"), by key.

        A key that no item has is left out. Looks at the first item that the bundle has of each key, and at those that
        were put since; at every item only if the first one has got another key.
        """
        if column == "item":
            rows = self.rows_of_keys(np.array(keys, np.uint64)).tolist()
            return {key: row for key, row in zip(keys, rows, strict=True) if row >= 0}
        live = list(self._live)  # first: columns read after it have room for all of them
        values: npt.NDArray[np.uint64] = getattr(self.columns, column)
        put = {int(values[row]): row for row in live}
        rows_by_key: dict[int, int] = {}
        for key in keys:
            row = self._prior.first(column, key)
            if row >= 0 and int(values[row]) != key and key not in put:
                row = int(np.argmax(values[: self.size] == np.uint64(key)))
            row = put.get(key, row)
            if row >= 0 and int(values[row]) == key:
                rows_by_key[key] = row
        return rows_by_key

    def names(self, kind: str) -> pa.ChunkedArray[Any]:
        """Returns the names of a kind ("item", "creator" or first "category") that items have, or had in the bundle.

        Some may be there more than once. Not for the hot path: it reads every item.
        """
        live = [self._live[row] for row in list(self._live)]
        column = {"item": "item_id", "creator": "creator_id", "category": "categories"}[kind]
        put = [item[column] for item in live if item[column]]
        base = self._items[column] if column in self._items.column_names else pa.chunked_array([], pa.string())
        if kind == "category":
            put = [names[0] for names in put]
            # One row of each category will do: a catalogue has few of them, and many items of each.
            first = [names[0] for names in base.take(self._prior.rows("category")).to_pylist() if names]
            base = pa.chunked_array([pa.array(first, pa.string())])
        return pa.chunked_array([*base.drop_null().chunks, pa.array(put, pa.string())], pa.string())

    def category_and_creator(self, key: int) -> tuple[int, int] | None:
        """Returns the keys of category and creator that an item has now, 0 for none; None if the item is unknown."""
        row = self.vocabulary.row_of_key(key)
        if row < 0 and (row := self._live_rows.get(key, -1)) < 0:
            return None
        return int(self.columns.category[row]), int(self.columns.creator[row])

    def ids(self, rows: npt.ArrayLike) -> list[str]:
        """Returns the ids of `rows`, each in [0, size)."""
        places = np.asarray(rows, np.int64)
        if not places.size or places.max() < self.base_size:
            return self.vocabulary.ids(places)
        return [
            self._live_ids[row - self.base_size] if row >= self.base_size else self.vocabulary.ids([row])[0]
            for row in places.tolist()
        ]

    def item(self, row: int) -> dict[str, Any]:
        """Returns an item as a row of the canonical table; not for the hot path."""
        if row in self._live:
            return dict(self._live[row])
        item: dict[str, Any] = self._items.slice(row, 1).to_pylist()[0]
        return item

    def record(self, row: int) -> dict[str, Any]:
        """Returns an item as it is now: `item` with its present availability, 0 for a time that means always."""
        return self.records_now([row])[0]

    def records_now(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Returns items as `record` does: a read of many costs little more than one of a single item."""
        named = zip(self.ids(rows), self.records(rows, RECORD_FIELDS), strict=True)
        return [{"item_id": name, **record} for name, record in named]

    def records(self, rows: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any]]:
        """Returns some fields of some items as they are now; items of the bundle are read a column at a time.

        Args:
            rows: Rows, each in [0, size).
            fields: Names of `RECORD_FIELDS`.

        Returns:
            For each row the fields, None if the item has none; `attributes` is a dictionary.
        """
        columns = self.columns  # once: they may grow meanwhile
        texts = [name for name in fields if name not in _WINDOW]
        names = [name for name in texts if name in self._items.column_names]
        base = [row for row in rows if row not in self._live]
        table = (
            self._items.select(names).take(base).to_pylist(maps_as_pydicts="lossy")
            if base and names
            else ({},) * len(base)
        )
        base_items = dict(zip(base, table, strict=True))
        records = []
        for row in rows:
            item = base_items[row] if row in base_items else self._live[row]
            record = {name: item.get(name) for name in texts}
            if "attributes" in record:
                record["attributes"] = dict(record["attributes"] or {})
            records.append(record | {name: window(columns, row, name) for name in fields if name in _WINDOW})
        return records

    def eligible(self, rows: npt.NDArray[np.integer[Any]], now_ms: int) -> npt.NDArray[np.bool_]:
        """Returns True for each of `rows` that may be shown now; bool [n]."""
        columns = self.columns
        begun: npt.NDArray[np.bool_] = np.less_equal(columns.available_from[rows], now_ms)
        running: npt.NDArray[np.bool_] = np.less(now_ms, columns.available_until[rows])
        available: npt.NDArray[np.bool_] = columns.available[rows]
        return available & begun & running

    def eligible_bitmap(self, now_ms: int) -> npt.NDArray[np.uint8]:
        """Returns the rows that may be shown now, one bit a row, lowest bit first; uint8 [ceil(size / 8)].

        A hint for retrieval, which later changes alter in place; `eligible` has the last word. Read only.
        """
        return self.eligible_rows(now_ms)[0]

    def eligible_rows(self, now_ms: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Returns `eligible_bitmap`, and the number of rows in it, without a pass over the rows."""
        size = self.size  # first: columns read after it are at least as new
        return self._eligible.at(self.columns, size, now_ms)

    def replace(self, row: int, item: Mapping[str, Any], vector: npt.NDArray[np.float32]) -> None:
        """Changes the fields of an item; it stays as new as it was.

        Args:
            row: The row of the item.
            item: The item with its new values, see `records_now`; None if it has none any more.
            vector: The vector by content of the changed item; float32 [D].
        """
        with self._lock:
            self._put_one(item, vector, int(self.columns.put_at[row]))

    def put(
        self, items: Sequence[Mapping[str, Any]], vectors: npt.NDArray[np.float32], now_ms: int
    ) -> npt.NDArray[np.int32]:
        """Puts items, new or changed; a row of the bundle keeps its trained vector.

        Args:
            items: Rows of the canonical table.
            vectors: Their vectors by content; float32 [n, D].
            now_ms: Time at which they were put, ms.

        Returns:
            Their rows; int32 [n].
        """
        with self._lock:
            rows = [self._put_one(item, vectors[at], now_ms) for at, item in enumerate(items)]
            self.puts += 1
        return np.array(rows, np.int32)

    def set_available(self, row: int, available: bool, available_from: int = 0, available_until: int = 0) -> None:
        """Sets whether and when the item of `row` may be shown; 0 as a time means always."""
        with self._lock:
            set_available(self.columns, row, available, available_from, available_until)
            self._eligible.changed(self.columns, row, self.size)

    def delete(self, row: int) -> None:
        """Makes the item of `row` unavailable, until it is put again."""
        self.set_available(row, False)

    def _put_one(self, item: Mapping[str, Any], vector: npt.NDArray[np.float32], now_ms: int) -> int:
        key = item_key(item["item_id"])
        row = int(self.rows_of_keys(np.array([key], np.uint64))[0])
        new = row < 0
        if new:
            row = self.size
            # By a quarter, so that putting many items one by one copies each row only a few times.
            if row >= self.columns.capacity:
                self.columns = grown(self.columns, row + max(1024, row // 4))
        columns = self.columns
        # A row of the bundle keeps its vector: it learned from events, and this one comes from content alone.
        if row >= self.base_size:
            columns.vectors[row] = vector
            columns.put_at[row] = now_ms
            columns.statistics[row] = self._prior.statistics(*group_keys(item))
        fill(columns, row, item)
        # Rows of the bundle as well: a patch may change the price or the attribute that a feature reads.
        if self._declared.item_width:
            columns.declared[row] = self._declared.item_values(_as_table(item))[0]
        self._live[row] = {"item_id": item["item_id"], **{name: item.get(name) for name in _FIELDS}}
        if new:
            self._live_ids.append(item["item_id"])
            self.size = row + 1
            # Last, so that a reader that finds the row finds all of its values.
            self._live_rows[key] = row
        self._eligible.changed(columns, row, self.size)
        return row


def _as_table(item: Mapping[str, Any]) -> pa.Table:
    """Returns what declared features read of an item as a canonical table of one row."""
    attributes = list(dict(item.get("attributes") or {}).items())
    return pa.table(
        {
            "price": pa.array([item.get("price")], pa.float32()),
            "creator_id": pa.array([item.get("creator_id")], pa.string()),
            "categories": pa.array([item.get("categories")], pa.list_(pa.string())),
            "attributes": pa.array([attributes], pa.map_(pa.string(), pa.string())),
        }
    )
