"""A limit of the rankings that a worker computes at once, so that few finish early instead of many finishing late.

The limit has the threads that compute: one that is done with a ranking takes the next that waits, without a hand-over
from thread to thread. So rankings wait as entries of a queue and not as threads, and how long a new one would wait is
known before it is taken.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

_log = logging.getLogger(__name__)
_NEWEST_SHARE = 1 / 16
"""Weight of the newest duration in the average of a kind of work."""

_LEAST = 16
"""Durations that an average is known from: the first ones of a process take longer."""

_MOST_TIMES = 4
"""Most times its average that one duration counts for, so that a stall of the machine passes for no slower work."""


@dataclass(frozen=True, slots=True)
class _Work:
    """Work that has no thread yet: the work, its kind, its queue, how long it is expected to take in seconds, whose."""

    run: Callable[[], None]
    kind: str
    batch: bool
    seconds: float
    caller: object


class _FairQueue:
    """Work that waits: that of a caller in its order, and one of each caller at a time: none waits for all of another.

    Attributes:
        seconds: Time that all of it is expected to take.
    """

    def __init__(self) -> None:
        # The first line is the one that is served next.
        self._lines: dict[object, deque[_Work]] = {}
        self._count, self.seconds = 0, 0.0

    def __len__(self) -> int:
        return self._count

    def add(self, work: _Work) -> None:
        """Adds work behind all other of its caller."""
        self._lines.setdefault(work.caller, deque()).append(work)
        self._count += 1
        self.seconds += work.seconds

    def take(self) -> _Work:
        """Takes the next work out; there must be some."""
        caller = next(iter(self._lines))
        line = self._lines.pop(caller)
        work = line.popleft()
        if line:
            self._lines[caller] = line
        self._count -= 1
        # The sum is made new with an empty queue, so that no rounding adds up.
        self.seconds = self.seconds - work.seconds if self._count else 0.0
        return work

    def seconds_before(self, caller: object) -> float:
        """Returns how long the work takes that comes before new work of a caller, by the average of all that waits."""
        lines = list(self._lines.values())  # a copy, as other threads go on
        turns = len(self._lines.get(caller, ())) + 1
        before = sum(min(len(line), turns) for line in lines)
        return self.seconds * before / max(self._count, before, 1)

    def clear(self) -> None:
        """Drops all of it."""
        self._lines.clear()
        self._count, self.seconds = 0, 0.0


@dataclass(slots=True)
class _Average:
    """The average duration of a kind of work: of all at first, then more and more of the newest."""

    seconds: float = 0.0
    count: int = 0

    def add(self, seconds: float) -> None:
        """Takes a duration in."""
        if self.count:
            seconds = min(seconds, _MOST_TIMES * self.seconds)
        self.count += 1
        self.seconds += (seconds - self.seconds) * max(_NEWEST_SHARE, 1 / self.count)


class _Seat:
    """The place where a thread waits for work, or for its slot."""

    __slots__ = ("wake", "work")

    def __init__(self, work: _Work | None = None) -> None:
        self.work = work
        # A bare lock and no condition: a thread is woken several hundred times a second.
        self.wake = threading.Lock()
        self.wake.acquire()


class _SlotState(threading.local):
    """The state of a thread.

    Attributes:
        holds: It holds a slot: a stage that waits does not know if its caller took one.
        waited_s: Time that its work has spent without a slot, in seconds.
    """

    holds = False
    waited_s = 0.0


class ConcurrencyLimit:
    """A few slots that calls take one after the other; a call that waits for something releases its slot meanwhile.

    Work that is submitted runs in threads of the limit; a `with` block waits for a slot in its own thread.

    Attributes:
        count: Number of slots.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = threading.Lock()
        self._free, self._ended = count, False
        self._returning: deque[_Seat] = deque()
        self._first, self._batch = _FairQueue(), _FairQueue()
        # The thread that waited last is woken first: its memory is in the cache, and few threads serve a calm worker.
        self._parked: list[_Seat] = []
        self._averages: dict[str, _Average] = {}
        self._seconds: dict[str, float] = {}
        self._eased_at = time.monotonic()
        self._thread = _SlotState()

    @property
    def waiting(self) -> int:
        """Number of calls that wait for a slot now."""
        return len(self._returning) + len(self._first) + len(self._batch)

    @property
    def waiting_batch(self) -> int:
        """Number of calls among them that give way to all others."""
        return len(self._batch)

    def expected_s(self, kind: str) -> float:
        """Returns how long work of a kind takes, in seconds: a moving average; 0 before there was any."""
        return self._seconds.get(kind, 0.0)

    def expected_wait_s(self, caller: object = None, *, batch: bool = False) -> float:
        """Returns how long new work of a caller would wait for a slot, in seconds, by the average of what waits."""
        if self._free:
            return 0.0
        # A batch waits for all other work, also for that of its own caller.
        queued = (
            self._first.seconds + self._batch.seconds_before(caller) if batch else self._first.seconds_before(caller)
        )
        # The first slot is free when a part of the work in progress is done; then all of them share what waits.
        running = max(self._seconds.values(), default=0.0) / (self.count + 1)
        return running + queued / self.count

    def crowded_s(self) -> float:
        """Returns for how long work has waited without a pause that was not a batch's, in seconds; 0 if none does."""
        return time.monotonic() - self._eased_at if self._first else 0.0

    def submit(self, run: Callable[[], None], kind: str = "", caller: object = None, *, batch: bool = False) -> None:
        """Has work done in a thread of the limit, as soon as it has a slot.

        Args:
            run: The work.
            kind: Work of one kind takes about as long.
            caller: Callers are served one after the other, however much work each has.
            batch: It gives way to all work that is not a batch's.
        """
        with self._lock:
            work = _Work(run, kind, batch, self._seconds.get(kind, 0.0), caller)
            if not self._free:
                self._enqueue(work)
                return
            self._free -= 1
            begin = self._thread_for(work)
        begin()

    def __enter__(self) -> Self:
        """Waits for a slot and takes it."""
        seat: _Seat | None = None
        with self._lock:
            if self._free:
                self._free -= 1
            else:
                seat = _Seat()
                self._returning.append(seat)
        if seat:
            seat.wake.acquire()
        self._thread.holds = True
        return self

    def __exit__(self, *_: object) -> None:
        """Releases the slot."""
        self._thread.holds = False
        begin: Callable[[], None] | None = None
        with self._lock:
            if work := self._next():
                begin = self._thread_for(work)
        if begin:
            begin()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Lets other calls go first while the block waits; does nothing in a thread that holds no slot."""
        if not self._thread.holds:
            yield
            return
        self.__exit__()
        begun = time.monotonic()
        try:
            yield
        finally:
            self.__enter__()
            self._thread.waited_s += time.monotonic() - begun

    def shutdown(self) -> None:
        """Ends the threads as they finish; work that waits is dropped."""
        with self._lock:
            self._ended = True
            self._first.clear()
            self._batch.clear()
            seats, self._parked = self._parked, []
        for seat in seats:
            seat.wake.release()

    def _enqueue(self, work: _Work) -> None:
        if self._ended:
            return
        if work.batch:
            self._batch.add(work)
            return
        if not self._first:
            self._eased_at = time.monotonic()
        self._first.add(work)

    def _next(self) -> _Work | None:
        """Passes a slot on: returns the work that gets it; None if a thread that waited has it, or it is free."""
        # A ranking that has begun comes first: its caller has waited longest, and its profile is in memory.
        if self._returning:
            self._returning.popleft().wake.release()
            return None
        for queue in (self._first, self._batch):
            if queue:
                return queue.take()
        self._free += 1
        return None

    def _thread_for(self, work: _Work) -> Callable[[], None]:
        """Returns what begins work in a thread that waits, or in a new one; to be called without the lock."""
        if self._parked:
            seat = self._parked.pop()
            seat.work = work
            return seat.wake.release
        # A daemon, as the end of the process waits for calls and not for threads.
        return threading.Thread(target=self._work_on, args=(_Seat(work),), name="ranking", daemon=True).start

    def _work_on(self, seat: _Seat) -> None:
        """Does the work of a seat, then whatever waits, and waits itself where nothing does."""
        while work := seat.work:
            self._thread.holds, self._thread.waited_s = True, 0.0
            begun = time.monotonic()
            try:
                work.run()
            except Exception:  # noqa: BLE001 - a defect in one call must not end the thread
                # Its caller has been answered, or sees its deadline pass; the slot must not be lost.
                _log.exception("work failed")
            seconds = time.monotonic() - begun - self._thread.waited_s
            self._thread.holds = False
            with self._lock:
                self._note(work.kind, seconds)
                following = seat.work = self._next()
                if not following:
                    if self._ended:
                        return
                    self._parked.append(seat)
            # Not by `seat.work`, which may be set again by now.
            if not following:
                seat.wake.acquire()

    def _note(self, kind: str, seconds: float) -> None:
        average = self._averages.setdefault(kind, _Average())
        average.add(seconds)
        if average.count >= _LEAST:
            self._seconds[kind] = average.seconds
