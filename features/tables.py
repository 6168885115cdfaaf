"""Reads anybody's Parquet into the canonical tables, and writes a data set that everybody reads alike.

A data set is a directory: `events`, `items`, `users` (and `impressions`, `judgments` where there are any), each one
Parquet file or a directory of them, and `dataset.json` where Penchant wrote it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.columns import Array, pc
from features.content import codes, fingerprint, is_present, order_events, select
from features.errors import TablesError
from features.events import BATCH_ROWS, Events, Survey, arrange, complete
from features.rows import Intake, Part, Rejected, Unread, fit, origins
from features.schema import (
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

__all__ = [
    "Dataset",
    "Loaded",
    "Rejected",
    "conform",
    "fingerprint",
    "open_dataset",
    "order_events",
    "read_table",
    "table_path",
    "write_dataset",
]

_NAMED = 5
"""Files of a directory that a message names at most."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A table with exactly its schema's columns (all NULL where the file has none), and the rows left out of it."""

    table: pa.Table
    rejected: list[Rejected]
    unread: list[Unread] = field(default_factory=list)

    @property
    def intake(self) -> Intake:
        """The fate of its rows."""
        return Intake(self.table.num_rows, self.rejected, self.unread)


HELD_ROWS = 1 << 20
"""Events up to which a data set is read into memory; more are read from disk, a part at a time."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set; items and users in memory, events read a part at a time.

    Attributes:
        stream: The events; each person's stand together, oldest first (see `order_events`).
        items: `ITEMS`, one row per item; made of the events' items where the data set has no such table.
        users: `USERS`, one row per person; empty where the data set has no such table.
        info: What `dataset.json` says, with `name`, `fingerprint`, `users`, `items`, `events`, `ordered_only`,
            `event_types` {name: count} and `first_timestamp`, `last_timestamp` (ms) computed from the rows.
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


def read_table(path: Path, schema: pa.Schema, required: Required) -> Loaded:
    """Read one Parquet file, or all below a directory in the order of their names.

    Columns are found by name, alias or either in any letter case; others are ignored. A table whose only required
    column is its id has one row per id: later ones are rejected.

    Raises:
        TablesError: A file is not Parquet, lacks a required column or holds one of a type that cannot fit.
    """
    return _merge([_read_file(file, schema, required) for file in _files(Path(path))], required)


def conform(
    table: pa.Table,
    schema: pa.Schema,
    required: Required,
    source: str,
    numbers: npt.NDArray[np.int64] | None = None,
) -> Loaded:
    """Bring a table in memory to a schema, as `read_table` does.

    `source` names it in the rejected rows, `numbers` says where each row stands there (None: in the same place).
    """
    return _merge([fit(table, schema, required, source, numbers)], required)


def table_path(data: Path, name: str) -> Path | None:
    """Where a data set keeps a table: `NAME.parquet` (a file or a directory) or `NAME/`; None if it has none."""
    found = (Path(data) / f"{name}.parquet", Path(data) / name)
    return next((path for path in found if path.exists()), None)


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
    events, named, rejected = _open_events(where, until, everybody)
    items, users = (
        read_table(items_from, ITEMS, ITEMS_REQUIRED)
        if items_from
        else _optional(path, "items", ITEMS, ITEMS_REQUIRED),
        _optional(path, "users", USERS, USERS_REQUIRED),
    )
    if items is None:
        items = conform(pa.table({"item_id": named}), ITEMS, ITEMS_REQUIRED, str(where))
    if users is None:
        users = Loaded(USERS.empty_table(), [])
    info = {"name": path.name} | said | _facts(events, items.table, users.table)
    if "until" in said:
        info["until"] = until
    intake = {"events": Intake(events.num_rows, rejected), "items": items.intake, "users": users.intake}
    return Dataset(events, items.table, users.table, info, intake)


def _open_events(where: Path, until: int | None, everybody: bool) -> tuple[Events, Array, list[Rejected]]:
    """The events in order, the items that they name in the order of the files' rows, and what was left out."""
    files = _files(where)
    if sum(map(_row_count, files)) <= HELD_ROWS:
        loaded = read_table(where, EVENTS, EVENTS_REQUIRED)
        table = select(loaded.table, _wanted(loaded.table, until, everybody))
        return Events.of(order_events(table)), pc.unique(table["item_id"]), loaded.rejected

    def parts() -> Iterator[Part]:
        return (_part_of(part, until, everybody) for file in files for part in _file_parts(file))

    survey = Survey(parts())
    whole = survey.rows == sum(map(_row_count, files))
    as_it_is = whole and survey.in_order() and all(map(_is_canonical, files))
    events = Events(_reader(files), survey.rows, survey.present) if as_it_is else arrange(parts, survey)
    return events, pa.array(survey.items, pa.string()), survey.rejected


def _wanted(events: pa.Table, until: int | None, everybody: bool) -> npt.NDArray[np.int64]:
    """The rows up to a log id (what was never in a log was there before it), of those who allow training."""
    wanted = np.ones(events.num_rows, np.bool_)
    if until is not None:
        wanted &= pc.fill_null(events["log_id"], 0).to_numpy() <= np.uint64(until)
    if not everybody:
        wanted &= pc.fill_null(events["allow_train"], True).to_numpy()
    return np.flatnonzero(wanted)


def _part_of(part: Part, until: int | None, everybody: bool) -> Part:
    rows = _wanted(part.table, until, everybody)
    return Part(part.source, select(part.table, rows), part.rows[rows], part.rejected)


def _row_count(file: Path) -> int:
    with _opened(file) as parquet:
        return int(parquet.metadata.num_rows)


def _is_canonical(file: Path) -> bool:
    """Whether a part of the file's rows can be read as well as all of them: its types and its unit of time are ours."""
    with _opened(file) as parquet:
        schema = parquet.schema_arrow
    found = origins(schema, EVENTS, EVENTS_REQUIRED, str(file))
    return all(
        name == origin and schema.field(origin).type == EVENTS.field(name).type and _unit(schema, name)
        for name, origin in found.items()
    )


def _unit(schema: pa.Schema, name: str) -> bool:
    wanted = (EVENTS.field(name).metadata or {}).get(b"unit")
    return wanted is None or (schema.field(name).metadata or {}).get(b"unit") == wanted


def _file_parts(file: Path) -> Iterator[Part]:
    """The rows of a file, some at a time where that is the same as all at once."""
    if not _is_canonical(file):
        yield _read_file(file, EVENTS, EVENTS_REQUIRED)
        return
    at = 0
    for table in _reader([file])(EVENTS.names):
        yield fit(table, EVENTS, EVENTS_REQUIRED, str(file), np.arange(at, at + table.num_rows))
        at += table.num_rows


def _reader(files: Sequence[Path]) -> Callable[[Sequence[str]], Iterator[pa.Table]]:
    """Reads columns of canonical files; what a file lacks is NULL."""

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        for file in files:
            with _opened(file) as parquet:
                names = [name for name in columns if name in parquet.schema_arrow.names]
                try:
                    for batch in parquet.iter_batches(BATCH_ROWS, columns=names or ["user_id"]):
                        yield complete(pa.Table.from_batches([batch]), columns)
                except (pa.ArrowException, OSError) as error:
                    raise TablesError(f"{file} cannot be read as Parquet: {error}") from error

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
    staging.mkdir(parents=True)
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
        # Each person's events stand together, so a change of names is another person.
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


def _optional(path: Path, name: str, schema: pa.Schema, required: Required) -> Loaded | None:
    where = table_path(path, name)
    return None if where is None else read_table(where, schema, required)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise TablesError(f"{path} does not exist: name a Parquet file or a directory of them")
    # A leading dot or underscore marks what somebody is still writing, by the convention of Hadoop and Spark.
    hidden = (".", "_")
    found = sorted(p.relative_to(path) for p in path.rglob("*.parquet") if p.is_file())
    files = [path / p for p in found if not any(part.startswith(hidden) for part in p.parts)]
    if not files:
        raise TablesError(f"{path} holds no *.parquet file")
    return files


def _read_file(file: Path, schema: pa.Schema, required: Required) -> Part:
    with _opened(file) as parquet:
        columns = origins(parquet.schema_arrow, schema, required, str(file))
        try:
            table = parquet.read(columns=list(columns.values()))
        except (pa.ArrowException, OSError) as error:
            raise TablesError(f"{file} cannot be read as Parquet: {error}") from error
    return fit(table, schema, required, str(file))


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise TablesError(f"{file} cannot be read as Parquet: {error}") from error


def _merge(parts: list[Part], required: Required) -> Loaded:
    table = pa.concat_tables([part.table for part in parts])
    rejected = [one for part in parts for one in part.rejected]
    if len(required) != 1 or not isinstance(required[0], str):
        return Loaded(table, rejected)
    ids, which = codes(table[required[0]])
    _, first = np.unique(which, return_index=True)
    again = np.flatnonzero(first[which] != np.arange(len(which)))
    if not len(again):
        return Loaded(table, rejected)
    sources = np.repeat([part.source for part in parts], [len(part.rows) for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    for at in again.tolist():
        earlier = first[which[at]]
        reason = f"{required[0]} {ids[which[at]]!r} stands already in {sources[earlier]} row {rows[earlier]}"
        rejected.append(Rejected(str(sources[at]), int(rows[at]), f"{reason}: give each one row"))
    return Loaded(select(table, first), rejected)


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
