"""A search that is killed again and again ends exactly as one that was not: trials, values, curves and choice.

`penchant tune` runs in a process of its own and gets SIGKILL at random moments, from its start on; the same command
then goes on. The settings that it chooses must validate as well as the automatic choice, or better.

    python -m tests.proofs.tuning --data DATA --trials 8 --kills 5 -- --set dim=32

prints one line of JSON. Without DATA it simulates 100,000 events. What follows `--` goes to both searches. `control`
tells that the comparison finds a value and a choice that were changed in a copy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import BenchmarkError, facts
from training.data.datasets import prepare

POLL_S = 0.002
TIMES = ("seconds", "tail_seconds")
"""Fields that a killed search cannot repeat."""


def differences(one: Path, other: Path) -> list[str]:
    """Returns what two searches with the same budget of trials differ in: numbers of trials, and `choice`."""
    tables = [json.loads((out / "trials.json").read_text()) for out in (one, other)]
    first, second = ([{k: v for k, v in line.items() if k not in TIMES} for line in table] for table in tables)
    apart = [str(at) for at in range(max(len(first), len(second))) if first[at : at + 1] != second[at : at + 1]]
    is_same_choice = (one / "config.yaml").read_text() == (other / "config.yaml").read_text()
    return apart + ([] if is_same_choice else ["choice"])


class KilledSearch:
    """One search, in as many processes as it takes; `moments` is where each kill met it."""

    def __init__(self, data: Path, out: Path, options: Sequence[str]) -> None:
        self.out = out
        self.command = [sys.executable, "-m", "penchant", "tune", str(data), "--out", str(out), *options]
        self.moments: list[str] = []

    def run(self, seconds: float | None = None, at_work: bool = False) -> float:
        """Runs the command, and kills it after so many seconds; returns how long it ran.

        Args:
            seconds: Seconds to the kill; None: none.
            at_work: Counts them from the next validation, or end of a trial, on.

        Raises:
            BenchmarkError: It failed, or ended before it could be killed.
        """
        began = time.monotonic()
        with tempfile.TemporaryFile() as errors:
            with subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=errors) as process:
                before = self._progress()
                while at_work and process.poll() is None and self._progress() == before:
                    time.sleep(POLL_S)
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    process.kill()
            ran = time.monotonic() - began
            if process.returncode > 0:
                errors.seek(0)
                raise BenchmarkError(f"the search failed: {errors.read()[-2000:].decode(errors='replace')}")
        if seconds is not None:
            if process.returncode == 0:
                raise BenchmarkError("the search ended before it was killed: give more trials")
            self.moments.append(self._moment())
        return ran

    def _progress(self) -> list[tuple[str, int]]:
        """Returns the times of the files that grow with a search, by name."""
        files = [*self.out.glob("trial-*/log.jsonl"), *self.out.glob("trials.json")]
        with contextlib.suppress(FileNotFoundError):  # the training of a trial that has ended is being removed
            return sorted((str(file), file.stat().st_mtime_ns) for file in files)
        return []

    def _moment(self) -> str:
        table = self.out / "trials.json"
        ended = len(json.loads(table.read_text())) if table.exists() else 0
        folder = self.out / f"trial-{ended:04d}"
        if not folder.exists():
            return f"before trial {ended}"
        log = folder / "log.jsonl"
        validations = len(log.read_text().splitlines()) if log.exists() else 0
        return f"in trial {ended} after {validations} validations"


def prove(data: Path | None, trials: int, kills: int, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """Searches once undisturbed and once with kills, and compares the ends.

    Raises:
        BenchmarkError: The ends differ, the choice is worse than the automatic one, or the control finds nothing.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if data is None:
            data = folder / "data"
            prepare("simulated", None, data, users=2000, items=1000)
        options = ["--trials", str(trials), *options]
        undisturbed, killed = (KilledSearch(data, folder / part, options) for part in ("undisturbed", "killed"))
        seconds = undisturbed.run()
        rng, ran = np.random.default_rng(seed), 0.0
        trained = json.loads((undisturbed.out / "tuning.json").read_text())["seconds"]
        for number in range(kills):
            # Short against the whole, so that the search does not come to its end before the last kill.
            at_work = number % 3 != 1
            ran += killed.run(float(rng.random()) * (trained / 2 if at_work else seconds) / kills, at_work)
        ran += killed.run()
        if apart := differences(undisturbed.out, killed.out):
            raise BenchmarkError(f"after kills {killed.moments} the search ended otherwise in {', '.join(apart)}")
        result = json.loads((killed.out / "tuning.json").read_text())
        if result["gain"] < 0:
            raise BenchmarkError(f"the choice is worse than the automatic one by {-result['gain']:.4f}")
        return {
            "kills": killed.moments,
            "identical": True,
            "control": _control(undisturbed.out, folder / "control"),
            **{name: result[name] for name in ("metric", "start", "best", "gain", "trials")},
            "seconds": {"undisturbed": round(seconds, 1), "killed": round(ran, 1)},
            **facts(),
        }


def _control(out: Path, copy: Path) -> list[str]:
    """Changes the last bit of one value, and the choice, in a copy; the comparison has to find both."""
    shutil.copytree(out, copy)
    table = json.loads((copy / "trials.json").read_text())
    table[0]["value"] = float(np.nextafter(table[0]["value"], 1))
    (copy / "trials.json").write_text(json.dumps(table))
    (copy / "config.yaml").write_text((out / "config.yaml").read_text() + "patience: 99\n")
    if (apart := differences(out, copy)) != ["0", "choice"]:
        raise BenchmarkError(f"the comparison does not find what was changed in a copy, but {apart}")
    return apart


def main() -> int:
    """Runs the proof and prints its result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    # The words after the dashes look like options of its own, which argparse would take for unknown ones.
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = parser.parse_args(sys.argv[1:end])
    result = prove(arguments.data, arguments.trials, arguments.kills, arguments.seed, sys.argv[end + 1 :])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
