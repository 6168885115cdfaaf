"""The bytes of a stored profile: one string, `header | state | controls | tail`.

The state is what has been folded, the tail what arrived since; the store appends to the tail without reading the rest,
and a compaction folds the tail into the state from time to time. Reading folds the tail on the spot.

The header has 48 bytes: magic, format, condition, consent, lengths of state and controls, and four log ids (folded up
to, erased up to, of the consent, of the controls). The ids are big endian, so that bytes compare as numbers do and a
script in the store can compare them as strings, for its own numbers hold 53 bits.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib

import numpy as np
import numpy.typing as npt

from features import controls, decayed_counts
from features.errors import ProfileCorrupt, ProfileNewer
from features.profile import EVERY_PURPOSE, Profile, Purpose, StoredProfile, empty, fold
from features.records import ENTRY, EVENT, events_of, verify

FORMAT = 4
"""Version of a stored profile's layout and of the meaning of its numbers."""

OLDEST_FORMAT = 3
"""Oldest version that is still read, so that no user is new after an upgrade: compaction rewrites a profile.

Header, controls and tail are laid out alike in all versions from here on; only the meaning of a state's numbers
differs."""

LATER_FORMATS = bytes(range(FORMAT + 1, FORMAT + 4))
"""Versions that a later Penchant may write while this one still runs; any other is damage."""

REPAIR = "rebuild it: penchant profiles rebuild"
"""The remedy for a damaged profile."""

PAST_LOST = f"the past of this profile was damaged and is lost; {REPAIR}"
"""The description of a profile that was put in the place of a damaged one."""

_HEADER = struct.Struct("<4sBB2sII8s8s8s8s")
_STATE = struct.Struct("<QII")
_MAGIC = b"PNCH"
# Set in the byte of a consent, so that the consent to nothing differs from none.
_CHOSEN = 8
# The condition of a profile: its state was dropped while the user is inactive, or its past was damaged and set aside.
_EVICTED, _LOST = 1, 2

HEADER_SIZE = _HEADER.size
SMALLEST_STATE = _STATE.size + decayed_counts.FACTS_SIZE + 4


def encode_state(profile: Profile) -> bytes:
    """Returns the state as bytes, with a checksum over all of it."""
    body = (
        _STATE.pack(profile.count, profile.records.size, profile.older_items.size)
        + decayed_counts.encode(profile.decayed_counts)
        + events_of(profile.records).tobytes()
        + profile.older_items.astype("<u8").tobytes()
    )
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode_state(state: bytes | memoryview, version: int) -> Profile:
    """Reads the bytes that `encode_state` wrote.

    Raises:
        ProfileCorrupt: The bytes are cut short or were changed.
    """
    if not state:
        return empty(version)
    if len(state) < SMALLEST_STATE or zlib.crc32(state[:-4]) != int.from_bytes(state[-4:], "little"):
        raise ProfileCorrupt(f"the state of a profile fails its checksum; {REPAIR}")
    count, ring, older = _STATE.unpack_from(state)
    begin = _STATE.size + decayed_counts.size_of(state[_STATE.size :])
    if len(state) != begin + ring * EVENT.itemsize + older * 8 + 4:
        raise ProfileCorrupt(f"the state of a profile has the wrong length; {REPAIR}")
    records = np.frombuffer(state, EVENT, ring, begin)
    older_items = np.frombuffer(state, "<u8", older, begin + ring * EVENT.itemsize).astype(np.uint64)
    counts = decayed_counts.decode(state[_STATE.size : begin])
    return Profile(version, records, older_items, count, decayed_counts=counts)


def encode_consent(consent: Purpose | None) -> bytes:
    """Returns a consent as 2 bytes, the second the complement of the first; both 0 if the user has not chosen."""
    return bytes(2) if consent is None else bytes((_CHOSEN | consent, 0xFF ^ (_CHOSEN | consent)))


def decode_consent(consent: bytes) -> Purpose | None:
    """Reads the bytes that `encode_consent` wrote.

    Raises:
        ProfileCorrupt: A bit was changed, by which no purpose may be gained.
    """
    if consent == bytes(2):
        return None
    if consent[0] ^ consent[1] != 0xFF or consent[0] & ~int(EVERY_PURPOSE) != _CHOSEN:
        raise ProfileCorrupt(f"the consent of this user was changed in its store; {REPAIR}")
    return Purpose(consent[0] & EVERY_PURPOSE)


def encode(profile: Profile, erased_before: int = 0, consent_version: int = 0, controls_version: int = 0) -> bytes:
    """Returns a stored profile with everything folded and an empty tail; without events there is no state."""
    state = encode_state(profile) if profile.count else b""
    encoded_controls = controls.encode(profile.controls)
    log_ids = (profile.version, erased_before, consent_version, controls_version)
    header = _HEADER.pack(
        _MAGIC,
        FORMAT,
        _LOST if profile.lost else 0,
        encode_consent(profile.consent),
        len(state),
        len(encoded_controls),
        *(log_id.to_bytes(8, "big") for log_id in log_ids),
    )
    return header + state + encoded_controls


def is_newer(blob: bytes) -> bool:
    """Returns True if a later version of Penchant wrote a stored profile."""
    return blob[:4] == _MAGIC and blob[4:5] in LATER_FORMATS


def split(blob: bytes) -> StoredProfile:
    """Takes a stored profile apart, without folding.

    Raises:
        ProfileCorrupt: The bytes are not a stored profile that this version reads, are cut short or were changed.
        ProfileNewer: A later version wrote it.
    """
    _check_header(blob)
    _, version, condition, consent, state_length, controls_length, *versions = _HEADER.unpack_from(blob)
    state_end = HEADER_SIZE + state_length
    tail_start = state_end + controls_length
    if len(blob) < tail_start or (len(blob) - tail_start) % ENTRY.itemsize:
        raise ProfileCorrupt(f"a stored profile is cut short; {REPAIR}")
    folded, *marks = (int.from_bytes(log_id, "big") for log_id in versions)
    state = decode_state(memoryview(blob)[HEADER_SIZE:state_end], folded)
    # Most profiles need none of the replacements below, and this runs on every read.
    if version < FORMAT:
        state = dataclasses.replace(state, decayed_counts=decayed_counts.from_format_3(state.decayed_counts))
    if controls_length or any(consent):
        chosen = controls.decode(memoryview(blob)[state_end:tail_start])
        state = dataclasses.replace(state, consent=decode_consent(consent), controls=chosen)
    if condition == _LOST:
        state = dataclasses.replace(state, lost=True)
    erased_before, consent_version, controls_version = marks
    if any(marks):
        state = dataclasses.replace(state, marks=(erased_before, consent_version, controls_version))
    tail = _checked_tail(np.frombuffer(blob, ENTRY, offset=tail_start), state.version)
    return StoredProfile(state, tail, erased_before, consent_version, controls_version, condition == _EVICTED)


def decode(blob: bytes) -> Profile:
    """Returns the profile that serving reads: the state with the tail folded in.

    Raises:
        ProfileCorrupt: See `split`.
        ProfileNewer: See `split`.
    """
    stored = split(blob)
    if not stored.tail.size:
        return stored.state
    return fold(stored.state, stored.tail, int(stored.tail["log_id"][-1]))


def _check_header(blob: bytes) -> None:
    """Refuses bytes that are no profile, or one of another version."""
    if len(blob) < HEADER_SIZE:
        raise ProfileCorrupt(f"a stored profile has at least {HEADER_SIZE} bytes, this one {len(blob)}; {REPAIR}")
    magic, version, condition, _, state_length, *_ = _HEADER.unpack_from(blob)
    if is_newer(blob):
        raise ProfileNewer(
            f"a later version of Penchant wrote this profile (format {version}); upgrade this process too"
        )
    if magic == _MAGIC and not OLDEST_FORMAT <= version <= FORMAT:
        raise ProfileCorrupt(f"a profile of format {version}, not {OLDEST_FORMAT} to {FORMAT}; {REPAIR}")
    # An evicted profile has no state: bytes that say both were changed.
    if magic != _MAGIC or condition not in (0, _EVICTED, _LOST) or (condition == _EVICTED and state_length):
        raise ProfileCorrupt(f"not a stored profile; {REPAIR}")


def _checked_tail(tail: npt.NDArray[np.void], version: int) -> npt.NDArray[np.void]:
    """Returns the entries that are not in the state, in the order of the log."""
    if not tail.size:
        return tail
    if not verify(tail).all():
        raise ProfileCorrupt(f"an entry in the tail of a profile fails its checksum; {REPAIR}")
    ids = tail["log_id"].astype(np.uint64)
    # Nearly always all of them, and in order: entries are folded once, and appended as the log delivers them.
    if ids[0] > version and (ids[1:] > ids[:-1]).all():
        return tail
    # An entry that the log delivered again may stand behind a later one, and the fold needs the order of the log.
    order = np.argsort(ids, kind="stable")
    return tail[order[ids[order] > np.uint64(version)]]
