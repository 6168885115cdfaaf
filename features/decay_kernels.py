"""Numba kernels of what decays; each has a plain twin beside it, `<name>_plain`.

A half-life has 128 ticks, which are counted since the epoch. A count is kept as it was at the beginning of the
half-life that the newest event lies in: an event adds a number between 1 and 2, and only where a half-life ends is the
count halved, which no rounding touches. So however a history is cut into pieces, and on whatever machine, the bits are
the same, and an event costs one addition per horizon to each of its counts.
"""

from __future__ import annotations

import math
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt

from features.jit import kernel

TICKS = 128
"""Ticks per half-life."""

FARTHEST = 1 << 61
"""Times beyond this, in ms, are taken for it, so that differences of times fit."""

_BITS = 7
_Ints = npt.NDArray[np.int64]
_Keys = npt.NDArray[np.uint64]
_Counts = npt.NDArray[np.float32]


def _roots() -> npt.NDArray[np.float64]:
    """2 ** (i / 128) for i in 0 .. 127, correctly rounded: by roots of integers, for no library promises its `pow`."""
    roots, places = [1 << 500], 500
    for _ in range(_BITS):  # each time those between: the root of two neighbours' product
        ends = [*roots, 2 << places]
        between = (math.isqrt(first * second) for first, second in pairwise(ends))
        roots = [one for pair in zip(roots, between, strict=True) for one in pair]
    return np.array([root / (1 << places) for root in roots], np.float64)


_ROOTS = _roots()
_HALVED = 2.0 ** -np.arange(256, dtype=np.float64)  # exact; what was halved more often than this is nothing


@kernel()
def _power(ticks: int) -> float:
    """2 ** (ticks / 128), of less than 128 ticks."""
    halvings = -(ticks >> _BITS)
    if halvings >= _HALVED.size:
        return 0.0
    return _ROOTS[ticks & (TICKS - 1)] * _HALVED[halvings]  # type: ignore[no-any-return]


def _power_plain(ticks: int) -> float:
    """The plain twin of `_power`."""
    halvings = -(ticks // TICKS)
    return float(_ROOTS[ticks % TICKS] * _HALVED[halvings]) if halvings < _HALVED.size else 0.0


@kernel()
def decay_factors(now: int, newest: int, ticks: _Ints) -> npt.NDArray[np.float64]:
    """What is left, at a time, of what was 1 at the beginning of the half-life that another time lies in.

    Args:
        now: The time, ms; one before `newest` counts as it.
        newest: The time that tells which half-life, ms.
        ticks: Length of a tick of each horizon, ms; int64 [h].

    Returns:
        float64 [h], each in [0, 1].
    """
    out = np.empty(ticks.size, np.float64)
    first = min(max(newest, -FARTHEST), FARTHEST)
    last = min(max(now, first), FARTHEST)
    for h in range(ticks.size):
        out[h] = _power(((first // ticks[h]) & ~(TICKS - 1)) - last // ticks[h])
    return out


def decay_factors_plain(now: int, newest: int, ticks: _Ints) -> npt.NDArray[np.float64]:
    """The plain twin of `decay_factors`."""
    first = min(max(newest, -FARTHEST), FARTHEST)
    last = min(max(now, first), FARTHEST)
    return np.array(
        [_power_plain(first // tick // TICKS * TICKS - last // tick) for tick in ticks.tolist()], np.float64
    )


@kernel()
def _place(keys: _Keys, counts: _Counts, start: int, size: int, room: int, key: np.uint64) -> int:
    """Where a key's counts are; where it has none and there is no room, in the place of the least one."""
    for place in range(start, start + size):
        if keys[place] == key:
            return place
    place, long = start + size, counts.shape[1] - 1
    if size == room:
        place = start
        for at in range(start + 1, start + size):
            equal = counts[at, long] == counts[place, long]
            if counts[at, long] < counts[place, long] or (equal and keys[at] < keys[place]):
                place = at
    keys[place] = key
    for h in range(long + 1):
        counts[place, h] = np.float32(0.0)
    return place


@kernel(error_model="numpy")
def fold_counts(
    facts: _Ints,
    keys: _Keys,
    counts: _Counts,
    rooms: _Ints,
    ticks: _Ints,
    pause: int,
    unchosen: npt.NDArray[np.uint32],
    items: _Keys,
    categories: _Keys,
    creators: _Keys,
    types: npt.NDArray[np.uint32],
    times: _Ints,
) -> tuple[_Ints, _Keys, _Counts]:
    """Folds events into decayed counts and into the visit; see `features.decayed_counts` for what they mean.

    Args:
        facts: Time of the newest event, beginning of the visit, events in it, and the number of keys that are
            remembered of categories, of creators and of types; int64 [6].
        keys: The keys, in this order; uint64 [k].
        counts: Their counts at the beginning of the half-life of the newest event; float32 [k, h].
        rooms: Most keys of each; int64 [3].
        ticks: Length of a tick of each horizon, ms; int64 [h].
        pause: Length of the pause after which a visit is over, ms.
        unchosen: Types that count for no category and no creator; uint32 [u].
        items: Key of each event's item; an event with 0 is left out; uint64 [n].
        categories: Key of its category, 0 for none; uint64 [n].
        creators: Key of its creator, 0 for none; uint64 [n].
        types: Key of its type; uint32 [n].
        times: When it happened, ms; int64 [n].

    Returns:
        The new facts, keys and counts.
    """
    newest, began, visit = facts[0], facts[1], facts[2]
    sizes, starts = facts[3:].copy(), np.cumsum(rooms) - rooms
    table, tally = np.zeros(rooms.sum(), np.uint64), np.zeros((rooms.sum(), ticks.size), np.float32)
    at = 0
    for d in range(3):
        table[starts[d] : starts[d] + sizes[d]] = keys[at : at + sizes[d]]
        tally[starts[d] : starts[d] + sizes[d]] = counts[at : at + sizes[d]]
        at += sizes[d]
    weights = np.empty(ticks.size, np.float64)
    bases = (min(max(newest, -FARTHEST), FARTHEST) // ticks) >> _BITS
    for i in range(items.size):
        if items[i] == np.uint64(0):
            continue
        now = min(max(times[i], -FARTHEST), FARTHEST)
        first = visit == 0
        if first or now - newest > pause:
            began, visit = now, 0
        if now >= began:
            visit += 1
        newest = now if first else max(newest, now)
        for h in range(ticks.size):
            tick = now // ticks[h]
            halvings = (tick >> _BITS) - bases[h]
            if first or halvings > 0:
                bases[h] += halvings
                for d in range(3):
                    for place in range(starts[d], starts[d] + sizes[d]):
                        tally[place, h] = np.float32(np.float64(tally[place, h]) * _power(-halvings * TICKS))
            weights[h] = _power(tick - bases[h] * TICKS)
        chosen = True
        for one in unchosen:
            chosen = chosen and types[i] != one
        for d in range(3):
            key = np.uint64(types[i])
            if d < 2:
                key = categories[i] if d == 0 else creators[i]
                if not chosen or key == np.uint64(0):
                    continue
            place = _place(table, tally, starts[d], sizes[d], rooms[d], key)
            sizes[d] = max(sizes[d], place + 1 - starts[d])
            for h in range(ticks.size):
                tally[place, h] = np.float32(np.float64(tally[place, h]) + weights[h])
    told = np.empty(6, np.int64)
    told[0], told[1], told[2] = newest, began, visit
    told[3:] = sizes
    used = np.zeros(table.size, np.bool_)
    for d in range(3):
        used[starts[d] : starts[d] + sizes[d]] = True
    return told, table[used], tally[used]


def fold_counts_plain(
    facts: _Ints,
    keys: _Keys,
    counts: _Counts,
    rooms: _Ints,
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
    every = iter(list(zip(keys.tolist(), counts, strict=True)))
    tables = [dict(islice(every, size)) for size in sizes]
    lengths = [tick * TICKS for tick in ticks.tolist()]
    events = zip(items, categories, creators, types, times.tolist(), strict=True)
    for item, category, creator, kind, time in events:
        if not item:
            continue
        now = min(max(time, -FARTHEST), FARTHEST)
        before = newest if visit else now
        newest = max(before, now)
        if not visit or now - before > pause:
            began, visit = now, 0
        visit += now >= began
        bases = [newest // length for length in lengths]
        share = np.array([_power_plain((before // n - base) * TICKS) for n, base in zip(lengths, bases, strict=True)])
        passed = zip(ticks.tolist(), bases, strict=True)
        weights = np.array([_power_plain(now // tick - base * TICKS) for tick, base in passed])
        chosen = kind not in unchosen
        for table, room, key in zip(
            tables, rooms, (chosen * int(category), chosen * int(creator), int(kind)), strict=True
        ):
            for one, count in table.items():
                table[one] = (count.astype(np.float64) * share).astype(np.float32)
            if key or table is tables[2]:
                _add_plain(table, int(room), key, weights)
    told = np.array([newest, began, visit, *map(len, tables)], np.int64)
    cells = [cell for table in tables for cell in table.items()]
    tally = np.array([count for _, count in cells], np.float32).reshape(len(cells), ticks.size)
    return told, np.array([key for key, _ in cells], np.uint64), tally


def _add_plain(
    table: dict[int, npt.NDArray[np.float32]], room: int, key: int, weights: npt.NDArray[np.float64]
) -> None:
    """Adds to a key's counts; a new key takes the place of the least one, so the order of the others stays."""
    if key not in table and len(table) == room:
        least = min(table, key=lambda one: (table[one][-1], one))
        cells = [(key, np.zeros(weights.size, np.float32)) if one == least else (one, c) for one, c in table.items()]
        table.clear()
        table.update(cells)
    before = table.get(key, np.zeros(weights.size, np.float32))
    table[key] = (before.astype(np.float64) + weights).astype(np.float32)
