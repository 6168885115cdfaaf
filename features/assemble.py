"""Assembles the inputs of the models from a profile: the same functions for training and for serving.

A candidate's features must be the same to the bit in both, or the ranker would meet other numbers than it learned from.
So the functions here take arrays only, and do nothing whose result depends on the size of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from features.action_rates import DECAYS as RATE_DECAYS
from features.action_rates import ActionRates
from features.catalog import Catalog
from features.catalog_columns import CatalogColumns
from features.controls import Controls, no_controls
from features.decay_kernels import decay_factors
from features.decayed_counts import TICK_MS, DecayedCounts
from features.decayed_counts import empty as no_counts
from features.declared import NONE_DECLARED, Declared
from features.declared_kernels import DeclaredColumns, PastArrays, PastEvents, fill_declared
from features.event_types import NEGATIVE_EVENT_TYPES, PASSIVE_EVENT_TYPES
from features.kernels import are_among, pack_newest
from features.keys import event_type_key, event_type_keys
from features.model_inputs import HALF_LIFE
from features.profile import RING, Profile
from features.ranker_kernels import (
    ActionArrays,
    CandidateArrays,
    DecayedArrays,
    EventArrays,
    EventDecays,
    ItemArrays,
    fill_ranker_features,
)

_UNCHOSEN = event_type_keys((*PASSIVE_EVENT_TYPES, *NEGATIVE_EVENT_TYPES))
_NO_POSITIONS = np.empty(0, np.int32)
_NO_VALUES = np.empty(0, np.float32)
# Computed once in float64, so that training and serving read the same bits.
_DECAYS = EventDecays(0.5 ** (np.arange(RING, dtype=np.float64) / HALF_LIFE), *RATE_DECAYS)


@dataclass(frozen=True, slots=True)
class History:
    """A profile's events as a catalogue and a bundle see them, oldest first; arrays of one length.

    Attributes:
        rows: Row of the item, -1 if the catalogue does not know it; int32.
        types: 1 + position among the bundle's event types, 0 if unknown; int32.
        categories: Key of the primary category as it was when the event came; uint64.
        creators: Key of the creator as it was when the event came; uint64.
        timestamps: Time of the event, ms; int64.
        values: Value of the event, NaN if it has none; float32.
        chosen: The user chose the item: it was neither only shown nor refused; bool.
        decayed_counts: The sums of all events of the profile, also of those older than these.
        kinds: As `types`, of the event types in the decayed counts; int32 [k].
    """

    rows: npt.NDArray[np.int32]
    types: npt.NDArray[np.int32]
    categories: npt.NDArray[np.uint64]
    creators: npt.NDArray[np.uint64]
    timestamps: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    chosen: npt.NDArray[np.bool_]
    decayed_counts: DecayedCounts = field(default_factory=no_counts)
    kinds: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    def __len__(self) -> int:
        """Returns the number of events."""
        return self.rows.size


@dataclass(frozen=True, slots=True)
class Moment:
    """The time and place at which candidates are scored.

    Attributes:
        now_ms: Time of the request, ms; 0 if there is none, as in data that has order only.
        surface: The surface on which the slate is shown.
        positions: The place of each candidate in its slate, which only logged slates have; int32 [n].
        request_values: Declared features of the request and of the user, see `features.declared`; float32 [K].
        past: How the declared features of the user's past are counted.
    """

    now_ms: int = 0
    surface: str = ""
    positions: npt.NDArray[np.int32] | None = None
    request_values: npt.NDArray[np.float32] = field(default_factory=lambda: _NO_VALUES)
    past: PastArrays = NONE_DECLARED.past


def moment_at(
    declared: Declared,
    now_ms: int = 0,
    surface: str = "",
    context: Mapping[str, Any] | None = None,
    controls: Controls | None = None,
) -> Moment:
    """Returns the moment of a request for a model with declared features.

    Args:
        declared: The declared features of the model.
        now_ms: Time of the request, ms; 0 if there is none.
        surface: Its surface.
        context: What the caller tells about it, see `features.declared.Declared.request_values`.
        controls: The user's controls, which hold their attributes; None for none.
    """
    if not declared.features:
        return Moment(now_ms, surface)
    of_user = declared.user_values(no_controls() if controls is None else controls)
    values = np.concatenate([declared.request_values(now_ms, surface, context), of_user])
    return Moment(now_ms, surface, request_values=values, past=declared.past)


def history(profile: Profile, catalog: Catalog, type_index: Mapping[int, int]) -> History:
    """Resolves the events of a profile against a catalogue.

    An event without an item (a search) is left out, as training leaves it out of its histories.

    Args:
        profile: The profile.
        catalog: The catalogue, in which keys become rows.
        type_index: Event type key -> 1 + position among the bundle's event types.
    """
    return _history(profile, catalog.rows_of_keys(profile.records["item"].copy()), type_index)


def history_and_seen(
    profile: Profile, catalog: Catalog, type_index: Mapping[int, int], seen_keys: npt.NDArray[np.uint32]
) -> tuple[History, npt.NDArray[np.int32]]:
    """Returns the history of a profile, and the rows of the items that the user has seen; each key is looked up once.

    Args:
        profile: The profile.
        catalog: The catalogue, in which keys become rows.
        type_index: As for `history`.
        seen_keys: Keys of the event types that count; an item older than the ring always counts.

    Returns:
        The history, and rows int32 [n], unsorted, which may repeat.
    """
    records = profile.records
    rows = catalog.rows_of_keys(np.concatenate([records["item"], profile.older_items]))
    newest = rows[: records.size]
    seen = np.concatenate([newest[are_among(records["event_type"].copy(), seen_keys)], rows[records.size :]])
    return _history(profile, newest.copy(), type_index), seen[seen >= 0]


def _history(profile: Profile, rows: npt.NDArray[np.int32], type_index: Mapping[int, int]) -> History:
    """Returns the history of a profile, the rows of whose records are known."""
    records = profile.records
    about_items = records["item"] != 0
    if not about_items.all():
        records, rows = records[about_items], rows[about_items]
    # Copies, not views: the field of a single record is contiguous and may be read-only, and a kernel is compiled for
    # each kind of array that it is given.
    return History(
        rows,
        types_of_keys(records["event_type"], type_index),
        records["category"].copy(),
        records["creator"].copy(),
        records["timestamp"].copy(),
        records["value"].copy(),
        are_choices(records["event_type"]),
        *counts_and_kinds(profile.decayed_counts, type_index),
    )


def are_choices(keys: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Returns a mask of the types by which a user chooses an item, which are not showings or refusals; bool [n]."""
    # A copy, because a field of records is strided, and a kernel is compiled for each layout that it is given.
    chosen: npt.NDArray[np.bool_] = ~are_among(keys.copy(), _UNCHOSEN)
    return chosen


def are_read(past: History) -> npt.NDArray[np.bool_]:
    """Returns a mask of the events that a bundle's models read as taste; bool [n].

    A model that learned from showings or refusals knows such an event by its type. To another model the type would be
    unknown, and the item as good as chosen: there the event tells no taste.
    """
    read: npt.NDArray[np.bool_] = past.chosen | (past.types != 0)
    return read


def rows_read(past: History) -> npt.NDArray[np.int32]:
    """Returns the rows of a history that the user encoder reads; int32 [n], -1 for an event that it does not read."""
    return np.where(are_read(past), past.rows, np.int32(-1)).astype(np.int32)


def chosen_rows(past: History) -> npt.NDArray[np.int32]:
    """Returns the rows of the items that the user chose, in order, with repeats; int32 [n].

    A user without any is answered as an unknown user.
    """
    return past.rows[past.chosen & (past.rows >= 0)]


def counts_and_kinds(
    counts: DecayedCounts, type_index: Mapping[int, int]
) -> tuple[DecayedCounts, npt.NDArray[np.int32]]:
    """Returns the counts with the event types in them as a bundle sees them; int32 [k]."""
    return counts, types_of_keys(counts.keys[counts.of("event_type")].astype(np.uint32), type_index)


def type_index(event_types: Sequence[str]) -> dict[int, int]:
    """Returns event type key -> 1 + position among a bundle's event types."""
    return {event_type_key(name): 1 + place for place, name in enumerate(event_types)}


def encoder_digest(items: npt.NDArray[np.uint64], types: npt.NDArray[np.int64]) -> str:
    """Returns a digest of the inputs of the user encoder: the keys of the items, uint64 [n], and the events' types.

    A slate is logged with it, so that a replay can tell whether training would read the same events.
    """
    inputs = items.astype("<u8").tobytes() + types.astype("<i8").tobytes()
    return hashlib.blake2b(inputs, digest_size=8).hexdigest()


def types_of_keys(keys: npt.NDArray[np.uint32], type_index: Mapping[int, int]) -> npt.NDArray[np.int32]:
    """Returns the model's index of each event type key, 0 where the model does not know it; int32 [n]."""
    # A bundle knows a handful of types: comparing with each is quicker than looking each event up.
    types = np.zeros(keys.size, np.int32)
    for key, index in type_index.items():
        types[keys == key] = index
    return types


def encoder_inputs(
    rows: npt.NDArray[np.int32], types: npt.NDArray[np.int32], max_length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the newest `max_length` events whose item is known, in log order, with repeats; two int64 [length]."""
    newest = np.flatnonzero(rows >= 0)[-max_length:]
    return rows[newest].astype(np.int64), types[newest].astype(np.int64)


def encoder_batch(
    rows: npt.NDArray[np.int32],
    types: npt.NDArray[Any],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    max_length: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns `pack` of the `encoder_inputs` of many parts `starts[i]:ends[i]` of long arrays, at once.

    Args:
        rows: Row of each event's item, -1 where it is unknown; int32 [E].
        types: Type of each event; integers [E].
        starts: First event of each part; int64 [B].
        ends: One past its last; int64 [B].
        max_length: Events of a part that are kept, the newest.

    Returns:
        As `pack`.
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
    # Padded on the right, because the encoder counts positions from the oldest event.
    packed_rows = np.zeros((len(sequences), longest), np.int64)
    packed_types = np.zeros((len(sequences), longest), np.int64)
    for at, (rows, types) in enumerate(sequences):
        packed_rows[at, : rows.size] = rows
        packed_types[at, : types.size] = types
    return packed_rows, packed_types, lengths


def ranker_features(
    past: History,
    rows: npt.NDArray[np.int32],
    relevance: npt.NDArray[np.float32],
    columns: CatalogColumns,
    actions: ActionRates,
    moment: Moment,
) -> npt.NDArray[np.float32]:
    """Returns the inputs of the ranker for each candidate, in the order of `ranker_names`.

    Args:
        past: The user's events; all of them if there are no more than RING, else the newest RING.
        rows: Candidates; int32 [n].
        relevance: Inner product of user and item vector; float32 [n].
        columns: The catalogue's columns.
        actions: How the actions are read from events.
        moment: When and where.

    Returns:
        float32 [n, F], F as `ranker_names`; a candidate's row never depends on the other candidates.
    """
    decayed = past.decayed_counts
    factors = decay_factors(moment.now_ms, decayed.newest, TICK_MS)
    more = columns.declared.shape[1] + moment.request_values.size + moment.past.same.size
    out = fill_ranker_features(
        CandidateArrays(rows, relevance, _NO_POSITIONS if moment.positions is None else moment.positions),
        EventArrays(
            past.rows, past.types, past.categories, past.creators, past.timestamps, past.values, past.chosen, past.kinds
        ),
        DecayedArrays(decayed.facts, decayed.keys, decayed.counts, factors),
        _DECAYS,
        _item_arrays(columns),
        ActionArrays(actions.shown, actions.acted, actions.least, actions.base, actions.surface(moment.surface)),
        moment.now_ms,
        more,
    )
    if more:
        fill_declared(out, out.shape[1] - more, rows, *declared_arrays(past, columns, moment))
    return out


def declared_arrays(past: History, columns: CatalogColumns, moment: Moment) -> tuple[Any, ...]:
    """Returns what `features.declared_kernels.fill_declared` reads behind the rows."""
    return (
        DeclaredColumns(columns.declared, columns.category, columns.creator),
        moment.request_values,
        moment.past,
        PastEvents(past.rows, past.types, past.categories, past.creators, past.timestamps),
        moment.now_ms,
    )


def _item_arrays(columns: CatalogColumns) -> ItemArrays:
    """Returns the columns that features read."""
    return ItemArrays(
        columns.category,
        columns.creator,
        columns.price,
        columns.duration,
        columns.popularity,
        columns.recent_popularity,
        columns.trained,
        columns.available_from,
        columns.statistics,
    )
