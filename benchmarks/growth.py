"""Scaling of the cost of training: tokens per second and memory by the number of events, or by that of items.

For each size a simple world is written straight into the canonical tables, in row groups, and a training in a process
of its own prepares it. Then the trainings alternate every few seconds, so that a slow moment of the machine hits all of
them: one runs while the others are stopped. Tokens and times are the training's own, from step to step.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.report import BenchmarkError, facts
from features.limits import cores
from features.tables.dataset import open_dataset
from features.tables.schema import EVENTS, ITEMS
from training.config import TrainConfig, load_config
from training.data.interactions import item_vocabulary, read_interactions
from training.data.split import split
from training.fitting.encoders import EncoderTrainer
from training.models.encoders import ItemBags
from training.models.neighbors import neighbors_of
from training.runtime import prepared
from training.train import initial_modules, read_material

KEEP = 50
"""Neighbours of an item."""
EVENTS_PER_USER = 100
"""Mean number of events of a user; each has between half and one and a half times as many."""
GROUP_USERS = 10_000
CLUSTERS = 100
SAMPLE_S = 0.1
SETTLE_S = 5.0
"""Unmeasured seconds after a training is resumed, in which its pages and caches return."""
_COUNTER = struct.Struct("<qqdd")  # steps, tokens, moment of the last step (monotonic), CPU seconds until then


def growth(
    sizes: Sequence[int] = (10**6, 10**7, 10**8),
    *,
    seconds: float = 60.0,
    rounds: int = 3,
    items: int = 2_000,
    threads: int = 0,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measures trainings of several sizes side by side.

    Args:
        sizes: Numbers of events.
        seconds: Measured seconds of each training, over all its `rounds`.
        rounds: Number of times that each training is resumed.
        items: Number of items, the same for all.
        threads: Threads of a training; 0 means one per core.
        folder: A folder with room for about 25 bytes an event, twice; None is the system's folder of temporary files.

    Returns:
        `sizes` {events: `generate_seconds`, `prepare_seconds` up to the first step (all at once, so they wait for one
        another) and `prepare_cpu_seconds`, `tokens_per_second`, `rounds` (the rate of each), `tokens`, `seconds`,
        `tokens_per_cpu_second`, `peak_anonymous_mib`}, `slowest_to_fastest` (ratio of rates), `slowest_to_fastest_cpu`
        (of those per CPU second, which other work on the machine disturbs less), `memory_ratio`, and the circumstances.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        trainings: list[Training] = []
        try:
            for size in sorted(sizes, reverse=True):  # all are prepared at once, the longest begins first
                trainings.append(Training.start(Path(name) / f"{size}", WorldSize(size, items), threads))
            _alternate(trainings[::-1], rounds, seconds / rounds)
        finally:
            for training in trainings:
                training.end()
    by_size = {training.world.events: training for training in trainings[::-1]}
    return {"items": items, "threads": threads or cores(), **_figures(by_size), **facts()}


def growth_of_catalogs(
    catalogs: Sequence[int] = (10**4, 10**5, 10**6),
    *,
    events: int = 10**7,
    seconds: float = 60.0,
    rounds: int = 3,
    threads: int = 0,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Measures trainings on catalogues of several sizes side by side, with their content, then the neighbours of each.

    Checkpoints, which write all weights and moments, are left out of the rates.

    Args:
        catalogs: Numbers of items.
        events: Number of events of each.
        seconds: Measured seconds of each training, over all its `rounds`.
        rounds: Number of times that each training is resumed.
        threads: Threads of a training and of the search for neighbours; 0 means one per core.
        folder: As for `growth`.

    Returns:
        As `growth`, but `catalogs` {items: ...} for `sizes`, each with `neighbors` {see `_search_neighbors`}.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        trainings: list[Training] = []
        try:
            for items in sorted(catalogs, reverse=True):
                world = WorldSize(events, items, described=True)
                trainings.append(Training.start(Path(name) / f"{items}", world, threads))
            _alternate(trainings[::-1], rounds, seconds / rounds)
        finally:
            for training in trainings:
                training.end()
        by_size = {training.world.items: training for training in trainings[::-1]}
        figures = _figures(by_size)
        for items, training in by_size.items():
            figures["sizes"][str(items)]["neighbors"] = training.neighbors(threads)
    figures["catalogs"] = figures.pop("sizes")
    return {"events": events, "threads": threads or cores(), **figures, **facts()}


def _figures(trainings: Mapping[int, Training]) -> dict[str, Any]:
    rates = [training.tokens / training.seconds for training in trainings.values()]
    by_cpu = [training.tokens / training.cpu_seconds for training in trainings.values()]
    peaks = [training.peak_kib for training in trainings.values()]
    return {
        "sizes": {str(size): training.figures() for size, training in trainings.items()},
        "slowest_to_fastest": round(min(rates) / max(rates), 4),
        "slowest_to_fastest_cpu": round(min(by_cpu) / max(by_cpu), 4),
        "memory_ratio": round(max(peaks) / min(peaks), 4),
    }


def _alternate(trainings: Sequence[Training], rounds: int, seconds: float) -> None:
    for training in trainings:
        training.warm_up()
    for number in range(rounds):
        # Back and forth, so that none is always measured in the wake of the same other one.
        for training in trainings if number % 2 == 0 else trainings[::-1]:
            training.measure(seconds)


@dataclass(frozen=True)
class WorldSize:
    """Sizes of a world: about so many events about so many items, whose titles say what they are if `described`."""

    events: int
    items: int
    described: bool = False


def write_world(out: Path, events: int, items: int, described: bool = False, seed: int = 0) -> None:
    """Writes about `events` events of users who mostly stay in one of `CLUSTERS` groups of items, in time order."""
    out.mkdir(parents=True)
    # Written straight as canonical tables, in groups of users: 10^8 events do not fit into the memory of this process.
    names = pa.array([f"item-{row}" for row in range(items)])
    fields = [EVENTS.field(name) for name in ("user_id", "item_id", "event_type", "timestamp")]
    columns: dict[str, Any] = {"item_id": names}
    if described:
        kinds = [f"kind{row % CLUSTERS}" for row in range(items)]
        columns["title"] = pa.array([f"{kind} word{row % 9973} word{row // 7}" for row, kind in enumerate(kinds)])
        columns["categories"] = pa.array([[kind] for kind in kinds])
    schema = pa.schema([ITEMS.field(name) for name in columns])
    pq.write_table(pa.table(columns, schema=schema), out / "items.parquet")
    rng = np.random.default_rng(seed)
    users = max(1, events // EVENTS_PER_USER)
    with pq.ParquetWriter(out / "events.parquet", pa.schema(fields), compression="zstd") as writer:
        for start in range(0, users, GROUP_USERS):
            count = min(GROUP_USERS, users - start)
            lengths = rng.integers(EVENTS_PER_USER // 2, EVENTS_PER_USER * 3 // 2 + 1, count)
            owner = np.repeat(np.arange(start, start + count), lengths)
            size = owner.size
            # The next item of the user's own cluster, or an item drawn by a popularity that falls off.
            walk = (np.arange(size) * 7 + owner) % (items // CLUSTERS) * CLUSTERS + owner % CLUSTERS
            popular = (items * rng.random(size) ** 3).astype(np.int64)
            rows = np.where(rng.random(size) < 0.7, walk, popular)
            place = np.arange(size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            arrays = [
                pa.array([f"user-{user}" for user in range(start, start + count)]).take(owner - start),
                names.take(rows),
                pa.array(["view_item"]).take(np.zeros(size, np.int64)),
                pa.array(1_600_000_000_000 + owner % 86_400 * 1_000 + place * 60_000),
            ]
            writer.write_table(pa.table(arrays, schema=pa.schema(fields)))


@dataclass
class Training:
    """A training in a process of its own, and its measures."""

    world: WorldSize
    data: Path
    process: subprocess.Popen[bytes]
    counter: Path
    generate_seconds: float
    prepare_seconds: float = 0.0
    prepare_cpu_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_kib: int = 0
    rates: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, data: Path, world: WorldSize, threads: int) -> Training:
        """Writes the world and starts a training that prepares it."""
        began = time.monotonic()
        write_world(data, world.events, world.items, world.described)
        generated = time.monotonic()
        counter = data.with_suffix(".counter")
        # A file, not a pipe: a stopped training could not answer, and reading must not disturb a running one.
        counter.write_bytes(bytes(_COUNTER.size))
        command = [sys.executable, "-m", "benchmarks.growth", str(data), str(threads), str(counter)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        training = cls(world, data, process, counter, round(generated - began, 1))
        threading.Thread(target=training._watch, args=(generated,), daemon=True).start()
        return training

    def warm_up(self) -> None:
        """Waits for the first steps, and stops the training."""
        while not self.prepare_seconds:
            self._alive()
            time.sleep(SAMPLE_S)
        time.sleep(SETTLE_S)
        # Stopped, it keeps its memory but takes no core from the one that is measured.
        self.process.send_signal(signal.SIGSTOP)

    def measure(self, seconds: float) -> None:
        """Resumes the training and measures it, from the end of one step to the end of another."""
        self.process.send_signal(signal.SIGCONT)
        time.sleep(SETTLE_S)
        # From one step's end to another's: a step that is cut by the clock would count in part only.
        _, before, began, used = self._read()
        while (now := self._read())[2] - began < seconds:
            self._alive()
            time.sleep(SAMPLE_S)
        self.process.send_signal(signal.SIGSTOP)
        self.tokens += now[1] - before
        self.seconds += now[2] - began
        self.cpu_seconds += now[3] - used
        self.rates.append(round((now[1] - before) / (now[2] - began), 1))

    def end(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()

    def neighbors(self, threads: int) -> dict[str, Any]:
        """Searches the neighbours of the training's items in a process of its own, and returns what that costs."""
        command = [sys.executable, "-m", "benchmarks.growth", str(self.data), str(threads)]
        cost: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return cost

    def figures(self) -> dict[str, Any]:
        """Returns the measures that are reported."""
        return {
            "generate_seconds": self.generate_seconds,
            "prepare_seconds": self.prepare_seconds,
            "prepare_cpu_seconds": self.prepare_cpu_seconds,
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "tokens_per_cpu_second": round(self.tokens / self.cpu_seconds, 1),
            "rounds": self.rates,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "peak_anonymous_mib": round(self.peak_kib / 1024, 1),
        }

    def _read(self) -> tuple[int, int, float, float]:
        steps, tokens, moment, used = _COUNTER.unpack(self.counter.read_bytes())
        return steps, tokens, moment, used

    def _alive(self) -> None:
        if self.process.poll() is not None:
            raise BenchmarkError(f"the training ended by itself with status {self.process.returncode}: see above")

    def _watch(self, began: float) -> None:
        proc = Path(f"/proc/{self.process.pid}")
        while self.process.poll() is None:
            try:
                lines = (proc / "status").read_text(encoding="ascii").splitlines()
                used = (proc / "stat").read_text(encoding="ascii").rpartition(")")[2].split()[11:13]
            except OSError:
                return
            if not self.prepare_seconds and self._read()[0] > 0:
                self.prepare_cpu_seconds = round(sum(map(int, used)) / os.sysconf("SC_CLK_TCK"), 1)
                self.prepare_seconds = round(time.monotonic() - began, 1)
            # Anonymous memory only: mapped files are the page cache's, which the kernel takes back at need.
            self.peak_kib = max([self.peak_kib, *(int(line.split()[1]) for line in lines if line[:8] == "RssAnon:")])
            time.sleep(SAMPLE_S)


def _config(threads: int) -> TrainConfig:
    # So patient that it never stops by itself. A training that was stopped would write a checkpoint each time that it
    # is resumed, more often than any other.
    settings = {"threads": threads, "device": "cpu", "epochs": 10_000, "patience": 10_000, "checkpoint_seconds": 1e6}
    return load_config(None, {**settings, "validation_users": 500})


def _train(data: Path, threads: int, counter: Path) -> None:
    """Trains until it is killed, and keeps the counter up to date."""
    config = _config(threads)
    out = data.with_suffix(".run")
    out.mkdir()
    with prepared(threads), counter.open("r+b", buffering=0) as file:
        torch.manual_seed(0)
        device = torch.device("cpu")
        material = read_material(open_dataset(data), config, device, out)
        modules = initial_modules(material, config, device, fresh=True)
        bags = None if material.inputs is None else ItemBags.build(modules.item, material.inputs)
        fit = EncoderTrainer(out, config, material.data, material.division, modules, bags)

        def count(step: int) -> None:
            # One write of a few bytes, so that a reader never sees half of it.
            moment, used = time.monotonic(), time.process_time()
            os.pwrite(file.fileno(), _COUNTER.pack(step, fit.state.tokens, moment, used), 0)

        fit.on_step = count
        fit.run()


def _search_neighbors(data: Path, threads: int) -> dict[str, Any]:
    """Searches the neighbours of all items, as a training does at its end.

    Returns:
        `seconds`, `cpu_seconds`, `peak_mib` of the whole process, `items` that have a neighbour.
    """
    config = _config(threads)
    with prepared(threads):
        dataset = open_dataset(data)
        _, vocabulary = item_vocabulary(dataset)
        interactions = read_interactions(dataset, vocabulary, config, data.parent)
        ends = split(interactions, config).train_end
        neighbors_of(interactions, np.zeros_like(ends), KEEP)  # compiles the kernel
        began, used = time.monotonic(), time.process_time()
        rows, _ = neighbors_of(interactions, ends, KEEP)
        return {
            "seconds": round(time.monotonic() - began, 2),
            "cpu_seconds": round(time.process_time() - used, 2),
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            "items": int((rows[:, 0] >= 0).sum()),
        }


if __name__ == "__main__":
    if len(sys.argv) > 3:
        _train(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    else:
        print(json.dumps(_search_neighbors(Path(sys.argv[1]), int(sys.argv[2]))))
