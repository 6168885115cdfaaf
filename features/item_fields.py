"""The fields of items that an answer may carry, by their names in the contract, and how they are read together."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.catalog import RECORD_FIELDS, Catalog
from features.tables.schema import ITEMS

COLUMNS = {f"{name}_ms" if name in ("available_from", "available_until") else name: name for name in RECORD_FIELDS}
"""The column of the catalogue that holds each field."""

FIELDS = tuple(COLUMNS)
ONE_ATTRIBUTE = "attributes."
"""Beginning of the name of a single attribute."""

_LONGEST = 64


def is_field(name: str) -> bool:
    """Returns True for a field of an item, and for `attributes.NAME`, a single one."""
    return name in COLUMNS or (name.startswith(ONE_ATTRIBUTE) and name != ONE_ATTRIBUTE)


def no_field(name: str) -> str:
    """Returns what is wrong with a name that is no field of an item, and the fields that it has."""
    # Cut: the name comes from outside, and comparing takes time by its length.
    close = difflib.get_close_matches(name[:_LONGEST].lower().strip(), FIELDS, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    fields = f"{', '.join(FIELDS)}, or attributes.NAME for a single attribute"
    return f"{name[:_LONGEST]!r} is no field of an item: it has {fields}{hint}"


def values_of(
    catalog: Catalog, rows: npt.NDArray[np.integer[Any]] | Sequence[int], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the named fields of the items of some rows, by name; None or empty if an item has none."""
    # Each column once, however many single attributes are asked for.
    columns = ["attributes" if name.startswith(ONE_ATTRIBUTE) else COLUMNS[name] for name in names]
    records = catalog.records([int(row) for row in rows], list(dict.fromkeys(columns)))
    return [{name: value_of(record, name) for name in names} for record in records]


def value_of(record: dict[str, Any], name: str) -> Any:
    """Returns a field of a record of the catalogue."""
    if name.startswith(ONE_ATTRIBUTE):
        return record["attributes"].get(name.removeprefix(ONE_ATTRIBUTE))
    return record[COLUMNS[name]]


def arrow_type(names: Sequence[str]) -> pa.DataType:
    """Returns the type of the named fields of one item as a struct; times are milliseconds, 0 for always."""
    types = {name: ITEMS.field(COLUMNS[name]).type if name in COLUMNS else pa.string() for name in names}
    return pa.struct([pa.field(name, dtype) for name, dtype in types.items()])
