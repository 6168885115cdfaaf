"""A stub of a service with planted faults: a real gRPC server whose answers the test decides."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from penchant.v1 import catalog_pb2, common_pb2, event_pb2, ranking_pb2

ITEMS = [f"item-{number}" for number in range(60)]


@dataclass
class Stub:
    """A service of which every answer can be spoiled.

    Attributes:
        target: Its address.
        slate: The items of a slate, by the user.
        delay_s: Seconds that each ranking takes.
        seen: The calls: path, message and metadata.
    """

    target: str = ""
    slate: Callable[[str], list[str]] = lambda user: ITEMS[:20]
    delay_s: Callable[[], float] = lambda: 0.0
    refuse: Callable[[], bool] = lambda: False
    versions: dict[str, int] = field(default_factory=dict)
    withdrawn: set[str] = field(default_factory=set)
    ignores_availability: bool = False
    seen: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, message: bytes, context: grpc.ServicerContext) -> bytes:
        """Answers a call of any method."""
        with self.lock:
            self.seen.append((path, message, dict(context.invocation_metadata())))
        name = path.rpartition("/")[2]
        if name == "Check":
            return bytes(health_pb2.HealthCheckResponse(status=1).SerializeToString())
        if name == "Ingest":
            return self._ingest(event_pb2.IngestRequest.FromString(message))
        if name == "SetAvailability":
            return self._availability(catalog_pb2.SetAvailabilityRequest.FromString(message))
        if self.refuse():
            context.set_trailing_metadata((("grpc-retry-pushback-ms", "50"),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls")
        time.sleep(self.delay_s())
        # The options of every ranking request are in field 1.
        options = ranking_pb2.RecommendRequest.FromString(message).options
        items = [item for item in self.slate(options.subject.user_id) if item not in self.withdrawn]
        slate = ranking_pb2.Slate(
            items=[ranking_pb2.RankedItem(item_id=item) for item in items[: options.page_size]],
            rung=common_pb2.RUNG_POPULAR,
            profile_version=self.versions.get(options.subject.user_id, 0),
        )
        return bytes(ranking_pb2.RecommendResponse(slate=slate).SerializeToString())

    def _ingest(self, request: event_pb2.IngestRequest) -> bytes:
        statuses = []
        for event in request.events:
            self.versions[event.subject.user_id] = self.versions.get(event.subject.user_id, 0) + 1
            statuses.append(event_pb2.EventStatus(profile_version=self.versions[event.subject.user_id]))
        return bytes(event_pb2.IngestResponse(statuses=statuses).SerializeToString())

    def _availability(self, request: catalog_pb2.SetAvailabilityRequest) -> bytes:
        for change in request.changes:
            if change.available:
                self.withdrawn.discard(change.item_id)
            elif not self.ignores_availability:
                self.withdrawn.add(change.item_id)
        return bytes(catalog_pb2.SetAvailabilityResponse(catalog_version=1).SerializeToString())


class _AnyMethod(grpc.GenericRpcHandler):
    def __init__(self, stub: Stub) -> None:
        self._stub = stub

    def service(self, details: Any) -> grpc.RpcMethodHandler:
        """A handler of any path."""
        return grpc.unary_unary_rpc_method_handler(
            lambda message, context: self._stub.answer(details.method, message, context)
        )


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A stub that listens."""
    made = Stub()
    server = grpc.server(ThreadPoolExecutor(8), handlers=[_AnyMethod(made)], options=[("grpc.so_reuseport", 0)])
    made.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield made
    finally:
        server.stop(0).wait()
