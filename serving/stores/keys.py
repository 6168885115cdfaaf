"""The names of keys in Redis, the ids that stand in them, and how users are spread over partitions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

META = b"penchant:meta"
"""The hash of what is fixed about a Redis: its number of partitions, its ids, its keys for hashing."""

LIVE = 1 << 40
"""Log ids from here on come from the live log; bulk import counts from 1."""

SEQUENCE_BITS = 20
"""Bits of a log id that count within its millisecond."""


def address_of(subject: str) -> bytes:
    """Returns the 16 bytes under which a user is stored where no name may stand.

    Without a secret: it would have to lie in the very stores that it is to protect, and the profiles must be found with
    nothing but their own Redis.
    """
    return hashlib.blake2b(subject.encode(), digest_size=16, person=b"penchant").digest()


# Keys keep the names that logs were created with; every other key is named as its attribute.
_OLDER_NAMES = {"consents": "people", "controls": "rules", "open_certificates": "purging"}


def partition_prefix(partition: int) -> bytes:
    """Returns the prefix of every key of a partition.

    The braces make the partition one slot of a cluster, whatever an id contains.
    """
    return b"penchant:{p%02d}:" % partition


def log_id(stream_id: bytes) -> int:
    """Returns the log id of a stream id `ms-seq`."""
    milliseconds, _, sequence = stream_id.partition(b"-")
    return int(milliseconds) << SEQUENCE_BITS | int(sequence)


def stream_id(log_id: int) -> bytes:
    """Returns the stream id of a log id."""
    return b"%d-%d" % (log_id >> SEQUENCE_BITS, log_id & ((1 << SEQUENCE_BITS) - 1))


def time_of(log_id: int) -> int:
    """Returns the time, ms, at which a log id was given."""
    return log_id >> SEQUENCE_BITS


@dataclass(frozen=True, slots=True)
class PartitionKeys:
    """The keys of one partition of the event log.

    Attributes:
        events: The stream of events and marks.
        impressions: The stream of slates.
        seen: Prefix of the keys by which retries of events are recognised.
        index: Prefix of the lists of what the streams hold of each user.
        erased: Keyed hash of each erased user -> time, ms, up to which what they did is refused.
        floor: Time, ms, before which neither stream holds anything.
        lease: Prefix of the keys that say who reads for a consumer group.
        consents: Address of each user -> the purposes that they allow.
        controls: Address of each user -> their controls in words.
        certificates: Prefix of the certificates of erasure.
        open_certificates: The certificates that lack a date.
        returned: The evicted users who have returned and wait for their profile.
    """

    events: bytes
    impressions: bytes
    seen: bytes
    index: bytes
    erased: bytes
    floor: bytes
    lease: bytes
    consents: bytes
    controls: bytes
    certificates: bytes
    open_certificates: bytes
    returned: bytes

    @classmethod
    def of(cls, partition: int) -> PartitionKeys:
        """Returns the keys of a partition."""
        names = (_OLDER_NAMES.get(field.name, field.name) for field in fields(cls))
        return cls(*(partition_prefix(partition) + name.encode() for name in names))

    def index_of(self, subject: str) -> bytes:
        """Returns the list of what the streams hold of a user: `e` or `i`, then the id of an event or a slate."""
        return self.index + b":" + subject.encode()

    def seen_of(self, subject: str, event_id: str) -> bytes:
        """Returns the key that holds the place of an event in the log, for as long as a retry of it can be taken."""
        # A hash, not the ids: `a:` + `b` and `a` + `:b` must differ, and a key per event should be short.
        name = subject.encode()
        hashed = len(name).to_bytes(4, "little") + name + event_id.encode()
        return self.seen + b":" + hashlib.blake2b(hashed, digest_size=16).digest()

    def lease_of(self, group: str) -> bytes:
        """Returns the key that says which reader of a consumer group has the partition."""
        return self.lease + b":" + group.encode()
