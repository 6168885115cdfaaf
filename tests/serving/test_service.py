"""A real service with two workers: what a backend engineer relies on, in a world whose right answers are known."""

from __future__ import annotations

import math
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from penchant.client import event
from penchant.v1 import catalog_pb2, common_pb2, event_pb2, profile_pb2, profile_pb2_grpc
from serving.processes.entrypoint import BEHIND_WORKERS
from tests.serving.faults import wait_until
from tests.world import COUNT, rows_of

NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]
INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]


def ids(slate) -> list[str]:
    return [item.item_id for item in slate.items]


def live(genre: str) -> catalog_pb2.Item:
    name = f"new-{uuid.uuid4().hex}"
    return catalog_pb2.Item(item_id=name, title=f"{genre} premiere {name}", categories=[genre], creator_id="c9")


def test_where_cores_are_scarce_workers_come_first(service):
    """The projector is the one process here for which no caller waits."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    nice = {int(child): os.getpriority(os.PRIO_PROCESS, int(child)) for child in children}
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert {nice[worker] for worker in service.ready["workers"]} == {own}
    assert sum(value == min(own + BEHIND_WORKERS, 19) for value in nice.values()) == 1


class TestFeed:
    def test_somebody_new_gets_what_is_popular(self, client, ann):
        slate = client.recommend(user_id=ann, page_size=7)
        assert ids(slate) == [f"i{row}" for row in range(7)]
        assert slate.rung == common_pb2.RUNG_POPULAR
        assert not slate.profile_found
        assert slate.profile_version == 0
        assert not slate.degraded
        assert [item.propensity for item in slate.items] == [1] * 7

    def test_an_event_is_in_the_very_next_answer_of_every_worker(self, client, everywhere, ann):
        (status,) = client.ingest([event(ann, "i0", "view_item")])
        assert (status.code, status.applied, status.duplicate) == (0, True, False)
        for _ in range(16):
            slate = everywhere.recommend(user_id=ann, page_size=9)
            assert slate.rung == common_pb2.RUNG_SEQUENCE
            assert slate.profile_version == status.profile_version
            assert slate.profile_found
            assert set(ids(slate)) == rows_of("western") - {"i0"}

    def test_what_was_seen_does_not_return(self, client, ann):
        client.ingest([event(ann, f"i{row}", "view_item") for row in range(20)])
        assert not set(ids(client.recommend(user_id=ann, page_size=100))) & {f"i{row}" for row in range(20)}

    @pytest.mark.parametrize("kind", ["hide", "dislike", "add_to_cart"])
    def test_what_a_person_refuses_or_chooses_stays_away_though_the_bundle_never_saw_such_an_event(
        self, client, ann, kind
    ):
        assert "i0" in ids(client.recommend(user_id=ann, page_size=10))
        client.ingest([event(ann, "i0", kind)])
        assert "i0" not in ids(client.recommend(user_id=ann, page_size=100))

    def test_people_do_not_move_each_other(self, client, ann):
        other = f"other-{ann}"
        client.ingest([event(ann, "i1", "view_item"), event(other, "i2", "view_item")])
        assert set(ids(client.recommend(user_id=ann, page_size=9))) == rows_of("space") - {"i1"}
        assert set(ids(client.recommend(user_id=other, page_size=9))) == rows_of("romance") - {"i2"}

    def test_a_visitor_and_a_user_of_one_name_are_two(self, client, ann):
        client.ingest([event(ann, "i1", "view_item")])
        assert client.recommend(anonymous_id=ann).rung == common_pb2.RUNG_POPULAR

    def test_personalisation_can_be_declined(self, client, ann):
        client.ingest([event(ann, "i1", "view_item")])
        slate = client.recommend(user_id=ann, page_size=5, personalize=False)
        assert ids(slate) == [f"i{row}" for row in range(5)]
        assert slate.profile_version == 0

    def test_the_ranker_names_its_actions(self, client, ann):
        client.ingest([event(ann, "i1", "view_item")])
        slate = client.recommend(user_id=ann, page_size=5)
        assert list(slate.action_names) == ["view_item", "like"]
        assert all(0 < chance < 1 for item in slate.items for chance in item.action_probabilities)
        assert {len(item.action_probabilities) for item in slate.items} == {2}

    def test_excluded_items_stay_out_and_unknown_ids_are_reported(self, client, ann):
        slate = client.recommend(user_id=ann, page_size=3, exclude_item_ids=["i0", "?", "i2", "?"])
        assert ids(slate) == ["i1", "i3", "i4"]
        assert list(slate.missing_item_ids) == ["?"]

    def test_a_page_larger_than_the_catalogue(self, client, ann):
        names = ids(client.recommend(user_id=ann, page_size=100))
        assert len(names) == len(set(names)) >= COUNT

    def test_the_answer_says_how_it_was_made(self, client, service, ann):
        slate = client.recommend(user_id=ann, request_id="mine", page_size=1)
        assert slate.request_id == "mine"
        assert slate.bundle_id == service.ready["bundle_id"]
        assert {"profile", "popular", "eligible", "top_k"} <= {timing.stage for timing in slate.stage_timings}
        assert (slate.experiment.arm, slate.experiment.holdout) == ("treatment", False)

    def test_a_profile_that_is_not_there_yet_is_waited_for_a_while_only(self, client, ann):
        begun = time.monotonic()
        slate = client.recommend(user_id=ann, min_profile_version=2**62, timeout_s=1.0)
        assert [entry.part for entry in slate.degraded] == [common_pb2.PART_PROFILE_STALE]
        assert time.monotonic() - begun < 1.0

    def test_who_waits_holds_nobody_up(self, client, ann):
        with ThreadPoolExecutor(8) as pool:
            waiting = [
                pool.submit(client.recommend, user_id=ann, min_profile_version=2**62, timeout_s=6.0) for _ in range(8)
            ]
            time.sleep(0.3)
            begun = time.monotonic()
            assert not client.recommend(user_id=ann).degraded
            assert time.monotonic() - begun < 2.0
            assert all(call.result().degraded for call in waiting)

    def test_reasons(self, client, ann):
        client.ingest([event(ann, "i0", "view_item")])
        slate = client.recommend(user_id=ann, page_size=3, explain=True)
        for item in slate.items:
            (reason,) = [reason for reason in item.reasons if reason.kind == "like_history"]
            assert reason.item_id == "i0"
            assert reason.text == "like western story number0"
            assert 0.9 < reason.weight <= 1.0001
        assert not client.recommend(user_id=ann, page_size=3).items[0].reasons


class TestSearch:
    def test_words_find_their_items(self, client):
        assert ids(client.search("number7", page_size=1)) == ["i7"]
        assert set(ids(client.search("space", page_size=10))) >= set(list(rows_of("space"))[:1])
        assert {name for name in ids(client.search("space story", page_size=10)) if name.startswith("i")} <= rows_of(
            "space"
        )

    def test_taste_orders_what_matches_equally(self, client, ann):
        client.ingest([event(ann, "i3", "view_item")])
        assert set(ids(client.search("story", user_id=ann, page_size=5))) <= rows_of("comedy")

    def test_taste_never_beats_a_match(self, client, ann):
        client.ingest([event(ann, "i3", "view_item")])
        assert ids(client.search("space number9", user_id=ann, page_size=1)) == ["i9"]

    def test_what_was_seen_is_still_found(self, client, ann):
        client.ingest([event(ann, "i9", "view_item")])
        assert ids(client.search("space number9", user_id=ann, page_size=1)) == ["i9"]

    def test_words_that_nobody_used_find_nothing_or_neighbours_but_no_error(self, client):
        client.search("zxcvbn", page_size=5)

    def test_why(self, client):
        (item,) = client.search("Westerns number4", page_size=1, explain=True).items
        assert item.reasons[0].kind == "matches_query"
        assert "western" in item.reasons[0].text
        assert "words" in item.sources


class TestRank:
    def test_nobody_known_the_order_is_the_callers_exactly(self, client, ann):
        rng = np.random.default_rng(3)
        for _ in range(20):
            names = [f"i{row}" for row in rng.permutation(COUNT)[:15]]
            scores = np.float32(rng.normal(size=15) * 10.0 ** rng.integers(-20, 20))
            expected = [names[at] for at in np.argsort(-scores, kind="stable")]
            assert ids(client.rank(names, scores.tolist(), user_id=ann)) == expected
            assert ids(client.rank(names, scores.tolist(), upstream_weight=0.0)) == expected
        assert ids(client.rank(names, user_id=ann)) == names

    def test_ties_keep_the_callers_order(self, client):
        names = ["i7", "i3", "i9", "i1"]
        assert ids(client.rank(names, [1, 1, 1, 1])) == names

    def test_taste_moves_the_callers_order(self, client, ann):
        client.ingest([event(ann, "i0", "view_item")])
        names = ["i1", "i2", "i4", "i3", "i8"]
        slate = client.rank(names, [5, 4, 3, 2, 1], user_id=ann)
        assert set(ids(slate)[:2]) == {"i4", "i8"}
        assert slate.rung == common_pb2.RUNG_SEQUENCE
        assert ids(client.rank(names, [5, 4, 3, 2, 1], user_id=ann, upstream_weight=1e6)) == names

    def test_unknown_candidates_keep_the_callers_place_and_of_repeated_ones_the_first_counts(self, client, ann):
        slate = client.rank(["i5", "?", "i6", "i5", "!"], [1, 9, 2, 3, 9])
        assert ids(slate) == ["?", "!", "i6", "i5"]
        assert list(slate.missing_item_ids) == ["?", "!"]
        assert [len(item.sources) for item in slate.items] == [0, 0, 1, 1]
        assert [math.isnan(item.score) for item in slate.items] == [True, True, False, False]
        assert [item.propensity for item in slate.items] == [1] * 4
        client.ingest([event(ann, "i0", "view_item")])
        names = ["i1", "?", "i2", "i4", "!", "i8"]
        slate = client.rank(names, user_id=ann, page_size=5, exclude_item_ids=["!", "i2"], explain=True)
        assert ids(slate) in (["i4", "?", "i8", "i1"], ["i8", "?", "i4", "i1"])
        assert slate.dropped == {"excluded": 2}
        assert [bool(item.reasons) for item in slate.items][1] is False
        assert ids(client.rank(names, user_id=ann, page_size=2))[1] == "?"

    def test_an_unknown_candidate_that_the_user_blocked_leaves(self, client, ann):
        client.set_controls([("item", "?", 0), ("item", "i1", 0)], ann)
        slate = client.rank(["i1", "?", "i2", "!"], user_id=ann)
        assert ids(slate) == ["i2", "!"]
        assert slate.dropped == {"blocked": 2}

    def test_a_query_ranks(self, client, ann):
        names = ["i1", "i2", "i3", "i9", "i5", "i4"]
        assert ids(client.rank(names, query="space number9", page_size=3)) == ["i9", "i1", "i5"]
        assert ids(client.rank(names, query="!?")) == names
        assert ids(client.rank(names, [6, 5, 4, 3, 2, 1], query="space number9", upstream_weight=100.0)) == names
        client.ingest([event(ann, "i2", "view_item")])
        slate = client.rank(names, query="story", user_id=ann)
        assert ids(slate)[0] == "i2"
        assert slate.rung == common_pb2.RUNG_SEQUENCE

    @pytest.mark.parametrize(
        ("scores", "weight", "field"),
        [([1.0, float("inf")], 1.0, "candidates.upstream_scores[1]"), ([1e30, -3e38], 1e3, "upstream_weight")],
    )
    def test_scores_that_are_too_large_are_refused(self, client, scores, weight, field):
        with pytest.raises(grpc.RpcError) as refused:
            client.rank(["i1", "i2"], scores, upstream_weight=weight)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert refused.value.details().startswith(field)

    def test_nothing_but_unknown_candidates(self, client, ann):
        client.ingest([event(ann, "i0", "view_item")])
        slate = client.rank(["?", "!"], user_id=ann)
        assert ids(slate) == ["?", "!"]
        assert list(slate.missing_item_ids) == ["?", "!"]


class TestSimilar:
    def test_neighbours_are_of_the_genre(self, client):
        slate = client.similar_items(["i6"], page_size=9)
        assert {name for name in ids(slate) if name.startswith("i")} <= rows_of("romance") - {"i6"}
        assert all(0.9 < item.score <= 1.0001 for item in slate.items)

    def test_two_seeds_name_two_genres(self, client):
        names = ids(client.similar_items(["i0", "i1"], page_size=18))
        assert {name for name in names if name.startswith("i")} <= rows_of("western") | rows_of("space")

    def test_unknown_seeds_are_reported(self, client):
        slate = client.similar_items(["?", "i6"], page_size=3)
        assert list(slate.missing_item_ids) == ["?"]
        assert len(slate.items) == 3
        assert ids(client.similar_items(["?"])) == []


class TestEvents:
    def test_a_retry_has_one_effect(self, client, ann):
        once = event(ann, "i0", "view_item")
        (first,) = client.ingest([once])
        (second,) = client.ingest([once])
        assert second.duplicate
        assert second.profile_version == first.profile_version
        assert client.get_profile(ann).event_count == 1

    def test_bad_events_do_not_hurt_good_ones(self, client, ann):
        now = int(time.time() * 1000)
        bad = {
            "subject": event("", "i0", "view_item"),
            "item_id": event(ann, "", "view_item"),
            "event_type": event(ann, "i0", ""),
            "value": event(ann, "i0", "rating", value=float("nan")),
            "timestamp_ms": event(ann, "i0", "view_item", timestamp_ms=now - 25 * 3_600_000),
            "position": event(ann, "i0", "view_item", position=-1),
            "query": event(ann, "", "search"),
            "attributes": event(ann, "i0", "view_item", attributes={"k": "v" * 2000}),
        }
        statuses = client.ingest([*bad.values(), event(ann, "i0", "view_item")])
        assert not statuses[-1].message
        assert [status.field for status in statuses[:-1]] == list(bad)
        assert {status.code for status in statuses[:-1]} == {INVALID}
        assert all(status.message for status in statuses[:-1])
        assert statuses[-1].code == 0
        assert client.get_profile(ann).event_count == 1

    @pytest.mark.parametrize(
        ("field", "fields"),
        [
            ("subject", {"subject": common_pb2.Subject()}),
            ("subject.user_id", {"subject": common_pb2.Subject(user_id="x" * 513)}),
            ("timestamp_ms", {"timestamp_ms": -1}),
            ("timestamp_ms", {"timestamp_ms": 2**63 - 1}),
            ("timestamp_ms", {"timestamp_ms": -(2**63)}),
            ("attributes", {"attributes": {"k": "v" * (1 << 20)}}),
            ("attributes", {"attributes": {f"k{number}": "v" for number in range(65)}}),
            ("value", {"value": float("nan")}),
            ("value", {"value": float("-inf")}),
            ("subject.user_id", {"subject": common_pb2.Subject(user_id="{user_id}")}),
            ("subject.anonymous_id", {"subject": common_pb2.Subject(anonymous_id="a\0")}),
            ("event_id", {"event_id": "{}"}),
            ("item_id", {"item_id": "i\0"}),
            ("session_id", {"session_id": "s}"}),
            ("request_id", {"request_id": "\0"}),
            ("item_id", {"item_id": "i" * 513}),
            ("event_id", {"event_id": "e" * 513}),
        ],
    )
    def test_a_bad_event_is_named_and_its_neighbours_are_in_the_profile(self, client, ann, field, fields):
        bad, before, after = (event(ann, f"i{row}", "view_item") for row in (1, 0, 2))
        bad.ClearField("subject" if "subject" in fields else field)
        bad.MergeFrom(event_pb2.Event(**fields))
        first, status, last = client.ingest([before, bad, after])
        assert (first.code, last.code) == (0, 0)
        assert (status.code, status.field, status.profile_version) == (INVALID, field, 0)
        assert status.message
        profile = client.get_profile(ann)
        assert [one.item_id for one in profile.events] == ["i2", "i0"]
        assert profile.profile_version == last.profile_version

    @pytest.mark.parametrize(
        ("off", "scale", "mend"),
        [
            (0, 0.001, "look like seconds"),
            (0, 1000, "send milliseconds"),
            (3_600_000, 1, "set the caller's clock"),
            (-25 * 3_600_000, 1, "bulk import"),
        ],
    )
    def test_a_time_that_cannot_be_is_told_how_to_mend(self, client, ann, off, scale, mend):
        at = int((time.time() * 1000 + off) * scale)
        [status] = client.ingest([event(ann, "i0", "view_item", timestamp_ms=at)])
        assert (status.code, status.field) == (INVALID, "timestamp_ms")
        assert f"got {at}: " in status.message
        assert mend in status.message

    def test_how_old_an_event_may_be_is_a_setting(self, serve, ann):
        at = int(time.time() * 1000) - 25 * 3_600_000
        with serve(retry_hours=26) as service, service.client() as client:
            [taken] = client.ingest([event(ann, "i0", "view_item", timestamp_ms=at)])
            assert taken.code == 0
            [refused] = client.ingest([event(ann, "i0", "view_item", timestamp_ms=at - 2 * 3_600_000)])
            assert (refused.code, refused.field) == (INVALID, "timestamp_ms")

    def test_where_ids_hold_braces_and_nul_they_are_ids_like_others(self, serve, ann):
        with serve(refused_in_ids="") as service, service.client() as client:
            self.take_odd_ids(client, ann)

    def take_odd_ids(self, client, ann):
        odd = ("{}", "{p00}", "\0", "a\0b", "penchant:{p00}:events")
        names = [f"{ann}{text}" for text in odd]
        events = [
            event(name, text, "view_item", event_id=text, session_id=text)
            for name, text in zip(names, odd, strict=True)
        ]
        good = event(ann, "i0", "view_item")
        assert {status.code for status in client.ingest([*events, good])} == {0}
        again = client.ingest(events)
        assert all(status.duplicate for status in again)
        for name, status in zip(names, again, strict=True):
            profile = client.get_profile(name)
            assert (profile.event_count, profile.profile_version) == (1, status.profile_version)
        assert [one.item_id for one in client.get_profile(ann).events] == ["i0"]

    def test_every_field_is_taken(self, client, ann):
        full = event(
            ann, "unheard-of", "my_own_type", value=4.5, session_id="s", request_id="r", surface="home", position=3,
            query="q", attributes={"k": "v"}, timestamp_ms=int(time.time() * 1000) - 5,
        )  # fmt: skip
        searched = event(ann, "", "search", query="westerns")
        assert [status.code for status in client.ingest([full, searched])] == [0, 0]
        profile = client.get_profile(ann)
        # Counted both, remembered the one that is about an item: the catalogue does not have it, so it has no name.
        assert (profile.event_count, [one.item_id for one in profile.events]) == (2, [""])
        assert profile.events[0].value == 4.5

    @pytest.mark.parametrize("name", ["*", "a\r\nb", "😀" * 100, " ", "u:"])
    def test_ids_are_opaque(self, client, name):
        user = f"{name}{uuid.uuid4().hex}"
        (status,) = client.ingest([event(user, "i1", "view_item")])
        assert status.code == 0
        slate = client.recommend(user_id=user, page_size=9)
        assert set(ids(slate)) == rows_of("space") - {"i1"}


class TestProfile:
    def test_people_can_read_theirs(self, client, ann):
        client.ingest(
            [event(ann, "i0", "view_item"), event(ann, "i4", "like", value=2.0), event(ann, "i1", "view_item")]
        )
        profile = client.get_profile(ann)
        assert profile.found
        assert profile.event_count == 3
        assert [(one.item_id, one.event_type) for one in profile.events] == [
            ("i1", "view_item"), ("i4", "like"), ("i0", "view_item"),
        ]  # fmt: skip
        assert profile.events[1].title == "western story number4"
        assert [affinity.name for affinity in profile.categories] == ["western", "space"]
        assert sum(affinity.share for affinity in profile.categories) == pytest.approx(1)

    def test_nobody_s_is_empty(self, client, ann):
        assert not client.get_profile(ann).found

    def test_what_is_erased_is_gone_at_once_and_stays_gone(self, client, everywhere, ann):
        before = event(ann, "i0", "view_item", timestamp_ms=int(time.time() * 1000) - 1000)
        client.ingest([before])
        receipts = {receipt.store: receipt.entries for receipt in client.erase(ann).receipts}
        assert receipts["profiles"] == receipts["events"] == 1
        assert "impressions" in receipts
        for _ in range(8):
            assert everywhere.recommend(user_id=ann).rung == common_pb2.RUNG_POPULAR
        before.event_id = uuid.uuid4().hex
        (status,) = client.ingest([before])
        assert status.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
        time.sleep(0.01)
        (status,) = client.ingest([event(ann, "i2", "view_item")])
        assert status.code == 0
        assert client.get_profile(ann).event_count == 1


class TestControls:
    def test_the_next_answer_of_any_worker_obeys(self, client, everywhere, ann):
        client.ingest([event(ann, "i0", "view_item")])
        first = ids(client.recommend(user_id=ann, page_size=9))
        version = client.set_controls([("item", first[0], 0), ("item", first[1], 1)], ann).profile_version
        for _ in range(8):
            slate = everywhere.recommend(user_id=ann, page_size=8)
            assert ids(slate)[0] == first[1]
            assert first[0] not in ids(slate)
            assert slate.dropped["blocked"] == 1
        said = client.get_controls(ann)
        assert [(one.id, one.until_ms) for one in said.hidden] == [(first[0], 0), (first[1], 1)]
        assert said.profile_version == version
        whole = set(ids(client.recommend(user_id=ann, page_size=9)))
        client.set_controls([("category", "western", 0)], ann)
        left = set(ids(client.recommend(user_id=ann, page_size=9)))
        assert left
        assert not left & rows_of("western")
        assert left != whole
        assert set(ids(client.rank(["i0", "i1"], user_id=ann))) == {"i0", "i1"} - rows_of("western")

    def test_mistakes_name_their_field(self, client, ann):
        with pytest.raises(grpc.RpcError, match=r"hidden\[1\]\.id"):
            client.set_controls([("item", "i1", 0), ("item", "", 0)], ann)
        with pytest.raises(grpc.RpcError, match=r"hidden\[0\]\.until_ms"):
            client.set_controls([("item", "i1", -1)], ann)

    def test_a_profile_says_who_they_are_and_what_they_are_doing(self, client, ann):
        now = int(time.time() * 1000)
        done = [("i0", 90), ("i4", 80), ("i1", 2), ("i5", 1)]
        client.ingest([event(ann, item, "view_item", timestamp_ms=now - 60_000 * minutes) for item, minutes in done])
        client.ingest([event(ann, "i8", "like", timestamp_ms=now - 60_000)])
        profile = client.get_profile(ann)
        assert profile.segment == "western"
        assert (profile.visit.events, profile.visit.category) == (3, "space")
        assert profile.visit.began_ms == now - 120_000
        assert not client.get_profile("nobody").HasField("visit")
        [counts] = [one for one in client.export_subject(ann) if one["kind"] == "counts"]
        assert counts["horizons"] == ["hour", "day", "month"]
        assert counts["event_type"]["view_item"][2] == pytest.approx(4, rel=0.01)
        assert set(counts["category"]) == {"western", "space"}

    def test_an_item_that_nobody_put_is_taken_and_told(self, client, ann):
        (status,) = client.ingest([event(ann, "no such item", "view_item")])
        assert (status.code, status.field, status.applied) == (0, "", True)
        assert "no item 'no such item'" in status.message
        assert not client.ingest([event(ann, "", "search", query="tea")])[0].message


class TestRights:
    def test_who_allows_no_personal_answers_gets_none_from_any_worker(self, client, everywhere, ann):
        client.ingest([event(ann, "i0", "view_item")])
        assert client.recommend(user_id=ann).rung == common_pb2.RUNG_SEQUENCE
        assert client.set_consent(["train"], ann).applied
        (status,) = client.ingest([event(ann, "i1", "view_item")])
        assert (status.code, status.applied) == (0, False)
        assert "does not allow personal answers" in status.message
        for _ in range(8):
            slate = everywhere.recommend(user_id=ann, page_size=5, min_profile_version=status.profile_version)
            assert (slate.rung, slate.consent_withheld) == (common_pb2.RUNG_POPULAR, True)
            assert ids(slate) == [f"i{row}" for row in range(5)]
            assert not slate.degraded
            assert slate.profile_version == 0
        profile = client.get_profile(ann)
        assert (profile.event_count, profile.consent_given) == (0, True)
        assert list(profile.purposes) == [profile_pb2.PURPOSE_TRAIN]

    def test_the_version_of_what_a_person_said_is_one_to_wait_for(self, client, everywhere, ann):
        told = [
            lambda: client.set_controls([("item", "i3", 0)], ann),
            lambda: client.set_consent(["personalise"], ann),
            lambda: client.reset_learning(ann),
            lambda: client.erase(ann),
        ]
        for tell in told:
            client.ingest([event(ann, "i0", "view_item")])
            slate = everywhere.recommend(user_id=ann, page_size=5, min_profile_version=tell().profile_version)
            assert not slate.degraded
        late = everywhere.recommend(user_id=ann, min_profile_version=tell().profile_version + 1, timeout_s=1.0)
        assert [one.part for one in late.degraded] == [common_pb2.PART_PROFILE_STALE]

    def test_who_allows_nothing_leaves_nothing_and_may_change_their_mind(self, client, ann):
        with pytest.raises(ValueError, match="'personalize' is none of personalise, train, measure"):
            client.set_consent(["personalize"], ann)
        client.set_consent([], ann)
        (status,) = client.ingest([event(ann, "i1", "view_item")])
        assert status.code == grpc.StatusCode.PERMISSION_DENIED.value[0]
        assert "not stored" in status.message
        kinds = ["consent", "controls", "attributes", "profile", "counts"]
        assert [one["kind"] for one in client.export_subject(ann)] == kinds
        client.set_consent(["personalise", "measure"], ann)
        client.ingest([event(ann, "i2", "view_item")])
        slate = client.recommend(user_id=ann)
        assert (slate.rung, slate.consent_withheld) == (common_pb2.RUNG_SEQUENCE, False)

    def test_an_unknown_purpose_is_refused(self, service, ann):
        request = profile_pb2.SetConsentRequest(subject=common_pb2.Subject(user_id=ann), purposes=[1, 9])
        with grpc.insecure_channel(service.target) as channel, pytest.raises(grpc.RpcError) as failure:
            profile_pb2_grpc.ProfileServiceStub(channel).SetConsent(request, timeout=20)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "purposes[1]" in failure.value.details()

    def test_an_undone_event_shapes_no_answer(self, client, ann):
        mistake = event(ann, "i1", "view_item")
        client.ingest([event(ann, "i0", "view_item"), mistake])
        before = client.get_profile(ann).profile_version
        assert client.undo_event(mistake.event_id, ann).profile_version == before
        assert [one.item_id for one in client.get_profile(ann).events] == ["i0"]
        assert set(ids(client.recommend(user_id=ann, page_size=9))) == rows_of("western") - {"i0"}
        with pytest.raises(grpc.RpcError) as failure:
            client.undo_event(mistake.event_id, ann)
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND

    def test_learning_can_begin_anew(self, client, ann):
        client.ingest([event(ann, "i0", "view_item")])
        assert client.reset_learning(ann).applied
        assert client.recommend(user_id=ann).rung == common_pb2.RUNG_POPULAR
        client.ingest([event(ann, "i1", "view_item")])
        assert set(ids(client.recommend(user_id=ann, page_size=9))) == rows_of("space") - {"i1"}

    def test_a_visitor_becomes_known(self, client, ann):
        visit = event("", "i1", "view_item")
        visit.subject.anonymous_id = ann
        client.ingest([visit])
        merged = client.merge_identities(ann, ann)
        assert (merged.events, merged.left_behind) == (1, 0)
        slate = client.recommend(user_id=ann, page_size=9, min_profile_version=merged.profile_version)
        assert set(ids(slate)) == rows_of("space") - {"i1"}
        assert client.recommend(anonymous_id=ann).rung == common_pb2.RUNG_POPULAR

    def test_people_get_everything_that_is_held(self, client, ann):
        shown = client.recommend(user_id=ann, page_size=3)
        notes = {f"note {number}": "n" * 900 for number in range(10)}
        many = [event(ann, f"i{row % COUNT}", "view_item", attributes=notes) for row in range(150)]
        assert {status.code for status in client.ingest(many)} == {0}
        wait_until(lambda: [one for one in client.export_subject(ann) if one["kind"] == "impression"])
        found = list(client.export_subject(ann))  # over a megabyte: more than a page
        events = [one for one in found if one["kind"] == "event"]
        assert [one["event_id"] for one in events] == [one.event_id for one in many]
        assert events[2]["attributes"] == notes
        (slate,) = [one for one in found if one["kind"] == "impression"]
        assert (slate["request_id"], slate["item_ids"]) == (shown.request_id, ids(shown))
        assert found[0] == {"kind": "consent", "purposes": ["personalise", "train", "measure"], "given": False}
        (profile,) = [one for one in found if "event_count" in one]
        assert int(profile["event_count"]) == len(profile["events"]) == 150

    def test_an_erasure_is_certified(self, client, ann):
        client.ingest([event(ann, "i0", "view_item")])
        erased = client.erase(ann)
        found = client.get_erasure_certificate(erased.certificate_id)
        assert found.receipts == erased.receipts
        assert (found.profile_version, found.purge_due_ms) == (erased.profile_version, erased.purge_due_ms)
        assert all(one.erased_at_ms < erased.purge_due_ms for one in found.receipts)
        with pytest.raises(grpc.RpcError) as failure:
            client.get_erasure_certificate("nothing")
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND

    def test_the_default_is_a_setting_and_the_bytes_leave_by_schedule(self, serve, ann):
        with serve(default_purposes=["train"], purge_hours=0.0001) as service, service.client() as client:
            (status,) = client.ingest([event(ann, "i0", "view_item")])
            assert (status.code, status.applied) == (0, False)
            assert client.recommend(user_id=ann).consent_withheld
            assert list(client.get_profile(ann).purposes) == [profile_pb2.PURPOSE_TRAIN]
            client.set_consent(["personalise"], ann)
            client.ingest([event(ann, "i1", "view_item")])
            assert client.recommend(user_id=ann).rung == common_pb2.RUNG_SEQUENCE
            name = client.erase(ann).certificate_id
            wait_until(lambda: all(one.purged_at_ms for one in client.get_erasure_certificate(name).receipts))


class TestWarmth:
    def test_a_long_history_compiles_nothing_while_calls_wait(self, client, service, ann):
        """More events than the ring holds: those that leave it are folded by a kernel of their own."""
        for begin in range(0, 400, 50):
            statuses = client.ingest([event(ann, f"i{n % 30}", "view_item") for n in range(begin, begin + 50)])
            assert not any(status.code for status in statuses)
            client.recommend(user_id=ann)
        assert client.get_profile(ann).event_count == 400
        assert "while calls wait" not in service.log.read_text()


class TestCatalog:
    def test_a_new_item_is_found_at_once_by_every_worker(self, client, everywhere, ann):
        item = live("western")
        answer = client.put_items([item])
        assert answer.visible_everywhere
        assert [status.code for status in answer.statuses] == [0]
        client.ingest([event(ann, "i0", "view_item")])
        for _ in range(16):
            assert ids(everywhere.search(item.item_id, page_size=1)) == [item.item_id]
            assert item.item_id in ids(everywhere.similar_items(["i4"], page_size=30))
            slate = everywhere.recommend(user_id=ann, page_size=30, min_catalog_version=answer.catalog_version)
            assert item.item_id in ids(slate)
            assert slate.catalog_version >= answer.catalog_version
        client.ingest([event(ann, item.item_id, "view_item")])
        assert item.item_id not in ids(client.recommend(user_id=ann, page_size=100))
        client.delete_items([item.item_id])

    def test_an_item_of_the_version_that_is_waited_for_is_known_and_excluded(self, client, ann):
        """Its id is looked up once that version is here: else it would be missing, and though excluded be shown."""
        item = live("western")
        calls = [
            lambda **options: client.rank(["i1", item.item_id], **options),
            lambda **options: client.similar_items([item.item_id], page_size=5, **options),
            lambda **options: client.recommend(exclude_item_ids=[item.item_id], page_size=100, **options),
        ]
        before = live("space")
        version = client.put_items([before]).catalog_version + 1
        with ThreadPoolExecutor(len(calls)) as pool:
            slates = [pool.submit(call, user_id=ann, min_catalog_version=version) for call in calls]
            time.sleep(0.3)  # all of them wait
            assert client.put_items([item]).catalog_version == version
            ranked, similar, feed = (slate.result() for slate in slates)
        assert [list(slate.missing_item_ids) for slate in (ranked, similar, feed)] == [[]] * 3
        assert not any(math.isnan(line.score) for line in ranked.items)
        assert set(ids(similar)) & rows_of("western")
        assert item.item_id not in ids(feed)
        client.delete_items([before.item_id, item.item_id])

    def test_a_version_that_does_not_come_costs_a_share_of_the_time_and_is_marked(self, client, ann):
        begun = time.monotonic()
        slate = client.recommend(user_id=ann, page_size=5, min_catalog_version=2**62, timeout_s=2.0)
        assert 0.9 < time.monotonic() - begun < 2
        assert [one.part for one in slate.degraded] == [common_pb2.PART_CATALOG_STALE]
        assert len(slate.items) == 5

    def test_a_hidden_item_is_hidden_at_once_everywhere_and_comes_back(self, client, everywhere, ann):
        def shown() -> set[bool]:
            found = set()
            for _ in range(12):
                found.add("i12" in ids(everywhere.recommend(user_id=ann, page_size=100)))
                found.add("i12" in ids(everywhere.search("number12", page_size=100)))
                found.add("i12" in ids(everywhere.rank(["i12", "i1"])))
                found.add("i12" in ids(everywhere.similar_items(["i0"], page_size=100)))
            return found

        assert shown() == {True}
        answer = client.set_availability([catalog_pb2.Availability(item_id="i12", available=False)])
        assert answer.visible_everywhere
        assert shown() == {False}
        client.set_availability([catalog_pb2.Availability(item_id="i12", available=True)])
        assert shown() == {True}

    def test_an_item_is_shown_in_its_time_only(self, client):
        now = int(time.time() * 1000)
        later, over, brief = live("comedy"), live("comedy"), live("comedy")
        later.available_from_ms = now + 3_600_000
        over.available_until_ms = now - 1
        brief.available_until_ms = now + 1500
        client.put_items([later, over, brief])
        names = ids(client.search("comedy premiere", page_size=100))
        assert later.item_id not in names
        assert over.item_id not in names
        time.sleep(max(0.0, brief.available_until_ms / 1000 - time.time()))
        assert brief.item_id not in ids(client.search("comedy premiere", page_size=100))

    def test_deleted_is_never_shown_again_and_no_availability_brings_it_back(self, client, everywhere):
        item = live("space")
        client.put_items([item])
        assert client.delete_items([item.item_id]).visible_everywhere
        answer = client.set_availability([catalog_pb2.Availability(item_id=item.item_id, available=True)])
        assert [status.code for status in answer.statuses] == [NOT_FOUND]
        for _ in range(8):
            assert item.item_id not in ids(everywhere.search(item.item_id, page_size=100))

    def test_unknown_items_are_reported_and_the_rest_is_done(self, client):
        changes = [catalog_pb2.Availability(item_id=name, available=True) for name in ("?", "i3")]
        assert [status.code for status in client.set_availability(changes).statuses] == [NOT_FOUND, 0]
        answer = client.delete_items(["?"])
        assert [status.code for status in answer.statuses] == [NOT_FOUND]

    def test_bad_items_do_not_hurt_good_ones(self, client):
        good = live("space")
        bad = {
            "item_id": catalog_pb2.Item(title="x"),
            "price": catalog_pb2.Item(item_id="x", price=-1),
            "title": catalog_pb2.Item(item_id="x", title="t" * 1025),
            "categories": catalog_pb2.Item(item_id="x", categories=["c"] * 17),
            "available_until_ms": catalog_pb2.Item(item_id="x", available_from_ms=5, available_until_ms=4),
        }
        answer = client.put_items([*bad.values(), good])
        assert [status.field for status in answer.statuses] == [*bad, ""]
        assert ids(client.search(good.item_id, page_size=1)) == [good.item_id]
        client.delete_items([good.item_id])

    def test_a_changed_item_is_found_by_its_new_words_only(self, client):
        item = live("space")
        client.put_items([item])
        item.title = "quixotic zephyr"
        client.put_items([item])
        assert ids(client.search("quixotic zephyr", page_size=1)) == [item.item_id]
        client.delete_items([item.item_id])

    def test_an_event_about_a_live_item_carries_its_category(self, client, ann):
        item = live("romance")
        client.put_items([item])
        client.ingest([event(ann, item.item_id, "view_item")])
        assert [affinity.name for affinity in client.get_profile(ann).categories] == ["romance"]
        assert set(ids(client.recommend(user_id=ann, page_size=10))) == rows_of("romance")
        client.delete_items([item.item_id])


def test_health_and_reflection(service):
    with grpc.insecure_channel(service.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "penchant.v1.RankingService", "penchant.v1.CatalogService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        found = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {f"penchant.v1.{name}Service" for name in ("Ranking", "Event", "Profile", "Catalog")} <= found
