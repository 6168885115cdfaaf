"""A declaration of a feature: what it may say, and the columns that it makes of a text or a number."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from features.declared_kernels import ANY, SAME
from features.numbers import number_of

MOST = 256
"""Most columns that can be declared."""

_ITEM = frozenset({"price", "duration", "creator_id", "categories"})
PARTS = ("item", "request", "user", "past")
"""The parts that a feature may be about, in the order of the columns."""

_REQUEST = frozenset({"surface", "device", "channel", "locale", "hour", "weekday"})
_OPTIONS: Mapping[str, frozenset[str]] = {
    "value": frozenset({"of", "log", "zone"}),
    "bucket": frozenset({"of", "values", "edges", "zone"}),
    "cycle": frozenset({"of", "period", "zone"}),
    "count": frozenset({"event_types", "same", "window_hours"}),
    "rate": frozenset({"event_types", "shown_types", "same", "window_hours", "prior", "base"}),
}
"""Options of each form, next to its name."""


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
        # By form: an option of another one would be read silently as if it had been given for nothing.
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
        """Returns the declaration with every option of its form that it has."""
        options = {name: getattr(self, name) for name in sorted(_OPTIONS[self.form]) if getattr(self, name) != ()}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        return {"name": self.name, "form": self.form, **lists}

    @property
    def part(self) -> str:
        """The part that it is about: "item", "request", "user" or "past"."""
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
        # Texts are compared as they come: "TV" and "tv" are two devices, as the product names them.
        if self.values:
            return [float(text == value) for value in self.values]
        return self.of_number(number_of(text))

    def of_number(self, number: float) -> list[float]:
        """Returns its columns for a number; zeros for one that is not finite."""
        # Zeros stand for "unknown": no bucket, and of a value the column that says so.
        out = [0.0] * len(self.columns)
        if not math.isfinite(number):
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
        if source not in known and (part not in PARTS[:3] or source.removeprefix("attributes.") in ("", source)):
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


def zone_of(name: str) -> ZoneInfo | None:
    """Returns a time zone by its IANA name; None if there is none of that name."""
    try:
        return _zone(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


# A caller chooses the name, so the cache must not grow with what callers send; there are some 600 zones.
@functools.lru_cache(1024)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)


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
