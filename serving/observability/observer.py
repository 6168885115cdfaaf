"""Records the end of a request: a count, a duration and a line of the access log, in one call."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection
from typing import Any, Literal

from serving.observability.telemetry import Telemetry

AccessLog = Literal["off", "errors", "all"]

OTHER = "other"
"""Label of a request whose surface is not listed."""

ERRORS_S = 60.0
"""Shortest time between two lines about the same code of the same method, in seconds; with `errors`."""

_OUTAGE_CODES = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Codes whose lines all methods share."""

_log = logging.getLogger("penchant.access")


class RequestObserver:
    """Records every request at its end; any thread may call it."""

    def __init__(
        self,
        telemetry: Telemetry,
        access_log: AccessLog = "off",
        surfaces: Collection[str] = (),
        errors_s: float = ERRORS_S,
    ) -> None:
        """Sets the counters and the lines of the log.

        Args:
            telemetry: Counts requests by method, code, surface and rung, and times them by method.
            access_log: Lines for no request, for those that fail, or for all of them. Of failures the first line of
                each method and code is written at once; those of the next minute are counted in the line after it, so
                that a dependency that is down does not fill the log. `_OUTAGE_CODES` count as one failure.
            surfaces: Names of surfaces that may become labels. All others are "other": callers choose the names,
                and each label costs memory for ever.
            errors_s: Time between two lines about the same failure.
        """
        self._telemetry, self._access_log, self._errors_s = telemetry, access_log, errors_s
        self._surfaces = frozenset(surfaces) | {""}
        self._failures: dict[tuple[str, str], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def observe(
        self, method: str, code: str, seconds: float, surface: str = "", rung: str = "", request_id: str = ""
    ) -> None:
        """Records a request that ended.

        Args:
            method: Name of the method in the contract.
            code: Name of the gRPC status: "OK", "INVALID_ARGUMENT", ...
            seconds: Time from its message to its answer.
            surface: The surface of the request.
            rung: The rung of the slate; "" if there is none.
            request_id: Id of the request.
        """
        # Callers choose surfaces; unlisted ones must not make labels, or they could fill the memory.
        surface = surface if surface in self._surfaces else OTHER
        self._telemetry.count(("requests", method, code, surface, rung))
        # By method alone: a histogram per code, surface and rung would be thousands of series.
        self._telemetry.stage(("request_seconds", method), int(seconds * 1e6))
        if self._access_log == "all":
            self._write(method, code, seconds, surface=surface, rung=rung, request_id=request_id)
        elif code != "OK" and self._access_log == "errors":
            unlogged = self._failed(method, code)
            if unlogged is not None:
                self._write(method, code, seconds, unlogged, surface=surface, rung=rung, request_id=request_id)

    def _failed(self, method: str, code: str) -> int | None:
        """Returns the number of such failures since the last line about one; None if this failure gets no line."""
        now = time.monotonic()
        # A Redis that is down fails every method alike, and some of their retries run out of time.
        key = ("", "UNAVAILABLE") if code in _OUTAGE_CODES else (method, code)
        with self._lock:
            logged_at, unlogged = self._failures.get(key, (-self._errors_s, 0))
            if now - logged_at < self._errors_s:
                self._failures[key] = logged_at, unlogged + 1
                return None
            self._failures[key] = now, 0
            return unlogged

    def _write(self, method: str, code: str, seconds: float, unlogged: int = 0, **fields: Any) -> None:
        ms = round(seconds * 1000, 3)
        words = "".join(f" {name}={value}" for name, value in fields.items() if value)
        repeated = f" (and {unlogged} more since the last such line)" if unlogged else ""
        level = logging.INFO if code == "OK" else logging.WARNING
        extra = {"method": method, "code": code, "ms": ms, **{name: value for name, value in fields.items() if value}}
        _log.log(level, "%s %s %.3f ms%s%s", method, code, ms, words, repeated, extra=extra)
