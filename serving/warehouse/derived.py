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
from serving.warehouse.parquet import day_files, put_table, read_metadata
from serving.warehouse.tables import daily, sessions

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
        events = _measured_rows(files, "events", day, _SESSION_COLUMNS)
        searches = _measured_rows(files, "searches", day, [name for name in _SESSION_COLUMNS if name != "item_id"])
        visited = pa.concat_tables([events, searches], promote_options="default")
        # The fingerprint is in both files: after a crash between them, both are derived again.
        for path, rows in zip(paths, (sessions(visited), daily(events, _shown(files, day))), strict=True):
            put_table(path, rows, {_SOURCE: source}, files.require_own)
        changed += 1
    if changed:
        # The rows of a day are far more than everything else that this process holds.
        return_free_memory()
    return changed


def _fingerprint(files: WarehouseFiles, day: str) -> bytes:
    """Returns what tells one state of a day's rows from another.

    Names and sizes are enough: files never change in place, and a file that loses rows or purposes gets another size,
    or `revise` has removed what was derived from it.
    """
    facts = [f"{path.relative_to(files.out)} {path.stat().st_size}" for path in source_files(files, day)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest().encode()


def _shown(files: WarehouseFiles, day: str) -> Counter[str]:
    """Counts the slates of a day that each item stood in."""
    shown: Counter[str] = Counter()
    # File by file: the slates of a day are far too many to hold at once.
    for slates in _measured_files(files, "impressions", day, ["item_ids"]):
        counts: Any = pc.value_counts(pc.list_flatten(slates["item_ids"]))
        shown.update(dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)))
    return shown


def _measured_rows(files: WarehouseFiles, name: str, day: str, columns: Sequence[str]) -> pa.Table:
    """Reads the rows of a day whose users allow measuring."""
    schema = pa.schema([TABLES[name].field(column) for column in columns])
    return pa.concat_tables([schema.empty_table(), *_measured_files(files, name, day, columns)])


def _measured_files(files: WarehouseFiles, name: str, day: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yields those rows of each file of a day."""
    for path in day_files(files.out / name / day):
        rows = files.read(name, path, [*columns, "allow_measure"])
        yield rows.filter(pc.fill_null(rows["allow_measure"], True)).select(columns)
