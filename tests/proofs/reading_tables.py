"""Tables of a data set, drawn: types, encodings, layouts and faulty cells, written as Parquet."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
import os
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
