"""`penchant serve`: one parent that starts the stores and the workers, watches them, and ends them.

The parent touches no model. Workers are processes of their own that share the address (SO_REUSEPORT); one that dies is
started again. When the parent dies, however it dies, the workers see their standard input end and stop.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any, Literal

from redis.exceptions import RedisError

from features.bundle import Bundle, open_bundle
from serving.child import LOG_FORMAT
from serving.config import ServeConfig
from serving.erasure import Ledger, replay
from serving.errors import ConfigError, Unavailable
from serving.events import EventLog
from serving.profiles import ProfileStore
from serving.redis_client import connect, printable, require_safe
from serving.redis_server import RedisServer

START_S = 120.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 10.0
_HEALTHY_S = 30.0
_PATIENCE_S = 10.0
_STOP_S = 5.0
"""Time beside the drain that a process is given to end."""
_log = logging.getLogger(__name__)


def serve(config: ServeConfig) -> int:
    """Serves a bundle until SIGTERM or SIGINT; prints one line of JSON when every worker answers.

    Returns:
        0 after a stop that was asked for.

    Raises:
        BundleError: The bundle is refused.
        ConfigError: The service cannot start like this.
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    settings = config.printable()
    for name in ("redis", "events_redis"):
        if "://" in settings.get(name, ""):
            settings[name] = printable(settings[name])
    _log.info("settings beside the defaults: %s", json.dumps(settings))
    bundle = open_bundle(config.bundle)
    _log.info("serving the bundle %s of %s", bundle.bundle_id, json.dumps(str(bundle.path)))
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals(stop))
        redis, events = stack.enter_context(_stores(config))
        _hold_erasures(config, redis, events)
        address = stack.enter_context(_reserved(config))
        orders = _orders(config, bundle, address, redis, events)
        workers = [
            _Child(f"worker {number}", orders | {"role": "worker", "number": number})
            for number in range(config.worker_count)
        ]
        roles = {"projector": config.projector, "warehouse": config.warehouse}
        readers = [_Child(role, orders | {"role": role}) for role, wanted in roles.items() if wanted]
        children = workers + readers
        # The workers end first, and those who read the log take in what they logged last.
        stack.callback(_stop, readers, config.drain_s)
        stack.callback(_stop, workers, config.drain_s)
        for child in children:
            child.start()
        for child in children:
            if not child.wait_ready(START_S, stop):
                return 0
        ready = {
            "listen": address,
            "bundle_id": bundle.bundle_id,
            "pid": os.getpid(),
            "redis": printable(redis),
            "events_redis": printable(events),
            "workers": [child.pid for child in workers],
            "warehouse": str(config.warehouse_path) if config.warehouse else None,
        }
        print(json.dumps(ready), flush=True)
        while not stop.wait(0.1):
            for child in children:
                child.keep()
    return 0


class _Child:
    """A process that is kept running: its orders go in as one line of JSON, one line of JSON says that it is ready."""

    def __init__(self, name: str, orders: dict[str, Any]) -> None:
        self.name = name
        self.pid = 0
        self._orders = orders
        self._process: subprocess.Popen[str] | None = None
        self._pause = _FIRST_PAUSE_S
        self._started = self._again = 0.0

    def start(self) -> None:
        """Starts the process."""
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "serving.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
            process_group=0,
        )
        self.pid, self._started, self._again = process.pid, time.monotonic(), 0.0
        # The pipe stays open: that it ends tells the child that we are gone.
        with contextlib.suppress(BrokenPipeError):
            _stdin(process).write(json.dumps(self._orders) + "\n")
            _stdin(process).flush()

    def wait_ready(self, seconds: float, stop: threading.Event) -> bool:
        """Waits until the process says that it is ready; False when a stop was asked for first.

        Raises:
            ConfigError: It ended, or does not get ready in time; the message is its own.
        """
        said: list[str] = []
        assert self._process is not None
        reader = threading.Thread(target=lambda: said.append(_stdout(self._process).readline()), daemon=True)
        reader.start()
        end = time.monotonic() + seconds
        while reader.is_alive() and time.monotonic() < end:
            if stop.is_set():
                return False
            reader.join(0.05)
        answer = json.loads(said[0]) if said and said[0] else {"error": "it ended or hangs; see the log above"}
        if "error" in answer:
            raise ConfigError(answer["error"] if said and said[0] else f"{self.name} did not start: {answer['error']}")
        return True

    def keep(self) -> None:
        """Starts the process again where it ended, after a pause that grows while it keeps ending."""
        assert self._process is not None
        if self._process.poll() is None:
            return
        now = time.monotonic()
        if not self._again:
            if now - self._started > _HEALTHY_S:
                self._pause = _FIRST_PAUSE_S
            self._again = now + self._pause
            status, said = self._process.returncode, _stdout(self._process).read().strip()
            _log.error("%s ended with status %s; again in %.1f s. %s", self.name, status, self._pause, said)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)
            self._close()
        elif now >= self._again:
            self.start()

    def terminate(self) -> None:
        """Asks the process to stop."""
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def end(self, seconds: float) -> None:
        """Waits for the process, then ends it by force."""
        if not self._process:
            return
        try:
            status = self._process.wait(max(seconds, 0.0))
            if status:
                _log.warning("%s ended with status %d", self.name, status)
        except subprocess.TimeoutExpired:
            _log.error("%s does not stop; killing it", self.name)
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _stdin(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdin is not None
    return process.stdin


def _stdout(process: subprocess.Popen[str] | None) -> IO[str]:
    assert process is not None
    assert process.stdout is not None
    return process.stdout


def _stop(children: list[_Child], drain_s: float) -> None:
    for child in children:
        child.terminate()
    end = time.monotonic() + drain_s + _STOP_S
    for child in children:
        child.end(end - time.monotonic())


def _orders(config: ServeConfig, bundle: Bundle, address: str, redis: str, events: str) -> dict[str, Any]:
    """The settings of the children: everything found out here is in place of what it was found from.

    They open the very bundle that was verified here, by its real path and its id: a link may move while they run.
    """
    settings = config.model_dump(mode="json", exclude={"token", "token_file"})
    settings |= {"listen": address, "redis": redis, "events_redis": events, "insecure": True}
    settings["workers"] = config.worker_count
    settings["bundle"] = str(bundle.path)
    return {"settings": settings, "token": config.secret(), "bundle_id": bundle.bundle_id}


def _environment() -> dict[str, str]:
    """One thread per library and none that spins: the service scales by processes. No library reports to its maker."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    ours = dict.fromkeys(threads, "1") | {"OMP_WAIT_POLICY": "PASSIVE", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    # gRPC's core logs each bad header and each broken handshake: a line for whoever wants to fill the disk.
    return {"ORT_DISABLE_TELEMETRY": "1", "GRPC_VERBOSITY": "NONE", **os.environ, **ours}


@contextlib.contextmanager
def _stores(config: ServeConfig) -> Iterator[tuple[str, str]]:
    """The URLs of the profiles and of the events; embedded servers run while the block does."""
    with contextlib.ExitStack() as stack:
        profiles, events = config.redis, config.events_redis or config.redis
        if profiles == "embedded":
            profiles = stack.enter_context(RedisServer(config.state_dir, "profiles")).url
        if events == "embedded":
            events = stack.enter_context(RedisServer(config.state_dir, "events")).url
        _require_safe(profiles, "profiles", config.unsafe_redis)
        _require_safe(events, "events", config.unsafe_redis)
        yield profiles, events


def _require_safe(url: str, role: Literal["events", "profiles"], unsafe: bool) -> None:
    """Refuses a Redis that would lose data; one that is away now is looked at by nobody, and served without.

    Raises:
        ConfigError: Its configuration is unsafe.
    """
    with connect(url, timeout_s=1.0) as client:
        try:
            require_safe(client, role, unsafe)
        except RedisError as error:
            _log.warning("the %s Redis %s does not answer (%s): starting without it", role, printable(url), error)


def _hold_erasures(config: ServeConfig, redis: str, events: str) -> None:
    """Makes the erasures of the ledger hold before anybody is served: a store may have been put back from a backup.

    Raises:
        ConfigError: The ledger is damaged, or is of another log.
    """
    erasures = Ledger(config.ledger_path).erasures()
    if not erasures:
        return
    with connect(redis, _PATIENCE_S) as profiles, connect(events, _PATIENCE_S) as client:
        log = EventLog(client, config.partitions, default=config.default_consent)
        try:
            due_ms = int(config.purge_hours * 3_600_000)
            again = replay(erasures, log, ProfileStore(profiles, config.partitions), due_ms)
        except Unavailable as error:
            _log.warning("whether %d erasures hold is not known (%s): penchant erase --replay", len(erasures), error)
            return
    if again:
        _log.warning(
            "%d of %d erasures did not hold, as after a backup was put back; they do now", again, len(erasures)
        )


@contextlib.contextmanager
def _reserved(config: ServeConfig) -> Iterator[str]:
    """The address, a free port found where 0 was asked for; bound, but not listened on, so that nobody else takes it.

    Raises:
        ConfigError: Somebody else uses it.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        try:
            # Without SO_REUSEPORT first: with it, two services would share one port without a word.
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((config.host, config.port))
                port = probe.getsockname()[1]
            keeper = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            keeper.bind((config.host, port))
        except OSError as error:  # in use, of another machine, or of a family that the kernel has not
            raise ConfigError(f"cannot listen on {config.listen}: {error.strerror}; choose another address") from None
        yield f"[{config.host}]:{port}" if family == socket.AF_INET6 else f"{config.host}:{port}"


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set `stop`; outside the main thread, where signals cannot be caught, nothing does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
