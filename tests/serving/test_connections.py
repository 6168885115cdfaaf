"""Where connections lead, how they move, and that nobody who connects is lost: real servers on one port."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from penchant.client import Client
from penchant.connections import Connections
from penchant.v1 import catalog_pb2_grpc, event_pb2_grpc, profile_pb2_grpc, ranking_pb2, ranking_pb2_grpc
from serving.concurrency import ConcurrencyLimit
from serving.config import ServeConfig
from serving.observability.telemetry import Telemetry
from serving.processes.listen_sockets import stop_listening
from serving.services.server import Server, Services
from tests.proofs.rolls import Load, plain, plain_channel
from tests.serving.faults import wait_until

AGE_S = 1.0


class Ranking(ranking_pb2_grpc.RankingServiceServicer):
    """Counts its calls, by connection."""

    def __init__(self) -> None:
        self.peers = Counter[str]()
        self.work_s = 0.0

    def Recommend(self, request, context):
        self.peers[context.peer()] += 1
        time.sleep(self.work_s)
        return ranking_pb2.RecommendResponse()


class Worker:
    """A server of nothing but a count."""

    def __init__(self, target: str, **settings) -> None:
        config = ServeConfig.load(bundle="none", listen=target, **{"workers": 2, "drain_s": 5, **settings})
        self.ranking, self.server = Ranking(), Server(config, ConcurrencyLimit(config.threads), Telemetry())
        others = (
            event_pb2_grpc.EventServiceServicer(),
            profile_pb2_grpc.ProfileServiceServicer(),
            catalog_pb2_grpc.CatalogServiceServicer(),
        )
        self.server.start(target, Services(self.ranking, *others))

    @property
    def calls(self) -> int:
        return sum(self.ranking.peers.values())


@contextlib.contextmanager
def workers(count: int = 2, **settings) -> Iterator[tuple[str, list[Worker]]]:
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        keeper.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{keeper.getsockname()[1]}"
        running = [Worker(target, **settings) for _ in range(count)]
        try:
            yield target, running
        finally:
            for worker in running:
                worker.server.stop()


def asked(call, seconds: float) -> None:
    """Calls for some seconds; an error is the test's."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        call(number)
        number += 1
        time.sleep(0.02)


class ReadyChannel:
    """A channel that is always ready, and has the answer to a question before it can be waited for."""

    def __init__(self, worker: str) -> None:
        self._channel = self
        self.worker, self.closed = worker, False

    def check_connectivity_state(self, _: bool) -> int:
        return 2

    def unary_unary(self, *_, **__) -> ReadyChannel:
        return self

    unary_stream = unary_unary

    def future(self, *_, **__) -> ReadyChannel:
        assert not self.closed
        return self

    def add_done_callback(self, done) -> None:
        done(self)

    def cancelled(self) -> bool:
        return False

    def initial_metadata(self):
        return (("x-worker", self.worker), ("x-workers", "2"))

    def close(self) -> None:
        self.closed = True


def test_a_connection_that_a_look_replaces_is_not_taken():
    channels = [ReadyChannel("first"), ReadyChannel("first"), ReadyChannel("second")]
    connections = Connections(channels.__getitem__, lambda channel: channel, 2)
    connections._places[1].worker = "first"  # so the first place, asked in this call, wants another worker
    assert connections.take().channel.closed is False
    assert [channel.closed for channel in channels] == [True, False, False]


class TestReachingEveryWorker:
    def test_sixteen_default_clients_share_two_workers_and_no_call_fails_as_connections_age(self):
        with workers(max_connection_age_s=AGE_S) as (target, running), ThreadPoolExecutor(16) as pool:
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(Client(target, timeout_s=10.0)) for _ in range(16)]
                # Connections end and are made all the time: every call must be answered none the less.
                calls = [
                    pool.submit(asked, lambda _, client=client: client.recommend(user_id="u"), 3) for client in clients
                ]
                for call in calls:
                    call.result()
            shares = [worker.calls / sum(each.calls for each in running) for worker in running]
            assert all(0.35 < share < 0.65 for share in shares), shares
            # They did age: more connections than the clients ever have at once.
            assert sum(len(worker.ranking.peers) for worker in running) > 2 * 2 * 16

    def test_a_client_reaches_two_workers_where_chance_alone_would_reach_one(self):
        with workers() as (target, running):
            for _ in range(8):
                before = [worker.calls for worker in running]
                with Client(target, timeout_s=10.0) as client:
                    client.wait_ready(20.0)

                    def reached_both(client: Client = client, before: list[int] = before) -> bool:
                        client.recommend(user_id="u")
                        return all(worker.calls > old for worker, old in zip(running, before, strict=True))

                    wait_until(reached_both)

    def test_plain_channels_move_and_none_of_their_calls_fails(self):
        with workers(max_connection_age_s=AGE_S) as (target, running), ThreadPoolExecutor(8) as pool:
            with contextlib.ExitStack() as stack:
                channels = [stack.enter_context(plain_channel(target, policy="{}")) for _ in range(8)]
                calls = [pool.submit(asked, plain(channel, 10.0), 4 * AGE_S) for channel in channels]
                for call in calls:
                    call.result()
            assert all(worker.calls for worker in running)
            assert sum(len(worker.ranking.peers) for worker in running) >= 2 * 8  # each was made again, and more often

    def test_without_an_age_a_connection_stays(self):
        with workers(max_connection_age_s=0) as (target, running), plain_channel(target) as channel:
            asked(plain(channel, 10.0), 1.5)
            assert sum(len(worker.ranking.peers) for worker in running) == 1

    def test_a_client_takes_the_connection_that_stands(self):
        """A third of the attempts to connect hang, as at a socket about to close, and no call waits for them."""
        # As gRPC listens: the kernel prefers sockets of IPv4 alone.
        with workers() as (target, running), socket.socket(socket.AF_INET6) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            host, _, port = target.rpartition(":")
            deaf.bind((f"::ffff:{host}", int(port)))
            deaf.listen(0)
            full = [socket.socket() for _ in range(64)]
            for filler in full:  # its queue is full: the kernel answers no more connections to it
                filler.setblocking(False)
                filler.connect_ex((host, int(port)))
            try:
                slowest = 0.0
                for _ in range(6):
                    with Client(target, timeout_s=10.0) as client:
                        for _ in range(3):
                            begun = time.monotonic()
                            client.recommend(user_id="u")
                            slowest = max(slowest, time.monotonic() - begun)
                assert slowest < 9.0
                assert sum(worker.calls for worker in running) == 18
            finally:
                for filler in full:
                    filler.close()


class TestStopping:
    @staticmethod
    def codes(call_of) -> dict[str, int]:
        """Returns the failures while three of four workers stop, always the one that has most calls in hand."""
        with workers(4, drain_s=0) as (target, running), call_of(target) as call, Load(call, 200.0, 8) as load:
            for worker in running:
                worker.ranking.work_s = 0.03
            for _ in range(3):
                before = {worker: worker.calls for worker in running}
                time.sleep(0.3)
                busiest = max(running, key=lambda worker: worker.calls - before[worker])
                busiest.server.stop()
                running.remove(busiest)
            time.sleep(0.3)
        return load.codes()

    def test_a_client_loses_no_call_to_servers_that_cut_them_off(self):
        @contextlib.contextmanager
        def ours(target):
            with Client(target, timeout_s=10.0) as client:
                yield lambda _: client.recommend(user_id="u")

        @contextlib.contextmanager
        def with_the_policy_of_the_docs(target):
            with plain_channel(target) as channel:
                yield plain(channel, 10.0)

        assert self.codes(ours) == {}
        assert self.codes(with_the_policy_of_the_docs) == {}

    def test_without_a_retry_and_a_drain_calls_are_lost(self):
        """The control: what the load above would see."""

        @contextlib.contextmanager
        def nobody_tries_again(target):
            with plain_channel(target, "") as channel:
                yield plain(channel, 10.0)

        assert self.codes(nobody_tries_again)


class TestStoppingToListen:
    @staticmethod
    def lost(stop, rounds: int = 12) -> int:
        """Returns how many connections were reset while one of two sockets stopped, over some rounds."""
        resets = 0
        for _ in range(rounds):
            with socket.socket() as stays, socket.socket() as ends:
                for listening in (stays, ends):
                    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                    listening.bind(stays.getsockname() if listening is ends else ("127.0.0.1", 0))
                    listening.listen(128)
                port = stays.getsockname()[1]
                done = threading.Event()

                def accept(listening: socket.socket, done: threading.Event = done) -> None:
                    listening.settimeout(0.05)
                    while not done.is_set():
                        time.sleep(random.uniform(0, 0.004))  # a server that is busy with something else
                        with contextlib.suppress(OSError):
                            accepted, _ = listening.accept()
                            with accepted:
                                accepted.sendall(b"welcome")

                accepting = [threading.Thread(target=accept, args=(each,)) for each in (stays, ends)]
                for thread in accepting:
                    thread.start()
                with ThreadPoolExecutor(4) as pool:
                    calls = [pool.submit(TestStoppingToListen.call, port) for _ in range(40)]
                    time.sleep(0.02)
                    stop(ends, port)
                    resets += sum(not call.result() for call in calls)
                done.set()
                for thread in accepting:
                    thread.join()
        return resets

    @staticmethod
    def call(port: int) -> bool:
        """Connects and reads; False where the connection was reset."""
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as caller:
                return caller.recv(16) == b"welcome"
        except ConnectionError:
            return False
        finally:
            time.sleep(random.uniform(0, 0.002))

    def test_nobody_who_connects_is_lost(self, monkeypatch):
        def stop(ends: socket.socket, port: int) -> None:
            monkeypatch.setattr(
                "serving.processes.listen_sockets._listens", lambda found, _: found.fileno() and same(found, ends)
            )
            assert stop_listening(port) == 1

        assert self.lost(stop, rounds=4) == 0

    def test_a_socket_that_is_just_closed_loses_some(self):
        assert self.lost(lambda ends, _: ends.shutdown(socket.SHUT_RDWR)) > 0

    def test_calls_on_connections_that_are_there_go_on(self):
        with workers(1) as (target, _), Client(target, timeout_s=10.0) as client:
            client.recommend(user_id="u")
            assert stop_listening(int(target.rpartition(":")[2])) == 1
            client.recommend(user_id="u")
            with plain_channel(target, "") as late, pytest.raises(grpc.RpcError) as refused:
                plain(late)(1)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def same(one: socket.socket, other: socket.socket) -> bool:
    """Whether two descriptors are of one socket."""
    return os.fstat(one.fileno()).st_ino == os.fstat(other.fileno()).st_ino
