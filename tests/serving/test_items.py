"""The catalogue by the contract, on a service with two workers: patches, what is replaced, and items handed out."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2, json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penchant.client import Client, event, item_patch, violations
from penchant.v1 import catalog_pb2, common_pb2
from tests.world import rows_of

Item = catalog_pb2.Item
NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]
INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]
Fresh = Callable[..., Item]


@pytest.fixture
def fresh(client: Client) -> Iterator[Fresh]:
    """Puts items with ids of their own, and deletes them in the end."""
    made: list[str] = []

    def make(**fields: Any) -> Item:
        item = Item(item_id=f"new-{uuid.uuid4().hex}", **fields)
        made.append(item.item_id)
        assert client.put_items([item]).visible_everywhere
        return item

    yield make
    if made:
        client.delete_items(made)


def whole(item: Item) -> Item:
    """An item as the catalogue hands it out: availability is said."""
    said = Item()
    said.CopyFrom(item)
    said.available = item.available if item.HasField("available") else True
    return said


class TestPatch:
    def test_only_the_named_fields_change_on_every_worker(self, client, everywhere, fresh):
        item = fresh(title="quixotic", categories=["space"], creator_id="c9", price=5, attributes={"a": "1"})
        answer = client.patch_items([item_patch(item.item_id, price=7.5)])
        assert answer.visible_everywhere
        assert [status.code for status in answer.statuses] == [0]
        item.price = 7.5
        for _ in range(16):
            got = everywhere.get_items([item.item_id], min_catalog_version=answer.catalog_version)
            assert list(got.items) == [whole(item)]
            assert got.catalog_version >= answer.catalog_version
            assert [line.item_id for line in everywhere.search("quixotic", page_size=1).items] == [item.item_id]

    def test_new_words_are_found_and_old_ones_are_not(self, client, everywhere, fresh):
        item = fresh(title="quixotic zephyr", categories=["space"])
        client.patch_items([item_patch(item.item_id, title="sesquipedalian")])
        for _ in range(8):
            assert [line.item_id for line in everywhere.search("sesquipedalian", page_size=1).items] == [item.item_id]
            near = [line.item_id for line in everywhere.similar_items(["i1"], page_size=12).items]
            assert item.item_id in near
        client.patch_items([item_patch(item.item_id, categories=["romance"])])
        near = [line.item_id for line in everywhere.similar_items(["i2"], page_size=12).items]
        assert item.item_id in near
        # A price says nothing to the words: the item is still found by them.
        client.patch_items([item_patch(item.item_id, price=1)])
        assert [line.item_id for line in client.search("sesquipedalian", page_size=1).items] == [item.item_id]

    def test_a_named_field_without_a_value_is_cleared(self, client, fresh):
        item = fresh(title="t", description="d", categories=["space"], price=5, available=False, attributes={"a": "1"})
        client.patch_items(
            [item_patch(item.item_id, price=None, title=None, available=None, categories=None, attributes=None)]
        )
        [got] = client.get_items([item.item_id]).items
        assert got == Item(item_id=item.item_id, description="d", available=True)

    def test_without_a_mask_what_the_item_holds_is_changed_and_nothing_cleared(self, client, fresh):
        item = fresh(title="t", price=5, categories=["space"])
        bare = catalog_pb2.ItemPatch(item=Item(item_id=item.item_id, price=0, available=False))
        assert [status.code for status in client.patch_items([bare]).statuses] == [0]
        [got] = client.get_items([item.item_id]).items
        assert (got.title, got.price, got.HasField("price"), got.available) == ("t", 0, True, False)
        assert list(got.categories) == ["space"]

    def test_an_item_of_the_bundle_is_patched_too(self, client, everywhere):
        try:
            client.patch_items([item_patch("i7", price=999, attributes={"image": "x.png"})])
            for _ in range(8):
                [got] = everywhere.get_items(["i7"]).items
                assert (got.title, got.price, dict(got.attributes)) == ("comedy story number7", 999, {"image": "x.png"})
                assert [line.item_id for line in everywhere.search("number7", page_size=1).items] == ["i7"]
        finally:
            client.patch_items([item_patch("i7", price=8, attributes=None)])

    def test_patches_of_one_item_in_one_call_and_availability_between_them(self, client, fresh):
        item = fresh(title="t", categories=["space"])
        client.patch_items([item_patch(item.item_id, price=1, title="u"), item_patch(item.item_id, price=2)])
        client.set_availability([catalog_pb2.Availability(item_id=item.item_id, available=False, available_from_ms=5)])
        client.patch_items([item_patch(item.item_id, available_until_ms=9)])
        [got] = client.get_items([item.item_id]).items
        wanted = {"title": "u", "price": 2, "available": False, "available_from_ms": 5, "available_until_ms": 9}
        assert got == Item(item_id=item.item_id, categories=["space"], **wanted)

    def test_each_bad_patch_is_refused_by_itself(self, client, fresh):
        item = fresh(title="t", price=5, available_from_ms=1000)
        name = item.item_id

        def masked(*paths: str) -> catalog_pb2.ItemPatch:
            return catalog_pb2.ItemPatch(item=Item(item_id=name), update_mask=field_mask_pb2.FieldMask(paths=paths))

        bad = [
            (item_patch("?", price=1), NOT_FOUND, "item_id", "put it first"),
            (item_patch("", price=1), INVALID, "item_id", "required"),
            (item_patch(name, price=-1), INVALID, "price", "at least 0"),
            (item_patch(name, title="t" * 1025), INVALID, "title", "1024"),
            (item_patch(name, categories=["c"] * 17), INVALID, "categories", "16"),
            # The other end of the window is the one that the catalogue has.
            (item_patch(name, available_until_ms=999), INVALID, "available_until_ms", "after available_from_ms"),
            (masked("prices"), INVALID, "update_mask", "did you mean 'price'?"),
            (masked("*"), INVALID, "update_mask", "no field of an item"),
            (masked("attributes.colour"), INVALID, "update_mask", "no field of an item"),
            (masked("item_id"), INVALID, "update_mask", "cannot be changed"),
            (masked(*["price"] * 65), INVALID, "update_mask", "0 to 64"),
            (catalog_pb2.ItemPatch(item=Item(item_id=name)), INVALID, "update_mask", "names no field"),
            (catalog_pb2.ItemPatch(), INVALID, "item_id", "required"),
        ]
        answer = client.patch_items([*(patch for patch, *_ in bad), item_patch(name, title="good")])
        for status, (_, code, field, message) in zip(answer.statuses, bad, strict=False):
            assert (status.code, status.field) == (code, field), status
            assert message in status.message, status
        assert answer.statuses[-1].code == 0
        [got] = client.get_items([name]).items
        assert got == Item(item_id=name, title="good", price=5, available=True, available_from_ms=1000)

    def test_a_deleted_item_is_not_patched_back_and_a_put_begins_anew(self, client, everywhere, fresh):
        item = fresh(title="t", price=5)
        client.patch_items([item_patch(item.item_id, description="patched")])
        client.delete_items([item.item_id])
        [status] = client.patch_items([item_patch(item.item_id, available=True)]).statuses
        assert status.code == NOT_FOUND
        for _ in range(4):
            got = everywhere.get_items([item.item_id, "i0"])
            assert [one.item_id for one in got.items] == ["i0"]
            assert list(got.missing_item_ids) == [item.item_id]
        client.put_items([Item(item_id=item.item_id, title="again")])
        [got] = client.get_items([item.item_id]).items
        assert got == Item(item_id=item.item_id, title="again", available=True)


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "title": st.none() | st.sampled_from(["a b", "ä", "0"]),
        "description": st.none() | st.text("xy", max_size=3),
        "categories": st.none() | st.lists(st.sampled_from(["space", "romance"]), max_size=2),
        "creator_id": st.none() | st.sampled_from(["c1", "new"]),
        "price": st.none() | st.sampled_from([0.0, 1.5]),
        "available": st.none() | st.booleans(),
        "available_from_ms": st.none() | st.sampled_from([0, 5]),
        "available_until_ms": st.none() | st.sampled_from([0, 7, 4_000_000_000_000]),
        "parent_id": st.none() | st.sampled_from(["i1"]),
        "attributes": st.none() | st.dictionaries(st.sampled_from("ab"), st.text("xy:", max_size=2), max_size=2),
    },
)
STEPS = st.lists(st.tuples(st.sampled_from(["put", "patch", "patch", "delete", "show"]), st.integers(0, 1), FIELDS))


class Model:
    """A catalogue in plain Python: item -> its fields."""

    def __init__(self) -> None:
        self.items: dict[str, dict[str, Any]] = {}

    def step(self, kind: str, name: str, fields: dict[str, Any]) -> None:
        if kind == "put":
            self.items[name] = {field: value for field, value in fields.items() if value is not None}
        elif name not in self.items:
            return
        elif kind == "delete":
            del self.items[name]
        elif kind == "patch":
            left = {field: value for field, value in self.items[name].items() if field not in fields}
            self.items[name] = left | {field: value for field, value in fields.items() if value is not None}
        else:
            self.items[name] |= {"available": True, "available_from_ms": 3, "available_until_ms": 0}


def call(client: Client, kind: str, name: str, fields: dict[str, Any]) -> None:
    given = {field: value for field, value in fields.items() if value is not None}
    if kind == "put":
        client.put_items([Item(item_id=name, **given)])
    elif kind == "delete":
        client.delete_items([name])
    elif kind == "patch" and fields:
        client.patch_items([item_patch(name, **fields)])
    elif kind == "show":
        client.set_availability([catalog_pb2.Availability(item_id=name, available=True, available_from_ms=3)])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_any_changes_leave_what_a_plain_catalogue_has(client, everywhere, steps):
    names = [f"model-{uuid.uuid4().hex}" for _ in range(2)]
    model = Model()
    for kind, number, fields in steps:
        model.step(kind, names[number], fields)
        call(client, kind, names[number], fields)
    wanted = [whole(Item(item_id=name, **model.items[name])) for name in names if name in model.items]
    for _ in range(3):
        got = everywhere.get_items(names)
        assert list(got.items) == wanted
        assert list(got.missing_item_ids) == [name for name in names if name not in model.items]
    client.delete_items(names)


class TestPut:
    def test_a_put_says_that_it_replaces_and_what_is_gone(self, client, fresh):
        item = fresh(title="t", price=5, categories=["space"], attributes={"a": "1"})
        [first, known, new] = client.put_items(
            [Item(item_id=item.item_id, title="u"), Item(item_id="i5", title="x"), Item(item_id=f"{item.item_id}-2")]
        ).statuses
        try:
            assert (first.code, first.replaced) == (0, True)
            assert list(first.cleared_fields) == ["categories", "price", "attributes"]
            assert "PatchItems" in first.message
            assert "price" in known.cleared_fields
            assert (new.replaced, list(new.cleared_fields), new.message) == (False, [], "")
            [again] = client.put_items([Item(item_id=item.item_id, title="v", price=1)]).statuses
            assert (again.replaced, list(again.cleared_fields), again.message) == (True, [], "")
        finally:
            client.delete_items([f"{item.item_id}-2"])
            client.put_items([whole_of_the_world("i5")])


def whole_of_the_world(name: str) -> Item:
    from tests.world import items

    [said] = [item for item in items() if item["item_id"] == name]
    return Item(**said)


class TestGet:
    def test_what_the_bundle_has_is_there_and_what_nobody_has_is_named(self, client):
        got = client.get_items(["i3", "?", "i0", "i3", "?"])
        assert list(got.items) == [whole(whole_of_the_world("i3")), whole(whole_of_the_world("i0"))]
        assert list(got.missing_item_ids) == ["?"]
        assert not got.remaining_item_ids

    def test_what_does_not_fit_is_named(self, client, fresh):
        items = [
            fresh(description="é" * 16_384, attributes={str(at): "x" * 1000 for at in range(64)}) for _ in range(45)
        ]
        names = [item.item_id for item in items]
        got = client.get_items(names)
        assert 1 < len(got.items) < 45
        assert [one.item_id for one in got.items] + list(got.remaining_item_ids) == names

    def test_a_version_that_does_not_come_is_waited_for_a_while_only(self, client):
        got = client.get_items(["i3"], min_catalog_version=2**62)
        assert [item.item_id for item in got.items] == ["i3"]
        assert got.catalog_version < 2**62

    @pytest.mark.parametrize("names", [[], ["i1"] * 1001, [""], ["x" * 513]])
    def test_bounds(self, client, names):
        with pytest.raises(grpc.RpcError) as failure:
            client.get_items(names)
        assert next(iter(violations(failure.value))).startswith("item_ids")


class TestFields:
    def test_every_ranking_call_carries_the_fields_that_are_asked_for(self, client, ann, fresh):
        item = fresh(title="space premiere", categories=["space"], attributes={"image": "a.png", "colour": "red"})
        fields = ["title", "price", "attributes.image"]
        client.ingest([event(ann, "i1", "view_item")])
        slates = [
            client.recommend(user_id=ann, fields=fields),
            client.search("space", fields=fields),
            client.rank(["i5", "stranger", item.item_id], fields=fields),
            client.similar_items(["i1"], fields=fields),
        ]
        for slate in slates:
            lines = {line.item_id: line for line in slate.items}
            assert lines["i5"].item == Item(item_id="i5", title="space story number5", price=6)
            assert lines[item.item_id].item == Item(
                item_id=item.item_id, title="space premiere", attributes={"image": "a.png"}
            )
        assert not {line.item_id: line for line in slates[2].items}["stranger"].HasField("item")

    def test_all_fields_are_what_get_items_returns(self, client, fresh):
        item = fresh(title="t", description="d", categories=["space", "x"], creator_id="c", price=1, parent_id="i1")
        fields = [field.name for field in Item.DESCRIPTOR.fields if field.name != "item_id"]
        wanted = {one.item_id: one for one in client.get_items([item.item_id, "i5"]).items}
        for line in client.rank([item.item_id, "i5"], fields=fields).items:
            assert line.item == wanted[line.item_id]

    def test_no_fields_no_items(self, client):
        assert not any(line.HasField("item") for line in client.search("space").items)

    @pytest.mark.parametrize(
        ("fields", "field", "message"),
        [
            (["title", "prize"], "options.fields[1]", "did you mean 'price'?"),
            (["Title"], "options.fields[0]", "did you mean 'title'?"),
            ([""], "options.fields[0]", "title, description, categories"),
            (["attributes."], "options.fields[0]", "attributes.NAME"),
            (["item_id"], "options.fields[0]", "it has title"),
            (["popularity"], "options.fields[0]", "no field of an item"),
            (["attributes." + "x" * 512], "options.fields[0]", "512"),
            (["title"] * 65, "options.fields", "64"),
        ],
    )
    def test_an_unknown_field_is_refused_and_those_there_are_named(self, client, fields, field, message):
        with pytest.raises(grpc.RpcError) as failure:
            client.search("space", fields=fields)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert message in violations(failure.value)[field]


class TestEventTypes:
    @pytest.mark.parametrize(
        ("kind", "meant"),
        [
            ("impression", "view_item_list"),
            ("impressions", "view_item_list"),
            ("Purchase", "purchase"),
            ("purchased", "purchase"),
            ("buy", "purchase"),
            ("clicks", "select_item"),
            ("View ", "view_item"),
            ("View_Item", "view_item"),
            ("addToCart", "add_to_cart"),
        ],
    )
    def test_a_type_that_looks_like_a_documented_one_is_kept_with_a_hint(self, client, ann, kind, meant):
        hinted, plain = client.ingest([event(ann, "i1", kind), event(ann, "i2", "view_item")])
        assert (hinted.code, hinted.applied, plain.message) == (0, True, "")
        assert f"did you mean {meant!r}" in hinted.message
        assert hinted.message.startswith("durable, but ")

    def test_both_hints_of_an_event(self, client, ann):
        [status] = client.ingest([event(ann, "nothing", "impression")])
        assert status.code == 0
        assert "the catalogue has no item 'nothing'" in status.message
        assert "did you mean 'view_item_list'" in status.message

    @pytest.mark.parametrize("kind", ["long_view", "share", "add_to_wishlist", "view_item", "search"])
    def test_a_type_of_the_products_own_has_none(self, client, ann, kind):
        [status] = client.ingest([event(ann, "i1", kind, query="words")])
        assert (status.code, status.message) == (0, "")

    def test_what_was_only_shown_is_no_liking(self, client, ann):
        shown = [event(ann, f"i{row}", "view_item_list") for row in range(1, 40, 4)]
        client.ingest([*shown, event(ann, "i3", "hide"), event(ann, "i7", "dislike")])
        profile = client.get_profile(ann)
        assert profile.event_count == 12
        assert (list(profile.categories), profile.segment, profile.visit.category) == ([], "", "")
        slate = client.recommend(user_id=ann, page_size=5, explain=True)
        assert slate.rung == common_pb2.RUNG_POPULAR
        assert [line.item_id for line in slate.items] == ["i0", "i1", "i2", "i4", "i5"]
        assert {reason.kind for line in slate.items for reason in line.reasons} == {"popular"}
        # What is chosen then is all that counts, however often the rest was shown.
        client.ingest([event(ann, "i2", "view_item")])
        profile = client.get_profile(ann)
        assert [(one.name, one.share) for one in profile.categories] == [("romance", 1)]
        assert (profile.segment, profile.visit.category) == ("romance", "romance")
        slate = client.recommend(user_id=ann, page_size=9, explain=True)
        assert slate.rung == common_pb2.RUNG_SEQUENCE
        assert {line.item_id for line in slate.items} == rows_of("romance") - {"i2"}
        like = [reason for line in slate.items for reason in line.reasons if reason.kind == "like_history"]
        assert {reason.item_id for reason in like} == {"i2"}


class TestControls:
    def test_what_is_set_is_matched_or_named(self, client, ann, fresh):
        item = fresh(title="t", categories=["Neo Noir"], creator_id="Studio-A")
        hidden = [
            ("item", "i1", 0),
            ("item", item.item_id.upper(), 0),
            ("creator", "studio_a", 0),
            ("creator", "nobody at all", 0),
            ("category", "Western", 0),
            ("category", "Neo Noir", 0),
            ("category", "spaec", 0),
        ]
        dials = common_pb2.Dials(novelty=0.5, categories={"comedys": 1, "romance": 1}, creators={"C1": -1})
        answer = client.set_controls(hidden, ann, dials=dials)
        assert {(one.field, one.id) for one in answer.matched} == {
            ("hidden[0].id", "i1"),
            ("hidden[5].id", "Neo Noir"),
            ("dials.categories", "romance"),
        }
        assert {(one.field, one.id, one.did_you_mean) for one in answer.unknown} == {
            ("hidden[1].id", item.item_id.upper(), item.item_id),
            ("hidden[2].id", "studio_a", "Studio-A"),
            ("hidden[3].id", "nobody at all", ""),
            ("hidden[4].id", "Western", "western"),
            ("hidden[6].id", "spaec", "space"),
            ("dials.categories", "comedys", "comedy"),
            ("dials.creators", "C1", "c1"),
        }
        # All of it is stored, and holds as soon as the catalogue has it.
        assert len(client.get_controls(ann).hidden) == len(hidden)
        late = fresh(title="late", categories=["Western"])
        assert late.item_id not in {line.item_id for line in client.search("late", user_id=ann, page_size=50).items}

    def test_controls_of_what_is_there_name_nothing(self, client, ann):
        answer = client.set_controls([("category", "space", 0)], ann)
        assert (len(answer.matched), len(answer.unknown)) == (1, 0)
        answer = client.set_controls([], ann)
        assert (len(answer.matched), len(answer.unknown)) == (0, 0)


class TestClient:
    @pytest.mark.parametrize("method", ["recommend", "search", "rank", "similar_items"])
    def test_an_option_that_does_not_exist_is_refused_with_the_nearest_one(self, client, method):
        given = {"search": ["x"], "rank": [["i1"]], "similar_items": [["i1"]]}.get(method, [])
        with pytest.raises(TypeError, match=rf"{method}\(\) has no option 'pagesize': did you mean 'page_size'"):
            getattr(client, method)(*given, user_id="ann", pagesize=3)

    def test_events(self, client, ann):
        [status] = client.ingest([event(anonymous_id=ann, item_id="i1", event_type="view_item", session_id="s")])
        assert (status.code, status.message) == (0, "")
        assert client.get_profile(anonymous_id=ann).event_count == 1
        assert client.get_profile(ann).event_count == 0
        with pytest.raises(TypeError, match="has no option 'requestid': did you mean 'request_id'"):
            event(ann, "i1", "view_item", requestid="r")
        # What else is wrong with an event the service says, event by event.
        statuses = client.ingest([event("", "i1", "view_item"), event(ann, "i1"), event(ann, "", "search", query="x")])
        assert [status.field for status in statuses] == ["subject", "event_type", ""]

    def test_patches(self):
        with pytest.raises(TypeError, match="has no option 'prize': did you mean 'price'"):
            item_patch("i1", prize=1)
        with pytest.raises(ValueError, match="names no field"):
            item_patch("i1")

    def test_versions_are_texts_in_json(self, client):
        answer = json_format.MessageToDict(
            client.set_availability([catalog_pb2.Availability(item_id="i1", available=True)])
        )
        assert isinstance(answer["catalogVersion"], str)
