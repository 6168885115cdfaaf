"""Converts Arrow arrays of any encoding into plain ones, and holds the small steps of every conversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

# A pa.Array. Typed Any because the published stubs lack the overloads of half of these kernels.
Array: TypeAlias = Any
Mask: TypeAlias = npt.NDArray[np.bool_]

pc: Any = pyarrow.compute

_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_UUID_DIGITS = np.array([at for at in range(36) if at not in (8, 13, 18, 23)])


class Misfit(Exception):
    """A column's type can never become the wanted one; the text names the right form."""


@dataclass(frozen=True, slots=True)
class Converted:
    """A column in its canonical type.

    Attributes:
        values: The values; NULL where the file has none or one that cannot be read.
        bad: The rows whose value cannot be read.
        should: The right form of a value.
        late: The rows with a time of 2100 or later, which are NULL; None if the column holds no times.
        early: The rows with a date before 1970, which are NULL and bad; None if the column holds no times.
    """

    values: Array
    bad: Mask
    should: str
    late: Mask | None = None
    early: Mask | None = None


def plain(column: Array) -> Array:
    """Returns a column without dictionaries, runs, views and extension types; its lists are `pa.list_`.

    A UUID becomes its text. Other extension types become their storage.
    """
    while True:
        dtype = column.type
        if isinstance(dtype, pa.BaseExtensionType):
            column = _uuid_text(column.storage) if dtype.extension_name == "arrow.uuid" else column.storage
        elif pa.types.is_dictionary(dtype):
            column = column.dictionary_decode()
        elif pa.types.is_run_end_encoded(dtype):
            column = pc.run_end_decode(column)
        elif pa.types.is_string_view(dtype) or pa.types.is_binary_view(dtype):
            column = pc.cast(column, pa.binary())
        elif _is_other_list(dtype):
            column = _plain_list(column)
        elif pa.types.is_decimal32(dtype) or pa.types.is_decimal64(dtype):
            column = pc.cast(column, pa.decimal128(38, dtype.scale))
        else:
            return column


def _plain_list(column: Array) -> Array:
    """Returns lists of another layout as `pa.list_`."""
    # Not by a cast: that of Arrow loses entries of a sliced list view.
    if pa.types.is_fixed_size_list(column.type):
        return pc.cast(column, pa.list_(column.type.value_type))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return pa.ListArray.from_arrays(offsets(lengths), column.flatten(), mask=column.is_null())


def _is_other_list(dtype: pa.DataType) -> bool:
    return (
        pa.types.is_large_list(dtype)
        or pa.types.is_fixed_size_list(dtype)
        or pa.types.is_list_view(dtype)
        or pa.types.is_large_list_view(dtype)
    )


def _uuid_text(storage: Array) -> Array:
    """Returns UUIDs of 16 bytes in the usual form of 36 characters."""
    length = len(storage)
    raw = pc.fill_null(storage, pa.scalar(bytes(16), storage.type))
    data = np.frombuffer(raw.buffers()[1] or b"", np.uint8)[raw.offset * 16 : (raw.offset + length) * 16]
    text = np.full((length, 36), ord("-"), np.uint8)
    text[:, _UUID_DIGITS[0::2]] = _HEX[data.reshape(length, 16) >> 4]
    text[:, _UUID_DIGITS[1::2]] = _HEX[data.reshape(length, 16) & 15]
    ends = np.arange(length + 1, dtype=np.int32) * 36
    texts: Array = pa.StringArray.from_buffers(length, pa.py_buffer(ends.tobytes()), pa.py_buffer(text.tobytes()))
    return only(texts, to_mask(storage.is_valid()))


def to_mask(values: Any) -> Mask:
    """Returns an Arrow array of booleans as numpy; NULL counts as false."""
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False), dtype=bool)


def numbers(column: pa.ChunkedArray[Any]) -> npt.NDArray[np.int64]:
    """Returns a column of whole numbers, 0 where it has none; int64 [n]."""
    return np.asarray(pc.fill_null(column, 0).to_numpy()).astype(np.int64)


def only(values: Array, good: Mask) -> Array:
    """Returns the values where good, NULL elsewhere."""
    return values if good.all() else pc.if_else(pa.array(good), values, pa.scalar(None, values.type))


def is_text(dtype: pa.DataType) -> bool:
    """Returns True for what claims to be text, and for bytes, which may be: Parquet leaves it to the reader."""
    return (
        pa.types.is_string(dtype)
        or pa.types.is_large_string(dtype)
        or pa.types.is_binary(dtype)
        or pa.types.is_large_binary(dtype)
        or pa.types.is_fixed_size_binary(dtype)
    )


def decoded(column: Array) -> tuple[Array, Mask]:
    """Returns bytes that claim to be UTF-8 as text, and a mask of those that are not: Parquet does not check it."""
    text = pc.cast(column, options=pc.CastOptions(pa.string(), allow_invalid_utf8=True))
    bad = np.zeros(len(text), dtype=bool)
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        raw = pc.cast(text, pa.binary())
        for row in np.flatnonzero(to_mask(pc.invert(pc.string_is_ascii(text)))):
            bad[row] = not _decodes(raw[int(row)].as_py())
        text = only(text, ~bad)
    return text, bad


def _decodes(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def trimmed(column: Array) -> tuple[Array, Mask, Mask]:
    """Returns text without the white space around it, the rows that hold nothing else, and those not in UTF-8."""
    text, bad = decoded(column)
    text = pc.utf8_trim_whitespace(text)
    return text, to_mask(pc.equal(text, "")), bad


def matches(text: Array, pattern: str) -> Mask:
    """Returns a mask of the texts that match a regular expression (RE2)."""
    return to_mask(pc.match_substring_regex(text, pattern))


def owners(broken: Mask, lengths: npt.NDArray[Any]) -> Mask:
    """Returns a mask of the rows that own a broken entry, from the number of entries of each row."""
    bad = np.zeros(len(lengths), dtype=bool)
    bad[np.repeat(np.arange(len(lengths)), lengths)[broken]] = True
    return bad


def offsets(lengths: npt.NDArray[Any]) -> Array:
    """Returns the offsets of lists of these lengths; int32."""
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
