"""What the tables hold, how an id becomes a key, and what a feature is: the words training and serving share.

Columns that a table must have are the schema's non-nullable fields, listed again in its ``*_REQUIRED`` tuple,
where an inner tuple means "one of these".
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.event_types import EVENT_TYPES as EVENT_TYPES
from features.event_types import NEGATIVE_EVENT_TYPES as NEGATIVE_EVENT_TYPES
from features.event_types import PASSIVE_EVENT_TYPES as PASSIVE_EVENT_TYPES

Required: TypeAlias = tuple[str | tuple[str, ...], ...]

# The unit travels with the column, so a file written with these schemas is never mistaken for one in seconds.
_MILLISECONDS = {"unit": "ms"}
_ATTRIBUTES = pa.map_(pa.string(), pa.string())


def _required(name: str, dtype: pa.DataType) -> pa.Field[Any]:
    return pa.field(name, dtype, nullable=False)


def _optional(name: str, dtype: pa.DataType) -> pa.Field[Any]:
    return pa.field(name, dtype)


def _time(name: str, nullable: bool = True) -> pa.Field[Any]:
    return pa.field(name, pa.int64(), nullable=nullable, metadata=_MILLISECONDS)


# Whether the person allows that models are trained on a row, and that what helped is measured by it; NULL: both.
ALLOWED = (_optional("allow_train", pa.bool_()), _optional("allow_measure", pa.bool_()))

EVENTS = pa.schema(
    [
        _required("user_id", pa.string()),
        _required("item_id", pa.string()),
        _required("event_type", pa.string()),
        _time("timestamp"),
        _optional("sequence", pa.int64()),
        _optional("event_id", pa.string()),
        _optional("log_id", pa.uint64()),
        _time("ingested_at"),
        _optional("value", pa.float32()),
        _optional("session_id", pa.string()),
        _optional("request_id", pa.string()),
        _optional("surface", pa.string()),
        _optional("query", pa.string()),
        _optional("position", pa.int32()),
        _optional("attributes", _ATTRIBUTES),
        # Keys of the item's category and creator as they were when the event came, 0 for none: what the fold has read.
        _optional("category_key", pa.uint64()),
        _optional("creator_key", pa.uint64()),
        # Whether it may be in the profile: decided when it came, by what the person allowed then.
        _optional("personal", pa.bool_()),
        *ALLOWED,
    ]
)
EVENTS_REQUIRED: Required = ("user_id", "item_id", "event_type", ("timestamp", "sequence"))

ITEMS = pa.schema(
    [
        _required("item_id", pa.string()),
        _optional("title", pa.string()),
        _optional("description", pa.string()),
        _optional("categories", pa.list_(pa.string())),
        _optional("creator_id", pa.string()),
        _optional("price", pa.float32()),
        _optional("available", pa.bool_()),
        _time("available_from"),
        _time("available_until"),
        _optional("parent_id", pa.string()),
        _optional("attributes", _ATTRIBUTES),
    ]
)
ITEMS_REQUIRED: Required = ("item_id",)

USERS = pa.schema([_required("user_id", pa.string()), _optional("attributes", _ATTRIBUTES)])
USERS_REQUIRED: Required = ("user_id",)

JUDGMENTS = pa.schema(
    [
        _required("query", pa.string()),
        _required("item_id", pa.string()),
        _required("grade", pa.float32()),
    ]
)
JUDGMENTS_REQUIRED: Required = ("query", "item_id", "grade")

IMPRESSIONS = pa.schema(
    [
        _required("request_id", pa.string()),
        _required("user_id", pa.string()),
        _time("timestamp", nullable=False),
        # In the order shown. A propensity is the probability that this item stood in this position; NaN = not exact.
        _required("item_ids", pa.list_(pa.string())),
        _required("propensities", pa.list_(pa.float64())),
        _optional("scores", pa.list_(pa.float32())),
        _optional("surface", pa.string()),
        _optional("arm", pa.string()),
        _optional("bundle_id", pa.string()),
        _optional("profile_version", pa.uint64()),
        # One row per item, in the order of the feature set named by the bundle.
        _optional("features", pa.list_(pa.list_(pa.float32()))),
        # The parts that were degraded, empty when none was.
        _optional("degraded", pa.list_(pa.string())),
        # The method that made the slate (recommend, search, rank, similar), and the words that it answered.
        _optional("method", pa.string()),
        _optional("query", pa.string()),
        # How many slates this one stands for, 1 / the share of users whose slates are logged; NULL is 1.
        _optional("weight", pa.float32()),
        *ALLOWED,
    ]
)
IMPRESSIONS_REQUIRED: Required = ("request_id", "user_id", "timestamp", "item_ids", "propensities")


def event_type_key(name: str) -> int:
    """The uint32 that stands for an event type in a stored record: CRC-32 of its UTF-8 name, so no registry exists."""
    return zlib.crc32(name.encode())


def event_type_keys(names: Sequence[str]) -> npt.NDArray[np.uint32]:
    """``event_type_key`` of each name; there are few distinct ones, so each is computed once."""
    known = {name: event_type_key(name) for name in set(names)}
    return np.fromiter((known[name] for name in names), np.uint32, len(names))


def _digest(external: str | None) -> bytes:
    return hashlib.blake2b(external.encode(), digest_size=8).digest() if external else bytes(8)


def item_key(external: str | None) -> int:
    """The uint64 key of an external id: BLAKE2b-64 of its UTF-8 bytes, little endian; 0 (none) for None and ``""``.

    Creators and categories use the same function; which of them a key means is known from where it stands.
    """
    return int.from_bytes(_digest(external), "little")


def item_keys(externals: Sequence[str | None]) -> npt.NDArray[np.uint64]:
    """``item_key`` of each id, as uint64[n]."""
    return np.frombuffer(b"".join(map(_digest, externals)), "<u8").astype(np.uint64)


@dataclass(frozen=True, slots=True)
class Feature:
    """One number a model reads.

    Attributes:
        name: Unique in its set, lower case with underscores.
        meaning: One sentence for a person, with the unit.
        window: What it looks at: ``request``, ``newest 256 events``, ``item``.
        dtype: The numpy name of its type.
        version: Raised when the computation changes under the same name.
    """

    name: str
    meaning: str
    window: str = "request"
    dtype: str = "float32"
    version: int = 1


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """An ordered set of features; position = column in the model's input.

    Raises:
        ValueError: Two features share a name.
    """

    features: tuple[Feature, ...]

    def __post_init__(self) -> None:
        """Refuse a set in which a name would mean two columns."""
        if len(set(self.names)) != len(self.features):
            raise ValueError(f"feature names must be unique, got {list(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names in column order."""
        return tuple(feature.name for feature in self.features)

    def __len__(self) -> int:
        """Count the columns."""
        return len(self.features)

    def __iter__(self) -> Iterator[Feature]:
        """Iterate in column order."""
        return iter(self.features)

    def fingerprint(self) -> str:
        """Sha256 over everything that changes a model's input: order, names, types, windows and versions.

        The meaning is left out: better words for the same number do not make a bundle incompatible.
        """
        columns = [[f.name, f.dtype, f.window, f.version] for f in self.features]
        return hashlib.sha256(json.dumps(columns, separators=(",", ":")).encode()).hexdigest()
