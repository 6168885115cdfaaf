"""An Arrow file is whole and sound, or is refused with a ValueError, whatever byte of it is another one."""

from __future__ import annotations

import io

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.arrow_file import read_table

TYPES = {"id": pa.string(), "lists": pa.list_(pa.int32()), "number": pa.int64()}
TABLE = pa.table(
    {"id": ["a", "bc", "déf"], "lists": [[1], [], [2, 3]], "number": [1, 2, 3]}, schema=pa.schema(list(TYPES.items()))
)


def written(table: pa.Table = TABLE, **options) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


@given(st.integers(0, len(written()) - 1), st.binary(min_size=1, max_size=8), st.integers(0, 40))
def test_no_byte_ends_the_process_or_raises_anything_else(place, hostile, cut):
    content = bytearray(written())
    content[place : place + len(hostile)] = hostile
    try:
        table = read_table(bytes(content[: len(content) - (cut if cut < 8 else 0)]), TYPES, frozenset(TYPES))
    except ValueError:
        return
    table.validate(full=True)
    assert [len(row["id"]) >= 0 and sum(row["lists"]) is not None for row in table.to_pylist()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (written(compression="zstd"), "it is compressed"),
        (written(TABLE.append_column("number", TABLE["number"])), "names a column twice"),
        (written(TABLE.drop_columns(["number"])), "lacks the column number"),
        (written(TABLE.append_column("more", TABLE["number"])), "a column 'more' of no use"),
        (written(TABLE.set_column(2, "number", TABLE["id"])), "number is string instead of int64"),
        (written(TABLE.set_column(2, "number", pa.array([1, None, 3]))), "the column number holds NULL"),
        (written()[:-1], "does not begin and end as an Arrow file"),
        (written()[:8] + written()[8:].replace(b"bc", b"\xff\xff"), "Invalid UTF8"),
    ],
)
def test_what_is_wrong_is_said(content, message):
    with pytest.raises(ValueError, match=message):
        read_table(content, TYPES, frozenset(TYPES))


def test_the_columns_point_into_the_file():
    content = written(TABLE.combine_chunks())
    table = read_table(content, TYPES, frozenset(TYPES))
    start = pa.py_buffer(content).address
    assert start <= table["number"].chunk(0).buffers()[1].address < start + len(content)
