"""The columns of the canonical tables.

The columns that a table must have are the non-nullable fields of its schema, listed again in its ``*_REQUIRED`` tuple,
where an inner tuple means "one of these".
"""

from __future__ import annotations

from typing import Any, TypeAlias

import pyarrow as pa

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


# The user's consent to train models on a row, and to measure by it what helped; NULL allows both.
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
        # Keys of the item's category and creator at ingest, 0 for none: a replay must fold what serving folded.
        _optional("category_key", pa.uint64()),
        _optional("creator_key", pa.uint64()),
        # The event may be in the profile: decided at ingest, by the user's consent at that time.
        _optional("personal", pa.bool_()),
        *ALLOWED,
    ]
)
EVENTS_REQUIRED: Required = ("user_id", "item_id", "event_type", ("timestamp", "sequence"))
EVENT_SETS_REQUIRED: Required = EVENTS_REQUIRED[:-1]
"""Of a table whose files all lack a time and a sequence: sets of items, which only a training can use."""

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
        # In the order shown. A propensity is the probability of this item in this position; NaN = not exact.
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
        # The slates that this one stands for: 1 / the share of users whose slates are logged; NULL is 1.
        _optional("weight", pa.float32()),
        # Fields of the request; a time zone by its IANA name.
        _optional("device", pa.string()),
        _optional("channel", pa.string()),
        _optional("locale", pa.string()),
        _optional("time_zone", pa.string()),
        # The attributes of the user as serving read them, see `features.controls.attributes_text`.
        _optional("user_attributes", pa.string()),
        _optional("attributes", _ATTRIBUTES),
        *ALLOWED,
    ]
)
IMPRESSIONS_REQUIRED: Required = ("request_id", "user_id", "timestamp", "item_ids", "propensities")
