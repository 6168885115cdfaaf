"""Finds out which file of a bundle ends or stops the process that reads it, by reading it in another process.

Python refuses a malformed file with an error. ONNX Runtime and FAISS are not always so kind: a model can divide a whole
number by zero, which ends the process. A worker that dies before it is ready may have met such a file.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from features.bundle import open_bundle
from features.errors import BundleError, PenchantError

LIMIT_S = 120.0
"""Longest that reading a bundle may take, and as many seconds more as it has pieces of 20 MB."""

_BYTES_PER_S = 20e6


def limit_s(size: int) -> float:
    """Returns the longest that reading a bundle of `size` bytes may take."""
    return LIMIT_S + size / _BYTES_PER_S


def vet(path: Path, bundle_id: str = "") -> None:
    """Opens a bundle in a process of its own.

    Args:
        path: The bundle.
        bundle_id: The bundle that has to be there; empty where any will do.

    Raises:
        BundleError: The bundle is refused, or the process that reads it ends or does not; names the file.
    """
    command = [sys.executable, "-m", "serving.engine.vetting", str(path), bundle_id]
    longest = limit_s(sum(entry.stat().st_size for entry in path.iterdir()))
    try:
        run = subprocess.run(command, capture_output=True, timeout=longest, check=False, env=dict(os.environ))
        output, status = run.stdout, run.returncode
    except subprocess.TimeoutExpired as error:
        output, status = error.stdout or b"", None
    # The child names each file before it reads it, so the last line is where it ended.
    lines = output.decode(errors="replace").splitlines()
    if lines and lines[-1].startswith("refused "):
        raise BundleError(lines[-1].removeprefix("refused "))
    if status != 0:
        how = f"takes more than {longest:.0f} s" if status is None else f"ends the process ({status_name(status)})"
        name = lines[-1] if lines else "a file of it"
        raise BundleError(f"{path / name}: {how} that reads it; export the run again")


def status_name(status: int) -> str:
    """Returns the signal that ended a process, or its exit status."""
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def main(arguments: list[str]) -> int:
    """Reads a bundle part by part, and names on standard output the part that comes next."""
    logging.basicConfig(level=logging.ERROR)
    path, bundle_id = Path(arguments[0]), arguments[1]
    try:
        _read(path, bundle_id, lambda name: print(name, flush=True))
    except PenchantError as error:
        print("refused", " ".join(str(error).split()), flush=True)
        return 2
    return 0


def _read(path: Path, bundle_id: str, tell: Callable[[str], Any]) -> None:
    # Imported late: the process that only asks for a verdict has no use for models.
    from serving.bundle.golden import replay
    from serving.bundle.model import Model
    from serving.bundle.tables import read_tables
    from serving.bundle.vector_index import Index
    from serving.engine.engine import bounded_memory

    tell("manifest.json")
    bundle = open_bundle(path, bundle_id)
    with bounded_memory(bundle, "cpu"):
        tables = read_tables(bundle, announce=tell)
        catalog = tables.catalog
        tell("index.faiss")
        index = Index(tables.index, catalog, checked=True)
        model = Model(bundle, "cpu", tell)
        model.probe(bundle.model.shapes, len(bundle.model.event_types), tell)
        tell("golden.json")
        replay(bundle, model, catalog, index, tables.neighbors.weights)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
