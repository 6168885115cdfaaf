"""The supervisor's page of metrics: what all processes of the service count, as one service.

Counters and histograms are sums over the processes. Those of a process that ended stay in the sums as they were last
seen, so a counter never goes back: what was counted between the last scrape and a kill is lost, never counted twice.
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
from serving.observability.reporting import QUESTION
from serving.observability.telemetry import BUCKETS, Telemetry
from serving.processes.http_server import HttpServer, Page

PATIENCE_S = 1.0
"""Longest wait for the processes, all together."""

_PIECE = 1 << 16
Counts = Counter[tuple[str, ...]]
Times = dict[tuple[str, ...], list[int]]


@dataclass(slots=True)
class _Process:
    """What is known of one process.

    Attributes:
        connection: Our end of the pair.
        asked: A question has no answer yet.
        received: The part of an answer that has come.
        answer: The last whole answer.
        up: It answered the last scrape.
        restarts: Times that it was started again.
    """

    connection: socket.socket
    asked: bool = False
    received: bytearray = field(default_factory=bytearray)
    answer: dict[str, Any] = field(default_factory=dict)
    up: bool = False
    restarts: int = 0


class MetricsPage:
    """Collects what the processes report; any thread may call it."""

    def __init__(
        self,
        bundle_id: str,
        watch: Callable[[], tuple[list[Sample], int | None]] = lambda: ([], None),
        patience_s: float = PATIENCE_S,
        role: str = "supervisor",
        telemetry: Telemetry | None = None,
    ) -> None:
        """Begins without other processes.

        Args:
            bundle_id: The bundle that is served.
            watch: Returns the samples of the stores, and the newest version of the catalogue where it is known.
            patience_s: Longest wait for the processes, all together.
            role: The role of this process.
            telemetry: What this process counts.
        """
        self._bundle_id, self._watch, self._patience_s = bundle_id, watch, patience_s
        self._role, self._telemetry = role, telemetry or Telemetry()
        self._processes: dict[str, _Process] = {}
        self._ended_counts, self._ended_times = Counts(), Times()
        self._behind: dict[str, float] = {}
        self._scraping, self._lock = threading.Lock(), threading.Lock()

    def connect(self, name: str) -> socket.socket:
        """Takes a process that is about to start, or to start again; returns the end of the pair that it inherits."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with self._lock:
            before = self._processes.pop(name, None)
            self._processes[name] = process = _Process(ours)
            if before:
                _add(before.answer, self._ended_counts, self._ended_times)
                process.restarts = before.restarts + 1
                before.connection.close()
        return theirs

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
        """Returns everything there is to know now; a process that does not answer in time is shown as it last was."""
        with self._scraping:
            self._ask()
            stores, newest = self._watch()
            with self._lock:
                states = [_state(name, process) for name, process in self._processes.items()]
                counts, times = self._ended_counts.copy(), {key: [*cells] for key, cells in self._ended_times.items()}
                for process in self._processes.values():
                    _add(process.answer, counts, times)
            own = self._telemetry.snapshot()
            _add({"telemetry": own}, counts, times)
            states.append(ProcessState(self._role, True, figures=process_stats(), gauges=own["gauges"]))
            samples = [*counter_samples(counts), *time_samples(times), *stores, *self._catalog_lag(states, newest)]
            for state in states:
                samples += process_samples(state)
            build = (importlib.metadata.version("penchant"), self._bundle_id)
            return [*samples, ("penchant_build", build, 1)]

    def _ask(self) -> None:
        """Asks every process, and takes the answers that come in time."""
        with self._lock, selectors.DefaultSelector() as selector:
            for process in self._processes.values():
                process.up = False
                try:
                    if not process.asked:
                        process.connection.send(QUESTION)
                        process.asked = True
                    selector.register(process.connection, selectors.EVENT_READ, process)
                except OSError:
                    continue  # it has ended, and is about to be started again
            end = time.monotonic() + self._patience_s
            while selector.get_map() and (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if _take(key.data):
                        selector.unregister(key.fileobj)

    def _catalog_lag(self, states: Iterable[ProcessState], newest: int | None) -> Iterable[Sample]:
        now = time.monotonic()
        for state in states:
            version = state.gauges.get("catalog_version")
            if version is None or newest is None:
                continue
            labels = (state.name, state.name.partition(" ")[0])
            behind = max(0, newest - int(version))
            since = self._behind.setdefault(state.name, now) if behind else self._behind.pop(state.name, now)
            yield "penchant_catalog_lag_versions", labels, behind
            yield "penchant_catalog_lag_seconds", labels, now - since if behind else 0.0


@contextlib.contextmanager
def exposed(address: str, role: str, telemetry: Telemetry) -> Iterator[str | None]:
    """Serves the metrics of a process that no supervisor started, while the block runs.

    Args:
        address: `HOST:PORT`; nothing is served where it is empty.
        role: Its role.
        telemetry: What it counts.

    Yields:
        The address, the port resolved.

    Raises:
        ConfigError: The address cannot be had.
    """
    if not address:
        yield None
        return
    with HttpServer(address, {"/metrics": MetricsPage("", role=role, telemetry=telemetry).page}) as server:
        yield server.address


def _take(process: _Process) -> bool:
    """Takes what a process sends; returns True where nothing more is to be expected of it."""
    try:
        piece = process.connection.recv(_PIECE)
    except BlockingIOError:
        return False
    except OSError:
        piece = b""
    if not piece:
        return True
    process.received += piece
    if not piece.endswith(b"\n"):
        return False
    process.answer, process.up, process.asked = json.loads(process.received), True, False
    process.received.clear()
    return True


def _state(name: str, process: _Process) -> ProcessState:
    gauges = process.answer["telemetry"]["gauges"] if process.answer else {}
    return ProcessState(name, process.up, process.restarts, process.answer.get("figures", {}), gauges)


def _add(answer: Mapping[str, Any], counts: Counts, times: Times) -> None:
    """Adds the counters and histograms of an answer to sums."""
    if not answer:
        return
    for key, n in answer["telemetry"]["counts"]:
        counts[tuple(key)] += n
    for key, cells in answer["telemetry"]["times"]:
        total = times.setdefault(tuple(key), [0] * (BUCKETS + 1))
        for index, cell in cells.items():
            total[int(index)] += cell
