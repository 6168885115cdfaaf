"""Trims the event log: deletes what is older than its time, as far as every reader has acknowledged it."""

from __future__ import annotations

from typing import Any

from serving.log_retention import LogRetention
from serving.redis.connection import ScriptCall
from serving.redis.router import RedisRouter
from serving.stores.keys import PartitionKeys
from serving.stores.scripts import LOG_TRIM

TOGETHER = 5000
"""Entries of a stream that are trimmed in one step, which is some milliseconds that other clients wait."""

Group = dict[str, Any]
"""A consumer group as XINFO GROUPS describes it."""


def groups_of(router: RedisRouter, stream: bytes) -> list[Group]:
    """Returns the consumer groups of a stream, none if it does not exist.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    return list(router.command("XINFO GROUPS", stream)) if router.command("EXISTS", stream) else []


def trim(router: RedisRouter, keys: PartitionKeys, times: LogRetention, now_ms: int) -> int:
    """Deletes the events and slates of a partition that are old enough and that every reader of theirs has.

    Args:
        router: The servers of the log.
        keys: The partition.
        times: Times for which entries stay.
        now_ms: The clock of the partition.

    Returns:
        The number of events deleted.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    streams = (keys.events, keys.impressions)
    readers = [groups_of(router, stream) for stream in streams]
    names = [{group["name"].decode() for group in groups} for groups in readers]
    limits = []
    # An entry stays until every reader has acknowledged it, however old it is: a stopped warehouse loses nothing.
    for stream, groups, kept_ms in zip(streams, readers, times.kept(names[0], names[1]), strict=True):
        limit = now_ms - kept_ms
        limit = min([limit, *(_needed_since(router, group, stream, limit) for group in groups)])
        limits.append(max(0, limit))
    # The index of a user forgets what neither stream can hold any more.
    call = ScriptCall(LOG_TRIM, (*streams, keys.floor), (*limits, min(limits), TOGETHER))
    deleted = 0
    while True:  # in steps, because other clients of the server wait behind each
        events, slates = map(int, router.run(call))
        deleted += events
        if max(events, slates) < TOGETHER:
            return deleted


def _needed_since(router: RedisRouter, group: Group, stream: bytes, default: int) -> int:
    """Returns the time, ms, of the oldest entry that a group still needs; `default` if it has acknowledged all."""
    pending = router.command("XPENDING", stream, group["name"])
    oldest: bytes = pending["min"] if pending["pending"] else group["last-delivered-id"]
    if not pending["pending"] and not router.command("XRANGE", stream, b"(" + oldest, "+", "COUNT", 1):
        return default
    return int(oldest.partition(b"-")[0])
