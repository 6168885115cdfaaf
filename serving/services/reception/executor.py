"""Passes calls from gRPC to threads: first the whole message of a call arrives, and only then it gets a thread.

gRPC's synchronous server gives a call a thread when its headers have come; the thread then waits for the message,
possibly for ever. This executor replaces the server's pool and receives the message first. There is no public way to
do that (see docs/decisions/0012), so this file uses private names of `grpc._server`. No other file does, and a server
does not start if they have changed.
"""

from __future__ import annotations

import inspect
import logging
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import _server as _grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from serving.errors import (
    BatchDeferred,
    ConfigError,
    Overloaded,
    ResourceExhausted,
    ServingError,
    Unauthenticated,
    Unimplemented,
)
from serving.memory import return_free_memory
from serving.observability.outages import Outage
from serving.observability.telemetry import Telemetry
from serving.services.reception.calls import Bounds, Lane, OpenCall, OpenCalls, Phase
from serving.services.reception.rankings import RankingCall, Rankings
from serving.services.reception.sockets import Sockets

THREADS = 32
"""Most threads of the calls that are not rankings: they wait for a store; more of them wait for a thread."""

ROUND_S = 0.1
"""Time between two searches for overdue calls, in seconds."""

_LEAST_ROUND_S = 0.01
LOOK_S = 0.05
"""Time between two looks at the sockets, in seconds: a connection can send a MB in it, and gRPC keeps all of it."""

SUSPICION_S = 0.01
"""Time between two looks while a connection sends much without a call, in seconds."""

_LOOK_SHARE = 10
"""Pause until the next look, in processor times of the last: thousands of connections make it long."""

_CROWD = 64
"""Open calls of a worker above which a thread gives the interpreter to the next one sooner."""

_SHORT_SWITCH_S = 0.0005
_TRIM_S = 1.0
"""Least time between two returns of free memory to the system, in seconds."""

_LONGEST_TRIM_S = 10.0
"""Most time between two returns, if they return nothing, in seconds; one that returns nothing takes 4 ms."""

_GROWN = 16 << 20
"""Growth of the process in bytes after which such a return is worth its time."""

_core: Any = cygrpc  # its stubs lack most of it
_log = logging.getLogger(__name__)
Statused = Callable[[ServingError], tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]]
_SENDS = frozenset({_grpc._SEND_MESSAGE_TOKEN, _grpc._SEND_INITIAL_METADATA_AND_SEND_MESSAGE_TOKEN})
_USED = {
    "_handle_unary_unary": ["rpc_event", "state", "method_handler", "default_thread_pool"],
    "_handle_stream_stream": ["rpc_event", "state", "method_handler", "default_thread_pool"],
    "_unary_response_in_pool": [
        "rpc_event", "state", "behavior", "argument_thunk", "request_deserializer", "response_serializer",
    ],
    "_stream_response_in_pool": [
        "rpc_event", "state", "behavior", "argument_thunk", "request_deserializer", "response_serializer",
    ],
    "_receive_message": ["state", "call", "request_deserializer"],
    "_abort": ["state", "call", "code", "details"],
    "_is_rpc_state_active": ["state"],
}  # fmt: skip


def _require_known_grpc() -> None:
    """Refuses a gRPC whose private functions have other parameters than this file gives.

    Raises:
        ConfigError: They have changed.
    """
    for name, parameters in _USED.items():
        actual = list(inspect.signature(getattr(_grpc, name, lambda: None)).parameters)
        if actual != parameters:
            raise ConfigError(
                f"grpcio {grpc.__version__}: grpc._server.{name} is not as Penchant needs it; "
                "install the grpcio of constraints.txt"
            )


class _Trimmer:
    """Returns free memory to the system after an attack, which leaves much of it in pieces."""

    def __init__(self) -> None:
        self._least, self._next, self._pause = 0, 0.0, _TRIM_S

    def look(self, now: float) -> None:
        """Trims if the process has grown; less and less often while that returns nothing.

        Args:
            now: Monotonic time, in seconds.
        """
        if now < self._next:
            return
        before = _resident()
        if self._least and before - self._least <= _GROWN:
            self._next = now + _TRIM_S
            return
        return_free_memory()
        after = _resident()
        self._least = min(self._least or after, after)
        self._pause = _TRIM_S if before - after > _GROWN else min(2 * self._pause, _LONGEST_TRIM_S)
        self._next = now + self._pause


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class _Done(Future[Any]):
    """The future that gRPC gets for a call; it only adds a callback for the end, which this calls at once."""

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        fn(self)


_NO_MESSAGE = Unimplemented("this method needs a message: send exactly one")
_REASONS: Mapping[type[ServingError], str] = {
    ResourceExhausted: "busy",
    Overloaded: "overload",
    BatchDeferred: "batch",
    Unauthenticated: "token",
}
"""Reasons by which refused calls are counted; any other error is about a message that is missing or late."""

_WAKE = object()
"""Stands for a message, to wake the thread of a stream that waits for one."""


@dataclass(frozen=True, slots=True)
class _Rpc:
    """A call: the objects of gRPC, and its entry in the books; of a ranking, when it is to be computed."""

    event: Any
    state: Any
    call: OpenCall
    ranking: RankingCall | None = None


class Reception(ThreadPoolExecutor):
    """Takes the calls of a server: bounds them, receives their messages, and gives them threads."""

    def __init__(self, bounds: Bounds, work: Lane, statused: Statused, telemetry: Telemetry) -> None:
        """Begins without calls.

        Args:
            bounds: The bounds of open calls.
            work: The lane of calls whose method has no lane of its own.
            statused: Returns the gRPC status of an error.
            telemetry: Counts the refusals.

        Raises:
            ConfigError: gRPC has another interface than this class needs.
        """
        _require_known_grpc()
        super().__init__(min(work.places, THREADS), thread_name_prefix="call")
        self._over = _Done()
        self._over.set_result(None)
        self._work, self._telemetry, self._status = work, telemetry, statused
        self._urgent, self._ending = threading.Event(), False
        self.sockets: Sockets | None = None
        self.hung_up = 0
        self._pools: dict[Lane, ThreadPoolExecutor | None] = {}
        self.rankings: Rankings | None = None
        self.calls = OpenCalls(bounds, self._urgent.set)
        self._reaper = threading.Thread(target=self._reap, name="reaper", daemon=True)
        self._reaper.start()

    def pool(self, lane: Lane, threads: int) -> None:
        """Gives a lane threads of its own; without any, its calls run on gRPC's serving thread, and may never wait."""
        self._pools[lane] = ThreadPoolExecutor(threads, thread_name_prefix=lane.name) if threads else None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        """Takes a call from gRPC, whose serving thread calls this when the headers have come."""
        job, event, state, behavior, argument, _, serializer = args
        lane: Lane = getattr(behavior, "lane", self._work)
        call, error = self.calls.enter(event.call.peer().decode(), lane)
        kind = getattr(behavior, "ranks", "")
        ranking = self.rankings.ranking(event, kind, call.connection) if kind and self.rankings else None
        rpc = _Rpc(event, state, call, ranking)
        # A method that answers by a callback returns at once, so its call ends when the client closes it, not here.
        returns = not getattr(behavior, "experimental_non_blocking", False)
        state.callbacks.append(lambda: self._close(rpc, returns))
        call.end = lambda error: self._end(rpc, error)
        call.drop = event.call.cancel
        # gRPC keeps an operation in `due` until the peer has taken its bytes.
        call.stuck = lambda: not _SENDS.isdisjoint(state.due)
        # By the headers alone: under overload most calls end here, before their message is received.
        error = getattr(behavior, "refusal", None) or error or (ranking.refusal() if ranking else None)
        if error is not None:
            self._refuse(rpc, error)
            return self._over
        many = getattr(behavior, "many", False)

        def run(request: bytes | None) -> None:
            # The call may have ended while it waited for a thread; its work would be for no reader.
            if not self.calls.start(call):
                return
            try:
                # Without a deserializer: the interceptors parse the bytes, so that they can answer a malformed message.
                message = (lambda: self._messages(call, request, argument())) if many else (lambda: request)
                fn(job, event, state, behavior, message, None, lambda answer: self._written(call, serializer, answer))
            finally:
                if returns:
                    self.calls.done(call)
            if ranking:
                ranking.settle()

        self._receive(rpc, run, many)
        return self._over

    def _receive(self, rpc: _Rpc, run: Callable[[bytes | None], None], many: bool) -> None:
        """Receives the first message of a call as soon as there is room for it, and passes it to `run`."""
        state = rpc.state
        # gRPC's own handler of a message, around which `whole` is put; it must run first, as it changes the state.
        received = _grpc._receive_message(state, rpc.event.call, None)

        def whole(message_event: Any) -> Any:
            """Continues on gRPC's serving thread when the message has come, or will not come."""
            result = received(message_event)
            with state.condition:
                # Taken out of the state, where a stream's thread would find it a second time.
                request, state.request = state.request, None
                active = _grpc._is_rpc_state_active(state)
            if not active:
                return result
            # A client may close its side without a message; for a stream that is an empty one.
            if request is None and not many:
                self._end(rpc, _NO_MESSAGE)
            else:
                self._begin(rpc, request, run)
            return result

        def receive() -> None:
            with state.condition:
                if _grpc._is_rpc_state_active(state):
                    rpc.event.call.start_server_batch((_core.ReceiveMessageOperation(0),), whole)
                    state.due.add(_grpc._RECEIVE_MESSAGE_TOKEN)

        rpc.call.receive = receive
        self.calls.send(rpc.call)

    def _begin(self, rpc: _Rpc, request: bytes | None, run: Callable[[bytes | None], None]) -> None:
        # Again, as many calls may have been taken while this one's message came.
        if rpc.ranking and (overload := rpc.ranking.refusal()):
            self._refuse(rpc, overload)
            return
        try:
            if not self.calls.arrived(rpc.call, len(request or b"")):
                return
        except ServingError as error:
            self._refuse(rpc, error)
            return
        if rpc.ranking:
            rpc.ranking.submit(lambda: run(request))
        elif rpc.call.lane not in self._pools:
            super().submit(run, request)
        elif pool := self._pools[rpc.call.lane]:
            pool.submit(run, request)
        else:
            run(request)

    def _messages(self, call: OpenCall, first: bytes | None, following: Iterator[Any]) -> Iterator[bytes]:
        """Yields the messages of a stream.

        Raises:
            ServingError: The stream has to end.
        """
        if first is not None:
            yield first
        while first is not None:
            self.calls.took(call, 0)
            # Looked at before each wait: the reaper cannot raise in this thread, only wake it.
            if call.ending:
                raise call.ending
            try:
                message = next(following)
            except StopIteration:
                return
            if message is _WAKE:
                continue
            self.calls.took(call, len(message))
            yield message

    def _written(self, call: OpenCall, serializer: Callable[[Any], bytes] | None, answer: Any) -> bytes:
        data: bytes = serializer(answer) if serializer else answer
        self.calls.wrote(call, len(data))
        return data

    def _close(self, rpc: _Rpc, returns: bool) -> None:
        self.calls.close(rpc.call, rpc.state.client is _grpc._CANCELLED)
        # No thread would tell that the work on such a call has ended.
        if not returns:
            self.calls.done(rpc.call)

    def _refuse(self, rpc: _Rpc, error: ServingError) -> None:
        rpc.call.refused = True
        if self.calls.done(rpc.call):
            self._telemetry.count(("requests_refused", _REASONS.get(type(error), "message")))
            self._send_error(rpc, error)

    def _end(self, rpc: _Rpc, error: ServingError) -> None:
        """Ends a call: one without a thread at once, a stream at the next look of its thread."""
        if rpc.call.phase is Phase.SENDING:
            self._refuse(rpc, error)
        elif rpc.call.phase is Phase.READING:  # it lost its place
            self._send_error(rpc, error)
        elif rpc.call.phase is Phase.WORKING:
            rpc.call.ending = error
            state = rpc.state
            with state.condition:
                if _grpc._RECEIVE_MESSAGE_TOKEN in state.due and state.request is None:
                    state.request = _WAKE
                    state.condition.notify_all()

    def _send_error(self, rpc: _Rpc, error: ServingError) -> None:
        state = rpc.state
        code, details, metadata = self._status(error)
        with state.condition:
            if _grpc._is_rpc_state_active(state):
                state.code, state.details, state.trailing_metadata = code, details.encode(), metadata
                _grpc._abort(state, rpc.event.call, _core.StatusCode.unknown, b"")

    def _reap(self) -> None:
        """Ends overdue calls until the shutdown; goes on after an error, as when no descriptor is left for a moment."""
        trimmer, outage = _Trimmer(), Outage(_log, "overdue calls are not ended")
        while not self._ending:
            try:
                self._rounds(trimmer)
            except Exception as error:  # noqa: BLE001 - without this thread a caller could hold all places for ever
                outage.failed(repr(error), trace=error)

    def _rounds(self, trimmer: _Trimmer) -> None:
        looked, pause, usual_s = time.monotonic(), LOOK_S, sys.getswitchinterval()
        while not self._ending:
            if self._urgent.wait(min(ROUND_S, pause)):
                self._urgent.clear()
                # A flood of calls wakes this loop all the time; it must not take a core of its own.
                time.sleep(_LEAST_ROUND_S)
            for call, error in self.calls.overdue(time.monotonic()):
                # A client that does not read would not read an error either, and the error would be held for it.
                if error is None:
                    call.drop()
                else:
                    call.end(error)
            # gRPC's serving thread waits for the interpreter twice for each call that it takes, up to an interval each
            # time; where calls stand in line before it, that would be seconds.
            sys.setswitchinterval(_SHORT_SWITCH_S if self._crowd() > _CROWD else usual_s)
            now = time.monotonic()
            if self.sockets and now - looked >= pause:
                pause = self._look(self.sockets, now - looked)
                looked = now
            trimmer.look(now)

    def _crowd(self) -> int:
        """Returns the number of open calls, without streams, which wait most of the time."""
        streams = sum(len(lane.calls) for lane in self._pools if lane.stream)
        return sum(map(self.calls.count, (Phase.SENDING, Phase.WORKING, Phase.READING))) - streams

    def _look(self, sockets: Sockets, seconds: float) -> float:
        """Closes abusive connections, and forgets those that are closed.

        Returns:
            The time until the next look, in seconds: short while a connection sends much without a call.
        """
        # Of the processor, not of the clock: an attack that keeps this thread waiting must not make it look seldom.
        begun_at = time.thread_time()
        abusive = sockets.abusive(self.calls.connections.copy(), seconds)
        sockets.hang_up(abusive)
        self.hung_up += len(abusive)
        self.calls.forget(lambda peer: not sockets.known(peer))
        return max(SUSPICION_S if sockets.suspicious else LOOK_S, _LOOK_SHARE * (time.thread_time() - begun_at))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads of every lane."""
        self._ending = True
        self._urgent.set()
        for pool in self._pools.values():
            if pool:
                pool.shutdown(wait, cancel_futures=cancel_futures)
        if self.rankings:
            self.rankings.limit.shutdown()
        super().shutdown(wait, cancel_futures=cancel_futures)
