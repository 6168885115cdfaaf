"""From the log to Parquet: the data that the next model trains on, written as the service runs.

The warehouse is a consumer group of both streams. Entries are held until enough have come together, become one file per
partition and day, named by the log ids it spans, and are acknowledged only once it is on disk under its name. Entries
that are delivered again, after a crash, become a file of their own before anything new is read: if the last owner has
written it already, that is the same file, byte for byte. So a row is there at least once, and never twice.

Marks come in their order: what an erasure forbids goes from every file of the partition before its mark is
acknowledged.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from features.errors import PenchantError, TablesError
from serving.errors import ConfigError, InUse, ResourceExhausted, ServingError, Unavailable
from serving.observability.outages import Outage
from serving.observability.telemetry import Telemetry
from serving.privacy.ledger import Ledger
from serving.restart import Report, described
from serving.stores.event_log import EventLog
from serving.warehouse.derived import derive
from serving.warehouse.erasures import WarehouseErasures
from serving.warehouse.files import TakenOver, WarehouseFiles
from serving.warehouse.items import ItemTable
from serving.warehouse.partition_writer import PartitionWriter
from serving.warehouse.place import OtherPlace, WarehousePlace
from serving.warehouse.stream_buffer import StreamBuffer

FLUSH_S = 30.0
"""Longest time that an entry waits for others to be written with it."""

FLUSH_ROWS = 20_000
"""Entries that are written without waiting any longer; all partitions together."""

DERIVE_S = 60.0
"""Shortest pause between two rounds of deriving."""

_DERIVING = 0.05
"""Largest share of its time that the warehouse spends on deriving: late in a day, each round reads much."""

_TRIM_S = 60.0
_PAUSE_S = 0.1
"""Pause between two looks at a log that has less than a batch: new events wait behind every look."""
_RETRY_S = 0.5
_HOLD_S = 5.0
_STAND_BY_S = 1.0
"""Pause between two tries to take a directory that another process has."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Interval:
    """The time between two rounds of some work."""

    every_s: float
    last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Returns True if it is time for the next round, and begins its interval then."""
        now = time.monotonic()
        if now - self.last < self.every_s:
            return False
        self.last = now
        return True

    def rest(self, begun: float, share: float) -> None:
        """Puts the next round off so far that rounds like the one that began at `begun` take a share of the time."""
        took = time.monotonic() - begun
        self.last = max(self.last, begun + took / share - self.every_s)


class WarehouseWriter:
    """Writes the partitions it can get into one directory, which no other process may write at the same time.

    Attributes:
        partitions: Number of partitions of the log.
    """

    def __init__(
        self,
        log: EventLog,
        files: WarehouseFiles,
        items: ItemTable,
        *,
        flush_s: float = FLUSH_S,
        flush_rows: int = FLUSH_ROWS,
        derive_s: float = DERIVE_S,
        lease_ms: int = 10_000,
        batch: int = 1000,
        days: float | None = None,
        ledger: Ledger | None = None,
        telemetry: Telemetry | None = None,
        place: WarehousePlace | None = None,
    ) -> None:
        """Takes the log and the directory; `run` does the work.

        Args:
            log: Source of events and impressions.
            files: The directory.
            items: The catalogue in it.
            flush_s: Longest time that an entry waits to be written.
            flush_rows: Entries that are written without waiting.
            derive_s: Time between two rounds of deriving sessions and daily figures.
            lease_ms: Time for which a partition stays with a warehouse that is gone.
            batch: Most entries per stream, partition and step.
            days: Days after which the rows of a day are deleted; None keeps them for ever.
            ledger: Erasures that the files must have been through, also if they come from a backup.
            telemetry: Counts `warehouse_rows`, `warehouse_damaged` and `warehouse_erased`.
            place: Registers the directory as the warehouse of the log; None leaves it unregistered.
        """
        self._log, self._files, self._items = log, files, items
        self.partitions = log.partitions
        telemetry = telemetry or Telemetry()
        # A new name for each process: the lease of one that died must not pass for this one's.
        owner = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._events = StreamBuffer(log, owner, lease_ms, "events")
        self._impressions = StreamBuffer(log, owner, lease_ms, "impressions")
        self._flush_rows, self._batch, self._lease_s = flush_rows, batch, lease_ms / 1000
        self._flush, self._derive, self._trim = _Interval(flush_s), _Interval(derive_s), _Interval(_TRIM_S)
        self._written = [0] * log.partitions
        self._days, self._place = days, place
        self._partition_writer = PartitionWriter(log, files, self._events, self._impressions, telemetry)
        self._erasures, self._hold = WarehouseErasures(log, files, ledger, telemetry), _Interval(_HOLD_S)
        self._standby = Outage(_log, "no Parquet is written by this host")

    def open(self, wait_s: float | None = None) -> None:
        """Takes the directory and joins the consumer group.

        Args:
            wait_s: Longest wait for another process that holds the directory; that of `locked` if None.

        Raises:
            InUse: Another process holds the directory.
            OtherPlace: The warehouse of this log is another directory.
            ConfigError: The log has another number of partitions.
            BundleError: The bundle is refused.
            EventLogUnavailable: The events Redis does not answer.
        """
        self._files.open(wait_s, repaired=False)
        self._log.open()
        if self._place:
            self._place.take()
        # Only now: on a mount without locks, what is unfinished may be what a running process is writing.
        self._files.repair()
        self._erasures.hold()
        self._items.open()
        for buffer in (self._events, self._impressions):
            buffer.consumer.open()

    def step(self, flush: bool = False) -> int:
        """Reads the next entries of every partition and, if it is time, writes all that are held.

        Args:
            flush: Write at once.

        Returns:
            The number of entries read.

        Raises:
            Unavailable: Redis does not answer; nothing is lost, step again later.
            OSError: The disk is full or gone; nothing is lost either.
            TablesError: A file from which something is to be erased is damaged; what concerns others is written.
        """
        try:
            clocks = self._log.clocks()
            entries = self._events.read(self._batch, clocks) + self._impressions.read(self._batch, clocks)
            full = self._events.size() + self._impressions.size() >= self._flush_rows
            # An erasure waits for nothing.
            urgent = self._events.recovered or self._impressions.recovered or self._events.erases()
            if self._flush.due() or flush or urgent or full:
                self._write()
            return entries
        except (PenchantError, OSError):
            self._start_over()
            raise

    def drain(self) -> None:
        """Writes all that the log holds and derives the other tables; waits for the leases of warehouses that died.

        Raises:
            ConfigError: A warehouse with another directory keeps a partition.
            Unavailable: Redis does not answer.
            OSError: The disk is full or gone.
            TablesError: A file of the warehouse is damaged.
        """
        idle_steps, patience = 0, time.monotonic() + 3 * self._lease_s
        # Two steps without entries: the first of a partition only ends what was pending.
        while idle_steps < 2:
            idle_steps = 0 if self.step(flush=True) else idle_steps + 1
            if not all(self._events.owned) or not all(self._impressions.owned):
                if missing := self._events.consumer.missing or self._impressions.consumer.missing:
                    raise missing
                idle_steps = 0
                if time.monotonic() > patience:
                    raise ConfigError("another warehouse reads this log into another directory; stop that one first")
                time.sleep(_PAUSE_S)
        self._expire()
        derive(self._files)

    def run(self, stop: threading.Event, report: Report = lambda _: None, *, patient: bool = True) -> None:
        """Steps until `stop` is set, then writes what it holds; what is unreachable or full is waited for.

        Args:
            stop: Ends it.
            report: Told what it waits for, and "" while it waits for nothing.
            patient: Wait also while the log has another warehouse, until that one is retired.

        Raises:
            OtherPlace: The warehouse of this log is another directory, and `patient` is False.
            PenchantError: An error that waiting does not help; it has given up its partitions and the directory.
        """
        outage = Outage(_log, "the warehouse waits")
        try:
            while not stop.is_set():
                try:
                    self._run_steps(stop, outage, report)
                except OtherPlace as error:
                    if not patient:
                        raise
                    report(f"refused: {error}")
                    self._stand_by(error, stop)
                except (InUse, TakenOver) as error:
                    report(f"stands by: {error}")
                    self._stand_by(error, stop)
                except (Unavailable, ResourceExhausted, TablesError, OSError) as error:
                    if not isinstance(error, Unavailable):  # each call to Redis logs its own outage
                        outage.failed(error)
                    report(f"waits: {described(error)}")
                    stop.wait(_RETRY_S)
        finally:
            self.close()

    def close(self) -> None:
        """Gives up its partitions and the directory; if the log cannot be told, the leases run out."""
        try:
            self._events.consumer.release()
        except ServingError as error:
            _log.warning("the leases of the warehouse run out by themselves: %s", error)
        self._leave()

    def lag(self) -> list[int]:
        """Returns the number of events and impressions per partition that are not in a file yet.

        Raises:
            EventLogUnavailable: The events Redis does not answer.
        """
        lags = zip(self._events.consumer.lag(), self._impressions.consumer.lag(), strict=True)
        return [events + impressions for events, impressions in lags]

    def _run_steps(self, stop: threading.Event, outage: Outage, report: Report) -> None:
        self.open(wait_s=0.0)
        while not stop.is_set():
            entries = self.step()
            self._run_intervals()
            outage.works()
            self._standby.works()
            report("")
            if entries < self._batch:
                stop.wait(_PAUSE_S)
        self.step(flush=True)
        derive(self._files)

    def _stand_by(self, reason: PenchantError | OSError, stop: threading.Event) -> None:
        self._leave()
        self._standby.failed(reason)
        stop.wait(_STAND_BY_S)

    def _leave(self) -> None:
        """Gives the directory back; the entries that are held are delivered again."""
        self._start_over()
        if self._place:
            self._place.release()
        self._files.close()

    def _start_over(self) -> None:
        for buffer in (self._events, self._impressions):
            buffer.recovered = False
            for partition in range(self._log.partitions):
                buffer.drop(partition)

    def _write(self) -> None:
        """Writes and acknowledges all entries that are held, then writes how far the tables go."""
        damaged: TablesError | None = None
        partitions: list[int] = []
        for partition in range(self._log.partitions):
            if self._events.ready(partition) and self._impressions.ready(partition):
                try:
                    self._partition_writer.write(partition)
                    partitions.append(partition)
                except TablesError as error:  # the other partitions need not wait for it
                    damaged = error
                    continue
                reached = min(self._events.reached[partition], self._impressions.reached[partition])
                self._written[partition] = max(self._written[partition], reached)
        self._partition_writer.acknowledge(partitions)
        self._events.recovered = self._impressions.recovered = False
        self._erasures.confirm(self._written)
        self._items.follow()
        _write_info(self._files, min(self._written), self._log.partitions, self._items.version)
        if damaged:
            raise damaged

    def _expire(self) -> None:
        if self._days is not None:
            now = datetime.fromtimestamp(self._log.now_ms() / 1000, UTC)
            self._files.expire((now - timedelta(self._days)).date())

    def _run_intervals(self) -> None:
        """Does the work whose time has come."""
        if self._erasures.waiting and self._hold.due():
            self._erasures.hold()
        if self._derive.due():
            begun = time.monotonic()
            self._expire()
            derive(self._files)
            self._derive.rest(begun, _DERIVING)
            self._files.pack(int(self._files.info().get("until", 0)))
        if self._trim.due():
            for partition in range(self._log.partitions):
                if self._events.ready(partition):
                    self._log.trim(partition)


def _write_info(files: WarehouseFiles, until: int, partitions: int, catalog_version: int) -> None:
    """Writes how far the tables go, if that has changed."""
    before = files.info()
    info = {
        "format": 1,
        "name": "warehouse",
        "notes": "What a running service logged; it grows. Readers go up to the log id `until`.",
        "partitions": partitions,
        # Never back: after a restart a partition counts from 0 until it is read again.
        "until": max(int(before.get("until", 0)), until),
        "catalog_version": catalog_version,
    }
    if info != before:
        files.write_info(info)
