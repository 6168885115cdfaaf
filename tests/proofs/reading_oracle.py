"""The expected reading of a table, in plain Python, from the cells as pyarrow or polars read them."""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import json
import math
import uuid
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from tests.proofs.reading_tables import FALSE, PER_SECOND, PRICES, TRUE, Case, Column, Raw

END_MS = 4_102_444_800_000
UTC = dt.UTC


class Mark:
    """A cell without a value."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


MISSING, BAD, LATE, EARLY = Mark("missing"), Mark("unreadable"), Mark("late"), Mark("early")


def _folders(case: Case) -> Any:
    by_type = case.table == "events" and case.columns["event_type"].kind == "type:folder"
    return ds.partitioning(pa.schema([("event_type" if by_type else "day", pa.string())]), flavor="hive")


@dataclass
class Expected:
    """The expected reading of a case.

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
    """The cells of a file as another library reads them; times of Arrow as integers, with their type next to."""
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
    if isinstance(value, Mark):
        return value
    dated = isinstance(value, tuple)
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
    return _in_time(math.floor(exact), slack, dated=dated)


def _iso_of(text: str) -> Any:
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        return BAD
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return _in_time((moment - dt.datetime(1970, 1, 1, tzinfo=UTC)) // dt.timedelta(milliseconds=1), 0, dated=True)


def _in_time(ms: int, slack: int, *, dated: bool) -> Any:
    if ms < 0:
        return EARLY if dated else BAD
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
    if isinstance(value, Mark):
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
    return value if isinstance(value, Mark) else {0: False, 1: True}.get(value, BAD)


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
    if isinstance(value, Mark):
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
    if isinstance(value, Mark):
        return value
    if isinstance(value, list):
        value = dict((pair["key"], pair["value"]) if isinstance(pair, dict) else pair for pair in value)
    return {name: entry for name, entry in value.items() if entry is not None}


def cell_of(name: str, value: Any, column: Column) -> Any:
    """Returns the kind of a cell."""
    if name.endswith("_id"):
        return id_of(value)
    if name in ("timestamp", "ingested_at", "available_from", "available_until"):
        moment = time_of(value, column.unit)
        return (0, 0) if name == "available_from" and moment is EARLY else BAD if moment is EARLY else moment
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
    """Returns the expected reading of a case."""
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
    if any(isinstance(cells[name], Mark) or cells[name] == "" for name in required):
        expected.rejected.append((file, row))
        return
    closed = any(cells.get(name) is BAD for name in ("available", "available_from", "available_until"))
    closed |= cells.get("available_from") is LATE
    for name, cell in cells.items():
        if cell is BAD or (cell is LATE and name == "ingested_at"):
            expected.unread[name] += 1
    kept = {name: None if isinstance(cell, Mark) else cell for name, cell in cells.items()}
    if closed:
        kept["available"] = False
    if cells.get("allow_train") is BAD:
        kept["allow_train"] = False
    expected.rows.append(kept)
