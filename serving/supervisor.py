"""Keeps the processes of a service running, and knows the state of each.

A process gets its orders as one line of JSON on standard input, and words of command after it. It answers on standard
output with lines of JSON: `{"ready": true}` or `{"error": ...}` once, then `{"state": {...}}` from time to time and
`{"done": COMMAND}`. One that ends is started again after a pause that grows while it keeps ending.
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
from serving.monitor import Monitor

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
SILENT_S = 10.0
"""Time without a word after which a process that reports is in trouble."""

_HEALTHY_S = 3.0
"""Time ready after which a process that ends has not ended at its start."""

_STOP_S = 5.0
"""Time a process is given to end, on top of the drain, in seconds."""
_log = logging.getLogger(__name__)


class ChildDied(ConfigError):
    """A process ended without a word, or does not get ready."""


class Child:
    """A process that is kept running.

    Attributes:
        name: Name for messages.
        pid: Its id, 0 before it was started.
        starts: Number of times that it was started.
        ready: True from the moment when it says so until it ends.
    """

    def __init__(self, name: str, orders: dict[str, Any], monitor: Monitor) -> None:
        self.name = name
        self._monitor = monitor
        self.pid = self.starts = 0
        self.ready = False
        self._orders = orders
        self._process: subprocess.Popen[str] | None = None
        self._pause = FIRST_PAUSE_S
        self._again = self._heard = self._ready_at = 0.0
        self._error = ""
        self._state: dict[str, Any] = {}
        self._done = set[str]()
        self._news = threading.Condition()
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Starts the process."""
        with self._monitor.connect(self.name) as reports:
            process = subprocess.Popen(
                [sys.executable, "-m", "serving.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                errors="replace",
                env=_environment(),
                process_group=0,
                pass_fds=[reports.fileno(), *self._orders["sealed"].values()],
            )
            orders = self._orders | {"report_fd": reports.fileno()}
        with self._news:
            self._process, self.pid, self._again, self._ready_at = process, process.pid, 0.0, 0.0
            self._error, self.ready, self._state = "", False, {}
            self._done.clear()
        self.starts += 1
        self._reader = threading.Thread(target=self._read, args=(process,), name=f"read-{self.name}", daemon=True)
        self._reader.start()
        # The pipe stays open: that it ends tells the child that we are gone.
        self._write(json.dumps(orders))

    def wait_ready(self, seconds: float, stop: threading.Event) -> bool:
        """Waits until the process says that it is ready; False when a stop was asked for first.

        Raises:
            ConfigError: It refused to start; the message is its own.
            ChildDied: It ended without a word, or does not get ready in time.
        """
        end = time.monotonic() + seconds
        while True:
            if stop.is_set():
                return False
            assert self._process is not None
            ended = self._process.poll() is not None
            if ended and self._reader:
                self._reader.join()  # its last words
            if self.ready:
                return True
            if self._error:
                raise ConfigError(self._error)
            if ended or time.monotonic() > end:
                raise ChildDied(f"{self.name} did not start: it ended or hangs; see the log above")
            with self._news:
                self._news.wait(0.05)

    def keep(self) -> None:
        """Starts the process again where it ended, after a pause that grows while it keeps ending."""
        assert self._process is not None
        if self._process.poll() is None:
            return
        now = time.monotonic()
        if not self._again:
            if self._ready_at and now - self._ready_at > _HEALTHY_S:
                self._pause = FIRST_PAUSE_S
            self._again = now + self._pause
            self._close()
            status = self._process.returncode
            _log.error("%s ended with status %s; again in %.1f s. %s", self.name, status, self._pause, self._error)
            self._error = self._error or f"ended with status {status}"
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        elif now >= self._again:
            before = self._error
            try:
                self.start()
            except OSError as error:  # no memory or handles for a process now: the others serve on
                _log.error("%s cannot be started; again in %.1f s. %s", self.name, self._pause, error)
                self._again = now + self._pause
                self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
            self._error = before  # it stands until the process is ready, or says another

    def trouble(self) -> dict[str, str]:
        """Returns what is wrong with it, by part; the process itself is the part of its name."""
        with self._news:
            if not self.ready:
                running = self._process is not None and self._process.poll() is None
                word = "starting" if running and not self._error else "restarting"
                return {self.name: f"{word}: {self._error}" if self._error else word}
            found = dict(self._state.get("trouble", {}))
            if self._heard and (silent := time.monotonic() - self._heard) > SILENT_S:
                found[self.name] = f"has said nothing for {silent:.0f} s"
            return found

    def command(self, word: str) -> None:
        """Sends a word of command; see `serving.child`."""
        if self.ready:
            self._write(word)

    def wait_done(self, word: str, end: float) -> bool:
        """Waits until a command is done or the time, monotonic, is over; True where it is done, or nobody is left."""
        with self._news:
            return self._news.wait_for(
                lambda: word in self._done or not self.ready, timeout=max(end - time.monotonic(), 0.0)
            )

    def terminate(self) -> None:
        """Asks the process to stop; asked again, it hurries."""
        if self._process and self._process.poll() is None:
            self._process.terminate()

    def end(self, until: float, hurry: threading.Event) -> None:
        """Waits for the process until a time, monotonic, then ends it by force; hands on that it shall hurry."""
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
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended: `keep` sees to that
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _read(self, process: subprocess.Popen[str]) -> None:
        """Takes in what the process says, until it ends."""
        pipe: IO[str] | None = process.stdout
        assert pipe is not None
        for line in pipe:
            with self._news:
                try:
                    self._take(json.loads(line))
                except (ValueError, AttributeError, TypeError):  # a library that prints
                    _log.warning("%s: %s", self.name, line.rstrip())
                self._news.notify_all()
        with self._news:
            if self._process is process:
                self.ready = False
            self._news.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        self._heard = time.monotonic() if "state" in message else self._heard
        if "ready" in message:
            self.ready, self._error, self._heard, self._ready_at = True, "", 0.0, time.monotonic()
        self._error = str(message.get("error", self._error))
        self._state = message.get("state", self._state)
        if "done" in message:
            self._done.add(str(message["done"]))

    def _close(self) -> None:
        """Closes the pipes of a process that has ended, and waits for what it said last."""
        assert self._process is not None
        if self._reader:
            self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def stop_all(children: Sequence[Child], drain_s: float, hurry: threading.Event) -> None:
    """Asks processes to stop and waits until they have; by force where they take longer than the drain and 5 s."""
    for child in children:
        child.terminate()
    end = time.monotonic() + drain_s + _STOP_S
    for child in children:
        child.end(end, hurry)


def _environment() -> dict[str, str]:
    """One thread per library and none that spins: the service scales by processes. No library reports to its maker."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    ours = dict.fromkeys(threads, "1") | {"OMP_WAIT_POLICY": "PASSIVE", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    # gRPC's core logs each bad header and each broken handshake: a line for whoever wants to fill the disk. Its threads
    # share the pieces of memory that an attack leaves, instead of each keeping its own.
    less = {"ORT_DISABLE_TELEMETRY": "1", "GRPC_VERBOSITY": "NONE", "MALLOC_ARENA_MAX": "2"}
    return less | os.environ | ours
