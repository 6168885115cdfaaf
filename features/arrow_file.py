"""Reads the Arrow files of a bundle or a run so that nothing in them can mislead the reader, or what uses its columns.

Arrow trusts the offsets of a file: one that points outside of it ends the process, at once or at the first request that
touches it. Here every offset, length and letter is checked before a column leaves.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

_MAGIC = b"ARROW1"
_START = 8
_CONTINUES = 0xFFFFFFFF
_BLOCK = struct.Struct("<qi4xq")
_BATCH = 3
"""Number of a record batch among the headers of a message."""

MALFORMED = (pa.ArrowException, OSError, ValueError, LookupError, MemoryError, OverflowError, struct.error)
"""Errors that a malformed file raises."""


def read_table(content: bytes | memoryview, types: Mapping[str, pa.DataType], required: frozenset[str]) -> pa.Table:
    """Reads an Arrow file; its columns point into `content`.

    Args:
        content: The file.
        types: The columns that it may have, and their types.
        required: Those that it must have, without a NULL.

    Raises:
        ValueError: It is not a whole and sound Arrow file of these columns; the message says why.
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


def reopen_table(content: memoryview) -> pa.Table:
    """Returns the table of a file that `read_table` has checked, and that nothing can have changed since.

    Raises:
        ValueError: It is no Arrow file.
    """
    try:
        stream: Any = pa.ipc.open_stream(pa.py_buffer(content).slice(_START))
        table: pa.Table = stream.read_all()
    except MALFORMED as error:
        raise ValueError(str(error).splitlines()[0][:200]) from error
    return table


def _read(content: bytes | memoryview) -> pa.Table:
    """Reads the messages in their order, after a check of each; the footer must list the same places."""
    whole = memoryview(content)
    if bytes(whole[:_START]) != _MAGIC + b"\x00\x00" or bytes(whole[-len(_MAGIC) :]) != _MAGIC:
        raise ValueError("it does not begin and end as an Arrow file")
    batches = _messages(whole)[1:]
    if _listed(whole) != batches:
        raise ValueError("its footer names other record batches than it has")
    # As a stream: the reader of files follows the footer, whose places could overlap or go back.
    buffer = pa.py_buffer(content)
    stream: Any = pa.ipc.open_stream(buffer.slice(_START))
    table: pa.Table = stream.read_all()
    if not pa.ipc.open_file(buffer).schema.equals(table.schema):
        raise ValueError("its footer names other columns than it has")
    return table


def _messages(whole: memoryview) -> list[tuple[int, int, int]]:
    """Returns the place at which each message begins, and the length of its head and of its body."""
    messages: list[tuple[int, int, int]] = []
    place = _START
    while True:
        mark, size = struct.unpack_from("<II", whole, place)
        if mark != _CONTINUES:
            raise ValueError("a message does not begin where the last one ends")
        if not size:
            return messages
        head = whole[place + 8 : place + 8 + size]
        # A compressed batch of a megabyte can hold thirty gigabytes; export writes none.
        if messages:
            _require_plain(head)
        (table,) = struct.unpack_from("<I", head)
        length = _field(head, table, 3)
        body: int = struct.unpack_from("<q", head, length)[0] if length else 0
        if not 0 <= body <= len(whole):
            raise ValueError("a message is longer than the file")
        messages.append((place, 8 + size, body))
        place += 8 + size + body


def _listed(whole: memoryview) -> list[tuple[int, int, int]]:
    """Returns the same of the record batches as the footer lists them."""
    end = len(whole) - len(_MAGIC) - 4
    (size,) = struct.unpack_from("<I", whole, end)
    if not _START <= size <= end:
        raise ValueError("its footer is longer than the file")
    footer = whole[end - size : end]
    (table,) = struct.unpack_from("<I", footer)
    field = _field(footer, table, 3)
    if not field:
        return []
    vector = field + struct.unpack_from("<I", footer, field)[0]
    (count,) = struct.unpack_from("<I", footer, vector)
    # Before the list is made: a count of billions would take the memory of the machine.
    if count > size // _BLOCK.size:
        raise ValueError("its footer is longer than the file")
    return [_BLOCK.unpack_from(footer, vector + 4 + at * _BLOCK.size) for at in range(count)]


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
    """Returns the place of a field of a table, 0 if it is left out."""
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
    # A column is read by its name, so a second one of that name would go unchecked.
    if len(set(names)) != len(names):
        raise ValueError("it names a column twice")
    if lacking := sorted(required - set(names)):
        raise ValueError(f"it lacks the column {lacking[0]}")
    for field in table.schema:
        if field.name not in types:
            raise ValueError(f"it has a column {field.name[:80]!r} of no use")
        if not field.type.equals(types[field.name]):
            raise ValueError(f"its column {field.name} is {str(field.type)[:80]} instead of {types[field.name]}")
