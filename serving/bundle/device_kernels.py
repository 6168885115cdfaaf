"""Triton kernels of the scan on a CUDA device; each has a plain twin in `serving.bundle.device_scan`, and a test.

Tensor cores multiply bf16 and add in float32. A float32 is the sum of two bf16 but for 2^-17 of it, so what is scanned
in float32 takes three products of halves, and what is scanned in bf16 takes two.
"""

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.runtime.errors import OutOfResources  # pyright: ignore[reportMissingImports]

from serving.errors import ConfigError

GROUP = 32
"""Rows whose highest score is kept, those of a 32-bit word of a bitmap."""
GROUPS = 32
"""Groups of a block, whose highest score is kept too."""
BLOCK = GROUP * GROUPS
TILES = ((128, 3), (64, 3), (GROUP, 3), (GROUP, 1))
"""Rows that are scored at once, and the number of such tiles on their way from memory: the most that fits is taken."""

_GROUP, _GROUPS = tl.constexpr(GROUP), tl.constexpr(GROUPS)


def _maxima(
    vectors: tl.tensor,
    high_queries: tl.tensor,
    low_queries: tl.tensor,
    words: tl.tensor,
    group_maxima: tl.tensor,
    block_maxima: tl.tensor,
    rows: tl.tensor,
    queries: tl.tensor,
    blocks: tl.tensor,
    dim: tl.constexpr,
    width: tl.constexpr,
    lines: tl.constexpr,
    tile: tl.constexpr,
    halves: tl.constexpr,
    masked: tl.constexpr,
) -> None:
    # As int64: the place of a row's first number passes 2^31 in a catalogue of some tens of millions.
    block = tl.program_id(0).to(tl.int64)
    line, column, member = tl.arange(0, lines), tl.arange(0, width), tl.arange(0, _GROUP)
    high_query = tl.load(high_queries + line[:, None] * width + column[None, :])
    low_query = tl.load(low_queries + line[:, None] * width + column[None, :])
    highest = tl.full([lines], float("-inf"), tl.float32)
    for part in range(_GROUP * _GROUPS // tile):
        row = block * (_GROUP * _GROUPS) + part * tile + tl.arange(0, tile)
        # Past the last row and the last number there is other memory, or none.
        inside = (row < rows)[:, None] & (column < dim)[None, :]
        vector = tl.load(vectors + row[:, None] * dim + column[None, :], mask=inside, other=0)
        high = tl.trans(vector.to(tl.bfloat16))
        # The small product first, so that it is not rounded away under the large one.
        scores = tl.dot(low_query, high)
        scores = tl.dot(high_query, high, scores)
        if halves == 2:
            low = tl.trans((vector - vector.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16))
            scores = tl.dot(high_query, low, scores)
        group = block * _GROUPS + part * (tile // _GROUP) + tl.arange(0, tile // _GROUP)
        allowed = group[:, None] * _GROUP + member[None, :] < rows
        if masked:
            word = tl.load(words + group, mask=group * _GROUP < rows, other=0)
            allowed = allowed & (((word[:, None] >> member[None, :]) & 1) != 0)
        scores = tl.reshape(scores, [lines, tile // _GROUP, _GROUP])
        maxima = tl.max(tl.where(allowed[None, :, :], scores, float("-inf")), axis=2)
        out = group_maxima + line[:, None].to(tl.int64) * (blocks * _GROUPS) + group[None, :]
        tl.store(out, maxima, mask=(line < queries)[:, None])
        highest = tl.maximum(highest, tl.max(maxima, axis=1))
    tl.store(block_maxima + line.to(tl.int64) * blocks + block, highest, mask=line < queries)


def _scores(
    vectors: tl.tensor,
    queries: tl.tensor,
    words: tl.tensor,
    groups: tl.tensor,
    scores: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    dim: tl.constexpr,
    width: tl.constexpr,
    masked: tl.constexpr,
) -> None:
    place, line = tl.program_id(0), tl.program_id(1)
    column, member = tl.arange(0, width), tl.arange(0, _GROUP)
    group = tl.load(groups + line * count + place)
    row = group * _GROUP + member
    inside = row < rows
    query = tl.load(queries + line * dim + column, mask=column < dim, other=0.0)
    loaded = inside[:, None] & (column < dim)[None, :]
    vector = tl.load(vectors + row[:, None] * dim + column[None, :], mask=loaded, other=0.0)
    score = tl.sum(vector * query[None, :], axis=1)
    allowed = inside
    if masked:
        allowed = allowed & (((tl.load(words + group) >> member) & 1) != 0)
    score = tl.where(allowed, score, float("-inf"))
    tl.store(scores + (line.to(tl.int64) * count + place) * _GROUP + member, score)


maxima_kernel: Any = triton.jit(_maxima)
scores_kernel: Any = triton.jit(_scores)


def launch_maxima(blocks: int, *tensors: Any, **options: Any) -> None:
    """Launches `maxima_kernel` for some blocks, with the largest tile that fits.

    Raises:
        ConfigError: Not even the smallest fits.
    """
    for tile, stages in TILES:
        try:
            maxima_kernel[(blocks,)](*tensors, **options, tile=tile, num_stages=stages)
        except OutOfResources as error:  # raised before anything is launched
            if (tile, stages) == TILES[-1]:
                raise ConfigError(
                    f"--device cuda: vectors of {options['dim']} numbers are too long for this GPU ({error}); choose "
                    "--device cpu"
                ) from error
        else:
            return
