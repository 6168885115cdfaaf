"""Profiles on Redis: one round trip to read one, one idempotent insert to apply an event.

A profile is one string, laid out in `features/profile_codec.py`: `header | state | controls | tail`. Applying an event
appends it to the tail, unless it is there, is folded already or was erased. Only compaction moves entries from the tail
into the state: folding costs more than appending, and needs every event up to a log id, because events come in any
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from features.errors import PenchantError, ProfileCorrupt
from features.profile import Profile, Purpose, StoredProfile, empty, fold
from features.profile_codec import HEADER_SIZE, decode, encode, encode_consent, is_newer, split
from features.records import ENTRY, RECORD
from features.subjects import PARTITIONS, partition_of
from serving.errors import ProfileStoreUnavailable
from serving.observability.telemetry import Telemetry
from serving.redis.client import Client
from serving.redis.connection import ScriptCall
from serving.redis.router import required
from serving.stores.keys import address_of
from serving.stores.log_entries import Mark
from serving.stores.profile_access import (
    CHUNK,
    NEWER,
    NEWER_PAUSE_MS,
    PATIENT_ATTEMPTS,
    TAIL_CAP,
    ProfileAccess,
    chunks,
)
from serving.stores.profile_header import erased_until, readable_consent, readable_versions, state_end
from serving.stores.scripts import PROFILE_APPLY, PROFILE_COMPACT, PROFILE_MARK, PROFILE_PUT, PROFILE_REPLACE

# Few, because compaction is hardly ever urgent: a profile that changes that often is folded with a later batch.
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Applied:
    """The outcome of applying entries of one user.

    Attributes:
        inserted: Number of new entries; the others were there already or refused.
        refused: Number that belong to an erased past, or to a user who allows no personal answers.
        tail: Number of entries in the tail afterwards.
        evicted: True if the profile is evicted and its state is to be restored.
    """

    inserted: int
    refused: int
    tail: int
    evicted: bool = False


@dataclass(frozen=True, slots=True)
class StatesWritten:
    """The outcome of storing states in bulk.

    Attributes:
        written: Number stored.
        kept: Number not stored, because the user has newer live events or erased their past.
    """

    written: int
    kept: int


Entries = Sequence[tuple[int, bytes]]
"""Events of one user: log id and the bytes of a RECORD."""


class ProfileStore(ProfileAccess):
    """The profiles of all users, in one Redis or cluster; any thread may call anything."""

    def __init__(
        self,
        client: Client,
        partitions: int = PARTITIONS,
        *,
        tail_cap: int = TAIL_CAP,
        cooldown_s: float = 0.5,
        telemetry: Telemetry | None = None,
        guarded: bool = False,
        shared_with: ProfileStore | None = None,
    ) -> None:
        """Takes what `ProfileAccess` takes, and the entries a tail may hold."""
        super().__init__(
            client,
            partitions,
            cooldown_s=cooldown_s,
            telemetry=telemetry,
            guarded=guarded,
            shared_with=shared_with,
        )
        self._tail_cap = tail_cap

    def read(self, subject: str) -> Profile:
        """Returns the profile of a user, with every applied event; the empty one if there is none. One round trip.

        Raises:
            ProfileStoreUnavailable: Redis does not answer in time, or did not a moment ago.
            ProfileCorrupt: The stored profile is damaged or far too large; the user counts as new.
        """
        blob = self.blob(subject)
        if not blob:
            return empty()
        try:
            return decode(blob)
        except ProfileCorrupt:
            self._telemetry.count("profiles_corrupt")
            raise

    def apply(self, subject: str, entries: Entries) -> Applied:
        """Inserts events of one user, in any order; events that are there already are left alone.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; some may have been inserted, a repeat is safe.
            TailFull: The user has too many events that are not folded yet.
            ResourceExhausted: Redis is full.
            ProfileCorrupt: The stored profile is damaged; nothing was inserted.
        """
        return _applied(self.router.run(self._application(subject, entries)))

    def apply_many(self, batch: Sequence[tuple[str, Entries]]) -> list[Applied | PenchantError]:
        """`apply` for many users in one round trip; an error that concerns one user stands in their place.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; some may have been inserted, a repeat is safe.
        """
        replies = self.router.run_all([self._application(subject, entries) for subject, entries in batch])
        return [reply if isinstance(reply, PenchantError) else _applied(reply) for reply in replies]

    def compact(self, subject: str, up_to: int, at_least: int = 1, *, evicted_too: bool = True) -> int:
        """Folds the entries of a tail with log ids up to `up_to` into the state; only the projector may call it.

        Args:
            subject: The user.
            up_to: Log id up to which every event of the user's partition has been applied: none may come late.
            at_least: Number of entries below which it is not worth it.
            evicted_too: True to fold also if the state was evicted and not restored; it never is restored then.

        Returns:
            The number folded; 0 if there are too few, or others kept changing the profile.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
            ProfileCorrupt: The stored profile is damaged.
        """
        for _ in range(_ATTEMPTS):
            blob = self.blob(subject)
            if not blob:
                return 0
            stored = split(blob)
            due = stored.tail[stored.tail["log_id"] <= up_to]
            if due.size < at_least or (stored.evicted and not evicted_too):
                return 0
            # Folded here and not in Redis, which would hold up every other client. So the script checks that header and
            # state are those that were read, the state by its checksum at the end; events that were applied meanwhile
            # are longer ids in the tail and stay there.
            folded = encode(fold(stored.state, due["record"], int(due["log_id"][-1])), *stored.versions)
            end = state_end(blob)
            read = (blob[:HEADER_SIZE], blob[end - 4 : end])
            if self.run(PROFILE_COMPACT, self.key_of(subject), *read, folded, due["log_id"].tobytes()):
                return int(due.size)
        return 0

    def erase(self, subject: str, before: int) -> int:
        """Forgets the user's events up to a log id and refuses them for ever; later ones in the tail stay.

        Returns:
            The number of events forgotten.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        mark = Mark(before, address_of(subject), forget=True, controls=b"")
        return self.mark(partition_of(subject, self.partitions), mark)

    def mark(self, partition: int, mark: Mark) -> int:
        """Brings a mark of the log into a profile; in any order, a repeat is safe.

        Returns:
            The number of events forgotten by it.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        return self.mark_many([(partition, mark)])[0]

    def mark_many(self, marks: Sequence[tuple[int, Mark]]) -> list[int]:
        """`mark` for many, each with its partition, in few round trips.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        forgotten: list[int] = []
        for chunk in chunks(marks, CHUNK):
            calls = [self._marking(partition, mark) for partition, mark in chunk]
            forgotten += map(int, required(self.router.run_all(calls)))
        return forgotten

    def replace(self, subject: str, change: Callable[[StoredProfile], Profile]) -> Profile | None:
        """Replaces a profile by a changed one, with everything folded.

        Args:
            subject: The user.
            change: Makes the new profile of the old one; called again if others changed the old one meanwhile.

        Returns:
            The new profile; None if there was none.

        Raises:
            ProfileStoreUnavailable: Redis does not answer, or the profile keeps changing; a repeat is safe.
            ProfileCorrupt: The stored profile is damaged.
        """
        for _ in range(PATIENT_ATTEMPTS):
            blob = self.blob(subject)
            if not blob:
                return None
            stored = split(blob)
            # The whole value is compared, not a version: events may have been appended without changing the header.
            profile = change(stored)
            if self.run(PROFILE_REPLACE, self.key_of(subject), blob, encode(profile, *stored.versions)):
                return profile
        raise ProfileStoreUnavailable("this profile keeps changing; try again", retry_after_ms=1000)

    def erased_before(self, subjects: Sequence[str]) -> list[int]:
        """Returns for each user the log id up to which events are refused, 0 if nothing was erased.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        return [erased_until(header) for header in self.headers(subjects)]

    def put_states(self, states: Iterable[tuple[str, Profile]]) -> StatesWritten:
        """Stores states made elsewhere, many in a round trip; entries of tails that they do not contain stay.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
            ResourceExhausted: Redis is full.
        """
        written = total = 0
        for chunk in chunks(states, CHUNK):
            calls = [self.call(PROFILE_PUT, self.key_of(subject), encode(profile)) for subject, profile in chunk]
            for (subject, profile), reply in zip(chunk, required(self.router.run_all(calls)), strict=True):
                # Scripts verify no checksums: what this one kept may be damaged.
                written += reply or self.replace_damaged(subject, profile)
            total += len(calls)
        return StatesWritten(written, total - written)

    def replace_damaged(self, subject: str, profile: Profile) -> int:
        """Replaces a stored profile if it is damaged, keeping the consent it states; returns 1 if it was, else 0.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        # The whole value, even a far too large one: the script compares it with what is there.
        blob = self.router.command("GET", self.key_of(subject)) or b""
        if is_newer(blob):
            raise ProfileStoreUnavailable(NEWER, retry_after_ms=NEWER_PAUSE_MS)
        try:
            split(blob)
        except ProfileCorrupt:
            consent = readable_consent(blob)
            allowed = consent is None or Purpose.PERSONALISE in consent
            kept = profile if allowed else replace(empty(), lost=profile.lost)
            new = encode(replace(kept, consent=consent), *readable_versions(blob))
            return int(self.run(PROFILE_REPLACE, self.key_of(subject), blob, new))
        return 0

    def _application(self, subject: str, entries: Entries) -> ScriptCall:
        packed = b"".join(log_id.to_bytes(8, "big") + record for log_id, record in entries)
        if len(packed) != len(entries) * ENTRY.itemsize:
            raise ValueError(f"a record has {RECORD.itemsize} bytes")
        return self.call(PROFILE_APPLY, self.key_of(subject), packed, self._tail_cap)

    def _marking(self, partition: int, mark: Mark) -> ScriptCall:
        consent = b"" if mark.consent is None else encode_consent(mark.consent)
        controls = (0, b"") if mark.controls is None else (1, mark.controls)
        arguments = (mark.log_id.to_bytes(8, "big"), consent, int(mark.forget), *controls)
        return self.call(PROFILE_MARK, self._prefixes[partition] + mark.address, *arguments)


def _applied(reply: Sequence[int]) -> Applied:
    inserted, refused, tail, evicted = reply
    return Applied(inserted, refused, tail, bool(evicted))
