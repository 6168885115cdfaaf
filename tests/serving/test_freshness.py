"""Read your writes: what one worker has written is in the very next answer of another one."""

from __future__ import annotations

import uuid

import pytest

from benchmarks.freshness import client_of, faults, freshness, read_your_writes
from penchant.client import event
from tests.world import items

NAMES = [item["item_id"] for item in items()]


@pytest.fixture(scope="module")
def by_worker(service):
    """One client per worker."""
    clients = [client_of(service.ready, worker) for worker in service.ready["workers"]]
    yield clients
    for client in clients:
        client.close()


def test_what_one_worker_wrote_is_in_the_answer_of_the_other_every_time(by_worker):
    assert len(by_worker) == 2
    found = read_your_writes(by_worker, NAMES, 400)
    assert found.pairs == 400
    assert not found.faults


def test_an_answer_without_the_event_would_be_noticed(by_worker):
    writer, reader = by_worker
    person = uuid.uuid4().hex
    before = reader.recommend(user_id=person, page_size=1)
    [status] = writer.ingest([event(person, "i1", "view_item")])
    assert set(faults(status, before)) == {"not_in_the_features"}
    stale = reader.recommend(user_id=person, page_size=1, min_profile_version=status.profile_version + 1, timeout_s=1.0)
    assert set(faults(status, stale)) == {"degraded"}
    writer.set_consent(["train"], person)
    [status] = writer.ingest([event(person, "i1", "view_item")])
    withheld = reader.recommend(user_id=person, page_size=1)
    assert set(faults(status, withheld)) == {"not_applied", "not_in_the_features"}


@pytest.mark.timeout(300)
def test_the_bench_says_what_it_measured(world):
    said = freshness(world, pairs=20)
    assert (said["pairs"], said["faults"]) == (20, {})
    assert set(said["latency_ms"]) == {"get", "durable_xadd", "call", "stores", "service", "answer"}
    assert all(0 < one["p50"] <= one["p99"] for one in said["latency_ms"].values())
    assert set(said["ratio"]) == set(said["within_limit"]) == {"get", "durable_xadd"}
    assert all(set(one) == {"stores", "service", "answer"} for one in said["ratio"].values())
