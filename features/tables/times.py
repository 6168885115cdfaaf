"""Reads times in every usual form as milliseconds since 1970 in UTC.

Arrow times and ISO text carry their unit. Numbers do not: their unit is told from all values of a column that can be a
time of this age (1995 to 2100), in all files of the table (`UnitVotes`). 0, -1, dates such as 9999-12-31 and the limits
of the integer types stand for "none" or "for ever" and tell nothing about the unit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import Array, Converted, Mask, Misfit, is_text, matches, only, pc, plain, to_mask, trimmed
from features.errors import TablesError

END_OF_TIME_MS = 4_102_444_800_000  # 2100-01-01: nothing happens at or after it, nor before 1970
TIME_IS = "a time from 1970 up to 2100, in milliseconds or seconds UTC"

# 1995 up to 2100: the times of which a number tells its unit. Short enough that no number is in it in two units.
_AGE_S = (788_918_400, END_OF_TIME_MS // 1000)
_PER_SECOND = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}
_DATE_DIGITS = {"yyyymmdd": (19_950_101, 21_000_101), "yyyymmddhhmmss": (19_950_101_000_000, 21_000_101_000_000)}
_RANGES = {unit: (_AGE_S[0] * n, _AGE_S[1] * n) for unit, n in _PER_SECOND.items()} | _DATE_DIGITS
UNIT_WORDS = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
    "yyyymmdd": "digits of a date (YYYYMMDD)",
    "yyyymmddhhmmss": "digits of a time (YYYYMMDDhhmmss)",
}
RELATIVE = "relative seconds"
"""The unit of a column without any value of this age: seconds since 1970, which may be seconds since a beginning."""

DECLARED = "declared milliseconds"
"""The unit of a column whose metadata says milliseconds: no value is doubted."""

_LEAST_FAR = 21_000_101  # 2100-01-01 in digits
# Share of the values that must agree on a unit: a few slips cost their cells, a column of two units is refused.
_CLEAR = 2 / 3
_BIGGEST = 9.2e18  # from here on a number is the limit of int64, or beyond it
_MOST = np.iinfo(np.int64).max
_WHOLE_TEXT = r"^[+-]?\d{1,18}$|^[+-]?[1-8]\d{18}$"
_NUMBER_TEXT = r"^[+-]?(\d{1,25}(\.\d{0,25})?|\.\d{1,25})([eE][+-]?\d{1,3})?$"
_ISO = (
    r"^(?P<y>\d{4})(?:[-/.](?P<m>\d{1,2})[-/.](?P<d>\d{1,2})|(?P<m2>\d{2})(?P<d2>\d{2}))"
    r"(?:(?:[Tt]|\s+)(?P<h>\d{1,2}):?(?P<mi>\d{2})(?::?(?P<s>\d{2})(?:[.,](?P<f>\d{1,12}))?)?"
    r"\s*(?:(?:Z|z|UTC|GMT|(?P<sign>[+-])(?P<zh>\d{2}):?(?P<zm>\d{2})?(?:\s[A-Z]{3,4})?)(?:\[[^\]]+\])?)?)?$"
)

_I64 = npt.NDArray[np.int64]
_F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _ParsedNumbers:
    """The numbers of a column: exact where they are whole.

    Attributes:
        whole: Whole numbers, at the limits of int64 where they do not fit; int64.
        floats: The same and the others; float64.
        exact: The rows whose number `whole` holds; bool.
        present: The rows that hold a number; bool.
    """

    whole: _I64
    floats: _F64
    exact: Mask
    present: Mask


def is_counted(dtype: pa.DataType) -> bool:
    """Returns True if a column of this type holds numbers, or text that may be numbers."""
    return pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype) or is_text(dtype)


def _numbers(column: Array) -> _ParsedNumbers:
    if is_text(column.type):
        return _numbers_of_text(column)
    present = to_mask(column.is_valid())
    if pa.types.is_floating(column.type):
        floats = _as_floats(column)
        whole = np.zeros(len(column), np.int64)
        present &= ~np.isnan(floats)
        return _ParsedNumbers(whole, np.where(present, floats, 0), np.zeros(len(column), bool), present)
    if pa.types.is_decimal(column.type) and column.type.scale > 0:
        whole = np.zeros(len(column), np.int64)
        return _ParsedNumbers(whole, _as_floats(column), np.zeros(len(column), bool), present)
    floats = _as_floats(column)
    fits = np.abs(floats) < _BIGGEST
    whole = pc.fill_null(pc.cast(only(column, fits), pa.int64()), 0).to_numpy(zero_copy_only=False)
    whole = np.where(fits, whole, np.where(floats > 0, _MOST, -_MOST))
    return _ParsedNumbers(whole, floats, present, present)


def _as_floats(column: Array) -> _F64:
    filled = pc.fill_null(pc.cast(column, pa.float64(), safe=False), 0.0)
    return np.asarray(filled.to_numpy(zero_copy_only=False), np.float64)


def _numbers_of_text(column: Array) -> _ParsedNumbers:
    text, _, _ = trimmed(column)
    text = pc.replace_substring_regex(text, r"^\+", "")
    present, exact = matches(text, _NUMBER_TEXT), matches(text, _WHOLE_TEXT)
    whole = pc.fill_null(pc.cast(only(text, exact), pa.int64()), 0).to_numpy(zero_copy_only=False)
    return _ParsedNumbers(whole, _as_floats(pc.cast(only(text, present), pa.float64())), exact, present)


@dataclass
class UnitVotes:
    """The votes of a column's values for the unit in which it counts time.

    Attributes:
        name: The column.
        votes: Number of values of this age, by the unit that makes them so.
    """

    name: str
    votes: Counter[str] = field(default_factory=Counter)
    _seen: dict[str, str] = field(default_factory=dict)
    _small: int = 0
    _stray: str = ""

    def add(self, column: Array, source: str) -> None:
        """Counts the values of a column of numbers or text in one file."""
        numbers = _numbers(plain(column))
        values = numbers.floats[numbers.present]
        values = values[(np.abs(values) < _BIGGEST) & (values > 0)]
        placed = np.zeros(values.size, bool)
        for unit, (low, high) in _RANGES.items():
            inside = (values >= low) & (values < high)
            if unit in _DATE_DIGITS and inside.any():
                inside[inside] = _of_digits(values[inside].astype(np.int64))[1]
            placed |= inside
            if inside.any():
                self.votes[unit] += int(np.count_nonzero(inside))
                self._seen.setdefault(unit, f"{values[inside][0]:.0f} in {source}")
        outside = values[~placed]
        outside = outside[~_is_far(outside)]
        self._small += int(np.count_nonzero(outside < _AGE_S[0]))
        stray = outside[outside >= _AGE_S[0]]
        if stray.size and not self._stray:
            self._stray = f"{stray[0]:.0f} in {source}"

    def unit(self) -> str | None:
        """Returns the unit; None if no value needs one.

        Raises:
            TablesError: The values disagree, or none of them can be a time of this age in any unit.
        """
        if self.votes:
            unit, most = self.votes.most_common(1)[0]
            if most >= _CLEAR * self.votes.total():
                return unit
            units = ", ".join(
                f"{UNIT_WORDS[unit]} ({count}, such as {self._seen[unit]})" for unit, count in self.votes.items()
            )
            raise TablesError(
                f"column {self.name} mixes times in {units}: write one unit, or better a column of type timestamp"
            )
        if self._stray:
            raise TablesError(
                f"column {self.name} holds {self._stray}, which is no time from 1995 up to 2100 in seconds, "
                "milliseconds, microseconds or nanoseconds: write a column of type timestamp"
            )
        return RELATIVE if self._small else None


def _is_far(values: _F64) -> Mask:
    """Returns a mask of first and last days of a year from 2100 to 9999 in some unit, which stand for "for ever"."""
    # Such a day may be off by a time zone (a quarter of an hour or more) or by the last second of the day before.
    far = np.zeros(values.size, bool)
    if not (values >= _LEAST_FAR).any():
        return far
    values = np.where((values > 0) & (values < _BIGGEST), values, 0)
    for per_second in (1, 1000, 10**6):
        seconds = np.floor(values / per_second)
        possible = (seconds >= _AGE_S[1]) & (seconds < 253_402_387_200)  # up to a day after the year 9999, for zones
        whole = np.where(possible, seconds, 0).astype(np.int64)
        day = (whole // 86_400).astype("M8[D]")
        into_month = (day - day.astype("M8[M]").astype("M8[D]")).astype(np.int64)
        month = day.astype("M8[M]").astype(np.int64) % 12
        edge = ((month == 0) & (into_month == 0)) | ((month == 11) & (into_month == 30))
        quarter = whole % 900
        far |= possible & edge & ((quarter == 0) | (quarter >= 899) | (whole % 60 == 59))
    for digits in (values, np.floor(values / 10**6)):
        far |= (digits >= _LEAST_FAR) & (digits < 10**8) & np.isin(digits % 10**4, (101, 1231))
    return far


def _of_digits(values: _I64) -> tuple[_I64, Mask]:
    """Returns the milliseconds of numbers whose digits spell a date or a time, and a mask of those that do."""
    days, clock = np.where(values >= 10**8, values // 10**6, values), np.where(values >= 10**8, values % 10**6, 0)
    day, good = _days(days // 10_000, days // 100 % 100, days % 100)
    hour, minute, second = clock // 10_000, clock // 100 % 100, clock % 100
    return (day * 86_400 + hour * 3600 + minute * 60 + second) * 1000, good & (hour < 24) & (minute < 60) & (
        second < 60
    )


def _days(year: _I64, month: _I64, day: _I64) -> tuple[_I64, Mask]:
    """Returns the days since 1970 of dates in the Gregorian calendar, and a mask of the dates that exist."""
    good = (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31) & (year >= 1) & (year <= 9999)
    months = ((np.where(good, year, 1970) - 1970) * 12 + np.where(good, month, 1) - 1).astype("M8[M]")
    days = months.astype("M8[D]") + (np.where(good, day, 1) - 1)
    good &= days.astype("M8[M]") == months
    return days.astype(np.int64), good


def read_times(column: Array, unit: str | None) -> Converted:
    """Converts a column to milliseconds since 1970, UTC; int64.

    Fractions of a millisecond are cut off. `late` marks times of 2100 or later, which are NULL and not `bad`; `early`
    marks dates before 1970, which are NULL and `bad`. 0 is a value like any other. The caller decides about all three.

    Args:
        column: A column as `plain` makes it.
        unit: The unit of its numbers, a key of `UNIT_WORDS`, `RELATIVE` or `DECLARED`.

    Raises:
        Misfit: The type holds no times.
    """
    # A column that declares milliseconds may hold 1970; in another one, such a number is in a wrong unit.
    doubted = unit != DECLARED
    unit = unit if doubted else "ms"
    present = to_mask(column.is_valid())
    dated = np.zeros(len(column), bool)
    should = TIME_IS if unit in (None, RELATIVE) else f"a time from 1970 up to 2100 in {UNIT_WORDS[str(unit)]} UTC"
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        values, good, dated = _typed(column), present, present
        should = "a time from 1970 up to 2100"
    elif is_counted(column.type):
        values, good, dated, missing = _counted_times(column, unit, doubted)
        present &= ~missing
        if is_text(column.type):
            should += ", or in ISO 8601, such as 2024-01-31T10:00:00Z"
    elif pa.types.is_null(column.type):
        values, good = np.zeros(len(column), np.int64), present
    else:
        raise Misfit(TIME_IS)
    late = good & (values >= END_OF_TIME_MS)
    early = dated & (values < 0)
    good = good & ~late & (values >= 0)
    return Converted(pa.array(np.where(good, values, 0), mask=~good), present & ~good & ~late, should, late, early)


def _counted_times(column: Array, unit: str | None, doubted: bool) -> tuple[_I64, Mask, Mask, Mask]:
    """Returns the milliseconds of numbers or text, and masks of the cells read, of dates, and of missing cells."""
    numbers = _numbers(column)
    values, good = _in_unit(numbers, unit, doubted)
    values = np.where(far := _for_ever(numbers, unit), END_OF_TIME_MS, values)
    good = good | far
    if not is_text(column.type):
        missing = to_mask(pc.is_nan(column)) if pa.types.is_floating(column.type) else np.zeros(len(column), bool)
        return values, good, np.zeros(len(column), bool), missing
    text, empty, _ = trimmed(column)
    iso_values, is_iso = _iso(only(text, ~numbers.present))
    infinite = matches(text, r"(?i)^\+?inf(inity)?$")  # as Postgres writes it
    values = np.where(infinite, END_OF_TIME_MS, np.where(is_iso, iso_values, values))
    return values, good | is_iso | infinite, is_iso, empty


def _typed(column: Array) -> _I64:
    """Returns Arrow dates and timestamps, UTC if they have no zone; times beyond int64 are at its limits."""
    dtype = column.type
    per_second = 1 if pa.types.is_date(dtype) else _PER_SECOND[dtype.unit]
    if pa.types.is_date32(dtype):
        days = pc.fill_null(pc.cast(pc.cast(column, pa.int32()), pa.int64()), 0).to_numpy(zero_copy_only=False)
        return np.asarray(days * 86_400_000)
    whole = np.asarray(pc.fill_null(pc.cast(column, pa.int64()), 0).to_numpy(zero_copy_only=False))
    if pa.types.is_date64(dtype):
        return whole
    return _scaled(whole, per_second)


def _scaled(whole: _I64, per_second: int) -> _I64:
    if per_second >= 1000:
        return whole // (per_second // 1000)
    return np.clip(whole, -(_MOST // 1000), _MOST // 1000) * 1000


def _in_unit(numbers: _ParsedNumbers, unit: str | None, doubted: bool) -> tuple[_I64, Mask]:
    """Returns the milliseconds of numbers in a unit, and a mask without those that another unit explains better."""
    unit = unit or RELATIVE
    if unit in _DATE_DIGITS:
        whole = np.where(numbers.exact, numbers.whole, np.clip(numbers.floats, -1e15, 1e15).astype(np.int64))
        values, good = _of_digits(whole)
        good &= numbers.exact | (numbers.floats == np.floor(numbers.floats))
        return np.where(whole == 0, 0, values), numbers.present & (good | (whole == 0))
    per_second = 1 if unit == RELATIVE else _PER_SECOND[unit]
    limit = _MOST // 1000 if per_second == 1 else _MOST
    floats = numbers.floats * (1000 / per_second)
    # Seconds have a fraction that binary floats do not hold exactly; finer units are cut off, as integers are.
    floats = np.rint(floats) if per_second == 1 else np.floor(floats)
    rounded = np.clip(floats, -float(limit), _BIGGEST).astype(np.int64)
    values = np.where(numbers.exact, _scaled(numbers.whole, per_second), rounded)
    odd = (values >= END_OF_TIME_MS) | (doubted & (values < _AGE_S[0] * 1000))
    if not odd.any():
        return values, numbers.present
    foreign = np.zeros(values.size, bool)
    for other_unit, (low, high) in _RANGES.items():
        if other_unit != unit and other_unit not in _DATE_DIGITS:
            # Before 1995 or after 2100 in this unit, and a time of this age in another: a slip of one cell, not a time.
            foreign |= (numbers.floats >= low) & (numbers.floats < high)
    return values, numbers.present & ~(odd & foreign)


def _for_ever(numbers: _ParsedNumbers, unit: str | None) -> Mask:
    """Returns a mask of numbers that mean "for ever" in some unit, and no time of this age in the column's own."""
    if unit == RELATIVE:
        return np.zeros(numbers.present.size, bool)
    low, high = _RANGES.get(str(unit), (0, 0))
    far = numbers.present & (numbers.floats >= _LEAST_FAR) & ~((numbers.floats >= low) & (numbers.floats < high))
    if far.any():
        far[far] = _is_far(numbers.floats[far])
    return far


def _iso(text: Array) -> tuple[_I64, Mask]:
    """Returns the milliseconds of texts in ISO 8601 and like forms, UTC without an offset, and a mask of them."""
    parts = pc.extract_regex(text, pattern=_ISO)
    good = to_mask(parts.is_valid())
    if not good.any():
        return np.zeros(len(text), np.int64), good

    def number(name: str) -> _I64:
        digits = pc.fill_null(pc.struct_field(parts, name), "")
        digits = pc.if_else(pc.equal(digits, ""), "0", digits)
        return np.asarray(pc.cast(digits, pa.int64()).to_numpy(zero_copy_only=False))

    day, is_date = _days(number("y"), number("m") + number("m2"), number("d") + number("d2"))
    hour, minute, second = number("h"), number("mi"), number("s")
    fraction = pc.utf8_slice_codeunits(pc.utf8_rpad(pc.fill_null(pc.struct_field(parts, "f"), ""), 3, "0"), 0, 3)
    milliseconds = pc.cast(fraction, pa.int64()).to_numpy(zero_copy_only=False)
    behind = to_mask(pc.equal(pc.struct_field(parts, "sign"), "-"))
    offset = (number("zh") * 60 + number("zm")) * np.where(behind, -1, 1)
    good &= is_date & (hour < 24) & (minute < 60) & (second < 60) & (number("zh") <= 18) & (number("zm") < 60)
    return ((day * 1440 + hour * 60 + minute - offset) * 60 + second) * 1000 + milliseconds, good
