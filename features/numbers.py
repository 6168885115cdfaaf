"""Reads numbers from texts."""

from __future__ import annotations

import math

_LARGEST = 1e30


def number_of(text: str | None) -> float:
    """Returns the number that a text states; NaN if it states none, or one that float32 could not hold."""
    try:
        number = float(text) if text else math.nan
    except ValueError:
        return math.nan
    return number if abs(number) <= _LARGEST else math.nan
