"""Numba kernels of what decays; each has a plain twin beside it, `<name>_plain`.

A half-life has 128 ticks, which are counted since the epoch, so decays compose exactly. What is left after some ticks
is a product of correctly rounded roots: a kernel, its twin and any other machine agree to the bit.
"""

from __future__ import annotations

import math
from itertools import islice

import numba as nb
import numpy as np
import numpy.typing as npt

TICKS = 128
"""Ticks per half-life."""

FARTHEST = 1 << 61
"""Times beyond this, in ms, are taken for it, so that differences of times fit."""

_POWER = 7
_Ints = npt.NDArray[np.int64]
_Keys = npt.NDArray[np.uint64]
_Counts = npt.NDArray[np.float32]


def _halves() -> npt.NDArray[np.float64]:
    """2 ** (-i / 128) for i in 0 .. 127, float64."""
    halves, root = np.ones(TICKS, np.float64), 0.5
    for bit in reversed(range(_POWER)):
        root = math.sqrt(root)
        halves[(np.arange(TICKS) >> bit) & 1 == 1] *= root
    return halves


_HALVES = _halves()
_POWERS = 2.0 ** -np.arange(256, dtype=np.float64)  # exact; what was halved more often than this is nothing


@nb.njit(cache=True)
def _left(ticks: int) -> float:
    """What is left after so many ticks."""
    halvings = ticks >> _POWER
    if halvings >= _POWERS.size:
        return 0.0
    return _HALVES[ticks & (TICKS - 1)] * _POWERS[halvings]  # type: ignore[no-any-return]


def _left_plain(ticks: int) -> float:
    """The plain twin of `_left`."""
    return float(_HALVES[ticks % TICKS] * _POWERS[ticks // TICKS]) if ticks // TICKS < _POWERS.size else 0.0


@nb.njit(cache=True)
def left(now: int, then: int, ticks: _Ints) -> npt.NDArray[np.float64]:
    """What is left, at a time, of something at an earlier one.

    Args:
        now: The time, ms.
        then: The time before, ms; at a later one nothing has gone yet.
        ticks: Length of a tick of each horizon, ms; int64 [h].

    Returns:
        float64 [h], each in [0, 1].
    """
    out = np.empty(ticks.size, np.float64)
    for h in range(ticks.size):
        passed = min(max(now, -FARTHEST), FARTHEST) // ticks[h] - min(max(then, -FARTHEST), FARTHEST) // ticks[h]
        out[h] = _left(max(passed, 0))
    return out


def left_plain(now: int, then: int, ticks: _Ints) -> npt.NDArray[np.float64]:
    """The plain twin of `left`."""
    first, last = (min(max(time, -FARTHEST), FARTHEST) for time in (then, now))
    return np.array([_left_plain(max(last // tick - first // tick, 0)) for tick in ticks.tolist()], np.float64)


@nb.njit(cache=True)
def _add(keys: _Keys, counts: _Counts, size: int, key: np.uint64, weights: npt.NDArray[np.float64]) -> int:
    """Adds float64 [h] to a key's counts, in the place of the least one where there is no room; returns the size."""
    place = 0
    while place < size and keys[place] != key:
        place += 1
    if place == size:
        if size < keys.size:
            size += 1
        else:
            place, long = 0, counts.shape[1] - 1
            for at in range(1, size):
                equal = counts[at, long] == counts[place, long]
                if counts[at, long] < counts[place, long] or (equal and keys[at] < keys[place]):
                    place = at
        keys[place] = key
        counts[place] = np.float32(0.0)
    for h in range(weights.size):
        counts[place, h] = np.float32(np.float64(counts[place, h]) + weights[h])
    return size


@nb.njit(cache=True)
def remember(
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
    """Folds events into decayed counts and into the visit; see `features.memory` for what they mean.

    Args:
        facts: Time of the newest event, beginning of the visit, events in it, and the number of keys that are
            remembered of categories, of creators and of types; int64 [6].
        keys: The keys, in this order; uint64 [k].
        counts: Their counts, decayed to the newest event; float32 [k, h].
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
    for i in range(items.size):
        if items[i] == np.uint64(0):
            continue
        now = min(max(times[i], -FARTHEST), FARTHEST)
        if visit == 0:
            newest = now
        if visit == 0 or now - newest > pause:
            began, visit = now, 0
        if now >= began:
            visit += 1
        for h in range(ticks.size):
            passed = now // ticks[h] - newest // ticks[h]
            weights[h] = _left(max(-passed, 0))
            if passed > 0:
                share = _left(passed)
                for d in range(3):
                    for place in range(starts[d], starts[d] + sizes[d]):
                        tally[place, h] = np.float32(np.float64(tally[place, h]) * share)
        newest = max(newest, now)
        chosen = True
        for one in unchosen:
            chosen = chosen and types[i] != one
        for d in range(3):
            key = np.uint64(types[i])
            if d < 2:
                key = categories[i] if d == 0 else creators[i]
                if not chosen or key == np.uint64(0):
                    continue
            room = slice(starts[d], starts[d] + rooms[d])
            sizes[d] = _add(table[room], tally[room], sizes[d], key, weights)
    told = np.empty(6, np.int64)
    told[0], told[1], told[2] = newest, began, visit
    told[3:] = sizes
    used = np.zeros(table.size, np.bool_)
    for d in range(3):
        used[starts[d] : starts[d] + sizes[d]] = True
    return told, table[used], tally[used]


def remember_plain(
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
    """The plain twin of `remember`."""
    newest, began, visit, *sizes = facts.tolist()
    every = iter(list(zip(keys.tolist(), counts, strict=True)))
    tables = [dict(islice(every, size)) for size in sizes]
    events = zip(items, categories, creators, types, times.tolist(), strict=True)
    for item, category, creator, kind, time in events:
        if not item:
            continue
        now = min(max(time, -FARTHEST), FARTHEST)
        newest = newest if visit else now
        if not visit or now - newest > pause:
            began, visit = now, 0
        visit += now >= began
        share, weights = left_plain(now, newest, ticks), left_plain(newest, now, ticks)
        newest = max(newest, now)
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
    """The plain twin of `_add`: a new key takes the place of the least one, so the order of the others stays."""
    if key not in table and len(table) == room:
        least = min(table, key=lambda one: (table[one][-1], one))
        cells = [(key, np.zeros(weights.size, np.float32)) if one == least else (one, c) for one, c in table.items()]
        table.clear()
        table.update(cells)
    before = table.get(key, np.zeros(weights.size, np.float32))
    table[key] = (before.astype(np.float64) + weights).astype(np.float32)
