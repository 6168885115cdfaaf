"""The user's dials: each moves the answer its way, on any rung, and a dial that is not turned changes nothing."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.bundle import open_bundle
from features.controls import Dial
from features.keys import event_type_key, item_key, item_keys
from features.records import make_records
from penchant.client import Client, event
from penchant.v1 import common_pb2
from serving.bundle.tables import read_catalog
from serving.config import ServeConfig
from serving.engine.engine import open_engine
from serving.engine.pipelines import Dependencies
from serving.observability.telemetry import Telemetry
from serving.pipeline.adjusters import REACH, DialAdjuster, mix
from serving.pipeline.candidates import Candidates
from serving.pipeline.request import Request, UserState
from serving.pipeline.results import Slate
from serving.stores.catalog_log import CatalogProgress
from serving.stores.profiles import ProfileStore
from tests.fixtures import serving
from tests.world import COUNT, DIM, rows_of

Dials = common_pb2.Dials
STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def running(trained, tmp_path_factory) -> Iterator[Client]:
    state = tmp_path_factory.mktemp("dials")
    with serving(trained / "bundle", state) as service, service.client() as client:
        client.wait_ready()
        yield client


@pytest.fixture(scope="module")
def items(trained):
    rows = pq.read_table(trained / "data" / "items.parquet").to_pylist()
    return {row["item_id"]: row for row in rows}


@pytest.fixture(scope="module")
def people(running, items) -> dict[str, list[str]]:
    rng = np.random.default_rng(3)
    names = {f"person-{number}": rng.choice(sorted(items), 12, replace=False).tolist() for number in range(12)}
    for name, touched in names.items():
        assert {one.code for one in running.ingest([event(name, item, "view_item") for item in touched])} == {0}
    return names


def ids(slate) -> list[str]:
    return [item.item_id for item in slate.items]


def said(slate) -> list[bytes]:
    return [item.SerializeToString(deterministic=True) for item in slate.items]


class TestMix:
    def test_by_hand(self):
        scores, topics = np.array([9, 8, 7, 3, 2], np.float32), np.array([1, 1, 1, 2, 0], np.uint64)
        # 9, then 8 - 2, then the third of its topic at 7 - 4 before the first of another at 3: equals go by place.
        assert mix(scores, topics, 3, np.float32(2)).tolist() == [9, 6, 3, 3, 2]
        assert np.argsort(-mix(scores, topics, 4, np.float32(20)), kind="stable")[:3].tolist() == [0, 3, 4]

    def test_what_has_no_topic_costs_nobody_and_what_sank_stays_sunk(self):
        scores = np.array([3, 2, -np.inf, 1], np.float32)
        assert mix(scores, np.zeros(4, np.uint64), 4, np.float32(9)).tolist() == scores.tolist()
        assert mix(scores, np.ones(4, np.uint64), 4, np.float32(1)).tolist() == [3, 1, -np.inf, -1]

    @given(
        st.lists(st.tuples(st.floats(-9, 9, width=32), st.integers(0, 4)), max_size=40),
        st.integers(1, 12),
        st.floats(0, 9, width=32),
    )
    def test_the_best_by_what_is_left_are_those_that_were_chosen(self, items, count, cost):
        scores = np.array([score for score, _ in items], np.float32)
        topics = np.array([topic for _, topic in items], np.uint64)
        found = mix(scores, topics, count, np.float32(cost))
        chosen, left = [], scores.copy()
        for _ in range(min(count, scores.size)):
            one = max((at for at in range(scores.size) if at not in chosen), key=lambda at: (left[at], -at))
            assert found[one] == left[one]
            chosen.append(one)
            left[(topics == topics[one]) & (topics > 0)] -= np.float32(cost)
        assert (np.diff(found[chosen]) <= 0).all()
        assert all(found[at] <= found[chosen[-1]] for at in range(scores.size) if at not in chosen)


def adjusted(catalog, dials, scores, *, explain=False):
    """The scores of the first items after the dials, and how far each dial moved them."""
    count = len(scores)
    request = Request("r", "u:ann", 0, time.monotonic() + 5, count, dials=dials, explain=explain)
    given = np.array([scores], np.float32)
    candidates = Candidates(np.arange(count, dtype=np.int32), given, ("upstream",))
    return DialAdjuster(catalog).adjust(request, UserState(dials=dials), candidates, given[0])


class TestAdjusted:
    @pytest.fixture
    def catalog(self, world):
        return read_catalog(open_bundle(world))[0]

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize(
        "dials", [{(Dial.CATEGORY_WEIGHT, item_key("western")): 1.0}, {(Dial.DIVERSITY, 0): 1.0}], ids=["up", "mixed"]
    )
    def test_the_largest_scores_are_lifted_and_do_not_sink(self, catalog, dials):
        moved, _ = adjusted(catalog, dials, [3e38, -3e38, 1.0, -np.inf])
        assert moved[0] == moved.max()
        assert np.isfinite(moved[:3]).all()
        assert moved[3] == -np.inf

    def test_a_thousand_dials_move_as_each_alone_does(self, catalog):
        named = {(Dial.CATEGORY_WEIGHT, item_key(f"none{n}")): 1.0 for n in range(900)}
        named |= {(Dial.CATEGORY_WEIGHT, item_key("western")): 0.5, (Dial.CATEGORY_WEIGHT, item_key("space")): -1.0}
        named |= {(Dial.CREATOR_WEIGHT, item_key("c2")): 0.25, (Dial.FRESHNESS, 0): 1.0, (Dial.NOVELTY, 0): -0.5}
        scores = np.linspace(0, 1, 20).astype(np.float32)
        moved, _ = adjusted(catalog, named, scores)
        explained, moves = adjusted(catalog, named, scores, explain=True)
        assert moves.keys() == named.keys()
        np.testing.assert_array_equal(moved, explained)
        np.testing.assert_allclose(moved, scores + np.sum(list(moves.values()), axis=0), atol=1e-5)
        reach = REACH * scores.astype(np.float64).std()
        expected = [reach * {0: 0.5, 1: -1.0}.get(row % 4, 0.0) for row in range(20)]
        both = moves[Dial.CATEGORY_WEIGHT, item_key("western")] + moves[Dial.CATEGORY_WEIGHT, item_key("space")]
        np.testing.assert_allclose(both, expected, atol=1e-6)


class TestStored:
    def test_the_next_answer_of_any_worker_obeys_and_0_takes_it_back(self, client, everywhere, ann):
        client.ingest([event(ann, "i0", "view_item")])
        before = client.recommend(user_id=ann, page_size=20)
        assert ids(before)[0] in rows_of("western")
        wanted = Dials(novelty=0.5, categories={"western": -1, "space": 1})
        version = client.set_controls([("item", "i1", 0)], ann, dials=wanted).profile_version
        for _ in range(8):
            slate = everywhere.recommend(user_id=ann, page_size=9)
            assert set(ids(slate)) == rows_of("space") - {"i1"}
            assert not slate.degraded
        stored = client.get_controls(ann)
        assert (stored.dials, stored.profile_version) == (wanted, version)
        assert [one.id for one in stored.hidden] == ["i1"]
        client.set_controls([], ann, dials=Dials(novelty=0, diversity=0, freshness=0, categories={"western": 0}))
        assert client.get_controls(ann).dials == Dials()
        assert said(client.recommend(user_id=ann, page_size=20)) == said(before)

    @pytest.mark.parametrize("known", [True, False])
    def test_dials_at_0_change_no_bit(self, client, ann, known):
        if known:
            client.ingest([event(ann, "i0", "view_item"), event(ann, "i1", "like")])
        neutral = Dials(novelty=0, diversity=0, freshness=0, categories={"western": 0}, creators={"c1": 0})
        calls = [client.recommend, lambda **options: client.search("story", **options)]
        calls.append(lambda **options: client.rank([f"i{row}" for row in range(20)], **options))
        calls.append(lambda **options: client.similar_items(["i3"], **options))
        for call in calls:
            plain = call(user_id=ann, page_size=20)
            slate = call(user_id=ann, page_size=20, dials=neutral)
            assert said(slate) == said(plain)
            assert slate.rung == plain.rung
            assert "dials" not in {timing.stage for timing in slate.stage_timings}

    def test_those_of_a_request_hold_for_it_alone_each_in_place_of_the_stored_one(self, client, ann):
        client.set_controls([], ann, dials=Dials(categories={"space": 1, "western": -1}))
        stored = ids(client.recommend(user_id=ann, page_size=10))
        assert set(stored) == rows_of("space")
        now = client.recommend(user_id=ann, page_size=10, dials=Dials(categories={"space": -1, "romance": 1}))
        assert not set(ids(now)) & rows_of("space")
        assert not set(ids(now)[:5]) & rows_of("western")
        assert ids(client.recommend(user_id=ann, page_size=10)) == stored
        # The dials of a request hold without a user.
        slate = client.rank([f"i{row}" for row in range(COUNT)], dials=Dials(creators={"c3": 1}), page_size=6)
        assert {int(name[1:]) % 5 for name in ids(slate)} == {3}

    def test_they_go_with_erasure_stay_through_a_reset_and_move_in_a_merge(self, client, ann):
        client.set_controls([], anonymous_id=ann, dials=Dials(novelty=1, freshness=0.5))
        client.set_controls([("item", "i2", 0)], ann, dials=Dials(novelty=-1, categories={"space": 0.5}))
        client.merge_identities(ann, ann)
        assert client.get_controls(ann).dials == Dials(novelty=-1, freshness=0.5, categories={"space": 0.5})
        client.reset_learning(ann)
        assert client.get_controls(ann).dials.freshness == 0.5
        [document] = [one for one in client.export_subject(ann) if one["kind"] == "controls"]
        assert document["dials"] == {"novelty": -1, "freshness": 0.5, "categories": {"space": 0.5}}
        client.erase(ann)
        assert client.get_controls(ann).dials == Dials()
        assert ids(client.recommend(user_id=ann, page_size=5)) == [f"i{row}" for row in range(5)]

    def test_reasons_name_the_dials_that_moved_an_item(self, client, ann):
        client.ingest([event(ann, "i0", "view_item")])
        wanted = Dials(diversity=0.2, categories={"space": 1, "comedy": -0.5}, creators={"c1": 0.1})
        slate = client.recommend(user_id=ann, page_size=COUNT, dials=wanted, explain=True)
        texts = {
            item.item_id: {reason.text: reason.weight for reason in item.reasons if reason.kind == "dial"}
            for item in slate.items
        }
        assert texts["i1"]["you asked for more of space"] > 0
        assert texts["i3"]["you asked for less of comedy"] == pytest.approx(
            -texts["i1"]["you asked for more of space"] / 2
        )
        assert texts["i1"]["you asked for more of c1"] > 0
        assert "you asked for less of comedy" not in texts["i1"]
        assert any(texts[name].get("you asked for a mix of topics", 0) < 0 for name in texts)
        plain = client.recommend(user_id=ann, page_size=COUNT, explain=True)
        assert not any(reason.kind == "dial" for item in plain.items for reason in item.reasons)
        scores = {item.item_id: item.score for item in plain.items}
        for item in slate.items:
            assert item.score == pytest.approx(scores[item.item_id] + sum(texts[item.item_id].values()), abs=1e-4)


class TestWhatAPersonSaid:
    """Blocks, mutes and dials hold wherever the user is named; their history only where it may be used."""

    @pytest.fixture
    def who_said(self, client, ann):
        client.ingest([event(ann, "i0", "view_item")])
        client.set_controls([("category", "western", 0), ("item", "i2", 0)], ann, dials=Dials(categories={"comedy": 1}))
        return ann

    def test_without_personalisation(self, client, who_said):
        slate = client.recommend(user_id=who_said, page_size=7, personalize=False)
        assert set(ids(slate)) < rows_of("comedy")
        assert (slate.rung, slate.profile_version) == (common_pb2.RUNG_POPULAR, 0)
        everything = ids(client.recommend(user_id=who_said, page_size=100, personalize=False))
        assert not set(everything) & (rows_of("western") | {"i2"})

    def test_among_similar_items(self, client, who_said):
        seeds = ["i6", "i4"]
        assert {"i2", "i8"} < set(ids(client.similar_items(seeds, page_size=30)))
        slate = client.similar_items(seeds, page_size=30, user_id=who_said)
        assert not set(ids(slate)) & (rows_of("western") | {"i2"})
        assert slate.dropped["blocked"]

    def test_of_who_is_held_out(self, serve, ann):
        with serve(holdout_share=1.0) as service, service.client() as client:
            client.ingest([event(ann, "i0", "view_item")])
            client.set_controls([("item", "i3", 0)], ann, dials=Dials(categories={"comedy": 1}))
            slate = client.recommend(user_id=ann, page_size=7)
            assert slate.experiment.holdout
            assert set(ids(slate)) < rows_of("comedy") - {"i3"}

    def test_none_of_it_of_who_allows_no_personal_answers(self, client, who_said):
        client.set_consent(["train"], who_said)
        slate = client.recommend(user_id=who_said, page_size=5)
        assert slate.consent_withheld
        assert ids(slate) == [f"i{row}" for row in range(5)]
        assert client.get_controls(who_said).dials == Dials()


class TestSegment:
    def test_interests_picked_at_sign_up_serve_who_did_nothing_yet(self, client, ann):
        client.set_controls([], ann, dials=Dials(categories={"space": 0.1, "romance": 0.2}))
        slate = client.recommend(user_id=ann, page_size=30, explain=True)
        assert slate.rung == common_pb2.RUNG_SEGMENT
        assert set(ids(slate)[:10]) == rows_of("romance")
        assert slate.items[0].sources[0] == "popular_in_segment"
        assert "popular with those who like romance" in {reason.text for reason in slate.items[0].reasons}
        client.ingest([event(ann, "i1", "view_item")])
        assert client.recommend(user_id=ann, page_size=5).rung == common_pb2.RUNG_SEQUENCE

    def test_who_is_known_by_no_item_of_this_bundle(self, engine, store):
        slate = self.answer(engine, store, ["out of print"], ["space"])
        assert slate.rung == "segment"

    @pytest.mark.parametrize("genre", ["space", "comedy"])
    def test_neither_encoder_nor_neighbours_serve(self, engine, store, genre):
        """A live item is in no table of neighbours, and a vector of NaN is refused by the encoder."""
        item = {"item_id": "live", "title": "live", "categories": [genre]}
        engine.catalog.put([item], np.full((1, DIM), np.nan, np.float32), 0)
        slate = self.answer(engine, store, ["live"], [genre])
        assert [part for part, _ in slate.degraded] == ["USER_ENCODER"]
        assert slate.rung == ("segment" if genre == "space" else "popular")

    def test_neighbours_come_first(self, engine, store):
        engine.catalog.columns.vectors[1] = np.nan
        assert self.answer(engine, store, ["i1"], ["space"]).rung == "item_to_item"

    @pytest.fixture
    def store(self, profiles_redis):
        return ProfileStore(profiles_redis)

    @pytest.fixture
    def engine(self, world, store):
        return open_engine(world, Dependencies(ServeConfig.load(bundle=world), store, CatalogProgress(), Telemetry()))

    def answer(self, engine, store, items, genres) -> Slate:
        """A feed of who touched these; where the rung is `segment`, it is what those like who like the first."""
        kind = event_type_key("view_item")
        records = make_records(item_keys(items), item_keys(genres), 0, 1_700_000_000_000, np.nan, kind)
        store.apply("u:ann", [((1 << 50) + place, record.tobytes()) for place, record in enumerate(records)])
        slate = engine.pipelines["recommend"].run(Request("r", "u:ann", 1_800_000_000_000, math.inf, 9))
        if slate.rung == "segment":
            assert set(engine.catalog.ids(slate.rows)) == set(
                sorted(rows_of(genres[0]), key=lambda name: int(name[1:]))[:9]
            )
        return slate

    def test_without_a_table_it_is_what_everybody_likes(self, client, ann):
        client.set_controls([], ann, dials=Dials(categories={"comedy": 1}))
        slate = client.recommend(user_id=ann, page_size=7)
        assert slate.rung == common_pb2.RUNG_POPULAR
        assert set(ids(slate)) < rows_of("comedy")


class TestOnATrainedBundle:
    """Turning a dial moves the answer its way, never back, for users with many events and for the mean of them."""

    def answers(self, running, people, dials):
        return {name: ids(running.recommend(user_id=name, page_size=20, dials=dials)) for name in people}

    def measured(self, running, people, turned, measure):
        found = []
        for dials in turned:
            answers = self.answers(running, people, dials)
            found.append(np.mean([measure(name, answer) for name, answer in answers.items()]))
        return found

    def test_novelty(self, running, people, items):
        known = {name: Counter(items[item]["categories"][0] for item in touched) for name, touched in people.items()}

        def unknown(name, answer):
            return -np.mean([known[name][items[item]["categories"][0]] for item in answer])

        rising(self.measured(running, people, [Dials(novelty=step) for step in STEPS], unknown))

    def test_freshness(self, running, people, items):
        born = np.array(sorted(row["available_from"] for row in items.values() if row["available_from"]))
        assert born.size > 20

        def new(name, answer):
            dates = [items[item]["available_from"] for item in answer]
            return np.mean([born.searchsorted(date) / born.size if date else 0.5 for date in dates])

        rising(self.measured(running, people, [Dials(freshness=step) for step in STEPS], new))

    def test_diversity(self, running, people, items):
        def topics(name, answer):
            return len({items[item]["categories"][0] for item in answer})

        rising(self.measured(running, people, [Dials(diversity=step) for step in (0, 0.1, 0.3, 0.6, 1)], topics))

    @pytest.mark.parametrize("kind", ["categories", "creators"])
    def test_weights(self, running, people, items, kind):
        def about(row):
            return row["categories"][0] if kind == "categories" else row["creator_id"]

        neutral = self.answers(running, people, None)
        shown = Counter(about(items[item]) for answer in neutral.values() for item in answer)
        for name, _ in shown.most_common(2):

            def share(_, answer, name=name):
                return np.mean([about(items[item]) == name for item in answer])

            found = self.measured(running, people, [Dials(**{kind: {name: step}}) for step in STEPS], share)
            rising(found)
            assert found[0] < found[2] < found[-1]

    def test_whom_a_person_asks_for_comes_however_far_away(self, running, people, items):
        for creator in sorted({row["creator_id"] for row in items.values()})[:5]:
            for answer in self.answers(running, people, Dials(creators={creator: 1})).values():
                assert creator in {items[item]["creator_id"] for item in answer}

    def test_a_dial_does_not_move_who_did_not_turn_it(self, running, people):
        ann, bob = list(people)[:2]
        before = ids(running.recommend(user_id=bob, page_size=20))
        running.set_controls([], ann, dials=Dials(novelty=1, diversity=1))
        assert ids(running.recommend(user_id=bob, page_size=20)) == before
        running.set_controls([], ann)


def rising(values: list[float]) -> None:
    """Each step goes up or stays, and the ends are apart."""
    assert (np.diff(values) >= -1e-9).all(), values
    assert values[-1] > values[0], values
