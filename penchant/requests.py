"""Requests of a caller, checked before they are sent: options of ranking calls, events and patches of items."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

from google.protobuf import field_mask_pb2

from penchant.v1 import catalog_pb2, common_pb2, event_pb2, ranking_pb2


class Options(TypedDict, total=False):
    """Options of every ranking call; the meaning of each is that of `RankingOptions` in the contract."""

    user_id: str
    anonymous_id: str
    session_id: str
    surface: str
    page_size: int
    exclude_item_ids: Sequence[str]
    personalize: bool
    min_profile_version: int
    min_catalog_version: int
    explain: bool
    dials: common_pb2.Dials
    request_id: str
    context: common_pb2.RequestContext
    fields: Sequence[str]
    timeout_s: float


class EventFields(TypedDict, total=False):
    """Further fields of an event; the meaning of each is that of `Event` in the contract."""

    event_id: str
    timestamp_ms: int
    value: float
    session_id: str
    request_id: str
    surface: str
    query: str
    position: int
    attributes: Mapping[str, str]


def event(
    user_id: str = "", item_id: str = "", event_type: str = "", *, anonymous_id: str = "", **fields: Unpack[EventFields]
) -> event_pb2.Event:
    """Makes an event with an id of its own.

    Args:
        user_id: The user who did it.
        item_id: The item; may be empty for a search.
        event_type: The kind of the event, such as "view_item": see `Event.event_type` in the contract.
        anonymous_id: Id of a user who is not logged in; `user_id` wins if both are given.
        **fields: Other fields of the contract's Event.

    Raises:
        TypeError: A field is none of the contract's.
    """
    _require_known(fields, EventFields.__annotations__, "event()")
    # Made here and not by the service, so that a retry carries the same id and counts once.
    fields.setdefault("event_id", uuid.uuid4().hex)
    subject = common_pb2.Subject(user_id=user_id, anonymous_id=anonymous_id)
    return event_pb2.Event(subject=subject, item_id=item_id, event_type=event_type, **fields)


def item_patch(item_id: str, **fields: Any) -> catalog_pb2.ItemPatch:
    """Makes a patch of an item.

    Args:
        item_id: The item.
        **fields: The new values by name, as in the contract's Item; None clears a field.

    Raises:
        TypeError: A field is none of the contract's.
        ValueError: No field is named.
    """
    names = [field.name for field in catalog_pb2.Item.DESCRIPTOR.fields if field.name != "item_id"]
    _require_known(fields, names, "item_patch()")
    if not fields:
        raise ValueError(f"item_patch() names no field to change: {', '.join(names)}")
    values = {name: value for name, value in fields.items() if value is not None}
    # The mask names cleared fields too; a field that is in the mask and has no value is cleared.
    mask = field_mask_pb2.FieldMask(paths=list(fields))
    return catalog_pb2.ItemPatch(item=catalog_pb2.Item(item_id=item_id, **values), update_mask=mask)


def ranking_options(options: Options, of: str) -> ranking_pb2.RankingOptions:
    """Returns the options of a call as the contract has them, with a new request id if they name none.

    Raises:
        TypeError: The call has no option of a name.
    """
    _require_known(options, Options.__annotations__, f"{of}()")
    subject = None
    if options.get("user_id") or options.get("anonymous_id"):
        subject = common_pb2.Subject(user_id=options.get("user_id", ""), anonymous_id=options.get("anonymous_id", ""))
    personal = options.get("personalize", True)
    return ranking_pb2.RankingOptions(
        request_id=options.get("request_id") or uuid.uuid4().hex,
        subject=subject,
        session_id=options.get("session_id", ""),
        surface=options.get("surface", ""),
        context=options.get("context"),
        page_size=options.get("page_size", 20),
        exclude_item_ids=options.get("exclude_item_ids", ()),
        personalization=ranking_pb2.PERSONALIZATION_AUTO if personal else ranking_pb2.PERSONALIZATION_DISABLED,
        min_profile_version=options.get("min_profile_version", 0),
        min_catalog_version=options.get("min_catalog_version", 0),
        explain=options.get("explain", False),
        dials=options.get("dials"),
        fields=options.get("fields", ()),
    )


def _require_known(names: Iterable[str], options: Collection[str], of: str) -> None:
    """Refuses a name that no option has.

    Raises:
        TypeError: Names it, the nearest option, and all of them.
    """
    for name in names:
        if name not in options:
            close = difflib.get_close_matches(name, options, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise TypeError(f"{of} has no option {name!r}: {hint}it has {', '.join(options)}")
