"""One column of somebody's Parquet file -> the canonical type, and which of its rows do not fit.

Everything here works on whole columns. A row that does not fit becomes NULL and is marked; a column whose
type can never fit raises ``Misfit``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

END_OF_TIME_MS = 4_102_444_800_000  # 2100-01-01: nothing happens at or after it, nor before 1970
_SECONDS_BELOW = END_OF_TIME_MS // 1000
_INTEGER_TEXT = r"^-?\d{1,18}$"
_NUMBER_TEXT = r"^-?\d{1,25}(\.\d{1,25})?([eE][+-]?\d{1,2})?$"
_DATE_FORMATS = ("%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d")

TIME_IS = "a time from 1970 up to 2100, in milliseconds or seconds UTC"


class Misfit(Exception):
    """A column's type can never become the wanted one; the text says what would be right."""


@dataclass(frozen=True, slots=True)
class Converted:
    """A column in its canonical type; where ``bad`` is true the value was unusable; ``should`` says why."""

    values: Array
    bad: Mask
    should: str


def convert(column: Array, field: pa.Field[Any], *, unit_known: bool = False, nan_allowed: bool = False) -> Converted:
    """Convert a column to a field's type.

    Args:
        column: What the file holds, any length.
        field: The canonical field; its ``unit`` metadata marks a time.
        unit_known: The column says itself that it is in milliseconds; else the unit is told by magnitude.
        nan_allowed: NaN is a value (inside lists, where it says "unknown"), not a defect.

    Raises:
        Misfit: No value of this type could ever be right.
    """
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    if b"unit" in (field.metadata or {}):
        return _times(column, unit_known)
    if pa.types.is_map(field.type):
        return _map(column, field.type)
    if pa.types.is_list(field.type):
        return _list(column, field)
    if pa.types.is_string(field.type):
        return _strings(column, whole=field.name.endswith("_id"))
    if pa.types.is_boolean(field.type):
        return _booleans(column)
    return _numbers(column, field.type, nan_allowed)


def to_mask(values: Any) -> Mask:
    """An Arrow array of booleans as numpy; NULL counts as false."""
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False), dtype=bool)


def _is_text(dtype: pa.DataType) -> bool:
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)


def _is_bytes(dtype: pa.DataType) -> bool:
    return pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype) or pa.types.is_fixed_size_binary(dtype)


def _only(values: Array, good: Mask) -> Array:
    """The values where good, NULL elsewhere."""
    return pc.if_else(pa.array(good), values, pa.scalar(None, values.type))


def _strings(column: Array, whole: bool) -> Converted:
    """Text, or ids that somebody stored as numbers; a NaN id is a missing one."""
    should = "text, or a whole number" if whole else "text"
    clean = np.zeros(len(column), dtype=bool)
    if _is_text(column.type) or _is_bytes(column.type):
        return _utf8(column)
    if pa.types.is_floating(column.type) and whole:
        missing = to_mask(pc.is_nan(column))
        numbers = _numbers(_only(column, ~missing), pa.int64(), nan_allowed=False)
        return Converted(pc.cast(numbers.values, pa.string()), numbers.bad, should)
    plain = pa.types.is_primitive(column.type) and not pa.types.is_temporal(column.type)
    if plain or pa.types.is_null(column.type):
        return Converted(pc.cast(column, pa.string()), clean, should)
    raise Misfit(should)


def _utf8(column: Array) -> Converted:
    """Bytes that claim to be UTF-8: Parquet does not check it, and a key can only be made of what decodes."""
    text = pc.cast(column, options=pc.CastOptions(pa.string(), allow_invalid_utf8=True))
    bad = np.zeros(len(text), dtype=bool)
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        raw = pc.cast(text, pa.binary())
        for row in np.flatnonzero(to_mask(pc.invert(pc.string_is_ascii(text)))):
            bad[row] = not _decodes(raw[int(row)].as_py())
        text = _only(text, ~bad)
    return Converted(text, bad, "text in UTF-8")


def _decodes(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _booleans(column: Array) -> Converted:
    should = "true or false"
    if pa.types.is_boolean(column.type):
        return Converted(column, np.zeros(len(column), dtype=bool), should)
    if _is_text(column.type):
        lower = pc.utf8_lower(pc.cast(column, pa.string()))
        true, false = (pc.is_in(lower, value_set=pa.array(words)) for words in (["true", "1"], ["false", "0"]))
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        true, false = pc.equal(column, 1), pc.equal(column, 0)
    else:
        raise Misfit(should)
    bad = to_mask(column.is_valid()) & ~to_mask(true) & ~to_mask(false)
    return Converted(_only(pc.if_else(column.is_valid(), true, pa.scalar(None, pa.bool_())), ~bad), bad, should)


def _numbers(column: Array, dtype: pa.DataType, nan_allowed: bool) -> Converted:
    integer = pa.types.is_integer(dtype)
    should = f"a whole number that fits {dtype}" if integer else "a finite number"
    present = to_mask(column.is_valid())
    column, parsed = _parsed(column, integer, should)
    if integer:
        good = _fits(column, dtype)
        values = pc.cast(_only(column, good), dtype, safe=False)
    else:
        values = pc.cast(column, dtype, safe=False)
        good = np.ones(len(values), dtype=bool) if nan_allowed else to_mask(pc.is_finite(values))
    good &= parsed
    return Converted(_only(values, good | ~present), present & ~good, should)


def _parsed(column: Array, integer: bool, should: str) -> tuple[Array, Mask]:
    """The column as numbers, and where that worked; text is read as decimal digits."""
    whole = np.ones(len(column), dtype=bool)
    if _is_text(column.type):
        text = pc.utf8_trim_whitespace(pc.cast(column, pa.string()))
        digits = to_mask(pc.match_substring_regex(text, _INTEGER_TEXT if integer else _NUMBER_TEXT))
        return pc.cast(_only(text, digits), pa.int64() if integer else pa.float64()), digits
    if pa.types.is_decimal(column.type):
        return pc.cast(column, pa.float64()), whole
    if pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        return pc.cast(column, pa.int64()), whole
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column, whole
    raise Misfit(should)


def _fits(column: Array, dtype: pa.DataType) -> Mask:
    """Where a number is whole and inside an integer type's range."""
    least, most = _bounds(dtype)
    if pa.types.is_floating(column.type):
        numbers = pc.cast(column, pa.float64())
        # float(2^63 - 1) rounds up to 2^63, which does not fit: hence "less than most + 1".
        whole = pc.equal(pc.floor(numbers), numbers)
        return (
            to_mask(whole)
            & to_mask(pc.greater_equal(numbers, float(least)))
            & to_mask(pc.less(numbers, float(most + 1)))
        )
    low, high = _bounds(column.type)
    good = to_mask(column.is_valid())
    if low < least:
        good &= to_mask(pc.greater_equal(column, pa.scalar(least, column.type)))
    if high > most:
        good &= to_mask(pc.less_equal(column, pa.scalar(most, column.type)))
    return good


def _bounds(dtype: pa.DataType) -> tuple[int, int]:
    info: Any = np.iinfo(dtype.to_pandas_dtype())
    return int(info.min), int(info.max)


def _times(column: Array, unit_known: bool) -> Converted:
    """Milliseconds since 1970 from Arrow times, ISO text, and numbers of seconds or milliseconds."""
    present = to_mask(column.is_valid())
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        values = pc.cast(pc.cast(column, pa.timestamp("ms"), safe=False), pa.int64())
        good = present
    else:
        numbers, good = _time_numbers(column)
        good = good & np.isfinite(numbers) & (numbers >= 0)
        seconds = not unit_known and good.any() and np.median(numbers[good]) < _SECONDS_BELOW
        scale = 1000 if seconds else 1
        good = good & (numbers < END_OF_TIME_MS // scale)  # before the product, which could overflow
        values = pa.array(np.rint(np.where(good, numbers, 0) * scale).astype(np.int64), mask=~good)
    milliseconds = pc.fill_null(values, -1).to_numpy(zero_copy_only=False)
    good = good & (milliseconds >= 0) & (milliseconds < END_OF_TIME_MS)
    return Converted(_only(values, good), present & ~good, TIME_IS)


def _time_numbers(column: Array) -> tuple[npt.NDArray[Any], Mask]:
    if not _is_text(column.type):
        numbers, good = _parsed(column, integer=False, should=TIME_IS)
        good = good & to_mask(numbers.is_valid())
        wide = np.float64 if pa.types.is_floating(numbers.type) else np.int64  # seconds in int32 grow by 1000
        return pc.fill_null(numbers, 0).to_numpy(zero_copy_only=False).astype(wide), good
    text = pc.utf8_trim_whitespace(pc.cast(column, pa.string()))
    digits = to_mask(pc.match_substring_regex(text, _NUMBER_TEXT))
    numbers = pc.cast(_only(text, digits), pa.float64())
    plain = pc.replace_substring_regex(_only(text, ~digits), r"(\.\d+)?(Z|\+00:?00)?$", "")
    parsed = [pc.strptime(plain, format=f, unit="s", error_is_null=True) for f in _DATE_FORMATS]
    numbers = pc.coalesce(numbers, *(pc.cast(pc.cast(p, pa.int64()), pa.float64()) for p in parsed))
    return pc.fill_null(numbers, 0.0).to_numpy(zero_copy_only=False), to_mask(numbers.is_valid())


def _list(column: Array, field: pa.Field[Any]) -> Converted:
    """A list per row; a row is bad when one of its entries is, or is missing."""
    leaf = pa.field(field.name.removesuffix("s"), field.type.value_type)
    should = f"a list of {'text' if pa.types.is_string(leaf.type) else 'numbers'} without missing entries"
    if _is_text(column.type) and pa.types.is_string(leaf.type):
        column = pc.split_pattern(pc.cast(column, pa.string()), "|")
    if pa.types.is_null(column.type):
        column = pc.cast(column, field.type)
    if not hasattr(column.type, "value_type") or pa.types.is_map(column.type):
        raise Misfit(should)
    column = pc.cast(column, pa.list_(column.type.value_type))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    inner = convert(column.flatten(), leaf, nan_allowed=True)
    broken = inner.bad | to_mask(inner.values.is_null())
    bad = owners(broken, lengths)
    values = pa.ListArray.from_arrays(_offsets(lengths), inner.values, mask=pc.or_(column.is_null(), pa.array(bad)))
    return Converted(pc.cast(values, field.type), bad, should)


def _map(column: Array, dtype: pa.DataType) -> Converted:
    """A map from text to text; also the list of (key, value) structs that tools without maps write."""
    should = "a map from text to text"
    if pa.types.is_null(column.type):
        column = pc.cast(column, dtype)
    if pa.types.is_map(column.type):
        ends = column.offsets.to_numpy()
        first, lengths = int(ends[0]), np.diff(ends)
        keys, items = (half.slice(first, int(ends[-1]) - first) for half in (column.keys, column.items))
    elif _is_pairs(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        keys, items = column.flatten().flatten()
    else:
        raise Misfit(should)
    try:
        names, values = (
            convert(keys, pa.field("key", pa.string())),
            convert(items, pa.field("item", pa.string())),
        )
    except Misfit:
        raise Misfit(should) from None
    broken = names.bad | to_mask(names.values.is_null()) | values.bad
    bad = owners(broken, lengths)
    text = pc.fill_null(names.values, "")  # a map's key may not be NULL, not even in a row that is thrown away
    mask = pc.or_(column.is_null(), pa.array(bad))
    return Converted(pa.MapArray.from_arrays(_offsets(lengths), text, values.values, mask=mask), bad, should)


def _is_pairs(dtype: pa.DataType) -> bool:
    if not (pa.types.is_list(dtype) or pa.types.is_large_list(dtype)):
        return False
    return pa.types.is_struct(dtype.value_type) and dtype.value_type.num_fields == 2


def owners(broken: Mask, lengths: npt.NDArray[Any]) -> Mask:
    """The rows that own a broken entry, given how many entries each row has."""
    bad = np.zeros(len(lengths), dtype=bool)
    bad[np.repeat(np.arange(len(lengths)), lengths)[broken]] = True
    return bad


def _offsets(lengths: npt.NDArray[Any]) -> Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def pack_list(columns: Sequence[Array]) -> Array:
    """One list per row of its values in the order of the columns; a NULL is left out."""
    rows, width = len(columns[0]), len(columns)
    across = np.arange(rows * width).reshape(width, rows).T.ravel()
    flat = pa.concat_arrays([pc.cast(column, pa.string()) for column in columns]).take(pa.array(across))
    given = to_mask(flat.is_valid()).reshape(rows, width).sum(axis=1)
    return pa.ListArray.from_arrays(_offsets(given), flat.drop_null())


def pack_map(columns: Mapping[str, Array]) -> Array:
    """One map per row from the columns' names to its values as text; a NULL is left out."""
    texts = [pc.cast(column, pa.string()) for column in columns.values()]
    names = [pc.if_else(t.is_valid(), name, None) for name, t in zip(columns, texts, strict=True)]
    values = pack_list(texts)
    return pa.MapArray.from_arrays(values.offsets, pack_list(names).values, values.values)
