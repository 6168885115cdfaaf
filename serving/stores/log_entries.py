"""The entries of the event log: as they are appended, as they are read, and the outcome of appending them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from features.profile import Purpose
from features.records import RECORD, verify
from serving.errors import ConsentWithheld, EventLogUnavailable, FailedPrecondition, ResourceExhausted, ServingError
from serving.log_retention import HOUR_MS
from serving.redis.errors import reply_error, serving_error
from serving.stores.keys import log_id


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event on its way into the log.

    Attributes:
        subject: Key of the user.
        event_id: The caller's id; retries with the same one have one effect.
        record: The part that the profile folds; the bytes of one RECORD.
        payload: The whole event, see `log_codec`.
        personal: True if it may enter the profile, provided that the user allows that.
    """

    subject: str
    event_id: str
    record: bytes
    payload: bytes
    personal: bool = True


@dataclass(frozen=True, slots=True)
class LoggedImpression:
    """A slate on its way into the log.

    Attributes:
        subject: Key of the user.
        timestamp: When it was served, ms.
        payload: The whole slate, see `log_codec`.
    """

    subject: str
    timestamp: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Appended:
    """The outcome of appending one event.

    Attributes:
        log_id: Its place in the log, of a duplicate that of the first one; 0 if it was refused.
        duplicate: True if an event with this id was there.
        record: The record to apply to the profile: of a duplicate that of the first one, empty if that is gone.
        error: The reason for refusing it, None if it is durable.
        personal: True if the user allows that it enters their profile.
    """

    log_id: int
    duplicate: bool = False
    record: bytes = b""
    error: ServingError | None = None
    personal: bool = True


@dataclass(frozen=True, slots=True)
class Mark:
    """A change to what may be known of a user, as it stands in the log.

    Attributes:
        log_id: Its place.
        address: The user, as `keys.address_of` returns it.
        consent: The purposes that the user allows from now on; None if they stay as they are.
        forget: True if the profile forgets everything up to here.
        controls: All controls of the user, as `features.controls.encode` returns them; None if they stay as they are.
    """

    log_id: int
    address: bytes
    consent: Purpose | None = None
    forget: bool = False
    controls: bytes | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a stream.

    Attributes:
        log_id: Its place.
        subject: Key of the user, "" for a mark and for an entry that was deleted meanwhile.
        event_id: The caller's id, "" for an impression.
        record: The bytes of one RECORD, empty for an impression.
        payload: All of it as JSON.
        erased: Keyed hash of the user who was erased here, empty but for such a mark.
        mark: The change for a user, None but for such a mark.
        undone: Log id of an earlier event that counts no more, 0 but for such a mark.
        personal: True if the event may enter the profile; decided when it came, by what the user allowed then.
    """

    log_id: int
    subject: str = ""
    event_id: str = ""
    record: bytes = b""
    payload: bytes = b""
    erased: bytes = b""
    mark: Mark | None = None
    undone: int = 0
    personal: bool = True

    @classmethod
    def of(cls, stream_id: bytes, fields: dict[bytes, bytes]) -> Entry:
        """Returns the entry of an id and the fields that Redis holds under it."""
        # Fields have names of one letter: each is stored with each entry.
        place, mark, undone = log_id(stream_id), None, fields.get(b"u", b"")
        if b"k" in fields and not undone:
            consent = fields.get(b"c", b"")
            purposes, forget = Purpose(int(consent)) if consent else None, fields.get(b"f") == b"1"
            mark = Mark(place, fields[b"k"], purposes, forget, fields.get(b"b"))
        return cls(
            place,
            fields.get(b"s", b"").decode(),
            fields.get(b"e", b"").decode(),
            fields.get(b"r", b""),
            fields.get(b"p", b""),
            fields.get(b"x", b""),
            mark,
            log_id(undone) if undone else 0,
            b"n" not in fields,
        )


def sound(entries: Sequence[Entry]) -> tuple[list[Entry], int]:
    """Returns the entries that are events for a profile, and the number left out because their record is damaged."""
    events = [entry for entry in entries if entry.personal and len(entry.record) == RECORD.itemsize]
    intact = verify(np.frombuffer(b"".join(entry.record for entry in events), RECORD)).tolist()
    return [entry for entry, whole in zip(events, intact, strict=True) if whole], intact.count(False)


@dataclass(frozen=True, slots=True)
class Erased:
    """The outcome of an erasure.

    Attributes:
        log_id: Its place in the log; everything up to here is refused from now on.
        events: Number of events deleted.
        impressions: Number of slates deleted.
    """

    log_id: int
    events: int
    impressions: int


def appended_of(event: LoggedEvent, reply: Any) -> Appended:
    """Returns the outcome of an event from the reply of `lua/log/event_append.lua`, or from the error in its place."""
    if isinstance(reply, ServingError):
        return Appended(0, error=reply)
    match reply:
        case [0, place, personal]:
            return Appended(log_id(place), False, event.record, personal=bool(personal))
        case [1, place, record, personal]:
            return Appended(log_id(place), True, record, personal=bool(personal))
        case [5, message]:
            return Appended(0, error=serving_error(reply_error(message.decode()), EventLogUnavailable))
        case [4]:
            reason = (
                "subject has reached user_cap, the most log entries of one user; if it is not a bot, raise user_cap"
            )
            return Appended(0, error=ResourceExhausted(reason, field="subject", retry_after_ms=HOUR_MS))
        case [3]:
            reason = "the user allows none of its purposes, so the event was not stored"
            return Appended(0, error=ConsentWithheld(reason))
    return Appended(0, error=FailedPrecondition("the user was erased after the time of this event; do not send it"))
