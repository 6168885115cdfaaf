"""The durable event log on Redis: what is acknowledged is on disk, and a retry has one effect.

One stream per partition; a person's events all lie in one. A stream id `ms-seq` is the log id `ms << 20 | seq`, which
is also the version of the profile that contains the event. Beside the stream stand a key per event that de-duplicates,
a list per person of what the streams hold of them, who was erased when, and what people allow. Impressions have a
stream of their own. Marks among the events tell consumers, in order, of erasures, of consent and of what was undone.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import redis
from redis.exceptions import ResponseError

from features.clock import now_ms
from features.errors import PenchantError
from features.profile import EVERY_PURPOSE, Purpose
from features.records import RECORD
from features.subjects import partition_of
from serving.errors import (
    DeadlineExceeded,
    EventLogUnavailable,
    ServingError,
    Unavailable,
)
from serving.log_retention import HOUR_MS, LogRetention
from serving.redis.client import Client
from serving.redis.connection import Request, ScriptCall
from serving.redis.errors import serving_error
from serving.redis.router import RedisRouter, required
from serving.stores.admission import Admission
from serving.stores.keys import META, SEQUENCE_BITS, PartitionKeys, address_of, log_id, stream_id
from serving.stores.log_entries import Appended, Entry, LoggedEvent, LoggedImpression, appended_of
from serving.stores.log_trim import groups_of, trim
from serving.stores.meta import fixed_value, require_partitions
from serving.stores.scripts import EVENT_APPEND, IMPRESSION_APPEND, LOG_TIMES, USER_RETURN

USER_CAP = 100_000
"""Events and slates that the log holds of one person at most: 14,000 a day for a week is no person."""

_PIECE = 1000
_TIMESTAMP_AT: int = RECORD.fields["timestamp"][1] if RECORD.fields else 0


class LogReplaced(EventLogUnavailable):
    """The log is a new one, without the groups of the old; open it again."""


class EventLog:
    """The log in one Redis or cluster; any thread may call anything."""

    def __init__(
        self,
        client: Client,
        partitions: int = 16,
        *,
        window_ms: int = 24 * HOUR_MS,
        times: LogRetention | None = None,
        memory_mark: float = 0.9,
        cooldown_s: float = 0.5,
        default: Purpose = EVERY_PURPOSE,
        user_cap: int = USER_CAP,
        unsafe: bool = False,
        beside: EventLog | None = None,
    ) -> None:
        """Takes a client of `redis_client.connect`; call `open` before anything else.

        Args:
            client: The events Redis.
            partitions: Number of streams, fixed when the log is created.
            window_ms: How long retries are recognised; older events must be refused before they come here.
            times: How long entries stay that every reader has; None: as the service said that wrote them.
            memory_mark: Share of a server's `maxmemory` above which its events are refused; impressions at 5/6 of it.
            cooldown_s: Longest pause between looks at a failed Redis.
            default: What a person allows who has said nothing.
            user_cap: Most events and slates of one person that the log holds at a time; more events are refused.
            unsafe: Whether what is written counts on a Redis that may lose it.
            beside: The same log through other connections; one `look` is enough for both.
        """
        self._user_cap = user_cap
        self.default = default
        self.partitions = partitions
        self.window_ms = window_ms
        self.client = client
        self._times, self._index_ms, self._times_told = times, (times or LogRetention()).index_ms, times is None
        self._mark = memory_mark
        role: Literal["", "events"] = "" if unsafe else "events"
        others = beside.nodes if beside else None
        self.nodes: RedisRouter = RedisRouter(
            client, EventLogUnavailable, cooldown_s, _refusal, guarded=role, beside=others
        )
        self.keys = [PartitionKeys.of(partition) for partition in range(partitions)]
        self._salt = b""
        self._admission = Admission(self.nodes, [keys.events for keys in self.keys])

    def open(self) -> None:
        """Creates the log or checks that it is ours; done again by whoever finds it not done, so it may fail at start.

        Raises:
            ConfigError: The log has another number of partitions.
            EventLogUnavailable: Redis does not answer.
        """
        require_partitions(self.nodes, self.partitions)
        self._tell_times()
        # Tombstones hold a keyed hash: the name of who was erased must not survive in them.
        self._salt = fixed_value(self.nodes, "salt", os.urandom(16).hex())

    @property
    def unsafe(self) -> str:
        """Why nothing is acknowledged now, with the setting at fault, as of the last look; empty where all is well."""
        return self.nodes.unsafe

    def check_safety(self) -> None:
        """Looks at the settings of every server of the log; `unsafe` says what was seen.

        Raises:
            EventLogUnavailable: A server does not answer, or is unsafe.
        """
        self.nodes.check_safety([keys.events for keys in self.keys])

    def append(self, events: Sequence[LoggedEvent]) -> list[Appended]:
        """Appends events in their order, in one round trip; each that is answered without error is on disk.

        What serves no purpose that the person allows is refused; what may not enter the profile is marked so. Of a
        cluster, one server may be away or full: its events bear that error, the others are in.

        Raises:
            EventLogUnavailable: Redis does not answer; any of them may be durable, a retry is safe.
            ResourceExhausted: The log is full; nothing was appended.
        """
        self._tell_times()
        replies = self._admission.send(events, self._event_call, self._mark)
        return [appended_of(event, reply) for event, reply in zip(events, replies, strict=True)]

    def append_impressions(self, impressions: Sequence[LoggedImpression]) -> int:
        """Appends slates in one round trip; returns how many, less those of an erased past or without consent.

        Raises:
            EventLogUnavailable: Redis does not answer.
            ResourceExhausted: The log is nearly full; the rest of it is kept for events.
        """
        self._tell_times()
        replies = self._admission.send(impressions, self._impression_call, self._mark * 5 / 6)
        return sum(reply is not None for reply in required(replies))

    def read(self, partition: int, after: int = 0, count: int = 1000) -> list[Entry]:
        """The events of a partition behind a log id, in log order, at most `count`.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return self._range(self.keys[partition].events, after, count)

    def newest(self, partition: int, count: int) -> list[Entry]:
        """The newest events of a partition, in log order, at most `count`.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        found = self.nodes.command("XREVRANGE", self.keys[partition].events, "+", "-", "COUNT", count)
        return [Entry.of(name, fields) for name, fields in reversed(found)]

    def event_of(self, subject: str, event_id: str) -> Entry | None:
        """Returns the event of this id, None if the log does not hold it or retries of it are forgotten.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        place = self.nodes.command("GET", self.seen_of(subject, event_id))
        entries = self.nodes.command("XRANGE", self.keys_of(subject).events, place, place) if place else None
        return Entry.of(*entries[0]) if entries else None

    def read_impressions(self, partition: int, after: int = 0, count: int = 1000) -> list[Entry]:
        """The impressions of a partition behind a log id, as `read`.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return self._range(self.keys[partition].impressions, after, count)

    def call_back(self, seen: Mapping[str, int]) -> None:
        """Asks the projector for states that were dropped because people stayed away; asking again changes nothing.

        Where no projector answers within an hour, their next answer asks again.

        Args:
            seen: Person -> when they were here, ms. Who was erased since is not asked for.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
            ResourceExhausted: The log is full.
        """
        told: dict[int, list[bytes | str | int]] = {}
        for subject, at in seen.items():
            told.setdefault(partition_of(subject, self.partitions), []).extend((subject, self.person(subject), at))
        calls = [
            ScriptCall(USER_RETURN, (self.keys[partition].returned, self.keys[partition].erased), (HOUR_MS, *words))
            for partition, words in told.items()
        ]
        required(self.nodes.run_all(calls))

    def called_back(self) -> list[str]:
        """Takes those for whom `call_back` asked, of every server that answers; some of them where they are many.

        Raises:
            EventLogUnavailable: None of them answers.
        """
        replies = self.nodes.run_all([("SPOP", keys.returned, _PIECE) for keys in self.keys])
        return [name.decode() for reply in replies if not isinstance(reply, PenchantError) for name in reply]

    def erased(self, subjects: Sequence[str]) -> list[int]:
        """For each person the time, in ms, up to which whatever they did is refused; 0 where they were not erased.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        wanted: list[Request] = [("HGET", self.keys_of(subject).erased, self.person(subject)) for subject in subjects]
        return [int(found or 0) for found in required(self.nodes.run_all(wanted))]

    def person(self, subject: str) -> bytes:
        """The keyed hash under which an erasure is fixed_value; 16 bytes.

        Raises:
            EventLogUnavailable: Redis does not answer, and the key is not known yet.
        """
        if not self._salt:
            self.open()
        return hashlib.blake2b(subject.encode(), digest_size=16, key=self._salt).digest()

    def keys_of(self, subject: str) -> PartitionKeys:
        """The keys of the person's partition."""
        return self.keys[partition_of(subject, self.partitions)]

    def index_of(self, subject: str) -> bytes:
        """The list of what the streams hold of a person: `e` and `i` with the id of each event and impression."""
        return self.keys_of(subject).index + b":" + subject.encode()

    def history(
        self, subject: str, *, impressions: bool = False, after: int = 0, deadline: float = math.inf
    ) -> Iterator[list[Entry]]:
        """The events that the log holds of a person, or their impressions, in log order and in pieces.

        Args:
            subject: The person.
            impressions: Whether these are wanted.
            after: Log id behind which to begin.
            deadline: When to give up, on the clock of `time.monotonic`, s.

        Raises:
            EventLogUnavailable: Redis does not answer.
            DeadlineExceeded: There is more of the user than could be read in time.
        """
        keys = self.keys_of(subject)
        stream, wanted = (keys.impressions, b"i") if impressions else (keys.events, b"e")
        noted = self.nodes.command("LRANGE", self.index_of(subject), 0, -1)
        before = self.indexed_since(self.now_ms(partition_of(subject, self.partitions)) << SEQUENCE_BITS)
        for entries in self.unindexed(stream, before):
            _require_time(deadline)
            yield [entry for entry in entries if entry.subject == subject and entry.log_id > after]
        oldest = max(before, after + 1)
        names = [name[1:] for name in noted if name[:1] == wanted and log_id(name[1:]) >= oldest]
        for start in range(0, len(names), _PIECE):
            _require_time(deadline)
            requests: list[Request] = [("XRANGE", stream, name, name) for name in names[start : start + _PIECE]]
            yield [Entry.of(*entry[0]) for entry in required(self.nodes.run_all(requests)) if entry]

    def now_ms(self, partition: int = 0) -> int:
        """The clock that the stream ids of a partition are made by, ms.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        [clock] = required(self.nodes.at_each([self.keys[partition].events], _clock))
        return int(clock)

    def clocks(self) -> list[int | None]:
        """`now_ms` of every partition; None where its server is away.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        found = self.nodes.at_each([keys.events for keys in self.keys], _clock)
        return [None if isinstance(clock, Unavailable) else clock for clock in found]

    def trim(self, partition: int) -> int:
        """Deletes the events and slates that are older than is kept and that every reader of theirs has acknowledged.

        Returns the number of events deleted.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        times = self._times or LogRetention.read(self.nodes.command("HGET", META, "times"))
        return trim(self.nodes, self.keys[partition], times, self.now_ms(partition))

    def groups(self, stream: bytes) -> list[dict[str, Any]]:
        """What XINFO GROUPS says of a stream; nothing of one that is not there.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return groups_of(self.nodes, stream)

    def _event_call(self, partition: int, events: Sequence[LoggedEvent]) -> ScriptCall:
        keys, now = self.keys[partition], now_ms()
        names: list[bytes] = []
        words: list[bytes | str | int] = []
        for event in events:
            if len(event.record) != RECORD.itemsize:
                raise ValueError(f"a record has {RECORD.itemsize} bytes")
            name = event.subject.encode()
            timestamp = int.from_bytes(event.record[_TIMESTAMP_AT : _TIMESTAMP_AT + 8], "little", signed=True)
            names += (keys.seen + _seen(name, event.event_id), keys.index + b":" + name)
            words += (
                self.person(event.subject),
                timestamp,
                name,
                event.event_id,
                event.record,
                event.payload,
                # As long as a retry can be taken: an event that is ahead of the clock is taken for longer. And as long
                # as the event stays, which is found by it.
                max(self.window_ms + max(0, timestamp - now), self._index_ms // 2),
                address_of(event.subject),
                int(event.personal),
            )
        common = (self._index_ms, int(self.default), self._user_cap)
        return ScriptCall(EVENT_APPEND, (keys.events, keys.erased, keys.floor, keys.people, *names), (*common, *words))

    def seen_of(self, subject: str, event_id: str) -> bytes:
        """The key that holds the place of an event in the log, for as long as a retry of it can be taken."""
        return self.keys_of(subject).seen + _seen(subject.encode(), event_id)

    def _impression_call(self, partition: int, impressions: Sequence[LoggedImpression]) -> ScriptCall:
        keys = self.keys[partition]
        names = [keys.index + b":" + one.subject.encode() for one in impressions]
        words = [
            word
            for one in impressions
            for word in (self.person(one.subject), one.timestamp, one.subject, one.payload, address_of(one.subject))
        ]
        common = (self._index_ms, int(self.default))
        return ScriptCall(
            IMPRESSION_APPEND, (keys.impressions, keys.erased, keys.floor, keys.people, *names), (*common, *words)
        )

    def _range(self, stream: bytes, after: int, count: int) -> list[Entry]:
        found = self.nodes.command("XRANGE", stream, b"(" + stream_id(after), "+", "COUNT", count)
        return [Entry.of(name, fields) for name, fields in found]

    def _tell_times(self) -> None:
        """Has the log know for how long its entries stay, and the shortest time that an index of it was kept for."""
        if self._times is not None and not self._times_told:
            self.nodes.run(ScriptCall(LOG_TIMES, (META,), (self._times.stored, self._times.index_ms)))
            self._times_told = True

    def indexed_since(self, now: int) -> int:
        """Returns the log id from which every user's index is complete; older entries have to be searched for.

        The index of a user without new entries expires.

        Args:
            now: The log id of now.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        shortest = int(self.nodes.command("HGET", META, "index_ms") or self._index_ms)
        return now - (min(shortest, self._index_ms) << SEQUENCE_BITS)

    def unindexed(self, stream: bytes, before: int) -> Iterator[list[Entry]]:
        """Reads the entries of a stream before a log id, in pieces.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        after = 0
        while entries := [entry for entry in self._range(stream, after, _PIECE) if entry.log_id < before]:
            yield entries
            after = entries[-1].log_id


def _refusal(error: ResponseError) -> ServingError:
    if str(error).startswith("NOGROUP"):
        return LogReplaced("this log is a new one; open it again")
    return serving_error(error, EventLogUnavailable)


def _require_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise DeadlineExceeded("the log holds more of this user than could be read in time: allow the call more time")


def _clock(node: redis.Redis) -> int:
    seconds, microseconds = node.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


def _seen(subject: bytes, event_id: str) -> bytes:
    """What the key continues with that says that an event is there."""
    # A hash, not the ids: `a:` + `b` and `a` + `:b` must differ, and a key per event should be short.
    name = len(subject).to_bytes(4, "little") + subject + event_id.encode()
    return b":" + hashlib.blake2b(name, digest_size=16).digest()
