"""Starts a service as an operator would, and stops it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from features.errors import PenchantError

START_S = 90.0
STOP_S = 30.0


class ServiceError(PenchantError):
    """A service did not start or did not stop."""


@contextlib.contextmanager
def running(bundle: Path, *options: str) -> Iterator[dict[str, Any]]:
    """Serves `bundle` on a free port of this machine while the block runs.

    Args:
        bundle: Directory of the bundle.
        options: More options of `penchant serve`.

    Yields:
        The service's ready line: `listen`, `bundle_id`, `pid` and the Redis URLs.

    Raises:
        ServiceError: The service was not ready in time, or ended with an error.
    """
    # A process of its own, as an operator starts it: its threads share nothing with the one that measures.
    command = [sys.executable, "-m", "penchant", "serve", str(bundle), "--listen", "127.0.0.1:0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield _ready(process, command)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise ServiceError(f"the service did not stop within {STOP_S:.0f} s of SIGTERM") from None
        finally:
            if process.stdout:
                process.stdout.close()
        # An error of the block explains more than the status of a service that was stopped because of it.
        if status and sys.exc_info()[0] is None:
            raise ServiceError(f"the service ended with status {status}")


def _ready(process: subprocess.Popen[str], command: list[str]) -> dict[str, Any]:
    # Reading a line has no timeout of its own; killing the process ends the loop below.
    watchdog = threading.Timer(START_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                ready: dict[str, Any] = json.loads(line)
                return ready
    finally:
        watchdog.cancel()
    raise ServiceError(f"the service did not start: {' '.join(command)}")
