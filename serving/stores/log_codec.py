"""The JSON payloads of the event log: events and slates are written and read here alone.

A payload names its user by `user_id` and `anonymous`; slates hold features as base64 of float32 and the sources of each
item as bits, because they are three times as large as events already.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from features.subjects import Subject, anonymous, id_of, is_anonymous, known

# Encoders are made once: `json.dumps` with options makes one for each call.
_EVENTS = json.JSONEncoder(ensure_ascii=False)
_SLATES = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def user_fields(subject: str) -> dict[str, Any]:
    """Returns the fields of a payload that name its user."""
    return {"user_id": id_of(subject), "anonymous": is_anonymous(subject)}


def encode_event(fields: Mapping[str, Any]) -> bytes:
    """Returns the payload of an event."""
    return _EVENTS.encode(fields).encode()


def encode_slate(fields: Mapping[str, Any], texts: Mapping[str, str]) -> bytes:
    """Returns the payload of a slate.

    Args:
        fields: Its fields, at least one.
        texts: More fields, whose values are JSON already.
    """
    more = "".join([f',"{name}":{text}' for name, text in texts.items()])
    return f"{_SLATES.encode(fields)[:-1]}{more}}}".encode()


def encode_numbers(numbers: Sequence[float | None]) -> str:
    """Returns numbers as JSON."""
    return _SLATES.encode(numbers)


def number_text(numbers: npt.NDArray[np.float32]) -> str:
    """Returns finite float32 numbers as JSON, with the nine digits that tell any two of them apart; shape [n].

    One call formats all of them, in a tenth of the time of the shortest digits of each.
    """
    values = tuple(numbers.tolist())
    return "[" + ",".join(["%.9g"] * len(values)) % values + "]"


def encode_features(features: npt.NDArray[np.float32]) -> str:
    """Returns the features of a slate's items as text: a number of the table takes four bytes."""
    return base64.b64encode(features.astype("<f4", copy=False).tobytes()).decode()


def decode(payload: bytes) -> dict[str, Any]:
    """Returns the fields of an event or a slate as they were written.

    Raises:
        ValueError: The payload is no JSON object.
    """
    fields = json.loads(payload)
    if not isinstance(fields, dict):
        raise ValueError("a payload of the log is a JSON object")
    return fields


def decode_slate(payload: bytes) -> dict[str, Any]:
    """Returns the fields of a slate, its features and sources in lists, one per item.

    Raises:
        ValueError: The payload is damaged.
    """
    fields = decode(payload)
    try:
        if "features" in fields:
            values = np.frombuffer(base64.b64decode(fields["features"]), "<f4")
            fields["features"] = values.reshape(len(fields["item_ids"]), -1).tolist()
        if "sources" in fields:
            fields["sources"] = _source_names(fields["sources"], fields["source_names"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"a damaged slate: {error!r}") from error
    return fields


def subject_in(fields: Mapping[str, Any]) -> Subject:
    """Returns the subject that a payload names."""
    return (anonymous if fields["anonymous"] else known)(fields["user_id"])


def reassigned(payload: bytes, subject: str, without: Collection[str] = (), **more: Any) -> bytes:
    """Returns an event or a slate as another user's, without some of its fields and with others."""
    # A merge copies entries of another user; the copy must not name that user anywhere.
    fields = decode(payload) | user_fields(subject) | more
    return encode_event({name: value for name, value in fields.items() if name not in without})


def _source_names(masks: Sequence[int], names: Sequence[str]) -> list[list[str]]:
    """Returns the names of the sources of each item, from one bit for each."""
    return [[name for bit, name in enumerate(names) if mask >> bit & 1] for mask in masks]
