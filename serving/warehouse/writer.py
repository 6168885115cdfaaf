"""From the log to Parquet: the data that the next model trains on, written as the service runs.

A consumer group of both streams. What was read is held until enough came together, becomes one file per partition and
day, named by the log ids it spans, and is acknowledged only once it is on disk under its name. What is found delivered
and not acknowledged, after a crash, becomes a file of its own before anything new is read: had the last owner written
it already, that is the same file, byte for byte. So a row is there at least once, and never twice.

The mark of an erasure comes in its order: what the person left before it goes from every file of their partition before
the mark is acknowledged.
"""

from __future__ import annotations

import functools
import logging
import operator
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from features.bundle import open_bundle
from features.errors import PenchantError, TablesError
from features.profile import EVERY_PURPOSE, Purpose
from serving.errors import ConfigError, InUse, ResourceExhausted, ServingError, Unavailable
from serving.observability.outages import Outage
from serving.observability.telemetry import Telemetry
from serving.privacy.certificates import Certificates
from serving.privacy.ledger import Ledger
from serving.redis.client import connect
from serving.restart import Report, Trouble, described, keep_running
from serving.stores.catalog_log import CatalogLog
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.keys import SEQUENCE_BITS, address_of
from serving.stores.log_entries import Entry
from serving.stores.meta import awaited_partitions, partitions_for
from serving.stores.user_statements import UserStatements
from serving.stores.warehouse_positions import WarehousePositions
from serving.warehouse.files import ALLOWS, DamagedFiles, Limits, TakenOver, WarehouseFiles, by_day
from serving.warehouse.items import ItemTable
from serving.warehouse.place import GROUP, OtherPlace, WarehousePlace
from serving.warehouse.tables import Allowing, event_tables, impression_table

FLUSH_S = 30.0
"""Longest time that an entry waits for others to be written with it."""

FLUSH_ROWS = 20_000
"""Entries that are written without waiting any longer; all partitions together."""

DERIVE_S = 60.0
_TRIM_S = 60.0
_PAUSE_S = 0.1
"""Pause between two looks at a log that has less than a batch: new events wait behind every look."""
_RETRY_S = 0.5
_HOLD_S = 5.0
_STAND_BY_S = 1.0
"""Pause between two tries to take a directory that another process has."""
_TIMEOUT_S = 5.0
_KEPT_FOR = functools.reduce(operator.or_, ALLOWS.values())
_log = logging.getLogger(__name__)


class _Intake:
    """What was read of one stream and is in no file yet, by partition."""

    def __init__(self, log: EventLog, owner: str, lease_ms: int, stream: Literal["events", "impressions"]) -> None:
        self.consumer = Consumer(log, GROUP, owner, lease_ms, stream)
        self.held: list[list[Entry]] = [[] for _ in log.keys]
        self.reached = [0] * log.partitions
        self.recovered = False
        self.owned = [False] * log.partitions
        self._after: list[int | None] = [0] * log.partitions

    def read(self, count: int, clocks: Sequence[int | None]) -> int:
        """Reads on; `clocks` are those of the log's partitions before that. Returns the number of entries read."""
        seen = 0
        for partition, entries in enumerate(self.consumer.claim(self._after, count)):
            self.owned[partition] = entries is not None
            if entries is None:
                self.drop(partition)
                continue
            seen += len(entries)
            self.held[partition] += entries
            if self._after[partition] is not None:
                self._after[partition] = entries[-1].log_id if entries else None
                # Nothing new may join what is pending: see the module.
                self.recovered |= not entries and bool(self.held[partition])
                continue
            if entries:
                self.reached[partition] = entries[-1].log_id
            if len(entries) < count:
                now_ms = clocks[partition]
                self.reached[partition] = max(self.reached[partition], ((now_ms or 0) << SEQUENCE_BITS) - 1)
        return seen

    def ready(self, partition: int) -> bool:
        """Whether all that is pending has been read."""
        return self._after[partition] is None

    def drop(self, partition: int) -> None:
        """Forgets what is held of a partition: it is delivered again, to whoever owns it then."""
        self.held[partition], self._after[partition], self.reached[partition] = [], 0, 0

    def done(self, partition: int) -> None:
        """Acknowledges what is held."""
        self.consumer.acknowledge(partition, [entry.log_id for entry in self.held[partition]])
        self.held[partition] = []

    def size(self) -> int:
        """Number of entries held."""
        return sum(map(len, self.held))

    def erases(self) -> bool:
        """Whether the mark of an erasure is held."""
        return any(entry.erased for held in self.held for entry in held)


@dataclass(frozen=True, slots=True)
class _Told:
    """What the marks among some entries say of rows that are there already.

    Attributes:
        allowed: Address of a person -> what of theirs, up to a log id, may serve no more than some purposes.
        undone: Log ids of events that count no more.
    """

    allowed: dict[bytes, list[tuple[int, Purpose]]]
    undone: frozenset[int]

    @classmethod
    def by(cls, entries: Sequence[Entry]) -> _Told:
        allowed: dict[bytes, list[tuple[int, Purpose]]] = {}
        for entry in entries:
            purposes = Purpose(0) if entry.erased else entry.mark.consent if entry.mark else None
            if entry.mark and purposes is not None and purposes & _KEPT_FOR != _KEPT_FOR:
                allowed.setdefault(entry.mark.address, []).append((entry.log_id, purposes))
        return cls(allowed, frozenset(entry.undone for entry in entries if entry.undone))

    def limits(self, subject: str) -> Limits:
        """What a person allows of what is there already."""
        return self.allowed.get(address_of(subject), ()) if self.allowed else ()

    def keeps(self, entry: Entry) -> bool:
        """Whether an event among them is to be written at all."""
        if entry.log_id in self.undone:
            return False
        # What a withdrawal leaves is for `revise`; it goes through all that this writes.
        return not any(entry.log_id <= until and not purposes for until, purposes in self.limits(entry.subject))


@dataclass(slots=True)
class _Clock:
    """When something was last done."""

    every_s: float
    last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether it is time again; if so, the time begins anew."""
        now = time.monotonic()
        if now - self.last < self.every_s:
            return False
        self.last = now
        return True


class Warehouse:
    """Writes the partitions it can get into one directory, which no other process may write at the same time."""

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
        """Says what to write where; `run` does it.

        Args:
            log: Where events and impressions come from.
            files: Where they go.
            items: The catalogue beside them.
            flush_s: Longest time that an entry waits to be written.
            flush_rows: Entries that are written without waiting.
            derive_s: Time between two looks at what sessions and daily figures are made of.
            lease_ms: How long a partition stays with a warehouse that is gone.
            batch: Most entries per stream, partition and step.
            days: Days after which the rows of a day are deleted; None keeps them for ever.
            ledger: The erasures that the files must have been through, also where they come from a backup.
            place: Registers the directory as the warehouse of the log; None leaves it unregistered.
            telemetry: Counts `warehouse_rows`, `warehouse_damaged` and `warehouse_erased`.
        """
        self._log, self._files, self._items = log, files, items
        self._certificates = Certificates(log)
        owner = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._events = _Intake(log, owner, lease_ms, "events")
        self._impressions = _Intake(log, owner, lease_ms, "impressions")
        self._flush_rows, self._batch, self._lease_s = flush_rows, batch, lease_ms / 1000
        self._flush, self._derive, self._trim = _Clock(flush_s), _Clock(derive_s), _Clock(_TRIM_S)
        self._written = [0] * log.partitions
        self._holding = _Clock(_HOLD_S)
        self._days, self._ledger, self._place = days, ledger, place
        self._damage = Outage(_log, "an erasure waits")
        self._standing = Outage(_log, "no Parquet is written by this host")
        self._damaged: frozenset[int] = frozenset()
        self._telemetry = telemetry or Telemetry()

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
        # Only now: through a mount without locks, what is unfinished may be that of a process that is at it.
        self._files.repair()
        self._hold()
        self._items.open()
        for intake in (self._events, self._impressions):
            intake.consumer.open()

    def _hold(self) -> None:
        """Takes the directory through the erasures it has missed; where a file is damaged, tries again later."""
        erasures = self._certificates.erasures() + (self._ledger.erasures() if self._ledger else [])
        try:
            self._telemetry.count("warehouse_erased", self._files.hold(erasures))
            self._damaged = frozenset()
            self._damage.works()
        except DamagedFiles as error:
            self._damage.failed(error)
            self._damaged = error.partitions

    def step(self, flush: bool = False) -> int:
        """Reads the next entries of every partition, and writes what is held where it is time; returns how many came.

        Args:
            flush: Write, whether it is time or not.

        Raises:
            Unavailable: Redis does not answer; nothing is lost, step again later.
            OSError: The disk is full or gone; nothing is lost either.
            TablesError: A file from which something is to be erased is damaged; what concerns others is written.
        """
        try:
            clocks = self._log.clocks()
            seen = self._events.read(self._batch, clocks) + self._impressions.read(self._batch, clocks)
            held = self._events.size() + self._impressions.size()
            # An erasure waits for nothing.
            urgent = self._events.recovered or self._impressions.recovered or self._events.erases()
            if self._flush.due() or flush or urgent or held >= self._flush_rows:
                self._write()
            return seen
        except (PenchantError, OSError):
            self._start_over()
            raise

    def drain(self) -> None:
        """Writes all that the log holds and makes the derived tables; waits for the leases of warehouses that died.

        Raises:
            ConfigError: A warehouse with another directory keeps a partition.
            Unavailable: Redis does not answer.
            OSError: The disk is full or gone.
            TablesError: A file of the warehouse is damaged.
        """
        idle, patience = 0, time.monotonic() + 3 * self._lease_s
        while idle < 2:
            idle = 0 if self.step(flush=True) else idle + 1
            if not all(self._events.owned) or not all(self._impressions.owned):
                if missing := self._events.consumer.missing or self._impressions.consumer.missing:
                    raise missing
                idle = 0
                if time.monotonic() > patience:
                    raise ConfigError("another warehouse reads this log into another directory; stop that one first")
                time.sleep(_PAUSE_S)
        self._expire()
        self._files.derive()

    def run(self, stop: threading.Event, report: Report = lambda _: None, *, patient: bool = True) -> None:
        """Steps until `stop` is set, then writes what it holds; what is unreachable or full is waited for.

        Args:
            stop: Ends it.
            report: Told what it waits for, and "" while it waits for nothing.
            patient: Wait also while the log has another warehouse, until that one is retired.

        Raises:
            OtherPlace: The warehouse of this log is another directory, and it is not to be patient.
            PenchantError: What waiting does not help; it has given up its partitions and the directory.
        """
        outage = Outage(_log, "the warehouse waits")
        try:
            while not stop.is_set():
                try:
                    self.open(wait_s=0.0)
                    while not stop.is_set():
                        seen = self.step()
                        self._tend()
                        outage.works()
                        self._standing.works()
                        report("")
                        if seen < self._batch:
                            stop.wait(_PAUSE_S)
                    self.step(flush=True)
                    self._files.derive()
                except OtherPlace as error:
                    if not patient:
                        raise
                    report(f"refused: {error}")
                    self._stand_by(error, stop)
                except (InUse, TakenOver) as error:
                    report(f"stands by: {error}")
                    self._stand_by(error, stop)
                except (Unavailable, ResourceExhausted, TablesError, OSError) as error:
                    if not isinstance(error, Unavailable):  # of which each call to Redis speaks
                        outage.failed(error)
                    report(f"waits: {described(error)}")
                    stop.wait(_RETRY_S)
        finally:
            self.close()

    def close(self) -> None:
        """Gives up its partitions and the directory; where the first cannot be said, the leases run out."""
        try:
            self._events.consumer.release()
        except ServingError as error:
            _log.warning("the leases of the warehouse run out by themselves: %s", error)
        self._leave()

    def _leave(self) -> None:
        """Gives the directory back; what is held of the log is delivered again."""
        self._start_over()
        if self._place:
            self._place.release()
        self._files.close()

    def _stand_by(self, why: PenchantError | OSError, stop: threading.Event) -> None:
        self._leave()
        self._standing.failed(why)
        stop.wait(_STAND_BY_S)

    def lag(self) -> list[int]:
        """Number of events and impressions per partition that are not in a file yet.

        Raises:
            EventLogUnavailable: The events Redis does not answer.
        """
        lags = zip(self._events.consumer.lag(), self._impressions.consumer.lag(), strict=True)
        return [events + impressions for events, impressions in lags]

    def _start_over(self) -> None:
        for intake in (self._events, self._impressions):
            intake.recovered = False
            for partition in range(self._log.partitions):
                intake.drop(partition)

    def _write(self) -> None:
        """Writes and acknowledges what is held, then says how far the tables go."""
        damaged: TablesError | None = None
        wrote: list[int] = []
        for partition in range(self._log.partitions):
            if self._events.ready(partition) and self._impressions.ready(partition):
                try:
                    self._write_partition(partition)
                    wrote.append(partition)
                except TablesError as error:  # the others need not wait for it
                    damaged = error
                    continue
                reached = min(self._events.reached[partition], self._impressions.reached[partition])
                self._written[partition] = max(self._written[partition], reached)
        self._acknowledge(wrote)
        self._events.recovered = self._impressions.recovered = False
        self._confirm()
        self._items.follow()
        before = self._files.info()
        said = {
            "format": 1,
            "name": "warehouse",
            "notes": "What a running service logged; it grows. Readers go up to the log id `until`.",
            "partitions": self._log.partitions,
            "until": max(int(before.get("until", 0)), min(self._written)),
            "catalog_version": self._items.version,
        }
        if said != before:
            self._files.say(said)
        if damaged:
            raise damaged

    def _write_partition(self, partition: int) -> None:
        events, slates = self._events.held[partition], self._impressions.held[partition]
        told = _Told.by(events)
        allowing = self._allowing([*events, *slates])
        for cut in by_day([entry.log_id for entry in events]):
            span = events[cut][0].log_id, events[cut][-1].log_id
            about_items, searches, damaged = event_tables(
                [e for e in events[cut] if told.keeps(e) and allowing(e)], allowing
            )
            self._files.write("events", partition, span, about_items)
            self._files.write("searches", partition, span, searches)
            self._count("events", about_items.num_rows + searches.num_rows, damaged)
        for cut in by_day([entry.log_id for entry in slates]):
            span = slates[cut][0].log_id, slates[cut][-1].log_id
            rows, damaged = impression_table([entry for entry in slates[cut] if allowing(entry)], allowing)
            self._files.write("impressions", partition, span, rows)
            self._count("impressions", rows.num_rows, damaged)
        if told.allowed or told.undone:
            self._telemetry.count("warehouse_erased", self._files.revise(partition, told.limits, told.undone))

    def _acknowledge(self, partitions: Sequence[int]) -> None:
        """Notes what the files cover now, in the directory and in the log, then acknowledges it."""
        intakes: dict[str, _Intake] = {"events": self._events, "impressions": self._impressions}
        partitions = [one for one in partitions if any(intake.held[one] for intake in intakes.values())]
        if not partitions:
            return
        positions = WarehousePositions(self._log)
        before = positions.read(partitions, tuple(intakes))
        spans = self._files.spans()
        reached: dict[int, dict[str, int]] = {}
        for partition, noted in zip(partitions, before, strict=True):
            for name, intake in intakes.items():
                if intake.held[partition]:
                    after, until = noted[name], intake.held[partition][-1].log_id
                    spans.add(name, partition, after, until)
                    reached.setdefault(partition, {})[name] = max(after or 0, until)
        self._files.say_spans(spans)
        positions.note(reached)
        for partition in partitions:
            self._events.done(partition)
            self._impressions.done(partition)

    def _allowing(self, entries: Sequence[Entry]) -> Allowing:
        """What of `ALLOWS` the person of an entry allows now; who allows none of it is not in the warehouse."""
        subjects = sorted({entry.subject for entry in entries if entry.subject})
        said = UserStatements(self._log).consents(subjects) if subjects else []
        purposes = {who: consent.purposes & _KEPT_FOR for who, consent in zip(subjects, said, strict=True)}
        return lambda entry: purposes.get(entry.subject, Purpose(0))

    def _confirm(self) -> None:
        """Dates the erasures that every file of their partition has been through."""
        own = self._files.identity.copy_id if self._files.identity else ""
        done: list[tuple[str, int]] = []
        for certificate in self._certificates.pending():
            partition = int(certificate.certificate_id[:4], 16)
            lacking = any(one.store == GROUP and not one.purged_at for one in certificate.stores)
            lacking |= any(one.copy_id == own and one.open for one in certificate.copies)
            if lacking and certificate.log_id <= self._written[partition] and partition not in self._damaged:
                self._certificates.confirm(certificate, GROUP)
                self._certificates.confirm_copy(certificate, own)
                done.append((certificate.certificate_id, certificate.log_id))
        if done:
            self._files.note_held(done)

    def _expire(self) -> None:
        if self._days is not None:
            self._files.expire((datetime.fromtimestamp(self._log.now_ms() / 1000, UTC) - timedelta(self._days)).date())

    def _count(self, what: str, written: int, damaged: int) -> None:
        self._telemetry.count(("warehouse_rows", what), written)
        if damaged:
            _log.error("%d %s of the log are damaged and left out of the warehouse", damaged, what)
            self._telemetry.count("warehouse_damaged", damaged)

    def _tend(self) -> None:
        """What need not be done at once."""
        if self._damaged and self._holding.due():
            self._hold()
        if self._derive.due():
            self._expire()
            self._files.derive()
            self._files.pack(int(self._files.info().get("until", 0)))
        if self._trim.due():
            for partition in range(self._log.partitions):
                if self._events.ready(partition):
                    self._log.trim(partition)


def run(
    events_redis_url: str,
    out: Path,
    bundle: Path | None = None,
    partitions: int | None = None,
    *,
    flush_s: float = FLUSH_S,
    once: bool = False,
    days: float | None = None,
    default: Purpose = EVERY_PURPOSE,
    ledger: Ledger | None = None,
    stop: threading.Event | None = None,
    ready: Callable[[dict[str, Any]], None] = lambda _: None,
    bundle_id: str = "",
    telemetry: Telemetry | None = None,
    trouble: Trouble | None = None,
) -> dict[str, Any]:
    """The warehouse as a process: runs until SIGTERM or SIGINT, or until `stop` is set.

    What ends in an error is started again, except `once`.

    Args:
        events_redis_url: The events Redis.
        out: Directory of the warehouse.
        bundle: Names the items that were never put while the service ran.
        partitions: Partitions of the event log; None: as the log says, which is waited for unless `once`.
        flush_s: Longest time that an entry waits to be written, in seconds.
        once: Write what the log holds now, then end.
        days: Days after which the rows of a day are deleted; None keeps them for ever.
        default: What a person allows who has said nothing.
        ledger: The erasures that the files must have been through.
        stop: Ends it.
        ready: Told `pid`, `partitions` and `lag` when it begins.
        bundle_id: The bundle that `bundle` has to hold; empty where any will do.
        telemetry: Counts what a `Warehouse` counts.
        trouble: Told what it waits for; with it, what only a caller can change is waited for as well, such as another
            warehouse of this log.

    Returns:
        `partitions`, `lag` (entries that are not in a file, None where the log does not answer), and how many `events`
        and `impressions` were written, `erased` and `damaged`.

    Raises:
        OtherPlace: The warehouse of this log is another directory.
        ConfigError: The URL is wrong, with `once` another process holds the directory or a partition, or the log has
            other partitions.
        BundleError: The bundle is refused.
        EventLogUnavailable: With `once`, the events Redis does not answer.
    """
    patient, trouble = trouble is not None, trouble or Trouble(lambda _: None)
    stop = stop or threading.Event()
    if threading.current_thread() is threading.main_thread() and not patient:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    telemetry = telemetry or Telemetry()
    # Opened now and not when the log first answers: until then a link may have moved.
    opened = open_bundle(bundle, bundle_id) if bundle else None
    with connect(events_redis_url, _TIMEOUT_S) as client:
        partitions = partitions_for(client, partitions) if once else awaited_partitions(client, partitions, stop)
        log = EventLog(client, partitions, default=default)

        def made() -> Warehouse:
            items = ItemTable(out / "items.parquet", CatalogLog(client), opened)
            files = WarehouseFiles(out)
            place = WarehousePlace(log, files)
            return Warehouse(
                log, files, items, flush_s=flush_s, days=days, ledger=ledger, telemetry=telemetry, place=place
            )

        warehouse = made()
        if once:
            try:
                warehouse.open()
                warehouse.drain()
            finally:
                warehouse.close()
        else:
            ready({"pid": os.getpid(), "partitions": partitions, "lag": _lag(warehouse)})
            reporter = trouble.reporter("warehouse")

            def write(report: Report) -> None:
                made().run(stop, report, patient=patient)

            keep_running("warehouse", write, stop, reporter, patient=patient)
        counts = telemetry.counters()
        names = {"events": "rows.events", "impressions": "rows.impressions", "erased": "erased", "damaged": "damaged"}
        totals = {name: counts.get(f"warehouse_{counter}", 0) for name, counter in names.items()}
        return {"out": str(out), "partitions": partitions, "lag": _lag(warehouse), **totals}


def drop(events_redis_url: str, partitions: int | None = None) -> dict[str, Any]:
    """Drops the warehouse's consumer group for good: the log keeps nothing for it any more.

    A warehouse that is started later begins anew, with the oldest entry that the log still holds.

    Args:
        events_redis_url: The events Redis.
        partitions: Partitions of the event log; None: as the log says.

    Returns:
        `partitions`, and how many consumer `groups` were dropped.

    Raises:
        ConfigError: The URL is wrong, a warehouse runs, or some erasures have not reached its files.
        EventLogUnavailable: The events Redis does not answer; a repeat is safe.
    """
    with connect(events_redis_url, _TIMEOUT_S) as client:
        partitions = partitions_for(client, partitions)
        log = EventLog(client, partitions)
        log.open()
        pending = Certificates(log).pending()
        if lacking := [one for one in pending if any(r.store == GROUP and not r.purged_at for r in one.stores)]:
            raise ConfigError(
                f"{len(lacking)} erasures have not reached the Parquet: run penchant warehouse --once first"
            )
        dropped = Consumer(log, GROUP, "").drop() + Consumer(log, GROUP, "", stream="impressions").drop()
        WarehousePositions(log).forget(range(partitions))
        return {"partitions": partitions, "groups": dropped}


def _lag(warehouse: Warehouse) -> int | None:
    try:
        return sum(warehouse.lag())
    except ServingError:  # it is away, or nobody has ever written to it
        return None
