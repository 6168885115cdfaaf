"""Finds the Parquet files of a table and reads them, as other tools that read a folder of Parquet do.

Links are followed, and the values in the names of folders (`event_type=purchase/`) are columns. The folder of a table
whose log says which files count is refused by name: read as bare files it would hold rows that were deleted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.arrays import pc, plain, to_mask
from features.errors import TablesError

SUFFIXES = (".parquet", ".parq", ".pq")
_FOREIGN = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".orc", ".avro", ".arrow", ".feather", ".ipc", ".xlsx")
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")
_NULL_FOLDER = "__HIVE_DEFAULT_PARTITION__"
_MAGIC = (b"PAR1", b"PARE")
# A leading dot or underscore marks what is still being written, by the convention of Hadoop and Spark.
_HIDDEN = (".", "_")


@dataclass(frozen=True, slots=True)
class TableFile:
    """One Parquet file of a table.

    Attributes:
        path: Its path.
        partition: The columns that the names of its folders give, each with one value for all rows; None is NULL.
    """

    path: Path
    partition: Mapping[str, str | None]

    def schema(self) -> pa.Schema:
        """Returns its columns, those of its folders last.

        Raises:
            TablesError: It is not Parquet.
        """
        with self._opened() as parquet:
            return self._with_folders(parquet.schema_arrow)

    def row_count(self) -> int:
        """Returns the number of its rows.

        Raises:
            TablesError: It is not Parquet.
        """
        with self._opened() as parquet:
            return int(parquet.metadata.num_rows)

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[pa.Table]:
        """Yields the columns named, at most `rows` rows at a time; a table without columns is not possible.

        Raises:
            TablesError: It cannot be read, or a column says something else than the name of the folder.
        """
        with self._opened() as parquet:
            names = parquet.schema_arrow.names
            folders = [name for name in columns if name in self.partition and name not in names]
            shadowed = [name for name in columns if name in self.partition and name in names]
            inside = [name for name in columns if name in names]
            start = 0
            for table in _tables(parquet, inside or names[:1], rows):
                for name in shadowed:
                    self._check(name, table[name], start)
                for name in folders:
                    table = table.append_column(name, pa.array([self.partition[name]] * table.num_rows, pa.string()))
                yield table.select([name for name in columns if name in table.column_names] or table.column_names)
                start += table.num_rows

    @contextmanager
    def _opened(self) -> Iterator[pq.ParquetFile]:
        try:
            # The old times of 96 bits would be read as nanoseconds, which end in 2262.
            with pq.ParquetFile(self.path, coerce_int96_timestamp_unit="us") as parquet:
                yield parquet
        except (pa.ArrowException, OSError) as error:
            raise TablesError(f"{self.path} cannot be read as Parquet: {error}") from error

    def _with_folders(self, schema: pa.Schema) -> pa.Schema:
        for name in self.partition:
            if name not in schema.names:
                schema = schema.append(pa.field(name, pa.string()))
        return schema

    def _check(self, name: str, column: pa.ChunkedArray[Any], start: int) -> None:
        """Refuses a text or whole number that is not the folder's; a folder's date may be coarser than a time."""
        values, folder = plain(column.combine_chunks()), self.partition[name]
        if not (pa.types.is_string(values.type) or pa.types.is_integer(values.type)):
            return
        texts = pc.cast(values, pa.string())
        differs = texts.is_valid() if folder is None else pc.fill_null(pc.not_equal(texts, folder), True)
        wrong = np.flatnonzero(to_mask(differs))
        if wrong.size:
            row = int(wrong[0])
            raise TablesError(
                f"{self.path} row {start + row}: {name} is {texts[row].as_py()!r}, but its folder says "
                f"{name}={folder}: keep the column or the folder's name, not both"
            )


def _tables(parquet: pq.ParquetFile, columns: list[str], rows: int) -> Iterator[pa.Table]:
    # Arrow cannot join lists of dictionaries from two row groups, so that such lists come by row group.
    nested = any(pa.types.is_nested(parquet.schema_arrow.field(name).type) for name in columns)
    groups = [[number] for number in range(parquet.num_row_groups)] if nested else [list(range(parquet.num_row_groups))]
    for chosen in groups:
        for batch in parquet.iter_batches(rows, row_groups=chosen, columns=columns):
            yield pa.Table.from_batches([batch])


def find_files(path: Path) -> list[TableFile]:
    """Returns the Parquet files of a table, which is one file or all below a folder in the order of their names.

    Raises:
        TablesError: There is none, or the folder belongs to Delta Lake, Iceberg or Hudi, or holds another format.
    """
    if path.is_file():
        return [TableFile(path, {})]
    if not path.is_dir():
        link = " is a link to nothing" if path.is_symlink() else " does not exist"
        raise TablesError(f"{path}{link}: name a Parquet file or a directory of them")
    inside = sorted(_walk(path, Path(), (path.resolve(),)))
    files = [TableFile(path / name, _partition(name)) for name in inside if _is_parquet(path / name)]
    # A little JSON next to Parquet describes it; without any Parquet it is the data.
    foreign = [name for name in inside if _is_foreign(name.name) and not (files and name.suffix == ".json")]
    if foreign:
        raise TablesError(f"{path / foreign[0]} is not Parquet: {_advice(path / foreign[0])}")
    if not files:
        raise TablesError(f"{path} holds no *.parquet file")
    return files


def _walk(root: Path, below: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Yields the files below a folder, relative to the root."""
    # A link to one of the real folders `above` would lead round in a circle.
    folder = root / below
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise TablesError(f"{folder} cannot be read: {error.strerror}") from error
    _refuse_log(folder, {entry.name for entry in entries})
    for entry in entries:
        if entry.name.startswith(_HIDDEN):
            continue
        if entry.is_dir():
            real = Path(entry.path).resolve()
            if real not in above:
                yield from _walk(root, below / entry.name, (*above, real))
        elif entry.is_file():
            yield below / entry.name
        elif entry.is_symlink() and entry.name.lower().endswith(SUFFIXES):
            raise TablesError(f"{entry.path} is a link to nothing: remove it, or put the file back")


def _refuse_log(folder: Path, names: set[str]) -> None:
    kind, read = "", ""
    if "_delta_log" in names:
        kind, read = "Delta Lake", "polars.read_delta(PATH).write_parquet(FILE)"
    elif "metadata" in names and any((folder / "metadata").glob("*.metadata.json")):
        kind, read = "Iceberg", "polars.scan_iceberg(METADATA_JSON).sink_parquet(FILE)"
    elif ".hoodie" in names:
        kind, read = "Hudi", "spark.read.format('hudi').load(PATH).write.parquet(FOLDER)"
    if kind:
        raise TablesError(
            f"{folder} is a table of {kind}, whose log says which of its files count: write its rows out as Parquet "
            f"first, for example with {read}"
        )


def _is_parquet(file: Path) -> bool:
    """Returns True for a file by its name, or, where that has no ending (as Hive and Trino write), by how it begins."""
    if file.suffix:
        return file.suffix.lower() in SUFFIXES
    try:
        with file.open("rb") as content:
            return content.read(4) in _MAGIC
    except OSError as error:
        raise TablesError(f"{file} cannot be read: {error.strerror}") from error


def _is_foreign(name: str) -> bool:
    name = name.lower()
    for ending in _PACKED:
        name = name.removesuffix(ending)
    return name.endswith(_FOREIGN)


def _advice(file: Path) -> str:
    return f"""convert it, for example with duckdb -c "COPY (FROM '{file}') TO 'FILE.parquet'", and move it away"""


def _partition(name: Path) -> dict[str, str | None]:
    """Returns the columns in the names of a file's folders, as Hive writes them; the innermost folder wins."""
    columns: dict[str, str | None] = {}
    for part in name.parts[:-1]:
        key, equals, value = part.partition("=")
        if equals and key:
            columns[unquote(key)] = None if value == _NULL_FOLDER else unquote(value)
    return columns


def table_path(data: Path, name: str) -> Path | None:
    """Returns where a data set keeps a table, `NAME.parquet` (a file or a directory) or `NAME/`; None if it has none.

    Raises:
        TablesError: It is there twice, as a link to nothing, or in another format than Parquet.
    """
    folder = Path(data)
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    entries = [entry for entry in names if name in (entry.lower(), _stem(entry))]
    if len(entries) > 1:
        raise TablesError(f"{folder} has {' and '.join(entries)}, which both are the table {name}: keep one of them")
    if entries:
        if not (folder / entries[0]).exists():
            raise TablesError(f"{folder / entries[0]} is a link to nothing: remove it, or put the file back")
        return folder / entries[0]
    foreign = [entry for entry in names if _is_foreign(entry) and entry.lower().split(".", 1)[0] == name]
    if foreign:
        raise TablesError(f"{folder / foreign[0]} is not Parquet: {_advice(folder / foreign[0])}")
    return None


def _stem(entry: str) -> str:
    """Returns a name in small letters without its suffix; "" if it has another one or none."""
    stem, dot, suffix = entry.lower().rpartition(".")
    return stem if dot and f".{suffix}" in SUFFIXES else ""
