"""The open calls of a worker, by connection: bounds what each may hold, and chooses the calls that end beyond a bound.

A call is open from its headers until its answer is read: its message comes, a thread works on it, its answer is read.
In each of these phases it holds memory or a thread of the worker. This file only counts: it knows neither gRPC nor
threads.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from serving.errors import DeadlineExceeded, ResourceExhausted, ServingError, Unavailable

RETRY_AFTER_MS = 100
OVERHEAD = 16 << 10
"""Least bytes that an open call takes, in gRPC and here."""

ROOM_S = 12.0
"""Idle time in seconds after which a stream makes room for another: longer than a stream waits for a full log."""

_MOMENT_S = 0.05
_SINGLE_S = 1.0


class Phase(StrEnum):
    """The state of an open call."""

    SENDING = "sending"
    WORKING = "working"
    READING = "reading"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of open calls.

    Attributes:
        calls: Open calls of a connection.
        receiving: Calls of a worker whose message is being received; each may be of the largest size.
        waiting: Calls of a worker that wait to send their message; each holds as much as the window of its stream.
        message_s: Time from the headers of a call to its whole message, in seconds.
        bytes_in_hand: Size of all messages that are worked on.
        unread: Bytes of answers that a connection has not read; above, its new calls are refused.
        unread_worker: Bytes of answers that all connections of a worker have not read.
        read_s: Time from an answer until it is read, in seconds.
    """

    calls: int = 64
    receiving: int = 8
    waiting: int = 256
    message_s: float = 5.0
    bytes_in_hand: int = 12 << 20
    unread: int = 4 << 20
    unread_worker: int = 32 << 20
    read_s: float = 10.0


@dataclass(eq=False, slots=True)
class Lane:
    """Methods whose calls share a number of places.

    Attributes:
        name: Name in messages and metrics.
        places: Calls that are worked on, or wait for a thread, at once.
        stream: A call may have several messages, and stays open.
        idle_s: Longest time without a message of a stream, in seconds.
        calls: The calls that have a place.
    """

    name: str
    places: int
    stream: bool = False
    idle_s: float = float("inf")
    calls: dict[int, OpenCall] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class PeerConnection:
    """A connection of a client: its open calls, and its behaviour so far.

    Attributes:
        peer: Address and port of the client, as gRPC writes it.
        calls: Its open calls, the oldest first.
        unread: Bytes of answers that it has not read.
        entered: Calls that it has made.
        taken: Bytes of its messages.
        good: Calls whose answer it has read.
        bad: Calls that it abandoned, was too slow for, or that were refused.
        receiving: Calls whose message is being received.
        admission: Number of the last admission of one of its calls to send.
    """

    peer: str
    calls: dict[int, OpenCall] = field(default_factory=dict)
    unread: int = 0
    entered: int = 0
    taken: int = 0
    good: int = 0
    bad: int = 0
    receiving: int = 0
    admission: int = 0


@dataclass(eq=False, slots=True)
class OpenCall:
    """One open call.

    Attributes:
        connection: Its connection.
        lane: Its lane.
        since: Monotonic time of its last progress, in seconds.
        phase: Its state.
        size: Bytes held for it: of its message while it is worked on, of its answer afterwards.
        started: A thread works on it.
        refused: It ended before it had a place.
        closed: The client is gone, or has read all.
        receive: Begins to receive its message.
        end: Ends it with an error that the client gets.
        drop: Ends it and frees all that is held for it, without an error.
        ending: The error that a stream is to end with, at the next look of its thread.
        stuck: Returns True if a part of the answer of a stream waits for its reader.
    """

    connection: PeerConnection
    lane: Lane
    since: float
    phase: Phase = Phase.SENDING
    size: int = 0
    started: bool = False
    refused: bool = False
    closed: bool = False
    ending: ServingError | None = None
    receive: Callable[[], None] = lambda: None
    end: Callable[[ServingError], None] = lambda _: None
    drop: Callable[[], None] = lambda: None
    stuck: Callable[[], bool] = lambda: False

    def let_go(self) -> None:
        """Drops the functions: they hold the call of gRPC, which holds this object, and so long it is open for gRPC."""
        self.receive = self.drop = lambda: None
        self.end, self.stuck = lambda _: None, lambda: False


class OpenCalls:
    """Every open call of a worker; any thread may call anything."""

    def __init__(self, bounds: Bounds, wake: Callable[[], None] = lambda: None) -> None:
        """Begins without calls; `wake` is called when `overdue` has calls to end before its next round."""
        self.bounds, self._wake = bounds, wake
        self.connections: dict[str, PeerConnection] = {}
        self.refused = self.bytes_in_hand = self.unread = 0
        self._phases: dict[Phase, dict[int, OpenCall]] = {phase: {} for phase in Phase if phase is not Phase.GONE}
        # Calls that send: those whose message is being received, and those that wait for that, the oldest first.
        self._receiving: dict[int, OpenCall] = {}
        self._waiting: dict[PeerConnection, dict[int, OpenCall]] = {}
        self._admissions = 0
        self._lock = threading.Lock()

    def count(self, phase: Phase) -> int:
        """Returns the number of calls in a phase."""
        return len(self._phases[phase])

    def enter(self, peer: str, lane: Lane) -> tuple[OpenCall, ServingError | None]:
        """Returns a new call, and the error that it has to end with, if any."""
        with self._lock:
            connection = self.connections.get(peer)
            if connection is None:
                connection = self.connections[peer] = PeerConnection(peer)
            call = OpenCall(connection, lane, time.monotonic())
            connection.entered += 1
            connection.calls[id(call)] = self._phases[Phase.SENDING][id(call)] = call
            error = self._refusal(connection)
        return call, error

    def send(self, call: OpenCall) -> None:
        """Has the message of a new call received, now or when others are complete: connection by connection."""
        with self._lock:
            if call.phase is Phase.SENDING and not call.closed and id(call) not in self._receiving:
                self._waiting.setdefault(call.connection, {})[id(call)] = call
        self._admit()

    def _admit(self) -> None:
        """Begins to receive messages while there is room."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                if len(self._receiving) >= self.bounds.receiving:
                    break
                # The connection that sends least comes first, then the one whose last admission is longest ago.
                connection = min(self._waiting, key=lambda sender: (sender.receiving, sender.admission))
                call = next(iter(self._waiting[connection].values()))
                self._stop_waiting(call)
                self._receiving[id(call)] = call
                self._admissions += 1
                connection.admission, connection.receiving = self._admissions, connection.receiving + 1
                call.since = time.monotonic()
            # Outside the lock: gRPC may have the message already, and pass it on at once.
            call.receive()
        self._wake()

    def _stop_waiting(self, call: OpenCall) -> None:
        calls = self._waiting.get(call.connection)
        if calls and calls.pop(id(call), None) and not calls:
            del self._waiting[call.connection]

    def _refusal(self, connection: PeerConnection) -> ServingError | None:
        if len(connection.calls) > self.bounds.calls:
            advice = f"this connection has {self.bounds.calls} open calls: wait for one to end"
        elif connection.unread > self.bounds.unread:
            advice = f"this connection has not read {connection.unread} bytes of answers: read them"
        else:
            return None
        self.refused += 1
        return ResourceExhausted(f"{advice}, then retry", retry_after_ms=RETRY_AFTER_MS)

    def arrived(self, call: OpenCall, size: int) -> bool:
        """Gives a place to a call whose message is complete; returns False if the call has ended meanwhile.

        Raises:
            ResourceExhausted: There is no place.
        """
        with self._lock:
            if call.phase is not Phase.SENDING or call.closed:
                return False
            lane, evicted = call.lane, None
            # A single message of any allowed size passes, or it could never be taken.
            if self.bytes_in_hand and self.bytes_in_hand + size > self.bounds.bytes_in_hand:
                self.refused += 1
                raise _busy(lane)
            if len(lane.calls) >= lane.places:
                evicted = self._evictable(lane, call)
                if evicted is None:
                    self.refused += 1
                    raise _busy(lane)
                self._leave_lane(evicted)
                # A stream is ended by its own thread; a call without a thread counts as refused at once.
                if not lane.stream:
                    self.refused += 1
                    self._read(evicted, 0)
            self._move(call, Phase.WORKING)
            lane.calls[id(call)] = call
            call.size = size
            call.connection.taken += size
            self.bytes_in_hand += size
        # Ending a call takes gRPC's lock, under which gRPC may call methods of this object.
        if evicted is not None:
            evicted.end(_evicted_error(lane))
        self._admit()
        return True

    def _evictable(self, lane: Lane, newcomer: OpenCall) -> OpenCall | None:
        """Returns the call that loses its place: of a connection with more than its share, or a long idle stream."""
        # A call that a thread works on would end no sooner by losing its place.
        candidates = [call for call in lane.calls.values() if lane.stream or not call.started]
        if not candidates:
            return None
        most, oldest = _greediest(candidates)
        share = sum(call.connection is newcomer.connection for call in lane.calls.values())
        # By two at least: else two connections with as many calls would displace each other's for ever.
        if most > share + 1 or (lane.stream and time.monotonic() - oldest.since > ROOM_S):
            return oldest
        return None

    def start(self, call: OpenCall) -> bool:
        """Notes that a thread works on a call; returns False if the call ended while it waited for one."""
        with self._lock:
            call.started = call.phase is Phase.WORKING
            return call.started

    def took(self, call: OpenCall, size: int) -> None:
        """Notes another message of a stream, or that the stream waits for one."""
        # Without the lock, as a stream calls this for every message; an addition lost in a race does no harm.
        call.since = time.monotonic()
        call.connection.taken += size

    def wrote(self, call: OpenCall, size: int) -> None:
        """Notes that an answer, or a part of it, is on its way to its reader."""
        with self._lock:
            call.since = time.monotonic()
            # A stream keeps its place between its answers; any other call needs none after its only one.
            if call.phase is Phase.WORKING and not call.lane.stream:
                self._leave_lane(call)
                self._read(call, size)
            crowded = self.unread > self.bounds.unread_worker
        if crowded:
            self._wake()

    def done(self, call: OpenCall) -> bool:
        """Notes that no thread works on a call any more; it stays open until it is read. False if that was noted."""
        with self._lock:
            if call.phase not in (Phase.WORKING, Phase.SENDING):
                return False
            self._leave_lane(call)
            self._read(call, 0)
        self._admit()
        return True

    def close(self, call: OpenCall, cancelled: bool = False) -> None:
        """Notes that the client has read all, or has abandoned the call; a thread at work on the call keeps it open."""
        with self._lock:
            call.closed = True
            if cancelled or call.refused:
                call.connection.bad += 1
            else:
                call.connection.good += 1
            if call.phase is Phase.READING:
                self.unread -= call.size
                call.connection.unread -= call.size
            # Its thread still holds memory for it; `done` moves it on.
            if call.phase is not Phase.WORKING:
                self._move(call, Phase.GONE)
        self._admit()

    def _read(self, call: OpenCall, size: int) -> None:
        if call.closed:
            self._move(call, Phase.GONE)
            return
        self._move(call, Phase.READING)
        # Small answers count as well: a client that leaves thousands of them unread holds that many calls open.
        call.size = size + OVERHEAD
        self.unread += call.size
        call.connection.unread += call.size

    def _leave_lane(self, call: OpenCall) -> None:
        if call.lane.calls.pop(id(call), None) is not None:
            self.bytes_in_hand -= call.size
            call.size = 0

    def _move(self, call: OpenCall, phase: Phase) -> None:
        if call.phase is not Phase.GONE:
            self._phases[call.phase].pop(id(call), None)
        if call.phase is Phase.SENDING:
            self._stop_waiting(call)
            if self._receiving.pop(id(call), None):
                call.connection.receiving -= 1
        call.phase, call.since = phase, time.monotonic()
        if phase is Phase.GONE:
            call.connection.calls.pop(id(call), None)
            call.let_go()
        else:
            self._phases[phase][id(call)] = call

    def forget(self, is_closed: Callable[[str], bool]) -> None:
        """Forgets the closed connections that have no call."""
        with self._lock:
            idle = [peer for peer, connection in self.connections.items() if not connection.calls]
            for peer in filter(is_closed, idle):
                del self.connections[peer]

    def overdue(self, now: float) -> list[tuple[OpenCall, ServingError | None]]:
        """Returns the calls that have to end now, each with its error; None for a client that would not read it.

        Args:
            now: Monotonic time, in seconds.
        """
        bounds = self.bounds
        with self._lock:
            # Copies, judged outside the lock: no call has to wait for this search.
            receiving, working = list(self._receiving.values()), list(self._phases[Phase.WORKING].values())
            reading = list(self._phases[Phase.READING].values())
            waiting = [call for calls in self._waiting.values() for call in calls.values()]
            waiters = len(self._waiting)
            sending = Counter(call.connection for call in (*receiving, *waiting))
            surplus = self.unread - bounds.unread_worker
        late = DeadlineExceeded(f"the message did not come within {bounds.message_s:g} s: send it at once")
        crowded = ResourceExhausted("too many calls send no message", retry_after_ms=RETRY_AFTER_MS)
        ends: list[tuple[OpenCall, ServingError | None]] = []
        ends += [(call, late) for call in receiving if now - call.since > bounds.message_s]
        ends += [(call, crowded) for call in waiting if now - call.since > bounds.message_s]
        # Each connection that waits ends one call that holds room for longer than a message on its way needs: first of
        # connections that send several at once, and of one with a single call only after a second.
        slow = [
            call for call in receiving if now - call.since > (_MOMENT_S if sending[call.connection] > 1 else _SINGLE_S)
        ]
        ends += [(call, crowded) for call in _first(slow, waiters)]
        ends += [(call, crowded) for call in _first(waiting, len(waiting) - bounds.waiting)]
        for call in working:
            idle = now - call.since
            if not call.lane.stream:
                continue
            if call.stuck():
                if idle > bounds.read_s:
                    ends.append((call, None))
            elif call.ending or idle > call.lane.idle_s:
                advice = f"no message came for {call.lane.idle_s:g} s: open it again when there is one"
                ends.append((call, call.ending or DeadlineExceeded(advice)))
        ends += [(call, None) for call in reading if now - call.since > bounds.read_s]
        ends += [(call, None) for call in _heaviest(reading, surplus)]
        return ends


def _busy(lane: Lane) -> ServingError:
    if lane.stream:
        return ResourceExhausted(
            f"this worker has {lane.places} calls of {lane.name}: end one, or retry later", retry_after_ms=1000
        )
    return ResourceExhausted("the server is busy: retry later", retry_after_ms=RETRY_AFTER_MS)


def _evicted_error(lane: Lane) -> ServingError:
    if lane.stream:
        return Unavailable(f"this {lane.name} made room for another: open it again", retry_after_ms=1000)
    return ResourceExhausted(
        "the server is busy, with this connection most: retry later", retry_after_ms=RETRY_AFTER_MS
    )


def _greediest(calls: Iterable[OpenCall]) -> tuple[int, OpenCall]:
    """Returns the number of calls of the connection with the most, and its call that is idle for longest."""
    by_connection: dict[PeerConnection, list[OpenCall]] = {}
    for call in calls:
        by_connection.setdefault(call.connection, []).append(call)
    # Of connections with as many calls, the one that has held a call for longest.
    greedy = max(by_connection.values(), key=lambda group: (len(group), -min(call.since for call in group)))
    return len(greedy), min(greedy, key=lambda call: call.since)


def _first(calls: list[OpenCall], surplus: int) -> list[OpenCall]:
    """Returns the calls that end first: of the connections that have the most open, the oldest."""
    order = sorted(calls, key=lambda call: (-len(call.connection.calls), call.since))
    return order[: max(surplus, 0)]


def _heaviest(calls: list[OpenCall], surplus: int) -> list[OpenCall]:
    """Returns unread calls of at least `surplus` bytes together: of the connections that hold most, the oldest."""
    chosen: list[OpenCall] = []
    order = sorted(calls, key=lambda call: (-call.connection.unread, call.since))
    for call in order:
        if surplus <= 0:
            break
        chosen.append(call)
        surplus -= call.size
    return chosen
