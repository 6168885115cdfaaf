"""A whole service on a Redis that comes late, unsafe or with other credentials: what it acknowledges, and what it logs.

`FULL=1` (`make prove-redis`) keeps each trouble for as long as it would last, and runs the control as a service too.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import grpc
import pytest
import redis

from penchant.client import Client, event
from penchant.v1.common_pb2 import PART_PROFILE_STORE
from serving.log_retention import PROFILES_GROUP
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.profiles import ProfileStore
from tests.fixtures import Service, serving
from tests.proofs.rolls import readiness
from tests.serving.faults import FULL, wait_until

DOWN_S = 150.0 if FULL else 4.0
UNSAFE_S = 10.0 if FULL else 1.0
LINES = 5
"""Most lines a minute and process while Redis is down."""


class Careless(RedisServer):
    """An embedded server with a password, that can be started with other settings."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.changed: dict[str, str] = {}

    @property
    def url(self) -> str:
        return super().url.replace("unix://", "unix://:right@")

    def _arguments(self) -> list[str]:
        settings = {"requirepass": "right", **self.changed}
        return [*super()._arguments(), *(word for name, value in settings.items() for word in (f"--{name}", value))]

    def again(self, **changed: str) -> None:
        """Stops it, where it runs, and starts it with other settings."""
        self.stop()
        self.changed = {name.replace("_", "-"): value for name, value in changed.items()}
        self.start()


class Acknowledged(NamedTuple):
    """An event that was called durable."""

    event_id: str
    sent: float
    told: float


class Writer:
    """Sends one event after the other, each until it is acknowledged; keeps when that was, and why not."""

    def __init__(self, client: Client) -> None:
        self.taken: list[Acknowledged] = []
        self.refused: Counter[str] = Counter()
        self._client, self._stop = client, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while not self._stop.is_set():
            sent, name = time.monotonic(), f"e{number}"
            try:
                [status] = self._client.ingest([event("ann", f"i{number % 40}", "view_item", event_id=name)])
            except grpc.RpcError as error:
                self.refused[f"{error.code().name}: {error.details()}"] += 1
                self._stop.wait(0.02)
                continue
            if status.code:
                self.refused[status.message] += 1
                continue
            self.taken.append(Acknowledged(name, sent, time.monotonic()))
            number += 1
            self._stop.wait(0.005)

    def resumes(self) -> float:
        """Waits until events are acknowledged again; the seconds that took."""
        begun = time.monotonic()
        wait_until(lambda: self.taken and self.taken[-1].sent > begun, 60)
        return time.monotonic() - begun

    def stays_silent(self, reason: str, begun: float, seconds: float) -> None:
        """Nothing is acknowledged for a while, for a reason that callers are told."""
        self.refused.clear()
        wait_until(lambda: any(reason in said for said in self.refused), 30)
        time.sleep(seconds)
        assert [one for one in self.taken if one.sent > begun] == []


@contextlib.contextmanager
def stage(world, folder, **settings: Any) -> Iterator[tuple[dict[str, Careless], Service, Writer]]:
    """A service that was started before its Redis, and somebody who writes."""
    servers = {role: Careless(folder / "redis", role) for role in ("profiles", "events")}
    with contextlib.ExitStack() as stack:
        for server in servers.values():
            stack.callback(server.stop)
        urls = {"redis": servers["profiles"].url, "events_redis": servers["events"].url}
        service = stack.enter_context(serving(world, folder / "state", warehouse=True, **urls, **settings))
        client = stack.enter_context(service.client(timeout_s=3.0))
        yield servers, service, stack.enter_context(Writer(client))


def admin(server: Careless, password: str = "right") -> redis.Redis:
    found = connect(server.url.replace(":right@", f":{password}@"), 5)
    assert isinstance(found, redis.Redis)
    return found


def lines_by_process(log: str) -> Counter[str]:
    """How many warnings and errors each process has logged."""
    return Counter(re.findall(r"^\S+ \S+ (\d+) (?:WARNING|ERROR|CRITICAL) ", log, re.MULTILINE))


def test_nothing_is_called_durable_on_a_redis_that_can_lose_it(world, tmp_path, record_property):
    back: dict[str, float] = {}
    with stage(world, tmp_path, health_listen="127.0.0.1:0") as (servers, service, writer):
        # Down, for all processes of the service, from their start on.
        time.sleep(DOWN_S)
        down = service.log.read_text()
        counts = lines_by_process(down)
        assert "Traceback" not in down
        assert len(counts) >= 4, down  # the parent, a worker, the projector, the warehouse
        most = max(counts.values()) / max(1.0, DOWN_S / 60)
        assert most <= LINES, down
        assert not writer.taken

        servers["profiles"].start()
        begun = time.monotonic()
        servers["events"].again(maxmemory_policy="allkeys-lru")
        writer.stays_silent("set maxmemory-policy 'noeviction'", begun, UNSAFE_S)
        with admin(servers["events"]) as client:
            client.config_set("maxmemory-policy", "noeviction")
            back["started late with allkeys-lru"] = writer.resumes()

        begun = time.monotonic()
        servers["events"].stop()
        begun = time.monotonic()
        servers["events"].again(appendonly="no")
        writer.stays_silent("set appendonly 'yes'", begun, UNSAFE_S)
        servers["events"].again()
        back["restarted with appendonly no"] = writer.resumes()

        with admin(servers["events"]) as client:
            for name, bad in (("appendfsync", "everysec"), ("maxmemory-policy", "volatile-lru")):
                good = client.config_get(name)[name]
                client.config_set(name, bad)
                begun = time.monotonic()
                writer.stays_silent(f"set {name} '{good}'", begun, UNSAFE_S)
                client.config_set(name, good)
                back[f"CONFIG SET {name} {bad}"] = writer.resumes()

            client.config_set("requirepass", "wrong")
            client.client_kill_filter(_type="normal", skipme=True)
            begun = time.monotonic()
            writer.stays_silent("credentials", begun, UNSAFE_S)
            client.config_set("requirepass", "right")
            back["other credentials"] = writer.resumes()

        with admin(servers["profiles"]) as client:
            back["profiles that could be evicted"] = evicting(client, servers, service, writer)

        workers = set(service.ready["workers"])
        after = service.log.read_text()
        assert "Traceback" not in after
        assert "works again after" in after
        assert "ended with status" not in after  # nobody died of it
        assert set(service.ready["workers"]) == workers
        taken = [one.event_id for one in writer.taken]
        with connect(servers["events"].url, 5) as client:
            log = EventLog(client, 16)
            logged = [entry.event_id for partition in range(16) for entry in log.read(partition, count=10**6)]
            with service.client() as asked:
                wait_until(lambda: asked.get_profile("ann").event_count >= len(taken), 60)
    assert set(taken) <= set(logged)
    assert len(logged) == len(set(logged))
    record_property(
        "unsafe",
        {
            "down_s": DOWN_S,
            "lines_a_minute_and_process": most,
            "unsafe_s": UNSAFE_S,
            "acknowledged": len(taken),
            "acknowledged_while_unsafe": 0,
            "lost": len(set(taken) - set(logged)),
            "doubled": len(logged) - len(set(logged)),
            "acknowledged_again_s": {name: round(seconds, 3) for name, seconds in back.items()},
        },
    )


def evicting(client: redis.Redis, servers: dict[str, Careless], service: Service, writer: Writer) -> float:
    """Profiles could be evicted for a while: none is used, and events wait; returns the time until all is well."""

    def parts() -> list[int]:
        return [one.part for one in asked.recommend(user_id="ann").degraded]

    with service.client() as asked, connect(servers["events"].url, 5) as events:
        wait_until(lambda: PART_PROFILE_STORE not in parts(), 30)
        client.config_set("maxmemory-policy", "allkeys-lru")
        wait_until(lambda: PART_PROFILE_STORE in parts(), 5)
        with pytest.raises(grpc.RpcError, match="set maxmemory-policy 'noeviction'") as refused:
            asked.get_profile("ann")
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert writer.resumes() < 10  # the log keeps what the profiles cannot
        wait_until(lambda: "maxmemory-policy" in readiness(service.ready["health"])[1]["degraded"]["profiles_redis"], 5)
        time.sleep(1.0)  # the projector has looked as well
        with connect(servers["profiles"].url, 5) as profiles:
            store, log = ProfileStore(profiles, 16), EventLog(events, 16)
            group = Consumer(log, PROFILES_GROUP, "")
            before, lag = store.read("ann"), sum(group.lag())
            time.sleep(UNSAFE_S)
            assert (now := store.read("ann")).version == before.version
            assert now.records.size == before.records.size
            assert sum(group.lag()) > lag
        client.config_set("maxmemory-policy", "noeviction")
        begun = time.monotonic()
        wait_until(lambda: PART_PROFILE_STORE not in parts(), 10)
        return time.monotonic() - begun


if FULL:  # test_redis_safety.py has the control in short

    def test_the_stage_notices_a_service_that_believes_an_unsafe_redis(world, tmp_path):
        with stage(world, tmp_path, unsafe_redis=True) as (servers, _, writer):
            servers["profiles"].start()
            servers["events"].again(maxmemory_policy="allkeys-lru")
            with pytest.raises(AssertionError):
                writer.stays_silent("set maxmemory-policy", time.monotonic(), UNSAFE_S)
            assert writer.taken
