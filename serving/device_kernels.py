"""Triton kernels of the scan on a CUDA device; each has a plain twin in `serving.device_scan`, and a test of both.

Tensor cores multiply bf16 and add in float32. A float32 is the sum of two bf16 but for 2^-17 of it, so what is scanned
in float32 takes three products of halves, and what is scanned in bf16 or int8, which a bf16 holds exactly, takes two.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

GROUP = 32
"""Rows whose highest score is kept, those of a 32-bit word of a bitmap."""
GROUPS = 32
"""Groups of a block, whose highest score is kept too."""
BLOCK = GROUP * GROUPS
TILE = 128
"""Rows that are scored at once."""

_GROUP, _GROUPS = tl.constexpr(GROUP), tl.constexpr(GROUPS)


def _maxima(
    vectors: tl.tensor,
    scales: tl.tensor,
    high_queries: tl.tensor,
    low_queries: tl.tensor,
    bits: tl.tensor,
    group_maxima: tl.tensor,
    block_maxima: tl.tensor,
    rows: tl.tensor,
    queries: tl.tensor,
    blocks: tl.tensor,
    dim: tl.constexpr,
    width: tl.constexpr,
    lines: tl.constexpr,
    tile: tl.constexpr,
    form: tl.constexpr,
    masked: tl.constexpr,
) -> None:
    block = tl.program_id(0).to(tl.int64)
    line, column = tl.arange(0, lines), tl.arange(0, width)
    high_query = tl.load(high_queries + line[:, None] * width + column[None, :])
    low_query = tl.load(low_queries + line[:, None] * width + column[None, :])
    highest = tl.full([lines], float("-inf"), tl.float32)
    for part in range(_GROUP * _GROUPS // tile):
        row = block * (_GROUP * _GROUPS) + part * tile + tl.arange(0, tile)
        inside = row < rows
        there = inside[:, None] & (column < dim)[None, :]
        vector = tl.load(vectors + row[:, None] * dim + column[None, :], mask=there, other=0)
        high = tl.trans(vector.to(tl.bfloat16))
        scores = tl.dot(low_query, high)
        scores = tl.dot(high_query, high, scores)
        if form == "float32":
            low = tl.trans((vector - vector.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16))
            scores = tl.dot(high_query, low, scores)
        if form == "int8":
            scores = scores * tl.load(scales + row, mask=inside, other=0.0)[None, :]
        allowed = inside
        if masked:
            byte = tl.load(bits + row // 8, mask=inside, other=0).to(tl.int32)
            allowed = allowed & (((byte >> (row % 8).to(tl.int32)) & 1) != 0)
        scores = tl.where(allowed[None, :], scores, float("-inf"))
        maxima = tl.max(tl.reshape(scores, [lines, tile // _GROUP, _GROUP]), axis=2)
        group = block * _GROUPS + part * (tile // _GROUP) + tl.arange(0, tile // _GROUP)
        out = group_maxima + line[:, None].to(tl.int64) * (blocks * _GROUPS) + group[None, :]
        tl.store(out, maxima, mask=(line < queries)[:, None])
        highest = tl.maximum(highest, tl.max(maxima, axis=1))
    tl.store(block_maxima + line.to(tl.int64) * blocks + block, highest, mask=line < queries)


def _scores(
    vectors: tl.tensor,
    queries: tl.tensor,
    bits: tl.tensor,
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
    there = inside[:, None] & (column < dim)[None, :]
    vector = tl.load(vectors + row[:, None] * dim + column[None, :], mask=there, other=0.0)
    score = tl.sum(vector * query[None, :], axis=1)
    allowed = inside
    if masked:
        byte = tl.load(bits + row // 8, mask=inside, other=0).to(tl.int32)
        allowed = allowed & (((byte >> (row % 8).to(tl.int32)) & 1) != 0)
    score = tl.where(allowed, score, float("-inf"))
    tl.store(scores + (line.to(tl.int64) * count + place) * _GROUP + member, score)


maxima_kernel: Any = triton.jit(_maxima)
scores_kernel: Any = triton.jit(_scores)
