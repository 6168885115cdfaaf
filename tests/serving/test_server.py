"""The edge of the server with services that misbehave, and the client that calls them."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from penchant.channels import is_local
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
from serving.concurrency import ConcurrencyLimit
from serving.config import ServeConfig
from serving.errors import InvalidArgument, ResourceExhausted, Unavailable
from serving.observability.telemetry import Telemetry
from serving.services.reception import executor
from serving.services.server import Server, Services
from tests.serving.faults import wait_until


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
        self.server = Server(config, ConcurrencyLimit(config.threads), self.telemetry)
        services = Services(self.ranking, self.events, self.profiles, catalog_pb2_grpc.CatalogServiceServicer())
        self.server.start(self.target, services)
        self.client = Client(self.target, timeout_s=10.0, channels=1)

    def __enter__(self) -> Running:
        return self

    def in_hand(self) -> tuple[float, float]:
        """Requests in progress, and those of them that wait, by the metrics."""
        gauges = self.telemetry.snapshot()["gauges"]
        return gauges["requests_in_flight"], gauges["requests_waiting"]

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.stop()


@pytest.fixture
def running():
    with Running() as server:
        yield server


def test_in_a_crowd_of_calls_threads_take_turns_at_the_interpreter_more_often(running, monkeypatch):
    usual_s = sys.getswitchinterval()
    monkeypatch.setattr(executor, "_CROWD", 0)
    with grpc.insecure_channel(running.target) as channel, ThreadPoolExecutor(1) as pool:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        time.sleep(3 * executor.ROUND_S)
        assert sys.getswitchinterval() == usual_s  # a stream is no crowd
        call = pool.submit(running.client.search, "0.5", user_id="u")
        wait_until(lambda: sys.getswitchinterval() < usual_s)
        call.result()
        wait_until(lambda: sys.getswitchinterval() == usual_s)


def test_a_call_that_is_over_is_gone_without_a_garbage_collection(running, monkeypatch):
    gc.collect()
    gc.disable()
    try:
        states = []
        submit = executor.Reception.submit

        def watched(self, fn, *args, **kwargs):
            states.append(weakref.ref(args[2]))
            return submit(self, fn, *args, **kwargs)

        monkeypatch.setattr(executor.Reception, "submit", watched)
        for _ in range(20):
            running.client.search("0", user_id="u")
        wait_until(lambda: sum(state() is not None for state in states) <= 2)  # one may be in the hand of a thread
    finally:
        gc.enable()


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
    assert running.telemetry.counters()["requests.Recommend.INTERNAL.."] == 1


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


def frames(connection: socket.socket, seconds: float) -> list[tuple[int, int]]:
    """Type and flags of the HTTP/2 frames that come in a time."""
    end, received, found = time.monotonic() + seconds, b"", []
    while (left := end - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            received += connection.recv(4096)
        except TimeoutError:
            break
        while len(received) >= 9 and len(received) >= 9 + int.from_bytes(received[:3]):
            found.append((received[3], received[4]))
            received = received[9 + int.from_bytes(received[:3]) :]
    return found


def pinged(target: str, *, within_a_call: bool, pings: int = 6, pause_s: float = 0.25) -> tuple[int, int]:
    """How many pings are answered, and how many GOAWAY come; a client of any library, as the wire sees it."""
    host, _, port = target.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        settings = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        if within_a_call:  # :method POST, :scheme http, :authority, :path; the body never comes, so the call stays open
            path = b"/penchant.v1.RankingService/Search"
            head = b"\x83\x86\x01\x09localhost\x04" + bytes([len(path)]) + path + b"\x40\x02te\x08trailers"
            head += b"\x40\x0ccontent-type\x10application/grpc"
            connection.sendall(len(head).to_bytes(3) + bytes([1, 4, 0, 0, 0, 1]) + head)
        came: list[tuple[int, int]] = []
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # after a GOAWAY
            for number in range(pings):
                connection.sendall(bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + number.to_bytes(8))
                came += frames(connection, pause_s)
    return came.count((6, 1)), sum(kind == 7 for kind, _ in came)


@pytest.mark.parametrize("within_a_call", [False, True])
def test_pings_of_clients_are_answered_and_end_no_connection(running, within_a_call):
    assert pinged(running.target, within_a_call=within_a_call) == (6, 0)


def test_a_server_as_grpc_makes_it_ends_such_connections():
    # The control: without our options the very same pings are "too many".
    server = grpc.server(ThreadPoolExecutor(1))
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        assert pinged(target, within_a_call=False)[1]
    finally:
        server.stop(None)


def test_what_is_in_hand_waits_or_was_refused_is_measured():
    with Running(threads=1, max_concurrent=2, token="t") as server, Client(server.target, token="t") as client:
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(client.search, "0.5", timeout_s=10.0) for _ in range(2)]
            wait_until(lambda: server.in_hand() == (2, 1))
            refused(lambda: client.get_profile("u"))
            for one in running:
                one.result()
        wait_until(lambda: server.in_hand() == (0, 0))
        assert refused(lambda: server.client.get_profile("u")).code() is grpc.StatusCode.UNAUTHENTICATED
        counts = server.telemetry.counters()
        assert counts["requests_refused.busy"] >= 1
        assert counts["requests_refused.token"] == 1
        assert counts["requests.Search.OK.."] >= 2  # the client may ask again


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


PROXIES = [
    name for lower in ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy") for name in (lower, lower.upper())
]


@pytest.fixture
def proxies(monkeypatch):
    """Every usual variable names a proxy that nobody runs."""
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "NO_GRPC_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")


class TestProxies:
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "dns:///localhost", "ipv4:127.0.0.1"])
    def test_what_runs_on_this_machine_is_called_without(self, running, proxies, host):
        port = running.target.rpartition(":")[2]
        with Client(f"{host}:{port}", timeout_s=10.0) as client:
            assert client.get_profile("u").found

    def test_grpc_itself_would_ask_the_proxy(self, running, proxies):
        # The control: the proxy is one that the library heeds.
        with grpc.insecure_channel(running.target) as channel, pytest.raises(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(timeout=1.0)

    def test_what_runs_elsewhere_is_called_through_the_proxy(self, monkeypatch):
        with socket.socket() as proxy:
            proxy.bind(("127.0.0.1", 0))
            proxy.listen()
            proxy.settimeout(10.0)
            monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
            with Client("penchant.example:50051", channels=1, timeout_s=1.0) as client:
                call = threading.Thread(target=lambda: refused(lambda: client.get_profile("u")))
                call.start()
                asked, _ = proxy.accept()
                with asked:
                    assert asked.recv(100).startswith(b"CONNECT penchant.example:50051")
                call.join()


@pytest.mark.parametrize(
    ("target", "local"),
    [
        *[(f"{host}:50051", True) for host in ("127.0.0.1", "127.8.9.1", "127.1", "[::1]", "[::ffff:127.0.0.1]")],
        *[(f"{host}:50051", True) for host in ("localhost", "LocalHost.", "a.localhost", "0.0.0.0", "[::]")],
        *[(target, True) for target in ("localhost", "::1", "[::1]", "unix:/run/x", "unix:x", "unix-abstract:x")],
        *[(f"{scheme}localhost:1", True) for scheme in ("dns:", "dns:/", "dns:///", "DNS:///", "dns://8.8.8.8/")],
        *[(target, True) for target in ("ipv4:127.0.0.1:1,127.0.0.2:2", "ipv6:[::1]:1", "ipv6:[::1%25lo]:1")],
        *[(f"{host}:50051", False) for host in ("10.0.0.1", "128.0.0.1", "[fd00::1]", "localhost.example", "penchant")],
        *[
            (target, False)
            for target in ("ipv4:127.0.0.1:1,10.0.0.1:2", "dns:///example.org:1", "xds:///localhost", "")
        ],
    ],
)
def test_what_is_on_this_machine(target, local):
    assert is_local(target) is local


def test_names_that_the_machine_gives_itself_are_on_this_machine(tmp_path, monkeypatch):
    hosts = tmp_path / "hosts"
    hosts.write_text("# 127.0.0.1 remark\n127.0.1.1 Box box.lan # ours\n10.0.0.1 far both\n::1 both\n\n")
    monkeypatch.setattr("penchant.channels._HOSTS", hosts)
    assert [is_local(f"{name}:1") for name in ("box", "Box.LAN", "far", "both", "remark")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    monkeypatch.setattr("penchant.channels._HOSTS", tmp_path / "none")
    assert not is_local("box:1")
