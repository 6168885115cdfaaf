from __future__ import annotations

import io
import re

import pytest

from training.fitting.progress import ProgressDisplay, TrainingState


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LINE = {"epoch": 1.0, "step": 4, "seconds": 2.0, "loss": 3.25, "validation_loss": 3.5, "ndcg@10": 0.125, "tokens": 800}


def state(**changes: float) -> TrainingState:
    return TrainingState(**{"epoch": 1, "step": 4, "tokens": 800, "seconds": 2.0, "validated": 1.0, **changes})


def test_without_a_terminal_each_validation_is_a_line() -> None:
    out = io.StringIO()
    with ProgressDisplay(30, out) as display:
        for _ in range(3):
            display.step(state(), 10)
        display.validation(state(best=0.125, best_step=4), LINE)
        display.validation(state(best=0.25, best_step=2), {**LINE, "validation_loss": None})
    assert out.getvalue().splitlines() == [
        "training: epoch 1.0 of 30, loss 3.2500, validation loss 3.5000, ndcg@10 0.1250, 400 tokens/s, 2 s",
        "training: epoch 1.0 of 30, loss 3.2500, ndcg@10 0.1250, best 0.2500, 400 tokens/s, 2 s",
    ]


def test_a_long_epoch_gives_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("training.fitting.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with ProgressDisplay(30, out) as display:
        for second in range(0, 150, 10):
            now[0] = float(second)
            display.step(state(batch=5, seconds=second), 10)
    assert [line.partition(", ")[0] for line in out.getvalue().splitlines()] == ["training: epoch 1.5 of 30"] * 2


def test_a_terminal_shows_a_bar_and_no_lines() -> None:
    out = Terminal()
    with ProgressDisplay(30, out) as display:
        display.step(state(best=0.5), 10)
        display.validation(state(best=0.5), LINE)
    shown = re.sub(r"\x1b\[[0-9;?]*\w", "", out.getvalue())
    assert "training: " not in shown
    assert "ndcg@10 0.5000" in shown
