"""Parts that the recipes of known data sets share: the prepared tables, and the reading of Parquet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.arrays import Array
from features.errors import TrainingError
from features.tables.dataset import LoadedTable


class DatasetError(TrainingError):
    """A known data set that cannot be prepared; the message says what to give instead."""


@dataclass(frozen=True, slots=True)
class PreparedTables:
    """A data set in canonical tables, before it is written."""

    name: str
    notes: str
    events: LoadedTable
    items: LoadedTable
    users: LoadedTable | None = None
    impressions: pa.Table | None = None


def read_parquet(file: Path, columns: Mapping[str, str]) -> pa.Table:
    """Reads the named columns of a Parquet file under their new names, rows in the file's order.

    Raises:
        DatasetError: The file cannot be read, or lacks one of the columns.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            absent = [name for name in columns if name not in parquet.schema_arrow.names]
            if absent:
                raise DatasetError(f"{file} has no column {', '.join(absent)}; it has {parquet.schema_arrow.names}")
            table = parquet.read(columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{file} cannot be read as Parquet: {error}") from error
    return table.select(list(columns)).rename_columns(list(columns.values())).combine_chunks()


def constant(text: str, length: int) -> Array:
    """Returns a column with the same text in every row."""
    return pa.repeat(pa.scalar(text), length)


def distinguish_titles(titles: Sequence[Any], details: Sequence[Any]) -> Array:
    """Adds a detail in brackets to titles that several items share; a title without a detail stays.

    Args:
        titles: Text or None by item.
        details: The difference between items of the same title, text or None by item.

    Returns:
        Texts of the same length.
    """
    shared = {title for title, count in Counter(titles).items() if count > 1 and title is not None}
    pairs = zip(titles, details, strict=True)
    named = [f"{title} ({detail})" if title in shared and detail is not None else title for title, detail in pairs]
    return pa.array(named, pa.string())
