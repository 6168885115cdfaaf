"""The adjusters move scores; unlike a scorer, an adjuster may look at all the candidates together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from features.catalog import Catalog
from features.controls import Dial, Dials
from features.kernels import matched_weights
from serving.pipeline.candidates import Candidates
from serving.pipeline.request import Request, Rows, Scores, UserState
from serving.pipeline.results import Adjusted

REACH = 3.0
"""The distance that a dial turned to 1 moves a score, in standard deviations of the candidates' scores."""

_LARGEST = float(np.finfo(np.float32).max)

Keys = npt.NDArray[np.uint64]
Values = npt.NDArray[np.float64]
Number = TypeVar("Number", npt.NDArray[np.float32], npt.NDArray[np.float64])


class DialAdjuster:
    """Applies the user's dials.

    They move scores by the scores' own spread, so that they reach as far on any rung and any scale of scores.
    """

    name = "dials"
    part = "DIALS"

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if a dial is turned."""
        return any(user.dials.values())

    def adjust(self, request: Request, user: UserState, candidates: Candidates, scores: Scores) -> Adjusted:
        """Returns the scores with all dials applied; float32 [n]. One that sank stays sunk."""
        if not scores.size:
            return Adjusted(scores, {})
        # Scales differ: a BM25 share lies in 0..1, an upstream score anywhere. The deviation makes dials reach alike.
        rows, reach = candidates.rows, REACH * _deviation(scores)
        # In float64, so that the order in which a thousand dials add up cannot be seen in a float32.
        moved, moves = scores.astype(np.float64), dict[tuple[Dial, int], Scores]()
        for dial, turned in _by_dial(user.dials).items():
            moved += reach * self._pull(dial, turned, user, rows)
            # Dial by dial once more, as their sum is quicker to compute than the parts that reasons are made of.
            for key, value in turned.items() if request.explain else ():
                moves[dial, key] = _as_move(reach * self._pull(dial, {key: value}, user, rows))
        cost = reach * user.dials.get((Dial.DIVERSITY, 0), 0.0)
        if cost:
            # Diversity comes last: it mixes the topics of the page that the other dials would show.
            mixed = mix(moved, self._catalog.columns.category[rows], request.page_size, cost)
            if request.explain:
                finite = np.isfinite(moved)  # -inf - -inf is not a number
                moves[Dial.DIVERSITY, 0] = _as_move(np.where(finite, mixed, 0.0) - np.where(finite, moved, 0.0))
            moved = mixed
        # A score that sank stays sunk; one that a dial moves past the largest number stays in its place.
        clipped = np.clip(moved, -_LARGEST, _LARGEST)
        return Adjusted(np.where(np.isfinite(scores), clipped, -np.inf).astype(np.float32), moves)

    def _pull(self, dial: Dial, turned: Mapping[int, float], user: UserState, rows: Rows) -> Values:
        """Returns how far a dial, turned as it is for each key, moves each row; 1 is all of the reach; float64 [n]."""
        columns = self._catalog.columns
        if dial is Dial.NOVELTY:
            return turned[0] * (1 - 2 * self._familiarity(user, rows))
        if dial is Dial.FRESHNESS:
            # An item without a date of its own is as new as its arrival; by rank, as dates have no natural scale.
            since = columns.available_from[rows]
            return turned[0] * (2 * _places(np.where(since > 0, since, columns.put_at[rows]).astype(np.float64)) - 1)
        column = columns.category if dial is Dial.CATEGORY_WEIGHT else columns.creator
        weights = np.array(list(turned.values()), np.float64)[:, None]
        return matched_weights(column[rows], np.array(list(turned), np.uint64), weights)[:, 0]

    def _familiarity(self, user: UserState, rows: Rows) -> Values:
        """Returns how much a user has had of each row's category and creator, 1 for the most frequent; float64 [n].

        If neither is known of the user, it is how many users know the item.
        """
        columns, shares = self._catalog.columns, list[Values]()
        if user.profile:
            counters = user.profile.decayed_counts
            for name in ("category", "creator"):
                part = counters.of(name)
                # The longest half-life: what is familiar does not become new within days.
                counts = counters.counts[part, -1:].astype(np.float64)
                if counts.size and counts.max() > 0:
                    matched = matched_weights(getattr(columns, name)[rows], counters.keys[part], counts)[:, 0]
                    shares.append(matched / counts.max())
        return np.asarray(np.mean(shares, axis=0)) if shares else _places(columns.popularity[rows].astype(np.float64))


def mix(scores: Number, topics: Keys, count: int, cost: float) -> Number:
    """Returns scores whose order mixes topics: each item that is chosen costs the others of its topic as much.

    Args:
        scores: Scores; float32 or float64 [n].
        topics: Topic of each, 0 for none, which costs nothing; uint64 [n].
        count: Number of items that will be chosen.
        cost: What each costs.

    Returns:
        For each chosen item its score at that moment, for the others their reduced score; [n], of the same type.
    """
    # A greedy choice, as diversity depends on the items chosen before.
    left, out = scores.copy(), scores.copy()
    for _ in range(min(count, scores.size)):
        best = left.argmax()
        if left[best] == -np.inf:
            break
        out[best], left[best] = left[best], -np.inf
        if topics[best]:
            left[topics == topics[best]] -= cost
    remaining = left > -np.inf
    out[remaining] = left[remaining]
    return out


def _by_dial(dials: Dials) -> dict[Dial, dict[int, float]]:
    """Returns the dials that are turned and move each score by itself: dial -> key -> how far."""
    turned: dict[Dial, dict[int, float]] = {}
    for (dial, key), value in dials.items():
        if value and dial is not Dial.DIVERSITY:
            turned.setdefault(dial, {})[key] = value
    return turned


def _as_move(move: npt.NDArray[np.floating]) -> Scores:
    return np.asarray(np.clip(move, -_LARGEST, _LARGEST), np.float32)


def _deviation(scores: Scores) -> float:
    """Returns the standard deviation of the scores that did not sink; 1 for equal scores, so that any dial decides."""
    finite = scores[np.isfinite(scores)].astype(np.float64)
    return float(finite.std()) or 1.0 if finite.size else 1.0


def _places(values: Values) -> Values:
    """Returns the rank of each value among those above 0, from 0 to 1; equals share a rank, the others have 0.5."""
    positive = values > 0
    order = np.sort(values[positive])
    # The middle of the first and the last place that a value could take, so that equal values share a rank.
    below, up_to = (order.searchsorted(values, side=side) for side in ("left", "right"))
    return np.where(positive, (below + up_to) / max(2 * order.size, 1), 0.5)
