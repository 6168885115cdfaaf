"""Computes the popular items of each segment of users: the table of the rung below item neighbours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from features.catalog_columns import CatalogColumns
from training.data.clock import newest_of
from training.data.histories import UserHistories
from training.data.interactions import Interactions

FEWEST_USERS = 10
"""Users that a segment needs: the likes of fewer could be traced to one of them."""

POPULAR = 200
"""Number of items kept of each segment."""

_EVENTS = 20_000_000  # most events that are looked at; of more, a sample of the users is taken
_DAY_MS = 86_400_000

Table = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


def segments_of(data: Interactions, columns: CatalogColumns) -> npt.NDArray[np.uint64]:
    """Returns the segment of each user after all of their events, as serving reads it; 0 for none; uint64 `[U]`."""
    histories = UserHistories(data, columns)
    return np.array([histories.whole(user).segment() for user in range(data.offsets.size - 1)], np.uint64)


def popular_in_segments(data: Interactions, columns: CatalogColumns, recent_days: float) -> dict[int, Table]:
    """Ranks the items of each segment by recent popularity with its users, and among equals by that of all time.

    Args:
        data: All events; of very many a sample of the users is taken.
        columns: The catalogue.
        recent_days: Days before the newest event that count as now; all of them where there are no times.

    Returns:
        By key of the category: rows int32 `[<= POPULAR]`, best first, and their scores.
    """
    sample = data.sample(np.diff(data.offsets), _EVENTS, seed=0)
    keys, segment = np.unique(segments_of(sample, columns), return_inverse=True)
    owner = sample.owner()
    is_counted = sample.positive(slice(None)) & (keys[segment[owner]] != 0)
    newest = newest_of(sample)
    is_recent = (sample.timestamps > newest - recent_days * _DAY_MS) & (sample.timestamps <= newest)
    is_recent |= sample.ordered_only
    # Segment and item as one number, counted over its different values: a table of all pairs would be mostly zeros.
    pairs, place = np.unique(segment[owner[is_counted]] * sample.items + sample.rows[is_counted], return_inverse=True)
    recent, total = np.bincount(place, is_recent[is_counted], pairs.size), np.bincount(place, minlength=pairs.size)
    scores = (np.log1p(recent) + 1e-3 * np.log1p(total)).astype(np.float32)
    segments, rows = pairs // sample.items, (pairs % sample.items).astype(np.int32)
    tables = {}
    for at in np.flatnonzero((np.bincount(segment, minlength=keys.size) >= FEWEST_USERS) & (keys != 0)).tolist():
        in_segment = np.flatnonzero(segments == at)
        best = in_segment[np.argsort(-scores[in_segment], kind="stable")[:POPULAR]]
        tables[int(keys[at])] = rows[best], scores[best]
    return tables
