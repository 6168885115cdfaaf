"""The manifest of a bundle: every field that is read of it has its type and its range, or the bundle is refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from features import strict_json
from features.declared import Declared
from features.errors import BundleError
from features.linear import LinearSpec
from features.transforms import ItemInputShapes

FORMAT = 1
MOST_BYTES = 16 << 20
"""Largest manifest that is read."""

# Bounds far above those of any real bundle: a number of the file decides how much memory is taken.
_LARGEST_FILE = 1 << 44
_LONGEST = 1 << 16
_BUCKETS = 1 << 31
_NAMES = 1 << 12
_LARGEST = 1e30
_HEX = frozenset("0123456789abcdef")
_IDENTITY = ("model", "configuration", "feature_set", "data_fingerprint", "catalog_version")
"""Fields that the bundle id is made of, next to the hashes of the files."""

Check = Callable[[Any], str]
"""Returns what a value should be, "" if it is."""


@dataclass(frozen=True, slots=True)
class FileFacts:
    """The size and the hash of a file, as they were when the bundle was published.

    Attributes:
        size: Bytes.
        sha256: Hash of its content, hexadecimal.
    """

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """An action whose probability the ranker predicts.

    Attributes:
        name: Its name.
        event_type: Type of the events that are the action.
        min_value: Smallest value of an event that counts; None: any does.
        shown_types: Types of the events that show an item and so may lead to the action; none: any may.
    """

    name: str
    event_type: str
    min_value: float | None = None
    shown_types: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ActionSpec:
        """Returns an action of a manifest or of a run's result."""
        shown_types = tuple(values.get("shown_types") or ())
        return cls(values["name"], values["event_type"], values["min_value"], shown_types)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes, names and weights by which the models of a bundle are fed and combined; A actions.

    Attributes:
        dim: Length of the vectors of users, items and queries.
        max_length: Most events that the user encoder reads.
        shapes: Sizes of the inputs of the item encoder and the query encoder.
        event_types: Names of the event types that the user encoder tells apart, in the order of its table.
        seen_types: Names of the event types whose items are not recommended again.
        actions: The actions that the ranker predicts, in the order of its outputs.
        action_weights: What each action is worth; [A].
        base_rates: Log-odds of each action over all impressions, 0 if the run did not measure them; [A].
        surface_rates: Log-odds of each action above `base_rates`, by surface; [A] each.
        blend: Weight of the ranker's utility in the final score.
        repeats: Whether items are recommended again after an event of `seen_types`.
        linear: The linear part of relevance.
        declared: The declared features of the ranker.
    """

    dim: int
    max_length: int
    shapes: ItemInputShapes
    event_types: tuple[str, ...]
    seen_types: tuple[str, ...]
    actions: tuple[ActionSpec, ...]
    action_weights: tuple[float, ...]
    base_rates: tuple[float, ...]
    surface_rates: Mapping[str, tuple[float, ...]]
    blend: float
    repeats: bool
    linear: LinearSpec
    declared: Declared

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Returns the model of a manifest whose fields are checked."""
        return cls(
            dim=values["dim"],
            max_length=values["max_length"],
            shapes=ItemInputShapes(**{field.name: values[field.name] for field in fields(ItemInputShapes)}),
            event_types=tuple(values["event_types"]),
            seen_types=tuple(values["seen_types"]),
            actions=tuple(map(ActionSpec.of, values["actions"])),
            action_weights=tuple(values["action_weights"]),
            base_rates=tuple(values.get("base_rates") or [0.0] * len(values["actions"])),
            surface_rates={name: tuple(rates) for name, rates in (values.get("surface_rates") or {}).items()},
            blend=float(values["blend"]),
            repeats=values["repeats"],
            linear=LinearSpec.of(values.get("linear")),
            declared=Declared.of(values.get("features") or (), values["event_types"]),
        )

    @property
    def action_names(self) -> list[str]:
        """Names of the actions, in the order of the ranker's outputs."""
        return [action.name for action in self.actions]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of a bundle.

    Attributes:
        bundle_id: Id that the manifest states.
        content_id: Id that its content gives; another than `bundle_id` in a manifest that was changed.
        files: Size and hash of each file, by name.
        model: Sizes, names and weights of the models.
        feature_fingerprint: Fingerprint of the features that the models were trained on.
        catalog_version: Version of the catalogue log that the tables of items were cut at; 0: before any.
        candidates: Candidates that evaluation ranked for each request; None if the run did not say.
    """

    bundle_id: str
    content_id: str
    files: Mapping[str, FileFacts]
    model: ModelSpec
    feature_fingerprint: str
    catalog_version: int
    candidates: int | None

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(facts.size for facts in self.files.values())


def parse(content: bytes, path: str) -> Manifest:
    """Reads a manifest.

    Args:
        content: The file.
        path: Its path, for messages.

    Raises:
        BundleError: It is not JSON, is of another format, or a field is missing or out of range.
    """
    try:
        document = strict_json.loads(content)
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error}); publish the bundle again") from error
    # Before all fields: a later format may have others, and its number says more than the first that is missing.
    if not isinstance(document, dict) or type(document.get("format")) is not int or document["format"] != FORMAT:
        version = document.get("format") if isinstance(document, dict) else None
        raise BundleError(f"{path}: format {_short(version)}, this version reads {FORMAT}; export the run again")
    _check_document(document, path)
    return Manifest(
        bundle_id=document["bundle_id"],
        content_id=content_id(document),
        files={name: FileFacts(facts["size"], facts["sha256"]) for name, facts in document["files"].items()},
        model=ModelSpec.of(document["model"]),
        feature_fingerprint=document["feature_set"]["fingerprint"],
        catalog_version=document["catalog_version"],
        candidates=document["configuration"].get("candidates"),
    )


def content_id(document: Mapping[str, Any]) -> str:
    """Returns the id of a bundle, made of the hashes of its files and of what its manifest says of the models."""
    # Sorted, so that a manifest whose fields stand in another order is the same bundle.
    content = {
        "files": {name: document["files"][name]["sha256"] for name in sorted(document["files"])},
        **{name: document.get(name) for name in _IDENTITY},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _check_document(document: dict[str, Any], path: str) -> None:
    _check(document, _FIELDS, path)
    for name, facts in document["files"].items():
        _check(facts, _FILE, path, f"files.{name}.")
    _check(document["feature_set"], {"fingerprint": _text}, path, "feature_set.")
    _check(document["configuration"], {}, path, "configuration.", {"candidates": _whole(1, _BUCKETS)})
    _check_model(document["model"], path)


def _check_model(model: dict[str, Any], path: str) -> None:
    _check(
        model,
        _MODEL,
        path,
        "model.",
        {"base_rates": _list(_number()), "surface_rates": _mapping, "linear": _mapping, "features": _list(_mapping)},
    )
    # A bundle of an earlier version has none.
    if model.get("linear") is not None:
        _check(model["linear"], _LINEAR, path, "model.linear.")
    try:
        Declared.of(model.get("features") or (), model["event_types"])
    except ValueError as error:
        raise BundleError(f"{path}: model.features: {error}; publish the bundle again") from error
    for at, action in enumerate(model["actions"]):
        _check(action, _ACTION, path, f"model.actions[{at}].", {"shown_types": _list(_text)})
    count = len(model["actions"])
    by_action = {name: model[name] for name in ("action_weights", "base_rates") if model.get(name) is not None}
    by_action |= {f"surface_rates[{name!r}]": rates for name, rates in (model.get("surface_rates") or {}).items()}
    # A shorter list would fail in the first request, a longer one would be read silently.
    for name, numbers in by_action.items():
        if (wrong := _list(_number())(numbers)) or len(numbers) != count:
            raise _error(path, f"model.{name}", numbers, wrong or f"a list of {count} numbers, one for each action")


def _check(
    values: Any, required: Mapping[str, Check], path: str, above: str = "", optional: Mapping[str, Check] | None = None
) -> None:
    """Refuses an object that lacks a required field, or has a field that is not what it should be."""
    if not isinstance(values, dict):
        raise _error(path, above.rstrip("."), values, "an object")
    for name, check in required.items():
        if name not in values:
            raise BundleError(f"{path}: has no {above + name!r}; publish the bundle again")
        if should := check(values[name]):
            raise _error(path, above + name, values[name], should)
    for name, check in (optional or {}).items():
        if values.get(name) is not None and (should := check(values[name])):
            raise _error(path, above + name, values[name], should)


def _error(path: str, name: str, value: Any, should: str) -> BundleError:
    return BundleError(f"{path}: {name} is {_short(value)}, should be {should}; publish the bundle again")


def _short(value: Any) -> str:
    # A value of a hostile file may be megabytes long, and the message goes into a log.
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> str:
        # Not isinstance: true and false are integers in Python, and numbers nowhere else.
        sound = type(value) is int and low <= value <= high
        return "" if sound else f"a whole number from {low} to {high}"

    return check


def _number(low: float = -_LARGEST, high: float = _LARGEST) -> Check:
    def check(value: Any) -> str:
        sound = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
        return "" if sound else f"a number from {low:g} to {high:g}"

    return check


def _text(value: Any) -> str:
    sound = isinstance(value, str) and 0 < len(value) <= _NAMES and "\x00" not in value
    return "" if sound else f"a text of 1 to {_NAMES} characters"


def _hex(length: int) -> Check:
    def check(value: Any) -> str:
        sound = isinstance(value, str) and len(value) == length and _HEX.issuperset(value)
        return "" if sound else f"{length} hexadecimal digits"

    return check


def _flag(value: Any) -> str:
    return "" if isinstance(value, bool) else "true or false"


def _mapping(value: Any) -> str:
    return "" if isinstance(value, dict) else "an object"


def _list(check: Check, unique: bool = False) -> Check:
    def check_all(values: Any) -> str:
        if not isinstance(values, list) or len(values) > _NAMES:
            return f"a list of at most {_NAMES}"
        wrong = next(filter(None, map(check, values)), "")
        if wrong:
            return f"a list, each of it {wrong}"
        return "a list that names nothing twice" if unique and len(set(values)) != len(values) else ""

    return check_all


def _actions(values: Any) -> str:
    if wrong := _list(_mapping)(values):
        return wrong
    names = [value.get("name") for value in values]
    return "a list of objects, each with a name of its own" if _list(_text, unique=True)(names) else ""


_FILE: Mapping[str, Check] = {"size": _whole(0, _LARGEST_FILE), "sha256": _hex(64)}
_FIELDS: Mapping[str, Check] = {
    "bundle_id": _hex(16),
    "files": _mapping,
    "model": _mapping,
    "configuration": _mapping,
    "feature_set": _mapping,
    "catalog_version": _whole(0, 2**63 - 1),
}
_SHAPES: Sequence[str] = ("token_buckets", "category_buckets", "creator_buckets")
_MODEL: Mapping[str, Check] = {
    "dim": _whole(1, _LONGEST),
    "max_length": _whole(1, _LONGEST),
    "max_tokens": _whole(1, _LONGEST),
    "max_categories": _whole(1, _LONGEST),
    **dict.fromkeys(_SHAPES, _whole(1, _BUCKETS)),
    "event_types": _list(_text, unique=True),
    "seen_types": _list(_text, unique=True),
    "actions": _actions,
    "action_weights": _list(_number()),
    "blend": _number(0.0, 1e6),
    "repeats": _flag,
}
_LINEAR: Mapping[str, Check] = {
    **dict.fromkeys(("weight", "count_weight", "recency_weight"), _number(-1e6, 1e6)),
    **dict.fromkeys(("decay", "recency_decay"), _number(0.0, 1.0)),
}
_ACTION: Mapping[str, Check] = {
    "name": _text,
    "event_type": _text,
    "min_value": lambda value: "" if value is None else _number()(value),
}
