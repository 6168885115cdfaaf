"""The main function of every process that the supervisor starts: a worker, the projector, or the warehouse.

Its launch spec comes as one line of JSON on standard input. It writes `{"ready": true}` or `{"error": ...}` to standard
output, once, and its state from then on. It stops on SIGTERM, at once on a second one, or when standard input ends
because the supervisor is gone. Until then lines on standard input are commands, which only workers know: `unready` and
`close`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from features.errors import PenchantError
from features.private_files import set_private_umask
from serving.config import ServeConfig
from serving.observability import logs
from serving.observability.reporting import report
from serving.observability.telemetry import Telemetry
from serving.restart import Trouble

if TYPE_CHECKING:
    from serving.projection.eviction import Eviction

_log = logging.getLogger("serving.processes.entrypoint")  # not __name__, which is __main__ here
_writing = threading.Lock()
BEHIND_WORKERS = 5
"""Added to the niceness of a process for which no caller waits: it gets a quarter of a core that a worker wants too."""


class ProcessControl:
    """The link to the supervisor: its commands and signals come in, the state of this process goes out.

    Attributes:
        stop: Set when the process is to end.
        hurry: Set when it is to end at once.
    """

    def __init__(self) -> None:
        self.stop, self.hurry = threading.Event(), threading.Event()
        self._commands: Mapping[str, Callable[[], None]] | None = None
        self._early: list[str] = []
        self._lock = threading.Lock()

    def report_state(self, state: dict[str, Any]) -> None:
        """Reports the state of this process to the supervisor, if that still runs."""
        with contextlib.suppress(BrokenPipeError):
            _write({"state": state})

    def handle(self, commands: Mapping[str, Callable[[], None]]) -> None:
        """Runs commands from now on, first those that have come already."""
        with self._lock:
            self._commands = commands
            for name in self._early:
                self._run(name)

    def listen(self) -> None:
        """Starts to take signals and commands; standard input ends when the supervisor does, in any way."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._request_stop())
        threading.Thread(target=self._read_commands, name="supervisor", daemon=True).start()

    def _request_stop(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()

    def _read_commands(self) -> None:
        # Not sys.stdin: a thread that waits in there keeps the interpreter from ending.
        partial_line = b""
        while data := os.read(sys.stdin.fileno(), 4096):
            *lines, partial_line = (partial_line + data).split(b"\n")
            for line in lines:
                with self._lock:
                    if self._commands is None:
                        self._early.append(line.decode())
                    else:
                        self._run(line.decode())
        self.stop.set()

    def _run(self, name: str) -> None:
        assert self._commands is not None
        if command := self._commands.get(name):
            command()
            # A supervisor that ended meanwhile must not end this thread, which is to see that standard input has ended.
            with contextlib.suppress(BrokenPipeError):
                _write({"done": name})


def main() -> int:
    """Runs the role of the launch spec; returns the exit status."""
    set_private_umask()
    # Unbuffered, to read no more than the line: the rest belongs to the thread that reads commands.
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
        spec = json.loads(stdin.readline())
    logs.configure(spec["settings"]["log_format"], spec["role"], spec.get("number"))
    telemetry, control = Telemetry(), ProcessControl()
    report(spec["report_fd"], telemetry)
    control.listen()
    name = f"{spec['role']} {spec['number']}" if "number" in spec else str(spec["role"])
    if spec["role"] != "worker":
        # Callers wait for workers and for nothing else: a file that is written must take no core from an answer.
        os.nice(BEHIND_WORKERS)

    def ready(_: Any = None) -> None:
        _log.info("the %s is ready", name)
        _write({"ready": True})

    try:
        config = ServeConfig(**spec["settings"], token=spec["token"] or None)
        _ROLES[spec["role"]](config, spec, control, telemetry, ready)
    except PenchantError as error:
        _write({"error": str(error)})
        return 2
    _log.info("the %s has stopped", name)
    return 0


# Each role imports its modules when it runs: a projector has no use for models, an index or gRPC.


def _work(
    config: ServeConfig, spec: dict[str, Any], control: ProcessControl, telemetry: Telemetry, ready: Callable[..., None]
) -> None:
    from serving.processes.worker import work

    work(config, telemetry, control.stop, ready, spec["bundle_id"], spec["sealed"], control)


def _project(
    config: ServeConfig, spec: dict[str, Any], control: ProcessControl, telemetry: Telemetry, ready: Callable[..., None]
) -> None:
    from serving.projection.process import run

    run(
        config.redis,
        config.events_redis,
        config.partitions,
        control.stop,
        # Twice as often as erasures are due, so that a round that fails leaves time for another.
        purge_s=config.purge_hours * 1800,
        eviction=_eviction(config) if config.evict_after_days else None,
        ready=ready,
        telemetry=telemetry,
        trouble=Trouble(control.report_state),
        unsafe=config.unsafe_redis,
    )


def _eviction(config: ServeConfig) -> Eviction:
    # Imported only if profiles are evicted: Arrow takes memory.
    from features.profile import Retention
    from serving.projection.eviction import Eviction
    from serving.projection.restore import restore_profiles

    restore = partial(restore_profiles, config.warehouse_path, Retention(config.retention_days))
    return Eviction(config.evict_after_days, restore)


def _write_warehouse(
    config: ServeConfig, spec: dict[str, Any], control: ProcessControl, telemetry: Telemetry, ready: Callable[..., None]
) -> None:
    from serving.privacy.ledger import Ledger
    from serving.warehouse import process as warehouse

    warehouse.run(
        config.events_redis,
        config.warehouse_path,
        config.bundle,
        config.partitions,
        flush_s=config.warehouse_flush_s,
        days=config.warehouse_days,
        default=config.default_consent,
        ledger=Ledger(config.ledger_path),
        stop=control.stop,
        ready=ready,
        bundle_id=spec["bundle_id"],
        telemetry=telemetry,
        trouble=Trouble(control.report_state),
    )


_ROLES: Mapping[str, Callable[..., None]] = {"worker": _work, "projector": _project, "warehouse": _write_warehouse}


def _write(message: dict[str, Any]) -> None:
    # One line at a time: several threads write.
    with _writing:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
