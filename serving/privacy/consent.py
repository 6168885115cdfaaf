"""Consent: the purposes for which a user's data may be used, as the log holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from features.profile import Purpose
from serving.redis.client import Request
from serving.redis.router import required
from serving.stores.event_log import EventLog
from serving.stores.keys import address_of, log_id


@dataclass(frozen=True, slots=True)
class Consent:
    """The consent of a user.

    Attributes:
        purposes: Purposes for which their data may be used.
        set_at: Log id at which they set them; 0 if they never did and the default holds.
        forgotten: Log id up to which nothing may be in their profile, whatever other stores still hold; 0 for none.
    """

    purposes: Purpose
    set_at: int
    forgotten: int


def read_consents(log: EventLog, subjects: Sequence[str]) -> list[Consent]:
    """Reads the consent of users; the log's default for users who never set theirs.

    Args:
        log: The event log, whose word counts: a profile may not know of the last change yet.
        subjects: Keys of the users.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    requests: list[Request] = [("HGET", log.keys_of(subject).people, address_of(subject)) for subject in subjects]
    return [parse_consent(value, log.default) for value in required(log.nodes.run_all(requests))]


def parse_consent(value: bytes | None, default: Purpose) -> Consent:
    """Returns the consent that the log holds of a user."""
    if value is None:
        return Consent(default, 0, 0)
    purposes, set_at, forgotten = value.split()
    return Consent(default if purposes == b"-" else Purpose(int(purposes)), log_id(set_at), log_id(forgotten))
