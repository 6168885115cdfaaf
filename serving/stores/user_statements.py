"""The statements of users in the event log: the purposes that they allow, and their controls.

Each statement stands twice: by the address of its user in a hash, which answers at once, and as a mark among the
events, by which consumers meet it in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from features.profile import Purpose
from features.subjects import partition_of
from serving.redis.connection import Request, ScriptCall
from serving.redis.router import required
from serving.stores.event_log import EventLog
from serving.stores.keys import address_of, log_id
from serving.stores.log_entries import Mark
from serving.stores.scripts import USER_MARK


@dataclass(frozen=True, slots=True)
class Consent:
    """The purposes that a user allows.

    Attributes:
        purposes: The purposes for which their data may be used.
        set_at: Log id at which they set them; 0 if they never did and the default holds.
        forgotten: Log id up to which nothing may be in their profile, whatever other stores still hold; 0 for none.
    """

    purposes: Purpose
    set_at: int
    forgotten: int


@dataclass(frozen=True, slots=True)
class StatedControls:
    """The controls of a user as the log holds them.

    Attributes:
        words: The controls, with names instead of keys; opaque here.
        set_at: Log id at which the user set them.
    """

    words: bytes
    set_at: int


class UserStatements:
    """Reads and writes what users have said; any thread may call anything."""

    def __init__(self, log: EventLog) -> None:
        """Takes the log."""
        self._log = log

    def consents(self, subjects: Sequence[str]) -> list[Consent]:
        """Returns the consent of each user, the log's default for users who said nothing.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        requests: list[Request] = [
            ("HGET", self._log.keys_of(subject).consents, address_of(subject)) for subject in subjects
        ]
        return [_consent(value, self._log.default) for value in required(self._log.router.run_all(requests))]

    def controls(self, subject: str) -> StatedControls | None:
        """Returns the controls of a user, None if they never set any.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        value = self._log.router.command("HGET", self._log.keys_of(subject).controls, address_of(subject))
        return None if value is None else _controls(value)

    def state(
        self,
        subject: str,
        purposes: Purpose | None = None,
        *,
        forget: bool = False,
        controls: tuple[bytes, bytes] | None = None,
    ) -> Mark:
        """Writes a statement of a user, durably and even if memory is full; returns its mark.

        Args:
            subject: The user.
            purposes: The purposes allowed from now on; None leaves them as they are.
            forget: True empties the profile of what came before.
            controls: All controls from now on, as profiles hold them and in words; None leaves them as they are.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        # By address: the hashes outlive an erasure, and must not name the user.
        address, keys = address_of(subject), self._log.keys_of(subject)
        consent = b"" if purposes is None else b"%d" % purposes
        call = ScriptCall(
            USER_MARK, (keys.events, keys.consents, keys.controls), (address, consent, int(forget), *(controls or ()))
        )
        encoded = None if controls is None else controls[0]
        return Mark(log_id(self._log.router.run(call)), address, purposes, forget, encoded)

    def partition_of(self, subject: str) -> int:
        """Returns the partition of a user."""
        return partition_of(subject, self._log.partitions)

    def every_consent(self) -> Iterator[tuple[int, bytes, Consent]]:
        """Yields partition, address and consent of every user who said something or was erased.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        for partition, keys in enumerate(self._log.keys):
            for address, value in self._log.router.scan(keys.consents):
                yield partition, address, _consent(value, self._log.default)

    def every_control(self) -> Iterator[tuple[int, bytes, StatedControls]]:
        """Yields partition, address and controls of every user who set some.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        for partition, keys in enumerate(self._log.keys):
            for address, value in self._log.router.scan(keys.controls):
                yield partition, address, _controls(value)


def _consent(value: bytes | None, default: Purpose) -> Consent:
    """Reads `PURPOSES SET-AT FORGOTTEN`; `-` stands for purposes never stated, such as after an erasure."""
    if value is None:
        return Consent(default, 0, 0)
    purposes, set_at, forgotten = value.split()
    return Consent(default if purposes == b"-" else Purpose(int(purposes)), log_id(set_at), log_id(forgotten))


def _controls(value: bytes) -> StatedControls:
    set_at, _, words = value.partition(b" ")
    return StatedControls(words, log_id(set_at))
