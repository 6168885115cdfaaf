"""Counters lose nothing and percentiles are right to a bucket."""

from __future__ import annotations

import json
import threading
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serving.observability.telemetry import BUCKETS, Telemetry, bucket_limit, bucket_of, percentile


@given(st.integers(0, 10**9))
def test_a_duration_lies_in_its_bucket(microseconds):
    bucket = bucket_of(microseconds)
    assert microseconds < bucket_limit(bucket)
    assert bucket == 0 or microseconds >= bucket_limit(bucket - 1)
    assert bucket < BUCKETS


def test_the_last_bucket_takes_everything():
    assert bucket_of(10**15) == BUCKETS - 1


def test_percentiles_by_hand():
    telemetry = Telemetry()
    for value in range(1, 101):
        telemetry.stage("x", value * 100)
    summary = telemetry.summary()["x"]
    assert summary["count"] == 100
    assert summary["mean"] == 5050
    assert 5000 <= summary["p50"] <= 5000 * 1.125 + 1
    assert 9900 <= summary["p99"] <= 9900 * 1.125 + 1
    assert percentile([0] * (BUCKETS + 1), 0.5) == 0


def test_no_count_is_lost_between_threads():
    telemetry = Telemetry()

    def work() -> None:
        for _ in range(10_000):
            telemetry.count("n")
            telemetry.stage("s", 5)
            telemetry.failure("f")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert telemetry.counters() == {"n": 40_000, "stage_failures.f": 40_000}
    assert telemetry.summary()["s"]["count"] == 40_000


@given(st.lists(st.integers(-5, 10**10), max_size=30))
def test_a_duration_is_counted_in_its_bucket(durations):
    telemetry = Telemetry()
    for microseconds in durations:
        telemetry.stage("s", microseconds)
    cells = telemetry.histograms().get("s", [0] * (BUCKETS + 1))
    assert Counter(bucket_of(one) for one in durations) == {at: n for at, n in enumerate(cells[:BUCKETS]) if n}
    assert cells[BUCKETS] == sum(durations)


def test_threads_that_end_leave_their_counts_and_nothing_else():
    telemetry = Telemetry()

    def work() -> None:
        telemetry.count(("request", "Rank", "OK"))
        telemetry.stage("s", 5)

    for _ in range(200):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(telemetry._shards) <= 3
    assert telemetry.counters() == {"request.Rank.OK": 200}
    assert telemetry.summary()["s"]["count"] == 200
    assert telemetry.counters() == {"request.Rank.OK": 200}  # and reading them changes nothing


def test_a_snapshot_is_all_of_it_as_json():
    telemetry = Telemetry()
    telemetry.count("n", 2)
    telemetry.count(("request", "Rank", "OK"))
    telemetry.stage("s", 1500)
    telemetry.gauge("g", lambda: 7)
    assert json.loads(json.dumps(telemetry.snapshot())) == {
        "counts": [[["n"], 2], [["request", "Rank", "OK"], 1]],
        "times": [[["s"], {str(bucket_of(1500)): 1, str(BUCKETS): 1500}]],
        "gauges": {"g": 7},
    }
