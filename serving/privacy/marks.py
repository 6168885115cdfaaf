"""Marks: entries of the log that change what may be known of a user, and their way into profiles.

A mark is written to the log first, always: from then on the log refuses what the mark forbids, and whatever fails
afterwards the projector does later, because the mark stands among the events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from features.profile import Purpose
from features.subjects import partition_of
from serving.errors import Unavailable
from serving.privacy.controls import StoredControl, parse_controls, to_log, to_profile
from serving.stores.event_log import EventLog
from serving.stores.keys import address_of
from serving.stores.log_entries import Mark
from serving.stores.profile_repair import Repairs
from serving.stores.profiles import ProfileStore
from serving.stores.user_statements import UserStatements


class MarkWriter:
    """Writes marks to the log, and at once to the profile if its store answers."""

    def __init__(self, log: EventLog, store: ProfileStore) -> None:
        """Takes the stores."""
        self._log, self._store, self._statements = log, store, UserStatements(log)

    def write(
        self,
        subject: str,
        *,
        purposes: Purpose | None = None,
        forget: bool = False,
        controls: Sequence[StoredControl] | None = None,
    ) -> tuple[int, bool]:
        """Writes a mark.

        Args:
            subject: The user.
            purposes: Purposes that the user allows from now on; None leaves them as they are.
            forget: Empty the profile.
            controls: All controls of the user; None leaves them as they are.

        Returns:
            The log id of the mark, and True if the profile has it already.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        stored = None if controls is None else (to_profile(controls), to_log(controls))
        mark = self._statements.state(subject, purposes, forget=forget, controls=stored)
        return mark.log_id, self._apply(subject, mark)

    def stored_controls(self, subject: str) -> tuple[list[StoredControl], int]:
        """Reads the controls of a user with the shared arm, and the log id at which they were set, 0 if never.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        stated = self._statements.controls(subject)
        return (parse_controls(stated.words), stated.set_at) if stated else ([], 0)

    def _apply(self, subject: str, mark: Mark) -> bool:
        """Brings a mark into the profile; returns False if its store does not answer."""
        partition = partition_of(subject, self._log.partitions)
        try:
            self._store.mark(partition, mark)
            # A damaged profile would refuse the mark silently, and the next answer would not obey it.
            if not mark.forget and Repairs(self._store).damaged([subject]):
                Repairs(self._store).set_aside(subject)
                self._store.mark_many([(partition, earlier) for earlier in self._marks_of(subject)])
        except Unavailable:
            return False
        return True

    def _marks_of(self, subject: str) -> list[Mark]:
        """Returns all that the log knows the user to have set, for a profile that has lost it."""
        address, [consent] = address_of(subject), self._statements.consents([subject])
        marks = [Mark(consent.forgotten, address, forget=True)] if consent.forgotten else []
        if consent.set_at:
            marks.append(Mark(consent.set_at, address, consent.purposes))
        controls, set_at = self.stored_controls(subject)
        return [*marks, Mark(set_at, address, controls=to_profile(controls))] if set_at else marks


def marks_of_log(log: EventLog) -> Iterator[tuple[int, Mark]]:
    """Yields what every user has set, as marks with their partitions.

    Profiles that were lost learn from it again what they may not hold.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    statements = UserStatements(log)
    for partition, address, consent in statements.every_consent():
        if consent.forgotten:
            yield partition, Mark(consent.forgotten, address, forget=True)
        if consent.set_at:
            yield partition, Mark(consent.set_at, address, consent.purposes)
    for partition, address, stated in statements.every_control():
        yield partition, Mark(stated.set_at, address, controls=to_profile(parse_controls(stated.words)))
