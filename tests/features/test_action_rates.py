"""Rates of what people did with what they were shown: by hand, and against the plain twins."""

from __future__ import annotations

import numpy as np
import pytest

from features.action_rates import HALF_LIVES, MATCH_STRENGTH, USER_STRENGTH, ActionRates, Rates
from features.kernels import log_odds, log_odds_plain, matched_weights, matched_weights_plain
from features.ranker_plain import among

FACTS = {
    "event_types": ["click", "shown"],
    "actions": [
        {"name": "click", "event_type": "click", "min_value": 2.0, "shown_types": ["shown"]},
        {"name": "any", "event_type": "click", "min_value": None},
    ],
    "base_rates": [-1.0, 0.5],
    "surface_rates": {"home": [0.25, -0.25]},
}
CLICK, SHOWN = 1, 2
RNG = np.random.default_rng(0)


def odds(rate: float) -> float:
    return float(np.log(rate / (1 - rate)))


def test_events_show_items_and_are_actions() -> None:
    outcomes = ActionRates.of(FACTS)
    shown, acted = outcomes.marks(np.array([SHOWN, CLICK, CLICK, 0], np.int32), np.array([np.nan, 1, 2, 9], np.float32))
    assert shown.tolist() == [[True, False, False, False], [True, True, True, True]]
    assert acted.tolist() == [[False, False, True, False], [False, True, True, False]]
    assert outcomes.surface("home").tolist() == [0.25, -0.25]
    assert outcomes.surface("elsewhere").tolist() == [0, 0]


def test_what_came_before_the_first_showing_does_not_count_and_the_new_counts_more() -> None:
    types = np.array([CLICK, SHOWN, CLICK, SHOWN], np.int32)
    _, weights = ActionRates.of(FACTS).weights(types, np.full(4, 5, np.float32))
    older = 0.5**0.25
    np.testing.assert_allclose(weights[:, 0], [0, older, 0, 1])
    np.testing.assert_allclose(weights[:, 2], [0, 0, older, 0])


def test_a_person_has_rates_of_their_own_and_with_some_of_the_items() -> None:
    outcomes = ActionRates.of(FACTS)
    newcomer = Rates.of(outcomes, np.empty(0, np.int32), np.empty(0, np.float32))
    np.testing.assert_allclose(newcomer.long, [-1, 0.5])
    assert np.abs(among(newcomer, np.array([3, 0], np.uint64), np.empty(0, np.uint64))).max() < 1e-9
    types, values = np.array([SHOWN, CLICK, SHOWN], np.int32), np.full(3, 5, np.float32)
    rates = Rates.of(outcomes, types, values)
    older, base = 0.5 ** (1 / HALF_LIVES[0]), 1 / (1 + np.exp(1))
    mine = (older + USER_STRENGTH * base) / (1 + older + USER_STRENGTH)
    assert rates.long[0] == pytest.approx(odds(mine))
    matched = among(rates, np.array([7, 8, 0], np.uint64), np.array([7, 7, 8], np.uint64))
    assert matched[0, 0] == pytest.approx(odds((older + MATCH_STRENGTH * mine) / (older + MATCH_STRENGTH)) - odds(mine))
    assert matched[1, 0] == pytest.approx(odds(MATCH_STRENGTH * mine / (1 + MATCH_STRENGTH)) - odds(mine))
    assert abs(matched[2, 0]) < 1e-9


def test_kernels_equal_their_plain_twins_to_the_bit() -> None:
    keys, history = RNG.integers(0, 5, 30).astype(np.uint64), RNG.integers(0, 5, 60).astype(np.uint64)
    weights = RNG.random((60, 4))
    assert matched_weights(keys, history, weights).tobytes() == matched_weights_plain(keys, history, weights).tobytes()
    shown, prior = 10 * RNG.random((30, 3)), RNG.normal(size=(30, 3))
    acted = shown * RNG.random((30, 3)) * 1.1
    assert log_odds(acted, shown, prior, 3.0).tobytes() == log_odds_plain(acted, shown, prior, 3.0).tobytes()
    np.testing.assert_allclose(log_odds(0 * acted, 0 * shown, prior, 3.0), prior, atol=1e-12)
