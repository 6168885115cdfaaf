"""Reports counters and statistics of a process to its supervisor, on request.

The two share a socket pair, of which the process inherits one end. Every byte that comes is a request, and a report is
one line of JSON. The end of a process closes its socket, so no report can be mistaken for that of its successor.
"""

from __future__ import annotations

import json
import socket
import threading

from serving.observability.process_stats import process_stats
from serving.observability.telemetry import Telemetry

REPORT_REQUEST = b"?"


def report(fd: int, telemetry: Telemetry) -> None:
    """Answers the supervisor in a thread of its own, until the supervisor is gone.

    Args:
        fd: File descriptor of the process's end of the pair.
        telemetry: The counts of the process.
    """
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    threading.Thread(target=_answer, args=(connection, telemetry), name="report", daemon=True).start()


def _answer(connection: socket.socket, telemetry: Telemetry) -> None:
    with connection:
        try:
            while connection.recv(1):
                reply = {"telemetry": telemetry.snapshot(), "stats": process_stats()}
                connection.sendall(json.dumps(reply, separators=(",", ":")).encode() + b"\n")
        except OSError:
            return  # the supervisor is gone, and this process is about to stop
