"""A ranking request in one function, and the contracts of its stages.

A candidate is a row number of the catalogue; a set of candidates is arrays, never objects. Only `Pipeline.run`
applies what stages return, times them, counts them and checks the deadline between them, so the whole behaviour under
failure is to be read here:

| stage      | returns                 | when it fails                                                        |
|------------|-------------------------|----------------------------------------------------------------------|
| Hydrator   | nothing; fills query    | the query stays as it is, the answer is marked                       |
| Source     | rows, scores            | skipped, marked                                                      |
| Filter     | bool mask               | required: the request fails; personal: the popular pool only, marked |
| Scorer     | float32, same length    | interleaved source ranks, marked                                     |
| Adjuster   | float32, same length    | the scores stay as they are, marked                                  |
| Selector   | positions, propensities | plain top-k, marked                                                  |
| Explainer  | reasons per item        | no reasons, counted                                                  |
| SideEffect | nothing; never blocks   | counted                                                              |
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from features.assemble import History
from features.controls import Dial, Dials, Rules, no_rules
from features.profile import Profile
from serving.errors import DeadlineExceeded, ServingError

Rows = npt.NDArray[np.int32]
Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

POPULAR = "popular"
"""Name of the source whose items may be shown to anybody, also when personal blocks cannot be read."""

NEIGHBORS, SEGMENT, WANTED = "neighbors", "popular_in_segment", "wanted"
"""Names of sources whose scores the feed reads where there is no user vector."""

_NO_ROWS = np.empty(0, np.int32)
_log = logging.getLogger(__name__)


class Degraded(NamedTuple):
    """One thing an answer gave up: the part, by its name in the contract, and why."""

    part: str
    reason: str


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
        page_size: Number of items wanted.
        surface: Where the answer is shown.
        method: The method that answers: "recommend", "search", "rank" or "similar".
        session_id: The visit.
        context: What the caller says of the request, to be logged with the impression; by column of that table.
        text: The words searched for.
        rows: The caller's candidates, where it brought some.
        upstream: The caller's scores of `rows`.
        upstream_weight: Weight of `upstream` against the personal score.
        seeds: Rows to find neighbours of.
        exclude: Rows never to return.
        personalize: Whether what the person did may be used.
        explain: Whether reasons are wanted.
        arm: Name of the holdout arm; `holdout` says whether the person is held out, `bucket` the hash that decided it.
        min_profile_version: Profile version to wait for, 0 for none.
        min_catalog_version: Catalogue version to wait for, 0 for none.
        profile: The person's profile, once read.
        withheld: Whether the person does not allow personal answers.
        rules: What the person never wants to be shown; RULE [n].
        dials: How the person, or this request, wants the answer made.
        moves: How far each turned dial moved each candidate's score, where reasons are wanted; float32 [n].
        segment: Who they are: the category they choose most, where there is a table of what such people like, else "".
        history: Its events as this bundle sees them.
        seen: Rows the person need not be shown again.
        user_vector: The person in the embedding space; float32 [D].
        query_vector: The words in the embedding space; float32 [D].
        tokens: The text tokens of the words; uint32.
        encoded: What the user encoder read: rows and types, two int64 [length].
        probabilities: Probability per action of the candidates that were scored; float32 [n, A].
        features: What the ranker read of them, where that is to be logged; float32 [n, F].
        rung: The level of personalisation reached.
        catalog_version: Version of the catalogue the answer is made from.
        degraded: What was given up.
    """

    request_id: str
    subject: str
    now_ms: int
    deadline: float
    page_size: int
    surface: str = ""
    method: str = ""
    session_id: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    rows: Rows | None = None
    upstream: Scores | None = None
    upstream_weight: float = 1.0
    seeds: Rows = field(default_factory=lambda: _NO_ROWS)
    exclude: Rows = field(default_factory=lambda: _NO_ROWS)
    personalize: bool = True
    explain: bool = False
    arm: str = ""
    holdout: bool = False
    bucket: int = 0
    min_profile_version: int = 0
    min_catalog_version: int = 0
    profile: Profile | None = None
    withheld: bool = False
    rules: Rules = field(default_factory=no_rules)
    dials: Dials = field(default_factory=dict)
    moves: dict[tuple[Dial, int], Scores] = field(default_factory=dict)
    segment: str = ""
    history: History | None = None
    seen: Rows = field(default_factory=lambda: _NO_ROWS)
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
    def lowest_rung(self) -> str:
        """The rung below those that need items of the person's past."""
        return "segment" if self.segment else "popular"

    def seconds_left(self) -> float:
        """Time until the deadline in seconds; negative when it is over."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True, slots=True)
class Candidates:
    """Candidates in the order in which the sources first named them.

    Attributes:
        rows: Their rows, each once; int32 [n].
        scores: What each source said of them, NaN where it did not name them; float32 [sources, n].
        names: Names of the sources.
    """

    rows: Rows
    scores: npt.NDArray[np.float32]
    names: tuple[str, ...]

    def of(self, source: str) -> Scores:
        """What a source said of each candidate, NaN where it did not name it; float32 [n]."""
        if source in self.names:
            said: Scores = self.scores[self.names.index(source)]
            return said
        return np.full(self.rows.size, np.nan, np.float32)

    def take(self, at: Mask | npt.NDArray[np.intp]) -> Candidates:
        """The candidates at some positions."""
        return Candidates(self.rows[at], self.scores[:, at], self.names)


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
        dropped: Number of candidates dropped, by filter.
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


class Stage(Protocol):
    """What every stage has."""

    name: str

    def enable(self, query: Query) -> bool:
        """Whether the stage has anything to do for this query."""
        ...


class Hydrator(Stage, Protocol):
    """Fills the query."""

    part: str

    def hydrate(self, query: Query) -> None:
        """Adds what it knows to `query`."""
        ...


class Source(Stage, Protocol):
    """Proposes candidates."""

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """Rows, each once, and their scores, best first."""
        ...


class Filter(Stage, Protocol):
    """Says which candidates may stay; `required` when a request without it must fail."""

    required: bool

    def keep(self, query: Query, rows: Rows) -> Mask:
        """True for the rows that may stay."""
        ...


class Scorer(Stage, Protocol):
    """Scores candidates; a candidate's score never depends on the others."""

    def score(self, query: Query, candidates: Candidates) -> Scores:
        """One score per candidate, higher is better; one that is not finite sinks to the end."""
        ...


class Adjuster(Stage, Protocol):
    """Moves scores; it may look at all the candidates together."""

    part: str

    def adjust(self, query: Query, candidates: Candidates, scores: Scores) -> Scores:
        """The moved scores; one that is not finite sinks to the end."""
        ...


class Selector(Stage, Protocol):
    """Chooses and orders the slate."""

    def select(
        self, query: Query, candidates: Candidates, scores: Scores
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """Positions among the candidates, best first, and the probability of each choice."""
        ...


class Explainer(Stage, Protocol):
    """Says why."""

    def explain(self, query: Query, slate: Slate) -> list[list[Reason]]:
        """Reasons for each item of the slate."""
        ...


class SideEffect(Stage, Protocol):
    """Acts on the finished slate, without making the caller wait."""

    def apply(self, query: Query, slate: Slate) -> None:
        """Takes note of the slate; must return at once."""
        ...


class Recorder(Protocol):
    """Takes the measurements of the runner."""

    def stage(self, name: str, microseconds: int) -> None:
        """A stage took so long."""
        ...

    def failure(self, name: str) -> None:
        """A stage failed and the request went on without it."""
        ...


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages of one ranking method, and the one function that runs them."""

    hydrators: Sequence[Hydrator]
    sources: Sequence[Source]
    filters: Sequence[Filter]
    scorer: Scorer
    adjusters: Sequence[Adjuster]
    selector: Selector
    explainers: Sequence[Explainer]
    side_effects: Sequence[SideEffect]
    recorder: Recorder

    def run(self, query: Query) -> Slate:
        """Answers a query.

        Raises:
            DeadlineExceeded: The deadline passed before a stage could start.
            ServingError: A required filter failed: the ineligible is never shown.
        """
        watch = _Watch(query, self.recorder)

        for hydrator in watch.enabled(self.hydrators):
            try:
                hydrator.hydrate(query)
            except Exception as error:
                watch.failed(hydrator, hydrator.part, error)

        found: list[tuple[str, Rows, Scores]] = []
        for source in watch.enabled(self.sources):
            try:
                found.append((source.name, *source.retrieve(query)))
            except Exception as error:
                watch.failed(source, "SOURCE", error)
        candidates = merge(found)

        dropped: dict[str, int] = {}
        for screen in watch.enabled(self.filters):
            try:
                mask = screen.keep(query, candidates.rows)
            except Exception as error:
                if screen.required:
                    raise
                mask = np.isfinite(candidates.of(POPULAR))
                watch.failed(screen, "PROFILE_STORE", error)
            kept = candidates.take(mask)
            if kept.rows.size < candidates.rows.size:
                dropped[screen.name] = candidates.rows.size - kept.rows.size
            candidates = kept

        scores: Scores | None = None
        for scorer in watch.enabled((self.scorer,)):
            try:
                scores = _sunk(scorer.score(query, candidates), candidates.rows.size)
            except Exception as error:
                query.probabilities = query.features = None
                watch.failed(scorer, "SCORER", error)
        if scores is None:
            scores = interleaved(candidates)

        for adjuster in watch.enabled(self.adjusters):
            try:
                scores = _sunk(adjuster.adjust(query, candidates, scores), candidates.rows.size)
            except Exception as error:
                query.moves.clear()
                watch.failed(adjuster, adjuster.part, error)

        selected = None
        for selector in watch.enabled((self.selector,)):
            try:
                selected = selector.select(query, candidates, scores)
            except Exception as error:
                watch.failed(selector, "SELECTOR", error)
        positions, propensities = selected or top_k(scores, query.page_size)

        slate = Slate(
            rows=candidates.rows[positions],
            scores=scores[positions],
            propensities=propensities,
            candidates=candidates.take(positions),
            probabilities=None if query.probabilities is None else query.probabilities[positions],
            dropped=dropped,
            timings=watch.timings,
            features=None if query.features is None else query.features[positions],
            moves={dial: move[positions] for dial, move in query.moves.items()},
        )

        for explainer in watch.enabled(self.explainers if query.explain else ()):
            try:
                slate.reasons = explainer.explain(query, slate)
            except Exception as error:
                watch.failed(explainer, "", error)
        for effect in watch.enabled(self.side_effects):
            try:
                effect.apply(query, slate)
            except Exception as error:
                watch.failed(effect, "", error)
        return slate


def merge(found: Sequence[tuple[str, Rows, Scores]]) -> Candidates:
    """Joins what the sources found, each row once, in the order in which it was first named."""
    names = tuple(name for name, _, _ in found)
    if len(found) == 1:
        _, rows, scores = found[0]
        return Candidates(rows.astype(np.int32, copy=False), scores.astype(np.float32, copy=False)[None], names)
    joined = np.concatenate([rows for _, rows, _ in found]) if found else _NO_ROWS
    # Of a row that comes again the last write stands, so written backwards the first place of each remains; no cell is
    # read that was not written. Several times as quick as sorting.
    first_at = np.empty(int(joined.max(initial=-1)) + 1, np.intp)
    first_at[joined[::-1]] = np.arange(joined.size)[::-1]
    first = first_at[joined]
    new = first == np.arange(joined.size)
    place = (np.cumsum(new) - 1)[first]
    table = np.full((len(found), int(new.sum())), np.nan, np.float32)
    start = 0
    for at, (_, rows, scores) in enumerate(found):
        table[at, place[start : start + rows.size]] = scores
        start += rows.size
    return Candidates(joined[new].astype(np.int32, copy=False), table, names)


def interleaved(candidates: Candidates) -> Scores:
    """What stands in for a score when there is none: minus the best rank that any source gave; float32 [n]."""
    if not candidates.names:
        return np.empty(0, np.float32)
    sunk = np.where(np.isnan(candidates.scores), -np.inf, candidates.scores)
    order = np.argsort(-sunk, axis=1, kind="stable")
    ranks = np.empty(order.shape, np.float32)
    np.put_along_axis(ranks, order, np.arange(order.shape[1], dtype=np.float32)[None], axis=1)
    ranks[np.isnan(candidates.scores)] = np.inf
    best: Scores = ranks.min(axis=0)
    return -best


def top_k(scores: Scores, k: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The positions of the `k` best, ties by position, each with propensity 1: nothing is drawn at random."""
    positions = np.argsort(-scores, kind="stable")[:k]
    return positions, np.ones(positions.size, np.float64)


def _sunk(scores: Scores, count: int) -> Scores:
    """The scores, of the right length, with everything that is not finite at the end."""
    if scores.shape != (count,):
        raise ValueError(f"a scorer returned shape {scores.shape} for {count} candidates")
    return np.where(np.isfinite(scores), scores, np.float32(-np.inf)).astype(np.float32, copy=False)


class _Watch:
    """Times the stages, and starts none of them after the deadline."""

    def __init__(self, query: Query, recorder: Recorder) -> None:
        self._query, self._recorder = query, recorder
        self.timings: list[tuple[str, int]] = []

    def enabled(self, stages: Sequence[Any]) -> Any:
        """Yields each stage that is enabled and takes the time until it is done with."""
        query = self._query
        for stage in stages:
            if not stage.enable(query):
                continue
            begun = time.monotonic()
            if begun > query.deadline:
                raise DeadlineExceeded(f"the deadline passed before {stage.name}; give the call more time")
            yield stage
            spent = int((time.monotonic() - begun) * 1e6)
            self.timings.append((stage.name, spent))
            self._recorder.stage(stage.name, spent)

    def failed(self, stage: Stage, part: str, error: Exception) -> None:
        """Notes that the request goes on without a stage; the deadline itself is never swallowed."""
        if isinstance(error, DeadlineExceeded):
            raise error
        self._recorder.failure(stage.name)
        if not isinstance(error, ServingError):
            _log.error("stage %s failed; the answer goes on without it", stage.name, exc_info=error)
        if part:
            self._query.degrade(part, str(error))
