"""The results of stages: values that the runner applies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.controls import Dial
from serving.pipeline.candidates import Candidates
from serving.pipeline.request import Degraded, Rows, Scores, Unknown, UserState

Keys = npt.NDArray[np.uint64]
Moves = Mapping[tuple[Dial, int], Scores]
"""The distance that each turned dial moved each score, by dial and key; float32 [n]."""


class Hydrated(NamedTuple):
    """A hydrator's result.

    Attributes:
        user: The user state with what the hydrator found.
        degraded: The parts that the answer has to do without all the same.
    """

    user: UserState
    degraded: tuple[Degraded, ...] = ()


class HeldBack(NamedTuple):
    """The rows that a filter takes out of those that sources may name.

    Attributes:
        rows: Rows by number; int32 [n].
        keyed: Rows by key: columns of the catalog, uint64 [at least its size], each with the keys to hold back,
            uint64 [k]. A key may stand for a large share of the catalog, so its rows are never listed.
    """

    rows: Rows
    keyed: tuple[tuple[Keys, Keys], ...] = ()


class Scored(NamedTuple):
    """A scorer's result.

    Attributes:
        scores: One score per candidate, higher is better; float32 [n].
        probabilities: Probability per action, NaN for candidates that the ranker did not judge; float32 [n, A].
        features: The inputs of the ranker, NaN likewise, where that is to be logged; float32 [n, F].
    """

    scores: Scores
    probabilities: Scores | None = None
    features: Scores | None = None


class Adjusted(NamedTuple):
    """An adjuster's result.

    Attributes:
        scores: The moved scores; float32 [n].
        moves: How far each turned dial moved each score; empty unless reasons are wanted.
    """

    scores: Scores
    moves: Moves


class Selected(NamedTuple):
    """A selector's result.

    Attributes:
        positions: Positions among the candidates, best first; intp [k].
        propensities: Probability of each choice, NaN where not exact; float64 [k].
    """

    positions: npt.NDArray[np.intp]
    propensities: npt.NDArray[np.float64]


class Reason(NamedTuple):
    """A reason why an item is in a slate: a kind, the row of the item it points at (-1 for none), words, a strength."""

    kind: str
    row: int
    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Slate:
    """The ordered answer.

    Attributes:
        rows: Its items, best first; int32 [k].
        scores: Their scores; float32 [k].
        propensities: Probability that the policy shows the item in its position, NaN where not exact; float64 [k].
        candidates: The items with the score that each source gave them.
        probabilities: Probability per action; float32 [k, A], or None where the ranker did not run.
        dropped: Number of items that were held back, by the filter that held them back first: of the catalog, or of
            the caller's candidates where it brought them.
        timings: Microseconds per stage, in order; complete once the runner has returned.
        reasons: Reasons per item, empty unless asked for.
        features: The inputs of the ranker of each item; float32 [k, F], None where that is not to be logged.
        moves: How far each turned dial moved each score; float32 [k], empty unless reasons are wanted.
        unknown: Candidates that the catalog does not know, each at its position on the page; they are part of the
            answer like `rows`, and in none of the arrays.
        user: The user's state that the slate was made from.
        rung: The level of personalisation that served.
        degraded: The parts that were given up; complete once the explainers are done.
    """

    rows: Rows
    scores: Scores
    propensities: npt.NDArray[np.float64]
    candidates: Candidates
    probabilities: Scores | None
    dropped: Mapping[str, int]
    timings: Sequence[tuple[str, int]]
    reasons: Sequence[Sequence[Reason]] = ()
    features: Scores | None = None
    moves: Moves = field(default_factory=dict)
    unknown: tuple[Unknown, ...] = ()
    user: UserState = field(default_factory=UserState)
    rung: str = "popular"
    degraded: Sequence[Degraded] = ()

    def order(self) -> list[int]:
        """Returns the page in the order shown: positions in `rows`, and -1 - n for the n-th of `unknown`."""
        order = list(range(self.rows.size))
        for number, unknown in enumerate(self.unknown):
            order.insert(unknown.place, -1 - number)
        return order

    def item_ids(self, catalog_ids: Sequence[str]) -> list[str]:
        """Returns the external ids of the page in the order shown, where `catalog_ids` are those of `rows`."""
        return [catalog_ids[at] if at >= 0 else self.unknown[-1 - at].item_id for at in self.order()]
