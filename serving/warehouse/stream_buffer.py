"""The entries that were read of one stream and are in no file yet, by partition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.keys import SEQUENCE_BITS
from serving.stores.log_entries import Entry
from serving.warehouse.place import GROUP


class StreamBuffer:
    """Reads one stream of the log for the warehouse.

    Attributes:
        consumer: Reader of the stream.
        entries: Entries that are in no file yet, per partition, in log order.
        reached: Log id up to which all entries were read, per partition.
        recovered: True if some partition has read all that was pending when it was taken over.
        owned: True for each partition that is this process's now.
    """

    def __init__(self, log: EventLog, owner: str, lease_ms: int, stream: Literal["events", "impressions"]) -> None:
        self.consumer = Consumer(log, GROUP, owner, lease_ms, stream)
        self.entries: list[list[Entry]] = [[] for _ in log.keys]
        self.reached = [0] * log.partitions
        self.recovered = False
        self.owned = [False] * log.partitions
        self._after: list[int | None] = [0] * log.partitions

    def read(self, count: int, clocks: Sequence[int | None]) -> int:
        """Reads on in every partition.

        Args:
            count: Most entries per partition.
            clocks: Clocks of the log's partitions from before this read, ms; None for an unreachable server.

        Returns:
            The number of entries read.
        """
        read = 0
        for partition, entries in enumerate(self.consumer.claim(self._after, count)):
            self.owned[partition] = entries is not None
            if entries is None:
                self.drop(partition)
                continue
            read += len(entries)
            self.entries[partition] += entries
            if self._after[partition] is not None:
                self._after[partition] = entries[-1].log_id if entries else None
                # Nothing new may join what was pending: the last owner may have written exactly this file.
                self.recovered |= not entries and bool(self.entries[partition])
                continue
            if entries:
                self.reached[partition] = entries[-1].log_id
            if len(entries) < count:
                # The stream is read to its end: nothing can come with an id from before the read.
                now_ms = clocks[partition]
                self.reached[partition] = max(self.reached[partition], ((now_ms or 0) << SEQUENCE_BITS) - 1)
        return read

    def ready(self, partition: int) -> bool:
        """Returns True if all that was pending of a partition has been read."""
        return self._after[partition] is None

    def drop(self, partition: int) -> None:
        """Forgets the entries of a partition, which are delivered again to its next owner."""
        self.entries[partition], self._after[partition], self.reached[partition] = [], 0, 0

    def acknowledge(self, partition: int) -> None:
        """Acknowledges the entries of a partition, which are in files now."""
        self.consumer.acknowledge(partition, [entry.log_id for entry in self.entries[partition]])
        self.entries[partition] = []

    def size(self) -> int:
        """Returns the number of entries."""
        return sum(map(len, self.entries))

    def erases(self) -> bool:
        """Returns True if the mark of an erasure is among the entries."""
        return any(entry.erased for entries in self.entries for entry in entries)
