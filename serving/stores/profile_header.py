"""Facts that are read from the first bytes of a stored profile, whether or not the rest of it is sound.

The layout is that of `features/profile.py`; `lua/profile/stored.lua` reads the same bytes inside Redis.
"""

from __future__ import annotations

from dataclasses import replace

from features.errors import ProfileCorrupt, ProfileNewer
from features.profile import Purpose, empty
from features.profile_codec import HEADER_SIZE, decode_consent, encode, split
from serving.stores.keys import LIVE, time_of

FRONT = HEADER_SIZE + 24
"""Bytes that tell of the last event: the header, and after it the newest time in the state or a log id of the tail."""

_EVICTED_AT = 5
_EVICTED = 1
_FOLDED = slice(16, 24)
_ERASED = slice(24, 32)
_CONSENT_SET = slice(32, 40)


def is_evicted(header: bytes) -> bool:
    """Returns True if the state was evicted and is to be restored; False without a profile."""
    return len(header) >= HEADER_SIZE and header[_EVICTED_AT] == _EVICTED


def folded_until(header: bytes) -> int:
    """Returns the log id up to which the state goes, or went before it was evicted."""
    return int.from_bytes(header[_FOLDED], "big")


def erased_until(header: bytes) -> int:
    """Returns the log id up to which events are refused; 0 without a profile."""
    return int.from_bytes(header[_ERASED], "big")


def state_end(blob: bytes) -> int:
    """Returns the place at which the state ends."""
    return HEADER_SIZE + int.from_bytes(blob[8:12], "little")


def readable_consent(blob: bytes) -> Purpose | None:
    """Returns the consent that a damaged profile still states; no purpose at all if its consent is damaged too."""
    try:
        return decode_consent(blob[6:8])
    except ProfileCorrupt:
        return Purpose(0)


def readable_versions(blob: bytes) -> tuple[int, int]:
    """Returns the log ids up to which a damaged profile forgets, and at which the user set their consent."""
    return erased_until(blob), int.from_bytes(blob[_CONSENT_SET], "big")


def last_seen(front: bytes) -> int:
    """Returns the time, ms, of the newest event of a state.

    Without a state, the time at which the first event of the tail came; 0 if controls lie between header and tail.
    """
    if not int.from_bytes(front[8:12], "little"):
        controls_length = int.from_bytes(front[12:16], "little")
        return 0 if controls_length else time_of(int.from_bytes(front[HEADER_SIZE : HEADER_SIZE + 8], "big"))
    # An imported state has log ids that count from 1 and tell no time.
    version = folded_until(front)
    newest = int.from_bytes(front[HEADER_SIZE + 16 : FRONT], "little", signed=True)
    return time_of(version) if version >= LIVE else newest


def may_be_restored(front: bytes) -> bool:
    """Returns True if the user lets a warehouse keep their events, from which an evicted profile is restored."""
    consent = readable_consent(front)
    return consent is None or bool(consent & (Purpose.TRAIN | Purpose.MEASURE))


def is_damaged(blob: bytes) -> bool:
    """Returns True if a stored profile cannot be read, or has lost its past."""
    try:
        return split(blob).state.lost
    except ProfileNewer:
        return False
    except ProfileCorrupt:
        return True


def without_damage(blob: bytes) -> bytes:
    """Returns a stored profile without its tail, and without a state that is damaged or has lost its past."""
    # Without the tail: of its entries those that are sound come again from the log.
    end = state_end(blob) + int.from_bytes(blob[12:16], "little")
    try:
        stored = split(blob[:end])
    except ProfileCorrupt:
        return encode(replace(empty(), consent=readable_consent(blob)), *readable_versions(blob))
    state = stored.state
    sound_state = replace(empty(), consent=state.consent, controls=state.controls) if state.lost else state
    return encode(sound_state, *stored.versions)
