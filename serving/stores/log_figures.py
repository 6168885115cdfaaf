"""The sizes of the streams of the event log and the lag of their readers: from Redis itself, dead readers included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from features.errors import PenchantError
from serving.redis.connection import Request
from serving.stores.event_log import EventLog

STREAMS = ("events", "impressions")
_SAMPLES = 5
"""Nodes of a stream that Redis weighs to estimate its size."""


@dataclass(frozen=True, slots=True)
class ReaderFigures:
    """The progress of a consumer group in one stream.

    Attributes:
        group: Its name.
        behind: Number of entries that it has not acknowledged.
        oldest_at: Time of the oldest of these, ms; None if there are none.
    """

    group: str
    behind: int
    oldest_at: int | None


@dataclass(frozen=True, slots=True)
class StreamFigures:
    """The size of one stream of one partition.

    Attributes:
        stream: "events" or "impressions".
        partition: The partition.
        entries: Number of entries.
        bytes: Their estimated size in memory.
        readers: The consumer groups whose state could be read.
    """

    stream: str
    partition: int
    entries: int
    bytes: int
    readers: tuple[ReaderFigures, ...]


def stream_figures(log: EventLog) -> Iterator[StreamFigures]:
    """Yields the figures of both streams of every partition whose server answers.

    Raises:
        EventLogUnavailable: No server of the log answers.
    """
    for stream in STREAMS:
        keys: list[bytes] = [getattr(partition, stream) for partition in log.keys]
        # All partitions in one round trip: this runs for each scrape of the metrics.
        requests: list[Request] = []
        for key in keys:
            requests += [("XLEN", key), ("MEMORY USAGE", key, "SAMPLES", _SAMPLES), ("XINFO GROUPS", key)]
        replies = log.router.run_all(requests)
        lengths, sizes = dict(enumerate(replies[::3])), dict(enumerate(replies[1::3]))
        # A stream that nothing was written to is an error for XINFO, and has no groups.
        groups = [
            (partition, group)
            for partition, reply in enumerate(replies[2::3])
            if not isinstance(reply, PenchantError)
            for group in reply
        ]
        readers: dict[int, list[ReaderFigures]] = {}
        for partition, reader in _readers(log, keys, groups):
            readers.setdefault(partition, []).append(reader)
        for partition, length in lengths.items():
            if not isinstance(length, PenchantError):
                size = sizes[partition] or 0
                yield StreamFigures(stream, partition, length, size, tuple(readers.get(partition, ())))


def _readers(
    log: EventLog, keys: Sequence[bytes], groups: Sequence[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int, ReaderFigures]]:
    """Yields partition and figures of each group that can be read now.

    Args:
        log: The log.
        keys: The streams, by partition.
        groups: Partition and reply of XINFO GROUPS of each group.
    """
    requests: list[Request] = []
    for partition, group in groups:
        requests.append(("XPENDING", keys[partition], group["name"]))
        requests.append(("XRANGE", keys[partition], b"(" + group["last-delivered-id"], "+", "COUNT", 1))
    replies = log.router.run_all(requests) if requests else []
    for (partition, group), pending, unread in zip(groups, replies[::2], replies[1::2], strict=True):
        if isinstance(pending, PenchantError) or isinstance(unread, PenchantError):
            continue
        # Redis does not know the lag if an entry was deleted that the group has not read: one is unread, at least.
        lag = group["lag"] if group["lag"] is not None else len(unread)
        oldest: bytes | None = pending["min"] or (unread[0][0] if unread else None)
        oldest_at = None if oldest is None else int(oldest.partition(b"-")[0])
        yield partition, ReaderFigures(group["name"].decode(), int(pending["pending"]) + int(lag), oldest_at)
