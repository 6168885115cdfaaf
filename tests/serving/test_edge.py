"""What must not get in: bad input gets a clean status that names the field, and the next good answer is as before."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penchant.client import Client, violations
from penchant.v1 import catalog_pb2, common_pb2, event_pb2, profile_pb2, ranking_pb2, ranking_pb2_grpc

INVALID = grpc.StatusCode.INVALID_ARGUMENT
MB = 1 << 20

METHODS = {
    "RankingService": ("Recommend", "Search", "Rank", "SimilarItems"),
    "EventService": ("Ingest",),
    "ProfileService": (
        "GetProfile",
        "SetConsent",
        "SetControls",
        "GetControls",
        "SetAttributes",
        "ResetLearning",
        "UndoEvent",
        "MergeIdentities",
        "ExportSubject",
        "EraseSubject",
        "GetErasureCertificate",
    ),
    "CatalogService": ("PutItems", "PatchItems", "GetItems", "SetAvailability", "DeleteItems"),
}
PATHS = [f"/penchant.v1.{service}/{method}" for service, methods in METHODS.items() for method in methods]


@pytest.fixture
def unchanged(client):
    """Whatever the test does, a good request is answered as before."""

    def answer():
        slate = client.recommend(user_id="nobody-at-the-edge", page_size=20)
        return [(item.item_id, item.score) for item in slate.items], slate.bundle_id

    before = answer()
    yield
    assert answer() == before


@pytest.fixture(scope="module")
def channel(service):
    with grpc.insecure_channel(service.target) as channel:
        yield channel


def refused(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


Dials = common_pb2.Dials
NAN, INFINITY = float("nan"), float("inf")
LONG = "x" * 513

BAD: dict[str, tuple[Callable[[Client], object], str]] = {
    "no subject": (lambda client: client.recommend(), "options.subject"),
    "page 0": (lambda client: client.recommend(user_id="u", page_size=0), "options.page_size"),
    "page -1": (lambda client: client.recommend(user_id="u", page_size=-1), "options.page_size"),
    "page a million": (lambda client: client.recommend(user_id="u", page_size=10**6), "options.page_size"),
    "long user": (lambda client: client.recommend(user_id=LONG), "options.subject.user_id"),
    "long multibyte user": (lambda client: client.recommend(user_id="😀" * 129), "options.subject.user_id"),
    "long visitor": (lambda client: client.recommend(anonymous_id=LONG), "options.subject.anonymous_id"),
    "long request id": (lambda client: client.recommend(user_id="u", request_id=LONG), "options.request_id"),
    "long surface": (lambda client: client.recommend(user_id="u", surface="x" * 65), "options.surface"),
    "time before time": (
        lambda client: client.recommend(user_id="u", context=common_pb2.RequestContext(timestamp_ms=-1)),
        "options.context.timestamp_ms",
    ),
    "long device": (
        lambda client: client.recommend(user_id="u", context=common_pb2.RequestContext(device="x" * 65)),
        "options.context.device",
    ),
    "too many attributes": (
        lambda client: client.recommend(
            user_id="u", context=common_pb2.RequestContext(attributes={str(n): "" for n in range(65)})
        ),
        "options.context.attributes",
    ),
    "many exclusions": (
        lambda client: client.recommend(user_id="u", exclude_item_ids=["x"] * 10_001),
        "options.exclude_item_ids",
    ),
    "empty exclusion": (
        lambda client: client.recommend(user_id="u", exclude_item_ids=["i1", ""]),
        "options.exclude_item_ids[1]",
    ),
    "a novelty beyond its range": (
        lambda client: client.recommend(user_id="u", dials=Dials(novelty=1.5)),
        "options.dials.novelty",
    ),
    "a diversity that is none": (
        lambda client: client.rank(["i1"], dials=Dials(diversity=-0.5)),
        "options.dials.diversity",
    ),
    "a NaN freshness": (lambda client: client.search("x", dials=Dials(freshness=NAN)), "options.dials.freshness"),
    "too little of a category": (
        lambda client: client.similar_items(["i1"], dials=Dials(categories={"western": -2})),
        "options.dials.categories['western']",
    ),
    "a weight of no creator": (
        lambda client: client.recommend(user_id="u", dials=Dials(creators={"": 1})),
        "options.dials.creators (a key)",
    ),
    "many weights": (
        lambda client: client.recommend(user_id="u", dials=Dials(creators={f"c{one}": 1 for one in range(1001)})),
        "options.dials",
    ),
    "an infinite dial": (lambda client: client.set_controls([], "u", dials=Dials(novelty=INFINITY)), "dials.novelty"),
    "more rules than there may be": (
        lambda client: client.set_controls(
            [("item", f"i{one}", 0) for one in range(1000)], "u", dials=Dials(novelty=1)
        ),
        "hidden",
    ),
    "no words": (lambda client: client.search(""), "query"),
    "only signs": (lambda client: client.search(" \t?! "), "query"),
    "many words": (lambda client: client.search("x" * 1025), "query"),
    "no candidates": (lambda client: client.rank([]), "candidates.item_ids"),
    "many candidates": (lambda client: client.rank(["x"] * 5001), "candidates.item_ids"),
    "NaN score": (lambda client: client.rank(["i1", "i2"], [1, NAN]), "candidates.upstream_scores[1]"),
    "infinite score": (lambda client: client.rank(["i1", "i2"], [INFINITY, 1]), "candidates.upstream_scores[0]"),
    "scores that do not fit": (lambda client: client.rank(["i1", "i2"], [1]), "candidates.upstream_scores"),
    "NaN weight": (lambda client: client.rank(["i1"], upstream_weight=NAN), "upstream_weight"),
    "negative weight": (lambda client: client.rank(["i1"], upstream_weight=-1), "upstream_weight"),
    "no seeds": (lambda client: client.similar_items([]), "seed_item_ids"),
    "many seeds": (lambda client: client.similar_items(["x"] * 101), "seed_item_ids"),
    "long seed": (lambda client: client.similar_items(["i1", LONG]), "seed_item_ids[1]"),
    "no events": (lambda client: client.ingest([]), "events"),
    "many events": (lambda client: client.ingest([event_pb2.Event()] * 1001), "events"),
    "nobody's profile": (lambda client: client.get_profile(""), "subject"),
    "erasing nobody": (lambda client: client.erase(""), "subject"),
    "nobody's consent": (lambda client: client.set_consent(["train"], ""), "subject"),
    "many purposes": (lambda client: client.set_consent(["train"] * 17, "u"), "purposes"),
    "nobody's fresh start": (lambda client: client.reset_learning(LONG), "subject.user_id"),
    "nobody's mistake": (lambda client: client.undo_event("e", ""), "subject"),
    "no mistake": (lambda client: client.undo_event("", "ann"), "event_id"),
    "no visitor": (lambda client: client.merge_identities("", "ann"), "anonymous_id"),
    "a visitor of nobody": (lambda client: client.merge_identities("ann", LONG), "user_id"),
    "nobody's export": (lambda client: list(client.export_subject("")), "subject"),
    "no certificate": (lambda client: client.get_erasure_certificate(""), "certificate_id"),
    "no items": (lambda client: client.put_items([]), "items"),
    "many items": (lambda client: client.put_items([catalog_pb2.Item()] * 1001), "items"),
    "no patches": (lambda client: client.patch_items([]), "patches"),
    "many patches": (lambda client: client.patch_items([catalog_pb2.ItemPatch()] * 1001), "patches"),
    "no items to get": (lambda client: client.get_items([]), "item_ids"),
    "long item to get": (lambda client: client.get_items(["i1", LONG]), "item_ids[1]"),
    "many fields": (lambda client: client.search("x", fields=["title"] * 65), "options.fields"),
    "no availability": (lambda client: client.set_availability([]), "changes"),
    "nothing to delete": (lambda client: client.delete_items([]), "item_ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_field_and_what_is_allowed(client, unchanged, name):
    call, field = BAD[name]
    error = refused(lambda: call(client))
    assert error.code() is INVALID
    found = violations(error)
    assert list(found) == [field]
    assert any(word in found[field] for word in ("must", "is required"))
    assert field in error.details()


@pytest.mark.parametrize("path", PATHS)
def test_an_empty_request_is_refused_by_name(channel, unchanged, path):
    error = refused(lambda: channel.unary_unary(path)(b"", timeout=20))
    assert error.code() is INVALID
    assert violations(error)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("message", [b"\xff\xff\xff", b"\x0a\x05ab", b"\x0a\x02\x12\xff", bytes(range(256)) * 40])
def test_malformed_bytes_are_no_message(channel, unchanged, path, message):
    error = refused(lambda: channel.unary_unary(path)(message, timeout=20))
    assert error.code() is INVALID
    assert list(violations(error))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=st.binary(max_size=200), path=st.sampled_from(PATHS))
def test_no_bytes_at_all_break_a_worker(channel, message, path):
    try:
        channel.unary_unary(path)(message, timeout=20)
    except grpc.RpcError as error:
        assert error.code() in (INVALID, grpc.StatusCode.DEADLINE_EXCEEDED)  # noqa: PT017 - any answer is allowed too


def test_a_text_that_is_not_utf8_is_no_message(channel, unchanged):
    # field 1 (options) { field 2 (subject) { field 1 (user_id): two bytes that are no UTF-8 } }
    message = b"\x0a\x06\x12\x04\x0a\x02\xc3\x28"
    error = refused(lambda: channel.unary_unary(PATHS[0])(message, timeout=20))
    assert error.code() is INVALID


def test_a_message_of_five_megabytes_is_too_much(channel, unchanged):
    request = ranking_pb2.SearchRequest(query="x" * (5 * MB))
    error = refused(lambda: ranking_pb2_grpc.RankingServiceStub(channel).Search(request, timeout=20))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_message_that_is_small_only_while_packed_is_too_much(service, unchanged):
    request = ranking_pb2.SearchRequest(query="x" * (40 * MB))
    assert len(gzip.compress(request.SerializeToString())) < MB
    with grpc.insecure_channel(service.target, compression=grpc.Compression.Gzip) as channel:
        error = refused(lambda: ranking_pb2_grpc.RankingServiceStub(channel).Search(request, timeout=20))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_unknown_method_is_unimplemented(channel, unchanged):
    error = refused(lambda: channel.unary_unary("/penchant.v1.RankingService/Guess")(b"", timeout=20))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_deadline_that_is_over_is_said_to_be(channel, unchanged):
    grpc.channel_ready_future(channel).result(20)
    options = ranking_pb2.RankingOptions(subject=common_pb2.Subject(user_id="u"), page_size=1)
    stub = ranking_pb2_grpc.RankingServiceStub(channel)
    error = refused(lambda: stub.Recommend(ranking_pb2.RecommendRequest(options=options), timeout=1e-5))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_call_without_a_deadline_gets_one(channel):
    request = ranking_pb2.RecommendRequest(
        options=ranking_pb2.RankingOptions(
            subject=common_pb2.Subject(user_id="u"), page_size=1, min_profile_version=2**62
        )
    )
    begun = time.monotonic()
    answer = ranking_pb2_grpc.RankingServiceStub(channel).Recommend(request)
    assert [entry.part for entry in answer.slate.degraded] == [common_pb2.PART_PROFILE_STALE]
    assert time.monotonic() - begun < 5


def test_callers_that_begin_and_say_nothing_hold_up_nobody(service, client, unchanged):
    silent = threading.Event()

    def nothing():
        silent.wait()
        yield from ()

    with grpc.insecure_channel(service.target) as channel:
        calls = [channel.stream_unary(path).future(nothing()) for path in PATHS[:2] * 10]
        time.sleep(0.5)
        for _ in range(10):
            assert client.recommend(user_id="u", page_size=3, timeout_s=5.0).items
        silent.set()
        bounded = {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert {call.exception().code() for call in calls} <= bounded


def test_odd_but_legal_input_is_answered(client, unchanged):
    client.search("ﬁlm 映画 🎬 İstanbul", page_size=3)
    client.recommend(user_id="\0", exclude_item_ids=["\0", "*", "{p00}"], page_size=1)
    client.rank(["i1"] * 5000, [1.0] * 5000, page_size=100)
    client.similar_items(["i1"] * 100)
    client.get_profile(anonymous_id="😀" * 128)


def test_every_rpc_of_the_contract_is_here():
    files = (ranking_pb2, event_pb2, profile_pb2, catalog_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    single = [method for one in services for method in one.methods if not method.client_streaming]
    assert sorted(PATHS) == sorted(f"/{one.containing_service.full_name}/{one.name}" for one in single)
