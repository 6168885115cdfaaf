"""Counters lose nothing and percentiles are right to a bucket."""

from __future__ import annotations

import threading
import urllib.request

from hypothesis import given
from hypothesis import strategies as st

from serving.telemetry import BUCKETS, Telemetry, bucket_limit, bucket_of, expose, percentile


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
    assert telemetry.counters() == {"n": 40_000, "failed.f": 40_000}
    assert telemetry.summary()["s"]["count"] == 40_000


def test_prometheus_reads_it():
    telemetry = Telemetry()
    telemetry.count("events.taken", 3)
    telemetry.stage("nearest", 1500)
    server = expose(telemetry, 0)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=5).read().decode()
    finally:
        server.shutdown()
        server.server_close()
    assert 'penchant_events_total{name="events.taken"} 3.0' in text
    assert 'penchant_stage_seconds_sum{stage="nearest"} 0.0015' in text
    assert 'penchant_stage_seconds_bucket{le="+Inf",stage="nearest"} 1.0' in text
