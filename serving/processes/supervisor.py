"""`penchant serve`: the supervisor starts the stores and the processes of the service, watches them, and ends them.

The supervisor loads no model. Workers are processes of their own that share the address (SO_REUSEPORT); one that dies
is restarted. When the supervisor dies, in any way, the workers see their standard input end and stop.
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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from redis.exceptions import RedisError

from features.bundle import TABLES, Bundle, open_bundle
from features.private_files import set_private_umask
from serving.config import ServeConfig
from serving.engine.preparation import SHARED_TABLES, prepared
from serving.engine.vetting import vet
from serving.errors import ConfigError, ServingError
from serving.files import close_to_others
from serving.jobs.host_keeper import host_kept
from serving.observability import logs
from serving.processes.http_server import serve_pages
from serving.processes.managed_process import ManagedProcess, ProcessDied, stop_all
from serving.processes.metrics_page import MetricsPage
from serving.processes.readiness import Readiness
from serving.processes.store_metrics import StoreMetrics
from serving.redis.client import connect, printable
from serving.redis.embedded import RedisServer
from serving.redis.safety import require_safe
from serving.restart import Trouble
from serving.stores.meta import partitions_for

START_S = 120.0
_TICK_S = 0.1
_CLOSE_S = 2.0
"""Longest wait for the workers to stop listening."""
_log = logging.getLogger(__name__)


def serve(config: ServeConfig) -> int:
    """Serves a bundle until SIGTERM or SIGINT, then returns 0; prints one line of JSON when every worker answers.

    Raises:
        BundleError: The bundle is refused.
        ConfigError: The service cannot start like this.
        ForeignFileError: A folder or file for users' data belongs to another user.
    """
    set_private_umask()
    logs.configure(config.log_format, "supervisor")
    bundle = _open_bundle(config)
    stopping, readiness = StopRequest(), Readiness(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals(stopping))
        # The health pages come first and go last, so that they answer until the last process has ended.
        health = stack.enter_context(serve_pages(config.health_listen, readiness.pages()))
        # Before the stores: a bundle that is refused starts nothing.
        tables = stack.enter_context(prepared(bundle, stopping.asked))
        if tables is None:
            return 0
        redis, events = stack.enter_context(_stores(config))
        config = _with_partitions(config, events)
        stack.enter_context(host_kept(config, redis, events, Trouble(readiness.set_own_state)))
        address = stack.enter_context(_reserved(config))
        page, metrics = stack.enter_context(_metrics(config, bundle, redis, events))
        spec = _launch_spec(config, bundle, address, redis, events) | {"sealed": {SHARED_TABLES: tables}}
        workers, readers = _processes(config, spec, page)
        readiness.watch(workers, readers)
        # The workers end first: the readers of the log still take in the last entries that the workers wrote.
        stack.callback(stop_all, readers, config.drain_s, stopping.hurry)
        stack.callback(stop_all, workers, config.drain_s, stopping.hurry)
        if not _start([*workers, *readers], bundle, stopping.asked):
            return 0
        readiness.phase = "serving"
        addresses = {"listen": address, "redis": redis, "events_redis": events, "metrics": metrics, "health": health}
        _print_ready(config, bundle, workers, addresses)
        _keep_running([*workers, *readers], stopping.asked, readiness)
        _leave(workers, config, stopping.hurry, readiness)
    _log.info("stopped")
    return 0


def _open_bundle(config: ServeConfig) -> Bundle:
    """Verifies the bundle, and closes what an earlier version left open to other users before anything is written."""
    settings = config.printable()
    for name in ("redis", "events_redis"):
        if "://" in settings.get(name, ""):
            settings[name] = printable(settings[name])  # without the password of the URL
    _log.info("settings that differ from the defaults: %s", json.dumps(settings))
    # The tables are hashed as they are read into shared memory: each file is read and hashed once a host.
    bundle = open_bundle(config.bundle, later=TABLES)
    if config.state_dir.exists():
        close_to_others(config.state_dir)
    _log.info("serving the bundle %s of %s", bundle.bundle_id, json.dumps(str(bundle.path)))
    return bundle


def _processes(
    config: ServeConfig, spec: dict[str, Any], page: MetricsPage
) -> tuple[list[ManagedProcess], list[ManagedProcess]]:
    """Returns the workers and the readers of the log, none of them started."""
    workers = [
        ManagedProcess(f"worker {number}", spec | {"role": "worker", "number": number}, page)
        for number in range(config.worker_count)
    ]
    roles = {"projector": config.projector, "warehouse": config.warehouse}
    return workers, [ManagedProcess(role, spec | {"role": role}, page) for role, is_here in roles.items() if is_here]


def _start(processes: Sequence[ManagedProcess], bundle: Bundle, stop: threading.Event) -> bool:
    """Starts processes and waits until all are ready; False if a stop was asked for first.

    Raises:
        BundleError: A file of the bundle ends the process that reads it.
        ConfigError: A process refuses to start.
    """
    for process in processes:
        process.start()
    for process in processes:
        try:
            if not process.wait_ready(START_S, stop):
                return False
        except ProcessDied:
            # A malformed model can end its reader without a word; another process finds out which file it is.
            vet(bundle.path, bundle.bundle_id)
            raise
    return True


def _print_ready(
    config: ServeConfig, bundle: Bundle, workers: Sequence[ManagedProcess], addresses: Mapping[str, str | None]
) -> None:
    ready = {
        **addresses,
        "redis": printable(addresses["redis"] or ""),
        "events_redis": printable(addresses["events_redis"] or ""),
        "bundle_id": bundle.bundle_id,
        "pid": os.getpid(),
        "workers": [worker.pid for worker in workers],
        "warehouse": str(config.warehouse_path) if config.warehouse else None,
    }
    print(json.dumps(ready), flush=True)
    metrics = f", metrics on {addresses['metrics']}" if addresses["metrics"] else ""
    _log.info("ready: %d workers on %s%s", len(workers), addresses["listen"], metrics)


def _keep_running(processes: Sequence[ManagedProcess], stop: threading.Event, readiness: Readiness) -> None:
    while not stop.wait(_TICK_S):
        readiness.tick()
        for process in processes:
            process.restart_if_ended()


def _leave(
    workers: Sequence[ManagedProcess], config: ServeConfig, hurry: threading.Event, readiness: Readiness
) -> None:
    """Tells balancers "not ready", serves on for a while, then stops every worker from listening.

    All workers stop listening before the first one sends its callers away: callers must reconnect to an instance that
    stays, not to the next worker, which is about to end as well.
    """
    readiness.phase = "stopping"
    _log.info("stopping: not ready, ending in %.1f s", config.delay_s)
    for worker in workers:
        worker.send("unready")
    end = time.monotonic() + config.delay_s
    while not hurry.wait(max(min(end - time.monotonic(), _TICK_S), 0.0)) and time.monotonic() < end:
        readiness.tick()
    # To all before waiting for any: they close at the same time.
    for worker in workers:
        worker.send("close")
    end = time.monotonic() + _CLOSE_S
    for worker in workers:
        worker.wait_done("close", end)
    _log.info("stopping: calls in progress have %g s", config.drain_s)


def _launch_spec(config: ServeConfig, bundle: Bundle, address: str, redis: str, events: str) -> dict[str, Any]:
    """Returns the settings of the processes, with the resolved values in place of those that they come from.

    The processes open the very bundle that was verified here, by its real path and its id: a link may move meanwhile.
    """
    settings = config.model_dump(mode="json", exclude={"token", "token_file"})
    # The address was checked here; a resolved one would be refused without TLS where the setting allowed it.
    settings |= {"listen": address, "redis": redis, "events_redis": events, "insecure": True}
    settings["workers"] = config.worker_count
    settings["bundle"] = str(bundle.path)
    return {"settings": settings, "token": config.secret(), "bundle_id": bundle.bundle_id}


@contextlib.contextmanager
def _metrics(config: ServeConfig, bundle: Bundle, redis: str, events: str) -> Iterator[tuple[MetricsPage, str | None]]:
    """Yields the page that collects the reports of all processes, and its address; None if it is not served.

    Raises:
        ConfigError: The address is not available.
    """
    with (
        contextlib.closing(StoreMetrics(redis, events, config.partitions)) as stores,
        contextlib.closing(MetricsPage(bundle.bundle_id, stores.samples)) as page,
        serve_pages(config.metrics_listen, {"/metrics": page.page}) as address,
    ):
        yield page, address


@contextlib.contextmanager
def _stores(config: ServeConfig) -> Iterator[tuple[str, str]]:
    """Yields the URLs of the profiles and of the events; embedded servers run while the block does."""
    with contextlib.ExitStack() as stack:
        profiles, events = config.redis, config.events_redis or config.redis
        if profiles == "embedded":
            profiles = stack.enter_context(RedisServer(config.state_dir, "profiles")).url
        if events == "embedded":
            events = stack.enter_context(RedisServer(config.state_dir, "events")).url
        _require_safe(profiles, "profiles", config.unsafe_redis)
        _require_safe(events, "events", config.unsafe_redis)
        yield profiles, events


def _with_partitions(config: ServeConfig, events: str) -> ServeConfig:
    """Returns the settings with the number of partitions of the log; the setting itself counts for a new log only.

    The service starts without a Redis too. The setting holds then, and is refused later if the log has another number.

    Raises:
        ConfigError: The setting was given, and the log has another number.
    """
    wanted = config.partitions if "partitions" in config.model_fields_set else None
    with connect(events, timeout_s=1.0) as client:
        try:
            return config.model_copy(update={"partitions": partitions_for(client, wanted)})
        except ConfigError:
            raise
        except ServingError as error:
            _log.warning("the number of partitions is not known yet, %d is assumed: %s", config.partitions, error)
            return config


def _require_safe(url: str, role: Literal["events", "profiles"], unsafe: bool) -> None:
    """Refuses a Redis that would lose data; one that does not answer now passes, and the service starts without it.

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
    """Yields the address, with a free port for 0; it is bound but not listened on, so that no other process takes it.

    Raises:
        ConfigError: Another process uses it.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        try:
            # Without SO_REUSEPORT first: with it, two services would share one port and no error would say so.
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if config.share_port:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                probe.bind((config.host, config.port))
                port = probe.getsockname()[1]
            # Held until the end, though it never listens: a port that no process holds could be taken between restarts.
            keeper = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            keeper.bind((config.host, port))
        except OSError as error:  # in use, of another machine, or of a family that the kernel lacks
            raise ConfigError(
                f"cannot listen on {config.listen}: {error.strerror}; choose another address, or "
                "set share_port to take over from an instance of this service that listens there"
            ) from None
        yield f"[{config.host}]:{port}" if family == socket.AF_INET6 else f"{config.host}:{port}"


class StopRequest:
    """The stop that signals ask for.

    Attributes:
        asked: Set by the first SIGTERM or SIGINT.
        hurry: Set by the second one: the stop waits for nothing more.
    """

    def __init__(self) -> None:
        self.asked, self.hurry = threading.Event(), threading.Event()

    def ask(self) -> None:
        """Asks for a stop, or for a quick one."""
        (self.hurry if self.asked.is_set() else self.asked).set()


@contextlib.contextmanager
def _signals(stopping: StopRequest) -> Iterator[None]:
    """Lets SIGTERM and SIGINT ask for a stop; not outside the main thread, where Python cannot catch signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: stopping.ask()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
