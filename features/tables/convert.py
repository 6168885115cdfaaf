"""Converts a column of a foreign Parquet file to its canonical type, and marks the cells that cannot be read.

Everything here works on whole columns. A cell that cannot be read becomes NULL and is marked; a column whose type can
never fit raises `Misfit`. NULL, NaN and, in a column that does not hold text, the empty text are missing cells: no
value was written there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from features.arrays import (
    Array,
    Converted,
    Mask,
    Misfit,
    decoded,
    is_text,
    matches,
    offsets,
    only,
    owners,
    pc,
    plain,
    to_mask,
    trimmed,
)
from features.tables.dialect import Dialect, is_time
from features.tables.times import read_times
from features.tables.written import as_bools, lists, maps, prices

MOST_ID_BYTES = 512
"""The longest id that the API takes."""

_EXACT_BELOW = {pa.float16(): 2**11, pa.float32(): 2**24, pa.float64(): 2**53}
"""From here on a float stands for several whole numbers: an id that was stored as such may be that of another."""

# Of 19 digits some do not fit into 64 bits.
_INTEGER_TEXT = r"^[+-]?\d{1,18}(\.0*)?$"
_NUMBER_TEXT = r"^[+-]?(\d{1,25}(\.\d{0,25})?|\.\d{1,25})([eE][+-]?\d{1,3})?$"


def convert(
    column: Array, field: pa.Field[Any], dialect: Dialect | None = None, *, nan_allowed: bool = False
) -> Converted:
    """Converts a column to a field's type.

    Args:
        column: The column of the file, of any length.
        field: The canonical field; its `unit` metadata marks a time.
        dialect: The dialect of the table's writer.
        nan_allowed: NaN is a value (inside lists, where it means "unknown"), not a missing one.

    Raises:
        Misfit: No value of this type could ever be right.
    """
    column, dialect = plain(column), dialect or Dialect()
    if is_time(field):
        return read_times(column, dialect.units.get(field.name))
    if pa.types.is_map(field.type):
        return _map(column, field.type)
    if pa.types.is_list(field.type):
        return _list(column, field, dialect)
    if pa.types.is_string(field.type):
        return _strings(column, is_id=field.name.endswith("_id"))
    if pa.types.is_boolean(field.type):
        return _booleans(column)
    return _numbers(column, field.type, nan_allowed, priced=field.name == "price")


def _strings(column: Array, is_id: bool) -> Converted:
    """Converts to text, also whole numbers stored as floats or decimals; an id has at most `MOST_ID_BYTES`."""
    should = "text, or a whole number" if is_id else "text"
    bad = np.zeros(len(column), dtype=bool)
    if is_text(column.type):
        column, bad = decoded(column)
        should = f"text in UTF-8 of at most {MOST_ID_BYTES} bytes" if is_id else "text in UTF-8"
    elif pa.types.is_floating(column.type):
        should += f" below {_EXACT_BELOW[column.type]}, where {column.type} does not round it" if is_id else ""
        column, bad = _text_of_floats(column, is_id)
    elif pa.types.is_decimal(column.type):
        column, bad = _text_of_decimals(column, is_id)
    elif pa.types.is_nested(column.type) or pa.types.is_temporal(column.type):
        raise Misfit(should)
    else:
        column = pc.cast(column, pa.string())
    if is_id:
        long = to_mask(pc.greater(pc.binary_length(column), MOST_ID_BYTES))
        if long.any():
            column, bad = only(column, ~long), bad | long
    return Converted(column, bad, should)


def _text_of_floats(column: Array, is_id: bool) -> tuple[Array, Mask]:
    """Converts 7.0 to the text `7`; an id cannot have a fraction or have been rounded, NaN is missing."""
    # pandas makes a column of whole ids floats as soon as one is missing: 7.0 is the 7 of another file.
    numbers = pc.cast(column, pa.float64())
    column = only(column, ~to_mask(pc.is_nan(numbers)))
    whole = _fits(column, pa.int64())
    if is_id:
        whole &= to_mask(pc.less(pc.abs(numbers), float(_EXACT_BELOW[column.type])))
    integers = pc.cast(pc.cast(only(column, whole), pa.int64(), safe=False), pa.string())
    fractions = to_mask(column.is_valid()) & ~whole
    if is_id:
        return integers, fractions
    return pc.coalesce(integers, pc.cast(column, pa.string())), np.zeros(len(column), dtype=bool)


def _text_of_decimals(column: Array, is_id: bool) -> tuple[Array, Mask]:
    """Converts 7.00 to the text `7`; an id cannot have a fraction."""
    text = pc.cast(column, pa.string())
    if (powers := matches(text, "E")).any():
        plainly = [None if value is None else f"{value:f}" for value in column.to_pylist()]
        text = pc.if_else(pa.array(powers), pa.array(plainly, pa.string()), text)
    text = pc.replace_substring_regex(text, r"\.0+$", "")
    fraction = matches(text, r"\.") & is_id
    return only(text, ~fraction), fraction


def _booleans(column: Array) -> Converted:
    should = "true or false"
    present = to_mask(column.is_valid())
    if pa.types.is_boolean(column.type):
        return Converted(column, np.zeros(len(column), dtype=bool), should)
    if is_text(column.type):
        text, empty, _ = trimmed(column)
        values, present = as_bools(text), present & ~empty
    elif pa.types.is_null(column.type):
        values = pc.cast(column, pa.bool_())
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        numbers = pc.cast(column, pa.float64(), safe=False)
        present &= ~to_mask(pc.is_nan(numbers))
        true = pc.equal(numbers, 1)
        values = only(true, to_mask(true) | to_mask(pc.equal(numbers, 0)))
    else:
        raise Misfit(should)
    return Converted(values, present & ~to_mask(values.is_valid()), should)


def _numbers(column: Array, dtype: pa.DataType, nan_allowed: bool, priced: bool = False) -> Converted:
    integer = pa.types.is_integer(dtype)
    should = (
        f"a whole number that fits {dtype}" if integer else "a price, such as 12.99" if priced else "a finite number"
    )
    present = to_mask(column.is_valid())
    if is_text(column.type):
        text, empty, _ = trimmed(column)
        present &= ~empty & ~matches(pc.utf8_lower(text), "^nan$")
        column, parsed = _parsed(text, integer, priced)
    else:
        column, parsed = _counted(column, integer, should)
        if pa.types.is_floating(column.type) and not nan_allowed:
            present &= ~to_mask(pc.is_nan(pc.cast(column, pa.float64())))
    if integer:
        good = _fits(column, dtype)
        values = pc.cast(only(column, good), dtype, safe=False)
    else:
        values = pc.cast(column, dtype, safe=False)
        good = to_mask(values.is_valid()) if nan_allowed else to_mask(pc.is_finite(values))
    good &= parsed
    return Converted(only(values, good), present & ~good, should)


def _parsed(text: Array, integer: bool, priced: bool) -> tuple[Array, Mask]:
    """Returns text as numbers, and a mask of those that were read: decimal digits, and prices as shops write them."""
    digits = matches(text, _INTEGER_TEXT if integer else _NUMBER_TEXT)
    bare = pc.replace_substring_regex(only(text, digits), r"^\+|\.0*$" if integer else r"^\+", "")
    numbers = pc.cast(bare, pa.int64() if integer else pa.float64())
    if not priced or digits.all():
        return numbers, digits
    amounts, read = prices(only(text, ~digits))
    return pc.coalesce(numbers, amounts), digits | read


def _counted(column: Array, integer: bool, should: str) -> tuple[Array, Mask]:
    """Returns a column as integers or floats, and a mask of the values that were read."""
    whole = np.ones(len(column), dtype=bool)
    if pa.types.is_decimal(column.type):
        if integer:  # through text, because a float64 holds 53 bits of an integer
            return _parsed(_text_of_decimals(column, is_id=True)[0], integer, priced=False)
        return pc.cast(column, pa.float64()), whole
    if pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        return pc.cast(column, pa.int64()), whole
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column, whole
    raise Misfit(should)


def _fits(column: Array, dtype: pa.DataType) -> Mask:
    """Returns a mask of the numbers that are whole and in an integer type's range."""
    least, most = _bounds(dtype)
    if pa.types.is_floating(column.type):
        numbers = pc.cast(column, pa.float64())
        # float(2^63 - 1) rounds up to 2^63, which does not fit: therefore "less than most + 1".
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


def _list(column: Array, field: pa.Field[Any], dialect: Dialect) -> Converted:
    """Converts to a list per row; a row is bad if one of its entries is, or is missing."""
    leaf = pa.field(field.name.removesuffix("s"), field.type.value_type)
    should = f"a list of {'text' if pa.types.is_string(leaf.type) else 'numbers'} without missing entries"
    written = np.zeros(len(column), dtype=bool)
    if is_text(column.type) and pa.types.is_string(leaf.type):
        column, written = lists(column, dialect.styles.get(field.name))
    if pa.types.is_null(column.type):
        column = pc.cast(column, field.type)
    if not pa.types.is_list(column.type):
        raise Misfit(should)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    # `values` would also return what lies in NULL rows and outside a slice; `flatten` leaves that out.
    inner = convert(column.flatten(), leaf, nan_allowed=True)
    broken = inner.bad | to_mask(inner.values.is_null())
    bad = owners(broken, lengths)
    values = pa.ListArray.from_arrays(offsets(lengths), inner.values, mask=pc.or_(column.is_null(), pa.array(bad)))
    return Converted(pc.cast(values, field.type), bad | written, should)


def _map(column: Array, dtype: pa.DataType) -> Converted:
    """Converts to a map from text to text: maps, structs, JSON, and the (key, value) lists of tools without maps."""
    should = "a map from text to text"
    if is_text(column.type):
        values, bad = maps(column)
        return Converted(values, bad, f"{should}, or a flat object in JSON")
    if pa.types.is_null(column.type):
        column = pc.cast(column, dtype)
    if pa.types.is_struct(column.type):
        return _map_of_struct(column, should)
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
    return Converted(pa.MapArray.from_arrays(offsets(lengths), text, values.values, mask=mask), bad, should)


def _map_of_struct(column: Array, should: str) -> Converted:
    """Converts a struct to a map of its fields by name; one that is NULL is left out."""
    columns, bad = {}, np.zeros(len(column), dtype=bool)
    for name, values in zip([part.name for part in column.type], column.flatten(), strict=True):
        values = plain(values)
        try:
            text = convert(pc.cast(values, pa.string()) if pa.types.is_temporal(values.type) else values, _TEXT)
        except Misfit:
            raise Misfit(should) from None
        columns[name], bad = text.values, bad | text.bad
    filled = pack_map(columns) if columns else pa.array([[]] * len(column), pa.map_(pa.string(), pa.string()))
    return Converted(only(filled, to_mask(column.is_valid()) & ~bad), bad, should)


_TEXT = pa.field("item", pa.string())


def _is_pairs(dtype: pa.DataType) -> bool:
    return pa.types.is_list(dtype) and pa.types.is_struct(dtype.value_type) and dtype.value_type.num_fields == 2


def pack_list(columns: Sequence[Array]) -> Array:
    """Returns one list per row of its values in the order of the columns; a NULL is left out."""
    rows, width = len(columns[0]), len(columns)
    across = np.arange(rows * width).reshape(width, rows).T.ravel()
    flat = pa.concat_arrays([pc.cast(column, pa.string()) for column in columns]).take(pa.array(across))
    counts = to_mask(flat.is_valid()).reshape(rows, width).sum(axis=1)
    return pa.ListArray.from_arrays(offsets(counts), flat.drop_null())


def pack_map(columns: Mapping[str, Array]) -> Array:
    """Returns one map per row from the columns' names to its values as text; a NULL is left out."""
    texts = [pc.cast(column, pa.string()) for column in columns.values()]
    names = [pc.if_else(t.is_valid(), name, None) for name, t in zip(columns, texts, strict=True)]
    values = pack_list(texts)
    return pa.MapArray.from_arrays(values.offsets, pack_list(names).values, values.values)
