"""A damaged profile is shown as damaged by everything that shows it, obeys what the user says, and is repaired."""

from __future__ import annotations

import operator
import time

import grpc
import pyarrow as pa
import pytest

from features.controls import ControlKind, blocked_keys
from features.errors import ProfileCorrupt
from features.keys import item_key
from features.profile import Purpose
from features.tables.dataset import write_dataset
from penchant.client import event
from penchant.v1 import common_pb2
from serving.log_retention import PROFILES_GROUP
from serving.privacy.certificates import Certificates
from serving.privacy.controls import BlockControl
from serving.privacy.rights import SubjectRights
from serving.projection.profile_view import show
from serving.projection.rebuild import rebuild
from serving.redis.client import connect
from serving.stores.keys import log_id
from serving.stores.profiles import ProfileStore
from tests.serving.faults import wait_until
from tests.serving.logged import event as logged_event
from tests.serving.logged import logged
from tests.world import rows_of

REPAIR = "penchant profiles rebuild"


def flip(redis, key):
    """One bit of the newest event, which its checksum tells."""
    blob = bytearray(redis.get(key))
    blob[-10] ^= 1
    redis.set(key, bytes(blob))


def cut(redis, key):
    redis.set(key, redis.get(key)[:-7])


def garbage(redis, key):
    redis.set(key, b"not a profile")


def another_type(redis, key):
    with redis.pipeline(transaction=True) as together:  # in between, a new profile could begin
        together.delete(key)
        together.rpush(key, "a list")
        together.execute()


DAMAGES = [flip, cut, garbage, another_type]


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_call_about_a_damaged_profile_says_so(client, service, ann, damage):
    events = [event(ann, item, "view_item") for item in ("i0", "i4")]
    client.ingest(events)
    client.set_consent(["personalise", "train", "measure"], ann)
    client.set_controls([("item", "i8", 0)], ann)
    whole = client.get_profile(ann)
    assert (whole.found, whole.damage, whole.event_count) == (True, "", 2)
    await_projector(service)
    with connect(service.ready["redis"], 2.0) as redis:
        damage(redis, ProfileStore(redis).key_of(f"u:{ann}"))

    shown = client.get_profile(ann)
    assert shown.found
    assert REPAIR in shown.damage
    assert (len(shown.purposes), shown.consent_given, list(shown.events)) == (3, True, [])
    slate = client.recommend(user_id=ann, page_size=5)
    [degraded] = slate.degraded
    assert degraded.part == common_pb2.PART_PROFILE_CORRUPT
    assert REPAIR in degraded.reason
    assert (slate.profile_found, slate.rung) == (False, common_pb2.RUNG_POPULAR)
    assert [one.id for one in client.get_controls(ann).hidden] == ["i8"]
    with pytest.raises(grpc.RpcError) as caught:
        client.undo_event(events[0].event_id, ann)
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    assert REPAIR in caught.value.details()
    documents = list(client.export_subject(ann))
    assert [one["event_id"] for one in documents if one["kind"] == "event"] == [one.event_id for one in events]
    damaged = {one["kind"]: one["damage"] for one in documents if "damage" in one}
    assert damaged.keys() == {"profile", "counts"}
    assert all(REPAIR in text for text in damaged.values())

    # What the user says holds at once, for all that the past is lost; and that stays known.
    assert client.set_controls([("category", "western", 0)], ann).applied
    client.ingest([event(ann, "i1", "view_item")])
    slate = client.recommend(user_id=ann, page_size=30)
    assert not {item.item_id for item in slate.items} & rows_of("western")
    assert [one.part for one in slate.degraded] == [common_pb2.PART_PROFILE_CORRUPT]
    assert slate.profile_found
    shown = client.get_profile(ann)
    assert shown.found
    assert shown.event_count >= 1  # the projector may be late with the others
    assert REPAIR in shown.damage
    assert client.merge_identities(f"tab-{ann}", ann).damaged is False  # this one can be read, and takes what moves
    assert client.reset_learning(ann).applied
    after = client.get_profile(ann)
    assert (after.found, after.damage) == (False, "")
    assert not client.recommend(user_id=ann, page_size=5).degraded


@pytest.mark.parametrize("who", ["visitor", "known"])
def test_a_merge_tells_of_damage(client, service, ann, who):
    tab = f"tab-{ann}"
    moved = event(tab, "i0", "view_item")
    moved.subject.CopyFrom(common_pb2.Subject(anonymous_id=tab))
    client.ingest([moved, event(ann, "i4", "view_item")])
    await_projector(service)
    with connect(service.ready["redis"], 2.0) as redis:
        flip(redis, ProfileStore(redis).key_of(f"a:{tab}" if who == "visitor" else f"u:{ann}"))
    merged = client.merge_identities(tab, ann)
    assert (merged.damaged, merged.events) == (True, 1)
    assert client.get_profile(ann).event_count == (2 if who == "visitor" else 0)
    assert bool(client.get_profile(ann).damage) == (who == "known")
    assert client.get_profile(anonymous_id=tab).found is False
    receipts = client.erase(ann).receipts
    assert {one.store for one in receipts} >= {"profiles", "events"}
    assert client.get_profile(ann).damage == ""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("spoken", [False, True])
def test_a_rebuild_repairs_it_with_all_that_the_log_knows(
    log, store, profiles_server, events_server, profiles_redis, tmp_path, damage, spoken
):
    store.open()
    people = SubjectRights(log, store, Certificates(log))
    take(log, store, *(logged_event("ann", f"i{n}", event_id=f"e{n}") for n in range(3)))
    people.set_controls("u:ann", [BlockControl(ControlKind.ITEM, "i9")])
    whole = store.read("u:ann")
    damage(profiles_redis, store.key_of("u:ann"))
    said = show("ann", profiles_server.url)
    assert (said["found"], said.keys()) == (True, {"user", "found", "damage"})
    assert REPAIR in said["damage"]
    with pytest.raises(ProfileCorrupt, match=REPAIR):
        store.read("u:ann")
    if spoken:
        people.set_controls("u:ann", [BlockControl(ControlKind.ITEM, "i8")])
        take(log, store, logged_event("ann", "i5", event_id="e5"))
        assert store.compact("u:ann", 1 << 63)
        assert store.read("u:ann").lost
        assert store.read("u:ann").count == 1
        assert REPAIR in show("ann", profiles_server.url)["damage"]
        assert show("ann", profiles_server.url)["event_count"] == 1
    data = tmp_path / "data"
    rows = {"user_id": ["bob"], "item_id": ["i1"], "event_type": ["like"], "timestamp": [1_700_000_000_000]}
    write_dataset(data, pa.table(rows), pa.table({"item_id": ["i1"]}), name="test")
    rebuild(data, profiles_server.url, events_server.url)
    again = store.read("u:ann")
    assert (again.lost, again.count) == (False, 4 if spoken else 3)
    held = blocked_keys(again.controls, ControlKind.ITEM, 0).tolist()
    assert held == [item_key("i8" if spoken else "i9")]
    if not spoken:
        assert again.records.tobytes() == whole.records.tobytes()
    assert show("ann", profiles_server.url)["damage"] == ""


def test_consent_that_is_withdrawn_holds_for_a_damaged_profile(log, store, profiles_redis):
    people = SubjectRights(log, store, Certificates(log))
    take(log, store, logged_event("ann", "i1"))
    garbage(profiles_redis, store.key_of("u:ann"))
    people.set_consent("u:ann", Purpose.TRAIN)
    profile = store.read("u:ann")
    assert (profile.consent, profile.lost, profile.count) == (Purpose.TRAIN, False, 0)


def await_projector(service):
    """Waits until the projector has applied what the log holds now: it applies all again, to a damaged profile too."""
    with connect(service.ready["events_redis"], 2.0) as redis:
        streams = list(redis.scan_iter(b"*:events", _type="stream"))
        ends = [log_id(redis.xinfo_stream(stream)["last-generated-id"]) for stream in streams]

        def all_read():
            groups = [group for stream in streams for group in redis.xinfo_groups(stream)]
            read = [log_id(group["last-delivered-id"]) for group in groups if group["name"] == PROFILES_GROUP.encode()]
            return all(map(operator.ge, read, ends))

        wait_until(all_read)
        begun = time.monotonic()

        # It applies what it has read before it asks for more.
        def asked_again():
            consumers = (one for stream in streams for one in redis.xinfo_consumers(stream, PROFILES_GROUP))
            return min(one["idle"] for one in consumers) < (time.monotonic() - begun) * 1000 - 1

        wait_until(asked_again)


def take(log, store, *events):
    """What Ingest does."""
    for appended in log.append(logged(*events)):
        store.apply("u:ann", [(appended.log_id, appended.record)])
