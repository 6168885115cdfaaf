"""The size of the event log and the lag of its readers: read from Redis itself, so it needs no reader that runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from features.errors import PenchantError
from serving.redis.client import Request
from serving.stores.event_log import EventLog

Stream = Literal["events", "impressions"]

_SAMPLES = 5
"""Nodes of a stream that Redis weighs to estimate its size."""


@dataclass(frozen=True, slots=True)
class GroupLag:
    """The entries that a consumer group of a stream has not acknowledged.

    Attributes:
        group: Name of the group.
        entries: Their number.
        age_ms: Age of the oldest of them; 0 if there is none.
    """

    group: bytes
    entries: int
    age_ms: int


@dataclass(frozen=True, slots=True)
class StreamState:
    """A stream of a partition.

    Attributes:
        stream: The kind of its entries.
        partition: The partition.
        entries: Number of its entries.
        size: Its memory in bytes, estimated by Redis.
        lags: The lag of each group of which it is known.
    """

    stream: Stream
    partition: int
    entries: int
    size: int
    lags: list[GroupLag] = field(default_factory=list)


def stream_states(log: EventLog) -> Iterator[StreamState]:
    """Yields both streams of every partition whose server answers now."""
    clocks = log.clocks()
    streams: tuple[Stream, ...] = ("events", "impressions")
    for stream in streams:
        names: list[bytes] = [getattr(keys, stream) for keys in log.keys]
        requests: list[Request] = []
        for name in names:
            requests += [("XLEN", name), ("MEMORY USAGE", name, "SAMPLES", _SAMPLES), ("XINFO GROUPS", name)]
        replies = log.nodes.run_all(requests)
        states: dict[int, StreamState] = {}
        groups: list[tuple[int, dict[str, Any]]] = []
        for partition, (length, size, info) in enumerate(zip(replies[::3], replies[1::3], replies[2::3], strict=True)):
            if isinstance(length, PenchantError):  # its server does not answer
                continue
            states[partition] = StreamState(stream, partition, length, size or 0)
            if not isinstance(info, PenchantError):  # XINFO fails where there is no such stream yet
                groups += [(partition, group) for group in info]
        for (partition, group), lag in zip(groups, _lags(log, names, groups), strict=True):
            clock = clocks[partition]
            if lag is not None and clock is not None:
                entries, oldest = lag
                age_ms = 0 if oldest is None else max(0, clock - oldest)
                states[partition].lags.append(GroupLag(group["name"], entries, age_ms))
        yield from states.values()


def _lags(
    log: EventLog, names: Sequence[bytes], groups: Sequence[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int, int | None] | None]:
    """Yields the entries that each group has not acknowledged and the time of the oldest; None if not known.

    Args:
        log: The log.
        names: Its streams, by partition.
        groups: Partition and reply of XINFO GROUPS of each.
    """
    requests: list[Request] = []
    for partition, group in groups:
        requests.append(("XPENDING", names[partition], group["name"]))
        requests.append(("XRANGE", names[partition], b"(" + group["last-delivered-id"], "+", "COUNT", 1))
    replies = log.nodes.run_all(requests) if requests else []
    for (_, group), pending, unread in zip(groups, replies[::2], replies[1::2], strict=True):
        if isinstance(pending, PenchantError) or isinstance(unread, PenchantError):
            yield None
            continue
        # Redis does not know the lag if an entry was deleted that the group has not read; then one is read, at least.
        behind = group["lag"] if group["lag"] is not None else len(unread)
        oldest: bytes | None = pending["min"] or (unread[0][0] if unread else None)
        yield int(pending["pending"]) + int(behind), None if oldest is None else int(oldest.partition(b"-")[0])
