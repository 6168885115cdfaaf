"""CatalogService: changes the catalogue durably, and answers when every worker shows it."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc

from penchant.v1 import catalog_pb2, catalog_pb2_grpc
from serving.catalog_log import CatalogLog, Change
from serving.engine import Host
from serving.errors import InvalidArgument, NotFound, ServingError
from serving.follower import Follower
from serving.services import checks

MAX_CHANGES = 1_000
EVERYWHERE_S = 1.0
"""Longest wait for every worker."""

T = TypeVar("T")
_WAIT_SHARE = 0.8


class CatalogService(catalog_pb2_grpc.CatalogServiceServicer):
    """Changes the catalogue durably; every worker follows."""

    def __init__(self, host: Host, log: CatalogLog, follower: Follower) -> None:
        self._host, self._log, self._follower = host, log, follower

    def PutItems(
        self, request: catalog_pb2.PutItemsRequest, context: grpc.ServicerContext
    ) -> catalog_pb2.PutItemsResponse:
        """Puts items, new or changed; bad ones do not hurt good ones."""
        checks.count(request.items, "items", 1, MAX_CHANGES, "items")
        now = int(time.time() * 1000)

        def change(item: catalog_pb2.Item) -> Change:
            return Change("put", item.item_id, _json(_item(item) | {"put_at": now}))

        changes, statuses = _checked(request.items, lambda item: item.item_id, change)
        version, everywhere = self._make(changes, context)
        return catalog_pb2.PutItemsResponse(catalog_version=version, statuses=statuses, visible_everywhere=everywhere)

    def SetAvailability(
        self, request: catalog_pb2.SetAvailabilityRequest, context: grpc.ServicerContext
    ) -> catalog_pb2.SetAvailabilityResponse:
        """Sets whether and when items may be shown."""
        checks.count(request.changes, "changes", 1, MAX_CHANGES, "changes")

        def change(wanted: catalog_pb2.Availability) -> Change:
            self._known(checks.identifier(wanted.item_id, "item_id"))
            window = _window(wanted.available_from_ms, wanted.available_until_ms)
            return Change("availability", wanted.item_id, _json({"available": wanted.available, **window}))

        changes, statuses = _checked(request.changes, lambda wanted: wanted.item_id, change)
        version, everywhere = self._make(changes, context)
        return catalog_pb2.SetAvailabilityResponse(
            catalog_version=version, statuses=statuses, visible_everywhere=everywhere
        )

    def DeleteItems(
        self, request: catalog_pb2.DeleteItemsRequest, context: grpc.ServicerContext
    ) -> catalog_pb2.DeleteItemsResponse:
        """Deletes items: they are never shown again, unless they are put again."""
        checks.count(request.item_ids, "item_ids", 1, MAX_CHANGES, "ids")

        def change(item_id: str) -> Change:
            self._known(checks.identifier(item_id, "item_ids"))
            return Change("delete", item_id)

        changes, statuses = _checked(request.item_ids, lambda item_id: item_id, change)
        version, everywhere = self._make(changes, context)
        return catalog_pb2.DeleteItemsResponse(
            catalog_version=version, statuses=statuses, visible_everywhere=everywhere
        )

    def _known(self, item_id: str) -> None:
        if not self._follower.knows(int(self._host.engine.catalog.rows([item_id])[0])):
            raise NotFound("the catalogue does not know this item: put it first", field="item_id")

    def _make(self, changes: Sequence[Change], context: grpc.ServicerContext) -> tuple[int, bool]:
        """Makes changes durable and waits a while until they are seen everywhere; the version, and whether they are."""
        version = self._log.put(changes)
        seconds = min(EVERYWHERE_S, context.time_remaining() * _WAIT_SHARE)
        return version, self._follower.wait_everywhere(version, seconds)


def _checked(
    values: Sequence[T], name: Callable[[T], str], change: Callable[[T], Change]
) -> tuple[list[Change], list[catalog_pb2.ItemStatus]]:
    """The changes that may be made, and a status for each value."""
    changes: list[Change] = []
    statuses: list[catalog_pb2.ItemStatus] = []
    for value in values:
        status = catalog_pb2.ItemStatus(item_id=name(value))
        try:
            changes.append(change(value))
        except ServingError as error:
            status.code = getattr(grpc.StatusCode, error.code).value[0]
            status.message, status.field = str(error), error.field
        statuses.append(status)
    return changes, statuses


def _item(item: catalog_pb2.Item) -> dict[str, Any]:
    """An item as a row of the canonical table.

    Raises:
        InvalidArgument: A field is wrong.
    """
    checks.identifier(item.item_id, "item_id")
    checks.identifier(item.creator_id, "creator_id", required=False)
    checks.identifier(item.parent_id, "parent_id", required=False)
    if item.HasField("price"):
        checks.number(item.price, "price", 0.0)
    return {
        "item_id": item.item_id,
        "title": checks.text(item.title, "title", limit=1024) or None,
        "description": checks.text(item.description, "description", limit=16_384) or None,
        "categories": checks.identifiers(item.categories, "categories", 0, 16),
        "creator_id": item.creator_id or None,
        "price": item.price if item.HasField("price") else None,
        "available": item.available if item.HasField("available") else True,
        **_window(item.available_from_ms, item.available_until_ms),
        "parent_id": item.parent_id or None,
        "attributes": checks.attributes(item.attributes, "attributes"),
    }


def _window(start: int, end: int) -> dict[str, int]:
    checks.timestamp(start, "available_from_ms")
    checks.timestamp(end, "available_until_ms")
    if end and end <= start:
        raise InvalidArgument("available_until_ms", f"must be after available_from_ms ({start}), or 0 for always")
    return {"available_from": start, "available_until": end}


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
