"""The events of a data set as records."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.catalog_columns import CatalogColumns
from features.histories import ItemRows, Logged, records_of
from features.keys import event_type_keys, item_keys
from features.records import Records
from features.tables.order import codes, is_present


def table_records(events: pa.Table, items: ItemRows, columns: CatalogColumns) -> tuple[Records, npt.NDArray[np.int32]]:
    """Returns the records that ingest would have written of a table, and the row of each event's item.

    Args:
        events: `EVENTS`.
        items: Finds the items.
        columns: The catalogue's columns.

    Returns:
        RECORD [n], and the rows, -1 for an item that is unknown; int32 [n].
    """
    # Each distinct id is hashed once: a log names the same items again and again.
    item_ids, item_codes = codes(events["item_id"])
    type_names, type_codes = codes(events["event_type"])
    # Data sets without times have an order alone.
    timed = is_present(events["timestamp"])
    return records_of(
        item_keys(item_ids)[item_codes],
        event_type_keys(type_names)[type_codes],
        pc.fill_null(events["timestamp"], 0).to_numpy() if timed else 0,
        events["value"].to_numpy(),
        Logged.of(events),
        items,
        columns,
    )
