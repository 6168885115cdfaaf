"""Runs the trials of a study one after another, each a training of its own, until the budget ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from features.errors import TrainingError
from training.config import TrainConfig
from training.run import RunError, read_result
from training.train import train
from training.tuning.journal import (
    TrialRecord,
    best_of,
    curve_of,
    make_trial_folder,
    read_log,
    read_records,
    remove_ended,
    write_records,
)
from training.tuning.search import TrialPlan, propose
from training.tuning.space import Space, describe

OnTrial: TypeAlias = Callable[[dict[str, Any]], None]
_SKIPPED = {"query_steps": 0, "ranker_steps": 0, "tensorboard": False}
"""Settings of trials alone: what they turn off comes after relevance, and changes nothing before it."""


class _Hopeless(Exception):
    """Ends the training of a trial that is pruned."""


class _OutOfTime(Exception):
    """Ends the training of a trial that the budget cuts off."""


@dataclass(frozen=True)
class Budget:
    """The bounds of a search; the first that is reached ends it, None is no bound.

    Attributes:
        trials: Most trials, those that ended in earlier calls included.
        seconds: Most seconds, the trainings of trials that ended in earlier calls included.
        began: `time.monotonic()` at the beginning of this call.
    """

    trials: int | None
    seconds: float | None
    began: float


@dataclass(frozen=True)
class Study:
    """A study that has begun.

    Attributes:
        data: Directory of the canonical tables.
        out: Directory of the study.
        start: The settings of the first trial that are no defaults; without device and threads.
        place: Device and threads of this call.
        space: The settings that are searched.
        name: The start in words: the automatic choice, or the configuration.
    """

    data: Path
    out: Path
    start: dict[str, Any]
    place: dict[str, Any]
    space: Space
    name: str

    @property
    def origin(self) -> dict[str, Any]:
        """The start's values of the settings that are searched."""
        config = TrainConfig(**self.start)
        return {name: getattr(config, name) for name in self.space}


class TrialRunner:
    """Runs trials; `records` are those that have ended."""

    def __init__(self, study: Study, budget: Budget, on_trial: OnTrial | None = None) -> None:
        self.study, self.budget, self.on_trial = study, budget, on_trial
        self.records = read_records(study.out)
        self.deadline: float | None = None
        if budget.seconds is not None:
            self.deadline = budget.began + budget.seconds - sum(record.seconds for record in self.records)

    def run(self) -> str:
        """Runs trials until the budget ends; returns what ended them: trials, minutes, or space if it is exhausted.

        Raises:
            TrainingError: The first trial failed, or no event validates it.
        """
        study = self.study
        seed = TrainConfig(**study.start).seed
        remove_ended(study.out, self.records)
        while self.budget.trials is None or len(self.records) < self.budget.trials:
            if not self._has_time():
                return "minutes"
            plan = propose(self.records, study.space, study.start, study.origin, seed)
            if plan is None:
                return "space"
            record = self._trial(plan)
            if record is None:
                return "minutes"
            self.records.append(record)
            # Written before the training is removed: until then a kill only means to read its result again.
            write_records(study.out, self.records)
            remove_ended(study.out, [record])
            self._tell(record)
            if self.on_trial is not None:
                self.on_trial(asdict(record))
        return "trials"

    def _has_time(self) -> bool:
        """Returns True if a whole training may fit into what is left; the first trial always runs."""
        seconds = [record.seconds for record in self.records if record.state == "complete"]
        return self.deadline is None or not seconds or time.monotonic() + min(seconds) <= self.deadline

    def _trial(self, plan: TrialPlan) -> TrialRecord | None:
        """Trains with the proposed settings, or goes on with it; returns None if the time is over."""
        study, number = self.study, len(self.records)
        settings = {**study.start, **plan.settings, **study.place, **_SKIPPED}
        config = TrainConfig(**settings)
        folder = make_trial_folder(study.out, number, config)
        began = time.monotonic()
        on_step, on_validation = self._callbacks(number, plan, folder, config.epochs)
        try:
            if (folder / "result.json").exists():  # a kill came between the end of the training and its record
                result = read_result(folder)
            else:
                result = train(study.data, folder, config, on_step, on_validation, report=False)
        except _OutOfTime:
            return None
        except _Hopeless:
            return self._record(number, "pruned", plan, folder, config)
        except RunError:
            raise
        except (TrainingError, torch.OutOfMemoryError) as error:
            # Settings on which a training fails, as a learning rate that is too high, tell something as well.
            if not number:
                raise
            seconds = round(time.monotonic() - began, 3)
            return TrialRecord(number, "failed", plan.settings, seconds=seconds, reason=str(error))
        return self._record(number, "complete", plan, folder, config, result)

    def _callbacks(
        self, number: int, plan: TrialPlan, folder: Path, epochs: int
    ) -> tuple[Callable[[int], None], Callable[[Mapping[str, Any]], None]]:
        """Returns the callbacks that end a training early."""
        # That of the newest: the first trial compiles kernels as well.
        tail = next((record.tail_seconds for record in reversed(self.records) if record.state == "complete"), 0.0)
        last = None if self.deadline is None or not number else self.deadline - tail

        def on_step(step: int) -> None:
            if last is not None and time.monotonic() > last:
                raise _OutOfTime

        def on_validation(line: Mapping[str, Any]) -> None:
            # The whole log, since a training that goes on has validations of before its interruption.
            if plan.is_hopeless(curve_of(read_log(folder), epochs)):
                raise _Hopeless

        return on_step, on_validation

    def _record(
        self,
        number: int,
        state: Any,
        plan: TrialPlan,
        folder: Path,
        config: TrainConfig,
        result: Mapping[str, Any] | None = None,
    ) -> TrialRecord:
        log = read_log(folder)
        seconds = float(log[-1]["seconds"])
        value = None
        if result is not None:
            value = result["linear"].get("with")
            if value is None:
                raise TrainingError(
                    "no event validates the trials, so nothing tells which is better: a validation needs four users "
                    "with two events each, and validation_users above 0"
                )
        total = seconds if result is None else float(result["seconds"])
        return TrialRecord(
            number=number,
            state=state,
            settings=plan.settings,
            value=value,
            encoder=max(line["ndcg@10"] for line in log),
            curve=curve_of(log, config.epochs),
            seconds=total,
            tail_seconds=round(max(0.0, total - seconds), 3) if result is not None else 0.0,
        )

    def _tell(self, record: TrialRecord) -> None:
        best = best_of(self.records)
        outcome = {
            "complete": f"ndcg@10 {record.value or 0:.4f}",
            "pruned": f"ended early, encoders at ndcg@10 {record.encoder or 0:.4f}",
            "failed": f"failed: {record.reason}",
        }[record.state]
        name = f"trial {record.number}" + ("" if record.number else f", {self.study.name}")
        line = f"{name}: {describe(record.settings)}: {outcome}; best {best.value or 0:.4f} (trial {best.number})"
        print(f"{line}, {record.seconds:.0f} s", file=sys.stderr, flush=True)
