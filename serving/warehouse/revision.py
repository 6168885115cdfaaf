"""Revises files that are written already: rows that were erased or undone go, and withdrawn purposes with them.

The warehouse is the one store that outlives the log, so an erasure, a withdrawal or an undo cannot wait for rows to
leave by themselves: each file of the user's partition is read, and written again without what may not be there.
"""

from __future__ import annotations

import functools
import operator
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.errors import TablesError
from features.profile import EVERY_PURPOSE, Purpose
from features.subjects import subject_of
from serving.privacy.ledger import Erasure
from serving.stores.keys import SEQUENCE_BITS, address_of
from serving.stores.log_entries import Entry
from serving.warehouse.files import DERIVED_TABLES, TABLES, WarehouseFiles
from serving.warehouse.parquet import put_tables, remove_file

Limits = Sequence[tuple[int, Purpose]]
"""Limits of a user's rows: those up to a log id may serve no more than these purposes."""

ALLOWS = {"allow_train": Purpose.TRAIN, "allow_measure": Purpose.MEASURE}
"""Columns that tell whether a row may serve a purpose; a row that serves none of these is in no file."""

KEPT_FOR = functools.reduce(operator.or_, ALLOWS.values())
"""The purposes for which rows are kept."""

_LAST_OF_MS = (1 << SEQUENCE_BITS) - 1
_ERASURES = ".erasures"


class DamagedFiles(TablesError):
    """Files of some partitions could not be read, so erasures do not hold there yet."""

    def __init__(self, damaged: Mapping[int, TablesError]) -> None:
        super().__init__(str(next(iter(damaged.values()))))
        self.partitions = frozenset(damaged)


@dataclass(frozen=True, slots=True)
class Revision:
    """The changes that the marks among some entries make to rows that are written already.

    Attributes:
        by_address: Address of a user -> limits of their rows.
        undone: Log ids of events that have no effect any more.
    """

    by_address: dict[bytes, list[tuple[int, Purpose]]]
    undone: frozenset[int]

    @classmethod
    def of_entries(cls, entries: Sequence[Entry]) -> Revision:
        """Reads the marks among entries: erasures, withdrawals of consent, and undone events."""
        by_address: dict[bytes, list[tuple[int, Purpose]]] = {}
        for entry in entries:
            purposes = Purpose(0) if entry.erased else entry.mark.consent if entry.mark else None
            # A consent that grants both purposes again sets no limit, and so brings nothing back that was taken.
            if entry.mark and purposes is not None and purposes & KEPT_FOR != KEPT_FOR:
                by_address.setdefault(entry.mark.address, []).append((entry.log_id, purposes))
        return cls(by_address, frozenset(entry.undone for entry in entries if entry.undone))

    @classmethod
    def of_erasures(cls, erasures: Iterable[Erasure]) -> Revision:
        """Makes erasures hold: no row of their users from before them stays."""
        by_address: dict[bytes, list[tuple[int, Purpose]]] = {}
        for erasure in erasures:
            by_address.setdefault(erasure.address, []).append((erasure.log_id, Purpose(0)))
        return cls(by_address, frozenset())

    def __bool__(self) -> bool:
        """True if it changes anything."""
        return bool(self.by_address or self.undone)

    def limits(self, subject: str) -> Limits:
        """Returns the limits of a user's rows."""
        return self.by_address.get(address_of(subject), ()) if self.by_address else ()

    def keeps(self, entry: Entry) -> bool:
        """Returns True if one of the entries is to be written at all."""
        if entry.log_id in self.undone:
            return False
        # A withdrawal of one purpose is for `revise`, which goes through all that is written with these entries.
        return not any(entry.log_id <= until and not purposes for until, purposes in self.limits(entry.subject))


def revise(files: WarehouseFiles, partition: int, revision: Revision) -> int:
    """Takes rows out of every file of a partition, and purposes from those that stay; returns the number of rows gone.

    Raises:
        TablesError: A file is damaged; put it back from a copy, or remove it.
        TakenOver: See `WarehouseFiles.require_own`.
    """
    removed = 0
    files.require_own()
    for name in TABLES:
        # Every file, as files are cut by day and partition: a user's rows may be in any of them.
        for path in files.partition_files(name, partition):
            # The columns that decide; the others are read only if a row of the file goes or changes.
            rows = files.read(name, path, ["user_id", "log_id", *ALLOWS])
            purposes = _allowed(rows, revision.limits, slates=name == "impressions")
            # Undone are events alone; a slate of another stream may have the same log id.
            if name != "impressions":
                purposes[np.isin(rows["log_id"].to_numpy(), np.array(sorted(revision.undone), np.uint64))] = 0
            columns = {column: (purposes & purpose) > 0 for column, purpose in ALLOWS.items()}
            before = [pc.fill_null(rows[column], True).to_numpy() for column in ALLOWS]
            # Most files hold nothing of the users concerned: those are not written again.
            if all(map(np.array_equal, before, columns.values())):
                continue
            # Asked again for each file: a host that stood still must not delete what is another one's by now.
            files.require_own()
            # The derived tables go first: whatever happens from here on, they cannot stay as they are.
            for derived in DERIVED_TABLES:
                shutil.rmtree(files.out / derived / path.parent.name, ignore_errors=True)
            kept = np.logical_or.reduce(list(columns.values()))
            _rewrite(files, name, path, columns, kept)
            removed += kept.size - int(np.count_nonzero(kept))
    return removed


def hold_erasures(files: WarehouseFiles, erasures: Iterable[Erasure]) -> int:
    """Makes erasures hold that these files have not been through, as after they were put back from a backup.

    Returns:
        The number of rows that went.

    Raises:
        DamagedFiles: Files of some partitions are damaged; in the others the erasures hold.
        TakenOver: See `WarehouseFiles.require_own`.
    """
    noted = _noted_names(files)
    missing = [erasure for erasure in erasures if _name(erasure.certificate_id, erasure.log_id) not in noted]
    removed = 0
    damaged: dict[int, TablesError] = {}
    for partition in sorted({erasure.partition for erasure in missing}):
        revision = Revision.of_erasures(erasure for erasure in missing if erasure.partition == partition)
        try:
            removed += revise(files, partition, revision)
        except TablesError as error:  # the other partitions need not wait for it
            damaged[partition] = error
    whole = [erasure for erasure in missing if erasure.partition not in damaged]
    # Noted before the error is raised: the next attempt then goes through the damaged partitions only.
    note_held(files, [(erasure.certificate_id, erasure.log_id) for erasure in whole])
    if damaged:
        raise DamagedFiles(damaged)
    return removed


def note_held(files: WarehouseFiles, erasures: Iterable[tuple[str, int]]) -> None:
    """Notes erasures, each certificate id and log id, that all files have been through; `hold_erasures` skips them."""
    noted = _noted_names(files)
    if new := {_name(*erasure) for erasure in erasures} - noted:
        files.put_text(files.out / _ERASURES, "".join(f"{name}\n" for name in sorted(noted | new)))


def _noted_names(files: WarehouseFiles) -> set[str]:
    path = files.out / _ERASURES
    return set(path.read_text(encoding="utf-8").split()) if path.exists() else set()


def _name(certificate_id: str, log_id: int) -> str:
    """Names an erasure by its certificate and its place: one that was repeated stands further on in the log."""
    return f"{certificate_id}@{log_id}"


def _rewrite(
    files: WarehouseFiles,
    name: str,
    path: Path,
    columns: Mapping[str, npt.NDArray[np.bool_]],
    kept: npt.NDArray[np.bool_],
) -> None:
    if not kept.any():
        remove_file(path)
        return
    put_tables(path, TABLES[name], _kept_parts(files, name, path, columns, kept), allowed=files.require_own)


def _kept_parts(
    files: WarehouseFiles,
    name: str,
    path: Path,
    columns: Mapping[str, npt.NDArray[np.bool_]],
    kept: npt.NDArray[np.bool_],
) -> Iterator[pa.Table]:
    """Yields the rows of a file that stay, with their new purposes, a part at a time: a day's file may be large."""
    start = 0
    for rows in files.parts(name, path):
        part = slice(start, start + rows.num_rows)
        for column, values in columns.items():
            field = rows.schema.get_field_index(column)
            rows = rows.set_column(field, rows.schema.field(column), pa.array(values[part]))
        yield rows.filter(pa.array(kept[part]))
        start = part.stop


def _allowed(rows: pa.Table, limits: Callable[[str], Limits], slates: bool) -> npt.NDArray[np.int64]:
    """Returns the purposes that each row may serve from now on, as bits of `Purpose`; int64 [n]."""
    purposes = np.zeros(rows.num_rows, np.int64)
    for column, purpose in ALLOWS.items():
        purposes |= np.where(pc.fill_null(rows[column], True).to_numpy(), int(purpose), 0)
    log_ids = rows["log_id"].to_numpy()
    # The marks know users by a hash and the rows by their names, so each name has to be hashed; each once.
    for user_id in pc.unique(rows["user_id"]).to_pylist():
        user_limits = limits(subject_of(user_id))
        if not user_limits:
            continue
        of_user = pc.equal(rows["user_id"], user_id).to_numpy()
        for until, allowed in user_limits:
            # Marks are entries of the events; log ids of the impressions are comparable by their millisecond only.
            last = np.uint64(until | _LAST_OF_MS if slates else until)
            purposes[of_user & (log_ids <= last)] &= int(allowed & EVERY_PURPOSE)
    return purposes
