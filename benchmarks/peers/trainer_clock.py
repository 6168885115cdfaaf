"""The common part of the trainers that are compared: the data, the clock of their time slices, and one NDCG.

A trainer is a process. It reads a number of seconds from stdin, trains for about as long, prints `{"paused": true}` and
waits; its clock stands still meanwhile, so a slow moment of the machine hits all trainers alike. End of input ends it.
One line of JSON on stdout per validation. Needs numpy only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

USERS_AT_ONCE = 512


@dataclass(frozen=True)
class SharedHistories:
    """The data that all trainers train on and are validated on, items numbered from 0.

    Attributes:
        rows: Items of the training events of all users, each user's together, oldest first; int64 `[E]`.
        offsets: The events of user `u` are `offsets[u]:offsets[u + 1]`; int64 `[U + 1]`.
        validated: Users of the validation; int64 `[V]`.
        targets: Their next items; int64 `[V]`.
        items: Number of items.
    """

    rows: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    validated: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    items: int

    def save(self, path: Path) -> None:
        """Writes one .npz file."""
        np.savez(
            path,
            rows=self.rows,
            offsets=self.offsets,
            validated=self.validated,
            targets=self.targets,
            items=self.items,
        )

    @classmethod
    def load(cls, path: Path) -> SharedHistories:
        """Reads a file that `save` wrote."""
        with np.load(path) as file:
            return cls(file["rows"], file["offsets"], file["validated"], file["targets"], int(file["items"]))

    def of(self, user: int) -> npt.NDArray[np.int64]:
        """Returns the items of a user's training events, oldest first."""
        return self.rows[self.offsets[user] : self.offsets[user + 1]]

    def ndcg(self, users: npt.NDArray[np.float32], vectors: npt.NDArray[np.float32]) -> float:
        """Returns the mean NDCG@10 of the validation targets, all items ranked, seen ones masked.

        Args:
            users: float32 `[V, D]`, in the order of `validated`.
            vectors: float32 `[items, D]`; a row of NaN is an item that the trainer does not know and cannot recommend.
        """
        values = []
        for start in range(0, self.validated.size, USERS_AT_ONCE):
            scores = users[start : start + USERS_AT_ONCE] @ vectors.T
            # An item that the trainer does not know stays among the targets: not knowing it is its loss.
            scores[:, np.isnan(vectors[:, 0])] = -np.inf
            for line, user in enumerate(self.validated[start : start + USERS_AT_ONCE]):
                scores[line, self.of(user)] = -np.inf
            truth = scores[np.arange(scores.shape[0]), self.targets[start : start + USERS_AT_ONCE]]
            # Ties count against the target, or a trainer whose scores are all equal would be perfect.
            ranks = (scores >= truth[:, None]).sum(1) - 1
            values.append(np.where(np.isfinite(truth) & (ranks < 10), 1 / np.log2(ranks + 2.0), 0.0))
        return float(np.concatenate(values).mean())


def arguments() -> argparse.Namespace:
    """Returns `data` (.npz of `SharedHistories`), `settings` (from JSON), `threads`, `validate_every` (seconds)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validate-every", type=float, default=30.0)
    return parser.parse_args()


class TrainerClock:
    """The clock of one trainer, and its reports; the first time slice begins when it is made."""

    def __init__(self, validate_every: float) -> None:
        self.validate_every = validate_every
        # Libraries print to stdout, which is for the lines that the caller reads.
        # File descriptor 1 becomes stderr, so that even prints of C libraries do not get in between.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.tokens = self.targets = self.steps = 0
        self.setup = self._stopped = 0.0
        self._validated = 0.0
        self.over = False
        self._began = time.monotonic()
        self._slice_ends = 0.0
        self._wait()

    @property
    def seconds(self) -> float:
        """Seconds since the first time slice began, without those spent inside `paused`."""
        return time.monotonic() - self._began - self._stopped

    def step(self, tokens: int, targets: int) -> bool:
        """Counts one step of the optimizer, and waits if the time slice is over; returns False if training is over.

        Args:
            tokens: Events that the encoder read, without padding.
            targets: Events that were predicted.
        """
        # Everything before the first step is set-up: reading, preparing, compiling.
        if not self.steps:
            self.setup = self._validated = self.seconds
        self.steps, self.tokens, self.targets = self.steps + 1, self.tokens + tokens, self.targets + targets
        if self.seconds >= self._slice_ends and not self.over:
            with self.paused():
                self._say({"paused": True})
            self._wait()
        return not self.over

    def due(self) -> bool:
        """Returns True once for each `validate_every` seconds that have passed."""
        if self.steps and self.seconds - self._validated >= self.validate_every:
            self._validated = self.seconds
            return True
        return False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock."""
        began = time.monotonic()
        yield
        self._stopped += time.monotonic() - began

    def report(self, ndcg: float) -> None:
        """Prints a validation: seconds, steps, tokens, targets and NDCG@10."""
        times = {"seconds": round(self.seconds, 3), "setup_seconds": round(self.setup, 3), "steps": self.steps}
        self._say({**times, "tokens": self.tokens, "targets": self.targets, "ndcg@10": ndcg})

    def _wait(self) -> None:
        with self.paused():
            line = sys.stdin.readline()
        self.over = not line.strip()
        self._slice_ends = self.seconds + float(line.strip() or 0)

    def _say(self, content: dict[str, Any]) -> None:
        self._out.write(json.dumps(content) + "\n")
        self._out.flush()
