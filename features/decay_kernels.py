"""Numba kernels of the decayed counts; each public one has a plain twin, `<name>_plain`.

A half-life has 128 ticks, which are counted since the epoch. A count is kept as it was at the beginning of the
half-life that the newest event lies in. So an event adds a number between 1 and 2, and only at the end of a half-life
are all counts halved, which no rounding touches. Decaying at every event instead would round at every event, and the
result would depend on how a history was cut into pieces; this way the bits are the same for every cut and on every
machine, and an event costs one addition per horizon to each of its counts.
"""

from __future__ import annotations

import math
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt

from features.jit import kernel

TICKS = 128
"""Ticks per half-life: a power of two, so that the start of a half-life is found by a shift."""

FARTHEST = 1 << 61
"""Times beyond this, in ms, are taken for it, so that differences of times fit into 64 bits."""

_BITS = 7
_Ints = npt.NDArray[np.int64]
_Keys = npt.NDArray[np.uint64]
_Counts = npt.NDArray[np.float32]
_Weights = npt.NDArray[np.float64]


def _roots() -> _Weights:
    """Returns 2 ** (i / 128) for i in 0 .. 127, correctly rounded: by integer roots, as no library promises `pow`."""
    # Each root is cut off at its 500th bit, so what seven rounds cut off stays far below the 53 bits of a float64.
    roots, bits = [1 << 500], 500
    # Each round adds the numbers halfway, in the exponent, between two neighbours: the root of their product.
    for _ in range(_BITS):
        ends = [*roots, 2 << bits]
        halfway = (math.isqrt(lower * upper) for lower, upper in pairwise(ends))
        roots = [root for pair in zip(roots, halfway, strict=True) for root in pair]
    # Python divides integers of any length with a single, correct rounding.
    return np.array([root / (1 << bits) for root in roots], np.float64)


_ROOTS = _roots()
# Exact. A count that was halved more often than this adds nothing to any other: it is taken for 0.
_HALVED = 2.0 ** -np.arange(256, dtype=np.float64)


@kernel()
def _power(ticks: int) -> float:
    """Returns 2 ** (ticks / 128), for less than 128 ticks."""
    halvings = -(ticks >> _BITS)
    if halvings >= _HALVED.size:
        return 0.0
    return _ROOTS[ticks & (TICKS - 1)] * _HALVED[halvings]  # type: ignore[no-any-return]


def _power_plain(ticks: int) -> float:
    """The plain twin of `_power`."""
    halvings = -(ticks // TICKS)
    return float(_ROOTS[ticks % TICKS] * _HALVED[halvings]) if halvings < _HALVED.size else 0.0


@kernel()
def decay_factors(now: int, newest: int, ticks: _Ints) -> _Weights:
    """Returns the decay from the start of the half-life containing `newest` to `now`, one factor per horizon.

    Args:
        now: The time, ms; one before `newest` counts as `newest`.
        newest: The time that tells the half-life, ms.
        ticks: Length of a tick of each horizon, ms; int64 [h].

    Returns:
        float64 [h], each in [0, 1].
    """
    # Time counts in whole ticks: that is off by 0.6 % at most, and each power comes from a table instead of an `exp`.
    factors = np.empty(ticks.size, np.float64)
    first = min(max(newest, -FARTHEST), FARTHEST)
    last = min(max(now, first), FARTHEST)
    for h in range(ticks.size):
        factors[h] = _power(((first // ticks[h]) & ~(TICKS - 1)) - last // ticks[h])
    return factors


def decay_factors_plain(now: int, newest: int, ticks: _Ints) -> _Weights:
    """The plain twin of `decay_factors`."""
    first = min(max(newest, -FARTHEST), FARTHEST)
    last = min(max(now, first), FARTHEST)
    return np.array(
        [_power_plain(first // tick // TICKS * TICKS - last // tick) for tick in ticks.tolist()], np.float64
    )


@kernel()
def _place(keys: _Keys, counts: _Counts, start: int, size: int, capacity: int, key: np.uint64) -> int:
    """Returns the place of a key's counts; a new key of a full dimension takes that of the least long-term count."""
    # At most 24 keys: a scan is faster than a hash table, and the order of the keys stays that of their first event.
    for place in range(start, start + size):
        if keys[place] == key:
            return place
    place, long = start + size, counts.shape[1] - 1
    if size == capacity:
        place = start
        for at in range(start + 1, start + size):
            # The smaller of two keys with equal counts, so that the result does not depend on their order.
            equal = counts[at, long] == counts[place, long]
            if counts[at, long] < counts[place, long] or (equal and keys[at] < keys[place]):
                place = at
    # From 0, and not from the count that goes, as Space-Saving would: a count may miss events but never invents any.
    keys[place] = key
    for h in range(long + 1):
        counts[place, h] = np.float32(0.0)
    return place


# With the error model of Python each division would be checked for a zero, which no tick is.
@kernel(error_model="numpy", inline="always")
def _advance(
    now: int, first: bool, starts: _Ints, sizes: _Ints, counts: _Counts, bases: _Ints, ticks: _Ints, weights: _Weights
) -> None:
    """Halves the counts for each half-life that has ended by `now`, and sets the weights of an event at `now`."""
    # Inlined, because a call for each event would double the time of a fold.
    for h in range(ticks.size):
        tick = now // ticks[h]
        halvings = (tick >> _BITS) - bases[h]
        # A late event lies in an earlier half-life: it halves nothing, and weighs less than 1. The first event sets the
        # half-life, even one before 1970, the time at which an empty state stands.
        if first or halvings > 0:
            bases[h] += halvings
            for d in range(starts.size):
                for place in range(starts[d], starts[d] + sizes[d]):
                    counts[place, h] = np.float32(np.float64(counts[place, h]) * _power(-halvings * TICKS))
        weights[h] = _power(tick - bases[h] * TICKS)


@kernel(inline="always")
def _contains(types: npt.NDArray[np.uint32], wanted: np.uint32) -> bool:
    """Returns True if a type is among some."""
    contained = False
    for candidate in types:
        contained = contained or candidate == wanted
    return contained


@kernel()
def _spread(keys: _Keys, counts: _Counts, starts: _Ints, sizes: _Ints, capacities: _Ints) -> tuple[_Keys, _Counts]:
    """Returns copies of keys and counts with free places behind the keys of each dimension, up to its capacity."""
    spread_keys = np.zeros(capacities.sum(), np.uint64)
    spread_counts = np.zeros((capacities.sum(), counts.shape[1]), np.float32)
    at = 0
    for d in range(sizes.size):
        spread_keys[starts[d] : starts[d] + sizes[d]] = keys[at : at + sizes[d]]
        spread_counts[starts[d] : starts[d] + sizes[d]] = counts[at : at + sizes[d]]
        at += sizes[d]
    return spread_keys, spread_counts


@kernel()
def _used(starts: _Ints, sizes: _Ints, capacities: _Ints) -> npt.NDArray[np.bool_]:
    """Returns a mask of the places of `_spread` that hold a key."""
    used = np.zeros(capacities.sum(), np.bool_)
    for d in range(sizes.size):
        used[starts[d] : starts[d] + sizes[d]] = True
    return used


@kernel(error_model="numpy")
def fold_counts(
    facts: _Ints,
    keys: _Keys,
    counts: _Counts,
    capacities: _Ints,
    ticks: _Ints,
    pause: int,
    unchosen: npt.NDArray[np.uint32],
    items: _Keys,
    categories: _Keys,
    creators: _Keys,
    types: npt.NDArray[np.uint32],
    times: _Ints,
) -> tuple[_Ints, _Keys, _Counts]:
    """Returns the facts, keys and counts with events folded into them; see `features.decayed_counts` for their meaning.

    Args:
        facts: Time of the newest event, beginning of the visit, events in it, and the number of keys that are kept of
            categories, of creators and of types; int64 [6].
        keys: The keys, in this order; uint64 [k].
        counts: Their counts at the beginning of the half-life of the newest event; float32 [k, h].
        capacities: Most keys of each dimension; int64 [3].
        ticks: Length of a tick of each horizon, ms; int64 [h].
        pause: Length of the pause after which a visit is over, ms.
        unchosen: Types that count for no category and no creator; uint32 [u].
        items: Key of each event's item; an event with 0 is left out; uint64 [n].
        categories: Key of its category, 0 for none; uint64 [n].
        creators: Key of its creator, 0 for none; uint64 [n].
        types: Key of its type; uint32 [n].
        times: Time of the event, ms; int64 [n].
    """
    newest, began, visit = facts[0], facts[1], facts[2]
    sizes, starts = facts[3:].copy(), np.cumsum(capacities) - capacities  # a copy: the caller keeps its facts
    table, tally = _spread(keys, counts, starts, sizes, capacities)
    weights = np.empty(ticks.size, np.float64)
    bases = (min(max(newest, -FARTHEST), FARTHEST) // ticks) >> _BITS
    for i in range(items.size):
        if items[i] == np.uint64(0):
            continue
        now = min(max(times[i], -FARTHEST), FARTHEST)
        first = visit == 0
        if first or now - newest > pause:  # a late event is before the newest, so it begins no visit
            began, visit = now, 0
        if now >= began:  # a late event of an earlier visit is not counted in this one
            visit += 1
        newest = now if first else max(newest, now)
        _advance(now, first, starts, sizes, tally, bases, ticks, weights)
        chosen = not _contains(unchosen, types[i])
        for d in range(3):
            key = np.uint64(types[i]) if d == 2 else categories[i] if d == 0 else creators[i]
            if d < 2 and (not chosen or key == np.uint64(0)):
                continue
            place = _place(table, tally, starts[d], sizes[d], capacities[d], key)
            sizes[d] = max(sizes[d], place + 1 - starts[d])
            for h in range(ticks.size):
                tally[place, h] = np.float32(np.float64(tally[place, h]) + weights[h])
    new_facts = facts.copy()
    new_facts[0], new_facts[1], new_facts[2], new_facts[3:] = newest, began, visit, sizes
    used = _used(starts, sizes, capacities)
    return new_facts, table[used], tally[used]


def fold_counts_plain(
    facts: _Ints,
    keys: _Keys,
    counts: _Counts,
    capacities: _Ints,
    ticks: _Ints,
    pause: int,
    unchosen: npt.NDArray[np.uint32],
    items: _Keys,
    categories: _Keys,
    creators: _Keys,
    types: npt.NDArray[np.uint32],
    times: _Ints,
) -> tuple[_Ints, _Keys, _Counts]:
    """The plain twin of `fold_counts`."""
    newest, began, visit, *sizes = facts.tolist()
    cells = iter(list(zip(keys.tolist(), counts, strict=True)))
    tables = [dict(islice(cells, size)) for size in sizes]
    for item, category, creator, kind, time in zip(items, categories, creators, types, times.tolist(), strict=True):
        if not item:
            continue
        now = min(max(time, -FARTHEST), FARTHEST)
        before = newest if visit else now
        newest = max(before, now)
        if not visit or now - before > pause:
            began, visit = now, 0
        visit += now >= began
        factors, weights = _advance_plain(now, before, newest, ticks)
        chosen = kind not in unchosen
        event_keys = (chosen * int(category), chosen * int(creator), int(kind))
        for table, capacity, key in zip(tables, capacities, event_keys, strict=True):
            for old, count in table.items():
                table[old] = (count.astype(np.float64) * factors).astype(np.float32)
            # An event type counts whatever its key is; only for a category and a creator does 0 mean none.
            if key or table is tables[2]:
                _add_plain(table, int(capacity), key, weights)
    new_facts = np.array([newest, began, visit, *map(len, tables)], np.int64)
    new_keys = np.array([key for table in tables for key in table], np.uint64)
    tally = np.array([count for table in tables for count in table.values()], np.float32)
    return new_facts, new_keys, tally.reshape(new_keys.size, ticks.size)


def _advance_plain(now: int, before: int, newest: int, ticks: _Ints) -> tuple[_Weights, _Weights]:
    """Returns the factors by which the counts are halved, and the weights of an event at `now`; the twin of `_advance`.

    `before` and `newest` are the times of the newest event without this one and with it.
    """
    factors, weights = [], []
    for tick in ticks.tolist():
        base = newest // (tick * TICKS)
        factors.append(_power_plain((before // (tick * TICKS) - base) * TICKS))
        weights.append(_power_plain(now // tick - base * TICKS))
    return np.array(factors), np.array(weights)


def _add_plain(table: dict[int, npt.NDArray[np.float32]], capacity: int, key: int, weights: _Weights) -> None:
    """Adds to a key's counts; a new key takes the place of the least one, so the order of the other keys stays."""
    zeros = np.zeros(weights.size, np.float32)
    if key not in table and len(table) == capacity:
        least = min(table, key=lambda candidate: (table[candidate][-1], candidate))
        cells = [(key, zeros) if old == least else (old, counts) for old, counts in table.items()]
        table.clear()
        table.update(cells)
    table[key] = (table.get(key, zeros).astype(np.float64) + weights).astype(np.float32)
