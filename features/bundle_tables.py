"""The tables and arrays of a bundle, each checked whole before it is used."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.arrow_file import read_table
from features.assemble import statistics_width
from features.bundle import Bundle
from features.errors import BundleError, VocabularyError
from features.tables.schema import ITEMS
from features.vocabulary import Vocabulary

_LEARNED: dict[str, pa.DataType] = {
    "popularity": pa.float32(),
    "recent_popularity": pa.float32(),
    "trained": pa.bool_(),
}
_POPULAR: dict[str, pa.DataType] = {"segment": pa.string(), "row": pa.int32(), "score": pa.float32()}
# As numpy writes it. Its own reader evaluates the header, and takes an archive for an array.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00[\x00-\xff]{2}"
    rb"\{'descr': '([<|][a-z]\d)', 'fortran_order': False, 'shape': \((|\d{1,18},|\d{1,18}, \d{1,18})\), \} *\n"
)

Table = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""Rows, best first, and their scores."""


def read_items(bundle: Bundle) -> pa.Table:
    """Returns the items in row order, as the canonical table with what was learned of each.

    The columns `popularity`, `recent_popularity` and `trained` are there, and `statistics` where they are known.

    Raises:
        BundleError: The file is malformed, an item has no id, or a number is not finite.
    """
    width = statistics_width(len(bundle.model["actions"]))
    statistics: dict[str, pa.DataType] = {"statistics": pa.list_(pa.float32(), width)}
    types: dict[str, pa.DataType] = {field.name: field.type for field in ITEMS} | _LEARNED | statistics
    table = _table(bundle, "items.arrow", types, frozenset({"item_id", *_LEARNED}))
    for name in ("popularity", "recent_popularity", "price", "statistics"):
        if name in table.column_names:
            column = table.column(name)
            if name == "statistics" and column.null_count:
                raise _error(bundle, "items.arrow", "an item has no statistics")
            values = pc.list_flatten(column) if name == "statistics" else column
            if pc.any(pc.invert(pc.is_finite(values))).as_py():
                raise _error(bundle, "items.arrow", f"the column {name} holds NaN or infinity")
    return table


def read_vocabulary(bundle: Bundle, items: pa.Table) -> Vocabulary:
    """Returns the ids of the items, in memory that the workers of a service share.

    Raises:
        BundleError: The file is malformed, or names other items than `items`.
    """
    try:
        vocabulary = Vocabulary.read(bundle.view("vocabulary.arrow"), str(bundle.path / "vocabulary.arrow"))
    except VocabularyError as error:
        raise BundleError(f"{error}; export the run again") from error
    if not items.column("item_id").equals(pa.chunked_array([vocabulary.names])):
        raise BundleError(f"{bundle.path}: vocabulary.arrow and items.arrow name other items; export the run again")
    return vocabulary


def read_vectors(bundle: Bundle, count: int) -> npt.NDArray[np.float32]:
    """Returns the items' vectors; float32 [N, D].

    Raises:
        BundleError: The file is malformed, of another shape, or holds NaN or infinity.
    """
    return _finite(bundle, "vectors.npy", (count, int(bundle.model["dim"])))


def read_words(bundle: Bundle, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """Returns where the words of each item begin, int64 [N + 1], and the words of all, uint32.

    Raises:
        BundleError: A file is malformed, or the two do not fit.
    """
    offsets = _array(bundle, "token_offsets.npy", np.int64, (count + 1,))
    tokens = _array(bundle, "tokens.npy", np.uint32, (None,))
    if offsets[0] != 0 or offsets[-1] != tokens.size or (offsets[1:] < offsets[:-1]).any():
        raise _error(bundle, "token_offsets.npy", "does not fit tokens.npy")
    return offsets, tokens


def read_popular(bundle: Bundle, count: int) -> dict[str, Table]:
    """Returns what most users of a segment like, by segment; all users are the segment "".

    Raises:
        BundleError: The file is malformed, names rows beyond `count` or twice, or does not have the best first.
    """
    table = _table(bundle, "popular.arrow", _POPULAR, frozenset(_POPULAR))
    segments: Any = table.column("segment").combine_chunks().dictionary_encode()
    rows = np.array(table.column("row").to_numpy(), np.int32)
    scores = np.array(table.column("score").to_numpy(), np.float32)
    _check_rows(bundle, "popular.arrow", rows, 0, count)
    if not np.isfinite(scores).all():
        raise _error(bundle, "popular.arrow", "a score is NaN or infinite")
    of = np.asarray(segments.indices.to_numpy(zero_copy_only=False))
    order = np.argsort(of, kind="stable")
    parts = np.split(order, np.searchsorted(of[order], np.arange(1, len(segments.dictionary))))
    tables: dict[str, Table] = {"": (rows[:0], scores[:0])}
    for name, part in zip(segments.dictionary.to_pylist(), parts, strict=False):
        if np.unique(rows[part]).size != part.size or (np.diff(scores[part]) > 0).any():
            raise _error(bundle, "popular.arrow", f"the segment {name[:80]!r} has an item twice, or not the best first")
        tables[name] = rows[part], scores[part]
    return tables


def read_neighbors(bundle: Bundle, count: int) -> Table:
    """Returns the nearest rows of each item, -1 where there are no more, and their cosines; int32, float32 [N, K].

    Raises:
        BundleError: A file is malformed, names rows beyond `count`, or holds NaN or infinity.
    """
    rows = _array(bundle, "neighbors.npy", np.int32, (count, None))
    _check_rows(bundle, "neighbors.npy", rows, -1, count)
    return rows, _finite(bundle, "neighbor_scores.npy", rows.shape)


def _table(bundle: Bundle, name: str, types: dict[str, pa.DataType], required: frozenset[str]) -> pa.Table:
    try:
        return read_table(bundle.read(name), types, required)
    except ValueError as error:
        raise _error(bundle, name, f"Arrow cannot read it ({error})") from error


def _finite(bundle: Bundle, name: str, shape: tuple[int | None, ...]) -> npt.NDArray[np.float32]:
    array = _array(bundle, name, np.float32, shape)
    if not np.isfinite(array).all():
        raise _error(bundle, name, "holds NaN or infinity")
    return array


def _array(bundle: Bundle, name: str, dtype: Any, shape: tuple[int | None, ...]) -> npt.NDArray[Any]:
    """Reads a numpy file of the promised type and shape (None = any size)."""
    content = bundle.read(name)
    header = _HEADER.match(content)
    if not header or header.end() != 10 + int.from_bytes(content[8:10], "little"):
        raise _error(bundle, name, "does not begin as numpy writes an array")
    sizes = tuple(int(size) for size in header[2].replace(b",", b" ").split())
    fits = len(sizes) == len(shape) and all(wanted in (None, size) for size, wanted in zip(sizes, shape, strict=True))
    if header[1] != np.dtype(dtype).str.encode() or not fits:
        wanted = f"{np.dtype(dtype).str} {list(shape)} (None = any)"
        raise _error(bundle, name, f"is {header[1].decode()} {list(sizes)} instead of {wanted}")
    count = 1
    for size in sizes:
        count *= size
    if len(content) - header.end() != count * np.dtype(dtype).itemsize:
        raise _error(bundle, name, f"has {len(content) - header.end()} bytes of numbers, not those of {list(sizes)}")
    return np.frombuffer(content, dtype, count, header.end()).reshape(sizes).copy()


def _check_rows(bundle: Bundle, name: str, rows: npt.NDArray[np.int32], low: int, count: int) -> None:
    if rows.size and not (rows.min() >= low and rows.max() < count):
        raise _error(bundle, name, "names rows that the catalogue does not have")


def _error(bundle: Bundle, name: str, reason: str) -> BundleError:
    return BundleError(f"{bundle.path / name}: {reason}; export the run again")
