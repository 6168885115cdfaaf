"""Counts the parts of a message before it is parsed: an empty part has two bytes and takes a hundred times as many.

A message of 4 MiB can hold two million empty events; parsed, they take 350 MB, and delay every other call by half a
second.
"""

from __future__ import annotations

import contextlib
from functools import cache

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from serving.errors import InvalidArgument

MOST_PARTS = 1 << 15
"""Most messages in a message, at any depth, and repeated strings; about 6 MB once parsed."""

_LEAST_BYTES = 2
_VARINT, _SIZED = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}
_MOST_DEPTH = 100
"""Depth at which protobuf's parser stops as well."""

_Fields = dict[int, Descriptor | None]
"""The fields that have parts, by number, each with the type of its messages; None for strings."""


def require_few_parts(message: bytes, descriptor: Descriptor) -> None:
    """Refuses a message of too many parts; one that is malformed is left to its parser.

    Args:
        message: The bytes.
        descriptor: Type of the message.

    Raises:
        InvalidArgument: It has more than `MOST_PARTS` parts.
    """
    if len(message) > _LEAST_BYTES * MOST_PARTS and _count(message, _fields(descriptor)) > MOST_PARTS:
        raise InvalidArgument("request", f"has more than {MOST_PARTS} parts: send fewer of them at once")


@cache
def _fields(descriptor: Descriptor) -> _Fields:
    fields: _Fields = {}
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            fields[field.number] = field.message_type
        elif field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES) and field.is_repeated:
            fields[field.number] = None
    return fields


def _count(data: bytes, fields: _Fields) -> int:
    """Returns the number of parts, or any number above `MOST_PARTS` as soon as there are more."""
    # An explicit stack instead of recursion: the caller chooses the depth.
    parts = place = 0
    ends = [(len(data), fields)]
    with contextlib.suppress(IndexError):  # cut short
        while ends and parts <= MOST_PARTS:
            end, fields = ends[-1]
            if place >= end:
                ends.pop()
                continue
            tag, place = _varint(data, place)
            if tag & 7 == _VARINT:
                _, place = _varint(data, place)
            elif tag & 7 != _SIZED:
                place += _FIXED_BYTES.get(tag & 7, 0)
            else:
                size, place = _varint(data, place)
                is_part = tag >> 3 in fields
                parts += is_part
                message_type = fields[tag >> 3] if is_part else None
                if message_type is not None and len(ends) < _MOST_DEPTH and (inner := _fields(message_type)):
                    ends.append((min(place + size, end), inner))
                else:
                    place += size
    return parts


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = data[place]
    if value < 0x80:
        return value, place + 1
    value, shift = value & 0x7F, 7
    while True:
        place += 1
        byte = data[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place + 1
        shift += 7
        if shift > 63:
            raise IndexError
