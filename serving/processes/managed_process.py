"""Keeps the processes of a service running, and knows the state of each.

A process reads its launch spec as one line of JSON from standard input, then a command per line. It writes lines of
JSON to standard output: `{"ready": true}` or `{"error": ...}` once, then `{"state": {...}}` from time to time and
`{"done": COMMAND}`. A process that ends is restarted after a pause that grows while it keeps ending.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from serving.errors import ConfigError
from serving.processes.metrics_page import MetricsPage

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
SILENT_S = 10.0
"""Time without a line after which a process that reports is in trouble."""

_HEALTHY_S = 3.0
"""Time after which a ready process counts as started: its next restart waits for the first, short pause."""

_STOP_S = 5.0
"""Time that a process gets to end, on top of the drain, in seconds."""
_log = logging.getLogger(__name__)


class ProcessDied(ConfigError):
    """A process ended without an error message, or does not become ready."""


class ManagedProcess:
    """A process that is kept running.

    Attributes:
        name: Name for messages.
        pid: Its id, 0 before it was started.
        starts: Number of times that it was started.
        ready: True from the line that says so until the process ends.
    """

    def __init__(self, name: str, spec: dict[str, Any], page: MetricsPage) -> None:
        """Prepares a process; `start` starts it.

        Args:
            name: Name for messages.
            spec: The launch spec, see `serving.processes.entrypoint`.
            page: Collects the metrics of the process.
        """
        self.name = name
        self._page = page
        self.pid = self.starts = 0
        self.ready = False
        self._spec = spec
        self._process: subprocess.Popen[str] | None = None
        self._pause = FIRST_PAUSE_S
        self._restart_at = self._heard_at = self._ready_at = 0.0
        self._error = ""
        self._state: dict[str, Any] = {}
        self._done = set[str]()
        self._changed = threading.Condition()
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Starts the process."""
        with self._page.connect(self.name) as reports:
            process = subprocess.Popen(
                [sys.executable, "-m", "serving.processes.entrypoint"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                errors="replace",
                env=_environment(),
                process_group=0,
                pass_fds=[reports.fileno(), *self._spec["sealed"].values()],
            )
            spec = self._spec | {"report_fd": reports.fileno()}
        with self._changed:
            self._process, self.pid, self._restart_at, self._ready_at = process, process.pid, 0.0, 0.0
            self._error, self.ready, self._state = "", False, {}
            self._done.clear()
        self.starts += 1
        self._reader = threading.Thread(target=self._read, args=(process,), name=f"read-{self.name}", daemon=True)
        self._reader.start()
        # The pipe stays open: its end tells the process that the supervisor is gone.
        self._write(json.dumps(spec))

    def wait_ready(self, seconds: float, stop: threading.Event) -> bool:
        """Waits until the process is ready; returns False if a stop was asked for first.

        Raises:
            ConfigError: The process refused to start; the message is its own.
            ProcessDied: It ended without an error message, or is not ready in time.
        """
        end = time.monotonic() + seconds
        while True:
            if stop.is_set():
                return False
            assert self._process is not None
            ended = self._process.poll() is not None
            if ended and self._reader:
                self._reader.join()  # its last lines
            if self.ready:
                return True
            if self._error:
                raise ConfigError(self._error)
            if ended or time.monotonic() > end:
                raise ProcessDied(f"{self.name} did not start: it ended or hangs; see the log above")
            with self._changed:
                self._changed.wait(0.05)

    def restart_if_ended(self) -> None:
        """Restarts the process if it has ended, after a pause that grows while it keeps ending; call it often."""
        assert self._process is not None
        if self._process.poll() is None:
            return
        now = time.monotonic()
        if not self._restart_at:
            if self._ready_at and now - self._ready_at > _HEALTHY_S:
                self._pause = FIRST_PAUSE_S
            self._restart_at = now + self._pause
            self._close()
            status = self._process.returncode
            _log.error("%s ended with status %s; restarting in %.1f s. %s", self.name, status, self._pause, self._error)
            self._error = self._error or f"ended with status {status}"
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        elif now >= self._restart_at:
            last_error = self._error
            try:
                self.start()
            except OSError as error:  # no memory or handles for a process now: the service goes on without it
                _log.error("%s cannot be started; trying again in %.1f s. %s", self.name, self._pause, error)
                self._restart_at = now + self._pause
                self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
            self._error = last_error  # readiness shows it until the process is ready, or reports another

    def trouble(self) -> dict[str, str]:
        """Returns what is wrong with the process, by part; the part of its own name is the process itself."""
        with self._changed:
            if not self.ready:
                running = self._process is not None and self._process.poll() is None
                phase = "starting" if running and not self._error else "restarting"
                return {self.name: f"{phase}: {self._error}" if self._error else phase}
            trouble = dict(self._state.get("trouble", {}))
            if self._heard_at and (silent_s := time.monotonic() - self._heard_at) > SILENT_S:
                trouble[self.name] = f"has reported nothing for {silent_s:.0f} s"
            return trouble

    def send(self, command: str) -> None:
        """Sends a command; a process that is starting runs it once it is ready. See `serving.processes.entrypoint`."""
        if self._process and self._process.poll() is None:
            self._write(command)

    def wait_done(self, command: str, end: float) -> bool:
        """Waits until a command is done or the time, monotonic, is over; True if it is done, or the process ended."""
        with self._changed:
            return self._changed.wait_for(
                lambda: command in self._done or not self.ready, timeout=max(end - time.monotonic(), 0.0)
            )

    def terminate(self) -> None:
        """Asks the process to stop; the second time, to stop at once."""
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def end(self, until: float, hurry: threading.Event) -> None:
        """Waits for the process until a time, monotonic, then kills it; passes on a `hurry` that is set meanwhile."""
        process = self._process
        if not process:
            return
        hurried = False
        while process.poll() is None:
            if hurry.is_set() and not hurried:
                hurried = True
                self.terminate()
            left = until - time.monotonic()
            if left <= 0:
                _log.error("%s does not stop; killing it", self.name)
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(max(left, 0.05), 0.1))
        if process.returncode > 0:
            _log.warning("%s ended with status %d", self.name, process.returncode)
        self._close()

    def _write(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended: `restart_if_ended` handles that
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _read(self, process: subprocess.Popen[str]) -> None:
        """Reads the lines of the process until it ends."""
        pipe: IO[str] | None = process.stdout
        assert pipe is not None
        for line in pipe:
            with self._changed:
                try:
                    self._take(json.loads(line))
                except (ValueError, AttributeError, TypeError):  # printed by a library
                    _log.warning("%s: %s", self.name, line.rstrip())
                self._changed.notify_all()
        with self._changed:
            if self._process is process:
                self.ready = False
            self._changed.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        self._heard_at = time.monotonic() if "state" in message else self._heard_at
        if "ready" in message:
            self.ready, self._error, self._heard_at, self._ready_at = True, "", 0.0, time.monotonic()
        self._error = str(message.get("error", self._error))
        self._state = message.get("state", self._state)
        if "done" in message:
            self._done.add(str(message["done"]))

    def _close(self) -> None:
        """Closes the pipes of a process that has ended, and waits for its last lines."""
        assert self._process is not None
        if self._reader:
            self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def stop_all(processes: Sequence[ManagedProcess], drain_s: float, hurry: threading.Event) -> None:
    """Asks processes to stop and waits until they have ended; kills those that exceed the drain by `_STOP_S`."""
    for process in processes:
        process.terminate()
    end = time.monotonic() + drain_s + _STOP_S
    for process in processes:
        process.end(end, hurry)


def _environment() -> dict[str, str]:
    """Returns the environment variables of a process."""
    # The service scales by processes, so a library gets one thread, and none that spins while it waits.
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    fixed = dict.fromkeys(threads, "1") | {"OMP_WAIT_POLICY": "PASSIVE", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    # ONNX Runtime must not report to its maker. gRPC's core logs each bad header and each broken handshake, which lets
    # a hostile client fill the disk. Its threads share the fragments of memory that an attack leaves.
    defaults = {"ORT_DISABLE_TELEMETRY": "1", "GRPC_VERBOSITY": "NONE", "MALLOC_ARENA_MAX": "2"}
    return defaults | os.environ | fixed
