"""What connections may hold: the books of open calls, and calls on the wire that hang or are not read."""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.errors import ConfigError, ResourceExhausted, Unavailable
from serving.observability.telemetry import Telemetry
from serving.services.reception import executor
from serving.services.reception.calls import Bounds, Lane, OpenCalls, Phase
from serving.services.reception.executor import Reception
from serving.services.reception.grpc_log import limit_grpc_log
from tests.proofs.attackers import CHECK, PING, RECOMMEND, STREAM, Wire, frame, message
from tests.serving.test_server import Running

SMALL = Bounds(4, 3, 5, message_s=0.3, bytes_in_hand=1 << 20, unread=1 << 16, unread_worker=1 << 17, read_s=0.3)
STEPS = ("enter", "send", "arrive", "start", "write", "done", "close", "cancel", "overdue")


@settings(max_examples=200)
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 99_999)), max_size=60))
def test_the_books_balance_whatever_happens(steps):
    """However calls go on, nothing is counted twice or below nothing, and in the end nothing is left."""
    books, lanes = OpenCalls(SMALL), [Lane("call", 2), Lane("stream", 2, stream=True, idle_s=1.0)]
    calls = []
    for step, which, size in steps:
        if step == "enter":
            calls.append(books.enter(f"peer{which % 3}", lanes[which % 2])[0])
        elif calls:
            _step(books, calls[which % len(calls)], step, size)
        assert all(len(lane.calls) <= lane.places for lane in lanes)
        assert books.unread >= 0 <= books.bytes_in_hand
        assert sum(one.receiving for one in books.connections.values()) == len(books._receiving) <= 3
        assert sum(one.unread for one in books.connections.values()) == books.unread
        open_ = sum(books.count(phase) for phase in (Phase.SENDING, Phase.WORKING, Phase.READING))
        assert sum(len(one.calls) for one in books.connections.values()) == open_
    for call in calls:
        books.close(call)
        books.done(call)
    assert (books.unread, books.bytes_in_hand, books.count(Phase.WORKING)) == (0, 0, 0)
    assert not any(lane.calls for lane in lanes)
    assert not books._receiving
    assert not books._waiting
    books.forget(lambda _: True)
    assert books.connections == {}


def _step(books: OpenCalls, call, step: str, size: int) -> None:
    try:
        if step == "send":
            books.send(call)
        elif step == "arrive":
            books.arrived(call, size)
        elif step == "start":
            books.start(call)
        elif step == "write":
            books.wrote(call, size)
        elif step == "done":
            books.done(call)
        elif step in ("close", "cancel"):
            if not call.closed:  # gRPC says so once
                books.close(call, step == "cancel")
        else:
            books.overdue(time.monotonic() + size % 2)
    except ResourceExhausted:
        books.done(call)


def entered(books: OpenCalls, peer: str, lane: Lane):
    call, error = books.enter(peer, lane)
    assert error is None
    assert books.arrived(call, 1)
    return call


def sending(books: OpenCalls, peer: str, received: list):
    call, _ = books.enter(peer, Lane("call", 100))
    call.receive = lambda: received.append(call)
    books.send(call)
    return call


def test_few_messages_are_received_at_once_and_each_connection_has_its_turn():
    books, received = OpenCalls(Bounds(receiving=2)), []
    crowd = [sending(books, "many", received) for _ in range(10)]
    assert received == crowd[:2]
    good = sending(books, "good", received)
    assert good not in received
    assert books.arrived(crowd[0], 1)  # its message is whole, and makes room
    assert received[-1] is good
    books.close(crowd[1], cancelled=True)
    assert received[-1] is crowd[2]


def test_who_sends_nothing_makes_room_for_a_connection_that_waits():
    books, received = OpenCalls(Bounds(receiving=2, waiting=5)), []
    lonely = sending(books, "lonely", received)
    crowd = [sending(books, "many", received) for _ in range(4)]
    now = time.monotonic()
    assert books.overdue(now) == []  # a message that is on its way has a moment
    ends = [call for call, error in books.overdue(now + 0.5) if isinstance(error, ResourceExhausted)]
    assert ends == [crowd[0]]
    assert {call for call, _ in books.overdue(now + 1.5)} <= {lonely, crowd[0]}
    assert {call for call, _ in books.overdue(now + 6)} == {lonely, *crowd}
    crowd += [sending(books, "many", received) for _ in range(4)]
    assert len([call for call, _ in books.overdue(now + 0.04)]) == 2  # more wait than may


def test_a_full_lane_takes_a_place_from_who_has_most():
    books, lane, told = OpenCalls(Bounds()), Lane("call", 3), []
    greedy = [entered(books, "greedy", lane) for _ in range(3)]
    for call in greedy:
        call.end = told.append
    books.start(greedy[0])
    entered(books, "modest", lane)
    assert [type(error) for error in told] == [ResourceExhausted]
    assert greedy[0].phase is Phase.WORKING  # what a thread works on keeps its place
    assert not books.start(greedy[1])
    with pytest.raises(ResourceExhausted):
        entered(books, "greedy", lane)


def test_a_stream_gives_way_if_its_connection_has_more_than_its_share():
    books, lane, told = OpenCalls(Bounds()), Lane("stream", 2, stream=True), []
    first, second = (entered(books, "greedy", lane) for _ in range(2))
    first.end = second.end = told.append
    entered(books, "modest", lane)
    assert [type(error) for error in told] == [Unavailable]
    with pytest.raises(ResourceExhausted):
        entered(books, "another", lane)


@pytest.fixture
def strict(monkeypatch):
    monkeypatch.setattr("serving.services.server.Bounds", lambda: SMALL)
    with Running() as server:
        yield server


def until(what, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(what())


@pytest.mark.parametrize("path", [CHECK, RECOMMEND, STREAM])
def test_a_call_that_sends_no_message_ends(strict, path):
    wire = Wire(strict.target, "", "")
    wire.open(path)
    assert until(lambda: wire.ended == 1)
    assert strict.client.get_profile("u").found
    wire.close()


def test_calls_end_also_after_a_moment_without_a_descriptor(monkeypatch):
    failures = []

    def resident() -> int:
        failures.append(OSError(errno.EMFILE, "Too many open files"))
        raise failures[-1]

    monkeypatch.setattr(executor, "_resident", resident)
    monkeypatch.setattr("serving.services.server.Bounds", lambda: SMALL)
    with Running() as server:
        assert until(lambda: failures)
        wire = Wire(server.target, "", "")
        wire.open(RECOMMEND)
        assert until(lambda: wire.ended == 1)
        wire.close()


def test_an_answer_that_is_not_read_is_dropped(strict):
    wire = Wire(strict.target, "", "", settings=(4).to_bytes(2) + bytes(4))
    wire.open(CHECK, message(b""), end=True)
    books = strict.server._reception.calls
    assert until(lambda: books.count(Phase.READING) == 1)
    assert until(lambda: wire.ended == 1)
    assert until(lambda: books.unread == 0)
    wire.close()


def test_health_is_answered_while_every_thread_waits():
    with Running(max_concurrent=1, threads=1) as server, grpc.insecure_channel(server.target) as channel:

        def search() -> None:
            with contextlib.suppress(grpc.RpcError):  # a repeat of the client finds the one place taken
                server.client.search("1", timeout_s=10.0)

        call = threading.Thread(target=search)
        call.start()
        assert until(lambda: server.ranking.running == 1)
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert server.ranking.running == 1
        call.join()


def test_who_sends_much_in_calls_stays_and_who_sends_it_without_is_hung_up_on(strict):
    strict.client.get_profile("u")
    sockets, books = strict.server._reception.sockets, strict.server._reception.calls
    named = {peer for _, peer, _ in sockets._open()}
    assert set(books.connections) <= named  # as gRPC writes them
    wire = Wire(strict.target, "", "")
    with contextlib.suppress(OSError):
        for _ in range(100):
            wire.send(frame(PING, 1, 0, bytes(8)) * 1000)
            time.sleep(0.02)
    assert until(lambda: wire.closed)
    wire.close()
    assert strict.server._reception.hung_up >= 1
    assert strict.client.get_profile("u").found
    assert len(set(strict.profiles.peers)) == 1


def test_a_grpc_that_has_changed_is_refused(monkeypatch):
    monkeypatch.setattr(executor._grpc, "_abort", lambda state: None)
    with pytest.raises(ConfigError, match="_abort is not as Penchant needs it"):
        Reception(Bounds(), Lane("call", 1), lambda error: (grpc.StatusCode.UNKNOWN, "", ()), Telemetry())


def test_a_header_that_is_no_text_does_not_print_itself(strict, caplog):
    limit_grpc_log()
    with caplog.at_level(logging.DEBUG):
        wire = Wire(strict.target, "", "")
        odd = b"\x00\x05x-odd\x08s3cret\xff\xfe"
        for _ in range(3):
            wire.open(CHECK, message(b""), end=True, more=odd)
        assert until(lambda: wire.ended == 3)
        wire.close()
    assert "s3cret" not in caplog.text
    assert "Traceback" not in caplog.text
    assert caplog.text.count("not UTF-8") <= 1
