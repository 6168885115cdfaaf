"""The projector brings every event of the log into the profiles, once, whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from features.records import make_records
from serving.errors import ProfileStoreUnavailable
from serving.log_retention import PROFILES_GROUP
from serving.observability.telemetry import Telemetry
from serving.projection.projector import Projector
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.keys import address_of
from serving.stores.log_entries import LoggedEvent
from serving.stores.log_erasure import LogErasure
from serving.stores.profiles import ProfileStore
from tests.serving.faults import insist, kill, wait_until
from tests.serving.logged import PARTITIONS

ROOT = Path(__file__).parents[2]


def event(number: int, subject: str = "u:1") -> LoggedEvent:
    record = make_records(number + 1, 0, 0, 4_000_000_000_000, np.nan, 1).tobytes()
    return LoggedEvent(subject, f"e{number}", record, b"{}")


def ready(projector: Projector) -> Projector:
    projector.open()
    return projector


def drain(projector: Projector) -> None:
    """Steps until there is neither anything pending nor anything new."""
    idle = 0
    while idle < 2:
        idle = 0 if projector.step() else idle + 1


def numbers(store: ProfileStore, subject: str = "u:1") -> list[int]:
    return [int(item) - 1 for item in store.read(subject).records["item"]]


def test_events_that_ingest_did_not_apply_are_applied(log, store):
    log.append([event(number, f"u:{number % 7}") for number in range(200)])
    projector = ready(Projector(log, store, settle_s=0, batch=9))
    drain(projector)
    assert [numbers(store, f"u:{person}") for person in range(7)] == [
        list(range(person, 200, 7)) for person in range(7)
    ]
    projector.step()
    assert projector.lag() == [0] * PARTITIONS


def test_events_that_ingest_applied_count_once_in_log_order(log, store):
    appended = log.append([event(number) for number in range(20)])
    for number in (7, 3, 19):
        store.apply("u:1", [(appended[number].log_id, appended[number].record)])
    telemetry = Telemetry()
    drain(ready(Projector(log, store, telemetry=telemetry)))
    assert numbers(store) == list(range(20))
    assert store.read("u:1").version == appended[-1].log_id
    assert telemetry.counters()["projector_events"] == 17


def test_long_tails_are_folded_once_they_are_on_disk(log, store, profiles_redis):
    log.append([event(number, f"u:{number % 2}") for number in range(300)] + [event(999, "u:short")])
    telemetry = Telemetry()
    projector = ready(Projector(log, store, compact_after=20, settle_s=0.3, telemetry=telemetry))
    drain(projector)
    assert telemetry.counters().get("projector_profiles.compacted", 0) == 0
    assert sum(projector.lag()) == 301
    before = store.read("u:0")
    time.sleep(0.4)
    projector.step()
    assert telemetry.counters()["projector_profiles.compacted"] == 2
    assert sum(projector.lag()) == 0
    after = store.read("u:0")
    assert (after.version, after.count, after.records.tobytes()) == (before.version, 150, before.records.tobytes())
    [key] = [key for key in profiles_redis.scan_iter() if key.endswith(address_of("u:0"))]
    assert int.from_bytes(profiles_redis.getrange(key, 16, 23), "big") == before.version  # all of it is state now


def test_one_person_who_floods_the_log_does_not_stop_it(log, profiles_redis):
    store = ProfileStore(profiles_redis, PARTITIONS, tail_cap=50)
    log.append([event(number) for number in range(200)] + [event(1000, "u:2")])
    drain(ready(Projector(log, store, batch=40)))
    assert numbers(store) == list(range(200))
    assert numbers(store, "u:2") == [1000]


def test_a_damaged_profile_whose_tail_is_full_does_not_stop_it(log, profiles_redis):
    store = ProfileStore(profiles_redis, PARTITIONS, tail_cap=50)
    log.append([event(number) for number in range(10)])
    projector = ready(Projector(log, store, batch=40))
    drain(projector)
    store.compact("u:1", store.read("u:1").version)
    [key] = profiles_redis.scan_iter()
    profiles_redis.setrange(key, profiles_redis.strlen(key) - 1, b"\xff")  # the checksum of its state
    log.append([event(number) for number in range(10, 200)] + [event(1000, "u:2")])
    drain(projector)
    assert numbers(store, "u:2") == [1000]


def test_damaged_entries_and_profiles_are_counted_and_passed(log, store, events_redis, profiles_redis):
    log.append([event(number) for number in range(3)])
    [stream] = [keys.events for keys in log.keys if events_redis.xlen(keys.events)]
    spoiled = bytearray(event(3).record)
    spoiled[3] ^= 1
    events_redis.xadd(stream, {"s": "u:1", "e": "x", "r": bytes(spoiled), "p": "{}"})
    events_redis.xadd(stream, {"s": "u:1", "e": "y", "r": "short", "p": "{}"})
    store.apply("u:bad", [(1, event(1).record)])
    [key] = profiles_redis.scan_iter()
    profiles_redis.set(key, b"garbage")
    log.append([event(5, "u:bad"), event(6, "u:good")])
    telemetry = Telemetry()
    projector = ready(Projector(log, store, settle_s=0, telemetry=telemetry))
    drain(projector)
    projector.step()
    assert numbers(store) == [0, 1, 2]
    assert numbers(store, "u:good") == [6]
    assert telemetry.counters()["projector_damaged"] == 1
    assert sum(projector.lag()) == 0


def test_the_erased_do_not_come_back(log, store):
    log.append([event(number) for number in range(5)])
    other = ready(Consumer(log, PROFILES_GROUP, "the one before", lease_ms=1))
    other.claim([None] * PARTITIONS)  # delivered, and left pending
    erased = LogErasure(log).erase("u:1")
    store.erase("u:1", erased.log_id)
    log.append([event(9)])
    time.sleep(0.01)
    drain(ready(Projector(log, store, settle_s=0)))
    assert numbers(store) == [9]


def test_the_next_owner_applies_what_the_last_one_left_pending(log, store):
    log.append([event(number) for number in range(10)])
    dead = ready(Consumer(log, PROFILES_GROUP, "dead", lease_ms=50))
    assert sum(len(entries) for entries in dead.claim([None] * PARTITIONS, count=5)) == 5
    projector = ready(Projector(log, store))
    assert projector.step() == 0  # the lease has not run out
    time.sleep(0.1)
    drain(projector)
    assert numbers(store) == list(range(10))


def test_two_projectors_share_the_work_and_either_may_leave(log, store):
    one, two = (Projector(log, store, compact_after=8, settle_s=0.05, lease_ms=200) for _ in range(2))
    with running(one):
        with running(two):
            for number in range(50):
                log.append([event(10 * number + n, f"u:{n}") for n in range(10)])
        for number in range(50, 100):
            log.append([event(10 * number + n, f"u:{n}") for n in range(10)])
        wait_until(lambda: all(len(numbers(store, f"u:{n}")) == 100 for n in range(10)))
    assert [numbers(store, f"u:{n}") for n in range(10)] == [list(range(n, 1000, 10)) for n in range(10)]


@contextlib.contextmanager
def running(projector: Projector):
    stop = threading.Event()
    thread = threading.Thread(target=projector.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_what_a_crash_took_from_the_profiles_is_applied_again(log, tmp_path):
    """The last writes of the profiles Redis never reach its file; everything had been applied."""
    with RedisServer(tmp_path, "profiles") as server, connect(server.url, 2) as client:
        store = ProfileStore(client, PARTITIONS, cooldown_s=0.0)
        store.apply("u:1", [(5, event(5).record)])
        wait_until(lambda: client.info("persistence")["aof_pending_bio_fsync"] == 0)
        [file] = (tmp_path / "profiles" / "appendonlydir").glob("*.incr.aof")
        durable = file.stat().st_size
        log.append([event(number, f"u:{number % 3}") for number in range(6, 100)])
        projector = ready(Projector(log, store, compact_after=4, settle_s=60))
        drain(projector)
        assert len(numbers(store)) == 32
        server.stop()
        os.truncate(file, durable)
        server.start()
        assert numbers(store) == [5]
        drain(projector)
        assert numbers(store) == [5, *range(7, 100, 3)]
        # A projector that starts later knows no more than what is pending.
        server.stop()
        os.truncate(file, durable)
        server.start()
        projector.close()
        drain(ready(Projector(log, store)))
        assert numbers(store) == [5, *range(7, 100, 3)]


def test_kills_of_either_redis_lose_and_double_nothing(tmp_path):
    rng = random.Random(7)
    with contextlib.ExitStack() as stack:
        profiles, events = (stack.enter_context(RedisServer(tmp_path, role)) for role in ("profiles", "events"))
        clients = [stack.enter_context(connect(server.url, 0.3)) for server in (profiles, events)]
        log = EventLog(clients[1], PARTITIONS, cooldown_s=0.05)
        store = ProfileStore(clients[0], PARTITIONS, cooldown_s=0.05)
        stack.enter_context(running(Projector(log, store, compact_after=8, settle_s=0.5, lease_ms=500)))
        for batch in range(80):
            if batch % 16 == 8:
                kill(rng.choice([profiles, events]))
            new = [event(10 * batch + n, f"u:{n}") for n in range(10)]
            for one, logged in zip(new, insist(lambda new=new: log.append(new)), strict=True):
                with contextlib.suppress(ProfileStoreUnavailable):  # the projector will
                    store.apply(one.subject, [(logged.log_id, logged.record)])
        assert profiles.restarts + events.restarts >= 4
        expected = [list(range(n, 800, 10)) for n in range(10)]
        wait_until(lambda: [numbers(store, f"u:{n}") for n in range(10)] == expected)
        assert [store.read(f"u:{n}").count for n in range(10)] == [80] * 10


def test_the_process_projects_and_ends_on_sigterm(log, store, events_server, profiles_server):
    program = (
        "import sys; from serving.projection.process import run; "
        "sys.exit(run(sys.argv[1], sys.argv[2], int(sys.argv[3])))"
    )
    command = [sys.executable, "-c", program, profiles_server.url, events_server.url, str(PARTITIONS)]
    log.append([event(number) for number in range(5)])
    with subprocess.Popen(command, cwd=ROOT) as process:
        wait_until(lambda: numbers(store) == [0, 1, 2, 3, 4])
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    drain(ready(Projector(log, store)))  # the leases were given up
