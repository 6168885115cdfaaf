"""Derives sessions and daily figures from the rows of each day."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from features.arrays import pc
from serving.memory import return_free_memory
from serving.warehouse.files import DERIVED_TABLES, TABLES, WarehouseFiles, source_files
from serving.warehouse.parquet import files_by_prefix, put_table, put_tables, read_metadata
from serving.warehouse.tables import SESSION_ROWS, daily, daily_part, sessions

_SOURCE = b"penchant.source"
_SESSION_COLUMNS = ("user_id", "session_id", "timestamp", "item_id", "event_type", "log_id")


def derive(files: WarehouseFiles) -> int:
    """Derives the tables of every day whose rows changed; returns the number of days."""
    changed = 0
    for day in files.days():
        source = _fingerprint(files, day)
        paths = [files.out / name / day / f"{name}.parquet" for name in DERIVED_TABLES]
        if all(read_metadata(path, _SOURCE) == source for path in paths):
            continue
        metadata = {_SOURCE: source}
        # A partition has all rows of its users, so one after the other is enough, and a day is too much to hold.
        prefixes = sorted({prefix for name in TABLES for prefix in files_by_prefix(files.out / name / day)})
        # Lazy, and so two passes over the events: to read them twice costs less than to hold both tables of a day.
        visits = (_sessions(files, day, prefix) for prefix in prefixes)
        figures = (_figures(files, day, prefix) for prefix in prefixes)
        put_tables(paths[0], SESSION_ROWS, visits, metadata, files.require_own)
        # The fingerprint is in both files: after a crash between them, both are derived again.
        put_table(paths[1], daily(figures), metadata, files.require_own)
        changed += 1
    if changed:
        # The rows of a day are far more than everything else that this process holds.
        return_free_memory()
    return changed


def _sessions(files: WarehouseFiles, day: str, prefix: str) -> pa.Table:
    """Returns the sessions of a partition's day."""
    events = _measured_rows(files, "events", day, prefix, _SESSION_COLUMNS)
    searches = _measured_rows(files, "searches", day, prefix, [name for name in _SESSION_COLUMNS if name != "item_id"])
    return sessions(pa.concat_tables([events, searches], promote_options="default"))


def _figures(files: WarehouseFiles, day: str, prefix: str) -> pa.Table:
    """Returns the figures of the items of a partition's day."""
    events = _measured_rows(files, "events", day, prefix, ["item_id", "user_id", "event_type"])
    return daily_part(events, _shown(files, day, prefix))


def _fingerprint(files: WarehouseFiles, day: str) -> bytes:
    """Returns what tells one state of a day's rows from another.

    Names and sizes are enough: files never change in place, and a file that loses rows or purposes gets another size,
    or `revise` has removed what was derived from it.
    """
    facts = [f"{path.relative_to(files.out)} {path.stat().st_size}" for path in source_files(files, day)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest().encode()


def _shown(files: WarehouseFiles, day: str, prefix: str) -> Counter[str]:
    """Counts the slates of a partition's day that each item stood in."""
    shown: Counter[str] = Counter()
    # File by file: the slates of a partition are too many to hold at once.
    for slates in _measured_files(files, "impressions", day, prefix, ["item_ids"]):
        counts: Any = pc.value_counts(pc.list_flatten(slates["item_ids"]))
        shown.update(dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)))
    return shown


def _measured_rows(files: WarehouseFiles, name: str, day: str, prefix: str, columns: Sequence[str]) -> pa.Table:
    """Reads the rows of a partition's day whose users allow measuring."""
    schema = pa.schema([TABLES[name].field(column) for column in columns])
    return pa.concat_tables([schema.empty_table(), *_measured_files(files, name, day, prefix, columns)])


def _measured_files(
    files: WarehouseFiles, name: str, day: str, prefix: str, columns: Sequence[str]
) -> Iterator[pa.Table]:
    """Yields those rows of each file of a partition's day."""
    for path in files_by_prefix(files.out / name / day).get(prefix, ()):
        rows = files.read(name, path, [*columns, "allow_measure"])
        yield rows.filter(pc.fill_null(rows["allow_measure"], True)).select(columns)
