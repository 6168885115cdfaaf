"""Finds out if the values of events are ratings, and from which one an item is liked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.data.interactions import Interactions

RATING = "rating"
"""The only event type whose values are taken for ratings: those of others may be prices or amounts."""
MOST_LEVELS = 11
"""Different values of a scale at most: 0 to 10, or half stars."""
FEWEST_PER_LEVEL = 10
"""Mean events per value from which so few different values are no chance."""
LIKED = 2 / 3
"""Part of the scale from which a rating likes its item: 4 of 1 to 5, 7 of 1 to 10, 1 of 0 and 1."""
LIKED_SHARE = 0.1
"""Share of events that must be left to predict; with fewer, all are predicted."""


@dataclass(frozen=True)
class RatingScale:
    """The ratings of a data set.

    Attributes:
        levels: The different values, ascending.
        counts: Events of each.
        unrated: Events without a value.
    """

    levels: tuple[float, ...]
    counts: tuple[int, ...]
    unrated: int

    @property
    def least(self) -> float | None:
        """The lowest level that likes an item; None if too few events would be left to predict."""
        border = self.levels[0] + LIKED * (self.levels[-1] - self.levels[0])
        least = next(level for level in self.levels if level >= border - 1e-6)
        enough = self.liked(least) >= LIKED_SHARE * (sum(self.counts) + self.unrated)
        return least if enough else None

    def liked(self, least: float) -> int:
        """Returns the number of events that are not below a level; those without a value are none."""
        return sum(count for level, count in zip(self.levels, self.counts, strict=True) if level >= least)

    def in_words(self, least: float | None) -> str:
        """Tells how many events count as what, with `least` as `target_min_value`."""
        scale = f"values are ratings from {self.levels[0]:g} to {self.levels[-1]:g}"
        total = sum(self.counts)
        unrated = f", and {self.unrated:,} without one too" if self.unrated else ""
        if least is None:
            return f"{scale}, and all {total:,} count as likings{unrated}"
        liked = self.liked(least)
        return (
            f"{scale}: {liked:,} of {least:g} or more count as likings{unrated}; {total - liked:,} lower ones are not "
            "predicted and speak for no item, but stand in histories"
        )


def rating_scale(data: Interactions, ends: npt.NDArray[np.int64]) -> RatingScale | None:
    """Returns the scale of each user's leading `ends[u]` events, int64 `[U]`; None if the values are no ratings."""
    if RATING not in data.event_types:
        return None
    number = 1 + data.event_types.index(RATING)
    levels, counts, unrated = np.empty(0, np.float32), np.empty(0, np.int64), 0
    for block in data.blocks():
        leading = block.position < ends[block.owner]
        values, types = data.values[block.events][leading], data.types[block.events][leading]
        has_value = ~np.isnan(values)
        if (types[has_value] != number).any():
            return None
        unrated += int((~has_value & (types == number)).sum())
        distinct, times = np.unique(values[has_value], return_counts=True)
        levels, place = np.unique(np.concatenate([levels, distinct]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, times]), levels.size).astype(np.int64)
        if levels.size > MOST_LEVELS:
            return None
    if levels.size < 2 or counts.sum() < FEWEST_PER_LEVEL * levels.size:
        return None
    return RatingScale(tuple(levels.tolist()), tuple(counts.tolist()), unrated)
