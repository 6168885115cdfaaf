"""What a person never wants to be shown, or not for now: their own rules, which no model may overrule."""

from __future__ import annotations

import enum
import zlib

import numpy as np
import numpy.typing as npt

from features.errors import ProfileCorrupt

MOST_RULES = 1000
"""Rules that one person may have."""

FOR_EVER = 1 << 62
"""Later than any end of a rule, ms."""

RULE = np.dtype([("key", "<u8"), ("until", "<i8"), ("kind", "u1")])
"""One rule: the key of what it is about, when it ends (ms, 0 for never), and a `Kind`; 17 bytes."""

Rules = npt.NDArray[np.void]


class Kind(enum.IntEnum):
    """What a rule is about."""

    ITEM = 1
    CREATOR = 2
    CATEGORY = 3


def no_rules() -> Rules:
    """Those of somebody who said nothing."""
    return np.empty(0, RULE)


def blocked(rules: Rules, kind: Kind, now_ms: int) -> npt.NDArray[np.uint64]:
    """The keys of one kind that rules hold back at a time, ms; uint64 [n]."""
    holds = (rules["kind"] == kind) & ((rules["until"] == 0) | (rules["until"] > now_ms))
    return np.ascontiguousarray(rules["key"][holds])


def encode(rules: Rules) -> bytes:
    """The rules as bytes, with a checksum over all of it; nothing where there is none."""
    body = rules.tobytes()
    return body + zlib.crc32(body).to_bytes(4, "little") if body else b""


def decode(stored: bytes | memoryview) -> Rules:
    """Reads what `encode` wrote.

    Raises:
        ProfileCorrupt: The bytes are cut short or were changed.
    """
    if not stored:
        return no_rules()
    if (len(stored) - 4) % RULE.itemsize or zlib.crc32(stored[:-4]) != int.from_bytes(stored[-4:], "little"):
        raise ProfileCorrupt("the rules of a person fail their checksum")
    return np.frombuffer(stored[:-4], RULE)
