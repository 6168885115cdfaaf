"""The quick version of `tests.proofs.pages`: full pages over generated users, catalogues and requests; controls."""

from __future__ import annotations

import os

import pytest

from penchant.client import event
from penchant.v1 import catalog_pb2, common_pb2
from serving.redis.client import connect
from serving.stores.profiles import ProfileStore
from tests import world as small
from tests.proofs import pages
from tests.proofs.page_world import item_of, publish_items
from tests.serving.inside import inside

EXAMPLES = int(os.environ.get("PAGES", "60"))


@pytest.fixture(scope="module")
def proof(profiles_server, tmp_path_factory):
    with connect(profiles_server.url, timeout_s=5.0) as client:
        client.flushall()
        yield pages.Proof(tmp_path_factory.mktemp("pages"), ProfileStore(client, 16))


@pytest.fixture
def urls(profiles_server, events_server):
    return profiles_server.url, events_server.url


def test_the_page_is_full_whenever_enough_is_eligible(proof):
    pages.run(proof, EXAMPLES)
    for method in ("recommend", "search", "similar", "rank"):
        assert min(proof.tally.pages[f"{method} {how}"] for how in ("full", "short", "empty")) > 0


@pytest.mark.parametrize("name", pages.CONTROLS)
def test_the_proof_finds(proof, name):
    with pages.planted(name), pytest.raises(AssertionError):
        pages.run(proof, 100, control=True)


class TestThroughTheService:
    """Two cases as users met them, through a real worker: gRPC on loopback, both Redis, the catalogue's log."""

    def ids(self, slate):
        return [item.item_id for item in slate.items]

    def test_a_user_mutes_the_category_that_they_like_most(self, profiles_redis, events_redis, tmp_path, urls):
        """4,000 items, 500 candidates, 1,000 of them muted, all of the user's neighbourhood among those."""
        publish_items(tmp_path / "bundle", 4000)
        with inside(tmp_path / "bundle", *urls, redis_timeout_ms=5000) as service, service.client() as client:
            client.wait_ready()
            western = [item_of(number)["item_id"] for number in range(0, 4000, 4)]
            client.ingest([event("ann", name, "like") for name in western[:20]])
            assert set(self.ids(client.recommend(user_id="ann", page_size=10))) < set(western)
            client.set_controls([("category", "western", 0)], "ann")
            for personal in (True, False):
                options = {"user_id": "ann", "page_size": 10, "personalize": personal}
                answers = [client.recommend(**options), client.search("western story", **options)]
                answers.append(client.similar_items(western[:1], **options))
                for slate in answers:
                    assert len(self.ids(slate)) == len(set(self.ids(slate)) - set(western)) == 10
                    assert slate.dropped["blocked"] == 1000 - (slate is answers[2])
                    assert not slate.degraded
                assert (answers[0].rung == common_pb2.RUNG_SEQUENCE) is personal
            ranked = client.rank([*western[:5], "i1", "i2"], user_id="ann")
            assert (sorted(self.ids(ranked)), ranked.dropped) == (["i1", "i2"], {"blocked": 5})

    @pytest.mark.parametrize("holdout", [0.0, 1.0])
    def test_every_item_of_the_bundle_expired_and_50_new_ones_were_put(
        self, world, profiles_redis, events_redis, urls, holdout
    ):
        with inside(world, *urls, holdout_share=holdout, redis_timeout_ms=5000) as service, service.client() as client:
            client.wait_ready()
            client.ingest([event("ann", "i0", "like"), event("bob", "i1", "like")])
            client.set_consent(["train"], "bob")
            for item in small.items():
                client.put_items([catalog_pb2.Item(item_id=item["item_id"], available_until_ms=1)])
            new = [f"new{number}" for number in range(50)]
            items = [catalog_pb2.Item(item_id=name, title="story", categories=["space"]) for name in new]
            assert client.put_items(items).visible_everywhere
            client.ingest([event(f"reader-{number % 9}", name, "view_item") for number, name in enumerate(new)])
            who = [{"anonymous_id": "visitor"}, {"user_id": "ann"}, {"user_id": "bob"}]
            for options in (*who, {"user_id": "ann", "personalize": False}):
                slate = client.recommend(page_size=20, **options)
                assert len(set(self.ids(slate)) & set(new)) == len(slate.items) == 20
                short = client.recommend(page_size=100, **options)
                assert not short.degraded
                assert set(self.ids(short)) == set(new)
                assert short.dropped == {"eligible": small.COUNT}
            assert len(client.search("story", page_size=20).items) == 20
            assert len(client.similar_items(["new0"], page_size=20).items) == 20
