"""The attributes that a product tells of a user: kept, shown, joined and forgotten as controls are."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from features.controls import (
    Dial,
    attribute_controls,
    attributes_among,
    attributes_of_text,
    attributes_text,
    decode,
    dials,
)
from features.profile import EVERY_PURPOSE, Purpose
from penchant.client import event
from penchant.v1 import common_pb2
from serving.errors import ConsentWithheld
from serving.privacy.certificates import Certificates
from serving.privacy.controls import DialControl, SharedArm, UserAttribute, parse_controls, to_log, to_profile
from serving.privacy.rights import SubjectRights

TOLD = {"plan": "family", "years": "34", "": "empty", "note": ""}


@pytest.fixture
def people(log, store):
    return SubjectRights(log, store, Certificates(log))


def test_both_stored_forms_keep_them() -> None:
    stored = [UserAttribute(*one) for one in TOLD.items()] + [DialControl(Dial.NOVELTY, "", 0.5), SharedArm(7)]
    assert parse_controls(to_log(stored)) == stored
    kept = decode(to_profile(stored))
    np.testing.assert_array_equal(attributes_among(kept), attribute_controls(TOLD))
    assert dials(kept) == {(Dial.NOVELTY, 0): 0.5}
    np.testing.assert_array_equal(attributes_of_text(attributes_text(kept)), attribute_controls(TOLD))
    assert attributes_of_text("no base64!").size == attributes_of_text("abcd").size == 0


def test_they_hold_at_once_and_controls_leave_them(people, store) -> None:
    version, applied = people.set_attributes("u:ann", TOLD)
    assert applied
    assert people.attributes("u:ann") == TOLD
    assert store.read("u:ann").controls.size == len(TOLD) + 1
    assert people.controls("u:ann") == ([], 0)
    later, _ = people.set_controls("u:ann", [DialControl(Dial.FRESHNESS, "", 1.0)])
    assert later > version
    assert people.attributes("u:ann") == TOLD
    people.set_attributes("u:ann", {"plan": "single"})
    assert people.controls("u:ann")[0] == [DialControl(Dial.FRESHNESS, "", 1.0)]
    people.reset("u:ann")
    assert people.attributes("u:ann") == {"plan": "single"}
    people.set_attributes("u:ann", {})
    assert people.attributes("u:ann") == {}
    assert attributes_among(store.read("u:ann").controls).size == 0


def test_they_go_with_the_consent_to_personal_answers(people, store) -> None:
    people.set_attributes("u:ann", TOLD)
    people.set_consent("u:ann", Purpose.TRAIN | Purpose.MEASURE)
    assert people.attributes("u:ann") == {}
    assert not store.read("u:ann").controls.size
    with pytest.raises(ConsentWithheld, match="attributes"):
        people.set_attributes("u:ann", TOLD)
    people.set_attributes("u:ann", {})
    people.set_consent("u:ann", EVERY_PURPOSE)
    assert people.attributes("u:ann") == {}


def test_they_go_with_an_erasure(people, store) -> None:
    people.set_attributes("u:ann", TOLD)
    people.erase("u:ann")
    assert people.attributes("u:ann") == {}
    assert not store.read("u:ann").controls.size


def test_a_merge_joins_them_and_those_of_the_known_user_hold(people) -> None:
    people.set_attributes("a:tab", {"plan": "none", "skin": "dark"})
    people.set_attributes("u:ann", {"plan": "family"})
    people.merge("a:tab", "u:ann")
    assert people.attributes("u:ann") == {"plan": "family", "skin": "dark"}
    assert people.attributes("a:tab") == {}
    people.set_attributes("a:new", {"skin": "light"})
    people.merge("a:new", "u:bob")
    assert people.attributes("u:bob") == {"skin": "light"}
    # The device goes on to share the arm of the user whatever is told of it.
    people.set_attributes("a:tab", {"skin": "light"})
    people.set_controls("a:tab", [])
    assert people.attributes("a:tab") == {"skin": "light"}
    assert any(isinstance(one, SharedArm) for one in people._marks.stored_controls("a:tab")[0])


def test_the_contract(client) -> None:
    assert client.set_attributes({"plan": "family"}, "told").applied
    assert dict(client.get_controls("told").attributes) == {"plan": "family"}
    client.set_controls([("item", "i3", 0)], "told", dials=common_pb2.Dials(novelty=0.5))
    assert dict(client.get_controls("told").attributes) == {"plan": "family"}
    client.ingest([event("told", "i0", "view_item")])
    assert "i3" not in [item.item_id for item in client.recommend(user_id="told", page_size=40).items]
    assert {"kind": "attributes", "attributes": {"plan": "family"}} in list(client.export_subject("told"))
    for wrong in ({str(number): "" for number in range(65)}, {"long": "x" * 1024}):
        with pytest.raises(grpc.RpcError) as caught:
            client.set_attributes(wrong, "told")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "attributes" in caught.value.details()
    with pytest.raises(grpc.RpcError, match=r"options\.context\.time_zone: 'Mars/Base' is no IANA name"):
        client.recommend(user_id="told", context=common_pb2.RequestContext(time_zone="Mars/Base"))
    assert client.recommend(user_id="told", context=common_pb2.RequestContext(time_zone="Asia/Kathmandu")).items
