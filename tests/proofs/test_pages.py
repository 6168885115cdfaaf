"""The quick version of `tests.proofs.pages`: full pages over generated users, catalogues and requests; controls."""

from __future__ import annotations

import os

import pytest

from serving.profiles import ProfileStore
from serving.redis_client import connect
from tests.proofs import pages

EXAMPLES = int(os.environ.get("PAGES", "60"))


@pytest.fixture(scope="module")
def proof(profiles_server, tmp_path_factory):
    with connect(profiles_server.url, timeout_s=5.0) as client:
        client.flushall()
        yield pages.Proof(tmp_path_factory.mktemp("pages"), ProfileStore(client, 16))


def test_the_page_is_full_whenever_enough_is_eligible(proof):
    pages.run(proof, EXAMPLES)
    for method in ("recommend", "search", "similar", "rank"):
        assert min(proof.tally.pages[f"{method} {how}"] for how in ("full", "short", "empty")) > 0


@pytest.mark.parametrize("name", pages.CONTROLS)
def test_the_proof_finds(proof, name):
    with pages.planted(name), pytest.raises(AssertionError):
        pages.run(proof, 200, shrink=False)
