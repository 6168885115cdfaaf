"""External id <-> row: one Arrow file, whose bytes the worker processes of a service share."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrow_file import read_table
from features.errors import VocabularyError
from features.keys import item_keys

_TYPES: dict[str, pa.DataType] = {
    "id": pa.string(),
    "key": pa.uint64(),
    "sorted_key": pa.uint64(),
    "sorted_row": pa.int32(),
}
_SCHEMA = pa.schema(_TYPES)


class Vocabulary:
    """The ids of a catalogue in row order.

    Lookups go by the 64-bit key of an id. No two ids of a vocabulary share one (refused when it is built), and the
    chance that an id from outside hits one of 10^6 keys is about 5e-14.
    """

    def __init__(self, table: pa.Table) -> None:
        """Wraps the columns of a vocabulary file; callers use `build`, `open` or `read`."""
        table = table.combine_chunks()
        self._ids = _column(table, "id")
        self.keys: npt.NDArray[np.uint64] = _column(table, "key").to_numpy(zero_copy_only=False)
        self._sorted_keys: npt.NDArray[np.uint64] = _column(table, "sorted_key").to_numpy(zero_copy_only=False)
        self._sorted_rows: npt.NDArray[np.int32] = _column(table, "sorted_row").to_numpy(zero_copy_only=False)
        self._table = table

    @classmethod
    def build(cls, ids: Sequence[str]) -> Vocabulary:
        """Gives `ids` the rows 0 to n-1 in their order.

        Raises:
            VocabularyError: An id is empty or there twice, or two ids share a key.
        """
        ids = list(ids)
        keys = item_keys(ids)
        order = np.argsort(keys, kind="stable").astype(np.int32)
        ordered = keys[order]
        if ordered.size and ordered[0] == 0:
            raise VocabularyError(f"row {order[0]}: an item id is empty; every item needs one")
        twice = np.flatnonzero(ordered[1:] == ordered[:-1])
        if twice.size:
            first, second = order[twice[0]], order[twice[0] + 1]
            raise VocabularyError(
                f"items {ids[first]!r} (row {first}) and {ids[second]!r} (row {second}) share the key "
                f"{ordered[twice[0]]:#x}: keep one of them"
            )
        return cls(pa.table([pa.array(ids, pa.string()), keys, ordered, order], schema=_SCHEMA))

    @classmethod
    def open(cls, path: Path) -> Vocabulary:
        """Reads a file that `save` wrote.

        Raises:
            VocabularyError: The file is not a vocabulary, or is damaged.
        """
        try:
            return cls.read(path.read_bytes(), str(path))
        except OSError as error:
            raise VocabularyError(f"{path}: cannot be read ({error.strerror})") from error

    @classmethod
    def read(cls, content: bytes | memoryview, path: str) -> Vocabulary:
        """Checks the bytes of a file that `save` wrote, and wraps them: its columns point into `content`.

        Args:
            content: The file.
            path: Its path, for messages.

        Raises:
            VocabularyError: The file is not a vocabulary, or its keys and rows are not those of its ids.
        """
        try:
            vocabulary = cls(read_table(content, _TYPES, frozenset(_TYPES)).select(_SCHEMA.names))
            vocabulary._check()
        except ValueError as error:
            raise VocabularyError(f"{path}: not a vocabulary file ({error})") from error
        return vocabulary

    def _check(self) -> None:
        rows, keys = self._sorted_rows, self.keys
        if rows.size and not 0 <= rows.min() <= rows.max() < rows.size:
            raise ValueError("sorted_row names rows that it does not have")
        if not np.array_equal(keys[rows], self._sorted_keys) or (self._sorted_keys[:1] == 0).any():
            raise ValueError("sorted_key is not what key and sorted_row say")
        if not (self._sorted_keys[1:] > self._sorted_keys[:-1]).all():
            raise ValueError("sorted_key is not sorted, or holds a key twice")
        # Hashed again: a wrong key would give an item's events to another item, and nothing would look wrong.
        if not np.array_equal(item_keys(self._ids.to_pylist()), keys):
            raise ValueError("key is not what id says")

    @property
    def names(self) -> pa.Array[Any]:
        """All ids in row order; string [n]."""
        return self._ids

    def save(self, path: Path) -> None:
        """Writes the vocabulary as one uncompressed Arrow file, so that reading it copies nothing."""
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(self._table, max_chunksize=max(1, len(self)))

    def __len__(self) -> int:
        """The number of rows."""
        return self.keys.size

    def rows(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """Returns the row of each id, -1 if it is unknown; int32 [n]."""
        return self.rows_of_keys(item_keys(ids))

    def rows_of_keys(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """Returns the row of each key, -1 if it is unknown; int32 [n]."""
        if not len(self):
            return np.full(keys.size, -1, np.int32)
        at = np.searchsorted(self._sorted_keys, keys)
        at[at == len(self)] = 0  # a key above all others; the comparison below refuses it
        return np.where(self._sorted_keys[at] == keys, self._sorted_rows[at], np.int32(-1)).astype(np.int32)

    def row_of_key(self, key: int) -> int:
        """Returns the row of one key, -1 if it is unknown."""
        # For a single key, a search in Python costs less than a call into numpy.
        at = bisect_left(self._sorted_keys, key)
        return int(self._sorted_rows[at]) if at < len(self) and self._sorted_keys[at] == key else -1

    def ids(self, rows: npt.ArrayLike) -> list[str]:
        """Returns the ids of `rows`, each in [0, len)."""
        return [str(name) for name in self._ids.take(np.asarray(rows, np.int64)).to_pylist()]


def _column(table: pa.Table, name: str) -> pa.Array[Any]:
    column = table.column(name)
    chunk: Any = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return chunk  # type: ignore[no-any-return]
