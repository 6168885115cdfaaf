"""Trims the event log: what is older than is kept goes, as far as every reader has acknowledged it."""

from __future__ import annotations

from typing import Any

from serving.log_retention import LogRetention
from serving.redis.connection import ScriptCall
from serving.redis.router import RedisRouter
from serving.stores.keys import PartitionKeys
from serving.stores.scripts import LOG_TRIM

TOGETHER = 5000
"""Entries of a stream that are trimmed in one step, some milliseconds that others wait."""

Group = dict[str, Any]
"""What XINFO GROUPS says of one."""


def groups_of(nodes: RedisRouter, stream: bytes) -> list[Group]:
    """The consumer groups of a stream; none of one that is not there.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    return list(nodes.command("XINFO GROUPS", stream)) if nodes.command("EXISTS", stream) else []


def trim(nodes: RedisRouter, keys: PartitionKeys, times: LogRetention, now_ms: int) -> int:
    """Deletes the events and slates of a partition that are old enough and that every reader of theirs has.

    Args:
        nodes: The servers of the log.
        keys: The partition.
        times: For how long entries stay.
        now_ms: The clock of the partition.

    Returns:
        The number of events deleted.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    streams = (keys.events, keys.impressions)
    readers = [groups_of(nodes, stream) for stream in streams]
    names = [{group["name"].decode() for group in groups} for groups in readers]
    limits = []
    for stream, groups, kept_ms in zip(streams, readers, times.kept(names[0], names[1]), strict=True):
        limit = now_ms - kept_ms
        limit = min([limit, *(_needed_by(nodes, group, stream, limit) for group in groups)])
        limits.append(max(0, limit))
    # The index of a user forgets what neither stream can hold any more.
    call = ScriptCall(LOG_TRIM, (*streams, keys.floor), (*limits, min(limits), TOGETHER))
    deleted = 0
    while True:  # others wait behind each step
        events, slates = map(int, nodes.run(call))
        deleted += events
        if max(events, slates) < TOGETHER:
            return deleted


def _needed_by(nodes: RedisRouter, group: Group, stream: bytes, otherwise: int) -> int:
    """Time in ms of the oldest entry that a group still needs; `otherwise` where it has read and done all."""
    pending = nodes.command("XPENDING", stream, group["name"])
    oldest: bytes = pending["min"] if pending["pending"] else group["last-delivered-id"]
    if not pending["pending"] and not nodes.command("XRANGE", stream, b"(" + oldest, "+", "COUNT", 1):
        return otherwise
    return int(oldest.partition(b"-")[0])
