"""Standard streams that cost no work: they take any character, and outlive their readers.

A training of hours must not end because a title has a letter that the terminal lacks, because `| head` has read enough,
or because the terminal is gone.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
from typing import TextIO


class _Lasting(io.FileIO):
    """An open descriptor whose reader may end: everything written from then on is dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        # A pipe says EPIPE; a terminal says EIO, which means a broken disk where the stream goes into a file.
        terminal = stat.S_ISCHR(os.fstat(descriptor).st_mode)
        self._gone = {errno.EPIPE, errno.EIO} if terminal else {errno.EPIPE}

    def write(self, data: object, /) -> int:
        """Writes bytes."""
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno not in self._gone:
                raise
            # In the place of the dead reader, so that later writes do not fail again.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(memoryview(data))  # type: ignore[arg-type]


def secure_streams() -> None:
    """Makes stdout and stderr escape characters that they lack and outlive their readers; opens closed ones.

    Streams that another library has put in the place of the interpreter's own stay as they are.
    """
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        # A file opened later would take this number, and what is printed would go into that file.
        os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        sys.stdout = _stream(sys.stdout, 1)
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = _stream(sys.stderr, 2)


def _stream(before: TextIO | None, descriptor: int) -> io.TextIOWrapper:
    if before is None:  # closed when the process began, and the number may be another file's by now
        return io.TextIOWrapper(io.BufferedWriter(io.FileIO(os.devnull, "w")), "utf-8", errors="backslashreplace")
    before.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(descriptor)),
        before.encoding,
        errors="backslashreplace",
        line_buffering=bool(before.line_buffering),
        write_through=getattr(before, "write_through", False),
    )
