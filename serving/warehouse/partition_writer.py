"""Writes the entries of one partition into files, and acknowledges them once the files cover them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from features.profile import Purpose
from serving.observability.telemetry import Telemetry
from serving.stores.event_log import EventLog
from serving.stores.log_entries import Entry
from serving.stores.user_statements import UserStatements
from serving.stores.warehouse_positions import WarehousePositions
from serving.warehouse.files import WarehouseFiles
from serving.warehouse.parquet import split_by_day
from serving.warehouse.revision import KEPT_FOR, Revision, revise
from serving.warehouse.stream_buffer import StreamBuffer
from serving.warehouse.tables import PurposesOf, event_tables, impression_table

_log = logging.getLogger(__name__)


class PartitionWriter:
    """Writes what two stream buffers hold."""

    def __init__(
        self,
        log: EventLog,
        files: WarehouseFiles,
        events: StreamBuffer,
        impressions: StreamBuffer,
        telemetry: Telemetry,
    ) -> None:
        """Takes the log, the directory and the buffers.

        Counts `warehouse_rows`, `warehouse_damaged` and `warehouse_erased`.
        """
        self._log, self._files, self._telemetry = log, files, telemetry
        self._events, self._impressions = events, impressions

    def write(self, partition: int) -> None:
        """Writes the entries of a partition, and makes the marks among them hold in the files that are there.

        Raises:
            EventLogUnavailable: Redis does not answer.
            OSError: The disk is full or gone.
            TablesError: A file from which something is to be erased is damaged.
        """
        events, slates = self._events.entries[partition], self._impressions.entries[partition]
        revision, purposes_of = Revision.of_entries(events), self._purposes_of([*events, *slates])
        # A file lies in the directory of one day, so that days can be packed and expire.
        for day in split_by_day([entry.log_id for entry in events]):
            span = events[day][0].log_id, events[day][-1].log_id
            kept = [entry for entry in events[day] if revision.keeps(entry) and purposes_of(entry)]
            item_events, searches, damaged = event_tables(kept, purposes_of)
            self._files.write("events", partition, span, item_events)
            self._files.write("searches", partition, span, searches)
            self._count("events", item_events.num_rows + searches.num_rows, damaged)
        for day in split_by_day([entry.log_id for entry in slates]):
            span = slates[day][0].log_id, slates[day][-1].log_id
            rows, damaged = impression_table([entry for entry in slates[day] if purposes_of(entry)], purposes_of)
            self._files.write("impressions", partition, span, rows)
            self._count("impressions", rows.num_rows, damaged)
        # Last, so that it goes through the files just written too.
        if revision:
            self._telemetry.count("warehouse_erased", revise(self._files, partition, revision))

    def acknowledge(self, partitions: Sequence[int]) -> None:
        """Notes what the files cover now, in the directory and in the log, then acknowledges it.

        In this order a crash leaves entries that are delivered again, and never a file that the log knows nothing of.
        """
        buffers: dict[str, StreamBuffer] = {"events": self._events, "impressions": self._impressions}
        written = [
            partition for partition in partitions if any(buffer.entries[partition] for buffer in buffers.values())
        ]
        if not written:
            return
        positions = WarehousePositions(self._log)
        spans = self._files.spans()
        reached: dict[int, dict[str, int]] = {}
        for partition, before in zip(written, positions.read(written, tuple(buffers)), strict=True):
            for name, buffer in buffers.items():
                if buffer.entries[partition]:
                    after, until = before[name], buffer.entries[partition][-1].log_id
                    spans.add(name, partition, after, until)
                    reached.setdefault(partition, {})[name] = max(after or 0, until)
        self._files.write_spans(spans)
        positions.note(reached)
        for partition in written:
            self._events.acknowledge(partition)
            self._impressions.acknowledge(partition)

    def _purposes_of(self, entries: Sequence[Entry]) -> PurposesOf:
        """Returns what the user of an entry allows now; rows of users who allow none of it are not written."""
        # As it is now, not as it was: a withdrawal that came after an event holds for it too.
        subjects = sorted({entry.subject for entry in entries if entry.subject})
        consents = UserStatements(self._log).consents(subjects) if subjects else []
        purposes = {subject: consent.purposes & KEPT_FOR for subject, consent in zip(subjects, consents, strict=True)}
        return lambda entry: purposes.get(entry.subject, Purpose(0))

    def _count(self, name: str, written: int, damaged: int) -> None:
        self._telemetry.count(("warehouse_rows", name), written)
        if damaged:
            _log.error("%d %s of the log are damaged and left out of the warehouse", damaged, name)
            self._telemetry.count("warehouse_damaged", damaged)
