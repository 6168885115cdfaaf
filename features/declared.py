"""Features that the configuration of a training declares: more columns of the ranker's input, behind the built-in ones.

A declaration is data, so it travels from the settings into the run and the bundle, and training and serving compile it
by the same code: parts of the item are columns of the catalogue, parts of the request are computed once for all
candidates, and parts of the user's past are counted by a kernel over the newest events.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.catalog_columns import encoded_texts
from features.controls import ATTRIBUTE, ATTRIBUTE_NUMBER, DIAL, Controls, attribute_key
from features.declarations import MOST, PARTS, DeclaredFeature, zone_of
from features.declared_kernels import SAME, PastArrays
from features.feature_set import Feature
from features.keys import item_key
from features.model_inputs import FEATURES, RANKER_FEATURES
from features.profile import RING

_F32 = npt.NDArray[np.float32]


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
        taken = {feature.name for feature in features} & set(RANKER_FEATURES.names)
        if double := sorted(taken | {name for name in names if names.count(name) > 1}):
            raise ValueError(f"{double[0]}: there is another feature of this name")
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
        # By part and not as declared: each part is filled by another hand, and in one piece.
        parts = [feature for part in PARTS for feature in self.of_part(part)]
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
        # Without declarations as before, so that bundles of earlier versions go on to fit.
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
        # Keys, not texts: a profile holds no more of an attribute than the hash of its name and text.
        texts = set(controls["key"][controls["kind"] == ATTRIBUTE].tolist())
        numeric = controls[controls["kind"] == ATTRIBUTE_NUMBER].view(DIAL)
        numbers = dict(zip(numeric["key"].tolist(), numeric["value"].tolist(), strict=True))
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


@functools.lru_cache(4096)
def _attribute_key(name: str, text: str | None = None) -> int:
    return item_key(name) if text is None else attribute_key(name, text)


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
        # All of an item's categories, though most features read the first alone.
        owners = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
        named = pc.index_in(pc.list_flatten(column), pa.array(feature.values, pa.string()))
        at = pc.fill_null(named, -1).to_numpy(zero_copy_only=False)
        out[owners[at >= 0], at[at >= 0]] = 1.0
    return out


def _of_request(feature: DeclaredFeature, now_ms: int, surface: str, context: Mapping[str, Any]) -> list[float]:
    source = feature.of.removeprefix("request.")
    if source in ("hour", "weekday"):
        # Data with an order only has no hours.
        if not now_ms:
            return feature.of_text(None)
        # A log may hold a zone that this machine does not know; the request itself was refused if the service did not.
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


NONE_DECLARED = Declared.of(())
"""A model without declared features."""
