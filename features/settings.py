"""Loads settings, of the service or of a training, from wherever they are given.

The first place that has a value wins: the command line (options, then `KEY=VALUE`), environment variables, a YAML file,
the class. So each default is written once, in the class. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, SecretStr, ValidationError

from features.environment import Variable, set_by, variables
from features.errors import SettingsError

Model = TypeVar("Model", bound=BaseModel)


def load_settings(
    model: type[Model],
    prefix: str,
    file: Path | None = None,
    assignments: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    *,
    foreign: Collection[str] = (),
) -> Model:
    """Returns the settings of a class.

    Args:
        model: The class; its fields are the settings.
        prefix: Start of the names of its environment variables, in capitals.
        file: YAML file of settings.
        assignments: `KEY=VALUE` texts; the value as a variable has it, see `_parsed`.
        options: Values by setting; they win over the assignments, and None counts as not given.
        foreign: What follows the prefix in variables of other programs, in capitals.

    Raises:
        SettingsError: A key is unknown or a value is not allowed; that of a variable is named by the variable.
    """
    values = _read(file) if file else {}
    overrides = dict(_assigned(model, text) for text in assignments)
    overrides |= {name: value for name, value in (options or {}).items() if value is not None}
    for name in (*values, *overrides):
        _require_known(model, name)
    by_setting = variables(prefix, model.model_fields, os.environ, foreign)
    # A variable that is overridden does not count, so it may hold anything.
    by_setting = {name: variable for name, variable in by_setting.items() if name not in overrides}
    values |= {name: _parsed(model, name, variable.text, variable.name) for name, variable in by_setting.items()}
    try:
        return model(**{**values, **overrides})
    except ValidationError as failure:
        raise SettingsError(_message(model, failure.errors()[0], by_setting)) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read {file}: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{file}: must hold `key: value` lines")
    return values


def _assigned(model: type[BaseModel], text: str) -> tuple[str, Any]:
    """Returns the name and the value of a `KEY=VALUE`."""
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals:
        raise SettingsError(f"{text!r} is not a setting: write KEY=VALUE")
    _require_known(model, name)
    return name, _parsed(model, name, value, name)


def _require_known(model: type[BaseModel], name: str) -> None:
    if name in model.model_fields:
        return
    nearest = difflib.get_close_matches(str(name), model.model_fields, n=1, cutoff=0.5)
    advice = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(model.model_fields)}"
    raise SettingsError(f"unknown setting {name!r}; {advice}")


def _parsed(model: type[BaseModel], name: str, text: str, source: str) -> Any:
    """Returns the value that a text stands for.

    Lists and mappings are YAML, of which JSON is a part. All else stays text and is converted by its type, so that a
    token of digits is no number.

    Raises:
        SettingsError: The text is not YAML, or neither a list nor a mapping.
    """
    kind = get_origin(model.model_fields[name].annotation)
    if kind not in (tuple, dict):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict if kind is dict else list):
        example = "a mapping as {name: 1}" if kind is dict else "a list as [a, b]"
        raise SettingsError(f"{source}: sets {name}; write {example}")
    return value


def _message(model: type[BaseModel], error: Mapping[str, Any], by_setting: Mapping[str, Variable]) -> str:
    """Returns what is wrong with a value and, where a variable set it, which one."""
    if not error["loc"]:  # several settings that do not fit each other
        return f"settings: {error['msg']}{set_by(by_setting, error['msg'])}"
    path, name = ".".join(map(str, error["loc"])), str(error["loc"][0])
    field = model.model_fields[name]
    if variable := by_setting.get(name):
        return f"{variable.name}: {error['msg']}; it sets {path}: {field.description}"
    # The input of a setting that is missing is all the others, secrets included.
    is_shown = error["type"] != "missing" and SecretStr not in get_args(field.annotation)
    return f"{path}: {error['msg']}" + (f" (got {error['input']!r})" if is_shown else "")
