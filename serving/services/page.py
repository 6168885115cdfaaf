"""The items of a page as the contract has them: one kernel writes them all, in place of a message object for each.

What it writes are the bytes of a `Slate` that has items alone, with their ids, scores, propensities, probabilities and
sources; parsing them is part of the protobuf library, and takes a tenth of the time of making the objects one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from features.jit import kernel

_U8 = npt.NDArray[np.uint8]
_I64 = npt.NDArray[np.int64]

# Tags of the wire format: the number of a field of ranking.proto times 8, and how its value is written.
_SIZED, _FIXED32 = 2, 5
_ITEMS = 2 << 3 | _SIZED
_ITEM_ID, _SCORE, _PROBABILITIES, _SOURCES, _PROPENSITY = (
    1 << 3 | _SIZED, 2 << 3 | _FIXED32, 3 << 3 | _SIZED, 4 << 3 | _SIZED, 6 << 3 | _FIXED32,
)  # fmt: skip
_FLOAT = 4
_MOST_VARINT = 5
"""Bytes of the largest size."""


def page_bytes(
    ids: Sequence[str],
    scores: npt.NDArray[Any],
    propensities: npt.NDArray[Any],
    probabilities: npt.NDArray[Any] | None,
    names: Sequence[str],
    proposed: npt.NDArray[np.bool_],
) -> bytes:
    """Returns a serialized `Slate` with `items` and nothing else.

    Args:
        ids: Their ids, the best first; k of them.
        scores: Their scores; float [k].
        propensities: Their propensities; float [k].
        probabilities: The probability of each action, NaN in the first for an item without; float [k, A]. None without.
        names: Names of the sources; S of them.
        proposed: Which sources have proposed which item; bool [k, S].
    """
    texts, source_texts = [text.encode() for text in ids], [name.encode() for name in names]
    if probabilities is None:
        probabilities = np.empty((len(ids), 0), np.float32)
    is_judged = ~np.isnan(probabilities[:, :1]).any(1)
    floats = 2 + probabilities.shape[1]
    each = (3 + floats) * (1 + _MOST_VARINT) + floats * _FLOAT + sum(map(len, source_texts))
    each += len(names) * (1 + _MOST_VARINT)
    out = np.empty(len(ids) * each + sum(map(len, texts)), np.uint8)
    size = write_items(
        *_joined(texts), _bytes_of(scores), _bytes_of(propensities), _bytes_of(probabilities), is_judged,
        *_joined(source_texts), np.ascontiguousarray(proposed), out,
    )  # fmt: skip
    return out[:size].tobytes()


def warm_page() -> None:
    """Compiles the kernel, so that no call has to wait for it."""
    page_bytes(["a"], np.ones(1), np.ones(1), np.ones((1, 1)), ["source"], np.ones((1, 1), np.bool_))


def _joined(texts: Sequence[bytes]) -> tuple[_U8, _I64]:
    """Returns texts one behind the other, and where each ends; uint8 [n], int64 [k]."""
    # From a bytearray, as a kernel is compiled once more for memory that cannot be written to.
    text = np.frombuffer(bytearray(b"".join(texts)), np.uint8)
    return text, np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))


def _bytes_of(values: npt.NDArray[Any]) -> _U8:
    """Returns the bytes of numbers as the wire has them: float32, the lowest byte first; uint8 [k, 4 a row]."""
    width = _FLOAT * math.prod(values.shape[1:])
    return np.frombuffer(bytearray(np.ascontiguousarray(values, "<f4")), np.uint8).reshape(len(values), width)


@kernel()
def _varint_size(value: int) -> int:
    size = 1
    while value >= 0x80:
        value >>= 7
        size += 1
    return size


@kernel()
def _put_varint(out: _U8, at: int, value: int) -> int:
    while value >= 0x80:
        out[at] = value & 0x7F | 0x80
        value >>= 7
        at += 1
    out[at] = value
    return at + 1


@kernel()
def _put(out: _U8, at: int, tag: int, values: _U8) -> int:
    """Writes a field of a size, and returns the place behind it."""
    out[at] = tag
    at = _put_varint(out, at + 1, values.size)
    out[at : at + values.size] = values
    return at + values.size


@kernel()
def _item_size(identifier: int, judged: int, name_ends: _I64, proposed: npt.NDArray[np.bool_]) -> int:
    """Returns the bytes of an item, from those of its id and of its probabilities."""
    size = 1 + _varint_size(identifier) + identifier + 2 * (1 + _FLOAT)
    if judged:
        size += 1 + _varint_size(judged) + judged
    begin = 0
    for source in range(name_ends.size):
        if proposed[source]:
            length = name_ends[source] - begin
            size += 1 + _varint_size(length) + length
        begin = name_ends[source]
    return size


@kernel()
def write_items(
    text: _U8,
    ends: _I64,
    scores: _U8,
    propensities: _U8,
    probabilities: _U8,
    is_judged: npt.NDArray[np.bool_],
    names: _U8,
    name_ends: _I64,
    proposed: npt.NDArray[np.bool_],
    out: _U8,
) -> int:
    """Writes items as the field `items` of a `Slate`, and returns how many bytes they take.

    Args:
        text: The ids, one behind the other; uint8 [t].
        ends: Where each id ends; int64 [k].
        scores: Their scores as float32; uint8 [k, 4].
        propensities: Their propensities as float32; uint8 [k, 4].
        probabilities: The probabilities of the actions as float32; uint8 [k, 4 A].
        is_judged: Which items have probabilities; bool [k].
        names: The names of the sources, one behind the other; uint8 [u].
        name_ends: Where each name ends; int64 [S].
        proposed: Which sources have proposed which item; bool [k, S].
        out: Takes the bytes; uint8, long enough.
    """
    at = begin = 0
    for item in range(ends.size):
        identifier = text[begin : ends[item]]
        begin = ends[item]
        judged = probabilities[item] if is_judged[item] else probabilities[item, :0]
        out[at] = _ITEMS
        at = _put_varint(out, at + 1, _item_size(identifier.size, judged.size, name_ends, proposed[item]))
        at = _put(out, at, _ITEM_ID, identifier)
        out[at] = _SCORE
        out[at + 1 : at + 1 + _FLOAT] = scores[item]
        at += 1 + _FLOAT
        if judged.size:
            at = _put(out, at, _PROBABILITIES, judged)
        first = 0
        for source in range(name_ends.size):
            if proposed[item, source]:
                at = _put(out, at, _SOURCES, names[first : name_ends[source]])
            first = name_ends[source]
        out[at] = _PROPENSITY
        out[at + 1 : at + 1 + _FLOAT] = propensities[item]
        at += 1 + _FLOAT
    return at
