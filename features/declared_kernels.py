"""The kernel that fills the declared features, and its plain twin."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from features.jit import kernel
from features.kernels import log_odds_plain, place, pulled_log_odds, tallied

SAME = ("any", "item", "category", "creator")
"""Things that an event shares with the candidates for which it counts; `PastArrays.same` holds places in this list."""

ANY, ITEM, CATEGORY, CREATOR = range(len(SAME))

_F32 = npt.NDArray[np.float32]
_F64 = npt.NDArray[np.float64]
_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_U64 = npt.NDArray[np.uint64]
_Bool = npt.NDArray[np.bool_]


class PastArrays(NamedTuple):
    """The reading of the user's events, by declared feature of the past; P features, T event types.

    Attributes:
        counted: By type of event, 1 + its position, whether it counts; bool [P, 1 + T].
        shown: The same, whether it shows an item; bool [P, 1 + T].
        same: What it has to share with the candidate, a place in `SAME`; int64 [P].
        window_ms: Milliseconds before the request that count, 0 for all; int64 [P].
        is_rate: Log-odds are wanted, and no count; bool [P].
        prior: Showings that the base weighs; float64 [P].
        base: Log-odds that are expected; float64 [P].
    """

    counted: _Bool
    shown: _Bool
    same: _I64
    window_ms: _I64
    is_rate: _Bool
    prior: _F64
    base: _F64


class PastEvents(NamedTuple):
    """The user's events, see `features.assemble.History`."""

    rows: _I32
    types: _I32
    categories: _U64
    creators: _U64
    timestamps: _I64


class DeclaredColumns(NamedTuple):
    """Columns of the catalogue: declared values float32 [N, K of items], keys of category and creator uint64 [N]."""

    values: _F32
    category: _U64
    creator: _U64


@kernel(error_model="numpy")
def fill_declared(
    out: _F32,
    first: int,
    rows: _I32,
    items: DeclaredColumns,
    request: _F32,
    past: PastArrays,
    events: PastEvents,
    now_ms: int,
) -> None:
    """Fills the declared columns in the order of `features.declared.Declared.names`.

    Args:
        out: Inputs of the ranker; float32 [n, F].
        first: First of the columns to fill.
        rows: Candidates; int32 [n].
        items: What the catalogue knows.
        request: Values of the request; float32 [K of requests].
        past: How events are counted.
        events: The user's events.
        now_ms: Time of the request, ms; 0 if there is none: then no event lies in a window.
    """
    weights = _counted(past, events, now_ms)
    of_items = items.values.shape[1]
    totals = _totals(weights)
    keys = np.zeros(events.rows.size, np.uint64)
    for j in range(keys.size):
        keys[j] = events.rows[j] + 1
    tables = (tallied(keys, weights), tallied(events.categories, weights), tallied(events.creators, weights))
    # Each candidate by itself, so that its values never depend on the others.
    for i in range(rows.size):
        row, at = rows[i], first + of_items + request.size
        for k in range(of_items):
            out[i, first + k] = items.values[row, k]
        for k in range(request.size):
            out[i, first + of_items + k] = request[k]
        for p in range(past.same.size):
            out[i, at + p] = _past_value(past, p, totals, tables, items, row)


@kernel(error_model="numpy", inline="always")
def _past_value(past: PastArrays, p: int, totals: _F64, tables: Any, items: DeclaredColumns, row: int) -> float:
    """Returns the value of feature `p` of the past for an item."""
    acted, shown = totals[p], totals[past.same.size + p]
    if past.same[p] != ANY:
        key, table = np.uint64(row + 1), tables[0]
        if past.same[p] == CATEGORY:
            key, table = items.category[row], tables[1]
        elif past.same[p] == CREATOR:
            key, table = items.creator[row], tables[2]
        # Key 0 is no category or creator: such items share nothing with any event.
        slots, sums = table
        at = place(slots, key) if key != np.uint64(0) else np.uint64(0)
        known = key != np.uint64(0) and slots[at] == key
        acted, shown = (sums[at, p], sums[at, past.same.size + p]) if known else (0.0, 0.0)
    if past.is_rate[p]:
        odds: float = pulled_log_odds(acted, shown, past.base[p], past.prior[p]) - past.base[p]
        return odds
    return math.log1p(acted)


@kernel(error_model="numpy")
def _totals(weights: _F64) -> _F64:
    """Returns the sums of weights [h, w] over the events, in their order; float64 [w]."""
    totals = np.zeros(weights.shape[1], np.float64)
    for j in range(weights.shape[0]):
        for k in range(totals.size):
            totals[k] += weights[j, k]
    return totals


@kernel(error_model="numpy")
def _counted(past: PastArrays, events: PastEvents, now_ms: int) -> _F64:
    """Returns 1 where an event counts, and where it shows, for each feature; float64 [h, 2P]."""
    count = past.same.size
    weights = np.zeros((events.rows.size, 2 * count), np.float64)
    for j in range(events.rows.size):
        for p in range(count):
            # An event of a clock ahead lies in every window, as it does for the built-in features.
            window = past.window_ms[p]
            if window == 0 or (now_ms != 0 and now_ms - events.timestamps[j] <= window):
                weights[j, p] = past.counted[p, events.types[j]]
                weights[j, count + p] = past.shown[p, events.types[j]]
    return weights


def fill_declared_plain(
    out: _F32,
    first: int,
    rows: _I32,
    items: DeclaredColumns,
    request: _F32,
    past: PastArrays,
    events: PastEvents,
    now_ms: int,
) -> None:
    """The plain twin of `fill_declared`."""
    behind = first + items.values.shape[1] + request.size
    out[:, first : first + items.values.shape[1]] = items.values[rows]
    out[:, first + items.values.shape[1] : behind] = request
    log1p = np.vectorize(math.log1p, otypes=[np.float64])
    for p in range(past.same.size):
        window = past.window_ms[p]
        in_window = (now_ms > 0) & (now_ms - events.timestamps <= window) if window else np.ones(events.rows.size, bool)
        candidate, event = {
            ANY: (np.ones(rows.size, np.uint64), np.ones(events.rows.size, np.uint64)),
            ITEM: ((rows + 1).astype(np.uint64), (events.rows + 1).astype(np.uint64)),
            CATEGORY: (items.category[rows], events.categories),
            CREATOR: (items.creator[rows], events.creators),
        }[int(past.same[p])]
        shares = (candidate[:, None] == event[None]) & (event != 0) & in_window
        acted, shown = (
            (shares & marks[p, events.types]).sum(1).astype(np.float64) for marks in (past.counted, past.shown)
        )
        if past.is_rate[p]:
            base = np.full((rows.size, 1), past.base[p])
            odds = log_odds_plain(acted[:, None], shown[:, None], base, float(past.prior[p]))
            out[:, behind + p] = odds[:, 0] - past.base[p]
        else:
            out[:, behind + p] = log1p(acted)
