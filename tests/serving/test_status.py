"""The gRPC status of an error."""

from __future__ import annotations

import weakref

from serving.errors import InvalidArgument, ResourceExhausted, ServingError
from serving.services.status import status_of


def test_the_status_of_an_error_keeps_nothing_of_the_message_that_it_refused():
    class Message:
        """Stands for 4 MiB that a frame of the traceback holds."""

    def refuse(message: Message) -> ServingError:
        try:
            raise ResourceExhausted("the server is busy", retry_after_ms=100)
        except ServingError as error:
            return error

    message = Message()
    kept = weakref.ref(message)
    first = status_of(refuse(message))
    del message
    assert kept() is None
    assert status_of(ResourceExhausted("the server is busy", retry_after_ms=100)) == first
    assert status_of(ResourceExhausted("the server is busy", retry_after_ms=200)) != first
    assert status_of(InvalidArgument("page_size", "is 0"), "r1")[2][0] == ("x-request-id", "r1")
