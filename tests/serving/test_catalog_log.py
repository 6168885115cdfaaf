"""The catalogue log on a real Redis: readers that follow, lag, start late or over all reach the same catalogue."""

from __future__ import annotations

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.bundle import open_bundle
from serving.bundle.tables import read_catalog
from serving.engine.catalog_sync import CatalogSync
from serving.engine.engine import EngineRef
from serving.errors import CatalogLogUnavailable
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.catalog_log import CatalogLog, CatalogProgress, Change
from tests.serving.faults import frozen, insist, kill

OPAQUE = st.text(min_size=1, max_size=10) | st.sampled_from(["\0", "*", "{}", "a:b", ":", "put:a", "\r\n", "😀" * 10])
on_redis = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)


@pytest.fixture
def log(events_redis):
    return CatalogLog(events_redis)


class Reader:
    """A worker's catalogue: item -> (payload, availability, patched fields), deleted items left out."""

    def __init__(self) -> None:
        self.version = 0
        self.items: dict[str, tuple[bytes, bytes, dict[str, object]]] = {}

    def apply(self, version: int, changes: list[Change]) -> None:
        self.version = version
        for change in changes:
            if change.kind == "delete":
                self.items.pop(change.item_id, None)
            elif change.kind == "put":
                self.items[change.item_id] = (change.payload, b"", {})
            elif change.item_id in self.items:
                payload, available, fields = self.items[change.item_id]
                if change.kind == "patch":
                    self.items[change.item_id] = (payload, available, fields | json.loads(change.payload))
                else:
                    self.items[change.item_id] = (payload, change.payload, fields)

    def follow(self, log: CatalogLog) -> None:
        while True:
            before = self.version
            self.apply(*log.tail(self.version))
            if self.version == before:
                return


def patch(item: str, fields: dict[str, object]) -> Change:
    return Change("patch", item, json.dumps(fields).encode())


def put(item: str, payload: bytes = b"x") -> Change:
    return Change("put", item, payload)


def test_an_empty_log(log):
    assert log.version() == 0
    assert log.snapshot() == (0, [])
    assert log.tail(0) == (0, [])
    assert log.put([]) == 0
    assert log.wait_all_applied(0, 0)


def test_each_put_is_a_version_and_readers_see_its_changes_in_order(log):
    assert log.put([put("a", b"1"), put("b", b"2")]) == 1
    assert log.put([Change("availability", "a", b"no")]) == 2
    assert log.tail(0) == (
        2,
        [Change("put", "a", b"1", 1), Change("put", "b", b"2", 1), Change("availability", "a", b"no", 2)],
    )
    assert log.tail(1) == (2, [Change("availability", "a", b"no", 2)])
    assert log.tail(2) == (2, [])
    assert log.snapshot() == log.tail(0)


def test_only_the_latest_of_an_item_is_kept(log):
    for number in range(20):
        log.put([put("a", b"%d" % number), Change("availability", "a", b"%d" % number)])
    assert log.snapshot() == (20, [Change("put", "a", b"19", 20), Change("availability", "a", b"19", 20)])
    log.put([Change("delete", "a")])
    assert log.snapshot() == (21, [Change("delete", "a", b"", 21)])
    log.put([put("a", b"again")])
    assert log.snapshot() == (22, [Change("put", "a", b"again", 22)])


ITEMS = st.sampled_from(["a", "b", ":", "put:a"]) | OPAQUE
FIELDS = st.dictionaries(st.sampled_from(["title", "price", "available_from"]), st.none() | OPAQUE | st.floats(0, 9))
CHANGES = st.builds(Change, st.sampled_from(["put", "put", "availability", "delete"]), ITEMS, st.binary(max_size=5))
PATCHES = st.builds(patch, ITEMS, FIELDS.filter(bool))


@on_redis
@given(
    st.lists(st.lists(CHANGES | PATCHES, min_size=1, max_size=4), max_size=12), st.integers(0, 12), st.integers(1, 4)
)
def test_readers_who_follow_lag_or_start_late_agree(events_redis, puts, lag, length):
    events_redis.flushall()
    # An exact length, so that a reader with a lag finds the stream cut off behind it.
    log, truth, following, lagging = CatalogLog(events_redis), Reader(), Reader(), Reader()
    for number, changes in enumerate(puts):
        truth.apply(log.put(changes), changes)
        events_redis.xtrim(b"penchant:{catalog}:changes", maxlen=length, approximate=False)
        following.follow(log)
        if number < lag:
            lagging.follow(log)
    late = Reader()
    late.apply(*log.snapshot())
    lagging.follow(log)
    assert following.items == lagging.items == late.items == truth.items
    # What is about deleted items alone makes no version.
    assert following.version == lagging.version == late.version == log.version() <= len(puts)


def test_a_patch_of_a_field_replaces_an_older_one_and_no_other_field(log):
    log.put([put("a", b"1")])
    log.put([patch("a", {"title": "x", "price": 1.5})])
    log.put([Change("availability", "a", b"no")])
    log.put([patch("a", {"price": None})])
    assert log.snapshot() == (
        4,
        [
            Change("put", "a", b"1", 1),
            Change("patch", "a", b'{"title": "x"}', 2),
            Change("availability", "a", b"no", 3),
            Change("patch", "a", b'{"price": null}', 4),
        ],
    )
    # Who had version 2 already does not get its title again, which a bundle may have replaced since.
    assert [change.version for change in log.tail(2)[1]] == [3, 4]
    log.put([put("a", b"whole")])
    assert log.snapshot() == (5, [Change("put", "a", b"whole", 5)])


def test_what_adds_to_a_deleted_item_is_refused_by_the_log_itself(log):
    assert log.write([put("a"), Change("delete", "a"), Change("delete", "b")]) == (1, ())
    assert log.write([patch("a", {"price": 1}), Change("availability", "a", b"yes")]) == (1, (0, 1))
    assert log.write([patch("a", {"price": 1}), put("b"), patch("b", {"price": 2})]) == (2, (0,))
    assert [change.item_id for change in log.tail(1)[1]] == ["b", "b"]
    assert log.write([put("a"), patch("a", {"price": 3})]) == (3, ())
    many = [put(f"{number}") for number in range(1000)]
    assert log.write([*many, Change("delete", "a"), patch("a", {"price": 4})]) == (5, (1001,))


def test_more_changes_than_fit_a_version(log):
    assert log.put([put(f"{number}") for number in range(2500)]) == 3
    late, following = Reader(), Reader()
    late.apply(*log.snapshot())
    following.follow(log)
    assert len(late.items) == 2500
    assert late.items == following.items


def test_the_stream_is_bounded(events_redis):
    log = CatalogLog(events_redis, stream_length=100)
    for _ in range(500):
        log.put([put("a")])
    assert events_redis.xlen(b"penchant:{catalog}:changes") < 300
    reader = Reader()
    reader.follow(log)
    assert (reader.version, len(reader.items)) == (500, 1)


def test_changes_during_a_snapshot_are_not_missed(events_redis, events_server):
    stop = threading.Event()

    def change() -> None:
        with connect(events_server.url, 2) as client:
            log, number = CatalogLog(client), 0
            while not stop.is_set():
                log.put([put(f"{number % 700}", b"%d" % number), Change("delete", f"{(number + 350) % 700}")])
                number += 1

    log = CatalogLog(events_redis)
    log.put([put(f"{number}") for number in range(700)])
    thread = threading.Thread(target=change)
    thread.start()
    readers = []
    for _ in range(20):
        readers.append(Reader())
        readers[-1].apply(*log.snapshot())
    stop.set()
    thread.join()
    truth = Reader()
    truth.apply(*log.snapshot())
    for reader in readers:
        reader.follow(log)
        assert reader.items == truth.items


def test_a_waiting_reader_gets_news_at_once(log, events_server):
    seen = []

    def follow() -> None:
        with connect(events_server.url, 1) as client:
            seen.append(CatalogLog(client).tail(0, block_ms=10_000))  # longer than its timeout

    thread = threading.Thread(target=follow)
    start = time.monotonic()
    thread.start()
    time.sleep(1.5)
    log.put([put("a")])
    thread.join()
    assert seen == [(1, [Change("put", "a", b"x", 1)])]
    assert 1.5 <= time.monotonic() - start < 5
    assert log.tail(1, block_ms=50) == (1, [])


def test_a_log_that_was_lost_is_begun_anew(log, events_redis):
    log.put([put("a")])
    log.put([put("b")])
    events_redis.flushall()
    log.put([put("c")])
    assert log.tail(2) == (1, [Change("put", "c", b"x", 1)])


def test_everybody_is_waited_for_who_lives(events_redis):
    log = CatalogLog(events_redis, live_ms=300)
    log.applied("one", 1)
    log.applied("two", 2)
    log.applied("three", 3)
    assert log.wait_all_applied(1, 0)
    assert not log.wait_all_applied(2, 0.02)
    log.applied("one", 2)
    assert log.wait_all_applied(2, 0)
    assert not log.wait_all_applied(2, 0.02, at_least=4)  # one of them was not heard of yet
    log.leave("two")
    log.applied("one", 3)
    assert log.wait_all_applied(3, 0)
    log.applied("dead", 1)

    def heartbeat() -> None:
        for _ in range(10):
            log.applied("one", 5)
            log.applied("three", 5)
            time.sleep(0.05)

    thread = threading.Thread(target=heartbeat)
    thread.start()
    assert not log.wait_all_applied(5, 0.1)
    assert log.wait_all_applied(5, 5)
    thread.join()


def test_changes_survive_kills(tmp_path):
    with RedisServer(tmp_path, "events") as server, connect(server.url, 0.5) as client:
        log, truth = CatalogLog(client, cooldown_s=0.05), Reader()
        for number in range(30):
            if number % 10 == 5:
                kill(server)
            changes = [put(f"{number}"), Change("delete", f"{number - 3}")]
            version = insist(lambda changes=changes: log.put(changes))
            truth.apply(version, changes)
        late = Reader()
        late.apply(*log.snapshot())
        assert (late.version, late.items) == (truth.version, truth.items)
        assert server.restarts == 3


def test_a_frozen_log_is_unavailable(tmp_path):
    with RedisServer(tmp_path, "events") as server, connect(server.url, 0.1) as client:
        log = CatalogLog(client)
        with frozen(server):
            for _ in range(20):
                with pytest.raises(CatalogLogUnavailable):
                    log.tail(0, block_ms=1000)


def test_a_change_that_makes_no_sense_does_not_hold_up_those_behind_it(world, log, caplog):
    catalog, lexical = read_catalog(open_bundle(world))
    engine = SimpleNamespace(catalog=catalog, lexical=lexical)
    following = CatalogSync(EngineRef(engine), log, CatalogProgress())
    closed = json.dumps({"available": False, "available_from": 0, "available_until": 0}).encode()
    changes = [("i1", b"{}"), ("i2", b"no JSON"), ("i3", closed)]
    following.apply([Change("availability", *change) for change in changes] + [Change("delete", "i4")])
    shown = catalog.eligible(catalog.rows(["i1", "i2", "i3", "i4"]), int(time.time() * 1000))
    np.testing.assert_array_equal(shown, [True, True, False, False])
    assert caplog.text.count("cannot be applied and is skipped") == 2
