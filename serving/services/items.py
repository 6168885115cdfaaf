"""Items in the words of the contract and in those of the catalogue, and the fields that a request may name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from features.catalog import RECORD_FIELDS, Catalog
from penchant.v1.catalog_pb2 import Item
from serving.errors import InvalidArgument
from serving.services import checks

MAX_CATEGORIES = 16
MAX_FIELDS = 64

_COLUMNS = {name: f"{name}_ms" if name in ("available_from", "available_until") else name for name in RECORD_FIELDS}
_FIELDS = {field: column for column, field in _COLUMNS.items()}
FIELDS = tuple(field.name for field in Item.DESCRIPTOR.fields if field.name in _FIELDS)
"""Fields of an item that a request may name, in the order of the contract."""

_CLOCK = ("available_from", "available_until")
_ONE = "attributes."


def item_record(item: Item, names: Iterable[str] = FIELDS) -> dict[str, Any]:
    """Returns fields of an item as the catalogue has them, each checked; what the item leaves out is None.

    Args:
        item: The item; its id is not among the fields.
        names: Fields of the contract.

    Raises:
        InvalidArgument: A field is wrong.
    """
    return {_FIELDS[name]: _READ[name](item) for name in names}


def require_window(record: Mapping[str, Any]) -> None:
    """Refuses an item that may be shown only until before it may be shown.

    Raises:
        InvalidArgument: Names the later time.
    """
    start, end = record["available_from"], record["available_until"]
    if end and end <= start:
        raise InvalidArgument("available_until_ms", f"must be after available_from_ms ({start}), or 0 for always")


def record_item(item_id: str, record: Mapping[str, Any], names: Sequence[str] = FIELDS) -> Item:
    """Returns a record of the catalogue as an item that holds the named fields; `attributes.NAME` is a single one."""
    item = Item(item_id=item_id)
    for name in names:
        if name.startswith(_ONE):
            key = name.removeprefix(_ONE)
            if key in record["attributes"]:
                item.attributes[key] = record["attributes"][key] or ""
        elif name == "categories":
            item.categories.extend(record[name] or ())
        elif name == "attributes":
            item.attributes.update({key: value or "" for key, value in record[name].items()})
        elif (value := record[_FIELDS[name]]) is not None:
            setattr(item, name, value)
    return item


def item_fields(names: Sequence[str], field: str) -> list[str]:
    """Returns the fields of items that a request asks for, each once.

    Raises:
        InvalidArgument: One of them is no field of an item.
    """
    checks.count(names, field, 0, MAX_FIELDS, "names")
    for place, name in enumerate(names):
        if name.startswith(_ONE) and name != _ONE:
            checks.identifier(name, f"{field}[{place}]")
        elif name not in _FIELDS:
            raise InvalidArgument(f"{field}[{place}]", no_field(name, "or attributes.NAME for a single attribute"))
    return list(dict.fromkeys(names))


def no_field(name: str, more: str = "") -> str:
    """Returns what is wrong with a name that is no field of an item."""
    close = difflib.get_close_matches(name[:64].lower().strip(), (*FIELDS, "item_id"), 1)
    meant = f"; did you mean {close[0]!r}?" if close and close[0] != "item_id" else ""
    return f"{name[:64]!r} is no field of an item: it has {', '.join(FIELDS)}{', ' if more else ''}{more}{meant}"


def shown_items(catalog: Catalog, rows: npt.NDArray[np.int32], names: Sequence[str]) -> list[Item]:
    """Returns the named fields of the items of some rows, read together."""
    columns = list(dict.fromkeys("attributes" if name.startswith(_ONE) else _FIELDS[name] for name in names))
    ids, records = catalog.ids(rows), catalog.records(rows.tolist(), columns)
    return [record_item(item_id, record, names) for item_id, record in zip(ids, records, strict=True)]


def held_fields(record: Mapping[str, Any]) -> list[str]:
    """Returns the fields, but those of availability, in which a record of the catalogue says something."""
    told = [name for name in FIELDS if name not in ("available", "available_from_ms", "available_until_ms")]
    return [name for name in told if record[_FIELDS[name]] not in (None, "", [], {})]


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
