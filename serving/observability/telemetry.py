"""Counters, latency histograms and gauges, cheap enough to be always on.

Each thread counts in dictionaries of its own, so the hot path takes no lock and loses nothing; a reader adds them up.
The counts of threads that have ended are added to one total, so that short-lived threads leave nothing behind.
A histogram has eight buckets per power of two microseconds: percentiles are right to 12.5 %.
"""

from __future__ import annotations

import threading
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

BUCKETS = 256

Key = str | tuple[str, ...]
"""Name of a counter or a histogram: that of its family in `exposition` without `penchant_`, then values of labels."""


def bucket_of(microseconds: int) -> int:
    """Returns the index of the bucket that holds a duration."""
    if microseconds < 16:
        return microseconds if microseconds > 0 else 0
    shift = microseconds.bit_length() - 4
    return min((shift << 3) + (microseconds >> shift), BUCKETS - 1)


def bucket_limit(index: int) -> int:
    """Returns the smallest duration in microseconds that lies above a bucket."""
    if index < 16:
        return index + 1
    shift = (index >> 3) - 1
    return ((index & 7) + 9) << shift


class _Alive:
    """Lives as long as its thread: the end of the thread drops the last reference."""

    __slots__ = ("__weakref__",)


class _Shard:
    """The counts of one thread."""

    __slots__ = ("alive", "counts", "times")

    def __init__(self, alive: weakref.ref[_Alive] | None = None) -> None:
        self.counts: dict[Key, int] = {}
        # An array, because each cell of a list beyond 256 is an object of its own: they would add up for hours.
        self.times: dict[Key, array[int]] = {}
        self.alive = alive

    def add(self, shard: _Shard) -> None:
        """Adds the counts of another shard, while its thread may write to it."""
        # A copy is one step under the interpreter's lock; a loop over the dictionary itself could see it grow.
        for key, n in shard.counts.copy().items():
            self.counts[key] = self.counts.get(key, 0) + n
        for key, cells in shard.times.copy().items():
            total = self.times.setdefault(key, _no_times())
            for index, cell in enumerate(cells):
                total[index] += cell


def _no_times() -> array[int]:
    return array("q", bytes(8 * (BUCKETS + 1)))


class _Local(threading.local):
    """The shard of the current thread."""

    def __init__(self, enter: Callable[[_Shard], None]) -> None:
        # `threading.local` drops this at the end of the thread, which is how `_fold` learns of it.
        self.alive = _Alive()
        shard = _Shard(weakref.ref(self.alive))
        self.counts, self.times = shard.counts, shard.times
        enter(shard)


class Telemetry:
    """Counts things and times stages; any thread may call anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shards: list[_Shard] = []
        self._ended = _Shard()
        self._gauges: dict[str, Callable[[], float]] = {}
        self._local = _Local(self._enter)

    def count(self, name: Key, n: int = 1) -> None:
        """Adds n to a counter."""
        counts = self._local.counts
        counts[name] = counts.get(name, 0) + n

    def stage(self, name: Key, microseconds: int) -> None:
        """Adds one duration to a histogram, whose last cell is the sum; a name without labels is that of a stage."""
        times = self._local.times
        try:
            cells = times[name]
        except KeyError:
            cells = times[name] = _no_times()
        # `bucket_of`, without the cost of a call, as this runs some fifteen times a request.
        if microseconds < 16:
            index = microseconds if microseconds > 0 else 0
        else:
            shift = microseconds.bit_length() - 4
            index = (shift << 3) + (microseconds >> shift)
            if index >= BUCKETS:
                index = BUCKETS - 1
        # No lock: the cells belong to this thread, and a reader can at worst miss the newest duration.
        cells[index] += 1
        cells[BUCKETS] += microseconds

    def failure(self, name: str) -> None:
        """Counts a stage that failed while the request went on."""
        self.count(("stage_failures", name))

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Registers a value that every snapshot reads, such as the length of a queue."""
        self._gauges[name] = read

    def counters(self) -> dict[str, int]:
        """Returns every counter, all threads together; the parts of a tuple are joined by dots."""
        total: Counter[str] = Counter()
        for key, n in self._total().counts.items():
            total[key if isinstance(key, str) else ".".join(key)] += n
        return dict(total)

    def histograms(self) -> dict[Key, array[int]]:
        """Returns every histogram, all threads together: cells per bucket, then the sum in microseconds."""
        return self._total().times

    def summary(self) -> dict[Key, dict[str, float]]:
        """Returns number, mean, p50 and p99 in microseconds of every histogram."""
        return {
            name: {
                "count": sum(cells[:BUCKETS]),
                "mean": cells[BUCKETS] / max(sum(cells[:BUCKETS]), 1),
                "p50": percentile(cells, 0.50),
                "p99": percentile(cells, 0.99),
            }
            for name, cells in self.histograms().items()
        }

    def snapshot(self) -> dict[str, Any]:
        """Returns everything as JSON values: `counts` and `times` as pairs, `gauges` by name.

        A histogram has its cells that are not 0, by index.
        """
        total = self._total()
        # Most cells are 0, and the snapshot goes through a socket with every scrape.
        times = [
            (_parts(key), {str(index): cell for index, cell in enumerate(cells) if cell})
            for key, cells in total.times.items()
        ]
        return {
            "counts": [(_parts(key), n) for key, n in total.counts.items()],
            "times": times,
            "gauges": {name: read() for name, read in self._gauges.items()},
        }

    def _enter(self, shard: _Shard) -> None:
        with self._lock:
            self._fold()
            self._shards.append(shard)

    def _fold(self) -> None:
        """Adds up the shards of threads that have ended, to which no thread writes any more."""
        for shard in [shard for shard in self._shards if shard.alive is not None and shard.alive() is None]:
            self._ended.add(shard)
            self._shards.remove(shard)

    def _total(self) -> _Shard:
        total = _Shard()
        with self._lock:
            self._fold()
            for shard in (self._ended, *self._shards):
                total.add(shard)
        return total


def percentile(cells: Sequence[int], share: float) -> int:
    """Returns the upper limit in microseconds of the bucket where a share of the durations is reached."""
    wanted = share * sum(cells[:BUCKETS])
    reached = 0
    for index in range(BUCKETS):
        reached += cells[index]
        if cells[index] and reached >= wanted:
            return bucket_limit(index)
    return 0


def _parts(key: Key) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else key
