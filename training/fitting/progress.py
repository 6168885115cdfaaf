"""Shows how the encoders' training goes: a bar on a terminal; elsewhere a line for each validation and each minute."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.fitting.tensorboard import LogLine

LINE_SECONDS = 60.0
"""Seconds without a validation after which a line says that the training goes on."""


@dataclass
class TrainingState:
    """The progress of a training, apart from tensors."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    tokens: int = 0
    targets: int = 0
    """Targets trained on since the last validation."""
    validated: float = 0.0
    first: float | None = None
    """The validation before the first step, of a training that begins with an earlier run's weights."""
    best: float = -1.0
    best_step: int = 0
    waited: int = 0
    seconds: float = 0.0
    finished: bool = False

    def passed(self, per_epoch: int) -> float:
        """Returns the epochs passed, given the batches of one."""
        return self.epoch + self.batch / per_epoch

    def rate(self) -> float:
        """Returns the tokens trained on in a second."""
        return self.tokens / max(self.seconds, 1e-9)


class ProgressDisplay:
    """Shows steps and validations on a stream; a context manager, because a bar has to be taken off a terminal."""

    def __init__(self, epochs: float, stream: TextIO | None = None) -> None:
        """Takes the number of epochs planned, and the stream; None is stderr."""
        self.epochs, self.stream = epochs, stream or sys.stderr
        self.shown = time.monotonic()
        self.bar: Progress | None = None
        self.task = TaskID(0)
        if self.stream.isatty():
            columns = (TextColumn("training"), BarColumn(), TextColumn("{task.description}"))
            console = Console(file=self.stream)
            self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("", total=epochs)

    def __enter__(self) -> ProgressDisplay:
        self._held().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held().__exit__(kind, error, trace)

    def _held(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.bar is None else self.bar

    def step(self, state: TrainingState, per_epoch: int) -> None:
        """Shows the state after a step; as a line only if there was none for a minute."""
        if self.bar is not None:
            text = f"epoch {state.epoch + 1}/{self.epochs:g}, {state.rate():,.0f} tokens/s"
            text += f", ndcg@10 {max(0.0, state.best):.4f}"
            self.bar.update(self.task, completed=state.passed(per_epoch), description=text)
        elif time.monotonic() - self.shown >= LINE_SECONDS:
            self._line(state, state.passed(per_epoch), {})

    def validation(self, state: TrainingState, line: LogLine) -> None:
        """Shows a line of `log.jsonl`; a bar shows the best validation anyway."""
        if self.bar is None:
            self._line(state, state.validated, line)

    def _line(self, state: TrainingState, passed: float, line: LogLine) -> None:
        self.shown = time.monotonic()
        names = {"loss": "loss", "validation_loss": "validation loss", "ndcg@10": "ndcg@10"}
        figures = [f"{title} {line[name]:.4f}" for name, title in names.items() if line.get(name) is not None]
        if line and state.best_step != state.step:
            figures.append(f"best {state.best:.4f}")
        parts = [f"epoch {passed:.1f} of {self.epochs:g}", *figures]
        parts += [f"{state.rate():,.0f} tokens/s", f"{state.seconds:,.0f} s"]
        print(f"training: {', '.join(parts)}", file=self.stream, flush=True)
