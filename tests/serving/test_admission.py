"""Rankings that would be late are refused at once, batches first; without the admission they are late."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.client import Client
from serving.concurrency import ConcurrencyLimit
from serving.errors import BatchDeferred, Overloaded
from serving.services.reception import admission
from serving.services.reception.admission import AdmissionControl
from tests.serving.faults import wait_until
from tests.serving.test_server import Running

WORK_S = 0.02


class Busy:
    """A limit of one slot that is held, and knows that work takes `WORK_S`."""

    def __init__(self, wait_s: float = 0.05, places: int = 1000) -> None:
        self.limit, self.go = ConcurrencyLimit(1), threading.Event()
        for _ in range(16):
            self.limit._note("work", WORK_S)
        self.control = AdmissionControl(self.limit, wait_s, places)
        self.limit.submit(lambda: self.go.wait(20))

    def queue(self, count: int, *, batch: bool = False) -> None:
        for _ in range(count):
            self.limit.submit(lambda: None, "work", batch=batch)

    def refusal(self, left_s: float = 60.0, *, batch: bool = False):
        return type(self.control.refusal("work", left_s, batch=batch))

    def stand(self) -> None:
        """Makes the queue one that has stood for long."""
        self.limit._eased_at -= admission.STANDING_S


@pytest.fixture
def busy():
    held = Busy()
    yield held
    held.go.set()


def test_what_its_deadline_does_not_allow_is_refused_and_nothing_else(busy):
    busy.queue(9)  # 0.18 s, half of the work in progress, and its own time
    assert busy.refusal(0.2) is Overloaded
    assert busy.refusal(0.4) is type(None)


def test_a_burst_may_wait_and_a_queue_that_stands_may_not(busy):
    busy.queue(20)
    assert busy.refusal() is type(None)
    busy.stand()
    assert busy.refusal() is Overloaded  # sixteen rankings at most
    busy.control = AdmissionControl(busy.limit, 1.0, 1000)
    assert busy.refusal() is type(None)
    busy.queue(200)
    assert busy.refusal() is Overloaded


def test_a_caller_with_few_rankings_is_taken_where_one_with_many_is_not(busy):
    for _ in range(40):
        busy.limit.submit(lambda: None, "work", "greedy")
    busy.stand()
    assert type(busy.control.refusal("work", 60.0, "greedy")) is Overloaded
    assert busy.control.refusal("work", 0.1, "modest") is None
    assert type(busy.control.refusal("work", 0.04, "modest")) is Overloaded


def test_batches_give_way_before_others_are_refused(busy):
    busy.queue(7, batch=True)
    assert (busy.refusal(), busy.refusal(batch=True)) == (type(None), type(None))
    busy.queue(2, batch=True)
    assert (busy.refusal(), busy.refusal(batch=True)) == (type(None), BatchDeferred)


def test_where_others_stand_no_batch_is_taken(busy):
    busy.queue(2)
    assert busy.refusal(batch=True) is type(None)
    busy.stand()
    assert (busy.refusal(), busy.refusal(batch=True)) == (type(None), BatchDeferred)


def test_batches_take_half_of_the_places():
    held = Busy(wait_s=60.0, places=8)
    held.queue(4, batch=True)
    assert held.refusal(batch=True) is BatchDeferred
    held.go.set()


def test_without_it_all_is_taken(busy):
    busy.control.enabled = False
    busy.queue(1000)
    busy.stand()
    assert busy.refusal(0.001, batch=True) is type(None)


def test_a_worker_that_has_a_slot_free_refuses_nothing():
    control = AdmissionControl(ConcurrencyLimit(1), 0.05, 10)
    assert control.refusal("work", 0.0) is None


@given(queued=st.integers(0, 300), left_s=st.floats(0.001, 10), standing=st.booleans(), batch=st.booleans())
def test_what_is_taken_fits_its_time_and_a_refusal_says_when_to_come_back(queued, left_s, standing, batch):
    held = Busy()
    held.queue(queued)
    if standing:
        held.stand()
    error = held.control.refusal("work", left_s, batch=batch)
    wait_s = held.limit.expected_wait_s(batch=batch)
    held.go.set()
    held.limit.shutdown()
    if error is None:
        assert wait_s + WORK_S < left_s
        return
    assert isinstance(error, BatchDeferred if batch else Overloaded)
    assert max(min(wait_s * 1000, 2000), 100) <= error.retry_after_ms <= 2000


def asked(client: Client, calls: int, timeout_s: float) -> tuple[list[str], list[float]]:
    """Sends searches of 20 ms at once; their codes, and how long each took that was told when to try again."""
    took: list[float] = []

    def ask(_: int) -> str:
        begun = time.monotonic()
        try:
            client.search(str(WORK_S), timeout_s=timeout_s)
        except grpc.RpcError as error:
            if any(name == "grpc-retry-pushback-ms" for name, _ in error.trailing_metadata()):
                took.append(time.monotonic() - begun)
            return error.code().name
        return "OK"

    with ThreadPoolExecutor(calls) as pool:
        return list(pool.map(ask, range(calls))), took


@pytest.mark.parametrize("on", [True, False])
def test_of_too_many_calls_those_are_refused_at_once_that_would_be_late(on):
    """Forty calls of 20 ms with half a second of time: some twenty can be answered, and without admission all wait."""
    with Running(threads=1, admission=on) as server, Client(server.target, channels=4) as client:
        client.wait_ready()
        asked(client, 1, 10.0)
        assert asked(client, 20, 10.0)[0] == ["OK"] * 20
        codes, took = asked(client, 40, 0.5)
        assert codes.count("OK") >= 5
        if not on:
            assert "RESOURCE_EXHAUSTED" not in codes
            assert "DEADLINE_EXCEEDED" in codes
            return
        assert "RESOURCE_EXHAUSTED" in codes
        assert len(took) == codes.count("RESOURCE_EXHAUSTED")
        assert sorted(took)[len(took) // 2] < 0.25  # long before the end of its time
        assert server.telemetry.counters()["requests_refused.overload"] == codes.count("RESOURCE_EXHAUSTED")


def test_batches_are_refused_while_interactive_calls_are_answered():
    with (
        Running(threads=1) as server,
        Client(server.target, channels=2, batch=True) as batch,
        Client(server.target, channels=2) as client,
    ):
        for one in (client, batch):
            one.wait_ready()
        assert asked(client, 20, 10.0)[0] == ["OK"] * 20
        with ThreadPoolExecutor(1) as pool:
            shed = pool.submit(asked, batch, 60, 10.0)
            wait_until(lambda: server.in_hand()[1] >= 2)
            answered = [asked(client, 2, 10.0)[0] for _ in range(3)]
            codes, _ = shed.result()
        assert answered == [["OK"] * 2] * 3
        assert "RESOURCE_EXHAUSTED" in codes
        assert server.telemetry.counters()["requests_refused.batch"] == codes.count("RESOURCE_EXHAUSTED")
