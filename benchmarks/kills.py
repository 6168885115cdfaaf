"""A training that is killed again and again ends exactly as an undisturbed one: weights, optimizer and all files.

`penchant train` runs in a process of its own and gets SIGKILL: while it starts, between checkpoints, in the middle of
writing one (its unfinished file is then still there after the death, which is checked), and while the heads are
trained after the encoders. The same command then continues.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import BenchmarkError, facts
from training.data.datasets import prepare

# A training of seconds, with validations and checkpoints so close that a kill hits something at any moment.
SETTINGS = {
    "protocol": "leave-one-out",
    "dim": 32,
    "layers": 1,
    "max_length": 30,
    "batch_tokens": 512,
    "validate_every": 0.25,
    "patience": 1000,
    "negatives": 64,
    "query_steps": 200,
    "ranker_steps": 100,
    "candidates": 50,
    "checkpoint_seconds": 0.2,
    "threads": 1,
    "device": "cpu",
}
FILES = ("model.safetensors", "query.safetensors", "ranker.safetensors", "tables.safetensors", "vocabulary.arrow")
POLL_S = 0.0005
LONGEST_S = 1800.0


def kills(count: int = 20, *, seed: int = 0, users: int = 400, epochs: int = 12) -> dict[str, Any]:
    """Kills a training `count` times at moments drawn from `seed`, and compares its end.

    Args:
        count: Number of kills; a third of them (rounded up) inside a checkpoint, a fifth while the heads train.
        seed: Seed of the moments, and of the training.
        users: Users of the simulated data set.
        epochs: Epochs of the training.

    Returns:
        `kills` {moment: number}, `attempts`, `identical`, `sha256` {weights, optimizer and each file}, `steps`,
        `seconds` (undisturbed and killed), and the circumstances.

    Raises:
        BenchmarkError: The two ends differ, or a training failed on its own.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The undisturbed training comes first: its milestones place the kills of the other one.
        prepare("simulated", None, folder / "data", users=users, items=300)
        settings = SETTINGS | {"epochs": epochs}
        undisturbed = InterruptedTraining(folder / "data", folder / "undisturbed", seed, settings)
        undisturbed.resume(lambda: False)
        killed = InterruptedTraining(folder / "data", folder / "killed", seed, settings)
        moments = killed.suffer(count, undisturbed.milestones, np.random.default_rng(seed))
        expected, end = _end(folder / "undisturbed"), _end(folder / "killed")
        _require_equal(expected, end, moments)
        return {
            "kills": dict(sorted(moments.items())),
            "attempts": killed.attempts,
            "identical": True,
            "sha256": end["sha256"],
            "steps": end["steps"],
            "seconds": {"undisturbed": round(undisturbed.seconds, 1), "killed": round(killed.seconds, 1)},
            "settings": settings,
            **facts(),
        }


def _require_equal(expected: dict[str, Any], end: dict[str, Any], moments: Mapping[str, int]) -> None:
    differing = [key for key in expected if expected[key] != end[key]]
    if differing:
        lines = zip(expected["log"], end["log"], strict=False)
        raise BenchmarkError(
            f"after {dict(moments)} the training ended otherwise in {', '.join(differing)}; the first validation that "
            f"differs, undisturbed and killed: {next((pair for pair in lines if pair[0] != pair[1]), None)}"
        )


class InterruptedTraining:
    """One training, in as many processes as it takes.

    Attributes:
        milestones: Seconds of the last process that finished: until the first checkpoint, until the encoders were
            trained, until the end.
        attempts: Processes started.
        seconds: Time that they took together.
    """

    def __init__(self, data: Path, out: Path, seed: int, settings: Mapping[str, Any]) -> None:
        options = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
        self.command = [sys.executable, "-m", "penchant", "train", str(data), "--out", str(out), "--seed", str(seed)]
        self.command += options
        self.out = out
        self.checkpoint, self.draft = out / "checkpoint.safetensors", out / "checkpoint.safetensors.draft"
        self.milestones = (0.0, 0.0, 0.0)
        self.attempts, self.seconds = 0, 0.0

    def suffer(self, count: int, milestones: tuple[float, float, float], rng: np.random.Generator) -> Counter[str]:
        """Gets killed `count` times, then trains to its end; returns the number of kills by moment."""
        started, trained, ended = milestones
        writes, heads = -(-count // 3), count // 5
        planned = ["write"] * writes + ["anywhere"] * (count - writes - heads)
        planned = [*rng.permutation(planned), *["heads"] * heads]
        moments: Counter[str] = Counter()
        while planned:
            moment = str(planned[0])
            # Short against the whole, so that the training does not come to its end before the last kill.
            wait = float(rng.random()) * (trained - started) / (2 * count)
            if moment == "heads":
                wait = float(rng.random()) * (ended - trained) * 0.9
            elif moment == "anywhere" and rng.random() < 0.25:
                moment, wait = "start", float(rng.random()) * started
            if not self.resume(self._moment(moment, wait)):
                raise BenchmarkError(f"the training was over before {len(planned)} kills: make it longer")
            if moment == "write" and not self.draft.exists():
                moment = "anywhere"  # the writing was over; the next kill is again meant to hit one
                if "anywhere" in planned:
                    planned.remove("anywhere")
            else:
                planned.pop(0)
            moments[moment] += 1
        self.resume(lambda: False)
        return moments

    def resume(self, due: Callable[[], bool]) -> bool:
        """Runs the command until it is due to be killed; returns True if it was, False if it finished before.

        Raises:
            BenchmarkError: The training failed on its own, or takes too long.
        """
        began, last = time.monotonic(), _changed(self.checkpoint)
        started = trained = 0.0
        self.attempts += 1
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=errors) as run,
        ):
            try:
                while run.poll() is None:
                    passed = time.monotonic() - began
                    if due():
                        run.kill()
                        break
                    if not started and _changed(self.checkpoint) != last:
                        started = passed
                    if started and not trained and _is_finished(self.checkpoint):
                        trained = passed
                    if passed > LONGEST_S:
                        raise BenchmarkError(f"the training takes more than {LONGEST_S:.0f} s")
                    # Short, so that the writing of a checkpoint, which takes milliseconds, is not missed.
                    time.sleep(POLL_S)
            finally:
                run.kill()
                run.wait()
            self.seconds += time.monotonic() - began
            if run.returncode == 0:
                self.milestones = started, trained, time.monotonic() - began
            elif run.returncode > 0:
                errors.seek(0)
                raise BenchmarkError(f"the training failed: {errors.read()[-2000:].decode(errors='replace')}")
        return run.returncode != 0

    def _moment(self, name: str, wait: float) -> Callable[[], bool]:
        """Returns a function that is true from `wait` seconds after the state that the moment is named after."""
        # Kills wait for a new checkpoint: without one the next attempt would begin where this one began.
        last, reached = _changed(self.checkpoint), [0.0]
        begin: dict[str, Callable[[], bool]] = {
            "start": lambda: True,
            "write": lambda: _changed(self.checkpoint) != last,
            "anywhere": lambda: _changed(self.checkpoint) != last,
            "heads": lambda: _is_finished(self.checkpoint),
        }

        def due() -> bool:
            if not reached[0]:
                if begin[name]():
                    reached[0] = time.monotonic()
                return False
            waited = time.monotonic() - reached[0] >= wait
            return waited and (name != "write" or self.draft.exists())

        return due


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _is_finished(checkpoint: Path) -> bool:
    """Returns True if a checkpoint says that the encoders are trained."""
    return _says_finished(checkpoint, _changed(checkpoint))


@lru_cache(maxsize=1)
def _says_finished(checkpoint: Path, changed: int) -> bool:
    # Each checkpoint is read once only, because this is called a thousand times a second.
    if not changed:
        return False
    try:
        with checkpoint.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except FileNotFoundError:
        return False
    return bool(json.loads(header["__metadata__"]["state"])["finished"])


def _end(out: Path) -> dict[str, Any]:
    """Returns the parts of a finished training that must be the same, killed or not."""
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    digests = result["sha256"] | {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES}
    kept: Sequence[str] = ("steps", "epochs", "best_validation", "blend", "ranker_ndcg@10")
    return {
        "sha256": digests,
        **{name: result[name] for name in kept},
        # Every figure of every validation, but for the time, which a killed training cannot repeat.
        "log": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
    }
