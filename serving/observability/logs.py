"""The log of every process of a service: lines of text for human readers, or of JSON for log collectors.

A line of JSON is one object: `time` (RFC 3339, UTC), `level`, `logger`, `role`, `worker` (its number), `pid`,
`message`, and `exception` if there is one; lines about a request have `request_id`, those of the access log also
`method`, `code`, `ms`, `surface` and `rung`. No line holds the id of a user, a token or a query.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterable
from contextvars import ContextVar
from itertools import count
from types import TracebackType
from typing import Any, Literal

LogFormat = Literal["text", "json"]

TEXT_FORMAT = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"

REQUEST_FIELDS = ("request_id", "method", "code", "ms", "surface", "rung")
"""Attributes of a log record that become fields of its line."""

REQUEST_ID_HEADER = "x-request-id"

_GIVEN_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_request_id: ContextVar[str] = ContextVar("request_id", default="")
# Random once per process and counted from there: a random id per request would cost more than all of its log.
_PREFIX = uuid.uuid4().hex[:12]
_numbers = count(1)


def configure(log_format: LogFormat, role: str, worker: int | None = None) -> None:
    """Sets up the log of this process, on standard error, unless it was set up before.

    With JSON, warnings and uncaught exceptions are lines of it as well.

    Args:
        log_format: The format.
        role: The role of this process: supervisor, worker, projector or warehouse.
        worker: The number of a worker.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(role, worker) if log_format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # FAISS logs each processor feature that it tries.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    if log_format == "json":
        logging.captureWarnings(True)
        sys.excepthook = _uncaught
        threading.excepthook = _uncaught_in_thread


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def __init__(self, role: str, worker: int | None = None) -> None:
        super().__init__()
        self._fixed: dict[str, Any] = {"role": role} if worker is None else {"role": role, "worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, without its end."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.created % 1 * 1000):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            **self._fixed,
            "pid": record.process,
            "message": _message(record),
        }
        if request_id := _request_id.get():
            line["request_id"] = request_id
        for name in REQUEST_FIELDS:
            if (value := getattr(record, name, None)) is not None:
                line[name] = value
        if record.exc_info and record.exc_info[0]:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        if record.stack_info:
            line["stack"] = record.stack_info
        # Escaped, so that no character of a message can end the line or control a terminal.
        return json.dumps(line, default=str)


def request_id_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Returns the id that a caller gave its request in `x-request-id`, else a new one.

    An id of more than 128 characters, or of others than letters, digits and `._:/+=-`, is replaced by a new one.
    """
    for name, value in metadata:
        if name == REQUEST_ID_HEADER and isinstance(value, str) and _GIVEN_ID.fullmatch(value):
            return value
    return f"{_PREFIX}-{next(_numbers):x}"


def begin_request(request_id: str) -> None:
    """Adds the id to every line that this thread or task logs from now on; "" to none."""
    _request_id.set(request_id)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):  # arguments that do not fit the text: both as they are help more than none
        return f"{record.msg} {record.args}"


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logging.getLogger(__name__).critical("uncaught exception", exc_info=(kind, error, trace))


def _uncaught_in_thread(caught: threading.ExceptHookArgs) -> None:
    if caught.exc_value is not None and not issubclass(caught.exc_type, SystemExit):
        name = caught.thread.name if caught.thread else "?"
        exc_info = (caught.exc_type, caught.exc_value, caught.exc_traceback)
        logging.getLogger(__name__).critical("uncaught exception in thread %s", name, exc_info=exc_info)
