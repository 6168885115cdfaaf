"""The candidates of a request: what each source names, joined into one table of scores, source by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from serving.pipeline.request import Mask, Rows, Scores


class Proposal(NamedTuple):
    """The candidates that one source named.

    Attributes:
        name: The source.
        rows: The rows, each once, best first; int32 [n].
        scores: Their scores; float32 [n].
        tier: The source's tier, 0 for the highest.
    """

    name: str
    rows: Rows
    scores: Scores
    tier: int = 0


@dataclass(frozen=True, slots=True)
class Candidates:
    """Candidates in the order in which the sources first named them.

    Attributes:
        rows: Their rows, each once; int32 [n].
        scores: The score of each source, NaN where it did not name the row; float32 [sources, n].
        names: Names of the sources.
        tiers: The tier of each source, 0 for the highest; empty where all are of the highest.
    """

    rows: Rows
    scores: npt.NDArray[np.float32]
    names: tuple[str, ...]
    tiers: tuple[int, ...] = ()

    def of(self, source: str) -> Scores:
        """Returns the score that a source gave each candidate, NaN where it did not name it; float32 [n]."""
        if source in self.names:
            scores: Scores = self.scores[self.names.index(source)]
            return scores
        return np.full(self.rows.size, np.nan, np.float32)

    def take(self, at: Mask | npt.NDArray[np.intp]) -> Candidates:
        """Returns the candidates at some positions."""
        return Candidates(self.rows[at], self.scores[:, at], self.names, self.tiers)

    def tier_of_each(self) -> npt.NDArray[np.intp]:
        """Returns the highest tier that named each candidate; intp [n]."""
        tiers = np.zeros(self.rows.size, np.intp)
        if any(self.tiers):
            named = np.where(np.isnan(self.scores), len(self.tiers) + max(self.tiers), np.array(self.tiers)[:, None])
            tiers = named.min(axis=0)
        return tiers


def merge(proposals: Sequence[Proposal]) -> Candidates:
    """Joins what the sources named, each row once, in the order in which it was first named.

    A source that is asked in two tiers counts as one, of the higher tier.
    """
    tiers: dict[str, int] = {}
    for proposal in proposals:
        tiers.setdefault(proposal.name, proposal.tier)
    names, levels = tuple(tiers), tuple(tiers.values())
    if len(proposals) == 1:
        _, rows, scores, _ = proposals[0]
        return Candidates(rows.astype(np.int32, copy=False), scores.astype(np.float32, copy=False)[None], names, levels)
    joined = np.concatenate([proposal.rows for proposal in proposals])
    # Of a row that comes again the last write stands, so written backwards the first place of each remains; no cell is
    # read that was not written. Several times as quick as sorting.
    first_at = np.empty(int(joined.max(initial=-1)) + 1, np.intp)
    first_at[joined[::-1]] = np.arange(joined.size)[::-1]
    first = first_at[joined]
    new = first == np.arange(joined.size)
    place = (np.cumsum(new) - 1)[first]
    table = np.full((len(names), int(new.sum())), np.nan, np.float32)
    start = 0
    for proposal in proposals:
        end = start + proposal.rows.size
        table[names.index(proposal.name), place[start:end]] = proposal.scores
        start = end
    return Candidates(joined[new].astype(np.int32, copy=False), table, names, levels)


def fills(candidates: Candidates, tiers: int, page_size: int) -> bool:
    """Returns True if the candidates that a source of the first `tiers` tiers named, extras left out, are a page."""
    if max(candidates.tiers, default=0) < tiers:
        return candidates.rows.size >= page_size
    named = ~np.isnan(candidates.scores[np.array(candidates.tiers) < tiers])
    return int(named.any(axis=0).sum()) >= page_size


def interleaved(candidates: Candidates) -> Scores:
    """Returns a stand-in for scores: minus the best rank that any source gave, tier behind tier; float32 [n]."""
    if not candidates.names:
        return np.empty(0, np.float32)
    # Ranks, since the scores of different sources have no common scale.
    sunk = np.where(np.isnan(candidates.scores), -np.inf, candidates.scores)
    order = np.argsort(-sunk, axis=1, kind="stable")
    ranks = np.empty(order.shape, np.float32)
    np.put_along_axis(ranks, order, np.arange(order.shape[1], dtype=np.float32)[None], axis=1)
    ranks[np.isnan(candidates.scores)] = np.inf
    if candidates.tiers:
        ranks += np.array(candidates.tiers, np.float32)[:, None] * candidates.rows.size
    best: Scores = ranks.min(axis=0)
    return -best
