"""Arrays in sealed memory: written once, checked once, then shared by any number of processes and changed by none.

The memory has no name in any file system (`memfd_create`). Its seals forbid every later write, so what one process has
verified stays what the others read, without hashing it again. Each process maps it privately: an array that takes live
changes is copied page by page where it is written to, and every page that is not stays shared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_PAGE = mmap.PAGESIZE
_END = struct.Struct("<QQ")
"""The last bytes of the memory: the place of the directory of its arrays, and its length."""
_MOST_WRITTEN = 1 << 30  # the kernel writes less than 2 GiB at once


class NotSealed(ValueError):
    """Memory that is not sealed, or holds no arrays."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """The place of an array.

    Attributes:
        dtype: Its type, as numpy writes it.
        shape: Its shape, with the room behind its last row.
        offset: Byte at which it begins, a multiple of the page size.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class ArrayWriter:
    """Writes arrays into new memory; `seal` ends it."""

    def __init__(self) -> None:
        self.handle = os.memfd_create("penchant-arrays", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._entries: dict[str, _Place] = {}
        self._facts: dict[str, Any] = {}
        self._end = 0

    @classmethod
    def into(cls, handle: int) -> ArrayWriter:
        """Returns a writer into empty memory that another process made, and that this one inherited."""
        writer = cls.__new__(cls)
        writer.handle, writer._entries, writer._facts, writer._end = handle, {}, {}, 0
        return writer

    def note(self, **facts: Any) -> None:
        """Keeps facts that JSON can write, to be read with `SharedArrays.facts`."""
        self._facts |= facts

    def add(self, name: str, array: npt.NDArray[Any], room: int = 0) -> npt.NDArray[Any]:
        """Writes an array.

        Args:
            name: Its name.
            array: The array.
            room: Rows of zeros behind it, which cost memory only where they are used.

        Returns:
            The same array as it lies in the shared memory; read only.
        """
        array = np.ascontiguousarray(array)
        flat: Any = array.reshape(-1).view(np.uint8)
        content = memoryview(flat) if array.size else memoryview(b"")
        return self.stream(name, array.dtype, array.shape, [content], room)

    def stream(
        self,
        name: str,
        dtype: npt.DTypeLike,
        shape: tuple[int, ...],
        pieces: Iterable[bytes | memoryview],
        room: int = 0,
    ) -> npt.NDArray[Any]:
        """Writes an array piece by piece, so that a large one is in memory once; see `add`.

        Raises:
            ValueError: The pieces are not those of an array of this type and shape.
        """
        kept = (shape[0] + room, *shape[1:]) if shape else shape
        entry = _Place(np.dtype(dtype).str, kept, self._end)
        place = entry.offset
        for piece in pieces:
            place += _write(self.handle, memoryview(piece), place)
        written = place - entry.offset
        if written != _Place(entry.dtype, shape, 0).size:
            raise ValueError(f"{name}: {written} bytes are not those of {entry.dtype} {list(shape)}")
        self._end = _aligned(entry.offset + entry.size)
        os.ftruncate(self.handle, self._end)
        self._entries[name] = entry
        array = _mapped(self.handle, entry, writable=False)
        return array[: shape[0]] if shape else array

    def seal(self) -> None:
        """Writes the directory and forbids every further write.

        Raises:
            OSError: Another process holds the memory open for shared writing.
        """
        entries = {name: dataclasses.astuple(entry) for name, entry in self._entries.items()}
        directory = json.dumps({"arrays": entries, "facts": self._facts}).encode()
        _write(self.handle, memoryview(directory + _END.pack(self._end, len(directory))), self._end)
        fcntl.fcntl(self.handle, fcntl.F_ADD_SEALS, _SEALS)


class SharedArrays:
    """The arrays of sealed memory, mapped into this process.

    Attributes:
        facts: The facts that were noted with them.
    """

    def __init__(self, handle: int) -> None:
        """Reads the directory of the memory behind a handle, which stays the caller's.

        Raises:
            NotSealed: Another process could still change it, or it was not written by `ArrayWriter`.
        """
        try:
            sealed = fcntl.fcntl(handle, fcntl.F_GET_SEALS) & _SEALS == _SEALS
        except OSError:  # a file or a pipe has no seals
            sealed = False
        if not sealed:
            raise NotSealed("the shared memory is not sealed")
        self._handle = handle
        size = os.fstat(handle).st_size
        try:
            place, length = _END.unpack(os.pread(handle, _END.size, size - _END.size))
            directory = json.loads(os.pread(handle, length, place))
            self._entries = {
                name: _Place(dtype, tuple(shape), offset)
                for name, (dtype, shape, offset) in directory["arrays"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise NotSealed("the shared memory holds no arrays") from error
        self.facts: dict[str, Any] = directory["facts"]

    def read(self, name: str) -> npt.NDArray[Any]:
        """Returns an array that cannot be written to."""
        return _mapped(self._handle, self._entries[name], writable=False)

    def writable(self, name: str) -> npt.NDArray[Any]:
        """Returns an array with its room; what this process writes to it no other process sees."""
        return _mapped(self._handle, self._entries[name], writable=True)


def _mapped(handle: int, entry: _Place, *, writable: bool) -> npt.NDArray[Any]:
    if not entry.size:
        return np.zeros(entry.shape, entry.dtype)
    # Private: kernels before 6.7 refuse a shared mapping of sealed memory, and no write may reach another process.
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    memory = mmap.mmap(handle, entry.size, flags=mmap.MAP_PRIVATE, prot=prot, offset=entry.offset)
    return np.frombuffer(memory, entry.dtype).reshape(entry.shape)


def _write(handle: int, content: memoryview, place: int) -> int:
    """Writes all of `content` at `place`, and returns its length."""
    size = content.nbytes
    while content.nbytes:
        written = os.pwrite(handle, content[:_MOST_WRITTEN], place)
        content, place = content[written:], place + written
    return size


def _aligned(place: int) -> int:
    return -(-place // _PAGE) * _PAGE


@contextlib.contextmanager
def shared(fill: Callable[[ArrayWriter], object]) -> Iterator[SharedArrays]:
    """Yields the arrays that `fill` writes, in sealed memory of this process alone; those read stay when it ends."""
    writer = ArrayWriter()
    try:
        fill(writer)
        writer.seal()
        yield SharedArrays(writer.handle)
    finally:
        os.close(writer.handle)
