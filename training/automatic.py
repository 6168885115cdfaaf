"""Chooses the settings of a training by what its data are, where no configuration says otherwise.

The rules come out at `configs/movielens.yaml` and `configs/amazon.yaml` for the data of these files, which reach the
published quality there; between and beyond them the sizes decide. A setting that is given explicitly always stands.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from features.private_files import make_folders
from features.tables.dataset import Dataset
from training.config import Action, TrainConfig
from training.data.interactions import Interactions, item_vocabulary, read_interactions
from training.data.split import split
from training.data.survey import DataSurvey, survey
from training.run import read_config, write_document

CONFIG_FILE = "config.yaml"
"""The settings of an automatic run below its directory, for `--config`."""
SPARSE = 50
"""Events per item below which an item's own vector has little to learn from."""
SMALL = 50_000
"""Events below which a second block of the encoder would mostly memorise."""
STEPS = 2_000
"""Steps that a training should have at least; both shipped configurations have more."""
LEARNED_EVENTS = 60_000_000
"""Events that a training reads over all epochs, where it has the choice: half a day on two cores."""
_LENGTHS = (50, 100, 200)
_PLACE = ("device", "threads")
_VALIDATED_EVENTS = 300_000  # events that a validation reads: some seconds


def settle(dataset: Dataset, out: Path, given: TrainConfig) -> TrainConfig:
    """Completes the settings of a run: those of its start if it is resumed, else by a survey of its training part.

    Writes `RUN/config.yaml` and tells on stderr what was found and chosen.

    Args:
        dataset: The canonical tables.
        out: Directory of the run.
        given: The settings that are explicit (`model_fields_set`) stand.

    Raises:
        TrainingError: The data set cannot be trained on as configured.
    """
    explicit = {name: getattr(given, name) for name in given.model_fields_set}
    if (out / "config.json").exists():
        # A survey could come out differently after an upgrade, and no run may change its settings half-way.
        place = {name: getattr(given, name) for name in _PLACE}
        return read_config(out).model_copy(update=explicit | place)
    make_folders(out)
    facts = survey_dataset(dataset, out, given)
    chosen = {name: value for name, value in choose(facts).items() if name not in explicit}
    # Validated together: explicit settings and chosen ones have to fit each other.
    config = TrainConfig(**{**chosen, **explicit})
    file = out / CONFIG_FILE
    found = f"found: {describe(facts, config.target_min_value)}"
    write_document(file, _as_yaml(config, found))
    print(found, file=sys.stderr)
    print(f"chose: {', '.join(f'{name} {_word(value)}' for name, value in chosen.items())}", file=sys.stderr)
    print(f"wrote: {file}, which --config reads back; --set KEY=VALUE replaces a choice", file=sys.stderr)
    return config


def survey_dataset(dataset: Dataset, folder: Path, config: TrainConfig) -> DataSurvey:
    """Surveys what a training with these settings would learn from: no event that is held out decides a setting."""
    _, vocabulary = item_vocabulary(dataset)
    # As it lies in the files and with repeats, since both are still to be found out.
    has_order = dataset.stream.has_order or ("ordered" in config.model_fields_set and config.ordered)
    as_it_lies = config.model_copy(update={"repeats": True, "ordered": has_order})
    data = read_interactions(dataset, vocabulary, as_it_lies, folder)
    names = [str(name) for name in vocabulary.names.to_pylist()]
    return survey(data, split(data, config).train_end, names, config.seed, has_order=has_order)


def choose(facts: DataSurvey) -> dict[str, Any]:
    """Returns the settings that fit a data set."""
    sparse = facts.events < SPARSE * max(1, facts.items)
    small = facts.events < SMALL
    # Three quarters of the users are read whole; a longer input costs more than it tells, by the square of its length.
    max_length = next((length for length in _LENGTHS if facts.long_length <= length), _LENGTHS[-1])
    batch_tokens = _batch_tokens(facts.events, sparse)
    per_epoch = max(1, round(facts.events / batch_tokens))
    # Twelve epochs by the shipped configurations; small data repeat until the steps are enough, large ones stop
    # earlier. Validation ends a training that has nothing more to learn.
    epochs = int(np.clip(-(-STEPS // per_epoch), 12, 60))
    epochs = max(1, min(epochs, LEARNED_EVENTS // max(1, facts.events)))
    settings: dict[str, Any] = {
        "ordered": facts.ordered,
        "repeats": facts.repeats,
        "max_length": max_length,
        # Few events per item: wide vectors, which start from co-occurrence, and much dropout (Amazon); else items
        # learn their own vectors, and half the width does (MovieLens).
        "dim": 128 if sparse and not small else 64,
        "layers": 1 if small else 2,
        "dropout": 0.4 if sparse or small else 0.2,
        "batch_tokens": batch_tokens,
        # A small batch has a noisy gradient, and a rare item's vector must not be thrown about by it.
        "learning_rate": 0.001 if sparse or batch_tokens < 1024 else 0.003,
        "epochs": epochs,
        "warmup_steps": min(200, per_epoch * epochs // 10),
        "patience": max(6, epochs // 4),
        "validation_users": int(
            np.clip(_VALIDATED_EVENTS / max(1.0, min(facts.mean_length, max_length)), 3_000, 30_000)
        ),
    }
    if facts.ratings is not None and facts.ratings.least is not None:
        settings["target_min_value"] = facts.ratings.least
    # What a user has had may stand far down by relevance, and the ranker must still see it (groceries.yaml).
    return settings | ({"candidates": 1000} if facts.repeats else {})


def _batch_tokens(events: int, sparse: bool) -> int:
    """Returns the events of a batch: a power of two that makes at least a hundred steps of an epoch, if it can."""
    usual = 1024 if sparse else 2048
    if events > 50_000_000:
        usual = 8192
    elif events > 10_000_000:
        usual = 4096
    return int(np.clip(1 << max(0, (events // 100).bit_length() - 1), 256, usual))


def describe(facts: DataSurvey, least_value: float | None = None) -> str:
    """Tells in one line what a survey found, and what ratings count as with `least_value` as `target_min_value`."""
    order = facts.order
    measured = f"neighbouring events {order.effect:+.0%} as alike as any two, t {order.likeness:.1f}"
    measured += f", transitions t {order.transitions:.1f}, {order.users:,} users"
    verdict = {
        "unknown": "no time and no sequence, so the order of events is unknown and those held out are drawn at random",
        "signal": "order carries signal",
        "none": "order carries no signal",
        "sorted": f"events without times are sorted by {order.sorted_by}, which is no order of time",
        "unclear": "too few users to tell if order carries signal, so it is kept",
    }[order.order]
    repeats = "repeats are recommended" if facts.repeats else "only new items are recommended"
    judged = verdict if order.order == "unknown" else f"{verdict} ({measured})"
    return (
        f"{judged}; {repeats} ({facts.repeated:.1%} of events repeat an earlier one); "
        f"{facts.users:,} users, {facts.items:,} items, {facts.events:,} training events, "
        f"median history {facts.median_length}"
        f"{'; ' + facts.ratings.in_words(least_value) if facts.ratings else ''}"
    )


def _as_yaml(config: TrainConfig, found: str) -> str:
    """Returns the settings that differ from the defaults or were chosen; the device and the threads are no setting."""
    values = config.model_dump(mode="json", include=set(config.model_fields_set), exclude=set(_PLACE))
    head = f"# Chosen by `penchant train` without --config.\n# {found}\n"
    return head + yaml.safe_dump(values, sort_keys=False)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def default_actions(data: Interactions, config: TrainConfig) -> tuple[Action, ...]:
    """Returns one action per event type that is ever predicted, of events that are not below `target_min_value`."""
    least: dict[str, float] = {}
    if config.target_min_value is not None:
        # A type without values has none to compare, and all of its events count.
        valued = types_of(data, ~np.isnan(data.values))
        least = dict.fromkeys(valued, config.target_min_value)
    return tuple(
        Action.model_validate({"name": name, "event_type": name, "min_value": least.get(name)})
        for name in types_of(data, data.target)
    )


def types_of(data: Interactions, chosen: npt.NDArray[np.bool_]) -> list[str]:
    """Returns the names of the event types that occur among the chosen events, sorted."""
    counts = np.zeros(1 + len(data.event_types), np.int64)
    for block in data.blocks():
        counts += np.bincount(data.types[block.events][chosen[block.events]], minlength=counts.size)
    return [name for name, count in zip(data.event_types, counts[1:], strict=True) if count]
