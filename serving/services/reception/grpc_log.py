"""Limits the log of gRPC about its callers: a line a minute, and nothing that a caller sent."""

from __future__ import annotations

import logging
import time
from typing import Any

_PAUSE_S = 60.0
_LOGGER = "grpc._cython.cygrpc"
_PREFIX = "Invalid encoding"


class _HeaderErrors:
    """Replaces `Logger.exception`: logs one line a minute about headers that are not text, without their bytes.

    gRPC calls it for each such header, so it may cost no more than the header itself: no record, no traceback.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger, self._exception = logger, logger.exception
        self._next, self._count = 0.0, 0

    def __call__(self, msg: object, *args: object, **options: Any) -> None:
        """Passes a record on, unless it is about a header."""
        if not str(msg).startswith(_PREFIX):
            self._exception(msg, *args, **options)
            return
        self._count += 1
        if time.monotonic() >= self._next:
            count, self._count, self._next = self._count, 0, time.monotonic() + _PAUSE_S
            self._logger.warning("headers that are not UTF-8 were read as Latin-1: %d since the last such line", count)


def limit_grpc_log() -> None:
    """Keeps data of callers out of the log of gRPC; a second call has no effect."""
    logger = logging.getLogger(_LOGGER)
    if not isinstance(logger.exception, _HeaderErrors):
        logger.exception = _HeaderErrors(logger)  # type: ignore[method-assign]
