"""The controls of a user: what is never shown, or not for now, and the dials. They overrule every model."""

from __future__ import annotations

import base64
import enum
import math
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from features.errors import ProfileCorrupt
from features.keys import item_key
from features.numbers import number_of

MAX_CONTROLS = 1000
"""Controls, dials among them, that one user may have."""

FOR_EVER = 1 << 62
"""Later than any end of a control, ms."""

CONTROL = np.dtype([("key", "<u8"), ("until", "<i8"), ("kind", "u1")])
"""One control: the key of its item, creator or category, its end (ms, 0 for never), and a `ControlKind`; 17 bytes."""

DIAL = np.dtype([("key", "<u8"), ("value", "<f8"), ("kind", "u1")])
"""A control that is a dial, in the same 17 bytes: its value in place of an end, and a `Dial` as its kind."""

ARM = 32
"""Kind of a control that no user sets: its key is the `arm_seed` of the user that an anonymous user was merged into."""

ATTRIBUTE, ATTRIBUTE_NUMBER = 48, 49
"""Kinds of the two controls of an attribute that a product told of its user.

The key of the first is of name and text together; of the second, there if the text is a number, of the name, and the
number stands where the value of a dial does."""

MAX_ATTRIBUTES = 64
"""Attributes that one user may have, next to `MAX_CONTROLS`."""

Controls = npt.NDArray[np.void]
"""CONTROL [n]."""


class ControlKind(enum.IntEnum):
    """The subject of a block or mute."""

    ITEM = 1
    CREATOR = 2
    CATEGORY = 3


class Dial(enum.IntEnum):
    """The dials of a user; at 0 a dial changes nothing."""

    # Apart from the numbers of `ControlKind`: both stand in the same byte of a control.
    NOVELTY = 16
    DIVERSITY = 17
    FRESHNESS = 18
    CREATOR_WEIGHT = 19
    CATEGORY_WEIGHT = 20

    @property
    def least(self) -> float:
        """The lowest value of the dial; the highest is 1."""
        return 0.0 if self is Dial.DIVERSITY else -1.0


Dials = Mapping[tuple[Dial, int], float]
"""The values of dials: by dial, and by the key of its creator or category, 0 for a dial of the whole slate."""


def no_controls() -> Controls:
    """Returns the controls of a user who has set none."""
    return np.empty(0, CONTROL)


def blocked_keys(controls: Controls, kind: ControlKind, now_ms: int) -> npt.NDArray[np.uint64]:
    """Returns the keys of one kind that are blocked or muted at a time, ms; uint64 [n]."""
    holds = (controls["kind"] == kind) & ((controls["until"] == 0) | (controls["until"] > now_ms))
    return np.ascontiguousarray(controls["key"][holds])


def dials(controls: Controls) -> Dials:
    """Returns the values of the dials among the controls."""
    if not controls.size:
        return {}
    # A kind beyond the known ones is a dial of a later version: it is kept, and has no effect here.
    set_dials = controls[(controls["kind"] >= min(Dial)) & (controls["kind"] <= max(Dial))]
    return {(Dial(kind), key): value for key, value, kind in set_dials.view(DIAL).tolist()}


def dial_controls(values: Iterable[tuple[Dial, int, float]]) -> Controls:
    """Returns dials, each with the key of its creator or category and its value, as controls; CONTROL [n]."""
    return np.array([(key, value, dial) for dial, key, value in values], DIAL).view(CONTROL)


def attribute_controls(attributes: Mapping[str, str]) -> Controls:
    """Returns attributes of a user as controls; CONTROL [n]."""
    texts = [(attribute_key(name, text), 0, ATTRIBUTE) for name, text in attributes.items()]
    numbers = [(item_key(name), number_of(text), ATTRIBUTE_NUMBER) for name, text in attributes.items()]
    # A text that is no number has no second control, and so counts as unknown where a number is asked for.
    known = [number for number in numbers if not math.isnan(number[1])]
    return np.concatenate([np.array(texts, CONTROL), np.array(known, DIAL).view(CONTROL)])


def attribute_key(name: str, text: str) -> int:
    """Returns the key of an attribute that has a text."""
    return item_key(f"{name}\0{text}")


def attributes_among(controls: Controls) -> Controls:
    """Returns the controls that are attributes; CONTROL [n]."""
    among: Controls = controls[(controls["kind"] == ATTRIBUTE) | (controls["kind"] == ATTRIBUTE_NUMBER)]
    return among


def attributes_text(controls: Controls) -> str:
    """Returns the attributes among controls as text, for the log of slates."""
    return base64.b64encode(attributes_among(controls).tobytes()).decode()


def attributes_of_text(text: str) -> Controls:
    """Returns the attributes that `attributes_text` wrote; CONTROL [n]. None can be read of a text that is damaged."""
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), CONTROL)
    except ValueError:
        return no_controls()


def arm_control(seed: int) -> Controls:
    """Returns the control by which an anonymous user shares the arm of a user; CONTROL [1]."""
    return np.array([(seed, 0, ARM)], CONTROL)


def arm_seed(controls: Controls) -> int | None:
    """Returns the seed of the arm that a control shares, None if none does."""
    keys = controls["key"][controls["kind"] == ARM]
    return int(keys[0]) if keys.size else None


def encode(controls: Controls) -> bytes:
    """Returns the controls as bytes, with a checksum over all of them; nothing if there are none."""
    body = controls.tobytes()
    return body + zlib.crc32(body).to_bytes(4, "little") if body else b""


def decode(stored: bytes | memoryview) -> Controls:
    """Reads the bytes that `encode` wrote.

    Raises:
        ProfileCorrupt: The bytes are cut short or were changed.
    """
    if not stored:
        return no_controls()
    if (len(stored) - 4) % CONTROL.itemsize or zlib.crc32(stored[:-4]) != int.from_bytes(stored[-4:], "little"):
        raise ProfileCorrupt(
            "the controls of a user fail their checksum; rebuild the profile: penchant profiles rebuild"
        )
    return np.frombuffer(stored[:-4], CONTROL)
