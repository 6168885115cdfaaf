"""Items: converts them between the contract and the catalogue, and checks the fields that a request names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from features.catalog import Catalog
from features.item_fields import COLUMNS, FIELDS, ONE_ATTRIBUTE, is_field, no_field, value_of, values_of
from penchant.v1.catalog_pb2 import Item
from serving.errors import InvalidArgument
from serving.services import validation as checks

MAX_CATEGORIES = 16
MAX_FIELDS = 64


def item_record(item: Item, names: Iterable[str] = FIELDS) -> dict[str, Any]:
    """Returns fields of an item as the catalogue has them, each checked; a field that the item lacks is None.

    Args:
        item: The item; its id is not among the fields.
        names: Fields of the contract.

    Raises:
        InvalidArgument: A field is wrong.
    """
    return {COLUMNS[name]: _READ[name](item) for name in names}


def require_window(record: Mapping[str, Any]) -> None:
    """Refuses an item whose availability ends before it begins.

    Raises:
        InvalidArgument: It does.
    """
    start, end = record["available_from"], record["available_until"]
    if end and end <= start:
        raise InvalidArgument("available_until_ms", f"must be after available_from_ms ({start}), or 0 for always")


def record_item(item_id: str, record: dict[str, Any]) -> Item:
    """Returns a record of the catalogue as an item."""
    return _item(item_id, {name: value_of(record, name) for name in FIELDS})


def item_fields(names: Sequence[str], field: str) -> list[str]:
    """Returns the names of item fields in a request, each once.

    Raises:
        InvalidArgument: One of them is no field of an item.
    """
    checks.count(names, field, 0, MAX_FIELDS, "names")
    for place, name in enumerate(names):
        if not is_field(name):
            raise InvalidArgument(f"{field}[{place}]", no_field(name))
        checks.identifier(name, f"{field}[{place}]")
    return list(dict.fromkeys(names))


def shown_items(catalog: Catalog, rows: npt.NDArray[np.int32], names: Sequence[str]) -> list[Item]:
    """Returns the named fields of the items of some rows, read together."""
    return [_item(*pair) for pair in zip(catalog.ids(rows), values_of(catalog, rows, names), strict=True)]


def _item(item_id: str, values: Mapping[str, Any]) -> Item:
    """Returns an item with some fields; those without a value are not set."""
    item = Item(item_id=item_id)
    for name, value in values.items():
        if value is None:
            continue
        if name == "categories":
            item.categories.extend(value)
        elif name == "attributes":
            # The catalogue may hold null for an attribute, the contract cannot.
            item.attributes.update({key: text or "" for key, text in value.items()})
        elif name.startswith(ONE_ATTRIBUTE):
            item.attributes[name.removeprefix(ONE_ATTRIBUTE)] = value
        else:
            setattr(item, name, value)
    return item


def held_fields(record: Mapping[str, Any]) -> list[str]:
    """Returns the fields, without those of availability, that have a value in a record of the catalogue."""
    names = [name for name in FIELDS if name not in ("available", "available_from_ms", "available_until_ms")]
    return [name for name in names if record[COLUMNS[name]] not in (None, "", [], {})]


_READ: Mapping[str, Callable[[Item], Any]] = {
    "title": lambda item: checks.text(item.title, "title", limit=1024) or None,
    "description": lambda item: checks.text(item.description, "description", limit=16_384) or None,
    "categories": lambda item: checks.identifiers(item.categories, "categories", 0, MAX_CATEGORIES),
    "creator_id": lambda item: checks.identifier(item.creator_id, "creator_id", required=False) or None,
    "price": lambda item: checks.number(item.price, "price", 0.0) if item.HasField("price") else None,
    "available": lambda item: item.available if item.HasField("available") else True,
    "available_from_ms": lambda item: checks.timestamp(item.available_from_ms, "available_from_ms"),
    "available_until_ms": lambda item: checks.timestamp(item.available_until_ms, "available_until_ms"),
    "parent_id": lambda item: checks.identifier(item.parent_id, "parent_id", required=False) or None,
    "attributes": lambda item: checks.attributes(item.attributes, "attributes"),
}
