"""The reading proof in short, and its controls; `make prove-reading` makes it at full size."""

from __future__ import annotations

import pytest

from tests.proofs.reading import FAULTS, Proof, prove


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return prove(tmp_path_factory.mktemp("tables"), files=230, number=2)


def test_tables_in_every_form_are_read_as_other_libraries_read_them(proof: Proof):
    assert proof.differences == []
    assert proof.tally["refused tables"] > 0
    assert proof.tally["streamed tables"] > 0
    assert proof.tally["unread cells"] > 0
    assert proof.tally["rejected rows"] > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_reading_fault_is_found(proof: Proof, fault: str):
    """The controls: a reader with this fault differs from the oracle on one of the tables."""
    assert proof.finds(fault)
