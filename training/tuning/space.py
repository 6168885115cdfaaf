"""The settings that `penchant tune` searches: for each the values to choose from, or a range.

By default a small space around the start, whose sizes have been chosen by the data already; a file or a mapping
replaces it:

    dim: [64, 128]
    learning_rate: {low: 0.0005, high: 0.01, log: true}
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import ValidationError

from features.errors import SettingsError
from training.config import TrainConfig

WIDEST_DROPOUT = 0.6
RATE_FACTOR = 4.0
"""Learning rates from the start's by this factor down, and up."""
SMALLEST_DIM = 16

_TARGETS = frozenset(
    """
    protocol test_share test_days cold_item_share validation_users target_types target_min_value seen_types repeats
    ordered seed ranker_days ranker_validation_days max_rejected_share
    """.split()  # noqa: SIM905 - a list would take a line for each word
)
"""Settings that decide which events validate: two values of them cannot be compared."""
_UNJUDGED = frozenset(
    """
    actions action_weights recent_days query_steps methods statistics_hours candidates device threads
    checkpoint_seconds loss_chunk tensorboard
    """.split()  # noqa: SIM905
)
"""Settings on which relevance does not depend; so it is with all whose names begin with `ranker_`."""


@dataclass(frozen=True)
class Choices:
    """The values that a setting may have, two or more; there is no order among them."""

    values: tuple[bool | int | float | str, ...]

    def document(self) -> list[Any]:
        """Returns the choices as a file has them."""
        return list(self.values)

    def holds(self, value: Any) -> bool:
        """Returns True for one of the values."""
        return value in self.values

    def written(self, value: Any) -> Any:
        """Returns a value as a trial tries it."""
        return value


@dataclass(frozen=True)
class Range:
    """The bounds between which a setting may lie, both included; integers if both are integers.

    Attributes:
        low: The lower bound.
        high: The upper bound.
        log: Each factor is as likely as any other, and not each difference.
        step: Difference of neighbouring values; None: of integers 1, else any.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def document(self) -> dict[str, Any]:
        """Returns the range as a file has it."""
        optional = {"log": True} if self.log else {"step": self.step} if self.step is not None else {}
        return {"low": self.low, "high": self.high, **optional}

    def holds(self, value: Any) -> bool:
        """Returns True for a number between the bounds, and on a step."""
        is_inside = isinstance(value, int | float) and self.low <= value <= self.high
        return is_inside and (self.step is None or _is_whole((value - self.low) / self.step))

    def written(self, value: Any) -> Any:
        """Returns a value as a trial tries it: three significant digits are all that a training can tell apart."""
        if isinstance(value, int):
            return value
        digits = 3 if self.step is None else 12
        return min(max(float(f"{value:.{digits}g}"), self.low), self.high)


Space: TypeAlias = Mapping[str, Choices | Range]
"""The settings to search, by name."""


def default_space(start: TrainConfig, pinned: frozenset[str]) -> dict[str, Choices | Range]:
    """Returns the space around a start: its sizes, regularisation, learning rate and length of training.

    Args:
        start: The settings of the first trial, which lie inside.
        pinned: Settings that are not searched.

    Raises:
        SettingsError: All of them are pinned.
    """
    dims = {max(SMALLEST_DIM, start.dim // 2), start.dim, start.dim * 2}
    rate, tokens = start.learning_rate, start.batch_tokens
    space: dict[str, Choices | Range] = {
        "dim": Choices(tuple(sorted(dim for dim in dims if dim % start.heads == 0))),
        "layers": Choices(tuple(sorted({max(1, start.layers - 1), start.layers, start.layers + 1}))),
        "dropout": Range(0.0, max(WIDEST_DROPOUT, start.dropout)),
        "learning_rate": Range(_three(rate / RATE_FACTOR), _three(rate * RATE_FACTOR), log=True),
        "batch_tokens": Choices(tuple(sorted({max(16, tokens // 2), tokens, tokens * 2}))),
        # Fewer need no trial: a training that has learned all it can is stopped by its validation.
        "epochs": Choices((start.epochs, start.epochs * 2)),
    }
    space = {name: space[name] for name in TrainConfig.model_fields if name in space and name not in pinned}
    if not space:
        raise SettingsError(f"every setting that tune searches has a value: leave out one of {', '.join(pinned)}")
    return space


def _is_whole(steps: float) -> bool:
    return abs(steps - round(steps)) < 1e-8


def _three(value: float) -> float:
    return float(f"{value:.3g}")


def read_space(
    source: str | Path | Mapping[str, Any], start: TrainConfig, pinned: frozenset[str]
) -> dict[str, Choices | Range]:
    """Reads a space from a YAML file or from a mapping of the same form.

    Args:
        source: The file, or the mapping.
        start: The settings that a setting's values must fit.
        pinned: Settings with a value of their own, which cannot be searched as well.

    Raises:
        SettingsError: A setting is unknown or cannot be searched, or its values are none that it may have.
    """
    document = source if isinstance(source, Mapping) else _read(Path(source))
    if not document:
        raise SettingsError("the space is empty: name settings with a list of values or {low: ..., high: ...}")
    for name in document:
        _require_searchable(str(name))
        if name in pinned:
            raise SettingsError(f"space: {name} has a value by --set or a variable too: leave out one of the two")
    # In one order whatever that of the file: the settings of a proposal are drawn one after another.
    return {name: _parsed(name, document[name], start) for name in TrainConfig.model_fields if name in document}


def as_document(space: Space) -> dict[str, Any]:
    """Returns a space in the form of a file; `read_space` reads it back."""
    return {name: values.document() for name, values in space.items()}


def _read(file: Path) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read {file}: {error}") from None
    if document is not None and not isinstance(document, Mapping):
        raise SettingsError(f"{file}: must hold lines of a setting and its values, as `dim: [64, 128]`")
    return document or {}


def _require_searchable(name: str) -> None:
    if name in _TARGETS:
        raise SettingsError(f"space: {name} decides which events validate, so its values cannot be compared; remove it")
    if name in _UNJUDGED or name.startswith("ranker_"):
        raise SettingsError(f"space: relevance, by which tune judges, does not depend on {name}; remove it")
    if name not in TrainConfig.model_fields:
        nearest = difflib.get_close_matches(name, TrainConfig.model_fields, n=1, cutoff=0.5)
        advice = f"did you mean {nearest[0]!r}?" if nearest else "docs/settings.md lists them"
        raise SettingsError(f"space: unknown setting {name!r}; {advice}")


def _parsed(name: str, values: Any, start: TrainConfig) -> Choices | Range:
    if isinstance(values, Mapping):
        return _range(name, values, start)
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise SettingsError(f"space: {name}: write a list of values or {{low: ..., high: ...}} (got {values!r})")
    choices = tuple(dict.fromkeys(_value(name, value, start) for value in values))
    if len(choices) < 2:
        raise SettingsError(f"space: {name}: needs two values or more; a single one goes to --set {name}=VALUE")
    return Choices(choices)


def _range(name: str, values: Mapping[str, Any], start: TrainConfig) -> Range:
    if unknown := sorted(str(key) for key in values if key not in ("low", "high", "log", "step")):
        raise SettingsError(f"space: {name}: unknown {unknown[0]!r}; a range has low, high, and perhaps log or step")
    if missing := [key for key in ("low", "high") if key not in values]:
        raise SettingsError(f"space: {name}: a range needs {missing[0]}")
    low, high = (_value(name, values[key], start) for key in ("low", "high"))
    if any(isinstance(bound, bool | str) for bound in (low, high)):
        raise SettingsError(f"space: {name} is no number: write a list of values")
    log, step = values.get("log", False), values.get("step")
    if not low < high:
        raise SettingsError(f"space: {name}: low ({low}) must be below high ({high})")
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        raise SettingsError(f"space: {name}: log is true or false, and where it is true low is above 0 without a step")
    kinds = int if isinstance(low, int) else (int, float)
    if step is not None and not (isinstance(step, kinds) and type(step) is not bool and 0 < step <= high - low):
        kind = "an integer" if kinds is int else "a number"
        raise SettingsError(f"space: {name}: step must be {kind} above 0 and at most high - low (got {step!r})")
    if step is not None and not _is_whole((high - low) / step):
        raise SettingsError(f"space: {name}: high must lie a whole number of steps of {step} above low")
    return Range(low, high, log, step)


def _value(name: str, value: Any, start: TrainConfig) -> Any:
    """Returns a value as the setting has it: YAML reads 1e-3 as a text."""
    try:
        config = TrainConfig(**{**start.model_dump(), name: value})
    except ValidationError as failure:
        # Without a place, two settings do not fit each other; other values of a trial may.
        if error := next((error for error in failure.errors() if error["loc"]), None):
            raise SettingsError(f"space: {name}: {error['msg']} (got {value!r})") from None
        return value
    result = getattr(config, name)
    if not isinstance(result, bool | int | float | str):
        raise SettingsError(f"space: {name} is a list or a mapping, which tune does not search; remove it")
    return result


def fits(start: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Returns True if settings fit each other and the start's."""
    try:
        TrainConfig(**{**start, **settings})
    except ValidationError:
        return False
    return True


def describe(settings: Mapping[str, Any]) -> str:
    """Returns settings in words, as `dim 64, dropout 0.2`."""
    return ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
    )
