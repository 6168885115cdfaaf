"""Slots are few, released while waiting, and taken again."""

from __future__ import annotations

import threading

import pytest

from serving.concurrency import ConcurrencyLimit


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
