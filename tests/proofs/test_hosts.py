"""The proof of several hosts in short; `make prove-hosts` makes it at full size, with its control."""

from __future__ import annotations

import pytest

from tests.proofs.hosts import held, hosts


@pytest.mark.timeout(900)
def test_two_hosts_have_one_warehouse_and_erase_from_both():
    said = hosts(2, kills=1, rate=100.0, canaries=4, pause_s=0.5, purge_s=1.0)
    assert said["erased"] == 4
    assert said["acknowledged"] > 0
    assert held(said), said


def test_the_judge_sees_each_fault():
    whole = {"lost": {"log": 0}, "doubled": {"log": 0}, "early": 0, "left": 0, "warehouses": 1, "split": False}
    assert held(whole)
    faults = [
        {"lost": {"log": 1}},
        {"doubled": {"log": 1}},
        {"early": 1},
        {"left": 1},
        {"warehouses": 2},
        {"split": True},
    ]
    assert not any(held(whole | fault) for fault in faults)
