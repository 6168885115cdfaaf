"""Measures runs: the protocols, and the record that each evaluation leaves with its runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from features.errors import TrainingError
from training.data.split import TestProtocol
from training.evaluation.cold_items import evaluate_cold_items
from training.evaluation.events import evaluate_events
from training.evaluation.impressions import evaluate_impressions
from training.evaluation.search import evaluate_search
from training.report import write_report
from training.run import note_evaluation

_EVENT_PROTOCOLS: tuple[TestProtocol, ...] = get_args(TestProtocol)
_OTHER_PROTOCOLS: dict[str, Callable[[Sequence[Path], Path | None], dict[str, Any]]] = {
    "impressions": evaluate_impressions,
    "search": evaluate_search,
    "cold-items": evaluate_cold_items,
}


def evaluate(
    runs: str | Path | Sequence[str | Path],
    protocol: str | None = None,
    data: str | Path | None = None,
    test: str | Path | None = None,
) -> dict[str, Any]:
    """Measures one run, or several that differ by their seed, on the events that were held out from training.

    Args:
        runs: Directory of a finished run, or directories of several of one data set.
        protocol: `leave-one-out` (the default), `temporal-successive`, `temporal-last`, `impressions`, `search` or
            `cold-items`.
        data: Where the data set is now, if it has moved.
        test: In place of a protocol, a file (Parquet, CSV, TSV) of `user_id`, `item_id` and perhaps `timestamp`: each
            row is ranked after all training events of its user that are not later.

    Returns:
        `protocol`, `runs`, `seeds`, `users`, `targets`, `held_out` (events that the protocol tests; where these times
        the items are more than `EXACT_SCORES`, the targets are a random sample of them), `items`, `cold` (targets that
        no training event names; they are left out of everything but `with_cold` and their part), `metrics` {name:
        {mean, low, high}}, `by_seed`, `baselines` {name: {metric: value}}, `paired` {baseline: {metric: interval of
        model minus baseline}}, `best_baseline` (see `events.best_baseline`), `baselines_left_out` {name: why}, `ease`
        (form, lambda and NDCG@10 on validation by lambda of that baseline, and why that form; None where it is left
        out), `ease_local` (the same of the local form, where it is a baseline too), `with_cold`, `segments`,
        `coverage@10`, `novelty@10`, `blend`, `future_events`, `seconds`; with
        those of `intake.summary`.
        Where some users have several targets also `by_user`: `users`, `metrics`, `baselines`, `paired` and
        `best_baseline` once more, of the means of each user's targets.
        Where there are such also `parts`, of which each has `targets`, `metrics`, `baselines`, `paired`,
        `best_baseline` and perhaps `by_user`: "cold", the targets that no training event names; and where repeats count
        "repeats", the items that their user had before, and "new", those that are new to them, both ranked among all
        items as they are served, and "new_alone", the new ones ranked among the items that are new to their user.
        Of a file also `test`: `file`, `rows`, and those not ranked, `rejected`, `unknown_users`, `unknown_items`,
        `without_history`, `had_before`.

    Raises:
        LeakError: A run was trained on the events that the protocol, or the file, tests.
        TrainingError: The runs cannot be measured together, or the data set lacks a table that the protocol needs.
    """
    paths = [Path(runs)] if isinstance(runs, str | Path) else list(map(Path, runs))
    if not paths:
        raise TrainingError("no run is named: name at least one")
    began = time.monotonic()
    moved = None if data is None else Path(data)
    if test is not None:
        if protocol is not None:
            raise TrainingError(f"a test file is a protocol of its own: leave out {protocol}, or the file")
        evaluation = evaluate_events(paths, "test-file", moved, Path(test))
    else:
        evaluation = _measure(paths, protocol or _EVENT_PROTOCOLS[0], moved)
    evaluation["seconds"] = round(time.monotonic() - began, 3)
    # With each of the runs, since any of them may be looked at, exported or removed alone.
    for run in paths:
        note_evaluation(run, evaluation)
        write_report(paths, run)
    return evaluation


def _measure(runs: Sequence[Path], protocol: str, data: Path | None) -> dict[str, Any]:
    for name in _EVENT_PROTOCOLS:
        if name == protocol:
            return evaluate_events(runs, name, data)
    if protocol not in _OTHER_PROTOCOLS:
        raise TrainingError(f"no protocol {protocol!r}: known are {', '.join([*_EVENT_PROTOCOLS, *_OTHER_PROTOCOLS])}")
    return _OTHER_PROTOCOLS[protocol](runs, data)
