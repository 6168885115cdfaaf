"""Every usual form of a file of users names the users that a data set of the same values has."""

from __future__ import annotations

import csv
import decimal
import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import TablesError
from features.tables.convert import MOST_ID_BYTES
from features.tables.dataset import read_table
from features.tables.schema import USERS, USERS_REQUIRED
from features.tables.user_ids import read_user_ids, read_users

FIVE = ["p1", "p2", "p3", "p4", "p5"]


def lines_of(ids: list[str], newline: str = "\n") -> str:
    return "".join(name + newline for name in ids)


def csv_of(ids: list[str], delimiter: str = ",", header: str | None = "user_id", quoting: int = csv.QUOTE_ALL) -> str:
    """Ids between two other columns; ids alone without a header."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
    if header is None:
        writer.writerows([name] for name in ids)
    else:
        writer.writerows([["segment", header, "age"], *(["a", name, "7"] for name in ids)])
    return out.getvalue()


def objects(ids: list[str], name: str = "user_id") -> str:
    return lines_of([json.dumps({"segment": "a", name: one}, ensure_ascii=False) for one in ids])


TEXTS: dict[str, tuple[str, Callable[[list[str]], bytes]]] = {
    "a line each": ("txt", lambda ids: lines_of(ids).encode()),
    "without a last newline": ("txt", lambda ids: lines_of(ids).rstrip("\n").encode()),
    "without a suffix": ("", lambda ids: lines_of(ids).encode()),
    "CRLF": ("txt", lambda ids: lines_of(ids, "\r\n").encode()),
    "CR": ("txt", lambda ids: lines_of(ids, "\r").encode()),
    "byte-order mark": ("txt", lambda ids: lines_of(ids).encode("utf-8-sig")),
    "UTF-16": ("txt", lambda ids: lines_of(ids, "\r\n").encode("utf-16")),
    "UTF-16 big endian": ("csv", lambda ids: b"\xfe\xff" + csv_of(ids).encode("utf-16-be")),
    "UTF-32": ("txt", lambda ids: lines_of(ids).encode("utf-32")),
    "header in text": ("txt", lambda ids: lines_of(["user_id", *ids]).encode()),
    "table in text": ("txt", lambda ids: csv_of(ids).encode()),
    "CSV": ("csv", lambda ids: csv_of(ids, quoting=csv.QUOTE_MINIMAL).encode()),
    "CSV quoted, with mark": ("CSV", lambda ids: csv_of(ids, header="USER_ID").encode("utf-8-sig")),
    "CSV without header": ("csv", lambda ids: csv_of(ids, header=None).encode()),
    "CSV of semicolons": ("csv", lambda ids: csv_of(ids, ";", "userId").encode()),
    "CSV of bars": ("csv", lambda ids: csv_of(ids, "|", "User ID").encode()),
    "TSV": ("tsv", lambda ids: csv_of(ids, "\t", quoting=csv.QUOTE_MINIMAL).encode()),
    "TSV called CSV": ("csv", lambda ids: csv_of(ids, "\t").encode()),
    "JSON lines": ("jsonl", lambda ids: objects(ids).encode()),
    "ndjson": ("ndjson", lambda ids: objects(ids, "USER_ID").encode()),
    "ndjson, CRLF and mark": ("ndjson", lambda ids: objects(ids).replace("\n", "\r\n").encode("utf-8-sig")),
    "ids as JSON lines": ("jsonl", lambda ids: lines_of([json.dumps(name) for name in ids]).encode()),
    "JSON list": ("json", lambda ids: json.dumps(ids).encode()),
    "JSON objects": ("json", lambda ids: json.dumps([{"age": 7, "userId": name} for name in ids], indent=1).encode()),
    "JSON object of a list": ("json", lambda ids: json.dumps({"count": 5, "users": ids}).encode()),
    "JSON object of objects": ("json", lambda ids: json.dumps({"data": [{"user_id": n} for n in ids]}).encode()),
    "JSON columns": ("json", lambda ids: json.dumps({"a": {"0": 1}, "user_id": dict(enumerate(ids))}).encode()),
    "JSON lines called JSON": ("json", lambda ids: objects(ids).encode()),
}
COLUMNS: dict[str, Callable[[list[str]], pa.Table]] = {
    "text": lambda ids: pa.table({"user_id": ids}),
    "upper case": lambda ids: pa.table({"USER_ID": ids}),
    "camel case": lambda ids: pa.table({"n": [1] * len(ids), "userId": ids}),
    "large text": lambda ids: pa.table({"user_id": pa.array(ids, pa.large_string())}),
    "dictionary": lambda ids: pa.table({"user_id": pa.array(ids).dictionary_encode()}),
    "bytes": lambda ids: pa.table({"user_id": pa.array([name.encode() for name in ids], pa.binary())}),
}


def written(folder: Path, name: str, ids: list[str]) -> Path:
    if name in TEXTS:
        suffix, write = TEXTS[name]
        file = folder / f"users.{suffix}".rstrip(".")
        file.write_bytes(write(ids))
    else:
        file = folder / "users.parquet"
        pq.write_table(COLUMNS[name](ids), file)
    return file


@pytest.mark.parametrize("name", [*TEXTS, *COLUMNS])
def test_every_form_names_the_five_users(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_user_ids(written(tmp_path, name, FIVE)) == FIVE
    assert capsys.readouterr() == ("", "")


# Without what makes another file of a text: control characters, a byte-order mark, and what looks like a header.
SIGNS = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="\ufeff")
WORDS = st.text(SIGNS, min_size=1, max_size=12)
IDS = st.lists(
    WORDS.filter(lambda name: name == name.strip() and "".join(filter(str.isalnum, name.lower())) != "userid"),
    min_size=1,
    max_size=6,
    unique=True,
)
# A line that begins with a quote is a quoted field; in these the id stands bare.
BARE = {name for name, (suffix, _) in TEXTS.items() if suffix in ("txt", "")} - {"table in text"}


@given(ids=IDS, name=st.sampled_from([*TEXTS, *COLUMNS]))
@settings(max_examples=300, deadline=None)
def test_ids_come_back_from_every_form(tmp_path_factory: pytest.TempPathFactory, ids: list[str], name: str) -> None:
    if name in BARE:
        ids = [one for one in ids if not one.startswith('"')] or ["p1"]
    folder = tmp_path_factory.mktemp("ids")
    assert read_user_ids(written(folder, name, ids)) == ids


@given(
    ids=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, unique=True),
    name=st.sampled_from([*COLUMNS, *(name for name, (suffix, _) in TEXTS.items() if suffix in ("json", "jsonl"))]),
)
@settings(max_examples=100, deadline=None)
def test_json_and_parquet_hold_any_id(tmp_path_factory: pytest.TempPathFactory, ids: list[str], name: str) -> None:
    assert read_user_ids(written(tmp_path_factory.mktemp("ids"), name, ids)) == ids


@pytest.mark.parametrize(
    ("column", "ids"),
    [
        (pa.array([1.0, 2.0, 1e15]), ["1", "2", "1000000000000000"]),
        (pa.array([3, 2, 3, 1], pa.uint64()), ["3", "2", "1"]),
        (pa.array([-4], pa.int8()), ["-4"]),
        (pa.array(["1.0", "01", " p"]), ["1.0", "01", " p"]),
    ],
)
def test_parquet_names_the_users_of_a_data_set(tmp_path: Path, column: pa.Array, ids: list[str]) -> None:
    folder = tmp_path / "users"
    (folder / "day=1").mkdir(parents=True)
    pq.write_table(pa.table({"user_id": column}), folder / "day=1" / "part.parquet")
    assert read_user_ids(folder) == read_user_ids(folder / "day=1" / "part.parquet") == ids
    assert list(dict.fromkeys(read_table(folder, USERS, USERS_REQUIRED).table["user_id"].to_pylist())) == ids


@pytest.mark.parametrize(
    "column",
    [
        pa.array([decimal.Decimal(7)], pa.decimal128(38, 0)),
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([uuid.UUID(int=7).bytes], pa.binary(16))),
    ],
)
def test_types_that_a_data_set_refuses_are_refused_and_those_it_reads_are_the_same(
    tmp_path: Path, column: pa.Array
) -> None:
    pq.write_table(pa.table({"user_id": column}), tmp_path / "users.parquet")

    def reading(read: Callable[[], list[str]]) -> list[str] | str:
        try:
            return read()
        except TablesError as error:
            return str(error)

    of_data = reading(
        lambda: read_table(tmp_path / "users.parquet", USERS, USERS_REQUIRED).table["user_id"].to_pylist()
    )
    assert reading(lambda: read_user_ids(tmp_path / "users.parquet")) == of_data


def test_a_missing_id_is_told_and_the_others_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"user_id": [1.0, 2.0, None]}), tmp_path / "float.parquet")
    assert read_user_ids(tmp_path / "float.parquet") == ["1", "2"]
    told = capsys.readouterr().err
    assert told.startswith("users: 1 of 3 rows rejected (33.3 %), first ")
    assert "float.parquet row 2: user_id is missing" in told
    (tmp_path / "a.jsonl").write_text('{"user_id": 1.0}\n\n{"user_id": null}\n{"user_id": 2}\n')
    assert read_users(tmp_path / "a.jsonl").intake.rejected[0].row == 3
    assert read_user_ids(tmp_path / "a.jsonl") == ["1", "2"]
    assert "a.jsonl row 3: user_id is missing" in capsys.readouterr().err
    (tmp_path / "a.csv").write_text("user_id,age\np1,3\n,4\n\np1,3\n")
    assert read_user_ids(tmp_path / "a.csv") == ["p1"]
    assert "users: 1 of 3 rows rejected" in capsys.readouterr().err


def test_spaces_empty_lines_and_repeats_in_text_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "users.txt").write_text("\n  p2\t\n\np1\np2\n\n")
    assert read_user_ids(tmp_path / "users.txt") == ["p2", "p1"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("a.csv", "user_id\n1.0\n2.0\n\n2.0\n", ["1", "2"]),
        ("a.csv", "user_id,age\n1.0,3.5\n,1\n-0.0,1\n", ["1", "0"]),
        ("a.txt", "10.00\n9007199254740993.0\n", ["10", "9007199254740993"]),
        ("a.csv", "user_id\n1.0\n2\n", ["1.0", "2"]),
        ("a.csv", "user_id\n1.0\n2.5\n", ["1.0", "2.5"]),
        ("a.csv", "user_id\n01.0\n", ["01.0"]),
        ("a.json", '["1.0", "2.0"]', ["1.0", "2.0"]),
    ],
)
def test_whole_numbers_that_a_table_writes_as_floats_are_whole_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, ids: list[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert read_user_ids(tmp_path / name) == ids
    told = "users: every id is a whole number written as a float: " in capsys.readouterr().err
    assert told == ("." not in ids[0])


REFUSED = {
    "no user": ("a.txt", b"\n\n", "names no user: give one id a line"),
    "a header and no user": ("a.csv", b"user_id,age\n", "names no user"),
    "only missing ids": ("a.json", b"[null, null]", "names no user, 2 rows are without one"),
    "bad UTF-8": ("a.txt", b"p1\np2\n\xff\xfep3\n", "line 3: not UTF-8"),
    "UTF-16 without a mark": ("a.txt", "p1\n".encode("utf-16-le"), "line 1: .*control character"),
    "several columns, no header": ("a.csv", b"p1,a\np2,b\n", "line 1: 2 columns, none of them called user_id"),
    "another header": ("a.csv", b"customer,age\np1,3\n", "line 1: 2 columns, none of them called user_id"),
    "a field too many": ("a.csv", b"user_id,age\np1,3\np2,3,4\n", "line 3: 3 fields where the first line has 2"),
    "an open quote": ("a.csv", b'user_id\np1\n"p2\np3\n', "line 3: not CSV"),
    "not JSON": ("a.jsonl", b'{"user_id": "p1"}\nuser p2\n', "line 2: not JSON"),
    "cut off": ("a.json", b'["p1",\n"p2', "line 2: not JSON"),
    "no such field": ("a.ndjson", b'{"user_id": 1}\n{"id": 2}\n', r"line 2: no user_id among \['id'\]"),
    "two such fields": ("a.json", b'[{"user_id": 1, "userId": 2}]', "entry 0: .*keep one"),
    "a fraction": ("a.json", b"[1, 1.5]", "entry 1: 1.5 is no id"),
    "a float that was rounded": ("a.json", b"[9007199254740993.0]", "entry 0: 9007199254740992.0 is no id"),
    "true": ("a.json", b"[true]", "entry 0: True is no id"),
    "a list": ("a.jsonl", b'["p1"]\n', r"line 1: \['p1'\] is no id"),
    "a number": ("a.json", b"7", "not a list of users"),
    "two lists": ("a.json", b'{"a": [1], "b": [2]}', "not a list of users"),
    "a surrogate": ("a.json", b'["\\ud800"]', "entry 0: .*is no id"),
    "too long": ("a.txt", b"p1\n" + b"x" * (MOST_ID_BYTES + 1) + b"\n", "line 2: an id of 513 bytes, at most 512"),
    "far too long": ("a.csv", b"p1\n" + b"x" * 200_000 + b"\n", "line 2: not CSV"),
    "gzip": ("a.txt", b"\x1f\x8b\x08\x00", "is gzip: unpack it first"),
    "a spreadsheet": ("a.csv", b"PK\x03\x04", "a spreadsheet: save it as CSV"),
    "no Parquet": ("a.parquet", b"p1\n", "cannot be read as Parquet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    file, content, message = REFUSED[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(TablesError, match=message):
        read_user_ids(tmp_path / file)


def test_parquet_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": [1.0, 1.5]}), file)
    with pytest.raises(TablesError, match=r"users\.parquet row 1: user_id is 1\.5"):
        read_user_ids(file)
    pq.write_table(pa.table({"user_id": ["x" * 513]}), file)
    with pytest.raises(TablesError, match=r"\b51[23]\b"):
        read_user_ids(file)
    pq.write_table(pa.table({"customer": ["p1"]}), file)
    with pytest.raises(TablesError, match=r"no column user_id; it has \['customer'\]"):
        read_user_ids(file)
    with pytest.raises(TablesError, match="cannot be read"):
        read_user_ids(tmp_path / "nothing.txt")


def test_the_longest_id_is_taken(tmp_path: Path) -> None:
    (tmp_path / "users.txt").write_text("ü" * (MOST_ID_BYTES // 2))
    assert read_user_ids(tmp_path / "users.txt") == ["ü" * 256]
