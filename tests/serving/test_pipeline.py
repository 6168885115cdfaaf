"""What the runner does with what stages return, and when they fail: the table at its head, line by line."""

from __future__ import annotations

import time

import numpy as np
import pytest

from serving import pipeline as p
from serving.errors import DeadlineExceeded, Unavailable


class Recorder:
    def __init__(self):
        self.stages, self.failures = [], []

    def stage(self, name, microseconds):
        self.stages.append(name)

    def failure(self, name):
        self.failures.append(name)


class Stage:
    part, required = "PROFILE_STORE", False

    def __init__(self, name, result=None, *, enabled=True, required=False):
        self.name, self.result, self.enabled, self.required, self.calls = name, result, enabled, required, 0

    def enable(self, query):
        return self.enabled

    def _act(self, *arguments):
        self.calls += 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result(*arguments) if callable(self.result) else self.result

    hydrate = retrieve = keep = score = adjust = select = explain = apply = _act


def rows(*values):
    return np.array(values, np.int32)


def scores(*values):
    return np.array(values, np.float32)


def query(**changes):
    return p.Query(request_id="r", subject="u:1", now_ms=0, deadline=time.monotonic() + 5, page_size=2, **changes)


def pipeline(**changes):
    stages = {
        "hydrators": [],
        "sources": [Stage("near", (rows(4, 5, 6), scores(3, 2, 1))), Stage(p.POPULAR, (rows(6, 7), scores(9, 8)))],
        "filters": [],
        "scorer": Stage("scorer", lambda query, candidates: candidates.rows.astype(np.float32)),
        "adjusters": [],
        "selector": Stage("selector", lambda query, candidates, scores: p.top_k(scores, query.page_size)),
        "explainers": [],
        "side_effects": [],
        "recorder": Recorder(),
    }
    return p.Pipeline(**{**stages, **changes})


def test_sources_join_in_the_order_first_named():
    slate = pipeline(selector=Stage("all", lambda q, c, s: (np.arange(c.rows.size), np.ones(c.rows.size)))).run(query())
    assert slate.rows.tolist() == [4, 5, 6, 7]
    np.testing.assert_array_equal(slate.candidates.of("near"), scores(3, 2, 1, np.nan))
    np.testing.assert_array_equal(slate.candidates.of(p.POPULAR), scores(np.nan, np.nan, 9, 8))
    assert np.isnan(slate.candidates.of("nobody")).all()


def test_the_best_come_first_and_every_stage_is_timed():
    built = pipeline()
    slate = built.run(query())
    assert slate.rows.tolist() == [7, 6]
    assert slate.propensities.tolist() == [1, 1]
    assert [name for name, _ in slate.timings] == ["near", "popular", "scorer", "selector"]
    assert built.recorder.stages == ["near", "popular", "scorer", "selector"]


def test_a_filter_drops_and_counts():
    odd = Stage("odd", lambda query, rows: rows % 2 == 1)
    slate = pipeline(filters=[odd]).run(query())
    assert (slate.rows.tolist(), slate.dropped) == ([7, 5], {"odd": 2})


def test_a_stage_that_is_not_enabled_does_not_run():
    off = Stage("off", Unavailable("never"), enabled=False)
    slate = pipeline(hydrators=[off], sources=[off, Stage("s", (rows(1), scores(1)))], filters=[off]).run(query())
    assert (slate.rows.tolist(), off.calls) == ([1], 0)


def test_a_hydrator_that_fails_is_marked():
    asked = query()
    slate = pipeline(hydrators=[Stage("profile", Unavailable("away"))]).run(asked)
    assert slate.rows.tolist() == [7, 6]
    assert asked.degraded == [p.Degraded("PROFILE_STORE", "away")]


def test_a_source_that_fails_is_skipped_and_marked():
    built, asked = pipeline(), query()
    built.sources[0].result = Unavailable("index away")
    assert built.run(asked).rows.tolist() == [7, 6]
    assert asked.degraded == [p.Degraded("SOURCE", "index away")]
    assert built.recorder.failures == ["near"]


def test_no_source_at_all_gives_an_empty_answer():
    assert pipeline(sources=[]).run(query()).rows.tolist() == []


def test_a_required_filter_that_fails_fails_the_request():
    with pytest.raises(Unavailable):
        pipeline(filters=[Stage("eligible", Unavailable("unknown"), required=True)]).run(query())


def test_a_personal_filter_that_fails_leaves_the_popular_pool():
    asked = query()
    slate = pipeline(filters=[Stage("seen", Unavailable("unreadable"))]).run(asked)
    assert sorted(slate.rows.tolist()) == [6, 7]
    assert asked.degraded[0].part == "PROFILE_STORE"


@pytest.mark.parametrize("bad", [Unavailable("down"), lambda q, c: scores(1)])
def test_a_scorer_that_fails_leaves_interleaved_ranks(bad):
    asked = query()
    slate = pipeline(scorer=Stage("scorer", bad)).run(asked)
    assert slate.rows.tolist() == [4, 6]
    assert asked.degraded[0].part == "SCORER"


def test_adjusters_move_what_the_scorer_said_one_after_the_other():
    half = Stage("half", lambda q, c, s: s / 2)
    turned = Stage("turned", lambda q, c, s: np.float32(4) - s)
    built = pipeline(adjusters=[half, turned])
    slate = built.run(query())
    assert (slate.rows.tolist(), slate.scores.tolist()) == ([4, 5], [2, 1.5])
    assert [name for name, _ in slate.timings][-3:] == ["half", "turned", "selector"]


@pytest.mark.parametrize("bad", [Unavailable("down"), lambda q, c, s: scores(1)])
def test_an_adjuster_that_fails_leaves_the_scores(bad):
    asked = query()
    slate = pipeline(adjusters=[Stage("adjuster", bad)]).run(asked)
    assert (slate.rows.tolist(), slate.scores.tolist()) == ([7, 6], [7, 6])
    assert asked.degraded[0].part == "PROFILE_STORE"


def test_a_score_that_is_not_finite_sinks():
    bad = Stage("scorer", lambda q, c: scores(np.nan, 1, np.inf, 2))
    assert pipeline(scorer=bad).run(query()).rows.tolist() == [7, 5]


def test_a_selector_that_fails_leaves_top_k():
    asked = query()
    slate = pipeline(selector=Stage("selector", Unavailable("x"))).run(asked)
    assert (slate.rows.tolist(), asked.degraded[0].part) == ([7, 6], "SELECTOR")


def test_reasons_are_given_only_when_asked_for():
    explainer = Stage("why", [[p.Reason("popular", -1, "because", 1.0)], []])
    assert pipeline(explainers=[explainer]).run(query()).reasons == []
    assert pipeline(explainers=[explainer]).run(query(explain=True)).reasons[0][0].text == "because"


def test_side_effects_and_explainers_that_fail_are_only_counted():
    broken, asked = Stage("log", Unavailable("full")), query(explain=True)
    built = pipeline(side_effects=[broken], explainers=[broken])
    assert built.run(asked).rows.tolist() == [7, 6]
    assert (asked.degraded, built.recorder.failures) == ([], ["log", "log"])


def test_no_stage_starts_after_the_deadline():
    late = Stage("late", (rows(1), scores(1)))

    def spend(asked):
        asked.deadline = time.monotonic() - 1

    with pytest.raises(DeadlineExceeded, match="late"):
        pipeline(hydrators=[Stage("slow", spend)], sources=[late]).run(query())
    assert late.calls == 0


def test_interleaved_takes_the_best_rank_of_any_source():
    merged = p.merge([("a", rows(1, 2, 3), scores(9, 8, 7)), ("b", rows(3, 4), scores(5, 4))])
    assert p.interleaved(merged).tolist() == [0, -1, 0, -1]
