"""Penchant's own training as one of the alternating trainers.

`--settings` are {"data": canonical tables, "config": file or shipped name, "set": {setting: value}}. It is
`training.train` itself, with its own validations on the clock.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.peers.trainer_clock import TrainerClock, arguments
from training.config import load_config
from training.train import train


class _OverError(Exception):
    """The caller gives the trainer no more time."""


def main() -> None:
    """Trains in time slices until the input ends or the configuration's epochs do."""
    options = arguments()
    clock = TrainerClock(options.validate_every)
    settings = options.settings
    # The peers train no heads, so the time of Penchant's own is left out.
    overrides = {**settings.get("set", {}), "threads": options.threads, "query_steps": 0, "ranker_steps": 0}
    config = load_config(settings.get("config"), overrides, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "run", "log.jsonl")
        reported = 0

        def on_step(step: int) -> None:
            nonlocal reported
            lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
            for line in map(json.loads, lines[reported:]):
                clock.tokens, clock.targets = line["tokens"], line["tokens"]
                clock.report(line["ndcg@10"])
            reported = len(lines)
            if not clock.step(0, 0):
                raise _OverError

        try:
            train(Path(settings["data"]), Path(folder, "run"), config, on_step)
        except _OverError:
            return


if __name__ == "__main__":
    main()
