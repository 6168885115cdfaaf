"""The tables and arrays of a bundle, each checked whole before it is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.bundle import Bundle
from features.errors import BundleError, VocabularyError
from features.linear import ItemWeights
from features.model_inputs import statistics_width
from features.tables.schema import ITEMS
from features.vocabulary import Vocabulary

_LEARNED: dict[str, pa.DataType] = {
    "popularity": pa.float32(),
    "recent_popularity": pa.float32(),
    "trained": pa.bool_(),
}
_LISTS = {"statistics": "statistics", "declared": "declared features"}
"""Columns of lists of numbers, and what an item without one lacks."""
_POPULAR: dict[str, pa.DataType] = {"segment": pa.string(), "row": pa.int32(), "score": pa.float32()}


ScoredRows = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""Rows, best first, and their scores."""


def read_items(bundle: Bundle, content: memoryview | None = None) -> pa.Table:
    """Returns the items in row order, as the canonical table with what training learned of each.

    The columns `popularity`, `recent_popularity` and `trained` are there, and `statistics` if the run measured them.

    Args:
        bundle: The bundle.
        content: The bytes of the file, if they were read already; the table points into them.

    Raises:
        BundleError: The file is malformed, an item has no id, or a number is not finite.
    """
    table = bundle.table("items.arrow", item_types(bundle), frozenset({"item_id", *_LEARNED}), content)
    if bundle.model.declared.item_width and "declared" not in table.column_names:
        raise bundle.malformed("items.arrow", "has no column declared, which the declared features fill")
    for name in ("popularity", "recent_popularity", "price", *_LISTS):
        if name in table.column_names:
            column = table.column(name)
            # A NULL list would shift the numbers of all later items when the lists are laid end to end.
            if name in _LISTS and column.null_count:
                raise bundle.malformed("items.arrow", f"an item has no {_LISTS[name]}")
            values = pc.list_flatten(column) if name in _LISTS else column
            if pc.any(pc.invert(pc.is_finite(values))).as_py():
                raise bundle.malformed("items.arrow", f"the column {name} holds NaN or infinity")
    return table


def item_types(bundle: Bundle) -> dict[str, pa.DataType]:
    """Returns the columns that the items of a bundle may have, and their types."""
    width = statistics_width(len(bundle.model.actions))
    lists: dict[str, pa.DataType] = {"statistics": pa.list_(pa.float32(), width)}
    if of_items := bundle.model.declared.item_width:
        lists["declared"] = pa.list_(pa.float32(), of_items)
    return {field.name: field.type for field in ITEMS} | _LEARNED | lists


def read_vocabulary(bundle: Bundle, items: pa.Table) -> Vocabulary:
    """Returns the ids of the items.

    Raises:
        BundleError: The file is malformed, or names other items than `items`.
    """
    try:
        vocabulary = Vocabulary.read(bundle.read("vocabulary.arrow"), str(bundle.path / "vocabulary.arrow"))
    except VocabularyError as error:
        raise BundleError(f"{error}; export the run again") from error
    if not items.column("item_id").equals(pa.chunked_array([vocabulary.names])):
        raise BundleError(f"{bundle.path}: vocabulary.arrow and items.arrow name other items; export the run again")
    return vocabulary


def read_words(bundle: Bundle, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """Returns the place at which the words of each item begin, int64 [N + 1], and the words of all, uint32.

    Raises:
        BundleError: A file is malformed, or the two do not fit.
    """
    offsets = bundle.array("token_offsets.npy", np.int64, (count + 1,))
    tokens = bundle.array("tokens.npy", np.uint32, (None,))
    # Places that do not ascend would give the words of an item to others.
    if offsets[0] != 0 or offsets[-1] != tokens.size or (offsets[1:] < offsets[:-1]).any():
        raise bundle.malformed("token_offsets.npy", "does not fit tokens.npy")
    return offsets, tokens


def read_popular(bundle: Bundle, count: int) -> dict[str, ScoredRows]:
    """Returns what most users of a segment like, by segment; all users are the segment "".

    Raises:
        BundleError: The file is malformed, names rows beyond `count` or twice, or does not have the best first.
    """
    table = bundle.table("popular.arrow", _POPULAR, frozenset(_POPULAR))
    segments: Any = table.column("segment").combine_chunks().dictionary_encode()
    rows = np.array(table.column("row").to_numpy(), np.int32)
    scores = np.array(table.column("score").to_numpy(), np.float32)
    _check_rows(bundle, "popular.arrow", rows, 0, count)
    if not np.isfinite(scores).all():
        raise bundle.malformed("popular.arrow", "a score is NaN or infinite")
    segment_of_row = np.asarray(segments.indices.to_numpy(zero_copy_only=False))
    # Stable, so that within a segment the best stay first.
    order = np.argsort(segment_of_row, kind="stable")
    parts = np.split(order, np.searchsorted(segment_of_row[order], np.arange(1, len(segments.dictionary))))
    tables: dict[str, ScoredRows] = {"": (rows[:0], scores[:0])}
    for name, part in zip(segments.dictionary.to_pylist(), parts, strict=False):
        if np.unique(rows[part]).size != part.size or (np.diff(scores[part]) > 0).any():
            reason = f"the segment {name[:80]!r} has an item twice, or not the best first"
            raise bundle.malformed("popular.arrow", reason)
        tables[name] = rows[part], scores[part]
    return tables


def read_neighbors(bundle: Bundle, count: int) -> ItemWeights:
    """Returns the item-to-item weights; what is -1 in the files takes no memory.

    Raises:
        BundleError: A file is malformed, names rows beyond `count`, or holds NaN or infinity.
    """
    (_, width), pieces = bundle.stream_array("neighbors.npy", np.int32, (count, None))
    rows, scores, real, lowest, highest = [], [], [], -1, -1
    for piece in pieces:
        part = np.frombuffer(piece, np.int32)
        lowest, highest = min(lowest, int(part.min(initial=-1))), max(highest, int(part.max(initial=-1)))
        real.append(part >= 0)
        rows.append(part[real[-1]])
    # After the last piece: only then are the bytes those that were hashed.
    _check_rows(bundle, "neighbors.npy", np.array([lowest, highest], np.int32), -1, count)
    is_real = np.concatenate([np.zeros(0, bool), *real])
    place, is_finite = 0, True
    for piece in bundle.stream_array("neighbor_scores.npy", np.float32, (count, width))[1]:
        weights = np.frombuffer(piece, np.float32)
        is_finite &= bool(np.isfinite(weights).all())
        scores.append(weights[is_real[place : place + weights.size]])
        place += weights.size
    if not is_finite:
        raise bundle.malformed("neighbor_scores.npy", "holds NaN or infinity")
    lengths = is_real.reshape(count, width).sum(axis=1)
    return ItemWeights(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([np.zeros(0, np.int32), *rows]),
        np.concatenate([np.zeros(0, np.float32), *scores]),
    )


def _check_rows(bundle: Bundle, name: str, rows: npt.NDArray[np.int32], low: int, count: int) -> None:
    # The kernels that read rows check no bounds, and numpy takes a negative one from the end.
    if rows.size and not (rows.min() >= low and rows.max() < count):
        raise bundle.malformed(name, "names rows that the catalogue does not have")
