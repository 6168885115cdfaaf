"""A logged slate says what it was made of, in few bytes, and stands so in the warehouse."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from features.clock import now_ms
from features.controls import Dial
from features.keys import item_key
from features.profile import empty
from serving.errors import EventLogUnavailable
from serving.observability.telemetry import Telemetry
from serving.pipeline import side_effects
from serving.pipeline.candidates import Candidates
from serving.pipeline.request import Request, Unknown, UserState
from serving.pipeline.results import Slate
from serving.pipeline.side_effects import MOST_DIALS, ImpressionWriter, is_logged, logged_impression
from serving.stores.log_codec import number_text
from serving.stores.log_entries import Entry
from serving.warehouse.tables import impression_table
from tests.serving.faults import wait_until
from tests.serving.logged import pending, slate

ASKED = ("seed_item_ids", "upstream_scores", "upstream_weight", "excluded", "excluded_item_ids", "dials", "merged")
NEW = ("method", "page_size", "source_names", "sources")


def table(*payloads: bytes) -> pa.Table:
    """The rows that the warehouse makes of them."""
    rows, damaged = impression_table([Entry(n + 1, "u:ann", payload=payload) for n, payload in enumerate(payloads)])
    assert not damaged
    return rows


def earlier(payload: bytes) -> bytes:
    """The payload as it was before it said what it is made of."""
    return json.dumps({name: value for name, value in json.loads(payload).items() if name not in NEW}).encode()


def test_a_slate_says_what_it_was_made_of(tmp_path, monkeypatch):
    monkeypatch.setattr(side_effects, "MOST_EXCLUDED", 4)
    turned = {(Dial.NOVELTY, 0): 0.5, (Dial.CATEGORY_WEIGHT, item_key("c1")): -1.0, (Dial.FRESHNESS, 0): 0.0}
    turned |= {(Dial.CREATOR_WEIGHT, item_key("m0")): 0.25, (Dial.CATEGORY_WEIGHT, item_key("?")): 1.0}
    asked = {"exclude": np.arange(20, dtype=np.int32) % 10, "seeds": np.array([4, 5], np.int32)}
    upstream = {"upstream": np.ones(2, np.float32), "upstream_weight": 0.5}
    sources = {"fresh": [np.nan, 1.0], "neighbors": [np.nan, np.nan], "upstream": [0.1, np.nan]}
    rich = slate("ann", "r1", [1, 2], method="rank", dials=turned, sources=sources, **asked, **upstream).payload
    plain = slate("ann", "r2", [3], method="recommend").payload
    file = tmp_path / "slates.parquet"
    pq.write_table(table(rich, plain, earlier(plain)), file)
    whole, bare, old = duckdb.sql(f"SELECT * FROM '{file}' ORDER BY log_id").to_arrow_table().to_pylist()
    assert (whole["method"], whole["page_size"], whole["seed_item_ids"]) == ("rank", 2, ["i4", "i5"])
    assert whole["upstream_scores"] == [np.float32(0.1), None]
    assert (whole["upstream_weight"], whole["excluded"], whole["sources"]) == (0.5, 10, [["upstream"], ["fresh"]])
    assert whole["excluded_item_ids"] == [f"i{n}" for n in range(4)]
    unknown = f"categories.key {item_key('?'):016x}"
    assert dict(whole["dials"]) == {"novelty": 0.5, "categories.c1": -1.0, "creators.m0": 0.25, unknown: 1.0}
    assert (bare["method"], bare["page_size"], bare["sources"]) == ("recommend", 1, [["popular"]])
    assert [bare[name] for name in ASKED] == [None] * len(ASKED)
    assert [old[name] for name in ("method", "page_size", "sources", *ASKED)] == [None] * (3 + len(ASKED))
    frame = pl.read_parquet(file)
    assert frame["sources"].to_list() == [[["upstream"], ["fresh"]], [["popular"]], None]
    assert dict(frame["dials"].to_list()[0]).keys() == dict(whole["dials"]).keys()


def test_scores_lose_digits_and_no_bit():
    scores = [np.float32(score) for score in np.random.default_rng(0).normal(size=1000)]
    payload = slate("ann", "r1", [1] * 1000, sources={"upstream": scores}, upstream=np.ones(1000, np.float32)).payload
    [row] = table(payload).to_pylist()
    assert [np.float32(score) for score in row["upstream_scores"]] == scores


def test_many_dials_are_cut_to_those_turned_furthest():
    many = {(Dial.CATEGORY_WEIGHT, item_key(f"k{n}")): n / 1000 for n in range(1, 500)} | {(Dial.NOVELTY, 0): 0.0001}
    [row] = table(slate("ann", "r1", [1], dials=many).payload).to_pylist()
    values = dict(row["dials"])
    assert len(values) == MOST_DIALS
    assert "novelty" in values
    assert min(value for name, value in values.items() if name != "novelty") > 0.39


def test_what_a_slate_was_made_of_costs_few_bytes():
    sources = {name: np.linspace(0, 1, 10).tolist() for name in ("nearest_to_user", "popular", "fresh")}
    payload = slate("ann", "r1", range(10), method="recommend", sources=sources).payload
    rest = {name: value for name, value in json.loads(payload).items() if name not in NEW}
    assert len(payload) - len(json.dumps(rest, separators=(",", ":"))) < len(payload) / 5


def test_a_payload_whose_sources_make_no_sense_is_damaged():
    payload = json.loads(slate("ann", "r1", [1]).payload)
    for sources in (["?"], None, 3):
        broken = json.dumps(payload | {"sources": sources}).encode()
        assert impression_table([Entry(1, "u:ann", payload=broken)])[1] == 1


def test_items_that_the_catalogue_does_not_know_stand_at_their_places():
    unknown = (Unknown("new-1", 0, 0.75), Unknown("new-2", 2, 0.1))
    payload = slate("ann", "r1", [1, 2], unknown=unknown, upstream=np.ones(2, np.float32)).payload
    [row] = table(payload).to_pylist()
    assert row["item_ids"] == ["new-1", "i1", "new-2", "i2"]
    assert row["sources"] == [[], ["popular"], [], ["popular"]]
    assert [np.isnan(score) for score in row["scores"]] == [True, False, True, False]
    assert row["propensities"] == [1.0] * 4
    assert row["upstream_scores"] == [0.75, None, np.float32(0.1), None]
    payload = slate("ann", "r2", [1, 2], unknown=unknown, upstream=np.ones(2, np.float32), sources={"upstream": [3, 4]})
    assert json.loads(payload.payload)["upstream_scores"] == [0.75, 3.0, 0.1, 4.0]


def test_of_a_share_of_users_every_slate_is_logged_and_says_what_it_stands_for(log, events_redis):
    telemetry = Telemetry()
    writer = ImpressionWriter(log, 1000, telemetry, share=0.25)
    users = [f"u:{number}" for number in range(60)]
    for turn in range(3):
        for subject in users:
            candidates = Candidates(np.array([turn], np.int32), np.ones((1, 1), np.float32), ("popular",))
            answer = Slate(candidates.rows, candidates.scores[0], np.ones(1), candidates, None, {}, [])
            writer.put(pending(Request(f"{subject}-{turn}", subject, now_ms(), 0.0, 1), answer))
    writer.close()
    held = [one for partition in range(log.partitions) for one in log.read_impressions(partition)]
    chosen = [subject for subject in users if is_logged(subject, 0.25)]
    assert Counter(one.subject for one in held) == dict.fromkeys(chosen, 3)
    assert 0 < len(chosen) < 40
    rows, _ = impression_table(held)
    assert rows["weight"].to_pylist() == [4.0] * len(held)
    assert table(slate("ann", "r", [1]).payload)["weight"].to_pylist() == [None]  # where all are logged
    assert telemetry.counters()["slates.left_out"] == 180 - len(held)


def put_some(writer: ImpressionWriter, numbers: range, settle: bool = False) -> None:
    for number in numbers:
        candidates = Candidates(np.array([number % 9], np.int32), np.ones((1, 1), np.float32), ("popular",))
        answer = Slate(candidates.rows, candidates.scores[0], np.ones(1), candidates, None, {}, [])
        writer.put(pending(Request(f"r{number}", "u:ann", now_ms(), 0.0, 1), answer))
        if settle:
            writer.settle()


def ids_of(log) -> list[str]:
    held = [json.loads(entry.payload) for entries in log.history("u:ann", impressions=True) for entry in entries]
    return [one["request_id"] for one in held]


def test_a_slate_is_encoded_by_who_answered_and_logged_in_its_order_and_batch(log, monkeypatch):
    """Of slates that are settled the writer encodes none, of others all; either way they stand in their order."""
    encoded: list[str] = []

    def encode(*arguments):
        encoded.append(threading.current_thread().name)
        return logged_impression(*arguments)

    monkeypatch.setattr(side_effects, "logged_impression", encode)
    sent = []
    monkeypatch.setattr(log, "append_impressions", lambda slates: sent.append(len(slates)) or append(slates))
    append = type(log).append_impressions.__get__(log)
    writer = ImpressionWriter(log, 1000, Telemetry())
    put_some(writer, range(100), settle=True)
    assert encoded == [threading.current_thread().name] * 100
    put_some(writer, range(100, 130))
    writer.close()
    assert encoded.count("impressions") >= 29
    assert ids_of(log) == [f"r{number}" for number in range(130)]
    assert max(sent) <= 64
    assert len(sent) <= 6


def test_slates_beyond_the_limit_are_dropped_and_counted(log, monkeypatch):
    telemetry = Telemetry()
    go = threading.Event()
    monkeypatch.setattr(log, "append_impressions", lambda slates: go.wait(20) and append(slates))
    append = type(log).append_impressions.__get__(log)
    writer = ImpressionWriter(log, 10, telemetry)
    put_some(writer, range(1))
    wait_until(lambda: telemetry.snapshot()["gauges"]["slates_waiting"] == 0)
    put_some(writer, range(1, 31))
    assert telemetry.snapshot()["gauges"]["slates_waiting"] == 10
    go.set()
    writer.close()
    counts = telemetry.counters()
    assert (counts["slates.written"], counts["slates.dropped"]) == (11, 20)
    assert ids_of(log) == [f"r{number}" for number in range(11)]


def test_while_the_log_is_away_slates_are_lost_and_counted_and_it_goes_on_afterwards(log, monkeypatch):
    telemetry, away = Telemetry(), [True]
    append = type(log).append_impressions.__get__(log)

    def fails(slates):
        if away.pop():
            away.append(False)
            raise EventLogUnavailable("away")
        away.append(False)
        return append(slates)

    monkeypatch.setattr(log, "append_impressions", fails)
    writer = ImpressionWriter(log, 100, telemetry)
    put_some(writer, range(5))
    wait_until(lambda: telemetry.counters().get("slates.dropped") == 5)
    put_some(writer, range(5, 9))
    writer.close()
    assert telemetry.counters()["slates.written"] == 4
    assert ids_of(log) == [f"r{number}" for number in range(5, 9)]


def test_the_profile_of_a_user_whose_slates_are_not_logged_is_restored_too(log, monkeypatch):
    returned: list[str] = []
    monkeypatch.setattr(side_effects.RestoreRequests, "add", lambda _, users: returned.extend(users))
    telemetry = Telemetry()
    writer = ImpressionWriter(log, 100, telemetry, share=1e-9)
    candidates = Candidates(np.array([1], np.int32), np.ones((1, 1), np.float32), ("popular",))
    evicted = replace(empty(), version=1)
    for user, profile in (("u:back", evicted), ("u:there", empty())):
        answer = Slate(
            candidates.rows, candidates.scores[0], np.ones(1), candidates, None, {}, [], user=UserState(profile=profile)
        )
        writer.put(pending(Request("r", user, now_ms(), 0.0, 1), answer))
    writer.close()
    assert returned == ["u:back"]
    assert telemetry.counters() == {"slates.left_out": 2}


@given(scores=arrays(np.float32, st.integers(0, 60), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
def test_scores_as_text_are_those_of_the_slate(scores):
    """The fast road and the plain one give the same numbers, to the bit; what is not finite is null."""
    finite = scores[np.isfinite(scores)]
    assert [np.float32(number) for number in json.loads(number_text(finite))] == finite.tolist()
    candidates = Candidates(np.arange(scores.size, dtype=np.int32) % 9, np.ones((1, scores.size), np.float32), ("p",))
    answer = Slate(candidates.rows, scores, np.ones(scores.size), candidates, None, {}, [])
    fields = json.loads(logged_impression(pending(Request("r", "u:ann", 1, 0.0, 1), answer)).payload)
    logged = [np.nan if number is None else np.float32(number) for number in fields["scores"]]
    np.testing.assert_array_equal(logged, np.where(np.isfinite(scores), scores, np.nan))
    assert fields["propensities"] == [1.0] * scores.size


def test_a_slate_that_cannot_be_written_costs_itself_alone(log):
    telemetry = Telemetry()
    writer = ImpressionWriter(log, 10, telemetry)
    for request_id, row in (("r1", 1), ("r2", 1_000_000), ("r3", 2)):
        candidates = Candidates(np.array([row], np.int32), np.ones((1, 1), np.float32), ("popular",))
        answer = Slate(candidates.rows, candidates.scores[0], np.ones(1), candidates, None, {}, [])
        writer.put(pending(Request(request_id, "u:ann", now_ms(), 0.0, 1), answer))
    writer.close()
    held = [json.loads(entry.payload) for entries in log.history("u:ann", impressions=True) for entry in entries]
    assert [one["request_id"] for one in held] == ["r1", "r3"]
    assert telemetry.counters()["slates.dropped"] == 1
