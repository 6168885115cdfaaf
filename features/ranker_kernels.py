"""The kernel that fills the inputs of the ranker; its plain twin is `features.ranker_plain`.

One pass over the user's events makes a table per kind of key (item, creator, category, class of duration): of each key
its share, its count and its rates, ready to be written. Then each candidate costs one look-up per table. Without
fastmath and with a fixed order of additions, a candidate's values never depend on the other candidates.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from features.action_rates import MATCH_STRENGTH, USER_STRENGTH
from features.decayed_counts import VISIT_MS
from features.jit import kernel
from features.kernels import place, pulled_log_odds, tallied
from features.model_inputs import RANKER_FEATURES

(
    RELEVANCE,
    POPULARITY,
    RECENT_POPULARITY,
    CATEGORY_AFFINITY,
    CREATOR_AFFINITY,
    PRICE,
    PRICE_KNOWN,
    HISTORY_LENGTH,
    TRAINED,
    DURATION,
    DURATION_KNOWN,
    AGE,
    RECENCY,
    SHOWN_BEFORE,
    POSITION,
    ITEM_SHOWN,
    CREATOR_SHOWN,
    ITEM_PAUSE,
    ITEM_IN_VISIT,
    CATEGORY_HOUR,
    CATEGORY_DAY,
    CATEGORY_MONTH,
    CREATOR_HOUR,
    CREATOR_DAY,
    CREATOR_MONTH,
    ACTIVITY_DAY,
    ACTIVITY_MONTH,
    VISIT_LENGTH,
    VISIT_MINUTES,
    VISIT_CATEGORY,
) = range(len(RANKER_FEATURES))
"""Columns of the inputs, in the order of `RANKER_FEATURES`."""

_COMMON = len(RANKER_FEATURES)
_MINUTE_MS, _HOUR_MS, _DAY_MS = 60_000, 3_600_000, 86_400_000
_HALF_POWER = 0.5**0.5  # two classes of duration per doubling

# Columns of the weights of events, and of the tables made from them; the rates of the actions follow.
_READ, _READ_IN_VISIT, _IN_VISIT, _COUNT, _NEWEST = range(5)
_FACTS = 5

_F32 = npt.NDArray[np.float32]
_F64 = npt.NDArray[np.float64]
_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_U64 = npt.NDArray[np.uint64]
_Bool = npt.NDArray[np.bool_]


class CandidateArrays(NamedTuple):
    """The candidates: rows int32 [n], relevance float32 [n], positions int32 [n] or [0] outside of a logged slate."""

    rows: _I32
    relevance: _F32
    positions: _I32


class EventArrays(NamedTuple):
    """The user's events, see `features.assemble.History`."""

    rows: _I32
    types: _I32
    categories: _U64
    creators: _U64
    timestamps: _I64
    values: _F32
    chosen: _Bool
    kinds: _I32


class DecayedArrays(NamedTuple):
    """The user's decayed counts, see `features.decayed_counts`, and the decay of each horizon float64 [3]."""

    facts: _I64
    keys: _U64
    counts: _F32
    factors: _F64


class EventDecays(NamedTuple):
    """The weights of an event by the number of events after it, and of showings by the showings after; float64 [k].

    They are inputs and no constants of the kernel, so that a test can see that a changed one is caught.
    """

    taste: _F64
    long: _F64
    short: _F64


class ItemArrays(NamedTuple):
    """The columns of the catalogue that features read, see `features.catalog_columns`."""

    category: _U64
    creator: _U64
    price: _F32
    duration: _F32
    popularity: _F32
    recent_popularity: _F32
    trained: _Bool
    available_from: _I64
    statistics: _F32


class ActionArrays(NamedTuple):
    """The reading of the actions, see `features.action_rates`; surface float32 [A] is that of the slate's surface."""

    shown: _Bool
    acted: _Bool
    least: _F64
    base: _F64
    surface: _F32


@kernel(error_model="numpy")
def fill_ranker_features(
    candidates: CandidateArrays,
    events: EventArrays,
    decayed: DecayedArrays,
    decays: EventDecays,
    items: ItemArrays,
    actions: ActionArrays,
    now_ms: int,
    more: int,
) -> _F32:
    """Returns the inputs of the ranker in the order of `features.model_inputs.ranker_names`; float32 [n, F].

    The last `more` of the columns are not filled: they are those of `features.declared_kernels`.
    """
    weights, totals, brief = _event_weights(events, decayed, decays, actions, now_ms)
    rates = _user_rates(totals, brief, actions)
    item_keys, duration_keys = _event_keys(events, items)
    tables = (
        _table(item_keys, weights, totals, rates[0]),
        _table(events.creators, weights, totals, rates[0]),
        _table(events.categories, weights, totals, rates[0]),
        _table(duration_keys, weights, totals, rates[0]),
    )
    counts = _decayed(decayed, now_ms)
    width = _COMMON + 11 * actions.base.size + more
    shared = _shared_values(events, decayed, actions, rates, counts[0], now_ms, width)
    out = np.empty((candidates.rows.size, width), np.float32)
    for i in range(candidates.rows.size):
        # Everything that is the same for all candidates first; the zeros stay where nothing is known of an item.
        out[i] = shared
        row = candidates.rows[i]
        out[i, RELEVANCE] = candidates.relevance[i]
        if candidates.positions.size:
            out[i, POSITION] = math.log1p(np.float64(candidates.positions[i]))
        _fill_item(out[i], items, row, actions.base.size, now_ms)
        _fill_matches(out[i], tables, items, row, actions.base.size)
        if now_ms:
            _fill_decayed(out[i], decayed, counts[1], items, row)
    return out


@kernel(error_model="numpy")
def _event_weights(
    events: EventArrays, decayed: DecayedArrays, decays: EventDecays, actions: ActionArrays, now_ms: int
) -> tuple[_F64, _F64, _F64]:
    """Returns the weights of each event [h, 5 + 2A], their sums [5 + 2A], and those of the short-term rates [2A].

    The columns: read as taste; the same in the visit, if that goes on; in the newest visit; 1; 0, the place of what
    `_table` adds; then the showings and the actions of each action, which decay by the showings after them.
    """
    count, length = actions.base.size, events.rows.size
    weights, brief = np.zeros((length, _FACTS + 2 * count), np.float64), np.zeros(2 * count, np.float64)
    _weigh_taste(weights, events, decayed, decays, now_ms)
    for a in range(count):
        showings = 0
        for j in range(length):
            showings += actions.shown[a, events.types[j]]
        later = showings
        for j in range(length):
            kind = events.types[j]
            later -= actions.shown[a, kind]
            # An action before the first showing in the ring has no denominator.
            enough = np.isneginf(actions.least[a]) or np.float64(events.values[j]) >= actions.least[a]
            acted = actions.acted[a, kind] and enough and later < showings
            long, short = decays.long[later], decays.short[later]
            if actions.shown[a, kind]:
                weights[j, _FACTS + a] = long
                brief[a] += short
            if acted:
                weights[j, _FACTS + count + a] = long
                brief[count + a] += short
    totals = np.zeros(_FACTS + 2 * count, np.float64)
    for j in range(length):
        for k in range(totals.size):
            totals[k] += weights[j, k]
    return weights, totals, brief


@kernel(error_model="numpy")
def _weigh_taste(weights: _F64, events: EventArrays, decayed: DecayedArrays, decays: EventDecays, now_ms: int) -> None:
    """Fills the columns of `_event_weights` that no action decides."""
    length, visiting = events.rows.size, _visiting(decayed, now_ms)
    for j in range(length):
        read = events.chosen[j] or events.types[j] != 0
        weights[j, _READ] = decays.taste[length - 1 - j] if read else 0.0
        in_visit = decayed.facts[2] != 0 and events.timestamps[j] >= decayed.facts[1]
        weights[j, _READ_IN_VISIT] = 1.0 if read and visiting and in_visit else 0.0
        weights[j, _IN_VISIT] = 1.0 if in_visit and decayed.facts[0] != 0 else 0.0
        weights[j, _COUNT] = 1.0


@kernel(error_model="numpy")
def _visiting(decayed: DecayedArrays, now_ms: int) -> bool:
    """Returns True if the newest visit goes on; the twin of `DecayedCounts.visiting`."""
    return now_ms != 0 and decayed.facts[2] != 0 and now_ms - decayed.facts[0] <= VISIT_MS


@kernel(error_model="numpy")
def _user_rates(totals: _F64, brief: _F64, actions: ActionArrays) -> _F64:
    """Returns the user's long-term and short-term log-odds of each action; float64 [2, A]."""
    count = actions.base.size
    rates = np.empty((2, count), np.float64)
    for a in range(count):
        # The short term is pulled towards the long term, and that towards the average.
        shown, acted = totals[_FACTS + a], totals[_FACTS + count + a]
        rates[0, a] = pulled_log_odds(acted, shown, actions.base[a], USER_STRENGTH)
        rates[1, a] = pulled_log_odds(brief[count + a], brief[a], rates[0, a], USER_STRENGTH)
    return rates


@kernel(error_model="numpy")
def _event_keys(events: EventArrays, items: ItemArrays) -> tuple[_U64, _U64]:
    """Returns the key of each event's item, 1 + row, and of its class of duration; 0 if it is unknown."""
    item_keys, duration_keys = np.zeros(events.rows.size, np.uint64), np.zeros(events.rows.size, np.uint64)
    for j in range(events.rows.size):
        row = events.rows[j]
        if row >= 0:
            item_keys[j] = row + 1
            duration_keys[j] = _duration_key(items.duration[row])
    return item_keys, duration_keys


@kernel(error_model="numpy")
def _duration_key(seconds: np.float32) -> int:
    """Returns the class of like durations, 0 if it is unknown."""
    if not np.isfinite(seconds):
        return 0
    # Not by a logarithm, whose last bit differs between machines.
    fraction, power = math.frexp(np.float64(seconds))
    return min(max(2 * power + (1 if fraction >= _HALF_POWER else 0), 0), 98) + 1


@kernel(error_model="numpy")
def _table(keys: _U64, weights: _F64, totals: _F64, rates: _F64) -> tuple[_U64, _F64]:
    """Returns what is known of each key: a hash table, and facts and log-odds above the user's by slot [s, 5 + A].

    The facts: share of taste, share of the visit, events in the visit, log1p of the count, log1p of the events since
    the newest. Where the table has no key they are 0.
    """
    slots, sums = tallied(keys, weights)
    count = rates.size
    for j in range(keys.size):
        if keys[j] != np.uint64(0):
            sums[place(slots, keys[j]), _NEWEST] = math.log1p(np.float64(keys.size - 1 - j))
    for slot in range(slots.size):
        if slots[slot] == np.uint64(0):
            continue
        for k in (_READ, _READ_IN_VISIT):
            sums[slot, k] = sums[slot, k] / totals[k] if totals[k] > 0.0 else 0.0
        sums[slot, _COUNT] = math.log1p(sums[slot, _COUNT])
        for a in range(count):
            shown, acted = sums[slot, _FACTS + a], sums[slot, _FACTS + count + a]
            sums[slot, _FACTS + a] = pulled_log_odds(acted, shown, rates[a], MATCH_STRENGTH) - rates[a]
    return slots, sums


@kernel(error_model="numpy")
def _decayed(decayed: DecayedArrays, now_ms: int) -> _F64:
    """Returns counts decayed to a time, then their log1p, by key and horizon; 0 without a time; float64 [2, k, 3]."""
    counts = np.zeros((2, decayed.counts.shape[0], decayed.counts.shape[1]), np.float64)
    if now_ms:
        for k in range(counts.shape[1]):
            for h in range(counts.shape[2]):
                counts[0, k, h] = np.float64(decayed.counts[k, h]) * decayed.factors[h]
                counts[1, k, h] = math.log1p(counts[0, k, h])
    return counts


@kernel(error_model="numpy")
def _shared_values(
    events: EventArrays,
    decayed: DecayedArrays,
    actions: ActionArrays,
    rates: _F64,
    counts: _F64,
    now_ms: int,
    width: int,
) -> _F32:
    """Returns the values that are the same for every candidate, 0 elsewhere; float32 [F]."""
    out, count, length = np.zeros(width, np.float32), actions.base.size, events.rows.size
    out[HISTORY_LENGTH] = math.log1p(np.float64(length))
    # Of an item without an event, all of the events are newer than its last.
    out[ITEM_PAUSE] = out[HISTORY_LENGTH]
    for a in range(count):
        out[_COMMON + a] = rates[0, a] - actions.base[a]
        out[_COMMON + count + a] = rates[1, a] - actions.base[a]
        out[_COMMON + 9 * count + a] = actions.surface[a]
    # Without a time, as in data that has order only, nothing can be said of decay.
    if now_ms:
        _fill_activity(out, events, decayed, actions, counts, now_ms)
    return out


@kernel(error_model="numpy")
def _fill_activity(
    out: _F32, events: EventArrays, decayed: DecayedArrays, actions: ActionArrays, counts: _F64, now_ms: int
) -> None:
    """Fills the columns about how active the user is at a time."""
    length = events.rows.size
    if length:
        # A request may carry an older time than an event that was sent by a clock ahead: then no time has passed.
        out[RECENCY] = math.log1p(max(now_ms - events.timestamps[length - 1], 0) / _HOUR_MS)
    start = decayed.facts[3] + decayed.facts[4]
    kinds = decayed.facts[5]
    day, month = 0.0, 0.0
    for k in range(kinds):
        day += counts[start + k, 1]
        month += counts[start + k, 2]
    out[ACTIVITY_DAY], out[ACTIVITY_MONTH] = math.log1p(day), math.log1p(month)
    if _visiting(decayed, now_ms):
        out[VISIT_LENGTH] = math.log1p(np.float64(decayed.facts[2]))
        out[VISIT_MINUTES] = math.log1p(max(now_ms - decayed.facts[1], 0) / _MINUTE_MS)
    for a in range(actions.base.size):
        shown, acted = 0.0, 0.0
        for k in range(kinds):
            shown += counts[start + k, 2] * actions.shown[a, events.kinds[k]]
            acted += counts[start + k, 2] * actions.acted[a, events.kinds[k]]
        rate = pulled_log_odds(acted, shown, actions.base[a], USER_STRENGTH)
        out[_COMMON + 10 * actions.base.size + a] = rate - actions.base[a]


@kernel(error_model="numpy", inline="always")
def _fill_item(out: _F32, items: ItemArrays, row: int, actions: int, now_ms: int) -> None:
    """Fills the columns that are about the item alone."""
    out[POPULARITY], out[RECENT_POPULARITY] = items.popularity[row], items.recent_popularity[row]
    # In float64: the float32 log1p of a library may depend on where in a vector register a value falls.
    if np.isfinite(items.price[row]):
        out[PRICE], out[PRICE_KNOWN] = math.log1p(np.float64(items.price[row])), 1.0
    if np.isfinite(items.duration[row]):
        out[DURATION], out[DURATION_KNOWN] = math.log1p(np.float64(items.duration[row])), 1.0
    out[TRAINED] = items.trained[row]
    since = items.available_from[row]
    if since > 0 and now_ms > since:
        out[AGE] = math.log1p((now_ms - since) / _DAY_MS)
    # A catalogue without a ranker has no statistics; then nothing is known of how often an item was shown.
    if items.statistics.shape[1] == 2 + 3 * actions:
        out[ITEM_SHOWN], out[CREATOR_SHOWN] = items.statistics[row, 0], items.statistics[row, 1]
        for k in range(3 * actions):
            out[_COMMON + 6 * actions + k] = items.statistics[row, 2 + k]


@kernel(error_model="numpy", inline="always")
def _fill_matches(out: _F32, tables: Any, items: ItemArrays, row: int, actions: int) -> None:
    """Fills the columns that are about the user's events of the same item, creator, category or duration."""
    slots, facts = tables[0]
    at = place(slots, np.uint64(row + 1))
    if slots[at] != np.uint64(0):
        out[SHOWN_BEFORE], out[ITEM_PAUSE] = facts[at, _COUNT], facts[at, _NEWEST]
        out[ITEM_IN_VISIT] = 1.0 if facts[at, _IN_VISIT] > 0.0 else 0.0
        for a in range(actions):
            out[_COMMON + 4 * actions + a] = facts[at, _FACTS + a]
    slots, facts = tables[1]
    if items.creator[row] != np.uint64(0):
        at = place(slots, items.creator[row])
        out[CREATOR_AFFINITY] = facts[at, _READ]
        for a in range(actions):
            out[_COMMON + 3 * actions + a] = facts[at, _FACTS + a]
    slots, facts = tables[2]
    if items.category[row] != np.uint64(0):
        at = place(slots, items.category[row])
        out[CATEGORY_AFFINITY], out[VISIT_CATEGORY] = facts[at, _READ], facts[at, _READ_IN_VISIT]
        for a in range(actions):
            out[_COMMON + 2 * actions + a] = facts[at, _FACTS + a]
    slots, facts = tables[3]
    key = np.uint64(_duration_key(items.duration[row]))
    if key != np.uint64(0):
        at = place(slots, key)
        for a in range(actions):
            out[_COMMON + 5 * actions + a] = facts[at, _FACTS + a]


@kernel(error_model="numpy", inline="always")
def _fill_decayed(out: _F32, decayed: DecayedArrays, logs: _F64, items: ItemArrays, row: int) -> None:
    """Fills the decayed counts of the item's category and of its creator."""
    categories = decayed.facts[3]
    for k in range(categories + decayed.facts[4]):
        # At most 40 keys: a scan is faster than a hash table.
        of_category = k < categories
        key = items.category[row] if of_category else items.creator[row]
        if decayed.keys[k] == key and key != np.uint64(0):
            begin = CATEGORY_HOUR if of_category else CREATOR_HOUR
            for h in range(logs.shape[1]):
                out[begin + h] = logs[k, h]
