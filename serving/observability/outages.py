"""Logs that something does not work once a minute, however often it is tried, and once that it works again.

Every call and every loop of a process meets a Redis that is down. Each would log a line or a traceback of its own,
several a second, and hide all other lines. So they share one `Outage` per thing that can fail.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable

EVERY_S = 60.0
"""Time between two lines about the same outage, in seconds."""

EVENTS_REDIS, PROFILES_REDIS = "the events Redis", "the profiles Redis"
"""Names of the two for `shared_outage`, to which every call to a Redis reports its result."""


class Outage:
    """The state of one thing that may fail; any thread may call anything.

    At most one line per `every_s` reports the failure, and at most one that it works again.
    """

    def __init__(
        self,
        log: logging.Logger,
        name: str,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins with a thing that works.

        Args:
            log: The logger of the lines.
            name: Name of the thing, as the beginning of a sentence: "the events Redis".
            every_s: Time between two lines, in seconds.
            clock: Returns the time, in seconds.
        """
        self._log, self._name, self._every_s, self._clock = log, name, every_s, clock
        self._lock = threading.Lock()
        self._parts: dict[Hashable, float] = {}
        self._began = 0.0
        self._logged_at = float("-inf")
        self._is_logged = False
        self._failures = self._failures_logged = 0
        self._lost: Counter[str] = Counter()

    @property
    def seconds(self) -> float:
        """Length of the outage so far; 0.0 while the thing works."""
        return self._clock() - self._began if self._parts else 0.0

    def failed(self, error: object, part: Hashable = None, *, trace: BaseException | None = None) -> None:
        """Counts a failure, and logs it if `every_s` has passed since the last line.

        Args:
            error: The problem and its remedy.
            part: The part that fails, of a thing with several; the thing works again when all parts do.
            trace: An unexpected exception: the line ends with its traceback.
        """
        with self._lock:
            now = self._clock()
            if not self._parts:
                self._began = now
            self._parts[part] = now
            self._failures += 1
            # Also across outages: one that comes and goes every second still gets a line a minute.
            if now - self._logged_at < self._every_s:
                return
            since, self._failures_logged = self._failures - self._failures_logged, self._failures
            line = f"{self._name}: {error}"
            if self._is_logged:
                line += f" ({since} times since the last line, for {now - self._began:.0f} s by now{self._losses()})"
            self._logged_at, self._is_logged = now, True
        self._log.warning("%s", line, exc_info=trace)

    def lost(self, loss: str, number: int) -> None:
        """Counts a loss by the outage, for its next line: `lost("slates not logged", 57)`."""
        with self._lock:
            self._lost[loss] += number

    def works(self, part: Hashable = None) -> None:
        """Notes that the thing, or a part of it, works, and logs the end of an outage that was logged."""
        if not self._parts:  # nearly always: costs no lock
            return
        with self._lock:
            now = self._clock()
            self._parts.pop(part, None)
            # A node that left the cluster never works again, and fails no more either.
            self._parts = {name: last for name, last in self._parts.items() if now - last < self._every_s}
            if self._parts:
                return
            is_logged, failures, losses = self._is_logged, self._failures, self._losses()
            self._is_logged, self._failures, self._failures_logged = False, 0, 0
            self._lost.clear()
        if is_logged:
            line = "%s: works again after %.1f s and %d failures%s"
            self._log.warning(line, self._name, now - self._began, failures, losses)

    def _losses(self) -> str:
        return "".join(f", {number} {loss}" for loss, number in self._lost.items() if number)


_shared: dict[str, Outage] = {}
_sharing = threading.Lock()


def shared_outage(name: str) -> Outage:
    """Returns the one `Outage` of this process for a thing that many of its parts use."""
    with _sharing:
        return _shared.setdefault(name, Outage(logging.getLogger(__name__), name))
