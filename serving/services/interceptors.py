"""Interceptors of every call: the token, the request id, the deadline, the metrics and the errors."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError, Message

from serving.errors import DeadlineExceeded, InvalidArgument, ServingError, Unauthenticated
from serving.observability.logs import REQUEST_ID_HEADER, begin_request, request_id_of
from serving.observability.observer import RequestObserver
from serving.observability.telemetry import Telemetry
from serving.services.outcome import rung_of, surface_of
from serving.services.reception.calls import Lane
from serving.services.reception.parts import require_few_parts
from serving.services.status import abort

if TYPE_CHECKING:  # grpc's stubs are generic, its classes are not
    Interceptor = grpc.ServerInterceptor[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any] | None
else:
    Interceptor = grpc.ServerInterceptor
    Handler = Any

Continue = Callable[[grpc.HandlerCallDetails], Handler]
Behavior = Callable[[Any, grpc.ServicerContext], Any]
Observe = Callable[..., None]

HEALTH = "/grpc.health.v1.Health/"
_SENDERS = 8


class TokenInterceptor(Interceptor):
    """Refuses calls without the token; health checks need none."""

    def __init__(self, secret: str) -> None:
        self._expected = f"Bearer {secret}".encode()
        error = Unauthenticated("send the server's token as metadata `authorization: Bearer TOKEN`")
        self._refusal = grpc.unary_unary_rpc_method_handler(_Behavior(None, refusal=error))

    def intercept_service(self, continuation: Continue, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """Returns the handler of a method, or one that refuses every call."""
        if not handler_call_details.method.startswith(HEALTH):
            sent = next(
                (value for key, value in handler_call_details.invocation_metadata if key == "authorization"), ""
            )
            sent = sent if isinstance(sent, bytes) else sent.encode()
            # In constant time, so that a caller cannot guess the token byte by byte.
            if not hmac.compare_digest(sent, self._expected):
                return self._refusal
        return continuation(handler_call_details)


class RequestInterceptor(Interceptor):
    """Parses the request, runs the method, records the result, and answers every exception with a status.

    Rankings are marked as such, as they compute; the other methods mostly wait for a store.
    """

    def __init__(self, telemetry: Telemetry, observer: RequestObserver, lanes: Mapping[str, Lane]) -> None:
        """Begins without methods; each is wrapped at its first call.

        Args:
            telemetry: Counts the parts that slates had to do without.
            observer: Records every request of Penchant's services.
            lanes: The lanes of methods, by the beginning of their path.
        """
        self._telemetry, self._observer, self._lanes = telemetry, observer, lanes
        self._wrapped: dict[str, Handler] = {}
        self._sender = ThreadPoolExecutor(_SENDERS, "sender")

    def intercept_service(self, continuation: Continue, handler_call_details: grpc.HandlerCallDetails) -> Handler:
        """Returns the wrapped handler of a method."""
        path = handler_call_details.method
        wrapped = self._wrapped.get(path)
        if wrapped is not None:
            return wrapped
        handler = continuation(handler_call_details)
        # Unknown paths are not kept: callers choose them, and could fill the memory.
        if handler is None:
            return None
        name, parse = path.rpartition("/")[2], handler.request_deserializer
        assert parse is not None
        observe = self._observer.observe if path.startswith("/penchant.") else _unobserved
        lane = next((lane for prefix, lane in self._lanes.items() if path.startswith(prefix)), None)
        # Without a deserializer the call gets the bytes, and can answer a malformed message with an error of its own.
        if handler.stream_stream is not None:
            stream = _Behavior(self._wrap_stream(name, parse, handler.stream_stream, observe), lane, many=True)
            wrapped = grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
        elif handler.unary_stream is not None:
            watch = _Behavior(self._wrap_watch(parse, handler.unary_stream), lane, returns=False)
            wrapped = grpc.unary_stream_rpc_method_handler(watch, None, handler.response_serializer)
        else:
            assert handler.unary_unary is not None
            behavior = self._wrap_unary(name, parse, handler.unary_unary, observe)
            call = _Behavior(behavior, lane, ranks=name if "RankingService/" in path else "")
            wrapped = grpc.unary_unary_rpc_method_handler(call, None, handler.response_serializer)
        self._wrapped[path] = wrapped
        return wrapped

    def _wrap_unary(self, method: str, parse: Callable[[bytes], Any], behavior: Behavior, observe: Observe) -> Behavior:
        telemetry = self._telemetry

        def call(message: bytes, context: grpc.ServicerContext) -> Message:
            begun, request = time.monotonic(), None
            request_id = _begin(context)
            try:
                # The call may have waited for a thread until its deadline; work on it would be in vain.
                _require_time(context)
                request = _parsed(parse, message)
                response: Message = behavior(request, context)
            except Exception as error:  # noqa: BLE001 - a defect in a method must not end the worker
                code, surface = getattr(error, "code", "INTERNAL"), surface_of(request)
                observe(method, code, time.monotonic() - begun, surface, request_id=request_id)
                raise abort(context, error, request_id) from None
            rung = rung_of(response, telemetry)
            observe(method, "OK", time.monotonic() - begun, surface_of(request), rung, request_id)
            context.set_trailing_metadata(((REQUEST_ID_HEADER, request_id),))
            return response

        return call

    def _wrap_stream(
        self, method: str, parse: Callable[[bytes], Any], behavior: Behavior, observe: Observe
    ) -> Behavior:

        def call(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Message]:
            begun, request_id, code = time.monotonic(), _begin(context), "CANCELLED"
            # At once: a stream that its caller cancels has no other moment for it.
            context.set_trailing_metadata(((REQUEST_ID_HEADER, request_id),))
            try:
                _require_time(context)
                yield from behavior((_parsed(parse, message) for message in messages), context)
                code = "OK"
            except grpc.RpcError:  # the caller is gone, or its time is over: no status reaches it
                return
            except Exception as error:  # noqa: BLE001 - a defect in a method must not end the worker
                code = getattr(error, "code", "INTERNAL")
                raise abort(context, error, request_id) from None
            finally:
                observe(method, code, time.monotonic() - begun, request_id=request_id)

        return call

    def _wrap_watch(self, parse: Callable[[bytes], Any], behavior: Callable[..., Any]) -> Behavior:
        """Wraps a method that sends responses by a callback for as long as its caller stays, and holds no thread."""
        sender = self._sender

        def call(message: bytes, context: grpc.ServicerContext, send: Callable[[Any], None]) -> None:
            try:
                behavior(_parsed(parse, message), context, _LatestSender(send, sender))
            except Exception as error:  # noqa: BLE001 - a defect in a method must not end the worker
                raise abort(context, error) from None

        return call  # type: ignore[return-value]  # as gRPC calls a method that sends by a callback


def _unobserved(*_: Any, **__: Any) -> None:
    """Records nothing of health checks and reflection, which come all the time and cost little."""


def _parsed(parse: Callable[[bytes], Any], message: bytes) -> Any:
    # Before parsing, which is what too many parts would make expensive.
    require_few_parts(message, parse.__self__.DESCRIPTOR)  # type: ignore[attr-defined]  # a message's FromString
    try:
        return parse(message)
    except DecodeError:
        problem = "is not a message of this method, or a string in it is not UTF-8: check the contract"
        raise InvalidArgument("request", problem) from None


def _require_time(context: grpc.ServicerContext) -> None:
    if not context.is_active() or context.time_remaining() <= 0:
        raise DeadlineExceeded("the time was over before the call began: give it more, or send less")


def _begin(context: grpc.ServicerContext) -> str:
    """Returns the id of a request, and adds it to the lines that its thread logs from now on."""
    request_id = request_id_of(context.invocation_metadata())
    begin_request(request_id)
    return request_id


class _LatestSender:
    """Sends the newest response in another thread: the caller holds locks, and the reader may be slow."""

    def __init__(self, send: Callable[[Any], None], threads: ThreadPoolExecutor) -> None:
        self._send, self._threads = send, threads
        self._newest: Any = None
        self._busy, self._lock = False, threading.Lock()

    def __call__(self, response: Any) -> None:
        """Sends a response; None, the end of the call, needs none."""
        if response is None:
            return
        with self._lock:
            # The one that was not sent yet is outdated: a watcher needs the current health only.
            self._newest = response
            if self._busy:
                return
            self._busy = True
        self._threads.submit(self._run)

    def _run(self) -> None:
        while True:
            with self._lock:
                response, self._newest = self._newest, None
                self._busy = response is not None
            if response is None:
                return
            self._send(response)


class _Behavior:
    """The handler of a method, with the attributes that the reception reads."""

    def __init__(
        self,
        behavior: Callable[..., Any] | None,
        lane: Lane | None = None,
        *,
        many: bool = False,
        returns: bool = True,
        ranks: str = "",
        refusal: ServingError | None = None,
    ) -> None:
        """Describes a handler.

        Args:
            behavior: Handles a call; None with a refusal.
            lane: Its lane; None is that of most calls.
            many: It takes several messages.
            returns: The call ends when the handler returns.
            ranks: Name of a method that ranks, "" of one that mostly waits.
            refusal: The error of every call.
        """
        self._behavior, self.many, self.ranks, self.refusal = behavior, many, ranks, refusal
        self.experimental_non_blocking = not returns
        if lane is not None:
            self.lane = lane

    def __call__(self, *arguments: Any) -> Any:
        """Handles a call."""
        assert self._behavior is not None
        return self._behavior(*arguments)
