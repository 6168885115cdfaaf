"""Load on Penchant by locust: `locust -f benchmarks/clients/locustfile.py --headless -H 127.0.0.1:50051 -u 100 -t 30s`.

Each of locust's users makes one call a second; 100 of them make about 100. `PENCHANT_USERS`, `PENCHANT_ITEMS` (ids from
1 to N) and `PENCHANT_QUERIES` (separated by commas) say whom and what to ask for. A user of locust waits for its answer
before it calls again, so a slow service gets fewer calls than were meant: read the rate with the latency.
"""

from __future__ import annotations

import functools
import os
import random
import time
import uuid
from collections.abc import Callable
from typing import Any

import grpc
import grpc.experimental.gevent  # type: ignore[import-not-found]
from locust import User, constant_throughput, task  # pyright: ignore[reportMissingImports]

from penchant.channels import channel_options
from penchant.v1 import common_pb2, event_pb2, event_pb2_grpc, ranking_pb2, ranking_pb2_grpc

USERS = int(os.environ.get("PENCHANT_USERS", "6040"))
ITEMS = int(os.environ.get("PENCHANT_ITEMS", "3883"))
QUERIES = os.environ.get("PENCHANT_QUERIES", "star wars,toy story").split(",")
TIMEOUT_S = 1.0
CANDIDATES = 200
METADATA = (("penchant-priority", "interactive"),)


class PenchantUser(User):  # type: ignore[misc]
    """One caller, with a connection of its own."""

    wait_time = constant_throughput(1)
    host = "127.0.0.1:50051"

    def __init__(self, environment: Any) -> None:
        """Opens the connection."""
        super().__init__(environment)
        _share_the_thread()
        options = [("grpc.use_local_subchannel_pool", 1), *channel_options(self.host)]
        self._channel = grpc.insecure_channel(self.host, options=options)
        self._ranking = ranking_pb2_grpc.RankingServiceStub(self._channel)
        self._events = event_pb2_grpc.EventServiceStub(self._channel)

    def on_stop(self) -> None:
        """Closes the connection."""
        self._channel.close()

    @task(70)  # type: ignore[untyped-decorator]
    def recommend(self) -> None:
        """Asks for a feed."""
        self._call("Recommend", self._ranking.Recommend, ranking_pb2.RecommendRequest(options=_options()))

    @task(10)  # type: ignore[untyped-decorator]
    def search(self) -> None:
        """Searches."""
        request = ranking_pb2.SearchRequest(options=_options(), query=random.choice(QUERIES))
        self._call("Search", self._ranking.Search, request)

    @task(10)  # type: ignore[untyped-decorator]
    def rank(self) -> None:
        """Lets candidates be ordered."""
        candidates = ranking_pb2.Candidates(item_ids=[_item() for _ in range(CANDIDATES)])
        self._call("Rank", self._ranking.Rank, ranking_pb2.RankRequest(options=_options(), candidates=candidates))

    @task(5)  # type: ignore[untyped-decorator]
    def similar(self) -> None:
        """Asks for similar items."""
        request = ranking_pb2.SimilarItemsRequest(options=_options(), seed_item_ids=[_item()])
        self._call("SimilarItems", self._ranking.SimilarItems, request)

    @task(5)  # type: ignore[untyped-decorator]
    def ingest(self) -> None:
        """Sends an event."""
        event = event_pb2.Event(event_id=uuid.uuid4().hex, subject=_subject(), item_id=_item(), event_type="view_item")
        self._call("Ingest", self._events.Ingest, event_pb2.IngestRequest(events=[event]))

    def _call(self, name: str, method: Callable[..., Any], request: Any) -> None:
        begun, error, size = time.perf_counter(), None, 0
        try:
            size = method(request, timeout=TIMEOUT_S, metadata=METADATA).ByteSize()
        except grpc.RpcError as failure:
            error = failure
        self.environment.events.request.fire(
            request_type="grpc",
            name=name,
            response_time=(time.perf_counter() - begun) * 1000,
            response_length=size,
            exception=error,
            context={},
        )


@functools.cache
def _share_the_thread() -> None:
    # Without this a call would stop all of locust's users until its answer comes.
    grpc.experimental.gevent.init_gevent()  # pyright: ignore[reportAttributeAccessIssue]


def _options() -> ranking_pb2.RankingOptions:
    return ranking_pb2.RankingOptions(subject=_subject(), surface="home", page_size=10)


def _subject() -> common_pb2.Subject:
    return common_pb2.Subject(user_id=str(random.randint(1, USERS)))


def _item() -> str:
    return str(random.randint(1, ITEMS))
