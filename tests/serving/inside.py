"""A worker, a projector and a warehouse as threads of the test: what they do without the time that processes cost."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.client import Client
from serving.config import ServeConfig
from serving.observability.telemetry import Telemetry
from serving.processes.worker import work
from serving.projection import process
from serving.warehouse import process as warehouse
from tests.fixtures import PATIENCE_S, START_S


@dataclass(frozen=True)
class Inside:
    """A service in this very process."""

    target: str

    def client(self, **options: Any) -> Client:
        """A client of it."""
        return Client(self.target, **{"timeout_s": 3 * PATIENCE_S, **options})  # the first call compiles


@contextlib.contextmanager
def inside(
    bundle: Path, profiles_url: str, events_url: str, out: Path | None = None, **settings: Any
) -> Iterator[Inside]:
    """Runs a worker and a projector between two Redis, and a warehouse where `out` says into which directory."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    state = tempfile.TemporaryDirectory()
    addresses = {"workers": 1, "listen": listen, "redis": profiles_url, "events_redis": events_url}
    config = ServeConfig.load(bundle=bundle, **addresses, **{"state_dir": state.name, **settings})
    stop, ready = threading.Event(), threading.Event()
    purge_s = config.purge_hours * 1800
    threads = [
        threading.Thread(target=work, args=(config, Telemetry(), stop, ready.set)),
        threading.Thread(
            target=process.run, args=(profiles_url, events_url, config.partitions, stop), kwargs={"purge_s": purge_s}
        ),
    ]
    if out:
        options = {"flush_s": config.warehouse_flush_s, "stop": stop}
        where = (events_url, out, bundle, config.partitions)
        threads.append(threading.Thread(target=warehouse.run, args=where, kwargs=options))
    for thread in threads:
        thread.start()
    try:
        assert ready.wait(START_S)
        yield Inside(listen)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        state.cleanup()
