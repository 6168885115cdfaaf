"""Joins events with the slates that they name, for the checks of `features.tables.validate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import numbers, pc, to_mask
from features.subjects import is_anonymous
from features.tables.evidence import Evidence
from features.tables.order import codes


@dataclass(frozen=True, slots=True)
class SlateJoin:
    """Events joined with the slates that they name; arrays by event.

    Attributes:
        named: The event names a request.
        answered: That request was answered with a slate; false if it names none.
        same_user: The slate was the user's, or was shown to an anonymous user, who may have signed in since.
        shown_at: Time of the slate, ms; 0 if it is unknown.
        place: Position of the item in the slate, -1 if it is not in it.
    """

    named: npt.NDArray[np.bool_]
    answered: npt.NDArray[np.bool_]
    same_user: npt.NDArray[np.bool_]
    shown_at: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]

    @classmethod
    def of(cls, evidence: Evidence) -> SlateJoin:
        """Joins the events of some evidence with its slates, which it must have."""
        events, slates = evidence.events, evidence.impressions
        assert slates is not None
        named = to_mask(pc.not_equal(events["request_id"], ""))
        rows = pc.fill_null(pc.index_in(events["request_id"], value_set=flattened(slates["request_id"])), -1)
        slate = rows.to_numpy().astype(np.int64)
        answered = named & (slate >= 0)
        user_ids, users = codes(pa.chunked_array([*events["user_id"].chunks, *slates["user_id"].chunks], pa.string()))
        # Row -1, of an event without a slate, finds the values appended here behind those of the last slate.
        slate_users = np.append(users[events.num_rows :], -1)
        anonymous = np.array([is_anonymous(name) for name in user_ids] + [False])
        shown_at = np.append(numbers(slates["timestamp"]), 0)
        return cls(
            named=named,
            answered=answered,
            same_user=(slate_users[slate] == users[: events.num_rows]) | anonymous[slate_users[slate]],
            shown_at=shown_at[slate],
            place=_places(events, slates, slate, answered),
        )


def _places(
    events: pa.Table, slates: pa.Table, slate: npt.NDArray[np.int64], answered: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Returns the position of each event's item in its slate, -1 if it is not in it."""
    flat = pc.list_flatten(slates["item_ids"])
    if not len(flat):
        return np.full(events.num_rows, -1)
    lengths = pc.fill_null(pc.list_value_length(slates["item_ids"]), 0).to_numpy().astype(np.int64)
    item_ids, items = codes(pa.chunked_array([*events["item_id"].chunks, *flat.chunks], pa.string()))
    # Slate and item make one number, so that one sorted search finds all events in all slates.
    width = len(item_ids) + 1
    examples = np.repeat(np.arange(slates.num_rows), lengths) * width + items[events.num_rows :]
    positions = np.arange(examples.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    order = np.argsort(examples, kind="stable")
    wanted = slate * width + items[: events.num_rows]
    at = np.minimum(np.searchsorted(examples[order], wanted), examples.size - 1)
    in_slate = answered & (examples[order][at] == wanted)
    return np.where(in_slate, positions[order][at], -1)


def flattened(column: Any) -> Any:
    """Returns a column as one array."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
