"""The judge of the soak: planted slopes are found in noise, sawtooths and single jumps are none."""

from __future__ import annotations

import numpy as np
import pytest

from tests.proofs.slopes import grows, settled, slope, stays

HOURS = np.arange(1, 241) / 240


def rss(per_hour: float, seed: int = 0) -> np.ndarray:
    """Memory of a process in MiB: a warm-up, noise, a sawtooth of the collector, two outliers, and a slope."""
    rng = np.random.default_rng(seed)
    warm = 40 * (1 - np.exp(-HOURS * 30))
    values = 300 + warm + rng.normal(0, 0.05, HOURS.size) + (np.arange(HOURS.size) % 17) / 40 + per_hour * HOURS
    values[[90, 200]] += 25
    return values


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("per_hour", [-3.0, 0.0, 0.5, 2.0, 12.0])
def test_the_slope_is_found_and_inside_its_interval(per_hour, seed):
    found = slope(settled(HOURS), settled(rss(per_hour, seed)))
    assert found["low"] <= found["slope"] <= found["high"]
    assert abs(found["slope"] - per_hour) < 0.25
    assert grows(HOURS, rss(per_hour, seed), 1.0)["verdict"] == ("grows" if per_hour > 1 else "flat")


def test_an_exact_line_has_its_slope_and_no_width():
    assert slope([0, 1, 2, 3, 4, 5], [1, 3, 5, 7, 9, 11]) == {"slope": 2.0, "low": 2.0, "high": 2.0}


def test_a_run_too_short_to_be_sure_says_so():
    rng = np.random.default_rng(1)
    verdicts = {grows(HOURS[:20] / 10, 300 + rng.normal(0, 1, 20), 1.0)["verdict"] for _ in range(20)}
    assert verdicts <= {"within", "above", "flat", "grows"}
    assert verdicts & {"within", "above"}


def test_what_levels_off_stays_and_what_grows_does_not():
    assert stays([*range(40), *[40] * 160], 0.05)
    assert stays(20 + np.arange(200) % 3)
    assert not stays(20 + np.arange(200) / 10)
    assert not stays(np.linspace(100, 400, 200), 0.05)
