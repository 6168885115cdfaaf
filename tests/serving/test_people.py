"""What people ask for about themselves, on real stores: it holds at once, and nothing brings the past back."""

from __future__ import annotations

import json
import resource
import threading
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from features.clock import now_ms
from features.controls import MAX_CONTROLS, ControlKind, Dial, blocked_keys, dials
from features.errors import ProfileCorrupt
from features.keys import event_type_key, item_key
from features.profile import EVERY_PURPOSE, Purpose, Retention
from features.records import make_records
from features.subjects import partition_of
from features.tables.dataset import write_dataset
from serving.errors import (
    ConsentWithheld,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ProfileStoreUnavailable,
    ServingError,
    Unavailable,
)
from serving.log_retention import PROFILES_GROUP, LogRetention
from serving.privacy.certificates import Certificates
from serving.privacy.controls import BlockControl, DialControl
from serving.privacy.ledger import Erasure, Ledger
from serving.privacy.purge import Purger
from serving.privacy.replay import replay
from serving.privacy.rights import SubjectRights
from serving.projection.projector import Projector
from serving.projection.rebuild import rebuild
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.keys import address_of, stream_id
from serving.stores.log_entries import LoggedEvent, LoggedImpression
from serving.stores.log_erasure import LogErasure
from serving.stores.profile_eviction import Evictions
from serving.stores.profiles import ProfileStore
from serving.stores.restore_requests import RestoreRequests
from serving.stores.user_statements import Consent, UserStatements
from tests.serving.faults import insist, wait_until
from tests.serving.logged import NOTHING_KEPT, PARTITIONS

FUTURE = 4_000_000_000_000
NOTHING = Purpose(0)


@pytest.fixture
def people(log, store):
    return SubjectRights(log, store, Certificates(log))


def event(number: int, subject: str = "u:ann", timestamp: int = FUTURE, kind: str = "view_item") -> LoggedEvent:
    """The event whose number is its item."""
    record = make_records(item_key(f"i{number}"), 0, 0, timestamp, np.nan, event_type_key(kind)).tobytes()
    payload = {
        "user_id": subject[2:],
        "anonymous": subject[0] == "a",
        "event_id": f"e{number}",
        "item_id": f"i{number}",
    }
    return LoggedEvent(subject, f"e{number}", record, json.dumps(payload).encode())


def slate(number: int, subject: str = "u:ann", timestamp: int = FUTURE) -> LoggedImpression:
    payload = {"request_id": f"r{number}", "user_id": subject[2:], "timestamp": timestamp, "profile_version": 3}
    return LoggedImpression(subject, timestamp, json.dumps(payload).encode())


def ingest(log: EventLog, store: ProfileStore, *events: LoggedEvent) -> list[int]:
    """What Ingest does; the log ids."""
    appended = log.append(events)
    assert [one.error for one in appended] == [None] * len(events)
    for one, done in zip(events, appended, strict=True):
        if done.personal:
            store.apply(one.subject, [(done.log_id, done.record)])
    return [one.log_id for one in appended]


def project(log: EventLog, store: ProfileStore, **options) -> None:
    """A projector that knows nothing yet brings all that is pending and new, twice as after a restart."""
    for _ in range(2):
        projector = Projector(log, store, **{"settle_s": 60, "lease_ms": 1, **options})
        projector.open()
        idle = 0
        while idle < 2:
            idle = 0 if projector.step() else idle + 1
        projector.close()


def items(store: ProfileStore, subject: str = "u:ann") -> list[int]:
    names = {item_key(f"i{number}"): number for number in range(2000)}
    return [names[int(key)] for key in store.read(subject).records["item"]]


def held(people: SubjectRights, subject: str = "u:ann") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"event": [], "impression": []}
    for kind, _, payload in people.documents(subject):
        value = json.loads(payload)
        found[kind].append(value.get("event_id") or value["request_id"])
    return found


class TestConsent:
    def test_who_said_nothing_allows_the_default(self, people, log, events_redis):
        assert people.consents(["u:ann", "a:ann"]) == [Consent(EVERY_PURPOSE, 0, 0)] * 2
        shy = EventLog(events_redis, PARTITIONS, default=Purpose.MEASURE)
        assert UserStatements(shy).consents(["u:ann"]) == [Consent(Purpose.MEASURE, 0, 0)]
        assert not shy.append([event(1)])[0].personal

    @pytest.mark.parametrize("purposes", list(map(Purpose, range(8))))
    def test_events_and_slates_are_kept_for_what_is_allowed_only(self, people, log, store, purposes):
        ingest(log, store, event(1))
        version, applied = people.set_consent("u:ann", purposes)
        assert applied
        [consent] = people.consents(["u:ann"])
        assert (consent.purposes, consent.set_at) == (purposes, version)
        [appended] = log.append([event(2)])
        assert isinstance(appended.error, ConsentWithheld) == (purposes == NOTHING)
        assert log.append_impressions([slate(1)]) == bool(purposes & (Purpose.TRAIN | Purpose.MEASURE))
        if purposes:
            assert appended.personal == (Purpose.PERSONALISE in purposes)
            assert log.append([event(2)])[0].personal == appended.personal  # a retry is told the same
        project(log, store)
        assert items(store) == ([1, 2] if Purpose.PERSONALISE in purposes else [])
        assert store.read("u:ann").consent == purposes
        assert people.consents(["u:bob"])[0].purposes == EVERY_PURPOSE

    def test_the_profile_refuses_whoever_comes_late(self, people, log, store):
        [early] = ingest(log, store, event(1))
        people.set_consent("u:ann", Purpose.TRAIN)
        assert store.apply("u:ann", [(early, event(1).record)]).refused == 1
        assert store.apply("u:ann", [(early + (1 << 40), event(1).record)]).refused == 1
        version, _ = people.set_consent("u:ann", EVERY_PURPOSE)
        assert store.apply("u:ann", [(early, event(1).record)]).refused == 1  # from before: stays forgotten
        assert store.apply("u:ann", [(version + 1, event(2).record)]).inserted == 1

    def test_an_older_word_never_undoes_a_newer_one(self, people, log, store):
        people.set_consent("u:ann", NOTHING)
        people.set_consent("u:ann", EVERY_PURPOSE)
        people.set_consent("u:ann", Purpose.MEASURE)
        marks = [entry.mark for entry in log.read(partition_of("u:ann", PARTITIONS)) if entry.mark]
        assert [mark.consent for mark in marks] == [NOTHING, EVERY_PURPOSE, Purpose.MEASURE]
        for mark in reversed(marks):
            store.mark(partition_of("u:ann", PARTITIONS), mark)
            assert store.read("u:ann").consent == Purpose.MEASURE

    def test_what_is_said_while_the_profiles_are_away_holds_when_they_are_back(self, log, store, tmp_path):
        ingest(log, store, event(1))
        with connect(f"unix://{tmp_path}/nothing.sock", 0.1) as nowhere:
            away = SubjectRights(log, ProfileStore(nowhere, PARTITIONS), Certificates(log))
            assert away.set_consent("u:ann", Purpose.TRAIN)[1] is False
        assert items(store) == [1]
        project(log, store)
        assert items(store) == []
        assert store.read("u:ann").consent == Purpose.TRAIN

    def test_a_batch_with_a_withdrawal_and_a_grant_ends_as_said(self, log, store, tmp_path):
        with connect(f"unix://{tmp_path}/nothing.sock", 0.1) as nowhere:
            away = SubjectRights(log, ProfileStore(nowhere, PARTITIONS, cooldown_s=0), Certificates(log))
            log.append([event(1)])
            away.set_consent("u:ann", Purpose.TRAIN)
            log.append([event(2)])
            away.set_consent("u:ann", EVERY_PURPOSE)
            log.append([event(3)])
        project(log, store)
        assert items(store) == [3]

    def test_lost_profiles_know_again_what_they_may_not_hold(
        self, people, log, store, tmp_path, servers, profiles_redis
    ):
        rows = [
            {"user_id": user, "item_id": "i1", "event_type": "view_item", "timestamp": 1_700_000_000_000 + n}
            for n, user in enumerate(("ann", "bob", "cleo", "dora"))
        ]
        write_dataset(tmp_path / "data", pa.Table.from_pylist(rows), pa.table({"item_id": ["i1"]}), name="test")
        people.set_consent("u:ann", Purpose.TRAIN)
        people.reset("u:bob")
        people.erase("u:cleo")
        profiles_redis.flushall()  # the profiles are lost, the log is not
        answer = rebuild(tmp_path / "data", *servers, partitions=PARTITIONS)
        assert answer["profiles"] == 1
        assert [store.read(f"u:{name}").count for name in ("ann", "bob", "cleo", "dora")] == [0, 0, 0, 1]
        assert store.read("u:ann").consent == Purpose.TRAIN


@pytest.fixture
def servers(profiles_server, events_server):
    return profiles_server.url, events_server.url


class TestRules:
    RULES = (
        BlockControl(ControlKind.ITEM, "i1"),
        BlockControl(ControlKind.CREATOR, "m\0{}", 5000),
        BlockControl(ControlKind.CATEGORY, "tea"),
        DialControl(Dial.NOVELTY, "", -0.5),
        DialControl(Dial.CATEGORY_WEIGHT, "tea", 0.25),
    )

    def stored(self, store, subject="u:ann"):
        rules = store.read(subject).controls
        turned = {(Dial.NOVELTY, 0): -0.5, (Dial.CATEGORY_WEIGHT, item_key("tea")): 0.25} if rules.size > 3 else {}
        assert dials(rules) == turned
        return [blocked_keys(rules, kind, 4999).tolist() for kind in ControlKind]

    def test_they_are_known_in_words_by_the_log_and_as_keys_by_the_profile(self, people, log, store):
        assert people.controls("u:ann") == ([], 0)
        version, applied = people.set_controls("u:ann", self.RULES)
        assert applied
        assert people.controls("u:ann") == (list(self.RULES), version)
        assert self.stored(store) == [[item_key("i1")], [item_key("m\0{}")], [item_key("tea")]]
        assert blocked_keys(store.read("u:ann").controls, ControlKind.CREATOR, 5000).size == 0
        project(log, store)
        assert self.stored(store) == [[item_key("i1")], [item_key("m\0{}")], [item_key("tea")]]
        people.set_controls("u:ann", ())
        assert self.stored(store) == [[], [], []]
        project(log, store)
        assert self.stored(store) == [[], [], []]

    def test_they_stay_through_a_reset_and_a_loss_of_the_profiles(
        self, people, log, store, servers, tmp_path, profiles_redis
    ):
        write_dataset(
            tmp_path / "data",
            pa.table({"user_id": ["bob"], "item_id": ["i1"], "event_type": ["like"], "timestamp": [1_700_000_000_000]}),
            pa.table({"item_id": ["i1"]}),
            name="test",
        )
        people.set_controls("u:ann", self.RULES)
        people.reset("u:ann")
        assert self.stored(store)[0]
        profiles_redis.flushall()
        rebuild(tmp_path / "data", *servers, partitions=PARTITIONS)
        assert self.stored(store) == [[item_key("i1")], [item_key("m\0{}")], [item_key("tea")]]

    @pytest.mark.parametrize("projected", [False, True])
    def test_they_go_with_the_person_and_with_the_consent(self, people, log, store, projected):
        for person in ("u:ann", "u:bob"):
            people.set_controls(person, self.RULES)
        people.erase("u:ann")
        people.set_consent("u:bob", Purpose.TRAIN)
        if projected:
            project(log, store)
        for person in ("u:ann", "u:bob"):
            assert people.controls(person)[0] == []
            assert self.stored(store, person) == [[], [], []]
        with pytest.raises(ConsentWithheld):
            people.set_controls("u:bob", self.RULES)

    def test_a_merge_joins_them_and_the_later_end_holds(self, people, store):
        soon = now_ms() + 3_600_000
        theirs = [
            BlockControl(ControlKind.ITEM, "i1", soon),
            BlockControl(ControlKind.ITEM, "i2", soon),
            BlockControl(ControlKind.CREATOR, "i3"),
        ]
        people.set_controls("a:tab", [*theirs, BlockControl(ControlKind.ITEM, "i4", 50)])
        people.set_controls(
            "u:ann", [BlockControl(ControlKind.ITEM, "i1"), BlockControl(ControlKind.ITEM, "i2", soon - 1)]
        )
        assert people.merge("a:tab", "u:ann").controls_left_out == 0
        joined = [
            BlockControl(ControlKind.ITEM, "i1"),
            BlockControl(ControlKind.ITEM, "i2", soon),
            BlockControl(ControlKind.CREATOR, "i3"),
        ]
        assert people.controls("u:ann")[0] == joined
        assert people.controls("a:tab")[0] == []
        assert self.stored(store) == [[item_key("i1"), item_key("i2")], [item_key("i3")], []]

    def test_a_merge_keeps_the_known_person_s_dials_and_adds_the_visitor_s(self, people):
        taste = DialControl(Dial.CREATOR_WEIGHT, "maker", 1.0)
        people.set_controls("a:tab", [BlockControl(ControlKind.ITEM, "i1"), DialControl(Dial.NOVELTY, "", 1.0), taste])
        people.set_controls("u:ann", [DialControl(Dial.NOVELTY, "", -1.0)])
        people.merge("a:tab", "u:ann")
        assert people.controls("u:ann")[0] == [
            DialControl(Dial.NOVELTY, "", -1.0),
            BlockControl(ControlKind.ITEM, "i1"),
            taste,
        ]

    def test_a_merge_that_has_no_room_keeps_the_known_user_s_rules_and_tells_what_it_left_out(self, people):
        own = [
            *(BlockControl(ControlKind.ITEM, f"own{n}") for n in range(MAX_CONTROLS - 3)),
            DialControl(Dial.NOVELTY, "", -1.0),
        ]
        theirs = [DialControl(Dial.FRESHNESS, "", 1.0), *(BlockControl(ControlKind.ITEM, f"new{n}") for n in range(4))]
        people.set_controls("u:ann", own)
        people.set_controls("a:tab", [*theirs, own[0]])
        merged = people.merge("a:tab", "u:ann")
        assert merged.controls_left_out == 3
        assert people.controls("u:ann")[0] == [
            *own,
            BlockControl(ControlKind.ITEM, "new0"),
            BlockControl(ControlKind.ITEM, "new1"),
        ]


class TestUndo:
    def test_an_undone_event_never_was(self, people, log, store):
        ingest(log, store, *(event(number) for number in range(5)))
        store.compact("u:ann", store.read("u:ann").version - 1)
        version = people.undo("u:ann", "e2")
        assert version == store.read("u:ann").version
        assert items(store) == [0, 1, 3, 4]
        assert store.read("u:ann").count == 4
        project(log, store)
        assert items(store) == [0, 1, 3, 4]
        assert held(people)["event"] == ["e0", "e1", "e3", "e4"]
        [mark] = [entry for entry in log.read(partition_of("u:ann", PARTITIONS)) if entry.undone]
        assert mark.subject == ""
        with pytest.raises(NotFound):
            people.undo("u:ann", "e2")
        with pytest.raises(NotFound):
            people.undo("u:bob", "e1")

    def test_of_somebody_who_is_just_back_it_waits_for_their_past(self, people, log, store):
        ingest(log, store, *(event(number) for number in range(3)))
        past = store.read("u:ann")
        Evictions(store).evict(FUTURE)
        ingest(log, store, event(3))
        with pytest.raises(Unavailable, match="being restored"):
            people.undo("u:ann", "e3")
        assert RestoreRequests(log).take() == ["u:ann"]
        assert items(store) == [3]
        assert held(people)["event"] == ["e0", "e1", "e2", "e3"]
        store.put_states([("u:ann", past)])
        people.undo("u:ann", "e3")
        assert items(store) == [0, 1, 2]

    def test_what_is_damaged_in_the_log_is_not_folded_by_it(self, people, log, store):
        ingest(log, store, event(1), event(2))
        whole = event(3)
        log.append([replace(whole, record=bytes([whole.record[0] ^ 1]) + whole.record[1:])])
        project(log, store)
        people.undo("u:ann", "e1")
        assert items(store) == [2]

    def test_one_that_was_pushed_out_of_the_ring_brings_the_next_one_back(self, people, log, store):
        ingest(log, store, *(event(number) for number in range(300)))
        store.compact("u:ann", store.read("u:ann").version)
        assert items(store)[0] == 44
        people.undo("u:ann", "e10")
        people.undo("u:ann", "e200")
        profile = store.read("u:ann")
        assert items(store) == [43, *range(44, 200), *range(201, 300)]
        assert item_key("i10") not in profile.older_items.tolist()
        assert (profile.count, profile.older_items.size) == (298, 42)

    def test_an_unknown_id_costs_one_look_however_much_a_user_has_done(self, people, log, store, events_redis):
        ingest(log, store, *(event(number) for number in range(1200)))
        before = events_redis.info("stats")["total_commands_processed"]
        with pytest.raises(NotFound):
            people.undo("u:ann", "nothing")
        assert events_redis.info("stats")["total_commands_processed"] - before == 2  # one is this look itself

    def test_what_cannot_be_done_in_time_is_not_begun(self, people, log, store):
        ids = ingest(log, store, *(event(number) for number in range(5)))
        with pytest.raises(DeadlineExceeded, match="more time"):
            people.undo("u:ann", "e1", time.monotonic() - 1)
        with pytest.raises(DeadlineExceeded):
            list(people.documents("u:ann", deadline=time.monotonic() - 1))
        assert items(store) == [0, 1, 2, 3, 4]
        assert [entry.log_id for entries in log.history("u:ann") for entry in entries] == ids

    def test_an_event_can_be_undone_as_long_as_the_log_keeps_it(self, log, store, people, events_redis):
        week = EventLog(events_redis, PARTITIONS, times=LogRetention.of(168, None, True))
        week.append([event(1)])
        assert events_redis.pttl(log.seen_of("u:ann", "e1")) > 167 * 3_600_000

    def test_a_repeat_after_a_crash_between_the_stores_finishes_it(self, people, log, store):
        ids = ingest(log, store, *(event(number) for number in range(4)))
        people.refold("u:ann", frozenset(ids[1:2]))  # and then it crashed
        assert items(store) == [0, 2, 3]
        people.undo("u:ann", "e1")
        assert items(store) == [0, 2, 3]
        assert store.read("u:ann").count == 3

    def test_what_another_applies_meanwhile_is_not_lost(self, people, log, store):
        ingest(log, store, *(event(number) for number in range(50)))
        done = threading.Event()

        def more() -> None:
            for number in range(50, 150):
                ingest(log, store, event(number))
            done.set()

        thread = threading.Thread(target=more)
        thread.start()
        undone = 0
        while not done.is_set() and undone < 40:
            insist(lambda number=undone: people.undo("u:ann", f"e{number}"))
            undone += 1
        thread.join()
        assert undone
        project(log, store)
        assert items(store) == list(range(undone, 150))

    def test_what_is_past_its_retention_goes_with_it(self, log, store):
        old = now_ms() - 3 * 86_400_000
        people = SubjectRights(log, store, Certificates(log), Retention({"view_item": 2.0}))
        ingest(log, store, event(1, timestamp=old), event(2, timestamp=old, kind="like"), event(3))
        people.refold("u:ann")
        assert items(store) == [2, 3]
        assert people.refold("u:nobody") is None


class TestReset:
    def test_a_reset_profile_is_empty_and_learns_anew(self, people, log, store):
        early = ingest(log, store, event(1), event(2))
        version, applied = people.reset("u:ann")
        assert applied
        assert items(store) == []
        ingest(log, store, event(3))
        project(log, store)
        store.apply("u:ann", [(early[0], event(1).record)])
        assert items(store) == [3]
        assert people.consents(["u:ann"]) == [Consent(EVERY_PURPOSE, 0, version)]
        assert held(people)["event"] == ["e1", "e2", "e3"]  # they may still train and measure
        people.undo("u:ann", "e3")
        assert items(store) == []  # folded anew, and not from what was forgotten


class TestMerge:
    def test_what_a_visitor_did_is_the_persons(self, people, log, store):
        ingest(log, store, event(1, "u:ann"), event(2, "a:x"), event(3, "a:x"))
        log.append_impressions([slate(1, "a:x"), slate(2, "u:ann")])
        merged = people.merge("a:x", "u:ann")
        assert (merged.events, merged.impressions, merged.refused, merged.left_behind) == (2, 1, 0, 0)
        assert store.read("u:ann").version == merged.version
        project(log, store)
        assert items(store) == [1, 2, 3]
        assert items(store, "a:x") == []
        assert held(people) == {"event": ["e1", "e2", "e3"], "impression": ["r2", "r1"]}
        assert held(people, "a:x") == {"event": [], "impression": []}
        slates = {
            one["request_id"]: one
            for kind, _, said in people.documents("u:ann")
            if (one := json.loads(said)) and kind != "event"
        }
        assert "profile_version" in slates["r2"]
        assert "profile_version" not in slates["r1"]  # that of the visitor
        users = {json.loads(payload)["user_id"] for _, _, payload in people.documents("u:ann")}
        assert users == {"ann"}
        assert people.merge("a:x", "u:ann") == type(merged)(0, 0, 0, 0, 0)
        ingest(log, store, event(4, "a:x", timestamp=now_ms() - 60_000))  # late, and not lost
        assert items(store, "a:x") == [4]
        assert people.merge("a:x", "u:ann").events == 1
        assert items(store) == [1, 2, 3, 4]

    def test_a_repeat_after_a_crash_doubles_nothing(self, people, log, store, monkeypatch):
        ingest(log, store, *(event(number, "a:x") for number in range(5)))
        log.append_impressions([slate(1, "a:x")])
        monkeypatch.setattr(LogErasure, "start_afresh", _crash)
        with pytest.raises(ProfileStoreUnavailable):
            people.merge("a:x", "u:ann")
        monkeypatch.undo()
        merged = people.merge("a:x", "u:ann")
        assert (merged.events, merged.impressions) == (5, 1)
        project(log, store)
        assert items(store) == list(range(5))
        assert held(people) == {"event": [f"e{number}" for number in range(5)], "impression": ["r1"]}

    def test_what_a_visitor_does_meanwhile_moves_too(self, people, log, store, monkeypatch):
        ingest(log, store, event(1, "a:x"))
        start_afresh, late = LogErasure.start_afresh, [2, 3]

        def meanwhile(erasure, subject, newest):
            if late:
                number = late.pop(0)
                ingest(log, store, event(number, "a:x"))
                log.append_impressions([slate(number, "a:x")])
            return start_afresh(erasure, subject, newest)

        monkeypatch.setattr(LogErasure, "start_afresh", meanwhile)
        merged = people.merge("a:x", "u:ann")
        assert (merged.events, merged.impressions) == (3, 2)
        project(log, store)
        assert (items(store), items(store, "a:x")) == ([1, 2, 3], [])
        assert held(people) == {"event": ["e1", "e2", "e3"], "impression": ["r2", "r3"]}
        assert held(people, "a:x") == {"event": [], "impression": []}

    def test_a_visitor_who_never_stops_is_named(self, people, log, store, monkeypatch):
        number, start_afresh = iter(range(100)), LogErasure.start_afresh

        def meanwhile(erasure, subject, newest):
            ingest(log, store, event(next(number), "a:x"))
            return start_afresh(erasure, subject, newest)

        monkeypatch.setattr(LogErasure, "start_afresh", meanwhile)
        with pytest.raises(Unavailable, match="repeat"):
            people.merge("a:x", "u:ann")
        monkeypatch.undo()
        people.merge("a:x", "u:ann")
        assert items(store) == list(range(next(number)))

    def test_the_stricter_word_counts(self, people, log, store):
        people.set_consent("a:x", Purpose.TRAIN)
        ingest(log, store, event(1, "a:x"))
        with pytest.raises(FailedPrecondition, match="personalise, measure"):
            people.merge("a:x", "u:ann")
        people.set_consent("a:x", EVERY_PURPOSE)
        people.merge("a:x", "u:ann")
        project(log, store)
        assert items(store) == []  # it came while it might not enter a profile
        assert held(people)["event"] == ["e1"]
        ingest(log, store, event(2, "a:x"))
        people.set_consent("u:ann", NOTHING)
        with pytest.raises(ConsentWithheld):
            people.merge("a:x", "u:ann")
        assert items(store, "a:x") == [2]

    @pytest.mark.parametrize("allowed", [Purpose.TRAIN, NOTHING])
    def test_what_a_visitor_said_goes_to_nobody_who_allows_no_personal_answers(self, people, store, allowed):
        people.set_controls("a:x", [BlockControl(ControlKind.ITEM, "i1"), DialControl(Dial.NOVELTY, "", 0.5)])
        people.set_consent("u:ann", allowed)
        people.merge("a:x", "u:ann")
        assert people.controls("u:ann")[0] == []
        assert people.controls("a:x")[0] == []
        assert store.read("u:ann").controls.size == 0

    def test_what_an_erasure_of_the_person_refuses_does_not_come_back_by_a_merge(self, people, log, store):
        now = now_ms()
        ingest(log, store, event(1, "a:x", timestamp=now - 1000), event(2, "a:x"))
        people.erase("u:ann")
        merged = people.merge("a:x", "u:ann")
        assert (merged.events, merged.refused) == (1, 1)
        assert items(store) == [2]


def _crash(*_, **__):
    raise ProfileStoreUnavailable("a crash")


class TestErase:
    def test_a_name_that_was_erased_waits_nowhere(self, people, log, events_redis):
        before = now_ms() - 50
        people.erase("u:ann")
        RestoreRequests(log).add({"u:ann": before, "u:bob": before})  # an answer to them was on its way
        assert sorted(RestoreRequests(log).take()) == ["u:bob"]
        RestoreRequests(log).add({"u:ann": before + 3_600_000})  # they are back
        [key] = [keys.returned for keys in log.keys if events_redis.exists(keys.returned)]
        assert 0 < events_redis.pttl(key) <= 3_600_000  # where nobody looks for them, they wait for no more than that
        assert sorted(RestoreRequests(log).take()) == ["u:ann"]

    def test_a_certificate_that_is_gone_holds_up_no_other(self, log, store, events_redis):
        certificates = Certificates(log)
        people = SubjectRights(log, store, certificates)
        gone, other = people.erase("u:ann").certificate_id, people.erase("u:bob").certificate_id
        assert {one.certificate_id for one in certificates.pending()} == {gone, other}
        [key] = [key for key in events_redis.scan_iter("*") if gone.encode() in key]
        events_redis.delete(key)
        assert [one.certificate_id for one in certificates.pending()] == [other]
        assert not [keys for keys in log.keys if events_redis.sismember(keys.open_certificates, gone)]

    def test_rules_of_a_backup_go_as_events_do(self, log, store, profiles_redis, tmp_path):
        ledger = Ledger(tmp_path / "erasures.jsonl")
        people = SubjectRights(log, store, Certificates(log), ledger=ledger)
        people.set_controls("u:ann", TestRules.RULES)
        backup = profiles_redis.get(store.key_of("u:ann"))
        people.erase("u:ann")
        profiles_redis.set(store.key_of("u:ann"), backup)
        replay(ledger.erasures(), log, store)
        assert store.read("u:ann").controls.size == 0
        people.set_controls("u:ann", TestRules.RULES)  # of their new life
        replay(ledger.erasures(), log, store)
        assert store.read("u:ann").controls.size == len(TestRules.RULES)

    CANARY = "canary-5fa1c9"

    def live(self, log, store, people):
        """Somebody with events, slates, words and consent, among others, and with half of it folded."""
        subject = f"u:{self.CANARY}"
        for number in range(40):
            ingest(log, store, *(event(number, f"u:{who}-{number}") for who in range(5)), event(number, subject))
            log.append_impressions([slate(number, subject), slate(number, f"u:0-{number}")])
        people.set_consent(subject, EVERY_PURPOSE)
        store.compact(subject, store.read(subject).version - 1)
        return subject

    def test_a_scan_of_every_byte_finds_a_person_before_and_not_after(self, tmp_path):
        with (
            RedisServer(tmp_path, "events") as events,
            RedisServer(tmp_path, "profiles") as profiles,
            connect(events.url, 5) as events_redis,
            connect(profiles.url, 5) as profiles_redis,
        ):
            log, store = EventLog(events_redis, PARTITIONS), ProfileStore(profiles_redis, PARTITIONS)
            certificates = Certificates(log)
            people = SubjectRights(log, store, certificates)
            reader = Consumer(log, PROFILES_GROUP, "a", lease_ms=60_000)
            reader.open()
            subject = self.live(log, store, people)
            reader.claim([None] * PARTITIONS)  # delivered, and pending
            record = event(39).record[:8]  # the key of an item that stands in the profile
            assert self.found(events_redis, tmp_path / "events", self.CANARY.encode())
            assert self.found(profiles_redis, tmp_path / "profiles", record)
            profile = profiles_redis.dump(store.key_of(subject))
            assert record in profile

            before = now_ms()
            certificate = people.erase(subject)
            receipts = {receipt.store: receipt for receipt in certificate.receipts}
            assert {name: one.entries for name, one in receipts.items()} == {
                "profiles": 40, "events": 40, "impressions": 40,
            }  # fmt: skip
            assert all(before <= one.erased_at <= before + 60_000 and not one.purged_at for one in receipts.values())
            assert self.found(events_redis, tmp_path / "events", self.CANARY.encode()) == ["file"]  # logical at once

            assert Purger(certificates, events_redis, profiles_redis, 1.0).purge() == 1
            wait_until(lambda: not self.found(events_redis, tmp_path / "events", self.CANARY.encode()))
            assert not self.found(profiles_redis, tmp_path / "profiles", self.CANARY.encode())
            assert record not in profiles_redis.dump(store.key_of(subject))
            dated = certificates.get(certificate.certificate_id)
            assert dated.log_id == certificate.log_id
            assert all(one.purged_at >= one.erased_at for one in dated.receipts)
            assert certificates.pending() == []
            assert Purger(certificates, events_redis, profiles_redis, 1.0).purge() == 0
            # The others are all there.
            assert sum(len(list(log.history(f"u:{who}-{number}"))) for who in range(5) for number in range(40)) == 200
            assert items(store, "u:3-17") == [17]

    def test_the_scan_finds_what_is_not_purged(self, tmp_path):
        """The control: with the default nodes of a stream, what was deleted is still in them, also in a new file."""
        with RedisServer(tmp_path, "events") as events, connect(events.url, 5) as client:
            client.config_set("stream-node-max-entries", 100)
            log = EventLog(client, 1, unsafe=True)
            log.append([event(1, f"u:{self.CANARY}"), event(2, "u:other")])
            LogErasure(log).erase(f"u:{self.CANARY}")
            client.bgrewriteaof()
            wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
            assert self.found(client, tmp_path / "events", self.CANARY.encode())

    def found(self, client, folder, canary: bytes) -> list[str]:
        """Where a canary is: in the name of a key, in its value, in a file of the server."""
        places = []
        for key in client.scan_iter(count=1000):
            places += ["key"] if canary in key else []
            places += ["value"] if canary in (client.dump(key) or b"") else []
            places += ["value"] if client.type(key) == b"stream" and canary in repr(client.xrange(key)).encode() else []
        files = [path for path in folder.rglob("*") if path.is_file()]
        return places + ["file" for path in files if canary in path.read_bytes()]

    def test_nothing_brings_the_erased_back(self, people, log, store, servers, tmp_path, profiles_redis):
        ids = ingest(log, store, *(event(number) for number in range(5)))
        stalled = Consumer(log, PROFILES_GROUP, "asleep", lease_ms=1)
        stalled.open()
        batch = [entry for entries in stalled.claim([None] * PARTITIONS) for entry in entries or ()]
        data = [
            {"user_id": "ann", "item_id": "i1", "event_type": "view_item", "timestamp": FUTURE, "log_id": ids[0]},
            {
                "user_id": "ann",
                "item_id": "i2",
                "event_type": "view_item",
                "timestamp": 1_700_000_000_000,
                "log_id": None,
            },
        ]
        write_dataset(tmp_path / "backup", pa.Table.from_pylist(data), pa.table({"item_id": ["i1", "i2"]}), name="test")
        now = now_ms() - 1
        certificate = people.erase("u:ann")
        # Late, from whoever had it in hand; from a client that kept it; from a replay; from a restored backup.
        assert store.apply("u:ann", [(entry.log_id, entry.record) for entry in batch]).inserted == 0
        assert isinstance(log.append([event(9, timestamp=now)])[0].error, FailedPrecondition)
        assert log.append_impressions([slate(9, timestamp=now - 1000)]) == 0
        project(log, store)
        rebuild(tmp_path / "backup", *servers, partitions=PARTITIONS)
        assert items(store) == []
        profiles_redis.flushall()
        project(log, store)
        rebuild(tmp_path / "backup", *servers, partitions=PARTITIONS)
        assert items(store) == []
        # What they do from now on is theirs.
        [new] = ingest(log, store, event(7))
        assert new > certificate.log_id
        assert items(store) == [7]

    def test_an_erasure_that_the_profiles_missed_reaches_them_by_the_log(self, people, log, store):
        ingest(log, store, event(1))
        LogErasure(log).erase("u:ann")  # and then it crashed
        assert items(store) == [1]
        project(log, store)
        assert items(store) == []

    def test_the_certificate_counts_what_the_projector_was_quicker_to_forget(self, people, log, store, monkeypatch):
        ingest(log, store, event(1), event(2))
        slow = store.erase

        def projected_first(subject: str, before: int) -> int:
            project(log, store)
            return slow(subject, before)

        monkeypatch.setattr(store, "erase", projected_first)
        counts = {receipt.store: receipt.entries for receipt in people.erase("u:ann").receipts}
        assert counts == {"profiles": 2, "events": 2, "impressions": 0}

    def test_who_else_reads_the_log_has_to_confirm(self, people, log, store, servers):
        other = Consumer(log, "warehouse", "a")
        other.open()
        ingest(log, store, event(1))
        certificate = people.erase("u:ann")
        assert certificate.receipts[-1].store == "warehouse"
        assert certificate.receipts[-1].erased_at == 0
        certificates = Certificates(log)
        with connect(servers[0], 5) as profiles, connect(servers[1], 5) as events:
            purger = Purger(certificates, events, profiles, 1.0)
            assert purger.purge() == 1
            assert purger.purge() == 0
        [pending] = certificates.pending()
        assert [bool(one.purged_at) for one in pending.receipts] == [True, True, True, False]
        certificates.confirm(pending, "warehouse")
        assert certificates.pending() == []
        assert all(one.erased_at and one.purged_at for one in certificates.get(pending.certificate_id).receipts)

    def test_a_certificate_that_was_issued_again_meanwhile_waits_again(self, people, log, store):
        ingest(log, store, event(1))
        certificates = Certificates(log)
        before = people.erase("u:ann")
        [erasure] = certificates.erasures()
        certificates.issue(replace(erasure, log_id=erasure.log_id + (1 << 20)), {"profiles": 1, "events": 7})
        certificates.confirm(before, "events", "profiles")
        again = {receipt.store: receipt for receipt in certificates.get(before.certificate_id).stores}
        assert [(again[name].entries, again[name].purged_at) for name in ("events", "profiles")] == [(7, 0), (1, 0)]

    def test_a_full_log_takes_the_dates_of_an_erasure(self, people, log, store, events_redis):
        ingest(log, store, event(1))
        certificate = people.erase("u:ann")
        before = events_redis.config_get("maxmemory")["maxmemory"]
        events_redis.config_set("maxmemory", 1)
        try:
            Certificates(log).confirm(certificate, "events", "impressions")
        finally:
            events_redis.config_set("maxmemory", before)
        dated = Certificates(log).get(certificate.certificate_id)
        assert {one.store for one in dated.stores if one.purged_at} == {"events", "impressions"}

    def test_a_server_that_may_not_write_its_files_anew_is_named_and_tried_again(self, people, log, store, servers):
        ingest(log, store, event(1))
        people.erase("u:ann")
        with connect(servers[0], 5) as profiles, connect(servers[1], 5) as events:
            profiles.execute_command("ACL", "SETUSER", "careful", "on", ">secret", "~*", "+@all", "-bgrewriteaof")
            with (
                connect(servers[0].replace("unix://", "unix://careful:secret@"), 5) as careful,
                pytest.raises(ServingError, match="allow BGREWRITEAOF"),
            ):
                Purger(Certificates(log), events, careful, 1.0).purge()
            [pending] = Certificates(log).pending()
            assert {one.store: bool(one.purged_at) for one in pending.receipts}["profiles"] is False
            stop = threading.Event()
            thread = threading.Thread(target=Purger(Certificates(log), events, profiles, 0.05).run, args=(stop,))
            thread.start()
            wait_until(lambda: not Certificates(log).pending())
            stop.set()
            thread.join()
            profiles.execute_command("ACL", "DELUSER", "careful")

    def test_half_of_the_time_after_an_erasure_a_purge_waits_for_no_round(
        self, people, log, store, servers, monkeypatch
    ):
        """A service that is started again more often than rounds come would never purge."""
        monkeypatch.setattr("serving.privacy.purge._LOOK_S", 0.05)
        ingest(log, store, event(1))
        people.erase("u:ann")
        certificates, stop = Certificates(log), threading.Event()
        with connect(servers[0], 5) as profiles, connect(servers[1], 5) as events:
            purger = Purger(certificates, events, profiles, 12 * 3600.0)
            thread = threading.Thread(target=purger.run, args=(stop,))
            thread.start()
            time.sleep(0.5)
            assert len(certificates.pending()) == 1
            SubjectRights(log, store, Certificates(log, due_ms=0)).erase("u:bob")
            wait_until(lambda: not certificates.pending())
            stop.set()
            thread.join()

    @pytest.mark.parametrize("name", ["", "x", "0001-" + "0" * 32, "ffff-" + "0" * 32, "0001-" + "g" * 32])
    def test_an_unknown_certificate_is_not_found(self, log, name):
        with pytest.raises(NotFound):
            Certificates(log).get(name)


def test_a_line_of_the_ledger_is_there_whole_or_not_at_all(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    first, second = (Erasure(f"0001-{number:032x}", b"h" * 16, b"a" * 16, number) for number in (1, 2))
    ledger.note(first)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Up to a limit of the size of files the kernel writes a part, as it does on a disk that is nearly full.
    resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.path.stat().st_size + 20, before[1]))
    try:
        with pytest.raises(Unavailable, match="repeat it"):
            ledger.note(second)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ledger.erasures() == [first]
    ledger.note(second)
    assert ledger.erasures() == [first, second]


class TestExport:
    def test_everything_is_held_out_in_order_and_from_anywhere(self, people, log, store, events_redis):
        log.append([event(number) for number in range(1500)])
        log.append_impressions([slate(number) for number in range(3)])
        assert held(people) == {
            "event": [f"e{number}" for number in range(1500)],
            "impression": ["r0", "r1", "r2"],
        }
        pieces = list(people.documents("u:ann"))
        for cut in (0, 1499, 1501):
            kind, at, _ = pieces[cut]
            assert list(people.documents("u:ann", kind, at)) == pieces[cut + 1 :]
        assert list(people.documents("u:bob")) == []
        # What the index has forgotten is found one by one.
        old = EventLog(events_redis, PARTITIONS, times=NOTHING_KEPT)
        events_redis.delete(log.keys_of("u:ann").index_of("u:ann"))
        time.sleep(1.1)  # the server tells its time in seconds
        assert [entry.event_id for entries in old.history("u:ann") for entry in entries][-1] == "e1499"


def test_a_damaged_profile_can_be_reset_and_keeps_its_consent(people, log, store, profiles_redis):
    people.set_consent("u:ann", Purpose.PERSONALISE)
    ingest(log, store, event(1))
    key = store.key_of("u:ann")
    profiles_redis.append(key, b"half an entry")
    with pytest.raises(ProfileCorrupt):
        store.read("u:ann")
    people.reset("u:ann")
    assert store.read("u:ann").consent == Purpose.PERSONALISE
    assert address_of("u:ann") in key
    assert stream_id(people.consents(["u:ann"])[0].set_at)
