"""Makes the best of the machine that trains: threads, and products in bf16."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from features.limits import cores


@contextmanager
def prepared(threads: int) -> Iterator[None]:
    """Sets torch up for training, and puts its settings back afterwards.

    Args:
        threads: Threads on the CPU; 0 means one per core that this process may use.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads or cores())
    # Matrix products of float32 in bf16 (TF32 on a GPU), summed in float32: with AMX ten times as fast. Where a
    # processor has no such instructions, this changes nothing.
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


@contextmanager
def exact() -> Iterator[None]:
    """Products of float32 in float32, for what is kept or measured."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def circumstances() -> dict[str, str]:
    """What a run was made with: versions of Penchant, Python and the numeric libraries, the system, the cores."""
    packages = ("penchant", "torch", "numpy", "numba", "pyarrow")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout
    return found | {"system": platform.platform(terse=True), "cores": str(cores())}
