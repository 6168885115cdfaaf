"""Folders that hold users' data: closed to other users of the machine, and locked against other processes."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

from features.private_files import private_folder
from serving.errors import ConfigError, InUse

_LOCK_S = 10.0
"""Longest wait for a process that was just killed to let go of a folder."""


def close_to_others(directory: Path, deep: bool = False) -> None:
    """Makes a directory for users' data, or closes one that is there, as `features.private_files.private_folder` does.

    Raises:
        ConfigError: It cannot be made or closed.
        ForeignFileError: It belongs to another user.
    """
    try:
        private_folder(directory, deep)
    except OSError as error:
        raise ConfigError(f"cannot keep data in {directory} ({error}); choose another state directory") from None


def locked(directory: Path, wait_s: float | None = None) -> int:
    """Takes a directory for this process, for as long as the handle returned is open.

    Args:
        directory: Made if it is missing, and closed to all other users.
        wait_s: Longest wait for it, `_LOCK_S` if None.

    Raises:
        InUse: Another process holds it.
        ConfigError: It cannot be written.
        ForeignFileError: It belongs to another user.
    """
    close_to_others(directory, deep=True)
    try:
        handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot keep data in {directory} ({error}); choose another state directory") from None
    deadline = time.monotonic() + (_LOCK_S if wait_s is None else wait_s)
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise InUse(
                    f"{directory} is in use by another Penchant; stop that one, or choose another state directory"
                ) from None
        time.sleep(0.02)
