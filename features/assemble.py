"""From a profile to the inputs of the models: the only road, used by training and by serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.catalog import Catalog, Columns
from features.kernels import affinity, pack_newest
from features.profile import RING, Profile, Records
from features.schema import Feature, FeatureSet

HALF_LIFE = 20
"""Number of events after which an event weighs half in an affinity."""

_RING = f"newest {RING} events"
ENCODER_FEATURES = FeatureSet(
    (
        Feature("item_vector", "the item's vector, one per event", "newest events"),
        Feature("event_type", "1 + position among the bundle's event types, 0 = unknown", "newest events", "int64"),
    )
)
RANKER_FEATURES = FeatureSet(
    (
        Feature("relevance", "inner product of user and item vector"),
        Feature("popularity", "log1p of the item's events in training", "item"),
        Feature("recent_popularity", "log1p of the item's events in the last days of training", "item"),
        Feature("category_affinity", "share of the events in the item's category, half-life 20 events", _RING),
        Feature("creator_affinity", "share of the events by the item's creator, half-life 20 events", _RING),
        Feature("price", "log1p of the item's price, 0 where unknown", "item"),
        Feature("price_known", "1 where the item has a price", "item"),
        Feature("history_length", "log1p of the number of events remembered", _RING),
        Feature("trained", "1 where the item was in the training data", "item"),
    )
)
FEATURES = FeatureSet((*ENCODER_FEATURES, *RANKER_FEATURES))

# Computed once in float64, so that training and serving read the same bits.
_DECAY = 0.5 ** (np.arange(RING, dtype=np.float64) / HALF_LIFE)


@dataclass(frozen=True, slots=True)
class History:
    """A profile's events as a catalogue and a bundle see them, oldest first; arrays of one length.

    Attributes:
        rows: Row of the item, -1 where the catalogue does not know it; int32.
        types: 1 + position among the bundle's event types, 0 where unknown; int32.
        categories: Key of the primary category as it was when the event came; uint64.
        creators: Key of the creator as it was when the event came; uint64.
        timestamps: Time of the event, ms; int64.
        values: Value of the event, NaN where it has none; float32.
    """

    rows: npt.NDArray[np.int32]
    types: npt.NDArray[np.int32]
    categories: npt.NDArray[np.uint64]
    creators: npt.NDArray[np.uint64]
    timestamps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """The number of events."""
        return self.rows.size


def history(records: Records, catalog: Catalog, type_index: Mapping[int, int]) -> History:
    """Resolves records against a catalogue.

    Args:
        records: RECORD [n], oldest first.
        catalog: Where keys become rows.
        type_index: Event type key -> 1 + position among the bundle's event types.

    An event without an item (a search) is no part of it, as it is none of a training history.
    """
    about_items = records["item"] != 0
    if not about_items.all():
        records = records[about_items]
    return History(
        catalog.rows_of_keys(np.ascontiguousarray(records["item"])),
        types_of_keys(records["event_type"], type_index),
        np.ascontiguousarray(records["category"]),
        np.ascontiguousarray(records["creator"]),
        np.ascontiguousarray(records["timestamp"]),
        np.ascontiguousarray(records["value"]),
    )


def types_of_keys(keys: npt.NDArray[np.uint32], type_index: Mapping[int, int]) -> npt.NDArray[np.int32]:
    """The model's index of each event type key, 0 where the model does not know it; int32 [n]."""
    types = np.zeros(keys.size, np.int32)
    for key, index in type_index.items():
        types[keys == key] = index
    return types


def seen_rows(profile: Profile, catalog: Catalog, seen_keys: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
    """Rows of the items that a person need not be shown again; int32 [n], unsorted, may repeat.

    Args:
        profile: The profile.
        catalog: Where keys become rows.
        seen_keys: Keys of the event types that count; an item older than the ring always counts.
    """
    records = profile.records
    recent = records["item"][np.isin(records["event_type"], seen_keys)]
    rows = catalog.rows_of_keys(np.concatenate([recent, profile.evicted]))
    return rows[rows >= 0]


def encoder_inputs(
    rows: npt.NDArray[np.int32], types: npt.NDArray[np.int32], max_length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The newest `max_length` events whose item is known, in log order, repeats kept; two int64 [length]."""
    known = np.flatnonzero(rows >= 0)[-max_length:]
    return rows[known].astype(np.int64), types[known].astype(np.int64)


def encoder_batch(
    rows: npt.NDArray[np.int32],
    types: npt.NDArray[Any],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    max_length: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`pack` of the `encoder_inputs` of many parts `starts[i]:ends[i]` of long arrays, at once.

    Args:
        rows: Row of each event's item, -1 where it is unknown; int32 [E].
        types: Type of each event; integers [E].
        starts: First event of each part; int64 [B].
        ends: One past its last; int64 [B].
        max_length: Events of a part that are kept, the newest.

    Returns:
        What `pack` returns.
    """
    packed: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]
    packed = pack_newest(rows, types, starts, ends, max_length)
    return packed


def pack(
    sequences: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pads sequences on the right to a common length of at least 1.

    Returns:
        rows int64 [B, L] and types int64 [B, L], 0 at padding, and lengths int64 [B].
    """
    lengths = np.array([rows.size for rows, _ in sequences], np.int64)
    longest = max(1, int(lengths.max(initial=0)))
    packed_rows = np.zeros((len(sequences), longest), np.int64)
    packed_types = np.zeros((len(sequences), longest), np.int64)
    for at, (rows, types) in enumerate(sequences):
        packed_rows[at, : rows.size] = rows
        packed_types[at, : types.size] = types
    return packed_rows, packed_types, lengths


def ranker_features(
    past: History, rows: npt.NDArray[np.int32], relevance: npt.NDArray[np.float32], columns: Columns
) -> npt.NDArray[np.float32]:
    """What the ranker reads of each candidate, in the order of `RANKER_FEATURES`.

    Args:
        past: The person's events; all of them when there are no more than RING, else the newest RING.
        rows: Candidates; int32 [n].
        relevance: Inner product of user and item vector; float32 [n].
        columns: The catalogue's columns.

    Returns:
        float32 [n, len(RANKER_FEATURES)]; a candidate's line never depends on the other candidates.
    """
    weights = _DECAY[: len(past)][::-1]
    price = columns.price[rows]
    known = np.isfinite(price)
    out = np.empty((rows.size, len(RANKER_FEATURES)), np.float32)
    out[:, 0] = relevance
    out[:, 1] = columns.popularity[rows]
    out[:, 2] = columns.recent_popularity[rows]
    out[:, 3] = affinity(columns.category[rows], past.categories, weights)
    out[:, 4] = affinity(columns.creator[rows], past.creators, weights)
    # In float64: the float32 log1p of numpy depends on where in a vector register a value falls.
    out[:, 5] = np.log1p(np.where(known, price, 0.0).astype(np.float64))
    out[:, 6] = known
    out[:, 7] = np.log1p(float(len(past)))
    out[:, 8] = columns.trained[rows]
    return out
