"""A ranking request and its answer: what the stages read, what they fill in, and what leaves.

A candidate is a row number of the catalogue; a set of candidates is arrays, never objects.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from features.assemble import History
from features.controls import Controls, Dial, Dials, no_controls
from features.profile import Profile
from serving.bundle.bitmap import Bitmap

Rows = npt.NDArray[np.int32]
Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

POPULAR = "popular"
"""Name of the source whose items may be shown to anybody, also when personal blocks cannot be read."""

NEAREST, NEIGHBORS, SEGMENT = "nearest", "neighbors", "popular_in_segment"
"""Names of the sources of the other tiers of a feed, whose scores it reads."""

WANTED, FRESH = "wanted", "fresh"
"""Names of the sources that compete beside any tier of a feed."""

UPSTREAM = "upstream"
"""Name of the source of the caller's own candidates."""

_NO_ROWS = np.empty(0, np.int32)
_BLOCKS_UNREAD = {"PROFILE_STORE", "PROFILE_CORRUPT"}


class Degraded(NamedTuple):
    """One thing an answer gave up: the part, by its name in the contract, and why."""

    part: str
    reason: str


class Unknown(NamedTuple):
    """A candidate of the caller's that the catalogue does not know: it keeps the place that the caller gave it.

    Attributes:
        item_id: Its external id.
        place: Its place: before the answer, the number of the query's `rows` that the caller ranks above it; in a
            slate, its position on the page.
        upstream: The caller's score of it; NaN where the caller gives none.
    """

    item_id: str
    place: int
    upstream: float = math.nan


class Reason(NamedTuple):
    """Why an item is in a slate: a kind, the row of the item it points at (-1 for none), words, and a strength."""

    kind: str
    row: int
    text: str
    weight: float


@dataclass(slots=True)
class Query:
    """One ranking request, and what hydrators find out about it.

    Attributes:
        request_id: The attribution token.
        subject: Key of the person, "" where nobody is named.
        now_ms: Time of the request, ms.
        deadline: When the answer must be there, on the clock of `time.monotonic`, seconds.
        begun: When the request came, on the same clock.
        method: Which method answers: "recommend", "search", "rank" or "similar".
        page_size: Number of items wanted.
        surface: Where the answer is shown.
        session_id: The visit.
        context: What the caller says of the request, to be logged with the impression; by column of that table.
        text: The words searched for.
        rows: The caller's candidates, where it brought some.
        unknown: Those that the catalogue does not know, in the caller's order.
        upstream: The caller's scores of `rows`.
        upstream_weight: Weight of `upstream` against the personal score.
        seeds: Rows to find neighbours of.
        exclude: Rows never to return.
        exclude_unknown: External ids never to return that the catalogue does not know.
        personalize: Whether what the person did may be used.
        explain: Whether reasons are wanted.
        arm: Name of the holdout arm; `holdout` says whether the person is held out, `bucket` the hash that decided it.
        min_profile_version: Profile version to wait for, 0 for none.
        min_catalog_version: Catalogue version to wait for, 0 for none.
        profile: The person's profile, once read.
        withheld: Whether the person does not allow personal answers.
        rules: What the person never wants to be shown; CONTROL [n].
        dials: How the person, or this request, wants the answer made.
        moves: How far each turned dial moved each candidate's score, where reasons are wanted; float32 [n].
        segment: Who they are: the category they choose most, where there is a table of what such people like, else "".
        history: Its events as this bundle sees them.
        seen: Rows the person need not be shown again.
        allowed: The rows that sources may name, one bit a row; the runner makes it, once, of all its filters.
        user_vector: The person in the embedding space; float32 [D].
        query_vector: The words in the embedding space; float32 [D].
        tokens: The text tokens of the words; uint32.
        encoded: What the user encoder read: rows and types, two int64 [length].
        probabilities: Probability per action of the candidates that were scored; float32 [n, A].
        features: What the ranker read of them, where that is to be logged; float32 [n, F].
        rung: The level of personalisation that served; the runner alone writes it, once the page is there.
        catalog_version: Version of the catalogue the answer is made from.
        degraded: What was given up.
    """

    request_id: str
    subject: str
    now_ms: int
    deadline: float
    page_size: int
    begun: float = field(default_factory=time.monotonic)
    method: str = ""
    surface: str = ""
    session_id: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    rows: Rows | None = None
    unknown: tuple[Unknown, ...] = ()
    upstream: Scores | None = None
    upstream_weight: float = 1.0
    seeds: Rows = field(default_factory=lambda: _NO_ROWS)
    exclude: Rows = field(default_factory=lambda: _NO_ROWS)
    exclude_unknown: frozenset[str] = frozenset()
    personalize: bool = True
    explain: bool = False
    arm: str = ""
    holdout: bool = False
    bucket: int = 0
    min_profile_version: int = 0
    min_catalog_version: int = 0
    profile: Profile | None = None
    withheld: bool = False
    rules: Controls = field(default_factory=no_controls)
    dials: Dials = field(default_factory=dict)
    moves: dict[tuple[Dial, int], Scores] = field(default_factory=dict)
    segment: str = ""
    history: History | None = None
    seen: Rows = field(default_factory=lambda: _NO_ROWS)
    allowed: Bitmap | None = None
    user_vector: Scores | None = None
    query_vector: Scores | None = None
    tokens: npt.NDArray[np.uint32] | None = None
    encoded: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None
    probabilities: Scores | None = None
    features: Scores | None = None
    rung: str = "popular"
    catalog_version: int = 0
    degraded: list[Degraded] = field(default_factory=list)

    def degrade(self, part: str, reason: str) -> None:
        """Marks the answer: it did without `part` because of `reason`."""
        self.degraded.append(Degraded(part, reason))

    @property
    def blocks_unread(self) -> bool:
        """True where the blocks of a named user could not be read: only what is safe for anybody is shown."""
        return any(part in _BLOCKS_UNREAD for part, _ in self.degraded)

    def seconds_left(self) -> float:
        """Time until the deadline in seconds; negative when it is over."""
        return self.deadline - time.monotonic()


class Proposal(NamedTuple):
    """What one source named.

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
        """The score that a source gave each candidate, NaN where it did not name it; float32 [n]."""
        if source in self.names:
            scores: Scores = self.scores[self.names.index(source)]
            return scores
        return np.full(self.rows.size, np.nan, np.float32)

    def take(self, at: Mask | npt.NDArray[np.intp]) -> Candidates:
        """The candidates at some positions."""
        return Candidates(self.rows[at], self.scores[:, at], self.names, self.tiers)

    def tier_of_each(self) -> npt.NDArray[np.intp]:
        """The highest tier that named each candidate; intp [n]."""
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
    """Returns True where the candidates that a source of one of the `tiers` named, extras left out, are a page."""
    if max(candidates.tiers, default=0) < tiers:
        return candidates.rows.size >= page_size
    named = ~np.isnan(candidates.scores[np.array(candidates.tiers) < tiers])
    return int(named.any(axis=0).sum()) >= page_size


def interleaved(candidates: Candidates) -> Scores:
    """A stand-in for scores: minus the best rank that any source gave, tier behind tier; float32 [n]."""
    if not candidates.names:
        return np.empty(0, np.float32)
    sunk = np.where(np.isnan(candidates.scores), -np.inf, candidates.scores)
    order = np.argsort(-sunk, axis=1, kind="stable")
    ranks = np.empty(order.shape, np.float32)
    np.put_along_axis(ranks, order, np.arange(order.shape[1], dtype=np.float32)[None], axis=1)
    ranks[np.isnan(candidates.scores)] = np.inf
    if candidates.tiers:
        ranks += np.array(candidates.tiers, np.float32)[:, None] * candidates.rows.size
    best: Scores = ranks.min(axis=0)
    return -best


@dataclass(slots=True)
class Slate:
    """The ordered answer.

    Attributes:
        rows: Its items, best first; int32 [k].
        scores: Their scores; float32 [k].
        propensities: Probability that the policy shows the item in its position, NaN where not exact; float64 [k].
        candidates: What the sources said of them.
        probabilities: Probability per action; float32 [k, A], or None where the ranker did not run.
        features: What the ranker read of each item; float32 [k, F], None where that is not to be logged.
        reasons: Reasons per item, empty unless asked for.
        moves: How far each turned dial moved each score; float32 [k], none unless reasons are wanted.
        unknown: Candidates that the catalogue does not know, each at its position on the page; they are in the answer
            beside `rows`, and in none of the arrays.
        dropped: Number of items that were held back, by the filter that held them back first: of the catalogue, or of
            the caller's candidates where it brought them.
        timings: Microseconds per stage, in order.
    """

    rows: Rows
    scores: Scores
    propensities: npt.NDArray[np.float64]
    candidates: Candidates
    probabilities: Scores | None
    dropped: dict[str, int]
    timings: list[tuple[str, int]]
    reasons: list[list[Reason]] = field(default_factory=list)
    features: Scores | None = None
    moves: dict[tuple[Dial, int], Scores] = field(default_factory=dict)
    unknown: tuple[Unknown, ...] = ()

    def order(self) -> list[int]:
        """The page in the order shown: positions in `rows`, and -1 - n for the n-th of `unknown`."""
        order = list(range(self.rows.size))
        for at, unknown in enumerate(self.unknown):
            order.insert(unknown.place, -1 - at)
        return order

    def item_ids(self, known: list[str]) -> list[str]:
        """The external ids of the page in the order shown, where `known` are those of `rows`."""
        return [known[at] if at >= 0 else self.unknown[-1 - at].item_id for at in self.order()]
