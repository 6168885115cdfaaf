"""The supervisor's page of metrics: the counts of all processes of the service, as one service.

Counters and histograms are sums over the processes. Those of a process that ended stay in the sums as the last scrape
had them, so a counter never decreases: counts between the last scrape and a kill are lost, never counted twice.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from serving.observability.exposition import (
    ProcessState,
    Sample,
    counter_samples,
    process_samples,
    rendered,
    time_samples,
)
from serving.observability.process_stats import process_stats
from serving.observability.reporting import REPORT_REQUEST
from serving.observability.telemetry import BUCKETS, Telemetry
from serving.processes.http_server import Page, serve_pages

PATIENCE_S = 1.0
"""Longest wait for the processes, all together."""

_PIECE = 1 << 16
Counts = Counter[tuple[str, ...]]
Times = dict[tuple[str, ...], list[int]]


@dataclass(slots=True)
class _ReportingProcess:
    """A process and its last report.

    Attributes:
        connection: The page's end of the socket pair.
        is_asked: A request has no report yet.
        received: The part of a report that has come.
        report: The last whole report.
        is_up: The process answered the last scrape.
        restarts: Number of restarts.
    """

    connection: socket.socket
    is_asked: bool = False
    received: bytearray = field(default_factory=bytearray)
    report: dict[str, Any] = field(default_factory=dict)
    is_up: bool = False
    restarts: int = 0


class MetricsPage:
    """Collects the reports of processes; any thread may call it."""

    def __init__(
        self,
        bundle_id: str,
        store_samples: Callable[[], tuple[list[Sample], int | None]] = lambda: ([], None),
        patience_s: float = PATIENCE_S,
        role: str = "supervisor",
        telemetry: Telemetry | None = None,
    ) -> None:
        """Begins without other processes.

        Args:
            bundle_id: The bundle that is served.
            store_samples: Returns the samples of the stores and the newest version of the catalogue, None if unknown.
            patience_s: Longest wait for the processes, all together.
            role: The role of this process.
            telemetry: The counts of this process.
        """
        self._bundle_id, self._store_samples, self._patience_s = bundle_id, store_samples, patience_s
        self._role, self._telemetry = role, telemetry or Telemetry()
        self._processes: dict[str, _ReportingProcess] = {}
        self._ended_counts, self._ended_times = Counts(), Times()
        self._behind_since: dict[str, float] = {}
        self._scraping, self._lock = threading.Lock(), threading.Lock()

    def connect(self, name: str) -> socket.socket:
        """Adds a process that is about to start or restart; returns the end of the socket pair that it inherits."""
        page_end, process_end = socket.socketpair()
        page_end.setblocking(False)
        with self._lock:
            ended = self._processes.pop(name, None)
            self._processes[name] = process = _ReportingProcess(page_end)
            if ended:
                _add(ended.report, self._ended_counts, self._ended_times)
                process.restarts = ended.restarts + 1
                ended.connection.close()
        return process_end

    def close(self) -> None:
        """Closes the connections to all processes."""
        with self._scraping, self._lock:
            for process in self._processes.values():
                process.connection.close()
            self._processes.clear()

    def page(self, headers: Mapping[str, str]) -> Page:
        """Returns the page of metrics, in the format that the `accept` header asks for."""
        return Page(*rendered(self.samples(), headers.get("accept", "")))

    def samples(self) -> list[Sample]:
        """Returns all samples; a process that does not answer in time is shown with its last report."""
        with self._scraping:
            self._collect()
            stores, newest = self._store_samples()
            with self._lock:
                states = [_state(name, process) for name, process in self._processes.items()]
                counts, times = self._ended_counts.copy(), {key: [*cells] for key, cells in self._ended_times.items()}
                for process in self._processes.values():
                    _add(process.report, counts, times)
            snapshot = self._telemetry.snapshot()
            _add({"telemetry": snapshot}, counts, times)
            states.append(ProcessState(self._role, True, stats=process_stats(), gauges=snapshot["gauges"]))
            samples = [*counter_samples(counts), *time_samples(times), *stores, *self._catalog_lag(states, newest)]
            for state in states:
                samples += process_samples(state)
            build = (importlib.metadata.version("penchant"), self._bundle_id)
            return [*samples, ("penchant_build", build, 1)]

    def _collect(self) -> None:
        """Asks every process, and takes the reports that come in time."""
        with self._lock, selectors.DefaultSelector() as selector:
            for process in self._processes.values():
                process.is_up = False
                try:
                    # A process that was late still owes its report; a second request would get two.
                    if not process.is_asked:
                        process.connection.send(REPORT_REQUEST)
                        process.is_asked = True
                    selector.register(process.connection, selectors.EVENT_READ, process)
                except OSError:
                    continue  # it has ended, and is about to be restarted
            end = time.monotonic() + self._patience_s
            while selector.get_map() and (left_s := end - time.monotonic()) > 0:
                for key, _ in selector.select(left_s):
                    if _receive(key.data):
                        selector.unregister(key.fileobj)

    def _catalog_lag(self, states: Iterable[ProcessState], newest: int | None) -> Iterable[Sample]:
        now = time.monotonic()
        for state in states:
            version = state.gauges.get("catalog_version")
            if version is None or newest is None:
                continue
            labels = (state.name, state.name.partition(" ")[0])
            behind = max(0, newest - int(version))
            # The age of the lag is measured here: Redis keeps no time per catalogue version.
            since = self._behind_since.setdefault(state.name, now)
            if not behind:
                del self._behind_since[state.name]
            yield "penchant_catalog_lag_versions", labels, behind
            yield "penchant_catalog_lag_seconds", labels, now - since if behind else 0.0


@contextlib.contextmanager
def exposed(address: str, role: str, telemetry: Telemetry) -> Iterator[str | None]:
    """Serves the metrics of a process without a supervisor, while the block runs.

    Args:
        address: `HOST:PORT`; nothing is served if it is empty.
        role: The role of the process.
        telemetry: Its counts.

    Yields:
        The address, the port resolved; None if nothing is served.

    Raises:
        ConfigError: The address is not available.
    """
    with serve_pages(address, {"/metrics": MetricsPage("", role=role, telemetry=telemetry).page}) as served:
        yield served


def _receive(process: _ReportingProcess) -> bool:
    """Receives a part of a report; returns True if no more is to come: the report is whole, or the process ended."""
    try:
        data = process.connection.recv(_PIECE)
    except BlockingIOError:
        return False
    except OSError:
        data = b""
    if not data:
        return True
    process.received += data
    if not data.endswith(b"\n"):
        return False
    process.report, process.is_up, process.is_asked = json.loads(process.received), True, False
    process.received.clear()
    return True


def _state(name: str, process: _ReportingProcess) -> ProcessState:
    gauges = process.report["telemetry"]["gauges"] if process.report else {}
    return ProcessState(name, process.is_up, process.restarts, process.report.get("stats", {}), gauges)


def _add(report: Mapping[str, Any], counts: Counts, times: Times) -> None:
    """Adds the counters and histograms of a report to sums."""
    if not report:
        return
    for key, n in report["telemetry"]["counts"]:
        counts[tuple(key)] += n
    for key, cells in report["telemetry"]["times"]:
        total = times.setdefault(tuple(key), [0] * (BUCKETS + 1))
        for index, cell in cells.items():
            total[int(index)] += cell
