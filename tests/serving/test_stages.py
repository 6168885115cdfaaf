"""Each stage on tiny real arrays, in a world whose right answers are known by construction."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.action_rates import ActionRates
from features.assemble import history
from features.bundle import open_bundle
from features.catalog import Catalog
from features.controls import CONTROL, ControlKind, Dial, dial_controls
from features.controls import encode as encode_rules
from features.kernels import dot_rows
from features.keys import event_type_key, item_key, item_keys
from features.linear import NO_TERM, ItemWeights, LinearSpec, LinearTerm
from features.profile import EVERY_PURPOSE, Purpose, empty, fold
from features.records import make_records
from features.subjects import partition_of
from features.tables.schema import ITEMS
from features.transforms import ItemInputShapes, item_text, text_tokens
from features.vocabulary import Vocabulary
from serving.bundle.bitmap import Bitmap
from serving.bundle.model import Model
from serving.bundle.tables import NeighborTable
from serving.bundle.text_index import LexicalIndex
from serving.bundle.vector_index import Index
from serving.concurrency import ConcurrencyLimit
from serving.errors import ProfileStoreUnavailable
from serving.experiments import Assignment
from serving.pipeline.candidates import Candidates, Proposal, merge
from serving.pipeline.explainers import SlateExplainer
from serving.pipeline.filters import BlockedFilter, EligibilityFilter, ExcludedFilter, SeenFilter
from serving.pipeline.hydrators import (
    CatalogVersionHydrator,
    ProfileHydrator,
    QueryVectorHydrator,
    UserVectorHydrator,
)
from serving.pipeline.request import NEAREST, Request, UserState
from serving.pipeline.results import Slate
from serving.pipeline.runner import clear
from serving.pipeline.scorers import (
    FeedScorer,
    PersonalRanker,
    RankScorer,
    SearchScorer,
    SimilarScorer,
    below_zero,
    cosine,
    utility,
)
from serving.pipeline.selectors import TopKSelector
from serving.pipeline.sources import (
    BoostedSource,
    FreshSource,
    ItemToItemSource,
    LexicalSource,
    LiveItems,
    PopularExtraSource,
    PopularSource,
    SeedNeighborsSource,
    SeedVectorSource,
    SegmentSource,
    SemanticSource,
    UpstreamSource,
    UserVectorSource,
)
from serving.redis.client import connect
from serving.stores.catalog_log import CatalogProgress
from serving.stores.keys import address_of
from serving.stores.log_entries import Mark
from serving.stores.profiles import ProfileStore
from tests import world as small
from tests.serving.faults import frozen

NOW = 1_800_000_000_000
LIMIT = ConcurrencyLimit(1)
TYPES = {event_type_key(name): place for place, name in enumerate(small.MODEL["event_types"], 1)}
SEEN = np.array(list(TYPES), np.uint32)


class Asked(NamedTuple):
    """The first arguments of every stage."""

    request: Request
    user: UserState

    def but(self, **fields: Any) -> Asked:
        """The same with other fields, of the request or of the user's state."""
        state = {name: fields.pop(name) for name in UserState._fields if name in fields}
        if "dials" in state:
            fields["dials"] = state["dials"]
        return Asked(replace(self.request, **fields), self.user._replace(**state))


def query(**fields) -> Asked:
    request = Request(request_id="r", subject="u:ann", now_ms=NOW, deadline=time.monotonic() + 60, page_size=5)
    return Asked(request, UserState()).but(**fields)


def hydrated(hydrator, asked: Asked):
    """What a hydrator finds, and the parts that it marks."""
    user, degraded = hydrator.hydrate(*asked)
    return user, [part for part, _ in degraded]


def records(ids: list[str]):
    category = item_keys([small.GENRES[int(name[1:]) % 4] for name in ids])
    return make_records(item_keys(ids), category, 0, NOW, np.nan, event_type_key("view_item"))


def user_of(catalog: Catalog, ids: list[str]) -> Asked:
    """A request of a user who touched `ids`, their vector the mean of those of the items."""
    profile = fold(empty(), records(ids), len(ids))
    past = history(profile, catalog, TYPES)
    vector = catalog.columns.vectors[past.rows].mean(axis=0)
    return query(profile=profile, history=past, seen=past.rows, vector=vector)


def screened(catalog: Catalog, asked: Asked) -> tuple[Request, UserState, Bitmap]:
    """The arguments of a source, with the bitmap that the runner makes of the filters of a feed."""
    allowed, _ = EligibilityFilter(catalog).bitmap(asked.request)
    for screen in (ExcludedFilter(catalog), BlockedFilter(catalog), SeenFilter(catalog)):
        clear(allowed, screen.hold_back(*asked))
    return *asked, allowed


@pytest.fixture
def catalog() -> Catalog:
    items = small.items()
    table = pa.Table.from_pylist(items, schema=ITEMS)
    popularity = pa.array(np.arange(small.COUNT, 0, -1, dtype=np.float32))
    table = small.with_declared(table.append_column("popularity", popularity))
    names = Vocabulary.build([item["item_id"] for item in items])
    return Catalog(table, names, small.vectors(), declared=small.DECLARED)


@pytest.fixture(scope="module")
def bundle(world):
    return open_bundle(world)


@pytest.fixture(scope="module")
def model(bundle):
    return Model(bundle)


@pytest.fixture(scope="module")
def outcomes(bundle):
    return ActionRates.of_model(bundle.model)


@pytest.fixture
def index(bundle, catalog):
    return Index(bundle.read("index.faiss"), catalog)


@pytest.fixture
def lexical():
    words = [text_tokens(item_text(item)) for item in small.items()]
    return LexicalIndex(np.cumsum([0, *map(len, words)]).astype(np.int64), np.concatenate(words))


@pytest.fixture
def popular(catalog):
    rows = np.arange(small.COUNT, dtype=np.int32)
    return PopularSource(rows, np.log1p(rows[::-1].astype(np.float32)), catalog, LiveItems(catalog))


def genres(catalog, rows) -> set[str]:
    return {small.GENRES[int(name[1:]) % 4] for name in catalog.ids(rows)}


def put(catalog, name: str, genre: str, now: int = NOW) -> int:
    item = {"item_id": name, "title": f"{genre} story", "categories": [genre]}
    return int(catalog.put([item], small.direction(genre)[None], now)[0])


class TestHydrators:
    def test_a_version_of_the_catalogue_that_is_not_here_is_marked(self):
        for wanted, marks in ((5, []), (7, ["CATALOG_STALE"])):
            user, degraded = hydrated(CatalogVersionHydrator(CatalogProgress(5)), query(min_catalog_version=wanted))
            assert (user.catalog_version, degraded) == (5, marks)

    def test_a_profile_is_read_and_seen_through_the_catalogue(self, catalog, profiles_redis):
        store = ProfileStore(profiles_redis)
        entries = [(place + (1 << 50), record.tobytes()) for place, record in enumerate(records(["i4", "i7"]))]
        store.apply("u:ann", entries)
        user, _ = hydrated(ProfileHydrator(store, catalog, TYPES, SEEN, LIMIT), query())
        assert catalog.ids(user.history.rows) == ["i4", "i7"]
        assert sorted(user.seen.tolist()) == [4, 7]
        assert user.profile.version == (1 << 50) + 1

    def test_a_profile_that_is_too_old_is_used_and_marked(self, catalog, profiles_redis):
        asked = query(min_profile_version=9, deadline=time.monotonic() + 0.1)
        hydrator = ProfileHydrator(ProfileStore(profiles_redis), catalog, TYPES, SEEN, LIMIT)
        user, degraded = hydrated(hydrator, asked)
        assert degraded == ["PROFILE_STALE"]
        assert user.profile is not None

    def test_the_version_of_what_a_person_said_is_there_with_it(self, catalog, profiles_redis):
        """What such calls answer is a version as well, and an event that was forgotten is not waited for."""
        store, address = ProfileStore(profiles_redis), address_of("u:ann")
        first = 1 << 50
        store.apply("u:ann", [(first, records(["i4"])[0].tobytes())])
        said = [
            Mark(first + 2, address, controls=b""),
            Mark(first + 4, address, EVERY_PURPOSE),
            Mark(first + 6, address, forget=True),
        ]
        for mark in said:
            store.mark(partition_of("u:ann", 16), mark)
            store.apply("u:ann", [(mark.log_id - 1, records(["i7"])[0].tobytes())])
            for version, stale in ((first, []), (mark.log_id, []), (mark.log_id + 1, ["PROFILE_STALE"])):
                asked = query(min_profile_version=version, deadline=time.monotonic() + 0.1)
                assert hydrated(ProfileHydrator(store, catalog, TYPES, SEEN, LIMIT), asked)[1] == stale
        # An event that is late is waited for, whatever was said since.
        store.mark(partition_of("u:ann", 16), Mark(first + 20, address, controls=b""))
        late = query(min_profile_version=first + 12, deadline=time.monotonic() + 0.1)
        assert hydrated(ProfileHydrator(store, catalog, TYPES, SEEN, LIMIT), late)[1] == ["PROFILE_STALE"]

    def test_who_waits_for_a_version_waits_for_a_store_that_pauses(self, catalog, profiles_redis, profiles_server):
        with connect(profiles_server.url, 0.05) as client:
            store = ProfileStore(client, cooldown_s=0.05)
            store.apply("u:ann", [(1 << 50, records(["i4"])[0].tobytes())])
            hydrator = ProfileHydrator(store, catalog, TYPES, SEEN, LIMIT)
            asked = query(min_profile_version=1 << 50, deadline=time.monotonic() + 60)
            with ThreadPoolExecutor(1) as pool, frozen(profiles_server):
                with pytest.raises(ProfileStoreUnavailable):
                    hydrator.hydrate(*query())
                waits = pool.submit(hydrated, hydrator, asked)
                time.sleep(0.3)
                assert not waits.done()
            user, degraded = waits.result()
            assert (degraded, user.profile.version) == ([], 1 << 50)
            late = query(min_profile_version=1 << 50, deadline=time.monotonic() + 0.2)
            with frozen(profiles_server), pytest.raises(ProfileStoreUnavailable):
                hydrator.hydrate(*late)

    def test_a_damaged_profile_counts_as_none_and_is_marked(self, catalog, profiles_redis):
        store = ProfileStore(profiles_redis)
        store.apply("u:ann", [(1 << 50, records(["i4"])[0].tobytes())])
        (key,) = profiles_redis.keys("*:profile:*")
        profiles_redis.setrange(key, 60, b"\xff")
        user, degraded = hydrated(ProfileHydrator(store, catalog, TYPES, SEEN, LIMIT), query())
        assert degraded == ["PROFILE_CORRUPT"]
        assert user.profile is None

    @pytest.mark.parametrize(
        ("said", "default", "used"),
        [
            (None, EVERY_PURPOSE, True),
            (None, Purpose.TRAIN, False),
            (Purpose.PERSONALISE, Purpose(0), True),
            (Purpose.TRAIN | Purpose.MEASURE, EVERY_PURPOSE, False),
        ],
    )
    def test_a_profile_is_used_where_the_person_allows_it(self, catalog, profiles_redis, said, default, used):
        store = ProfileStore(profiles_redis)
        store.apply("u:ann", [(1 << 50, records(["i4"])[0].tobytes())])
        if said is not None:
            store.mark(partition_of("u:ann", 16), Mark(5, address_of("u:ann"), said))
        # A version that is waited for is not waited for where nothing of it may be used.
        asked = query(min_profile_version=0 if used else 1 << 62)
        user, degraded = hydrated(ProfileHydrator(store, catalog, TYPES, SEEN, LIMIT, default), asked)
        assert (user.profile is not None, user.history is not None, bool(user.seen.size)) == (used, used, used)
        assert user.withheld == (not used)
        assert degraded == []

    def test_a_store_that_is_away_is_the_runners_to_mark(self, catalog, tmp_path):
        with connect(f"unix://{tmp_path}/nobody.sock") as client:
            hydrator = ProfileHydrator(ProfileStore(client), catalog, TYPES, SEEN, LIMIT)
            with pytest.raises(ProfileStoreUnavailable):
                hydrator.hydrate(*query())

    @pytest.mark.parametrize("fields", [{"assignment": Assignment("holdout", True)}, {"personalize": False}, {}])
    def test_controls_hold_where_the_history_is_not_used(self, catalog, profiles_redis, fields):
        store = ProfileStore(profiles_redis)
        store.apply("u:ann", [(1 << 50, records(["i1"]).tobytes())])
        turned = dial_controls([(Dial.NOVELTY, 0, 0.5), (Dial.CREATOR_WEIGHT, 7, -1)])
        rules = np.concatenate([np.array([(1, 0, ControlKind.ITEM)], CONTROL), turned])
        store.mark(partition_of("u:ann", 16), Mark(5, address_of("u:ann"), controls=encode_rules(rules)))
        asked = query(**fields, dials={(Dial.NOVELTY, 0): -1.0})
        segments = {item_key("space"): "space"}
        user, _ = hydrated(ProfileHydrator(store, catalog, TYPES, SEEN, LIMIT, segments=segments), asked)
        assert user.controls.tobytes() == rules.tobytes()
        assert user.dials == {(Dial.NOVELTY, 0): -1.0, (Dial.CREATOR_WEIGHT, 7): -1.0}
        known = not fields
        assert (user.profile is not None, user.history is not None, bool(user.seen.size)) == (known, known, known)
        assert user.segment == ("space" if known else "")

    def test_nobody_s_profile_is_not_read(self, catalog):
        assert not ProfileHydrator(None, catalog, TYPES, SEEN, LIMIT).enable(*query(subject=""))

    def test_a_segment_is_what_was_chosen_most_or_else_turned_up_most(self, catalog, profiles_redis):
        store = ProfileStore(profiles_redis)
        segments = {item_key(name): name for name in ("space", "romance")}
        rules = encode_rules(
            dial_controls([(Dial.CATEGORY_WEIGHT, item_key(n), v) for n, v in (("space", 0.1), ("romance", 1))])
        )
        hydrator, found = ProfileHydrator(store, catalog, TYPES, SEEN, LIMIT, segments=segments), []
        store.mark(partition_of("u:ann", 16), Mark(5, address_of("u:ann"), controls=rules))
        for item in ("", "i1", "i0", "i4"):
            if item:
                store.apply("u:ann", [((1 << 50) + len(found), records([item]).tobytes())])
            found.append(hydrated(hydrator, query())[0].segment)
        # Of westerns there is no table here, and a choice outweighs what the user once turned up.
        assert found == ["romance", "space", found[2], ""]

    def test_the_person_lies_where_their_items_do(self, catalog, model):
        user, _ = hydrated(UserVectorHydrator(model, catalog, NO_TERM), user_of(catalog, ["i0", "i4"]).but(vector=None))
        np.testing.assert_allclose(user.vector, small.vectors()[[0, 4]].mean(axis=0), rtol=1e-5)

    def test_a_failed_encoder_is_the_runners_to_mark(self, catalog, model):
        asked = user_of(catalog, ["i0"])
        catalog.columns.vectors[0] = np.nan
        with pytest.raises(Exception, match="NaN"):
            UserVectorHydrator(model, catalog, NO_TERM).hydrate(*asked)

    def test_items_that_nobody_knows_make_no_person(self, catalog, model):
        asked = query(history=history(fold(empty(), make_records(item_keys(["?"]), 0, 0, 0, 0, 0), 1), catalog, TYPES))
        assert not UserVectorHydrator(model, catalog, NO_TERM).enable(*asked)

    def test_words_lie_where_their_genre_does(self, model):
        shapes = ItemInputShapes(**{name: small.MODEL[name] for name in ItemInputShapes.__slots__})
        asked = query(text="Westerns!")
        user, _ = hydrated(QueryVectorHydrator(model, shapes), asked)
        np.testing.assert_allclose(user.query_vector, small.direction("western"))
        assert asked.request.tokens.tolist() == text_tokens("western").tolist()


class TestSources:
    def test_nearest_names_the_genre_without_what_was_seen(self, catalog, index):
        asked = screened(catalog, user_of(catalog, ["i0", "i4"]))
        rows, scores = UserVectorSource(index, catalog, 8).retrieve(*asked)
        assert genres(catalog, rows) == {"western"}
        assert not {0, 4} & set(rows.tolist())
        assert (np.diff(scores) <= 0).all()

    def test_nearest_names_a_page_at_least(self, catalog, index):
        asked = screened(catalog, user_of(catalog, ["i0", "i4"]).but(page_size=30))
        assert UserVectorSource(index, catalog, 8).retrieve(*asked)[0].size == 30

    def test_the_linear_part_moves_items_and_names_others(self, catalog, model, index):
        named, weights = np.full((40, 2), -1, np.int32), np.zeros((40, 2), np.float32)
        named[0], weights[0] = (20, 21), (9.0, 0.5)
        term = LinearTerm(LinearSpec(weight=2.0), ItemWeights.of(named, weights))
        asked = user_of(catalog, ["i0", "i4"])
        user, _ = hydrated(UserVectorHydrator(model, catalog, term), asked)
        asked = screened(catalog, asked.but(linear=user.linear))
        rows, relevance = UserVectorSource(index, catalog, 8).retrieve(*asked)
        assert rows[0] == 20
        assert (np.diff(relevance) <= 0).all()
        expected = small.vectors()[rows] @ user.vector + np.where(rows == 20, 18, np.where(rows == 21, 1, 0))
        np.testing.assert_allclose(relevance, expected, rtol=1e-5)
        # An item that may not be shown is named by no part.
        catalog.set_available(20, False)
        asked = screened(catalog, user_of(catalog, ["i0", "i4"]).but(linear=user.linear))
        assert 20 not in UserVectorSource(index, catalog, 8).retrieve(*asked)[0]

    def test_what_the_filters_do_not_hold_back_may_return(self, catalog, index):
        asked = user_of(catalog, ["i0", "i4"]).but(seen=np.zeros(0, np.int32))
        assert {0, 4} <= set(UserVectorSource(index, catalog, 10).retrieve(*screened(catalog, asked))[0].tolist())

    def test_a_live_item_is_nearest_at_once(self, catalog, index):
        row = put(catalog, "new", "western")
        rows, _ = UserVectorSource(index, catalog, 9).retrieve(*screened(catalog, user_of(catalog, ["i0", "i4"])))
        assert row in rows

    def test_neighbours_add_up_and_newer_items_weigh_more(self, catalog):
        rows = [[2, 3, 5], [3, 5, -1], [0, -1, -1], [0, -1, -1]]
        scores = [[0.9, 0.5, 0.1], [0.8, -0.2, 0], [1, 0, 0], [1, 0, 0]]
        table = NeighborTable(ItemWeights.of(np.array(rows, np.int32), np.array(scores, np.float32)))
        every = np.full(5, 255, np.uint8)
        rows, scores = table.of(np.array([0, 1], np.int32), np.array([0.5, 1], np.float32), 9, every)
        assert rows.tolist() == [3, 2]
        np.testing.assert_allclose(scores, [0.5 * 0.5 + 0.8, 0.45])
        asked = user_of(catalog, ["i0", "i1"])
        source = ItemToItemSource(table, 9)
        assert source.enable(*asked)
        assert source.retrieve(*screened(catalog, asked))[0].tolist() == [3, 2]
        seeds = screened(catalog, query(seeds=np.array([1, 39], np.int32)))
        assert SeedNeighborsSource(table, 9).retrieve(*seeds)[0].tolist() == [3]
        # What may not be shown takes no place, not even that of a single neighbour.
        catalog.set_available(3, False)
        assert ItemToItemSource(table, 1).retrieve(*screened(catalog, asked))[0].tolist() == [2]

    def test_who_is_known_by_no_item_has_no_neighbours(self, catalog):
        none = np.full((small.COUNT, 2), -1, np.int32), np.zeros((small.COUNT, 2), np.float32)
        table = NeighborTable(ItemWeights.of(*none))
        asked = screened(catalog, user_of(catalog, ["i0", "i1"]))
        assert not ItemToItemSource(table, 9).retrieve(*asked)[0].size
        assert not ItemToItemSource(table, 9).enable(*user_of(catalog, ["i999"]))
        assert not ItemToItemSource(table, 9).enable(*query())

    def test_popular_fills_pages_past_what_may_not_be_shown(self, catalog, popular):
        catalog.set_available(0, False)
        asked = screened(catalog, query(page_size=2, seen=np.array([1, 2], np.int32)))
        assert popular.retrieve(*asked)[0].tolist() == [3, 4, 5, 6]

    def test_popular_is_in_the_end_everything_the_table_then_live_items_then_the_rest(self, catalog):
        table = np.array([7, 3], np.int32)
        source = PopularSource(table, np.array([0.5, 0.0], np.float32), catalog, LiveItems(catalog))
        old, young = put(catalog, "old", "space", NOW - 86_400_000), put(catalog, "young", "space", NOW)
        rows, scores = source.retrieve(*screened(catalog, query(page_size=30)))
        rest = [row for row in range(small.COUNT) if row not in (7, 3)]
        assert rows.tolist() == [7, 3, young, old, *rest]
        assert (np.diff(scores) <= 0).all()
        assert scores.dtype == np.float32
        asked = query(page_size=2)
        assert source.retrieve(*screened(catalog, asked))[0].tolist() == [7, 3, young, old]
        assert source.retrieve(*screened(catalog, asked.but(blocks_unread=True)))[0].tolist() == [7, 3]

    def test_a_segment_s_page_is_what_may_be_shown_of_its_table(self, catalog):
        rows = np.array([9, 1, 5, 13, 17], np.int32)
        source = SegmentSource({"space": (rows, np.arange(5, 0, -1, dtype=np.float32))})
        catalog.set_available(1, False)
        asked = query(segment="space", page_size=1, seen=np.array([5], np.int32))
        assert source.enable(*asked)
        assert [part.tolist() for part in source.retrieve(*screened(catalog, asked))] == [[9, 13], [5, 2]]
        assert not source.retrieve(*screened(catalog, asked.but(seen=rows)))[0].size
        assert not source.enable(*query())

    def test_what_a_dial_asks_more_of_is_proposed_wherever_it_stands(self, catalog):
        row = put(catalog, "new", "comedy")
        source = BoostedSource(catalog)
        asked = query(dials={(Dial.CATEGORY_WEIGHT, item_key("comedy")): 0.5}, seen=np.array([3], np.int32))
        assert source.enable(*asked)
        rows, scores = source.retrieve(*screened(catalog, asked))
        assert rows.tolist() == [*range(7, small.COUNT, 4), row]
        assert (np.diff(scores) < 0).all()
        dials = {(Dial.CREATOR_WEIGHT, item_key("c0")): 1.0, (Dial.CATEGORY_WEIGHT, item_key("comedy")): -1.0}
        assert source.retrieve(*screened(catalog, asked.but(dials=dials)))[0].tolist() == list(range(0, small.COUNT, 5))
        assert not source.enable(*query(dials={(Dial.CREATOR_WEIGHT, 1): -1.0, (Dial.NOVELTY, 0): 1.0}))
        assert not source.enable(*asked.but(blocks_unread=True))

    def test_a_dial_has_the_popular_to_choose_from_where_nothing_is_near(self, catalog, popular):
        source = PopularExtraSource(popular)
        assert source.enable(*query(dials={(Dial.NOVELTY, 0): -1.0}))
        assert not source.enable(*query(dials={(Dial.NOVELTY, 0): 0.0}))
        assert not source.enable(*user_of(catalog, ["i0"]).but(dials={(Dial.NOVELTY, 0): 1.0}))

    def test_popular_of_nothing_is_nothing(self, catalog, popular):
        asked = screened(catalog, query(seen=np.arange(small.COUNT, dtype=np.int32)))
        assert popular.retrieve(*asked)[0].size == 0

    def test_fresh_names_the_newest_first_and_no_old_ones(self, catalog):
        day = 86_400_000
        source = FreshSource(LiveItems(catalog), 14, 50)
        assert not source.enable(*query())
        old, older, young = (put(catalog, f"n{age}", "space", NOW - age * day) for age in (3, 20, 1))
        asked = query()
        assert source.enable(*asked)
        rows, scores = source.retrieve(*screened(catalog, asked))
        assert (rows.tolist(), scores.tolist()) == ([young, old], [-1, -3])
        assert older not in rows
        catalog.set_available(young, False)
        assert source.retrieve(*screened(catalog, query()))[0].tolist() == [old]
        assert not source.enable(*asked.but(blocks_unread=True))

    def test_similar_points_where_the_seeds_point(self, catalog, index):
        asked = screened(catalog, query(seeds=np.array([1], np.int32)))
        rows, _ = SeedVectorSource(index, catalog, 9).retrieve(*asked)
        assert genres(catalog, rows) == {"space"}
        assert 1 not in rows

    def test_words_and_meaning_find_the_genre(self, catalog, index, lexical):
        asked = query(text="space", query_vector=small.direction("space"))
        for source in (LexicalSource(lexical, 10), SemanticSource(index, 10)):
            assert genres(catalog, source.retrieve(*screened(catalog, asked))[0]) == {"space"}

    def test_given_candidates_keep_the_callers_order(self, catalog):
        rows = np.array([7, 3, 5], np.int32)
        assert UpstreamSource().retrieve(*screened(catalog, query(rows=rows)))[1].tolist() == [0, -1, -2]
        scores = np.array([1, 9, 5], np.float32)
        assert UpstreamSource().retrieve(*screened(catalog, query(rows=rows, upstream=scores)))[1] is scores


class TestFilters:
    def test_what_a_person_blocked_stays_away_until_the_rule_ends(self, catalog):
        rows = np.arange(8, dtype=np.int32)
        genre = item_key(small.GENRES[2])
        rules = [
            (item_key("i1"), 0, ControlKind.ITEM),
            (item_key("gone"), 0, ControlKind.ITEM),
            (genre, NOW + 1, ControlKind.CATEGORY),
            (item_key(small.GENRES[3]), NOW, ControlKind.CATEGORY),  # over by now
            (item_key("i4"), 0, ControlKind.CREATOR),
        ]
        catalog.columns.creator[4:6] = item_key("i4"), item_key("another")
        asked = query(controls=np.array(rules, CONTROL))
        assert BlockedFilter(catalog).enable(*asked)
        assert rows[~BlockedFilter(catalog).keep(*asked, rows)].tolist() == [1, 2, 4, 6]
        assert not BlockedFilter(catalog).enable(*query())
        assert not BlockedFilter(catalog).required
        bitmap, _ = EligibilityFilter(catalog).bitmap(asked.request)
        assert clear(bitmap, BlockedFilter(catalog).hold_back(*asked)) == 2 + small.COUNT // 4
        held = np.flatnonzero(np.unpackbits(bitmap, bitorder="little")[: small.COUNT] == 0)
        assert held.tolist() == sorted({1, 4, *range(2, small.COUNT, 4)})

    @pytest.mark.parametrize("size", [0, 3, small.COUNT])
    def test_what_a_filter_holds_back_is_what_it_does_not_keep(self, catalog, size):
        """Over all rows, for each filter, live items and what is put twice included; held back is counted once."""
        rng = np.random.default_rng(size)
        put(catalog, "new", "space")
        some = rng.integers(0, catalog.size, size).astype(np.int32)
        names = [*rng.choice(["c0", "c1", "nobody"], size), *rng.choice(small.GENRES, size), *catalog.ids(some)]
        kinds = [ControlKind.CREATOR] * size + [ControlKind.CATEGORY] * size + [ControlKind.ITEM] * size
        rules = [(item_key(name), 0, kind) for name, kind in zip(names, kinds, strict=True)][: size + 1]
        catalog.set_available(5, False)
        asked = query(controls=np.array(rules, CONTROL), seen=some, exclude=some[: size // 2], seeds=some[size // 2 :])
        every = np.arange(catalog.size, dtype=np.int32)
        bitmap, held = EligibilityFilter(catalog).bitmap(asked.request)
        bits = np.unpackbits(bitmap, bitorder="little")[: catalog.size].view(bool)
        np.testing.assert_array_equal(bits, EligibilityFilter(catalog).keep(*asked, every))
        assert held == (~bits).sum() == 1
        for screen in (ExcludedFilter(catalog), BlockedFilter(catalog), SeenFilter(catalog)):
            mine = bitmap.copy()
            count = clear(mine, screen.hold_back(*asked))
            left = np.unpackbits(mine, bitorder="little")[: catalog.size].view(bool)
            np.testing.assert_array_equal(left, bits & screen.keep(*asked, every))
            assert count == bits.sum() - left.sum()
            assert clear(mine, screen.hold_back(*asked)) == 0

    ROWS = np.array([3, 0, 7], np.int32)

    def test_what_may_not_be_shown_goes(self, catalog):
        catalog.set_available(0, True, available_from=NOW + 1)
        catalog.set_available(7, True, available_until=NOW)
        assert EligibilityFilter(catalog).keep(*query(), self.ROWS).tolist() == [True, False, False]

    def test_eligibility_and_the_callers_exclusions_fail_closed(self, catalog):
        assert EligibilityFilter(catalog).required
        assert ExcludedFilter(catalog).required
        assert not SeenFilter(catalog).required

    def test_the_seen_go(self, catalog):
        asked = query(seen=np.array([7, 7, 39], np.int32))
        assert SeenFilter(catalog).keep(*asked, self.ROWS).tolist() == [True, True, False]

    def test_exclusions_and_seeds_go(self, catalog):
        asked = query(exclude=np.array([3], np.int32), seeds=np.array([0], np.int32))
        assert ExcludedFilter(catalog).keep(*asked, self.ROWS).tolist() == [False, False, True]
        assert not ExcludedFilter(catalog).enable(*query())

    def test_what_is_excluded_is_not_shown_either_if_it_is_put_while_the_request_runs(self, catalog):
        asked, screen = query(exclude_unknown=frozenset({"new", "never"})), ExcludedFilter(catalog)
        assert screen.enable(*asked)
        assert screen.keep(*asked, self.ROWS).all()
        row = put(catalog, "new", "space")
        assert screen.keep(*asked, np.array([3, row], np.int32)).tolist() == [True, False]
        assert screen.hold_back(*asked).rows.tolist() == [row]


def personal_ranker(model, catalog, outcomes, blend):
    return PersonalRanker(model, catalog, outcomes, [0.5, 0.5], blend, declared=small.DECLARED)


class TestScorers:
    def candidates(self, **scores: list[float]) -> Candidates:
        count = len(next(iter(scores.values())))
        return Candidates(np.arange(count, dtype=np.int32), np.array(list(scores.values()), np.float32), tuple(scores))

    def test_a_feed_is_relevance_and_blended_utility(self, catalog, model, outcomes):
        asked = user_of(catalog, ["i0", "i4"])
        rows = np.array([8, 1, 12], np.int32)
        scored = personal_ranker(model, catalog, outcomes, 0.25).score(*asked, rows)
        relevance = small.vectors()[rows] @ asked.user.vector
        affinity = np.array([1.0, 0.0, 1.0])
        odds = np.stack([affinity - 1, 2 * affinity - 2], axis=1)
        probabilities = 1 / (1 + np.exp(-odds))
        mean = probabilities.mean(axis=1)
        np.testing.assert_allclose(scored.scores, relevance + 0.25 * np.log(mean / (1 - mean)), rtol=1e-5)
        np.testing.assert_allclose(scored.probabilities, probabilities, rtol=1e-5)

    def test_a_score_never_depends_on_the_other_candidates(self, catalog, model, outcomes):
        personal = personal_ranker(model, catalog, outcomes, 0.25)
        rows = np.arange(40, dtype=np.int32)
        together = personal.score(*user_of(catalog, ["i0", "i5"]), rows).scores
        alone = [personal.score(*user_of(catalog, ["i0", "i5"]), rows[at : at + 1]).scores[0] for at in range(40)]
        assert together.tolist() == alone

    def test_without_a_blend_only_the_page_is_judged(self, catalog, model, outcomes):
        asked = user_of(catalog, ["i0", "i4"]).but(page_size=3)
        scored = personal_ranker(model, catalog, outcomes, 0.0).score(*asked, np.arange(40, dtype=np.int32))
        judged = np.flatnonzero(np.isfinite(scored.probabilities[:, 0]))
        assert sorted(judged) == sorted(np.argsort(-scored.scores, kind="stable")[:3])

    def test_nobody_s_feed_goes_by_popularity(self, catalog, model, outcomes):
        scorer = FeedScorer(personal_ranker(model, catalog, outcomes, 0.25))
        assert scorer.score(*query(), self.candidates(popular=[1, 3, 2])).scores.tolist() == [1, 3, 2]

    def test_neighbours_go_before_what_is_popular(self, catalog, model, outcomes):
        scorer = FeedScorer(personal_ranker(model, catalog, outcomes, 0.25))
        nan = float("nan")
        found = self.candidates(
            neighbors=[0.1, nan, 0.9, nan, nan, nan, nan],
            popular_in_segment=[0.5, nan, nan, nan, 0.3, nan, nan],
            popular=[nan, 2, nan, 9, nan, nan, nan],
            fresh=[nan, nan, nan, nan, nan, -3, -1],
        )
        assert np.argsort(-scorer.score(*query(), found).scores).tolist() == [2, 0, 4, 3, 1, 6, 5]
        assert np.isfinite(scorer.score(*query(), found).scores).all()

    def test_what_fills_a_personal_page_stands_behind_in_its_own_order(self, catalog, model, outcomes):
        personal = personal_ranker(model, catalog, outcomes, 0.25)
        asked, nan = user_of(catalog, ["i0", "i4"]), np.nan
        named = {NEAREST: [2, 1, nan, nan, nan, nan], "popular": [nan, nan, 4, 3, 2, nan], "fresh": [nan] * 5 + [-1.0]}
        # Spaceships are near, westerns fill up: better by the score, and behind all the same; what is new competes.
        rows = np.array([1, 5, 8, 2, 12, 16], np.int32)
        found = Candidates(rows, np.array(list(named.values()), np.float32), tuple(named), (0, 3, 4))
        score = FeedScorer(personal).score(*asked, found).scores
        own = personal.score(*asked, rows).scores
        np.testing.assert_array_equal(score[[0, 1, 5]], own[[0, 1, 5]])
        assert (own[[2, 4]] > own[:2].max()).all()
        assert score[2:5].max() < score[[0, 1, 5]].min()
        assert np.argsort(-score[2:5]).tolist() == np.argsort(-own[2:5]).tolist()
        # Alone they keep the score of their source, which is the relevance.
        relevance = dot_rows(catalog.columns.vectors, rows[:2], asked[1].vector)
        alone = Candidates(rows[:2], relevance[None], (NEAREST,), (0,))
        np.testing.assert_array_equal(FeedScorer(personal).score(*asked, alone).scores, own[:2])

    def test_below_zero_keeps_the_order(self):
        values = np.array([-1e9, -7, -1, -0.5, -1e-3, 0, 1e-3, 1, 7, 1e9])
        assert (np.diff(below_zero(values)) > 0).all()
        assert -1 <= below_zero(values).min() <= below_zero(values).max() <= 0

    def test_a_search_is_bounded_and_taste_moves_it_a_little(self, catalog, lexical):
        rows = np.arange(40, dtype=np.int32)
        found = Candidates(rows, np.zeros((1, 40), np.float32), ("words",))
        asked = query(text="story", query_vector=small.direction("space"))
        plain = SearchScorer(lexical, catalog, 0.25).score(*asked, found).scores
        assert 0 <= plain.min() <= plain.max() <= 1
        known = asked.but(vector=small.direction("western"))
        moved = SearchScorer(lexical, catalog, 0.25).score(*known, found).scores - plain
        assert np.abs(moved).max() <= 0.25 + 1e-6
        assert moved[0] > 0.2 > 0.05 > abs(moved[1])

    @pytest.fixture
    def ranks(self, catalog, model, outcomes, lexical):
        return RankScorer(personal_ranker(model, catalog, outcomes, 0.25), SearchScorer(lexical, catalog, 0.25))

    def test_nobody_known_the_order_is_the_callers(self, ranks):
        upstream = np.array([0.1, 1e30, -5], np.float32)
        asked = query(rows=np.arange(3, dtype=np.int32), upstream=upstream, upstream_weight=0.0)
        assert ranks.score(*asked, self.candidates(upstream=upstream)).scores.tolist() == upstream.tolist()

    def test_a_query_takes_the_place_of_the_personal_score(self, catalog, ranks, lexical):
        search, nan = SearchScorer(lexical, catalog, 0.25), np.nan
        for asked in (query(), user_of(catalog, ["i0"])):
            asked = asked.but(text="space number5", query_vector=small.direction("space"))
            found = self.candidates(upstream=[0, -1, -2, -3, -4, -5, -6])
            text = search.score(*asked, found).scores
            np.testing.assert_array_equal(ranks.score(*asked, found).scores, text)
            assert text.argmax() == 5
            asked = asked.but(upstream=found.of("upstream"), upstream_weight=0.5)
            scored = ranks.score(*asked, found)
            np.testing.assert_array_equal(scored.scores, np.float32(0.5) * asked.request.upstream + text)
            assert scored.probabilities is None
        # Signs alone are no query.
        scored = ranks.score(*asked.but(text="!?", query_vector=np.full(small.DIM, nan, np.float32)), found)
        assert np.isfinite(scored.scores).all()
        assert scored.probabilities is not None

    def test_a_known_person_adds_to_the_callers_score(self, catalog, model, outcomes, ranks):
        personal = personal_ranker(model, catalog, outcomes, 0.25)
        rows, upstream = np.array([1, 4], np.int32), np.array([10, 1], np.float32)
        asked = user_of(catalog, ["i0"]).but(rows=rows, upstream=upstream, upstream_weight=2.0)
        found = Candidates(rows, upstream[None], ("upstream",))
        own = personal.score(*asked, rows).scores
        np.testing.assert_allclose(ranks.score(*asked, found).scores, own + np.array([20, 2]), rtol=1e-6)
        np.testing.assert_allclose(ranks.score(*asked.but(upstream=None), found).scores, own)

    def test_the_page_has_its_probabilities_where_the_callers_scores_decide_it(self, catalog, model, outcomes, lexical):
        unblended = personal_ranker(model, catalog, outcomes, 0.0)
        rows, upstream = np.array([4, 1], np.int32), np.array([0, 1e6], np.float32)
        asked = user_of(catalog, ["i0"]).but(rows=rows, upstream=upstream, page_size=1)
        scorer = RankScorer(unblended, SearchScorer(lexical, catalog, 0.25))
        scored = scorer.score(*asked, Candidates(rows, upstream[None], ("upstream",)))
        assert scored.scores.argmax() == 1
        assert np.isfinite(scored.probabilities[1]).all()

    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_scores_at_the_end_of_float32_keep_the_callers_order(self, catalog, ranks, data):
        largest = float(np.finfo(np.float32).max)
        at_the_end = st.sampled_from([largest, -largest, largest / 2, 1.0, 0.0, -1.0])
        upstream = np.array(data.draw(st.lists(at_the_end, min_size=7, max_size=7)), np.float32)
        weight = data.draw(st.sampled_from([1.0, 0.5, 1e-3]))
        asked = data.draw(st.sampled_from([query(), user_of(catalog, ["i0"])]))
        asked = asked.but(text="space number5", query_vector=small.direction("space"))
        asked = asked.but(rows=np.arange(7, dtype=np.int32), upstream=upstream, upstream_weight=weight)
        scores = ranks.score(*asked, self.candidates(upstream=upstream.tolist())).scores
        assert scores.dtype == np.float32
        assert np.isfinite(scores).all()
        far = np.abs(upstream) > 1e30
        ordered = scores[far][np.argsort(upstream[far], kind="stable")].astype(np.float64)
        assert (np.diff(ordered) >= 0).all()
        if far.any() and (~far).any() and upstream[far].max() > 0:
            assert scores[upstream.argmax()] > scores[~far].max()

    def test_similar_is_the_mean_cosine(self, catalog):
        asked = query(seeds=np.array([0, 1], np.int32))
        found = self.candidates(similar=[0] * 40)
        unit = small.vectors() / np.linalg.norm(small.vectors(), axis=1, keepdims=True)
        expected = (unit @ unit[[0, 1]].T).mean(axis=1)
        np.testing.assert_allclose(SimilarScorer(catalog).score(*asked, found).scores, expected, rtol=1e-4, atol=1e-6)
        assert SimilarScorer(catalog).enable(*asked)
        assert not SimilarScorer(catalog).enable(*query(seeds=np.zeros(0, np.int32)))

    def test_nothing_has_no_direction(self):
        assert cosine(
            np.zeros((2, 4), np.float32), np.arange(2, dtype=np.int32), np.ones(4, np.float32), np.zeros(2, np.float32)
        ).tolist() == [
            0,
            0,
        ]

    def test_utility_by_hand(self):
        found = utility(np.array([[0.2, 0.4], [0, 0], [1, 1]]), np.array([0.5, 0.5]))
        np.testing.assert_allclose(found, [np.log(0.3 / 0.7), np.log(1e-6 / (1 - 1e-6)), -np.log(1e-6 / (1 - 1e-6))])


class TestTopKSelector:
    def select(self, catalog, rows, scores, page_size=3, **options):
        found = merge([Proposal("x", np.array(rows, np.int32), np.array(scores, np.float32))])
        at, chance = TopKSelector(catalog, **options).select(*query(page_size=page_size), found, found.scores[0])
        assert (chance == 1).all()
        return found.rows[at].tolist()

    def test_the_best_come_first_and_ties_go_by_row(self, catalog):
        assert self.select(catalog, [9, 5, 7, 1, 3], [1, 2, 2, 0, 2]) == [3, 5, 7]
        assert self.select(catalog, [9, 5, 7, 1, 3], [2, 2, 2, 2, 2]) == [1, 3, 5]

    def test_or_in_the_order_in_which_they_came(self, catalog):
        assert self.select(catalog, [9, 5, 7, 1, 3], [2, 2, 2, 2, 2], keep_order=True) == [9, 5, 7]

    def test_fewer_than_a_page(self, catalog):
        assert self.select(catalog, [9, 5], [1, 2]) == [5, 9]
        assert self.select(catalog, [], []) == []

    def test_what_was_hidden_since_does_not_leave(self, catalog):
        catalog.set_available(5, False)
        assert self.select(catalog, [9, 5, 7], [1, 3, 2]) == [7, 9]

    def test_what_has_no_score_comes_last(self, catalog):
        assert self.select(catalog, [9, 5, 7], [1, -np.inf, 2]) == [7, 9, 5]


class TestReasons:
    def reasons(self, catalog, asked, rows, **scores):
        rows = np.array(rows, np.int32)
        table = np.array(list(scores.values()), np.float32).reshape(len(scores), rows.size)
        candidates = Candidates(rows, table, tuple(scores))
        slate = Slate(rows, rows * 0, rows * 1.0, candidates, None, {}, [], user=asked.user)
        return SlateExplainer(catalog).explain(asked.request, slate)

    def test_the_nearest_item_of_the_history_is_named(self, catalog):
        (first, second) = self.reasons(catalog, user_of(catalog, ["i0", "i1"]), [4, 5], nearest=[1, 1])
        assert [(reason.kind, reason.row) for reason in first] == [("like_history", 0)]
        assert [(reason.kind, reason.row) for reason in second] == [("like_history", 1)]
        assert "western story number0" in first[0].text
        assert first[0].weight > 0.9

    def test_words_seeds_popularity_and_the_callers_score(self, catalog):
        asked = query(text="space tales", seeds=np.array([1], np.int32), upstream=np.array([2.5], np.float32))
        (mine,) = self.reasons(catalog, asked, [5], words=[0.7], upstream=[2.5], popular=[3])
        kinds = {reason.kind: reason for reason in mine}
        assert list(kinds) == ["upstream", "matches_query", "similar_to_seed", "popular"]
        assert "space" in kinds["matches_query"].text
        assert "tale" in kinds["matches_query"].text
        assert kinds["similar_to_seed"].row == 1
        assert kinds["upstream"].weight == 2.5

    def test_an_empty_page_has_no_reasons(self, catalog):
        assert self.reasons(catalog, user_of(catalog, ["i0"]), [], nearest=[]) == []
