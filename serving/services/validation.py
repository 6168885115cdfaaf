"""Checks of request fields: each returns the value, or refuses it with the field and the allowed range.

All of them raise InvalidArgument.
"""

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
"""Dials of the whole slate, by their field of the contract."""

NAMED_DIALS = {"categories": Dial.CATEGORY_WEIGHT, "creators": Dial.CREATOR_WEIGHT}
"""Dials of one category or creator each, by the field of the contract that holds all of a kind."""


def whole(value: int, field: str, low: int, high: int) -> int:
    """Returns an integer in [low, high]."""
    if not low <= value <= high:
        raise InvalidArgument(field, f"must be {low} to {high}, got {value}")
    return value


def count(values: Sized, field: str, low: int, high: int, of: str) -> None:
    """Requires between low and high values; `of` names them."""
    if not low <= len(values) <= high:
        raise InvalidArgument(field, f"must hold {low} to {high} {of}, got {len(values)}")


def identifier(value: str, field: str, *, required: bool = True, limit: int = MOST_ID_BYTES) -> str:
    """Returns an opaque id of at most `limit` bytes."""
    if required and not value:
        raise InvalidArgument(field, f"is required: 1 to {limit} bytes")
    if len(value) * 4 > limit and len(value.encode()) > limit:
        raise InvalidArgument(field, f"must be at most {limit} bytes, got {len(value.encode())}")
    return value


def without(refused: str, value: str, field: str) -> None:
    """Requires an id without any of the refused characters."""
    for character in refused:
        if character in value:
            raise InvalidArgument(
                field, f"must not hold {character!r}: was it cut, or a template not filled in? See refused_in_ids"
            )


def identifiers(values: Sequence[str], field: str, low: int, high: int) -> list[str]:
    """Returns between low and high ids, none of them empty or too long."""
    count(values, field, low, high, "ids")
    ids = list(values)
    # A character has at most four bytes, so most lists pass without encoding an id.
    if ids and not (min(map(len, ids)) and max(map(len, ids)) * 4 <= MOST_ID_BYTES):
        for at, value in enumerate(ids):
            identifier(value, f"{field}[{at}]")
    return ids


def text(value: str, field: str, *, required: bool = False, limit: int = MAX_QUERY_CHARACTERS) -> str:
    """Returns a text of at most `limit` characters; if required, with at least one letter or digit."""
    if len(value) > limit:
        raise InvalidArgument(field, f"must be at most {limit} characters, got {len(value)}")
    if required and not re.search(r"\w", value):
        raise InvalidArgument(field, f"must hold a word: 1 to {limit} characters")
    return value


def finite(values: Sequence[float], field: str) -> npt.NDArray[np.float32]:
    """Returns numbers, none of them NaN or infinite; float32 [n]."""
    array = np.fromiter(values, np.float32, len(values))
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise InvalidArgument(f"{field}[{bad[0]}]", f"must be finite, got {array[bad[0]]}")
    return array


def weighted(values: npt.NDArray[np.float32], weight: float, field: str, of: str) -> None:
    """Requires numbers, float32 [n], that stay finite as float32 when a weight multiplies them."""
    largest = float(np.abs(values).max(initial=0.0))
    if largest * weight > float(np.finfo(np.float32).max):
        raise InvalidArgument(
            field, f"is {weight:g} and the largest of {of} is {largest:g}: together too large; scale either down"
        )


def same_length(values: Sized, ids: Sized, field: str, of: str) -> None:
    """Requires no values, or as many as the ids that they belong to."""
    if len(values) not in (0, len(ids)):
        raise InvalidArgument(field, f"must be empty or as long as {of}: {len(ids)}, got {len(values)}")


def number(value: float, field: str, low: float = -math.inf) -> float:
    """Returns a finite number of at least `low`."""
    if not math.isfinite(value) or value < low:
        allowed = "finite" if low == -math.inf else f"finite and at least {low:g}"
        raise InvalidArgument(field, f"must be {allowed}, got {value}")
    return value


def within(value: float, field: str, low: float, high: float) -> float:
    """Returns a number in [low, high]."""
    if not low <= value <= high:
        raise InvalidArgument(field, f"must be {low:g} to {high:g}, got {value}")
    return value


def dials(value: Dials, field: str) -> list[DialControl]:
    """Returns the dials that are set, each in its range; at most as many as a user may have controls."""
    count([*value.categories, *value.creators], field, 0, MAX_CONTROLS, "categories and creators")
    # The contract tells a dial that is not set from one that is set to 0, which resets a stored one.
    set_fields = {descriptor.name for descriptor, _ in value.ListFields()}
    controls = [
        DialControl(dial, "", within(getattr(value, name), f"{field}.{name}", dial.least, 1))
        for name, dial in WHOLE_DIALS.items()
        if name in set_fields
    ]
    for name, dial in NAMED_DIALS.items():
        for key, weight in getattr(value, name).items():
            identifier(key, f"{field}.{name} (a key)")
            controls.append(DialControl(dial, key, within(weight, f"{field}.{name}[{key!r}]", dial.least, 1)))
    return controls


def timestamp(value: int, field: str) -> int:
    """Returns milliseconds since the epoch, before the year 2100."""
    return whole(value, field, 0, YEAR_2100_MS - 1)


def attributes(values: Mapping[str, str], field: str, entries: int = 64, limit: int = 1024) -> dict[str, str]:
    """Returns at most `entries` attributes of at most `limit` bytes, key and value together."""
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
