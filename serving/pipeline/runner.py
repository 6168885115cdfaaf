"""A ranking request from end to end: `Pipeline.run` names the steps, each a method, in the order of this table.

Stages return values and change nothing; only the runner applies what they return, times them, counts them and checks
the deadline between them. So the whole behaviour under failure is to be read here:

| step      | stage: what it returns                  | when it fails                                  | rung        |
|-----------|-----------------------------------------|------------------------------------------------|-------------|
| hydrate   | Hydrator: the next state of the user    | the state stays as it is, marked; if blocks    | a lower one |
|           |                                         | are unread, a feed has the popular pool only   |             |
| hold_back | Eligibility: the rows that may be shown | the request fails                              | none        |
|           | Filter: the rows to take out of them    | required: the request fails; personal: the     | popular     |
|           |                                         | popular pool only, marked                      |             |
| retrieve  | Source: rows and scores                 | skipped, marked; the tiers below fill the page | of its tier |
|           | Filter: a mask of the candidates        | as in hold_back                                | popular     |
| score     | Scorer: float32 per candidate           | interleaved source ranks, marked               | the same    |
| adjust    | Adjuster: the moved scores              | the scores stay as they are, marked            | the same    |
| select    | Selector: positions, propensities       | plain top-k, marked                            | the same    |
| explain   | Explainer: reasons per item             | no reasons, counted                            | the same    |
| apply     | SideEffect: nothing; never blocks       | counted                                        | the same    |

**A full page.** The filters work twice. Before retrieval the rows that they hold back are taken out of one bitmap that
every source reads, so that they never take the place of rows that may be shown. Afterwards the filters prove each
candidate, because the bitmap is only as young as the second. Sources stand in tiers, the most personal first, and the
runner goes down until the candidates fill the page. Items of a lower tier stand behind those of the tiers above: the
scorer sees to that, and only a dial of the user lifts them. So the rung of an answer is that of the highest tier with
an item on the page, which is the tier of its first item. Extras (what is new, what a dial asks for) compete with the
tier that serves. They fill no page: if there are too few other candidates, the tiers below are asked too.

**A short page** says why. `dropped` counts the items that each filter held back, of the catalogue or, where the caller
brought the candidates, of those; each item once, by the first filter in the order eligible, excluded, blocked, seen.
A source that failed is marked. Without either, the method has no more candidates.

**Little time.** Where less than a tenth of the request's time is left, extras, scorer and explainers do not start: the
order is that of the interleaved source ranks, and the answer is marked DEADLINE. Where none is left, the request fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from features.controls import ControlKind, Dial, blocked_keys
from features.keys import item_keys
from serving.bundle.bitmap import Bitmap, clear_keys, clear_rows
from serving.pipeline.candidates import Candidates, Proposal, fills, interleaved, merge
from serving.pipeline.execution import SOURCE, Execution
from serving.pipeline.request import NO_ROWS, POPULAR, Mask, Request, Rows, Scores, Unknown
from serving.pipeline.results import Adjusted, HeldBack, Scored, Selected, Slate
from serving.pipeline.stages import (
    Adjuster,
    Eligibility,
    Explainer,
    Filter,
    Hydrator,
    Recorder,
    Scorer,
    Selector,
    SideEffect,
    Source,
    Tier,
)

_NOTHING_ALLOWED: Bitmap = np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages of one ranking method, and the one function that runs them.

    Attributes:
        tiers: The tiers of sources, the most personal first.
        extras: Sources that compete with whichever tier serves.
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

    def run(self, request: Request) -> Slate:
        """Answers a request.

        Raises:
            DeadlineExceeded: The deadline passed before a stage could start.
            ServingError: A required filter failed: an ineligible item is never shown.
        """
        execution = Execution(request, self.recorder)
        self._hydrate(execution)
        allowed = self._hold_back(execution)
        candidates = self._retrieve(execution, allowed)
        scored = self._score(execution, candidates)
        adjusted = self._adjust(execution, candidates, scored.scores)
        selected = self._select(execution, candidates, adjusted.scores)
        slate = self._explain(execution, self._slate(execution, candidates, scored, adjusted, selected))
        self._apply(execution, slate)
        return slate

    def _hydrate(self, execution: Execution) -> None:
        for hydrator in execution.enabled(self.hydrators):
            with execution.without(hydrator, hydrator.part):
                execution.hydrated(hydrator.hydrate(execution.request, execution.user))

    def _hold_back(self, execution: Execution) -> Bitmap:
        """Returns the rows that sources may name, and counts those that each filter holds back."""
        request, user = execution.request, execution.user
        if request.rows is not None:
            return _NOTHING_ALLOWED  # the caller names the candidates, so there is nothing to retrieve
        begun = execution.begin("allowed")
        allowed, execution.held_back[self.eligibility.name] = self.eligibility.bitmap(request)
        for screen in self.filters:
            if screen.enable(request, user):
                with execution.reading(screen):
                    execution.held_back[screen.name] = clear(allowed, screen.hold_back(request, user))
        execution.dropped = dict(execution.held_back)
        execution.end("allowed", begun)
        return allowed

    def _retrieve(self, execution: Execution, allowed: Bitmap) -> Candidates:
        """Goes down the tiers until their candidates fill the page."""
        proposals: list[Proposal] = []
        extras: list[Proposal] | None = None
        kept = Candidates(NO_ROWS, np.empty((0, 0), np.float32), ())
        for level, tier in enumerate(self.tiers):
            named = self._propose(execution, allowed, tier.sources, level)
            if not any(proposal.rows.size for proposal in named):
                continue
            # Extras are asked once, and only if a tier has something: alone they would be the whole page.
            if extras is None:
                extras = self._propose(execution, allowed, execution.optional(self.extras), len(self.tiers))
            proposals += named
            kept = self._prove(execution, merge([*proposals, *extras]))
            if fills(kept, len(self.tiers), execution.request.page_size):
                break
        return kept

    def _propose(self, execution: Execution, allowed: Bitmap, sources: Sequence[Source], level: int) -> list[Proposal]:
        proposals: list[Proposal] = []
        for source in execution.enabled(sources):
            with execution.without(source, SOURCE):
                rows, scores = source.retrieve(execution.request, execution.user, allowed)
                proposals.append(Proposal(source.name, rows, scores, level))
        return proposals

    def _prove(self, execution: Execution, candidates: Candidates) -> Candidates:
        """Returns the candidates that every filter keeps; those of the popular pool where a personal filter fails."""
        # Each tier is proved together with those above it, so their drops are counted again from the start.
        execution.dropped = dict(execution.held_back)
        for screen in execution.enabled((self.eligibility, *self.filters)):
            mask: Mask | None = None
            if screen.name not in execution.blind:
                with execution.reading(screen):
                    mask = screen.keep(execution.request, execution.user, candidates.rows)
            if mask is None:
                # What a user has blocked or seen is unknown, so only items that are safe for any user stay.
                mask = np.isfinite(candidates.of(POPULAR))
            if not mask.all():
                execution.drop(screen.name, int((~mask).sum()))
                candidates = candidates.take(mask)
        return candidates

    def _score(self, execution: Execution, candidates: Candidates) -> Scored:
        scored: Scored | None = None
        for scorer in execution.enabled(execution.optional((self.scorer,))):
            with execution.without(scorer, "SCORER"):
                result = scorer.score(execution.request, execution.user, candidates)
                scores = _sunk(result.scores, candidates.rows.size)
                scored = Scored(scores, result.probabilities, result.features)
        return scored or Scored(interleaved(candidates))

    def _adjust(self, execution: Execution, candidates: Candidates, scores: Scores) -> Adjusted:
        moves: dict[tuple[Dial, int], Scores] = {}
        for adjuster in execution.enabled(self.adjusters):
            with execution.without(adjuster, adjuster.part):
                adjusted = adjuster.adjust(execution.request, execution.user, candidates, scores)
                scores = _sunk(adjusted.scores, candidates.rows.size)
                moves.update(adjusted.moves)
        return Adjusted(scores, moves)

    def _select(self, execution: Execution, candidates: Candidates, scores: Scores) -> Selected:
        selected: Selected | None = None  # assigned in the loop, which has to end for the stage to be timed
        for selector in execution.enabled((self.selector,)):
            with execution.without(selector, "SELECTOR"):
                selected = selector.select(execution.request, execution.user, candidates, scores)
        return selected or top_k(scores, execution.request.page_size)

    def _slate(
        self, execution: Execution, candidates: Candidates, scored: Scored, adjusted: Adjusted, selected: Selected
    ) -> Slate:
        """Returns the page of what was selected and of the caller's candidates that the catalogue does not know."""
        # The unknown have places and no scores, so they take room on the page instead of competing for it.
        unknown = self._seated(execution, candidates.rows)
        at, propensities = selected
        if unknown:
            room = execution.request.page_size - len(unknown)
            at, propensities = at[:room], propensities[:room]
        chosen = candidates.take(at)
        return Slate(
            rows=chosen.rows,
            scores=adjusted.scores[at],
            propensities=propensities,
            candidates=chosen,
            probabilities=None if scored.probabilities is None else scored.probabilities[at],
            dropped={name: count for name, count in execution.dropped.items() if count},
            timings=execution.timings,
            features=None if scored.features is None else scored.features[at],
            moves={dial: move[at] for dial, move in adjusted.moves.items()},
            unknown=unknown,
            user=execution.user,
            rung=self._rung(execution, chosen),
            degraded=execution.degraded,
        )

    def _seated(self, execution: Execution, kept: Rows) -> tuple[Unknown, ...]:
        """Returns the unknown candidates that no filter holds back, at their places on the page."""
        request = execution.request
        if not request.unknown or request.rows is None:
            return ()
        wanted = [unknown for unknown in request.unknown if unknown.item_id not in request.exclude_unknown]
        execution.drop("excluded", len(request.unknown) - len(wanted))
        keys = item_keys([unknown.item_id for unknown in wanted])
        stays = ~np.isin(keys, blocked_keys(execution.user.controls, ControlKind.ITEM, request.now_ms))
        execution.drop("blocked", int((~stays).sum()))
        order = slice(None) if request.upstream is None else np.argsort(-request.upstream, kind="stable")
        # Places close up: of the known candidates above an unknown one, only those that were kept count.
        above = np.concatenate([[0], np.cumsum(np.isin(request.rows[order], kept))])
        staying = (unknown for unknown, stay in zip(wanted, stays.tolist(), strict=True) if stay)
        seated = (unknown._replace(place=int(above[unknown.place]) + at) for at, unknown in enumerate(staying))
        return tuple(unknown for unknown in seated if unknown.place < request.page_size)

    def _rung(self, execution: Execution, chosen: Candidates) -> str:
        """Returns the rung of the highest tier with an item on the page."""
        if not chosen.rows.size:
            return "popular"
        level = int(chosen.tier_of_each().min())
        if level == len(self.tiers):
            level = min(chosen.tiers)  # extras alone, which competed with the candidates of this tier
        return self.tiers[level].rung or ("popular" if execution.user.vector is None else "sequence")

    def _explain(self, execution: Execution, slate: Slate) -> Slate:
        if execution.request.explain:
            for explainer in execution.enabled(execution.optional(self.explainers)):
                with execution.without(explainer):
                    slate = replace(slate, reasons=explainer.explain(execution.request, slate))
        return slate

    def _apply(self, execution: Execution, slate: Slate) -> None:
        for effect in execution.enabled(self.side_effects):
            with execution.without(effect):
                effect.apply(execution.request, slate)


def top_k(scores: Scores, k: int) -> Selected:
    """Returns the positions of the `k` best, ties by position, each with propensity 1: nothing is drawn at random."""
    positions = np.argsort(-scores, kind="stable")[:k]
    return Selected(positions, np.ones(positions.size, np.float64))


def clear(allowed: Bitmap, held_back: HeldBack) -> int:
    """Takes the rows that a filter holds back out of `allowed`, in place; returns how many were in it."""
    count = int(clear_rows(allowed, held_back.rows))
    for column, keys in held_back.keyed:
        count += int(clear_keys(allowed, column, keys))
    return count


def _sunk(scores: Scores, count: int) -> Scores:
    """Returns the scores, of the right length, with everything that is not finite at the end."""
    if scores.shape != (count,):
        raise ValueError(f"a scorer returned shape {scores.shape} for {count} candidates")
    # Infinity too: a model that overflows must not put an item first.
    return np.where(np.isfinite(scores), scores, np.float32(-np.inf)).astype(np.float32, copy=False)
