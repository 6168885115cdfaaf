"""Bulk ingest on a stream: a status per event, no running ahead of the log, nothing lost or doubled when it breaks."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from pathlib import Path

import grpc
import pytest

from penchant.client import event
from penchant.v1 import event_pb2, event_pb2_grpc
from serving.errors import EventLogUnavailable, ResourceExhausted, Unavailable
from serving.redis.client import connect
from serving.services.streams import Streams
from serving.stores.event_log import EventLog
from tests.fixtures import PATIENCE_S

INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]


@pytest.fixture
def who() -> str:
    return f"bulk-{uuid.uuid4().hex}"


def count(client, who: str) -> int:
    return client.get_profile(who).event_count


def many(who: str, number: int):
    return (event(who, f"i{n % 40}", "view_item", event_id=f"{who}-{n}") for n in range(number))


def test_every_event_gets_its_status_in_order_and_is_in_the_profile(client, who):
    events = list(many(who, 950))
    events[7].item_id = ""
    events[700].value = float("nan")
    statuses = list(client.ingest_stream(events, batch=300, timeout_s=PATIENCE_S))
    assert len(statuses) == 950
    bad = {place: (status.code, status.field) for place, status in enumerate(statuses) if status.code}
    assert bad == {7: (INVALID, "item_id"), 700: (INVALID, "value")}
    versions = [status.profile_version for status in statuses if not status.code]
    assert versions == sorted(set(versions))
    assert count(client, who) == 948


def test_a_repeat_has_no_second_effect_whichever_way_it_comes(client, who):
    events = list(many(who, 50))
    first = list(client.ingest_stream(events, batch=20, timeout_s=PATIENCE_S))
    again = [*client.ingest_stream(events, batch=50, timeout_s=PATIENCE_S), *client.ingest(events)]
    assert [status.duplicate for status in again] == [True] * 100
    assert [status.profile_version for status in again] == [status.profile_version for status in first] * 2
    assert count(client, who) == 50


def test_large_events_go_in_smaller_batches(client, who):
    events = [event(who, "i1", "view_item", attributes={str(n): "x" * 1000 for n in range(20)}) for _ in range(500)]
    events[100].attributes["huge"] = "x" * (1 << 20)
    statuses = list(client.ingest_stream(events, batch=500, timeout_s=PATIENCE_S))
    assert [(place, status.field) for place, status in enumerate(statuses) if status.code] == [(100, "attributes")]
    assert count(client, who) == 499


def test_what_no_message_can_hold_is_not_sent_again_and_again(client, who):
    events = [*many(who, 1), event(who, "i1", "view_item", attributes={"huge": "x" * (5 << 20)})]
    with pytest.raises(grpc.RpcError) as error:
        list(client.ingest_stream(events, batch=1, timeout_s=100 * PATIENCE_S))  # longer than this test may take
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert count(client, who) == 1


def test_nothing_to_send_is_no_error(client):
    assert list(client.ingest_stream([], timeout_s=PATIENCE_S)) == []


def test_what_the_callers_own_events_raise_reaches_the_caller(client, who):
    def broken():
        yield from many(who, 5)
        raise LookupError("no more of them")

    with pytest.raises(LookupError, match="no more"):
        list(client.ingest_stream(broken(), batch=2, timeout_s=PATIENCE_S))


def stub(service) -> event_pb2_grpc.EventServiceStub:
    return event_pb2_grpc.EventServiceStub(grpc.insecure_channel(service.target))


@pytest.mark.parametrize("size", [0, 1001])
def test_a_batch_of_a_wrong_size_ends_the_stream(service, who, size):
    batches = [event_pb2.IngestStreamRequest(events=many(who, n)) for n in (1, size)]
    answers = stub(service).IngestStream(iter(batches), timeout=PATIENCE_S)
    assert len(next(answers).statuses) == 1
    with pytest.raises(grpc.RpcError) as refused:
        next(answers)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "events" in refused.value.details()


def test_a_message_that_is_none_ends_the_stream(service):
    channel = grpc.insecure_channel(service.target)
    call = channel.stream_stream("/penchant.v1.EventService/IngestStream", lambda raw: raw, lambda raw: raw)
    with pytest.raises(grpc.RpcError) as refused:
        list(call(iter([b"\xff\xff\xff"]), timeout=PATIENCE_S))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_nobody_can_run_ahead_of_the_log(service, client, who):
    """Nothing reads the answers, so the server soon writes none and reads no more: the sender stands still."""
    sent = 0

    def batches():
        nonlocal sent
        while sent < 5000:
            filler = dict.fromkeys("abcde", "x" * 900)
            events = [event(f"{who}-{n}", f"i{n % 40}", "view_item", attributes=filler) for n in range(200)]
            sent += 1
            yield event_pb2.IngestStreamRequest(events=events)

    answers = stub(service).IngestStream(batches(), timeout=4 * PATIENCE_S)
    next(answers)
    durable = 0
    for _ in range(5):
        durable += 1
        next(answers)
    # About 1 MB each: what is sent and not answered fits the window of a connection, whatever the caller has left.
    assert sent - durable < 40
    answers.cancel()


def test_a_few_streams_do_not_take_the_service_from_the_others(serve, who):
    with serve(max_concurrent=8) as service, service.client(channels=1) as client:
        release = threading.Event()

        def held(number: int):
            yield event_pb2.IngestStreamRequest(events=[event(who, "i1", "view_item", event_id=f"{number}")])
            release.wait(PATIENCE_S)

        streams = [stub(service).IngestStream(held(number), timeout=PATIENCE_S) for number in range(2)]
        for stream in streams:
            assert len(next(stream).statuses) == 1
        with pytest.raises(grpc.RpcError) as refused:
            next(stub(service).IngestStream(held(9), timeout=PATIENCE_S))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(client.recommend(user_id=who).items) == 20
        assert not client.ingest([event(who, "i2", "like")])[0].code
        # The worker ends though they would go on.
        begun = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - begun < PATIENCE_S
        release.set()
        for stream in streams:
            with pytest.raises(grpc.RpcError):
                next(stream)


def test_a_worker_that_dies_amid_a_stream_loses_and_doubles_nothing(serve, who):
    with serve() as service, service.client(channels=2) as client:
        statuses = []
        for status in client.ingest_stream(many(who, 3000), batch=50, timeout_s=4 * PATIENCE_S):
            if len(statuses) in (500, 1700):
                children = service.ready["workers"] if len(statuses) == 500 else children_of(service)
                os.kill(children[0], signal.SIGKILL)
            statuses.append(status)
        assert len(statuses) == 3000
        assert not [status for status in statuses if status.code]
        with connect(service.ready["events_redis"], 5) as redis:
            log = EventLog(redis)
            found = [entry.event_id for part in range(log.partitions) for entry in log.read(part, count=10_000)]
        assert len(found) == len(set(found)) == 3000


def children_of(service) -> list[int]:
    """The process ids of the workers now; the parent starts a dead one again."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names = (path / "maps").read_text()
        except (OSError, ValueError):
            continue
        if parent == service.process.pid and "onnxruntime" in names:
            found.append(int(path.name))
    return found


class TestPatience:
    class Context:
        """The part of a call that patience asks: whether anybody still waits."""

        active = True

        def is_active(self) -> bool:
            return self.active

    @pytest.mark.parametrize("error", [ResourceExhausted("full"), EventLogUnavailable("away")])
    def test_waits_for_a_log_that_comes_back(self, error):
        tries = []

        def work() -> str:
            tries.append(1)
            if len(tries) < 4:
                raise error
            return "done"

        assert Streams(1).patiently(work, self.Context()) == "done"
        assert len(tries) == 4

    def test_gives_up_in_the_end_or_when_nobody_waits(self):
        def work() -> None:
            raise ResourceExhausted("full")

        with pytest.raises(ResourceExhausted):
            Streams(1).patiently(work, self.Context(), stall_s=0.2)
        gone = self.Context()
        gone.active = False
        begun = time.monotonic()
        with pytest.raises(ResourceExhausted):
            Streams(1).patiently(work, gone)
        assert time.monotonic() - begun < 5

    def test_a_worker_that_ends_takes_no_more(self):
        streams = Streams(1)
        streams.close()
        with pytest.raises(Unavailable, match="ending"), streams.entered(self.Context()):
            raise AssertionError("it was let in")
