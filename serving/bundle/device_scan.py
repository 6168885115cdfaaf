"""The scan of all vectors on a device: exact, for many queries at once, at the speed of the device's memory.

One pass over the vectors keeps the highest score of each group of rows and of each block of groups, 1/32 of all
scores. An item among the best `k` lies in a group among the best `k`, and that in such a block: so a few groups are
scored again, in float32, and their best rows are the answer. The scan may read a compact form of the vectors. The
error of its scores is bounded, so each answer is checked: if no group that was left out can hold a better row, the
answer is proven, and else the query is scanned again in float32.

This module and `device_kernels` alone of serving need torch, and only a device other than the CPU needs them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.bundle.bitmap import Bitmap
from serving.errors import ConfigError

Form = Literal["float32", "bfloat16"]

GROUP = GROUPS = 32
BLOCK = GROUP * GROUPS
LINES = 64
"""Queries of one pass."""
_LINES = (1, 8, 16, 32, LINES)
_DEPTHS = 32
# A graph keeps the memory of its intermediate results, so only the last few shapes have one.
_GRAPHS = 8
SPARE = 0.5
"""Share of groups beyond `k` that are scored again: as many as a compact form may put in a wrong order."""
WIDER = 8
"""Times as many groups are scored again if rows with nearly the same score left no proof."""
ROUNDING = 16
"""Rows and groups beyond `k` in any case: equal scores differ by rounding."""
COMPACT_FROM = 2_000_000
"""Rows from which reading less outweighs the larger number of groups that are scored again."""
_CHUNK = 1 << 20

_F32 = npt.NDArray[np.float32]
_I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Copy:
    """The vectors as they are scanned.

    Attributes:
        vectors: `[N, D]` of the form's type.
        residual: Largest length of the difference between a vector and its form.
    """

    form: Form
    vectors: Tensor
    residual: float


@dataclass(frozen=True)
class ScanResult:
    """The answer to some queries, on the device.

    Attributes:
        rows: Best first; int64 `[B, k]`.
        scores: Inner products, -inf if fewer rows are allowed; float32 `[B, k]`.
        proven: False if a group that was left out may hold a better row; bool `[B]`.
    """

    rows: Tensor
    scores: Tensor
    proven: Tensor


class DeviceScan:
    """Vectors on a device; any number of threads may search at once."""

    def __init__(self, vectors: _F32 | Tensor, device: str | torch.device, form: Form | None = None) -> None:
        """Copies the vectors to the device; a tensor that lies there already is used as it is.

        Args:
            vectors: float32 `[N, D]`.
            device: `cuda`, or `cpu`, where the plain twins of the kernels run.
            form: Form that is scanned: float32, or bfloat16 next to the float32 that is scored again, which is half of
                the bytes to read and half as much memory again; None chooses by size.

        Raises:
            ConfigError: The vectors do not fit into the device's memory.
        """
        self.device = torch.device(device)
        form = form or ("float32" if len(vectors) < COMPACT_FROM else "bfloat16")
        try:
            self._vectors = torch.as_tensor(vectors).to(self.device)
            self._float32 = _Copy("float32", self._vectors, 0.0)
            self._copy = self._float32 if form == "float32" else _compact(self._vectors)
            self._graphs: dict[tuple[int, int, bool], _Graph] = {}
            self._lock = threading.Lock()
            lengths = (part.norm(dim=1).amax() for part in self._vectors.split(_CHUNK))  # type: ignore[no-untyped-call]
            self._longest = max((float(length) for length in lengths), default=0.0)
            if self.device.type == "cuda" and len(self):
                self._warm_up()
        except torch.cuda.OutOfMemoryError as error:
            size = len(vectors) * vectors.shape[1] * 6 / 2**30
            raise ConfigError(
                f"device: {len(vectors)} vectors need about {size:.1f} GiB of its memory, which is not free ({error}); "
                "serve with fewer workers or with --device cpu"
            ) from error

    def _warm_up(self) -> None:
        """Compiles the kernels, so that no caller waits for it, and finds out what the device cannot run.

        A query of zeros proves nothing, so its search goes every way there is.
        """
        zeros = self._vectors.new_zeros(LINES, self._vectors.shape[1])
        _maxima(self._copy, zeros, None)
        self.search(zeros[:1], 1, self.bitmap(np.full(-(-len(self) // 8), 255, np.uint8)))

    @property
    def form(self) -> Form:
        """The form of the vectors that is scanned."""
        return self._copy.form

    @property
    def bytes_per_row(self) -> int:
        """Bytes that a scan reads of each row."""
        return self._vectors.shape[1] * self._copy.vectors.element_size()

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._vectors)

    def first_pass(self, queries: Tensor) -> None:
        """Scans at most `LINES` queries and drops the result; a benchmark compares it with the speed of the memory."""
        _maxima(self._copy, queries, None)

    def propose(self, queries: _F32, k: int, allowed: Bitmap | None = None) -> _I64:
        """Returns rows that hold the best `k`.

        Args:
            queries: float32 [B, D].
            k: Number of best rows to find, at least 1.
            allowed: Rows that may be returned, one bit a row, lowest bit first; None allows every row.

        Returns:
            int64 [B, >= k], -1 if fewer rows are allowed.
        """
        on_device = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).to(self.device)
        result = self.search(on_device, k + ROUNDING, self.bitmap(allowed))
        # A row that is not allowed scores -inf; fewer than `k` may be allowed.
        rows: _I64 = torch.where(torch.isfinite(result.scores), result.rows, -1).cpu().numpy()
        return rows

    def bitmap(self, allowed: Bitmap | None) -> Tensor | None:
        """Returns a bitmap on the device, uint8, whole words of 32 rows; rows past `allowed` are not allowed."""
        if allowed is None:
            return None
        size = -(-len(self._vectors) // GROUP) * GROUP // 8
        part = np.require(allowed[:size], np.uint8, ["C", "W"])
        bits = torch.zeros(size, dtype=torch.uint8, device=self.device)
        bits[: part.size] = torch.from_numpy(part)
        return bits

    def search(self, queries: Tensor, k: int, bits: Tensor | None = None) -> ScanResult:
        """Returns the best `k` rows of each query; queries that the compact form cannot prove are scanned in float32.

        Args:
            queries: float32 `[B, D]` on the device.
            k: Number of rows to return; fewer if there are fewer.
            bits: `bitmap` of the allowed rows; None allows every row.
        """
        with torch.inference_mode():
            parts = [self._first(part, k, bits) for part in queries.split(LINES)]  # type: ignore[no-untyped-call]
            result = ScanResult(*(torch.cat(columns) for columns in zip(*map(_columns, parts), strict=True)))
            # The compact form first gives way to float32, and then more groups are scored; few queries need either.
            for wider in (1, WIDER) if self._copy.residual else (WIDER,):
                for unproven in (~result.proven).nonzero()[:, 0].split(LINES):  # type: ignore[no-untyped-call]
                    if unproven.numel():
                        _replace(result, unproven, self._pass(self._float32, queries[unproven], k, bits, wider))
        return result

    def _first(self, queries: Tensor, k: int, bits: Tensor | None) -> ScanResult:
        """Scans once; on a CUDA device as a graph that is recorded for each number of queries and of rows."""
        if self.device.type != "cuda":
            return self._pass(self._copy, queries, k, bits, 1)
        # Few sizes, so that few graphs are recorded; what is too much is cut off after the replay.
        lines = min(size for size in _LINES if size >= len(queries))
        depth = -(-k // _DEPTHS) * _DEPTHS
        key = (lines, depth, bits is not None)
        # A graph writes its answer to the same memory each time, so one thread replays it at a time.
        with self._lock:
            graph = self._graphs.pop(key, None)
            if graph is None:
                if len(self._graphs) >= _GRAPHS:
                    self._graphs.pop(next(iter(self._graphs)))  # the least lately used
                graph = _Graph(self, lines, depth, bits)
            self._graphs[key] = graph
            return graph.replay(queries, k, bits)

    def _pass(self, copy: _Copy, queries: Tensor, k: int, bits: Tensor | None, wider: int) -> ScanResult:
        """Scans once for at most `LINES` queries; `wider` times as many groups as usual are scored again."""
        k = min(k, len(self._vectors))
        groups, blocks = _maxima(copy, queries, bits)
        count, lines = blocks.shape[1], len(queries)
        wanted = wider * (round(k * (1.0 if copy.residual == 0 else 1 + SPARE)) + ROUNDING)
        block, left = _highest(blocks, wanted)
        inside = groups.view(lines, count, GROUPS).gather(1, block.unsqueeze(2).expand(-1, -1, GROUPS)).flatten(1)
        place, also_left = _highest(inside, wanted)
        left = torch.maximum(left, also_left)
        group = block.gather(1, place // GROUPS) * GROUPS + place % GROUPS
        scores = _scores(self._vectors, queries, group, bits)
        best, place = scores.topk(min(k, scores.shape[1]), 1)
        rows = group.gather(1, place // GROUP) * GROUP + place % GROUP
        # Strictly: a row that was left out with the same score would come first if its number is lower.
        proven = best[:, -1] > left + self._error(copy, queries)
        return ScanResult(rows, best, proven | torch.isneginf(left))

    def _error(self, copy: _Copy, queries: Tensor) -> Tensor:
        """Returns a bound on the distance of a scanned score from the true one; float32 `[B]`.

        By Cauchy and Schwarz at most the length of the query times that of the residual of the vector; on top, the
        products of bf16 halves leave out 2^-17 for each side, and the additions in float32 round.
        """
        arithmetic = 2.0**-16 + self._vectors.shape[1] * 2.0**-22
        lengths: Tensor = queries.norm(dim=1)
        return lengths * (copy.residual + arithmetic * self._longest)


class _Graph:
    """A pass as one CUDA graph: its forty launches cost the CPU, and the time of a small catalogue, as much as one."""

    def __init__(self, scan: DeviceScan, lines: int, k: int, bits: Tensor | None) -> None:
        self._queries = torch.zeros(lines, scan._vectors.shape[1], device=scan.device)
        self._bits = None if bits is None else torch.zeros_like(bits)
        inputs = (scan._copy, self._queries, k, self._bits, 1)
        # Run once before: the compiling and loading of a first call cannot be recorded.
        scan._pass(*inputs)
        torch.cuda.synchronize(scan.device)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads go on using the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = scan._pass(*inputs)

    def replay(self, queries: Tensor, k: int, bits: Tensor | None) -> ScanResult:
        count = len(queries)
        self._queries[:count] = queries
        if bits is not None and self._bits is not None:
            self._bits.copy_(bits)
        self._graph.replay()
        # Copies: the next replay writes over the same memory.
        rows, scores, proven = (column[:count].clone() for column in _columns(self._result))
        return ScanResult(rows[:, :k], scores[:, :k], proven)


def require(device: str) -> None:
    """Refuses a device that cannot be used.

    Raises:
        ConfigError: Torch or Triton does not reach it.
    """
    if torch.device(device).type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            f"--device cuda: torch {torch.__version__} reaches no CUDA device; install the driver and a torch for its "
            "CUDA version (pip install 'penchant[gpu]'), or choose --device cpu"
        )
    try:
        import serving.bundle.device_kernels  # noqa: F401 - a missing package is an error now, not in a search
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--device cuda: the search on a GPU needs {error.name}; pip install {error.name}, or choose --device cpu"
        ) from error


def _highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the places of the `count` highest of each query, in any order, and an upper bound of all others.

    Returns:
        int64 `[B, <= count]`, and float32 `[B]`, -inf if there are no others.
    """
    if scores.shape[1] <= count:
        places = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
        return places, scores.new_full((len(scores),), -torch.inf)
    best, places = scores.topk(count, 1, sorted=False)
    return places, best.amin(1)


def _columns(result: ScanResult) -> tuple[Tensor, Tensor, Tensor]:
    return result.rows, result.scores, result.proven


def _replace(result: ScanResult, queries: Tensor, replacement: ScanResult) -> None:
    for column, values in zip(_columns(result), _columns(replacement), strict=True):
        column[queries] = values


def _compact(vectors: Tensor) -> _Copy:
    """Copies the vectors to bf16, a part at a time; the largest residual is measured, not assumed."""
    whole = torch.empty_like(vectors, dtype=torch.bfloat16)
    residual = 0.0
    for at in range(0, len(vectors), _CHUNK):
        part = vectors[at : at + _CHUNK]
        whole[at : at + _CHUNK] = part
        difference = part - whole[at : at + _CHUNK].float()
        residual = max(residual, float(difference.norm(dim=1).amax()))
    return _Copy("bfloat16", whole, residual)


def _maxima(copy: _Copy, queries: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the highest score of each group and of each block, -inf if no row of it is allowed.

    Returns:
        float32 `[B, blocks * GROUPS]` and `[B, blocks]`.
    """
    if queries.device.type == "cuda":
        return _maxima_on_cuda(copy, queries, bits)
    return maxima_plain(copy.vectors, queries, bits)


def _maxima_on_cuda(copy: _Copy, queries: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    from serving.bundle.device_kernels import launch_maxima

    rows, dim = copy.vectors.shape
    width = max(16, 1 << (dim - 1).bit_length())
    lines = max(16, 1 << (len(queries) - 1).bit_length())
    # Tensor cores multiply tiles whose sides are powers of two from 16 on; the zeros add nothing.
    padded = queries.new_zeros(lines, width)
    padded[: len(queries), :dim] = queries
    high = padded.bfloat16()
    low = (padded - high.float()).bfloat16()
    blocks = -(-rows // BLOCK)
    groups = queries.new_empty(len(queries), blocks * GROUPS)
    maxima = queries.new_empty(len(queries), blocks)
    launch_maxima(
        blocks,
        *(copy.vectors, high, low, high if bits is None else bits.view(torch.int32)),
        *(groups, maxima, rows, len(queries), blocks),
        dim=dim,
        width=width,
        lines=lines,
        halves=2 if copy.form == "float32" else 1,
        masked=bits is not None,
    )
    return groups, maxima


def maxima_plain(vectors: Tensor, queries: Tensor, bits: Tensor | None, size: int = 1 << 16) -> tuple[Tensor, Tensor]:
    """Does the same as the kernel of the scan in plain torch, `size` rows at a time; see `_maxima`."""
    blocks = -(-len(vectors) // BLOCK)
    groups = queries.new_full((len(queries), blocks * GROUPS), -torch.inf)
    for at in range(0, len(vectors), size):
        part = slice(at, min(at + size, len(vectors)))
        scores = queries @ vectors[part].float().T
        if bits is not None:
            scores.masked_fill_(~_allowed(torch.arange(part.start, part.stop, device=bits.device), bits), -torch.inf)
        more = -scores.shape[1] % GROUP
        scores = torch.nn.functional.pad(scores, (0, more), value=-torch.inf)
        highest = scores.view(len(queries), -1, GROUP).amax(2)
        groups[:, at // GROUP : at // GROUP + highest.shape[1]] = highest
    return groups, groups.view(len(queries), -1, GROUPS).amax(2)


def _scores(vectors: Tensor, queries: Tensor, groups: Tensor, bits: Tensor | None) -> Tensor:
    """Returns the scores of the rows of some groups in float32, -inf if a row is not allowed; `[B, n * GROUP]`."""
    if queries.device.type != "cuda":
        return scores_plain(vectors, queries, groups, bits)
    from serving.bundle.device_kernels import scores_kernel

    lines, count = groups.shape
    scores = queries.new_empty(lines, count * GROUP)
    dim = vectors.shape[1]
    scores_kernel[(count, lines)](
        *(
            vectors,
            queries.contiguous(),
            queries if bits is None else bits.view(torch.int32),
            groups.contiguous(),
            scores,
        ),
        *(len(vectors), count),
        dim=dim,
        width=max(16, 1 << (dim - 1).bit_length()),
        masked=bits is not None,
        num_warps=1,
    )
    return scores


def scores_plain(vectors: Tensor, queries: Tensor, groups: Tensor, bits: Tensor | None) -> Tensor:
    """Does the same as the kernel of the second scoring in plain torch; see `_scores`."""
    rows = (groups.unsqueeze(2) * GROUP + torch.arange(GROUP, device=groups.device)).flatten(1)
    inside = rows < len(vectors)
    rows = rows.clamp(max=len(vectors) - 1)
    scores = torch.stack([vectors[chosen] @ query for chosen, query in zip(rows, queries, strict=True)])
    allowed = inside if bits is None else inside & _allowed(rows, bits)
    return scores.masked_fill_(~allowed, -torch.inf)


def _allowed(rows: Tensor, bits: Tensor) -> Tensor:
    return (bits[rows // 8] >> (rows % 8).to(torch.uint8)) & 1 != 0
