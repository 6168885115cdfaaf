"""Positions up to which the warehouse has written each stream of the log, whichever folder it writes to.

The log remembers it, because a folder may be an old copy of itself: files that go less far than the log says have lost
entries that are delivered to no one again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from serving.redis.connection import Request, ScriptCall
from serving.redis.router import required
from serving.stores.event_log import EventLog
from serving.stores.keys import partition_prefix
from serving.stores.scripts import HASH_SET


class WarehousePositions:
    """Reads and notes positions; any thread may call anything."""

    def __init__(self, log: EventLog) -> None:
        """Takes the log."""
        self._log = log

    def read(self, partitions: Sequence[int], streams: Sequence[str]) -> list[dict[str, int | None]]:
        """Returns for each partition the last log id that was written of each stream, None if nothing was.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        requests: list[Request] = [("HMGET", _key(partition), *streams) for partition in partitions]
        return [
            {stream: int(value) if value else None for stream, value in zip(streams, values, strict=True)}
            for values in required(self._log.router.run_all(requests))
        ]

    def note(self, positions: Mapping[int, Mapping[str, int]]) -> None:
        """Notes the last log id written, by partition and stream; a full Redis takes it too.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        # By a script that a full Redis takes too: the log is trimmed, and gets room, only behind these positions.
        calls = [
            ScriptCall(HASH_SET, (_key(partition),), tuple(word for pair in streams.items() for word in pair))
            for partition, streams in positions.items()
        ]
        required(self._log.router.run_all(calls))

    def forget(self, partitions: Iterable[int]) -> None:
        """Forgets all positions of some partitions.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        for partition in partitions:
            self._log.router.command("DEL", _key(partition))


def _key(partition: int) -> bytes:
    return partition_prefix(partition) + b"written"
