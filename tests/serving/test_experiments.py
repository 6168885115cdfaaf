"""The holdout: a fair, steady draw by hash."""

from __future__ import annotations

import pytest

from serving.experiments import Assignment, Holdout


def test_nobody_is_held_out_by_default():
    arms = {Holdout(0.0, "s").assign(f"u:{user}").arm for user in range(1000)}
    assert arms == {"treatment"}


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_the_share_is_met(share):
    held = sum(Holdout(share, "s").assign(f"u:{user}").holdout for user in range(20_000))
    assert abs(held / 20_000 - share) <= 4 * (share * (1 - share) / 20_000) ** 0.5


def test_the_draw_is_steady_and_another_salt_draws_again():
    assert Holdout(0.5, "s").assign("u:ann") == Assignment("treatment", False, 5214)
    first = [Holdout(0.5, "s").assign(f"u:{user}").holdout for user in range(1000)]
    second = [Holdout(0.5, "t").assign(f"u:{user}").holdout for user in range(1000)]
    assert 400 < sum(a != b for a, b in zip(first, second, strict=True)) < 600


def test_who_was_held_out_stays_so_when_the_share_grows():
    for user in range(1000):
        assert Holdout(0.1, "s").assign(f"u:{user}").holdout <= Holdout(0.2, "s").assign(f"u:{user}").holdout


def test_nobody_named_is_in_no_arm():
    assert Holdout(1.0, "s").assign("") == Assignment("", False, 0)
