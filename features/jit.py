"""Compiles kernels with numba, and keeps the compiled code where this user alone can write.

Numba keeps compiled code next to the source or in the home directory, and refuses to compile if it can write to neither
of them, as in a container with a read-only file system. It also runs the code that it keeps, so no other user may write
there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba as _numba
from numba.core.caching import FunctionCache

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

numba: Any = _numba
_FunctionCache: Any = FunctionCache
_log = logging.getLogger(__name__)
_DAMAGE = (OSError, EOFError, pickle.UnpicklingError)
_CACHE = "NUMBA_CACHE_DIR"


_warm = threading.Event()


def expect_compiled() -> None:
    """Notes that calls are answered from now on: a kernel that is compiled later holds one up, and is logged."""
    _warm.set()


class _Cache(_FunctionCache):  # type: ignore[misc]
    """A cache that costs a compilation where it is damaged, or its disk is full, and never a call."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Returns compiled code, None where there is none."""
        if _warm.is_set():
            _log.warning("%s is compiled for %s while calls wait: the warm-up lacks it", self._name, sig)
        try:
            return super().load_overload(sig, target_context)
        except _DAMAGE as error:
            _log.warning("compiling %s again: what %s keeps is damaged (%r)", self._name, self.cache_path, error)
            with contextlib.suppress(OSError):  # the same as when nothing can be kept, of which `save_overload` tells
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keeps compiled code."""
        try:
            super().save_overload(sig, data)
        except _DAMAGE as error:
            _log.warning("%s is not kept in %s (%r) and is compiled each time", self._name, self.cache_path, error)


def kernel(**options: Any) -> Callable[[Kernel], Kernel]:
    """Returns a decorator that compiles a function when it is first called.

    Args:
        options: Those of `numba.njit`, without `cache`.
    """

    def compiled(function: Kernel) -> Kernel:
        dispatcher: Any = numba.njit(**options)(function)
        dispatcher._cache = _cache(function) or dispatcher._cache
        return dispatcher  # type: ignore[no-any-return]

    return compiled


def private_directory(parent: Path) -> Path | None:
    """Returns a directory in `parent` that no other user can write to, made where it is missing; None if there is none.

    The name is the same for every process of a user, so that each finds the code that another has compiled.
    """
    user = os.geteuid()
    path = parent / f"penchant-kernels-{user}"
    try:
        above = parent.stat()
        # A user who may rename our directory may put another in its place: only the sticky bit prevents that.
        if above.st_uid not in (0, user) or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
            return None
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError:
        return None
    is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o077
    return path if is_private else None


def _cache(function: Callable[..., Any]) -> _Cache | None:
    """Returns a cache where numba would keep it, else in a private directory; None where nothing can be written.

    The private directory is handed on to child processes by the environment.
    """
    try:
        return _Cache(function)
    except RuntimeError:  # numba found no directory to write to
        pass
    try:
        private = private_directory(Path(tempfile.gettempdir()))
    except OSError:  # no directory for temporary files either
        private = None
    if private is None:
        return None
    numba.config.CACHE_DIR = os.environ[_CACHE] = str(private)
    try:
        return _Cache(function)
    except RuntimeError:
        return None
