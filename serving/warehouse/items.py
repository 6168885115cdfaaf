"""The catalogue as a table of the warehouse: the items of the bundle, and every change since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.arrays import pc
from features.bundle import Bundle
from features.bundle_tables import read_items
from features.tables.dataset import conform, read_table
from features.tables.schema import ITEMS, ITEMS_REQUIRED
from serving.stores.catalog_log import CatalogLog, Change
from serving.warehouse.parquet import put_table


class ItemTable:
    """Keeps `items.parquet` as the catalogue is; a deleted item stays as unavailable, because events name it."""

    def __init__(self, path: Path, log: CatalogLog, bundle: Bundle | None = None) -> None:
        """Takes the file, the changes, and the bundle with the items that no change ever put."""
        self.version = 0
        self._path, self._log, self._bundle = path, log, bundle
        self._items: pa.Table = ITEMS.empty_table()
        self._opened = self._changed = False

    def open(self) -> None:
        """Reads the file, if there is one, and the bundle, whose items replace those of the file; once.

        Raises:
            BundleError: The bundle is refused.
            TablesError: The file is damaged.
        """
        if self._opened:
            return
        self._changed = not self._path.exists()
        if self._path.exists():
            self._items = read_table(self._path, ITEMS, ITEMS_REQUIRED).table
        if self._bundle:
            bundle = self._bundle
            self.version = bundle.manifest.catalog_version
            before = self._items
            self._replace(conform(read_items(bundle), ITEMS, ITEMS_REQUIRED, "items").table)
            self._changed = self._changed or not self._items.equals(before)
        self._opened = True

    def follow(self) -> bool:
        """Applies new changes, and writes the file if they changed it; returns True if it wrote.

        Raises:
            CatalogLogUnavailable: The log does not answer.
        """
        while True:
            self.version, changes = self._log.tail(self.version)
            if not changes:
                break
            self._apply(changes)
        if not self._changed:
            return False
        put_table(self._path, self._items)
        self._changed = False
        return True

    def _apply(self, changes: list[Change]) -> None:
        item_ids = pa.array([change.item_id for change in changes])
        changed = self._items.filter(pc.is_in(self._items["item_id"], value_set=item_ids))
        rows = {row["item_id"]: row for row in changed.to_pylist()}
        for change in changes:
            if change.kind == "put":
                rows[change.item_id] = _row(json.loads(change.payload))
            # An item that was never put has no fields to patch.
            elif change.kind == "patch" and change.item_id in rows:
                rows[change.item_id] = _row(_as_logged(rows[change.item_id]) | json.loads(change.payload))
            elif change.item_id in rows:
                # A deleted item is an unavailable one.
                fields = json.loads(change.payload) if change.kind == "availability" else {"available": False}
                rows[change.item_id] |= {name: value or None for name, value in fields.items()}
                rows[change.item_id]["available"] = bool(fields["available"])
        self._replace(pa.Table.from_pylist(list(rows.values()), ITEMS))
        self._changed = True

    def _replace(self, rows: pa.Table) -> None:
        """Puts rows in the place of those of the same items; the table stays in the order of its ids."""
        unchanged = self._items.filter(pc.invert(pc.is_in(self._items["item_id"], value_set=rows["item_id"])))
        self._items = pa.concat_tables([unchanged, rows]).sort_by("item_id").combine_chunks()


def _row(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns an item as `PutItems` logged it as a row of the table; a time of 0, which means always, is NULL."""
    row: dict[str, Any] = {name: fields.get(name) or None for name in ITEMS.names}
    row |= {"available": fields.get("available") is not False, "price": fields.get("price")}
    return row | {"attributes": list(fields["attributes"].items()) if fields.get("attributes") else None}


def _as_logged(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of the table as `PutItems` would have logged it."""
    return row | {"attributes": dict(row["attributes"] or ())}
