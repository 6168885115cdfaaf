"""Slopes of memory over time that outliers and a sawtooth do not bend, with an interval; and what they mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_Z = 1.96
"""Quantile of the normal distribution for an interval of 95 %."""

SETTLED = 0.25
"""Share of a run that counts as warm-up."""


def slope(times: npt.ArrayLike, values: npt.ArrayLike) -> dict[str, float]:
    """Returns the slope of Theil and Sen with the interval of Sen (1968).

    Args:
        times: When each value was read; float [n], n >= 3.
        values: The values; float [n].

    Returns:
        `slope`, `low` and `high`, values per unit of time.
    """
    x, y = np.asarray(times, float), np.asarray(values, float)
    first, second = np.triu_indices(x.size, 1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    spread = _Z * np.sqrt(x.size * (x.size - 1) * (2 * x.size + 5) / 18)
    low = int(np.clip(np.floor((slopes.size - spread) / 2), 0, slopes.size - 1))
    high = int(np.clip(np.ceil((slopes.size + spread) / 2), 0, slopes.size - 1))
    return {"slope": float(np.median(slopes)), "low": float(slopes[low]), "high": float(slopes[high])}


def settled(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Returns the values behind the warm-up."""
    every = np.asarray(values, float)
    return every[int(every.size * SETTLED) :]


def grows(times: npt.ArrayLike, values: npt.ArrayLike, limit: float) -> dict[str, Any]:
    """Returns the slope behind the warm-up, and `verdict` on it.

    Args:
        times: When each value was read; float [n].
        values: The values; float [n].
        limit: The greatest slope that is allowed.

    Returns:
        `slope`, `low`, `high` and `verdict`: "flat" where the whole interval is within the limit, "grows" where it is
        above it, else "within" or "above", by the slope itself: too short a run to be sure.
    """
    found = slope(settled(times), settled(values))
    if found["high"] <= limit:
        verdict = "flat"
    elif found["low"] > limit:
        verdict = "grows"
    else:
        verdict = "within" if found["slope"] <= limit else "above"
    return {**found, "verdict": verdict}


def stays(values: npt.ArrayLike, tolerance: float = 0.0) -> bool:
    """Returns True if the last third is no higher than the first one behind the warm-up, by the median.

    Args:
        values: The values in their order; float [n].
        tolerance: Share by which it may be higher, and 1 more.
    """
    thirds = np.array_split(settled(values), 3)
    return float(np.median(thirds[2])) <= float(np.median(thirds[0])) * (1 + tolerance) + 1
