"""Finds the dialect of a table's writer, its units of time and form of lists, before any file is converted.

A cell such as `a, b` or `1700000000` can mean two things; all cells of a column, in all files, seldom can. Deciding by
file would read two files of one export differently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from features.arrays import Array, is_text, plain
from features.errors import TablesError
from features.keys import bare_name
from features.tables.times import UnitVotes, is_counted
from features.tables.written import ListStyle, distinct


@dataclass(frozen=True, slots=True)
class Dialect:
    """The decisions about the columns of one table, by canonical name.

    Attributes:
        units: The unit of numbers that are times, a key of `features.tables.times.UNIT_WORDS` or `RELATIVE`; without
            the columns whose type or metadata says it.
        styles: The form of lists that are written as one text.
        ignored: The columns of the files that no canonical column is made of, in the order of the files.
        renamed: Canonical columns that are read from columns of another name, and these names.
        event_type: The type of all events where no file has one.
    """

    units: Mapping[str, str] = field(default_factory=dict)
    styles: Mapping[str, ListStyle] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    event_type: str = ""


def is_time(wanted: pa.Field) -> bool:  # type: ignore[type-arg]
    """Returns True if a canonical column holds times."""
    return b"unit" in (wanted.metadata or {})


def is_marked(field: pa.Field) -> bool:  # type: ignore[type-arg]
    """Returns True if the metadata of a column says milliseconds."""
    return (field.metadata or {}).get(b"unit") == b"ms"


DEFAULT_TYPES = {True: "rating", False: "interaction"}
"""Event type of all rows of a table without one, by whether its rows have values."""


class DialectSurvey:
    """Gathers the evidence for the dialect of a table from its columns, file by file."""

    def __init__(self, schema: pa.Schema) -> None:
        """Takes the canonical schema."""
        self._schema = schema
        self._votes: dict[str, UnitVotes] = {}
        self._cells: dict[str, set[str]] = {}
        self._ignored: dict[str, None] = {}
        self._origins: dict[str, dict[str, str]] = {}
        self._files = 0

    def ignore(self, names: Iterable[str]) -> None:
        """Notes columns of a file that no canonical column is made of; not the row numbers that pandas writes."""
        self._ignored.update(dict.fromkeys(name for name in names if not name.startswith("__index_level_")))

    def read(self, columns: Mapping[str, str], source: str) -> None:
        """Notes the columns that a file is read from, canonical column -> the file's.

        Raises:
            TablesError: Earlier files have the user, the item or the type under another name, or one file has a type
                and another has none: the columns might not mean the same.
        """
        for name in ("user_id", "item_id", "event_type"):
            earlier = self._origins.get(name, {})
            if self._files and name in self._schema.names and bool(earlier) != (name in columns):
                raise TablesError(f"{source}: not all files of this table have a column {name}: write it in each")
            if name in columns and earlier and bare_name(columns[name]) not in map(bare_name, earlier):
                other, file = next(iter(earlier.items()))
                problem = f"has {columns[name]} for {name}, where {file} has {other}"
                raise TablesError(f"{source}: {problem}: name both {name} if they mean the same")
        for name, origin in columns.items():
            self._origins.setdefault(name, {}).setdefault(origin, source)
        self._files += 1

    def _renamed(self) -> dict[str, str]:
        others = {}
        for name, origins in self._origins.items():
            if names := [origin for origin in origins if bare_name(origin) != bare_name(name)]:
                others[name] = " and ".join(names)
        return others

    def asks(self, name: str, origin: pa.Field) -> bool:  # type: ignore[type-arg]
        """Returns True if the values of a file's column for the canonical column `name` decide anything."""
        dtype = plain(pa.array([], origin.type)).type
        if is_time(self._schema.field(name)):
            return is_counted(dtype) and not is_marked(origin)
        return name == "categories" and is_text(dtype)

    def add(self, name: str, column: Array, source: str) -> None:
        """Counts the values, in one file, of a column of which `asks` is true."""
        if is_time(self._schema.field(name)):
            self._votes.setdefault(name, UnitVotes(name)).add(column, source)
        else:
            self._cells.setdefault(name, set()).update(distinct(plain(column)))

    def dialect(self) -> Dialect:
        """Returns the decisions.

        Raises:
            TablesError: The unit of a column of times cannot be told.
        """
        units = {name: unit for name, votes in self._votes.items() if (unit := votes.unit())}
        styles = {name: ListStyle.of(cells) for name, cells in self._cells.items()}
        renamed, event_type = self._renamed(), ""
        if self._files and "event_type" in self._schema.names and "event_type" not in self._origins:
            event_type = DEFAULT_TYPES["value" in self._origins]
            renamed["event_type"] = f"the default {event_type!r}"
        return Dialect(units, styles, tuple(self._ignored), renamed, event_type)
