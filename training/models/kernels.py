"""Numba kernels of training; each has a plain twin, `<name>_plain`, and a test that they agree.

They work on bf16 through its bits, because numba has no such type: a bf16 is the upper half of a float32.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba as _numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba.extending import intrinsic

from features.jit import kernel

numba: Any = _numba

_HALF = np.int32(16)
_LOG2E = np.float32(np.log2(np.e))
# Minimax coefficients of 2^f - 1 over |f| <= 1/2; the error, 3e-7, is far below what bf16 can hold.
_C1, _C2, _C3, _C4, _C5 = (np.float32(c) for c in (0.69314718, 0.24022650, 0.05550411, 0.00961813, 0.00133336))


def _as_float(typing: Any, bits: Any) -> Any:
    """Returns the float32 with the same bits as an int32."""
    return numba.types.float32(numba.types.int32), lambda _c, b, _s, a: b.bitcast(a[0], ir.FloatType())


def _as_bits(typing: Any, number: Any) -> Any:
    """Returns the int32 with the same bits as a float32."""
    return numba.types.int32(numba.types.float32), lambda _c, b, _s, a: b.bitcast(a[0], ir.IntType(32))


_float: Any = intrinsic(_as_float)
_bits: Any = intrinsic(_as_bits)


# All of fast math but its promise that nothing is infinite: the losses take an item out by a score of minus infinity.
@kernel(fastmath={"reassoc", "nsz", "arcp", "contract", "afn"}, nogil=True)
def _exponentials(scores: Any, tops: Any, sums: Any) -> None:
    for line in range(scores.shape[0]):
        row = scores[line]
        # As whole numbers the bits of positive floats are in order, and those of negative ones are below them.
        highest = np.int16(0)
        for j in range(row.size):
            highest = max(highest, row[j])
        top = _float(np.int32(np.int32(highest) << _HALF))
        shift, total = top * _LOG2E, np.float32(0)
        for j in range(row.size):
            x = _float(np.int32(np.int32(row[j]) << _HALF)) * _LOG2E - shift
            # Below this the exponent of the result would be out of range, and in bf16 the result is as good as zero.
            x = max(x, np.float32(-120.0))
            whole = np.int32(x - np.float32(0.5))
            f = x - np.float32(whole)
            p = np.float32(1) + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * _C5))))
            e = _float(np.int32(_bits(p) + (whole << np.int32(23))))
            total += e
            # Half of the last place is added before the lower bits are cut off: rounding, not truncation.
            row[j] = np.int16(np.int32(_bits(e) + np.int32(0x8000)) >> _HALF)
        tops[line], sums[line] = top, total


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Returns threads that sleep while they wait: numba's own spin, and take the cores of the matrix products."""
    return ThreadPoolExecutor(threads, "exponentials")


def exponentials(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces each row's scores by `exp(score - top)`: half of torch's time on a CPU.

    Args:
        scores: bf16 `[n, N]` on the CPU, contiguous; overwritten.

    Returns:
        The largest score of each row, or 0 where that is negative, float32 `[n]`; and the sums of the exponentials
        before they are rounded, float32 `[n]`.
    """
    tops, sums = (np.empty(scores.shape[0], np.float32) for _ in range(2))
    bits: npt.NDArray[np.int16] = scores.view(torch.int16).numpy()
    threads = torch.get_num_threads()
    if threads == 1:
        _exponentials(bits, tops, sums)
    else:
        parts = zip(*(np.array_split(array, threads) for array in (bits, tops, sums)), strict=True)
        list(_pool(threads).map(lambda part: _exponentials(*part), parts))
    return torch.from_numpy(tops), torch.from_numpy(sums)


def exponentials_plain(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain twin of `exponentials`, for every type and device."""
    tops = scores.amax(1).clamp(min=0).float()
    result = torch.exp(scores.float() - tops.unsqueeze(1))
    scores.copy_(result)
    return tops, result.sum(1)


def exponentials_of(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls `exponentials` on bf16 of the CPU, and its plain twin on all else."""
    fast = scores.dtype is torch.bfloat16 and scores.device.type == "cpu"
    return exponentials(scores) if fast else exponentials_plain(scores)
