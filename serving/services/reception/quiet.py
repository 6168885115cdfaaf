"""What gRPC logs of its callers: once a minute, and nothing that a caller sent."""

from __future__ import annotations

import logging
import time

_PAUSE_S = 60.0
_LOGGER = "grpc._cython.cygrpc"
_SIGN = "Invalid encoding"


class _NoText(logging.Filter):
    """Lets one record a minute pass about headers that are no text, without their bytes and without a trace."""

    def __init__(self) -> None:
        super().__init__()
        self._next, self._count = 0.0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns True if the record may be logged, as it is left."""
        if not str(record.msg).startswith(_SIGN):
            return True
        self._count += 1
        if time.monotonic() < self._next:
            return False
        record.msg = f"headers that are not UTF-8 were read as Latin-1: {self._count} since the last such line"
        record.args, record.exc_info, record.exc_text = (), None, None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        self._next, self._count = time.monotonic() + _PAUSE_S, 0
        return True


_FILTER = _NoText()


def hush() -> None:
    """Keeps what callers send out of the log of gRPC; more than once is as once."""
    logging.getLogger(_LOGGER).addFilter(_FILTER)
