"""External id <-> row: one Arrow file, memory-mapped, shared by every worker process."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.errors import VocabularyError
from features.schema import item_keys

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
        """Wraps the columns of a vocabulary file; call `build` or `open` instead."""
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
            VocabularyError: An id is empty or stands twice, or two ids share a key.
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
        """Maps a file that `save` wrote.

        Raises:
            VocabularyError: The file is not a vocabulary.
        """
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            raise VocabularyError(f"{path}: not a vocabulary file ({error})") from error
        if table.schema != _SCHEMA:
            raise VocabularyError(f"{path}: has the columns {table.schema.names}, not {_SCHEMA.names}")
        return cls(table)

    def save(self, path: Path) -> None:
        """Writes the vocabulary as one uncompressed Arrow file, so that opening it copies nothing."""
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(self._table, max_chunksize=max(1, len(self)))

    def __len__(self) -> int:
        """The number of rows."""
        return self.keys.size

    def rows(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """The row of each id, -1 where it is unknown; int32 [n]."""
        return self.rows_of_keys(item_keys(ids))

    def rows_of_keys(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """The row of each key, -1 where it is unknown; int32 [n]."""
        if not len(self):
            return np.full(keys.size, -1, np.int32)
        at = np.searchsorted(self._sorted_keys, keys)
        at[at == len(self)] = 0
        return np.where(self._sorted_keys[at] == keys, self._sorted_rows[at], np.int32(-1)).astype(np.int32)

    def row_of_key(self, key: int) -> int:
        """The row of one key, -1 where it is unknown."""
        at = bisect_left(self._sorted_keys, key)
        return int(self._sorted_rows[at]) if at < len(self) and self._sorted_keys[at] == key else -1

    def ids(self, rows: npt.ArrayLike) -> list[str]:
        """The ids of `rows`, each in [0, len)."""
        return [str(name) for name in self._ids.take(np.asarray(rows, np.int64)).to_pylist()]


def _column(table: pa.Table, name: str) -> pa.Array[Any]:
    column = table.column(name)
    chunk: Any = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return chunk  # type: ignore[no-any-return]
