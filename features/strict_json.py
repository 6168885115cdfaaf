"""JSON from files that another hand may have written, without numbers, names or nesting that surprise a reader."""

from __future__ import annotations

import json
import math
from typing import Any

_LARGEST = 2**63
_DIGITS = 32


def loads(content: bytes) -> Any:
    """Reads a JSON document.

    Raises:
        ValueError: It is not JSON in UTF-8, names a key twice, is nested too deeply, or holds NaN, infinity, a whole
            number beyond 64 bits, or half of a surrogate pair.
    """
    try:
        document = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
        )
        json.dumps(document, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair cannot be written again
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice!r} twice")
    return document


def _refuse(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text[:_DIGITS]}, which is beyond every number")
    return number


def _whole(text: str) -> int:
    # The length first: reading a million digits takes Python a second.
    if len(text) > _DIGITS or not -_LARGEST <= (number := int(text)) < _LARGEST:
        raise ValueError(f"it holds {text[:_DIGITS]}, which does not fit in 64 bits")
    return number
