"""Real servers for the tests of the stores: an embedded Redis per role, emptied before each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from serving.redis_client import connect
from serving.redis_server import RedisServer


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
