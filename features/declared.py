"""Features that the configuration of a training declares: more columns of the ranker's input, behind the built-in ones.

A declaration is data, so it travels from the settings into the run and the bundle, and training and serving compile it
by the same code: parts of the item are columns of the catalogue, parts of the request are computed once for all
candidates, and parts of the user's past are counted by a kernel over the newest events.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.catalog_columns import encoded_texts
from features.controls import ATTRIBUTE, ATTRIBUTE_NUMBER, DIAL, Controls, attribute_key
from features.declared_kernels import ANY, SAME, PastArrays
from features.feature_set import Feature
from features.keys import item_key
from features.model_inputs import FEATURES, RANKER_FEATURES
from features.numbers import number_of
from features.profile import RING

MOST = 256
"""Most columns that can be declared."""

_F32 = npt.NDArray[np.float32]
_ITEM = frozenset({"price", "duration", "creator_id", "categories"})
_PARTS = ("item", "request", "user", "past")
_REQUEST = frozenset({"surface", "device", "channel", "locale", "hour", "weekday"})
_OPTIONS: Mapping[str, frozenset[str]] = {
    "value": frozenset({"of", "log", "zone"}),
    "bucket": frozenset({"of", "values", "edges", "zone"}),
    "cycle": frozenset({"of", "period", "zone"}),
    "count": frozenset({"event_types", "same", "window_hours"}),
    "rate": frozenset({"event_types", "shown_types", "same", "window_hours", "prior", "base"}),
}
"""What each form may be told, next to its name."""


@dataclass(frozen=True, slots=True)
class DeclaredFeature:
    """A declaration.

    Attributes:
        name: Unique, lower case with underscores.
        form: `value`, a number and whether it is known; `bucket`, a 1 in the column of the value or of the range that
            holds it; `cycle`, sine and cosine of a number that comes round; `count`, log1p of the user's events;
            `rate`, log-odds of the user's events among those that show an item, pulled to a base.
        of: Where a value comes from: `item.price`, `item.duration`, `item.creator_id`, `item.categories`,
            `item.attributes.NAME`, `request.surface`, `request.device`, `request.channel`, `request.locale`,
            `request.hour` (with its fraction), `request.weekday` (0 is Monday), `request.attributes.NAME`,
            `user.attributes.NAME`.
        values: The texts that have a column.
        edges: The numbers between which there is a column; one more than there are edges.
        log: The number is read as log1p, with its sign.
        period: The number at which a cycle begins again.
        zone: Time zone (IANA) of hour and weekday, where a request names none.
        event_types: The events that count.
        shown_types: The events that show an item and so may lead to them.
        same: Only events about the same `item`, `category` or `creator` as the candidate count, or `any`.
        window_hours: Hours before the request that count; 0: all of the newest events.
        prior: The number of showings that `base` weighs.
        base: The rate that is expected, above 0 and below 1.
    """

    name: str
    form: str
    of: str = ""
    values: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()
    log: bool = False
    period: float = 0.0
    zone: str = "UTC"
    event_types: tuple[str, ...] = ()
    shown_types: tuple[str, ...] = ()
    same: str = "any"
    window_hours: float = 0.0
    prior: float = 20.0
    base: float = 0.1

    @classmethod
    def parse(cls, declaration: Any) -> DeclaredFeature:
        """Reads a declaration.

        Raises:
            ValueError: It is not one; says what of it should be what.
        """
        if not isinstance(declaration, Mapping):
            raise ValueError(f"a feature is {_short(declaration)}, should be an object with name and form")
        name, form = declaration.get("name"), declaration.get("form")
        if not (isinstance(name, str) and 0 < len(name) <= 64 and name.replace("_", "").isalnum() and name.islower()):
            raise ValueError(f"name is {_short(name)}, should be up to 64 lower-case letters, digits and underscores")
        if not isinstance(form, str) or form not in _OPTIONS:
            raise ValueError(f"{name}: form is {_short(form)}, should be one of {', '.join(_OPTIONS)}")
        given = {key: value for key, value in declaration.items() if key not in ("name", "form")}
        if unknown := sorted(set(map(str, given)) - _OPTIONS[form]):
            raise ValueError(
                f"{name}: {form} has no option {', '.join(unknown)}; it has {', '.join(sorted(_OPTIONS[form]))}"
            )
        for key, value in given.items():
            if should := _CHECKS[key](value):
                raise ValueError(f"{name}: {key} is {_short(value)}, should be {should}")
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in given.items()}
        feature = cls(name, form, **options)
        if should := feature._wrong():
            raise ValueError(f"{name}: {should}")
        return feature

    def as_json(self) -> dict[str, Any]:
        """Returns the declaration with every option of its form."""
        options = {name: getattr(self, name) for name in sorted(_OPTIONS[self.form])}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return {"name": self.name, "form": self.form, **lists}

    @property
    def part(self) -> str:
        """What it is about: "item", "request", "user" or "past"."""
        return self.of.partition(".")[0] if self.of else "past"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its columns."""
        if self.form == "value":
            return (self.name, f"{self.name}/known")
        if self.form == "cycle":
            return (f"{self.name}/sin", f"{self.name}/cos")
        if self.form == "bucket":
            return tuple(f"{self.name}/{label}" for label in self.values or self._ranges())
        return (self.name,)

    def of_text(self, text: str | None) -> list[float]:
        """Returns its columns for a text; zeros where there is none, or where it is no number and should be."""
        if self.values:
            return [float(text == value) for value in self.values]
        return self.of_number(number_of(text))

    def of_number(self, number: float) -> list[float]:
        """Returns its columns for a number; zeros for NaN."""
        out = [0.0] * len(self.columns)
        if math.isnan(number):
            return out
        if self.form == "bucket":
            out[bisect_right(self.edges, number)] = 1.0
        elif self.form == "cycle":
            angle = 2 * math.pi * number / self.period
            out[:] = math.sin(angle), math.cos(angle)
        else:
            out[:] = math.copysign(math.log1p(abs(number)), number) if self.log else number, 1.0
        return out

    def _ranges(self) -> list[str]:
        ends = [f"{edge:g}" for edge in self.edges]
        return [f"{low}..{high}" for low, high in zip(["", *ends], [*ends, ""], strict=True)]

    def _wrong(self) -> str:
        """Returns what is wrong with options that are well formed, each by itself; "" if nothing is."""
        if self.form in ("count", "rate"):
            if not self.event_types:
                return "event_types is missing: the events that count"
            if self.form == "rate" and not self.shown_types:
                return "shown_types is missing: the events that show an item"
            return ""
        part, _, source = self.of.partition(".")
        known = {"item": _ITEM, "request": _REQUEST}.get(part, frozenset())
        if source not in known and (part not in _PARTS or source.removeprefix("attributes.") in ("", source)):
            names = [f"item.{name}" for name in sorted(_ITEM)] + [f"request.{name}" for name in sorted(_REQUEST)]
            names += [f"{name}.attributes.NAME" for name in ("item", "request", "user")]
            return f"of is {self.of!r}, should be one of {', '.join(names)}"
        if self.form == "bucket" and bool(self.values) == bool(self.edges):
            return "should have either values or edges"
        if source == "categories" and not self.values:
            return "of item.categories there are values only"
        if self.form == "cycle" and self.period <= 0:
            return "period is missing: the number at which it begins again, 24 for hours"
        return ""


@dataclass(frozen=True, slots=True)
class Declared:
    """The declared features of a model, compiled; K columns in the order item, request, user, past.

    Attributes:
        features: The declarations, in their order.
        past: The arrays by which the kernel counts.
    """

    features: tuple[DeclaredFeature, ...]
    past: PastArrays = field(compare=False)  # made from the declarations, and arrays have no single truth

    @classmethod
    def of(cls, declarations: Sequence[Any], event_types: Sequence[str] | None = None) -> Declared:
        """Compiles declarations.

        Args:
            declarations: One object each, as in the settings.
            event_types: Those that the model knows; None to check the declarations without them.

        Raises:
            ValueError: A declaration is none, two share a name, or one names an unknown event type.
        """
        features = tuple(map(DeclaredFeature.parse, declarations))
        names = [column for feature in features for column in feature.columns]
        if len(set(names)) != len(names) or (taken := {f.name for f in features} & set(RANKER_FEATURES.names)):
            double = next((name for name in names if names.count(name) > 1), None) or min(taken)
            raise ValueError(f"{double}: there is another feature of this name")
        if len(names) > MOST:
            raise ValueError(f"the features have {len(names)} columns, at most {MOST} are possible")
        return cls(features, _past_arrays([f for f in features if f.part == "past"], event_types))

    def __len__(self) -> int:
        """Returns the number of columns."""
        return len(self.names)

    def of_part(self, part: str) -> list[DeclaredFeature]:
        """Returns the declarations about "item", "request", "user" or "past"."""
        return [feature for feature in self.features if feature.part == part]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns, in their order."""
        parts = [feature for part in _PARTS for feature in self.of_part(part)]
        return tuple(name for feature in parts for name in feature.columns)

    @property
    def item_width(self) -> int:
        """The number of columns that are about the item."""
        return sum(len(feature.columns) for feature in self.of_part("item"))

    def as_features(self) -> list[Feature]:
        """Returns a description of each column, in their order."""
        windows = {"item": "item", "request": "request", "user": "request", "past": f"newest {RING} events"}
        return [
            Feature(name, f"declared: {feature.form} of {feature.of or feature.same}", windows[part])
            for part in windows
            for feature in self.of_part(part)
            for name in feature.columns
        ]

    def as_json(self) -> list[dict[str, Any]]:
        """Returns the declarations, as a run's result and a manifest hold them."""
        return [feature.as_json() for feature in self.features]

    def fingerprint(self) -> str:
        """Returns the fingerprint of all features of a model: that of the built-in ones if nothing is declared."""
        if not self.features:
            return FEATURES.fingerprint()
        declared = json.dumps([FEATURES.fingerprint(), self.as_json()], separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(declared.encode()).hexdigest()

    def item_values(self, items: pa.Table) -> _F32:
        """Returns the columns about the item, from a canonical items table; float32 [n, K of items]."""
        parts = [_of_items(feature, items) for feature in self.of_part("item")]
        return np.concatenate([np.zeros((items.num_rows, 0), np.float32), *parts], axis=1)

    def request_values(self, now_ms: int = 0, surface: str = "", context: Mapping[str, Any] | None = None) -> _F32:
        """Returns the columns about the request; float32 [K of requests].

        Args:
            now_ms: Time of the request, ms; 0 if there is none.
            surface: Its surface.
            context: What the caller tells about it: `device`, `channel`, `locale`, `time_zone`, and `attributes`.
        """
        values: list[float] = []
        for feature in self.of_part("request"):
            values += _of_request(feature, now_ms, surface, context or {})
        return np.array(values, np.float32)

    def user_values(self, controls: Controls) -> _F32:
        """Returns the columns about the user; float32 [K of users].

        Args:
            controls: The user's controls, among them their attributes; CONTROL [n].
        """
        parts = self.of_part("user")
        if not parts:
            return np.empty(0, np.float32)
        texts = set(controls["key"][controls["kind"] == ATTRIBUTE].tolist())
        told = controls[controls["kind"] == ATTRIBUTE_NUMBER].view(DIAL)
        numbers = dict(zip(told["key"].tolist(), told["value"].tolist(), strict=True))
        values: list[float] = []
        for feature in parts:
            name = feature.of.removeprefix("user.attributes.")
            if feature.values:
                values += [float(_attribute_key(name, text) in texts) for text in feature.values]
            else:
                values += feature.of_number(numbers.get(_attribute_key(name), math.nan))
        return np.array(values, np.float32)

    def example(self) -> tuple[str, dict[str, Any], dict[str, str]]:
        """Returns a surface, a context and attributes of a user that the declarations tell from others.

        They are for requests that test a bundle.
        """
        context: dict[str, Any] = {"attributes": {}, "time_zone": "Asia/Kathmandu"}
        surface = ""
        for feature in self.of_part("request"):
            source, text = feature.of.removeprefix("request."), feature.values[-1] if feature.values else "3.5"
            if source == "surface":
                surface = text
            elif source.startswith("attributes."):
                context["attributes"][source.removeprefix("attributes.")] = text
            elif source not in ("hour", "weekday"):
                context[source] = text
        names = [(feature.of.removeprefix("user.attributes."), feature) for feature in self.of_part("user")]
        return surface, context, {name: feature.values[-1] if feature.values else "3.5" for name, feature in names}


def zone_of(name: str) -> ZoneInfo | None:
    """Returns a time zone by its IANA name; None if there is none of that name."""
    try:
        return _zone(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


@functools.lru_cache(4096)
def _attribute_key(name: str, text: str | None = None) -> int:
    return item_key(name) if text is None else attribute_key(name, text)


# A caller chooses the name, so the cache must not grow with what callers send; there are some 600 zones.
@functools.lru_cache(1024)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)


def _of_items(feature: DeclaredFeature, items: pa.Table) -> _F32:
    """Returns the columns of a feature about items; float32 [n, k]."""
    source = feature.of.removeprefix("item.")
    names = items.column_names
    if source == "categories":
        return _of_categories(feature, items)
    if source == "price":
        if "price" not in names:
            return np.zeros((items.num_rows, len(feature.columns)), np.float32)
        numbers, places = np.unique(
            pc.fill_null(items["price"].cast(pa.float64()), np.nan).to_numpy(), return_inverse=True
        )
        return np.array([feature.of_text(_text_of(number)) for number in numbers.tolist()], np.float32).reshape(
            -1, len(feature.columns)
        )[places]
    if source == "creator_id":
        texts = items["creator_id"] if source in names else pa.chunked_array([pa.nulls(items.num_rows, pa.string())])
    elif "attributes" in names:
        texts = pc.map_lookup(items["attributes"], source.removeprefix("attributes."), "last")
    else:
        texts = pa.chunked_array([pa.nulls(items.num_rows, pa.string())])
    distinct, places = encoded_texts(texts)
    # The last row is for what has no text, whose place is -1.
    return np.array([feature.of_text(text) for text in (*distinct, None)], np.float32)[places]


def _of_categories(feature: DeclaredFeature, items: pa.Table) -> _F32:
    """Returns a 1 for each category that an item has among the values; float32 [n, k]."""
    out = np.zeros((items.num_rows, len(feature.values)), np.float32)
    if "categories" in items.column_names:
        column: Any = items["categories"].combine_chunks()
        owners = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
        named = pc.index_in(pc.list_flatten(column), pa.array(feature.values, pa.string()))
        at = pc.fill_null(named, -1).to_numpy(zero_copy_only=False)
        out[owners[at >= 0], at[at >= 0]] = 1.0
    return out


def _of_request(feature: DeclaredFeature, now_ms: int, surface: str, context: Mapping[str, Any]) -> list[float]:
    source = feature.of.removeprefix("request.")
    if source in ("hour", "weekday"):
        if not now_ms:
            return feature.of_text(None)
        zone = zone_of(context.get("time_zone") or feature.zone) or zone_of(feature.zone)
        local = datetime.fromtimestamp(now_ms / 1000, zone)
        number = local.hour + local.minute / 60 if source == "hour" else float(local.weekday())
        return feature.of_text(f"{number:g}") if feature.values else feature.of_number(number)
    if source == "surface":
        return feature.of_text(surface or None)
    if source.startswith("attributes."):
        return feature.of_text(dict(context.get("attributes") or {}).get(source.removeprefix("attributes.")))
    return feature.of_text(context.get(source))


def _past_arrays(features: Sequence[DeclaredFeature], event_types: Sequence[str] | None) -> PastArrays:
    """Returns the arrays by which features of the past are counted."""
    types = list(event_types or ())
    counted, shown = (np.zeros((len(features), 1 + len(types)), np.bool_) for _ in range(2))
    for at, feature in enumerate(features):
        for marks, names in ((counted, feature.event_types), (shown, feature.shown_types)):
            for name in names:
                if event_types is not None and name not in types:
                    raise ValueError(
                        f"{feature.name}: no event has the type {name!r}, there are {', '.join(types) or 'none'}"
                    )
                marks[at, 1 + types.index(name) if name in types else 0] = name in types
    return PastArrays(
        counted=counted,
        shown=shown,
        same=np.array([SAME.index(feature.same) for feature in features], np.int64),
        window_ms=np.array([round(feature.window_hours * 3_600_000) for feature in features], np.int64),
        is_rate=np.array([feature.form == "rate" for feature in features], np.bool_),
        prior=np.array([feature.prior for feature in features], np.float64),
        base=np.array([math.log(feature.base / (1 - feature.base)) for feature in features], np.float64),
    )


def _text_of(number: float) -> str | None:
    return None if math.isnan(number) else repr(number)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _texts(value: Any) -> str:
    sound = isinstance(value, (list, tuple)) and 0 < len(value) <= MOST
    sound = sound and all(isinstance(text, str) and 0 < len(text) <= 256 for text in value)
    return "" if sound and len(set(value)) == len(value) else f"a list of 1 to {MOST} texts, each once"


def _rising(value: Any) -> str:
    sound = isinstance(value, (list, tuple)) and 0 < len(value) < MOST and not any(map(_finite(-1e30, 1e30), value))
    rising = sound and all(low < high for low, high in itertools.pairwise(value))
    return "" if rising else "a list of numbers, each above the one before"


def _finite(low: float, high: float) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        sound = type(value) in (int, float) and math.isfinite(value) and low <= value <= high
        return "" if sound else f"a number from {low:g} to {high:g}"

    return check


_CHECKS: Mapping[str, Callable[[Any], str]] = {
    "of": lambda value: "" if isinstance(value, str) and 0 < len(value) <= 256 else "a text such as item.price",
    "values": _texts,
    "event_types": _texts,
    "shown_types": _texts,
    "edges": _rising,
    "log": lambda value: "" if isinstance(value, bool) else "true or false",
    "zone": lambda value: "" if isinstance(value, str) and zone_of(value) else "a time zone such as Europe/Vienna",
    "same": lambda value: "" if value in SAME else f"one of {', '.join(SAME)}",
    "period": _finite(1e-6, 1e9),
    "window_hours": _finite(0.0, 1e6),
    "prior": _finite(0.1, 1e6),
    "base": _finite(1e-6, 1 - 1e-6),
}

assert SAME[ANY] == "any"
assert {option for options in _OPTIONS.values() for option in options} == set(_CHECKS)
assert set(_CHECKS) <= {field.name for field in dataclasses.fields(DeclaredFeature)}
NONE_DECLARED = Declared.of(())
"""A model without declared features."""
