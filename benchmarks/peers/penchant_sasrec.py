"""Penchant's own training as one of the trainers that take turns.

`--settings` are {"data": canonical tables, "config": file or shipped name, "set": {setting: value}}. It is
`training.train` itself, with its own validations on the clock.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.peers.turns import Turns, arguments
from training.config import load_config
from training.train import train


class _OverError(Exception):
    """All turns are over."""


def main() -> None:
    """Trains by turns until the input ends or the configuration's epochs do."""
    asked = arguments()
    turns = Turns(asked.validate_every)
    told = asked.settings
    overrides = {**told.get("set", {}), "threads": asked.threads, "query_steps": 0, "ranker_steps": 0}
    config = load_config(told.get("config"), overrides, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "run", "log.jsonl")
        seen = 0

        def on_step(step: int) -> None:
            nonlocal seen
            lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
            for line in map(json.loads, lines[seen:]):
                turns.tokens, turns.targets = line["tokens"], line["tokens"]
                turns.report(line["ndcg@10"])
            seen = len(lines)
            if not turns.step(0, 0):
                raise _OverError

        try:
            train(Path(told["data"]), Path(folder, "run"), config, on_step)
        except _OverError:
            return


if __name__ == "__main__":
    main()
