"""What people of a segment like: the table of the rung below item neighbours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from features.catalog_columns import CatalogColumns
from training.data.clock import newest_of
from training.data.histories import UserHistories
from training.data.interactions import Interactions

PEOPLE = 10
"""People that a segment needs: what fewer like would be theirs to tell."""

POPULAR = 200
"""Number of items kept of each segment."""

_EVENTS = 20_000_000
_DAY_MS = 86_400_000

Table = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


def segments_of(data: Interactions, columns: CatalogColumns) -> npt.NDArray[np.uint64]:
    """The segment of each person after all of their events, as serving reads it; 0 for none; uint64 `[U]`."""
    histories = UserHistories(data, columns)
    return np.array([histories.whole(person).segment() for person in range(data.offsets.size - 1)], np.uint64)


def popular_in_segments(data: Interactions, columns: CatalogColumns, recent_days: float) -> dict[int, Table]:
    """What the people of each segment like: what is popular with them now, and among equals what always was.

    Args:
        data: All events; of very many a sample of the people is taken.
        columns: The catalogue.
        recent_days: Days before the newest event that count as now; all of them where there are no times.

    Returns:
        By key of the category: rows int32 `[<= POPULAR]`, best first, and their scores.
    """
    some = data.sample(np.diff(data.offsets), _EVENTS, seed=0)
    keys, segment = np.unique(segments_of(some, columns), return_inverse=True)
    owner = some.owner()
    liked = some.seen & (keys[segment[owner]] != 0)
    newest = newest_of(some)
    recent = (some.timestamps > newest - recent_days * _DAY_MS) & (some.timestamps <= newest) | some.ordered_only
    pairs, place = np.unique(segment[owner[liked]] * some.items + some.rows[liked], return_inverse=True)
    now, ever = np.bincount(place, recent[liked], pairs.size), np.bincount(place, minlength=pairs.size)
    scores = (np.log1p(now) + 1e-3 * np.log1p(ever)).astype(np.float32)
    of, rows = pairs // some.items, (pairs % some.items).astype(np.int32)
    tables = {}
    for at in np.flatnonzero((np.bincount(segment, minlength=keys.size) >= PEOPLE) & (keys != 0)).tolist():
        own = np.flatnonzero(of == at)
        best = own[np.argsort(-scores[own], kind="stable")[:POPULAR]]
        tables[int(keys[at])] = rows[best], scores[best]
    return tables
