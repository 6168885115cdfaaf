"""Files and folders that no other user of the machine can open: mode 600 and 700, whatever the umask says.

A file is created with its mode, so there is no moment in which it is open to others. A file or folder that an older
version or another program left open is closed when it is next used. One that belongs to another user is refused: in a
folder for temporary files anyone can put a folder, a file or a link under the name that is about to be used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from pathlib import Path
from typing import IO, Any

from features.errors import ForeignFileError

FOLDER_MODE = 0o700
FILE_MODE = 0o600
_OTHERS = 0o077
_ROOT = 0
_log = logging.getLogger(__name__)


def set_private_umask() -> None:
    """Keeps files that libraries create in this process, and in those that it starts, from all other users."""
    os.umask(_OTHERS)


def make_folders(path: Path) -> None:
    """Makes a folder and those above it that are missing, each for this user alone; leaves others as they are.

    Raises:
        OSError: A folder cannot be made.
    """
    missing = []
    for folder in (path, *path.parents):
        if folder.is_dir():
            break
        missing.append(folder)
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # made by another process in the same moment
            folder.mkdir(FOLDER_MODE)
            if stat.S_IMODE(folder.stat().st_mode) & FOLDER_MODE != FOLDER_MODE:
                folder.chmod(FOLDER_MODE)  # a umask can take from its owner as well
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is no folder")


def private_folder(path: Path, deep: bool = False) -> None:
    """Makes a folder for this user alone, or closes one that is there to others and says so in the log.

    A mounted volume of root's, or a folder that all users share by its sticky bit, is taken as it is: it cannot or must
    not be closed, but files that are put into it are.

    Args:
        path: The folder.
        deep: Closes everything in it as well; for a folder that Penchant alone writes to.

    Raises:
        ForeignFileError: The folder, a link on the way to it, or something in it belongs to another user.
        OSError: It cannot be made or opened.
    """
    path = Path(os.path.abspath(path))
    # A link on the way that another user owns could lead elsewhere a moment after it was followed.
    for place in (path, *path.parents):
        _refuse_foreign(place, os.lstat(place) if os.path.lexists(place) else None, links_only=True)
    real = path.resolve()
    make_folders(real)
    handle = os.open(real, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        _refuse_foreign(path, status)
        if not status.st_mode & _OTHERS:
            return
        if not _is_own(status) or status.st_mode & stat.S_ISVTX:
            _log.warning(
                "%s is shared with other users: what Penchant puts into it is closed to them, its names are not; to "
                "hide those too, name a folder inside it",
                json.dumps(str(path)),
            )
            return
        os.fchmod(handle, FOLDER_MODE)
        closed = 1 + (_close_all(path, handle) if deep else 0)
        _log.warning("%s was open to other users; now it is not (%d files and folders)", json.dumps(str(path)), closed)
    finally:
        os.close(handle)


def open_private(path: Path, mode: str = "wb", buffering: int = -1) -> IO[Any]:
    """Opens a file for writing that this user alone can read; text is UTF-8. A link is not followed.

    Args:
        path: The file; made if it is missing.
        mode: As of `open`; anything but "r".
        buffering: As of `open`.

    Raises:
        ForeignFileError: The file belongs to another user.
        OSError: It cannot be opened, or is no plain file.
    """
    encoding = None if "b" in mode else "utf-8"
    return open(path, mode, buffering, encoding=encoding, opener=_open_private)


def _open_private(path: str, flags: int) -> int:
    # Truncated only once its owner is known; without O_NONBLOCK a pipe in its place would keep the caller waiting.
    cut = flags & os.O_TRUNC
    handle = os.open(path, (flags & ~os.O_TRUNC) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, FILE_MODE)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no plain file: remove it, or choose another name")
        if not _is_own(status):
            _refuse(Path(path), status)
        if stat.S_IMODE(status.st_mode) != FILE_MODE:
            os.fchmod(handle, FILE_MODE)
        if cut:
            os.ftruncate(handle, 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _close_all(path: Path, handle: int) -> int:
    """Takes the rights of others from everything below an open folder; returns the number that had any."""
    closed = 0
    for folder, names, files, inside in os.fwalk(".", dir_fd=handle):
        for name in (*names, *files):
            try:
                entry = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inside)
            except FileNotFoundError:  # another process of this service removed it
                continue
            try:
                status = os.fstat(entry)
                _refuse_foreign(path / folder / name, status)
                if _is_own(status) and not stat.S_ISLNK(status.st_mode) and status.st_mode & _OTHERS:
                    # The mode of an O_PATH handle cannot be set directly, and a name could be another file by now.
                    os.chmod(f"/proc/self/fd/{entry}", stat.S_IMODE(status.st_mode) & ~_OTHERS)
                    closed += 1
            finally:
                os.close(entry)
    return closed


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid()


def _refuse_foreign(path: Path, status: os.stat_result | None, links_only: bool = False) -> None:
    """Refuses a file that belongs to neither this user nor root."""
    if status is None or _is_own(status) or status.st_uid == _ROOT:
        return
    if not links_only or stat.S_ISLNK(status.st_mode):
        _refuse(path, status)


def _refuse(path: Path, status: os.stat_result) -> None:
    raise ForeignFileError(
        f"{json.dumps(str(path))} belongs to another user (uid {status.st_uid}, this one is {os.geteuid()}), who could "
        "read or change what is kept there: choose another place, or give it to this user with chown"
    )
