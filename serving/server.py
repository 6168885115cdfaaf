"""The gRPC server: limits, token, deadlines, errors, health, reflection, graceful stop.

A synchronous server with a small pool of threads: measured, it costs less CPU a call than the asynchronous ones.
Everything a call can fail with becomes a status in `_refuse`, and nowhere else.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
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
from serving.config import ServeConfig
from serving.errors import DeadlineExceeded, InvalidArgument, ServingError, Unauthenticated
from serving.logs import REQUEST_ID_HEADER, begin_request, request_id_of
from serving.observer import RequestObserver
from serving.reception.calls import Bounds, Lane, Phase
from serving.reception.executor import Reception
from serving.reception.parts import require_few_parts
from serving.reception.quiet import hush
from serving.reception.sockets import Sockets, connection_limits
from serving.services.outcome import rung_of, surface_of
from serving.telemetry import Telemetry
from serving.turns import Turns

log = logging.getLogger(__name__)

if TYPE_CHECKING:  # grpc's stubs are generic, its classes are not
    Interceptor = grpc.ServerInterceptor[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any] | None
else:
    Interceptor = grpc.ServerInterceptor
    Handler = Any

Continue = Callable[[grpc.HandlerCallDetails], Handler]
Behavior = Callable[[Any, grpc.ServicerContext], Any]
Observe = Callable[..., None]

_HEALTH = f"/{health.SERVICE_NAME}/"
_HURRY_POLL_S = 0.05
_CHECKS, _WATCHES, _REFLECTIONS, _SENDERS = 1024, 256, 4, 8
_IDLE_S, _REFLECTION_S = 60.0, 10.0
_READ_BYTES = 64 << 10
_AHEAD_BYTES = 16 << 10
_HEADER_BYTES = 8 << 10
_HANDSHAKE_MS = 10_000
_IDLE_CONNECTION_MS = 300_000
"""Time after which a connection without a call is ended; clients open it again when they have one."""

_DETAILS_KEY = "grpc-status-details-bin"


class _Token(Interceptor):
    """Lets only calls pass that carry the token; health checks need none."""

    def __init__(self, secret: str) -> None:
        self._expected = f"Bearer {secret}".encode()
        error = Unauthenticated("send the server's token as metadata `authorization: Bearer TOKEN`")
        self._refusal = grpc.unary_unary_rpc_method_handler(_Behavior(None, refusal=error))

    def intercept_service(self, continuation: Continue, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        if not handler_call_details.method.startswith(_HEALTH):
            sent = next(
                (value for key, value in handler_call_details.invocation_metadata if key == "authorization"), ""
            )
            sent = sent if isinstance(sent, bytes) else sent.encode()
            if not hmac.compare_digest(sent, self._expected):
                return self._refusal
        return continuation(handler_call_details)


class _Guard(Interceptor):
    """Reads the request, runs the method, and turns whatever is raised into a status.

    Rankings, which are work, take turns; the others mostly wait for something, and only for that.
    """

    def __init__(self, turns: Turns, telemetry: Telemetry, observer: RequestObserver, lanes: dict[str, Lane]) -> None:
        """Takes the lanes of methods, by the beginning of their path."""
        self._turns, self._telemetry, self._observer, self._lanes = turns, telemetry, observer, lanes
        self._guarded: dict[str, Handler] = {}
        self._sender = ThreadPoolExecutor(_SENDERS, "sender")

    def intercept_service(self, continuation: Continue, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        path = handler_call_details.method
        known = self._guarded.get(path)
        if known is not None:
            return known
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        name, parse = path.rpartition("/")[2], handler.request_deserializer
        assert parse is not None
        observe = self._observer.observe if path.startswith("/penchant.") else _unobserved
        lane = next((lane for prefix, lane in self._lanes.items() if path.startswith(prefix)), None)
        # Without a deserializer the call gets the bytes, and so a say in what a malformed message is answered with.
        guarded: Handler
        if handler.stream_stream is not None:
            stream = _Behavior(self._guard_stream(name, parse, handler.stream_stream, observe), lane, many=True)
            guarded = grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        elif handler.unary_stream is not None:
            watch = _Behavior(self._guard_watch(parse, handler.unary_stream), lane, returns=False)
            guarded = grpc.unary_stream_rpc_method_handler(watch, None, handler.response_serializer)
        else:
            assert handler.unary_unary is not None
            behavior = handler.unary_unary
            if "RankingService/" in path:
                behavior = self._in_turn(behavior)
            call = _Behavior(self._guard(name, parse, behavior, observe), lane)
            guarded = grpc.unary_unary_rpc_method_handler(call, None, handler.response_serializer)
        self._guarded[path] = guarded
        return guarded

    def _guard(self, method: str, parse: Callable[[bytes], Any], behavior: Behavior, observe: Observe) -> Behavior:
        telemetry = self._telemetry

        def call(message: bytes, context: grpc.ServicerContext) -> Message:
            begun, request = time.monotonic(), None
            request_id = _begin(context)
            try:
                _require_time(context)
                request = _parsed(parse, message)
                answer: Message = behavior(request, context)
            except Exception as error:  # noqa: BLE001 - a defect in a method must not end the worker
                code, surface = getattr(error, "code", "INTERNAL"), surface_of(request)
                observe(method, code, time.monotonic() - begun, surface, request_id=request_id)
                raise _refuse(context, error, request_id) from None
            rung = rung_of(answer, telemetry)
            observe(method, "OK", time.monotonic() - begun, surface_of(request), rung, request_id)
            context.set_trailing_metadata(((REQUEST_ID_HEADER, request_id),))
            return answer

        return call

    def _guard_stream(
        self, method: str, parse: Callable[[bytes], Any], behavior: Behavior, observe: Observe
    ) -> Behavior:

        def call(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Message]:
            begun, request_id, code = time.monotonic(), _begin(context), "CANCELLED"
            context.set_trailing_metadata(((REQUEST_ID_HEADER, request_id),))
            try:
                _require_time(context)
                yield from behavior((_parsed(parse, message) for message in messages), context)
                code = "OK"
            except grpc.RpcError:  # the caller is gone, or its time is over: there is nobody to tell
                return
            except Exception as error:  # noqa: BLE001 - a defect in a method must not end the worker
                code = getattr(error, "code", "INTERNAL")
                raise _refuse(context, error, request_id) from None
            finally:
                observe(method, code, time.monotonic() - begun, request_id=request_id)

        return call

    def _guard_watch(self, parse: Callable[[bytes], Any], behavior: Callable[..., Any]) -> Behavior:
        """Guards a method that answers by a callback, for as long as its caller stays, and holds no thread."""
        sender = self._sender

        def call(message: bytes, context: grpc.ServicerContext, send: Callable[[Any], None]) -> None:
            try:
                behavior(_parsed(parse, message), context, _Posted(send, sender))
            except Exception as error:  # noqa: BLE001 - a defect in a method must not end the worker
                raise _refuse(context, error) from None

        return call  # type: ignore[return-value]  # as gRPC calls what answers by a callback

    def _in_turn(self, behavior: Behavior) -> Behavior:
        def take_turn(request: Message, context: grpc.ServicerContext) -> Message:
            with self._turns:
                _require_time(context)
                answer: Message = behavior(request, context)
                return answer

        return take_turn


def _unobserved(*_: Any, **__: Any) -> None:
    """Takes no note of health checks and reflection: they are asked all the time, and are no work."""


def _parsed(parse: Callable[[bytes], Any], message: bytes) -> Any:
    require_few_parts(message, parse.__self__.DESCRIPTOR)  # type: ignore[attr-defined]  # a message's FromString
    try:
        return parse(message)
    except DecodeError:
        why = "is not a message of this method, or a string in it is not UTF-8: check the contract"
        raise InvalidArgument("request", why) from None


def _require_time(context: grpc.ServicerContext) -> None:
    if not context.is_active() or context.time_remaining() <= 0:
        raise DeadlineExceeded("the time was over before the call began: give it more, or send less")


def _begin(context: grpc.ServicerContext) -> str:
    """Returns the id of a request, which the lines that its thread logs bear from now on."""
    request_id = request_id_of(context.invocation_metadata())
    begin_request(request_id)
    return request_id


def _refuse(context: grpc.ServicerContext, error: Exception, request_id: str = "") -> Exception:
    """Ends a call with the status of an error, its details and, where a retry makes sense, when; what to raise."""
    if not isinstance(error, ServingError):
        mark = uuid.uuid4().hex[:12]
        log.error("unexpected error %s", mark, exc_info=error)
        error = ServingError(f"unexpected error {mark}: please report it with the server's log")
    code, details, metadata = _status(error, request_id)
    context.set_trailing_metadata(metadata)
    try:
        context.abort(code, details)
    except Exception as aborted:  # noqa: BLE001 - what abort raises has no class of its own
        return aborted
    raise AssertionError("abort returns never")


def _status(
    error: ServingError, request_id: str = ""
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]:
    """Returns the code, the details and the trailing metadata that tell a caller of an error."""
    code = getattr(grpc.StatusCode, error.code)
    status = status_pb2.Status(code=code.value[0], message=str(error))
    metadata: list[tuple[str, str | bytes]] = [(REQUEST_ID_HEADER, request_id)] if request_id else []
    if error.field:
        description = str(error).removeprefix(f"{error.field}: ")
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=description)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_ms:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        metadata.append(("grpc-retry-pushback-ms", str(error.retry_after_ms)))
    if status.details:
        metadata.append((_DETAILS_KEY, status.SerializeToString()))
    return code, str(error), tuple(metadata)


class _Posted:
    """Sends answers by a thread of its own, the newest only: the caller of it holds locks, and a reader may be slow."""

    def __init__(self, send: Callable[[Any], None], threads: ThreadPoolExecutor) -> None:
        self._send, self._threads = send, threads
        self._newest: Any = None
        self._busy, self._lock = False, threading.Lock()

    def __call__(self, answer: Any) -> None:
        """Takes an answer; None, that the call is over, needs none."""
        if answer is None:
            return
        with self._lock:
            self._newest = answer
            if self._busy:
                return
            self._busy = True
        self._threads.submit(self._run)

    def _run(self) -> None:
        while True:
            with self._lock:
                answer, self._newest = self._newest, None
                self._busy = answer is not None
            if answer is None:
                return
            self._send(answer)


class _Behavior:
    """What handles the calls of a method, and what the reception has to know of it."""

    def __init__(
        self,
        behavior: Callable[..., Any] | None,
        lane: Lane | None = None,
        *,
        many: bool = False,
        returns: bool = True,
        refusal: ServingError | None = None,
    ) -> None:
        """Takes what runs and its lane; whether it takes many messages, whether it ends when it returns.

        A refusal takes the place of what runs.
        """
        self._behavior, self.many, self.refusal = behavior, many, refusal
        self.experimental_non_blocking = not returns
        if lane is not None:
            self.lane = lane

    def __call__(self, *arguments: Any) -> Any:
        """Handles a call."""
        assert self._behavior is not None
        return self._behavior(*arguments)


@dataclass(frozen=True, slots=True)
class Services:
    """What one server offers."""

    ranking: ranking_pb2_grpc.RankingServiceServicer
    events: event_pb2_grpc.EventServiceServicer
    profiles: profile_pb2_grpc.ProfileServiceServicer
    catalog: catalog_pb2_grpc.CatalogServiceServicer

    def add_to(self, server: grpc.Server) -> list[str]:
        """Registers all of them; their names."""
        ranking_pb2_grpc.add_RankingServiceServicer_to_server(self.ranking, server)
        event_pb2_grpc.add_EventServiceServicer_to_server(self.events, server)
        profile_pb2_grpc.add_ProfileServiceServicer_to_server(self.profiles, server)
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server(self.catalog, server)
        files = (ranking_pb2, event_pb2, profile_pb2, catalog_pb2)
        return [service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values()]


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
    """One worker's gRPC server."""

    def __init__(
        self, config: ServeConfig, turns: Turns, telemetry: Telemetry, observer: RequestObserver | None = None
    ) -> None:
        hush()
        self._config = config
        work = Lane("call", config.max_concurrent)
        self._reception = reception = Reception(Bounds(), work, _status, telemetry)
        lanes = {f"{_HEALTH}Check": Lane("health check", _CHECKS), f"{_HEALTH}Watch": Lane("watch", _WATCHES, True)}
        lanes["/penchant.v1.EventService/IngestStream"] = Lane(
            "ingest stream", max(1, config.max_concurrent // 4), True, _IDLE_S
        )
        lanes["/grpc.reflection."] = Lane("reflection", _REFLECTIONS, True, _REFLECTION_S)
        for lane, threads in zip(lanes.values(), (0, 2, max(1, config.max_concurrent // 4), _REFLECTIONS), strict=True):
            self._reception.pool(lane, threads)
        interceptors: list[Interceptor] = []
        if secret := config.secret():
            interceptors.append(_Token(secret))
        interceptors.append(_Guard(turns, telemetry, observer or RequestObserver(telemetry), lanes))
        telemetry.gauge("requests_in_flight", lambda: reception.calls.count(Phase.WORKING))
        telemetry.gauge("requests_waiting", lambda: turns.waiting)
        self._grpc = grpc.server(
            self._reception,
            interceptors=interceptors,
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                # More than are kept, so that good ones are taken until the idle ones have ended.
                ("grpc.max_allowed_incoming_connections", connection_limits()[1]),
                ("grpc.max_concurrent_streams", self._reception.calls.bounds.calls),
                # gRPC reads up to 4 MiB at once of each connection that sends much; 40 of them would take 160.
                ("grpc.experimental.tcp_max_read_chunk_size", _READ_BYTES),
                # Nor does it open the windows of connections that send fast: requests are small. A stream sends no more
                # than this before its message is received, of which few are at once.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", _AHEAD_BYTES),
                # Headers above this size are refused before they reach Python.
                ("grpc.max_metadata_size", _HEADER_BYTES),
                ("grpc.absolute_max_metadata_size", _HEADER_BYTES),
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
                ("grpc.max_connection_idle_ms", _IDLE_CONNECTION_MS),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                # Clients ping to keep a way through NAT open, also between calls; gRPC's own limit of a ping in five
                # minutes would end their connections. A flood of them ends as others do: to refuse each one takes
                # gRPC longer than to answer it.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_ping_strikes", 0),
                *_age_options(config),
            ],
        )
        self._health = _Health(config.worker_count)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)

    def start(self, address: str, services: Services) -> None:
        """Listens on an address and says SERVING for every service."""
        names = services.add_to(self._grpc)
        if self._config.reflection:
            reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._grpc)
        if self._config.tls_certificate:
            self._grpc.add_secure_port(address, _credentials(self._config))
        else:
            self._grpc.add_insecure_port(address)
        self._reception.sockets = Sockets(
            int(address.rpartition(":")[2]), self._config.max_message_bytes, connection_limits()[0]
        )
        self._grpc.start()
        for name in ("", *names):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def say(self, service: str, serving: bool) -> None:
        """Sets the health of a service, by its full name; "" is that of the worker as a whole."""
        status = health_pb2.HealthCheckResponse
        self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    def not_ready(self) -> None:
        """Says NOT_SERVING for good, for every service, and serves on."""
        self._health.enter_graceful_shutdown()

    def stop(self, hurry: threading.Event | None = None) -> None:
        """Says NOT_SERVING, takes no more calls, and lets those in hand finish, unless `hurry` is set meanwhile."""
        self.not_ready()
        ended = self._grpc.stop(self._config.drain_s)
        while not ended.wait(_HURRY_POLL_S):
            if hurry and hurry.is_set():
                self._grpc.stop(0)
        self._reception.shutdown(wait=False, cancel_futures=True)


def _age_options(config: ServeConfig) -> list[tuple[str, int]]:
    """Ends connections gently after some time: gRPC sends GOAWAY, varies the age by 10 % and fails no call by it."""
    if not config.max_connection_age_s:
        return []
    return [
        ("grpc.max_connection_age_ms", max(int(1000 * config.max_connection_age_s), 1)),
        ("grpc.max_connection_age_grace_ms", max(int(1000 * config.max_connection_age_grace_s), 1)),
    ]


def _credentials(config: ServeConfig) -> grpc.ServerCredentials:
    assert config.tls_certificate
    assert config.tls_key
    authority = config.tls_client_ca.read_bytes() if config.tls_client_ca else None
    pair = (config.tls_key.read_bytes(), config.tls_certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], root_certificates=authority, require_client_auth=authority is not None)
