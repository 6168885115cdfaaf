"""Reads the numpy files of a bundle: one plain array of a known type and shape, and nothing else."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

# The header as numpy writes it. Numpy's own reader evaluates the header, and takes an archive for an array.
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00[\x00-\xff]{2}"
    rb"\{'descr': '([<|][a-z]\d)', 'fortran_order': False, 'shape': \((|\d{1,18},|\d{1,18}, \d{1,18})\), \} *\n"
)

Shape = tuple[int | None, ...]
"""The size of each axis; None: any."""


def read_header(start: bytes, size: int, dtype: npt.DTypeLike, shape: Shape) -> tuple[tuple[int, ...], int]:
    """Reads the header of a numpy file.

    Args:
        start: The first bytes of the file, the whole header at least.
        size: Bytes of the whole file.
        dtype: Type that its numbers have.
        shape: Shape that it has.

    Returns:
        Its shape, and the byte at which its numbers begin.

    Raises:
        ValueError: It is no plain array of this type and shape; the message says what is wrong.
    """
    header = _HEADER.match(start)
    if not header or header.end() != 10 + int.from_bytes(start[8:10], "little"):
        raise ValueError("does not begin as numpy writes an array")
    sizes = tuple(int(number) for number in header[2].replace(b",", b" ").split())
    fits = len(sizes) == len(shape) and all(
        expected in (None, number) for number, expected in zip(sizes, shape, strict=True)
    )
    if header[1] != np.dtype(dtype).str.encode() or not fits:
        expectation = f"{np.dtype(dtype).str} {list(shape)} (None = any)"
        raise ValueError(f"is {header[1].decode()} {list(sizes)} instead of {expectation}")
    if size - header.end() != math.prod(sizes) * np.dtype(dtype).itemsize:
        raise ValueError(f"has {size - header.end()} bytes of numbers, not those of {list(sizes)}")
    return sizes, header.end()


def read_array(content: bytes, dtype: npt.DTypeLike, shape: Shape) -> npt.NDArray[Any]:
    """Reads a numpy file; see `read_header`.

    Returns:
        The array, which may be written to.

    Raises:
        ValueError: It is no plain array of this type and shape; the message says what is wrong.
    """
    sizes, start = read_header(content, len(content), dtype, shape)
    # A copy is aligned, and lets the bytes of the file go.
    return np.frombuffer(content, dtype, math.prod(sizes), start).reshape(sizes).copy()
