"""A server with services that only answer, in a process of its own; with its bounds or, as a control, without.

    python -m tests.proofs.bare [--unbounded] [--token TOKEN]

Prints one line of JSON as `penchant serve` does, and ends with its standard input.
"""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import serving.services.server
from penchant.v1 import catalog_pb2_grpc, event_pb2, event_pb2_grpc, profile_pb2_grpc, ranking_pb2, ranking_pb2_grpc
from serving.concurrency import ConcurrencyLimit
from serving.config import ServeConfig
from serving.observability.telemetry import Telemetry
from serving.services.reception.calls import Bounds
from serving.services.reception.executor import Reception

NONE = Bounds(
    calls=1 << 20,
    receiving=1 << 20,
    waiting=1 << 20,
    message_s=1e9,
    bytes_in_hand=1 << 40,
    unread=1 << 40,
    unread_worker=1 << 40,
    read_s=1e9,
)
"""Bounds that bound nothing."""


class Unbounded(Reception):
    """A reception that hands a call to a thread with its headers, as gRPC does by itself."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        return ThreadPoolExecutor.submit(self, fn, *args, **kwargs)


class Ranking(ranking_pb2_grpc.RankingServiceServicer):
    """Answers with a page of 20 kB."""

    def Recommend(self, request: Any, context: Any) -> ranking_pb2.RecommendResponse:
        items = [ranking_pb2.RankedItem(item_id="i" * 180) for _ in range(100)]
        return ranking_pb2.RecommendResponse(slate=ranking_pb2.Slate(items=items))


class Events(event_pb2_grpc.EventServiceServicer):
    """Takes events and forgets them."""

    def Ingest(self, request: Any, context: Any) -> event_pb2.IngestResponse:
        return event_pb2.IngestResponse()

    def IngestStream(self, request_iterator: Any, context: Any) -> Any:
        for _ in request_iterator:
            yield event_pb2.IngestStreamResponse()


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until standard input ends."""
    logging.basicConfig(level=logging.INFO)
    parser = argparse.ArgumentParser()
    parser.add_argument("--unbounded", action="store_true")
    parser.add_argument("--token")
    asked = parser.parse_args(arguments)
    if asked.unbounded:
        serving.services.server.Reception = Unbounded  # type: ignore[misc]
        serving.services.server.Bounds = lambda: NONE  # type: ignore[assignment, misc]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = ServeConfig.load(bundle="none", listen=address, token=asked.token)
    server = serving.services.server.Server(config, ConcurrencyLimit(config.threads), Telemetry())
    profiles, catalog = profile_pb2_grpc.ProfileServiceServicer(), catalog_pb2_grpc.CatalogServiceServicer()
    server.start(address, serving.services.server.Services(Ranking(), Events(), profiles, catalog))
    print(json.dumps({"listen": address, "workers": [os.getpid()]}), flush=True)
    sys.stdin.read()
    server.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
