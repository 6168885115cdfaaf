"""What a person said of their answers: what is never shown, or not for now, and their dials. No model overrules it."""

from __future__ import annotations

import enum
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from features.errors import ProfileCorrupt

MAX_CONTROLS = 1000
"""Controls, dials among them, that one person may have."""

FOR_EVER = 1 << 62
"""Later than any end of a rule, ms."""

CONTROL = np.dtype([("key", "<u8"), ("until", "<i8"), ("kind", "u1")])
"""One rule: the key of what it is about, when it ends (ms, 0 for never), and a `ControlKind`; 17 bytes."""

DIAL = np.dtype([("key", "<u8"), ("value", "<f8"), ("kind", "u1")])
"""A rule that is a dial, in the same 17 bytes: how it is turned in place of an end, and a `Dial` as its kind."""

ARM = 32
"""Kind of a control that no user sets: its key is the `arm_seed` of the user that an anonymous user was merged into."""

Controls = npt.NDArray[np.void]


class ControlKind(enum.IntEnum):
    """What a rule is about."""

    ITEM = 1
    CREATOR = 2
    CATEGORY = 3


class Dial(enum.IntEnum):
    """What a person may turn; 0 changes nothing."""

    NOVELTY = 16
    DIVERSITY = 17
    FRESHNESS = 18
    CREATOR_WEIGHT = 19
    CATEGORY_WEIGHT = 20

    @property
    def least(self) -> float:
        """How far it can be turned down; up it is 1."""
        return 0.0 if self is Dial.DIVERSITY else -1.0


Dials = Mapping[tuple[Dial, int], float]
"""How dials are turned: by dial, and by the key of what it is about, 0 where it is about everything."""


def no_controls() -> Controls:
    """Those of somebody who said nothing."""
    return np.empty(0, CONTROL)


def blocked_keys(rules: Controls, kind: ControlKind, now_ms: int) -> npt.NDArray[np.uint64]:
    """The keys of one kind that rules hold back at a time, ms; uint64 [n]."""
    holds = (rules["kind"] == kind) & ((rules["until"] == 0) | (rules["until"] > now_ms))
    return np.ascontiguousarray(rules["key"][holds])


def dials(rules: Controls) -> Dials:
    """How the dials among the rules are turned."""
    if not rules.size:
        return {}
    turned = rules[(rules["kind"] >= min(Dial)) & (rules["kind"] <= max(Dial))]
    return {(Dial(kind), key): value for key, value, kind in turned.view(DIAL).tolist()}


def dial_controls(turned: Iterable[tuple[Dial, int, float]]) -> Controls:
    """Dials, the key of what each is about, and how they are turned, as rules; CONTROL [n]."""
    return np.array([(key, value, dial) for dial, key, value in turned], DIAL).view(CONTROL)


def arm_control(seed: int) -> Controls:
    """The rule by which an anonymous user shares the arm of a user; CONTROL [1]."""
    return np.array([(seed, 0, ARM)], CONTROL)


def arm_seed(rules: Controls) -> int | None:
    """The seed of the arm that a rule shares, None where none does."""
    keys = rules["key"][rules["kind"] == ARM]
    return int(keys[0]) if keys.size else None


def encode(rules: Controls) -> bytes:
    """The rules as bytes, with a checksum over all of it; nothing where there is none."""
    body = rules.tobytes()
    return body + zlib.crc32(body).to_bytes(4, "little") if body else b""


def decode(stored: bytes | memoryview) -> Controls:
    """Reads what `encode` wrote.

    Raises:
        ProfileCorrupt: The bytes are cut short or were changed.
    """
    if not stored:
        return no_controls()
    if (len(stored) - 4) % CONTROL.itemsize or zlib.crc32(stored[:-4]) != int.from_bytes(stored[-4:], "little"):
        raise ProfileCorrupt("the rules of a user fail their checksum; rebuild the profile: penchant profiles rebuild")
    return np.frombuffer(stored[:-4], CONTROL)
