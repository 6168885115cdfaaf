"""Golden requests: made-up users whose right answers travel in the bundle.

Export writes the answers down, serving asks for them again before a bundle may serve. Both send the made-up events
down the path that real ones take: records, a fold, the stored bytes, and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.catalog import Catalog
from features.histories import KEYS, Logged, records_of
from features.keys import event_type_keys, item_keys
from features.profile import Profile, empty, fold
from features.profile_codec import decode, encode
from features.records import ENTRY

TOP = 10
"""Number of best items that a golden answer names."""


def profile_of(events: Sequence[Mapping[str, Any]], catalog: Catalog) -> Profile:
    """Returns the profile that serving would read of a user with these events.

    The older half is folded, the newer half still lies in the tail, in no order, so that both are put to the test.

    Args:
        events: `item_id`, `event_type`, `timestamp` (ms) and `value` (None if it has none), oldest first; and
            `category_key` and `creator_key` if the item had others when the event came.
        catalog: The items, whose categories and creators are looked up as at ingest.
    """
    logged = Logged.of(pa.table({name: pa.array([event.get(name) for event in events], pa.uint64()) for name in KEYS}))
    records, _ = records_of(
        item_keys([event["item_id"] for event in events]),
        event_type_keys([event["event_type"] for event in events]),
        [event["timestamp"] for event in events],
        [np.nan if event["value"] is None else event["value"] for event in events],
        logged,
        catalog,
        catalog.columns,
    )
    half = len(events) // 2
    tail = np.zeros(len(events) - half, ENTRY)
    tail["log_id"], tail["record"] = np.arange(half, len(events)) + 1, records[half:]
    return decode(encode(fold(empty(), records[:half], half)) + tail[::-1].tobytes())


def largest_difference(answer: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Returns the largest difference between two answers, relative to the largest number expected if that is above 1.

    Returns:
        Infinity if the shapes differ or a number is not finite; 0 for two empty answers.
    """
    if answer.shape != expected.shape or not (np.isfinite(answer).all() and np.isfinite(expected).all()):
        return float("inf")
    if not answer.size:
        return 0.0
    # Relative only above 1: near 0 a tiny difference would be a large share.
    difference = np.abs(answer.astype(np.float64) - expected.astype(np.float64)).max()
    return float(difference / max(1.0, np.abs(expected).max()))
