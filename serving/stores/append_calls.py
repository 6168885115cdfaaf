"""The calls of the scripts that append to the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from features.clock import now_ms
from features.profile import Purpose
from features.records import RECORD
from serving.redis.connection import Argument, ScriptCall
from serving.stores.keys import PartitionKeys, address_of
from serving.stores.log_entries import LoggedEvent, LoggedImpression
from serving.stores.scripts import EVENT_APPEND, IMPRESSION_APPEND

_TIMESTAMP_AT: int = RECORD.fields["timestamp"][1] if RECORD.fields else 0


@dataclass(frozen=True, slots=True)
class AppendCalls:
    """Makes the calls.

    Attributes:
        keys: The keys of every partition.
        subject_hash: Keyed hash of a subject.
        window_ms: Time for which retries are recognised.
        index_ms: Time for which the index of a user without news stays.
        default: Purposes of users who never said which they allow.
        user_cap: Most events and slates of one user.
    """

    keys: Sequence[PartitionKeys]
    subject_hash: Callable[[str], bytes]
    window_ms: int
    index_ms: int
    default: Purpose
    user_cap: int

    def events(self, partition: int, events: Sequence[LoggedEvent]) -> ScriptCall:
        """Returns the call that appends events of one partition.

        Raises:
            EventLogUnavailable: The key of the hashes is not known yet, and Redis does not answer.
        """
        keys, now = self.keys[partition], now_ms()
        names: list[bytes] = []
        arguments: list[Argument] = []
        for event in events:
            if len(event.record) != RECORD.itemsize:
                raise ValueError(f"a record has {RECORD.itemsize} bytes")
            # Straight from the bytes: numpy takes many times as long for one number.
            timestamp = int.from_bytes(event.record[_TIMESTAMP_AT : _TIMESTAMP_AT + 8], "little", signed=True)
            names += (keys.seen_of(event.subject, event.event_id), keys.index_of(event.subject))
            arguments += (
                self.subject_hash(event.subject),
                timestamp,
                event.subject,
                event.event_id,
                event.record,
                event.payload,
                # As long as a retry can be taken: an event that is ahead of the clock is taken for longer. And as long
                # as the event stays, because an undo finds it by this key.
                max(self.window_ms + max(0, timestamp - now), self.index_ms // 2),
                address_of(event.subject),
                int(event.personal),
            )
        common = (self.index_ms, int(self.default), self.user_cap)
        streams = (keys.events, keys.erased, keys.floor, keys.consents)
        return ScriptCall(EVENT_APPEND, (*streams, *names), (*common, *arguments))

    def impressions(self, partition: int, impressions: Sequence[LoggedImpression]) -> ScriptCall:
        """Returns the call that appends slates of one partition.

        Raises:
            EventLogUnavailable: The key of the hashes is not known yet, and Redis does not answer.
        """
        keys = self.keys[partition]
        names = [keys.index_of(slate.subject) for slate in impressions]
        arguments: list[Argument] = []
        for slate in impressions:
            arguments += (
                self.subject_hash(slate.subject),
                slate.timestamp,
                slate.subject,
                slate.payload,
                address_of(slate.subject),
            )
        common = (self.index_ms, int(self.default))
        streams = (keys.impressions, keys.erased, keys.floor, keys.consents)
        return ScriptCall(IMPRESSION_APPEND, (*streams, *names), (*common, *arguments))
