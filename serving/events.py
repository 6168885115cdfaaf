"""The durable event log on Redis: what is acknowledged is on disk, and a retry has one effect.

One stream per partition; a person's events all lie in one. A stream id `ms-seq` is the log id `ms << 20 | seq`, which
is also the version of the profile that contains the event. Beside the stream stand a key per event that de-duplicates,
a list per person of what the streams hold of them, who was erased when, and what people allow. Impressions have a
stream of their own. Marks among the events tell consumers, in order, of erasures, of consent and of what was undone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import redis
from redis.exceptions import ResponseError

from features.errors import PenchantError
from features.profile import EVERY_PURPOSE, RECORD, Purpose, verify
from serving.errors import (
    ConfigError,
    ConsentWithheld,
    EventLogUnavailable,
    FailedPrecondition,
    ResourceExhausted,
    ServingError,
    Unavailable,
)
from serving.profiles import Mark
from serving.redis_client import (
    META,
    Call,
    Client,
    Request,
    address_of,
    partition_of,
    partition_prefix,
    reply_error,
    serving_error,
)
from serving.redis_nodes import PARTITIONS, Nodes, agreed_partitions, remembered, require_partitions, required
from serving.scripts import (
    EVENT_APPEND,
    EVENT_ERASE,
    IMPRESSION_APPEND,
    LOG_TRIM,
    PERSON_RETURN,
    SEQUENCE_BITS,
)

HOUR_MS = 3_600_000
PERSON_CAP = 100_000
"""Events and slates that the log holds of one person at most: 14,000 a day for a week is no person."""

_MEMORY_CHECK_S = 1.0
"""Time after which an append brings news of the memory with it."""
_MEMORY_KNOWN_S = 5.0
"""Time for which such news counts; who sends so seldom can wait for newer ones."""
_PIECE = 1000
_RETRY_S = 0.5
_TOGETHER = 64
"""Entries of a partition that are appended in one step: others wait behind a step, and each is a write to disk."""
_TIMESTAMP_AT: int = RECORD.fields["timestamp"][1] if RECORD.fields else 0
_log = logging.getLogger(__name__)


class LogReplaced(EventLogUnavailable):
    """The log is a new one, without the groups of the old; open it again."""


def log_id(stream_id: bytes) -> int:
    """The log id of a stream id `ms-seq`."""
    milliseconds, _, sequence = stream_id.partition(b"-")
    return int(milliseconds) << SEQUENCE_BITS | int(sequence)


def stream_id(log_id: int) -> bytes:
    """The stream id of a log id."""
    return b"%d-%d" % (log_id >> SEQUENCE_BITS, log_id & ((1 << SEQUENCE_BITS) - 1))


def partitions_of(client: Client) -> int:
    """The number of partitions of the log that a Redis holds.

    Raises:
        ConfigError: It holds none: profiles alone, or nothing.
        EventLogUnavailable: Redis does not answer.
    """
    partitions, salt = Nodes(client, EventLogUnavailable).command("HMGET", META, "partitions", "salt")
    if partitions is None or salt is None:
        raise ConfigError("this Redis holds no event log: give the one that `penchant serve` calls events_redis")
    return int(partitions)


def partitions_for(client: Client, asked: int | None = None) -> int:
    """The number of partitions of the log in a Redis; of a new one, that which is asked for, or the usual.

    Raises:
        ConfigError: The log has another number than is asked for.
        EventLogUnavailable: Redis does not answer.
    """
    return agreed_partitions(Nodes(client, EventLogUnavailable), asked)


def awaited_partitions(client: Client, asked: int | None, stop: threading.Event) -> int:
    """`partitions_for`, as soon as Redis answers or `stop` is set; a number that is asked for is not waited for.

    Raises:
        ConfigError: The log has another number than is asked for.
    """
    while True:
        try:
            return partitions_for(client, asked)
        except ConfigError:
            raise
        except ServingError as error:  # away, or it refuses its users for now
            if asked or stop.is_set():
                return asked or PARTITIONS
            _log.warning("the number of partitions is not known yet: %s", error)
            stop.wait(_RETRY_S)


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event on its way into the log.

    Attributes:
        subject: Key of the person.
        event_id: The caller's id; retries with the same one have one effect.
        record: What the fold reads of it; the bytes of one RECORD.
        payload: The whole event as JSON.
        personal: Whether it may enter the profile, where the person allows that.
    """

    subject: str
    event_id: str
    record: bytes
    payload: bytes
    personal: bool = True


@dataclass(frozen=True, slots=True)
class LoggedImpression:
    """A slate on its way into the log: whose, when it was served (ms), and all of it as JSON."""

    subject: str
    timestamp: int
    payload: bytes


_New = TypeVar("_New", LoggedEvent, LoggedImpression)


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of one event.

    Attributes:
        log_id: Where it stands in the log, the first one's place for a duplicate; 0 where it was refused.
        duplicate: Whether an event with this id was there.
        record: What to apply to the profile: the first one's record for a duplicate, empty where that is gone.
        error: Why it was refused, None where it is durable.
        personal: Whether the person allows that it enters their profile.
    """

    log_id: int
    duplicate: bool = False
    record: bytes = b""
    error: ServingError | None = None
    personal: bool = True


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a stream.

    Attributes:
        log_id: Its place.
        subject: Key of the person, "" for a mark and for an entry that was deleted meanwhile.
        event_id: The caller's id, "" for an impression.
        record: The bytes of one RECORD, empty for an impression.
        payload: All of it as JSON.
        erased: Keyed hash of who was erased here, empty but for such a mark.
        mark: What changes for a person here, None but for such a mark.
        undone: Log id of an earlier event that counts no more, 0 but for such a mark.
        personal: Whether the event may enter the profile: decided when it came, by what the person allowed then.
    """

    log_id: int
    subject: str = ""
    event_id: str = ""
    record: bytes = b""
    payload: bytes = b""
    erased: bytes = b""
    mark: Mark | None = None
    undone: int = 0
    personal: bool = True

    @classmethod
    def of(cls, stream_id: bytes, found: dict[bytes, bytes]) -> Entry:
        """Reads what Redis says of one."""
        place, mark, undone = log_id(stream_id), None, found.get(b"u", b"")
        if b"k" in found and not undone:
            consent = found.get(b"c", b"")
            allowed, forget = Purpose(int(consent)) if consent else None, found.get(b"f") == b"1"
            mark = Mark(place, found[b"k"], allowed, forget, found.get(b"b"))
        return cls(
            place,
            found.get(b"s", b"").decode(),
            found.get(b"e", b"").decode(),
            found.get(b"r", b""),
            found.get(b"p", b""),
            found.get(b"x", b""),
            mark,
            log_id(undone) if undone else 0,
            b"n" not in found,
        )


def sound(entries: Sequence[Entry]) -> tuple[list[Entry], int]:
    """The entries that are events for a profile, and how many more would be, had their record not been damaged."""
    events = [entry for entry in entries if entry.personal and len(entry.record) == RECORD.itemsize]
    intact = verify(np.frombuffer(b"".join(entry.record for entry in events), RECORD)).tolist()
    return [entry for entry, whole in zip(events, intact, strict=True) if whole], intact.count(False)


@dataclass(frozen=True, slots=True)
class Erased:
    """What an erasure did: everything up to `log_id` is refused from now on, so much was deleted."""

    log_id: int
    events: int
    impressions: int


@dataclass(frozen=True, slots=True)
class PartitionKeys:
    """The keys of one partition; `seen`, `index` and `lease` are continued by whom they are about."""

    events: bytes
    impressions: bytes
    seen: bytes
    index: bytes
    erased: bytes
    floor: bytes
    lease: bytes
    people: bytes
    rules: bytes
    certificates: bytes
    purging: bytes
    returned: bytes

    @classmethod
    def of(cls, partition: int) -> PartitionKeys:
        """Names them."""
        return cls(*(partition_prefix(partition) + name.encode() for name in cls.__slots__))


class EventLog:
    """The log in one Redis or cluster; any thread may call anything."""

    def __init__(
        self,
        client: Client,
        partitions: int = 16,
        *,
        window_ms: int = 24 * HOUR_MS,
        retention_ms: int = 7 * 24 * HOUR_MS,
        memory_mark: float = 0.9,
        cooldown_s: float = 0.5,
        default: Purpose = EVERY_PURPOSE,
        person_cap: int = PERSON_CAP,
    ) -> None:
        """Takes a client of `redis_client.connect`; call `open` before anything else.

        Args:
            client: The events Redis.
            partitions: Number of streams, fixed when the log is created.
            window_ms: How long retries are recognised; older events must be refused before they come here.
            retention_ms: How long entries stay that every consumer has read.
            memory_mark: Share of a server's `maxmemory` above which its events are refused; impressions at 5/6 of it.
            cooldown_s: Longest pause between looks at a failed Redis.
            default: What a person allows who has said nothing.
            person_cap: Most events and slates of one person that the log holds at a time; more events are refused.
        """
        self._person_cap = person_cap
        self.default = default
        self.partitions = partitions
        self.window_ms = window_ms
        self.client = client
        self._retention_ms = retention_ms
        self._mark = memory_mark
        self.nodes = Nodes(client, EventLogUnavailable, cooldown_s, _refusal)
        self.keys = [PartitionKeys.of(partition) for partition in range(partitions)]
        self._salt = b""
        self._memory = [_Memory(0.0, -_MEMORY_KNOWN_S)] * partitions

    def open(self) -> None:
        """Creates the log or checks that it is ours; done again by whoever finds it not done, so it may fail at start.

        Raises:
            ConfigError: The log has another number of partitions.
            EventLogUnavailable: Redis does not answer.
        """
        require_partitions(self.nodes, self.partitions)
        # Tombstones hold a keyed hash: the name of who was erased must not survive in them.
        self._salt = remembered(self.nodes, "salt", os.urandom(16).hex())

    def append(self, events: Sequence[LoggedEvent]) -> list[Appended]:
        """Appends events in their order, in one round trip; each that is answered without error is on disk.

        What serves no purpose that the person allows is refused; what may not enter the profile is marked so. Of a
        cluster, one server may be away or full: its events bear that error, the others are in.

        Raises:
            EventLogUnavailable: Redis does not answer; any of them may be durable, a retry is safe.
            ResourceExhausted: The log is full; nothing was appended.
        """
        replies = self._with_room(events, self._event_call, self._mark)
        return [_appended(event, reply) for event, reply in zip(events, replies, strict=True)]

    def append_impressions(self, impressions: Sequence[LoggedImpression]) -> int:
        """Appends slates in one round trip; returns how many, less those of an erased past or without consent.

        Raises:
            EventLogUnavailable: Redis does not answer.
            ResourceExhausted: The log is nearly full; the rest of it is kept for events.
        """
        replies = self._with_room(impressions, self._impression_call, self._mark * 5 / 6)
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

    def read_impressions(self, partition: int, after: int = 0, count: int = 1000) -> list[Entry]:
        """The impressions of a partition behind a log id, as `read`.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return self._range(self.keys[partition].impressions, after, count)

    def erase(self, subject: str) -> Erased:
        """Deletes the person's events and impressions, and refuses everything of theirs from before this moment.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        retries = self._retries_of(subject)
        erased = self._rid_of(subject, *self.nodes.run(self._erasure(subject, 1)))
        self._forget_retries(retries, erased.log_id >> SEQUENCE_BITS)
        return erased

    def newest_of(self, subject: str) -> bytes:
        """What tells whether the log has got anything more of a person; nothing where it holds nothing.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return self.nodes.command("LINDEX", self.index_of(subject), -1) or b""

    def begin_anew(self, subject: str, newest: bytes) -> Erased | None:
        """Deletes the person's events and impressions; what comes then is the first of a new history, however old.

        Args:
            subject: The person.
            newest: What `newest_of` said.

        Returns:
            None where something has come since, and nothing was deleted.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        reply = self.nodes.run(self._erasure(subject, 0, newest))
        return self._rid_of(subject, *reply) if reply else None

    def erase_again(self, partition: int, person: bytes, address: bytes) -> Erased:
        """`erase` for somebody whose name only a log of before could tell, and does not: their mark is made anew.

        Args:
            partition: Theirs.
            person: The keyed hash that `erase` remembered.
            address: As `redis_client.address_of` says.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        keys = self.keys[partition]
        streams = (keys.events, keys.impressions, keys.index + b":", keys.erased, keys.people, keys.rules)
        # By the keyed hash, and by the address for a log that has another key.
        replies = [self.nodes.run(Call(EVENT_ERASE, streams, (person, address, refuse))) for refuse in (1, 0)]
        return Erased(log_id(replies[-1][0]), 0, 0)

    def lacks(self, partition: int, persons: Sequence[tuple[bytes, int]]) -> list[bool]:
        """For each person (keyed hash, log id of an erasure) whether the log does not know that erasure.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        found = required(self.nodes.run_all([("HGET", self.keys[partition].erased, person) for person, _ in persons]))
        return [int(at or 0) < place >> SEQUENCE_BITS for (_, place), at in zip(persons, found, strict=True)]

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
            Call(PERSON_RETURN, (self.keys[partition].returned, self.keys[partition].erased), (HOUR_MS, *words))
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

    def names(self, partition: int, addresses: Collection[bytes]) -> dict[bytes, str]:
        """Whom the streams of a partition name among the people of some addresses; reads all of it.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        found: dict[bytes, str] = {}
        for stream in (self.keys[partition].events, self.keys[partition].impressions):
            after = 0
            while entries := self._range(stream, after, _PIECE):
                after = entries[-1].log_id
                named = {entry.subject for entry in entries if entry.subject} - set(found.values())
                found |= {address_of(subject): subject for subject in named if address_of(subject) in addresses}
        return found

    def erased(self, subjects: Sequence[str]) -> list[int]:
        """For each person the time, in ms, up to which whatever they did is refused; 0 where they were not erased.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        wanted: list[Request] = [("HGET", self.keys_of(subject).erased, self.person(subject)) for subject in subjects]
        return [int(found or 0) for found in required(self.nodes.run_all(wanted))]

    def person(self, subject: str) -> bytes:
        """The keyed hash under which an erasure is remembered; 16 bytes.

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

    def history(self, subject: str, *, impressions: bool = False, after: int = 0) -> Iterator[list[Entry]]:
        """The events that the log holds of a person, or their impressions, in log order and in pieces.

        Args:
            subject: The person.
            impressions: Whether these are wanted.
            after: Log id behind which to begin.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        keys = self.keys_of(subject)
        stream, wanted = (keys.impressions, b"i") if impressions else (keys.events, b"e")
        noted = self.nodes.command("LRANGE", self.index_of(subject), 0, -1)
        before = self._indexed_since(self.now_ms(partition_of(subject, self.partitions)) << SEQUENCE_BITS)
        for entries in self._unindexed(stream, before):
            yield [entry for entry in entries if entry.subject == subject and entry.log_id > after]
        oldest = max(before, after + 1)
        names = [name[1:] for name in noted if name[:1] == wanted and log_id(name[1:]) >= oldest]
        for start in range(0, len(names), _PIECE):
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
        """Deletes what is past retention and was acknowledged by every group of both streams.

        Returns the number of events deleted.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        keys = self.keys[partition]
        limit = self.now_ms(partition) - self._retention_ms
        for stream in (keys.events, keys.impressions):
            for group in self.groups(stream):
                limit = min(limit, self._needed_from(stream, group, limit))
        trim = Call(LOG_TRIM, (keys.events, keys.impressions, keys.floor), (max(limit, 0),))
        return int(self.nodes.run(trim))

    def groups(self, stream: bytes) -> list[dict[str, Any]]:
        """What XINFO GROUPS says of a stream; nothing of one that is not there.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return list(self.nodes.command("XINFO GROUPS", stream)) if self.nodes.command("EXISTS", stream) else []

    def _needed_from(self, stream: bytes, group: dict[str, Any], otherwise: int) -> int:
        """Time in ms of the oldest entry that a group still needs; `otherwise` where it has read and done all."""
        pending = self.nodes.command("XPENDING", stream, group["name"])
        oldest: bytes = pending["min"] if pending["pending"] else group["last-delivered-id"]
        if not pending["pending"] and not self.nodes.command("XRANGE", stream, b"(" + oldest, "+", "COUNT", 1):
            # An idle stream must not hold back the other one.
            return otherwise
        return int(oldest.partition(b"-")[0])

    def _event_call(self, partition: int, events: Sequence[LoggedEvent]) -> Call:
        keys, now = self.keys[partition], time.time_ns() // 1_000_000
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
                # As long as a retry can be taken: an event that is ahead of the clock is taken for longer.
                self.window_ms + max(0, timestamp - now),
                address_of(event.subject),
                int(event.personal),
            )
        common = (2 * self._retention_ms, int(self.default), self._person_cap)
        return Call(EVENT_APPEND, (keys.events, keys.erased, keys.floor, keys.people, *names), (*common, *words))

    def seen_of(self, subject: str, event_id: str) -> bytes:
        """The key that holds the place of an event in the log, for as long as a retry of it can be taken."""
        return self.keys_of(subject).seen + _seen(subject.encode(), event_id)

    def _impression_call(self, partition: int, impressions: Sequence[LoggedImpression]) -> Call:
        keys = self.keys[partition]
        names = [keys.index + b":" + one.subject.encode() for one in impressions]
        words = [
            word
            for one in impressions
            for word in (self.person(one.subject), one.timestamp, one.subject, one.payload, address_of(one.subject))
        ]
        common = (2 * self._retention_ms, int(self.default))
        return Call(
            IMPRESSION_APPEND, (keys.impressions, keys.erased, keys.floor, keys.people, *names), (*common, *words)
        )

    def _with_room(self, new: Sequence[_New], call: Callable[[int, Sequence[_New]], Call], mark: float) -> list[Any]:
        """Sends what is new to the servers that have memory for it; what came of each, or the error that kept it away.

        Raises:
            EventLogUnavailable: None of them answers.
            ResourceExhausted: None of them has memory.
        """
        replies: list[Any] = [None] * len(new)
        places: dict[int, list[int]] = {}
        for place, one in enumerate(new):
            places.setdefault(partition_of(one.subject, self.partitions), []).append(place)
        self._look([partition for partition in places if self._memory[partition].unknown(mark)])
        for partition in [partition for partition in places if self._memory[partition].share > mark]:
            refused = _full(self._memory[partition].share, mark)
            for place in places.pop(partition):
                replies[place] = refused
        if new and not places:
            raise replies[0]
        pieces = [
            (partition, own[start : start + _TOGETHER])
            for partition, own in places.items()
            for start in range(0, len(own), _TOGETHER)
        ]
        # News of the memory come with what is sent: nothing waits for them.
        stale = [partition for partition in places if self._memory[partition].age > _MEMORY_CHECK_S]
        found = self._look(stale, [call(partition, [new[place] for place in own]) for partition, own in pieces])
        for (_, own), answer in zip(pieces, found, strict=True):
            answers = [answer] * len(own) if isinstance(answer, PenchantError) else answer
            for place, reply in zip(own, answers, strict=True):
                replies[place] = reply
        return replies

    def _look(self, partitions: Collection[int], beside: Sequence[Call] = ()) -> list[Any]:
        """Learns how much memory the servers of some partitions use; returns the replies to what is asked beside that.

        Raises:
            EventLogUnavailable: None of them answers.
        """
        asked: list[Request] = [*beside, *[(b"INFO", b"memory")] * len(partitions)]
        keys = [call.keys[0] for call in beside] + [self.keys[partition].events for partition in partitions]
        replies = self.nodes.run_all(asked, keys)
        for partition, reply in zip(partitions, replies[len(beside) :], strict=True):
            share = 0.0 if isinstance(reply, Unavailable) else _memory_used(required([reply])[0])
            self._memory[partition] = _Memory(share, time.monotonic())
        return replies[: len(beside)]

    def _range(self, stream: bytes, after: int, count: int) -> list[Entry]:
        found = self.nodes.command("XRANGE", stream, b"(" + stream_id(after), "+", "COUNT", count)
        return [Entry.of(name, fields) for name, fields in found]

    def _indexed_since(self, now: int) -> int:
        """The index of somebody away for long has expired; what is older than this is looked for one by one."""
        return now - (2 * self._retention_ms << SEQUENCE_BITS)

    def _unindexed(self, stream: bytes, before: int) -> Iterator[list[Entry]]:
        after = 0
        while entries := [entry for entry in self._range(stream, after, _PIECE) if entry.log_id < before]:
            yield entries
            after = entries[-1].log_id

    def _erasure(self, subject: str, *how: int | bytes) -> Call:
        keys = self.keys_of(subject)
        names = (keys.events, keys.impressions, self.index_of(subject), keys.erased, keys.people, keys.rules)
        return Call(EVENT_ERASE, names, (self.person(subject), address_of(subject), *how))

    def _rid_of(self, subject: str, marker: bytes, events: int, impressions: int) -> Erased:
        """Deletes what no index tells of as well."""
        keys = self.keys_of(subject)
        before = self._indexed_since(log_id(marker))
        deleted = [self._delete(stream, subject, before) for stream in (keys.events, keys.impressions)]
        self.nodes.command("SREM", keys.returned, subject)
        return Erased(log_id(marker), events + deleted[0], impressions + deleted[1])

    def _retries_of(self, subject: str) -> dict[bytes, int]:
        """The keys by which retries of a person's events are recognised, each with the time of the event, ms."""
        return {
            self.seen_of(subject, entry.event_id): int(np.frombuffer(entry.record, RECORD)["timestamp"][0])
            for entries in self.history(subject)
            for entry in entries
            if len(entry.record) == RECORD.itemsize
        }

    def _forget_retries(self, retries: Mapping[bytes, int], erased_at: int) -> None:
        """Deletes the keys by which retries of erased events were recognised.

        The erasure refuses those now, but for an event that was ahead of the clock: its key goes when its time is over,
        and so does that of one that came while it was erased, and all of them where a crash comes between.
        """
        names = [name for name, timestamp in retries.items() if timestamp <= erased_at]
        for start in range(0, len(names), _PIECE):
            self.nodes.command("DEL", *names[start : start + _PIECE])

    def _delete(self, stream: bytes, subject: str, before: int) -> int:
        deleted = 0
        for entries in self._unindexed(stream, before):
            own = [stream_id(entry.log_id) for entry in entries if entry.subject == subject]
            if own:
                deleted += int(self.nodes.command("XDEL", stream, *own))
        return deleted


def _refusal(error: ResponseError) -> ServingError:
    if str(error).startswith("NOGROUP"):
        return LogReplaced("this log is a new one; open it again")
    return serving_error(error, EventLogUnavailable)


def _clock(node: redis.Redis) -> int:
    seconds, microseconds = node.time()
    return int(seconds) * 1000 + int(microseconds) // 1000


class _Memory(NamedTuple):
    """The share of its memory that a server used, and when that was found out."""

    share: float
    at: float

    @property
    def age(self) -> float:
        """Seconds since it was found out."""
        return time.monotonic() - self.at

    def unknown(self, mark: float) -> bool:
        """Whether this is too old to go by; what is refused for it is refused for what is so now."""
        return self.age > (_MEMORY_CHECK_S / 4 if self.share > mark else _MEMORY_KNOWN_S)


def _memory_used(said: bytes) -> float:
    """The share of its memory that a server uses, by what INFO says; 0 where it may use any."""
    numbers = dict(re.findall(rb"^(used_memory|maxmemory):(\d+)", said, re.MULTILINE))
    used, most = int(numbers[b"used_memory"]), int(numbers[b"maxmemory"])
    return used / most if most else 0.0


def _seen(subject: bytes, event_id: str) -> bytes:
    """What the key continues with that says that an event is there."""
    # A hash, not the ids: `a:` + `b` and `a` + `:b` must differ, and a key per event should be short.
    name = len(subject).to_bytes(4, "little") + subject + event_id.encode()
    return b":" + hashlib.blake2b(name, digest_size=16).digest()


def _full(share: float, mark: float) -> ResourceExhausted:
    return ResourceExhausted(
        f"the event log uses {share:.0%} of its memory and takes no more above {mark:.0%}; "
        "look whether its consumers run, or raise maxmemory",
        retry_after_ms=1000,
    )


def _appended(event: LoggedEvent, reply: Any) -> Appended:
    if isinstance(reply, ServingError):
        return Appended(0, error=reply)
    if reply[0] == 0:
        return Appended(log_id(reply[1]), False, event.record, personal=bool(reply[2]))
    if reply[0] == 1:
        return Appended(log_id(reply[1]), True, reply[2], personal=bool(reply[3]))
    if reply[0] == 5:
        return Appended(0, error=serving_error(reply_error(reply[1].decode()), EventLogUnavailable))
    if reply[0] == 4:
        reason = "the log holds more of this person than of anybody who is one; is it a bot? Raise person_cap if not"
        return Appended(0, error=ResourceExhausted(reason, field="subject", retry_after_ms=HOUR_MS))
    if reply[0] == 3:
        return Appended(0, error=ConsentWithheld("this person allows none of its purposes: the event was not stored"))
    return Appended(0, error=FailedPrecondition("this person was erased after the time of this event; do not send it"))
