"""What stands in the event log, and under which keys."""

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
        subject: Key of the person.
        event_id: The caller's id; retries with the same one have one effect.
        record: What the fold reads of it; the bytes of one RECORD.
        payload: The whole event as JSON.
        personal: Whether it may enter the profile, where the person allows that.
    """

    subject: str
    event_id: str
    record: bytes
    payload: bytes
    personal: bool = True


@dataclass(frozen=True, slots=True)
class LoggedImpression:
    """A slate on its way into the log: whose, when it was served (ms), and all of it as JSON."""

    subject: str
    timestamp: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Appended:
    """What became of one event.

    Attributes:
        log_id: Where it stands in the log, the first one's place for a duplicate; 0 where it was refused.
        duplicate: Whether an event with this id was there.
        record: What to apply to the profile: the first one's record for a duplicate, empty where that is gone.
        error: Why it was refused, None where it is durable.
        personal: Whether the person allows that it enters their profile.
    """

    log_id: int
    duplicate: bool = False
    record: bytes = b""
    error: ServingError | None = None
    personal: bool = True


@dataclass(frozen=True, slots=True)
class Mark:
    """A change to what may be known of a person, as it stands in the log.

    Attributes:
        log_id: Where it stands.
        address: Whose it is, as `redis_client.address_of` says.
        consent: What the person allows from now on; None where that stays as it is.
        forget: Whether the profile forgets everything up to here.
        rules: What the person never wants to be shown, as `features.controls.encode` says; None where that stays.
    """

    log_id: int
    address: bytes
    consent: Purpose | None = None
    forget: bool = False
    rules: bytes | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a stream.

    Attributes:
        log_id: Its place.
        subject: Key of the person, "" for a mark and for an entry that was deleted meanwhile.
        event_id: The caller's id, "" for an impression.
        record: The bytes of one RECORD, empty for an impression.
        payload: All of it as JSON.
        erased: Keyed hash of who was erased here, empty but for such a mark.
        mark: What changes for a person here, None but for such a mark.
        undone: Log id of an earlier event that counts no more, 0 but for such a mark.
        personal: Whether the event may enter the profile: decided when it came, by what the person allowed then.
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
    def of(cls, stream_id: bytes, found: dict[bytes, bytes]) -> Entry:
        """Reads what Redis says of one."""
        place, mark, undone = log_id(stream_id), None, found.get(b"u", b"")
        if b"k" in found and not undone:
            consent = found.get(b"c", b"")
            allowed, forget = Purpose(int(consent)) if consent else None, found.get(b"f") == b"1"
            mark = Mark(place, found[b"k"], allowed, forget, found.get(b"b"))
        return cls(
            place,
            found.get(b"s", b"").decode(),
            found.get(b"e", b"").decode(),
            found.get(b"r", b""),
            found.get(b"p", b""),
            found.get(b"x", b""),
            mark,
            log_id(undone) if undone else 0,
            b"n" not in found,
        )


def sound(entries: Sequence[Entry]) -> tuple[list[Entry], int]:
    """The entries that are events for a profile, and how many more would be, had their record not been damaged."""
    events = [entry for entry in entries if entry.personal and len(entry.record) == RECORD.itemsize]
    intact = verify(np.frombuffer(b"".join(entry.record for entry in events), RECORD)).tolist()
    return [entry for entry, whole in zip(events, intact, strict=True) if whole], intact.count(False)


@dataclass(frozen=True, slots=True)
class Erased:
    """What an erasure did: everything up to `log_id` is refused from now on, so much was deleted."""

    log_id: int
    events: int
    impressions: int


def appended_of(event: LoggedEvent, reply: Any) -> Appended:
    """What became of an event, from the reply of `scripts.EVENT_APPEND`."""
    if isinstance(reply, ServingError):
        return Appended(0, error=reply)
    if reply[0] == 0:
        return Appended(log_id(reply[1]), False, event.record, personal=bool(reply[2]))
    if reply[0] == 1:
        return Appended(log_id(reply[1]), True, reply[2], personal=bool(reply[3]))
    if reply[0] == 5:
        return Appended(0, error=serving_error(reply_error(reply[1].decode()), EventLogUnavailable))
    if reply[0] == 4:
        reason = "the log holds more of this person than of anybody who is one; is it a bot? Raise user_cap if not"
        return Appended(0, error=ResourceExhausted(reason, field="subject", retry_after_ms=HOUR_MS))
    if reply[0] == 3:
        return Appended(0, error=ConsentWithheld("this person allows none of its purposes: the event was not stored"))
    return Appended(0, error=FailedPrecondition("this person was erased after the time of this event; do not send it"))
