"""What a process of the service tells its supervisor about itself: its counters and figures, whenever it is asked.

They talk over a socket pair that the child inherits. Every byte that comes is a question, and its answer is one line
of JSON. A process that is gone has closed its end, so that no answer can be taken for that of another one.
"""

from __future__ import annotations

import json
import socket
import threading

from serving.observability.process_stats import process_stats
from serving.observability.telemetry import Telemetry

QUESTION = b"?"


def report(fd: int, telemetry: Telemetry) -> None:
    """Answers the supervisor from a thread of its own, until the supervisor is gone.

    Args:
        fd: File descriptor of the child's end of the pair.
        telemetry: What to report.
    """
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    threading.Thread(target=_answer, args=(connection, telemetry), name="report", daemon=True).start()


def _answer(connection: socket.socket, telemetry: Telemetry) -> None:
    with connection:
        try:
            while connection.recv(1):
                answer = {"telemetry": telemetry.snapshot(), "figures": process_stats()}
                connection.sendall(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
        except OSError:
            return  # the supervisor is gone, and this process is about to stop
