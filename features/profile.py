"""A profile is a fold over events: what is remembered of a person, and how it is stored.

A stored profile is one string, `header | state | rules | tail`: the state is what has been folded, the tail what
arrived since, the rules what the person never wants to be shown. Reading folds the tail on the spot with the same
function that replays history for training, so an event is visible to the very next request. Fold order is log order;
the time of an event is only a value.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
import zlib
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from features import controls
from features import decayed_counts as memories
from features.controls import Controls, no_controls
from features.decayed_counts import DecayedCounts
from features.errors import ProfileCorrupt, ProfileNewer
from features.event_types import PASSIVE_EVENT_TYPES
from features.kernels import append_distinct, crc32_rows
from features.keys import event_type_key

FORMAT = 4
"""Version of a stored profile's layout and of what its numbers mean."""

OLDEST_FORMAT = 3
"""Oldest version that is still read, so that an upgrade makes nobody new: a profile is rewritten when it is compacted.

Header, rules and tail are laid out alike in all versions from here on; only what a state's numbers mean differs."""

LATER_FORMATS = bytes(range(FORMAT + 1, FORMAT + 4))
"""Versions that a later Penchant may write while this one still runs; any other is damage."""

RING = 256
"""Number of newest events about items kept whole; at least the length of any encoder."""

OLDER_ITEMS_CAP = 8192
"""Number of older items remembered only as seen."""

EVENT = np.dtype(
    [
        ("item", "<u8"),
        ("category", "<u8"),
        ("creator", "<u8"),
        ("timestamp", "<i8"),
        ("value", "<f4"),
        ("event_type", "<u4"),
    ]
)
"""One event as the fold reads it: 40 bytes, keys as resolved at ingest."""

RECORD = np.dtype([*((name, EVENT[name]) for name in EVENT.fields or ()), ("checksum", "<u4")])
"""An event on its way into a profile: 44 bytes, the last four a CRC-32 of the others. A state has one of its own."""

ENTRY = np.dtype([("log_id", ">u8"), ("record", RECORD)])
"""One entry of a tail: the log id and its record, 52 bytes."""

# Where in the bytes of a RECORD or an ENTRY the event stands; what follows is its checksum.
_EVENT = slice(-RECORD.itemsize, EVENT.itemsize - RECORD.itemsize)
# Who only stood before an item has not had it: such events leave no trace when they leave the ring.
_PASSIVE = np.array([event_type_key(name) for name in PASSIVE_EVENT_TYPES], np.uint32)
_HEADER = struct.Struct("<4sBB2sII8s8s8s8s")
_STATE = struct.Struct("<QII")
_PACKED = struct.Struct("<QQQqfI")
_MAGIC = b"PNCH"
_SAID = 8
# The condition of a profile: its events were dropped for a while, or its past was damaged and set aside.
_AWAY, _LOST = 1, 2

REPAIR = "rebuild it: penchant profiles rebuild"
"""What to do about a damaged profile."""

PAST_LOST = f"the past of this profile was damaged and is lost; {REPAIR}"
"""What is wrong with a profile that was put in the place of a damaged one."""

HEADER_SIZE = _HEADER.size
SMALLEST_STATE = _STATE.size + memories.FACTS_SIZE + 4
Records = npt.NDArray[np.void]
Events = npt.NDArray[np.void]


class Purpose(enum.IntFlag):
    """What a person's data may be used for: to answer them personally, to train models, to measure what helped."""

    PERSONALISE = 1
    TRAIN = 2
    MEASURE = 4

    @classmethod
    def of(cls, names: Iterable[str]) -> Purpose:
        """The purposes of these names, in lower case.

        Raises:
            ValueError: A name is none of them.
        """
        found = cls(0)
        for name in names:
            if name.upper() not in cls.__members__:
                raise ValueError(f"{name!r} is no purpose; choose among {', '.join(EVERY_PURPOSE.names)}")
            found |= cls[name.upper()]
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the purposes, in lower case."""
        return tuple(str(purpose.name).lower() for purpose in type(self) if purpose in self)


EVERY_PURPOSE = Purpose(7)


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """What is remembered of one person.

    Attributes:
        version: Log id up to and including which events are folded; 0 for nobody.
        records: The newest events about items, oldest first; EVENT [<= RING].
        older_items: Items pushed out of `records`, oldest first, without repeats; uint64 [<= OLDER_ITEMS_CAP].
        count: Number of events ever folded.
        consent: What the person allows; None where they said nothing, so that the service's default holds.
        decayed_counts: The sums of all events of the user, also of those that have left the ring.
        rules: What they never want to be shown; CONTROL [n].
        marks: Log ids up to which events are forgotten, and at which they said what they allow and what they never want
            to be shown; 0 for none.
        lost: Whether a past that cannot be read was set aside, so that this is only what came since.
    """

    version: int
    records: Events
    older_items: npt.NDArray[np.uint64]
    count: int
    consent: Purpose | None = None
    decayed_counts: DecayedCounts = dataclasses.field(default_factory=memories.empty)
    controls: Controls = dataclasses.field(default_factory=no_controls)
    marks: tuple[int, int, int] = (0, 0, 0)
    lost: bool = False

    def has(self, log_id: int) -> bool:
        """Whether what stands there in the log has had its effect: an event that is forgotten by now has as well."""
        return log_id <= max(self.version, self.marks[0]) or log_id in self.marks

    @property
    def emptied(self) -> bool:
        """Whether there were events and none is left: they stayed away and their state was dropped, or undid all."""
        return self.version > 0 and not self.count


@dataclasses.dataclass(frozen=True, slots=True)
class StoredProfile:
    """A stored profile taken apart.

    Attributes:
        state: The folded part.
        tail: What arrived since, sorted by log id; ENTRY [n].
        erased_before: Log id up to and including which entries are refused, 0 where nothing was erased.
        consent_version: Log id at which the person said what they allow, 0 where they did not.
        rules_version: Log id at which they set their rules, 0 where they did not.
        away: Whether the state was dropped because the person stayed away, so that it has to be made anew.
    """

    state: Profile
    tail: npt.NDArray[np.void]
    erased_before: int = 0
    consent_version: int = 0
    rules_version: int = 0
    evicted: bool = False

    @property
    def versions(self) -> tuple[int, int, int]:
        """What `encode` is to be told beside a new state."""
        return self.erased_before, self.consent_version, self.rules_version


@dataclasses.dataclass(frozen=True, slots=True)
class Retention:
    """How long events stay in profiles: days by event type; a type that is not named stays for ever."""

    days: Mapping[str, float]

    def expired(self, records: Records, now_ms: int) -> npt.NDArray[np.bool_]:
        """Which events [n] are too old at a time in ms; bool [n]."""
        gone = np.zeros(records.size, np.bool_)
        for name, days in self.days.items():
            oldest = now_ms - int(days * 86_400_000)
            gone |= (records["event_type"] == event_type_key(name)) & (records["timestamp"] < oldest)
        return gone


def empty(version: int = 0) -> Profile:
    """The profile of somebody nobody knows, or nobody knows any more."""
    return Profile(version, np.empty(0, EVENT), np.empty(0, np.uint64), 0)


def make_records(
    item: npt.ArrayLike,
    category: npt.ArrayLike,
    creator: npt.ArrayLike,
    timestamp: npt.ArrayLike,
    value: npt.ArrayLike,
    event_type: npt.ArrayLike,
) -> Records:
    """Builds RECORD [n] from columns of length n (or scalars) and fills the checksums."""
    # Each to its own type first: numpy makes a list of large and small integers floats.
    columns: dict[str, npt.NDArray[Any]] = {
        "item": np.asarray(item, np.uint64),
        "category": np.asarray(category, np.uint64),
        "creator": np.asarray(creator, np.uint64),
        "timestamp": np.asarray(timestamp, np.int64),
        "value": np.asarray(value, np.float32),
        "event_type": np.asarray(event_type, np.uint32),
    }
    records = np.zeros(np.broadcast_shapes((1,), *(column.shape for column in columns.values())), RECORD)
    for name, column in columns.items():
        records[name] = column
    records["checksum"] = crc32_rows(_bytes_of(records)[:, _EVENT])
    return records


def pack_record(item: int, category: int, creator: int, timestamp: int, value: float, event_type: int) -> bytes:
    """The bytes of one RECORD, as `make_records` makes it: numpy takes ten times as long for a single one."""
    event = _PACKED.pack(item, category, creator, timestamp, value, event_type)
    return event + zlib.crc32(event).to_bytes(4, "little")


def verify(records: Records) -> npt.NDArray[np.bool_]:
    """Which of RECORD or ENTRY [n] still have the checksum they were written with; bool [n]."""
    flat = _bytes_of(records)
    written = np.ascontiguousarray(flat[:, _EVENT.stop :]).view("<u4")[:, 0]
    intact: npt.NDArray[np.bool_] = np.equal(written, crc32_rows(flat[:, _EVENT]))
    return intact


def fold(profile: Profile, records: Records, last_id: int) -> Profile:
    """Folds `records`, in log order, into `profile`; a pure function.

    An event about no item (a search) is counted and leaves nothing else: it is in no history, so it may not push what
    is in one out of the ring. Training, which never meets it, remembers as much.

    Args:
        profile: What was known before.
        records: The events that follow; EVENT, RECORD or ENTRY [n].
        last_id: Log id of the last of them.

    Returns:
        The profile after them. Folding a history in pieces gives the same as folding it at once.
    """
    events = events_of(records)
    joined = _joined(profile.records, _about_items(events))
    cut = max(0, joined.size - RING)
    evicted = profile.older_items
    if cut:
        passive = (joined["event_type"][:cut, None] == _PASSIVE).any(1)
        pushed = np.where(passive, np.uint64(0), joined["item"][:cut])
        evicted = append_distinct(evicted, pushed, OLDER_ITEMS_CAP)
    columns = (events[name] for name in ("item", "category", "creator", "event_type", "timestamp"))
    memory = memories.fold(profile.decayed_counts, *columns)
    count = profile.count + records.size
    said = profile.consent, memory, profile.controls, profile.marks, profile.lost
    return Profile(last_id, joined[cut:], evicted, count, *said)


def refold(
    stored: StoredProfile,
    logged: npt.NDArray[np.void],
    undone: Container[int] = (),
    expired: Callable[[Records], npt.NDArray[np.bool_]] | None = None,
) -> Profile:
    """The profile as if some events had never come. A fold has no inverse, so what the log still holds is folded anew.

    What has left the log stays as it was folded: the events of it that are in the ring, and what is known as seen. The
    decayed counts keep what of all this can be folded again: a rebuild from the warehouse brings the rest.

    Args:
        stored: The profile as it is.
        logged: Everything of the person that the log holds and that may be in the profile, in log order; ENTRY [n].
        undone: Log ids of the events that are to have no effect.
        expired: Which events [n] are past their retention; bool [n].

    Returns:
        A profile with everything folded: whatever of `logged` comes again is known already.
    """
    state, records = stored.state, events_of(logged)
    ids = logged["log_id"].astype(np.uint64)
    folded = int(np.searchsorted(ids, np.uint64(state.version), side="right"))
    ring = _about_items(state.records)
    known, first = _still_logged(ring, records[:folded])
    older, evicted, count = ring[: ring.size - known], state.older_items, state.count - known
    gone = np.array([one in undone for one in ids.tolist()], np.bool_)
    # What waits in the tail and has left the log already is as good as what the log holds.
    rest = stored.tail[~np.isin(stored.tail["log_id"].astype(np.uint64), ids)]
    waiting, before = events_of(rest), older.size
    if expired is not None:
        gone |= expired(records)
        older, waiting, rest = older[~expired(older)], waiting[~expired(waiting)], rest[~expired(waiting)]
    first = 0 if before else first
    count -= int((records[first:folded]["item"] == 0).sum())  # counted, but in no ring
    if not before:  # the ring and some of what it pushed out stand in the log
        count -= first
        # As many events are older than the log: each of the first so many items may be known by one of them too.
        mine = np.isin(evicted, records["item"][:first])
        mine[:count] = False
        evicted = evicted[~mine]
    order = np.argsort(np.concatenate([ids[~gone], rest["log_id"].astype(np.uint64)]), kind="stable")
    events = _joined(records[~gone], waiting)[order]
    count = max(count - before, 0) + older.size
    base = dataclasses.replace(empty(), consent=state.consent, controls=state.controls, lost=state.lost)
    base = fold(base, older, state.version)
    base = dataclasses.replace(base, older_items=evicted, count=count)
    newest = [state.version, *ids[-1:].tolist(), *stored.tail["log_id"][-1:].tolist()]
    return fold(base, events, max(newest))


def _still_logged(ring: Events, logged: Events) -> tuple[int, int]:
    """How many of the newest events of a ring stand in the log, and the place there of the oldest of them."""
    wanted, place = [record.tobytes() for record in ring], len(logged)
    have = [record.tobytes() for record in logged]
    for known, record in enumerate(reversed(wanted)):
        at = next((at for at in range(place - 1, -1, -1) if have[at] == record), -1)
        if at < 0:
            return known, place
        place = at
    return len(wanted), place


def encode_state(profile: Profile) -> bytes:
    """The state as bytes, with a checksum over all of it."""
    body = (
        _STATE.pack(profile.count, profile.records.size, profile.older_items.size)
        + memories.encode(profile.decayed_counts)
        + events_of(profile.records).tobytes()
        + profile.older_items.astype("<u8").tobytes()
    )
    return body + zlib.crc32(body).to_bytes(4, "little")


def decode_state(state: bytes | memoryview, version: int) -> Profile:
    """Reads what `encode_state` wrote.

    Raises:
        ProfileCorrupt: The bytes are cut short or were changed.
    """
    if not state:
        return empty(version)
    if len(state) < SMALLEST_STATE or zlib.crc32(state[:-4]) != int.from_bytes(state[-4:], "little"):
        raise ProfileCorrupt(f"the state of a profile fails its checksum; {REPAIR}")
    count, ring, seen = _STATE.unpack_from(state)
    begin = _STATE.size + memories.size_of(state[_STATE.size :])
    if len(state) != begin + ring * EVENT.itemsize + seen * 8 + 4:
        raise ProfileCorrupt(f"the state of a profile has the wrong length; {REPAIR}")
    records = np.frombuffer(state, EVENT, ring, begin)
    evicted = np.frombuffer(state, "<u8", seen, begin + ring * EVENT.itemsize)
    memory = memories.decode(state[_STATE.size : begin])
    return Profile(version, records, evicted.astype(np.uint64), count, decayed_counts=memory)


def encode_consent(consent: Purpose | None) -> bytes:
    """What a person allows as 2 bytes, the second the complement of the first; both 0 where they said nothing."""
    return bytes(2) if consent is None else bytes((_SAID | consent, 0xFF ^ (_SAID | consent)))


def decode_consent(consent: bytes) -> Purpose | None:
    """Reads what `encode_consent` wrote.

    Raises:
        ProfileCorrupt: A bit was changed: nobody is to gain a purpose by that.
    """
    if consent == bytes(2):
        return None
    if consent[0] ^ consent[1] != 0xFF or consent[0] & ~int(EVERY_PURPOSE) != _SAID:
        raise ProfileCorrupt(f"what this person allows was changed in its store; {REPAIR}")
    return Purpose(consent[0] & EVERY_PURPOSE)


def encode(profile: Profile, erased_before: int = 0, consent_version: int = 0, rules_version: int = 0) -> bytes:
    """A stored profile with everything folded and an empty tail; log ids are big endian: bytes compare as numbers do.

    A header of 48 bytes comes first, then the state and the rules; without events there is no state.
    """
    state, rules = encode_state(profile) if profile.count else b"", controls.encode(profile.controls)
    numbers = (profile.version, erased_before, consent_version, rules_version)
    versions = (number.to_bytes(8, "big") for number in numbers)
    consent = encode_consent(profile.consent)
    condition = _LOST if profile.lost else 0
    return _HEADER.pack(_MAGIC, FORMAT, condition, consent, len(state), len(rules), *versions) + state + rules


def is_newer(blob: bytes) -> bool:
    """Whether a later version of Penchant wrote a stored profile."""
    return blob[:4] == _MAGIC and blob[4:5] in LATER_FORMATS


def split(blob: bytes) -> StoredProfile:
    """Takes a stored profile apart, without folding.

    Raises:
        ProfileCorrupt: The bytes are not a stored profile that this version reads, are cut short or were changed.
        ProfileNewer: A later version wrote it.
    """
    if len(blob) < HEADER_SIZE:
        raise ProfileCorrupt(f"a stored profile has at least {HEADER_SIZE} bytes, this one {len(blob)}; {REPAIR}")
    magic, version, condition, consent, state_length, rules_length, *versions = _HEADER.unpack_from(blob)
    if is_newer(blob):
        raise ProfileNewer(
            f"a later version of Penchant wrote this profile (format {version}); upgrade this process too"
        )
    if magic == _MAGIC and not OLDEST_FORMAT <= version <= FORMAT:
        raise ProfileCorrupt(f"a profile of format {version}, not {OLDEST_FORMAT} to {FORMAT}; {REPAIR}")
    if magic != _MAGIC or condition not in (0, _AWAY, _LOST) or (condition == _AWAY and state_length):
        raise ProfileCorrupt(f"not a stored profile; {REPAIR}")
    middle = HEADER_SIZE + state_length
    start = middle + rules_length
    if len(blob) < start or (len(blob) - start) % ENTRY.itemsize:
        raise ProfileCorrupt(f"a stored profile is cut short; {REPAIR}")
    folded, erased, said, ruled = (int.from_bytes(number, "big") for number in versions)
    state = decode_state(memoryview(blob)[HEADER_SIZE:middle], folded)
    if version < FORMAT:
        state = dataclasses.replace(state, decayed_counts=memories.from_format_3(state.decayed_counts))
    if rules_length or any(consent):
        rules = controls.decode(memoryview(blob)[middle:start])
        state = dataclasses.replace(state, consent=decode_consent(consent), controls=rules)
    if condition == _LOST:
        state = dataclasses.replace(state, lost=True)
    if erased or said or ruled:
        state = dataclasses.replace(state, marks=(erased, said, ruled))
    tail = np.frombuffer(blob, ENTRY, offset=start)
    if tail.size:
        if not verify(tail).all():
            raise ProfileCorrupt(f"an entry in the tail of a profile fails its checksum; {REPAIR}")
        tail = _unfolded(tail, state.version)
    return StoredProfile(state, tail, erased, said, ruled, condition == _AWAY)


def decode(blob: bytes) -> Profile:
    """What serving reads: the state with the tail folded in.

    Raises:
        ProfileCorrupt: See `split`.
        ProfileNewer: See `split`.
    """
    stored = split(blob)
    if not stored.tail.size:
        return stored.state
    return fold(stored.state, stored.tail, int(stored.tail["log_id"][-1]))


def events_of(records: Records) -> Events:
    """What the fold reads of RECORD or ENTRY [n]; EVENT [n]."""
    if records.dtype == EVENT:
        return records
    return np.ascontiguousarray(_bytes_of(records)[:, _EVENT]).view(EVENT).reshape(records.size)


def _about_items(events: Events) -> Events:
    """Returns the events that are about an item; EVENT [<= n]."""
    about = events["item"] != 0
    return events if about.all() else events[about]


def _joined(older: Events, newer: Events) -> Events:
    """Both, as opaque bytes: numpy copies a structured type field by field, seven times slower."""
    opaque = f"V{EVENT.itemsize}"
    return np.concatenate([np.ascontiguousarray(part).view(opaque) for part in (older, newer)]).view(EVENT)


def _unfolded(tail: npt.NDArray[np.void], version: int) -> npt.NDArray[np.void]:
    """The entries that are not in the state, in the order of the log; nearly always all, and in order already."""
    ids = tail["log_id"].astype(np.uint64)
    if ids[0] > version and (ids[1:] > ids[:-1]).all():
        return tail
    order = np.argsort(ids, kind="stable")
    return tail[order[ids[order] > np.uint64(version)]]


def _bytes_of(records: Records) -> npt.NDArray[np.uint8]:
    """The bytes of each of RECORD or ENTRY [n]; uint8 [n, size of one]."""
    return np.ascontiguousarray(records).view(np.uint8).reshape(records.size, records.dtype.itemsize)
