"""A ranking request in one function, and the contracts of its stages.

A candidate is a row number of the catalogue; a set of candidates is arrays, never objects. Only the runner applies what
stages return, times them, counts them and checks the deadline between them, so the whole behaviour under failure is to
be read here:

| stage      | returns                  | when it fails                                                        |
|------------|--------------------------|----------------------------------------------------------------------|
| Hydrator   | nothing; fills query     | the query stays as it is, the answer is marked                       |
| Filter     | a bitmap, later a mask   | required: the request fails; personal: the popular pool only, marked |
| Source     | rows, scores             | skipped, marked; the tiers below fill the page                       |
| Scorer     | float32, same length     | interleaved source ranks, marked                                     |
| Adjuster   | float32, same length     | the scores stay as they are, marked                                  |
| Selector   | positions, propensities  | plain top-k, marked                                                  |
| Explainer  | reasons per item         | no reasons, counted                                                  |
| SideEffect | nothing; never blocks    | counted                                                              |

**A full page.** The filters work twice. Before retrieval they take their rows out of one bitmap that every source
reads, so what may not be shown never takes the place of what may. Afterwards they prove each candidate, because the
bitmap is only as young as the second. Sources stand in tiers, the most personal first, and the runner goes down until
the candidates fill the page. Items of a lower tier stand behind those of the tiers above: the scorer sees to that, and
only a dial of the user lifts them. So the rung of an answer is that of the highest tier with an item on the page, which
is the tier of its first item. Extras (what is new, what a dial asks for) compete beside the tier that serves. They fill
no page: where there are too few other candidates, the tiers below are asked too.

**A short page** says why. `dropped` counts the items that each filter held back, of the catalogue or, where the caller
brought the candidates, of those; each item once, by the first filter in the order eligible, excluded, blocked, seen.
A source that failed is marked. Without either, the method has no more candidates.

**Little time.** Where less than a tenth of the request's time is left, extras, scorer and explainers do not start: the
order is that of the interleaved source ranks, and the answer is marked DEADLINE. Where none is left, the request fails.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from features.controls import ControlKind, blocked_keys
from features.keys import item_keys
from serving.bundle.bitmap import Bitmap
from serving.errors import DeadlineExceeded, ServingError
from serving.pipeline.query import (
    POPULAR,
    Candidates,
    Mask,
    Proposal,
    Query,
    Reason,
    Rows,
    Scores,
    Slate,
    Unknown,
    fills,
    interleaved,
    merge,
)

RESERVE = 0.1
"""Share of a request's time that belongs to the stages it cannot do without."""

SOURCE = "SOURCE"
"""The part of an answer that several stages make, so that its reason names the one that failed."""

_NO_ROWS = np.empty(0, np.int32)
_log = logging.getLogger(__name__)
_S = TypeVar("_S", bound="Stage")


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
    """Proposes candidates among the rows of `query.allowed`."""

    def retrieve(self, query: Query) -> tuple[Rows, Scores]:
        """Rows, each once, and their scores, best first."""
        ...


class Screen(Stage, Protocol):
    """Proves candidates; `required` when a request without it must fail."""

    required: bool

    def keep(self, query: Query, rows: Rows) -> Mask:
        """True for the rows that may stay."""
        ...


class Eligibility(Screen, Protocol):
    """The filter that no pipeline goes without: what may be shown at all."""

    def bitmap(self, query: Query) -> tuple[Bitmap, int]:
        """The rows that may be shown, as a bitmap of the caller's own, and how many of the catalogue may not."""
        ...


class Filter(Screen, Protocol):
    """Keeps rows out of retrieval, and proves afterwards that they stayed out."""

    def hold_back(self, query: Query, allowed: Bitmap) -> int:
        """Takes the rows that may not stay out of `allowed`, in place; returns how many were in it."""
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


class Tier(NamedTuple):
    """The sources of one level of personalisation.

    Attributes:
        rung: The level; "" where anybody's candidates are the same and the user's vector, if any, only orders them.
        sources: Its sources.
    """

    rung: str
    sources: Sequence[Source]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages of one ranking method, and the one function that runs them.

    Attributes:
        tiers: The tiers of sources, the most personal first.
        extras: Sources that compete beside whichever tier serves.
        eligibility: The first filter.
        filters: The others, in their order.
    """

    hydrators: Sequence[Hydrator]
    tiers: Sequence[Tier]
    extras: Sequence[Source]
    eligibility: Eligibility
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
        run = _Run(query, self.recorder)
        self._hydrate(run)
        if query.rows is None:
            self._hold_back(run)
        candidates = self._retrieve(run)
        scores = self._adjust(run, candidates, self._score(run, candidates))
        slate = self._select(run, candidates, scores)
        self._explain(run, slate)
        self._apply(run, slate)
        return slate

    def _hydrate(self, run: _Run) -> None:
        for hydrator in run.enabled(self.hydrators):
            with run.without(hydrator, hydrator.part):
                hydrator.hydrate(run.query)

    def _hold_back(self, run: _Run) -> None:
        """Makes the bitmap of the rows that sources may name, and counts those that each filter keeps out of it."""
        query = run.query
        begun = run.begin("allowed")
        query.allowed, run.held_back[self.eligibility.name] = self.eligibility.bitmap(query)
        for screen in self.filters:
            if screen.enable(query):
                with run.reading(screen):
                    run.held_back[screen.name] = screen.hold_back(query, query.allowed)
        run.dropped = dict(run.held_back)
        run.end("allowed", begun)

    def _retrieve(self, run: _Run) -> Candidates:
        """Goes down the tiers until their candidates fill the page."""
        proposals: list[Proposal] = []
        extras: list[Proposal] | None = None
        kept = Candidates(_NO_ROWS, np.empty((0, 0), np.float32), ())
        for at, tier in enumerate(self.tiers):
            named = self._named(run, tier.sources, at)
            if not any(proposal.rows.size for proposal in named):
                continue
            if extras is None:
                extras = self._named(run, run.optional(self.extras), len(self.tiers))
            proposals += named
            kept = self._proved(run, merge([*proposals, *extras]))
            if fills(kept, len(self.tiers), run.query.page_size):
                break
        return kept

    def _named(self, run: _Run, sources: Sequence[Source], tier: int) -> list[Proposal]:
        proposals: list[Proposal] = []
        for source in run.enabled(sources):
            with run.without(source, SOURCE):
                rows, scores = source.retrieve(run.query)
                proposals.append(Proposal(source.name, rows, scores, tier))
        return proposals

    def _proved(self, run: _Run, candidates: Candidates) -> Candidates:
        """The candidates that every filter lets stay; those of the popular pool where a personal one cannot say."""
        run.dropped = dict(run.held_back)
        for screen in run.enabled((self.eligibility, *self.filters)):
            mask: Mask | None = None
            if screen.name not in run.blind:
                with run.reading(screen):
                    mask = screen.keep(run.query, candidates.rows)
            if mask is None:
                mask = np.isfinite(candidates.of(POPULAR))
            if not mask.all():
                run.drop(screen.name, int((~mask).sum()))
                candidates = candidates.take(mask)
        return candidates

    def _score(self, run: _Run, candidates: Candidates) -> Scores:
        scores: Scores | None = None
        for scorer in run.enabled(run.optional((self.scorer,))):
            with run.without(scorer, "SCORER"):
                scores = _sunk(scorer.score(run.query, candidates), candidates.rows.size)
        if scores is None:
            run.query.probabilities = run.query.features = None
            return interleaved(candidates)
        return scores

    def _adjust(self, run: _Run, candidates: Candidates, scores: Scores) -> Scores:
        for adjuster in run.enabled(self.adjusters):
            try:
                scores = _sunk(adjuster.adjust(run.query, candidates, scores), candidates.rows.size)
            except Exception as error:
                run.query.moves.clear()
                run.failed(adjuster, adjuster.part, error)
        return scores

    def _select(self, run: _Run, candidates: Candidates, scores: Scores) -> Slate:
        query, selected = run.query, None
        for selector in run.enabled((self.selector,)):
            with run.without(selector, "SELECTOR"):
                selected = selector.select(query, candidates, scores)
        positions, propensities = selected or top_k(scores, query.page_size)
        unknown = self._seated(run, candidates.rows)
        if unknown:
            room = query.page_size - len(unknown)
            positions, propensities = positions[:room], propensities[:room]
        chosen = candidates.take(positions)
        query.rung = self._rung(query, chosen)
        return Slate(
            rows=chosen.rows,
            scores=scores[positions],
            propensities=propensities,
            candidates=chosen,
            probabilities=None if query.probabilities is None else query.probabilities[positions],
            dropped={name: count for name, count in run.dropped.items() if count},
            timings=run.timings,
            features=None if query.features is None else query.features[positions],
            moves={dial: move[positions] for dial, move in query.moves.items()},
            unknown=unknown,
        )

    def _seated(self, run: _Run, kept: Rows) -> tuple[Unknown, ...]:
        """The candidates that the catalogue does not know and no filter holds back, at their places on the page."""
        query = run.query
        if not query.unknown or query.rows is None:
            return ()
        wanted = [unknown for unknown in query.unknown if unknown.item_id not in query.exclude_unknown]
        run.drop("excluded", len(query.unknown) - len(wanted))
        keys = item_keys([unknown.item_id for unknown in wanted])
        stays = ~np.isin(keys, blocked_keys(query.rules, ControlKind.ITEM, query.now_ms))
        run.drop("blocked", int((~stays).sum()))
        order = slice(None) if query.upstream is None else np.argsort(-query.upstream, kind="stable")
        above = np.concatenate([[0], np.cumsum(np.isin(query.rows[order], kept))])
        left = (unknown for unknown, stay in zip(wanted, stays.tolist(), strict=True) if stay)
        seated = (unknown._replace(place=int(above[unknown.place]) + at) for at, unknown in enumerate(left))
        return tuple(unknown for unknown in seated if unknown.place < query.page_size)

    def _rung(self, query: Query, chosen: Candidates) -> str:
        """The rung of the highest tier with an item on the page."""
        if not chosen.rows.size:
            return "popular"
        tier = int(chosen.tier_of_each().min())
        if tier == len(self.tiers):
            tier = min(chosen.tiers)  # extras alone: they were chosen beside the candidates of this tier
        return self.tiers[tier].rung or ("popular" if query.user_vector is None else "sequence")

    def _explain(self, run: _Run, slate: Slate) -> None:
        if run.query.explain:
            for explainer in run.enabled(run.optional(self.explainers)):
                with run.without(explainer):
                    slate.reasons = explainer.explain(run.query, slate)

    def _apply(self, run: _Run, slate: Slate) -> None:
        for effect in run.enabled(self.side_effects):
            with run.without(effect):
                effect.apply(run.query, slate)


def top_k(scores: Scores, k: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The positions of the `k` best, ties by position, each with propensity 1: nothing is drawn at random."""
    positions = np.argsort(-scores, kind="stable")[:k]
    return positions, np.ones(positions.size, np.float64)


def _sunk(scores: Scores, count: int) -> Scores:
    """The scores, of the right length, with everything that is not finite at the end."""
    if scores.shape != (count,):
        raise ValueError(f"a scorer returned shape {scores.shape} for {count} candidates")
    return np.where(np.isfinite(scores), scores, np.float32(-np.inf)).astype(np.float32, copy=False)


class _Run:
    """One request on its way: times the stages, starts none of them after the deadline, and notes what fails."""

    def __init__(self, query: Query, recorder: Recorder) -> None:
        self.query, self._recorder = query, recorder
        self.timings: list[tuple[str, int]] = []
        self.held_back: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.blind: set[str] = set()

    def enabled(self, stages: Sequence[Any]) -> Iterator[Any]:
        """Yields each stage that is enabled and takes the time until it is done with."""
        for stage in stages:
            if stage.enable(self.query):
                begun = self.begin(stage.name)
                yield stage
                self.end(stage.name, begun)

    def begin(self, name: str) -> float:
        """Starts a stage, unless the deadline has passed; returns the time."""
        begun = time.monotonic()
        if begun > self.query.deadline:
            raise DeadlineExceeded(f"the deadline passed before {name}; give the call more time")
        return begun

    def end(self, name: str, begun: float) -> None:
        """Notes how long a stage took."""
        spent = int((time.monotonic() - begun) * 1e6)
        self.timings.append((name, spent))
        self._recorder.stage(name, spent)

    def optional(self, stages: Sequence[_S]) -> Sequence[_S]:
        """Returns the stages where there is time for them; else none, and marks those that had something to do."""
        query = self.query
        if query.seconds_left() >= RESERVE * (query.deadline - query.begun):
            return stages
        left_out = [stage.name for stage in stages if stage.enable(query)]
        if left_out:
            query.degrade("DEADLINE", f"{', '.join(left_out)} left out: less than {RESERVE:.0%} of the time was left")
        return ()

    def without(self, stage: Stage, part: str = "") -> _Guard:
        """Lets the request go on without a stage that fails; `part` names it in the answer."""
        return _Guard(self, stage, part)

    def reading(self, screen: Screen) -> _Guard:
        """Lets the request go on without a filter that fails, the popular pool alone staying; never a required one."""
        return _Guard(self, screen, "PROFILE_STORE", screen)

    def drop(self, name: str, count: int) -> None:
        """Counts items that a filter held back."""
        self.dropped[name] = self.dropped.get(name, 0) + count

    def failed(self, stage: Stage, part: str, error: Exception) -> None:
        """Notes that the request goes on without a stage; the deadline itself is never swallowed."""
        if isinstance(error, DeadlineExceeded):
            raise error
        self._recorder.failure(stage.name)
        if not isinstance(error, ServingError):
            _log.error("stage %s failed; the answer goes on without it", stage.name, exc_info=error)
        if part:
            reason = str(error) or type(error).__name__
            self.query.degrade(part, f"{stage.name}: {reason}" if part == SOURCE else reason)


class _Guard:
    """A `with` block around a stage that may fail; a class, as a generator would cost more than some stages."""

    __slots__ = ("_part", "_run", "_screen", "_stage")

    def __init__(self, run: _Run, stage: Stage, part: str, screen: Screen | None = None) -> None:
        self._run, self._stage, self._part, self._screen = run, stage, part, screen

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        if self._screen is not None:
            if self._screen.required:
                return False
            self._run.blind.add(self._screen.name)
        self._run.failed(self._stage, self._part, error)
        return True
