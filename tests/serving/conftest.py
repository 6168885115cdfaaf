"""Real servers for the tests of the stores: an embedded Redis per role, emptied before each test; and who asks."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from penchant.client import Client
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.event_log import EventLog
from serving.stores.profiles import ProfileStore
from tests.fixtures import Service
from tests.serving.logged import PARTITIONS


@pytest.fixture(scope="session")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("redis")


@pytest.fixture(scope="session")
def profiles_server(state_dir: Path) -> Iterator[RedisServer]:
    with RedisServer(state_dir, "profiles") as server:
        yield server


@pytest.fixture(scope="session")
def events_server(state_dir: Path) -> Iterator[RedisServer]:
    with RedisServer(state_dir, "events") as server:
        yield server


@pytest.fixture
def profiles_redis(profiles_server: RedisServer) -> Iterator[redis.Redis]:
    with connect(profiles_server.url, timeout_s=2.0) as client:
        client.flushall()
        yield client


@pytest.fixture
def events_redis(events_server: RedisServer) -> Iterator[redis.Redis]:
    with connect(events_server.url, timeout_s=2.0) as client:
        client.flushall()
        yield client


@pytest.fixture
def log(events_redis: redis.Redis) -> EventLog:
    log = EventLog(events_redis, PARTITIONS)
    log.open()
    return log


@pytest.fixture
def store(profiles_redis: redis.Redis) -> ProfileStore:
    return ProfileStore(profiles_redis, PARTITIONS)


@pytest.fixture
def ann() -> str:
    """A new user."""
    return f"ann-{uuid.uuid4().hex}"


@pytest.fixture
def everywhere(service: Service) -> Iterator[Client]:
    """A client with so many connections that every worker is asked."""
    with service.client(channels=16) as client:
        client.wait_ready()
        yield client
