"""The selector: it chooses the candidates of the slate, their order and the probability of each choice."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from features.catalog import Catalog
from features.clock import now_ms
from serving.bundle.vector_index import best_places
from serving.pipeline.candidates import Candidates
from serving.pipeline.request import Request, Scores, UserState
from serving.pipeline.results import Selected


class TopKSelector:
    """Selects the best candidates, every time the same: propensity 1.

    It looks once more at the clock: an item that became ineligible since the filters ran is not shown.
    """

    name = "top_k"

    def __init__(self, catalog: Catalog, *, keep_order: bool = False) -> None:
        """Breaks ties by row, or with `keep_order` by the order in which the candidates came."""
        self._catalog, self._keep_order = catalog, keep_order

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True: every request needs it."""
        return True

    def select(self, request: Request, user: UserState, candidates: Candidates, scores: Scores) -> Selected:
        """Returns the `page_size` best of those that may be shown at this moment."""
        now = now_ms()
        best = self._best(np.arange(scores.size), request.page_size, candidates, scores)
        # The page alone is looked at first: a change in this moment is rare, and a page is short.
        if not self._catalog.eligible(candidates.rows[best], now).all():
            eligible = np.flatnonzero(self._catalog.eligible(candidates.rows, now))
            best = self._best(eligible, request.page_size, candidates, scores)
        return Selected(best, np.ones(best.size, np.float64))

    def _best(
        self, at: npt.NDArray[np.intp], count: int, candidates: Candidates, scores: Scores
    ) -> npt.NDArray[np.intp]:
        """Returns the `count` best of the positions `at`, best first."""
        ties = at.astype(np.int32) if self._keep_order else candidates.rows[at]
        return at[best_places(scores[at], ties, count)]
