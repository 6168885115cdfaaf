"""Computes the statistics of a catalogue at a moment: how often users act on items, creators, categories, surfaces.

A training replays time: an impression sees what was learned at the last of a row of moments before it, as in service
it would see the statistics of the last export. No later event ever counts: with it, a feature would hold its label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.action_rates import ActionRates
from features.assemble import chosen_rows, ranker_features
from features.catalog_columns import CatalogColumns
from features.kernels import dot_rows, log_odds
from features.linear import LinearTerm
from features.model_inputs import ranker_width, statistics_width
from training.config import Action
from training.data.histories import UserHistories
from training.data.impressions import HOUR_MS, Examples
from training.data.interactions import Interactions

ITEM_STRENGTH, CREATOR_STRENGTH, CATEGORY_STRENGTH, SURFACE_STRENGTH = 20.0, 20.0, 100.0, 50.0
"""Impressions that the prior of a rate is worth."""

_F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StatisticsSnapshot:
    """The statistics as they were at a moment.

    Attributes:
        action_rates: Reads actions from events, with the rates of all users and those of the surfaces.
        statistics: By row of the catalogue, see `features.catalog_columns.CatalogColumns`; float32 [N, S].
    """

    action_rates: ActionRates
    statistics: npt.NDArray[np.float32]

    def facts(self) -> dict[str, Any]:
        """Returns the part that a run's result and a bundle's manifest hold."""
        rates = {name: [float(rate) for rate in rates] for name, rates in self.action_rates.surfaces.items()}
        return {"base_rates": [float(rate) for rate in self.action_rates.base], "surface_rates": rates}


class PointInTimeStatistics:
    """Computes the statistics as they were at any moment."""

    def __init__(
        self,
        data: Interactions,
        columns: CatalogColumns,
        actions: Sequence[Action],
        impressions: Examples | None,
        ends: npt.NDArray[np.int64],
    ) -> None:
        """Takes the events and impressions; of the events only each user's leading `ends`, int64 [U], ever count."""
        facts = {"event_types": data.event_types, "actions": [action.model_dump() for action in actions]}
        self.data, self.columns, self.impressions = data, columns, impressions
        self.action_rates = ActionRates.of(facts)
        # A rate has impressions below it: without an action that names the events that show an item, there is none.
        self.has_rates = any(action.shown_types for action in actions)
        if not self.has_rates:
            return
        is_usable = self._leading(ends)
        shown, acted = self.action_rates.marks(data.types, data.values)
        # A user's actions count from their first impression on: an earlier one has no impression to be counted
        # against, so it would lift every rate.
        shown_so_far = np.cumsum(shown, axis=1)
        before_user = np.concatenate([np.zeros((len(actions), 1), np.int64), shown_so_far], axis=1)
        before_user = before_user[:, data.offsets[:-1]]
        counts = shown_so_far - np.repeat(before_user, np.diff(data.offsets), axis=1) > 0
        self.shown, self.acted = shown & counts & is_usable, acted & counts & is_usable

    def at(self, moment: int, ends: npt.NDArray[np.int64] | None = None) -> StatisticsSnapshot:
        """Returns the statistics as they were just before a moment, ms; `ends` lets fewer events of each user count."""
        if not self.has_rates:
            return StatisticsSnapshot(
                self.action_rates, np.zeros((self.data.items, statistics_width(len(self.action_rates))), np.float32)
            )
        is_early = self.data.timestamps < moment
        if ends is not None:
            is_early &= self._leading(ends)
        shown, acted = (self._by_row(marks & is_early) for marks in (self.shown, self.acted))
        total_shown, total_acted = shown.sum(0, keepdims=True), acted.sum(0, keepdims=True)
        base = log_odds(total_acted, total_shown, np.full_like(total_shown, -3.0), 1.0)
        # Each rate is the prior of the next, finer one: an item that few users have met is judged by its creator, a
        # creator by the category, a category by all items.
        category = self._rates(self.columns.category, shown, acted, base, CATEGORY_STRENGTH)
        creator = self._rates(self.columns.creator, shown, acted, category, CREATOR_STRENGTH)
        item = log_odds(acted, shown, creator, ITEM_STRENGTH)
        exposure = np.log1p(np.stack([shown.max(1), _summed(self.columns.creator, shown).max(1)], 1))
        # Rates are kept relative to that of all items, which the manifest holds apart.
        statistics = np.concatenate([exposure, item - base, creator - base, category - base], axis=1)
        surfaces = self._surfaces(moment, base)
        action_rates = dataclasses.replace(self.action_rates, base=base[0], surfaces=surfaces)
        return StatisticsSnapshot(action_rates, statistics.astype(np.float32))

    def surfaces_at(self, snapshot: StatisticsSnapshot, moment: int) -> ActionRates:
        """Returns a snapshot's action rates with those of the surfaces as they were just before a moment, ms."""
        if not self.has_rates:
            return snapshot.action_rates
        return dataclasses.replace(
            snapshot.action_rates, surfaces=self._surfaces(moment, snapshot.action_rates.base[None])
        )

    def _by_row(self, marks: npt.NDArray[np.bool_]) -> _F64:
        counts = [np.bincount(self.data.rows[of_action], minlength=self.data.items) for of_action in marks]
        return np.ascontiguousarray(np.stack(counts, 1).astype(np.float64))

    def _leading(self, ends: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Returns True for each user's leading `ends` events; bool [E]."""
        offsets = self.data.offsets
        return np.arange(self.data.rows.size) < np.repeat(offsets[:-1] + ends, np.diff(offsets))

    def _rates(self, keys: npt.NDArray[np.uint64], shown: _F64, acted: _F64, prior: _F64, strength: float) -> _F64:
        """Returns log-odds of the rows that share each row's key, the prior where it has none; float64 [N, A]."""
        prior = np.ascontiguousarray(np.broadcast_to(prior, shown.shape))
        rates = log_odds(_summed(keys, acted), _summed(keys, shown), prior, strength)
        return np.where((keys == 0)[:, None], prior, rates)

    def _surfaces(self, moment: int, base: _F64) -> dict[str, npt.NDArray[np.float32]]:
        """Returns the log-odds of the surfaces shown so far, above those of all items."""
        if self.impressions is None:
            return {}
        count = int(np.searchsorted(self.impressions.times, moment))
        surfaces, labels = self.impressions.surface_indices[:count], self.impressions.action_times[:count] < moment
        size = len(self.impressions.surfaces)
        sizes = np.bincount(surfaces, minlength=size).astype(np.float64)
        counts = [np.bincount(surfaces[of_action], minlength=size) for of_action in labels.T]
        acted = np.stack(counts, 1).astype(np.float64)
        # The prior is the rate among impressions: the rate among events may rest on items shown elsewhere.
        total = log_odds(acted.sum(0, keepdims=True), np.full_like(base, float(count)), base, SURFACE_STRENGTH)
        prior = np.ascontiguousarray(np.broadcast_to(total, acted.shape))
        shown = np.ascontiguousarray(np.broadcast_to(sizes[:, None], acted.shape))
        rates = (log_odds(acted, shown, prior, SURFACE_STRENGTH) - base).astype(np.float32)
        return {name: rates[at] for at, name in enumerate(self.impressions.surfaces) if sizes[at]}


def _summed(keys: npt.NDArray[np.uint64], counts: _F64) -> _F64:
    """Returns the counts of all rows that share each row's key; float64 [N, A]."""
    _, groups = np.unique(keys, return_inverse=True)
    summed: Any = [np.bincount(groups, column)[groups] for column in counts.T]
    return np.stack(summed, 1)


def example_features(
    statistics: PointInTimeStatistics,
    examples: Examples,
    user_vectors: npt.NDArray[np.float32],
    linear: LinearTerm,
    *,
    every_hours: float,
    last: int,
) -> npt.NDArray[np.float32]:
    """Computes the ranker's features of each example, as they were at its time; float32 [n, F].

    Args:
        statistics: The statistics at any moment.
        examples: The items shown, by time.
        user_vectors: The user's vector just before each example; float32 [n, D].
        linear: The linear part of relevance.
        every_hours: Hours between two moments at which statistics are learned.
        last: The last such moment, ms; later examples see the statistics of that moment.
    """
    width = ranker_width(len(statistics.action_rates), len(examples.declared))
    out = np.empty((len(examples), width), np.float32)
    histories = UserHistories(statistics.data, statistics.columns)
    for part, columns, action_rates in _replay(statistics, examples, round(every_hours * HOUR_MS), last):
        for at in range(part.start, part.stop):
            out[at] = features_of_example(histories, examples, at, user_vectors[at], linear, columns, action_rates)
    return out


def features_of_example(
    histories: UserHistories,
    examples: Examples,
    at: int,
    user_vector: npt.NDArray[np.float32],
    linear: LinearTerm,
    columns: CatalogColumns,
    action_rates: ActionRates,
) -> npt.NDArray[np.float32]:
    """Computes the ranker's features of example `at`; `columns` and `action_rates` hold the statistics; float32 [F]."""
    row = examples.rows[at : at + 1]
    history = histories.before(int(examples.users[at]), int(examples.positions[at]))
    moment = examples.moment(at)
    relevance = dot_rows(columns.vectors, row, user_vector) + linear.scores(chosen_rows(history)).of(row)
    features: npt.NDArray[np.float32] = ranker_features(history, row, relevance, columns, action_rates, moment)[0]
    return features


def _replay(
    statistics: PointInTimeStatistics, examples: Examples, every: int, last: int
) -> Iterator[tuple[slice, CatalogColumns, ActionRates]]:
    """Yields the examples in parts, with the catalogue and rates of their time: items by `every` ms, surfaces hourly.

    Moments are counted back from `last`, the end of training, so that the newest statistics are exactly those that the
    run exports.
    """
    # Surfaces are few and cheap to count, so theirs are refreshed hourly; those of items cost a pass over all events.
    elapsed = np.minimum(examples.times, last) - last  # at most 0
    hour = -(-elapsed // HOUR_MS) - 1  # the hours that have ended before, counted back from the last moment
    hour[examples.times > last] = 0
    borders = np.flatnonzero(np.diff(hour)) + 1
    newest: tuple[int, StatisticsSnapshot, CatalogColumns] | None = None
    for start, stop in zip([0, *borders], [*borders, len(examples)], strict=True):
        if start == stop:
            continue
        now = last + int(hour[start]) * HOUR_MS
        learned_at = last - -(-(last - now) // every) * every
        if newest is None or newest[0] != learned_at:
            snapshot = statistics.at(learned_at)
            newest = (learned_at, snapshot, dataclasses.replace(statistics.columns, statistics=snapshot.statistics))
        yield slice(int(start), int(stop)), newest[2], statistics.surfaces_at(newest[1], now)
