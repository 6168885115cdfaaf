"""Searches the settings of a training by its validation: `penchant tune`.

Each trial is a training; the first one has the settings that `penchant train` chooses by the data. A trial is judged by
NDCG@10 of relevance on the validation targets, the encoders' inner product and the linear part together. Test targets
are never evaluated: this room does not import `training.evaluation`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from features.errors import SettingsError, TrainingError
from features.tables.dataset import open_dataset
from training.automatic import CONFIG_FILE, settle
from training.config import TrainConfig, resolve_config
from training.run import RunError, identity_of, open_dataset_of_run, write_document, write_items, write_json
from training.tuning.journal import FORMAT, TABLE_FILE, TrialRecord, best_of, claimed, read_study, trial_folder
from training.tuning.space import as_document, default_space, describe, read_space

if TYPE_CHECKING:
    from training.tuning.trials import OnTrial, Study

MINUTES = 15.0
"""Budget of a search that names none."""
_PLACE = ("device", "threads")


def tune(
    data: str | Path,
    out: str | Path,
    config: TrainConfig | str | Path | None = None,
    *,
    minutes: float | None = None,
    trials: int | None = None,
    space: str | Path | Mapping[str, Any] | None = None,
    on_trial: OnTrial | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Searches settings that validate better than the automatic choice; a search that was interrupted goes on.

    With `trials` it ends with the same trials and the same choice, however often it was killed and called again. With
    `minutes` the end depends on the speed of the machine.

    Args:
        data: Directory of the canonical tables.
        out: Directory of the study, see `training.tuning.journal`.
        config: Settings to start from, in place of the automatic choice; as of `train`.
        minutes: Minutes of the search; the first trial always ends. 15 if there is no `trials`.
        trials: Most trials, the start included.
        space: YAML file of the settings to search, or a mapping; None: `training.tuning.space.default_space`.
        on_trial: Called with each trial that has ended, as in `RUN/trials.json`. What it raises ends the search, and
            the same call goes on.
        settings: Settings by name, the same in all trials: they stand and are not searched.

    Returns:
        The content of `RUN/tuning.json`: `metric`, `start` and `best` (each `trial`, `value` and `settings`), `gain`,
        `trials` (numbers by outcome), `ended_by`, `seconds`, `config`, `table`.

    Raises:
        RunError: `out` holds a training, or a study of other settings or data, or another process works on it.
        SettingsError: A setting of a training or of the space is unknown, or its value is not allowed.
        TablesError: As of `train`.
        TrainingError: Optuna is not installed, or the data set cannot be trained on or validated as configured.
    """
    began = time.monotonic()
    _require_optuna()
    from training.tuning.trials import Budget, TrialRunner

    minutes = MINUTES if minutes is None and trials is None else minutes
    if (minutes is not None and not minutes > 0) or (trials is not None and trials < 1):
        raise SettingsError("tune needs a budget: give minutes above 0, or trials of 1 or more")
    data, out = Path(data), Path(out)
    with claimed(out):
        study = _open(data, out, config, space, settings)
        runner = TrialRunner(study, Budget(trials, None if minutes is None else minutes * 60, began), on_trial)
        ended_by = runner.run()
        return _conclude(study, runner.records, ended_by)


def _require_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise TrainingError("optuna is not installed, and tune needs it: pip install 'penchant[tune]'") from None


def _open(
    data: Path,
    out: Path,
    config: TrainConfig | str | Path | None,
    space: str | Path | Mapping[str, Any] | None,
    settings: Mapping[str, Any],
) -> Study:
    """Begins a study, or goes on with the one in `out`."""
    from training.tuning.trials import Study

    pins = resolve_config(None, settings)
    explicit = None if config is None else resolve_config(config, settings)
    request = {"settings": _document(pins), "config": explicit and _document(explicit)}
    record = read_study(out) or _begin(data, out, pins, explicit, space, request)
    start = TrainConfig(**record["start"])
    if space is not None:
        request["space"] = as_document(read_space(space, start, frozenset(pins.model_fields_set)))
    for name, value in request.items():
        if record[name] != value:
            raise RunError(f"{out} holds a study of another {name}: give the same again, or another --out")
    if identity_of(open_dataset_of_run(data, out)) != json.loads((out / "data.json").read_text(encoding="utf-8")):
        raise RunError(f"{out} holds a study of another data set: give another --out, or delete it")
    return Study(
        data=data,
        out=out,
        start=record["start"],
        place={name: getattr(explicit or pins, name) for name in _PLACE},
        space=read_space(record["space"], start, frozenset()),
        name="the configuration" if explicit else "the automatic choice",
    )


def _begin(
    data: Path,
    out: Path,
    pins: TrainConfig,
    explicit: TrainConfig | None,
    space: str | Path | Mapping[str, Any] | None,
    request: dict[str, Any],
) -> dict[str, Any]:
    """Writes down what a study begins with, and returns its record."""
    # A kill, or a refusal of the first training, may have left one that has not begun.
    shutil.rmtree(trial_folder(out, 0), ignore_errors=True)
    dataset = open_dataset(data)
    start = explicit or settle(dataset, out / "automatic", pins)
    pinned = frozenset(pins.model_fields_set)
    searched = default_space(start, pinned) if space is None else read_space(space, start, pinned)
    record = {"format": FORMAT, **request, "start": _document(start), "space": as_document(searched)}
    record["optuna"] = version("optuna")
    identity = identity_of(dataset)
    if "until" in identity:
        write_items(out, dataset.items)
    write_json(out / "data.json", identity)
    write_document(out / "space.yaml", yaml.safe_dump(record["space"], sort_keys=False))
    write_json(out / "study.json", record)
    return record


def _document(config: TrainConfig) -> dict[str, Any]:
    """Returns the settings that are no defaults as JSON has them; device and threads may change at any time."""
    return config.model_dump(mode="json", include=set(config.model_fields_set), exclude=set(_PLACE))


def _conclude(study: Study, records: list[TrialRecord], ended_by: str) -> dict[str, Any]:
    """Writes the chosen settings and the result."""
    best, first = best_of(records), records[0]
    counts: Counter[str] = Counter(record.state for record in records)
    result = {
        "out": str(study.out),
        "metric": "ndcg@10 of relevance on the validation targets",
        "start": {"trial": 0, "name": study.name, "value": first.value, "settings": first.settings},
        "best": {"trial": best.number, "value": best.value, "settings": best.settings},
        "gain": _value(best) - _value(first),
        "trials": {state: counts[state] for state in ("complete", "pruned", "failed")},
        "ended_by": ended_by,
        "seconds": round(sum(record.seconds for record in records), 3),
        "config": str(study.out / CONFIG_FILE),
        "table": str(study.out / TABLE_FILE),
    }
    # With the settings of the start too, not only those that were searched: the file alone trains the same model.
    head = f"# Chosen by `penchant tune`, trial {best.number}: ndcg@10 {best.value:.4f} on validation.\n"
    head += f"# Trial 0, {study.name}, had {first.value:.4f}.\n"
    write_document(study.out / CONFIG_FILE, head + yaml.safe_dump(study.start | best.settings, sort_keys=False))
    write_json(study.out / "tuning.json", result)
    for line in _in_words(study, records, counts, ended_by):
        print(line, file=sys.stderr)
    return result


def _in_words(study: Study, records: list[TrialRecord], counts: Counter[str], ended_by: str) -> Iterator[str]:
    """Tells in a few lines what was tried, what won, and where it was written."""
    best, first = best_of(records), records[0]
    outcomes = ", ".join(f"{count} {state}" for state, count in counts.items())
    yield f"tried: {len(records)} trials ({outcomes}) of {', '.join(study.space)}"
    # Without a second trial nothing was compared, and "no trial was better" would sound like a finding.
    if len(records) == 1 and ended_by == "minutes":
        yield f"the first trial took {first.seconds / 60:.1f} minutes, and no other fits: give more minutes"
    if best is first:
        yield f"won: {study.name}, ndcg@10 {first.value:.4f}; no trial was better"
    else:
        changes = {name: value for name, value in best.settings.items() if value != first.settings[name]}
        gain = f" ({_value(best) / _value(first) - 1:+.1%})" if first.value else ""
        yield f"won: trial {best.number} with {describe(changes)}, ndcg@10 {best.value:.4f}{gain}; " + (
            f"{study.name} had {first.value:.4f}"
        )
    yield f"wrote: {study.out / CONFIG_FILE}, for penchant train --config; {study.out / TABLE_FILE}"


def _value(record: TrialRecord) -> float:
    assert record.value is not None, "neither the first trial nor the best one is without a value"
    return record.value
