"""Limits the log of gRPC about its callers: a line a minute, and nothing that a caller sent."""

from __future__ import annotations

import logging
import time

_PAUSE_S = 60.0
_LOGGER = "grpc._cython.cygrpc"
_PREFIX = "Invalid encoding"


class _HeaderFilter(logging.Filter):
    """Passes one record a minute about headers that are not text, without their bytes and without a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self._next, self._count = 0.0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns True if the record, which this changes, is to be logged."""
        if not str(record.msg).startswith(_PREFIX):
            return True
        self._count += 1
        if time.monotonic() < self._next:
            return False
        record.msg = f"headers that are not UTF-8 were read as Latin-1: {self._count} since the last such line"
        record.args, record.exc_info, record.exc_text = (), None, None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        self._next, self._count = time.monotonic() + _PAUSE_S, 0
        return True


_FILTER = _HeaderFilter()


def limit_grpc_log() -> None:
    """Keeps data of callers out of the log of gRPC; a second call has no effect."""
    logging.getLogger(_LOGGER).addFilter(_FILTER)
