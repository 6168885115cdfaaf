"""The gRPC server of a worker: its options, the health service, reflection and the graceful stop.

A synchronous server with a small pool of threads: measured, it costs less CPU a call than the asynchronous ones.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from penchant.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    event_pb2,
    event_pb2_grpc,
    profile_pb2,
    profile_pb2_grpc,
    ranking_pb2,
    ranking_pb2_grpc,
)
from serving.concurrency import ConcurrencyLimit
from serving.config import ServeConfig
from serving.observability.observer import RequestObserver
from serving.observability.telemetry import Telemetry
from serving.services.interceptors import HEALTH, Interceptor, RequestInterceptor, TokenInterceptor
from serving.services.reception.admission import AdmissionControl
from serving.services.reception.calls import Bounds, Lane, Phase
from serving.services.reception.executor import THREADS, Reception
from serving.services.reception.grpc_log import limit_grpc_log
from serving.services.reception.rankings import Rankings
from serving.services.reception.sockets import Sockets, connection_limits
from serving.services.status import status_of

_FILES = (ranking_pb2, event_pb2, profile_pb2, catalog_pb2)
_NAMES = [service.full_name for file in _FILES for service in file.DESCRIPTOR.services_by_name.values()]
_HURRY_POLL_S = 0.05
_CHECKS, _WATCHES, _REFLECTIONS = 1024, 256, 4
_IDLE_S, _REFLECTION_S = 60.0, 10.0
_READ_BYTES = 64 << 10
_AHEAD_BYTES = 16 << 10
_HEADER_BYTES = 8 << 10
_HANDSHAKE_MS = 10_000
_PENDING = 2560
_IDLE_CONNECTION_MS = 300_000
"""Time after which a connection without a call is ended; clients open it again when they have one."""

_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Clients ping to keep a way through NAT open, also between calls; gRPC's own limit of a ping in five minutes
    # would end their connections. A flood of pings ends as other abuse does: gRPC needs longer to refuse a ping
    # than to answer it.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
)


@dataclass(frozen=True, slots=True)
class Services:
    """The services of a server."""

    ranking: ranking_pb2_grpc.RankingServiceServicer
    events: event_pb2_grpc.EventServiceServicer
    profiles: profile_pb2_grpc.ProfileServiceServicer
    catalog: catalog_pb2_grpc.CatalogServiceServicer

    def add_to(self, server: grpc.Server) -> None:
        """Registers all services."""
        ranking_pb2_grpc.add_RankingServiceServicer_to_server(self.ranking, server)
        event_pb2_grpc.add_EventServiceServicer_to_server(self.events, server)
        profile_pb2_grpc.add_ProfileServiceServicer_to_server(self.profiles, server)
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server(self.catalog, server)


class _Health(health.HealthServicer):
    """Health checks whose initial metadata name the worker and say how many its instance has.

    A client with several connections learns from them whether these reach several workers.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(experimental_non_blocking=True)
        self._metadata = (("x-worker", uuid.uuid4().hex), ("x-workers", str(workers)))

    def Check(  # noqa: N802 - the contract names the methods
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        context.send_initial_metadata(self._metadata)
        return super().Check(request, context)


class Server:
    """The gRPC server of a worker."""

    def __init__(
        self,
        config: ServeConfig,
        limit: ConcurrencyLimit,
        telemetry: Telemetry,
        observer: RequestObserver | None = None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """Builds the server, with every service as SERVING; `start` opens its port.

        Args:
            config: The settings.
            limit: Limit of the rankings at once.
            telemetry: Takes the gauges of requests in progress and waiting, and counts refusals.
            observer: Records every request; None: one that writes no access log.
            settle: Called in the thread of a ranking when its answer is on its way, for work that no caller waits for.
        """
        limit_grpc_log()
        self._config = config
        self._reception = reception = Reception(Bounds(), Lane("call", config.max_concurrent), status_of, telemetry)
        lanes = _add_lanes(reception, stream_places(config))
        admission = AdmissionControl(
            limit, config.admission_wait_ms / 1000, config.max_concurrent, enabled=config.admission
        )
        reception.rankings = Rankings(limit, admission, config.default_deadline_ms / 1000, settle)
        interceptors: list[Interceptor] = []
        if secret := config.secret():
            interceptors.append(TokenInterceptor(secret))
        interceptors.append(RequestInterceptor(telemetry, observer or RequestObserver(telemetry), lanes))
        telemetry.gauge("requests_in_flight", lambda: reception.calls.count(Phase.WORKING))
        telemetry.gauge("requests_waiting", lambda: limit.waiting)
        telemetry.gauge("expected_wait_seconds", limit.expected_wait_s)
        options = _options(config, reception.calls.bounds.calls)
        self._grpc = grpc.server(reception, interceptors=interceptors, options=options)
        self._health = _Health(config.worker_count)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        # Here and not in `start`, which comes after the first checks: what they find holds from the first call.
        for name in ("", *_NAMES):
            self.set_serving(name, True)

    def start(self, address: str, services: Services) -> None:
        """Listens on an address."""
        services.add_to(self._grpc)
        if self._config.reflection:
            reflection.enable_server_reflection([*_NAMES, health.SERVICE_NAME, reflection.SERVICE_NAME], self._grpc)
        if self._config.tls_certificate:
            self._grpc.add_secure_port(address, _credentials(self._config))
        else:
            self._grpc.add_insecure_port(address)
        self._reception.sockets = Sockets(
            int(address.rpartition(":")[2]), self._config.max_message_bytes, connection_limits()[0]
        )
        self._grpc.start()

    def set_serving(self, service: str, is_serving: bool) -> None:
        """Sets the health of a service, by its full name; "" is the worker as a whole."""
        status = health_pb2.HealthCheckResponse
        self._health.set(service, status.SERVING if is_serving else status.NOT_SERVING)

    def not_ready(self) -> None:
        """Sets every service to NOT_SERVING for good, but goes on serving."""
        self._health.enter_graceful_shutdown()

    def stop(self, hurry: threading.Event | None = None) -> None:
        """Takes no more calls as NOT_SERVING, and lets those in progress finish unless `hurry` is set meanwhile."""
        self.not_ready()
        ended = self._grpc.stop(self._config.drain_s)
        while not ended.wait(_HURRY_POLL_S):
            if hurry and hurry.is_set():
                self._grpc.stop(0)
        self._reception.shutdown(wait=False, cancel_futures=True)


def stream_places(config: ServeConfig) -> int:
    """Returns the most ingest streams of a worker at once; each holds a thread."""
    return max(1, min(config.max_concurrent, THREADS) // 4)


def _add_lanes(reception: Reception, streams: int) -> dict[str, Lane]:
    """Adds the lanes of methods that are not like most; returns them by the beginning of the methods' paths.

    Args:
        reception: The reception.
        streams: Ingest streams at once; each holds a thread.
    """
    lanes = [
        # Checks run on gRPC's serving thread, so a worker whose threads are all busy still answers them.
        (f"{HEALTH}Check", Lane("health check", _CHECKS), 0),
        (f"{HEALTH}Watch", Lane("watch", _WATCHES, True), 2),
        ("/penchant.v1.EventService/IngestStream", Lane("ingest stream", streams, True, _IDLE_S), streams),
        ("/grpc.reflection.", Lane("reflection", _REFLECTIONS, True, _REFLECTION_S), _REFLECTIONS),
    ]
    for _, lane, threads in lanes:
        reception.pool(lane, threads)
    return {path: lane for path, lane, _ in lanes}


def _options(config: ServeConfig, calls: int) -> list[tuple[str, int]]:
    """Returns the options of gRPC.

    Args:
        config: The settings.
        calls: Most open calls of a connection.
    """
    options = [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        # More than are kept, so that good ones are accepted until the idle ones have ended.
        ("grpc.max_allowed_incoming_connections", connection_limits()[1]),
        ("grpc.max_concurrent_streams", calls),
        # gRPC keeps calls that Python has not taken, in a line for each method, and of too many it cancels some at
        # random, good ones too. So many that 40 connections with all the calls they may have find room.
        ("grpc.server.max_pending_requests", _PENDING),
        ("grpc.server.max_pending_requests_hard_limit", _PENDING + _PENDING // 8),
        # gRPC reads up to 4 MiB at once of each connection that sends much; 40 of them would take 160.
        ("grpc.experimental.tcp_max_read_chunk_size", _READ_BYTES),
        # Nor does it open the windows of connections that send fast: requests are small. A stream sends no more than
        # this before its message is received, of which few are at once.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _AHEAD_BYTES),
        # Headers above this size are refused before they reach Python.
        ("grpc.max_metadata_size", _HEADER_BYTES),
        ("grpc.absolute_max_metadata_size", _HEADER_BYTES),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_CONNECTION_MS),
        *_KEEPALIVE,
    ]
    if config.max_connection_age_s:
        # gRPC sends GOAWAY to old connections, varies the age by 10 % and fails no call by it.
        options += [
            ("grpc.max_connection_age_ms", max(int(1000 * config.max_connection_age_s), 1)),
            ("grpc.max_connection_age_grace_ms", max(int(1000 * config.max_connection_age_grace_s), 1)),
        ]
    return options


def _credentials(config: ServeConfig) -> grpc.ServerCredentials:
    assert config.tls_certificate
    assert config.tls_key
    client_roots = config.tls_client_ca.read_bytes() if config.tls_client_ca else None
    pair = (config.tls_key.read_bytes(), config.tls_certificate.read_bytes())
    return grpc.ssl_server_credentials(
        [pair], root_certificates=client_roots, require_client_auth=client_roots is not None
    )
