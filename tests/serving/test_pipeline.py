"""What the runner does with what stages return, and when they fail: the table at its head, line by line."""

from __future__ import annotations

import time

import numpy as np
import pytest

from serving.errors import DeadlineExceeded, Unavailable
from serving.pipeline.candidates import Proposal, interleaved, merge
from serving.pipeline.request import POPULAR, Degraded, Request, Unknown
from serving.pipeline.results import Adjusted, HeldBack, Hydrated, Reason, Scored
from serving.pipeline.runner import Pipeline, top_k
from serving.pipeline.stages import Tier


class Recorder:
    def __init__(self):
        self.stages, self.failures = [], []

    def stage(self, name, microseconds):
        self.stages.append(name)

    def failure(self, name):
        self.failures.append(name)


class Stage:
    part = "PROFILE_STORE"

    def __init__(self, name, result=None, *, enabled=True, required=False, held=0):
        self.name, self.result, self.enabled, self.required, self.calls = name, result, enabled, required, 0
        self.held = held

    def enable(self, request, user):
        return self.enabled

    def _act(self, *arguments):
        self.calls += 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result(*arguments) if callable(self.result) else self.result

    hydrate = retrieve = keep = score = adjust = select = explain = apply = _act

    def bitmap(self, request):
        return np.full(8, 255, np.uint8), self.held

    def hold_back(self, request, user):
        if isinstance(self.held, Exception):
            raise self.held
        return HeldBack(np.arange(50, 50 + self.held, dtype=np.int32))


def rows(*values):
    return np.array(values, np.int32)


def scores(*values):
    return np.array(values, np.float32)


def ask(**fields):
    standard = {"request_id": "r", "subject": "u:1", "now_ms": 0, "deadline": time.monotonic() + 5, "page_size": 2}
    return Request(**{**standard, **fields})


def pipeline(sources=None, **changes):
    if sources is None:
        sources = [Stage("near", (rows(4, 5, 6), scores(3, 2, 1))), Stage(POPULAR, (rows(6, 7), scores(9, 8)))]
    stages = {
        "hydrators": [],
        "tiers": [Tier("", sources)],
        "extras": [],
        "eligibility": Stage("eligible", lambda request, user, rows: np.ones(rows.size, bool), required=True),
        "filters": [],
        "scorer": Stage("scorer", lambda request, user, candidates: Scored(candidates.rows.astype(np.float32))),
        "adjusters": [],
        "selector": Stage("selector", lambda request, user, candidates, scores: top_k(scores, request.page_size)),
        "explainers": [],
        "side_effects": [],
        "recorder": Recorder(),
    }
    return Pipeline(**{**stages, **changes})


def test_sources_join_in_the_order_first_named():
    slate = pipeline(selector=Stage("all", lambda r, u, c, s: (np.arange(c.rows.size), np.ones(c.rows.size)))).run(
        ask()
    )
    assert slate.rows.tolist() == [4, 5, 6, 7]
    np.testing.assert_array_equal(slate.candidates.of("near"), scores(3, 2, 1, np.nan))
    np.testing.assert_array_equal(slate.candidates.of(POPULAR), scores(np.nan, np.nan, 9, 8))
    assert np.isnan(slate.candidates.of("nobody")).all()


def test_the_best_come_first_and_every_stage_is_timed():
    built = pipeline()
    slate = built.run(ask())
    assert slate.rows.tolist() == [7, 6]
    assert slate.propensities.tolist() == [1, 1]
    assert [name for name, _ in slate.timings] == ["allowed", "near", "popular", "eligible", "scorer", "selector"]
    assert built.recorder.stages == [name for name, _ in slate.timings]


def test_a_filter_drops_and_counts():
    odd = Stage("odd", lambda request, user, rows: rows % 2 == 1)
    slate = pipeline(filters=[odd]).run(ask())
    assert (slate.rows.tolist(), slate.dropped) == ([7, 5], {"odd": 2})


def test_a_stage_that_is_not_enabled_does_not_run():
    off = Stage("off", Unavailable("never"), enabled=False)
    slate = pipeline(hydrators=[off], sources=[off, Stage("s", (rows(1), scores(1)))], filters=[off]).run(ask())
    assert (slate.rows.tolist(), off.calls) == ([1], 0)


def test_a_hydrator_that_fails_is_marked():
    slate = pipeline(hydrators=[Stage("profile", Unavailable("away"))]).run(ask())
    assert slate.rows.tolist() == [7, 6]
    assert slate.degraded == [Degraded("PROFILE_STORE", "away")]
    assert slate.user.blocks_unread


def test_what_a_hydrator_finds_is_the_state_of_the_next():
    states = []

    def find(request, user):
        states.append(user)
        return Hydrated(user._replace(segment=f"{user.segment}x"), (Degraded("PROFILE_STALE", "old"),))

    slate = pipeline(hydrators=[Stage("first", find), Stage("second", find)]).run(ask(dials={(1, 2): 0.5}))
    assert [state.segment for state in states] == ["", "x"]
    assert (slate.user.segment, slate.user.dials) == ("xx", {(1, 2): 0.5})
    assert [part for part, _ in slate.degraded] == ["PROFILE_STALE"] * 2


def test_a_source_that_fails_is_skipped_and_marked():
    built = pipeline()
    built.tiers[0].sources[0].result = Unavailable("index away")
    slate = built.run(ask())
    assert slate.rows.tolist() == [7, 6]
    assert slate.degraded == [Degraded("SOURCE", "near: index away")]
    assert built.recorder.failures == ["near"]


def test_no_source_at_all_gives_an_empty_answer():
    assert pipeline(sources=[]).run(ask()).rows.tolist() == []


def test_a_required_filter_that_fails_fails_the_request():
    with pytest.raises(Unavailable):
        pipeline(filters=[Stage("eligible", Unavailable("unknown"), required=True)]).run(ask())


def test_a_personal_filter_that_fails_leaves_the_popular_pool():
    slate = pipeline(filters=[Stage("seen", Unavailable("unreadable"))]).run(ask())
    assert sorted(slate.rows.tolist()) == [6, 7]
    assert slate.degraded[0].part == "PROFILE_STORE"


@pytest.mark.parametrize("bad", [Unavailable("down"), lambda r, u, c: Scored(scores(1))])
def test_a_scorer_that_fails_leaves_interleaved_ranks(bad):
    slate = pipeline(scorer=Stage("scorer", bad)).run(ask())
    assert slate.rows.tolist() == [4, 6]
    assert slate.degraded[0].part == "SCORER"


def test_adjusters_move_what_the_scorer_said_one_after_the_other():
    half = Stage("half", lambda r, u, c, s: Adjusted(s / 2, {}))
    turned = Stage("turned", lambda r, u, c, s: Adjusted(np.float32(4) - s, {}))
    built = pipeline(adjusters=[half, turned])
    slate = built.run(ask())
    assert (slate.rows.tolist(), slate.scores.tolist()) == ([4, 5], [2, 1.5])
    assert [name for name, _ in slate.timings][-3:] == ["half", "turned", "selector"]


@pytest.mark.parametrize("bad", [Unavailable("down"), lambda r, u, c, s: Adjusted(scores(1), {})])
def test_an_adjuster_that_fails_leaves_the_scores(bad):
    slate = pipeline(adjusters=[Stage("adjuster", bad)]).run(ask())
    assert (slate.rows.tolist(), slate.scores.tolist()) == ([7, 6], [7, 6])
    assert slate.degraded[0].part == "PROFILE_STORE"


def test_a_score_that_is_not_finite_sinks():
    bad = Stage("scorer", lambda r, u, c: Scored(scores(np.nan, 1, np.inf, 2)))
    assert pipeline(scorer=bad).run(ask()).rows.tolist() == [7, 5]


def test_a_selector_that_fails_leaves_top_k():
    slate = pipeline(selector=Stage("selector", Unavailable("x"))).run(ask())
    assert (slate.rows.tolist(), slate.degraded[0].part) == ([7, 6], "SELECTOR")


def test_reasons_are_given_only_when_asked_for():
    explainer = Stage("why", [[Reason("popular", -1, "because", 1.0)], []])
    assert not pipeline(explainers=[explainer]).run(ask()).reasons
    assert pipeline(explainers=[explainer]).run(ask(explain=True)).reasons[0][0].text == "because"


def test_side_effects_and_explainers_that_fail_are_only_counted():
    broken = Stage("log", Unavailable("full"))
    built = pipeline(side_effects=[broken], explainers=[broken])
    slate = built.run(ask(explain=True))
    assert slate.rows.tolist() == [7, 6]
    assert (slate.degraded, built.recorder.failures) == ([], ["log", "log"])


def test_no_stage_starts_after_the_deadline():
    late = Stage("late", (rows(1), scores(1)))

    def spend(request, user, allowed):
        time.sleep(request.seconds_left() + 0.001)
        return rows(2), scores(1)

    with pytest.raises(DeadlineExceeded, match="late"):
        pipeline(sources=[Stage("slow", spend), late]).run(ask(deadline=time.monotonic() + 0.2))
    assert late.calls == 0


def test_interleaved_takes_the_best_rank_of_any_source():
    merged = merge([Proposal("a", rows(1, 2, 3), scores(9, 8, 7)), Proposal("b", rows(3, 4), scores(5, 4))])
    assert interleaved(merged).tolist() == [0, -1, 0, -1]


def test_interleaved_goes_tier_by_tier():
    merged = merge([Proposal("a", rows(1), scores(-9)), Proposal("b", rows(3, 1, 4), scores(6, 5, 4), 1)])
    assert interleaved(merged).tolist() == [0, -3, -5]


def test_a_required_filter_that_cannot_hold_back_fails_the_request():
    with pytest.raises(Unavailable):
        pipeline(filters=[Stage("excluded", required=True, held=Unavailable("unknown"))]).run(ask())


def test_a_personal_filter_that_cannot_hold_back_is_not_asked_again():
    blind = Stage("blocked", held=Unavailable("unreadable"))
    built = pipeline(filters=[blind])
    slate = built.run(ask())
    assert sorted(slate.rows.tolist()) == [6, 7]
    assert (slate.degraded, blind.calls) == ([Degraded("PROFILE_STORE", "unreadable")], 0)
    assert built.recorder.failures == ["blocked"]


class TestTiers:
    def sources(self):
        return {
            "near": Stage("near", (rows(1), scores(5))),
            "segment": Stage("segment", (rows(1, 2, 3), scores(9, 8, 7))),
            "popular": Stage(POPULAR, (rows(3, 4, 5, 6), scores(4, 3, 2, 1))),
        }

    def built(self, sources, extras=(), **changes):
        tiers = [Tier(f"rung {name}", [source]) for name, source in sources.items()]
        scorer = Stage("scorer", lambda request, user, candidates: Scored(interleaved(candidates)))
        return pipeline(tiers=tiers, extras=extras, scorer=scorer, **changes)

    @pytest.mark.parametrize(("page", "asked"), [(1, "near"), (2, "segment"), (3, "segment"), (4, "popular")])
    def test_the_runner_goes_down_until_the_page_is_full(self, page, asked):
        sources = self.sources()
        slate = self.built(sources).run(ask(page_size=page))
        assert slate.rows.tolist() == list(range(1, page + 1))
        assert (np.diff(slate.scores) <= 0).all()
        names = list(sources)
        assert [source.calls for source in sources.values()] == [int(at <= names.index(asked)) for at in range(3)]
        assert slate.rung == "rung near"

    @pytest.mark.parametrize("bad", [Unavailable("away"), (rows(), scores())])
    def test_the_rung_is_the_highest_with_an_item_on_the_page(self, bad):
        sources = self.sources()
        sources["near"].result = bad
        slate = self.built(sources).run(ask())
        assert slate.rows.tolist() == [1, 2]
        assert slate.rung == "rung segment"
        assert [part for part, _ in slate.degraded] == (["SOURCE"] if isinstance(bad, Exception) else [])

    def test_what_the_filters_take_is_filled_up(self):
        sources = self.sources()
        odd = Stage("odd", lambda request, user, rows: rows % 2 == 0, held=7)
        slate = self.built(sources, filters=[odd]).run(ask())
        assert (slate.rows.tolist(), slate.rung) == ([2, 4], "rung segment")
        assert slate.dropped == {"odd": 7 + 3}

    def test_extras_compete_once_and_fill_no_page(self):
        sources = self.sources()
        extra = Stage("extra", (rows(8, 2), scores(1, 1)))
        slate = self.built(sources, [extra]).run(ask())
        # Row 2 is of the segment as well, so two candidates of tiers are there; row 8 stays behind both.
        assert (slate.rows.tolist(), extra.calls, sources["popular"].calls) == ([1, 2], 1, 0)
        assert slate.rung == "rung near"

    def test_no_extras_where_no_tier_has_anything(self):
        extra = Stage("extra", (rows(8), scores(1)))
        slate = self.built({"near": Stage("near", (rows(), scores()))}, [extra]).run(ask())
        assert (slate.rows.size, extra.calls) == (0, 0)

    def test_without_its_blocks_a_user_gets_the_popular_tier_alone(self):
        sources = self.sources()
        slate = self.built(sources, filters=[Stage("blocked", Unavailable("unreadable"))]).run(ask())
        assert (slate.rows.tolist(), slate.rung) == ([3, 4], "rung segment")
        assert [part for part, _ in slate.degraded] == ["PROFILE_STORE"]

    def test_a_source_asked_in_two_tiers_counts_as_one(self):
        merged = merge([Proposal("a", rows(1), scores(3)), Proposal("b", rows(2), scores(1), 1)])
        again = merge([*[Proposal("a", rows(1), scores(3))], Proposal("a", rows(2), scores(1), 1)])
        assert (merged.names, merged.tiers, again.names, again.tiers) == (("a", "b"), (0, 1), ("a",), (0,))
        assert again.scores.tolist() == [[3, 1]]
        assert merged.tier_of_each().tolist() == [0, 1]


class TestUnknown:
    """Candidates that the catalogue does not know keep the caller's place; the known ones move around them."""

    def ranked(self, given, unknown, page=9, upstream=None, keep=lambda request, user, rows: np.ones(rows.size, bool)):
        fields = {"rows": rows(*given), "upstream": upstream, "unknown": unknown, "page_size": page}
        asked = ask(**fields, exclude_unknown=frozenset({"no"}))
        built = pipeline(
            sources=[Stage("upstream", (asked.rows, scores(*range(len(given)))))],
            eligibility=Stage("eligible", keep, required=True),
        )
        slate = built.run(asked)
        return slate.item_ids([str(row) for row in slate.rows.tolist()]), slate

    def test_the_known_are_permuted_among_the_other_places(self):
        order, slate = self.ranked([1, 2, 3], (Unknown("x", 1), Unknown("y", 3)))
        assert order == ["3", "x", "2", "1", "y"]
        assert slate.order() == [0, -1, 1, 2, -2]
        assert slate.candidates.rows.size == slate.scores.size == 3

    def test_the_page_counts_them(self):
        assert self.ranked([1, 2, 3], (Unknown("x", 1), Unknown("y", 3)), page=2)[0] == ["3", "x"]
        assert self.ranked([1, 2, 3], (Unknown("x", 0), Unknown("y", 0)), page=1)[0] == ["x"]
        assert self.ranked([], (Unknown("x", 0),))[0] == ["x"]

    def test_places_close_up_where_known_ones_were_dropped_and_the_excluded_leave(self):
        order, slate = self.ranked(
            [1, 2, 3], (Unknown("no", 0), Unknown("x", 2), Unknown("y", 3)), keep=lambda request, user, rows: rows > 1
        )
        assert order == ["3", "x", "2", "y"]
        assert slate.dropped == {"eligible": 1, "excluded": 1}

    def test_by_the_caller_s_scores_where_there_are_any(self):
        # The caller ranks 3, x, 1, 2.
        order, _ = self.ranked([1, 2, 3], (Unknown("x", 1),), upstream=scores(2, 1, 3))
        assert order == ["3", "x", "2", "1"]


class TestLittleTime:
    def test_what_is_optional_is_left_out_and_said(self):
        asked = ask(explain=True, begun=time.monotonic() - 600, deadline=time.monotonic() + 30)
        extra, why = Stage("fresh", (rows(9), scores(9))), Stage("why", [[], []])
        built = pipeline(extras=[extra], explainers=[why])
        slate = built.run(asked)
        assert slate.rows.tolist() == [4, 6]
        assert (extra.calls, built.scorer.calls, why.calls) == (0, 0, 0)
        assert [part for part, _ in slate.degraded] == ["DEADLINE"] * 3
        assert slate.degraded[0].reason == "fresh left out: less than 10% of the time was left"

    def test_with_time_enough_nothing_is(self):
        built = pipeline(extras=[Stage("fresh", (rows(9), scores(9)))], explainers=[Stage("why", [[], []])])
        slate = built.run(ask(explain=True))
        assert (slate.rows.tolist(), slate.degraded) == ([9, 7], [])
