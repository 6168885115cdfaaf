"""Decayed aggregates of all events of a user: counts by category, creator and event type, and the newest visit.

The ring of a profile keeps the newest events; this keeps their sums, also of those that have left the ring. State, fold
and read are defined here once, and serving and training call them alike. A count is the sum of its events, each halved
with every half-life that has passed since; `features.decay_kernels` says how that comes to the same bits on every
machine, which no library's `exp` promises.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from operator import gt

import numpy as np
import numpy.typing as npt

from features.decay_kernels import TICKS, decay_factors, fold_counts
from features.event_types import NEGATIVE_EVENT_TYPES, PASSIVE_EVENT_TYPES
from features.keys import event_type_key

HORIZONS = {"hour": 3_600_000, "day": 86_400_000, "month": 30 * 86_400_000}
"""Half-lives, ms: for a user's present intent, current interests and lasting taste. A ring of 256 events covers a heavy
user's last hours and a light user's last year; these cover the same times for every user."""

DIMENSIONS = {"category": 24, "creator": 16, "event_type": 8}
"""Most keys of each dimension. A new key takes the place of the one with the least long-term count, and among equal
counts of the smallest key."""

VISIT_MS = 30 * 60_000
"""A pause in event time after which a new visit begins."""

_CAPACITIES = np.array(list(DIMENSIONS.values()), np.int64)
TICK_MS = np.array([half_life // TICKS for half_life in HORIZONS.values()], np.int64)
"""Length of a tick of each horizon, ms; int64 [3]."""

_FACTS = struct.Struct("<qqIBBBx")
# An item that was only shown, or refused, is no taste: the event counts by its type, for no category and no creator.
_UNCHOSEN = np.array([event_type_key(name) for name in (*PASSIVE_EVENT_TYPES, *NEGATIVE_EVENT_TYPES)], np.uint32)

# The field of four bytes is full long before a visit has so many events, unless a caller never pauses.
_MAX_VISIT_EVENTS = 2**32 - 1

FACTS_SIZE = _FACTS.size
CELL_SIZE = 8 + 4 * len(HORIZONS)
MAX_STATE_SIZE = FACTS_SIZE + CELL_SIZE * sum(DIMENSIONS.values())
"""Bytes of the counts in which all dimensions are full."""

Keys = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DecayedCounts:
    """The state; `empty` makes that of a user without events.

    Attributes:
        facts: Time of the newest event, ms; beginning of the visit, ms; events in it; number of keys of each of
            `DIMENSIONS`; int64 [6].
        keys: The keys, one dimension after the other; uint64 [n].
        counts: By key and horizon, at the beginning of the half-life that the newest event lies in; float32 [n, 3].
    """

    facts: npt.NDArray[np.int64]
    keys: Keys
    counts: Counts

    @property
    def newest(self) -> int:
        """Time of the newest event, ms."""
        return int(self.facts[0])

    @property
    def visit_began(self) -> int:
        """Time of the first event of the newest visit, ms."""
        return int(self.facts[1])

    @property
    def visit_events(self) -> int:
        """Number of events of the newest visit; 0 where there never was an event."""
        return int(self.facts[2])

    def visiting(self, now_ms: int) -> bool:
        """Returns True if the newest visit goes on at a time, ms; never if the time is unknown (0)."""
        return bool(now_ms and self.visit_events and now_ms - self.newest <= VISIT_MS)

    def of(self, dimension: str) -> slice:
        """Returns the place of a dimension's keys in `keys` and `counts`."""
        at = 3 + list(DIMENSIONS).index(dimension)
        start = int(self.facts[3:at].sum())
        return slice(start, start + int(self.facts[at]))

    def at(self, now_ms: int) -> npt.NDArray[np.float64]:
        """Returns the counts decayed to a time, ms, but not to one before the newest event; float64 [n, 3]."""
        return self.counts.astype(np.float64) * decay_factors(now_ms, self.newest, TICK_MS)

    def segment(self) -> int:
        """Returns the user's segment: the category with the largest long-term count, of equal ones the smallest, or 0.

        It is the same at any time, because all long-term counts decay alike.
        """
        part = self.of("category")
        keys, counts = self.keys[part], self.counts[part, -1]
        return min(keys[counts == counts.max()].tolist(), default=0) if keys.size else 0


def empty() -> DecayedCounts:
    """Returns the counts of a user without events."""
    return DecayedCounts(np.zeros(6, np.int64), np.empty(0, np.uint64), np.empty((0, len(HORIZONS)), np.float32))


def fold(
    counts: DecayedCounts,
    items: npt.NDArray[np.uint64],
    categories: npt.NDArray[np.uint64],
    creators: npt.NDArray[np.uint64],
    types: npt.NDArray[np.uint32],
    times: npt.NDArray[np.int64],
) -> DecayedCounts:
    """Returns the counts after more events, in the order of the log; a pure function, in pieces the same as at once.

    An event about no item (a search) is left out, as it is of every history.

    Args:
        counts: The counts before.
        items: Key of each event's item, 0 for none; uint64 [n].
        categories: Key of its category, 0 for none; uint64 [n].
        creators: Key of its creator, 0 for none; uint64 [n].
        types: Key of its type; uint32 [n].
        times: Time of the event, ms; int64 [n].
    """
    # Copies: fields of records are strided, and a kernel would be compiled again for each layout that it is given.
    state: tuple[npt.NDArray[np.int64], Keys, Counts] = fold_counts(
        counts.facts,
        counts.keys,
        counts.counts,
        _CAPACITIES,
        TICK_MS,
        VISIT_MS,
        _UNCHOSEN,
        items.copy(),
        categories.copy(),
        creators.copy(),
        types.copy(),
        times.copy(),
    )
    return DecayedCounts(*state)


def encode(counts: DecayedCounts) -> bytes:
    """Returns the counts as bytes; their length grows with the number of keys."""
    newest, began, events, *sizes = counts.facts.tolist()
    facts = _FACTS.pack(newest, began, min(events, _MAX_VISIT_EVENTS), *sizes)
    return facts + counts.keys.tobytes() + counts.counts.tobytes()


def decode(stored: bytes | memoryview) -> DecayedCounts:
    """Reads the bytes that `encode` wrote.

    Raises:
        ValueError: It has another length than it says, or more keys than there can be.
    """
    facts = _FACTS.unpack_from(stored)
    count = sum(facts[3:])
    # The kernel trusts these numbers: with more keys than places it would write past its arrays.
    if len(stored) != FACTS_SIZE + CELL_SIZE * count or any(map(gt, facts[3:], DIMENSIONS.values())):
        raise ValueError("decayed counts have the wrong length")
    keys = np.frombuffer(stored, np.uint64, count, FACTS_SIZE)
    counts = np.frombuffer(stored, np.float32, count * len(HORIZONS), FACTS_SIZE + 8 * count)
    # Copies: views would be read-only, and would keep all bytes of the stored profile in memory.
    return DecayedCounts(np.array(facts, np.int64), keys.copy(), counts.reshape(count, len(HORIZONS)).copy())


def from_format_3(old: DecayedCounts) -> DecayedCounts:
    """Returns the counts of a profile of format 3, which stood at the newest event, as they are kept now."""
    # The half-life of the newest event has not ended, so each factor is above 1/2 and the division is safe.
    counts = old.counts / decay_factors(old.newest, old.newest, TICK_MS)
    return DecayedCounts(old.facts, old.keys, counts.astype(np.float32))


def size_of(stored: bytes | memoryview) -> int:
    """Returns the length in bytes of the counts that `stored` begins with."""
    return FACTS_SIZE + CELL_SIZE * int(sum(_FACTS.unpack_from(stored)[3:]))
