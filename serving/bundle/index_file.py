"""Checks a FAISS index byte by byte before FAISS reads it, because FAISS trusts the lengths that a file states.

The kinds that export builds are accepted: exact (`IxFI`), lists (`IwFl`) and lists of a byte per number (`IwSq`). The
layout is that of `faiss/impl/index_write.cpp`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

# As in `faiss/MetricType.h` and `faiss/impl/ScalarQuantizer.h`.
_INNER_PRODUCT = 0
_SQ8 = 0
_MOST_ARRAY = 1 << 40

Bytes = bytes | memoryview | npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class IndexFacts:
    """Facts that an index states.

    Attributes:
        count: Number of its vectors.
        dim: Length of each.
        vectors: The vectors in row order, float32 [count, dim]; None if the index keeps only a rough form of them.
        lists: Number of its lists, 0 for an exact index.
    """

    count: int
    dim: int
    vectors: npt.NDArray[np.float32] | None
    lists: int


def check_index(data: Bytes) -> IndexFacts:
    """Reads the facts that an index states, and checks that its bytes are what they promise.

    Raises:
        ValueError: It is of another kind, is cut short or too long, or holds a number out of range.
    """
    cursor = _Cursor(data)
    kind = cursor.kind()
    if kind == b"IxFI":
        count, dim, vectors = _flat(cursor)
        facts = IndexFacts(count, dim, vectors, 0)
    elif kind in (b"IwFl", b"IwSq"):
        facts = _lists(cursor, quantised=kind == b"IwSq")
    else:
        raise ValueError(f"is of the kind {kind!r}, which no export builds")
    # FAISS would ignore them, and a bundle holds nothing that is ignored.
    if cursor.left:
        raise ValueError(f"has {cursor.left} bytes after its end")
    return facts


class _Cursor:
    """A place in the bytes; nothing is taken from past their end."""

    def __init__(self, data: Bytes) -> None:
        self._data: Any = data
        self._place = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._place

    def kind(self) -> bytes:
        (name,) = self.take("4s")
        return bytes(name)

    def take(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{layout}")
        if size > self.left:
            raise ValueError("is cut short")
        values = struct.unpack_from(f"<{layout}", self._data, self._place)
        self._place += size
        return values

    def array(self, dtype: str, count: int) -> npt.NDArray[Any]:
        size = np.dtype(dtype).itemsize * count
        if not 0 <= count <= _MOST_ARRAY or size > self.left:
            raise ValueError("is cut short")
        values = np.frombuffer(self._data, dtype, count, self._place)
        self._place += size
        return values

    def sized(self, dtype: str) -> npt.NDArray[Any]:
        (count,) = self.take("Q")
        return self.array(dtype, count)


def _header(cursor: _Cursor) -> tuple[int, int]:
    dim, count, _, _, trained, metric = cursor.take("iqqqBi")
    if trained != 1 or metric != _INNER_PRODUCT or dim < 1 or count < 0:
        raise ValueError(f"is not trained, or not by inner product, or of {count} vectors of {dim} numbers")
    return count, dim


def _flat(cursor: _Cursor) -> tuple[int, int, npt.NDArray[np.float32]]:
    count, dim = _header(cursor)
    numbers = cursor.sized("<f4")
    if numbers.size != count * dim:
        raise ValueError(f"holds {numbers.size} numbers instead of {count} vectors of {dim}")
    if not np.isfinite(numbers).all():
        raise ValueError("holds NaN or infinity")
    return count, dim, numbers.reshape(count, dim)


def _lists(cursor: _Cursor, quantised: bool) -> IndexFacts:
    count, dim = _header(cursor)
    lists, probes = cursor.take("QQ")
    if not 1 <= probes <= lists <= cursor.left:
        raise ValueError(f"probes {probes} of {lists} lists")
    if cursor.kind() != b"IxFI":
        raise ValueError("finds its lists by another index than an exact one")
    if _flat(cursor)[:2] != (lists, dim):
        raise ValueError("has other lists than the index that finds them")
    (direct,) = cursor.take("B")
    # With such a map FAISS would look rows up by places that the file names.
    if direct or cursor.sized("<i8").size:
        raise ValueError("keeps a map of its rows, which no export writes")
    code_size = _quantiser(cursor, dim) if quantised else 4 * dim
    codes, rows = _inverted(cursor, lists, code_size)
    # A row that is missing is never found, and one that is too large points outside of the catalogue.
    if (
        rows.size != count
        or (count and not 0 <= rows.min() <= rows.max() < count)
        or np.bincount(rows).max(initial=1) > 1
    ):
        raise ValueError("does not hold each row once")
    if quantised:
        return IndexFacts(count, dim, None, lists)
    vectors = np.empty((count, dim), np.float32)
    vectors[rows] = np.concatenate([np.empty(0, np.uint8), *codes]).view("<f4").reshape(count, dim)
    return IndexFacts(count, dim, vectors, lists)


def _quantiser(cursor: _Cursor, dim: int) -> int:
    kind, _, argument, length, size = cursor.take("iifQQ")
    trained = cursor.sized("<f4")
    if kind != _SQ8 or length != dim or size != dim or trained.size != 2 * dim or not np.isfinite(argument):
        raise ValueError("keeps its vectors in another form than a byte per number")
    if not np.isfinite(trained).all():
        raise ValueError("holds NaN or infinity")
    # The quantiser and the index each write the size of a code, and they must agree.
    code_size, residual = cursor.take("QB")
    if code_size != size or residual not in (0, 1):
        raise ValueError("contradicts itself about the form of its vectors")
    return int(size)


def _inverted(cursor: _Cursor, lists: int, code_size: int) -> tuple[list[npt.NDArray[np.uint8]], npt.NDArray[np.int64]]:
    if cursor.kind() != b"ilar" or cursor.take("QQ") != (lists, code_size):
        raise ValueError("has other lists than it says")
    sizes, kind = np.zeros(lists, np.int64), cursor.kind()
    if kind == b"full":
        sizes = cursor.sized("<i8")
        if sizes.size != lists:
            raise ValueError("has other lists than it says")
    elif kind == b"sprs":  # pairs of a list and its size, if most lists are empty
        pairs = cursor.sized("<i8")
        places = pairs[::2]
        if pairs.size % 2 or (places.size and not 0 <= places.min() <= places.max() < lists):
            raise ValueError("has other lists than it says")
        if (np.diff(places) <= 0).any():
            raise ValueError("has a list twice")
        sizes[places] = pairs[1::2]
    else:
        raise ValueError(f"keeps its lists as {kind!r}, which no export writes")
    codes, rows = [], []
    for size in sizes.tolist():
        if size < 0:
            raise ValueError("has a list of negative length")
        codes.append(cursor.array("|u1", size * code_size))
        rows.append(cursor.array("<i8", size))
    return codes, np.concatenate([np.empty(0, np.int64), *rows])
