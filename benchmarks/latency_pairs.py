"""Two services measured in turn, so that a slow moment of the machine hits both alike."""

from __future__ import annotations

import math
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.latency import REQUESTS, WINDOWS, Target, bench_of, rate_of, save, sizes_of, summary
from benchmarks.load.traffic import Shape
from benchmarks.report import BenchmarkError


@dataclass(frozen=True)
class Pair:
    """Two services that are measured in turn, and the files of their results.

    Attributes:
        first: One of them.
        against: Address of the other, of which the same is asked.
        out: File of the first one's result.
        out_against: File of the other's.
    """

    first: Target
    against: str
    out: Path | None
    out_against: Path | None

    def require(self) -> tuple[Path, Path]:
        """Returns the files.

        Raises:
            BenchmarkError: One is missing.
        """
        if self.out is None or self.out_against is None:
            raise BenchmarkError("--against makes two results: name their files by --out and --out-against")
        return self.out, self.out_against


def latency_against(
    pair: Pair,
    rate: str | float,
    requests: int | None = None,
    duration: float | None = None,
    windows: int = WINDOWS,
    shape: Shape | None = None,
) -> dict[str, Any]:
    """Measures two services in turn, window by window, so that a slow moment of the machine hits both alike.

    Args:
        pair: The services.
        rate: Requests per second, or "half" for half of the highest rate of the first service.
        requests: Number of requests to each; 5,000 unless `duration` is given.
        duration: Length of the measurement of each in seconds, instead of `requests`.
        windows: Number of windows of each.
        shape: The form of the traffic; None: `Recommend` only.

    Returns:
        The files of the two results, which are as `latency` returns them and have a common `pairing`, by which
        `compare` takes their windows in pairs.

    Raises:
        BenchmarkError: As `latency`, and if a file is not named.
    """
    files = pair.require()
    targets = (pair.first, replace(pair.first, address=pair.against, pid=None))
    with ExitStack() as stack:
        benches = [stack.enter_context(bench_of(target, shape or Shape())) for target in targets]
        per_second = rate_of(benches[0], rate, {})
        count = requests or (math.ceil(duration * per_second) if duration else REQUESTS)
        for number, size in enumerate(sizes_of(count, windows)):
            # Back and forth, so that none is always measured in the wake of the other.
            for bench in benches if number % 2 == 0 else benches[::-1]:
                bench.measure(per_second, size)
        shared = {"rate": round(per_second, 1), "pairing": uuid.uuid4().hex}
        for bench, file in zip(benches, files, strict=True):
            save(file, {**shared, "target": bench.generator.target, **summary(bench), **bench.circumstances()})
    return {"results": [str(file) for file in files], **shared}
