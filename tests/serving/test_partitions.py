"""How many partitions there are the log knows best; who says another number is told both."""

from __future__ import annotations

import threading

import pytest

from serving.config import ServeConfig
from serving.errors import ConfigError, EventLogUnavailable
from serving.privacy.replay import replay_ledgers
from serving.processes.supervisor import _with_partitions
from serving.projection import process
from serving.projection.profile_view import show
from serving.projection.rebuild import rebuild
from serving.redis.client import connect
from serving.stores.meta import awaited_partitions, partitions_for
from serving.warehouse import process as warehouse
from tests.serving.logged import PARTITIONS, event, ingest

WRONG = PARTITIONS + 1
BOTH = f"in {PARTITIONS} partitions and {WRONG} were asked for"


def test_every_command_takes_the_number_of_the_log(log, store, profiles_server, events_server, tmp_path):
    store.open()
    ingest(log, event("ann", "i1"))
    profiles, events = profiles_server.url, events_server.url
    ledger, out = tmp_path / "ledger.jsonl", tmp_path / "out"
    ledger.write_text("")
    told, stop = [], threading.Event()

    def ready(facts):
        told.append(facts["partitions"])
        stop.set()

    process.run(profiles, events, None, stop, ready=ready)
    assert told == [PARTITIONS]
    assert warehouse.run(events, out, once=True)["partitions"] == PARTITIONS
    assert show("ann", profiles)["found"] is False
    assert rebuild(out, profiles, events)["profiles"] == 1
    assert show("ann", profiles)["found"]
    assert replay_ledgers([ledger], profiles, events) == {"erasures": 0, "again": 0}
    assert warehouse.drop(events)["partitions"] == PARTITIONS
    asked_wrongly = [
        lambda: process.run(profiles, events, WRONG, threading.Event()),
        lambda: warehouse.run(events, out, None, WRONG, once=True),
        lambda: warehouse.drop(events, WRONG),
        lambda: rebuild(out, profiles, events, partitions=WRONG),
        lambda: show("ann", profiles, partitions=WRONG),
        lambda: replay_ledgers([ledger], profiles, events, WRONG),
    ]
    for run in asked_wrongly:
        with pytest.raises(ConfigError, match=BOTH):
            run()


def test_a_new_log_takes_what_is_asked_for_or_the_usual(events_redis, tmp_path):
    assert [partitions_for(events_redis, asked) for asked in (None, 3)] == [16, 3]
    with connect(f"unix://{tmp_path}/none.sock", 0.1) as nowhere:
        with pytest.raises(EventLogUnavailable):
            partitions_for(nowhere)
        stop = threading.Event()
        assert awaited_partitions(nowhere, 3, stop) == 3
        threading.Timer(0.2, stop.set).start()
        assert awaited_partitions(nowhere, None, stop) == 16


def test_a_service_takes_the_number_of_its_log(log, events_server, tmp_path):
    log.open()
    assert _with_partitions(ServeConfig.load(bundle="b"), events_server.url).partitions == PARTITIONS
    with pytest.raises(ConfigError, match=BOTH):
        _with_partitions(ServeConfig.load(bundle="b", partitions=WRONG), events_server.url)
    assert _with_partitions(ServeConfig.load(bundle="b"), f"unix://{tmp_path}/none.sock").partitions == 16
