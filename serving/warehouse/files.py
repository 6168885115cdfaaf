"""The warehouse on disk: where a table's rows lie, and how files come, change and go without a reader seeing a half.

    events/date=2026-11-22/p03-FIRST-LAST.parquet   rows of partition 3 of the log, named by the log ids they span
    searches/, impressions/                         the same
    sessions/date=2026-11-22/sessions.parquet       derived from the rows of that day, made anew when they change
    daily/date=2026-11-22/daily.parquet             derived as well
    items.parquet                                   the catalogue
    dataset.json                                    `until`: up to which log id the tables hold everything

A day is that of arrival, in UTC. A file is written under a hidden name, synced and renamed, and never changed in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.arrays import pc
from features.errors import TablesError
from features.files import sync
from features.private_files import make_folders, open_private
from features.profile import EVERY_PURPOSE, Purpose
from features.spans import SPANS, Spans, read_spans
from features.subjects import subject_of
from features.tables.dataset import read_info
from serving.errors import Unavailable
from serving.files import locked
from serving.folder_identity import FolderIdentity, read_identity, write_identity
from serving.privacy.ledger import Erasure
from serving.stores.keys import SEQUENCE_BITS, address_of, time_of
from serving.warehouse.tables import EVENT_ROWS, IMPRESSION_ROWS, SEARCH_ROWS, daily, sessions

TABLES = {"events": EVENT_ROWS, "searches": SEARCH_ROWS, "impressions": IMPRESSION_ROWS}
"""The tables that hold rows of the log."""

_DERIVED = ("sessions", "daily")
_SOURCE = b"penchant.source"
_LAST_OF_MS = (1 << SEQUENCE_BITS) - 1

Limits = Sequence[tuple[int, Purpose]]
"""What a person allows: of what stands up to a log id, no more than these purposes; none where all is as it was."""

ALLOWS = {"allow_train": Purpose.TRAIN, "allow_measure": Purpose.MEASURE}
"""The column that says whether a row may serve a purpose; a row that serves none of these is in no file."""


class WarehouseFiles:
    """One directory; one process at a time writes it."""

    def __init__(self, out: Path) -> None:
        """Names the directory; `open` takes it."""
        self.out = Path(out)
        self.identity: FolderIdentity | None = None
        self._lock, self._repaired = -1, False

    def open(self, wait_s: float | None = None, *, repaired: bool = True) -> None:
        """Takes the directory for this process.

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
        """Finishes or removes what the last process left unfinished; once."""
        if self._repaired:
            return
        self._repaired = True
        for draft in self.out.rglob(".*.tmp"):
            draft.unlink()
        for new in self.out.glob("*/.date=*.new"):
            shutil.rmtree(new)
        for old in self.out.glob("*/.date=*.old"):
            whole = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
            if whole.exists():
                shutil.rmtree(old)
            else:
                old.rename(whole)

    def keep(self, identity: FolderIdentity) -> None:
        """Makes a directory that is open this process's own by its identity; see `require_own`.

        Raises:
            OSError: The disk is full or gone.
        """
        write_identity(self.out, identity)
        self.identity = identity

    def require_own(self) -> None:
        """Refuses to go on where another process has taken the directory, as on a mount whose locks do not hold.

        Raises:
            TakenOver: It has.
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
        """Gives the directory back."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock, self._repaired = -1, False

    def write(self, name: str, partition: int, span: tuple[int, int], rows: pa.Table) -> None:
        """Writes the rows that the entries of a span of log ids gave, all of one day; an empty table leaves no file.

        The same span is written over. What another file spans is there already, and is not written again.

        Raises:
            TakenOver: See `require_own`.
        """
        folder = self.out / name / f"date={_day(span[0])}"
        path = folder / f"p{partition:02d}-{span[0]:020d}-{span[1]:020d}.parquet"
        for other in folder.glob(f"p{partition:02d}-*.parquet"):
            first, last = _span(other)
            if other != path and first <= span[1] and span[0] <= last:
                log_ids = rows["log_id"]
                rows = rows.filter(
                    pc.or_(
                        pc.less(log_ids, pa.scalar(first, pa.uint64())),
                        pc.greater(log_ids, pa.scalar(last, pa.uint64())),
                    )
                )
        if rows.num_rows:
            put_table(path, rows, allowed=self.require_own)
        elif path.exists():
            # What was there has been erased since it was first written.
            _remove(path)

    def revise(self, partition: int, limits: Callable[[str], Limits], undone: Collection[int] = ()) -> int:
        """Takes rows out of every file of a partition, and purposes from those that stay.

        Args:
            partition: The one that they belong to.
            limits: What a person allows.
            undone: Log ids of events that go, whoever they are of.

        Returns:
            The number of rows that went.
        """
        gone = 0
        self.require_own()
        for name in TABLES:
            for path in sorted(self.out.glob(f"{name}/date=*/p{partition:02d}-*.parquet")):
                found = self._rows(name, path, ["user_id", "log_id", *ALLOWS])
                allowed = _allowed(found, limits, slates=name == "impressions")
                if name != "impressions":
                    allowed[np.isin(found["log_id"].to_numpy(), np.array(sorted(undone), np.uint64))] = 0
                columns = {column: (allowed & purpose) > 0 for column, purpose in ALLOWS.items()}
                kept = np.logical_or.reduce(list(columns.values()))
                before = [pc.fill_null(found[column], True).to_numpy() for column in ALLOWS]
                if all(map(np.array_equal, before, columns.values())):
                    continue
                # What was derived goes first: whatever happens now, it cannot stay as it is.
                for derived in _DERIVED:
                    shutil.rmtree(self.out / derived / path.parent.name, ignore_errors=True)
                gone += kept.size - int(np.count_nonzero(kept))
                self._rewrite(name, path, columns, kept)
        return gone

    def hold(self, erasures: Iterable[Erasure]) -> int:
        """Makes erasures hold that these files have not been through, as after they were put back from a backup.

        Returns:
            The number of rows that went.

        Raises:
            DamagedFiles: Files of some partitions are damaged; what the others hold went.
            TakenOver: See `require_own`.
        """
        done = self._erasures_done()
        new = [one for one in erasures if _name(one.certificate_id, one.log_id) not in done]
        gone = 0
        damaged: dict[int, TablesError] = {}
        for partition in sorted({one.partition for one in new}):
            places: dict[bytes, int] = {}
            for one in new:
                if one.partition == partition:
                    places[one.address] = max(places.get(one.address, 0), one.log_id)

            def limits(subject: str, places: Mapping[bytes, int] = places) -> Limits:
                place = places.get(address_of(subject))
                return [(place, Purpose(0))] if place else []

            try:
                gone += self.revise(partition, limits)
            except TablesError as error:  # the others need not wait for it
                damaged[partition] = error
        self.note_held([(one.certificate_id, one.log_id) for one in new if one.partition not in damaged])
        if damaged:
            raise DamagedFiles(damaged)
        return gone

    def note_held(self, erasures: Iterable[tuple[str, int]]) -> None:
        """Notes erasures, each certificate id and log id, that all files have been through; `hold` skips them."""
        done = self._erasures_done()
        if new := {_name(*one) for one in erasures} - done:
            self._put(self.out / ".erasures", "".join(f"{name}\n" for name in sorted(done | new)))

    def _erasures_done(self) -> set[str]:
        path = self.out / ".erasures"
        return set(path.read_text(encoding="utf-8").split()) if path.exists() else set()

    def expire(self, first: date) -> int:
        """Deletes the days before one, in every table; returns the number of directories."""
        gone = [path for name in (*TABLES, *_DERIVED) for path in self.out.glob(f"{name}/date=*")]
        gone = [path for path in gone if date.fromisoformat(path.name.removeprefix("date=")) < first]
        for path in gone:
            shutil.rmtree(path)
            sync(path.parent)
        return len(gone)

    def derive(self) -> int:
        """Makes sessions and daily figures anew for every day whose rows changed; returns the number of days."""
        changed = 0
        for day in self._days():
            source = self._source(day)
            files = [self.out / name / day / f"{name}.parquet" for name in _DERIVED]
            if all(_made_of(path) == source for path in files):
                continue
            columns = ["user_id", "session_id", "timestamp", "item_id", "event_type", "log_id"]
            events = self._day_rows("events", day, columns)
            searches = self._day_rows("searches", day, [name for name in columns if name != "item_id"])
            both = pa.concat_tables([events, searches], promote_options="default")
            shown = self._day_rows("impressions", day, ["item_ids"])
            for path, rows in zip(files, (sessions(both), daily(events, shown)), strict=True):
                put_table(path, rows, {_SOURCE: source}, self.require_own)
            changed += 1
        return changed

    def pack(self, until: int) -> int:
        """Joins the many files of days that are over into one per partition; returns the number of days packed.

        A day's directory is replaced as a whole. Its rows, their order and what names them stay as they are.

        Args:
            until: Log id up to which nothing more will come.
        """
        packed = 0
        for name in TABLES:
            for path in sorted(self.out.glob(f"{name}/date=*")):
                over = _first_log_id(path.name, after_days=1) <= until
                groups = _by_partition(path)
                if over and any(len(files) > 1 for files in groups.values()):
                    self._pack_day(name, path, groups)
                    packed += 1
        return packed

    def info(self) -> dict[str, Any]:
        """What `dataset.json` says, nothing where there is none yet; raises TablesError where it is damaged."""
        return read_info(self.out)

    def say(self, info: Mapping[str, Any]) -> None:
        """Writes `dataset.json`."""
        self._put(self.out / "dataset.json", json.dumps(info, indent=2) + "\n")

    def spans(self) -> Spans:
        """What the files cover of each stream, as `say_spans` wrote it.

        Raises:
            TablesError: The file is damaged.
        """
        return read_spans(self.out)

    def say_spans(self, spans: Spans) -> None:
        """Writes what the files cover of each stream."""
        self._put(self.out / SPANS, spans.to_json() + "\n")

    def _put(self, path: Path, text: str) -> None:
        """Writes a small file of ours; it is on disk when this returns."""
        draft = path.with_name(f".{path.name.removeprefix('.')}.tmp")
        with open_private(draft, "w") as sink:
            sink.write(text)
            sink.flush()
            os.fsync(sink.fileno())
        self.require_own()
        os.replace(draft, path)
        sync(self.out)

    def _rewrite(self, name: str, path: Path, allowed: Mapping[str, Any], kept: Any) -> None:
        if kept.any():
            rows = self._rows(name, path)
            for column, values in allowed.items():
                rows = rows.set_column(rows.schema.get_field_index(column), rows.schema.field(column), pa.array(values))
            put_table(path, rows.filter(pa.array(kept)), allowed=self.require_own)
        else:
            _remove(path)

    def _days(self) -> list[str]:
        """The names of the days' directories, of what is derived as well: what lost its rows is to go."""
        days = {path.name for name in (*TABLES, *_DERIVED) for path in self.out.glob(f"{name}/date=*")}
        return sorted(days)

    def _source(self, day: str) -> bytes:
        """What a day's derived tables depend on."""
        files = [path for name in TABLES for path in _files(self.out / name / day)]
        facts = [f"{path.relative_to(self.out)} {path.stat().st_size}" for path in files]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest().encode()

    def _day_rows(self, name: str, day: str, columns: Sequence[str]) -> pa.Table:
        """What a day's figures are made of: the rows of those who allow that."""
        files = _files(self.out / name / day)
        parts = [self._rows(name, file, [*columns, "allow_measure"]) for file in files]
        schema = pa.schema([TABLES[name].field(column) for column in columns])
        measured = [part.filter(pc.fill_null(part["allow_measure"], True)).select(columns) for part in parts]
        return pa.concat_tables([schema.empty_table(), *measured])

    def _rows(self, name: str, path: Path, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of a file of a table, all of them where none is named; NULL where an older file has none.

        Raises:
            TablesError: The file is damaged.
        """
        schema = TABLES[name]
        try:
            with pq.ParquetFile(path) as file:
                present = [column for column in columns or schema.names if column in file.schema_arrow.names]
                found = file.read(columns=present)
        except (pa.ArrowException, OSError) as error:
            raise TablesError(f"{path} cannot be read ({error}): put it back from a copy, or remove it") from error
        wanted = pa.schema([schema.field(column) for column in columns or schema.names])
        return pa.concat_tables([wanted.empty_table(), found], promote_options="default")

    def _pack_day(self, name: str, path: Path, groups: Mapping[str, Sequence[Path]]) -> None:
        new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
        for prefix, files in groups.items():
            first, last = _span(files[0])[0], max(_span(file)[1] for file in files)
            rows = pa.concat_tables([self._rows(name, file) for file in files])
            put_table(new / f"{prefix}-{first:020d}-{last:020d}.parquet", rows)
        self.require_own()
        path.rename(old)
        new.rename(path)
        sync(path.parent)
        shutil.rmtree(old)


class DamagedFiles(TablesError):
    """Files of some partitions could not be read, so erasures do not hold there yet."""

    def __init__(self, damaged: Mapping[int, TablesError]) -> None:
        super().__init__(str(next(iter(damaged.values()))))
        self.partitions = frozenset(damaged)


class TakenOver(Unavailable):
    """Another process has taken the directory."""


def _name(certificate_id: str, log_id: int) -> str:
    """Names an erasure as a place that it stands at: one that was made again stands further on."""
    return f"{certificate_id}@{log_id}"


def put_table(
    path: Path,
    rows: pa.Table,
    metadata: Mapping[bytes, bytes] | None = None,
    allowed: Callable[[], None] = lambda: None,
) -> None:
    """Writes a Parquet file that is on disk when this returns; the same rows give the same bytes.

    Args:
        path: The file.
        rows: What it holds.
        metadata: What stands next to the rows.
        allowed: Raises if the file may not be put in its place any more; asked last.
    """
    if not path.parent.exists():
        make_folders(path.parent)
        sync(path.parent.parent)
    draft = path.with_name(f".{path.name}.tmp")
    with open_private(draft) as sink:
        writer = pq.ParquetWriter(sink, rows.schema, compression="zstd")
        writer.write_table(rows)
        writer.add_key_value_metadata({key.decode(): value.decode() for key, value in (metadata or {}).items()})
        writer.close()
        sink.flush()
        os.fsync(sink.fileno())
    allowed()
    os.replace(draft, path)
    sync(path.parent)


def _remove(path: Path) -> None:
    """Removes a file, and the directories of its day and table where it was the last: a table is never an empty one."""
    path.unlink()
    sync(path.parent)
    for directory in (path.parent, path.parent.parent):
        if any(directory.iterdir()):
            return
        directory.rmdir()
        sync(directory.parent)


def by_day(log_ids: Sequence[int]) -> Iterator[slice]:
    """Cuts ascending log ids where a day of arrival ends."""
    start = 0
    for at in range(1, len(log_ids) + 1):
        if at == len(log_ids) or _day(log_ids[at]) != _day(log_ids[start]):
            yield slice(start, at)
            start = at


def _day(log_id: int) -> date:
    return datetime.fromtimestamp(time_of(log_id) // 1000, UTC).date()


def _first_log_id(directory: str, after_days: int) -> int:
    """The first log id of the day so many days after that of `date=...`."""
    day = date.fromisoformat(directory.removeprefix("date=")) + timedelta(days=after_days)
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1000 << SEQUENCE_BITS


def _files(directory: Path) -> list[Path]:
    """The files of a day, by partition and then in log order."""
    return sorted(path for path in directory.glob("*.parquet") if not path.name.startswith("."))


def _made_of(path: Path) -> bytes:
    """What a derived file was made of; nothing where it is not there, or damaged: it is made anew."""
    try:
        return bytes((pq.read_metadata(path).metadata or {}).get(_SOURCE, b""))
    except (pa.ArrowException, OSError):
        return b""


def _span(path: Path) -> tuple[int, int]:
    """The first and the last log id that a file spans."""
    _, first, last = path.stem.split("-")
    return int(first), int(last)


def _by_partition(directory: Path) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path in _files(directory):
        groups.setdefault(path.name.partition("-")[0], []).append(path)
    return groups


def _allowed(rows: pa.Table, limits: Callable[[str], Limits], slates: bool) -> Any:
    """What each row may serve from now on, as bits of `Purpose`; int64 [n]."""
    allowed = np.zeros(rows.num_rows, np.int64)
    for column, purpose in ALLOWS.items():
        allowed |= np.where(pc.fill_null(rows[column], True).to_numpy(), int(purpose), 0)
    log_ids = rows["log_id"].to_numpy()
    for user in pc.unique(rows["user_id"]).to_pylist():
        found = limits(subject_of(user))
        if not found:
            continue
        own = pc.equal(rows["user_id"], user).to_numpy()
        for until, purposes in found:
            # Another stream's ids are comparable by their millisecond only.
            last = np.uint64(until | _LAST_OF_MS if slates else until)
            allowed[own & (log_ids <= last)] &= int(purposes & EVERY_PURPOSE)
    return allowed
