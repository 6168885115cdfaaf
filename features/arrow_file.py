"""Reads the Arrow files of a bundle or a run so that nothing in them can mislead: neither the reader nor what uses it.

Arrow maps what a file says without looking: an offset that points outside of it ends the process, at once or at the
first request that touches it. Here every offset, length and letter is checked before a column leaves.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

_MAGIC = b"ARROW1"
_START = 8
_BATCH = 3
"""Number of a record batch among the headers of a message."""

MALFORMED = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError, struct.error)
"""Whatever a malformed file raises."""


def read_table(content: bytes | memoryview, types: Mapping[str, pa.DataType], required: frozenset[str]) -> pa.Table:
    """Reads an Arrow file; its columns point into `content`.

    Args:
        content: The file.
        types: The columns that it may have, and their types.
        required: Those that it must have, without a NULL.

    Raises:
        ValueError: It is not a whole and sound Arrow file of these columns; the message says what is wrong.
    """
    try:
        table = _read(content)
        _check_columns(table, types, required)
        table.validate(full=True)
    except MALFORMED as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(reason) from error
    for name in required:
        if table.column(name).null_count:
            raise ValueError(f"the column {name} holds NULL")
    return table


def _read(content: bytes | memoryview) -> pa.Table:
    """Reads the messages in their order: the footer, which says once more where they lie, is of no use to us."""
    buffer = pa.py_buffer(content)
    if bytes(content[:_START]).rstrip(b"\x00") != _MAGIC or bytes(content[-len(_MAGIC) :]) != _MAGIC:
        raise ValueError("it does not begin and end as an Arrow file")
    # A compressed batch of a megabyte can hold thirty gigabytes; export writes none.
    messages: Any = pa.ipc.MessageReader.open_stream(buffer.slice(_START))
    for at, message in enumerate(messages):
        if at:
            _require_plain(memoryview(message.metadata))
    stream: Any = pa.ipc.open_stream(buffer.slice(_START))
    table: pa.Table = stream.read_all()
    return table


def _require_plain(metadata: memoryview) -> None:
    """Refuses a message that is no record batch, or a compressed one.

    The flatbuffers of Arrow's `Message.fbs`: a table begins with the distance to the list of its fields' places.
    """
    (message,) = struct.unpack_from("<I", metadata)
    kind = _field(metadata, message, 1)
    header = _field(metadata, message, 2)
    if not kind or not header or metadata[kind] != _BATCH:
        raise ValueError("it holds something else than record batches")
    batch = header + struct.unpack_from("<I", metadata, header)[0]
    if _field(metadata, batch, 3):
        raise ValueError("it is compressed")


def _field(metadata: memoryview, table: int, number: int) -> int:
    """Returns where a field of a table stands, 0 where it is left out."""
    if table >= len(metadata):
        raise ValueError("a message points outside of itself")
    places = table - struct.unpack_from("<i", metadata, table)[0]
    if not 0 <= places < len(metadata):
        raise ValueError("a message points outside of itself")
    (size,) = struct.unpack_from("<H", metadata, places)
    at = 4 + 2 * number
    place: int = struct.unpack_from("<H", metadata, places + at)[0] if at + 2 <= size else 0
    return table + place if place else 0


def _check_columns(table: pa.Table, types: Mapping[str, pa.DataType], required: frozenset[str]) -> None:
    names = table.schema.names
    if len(set(names)) != len(names):
        raise ValueError("it names a column twice")
    if lacking := sorted(required - set(names)):
        raise ValueError(f"it lacks the column {lacking[0]}")
    for field in table.schema:
        if field.name not in types:
            raise ValueError(f"it has a column {field.name[:80]!r} of no use")
        if not field.type.equals(types[field.name]):
            raise ValueError(f"its column {field.name} is {str(field.type)[:80]} instead of {types[field.name]}")
