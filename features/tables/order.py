"""The content of a table, apart from the files that store it: the order of a user's events, and a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import Array, pc
from features.keys import item_keys

ORDER_COLUMNS = ("log_id", "timestamp", "sequence")
"""Columns that say in which order a user's events happened, the surest first."""


def order_events(events: pa.Table, seed: int = 0) -> pa.Table:
    """Puts each user's events together, oldest first; users come in the order of their first row.

    A user's order is `log_id`, then `timestamp`, then `sequence`, where the table has them. Ties are broken by a
    seeded hash of user and item, because a file's own order inside one second may be the same for all users, which a
    model would learn (MovieLens' is). The result depends on the rows alone, so ordering twice changes nothing.
    """
    users, user_codes = codes(events["user_id"])
    items, item_codes = codes(events["item_id"])
    keys = [user_codes, *event_keys(events, item_keys(users)[user_codes], item_keys(items)[item_codes], seed)]
    # A check is one pass over the keys; sorting a table that is in order would copy all of its columns.
    return events if _is_sorted(keys) else select(events, np.lexsort(keys[::-1]))


def event_keys(
    events: pa.Table, users: npt.NDArray[np.uint64], items: npt.NDArray[np.uint64], seed: int = 0
) -> list[npt.NDArray[Any]]:
    """Returns the sort keys of one user's events, the first array counting most; `users` and `items` are rows' keys."""
    return [*(_filled(events[name]) for name in ORDER_COLUMNS), _mix(users ^ items ^ np.uint64(seed))]


class ColumnSource(Protocol):
    """Columns that can be read more than once, from memory or from files."""

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        ...

    @property
    def present(self) -> Sequence[str]:
        """The columns that have a value in some row."""
        ...

    def column(self, name: str) -> Iterable[pa.ChunkedArray[Any]]:
        """One column, in parts."""
        ...


class _Held:
    """A table in memory as `ColumnSource`."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.num_rows = table, table.num_rows
        self.present = [name for name in table.column_names if is_present(table[name])]

    def column(self, name: str) -> list[pa.ChunkedArray[Any]]:
        return [self.table[name]]


def fingerprint(tables: Mapping[str, pa.Table | ColumnSource]) -> str:
    """Returns the SHA-256 of the rows of tables, whatever the files, chunks and Parquet version that held them."""
    hasher = hashlib.sha256()
    for name, table in tables.items():
        columns: ColumnSource = _Held(table) if isinstance(table, pa.Table) else table
        for column in columns.present:
            # With the number of rows, so that the bytes of one column cannot be taken for the beginning of the next.
            hasher.update(f"{name}.{column}:{columns.num_rows}\n".encode())
            _hash(hasher, partial(_chunks, columns, column))
    return hasher.hexdigest()


def _chunks(columns: ColumnSource, name: str) -> Iterator[Array]:
    return (chunk for part in columns.column(name) for chunk in part.chunks)


def codes(column: pa.ChunkedArray[Any]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Returns the distinct texts in the order of their first row, and for each row the position of its text."""
    encoded: Array = pc.dictionary_encode(column.combine_chunks())
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)


def is_present(column: pa.ChunkedArray[Any]) -> bool:
    """Returns True if any row has a value; a column without one is only there to complete the schema."""
    return column.null_count < len(column)


def select(table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Returns the rows in the order of `rows`; columns without values cost nothing."""
    index: Array = pa.array(rows)
    columns = [c.take(index) if is_present(c) else c.slice(0, len(rows)) for c in table.itercolumns()]
    return pa.table(columns, schema=table.schema)


def nulls(length: int, dtype: Any) -> pa.ChunkedArray[Any]:
    """Returns a column of NULLs whose chunks share one small piece of memory."""
    block: Array = pa.nulls(min(length, 1 << 16), dtype)
    whole, remainder = divmod(length, 1 << 16)
    chunks = [block] * whole + [block.slice(0, remainder)]
    column: pa.ChunkedArray[Any] = pa.chunked_array(chunks, type=dtype)
    return column


def _filled(column: pa.ChunkedArray[Any]) -> npt.NDArray[Any]:
    """Returns times as numbers; a row without one comes first, as imported history does before the live log."""
    values: Array = pc.fill_null(column, 0)
    return np.asarray(values.to_numpy())


def _mix(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Applies the finalizer of SplitMix64 (Steele and others, 2014): every output bit depends on every input bit."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def _is_sorted(keys: list[npt.NDArray[Any]]) -> bool:
    """Returns True if rows ascend by the keys, the first one counting most."""
    undecided = np.ones(max(len(keys[0]) - 1, 0), dtype=bool)
    for key in keys:
        if np.any(undecided & (key[1:] < key[:-1])):
            return False
        undecided &= key[1:] == key[:-1]
    return True


def _hash(hasher: Any, chunks: Callable[[], Iterable[Array]]) -> None:
    """Feeds a column to a hash, aspect by aspect.

    Validity of all chunks, then all lengths, then all values: so the borders of chunks leave no trace.
    """
    dtype = pa.null()
    for chunk in chunks():
        dtype = chunk.type
        hasher.update(np.ascontiguousarray(chunk.is_valid().to_numpy(zero_copy_only=False)))
    if pa.types.is_map(dtype):
        for chunk in chunks():
            hasher.update(_map_halves(chunk)[0])
        _hash(hasher, lambda: (_map_halves(chunk)[1] for chunk in chunks()))
        _hash(hasher, lambda: (_map_halves(chunk)[2] for chunk in chunks()))
    elif pa.types.is_list(dtype):
        for chunk in chunks():
            hasher.update(pc.fill_null(pc.list_value_length(chunk), 0).to_numpy().astype(np.int64))
        _hash(hasher, lambda: (chunk.flatten() for chunk in chunks()))
    elif pa.types.is_string(dtype):
        for chunk in chunks():
            lengths = pc.binary_length(pc.fill_null(chunk, ""))
            hasher.update(lengths.to_numpy(zero_copy_only=False).astype(np.int64))
        for chunk in chunks():
            hasher.update(_text_bytes(pc.fill_null(chunk, "")))
    else:
        for chunk in chunks():
            filled = pc.fill_null(chunk, pa.scalar(0).cast(dtype))
            hasher.update(np.ascontiguousarray(filled.to_numpy(zero_copy_only=False)))


def _map_halves(chunk: Array) -> tuple[npt.NDArray[np.int64], Array, Array]:
    ends = chunk.offsets.to_numpy().astype(np.int64)
    first, length = int(ends[0]), int(ends[-1] - ends[0])
    return np.diff(ends), chunk.keys.slice(first, length), chunk.items.slice(first, length)


def _text_bytes(text: Array) -> memoryview:
    _, offsets, data = text.buffers()
    ends = np.frombuffer(offsets, np.int32)[text.offset : text.offset + len(text) + 1] if offsets else [0, 0]
    return memoryview(data or b"")[int(ends[0]) : int(ends[-1])]
