"""Conforms a table of any writer to a schema: canonical columns of the good rows, and a reason for each other row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import Array, Mask, Misfit, only, owners, pc, plain, to_mask
from features.errors import TablesError
from features.keys import bare_name
from features.tables.convert import convert
from features.tables.dialect import Dialect, DialectSurvey, is_marked, is_time
from features.tables.order import nulls, select
from features.tables.schema import EVENT_SETS_REQUIRED, EVENTS, EVENTS_REQUIRED, Required
from features.tables.times import DECLARED, RELATIVE

# Letter case and the separators of words are ignored, so USER_ID and userId need no line here.
ALIASES = {
    "datetime": "timestamp",
    "rating": "value",
    "weight": "value",
    "event_value": "value",
    "genres": "categories",
    "is_available": "available",
    "availability": "available",
    "in_stock": "available",
}
USUAL_NAMES = {
    "user_id": ("user", "uid", "customer_id", "customer", "visitor_id", "reviewer_id", "member_id", "account_id"),
    "item_id": (
        *("item", "iid", "product_id", "product", "sku", "asin", "parent_asin", "article_id", "movie_id", "film_id"),
        *("track_id", "song_id", "book_id", "video_id", "game_id", "app_id", "business_id", "recipe_id", "anime_id"),
    ),
    "event_type": ("event", "event_name", "action", "behavior", "behaviour", "interaction_type"),
    "timestamp": ("time", "ts", "date", "event_time", "unix_review_time", "created_at", "unix_time"),
    "value": ("score", "stars", "overall"),
    "title": ("name", "product_name", "product_title", "movie_title"),
    "categories": ("genre", "category"),
    "creator_id": ("creator", "brand", "author", "artist"),
}
"""Names of columns that other writers use, by canonical name. They count only in a file without a surer name, and only
if it has a single one of them: a column that might mean something else must not be taken for it in silence."""

_NOT_NEGATIVE = ("price", "position")
_CLOSED = ("available", "allow_train", "allow_measure", "personal")
"""Columns of permissions: a cell that cannot be read permits nothing, nor may it become NULL, which permits."""
_WINDOW = ("available_from", "available_until")
_AGE = "a time from 1995 up to 2100, best in a column of type timestamp"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was left out: the file, its 0-based row there, the field that is wrong and the right form."""

    file: str
    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Unread:
    """The cells of one optional column of one file that could not be read and are NULL; their rows stay.

    Attributes:
        file: The file.
        column: The column, by its canonical name.
        count: Number of such cells.
        row: The row of the first of them, 0-based in the file.
        reason: The content of that cell and the right form.
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
        ignored: The columns of its files that no canonical column is made of.
        renamed: Canonical columns and the files' columns that they were read from under another name; `event_type` and
            its default where the files have none.
        unlisted: Of the items: those that events name and the table does not.
        hidden: True if those are not shown.
        closed: Of the items: True if none of them may be shown now.
        unordered: Of the events: True if nothing says in which order they happened.
    """

    kept: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    unread: list[Unread] = field(default_factory=list)
    ignored: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    unlisted: Sequence[str] = ()
    hidden: bool = False
    closed: bool = False
    unordered: bool = False


@dataclass(frozen=True, slots=True)
class TablePart:
    """Some of a file's good rows, with their places in the file.

    Attributes:
        source: The file.
        table: The rows.
        rows: The place of each of them, 0-based in the file; int64.
        rejected: The rows that were left out.
        unread: The cells that were left out of the rows.
        altered: True if a cell is NULL here and not in the file, so that the file cannot stand for the table.
    """

    source: str
    table: pa.Table
    rows: npt.NDArray[np.int64]
    rejected: list[Rejected]
    unread: list[Unread] = field(default_factory=list)
    altered: bool = False


def origins(columns: pa.Schema, schema: pa.Schema, required: Required, source: str) -> dict[str, str]:
    """Returns canonical column -> the file's column."""
    chosen: dict[str, str] = {}
    for name in schema.names:
        names = {bare_name(name), *(bare_name(alias) for alias, target in ALIASES.items() if target == name)}
        # The exact name wins, so that a file may have a `rating` of its own next to `value`.
        candidates = [n for n in columns.names if n == name] or [n for n in columns.names if bare_name(n) in names]
        if len(candidates) > 1:
            raise TablesError(f"{source}: columns {candidates} all mean {name}: keep one of them")
        if candidates:
            chosen[name] = candidates[0]
    chosen |= _usual(columns, schema, required, source, chosen)
    for need in required:
        choices = (need,) if isinstance(need, str) else need
        if choices == ("event_type",):
            continue  # `fit` has one for all rows
        if not any(name in chosen for name in choices):
            raise TablesError(f"{source}: no column {' or '.join(choices)}; it has {columns.names}")
    return chosen


def events_required(schemas: Sequence[tuple[pa.Schema, str]]) -> Required:
    """Returns the columns that a table of events needs, from the columns and names of its files.

    A table without any time or sequence holds sets of items. If one of its files has either, all rows need it: a file
    that lost its times must not turn the others into sets.
    """
    for columns, source in schemas:
        chosen = origins(columns, EVENTS, EVENT_SETS_REQUIRED, source)
        if "timestamp" in chosen or "sequence" in chosen:
            return EVENTS_REQUIRED
    return EVENT_SETS_REQUIRED


def _usual(
    columns: pa.Schema, schema: pa.Schema, required: Required, source: str, chosen: Mapping[str, str]
) -> dict[str, str]:
    """Returns more canonical columns and the file's, by the names that other writers use."""
    more: dict[str, str] = {}
    # A list of users says whom something is done to: there only the name itself is sure enough.
    if "item_id" not in schema.names:
        return more
    needed = {name for need in required for name in ((need,) if isinstance(need, str) else need)}
    has_time = "timestamp" in chosen or "sequence" in chosen
    for name, usual in USUAL_NAMES.items():
        if name in chosen or name not in schema.names or (name == "timestamp" and has_time):
            continue
        bare = {bare_name(other) for other in usual}
        candidates = [n for n in columns.names if n not in chosen.values() and bare_name(n) in bare]
        if len(candidates) > 1 and name in needed:
            raise TablesError(f"{source}: columns {candidates} may all mean {name}: rename the right one to {name}")
        if len(candidates) == 1:
            more[name] = candidates[0]
    return more


@dataclass(slots=True)
class _Cells:
    """One column during the search for faults: as in the file, as values, and the faulty rows with the right form."""

    given: Array
    values: Array
    faults: list[tuple[Mask, str]]
    late: Mask | None = None

    @property
    def bad(self) -> Mask:
        """The rows with any fault."""
        return np.asarray(np.logical_or.reduce([mask for mask, _ in self.faults]), bool)

    def reason(self, name: str, row: int) -> str:
        """Returns the reason why the cell of a row is refused."""
        should = next(should for mask, should in self.faults if mask[row])
        return f"{name} is {_shown(self.given, row)}, should be {should}"


def fit(
    table: pa.Table,
    schema: pa.Schema,
    required: Required,
    source: str,
    numbers: npt.NDArray[np.int64] | None = None,
    dialect: Dialect | None = None,
) -> TablePart:
    """Converts the columns, leaves out every row without a required cell, and every other cell that cannot be read.

    Where the cells say whether something is permitted (that an item is shown, that a model is trained on a row), a cell
    that cannot be read forbids it.

    Args:
        table: Any number of rows of a file.
        schema: The canonical columns.
        required: Those that a row needs.
        source: The file.
        numbers: The place of each row in the file, for a table that is not all of it.
        dialect: The dialect of the writer; None takes it from the table.
    """
    dialect = dialect_of([(table, source)], schema, required) if dialect is None else dialect
    numbers = np.arange(table.num_rows) if numbers is None else numbers
    cells = {
        name: _cells(table, origin, schema.field(name), source, dialect)
        for name, origin in origins(table.schema, schema, required, source).items()
    }
    _settle_times(cells, schema)
    _apply_rules(cells)
    faults = list(_row_faults(cells, required))
    bad = np.logical_or.reduce([mask for mask, _ in faults]) if faults else np.zeros(table.num_rows, bool)
    rejected = []
    for row in np.flatnonzero(bad).tolist():
        reasons = "; ".join(reason(row) for mask, reason in faults if mask[row])
        rejected.append(Rejected(source, int(numbers[row]), reasons))
    unread = list(_unread(cells, bad, source, numbers))
    # After `_unread`, whose NULL would permit what the cell may have forbidden.
    _close(cells, schema, table.num_rows)
    altered = any(cell.values.null_count > plain(cell.given).null_count for cell in cells.values())
    columns = [_column(cells, f, table.num_rows, dialect) for f in schema]
    full, good = pa.table(columns, schema=schema), np.flatnonzero(~bad)
    kept = select(full, good) if bad.any() else full
    return TablePart(source, kept, numbers[good], rejected, unread, altered)


def _column(cells: Mapping[str, _Cells], field: pa.Field[Any], length: int, dialect: Dialect) -> Array:
    """Returns the values of a column; of one that the file lacks the default, or NULL."""
    if field.name in cells:
        return cells[field.name].values
    if field.name == "event_type" and dialect.event_type:
        return pa.array([dialect.event_type] * length, pa.string())
    return nulls(length, field.type)


def merge_unread(parts: Iterable[Unread]) -> list[Unread]:
    """Returns one line per file and column: files in their order, then by first row and column."""
    merged: dict[tuple[str, str], Unread] = {}
    for cells in parts:
        key = (cells.file, cells.column)
        before = merged.get(key)
        merged[key] = replace(before, count=before.count + cells.count) if before else cells
    files = {file: place for place, file in enumerate(dict.fromkeys(file for file, _ in merged))}
    return sorted(merged.values(), key=lambda cells: (files[cells.file], cells.row, cells.column))


def dialect_of(tables: Sequence[tuple[pa.Table, str]], schema: pa.Schema, required: Required) -> Dialect:
    """Returns the dialect of tables in memory, each with the name of its file."""
    survey = DialectSurvey(schema)
    for table, source in tables:
        columns = origins(table.schema, schema, required, source)
        survey.read(columns, source)
        for name, origin in columns.items():
            if survey.asks(name, table.schema.field(origin)):
                for chunk in table.column(origin).chunks:
                    survey.add(name, chunk, source)
    return survey.dialect()


def _cells(table: pa.Table, origin: str, wanted: pa.Field[Any], source: str, dialect: Dialect) -> _Cells:
    chunked, origin_field = table.column(origin), table.schema.field(origin)
    if is_time(wanted) and is_marked(origin_field):
        dialect = Dialect(units={wanted.name: DECLARED})
    try:
        column = chunked.combine_chunks()
        converted = convert(column, wanted, dialect)
    except Misfit as misfit:
        raise TablesError(f"{source}: column {origin} is {chunked.type}, should be {misfit}") from None
    except pa.ArrowException as error:
        raise TablesError(f"{source}: column {origin} ({chunked.type}): {error}") from error
    values, bad = converted.values, converted.bad
    if wanted.name == "available_from" and converted.early is not None:
        # 0001-01-01 and 1900-01-01 mean no beginning, and any date before 1970 has the same effect today.
        values, bad = pc.if_else(pa.array(converted.early), 0, values), bad & ~converted.early
    cells = _Cells(column, values, [(bad, converted.should)], converted.late)
    if wanted.name in _WINDOW and dialect.units.get(wanted.name) == RELATIVE:
        # Offsets, or days as a spreadsheet counts them: a catalogue lives in the time of the clock on the wall.
        cells.faults.append((to_mask(pc.greater(values, 0)), _AGE))
    relative = is_marked(origin_field) or dialect.units.get(wanted.name) == RELATIVE
    # A time of 0 is none: in the contract an end at 0 is no end. A beginning at 0 stays, because it means the same.
    if wanted.name == "available_until" or (is_time(wanted) and not relative and wanted.name != "available_from"):
        cells.values = only(cells.values, ~to_mask(pc.equal(cells.values, 0)))
    return cells


def _settle_times(cells: Mapping[str, _Cells], schema: pa.Schema) -> None:
    """Marks times of 2100 or later as faults, except those of an item's availability, where they mean "for ever"."""
    for name, cell in cells.items():
        if is_time(schema.field(name)) and name not in _WINDOW and cell.late is not None:
            cell.faults.append((cell.late, cell.faults[0][1]))


def _row_faults(cells: Mapping[str, _Cells], required: Required) -> Iterator[tuple[Mask, Callable[[int], str]]]:
    """Yields masks of the rows that a required cell costs, with the reason for one of them."""
    for need in required:
        names = [name for name in ((need,) if isinstance(need, str) else need) if name in cells]
        if not names:
            continue  # a default, the same in every row
        satisfied = np.zeros(len(cells[names[0]].values), bool)
        absent = ~satisfied
        for name in names:
            # Of cells that can stand for one another, a later one costs the row only if the earlier ones are missing.
            yield cells[name].bad & ~satisfied, partial(cells[name].reason, name)
            satisfied |= ~_is_absent(cells[name].values) & ~cells[name].bad
            absent &= _is_absent(cells[name].values) & ~cells[name].bad
        subject = f"{' or '.join(names)} is "
        yield absent, partial(_absence, subject, cells[names[0]].given)


def _absence(subject: str, column: Array, row: int) -> str:
    return f"{subject}{_shown(column, row)}, should be given in every row"


def _is_absent(values: Array) -> Mask:
    empty = pc.equal(values, "") if pa.types.is_string(values.type) else None
    return to_mask(values.is_null()) | (False if empty is None else to_mask(empty))


def _unread(
    cells: Mapping[str, _Cells], left_out: Mask, source: str, numbers: npt.NDArray[np.int64]
) -> Iterator[Unread]:
    """Yields the cells of kept rows that cannot be read, and makes them NULL."""
    for name, cell in cells.items():
        bad = cell.bad & ~left_out
        if bad.any():
            first = int(np.argmax(bad))
            cell.values = only(cell.values, ~bad)
            yield Unread(source, name, int(np.count_nonzero(bad)), int(numbers[first]), cell.reason(name, first))


def _close(cells: dict[str, _Cells], schema: pa.Schema, length: int) -> None:
    """Forbids what a cell may permit that cannot be read; an item that begins after the end of time is never shown."""
    for name in _CLOSED:
        if name not in schema.names:
            continue
        shut = [cells[name].bad] if name in cells else []
        if name == "available":
            shut += [cells[part].bad for part in _WINDOW if part in cells]
            begins = cells["available_from"].late if "available_from" in cells else None
            shut += [] if begins is None else [begins]
        closed = np.logical_or.reduce(shut) if shut else np.zeros(length, bool)
        if closed.any():
            unknown = pa.nulls(length, pa.bool_())
            cell = cells.setdefault(name, _Cells(unknown, unknown, [(np.zeros(length, bool), "true or false")]))
            cell.values = pc.if_else(pa.array(closed), False, cell.values)


def _apply_rules(cells: Mapping[str, _Cells]) -> None:
    """Adds the faults of values that have the right type and cannot be right."""
    for name in _NOT_NEGATIVE:
        if name in cells:
            cells[name].faults.append((to_mask(pc.less(cells[name].values, 0)), "0 or more"))
    if "propensities" not in cells:
        return
    propensities, size = cells["propensities"].values, pc.list_value_length(cells["item_ids"].values)
    for name in ("propensities", "scores", "features"):
        if name in cells:
            uneven = to_mask(pc.not_equal(pc.list_value_length(cells[name].values), size))
            cells[name].faults.append((uneven, "as long as item_ids"))
    flat = propensities.flatten().to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(propensities), 0).to_numpy()
    impossible = owners((flat <= 0) | (flat > 1), lengths)
    cells["propensities"].faults.append((impossible, "probabilities above 0 and up to 1, or NaN"))


def _shown(column: Array, row: int) -> str:
    """Returns a value as the file holds it, of whatever type, short enough for a line."""
    value = plain(column.slice(row, 1))
    if not value.is_valid()[0].as_py():
        return "missing"
    if pa.types.is_temporal(value.type):
        return str(pc.cast(value, pa.string())[0])
    if pa.types.is_string(value.type) or pa.types.is_large_string(value.type):
        # As bytes: a text that is no UTF-8 must still be shown by the message that refuses it.
        value = pc.cast(value, pa.large_binary())
    try:
        content = value[0].as_py()
    except (UnicodeDecodeError, ValueError, OverflowError):
        return f"an unreadable {value.type}"
    text = repr(content.decode(errors="backslashreplace") if isinstance(content, bytes) else content)
    return text if len(text) <= 60 else text[:57] + "..."
