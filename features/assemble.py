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

from features.action_rates import USER_STRENGTH, ActionRates, Rates
from features.catalog import Catalog
from features.catalog_columns import CatalogColumns
from features.decayed_counts import DecayedCounts
from features.decayed_counts import empty as no_counts
from features.event_types import NEGATIVE_EVENT_TYPES, PASSIVE_EVENT_TYPES
from features.feature_set import Feature, FeatureSet
from features.item_prior import blocks
from features.kernels import affinity, log_odds, matched_weights, pack_newest
from features.keys import event_type_key, event_type_keys
from features.profile import RING, Profile

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
        Feature("duration", "log1p of the item's seconds, 0 where unknown", "item"),
        Feature("duration_known", "1 where the item has a duration", "item"),
        Feature("age", "log1p of the days since the item may be shown, 0 where that was always"),
        Feature("recency", "log1p of the hours since the user's newest event, 0 where there is none"),
        Feature("shown_before", "log1p of the user's events about this very item", _RING),
        Feature("position", "log1p of the place in the slate, 0 when serving: as if it came first"),
        Feature("item_shown", "log1p of how often the item was shown to all users", "item"),
        Feature("creator_shown", "log1p of how often the creator's items were shown to all users", "item"),
        Feature("item_pause", "log1p of the user's events since the last about this very item, or of all", _RING),
        Feature("item_in_visit", "1 where the user's newest visit has an event about this very item", "visit"),
        Feature("category_hour", "log1p of the user's choices in the item's category", "half-life an hour"),
        Feature("category_day", "log1p of the user's choices in the item's category", "half-life a day"),
        Feature("category_month", "log1p of the user's choices in the item's category", "half-life 30 days"),
        Feature("creator_hour", "log1p of the user's choices by the item's creator", "half-life an hour"),
        Feature("creator_day", "log1p of the user's choices by the item's creator", "half-life a day"),
        Feature("creator_month", "log1p of the user's choices by the item's creator", "half-life 30 days"),
        Feature("activity_day", "log1p of the user's events", "half-life a day"),
        Feature("activity_month", "log1p of the user's events", "half-life 30 days"),
        Feature("visit_length", "log1p of the events of the user's visit, 0 where it is over", "visit"),
        Feature("visit_minutes", "log1p of the minutes since it began, 0 where it is over", "visit"),
        Feature("visit_category", "share of the visit's events in the item's category", "visit"),
    )
)
ACTION_FEATURES = FeatureSet(
    (
        Feature("person_rate", "the user's log-odds above the average user's, half-life 40 showings", _RING),
        Feature("person_recent_rate", "the same, half-life 4 showings", _RING),
        Feature("person_category_rate", "log-odds in the item's category above the user's", _RING),
        Feature("person_creator_rate", "log-odds with the item's creator above the user's", _RING),
        Feature("person_item_rate", "log-odds with this very item above the user's", _RING),
        Feature("person_duration_rate", "log-odds among items of like duration above the user's", _RING),
        Feature("item_rate", "the item's log-odds above the average, pulled to its creator's", "item"),
        Feature("creator_rate", "the creator's log-odds above the average, pulled to the category's", "item"),
        Feature("category_rate", "the category's log-odds above the average", "item"),
        Feature("surface_rate", "the surface's log-odds above the average"),
        Feature(
            "person_month_rate", "the user's log-odds above the average user's, by event type", "half-life 30 days"
        ),
    )
)
"""The ranker's inputs for each of a bundle's actions, behind `RANKER_FEATURES`.

The names begin with `person` because they are part of the fingerprint of published bundles."""
FEATURES = FeatureSet((*ENCODER_FEATURES, *RANKER_FEATURES, *ACTION_FEATURES))

_COLUMN = {name: number for number, name in enumerate(RANKER_FEATURES.names)}

_UNCHOSEN = event_type_keys((*PASSIVE_EVENT_TYPES, *NEGATIVE_EVENT_TYPES))
_HALF_POWER = 0.5**0.5  # two classes of duration per doubling
_MINUTE_MS, _HOUR_MS, _DAY_MS = 60_000, 3_600_000, 86_400_000

# Computed once in float64, so that training and serving read the same bits.
_DECAY = 0.5 ** (np.arange(RING, dtype=np.float64) / HALF_LIFE)


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
    """

    now_ms: int = 0
    surface: str = ""
    positions: npt.NDArray[np.int32] | None = None


def ranker_names(actions: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of the ranker's inputs in order; those of an action are `action/feature`."""
    return (*RANKER_FEATURES.names, *(f"{action}/{name}" for name in ACTION_FEATURES.names for action in actions))


def ranker_width(actions: int) -> int:
    """Returns the number of the ranker's inputs."""
    return len(RANKER_FEATURES) + actions * len(ACTION_FEATURES)


def statistics_width(actions: int) -> int:
    """Returns the number of an item's statistics: two counts, and a rate of item, creator and category per action."""
    return 2 + 3 * actions


def history(profile: Profile, catalog: Catalog, type_index: Mapping[int, int]) -> History:
    """Resolves the events of a profile against a catalogue.

    An event without an item (a search) is left out, as training leaves it out of its histories.

    Args:
        profile: The profile.
        catalog: The catalogue, in which keys become rows.
        type_index: Event type key -> 1 + position among the bundle's event types.
    """
    records = profile.records
    about_items = records["item"] != 0
    if not about_items.all():
        records = records[about_items]
    # Copies, not views: the field of a single record is contiguous and may be read-only, and a kernel is compiled for
    # each kind of array that it is given.
    return History(
        catalog.rows_of_keys(records["item"].copy()),
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
    chosen: npt.NDArray[np.bool_] = np.isin(keys, _UNCHOSEN, invert=True)
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


def seen_rows(profile: Profile, catalog: Catalog, seen_keys: npt.NDArray[np.uint32]) -> npt.NDArray[np.int32]:
    """Returns the rows of the items that a user has seen; int32 [n], unsorted, may repeat.

    Args:
        profile: The profile.
        catalog: The catalogue, in which keys become rows.
        seen_keys: Keys of the event types that count; an item older than the ring always counts.
    """
    records = profile.records
    recent = records["item"][np.isin(records["event_type"], seen_keys)]
    rows = catalog.rows_of_keys(np.concatenate([recent, profile.older_items]))
    return rows[rows >= 0]


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
        float32 [n, ranker_width(actions)]; a candidate's row never depends on the other candidates.
    """
    count, common = len(actions), len(RANKER_FEATURES)
    out = np.zeros((rows.size, ranker_width(count)), np.float32)
    candidates, past_items = _item_keys(rows), _item_keys(past.rows)
    out[:, _COLUMN["relevance"]] = relevance
    _fill_item_features(out, columns, rows, moment.now_ms)
    _fill_ring_features(out, past, columns, rows, moment.now_ms)
    _fill_repeat_features(out, past, candidates, past_items)
    if moment.positions is not None:
        out[:, _COLUMN["position"]] = np.log1p(moment.positions.astype(np.float64))
    statistics = columns.statistics[rows]
    # A catalogue without a ranker has no statistics; then nothing is known of how often an item was shown.
    has_statistics = statistics.shape[1] == statistics_width(count)
    if has_statistics:
        out[:, _COLUMN["item_shown"] : _COLUMN["creator_shown"] + 1] = statistics[:, :2]
    month_rate = np.zeros(count, np.float64)
    if moment.now_ms:
        # Without a time, as in data that has order only, nothing can be said of decay.
        decayed, month_rate = _decayed_features(past, columns, rows, actions, moment.now_ms)
        begin = _COLUMN["category_hour"]
        out[:, begin : begin + decayed.shape[1]] = decayed
    rates = Rates.of(actions, past.types, past.values)
    past_durations = np.where(past.rows >= 0, columns.duration[past.rows], np.float32(np.nan))
    parts = [
        rates.long - actions.base,
        rates.short - actions.base,
        rates.among(columns.category[rows], past.categories),
        rates.among(columns.creator[rows], past.creators),
        rates.among(candidates, past_items),
        rates.among(_duration_keys(columns.duration[rows]), _duration_keys(past_durations)),
        *(blocks(statistics) if has_statistics else (0.0, 0.0, 0.0)),
        actions.surface(moment.surface),
        month_rate,
    ]
    for number, part in enumerate(parts):
        begin = common + number * count
        out[:, begin : begin + count] = part
    return out


def _fill_item_features(
    out: npt.NDArray[np.float32], columns: CatalogColumns, rows: npt.NDArray[np.int32], now_ms: int
) -> None:
    """Fills the columns that are about the item alone."""
    price, duration = columns.price[rows], columns.duration[rows]
    has_price, has_duration = np.isfinite(price), np.isfinite(duration)
    out[:, _COLUMN["popularity"]] = columns.popularity[rows]
    out[:, _COLUMN["recent_popularity"]] = columns.recent_popularity[rows]
    # In float64, because the float32 log1p of numpy depends on where in a vector register a value falls.
    out[:, _COLUMN["price"]] = np.log1p(np.where(has_price, price, 0.0).astype(np.float64))
    out[:, _COLUMN["price_known"]] = has_price
    out[:, _COLUMN["trained"]] = columns.trained[rows]
    out[:, _COLUMN["duration"]] = np.log1p(np.where(has_duration, duration, 0.0).astype(np.float64))
    out[:, _COLUMN["duration_known"]] = has_duration
    out[:, _COLUMN["age"]] = _age(columns.available_from[rows], now_ms)


def _fill_ring_features(
    out: npt.NDArray[np.float32], past: History, columns: CatalogColumns, rows: npt.NDArray[np.int32], now_ms: int
) -> None:
    """Fills the columns that are about the newest events of the user."""
    weights = _DECAY[: len(past)][::-1] * are_read(past)
    out[:, _COLUMN["category_affinity"]] = affinity(columns.category[rows], past.categories, weights)
    out[:, _COLUMN["creator_affinity"]] = affinity(columns.creator[rows], past.creators, weights)
    out[:, _COLUMN["history_length"]] = np.log1p(float(len(past)))
    if len(past) and now_ms:
        # A request may carry an older time than an event that was sent by a clock ahead: then no time has passed.
        out[:, _COLUMN["recency"]] = np.log1p(max(now_ms - int(past.timestamps[-1]), 0) / _HOUR_MS)


def _fill_repeat_features(
    out: npt.NDArray[np.float32], past: History, candidates: npt.NDArray[np.uint64], past_items: npt.NDArray[np.uint64]
) -> None:
    """Fills the columns that are about earlier events of the same item; both by `_item_keys`."""
    units = np.ones((len(past), 1), np.float64)
    out[:, _COLUMN["shown_before"]] = np.log1p(matched_weights(candidates, past_items, units)[:, 0])
    out[:, _COLUMN["item_pause"]] = np.log1p(_events_since(candidates, past_items))
    if past.decayed_counts.visit_events and past.decayed_counts.newest:
        in_visit = past.timestamps >= past.decayed_counts.visit_began
        out[:, _COLUMN["item_in_visit"]] = np.isin(candidates, past_items[in_visit])


def _decayed_features(
    past: History, columns: CatalogColumns, rows: npt.NDArray[np.int32], actions: ActionRates, now_ms: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns the features from the decayed counts and the visit at a time, ms.

    Returns:
        float64 [n, 11] of the candidates, from `category_hour` on; and `person_month_rate`, float64 [A].
    """
    decayed, counts = past.decayed_counts, past.decayed_counts.at(now_ms)
    out = np.zeros((rows.size, 11), np.float64)
    for number, dimension in enumerate(("category", "creator")):
        part = decayed.of(dimension)
        keys = getattr(columns, dimension)[rows]
        out[:, 3 * number : 3 * number + 3] = matched_weights(keys, decayed.keys[part], counts[part])
    events = counts[decayed.of("event_type")]
    out[:, 6:8] = events[:, 1:].sum(axis=0)
    if decayed.visiting(now_ms):
        out[:, 8] = decayed.visit_events
        out[:, 9] = max(now_ms - decayed.visit_began, 0) / _MINUTE_MS
    np.log1p(out, out=out)
    if decayed.visiting(now_ms):  # a share, and so behind the logarithm
        in_visit = ((past.timestamps >= decayed.visit_began) & are_read(past)).astype(np.float64)
        out[:, 10] = affinity(columns.category[rows], past.categories, in_visit)
    month = np.ascontiguousarray(events[:, 2])
    shown, acted = ((marks[:, past.kinds] * month).sum(axis=1) for marks in (actions.shown, actions.acted))
    rate = log_odds(acted[None], shown[None], actions.base[None], USER_STRENGTH)[0]
    return out, rate - actions.base


def _item_keys(rows: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
    """Returns keys that tell items apart: 1 + row, 0 if the item is unknown; uint64 [n]."""
    return (rows.astype(np.int64) + 1).astype(np.uint64)


def _events_since(keys: npt.NDArray[np.uint64], past: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Returns the number of events after the newest with each key, of all events if there is none; float64 [n]."""
    distinct, newest = np.unique(past[::-1], return_index=True)
    if not distinct.size:
        return np.zeros(keys.size, np.float64)
    at = np.minimum(distinct.searchsorted(keys), distinct.size - 1)
    return np.where(distinct[at] == keys, newest[at], past.size).astype(np.float64)


def _duration_keys(seconds: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
    """Returns classes of like duration, 0 if it is unknown; uint64 [n]."""
    has_duration = np.isfinite(seconds)
    # Not by a logarithm, whose last bit may depend on where in a vector register a value falls.
    fraction, power = np.frexp(np.where(has_duration, seconds, 1.0).astype(np.float64))
    steps = 2 * power + (fraction >= _HALF_POWER)
    return np.where(has_duration, np.clip(steps, 0, 98) + 1, 0).astype(np.uint64)


def _age(since: npt.NDArray[np.int64], now_ms: int) -> npt.NDArray[np.float64]:
    """Returns log1p of the days since a time, 0 if that or the moment is unknown."""
    known_times = (since > 0) & (now_ms > 0)
    return np.log1p(np.where(known_times, np.maximum(now_ms - since, 0) / _DAY_MS, 0.0))
