"""Fixtures that are costly and the same for all tests are made once, even if several processes share the tests."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

SHARED = "TESTS_SHARED"
"""Environment variable that names the directory which all processes of a test run share."""


def once(name: str, make: Callable[[Path], object]) -> Path:
    """Returns the directory `name`, filled by the first process that asks for it; the others wait.

    Nothing in it may be changed afterwards. A `make` that fails leaves nothing: the next one to ask begins again.
    """
    folder = _shared()
    made, done = folder / name, folder / f"{name}.done"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            make(made)
            done.touch()
    return made


def begin() -> None:
    """Makes the shared directory: by the process that starts the others, whose environment they have."""
    os.environ[SHARED] = tempfile.mkdtemp(prefix="shared-")


def end() -> None:
    """Removes it."""
    shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True)


def _shared() -> Path:
    if SHARED not in os.environ:  # outside of pytest: a proof, or a benchmark
        begin()
        atexit.register(end)
    return Path(os.environ[SHARED])
