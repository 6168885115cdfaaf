"""How many parts a message has, before it is parsed."""

from __future__ import annotations

import time

import pytest

from penchant.v1 import catalog_pb2, event_pb2, ranking_pb2
from serving.errors import InvalidArgument
from serving.services.reception import parts


def _events(number: int, attributes: int = 0) -> event_pb2.IngestRequest:
    event = event_pb2.Event(event_type="view", item_id="i" * 80, attributes={f"k{n}": "v" for n in range(attributes)})
    event.subject.user_id = "u"
    return event_pb2.IngestRequest(events=[event] * number)


@pytest.mark.parametrize(
    ("message", "number"),
    [
        (_events(1000), 2000),
        (_events(1000, 10), 12_000),
        (catalog_pb2.PutItemsRequest(items=[catalog_pb2.Item(item_id="i", categories=["", "c"])] * 9), 27),
    ],
)
def test_parts_are_counted_at_every_depth(message, number):
    content = message.SerializeToString()
    assert parts._count(content, parts._fields(message.DESCRIPTOR)) == number
    parts.require_few_parts(content, message.DESCRIPTOR)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x0a\x00" * (2 << 20), event_pb2.IngestRequest),
        (b"\x8a\x80\x00\x80\x00" * (800 << 10), event_pb2.IngestRequest),
        (b"\x0b" + b"\x0a\x00" * (1 << 20), event_pb2.IngestRequest),
        (b"\x0a\x80\x80\x80\x01" + b"\x62\x00" * (1 << 20), event_pb2.IngestRequest),
        (b"\x0a\x80\x80\x80\x01" + b"\x3a\x00" * (1 << 20), ranking_pb2.RecommendRequest),
    ],
    ids=["empty events", "long varints", "in a group", "attributes of one event", "ids"],
)
def test_a_message_of_many_parts_is_refused_at_once(content, kind):
    begun = time.thread_time()
    with pytest.raises(InvalidArgument, match="parts"):
        parts.require_few_parts(content, kind.DESCRIPTOR)
    assert time.thread_time() - begun < 0.5


@pytest.mark.parametrize("content", [b"\x0a\xff" * 40_000, b"\x0a" + b"\xff" * 99_000, b"\x00" * 99_000, b"z" * 99_000])
def test_what_is_malformed_is_left_to_the_parser(content):
    parts.require_few_parts(content, event_pb2.IngestRequest.DESCRIPTOR)
