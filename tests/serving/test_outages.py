"""A broken part is one line a minute, with how often it failed, and one line when it works again."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.observability.outages import Outage


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, bool]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.getMessage(), bool(record.exc_info and record.exc_info[0])))


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def said() -> Lines:
    return Lines()


def outage(said: Lines, clock: Clock) -> Outage:
    log = logging.Logger("outage")
    log.addHandler(said)
    return Outage(log, "the events Redis", clock=clock)


def test_a_line_a_minute_and_one_at_the_end(said):
    clock = Clock()
    redis = outage(said, clock)
    redis.works()
    assert redis.seconds == 0
    for _ in range(1200):  # two a second, for ten minutes
        redis.failed("does not answer")
        redis.lost("slates not logged", 2)
        clock.now += 0.5
    assert redis.seconds == 600
    redis.works()
    lines = [line for line, _ in said.lines]
    assert len(lines) == 11
    assert lines[0] == "the events Redis: does not answer"
    assert lines[1] == (
        "the events Redis: does not answer (120 times since the last line, for 60 s by now, 240 slates not logged)"
    )
    assert lines[-1] == "the events Redis: works again after 600.0 s and 1200 failures, 2400 slates not logged"
    assert redis.seconds == 0
    redis.works()
    assert len(said.lines) == 11


def test_it_works_again_when_every_part_does(said):
    clock = Clock()
    cluster = outage(said, clock)
    for part in "ab":
        cluster.failed("does not answer", part)
    clock.now += 1
    cluster.works("a")
    cluster.works("c")
    assert len(said.lines) == 1
    cluster.works("b")
    assert "after 1.0 s and 2 failures" in said.lines[-1][0]
    clock.now += 60
    cluster.failed("does not answer", "gone for good")
    clock.now += 61
    cluster.works("a")  # a part that fails no more counts no more
    assert "works again" in said.lines[-1][0]


def test_only_what_nobody_expected_has_a_traceback_and_that_once_a_minute(said):
    redis = outage(said, Clock())
    for _ in range(3):
        redis.failed("odd", trace=ValueError("odd"))
    assert len(said.lines) == 1
    assert said.lines[0][1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("fw"), st.floats(0, 40), st.sampled_from("ab")), max_size=80))
def test_never_more_than_two_lines_a_minute(steps):
    """Also where it fails and works in turn."""
    said, clock = Lines(), Clock()
    redis, times = outage(said, clock), []
    for kind, pause, part in steps:
        clock.now += pause
        before = len(said.lines)
        redis.failed("x", part) if kind == "f" else redis.works(part)
        times += [clock.now] * (len(said.lines) - before)
    for number, at in enumerate(times):
        assert sum(at <= other < at + 60 for other in times[number:]) <= 2 + 1  # the end of one, a whole one
