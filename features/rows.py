"""One table as somebody wrote it -> its good rows in canonical columns, and why each other row was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.columns import Array, Mask, Misfit, convert, owners, pc, to_mask
from features.content import nulls, select
from features.errors import TablesError
from features.schema import Required

# Letter case is ignored before this, so USER_ID and Timestamp need no line here.
ALIASES = {
    "datetime": "timestamp",
    "rating": "value",
    "weight": "value",
    "event_value": "value",
    "genres": "categories",
}
_NOT_NEGATIVE = ("price", "position")


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was left out: the file, its 0-based row there, which field is wrong and what would be right."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Unread:
    """The cells of one optional column of one file that could not be read and are NULL; their rows stay.

    Attributes:
        file: The file.
        column: The column, by its canonical name.
        count: How many cells.
        row: The first of them, 0-based in the file.
        reason: What that cell holds and what would be right.
    """

    file: str
    column: str
    count: int
    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Intake:
    """The fate of a table's rows.

    Attributes:
        kept: Number of rows in the table.
        rejected: The rows that were left out.
        unread: The cells that were left out of the kept rows.
    """

    kept: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Part:
    """One file's good rows, and where in the file each of them stands."""

    source: str
    table: pa.Table
    rows: npt.NDArray[np.int64]
    rejected: list[Rejected]
    unread: list[Unread] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Fault:
    """The rows in which one field is wrong."""

    name: str
    bad: Mask
    should: str
    column: Array


def origins(found: pa.Schema, schema: pa.Schema, required: Required, source: str) -> dict[str, str]:
    """Canonical column -> the file's column."""
    chosen: dict[str, str] = {}
    for name in schema.names:
        same = [n for n in found.names if n == name] or [n for n in found.names if _canonical(n) == name]
        if len(same) > 1:
            raise TablesError(f"{source}: columns {same} all mean {name}: keep one of them")
        if same:
            chosen[name] = same[0]
    for need in required:
        choices = (need,) if isinstance(need, str) else need
        if not any(name in chosen for name in choices):
            raise TablesError(f"{source}: no column {' or '.join(choices)}; it has {found.names}")
    return chosen


def _canonical(name: str) -> str:
    return ALIASES.get(name.lower(), name.lower())


def fit(
    table: pa.Table, schema: pa.Schema, required: Required, source: str, numbers: npt.NDArray[np.int64] | None = None
) -> Part:
    """Convert the columns, find every row with a fault, keep the others.

    `numbers` says where in the source each row stands, for a table that is not all of it.
    """
    columns: dict[str, Array] = {}
    faults: list[_Fault] = []
    for name, origin in origins(table.schema, schema, required, source).items():
        given = table.column(origin).combine_chunks()
        known = (table.schema.field(origin).metadata or {}).get(b"unit") == b"ms"
        try:
            converted = convert(given, schema.field(name), unit_known=known)
        except Misfit as misfit:
            raise TablesError(f"{source}: column {origin} is {given.type}, should be {misfit}") from None
        except pa.ArrowException as error:
            raise TablesError(f"{source}: column {origin} ({given.type}): {error}") from error
        columns[name] = converted.values
        faults.append(_Fault(name, converted.bad, converted.should, given))
    faults += [*_missing(columns, required, faults), *_broken_rules(columns)]
    bad = np.logical_or.reduce([fault.bad for fault in faults])
    numbers = np.arange(table.num_rows) if numbers is None else numbers
    rejected = [Rejected(source, int(numbers[row]), _reason(faults, int(row))) for row in np.flatnonzero(bad)]
    given_or_null = [columns.get(f.name, nulls(table.num_rows, f.type)) for f in schema]
    full, good = pa.table(given_or_null, schema=schema), np.flatnonzero(~bad)
    return Part(source, select(full, good) if bad.any() else full, numbers[good], rejected)


def _missing(columns: Mapping[str, Array], required: Required, faults: list[_Fault]) -> Iterator[_Fault]:
    unusable = {fault.name: fault.bad for fault in faults}
    for need in required:
        names = [n for n in ((need,) if isinstance(need, str) else need) if n in columns]
        absent = np.logical_and.reduce([_is_absent(columns[n]) & ~unusable[n] for n in names])
        yield _Fault(" or ".join(names), absent, "given in every row", columns[names[0]])


def _is_absent(values: Array) -> Mask:
    empty = pc.equal(values, "") if pa.types.is_string(values.type) else None
    return to_mask(values.is_null()) | (False if empty is None else to_mask(empty))


def _broken_rules(columns: Mapping[str, Array]) -> Iterator[_Fault]:
    for name in _NOT_NEGATIVE:
        if name in columns:
            yield _Fault(name, to_mask(pc.less(columns[name], 0)), "0 or more", columns[name])
    if "propensities" not in columns:
        return
    propensities, size = columns["propensities"], pc.list_value_length(columns["item_ids"])
    for name in ("propensities", "scores", "features"):
        if name in columns:
            uneven = to_mask(pc.not_equal(pc.list_value_length(columns[name]), size))
            yield _Fault(name, uneven, "as long as item_ids", columns[name])
    flat = propensities.flatten().to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(propensities), 0).to_numpy()
    impossible = owners((flat <= 0) | (flat > 1), lengths)
    yield _Fault("propensities", impossible, "probabilities above 0 and up to 1, or NaN", propensities)


def _reason(faults: list[_Fault], row: int) -> str:
    return "; ".join(f"{f.name} is {_shown(f.column, row)}, should be {f.should}" for f in faults if f.bad[row])


def _shown(column: Array, row: int) -> str:
    """A value as the file holds it, whatever that is, short enough for a line."""
    value = column.slice(row, 1)
    if not value.is_valid()[0].as_py():
        return "missing"
    if pa.types.is_temporal(value.type):
        return str(pc.cast(value, pa.string())[0])
    if pa.types.is_string(value.type) or pa.types.is_large_string(value.type):
        value = pc.cast(value, pa.large_binary())
    try:
        plain = value[0].as_py()
    except (UnicodeDecodeError, ValueError, OverflowError):
        return f"an unreadable {value.type}"
    text = repr(plain.decode(errors="backslashreplace") if isinstance(plain, bytes) else plain)
    return text if len(text) <= 60 else text[:57] + "..."
