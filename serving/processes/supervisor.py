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
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from redis.exceptions import RedisError

from features.bundle import Bundle, open_bundle
from features.private_files import set_private_umask
from serving.config import ServeConfig
from serving.engine.vetting import vet
from serving.errors import ConfigError
from serving.jobs.host_keeper import host_kept
from serving.observability import logs
from serving.processes.http_server import HttpServer
from serving.processes.managed_process import ManagedProcess, ProcessDied, stop_all
from serving.processes.metrics_page import MetricsPage
from serving.processes.readiness import Readiness
from serving.processes.store_metrics import StoreMetrics
from serving.redis.client import connect, printable
from serving.redis.embedded import RedisServer, close_to_others
from serving.redis.safety import require_safe
from serving.restart import Trouble

START_S = 120.0
_TICK_S = 0.1
_CLOSE_S = 2.0
"""Longest wait for the workers to stop listening."""
SHARED = ("vocabulary.arrow",)
"""Files of a bundle that the workers share in memory, sealed; each has the others for itself."""
_log = logging.getLogger(__name__)


def serve(config: ServeConfig) -> int:
    """Serves a bundle until SIGTERM or SIGINT; prints one line of JSON when every worker answers.

    Returns:
        0 after a stop that was asked for.

    Raises:
        BundleError: The bundle is refused.
        ConfigError: The service cannot start like this.
        ForeignFileError: A folder or file for users' data belongs to another user.
    """
    set_private_umask()
    logs.configure(config.log_format, "supervisor")
    settings = config.printable()
    for name in ("redis", "events_redis"):
        if "://" in settings.get(name, ""):
            settings[name] = printable(settings[name])
    _log.info("settings that differ from the defaults: %s", json.dumps(settings))
    bundle = open_bundle(config.bundle)
    _log.info("serving the bundle %s of %s", bundle.bundle_id, json.dumps(str(bundle.path)))
    stopping = Stopping()
    if config.state_dir.exists():
        close_to_others(config.state_dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals(stopping))
        readiness = Readiness(config)
        health = None
        if config.health_listen:
            # It answers until the last process has ended.
            health = stack.enter_context(HttpServer(config.health_listen, readiness.pages()))
        redis, events = stack.enter_context(_stores(config))
        stack.enter_context(host_kept(config, redis, events, Trouble(readiness.tell)))
        address = stack.enter_context(_reserved(config))
        monitor, metrics = stack.enter_context(_monitored(config, bundle, redis, events))
        sealed = {name: bundle.seal(name) for name in SHARED}
        for handle in sealed.values():
            stack.callback(os.close, handle)
        orders = _orders(config, bundle, address, redis, events) | {"sealed": sealed}
        workers = [
            ManagedProcess(f"worker {number}", orders | {"role": "worker", "number": number}, monitor)
            for number in range(config.worker_count)
        ]
        roles = {"projector": config.projector, "warehouse": config.warehouse}
        readers = [ManagedProcess(role, orders | {"role": role}, monitor) for role, wanted in roles.items() if wanted]
        readiness.watch(workers, readers)
        children = workers + readers
        # The workers end first, and those who read the log take in what they logged last.
        stack.callback(stop_all, readers, config.drain_s, stopping.hurry)
        stack.callback(stop_all, workers, config.drain_s, stopping.hurry)
        for child in children:
            child.start()
        for child in children:
            try:
                if not child.wait_ready(START_S, stopping.asked):
                    return 0
            except ProcessDied:
                vet(bundle.path, bundle.bundle_id)  # what ended it may be a file of the bundle
                raise
        ready = {
            "listen": address,
            "bundle_id": bundle.bundle_id,
            "pid": os.getpid(),
            "redis": printable(redis),
            "events_redis": printable(events),
            "workers": [child.pid for child in workers],
            "warehouse": str(config.warehouse_path) if config.warehouse else None,
            "metrics": metrics,
            "health": health.address if health else None,
        }
        readiness.phase = "serving"
        print(json.dumps(ready), flush=True)
        _log.info("ready: %d workers on %s%s", len(workers), address, f", metrics on {metrics}" if metrics else "")
        while not stopping.asked.wait(_TICK_S):
            readiness.tick()
            for child in children:
                child.keep()
        readiness.phase = "stopping"
        _leave(workers, config.delay_s, stopping.hurry, readiness)
        _log.info("stopping: calls in hand have %g s", config.drain_s)
    _log.info("stopped")
    return 0


def _leave(workers: Sequence[ManagedProcess], delay_s: float, hurry: threading.Event, readiness: Readiness) -> None:
    """Says not ready, serves on for a while, then lets no worker listen any more.

    All of them stop listening before the first one sends its callers away: these must not come to the next one, which
    is about to end as well, but to an instance that stays.
    """
    _log.info("stopping: not ready, ending in %.1f s", delay_s)
    for worker in workers:
        worker.command("unready")
    end = time.monotonic() + delay_s
    while not hurry.wait(max(min(end - time.monotonic(), _TICK_S), 0.0)) and time.monotonic() < end:
        readiness.tick()
    for worker in workers:
        worker.command("close")
    end = time.monotonic() + _CLOSE_S
    for worker in workers:
        worker.wait_done("close", end)


def _orders(config: ServeConfig, bundle: Bundle, address: str, redis: str, events: str) -> dict[str, Any]:
    """The settings of the children: everything found out here is in place of what it was found from.

    They open the very bundle that was verified here, by its real path and its id: a link may move while they run.
    """
    settings = config.model_dump(mode="json", exclude={"token", "token_file"})
    settings |= {"listen": address, "redis": redis, "events_redis": events, "insecure": True}
    settings["workers"] = config.worker_count
    settings["bundle"] = str(bundle.path)
    return {"settings": settings, "token": config.secret(), "bundle_id": bundle.bundle_id}


@contextlib.contextmanager
def _monitored(
    config: ServeConfig, bundle: Bundle, redis: str, events: str
) -> Iterator[tuple[MetricsPage, str | None]]:
    """What collects the reports of all processes, and where their metrics are served, None if nowhere.

    Raises:
        ConfigError: The address cannot be had.
    """
    with (
        contextlib.closing(StoreMetrics(redis, events, config.partitions)) as watch,
        contextlib.closing(MetricsPage(bundle.bundle_id, watch.look)) as monitor,
    ):
        if not config.metrics_listen:
            yield monitor, None
            return
        with HttpServer(config.metrics_listen, {"/metrics": monitor.page}) as server:
            yield monitor, server.address


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
                if config.share_port:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                probe.bind((config.host, config.port))
                port = probe.getsockname()[1]
            keeper = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            keeper.bind((config.host, port))
        except OSError as error:  # in use, of another machine, or of a family that the kernel has not
            raise ConfigError(
                f"cannot listen on {config.listen}: {error.strerror}; choose another address, or "
                "set share_port to take over from an instance of this service that listens there"
            ) from None
        yield f"[{config.host}]:{port}" if family == socket.AF_INET6 else f"{config.host}:{port}"


class Stopping:
    """How far a stop is asked for.

    Attributes:
        asked: Set by the first SIGTERM or SIGINT.
        hurry: Set by the second one: nothing is waited for any more.
    """

    def __init__(self) -> None:
        self.asked, self.hurry = threading.Event(), threading.Event()

    def ask(self) -> None:
        """Asks for a stop, or for a quick one."""
        (self.hurry if self.asked.is_set() else self.asked).set()


@contextlib.contextmanager
def _signals(stopping: Stopping) -> Iterator[None]:
    """SIGTERM and SIGINT ask for a stop; outside the main thread, where signals cannot be caught, nothing does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stopping.ask()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
