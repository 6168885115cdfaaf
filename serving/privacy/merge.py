"""The merge of an anonymous user into a known one: the history moves, the anonymous identity starts afresh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from features.clock import now_ms
from features.controls import MAX_ATTRIBUTES, MAX_CONTROLS
from features.errors import PenchantError, ProfileCorrupt
from features.profile import EVERY_PURPOSE, Purpose
from serving.errors import ConsentWithheld, FailedPrecondition, Unavailable
from serving.experiments import seed_of
from serving.privacy.controls import SharedArm, UserAttribute, UserControl, join_controls
from serving.privacy.marks import MarkWriter
from serving.stores.event_log import EventLog
from serving.stores.log_codec import decode, reassigned
from serving.stores.log_entries import Appended, Entry, LoggedEvent, LoggedImpression
from serving.stores.log_erasure import LogErasure
from serving.stores.profiles import ProfileStore
from serving.stores.user_statements import UserStatements

_ATTEMPTS = 30
_PROFILE_FIELDS = frozenset({"profile_version", "features", "encoder_digest"})
"""Fields of a slate that tell of the profile it was made from: the other user's was not the same at that version."""


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The result of a merge.

    Attributes:
        events: Number of events that belong to the known user now, those of an earlier attempt included.
        impressions: Number of slates that do.
        refused: Number of events that the known user's own erasure refuses; they are gone.
        left_behind: Number of events in the anonymous user's profile that the log no longer held; they are forgotten.
        version: Version of the known user's profile that contains all of it; 0 if nothing moved.
        damaged: True if either profile failed its checks: of a damaged anonymous profile `left_behind` is not known,
            and the known user's profile contains what moved once it is rebuilt.
        controls_left_out: Number of the anonymous user's controls for which the known user had no room.
    """

    events: int
    impressions: int
    refused: int
    left_behind: int
    version: int
    damaged: bool = False
    controls_left_out: int = 0


class IdentityMerge:
    """Moves what an anonymous user did, set and saw to a known user."""

    def __init__(self, log: EventLog, store: ProfileStore, anonymous: str, user: str) -> None:
        """Takes the stores and the two users.

        Args:
            log: The event log.
            store: The profiles.
            anonymous: Key of the anonymous user.
            user: Key of the known user.
        """
        self._log, self._store, self._anonymous, self._user = log, store, anonymous, user
        self._marks = MarkWriter(log, store)

    def run(self) -> MergeResult:
        """Moves everything.

        Raises:
            FailedPrecondition: The anonymous user does not allow what the known user does.
            ConsentWithheld: The known user allows nothing to be kept; nothing moved.
            Unavailable: A Redis does not answer; a repeat is safe.
            ResourceExhausted: The log is full; a repeat is safe.
        """
        purposes = self._require_consent()
        anonymous_count, anonymous_damaged = _profile_size(self._store, self._anonymous)
        _, known_damaged = _profile_size(self._store, self._user)
        log_erasure = LogErasure(self._log)
        for _ in range(_ATTEMPTS):
            # Read before the history: whatever comes after it makes `start_afresh` refuse.
            newest = log_erasure.newest_of(self._anonymous)
            result = self._copy(anonymous_count)
            erased = log_erasure.start_afresh(self._anonymous, newest)
            if erased:
                # The log id of the mark: events of before it that are still on their way are refused.
                self._store.erase(self._anonymous, erased.log_id)
                if Purpose.MEASURE in purposes:
                    # One device asks with either id: both get the answers of one arm.
                    self._marks.write(self._anonymous, controls=[SharedArm(seed_of(self._user))])
                return replace(result, damaged=anonymous_damaged or known_damaged)
            # The user has done more meanwhile. What was copied keeps its event ids: a second copy adds nothing.
        raise Unavailable("the anonymous user sends events all the time; repeat the merge", retry_after_ms=1000)

    def _require_consent(self) -> Purpose:
        """Returns what the anonymous user allows, if that is all that the known user allows.

        Raises:
            FailedPrecondition: It is not.
        """
        consents = UserStatements(self._log).consents([self._anonymous, self._user])
        anonymous, user = (consent.purposes for consent in consents)
        missing = Purpose(user & ~int(anonymous) & int(EVERY_PURPOSE))
        if missing:
            raise FailedPrecondition(
                "the anonymous user does not allow all that the known user does; set the consent of the anonymous "
                f"user first: {', '.join(missing.names)}"
            )
        return anonymous

    def _copy(self, anonymous_count: int) -> MergeResult:
        """Gives the known user all that the log holds of the anonymous one."""
        moved = refused = version = 0
        for entries in self._log.history(self._anonymous):
            for appended in self._copy_events(entries):
                if isinstance(appended.error, FailedPrecondition):
                    # The known user erased themselves after this event; it must not come back by a merge.
                    refused += 1
                elif appended.error:
                    raise appended.error
                else:
                    moved, version = moved + 1, max(version, appended.log_id)
        impressions = self._copy_impressions()
        left_behind = max(0, anonymous_count - moved - refused)
        return MergeResult(moved, impressions, refused, left_behind, version, controls_left_out=self._copy_controls())

    def _copy_events(self, entries: Sequence[Entry]) -> list[Appended]:
        """Appends events to the log as the known user's, and applies them to the profile."""
        events = [
            LoggedEvent(self._user, entry.event_id, entry.record, reassigned(entry.payload, self._user), entry.personal)
            for entry in entries
        ]
        results = self._log.append(events)
        # The whole batch is one user's: consent that is missing for one event is missing for all.
        refusal = next((result.error for result in results if isinstance(result.error, ConsentWithheld)), None)
        if refusal:
            raise refusal
        records = [(result.log_id, result.record) for result in results if result.record and result.personal]
        try:
            self._store.apply(self._user, records)
        except PenchantError:  # they are in the log, from which the projector applies them later
            return results
        return results

    def _copy_impressions(self) -> int:
        """Appends slates to the log as the known user's, marked as merged; returns the number of them.

        They were shown in the arm of the anonymous user, so a comparison of arms must be able to tell them apart. What
        an earlier attempt has appended is not appended again: slates have no id by which the log would know them.
        """
        present = {entry.payload for entry in self._impressions(self._user)}
        moved = 0
        for entries in self._log.history(self._anonymous, impressions=True):
            payloads = [reassigned(entry.payload, self._user, _PROFILE_FIELDS, merged=True) for entry in entries]
            self._log.append_impressions(
                [
                    LoggedImpression(self._user, int(decode(payload)["timestamp"]), payload)
                    for payload in payloads
                    if payload not in present
                ]
            )
            moved += len(payloads)
        return moved

    def _impressions(self, subject: str) -> Iterator[Entry]:
        for entries in self._log.history(subject, impressions=True):
            yield from entries

    def _copy_controls(self) -> int:
        """Adds the anonymous user's controls and attributes to the known user's; see `join_controls`.

        Of two attributes of one name the known user's holds.

        A user who allows no personal answers gets none.

        Returns:
            The number of controls that had no room.
        """
        anonymous, user = self._controls(self._anonymous), self._controls(self._user)
        known_attributes = self._attributes(self._user)
        merged = self._attributes(self._anonymous) | known_attributes
        [consent] = UserStatements(self._log).consents([self._user])
        if not (anonymous or merged) or Purpose.PERSONALISE not in consent.purposes:
            return 0
        # The controls of both may be more than a user can have.
        joined = join_controls(user, anonymous, now_ms())
        # The known user's first: where not all have room, those of the device are left out.
        names = sorted(merged, key=lambda name: (name not in known_attributes, name))[:MAX_ATTRIBUTES]
        attributes = [UserAttribute(name, merged[name]) for name in names]
        self._marks.write(self._user, controls=[*joined[:MAX_CONTROLS], *attributes])
        return max(0, len(joined) - MAX_CONTROLS)

    def _attributes(self, subject: str) -> dict[str, str]:
        stored, _ = self._marks.stored_controls(subject)
        return {control.name: control.text for control in stored if isinstance(control, UserAttribute)}

    def _controls(self, subject: str) -> list[UserControl]:
        stored, _ = self._marks.stored_controls(subject)
        return [control for control in stored if isinstance(control, UserControl)]


def _profile_size(store: ProfileStore, subject: str) -> tuple[int, bool]:
    """Returns the number of events in a profile, and True if it is damaged; 0 events then."""
    try:
        return store.read(subject).count, False
    except ProfileCorrupt:
        return 0, True
