"""Restarts parts of a process that end in an error, after a pause that grows while they keep ending, and reports why.

For the parts that are to outlive their errors: a Redis whose password is being changed, a full disk, a directory that
the previous instance still holds, a defect. An error that an operator has to correct is raised at once, unless the part
has worked before.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from features.errors import BundleError, PenchantError
from serving.errors import ConfigError, FailedPrecondition, ResourceExhausted, Unavailable
from serving.observability.outages import Outage

Report = Callable[[str], None]
"""Takes the trouble of a part in one line, "" if it works."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0

_HEALTHY_S = 30.0
_PERIOD_S = 1.0
_SHOWN = 500
"""Most characters of an error that are shown."""
_OPEN = (ConfigError, BundleError, FailedPrecondition, Unavailable, OSError)
"""Errors whose text is about machines and settings alone; that of others may name a user, so only the log has it."""
_log = logging.getLogger(__name__)


class Trouble:
    """The trouble of the parts of a process: reports every change at once, and once a second as a sign of life."""

    def __init__(self, report_state: Callable[[dict[str, Any]], None]) -> None:
        """Begins without trouble; `report_state` takes `{"trouble": {part: text}}`."""
        self._report_state = report_state
        self._parts: dict[str, str] = {}
        self._reported_at = -_PERIOD_S
        self._lock = threading.Lock()

    def reporter(self, part: str) -> Report:
        """Returns the function that reports on a part; it is to be called often, also without a change."""

        def report(text: str) -> None:
            with self._lock:
                changed = self._parts.get(part, "") != text
                self._parts[part] = text
                now = time.monotonic()
                if changed or now - self._reported_at >= _PERIOD_S:
                    self._reported_at = now
                    self._report_state({"trouble": {name: text for name, text in self._parts.items() if text}})

        return report


def described(error: BaseException) -> str:
    """Returns one line about an error, without the id of a user."""
    # Without a field it is a store that is full; with one it is about a user.
    is_full = isinstance(error, ResourceExhausted) and not error.field
    if is_full or isinstance(error, _OPEN):
        return " ".join(str(error).split())[:_SHOWN]
    return f"{type(error).__name__}; the log says more"


def stop_on_signals(stop: threading.Event) -> None:
    """Has SIGTERM and SIGINT set `stop`, if this is the main thread; only that one may handle signals."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())


def keep_running(
    name: str, attempt: Callable[[Report], None], stop: threading.Event, report: Report, *, patient: bool = False
) -> None:
    """Runs `attempt` until it returns; restarts it if it raises, until `stop` is set.

    Args:
        name: Name of the part for the log.
        attempt: Does the work, and cleans up when it raises; reports "" while it works.
        stop: Ends the waiting.
        report: Takes the trouble of the part.
        patient: Restart also after errors that an operator has to correct.

    Raises:
        ConfigError, BundleError: The part has never worked, and `patient` is False.
    """
    has_worked = False

    def reporting(text: str) -> None:
        nonlocal has_worked
        has_worked = has_worked or not text
        if not text:
            outage.works()
        report(text)

    pause, outage = FIRST_PAUSE_S, Outage(_log, f"{name} failed and is restarted")
    while True:
        begun_at = time.monotonic()
        try:
            return attempt(reporting)
        except Exception as error:  # a defect must not end the part for good
            if isinstance(error, (ConfigError, BundleError)) and not (has_worked or patient):
                raise
            if time.monotonic() - begun_at > _HEALTHY_S:
                pause = FIRST_PAUSE_S
            expected = isinstance(error, (PenchantError, OSError))
            outage.failed(error, trace=None if expected else error)
            report(f"failed and is restarted: {described(error)}")
        if stop.wait(pause):
            return
        pause = min(2 * pause, LONGEST_PAUSE_S)
