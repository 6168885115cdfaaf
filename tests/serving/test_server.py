"""The edge of the server with services that misbehave, and the client that calls them."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import logging
import socket
import threading
import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from penchant.client import Client, event, violations
from penchant.v1 import (
    catalog_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
    profile_pb2,
    profile_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
)
from serving.config import ServeConfig
from serving.errors import InvalidArgument, ResourceExhausted, Unavailable
from serving.server import Server, Services
from serving.telemetry import Telemetry
from serving.turns import Turns


class Ranking(ranking_pb2_grpc.RankingServiceServicer):
    """Answers `Search` with what its query says, and counts how many run at once."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.lock = threading.Lock()

    def Search(self, request, context):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            time.sleep(float(request.query or 0))
        finally:
            with self.lock:
                self.running -= 1
        return ranking_pb2.SearchResponse()

    def Recommend(self, request, context):
        raise RuntimeError("a defect with a s3cret in it")

    def Rank(self, request, context):
        raise InvalidArgument("some.field", "must be better")

    def SimilarItems(self, request, context):
        raise ResourceExhausted("too much", retry_after_ms=250)


class Events(event_pb2_grpc.EventServiceServicer):
    """Is away for the first calls, and remembers what it was asked."""

    def __init__(self) -> None:
        self.away = 0
        self.asked: list[list[str]] = []

    def Ingest(self, request, context):
        self.asked.append([one.event_id for one in request.events])
        if len(self.asked) <= self.away:
            raise Unavailable("not now")
        return event_pb2.IngestResponse(statuses=[event_pb2.EventStatus() for _ in request.events])


class Profiles(profile_pb2_grpc.ProfileServiceServicer):
    """Remembers over which connections it was asked."""

    def __init__(self) -> None:
        self.peers: list[str] = []

    def GetProfile(self, request, context):
        self.peers.append(context.peer())
        return profile_pb2.GetProfileResponse(found=True)

    def EraseSubject(self, request, context):
        raise KeyError("x")


class Running:
    def __init__(self, **settings) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.target = f"127.0.0.1:{probe.getsockname()[1]}"
        self.telemetry, self.ranking, self.events, self.profiles = Telemetry(), Ranking(), Events(), Profiles()
        config = ServeConfig.load(bundle="none", listen=self.target, **settings)
        self.server = Server(config, Turns(config.threads), self.telemetry)
        services = Services(self.ranking, self.events, self.profiles, catalog_pb2_grpc.CatalogServiceServicer())
        self.server.start(self.target, services)
        self.client = Client(self.target, timeout_s=10.0, channels=1)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.stop()


@pytest.fixture
def running():
    with Running() as server:
        yield server


def refused(call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def test_a_defect_is_internal_with_a_mark_that_the_log_explains(running, caplog):
    with caplog.at_level(logging.ERROR):
        error = refused(lambda: running.client.recommend(user_id="u"))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "s3cret" not in error.details()
    mark = error.details().split()[2].rstrip(":")
    (record,) = [record for record in caplog.records if mark in record.getMessage()]
    assert "s3cret" in str(record.exc_info[1])
    assert running.client.get_profile("u").found
    assert running.telemetry.counters()["Recommend.INTERNAL"] == 1


def test_a_field_travels_as_bad_request(running):
    error = refused(lambda: running.client.rank(["a"]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "some.field: must be better"
    assert violations(error) == {"some.field": "must be better"}


def test_a_retry_hint_travels_twice(running):
    error = refused(lambda: running.client.similar_items(["a"]))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "250"
    (detail,) = rpc_status.from_call(error).details
    retry = error_details_pb2.RetryInfo()
    assert detail.Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 250
    assert violations(error) == {}


def test_rankings_take_turns_and_what_is_too_late_is_not_begun():
    with Running(threads=2, max_concurrent=16) as server:
        calls = [threading.Thread(target=server.client.search, args=["0.3"]) for _ in range(6)]
        for call in calls:
            call.start()
        time.sleep(0.1)
        error = refused(lambda: server.client.search("0", timeout_s=0.1))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # What only waits for something else is not held up by rankings.
        begun = time.monotonic()
        assert server.client.get_profile("u").found
        assert time.monotonic() - begun < 0.3
        for call in calls:
            call.join()
        assert server.ranking.most == 2


def test_a_stop_lets_calls_in_hand_finish():
    with Running() as server:
        outcome: list[object] = []

        def ask() -> None:
            outcome.append(server.client.search("0.5"))

        call = threading.Thread(target=ask)
        call.start()
        time.sleep(0.2)
        server.server.stop()
        call.join()
        assert outcome == [ranking_pb2.Slate()]
        assert refused(lambda: server.client.search("0", timeout_s=0.5)).code() is grpc.StatusCode.UNAVAILABLE


class TestClient:
    def test_what_is_away_is_asked_again_with_the_same_ids(self, running):
        running.events.away = 3
        statuses = running.client.ingest([event("u", "i", "like"), event_pb2.Event(item_id="no id yet")])
        assert len(statuses) == 2
        assert len(running.events.asked) == 4
        assert len({tuple(ids) for ids in running.events.asked}) == 1
        assert all(running.events.asked[0])

    def test_the_deadline_ends_all_trying(self, running):
        running.events.away = 10**9
        begun = time.monotonic()
        error = refused(lambda: running.client.ingest([event("u", "i", "like")], timeout_s=0.3))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - begun < 2
        assert len(running.events.asked) > 2

    @pytest.mark.parametrize("method", ["recommend", "rank", "similar_items"])
    def test_what_was_refused_is_not_asked_again(self, running, method):
        arguments = {"recommend": [], "rank": [["a"]], "similar_items": [["a"]]}[method]
        refused(lambda: getattr(running.client, method)(*arguments, user_id="u"))
        assert sum(running.telemetry.counters().values()) == 1

    def test_calls_go_round_the_connections(self):
        with Running() as server, Client(server.target, channels=3) as client:
            client.wait_ready()
            for _ in range(6):
                client.get_profile("u")
            assert len(set(server.profiles.peers)) == 3
