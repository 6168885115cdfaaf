"""Slots are few, released while waiting, and taken again; work that waits is known by its time."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.concurrency import ConcurrencyLimit
from tests.serving.faults import wait_until


def test_a_call_that_waits_lets_others_go_first():
    limit, order = ConcurrencyLimit(1), []

    def other() -> None:
        with limit:
            order.append("other")

    with limit:
        order.append("first")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.1)
        assert order == ["first"]
        assert limit.waiting == 1
        with limit.released():
            thread.join(5)
        order.append("first again")
    assert order == ["first", "other", "first again"]
    assert limit.waiting == 0


def test_a_slot_is_taken_again_and_released_whatever_happens():
    limit = ConcurrencyLimit(1)
    with pytest.raises(KeyError), limit, limit.released():
        raise KeyError
    with limit:
        pass


def test_without_a_slot_there_is_nothing_to_release():
    limit = ConcurrencyLimit(1)
    with limit.released(), limit:
        pass


class Held:
    """A limit of one slot that work holds until it is let go; `order` is what ran afterwards."""

    def __init__(self) -> None:
        self.limit, self.go, self.order = ConcurrencyLimit(1), threading.Event(), list[str]()
        self.limit.submit(lambda: self.go.wait(20))

    def submit(self, name: str, *, batch: bool = False) -> None:
        self.limit.submit(lambda: self.order.append(name), batch=batch)

    def end(self) -> list[str]:
        """Lets all go and returns the order in which they ran."""
        count = self.limit.waiting
        self.go.set()
        wait_until(lambda: len(self.order) == count)
        return self.order


def test_work_runs_in_its_order_and_batches_behind_all_other_work():
    held = Held()
    for name in ("batch 1", "a", "batch 2", "b"):
        held.submit(name, batch=name.startswith("batch"))
    assert held.limit.waiting == 4
    assert held.limit.waiting_batch == 2
    assert held.end() == ["a", "b", "batch 1", "batch 2"]


def test_callers_take_turns_and_one_with_little_work_waits_for_little_of_the_others():
    held = Held()
    for _ in range(16):
        held.limit._note("work", 0.02)
    for number in range(5):
        held.limit.submit(lambda number=number: held.order.append(f"greedy {number}"), "work", "greedy")
    for number in range(2):
        held.limit.submit(lambda number=number: held.order.append(f"modest {number}"), "work", "modest")
    running_s = 0.02 / 2
    assert held.limit.expected_wait_s("new") == pytest.approx(running_s + 2 * 0.02)
    assert held.limit.expected_wait_s("modest") == pytest.approx(running_s + 5 * 0.02)
    assert held.limit.expected_wait_s("greedy") == pytest.approx(running_s + 7 * 0.02)
    expected = ["greedy 0", "modest 0", "greedy 1", "modest 1", "greedy 2", "greedy 3", "greedy 4"]
    assert held.end() == expected


def test_work_that_fails_keeps_no_slot(caplog):
    held = Held()
    held.limit.submit(lambda: [][0], "odd")
    held.submit("next")
    held.go.set()
    wait_until(lambda: held.order == ["next"])
    assert "IndexError" in caplog.text


def test_one_thread_does_all_the_work_of_one_slot():
    limit, threads = ConcurrencyLimit(1), set[int]()
    for _ in range(50):
        limit.submit(lambda: threads.add(threading.get_ident()))
        wait_until(lambda: limit._free == 1)
    assert len(threads) == 1


def test_after_the_end_nothing_begins_and_the_threads_are_gone():
    before = set(threading.enumerate())
    held = Held()
    held.submit("never")
    held.limit.shutdown()
    held.go.set()
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert held.order == []


def test_the_expected_wait_is_that_of_the_work_before():
    limit, work_s = ConcurrencyLimit(2), 0.02
    for _ in range(20):
        limit.submit(lambda: time.sleep(work_s), "work")
    wait_until(lambda: limit._free == 2)
    assert limit.expected_s("other") == 0
    assert limit.expected_wait_s() == 0
    go = threading.Event()
    for _ in range(2):
        limit.submit(lambda: go.wait(20), "held")
    for _ in range(10):
        limit.submit(lambda: time.sleep(work_s), "work")
        limit.submit(lambda: time.sleep(work_s), "work", batch=True)
    mean_s = limit.expected_s("work")
    assert mean_s >= work_s
    # Ten of each on two slots, and what is left of the two in progress.
    assert limit.expected_wait_s() == pytest.approx(mean_s * (5 + 1 / 3))
    assert limit.expected_wait_s(batch=True) == pytest.approx(mean_s * (10 + 1 / 3))
    go.set()
    wait_until(lambda: limit._free == 2)
    assert limit.expected_wait_s() == 0
    assert (limit._first.seconds, limit._batch.seconds) == (0, 0)


def test_a_stall_passes_for_no_slow_work_and_slower_work_is_learnt():
    limit = ConcurrencyLimit(1)
    for _ in range(50):
        limit._note("work", 0.002)
    limit._note("work", 1.0)
    assert limit.expected_s("work") < 0.003
    for _ in range(100):
        limit._note("work", 0.02)
    assert limit.expected_s("work") == pytest.approx(0.02, rel=0.05)


def test_time_without_a_slot_is_no_time_of_the_work():
    limit = ConcurrencyLimit(1)

    def waits() -> None:
        with limit.released():
            time.sleep(0.02)

    for _ in range(16):
        limit.submit(waits, "waits")
        wait_until(lambda: limit._free == 1)
    wait_until(lambda: limit.expected_s("waits"))
    assert limit.expected_s("waits") < 0.01


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 3),
    works=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=30),
)
def test_all_work_is_done_once_by_no_more_at_a_time_than_there_are_slots(count, works):
    """However work comes, waits and fails, none is lost, and in the end every slot is free."""
    limit, lock, done = ConcurrencyLimit(count), threading.Lock(), list[int]()
    running = most = 0

    def enter(step: int) -> None:
        nonlocal running, most
        with lock:
            running += step
            most = max(most, running)

    def work(number: int, waits: bool, fails: bool) -> None:
        enter(1)
        if waits:
            enter(-1)
            with limit.released():
                time.sleep(0.0005)
            enter(1)
        enter(-1)
        with lock:
            done.append(number)
        if fails:
            raise KeyError(number)

    for number, (batch, waits, fails) in enumerate(works):
        limit.submit(lambda number=number, waits=waits, fails=fails: work(number, waits, fails), batch=batch)
    wait_until(lambda: len(done) == len(works) and limit._free == count)
    assert sorted(done) == list(range(len(works)))
    assert most <= count
    assert limit.waiting == 0
    limit.shutdown()
