"""The durable event log on Redis: what is acknowledged is on disk, and a retry has one effect.

One stream per partition; all events of a user lie in one. A stream id `ms-seq` is the log id `ms << 20 | seq`, which is
also the version of the profile that contains the event. Other keys of the partition hold what recognises retries, a
list per user of their entries, who was erased when, and what users have set. Impressions have a stream of their own.
Marks among the events tell consumers, in order, of erasures, of consent and of what was undone.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import redis
from redis.exceptions import ResponseError

from features.profile import EVERY_PURPOSE, Purpose
from features.subjects import PARTITIONS, partition_of
from serving.errors import DeadlineExceeded, EventLogUnavailable, ServingError, Unavailable
from serving.log_retention import HOUR_MS, LogRetention
from serving.redis.client import Client
from serving.redis.connection import Request, ScriptCall
from serving.redis.errors import serving_error
from serving.redis.router import RedisRouter, required
from serving.stores.admission import Admission
from serving.stores.append_calls import AppendCalls
from serving.stores.keys import META, SEQUENCE_BITS, PartitionKeys, log_id, stream_id
from serving.stores.log_entries import Appended, Entry, LoggedEvent, LoggedImpression, appended_of
from serving.stores.log_trim import groups_of, trim
from serving.stores.meta import fixed_value, require_partitions
from serving.stores.scripts import LOG_TIMES

USER_CAP = 100_000
"""Most events and slates that the log holds of one user: 14,000 a day for a week, which only a bot reaches."""

_PIECE = 1000
"""Entries that are read in one round trip."""


class LogReplaced(EventLogUnavailable):
    """The log is a new one, without the groups of the old; open it again."""


class EventLog:
    """The log in one Redis or cluster; any thread may call anything."""

    def __init__(
        self,
        client: Client,
        partitions: int = PARTITIONS,
        *,
        window_ms: int = 24 * HOUR_MS,
        times: LogRetention | None = None,
        memory_mark: float = 0.9,
        cooldown_s: float = 0.5,
        default: Purpose = EVERY_PURPOSE,
        user_cap: int = USER_CAP,
        unsafe: bool = False,
        shared_with: EventLog | None = None,
    ) -> None:
        """Takes a client of `redis.client.connect`; call `open` before anything else.

        Args:
            client: The events Redis.
            partitions: Number of partitions, fixed when the log is created.
            window_ms: Time for which retries are recognised; older events must be refused before they come here.
            times: Times for which entries stay that every reader has; None: those that the service stored in the log.
            memory_mark: Share of a server's `maxmemory` above which its events are refused; impressions at 5/6 of it.
            cooldown_s: Longest pause between tries of a failed Redis.
            default: Purposes of users who never said which they allow.
            user_cap: Most events and slates of one user that the log holds at a time; more events are refused.
            unsafe: True to acknowledge what a Redis may lose.
            shared_with: The same log through other connections; one `check_safety` is enough for both.
        """
        self.client, self.partitions, self.window_ms, self.default = client, partitions, window_ms, default
        self._times, self._index_ms, self._times_agreed = times, (times or LogRetention()).index_ms, False
        role: Literal["", "events"] = "" if unsafe else "events"
        shared_router = shared_with.router if shared_with else None
        self.router: RedisRouter = RedisRouter(
            client, EventLogUnavailable, cooldown_s, _refusal, guarded=role, shared_with=shared_router
        )
        self.keys = [PartitionKeys.of(partition) for partition in range(partitions)]
        self._mark, self._salt = memory_mark, b""
        self._admission = Admission(self.router, [keys.events for keys in self.keys])
        self._calls = AppendCalls(self.keys, self.subject_hash, window_ms, self._index_ms, default, user_cap)

    def open(self) -> None:
        """Creates the log, or checks that it is this one; may fail at start and be repeated by the first who needs it.

        Raises:
            ConfigError: The log has another number of partitions.
            EventLogUnavailable: Redis does not answer.
        """
        require_partitions(self.router, self.partitions)
        self._agree_times()
        # Erasures are remembered by a keyed hash: the name of an erased user must not survive in them.
        self._salt = fixed_value(self.router, "salt", os.urandom(16).hex())

    @property
    def unsafe(self) -> str:
        """The setting for which nothing is acknowledged now, as of the last check; empty if all is well."""
        return self.router.unsafe

    def check_safety(self) -> None:
        """Checks the settings of every server of the log; `unsafe` holds the result.

        Raises:
            EventLogUnavailable: A server does not answer, or is unsafe.
        """
        self.router.check_safety([keys.events for keys in self.keys])

    def append(self, events: Sequence[LoggedEvent]) -> list[Appended]:
        """Appends events in their order, in one round trip; each that is answered without error is on disk.

        An event that serves no purpose its user allows is refused; one that may not enter the profile is marked so. Of
        a cluster, one server may be unreachable or full: its events bear that error, the others are in.

        Raises:
            EventLogUnavailable: Redis does not answer; any of them may be durable, a retry is safe.
            ResourceExhausted: The log is full; nothing was appended.
        """
        self._agree_times()
        replies = self._admission.send(events, self._calls.events, self._mark)
        return [appended_of(event, reply) for event, reply in zip(events, replies, strict=True)]

    def append_impressions(self, impressions: Sequence[LoggedImpression]) -> int:
        """Appends slates in one round trip; returns how many, less those of an erased past or without consent.

        Raises:
            EventLogUnavailable: Redis does not answer.
            ResourceExhausted: The log is nearly full; the rest of it is kept for events.
        """
        self._agree_times()
        # Slates are three times as large as events and can be done without: they stop first.
        replies = self._admission.send(impressions, self._calls.impressions, self._mark * 5 / 6)
        return sum(reply is not None for reply in required(replies))

    def read(self, partition: int, after: int = 0, count: int = _PIECE) -> list[Entry]:
        """Returns at most `count` events of a partition after a log id, in log order.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return self._range(self.keys[partition].events, after, count)

    def newest(self, partition: int, count: int) -> list[Entry]:
        """Returns the newest events of a partition, at most `count`, in log order.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        entries = self.router.command("XREVRANGE", self.keys[partition].events, "+", "-", "COUNT", count)
        return [Entry.of(name, fields) for name, fields in reversed(entries)]

    def event_of(self, subject: str, event_id: str) -> Entry | None:
        """Returns the event of this id, None if the log does not hold it or retries of it are forgotten.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        place = self.router.command("GET", self.seen_of(subject, event_id))
        entries = self.router.command("XRANGE", self.keys_of(subject).events, place, place) if place else None
        return Entry.of(*entries[0]) if entries else None

    def read_impressions(self, partition: int, after: int = 0, count: int = _PIECE) -> list[Entry]:
        """Returns at most `count` slates of a partition after a log id, in log order.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return self._range(self.keys[partition].impressions, after, count)

    def erased(self, subjects: Sequence[str]) -> list[int]:
        """Returns for each user the time, ms, up to which what they did is refused; 0 if they were never erased.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        requests: list[Request] = [
            ("HGET", self.keys_of(subject).erased, self.subject_hash(subject)) for subject in subjects
        ]
        return [int(time_ms or 0) for time_ms in required(self.router.run_all(requests))]

    def subject_hash(self, subject: str) -> bytes:
        """Returns the keyed hash under which an erasure is remembered; 16 bytes.

        Raises:
            EventLogUnavailable: Redis does not answer, and the key is not known yet.
        """
        if not self._salt:  # the log was unreachable when it was opened
            self.open()
        return hashlib.blake2b(subject.encode(), digest_size=16, key=self._salt).digest()

    def keys_of(self, subject: str) -> PartitionKeys:
        """Returns the keys of the user's partition."""
        return self.keys[partition_of(subject, self.partitions)]

    def seen_of(self, subject: str, event_id: str) -> bytes:
        """Returns the key that holds the place of an event in the log, for as long as a retry of it can be taken."""
        return self.keys_of(subject).seen_of(subject, event_id)

    def history(
        self, subject: str, *, impressions: bool = False, after: int = 0, deadline: float = math.inf
    ) -> Iterator[list[Entry]]:
        """Yields the events that the log holds of a user, or their slates, in log order and in pieces.

        Args:
            subject: The user.
            impressions: True for slates.
            after: Log id after which to begin.
            deadline: Time on the clock of `time.monotonic`, s, at which to give up.

        Raises:
            EventLogUnavailable: Redis does not answer.
            DeadlineExceeded: The log holds more of the user than could be read in time.
        """
        keys = self.keys_of(subject)
        stream, kind = (keys.impressions, b"i") if impressions else (keys.events, b"e")
        indexed = self.router.command("LRANGE", keys.index_of(subject), 0, -1)
        before = self.indexed_since(self.now_ms(partition_of(subject, self.partitions)) << SEQUENCE_BITS)
        for entries in self.unindexed(stream, before):
            _require_time(deadline)
            yield [entry for entry in entries if entry.subject == subject and entry.log_id > after]
        oldest = max(before, after + 1)
        names = [name[1:] for name in indexed if name[:1] == kind and log_id(name[1:]) >= oldest]
        for start in range(0, len(names), _PIECE):
            _require_time(deadline)
            requests: list[Request] = [("XRANGE", stream, name, name) for name in names[start : start + _PIECE]]
            yield [Entry.of(*entry[0]) for entry in required(self.router.run_all(requests)) if entry]

    def now_ms(self, partition: int = 0) -> int:
        """Returns the time, ms, by the clock that the stream ids of a partition are made by.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return int(required(self.router.at_each([self.keys[partition].events], _clock))[0])

    def clocks(self) -> list[int | None]:
        """Returns `now_ms` of every partition; None if its server is unreachable.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        clocks = self.router.at_each([keys.events for keys in self.keys], _clock)
        return [None if isinstance(clock, Unavailable) else clock for clock in clocks]

    def trim(self, partition: int) -> int:
        """Deletes the entries that are old enough and that every reader has; returns the number of events deleted.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        # Other processes trim as well, by the times that the service stored.
        times = self._times or LogRetention.read(self.router.command("HGET", META, "times"))
        return trim(self.router, self.keys[partition], times, self.now_ms(partition))

    def group_names(self, stream: bytes) -> list[str]:
        """Returns the consumer groups of a stream, none if it does not exist.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return [group["name"].decode() for group in groups_of(self.router, stream)]

    def indexed_since(self, now: int) -> int:
        """Returns the log id from which indexes are complete.

        The index of a user without news has expired: what is older must be looked for in the stream, entry by entry.
        """
        shortest_ms = int(self.router.command("HGET", META, "index_ms") or self._index_ms)
        return now - (min(shortest_ms, self._index_ms) << SEQUENCE_BITS)

    def unindexed(self, stream: bytes, before: int) -> Iterator[list[Entry]]:
        """Yields the entries of a stream before a log id, whosever they are, in pieces."""
        after = 0
        while entries := [entry for entry in self._range(stream, after, _PIECE) if entry.log_id < before]:
            yield entries
            after = entries[-1].log_id

    def _range(self, stream: bytes, after: int, count: int) -> list[Entry]:
        entries = self.router.command("XRANGE", stream, b"(" + stream_id(after), "+", "COUNT", count)
        return [Entry.of(name, fields) for name, fields in entries]

    def _agree_times(self) -> None:
        """Stores for how long entries and indexes stay, or learns from the log how long its service keeps them."""
        if not self._times_agreed:
            times = self._times or LogRetention.read(self.router.command("HGET", META, "times"))
            # An index that went before its entries would hide them from an erasure by the service, which relies on it.
            self._calls = replace(self._calls, index_ms=max(self._index_ms, times.index_ms))
            if self._times:
                self.router.run(ScriptCall(LOG_TIMES, (META,), (times.stored, times.index_ms)))
            self._times_agreed = True


def _refusal(error: ResponseError) -> ServingError:
    if str(error).startswith("NOGROUP"):
        return LogReplaced("this log is a new one; open it again")
    return serving_error(error, EventLogUnavailable)


def _require_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise DeadlineExceeded("the log holds more of this user than could be read in time: allow the call more time")


def _clock(server: redis.Redis) -> int:
    seconds, microseconds = server.time()
    return int(seconds) * 1000 + int(microseconds) // 1000
