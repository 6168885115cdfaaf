"""The event log on a real Redis: one effect per event, nothing acknowledged is lost, erased stays erased."""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import pytest
from grpc import StatusCode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.clock import now_ms
from features.records import make_records
from features.subjects import partition_of
from penchant import client
from penchant.v1 import event_pb2
from serving.engine.engine import EngineRef
from serving.errors import ConfigError, EventLogUnavailable, FailedPrecondition, ResourceExhausted
from serving.observability.telemetry import Telemetry
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.services.events import EventService
from serving.services.streams import Streams
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.keys import log_id, stream_id
from serving.stores.log_entries import LoggedEvent, LoggedImpression
from serving.stores.log_erasure import LogErasure
from tests.serving.faults import frozen, insist, kill, wait_until
from tests.serving.logged import NOTHING_KEPT

OPAQUE = st.text(min_size=1, max_size=20) | st.sampled_from(
    ["\0", "*", "{}", "a:b", "a:", ":b", "b", "\r\n", "😀" * 30]
)
on_redis = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
FUTURE = 4_000_000_000_000


@pytest.fixture
def log(events_redis):
    log = EventLog(events_redis, 4)
    log.open()
    return log


def event(number: int, subject: str = "u:1", timestamp: int = FUTURE, event_id: str = "") -> LoggedEvent:
    record = make_records(number, 0, 0, timestamp, np.nan, 1).tobytes()
    return LoggedEvent(subject, event_id or f"e{number}", record, b'{"n":%d}' % number)


def everything(log: EventLog, read=None):
    return [entry for partition in range(log.partitions) for entry in (read or log.read)(partition)]


def test_a_log_id_is_a_stream_id():
    assert log_id(b"1700000000000-5") == (1_700_000_000_000 << 20) + 5
    assert stream_id(log_id(b"1700000000000-1048575")) == b"1700000000000-1048575"


def test_what_was_appended_can_be_read_in_order(log):
    appended = log.append([event(number) for number in range(5)])
    assert all(one.error is None and not one.duplicate for one in appended)
    ids = [one.log_id for one in appended]
    assert ids == sorted(set(ids))
    entries = log.read(partition_of("u:1", 4))
    assert [entry.log_id for entry in entries] == ids
    assert [entry.payload for entry in entries] == [b'{"n":%d}' % number for number in range(5)]
    assert [(entry.subject, entry.event_id, entry.record) for entry in entries] == [
        ("u:1", f"e{number}", event(number).record) for number in range(5)
    ]
    assert [entry.log_id for entry in log.read(partition_of("u:1", 4), after=ids[1], count=2)] == ids[2:4]


def test_a_retry_gets_the_answer_of_the_first_and_its_record(log, events_redis):
    [first] = log.append([event(1)])
    changed = event(2, event_id="e1")
    again = log.append([changed, changed])
    assert [(one.log_id, one.duplicate, one.record) for one in again] == [(first.log_id, True, event(1).record)] * 2
    [other] = log.append([event(1, subject="u:2")])
    assert not other.duplicate
    assert len(everything(log)) == 2
    events_redis.xdel(log.keys[partition_of("u:1", 4)].events, stream_id(first.log_id))
    assert log.append([event(1)])[0].record == b""


def test_one_person_fills_no_more_than_their_share_and_has_it_again_when_it_is_trimmed(events_redis):
    log = EventLog(events_redis, 1, user_cap=5)
    log.open()
    appended = log.append([event(number) for number in range(7)] + [event(0, "u:2")])
    assert [one.error is None for one in appended] == [True] * 5 + [False] * 2 + [True]
    assert isinstance(appended[5].error, ResourceExhausted)
    assert (appended[5].error.field, appended[5].log_id) == ("subject", 0)
    assert "bot" in str(appended[5].error)
    assert log.append([event(1)])[0].duplicate  # a retry of what was taken is told so all the same
    events_redis.set(log.keys[0].floor, (appended[4].log_id >> 20) + 1)  # what a trim of all this leaves
    assert log.append([event(number) for number in (7, 8)])[0].error is None


@on_redis
@given(st.lists(st.tuples(OPAQUE, OPAQUE), min_size=1, max_size=8))
def test_ids_are_opaque_and_never_mix(events_redis, pairs):
    events_redis.flushall()
    log = EventLog(events_redis, 4)
    appended = log.append([event(1, subject, event_id=event_id) for subject, event_id in pairs])
    assert sum(not one.duplicate for one in appended) == len(set(pairs))
    assert {(entry.subject, entry.event_id) for entry in everything(log)} == set(pairs)
    for subject in {subject for subject, _ in pairs}:
        assert LogErasure(log).erase(subject).events == len({pair for pair in pairs if pair[0] == subject})
    assert [entry for entry in everything(log) if entry.subject] == []


def test_retries_are_forgotten_after_the_window(events_redis):
    log = EventLog(events_redis, 4, window_ms=50, times=NOTHING_KEPT)
    [first] = log.append([event(1, timestamp=0)])
    time.sleep(0.1)
    [second] = log.append([event(1, timestamp=0)])
    assert (second.duplicate, second.log_id > first.log_id) == (False, True)


def test_a_retry_of_an_event_ahead_of_the_clock_is_known_for_as_long_as_it_is_taken(events_redis):
    log = EventLog(events_redis, 4, window_ms=50, times=NOTHING_KEPT)
    ahead = event(1, timestamp=now_ms() + 60_000)
    log.append([ahead])
    time.sleep(0.1)
    assert log.append([ahead])[0].duplicate


def test_a_sequence_number_never_overflows_a_log_id(log, events_redis):
    ahead = now_ms() + 3_600_000  # as after the clock was set back by an hour
    stream = log.keys[partition_of("u:1", 4)].events
    events_redis.xadd(stream, {"s": "u:x"}, id=f"{ahead}-{(1 << 20) - 2}")
    ids = [one.log_id for one in log.append([event(number) for number in range(3)])]
    assert ids == [log_id(b"%d-%d" % (ahead, (1 << 20) - 1)), (ahead + 1) << 20, ((ahead + 1) << 20) + 1]
    assert [entry.log_id for entry in log.read(partition_of("u:1", 4))][1:] == ids


def test_the_past_of_an_erased_person_is_refused_and_their_future_is_not(log, events_redis):
    now = now_ms()
    log.append([event(1), event(2), event(3, subject="u:2")])
    log.append_impressions([LoggedImpression("u:1", now, b"{}")])
    erased = LogErasure(log).erase("u:1")
    assert (erased.events, erased.impressions) == (2, 1)
    old, new = log.append([event(4, timestamp=now - 1), event(5)])
    assert isinstance(old.error, FailedPrecondition)
    assert new.error is None
    assert new.log_id > erased.log_id
    assert (
        log.append_impressions([LoggedImpression("u:1", now - 1, b"{}"), LoggedImpression("u:1", FUTURE, b"{}")]) == 1
    )
    assert [entry.record for entry in everything(log) if entry.subject] == [event(3).record, event(5).record]
    # Consumers meet the erasure in order, and nothing but the streams and indexes of what came later names the person.
    assert [entry.log_id for entry in everything(log) if entry.erased] == [erased.log_id]
    assert b"u:1" not in b"".join(events_redis.hkeys(log.keys[partition_of("u:1", 4)].erased))
    assert LogErasure(log).erase("u:1").events == 1
    assert not any(b"u:1" in key for key in events_redis.scan_iter())


def test_an_erasure_takes_all_of_somebody_who_did_much(log, events_redis):
    """More than one call to Redis can delete."""
    now, keys = log.now_ms(), set(events_redis.scan_iter("*"))
    for start in range(0, 2300, 100):
        log.append([event(number, timestamp=now) for number in range(start, start + 100)])
        log.append_impressions([LoggedImpression("u:1", now, b"{}")] * 100)
    log.append([event(1, "u:2", now)])
    time.sleep(0.002)
    erased = LogErasure(log).erase("u:1")
    assert (erased.events, erased.impressions) == (2300, 2300)
    assert [entry.subject for entry in everything(log) if entry.subject] == ["u:2"]
    assert everything(log, log.read_impressions) == []
    left = {key for key in events_redis.scan_iter("*") if b"seen" in key or b"index" in key} - keys
    assert left == {log.seen_of("u:2", "e1"), log.keys_of("u:2").index_of("u:2")}


def test_an_erasure_finds_what_its_index_has_forgotten(events_redis):
    log = EventLog(events_redis, 4, times=NOTHING_KEPT)
    log.append([event(number, subject) for number in range(3) for subject in ("u:1", "u:2")])
    time.sleep(0.05)
    assert not any(b":index:" in key for key in events_redis.scan_iter())
    assert LogErasure(log).erase("u:1").events == 3
    assert {entry.subject for entry in everything(log)} == {"", "u:2"}


def test_impressions_are_kept_apart(log):
    slates = [LoggedImpression(f"u:{number}", FUTURE, b"{%d}" % number) for number in range(10)]
    assert log.append_impressions(slates) == 10
    assert everything(log) == []
    assert {(entry.subject, entry.payload) for entry in everything(log, log.read_impressions)} == {
        (slate.subject, slate.payload) for slate in slates
    }


def taken(write) -> bool:
    try:
        write()
    except ResourceExhausted:
        return False
    return True


@pytest.mark.parametrize(
    ("full", "impressions", "events"), [(0.5, True, True), (0.8, False, True), (0.95, False, False), (2, False, False)]
)
def test_a_filling_log_refuses_impressions_then_events_and_still_erases(tmp_path, full, impressions, events):
    with RedisServer(tmp_path, "events") as server, connect(server.url, 2) as client:
        EventLog(client, 1).append([event(1)])
        client.set("filler", bytes(20 << 20))
        # What the connection read it with is given back a little later.
        wait_until(lambda: client.info("memory")["mem_clients_normal"] < 1 << 20)
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] / full))
        log = EventLog(client, 1)
        slate = LoggedImpression("u:1", FUTURE, b"{}")
        assert taken(lambda: log.append_impressions([slate])) == impressions
        assert taken(lambda: log.append([event(2)])) == events
        assert LogErasure(log).erase("u:1").events == 1 + events
        reader = Consumer(log, "readers", "a")
        reader.open()
        [entries] = reader.claim([None])
        assert [entry.erased != b"" for entry in entries] == [True]
        reader.acknowledge(0, [entry.log_id for entry in entries])
        log.trim(0)
        reader.release()


def test_what_the_log_refuses_counts_as_refused(events_redis, store):
    log, telemetry = EventLog(events_redis, 4, user_cap=1), Telemetry()
    log.open()
    empty = SimpleNamespace(category_and_creator=lambda key: None)
    engine_ref = EngineRef(SimpleNamespace(catalog=empty, event_types={}))
    service = EventService(engine_ref, log, store, telemetry, Streams(1))
    events = [client.event("ann", f"i{number}", "Purchase") for number in range(3)]
    statuses = service.Ingest(event_pb2.IngestRequest(events=[*events, client.event("ann")]), None).statuses
    codes = (0, StatusCode.RESOURCE_EXHAUSTED, StatusCode.RESOURCE_EXHAUSTED, StatusCode.INVALID_ARGUMENT)
    assert [status.code for status in statuses] == [code and code.value[0] for code in codes]
    counts = {"events.taken": 1, "events.refused": 3, "events_unknown_item": 1, "events_odd_type": 1}
    assert telemetry.counters() == counts


def test_a_redis_without_memory_refuses_each_event_by_itself(tmp_path):
    with RedisServer(tmp_path, "events") as server, connect(server.url, 2) as client:
        log = EventLog(client, 1)
        log.append([event(1)])
        client.config_set("maxmemory", 1000)  # between two looks at the memory
        known, refused = log.append([event(1), event(2)])
        assert known.duplicate
        assert isinstance(refused.error, ResourceExhausted)


def test_another_number_of_partitions_is_refused(log, events_redis):
    with pytest.raises(ConfigError, match="set partitions to 4"):
        EventLog(events_redis, 8).append([event(1)])


def test_nothing_acknowledged_is_lost_or_doubled_by_kills(tmp_path):
    """Each batch is retried until it is acknowledged, while Redis is killed again and again."""
    acknowledged = {}
    with RedisServer(tmp_path, "events") as server, connect(server.url, 0.3) as client:
        log = EventLog(client, 4, cooldown_s=0.05)
        batches = [[event(10 * batch + n, f"u:{n}") for n in range(10)] for batch in range(60)]
        for number, batch in enumerate(batches):
            if number % 12 == 6:
                kill(server)
            appended = insist(lambda batch=batch: log.append(batch))
            acknowledged |= {e.event_id: a.log_id for e, a in zip(batch, appended, strict=True)}
        assert server.restarts >= 4
        found = [(entry.event_id, entry.log_id) for entry in everything(log)]
    assert len(found) == 600
    assert dict(found) == acknowledged


def test_a_frozen_log_costs_one_timeout(tmp_path):
    with RedisServer(tmp_path, "events") as server, connect(server.url, 0.1) as client:
        log = EventLog(client, 4)
        log.append([event(1)])
        with frozen(server):
            start = time.monotonic()
            for _ in range(50):
                with pytest.raises(EventLogUnavailable):
                    log.append([event(2)])
            assert time.monotonic() - start < 1.5


NEWS, PENDING = None, 0


def ids(entries) -> list[int]:
    return [entry.log_id for entry in entries]


def test_one_owner_per_partition_and_pending_goes_to_the_next(log):
    first, second = (Consumer(log, "readers", owner, lease_ms=60_000) for owner in ("a", "b"))
    first.open()
    second.open()
    log.append([event(number, f"u:{number}") for number in range(40)])
    read = first.claim([NEWS] * 4)
    assert sum(map(len, read)) == 40
    assert second.claim([PENDING] * 4) == [None] * 4
    assert sum(first.lag()) == 40
    first.acknowledge(0, ids(read[0]))
    LogErasure(log).erase(read[1][3].subject)
    first.release()
    left = second.claim([PENDING] * 4)
    assert list(map(ids, left)) == [[], *map(ids, read[1:])]
    assert [place for place, entry in enumerate(left[1]) if not entry.subject] == [3]  # deleted while it was pending
    assert ids(second.claim([NEWS, NEWS, ids(read[2])[1], NEWS], count=2)[2]) == ids(read[2])[2:4]
    assert first.claim([NEWS] * 4) == [None] * 4
    for partition, entries in enumerate(left):
        second.acknowledge(partition, ids(entries))
    assert sum(second.lag()) == 1  # the mark of the erasure, read by the claim of two
    assert second.claim([NEWS] * 4) == [[]] * 4


def test_a_lease_runs_out(log):
    first, second = (Consumer(log, "readers", owner, lease_ms=50) for owner in ("a", "b"))
    first.open()
    assert first.claim([NEWS] * 4) == [[]] * 4
    assert second.claim([NEWS] * 4) == [None] * 4
    time.sleep(0.1)
    assert second.claim([NEWS] * 4) == [[]] * 4


def test_trimming_waits_for_the_slowest_reader(events_redis):
    log = EventLog(events_redis, 1, times=NOTHING_KEPT)
    reader = Consumer(log, "readers", "a")
    reader.open()
    appended = [one.log_id for number in range(10) for one in (time.sleep(0.002), *log.append([event(number)]))[1:]]
    time.sleep(1.1)  # the server tells its time in seconds
    assert log.trim(0) == 0
    [entries] = reader.claim([NEWS], count=6)
    reader.acknowledge(0, ids(entries)[:4])
    assert log.trim(0) == 4
    reader.acknowledge(0, ids(entries))
    assert log.trim(0) == 1  # the last one delivered stays
    assert ids(log.read(0)) == appended[5:]
    assert log.append([event(11)])[0].error is None
    assert LogErasure(log).erase("u:1").events == 6
