"""Figures of the process that asks: processor time, memory, threads, open files, garbage collections."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

_SELF = Path("/proc/self")
_PAGE = resource.getpagesize()


def process_stats() -> dict[str, Any]:
    """Returns the figures of this process as JSON values.

    Those that only Linux gives are left out elsewhere.

    Returns:
        `cpu_seconds` by `user` and `system`, `started` (seconds since 1970), `threads`, `gc_collections` by generation,
        `max_fds`, and on Linux `rss_bytes` and `open_fds`.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures: dict[str, Any] = {
        "cpu_seconds": {"user": used.ru_utime, "system": used.ru_stime},
        "started": _started(),
        "threads": threading.active_count(),
        "gc_collections": {str(generation): one["collections"] for generation, one in enumerate(gc.get_stats())},
        "max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    with contextlib.suppress(OSError):
        figures["rss_bytes"] = int((_SELF / "statm").read_text(encoding="ascii").split()[1]) * _PAGE
        # Threads of libraries count too, which Python knows nothing of.
        figures["threads"] = len(os.listdir(_SELF / "task"))
        figures["open_fds"] = len(os.listdir(_SELF / "fd")) - 1
    return figures


@functools.cache
def _started() -> float:
    """Returns when this process started, seconds since 1970; elsewhere than on Linux, when this was first called."""
    try:
        ticks = int((_SELF / "stat").read_text(encoding="latin-1").rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    except OSError:
        return time.time()
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
