"""Reads a bundle so that no file of it can take the memory of the machine, and so that the reader tells where it is."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from features.bundle import Bundle
from features.errors import BundleError

_ROOM = 4 << 30
"""Bytes of memory that opening any bundle may take."""

_ROOM_PER_BYTE = 32
"""Bytes more for each byte of the bundle, because an item becomes Python objects."""

Announce = Callable[[str], object]
"""Takes the name of the file that is about to be read or asked."""


def silent(_: str) -> None:
    """Announces nothing."""


@contextmanager
def bounded(bundle: Bundle) -> Iterator[None]:
    """Bounds the memory that the block may take: a few bytes of a model can ask for more than the machine has.

    Raises:
        BundleError: It takes more.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    # Relative to the addresses that the process uses now, as libraries reserve many of their own.
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    limit = used + _ROOM + _ROOM_PER_BYTE * bundle.manifest.size
    # A limit that the operator has set holds on.
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    except MemoryError as error:
        wanted = f"takes more than {limit - used} bytes of memory to open"
        raise BundleError(f"{bundle.path}: {wanted}; export the run again") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
