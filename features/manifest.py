"""The manifest of a bundle: every field that is read of it has its type and its range, or the bundle is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from features import strict_json
from features.errors import BundleError

FORMAT = 1
MOST_BYTES = 16 << 20
"""Largest manifest that is read."""

_LARGEST_FILE = 1 << 44
_LONGEST = 1 << 16
_BUCKETS = 1 << 31
_NAMES = 1 << 12
_LARGEST = 1e30
_HEX = frozenset("0123456789abcdef")

Check = Callable[[Any], str]
"""Returns what a value should be, "" where it is."""


def parse(content: bytes, where: str) -> dict[str, Any]:
    """Reads a manifest.

    Args:
        content: The file.
        where: Its path, for messages.

    Raises:
        BundleError: It is not JSON, is of another format, or a field is missing or out of range.
    """
    try:
        manifest = strict_json.loads(content)
    except ValueError as error:
        raise BundleError(f"{where}: not JSON ({error}); publish the bundle again") from error
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int or manifest["format"] != FORMAT:
        version = manifest.get("format") if isinstance(manifest, dict) else None
        raise BundleError(f"{where}: format {_short(version)}, this version reads {FORMAT}; export the run again")
    _check(manifest, _FIELDS, where)
    for name, facts in manifest["files"].items():
        _check(facts, _FILE, where, f"files.{name}.")
    _check(manifest["feature_set"], {"fingerprint": _text}, where, "feature_set.")
    _check(manifest["configuration"], {}, where, "configuration.", {"candidates": _whole(1, _BUCKETS)})
    _check_model(manifest["model"], where)
    return manifest


def _check_model(model: dict[str, Any], where: str) -> None:
    _check(model, _MODEL, where, "model.", {"base_rates": _list(_number()), "surface_rates": _mapping})
    for at, action in enumerate(model["actions"]):
        _check(action, _ACTION, where, f"model.actions[{at}].", {"shown_types": _list(_text)})
    count = len(model["actions"])
    of_actions = {name: model.get(name) for name in ("action_weights", "base_rates")}
    of_actions |= {f"surface_rates[{name!r}]": rates for name, rates in (model.get("surface_rates") or {}).items()}
    for name, numbers in of_actions.items():
        if numbers is not None and ((wrong := _list(_number())(numbers)) or len(numbers) != count):
            raise _error(where, f"model.{name}", numbers, wrong or f"a list of {count} numbers, one for each action")


def _check(
    values: Any, fields: Mapping[str, Check], where: str, above: str = "", optional: Mapping[str, Check] | None = None
) -> None:
    if not isinstance(values, dict):
        raise _error(where, above.rstrip("."), values, "an object")
    for name, check in fields.items():
        if name not in values:
            raise BundleError(f"{where}: has no {above + name!r}; publish the bundle again")
        if should := check(values[name]):
            raise _error(where, above + name, values[name], should)
    for name, check in (optional or {}).items():
        if values.get(name) is not None and (should := check(values[name])):
            raise _error(where, above + name, values[name], should)


def _error(where: str, name: str, value: Any, should: str) -> BundleError:
    return BundleError(f"{where}: {name} is {_short(value)}, should be {should}; publish the bundle again")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> str:
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
_ACTION: Mapping[str, Check] = {
    "name": _text,
    "event_type": _text,
    "min_value": lambda value: "" if value is None else _number()(value),
}
