"""Calls to a service on several connections, tried again until an answer comes or the time is over."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import grpc

from penchant.channels import channel_options
from penchant.connections import Connections, WorkerConnection
from penchant.v1 import catalog_pb2_grpc, event_pb2_grpc, profile_pb2_grpc, ranking_pb2_grpc

Request = TypeVar("Request")
Response = TypeVar("Response")

FIRST_PAUSE_S = 0.005
"""Pause before the second attempt of a call, in seconds; each later one is twice as long."""

_BATCH = (("penchant-priority", "batch"),)

UNREACHABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
"""Status codes of a call that has not begun; a server that stops cancels those."""


class ServiceCalls:
    """Connections to one service, and calls on them; its arguments are those of `penchant.client.Client`."""

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        channels: int = 2,
        timeout_s: float = 0.25,
        root_certificates: bytes | None = None,
        batch: bool = False,
    ) -> None:
        """Opens the connections."""
        self._timeout_s = timeout_s
        authorization = (("authorization", f"Bearer {token}"),) if token else ()
        self._metadata = (*authorization, *(_BATCH if batch else ()))
        open_channel = partial(_open, target, root_certificates)
        self._connections = Connections(open_channel, Stubs, max(channels, 1))

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connections."""
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._connections.close()

    def wait_ready(self, timeout_s: float = 10.0) -> None:
        """Waits until every connection is ready; raises grpc.FutureTimeoutError when the time is over."""
        self._connections.wait_ready(timeout_s)

    def _call(
        self,
        pick: Callable[[Stubs], grpc.UnaryUnaryMultiCallable[Request, Response]],
        request: Request,
        timeout_s: float | None,
    ) -> Response:
        """Calls until an answer, an error of a service that is reachable, or the end of the time.

        Each attempt takes the next connection. One that is not ready yet gets only a part of the time, because another
        can do a call that it has not begun.
        """
        end = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        pause = FIRST_PAUSE_S
        unreachable: grpc.RpcError | None = None
        connection: WorkerConnection[Stubs] | None = None
        while True:
            connection = self._connections.take(connection)
            left = max(end - time.monotonic(), 0.001)
            attempt_s = connection.attempt_s(left)
            try:
                return pick(connection.stubs)(request, timeout=attempt_s, metadata=self._metadata)
            except grpc.RpcError as error:
                late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                # Only the connection was too slow; the call has time left for another.
                if late and attempt_s < left and time.monotonic() < end:
                    self._connections.stuck(connection)
                    continue
                if unreachable and late:
                    # The last attempt had little time, so the error of those before it says more.
                    raise unreachable from None
                # Random, so that callers that failed together do not come together again.
                wait = pause * random.uniform(0.5, 1.5)
                if error.code() not in UNREACHABLE or time.monotonic() + wait >= end:
                    raise
                unreachable = error
            finally:
                self._connections.done(connection)
            time.sleep(wait)
            pause = min(2 * pause, 0.1)


class Stubs:
    """The services of the contract on one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        """Makes a stub for each service."""
        self.ranking = ranking_pb2_grpc.RankingServiceStub(channel)
        self.events = event_pb2_grpc.EventServiceStub(channel)
        self.profiles = profile_pb2_grpc.ProfileServiceStub(channel)
        self.catalog = catalog_pb2_grpc.CatalogServiceStub(channel)


def _open(target: str, root_certificates: bytes | None, number: int) -> grpc.Channel:
    options = [
        # Channels with equal options share one connection, so each gets a number and a pool of its own.
        ("penchant.channel", number),
        ("grpc.use_local_subchannel_pool", 1),
        # `_call` retries, and knows how much time is left.
        ("grpc.enable_retries", 0),
        # gRPC's own pause of a second before it connects again is longer than a call may take.
        ("grpc.initial_reconnect_backoff_ms", 50),
        ("grpc.max_reconnect_backoff_ms", 2000),
        *channel_options(target),
    ]
    if root_certificates is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(root_certificates), options=options)
