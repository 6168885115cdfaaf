"""CatalogService: changes the catalogue durably, waits a moment until every worker shows it, and returns items."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import grpc

from features.clock import now_ms
from features.item_fields import FIELDS, no_field
from penchant.v1 import catalog_pb2, catalog_pb2_grpc
from serving.engine.catalog_sync import CatalogSync
from serving.engine.engine import EngineRef
from serving.errors import InvalidArgument, NotFound, ServingError
from serving.services import validation as checks
from serving.services.items import MAX_FIELDS, held_fields, item_record, record_item, require_window
from serving.stores.catalog_log import CatalogLog, Change

MAX_CHANGES = 1_000
EVERYWHERE_S = 1.0
"""Longest wait for every worker, in seconds."""

ANSWER_BYTES = 3 << 20
"""Size above which a response takes no more items: the default limit of clients is 4 MiB."""

T = TypeVar("T")
_WAIT_SHARE = 0.8
_VERSION_SHARE = 0.5
_UNKNOWN = "the catalogue does not have this item: put it first"


class _Outcome(NamedTuple):
    """The outcome of changes, as every response to changes has it."""

    catalog_version: int
    statuses: list[catalog_pb2.ItemStatus]
    visible_everywhere: bool


class CatalogService(catalog_pb2_grpc.CatalogServiceServicer):
    """Changes the catalogue durably; every worker follows."""

    def __init__(self, engine_ref: EngineRef, log: CatalogLog, catalog_sync: CatalogSync) -> None:
        self._engine_ref, self._log, self._catalog_sync = engine_ref, log, catalog_sync

    def PutItems(
        self, request: catalog_pb2.PutItemsRequest, context: grpc.ServicerContext
    ) -> catalog_pb2.PutItemsResponse:
        """Puts whole items, new or in place of others; an invalid item does not affect the others."""
        checks.count(request.items, "items", 1, MAX_CHANGES, "items")
        now = now_ms()

        def change(item: catalog_pb2.Item, status: catalog_pb2.ItemStatus) -> Change:
            checks.identifier(item.item_id, "item_id")
            record = item_record(item)
            require_window(record)
            self._note_replaced(item.item_id, record, status)
            return Change("put", item.item_id, _json({"item_id": item.item_id, **record, "put_at": now}))

        return catalog_pb2.PutItemsResponse(**self._change(request.items, _id, change, context)._asdict())

    def PatchItems(
        self, request: catalog_pb2.PatchItemsRequest, context: grpc.ServicerContext
    ) -> catalog_pb2.PatchItemsResponse:
        """Changes single fields of items; an invalid patch does not affect the others."""
        checks.count(request.patches, "patches", 1, MAX_CHANGES, "patches")

        def change(patch: catalog_pb2.ItemPatch, status: catalog_pb2.ItemStatus) -> Change:
            row = self._require_row(checks.identifier(patch.item.item_id, "item_id"))
            fields = item_record(patch.item, _changed_fields(patch))
            # A patch may change one end of the window only; the other is the catalogue's.
            require_window(self._engine_ref.engine.catalog.record(row) | fields)
            return Change("patch", patch.item.item_id, _json(fields))

        outcome = self._change(request.patches, lambda patch: patch.item.item_id, change, context)
        return catalog_pb2.PatchItemsResponse(**outcome._asdict())

    def GetItems(
        self, request: catalog_pb2.GetItemsRequest, context: grpc.ServicerContext
    ) -> catalog_pb2.GetItemsResponse:
        """Returns items as this worker's catalogue has them."""
        ids = list(dict.fromkeys(checks.identifiers(request.item_ids, "item_ids", 1, MAX_CHANGES)))
        self._catalog_sync.wait(
            request.min_catalog_version, min(EVERYWHERE_S, context.time_remaining() * _VERSION_SHARE)
        )
        # The version first: the items may be newer than it, but never older.
        response = catalog_pb2.GetItemsResponse(catalog_version=self._catalog_sync.version)
        catalog, size = self._engine_ref.engine.catalog, 0
        for place, (item_id, row) in enumerate(zip(ids, catalog.rows(ids).tolist(), strict=True)):
            if not self._catalog_sync.knows(row):
                response.missing_item_ids.append(item_id)
                continue
            item = record_item(item_id, catalog.record(row))
            size += item.ByteSize()
            # At least one item per response, or a large item could never be read.
            if response.items and size > ANSWER_BYTES:
                response.remaining_item_ids.extend(ids[place:])
                break
            response.items.append(item)
        return response

    def SetAvailability(
        self, request: catalog_pb2.SetAvailabilityRequest, context: grpc.ServicerContext
    ) -> catalog_pb2.SetAvailabilityResponse:
        """Sets the availability of items, and its beginning and end."""
        checks.count(request.changes, "changes", 1, MAX_CHANGES, "changes")

        def change(availability: catalog_pb2.Availability, status: catalog_pb2.ItemStatus) -> Change:
            self._require_row(checks.identifier(availability.item_id, "item_id"))
            window = {
                "available_from": checks.timestamp(availability.available_from_ms, "available_from_ms"),
                "available_until": checks.timestamp(availability.available_until_ms, "available_until_ms"),
            }
            require_window(window)
            return Change("availability", availability.item_id, _json({"available": availability.available, **window}))

        return catalog_pb2.SetAvailabilityResponse(**self._change(request.changes, _id, change, context)._asdict())

    def DeleteItems(
        self, request: catalog_pb2.DeleteItemsRequest, context: grpc.ServicerContext
    ) -> catalog_pb2.DeleteItemsResponse:
        """Deletes items: no slate has them again, unless they are put again."""
        checks.count(request.item_ids, "item_ids", 1, MAX_CHANGES, "ids")

        def change(item_id: str, status: catalog_pb2.ItemStatus) -> Change:
            self._require_row(checks.identifier(item_id, "item_ids"))
            return Change("delete", item_id)

        return catalog_pb2.DeleteItemsResponse(**self._change(request.item_ids, str, change, context)._asdict())

    def _require_row(self, item_id: str) -> int:
        """Returns the row of an item.

        Raises:
            NotFound: The catalogue does not have it.
        """
        row = int(self._engine_ref.engine.catalog.rows([item_id])[0])
        if not self._catalog_sync.knows(row):
            raise NotFound(_UNKNOWN, field="item_id")
        return row

    def _note_replaced(self, item_id: str, record: dict[str, Any], status: catalog_pb2.ItemStatus) -> None:
        """Notes in a status that an item is replaced, and the fields that it loses by that."""
        catalog = self._engine_ref.engine.catalog
        row = int(catalog.rows([item_id])[0])
        if not self._catalog_sync.knows(row):
            return
        new_fields = held_fields(record)
        status.replaced = True
        status.cleared_fields.extend(name for name in held_fields(catalog.record(row)) if name not in new_fields)
        if status.cleared_fields:
            cleared = ", ".join(status.cleared_fields)
            status.message = f"replaced, and without {cleared}, which it had before: PatchItems changes single fields"

    def _change(
        self,
        values: Sequence[T],
        name: Callable[[T], str],
        change: Callable[[T, catalog_pb2.ItemStatus], Change],
        context: grpc.ServicerContext,
    ) -> _Outcome:
        """Writes the valid changes, and waits a moment until every worker shows them; returns a status per value."""
        changes, accepted = list[Change](), list[catalog_pb2.ItemStatus]()
        statuses = [catalog_pb2.ItemStatus(item_id=name(value)) for value in values]
        for value, status in zip(values, statuses, strict=True):
            try:
                changes.append(change(value, status))
                accepted.append(status)
            except ServingError as error:
                _refuse(status, error)
        # One write for all valid changes: a round trip for each would take the caller's time.
        version, deleted = self._log.write(changes)
        # Another caller may have deleted an item after the check above.
        for place in deleted:
            _refuse(accepted[place], NotFound(_UNKNOWN, field="item_id"))
        # Part of the caller's time is left for the response, and a slow worker must not make a durable change fail.
        seconds = min(EVERYWHERE_S, context.time_remaining() * _WAIT_SHARE)
        return _Outcome(version, statuses, self._catalog_sync.wait_everywhere(version, seconds))


def _changed_fields(patch: catalog_pb2.ItemPatch) -> list[str]:
    """Returns the fields that a patch changes: those of its mask, else those that its item holds.

    Raises:
        InvalidArgument: There are none, or one of them cannot be changed.
    """
    checks.count(patch.update_mask.paths, "update_mask", 0, MAX_FIELDS, "names")
    names = list(patch.update_mask.paths)
    if not names:
        names = [field.name for field, _ in patch.item.ListFields() if field.name in FIELDS]
    if not names:
        raise InvalidArgument("update_mask", f"names no field to change, and the item holds none: {', '.join(FIELDS)}")
    for name in names:
        if name == "item_id":
            raise InvalidArgument("update_mask", "names item_id, which cannot be changed: put another item")
        if name not in FIELDS:
            raise InvalidArgument("update_mask", no_field(name))
    return names


def _refuse(status: catalog_pb2.ItemStatus, error: ServingError) -> None:
    status.code = getattr(grpc.StatusCode, error.code).value[0]
    status.message, status.field = str(error), error.field


def _id(value: catalog_pb2.Item | catalog_pb2.Availability) -> str:
    return value.item_id


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
