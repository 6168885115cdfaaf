"""What moves the scores once they are there: unlike a scorer, an adjuster may look at all the candidates together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from features.catalog import Catalog
from features.controls import Dial, Dials
from features.kernels import matched_weights
from serving.pipeline.query import Candidates, Query, Rows, Scores

REACH = 3.0
"""How far a dial turned to 1 moves a score, in standard deviations of the candidates' scores."""

_LARGEST = float(np.finfo(np.float32).max)

Keys = npt.NDArray[np.uint64]
Values = npt.NDArray[np.float64]
Number = TypeVar("Number", npt.NDArray[np.float32], npt.NDArray[np.float64])


class Dialled:
    """The person's dials: on any rung and any scale of scores they reach as far, as they move by the scores' spread."""

    name = "dials"
    part = "DIALS"

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, query: Query) -> bool:
        """Where a dial is turned."""
        return any(query.dials.values())

    def adjust(self, query: Query, candidates: Candidates, scores: Scores) -> Scores:
        """The scores with all dials applied; float32 [n]. One that sank stays sunk."""
        if not scores.size:
            return scores
        rows, reach = candidates.rows, REACH * _spread(scores)
        moved = scores.astype(np.float64)
        for dial, turned in _by_dial(query.dials).items():
            moved += reach * self._bearing(dial, turned, query, rows)
            for key, value in turned.items() if query.explain else ():
                self._note(query, dial, key, reach * self._bearing(dial, {key: value}, query, rows))
        cost = reach * query.dials.get((Dial.DIVERSITY, 0), 0.0)
        if cost:
            mixed = mix(moved, self._catalog.columns.category[rows], query.page_size, cost)
            if query.explain:
                known = np.isfinite(moved)
                self._note(query, Dial.DIVERSITY, 0, np.where(known, mixed, 0.0) - np.where(known, moved, 0.0))
            moved = mixed
        # A score that sank stays sunk; one that a dial moves past the largest number stays in its place.
        return np.where(np.isfinite(scores), np.clip(moved, -_LARGEST, _LARGEST), -np.inf).astype(np.float32)

    def _bearing(self, dial: Dial, turned: Mapping[int, float], query: Query, rows: Rows) -> Values:
        """How far each row is moved, 1 for all of the reach, by a dial as it is turned for each key; float64 [n]."""
        columns = self._catalog.columns
        if dial is Dial.NOVELTY:
            return turned[0] * (1 - 2 * self._familiar(query, rows))
        if dial is Dial.FRESHNESS:
            since = columns.available_from[rows]
            return turned[0] * (2 * _places(np.where(since > 0, since, columns.put_at[rows]).astype(np.float64)) - 1)
        column = columns.category if dial is Dial.CATEGORY_WEIGHT else columns.creator
        weights = np.array(list(turned.values()), np.float64)[:, None]
        return matched_weights(column[rows], np.array(list(turned), np.uint64), weights)[:, 0]

    def _familiar(self, query: Query, rows: Rows) -> Values:
        """How much a person has had of each row's category and creator, 1 for what they had most of; float64 [n].

        Of somebody of whom neither is known: how many people know the item.
        """
        columns, shares = self._catalog.columns, list[Values]()
        if query.profile:
            memory = query.profile.decayed_counts
            for name in ("category", "creator"):
                part = memory.of(name)
                counts = memory.counts[part, -1:].astype(np.float64)
                if counts.size and counts.max() > 0:
                    had = matched_weights(getattr(columns, name)[rows], memory.keys[part], counts)[:, 0]
                    shares.append(had / counts.max())
        return np.asarray(np.mean(shares, axis=0)) if shares else _places(columns.popularity[rows].astype(np.float64))

    def _note(self, query: Query, dial: Dial, key: int, move: npt.NDArray[np.floating]) -> None:
        query.moves[dial, key] = np.clip(move, -_LARGEST, _LARGEST).astype(np.float32)


def mix(scores: Number, topics: Keys, count: int, cost: float) -> Number:
    """Scores whose order mixes topics: each item that is chosen costs the others of its topic as much.

    Args:
        scores: Scores; float32 or float64 [n].
        topics: Topic of each, 0 for none, which costs nobody; uint64 [n].
        count: Number of items that will be chosen.
        cost: What each costs.

    Returns:
        What each score was when the item was chosen, of the others what is left; [n], of the same type.
    """
    left, out = scores.copy(), scores.copy()
    for _ in range(min(count, scores.size)):
        best = left.argmax()
        if left[best] == -np.inf:
            break
        out[best], left[best] = left[best], -np.inf
        if topics[best]:
            left[topics == topics[best]] -= cost
    waiting = left > -np.inf
    out[waiting] = left[waiting]
    return out


def _by_dial(dials: Dials) -> dict[Dial, dict[int, float]]:
    """Returns the dials that are turned and move each score by itself: dial -> key -> how far."""
    turned: dict[Dial, dict[int, float]] = {}
    for (dial, key), value in dials.items():
        if value and dial is not Dial.DIVERSITY:
            turned.setdefault(dial, {})[key] = value
    return turned


def _spread(scores: Scores) -> float:
    """Standard deviation of the scores that did not sink; 1 where there is none, so that any dial decides."""
    known = scores[np.isfinite(scores)].astype(np.float64)
    return float(known.std()) or 1.0 if known.size else 1.0


def _places(values: Values) -> Values:
    """Where each value stands among those above 0, from 0 to 1; equals share a place, the rest is in the middle."""
    known = values > 0
    order = np.sort(values[known])
    below, up_to = (order.searchsorted(values, side=side) for side in ("left", "right"))
    return np.where(known, (below + up_to) / max(2 * order.size, 1), 0.5)
