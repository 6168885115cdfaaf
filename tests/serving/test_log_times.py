"""The log keeps for hours what every reader has, and everything that one of them has not."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.records import make_records
from serving.log_retention import ALONE_MS, EVENTS_MS, HOUR_MS, PROFILES_GROUP, SLATES_MS, LogRetention
from serving.pipeline.side_effects import is_logged
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.keys import SEQUENCE_BITS
from serving.stores.log_entries import LoggedEvent, LoggedImpression
from serving.stores.log_erasure import LogErasure
from tests.serving.logged import NOTHING_KEPT

FUTURE = 4_000_000_000_000


def event(number: int, subject: str = "u:1") -> LoggedEvent:
    record = make_records(number + 1, 0, 0, FUTURE, np.nan, 1).tobytes()
    return LoggedEvent(subject, f"e{number}", record, b"{}")


@given(st.one_of(st.none(), st.floats(0.001, 10_000)), st.one_of(st.none(), st.floats(0.001, 10_000)), st.booleans())
def test_what_the_service_says_is_what_whoever_trims_reads(events, slates, copied):
    told = LogRetention.of(events, slates, copied)
    read = LogRetention.read(told.stored)
    assert (read.events_ms, read.slates_ms) == (told.events_ms, told.slates_ms)
    for groups in ((), (PROFILES_GROUP,), (PROFILES_GROUP, "warehouse")):
        kept = read.kept(groups, groups[1:])
        assert kept[1] <= kept[0]
        # An index names what the log holds, and lasts as long.
        assert told.index_ms >= kept[0] or len(groups) < 2


def test_the_log_is_kept_longer_where_nobody_has_a_copy():
    usual = LogRetention.read(None)
    assert usual.kept((PROFILES_GROUP, "warehouse"), ("warehouse",)) == (EVENTS_MS, SLATES_MS)
    assert usual.kept((PROFILES_GROUP,), ()) == (ALONE_MS, ALONE_MS)
    assert usual.kept(("warehouse",), ("warehouse",))[0] == ALONE_MS  # the projector has not joined yet
    assert LogRetention.of(3, None, True).kept((PROFILES_GROUP,), ()) == (3 * HOUR_MS, 3 * HOUR_MS)


@pytest.fixture
def filled(events_redis, monkeypatch):
    """A log with five events and slates, a moment old, of which everything may go that is read."""
    monkeypatch.setattr("serving.stores.log_trim.TOGETHER", 2)
    log = EventLog(events_redis, 1, times=NOTHING_KEPT)
    log.open()
    for number in range(5):
        log.append([event(number)])
        log.append_impressions([LoggedImpression("u:1", FUTURE, b'{"n": %d}' % number)])
        time.sleep(0.002)
    time.sleep(1.1)  # the server tells its time in seconds
    return log


def read(log: EventLog, group: str, stream, count: int) -> None:
    consumer = Consumer(log, group, "a", stream=stream)
    consumer.open()
    [entries] = consumer.claim([None], count=count)
    consumer.acknowledge(0, [entry.log_id for entry in entries])


def test_what_one_reader_has_not_acknowledged_stays_and_the_other_stream_need_not(filled):
    read(filled, PROFILES_GROUP, "events", 5)
    read(filled, "warehouse", "events", 3)
    read(filled, "warehouse", "impressions", 5)
    assert filled.trim(0) == 2
    assert [entry.event_id for entry in filled.read(0)] == ["e2", "e3", "e4"]
    assert filled.read_impressions(0) == []
    # Whoever was in the log is erased whole, though a part of theirs is gone by now.
    assert LogErasure(filled).erase("u:1").events == 3


def test_whoever_trims_goes_by_what_the_service_said(filled, events_redis):
    for group in (PROFILES_GROUP, "warehouse"):
        read(filled, group, "events", 5)
    week = EventLog(events_redis, 1, times=LogRetention.of(168, None, True))
    week.open()
    other = EventLog(events_redis, 1)  # a projector elsewhere
    assert other.trim(0) == 0
    EventLog(events_redis, 1, times=NOTHING_KEPT).open()
    assert other.trim(0) == 5
    # The index that was kept for a moment only is not relied on by the one that would keep it for weeks.
    assert week.indexed_since(10**18) == 10**18


def test_whoever_appends_indexes_for_as_long_as_the_service_relies_on_it(events_redis):
    month = EventLog(events_redis, 1, times=LogRetention.of(720, None, True))
    month.open()
    other = EventLog(events_redis, 1)  # `penchant recommend`
    assert other.append_impressions([LoggedImpression("u:1", FUTURE, b"{}")]) == 1
    relied_on_ms = -month.indexed_since(0) >> SEQUENCE_BITS
    assert relied_on_ms == 1440 * HOUR_MS
    assert events_redis.pttl(month.keys[0].index_of("u:1")) > relied_on_ms - HOUR_MS


def test_retries_are_known_after_their_event_is_trimmed(filled):
    """The receipt of an event outlives it: one effect, whenever the retry comes within the window."""
    for group in (PROFILES_GROUP, "warehouse"):
        read(filled, group, "events", 5)
    assert filled.trim(0) == 5
    [again] = filled.append([event(3)])
    assert again.duplicate
    assert again.error is None
    assert filled.read(0) == []


@given(st.integers(0, 10**9), st.floats(0.01, 1), st.floats(0.01, 1))
def test_who_is_of_a_share_is_of_every_larger_one(number, one, other):
    smaller, larger = sorted((one, other))
    assert is_logged(f"u:{number}", larger) or not is_logged(f"u:{number}", smaller)


def test_a_share_is_a_share():
    counts = Counter(is_logged(f"u:{number}", 0.2) for number in range(20_000))
    assert 0.19 < counts[True] / 20_000 < 0.21
    assert all(is_logged(f"u:{number}", 1.0) for number in range(100))
