"""How a request ended: counted, timed, and a line of the access log, in one call."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from typing import Any, Literal

from serving.observability.telemetry import Telemetry

AccessLog = Literal["off", "errors", "all"]

OTHER = "other"
"""Surface of a request that names none of the listed ones."""

ERRORS_S = 60.0
"""Shortest time between two lines about the same code of the same method, in seconds; with `errors`."""

_OUTAGE_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Codes whose lines all methods share."""

_log = logging.getLogger("penchant.access")


class RequestObserver:
    """Takes note of every request at its end; any thread may call it."""

    def __init__(
        self,
        telemetry: Telemetry,
        access_log: AccessLog = "off",
        surfaces: Collection[str] = (),
        errors_s: float = ERRORS_S,
    ) -> None:
        """Says where the numbers go, and which lines are written.

        Args:
            telemetry: Counts requests by method, code, surface and rung, and times them by method.
            access_log: Lines for no request, for those that fail, or for all of them. Of failures the first line of
                each method and code is written at once; those of the next minute are counted in the line after it, so
                that a dependency that is down does not fill the log. `_OUTAGE_CODES` count as one failure.
            surfaces: Names of surfaces that may become labels. All others are "other", for callers choose them.
            errors_s: Time between two lines about the same failure.
        """
        self._telemetry, self._access_log, self._errors_s = telemetry, access_log, errors_s
        self._surfaces = frozenset(surfaces) | {""}
        self._failures: dict[tuple[str, str], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def observe(
        self, method: str, code: str, seconds: float, surface: str = "", rung: str = "", request_id: str = ""
    ) -> None:
        """Takes note of a request that ended.

        Args:
            method: Its name in the contract.
            code: Name of its status: "OK", "INVALID_ARGUMENT", ...
            seconds: Time from its message to its answer.
            surface: The surface that it named.
            rung: The level of personalisation that served; "" where there is none.
            request_id: Its id.
        """
        surface = surface if surface in self._surfaces else OTHER
        self._telemetry.count(("request", method, code, surface, rung))
        self._telemetry.stage(("request", method), int(seconds * 1e6))
        if self._access_log == "all":
            self._write(method, code, seconds, surface=surface, rung=rung, request_id=request_id)
        elif code != "OK" and self._access_log == "errors":
            more = self._failed(method, code)
            if more is not None:
                self._write(method, code, seconds, more, surface=surface, rung=rung, request_id=request_id)

    def _failed(self, method: str, code: str) -> int | None:
        """Returns the number of such failures since the last line about one; None where this one gets no line."""
        now = time.monotonic()
        # A Redis that is down fails every method alike, and some of their retries for want of time.
        key = ("", "UNAVAILABLE") if code in _OUTAGE_CODES else (method, code)
        with self._lock:
            last, silent = self._failures.get(key, (-self._errors_s, 0))
            if now - last < self._errors_s:
                self._failures[key] = last, silent + 1
                return None
            self._failures[key] = now, 0
            return silent

    def _write(self, method: str, code: str, seconds: float, more: int = 0, **fields: Any) -> None:
        ms = round(seconds * 1000, 3)
        words = "".join(f" {name}={value}" for name, value in fields.items() if value)
        repeated = f" (and {more} more since the last such line)" if more else ""
        level = logging.INFO if code == "OK" else logging.WARNING
        extra = {"method": method, "code": code, "ms": ms, **{name: value for name, value in fields.items() if value}}
        _log.log(level, "%s %s %.3f ms%s%s", method, code, ms, words, repeated, extra=extra)
