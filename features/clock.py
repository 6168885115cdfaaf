"""The wall clock."""

from __future__ import annotations

import time


def now_ms() -> int:
    """Returns the time, ms since 1970, UTC."""
    return time.time_ns() // 1_000_000
