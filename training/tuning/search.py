"""Proposes the settings of each trial, and tells early which trials are hopeless, with Optuna.

The study is built again for each trial from those that have ended, and the seed of its sampler comes from the trial's
number. So what a trial tries depends on its number and on the trials before it alone: a search that was killed proposes
the same as one that was not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from training.tuning.journal import PARTS, TrialRecord
from training.tuning.space import Choices, Range, Space, fits

FIRST_TRIALS = 5
"""Trials, the start included, before the sampler learns from them; each keeps about half of the start's settings."""
JUDGED_FROM = 3
"""Part of a training, of `PARTS`, at whose end it is first compared with others."""
COMPLETE_FIRST = 3
"""Complete trials that there have to be before any is pruned."""
ATTEMPTS = 60
"""Proposals for one trial, after which the space counts as exhausted; the later half is drawn without learning."""


@dataclass(frozen=True)
class TrialPlan:
    """The settings that a trial tries, and the trial in its study; the start has none, and is never pruned."""

    settings: dict[str, Any]
    trial: optuna.Trial | None

    def is_hopeless(self, curve: Mapping[int, float]) -> bool:
        """Returns True if the training should end: its best so far is below the median of the complete trials."""
        trial, last = self.trial, max(curve, default=0)
        # At its end all that is left is the linear part, by which a trial is judged.
        if trial is None or last >= PARTS:
            return False
        reported = trial.study.trials[trial.number].intermediate_values
        for part in sorted(curve.keys() - reported.keys()):
            trial.report(curve[part], part)
        with _quiet():
            return bool(trial.should_prune())


def propose(
    records: Sequence[TrialRecord], space: Space, start: Mapping[str, Any], origin: Mapping[str, Any], seed: int
) -> TrialPlan | None:
    """Proposes settings that no trial has tried.

    Args:
        records: The trials that have ended, in order.
        space: The settings that are searched.
        start: All settings of the start.
        origin: Its values of those that are searched, which the first trial tries.
        seed: Seed of the study.

    Returns:
        None if the space seems to hold no others.
    """
    if not records:
        return TrialPlan(dict(origin), None)
    distributions = {name: _distribution(values) for name, values in space.items()}
    tried = [record.settings for record in records]
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([seed, len(records), attempt])
        learns = attempt < ATTEMPTS // 2
        with _quiet():
            study = study_of(records, space, int(rng.integers(1 << 31)), learns)
            if len(records) < FIRST_TRIALS and learns:
                study.enqueue_trial(_half(origin, space, rng))
            trial = study.ask(distributions)
        settings = {name: space[name].written(trial.params[name]) for name in space}
        if settings not in tried and fits(start, settings):
            return TrialPlan(settings, trial)
    return None


def study_of(records: Sequence[TrialRecord], space: Space, seed: int = 0, learns: bool = True) -> optuna.Study:
    """Builds Optuna's study of trials that have ended.

    Args:
        records: The trials; one with settings outside the space, which only the start can be, is left out.
        space: The settings that are searched.
        seed: Seed of its next proposal.
        learns: Propose by TPE (arXiv:2304.11127), and not at random.
    """
    sampler = optuna.samplers.TPESampler(n_startup_trials=FIRST_TRIALS, seed=seed)
    study = optuna.create_study(
        direction="maximize",
        sampler=sampler if learns else optuna.samplers.RandomSampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=COMPLETE_FIRST, n_warmup_steps=JUDGED_FROM),
    )
    distributions = {name: _distribution(values) for name, values in space.items()}
    for record in records:
        if all(values.holds(record.settings[name]) for name, values in space.items()):
            study.add_trial(_frozen(record, distributions))
    return study


def _frozen(record: TrialRecord, distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    # TPE passes over a trial that failed; one that was pruned before its first validation counts as the worst.
    is_complete = record.state == "complete"
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if is_complete else TrialState.PRUNED,
        value=record.value if is_complete else None,
        params=record.settings,
        distributions=distributions,
        intermediate_values={} if record.state == "failed" else record.curve,
    )


def _half(origin: Mapping[str, Any], space: Space, rng: np.random.Generator) -> dict[str, Any]:
    """Draws about half of the start's settings: near a start that fits the data more is found than far from it."""
    kept = rng.random(len(space)) < 0.5
    return {
        name: origin[name] for name, keep in zip(space, kept, strict=True) if keep and space[name].holds(origin[name])
    }


def _distribution(values: Choices | Range) -> BaseDistribution:
    if isinstance(values, Choices):
        return CategoricalDistribution(values.values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, values.log, int(values.step or 1))
    return FloatDistribution(values.low, values.high, values.log, values.step)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Optuna's log to warnings: it tells of every study, and there is one for each trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
