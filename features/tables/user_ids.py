"""Reads files of users in every usual form: the ids that come out are those that a data set of the same values has.

| file | users |
|---|---|
| `.parquet`, or a folder of them | the column `user_id`, read as a data set reads it |
| `.csv`, `.tsv` | the column `user_id` under a header that names it; else the only column, from the first line on |
| `.json` | a list of ids or of objects with `user_id`; an object that holds such a list, or columns |
| `.jsonl`, `.ndjson` | per line an object with `user_id`, or an id |
| any other text | one id a line, as a CSV of one column; a header that names `user_id` makes it a CSV or TSV |

`user_id` is named in any letter case, with or without what separates its words (`USER_ID`, `userId`, `User ID`); no
other name is taken for a header. Text is UTF-8, or what its byte-order mark says. Spaces around an id in a text and
empty lines are not read; else an id is taken as it is written. Whole numbers that are stored as floats are whole
numbers, as in a data set: the 1.0 of JSON and Parquet is `1`, and so is that of a text of which every id is written so,
which is told. A missing id (NULL, NaN, "") is left out and told; anything that is no id refuses the file.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa

from features.errors import TablesError
from features.keys import bare_name
from features.tables.conform import Intake, Rejected
from features.tables.convert import MOST_ID_BYTES
from features.tables.dataset import read_table
from features.tables.files import SUFFIXES
from features.tables.intake import tell
from features.tables.schema import USERS

_COLUMN = pa.schema([USERS.field("user_id")])
_RIGHT = "give one id a line, or a column user_id in CSV, JSON lines or Parquet"
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_FOREIGN = {
    b"\x1f\x8b": "gzip: unpack it first",
    b"PK\x03\x04": "a zip archive or a spreadsheet: save it as CSV",
    b"\x28\xb5\x2f\xfd": "zstandard: unpack it first",
}
_JSON = (".json", ".jsonl", ".ndjson")
_LISTS = ("userid", "userids", "users")
_DELIMITERS = (",", "\t", ";", "|")
_FLOAT = re.compile(r"-?(?:0|[1-9]\d{0,17})\.0+")
_WHOLE_LINE = "\x1f"
"""A delimiter that no id may hold, so that a line is one field."""

Entries = Iterator[tuple[int, Any]]
"""The place of an id (a line counted from 1, an entry or a row from 0), and the id; None if it is missing."""


@dataclass(frozen=True, slots=True)
class UserIds:
    """The users of a file, each once, in its order.

    Attributes:
        ids: Their ids.
        intake: The fate of the file's rows: those without an id are rejected.
        note: A remark on the reading of ids, "" if none is needed.
    """

    ids: list[str]
    intake: Intake
    note: str = ""

    def tell(self) -> None:
        """Prints on stderr the rows that were left out, and the note."""
        tell({"users": self.intake})
        if self.note:
            print(self.note, file=sys.stderr)


def read_user_ids(path: Path) -> list[str]:
    """Reads the ids of a file of users, each once, in the order of the file; tells on stderr of rows without one.

    Raises:
        TablesError: The file cannot be read or names no user; the message names the line and the right form.
    """
    users = read_users(path)
    users.tell()
    return users.ids


def read_users(path: Path) -> UserIds:
    """Reads a file of users, see `read_user_ids`, and prints nothing.

    Raises:
        TablesError: As `read_user_ids`.
    """
    path = Path(path)
    if path.is_dir() or path.suffix.lower() in SUFFIXES or _head(path).startswith(b"PAR1"):
        users = _of_parquet(path)
    else:
        users = _of_text(path)
    if not users.ids:
        reason = f", {len(users.intake.rejected)} rows are without one" if users.intake.rejected else ""
        raise TablesError(f"{path} names no user{reason}: {_RIGHT}")
    return users


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise TablesError(f"{path} cannot be read: {error.strerror}") from error


def _of_parquet(path: Path) -> UserIds:
    """Reads the column as a data set reads it; of rows without an id, only empty ones are left out."""
    # In a tuple, so that a user who is named twice is no defect.
    loaded = read_table(path, _COLUMN, (("user_id",),))
    for row in loaded.rejected:
        if not row.reason.endswith("should be given in every row"):
            raise TablesError(f"{row.file} row {row.row}: {row.reason}")
    ids = [str(name) for name in loaded.table["user_id"].to_pylist()]
    for at, name in enumerate(ids):
        if trouble := _trouble(name):
            raise TablesError(f"{path} row {at} of those with an id: {trouble}")
    # A file of users has any other columns: only their ids are asked for.
    return UserIds(list(dict.fromkeys(ids)), replace(loaded.intake, ignored=()))


def _of_text(path: Path) -> UserIds:
    text, suffix = _decoded(path), path.suffix.lower()
    if suffix == ".json":
        place, entries = _of_json(path, text)
    elif suffix in _JSON:
        place, entries = "line", _of_lines(path, text)
    else:
        place, entries = "line", _of_csv(path, text, suffix)
    ids: dict[str, None] = {}
    kept, missing = 0, []
    for at, value in entries:
        name = _id_of(value)
        if name is None:
            _refuse(path, place, at, f"{_shown(value)} is no id: an id is text, or a whole number")
        if not name:
            missing.append(Rejected(str(path), at, "user_id is missing, should be given in every row"))
            continue
        if trouble := _trouble(name, text=suffix not in _JSON):
            _refuse(path, place, at, trouble)
        kept += 1
        ids[name] = None
    read, note = list(ids), ""
    # pandas writes a column of whole numbers so if one of them is missing.
    if read and suffix not in _JSON and all(map(_FLOAT.fullmatch, read)):
        written, read = read[0], list(dict.fromkeys(str(int(name.partition(".")[0])) for name in read))
        note = f"users: every id is a whole number written as a float: {written} is read as {read[0]}"
    return UserIds(read, Intake(kept, missing), note)


def _decoded(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TablesError(f"{path} cannot be read: {error.strerror}") from error
    foreign = next((reason for mark, reason in _FOREIGN.items() if raw.startswith(mark)), None)
    if foreign:
        raise TablesError(f"{path} is {foreign}")
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise TablesError(
            f"{path} line {line}: not {encoding.removesuffix('-sig').upper()} ({error.reason}): save it as UTF-8"
        ) from error


def _of_csv(path: Path, text: str, suffix: str) -> Entries:
    """Yields the ids of lines; only a header tells the separator of fields, because one column needs none."""
    delimiter, column = _layout(text, suffix)
    width, header = 0, column is not None
    for line, fields in _records(path, text, delimiter):
        if not any(field.strip() for field in fields):
            continue
        if not width:
            width = len(fields)
            if header:
                continue
            if width > 1:
                _refuse(path, "line", line, f"{width} columns, none of them called user_id: write a header with it")
        if len(fields) != width:
            _refuse(path, "line", line, f"{len(fields)} fields where the first line has {width}: quote the field")
        yield line, fields[column or 0].strip()


def _layout(text: str, suffix: str) -> tuple[str, int | None]:
    """Returns the separator of fields and the place of `user_id` in the header; None if there is no header."""
    first = next((line for line in io.StringIO(text, newline=None) if line.strip()), "").rstrip("\n")
    usual = {".csv": ",", ".tsv": "\t", ".tab": "\t"}.get(suffix)
    if len(first) > csv.field_size_limit() or bare_name(first) == "userid":
        return usual or _WHOLE_LINE, 0 if bare_name(first) == "userid" else None
    for delimiter in (*((usual,) if usual else ()), *_DELIMITERS):
        names = [bare_name(name) for name in next(csv.reader([first], delimiter=delimiter), [])]
        if names.count("userid") == 1:
            return delimiter, names.index("userid")
    return usual or _WHOLE_LINE, None


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the records of a CSV, each with the line on which it begins, counted from 1."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            _refuse(path, "line", line, f"not CSV ({error}): close each quote, and write a quote inside as two")
        yield line, fields


def _of_lines(path: Path, text: str) -> Entries:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            yield line, _of_entry(path, "line", line, _parsed(path, content, line))


def _parsed(path: Path, content: str, line: int) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        _refuse(path, "line", line, f"not JSON ({error}): write one object with user_id a line")


def _of_json(path: Path, text: str) -> tuple[str, Entries]:
    """Returns the unit of places, and the ids of one document, or of one a line, as many tools name such a file."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if error.msg == "Extra data" and len(lines) > 1:
            return "line", _of_lines(path, text)
        _refuse(path, "line", error.lineno, f"not JSON ({error.msg})")
    except RecursionError:
        raise TablesError(f"{path} is not a list of users: {_RIGHT}") from None
    entries = _listed(path, content)
    return "entry", ((at, _of_entry(path, "entry", at, entry)) for at, entry in enumerate(entries))


def _listed(path: Path, content: Any) -> Iterable[Any]:
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        lists = {bare_name(name): value for name, value in content.items() if isinstance(value, list | dict)}
        named_lists = [name for name in _LISTS if name in lists]
        if len(named_lists) == 1 or len(lists) == 1:
            value = lists[named_lists[0]] if named_lists else next(iter(lists.values()))
            # Columns as pandas writes them: {"user_id": {"0": "p1", ...}}
            return (
                value.values() if isinstance(value, dict) and named_lists[:1] == ["userid"] else _list_of(path, value)
            )
        if "userid" in map(bare_name, content):
            return [content]
    raise TablesError(f"{path} is not a list of users: give a list of ids, or of objects with user_id")


def _list_of(path: Path, content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    raise TablesError(f"{path} is not a list of users: give a list of ids, or of objects with user_id")


def _of_entry(path: Path, place: str, at: int, entry: Any) -> Any:
    """Returns the id of an object, or the id itself."""
    if not isinstance(entry, dict):
        return entry
    names = [name for name in entry if bare_name(name) == "userid"]
    if len(names) != 1:
        fault = f"{names} all mean user_id: keep one" if names else f"no user_id among {list(entry)[:5]}"
        _refuse(path, place, at, fault)
    return entry[names[0]]


def _id_of(value: Any) -> str | None:
    """Returns an id as a data set writes the same value, "" if it is missing, None if the value is no id."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else None  # beyond, it has been rounded
    return str(value)


def _trouble(name: str, text: bool = False) -> str:
    """Returns the fault of an id, "" if it has none; a control character in a text shows another format."""
    size = len(name.encode(errors="surrogatepass"))
    if size > MOST_ID_BYTES:
        return f"an id of {size} bytes, at most {MOST_ID_BYTES} are taken: name users by a shorter id"
    if text and any(ord(sign) < 32 for sign in name):
        return f"{_shown(name)} holds a control character: save the file as UTF-8, or give such ids in JSON or Parquet"
    if any("\ud800" <= sign <= "\udfff" for sign in name):
        return f"{_shown(name)} is no id: it is not Unicode text"
    return ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(path: Path, place: str, at: int, fault: str) -> NoReturn:
    raise TablesError(f"{path} {place} {at}: {fault}")
