"""Makes the best of the machine that trains: threads, products in bf16, memory that is not given back at once."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1
_TWO_GIGABYTES = 2**31 - 1


@contextmanager
def prepared(threads: int) -> Iterator[None]:
    """Sets torch up for training, and puts its settings back afterwards.

    Args:
        threads: Threads on the CPU; 0 means one per core.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    # Matrix products of float32 in bf16 (TF32 on a GPU), summed in float32: with AMX ten times as fast. Where a
    # processor has no such instructions, this changes nothing.
    torch.set_float32_matmul_precision("medium")
    _keep_freed_memory()
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


def _keep_freed_memory() -> None:
    """Lets glibc keep large freed blocks: mapping them anew each step faults in every page, half of a step's time."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # absent from musl
            libc.mallopt(_MMAP_MAX, 0)
            libc.mallopt(_TRIM_THRESHOLD, _TWO_GIGABYTES)
