"""Tables of the settings, from the classes that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import SecretStr

from benchmarks.reports import markdown

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

_WORDS = {int: "integer", float: "number", bool: "true or false", Path: "path", str: "text", SecretStr: "secret"}


def serve_settings() -> str:
    """Returns every setting of `penchant serve`."""
    from serving.config import PREFIX, ServeConfig

    return _settings(ServeConfig, PREFIX)


def train_settings() -> str:
    """Returns every setting of `penchant train`."""
    from training.config import PREFIX, TrainConfig

    return _settings(TrainConfig, PREFIX)


def _settings(config: type[BaseModel], prefix: str) -> str:
    fields = config.model_fields.items()
    rows = [
        [
            f"`{name}`",
            f"`{prefix}{name.upper()}`",
            _kind(field),
            _default(field),
            markdown.escaped(field.description or ""),
        ]
        for name, field in fields
    ]
    return markdown.table(["setting", "variable", "value", "default", "meaning"], rows, align="---")


def _kind(field: FieldInfo) -> str:
    """Returns the values that a setting takes, with their bounds."""
    bounds = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{sign} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, sign in bounds.items()
        if hasattr(bound, name)
    ]
    return markdown.escaped(" ".join([_named(field.annotation), ", ".join(limits)]).strip())


def _named(annotation: Any) -> str:
    """Returns a type in the words of the page."""
    # An optional value reads as its type: the default column says "none".
    inside = [part for part in get_args(annotation) if part not in (type(None), ...)]
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in inside)
    if get_origin(annotation) is Annotated:
        return f"{_named(inside[0])} > 0"
    if get_origin(annotation) in (tuple, list):
        return f"list of {_named(inside[0])}"
    if get_origin(annotation) is dict:
        return f"mapping of {_named(inside[0])} to {_named(inside[1])}"
    if inside:
        return _named(inside[0])
    return _WORDS.get(annotation) or str(annotation.__name__).lower()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    # As an operator would write it in YAML or in a variable.
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return f"`{markdown.escaped(json.dumps(plain))}`"
