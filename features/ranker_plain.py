"""The plain twin of `features.assemble.ranker_features`, column by column: what each feature means, in numpy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from features.action_rates import MATCH_STRENGTH, USER_STRENGTH, ActionRates, Rates
from features.assemble import History, Moment, are_read, declared_arrays
from features.catalog_columns import CatalogColumns
from features.declared_kernels import fill_declared_plain
from features.item_prior import blocks
from features.kernels import log_odds_plain, matched_weights_plain
from features.model_inputs import HALF_LIFE, RANKER_FEATURES, ranker_width, statistics_width
from features.profile import RING

_COLUMN = {name: number for number, name in enumerate(RANKER_FEATURES.names)}
_HALF_POWER = 0.5**0.5  # two classes of duration per doubling
_MINUTE_MS, _HOUR_MS, _DAY_MS = 60_000, 3_600_000, 86_400_000
# Value by value, because that of numpy may differ in its last bit with the place in a vector register.
_log1p = np.vectorize(math.log1p, otypes=[np.float64])
_DECAY = 0.5 ** (np.arange(RING, dtype=np.float64) / HALF_LIFE)


def ranker_features_plain(
    past: History,
    rows: npt.NDArray[np.int32],
    relevance: npt.NDArray[np.float32],
    columns: CatalogColumns,
    actions: ActionRates,
    moment: Moment,
) -> npt.NDArray[np.float32]:
    """The plain twin of `features.assemble.ranker_features`."""
    count, common = len(actions), len(RANKER_FEATURES)
    more = columns.declared.shape[1] + moment.request_values.size + moment.past.same.size
    out = np.zeros((rows.size, ranker_width(count, more)), np.float32)
    candidates, past_items = _item_keys(rows), _item_keys(past.rows)
    out[:, _COLUMN["relevance"]] = relevance
    _fill_item_features(out, columns, rows, moment.now_ms)
    _fill_ring_features(out, past, columns, rows, moment.now_ms)
    _fill_repeat_features(out, past, candidates, past_items)
    if moment.positions is not None:
        out[:, _COLUMN["position"]] = _log1p(moment.positions.astype(np.float64))
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
        among(rates, columns.category[rows], past.categories),
        among(rates, columns.creator[rows], past.creators),
        among(rates, candidates, past_items),
        among(rates, _duration_keys(columns.duration[rows]), _duration_keys(past_durations)),
        *(blocks(statistics) if has_statistics else (0.0, 0.0, 0.0)),
        actions.surface(moment.surface),
        month_rate,
    ]
    for number, part in enumerate(parts):
        begin = common + number * count
        out[:, begin : begin + count] = part
    if more:
        fill_declared_plain(out, ranker_width(count), rows, *declared_arrays(past, columns, moment))
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
    out[:, _COLUMN["price"]] = _log1p(np.where(has_price, price, 0.0).astype(np.float64))
    out[:, _COLUMN["price_known"]] = has_price
    out[:, _COLUMN["trained"]] = columns.trained[rows]
    out[:, _COLUMN["duration"]] = _log1p(np.where(has_duration, duration, 0.0).astype(np.float64))
    out[:, _COLUMN["duration_known"]] = has_duration
    out[:, _COLUMN["age"]] = _age(columns.available_from[rows], now_ms)


def _fill_ring_features(
    out: npt.NDArray[np.float32], past: History, columns: CatalogColumns, rows: npt.NDArray[np.int32], now_ms: int
) -> None:
    """Fills the columns that are about the newest events of the user."""
    weights = _DECAY[: len(past)][::-1] * are_read(past)
    out[:, _COLUMN["category_affinity"]] = affinity(columns.category[rows], past.categories, weights)
    out[:, _COLUMN["creator_affinity"]] = affinity(columns.creator[rows], past.creators, weights)
    out[:, _COLUMN["history_length"]] = _log1p(float(len(past)))
    if len(past) and now_ms:
        # A request may carry an older time than an event that was sent by a clock ahead: then no time has passed.
        out[:, _COLUMN["recency"]] = _log1p(max(now_ms - int(past.timestamps[-1]), 0) / _HOUR_MS)


def _fill_repeat_features(
    out: npt.NDArray[np.float32], past: History, candidates: npt.NDArray[np.uint64], past_items: npt.NDArray[np.uint64]
) -> None:
    """Fills the columns that are about earlier events of the same item; both by `_item_keys`."""
    units = np.ones((len(past), 1), np.float64)
    out[:, _COLUMN["shown_before"]] = _log1p(matched_weights_plain(candidates, past_items, units)[:, 0])
    out[:, _COLUMN["item_pause"]] = _log1p(_events_since(candidates, past_items))
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
        out[:, 3 * number : 3 * number + 3] = matched_weights_plain(keys, decayed.keys[part], counts[part])
    events = counts[decayed.of("event_type")]
    out[:, 6:8] = events[:, 1:].sum(axis=0)
    if decayed.visiting(now_ms):
        out[:, 8] = decayed.visit_events
        out[:, 9] = max(now_ms - decayed.visit_began, 0) / _MINUTE_MS
    out = _log1p(out)
    if decayed.visiting(now_ms):  # a share, and so behind the logarithm
        in_visit = ((past.timestamps >= decayed.visit_began) & are_read(past)).astype(np.float64)
        out[:, 10] = affinity(columns.category[rows], past.categories, in_visit)
    month = np.ascontiguousarray(events[:, 2])
    shown, acted = ((marks[:, past.kinds] * month).sum(axis=1) for marks in (actions.shown, actions.acted))
    rate = log_odds_plain(acted[None], shown[None], actions.base[None], USER_STRENGTH)[0]
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
    return np.asarray(_log1p(np.where(known_times, np.maximum(now_ms - since, 0) / _DAY_MS, 0.0)))


def among(rates: Rates, keys: npt.NDArray[np.uint64], history: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Returns log-odds above the user's own, among the events that share a candidate's key; float64 [n, A]."""
    weights, count = matched_weights_plain(keys, history, rates.weights), rates.long.size
    expected = np.full((keys.size, count), rates.long)
    rate = log_odds_plain(weights[:, count:], weights[:, :count], expected, MATCH_STRENGTH)
    return np.asarray(rate - rates.long)


def affinity(
    keys: npt.NDArray[np.uint64], history: npt.NDArray[np.uint64], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """Returns the weighted share of the history that has each candidate's key, 0 for key 0; float32 [n].

    Events without a key count in the total: a user who rarely chose within any category is drawn to none.
    """
    total, shares = 0.0, np.zeros(keys.size, np.float64)
    for key, weight in zip(history, weights, strict=True):
        total += float(weight)
        shares += np.where(keys == key, weight, 0.0)
    if total <= 0.0:
        return np.zeros(keys.size, np.float32)
    return np.where(keys == 0, 0.0, shares / total).astype(np.float32)
