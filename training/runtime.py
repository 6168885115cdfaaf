"""Sets torch up for the machine that trains: threads, and products in bf16."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic as _deterministic

from features.limits import cores

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"

# Typed Any because the module makes its settings when it is imported.
_settings: Any = _deterministic


class StageClock:
    """Measures the stages of a training, one after another.

    Attributes:
        seconds: Seconds by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    def end(self, stage: str) -> None:
        """Gives a stage the seconds since the last one ended."""
        now = time.monotonic()
        self.seconds[stage] = round(now - self._began, 3)
        self._began = now


@contextmanager
def prepared(threads: int, device: torch.device | None = None) -> Iterator[None]:
    """Sets torch up for training, and restores its settings afterwards.

    Args:
        threads: Threads on the CPU; 0 means one per core that this process may use.
        device: The device of the models; None is the CPU. On a GPU sums are then taken in a fixed order, so that a
            training gives the same weights again.
    """
    # The settings are global to torch, and a caller's own may differ: all are restored.
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic, filled = torch.are_deterministic_algorithms_enabled(), _settings.fill_uninitialized_memory
    if device is not None and device.type == "cuda":
        # cuBLAS reads it when its first handle is made, and torch insists on it.
        os.environ.setdefault(CUBLAS_WORKSPACE, ":4096:8")
        torch.use_deterministic_algorithms(True)
        _settings.fill_uninitialized_memory = False
    torch.set_num_threads(threads or cores())
    # Matrix products of float32 in bf16 (TF32 on a GPU), summed in float32: with AMX ten times as fast. On a processor
    # without such instructions, this has no effect.
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.use_deterministic_algorithms(deterministic)
        _settings.fill_uninitialized_memory = filled


def in_halves(device: torch.device) -> bool:
    """Returns True if products are taken in bf16: `prepared` allows it, and the hardware has instructions for it."""
    if torch.get_float32_matmul_precision() != "medium":
        return False
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextmanager
def exact() -> Iterator[None]:
    """Computes products of float32 in float32, for results that are kept or measured."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def circumstances() -> dict[str, str]:
    """Returns the versions of Penchant, Python and the numeric libraries, the system, and the number of cores."""
    packages = ("penchant", "torch", "numpy", "numba", "pyarrow")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout
    return versions | {"system": platform.platform(terse=True), "cores": str(cores())}
