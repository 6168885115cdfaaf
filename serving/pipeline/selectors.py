"""Which candidates make the slate, in which order, and with which probability."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from features.catalog import Catalog
from features.clock import now_ms
from serving.pipeline.query import Candidates, Query, Scores


class TopK:
    """The best ones, every time the same: propensity 1.

    Looks once more at the clock: what became ineligible since the filters ran does not leave.
    """

    name = "top_k"

    def __init__(self, catalog: Catalog, *, keep_order: bool = False) -> None:
        """Ties go by row, or with `keep_order` by the order in which the candidates came."""
        self._catalog, self._keep_order = catalog, keep_order

    def enable(self, query: Query) -> bool:
        """Always."""
        return True

    def select(
        self, query: Query, candidates: Candidates, scores: Scores
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """The `page_size` best of those that may be shown at this moment."""
        now = now_ms()
        best = self._best(np.arange(scores.size), query, candidates, scores)
        if not self._catalog.eligible(candidates.rows[best], now).all():
            may = np.flatnonzero(self._catalog.eligible(candidates.rows, now))
            best = self._best(may, query, candidates, scores)
        return best, np.ones(best.size, np.float64)

    def _best(
        self, at: npt.NDArray[np.intp], query: Query, candidates: Candidates, scores: Scores
    ) -> npt.NDArray[np.intp]:
        """The best of the positions `at`, best first."""
        if at.size > query.page_size:
            # All that may be on the page, ties with its last item included; sorting these is cheaper than sorting all.
            mine = scores[at]
            at = at[mine >= np.partition(mine, at.size - query.page_size)[at.size - query.page_size]]
        ties = at if self._keep_order else candidates.rows[at]
        return at[np.lexsort((ties, -scores[at]))[: query.page_size]]
