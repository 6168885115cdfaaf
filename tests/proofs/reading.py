"""Reading by construction: tables written in every form, read by Penchant and by pyarrow or polars.

A case is a table of a data set in a folder: types, encodings, layouts and faulty cells are drawn from a seed. The
oracle finds its files with pyarrow's dataset, reads each with pyarrow or polars, and says in plain Python for each cell
if it is a value, missing, or unreadable. Penchant must give the same rows and cells, count the same cells as unread and
refuse the same rows, or refuse the table in words that name the file, row or column. Never a silently different value.

    python -m tests.proofs.reading --files 2000 --seed 1

prints one line of JSON with what the tables were made of. Then each of the planted reading faults has to be found.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import decimal
import json
import math
import os
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

import features.arrays
import features.columns
import features.dialect
import features.files
import features.rows
import features.tables
import features.times
from features.errors import TablesError
from features.schema import EVENTS, EVENTS_REQUIRED, ITEMS, ITEMS_REQUIRED
from features.tables import Loaded, open_dataset, read_table

END_MS = 4_102_444_800_000
UTC = dt.UTC
PER_SECOND = {"s": 1, "ms": 1000, "us": 10**6, "ns": 10**9}
TYPES = ("view_item", "purchase", "add to cart", "ja/nein", "Käufe")
PRICES: dict[str, float | None] = {
    "12.99": 12.99,
    "$12.99": 12.99,
    "1,299.00": 1299.0,
    "12,99 €": 12.99,
    "1.299,00 EUR": 1299.0,
    "1 299,50 kr": 1299.5,
    "£ 7": 7.0,
    "1e3": 1000.0,
    "1,299": None,
    "1.299 €": None,
    "from 14.99": None,
    "-5": None,
    "free": None,
    "9.99-12.99": None,
}
"""Prices as text, and what they are; None is not read."""

TRUE, FALSE = ("true", "Yes", "T", "1", "in stock"), ("FALSE", "no", "f", "0", "out of stock")

Raw = list[Any]


class _Mark:
    """A cell without a value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


MISSING, BAD, LATE = _Mark("missing"), _Mark("unreadable"), _Mark("late")


# ------------------------------------------------------------------------------------------------ tables, drawn


@dataclass
class Column:
    """A column as it is written.

    Attributes:
        cells: The cells as an Arrow array.
        kind: How it was made, for the tally.
        unit: The unit of its numbers, where they are times.
        style: How a list is written as text.
    """

    cells: pa.Array
    kind: str
    unit: str = ""
    style: str = ""


@dataclass
class Case:
    """A table on disk.

    Attributes:
        path: The folder or file.
        table: "events" or "items".
        columns: How each column was made, by canonical name.
        files: Number of its Parquet files.
        refusal: What the table is refused with; "" where it is read.
        kinds: What it is made of.
    """

    path: Path
    table: str
    columns: dict[str, Column]
    files: int
    refusal: str = ""
    kinds: list[str] = field(default_factory=list)


def _spoil(draw: random.Random, values: Raw, spoilers: Sequence[Any], share: float = 0.15) -> Raw:
    return [draw.choice(spoilers) if spoilers and draw.random() < share else value for value in values]


def _text_array(draw: random.Random, values: Raw) -> tuple[pa.Array, str]:
    """Texts in one of the types that hold text; bytes that are not UTF-8 only fit into some."""
    raw = [value if value is None or isinstance(value, bytes) else value.encode() for value in values]
    kind = draw.choice(["string", "large_string", "string_view", "binary", "binary_view", "dictionary", "large_binary"])
    if kind == "binary":
        return pa.array(raw, pa.binary()), kind
    if kind == "large_binary":
        return pa.array(raw, pa.large_binary()), kind
    if kind == "binary_view":
        return pa.array(raw, pa.binary_view()), kind
    texts = [None if value is None else value.decode(errors="replace") for value in raw]
    if kind == "dictionary":
        return pa.array(texts, pa.string()).dictionary_encode(), kind
    return pa.array(texts, {"string": pa.string(), "large_string": pa.large_string()}.get(kind, pa.string_view())), kind


def ids(draw: random.Random, length: int, required: bool) -> Column:
    """Ids as text, whole numbers in any type, or UUIDs."""
    numbers = [draw.randrange(100) for _ in range(length)]
    kind = draw.choice(
        ["text"] * 3 + ["int", "float", "decimal", "decimal-fraction", "decimal32", "uuid", "dictionary-int"]
    )
    holes: list[Any] = [None]
    if kind == "text":
        cells, kind = _text_array(
            draw, _spoil(draw, [f"i{n}" for n in numbers], [None, "", b"\xff\xfe", "é" * 257, " 7 "])
        )
        return Column(cells, f"id:{kind}")
    if kind == "int":
        dtype = draw.choice([pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64()])
        return Column(pa.array(_spoil(draw, numbers, holes), dtype), f"id:{dtype}")
    if kind == "float":
        dtype = draw.choice([pa.float64(), pa.float32()])
        return Column(pa.array(_spoil(draw, [float(n) for n in numbers], [None, math.nan, 1.5]), dtype), f"id:{dtype}")
    if kind == "uuid":
        names = _spoil(draw, [uuid.UUID(int=n * 2**99 + n).bytes for n in numbers], holes)
        return Column(pa.ExtensionArray.from_storage(pa.uuid(), pa.array(names, pa.binary(16))), "id:uuid")
    if kind == "dictionary-int":
        return Column(pa.array(_spoil(draw, numbers, holes), pa.int64()).dictionary_encode(), "id:dictionary-int")
    dtype = {"decimal": pa.decimal128(38, 0), "decimal32": pa.decimal32(9, 0)}.get(kind, pa.decimal128(20, 2))
    spoilers = [*holes, decimal.Decimal("7.50")] if kind == "decimal-fraction" else holes
    return Column(pa.array(_spoil(draw, [decimal.Decimal(n) for n in numbers], spoilers), dtype), f"id:{dtype}")


def times(draw: random.Random, length: int, *, ends: bool = False) -> Column:
    """Times from 2001 up to 2050 in every form; some are missing, some are for ever, some are wrong."""
    moments = [draw.randrange(10**12, 2_500_000_000_000) for _ in range(length)]
    kind = draw.choice(
        ["number", "number", "number", "float", "decimal", "digits", "arrow", "arrow", "date", "iso", "iso", "int96"]
    )
    if kind in ("number", "digits"):
        unit = draw.choice(list(PER_SECOND))
        per = PER_SECOND[unit]
        far = [253_402_300_799 * per] if ends and unit != "ns" else []
        numbers = _spoil(draw, [ms * per // 1000 for ms in moments], [None, 0, -1, 2**63 - 1, *far, *far])
        numbers[0] = moments[0] * per // 1000
        if far and draw.random() < 0.3:
            numbers = _spoil(draw, far * length, [0, None])
        if kind == "number":
            return Column(pa.array(numbers, pa.int64()), f"time:int64[{unit}]", unit)
        cells, encoding = _text_array(draw, [None if n is None else str(n) for n in _spoil(draw, numbers, ["x", ""])])
        return Column(cells, f"time:digits[{unit}] {encoding}", unit)
    if kind == "float":
        unit = draw.choice(["s", "ms"])
        numbers = _spoil(draw, [ms * PER_SECOND[unit] / 1000 for ms in moments], [None, math.nan, 0.0, -5.0])
        return Column(pa.array([moments[0] * PER_SECOND[unit] / 1000, *numbers[1:]]), f"time:float64[{unit}]", unit)
    if kind == "decimal":
        scale = draw.choice([0, 3])
        numbers = _spoil(
            draw, [decimal.Decimal(ms // 1000 if not scale else ms).scaleb(-scale) for ms in moments], [None]
        )
        return Column(pa.array(numbers, pa.decimal128(38, scale)), f"time:decimal[{scale}]", "s")
    if kind == "date":
        days = _spoil(
            draw,
            [dt.date(1970, 1, 1) + dt.timedelta(ms // 86_400_000) for ms in moments],
            [None, dt.date(9999, 12, 31)],
        )
        dtype = draw.choice([pa.date32(), pa.date64()])
        return Column(pa.array(days, dtype), f"time:{dtype}")
    if kind == "iso":
        cells, encoding = _text_array(
            draw, _spoil(draw, [_iso(draw, ms) for ms in moments], [None, "", "x", "2020-02-30", "9999-12-31"])
        )
        return Column(cells, f"time:iso {encoding}")
    unit = "us" if kind == "int96" else draw.choice(list(PER_SECOND))
    zone = None if kind == "int96" else draw.choice([None, "UTC", "Europe/Berlin"])
    far = [253_402_300_799 * PER_SECOND[unit]] if unit != "ns" else []
    numbers = _spoil(draw, [ms * PER_SECOND[unit] // 1000 for ms in moments], [None, 0, *far])
    return Column(
        pa.array(numbers, pa.timestamp(unit, zone)),
        "time:int96" if kind == "int96" else f"time:timestamp[{unit},{zone}]",
    )


def _iso(draw: random.Random, ms: int) -> str:
    offset = draw.choice([None, 0, 120, -330])
    moment = dt.datetime.fromtimestamp(ms // 1000, dt.timezone(dt.timedelta(minutes=offset or 0)))
    text = moment.strftime(draw.choice(["%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y%m%dT%H%M%S"]))
    text += draw.choice(["", f".{ms % 1000:03d}", f".{ms % 1000:03d}456", f",{ms % 1000 // 100}"])
    if offset is None:
        return text
    if offset == 0:
        return text + draw.choice(["Z", "+00:00"])
    return f"{text}{'+' if offset > 0 else '-'}{abs(offset) // 60:02d}:{abs(offset) % 60:02d}"


def numbers(draw: random.Random, length: int, *, price: bool = False) -> Column:
    """Ratings or prices."""
    kind = draw.choice(["float16", "float32", "float64", "int32", "decimal", "text", "text"])
    plain = [draw.randrange(0, 40) / 4 for _ in range(length)]
    if kind == "text":
        spoilers: list[Any] = [None, "", "many", "NaN"] + (list(PRICES) * 2 if price else [])
        cells, encoding = _text_array(draw, _spoil(draw, [str(n) for n in plain], spoilers, 0.5 if price else 0.2))
        return Column(cells, f"number:{encoding}")
    if kind == "int32":
        return Column(pa.array(_spoil(draw, [int(n) for n in plain], [None, -3]), pa.int32()), "number:int32")
    if kind == "decimal":
        return Column(
            pa.array(_spoil(draw, [decimal.Decimal(str(n)) for n in plain], [None]), pa.decimal128(12, 3)),
            "number:decimal",
        )
    spoilers = [None, math.nan, math.inf, -1.0] + ([1e300] if kind == "float64" else [])
    dtype = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}[kind]
    values = _spoil(draw, plain, spoilers)
    typed = [None if v is None else np.float16(v) for v in values] if kind == "float16" else values
    return Column(pa.array(typed, dtype), f"number:{kind}")


def positions(draw: random.Random, length: int) -> Column:
    """Places in a slate."""
    plain = [draw.randrange(20) for _ in range(length)]
    kind = draw.choice(["int16", "uint64", "float64", "text"])
    if kind == "text":
        cells, encoding = _text_array(draw, _spoil(draw, [str(n) for n in plain], [None, "", "-1", "1.5", "5.0", "x"]))
        return Column(cells, f"position:{encoding}")
    spoilers: list[Any] = {"int16": [None, -1], "uint64": [None, 2**40], "float64": [None, math.nan, 0.5]}[kind]
    return Column(pa.array(_spoil(draw, plain, spoilers), getattr(pa, kind)()), f"position:{kind}")


def booleans(draw: random.Random, length: int) -> Column:
    """Permissions."""
    plain = [draw.random() < 0.6 for _ in range(length)]
    kind = draw.choice(["bool", "int8", "float64", "text", "text"])
    if kind == "text":
        cells, encoding = _text_array(
            draw, _spoil(draw, [draw.choice(TRUE if b else FALSE) for b in plain], [None, "", "maybe"])
        )
        return Column(cells, f"boolean:{encoding}")
    if kind == "bool":
        return Column(pa.array(_spoil(draw, plain, [None]), pa.bool_()), "boolean:bool")
    spoilers: list[Any] = [None, 2] if kind == "int8" else [None, math.nan, 0.5]
    return Column(pa.array(_spoil(draw, [int(b) for b in plain], spoilers), getattr(pa, kind)()), f"boolean:{kind}")


def lists_of_text(draw: random.Random, length: int) -> Column:
    """Categories as lists of every layout, or in one text."""
    names = ["Tea", "Bikes", "Garden", "Lamps", "Sale", "Ökö"]
    plain: Raw = [draw.sample(names, draw.randrange(0, 4)) for _ in range(length)]
    kind = draw.choice(["list", "large_list", "list_view", "fixed", "dictionary", "json", "python", "pipe", "comma"])
    if kind == "fixed":
        return Column(
            pa.array(
                _spoil(draw, [draw.sample(names, 2) for _ in plain], [None, ["Tea", None]]), pa.list_(pa.string(), 2)
            ),
            "list:fixed",
        )
    if kind in ("list", "large_list", "list_view"):
        make = {"list": pa.list_, "large_list": pa.large_list, "list_view": pa.list_view}[kind]
        leaf = draw.choice([pa.string(), pa.large_string(), pa.string_view(), pa.binary()])
        values = _spoil(draw, plain, [None, ["Tea", None]])
        if leaf == pa.binary():
            values = [None if v is None else [None if e is None else e.encode() for e in v] for v in values]
        return Column(pa.array(values, make(leaf)), f"list:{kind}<{leaf}>")
    if kind == "dictionary":
        return Column(
            pa.array(_spoil(draw, plain, [None]), pa.list_(pa.dictionary(pa.int32(), pa.string()))), "list:dictionary"
        )
    write: Callable[[list[str]], str] = {
        "json": json.dumps,
        "python": repr,
        "pipe": lambda value: draw.choice(["|", " | "]).join(value),
        "comma": lambda value: draw.choice([",", ", "]).join(value),
    }[kind]
    spoilers: list[Any] = [None, "", '["a", null]', '["a", "b']
    cells = _spoil(draw, [write(value) for value in plain], spoilers)
    if kind in ("pipe", "comma"):
        cells[0] = write(["Tea", "Sale"])
    return Column(pa.array(cells), f"list:{kind}", style=kind)


def maps(draw: random.Random, length: int) -> Column:
    """Attributes as maps, structs, lists of pairs, or JSON."""
    plain: Raw = [
        {name: str(draw.randrange(9)) for name in draw.sample("abc", draw.randrange(4))} for _ in range(length)
    ]
    kind = draw.choice(["map", "pairs", "struct", "json"])
    if kind == "json":
        return Column(
            pa.array(_spoil(draw, [json.dumps(value) for value in plain], [None, "", "x", '{"a": {}}', "[1]"])),
            "map:json",
        )
    values = _spoil(draw, plain, [None])
    if kind == "struct":
        return Column(pa.array(values, pa.struct([(name, pa.string()) for name in "abc"])), "map:struct")
    if kind == "pairs":
        dtype = pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())]))
        rows = [None if v is None else [{"key": k, "value": w} for k, w in v.items()] for v in values]
        return Column(pa.array(rows, dtype), "map:pairs")
    return Column(
        pa.array([None if v is None else list(v.items()) for v in values], pa.map_(pa.string(), pa.string())), "map:map"
    )


def draw_columns(draw: random.Random, table: str, length: int) -> dict[str, Column]:
    """The columns of a table; optional ones are there at random."""
    if table == "events":
        kinds, encoding = _text_array(draw, _spoil(draw, [draw.choice(TYPES) for _ in range(length)], [None, ""], 0.05))
        columns = {
            "user_id": ids(draw, length, True),
            "item_id": ids(draw, length, True),
            "event_type": Column(kinds, f"type:{encoding}"),
            "timestamp": times(draw, length),
        }
        options: dict[str, Callable[[], Column]] = {
            "session_id": lambda: ids(draw, length, False),
            "value": lambda: numbers(draw, length),
            "position": lambda: positions(draw, length),
            "attributes": lambda: maps(draw, length),
            "allow_train": lambda: booleans(draw, length),
            "ingested_at": lambda: times(draw, length),
        }
    else:
        columns = {"item_id": Column(pa.array([f"g{n}" for n in range(length)]), "id:string")}
        options = {
            "creator_id": lambda: ids(draw, length, False),
            "price": lambda: numbers(draw, length, price=True),
            "categories": lambda: lists_of_text(draw, length),
            "available": lambda: booleans(draw, length),
            "available_from": lambda: times(draw, length, ends=True),
            "available_until": lambda: times(draw, length, ends=True),
            "attributes": lambda: maps(draw, length),
        }
    for name, make in options.items():
        if draw.random() < 0.45:
            columns[name] = make()
    return columns


# ----------------------------------------------------------------------------------------------- tables, written


def write_case(draw: random.Random, root: Path) -> Case:
    """Draws a table and writes it."""
    table, length = draw.choice(["events", "items"]), draw.choice([1, 6, 12, 20])
    columns = draw_columns(draw, table, length)
    layout = draw.choice(
        ["file", "file", "folder", "links", "upper"] + (["hive"] * 2 if table == "events" else ["folder"])
    )
    case = Case(root / (f"{table}.parquet" if layout == "file" else table), table, columns, 0, "", [f"layout:{layout}"])
    written = dict(columns)
    if "value" in written and draw.random() < 0.3:
        written["rating"] = written.pop("value")
    names = {name: name.upper() if draw.random() < 0.1 else name for name in written}
    if layout == "hive":
        written.pop("event_type")
        columns["event_type"] = Column(pa.nulls(0, pa.string()), "type:folder")
    arrow = pa.table({names[name]: column.cells for name, column in written.items()})
    case.kinds += [column.kind for column in columns.values()]
    root.mkdir(parents=True)
    if layout == "file":
        _write(draw, arrow, case.path, columns)
        case.files = 1
    else:
        case.files = _write_folder(draw, arrow, case, layout)
    _maybe_spoil(draw, case)
    return case


def _write_folder(draw: random.Random, arrow: pa.Table, case: Case, layout: str) -> int:
    parts = draw.randrange(2, 5)
    for part in range(parts):
        rows = arrow.slice(
            part * arrow.num_rows // parts, (part + 1) * arrow.num_rows // parts - part * arrow.num_rows // parts
        )
        folder, name = case.path / f"day={part}", "part.parquet"
        if layout == "hive":
            kind = draw.choice([*TYPES, None])
            folder = case.path / f"event_type={'__HIVE_DEFAULT_PARTITION__' if kind is None else quote(kind, safe='')}"
            name = f"{part}.parquet"
        if layout == "upper":
            folder, name = case.path, f"{part}.{draw.choice(['PARQUET', 'parq', 'Parquet'])}"
        if layout == "links" and part % 2:
            target = case.path.parent / "elsewhere" / f"{part}"
            target.mkdir(parents=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(os.path.relpath(target, folder.parent), target_is_directory=True)
        folder.mkdir(parents=True, exist_ok=True)
        _write(draw, rows, folder / name, case.columns)
    (case.path / "_temporary").mkdir()
    (case.path / "_temporary" / "half.parquet").write_bytes(b"PAR1")
    return parts


def _write(draw: random.Random, arrow: pa.Table, file: Path, columns: dict[str, Column]) -> None:
    old = any(column.kind == "time:int96" for column in columns.values())
    pq.write_table(
        arrow,
        file,
        compression=draw.choice(["snappy", "zstd", "none"]),
        row_group_size=draw.choice([3, 1000]),
        use_dictionary=draw.random() < 0.5,
        data_page_version=draw.choice(["1.0", "2.0"]),
        version=draw.choice(["2.4", "2.6"]) if not old else "2.6",
        use_deprecated_int96_timestamps=old,
    )


def _maybe_spoil(draw: random.Random, case: Case) -> None:
    """Makes one table in twelve one that has to be refused by name."""
    if draw.random() > 1 / 12 or case.path.is_file():
        return
    fault = draw.choice(["delta", "iceberg", "csv", "damaged", "struct"])
    case.kinds.append(f"refused:{fault}")
    if fault == "delta":
        (case.path / "_delta_log").mkdir()
        case.refusal = "Delta Lake"
    elif fault == "iceberg":
        (case.path / "metadata").mkdir()
        (case.path / "metadata" / "v1.metadata.json").write_text("{}")
        case.refusal = "Iceberg"
    elif fault == "csv":
        (case.path / "more.csv").write_text("item_id\n1\n")
        case.refusal = "more.csv"
    elif fault == "damaged":
        (case.path / "zz.parquet").write_bytes(b"PAR1 and no more")
        case.refusal = "zz.parquet"
    else:
        row = {"user_id": "u", "item_id": {"a": 1}, "event_type": "x", "timestamp": 10**12}
        pq.write_table(pa.Table.from_pylist([row]), case.path / "zz.parquet")
        case.refusal = "column item_id"


# ------------------------------------------------------------------------------------------------------ the oracle


def _folders(case: Case) -> Any:
    by_type = case.table == "events" and case.columns["event_type"].kind == "type:folder"
    return ds.partitioning(pa.schema([("event_type" if by_type else "day", pa.string())]), flavor="hive")


@dataclass
class Expected:
    """What reading a case must give.

    Attributes:
        rows: The kept rows, by canonical column; a tuple (value, tolerance) where a float is behind it.
        rejected: Number of rows that are left out, by file name.
        unread: Number of unreadable cells, by column.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[tuple[str, int]] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)


_POLARS = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean, pa.types.is_float64)


def raw_rows(file: Path, use_polars: bool) -> dict[str, Raw]:
    """The cells of a file as another library reads them; times of Arrow as integers, with their type beside."""
    parquet = pq.ParquetFile(file, coerce_int96_timestamp_unit="us")
    groups = [parquet.read_row_group(number) for number in range(parquet.num_row_groups)]
    table = pa.concat_tables(groups) if groups else parquet.read()
    if use_polars and all(any(is_type(f.type) for is_type in _POLARS) for f in table.schema):
        with contextlib.suppress(pl.exceptions.ComputeError):  # polars refuses texts that are not UTF-8
            return pl.read_parquet(file, hive_partitioning=False).to_dict(as_series=False)
    cells: dict[str, Raw] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        dtype = column.type
        if pa.types.is_timestamp(dtype):
            cells[name] = [None if v is None else (v, dtype.unit) for v in pc.cast(column, pa.int64()).to_pylist()]
        elif pa.types.is_date(dtype):
            cells[name] = [
                None if v is None else ((v - dt.date(1970, 1, 1)).days * 86_400, "s") for v in column.to_pylist()
            ]
        else:
            if dtype == pa.large_string() or dtype == pa.string() or dtype == pa.string_view():
                column = pc.cast(column, pa.binary())
            cells[name] = column.to_pylist()
    return cells


def id_of(value: Any) -> Any:
    """An id in plain Python."""
    value = _plain(value)
    if isinstance(value, float | decimal.Decimal) and value is not MISSING:
        value = str(int(value)) if value == int(value) else BAD
    if isinstance(value, int | uuid.UUID):
        value = str(value)
    return BAD if isinstance(value, str) and len(value.encode()) > 512 else value


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return BAD
    return value


def time_of(value: Any, unit: str) -> Any:
    """A time in milliseconds, with its tolerance."""
    value, slack = _plain(value), 0
    if isinstance(value, _Mark):
        return value
    if isinstance(value, tuple):
        value, unit = value
    if isinstance(value, str):
        value = value.strip()
        if not value:
            return MISSING
        try:
            value = int(value)
        except ValueError:
            return _iso_of(value)
    if isinstance(value, float):
        slack = 1
    exact = Fraction(value) * 1000 / PER_SECOND[unit]
    return _in_time(math.floor(exact), slack)


def _iso_of(text: str) -> Any:
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        return BAD
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return _in_time((moment - dt.datetime(1970, 1, 1, tzinfo=UTC)) // dt.timedelta(milliseconds=1), 0)


def _in_time(ms: int, slack: int) -> Any:
    if ms < 0:
        return BAD
    return LATE if ms >= END_MS else (ms, slack)


def number_of(value: Any, *, price: bool = False, whole: bool = False) -> Any:
    """A number in plain Python."""
    value = _plain(value)
    if isinstance(value, str):
        if price and value in PRICES:
            return BAD if PRICES[value] is None else PRICES[value]
        if value.strip().lower() in ("", "nan"):
            return MISSING
        try:
            value = float(value)
        except ValueError:
            return BAD
    if isinstance(value, _Mark):
        return value
    value = float(value)
    if whole:
        return int(value) if value == math.floor(value) and 0 <= value < 2**31 else BAD
    return value if abs(value) < 3.4e38 and not (price and value < 0) else BAD


def boolean_of(value: Any) -> Any:
    """A permission in plain Python."""
    value = _plain(value)
    if isinstance(value, str):
        words = {word.lower(): True for word in TRUE} | {word.lower(): False for word in FALSE}
        return words.get(value.lower(), BAD) if value else MISSING
    return value if isinstance(value, _Mark) else {0: False, 1: True}.get(value, BAD)


def list_of(value: Any, style: str) -> Any:
    """A list of texts in plain Python."""
    value = _plain(value)
    if isinstance(value, str):
        if not value:
            return MISSING
        if style in ("json", "python") or value[0] == "[":
            try:
                value = json.loads(value if style != "python" or '"' in value else value.replace("'", '"'))
            except ValueError:
                return BAD
        else:
            value = [part.strip() for part in value.split("|" if style == "pipe" else ",") if part.strip()]
    if isinstance(value, _Mark):
        return value
    return BAD if None in value else [entry.decode() if isinstance(entry, bytes) else entry for entry in value]


def map_of(value: Any) -> Any:
    """A map from text to text in plain Python."""
    value = _plain(value)
    if isinstance(value, str):
        if not value:
            return MISSING
        try:
            value = json.loads(value)
        except ValueError:
            return BAD
        if not isinstance(value, dict) or any(isinstance(entry, dict) for entry in value.values()):
            return BAD
    if isinstance(value, _Mark):
        return value
    if isinstance(value, list):
        value = dict((pair["key"], pair["value"]) if isinstance(pair, dict) else pair for pair in value)
    return {name: entry for name, entry in value.items() if entry is not None}


def cell_of(name: str, value: Any, column: Column) -> Any:
    """What a cell is."""
    if name.endswith("_id"):
        return id_of(value)
    if name in ("timestamp", "ingested_at", "available_from", "available_until"):
        return time_of(value, column.unit)
    if name in ("value", "price"):
        return number_of(value, price=name == "price")
    if name == "position":
        return number_of(value, whole=True)
    if name in ("available", "allow_train"):
        return boolean_of(value)
    if name == "categories":
        return list_of(value, column.style)
    return map_of(value) if name == "attributes" else _plain(value)


def expect(case: Case, number: int) -> Expected:
    """What Penchant must make of a case."""
    expected = Expected()
    if case.path.is_file():
        files: list[tuple[str, dict[str, Any]]] = [(str(case.path), {})]
    else:
        found = ds.dataset(str(case.path), format="parquet", partitioning=_folders(case))
        fragments = [(part.path, ds.get_partition_keys(part.partition_expression)) for part in found.get_fragments()]
        files = sorted(fragments, key=lambda part: Path(part[0]).parts)
    for file, folders in files:
        cells = raw_rows(Path(file), use_polars=number % 2 == 0)
        named = {("value" if name.lower() == "rating" else name.lower()): values for name, values in cells.items()}
        length = len(next(iter(named.values())))
        if "event_type" in case.columns and "event_type" not in named:
            named["event_type"] = [folders.get("event_type")] * length
        for row in range(length):
            _expect_row(
                case,
                expected,
                {name: cell_of(name, named[name][row], case.columns[name]) for name in case.columns},
                file,
                row,
            )
    return expected


def _expect_row(case: Case, expected: Expected, cells: dict[str, Any], file: str, row: int) -> None:
    zero = {
        name for name, cell in cells.items() if isinstance(cell, tuple) and cell[0] == 0 and name != "available_from"
    }
    cells |= dict.fromkeys(zero, MISSING)
    required = ("user_id", "item_id", "event_type", "timestamp") if case.table == "events" else ("item_id",)
    if any(isinstance(cells[name], _Mark) or cells[name] == "" for name in required):
        expected.rejected.append((file, row))
        return
    closed = any(cells.get(name) is BAD for name in ("available", "available_from", "available_until"))
    closed |= cells.get("available_from") is LATE
    for name, cell in cells.items():
        if cell is BAD or (cell is LATE and name == "ingested_at"):
            expected.unread[name] += 1
    kept = {name: None if isinstance(cell, _Mark) else cell for name, cell in cells.items()}
    if closed:
        kept["available"] = False
    if cells.get("allow_train") is BAD:
        kept["allow_train"] = False
    expected.rows.append(kept)


# ------------------------------------------------------------------------------------------------------ comparison


def compare(case: Case, expected: Expected | None) -> str:
    """What Penchant does otherwise than expected; "" if nothing."""
    schema, required = (EVENTS, EVENTS_REQUIRED) if case.table == "events" else (ITEMS, ITEMS_REQUIRED)
    try:
        loaded = read_table(case.path, schema, required)
    except TablesError as error:
        if case.refusal and case.refusal in str(error):
            return ""
        return f"refused: {error}"
    if expected is None:
        return f"not refused, though {case.refusal}"
    return _difference(expected, loaded)


def _difference(expected: Expected, loaded: Loaded) -> str:
    rejected = [(rejected.file, rejected.row) for rejected in loaded.rejected]
    if rejected != expected.rejected:
        return f"rows {rejected} are rejected, should be {expected.rejected}"
    unread = Counter[str]()
    for cells in loaded.unread:
        unread[cells.column] += cells.count
        if not (cells.file and cells.reason.startswith(cells.column) and ", should be " in cells.reason):
            return f"does not say what is wrong: {cells}"
    if unread != expected.unread:
        return f"unread are {dict(unread)}, should be {dict(expected.unread)}"
    rows = loaded.table.to_pylist()
    if len(rows) != len(expected.rows):
        return f"{len(rows)} rows, should be {len(expected.rows)}"
    for at, (row, wanted) in enumerate(zip(rows, expected.rows, strict=True)):
        for name, cell in row.items():
            if not _same(name, cell, wanted.get(name)):
                return f"row {at}: {name} is {cell!r}, should be {wanted.get(name)!r}"
    return ""


def _same(name: str, cell: Any, wanted: Any) -> bool:
    if wanted is None or cell is None:
        return cell is wanted
    if isinstance(wanted, tuple):
        return bool(abs(cell - wanted[0]) <= wanted[1])
    if name in ("value", "price"):
        return bool(np.float32(cell) == np.float32(wanted))
    return bool(dict(cell) == wanted if name == "attributes" else cell == wanted)


def compare_streamed(case: Case) -> str:
    """What is otherwise where events are read a part at a time; "" if nothing."""
    whole = open_dataset(case.path.parent)
    with mock.patch.object(features.tables, "HELD_ROWS", 0), mock.patch.object(features.tables, "BATCH_ROWS", 5):
        parts = open_dataset(case.path.parent)
    if (whole.info, whole.intake) != (parts.info, parts.intake):
        return f"streamed: {parts.info} {parts.intake}, should be {whole.info} {whole.intake}"
    return "" if whole.events.equals(parts.events) and whole.items.equals(parts.items) else "streamed: other rows"


# -------------------------------------------------------------------------------------------------- planted faults


def _wrapped(module: Any, name: str, wrap: Callable[..., Any]) -> Any:
    true = getattr(module, name)
    return mock.patch.object(module, name, lambda *args, **options: wrap(true, *args, **options))


def _replaced(place: Any, name: str, answer: Any) -> Any:
    return mock.patch.object(place, name, return_value=answer)


def _no_fractions(true: Any, text: Any) -> Any:
    values, good = true(text)
    return values // 1000 * 1000, good


def _no_offsets(true: Any, text: Any) -> Any:
    return true(pc.replace_substring_regex(text, r"[+-]\d{2}:\d{2}$", ""))


def _no_links(true: Any, root: Path, below: Path, above: Any) -> Iterator[Path]:
    return (
        name
        for name in true(root, below, above)
        if not any((root / part).is_symlink() for part in (name, *name.parents))
    )


def _indices(true: Any, column: Any) -> Any:
    return true(column.indices if pa.types.is_dictionary(column.type) else column)


def _decimals_as_floats(true: Any, column: Any, is_id: bool) -> Any:
    return pc.cast(
        pc.if_else(column.is_valid(), pa.array([str(float(v or 0)) for v in column.to_pylist()]), None), pa.string()
    ), np.zeros(len(column), bool)


def _nan_as_zero(true: Any, column: Any, *args: Any, **options: Any) -> Any:
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(pc.cast(column, pa.float64())), pa.scalar(0, column.type), column)
    return true(column, *args, **options)


def _short_lists(true: Any, column: Any, *args: Any) -> Any:
    return true(pc.list_slice(column, 0, 1) if pa.types.is_list(column.type) else column, *args)


def _later(true: Any, column: Any) -> Any:
    values = true(column)
    return values + 1 if pa.types.is_timestamp(column.type) and column.type.tz else values


def _no_dashes(true: Any, storage: Any) -> Any:
    return pc.replace_substring(true(storage), "-", "")


FAULTS: dict[str, Callable[[], Any]] = {
    "fractions of a second are dropped": lambda: _wrapped(features.times, "_iso", _no_fractions),
    "offsets from UTC are ignored": lambda: _wrapped(features.times, "_iso", _no_offsets),
    "every number is in milliseconds": lambda: _replaced(features.times.UnitVotes, "unit", "ms"),
    "links are skipped": lambda: _wrapped(features.files, "_walk", _no_links),
    "the index of a dictionary is its value": lambda: _wrapped(features.columns, "plain", _indices),
    "a decimal is a float": lambda: _wrapped(features.columns, "_text_of_decimals", _decimals_as_floats),
    "NaN is 0": lambda: _wrapped(features.columns, "_numbers", _nan_as_zero),
    "lists are cut": lambda: _wrapped(features.columns, "_list", _short_lists),
    "folders' names are ignored": lambda: _replaced(features.files, "_partition", {}),
    "times with a zone are a millisecond late": lambda: _wrapped(features.times, "_typed", _later),
    "a UUID has no dashes": lambda: _wrapped(features.arrays, "_uuid_text", _no_dashes),
    "what cannot be read permits": lambda: _replaced(features.rows, "_close", None),
    "an end for ever is an end in 1978": lambda: mock.patch.object(
        features.times, "_is_far", lambda v: np.zeros(v.size, bool)
    ),
    "a price of one comma is thousands": lambda: _wrapped(
        features.columns, "prices", lambda true, text: true(pc.replace_substring(text, ",", ""))
    ),
}
"""Reading faults, each of which the comparison must find."""


# ------------------------------------------------------------------------------------------------------- the proof


@dataclass
class Proof:
    """What reading many tables gave."""

    cases: list[tuple[Case, Expected | None]]
    tally: Counter[str]
    differences: list[str]

    def finds(self, fault: str) -> int:
        """Returns after how many tables a planted fault is found; 0 if it is not."""
        with FAULTS[fault]():
            for number, (case, expected) in enumerate(self.cases, 1):
                if compare(case, expected):
                    return number
        return 0


def prove(folder: Path, files: int, number: int) -> Proof:
    """Writes tables until there are as many files, and reads them."""
    draw, proof = random.Random(number), Proof([], Counter(), [])
    while proof.tally["files"] < files:
        case = write_case(draw, folder / str(len(proof.cases)))
        expected = None if case.refusal else expect(case, len(proof.cases))
        different = compare(case, expected)
        if not different and case.table == "events" and expected and expected.rows and len(proof.cases) % 3 == 0:
            different = compare_streamed(case)
            proof.tally["streamed tables"] += 1
        if different:
            proof.differences.append(f"{case.path} ({', '.join(case.kinds)}): {different}")
        proof.cases.append((case, expected))
        proof.tally.update({"files": case.files, "tables": 1, "refused tables": int(bool(case.refusal))})
        if expected is not None:
            proof.tally.update({"rows": len(expected.rows), "rejected rows": len(expected.rejected)})
            proof.tally["unread cells"] += expected.unread.total()
        proof.tally.update(case.kinds)
    return proof


def main() -> int:
    """The proof at full size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="penchant-") as folder:
        proof = prove(Path(folder), asked.files, asked.seed)
        for different in proof.differences[:20]:
            print(different, file=sys.stderr)
        faults = {fault: proof.finds(fault) for fault in FAULTS}
    figures = {name: count for name, count in proof.tally.items() if ":" not in name}
    answer = {
        **figures,
        "kinds": sum(":" in name for name in proof.tally),
        "differences": len(proof.differences),
        "faults": len(faults),
        "faults_found": sum(map(bool, faults.values())),
        "found_after_tables": faults,
        "seed": asked.seed,
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(answer))
    return int(bool(proof.differences) or not all(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
