"""What people did with what they were shown, as log-odds above everybody's: 0 means that nothing is known.

An action has the event types that show an item and so may lead to it. What a person did before the first showing that
is remembered does not count, for nobody knows what else they were shown then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.kernels import log_odds, matched_weights
from features.manifest import ActionSpec, ModelSpec
from features.profile import RING

HALF_LIVES = (40, 4)
"""Showings after which a showing weighs half, in a person's long and short memory."""

USER_STRENGTH = 4.0
MATCH_STRENGTH = 2.0
"""Showings that the expectation of a rate is worth: of a person, and of a person with some of the items."""

_F64 = npt.NDArray[np.float64]
# Computed once in float64, so that training and serving read the same bits.
_DECAYS = {half_life: 0.5 ** (np.arange(RING + 1, dtype=np.float64) / half_life) for half_life in HALF_LIVES}


@dataclass(frozen=True, slots=True)
class ActionRates:
    """How a bundle's actions are read from events; A actions, T event types.

    Attributes:
        shown: Whether an event of a type shows an item that the action may follow; bool [A, 1 + T], type 0 = unknown.
        acted: Whether an event of a type is the action; bool [A, 1 + T].
        least: Smallest value of the event that counts; float64 [A], -inf where any does.
        base: Log-odds of each action for everybody; float64 [A].
        surfaces: Log-odds of each action above `base`, by surface; float32 [A] each.
    """

    shown: npt.NDArray[np.bool_]
    acted: npt.NDArray[np.bool_]
    least: _F64
    base: _F64
    surfaces: Mapping[str, npt.NDArray[np.float32]]

    def __len__(self) -> int:
        """The number of actions."""
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
        """What a surface adds to the log-odds of each action; float32 [A], zeros where it is unknown."""
        found = self.surfaces.get(name)
        return np.zeros(len(self), np.float32) if found is None else found

    def marks(
        self, types: npt.NDArray[np.integer[Any]], values: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Which events show an item, and which are each action; two bool [A, h]."""
        enough = np.isneginf(self.least)[:, None] | (values.astype(np.float64) >= self.least[:, None])
        return self.shown[:, types], self.acted[:, types] & enough

    def weights(self, types: npt.NDArray[np.int32], values: npt.NDArray[np.float32]) -> tuple[_F64, ...]:
        """The weight of each event among the showings, then among the actions, oldest first.

        Returns:
            For each of `HALF_LIVES` float64 [h, 2A].
        """
        shown, acted = self.marks(types, values)
        known = np.cumsum(shown, axis=1)
        later: npt.NDArray[np.int64] = known[:, -1:] - known
        counts = np.concatenate([shown, acted & (known > 0)]).T.astype(np.float64, order="C")
        decays = (np.tile(_DECAYS[half_life][later].T, 2) for half_life in HALF_LIVES)
        return tuple(decay * counts for decay in decays)


@dataclass(frozen=True, slots=True)
class Rates:
    """A person's own rates, and what they are computed from.

    Attributes:
        long: Log-odds of each action in the long memory; float64 [A].
        short: In the short memory; float64 [A].
        weights: Weight of each remembered event in the long memory, see `ActionRates.weights`; float64 [h, 2A].
    """

    long: _F64
    short: _F64
    weights: _F64

    @classmethod
    def of(cls, outcomes: ActionRates, types: npt.NDArray[np.int32], values: npt.NDArray[np.float32]) -> Rates:
        """Reads them from the types and values of a person's events, oldest first."""
        if not types.size:
            return cls(outcomes.base, outcomes.base, np.zeros((0, 2 * len(outcomes)), np.float64))
        weights, brief = outcomes.weights(types, values)
        long = _rate(weights.sum(axis=0)[None], outcomes.base[None], USER_STRENGTH)
        return cls(long[0], _rate(brief.sum(axis=0)[None], long, USER_STRENGTH)[0], weights)

    def among(self, keys: npt.NDArray[np.uint64], history: npt.NDArray[np.uint64]) -> _F64:
        """Log-odds above the person's own, among the events that share a candidate's key; float64 [n, A]."""
        expected = np.full((keys.size, self.long.size), self.long)
        return _rate(matched_weights(keys, history, self.weights), expected, MATCH_STRENGTH) - self.long


def _rate(weights: _F64, prior: _F64, strength: float) -> _F64:
    """Log-odds from weights float64 [n, 2A] of showings, then actions."""
    actions = weights.shape[1] // 2
    acted, shown = np.ascontiguousarray(weights[:, actions:]), np.ascontiguousarray(weights[:, :actions])
    return np.asarray(log_odds(acted, shown, np.ascontiguousarray(prior), strength))
