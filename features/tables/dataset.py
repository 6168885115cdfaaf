"""Reads Parquet of any writer into the canonical tables, and writes data sets that every version reads alike.

A data set is a directory: `events`, `items`, `users` (and `impressions`, `judgments` where there are any), each one
Parquet file or a directory of them, and `dataset.json` where Penchant wrote it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.arrays import Array, only, pc
from features.clock import now_ms
from features.errors import TablesError
from features.private_files import FOLDER_MODE, make_folders
from features.tables.conform import (
    Intake,
    Rejected,
    TablePart,
    Unread,
    dialect_of,
    events_required,
    fit,
    merge_unread,
    origins,
)
from features.tables.dialect import Dialect, DialectSurvey
from features.tables.event_reader import (
    BATCH_ROWS,
    Events,
    Survey,
    arrange,
    fate_of_events,
    is_canonical,
    reader_of,
)
from features.tables.files import TableFile, find_files, table_path
from features.tables.order import codes, fingerprint, is_present, order_events, select
from features.tables.schema import (
    EVENTS,
    EVENTS_REQUIRED,
    IMPRESSIONS,
    IMPRESSIONS_REQUIRED,
    ITEMS,
    ITEMS_REQUIRED,
    USERS,
    USERS_REQUIRED,
    Required,
)
from features.tables.times import END_OF_TIME_MS, RELATIVE

_NAMED = 5
"""Files of a directory that a message names at most."""


@dataclass(frozen=True, slots=True)
class LoadedTable:
    """A table with exactly its schema's columns (all NULL if the file has none), and the rows and cells left out of it.

    Attributes:
        table: The rows that are kept.
        rejected: The rows that were left out.
        unread: The cells that were left out of kept rows.
        units: The unit in which a column counts time, if only its values tell: {column: unit}.
        ignored: The columns of the files that no canonical column is made of.
        renamed: Canonical columns that are read from columns of another name, and these names.
        places: The files in order, each with the places of its kept rows there: [(file, int64 [n])]; empty where a row
            that repeats an id was left out.
    """

    table: pa.Table
    rejected: list[Rejected]
    unread: list[Unread] = field(default_factory=list)
    units: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    places: list[tuple[str, npt.NDArray[np.int64]]] = field(default_factory=list)

    def place(self, row: int) -> str:
        """Names the file of a kept row, and its row there.

        Raises:
            IndexError: There is no such row.
        """
        for source, rows in self.places:
            if row < rows.size:
                return f"{source} row {rows[row]}"
            row -= rows.size
        raise IndexError(row)

    @property
    def intake(self) -> Intake:
        """The fate of its rows."""
        return Intake(self.table.num_rows, self.rejected, self.unread, self.ignored, self.renamed)


HELD_ROWS = 1 << 20
"""Events up to which a data set is read into memory; more are read from disk, a part at a time."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set; items and users in memory, events read a part at a time.

    Attributes:
        stream: The events; those of a user stand together, oldest first (see `order_events`).
        items: `ITEMS`, one row per item; made of the events' items where the data set has no such table.
        users: `USERS`, one row per user; empty if the data set has no such table.
        info: The content of `dataset.json`, with `name`, `fingerprint`, `users`, `items`, `events`, `ordered_only`,
            `event_types` {name: count} and `first_timestamp`, `last_timestamp` (ms) computed from the rows;
            `time_units` {"events.timestamp": unit} where values had to tell in which unit a column counts time.
        intake: The fate of each table's rows: "events", "items", "users", where the data set has them.
    """

    stream: Events
    items: pa.Table
    users: pa.Table
    info: dict[str, Any]
    intake: dict[str, Intake] = field(default_factory=dict)

    @property
    def rejected(self) -> list[Rejected]:
        """The rows that were left out of all tables."""
        return [row for intake in self.intake.values() for row in intake.rejected]

    @property
    def unread(self) -> list[Unread]:
        """The cells that were left out of kept rows, of all tables."""
        return [cells for intake in self.intake.values() for cells in intake.unread]

    @property
    def events(self) -> pa.Table:
        """All events in memory: `EVENTS`."""
        return self.stream.table()


def read_table(path: Path, schema: pa.Schema, required: Required) -> LoadedTable:
    """Reads one Parquet file, or all below a directory in the order of their names.

    Columns are found by name, alias or either in any letter case; others are ignored. A table whose only required
    column is its id has one row per id: later ones are rejected, and an item whose rows disagree on when it may be
    shown is not shown.

    Raises:
        TablesError: A file is not Parquet, lacks a required column or holds one of a type that cannot fit.
    """
    files = find_files(Path(path))
    dialect = _dialect(files, schema, required)
    parts = [part for file in files for part in _parts(file, schema, required, dialect)]
    return _merge(parts, schema, required, dialect)


def conform(
    table: pa.Table,
    schema: pa.Schema,
    required: Required,
    source: str,
    numbers: npt.NDArray[np.int64] | None = None,
) -> LoadedTable:
    """Brings a table in memory to a schema, as `read_table` does.

    `source` names it in the rejected rows; `numbers` are the places of its rows there (None: the same).
    """
    dialect = dialect_of([(table, source)], schema, required)
    return _merge([fit(table, schema, required, source, numbers, dialect)], schema, required, dialect)


def read_info(path: Path) -> dict[str, Any]:
    """Returns the content of a data set's `dataset.json`, empty if it has none.

    Raises:
        TablesError: It is damaged.
    """
    file = path / "dataset.json"
    if not file.exists():
        return {}
    try:
        info = json.loads(file.read_bytes())
    except ValueError as error:
        raise TablesError(f"{file} is not JSON ({error}): remove it, or prepare the data set again") from error
    if not isinstance(info, dict):
        raise TablesError(f"{file} must hold a JSON object: remove it, or prepare the data set again")
    return info


def open_dataset(
    path: Path, *, until: int | None = None, items_from: Path | None = None, include_withheld: bool = False
) -> Dataset:
    """Reads a data set's events, items and users.

    A warehouse grows while it is read: two readings with the same `until` and items have the same rows. Events whose
    users allow no training are left out, unless `include_withheld` is True.

    Args:
        path: Its directory.
        until: Log id up to which events are read; None reads as far as `dataset.json` calls it complete.
        items_from: Parquet file of the items, if they are not those of the data set.
        include_withheld: Also the events that no model may be trained on.

    Raises:
        TablesError: There are no events, or a file cannot be read.
    """
    path = Path(path)
    written = read_info(path)
    until = written.get("until") if until is None else until
    events_path = table_path(path, "events")
    if events_path is None:
        names = sorted(p.name for p in path.iterdir()) if path.is_dir() else ["no such directory"]
        content = ", ".join([*names[:_NAMED], "…"] if len(names) > _NAMED else names) or "nothing"
        raise TablesError(f"{path} is not a data set: it needs events.parquet or events/, found {content}")
    events, item_ids, events_intake, event_units = _open_events(events_path, until, include_withheld)
    if items_from:
        items = read_table(items_from, ITEMS, ITEMS_REQUIRED)
    else:
        # Without a table of items, the catalogue is made of the items that the events name.
        items = _optional(path, "items", ITEMS, ITEMS_REQUIRED) or conform(
            pa.table({"item_id": item_ids}), ITEMS, ITEMS_REQUIRED, str(events_path)
        )
    users = _optional(path, "users", USERS, USERS_REQUIRED) or LoadedTable(USERS.empty_table(), [])
    info = {"name": path.name} | written | _facts(events, items.table, users.table)
    if "until" in written:
        info["until"] = until
    units = {f"events.{name}": unit for name, unit in event_units.items()}
    units |= {f"items.{name}": unit for name, unit in items.units.items() if unit != RELATIVE}
    if units:
        info["time_units"] = units
    intake = {"events": events_intake, "items": _items_intake(items, item_ids), "users": users.intake}
    return Dataset(events, items.table, users.table, info, intake)


def _items_intake(items: LoadedTable, named: Array) -> Intake:
    """Returns the fate of the items' rows, with the items that only events name."""
    unlisted = named.filter(pc.invert(pc.is_in(named, value_set=items.table["item_id"].combine_chunks())))
    return dataclasses.replace(
        items.intake,
        unlisted=unlisted.to_pylist(),
        hidden=states_availability(items.table),
        closed=_is_closed(items.table),
    )


def states_availability(items: pa.Table) -> bool:
    """Returns True if a table of items says of some item whether, or when, it may be shown.

    Then an item that the table lacks is most likely no longer sold. Without such a column it describes items, perhaps
    not all of them.
    """
    return any(is_present(items[name]) for name in ("available", "available_from", "available_until"))


def _open_events(
    path: Path, until: int | None, include_withheld: bool
) -> tuple[Events, Array, Intake, Mapping[str, str]]:
    """Returns the events in order, the items that they name in the order of rows, the rows' fate, and units of time."""
    files = find_files(path)
    # Counted from the footers: the way of reading is chosen before any row is read.
    count = sum(file.row_count() for file in files)
    required = events_required([(file.schema(), str(file.path)) for file in files])
    if count <= HELD_ROWS:
        loaded = read_table(path, EVENTS, required)
        table = select(loaded.table, _wanted(loaded.table, until, include_withheld))
        events = Events.of(order_events(table))
        return events, pc.unique(table["item_id"]), fate_of_events(loaded.intake, events), loaded.units
    dialect = _dialect(files, EVENTS, required)

    def parts() -> Iterator[TablePart]:
        for file in files:
            for part in _parts(file, EVENTS, required, dialect):
                yield _part_of(part, until, include_withheld)

    survey = Survey(parts())
    whole = survey.rows == count and not survey.altered
    as_it_is = whole and survey.in_order() and all(map(is_canonical, files))
    events = Events(reader_of(files), survey.rows, survey.present) if as_it_is else arrange(parts, survey)
    fate = Intake(survey.rows, survey.rejected, merge_unread(survey.unread), dialect.ignored, dialect.renamed)
    return events, pa.array(survey.items, pa.string()), fate_of_events(fate, events), dialect.units


def _wanted(events: pa.Table, until: int | None, include_withheld: bool) -> npt.NDArray[np.int64]:
    """Returns the rows up to a log id, without those that no model may be trained on.

    A row without a log id was imported before the log began.
    """
    wanted = np.ones(events.num_rows, np.bool_)
    if until is not None:
        wanted &= pc.fill_null(events["log_id"], 0).to_numpy() <= np.uint64(until)
    if not include_withheld:
        wanted &= pc.fill_null(events["allow_train"], True).to_numpy()
    return np.flatnonzero(wanted)


def _part_of(part: TablePart, until: int | None, include_withheld: bool) -> TablePart:
    rows = _wanted(part.table, until, include_withheld)
    return dataclasses.replace(part, table=select(part.table, rows), rows=part.rows[rows])


def _dialect(files: Sequence[TableFile], schema: pa.Schema, required: Required) -> Dialect:
    """Returns the dialect of the writer of all the files, from the columns that decide it."""
    survey = DialectSurvey(schema)
    for file in files:
        file_schema = file.schema()
        columns = origins(file_schema, schema, required, str(file.path))
        survey.read(columns, str(file.path))
        survey.ignore(name for name in file_schema.names if name not in {*columns.values(), *file.partition})
        deciding = {name: origin for name, origin in columns.items() if survey.asks(name, file_schema.field(origin))}
        if not deciding:
            continue
        for table in file.batches(list(deciding.values()), BATCH_ROWS):
            for name, origin in deciding.items():
                survey.add(name, table[origin].combine_chunks(), str(file.path))
    return survey.dialect()


def _parts(file: TableFile, schema: pa.Schema, required: Required, dialect: Dialect) -> Iterator[TablePart]:
    """Yields the rows of a file, some at a time."""
    file_schema = file.schema()
    columns = list(origins(file_schema, schema, required, str(file.path)).values())
    start = 0
    for table in file.batches(columns, BATCH_ROWS):
        # The metadata of a column, its unit, is in the file's schema only.
        table = table.cast(pa.schema([file_schema.field(name) for name in table.column_names]))
        numbers = np.arange(start, start + table.num_rows)
        yield fit(table, schema, required, str(file.path), numbers, dialect)
        start += table.num_rows


def write_dataset(
    out: Path,
    events: pa.Table,
    items: pa.Table,
    users: pa.Table | None = None,
    *,
    impressions: pa.Table | None = None,
    name: str,
    notes: str = "",
) -> dict[str, Any]:
    """Writes a data set in one step: a reader sees the old one or the new one, never a half.

    Events are written in the order of `order_events`. Returns the content of `dataset.json`.

    Raises:
        TablesError: A row is malformed, or `out` holds something that is not a data set.
    """
    out = Path(out)
    tables = {
        "events": order_events(_strict(events, EVENTS, EVENTS_REQUIRED, "events")),
        "items": _strict(items, ITEMS, ITEMS_REQUIRED, "items"),
        "users": USERS.empty_table() if users is None else _strict(users, USERS, USERS_REQUIRED, "users"),
    }
    info = {"format": 1, "name": name, "notes": notes}
    info |= _facts(Events.of(tables["events"]), tables["items"], tables["users"])
    if impressions is not None:
        tables["impressions"] = _strict(impressions, IMPRESSIONS, IMPRESSIONS_REQUIRED, "impressions")
    _check_target(out)
    staging = out.parent / f".{out.name}.{os.getpid()}.tmp"  # a rename is one step only within a file system
    make_folders(staging.parent)
    staging.mkdir(FOLDER_MODE)
    try:
        for label, table in tables.items():
            if label != "users" or table.num_rows:
                pq.write_table(_without_empty(table), staging / f"{label}.parquet", compression="zstd")
        (staging / "dataset.json").write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return info


def _facts(events: Events, items: pa.Table, users: pa.Table) -> dict[str, Any]:
    users_count, types, times = 0, Counter[str](), []
    last = None
    for batch in events.batches(("user_id", "event_type", "timestamp")):
        named = batch["user_id"].combine_chunks()
        # The events of a user stand together, so a change of names is a new user.
        users_count += pc.sum(pc.not_equal(named.slice(1), named.slice(0, len(named) - 1))).as_py() or 0
        users_count += named[0].as_py() != last
        last = named[len(named) - 1].as_py()
        types.update({entry["values"]: entry["counts"] for entry in pc.value_counts(batch["event_type"]).to_pylist()})
        times += [time for time in pc.min_max(batch["timestamp"]).as_py().values() if time is not None]
    return {
        "fingerprint": fingerprint({"events": events, "items": items, "users": users}),
        "users": int(users_count),
        "items": items.num_rows,
        "events": events.num_rows,
        "ordered_only": "timestamp" not in events.present,
        "event_types": dict(sorted(types.items(), key=lambda entry: (-entry[1], entry[0]))),
        "first_timestamp": min(times, default=None),
        "last_timestamp": max(times, default=None),
    }


def _is_closed(items: pa.Table) -> bool:
    """Returns True if there are items and none of them may be shown now."""
    now = now_ms()
    shown = pc.fill_null(items["available"], True)
    shown = pc.and_(shown, pc.less_equal(pc.fill_null(items["available_from"], 0), now))
    shown = pc.and_(shown, pc.greater(pc.fill_null(items["available_until"], END_OF_TIME_MS), now))
    return items.num_rows > 0 and not pc.any(shown).as_py()


def _optional(path: Path, name: str, schema: pa.Schema, required: Required) -> LoadedTable | None:
    table = table_path(path, name)
    return None if table is None else read_table(table, schema, required)


def _merge(parts: list[TablePart], schema: pa.Schema, required: Required, dialect: Dialect) -> LoadedTable:
    table = pa.concat_tables([part.table for part in parts] or [schema.empty_table()])
    rejected = [row for part in parts for row in part.rejected]
    unread = merge_unread(cells for part in parts for cells in part.unread)
    places = [(part.source, part.rows) for part in parts]
    if len(required) != 1 or not isinstance(required[0], str):
        return LoadedTable(table, rejected, unread, dialect.units, dialect.ignored, dialect.renamed, places)
    ids, id_codes = codes(table[required[0]])
    _, first = np.unique(id_codes, return_index=True)
    again = np.flatnonzero(first[id_codes] != np.arange(len(id_codes)))
    if not len(again):
        return LoadedTable(table, rejected, unread, dialect.units, dialect.ignored, dialect.renamed, places)
    sources = np.repeat([part.source for part in parts], [len(part.rows) for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    for at in again.tolist():
        earlier = first[id_codes[at]]
        reason = f"{required[0]} {ids[id_codes[at]]!r} stands already in {sources[earlier]} row {rows[earlier]}"
        rejected.append(Rejected(str(sources[at]), int(rows[at]), f"{reason}: give each one row"))
    if "available" in schema.names:
        table = _agreed(table, first[id_codes])
    return LoadedTable(select(table, first), rejected, unread, dialect.units, dialect.ignored, dialect.renamed)


def _agreed(items: pa.Table, first: npt.NDArray[np.int64]) -> pa.Table:
    """Returns the items, with an item unavailable if its rows disagree on its availability.

    A later row may be the correction of the first one, or its mistake: not to show the item is safe either way.
    """
    disputed = np.zeros(items.num_rows, np.bool_)
    for name, absent in (("available", True), ("available_from", 0), ("available_until", 0)):
        values = pc.fill_null(items[name], absent).to_numpy()
        disputed[first[values != values[first]]] = True
    if not disputed.any():
        return items
    at = items.schema.get_field_index("available")
    available = only(items["available"].combine_chunks(), ~disputed)
    return items.set_column(at, items.schema.field(at), pc.if_else(pa.array(disputed), False, available))


def _strict(table: pa.Table, schema: pa.Schema, required: Required, name: str) -> pa.Table:
    """Returns a table made by Penchant itself, in which a malformed row is an error."""
    loaded = conform(table, schema, required, name)
    if loaded.rejected:
        worst = loaded.rejected[0]
        raise TablesError(f"{name}: {len(loaded.rejected)} malformed rows, first row {worst.row}: {worst.reason}")
    return loaded.table


def _without_empty(table: pa.Table) -> pa.Table:
    """Returns the table without optional columns that hold nothing."""
    return table.select([f.name for f in table.schema if not f.nullable or is_present(table[f.name])])


def _check_target(out: Path) -> None:
    if "until" in read_info(out):
        raise TablesError(f"{out} is the warehouse of a service, which nothing may replace: choose a new directory")
    if out.is_dir() and (not any(out.iterdir()) or (out / "dataset.json").exists()):
        return
    if out.exists():
        raise TablesError(f"{out} exists and is not a data set: choose a new directory, or remove it")


def _replace(staging: Path, out: Path) -> None:
    """Moves a finished directory to its place; the old one, if any, is removed only after it."""
    old = staging.with_suffix(".old")
    # A rename replaces no directory that holds files, so there are two. A reader that comes between them finds no data
    # set, and a crash there leaves the old one under its new name.
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)
