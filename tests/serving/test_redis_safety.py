"""Nothing is acknowledged on a Redis that could lose it, whenever it became so; all recovers by itself."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from features.profile import Purpose
from serving.errors import CatalogLogUnavailable, EventLogUnavailable, ProfileStoreUnavailable, Unavailable
from serving.privacy.certificates import Certificates
from serving.privacy.rights import SubjectRights
from serving.processes.worker_health import HealthCheck, HealthMonitor, redis_trouble
from serving.projection.projector import Projector
from serving.redis.client import connect
from serving.redis.connection import PipelinedConnection
from serving.redis.embedded import RedisServer
from serving.redis.safety import Guard
from serving.stores.catalog_log import CatalogLog, Change
from serving.stores.event_log import EventLog
from serving.stores.log_entries import LoggedEvent
from serving.stores.profiles import ProfileStore
from tests.serving.faults import insist, wait_until
from tests.serving.test_events import event


class Careless(RedisServer):
    """An embedded server that can be started again with other settings."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.changed: dict[str, str] = {}

    def _arguments(self) -> list[str]:
        return [*super()._arguments(), *(word for name, value in self.changed.items() for word in (f"--{name}", value))]

    def again(self, **changed: str) -> None:
        """Stops it and starts it with other settings."""
        self.stop()
        self.changed = changed
        self.start()


@pytest.fixture(scope="module")
def careless(tmp_path_factory) -> Iterator[Careless]:
    with Careless(tmp_path_factory.mktemp("careless"), "events") as server:
        yield server


@contextlib.contextmanager
def configured(client: redis.Redis, name: str, value: str) -> Iterator[None]:
    before = client.config_get(name)[name]
    client.config_set(name, value)
    try:
        yield
    finally:
        client.config_set(name, before)


SETTINGS = [
    ("appendfsync", "everysec"),
    ("appendfsync", "no"),
    ("appendonly", "no"),
    ("maxmemory-policy", "allkeys-lru"),
    ("maxmemory-policy", "volatile-ttl"),
    ("stream-node-max-entries", "100"),
]


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_setting_that_becomes_unsafe_stops_every_promise_by_its_name(careless, name, value):
    """On connections that are open, for everything that is promised; what cannot be promised is not refused."""
    with connect(careless.url, 2) as client, connect(careless.url, 2) as admin:
        log, catalog = EventLog(client, 2), CatalogLog(client)
        people = SubjectRights(log, ProfileStore(client, 2), Certificates(log))
        log.open()
        [first] = log.append([event(1)])
        catalog.put([Change("delete", "i1")])
        assert not log.unsafe
        promises = {
            "append": lambda: log.append([event(2)]),
            "a retry": lambda: log.append([event(1)]),
            "consent": lambda: people.set_consent("u:1", Purpose(7)),
            "reset": lambda: people.reset("u:1"),
            "erase": lambda: people.erase("u:9"),
            "catalogue": lambda: catalog.put([Change("delete", "i2")]),
        }
        with configured(admin, name, value):
            for promise, make in promises.items():
                with pytest.raises((EventLogUnavailable, CatalogLogUnavailable), match=f"set {name} ") as refusal:
                    make()
                assert f"it has {name} '{value}'" in str(refusal.value), promise
                assert refusal.value.retry_after_ms
            assert name in log.unsafe
            assert log.read(0) + log.read(1)  # who reads is not concerned
            appended = admin.info("commandstats").get("cmdstat_evalsha", {}).get("calls")
            time.sleep(0.25)
            with pytest.raises(Unavailable):
                log.append([event(3)])
            # Once it is known, nothing is written at all.
            assert admin.info("commandstats").get("cmdstat_evalsha", {}).get("calls") == appended
        for make in promises.values():
            insist(make)
        assert not log.unsafe
        assert log.append([event(1)])[0].log_id == first.log_id
        admin.flushall()


def test_a_check_costs_no_round_trip(careless, monkeypatch):
    exchanges = []
    exchange = PipelinedConnection._exchange

    def counted(self, line, commands):
        exchanges.append([words[0] for words in commands])
        return exchange(self, line, commands)

    with connect(careless.url, 2) as client:
        log = EventLog(client, 1)
        log.append([event(1)])
        time.sleep(0.01)
        monkeypatch.setattr(PipelinedConnection, "_exchange", counted)
        log.append([event(2)])
        assert exchanges == [["EVALSHA", "WAITAOF", "CONFIG GET"]]
        client.flushall()


def test_a_new_connection_is_looked_at_before_anything_is_written(careless):
    with connect(careless.url, 2) as client:
        log = EventLog(client, 1)
        log.open()
        log.append([event(1)])
        careless.again(appendfsync="no")
        wait_until(lambda: "appendfsync 'no'" in refusal(log, event(2)))
        assert [entry.event_id for entry in log.read(0)] == ["e1"]
        careless.again()
        insist(lambda: log.append([event(2)]))
        assert [entry.event_id for entry in log.read(0)] == ["e1", "e2"]
        client.flushall()


def refusal(log: EventLog, one: LoggedEvent) -> str:
    """Why an event is refused."""
    with pytest.raises(EventLogUnavailable) as refused:
        log.append([one])
    return str(refused.value)


def test_no_log_begins_on_an_unsafe_redis(careless):
    with connect(careless.url, 2) as client, configured(client, "appendonly", "no"):
        client.flushall()
        with pytest.raises(EventLogUnavailable, match="appendonly 'no'"):
            EventLog(client, 1).open()
        assert client.dbsize() == 0
        EventLog(client, 1, unsafe=True).append([event(1)])  # who accepts that says so
        client.flushall()


def test_what_is_not_on_the_disk_does_not_count(careless):
    """The settings may be right and the disk not: the proof is WAITAOF, which says 0 here."""
    guard = Guard("events", False, EventLogUnavailable, 1.0)
    right = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
    right |= {"stream-node-max-entries": "1"}
    guard.judge([[1, 0], right])
    assert not guard.trouble
    with pytest.raises(EventLogUnavailable, match="not written this to its disk"):
        guard.judge([[0, 0], right])
    guard.admit(right)
    guard.judge([redis.ResponseError("unknown command 'WAITAOF'"), right])  # Redis 7.0: the settings alone
    with pytest.raises(EventLogUnavailable, match="cannot be checked"):
        guard.judge([[1, 0], redis.exceptions.NoPermissionError("NOPERM")])


def test_rights_that_are_taken_and_given_back(careless):
    """On connections that are open, and on new ones: refused so that a retry is safe, and well again by itself."""
    with connect(careless.url, 2) as admin:
        admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">right", "~*", "+@all")
        url = careless.url.replace("unix://", "unix://app:right@")
        with connect(url, 2) as client:
            log = EventLog(client, 1, cooldown_s=0.05)
            log.append([event(1)])
            for taken, given in (("-evalsha", "+@all"), ("-config", "+@all"), ("<right", ">right")):
                admin.execute_command("ACL", "SETUSER", "app", taken)
                if taken == "<right":  # an open connection stays as it is: only a new one needs the password
                    admin.execute_command("CLIENT", "KILL", "USER", "app")
                assert re.search("credentials|cannot be checked", refusal(log, event(2)))
                admin.execute_command("ACL", "SETUSER", "app", given)
                [again] = insist(lambda: log.append([event(1)]))
                assert again.duplicate
        admin.flushall()


def test_it_is_known_also_while_nobody_writes(careless):
    with connect(careless.url, 2) as client:
        log = EventLog(client, 1)
        log.open()
        beside = EventLog(client, 1, shared_with=log)
        part = HealthCheck("events_redis", lambda: redis_trouble(client, "events", False, beside.check_safety))
        monitor = HealthMonitor([part], lambda _, __: None)
        monitor.start()
        try:
            with configured(client, "appendfsync", "no"):
                wait_until(lambda: "appendfsync" in log.unsafe)
            wait_until(lambda: not log.unsafe)
        finally:
            monitor.close()
        client.flushall()


@pytest.fixture(scope="module")
def evicting(tmp_path_factory) -> Iterator[Careless]:
    with Careless(tmp_path_factory.mktemp("evicting"), "profiles") as server:
        yield server


def test_profiles_that_could_be_evicted_are_neither_read_nor_written(evicting):
    """One look is enough for every store of the process; a server that was started again is looked at first."""
    with connect(evicting.url, 2) as client, connect(evicting.url, 2) as others, connect(evicting.url, 2) as admin:
        store = ProfileStore(client, 2, cooldown_s=0.05, guarded=True)
        beside = ProfileStore(others, 2, guarded=True, shared_with=store)
        store.open()
        record = event(1).record
        store.apply("u:1", [(1, record)])
        uses = {
            "read": lambda: store.read("u:1"),
            "apply": lambda: store.apply("u:1", [(2, record)]),
            "run_ids": store.run_ids,
            "beside": lambda: beside.read("u:1"),
        }
        with configured(admin, "maxmemory-policy", "allkeys-lru"):
            with pytest.raises(ProfileStoreUnavailable):
                beside.check_safety()
            for name, use in uses.items():
                with pytest.raises(ProfileStoreUnavailable, match="set maxmemory-policy 'noeviction'") as refused:
                    use()
                assert "no profile is read or written" in str(refused.value), name
        beside.check_safety()
        for use in uses.values():
            use()
        evicting.again(**{"maxmemory-policy": "allkeys-lru"})
        assert "maxmemory-policy" in str(insist_refused(lambda: store.read("u:1"), "maxmemory-policy"))
        evicting.again()
        assert insist(lambda: store.read("u:1")) is not None


def insist_refused(work: Callable[[], object], why: str) -> Unavailable:
    """The refusal that something meets before it works."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            work()
        except Unavailable as error:
            if why in str(error):
                return error
        else:
            raise AssertionError("it worked")
    raise AssertionError("it was refused for other reasons only")


def test_a_projector_acknowledges_nothing_while_profiles_could_be_evicted(careless, evicting):
    with connect(careless.url, 2) as events, connect(evicting.url, 2) as profiles:
        events.flushall()
        profiles.flushall()
        log, store = EventLog(events, 1), ProfileStore(profiles, 1, guarded=True)
        plain = ProfileStore(profiles, 1)
        projector = Projector(log, store, settle_s=0.2)
        projector.open()
        log.append([event(1)])
        assert projector.step() + projector.step() == 1  # first what is pending, then the news
        with configured(profiles, "maxmemory-policy", "allkeys-lru"):
            log.append([event(2)])
            time.sleep(0.3)
            for _ in range(3):
                with pytest.raises(ProfileStoreUnavailable, match="maxmemory-policy"):
                    projector.step()
            assert projector.lag() == [2]  # the first one was applied while all was well, and is not settled since
            assert plain.read("u:1").records.size == 1

        def settled() -> bool:
            projector.step()
            return projector.lag() == [0]

        wait_until(settled)
        assert store.read("u:1").records.size == 2
        projector.close()
        events.flushall()
        profiles.flushall()


def test_without_the_guard_an_unsafe_redis_is_believed(careless):
    """The control: the tests above would notice."""
    with connect(careless.url, 2) as client, configured(client, "appendfsync", "no"):
        assert EventLog(client, 1, unsafe=True).append([event(1)])[0].error is None
        client.flushall()
