"""What people did with items, creators, categories and surfaces up to a moment: the statistics of a catalogue.

A training replays time: an impression sees what was learned at the last of a row of moments before it, as in service
it would see the statistics of the last export. Nothing later ever counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.action_rates import ActionRates
from features.assemble import Moment, ranker_features, ranker_width, statistics_width
from features.catalog_columns import CatalogColumns
from features.kernels import dot_rows, log_odds
from training.config import Action
from training.data.impressions import HOUR_MS, Shown
from training.data.interactions import Interactions
from training.models.scoring import UserHistories

ITEM_STRENGTH, CREATOR_STRENGTH, CATEGORY_STRENGTH, SURFACE_STRENGTH = 20.0, 20.0, 100.0, 50.0
"""Showings that the expectation of a rate is worth."""

_F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StatisticsSnapshot:
    """What was known at a moment.

    Attributes:
        outcomes: How actions are read, with everybody's rates and those of the surfaces.
        statistics: By row of the catalogue, see `features.catalog_columns.CatalogColumns`; float32 [N, S].
    """

    outcomes: ActionRates
    statistics: npt.NDArray[np.float32]

    def facts(self) -> dict[str, Any]:
        """The part that a run's result and a bundle's manifest hold."""
        rates = {name: [float(rate) for rate in rates] for name, rates in self.outcomes.surfaces.items()}
        return {"base_rates": [float(rate) for rate in self.outcomes.base], "surface_rates": rates}


class PointInTimeStatistics:
    """Tells what was known at any moment."""

    def __init__(
        self,
        data: Interactions,
        columns: CatalogColumns,
        actions: Sequence[Action],
        shown: Shown | None,
        ends: npt.NDArray[np.int64],
    ) -> None:
        """Takes the events and impressions; of the events only each person's leading `ends`, int64 [U], ever count."""
        facts = {"event_types": data.event_types, "actions": [action.model_dump() for action in actions]}
        self.data, self.columns, self.shown, self.outcomes = data, columns, shown, ActionRates.of(facts)
        # Where no action says what shows items, nothing is known of what was shown, and so of no rate.
        self.logged = any(action.shown_types for action in actions)
        if not self.logged:
            return
        usable = np.arange(data.rows.size) < np.repeat(data.offsets[:-1] + ends, np.diff(data.offsets))
        seen, acted = self.outcomes.marks(data.types, data.values)
        began = np.cumsum(seen, axis=1)
        before = np.concatenate([np.zeros((len(actions), 1), np.int64), began], axis=1)[:, data.offsets[:-1]]
        counts = began - np.repeat(before, np.diff(data.offsets), axis=1) > 0
        self.seen, self.acted = seen & counts & usable, acted & counts & usable

    def at(self, moment: int) -> StatisticsSnapshot:
        """What was known just before a moment, ms."""
        if not self.logged:
            return StatisticsSnapshot(
                self.outcomes, np.zeros((self.data.items, statistics_width(len(self.outcomes))), np.float32)
            )
        early = self.data.timestamps < moment
        seen, acted = (self._by_row(marks & early) for marks in (self.seen, self.acted))
        total_seen, total_acted = seen.sum(0, keepdims=True), acted.sum(0, keepdims=True)
        base = log_odds(total_acted, total_seen, np.full_like(total_seen, -3.0), 1.0)
        category = self._rates(self.columns.category, seen, acted, base, CATEGORY_STRENGTH)
        creator = self._rates(self.columns.creator, seen, acted, category, CREATOR_STRENGTH)
        item = log_odds(acted, seen, creator, ITEM_STRENGTH)
        often = np.log1p(np.stack([seen.max(1), _summed(self.columns.creator, seen).max(1)], 1))
        statistics = np.concatenate([often, item - base, creator - base, category - base], axis=1)
        surfaces = self._surfaces(moment, base)
        outcomes = dataclasses.replace(self.outcomes, base=base[0], surfaces=surfaces)
        return StatisticsSnapshot(outcomes, statistics.astype(np.float32))

    def surfaces_at(self, learned: StatisticsSnapshot, moment: int) -> ActionRates:
        """The same, with what was known of the surfaces just before a moment."""
        if not self.logged:
            return learned.outcomes
        return dataclasses.replace(learned.outcomes, surfaces=self._surfaces(moment, learned.outcomes.base[None]))

    def _by_row(self, marks: npt.NDArray[np.bool_]) -> _F64:
        counts = [np.bincount(self.data.rows[mine], minlength=self.data.items) for mine in marks]
        return np.ascontiguousarray(np.stack(counts, 1).astype(np.float64))

    def _rates(self, keys: npt.NDArray[np.uint64], seen: _F64, acted: _F64, prior: _F64, strength: float) -> _F64:
        """Log-odds of the rows that share each row's key, the prior where it has none; float64 [N, A]."""
        prior = np.ascontiguousarray(np.broadcast_to(prior, seen.shape))
        found = log_odds(_summed(keys, acted), _summed(keys, seen), prior, strength)
        return np.where((keys == 0)[:, None], prior, found)

    def _surfaces(self, moment: int, base: _F64) -> dict[str, npt.NDArray[np.float32]]:
        """Log-odds above everybody's of the surfaces shown so far."""
        if self.shown is None:
            return {}
        count = int(np.searchsorted(self.shown.times, moment))
        where, labels = self.shown.where[:count], self.shown.done[:count] < moment
        size = len(self.shown.surfaces)
        seen = np.bincount(where, minlength=size).astype(np.float64)
        counts = [np.bincount(where[mine], minlength=size) for mine in labels.T]
        acted = np.stack(counts, 1).astype(np.float64)
        # Beside everybody's rate among impressions: what events say of it may rest on other showings.
        total = log_odds(acted.sum(0, keepdims=True), np.full_like(base, float(count)), base, SURFACE_STRENGTH)
        prior = np.ascontiguousarray(np.broadcast_to(total, acted.shape))
        shown = np.ascontiguousarray(np.broadcast_to(seen[:, None], acted.shape))
        rates = (log_odds(acted, shown, prior, SURFACE_STRENGTH) - base).astype(np.float32)
        return {name: rates[at] for at, name in enumerate(self.shown.surfaces) if seen[at]}


def _summed(keys: npt.NDArray[np.uint64], counts: _F64) -> _F64:
    """The counts of all rows that share each row's key; float64 [N, A]."""
    _, which = np.unique(keys, return_inverse=True)
    summed: Any = [np.bincount(which, column)[which] for column in counts.T]
    return np.stack(summed, 1)


def line_features(
    teller: PointInTimeStatistics,
    lines: Shown,
    users: npt.NDArray[np.float32],
    *,
    every_hours: float,
    last: int,
) -> npt.NDArray[np.float32]:
    """What the ranker reads of each line, as it was known then; float32 [n, F].

    Args:
        teller: Tells what was known.
        lines: What was shown, by time.
        users: The person's vector just before each line; float32 [n, D].
        every_hours: Hours between two moments at which statistics are learned.
        last: The last such moment, ms; lines after it see what was known then.
    """
    out = np.empty((len(lines), ranker_width(len(teller.outcomes))), np.float32)
    pasts = UserHistories(teller.data, teller.columns)
    for part, columns, outcomes in _replay(teller, lines, round(every_hours * HOUR_MS), last):
        for at in range(part.start, part.stop):
            out[at] = features_of_line(pasts, lines, at, users[at], columns, outcomes)
    return out


def features_of_line(
    pasts: UserHistories,
    lines: Shown,
    at: int,
    user: npt.NDArray[np.float32],
    columns: CatalogColumns,
    outcomes: ActionRates,
) -> npt.NDArray[np.float32]:
    """What the ranker reads of line `at`, where `columns` and `outcomes` hold what is known of items; float32 [F]."""
    row = lines.rows[at : at + 1]
    past = pasts.before(int(lines.people[at]), int(lines.positions[at]))
    moment = Moment(int(lines.times[at]), lines.surfaces[lines.where[at]], lines.places[at : at + 1])
    found = ranker_features(past, row, dot_rows(columns.vectors, row, user), columns, outcomes, moment)
    only: npt.NDArray[np.float32] = found[0]
    return only


def _replay(
    teller: PointInTimeStatistics, lines: Shown, every: int, last: int
) -> Iterator[tuple[slice, CatalogColumns, ActionRates]]:
    """The lines in parts, with the catalogue and the rates as they were known: items by `every` ms, surfaces hourly."""
    hours = np.minimum(lines.times, last) - last  # at most 0
    hour = -(-hours // HOUR_MS) - 1  # the hours that have ended before, counted back from the last moment
    hour[lines.times > last] = 0
    borders = np.flatnonzero(np.diff(hour)) + 1
    known: tuple[int, StatisticsSnapshot, CatalogColumns] | None = None
    for start, stop in zip([0, *borders], [*borders, len(lines)], strict=True):
        if start == stop:
            continue
        now = last + int(hour[start]) * HOUR_MS
        learned_at = last - -(-(last - now) // every) * every
        if known is None or known[0] != learned_at:
            learned = teller.at(learned_at)
            known = (learned_at, learned, dataclasses.replace(teller.columns, statistics=learned.statistics))
        yield slice(int(start), int(stop)), known[2], teller.surfaces_at(known[1], now)
