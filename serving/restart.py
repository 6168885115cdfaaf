"""Starts again what ends in an error, after a pause that grows while it keeps ending, and says what is wrong meanwhile.

For the parts of a process that shall outlive their errors: a Redis whose password is being changed, a full disk, a
directory that the previous instance still holds, a defect. What a caller must change is raised at once, unless the part
has been well before.
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
"""Takes what is wrong with a part in one line, empty where it is well."""

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0

_HEALTHY_S = 30.0
_PERIOD_S = 1.0
_SHOWN = 500
"""Characters of an error that are shown."""
_OPEN = (ConfigError, BundleError, FailedPrecondition, Unavailable, OSError)
"""Errors whose text is about machines and settings alone; others may name a user, and only the log may."""
_log = logging.getLogger(__name__)


class Trouble:
    """What is wrong with the parts of a process; tells its changes, and that it lives once a second."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        """Takes whom to tell: `{"trouble": {part: text}}`."""
        self._tell = tell
        self._parts: dict[str, str] = {}
        self._told = -_PERIOD_S
        self._lock = threading.Lock()

    def reporter(self, part: str) -> Report:
        """Returns what reports on a part; to be called often, also where nothing changes."""

        def report(text: str) -> None:
            with self._lock:
                changed = self._parts.get(part, "") != text
                self._parts[part] = text
                now = time.monotonic()
                if changed or now - self._told >= _PERIOD_S:
                    self._told = now
                    self._tell({"trouble": {name: why for name, why in self._parts.items() if why}})

        return report


def described(error: BaseException) -> str:
    """Returns one line about an error that anybody may read."""
    full = isinstance(error, ResourceExhausted) and not error.field  # a store; with a field it is about one user
    if full or isinstance(error, _OPEN):
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
    """Runs `attempt` until it returns; starts it again where it raises, until `stop` is set.

    Args:
        name: Name of the part for the log.
        attempt: Does the work and leaves nothing behind when it raises; reports "" while it is well.
        stop: Ends the waiting.
        report: Told what is wrong.
        patient: Also wait for what only a caller can change.

    Raises:
        ConfigError: It cannot begin like this, and `patient` is False.
        BundleError: Likewise.
    """
    began = False

    def reporting(text: str) -> None:
        nonlocal began
        began = began or not text
        if not text:
            outage.works()
        report(text)

    pause, outage = FIRST_PAUSE_S, Outage(_log, f"{name} failed, is started again")
    while True:
        begun = time.monotonic()
        try:
            return attempt(reporting)
        except Exception as error:  # a defect must not end the part for good, nor without a word
            if isinstance(error, (ConfigError, BundleError)) and not (began or patient):
                raise
            if time.monotonic() - begun > _HEALTHY_S:
                pause = FIRST_PAUSE_S
            expected = isinstance(error, (PenchantError, OSError))
            outage.failed(error, trace=None if expected else error)
            report(f"failed, is started again: {described(error)}")
        if stop.wait(pause):
            return
        pause = min(2 * pause, LONGEST_PAUSE_S)
