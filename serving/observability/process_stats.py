"""Statistics of this process: processor time, memory, threads, open files, garbage collections."""

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
    """Returns the statistics of this process as JSON values; without those of Linux on other systems.

    Returns:
        `cpu_seconds` by `user` and `system`, `started` (seconds since 1970), `threads`, `gc_collections` by generation,
        `max_fds`, and on Linux `rss_bytes` and `open_fds`.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    values: dict[str, Any] = {
        "cpu_seconds": {"user": usage.ru_utime, "system": usage.ru_stime},
        "started": _started(),
        "threads": threading.active_count(),
        "gc_collections": {str(generation): stats["collections"] for generation, stats in enumerate(gc.get_stats())},
        "max_fds": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    with contextlib.suppress(OSError):
        values["rss_bytes"] = int((_SELF / "statm").read_text(encoding="ascii").split()[1]) * _PAGE
        # The threads of libraries count too, of which Python does not know.
        values["threads"] = len(os.listdir(_SELF / "task"))
        values["open_fds"] = len(os.listdir(_SELF / "fd")) - 1
    return values


@functools.cache
def _started() -> float:
    """Returns the start time of this process, seconds since 1970; off Linux, that of the first call."""
    try:
        ticks = int((_SELF / "stat").read_text(encoding="latin-1").rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    except OSError:
        return time.time()
    # The kernel has the start in ticks since boot.
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
