"""Parquet files on disk: how they come, go and are named, without a reader seeing a half.

A file is written under a hidden name, synced and renamed, and never changed in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import TablesError
from features.files import sync
from features.private_files import make_folders, open_private
from serving.stores.keys import SEQUENCE_BITS, time_of

_GROUP_ROWS = 1 << 16
"""Rows of a group of rows, which readers hold at once."""

Span = tuple[int, int]
"""The first and the last log id that a file covers."""


def put_table(
    path: Path,
    rows: pa.Table,
    metadata: Mapping[bytes, bytes] | None = None,
    allowed: Callable[[], None] = lambda: None,
) -> None:
    """Writes a Parquet file of some rows; see `put_tables`."""
    put_tables(path, rows.schema, [rows], metadata, allowed)


def put_tables(
    path: Path,
    schema: pa.Schema,
    tables: Iterable[pa.Table],
    metadata: Mapping[bytes, bytes] | None = None,
    allowed: Callable[[], None] = lambda: None,
) -> None:
    """Writes a Parquet file that is on disk when this returns; the same tables give the same bytes.

    Args:
        path: The file.
        schema: Its columns.
        tables: Its rows; no more than one of the tables, and a group of rows, are held at once.
        metadata: Key-value metadata of the file.
        allowed: Raises if the file may not be put in its place any more; called last.
    """
    if not path.parent.exists():
        make_folders(path.parent)
        sync(path.parent.parent)
    draft = path.with_name(f".{path.name}.tmp")
    with open_private(draft) as sink:
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            for rows in _in_groups(schema, tables):
                writer.write_table(rows)
            writer.add_key_value_metadata({key.decode(): value.decode() for key, value in (metadata or {}).items()})
        sink.flush()
        os.fsync(sink.fileno())
    allowed()
    os.replace(draft, path)
    # The rename is on disk only once the directory is.
    sync(path.parent)


def _in_groups(schema: pa.Schema, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yields the rows of many tables as few larger ones: each makes a group of rows, and small groups read slowly."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(rows.num_rows for rows in held) >= _GROUP_ROWS:
            yield pa.concat_tables(held)
            held = []
    yield pa.concat_tables([schema.empty_table(), *held])


def read_columns(path: Path, schema: pa.Schema) -> pa.Table:
    """Reads columns of a Parquet file; a column that an older file lacks is NULL.

    Raises:
        TablesError: The file is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            rows = file.read(columns=[name for name in schema.names if name in file.schema_arrow.names])
    except (pa.ArrowException, OSError) as error:
        raise TablesError(f"{path} cannot be read ({error}): put it back from a copy, or remove it") from error
    return _completed(rows, schema)


def read_parts(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yields columns of a Parquet file as `read_columns` does, a group of rows at a time.

    Raises:
        TablesError: The file is damaged.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in schema.names if name in file.schema_arrow.names]
            # Without threads of its own to read ahead: those would hold further groups.
            for batch in file.iter_batches(_GROUP_ROWS, columns=names, use_threads=False):
                yield _completed(pa.Table.from_batches([batch]), schema)
    except (pa.ArrowException, OSError) as error:
        raise TablesError(f"{path} cannot be read ({error}): put it back from a copy, or remove it") from error


def _completed(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    return pa.concat_tables([schema.empty_table(), rows], promote_options="default")


def read_metadata(path: Path, key: bytes) -> bytes:
    """Returns a value of a file's metadata; empty if the file has none, is not there or is damaged."""
    try:
        return bytes((pq.read_metadata(path).metadata or {}).get(key, b""))
    except (pa.ArrowException, OSError):
        return b""


def remove_file(path: Path) -> None:
    """Removes a file, and the directories of its day and table if it was the last."""
    path.unlink()
    sync(path.parent)
    remove_empty(path.parent, path.parent.parent)


def remove_empty(*directories: Path) -> None:
    """Removes directories, the inner ones first, as far as they are empty: no table is an empty directory."""
    for directory in directories:
        if any(directory.iterdir()):
            return
        directory.rmdir()
        sync(directory.parent)


def file_name(prefix: str, span: Span) -> str:
    """Returns the name of a file that covers a span, `p03` being the prefix of partition 3."""
    return f"{prefix}-{span[0]:020d}-{span[1]:020d}.parquet"


def span_of(path: Path) -> Span:
    """Returns the span that a file covers."""
    _, first, last = path.stem.split("-")
    return int(first), int(last)


def day_files(directory: Path) -> list[Path]:
    """Returns the files of a day, by partition and then in log order."""
    return sorted(path for path in directory.glob("*.parquet") if not path.name.startswith("."))


def files_by_prefix(directory: Path) -> dict[str, list[Path]]:
    """Returns the files of a day by the prefix of their partition, each in log order."""
    groups: dict[str, list[Path]] = {}
    for path in day_files(directory):
        groups.setdefault(path.name.partition("-")[0], []).append(path)
    return groups


def split_by_day(log_ids: Sequence[int]) -> Iterator[slice]:
    """Yields the slices of ascending log ids that arrived on one day."""
    start = 0
    for stop in range(1, len(log_ids) + 1):
        if stop == len(log_ids) or day_of(log_ids[stop]) != day_of(log_ids[start]):
            yield slice(start, stop)
            start = stop


def day_of(log_id: int) -> date:
    """Returns the day on which an entry arrived, in UTC."""
    return datetime.fromtimestamp(time_of(log_id) // 1000, UTC).date()


def day_in(directory: str) -> date:
    """Returns the day of a directory `date=...`."""
    return date.fromisoformat(directory.removeprefix("date="))


def end_of_day(directory: str) -> int:
    """Returns the first log id behind the day of a directory `date=...`."""
    day = day_in(directory) + timedelta(days=1)
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1000 << SEQUENCE_BITS
