"""Which connections end: those that bring no calls but work, and those that are too many."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from serving.services.reception import sockets
from serving.services.reception.calls import Bounds, Lane, OpenCalls, PeerConnection
from serving.services.reception.sockets import BROKEN_CALLS, FREE_BYTES, Sockets

MESSAGE = 4 << 20


@pytest.fixture
def looks(monkeypatch):
    """Sockets of which a test says what has come over them."""

    def make(received, most=1000):
        looked = Sockets(1, MESSAGE, most)
        monkeypatch.setattr(looked, "_open", lambda: [(0, peer, size) for peer, size in received.items()])
        return looked

    return make


def test_bytes_without_a_call_are_counted_over_a_second_however_often_one_looks(looks):
    received = {"a": 0}
    looked, ended = looks(received), []
    for _ in range(30):
        received["a"] += FREE_BYTES // 5
        ended += looked.abusive({}, 0.1)
    assert ended
    received["a"], looked = 0, looks(received)
    for _ in range(30):
        received["a"] += FREE_BYTES // 11
        assert looked.abusive({}, 0.1) == []


def test_a_message_that_is_refused_between_two_looks_is_no_abuse(looks):
    received = {"a": 0}
    looked, calls, lane = looks(received), OpenCalls(Bounds(), lambda: None), Lane("call", 4)
    call, _ = calls.enter("a", lane)
    assert looked.abusive(calls.connections, 0.1) == []
    received["a"] = MESSAGE
    calls.done(call)
    calls.close(call)
    assert looked.abusive(calls.connections, 0.1) == []


def test_of_too_many_connections_those_end_that_had_no_call_for_longest(looks):
    received = dict.fromkeys("abcdef", 0)
    looked, calls, lane = looks(received, 3), OpenCalls(Bounds(), lambda: None), Lane("call", 4)
    calls.enter("a", lane)
    for peer in "bc":
        call, _ = calls.enter(peer, lane)
        calls.done(call)
        calls.close(call)
    assert sorted(looked.abusive(calls.connections, 0.1)) == ["d", "e", "f"]


def test_calls_that_are_given_up_are_counted_over_a_second(looks):
    looked, connection, ended = looks({"a": 0}), PeerConnection("a"), []
    for _ in range(30):
        connection.bad += BROKEN_CALLS // 5
        connection.entered += BROKEN_CALLS // 5
        ended += looked.abusive({"a": connection}, 0.1)
    assert ended


def test_a_worker_keeps_descriptors_for_other_things_than_connections(monkeypatch):
    monkeypatch.setattr(sockets.resource, "getrlimit", lambda _: (1024, 4096))
    assert sockets.connection_limits() == (512, 768)


def test_a_connection_is_found_whatever_its_descriptor_was_before():
    """A new number is found by the next look, one that was a file's by one of the next ten."""
    with socket.socket() as listening, contextlib.ExitStack() as opened:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        looked = Sockets(listening.getsockname()[1], MESSAGE)

        def connect() -> str:
            client = opened.enter_context(socket.create_connection(listening.getsockname()))
            server = opened.enter_context(listening.accept()[0])
            numbers.append(server.fileno())
            return f"ipv4:127.0.0.1:{client.getsockname()[1]}"

        def peers() -> set[str]:
            return {peer for _, peer, _ in looked._open()}

        numbers: list[int] = []
        # The client's socket takes the lowest free number, the server's the next: that of the file.
        with open(os.devnull) as spare, open(os.devnull) as file:
            number = file.fileno()
            first = connect()
            assert peers() == {first}
            spare.close()
        second = connect()
        assert numbers[1] == number
        looks = [peers() for _ in range(sockets._WHOLE)]
        assert looks[-1] == {first, second}
        newest = [connect() for _ in range(20)]
        assert peers() == {first, second, *newest}
