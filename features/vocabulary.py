"""External id <-> row: one Arrow file, read into arrays that the worker processes of a service share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrow_file import read_table
from features.errors import VocabularyError
from features.key_table import find_row, find_rows, key_slots
from features.keys import item_keys

_TYPES: dict[str, pa.DataType] = {
    "id": pa.string(),
    "key": pa.uint64(),
    "sorted_key": pa.uint64(),
    "sorted_row": pa.int32(),
}
_SCHEMA = pa.schema(_TYPES)


_CHUNK = 1 << 16
"""Ids that become Python strings at once, when all of them are hashed."""


class Vocabulary:
    """The ids of a catalogue in row order.

    Lookups go by the 64-bit key of an id. No two ids of a vocabulary share one (refused when it is built), and the
    chance that an id from outside hits one of 10^6 keys is about 5e-14.

    Attributes:
        keys: Key of each id; uint64 [n].
        slots: The hash table of the keys, see `features.key_table`; int32.
        offsets: Place at which each id begins in `text`; int32 [n + 1].
        text: The ids end to end, UTF-8; uint8.
    """

    def __init__(
        self,
        keys: npt.NDArray[np.uint64],
        offsets: npt.NDArray[np.int32],
        text: npt.NDArray[np.uint8],
        slots: npt.NDArray[np.int32] | None = None,
    ) -> None:
        """Wraps arrays; callers use `build`, `open` or `read`, or pass what one of these made."""
        self.keys, self.offsets, self.text = keys, offsets, text
        buffers: tuple[Any, Any] = (offsets, text)
        self._buffers = buffers
        self.slots = key_slots(keys) if slots is None else slots
        self._bytes = memoryview(buffers[1])

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
        return cls(keys, *_text_of(pa.array(ids, pa.string())))

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
        """Checks the bytes of a file that `save` wrote; its arrays point into `content` where they can.

        Args:
            content: The file.
            path: Its path, for messages.

        Raises:
            VocabularyError: The file is not a vocabulary, or its keys and rows are not those of its ids.
        """
        try:
            table = read_table(content, _TYPES, frozenset(_TYPES)).combine_chunks()
            _check(*(_column(table, name) for name in _SCHEMA.names))
        except ValueError as error:
            raise VocabularyError(f"{path}: not a vocabulary file ({error})") from error
        return cls(_column(table, "key").to_numpy(zero_copy_only=False), *_text_of(_column(table, "id")))

    @property
    def names(self) -> pa.Array[Any]:
        """All ids in row order; string [n], without a copy."""
        buffers: Any = [pa.py_buffer(part) for part in self._buffers]
        return pa.StringArray.from_buffers(len(self), *buffers)

    def save(self, path: Path) -> None:
        """Writes the vocabulary as one uncompressed Arrow file, so that reading it copies nothing."""
        order = np.argsort(self.keys, kind="stable").astype(np.int32)
        table = pa.table([self.names, self.keys, self.keys[order], order], schema=_SCHEMA)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(table, max_chunksize=max(1, len(self)))

    def __len__(self) -> int:
        """The number of rows."""
        return self.keys.size

    def rows(self, ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """Returns the row of each id, -1 if it is unknown; int32 [n]."""
        return self.rows_of_keys(item_keys(ids))

    def rows_of_keys(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """Returns the row of each key, -1 if it is unknown; int32 [n]."""
        rows = np.empty(keys.size, np.int32)
        # A kernel is compiled for each layout of its arguments, and for those that cannot be written to.
        plain = keys if keys.flags.c_contiguous and keys.flags.writeable else np.array(keys, np.uint64)
        find_rows(self.keys, self.slots, plain, rows)
        return rows

    def row_of_key(self, key: int) -> int:
        """Returns the row of one key, -1 if it is unknown."""
        return find_row(self.keys, self.slots, key)

    def ids(self, rows: npt.ArrayLike) -> list[str]:
        """Returns the ids of `rows`, each in [0, len)."""
        places = np.asarray(rows, np.int64)
        starts, ends = self.offsets[places].tolist(), self.offsets[places + 1].tolist()
        # Slices of the text itself: Arrow takes three times as long for a page of ids.
        return [str(self._bytes[start:end], "utf-8") for start, end in zip(starts, ends, strict=True)]


def _text_of(names: pa.Array[Any]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Returns the offsets int32 [n + 1] and the text uint8 of an array of strings without NULL."""
    if not len(names):
        return np.zeros(1, np.int32), np.empty(0, np.uint8)
    buffers: Any = names.buffers()
    _, offsets, text = buffers
    places = np.frombuffer(offsets, np.int32)[names.offset : names.offset + len(names) + 1]
    # Arrow leaves out the text where no id has a letter.
    return places, np.frombuffer(text, np.uint8) if text is not None else np.empty(0, np.uint8)


def _check(ids: Any, keys: Any, sorted_keys: Any, sorted_rows: Any) -> None:
    """Checks that the columns of a file say the same.

    Raises:
        ValueError: They do not.
    """
    key, ordered, rows = (column.to_numpy(zero_copy_only=False) for column in (keys, sorted_keys, sorted_rows))
    if rows.size and not 0 <= rows.min() <= rows.max() < rows.size:
        raise ValueError("sorted_row names rows that it does not have")
    if not np.array_equal(key[rows], ordered) or (ordered[:1] == 0).any():
        raise ValueError("sorted_key is not what key and sorted_row say")
    if not (ordered[1:] > ordered[:-1]).all():
        raise ValueError("sorted_key is not sorted, or holds a key twice")
    # Hashed again: a wrong key would give an item's events to another item, and nothing would look wrong.
    for start in range(0, len(ids), _CHUNK):
        if not np.array_equal(item_keys(ids.slice(start, _CHUNK).to_pylist()), key[start : start + _CHUNK]):
            raise ValueError("key is not what id says")


def _column(table: pa.Table, name: str) -> pa.Array[Any]:
    column = table.column(name)
    chunk: Any = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return chunk  # type: ignore[no-any-return]
