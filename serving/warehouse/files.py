"""The warehouse on disk: the directory, its tables and its files.

    events/date=2026-11-22/p03-FIRST-LAST.parquet   rows of partition 3 of the log, named by the log ids they span
    searches/, impressions/                         the same
    sessions/date=2026-11-22/sessions.parquet       derived from the rows of that day, and again when they change
    daily/date=2026-11-22/daily.parquet             derived as well
    items.parquet                                   the catalogue
    dataset.json                                    `until`: up to which log id the tables hold everything

A day is that of arrival, in UTC.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.arrays import pc
from features.files import sync
from features.private_files import open_private
from features.spans import SPANS, Spans, read_spans
from features.tables.dataset import read_info
from serving.errors import Unavailable
from serving.files import locked
from serving.folder_identity import FolderIdentity, read_identity, write_identity
from serving.warehouse.parquet import (
    Span,
    day_files,
    day_in,
    day_of,
    end_of_day,
    file_name,
    files_by_prefix,
    put_table,
    put_tables,
    read_columns,
    read_parts,
    remove_empty,
    remove_file,
    span_of,
)
from serving.warehouse.tables import EVENT_ROWS, IMPRESSION_ROWS, SEARCH_ROWS

TABLES = {"events": EVENT_ROWS, "searches": SEARCH_ROWS, "impressions": IMPRESSION_ROWS}
"""The tables that hold rows of the log."""

DERIVED_TABLES = ("sessions", "daily")
"""The tables that are derived from those."""


class TakenOver(Unavailable):
    """Another process has taken the directory."""


class WarehouseFiles:
    """One directory; one process at a time writes it."""

    def __init__(self, out: Path) -> None:
        """Takes the path of the directory; `open` locks it."""
        self.out = Path(out)
        self.identity: FolderIdentity | None = None
        self._lock, self._repaired = -1, False

    def open(self, wait_s: float | None = None, *, repaired: bool = True) -> None:
        """Locks the directory for this process.

        Args:
            wait_s: Longest wait for another process that holds it; that of `locked` if None.
            repaired: `repair` it at once.

        Raises:
            InUse: Another process holds it.
            ConfigError: It cannot be written.
        """
        if self._lock < 0:
            self._lock = locked(self.out, wait_s=wait_s)
            if repaired:
                self.repair()

    def repair(self) -> None:
        """Finishes or removes what the last process, or an error of the disk, left unfinished."""
        if self._repaired:
            return
        self._repaired = True
        for draft in self.out.rglob(".*.tmp"):
            draft.unlink()
        for packed in self.out.glob("*/.date=*.new"):
            shutil.rmtree(packed)
        # `pack` puts the old directory aside before it puts the new one in its place.
        for unpacked in self.out.glob("*/.date=*.old"):
            directory = unpacked.with_name(unpacked.name.removeprefix(".").removesuffix(".old"))
            if directory.exists():
                shutil.rmtree(unpacked)
            else:
                unpacked.rename(directory)

    def claim(self, identity: FolderIdentity) -> None:
        """Makes an open directory this process's own by its identity; see `require_own`.

        Raises:
            OSError: The disk is full or gone.
        """
        write_identity(self.out, identity)
        self.identity = identity

    def require_own(self) -> None:
        """Refuses to go on if another process has taken the directory, as on a mount whose locks do not hold.

        Raises:
            TakenOver: One has.
        """
        if self.identity is None:
            return
        now = read_identity(self.out)
        if now is None or (now.copy_id, now.process) != (self.identity.copy_id, self.identity.process):
            raise TakenOver(f"{self.out} was taken by another process while this one stood still")

    def holds_rows(self) -> bool:
        """Returns True if some file holds rows of the log."""
        return any(True for name in TABLES for _ in self.out.glob(f"{name}/date=*/*.parquet"))

    def close(self) -> None:
        """Unlocks the directory."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock, self._repaired = -1, False

    def write(self, name: str, partition: int, span: Span, rows: pa.Table) -> None:
        """Writes the rows that the entries of a span of log ids gave, all of one day; an empty table leaves no file.

        A file of the same span is replaced. Rows that another file covers are left out: they are there already.

        Raises:
            TakenOver: See `require_own`.
        """
        folder = self.out / name / f"date={day_of(span[0])}"
        path = folder / file_name(f"p{partition:02d}", span)
        # After a crash, entries may be delivered again in other batches than those that were written.
        for file in folder.glob(f"p{partition:02d}-*.parquet"):
            first, last = span_of(file)
            if file != path and first <= span[1] and span[0] <= last:
                log_ids = rows["log_id"]
                before, behind = pa.scalar(first, pa.uint64()), pa.scalar(last, pa.uint64())
                rows = rows.filter(pc.or_(pc.less(log_ids, before), pc.greater(log_ids, behind)))
        if rows.num_rows:
            put_table(path, rows, allowed=self.require_own)
        elif path.exists():
            # Its rows have been erased since it was first written.
            remove_file(path)

    def read(self, name: str, path: Path, columns: Sequence[str] | None = None) -> pa.Table:
        """Reads columns of a file of a table, all of them if None; a column that an older file lacks is NULL.

        Raises:
            TablesError: The file is damaged.
        """
        return read_columns(path, pa.schema([TABLES[name].field(column) for column in columns or TABLES[name].names]))

    def parts(self, name: str, path: Path) -> Iterator[pa.Table]:
        """Yields the rows of a file as `read` does, a part at a time; raises as it does."""
        return read_parts(path, TABLES[name])

    def partition_files(self, name: str, partition: int) -> list[Path]:
        """Returns the files of a partition in one table, in log order."""
        return sorted(self.out.glob(f"{name}/date=*/p{partition:02d}-*.parquet"))

    def days(self) -> list[str]:
        """Returns the names of the days' directories in any table.

        Derived tables count: where a day has lost all of its rows, what was derived from them has to go too.
        """
        return sorted({path.name for name in (*TABLES, *DERIVED_TABLES) for path in self.out.glob(f"{name}/date=*")})

    def expire(self, first: date) -> int:
        """Deletes the days before one, in every table; returns the number of directories."""
        days = [path for name in (*TABLES, *DERIVED_TABLES) for path in self.out.glob(f"{name}/date=*")]
        expired = [path for path in days if day_in(path.name) < first]
        # Whole days at once: no file has to be written again.
        for path in expired:
            shutil.rmtree(path)
            sync(path.parent)
            remove_empty(path.parent)
        return len(expired)

    def pack(self, until: int) -> int:
        """Joins the many files of days that are over into one per partition; returns the number of days packed.

        A day's directory is replaced as a whole. Its rows, their order and what names them stay as they are.

        Args:
            until: Log id up to which nothing more will come.
        """
        packed = 0
        for name in TABLES:
            for path in sorted(self.out.glob(f"{name}/date=*")):
                groups = files_by_prefix(path)
                if end_of_day(path.name) <= until and any(len(files) > 1 for files in groups.values()):
                    self._pack_day(name, path, groups)
                    packed += 1
        return packed

    def info(self) -> dict[str, Any]:
        """Returns the contents of `dataset.json`, empty if there is none yet; raises TablesError if it is damaged."""
        return read_info(self.out)

    def write_info(self, info: Mapping[str, Any]) -> None:
        """Writes `dataset.json`."""
        self.put_text(self.out / "dataset.json", json.dumps(info, indent=2) + "\n")

    def spans(self) -> Spans:
        """Returns the spans of each stream that the files cover, as `write_spans` wrote them.

        Raises:
            TablesError: The file is damaged.
        """
        return read_spans(self.out)

    def write_spans(self, spans: Spans) -> None:
        """Writes the spans of each stream that the files cover."""
        self.put_text(self.out / SPANS, spans.to_json() + "\n")

    def put_text(self, path: Path, text: str) -> None:
        """Writes a small file of the directory; it is on disk when this returns."""
        draft = path.with_name(f".{path.name.removeprefix('.')}.tmp")
        with open_private(draft, "w") as sink:
            sink.write(text)
            sink.flush()
            os.fsync(sink.fileno())
        self.require_own()
        os.replace(draft, path)
        sync(self.out)

    def _pack_day(self, name: str, path: Path, groups: Mapping[str, Sequence[Path]]) -> None:
        packed, unpacked = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
        # A crash, or an error of the disk, between the renames leaves the day without a directory, and the next
        # `repair`, perhaps of this very process, puts the old one back.
        self._repaired = False
        for prefix, files in groups.items():
            span = span_of(files[0])[0], max(span_of(file)[1] for file in files)
            parts = (rows for file in files for rows in self.parts(name, file))
            put_tables(packed / file_name(prefix, span), TABLES[name], parts)
        self.require_own()
        path.rename(unpacked)
        packed.rename(path)
        sync(path.parent)
        self._repaired = True
        shutil.rmtree(unpacked)


def source_files(files: WarehouseFiles, day: str) -> list[Path]:
    """Returns all files of a day that hold rows of the log."""
    return [path for name in TABLES for path in day_files(files.out / name / day)]
