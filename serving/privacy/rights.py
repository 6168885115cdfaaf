"""The rights of a user: consent, controls, erasure, a copy of everything, one identity, a fresh start.

The log is written first, always: it refuses what it was told to refuse, and whatever fails afterwards the projector
does later, because each request stands among the events as a mark.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from features.clock import now_ms
from features.errors import ProfileCorrupt
from features.profile import Profile, Purpose, Retention, StoredProfile, refold
from features.records import ENTRY
from features.subjects import is_anonymous, partition_of
from serving.errors import ConfigError, ConsentWithheld, NotFound, Unavailable
from serving.folder_identity import HOST, read_identity
from serving.privacy.certificates import Certificate, Certificates
from serving.privacy.controls import SharedArm, StoredControl, UserAttribute, UserControl
from serving.privacy.ledger import Erasure, Ledger, new_certificate_id
from serving.privacy.marks import MarkWriter
from serving.privacy.merge import IdentityMerge, MergeResult
from serving.stores.event_log import EventLog
from serving.stores.keys import address_of
from serving.stores.log_entries import sound
from serving.stores.log_erasure import LogErasure
from serving.stores.profiles import ProfileStore
from serving.stores.restore_requests import RestoreRequests
from serving.stores.user_statements import Consent, UserStatements

Document = tuple[str, int, bytes]
"""One thing that the log holds of a user: "event" or "impression", its log id, and all of it as JSON."""

_KINDS = ("event", "impression")


class SubjectRights:
    """Does what users ask for, in the log and in the profiles; any thread may call anything."""

    def __init__(
        self,
        log: EventLog,
        store: ProfileStore,
        certificates: Certificates,
        retention: Retention | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """Takes the stores.

        Args:
            log: The event log.
            store: The profiles, with a timeout that suits writing.
            certificates: The certificates of erasure.
            retention: How long events stay in a profile that is folded from the log.
            ledger: The file outside the stores in which erasures are noted.
        """
        self._log, self._store, self._certificates, self._ledger = log, store, certificates, ledger
        self._marks, self._log_erasure = MarkWriter(log, store), LogErasure(log)
        self._retention = retention or Retention({})

    def consents(self, subjects: Sequence[str]) -> list[Consent]:
        """Reads the consent of users; the one place to ask before data is used for training or for measuring.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return UserStatements(self._log).consents(subjects)

    def set_consent(self, subject: str, purposes: Purpose) -> tuple[int, bool]:
        """Sets what a user allows; without PERSONALISE their profile is emptied, and stays empty.

        Returns:
            The log id from which it holds, and True if the profile has it already.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        withheld = Purpose.PERSONALISE not in purposes
        # Without MEASURE no arms are compared by this user's data, and nothing may be kept for that.
        kept = self._shared_arm(subject) if Purpose.MEASURE in purposes else []
        return self._marks.write(subject, purposes=purposes, forget=withheld, controls=kept if withheld else None)

    def controls(self, subject: str) -> tuple[list[UserControl], int]:
        """Reads the controls of a user, and the log id at which they were set, 0 if they never were.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        stored, set_at = self._marks.stored_controls(subject)
        controls = [control for control in stored if isinstance(control, UserControl)]
        # A shared arm or attributes alone were not set by the user.
        return controls, set_at if controls or not stored else 0

    def set_controls(self, subject: str, controls: Sequence[UserControl]) -> tuple[int, bool]:
        """Sets all controls of a user. Returns as `set_consent`.

        Raises:
            ConsentWithheld: The user allows no personal answers, so none of this may be kept.
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        [consent] = self.consents([subject])
        if controls and Purpose.PERSONALISE not in consent.purposes:
            raise ConsentWithheld(
                "this user allows no personal answers, so their controls are not kept; set their consent first"
            )
        return self._marks.write(subject, controls=[*controls, *self._others(subject, UserControl)])

    def attributes(self, subject: str) -> dict[str, str]:
        """Reads the attributes that the product told of a user.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        stored, _ = self._marks.stored_controls(subject)
        return {control.name: control.text for control in stored if isinstance(control, UserAttribute)}

    def set_attributes(self, subject: str, attributes: Mapping[str, str]) -> tuple[int, bool]:
        """Sets all attributes of a user. Returns as `set_consent`.

        Raises:
            ConsentWithheld: The user allows no personal answers, so none of this may be kept.
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        [consent] = self.consents([subject])
        if attributes and Purpose.PERSONALISE not in consent.purposes:
            raise ConsentWithheld(
                "this user allows no personal answers, so their attributes are not kept; set their consent first"
            )
        # Sorted, so that the same attributes are the same bytes whatever order a map comes in.
        new = [UserAttribute(name, text) for name, text in sorted(attributes.items())]
        return self._marks.write(subject, controls=[*self._others(subject, UserAttribute), *new])

    def reset(self, subject: str) -> tuple[int, bool]:
        """Empties a user's profile: what they did until now shapes no answer any more. Returns as `set_consent`.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        return self._marks.write(subject, forget=True)

    def undo(self, subject: str, event_id: str, deadline: float = math.inf) -> int:
        """Undoes an event: folds the profile again without it, then deletes it from the log.

        Args:
            subject: The user.
            event_id: The event.
            deadline: When to give up, with nothing changed, on the clock of `time.monotonic`, s.

        Returns:
            The version of the profile afterwards, 0 if there is none.

        Raises:
            NotFound: The log holds no such event of this user, or did not get it within `log_hours`.
            DeadlineExceeded: The log holds too much of this user to fold a profile from it in time.
            Unavailable: A Redis does not answer, or the profile is being restored; a repeat is safe.
            ProfileCorrupt: The stored profile is damaged; nothing was undone.
        """
        entry = self._log.event_of(subject, event_id)
        if entry is None:
            raise NotFound("the log holds no such event of this user; older ones cannot be undone", field="event_id")
        # The profile first: a repeat after a crash finds the event still in the log, and undoes it there.
        profile = self.refold(subject, frozenset((entry.log_id,)), deadline)
        LogErasure(self._log).undo(subject, entry.log_id)
        return profile.version if profile else 0

    def refold(self, subject: str, undone: frozenset[int] = frozenset(), deadline: float = math.inf) -> Profile | None:
        """Folds a profile again from what the log holds, less what is undone and what is past its retention.

        Returns:
            The new profile; None for a user who has none.

        Raises:
            Unavailable: A Redis does not answer, or the profile is being restored; a repeat is safe.
            ProfileCorrupt: The stored profile is damaged.
        """
        now = now_ms()

        def fold_again(stored: StoredProfile) -> Profile:
            if stored.evicted:  # what the log still holds is not all of the user's past
                RestoreRequests(self._log).add({subject: now})
                raise Unavailable("the evicted profile of this user is being restored; try again", retry_after_ms=1000)
            logged = self._logged_entries(subject, stored.erased_before, deadline)
            return refold(stored, logged, undone, lambda records: self._retention.expired(records, now))

        return self._store.replace(subject, fold_again)

    def merge(self, anonymous: str, user: str) -> MergeResult:
        """Moves what an anonymous user did to a known user; see `IdentityMerge.run`.

        Args:
            anonymous: Key of the anonymous user, who starts afresh in the arm of the known one.
            user: Key of the known user.
        """
        return IdentityMerge(self._log, self._store, anonymous, user).run()

    def erase(self, subject: str) -> Certificate:
        """Erases a user from every store: the log first, so that nothing can be replayed into the profile.

        Returns:
            The certificate: how much was erased when. The bytes leave the disks later, and it will tell when.

        Raises:
            Unavailable: A Redis does not answer; a repeat is safe.
        """
        # Counted first: the projector empties the profile as soon as the mark is in the log.
        events_before = self._profile_count(subject)
        erased = self._log_erasure.erase(subject)
        # The projector, which reads the mark of the erasure in the log, may have been quicker.
        forgotten = max(self._store.erase(subject, erased.log_id), events_before)
        counts = {"profiles": forgotten, "events": erased.events, "impressions": erased.impressions}
        certificate_id = new_certificate_id(partition_of(subject, self._log.partitions))
        erasure = Erasure(certificate_id, self._log.subject_hash(subject), address_of(subject), erased.log_id)
        certificate = self._certificates.issue(erasure, counts, self._store.store_id())
        if self._ledger:
            self._ledger.note(erasure)
            self._confirm_ledger(self._ledger, certificate)
        return certificate

    def documents(
        self, subject: str, kind: str = "event", after: int = 0, deadline: float = math.inf
    ) -> Iterator[Document]:
        """Yields everything that the log holds of a user: first the events, then the impressions, each in log order.

        Args:
            subject: The user.
            kind: ControlKind to begin with.
            after: Log id of that kind behind which to begin.
            deadline: When to give up, on the clock of `time.monotonic`, s.

        Raises:
            EventLogUnavailable: Redis does not answer.
            DeadlineExceeded: There is more than could be read in time.
        """
        for name in _KINDS[_KINDS.index(kind) :]:
            impressions = name == "impression"
            for entries in self._log.history(subject, impressions=impressions, after=after, deadline=deadline):
                for entry in entries:
                    yield name, entry.log_id, entry.payload
            # The place in one kind says nothing of the next.
            after = 0

    def _confirm_ledger(self, ledger: Ledger, certificate: Certificate) -> None:
        """Confirms for the ledger of this host; if its identity cannot be read now, `HostKeeper` confirms later."""
        with contextlib.suppress(ConfigError):
            if host := read_identity(ledger.path.parent / HOST):
                self._certificates.confirm_copy(certificate, host.copy_id)

    def _profile_count(self, subject: str) -> int:
        """Returns the number of events in a profile; 0 if it is damaged."""
        try:
            return self._store.read(subject).count
        except ProfileCorrupt:
            return 0

    def _others(self, subject: str, kind: Any) -> list[StoredControl]:
        """Returns what is stored of a user and not of a kind; a shared arm of anonymous users only."""
        stored, _ = self._marks.stored_controls(subject)
        kept = [control for control in stored if not isinstance(control, kind)]
        return kept if is_anonymous(subject) else [one for one in kept if not isinstance(one, SharedArm)]

    def _shared_arm(self, subject: str) -> list[SharedArm]:
        """Returns the shared arm, which outlives the controls that the user sets; none for a user who shares none."""
        if not is_anonymous(subject):
            return []
        stored, _ = self._marks.stored_controls(subject)
        return [control for control in stored if isinstance(control, SharedArm)]

    def _logged_entries(self, subject: str, after: int, deadline: float) -> npt.NDArray[np.void]:
        """Returns what the log holds of a user that belongs into the profile; ENTRY [n]."""
        entries = [
            entry.log_id.to_bytes(8, "big") + entry.record
            for logged in self._log.history(subject, after=after, deadline=deadline)
            for entry in sound(logged)[0]
        ]
        return np.frombuffer(b"".join(entries), ENTRY)
