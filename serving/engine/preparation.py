"""Reads the tables of a bundle once for all workers of a host, in a process of its own, into sealed memory.

The supervisor makes the memory and hands it on. The process that fills it parses what could end it, and needs far more
memory while it works than the tables take in the end, so it is neither the supervisor nor a worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from features.bundle import FILES, Bundle, open_bundle
from features.errors import BundleError, PenchantError
from features.shared_arrays import ArrayWriter, NotSealed, SharedArrays
from serving.engine.vetting import limit_s, status_name

SHARED_TABLES = "tables"
"""Name under which a worker is handed the memory."""

_POLL_S = 0.1


@contextlib.contextmanager
def prepared(bundle: Bundle, stop: threading.Event) -> Iterator[int | None]:
    """Yields a handle of sealed memory with the tables of a bundle, see `serving.bundle.tables.write_tables`.

    Args:
        bundle: The bundle.
        stop: Set when the service is to end: then there is no handle.

    Raises:
        BundleError: A file is malformed or changed, or ends the process that reads it; names the file.
    """
    handle = ArrayWriter().handle
    try:
        yield handle if _fill(bundle, handle, stop) else None
    finally:
        os.close(handle)


def _fill(bundle: Bundle, handle: int, stop: threading.Event) -> bool:
    """Fills the memory; False if a stop was asked for first."""
    command = [sys.executable, "-m", "serving.engine.preparation", str(bundle.path), bundle.bundle_id, str(handle)]
    end = time.monotonic() + limit_s(bundle.manifest.size)
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[handle]) as process:
        try:
            for text in _lines(process, end, stop):
                lines.append(text)
        finally:
            process.kill()  # without effect if it has ended
    if lines and lines[-1].startswith("refused "):
        raise BundleError(lines[-1].removeprefix("refused "))
    if lines and lines[-1] == "sealed":
        try:
            SharedArrays(handle)
        except NotSealed as error:
            raise BundleError(f"{bundle.path}: {error}; start the service again") from error
        return True
    if stop.is_set():
        return False
    hangs = time.monotonic() > end
    how = "takes too long" if hangs else f"ends the process ({status_name(process.returncode)})"
    name = lines[-1] if lines else "a file of it"
    raise BundleError(f"{bundle.path / name}: {how} that reads it; export the run again")


def _lines(process: subprocess.Popen[bytes], end: float, stop: threading.Event) -> Iterator[str]:
    """Yields what a process writes, line by line, until it closes its output, a stop is asked for, or time is up."""
    assert process.stdout is not None
    partial = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not stop.is_set() and time.monotonic() < end:
            if not selector.select(_POLL_S):
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                process.wait()
                return
            *whole, partial = (partial + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)


def main(arguments: list[str]) -> int:
    """Reads the tables of a bundle into memory that was inherited, and names on standard output what comes next."""
    logging.basicConfig(level=logging.ERROR)
    path, bundle_id, handle = Path(arguments[0]), arguments[1], int(arguments[2])
    try:
        _write(path, bundle_id, handle)
    except PenchantError as error:
        print("refused", " ".join(str(error).split()), flush=True)
        return 2
    print("sealed", flush=True)
    return 0


def _write(path: Path, bundle_id: str, handle: int) -> None:
    # Imported late: the supervisor, which only starts this process, has no use for them.
    from serving.bundle.reading import bounded
    from serving.bundle.tables import write_tables

    # The supervisor has verified the other files, and each of these is hashed as it is read.
    bundle = open_bundle(path, bundle_id, later=FILES)
    with bounded(bundle):
        writer = ArrayWriter.into(handle)
        write_tables(bundle, writer, lambda name: print(name, flush=True))
        writer.seal()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
