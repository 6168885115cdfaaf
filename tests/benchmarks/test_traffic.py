from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load.generator import Generator
from benchmarks.load.material import gather
from benchmarks.load.recorded import RecordedTraffic
from benchmarks.load.traffic import (
    PATHS,
    Bursts,
    MixedTraffic,
    RequestMaterial,
    Shape,
    arrivals,
    parse_bursts,
    parse_mix,
    zipf_shares,
)
from benchmarks.report import BenchmarkError
from features.tables.schema import EVENTS
from penchant.v1 import event_pb2, ranking_pb2
from serving.warehouse.tables import IMPRESSION_ROWS
from tests.benchmarks.conftest import ITEMS, Stub

MIX = "recommend=70,search=10,rank=10,similar=5,ingest=5"
USERS = [f"user-{number}" for number in range(50)]


@pytest.fixture
def generator(stub: Stub) -> Generator:
    return Generator(stub.target, 1)


def test_a_mix_is_what_it_says(generator: Generator) -> None:
    shape = Shape(parse_mix(MIX), candidates=12, page_size=7, surface="home", batch_share=0.25)
    material = RequestMaterial(USERS, ITEMS, ["red shoes", "blue wine"])
    with generator:
        plan = MixedTraffic(generator, material, shape, seed=3).plan(200.0, 8000)
    counts = Counter(plan.names[kind] for kind in plan.kinds.tolist())
    weights = {"recommend": 70, "search": 10, "rank": 10, "similar": 5, "ingest": 5}
    for name, weight in weights.items():
        assert counts[name] / 8000 == pytest.approx(weight / 100, abs=0.02)
    assert plan.rate == pytest.approx(200.0, rel=0.05)
    assert np.mean([b"penchant-priority" in head for head in plan.heads]) == pytest.approx(0.25, abs=0.02)
    seen: dict[str, list[bytes]] = {name: [] for name in weights}
    for kind, message in zip(plan.kinds.tolist(), plan.messages, strict=True):
        seen[plan.names[kind]].append(message)
    for message in seen["recommend"][:50]:
        options = ranking_pb2.RecommendRequest.FromString(message).options
        assert (options.page_size, options.surface) == (7, "home")
        assert options.subject.user_id in USERS
    assert {ranking_pb2.SearchRequest.FromString(message).query for message in seen["search"]} == {
        "red shoes",
        "blue wine",
    }
    ranked = ranking_pb2.RankRequest.FromString(seen["rank"][0])
    assert len(set(ranked.candidates.item_ids)) == 12
    assert ranked.options.subject.user_id
    similar = ranking_pb2.SimilarItemsRequest.FromString(seen["similar"][0])
    assert similar.seed_item_ids[0] in ITEMS
    events = [event_pb2.IngestRequest.FromString(message).events for message in seen["ingest"]]
    assert all(len(batch) == 1 and batch[0].item_id in ITEMS for batch in events)
    assert len({batch[0].event_id for batch in events}) == len(events)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("recomend=70", "'recommend'"),
        ("recommend", "recommend=70"),
        ("recommend=0", "above 0"),
        ("recommend=-1", "above 0"),
        ("recommend=nan", "above 0"),
        ("recommend=much", "above 0"),
        ("recommend=1,recommend=2", "twice"),
        ("", "METHOD=WEIGHT"),
        ("delete=1", "recommend, search, rank, similar, ingest"),
    ],
)
def test_a_bad_mix_is_refused_with_what_is_right(text: str, right: str) -> None:
    with pytest.raises(BenchmarkError, match="--mix") as refused:
        parse_mix(text)
    assert right in str(refused.value)


@pytest.mark.parametrize("text", ["5", "5x2", "1x2/10", "5x10/2", "axb/c", "5x0/10", "infx1/2"])
def test_bad_bursts_are_refused_with_what_is_right(text: str) -> None:
    with pytest.raises(BenchmarkError, match="5x2/10"):
        parse_bursts(text)


def test_material_that_lacks_something_says_what_to_give(generator: Generator) -> None:
    with generator:
        for mix, material, hint in (
            ("rank=1", RequestMaterial(USERS, ITEMS[:5]), "--candidates"),
            ("search=1", RequestMaterial(USERS, ITEMS), "--queries"),
            ("similar=1", RequestMaterial(USERS), "--bundle"),
            ("recommend=1", RequestMaterial([]), "at least one"),
        ):
            with pytest.raises(BenchmarkError, match=hint):
                MixedTraffic(generator, material, Shape(parse_mix(mix)))


def test_without_a_bundle_items_come_from_the_answers(stub: Stub, generator: Generator) -> None:
    stub.slate = lambda user: ITEMS[:10] if user == USERS[0] else ITEMS[10:30]
    with generator:
        known = gather(generator, USERS, {"rank"})
    assert sorted(known.items) == sorted(ITEMS[:30])


@given(st.floats(5, 500), st.floats(1.5, 20), st.floats(0.5, 3), st.floats(1.1, 5), st.integers(0, 99))
def test_bursts_keep_the_mean_rate_and_reach_their_factor(
    rate: float, factor: float, length_s: float, more: float, seed: int
) -> None:
    bursts = Bursts(factor, length_s, length_s * more)
    count = 4000
    moments = arrivals(rate, count, np.random.default_rng(seed), bursts)
    assert (np.diff(moments) >= 0).all()
    even = arrivals(rate, count, np.random.default_rng(seed))
    # The clock is stretched within a period, and right again at the end of each.
    assert moments[-1] == pytest.approx(even[-1], abs=bursts.every_s)
    whole = moments[moments < bursts.every_s * (moments[-1] // bursts.every_s)]
    if whole.size > 2000 and more > 1.2:
        inside = whole % bursts.every_s < length_s
        quiet = (~inside).sum() / (bursts.every_s - length_s)
        assert inside.sum() / length_s / max(quiet, 1e-9) == pytest.approx(factor, rel=0.5)


def test_users_follow_zipf() -> None:
    shares = zipf_shares(1000, 1.0)
    assert shares.sum() == pytest.approx(1.0)
    assert shares[0] / shares[9] == pytest.approx(10.0)
    assert np.ptp(zipf_shares(10, 0.0)) == 0
    with pytest.raises(BenchmarkError, match="--zipf"):
        zipf_shares(10, -1.0)


def _warehouse(folder: Path) -> Path:
    start = 1_700_000_000_000
    slates = [
        {"request_id": "a", "user_id": "ann", "timestamp": start, "item_ids": ["x", "y"], "propensities": [1.0, 1.0],
         "method": "recommend", "surface": "home", "page_size": 2},
        {"request_id": "b", "user_id": "a:anon", "timestamp": start + 1000, "item_ids": ["x"], "propensities": [1.0],
         "method": "search", "query": "red", "page_size": 5},
        {"request_id": "c", "user_id": "ann", "timestamp": start + 3000, "item_ids": ["x", "z"],
         "propensities": [1.0, 1.0], "method": "rank"},
        {"request_id": "d", "user_id": "bob", "timestamp": start + 3500, "item_ids": ["z"], "propensities": [1.0],
         "method": "similar", "seed_item_ids": ["y"]},
    ]  # fmt: skip
    events = [
        {"user_id": "ann", "item_id": "x", "event_type": "rating", "timestamp": start + 4000, "value": 5.0,
         "event_id": "once"},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(slates, IMPRESSION_ROWS), folder / "impressions.parquet")
    pq.write_table(pa.Table.from_pylist(events, EVENTS), folder / "events.parquet")
    return folder


def test_recorded_traffic_is_sent_again_at_a_multiple_of_its_speed(tmp_path: Path, generator: Generator) -> None:
    with generator:
        recorded = RecordedTraffic(generator, _warehouse(tmp_path))
        assert recorded.rate == pytest.approx(5 / 4)
        recorded.plan(1.0, 3)
        recorded.rewind()
        plan = recorded.plan(2 * recorded.rate, 10)
    assert [plan.names[kind] for kind in plan.kinds.tolist()] == [
        "recommend",
        "search",
        "rank",
        "similar",
        "ingest",
    ] * 2
    # Twice as fast, and after the last one the first one follows by the mean distance.
    assert plan.moments[:5] == pytest.approx([0.0, 0.5, 1.5, 1.75, 2.0])
    assert plan.moments[5] == pytest.approx(2.0 + 0.4)
    first = ranking_pb2.RecommendRequest.FromString(plan.messages[0]).options
    assert (first.subject.user_id, first.surface, first.page_size) == ("ann", "home", 2)
    search = ranking_pb2.SearchRequest.FromString(plan.messages[1])
    assert (search.options.subject.anonymous_id, search.query) == ("anon", "red")
    rank = ranking_pb2.RankRequest.FromString(plan.messages[2])
    assert list(rank.candidates.item_ids) == ["x", "z"]
    assert list(ranking_pb2.SimilarItemsRequest.FromString(plan.messages[3]).seed_item_ids) == ["y"]
    events = [event_pb2.IngestRequest.FromString(plan.messages[at]).events[0] for at in (4, 9)]
    assert {event.item_id for event in events} == {"x"}
    assert events[0].value == 5.0
    # Logged once already: with its old id or time the service would not take it.
    assert len({event.event_id for event in events} | {"once"}) == 3
    assert events[0].timestamp_ms == 0


def test_an_empty_warehouse_is_refused(tmp_path: Path, generator: Generator) -> None:
    with generator, pytest.raises(BenchmarkError, match="give a warehouse"):
        RecordedTraffic(generator, tmp_path)


def test_every_method_of_a_mix_is_one_of_the_contract() -> None:
    services = {
        f"/{service.full_name}/{method.name}"
        for file in (ranking_pb2, event_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert set(PATHS.values()) <= services
