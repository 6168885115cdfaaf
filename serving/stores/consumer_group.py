"""Reading the event log as a consumer group: one owner per partition, nothing skipped, nothing lost in a crash."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from features.errors import PenchantError
from serving.errors import ConfigError, Unavailable
from serving.observability.outages import Outage
from serving.redis.connection import ScriptCall
from serving.redis.router import required
from serving.stores.event_log import EventLog, LogReplaced
from serving.stores.keys import stream_id
from serving.stores.log_entries import Entry
from serving.stores.log_trim import groups_of
from serving.stores.scripts import LOG_CLAIM, LOG_JOIN, LOG_RELEASE

_log = logging.getLogger(__name__)


class Consumer:
    """A reader of the partitions whose lease it can get.

    An entry is delivered until it is acknowledged: after a crash the next owner asks for what is pending first.

    Attributes:
        missing: The error for which some partitions could not be read the last time, None if all servers answered.
    """

    def __init__(
        self,
        log: EventLog,
        group: str,
        owner: str,
        lease_ms: int = 10_000,
        stream: Literal["events", "impressions"] = "events",
    ) -> None:
        """Names a reader; call `open` before anything else.

        Args:
            log: The log to read.
            group: The group: each group gets every event once, however many readers it has.
            owner: Name of this reader, different from every other one's.
            lease_ms: Time for which a partition stays with an owner that gives no sign of life.
            stream: The stream of each partition to read; a lease holds for both, so that they stay with one owner.
        """
        self.missing: PenchantError | None = None
        self._outage = Outage(_log, "some partitions cannot be read")
        self._log = log
        self._group = group
        self._owner = owner
        self._lease_ms = lease_ms
        self._streams: list[bytes] = [getattr(keys, stream) for keys in log.keys]
        self._leases = [keys.lease_of(group) for keys in log.keys]

    def open(self) -> None:
        """Makes the group, from the oldest entry of every partition whose server answers, unless it exists.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        # From the oldest entry: a group that began with the newest would lose what came before its first start.
        self._log.open()
        self._run([ScriptCall(LOG_JOIN, (stream,), (self._group,)) for stream in self._streams])

    def claim(self, after: Sequence[int | None], count: int = 500) -> list[list[Entry] | None]:
        """Takes or keeps every partition that is free or ours and reads on, in one round trip.

        Args:
            after: Per partition, None for new entries, or the log id after which to read again what was delivered and
                not acknowledged; a reader that gets a partition begins with 0.
            count: Most entries per partition.

        Returns:
            Per partition its entries in log order, None if another reader owns it or it cannot be read now.

        Raises:
            EventLogUnavailable: Redis does not answer; what was read meanwhile is pending.
        """
        calls = [
            ScriptCall(
                LOG_CLAIM,
                (stream, lease),
                (self._owner, self._lease_ms, self._group, count, ">" if start is None else stream_id(start)),
            )
            for stream, lease, start in zip(self._streams, self._leases, after, strict=True)
        ]
        return [None if reply is None else [_entry(*entry) for entry in reply] for reply in self._run(calls)]

    def acknowledge(self, partition: int, log_ids: Sequence[int]) -> None:
        """Acknowledges entries: they are not delivered again.

        Raises:
            EventLogUnavailable: Redis does not answer; they are delivered again.
        """
        if log_ids:
            names = map(stream_id, log_ids)
            self._log.router.command("XACK", self._streams[partition], self._group, *names)

    def lag(self) -> list[int]:
        """Returns the number of entries per partition that are not acknowledged yet.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        lags = []
        for stream in self._streams:
            groups = self._log.router.command("XINFO GROUPS", stream)
            # Redis does not know the lag if an entry was deleted that the group has not read.
            lags += [
                group["pending"] + (group["lag"] or 0) for group in groups if group["name"] == self._group.encode()
            ]
        return lags

    def release(self) -> None:
        """Gives up every partition, so that the next owner need not wait for the leases to run out.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        self._run([ScriptCall(LOG_RELEASE, (lease,), (self._owner,)) for lease in self._leases])

    def drop(self) -> int:
        """Drops the group from every partition; returns in how many it was.

        Raises:
            ConfigError: A process reads for it now.
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        if any(required(self._log.router.run_all([("EXISTS", lease) for lease in self._leases]))):
            raise ConfigError(f"{self._group} is still read, or was until a moment ago: stop its process first")
        dropped = 0
        for stream in self._streams:
            if self._log.router.command("EXISTS", stream):
                dropped += int(self._log.router.command("XGROUP", "DESTROY", stream, self._group, at=stream))
        return dropped

    def _run(self, calls: Sequence[ScriptCall]) -> list[Any]:
        """Returns the reply of each partition, None if its server is unreachable or its stream is damaged."""
        replies = self._log.router.run_all(calls)
        # One unreachable server must not stop the partitions of the others; a new log must, because every position that
        # the caller holds is one of the old log.
        failures = [reply for reply in replies if isinstance(reply, PenchantError)]
        replaced = [failure for failure in failures if isinstance(failure, LogReplaced)]
        if replaced or len(failures) == len(calls):
            raise (replaced or failures)[0]
        if failures and not all(isinstance(failure, Unavailable) for failure in failures):
            self._outage.failed(f"{len(failures)} of {len(calls)}, the others go on: {failures[0]}")
        elif not failures:
            self._outage.works()
        self.missing = failures[0] if failures else None
        return [None if isinstance(reply, PenchantError) else reply for reply in replies]


def has_acknowledged(log: EventLog, group: str) -> bool:
    """Returns True if a consumer group has acknowledged an entry of some partition.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    for keys in log.keys:
        for stream in (keys.events, keys.impressions):
            for facts in groups_of(log.router, stream):
                read = facts["entries-read"] or int(facts["last-delivered-id"] != b"0-0")
                if facts["name"] == group.encode() and read > facts["pending"]:
                    return True
    return False


def _entry(name: bytes, words: Sequence[bytes] | None) -> Entry:
    """Returns the entry of a script's reply: alternating names and values, none if it was deleted meanwhile."""
    return Entry.of(name, dict(zip(words[::2], words[1::2], strict=True)) if words else {})
