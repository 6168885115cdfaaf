"""Repair of damaged profiles: each keeps what can still be read of it, and learns the rest from the log again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from features.errors import ProfileCorrupt
from features.profile import empty
from features.subjects import partition_of
from serving.errors import ProfileStoreUnavailable
from serving.redis.router import required
from serving.stores.keys import address_of
from serving.stores.log_entries import Mark
from serving.stores.profile_access import PATIENT_ATTEMPTS
from serving.stores.profile_header import is_damaged, without_damage
from serving.stores.profiles import ProfileStore
from serving.stores.scripts import PROFILE_REPLACE


class Repairs:
    """Repairs profiles of one store; any thread may call anything."""

    def __init__(self, store: ProfileStore) -> None:
        """Takes the store."""
        self._store = store

    def damaged(self, subjects: Sequence[str]) -> list[str]:
        """Returns the users whose profile cannot be read, or has lost its past.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        replies = self._store.blobs(subjects)
        # A key that holds no string at all is a refusal by Redis, and a damaged profile here.
        broken = [isinstance(reply, ProfileCorrupt) for reply in replies]
        required([reply for reply, is_broken in zip(replies, broken, strict=True) if not is_broken])
        return [
            subject
            for subject, is_broken, blob in zip(subjects, broken, replies, strict=True)
            if is_broken or (blob and is_damaged(blob))
        ]

    def set_aside(self, subject: str) -> bool:
        """Replaces a damaged profile by one whose past is lost, so that what the user sets next holds.

        The new one keeps the consent that the damaged header states, and the log id up to which it forgets.

        Returns:
            True if it was damaged.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        return bool(self._store.replace_damaged(subject, replace(empty(), lost=True)))

    def salvage(self, subject: str) -> None:
        """Reduces a damaged profile to what can be read and has lost nothing, so that the rest can be applied again.

        That is its state, or else nothing but consent; the marks of the log bring back what else the user set.

        Raises:
            ProfileStoreUnavailable: Redis does not answer, or the profile keeps changing; a repeat is safe.
        """
        # An empty mark: a value that is no profile at all gives way to a profile whose past is lost.
        self._store.mark(partition_of(subject, self._store.partitions), Mark(0, address_of(subject)))
        key = self._store.key_of(subject)
        for _ in range(PATIENT_ATTEMPTS):
            blob = self._store.blob(subject)
            if self._store.run(PROFILE_REPLACE, key, blob, without_damage(blob)):
                return
        raise ProfileStoreUnavailable("this profile keeps changing; try again", retry_after_ms=1000)
