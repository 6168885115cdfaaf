"""The events of a data set in their order, a part at a time: a data set may be bigger than memory.

A data set that Penchant wrote is in order already and is read from its Parquet files each time. Any other (rows out
of order, malformed rows, foreign types) is sorted once, some users at a time, into a temporary Arrow file that
is memory-mapped and has no name, so that it is gone with the process. `TMPDIR` says where.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.keys import item_keys
from features.tables.conform import Intake, Rejected, TablePart, Unread, origins
from features.tables.files import TableFile
from features.tables.order import ORDER_COLUMNS, codes, event_keys, is_present, nulls, order_events, select
from features.tables.schema import EVENT_SETS_REQUIRED, EVENTS

BATCH_ROWS = 1 << 17
"""Rows that are read at once."""
BUCKET_ROWS = 1 << 22
"""Rows that are sorted at once; a user with more events is sorted at once all the same."""

Read = Callable[[Sequence[str]], Iterator[pa.Table]]
Parts = Callable[[], Iterable[TablePart]]


class Events:
    """Events in the order of `order_events`, which can be read any number of times.

    Attributes:
        num_rows: Number of events.
        present: The columns that have a value in some row.
    """

    def __init__(self, read: Read, num_rows: int, present: Iterable[str]) -> None:
        """Takes a function that yields the named columns, any number of rows at a time."""
        self._read, self.num_rows = read, num_rows
        self.present = tuple(name for name in EVENTS.names if name in set(present))

    @classmethod
    def of(cls, table: pa.Table) -> Events:
        """Returns the events of a table in memory, which must be in order."""

        def read(columns: Sequence[str]) -> Iterator[pa.Table]:
            chosen = table.select(list(columns))
            for start in range(0, table.num_rows, BATCH_ROWS):
                yield chosen.slice(start, BATCH_ROWS)

        events = cls(read, table.num_rows, [name for name in EVENTS.names if is_present(table[name])])
        events._table = table
        return events

    _table: pa.Table | None = None

    @property
    def has_order(self) -> bool:
        """True if a column says in which order a user's events happened; else their order is drawn by a hash."""
        return any(name in self.present for name in ORDER_COLUMNS)

    def batches(self, columns: Sequence[str] = tuple(EVENTS.names)) -> Iterator[pa.Table]:
        """Yields the named columns, in the order of the rows; those without any value are all NULL."""
        for table in self._read(columns):
            yield complete(table, columns)

    def column(self, name: str) -> Iterator[pa.ChunkedArray[Any]]:
        """Returns one column, in parts."""
        return (table[name] for table in self.batches([name]))

    def distinct(self, name: str) -> list[str]:
        """Returns the distinct texts of a column in the order of their first row."""
        texts: dict[str, None] = {}
        for column in self.column(name):
            texts.update(dict.fromkeys(str(text) for text in column.unique().to_pylist()))
        return list(texts)

    def table(self) -> pa.Table:
        """Returns all events in memory."""
        if self._table is not None:
            return self._table
        return pa.concat_tables([EVENTS.empty_table(), *self.batches()])


def fate_of_events(intake: Intake, events: Events) -> Intake:
    """Returns the fate of a table's rows, of which some may have been left out since, and if nothing orders them."""
    return replace(intake, kept=events.num_rows, unordered=events.num_rows > 0 and not events.has_order)


def complete(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Returns the columns in their order; one that the table lacks is all NULL."""
    fields = [EVENTS.field(name) for name in columns]
    completed = [table[f.name] if f.name in table.column_names else nulls(table.num_rows, f.type) for f in fields]
    return pa.table(completed, schema=pa.schema(fields))


def is_canonical(file: TableFile) -> bool:
    """Returns True if the file's columns are ours, unit of time included."""
    schema = file.schema()
    columns = origins(schema, EVENTS, EVENT_SETS_REQUIRED, str(file.path))
    return "event_type" in columns and all(
        name == origin and schema.field(origin).type == EVENTS.field(name).type and _unit(schema, name)
        for name, origin in columns.items()
    )


def _unit(schema: pa.Schema, name: str) -> bool:
    wanted = (EVENTS.field(name).metadata or {}).get(b"unit")
    return wanted is None or (schema.field(name).metadata or {}).get(b"unit") == wanted


def reader_of(files: Sequence[TableFile]) -> Callable[[Sequence[str]], Iterator[pa.Table]]:
    """Reads columns of canonical files; what a file lacks is NULL."""

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        for file in files:
            for table in file.batches(columns, BATCH_ROWS):
                yield complete(table, columns)

    return read


class Survey:
    """One pass over parts: how many rows, which are left out, and whether the others stand in order.

    Attributes:
        rows: Number of rows that are kept.
        rejected: The rows that are left out.
        unread: The cells that were left out of the kept rows, by part.
        altered: A kept row has a NULL where its file has something else.
        present: The columns that have a value in some row.
    """

    def __init__(self, parts: Iterable[TablePart]) -> None:
        """Reads the parts."""
        self.rows = 0
        self.rejected: list[Rejected] = []
        self.unread: list[Unread] = []
        self.altered = False
        self.present: set[str] = set()
        self._items: dict[str, int] = {}
        # Keys and not names: a run of rows costs eight bytes, however long the ids are.
        self._runs: list[npt.NDArray[np.uint64]] = [np.empty(0, np.uint64)]
        self._last: list[npt.NDArray[Any]] = []
        self._ascending = True
        for part in parts:
            self.rows += part.table.num_rows
            self.rejected += part.rejected
            self.unread += part.unread
            self.altered |= part.altered
            self.present |= {name for name in part.table.column_names if is_present(part.table[name])}
            if part.table.num_rows:
                self._follow(part.table)

    @property
    def items(self) -> list[str]:
        """The items that are named, in the order of their first row."""
        return list(self._items)

    def in_order(self) -> bool:
        """Returns True if each user's events stand together, oldest first."""
        # A user who begins a second run of rows does not stand together.
        runs = np.concatenate(self._runs)
        return self._ascending and np.unique(runs).size == runs.size

    def _follow(self, table: pa.Table) -> None:
        item_ids, item_codes = codes(table["item_id"])
        new = [name for name in item_ids if name not in self._items]
        self._items.update(zip(new, item_keys(new).tolist(), strict=True))
        items = np.array([self._items[name] for name in item_ids], np.uint64)
        user_ids, user_codes = codes(table["user_id"])
        users = item_keys(user_ids)[user_codes]
        keys = [users, *event_keys(table, users, items[item_codes])]
        first = len(self._last) == 0
        if not first:
            keys = [np.concatenate([last, key]) for last, key in zip(self._last, keys, strict=True)]
        self._last = [key[-1:] for key in keys]
        undecided = keys[0][1:] == keys[0][:-1]
        self._runs.append(np.concatenate([keys[0][:1] if first else keys[0][:0], keys[0][1:][~undecided]]))
        for key in keys[1:]:
            self._ascending &= not np.any(undecided & (key[1:] < key[:-1]))
            undecided &= key[1:] == key[:-1]


def arrange(parts: Parts, survey: Survey) -> Events:
    """Returns all the parts in the order of `order_events`, without ever holding them together.

    Users are numbered by their first row and their rows dealt into buckets of consecutive users; each bucket is then
    sorted by itself.
    """
    if not survey.rows:
        return Events.of(EVENTS.empty_table())
    columns = [name for name in EVENTS.names if name in survey.present]
    with tempfile.TemporaryDirectory(prefix="penchant-") as folder:
        buckets = [Path(folder) / f"{number}.arrow" for number in range(_deal(parts, columns, Path(folder)))]
        ordered = Path(folder) / "events.arrow"
        with ExitStack() as stack:
            writer = None
            for bucket in buckets:
                with pa.memory_map(str(bucket)) as source:
                    table = pa.ipc.open_stream(source).read_all()
                    table = order_events(complete(table, EVENTS.names)).select(columns)
                if writer is None:
                    sink = stack.enter_context(pa.OSFile(str(ordered), "wb"))
                    writer = stack.enter_context(pa.ipc.new_file(sink, table.schema))
                writer.write_table(table, max_chunksize=BATCH_ROWS)
                bucket.unlink()
        # On Unix a mapped file outlives its name, so no crash leaves it behind.
        file = pa.ipc.open_file(pa.memory_map(str(ordered)))

    def read(names: Sequence[str]) -> Iterator[pa.Table]:
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            yield pa.Table.from_batches([batch]).select([name for name in names if name in batch.schema.names])

    return Events(read, survey.rows, columns)


def _deal(parts: Parts, columns: Sequence[str], folder: Path) -> int:
    """Writes each row into the bucket of its user; returns the number of buckets."""
    numbers: dict[str, int] = {}
    counts = np.zeros(0, np.int64)
    for part in parts():
        users = _numbered(part.table, numbers)
        counts = np.concatenate([counts, np.zeros(len(numbers) - counts.size, np.int64)])
        counts += np.bincount(users, minlength=counts.size)
    # By the rows before a user, so that no user is split and a bucket is exceeded by one user at most.
    bucket_of = np.maximum(np.cumsum(counts) - counts, 0) // BUCKET_ROWS
    # Numbered again, as a user with more rows than a bucket leaves gaps.
    _, bucket_of = np.unique(bucket_of, return_inverse=True)
    with ExitStack() as stack:
        writers: dict[int, Any] = {}
        for part in parts():
            buckets = bucket_of[_numbered(part.table, numbers)]
            for bucket in np.unique(buckets).tolist():
                chosen = select(part.table.select(list(columns)), np.flatnonzero(buckets == bucket))
                if bucket not in writers:
                    sink = stack.enter_context(pa.OSFile(str(folder / f"{bucket}.arrow"), "wb"))
                    writers[bucket] = stack.enter_context(pa.ipc.new_stream(sink, chosen.schema))
                writers[bucket].write_table(chosen)
    return len(writers)


def _numbered(table: pa.Table, numbers: dict[str, int]) -> npt.NDArray[np.int64]:
    """Returns the number of each row's user; new users are added to `numbers`."""
    user_ids, user_codes = codes(table["user_id"])
    return np.array([numbers.setdefault(name, len(numbers)) for name in user_ids], np.int64)[user_codes]
