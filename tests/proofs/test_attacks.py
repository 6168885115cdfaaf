"""The quick version of `tests.proofs.attacks`: many attacks at once, and a server without bounds as the control."""

from __future__ import annotations

import pytest

from tests.proofs import attacks

SECONDS = 5.0


@pytest.fixture(scope="module")
def bounded():
    with attacks.bare() as target:
        yield target


@pytest.mark.parametrize(
    "names",
    [
        ["open health checks", "open watches", "open calls", "open streams", "open reflections"],
        ["slow bytes", "messages without their end"],
        ["unread lists", "unread watches"],
        ["headers that are no text"],
    ],
    ids=["calls that send nothing", "messages that hang", "answers that hang", "headers that are no text"],
)
def test_good_calls_are_answered_under_attack_and_nothing_is_left(bounded, names):
    outcome = attacks.attack_all(bounded, names, 2, SECONDS, settle_s=20.0)
    assert outcome.failures() == []
    assert sum(outcome.good.values()) > 3
    assert outcome.attacker["ended"] > 0


def test_the_proof_finds_a_server_without_bounds(monkeypatch):
    monkeypatch.setattr(attacks, "DEADLINE_S", 1.0)
    with attacks.bare("--unbounded") as target:
        outcome = attacks.attack(target, "open calls", 2, SECONDS, settle_s=0.0)
    assert any("good calls" in failure for failure in outcome.failures())
