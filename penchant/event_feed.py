"""The events of a stream in batches, each kept until the service has answered it."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Iterator

from penchant.v1 import event_pb2

# Half of what a service takes in one message by default.
_BATCH_BYTES = 2 << 20


def add_ids(events: Iterable[event_pb2.Event]) -> None:
    """Gives an id to each event that has none."""
    for event in events:
        event.event_id = event.event_id or uuid.uuid4().hex


class EventFeed:
    """The batches of a stream of events, each kept until it is answered, so that another stream can go on."""

    def __init__(self, events: Iterable[event_pb2.Event], size: int) -> None:
        """Takes the events; a batch holds at most `size` of them."""
        self._events, self._size = iter(events), size
        self._waiting: deque[event_pb2.IngestStreamRequest] = deque()
        self._done = self._stream = 0
        self._error: BaseException | None = None
        self._lock, self._taking = threading.Lock(), threading.Lock()

    def requests(self) -> Iterator[event_pb2.IngestStreamRequest]:
        """Yields the batches for a new stream, from the oldest unanswered one; ends when a newer stream begins."""
        with self._lock:
            self._stream += 1
            stream, place = self._stream, self._done
        while (request := self._at(stream, place)) is not None:
            yield request
            place += 1

    def answered(self) -> None:
        """Drops the oldest batch, which is durable."""
        with self._lock:
            self._waiting.popleft()
            self._done += 1

    def raise_its_error(self) -> None:
        """Raises the error of the caller's own events that ended the stream, if there was one."""
        if self._error:
            raise self._error

    def _at(self, stream: int, place: int) -> event_pb2.IngestStreamRequest | None:
        """Returns the batch at a place, made of the next events if none has it yet; None at the end of the stream."""
        # gRPC reads requests in a thread of its own, and a stream that broke may still be reading: a lock around the
        # caller's events, which may block, and another around the batches, which `answered` never waits for.
        with self._taking:
            with self._lock:
                if stream != self._stream:
                    return None
                at = place - self._done
                if at < len(self._waiting):
                    return self._waiting[at]
            request = event_pb2.IngestStreamRequest()
            try:
                self._fill(request)
            except BaseException as error:
                self._error = error
                raise
            # Ids are given before the batch is first sent, so that one sent twice counts once.
            add_ids(request.events)
            if not request.events:
                return None
            with self._lock:
                self._waiting.append(request)
            return request

    def _fill(self, request: event_pb2.IngestStreamRequest) -> None:
        """Adds the next events, up to the number or the bytes that a batch may hold."""
        size = 0
        for event in itertools.islice(self._events, self._size):
            request.events.append(event)
            size += event.ByteSize()
            if size >= _BATCH_BYTES:
                return
