"""What a caller may send: each check returns the value, or refuses it naming the field and the allowed range."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Sized

import numpy as np
import numpy.typing as npt

from features.controls import MAX_CONTROLS, Dial
from features.subjects import NO_SUBJECT, Subject, anonymous, known
from features.tables.convert import MOST_ID_BYTES
from penchant.v1 import common_pb2
from penchant.v1.common_pb2 import Dials
from serving.errors import InvalidArgument
from serving.privacy.controls import DialControl

MAX_QUERY_CHARACTERS = 1024
YEAR_2100_MS = 4_102_444_800_000
WHOLE_DIALS = {"novelty": Dial.NOVELTY, "diversity": Dial.DIVERSITY, "freshness": Dial.FRESHNESS}
"""Dials about everything, by their name in the contract."""

NAMED_DIALS = {"categories": Dial.CATEGORY_WEIGHT, "creators": Dial.CREATOR_WEIGHT}
"""Dials about one category or creator each, by the name in the contract of all of a kind."""


def whole(value: int, field: str, low: int, high: int) -> int:
    """An integer in [low, high]."""
    if not low <= value <= high:
        raise InvalidArgument(field, f"must be {low} to {high}, got {value}")
    return value


def count(values: Sized, field: str, low: int, high: int, of: str) -> None:
    """Between low and high things are there."""
    if not low <= len(values) <= high:
        raise InvalidArgument(field, f"must hold {low} to {high} {of}, got {len(values)}")


def identifier(value: str, field: str, *, required: bool = True, limit: int = MOST_ID_BYTES) -> str:
    """An opaque id of at most `limit` bytes."""
    if required and not value:
        raise InvalidArgument(field, f"is required: 1 to {limit} bytes")
    if len(value) * 4 > limit and len(value.encode()) > limit:
        raise InvalidArgument(field, f"must be at most {limit} bytes, got {len(value.encode())}")
    return value


def without(refused: str, value: str, field: str) -> None:
    """An id that holds none of some characters."""
    for character in refused:
        if character in value:
            raise InvalidArgument(
                field, f"must not hold {character!r}: was it cut, or a template not filled in? See refused_in_ids"
            )


def identifiers(values: Sequence[str], field: str, low: int, high: int) -> list[str]:
    """Between low and high ids, none empty, none too long."""
    count(values, field, low, high, "ids")
    ids = list(values)
    if ids and not (min(map(len, ids)) and max(map(len, ids)) * 4 <= MOST_ID_BYTES):
        for at, value in enumerate(ids):
            identifier(value, f"{field}[{at}]")
    return ids


def text(value: str, field: str, *, required: bool = False, limit: int = MAX_QUERY_CHARACTERS) -> str:
    """Words of at most `limit` characters; where required, at least one is a letter or a digit."""
    if len(value) > limit:
        raise InvalidArgument(field, f"must be at most {limit} characters, got {len(value)}")
    if required and not re.search(r"\w", value):
        raise InvalidArgument(field, f"must hold a word: 1 to {limit} characters")
    return value


def finite(values: Sequence[float], field: str) -> npt.NDArray[np.float32]:
    """Numbers, none of them NaN or infinite; float32 [n]."""
    array = np.fromiter(values, np.float32, len(values))
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise InvalidArgument(f"{field}[{bad[0]}]", f"must be finite, got {array[bad[0]]}")
    return array


def weighted(values: npt.NDArray[np.float32], weight: float, field: str, of: str) -> None:
    """Numbers float32 [n] that stay finite, as float32, when they are multiplied by a weight."""
    largest = float(np.abs(values).max(initial=0.0))
    if largest * weight > float(np.finfo(np.float32).max):
        raise InvalidArgument(
            field, f"is {weight:g} and the largest of {of} is {largest:g}: together too large; scale either down"
        )


def same_length(values: Sized, ids: Sized, field: str, of: str) -> None:
    """Values that are given at all are as many as the ids they belong to."""
    if len(values) not in (0, len(ids)):
        raise InvalidArgument(field, f"must be empty or as long as {of}: {len(ids)}, got {len(values)}")


def number(value: float, field: str, low: float = -math.inf) -> float:
    """One finite number of at least `low`."""
    if not math.isfinite(value) or value < low:
        allowed = "finite" if low == -math.inf else f"finite and at least {low:g}"
        raise InvalidArgument(field, f"must be {allowed}, got {value}")
    return value


def within(value: float, field: str, low: float, high: float) -> float:
    """One number in [low, high]."""
    if not low <= value <= high:
        raise InvalidArgument(field, f"must be {low:g} to {high:g}, got {value}")
    return value


def dials(value: Dials, field: str) -> list[DialControl]:
    """The dials that are set, each in its range; at most as many as a person may have rules."""
    count([*value.categories, *value.creators], field, 0, MAX_CONTROLS, "categories and creators")
    said = {name.name for name, _ in value.ListFields()}
    turned = [
        DialControl(dial, "", within(getattr(value, name), f"{field}.{name}", dial.least, 1))
        for name, dial in WHOLE_DIALS.items()
        if name in said
    ]
    for name, dial in NAMED_DIALS.items():
        for about, weight in getattr(value, name).items():
            identifier(about, f"{field}.{name} (a key)")
            turned.append(DialControl(dial, about, within(weight, f"{field}.{name}[{about!r}]", dial.least, 1)))
    return turned


def timestamp(value: int, field: str) -> int:
    """Milliseconds since the epoch, before the year 2100."""
    return whole(value, field, 0, YEAR_2100_MS - 1)


def attributes(values: Mapping[str, str], field: str, entries: int = 64, limit: int = 1024) -> dict[str, str]:
    """At most `entries` attributes of at most `limit` bytes, key and value together."""
    count(values, field, 0, entries, "entries")
    for key, value in values.items():
        if len(key.encode()) + len(value.encode()) > limit:
            raise InvalidArgument(field, f"{key[:40]!r} must be at most {limit} bytes, key and value together")
    return dict(values)


def subject(value: common_pb2.Subject, field: str, *, required: bool = True) -> Subject:
    """Returns the subject of a user or an anonymous user, "" if the request names neither."""
    identifier(value.user_id, f"{field}.user_id", required=False)
    identifier(value.anonymous_id, f"{field}.anonymous_id", required=False)
    if value.user_id:
        return known(value.user_id)
    if value.anonymous_id:
        return anonymous(value.anonymous_id)
    if required:
        raise InvalidArgument(field, "is required: give user_id or anonymous_id")
    return NO_SUBJECT
