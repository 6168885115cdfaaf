"""Erasure in the event log: deletes what the streams hold of a user, and refuses what comes from before."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from features.records import RECORD
from serving.redis.connection import ScriptCall
from serving.redis.router import required
from serving.stores.event_log import EventLog
from serving.stores.keys import address_of, log_id, stream_id, time_of
from serving.stores.log_entries import Erased
from serving.stores.scripts import EVENT_ERASE, EVENT_UNDO

_KEYS_AT_ONCE = 1000


class LogErasure:
    """Erases users from a log; any thread may call anything."""

    def __init__(self, log: EventLog) -> None:
        """Takes the log."""
        self._log = log

    def erase(self, subject: str) -> Erased:
        """Deletes the user's events and impressions, and refuses everything of theirs from before this moment.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        # Read before the script runs: afterwards no entry names their events any more.
        retries = self._retry_keys(subject)
        erased = self._delete_unindexed(subject, *self._log.router.run(self._call(subject, 1)))
        self._forget_retries(retries, time_of(erased.log_id))
        return erased

    def newest_of(self, subject: str) -> bytes:
        """Returns the last entry of the user's index, which changes with every append; empty if the log has nothing.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return self._log.router.command("LINDEX", self._log.keys_of(subject).index_of(subject), -1) or b""

    def start_afresh(self, subject: str, newest: bytes) -> Erased | None:
        """Deletes the user's events and impressions and refuses nothing: later ones begin a new history, however old.

        Args:
            subject: The user.
            newest: The result of `newest_of` before the history was read.

        Returns:
            None if the log has got something since; nothing is deleted then.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        # 0: nothing is refused afterwards, because the user goes on under the same id.
        reply = self._log.router.run(self._call(subject, 0, newest))
        return self._delete_unindexed(subject, *reply) if reply else None

    def undo(self, subject: str, log_id: int) -> None:
        """Deletes one event of a user and writes a mark, so that consumers undo it in order.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        keys = (self._log.keys_of(subject).events, self._log.keys_of(subject).index_of(subject))
        self._log.router.run(ScriptCall(EVENT_UNDO, keys, (stream_id(log_id), address_of(subject))))

    def erase_unnamed(self, partition: int, subject_hash: bytes, address: bytes) -> Erased:
        """Repeats an erasure of a user whose name no entry of the log tells: writes its mark again.

        Args:
            partition: The user's partition.
            subject_hash: The keyed hash that `erase` stored.
            address: As `address_of` returns it.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        keys = self._log.keys[partition]
        streams = (keys.events, keys.impressions, keys.index + b":", keys.erased, keys.consents, keys.controls)
        # By the keyed hash, and by the address for a log that has another key.
        replies = [
            self._log.router.run(ScriptCall(EVENT_ERASE, streams, (subject_hash, address, refuse))) for refuse in (1, 0)
        ]
        return Erased(log_id(replies[-1][0]), 0, 0)

    def lacks(self, partition: int, erasures: Sequence[tuple[bytes, int]]) -> list[bool]:
        """Returns for each erasure, a keyed hash and a log id, True if the log does not know it.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        key = self._log.keys[partition].erased
        times = required(self._log.router.run_all([("HGET", key, subject_hash) for subject_hash, _ in erasures]))
        return [int(at or 0) < time_of(place) for (_, place), at in zip(erasures, times, strict=True)]

    def names(self, partition: int, addresses: Collection[bytes]) -> dict[bytes, str]:
        """Finds the users of some addresses by the names in the streams of a partition; reads all of it.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        names: dict[bytes, str] = {}
        for read in (self._log.read, self._log.read_impressions):
            after = 0
            while entries := read(partition, after):
                after = entries[-1].log_id
                unseen = {entry.subject for entry in entries if entry.subject} - set(names.values())
                names |= {address_of(subject): subject for subject in unseen if address_of(subject) in addresses}
        return names

    def _call(self, subject: str, *how: int | bytes) -> ScriptCall:
        log, keys = self._log, self._log.keys_of(subject)
        names = (keys.events, keys.impressions, keys.index_of(subject), keys.erased, keys.consents, keys.controls)
        return ScriptCall(EVENT_ERASE, names, (log.subject_hash(subject), address_of(subject), *how))

    def _delete_unindexed(self, subject: str, marker: bytes, events: int, impressions: int) -> Erased:
        """Deletes also what is older than the index: the script deletes what the index names."""
        keys = self._log.keys_of(subject)
        before = self._log.indexed_since(log_id(marker))
        deleted = [self._delete(stream, subject, before) for stream in (keys.events, keys.impressions)]
        self._log.router.command("SREM", keys.returned, subject)
        return Erased(log_id(marker), events + deleted[0], impressions + deleted[1])

    def _delete(self, stream: bytes, subject: str, before: int) -> int:
        deleted = 0
        for entries in self._log.unindexed(stream, before):
            names = [stream_id(entry.log_id) for entry in entries if entry.subject == subject]
            if names:
                deleted += int(self._log.router.command("XDEL", stream, *names))
        return deleted

    def _retry_keys(self, subject: str) -> dict[bytes, int]:
        """Returns the keys by which retries of the user's events are recognised, each with the event's time, ms."""
        return {
            self._log.seen_of(subject, entry.event_id): int(np.frombuffer(entry.record, RECORD)["timestamp"][0])
            for entries in self._log.history(subject)
            for entry in entries
            if len(entry.record) == RECORD.itemsize
        }

    def _forget_retries(self, retries: Mapping[bytes, int], erased_at: int) -> None:
        """Deletes the keys by which retries of erased events were recognised.

        The erasure refuses those retries, but for an event that was ahead of the clock: its key expires by itself, and
        so does that of an event that came during the erasure, and all of them if a crash comes between.
        """
        names = [name for name, timestamp in retries.items() if timestamp <= erased_at]
        # In pieces, because the server does nothing else while it deletes.
        for start in range(0, len(names), _KEYS_AT_ONCE):
            self._log.router.command("DEL", *names[start : start + _KEYS_AT_ONCE])
