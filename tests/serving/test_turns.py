"""Turns are few, given up while waiting, and taken again."""

from __future__ import annotations

import threading

import pytest

from serving.concurrency import ConcurrencyLimit


def test_who_waits_lets_others_go_first():
    turns, order = ConcurrencyLimit(1), []

    def other() -> None:
        with turns:
            order.append("other")

    with turns:
        order.append("first")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.1)
        assert order == ["first"]
        assert turns.waiting == 1
        with turns.released():
            thread.join(5)
        order.append("first again")
    assert order == ["first", "other", "first again"]
    assert turns.waiting == 0


def test_a_turn_is_taken_again_and_ended_whatever_happens():
    turns = ConcurrencyLimit(1)
    with pytest.raises(KeyError), turns, turns.released():
        raise KeyError
    with turns:
        pass


def test_without_a_turn_there_is_nothing_to_give_up():
    turns = ConcurrencyLimit(1)
    with turns.released(), turns:
        pass
