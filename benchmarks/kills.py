"""A training that is killed again and again ends exactly as one that is left alone: weights, optimizer and all files.

`penchant train` runs in a process of its own and gets SIGKILL: while it starts, between checkpoints, in the middle of
writing one (its unfinished file is then still there after the death, which is checked), and while the heads are
trained after the encoders. The same command then goes on.
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


def kills(count: int = 20, *, seed: int = 0, people: int = 400, epochs: int = 12) -> dict[str, Any]:
    """Kills a training `count` times at moments drawn from `seed`, and compares its end.

    Args:
        count: Number of kills; a third of them (rounded up) inside a checkpoint, a fifth while the heads train.
        seed: Seed of the moments, and of the training.
        people: People of the simulated data set.
        epochs: Epochs of the training.

    Returns:
        `kills` {moment: number}, `attempts`, `identical`, `sha256` {weights, optimizer and each file}, `steps`,
        `seconds` (undisturbed and killed), and the circumstances.

    Raises:
        BenchmarkError: The two ends differ, or a training failed by itself.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare("simulated", None, folder / "data", users=people, items=300)
        settings = SETTINGS | {"epochs": epochs}
        alone = Life(folder / "data", folder / "alone", seed, settings)
        alone.go_on(lambda: False)
        killed = Life(folder / "data", folder / "killed", seed, settings)
        done = killed.suffer(count, alone.lasted, np.random.default_rng(seed))
        one, other = _end(folder / "alone"), _end(folder / "killed")
        differing = [key for key in one if one[key] != other[key]]
        if differing:
            first = next((pair for pair in zip(one["log"], other["log"], strict=False) if pair[0] != pair[1]), None)
            raise BenchmarkError(
                f"after {dict(done)} the training ended otherwise in {', '.join(differing)}; the first validation that "
                f"differs, undisturbed and killed: {first}"
            )
        return {
            "kills": dict(sorted(done.items())),
            "attempts": killed.attempts,
            "identical": True,
            "sha256": one["sha256"],
            "steps": one["steps"],
            "seconds": {"undisturbed": round(alone.seconds, 1), "killed": round(killed.seconds, 1)},
            "settings": settings,
            **facts(),
        }


class Life:
    """One training, in as many processes as it takes.

    Attributes:
        lasted: Seconds of the last process that came to the end: to the first checkpoint, to the encoders' end, to the
            end.
        attempts: Processes started.
        seconds: Time that they took together.
    """

    def __init__(self, data: Path, out: Path, seed: int, settings: Mapping[str, Any]) -> None:
        chosen = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
        self.command = [sys.executable, "-m", "penchant", "train", str(data), "--out", str(out), "--seed", str(seed)]
        self.command += chosen
        self.out = out
        self.checkpoint, self.draft = out / "checkpoint.safetensors", out / "checkpoint.safetensors.draft"
        self.lasted = (0.0, 0.0, 0.0)
        self.attempts, self.seconds = 0, 0.0

    def suffer(self, count: int, lasted: tuple[float, float, float], rng: np.random.Generator) -> Counter[str]:
        """Gets killed `count` times, then comes to its end."""
        started, trained, ended = lasted
        writes, heads = -(-count // 3), count // 5
        wanted = ["write"] * writes + ["anywhere"] * (count - writes - heads)
        wanted = [*rng.permutation(wanted), *["heads"] * heads]
        done: Counter[str] = Counter()
        while wanted:
            moment = str(wanted[0])
            # Short against the whole, so that the training does not come to its end before the last kill.
            wait = float(rng.random()) * (trained - started) / (2 * count)
            if moment == "heads":
                wait = float(rng.random()) * (ended - trained) * 0.9
            elif moment == "anywhere" and rng.random() < 0.25:
                moment, wait = "start", float(rng.random()) * started
            if not self.go_on(self._moment(moment, wait)):
                raise BenchmarkError(f"the training was over before {len(wanted)} kills: make it longer")
            if moment == "write" and not self.draft.exists():
                moment = "anywhere"  # it was too fast; the next one is again meant to hit the writing
                if "anywhere" in wanted:
                    wanted.remove("anywhere")
            else:
                wanted.pop(0)
            done[moment] += 1
        self.go_on(lambda: False)
        return done

    def go_on(self, due: Callable[[], bool]) -> bool:
        """Runs the command until it is due to be killed; returns whether it was, False where it came to its end.

        Raises:
            BenchmarkError: It failed by itself, or takes too long.
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
                    time.sleep(POLL_S)
            finally:
                run.kill()
                run.wait()
            self.seconds += time.monotonic() - began
            if run.returncode == 0:
                self.lasted = started, trained, time.monotonic() - began
            elif run.returncode > 0:
                errors.seek(0)
                raise BenchmarkError(f"the training failed: {errors.read()[-2000:].decode(errors='replace')}")
        return run.returncode != 0

    def _moment(self, name: str, wait: float) -> Callable[[], bool]:
        """What says that the moment has come, `wait` seconds after what it waits for."""
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
    """Whether a checkpoint says that the encoders are trained."""
    return _says_finished(checkpoint, _changed(checkpoint))


@lru_cache(maxsize=1)
def _says_finished(checkpoint: Path, changed: int) -> bool:
    """Looks once at each checkpoint, for this is asked a thousand times a second."""
    if not changed:
        return False
    try:
        with checkpoint.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except FileNotFoundError:
        return False
    return bool(json.loads(header["__metadata__"]["state"])["finished"])


def _end(out: Path) -> dict[str, Any]:
    """What must be the same."""
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    digests = result["sha256"] | {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES}
    kept: Sequence[str] = ("steps", "epochs", "best_validation", "blend", "ranker_ndcg@10")
    return {
        "sha256": digests,
        **{name: result[name] for name in kept},
        "log": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
    }
