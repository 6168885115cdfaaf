"""The keys that stand for ids and event types in stored profiles and in bundles: hashes, so that no registry exists."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def event_type_key(name: str) -> int:
    """Returns the uint32 of an event type in a stored record: CRC-32 of its UTF-8 name, so that no registry exists."""
    return zlib.crc32(name.encode())


def event_type_keys(names: Sequence[str]) -> npt.NDArray[np.uint32]:
    """Returns ``event_type_key`` of each name; uint32 [n]."""
    # There are few distinct names among many events, so each is hashed once.
    keys = {name: event_type_key(name) for name in set(names)}
    return np.fromiter((keys[name] for name in names), np.uint32, len(names))


def _digest(external: str | None) -> bytes:
    return hashlib.blake2b(external.encode(), digest_size=8).digest() if external else bytes(8)


def item_key(external: str | None) -> int:
    """Returns the uint64 key of an external id: BLAKE2b-64 of its UTF-8 bytes, little endian; 0 for None and ``""``.

    Creators and categories use the same function: the field that holds a key tells which of them it means.
    """
    return int.from_bytes(_digest(external), "little")


def item_keys(externals: Sequence[str | None]) -> npt.NDArray[np.uint64]:
    """Returns ``item_key`` of each id; uint64 [n]."""
    return np.frombuffer(b"".join(map(_digest, externals)), "<u8").astype(np.uint64)


def bare_name(name: str) -> str:
    """Returns the letters and digits of a name in lower case: `user_id`, `USER ID` and `user.id` are the same name."""
    return "".join(character for character in name.lower() if character.isalnum())
