"""Reads anybody's Parquet into the canonical tables, and writes a data set that everybody reads alike.

A data set is a directory: `events`, `items`, `users` (and `impressions`, `judgments` where there are any), each one
Parquet file or a directory of them, and `dataset.json` where Penchant wrote it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from features.tables.conform import Intake, Rejected, TablePart, Unread, dialect_of, fit, merge_unread, origins
from features.tables.dialect import Dialect, DialectSurvey
from features.tables.event_reader import BATCH_ROWS, Events, Survey, arrange, complete
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
    """A table with exactly its schema's columns (all NULL where the file has none), and what was left out of it.

    Attributes:
        table: The rows that are kept.
        rejected: The rows that were left out.
        unread: The cells that were left out of kept rows.
        units: The unit in which a column counts time, where its values had to tell: {column: unit}.
        ignored: The columns of the files that mean nothing here.
        places: The files in order, each with the places of its kept rows there: [(file, int64 [n])]; empty where a row
            that repeats an id was left out.
    """

    table: pa.Table
    rejected: list[Rejected]
    unread: list[Unread] = field(default_factory=list)
    units: Mapping[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
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
        return Intake(self.table.num_rows, self.rejected, self.unread, self.ignored)


HELD_ROWS = 1 << 20
"""Events up to which a data set is read into memory; more are read from disk, a part at a time."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set; items and users in memory, events read a part at a time.

    Attributes:
        stream: The events; each user's stand together, oldest first (see `order_events`).
        items: `ITEMS`, one row per item; made of the events' items where the data set has no such table.
        users: `USERS`, one row per user; empty where the data set has no such table.
        info: What `dataset.json` says, with `name`, `fingerprint`, `users`, `items`, `events`, `ordered_only`,
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
        """The rows of all tables that were left out."""
        return [row for intake in self.intake.values() for row in intake.rejected]

    @property
    def unread(self) -> list[Unread]:
        """The cells of all tables that were left out of kept rows."""
        return [cells for intake in self.intake.values() for cells in intake.unread]

    @property
    def events(self) -> pa.Table:
        """All events in memory: `EVENTS`."""
        return self.stream.table()


def read_table(path: Path, schema: pa.Schema, required: Required) -> LoadedTable:
    """Read one Parquet file, or all below a directory in the order of their names.

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
    """Bring a table in memory to a schema, as `read_table` does.

    `source` names it in the rejected rows, `numbers` says where each row stands there (None: in the same place).
    """
    dialect = dialect_of([(table, source)], schema, required)
    return _merge([fit(table, schema, required, source, numbers, dialect)], schema, required, dialect)


def read_info(path: Path) -> dict[str, Any]:
    """What `dataset.json` of a data set says, nothing where it has none.

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
    path: Path, *, until: int | None = None, items_from: Path | None = None, everybody: bool = False
) -> Dataset:
    """Read a data set's events, items and users.

    A warehouse grows while it is read: two readings with the same `until` and items have the same rows. What people do
    not allow that models are trained on is left out, unless `everybody` is asked for.

    Args:
        path: Its directory.
        until: Log id up to which events are read; as far as `dataset.json` calls it complete when None.
        items_from: Parquet file of the items, where they are not those of the data set.
        everybody: Also what no model may be trained on.

    Raises:
        TablesError: There are no events, or a file cannot be read.
    """
    path = Path(path)
    said = read_info(path)
    until = said.get("until") if until is None else until
    where = table_path(path, "events")
    if where is None:
        names = sorted(p.name for p in path.iterdir()) if path.is_dir() else ["no such directory"]
        found = ", ".join([*names[:_NAMED], "…"] if len(names) > _NAMED else names) or "nothing"
        raise TablesError(f"{path} is not a data set: it needs events.parquet or events/, found {found}")
    events, named, fate, units = _open_events(where, until, everybody)
    items, users = (
        read_table(items_from, ITEMS, ITEMS_REQUIRED)
        if items_from
        else _optional(path, "items", ITEMS, ITEMS_REQUIRED),
        _optional(path, "users", USERS, USERS_REQUIRED),
    )
    if items is None:
        items = conform(pa.table({"item_id": named}), ITEMS, ITEMS_REQUIRED, str(where))
    if users is None:
        users = LoadedTable(USERS.empty_table(), [])
    info = {"name": path.name} | said | _facts(events, items.table, users.table)
    if "until" in said:
        info["until"] = until
    told = {f"events.{name}": unit for name, unit in units.items()}
    told |= {f"items.{name}": unit for name, unit in items.units.items() if unit != RELATIVE}
    if told:
        info["time_units"] = told
    unlisted = named.filter(pc.invert(pc.is_in(named, value_set=items.table["item_id"].combine_chunks())))
    listed = dataclasses.replace(
        items.intake,
        unlisted=unlisted.to_pylist(),
        hidden=states_availability(items.table),
        closed=_is_closed(items.table),
    )
    intake = {"events": fate, "items": listed, "users": users.intake}
    return Dataset(events, items.table, users.table, info, intake)


def states_availability(items: pa.Table) -> bool:
    """Returns True if a table of items says of some item whether, or when, it may be shown.

    Then an item that the table lacks is most likely no longer sold. Without such a column it describes items, perhaps
    not all of them.
    """
    return any(is_present(items[name]) for name in ("available", "available_from", "available_until"))


def _open_events(where: Path, until: int | None, everybody: bool) -> tuple[Events, Array, Intake, Mapping[str, str]]:
    """The events in order, the items that they name in the order of the files' rows, the rows' fate, units of time."""
    files = find_files(where)
    count = sum(file.row_count() for file in files)
    if count <= HELD_ROWS:
        loaded = read_table(where, EVENTS, EVENTS_REQUIRED)
        table = select(loaded.table, _wanted(loaded.table, until, everybody))
        fate = Intake(table.num_rows, loaded.rejected, loaded.unread, loaded.ignored)
        return Events.of(order_events(table)), pc.unique(table["item_id"]), fate, loaded.units
    dialect = _dialect(files, EVENTS, EVENTS_REQUIRED)

    def parts() -> Iterator[TablePart]:
        for file in files:
            for part in _parts(file, EVENTS, EVENTS_REQUIRED, dialect):
                yield _part_of(part, until, everybody)

    survey = Survey(parts())
    whole = survey.rows == count and not survey.altered
    as_it_is = whole and survey.in_order() and all(map(_is_canonical, files))
    events = Events(_reader(files), survey.rows, survey.present) if as_it_is else arrange(parts, survey)
    fate = Intake(survey.rows, survey.rejected, merge_unread(survey.unread), dialect.ignored)
    return events, pa.array(survey.items, pa.string()), fate, dialect.units


def _wanted(events: pa.Table, until: int | None, everybody: bool) -> npt.NDArray[np.int64]:
    """The rows up to a log id (what was never in a log was there before it), of those who allow training."""
    wanted = np.ones(events.num_rows, np.bool_)
    if until is not None:
        wanted &= pc.fill_null(events["log_id"], 0).to_numpy() <= np.uint64(until)
    if not everybody:
        wanted &= pc.fill_null(events["allow_train"], True).to_numpy()
    return np.flatnonzero(wanted)


def _part_of(part: TablePart, until: int | None, everybody: bool) -> TablePart:
    rows = _wanted(part.table, until, everybody)
    return dataclasses.replace(part, table=select(part.table, rows), rows=part.rows[rows])


def _dialect(files: Sequence[TableFile], schema: pa.Schema, required: Required) -> Dialect:
    """How the writer of all the files counted time and wrote lists; reads the columns that decide it."""
    survey = DialectSurvey(schema)
    for file in files:
        given = file.schema()
        columns = origins(given, schema, required, str(file.path))
        survey.ignore(name for name in given.names if name not in {*columns.values(), *file.partition})
        asked = {name: origin for name, origin in columns.items() if survey.asks(name, given.field(origin))}
        if not asked:
            continue
        for table in file.batches(list(asked.values()), BATCH_ROWS):
            for name, origin in asked.items():
                survey.add(name, table[origin].combine_chunks(), str(file.path))
    return survey.dialect()


def _parts(file: TableFile, schema: pa.Schema, required: Required, dialect: Dialect) -> Iterator[TablePart]:
    """The rows of a file, some at a time."""
    given = file.schema()
    columns = list(origins(given, schema, required, str(file.path)).values())
    start = 0
    for table in file.batches(columns, BATCH_ROWS):
        # What a column says of itself (its unit) stands in the file's schema.
        table = table.cast(pa.schema([given.field(name) for name in table.column_names]))
        numbers = np.arange(start, start + table.num_rows)
        yield fit(table, schema, required, str(file.path), numbers, dialect)
        start += table.num_rows


def _is_canonical(file: TableFile) -> bool:
    """Returns True if the file's columns are ours, unit of time included."""
    schema = file.schema()
    found = origins(schema, EVENTS, EVENTS_REQUIRED, str(file.path))
    return all(
        name == origin and schema.field(origin).type == EVENTS.field(name).type and _unit(schema, name)
        for name, origin in found.items()
    )


def _unit(schema: pa.Schema, name: str) -> bool:
    wanted = (EVENTS.field(name).metadata or {}).get(b"unit")
    return wanted is None or (schema.field(name).metadata or {}).get(b"unit") == wanted


def _reader(files: Sequence[TableFile]) -> Callable[[Sequence[str]], Iterator[pa.Table]]:
    """Reads columns of canonical files; what a file lacks is NULL."""

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        for file in files:
            for table in file.batches(columns, BATCH_ROWS):
                yield complete(table, columns)

    return read


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
    """Write a data set in one step: a reader sees the old one or the new one, never a half.

    Events are written in the order of `order_events`. Returns what `dataset.json` says.

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
    staging = out.parent / f".{out.name}.{os.getpid()}.tmp"
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
    people, types, times = 0, Counter[str](), []
    last = None
    for batch in events.batches(("user_id", "event_type", "timestamp")):
        named = batch["user_id"].combine_chunks()
        # Each user's events stand together, so a change of names is another user.
        people += pc.sum(pc.not_equal(named.slice(1), named.slice(0, len(named) - 1))).as_py() or 0
        people += named[0].as_py() != last
        last = named[len(named) - 1].as_py()
        types.update({one["values"]: one["counts"] for one in pc.value_counts(batch["event_type"]).to_pylist()})
        times += [time for time in pc.min_max(batch["timestamp"]).as_py().values() if time is not None]
    return {
        "fingerprint": fingerprint({"events": events, "items": items, "users": users}),
        "users": int(people),
        "items": items.num_rows,
        "events": events.num_rows,
        "ordered_only": "timestamp" not in events.present,
        "event_types": dict(sorted(types.items(), key=lambda one: (-one[1], one[0]))),
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
    where = table_path(path, name)
    return None if where is None else read_table(where, schema, required)


def _merge(parts: list[TablePart], schema: pa.Schema, required: Required, dialect: Dialect) -> LoadedTable:
    table = pa.concat_tables([part.table for part in parts] or [schema.empty_table()])
    rejected = [row for part in parts for row in part.rejected]
    unread = merge_unread(cells for part in parts for cells in part.unread)
    places = [(part.source, part.rows) for part in parts]
    if len(required) != 1 or not isinstance(required[0], str):
        return LoadedTable(table, rejected, unread, dialect.units, dialect.ignored, places)
    ids, which = codes(table[required[0]])
    _, first = np.unique(which, return_index=True)
    again = np.flatnonzero(first[which] != np.arange(len(which)))
    if not len(again):
        return LoadedTable(table, rejected, unread, dialect.units, dialect.ignored, places)
    sources = np.repeat([part.source for part in parts], [len(part.rows) for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    for at in again.tolist():
        earlier = first[which[at]]
        reason = f"{required[0]} {ids[which[at]]!r} stands already in {sources[earlier]} row {rows[earlier]}"
        rejected.append(Rejected(str(sources[at]), int(rows[at]), f"{reason}: give each one row"))
    if "available" in schema.names:
        table = _agreed(table, first[which])
    return LoadedTable(select(table, first), rejected, unread, dialect.units, dialect.ignored)


def _agreed(items: pa.Table, first: npt.NDArray[np.int64]) -> pa.Table:
    """The items, those not available whose row says something else about that than the first one of the same id."""
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
    """A table that we made ourselves: a malformed row is an error."""
    loaded = conform(table, schema, required, name)
    if loaded.rejected:
        worst = loaded.rejected[0]
        raise TablesError(f"{name}: {len(loaded.rejected)} malformed rows, first row {worst.row}: {worst.reason}")
    return loaded.table


def _without_empty(table: pa.Table) -> pa.Table:
    """The table without optional columns that hold nothing."""
    return table.select([f.name for f in table.schema if not f.nullable or is_present(table[f.name])])


def _check_target(out: Path) -> None:
    if "until" in read_info(out):
        raise TablesError(f"{out} is the warehouse of a service, which nothing may replace: choose a new directory")
    if out.is_dir() and (not any(out.iterdir()) or (out / "dataset.json").exists()):
        return
    if out.exists():
        raise TablesError(f"{out} exists and is not a data set: choose a new directory, or remove it")


def _replace(staging: Path, out: Path) -> None:
    """Move a finished directory to its place; the old one, if any, goes only after."""
    old = staging.with_suffix(".old")
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)
