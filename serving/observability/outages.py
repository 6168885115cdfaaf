"""Says that something does not work once a minute, however often it is tried, and once that it works again.

A Redis that is down is met by every call and every loop of a process. Each would log a line, or a traceback, of its
own, several a second, and what matters would be lost among them. So they share one `Outage` per thing that can fail.
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
"""What `shared_outage` calls the two; every call to one of them says here what came of it."""


class Outage:
    """The state of one thing that may fail; any thread may call anything.

    At most one line per `every_s` says that it fails, and at most one that it works again.
    """

    def __init__(
        self,
        log: logging.Logger,
        what: str,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Names what may fail.

        Args:
            log: Where the lines go.
            what: What it is, as the beginning of a sentence: "the events Redis".
            every_s: Time between two lines, in seconds.
            clock: What tells the time, in seconds.
        """
        self._log, self._what, self._every_s, self._clock = log, what, every_s, clock
        self._lock = threading.Lock()
        self._parts: dict[Hashable, float] = {}
        self._began = 0.0
        self._told_at = float("-inf")
        self._told = False
        self._failures = self._failures_told = 0
        self._lost: Counter[str] = Counter()

    @property
    def seconds(self) -> float:
        """For how long it has not worked; 0.0 while it works."""
        return self._clock() - self._began if self._parts else 0.0

    def failed(self, error: object, part: Hashable = None, *, trace: BaseException | None = None) -> None:
        """Counts a failure; a line says so where none did lately.

        Args:
            error: What is wrong and what to do about it.
            part: What of it fails, where it has several parts; it works again when all of them do.
            trace: An exception that nobody expected: the line ends with its traceback.
        """
        with self._lock:
            now = self._clock()
            if not self._parts:
                self._began = now
            self._parts[part] = now
            self._failures += 1
            if now - self._told_at < self._every_s:
                return
            since, self._failures_told = self._failures - self._failures_told, self._failures
            line = f"{self._what}: {error}"
            if self._told:
                line += f" ({since} times since the last line, for {now - self._began:.0f} s by now{self._losses()})"
            self._told_at, self._told = now, True
        self._log.warning("%s", line, exc_info=trace)

    def lost(self, what: str, number: int) -> None:
        """Counts what an outage costs, for its next line: `lost("slates not logged", 57)`."""
        with self._lock:
            self._lost[what] += number

    def works(self, part: Hashable = None) -> None:
        """Notes that it, or a part of it, works; a line says so where the outage had one."""
        if not self._parts:  # nearly always: costs no lock
            return
        with self._lock:
            now = self._clock()
            self._parts.pop(part, None)
            # A node that left the cluster never works again, and fails no more either.
            self._parts = {other: last for other, last in self._parts.items() if now - last < self._every_s}
            if self._parts:
                return
            told, failures, losses = self._told, self._failures, self._losses()
            self._told, self._failures, self._failures_told = False, 0, 0
            self._lost.clear()
        if told:
            line = "%s: works again after %.1f s and %d failures%s"
            self._log.warning(line, self._what, now - self._began, failures, losses)

    def _losses(self) -> str:
        return "".join(f", {number} {what}" for what, number in self._lost.items() if number)


_shared: dict[str, Outage] = {}
_sharing = threading.Lock()


def shared_outage(what: str) -> Outage:
    """The one `Outage` of this process for something that many parts of it use, by its name."""
    with _sharing:
        return _shared.setdefault(what, Outage(logging.getLogger(__name__), what))
