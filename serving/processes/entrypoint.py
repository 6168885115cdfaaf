"""The main function of every child of `penchant serve`: a worker, the projector, or the warehouse.

Its orders come as one line of JSON on standard input; it says `{"ready": true}` or `{"error": ...}` on standard output,
once, and its state from then on. It stops on SIGTERM, in a hurry on a second one, or when standard input ends because
the parent is gone. Until then lines on standard input are commands, which only workers know: `unready` and `close`.
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

_log = logging.getLogger("serving.processes.entrypoint")
_saying = threading.Lock()


class Control:
    """What the parent and signals ask of this process.

    Attributes:
        stop: Set when it shall end.
        hurry: Set when it shall end at once.
        state: Takes the state of the process, to be told to the parent.
    """

    def __init__(self) -> None:
        self.stop, self.hurry = threading.Event(), threading.Event()
        self._commands: Mapping[str, Callable[[], None]] | None = None
        self._early: list[str] = []
        self._lock = threading.Lock()

    def state(self, state: dict[str, Any]) -> None:
        """Tells the parent how this process is; a parent that is gone is none to tell."""
        with contextlib.suppress(BrokenPipeError):
            _say({"state": state})

    def obey(self, commands: Mapping[str, Callable[[], None]]) -> None:
        """Carries out commands from now on, first those that came before."""
        with self._lock:
            self._commands = commands
            for word in self._early:
                self._carry_out(word)

    def watch(self) -> None:
        """Takes signals and commands; standard input ends when the parent is gone, however it went."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._asked())
        threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def _asked(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()

    def _listen(self) -> None:
        # Not sys.stdin: a thread that waits in there keeps the interpreter from ending.
        waiting = b""
        while piece := os.read(sys.stdin.fileno(), 4096):
            *lines, waiting = (waiting + piece).split(b"\n")
            for line in lines:
                with self._lock:
                    if self._commands is None:
                        self._early.append(line.decode())
                    else:
                        self._carry_out(line.decode())
        self.stop.set()

    def _carry_out(self, word: str) -> None:
        assert self._commands is not None
        if command := self._commands.get(word):
            command()
            _say({"done": word})


def main() -> int:
    """Obeys the orders; the exit status."""
    set_private_umask()
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as unbuffered:  # takes no more than the line
        orders = json.loads(unbuffered.readline())
    logs.configure(orders["settings"]["log_format"], orders["role"], orders.get("number"))
    telemetry, control = Telemetry(), Control()
    report(orders["report_fd"], telemetry)
    control.watch()
    name = f"{orders['role']} {orders['number']}" if "number" in orders else str(orders["role"])

    def ready() -> None:
        _log.info("the %s is ready", name)
        _say({"ready": True})

    try:
        config = ServeConfig(**orders["settings"], token=orders["token"] or None)
        if orders["role"] == "worker":
            from serving.processes.worker import work

            work(config, telemetry, control.stop, ready, orders["bundle_id"], orders["sealed"], control)
        else:
            _read_log(orders["role"], config, orders["bundle_id"], control, telemetry, ready)
    except PenchantError as error:
        _say({"error": str(error)})
        return 2
    _log.info("the %s has stopped", name)
    return 0


def _read_log(
    role: str,
    config: ServeConfig,
    bundle_id: str,
    control: Control,
    telemetry: Telemetry,
    ready: Callable[[], None],
) -> None:
    """Runs one of the roles that read the log."""
    # Imported where they are needed: a projector has no use for models, an index or gRPC.
    trouble = Trouble(control.state)
    if role == "projector":
        from serving.projection.process import run

        run(
            config.redis,
            config.events_redis,
            config.partitions,
            control.stop,
            purge_s=config.purge_hours * 1800,
            eviction=_eviction(config) if config.evict_after_days else None,
            ready=lambda _: ready(),
            telemetry=telemetry,
            trouble=trouble,
            unsafe=config.unsafe_redis,
        )
        return
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
        ready=lambda _: ready(),
        bundle_id=bundle_id,
        telemetry=telemetry,
        trouble=trouble,
    )


def _eviction(config: ServeConfig) -> Eviction:
    """Returns when profiles are evicted, and how they are restored."""
    # Imported where it is needed: a projector that evicts nothing has no use for Arrow.
    from features.profile import Retention
    from serving.projection.eviction import Eviction
    from serving.projection.restore import restore_profiles

    return Eviction(
        config.evict_after_days, partial(restore_profiles, config.warehouse_path, Retention(config.retention_days))
    )


def _say(what: dict[str, Any]) -> None:
    # One write for a line: several threads say something.
    with _saying:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
