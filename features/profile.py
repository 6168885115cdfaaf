"""A profile is a fold over a user's events: the newest ones whole, the older ones as counts and as items seen.

Serving folds the waiting events of a profile on every read with the same function that replays history for training,
so an event takes effect on the very next request and training sees the profiles that serving saw. The order of the fold
is the order of the log; the time of an event is only a value.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Container, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from features import decayed_counts
from features.controls import Controls, no_controls
from features.decayed_counts import DecayedCounts
from features.event_types import PASSIVE_EVENT_TYPES
from features.kernels import append_distinct
from features.keys import event_type_key
from features.records import EVENT, Events, Records, concatenated, events_of

RING = 256
"""Number of newest events about items kept whole; at least the length of any encoder."""

OLDER_ITEMS_CAP = 8192
"""Number of items kept only as seen, after their events have left the ring."""

# An item that was only shown has not been seen: its event leaves no trace when it leaves the ring.
_PASSIVE = np.array([event_type_key(name) for name in PASSIVE_EVENT_TYPES], np.uint32)
_DAY_MS = 86_400_000


class Purpose(enum.IntFlag):
    """The uses of a user's data that need consent: to personalise answers, to train models, to measure what helped."""

    PERSONALISE = 1
    TRAIN = 2
    MEASURE = 4

    @classmethod
    def of(cls, names: Iterable[str]) -> Purpose:
        """Returns the purposes of these names, in lower case.

        Raises:
            ValueError: A name is none of them.
        """
        purposes = cls(0)
        for name in names:
            if name.upper() not in cls.__members__:
                raise ValueError(f"{name!r} is no purpose; choose among {', '.join(EVERY_PURPOSE.names)}")
            purposes |= cls[name.upper()]
        return purposes

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the purposes, in lower case."""
        return tuple(str(purpose.name).lower() for purpose in type(self) if purpose in self)


EVERY_PURPOSE = Purpose(7)


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """The state of one user.

    Attributes:
        version: Log id up to and including which events are folded; 0 for an unknown user.
        records: The ring: the newest events about items, oldest first; EVENT [<= RING].
        older_items: Items pushed out of the ring, oldest first, without repeats; uint64 [<= OLDER_ITEMS_CAP].
        count: Number of events ever folded.
        consent: The purposes that the user allows; None until they have chosen, so that the service's default holds.
        decayed_counts: The sums of all events of the user, also of those that have left the ring.
        controls: The user's blocks, mutes and dials; CONTROL [n].
        marks: Log ids up to which events are forgotten, of the newest consent, and of the newest controls; 0 for none.
        lost: True if a past that cannot be read was set aside, so that this is only what came after it.
    """

    version: int
    records: Events
    older_items: npt.NDArray[np.uint64]
    count: int
    consent: Purpose | None = None
    decayed_counts: DecayedCounts = dataclasses.field(default_factory=decayed_counts.empty)
    controls: Controls = dataclasses.field(default_factory=no_controls)
    marks: tuple[int, int, int] = (0, 0, 0)
    lost: bool = False

    def has(self, log_id: int) -> bool:
        """Returns True if the entry of the log with this id has taken effect, or is forgotten by now."""
        return log_id <= max(self.version, self.marks[0]) or log_id in self.marks

    @property
    def emptied(self) -> bool:
        """True if there were events and none is left: the profile was evicted, or every event was undone."""
        return self.version > 0 and not self.count


@dataclasses.dataclass(frozen=True, slots=True)
class StoredProfile:
    """A stored profile taken apart, see `features.profile_codec`.

    Attributes:
        state: The folded part.
        tail: The events that came after it, sorted by log id; ENTRY [n].
        erased_before: Log id up to and including which entries are refused, 0 if nothing was erased.
        consent_version: Log id of the newest consent, 0 if there is none.
        controls_version: Log id of the newest controls, 0 if there are none.
        evicted: True if the state was dropped because the user was inactive, and has to be restored.
    """

    state: Profile
    tail: npt.NDArray[np.void]
    erased_before: int = 0
    consent_version: int = 0
    controls_version: int = 0
    evicted: bool = False

    @property
    def versions(self) -> tuple[int, int, int]:
        """The log ids of the header that do not change when the state does: the last arguments of `encode`."""
        return self.erased_before, self.consent_version, self.controls_version


@dataclasses.dataclass(frozen=True, slots=True)
class Retention:
    """The time that events stay in profiles: days by event type; a type that is not named stays for ever."""

    days: Mapping[str, float]

    def expired(self, records: Records, now_ms: int) -> npt.NDArray[np.bool_]:
        """Returns a mask of the events that are too old at a time in ms; bool [n]."""
        expired = np.zeros(records.size, np.bool_)
        for name, days in self.days.items():
            oldest = now_ms - int(days * _DAY_MS)
            expired |= (records["event_type"] == event_type_key(name)) & (records["timestamp"] < oldest)
        return expired


def empty(version: int = 0) -> Profile:
    """Returns the profile of a user without events, or whose events were all dropped."""
    return Profile(version, np.empty(0, EVENT), np.empty(0, np.uint64), 0)


def fold(profile: Profile, records: Records, last_id: int) -> Profile:
    """Folds `records`, in the order of the log, into `profile`; a pure function.

    An event about no item (a search) is counted and leaves nothing else. It is in no history, so it may not push one
    that is out of the ring; training, which never meets it, keeps the same events.

    Args:
        profile: The profile before.
        records: The events that follow; EVENT, RECORD or ENTRY [n].
        last_id: Log id of the last of them.

    Returns:
        The profile after them. Folding a history in pieces gives the same as folding it at once.
    """
    events = events_of(records)
    joined = concatenated(profile.records, _about_items(events))
    overflow = max(0, joined.size - RING)
    older_items = profile.older_items
    if overflow:
        # A comparison with each of the few types takes a fraction of the time of np.isin.
        passive = (joined["event_type"][:overflow, None] == _PASSIVE).any(1)
        pushed = np.where(passive, np.uint64(0), joined["item"][:overflow])
        older_items = append_distinct(older_items, pushed, OLDER_ITEMS_CAP)
    columns = (events[name] for name in ("item", "category", "creator", "event_type", "timestamp"))
    return Profile(
        version=last_id,
        records=joined[overflow:],
        older_items=older_items,
        count=profile.count + records.size,
        consent=profile.consent,
        decayed_counts=decayed_counts.fold(profile.decayed_counts, *columns),
        controls=profile.controls,
        marks=profile.marks,
        lost=profile.lost,
    )


def refold(
    stored: StoredProfile,
    logged: npt.NDArray[np.void],
    undone: Container[int] = (),
    expired: Callable[[Records], npt.NDArray[np.bool_]] | None = None,
) -> Profile:
    """Returns the profile as if some events had never come, by folding again what the log still holds.

    A fold has no inverse. So what has left the log stays as it was folded: its events that are in the ring, and the
    items known as seen. The decayed counts keep what of all this can be folded again; a rebuild from the warehouse
    brings the rest.

    Args:
        stored: The profile as it is.
        logged: The user's entries that the log holds and that may be in the profile, in its order; ENTRY [n].
        undone: Log ids of the events that are to have no effect.
        expired: A function that masks the events past their retention; bool [n].

    Returns:
        A profile with everything folded: an entry of `logged` that comes again is known already.
    """
    state, records = stored.state, events_of(logged)
    ids = logged["log_id"].astype(np.uint64)
    removed = np.array([log_id in undone for log_id in ids.tolist()], np.bool_)
    before_log = _before_log(state, ids, records)
    # A waiting event that has left the log already is as good as one that the log holds.
    tail = stored.tail[~np.isin(stored.tail["log_id"].astype(np.uint64), ids)]
    waiting, ring = events_of(tail), before_log.records
    if expired is not None:
        removed |= expired(records)
        kept = ~expired(waiting)
        ring, tail, waiting = ring[~expired(ring)], tail[kept], waiting[kept]
    count = before_log.count - before_log.records.size + ring.size
    order = np.argsort(np.concatenate([ids[~removed], tail["log_id"].astype(np.uint64)]), kind="stable")
    base = dataclasses.replace(empty(), consent=state.consent, controls=state.controls, lost=state.lost)
    base = fold(base, ring, state.version)
    base = dataclasses.replace(base, older_items=before_log.older_items, count=count)
    # The version never goes back, even if the newest events are undone: the log would apply them again.
    newest = [state.version, *ids[-1:].tolist(), *stored.tail["log_id"][-1:].tolist()]
    return fold(base, concatenated(records[~removed], waiting)[order], max(newest))


def _before_log(state: Profile, ids: npt.NDArray[np.uint64], logged: Events) -> Profile:
    """Returns the part of a state that the log does not hold any more: its ring, its older items and their number."""
    folded = int(np.searchsorted(ids, np.uint64(state.version), side="right"))
    ring = _about_items(state.records)
    matched, first = _still_logged(ring, logged[:folded])
    ring = ring[: ring.size - matched]
    count = state.count - matched
    if ring.size:
        # All of the log that is folded stands in the ring; searches are counted, but in no ring.
        count -= int((logged[:folded]["item"] == 0).sum())
        return dataclasses.replace(state, records=ring, count=max(count - ring.size, 0) + ring.size)
    # The ring and some of what it pushed out stand in the log.
    count -= int((logged[first:folded]["item"] == 0).sum()) + first
    # As many events are older than the log: each of the first so many items may be known by one of them too.
    refolded = np.isin(state.older_items, logged["item"][:first])
    refolded[:count] = False
    return dataclasses.replace(state, records=ring, older_items=state.older_items[~refolded], count=max(count, 0))


def _still_logged(ring: Events, logged: Events) -> tuple[int, int]:
    """Returns the number of newest events of a ring that stand in the log, and the place there of the oldest of them.

    Events are compared as bytes, because a ring does not keep the log ids of its events.
    """
    wanted, place = [record.tobytes() for record in ring], len(logged)
    entries = [record.tobytes() for record in logged]
    for matched, record in enumerate(reversed(wanted)):
        at = next((at for at in range(place - 1, -1, -1) if entries[at] == record), -1)
        if at < 0:
            return matched, place
        place = at
    return len(wanted), place


def _about_items(events: Events) -> Events:
    """Returns the events that are about an item; EVENT [<= n]."""
    about = events["item"] != 0
    return events if about.all() else events[about]
