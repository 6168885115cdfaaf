from __future__ import annotations

import contextlib
import os
import socket
import threading
import time

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import hpack
from benchmarks.load.figures import latency_ms
from benchmarks.load.generator import CallFailed, Generator
from benchmarks.load.process_tree import ProcessTree
from benchmarks.load.window import CallPlan, refusals
from benchmarks.load.wire import STATUS, Connection, ConnectionClosed, call_head
from benchmarks.report import BenchmarkError
from penchant.v1 import ranking_pb2
from tests.benchmarks.conftest import ITEMS, Stub

RECOMMEND = "/penchant.v1.RankingService/Recommend"


def plan(generator: Generator, moments: list[float], timeout_s: float = 5.0, message: bytes = b"") -> CallPlan:
    head = generator.head(RECOMMEND, timeout_s)
    count = len(moments)
    return CallPlan(
        np.array(moments), [head] * count, [message] * count, np.zeros(count, np.int8), ["recommend"], timeout_s
    )


def test_the_examples_of_the_standard_are_read() -> None:
    # RFC 7541, appendix C.6.1, whose texts are Huffman coded.
    block = bytes.fromhex(
        "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3"
    )
    assert hpack.decode(block) == {
        ":status": "302",
        "cache-control": "private",
        "date": "Mon, 21 Oct 2013 20:13:21 GMT",
        "location": "https://www.example.com",
    }
    assert hpack.decode(bytes.fromhex("88")) == {":status": "200"}


TEXT = st.text(st.characters(codec="ascii", categories=("L", "N", "P")), max_size=300)


@given(st.dictionaries(TEXT, TEXT, max_size=5))
def test_headers_come_back_as_they_were_written(headers: dict[str, str]) -> None:
    assert hpack.decode(hpack.encode(headers.items())) == headers


@given(st.binary(max_size=60))
def test_a_broken_block_is_refused_and_nothing_else_happens(block: bytes) -> None:
    with contextlib.suppress(hpack.HeaderError):
        assert all(isinstance(name, str) for name in hpack.decode(block))


def test_calls_start_at_their_moments_and_are_timed_from_them(stub: Stub) -> None:
    # One call stalls the service; those that were due meanwhile must be charged for their wait.
    stalls = iter([0.3])
    gate = threading.Lock()

    def delay() -> float:
        with gate:
            time.sleep(next(stalls, 0.0))
        return 0.0

    stub.delay_s = delay
    with Generator(stub.target, 2) as generator:
        window = generator.open_loop(plan(generator, [0.02 * number for number in range(20)]))
    assert window.answered.all()
    assert window.errors() == {}
    # The stall lasts until 300 ms after the first call at least, and nothing is answered before its end: each call that
    # was due meanwhile is charged for the whole wait. A closed loop would have made one call in that time.
    assert (window.latencies_ms()[:10] >= 300 - 20 * np.arange(10)).all()
    slate = ranking_pb2.RecommendResponse.FromString(window.answers[0]).slate
    assert slate.rung


def test_errors_are_told_by_status_and_hint(stub: Stub) -> None:
    count = iter(range(100))
    stub.refuse = lambda: next(count) % 2 == 0
    with Generator(stub.target, 1) as generator:
        window = generator.open_loop(plan(generator, [0.01 * number for number in range(10)]))
        assert window.errors() == {"RESOURCE_EXHAUSTED": 5}
        assert refusals(window) == {"RESOURCE_EXHAUSTED": {"calls": 5, "with_hint": 5}}
        stub.refuse = lambda: True
        with pytest.raises(CallFailed, match="too many calls"):
            generator.call(RECOMMEND, b"")


def test_a_call_past_its_deadline_is_an_error_and_ends(stub: Stub) -> None:
    late = threading.Event()
    stub.delay_s = lambda: float(not late.wait(60))
    try:
        with Generator(stub.target, 1) as generator:
            window = generator.open_loop(plan(generator, [0.0], timeout_s=0.1))
            assert window.errors() == {"DEADLINE_EXCEEDED": 1}
            assert window.latency_s[0] >= 0.1
            stub.delay_s = lambda: 0.0
            assert generator.call(RECOMMEND, b"")  # the connection still serves
    finally:
        late.set()


def test_a_service_that_falls_behind_ends_the_window(stub: Stub) -> None:
    stub.delay_s = lambda: 0.2
    with Generator(stub.target, 4) as generator:
        window = generator.open_loop(plan(generator, list(np.arange(1, 2001) / 500), timeout_s=30.0))
    assert window.gave_up
    assert 0 < window.sent.sum() < 2000


def test_messages_larger_than_the_windows_arrive_whole(stub: Stub) -> None:
    # 65,535 bytes is all that a server takes before it says otherwise, and 16,384 the largest frame.
    options = ranking_pb2.RankingOptions(page_size=7, exclude_item_ids=[f"{number:0400}" for number in range(500)])
    message = ranking_pb2.RecommendRequest(options=options).SerializeToString()
    assert len(message) > 150_000
    with Generator(stub.target, 1) as generator:
        window = generator.open_loop(plan(generator, [0.0, 0.0, 0.001], message=message))
    assert window.answered.all()
    sent = [body for path, body, _ in stub.seen if path == RECOMMEND]
    assert sent == [message] * 3
    slate = ranking_pb2.RecommendResponse.FromString(window.answers[0]).slate
    assert [item.item_id for item in slate.items] == ITEMS[:7]


def test_more_calls_than_a_connection_takes_wait_their_turn() -> None:
    entered = threading.Semaphore(0)

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            def answer(message: bytes, context: grpc.ServicerContext) -> bytes:
                entered.release()
                time.sleep(0.05)
                return message

            return grpc.unary_unary_rpc_method_handler(answer)

    from concurrent.futures import ThreadPoolExecutor

    # Without gRPC's protection, which counts calls that are over and not freed yet, and refuses others for them.
    options = [("grpc.max_concurrent_streams", 2), ("grpc.http.overload_protection", 0)]
    server = grpc.server(ThreadPoolExecutor(8), handlers=[Handler()], options=options)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Generator(f"127.0.0.1:{port}", 1) as generator:
            window = generator.open_loop(plan(generator, [0.0] * 6, message=b"x"))
        assert window.answered.all()
        # Two at a time: the last pair waited for two others.
        assert np.sort(window.latency_s)[-1] > 0.12
    finally:
        server.stop(0).wait()


def test_a_connection_that_ends_is_replaced_and_its_calls_are_counted(stub: Stub) -> None:
    with Generator(stub.target, 2) as generator:
        assert generator.call(RECOMMEND, b"", connection=0)
        generator._connections[0].socket.shutdown(socket.SHUT_RDWR)
        window = generator.open_loop(plan(generator, [0.05 * number for number in range(8)]))
    # A call on the dead connection may be lost; none after it is.
    assert window.answered.sum() >= 7
    assert set(window.errors()) <= {"UNAVAILABLE"}


def test_a_service_that_is_not_there_says_what_to_do() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ConnectionClosed, match="penchant serve"):
        Generator(target)
    with pytest.raises(BenchmarkError, match="HOST:PORT"):
        Generator("nonsense")


def test_the_raw_connection_hears_what_grpc_says(stub: Stub) -> None:
    answers = []
    connection = Connection(stub.target, lambda *answer: answers.append(answer))
    head = call_head("/no.such.Service/Check", stub.target, 1.0, (("x-test", "1"),))
    connection.call(head, b"", 7)
    end = time.monotonic() + 60
    while not answers and time.monotonic() < end:
        connection.receive()
        time.sleep(0.002)
    key, status, _, _ = answers[0]
    assert (key, STATUS[status]) == (7, "OK")
    assert stub.seen[-1][2]["x-test"] == "1"
    connection.close()


def test_a_percentile_is_a_latency_that_some_call_had() -> None:
    values = np.arange(1.0, 1001.0)
    figures = latency_ms(values)
    assert {figures["p50"], figures["p99"], figures["p99.9"]} <= set(values)
    assert figures["p99"] == 991.0
    assert latency_ms(np.array([])) == {}


def test_the_processes_of_a_target_are_found(stub: Stub) -> None:
    tree = ProcessTree.listening_at(stub.target)
    assert tree is not None
    assert tree.pid == os.getpid()
    before = tree.usage()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    used = tree.usage() - before
    assert used.service_s > 0.1
    assert tree.rss_bytes() > 10 << 20
    assert sum(tree.proportional_bytes().values()) > 10 << 20
    assert ProcessTree.listening_at("192.0.2.1:50051") is None
