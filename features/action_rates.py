"""Rates at which users act on items that they were shown, as log-odds above the average: 0 means nothing is known.

An action has the event types that show an item and so may lead to it. Actions before the first showing in the ring do
not count, because the showings that led to them have left it: the rate would have no denominator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.kernels import log_odds
from features.manifest import ActionSpec, ModelSpec
from features.profile import RING

HALF_LIVES = (40, 4)
"""Showings after which a showing weighs half, in a user's long-term and recent rates."""

USER_STRENGTH = 4.0
MATCH_STRENGTH = 2.0
"""Showings that the prior of a rate is worth: of a user, and of a user with some of the items."""

_F64 = npt.NDArray[np.float64]
# Computed once in float64, so that training and serving read the same bits.
DECAYS = tuple(0.5 ** (np.arange(RING + 1, dtype=np.float64) / half_life) for half_life in HALF_LIVES)
"""Weight of a showing by the number of showings after it, for each of `HALF_LIVES`; float64 [RING + 1]."""


@dataclass(frozen=True, slots=True)
class ActionRates:
    """The reading of a bundle's actions from events, and their average rates; A actions, T event types.

    Attributes:
        shown: True if events of the type show items that the action may follow; bool [A, 1 + T], type 0 = unknown.
        acted: True if events of the type are the action; bool [A, 1 + T].
        least: Smallest value of the event that counts; float64 [A], -inf if any does.
        base: Log-odds of each action over all users; float64 [A].
        surfaces: Log-odds of each action above `base`, by surface; float32 [A] each.
    """

    shown: npt.NDArray[np.bool_]
    acted: npt.NDArray[np.bool_]
    least: _F64
    base: _F64
    surfaces: Mapping[str, npt.NDArray[np.float32]]

    def __len__(self) -> int:
        """Returns the number of actions."""
        return self.base.size

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> ActionRates:
        """Reads `event_types`, `actions`, `base_rates` and `surface_rates` of a run's result."""
        actions = list(map(ActionSpec.of, facts["actions"]))
        base_rates = facts.get("base_rates") or [0.0] * len(actions)
        return cls._build(facts["event_types"], actions, base_rates, facts.get("surface_rates") or {})

    @classmethod
    def of_model(cls, model: ModelSpec) -> ActionRates:
        """Reads the actions of a bundle's model, and their rates."""
        return cls._build(model.event_types, model.actions, model.base_rates, model.surface_rates)

    @classmethod
    def _build(
        cls,
        event_types: Sequence[str],
        actions: Sequence[ActionSpec],
        base_rates: Sequence[float],
        surface_rates: Mapping[str, Sequence[float]],
    ) -> ActionRates:
        shown = np.zeros((len(actions), 1 + len(event_types)), bool)
        acted = np.zeros_like(shown)
        for number, action in enumerate(actions):
            # An action that names no type that shows items may follow anything.
            shown[number] = not action.shown_types
            for at, name in enumerate(event_types, 1):
                shown[number, at] |= name in action.shown_types
                acted[number, at] = name == action.event_type
        least = [-np.inf if action.min_value is None else action.min_value for action in actions]
        surfaces = {name: np.array(rates, np.float32) for name, rates in surface_rates.items()}
        return cls(shown, acted, np.array(least, np.float64), np.array(base_rates, np.float64), surfaces)

    def surface(self, name: str) -> npt.NDArray[np.float32]:
        """Returns the log-odds of each action that a surface adds; float32 [A], zeros if it is unknown."""
        rates = self.surfaces.get(name)
        return np.zeros(len(self), np.float32) if rates is None else rates

    def marks(
        self, types: npt.NDArray[np.integer[Any]], values: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Returns masks of the events that show an item, and of those that are each action; two bool [A, h]."""
        enough = np.isneginf(self.least)[:, None] | (values.astype(np.float64) >= self.least[:, None])
        return self.shown[:, types], self.acted[:, types] & enough

    def weights(self, types: npt.NDArray[np.int32], values: npt.NDArray[np.float32]) -> tuple[_F64, ...]:
        """Returns the weight of each event among the showings, then among the actions, oldest first.

        Returns:
            For each of `HALF_LIVES` float64 [h, 2A].
        """
        shown, acted = self.marks(types, values)
        showings = np.cumsum(shown, axis=1)
        # An event decays by the showings after it, not by time, so that a pause does not forget a taste.
        later: npt.NDArray[np.int64] = showings[:, -1:] - showings
        counts = np.concatenate([shown, acted & (showings > 0)]).T.astype(np.float64, order="C")
        decays = (np.tile(decay[later].T, 2) for decay in DECAYS)
        return tuple(decay * counts for decay in decays)


@dataclass(frozen=True, slots=True)
class Rates:
    """A user's own rates, and the weights that they are computed from.

    Attributes:
        long: Log-odds of each action in the long term; float64 [A].
        short: In the short term; float64 [A].
        weights: Weight of each event in the long term, see `ActionRates.weights`; float64 [h, 2A].
    """

    long: _F64
    short: _F64
    weights: _F64

    @classmethod
    def of(cls, actions: ActionRates, types: npt.NDArray[np.int32], values: npt.NDArray[np.float32]) -> Rates:
        """Computes them from the types and values of a user's events, oldest first."""
        if not types.size:
            return cls(actions.base, actions.base, np.zeros((0, 2 * len(actions)), np.float64))
        # The short term is pulled towards the long term, and that towards the average.
        weights, brief = actions.weights(types, values)
        long = _rate(weights.sum(axis=0)[None], actions.base[None], USER_STRENGTH)
        return cls(long[0], _rate(brief.sum(axis=0)[None], long, USER_STRENGTH)[0], weights)


def _rate(weights: _F64, prior: _F64, strength: float) -> _F64:
    """Returns log-odds from weights float64 [n, 2A] of showings, then actions."""
    actions = weights.shape[1] // 2
    acted, shown = np.ascontiguousarray(weights[:, actions:]), np.ascontiguousarray(weights[:, :actions])
    return np.asarray(log_odds(acted, shown, np.ascontiguousarray(prior), strength))
