"""Plain files: read a piece at a time whatever lies in their place, hashed, and flushed to the disk."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from features.errors import BundleError

_PIECE = 1 << 20
_MOST_HOLES = 64 << 20
_MOST_EXTENTS = 10_000


def pieces(path: Path, size: int | None = None, most: int = 0) -> Iterator[bytes]:
    """Yields the content of a plain file of a bundle.

    Args:
        path: The file.
        size: Its bytes; None for the manifest, whose size is stated nowhere.
        most: Most bytes that it may have if `size` is None.

    Raises:
        BundleError: It is missing, is no plain file, has another size, or changes meanwhile.
    """
    handle, size = _opened(path, size, most)
    with os.fdopen(handle, "rb", buffering=0) as file:
        if _holes(handle, size) > _MOST_HOLES:
            raise BundleError(f"{path}: holds nothing over more than {_MOST_HOLES} bytes; copy the whole bundle again")
        left = size
        try:
            # A byte more than is left, so that a file that grows is noticed.
            while piece := file.read(min(_PIECE, left + 1)):
                left -= len(piece)
                if left < 0:
                    break
                yield piece
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror}); copy the whole bundle again") from error
    if left:
        raise BundleError(f"{path}: grew or shrank while it was read; copy the whole bundle again")


def check_size(path: Path, size: int) -> None:
    """Checks that a plain file of `size` bytes lies at a path, without reading it.

    Raises:
        BundleError: See `pieces`.
    """
    os.close(_opened(path, size, 0)[0])


def sha256(path: Path, size: int) -> str:
    """Returns the hash of a plain file of `size` bytes, hexadecimal.

    Raises:
        BundleError: See `pieces`.
    """
    digest = hashlib.sha256()
    for piece in pieces(path, size):
        digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file, or the names in a directory, to the disk, so that it survives a loss of power from now on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _opened(path: Path, size: int | None, most: int) -> tuple[int, int]:
    """Returns the handle of a plain file, and its size; see `pieces`."""
    # Neither a pipe nor a device in its place keeps the caller waiting, and a link is not followed.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BundleError(f"{path}: missing; copy the whole bundle again") from None
    except OSError as error:
        kind = "a link" if path.is_symlink() else error.strerror
        raise BundleError(f"{path}: {kind}; a bundle holds plain files only, copy it with their content") from None
    try:
        return handle, _checked_size(path, os.fstat(handle), size, most)
    except BundleError:
        os.close(handle)
        raise


def _checked_size(path: Path, status: os.stat_result, size: int | None, most: int) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path}: is no plain file; a bundle holds plain files only, copy it with their content")
    if status.st_nlink != 1:
        # By its other name, the file could be written to after it was verified.
        raise BundleError(f"{path}: has another name as well, a hard link; a bundle holds plain files only, copy it")
    if size is None:
        if status.st_size > most:
            raise BundleError(f"{path}: has {status.st_size} bytes, a manifest has at most {most}")
        return status.st_size
    if status.st_size != size:
        raise BundleError(f"{path}: has {status.st_size} bytes instead of {size}; copy the whole bundle again")
    return size


def _holes(handle: int, size: int) -> int:
    """Returns the bytes of a file that are on no disk: terabytes of them cost nothing to make and hours to hash."""
    if size <= _MOST_HOLES:
        return 0
    data = place = 0
    for _ in range(_MOST_EXTENTS):
        try:
            start = os.lseek(handle, place, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # the file system does not tell
                data = size
            break
        place = os.lseek(handle, start, os.SEEK_HOLE)
        data += place - start
    else:
        # So many extents belong to a file that is written in pieces, not to one that is nearly empty.
        data = size
    os.lseek(handle, 0, os.SEEK_SET)
    return size - data
