"""What moves the scores once they are there: unlike a scorer, an adjuster may look at all the candidates together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from features.catalog import Catalog
from features.controls import Dial
from features.kernels import matched_weights
from serving.query import Candidates, Query, Rows, Scores

REACH = 3.0
"""How far a dial turned to 1 moves a score, in standard deviations of the candidates' scores."""

Keys = npt.NDArray[np.uint64]
Values = npt.NDArray[np.float64]


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
        reach = REACH * _spread(scores)
        moved = scores.astype(np.float64)
        for (dial, key), turned in query.dials.items():
            if turned and dial is not Dial.DIVERSITY:
                move = reach * turned * self._bearing(dial, key, query, candidates.rows)
                moved += move
                self._note(query, dial, key, move)
        out = moved.astype(np.float32)
        cost = np.float32(reach * query.dials.get((Dial.DIVERSITY, 0), 0.0))
        if cost:
            mixed = mix(out, self._catalog.columns.category[candidates.rows], query.page_size, cost)
            sunk = np.where(np.isfinite(out), out, np.float32(0.0))
            self._note(query, Dial.DIVERSITY, 0, np.where(np.isfinite(mixed), mixed, np.float32(0.0)) - sunk)
            return mixed
        return out

    def _bearing(self, dial: Dial, key: int, query: Query, rows: Rows) -> Values:
        """What a dial has to do with each row: 1 for all that it asks for, -1 for its opposite; float64 [n]."""
        columns = self._catalog.columns
        if dial is Dial.NOVELTY:
            return 1 - 2 * self._familiar(query, rows)
        if dial is Dial.FRESHNESS:
            since = columns.available_from[rows]
            return 2 * _places(np.where(since > 0, since, columns.put_at[rows]).astype(np.float64)) - 1
        keys = columns.category if dial is Dial.CATEGORY_WEIGHT else columns.creator
        return np.asarray(keys[rows] == np.uint64(key), np.float64)

    def _familiar(self, query: Query, rows: Rows) -> Values:
        """How much a person has had of each row's category and creator, 1 for what they had most of; float64 [n].

        Of somebody of whom neither is known: how many people know the item.
        """
        columns, shares = self._catalog.columns, list[Values]()
        if query.profile:
            memory = query.profile.memory
            for name in ("category", "creator"):
                part = memory.of(name)
                counts = memory.counts[part, -1:].astype(np.float64)
                if counts.size and counts.max() > 0:
                    had = matched_weights(getattr(columns, name)[rows], memory.keys[part], counts)[:, 0]
                    shares.append(had / counts.max())
        return np.asarray(np.mean(shares, axis=0)) if shares else _places(columns.popularity[rows].astype(np.float64))

    def _note(self, query: Query, dial: Dial, key: int, move: npt.NDArray[np.floating]) -> None:
        if query.explain:
            query.moves[dial, key] = move.astype(np.float32)


def mix(scores: Scores, topics: Keys, count: int, cost: np.float32) -> Scores:
    """Scores whose order mixes topics: each item that is chosen costs the others of its topic as much.

    Args:
        scores: Scores; float32 [n].
        topics: Topic of each, 0 for none, which costs nobody; uint64 [n].
        count: Number of items that will be chosen.
        cost: What each costs.

    Returns:
        What each score was when the item was chosen, of the others what is left; float32 [n].
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
