"""Gives free memory back to the system."""

from __future__ import annotations

import contextlib
import ctypes


def return_free_memory() -> None:
    """Returns what the process has freed to the system, pages between pieces in use included; takes milliseconds.

    The C library keeps such pages for later, so a process with peaks would grow with each of them.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
